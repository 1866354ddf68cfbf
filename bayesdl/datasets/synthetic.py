"""Synthetic data whose truth is known, for tutorials and tests. Seeded; the global random state is not used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, generator
from bayesdl.datasets.base import Loaded

__all__ = ["noisy_sine_with_gap", "true_noisy_sine", "two_moons"]


def true_noisy_sine(x: Tensor) -> Tensor:
    """The mean function behind `noisy_sine_with_gap`: sin(2 x) + x / 2, in the shape of x."""
    return torch.sin(2 * x) + 0.5 * x


def noisy_sine_with_gap(n: int = 100, noise_scale: float = 0.2, seed: Seed = 0) -> Loaded:
    """One input on [-3, 3] with no data on (-0.5, 1.2): y = sin(2 x) + x / 2 + noise.

    A good posterior is narrow where the data are and widens inside the gap and outside the range.
    """
    _checks.at_least("noisy_sine_with_gap", "n", n, 1, integer=True)
    _checks.at_least("noisy_sine_with_gap", "noise_scale", noise_scale, 0.0)
    source = generator(seed)
    left, right = 2.5, 1.8  # lengths of [-3, -0.5] and [1.2, 3]
    u = (left + right) * torch.rand(n, generator=source, dtype=torch.float64)
    x = torch.where(u < left, u - 3.0, u - left + 1.2)
    y = true_noisy_sine(x) + noise_scale * torch.randn(n, generator=source, dtype=torch.float64)
    return Loaded("noisy sine with a gap", x.unsqueeze(-1), y, "regression", ("x",), "y")


def two_moons(n: int = 200, noise_scale: float = 0.15, seed: Seed = 0) -> Loaded:
    """Two interleaved half circles in the plane, a binary problem with a curved boundary and little overlap."""
    _checks.at_least("two_moons", "n", n, 2, integer=True)
    _checks.at_least("two_moons", "noise_scale", noise_scale, 0.0)
    source = generator(seed)
    y = torch.arange(n) % 2
    angle = math.pi * torch.rand(n, generator=source, dtype=torch.float64)
    sign = 1.0 - 2.0 * y
    x = torch.stack([y + sign * torch.cos(angle), 0.5 * y + sign * torch.sin(angle)], -1)
    x = x + noise_scale * torch.randn(n, 2, generator=source, dtype=torch.float64)
    return Loaded("two moons", x, y, "binary", ("x0", "x1"), "moon", class_names=("upper", "lower"))
