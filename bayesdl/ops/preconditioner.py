r"""A preconditioner from a few columns of the kernel matrix, chosen by randomly pivoted Cholesky.

    K ~ F F',    P = F F' + s I,    [F; sqrt(s) I] = Q R,    P^{-1} v = (v - Q_1 Q_1' v) / s,    log|P| by R

Each pivot is drawn with probability proportional to the diagonal of what is not yet explained, K - F F', which makes
the choice robust where greedy pivoting chases outliers. Pivots are proposed in blocks and accepted by rejection, which
leaves their distribution as it is and turns the work into matrix products.

References: Chen, Epperly, Tropp, Webber (2022), arXiv 2207.06503; Epperly, Tropp, Webber (2024), arXiv 2410.03969, for
the blocks; Díaz, Epperly, Frangella, Tropp, Webber (2023), arXiv 2304.12465, for its use as a preconditioner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.ops.factor import cholesky
from bayesdl.ops.products import KernelOperator

_BLOCK = 64
_ROUNDING = 1e-13  # of the trace; what is left below it is rounding
_NEGLIGIBLE = 1e-8  # of the noise: a preconditioner that misses less than this is exact for every purpose
_CHUNK = 2**16


class Pivots(NamedTuple):
    """Columns of the kernel matrix that stand for all of it.

    Attributes:
        index: (r) row numbers, in the order of their choice.
        blocks: (k) how many of them were taken together each time; they sum to r.
    """

    index: Tensor
    blocks: Tensor


@final
@dataclass(frozen=True)
class Preconditioner:
    """P = F F' + s I.

    Attributes:
        basis: (n r) the upper part of the orthonormal Q.
        triangle: (r r) R, upper triangular; F = basis @ triangle.
        noise_variance: () s.
        log_det: () log|P|.
        pivots: The columns that F is made of.
    """

    basis: Tensor
    triangle: Tensor
    noise_variance: Tensor
    log_det: Tensor
    pivots: Pivots

    @property
    def rank(self) -> int:
        """Columns of F."""
        return self.basis.shape[-1]

    def solve(self, v: Tensor) -> Tensor:
        """P^{-1} V for v (n t). Cost: 4 n r t operations."""
        return torch.addmm(v, self.basis, self.basis.mT @ v, alpha=-1.0).div_(self.noise_variance)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draws from N(0, P), one a column: (n num)."""
        like = self.basis
        shape = (self.rank + like.shape[0], num)
        # one stream whose first part belongs to F, so that a nearby P gives nearby draws
        z = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        smooth = self.basis @ (self.triangle @ z[: self.rank])
        return smooth.add_(z[self.rank :] * self.noise_variance.sqrt())


def random_pivots(operator: KernelOperator, rank: int, generator: torch.Generator) -> Pivots:
    """Choose up to `rank` columns by randomly pivoted Cholesky; fewer where those explain the matrix to rounding.

    Raises:
        SettingError: `rank` is below 0.

    Cost: n r kernel evaluations and n r^2 operations; n r numbers of memory.
    """
    if rank < 0:
        fail(SettingError, "ops.random_pivots", "rank must be at least 0.", got=str(rank), fix="pass 200, say")
    n = operator.n
    rank = min(rank, n)
    diagonal = operator.diagonal().to(torch.float64).clone()
    enough = max(_ROUNDING * float(diagonal.sum()), _NEGLIGIBLE * float(operator.noise_variance))
    factor = diagonal.new_empty(rank, n).mT  # column by column, so that memory is touched as columns are added
    chosen, blocks, used = [], [], 0
    while used < rank and float(diagonal.sum()) > enough:
        proposed = torch.multinomial(diagonal, min(_BLOCK, n), replacement=True, generator=generator)
        level = torch.rand(proposed.shape, generator=generator, dtype=torch.float64, device=diagonal.device)
        block = cholesky_block(operator, factor[:, :used], proposed, proposed)
        accepted = _accept(block.cpu(), level.cpu(), rank - used).to(proposed.device)
        if accepted.numel() == 0:
            break
        index = proposed[accepted]
        width = _extend(operator, factor, used, index)
        if width == 0:
            break
        diagonal.sub_(factor[:, used : used + width].square().sum(-1)).clamp_min_(0.0)
        diagonal[index] = 0.0
        chosen.append(index)
        blocks.append(width)
        used += width
    empty = torch.zeros(0, dtype=torch.int64, device=diagonal.device)
    return Pivots(torch.cat(chosen) if chosen else empty, torch.tensor(blocks, dtype=torch.int64))


def preconditioner(operator: KernelOperator, pivots: Pivots) -> Preconditioner:
    """P from chosen columns; the same pivots at other hyper-parameters give the preconditioner of a nearby problem.

    Cost: n r kernel evaluations and 6 n r^2 operations; n r numbers of memory.
    """
    factor = operator.x.new_empty(pivots.index.numel(), operator.n, dtype=torch.float64).mT
    used = 0
    for index in pivots.index.split(pivots.blocks.tolist()):
        used += _extend(operator, factor, used, index)
    return _orthogonal(factor[:, :used], operator.noise_variance, pivots)


def cholesky_block(operator: KernelOperator, factor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(K - F F') at the given rows and columns."""
    k = operator.covariance(rows, columns)
    return k.addmm_(factor[rows], factor[columns].mT, alpha=-1.0)


def _extend(operator: KernelOperator, factor: Tensor, used: int, index: Tensor) -> int:
    """Write the columns of F that belong to the pivots `index` behind the first `used`; their number."""
    old = factor[:, :used]
    chol, _, failed = cholesky(cholesky_block(operator, old, index, index))
    if bool(failed):
        return 0
    rest = operator.columns(index)
    rest.addmm_(old, old[index].mT, alpha=-1.0)
    new = torch.linalg.solve_triangular(chol.mT, rest, upper=True, left=False)
    factor[:, used : used + index.numel()] = new
    return index.numel()


def _accept(block: Tensor, level: Tensor, room: int) -> Tensor:
    """Which proposals to keep: each with the probability that it would have in place of the proposal's own."""
    h = block.clone()
    first = block.diagonal().clone()
    floor = 1e-10 * float(first.max())
    kept = []
    for i in range(h.shape[0]):
        pivot = float(h[i, i])
        if len(kept) < room and pivot > floor and float(level[i]) * float(first[i]) < pivot:
            column = h[:, i] / math.sqrt(pivot)
            h -= torch.outer(column, column)
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


def _orthogonal(factor: Tensor, noise_variance: Tensor, pivots: Pivots) -> Preconditioner:
    """QR of [F; sqrt(s) I] by Cholesky, twice: in place, by matrix products, and orthonormal to rounding."""
    n, r = factor.shape
    s = noise_variance.to(factor)
    eye = torch.eye(r, dtype=factor.dtype, device=factor.device)
    below, triangle = s.sqrt() * eye, eye
    for _ in range(2):
        gram = below.mT @ below
        for start in range(0, n, _CHUNK):
            part = factor[start : start + _CHUNK]
            gram.addmm_(part.mT, part)
        upper = cholesky(gram).factor.mT
        below = torch.linalg.solve_triangular(upper, below, upper=True, left=False)
        for start in range(0, n, _CHUNK):
            part = factor[start : start + _CHUNK]
            part.copy_(torch.linalg.solve_triangular(upper, part, upper=True, left=False))
        triangle = upper @ triangle
    log_det = 2.0 * triangle.diagonal().log().sum() + (n - r) * s.log()
    return Preconditioner(factor, triangle, s, log_det, pivots)
