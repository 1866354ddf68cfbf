r"""Preconditioned conjugate gradients for many right-hand sides at once, each with its own step and its own end.

    A X = B,    stop column c where |b_c - A x_c| <= tolerance |b_c|

Columns that are done leave the iteration, so that products get narrower. The residual that is reported is computed anew
from the solution in the end, never taken from the recursion; where the recursion has drifted, or where the products of
the iteration are of low precision, the iteration starts again on the true residual (iterative refinement).

Reference: Golub, Van Loan (2013), "Matrix computations", algorithm 11.5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail

Linear = Callable[[Tensor], Tensor]

_MAX_ROUNDS = 12
_COARSE_REDUCTION = 1e-5  # what an iteration with products of low precision is asked for before the residual is renewed


class CGResult(NamedTuple):
    """Solution of A X = B, and how good it is.

    Attributes:
        solution: (*b n t).
        residual: (*b t) |b - A x| / |b| with the true residual; 0 where b is 0.
        iterations: (*b t) steps that each column took.
        converged: (*b t) bool, whether the true residual met the tolerance.
        remainder: (*b n t) b - A x itself, from a product with A.
        products: Products with A or its coarse stand-in, however many columns each had.
    """

    solution: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    remainder: Tensor
    products: int


def pcg(
    product: Linear,
    b: Tensor,
    *,
    precondition: Linear | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    start: Tensor | None = None,
    coarse: Linear | None = None,
) -> CGResult:
    """Solve A X = B for symmetric positive definite A; an unconverged column comes back marked, never silently.

    Args:
        product: V -> A V for V (*b n k) with any number k of columns.
        b: (*b n t) right-hand sides.
        precondition: V -> P^{-1} V with P close to A; None for none.
        tolerance: Relative residual at which a column is done.
        max_iterations: Steps of a column at most, over all rounds.
        start: (*b n t) where to start, such as the solution of a nearby problem; None for 0.
        coarse: A cheap stand-in for `product`, such as one in float32. Steps then use it, and `product` gives the true
            residual between rounds; where a round with it gains less than half, `product` takes over.

    Raises:
        ShapeError: `start` is not of the shape of `b`.

    Cost: a product and O(n t) for each step; five times the memory of b.
    """
    if b.ndim < 2 or (start is not None and start.shape != b.shape):
        got = f"b {tuple(b.shape)}, start {None if start is None else tuple(start.shape)}"
        fail(ShapeError, "ops.pcg", "b and start must have shape (*b, n, t).", got=got, fix="pass columns: b[:, None]")
    norm = b.norm(dim=-2)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - product(x)
    products = int(start is not None)
    relative = r.norm(dim=-2) / scale
    iterations = torch.zeros(norm.shape, dtype=torch.int64, device=b.device)
    for _ in range(_MAX_ROUNDS):
        unfinished = ~(relative <= tolerance) & (iterations < max_iterations)
        todo = unfinished.reshape(-1, b.shape[-1]).any(0).nonzero().squeeze(-1)
        if todo.numel() == 0:
            break
        target = 0.9 * tolerance * scale[..., todo]
        if coarse is not None:
            target = torch.maximum(target, _COARSE_REDUCTION * r[..., todo].norm(dim=-2))
        room = max_iterations - int(iterations[..., todo].max())
        step, used, count = _iterate(coarse or product, r[..., todo], precondition, target, max(room, 1))
        candidate = x[..., todo] + step
        renewed = b[..., todo] - product(candidate)
        products += count + 1
        now = renewed.norm(dim=-2) / scale[..., todo]
        iterations[..., todo] += used
        before = relative[..., todo]
        better = now < before
        x[..., todo] = torch.where(better.unsqueeze(-2), candidate, x[..., todo])
        r[..., todo] = torch.where(better.unsqueeze(-2), renewed, r[..., todo])
        relative[..., todo] = torch.where(better, now, before)
        gained = bool((now <= torch.maximum(0.5 * before, before.new_tensor(tolerance))).all())
        if not gained and coarse is None:
            break  # rounding, not the number of steps, is what stands in the way
        coarse = coarse if gained else None
    return CGResult(x, relative, iterations, relative <= tolerance, r, products)


def _iterate(
    product: Linear, b: Tensor, precondition: Linear | None, target: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Steps from 0 until the recursive residual of each column is at most `target`: (X, steps, products)."""
    solution = torch.zeros_like(b)
    steps = torch.zeros(target.shape, dtype=torch.int64, device=b.device)
    active = torch.arange(b.shape[-1], device=b.device)
    x, r = torch.zeros_like(b), b.clone()
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), (r * z).sum(-2)
    running = r.norm(dim=-2) > target
    products = 0
    for _ in range(max_iterations):
        ap = product(p)
        products += 1
        curvature = (p * ap).sum(-2)
        # Without positive curvature the column has met the limits of precision; it stays where it is.
        running = running & (curvature > 0) & (rz > 0)
        alpha = torch.where(running, rz / curvature, torch.zeros_like(rz)).unsqueeze(-2)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, ap, value=-1.0)
        steps[..., active] += running
        running = running & (r.norm(dim=-2) > target)
        keep = running.reshape(-1, running.shape[-1]).any(0)
        if not bool(keep.all()):
            solution[..., active[~keep]] = x[..., ~keep]
            active = active[keep]
            x, r, p, rz, running, target = (part[..., keep] for part in (x, r, p, rz, running, target))
        if active.numel() == 0:
            break
        z = r if precondition is None else precondition(r)
        previous, rz = rz, (r * z).sum(-2)
        beta = torch.where(running, rz / previous, torch.zeros_like(rz)).unsqueeze(-2)
        p = z + beta * p
    if active.numel() > 0:
        solution[..., active] = x
    return solution, steps, products
