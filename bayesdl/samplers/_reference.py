"""Where a population of particles comes from: a distribution that can be drawn from and whose density is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bayesdl._random import generator
from bayesdl.errors import ShapeError, fail


class Reference(Protocol):
    """Where the particles come from: a distribution with draws and a normalised density."""

    def sample(self, num: int, seed: int) -> Tensor:
        """`num` independent draws, (num, D); they set dtype and device."""

    def log_prob(self, q: Tensor) -> Tensor:
        """Log density at q (*g, C, D), shape (*g, C); for the log evidence it must be normalised."""


@dataclass(frozen=True, eq=False)
class GaussianReference:
    """N(mean, root root').

    Attributes:
        mean: (D).
        root: Standard deviations (D), or the lower Cholesky factor (D, D) of the covariance.
    """

    mean: Tensor
    root: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or tuple(self.root.shape) not in (tuple(self.mean.shape), tuple(self.mean.shape) * 2):
            got = f"mean {tuple(self.mean.shape)}, root {tuple(self.root.shape)}"
            wanted = "mean must have shape (D,), root (D,) or (D, D)."
            fail(ShapeError, "GaussianReference", wanted, got=got, fix="torch.linalg.cholesky(covariance) for the root")

    def sample(self, num: int, seed: int) -> Tensor:
        """`num` independent draws, (num, D)."""
        g = generator(seed, self.mean.device)
        z = torch.randn(num, len(self.mean), generator=g, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (z @ self.root.T if self.root.ndim == 2 else z * self.root)

    def log_prob(self, q: Tensor) -> Tensor:
        """Log density at q (*g, C, D), shape (*g, C)."""
        centred = q - self.mean
        if self.root.ndim == 2:
            flat = centred.reshape(-1, centred.shape[-1])
            white = torch.linalg.solve_triangular(self.root, flat.T, upper=False).T.reshape(centred.shape)
            widths = self.root.diagonal()
        else:
            white, widths = centred / self.root, self.root
        constant = widths.log().sum() + 0.5 * q.shape[-1] * math.log(2 * math.pi)
        return -0.5 * white.square().sum(-1) - constant
