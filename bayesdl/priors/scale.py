r"""Priors on the scale of a random function: on v = sigma^2, the factor by which a whole covariance is multiplied.

    f | v ~ GP(0, v k),        v ~ p(v)

All densities here are densities of v, the variance scale, not of sigma. The priors of `bayesdl.hyper` that have a
density on the positive half-line (`LogNormal`, `Gamma`, `HalfNormal`) may stand in the same place.

What is learned. (p(v), lambda k) and (p(v / lambda), k) are one model, so whatever only stretches p(v) is left to the
amplitude of the kernel and stays fixed. What remains is the shape, the weight of the tails. With `learn=True` it is
estimated with the other hyper-parameters, under a prior of its own, which it needs: all that one data set says of v
goes through a single draw of it, and of all p(v) the evidence prefers a point at the best v, which is the Gaussian
process again. So `learn` is off by default, and turns out as the priors on the shape say, moved towards a GP.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.hyper import HyperPrior, LogNormal, Parameter

Values = dict[str, Tensor]

_SHAPE_SPREAD = 0.5  # log-sd of the prior on a learned shape, around its initial value


class ScalePrior(abc.ABC):
    """A density on v = sigma^2 > 0. Immutable; learned shapes travel apart from it, as for kernels."""

    @abc.abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The shapes that are learned, each with its prior; empty where all is fixed."""

    @abc.abstractmethod
    def log_prob(self, value: Tensor, params: Values | None = None) -> Tensor:
        """Log density at v, elementwise and differentiable; `params` (broadcasting with v) replaces learned shapes."""

    @abc.abstractmethod
    def sample(self, shape: tuple[int, ...], generator: torch.Generator, params: Values | None = None) -> Tensor:
        """Draws of v in float64 on the generator's device; `params` must broadcast with `shape`."""


@dataclass(frozen=True)
class InverseGamma(ScalePrior):
    r"""v ~ IG(a, b): density b^a v^(-a - 1) exp(-b / v) / Gamma(a); 1 / v ~ Gamma(a, b).

    f is then a Student-t process with 2a degrees of freedom. The mean b / (a - 1) exists for a > 1, the variance of v
    for a > 2. As a = b grows, v becomes 1 and f the Gaussian process.

    Attributes:
        concentration: a.
        rate: b.
        learn: Whether a is learned; b / a, which only stretches the density, keeps its value.
    """

    concentration: float = 2.0
    rate: float = 2.0
    learn: bool = False

    def __post_init__(self) -> None:
        _positive(self, "concentration", "rate")

    def parameters(self) -> tuple[Parameter, ...]:
        """`concentration`, where it is learned."""
        return (_shape("concentration", self.concentration),) if self.learn else ()

    def at(self, params: Values | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) as tensors in the dtype and on the device of `like`, at the learned value where there is one."""
        a = _value(params, "concentration", self.concentration, like)
        return a, a * (self.rate / self.concentration)

    def log_prob(self, value: Tensor, params: Values | None = None) -> Tensor:
        """Log density at v."""
        a, b = self.at(params, value)
        return a * b.log() - torch.lgamma(a) - (a + 1) * value.log() - b / value

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, params: Values | None = None) -> Tensor:
        """Draws of v."""
        a, b = self.at(params, _like(generator))
        return b / torch._standard_gamma(a.expand(shape).contiguous(), generator=generator)


@dataclass(frozen=True)
class BurrXII(ScalePrior):
    r"""v ~ Burr XII(c, d): density c d v^(c - 1) (1 + v^c)^(-d - 1), cdf 1 - (1 + v^c)^(-d).

    The tail falls as v^(-c d - 1). It has no scale of its own; the kernel's amplitude is its scale.

    Attributes:
        c: First shape: below 1 the density is infinite at 0.
        d: Second shape.
        learn: Whether both shapes are learned.

    Reference: Lee, Yun, Yang, Lee (2022), "Scale mixtures of neural network Gaussian processes", arXiv 2107.01408.
    """

    c: float = 2.0
    d: float = 3.0
    learn: bool = False

    def __post_init__(self) -> None:
        _positive(self, "c", "d")

    def parameters(self) -> tuple[Parameter, ...]:
        """`c` and `d`, where they are learned."""
        return (_shape("c", self.c), _shape("d", self.d)) if self.learn else ()

    def log_prob(self, value: Tensor, params: Values | None = None) -> Tensor:
        """Log density at v."""
        c, d = _value(params, "c", self.c, value), _value(params, "d", self.d, value)
        u = value.log()
        # log(1 + v^c) without overflow of v^c
        return c.log() + d.log() + (c - 1) * u - (d + 1) * torch.logaddexp(c * u, torch.zeros_like(c * u))

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, params: Values | None = None) -> Tensor:
        """Draws of v, by inversion of the cdf."""
        like = _like(generator)
        c, d = _value(params, "c", self.c, like), _value(params, "d", self.d, like)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return torch.expm1(-torch.log1p(-u) / d).pow(1 / c)


@dataclass(frozen=True)
class HalfCauchy(ScalePrior):
    r"""v half-Cauchy: density 2 s / (pi (s^2 + v^2)), v > 0; no mean. On the variance scale v, not on sigma.

    Attributes:
        scale: s, the median; left to the kernel's amplitude, so never learned.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "scale")

    def parameters(self) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def log_prob(self, value: Tensor, params: Values | None = None) -> Tensor:
        """Log density at v."""
        twice = 2 * (value / self.scale).log()
        return math.log(2 / (math.pi * self.scale)) - torch.logaddexp(twice, torch.zeros_like(twice))

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, params: Values | None = None) -> Tensor:
        """Draws of v, by inversion of the cdf."""
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return self.scale * (0.5 * math.pi * u).tan()


@dataclass(frozen=True)
class Exponential(ScalePrior):
    r"""v ~ Exponential(r): density r exp(-r v). f is then a Laplace-type process, with exponential tails.

    Attributes:
        rate: r; left to the kernel's amplitude, so never learned.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "rate")

    def parameters(self) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def log_prob(self, value: Tensor, params: Values | None = None) -> Tensor:
        """Log density at v."""
        return math.log(self.rate) - self.rate * value

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, params: Values | None = None) -> Tensor:
        """Draws of v, by inversion of the cdf."""
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return -torch.log1p(-u) / self.rate


@dataclass(frozen=True)
class UserScale(ScalePrior):
    """A density of your own: any differentiable function from v (a tensor) to its log density, elementwise.

    It need not be normalised; evidence is then known up to that constant. It should have one mode in log v. There is
    no drawing from it, and a posterior that holds it cannot be saved, since a file holds no code.

    Attributes:
        log_density: v -> log p(v), elementwise, in torch.
    """

    log_density: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.log_density):
            wanted = "log_density must be callable: v -> log p(v)."
            fix = "UserScale(lambda v: -v), say"
            fail(SettingError, "UserScale", wanted, got=_checks.describe(self.log_density), fix=fix)

    def parameters(self) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def log_prob(self, value: Tensor, params: Values | None = None) -> Tensor:
        """Log density at v, as given."""
        return self.log_density(value)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, params: Values | None = None) -> Tensor:
        """Not known from a density."""
        wanted = "a log density gives no draws of v from the prior."
        fix = "use method='quadrature', or a prior of bdl.priors that can be drawn from"
        fail(SettingError, "UserScale.sample", wanted, got=f"shape {shape}", fix=fix)


@dataclass(frozen=True)
class HyperScale(ScalePrior):
    """A prior on a positive hyper-parameter (`LogNormal`, `Gamma`, `HalfNormal`), used as the prior on v.

    Attributes:
        prior: The prior; all of it stays fixed.
    """

    prior: HyperPrior

    def parameters(self) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def log_prob(self, value: Tensor, params: Values | None = None) -> Tensor:
        """Log density at v."""
        return self.prior.log_prob(value)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, params: Values | None = None) -> Tensor:
        """Draws of v."""
        return self.prior.sample(shape, generator)


def scale_prior(where: str, given: object) -> ScalePrior:
    """What a user passes as the prior on v: a `ScalePrior`, a prior of `bayesdl.hyper`, or a log density."""
    if isinstance(given, ScalePrior):
        return given
    if not isinstance(given, type):
        if hasattr(given, "log_prob") and hasattr(given, "sample"):
            return HyperScale(given)
        if callable(given):
            return UserScale(given)
    wanted = "scale_prior must be a prior on the variance scale sigma^2, or its log density."
    fix = "bdl.priors.InverseGamma(2.0, 2.0), bdl.priors.BurrXII(2.0, 3.0), or lambda v: -v"
    return fail(SettingError, where, wanted, got=_checks.describe(given), fix=fix)


def _positive(prior: ScalePrior, *names: str) -> None:
    for name in names:
        _checks.inside(type(prior).__name__, name, getattr(prior, name), 0.0, math.inf)


def _shape(name: str, initial: float) -> Parameter:
    return Parameter(name, (), initial, LogNormal(math.log(initial), _SHAPE_SPREAD))


def _value(params: Values | None, name: str, fixed: float, like: Tensor) -> Tensor:
    if params is not None and name in params:
        return params[name]
    return torch.as_tensor(fixed, dtype=like.dtype, device=like.device)


def _like(generator: torch.Generator) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=generator.device)
