r"""Laws of two levels, with which the tabular prior draws its hyper-parameters: first a law, then the value.

The spread between data sets is far larger than with one level, which is the point: a network that is trained on them
must find out what kind of data set is before it.

Reference: Hollmann, Mueller, Eggensperger, Hutter (2023), "TabPFN", arXiv 2207.01848, and its published settings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def meta_gamma(shape: tuple[int, ...], most_alpha: float, most_mean: float, generator: torch.Generator) -> Tensor:
    """Gamma of shape a and mean m: ln a ~ U(0, ln most_alpha), m ~ U(0, most_mean); float64."""
    u, v = _uniforms(shape, generator)
    alpha = (u * math.log(most_alpha)).exp()
    return torch._standard_gamma(alpha, generator=generator) * (most_mean * v / alpha)


def meta_normal(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Normal of mean m and standard deviation m r, above 0: ln m ~ U(ln low, ln high), ln r ~ U(ln .01, 0); float64."""
    u, v = _uniforms(shape, generator)
    mean = (math.log(low) + u * math.log(high / low)).exp()
    ratio = ((1.0 - v) * math.log(0.01)).exp()
    # by inversion of the upper tail: z > -1 / ratio
    tail = torch.special.ndtr(1.0 / ratio)
    w = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return mean * (1.0 - ratio * torch.special.ndtri((1.0 - w) * tail)).clamp_min(1e-12)


def meta_beta(shape: tuple[int, ...], scale: float, low: float, high: float, generator: torch.Generator) -> Tensor:
    """scale * Beta(a, b) with a, b ~ U(low, high); float64."""
    a, b = (low + (high - low) * u for u in _uniforms(shape, generator))
    # in logs, since gammas of small shape underflow: G(a) = G(a + 1) U^(1 / a)
    logs = []
    for c in (a, b):
        w = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        logs.append(torch._standard_gamma(c + 1.0, generator=generator).log() + torch.log1p(-w) / c)
    return scale * torch.sigmoid(logs[0] - logs[1])


def meta_choice(num: int, generator: torch.Generator) -> int:
    """One of `num` options with probabilities softmax(1, U(-3, 5), U(-3, 5), ...)."""
    logits = 8.0 * torch.rand(num, generator=generator, dtype=torch.float64) - 3.0
    logits[0] = 1.0
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def _uniforms(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    u = torch.rand((2, *shape), generator=generator, dtype=torch.float64, device=generator.device)
    return u[0], u[1]
