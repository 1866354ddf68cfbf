"""The ECDF band holds what it says, by simulation and by an independent recursion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl.errors import DataError, SettingError
from bayesdl.evaluation import ecdf_band, uniformity


def curves(x, z):
    """The empirical distribution functions of the rows of x at the points z."""
    return np.stack([np.searchsorted(np.sort(row), z, side="right") for row in x]) / x.shape[1]


@pytest.mark.parametrize(("n", "level"), [(20, 0.9), (200, 0.99)])
def test_the_band_has_its_nominal_coverage(n, level):
    """20 000 uniform samples: the share that leaves the band within 4 errors, a false alarm for 1 in 8000 seeds."""
    band = ecdf_band(n, level)
    x = np.random.default_rng(n).random((20_000, n))
    found = curves(x, band.z.numpy())
    left = ((found > band.high.numpy() + 1e-12) | (found < band.low.numpy() - 1e-12)).any(1).mean()
    error = np.sqrt(level * (1 - level) / 20_000)
    assert left < 1 - level + 4 * error
    # counts are whole numbers: the band may be wider than asked for, by what one value more would add
    assert left > 0.8 * (1 - level) - 4 * error


def coverage_by_recursion(low, high):
    """P(low_i <= N(z_i) <= high_i for all i) of n uniform points, by conditional binomials from point to point."""
    n = len(low)
    p = np.zeros(n + 1)
    p[0] = 1.0
    for i in range(n):
        share = 1 / (n - i)
        k = np.arange(n + 1)
        p = np.array([(p * stats.binom.pmf(j - k, n - k, share)).sum() for j in k])
        p[(k < low[i]) | (k > high[i])] = 0.0
    return p.sum()


@pytest.mark.parametrize(("n", "level"), [(2, 0.5), (15, 0.95), (40, 0.99), (40, 0.5)])
def test_coverage_agrees_with_the_recursion_over_conditional_binomials(n, level):
    """The band covers at least `level`, and one count less at the places with the smallest tails would cover less."""
    band = ecdf_band(n, level)
    low, high = (band.low * n).round().long().numpy(), (band.high * n).round().long().numpy()
    covered = coverage_by_recursion(low, high)
    assert covered >= level - 1e-9
    assert covered < 1.0
    z = band.z.numpy()
    below, above = stats.binom.cdf(low, n, z), stats.binom.sf(high - 1, n, z)
    tightest = min(below.min(), above.min()) * (1 + 1e-9)
    low, high = low + (below <= tightest), high - (above <= tightest)
    assert coverage_by_recursion(low, high) < level


def test_p_values_are_uniform_under_uniformity_and_agree_with_the_band():
    """400 samples of 60: Kolmogorov and Smirnov at 1e-4. The p-value is at most 1 - level where the curve leaves."""
    x = torch.rand(400, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = [uniformity(row, level=0.8) for row in x]
    assert stats.kstest([f.p_value for f in found], "uniform").pvalue > 1e-4
    assert all((f.p_value <= 0.2) == (f.exceedance > 1e-12) for f in found)
    row, z = x[0].numpy(), np.arange(1, 61) / 60
    assert found[0].deviation == pytest.approx(np.abs(curves(row[None], z)[0] - z).max())


@pytest.mark.parametrize("change", [lambda u: u**1.3, lambda u: stats.norm.cdf(stats.norm.ppf(u) * 0.8)])
def test_a_shift_and_a_wrong_width_are_noticed(change):
    """At n = 3000 both lie far outside, p below 1e-6; the uniform sample of this seed does not."""
    u = np.random.default_rng(4).random(3000)
    assert uniformity(u).p_value > 0.01
    assert uniformity(change(u)).p_value < 1e-6


@pytest.mark.parametrize("values", [[0.5], [0.2, 1.2], [0.1, -0.1]])
def test_values_outside_of_the_unit_interval_are_refused(values):
    with pytest.raises((DataError, SettingError), match="uniformity"):
        uniformity(values)
    with pytest.raises(SettingError):
        ecdf_band(1)
