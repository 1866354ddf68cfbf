"""SGHMC for networks: the contract, conjugate regression as judge, and warnings where the noise goes out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, NumericalWarning, SettingError
from bayesdl.inference._fitting import network_problem
from bayesdl.inference._stochastic_gradient import batch_log_density
from bayesdl.samplers.stochastic import Minibatches, batch_gradient
from bayesdl.testing import check_engine


def small(model: bdl.BNN, **settings) -> bdl.SGHMC:
    return bdl.SGHMC(model, **{"num_chains": 2, "num_warmup": 30, "num_draws": 20, "thin": 1, **settings})


@pytest.mark.parametrize(
    ("model", "batch_size"),
    [
        (bdl.BNN(hidden=(5,), activation="silu", prior=bdl.priors.StudentT(dof=4.0)), 7),
        (bdl.BNN(hidden=(5,), likelihood=bdl.Bernoulli()), 7),
    ],
    ids=["minibatches, heavy tails", "binary, minibatches"],
)
def test_obeys_the_contract(model, batch_size):
    check_engine(small(model, batch_size=batch_size, num_warmup=45, num_draws=3))


@pytest.mark.parametrize("activation", ["tanh", "sin"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_minibatch_gradients_of_an_epoch_add_up_to_the_full_gradient(activation, batch):
    """Each chain's own batches, fused and by autograd: weighted by n / N they are the gradient of all the data."""
    rng = np.random.default_rng(1)
    x, y = torch.tensor(rng.normal(size=(*batch, 23, 2))), torch.tensor(rng.normal(size=(*batch, 23)))
    problem = network_problem("test", bdl.BNN(hidden=(5,), activation=activation), x, y, standardize=True)
    q = problem.starts(3, 0)
    gradient = batch_gradient(batch_log_density(problem))
    full_value, full = gradient(q, None)
    batches = Minibatches(4, 3, 23, 8, x.device)
    parts = [batches.next() for _ in range(3)]
    assert not torch.equal(parts[0][0], parts[0][1])
    values, slopes = zip(*(gradient(q, rows) for rows in parts), strict=True)
    shares = [rows.shape[-1] / 23 for rows in parts]
    torch.testing.assert_close(sum(w * s for w, s in zip(shares, slopes, strict=True)), full)
    torch.testing.assert_close(sum(w * v for w, v in zip(shares, values, strict=True)), full_value)
    space = problem.space
    own = space.log_density(q[..., 1:2, :], *(part[..., parts[0][1], :] for part in (problem.x, problem.y)), 23 / 8)
    torch.testing.assert_close(values[0][..., 1:2], own)


def linear_problem() -> tuple[bdl.BNN, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A network without hidden layers and with (nearly) known noise: model, x, y, scales, posterior mean and cov."""
    rng = np.random.default_rng(10)
    x = torch.tensor(rng.normal(size=(60, 2)))
    y = x @ torch.tensor([0.8, -1.7], dtype=torch.float64) + 0.5 + torch.tensor(0.6 * rng.normal(size=60))
    # a noise prior this narrow fixes the variance at 0.36 to about two parts in a hundred
    known = bdl.Gaussian(noise_variance=0.36, prior=bdl.priors.LogNormal(float(np.log(0.36)), 0.02), lower=0.0)
    model = bdl.BNN(hidden=(), prior=bdl.priors.Normal(scale=1.4, bias_scale=0.7), likelihood=known)
    design = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], -1)
    scales = torch.tensor([1.4 / 2**0.5] * 2 + [0.7], dtype=torch.float64)
    covariance = torch.linalg.inv(design.T @ design / 0.36 + torch.diag(scales**-2))
    return model, x, y, scales, covariance @ design.T @ y / 0.36, covariance


@pytest.mark.parametrize("batch_size", [60, 20])
def test_conjugate_linear_regression(batch_size):
    """Means within 0.25 sd, standard deviations within 20 %: 16 chains of 600 steps, each worth 20 draws or more.

    That puts the Monte Carlo error of a mean at 0.06 sd and of an sd at 4 %; the sampler's own bias is some per cent.
    """
    model, x, y, scales, mean, covariance = linear_problem()
    engine = bdl.SGHMC(
        model,
        num_chains=16,
        num_warmup=300,
        num_draws=100,
        thin=6,
        batch_size=batch_size,
        step_size=0.05,
        friction=0.1,
        standardize=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = engine.fit(x, y, seed=3)
    weights, sd = (posterior.draws[..., :3] * scales).flatten(0, 1), covariance.diagonal().sqrt()
    assert float(((weights.mean(0) - mean) / sd).abs().max()) < 0.25
    assert float((weights.std(0) / sd - 1).abs().max()) < 0.2
    assert posterior.diagnostics["noise_clamped_fraction"] == 0
    assert posterior.diagnostics["num_batches"] == 900
    assert posterior.diagnostics["num_gradients"] == pytest.approx(900 * batch_size / 60)


def test_noise_that_goes_out_is_said_aloud():
    """step_size = friction = 0.01 and gradients above 200, as in the published settings; nothing is said elsewhere."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(300, 2))
    y = x @ np.array([1.0, -0.5]) + 0.01 * rng.normal(size=300)
    network = bdl.BNN(hidden=(), likelihood=bdl.Gaussian(noise_variance=2e-4))
    hazard = {"step_size": 0.01, "friction": 0.01, "batch_size": 30, "num_warmup": 200}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        with pytest.warns(NumericalWarning, match="noise was switched off for"):
            posterior = small(network, **hazard).fit(x, y)
    assert posterior.diagnostics["noise_clamped_fraction"] > 0.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calm = small(bdl.BNN(hidden=()), **{**hazard, "friction": 0.2}).fit(x, rng.normal(size=300))
    assert not [w for w in caught if w.category is NumericalWarning]
    assert calm.diagnostics["noise_clamped_fraction"] == 0


def test_diagnostics_and_statistics_of_a_short_run():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(40, 1)), rng.normal(size=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = small(bdl.BNN(hidden=(6,)), batch_size=16).fit(x, y)
    said = [str(w.message) for w in caught if w.category is ConvergenceWarning]
    assert any("effective draws" in text and "bdl.HMC" in text for text in said), said
    diagnostics = posterior.diagnostics
    assert {"rhat", "ess_bulk", "ess_tail", "clipped_fraction", "num_batches", "trace"} <= set(diagnostics)
    assert diagnostics["step_size"]["schedule"] == "constant"
    # 40 points in batches of 14, 13 and 13
    assert diagnostics["num_gradients"] == pytest.approx((50 // 3 * 40 + 14 + 13) / 40)
    tree = posterior.to_arviz()
    assert tree["sample_stats"]["log_density_estimate"].shape == (2, 20)


def test_settings_are_checked_at_the_door():
    with pytest.raises(SettingError, match="friction"):
        bdl.SGHMC(bdl.BNN(), friction=0.0)
    with pytest.raises(SettingError, match="batch_size"):
        bdl.SGHMC(bdl.BNN(), batch_size=0)
    with pytest.raises(SettingError, match=r"bdl\.ExactGP"):
        bdl.SGHMC(bdl.GP(bdl.kernels.RBF())).fit(np.ones((3, 1)), np.ones(3))
