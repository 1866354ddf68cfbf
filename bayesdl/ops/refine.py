r"""Solves in mixed precision: a float32 factor, float64 residuals, and float64 throughout where those do not vanish.

    x <- x + (L L')^{-1} (b - A x),    L L' = float32(A)

Each round multiplies the error by about cond(A) eps_32, so that a few rounds reach float64 accuracy where cond(A) is
below some 1e6, and none ever do above some 1e7. What happened is part of the result. Log determinants are not refined
this way: they need a float64 factor.

Reference: Higham (2002), "Accuracy and stability of numerical algorithms", chapter 12.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.ops.factor import cholesky


class RefinedSolve(NamedTuple):
    """A solution and how it came about.

    Attributes:
        solution: (*b n k), float64; NaN where even the float64 factorisation failed.
        rounds: Rounds of refinement that were made.
        residuals: (rounds + 1, *b) largest relative residual |b - A x| / |b| of any column, after each round.
        residual: (*b) that of `solution`.
        fell_back: (*b) bool, True where the float64 factor gave the solution.
    """

    solution: Tensor
    rounds: int
    residuals: Tensor
    residual: Tensor
    fell_back: Tensor


def refined_solve(a: Tensor, rhs: Tensor, *, max_rounds: int = 5, tolerance: float = 1e-10) -> RefinedSolve:
    """A^{-1} rhs in float64 accuracy from a float32 factor, which takes half the memory and half the time or less.

    An element whose residual stays above `tolerance`, or which stops improving, is solved by a float64 factor instead.

    Args:
        a: (*b n n) symmetric positive definite, float64.
        rhs: (*b n k), float64.
        max_rounds: Rounds of refinement at most.
        tolerance: Largest relative residual that is accepted.

    Raises:
        ShapeError: `a` and `rhs` do not fit together, or are not float64.
        SettingError: `max_rounds` is negative or `tolerance` not positive.

    Cost: n^3 / 3 multiplications in float32 and O(n^2 k) a round in float64; n^3 / 3 in float64 on top where it falls
    back. Memory: that of `a` once more, for its float32 copy and factor.
    """
    _check(a, rhs, max_rounds, tolerance)
    with torch.no_grad():
        chol = cholesky(a.float()).factor
        size = _norm(rhs)
        x, left = _solve(chol, rhs), rhs
        trace: list[Tensor] = []
        improving = torch.ones(a.shape[:-2], dtype=torch.bool, device=a.device)
        for done in range(max_rounds + 1):
            residual, left = _residual(a, x, rhs, size)
            if trace:
                # A round that does not even halve the residual will not get there.
                improving &= residual <= 0.5 * trace[-1]
            trace.append(residual)
            going = (residual > tolerance) & improving
            if done == max_rounds or not bool(going.any()):
                break
            step = _solve(chol, left)
            x = torch.where(going[..., None, None], x + step, x)
        residual = trace[-1]
        lost = ~(residual <= tolerance)
        if bool(lost.any()):
            x, residual = _fall_back(a, rhs, x, residual, lost)
    return RefinedSolve(x, len(trace) - 1, torch.stack(trace), residual, lost)


def _solve(chol: Tensor, rhs: Tensor) -> Tensor:
    """By the float32 factor, with columns scaled to norm 1 so that small residuals do not underflow."""
    scale = torch.linalg.vector_norm(rhs, dim=-2, keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.cholesky_solve((rhs / scale).to(chol.dtype), chol).to(rhs.dtype) * scale


def _norm(rhs: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rhs, dim=-2)


def _residual(a: Tensor, x: Tensor, rhs: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    left = rhs - a @ x
    relative = _norm(left) / torch.where(size > 0, size, torch.ones_like(size))
    return relative.amax(-1), left


def _fall_back(a: Tensor, rhs: Tensor, x: Tensor, residual: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    n, k = rhs.shape[-2:]
    rows = lost.reshape(-1).nonzero().squeeze(-1)
    matrices, targets = a.reshape(-1, n, n)[rows], rhs.reshape(-1, n, k)[rows]
    found = torch.cholesky_solve(targets, cholesky(matrices).factor)
    after, _ = _residual(matrices, found, targets, _norm(targets))
    solution = x.reshape(-1, n, k).index_copy(0, rows, found).reshape(x.shape)
    return solution, residual.reshape(-1).index_copy(0, rows, after).reshape(residual.shape)


def _check(a: Tensor, rhs: Tensor, max_rounds: int, tolerance: float) -> None:
    fits = a.ndim >= 2 and rhs.ndim == a.ndim and a.shape[-1] == a.shape[-2] and a.shape[:-1] == rhs.shape[:-1]
    if not fits or a.dtype != torch.float64 or rhs.dtype != torch.float64:
        fail(
            ShapeError,
            "ops.refined_solve",
            "a must be (*b, n, n) and rhs (*b, n, k), both float64.",
            got=f"a {tuple(a.shape)} {a.dtype}, rhs {tuple(rhs.shape)} {rhs.dtype}",
            fix="pass a.double() and y.double()[..., None] for one right-hand side",
        )
    if max_rounds < 0 or not tolerance > 0:
        fail(
            SettingError,
            "ops.refined_solve",
            "max_rounds must be at least 0 and tolerance above 0.",
            got=f"max_rounds {max_rounds}, tolerance {tolerance}",
            fix="pass e.g. max_rounds=5, tolerance=1e-10",
        )
