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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl.samplers._low_rank import SETTLED, Kept, geometric_mean, keep, start_kept
from bayesdl.samplers._low_rank import estimate as low_rank
from bayesdl.samplers.base import ValueAndGrad
from bayesdl.samplers.hamiltonian import Metric, State, diagonal_metric, energy, leapfrog, low_rank_metric

RANK = 32  # directions of a low-rank metric
EARLY_WINDOWS = 2  # in which chains may still be on their way
_GAMMA, _KAPPA, _T0 = 0.75, 0.75, 10.0
FAR = 8.0  # how far below the others, in units of its usual change, a log density shows a chain on its way


class DualAveraging(NamedTuple):
    """State of the step-size search, every tensor (*g, C) or (*g, 1) in float64."""

    log_step_size: Tensor
    log_average: Tensor
    error_sum: Tensor
    centre: Tensor
    count: int


def start_dual_averaging(step_size: Tensor) -> DualAveraging:
    """Begin at `step_size`, towards which the search stays drawn: it is of the right order already."""
    log_step = step_size.double().log()
    return DualAveraging(log_step, log_step, torch.zeros_like(log_step), log_step, 0)


def dual_average(state: DualAveraging, acceptance: Tensor, target: float) -> DualAveraging:
    r"""One update from acceptance rates in the shape of the state: of each chain, or their mean.

    With H_t = target - acceptance,

        log eps_{t+1}     = mu - sqrt(t) / gamma / (t + t0) * sum_{i<=t} H_i
        log eps_bar_{t+1} = t^{-kappa} log eps_{t+1} + (1 - t^{-kappa}) log eps_bar_t,

    mu the log step at the start, gamma = 0.75 (1 - target), t0 = 10, kappa = 0.75. Sampling uses eps_bar.

    Near the target the acceptance falls by a multiple of 1 - target per unit of log eps, so errors are answered in that
    proportion. A gamma of 0.05 at all targets, as in Stan, answers an error by up to 3.2 times its size: below 0.8 the
    steps swing with every noise in the rates, and since the acceptance falls faster above the right step than it rises
    below, the mean of the swings is too small.
    """
    t = state.count + 1
    error_sum = state.error_sum + (target - acceptance.double())
    log_step = state.centre - math.sqrt(t) / (_GAMMA * (1 - target)) / (t + _T0) * error_sum
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


def windows(num_warmup: int, num_chains: int = 1) -> tuple[tuple[int, int], ...]:
    """The windows [start, end) of warm-up over which a metric is estimated from positions and gradients.

    They begin with transition 5 and last 10, 20, 40, ... transitions (the last one takes what is left), for such a
    metric is of use after a few draws; with 16 chains or more with transition 3, and last 5, 10, 20, .... Then 50
    transitions, or a quarter of fewer than 200, adapt the step size to the final metric. Below 20 transitions there
    is none.
    """
    if num_warmup < 20:
        return ()
    stop = num_warmup - min(50, num_warmup // 4)
    found = []
    start, size = (5, 10) if num_chains < 16 else (3, 5)
    start = min(start, num_warmup // 10)
    while start < stop:
        # A window that its successor could not follow in full length runs to the end instead.
        end = stop if start + 3 * size > stop else start + size
        found.append((start, end))
        start, size = end, 2 * size
    return tuple(found)


def count_chains(initial: Any) -> int:
    """C of initial positions (*g, C, D) that may be unfit; then 1."""
    return initial.shape[-2] if isinstance(initial, Tensor) and initial.ndim > 1 else 1


def slow_windows(num_warmup: int) -> tuple[tuple[int, int], ...]:
    """The windows [start, end) of warm-up for a metric from positions alone, each replacing the one before.

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


def arrived(before: Tensor, state: State) -> Tensor:
    """Whether each chain is where the others are, (*g, C): its log density is not far below the best.

    Far means eight times the larger of sqrt(D / 2), the standard deviation of the log density of a Gaussian, and thrice
    the median change in a transition, from `before` (*g, C). A chain that is not may be on its way, or stuck; no
    estimate of the target's shape should rest on it.
    """
    now = state.log_density.double()
    change = (now - before.double()).abs().nan_to_num(nan=0.0, posinf=0.0).quantile(0.5, -1, keepdim=True)
    unit = torch.clamp(3 * change, min=(state.q.shape[-1] / 2) ** 0.5)
    return now >= now.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True) - FAR * unit


def stand_ins(state: State, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and gradients (*g, C, D), in which chains that count (*g, C) stand in for those that do not."""
    if bool(counts.all()):
        return state.q, state.grad
    order = counts.byte().argsort(stable=True, dim=-1, descending=True)
    place = torch.arange(counts.shape[-1], device=counts.device) % counts.sum(-1, keepdim=True).clamp(min=1)
    index = order.take_along_dim(place, -1).unsqueeze(-1)
    return state.q.take_along_dim(index, -2), state.grad.take_along_dim(index, -2)


class Moments(NamedTuple):
    """What a window has seen, all chains pooled.

    Attributes:
        count: Positions so far.
        mean: Their mean, (*g, D), float64.
        scatter: The sum of their squared deviations, (*g, D), or of the outer products, (*g, D, D); float64.
        gradients: The same of the gradients there; None where they are not used.
        kept: Positions and gradients themselves, thinned, for directions; else None.
    """

    count: int
    mean: Tensor
    scatter: Tensor
    gradients: Moments | None = None
    kept: Kept | None = None


def start_moments(q: Tensor, dense: bool, *, gradients: bool = False, rank: int = 0) -> Moments:
    """No observations yet, for positions q (*g, C, D); rows are kept for a metric of `rank` directions above 0."""
    mean = torch.zeros_like(q[..., 0, :], dtype=torch.float64)
    scatter = mean.new_zeros(*mean.shape, mean.shape[-1]) if dense else torch.zeros_like(mean)
    of_gradients = Moments(0, mean, torch.zeros_like(scatter)) if gradients else None
    return Moments(0, mean, scatter, of_gradients, start_kept(q, rank) if rank else None)


def moments_for(q: Tensor, metric: Metric, *, whole: bool = False) -> Moments:
    """No observations yet, with room for what `metric` is estimated from; `whole` asks for the covariance anyway."""
    rank = 0 if metric.stretch is None else metric.stretch.shape[-1]
    rank = q.shape[-1] if metric.dense else rank
    return start_moments(q, metric.dense or whole, gradients=True, rank=rank)


def add_to_moments(moments: Moments, q: Tensor, grad: Tensor | None = None) -> Moments:
    """Add the C positions q (*g, C, D), by the pairwise update of Chan, Golub & LeVeque (1983).

    `grad`, the gradients there, must be given where `moments` keeps them.
    """
    gradients, kept = moments.gradients, moments.kept
    if grad is not None:
        gradients = None if gradients is None else add_to_moments(gradients, grad)
        kept = None if kept is None else keep(kept, q, grad)
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
    return Moments(total, moments.mean + shift * (num / total), moments.scatter + scatter, gradients, kept)


def estimate_metric(moments: Moments, current: Metric) -> Metric:
    r"""The metric of a window, of the kind of the `current` one, from its n positions (all chains pooled).

    Where the moments have no gradients: n/(n+5) S + 5/(n+5) 1e-3 I with S the covariance of the positions, or its
    diagonal. With gradients, the metric under which both have the same whitened covariance:

        sqrt(Var q / Var g)                     diagonal,
        A with A Cov(g) A = Cov(q)              dense, where n >= 4 D,

    which finds the scale of a coordinate before the chains have crossed it; for fewer positions and for a low-rank
    metric, that diagonal and the directions of `_low_rank.estimate`. A group whose estimate is not finite or not
    positive definite keeps its `current` metric.
    """
    if current.dense:
        return _dense_estimate(moments, current)
    diagonal = _diagonal_estimate(moments).to(current.inverse_mass)
    usable = (diagonal.isfinite() & (diagonal > 0)).all(-1, keepdim=True)
    if current.stretch is None or moments.kept is None or current.directions is None:
        return diagonal_metric(torch.where(usable, diagonal, current.inverse_mass))
    scales = torch.where(usable, diagonal, 1.0).sqrt()
    basis, stretch = low_rank(moments.kept, scales, current.stretch.shape[-1])
    usable = usable & basis.isfinite().all(-1).all(-1, keepdim=True) & stretch.isfinite().all(-1, keepdim=True)
    found = low_rank_metric(scales.square(), basis.to(scales), stretch.to(scales))
    kept = torch.where(usable, found.inverse_mass, current.inverse_mass)
    return Metric(
        kept,
        kept.sqrt(),
        dense=False,
        directions=torch.where(usable.unsqueeze(-1), found.directions, current.directions),
        stretch=torch.where(usable, found.stretch, current.stretch),
    )


def _diagonal_estimate(moments: Moments) -> Tensor:
    """Variances (*g, D) in float64: from positions and gradients, or shrunk ones from positions alone."""
    n, scatter = moments.count, _diagonal_of(moments)
    if moments.gradients is None:
        return scatter / max(n - 1, 1) * (n / (n + 5)) + 1e-3 * 5 / (n + 5)
    return (scatter / _diagonal_of(moments.gradients)).sqrt()


def _diagonal_of(moments: Moments) -> Tensor:
    whole = moments.scatter.ndim > moments.mean.ndim
    return moments.scatter.diagonal(dim1=-2, dim2=-1) if whole else moments.scatter


def _dense_estimate(moments: Moments, current: Metric) -> Metric:
    n, dim = moments.count, moments.mean.shape[-1]
    eye = torch.eye(dim, dtype=torch.float64, device=moments.mean.device)
    if moments.gradients is None:
        estimate = moments.scatter / max(n - 1, 1) * (n / (n + 5)) + 1e-3 * 5 / (n + 5) * eye
    else:
        estimate = _dense_from_gradients(moments, moments.gradients.scatter, eye)
    estimate = estimate.to(current.inverse_mass)
    root, info = torch.linalg.cholesky_ex(estimate)
    usable = ((info == 0) & estimate.isfinite().all(-1).all(-1))[..., None, None]
    return Metric(
        torch.where(usable, estimate, current.inverse_mass), torch.where(usable, root, current.root), dense=True
    )


def _dense_from_gradients(moments: Moments, scatter: Tensor, eye: Tensor) -> Tensor:
    """M^{-1} (*g, D, D); NaN where it cannot be had."""
    variances = _diagonal_estimate(moments)
    usable = (variances.isfinite() & (variances > 0)).all(-1)[..., None, None]
    root = torch.where(usable.squeeze(-1), variances, 1.0).sqrt()
    outer = root.unsqueeze(-1) * root.unsqueeze(-2)
    if moments.count >= 4 * len(eye):
        wide, steep = moments.scatter / moments.count / outer, scatter / moments.count * outer
        middle = geometric_mean(wide.nan_to_num() + SETTLED * eye, steep.nan_to_num() + SETTLED * eye)
    else:
        basis, stretch = low_rank(moments.kept, root, len(eye))
        middle = eye + (basis * (stretch - 1).unsqueeze(-2)) @ basis.mT
    estimate = 0.5 * (middle + middle.mT) * outer
    return torch.where(usable, estimate, torch.nan)
