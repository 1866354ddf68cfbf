"""The Hamiltonian samplers against the reference draws of posteriordb, in mean and standard deviation."""

from __future__ import annotations

import numpy as np
import pytest

from bayesdl.inference.sample import sample
from tests import posteriordb

QUICK = ("eight_schools-eight_schools_noncentered", "sblri-blr")


def check(data_dir, name: str, sampler: str, seed: int, **settings) -> None:
    """Every mean and standard deviation lies within 4 Monte Carlo errors, the reference's error counted too."""
    found = posteriordb.compare(data_dir, name, sampler, seed, **settings)
    assert found.chains.diagnostics["rhat"] < 1.05
    assert np.abs(found.z).max() < 4, dict(zip(found.names, found.z.round(1), strict=True))
    # The comparison means something only where the error is small beside the posterior's own width.
    assert (found.relative_error < 0.08).all()


# A rare divergence would warn; the comparison is the judge in all of these.
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("name", QUICK)
def test_hmc_agrees_with_the_reference_draws(data_dir, name, seed):
    """Six cases make 96 comparisons.

    A right sampler is beyond 4 errors in 1 of 16 000 of them, or 1 of 3 700 if the estimated errors are a tenth too
    small, so fewer than 3 % of seeds would fail. The seeds are fixed.
    """
    check(data_dir, name, "hmc", seed, num_warmup=200, num_draws=120, num_steps=10)


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize(("sampler", "name"), [("chees", QUICK[0]), ("nuts", QUICK[1])])
def test_nuts_and_chees_agree_with_the_reference_draws(data_dir, sampler, name):
    """One quick case each, 32 comparisons in all: a false alarm for fewer than 1 % of seeds."""
    # Trajectories of random length make short ones among them, so ChEES-HMC needs more of them, which cost less.
    check(data_dir, name, sampler, 11, num_warmup=150, num_draws=240 if sampler == "chees" else 80)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("name", list(posteriordb.MODELS))
@pytest.mark.parametrize("sampler", posteriordb.SAMPLERS)
def test_every_sampler_agrees_with_every_reference(data_dir, sampler, name, seed):
    """Seven posteriors, five samplers, three seeds: 1200 comparisons at 4 errors.

    A false alarm somewhere for 1 in 13 sets of seeds (1 in 3 if the errors are a tenth too small); the seeds are fixed.
    `benchmarks/posteriordb.py` writes the table of these cases.
    """
    check(data_dir, name, sampler, seed)


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
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
    (ours, our_error), (theirs, their_error) = posteriordb.moments(ours), posteriordb.moments(reference.draws)
    assert np.abs((ours - theirs) / np.hypot(our_error, their_error)).max() > 4
