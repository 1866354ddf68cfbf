r"""What the stochastic-gradient samplers share: minibatches, noise and step-size schedules.

The target is known through estimates. A log density is a callable of positions q (*g, C, D) and rows (C, n), the data
points that each of the C chains looks at, with values (*g, C) on the scale of all N data:

    log p(q) + N / n * sum_{i in rows} log p(y_i | q),

so that value and gradient are unbiased; rows = None asks for all data. No step is ever accepted or rejected, and the
draws follow the target up to a bias that vanishes with the step size and with the variance of the gradient. A chain
has its own stream of noise and its own order of the data: it does the same alone and among others.

References: Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics; Ma, Chen, Fox (2015),
arXiv 1506.04696.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, Streams
from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.samplers._gradients import ValueAndGradient
from bayesdl.samplers.base import check_initial, check_log_density

BatchLogDensity: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
BatchGradient: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

_NOISE_BLOCK = 2**16  # normal numbers that a chain draws in one go, at most


class Info(NamedTuple):
    """What a reader wants to know of a step; tensors (*g, C).

    Attributes:
        log_density: The minibatch estimate that the step went by, at the position before it.
        clipped: Share of the coordinates whose drift was cut at `max_drift`.
        noise_clamped: Share of the coordinates whose noise was switched off because its variance came out negative.
    """

    log_density: Tensor
    clipped: Tensor
    noise_clamped: Tensor


class Plan(NamedTuple):
    """What to do at each of the T steps of a run.

    Attributes:
        step_sizes: The step size.
        noisy: Whether noise is added.
        adapt: Whether the scales adapt.
        keep: How often the position after the step is kept as a draw.
        num_warmup: Steps before sampling begins.
    """

    step_sizes: list[float]
    noisy: list[bool]
    adapt: list[bool]
    keep: list[int]
    num_warmup: int


class StochasticRun(NamedTuple):
    """The draws of one run of a stochastic-gradient sampler and what happened on the way.

    Attributes:
        draws: Positions, (*g, C, num_draws, D).
        stats: One value per chain and draw, (*g, C, num_draws): "log_density_estimate" (of the last minibatch before
            the draw) and "step_size".
        trace: Estimates of the log density over the whole run, up to 200, (*g, C, T).
        step_sizes: The schedule, one value a step.
        num_batches: Minibatch gradients per chain.
        num_gradients: The same in passes over all data.
        clipped_fraction: Share of coordinates and sampling steps (with noise, after warm-up) whose drift was cut at
            `max_drift`.
        noise_clamped_fraction: Share of coordinates and sampling steps in which the noise was switched off.
        seconds: Wall-clock time; of all its parts, where the run was interrupted and resumed.
        stopped_by: "num_draws", or "max_gradients" where that budget was spent first.
    """

    draws: Tensor
    stats: dict[str, Tensor]
    trace: Tensor
    step_sizes: list[float]
    num_batches: int
    num_gradients: float
    clipped_fraction: float
    noise_clamped_fraction: float
    seconds: float
    stopped_by: str = "num_draws"


# ---- schedules -------------------------------------------------------------------------------------------------------


def polynomial_schedule(step_size: float, num_steps: int, *, offset: float, power: float) -> Tensor:
    r"""eps_t = a (b + t)^{-gamma} for t = 0, 1, …, with b = offset, gamma = power and eps_0 = step_size; (T).

    With 1/2 < gamma <= 1 the steps sum to infinity and their squares do not, so that the bias of the Langevin samplers
    vanishes in the long run; over a given budget a constant step is often the better trade.

    Reference: Welling & Teh (2011), section 3.
    """
    _checks.inside("polynomial_schedule", "step_size", step_size, 0.0, math.inf)
    _checks.inside("polynomial_schedule", "offset", offset, 0.0, math.inf)
    _checks.at_least("polynomial_schedule", "power", power, 0.0)
    _checks.at_least("polynomial_schedule", "num_steps", num_steps, 1, integer=True)
    return step_size * (1 + torch.arange(num_steps, dtype=torch.float64) / offset) ** -power


def cosine_cycles(step_size: float, num_steps: int, num_cycles: int) -> Tensor:
    r"""eta_k = eta_0 / 2 (cos(pi mod(k - 1, L) / L) + 1) for k = 1 … K, with L = ceil(K / M); (K).

    Each of the M cycles starts at `step_size` and comes down to almost 0.

    Reference: Zhang et al. (2020), arXiv 1902.03932, equation 1.
    """
    _checks.inside("cosine_cycles", "step_size", step_size, 0.0, math.inf)
    _checks.at_least("cosine_cycles", "num_cycles", num_cycles, 1, integer=True)
    _checks.at_least("cosine_cycles", "num_steps", num_steps, num_cycles, integer=True)
    length = -(-num_steps // num_cycles)
    place = torch.arange(num_steps, dtype=torch.float64).remainder(length)
    return 0.5 * step_size * ((math.pi * place / length).cos() + 1)


def kept_steps(step_sizes: list[float], num_draws: int) -> list[int]:
    """How often the position after each step is kept: `num_draws` times in all, evenly in algorithmic time.

    A sampler that moves by small steps stays longer wherever it is, so draws are to be weighted by the step size. Here
    they are kept at equal increments of the sum of the step sizes instead, and all weigh the same: for constant steps
    every k-th one, the last one always.
    """
    elapsed = torch.tensor(step_sizes, dtype=torch.float64).cumsum(0)
    marks = elapsed[-1] * torch.arange(1, num_draws + 1, dtype=torch.float64) / num_draws
    # a mark that falls on a step belongs to it, whatever the rounding of the sum
    places = torch.searchsorted(elapsed, marks * (1 - 1e-9)).clamp(max=len(step_sizes) - 1)
    return torch.bincount(places, minlength=len(step_sizes)).tolist()


def simple_plan(step_size: float | Tensor, num_warmup: int, num_draws: int, thin: int, where: str) -> Plan:
    """Warm-up that adapts, then sampling with everything frozen, with noise from the first step on.

    Args:
        step_size: One number, or a schedule with one entry for each of the num_warmup + num_draws * thin steps.
        where: The name in error messages.
    """
    _checks.at_least(where, "num_warmup", num_warmup, 0, integer=True)
    _checks.at_least(where, "num_draws", num_draws, 1, integer=True)
    _checks.at_least(where, "thin", thin, 1, integer=True)
    total = num_warmup + num_draws * thin
    schedule = torch.as_tensor(step_size, dtype=torch.float64)
    if schedule.ndim and tuple(schedule.shape) != (total,):
        wanted = f"step_size must be a number or a schedule of shape ({total},), one entry a step."
        fail(ShapeError, where, wanted, got=str(tuple(schedule.shape)), fix="num_steps = num_warmup + num_draws * thin")
    if not bool(((schedule > 0) & schedule.isfinite()).all()):
        fail(SettingError, where, "step sizes must be positive.", got=str(step_size), fix="pass 1e-3, say")
    sizes = schedule.expand(total).tolist()
    keep = [0] * num_warmup + kept_steps(sizes[num_warmup:], num_draws)
    adapt = [t < num_warmup for t in range(total)]
    return Plan(sizes, [True] * total, adapt, keep, num_warmup)


# ---- minibatches and noise -------------------------------------------------------------------------------------------


def batch_gradient(
    log_density: BatchLogDensity, *, chain_batch: int | None = None, compile: bool = False
) -> ValueAndGradient:
    """Estimates of the log density and of its gradient, by one backward pass; see `samplers.base.value_and_grad`."""
    return ValueAndGradient(log_density, chain_batch, compile)


class Minibatches:
    """Endless rows (C, n) of the data: every chain passes over all of it, in an order of its own, anew each epoch.

    An epoch is cut into ceil(N / batch_size) batches as equal as possible, so that the gradients of an epoch, each on
    the scale of all data and weighted by n / N, add up to the full gradient. Where one batch is enough it is None: all.
    """

    def __init__(self, seed: Seed, num_chains: int, num_data: int, batch_size: int, device: torch.device) -> None:
        self._streams = Streams(seed, num_chains, device)
        self._num_data = num_data
        self._num_parts = -(-num_data // batch_size)
        self._before: Tensor | None = None
        self._left: list[Tensor] = []

    def next(self) -> Tensor | None:
        """The next batch."""
        if self._num_parts == 1:
            return None
        if not self._left:
            self._before = self._streams.state()
            self._shuffle()
        return self._left.pop()

    def state(self) -> tuple[Tensor | None, int]:
        """Where the passes over the data stand: the streams before the last order was drawn, and the batches left."""
        return self._before, len(self._left)

    def load(self, state: tuple[Tensor | None, int]) -> None:
        """Go on from where `state` stood."""
        self._before, num_left = state
        if self._before is not None:
            self._streams.load(self._before)
            self._shuffle()
            del self._left[num_left:]

    def _shuffle(self) -> None:
        order = self._streams.permutation(self._num_data)
        self._left = list(order.tensor_split(self._num_parts, -1))[::-1]


class Noise:
    """Standard normal numbers (C, D) for each step, drawn many steps at a time."""

    def __init__(self, seed: Seed, q: Tensor) -> None:
        self._streams, self._like = Streams(seed, q.shape[-2], q.device), q
        # by D alone: the numbers of a chain must not depend on how many others there are
        self._block = max(1, min(64, _NOISE_BLOCK // q.shape[-1]))
        self._before: Tensor | None = None
        self._left: list[Tensor] = []

    def next(self) -> Tensor:
        """The numbers of the next step."""
        if not self._left:
            self._before = self._streams.state()
            self._refill()
        return self._left.pop()

    def state(self) -> tuple[Tensor | None, int]:
        """Where the streams stood before the last block was drawn, and the steps left of it."""
        return self._before, len(self._left)

    def load(self, state: tuple[Tensor | None, int]) -> None:
        """Go on from where `state` stood."""
        self._before, num_left = state
        if self._before is not None:
            self._streams.load(self._before)
            self._refill()
            del self._left[num_left:]

    def _refill(self) -> None:
        block = self._streams.normal(self._block, self._like.shape[-1], like=self._like)
        self._left = list(block.unbind(1))[::-1]


# ---- the door --------------------------------------------------------------------------------------------------------


def check_problem(
    where: str, log_density: BatchLogDensity, initial: Tensor, num_data: int, batch_size: int | None
) -> None:
    """Refuse initial positions, a log density or batches that cannot be used; see `samplers.base`."""
    _checks.at_least(where, "num_data", num_data, 1, integer=True)
    if batch_size is not None:
        _checks.at_least(where, "batch_size", batch_size, 1, integer=True)
    check_initial(where, initial)
    check_log_density(where, lambda q: log_density(q, None), initial)
