r"""What a network's raw outputs say: from (*b, p) numbers to a distribution of y, and the log density of given y.

    bars      p_k = softmax(raw)_k on the interval between borders b_{k-1} and b_k; uniform inside, and half-normal
              outwards from the inner border of the first and the last one (half of their mass lies within the borders)
    mixture   sum_k w_k N(loc_k, scale_k^2), w = softmax(raw_1), loc = raw_2, scale = floor + softplus(raw_3)
    kernel    the same with scale = max(floor, sqrt(raw_3)): what the Gaussian processes say is no longer raw
    classes   softmax(raw)

All in the network's own units of y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional

from bayesdl.amortized.network import MIXTURES, Architecture
from bayesdl.distributions.discrete import Categorical
from bayesdl.distributions.mixture import GaussianMixture
from bayesdl.errors import DataError, SettingError, fail

SCALE_FLOOR = 1e-3  # of a Gaussian, in the network's units: below it a density is a spike on rounding errors
_HALF_NORMAL_MEDIAN = 0.6744897501960817
_LOG_HALF_NORMAL = 0.5 * math.log(2 / math.pi)
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


def predictive(architecture: Architecture, raw: Tensor, borders: Tensor | None) -> Distribution:
    """The distribution of y behind raw outputs (*b, p), with batch shape (*b).

    Args:
        borders: (outputs + 1,) for bars, else None.
    """
    if architecture.head == "bars":
        from bayesdl.distributions.bar import BarDistribution

        return BarDistribution(raw, _needed(borders).to(raw))
    if architecture.head in MIXTURES:
        logits, loc, scale = _gaussians(architecture, raw)
        return GaussianMixture._of(loc, scale, logits.softmax(-1))
    return Categorical(logits=raw, validate_args=False)


def log_score(architecture: Architecture, raw: Tensor, borders: Tensor | None, y: Tensor) -> Tensor:
    """log p(y) for y (*b) under raw outputs that broadcast to (*b, p); minus its mean is what training minimises.

    The same numbers as `predictive(...).log_prob(y)`, without the distribution in between.

    Cost: O(p) time and memory for each y.
    """
    if architecture.head == "bars":
        return _log_bars(raw, _needed(borders).to(raw), y.to(raw))
    if architecture.head in MIXTURES:
        logits, loc, scale = _gaussians(architecture, raw)
        standardized = (y.to(raw).unsqueeze(-1) - loc) / scale
        joint = logits - 0.5 * standardized.square() - scale.log()
        return torch.logsumexp(joint, -1) - torch.logsumexp(logits, -1) - _LOG_ROOT_2PI
    return raw.gather(-1, y.long().unsqueeze(-1)).squeeze(-1) - torch.logsumexp(raw, -1)


def loss(architecture: Architecture, raw: Tensor, borders: Tensor | None, targets: Tensor) -> Tensor:
    """The mean of -log p over queries, raw (B q p), and their targets (B q), or (B q t) where each has several."""
    raw = raw if targets.ndim < raw.ndim else raw.unsqueeze(-2)
    return -log_score(architecture, raw, borders, targets).mean()


def make_borders(values: Tensor, num_bars: int, *, equal_width: float = 0.5) -> Tensor:
    r"""Borders of bars for targets like `values`, a large draw from the prior: (num_bars + 1,), ascending, float64.

    A share 1 - `equal_width` of the inner borders cuts the values into groups of equal size, which is fine where the
    prior has its mass; the others are evenly spaced between the values' 0.1 % and 99.9 % quantiles, since a posterior
    may be just as narrow in the tails of the prior. The outermost borders are the smallest and the largest value; the
    half-normal tails reach beyond them.

    Raises:
        DataError: Fewer than ten values a bar, or values that are not finite or nearly all the same.

    Cost: O(N log N) for N values.
    """
    values = values.detach().reshape(-1).double()
    if len(values) < 10 * num_bars or not bool(values.isfinite().all()):
        wanted = "borders need finite targets, at least ten a bar."
        got = f"{len(values)} values, {int((~values.isfinite()).sum())} not finite, for {num_bars} bars"
        fail(DataError, "make_borders", wanted, got=got, fix="draw more of them from the prior")
    values = values.sort().values
    num_inner = num_bars - 1
    num_even = min(num_inner, round(equal_width * num_inner))
    levels = torch.arange(1, num_inner - num_even + 1, dtype=torch.float64, device=values.device)
    by_mass = _at_levels(values, levels / (num_inner - num_even + 1))
    low, high = _at_levels(values, values.new_tensor([0.001, 0.999]))
    shares = torch.arange(1, num_even + 1, dtype=torch.float64, device=values.device) / (num_even + 1)
    inner = torch.cat([by_mass, low + (high - low) * shares]).sort().values
    borders = torch.cat([values[:1], inner, values[-1:]])
    # Borders of both kinds may fall together, and so do equal values: each lies a little behind the one before.
    step = 1e-3 / num_bars * (high - low) * torch.arange(num_bars + 1, dtype=torch.float64, device=values.device)
    borders = torch.cummax(borders - step, 0).values + step
    if not float(borders.diff().min()) > 0:
        got = f"values from {float(values[0]):.3g} to {float(values[-1]):.3g}, many of them equal"
        fail(DataError, "make_borders", "targets must differ.", got=got, fix="fewer bars, or another prior")
    return borders


def _at_levels(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of sorted values at `levels`, midway between two neighbours."""
    at = (levels * len(values)).long().clamp(1, len(values) - 1)
    return 0.5 * (values[at - 1] + values[at])


def _gaussians(architecture: Architecture, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, locations and scales of the components, each (*b, K)."""
    logits, loc, scale = raw.chunk(3, -1)
    if architecture.head == "kernel":
        return logits, loc, scale.clamp_min(SCALE_FLOOR**2).sqrt()
    return logits, loc, SCALE_FLOOR + functional.softplus(scale)


def _log_bars(raw: Tensor, borders: Tensor, y: Tensor) -> Tensor:
    widths = borders.diff()
    bar = torch.bucketize(y.contiguous(), borders[1:-1].contiguous(), right=True)  # a border belongs to its right bar
    log_mass = raw.expand(*bar.shape, -1).gather(-1, bar.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(raw, -1)
    last = len(widths) - 1
    scale = torch.where(bar == 0, widths[0], widths[-1]) / _HALF_NORMAL_MEDIAN
    beyond = torch.where(bar == 0, borders[1] - y, y - borders[-2]) / scale
    tail = _LOG_HALF_NORMAL - scale.log() - 0.5 * beyond.square()
    return log_mass + torch.where((bar == 0) | (bar == last), tail, -widths[bar].log())


def _needed(borders: Tensor | None) -> Tensor:
    if borders is None:
        got, fix = "borders=None", "borders=pretrained.borders"
        fail(SettingError, "heads", "a head of bars needs their borders.", got=got, fix=fix)
    return borders
