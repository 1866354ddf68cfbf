r"""Squared Euclidean distances between all pairs of rows, by one matrix product.

    |x_i - z_j|^2 = |x_i|^2 + |z_j|^2 - 2 x_i . z_j,        after both are centred

Without centring, rows at offset 1000 in float32 lose the distance altogether: rounding is relative to |x|^2, not to the
distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail


def sqdist(x: Tensor, z: Tensor | None = None) -> Tensor:
    r"""All squared distances, differentiable in both arguments to any order, with no NaN at coincident rows.

    A distance below the rounding error of its own computation, 16 eps |x_i|^2 after centring, is returned as exactly 0,
    with zero gradient; so rows that coincide are at distance 0 whether or not they stand on the diagonal.

    Args:
        x: (*b n d).
        z: (*b m d), or None for z = x, whose diagonal is exactly 0.

    Returns:
        (*b n m).

    Raises:
        ShapeError: The last axes of `x` and `z` differ.

    Cost: n m d multiplications, and n m numbers of memory.
    """
    if z is None:
        x = x - x.detach().mean(-2, keepdim=True)
        d2, norm = _expand(x, x)
        eye = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
        return d2.masked_fill((d2 <= _threshold(norm)) | eye, 0.0)
    if x.shape[-1] != z.shape[-1]:
        fail(
            ShapeError,
            "ops.sqdist",
            "x (*b, n, d) and z (*b, m, d) must agree in d.",
            got=f"x {tuple(x.shape)}, z {tuple(z.shape)}",
            fix="pass inputs with the same number of columns",
        )
    # The centre must be the same for both, whichever of them carries the batch axes.
    centre = x.detach().mean(-2, keepdim=True)
    d2, norm = _expand(x - centre, z - centre)
    return d2.masked_fill(d2 <= _threshold(norm), 0.0)


def sqdist_centred(x: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """`factor * sqdist(x)` without a graph, for rows already centred: a single product and one pass in place.

    Returns the multiples (*b n n), which the caller may overwrite, and (x, 1) (*b n d+1), which gradients need as well.
    """
    # |x_i - x_j|^2 = (-2 x_i, |x_i|^2, 1) . (x_j, 1, |x_j|^2)
    norm = (x * x).sum(-1, keepdim=True).mul_(factor)
    ones = torch.ones_like(norm)
    right = torch.cat([x, ones, norm], -1)
    d2 = torch.cat([x * (-2.0 * factor), norm, ones], -1) @ right.mT
    d2 = d2.clamp_min_(0.0) if factor > 0 else d2.clamp_max_(0.0)
    d2.diagonal(dim1=-2, dim2=-1).zero_()
    return d2, right[..., :-1]


def _expand(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    norm = (x * x).sum(-1)
    other = norm if z is x else (z * z).sum(-1)
    return norm.unsqueeze(-1) + other.unsqueeze(-2) - 2.0 * (x @ z.mT), norm.detach()


def _threshold(norm: Tensor) -> Tensor:
    return (16.0 * torch.finfo(norm.dtype).eps * norm).unsqueeze(-1)
