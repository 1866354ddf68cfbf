"""SGLD for networks: the contract, conjugate regression as judge, the schedule, and the warnings."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, NumericalWarning, SettingError
from bayesdl.testing import check_engine
from tests.inference.test_sghmc import linear_problem


def small(model: bdl.BNN, **settings) -> bdl.SGLD:
    return bdl.SGLD(model, **{"num_chains": 2, "num_warmup": 30, "num_draws": 20, "thin": 1, **settings})


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (bdl.BNN(hidden=(6,)), {"batch_size": 7}),
        (bdl.BNN(hidden=(5,), likelihood=bdl.Categorical(3)), {}),
    ],
    ids=["minibatches", "classes"],
)
def test_obeys_the_contract(model, settings):
    check_engine(small(model, num_warmup=20, num_draws=3, **settings))


@pytest.mark.parametrize(
    "settings", [{"step_size": 0.03}, {"precondition": "none", "step_size": 4e-4}], ids=["rmsprop", "plain"]
)
def test_conjugate_linear_regression(settings):
    """Means within 0.3 sd, standard deviations within 20 %, from minibatches of 20 of 60 points.

    16 chains of 1200 steps: the slowest coordinate relaxes in some 60 steps, so that the Monte Carlo error of a mean
    is about 0.06 sd and that of an sd about 4 %.
    """
    model, x, y, scales, mean, covariance = linear_problem()
    engine = bdl.SGLD(
        model, num_chains=16, num_warmup=600, num_draws=100, thin=12, batch_size=20, standardize=False, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = engine.fit(x, y, seed=2)
    weights, sd = (posterior.draws[..., :3] * scales).flatten(0, 1), covariance.diagonal().sqrt()
    assert float(((weights.mean(0) - mean) / sd).abs().max()) < 0.3
    assert float((weights.std(0) / sd - 1).abs().max()) < 0.2


def test_the_schedule_decays_as_asked():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 1)), rng.normal(size=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        constant = small(bdl.BNN(hidden=(3,))).fit(x, y)
        decaying = small(bdl.BNN(hidden=(3,)), step_size=0.02, decay=0.6, decay_offset=25.0).fit(x, y)
        plain = small(bdl.BNN(hidden=(3,)), precondition="none").fit(x, y)
    assert constant.diagnostics["step_size"] == {"schedule": "constant", "first": 0.01, "last": 0.01}
    assert plain.diagnostics["step_size"]["first"] == pytest.approx(0.01 / 30)
    found = decaying.diagnostics["step_size"]
    assert found["schedule"] == "polynomial"
    assert found["last"] == pytest.approx(0.02 * (1 + 49 / 25) ** -0.6)
    assert decaying.draws.shape == constant.draws.shape


def test_moves_that_are_cut_are_said_aloud():
    """A step a thousand times too large for plain SGLD stays finite, and warns of it."""
    rng = np.random.default_rng(4)
    x = torch.tensor(rng.normal(size=(50, 1)))
    engine = small(bdl.BNN(hidden=()), precondition="none", step_size=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        with pytest.warns(NumericalWarning, match=r"moves were cut at one prior width; lower step_size"):
            posterior = engine.fit(x, x[:, 0] + 0.05)
    assert posterior.diagnostics["clipped_fraction"] > 0.1


def test_settings_are_checked_at_the_door():
    with pytest.raises(SettingError, match="precondition must be one of"):
        bdl.SGLD(bdl.BNN(), precondition="adam")
    with pytest.raises(SettingError, match="decay"):
        bdl.SGLD(bdl.BNN(), decay=-1.0)
    with pytest.raises(SettingError, match="step_size"):
        bdl.SGLD(bdl.BNN(), step_size=0.0)
