r"""Hyper-parameters and the priors on them, for kernels, means and likelihoods.

A `Parameter` names one hyper-parameter, gives its shape and its initial value, and carries the prior that regularises
its estimate. Positive parameters are optimised and sampled as u = log theta. The log prior that an optimiser adds is
the density of theta itself (the mode does not move with the parametrisation that the optimiser happens to use), as in
GPyTorch and BoTorch; a sampler in u must add the log Jacobian u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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
class Parameter:
    """One positive hyper-parameter of a kernel or likelihood.

    Attributes:
        name: Its name; composite kernels prefix it, as in "base.lengthscale" or "0.outputscale".
        shape: () for a scalar, (d,) for one value per input dimension. Batch axes come in front.
        initial: Where optimisation starts, and the value that is used when nothing is optimised.
        prior: Prior on the value, or None for a flat one.
        lower: The smallest value that a fit may reach, or 0 for none.
    """

    name: str
    shape: tuple[int, ...]
    initial: float | tuple[float, ...]
    prior: HyperPrior | None = None
    lower: float = 0.0

    def prefixed(self, prefix: str) -> Parameter:
        """The same parameter under `prefix.name`."""
        return Parameter(f"{prefix}.{self.name}", self.shape, self.initial, self.prior, self.lower)

    def initial_tensor(self, like: Tensor) -> Tensor:
        """The initial value, shape `shape`, in the dtype and on the device of `like`."""
        value = torch.as_tensor(self.initial, dtype=like.dtype, device=like.device)
        return value.expand(self.shape).clone()
