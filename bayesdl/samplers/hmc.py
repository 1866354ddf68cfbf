r"""Hamiltonian Monte Carlo with fixed-length trajectories, vectorised over chains and over groups of chains.

A transition draws p ~ N(0, M), follows H = -log density(q) + p' M^{-1} p / 2 by L leapfrog steps, and accepts the end
with probability min(1, exp(H_start - H_end)). All chains move in lock step: L is drawn anew for every transition,
uniformly from ceil(num_steps / 2) .. num_steps, so that no trajectory length is stuck on a period of the target. An
end whose energy is not finite, or has grown by more than 1000, is rejected and counts as a divergence.

References: Neal (2011), arXiv 1206.1901; Hoffman & Gelman (2014), arXiv 1111.4246 (dual averaging).
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers._adapted import Adapted, Plan
from bayesdl.samplers._chains import Numbers, drive
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad, value_and_grad
from bayesdl.samplers.hamiltonian import Parameters, State, init, leapfrog, metropolis

__all__ = ["Info", "Parameters", "State", "init", "run", "step"]


class Info(NamedTuple):
    """What a reader wants to know of a transition: tensors (*g, C), and numbers that the chains share."""

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: int
    num_gradients: int


def step(
    evaluate: ValueAndGrad, state: State, parameters: Parameters, noise: Tensor, uniform: Tensor, num_steps: int
) -> tuple[State, Info]:
    """One transition of every chain: a pure function of its arguments.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        state: Where the chains are.
        parameters: Step size and metric.
        noise: Standard normal numbers that broadcast to (*g, C, D), for the momenta.
        uniform: Numbers on [0, 1) that broadcast to (*g, C), for the accept decision.
        num_steps: Leapfrog steps.

    A chain whose log density is not finite where it stands accepts any end where it is.

    Cost: num_steps gradients.
    """
    p = parameters.metric.momentum(noise).expand_as(state.q)
    q, p_end, *rest = leapfrog(evaluate, state.q, p, state.grad, *parameters, num_steps)
    state, decision = metropolis(state, p, State(q, *rest), p_end, parameters.metric, uniform)
    return state, Info(*decision, num_steps, num_steps)


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    num_steps: int = 32,
    target_accept: float = 0.8,
    metric: Literal["diagonal", "dense", "low-rank", "identity"] = "diagonal",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "HMC",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Run:
    """Adapt, then draw: `num_warmup` transitions, then `num_draws * thin` with everything frozen.

    Groups are independent problems of one shape, such as the same network on several data sets: each adapts its own
    step size and metric, and all see the same random numbers, so that a run of groups equals a loop over them up to
    rounding. Chains of a group share the metric, and from the last part of warm-up on the step size; before, each
    chain has its own, so that those started in steep places arrive as well. With `num_warmup=0` and a given step size
    a chain does not depend on the others.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C).
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_warmup: Transitions that adapt the step size (dual averaging) and the metric (windows); not kept.
        num_draws: Draws kept per chain.
        num_steps: Longest trajectory in leapfrog steps; lengths are uniform on ceil(num_steps / 2) .. num_steps.
        target_accept: Mean acceptance rate that the step size is adapted to, in (0, 1).
        metric: "diagonal", "dense" or "low-rank", estimated from all chains; "identity" for none.
        step_size: Where the step size starts, a number or (*g); searched for when None.
        inverse_mass: Where the inverse mass matrix starts, (*g, D), or (*g, D, D) for a dense metric; the identity
            when None.
        thin: Keep every thin-th draw.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress, description: Whether to show a bar on standard error, and its label.
        checkpoint, max_gradients, chain_batch, compile: A folder to save to and resume from, a budget of gradients per
            chain, how many chains to evaluate at a time, and whether by torch.compile; see `samplers.base`.

    Raises:
        ShapeError, DtypeError: `initial` is no floating (*g, C, D), or `log_density` gives no value per chain.
        SettingError: A setting is out of range, `log_density` carries no gradient, or `checkpoint` is another run's.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: `log_density` is nowhere finite at the start of a group, or not for all chains after warm-up.

    Cost: about 3/4 num_steps gradients a transition; memory for the draws, C * num_draws * D numbers a group.

    Reference: Neal (2011), arXiv 1206.1901; Hoffman & Gelman (2014), arXiv 1111.4246.
    """
    _checks.at_least("hmc.run", "num_steps", num_steps, 1, integer=True)
    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)

    def move(state: State, parameters: Parameters, numbers: Numbers, count: int) -> tuple[State, Info]:
        noise, uniform = numbers.momentum(), numbers.uniform()
        return step(evaluate, state, parameters, noise, uniform, numbers.length(num_steps))

    plan = Plan(num_warmup, target_accept, metric, step_size, inverse_mass)
    program = Adapted("hmc.run", evaluate, move, plan, {"num_steps": num_steps})
    result, carry = drive(
        "hmc.run",
        program,
        evaluate,
        initial,
        num_warmup=num_warmup,
        num_draws=num_draws,
        thin=thin,
        seed=seed,
        progress=progress,
        description=description,
        checkpoint=checkpoint,
        max_gradients=max_gradients,
    )
    return result._replace(inverse_mass=carry.parameters.metric.reported())
