r"""k(x, z) V in one Triton kernel: covariances are formed in registers, used, and never written to memory.

For float32 tiles on a GPU: each program holds a block of rows of the result in float64 and runs over all columns. The
kernel knows the profiles of stationary kernels and the arc-cosine recursion of relu networks. Loaded only where Triton
is installed; `usable` says whether it applies.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROFILES = ("rbf", "matern 0.5", "matern 1.5", "matern 2.5", "arc-cosine")
_MAX_WIDTH = 66  # columns of augmented rows; beyond it a plain matrix product is the better tool


class Fused(NamedTuple):
    """What the kernel evaluates.

    Attributes:
        profile: One of `PROFILES`.
        depth: Layers of the arc-cosine recursion.
        w2, b2: Its variances of weights and biases.
    """

    profile: str
    depth: int = 0
    w2: float = 0.0
    b2: float = 0.0


def usable(left: Tensor) -> bool:
    """Whether the kernel takes these rows: float32, not too wide, on a GPU (or in Triton's interpreter)."""
    fits = left.dtype == torch.float32 and left.shape[-1] <= _MAX_WIDTH
    place = left.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return fits and place and importlib.util.find_spec("triton") is not None


def product(fused: Fused, left: tuple[Tensor, ...], right: tuple[Tensor, ...], v: Tensor, *, same: bool) -> Tensor:
    """k(x, z) V (n t) in float64, from rows as `Tiles.rows` prepares them and v (m t) float32.

    Cost: n m kernel evaluations and 2 n m t operations; no memory but the result.
    """
    import triton

    n, width = left[0].shape
    m, t = v.shape
    out = torch.empty(n, t, dtype=torch.float64, device=v.device)
    by_x, by_z = (left[1], right[1]) if fused.profile == "arc-cosine" else (left[0], right[0])
    rows, columns, block = 64, 64, 16 if t <= 16 else 32
    grid = (triton.cdiv(n, rows), triton.cdiv(t, block))
    _kernel()[grid](
        left[0].mT.contiguous(),
        right[0].mT.contiguous(),
        by_x,
        by_z,
        v.contiguous(),
        out,
        n,
        m,
        t,
        fused.w2,
        fused.b2,
        WIDTH=width,
        PROFILE=PROFILES.index(fused.profile),
        DEPTH=fused.depth,
        SAME=same,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK=block,
    )
    return out


@functools.cache
def _kernel() -> Any:
    """The compiled kernel; Triton finds by their names in this module what a kernel calls."""
    import triton
    import triton.language

    global tl, _arccos
    tl, _arccos = triton.language, triton.jit(_arccos_approximation)
    return triton.jit(_product)


tl: Any = None
_arccos: Any = None


def _arccos_approximation(c):
    """Abramowitz, Stegun (1964), 4.4.46: error below 2e-8, at the rounding of float32."""
    a = tl.abs(c)
    p = 0.0066700901 - 0.0012624911 * a
    p = -0.0170881256 + a * p
    p = 0.0308918810 + a * p
    p = -0.0501743046 + a * p
    p = 0.0889789874 + a * p
    p = -0.2145988016 + a * p
    p = 1.5707963050 + a * p
    p = tl.sqrt(1.0 - a) * p
    return tl.where(c < 0.0, 3.141592653589793 - p, p)


def _product(
    left,
    right,
    by_x,
    by_z,
    v,
    out,
    n,
    m,
    t,
    w2,
    b2,
    WIDTH: tl.constexpr,
    PROFILE: tl.constexpr,
    DEPTH: tl.constexpr,
    SAME: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    for begin in range(0, m, COLUMNS):
        j = begin + tl.arange(0, COLUMNS).to(tl.int64)
        u = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.static_range(WIDTH):
            a = tl.load(left + k * n + i, mask=i < n, other=0.0)
            b = tl.load(right + k * m + j, mask=j < m, other=0.0)
            u += a[:, None] * b[None, :]
        diagonal = i[:, None] == j[None, :]
        if PROFILE == 0:
            u = tl.minimum(u, 0.0)
            if SAME:
                u = tl.where(diagonal, 0.0, u)
            u = tl.exp(u)
        elif PROFILE < 4:
            u = tl.maximum(u, 0.0)
            if SAME:
                u = tl.where(diagonal, 0.0, u)
            r = tl.sqrt(u)
            if PROFILE == 1:
                u = tl.exp(-r)
            elif PROFILE == 2:
                u = (1.0 + r) * tl.exp(-r)
            else:
                u = (1.0 + r + u / 3.0) * tl.exp(-r)
        else:
            a = tl.load(by_x + i, mask=i < n, other=1.0)
            b = tl.load(by_z + j, mask=j < m, other=1.0)
            if SAME:
                u = tl.where(diagonal, a[:, None], u)
            for _ in tl.static_range(DEPTH):
                scale = tl.sqrt(a[:, None] * b[None, :])
                cosine = tl.minimum(tl.maximum(u / scale, -1.0), 1.0)
                sine = tl.sqrt(1.0 - cosine * cosine)
                u = w2 * 0.15915494309189535 * scale * (sine + (3.141592653589793 - _arccos(cosine)) * cosine) + b2
                a = 0.5 * w2 * a + b2
                b = 0.5 * w2 * b + b2
        inside = (j[:, None] < m) & (c[None, :] < t)
        columns = tl.load(v + j[:, None] * t + c[None, :], mask=inside, other=0.0)
        total += tl.dot(u, columns, input_precision="ieee").to(tl.float64)
    tl.store(out + i[:, None] * t + c[None, :], total, mask=(i[:, None] < n) & (c[None, :] < t))
