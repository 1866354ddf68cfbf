r"""The log-determinant of a matrix that is never formed, by stochastic Lanczos quadrature.

    log|A| = log|P| + tr log(P^{-1/2} A P^{-1/2}),        tr f(M) = n E[ u' f(M) u ],  u uniform on the unit sphere

Probes z ~ N(0, P) give u = P^{-1/2} z / |P^{-1/2} z|, and Lanczos turns u' log(M) u into a Gauss quadrature whose nodes
are the eigenvalues of a small tridiagonal matrix. The better P, the closer M to the identity, and the smaller the part
that is estimated at all.

References: Ubaru, Chen, Saad (2017); Gardner et al. (2018), arXiv 1809.11165, for the preconditioned probes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.ops.preconditioner import Preconditioner

_BREAKDOWN = 1e-8


class LogDet(NamedTuple):
    """An estimate of a log-determinant.

    Attributes:
        value: ().
        std_error: () standard error over the probes; it does not know of the error of the quadrature.
        steps: Lanczos steps that were taken.
        change: By how much the last step moved the estimate: the error of the quadrature is of that size.
    """

    value: Tensor
    std_error: Tensor
    steps: int
    change: float


def lanczos_log_det(
    product: Callable[[Tensor], Tensor],
    preconditioner: Preconditioner,
    probes: Tensor,
    *,
    max_steps: int = 50,
    tolerance: float = 1e-4,
    memory: int | None = None,
) -> LogDet:
    """log|A| with the standard error of its estimate.

    Args:
        product: V -> A V for V (n t).
        preconditioner: P close to A.
        probes: (n t) draws from N(0, P), two at least.
        max_steps: Lanczos steps at most; each is one product, with full re-orthogonalisation.
        tolerance: Steps end where one moves no probe's estimate by more than this share of n.
        memory: Bytes that the Lanczos vectors may take; as many probes as fit go together. None for all at once.

    Raises:
        SettingError: Fewer than two probes.

    Cost: a product and 8 n t k operations for step k; 2 n t `max_steps` numbers of memory, or `memory`.
    """
    n, t = probes.shape
    if t < 2:
        fail(SettingError, "ops.lanczos_log_det", "at least two probes are needed.", got=str(t), fix="pass 8, say")
    together = t if memory is None else max(1, memory // (2 * n * max_steps * probes.element_size()))
    parts = [_traces(product, preconditioner, part, max_steps, tolerance) for part in probes.split(together, -1)]
    each = n * torch.cat([values for values, _, _ in parts])
    steps, change = max(part[1] for part in parts), max(part[2] for part in parts)
    return LogDet(preconditioner.log_det + each.mean(), each.std() / t**0.5, steps, n * change)


def _traces(
    product: Callable[[Tensor], Tensor],
    preconditioner: Preconditioner,
    probes: Tensor,
    max_steps: int,
    tolerance: float,
) -> tuple[Tensor, int, float]:
    """u' log(M) u for each probe, the steps taken, and by how much the last one moved a value."""
    n, t = probes.shape
    v, s = [], []  # a basis in the space of A and the same times P^{-1}: together orthonormal, s_i' v_j = 1 where i = j
    w = preconditioner.solve(probes)
    size = (probes * w).sum(0).sqrt()
    v.append(probes / size)
    s.append(w.div_(size))
    alphas, betas = [], []
    running = torch.ones(t, dtype=torch.bool, device=probes.device)
    previous, change = torch.zeros_like(size), float("inf")
    for step in range(min(max_steps, n)):
        r = product(s[-1])
        alpha = (s[-1] * r).sum(0)
        alphas.append(torch.where(running, alpha, torch.ones_like(alpha)))
        values = _quadrature(torch.stack(alphas, -1), torch.stack(betas, -1) if betas else None)
        previous, change = values, float((values - previous).abs().max())
        if (step > 0 and change <= tolerance) or step == min(max_steps, n) - 1:
            break
        for _ in range(2):
            for j in range(len(v)):
                r -= v[j] * (s[j] * r).sum(0)
        w = preconditioner.solve(r)
        beta = (r * w).sum(0).clamp_min(0.0).sqrt()
        running = running & (beta > _BREAKDOWN)
        if not bool(running.any()):
            change = 0.0
            break
        betas.append(torch.where(running, beta, torch.zeros_like(beta)))
        safe = torch.where(running, beta, torch.ones_like(beta))
        v.append(torch.where(running, r / safe, torch.zeros_like(r)))
        s.append(torch.where(running, w / safe, torch.zeros_like(w)))
    return previous, len(alphas), change


def _quadrature(alpha: Tensor, beta: Tensor | None) -> Tensor:
    """e_1' log(T) e_1 for tridiagonal matrices T with diagonals alpha (t k) and off-diagonals beta (t k-1)."""
    tridiagonal = torch.diag_embed(alpha)
    if beta is not None:
        tridiagonal = tridiagonal + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    smallest = torch.finfo(nodes.dtype).tiny
    return (vectors[..., 0, :].square() * nodes.clamp_min(smallest).log()).sum(-1)
