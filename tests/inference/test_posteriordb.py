"""HMC against the reference draws of posteriordb, in mean and standard deviation."""

from __future__ import annotations

import numpy as np

import pytest
from arviz_stats.base import array_stats

from bayesdl.inference.sample import sample
from tests import posteriordb

SETTINGS = {
    "eight_schools-eight_schools_noncentered": {"num_steps": 16},
    "sblri-blr": {"num_steps": 12},
}
AXES = {"chain_axis": 0, "draw_axis": 1}


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("name", list(posteriordb.MODELS))
def test_hmc_agrees_with_the_reference_draws(data_dir, name, seed):
    """Every mean and standard deviation lies within 4 Monte Carlo errors, the reference's error counted too.

    A right sampler fails one such comparison in 16 000 (two sides of a normal at 4), so that the 96 comparisons of the
    six cases raise a false alarm for fewer than 1 in 160 choices of seeds. The seeds are fixed.
    """
    reference = posteriordb.load(data_dir, name)
    problem = posteriordb.MODELS[name](reference.data)
    chains = sample(
        problem.log_density,
        num_chains=48,
        num_warmup=300,
        num_draws=150,
        target_accept=0.9,
        transform=problem.transform,
        seed=seed,
        **SETTINGS[name],
    )
    ours, names = posteriordb.stacked(chains.values)
    assert names == reference.names
    assert chains.diagnostics["rhat"] < 1.05
    for kind, moment in (("mean", np.mean), ("sd", np.std)):
        errors = [array_stats.mcse(draws, method=kind, **AXES) for draws in (ours, reference.draws)]
        scale = np.hypot(*errors)
        z = (moment(ours, axis=(0, 1)) - moment(reference.draws, axis=(0, 1))) / scale
        assert np.abs(z).max() < 4, dict(zip(names, z.round(1), strict=True))
        # The comparison means something only if the Monte Carlo error is small.
        assert (scale < 0.05 * reference.draws.std((0, 1))).all()
