r"""Hamiltonian Monte Carlo with fixed-length trajectories, vectorised over chains and over groups of chains.

A transition draws p ~ N(0, M), follows H = -log density(q) + p' M^{-1} p / 2 by L leapfrog steps, and accepts the end
with probability min(1, exp(H_start - H_end)). All chains move in lock step: L is drawn anew for every transition,
uniformly from ceil(num_steps / 2) .. num_steps, so that no trajectory length is stuck on a period of the target. An
end whose energy is not finite, or has grown by more than 1000, is rejected and counts as a divergence.

References: Neal (2011), arXiv 1206.1901; Hoffman & Gelman (2014), arXiv 1111.4246 (dual averaging).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers._chains import Move, Numbers, Plan, run_chains
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad
from bayesdl.samplers.hamiltonian import Parameters, State, init, leapfrog, metropolis

__all__ = ["Info", "Parameters", "State", "init", "run", "step"]


class Info(NamedTuple):
    """What a reader wants to know of a transition; tensors (*g, C)."""

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: int

    @property
    def num_gradients(self) -> int:
        """Gradient evaluations of each chain."""
        return self.num_steps


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
    return state, Info(*decision, num_steps)


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    num_steps: int = 32,
    target_accept: float = 0.8,
    metric: Literal["diagonal", "dense", "identity"] = "diagonal",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "HMC",
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
        metric: "diagonal" or "dense", estimated from all chains; "identity" for none.
        step_size: Where the step size starts, a number or (*g); searched for when None.
        inverse_mass: Where the inverse mass matrix starts, (*g, D), or (*g, D, D) for a dense metric; the identity
            when None.
        thin: Keep every thin-th draw.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress: Show a bar on standard error.
        description: Its label.

    Raises:
        ShapeError: `initial` is not (*g, C, D), or `log_density` does not give one value per chain.
        DtypeError: `initial` is not floating.
        SettingError: A setting is out of range, or `log_density` carries no gradient.
        NumericalError: `log_density` is nowhere finite at the initial points of a group, or some chain has still found
            no finite value when warm-up ends.

    Cost: about 3/4 num_steps gradients a transition; memory for the draws, C * num_draws * D numbers a group.

    Reference: Neal (2011), arXiv 1206.1901; Hoffman & Gelman (2014), arXiv 1111.4246.
    """
    _checks.at_least("hmc.run", "num_steps", num_steps, 1, integer=True)

    def make_move(evaluate: ValueAndGrad, numbers: Numbers) -> Move:
        def move(state: State, parameters: Parameters) -> tuple[State, Info]:
            noise, uniform = numbers.momentum(), numbers.uniform()
            return step(evaluate, state, parameters, noise, uniform, numbers.length(num_steps))

        return move

    result, _ = run_chains(
        "hmc.run",
        log_density,
        initial,
        Plan(num_warmup, num_draws, thin, target_accept, metric),
        make_move,
        step_size=step_size,
        inverse_mass=inverse_mass,
        seed=seed,
        progress=progress,
        description=description,
    )
    return result
