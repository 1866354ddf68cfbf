"""The Student-t predictive, of a Gaussian process whose scale is unknown."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from bayesdl._random import Seed, generator
from bayesdl.distributions._base import levels_of, like_of, shape_of
from bayesdl.ops.student import student_cdf, student_quantile


@final
class StudentT(Distribution):
    r"""loc + scale T with T standard Student-t, the predictive of a Student-t process.

        p(y) = Gamma((dof + 1)/2) / (Gamma(dof/2) sqrt(pi dof) scale) (1 + (y - loc)^2 / (dof scale^2))^{-(dof + 1)/2}
        mean = loc (dof > 1, else NaN),   variance = scale^2 dof / (dof - 2) (dof > 2, else infinite)

    Args:
        dof: Degrees of freedom, above 0, shape (*b) or broadcasting with it.
        loc: Centre, shape (*b).
        scale: Scale, shape (*b), above 0; not the standard deviation.

    `cdf` is differentiable in value, loc and scale; `quantile` in loc and scale; for both `dof` counts as a constant.
    """

    arg_constraints = {  # noqa: RUF012 - torch's own protocol
        "dof": constraints.positive,
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    def __init__(self, dof: Any, loc: Any, scale: Any, validate_args: bool | None = None) -> None:
        self.dof, self.loc, self.scale = broadcast_all(dof, loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> StudentT:
        """The same distribution with batch axes broadcast to `batch_shape`."""
        shape = shape_of(batch_shape)
        return StudentT(self.dof.expand(shape), self.loc.expand(shape), self.scale.expand(shape), False)

    @property
    def mean(self) -> Tensor:
        """loc where dof > 1, NaN elsewhere; shape (*b)."""
        return torch.where(self.dof > 1, self.loc, math.nan)

    @property
    def mode(self) -> Tensor:
        """loc, shape (*b)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """scale^2 dof / (dof - 2), infinite where dof <= 2; shape (*b)."""
        thin = self.dof > 2
        ratio = torch.where(thin, self.dof, 4.0) / (torch.where(thin, self.dof, 4.0) - 2)
        return torch.where(thin, self.scale.square() * ratio, math.inf)

    def log_prob(self, value: Any) -> Tensor:
        """Log density at `value`, shape broadcast(value, *b)."""
        value = like_of(value, self.loc)
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        return _log_density(z, self.dof) - self.scale.log()

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value), accurate in the lower tail."""
        z = (like_of(value, self.loc) - self.loc) / self.scale
        below = student_cdf(z, self.dof)
        if not (torch.is_grad_enabled() and z.requires_grad):
            return below
        density = _log_density(z.detach(), self.dof.detach()).exp()
        return below + density * (z - z.detach())

    def quantile(self, q: Any) -> Tensor:
        """The value with P(Y <= value) = q; shape q.shape + (*b)."""
        levels = levels_of("StudentT.quantile", q, self.loc, len(self.batch_shape))
        return self.loc + self.scale * student_quantile(levels, self.dof)

    def rsample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), differentiable in dof, loc and scale."""
        shape, source = self._extended_shape(shape_of(sample_shape)), generator(seed, self.loc.device)
        z = torch.randn(shape, generator=source, dtype=self.loc.dtype, device=self.loc.device)
        half = (0.5 * self.dof).expand(shape)
        return self.loc + self.scale * z * (half / torch._standard_gamma(half, generator=source)).sqrt()

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed)

    def entropy(self) -> Tensor:
        """Differential entropy, shape (*b)."""
        half = 0.5 * (self.dof + 1)
        slope = torch.digamma(half) - torch.digamma(0.5 * self.dof)
        return half * slope - _log_density(torch.zeros_like(self.loc), self.dof) + self.scale.log()


def _log_density(z: Tensor, dof: Tensor) -> Tensor:
    constant = torch.lgamma(0.5 * (dof + 1)) - torch.lgamma(0.5 * dof) - 0.5 * (math.pi * dof).log()
    return constant - 0.5 * (dof + 1) * torch.log1p(z.square() / dof)
