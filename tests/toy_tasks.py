"""Priors over tasks whose exact posterior predictive is known in closed form, for the tests of amortised inference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ToyTasks(NamedTuple):
    """What `bayesdl.priors.tasks.Tasks` holds."""

    x: Tensor
    y: Tensor
    noiseless: Tensor
    latents: dict[str, Tensor]


@dataclass(frozen=True)
class NormalMeans:
    """y_i ~ N(mu, noise^2) with mu ~ N(0, spread^2), whatever x is."""

    spread: float = 1.0
    noise: float = 0.5

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> ToyTasks:
        """Uniform x, and y about one mean a task."""
        device = generator.device
        x = torch.rand(batch, n, d, generator=generator, device=device) * 2 - 1
        mu = self.spread * torch.randn(batch, 1, generator=generator, device=device)
        y = mu + self.noise * torch.randn(batch, n, generator=generator, device=device)
        return ToyTasks(x, y, mu.expand(batch, n), {"mu": mu[:, 0]})

    def posterior(self, y: Tensor) -> tuple[Tensor, float]:
        """Mean and variance of mu after y (B n), by Bayes' rule for normals."""
        precision = 1 / self.spread**2 + y.shape[-1] / self.noise**2
        return y.sum(-1) / self.noise**2 / precision, 1 / precision

    def reference(self, x: Tensor, y: Tensor, xs: Tensor, latents: Mapping[str, Tensor]) -> torch.distributions.Normal:
        """The exact predictive of y at xs."""
        mean, variance = self.posterior(y.double())
        return torch.distributions.Normal(
            mean[:, None].expand(xs.shape[:-1]), math.sqrt(variance + self.noise**2), validate_args=False
        )


@dataclass(frozen=True)
class Blobs:
    """Two or more classes, one for each side of a random hyperplane through a cloud; labels int64."""

    num_classes: int = 3

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> ToyTasks:
        """Labels by thresholds on a random projection."""
        device = generator.device
        x = torch.randn(batch, n, d, generator=generator, device=device)
        w = torch.randn(batch, d, 1, generator=generator, device=device)
        level = torch.special.ndtr((x @ w)[..., 0] / w.norm(dim=1))
        y = (level * self.num_classes).long().clamp(max=self.num_classes - 1)
        return ToyTasks(x, y, y, {})


@dataclass(frozen=True)
class Steps:
    """Curves y = x at x = 0, 1, 2, … in order, so that a test can tell which rows went where."""

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> ToyTasks:
        """The same curve for every task; the noiseless value is larger by 1000."""
        x = torch.arange(n, dtype=torch.float32, device=generator.device).expand(batch, n)
        return ToyTasks(x[..., None].expand(batch, n, d), x.clone(), x + 1000, {})


def tiny_card(**changes: Any) -> dict[str, Any]:
    """A complete card."""
    ranges = {"n": [0, 20], "d": [1, 2], "x": [-1.0, 1.0]}
    card = {"name": "tiny", "task": "regression", "prior": "a toy", "ranges": ranges, "inputs": "raw", "targets": "raw"}
    return {**card, **changes}
