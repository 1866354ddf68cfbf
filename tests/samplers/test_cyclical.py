"""Cyclical SG-MCMC: the plan of a cycle, its two parts, and conjugate regression from its draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bayesdl.samplers import cyclical
from tests.samplers.test_sgld import numbers, regression


def test_the_plan_of_two_cycles():
    """Ten steps a cycle, six of them without noise; draws at equal increments of the step sizes of the last four."""
    plan = cyclical.cyclical_plan(
        0.6, num_warmup=3, num_cycles=2, cycle_length=10, draws_per_cycle=2, exploration=0.6, power=0.5
    )
    eta = [0.18 * (math.cos(math.pi * (k % 10) / 10) + 1) for k in range(20)]
    np.testing.assert_allclose(plan.step_sizes, [0.6] * 3 + np.sqrt(eta).tolist(), rtol=1e-12)
    assert plan.noisy == [True] * 3 + ([False] * 6 + [True] * 4) * 2
    assert plan.adapt == [True] * 3 + [False] * 20
    # sampling steps of relative size cos(pi k / 20) for k = 6 … 9: 0.588, 0.454, 0.309, 0.156; half of 1.507 is 0.754
    assert plan.keep == [0] * 3 + ([0] * 6 + [0, 1, 0, 1]) * 2


@pytest.mark.parametrize("dynamics", ["sgld", "sghmc"])
def test_the_first_part_of_a_cycle_is_a_descent_and_the_second_samples(dynamics, monkeypatch):
    sampler = getattr(cyclical, dynamics)
    seen, step = [], sampler.step
    monkeypatch.setattr(sampler, "step", lambda *arguments: seen.append(arguments) or step(*arguments))
    start = numbers(3, 2)
    run = cyclical.run(
        lambda q, rows: -0.5 * q.square().sum(-1),
        start,
        num_data=1,
        num_warmup=2,
        num_cycles=2,
        cycle_length=8,
        draws_per_cycle=3,
        step_size=0.3,
        exploration=0.5,
        dynamics=dynamics,
    )
    # state, parameters, rows, noise, step size, adapt
    assert [arguments[4] is None for arguments in seen] == [False] * 2 + ([True] * 4 + [False] * 4) * 2
    assert [arguments[6] for arguments in seen] == [True] * 2 + [False] * 16
    assert [arguments[5] for arguments in seen] == run.step_sizes
    assert run.draws.shape == (3, 6, 2)


@pytest.mark.parametrize("dynamics", ["sgld", "sghmc"])
def test_conjugate_linear_regression_from_minibatches(dynamics):
    """One mode: the cycles sample it. Means within 0.15 sd, standard deviations within 20 % of the closed form.

    64 chains with five cycles of one independent draw or two each: the Monte Carlo error of a mean is 0.05 sd. What the
    descents leave behind and the falling steps take the rest.
    """
    log_density, mean, covariance = regression()
    sd = covariance.diagonal().sqrt()
    run = cyclical.run(
        log_density,
        mean + 3 * sd * numbers(64, 3, seed=3),
        num_data=200,
        num_warmup=300,
        num_cycles=5,
        cycle_length=200,
        draws_per_cycle=10,
        step_size=0.03,
        exploration=0.25,
        dynamics=dynamics,
        friction=0.1,
        batch_size=50,
        seed=4,
    )
    draws = run.draws.flatten(0, 1)
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.15
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.2
