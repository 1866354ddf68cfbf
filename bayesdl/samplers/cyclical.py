r"""Cyclical stochastic gradient MCMC: many warm restarts, a few draws at the end of each.

The step size goes through M cycles of cosine form,

    eta_k = eta_0 / 2 (cos(pi mod(k - 1, L) / L) + 1),   L = ceil(K / M).

In the first part of a cycle, where steps are large, the chain moves without noise, towards another mode perhaps; in the
rest it samples, with smaller and smaller steps, and the draws of the cycle are taken there, evenly in algorithmic time.
How much each mode is visited is decided by the descents, not by its posterior mass: the draws explore more than those
of one long chain, and weigh what they find less faithfully.

The scales of the dynamics adapt in a warm-up with noise before the first cycle and stay frozen. In a descent they must
not adapt: near a minimum the gradients vanish, and scales that follow them make ever larger steps.

Reference: Zhang, Li, Zhang, Chen, Wilson (2020), Cyclical stochastic gradient MCMC for Bayesian deep learning,
arXiv 1902.03932, algorithm 1.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal

from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers import sghmc, sgld
from bayesdl.samplers._stochastic_loop import drive
from bayesdl.samplers.stochastic import (
    BatchLogDensity,
    Plan,
    StochasticRun,
    batch_gradient,
    check_problem,
    cosine_cycles,
    kept_steps,
)


def cyclical_plan(
    step_size: float,
    num_warmup: int,
    num_cycles: int,
    cycle_length: int,
    draws_per_cycle: int,
    exploration: float,
    power: float = 1.0,
) -> Plan:
    """The steps of warm-up and all cycles.

    Args:
        step_size: Step size at the start of each cycle.
        num_warmup: Steps of that size before the first, with noise, that adapt.
        num_cycles: M.
        cycle_length: L, steps in a cycle.
        draws_per_cycle: Draws kept of each.
        exploration: Share of a cycle that moves without noise; its first part.
        power: The step sizes are step_size (eta_k / eta_0)^power; 1/2 where a step size enters squared.
    """
    _checks.inside("cyclical.run", "step_size", step_size, 0.0, math.inf)
    shape = cosine_cycles(1.0, num_cycles * cycle_length, num_cycles) ** power
    # the last step of a cycle and the first of sampling exist whatever the rounding
    quiet = min(cycle_length - 1, max(1, round(exploration * cycle_length)))
    sizes = (step_size * shape).tolist()
    keep = ([0] * quiet + kept_steps(sizes[quiet:cycle_length], draws_per_cycle)) * num_cycles
    noisy = ([False] * quiet + [True] * (cycle_length - quiet)) * num_cycles
    warm, total = num_warmup, len(sizes)
    adapt = [True] * warm + [False] * total
    return Plan([step_size] * warm + sizes, [True] * warm + noisy, adapt, [0] * warm + keep, warm)


def run(
    log_density: BatchLogDensity,
    initial: Tensor,
    *,
    num_data: int,
    num_warmup: int,
    num_cycles: int,
    cycle_length: int,
    draws_per_cycle: int,
    step_size: float,
    exploration: float = 0.5,
    dynamics: Literal["sghmc", "sgld"] = "sghmc",
    friction: float = 0.05,
    batch_size: int | None = None,
    max_drift: float = math.inf,
    seed: Seed = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> StochasticRun:
    """Go through all cycles; see the head of this file.

    Args:
        log_density: Estimates on the scale of all data: q (*g, C, D) and rows (C, n), or None for all, to (*g, C).
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_data: N, the number of data points that rows index.
        num_warmup: Steps before the first cycle that adapt the scales; not kept.
        num_cycles: Cycles.
        cycle_length: Steps in each.
        draws_per_cycle: Draws kept from the sampling part of each.
        step_size: Largest step size, in the sense of `dynamics`.
        exploration: Share of each cycle without noise, in (0, 1).
        dynamics: "sghmc", scale-adapted (`samplers.sghmc`), with eta = eps^2; or "sgld", preconditioned, with eta = eps
            (`samplers.sgld`).
        friction: Share of the momentum that a step of "sghmc" loses.
        batch_size: Points a chain looks at in a step; all for None.
        max_drift: Most that the gradient may move a coordinate, or change its momentum, in one step.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress: Show a bar.
        checkpoint, max_gradients, chain_batch, compile: A folder to save to and resume from, a budget in passes over
            the data, how many chains to evaluate at a time, and whether by torch.compile; see `samplers.base`.

    Raises:
        ShapeError, DtypeError: `initial` or the values of `log_density` have the wrong shape or dtype.
        SettingError: A setting is out of range, `log_density` carries no gradient, `checkpoint` is another run's, or
            the budget ends before the first draw.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: `log_density` is nowhere finite at the initial points, or a chain left the finite numbers.

    Cost: num_warmup + num_cycles * cycle_length minibatch gradients.
    """
    _check_settings(num_warmup, num_cycles, cycle_length, draws_per_cycle, exploration, friction, dynamics, max_drift)
    gradient = batch_gradient(log_density, chain_batch=chain_batch, compile=compile)
    check_problem("cyclical.run", gradient.log_density, initial, num_data, batch_size)
    langevin = dynamics == "sgld"
    power = 1.0 if langevin else 0.5
    plan = cyclical_plan(step_size, num_warmup, num_cycles, cycle_length, draws_per_cycle, exploration, power)
    noisy = batch_size is not None and batch_size < num_data
    sampler: Any = sgld if langevin else sghmc
    parameters = sgld.Parameters(max_drift=max_drift) if langevin else sghmc.Parameters(friction, noisy, max_drift)
    return drive(
        "cyclical.run",
        gradient,
        sampler.step,
        parameters,
        sampler.init(initial.detach()),
        plan,
        num_data=num_data,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        name="CyclicalSGMCMC",
        settings={"dynamics": dynamics},
        checkpoint=checkpoint,
        max_gradients=max_gradients,
    )


def _check_settings(
    num_warmup: int,
    num_cycles: int,
    cycle_length: int,
    draws_per_cycle: int,
    exploration: float,
    friction: float,
    dynamics: str,
    max_drift: float,
) -> None:
    where = "cyclical.run"
    _checks.at_least(where, "num_warmup", num_warmup, 0, integer=True)
    for name, value in (("num_cycles", num_cycles), ("draws_per_cycle", draws_per_cycle)):
        _checks.at_least(where, name, value, 1, integer=True)
    _checks.at_least(where, "cycle_length", cycle_length, 2, integer=True)
    _checks.inside(where, "exploration", exploration, 0.0, 1.0)
    _checks.inside(where, "friction", friction, 0.0, 1.0)
    _checks.choice(where, "dynamics", dynamics, ("sghmc", "sgld"))
    if max_drift != math.inf:
        _checks.inside(where, "max_drift", max_drift, 0.0, math.inf)
