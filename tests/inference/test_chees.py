"""ChEES for networks: the contract, conjugate regression as judge, and what the diagnostics say."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, SettingError
from bayesdl.testing import check_engine


def small(model: bdl.BNN) -> bdl.ChEES:
    return bdl.ChEES(model, num_chains=4, num_warmup=22, num_draws=12, max_steps=8)


@pytest.mark.parametrize(
    "model", [bdl.BNN(hidden=(4,)), bdl.BNN(hidden=(3,), likelihood=bdl.Bernoulli())], ids=["tanh", "binary"]
)
def test_obeys_the_contract(model):
    check_engine(small(model))


def test_conjugate_linear_regression():
    """A network without hidden layers and with (nearly) known noise has a Gaussian posterior in closed form.

    Means and variances of 3 weights within 4 Monte Carlo errors: 6 comparisons, a false alarm for 1 in 2600 seeds.
    """
    rng = np.random.default_rng(10)
    x = torch.tensor(rng.normal(size=(25, 2)))
    y = x @ torch.tensor([0.8, -1.7], dtype=torch.float64) + 0.5 + torch.tensor(0.6 * rng.normal(size=25))
    prior = bdl.priors.Normal(scale=1.4, bias_scale=0.7)
    # a noise prior this narrow holds the variance at 0.36 to 2 %, which moves the moments by less than 1 in 1000
    known = bdl.Gaussian(noise_variance=0.36, prior=bdl.priors.LogNormal(float(np.log(0.36)), 0.02), lower=0.0)
    network = bdl.BNN(hidden=(), prior=prior, likelihood=known)
    engine = bdl.ChEES(network, num_chains=16, num_warmup=150, num_draws=80, standardize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = engine.fit(x, y, seed=1)
    design = torch.cat([x, torch.ones(25, 1, dtype=torch.float64)], -1)
    scales = torch.tensor([1.4 / 2**0.5] * 2 + [0.7], dtype=torch.float64)
    covariance = torch.linalg.inv(design.T @ design / 0.36 + torch.diag(scales**-2))
    mean = (covariance @ design.T @ y / 0.36).numpy()
    weights = (posterior.draws[..., :3] * scales).numpy()
    found = np.concatenate([weights, (weights - mean) ** 2], -1)
    wanted = np.concatenate([mean, covariance.diagonal().numpy()])
    error = array_stats.mcse(found, method="mean", chain_axis=0, draw_axis=1)
    assert (np.abs(found.mean((0, 1)) - wanted) / error).max() < 4
    # as many independent draws would leave errors of 3 % of a standard deviation
    assert (error[:3] < 0.1 * covariance.diagonal().sqrt().numpy()).all()


def test_short_runs_are_not_trusted_in_silence():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 1)), rng.normal(size=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = bdl.ChEES(bdl.BNN(hidden=(10,)), num_chains=2, num_warmup=5, num_draws=5, max_steps=8).fit(x, y)
    said = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    assert any(text.startswith("ChEES.fit") and "effective draws" in text for text in said), said
    assert {"rhat", "ess_bulk", "ess_tail", "divergences", "step_size", "trace", "trajectory_length"} <= set(
        posterior.diagnostics
    )
    assert "step_size" in posterior.to_arviz().sample_stats


def test_settings_are_checked_at_the_door():
    with pytest.raises(SettingError, match="metric must be one of"):
        bdl.ChEES(bdl.BNN(), metric="riemann")
    with pytest.raises(SettingError, match="target_accept"):
        bdl.ChEES(bdl.BNN(), target_accept=1.0)
    with pytest.raises(SettingError, match="max_steps"):
        bdl.ChEES(bdl.BNN(), max_steps=0)
