r"""Calibration: do events of stated probability p happen a fraction p of the time?

For continuous targets the probability integral transform Z = F(y) of a calibrated predictive is uniform on [0, 1]. For
labels the accuracy at stated confidence c should be c. Both are diagnostics, not proper scores: a forecast that ignores
x can be perfectly calibrated. Even a calibrated model shows an error of order 1/sqrt(n) on n targets; read every figure
against the band that this file computes.

Reference: Gneiting, Balabdaoui, Raftery (2007), Probabilistic forecasts, calibration and sharpness, JRSS B 69; Guo et
al. (2017), On calibration of modern neural networks, arXiv 1706.04599.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayesdl import _checks
from bayesdl._random import Seed, generator
from bayesdl.distributions import Empirical
from bayesdl.errors import DataError, fail
from bayesdl.evaluation.scores import class_probabilities, targets

__all__ = [
    "ReliabilityCurve",
    "calibration_band",
    "calibration_curve",
    "expected_calibration_error",
    "pit",
    "pit_calibration_error",
    "pit_calibration_error_band",
    "reliability_curve",
]


_LARGE = 2000  # from here on the 1/sqrt(n) law stands in for simulation


class ReliabilityCurve(NamedTuple):
    """Top-label confidence against accuracy in equal-width bins; fields of shape (num_bins,), NaN in empty bins."""

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def pit(predictive: Distribution, y: Any, seed: Seed = 0) -> Tensor:
    """Z = F(y), in the shape of y; uniform on [0, 1] when the predictive is calibrated.

    Where F has steps the value is randomised, so that the statement stays exact: for M draws it is
    (#{draws < y} + V (1 + #{draws = y})) / (M + 1), for labels F(y - 1) + V p(y), with V uniform from `seed`.
    """
    y = targets("pit", predictive, y)
    if not isinstance(predictive, (Empirical, Bernoulli, Categorical)):
        return predictive.cdf(y)
    noise = torch.rand(y.shape, generator=generator(seed, y.device), dtype=y.dtype, device=y.device)
    if isinstance(predictive, Empirical):
        draws = predictive.draws
        below, ties = (draws < y.unsqueeze(-1)).sum(-1), (draws == y.unsqueeze(-1)).sum(-1)
        return (below + noise * (1 + ties)) / (draws.shape[-1] + 1)
    return predictive.cdf(y - 1) + noise * predictive.log_prob(y).exp()


def pit_calibration_error(values: Any, num_levels: int = 100) -> Tensor:
    """PCE_1: the mean over levels a of |a - fraction of Z at or below a|, at centred levels a = (m - 1/2)/num_levels.

    0 is perfect and 1/2 the worst; `pit_calibration_error_band` says what a calibrated model of this size shows.

    Args:
        values: PIT values of any shape, pooled.
    """
    values = _pit_values("pit_calibration_error", values)
    levels = _centred_levels(num_levels).to(values)
    return (calibration_curve(values, levels) - levels).abs().mean()


@functools.lru_cache(maxsize=64)
def pit_calibration_error_band(
    n: int, level: float = 0.95, num_levels: int = 100, num_simulations: int = 2000
) -> tuple[float, float]:
    """Mean and upper `level` quantile of PCE_1 of a perfectly calibrated model on n independent targets.

    By simulation with a fixed seed; the mean is close to mean_a sqrt(2 a (1 - a) / (pi n)), about 0.32 / sqrt(n).
    """
    source = torch.Generator().manual_seed(0)
    levels, errors = _centred_levels(num_levels), []
    for _ in range(num_simulations):
        values = torch.rand(min(n, _LARGE), generator=source, dtype=torch.float64)
        errors.append((calibration_curve(values, levels) - levels).abs().mean())
    simulated = torch.stack(errors) * (min(n, _LARGE) / n) ** 0.5
    return float(simulated.mean()), float(simulated.quantile(level))


def calibration_curve(values: Any, levels: Tensor) -> Tensor:
    """Fraction of PIT values at or below each level, in the shape of `levels`."""
    values = _pit_values("calibration_curve", values)
    rank = torch.searchsorted(values.sort().values, levels.to(values).contiguous(), right=True)
    return rank.to(values) / values.numel()


def calibration_band(n: int, levels: Sequence[float], coverage: float = 0.95) -> tuple[Tensor, Tensor]:
    """Where a calibrated model's curve lies at each level with probability `coverage`: quantiles of Binomial(n, a) / n.

    Pointwise, for n independent targets.
    """
    from scipy.stats import binom

    tail = (1 - coverage) / 2
    low, high = (binom.ppf(q, n, np.asarray(levels)) / n for q in (tail, 1 - tail))
    return torch.as_tensor(low), torch.as_tensor(high)


def reliability_curve(predictive: Distribution, y: Any, num_bins: int = 15) -> ReliabilityCurve:
    """Mean confidence and accuracy of the most probable class, in `num_bins` equal-width bins of confidence (a, b]."""
    y = targets("reliability_curve", predictive, y)
    _checks.at_least("reliability_curve", "num_bins", num_bins, 1, integer=True)
    confidence, label = class_probabilities(predictive).max(-1)
    confidence, hit = confidence.flatten(), (label == y).flatten().to(confidence)
    place = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    sums = torch.zeros(3, num_bins, dtype=confidence.dtype, device=confidence.device)
    sums.index_add_(1, place, torch.stack([torch.ones_like(confidence), confidence, hit]))
    return ReliabilityCurve(sums[1] / sums[0], sums[2] / sums[0], sums[0])


def expected_calibration_error(predictive: Distribution, y: Any, num_bins: int = 15) -> Tensor:
    """ECE: sum over bins of (share of targets) |accuracy - confidence| of the most probable class.

    Biased upwards on few targets, since the noise of each bin counts as error.
    """
    curve = reliability_curve(predictive, y, num_bins)
    share = curve.count / curve.count.sum()
    return (share * (curve.accuracy - curve.confidence).abs()).nan_to_num().sum()


def _centred_levels(num_levels: int) -> Tensor:
    _checks.at_least("pit_calibration_error", "num_levels", num_levels, 1, integer=True)
    return (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels


def _pit_values(where: str, values: Any) -> Tensor:
    values = _checks.as_tensor(where, "values", values).detach().flatten()
    if values.numel() == 0 or not bool(((values >= 0) & (values <= 1)).all()):
        fail(
            DataError,
            where,
            "values must be PIT values in [0, 1], at least one.",
            got=f"{values.numel()} values" + (f" from {float(values.min())!r} on" if values.numel() else ""),
            fix="pass pit(predictive, y)",
        )
    return values
