r"""Data that come and go: a factor that is extended, shortened or bordered instead of formed anew.

    append     [[L, 0], [S', M]],    S = L^{-1} K_xn,    M M' = K_nn + noise_variance I - S' S
    downdate   taking out row i leaves the block below it with L_33 L_33' + l l', a rank-one update
    fantasize  the border (S, M) beside the old factor, which all candidates and all their samples then share

The update of a factor by v v', with w = L^{-1} v and t_k = 1 + w_1^2 + ... + w_k^2, is

    L C,    C_kk = sqrt(t_k / t_{k-1}),    C_ik = w_i w_k / sqrt(t_k t_{k-1})  (i > k),

whose product with L needs no more than a cumulative sum along its rows. t_k grows, so nothing cancels.

Reference: Gill, Golub, Murray, Saunders (1974), "Methods for modifying matrix factorizations", method C1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail
from bayesdl.ops.factor import cholesky
from bayesdl.ops.gaussian import GPState, add_diagonal, solve, solve_lower

# Rank-one updates are memory-bound passes; where they would take out more than this share, a product is cheaper.
_FEW = 1 / 16


class Fantasy(NamedTuple):
    """A state with q more values for each of many candidates, whose old factor nobody copies.

    Attributes:
        state: The state before.
        cross: (*c n q) L^{-1} K_xn.
        corner: (*c q q) lower factor M of the new values' covariance given the old ones.
        innovation: (*s *c q) M^{-1} (residual_new - K_nx alpha): what each sample tells that was not known.
    """

    state: GPState
    cross: Tensor
    corner: Tensor
    innovation: Tensor


def append(state: GPState, k_xn: Tensor, k_nn: Tensor, x_new: Tensor, residual_new: Tensor) -> GPState:
    """The state after q more values, by extending the factor instead of forming it anew.

    Args:
        state: The state so far.
        k_xn: (*b n q) prior covariance between the old and the new inputs.
        k_nn: (*b q q) prior covariance of the new ones, without noise.
        x_new: (*b q d).
        residual_new: (*b q).

    Leading axes in front of those of the state (candidates, samples) are allowed in every argument. The factor has
    those of k_xn and k_nn only, so samples of the targets share it.

    Cost: O(n^2 q + q^3), where `condition` would take O((n + q)^3); memory of one factor for each candidate.
    """
    cross, corner, extra = _border(state, k_xn, k_nn)
    batch = corner.shape[:-2]
    n, q = k_xn.shape[-2:]
    top = torch.cat([state.chol.expand(*batch, n, n), corner.new_zeros(*batch, n, q)], -1)
    chol = torch.cat([top, torch.cat([cross.expand(*batch, n, q).mT, corner], -1)], -2)
    lead = torch.broadcast_shapes(state.residual.shape[:-1], residual_new.shape[:-1])
    residual = torch.cat([state.residual.expand(*lead, n), residual_new.expand(*lead, q)], -1)
    lead = torch.broadcast_shapes(state.x.shape[:-2], x_new.shape[:-2])
    x = torch.cat([state.x.expand(*lead, *state.x.shape[-2:]), x_new.expand(*lead, *x_new.shape[-2:])], -2)
    jitter = torch.maximum(state.jitter, extra)
    return GPState(x, residual, state.noise_variance, chol, solve(chol, residual), jitter)


def downdate(state: GPState, index: int | Sequence[int] | Tensor) -> GPState:
    """The state without some of its rows.

    Args:
        state: The state so far.
        index: Which rows to take out, the same of every batch element; negative numbers count from the end.

    Raises:
        ShapeError: A number is not that of a row, or no row would be left.

    Cost: O(n^2) for each row taken out, or O(n^3) at once where that is cheaper (more than a sixteenth of the rows).
    """
    n = state.chol.shape[-1]
    gone = _rows(index, n)
    kept = torch.tensor([i for i in range(n) if i not in gone], dtype=torch.long, device=state.chol.device)
    if len(gone) > max(1, _FEW * n):
        rows = state.chol.index_select(-2, kept)
        chol, extra, _ = cholesky(rows @ rows.mT)
        jitter = state.jitter + extra
    else:
        chol, jitter = state.chol, state.jitter
        for i in sorted(gone, reverse=True):
            chol = _without_row(chol, i)
    residual = state.residual.index_select(-1, kept)
    x = state.x.index_select(-2, kept)
    return GPState(x, residual, state.noise_variance, chol, solve(chol, residual), jitter)


def slide(
    state: GPState, k_xn: Tensor, k_nn: Tensor, x_new: Tensor, residual_new: Tensor, *, size: int | None = None
) -> GPState:
    """A moving window: the q new values come in at the end, and the oldest go until `size` are left.

    Args:
        state: The state so far, oldest row first.
        k_xn: (*b n q) prior covariance between all the old and the new inputs.
        k_nn: (*b q q) prior covariance of the new ones, without noise.
        x_new: (*b q d).
        residual_new: (*b q).
        size: Rows to keep, above q; None for as many as there were.

    Raises:
        ShapeError: `size` leaves no old row.

    Cost: that of `downdate` and of `append`.
    """
    n, q = k_xn.shape[-2:]
    drop = n + q - (n if size is None else size)
    if drop >= n:
        fail(
            ShapeError,
            "ops.slide",
            f"at least one of the {n} old rows must stay.",
            got=f"size {n if size is None else size}, {q} new rows",
            fix="use ops.condition on the new rows alone",
        )
    if drop > 0:
        state, k_xn = downdate(state, range(drop)), k_xn[..., drop:, :]
    return append(state, k_xn, k_nn, x_new, residual_new)


def fantasize(state: GPState, k_xn: Tensor, k_nn: Tensor, residual_new: Tensor) -> Fantasy:
    """Imagine q values at each of many candidates; the factor depends on the candidate, never on the values.

    Args:
        state: The state so far, (*b).
        k_xn: (*c n q) prior covariance between the data and each candidate, *c = (..., *b).
        k_nn: (*c q q) prior covariance of each candidate, without noise.
        residual_new: (*s *c q) imagined values minus the prior mean, any number of samples for each candidate.

    Cost: O(n^2 q) for each candidate, O(q (n + q)) for each sample; no copy of the factor.
    """
    cross, corner, _ = _border(state, k_xn, k_nn)
    known = (k_xn.mT @ state.alpha.unsqueeze(-1)).squeeze(-1)
    return Fantasy(state, cross, corner, solve_lower(corner, (residual_new - known).unsqueeze(-1)).squeeze(-1))


def fantasy_moments(fantasy: Fantasy, k_xs: Tensor, k_ns: Tensor, k_ss_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean (*s *c s) and variance (*c s) of f at test points, without noise.

    Args:
        fantasy: From `fantasize`.
        k_xs: (*b n s) prior covariance between data and test points, shared by the candidates, or (*c n s).
        k_ns: (*c q s) prior covariance between each candidate and the test points.
        k_ss_diagonal: (*b s) or (*c s) prior variances at the test points.

    Cost: O(n^2 s) once where the test points are shared, O(n q s) for each candidate, O(q s) for each sample.
    """
    state = fantasy.state
    half = solve_lower(state.chol, k_xs)
    border = torch.linalg.solve_triangular(fantasy.corner, k_ns - fantasy.cross.mT @ half, upper=False)
    mean = (k_xs.mT @ state.alpha.unsqueeze(-1)).squeeze(-1)
    told = (fantasy.innovation.unsqueeze(-2) @ border).squeeze(-2)
    variance = k_ss_diagonal - half.square().sum(-2) - border.square().sum(-2)
    return mean + told, variance.clamp_min(0.0)


def _border(state: GPState, k_xn: Tensor, k_nn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, M and the jitter that M needed."""
    cross = solve_lower(state.chol, k_xn)
    # Jitter that the old block needed belongs to the same noise model, so the new block gets it as well.
    schur = add_diagonal(k_nn, state.noise_variance + state.jitter) - cross.mT @ cross
    corner, extra, _ = cholesky(schur)
    return cross, corner, extra


def _without_row(chol: Tensor, i: int) -> Tensor:
    """The factor of the matrix that lacks row and column i, for chol (*b n n)."""
    below = chol[..., i + 1 :, i]
    kept = torch.cat([chol[..., :i, :], chol[..., i + 1 :, :]], -2)
    left, right = kept[..., :i], kept[..., i + 1 :]
    corner = _plus_outer(right[..., i:, :], below)
    return torch.cat([left, torch.cat([right[..., :i, :], corner], -2)], -1)


def _plus_outer(chol: Tensor, v: Tensor) -> Tensor:
    """The factor of L L' + v v', for chol (*b n n) and v (*b n)."""
    w = torch.linalg.solve_triangular(chol, v.unsqueeze(-1), upper=False).squeeze(-1)
    after = 1.0 + w.square().cumsum(-1)
    before = torch.cat([torch.ones_like(w[..., :1]), after[..., :-1]], -1)
    # The sum over j > k of L_ij w_j, from the far end, where nothing cancels.
    beyond = (chol * w.unsqueeze(-2)).flip(-1).cumsum(-1).flip(-1)
    beyond = torch.cat([beyond[..., 1:], torch.zeros_like(beyond[..., :1])], -1)
    return chol * (after / before).sqrt().unsqueeze(-2) + beyond * (w / (after * before).sqrt()).unsqueeze(-2)


def _rows(index: int | Sequence[int] | Tensor, n: int) -> set[int]:
    numbers = [index] if isinstance(index, int) else [int(i) for i in index]
    gone = {i + n if i < 0 else i for i in numbers}
    if any(not 0 <= i < n for i in gone) or len(gone) == n:
        fail(
            ShapeError,
            "ops.downdate",
            f"index must name rows from 0 to {n - 1}, and not all of them.",
            got=repr(numbers[:8]),
            fix="pass e.g. 0 for the oldest row, or range(3) for the three oldest",
        )
    return gone
