"""Covariances with structure, as operators of linear_operator: products over a grid, stationary on a regular line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from linear_operator.operators import (
    DenseLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    ToeplitzLinearOperator,
)
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import DataError, SettingError, ShapeError, fail
from bayesdl.kernels.base import Kernel, Params


def kronecker(
    kernels: Sequence[Kernel], grids: Sequence[Tensor], params: Sequence[Params | None] | None = None
) -> LinearOperator:
    r"""Covariance on a grid of a kernel that is a product over the axes of the grid.

        k(x, z) = prod_i k_i(x_i, z_i),        K = K_1 (x) K_2 (x) ...

    Rows run through the grid with its last axis fastest, as in `torch.cartesian_prod(*grids)`. Add noise with
    `operator.add_diagonal(noise_variance)`: solves and log-determinants still go by the eigenvalues of the factors.

    Args:
        kernels: One kernel for each axis, of the columns of that axis.
        grids: The points of each axis, (n_i,) or (n_i, d_i); a regular line is recognised by no one: see `toeplitz`.
        params: Hyper-parameters for each axis; None for initial values.

    Raises:
        ShapeError: Another number of kernels than grids, or a grid of another shape.

    Cost: O(sum n_i^2) memory in place of O(prod n_i^2); a solve takes O(sum n_i^3 + prod n_i sum n_i).

    Reference: Saatci (2011), "Scalable inference for structured Gaussian process models", chapter 5.
    """
    if len(kernels) != len(grids) or len(kernels) == 0 or (params is not None and len(params) != len(grids)):
        got = f"{len(kernels)} kernels, {len(grids)} grids"
        fail(ShapeError, "kronecker", "kernels and grids must come in pairs.", got=got, fix="one kernel for each axis")
    own = [None] * len(grids) if params is None else list(params)
    points = [_points("kronecker", grid) for grid in grids]
    factors = [kernel(x, None, values) for kernel, x, values in zip(kernels, points, own, strict=True)]
    return KroneckerProductLinearOperator(*(DenseLinearOperator(factor) for factor in factors))


def toeplitz(kernel: Kernel, grid: Tensor, params: Params | None = None) -> LinearOperator:
    r"""Covariance of a stationary kernel on a regular line, K_ij = c_{|i - j|}, kept as its first column.

    Args:
        kernel: A kernel that depends on x - z alone.
        grid: (n,) or (n, 1), evenly spaced.
        params: Hyper-parameters, or None for the initial ones.

    Raises:
        DataError: The points are not evenly spaced.
        SettingError: The covariance varies along a diagonal: the kernel is not stationary.

    Cost: O(n) memory, O(n log n) for a product with a vector.
    """
    x = _points("toeplitz", grid)
    if x.shape[-1] != 1:
        fail(ShapeError, "toeplitz", "grid must lie on a line.", got=_checks.describe(grid), fix="use kronecker")
    if x.shape[0] > 1:
        steps = x[1:, 0] - x[:-1, 0]
        size = float(steps.abs().max())
        spread = float((steps - steps.mean()).abs().max())
        # coordinates themselves are rounded, which a grid far from 0 shows in its steps
        allowed = 1e-6 * size + 4 * torch.finfo(x.dtype).eps * float(x.abs().max())
        if spread > allowed or size == 0:
            got = f"steps that differ by up to {spread:.1e}"
            fix = "torch.linspace(low, high, n, dtype=torch.float64)"
            fail(DataError, "toeplitz", "grid must be evenly spaced.", got=got, fix=fix)
    column = kernel(x[:1], x, params).squeeze(-2)
    other = kernel(x[-1:], x.flip(0), params).squeeze(-2)
    variance = kernel.diagonal(x, params)
    scale = float(variance.detach().abs().max())
    off = max(float((column - other).detach().abs().max()), float((variance - variance[:1]).detach().abs().max()))
    if off > 1e-6 * scale:
        got = f"entries that differ by up to {off:.1e} along a diagonal"
        fix = "use a stationary kernel, or kernel(x) as a dense matrix"
        fail(SettingError, "toeplitz", "kernel must be stationary.", got=got, fix=fix)
    return ToeplitzLinearOperator(torch.cat([variance[:1], column[1:]]))


def as_linear_operator(kernel: Kernel, x: Tensor, params: Params | None = None) -> LinearOperator:
    """k(x, x) (*b n n) as an operator of linear_operator, for its solves, log-determinants and sums with structure."""
    return DenseLinearOperator(kernel(x, None, params))


def _points(where: str, grid: Tensor) -> Tensor:
    grid = _checks.as_tensor(where, "grid", grid)
    if grid.ndim not in (1, 2) or grid.shape[0] == 0:
        fix = "one tensor of points for each axis"
        fail(ShapeError, where, "a grid must have shape (n,) or (n, d).", got=_checks.describe(grid), fix=fix)
    return grid.unsqueeze(-1) if grid.ndim == 1 else grid
