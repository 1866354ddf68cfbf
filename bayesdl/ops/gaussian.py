r"""Gaussian conditioning on noisy values: one Cholesky factor, kept in the open, from which everything else follows.

    y = f(x) + e,  e ~ N(0, noise_variance),    L L' = K_xx + noise_variance I,    alpha = (L L')^{-1} residual

`residual` is y minus the prior mean; every mean that is returned here is relative to the prior mean likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail
from bayesdl.ops.factor import cholesky
from bayesdl.ops.ragged import check_lengths, real_rows, uncouple


class GPState(NamedTuple):
    """What a posterior needs to know of the data.

    Attributes:
        x: (*b n d) inputs.
        residual: (*b n) targets minus the prior mean.
        noise_variance: (*b).
        chol: (*b n n) lower factor of K_xx + noise_variance I + jitter I; NaN where no jitter sufficed.
        alpha: (*b n) the covariance of the targets, inverted and applied to the residual.
        jitter: (*b) what was added to the diagonal, NaN where no jitter sufficed.
    """

    x: Tensor
    residual: Tensor
    noise_variance: Tensor
    chol: Tensor
    alpha: Tensor
    jitter: Tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> GPState:
        """A state that was kept, from its tensors by `prefix` and name.

        Its factor is laid out by columns, as a fresh one is: read row by row, some processors would solve with it with
        other roundings.
        """
        kept = {name: tensors[prefix + name] for name in cls._fields}
        return cls(**kept | {"chol": kept["chol"].mT.contiguous().mT})


def condition(
    k_xx: Tensor, x: Tensor, residual: Tensor, noise_variance: Tensor, *, lengths: Tensor | None = None
) -> GPState:
    """Factor the covariance of the targets once.

    Args:
        k_xx: (*b n n) prior covariance of f at x, without noise.
        x: (*b n d), kept for later use only.
        residual: (*b n).
        noise_variance: (*b).
        lengths: (*b) how many rows of each element are real, where sets of different sizes are padded to one; None for
            all. The padding then has alpha 0 and a factor of its own, the identity; what it held does not matter, as
            long as k_xx between the real rows is right (kernels centre on all rows: let it be finite and near them).

    An element that no jitter makes positive definite comes back with NaN in `chol`, `alpha` and `jitter`.

    Raises:
        ShapeError: The sizes of k_xx, x and residual differ, or a length is not in 1..n.

    Cost: n^3 / 3 multiplications per batch element.
    """
    n = k_xx.shape[-1]
    if x.shape[-2] != n or residual.shape[-1] != n or k_xx.shape[-2] != n:
        fail(
            ShapeError,
            "ops.condition",
            "k_xx (*b, n, n), x (*b, n, d) and residual (*b, n) must agree in n.",
            got=f"k_xx {tuple(k_xx.shape)}, x {tuple(x.shape)}, residual {tuple(residual.shape)}",
            fix="pass the covariance of these inputs and one residual for each",
        )
    if lengths is None:
        a = add_diagonal(k_xx, noise_variance)
    else:
        check_lengths("ops.condition", lengths, noise_variance.shape, n)
        real = real_rows(lengths, n)
        residual = residual.masked_fill(~real, 0.0)
        on_diagonal = torch.where(real, noise_variance.unsqueeze(-1), torch.ones_like(residual))
        a = uncouple(k_xx, real) + torch.diag_embed(on_diagonal)
    chol, jitter, _ = cholesky(a)
    return GPState(x, residual, noise_variance, chol, solve(chol, residual), jitter)


def marginal_moments(
    state: GPState, k_xs: Tensor, k_ss_diagonal: Tensor, *, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Posterior mean and variance of f at each test point, both (*b s), without noise.

    Args:
        state: The state.
        k_xs: (*b n s) prior covariance between data and test points.
        k_ss_diagonal: (*b s) prior variances at the test points.
        lengths: (*b) as in `condition`.

    The variance is clamped at 0. Both are differentiable in k_xs and k_ss_diagonal.

    Cost: O(n^2 s).
    """
    k_xs = _without_padding(k_xs, lengths)
    half = solve_lower(state.chol, k_xs)
    mean = (k_xs.mT @ state.alpha.unsqueeze(-1)).squeeze(-1)
    return mean, (k_ss_diagonal - half.square().sum(-2)).clamp_min(0.0)


def joint_moments(
    state: GPState, k_xs: Tensor, k_ss: Tensor, *, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Posterior mean (*b s) and covariance (*b s s) of f at the test points together, without noise.

    Args:
        state: The state.
        k_xs: (*b n s) prior covariance between data and test points.
        k_ss: (*b s s) prior covariance of the test points.
        lengths: (*b) as in `condition`.

    Cost: O(n^2 s + n s^2).
    """
    k_xs = _without_padding(k_xs, lengths)
    half = solve_lower(state.chol, k_xs)
    mean = (k_xs.mT @ state.alpha.unsqueeze(-1)).squeeze(-1)
    return mean, k_ss - half.mT @ half


def leave_one_out(state: GPState) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of each target given all the others, both (*b n).

        mean_i = residual_i - alpha_i / (A^{-1})_ii,    variance_i = 1 / (A^{-1})_ii,    A = K_xx + noise_variance I

    The variance includes the noise: it is that of the target, not of f. Padding comes back with mean 0 and variance 1.

    Cost: n^3 / 3 multiplications.

    Reference: Rasmussen, Williams (2006), section 5.4.2.
    """
    eye = torch.eye(state.chol.shape[-1], dtype=state.chol.dtype, device=state.chol.device)
    precision = torch.linalg.solve_triangular(state.chol, eye, upper=False).square().sum(-2)
    return state.residual - state.alpha / precision, precision.reciprocal()


def log_marginal(state: GPState, *, lengths: Tensor | None = None) -> Tensor:
    """log N(residual | 0, K_xx + noise_variance I), shape (*b): a sum over the data, not a mean."""
    # Integer tensors times a Python float would come out in float32.
    n = state.residual.shape[-1] if lengths is None else lengths.to(state.residual.dtype)
    log_det = state.chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (state.residual * state.alpha).sum(-1) - log_det - 0.5 * n * math.log(2 * math.pi)


def _without_padding(k_xs: Tensor, lengths: Tensor | None) -> Tensor:
    return k_xs if lengths is None else k_xs.masked_fill(~real_rows(lengths, k_xs.shape[-2]).unsqueeze(-1), 0.0)


def add_diagonal(k: Tensor, value: Tensor) -> Tensor:
    """k + value I, for k (*b n n) and value (*b), out of place."""
    n = k.shape[-1]
    return k + torch.diag_embed(value.unsqueeze(-1).expand(*value.shape, n))


def solve_lower(chol: Tensor, rhs: Tensor) -> Tensor:
    """L^{-1} rhs for chol (*b n n) and rhs (*c n s), where *c may have axes in front of *b.

    Axes that the factor lacks are laid beside the columns, so that it is never copied along them.
    """
    extra = rhs.ndim - chol.ndim
    if extra <= 0 or rhs.shape[extra:-2] != chol.shape[:-2]:
        return torch.linalg.solve_triangular(chol, rhs, upper=False)
    lead, s = rhs.shape[:extra], rhs.shape[-1]
    wide = rhs.flatten(0, extra - 1).movedim(0, -2).flatten(-2)
    out = torch.linalg.solve_triangular(chol, wide, upper=False)
    return out.unflatten(-1, (math.prod(lead), s)).movedim(-2, 0).unflatten(0, lead)


def solve(chol: Tensor, rhs: Tensor) -> Tensor:
    """(L L')^{-1} rhs for chol (*b n n) and vectors rhs (*c n), where *c may have axes in front of *b."""
    half = solve_lower(chol, rhs.unsqueeze(-1))
    extra = half.ndim - chol.ndim
    if extra <= 0 or half.shape[extra:-2] != chol.shape[:-2]:
        return torch.linalg.solve_triangular(chol.mT, half, upper=True).squeeze(-1)
    wide = half.squeeze(-1).flatten(0, extra - 1).movedim(0, -1)
    out = torch.linalg.solve_triangular(chol.mT, wide, upper=True)
    return out.movedim(-1, 0).unflatten(0, half.shape[:extra])
