r"""Predictive distributions: what a posterior believes about y at given inputs, in the user's own units.

Every class is a `torch.distributions.Distribution` over a scalar: `batch_shape` (*b), empty `event_shape`. It has
`mean`, `variance`, `stddev`, `log_prob`, `cdf`, `quantile(q)` and `sample(sample_shape, seed)`. Two things differ from
torch: `quantile` exists for all of them, and sampling never touches the global random state (`seed=None` means fresh
entropy from the operating system). `Normal`, `Bernoulli` and `Categorical` are torch's own with these additions, so
`kl_divergence`, `entropy` and `expand` keep working.

`value` and `q` may be numbers, NumPy arrays, pandas columns or tensors; they are brought to the dtype and device of the
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Distribution, constraints
from torch.distributions import Normal as TorchNormal

from bayesdl._random import Seed, generator
from bayesdl.errors import SettingError, ShapeError, fail

__all__ = ["Bernoulli", "Categorical", "Empirical", "GaussianMixture", "Normal"]

_CHUNK = 2**21  # elements of one (rows, components) block: 16 MB in float64
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


@final
class Normal(TorchNormal):
    r"""N(loc, scale^2), the predictive of a Gaussian process with Gaussian noise.

    Args:
        loc: Mean, shape (*b).
        scale: Standard deviation, shape (*b), above 0.
    """

    def log_prob(self, value: Any) -> Tensor:
        """Log density at `value`, shape broadcast(value, *b)."""
        return super().log_prob(_like(value, self.loc))

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value), accurate in the lower tail."""
        return _normal_cdf((_like(value, self.loc) - self.loc) / self.scale)

    def quantile(self, q: Any) -> Tensor:
        """The value with P(Y <= value) = q; shape q.shape + (*b)."""
        levels = _levels("Normal.quantile", q, self.loc, len(self.batch_shape))
        return self.loc + self.scale * torch.special.ndtri(levels)

    def rsample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), differentiable in loc and scale."""
        return self.loc + self.scale * _randn(self._extended_shape(_shape(sample_shape)), seed, self.loc)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed)


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

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> GaussianMixture:
        """The same mixture with batch axes broadcast to `batch_shape`."""
        shape = (*_shape(batch_shape), self.loc.shape[-1])
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
        value = _like(value, self.loc)
        if self._validate_args:
            self._validate_sample(value)
        return self._reduce(value, _mixture_log_density)

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value)."""
        return self._reduce(_like(value, self.loc), _mixture_cdf)

    def quantile(self, q: Any) -> Tensor:
        r"""The value x with cdf(x) = q; shape q.shape + (*b).

        Newton's method on the cdf, kept inside a bracket: the quantile of a mixture lies between the smallest and the
        largest quantile of its components. Gradients with respect to the parameters and q come from the implicit
        function theorem, dx = (dq - dF(x)) / p(x), and are exact to first order.
        """
        levels = _levels("GaussianMixture.quantile", q, self.loc, 0)
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
        shape, source = _shape(sample_shape), generator(seed, self.loc.device)
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


@final
class Empirical(Distribution):
    r"""The distribution of M equally weighted draws per point.

    `cdf` is the step function (1/M) #{draws <= value}; `quantile` interpolates linearly between order statistics, as
    `numpy.quantile` does; `variance` divides by M.

    Args:
        draws: Shape (*b, M), finite.
    """

    arg_constraints = {"draws": constraints.real_vector}  # noqa: RUF012 - torch's own protocol
    support = constraints.real

    def __init__(self, draws: Tensor, validate_args: bool | None = None) -> None:
        self.draws = torch.as_tensor(draws)
        if self.draws.dim() < 1 or self.draws.shape[-1] == 0:
            fail(
                ShapeError,
                "Empirical",
                "draws must have shape (*b, M) with M at least 1.",
                got=f"{tuple(self.draws.shape)}",
                fix="put the draws on the last axis",
            )
        super().__init__(self.draws.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> Empirical:
        """The same draws with batch axes broadcast to `batch_shape`."""
        return Empirical(self.draws.expand(*_shape(batch_shape), self.draws.shape[-1]), False)

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, shape (*b)."""
        return self.draws.mean(-1)

    @property
    def variance(self) -> Tensor:
        """Variance of the draws (divided by M), shape (*b)."""
        return self.draws.var(-1, correction=0)

    def log_prob(self, value: Any) -> Tensor:
        """Not defined: a set of draws has no density."""
        raise NotImplementedError(
            "Empirical.log_prob: a finite set of draws has no density; score it by CRPS, or predict with an engine "
            "whose predictive is a GaussianMixture"
        )

    def cdf(self, value: Any) -> Tensor:
        """The fraction of draws at or below `value`."""
        value = _like(value, self.draws)
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        points, m = math.prod(self.batch_shape), self.draws.shape[-1]
        ordered = self.draws.detach().sort(-1).values.reshape(points, m)
        columns = value.detach().reshape(-1, points).T.contiguous()
        rank = torch.searchsorted(ordered, columns, right=True)
        return rank.T.reshape(value.shape).to(self.draws) / m

    def quantile(self, q: Any) -> Tensor:
        """Order statistics, interpolated linearly between 0 (smallest draw) and 1 (largest); shape q.shape + (*b)."""
        levels = _levels("Empirical.quantile", q, self.draws, 0)
        ordered, last = self.draws.sort(-1).values, self.draws.shape[-1] - 1
        position = levels.reshape(-1) * last
        below = position.floor().clamp(0, max(last - 1, 0)).long()
        above = (below + 1).clamp(max=last)
        fraction = position - below
        value = ordered[..., below] * (1 - fraction) + ordered[..., above] * fraction
        return value.movedim(-1, 0).reshape(levels.shape + self.batch_shape)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws with replacement, shape sample_shape + (*b)."""
        shape, source = _shape(sample_shape), generator(seed, self.draws.device)
        full = self._extended_shape(shape)
        index = torch.randint(self.draws.shape[-1], full, generator=source, device=self.draws.device)
        with torch.no_grad():
            flat = self.draws.reshape(-1, self.draws.shape[-1])
            columns = index.reshape(math.prod(shape), flat.shape[0]).T
            return flat.gather(-1, columns).T.reshape(full)


@final
class Bernoulli(TorchBernoulli):
    """Binary labels 0 and 1 with P(Y = 1) = probs, shape (*b); give either `probs` or `logits`."""

    def log_prob(self, value: Any) -> Tensor:
        """Log probability of the label `value`, 0 or 1."""
        return super().log_prob(_like(value, self._param))

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value): 0 below 0, 1 - probs on [0, 1), 1 from 1 on."""
        value = _like(value, self._param)
        return torch.where(value < 0, torch.zeros_like(self.probs), torch.where(value < 1, 1 - self.probs, 1.0))

    def quantile(self, q: Any) -> Tensor:
        """The smallest label with cdf >= q; shape q.shape + (*b)."""
        levels = _levels("Bernoulli.quantile", q, self._param, len(self.batch_shape))
        return (levels > 1 - self.probs).to(self.probs)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Labels 0 and 1 in the dtype of the parameters, shape sample_shape + (*b)."""
        shape = self._extended_shape(_shape(sample_shape))
        with torch.no_grad():
            return (_rand(shape, seed, self.probs) < self.probs).to(self.probs)


@final
class Categorical(TorchCategorical):
    """Labels 0..K-1 with probabilities `probs`, shape (*b, K); give either `probs` or `logits`.

    `mean`, `variance`, `cdf` and `quantile` treat the label as a number, which is meaningful for ordered classes only.
    """

    @property
    def mean(self) -> Tensor:
        """sum_k k p_k, shape (*b)."""
        return (self.probs * self._labels()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """sum_k (k - mean)^2 p_k, shape (*b)."""
        return (self.probs * (self._labels() - self.mean.unsqueeze(-1)).square()).sum(-1)

    def log_prob(self, value: Any) -> Tensor:
        """Log probability of the label `value`, 0..K-1."""
        return super().log_prob(_like(value, self._param))

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value)."""
        value = _like(value, self._param)
        return (self.probs * (self._labels() <= value.unsqueeze(-1))).sum(-1)

    def quantile(self, q: Any) -> Tensor:
        """The smallest label with cdf >= q; shape q.shape + (*b), dtype int64."""
        levels = _levels("Categorical.quantile", q, self._param, len(self.batch_shape))
        below = self.probs.cumsum(-1) < levels.unsqueeze(-1)
        return below.sum(-1).clamp(max=self.probs.shape[-1] - 1)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Labels of dtype int64, shape sample_shape + (*b)."""
        shape, source = _shape(sample_shape), generator(seed, self.probs.device)
        with torch.no_grad():
            flat = self.probs.reshape(-1, self.probs.shape[-1])
            num = math.prod(shape)
            if num == 0 or flat.shape[0] == 0:
                return torch.empty(self._extended_shape(shape), dtype=torch.int64, device=flat.device)
            index = torch.multinomial(flat, num, replacement=True, generator=source)
            return index.T.reshape(self._extended_shape(shape))

    def _labels(self) -> Tensor:
        return torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)


def _like(value: Any, like: Tensor) -> Tensor:
    """`value` as a tensor in the dtype and on the device of `like`."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(np.asarray(value))
    return value.to(dtype=like.dtype, device=like.device)


def _levels(where: str, q: Any, like: Tensor, batch_dims: int) -> Tensor:
    """Probability levels checked to lie in [0, 1], with `batch_dims` axes of size 1 appended."""
    levels = _like(q, like)
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        fail(SettingError, where, "q must lie in [0, 1].", got=f"{q!r}", fix="pass a probability, such as 0.95")
    return levels.reshape(levels.shape + (1,) * batch_dims)


def _shape(sample_shape: Any) -> torch.Size:
    return torch.Size((sample_shape,) if isinstance(sample_shape, int) else sample_shape)


def _randn(shape: torch.Size, seed: Seed, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator(seed, like.device), dtype=like.dtype, device=like.device)


def _rand(shape: torch.Size, seed: Seed, like: Tensor) -> Tensor:
    return torch.rand(shape, generator=generator(seed, like.device), dtype=like.dtype, device=like.device)


def _normal_cdf(z: Tensor) -> Tensor:
    # erfc of the negative keeps full relative accuracy far in the lower tail, where 0.5 (1 + erf) is only 0.
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def _mixture_log_density(value: Tensor, loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    z = (value - loc) / scale
    return torch.logsumexp(weights.log() - 0.5 * z.square() - scale.log(), -1) - _LOG_ROOT_2PI


def _mixture_cdf(value: Tensor, loc: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    return (weights * _normal_cdf((value - loc) / scale)).sum(-1)


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
