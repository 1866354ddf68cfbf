"""Finite mixtures of Gaussians, with quantiles by Newton's method and exact implicit gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesdl._random import Seed, generator
from bayesdl.distributions._base import levels_of, like_of, normal_cdf, shape_of
from bayesdl.errors import SettingError, ShapeError, fail

_CHUNK = 2**21  # elements of one (rows, components) block: 16 MB in float64
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


@final
class GaussianMixture(Distribution):
    r"""A finite mixture of M Gaussians per point, the predictive of an ensemble or of M posterior draws.

        p(y) = sum_m w_m N(y; loc_m, scale_m^2)
        mean = sum_m w_m loc_m,    variance = sum_m w_m (scale_m^2 + (loc_m - mean)^2)

    Args:
        loc: Component means, shape (*b, M).
        scale: Component standard deviations, shape (*b, M), above 0.
        weights: Non-negative weights, shape (*b, M) or (M,), normalised here; None for equal ones.

    Raises:
        ShapeError: When the component axes differ or M = 0.
        SettingError: When weights are negative, not finite, or all zero at some point.

    Cost: O(b M) time for mean, variance, log_prob and cdf; `quantile` needs about ten times that per level. All
    work in blocks of bounded memory where no gradient is asked for.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own protocol
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "weights": constraints.simplex,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, weights: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        loc, scale = torch.as_tensor(loc), torch.as_tensor(scale)
        given = torch.ones((), dtype=loc.dtype, device=loc.device) if weights is None else torch.as_tensor(weights)
        if not _broadcast(loc.shape, scale.shape, given.shape):
            _reject_mixture(loc, scale, given)
        self.loc, self.scale, given = torch.broadcast_tensors(loc, scale, given)
        self.weights = given / given.shape[-1] if weights is None else _normalised(given)
        super().__init__(self.loc.shape[:-1], validate_args=validate_args)

    @classmethod
    def _of(cls, loc: Tensor, scale: Tensor, weights: Tensor) -> GaussianMixture:
        """From tensors of one shape whose weights are known to be probabilities: nothing is checked."""
        made = cls.__new__(cls)
        made.loc, made.scale, made.weights = loc, scale, weights
        Distribution.__init__(made, loc.shape[:-1], validate_args=False)
        return made

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> GaussianMixture:
        """The same mixture with batch axes broadcast to `batch_shape`."""
        shape = (*shape_of(batch_shape), self.loc.shape[-1])
        return GaussianMixture(self.loc.expand(shape), self.scale.expand(shape), self.weights.expand(shape), False)

    @property
    def mean(self) -> Tensor:
        """Mean, shape (*b)."""
        return (self.weights * self.loc).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Variance within components plus variance of their means, shape (*b)."""
        centred = self.loc - self.mean.unsqueeze(-1)
        return (self.weights * (self.scale.square() + centred.square())).sum(-1)

    def log_prob(self, value: Any) -> Tensor:
        """Log density at `value`, by logsumexp over the components."""
        value = like_of(value, self.loc)
        if self._validate_args:
            self._validate_sample(value)
        return self._reduce(value, _mixture_log_density)

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value)."""
        return self._reduce(like_of(value, self.loc), _mixture_cdf)

    def quantile(self, q: Any) -> Tensor:
        r"""The value x with cdf(x) = q; shape q.shape + (*b).

        Newton's method on the cdf, kept inside a bracket: the quantile of a mixture lies between the smallest and the
        largest quantile of its components. Gradients with respect to the parameters and q come from the implicit
        function theorem, dx = (dq - dF(x)) / p(x), and are exact to first order.
        """
        levels = levels_of("GaussianMixture.quantile", q, self.loc, 0)
        target = levels.reshape(levels.shape + (1,) * len(self.batch_shape)).expand(levels.shape + self.batch_shape)
        with torch.no_grad():
            x = self._invert(target)
        return self._attach_gradient(x, target)

    def rsample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), differentiable by implicit reparametrisation (cdf(x) held fixed)."""
        x = self.sample(sample_shape, seed)
        if not self._needs_grad():
            return x
        with torch.no_grad():
            target = self.cdf(x)
        return self._attach_gradient(x, target)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), without gradients."""
        shape, source = shape_of(sample_shape), generator(seed, self.loc.device)
        with torch.no_grad():
            num = math.prod(shape)
            flat = self.weights.reshape(-1, self.weights.shape[-1])
            if num == 0 or flat.shape[0] == 0:
                return self.loc.new_empty(self._extended_shape(shape))
            index = torch.multinomial(flat, num, replacement=True, generator=source)  # (B, S)
            loc = self.loc.reshape(flat.shape).gather(-1, index)
            scale = self.scale.reshape(flat.shape).gather(-1, index)
            noise = torch.randn(index.shape, generator=source, dtype=loc.dtype, device=loc.device)
            return (loc + scale * noise).T.reshape(self._extended_shape(shape))

    def _needs_grad(self, *others: Tensor) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in (self.loc, self.scale, self.weights, *others))

    def _attach_gradient(self, x: Tensor, target: Tensor) -> Tensor:
        if not self._needs_grad(target):
            return x
        inside = x.isfinite()
        at = torch.where(inside, x, torch.zeros_like(x))
        with torch.no_grad():
            density = self._reduce(at, _mixture_log_density).exp()
        residual = self._reduce(at, _mixture_cdf) - target
        return x - torch.where(inside, (residual - residual.detach()) / density, torch.zeros_like(x))

    def _reduce(self, value: Tensor, function: Callable[..., Tensor]) -> Tensor:
        """function(value, loc, scale, weights) summed over components; in blocks where no gradient is wanted."""
        if self._needs_grad(value) or value.numel() * self.loc.shape[-1] <= _CHUNK:
            return function(value.unsqueeze(-1), self.loc, self.scale, self.weights)
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        return self._by_rows(value, lambda v, *mixture: function(v.unsqueeze(-1), *mixture))

    def _invert(self, target: Tensor) -> Tensor:
        if target.numel() == 0:
            return torch.empty_like(target)
        edge = (target <= 0) | (target >= 1)
        inner = torch.where(edge, torch.full_like(target, 0.5), target)
        x = self._by_rows(inner, _newton_quantile)
        return torch.where(edge, torch.where(target <= 0, -math.inf, math.inf).to(x), x)

    def _by_rows(self, value: Tensor, function: Callable[..., Tensor]) -> Tensor:
        """Apply function(value (r,), loc (r, M), scale (r, M), weights (r, M)) -> (r,) to blocks of rows."""
        m, points = self.loc.shape[-1], math.prod(self.batch_shape)
        mixture = [t.reshape(points, m) for t in (self.loc, self.scale, self.weights)]
        flat, out = value.reshape(-1), []
        for rows in torch.arange(flat.numel(), device=flat.device).split(max(1, _CHUNK // m)):
            out.append(function(flat[rows], *(t[rows % points] for t in mixture)))
        return torch.cat(out).reshape(value.shape) if out else torch.empty_like(value)


def _mixture_log_density(value: Tensor, loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    z = (value - loc) / scale
    return torch.logsumexp(weights.log() - 0.5 * z.square() - scale.log(), -1) - _LOG_ROOT_2PI


def _mixture_cdf(value: Tensor, loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    return (weights * normal_cdf((value - loc) / scale)).sum(-1)


def _mixture_density(value: Tensor, loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    z = (value - loc) / scale
    return (weights / scale * torch.exp(-0.5 * z.square() - _LOG_ROOT_2PI)).sum(-1)


def _newton_quantile(q: Tensor, loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """Solve cdf(x) = q row by row; q (r,) strictly inside (0, 1), parameters (r, M)."""
    z = torch.special.ndtri(q)
    component = loc + scale * z.unsqueeze(-1)
    present = weights > 0
    low = component.masked_fill(~present, math.inf).amin(-1)
    high = component.masked_fill(~present, -math.inf).amax(-1)
    mean = (weights * loc).sum(-1)
    sd = (weights * (scale.square() + (loc - mean.unsqueeze(-1)).square())).sum(-1).sqrt()
    x = torch.minimum(torch.maximum(mean + sd * z, low), high)
    out, rows = x.clone(), torch.arange(len(q), device=q.device)
    eps = torch.finfo(q.dtype).eps
    # Newton's error squares at each step: one this short (against the narrowest component) is the last one needed.
    short = 0.1 * eps**0.5 * scale.amin(-1)
    width, previous = high - low, torch.full_like(x, math.inf)
    for _ in range(200):
        value = x.unsqueeze(-1)
        error = _mixture_cdf(value, loc, scale, weights) - q
        step = error / _mixture_density(value, loc, scale, weights)
        low, high = torch.where(error < 0, x, low), torch.where(error > 0, x, high)
        newton = x - step
        # Bisect where Newton leaves the bracket (flat cdf between components), or does not contract.
        good = (newton > low) & (newton < high) & (step.abs() < 0.5 * previous)
        exact = error.abs() <= 8 * eps * q  # as near as the rounding of the sum over components lets one come
        new = torch.where(exact, x, torch.where(good, newton, 0.5 * (low + high)))
        previous, x = (new - x).abs(), new
        out[rows] = x
        going = ~exact & ~(good & (previous < short)) & (previous > 2 * eps * (x.abs() + width))
        if not bool(going.any()):
            break
        if bool(going.all()):
            continue
        rows, x, low, high, previous = (t[going] for t in (rows, x, low, high, previous))
        q, loc, scale, weights, width, short = (t[going] for t in (q, loc, scale, weights, width, short))
    return out


def _broadcast(*shapes: torch.Size) -> bool:
    try:
        shape = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return len(shape) > 0 and shape[-1] > 0


def _normalised(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    if not bool(((weights >= 0).all(-1, keepdim=True) & (total > 0) & total.isfinite()).all()):
        fail(
            SettingError,
            "GaussianMixture",
            "weights must be finite, at least 0, and not all 0 at a point.",
            got=f"smallest {float(weights.min())!r}, smallest sum {float(total.min())!r}",
            fix="pass weights=None for equal ones",
        )
    return weights / total


def _reject_mixture(loc: Tensor, scale: Tensor, weights: Tensor) -> None:
    fail(
        ShapeError,
        "GaussianMixture",
        "loc, scale and weights must broadcast to one shape (*b, M) with M at least 1.",
        got=f"loc {tuple(loc.shape)}, scale {tuple(scale.shape)}, weights {tuple(weights.shape)}",
        fix="put the components on the last axis of each",
    )
