"""A chain that does not arrive shows: in a mode of its own, without a move; one that arrives late does not."""

from __future__ import annotations

import warnings

import pytest
import torch

from bayesdl.errors import ConvergenceWarning
from bayesdl.samplers import nuts
from bayesdl.samplers._stuck import stuck_chains
from bayesdl.samplers.base import Run


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_of(draws, log_density) -> Run:
    return Run(draws, {"log_density": log_density}, torch.ones(()), torch.ones(3), 1, 1.0)


def test_a_chain_far_below_and_a_chain_at_rest_are_stuck():
    """In one of two groups; D = 3 and changes of about 1 make the limit 8 x 3 or so."""
    draws, log_density = numbers(2, 5, 30, 3, seed=1), numbers(2, 5, 30, seed=2)
    log_density[1, 2] -= 60.0
    draws[1, 4] = draws[1, 4, :1]
    wanted = torch.zeros(2, 5, dtype=torch.bool)
    wanted[1, 2] = wanted[1, 4] = True
    assert torch.equal(stuck_chains(run_of(draws, log_density)), wanted)


def test_chains_that_overlap_are_not_stuck():
    """A chain that comes from below reaches the others: R-hat is its judge."""
    draws, log_density = numbers(3, 30, 3, seed=1), numbers(3, 30, seed=2)
    log_density[0] += torch.linspace(-200, 0, 30, dtype=torch.float64)
    assert not stuck_chains(run_of(draws, log_density)).any()
    assert not stuck_chains(run_of(draws[:1], log_density[:1])).any()


def far_modes(q):
    """Two narrow modes 40 apart of which one is 500 lower in log density: no chain crosses, none belongs there."""
    a, b = -0.5 * (q - 20).square().sum(-1), -0.5 * (q + 20).square().sum(-1) - 500
    return torch.logaddexp(a, b)


def test_a_chain_in_a_mode_without_mass_is_named_in_a_warning():
    start = numbers(4, 2, seed=3) + 20
    start[1] -= 40
    with pytest.warns(ConvergenceWarning, match=r"1 of 4 chains are stuck.*chain 1\b"):
        nuts.run(far_modes, start, num_warmup=40, num_draws=25, seed=1)


def test_a_chain_that_starts_50_standard_deviations_away_arrives():
    """Its own step size brings it in: no warning, and its draws are where those of the others are."""
    start = numbers(4, 5, seed=3)
    start[0] += 50.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = nuts.run(lambda q: -0.5 * q.square().sum(-1), start, num_warmup=60, num_draws=25, seed=1)
    assert float(run.draws[0].norm(dim=-1).max()) < 7
    torch.testing.assert_close(run.inverse_mass, torch.ones(5, dtype=torch.float64), rtol=0.2, atol=0)
