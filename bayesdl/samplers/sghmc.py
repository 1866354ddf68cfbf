r"""Scale-adapted stochastic gradient Hamiltonian Monte Carlo.

Momentum m with friction a, masses from the size of the gradients. With g an unbiased estimate of the gradient of
U = -log density on the scale of all data, h = eps^2 / sqrt(v) for each coordinate,

    m <- (1 - a) m - h g + N(0, 2 a h - eps^4),    q <- q + m.

In warm-up v follows the squared gradients, over a window tau that shrinks where the mean of the gradient is large
against its spread:

    tau <- tau - tau mean^2 / v + 1;   mean <- mean + (g - mean) / (tau + 1);   v <- v + (g^2 - v) / (tau + 1).

The term eps^4 = h^2 v is what the noise of the gradient already adds if its variance is v; with all data in every
step the gradient has no noise, and nothing is subtracted.

The hazard: where sqrt(v) >= 2 a / eps^2 nothing remains to be added. The method as published then goes on in silence,
without noise, and what looks like sampling is gradient descent with momentum. Here every step reports the share of
coordinates concerned (`Info.noise_clamped`).

References: Chen, Fox, Guestrin (2014), arXiv 1402.4102; Springenberg, Klein, Falkner, Hutter (2016), Bayesian
optimization with robust Bayesian neural networks.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers._stochastic_loop import drive
from bayesdl.samplers.stochastic import (
    BatchGradient,
    BatchLogDensity,
    Info,
    StochasticRun,
    batch_gradient,
    check_problem,
    simple_plan,
)


class State(NamedTuple):
    """What the next step needs, every tensor (*g, C, D).

    Attributes:
        q: Positions.
        momentum: The last move.
        window: tau, the number of past gradients that the running means remember; at least 1.
        mean: Running mean of the gradient of U.
        square: v, running mean of its square; at least mean^2.
    """

    q: Tensor
    momentum: Tensor
    window: Tensor
    mean: Tensor
    square: Tensor


class Parameters(NamedTuple):
    """Settings of a step.

    Attributes:
        friction: a in (0, 1), the share of the momentum that a step loses.
        gradient_noise: Whether the gradient is an estimate, whose variance is subtracted from the noise.
        max_drift: Most that the gradient may change a coordinate's momentum in one step; inf for no limit.
    """

    friction: float = 0.05
    gradient_noise: bool = True
    max_drift: float = math.inf


def init(q: Tensor) -> State:
    """The state at q (*g, C, D): at rest, with all scales 1."""
    ones = torch.ones_like(q)
    return State(q, torch.zeros_like(q), ones, ones, ones)


def step(
    gradient: BatchGradient,
    state: State,
    parameters: Parameters,
    rows: Tensor | None,
    noise: Tensor | None,
    step_size: float,
    adapt: bool,
) -> tuple[State, Info]:
    """One step of every chain: a pure function of its arguments.

    Args:
        gradient: Estimates (*g, C) of the log density and (*g, C, D) of its gradient, at positions and rows.
        state: Where the chains are.
        parameters: Settings.
        rows: The data points of each chain (C, n); None for all.
        noise: Standard normal numbers that broadcast to (*g, C, D); None for descent with momentum.
        step_size: eps.
        adapt: Whether this gradient enters the scales, before they are used.

    Cost: one minibatch gradient.
    """
    friction, gradient_noise, max_drift = parameters
    log_density, slope = gradient(state.q, rows)
    window, mean, square = state.window, state.mean, state.square
    if adapt:
        window = window - window * mean.square() / square + 1
        rate = (window + 1).reciprocal()
        mean = torch.lerp(mean, -slope, rate)
        square = torch.lerp(square, slope.square(), rate)
    h = step_size**2 * square.rsqrt()
    drift = h * slope
    clipped = clamped = torch.zeros_like(log_density)
    if max_drift < math.inf:
        kept = drift.clamp(-max_drift, max_drift)
        drift, clipped = kept, (kept != drift).to(log_density).mean(-1)
    momentum = torch.add(drift, state.momentum, alpha=1 - friction)
    if noise is not None:
        variance = 2 * friction * h - (step_size**4 if gradient_noise else 0.0)
        clamped = (variance <= 0).to(log_density).mean(-1)
        momentum = torch.addcmul(momentum, variance.clamp(min=0).sqrt(), noise)
    return State(state.q + momentum, momentum, window, mean, square), Info(log_density, clipped, clamped)


def run(
    log_density: BatchLogDensity,
    initial: Tensor,
    *,
    num_data: int,
    num_warmup: int,
    num_draws: int,
    step_size: float | Tensor,
    friction: float = 0.05,
    batch_size: int | None = None,
    max_drift: float = math.inf,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> StochasticRun:
    """Warm up, then draw: `num_warmup` steps, then `num_draws * thin` with the scales frozen.

    Groups *g are independent problems of one shape; all see the same random numbers and the same rows.

    Args:
        log_density: Estimates on the scale of all data: q (*g, C, D) and rows (C, n), or None for all, to (*g, C).
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_data: N, the number of data points that rows index.
        num_warmup: Steps that adapt; not kept. At 0 all scales are 1.
        num_draws: Draws kept per chain.
        step_size: A number, or a schedule with one entry a step.
        friction: Share of the momentum that a step loses.
        batch_size: Points a chain looks at in a step; all for None.
        max_drift: Most that the gradient may change a coordinate's momentum in one step.
        thin: Steps a draw.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress: Show a bar.
        checkpoint, max_gradients, chain_batch, compile: A folder to save to and resume from, a budget in passes over
            the data, how many chains to evaluate at a time, and whether by torch.compile; see `samplers.base`.

    Raises:
        ShapeError, DtypeError: `initial`, a schedule or the values of `log_density` have the wrong shape or dtype.
        SettingError: A setting is out of range, `log_density` carries no gradient, `checkpoint` is another run's, or
            the budget ends before the first draw.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: `log_density` is nowhere finite at the initial points, or a chain left the finite numbers.

    Cost: one minibatch gradient a step; memory for the draws, C * num_draws * D numbers a group.

    Reference: Springenberg et al. (2016), section 4.
    """
    _checks.inside("sghmc.run", "friction", friction, 0.0, 1.0)
    if max_drift != math.inf:
        _checks.inside("sghmc.run", "max_drift", max_drift, 0.0, math.inf)
    plan = simple_plan(step_size, num_warmup, num_draws, thin, "sghmc.run")
    gradient = batch_gradient(log_density, chain_batch=chain_batch, compile=compile)
    check_problem("sghmc.run", gradient.log_density, initial, num_data, batch_size)
    parameters = Parameters(friction, batch_size is not None and batch_size < num_data, max_drift)
    return drive(
        "sghmc.run",
        gradient,
        step,
        parameters,
        init(initial.detach()),
        plan,
        num_data=num_data,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        name="SGHMC",
        checkpoint=checkpoint,
        max_gradients=max_gradients,
    )
