r"""Inducing points: the algebra that the collapsed bound and stochastic variational inference share.

With K_mm = L L' and A = L^{-1} k(z, x), the inducing values are u = L v, v ~ N(0, I), and

    f(x) | v ~ N(A' v, k(x, x) - A' A)

so that q(v) = N(mean, S) gives f(x) ~ N(A' mean, k(x, x) - A' A + A' S A). Everything here is whitened in this way: the
prior on v is standard normal whatever the hyper-parameters are.

References: Titsias (2009), "Variational learning of inducing variables in sparse Gaussian processes"; Hensman et al.
(2013), arXiv 1309.6835; Burt, Rasmussen, van der Wilk (2020), arXiv 2008.00323, for `greedy_pivots`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl.ops.factor import CholeskyResult, cholesky


class InducingSums(NamedTuple):
    """What n data points amount to in the collapsed bound: sums over them, so that tiles of rows add up.

    Attributes:
        gram: A A', (*b m m).
        projected: A r, (*b m), with r = y - mean(x).
        square: r' r, (*b).
        trace: sum of the prior variances k(x_i, x_i), (*b).
    """

    gram: Tensor
    projected: Tensor
    square: Tensor
    trace: Tensor


class CollapsedBound(NamedTuple):
    """The bound, the q(v) that attains it, and its gradient in the sums and in the noise variance.

    Attributes:
        value: (*b) log N(r | 0, A' A + s I) - (trace - tr A A') / (2 s).
        mean: (*b m) mean of q(v).
        root: (*b m m) lower triangular R with R' R = S, the covariance of q(v).
        by_gram: (*b m m), symmetric.
        by_projected: (*b m).
        by_noise: (*b). The gradients in `square` and in `trace` are both -1 / (2 s).
    """

    value: Tensor
    mean: Tensor
    root: Tensor
    by_gram: Tensor
    by_projected: Tensor
    by_noise: Tensor


def inducing_factor(k_mm: Tensor, relative_jitter: float) -> CholeskyResult:
    """L with L L' = K_mm + j I, j = `relative_jitter` times the mean of the diagonal, more only where that fails.

    A jitter that is there from the start keeps the bound a smooth function, and a bound: it is the one for inducing
    variables f(z) + e, e ~ N(0, j I). The factor is differentiable.
    """
    jitter = relative_jitter * k_mm.diagonal(dim1=-2, dim2=-1).mean(-1)
    m = k_mm.shape[-1]
    result = cholesky(k_mm + torch.diag_embed(jitter.unsqueeze(-1).expand(*jitter.shape, m)))
    return CholeskyResult(result.factor, result.jitter + jitter.detach(), result.failed)


def collapsed_bound(sums: InducingSums, noise_variance: Tensor, n: int) -> CollapsedBound:
    r"""Titsias' bound from the sums over data, with B = I + A A' / s and beta = B^{-1} A r / s:

        F = -n/2 log(2 pi s) - 1/2 log|B| - (r'r - r' A' beta) / (2 s) - (trace - tr A A') / (2 s)
        q(v) = N(beta, B^{-1})

    Args:
        sums: The sums over n points.
        noise_variance: s, (*b).
        n: Number of points.

    Cost: m^3 multiplications twice, for each batch element; not differentiable itself.

    Reference: Titsias (2009), equation 9, whitened.
    """
    s, wide = noise_variance, noise_variance[..., None, None]
    m = sums.gram.shape[-1]
    eye = torch.eye(m, dtype=s.dtype, device=s.device)
    factor = torch.linalg.cholesky_ex(eye + sums.gram / wide)[0]
    root = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    inverse = root.mT @ root
    beta = torch.cholesky_solve(sums.projected.unsqueeze(-1), factor).squeeze(-1) / s.unsqueeze(-1)
    fitted = (sums.projected * beta).sum(-1)
    explained = sums.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    half_logdet = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    rest = sums.square + sums.trace - explained
    value = -0.5 * n * (2 * math.pi * s).log() - half_logdet - 0.5 * (rest - fitted) / s
    by_gram = 0.5 * (eye - inverse - beta.unsqueeze(-1) * beta.unsqueeze(-2)) / wide
    through_b = m - inverse.diagonal(dim1=-2, dim2=-1).sum(-1)  # tr(B^{-1} A A') / s
    bent = (beta * (sums.gram @ beta.unsqueeze(-1)).squeeze(-1)).sum(-1)
    by_noise = 0.5 * (through_b - n) / s + (0.5 * (rest + bent) - fitted) / s.square()
    return CollapsedBound(value, beta, root, by_gram, beta / s.unsqueeze(-1), by_noise)


def whitened_moments(a: Tensor, variance: Tensor, mean: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of f - its prior mean, for each of L latent functions, from A and q(v) = N(mean, R' R).

    Args:
        a: A = L^{-1} k(z, x), (*b m s).
        variance: k(x_i, x_i), (*b s).
        mean: (*b L m).
        root: R, (*b L m m).

    Returns:
        (*b L s) each; the variance is at least the rounding error of the prior variance.
    """
    own = root @ a.unsqueeze(-3)
    left = (variance - a.square().sum(-2)).unsqueeze(-2)
    floor = torch.finfo(a.dtype).eps * variance.unsqueeze(-2)
    return mean @ a, torch.maximum(left + own.square().sum(-2), floor)


def standard_normal_kl(mean: Tensor, root: Tensor, precision: Tensor | float = 1.0) -> Tensor:
    r"""KL of q(v) = N(mean, c S) from N(0, c I), in expectation over c with E[1/c] = `precision`; (*b L m) -> (*b L).

    1/2 ( tr S - log|S| - m + precision mean' mean ), which for c = 1 is the KL of two normals.
    """
    logdet = 2 * root.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    squares = mean.square().sum(-1)
    return 0.5 * (root.square().sum((-2, -1)) - logdet - mean.shape[-1] + precision * squares)


def inverse_gamma_kl(a: Tensor, b: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    r"""KL( IG(a, b) || IG(alpha, beta) ), IG(a, b) having the density b^a / Gamma(a) t^(-a-1) exp(-b / t).

    (a - alpha) psi(a) - log Gamma(a) + log Gamma(alpha) + alpha log(b / beta) + a (beta - b) / b
    """
    alpha, beta = (torch.as_tensor(v, dtype=a.dtype, device=a.device) for v in (alpha, beta))
    gammas = torch.lgamma(alpha) - torch.lgamma(a)
    return (a - alpha) * torch.digamma(a) + gammas + alpha * (b / beta).log() + a * (beta - b) / b


def inverse_gamma_nodes(a: Tensor, b: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    r"""Nodes t_k and weights w_k with E[g(t)] = sum_k w_k g(t_k) for t ~ IG(a, b); (*b) -> (*b K) each.

    With t = b / a exp(u), u has a density in proportion to exp(-a (u + exp(-u))), which falls off exponentially to the
    right and doubly so to the left. This is the trapezoid rule in s, u = s + exp(s) - 1, where both ends fall off
    doubly exponentially, cut where the density is exp(-20) of its height. Its error falls exponentially in K: below
    1e-6 of a smooth bounded g at K = 16. The weights, not the nodes, carry the gradient in a and b, for a g that does
    not depend on them.
    """
    reach = 20.0 / a.detach()
    right = reach + (2 * reach).sqrt()
    left = torch.minimum((2 * reach).sqrt(), (2 * reach + 2).log())
    low, high = _unfold(-left), _unfold(right)
    grid = torch.linspace(0, 1, num_nodes, dtype=a.dtype, device=a.device)
    s = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * grid
    log_t = s + s.expm1() + (b / a).detach().log().unsqueeze(-1)
    log_weight = s.exp().log1p() - a.unsqueeze(-1) * log_t - b.unsqueeze(-1) * (-log_t).exp()
    return log_t.exp(), torch.softmax(log_weight, -1)


def _unfold(u: Tensor) -> Tensor:
    """The s with s + exp(s) - 1 = u, by Newton's method on a convex function."""
    s = torch.where(u > 0, u.clamp_min(0).log1p(), u)
    for _ in range(12):
        s = s - (s + s.expm1() - u) / (1 + s.exp())
    return s


def greedy_pivots(column: Callable[[Tensor], Tensor], diagonal: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Points chosen one after another, each where the prior variance given those before it is largest.

    Args:
        column: From the indices (P) of one point of each problem to its covariances with all points, (P N).
        diagonal: Prior variances, (P N).
        num: How many points to choose, at most N.

    Returns:
        Indices (P num), and (P num) bool, whether the variance that was left there exceeded 1e-10 of the largest prior
        variance. Choices past that are numerically in the span of those before.

    Cost: O(N num^2) time, N num numbers of memory, for each problem.

    Reference: Burt, Rasmussen, van der Wilk (2020), section 7.2; the same as pivoted Cholesky.
    """
    left = diagonal.detach().clone()
    floor = 1e-10 * left.amax(-1)
    factor = left.new_zeros(*left.shape[:-1], num, left.shape[-1])
    everyone = torch.arange(left.shape[0], device=left.device)
    pivots, useful = [], []
    for i in range(num):
        best, index = left.max(-1)
        pivots.append(index)
        useful.append(best > floor)
        known = factor[:, :i]
        row = column(index) - (known.mT @ known[everyone, :, index].unsqueeze(-1)).squeeze(-1)
        row = row / torch.where(best > floor, best, torch.ones_like(best)).sqrt().unsqueeze(-1)
        row = torch.where((best > floor).unsqueeze(-1), row, torch.zeros_like(row))
        factor[:, i] = row
        left = left - row.square()
        left[everyone, index] = -1.0  # below every variance that rounding leaves: no point is chosen twice
    return torch.stack(pivots, -1), torch.stack(useful, -1)


def gauss_hermite(degree: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under N(0, 1), in the dtype and on the device of `like`."""
    node, weight = _hermite(degree)
    return torch.as_tensor(node).to(like), torch.as_tensor(weight).to(like)


@lru_cache
def _hermite(degree: int) -> tuple[np.ndarray, np.ndarray]:
    node, weight = np.polynomial.hermite_e.hermegauss(degree)
    return node, weight / weight.sum()
