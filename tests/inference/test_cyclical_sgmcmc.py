"""Cyclical SG-MCMC for networks: the contract, conjugate regression as judge, and what a cycle gives."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, NumericalWarning, SettingError
from bayesdl.testing import check_engine
from tests.inference.test_sghmc import linear_problem


def small(model: bdl.BNN, **settings) -> bdl.CyclicalSGMCMC:
    return bdl.CyclicalSGMCMC(
        model,
        **{"num_chains": 2, "num_warmup": 20, "num_cycles": 2, "cycle_length": 16, "draws_per_cycle": 8, **settings},
    )


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (bdl.BNN(hidden=(6,)), {"batch_size": 7}),
        (bdl.BNN(hidden=(5,), likelihood=bdl.Bernoulli()), {"dynamics": "sgld"}),
    ],
    ids=["minibatches", "binary, sgld"],
)
def test_obeys_the_contract(model, settings):
    check_engine(small(model, num_warmup=10, cycle_length=6, draws_per_cycle=2, **settings))


def test_conjugate_linear_regression():
    """Means within 0.3 sd, standard deviations within 25 %, from minibatches of 20 of 60 points.

    16 chains with five cycles of some three independent draws: the Monte Carlo error of a mean is 0.07 sd, of an
    sd 5 %; descents and minibatches add some per cent.
    """
    model, x, y, scales, mean, covariance = linear_problem()
    engine = bdl.CyclicalSGMCMC(
        model,
        num_chains=16,
        num_warmup=400,
        num_cycles=5,
        cycle_length=200,
        draws_per_cycle=10,
        batch_size=20,
        step_size=0.06,
        friction=0.1,
        standardize=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = engine.fit(x, y, seed=2)
    weights, sd = (posterior.draws[..., :3] * scales).flatten(0, 1), covariance.diagonal().sqrt()
    assert float(((weights.mean(0) - mean) / sd).abs().max()) < 0.3
    assert float((weights.std(0) / sd - 1).abs().max()) < 0.25


def test_every_cycle_gives_its_draws():
    rng = np.random.default_rng(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = small(bdl.BNN(hidden=(3,)), num_cycles=3).fit(rng.normal(size=(30, 1)), rng.normal(size=30))
    assert posterior.draws.shape[:2] == (2, 24)
    assert posterior.diagnostics["num_batches"] == 68
    assert posterior.diagnostics["num_gradients"] == 68
    assert posterior.diagnostics["step_size"]["schedule"] == "cosine cycles"
    sizes = posterior.to_arviz()["sample_stats"]["step_size"].values[0].reshape(3, 8)
    assert (np.diff(sizes, axis=1) <= 0).all()
    np.testing.assert_allclose(sizes, np.tile(sizes[0], (3, 1)))


def test_settings_are_checked_at_the_door():
    with pytest.raises(SettingError, match="dynamics must be one of"):
        bdl.CyclicalSGMCMC(bdl.BNN(), dynamics="hmc")
    with pytest.raises(SettingError, match="exploration"):
        bdl.CyclicalSGMCMC(bdl.BNN(), exploration=1.0)
    with pytest.raises(SettingError, match="cycle_length"):
        bdl.CyclicalSGMCMC(bdl.BNN(), cycle_length=1)
