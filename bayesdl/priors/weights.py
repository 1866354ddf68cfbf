r"""Priors on the weights of a network, scaled by fan-in.

A weight is w = s z with z from a standard law and s = scale / sqrt(fan_in) for matrices, bias_scale for biases, so that
the prior over functions keeps its size as layers widen (Neal 1996). Samplers and optimisers work on z, in which every
coordinate has the same prior width.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl import _checks


@dataclass(frozen=True)
class WeightPrior(abc.ABC):
    """A factorised prior on weights.

    Attributes:
        scale: Scale of matrix entries before the division by sqrt(fan_in).
        bias_scale: Scale of biases; `scale` where None.
        fan_in: Whether matrix entries are divided by the square root of the number of inputs of their layer.
    """

    scale: float = 1.0
    bias_scale: float | None = None
    fan_in: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        _checks.inside(name, "scale", self.scale, 0.0, math.inf)
        if self.bias_scale is not None:
            _checks.inside(name, "bias_scale", self.bias_scale, 0.0, math.inf)

    def scale_of(self, fan_in: int | None) -> float:
        """The factor s of a matrix entry with `fan_in` inputs, or of a bias where `fan_in` is None."""
        if fan_in is None:
            return self.scale if self.bias_scale is None else self.bias_scale
        return self.scale / math.sqrt(fan_in) if self.fan_in else self.scale

    @abc.abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of standardised weights z (..., D), summed over the last axis."""

    @abc.abstractmethod
    def slope(self, z: Tensor) -> Tensor:
        """Derivative of the log density in each standardised weight."""

    @abc.abstractmethod
    def sample(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draws of standardised weights."""


@dataclass(frozen=True)
class Normal(WeightPrior):
    """z ~ N(0, 1)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """-z'z / 2 - D/2 log(2 pi)."""
        return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)

    def slope(self, z: Tensor) -> Tensor:
        """Derivative of the log density in each standardised weight."""
        return -z

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draws of standardised weights."""
        return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


@dataclass(frozen=True)
class Laplace(WeightPrior):
    """z has density exp(-sqrt(2) |z|) / sqrt(2), of variance 1: sparser than a normal prior."""

    def log_prob(self, z: Tensor) -> Tensor:
        """-sqrt(2) |z| - D/2 log 2."""
        return -math.sqrt(2) * z.abs().sum(-1) - 0.5 * z.shape[-1] * math.log(2)

    def slope(self, z: Tensor) -> Tensor:
        """Derivative of the log density in each standardised weight."""
        return -math.sqrt(2) * z.sign()

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draws of standardised weights."""
        u = torch.rand((2, *shape), generator=generator, dtype=dtype, device=generator.device)
        # the difference of two exponentials of rate sqrt(2)
        return (torch.log1p(-u[0]) - torch.log1p(-u[1])) / math.sqrt(2)


@dataclass(frozen=True)
class StudentT(WeightPrior):
    """z ~ Student-t with `dof` degrees of freedom and unit scale: heavy tails, a few large weights."""

    dof: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.inside("StudentT", "dof", self.dof, 0.0, math.inf)

    def log_prob(self, z: Tensor) -> Tensor:
        """Sum of log Student-t densities."""
        v = self.dof
        constant = math.lgamma((v + 1) / 2) - math.lgamma(v / 2) - 0.5 * math.log(v * math.pi)
        return z.shape[-1] * constant - 0.5 * (v + 1) * torch.log1p(z.square() / v).sum(-1)

    def slope(self, z: Tensor) -> Tensor:
        """Derivative of the log density in each standardised weight."""
        return -(self.dof + 1) * z / (self.dof + z.square())

    def sample(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draws of standardised weights."""
        z = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        half = torch.full(shape, self.dof / 2, dtype=dtype, device=generator.device)
        return z * (half / torch._standard_gamma(half, generator=generator)).sqrt()
