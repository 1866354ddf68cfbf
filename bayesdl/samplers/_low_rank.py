r"""Low-rank metrics from positions and gradients, for targets with more coordinates than a covariance can hold.

Of all M^{-1}, the one under which the positions q and the gradients g of the log density have the same whitened law
minimises the Fisher divergence between the target and a Gaussian of covariance M^{-1}. For a Gaussian target that law
is reached by a handful of draws, since then g = -Sigma^{-1} (q - mu) holds for each: noise cancels, and directions in
which nothing happens stay as they are. Its diagonal form is sqrt(Var q / Var g); in the few directions in which scaled
positions or scaled gradients vary most it is the geometric mean of Cov q and Cov g^{-1}, the solution A of

    A Cov(g) A = Cov(q).

Wide directions come from the positions, narrow ones from the gradients.

Reference: Seyboldt, Carlson, Carpenter, Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SETTLED = 1e-5  # variance added to both sides: directions without data keep the eigenvalue 1
_ROWS_PER_DIRECTION = 4  # for each of both sides, so that a covariance has twice as many rows as coordinates


class Kept(NamedTuple):
    """Positions and gradients of a window, thinned as it grows, each (*g, rows, D): written in place.

    Every `stride`-th transition is kept, from the same number of chains in turn. When all rows are full, every other
    transition is dropped and the stride doubles.
    """

    positions: Tensor
    gradients: Tensor
    filled: int = 0
    stride: int = 1
    seen: int = 0


def start_kept(q: Tensor, rank: int) -> Kept:
    """Nothing yet, for chains at q (*g, C, D). Room for 512 rows, and fewer where they are long."""
    rows = max(min(512, 2**25 // q.shape[-1]), 2 * rank, 32)
    width = _width(q, rows)
    shape = (*q.shape[:-2], rows // width * width, q.shape[-1])
    return Kept(torch.zeros(shape, dtype=q.dtype, device=q.device), torch.zeros(shape, dtype=q.dtype, device=q.device))


def keep(kept: Kept, q: Tensor, grad: Tensor) -> Kept:
    """Take in the positions q and gradients (*g, C, D) of one more transition."""
    positions, gradients, filled, stride, seen = kept
    if seen % stride:
        return kept._replace(seen=seen + 1)
    rows = positions.shape[-2]
    width = _width(q, rows)
    if filled == rows:
        half = torch.arange(rows, device=q.device).unflatten(0, (-1, width))[::2].flatten()
        for held in (positions, gradients):
            held[..., : len(half), :] = held.index_select(-2, half)
        filled, stride = len(half), 2 * stride
    if seen % stride == 0:  # which it may not be once the stride has doubled
        chains = torch.arange(width, device=q.device)
        if width < q.shape[-2]:
            chains = (chains * (q.shape[-2] // width) + seen // stride) % q.shape[-2]
        positions[..., filled : filled + width, :] = q.index_select(-2, chains)
        gradients[..., filled : filled + width, :] = grad.index_select(-2, chains)
        filled += width
    return Kept(positions, gradients, filled, stride, seen + 1)


def estimate(kept: Kept, scales: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The basis U (*g, D, rank) and the eigenvalues Lambda (*g, rank) of a low-rank metric in float64.

    Args:
        kept: Positions and gradients.
        scales: S, (*g, D): what the positions are divided by and the gradients multiplied with.
        rank: Directions wanted; of R / 2 candidates those are taken whose eigenvalues are farthest from 1, and with
            fewer candidates the last are zero, of eigenvalue 1.

    Cost: O(R^2 D + R^3) time for R rows, O(R D) memory.
    """
    scales = scales.double().unsqueeze(-2)
    x = _centred(kept.positions[..., : kept.filled, :].double()) / scales
    g = _centred(kept.gradients[..., : kept.filled, :].double()) * scales
    dim = x.shape[-1]
    basis = torch.zeros(*x.shape[:-2], dim, rank, dtype=x.dtype, device=x.device)
    stretch = torch.ones(*x.shape[:-2], rank, dtype=x.dtype, device=x.device)
    each = min(kept.filled // _ROWS_PER_DIRECTION, dim)
    if each < 1:
        return basis, stretch
    # Orthonormal even where both sides name the same directions; as many as there are coordinates at most.
    frame = torch.linalg.qr(torch.cat([_leading(x, each), _leading(g, each)], -1))[0]
    wide, steep = _covariance(x @ frame), _covariance(g @ frame)
    values, vectors = torch.linalg.eigh(geometric_mean(wide, steep))
    found = min(rank, values.shape[-1])
    order = values.log().abs().argsort(dim=-1, descending=True)[..., :found]
    basis[..., :found] = frame @ vectors.take_along_dim(order.unsqueeze(-2), -1)
    stretch[..., :found] = values.take_along_dim(order, -1)
    return basis, stretch


def largest_variance(whitened: Tensor) -> Tensor:
    """The largest eigenvalue of the covariance of whitened rows (*g, R, D), (*g); R is at least 4.

    Each half of the rows names a direction and the other half measures the variance along it: with fewer rows than
    coordinates the largest eigenvalue of their covariance itself would be mostly noise.
    """
    halves = _centred(whitened[..., 0::2, :].double()), _centred(whitened[..., 1::2, :].double())
    found = []
    for one, other in (halves, halves[::-1]):
        along = (other @ _leading(one, 1)).squeeze(-1)
        found.append(along.square().mean(-1))
    return torch.stack(found).mean(0)


def _centred(rows: Tensor) -> Tensor:
    return (rows - rows.mean(-2, keepdim=True)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _leading(rows: Tensor, num: int) -> Tensor:
    """The `num` directions in which centred rows (*g, R, D) vary most, (*g, D, num), by their Gram matrix."""
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    lengths = values[..., -num:].clamp(min=torch.finfo(rows.dtype).tiny).sqrt()
    return rows.mT @ vectors[..., -num:] / lengths.unsqueeze(-2)


def _covariance(rows: Tensor) -> Tensor:
    """Of centred rows (*g, R, k), with a little added to its diagonal: (*g, k, k)."""
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return rows.mT @ rows / rows.shape[-2] + SETTLED * eye


def geometric_mean(wide: Tensor, steep: Tensor) -> Tensor:
    """The positive definite A (*g, k, k) with A steep A = wide.

    It is steep^{-1/2} (steep^{1/2} wide steep^{1/2})^{1/2} steep^{-1/2}.
    """
    values, vectors = torch.linalg.eigh(steep)
    values = values.clamp(min=SETTLED).unsqueeze(-2)
    half, inverse_half = (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT
    inner = half @ wide @ half
    values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT))
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    result = inverse_half @ root @ inverse_half
    return 0.5 * (result + result.mT)


def _width(q: Tensor, rows: int) -> int:
    """Chains kept of a transition: all, or as many as leave room for eight transitions."""
    return min(q.shape[-2], max(rows // 8, 1))
