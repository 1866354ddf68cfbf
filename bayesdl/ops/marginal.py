r"""The log marginal likelihood of a Gaussian process with its closed-form gradient, in one pass over cache-sized tiles.

    log N(r | 0, A),    A = K + noise_variance I,    alpha = A^{-1} r
    d/dA = (alpha alpha' - A^{-1}) / 2

The matrix d/dA goes to the kernel's pullback as it stands; no graph is recorded and no n x n intermediate is stored
beyond those named here.

Reference: Rasmussen, Williams (2006), equations 5.8 and 5.9.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesdl.errors import ShapeError, fail
from bayesdl.ops.factor import cholesky
from bayesdl.ops.ragged import check_lengths, fill_rows, real_rows, uncouple

Params = dict[str, Tensor]
ValueAndPullback = Callable[[Tensor, Params], tuple[Tensor, Callable[[Tensor], Params]]]
Energy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Four n x n matrices per element are alive at once; together they should stay within a core's second-level cache.
_CPU_TILE_BYTES = 2**20
_GPU_TILE_BYTES = 2**30
_SMALL = 80


class Marginal(NamedTuple):
    """Log marginal likelihood and its gradient.

    Attributes:
        value: (*b) a sum over the data, not a mean; -inf where `failed`.
        params: Gradient with respect to each hyper-parameter of the kernel, in its shape.
        noise_variance: (*b) gradient.
        residual: (*b n) gradient, which is -alpha (2 h'(q) alpha with an `energy`); its negative sum is the gradient
            with respect to a constant mean.
        jitter: (*b) what was added to the diagonal; gradients count it as a constant.
        failed: (*b) bool; where True all gradients are 0.
        quadratic: (*b) q = r' A^{-1} r, NaN where `failed`.
    """

    value: Tensor
    params: Params
    noise_variance: Tensor
    residual: Tensor
    jitter: Tensor
    failed: Tensor
    quadratic: Tensor


def mll_and_grad(
    value_and_pullback: ValueAndPullback,
    x: Tensor,
    params: Params,
    residual: Tensor,
    noise_variance: Tensor,
    *,
    lengths: Tensor | None = None,
    energy: Energy | None = None,
    tile_bytes: int | None = None,
) -> Marginal:
    r"""log N(residual | 0, K + noise_variance I) of a batch of independent problems, with all gradients.

    The shape of `noise_variance` is the batch *b; there is no other broadcasting than that x may be shared.

    With an `energy` h in place of the Gaussian's h(q) = -q / 2, q = r' A^{-1} r, the same pass serves any density of r
    that depends on it through q alone, such as a scale mixture of Gaussians:

        value = h(q) - log|A| / 2 - n/2 log(2 pi),    d/dA = -h'(q) alpha alpha' - A^{-1} / 2,    d/dr = 2 h'(q) alpha

    Args:
        value_and_pullback: A kernel's method of that name: (x, params) -> (K, pullback).
        x: (n d) shared by all problems, or (*b n d).
        params: Each value has the batch axes *b in front, then its own shape.
        residual: (*b n) targets minus the prior mean.
        noise_variance: (*b).
        lengths: (*b) how many rows of each problem are real, 1 to n, where problems of different sizes are padded to
            one; None for all n. What the padding of x and residual holds does not matter.
        energy: (q, index) -> (h(q), h'(q)), both in the shape of q; None for the Gaussian. It is called once for each
            tile of problems, with `index` (int64, the shape of q) their places in the flattened batch, so that h may
            have parameters of its own; their gradients follow from `quadratic`, outside. A tile of one problem has no
            axis: q and index are then scalars.
        tile_bytes: How large the covariances that are worked on together may be, in bytes; None for a default that
            suits the device. The results do not depend on it beyond rounding.

    Raises:
        ShapeError: A leading axis differs from *b, or x and residual differ in n, or a length is not in 1..n.

    Cost: n^3 multiplications per problem (factor and inverse), plus the kernel's own O(n^2 d).
    """
    batch = noise_variance.shape
    _check(x, params, residual, batch)
    if lengths is not None:
        check_lengths("ops.mll_and_grad", lengths, batch, x.shape[-2])
    with torch.no_grad():
        index = None if energy is None else torch.arange(batch.numel(), device=x.device).reshape(batch)
        problem = _Problem(x, params, residual, noise_variance, lengths, index)
        if batch.numel() == 1:
            # A single problem goes without its batch axes, which saves more at small n than one would think.
            return _join([_tile(value_and_pullback, problem.flat(len(batch), ()), energy)], batch)
        total = batch.numel()
        problem = problem.flat(len(batch), (total,))
        step = _tile_size(x, x.shape[-2], total, tile_bytes)
        if x.device.type == "cpu":
            _keep_freed_pages()
        starts = range(0, max(total, 1), step)
        places = starts if step == 1 and total > 0 else [slice(start, start + step) for start in starts]
        return _join([_tile(value_and_pullback, problem.at(rows), energy) for rows in places], batch)


def marginal_log_likelihood(
    value_and_pullback: ValueAndPullback, x: Tensor, params: Params, residual: Tensor, noise_variance: Tensor
) -> Tensor:
    """The value of `mll_and_grad`, shape (*b), as a node of an autograd graph whose backward only scales.

    Differentiable once in params, residual and noise_variance; x counts as a constant. Arguments as there.
    """
    names = tuple(params)
    return _LogMarginal.apply(value_and_pullback, names, x, residual, noise_variance, *(params[name] for name in names))


class _LogMarginal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value_and_pullback: ValueAndPullback,
        names: tuple[str, ...],
        x: Tensor,
        residual: Tensor,
        noise_variance: Tensor,
        *values: Tensor,
    ) -> Tensor:
        result = mll_and_grad(value_and_pullback, x, dict(zip(names, values, strict=True)), residual, noise_variance)
        ctx.save_for_backward(result.residual, result.noise_variance, *(result.params[name] for name in names))
        return result.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        by_residual, by_noise, *by_params = ctx.saved_tensors
        scaled = [scale.reshape(scale.shape + (1,) * (by.ndim - scale.ndim)) * by for by in by_params]
        return None, None, None, scale.unsqueeze(-1) * by_residual, scale * by_noise, *scaled


class _Problem(NamedTuple):
    """One problem, or several along one leading axis."""

    x: Tensor
    params: Params
    residual: Tensor
    noise_variance: Tensor
    lengths: Tensor | None
    index: Tensor | None

    def flat(self, axes: int, lead: tuple[int, ...]) -> _Problem:
        """With `lead` in place of the first `axes` axes."""
        if axes == len(lead):
            return self

        def reshaped(value: Tensor) -> Tensor:
            return value.squeeze(0) if axes == 1 else value.reshape(lead + value.shape[axes:])

        return _Problem(
            self.x if self.x.ndim == 2 else reshaped(self.x),
            {name: reshaped(value) for name, value in self.params.items()},
            reshaped(self.residual),
            reshaped(self.noise_variance),
            None if self.lengths is None else reshaped(self.lengths),
            None if self.index is None else reshaped(self.index),
        )

    def at(self, rows: int | slice) -> _Problem:
        """One problem, or some."""
        return _Problem(
            self.x if self.x.ndim == 2 else self.x[rows],
            {name: value[rows] for name, value in self.params.items()},
            self.residual[rows],
            self.noise_variance[rows],
            None if self.lengths is None else self.lengths[rows],
            None if self.index is None else self.index[rows],
        )


class _Tile(NamedTuple):
    """The results of one tile; no jitter and no failures where the factorisation went through at once."""

    value: Tensor
    params: Params
    noise_variance: Tensor
    residual: Tensor
    quadratic: Tensor
    jitter: Tensor | None
    failed: Tensor | None


def _tile(value_and_pullback: ValueAndPullback, problem: _Problem, energy: Energy | None) -> _Tile:
    x, residual, real, n = problem.x, problem.residual, None, problem.x.shape[-2]
    if problem.lengths is not None:
        real = real_rows(problem.lengths, n)
        # Integer tensors times a Python float would come out in float32.
        x, residual, n = fill_rows(x, real), residual.masked_fill(~real, 0.0), problem.lengths.to(residual.dtype)
    k, pullback = value_and_pullback(x, problem.params)
    chol, jitter, failed, log_det = _factor(k, problem.noise_variance, real)
    alpha, inverse = _solve(chol, residual, _is_small(k))
    quadratic = torch.dot(residual, alpha) if alpha.ndim == 1 else torch.linalg.vecdot(residual, alpha)
    if energy is None or problem.index is None:
        value, right, by_residual = quadratic * -0.5, alpha, alpha.neg()
    else:
        value, slope = energy(quadratic, problem.index)
        by_residual = alpha * (2.0 * slope).unsqueeze(-1)
        right = by_residual.neg()
    value = torch.sub(value, log_det).sub_(n * (0.5 * math.log(2 * math.pi)))
    by_a = _by_a(inverse, alpha, right)
    if real is not None:
        by_a.diagonal(dim1=-2, dim2=-1).masked_fill_(~real, 0.0)
    by_noise = by_a.trace() if by_a.ndim == 2 else by_a.diagonal(dim1=-2, dim2=-1).sum(-1)
    result = _Tile(value, pullback(by_a), by_noise, by_residual, quadratic, jitter, failed)
    return result if failed is None else _without_failed(result, failed)


def _factor(
    k: Tensor, noise_variance: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Factor of K with noise on its diagonal, jitter and failures where there are any, half the log determinant.

    The factor is the lower one, or where `_is_small` the upper, which takes fewer passes over what lies row by row.
    """
    a = k
    if real is not None:
        a = uncouple(k, real)
    # The pullback reads K, so the noise is on its diagonal only while it is being factored.
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    without_noise = diagonal.clone()
    diagonal.add_(noise_variance if noise_variance.ndim == 0 else noise_variance.unsqueeze(-1))
    if real is not None:
        diagonal.masked_fill_(~real, 1.0)
    jitter = failed = None
    upper = _is_small(k)
    chol, info = torch.linalg.cholesky_ex(a, upper=upper)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if info.ndim == 0:
        clean = info.item() == 0 and math.isfinite(log_det.item())
    else:
        clean = math.isfinite(log_det.masked_fill(info != 0, torch.nan).sum().item())
    if not clean:
        lower, jitter, failed = cholesky(a)
        chol = lower.mT if upper else lower
        log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    diagonal.copy_(without_noise)
    return chol, jitter, failed, log_det


def _is_small(k: Tensor) -> bool:
    """Whether the calls that LAPACK would save by symmetry cost more than the arithmetic that they save."""
    return k.shape[-1] <= _SMALL and k.device.type == "cpu"


def _solve(chol: Tensor, residual: Tensor, small: bool) -> tuple[Tensor, Tensor]:
    """A^{-1} residual (*b n), and A^{-1} (*b n n) lying row by row; where small, in place of the factor.

    Writing over what is no longer needed spares a batch the page faults of new memory, nearly a tenth of its time.
    """
    if not small:
        # The factor and the inverse lie column by column; the transpose of the symmetric inverse lies row by row.
        return torch.cholesky_solve(residual.unsqueeze(-1), chol).squeeze(-1), torch.cholesky_inverse(chol).mT
    # Solved in place, in the identity lying column by column as the factor does.
    root = torch.zeros_like(chol.mT).mT
    root.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    torch.linalg.solve_triangular(chol, root, upper=True, out=root)
    if chol.ndim == 2:
        inverse = torch.mm(root, root.mT, out=chol.mT)
        return torch.mv(inverse, residual), inverse
    inverse = torch.bmm(root, root.mT, out=chol.mT)
    return torch.bmm(inverse, residual.unsqueeze(-1)).squeeze(-1), inverse


def _by_a(inverse: Tensor, alpha: Tensor, right: Tensor) -> Tensor:
    """(alpha right' - A^{-1}) / 2, (*b n n), in place of A^{-1}."""
    if inverse.ndim == 2:
        return inverse.addr_(alpha, right, beta=-0.5, alpha=0.5)
    return inverse.baddbmm_(alpha.unsqueeze(-1), right.unsqueeze(-2), beta=-0.5, alpha=0.5)


def _without_failed(result: _Tile, failed: Tensor) -> _Tile:
    clean = {
        name: grad.masked_fill(failed.reshape(failed.shape + (1,) * (grad.ndim - failed.ndim)), 0.0)
        for name, grad in result.params.items()
    }
    return _Tile(
        result.value.masked_fill(failed, -torch.inf),
        clean,
        result.noise_variance.masked_fill(failed, 0.0),
        result.residual.masked_fill(failed.unsqueeze(-1), 0.0),
        result.quadratic.masked_fill(failed, torch.nan),
        result.jitter,
        failed,
    )


def _tile_size(x: Tensor, n: int, total: int, tile_bytes: int | None) -> int:
    """Problems to a tile: as many as fit, spread evenly over the tiles."""
    if tile_bytes is None:
        tile_bytes = _CPU_TILE_BYTES if x.device.type == "cpu" else _GPU_TILE_BYTES
    most = max(1, tile_bytes // max(1, n * n * x.element_size()))
    return max(1, math.ceil(total / math.ceil(max(total, 1) / most)))


@functools.cache
def _keep_freed_pages() -> None:
    """Once, reserve and free as much memory as several tiles take, without touching it.

    The C library of Linux hands freed memory back to the system when it is more than twice the largest block freed so
    far, and fresh pages at every tile are up to a third of the time of a batch of small problems. Other allocators are
    not affected.
    """
    torch.empty(16 * _CPU_TILE_BYTES, dtype=torch.uint8)


def _join(tiles: list[_Tile], batch: torch.Size) -> Marginal:
    """The tiles one after another, in the shape of the batch."""
    tile = tiles[0] if len(tiles) == 1 else _concatenated(tiles)
    axes = tile.value.ndim

    def shaped(value: Tensor) -> Tensor:
        if axes == len(batch):
            return value
        return value.unsqueeze(0) if batch == (1,) else value.reshape(batch + value.shape[axes:])

    value = shaped(tile.value)
    return Marginal(
        value,
        {name: shaped(grad) for name, grad in tile.params.items()},
        shaped(tile.noise_variance),
        shaped(tile.residual),
        torch.zeros_like(value) if tile.jitter is None else shaped(tile.jitter),
        torch.zeros_like(value, dtype=torch.bool) if tile.failed is None else shaped(tile.failed),
        shaped(tile.quadratic),
    )


def _concatenated(tiles: list[_Tile]) -> _Tile:
    axes = tiles[0].value.ndim

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts) if axes == 0 else torch.cat(parts)

    jitter = failed = None
    if any(tile.failed is not None for tile in tiles):
        jitter = joined([torch.zeros_like(t.value) if t.jitter is None else t.jitter for t in tiles])
        failed = joined([torch.zeros_like(t.value).bool() if t.failed is None else t.failed for t in tiles])
    return _Tile(
        joined([tile.value for tile in tiles]),
        {name: joined([tile.params[name] for tile in tiles]) for name in tiles[0].params},
        joined([tile.noise_variance for tile in tiles]),
        joined([tile.residual for tile in tiles]),
        joined([tile.quadratic for tile in tiles]),
        jitter,
        failed,
    )


def _check(x: Tensor, params: Params, residual: Tensor, batch: torch.Size) -> None:
    axes = len(batch)
    fits = residual.shape[:-1] == batch and (x.ndim == 2 or x.shape[:-2] == batch) and x.shape[-2] == residual.shape[-1]
    if fits and all(value.shape[:axes] == batch for value in params.values()):
        return
    fail(
        ShapeError,
        "ops.mll_and_grad",
        f"with noise_variance {tuple(batch)}: residual {(*batch, 'n')}, x ('n', 'd') or {(*batch, 'n', 'd')}, and "
        f"every parameter {tuple(batch)} in front.",
        got=f"x {tuple(x.shape)}, residual {tuple(residual.shape)}, "
        + ", ".join(f"{name} {tuple(value.shape)}" for name, value in params.items()),
        fix="expand the shared tensors to the batch first",
    )
