r"""Bijections from R^m to the support of a site, with their log Jacobians.

torch and Pyro register one for most supports. For Cholesky factors and covariance matrices theirs start from full n x n
matrices, whose upper half does nothing, and know no Jacobian. Those here start from n (n + 1) / 2 numbers:

    L_ii = exp(u_ii), L_ij = u_ij (i > j),   log |dL / du| = sum_i u_ii
    S = L L',                                log |dS / du| = n log 2 + sum_i (n - i + 1) u_ii,   i = 1 … n
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, Transform


def bijection(support: Any) -> Transform:
    """The transform from unconstrained numbers onto `support`. Raises NotImplementedError where there is none."""
    base, extra = support, 0
    while isinstance(base, constraints.independent):
        base, extra = base.base_constraint, extra + base.reinterpreted_batch_ndims
    if base is constraints.lower_cholesky:
        inner: Transform = LowerCholesky()
    elif base is constraints.positive_definite:
        inner = PositiveDefinite()
    else:
        return biject_to(support)
    return IndependentTransform(inner, extra) if extra else inner


class LowerCholesky(Transform):
    """Vectors (*b, n (n + 1) / 2), row by row, to lower triangular matrices (*b, n, n) with a positive diagonal."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    __hash__ = Transform.__hash__

    def _call(self, u: Tensor) -> Tensor:
        full = _as_matrix(u)
        return full.tril(-1) + torch.diag_embed(full.diagonal(dim1=-2, dim2=-1).exp())

    def _inverse(self, chol: Tensor) -> Tensor:
        n = chol.shape[-1]
        full = chol.tril(-1) + torch.diag_embed(chol.diagonal(dim1=-2, dim2=-1).log())
        rows, columns = torch.tril_indices(n, n, device=chol.device)
        return full[..., rows, columns]

    def log_abs_det_jacobian(self, u: Tensor, chol: Tensor) -> Tensor:
        """log |dL / du|, (*b)."""
        return _as_matrix(u).diagonal(dim1=-2, dim2=-1).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of a value from that of the unconstrained numbers."""
        n = _side(shape[-1])
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the unconstrained numbers from that of a value."""
        n = shape[-1]
        return torch.Size((*shape[:-2], n * (n + 1) // 2))


class PositiveDefinite(Transform):
    """Vectors (*b, n (n + 1) / 2) to symmetric positive definite matrices (*b, n, n), through their Cholesky factor.

    The Jacobian is that of the lower triangle of the matrix, which is what densities of matrices refer to.
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True
    _factor = LowerCholesky()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    __hash__ = Transform.__hash__

    def _call(self, u: Tensor) -> Tensor:
        chol = self._factor(u)
        return chol @ chol.mT

    def _inverse(self, value: Tensor) -> Tensor:
        return self._factor.inv(torch.linalg.cholesky(value))

    def log_abs_det_jacobian(self, u: Tensor, value: Tensor) -> Tensor:
        """log |dS / du|, (*b)."""
        logs = _as_matrix(u).diagonal(dim1=-2, dim2=-1)
        n = logs.shape[-1]
        powers = torch.arange(n + 1, 1, -1, dtype=u.dtype, device=u.device)
        return n * math.log(2) + (logs * powers).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of a value from that of the unconstrained numbers."""
        return self._factor.forward_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the unconstrained numbers from that of a value."""
        return self._factor.inverse_shape(shape)


def _side(count: int) -> int:
    return (math.isqrt(8 * count + 1) - 1) // 2


def _as_matrix(u: Tensor) -> Tensor:
    """u (*b, n (n + 1) / 2) as the lower triangle of (*b, n, n), row by row; what stands above it has no meaning."""
    n = _side(u.shape[-1])
    rows = torch.arange(n, device=u.device).unsqueeze(-1)
    columns = torch.arange(n, device=u.device)
    return u[..., rows * (rows + 1) // 2 + torch.minimum(columns, rows)]
