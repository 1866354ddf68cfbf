"""The Hamiltonian samplers against the reference draws of posteriordb, in mean and standard deviation."""

from __future__ import annotations

import numpy as np
import pytest
from arviz_stats.base import array_stats

from bayesdl.inference.sample import sample
from tests import posteriordb

AXES = {"chain_axis": 0, "draw_axis": 1}


def moments(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means, then standard deviations, of draws (C, N, parameters), and the Monte Carlo error of each.

    Both errors come from the effective sample size of the very quantity that is averaged: that of the squared
    deviations for a standard deviation, by var(sd) = var(sd^2) / (4 sd^2). HMC draws can be better than independent
    ones for the mean and worse for the variance, so one effective sample size for both would not do.
    """
    mean, sd = draws.mean((0, 1)), draws.std((0, 1))
    of_mean = array_stats.mcse(draws, method="mean", **AXES)
    of_sd = array_stats.mcse((draws - mean) ** 2, method="mean", **AXES) / (2 * sd)
    return np.concatenate([mean, sd]), np.concatenate([of_mean, of_sd])


QUICK = ("eight_schools-eight_schools_noncentered", "sblri-blr")


def compare(data_dir, name: str, sampler: str, seed: int, **settings) -> None:
    """Every mean and standard deviation lies within 4 Monte Carlo errors, the reference's error counted too."""
    reference = posteriordb.load(data_dir, name)
    problem = posteriordb.MODELS[name](reference.data)
    settings = {"num_chains": 32, "num_warmup": 200, "num_draws": 120, "target_accept": 0.9, **settings}
    chains = sample(problem.log_density, sampler=sampler, transform=problem.transform, seed=seed, **settings)
    ours, names = posteriordb.stacked(chains.values)
    assert names == reference.names
    assert chains.diagnostics["rhat"] < 1.05
    (ours, our_error), (theirs, their_error) = moments(ours), moments(reference.draws)
    error = np.hypot(our_error, their_error)
    z = (ours - theirs) / error
    assert np.abs(z).max() < 4, dict(zip(names * 2, z.round(1), strict=True))
    # The comparison means something only where the error is small beside the posterior's own width.
    width = np.tile(theirs[len(names) :], 2)
    assert (error < 0.08 * width).all()


# A rare divergence would warn; the comparison is the judge in all of these.
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("name", QUICK)
def test_hmc_agrees_with_the_reference_draws(data_dir, name, seed):
    """Six cases make 96 comparisons.

    A right sampler is beyond 4 errors in 1 of 16 000 of them, or 1 of 3 700 if the estimated errors are a tenth too
    small, so fewer than 3 % of seeds would fail. The seeds are fixed.
    """
    compare(data_dir, name, "hmc", seed, num_steps=10)


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize(("sampler", "name"), [("chees", QUICK[0]), ("nuts", QUICK[1])])
def test_nuts_and_chees_agree_with_the_reference_draws(data_dir, sampler, name):
    """One quick case each, 32 comparisons in all: a false alarm for fewer than 1 % of seeds."""
    # Trajectories of random length make short ones among them, so ChEES-HMC needs more of them, which cost less.
    compare(data_dir, name, sampler, 11, num_warmup=150, num_draws=240 if sampler == "chees" else 80)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("name", list(posteriordb.MODELS))
@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees"])
def test_every_sampler_agrees_with_every_reference(data_dir, sampler, name, seed):
    """Seven posteriors, three samplers, three seeds: 720 comparisons at 4 errors.

    A false alarm somewhere for 1 in 22 sets of seeds (1 in 5 if the errors are a tenth too small); the seeds are fixed.
    """
    bound = {"max_depth": 7} if sampler == "nuts" else {"num_steps": 32}
    compare(data_dir, name, sampler, seed, **bound)


def test_the_comparison_notices_a_wrong_prior(data_dir):
    """A third of the log Jacobian of tau left out moves some moment by more than 4 errors."""
    name = "eight_schools-eight_schools_noncentered"
    reference = posteriordb.load(data_dir, name)
    problem = posteriordb.MODELS[name](reference.data)
    wrong = sample(
        lambda q: problem.log_density(q) - q[..., 9] / 3,
        dim=10,
        num_chains=32,
        num_warmup=150,
        num_draws=60,
        num_steps=10,
        target_accept=0.9,
        transform=problem.transform,
        seed=11,
    )
    ours, _ = posteriordb.stacked(wrong.values)
    (ours, our_error), (theirs, their_error) = moments(ours), moments(reference.draws)
    assert np.abs((ours - theirs) / np.hypot(our_error, their_error)).max() > 4
