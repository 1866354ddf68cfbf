r"""Scores of a predictive distribution against what happened. Lower is better unless stated otherwise.

Every function takes a predictive of batch shape (*b, s) or (*b, s, k) and targets `y` of exactly that shape (a tensor,
a NumPy array or a pandas column) and averages over all targets; `reduction="none"` gives the pointwise scores of those
that have them. A proper score is best, in expectation, when the predictive is the truth: NLPD, CRPS, Brier and the
interval score are proper; RMSE looks at the mean only; coverage alone rewards wide nonsense and belongs beside CRPS.

Reference: Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, JASA 102.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from bayesdl import _checks
from bayesdl.distributions import BarDistribution, Empirical, GaussianMixture, StudentT
from bayesdl.errors import DataError, SettingError, ShapeError, fail

__all__ = ["accuracy", "brier", "class_probabilities", "coverage", "crps", "interval_score", "nlpd", "rmse"]

Reduction = Literal["mean", "none"]
_CHUNK = 2**21
_NEAR_ONE = 3e-5
_SQRT_PI = math.sqrt(math.pi)
_SQRT_2PI = math.sqrt(2 * math.pi)
_PANELS = (1e-7, 1e-5, 1e-3, 0.03, 0.15, 0.35, 0.5, 0.65, 0.85, 0.97, 1 - 1e-3, 1 - 1e-5, 1 - 1e-7)


def rmse(predictive: Distribution, y: Any) -> Tensor:
    """Root mean squared error of the predictive mean, in the units of y."""
    y = targets("rmse", predictive, y)
    return (y - predictive.mean).square().mean().sqrt()


def nlpd(predictive: Distribution, y: Any, reduction: Reduction = "mean") -> Tensor:
    """Negative log predictive density, -log p(y); for labels, the negative log likelihood.

    For mixtures and averaged draws the average is taken inside the logarithm.
    """
    y = targets("nlpd", predictive, y)
    return _reduce("nlpd", -predictive.log_prob(y), reduction)


def crps(predictive: Distribution, y: Any, reduction: Reduction = "mean") -> Tensor:
    r"""Continuous ranked probability score, in the units of y.

        CRPS(F, y) = int (F(v) - 1{v >= y})^2 dv = E|X - y| - E|X - X'| / 2,   X, X' ~ F independent

    Normal: scale [z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)], z = (y - loc)/scale.
    StudentT of nu > 1/2 degrees of freedom, infinite for fewer, with F and f its standard cdf and density:
    scale [z (2 F(z) - 1) + 2 f(z) (nu + z^2)/(nu - 1) - 2 sqrt(nu)/(nu - 1) B(1/2, nu - 1/2)/B(1/2, nu/2)^2];
    nu counts as a constant there.
    GaussianMixture: sum_i w_i A(y - m_i, s_i^2) - 1/2 sum_ij w_i w_j A(m_i - m_j, s_i^2 + s_j^2), A(m, v) = E|N(m, v)|;
    with many components the double sum is int F (1 - F) by the trapezoid rule, which converges faster than any power.
    Empirical of M >= 2 draws: the fair estimate, whose second term divides by M (M - 1), so that few draws are not
    punished for being few. BarDistribution: the first integral bar by bar, in closed form. Anything else with `cdf` and
    `quantile`: the first integral by quadrature.

    Cost: O(s M min(M, nodes)) for a mixture, nodes being its range over its smallest component scale.
    """
    y = targets("crps", predictive, y)
    return _reduce("crps", _crps(predictive, y), reduction)


def interval_score(predictive: Distribution, y: Any, level: float = 0.9, reduction: Reduction = "mean") -> Tensor:
    """Width of the central interval plus 2/(1 - level) times the distance by which y misses it, in the units of y."""
    y = targets("interval_score", predictive, y)
    _checks.inside("interval_score", "level", level, 0.0, 1.0)
    alpha = 1 - level
    low, high = predictive.quantile([alpha / 2, 1 - alpha / 2])
    misses = (low - y).clamp_min(0) + (y - high).clamp_min(0)
    return _reduce("interval_score", high - low + 2 / alpha * misses, reduction)


def coverage(predictive: Distribution, y: Any, levels: Sequence[float] = (0.5, 0.9, 0.95)) -> Tensor:
    """Fraction of y inside the central interval of each level, shape (len(levels),); best when equal to the level."""
    y = targets("coverage", predictive, y)
    for level in levels:
        _checks.inside("coverage", "level", level, 0.0, 1.0)
    wanted = torch.as_tensor(levels, dtype=y.dtype, device=y.device)
    if isinstance(predictive, Empirical):
        edges = predictive.quantile(torch.stack([(1 - wanted) / 2, (1 + wanted) / 2]))
        inside = (edges[0] <= y) & (y <= edges[1])
    else:
        # The same event as quantile((1 - level)/2) <= y <= quantile((1 + level)/2), at the price of one cdf.
        distance = (predictive.cdf(y) - 0.5).abs()
        inside = distance <= wanted.reshape(-1, *(1,) * y.dim()) / 2
    return inside.flatten(1).to(y.dtype).mean(1)


def accuracy(predictive: Distribution, y: Any) -> Tensor:
    """Fraction of labels that the most probable class gets right; higher is better."""
    y = targets("accuracy", predictive, y)
    return (class_probabilities(predictive).argmax(-1) == y).to(predictive.probs.dtype).mean()


def brier(predictive: Distribution, y: Any, reduction: Reduction = "mean") -> Tensor:
    """sum_c (p_c - 1{y = c})^2 over all classes, between 0 and 2; for two classes, twice the one-column form."""
    y = targets("brier", predictive, y)
    probs = class_probabilities(predictive)
    hot = torch.nn.functional.one_hot(y.long(), probs.shape[-1]).to(probs)
    return _reduce("brier", (probs - hot).square().sum(-1), reduction)


def class_probabilities(predictive: Distribution) -> Tensor:
    """Probabilities of all classes, shape (*b, K); a Bernoulli has K = 2."""
    if isinstance(predictive, Bernoulli):
        return torch.stack([1 - predictive.probs, predictive.probs], -1)
    if isinstance(predictive, Categorical):
        return predictive.probs
    return fail(
        SettingError,
        "class_probabilities",
        "the predictive must be Bernoulli or Categorical.",
        got=type(predictive).__name__,
        fix="fit a model with a Bernoulli or Categorical likelihood, or use the regression scores",
    )


def targets(where: str, predictive: Distribution, y: Any) -> Tensor:
    """`y` as a finite tensor in the dtype and on the device of the predictive, of exactly its batch shape.

    Raises:
        ShapeError: Another shape, even one that would broadcast: (s, 1) against (s,) makes s^2 wrong scores in silence.
        DataError: NaN, infinities, or labels that are not classes of the predictive.
    """
    y = _checks.as_tensor(where, "y", y)
    if y.shape != predictive.batch_shape:
        fail(
            ShapeError,
            where,
            f"y must have the predictive's shape {tuple(predictive.batch_shape)}.",
            got=f"y {tuple(y.shape)}",
            fix="y.squeeze(-1) for one output; score the inputs that were predicted",
        )
    _checks.finite(where, "y", y)
    if isinstance(predictive, (Bernoulli, Categorical)):
        _check_labels(where, predictive, y)
    like = predictive.probs if isinstance(predictive, (Bernoulli, Categorical)) else predictive.mean
    return y.to(dtype=like.dtype, device=like.device)


def _check_labels(where: str, predictive: Distribution, y: Tensor) -> None:
    num_classes = class_probabilities(predictive).shape[-1]
    bad = (y != y.round()) | (y < 0) | (y >= num_classes)
    if bool(bad.any()):
        fail(
            DataError,
            where,
            f"labels must be the integers 0..{num_classes - 1}.",
            got=f"{float(y[bad][0])!r} ({int(bad.sum())} of {y.numel()} labels)",
            fix="number the classes from 0, in the order used for training",
        )


def _reduce(where: str, pointwise: Tensor, reduction: Reduction) -> Tensor:
    _checks.choice(where, "reduction", reduction, ("mean", "none"))
    return pointwise.mean() if reduction == "mean" else pointwise


@functools.singledispatch
def _crps(predictive: Distribution, y: Tensor) -> Tensor:
    """Any predictive with cdf and quantile: int F^2 below y, int (1 - F)^2 above, Gauss-Legendre between quantiles."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = predictive.quantile(torch.as_tensor(_PANELS, dtype=y.dtype, device=y.device))
    edges = torch.cat([torch.minimum(edges[:1], y), edges, torch.maximum(edges[-1:], y)])
    total = torch.zeros_like(y)
    for low, high in itertools.pairwise(edges):
        middle = torch.minimum(torch.maximum(low, y), high)  # the integrand jumps at y: split the panel there
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            below = predictive.cdf(low + 0.5 * (middle - low) * (1 + node))
            above = predictive.cdf(middle + 0.5 * (high - middle) * (1 + node))
            total = total + 0.5 * weight * ((middle - low) * below**2 + (high - middle) * (1 - above) ** 2)
    return total


@_crps.register
def _(predictive: Normal, y: Tensor) -> Tensor:
    z = (y - predictive.loc) / predictive.scale
    return predictive.scale * (_mean_abs(z, torch.ones_like(z)) - 1 / _SQRT_PI)


@_crps.register
def _(predictive: StudentT, y: Tensor) -> Tensor:
    z = (y - predictive.loc).double() / predictive.scale
    nu = predictive.dof.detach().double()
    heavy = nu <= 0.5
    nu = torch.where(heavy, 1.0, nu)
    # at nu = 1 the poles of two terms cancel: near it, on the line between the values on both sides, to gap^2
    near = (nu - 1).abs() < _NEAR_ONE
    score = _crps_student(z, torch.where(near, 1 + _NEAR_ONE, nu))
    if bool(near.any()):
        low = _crps_student(z, torch.where(near, 1 - _NEAR_ONE, nu))
        score = torch.where(near, low + 0.5 * (nu - 1 + _NEAR_ONE) / _NEAR_ONE * (score - low), score)
    return torch.where(heavy, math.inf, predictive.scale * score).to(y)


def _crps_student(z: Tensor, nu: Tensor) -> Tensor:
    """For the standard Student-t, above 1/2 degrees of freedom other than 1; the formula holds below 1 by continuation.

    With g(x) = Gamma(x + 1/2) / Gamma(x), B(1/2, nu - 1/2) / B(1/2, nu/2)^2 = g(nu/2)^2 / (sqrt(pi) g(nu - 1/2)).
    """
    g = _gamma_ratio(0.5 * nu)
    density = g / (math.pi * nu).sqrt() * torch.exp(-0.5 * (nu + 1) * torch.log1p(z.square() / nu))
    below = StudentT(nu, torch.zeros_like(nu), torch.ones_like(nu), False).cdf(z)
    spread = nu.sqrt() * g.square() / (_SQRT_PI * _gamma_ratio(nu - 0.5))
    return z * (2 * below - 1) + 2 * (density * (nu + z.square()) - spread) / (nu - 1)


def _gamma_ratio(x: Tensor) -> Tensor:
    """Gamma(x + 1/2) / Gamma(x), by Stirling's series where the difference of two large lgamma would lose digits."""
    far = x > 50
    u = 1 / torch.where(far, x, 50.0)
    series = 1 - u / 8 * (1 - u / 16 * (1 + u * (5 / 8) * (1 - u * (21 / 160))))
    near = torch.where(far, 1.0, x)
    return torch.where(far, x.sqrt() * series, (torch.lgamma(near + 0.5) - torch.lgamma(near)).exp())


@_crps.register
def _(predictive: BarDistribution, y: Tensor) -> Tensor:
    return predictive.crps(y)


@_crps.register
def _(predictive: Empirical, y: Tensor) -> Tensor:
    draws, m = predictive.draws, predictive.draws.shape[-1]
    first = (draws - y.unsqueeze(-1)).abs().mean(-1)
    if m == 1:
        return first
    rank = torch.arange(1, m + 1, dtype=draws.dtype, device=draws.device)
    pairs = ((2 * rank - m - 1) * draws.sort(-1).values).sum(-1)  # sum over j < k of |x_j - x_k|
    return first - pairs / (m * (m - 1))


@_crps.register
def _(predictive: GaussianMixture, y: Tensor) -> Tensor:
    loc, scale, weights = predictive.loc, predictive.scale, predictive.weights
    first = (weights * _mean_abs(y.unsqueeze(-1) - loc, scale)).sum(-1)
    m = loc.shape[-1]
    flat = [t.reshape(-1, m) for t in (loc, scale, weights)]
    blocks = [t.split(max(1, _CHUNK // (m * min(m, 128)))) for t in flat]
    halves = [_half_spread(*block) for block in zip(*blocks, strict=True)]
    return first - torch.cat(halves).reshape(y.shape) if halves else first


def _half_spread(loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """E|X - X'|/2 of each row's mixture, parameters (r, M): by pairs of components or by quadrature if cheaper."""
    m = loc.shape[-1]
    low, high = (loc - 9 * scale).amin(-1), (loc + 9 * scale).amax(-1)
    # The integrand's spectrum decays as exp(-(scale k / 2)^2): at this step the aliasing error is below 1e-11.
    num_nodes = int(((high - low) / (0.6 * scale.amin(-1))).amax().clamp(max=1e9).ceil()) + 1
    if num_nodes >= m:
        return _half_spread_by_pairs(loc, scale, weights)
    low, step = low.detach(), ((high - low) / (num_nodes - 1)).detach()
    total = torch.zeros_like(low)
    for node in range(num_nodes):
        z = ((low + node * step).unsqueeze(-1) - loc) / scale
        below = (weights * torch.special.ndtr(z)).sum(-1)
        total = total + below * (1 - below)
    return step * total


def _half_spread_by_pairs(loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros_like(loc[:, 0])
    size = max(1, _CHUNK // max(1, loc.numel()))
    columns = zip(loc.split(size, -1), scale.split(size, -1), weights.split(size, -1), strict=True)
    for some_loc, some_scale, some_weights in columns:
        distance = some_loc.unsqueeze(-1) - loc.unsqueeze(-2)
        spread = (some_scale.square().unsqueeze(-1) + scale.square().unsqueeze(-2)).sqrt()
        pair = _mean_abs(distance, spread)
        total = total + (some_weights * (pair * weights.unsqueeze(-2)).sum(-1)).sum(-1)
    return 0.5 * total


def _mean_abs(loc: Tensor, scale: Tensor) -> Tensor:
    """E|N(loc, scale^2)|."""
    z = loc / scale
    return scale * (z * torch.erf(z * math.sqrt(0.5)) + 2 / _SQRT_2PI * torch.exp(-0.5 * z.square()))
