r"""Hyper-parameters and the priors on them, for kernels, means and likelihoods.

A `Parameter` names one hyper-parameter, gives its shape and its initial value, and carries the prior that regularises
its estimate. Positive parameters, which nearly all are, are optimised and sampled as u = log theta. The log prior that
an optimiser adds is the density of theta itself (the mode does not move with the parametrisation that the optimiser
happens to use), as in GPyTorch and BoTorch; a sampler in u must add the log Jacobian u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail


class HyperPrior(Protocol):
    """A prior on a positive hyper-parameter: log density, its derivative, a typical value and draws."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `value`, elementwise."""

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of the log density at `value`, elementwise."""

    @property
    def typical(self) -> float:
        """A central value, where optimisation starts."""

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws in float64 on the generator's device."""


def _positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            fail(
                SettingError,
                where,
                f"{name} must be positive and finite.",
                got=f"{value!r}",
                fix="pass a value above 0",
            )


@dataclass(frozen=True)
class LogNormal:
    r"""log theta ~ N(loc, scale^2): density exp(-(log theta - loc)^2 / (2 scale^2)) / (theta scale sqrt(2 pi))."""

    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("LogNormal", scale=self.scale)
        if not math.isfinite(self.loc):
            fail(
                SettingError, "LogNormal", "loc must be finite.", got=f"{self.loc!r}", fix="pass the log of the median"
            )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `value`, elementwise."""
        u = value.log()
        return -0.5 * ((u - self.loc) / self.scale) ** 2 - u - math.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of the log density at `value`, elementwise."""
        return -((value.log() - self.loc) / self.scale**2 + 1) / value

    @property
    def typical(self) -> float:
        """The median, exp(loc)."""
        return math.exp(self.loc)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws in float64 on the generator's device."""
        z = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return (self.loc + self.scale * z).exp()


@dataclass(frozen=True)
class Gamma:
    r"""theta ~ Gamma(concentration a, rate b): density b^a theta^(a-1) exp(-b theta) / Gamma(a)."""

    concentration: float = 2.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        _positive("Gamma", concentration=self.concentration, rate=self.rate)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `value`, elementwise."""
        a, b = self.concentration, self.rate
        return a * math.log(b) - math.lgamma(a) + (a - 1) * value.log() - b * value

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of the log density at `value`, elementwise."""
        return (self.concentration - 1) / value - self.rate

    @property
    def typical(self) -> float:
        """The mean, concentration / rate."""
        return self.concentration / self.rate

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws in float64 on the generator's device."""
        a = torch.full(shape, self.concentration, dtype=torch.float64, device=generator.device)
        return torch._standard_gamma(a, generator=generator) / self.rate


@dataclass(frozen=True)
class HalfNormal:
    r"""theta = |z|, z ~ N(0, scale^2): density sqrt(2 / pi) / scale exp(-theta^2 / (2 scale^2)), theta > 0."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("HalfNormal", scale=self.scale)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `value`, elementwise."""
        return -0.5 * (value / self.scale) ** 2 + 0.5 * math.log(2 / math.pi) - math.log(self.scale)

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of the log density at `value`, elementwise."""
        return -value / self.scale**2

    @property
    def typical(self) -> float:
        """The median, about 0.674 scale."""
        return 0.6744897501960817 * self.scale

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws in float64 on the generator's device."""
        return self.scale * torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).abs()


@dataclass(frozen=True)
class Normal:
    r"""theta ~ N(loc, scale^2), for parameters of any sign."""

    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive("Normal", scale=self.scale)
        if not math.isfinite(self.loc):
            fail(SettingError, "Normal", "loc must be finite.", got=f"{self.loc!r}", fix="pass the mean")

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `value`, elementwise."""
        return -0.5 * ((value - self.loc) / self.scale) ** 2 - math.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of the log density at `value`, elementwise."""
        return -(value - self.loc) / self.scale**2

    @property
    def typical(self) -> float:
        """The mean."""
        return self.loc

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws in float64 on the generator's device."""
        z = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return self.loc + self.scale * z


@dataclass(frozen=True)
class Parameter:
    r"""One hyper-parameter of a kernel, mean or likelihood.

    It is optimised as a number u of any sign, from which its value follows as

        lower + exp(u)                               where only `lower` is finite: the rule
        u                                            where neither bound is
        lower + (upper - lower) / (1 + exp(-u))      where both are
        upper - exp(-u)                              where only `upper` is

    Attributes:
        name: Its name; composite kernels prefix it, as in "base.lengthscale" or "0.outputscale".
        shape: () for a scalar, (d,) for one value per input dimension. Batch axes come in front.
        initial: Where optimisation starts, and the value that is used when nothing is optimised.
        prior: Prior on the value, or None for a flat one.
        lower: The smallest value that a fit may reach: 0 for a positive parameter, -inf for one of any sign.
        upper: The largest one.
    """

    name: str
    shape: tuple[int, ...]
    initial: float | tuple[Any, ...]
    prior: HyperPrior | None = None
    lower: float = 0.0
    upper: float = math.inf

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_log(self) -> bool:
        """Whether its value is lower + exp(u)."""
        return self.lower > -math.inf and self.upper == math.inf

    def prefixed(self, prefix: str) -> Parameter:
        """The same parameter under `prefix.name`."""
        return replace(self, name=f"{prefix}.{self.name}")

    def initial_tensor(self, like: Tensor) -> Tensor:
        """The initial value, shape `shape`, in the dtype and on the device of `like`."""
        value = torch.as_tensor(self.initial, dtype=like.dtype, device=like.device)
        return value.expand(self.shape).clone()

    def constrained(self, u: Tensor) -> Tensor:
        """The value at u, elementwise."""
        if self.is_log:
            return u.exp() + self.lower if self.lower else u.exp()
        if self.lower == -math.inf:
            return u if self.upper == math.inf else self.upper - (-u).exp()
        return self.lower + (self.upper - self.lower) * u.sigmoid()

    def unconstrained(self, value: Tensor) -> Tensor:
        """The u that gives `value`, elementwise."""
        if self.is_log:
            return (value - self.lower).log()
        if self.lower == -math.inf:
            return value if self.upper == math.inf else -(self.upper - value).log()
        return ((value - self.lower) / (self.upper - self.lower)).logit()

    def slope(self, u: Tensor) -> Tensor:
        """d value / d u, elementwise."""
        if self.is_log:
            return u.exp()
        if self.lower == -math.inf:
            return torch.ones_like(u) if self.upper == math.inf else (-u).exp()
        return (self.upper - self.lower) * u.sigmoid() * (-u).sigmoid()
