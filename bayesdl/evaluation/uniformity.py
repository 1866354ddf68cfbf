r"""Are n independent numbers uniform on [0, 1]? The empirical distribution function with its simultaneous band.

Under uniformity, n F_n(z) ~ Binomial(n, z) at each z. The band takes at every point of the grid z_i = i / K, with
K = min(n, 500), the values whose two one-sided tail probabilities both exceed gamma / 2, with the largest gamma for
which the whole curve stays inside with the stated probability. It is wide in the middle and narrow near 0 and 1, where
draws that are too narrow or too wide betray themselves.

The probability that the curve stays inside is exact: given their number, uniform points are those of a Poisson process,
whose increments between grid points are independent, so that it follows from one convolution a grid point.

Reference: Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its applications in goodness
of fit evaluation and multiple sample comparison, arXiv 2103.10522; the simultaneous band is theirs, the Poisson form of
its coverage replaces their recursion.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import DataError, fail

__all__ = ["EcdfBand", "Uniformity", "ecdf_band", "uniformity"]

_MOST_POINTS = 500


class EcdfBand(NamedTuple):
    """Where the empirical distribution function of uniform numbers stays, at all points z at once; each (K).

    Attributes:
        z: The grid 1/K, 2/K, …, 1, with K = min(n, 500).
        low: Smallest value of the curve at z.
        high: Largest.
    """

    z: Tensor
    low: Tensor
    high: Tensor


class Uniformity(NamedTuple):
    """How a sample looks beside the uniform law.

    Attributes:
        p_value: Probability that a uniform sample of this size comes as near to some edge of its bands.
        deviation: Largest |F_n(z) - z| over the grid.
        exceedance: Largest of (F_n(z) - high, low - F_n(z)) over the grid: above 0 the curve leaves the band.
    """

    p_value: float
    deviation: float
    exceedance: float


def ecdf_band(n: int, level: float = 0.99) -> EcdfBand:
    """The band in which the whole curve of n uniform numbers stays with probability `level` at least.

    Args:
        n: Size of the sample, at least 2.
        level: Probability, in (0, 1).

    Cost: 0.1 s at n = 200, 1 s at n = 1000; kept for later calls.
    """
    _checks.at_least("ecdf_band", "n", n, 2, integer=True)
    _checks.inside("ecdf_band", "level", level, 0.0, 1.0)
    low, high = _bounds(int(n), _gamma(int(n), float(level)))
    z = torch.arange(1, len(low) + 1, dtype=torch.float64) / len(low)
    return EcdfBand(z, torch.as_tensor(low / n), torch.as_tensor(high / n))


def uniformity(values: Any, level: float = 0.99) -> Uniformity:
    """Compare independent `values` (n), in [0, 1], with the uniform law.

    Raises:
        DataError: A value lies outside of [0, 1], or there are fewer than two.
    """
    x = _checks.as_tensor("uniformity", "values", values).detach().double().flatten().cpu()
    if len(x) < 2 or not bool(((x >= 0) & (x <= 1)).all()):
        wanted = "values must be two numbers in [0, 1] at least."
        fail(DataError, "uniformity", wanted, got=f"{len(x)} values", fix="pass PIT values or scaled ranks")
    n = len(x)
    band = ecdf_band(n, level)
    counts = torch.searchsorted(x.sort().values, band.z, right=True).numpy()
    gamma = 2 * _smallest_tail(n, counts)
    curve = torch.as_tensor(counts / n)
    exceedance = torch.maximum(curve - band.high, band.low - curve).max()
    return Uniformity(1 - _coverage(n, gamma), float((curve - band.z).abs().max()), float(exceedance))


@functools.lru_cache(maxsize=16)
def _tails(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts k near the mean at every grid point, and min(P(X <= k), P(X >= k)) of X ~ Binomial(n, z), both (K, k).

    Eight standard deviations on either side; beyond them, and beyond 0 and n, the probability is taken as 0.
    """
    from scipy.stats import binom

    size = min(n, _MOST_POINTS)
    z = np.arange(1, size + 1)[:, None] / size
    reach = int(4 * np.sqrt(n)) + 9
    k = np.rint(n * z).astype(int) + np.arange(-reach, reach + 1)
    tails = np.minimum(binom.cdf(k, n, z), binom.sf(k - 1, n, z))
    return k, np.where((k < 0) | (k > n), 0.0, tails)


def _smallest_tail(n: int, counts: np.ndarray) -> float:
    """The smallest of the tail probabilities of the counts at the grid points."""
    k, tails = _tails(n)
    place = counts - k[:, 0]
    near = (place >= 0) & (place < k.shape[1])
    found = tails[np.arange(len(k)), place.clip(0, k.shape[1] - 1)]
    return float(np.where(near, found, 0.0).min())


def _bounds(n: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest counts (K) at the grid points whose tail probabilities both exceed gamma / 2."""
    k, tails = _tails(n)
    inside = tails > gamma / 2
    return k[:, 0] + inside.argmax(1), k[:, -1] - inside[:, ::-1].argmax(1)


def _coverage(n: int, gamma: float) -> float:
    """Probability that at every grid point both tail probabilities exceed gamma / 2; 0 where no count does."""
    from scipy.stats import poisson

    if not (_tails(n)[1] > gamma / 2).any(1).all():
        return 0.0
    low, high = _bounds(n, gamma)
    rate = n / len(low)
    step = poisson.pmf(np.arange(n + 1), rate)
    step = step[: int(np.flatnonzero(step > 0)[-1]) + 1]
    probabilities, first = np.ones(1), 0
    for i in range(len(low)):
        probabilities = np.convolve(probabilities, step)
        start, stop = max(low[i], first), high[i] + 1
        probabilities, first = probabilities[start - first : stop - first], start
        if probabilities.size == 0:
            return 0.0
    return float(probabilities[-1] / poisson.pmf(n, n))  # at z = 1 the count is n


@functools.lru_cache(maxsize=64)
def _gamma(n: int, level: float) -> float:
    """The largest gamma, to one part in 10^6, under which the curve stays inside with probability `level`."""
    small, large = 1e-12, 1.0
    while large > small * (1 + 1e-6):
        middle = math.sqrt(small * large)
        small, large = (middle, large) if _coverage(n, middle) >= level else (small, middle)
    return small
