"""What every sampler of the family keeps: chains that do not know of each other, and settings that change no draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bayesdl.samplers import chees, hmc, mams, mclmc, meads, nuts

FAMILY: dict[str, tuple[Any, dict[str, Any]]] = {
    "hmc": (hmc, {"num_steps": 6, "step_size": 0.25}),
    "nuts": (nuts, {"max_depth": 5, "step_size": 0.25}),
    "chees": (chees, {"step_size": 0.25, "trajectory_length": 1.3}),
    "mams": (mams, {"step_size": 0.5, "trajectory_length": 2.0}),
    "mclmc": (mclmc, {"step_size": 0.5, "trajectory_length": 2.0}),
    "meads": (meads, {}),
}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banana(q):
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.3 - 0.5 * q[..., 2] ** 2


def frozen(name, metric):
    """Settings without adaptation, with an inverse mass far from the identity."""
    variances = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    if name == "meads":
        step_size, damping = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
        return {"parameters": meads.Parameters(step_size, variances, damping)}
    inverse_mass = torch.diag(variances) + 0.4 if metric == "dense" else variances
    return {"metric": metric, "inverse_mass": inverse_mass, **FAMILY[name][1]}


def starts(name, num):
    """MEADS learns from 16 chains or more."""
    return numbers(16 if name == "meads" else num, 3, seed=1)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_with_adaptation_frozen_a_chain_of_64_is_the_chain_alone(name, metric):
    """To rounding, over 30 transitions, and so are its statistics."""
    module = FAMILY[name][0]
    settings = {"num_warmup": 0, "num_draws": 30, "seed": 11, **frozen(name, metric)}
    start = numbers(64, 3, seed=1)
    many = module.run(banana, start, **settings)
    assert float(many.draws.std()) > 0.3
    for num in (1, 7):
        few = module.run(banana, start[:num], **settings)
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=0, atol=1e-8)
        for key, value in few.stats.items():
            torch.testing.assert_close(value, many.stats[key][:num], rtol=1e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", FAMILY)
def test_checkpoints_thinning_and_blocks_leave_the_draws_as_they_are(name, tmp_path):
    """A run that saves itself, one that evaluates two chains at a time, and one that keeps every third draw."""
    module, settings = FAMILY[name]
    settings = {"num_warmup": 25, "seed": 2, **settings}
    start = starts(name, 5)
    whole = module.run(banana, start, num_draws=12, **settings)
    saved = module.run(banana, start, num_draws=12, checkpoint=tmp_path / "run", **settings)
    again = module.run(banana, start, num_draws=12, checkpoint=tmp_path / "run", **settings)
    thinned = module.run(banana, start, num_draws=4, thin=3, **settings)
    assert torch.equal(saved.draws, whole.draws)
    assert torch.equal(again.draws, whole.draws)
    assert torch.equal(thinned.draws, whole.draws[:, 2::3])
    assert again.num_gradients == saved.num_gradients == whole.num_gradients
    settings = {"num_warmup": 0, "num_draws": 12, "seed": 2, **frozen(name, "diagonal")}
    blocks, plain = module.run(banana, start, chain_batch=2, **settings), module.run(banana, start, **settings)
    torch.testing.assert_close(blocks.draws, plain.draws, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", FAMILY)
def test_a_budget_is_kept_to_one_transition_and_counts_everything(name):
    module, settings = FAMILY[name]
    calls = []

    def counted(q):
        calls.append(1)
        return banana(q)

    settings = {"num_warmup": 30, "num_draws": 40, "seed": 2, **settings}
    start = starts(name, 1)
    whole = module.run(counted, start, **settings)
    assert len(calls) == whole.num_gradients + 1  # the look at the door
    budget = whole.num_gradients - whole.num_gradients // 10
    cut = module.run(banana, start, max_gradients=budget, **settings)
    num = cut.draws.shape[1]
    assert cut.stopped_by == "max_gradients"
    assert torch.equal(cut.draws, whole.draws[:, :num])
    most = 2 * int(whole.stats["num_steps"].max())  # two gradients a step, where the integrator takes two
    assert budget <= cut.num_gradients <= budget + most
    assert math.isfinite(float(cut.draws.sum()))
