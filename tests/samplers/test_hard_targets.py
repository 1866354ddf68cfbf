"""Hard targets, with the documented result: what samplers get right, what they miss, and how the diagnostics say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.hard_targets import banana, funnel, funnel_noncentred, measure, rotated_gaussian

# Chains, warm-up, draws, and bounds on the trajectories, which long ones in a funnel's neck would make dear.
RUNS = {"hmc": (4, 150, 200, {}), "nuts": (4, 100, 100, {"max_depth": 5}), "chees": (32, 100, 60, {"num_steps": 64})}


def test_known_moments_are_those_of_exact_draws():
    """200 000 draws of the funnel, the banana and the Gaussian by construction: nothing off by 4.5 errors."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(200_000, 10, generator=g, dtype=torch.float64)
    v = 3 * z[:, :1]
    x = 10 * z[:, :1]
    samples = {
        funnel: torch.cat([v, (v / 2).exp() * z[:, 1:]], -1),
        funnel_noncentred: z,
        banana: torch.cat([x, 0.03 * (x**2 - 100) + z[:, 1:2]], -1),
    }
    for make, draws in samples.items():
        target = make()
        values = target.moments(draws.numpy())
        error = values.std(0) / len(values) ** 0.5
        assert (np.abs(values.mean(0) - target.expected) < 4.5 * error).all()
    # densities: the score has mean 0 and its product with the coordinates minus the identity, under the target itself
    for make, draws in samples.items():
        q = draws.clone().requires_grad_()
        (score,) = torch.autograd.grad(make().log_density(q).sum(), q)
        product = (score * draws).detach()
        assert ((product.mean(0) + 1).abs() < 4.5 * product.std(0) / len(draws) ** 0.5).all()
    target = rotated_gaussian(6, 1e4)
    hessian = torch.autograd.functional.hessian(lambda q: target.log_density(q), torch.zeros(6, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(-hessian)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(1e4, rel=1e-6)


def run(make, sampler, seed):
    *counts, settings = RUNS[sampler]
    return measure(make(), sampler, *counts, seed=seed, **settings)


@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees"])
def test_the_funnel_is_missed_and_said_to_be(sampler):
    """No step size suits both mouth and neck: the run warns, and low E-BFMI or divergences say why."""
    found = run(funnel, sampler, seed=1)
    assert found.warned
    assert found.divergences > 0 or found.e_bfmi < 0.3
    assert found.rhat > 1.05
    assert found.ess < 100
    assert (found.draws[..., 0] < -4.5).mean() < 0.06  # of probability 0.067


@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees"])
def test_the_same_law_in_other_coordinates_is_easy(sampler):
    """Three moments at 4 errors for three samplers: a false alarm for 1 in 1700 seeds; nothing is warned of."""
    found = run(funnel_noncentred, sampler, seed=1)
    assert found.z < 4
    assert found.divergences == 0
    assert found.e_bfmi > 0.3
    assert not found.warned


def test_a_diagonal_metric_on_the_rotated_gaussian_shows_in_the_diagnostics():
    """Condition 1e4, d = 50, in a random basis: trajectories of 16 steps cannot cross it, and the run says so."""
    found = measure(rotated_gaussian(), "hmc", 8, 60, 60, seed=3, num_steps=16)
    assert found.warned
    assert found.rhat > 1.05
    assert found.ess < 100


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "settings"), [("nuts", {"metric": "dense"}), ("chees", {})])
def test_the_rotated_gaussian_is_right_under_a_dense_metric(sampler, settings):
    """Condition 1e4, d = 50, 100 moments at 4.6 errors: a false alarm for 1 in 2400 seeds."""
    counts = {"nuts": (16, 300, 150), "chees": (64, 300, 100)}[sampler]
    found = measure(rotated_gaussian(), sampler, *counts, seed=3, **settings)
    assert found.z < 4.6
    assert found.divergences == 0
    assert not found.warned


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees"])
def test_the_banana_is_right_or_said_to_be_wrong(sampler):
    """Five moments of a bent law with long arms, at 4.5 errors for three samplers."""
    counts = {"hmc": (8, 500, 2000), "nuts": (8, 500, 600), "chees": (64, 500, 200)}[sampler]
    found = measure(banana(), sampler, *counts, seed=1)
    assert found.z < 4.5 or found.warned
