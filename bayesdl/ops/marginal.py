r"""The log marginal likelihood of a Gaussian process with its closed-form gradient, in one pass over cache-sized tiles.

    log N(r | 0, A),    A = K + noise_variance I,    alpha = A^{-1} r
    d/dA = (alpha alpha' - A^{-1}) / 2

The matrix d/dA goes to the kernel's pullback as it stands; no graph is recorded and no n x n intermediate is stored
beyond those named here.

Reference: Rasmussen, Williams (2006), equations 5.8 and 5.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesdl.errors import ShapeError, fail
from bayesdl.ops.factor import factor_or_retry

Params = dict[str, Tensor]
ValueAndPullback = Callable[[Tensor, Params], tuple[Tensor, Callable[[Tensor], Params]]]

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
        residual: (*b n) gradient, which is -alpha; its negative sum is the gradient with respect to a constant mean.
        jitter: (*b) what was added to the diagonal; gradients count it as a constant.
        failed: (*b) bool; where True all gradients are 0.
    """

    value: Tensor
    params: Params
    noise_variance: Tensor
    residual: Tensor
    jitter: Tensor
    failed: Tensor


def mll_and_grad(
    value_and_pullback: ValueAndPullback,
    x: Tensor,
    params: Params,
    residual: Tensor,
    noise_variance: Tensor,
    *,
    tile_bytes: int | None = None,
) -> Marginal:
    """log N(residual | 0, K + noise_variance I) of a batch of independent problems, with all gradients.

    The shape of `noise_variance` is the batch *b; there is no other broadcasting than that x may be shared.

    Args:
        value_and_pullback: A kernel's method of that name: (x, params) -> (K, pullback).
        x: (n d) shared by all problems, or (*b n d).
        params: Each value has the batch axes *b in front, then its own shape.
        residual: (*b n) targets minus the prior mean.
        noise_variance: (*b).
        tile_bytes: How large the covariances that are worked on together may be, in bytes; None for a default that
            suits the device. The results do not depend on it beyond rounding.

    Raises:
        ShapeError: A leading axis differs from *b, or x and residual differ in n.

    Cost: n^3 multiplications per problem (factor and inverse), plus the kernel's own O(n^2 d).
    """
    batch = noise_variance.shape
    _check(x, params, residual, batch)
    with torch.no_grad():
        if len(batch) == 0:
            return _tile(value_and_pullback, x, params, residual, noise_variance)
        total, n = math.prod(batch), x.shape[-2]
        step = _tile_size(x, n, total, tile_bytes)
        flat_x = None if x.ndim == 2 else x.reshape(total, *x.shape[-2:])
        flat_params = {name: value.reshape(total, *value.shape[len(batch) :]) for name, value in params.items()}
        flat_residual, flat_noise = residual.reshape(total, n), noise_variance.reshape(total)
        tiles = []
        for start in range(0, max(total, 1), step):
            # A tile of one goes without its batch axis, which saves more at small n than one would think.
            rows = start if step == 1 and total > 0 else slice(start, start + step)
            tile_x = x if flat_x is None else flat_x[rows]
            tile_params = {name: value[rows] for name, value in flat_params.items()}
            tiles.append(_tile(value_and_pullback, tile_x, tile_params, flat_residual[rows], flat_noise[rows]))
        return _join(tiles, batch)


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


def _tile(
    value_and_pullback: ValueAndPullback, x: Tensor, params: Params, residual: Tensor, noise_variance: Tensor
) -> Marginal:
    k, pullback = value_and_pullback(x, params)
    n = k.shape[-1]
    # The pullback reads K, so the noise is on its diagonal only while it is being factored.
    diagonal = k.diagonal(dim1=-2, dim2=-1)
    without_noise = diagonal.clone()
    diagonal.add_(noise_variance.unsqueeze(-1))
    (chol, jitter, failed), clean = factor_or_retry(k)
    diagonal.copy_(without_noise)
    alpha, inverse = _solve_and_invert(chol, residual.unsqueeze(-1))
    column = alpha.squeeze(-1)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = (residual * column).sum(-1).mul_(-0.5).sub_(log_det).sub_(0.5 * n * math.log(2 * math.pi))
    if inverse.ndim == 2:
        by_a = inverse.addmm_(alpha, alpha.mT, beta=-0.5, alpha=0.5)
    else:
        by_a = inverse.baddbmm_(alpha, alpha.mT, beta=-0.5, alpha=0.5)
    by_noise = by_a.diagonal(dim1=-2, dim2=-1).sum(-1)
    grads = pullback(by_a)
    result = Marginal(value, grads, by_noise, column.neg(), jitter, failed)
    return result if clean else _without_failed(result)


def _solve_and_invert(chol: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """A^{-1} residual (*b n 1) and A^{-1} (*b n n), lying row by row."""
    n = chol.shape[-1]
    if chol.ndim > 2 and n <= _SMALL and chol.device.type == "cpu":
        # LAPACK is called matrix by matrix, which at this size costs more than the arithmetic that it saves.
        eye = torch.eye(n, dtype=chol.dtype, device=chol.device).expand_as(chol)
        root = torch.linalg.solve_triangular(chol, eye, upper=False)
        return root.mT @ (root @ residual), root.mT @ root
    # The factor and the inverse lie column by column; the transpose of the symmetric inverse lies row by row.
    return torch.cholesky_solve(residual, chol), torch.cholesky_inverse(chol).mT


def _without_failed(result: Marginal) -> Marginal:
    failed = result.failed
    clean = {
        name: grad.masked_fill(failed.reshape(failed.shape + (1,) * (grad.ndim - failed.ndim)), 0.0)
        for name, grad in result.params.items()
    }
    return Marginal(
        result.value.masked_fill(failed, -torch.inf),
        clean,
        result.noise_variance.masked_fill(failed, 0.0),
        result.residual.masked_fill(failed.unsqueeze(-1), 0.0),
        result.jitter,
        failed,
    )


def _tile_size(x: Tensor, n: int, total: int, tile_bytes: int | None) -> int:
    """Problems to a tile: as many as fit, spread evenly over the tiles."""
    if tile_bytes is None:
        tile_bytes = _CPU_TILE_BYTES if x.device.type == "cpu" else _GPU_TILE_BYTES
    most = max(1, tile_bytes // max(1, n * n * x.element_size()))
    return max(1, math.ceil(total / math.ceil(max(total, 1) / most)))


def _join(tiles: list[Marginal], batch: torch.Size) -> Marginal:
    """The tiles one after another, in the shape of the batch."""

    def joined(parts: list[Tensor], num_event: int) -> Tensor:
        event = parts[0].shape[parts[0].ndim - num_event :]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1, *event) for part in parts])
        return whole.reshape(*batch, *event)

    single = tiles[0].value.ndim
    params = {
        name: joined([tile.params[name] for tile in tiles], grad.ndim - single)
        for name, grad in tiles[0].params.items()
    }
    value, noise, jitter, failed = (joined([tile[i] for tile in tiles], 0) for i in (0, 2, 4, 5))
    return Marginal(value, params, noise, joined([tile.residual for tile in tiles], 1), jitter, failed)


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
