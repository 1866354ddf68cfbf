r"""Warm-up: dual averaging of the step size, and a metric from windows, pooled over the chains of a group.

Everything here is a pure function of tensors with leading group axes *g; nothing changes once warm-up is over. Step
sizes have a chain axis: (*g, C) while chains travel from where they were started, since a step that suits most of them
can leave one in a steep place stuck for good, and (*g, 1) for the last part of warm-up, which finds the step size that
all share.

References: Hoffman & Gelman (2014), arXiv 1111.4246, section 3.2 and algorithm 4; the window lengths and the shrinkage
of the metric are those of the Stan reference manual, "HMC algorithm parameters".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.samplers.base import ValueAndGrad
from bayesdl.samplers.hamiltonian import Metric, energy, leapfrog

_GAMMA, _KAPPA, _T0 = 0.05, 0.75, 10.0


class DualAveraging(NamedTuple):
    """State of the step-size search, every tensor (*g, C) or (*g, 1) in float64."""

    log_step_size: Tensor
    log_average: Tensor
    error_sum: Tensor
    centre: Tensor
    count: int


def start_dual_averaging(step_size: Tensor) -> DualAveraging:
    """Begin at `step_size`; the search is drawn towards ten times that, since large steps are cheap to reject."""
    log_step = step_size.double().log()
    return DualAveraging(log_step, log_step, torch.zeros_like(log_step), log_step + math.log(10.0), 0)


def dual_average(state: DualAveraging, acceptance: Tensor, target: float) -> DualAveraging:
    r"""One update from acceptance rates in the shape of the state: of each chain, or their mean.

    With H_t = target - acceptance,

        log eps_{t+1}     = mu - sqrt(t) / gamma / (t + t0) * sum_{i<=t} H_i
        log eps_bar_{t+1} = t^{-kappa} log eps_{t+1} + (1 - t^{-kappa}) log eps_bar_t,

    gamma = 0.05, t0 = 10, kappa = 0.75. Sampling uses eps_bar.
    """
    t = state.count + 1
    error_sum = state.error_sum + (target - acceptance.double())
    log_step = state.centre - math.sqrt(t) / _GAMMA / (t + _T0) * error_sum
    weight = t**-_KAPPA
    return DualAveraging(log_step, weight * log_step + (1 - weight) * state.log_average, error_sum, state.centre, t)


def find_step_size(
    evaluate: ValueAndGrad,
    q: Tensor,
    log_density: Tensor,
    grad: Tensor,
    metric: Metric,
    noise: Tensor,
    step_size: Tensor,
    threshold: float = 0.8,
) -> tuple[Tensor, int]:
    """Step sizes of the right order (*g, C): each doubles or halves until one leapfrog step crosses `threshold`.

    The search starts from `step_size`, (*g, C) or (*g, 1); momenta come from `noise` and stay the same throughout. A
    chain whose log density is not finite yet takes the geometric mean of the others.

    Returns:
        The step sizes and the number of gradients spent (per chain). At most 50 factors of two.
    """
    p = metric.momentum(noise).expand_as(q)
    start = energy(log_density, p, metric)
    counts = start.isfinite()
    active = counts
    growing = counts
    step_size = step_size.expand_as(log_density)
    evaluations = 0
    for trial in range(51):
        _, p_end, value, _ = leapfrog(evaluate, q, p, grad, step_size, metric, 1)
        evaluations += 1
        above = (start - energy(value, p_end, metric)).exp() > threshold
        growing = above if trial == 0 else growing
        active = active & (above == growing)
        if not bool(active.any()):
            break
        step_size = torch.where(active, torch.where(growing, step_size * 2, step_size / 2), step_size)
    return torch.where(counts, step_size, pool_step_sizes(step_size, counts)), evaluations


def pool_step_sizes(step_size: Tensor, counts: Tensor) -> Tensor:
    """The geometric mean (*g, 1) of the step sizes (*g, C) of the chains that count."""
    total = (step_size.double().log() * counts).sum(-1, keepdim=True)
    return (total / counts.sum(-1, keepdim=True).clamp(min=1)).exp().to(step_size)


def slow_windows(num_warmup: int) -> tuple[tuple[int, int], ...]:
    """The windows [start, end) of warm-up over which a metric is estimated, each replacing the one before.

    75 transitions come first without a metric, then windows of 25, 50, 100, ... (the last one takes what is left), and
    50 transitions adapt the step size to the final metric. Below 150 transitions the parts are 15, 75 and 10 %, in one
    window; below 20 there is none.
    """
    if num_warmup < 20:
        return ()
    first, final, size = 75, 50, 25
    if num_warmup < first + size + final:
        first, final = int(0.15 * num_warmup), int(0.1 * num_warmup)
        return ((first, num_warmup - final),)
    windows = []
    start, stop = first, num_warmup - final
    while start < stop:
        end = start + size
        size *= 2
        # A window that its successor could not follow in full length runs to the end instead.
        end = stop if end + size > stop else end
        windows.append((start, end))
        start = end
    return tuple(windows)


class Moments(NamedTuple):
    """Running mean (*g, D) and scatter, (*g, D) or (*g, D, D), of the positions in a window; both float64."""

    count: int
    mean: Tensor
    scatter: Tensor


def start_moments(q: Tensor, dense: bool) -> Moments:
    """No observations yet, for positions q (*g, C, D)."""
    mean = torch.zeros_like(q[..., 0, :], dtype=torch.float64)
    return Moments(0, mean, mean.new_zeros(*mean.shape, mean.shape[-1]) if dense else torch.zeros_like(mean))


def add_to_moments(moments: Moments, q: Tensor) -> Moments:
    """Add the C positions q (*g, C, D), by the pairwise update of Chan, Golub & LeVeque (1983)."""
    q = q.double()
    dense = moments.scatter.ndim > moments.mean.ndim
    num = q.shape[-2]
    total = moments.count + num
    batch_mean = q.mean(-2)
    centred = q - batch_mean.unsqueeze(-2)
    shift = batch_mean - moments.mean
    factor = moments.count * num / total
    if dense:
        scatter = centred.mT @ centred + factor * shift.unsqueeze(-1) * shift.unsqueeze(-2)
    else:
        scatter = centred.square().sum(-2) + factor * shift.square()
    return Moments(total, moments.mean + shift * (num / total), moments.scatter + scatter)


def estimate_metric(moments: Moments, current: Metric) -> Metric:
    r"""The metric of a window: n/(n+5) S + 5/(n+5) 1e-3 I, S the covariance of its n positions (all chains pooled).

    A group whose estimate is not finite or not positive definite keeps its `current` metric.
    """
    n = moments.count
    scatter = moments.scatter
    if not current.dense and scatter.ndim > moments.mean.ndim:
        scatter = scatter.diagonal(dim1=-2, dim2=-1)
    covariance = scatter / max(n - 1, 1) * (n / (n + 5))
    floor = 1e-3 * 5 / (n + 5)
    if not current.dense:
        estimate = (covariance + floor).to(current.inverse_mass)
        usable = (estimate.isfinite() & (estimate > 0)).all(-1, keepdim=True)
        estimate = torch.where(usable, estimate, current.inverse_mass)
        return Metric(estimate, estimate.sqrt(), dense=False)
    estimate = covariance + floor * torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device)
    estimate = estimate.to(current.inverse_mass)
    root, info = torch.linalg.cholesky_ex(estimate)
    usable = ((info == 0) & estimate.isfinite().all(-1).all(-1))[..., None, None]
    return Metric(
        torch.where(usable, estimate, current.inverse_mass), torch.where(usable, root, current.root), dense=True
    )
