"""HMC for networks: the contract, conjugate regression as judge, and what the diagnostics say."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, SettingError
from bayesdl.testing import check_engine


def small(model: bdl.BNN) -> bdl.HMC:
    return bdl.HMC(model, num_chains=2, num_warmup=30, num_draws=20, num_steps=8)


@pytest.mark.parametrize(
    "model",
    [
        bdl.BNN(hidden=(8,)),
        bdl.BNN(hidden=(5,), activation="gelu", prior=bdl.priors.StudentT(dof=4.0)),
        bdl.BNN(hidden=(8,), likelihood=bdl.Bernoulli()),
        bdl.BNN(hidden=(4,), likelihood=bdl.Categorical(3)),
    ],
    ids=["tanh", "gelu, heavy tails", "binary", "classes"],
)
def test_obeys_the_contract(model):
    check_engine(small(model))


def test_obeys_the_contract_without_its_output_layer():
    check_engine(replace(small(bdl.BNN(hidden=(8,))), collapse=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_conjugate_linear_regression(seed):
    """A network without hidden layers and with (nearly) known noise has a Gaussian posterior in closed form.

    Means and standard deviations of 3 weights, 2 statistics, 3 seeds at 4 Monte Carlo errors: 18 comparisons, about
    0.1 % false alarms; the seeds are fixed.
    """
    rng = np.random.default_rng(10)
    x = torch.tensor(rng.normal(size=(25, 2)))
    y = x @ torch.tensor([0.8, -1.7], dtype=torch.float64) + 0.5 + torch.tensor(0.6 * rng.normal(size=25))
    prior = bdl.priors.Normal(scale=1.4, bias_scale=0.7)
    # a noise prior this narrow fixes the variance at 0.36 to one part in a thousand
    known = bdl.Gaussian(noise_variance=0.36, prior=bdl.priors.LogNormal(float(np.log(0.36)), 1e-3), lower=0.0)
    engine = bdl.HMC(
        bdl.BNN(hidden=(), prior=prior, likelihood=known),
        num_chains=8,
        num_warmup=250,
        num_draws=300,
        num_steps=24,
        standardize=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = engine.fit(x, y, seed=seed)
    design = torch.cat([x, torch.ones(25, 1, dtype=torch.float64)], -1)
    scales = torch.tensor([1.4 / 2**0.5] * 2 + [0.7], dtype=torch.float64)
    covariance = torch.linalg.inv(design.T @ design / 0.36 + torch.diag(scales**-2))
    mean = covariance @ design.T @ y / 0.36
    weights = posterior.draws[..., :3] * scales
    stats = array_stats
    for i in range(3):
        draws = weights[..., i].numpy()
        ess = float(stats.ess(draws, method="mean"))
        sd = float(covariance[i, i].sqrt())
        assert abs(draws.mean() - float(mean[i])) < 4 * sd / ess**0.5
        squares = (draws - float(mean[i])) ** 2
        error = squares.std() / float(stats.ess(squares, method="mean")) ** 0.5
        assert abs(squares.mean() - sd**2) < 4 * error
    # the predictive is the average over the weights, so its moments follow from theirs
    latent = posterior.predict(x[:4], noise=False)
    expected = (design[:4] @ covariance * design[:4]).sum(-1)
    torch.testing.assert_close(latent.mean, design[:4] @ mean, rtol=0, atol=0.05)
    torch.testing.assert_close(latent.variance, expected, rtol=0.25, atol=0)


def test_agrees_with_the_exact_gp_on_a_linear_model():
    """A linear network with a normal prior and no bias is a GP with kernel (scale^2 / d) x x'."""
    rng = np.random.default_rng(4)
    x, y = torch.tensor(rng.normal(size=(30, 3))), torch.tensor(rng.normal(size=30))
    x_new = torch.tensor(rng.normal(size=(6, 3)))
    noise = bdl.Gaussian(noise_variance=0.5, prior=bdl.priors.LogNormal(float(np.log(0.5)), 1e-3), lower=0.0)
    prior = bdl.priors.Normal(scale=0.9, bias_scale=1e-4)
    network = bdl.BNN(hidden=(), prior=prior, likelihood=noise)
    engine = bdl.HMC(network, num_chains=8, num_warmup=250, num_draws=300, num_steps=24, standardize=False)
    hmc = engine.fit(x, y)
    kernel = bdl.kernels.Linear(variance=0.81 / 3)
    gp = bdl.ExactGP(bdl.GP(kernel, mean="zero", likelihood=noise), optimize=False, standardize=False).fit(x, y)
    ours, exact = hmc.predict(x_new), gp.predict(x_new)
    # 2400 draws, at least 1000 effective: five standard errors of a mean are 0.16 sd, of a variance about 22 %
    assert float(((ours.mean - exact.mean).abs() / exact.stddev).max()) < 0.16
    assert float((ours.variance / exact.variance - 1).abs().max()) < 0.2


def test_short_runs_are_not_trusted_in_silence():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 1)), rng.normal(size=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = bdl.HMC(bdl.BNN(hidden=(10,)), num_chains=2, num_warmup=5, num_draws=5, num_steps=2).fit(x, y)
    said = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    assert any("effective draws" in text and "num_warmup" in text for text in said), said
    assert {"rhat", "ess_bulk", "ess_tail", "divergences", "step_size", "acceptance_rate", "trace"} <= set(
        posterior.diagnostics
    )


def test_an_update_names_an_engine_that_can():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = small(bdl.BNN(hidden=(3,))).fit(np.ones((4, 1)), np.arange(4.0))
    with pytest.raises(NotImplementedError, match=r"bdl\.ExactGP"):
        posterior.condition_on(np.ones((1, 1)), np.ones(1))


def test_classification_of_breast_cancer():
    """The first five columns, held out: accuracy, and probabilities that mean what they say."""
    data = bdl.datasets.load("breast_cancer")
    test = bdl.datasets.splits(len(data.y), 1, 0.25, seed=1)[0]
    x = data.x[:, :5]
    model = bdl.BNN(hidden=(5,), likelihood=bdl.Bernoulli())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = bdl.HMC(model, num_chains=4, num_warmup=150, num_draws=100, num_steps=16).fit(
            x[~test], data.y[~test]
        )
    table = bdl.compare({"HMC": posterior}, x[test], data.y[test])
    assert table.loc["HMC", "accuracy"] > 0.9
    assert table.loc["HMC", "ECE"] < 0.1


def test_settings_are_checked_at_the_door():
    with pytest.raises(SettingError, match="metric must be one of"):
        bdl.HMC(bdl.BNN(), metric="riemann")
    with pytest.raises(SettingError, match="target_accept"):
        bdl.HMC(bdl.BNN(), target_accept=1.0)
