r"""Problems of different sizes in one batch: rows beyond a problem's own length are padding, and change nothing.

    A = [[K + noise_variance I, 0], [0, I]],    r = (residual, 0)

so that log|A|, r' A^{-1} r and every gradient are those of the problem without its padding, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail


def real_rows(lengths: Tensor, n: int) -> Tensor:
    """(*b n) bool, True in the first lengths (*b) of n places."""
    return torch.arange(n, device=lengths.device) < lengths.unsqueeze(-1)


def fill_rows(x: Tensor, real: Tensor) -> Tensor:
    """x (*b n d) or (n d) with its padding, whatever it holds, replaced by the first row."""
    return torch.where(real.unsqueeze(-1), x, x[..., :1, :])


def uncouple(k: Tensor, real: Tensor) -> Tensor:
    """K (*b n n) without covariances to or among the padding."""
    return k.masked_fill(~(real.unsqueeze(-1) & real.unsqueeze(-2)), 0.0)


def check_lengths(where: str, lengths: Tensor, batch: torch.Size, n: int) -> None:
    """Raise ShapeError unless `lengths` are whole numbers in 1..n, of shape `batch`."""
    if lengths.shape != batch or lengths.is_floating_point() or bool(((lengths < 1) | (lengths > n)).any()):
        fail(
            ShapeError,
            where,
            f"lengths must be whole numbers from 1 to {n}, of shape {tuple(batch)}.",
            got=f"{lengths.dtype} {tuple(lengths.shape)} {lengths.flatten()[:8].tolist()}",
            fix="pass the number of real rows of each problem, e.g. torch.tensor([5, 3])",
        )
