r"""Batched Cholesky factorisation with jitter that is added only where it is needed, and recorded.

L L' = A + jitter I,        jitter = 0 unless the plain factorisation of that element failed
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail

_FIRST_JITTER = {torch.float64: 1e-10, torch.float32: 1e-6}


class CholeskyResult(NamedTuple):
    """Factor, what had to be added, and which elements are lost.

    Attributes:
        factor: (*b n n) lower triangular, NaN throughout where `failed`.
        jitter: (*b) what was added to the diagonal; 0 where nothing was, NaN where `failed`.
        failed: (*b) bool, True where no jitter up to the last try made the matrix positive definite.
    """

    factor: Tensor
    jitter: Tensor
    failed: Tensor


def cholesky(a: Tensor, *, max_tries: int = 6) -> CholeskyResult:
    r"""Lower Cholesky factors of a batch of symmetric matrices; never raises because of the numbers in them.

    Only the elements that fail are tried again, with jitter relative to their own mean diagonal: 1e-10 in float64 and
    1e-6 in float32, ten times more at each further try. One bad element of a batch therefore neither perturbs the
    others nor stops them. The factor is differentiable; the jitter counts as a constant.

    Args:
        a: (*b n n) symmetric; only the lower triangle is read.
        max_tries: How many levels of jitter to try before an element is given up.

    Raises:
        ShapeError: `a` is not a batch of square matrices.

    Cost: n^3 / 3 multiplications per element, and as much again for each try of each element that fails.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        fail(
            ShapeError,
            "ops.cholesky",
            "a must have shape (*b, n, n).",
            got=str(tuple(a.shape)),
            fix="pass a square matrix",
        )
    return factor_or_retry(a, max_tries)[0]


def factor_or_retry(a: Tensor, max_tries: int = 6) -> tuple[CholeskyResult, bool]:
    """`cholesky` without its check of shapes, and whether all went well at once: the device is asked only that once."""
    factor, info = torch.linalg.cholesky_ex(a)
    jitter = torch.zeros(a.shape[:-2], dtype=a.dtype, device=a.device)
    failed = info != 0
    if a.numel() == 0:
        return CholeskyResult(factor, jitter, failed), True
    # Some backends report success on NaN input, so the last pivot decides as well: NaN anywhere below it reaches it.
    failed |= ~(factor.detach()[..., -1, -1] > 0)
    if not bool(failed.any()):
        return CholeskyResult(factor, jitter, failed), True
    return _retry(a, factor, jitter, failed, max_tries), False


def _retry(a: Tensor, factor: Tensor, jitter: Tensor, failed: Tensor, max_tries: int) -> CholeskyResult:
    shape, n = a.shape, a.shape[-1]
    a, factor, jitter, failed = a.reshape(-1, n, n), factor.reshape(-1, n, n), jitter.reshape(-1), failed.reshape(-1)
    matrix, factor = a.detach(), factor.detach()
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).abs()
    todo = failed.nonzero().squeeze(-1)
    level = _FIRST_JITTER.get(a.dtype, 1e-6)
    for _ in range(max_tries):
        added = level * scale[todo]
        attempt, info = torch.linalg.cholesky_ex(_with_jitter(matrix[todo], added))
        good = (info == 0) & attempt[:, -1, -1].isfinite()
        done = todo[good]
        factor = factor.index_copy(0, done, attempt[good])
        jitter = jitter.index_copy(0, done, added[good])
        todo = todo[~good]
        if todo.numel() == 0:
            break
        level *= 10
    lost = torch.zeros_like(failed).index_fill(0, todo, True)
    if a.requires_grad:
        # The backward of a factorisation that failed is NaN for a gradient of 0 too: none may stay in the graph.
        kept = (~lost).nonzero().squeeze(-1)
        again = torch.linalg.cholesky_ex(_with_jitter(a[kept], jitter[kept]))[0]
        factor = factor.index_copy(0, kept, again)
    factor = factor.masked_fill(lost[:, None, None], torch.nan)
    jitter = jitter.masked_fill(lost, torch.nan)
    return CholeskyResult(factor.reshape(shape), jitter.reshape(shape[:-2]), lost.reshape(shape[:-2]))


def _with_jitter(a: Tensor, jitter: Tensor) -> Tensor:
    return a + torch.diag_embed(jitter[:, None].expand(-1, a.shape[-1]))
