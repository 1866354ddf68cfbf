r"""Stochastic gradient Langevin dynamics, plain and preconditioned.

With g an unbiased estimate of the gradient of U = -log density on the scale of all data, and a diagonal G,

    q <- q - eps/2 G g + N(0, eps G).

Plain SGLD has G = 1. The preconditioned form has G = 1 / (damping + sqrt(v)), v the running mean of g^2 (RMSprop), so
that steep coordinates take small steps. Its original keeps updating v while it draws; then G depends on the position
and the drift lacks the term eps/2 dG/dq, which is commonly left out and biases the draws. Here v adapts in warm-up
and is frozen for sampling: G is a constant, that term is zero, and nothing is left out.

There is no accept step. On U = q^2 / 2 with exact gradients the draws have variance 1 / (1 - eps/4) instead of 1, and
noise of variance V in the gradient adds eps V / 4 of it or so: the step size buys accuracy with time.

References: Welling & Teh (2011); Li, Chen, Carlson, Carin (2016), Preconditioned stochastic gradient Langevin dynamics
for deep neural networks, arXiv 1512.07666, algorithm 1.
"""

from __future__ import annotations

import math
import os
from typing import Literal, NamedTuple

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
    """What the next step needs.

    Attributes:
        q: Positions (*g, C, D).
        square: Sum of past g^2 with weights (1 - smoothing) smoothing^age, (*g, C, D).
        weight: Sum of these weights; 0 before the first adaptation, and then G = 1.
    """

    q: Tensor
    square: Tensor
    weight: float


class Parameters(NamedTuple):
    """Settings of a step.

    Attributes:
        smoothing: Share of the old in the running mean of squared gradients.
        damping: Added to their root; keeps G finite where gradients vanish.
        max_drift: Most that the gradient may move a coordinate in one step; inf for no limit. A step that small steps
            need never comes near it; one beside a cliff would otherwise leave for good.
    """

    smoothing: float = 0.99
    damping: float = 1e-5
    max_drift: float = math.inf


_DEFAULTS = Parameters()


def init(q: Tensor) -> State:
    """The state at q (*g, C, D), with G = 1."""
    return State(q, torch.zeros_like(q), 0.0)


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
        noise: Standard normal numbers that broadcast to (*g, C, D); None for a step of gradient descent.
        step_size: eps.
        adapt: Whether this gradient enters the preconditioner, before it is used.

    Cost: one minibatch gradient.
    """
    log_density, slope = gradient(state.q, rows)
    square, weight = state.square, state.weight
    if adapt:
        square = torch.lerp(slope.square(), square, parameters.smoothing)
        weight = parameters.smoothing * weight + 1 - parameters.smoothing
    scale = 1.0 if weight == 0 else ((square / weight).sqrt() + parameters.damping).reciprocal()
    drift = (0.5 * step_size) * scale * slope
    clipped = torch.zeros_like(log_density)
    if parameters.max_drift < math.inf:
        kept = drift.clamp(-parameters.max_drift, parameters.max_drift)
        drift, clipped = kept, (kept != drift).to(log_density).mean(-1)
    q = state.q + drift
    if noise is not None:
        root = math.sqrt(step_size) if weight == 0 else (step_size * scale).sqrt()
        q = q + root * noise
    return State(q, square, weight), Info(log_density, clipped, torch.zeros_like(log_density))


def run(
    log_density: BatchLogDensity,
    initial: Tensor,
    *,
    num_data: int,
    num_warmup: int,
    num_draws: int,
    step_size: float | Tensor,
    batch_size: int | None = None,
    precondition: Literal["rmsprop", "none"] = "rmsprop",
    parameters: Parameters = _DEFAULTS,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> StochasticRun:
    """Warm up, then draw: `num_warmup` steps, then `num_draws * thin` with the preconditioner frozen.

    Groups *g are independent problems of one shape; all see the same random numbers and the same rows.

    Args:
        log_density: Estimates on the scale of all data: q (*g, C, D) and rows (C, n), or None for all, to (*g, C).
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_data: N, the number of data points that rows index.
        num_warmup: Steps that adapt; not kept.
        num_draws: Draws kept per chain, evenly in algorithmic time (see `stochastic.kept_steps`).
        step_size: A number, or a schedule with one entry a step.
        batch_size: Points a chain looks at in a step; all for None.
        precondition: "rmsprop", or "none" for plain SGLD.
        parameters: Settings of a step.
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

    Reference: Welling & Teh (2011); Li et al. (2016), arXiv 1512.07666.
    """
    _check_parameters(parameters)
    _checks.choice("sgld.run", "precondition", precondition, ("rmsprop", "none"))
    plan = simple_plan(step_size, num_warmup, num_draws, thin, "sgld.run")
    gradient = batch_gradient(log_density, chain_batch=chain_batch, compile=compile)
    check_problem("sgld.run", gradient.log_density, initial, num_data, batch_size)
    if precondition == "none":
        plan = plan._replace(adapt=[False] * len(plan.adapt))
    return drive(
        "sgld.run",
        gradient,
        step,
        parameters,
        init(initial.detach()),
        plan,
        num_data=num_data,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        name="SGLD",
        settings={"precondition": precondition},
        checkpoint=checkpoint,
        max_gradients=max_gradients,
    )


def _check_parameters(parameters: Parameters) -> None:
    _checks.inside("sgld.run", "smoothing", parameters.smoothing, 0.0, 1.0)
    _checks.at_least("sgld.run", "damping", parameters.damping, 0.0)
    if parameters.max_drift != math.inf:
        _checks.inside("sgld.run", "max_drift", parameters.max_drift, 0.0, math.inf)
