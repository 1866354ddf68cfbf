r"""How far a microcanonical trajectory should go: from the width of the target, then from the chains' own memory.

A particle of unit speed crosses a whitened target of D coordinates in a time of about sqrt(trace of the covariance),
which is sqrt(D) where whitening is perfect. How many steps the chains then need for an effectively independent draw
says how far that guess was off.

Reference: Robnik & Seljak (2023), arXiv 2303.18221; Robnik, Cohn-Gordon & Seljak (2025), arXiv 2503.01707.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.samplers import adaptation
from bayesdl.samplers.adaptation import Moments
from bayesdl.samplers.hamiltonian import Metric

MAX_DENSE = 500  # coordinates up to which covariances are kept whole
FEWEST = 10  # rows from which a memory can be told
_WATCHED = 32  # coordinates whose memory is measured, at most
_ROWS = 1024  # transitions of it that are kept, at most


class Schedule(NamedTuple):
    """The parts of a warm-up.

    Attributes:
        together: The transition from which on the chains of a group share a step size.
        windows: Of the metric, [start, end).
        watch: The transitions [start, end) over which the chains' memory is measured; empty in a short warm-up.
    """

    together: int
    windows: tuple[tuple[int, int], ...]
    watch: tuple[int, int]


def schedule(num_warmup: int, *, settle: bool) -> Schedule:
    """Windows as in `adaptation.slow_windows`, and the watch after the last of them.

    With `settle` it is the middle half of those last transitions, a quarter of a short warm-up, so that the step size
    can follow the metric before it and the length after it; else the last quarter of all, for which the windows make
    room.
    """
    if settle and 20 <= num_warmup < 150:
        windows: tuple[tuple[int, int], ...] = ((int(0.15 * num_warmup), num_warmup - num_warmup // 4),)
    else:
        windows = adaptation.slow_windows(num_warmup - (0 if settle or num_warmup < 40 else num_warmup // 4))
    if num_warmup < 40:
        return Schedule(windows[0][0] if windows else 0, windows, (num_warmup, num_warmup))
    rest = num_warmup - windows[-1][1]
    watched = (num_warmup - rest + rest // 4, num_warmup - rest // 4)
    if not settle:
        watched = (num_warmup - num_warmup // 4, num_warmup)
    return Schedule(windows[0][0], windows, watched)


def metric_for(initial: Tensor, num_warmup: int, inverse_mass: Tensor | None) -> str:
    """The metric that "auto" means: dense where the longest window has five positions or more for each coordinate."""
    if not isinstance(initial, Tensor) or initial.ndim < 2:
        return "diagonal"
    num_chains, dim = initial.shape[-2:]
    if inverse_mass is not None:
        return "dense" if inverse_mass.ndim >= 2 and inverse_mass.shape[-2] == dim else "diagonal"
    longest = max((end - start for start, end in schedule(num_warmup, settle=True).windows), default=0)
    return "dense" if dim <= MAX_DENSE and longest * num_chains >= 5 * dim else "diagonal"


def whitened_variances(moments: Moments, metric: Metric) -> Tensor:
    """Variances of the positions of a window, whitened by the metric, (*g, D) in float64 and ascending.

    Along its principal axes, where the whole covariance was kept, else along the coordinates.
    """
    scatter = moments.scatter / max(moments.count - 1, 1)
    if scatter.ndim == moments.mean.ndim:
        return (scatter / metric.variances().double()).nan_to_num(nan=1.0).sort(-1).values
    wide = Metric(*(part.double() if isinstance(part, Tensor) else part for part in metric))
    whitened = wide.whiten_positions(wide.whiten_positions(scatter).mT)
    return torch.linalg.eigvalsh(0.5 * (whitened + whitened.mT).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))


def widest(moments: Moments, metric: Metric) -> Tensor:
    """sqrt(D times the largest whitened variance), (*g) in float64, free of what chance adds to it.

    From n positions the largest of D estimated variances of 1 comes out near (1 + sqrt(r))^2, r = D / n. Above that, an
    estimate l stands for the variance v with l = v + r v / (v - 1) (Baik & Silverstein, 2006), which is solved for v.
    """
    largest = whitened_variances(moments, metric)[..., -1].clamp(min=0.0)
    dim = moments.mean.shape[-1]
    if moments.scatter.ndim > moments.mean.ndim:
        ratio = dim / max(moments.count, 1)
        half = 0.5 * (largest + 1 - ratio)
        outlier = half + (half.square() - largest).clamp(min=0.0).sqrt()
        largest = torch.where(largest > (1 + ratio**0.5) ** 2, outlier, largest.clamp(max=1.0))
    return (dim * largest).clamp(min=1e-30).sqrt()


def average_width(moments: Moments, metric: Metric) -> Tensor:
    """sqrt(trace of the whitened covariance), (*g) in float64."""
    return whitened_variances(moments, metric).clamp(min=0.0).sum(-1).clamp(min=1e-30).sqrt()


def given_length(where: str, length: float | Tensor, q: Tensor) -> Tensor:
    """A trajectory length given as a number or (*g), for chains at q (*g, C, D): (*g)."""
    value = torch.as_tensor(length, dtype=q.dtype, device=q.device).detach()
    groups = tuple(q.shape[:-2])
    if value.ndim and tuple(value.shape) != groups:
        wanted = f"trajectory_length must be a number or have shape {groups}, one per group."
        fail(ShapeError, where, wanted, got=str(tuple(value.shape)), fix="pass one number")
    if not bool(((value > 0) & value.isfinite()).all()):
        fail(SettingError, where, "trajectory_length must be positive.", got=str(length), fix="None tunes it")
    return value.expand(groups).clone()


class Watch(NamedTuple):
    """Some coordinates of the chains over the transitions watched, (*g, C, rows, watched), written in place.

    `stride` transitions lie between two rows, so that a long warm-up takes no more memory than a short one.
    """

    rows: Tensor
    filled: int
    stride: int


def start_watch(q: Tensor, num_transitions: int) -> Watch:
    """Nothing seen yet, of chains at q (*g, C, D). At most 32 coordinates, evenly spaced, in 1024 rows."""
    stride = max(1, -(-num_transitions // _ROWS))
    rows = -(-num_transitions // stride)
    return Watch(q.new_zeros(*q.shape[:-1], rows, min(q.shape[-1], _WATCHED)), 0, stride)


def watch(seen: Watch, q: Tensor, transition: int) -> Watch:
    """Take in the positions q (*g, C, D) after one more transition, the first being number 0."""
    if transition % seen.stride or seen.filled == seen.rows.shape[-2]:
        return seen
    places = torch.linspace(0, q.shape[-1] - 1, seen.rows.shape[-1], device=q.device).round().long()
    seen.rows[..., seen.filled, :] = q.index_select(-1, places)
    return seen._replace(filled=seen.filled + 1)


def memory(seen: Watch) -> Tensor:
    """Transitions per effectively independent draw, averaged over the coordinates watched, (*g) in float64."""
    times = autocorrelation_time(seen.rows[..., : seen.filled, :])
    return seen.stride * times.mean(-1)


def autocorrelation_time(draws: Tensor) -> Tensor:
    r"""Draws per effectively independent draw, (*g, K) in float64, of draws (*g, C, N, K) from C chains.

    1 + 2 sum_t rho_t, the autocorrelations rho_t pooled over chains with the variance between them counted as memory,
    and the sum stopped where that of two neighbours turns negative and kept from rising (Geyer, 1992). It is at least
    1 / log10(C N), as in Stan.

    Cost: O(C N log N) for each of the K coordinates.
    """
    num_chains, num = draws.shape[-3:-1]
    x = draws.double()
    mean = x.mean(-2, keepdim=True)
    spectrum = torch.fft.rfft(x - mean, n=2 * num, dim=-2)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * num, dim=-2)[..., :num, :].mean(-3) / num
    within = covariance[..., 0, :] * (num / max(num - 1, 1))
    total = covariance[..., 0, :]
    if num_chains > 1:
        total = total + mean.squeeze(-2).var(-2)
    rho = 1 - (within.unsqueeze(-2) - covariance) / total.clamp(min=1e-300).unsqueeze(-2)
    rho[..., 0, :] = 1.0
    even = num // 2 * 2
    pairs = rho[..., :even, :].unflatten(-2, (-1, 2)).sum(-2)
    positive = (pairs > 0).cumprod(-2)
    falling = torch.cummin(pairs, -2).values
    time = 2 * (falling * positive).sum(-2) - 1
    return time.clamp(min=1 / max(math.log10(num_chains * num), 1.0))
