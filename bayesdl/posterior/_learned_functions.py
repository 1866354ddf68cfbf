"""One function from marginals: anchors at which values are drawn, and a smooth random function between them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayesdl._random import child_seeds, generator

_FEATURES = 64


def anchors_of(x: Tensor, bounds: list[float], num: int, num_anchors: int, seed: int) -> tuple[Tensor, Tensor]:
    """Anchors (num, *b, a, d) for each of `num` functions, in random order, and the distance between them (*b, 1, 1).

    Up to half of them are points of x (*b, n, d), the others quasi-random points of the box around x and `bounds`,
    shifted by a random vector for each function.
    """
    pick_seed, shift_seed = child_seeds(seed, 2)
    n, d = x.shape[-2:]
    low = x.amin(-2, keepdim=True).clamp_max(bounds[0])
    side = x.amax(-2, keepdim=True).clamp_min(bounds[1]) - low
    own = min(n, num_anchors // 2)
    g = generator(pick_seed)
    picked = torch.stack([torch.randperm(n, generator=g)[:own] for _ in range(num)]) if num else torch.empty(0, own)
    picked = picked.to(device=x.device, dtype=torch.int64)
    data = x[..., picked, :].movedim(-3, 0) if own else x.new_empty(num, *x.shape[:-2], 0, d)
    free = num_anchors - own
    fill = SobolEngine(d, scramble=True, seed=shift_seed % 2**31).draw(free, dtype=torch.float64)
    g = generator(shift_seed)
    fill = (fill + torch.rand(num, 1, d, generator=g, dtype=torch.float64)) % 1.0
    fill = fill.to(x).reshape(num, *(1,) * (x.ndim - 2), free, d)
    fill = (low + side * fill).expand(num, *x.shape[:-2], free, d)
    order = torch.rand(num, num_anchors, generator=g, dtype=torch.float64).argsort(-1).to(x.device)
    both = torch.cat([data, fill], -2)
    order = order.reshape(num, *(1,) * (x.ndim - 2), num_anchors, 1).expand_as(both)
    spacing = side.mean(-1, keepdim=True) * max(1, num_anchors) ** (-1 / d)
    return both.gather(-2, order), spacing


def residual_of(num: int, rows: int, d: int, spacing: Tensor, seed: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    r"""Random functions z(x) = sqrt(2 / F) sum_j a_j cos(w_j' x + b_j), a_j ~ N(0, 1), w_j ~ N(0, 1 / spacing^2).

    Over draws z(x) has mean 0, variance 1 and the correlation of an RBF kernel of lengthscale `spacing`.

    Args:
        num: Functions.
        rows: Data sets and outputs.
        spacing: (*b, 1, 1); each output of a data set has that of the data set.

    Returns:
        From x (num, rows, s, d) to z (num, rows, s).
    """
    g = generator(seed, like.device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=like.dtype, device=like.device)

    lengths = spacing.reshape(-1).to(like)
    lengths = lengths.repeat_interleave(rows // max(1, len(lengths)))
    frequency = normal(num, rows, d, _FEATURES) / lengths[:, None, None]
    phase = torch.rand(num, rows, 1, _FEATURES, generator=g, dtype=like.dtype, device=like.device) * (2 * math.pi)
    weight = normal(num, rows, _FEATURES, 1) * math.sqrt(2 / _FEATURES)

    def z(x: Tensor) -> Tensor:
        return (torch.cos(x @ frequency + phase) @ weight).squeeze(-1)

    return z
