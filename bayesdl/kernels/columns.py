"""What kernels of raw inputs share: the columns that they look at, their settings' checks, a sum over differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.hyper import HyperPrior
from bayesdl.kernels.base import Kernel
from bayesdl.ops.distance import row_blocks

PriorChoice = HyperPrior | Literal["default"] | None


@dataclass(frozen=True, kw_only=True)
class OnColumns(Kernel):
    """What every leaf shares: the columns of x that it looks at."""

    active_dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        dims = self.active_dims
        if dims is None:
            return
        if len(dims) == 0 or len(set(dims)) != len(dims) or any(not isinstance(k, int) or k < 0 for k in dims):
            fail(
                SettingError,
                type(self).__name__,
                "active_dims must be distinct column numbers counted from 0.",
                got=repr(dims),
                fix="pass e.g. active_dims=(0, 2), or None for all columns",
            )
        object.__setattr__(self, "active_dims", tuple(dims))

    def _width(self, d: int) -> int:
        """How many of d columns are looked at."""
        if self.active_dims is None:
            return d
        if max(self.active_dims) >= d:
            fail(
                ShapeError,
                type(self).__name__,
                f"active_dims {self.active_dims} need at least {max(self.active_dims) + 1} columns.",
                got=f"d = {d}",
                fix="pass wider inputs, or smaller column numbers",
            )
        return len(self.active_dims)

    def _select(self, x: Tensor) -> Tensor:
        self._width(x.shape[-1])
        return x if self.active_dims is None else x[..., list(self.active_dims)]

    def _per_column(self, name: str, value: float | tuple[float, ...], width: int) -> float | tuple[float, ...]:
        if isinstance(value, tuple) and len(value) != width:
            fail(
                ShapeError,
                type(self).__name__,
                f"{name} must have one value for each of the {width} columns.",
                got=f"{len(value)} values",
                fix=f"pass {width} values, or one number for all",
            )
        return value


def check_positive(where: str, name: str, value: float | tuple[float, ...] | None, per_dimension: bool) -> None:
    """Refuse initial values that are not positive and finite, and a tuple where one number is shared."""
    if value is None:
        return
    values = value if isinstance(value, tuple) else (value,)
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < math.inf for v in values):
        fail(
            SettingError,
            where,
            f"{name} must be positive and finite, a number or a tuple of numbers.",
            got=repr(value),
            fix=f"pass {name}=0.5 or {name}=(0.5, 2.0)",
        )
    if isinstance(value, tuple) and not per_dimension:
        fail(
            SettingError,
            where,
            f"one {name} is shared by all columns when ard=False.",
            got=repr(value),
            fix=f"pass a single {name}, or ard=True",
        )


def difference_sum(p: Tensor, slope: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j q_ij (u_j - u_i), shape (*b n k), and sum_j q_ij, (*b n 1), with q = p * slope, which overwrites p.

    This is the part of a distance's gradient that both sides share.
    """
    n = p.shape[-1]
    if p.ndim > 2:
        # a column of ones beside u gives the sums of rows in the same product, which saves a batch a pass over q
        both = p.mul_(slope) @ torch.cat([u, u.new_ones(()).expand(*u.shape[:-1], 1)], -1)
        by_row = both[..., -1:]
        return torch.addcmul(both[..., :-1], u, by_row, value=-1.0), by_row
    blocks = row_blocks(p, n, n)
    if len(blocks) == 1:
        q = p.mul_(slope)
        by_row = q.sum(-1, keepdim=True)
        return torch.addcmul(q @ u, u, by_row, value=-1.0), by_row
    out, by_row = torch.empty_like(u), u.new_empty(n, 1)
    for rows in blocks:
        q = p[rows].mul_(slope[rows])
        torch.sum(q, -1, keepdim=True, out=by_row[rows])
        torch.mm(q, u, out=out[rows]).addcmul_(u[rows], by_row[rows], value=-1.0)
    return out, by_row
