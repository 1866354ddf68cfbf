r"""Squared Euclidean distances between all pairs of rows, by one matrix product.

    |x_i - z_j|^2 = |x_i|^2 + |z_j|^2 - 2 x_i . z_j,        after both are centred

Without centring, rows at offset 1000 in float32 lose the distance altogether: rounding is relative to |x|^2, not to the
distance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail

# Two or three blocks are alive at once; together they should stay within a core's second-level cache.
_BLOCK_BYTES = 2**19
_FEW_ROWS = 256


def sqdist(x: Tensor, z: Tensor | None = None) -> Tensor:
    r"""All squared distances, differentiable in both arguments to any order, with no NaN at coincident rows.

    A distance below the rounding error of its own computation, 16 eps |x_i|^2 after centring, is returned as exactly 0;
    so rows that coincide are at distance 0 whether or not they stand on the diagonal. Its derivatives stay those of
    |x_i - z_j|^2, of which the second does not vanish where the first does. A square root of it has no slope at 0:
    kernels are functions of the square, as in `profiles`.

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
        return _settled(d2, norm).masked_fill_(eye, 0.0)
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
    return _settled(*_expand(x - centre, z - centre))


def sqdist_centred(
    x: Tensor,
    factor: float = 1.0,
    offset: Tensor | None = None,
    then: Callable[[Tensor, slice], None] | None = None,
    clamp: bool = True,
) -> Tensor:
    """`factor * sqdist(x) + offset` (*b n n) without a graph, for rows already centred: one product, then in place.

    Args:
        x: (*b n d), rows centred.
        factor: Multiplies the distances.
        offset: Added to them: (), or (*b 1 1) with batch axes that x has as well. None for 0.
        then: Called with each block of rows (a view of the result) and its place, to be finished in place while it is
            still in the cache. A batch is one block, `slice(None)`.
        clamp: Whether distances that rounding makes negative become 0, as a square root needs; a pass over the matrix.
    """
    norm = (x * x).sum(-1, keepdim=True)
    if factor != 1.0:
        norm.mul_(factor)
    if x.ndim == 3 or (x.ndim == 2 and x.shape[0] <= _FEW_ROWS):
        # The time of small matrices is their number of calls: a pass more is cheaper than putting columns together.
        d2 = torch.add(norm if offset is None else norm + offset, norm.mT)
        d2 = (d2.addmm_ if d2.ndim == 2 else d2.baddbmm_)(x, x.mT, alpha=-2.0 * factor)
        d2 = _finish(d2, 0, factor, offset, clamp)
        if then is not None:
            then(d2, slice(None))
        return d2
    # |x_i - x_j|^2 = (-2 x_i, |x_i|^2, 1) . (x_j, 1, |x_j|^2)
    ones = torch.ones_like(norm)
    left = torch.cat([x if factor == -0.5 else x * (-2.0 * factor), norm, ones], -1)
    right = torch.cat([x, ones, norm if offset is None else norm + offset], -1).mT
    n = x.shape[-2]
    blocks = row_blocks(x, n, n)
    if len(blocks) == 1:
        d2 = _finish(left @ right, 0, factor, offset, clamp)
        if then is not None:
            then(d2, slice(None))
        return d2
    d2 = torch.empty(n, n, dtype=x.dtype, device=x.device)
    for rows in blocks:
        block = torch.mm(left[rows], right, out=d2[rows])
        _finish(block, rows.start, factor, offset, clamp)
        if then is not None:
            then(block, rows)
    return d2


def row_blocks(like: Tensor, n: int, m: int) -> list[slice]:
    """Rows of an (n, m) matrix in pieces that a core's cache holds; one piece in a batch, on a GPU, or at small n.

    `like` tells dtype, device and, by having more than two axes, that there is a batch.
    """
    rows = _BLOCK_BYTES // max(1, m * like.element_size())
    if like.ndim > 2 or like.device.type != "cpu" or 2 * rows >= n or rows == 0:
        return [slice(None)]
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _finish(d2: Tensor, first: int, factor: float, offset: Tensor | None, clamp: bool) -> Tensor:
    """Distances that rounding has made negative become 0, and so does the diagonal, which starts at column `first`."""
    diagonal = d2.diagonal(first, -2, -1)
    if offset is None:
        if clamp:
            d2 = d2.clamp_min_(0.0) if factor > 0 else d2.clamp_max_(0.0)
        diagonal.zero_()
    else:
        if clamp:
            bound = torch.maximum if factor > 0 else torch.minimum
            d2 = bound(d2, offset, out=d2)
        diagonal.copy_(offset if offset.ndim == 0 else offset.squeeze(-1))
    return d2


def _expand(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    norm = (x * x).sum(-1)
    other = norm if z is x else (z * z).sum(-1)
    # a sum's gradient does not need the sum, so that the products may take its place
    return (norm.unsqueeze(-1) + other.unsqueeze(-2)).sub_(x @ z.mT, alpha=2.0), norm.detach()


def _settled(d2: Tensor, norm: Tensor) -> Tensor:
    """Distances below their own rounding error become 0, in place, and keep their derivatives."""
    near = d2 <= (16.0 * torch.finfo(norm.dtype).eps * norm).unsqueeze(-1)
    if not torch.is_grad_enabled():
        return d2.masked_fill_(near, 0.0)
    return d2.sub_(torch.where(near, d2.detach(), 0.0))
