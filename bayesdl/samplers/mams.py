r"""The Metropolis-adjusted microcanonical sampler: trajectories of unit speed, made exact by an accept step.

A transition draws a direction, uniform on the sphere, follows the microcanonical dynamics (see `_microcanonical`) for
n steps of size eps, and accepts the end with probability min(1, exp(-dE)), where dE is the energy error. Reversed in
time the map is its own inverse, and exp(-dE) is its Jacobian times the ratio of the densities, so the target is left
exactly invariant. All chains move in lock step, with n = ceil(2 u T / eps) and u from a van der Corput sequence: T is
the mean length, and no length is stuck on a period of the target.

Warm-up begins with short trajectories of HMC, since a particle of unit speed takes long to come down from a steep
place. Then it adapts eps by dual averaging to a mean acceptance of 0.9, and a metric from all chains. T begins as
sqrt(D) times the largest standard deviation of the whitened target, the time of a crossing, and grows where the chains
need many transitions for an effectively independent draw.

Reference: Robnik, Cohn-Gordon & Seljak (2025), Metropolis adjusted microcanonical Hamiltonian Monte Carlo, arXiv
2503.01707.
"""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers import _adapted, _microcanonical_lengths, adaptation
from bayesdl.samplers._chains import Numbers, drive
from bayesdl.samplers._microcanonical import (
    SCHEMES,
    Point,
    check_dimension,
    energy_error,
    find_step_size,
    integrate,
    unit,
)
from bayesdl.samplers._microcanonical_lengths import Watch
from bayesdl.samplers._travel import travel, travel_step_size
from bayesdl.samplers.adaptation import DualAveraging, Moments
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad, value_and_grad
from bayesdl.samplers.hamiltonian import MAX_ENERGY_ERROR, Metric, State, init

__all__ = ["Info", "Parameters", "State", "init", "run", "step"]

Integrator = Literal["minimal-norm", "leapfrog"]


class Parameters(NamedTuple):
    """What warm-up adapts: the step size, (*g, 1) or one per chain (*g, C), the metric, and T, (*g)."""

    step_size: Tensor
    metric: Metric
    trajectory_length: Tensor


class Info(NamedTuple):
    """What a reader wants to know of a transition; tensors (*g, C).

    The energy is that of the chain with its next direction, whose kinetic energy is 0: minus the log density.
    """

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: Tensor
    num_gradients: float


def step(
    evaluate: ValueAndGrad,
    state: State,
    parameters: Parameters,
    noise: Tensor,
    uniform: Tensor,
    num_steps: Tensor | int,
    integrator: Integrator = "minimal-norm",
) -> tuple[State, Info]:
    """One transition of every chain: a pure function of its arguments.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        state: Where the chains are.
        parameters: Step size and metric.
        noise: Standard normal numbers that broadcast to (*g, C, D), for the directions.
        uniform: Numbers on [0, 1) that broadcast to (*g, C), for the accept decision.
        num_steps: Steps of the trajectory, a number or (*g).
        integrator: "minimal-norm" (two gradients a step, smaller errors) or "leapfrog" (one).

    An end whose energy is not finite, or has grown by more than 1000, is refused and counts as a divergence. A chain
    whose log density is not finite where it stands accepts any end where it is.

    Cost: two gradients a step, or one; groups with shorter trajectories wait for the longest.
    """
    counts = torch.as_tensor(num_steps, device=state.q.device)
    scheme = SCHEMES[integrator]
    end = Point(state.q, unit(noise).expand_as(state.q), state.log_density, state.grad)
    kinetic, done = torch.zeros_like(state.log_density, dtype=torch.float64), 0
    for count in sorted(set(counts.flatten().tolist())):
        # a group that has done its own steps stands still while others go on
        step_size = parameters.step_size
        size = torch.where(counts.unsqueeze(-1) >= count, step_size, 0.0) if counts.ndim else step_size
        end, more = integrate(evaluate, end, size, parameters.metric, count - done, scheme)
        kinetic, done = kinetic + more, count
    error = energy_error(state.log_density, end.log_density, kinetic)
    rate = torch.exp(-error).clamp(max=1.0)
    diverging = error > MAX_ENERGY_ERROR
    accepted = (uniform < rate) & ~diverging
    mask = accepted.unsqueeze(-1)
    after = State(
        torch.where(mask, end.q, state.q),
        torch.where(accepted, end.log_density, state.log_density),
        torch.where(mask, end.grad, state.grad),
    )
    each = counts.unsqueeze(-1).expand_as(accepted) if counts.ndim else counts.expand_as(accepted)
    return after, Info(rate, accepted, diverging, -after.log_density.double(), each, done * scheme.num_gradients)


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    max_steps: int = 1000,
    target_accept: float = 0.9,
    metric: Literal["auto", "diagonal", "dense", "identity"] = "auto",
    integrator: Integrator = "minimal-norm",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    trajectory_length: float | Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "MAMS",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Run:
    r"""Adapt, then draw: `num_warmup` transitions, then `num_draws * thin` with everything frozen.

    Warm-up first lets the chains travel by HMC, each with a step size of its own; then they share one, and the metric
    and T follow in windows. The groups of a run are independent, as in `hmc.run`. With `num_warmup=0` and a given step
    size a chain does not depend on the others.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C), D of 2 or more.
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_warmup: Transitions that adapt; not kept.
        num_draws: Draws kept per chain.
        max_steps: Longest trajectory in steps.
        target_accept: Mean acceptance rate that the step size is adapted to, in (0, 1).
        metric: "diagonal", "dense" or "identity"; "auto" takes "dense" for at most 500 coordinates, where the longest
            window holds at least five positions for each.
        integrator: "minimal-norm", two gradients a step, or "leapfrog", one gradient and shorter steps.
        step_size: Where the step size starts, a number or (*g); searched for when None.
        inverse_mass: Where the inverse mass matrix starts, (*g, D), or (*g, D, D) for a dense metric; the identity
            when None.
        trajectory_length: T in units of whitened length, a number or (*g), kept as it is; tuned when None.
        thin: Keep every thin-th draw.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress: Show a bar on standard error.
        description: Its label.
        checkpoint: A folder in which the run saves itself, and from which it goes on after an interruption.
        max_gradients: Gradients per chain after which the run ends, with the draws that it has.
        chain_batch: Chains whose log density is evaluated at a time; all for None.
        compile: Send value and gradient through torch.compile.

    Raises:
        ShapeError, DtypeError: `initial` is no floating (*g, C, D) with D of 2 or more, or `log_density` gives no value
            per chain.
        SettingError: A setting is out of range, `log_density` carries no gradient, or `checkpoint` is another run's.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: `log_density` is nowhere finite at the start of a group, or not for all chains after warm-up.

    Cost: about 2 T / eps gradients a transition; memory for the draws, C * num_draws * D numbers a group.

    Reference: Robnik, Cohn-Gordon & Seljak (2025), arXiv 2503.01707.
    """
    where = "mams.run"
    check_dimension(where, initial)
    _checks.at_least(where, "num_warmup", num_warmup, 0, integer=True)
    _checks.at_least(where, "max_steps", max_steps, 1, integer=True)
    _checks.inside(where, "target_accept", target_accept, 0, 1)
    _checks.choice(where, "metric", metric, ("auto", "diagonal", "dense", "identity"))
    _checks.choice(where, "integrator", integrator, tuple(SCHEMES))
    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    kind = _microcanonical_lengths.metric_for(initial, num_warmup, inverse_mass) if metric == "auto" else metric
    settings = {"max_steps": max_steps, "target_accept": target_accept, "metric": kind, "integrator": integrator}
    settings |= {"step_size": step_size, "inverse_mass": inverse_mass, "trajectory_length": trajectory_length}
    length: dict[str, Any] = {"num_warmup": num_warmup, "num_draws": num_draws, "thin": thin, "seed": seed}
    length |= {"progress": progress, "description": description}
    length |= {"checkpoint": checkpoint, "max_gradients": max_gradients}
    result, carry = drive(where, _Program(evaluate, num_warmup, settings), evaluate, initial, **length)
    parameters = carry.parameters
    return result._replace(inverse_mass=parameters.metric.inverse_mass, trajectory_length=parameters.trajectory_length)


_HASTE = 100  # longest trajectory, in steps, before the last metric
_FIRST = 3  # steps of the mean trajectory under the first step size, before anything is known of the target
_TOLERANCE = 0.25  # energy error of one step that the search for a first step size crosses
_MEMORY = 0.3  # T grows where an effectively independent draw takes more transitions than 1 over this
_LEAST, _MOST = 1.0, 2.0  # what tuning may do to T, which is no less than a crossing


class _Carry(NamedTuple):
    """Between two transitions; `seen` is what T is tuned from, and `count` the transitions with adapted lengths."""

    state: State
    parameters: Parameters
    averaging: DualAveraging
    moments: Moments
    seen: Watch
    count: int


class _Program:
    """The transitions, and what warm-up makes of them; see `_chains.Program`."""

    def __init__(self, evaluate: ValueAndGrad, num_warmup: int, settings: dict[str, Any]) -> None:
        self._evaluate, self.num_warmup, self.settings = evaluate, num_warmup, settings
        self._integrator = settings["integrator"]
        self._schedule = _microcanonical_lengths.schedule(num_warmup, settle=True)

    def start(self, q: Tensor, numbers: Numbers) -> tuple[_Carry, float]:
        """The chains at q (*g, C, D), with step sizes of the right order."""
        given, length = self.settings["step_size"], self.settings["trajectory_length"]
        state = init(self._evaluate, q)
        first = _adapted._given_step_size("mams.run", 1.0 if given is None else given, q)
        metric = _adapted._initial_metric("mams.run", self.settings["metric"], self.settings["inverse_mass"], q)
        far = _microcanonical_lengths.given_length("mams.run", q.shape[-1] ** 0.5 if length is None else length, q)
        parameters, spent = Parameters(first, metric, far), 1
        if given is None and self._schedule.together:
            size, more = travel_step_size(self._evaluate, state, metric, numbers, first)
            parameters, spent = parameters._replace(step_size=size), 1 + more
        elif given is None:
            parameters, more = self._search(state, parameters, numbers)
            spent += more
        seen = _microcanonical_lengths.start_watch(q, self._schedule.watch[1] - self._schedule.watch[0])
        averaging = adaptation.start_dual_averaging(parameters.step_size)
        return _Carry(state, parameters, averaging, self._no_moments(q, metric), seen, 0), spent

    def warm(self, t: int, carry: _Carry, numbers: Numbers) -> tuple[_Carry, Any]:
        """Transition t, then what it says about step size, metric and T."""
        plan, extra, info = self._schedule, 0, None
        if t < plan.together:
            state, info = travel(self._evaluate, carry.state, carry.parameters, numbers)
            return self._adapt(carry._replace(state=state), info), info
        if t == plan.together:
            carry, extra = self._share(carry, numbers)
        last = plan.windows[-1][1] if plan.windows else 0
        state, info = self._go(carry, numbers, self.settings["max_steps"] if t >= last else _HASTE)
        carry = self._adapt(carry._replace(state=state, count=carry.count + 1), info)
        if plan.windows and plan.windows[0][0] <= t < last:
            carry = carry._replace(moments=adaptation.add_to_moments(carry.moments, state.q, state.grad))
        if plan.watch[0] <= t < plan.watch[1]:
            carry = carry._replace(seen=_microcanonical_lengths.watch(carry.seen, state.q, t - plan.watch[0]))
        if any(t + 1 == end for _, end in plan.windows):
            carry, more = self._end_window(carry, numbers)
            extra += more
        if t + 1 == plan.watch[1]:
            carry = self._tune_length(carry)
        return carry, info._replace(num_gradients=info.num_gradients + extra)

    def freeze(self, carry: _Carry, numbers: Numbers) -> _Carry:
        """One step size for all, the average over its search."""
        parameters = carry.parameters
        if self.num_warmup:
            parameters = parameters._replace(step_size=carry.averaging.log_average.exp().to(carry.state.q))
        return carry._replace(parameters=_adapted._pool(parameters, carry.state))

    def move(self, carry: _Carry, numbers: Numbers) -> tuple[_Carry, Info]:
        """One transition under the frozen parameters."""
        state, info = self._go(carry, numbers, self.settings["max_steps"])
        return carry._replace(state=state, count=carry.count + 1), info

    def state(self, carry: _Carry) -> State:
        """Where the chains are."""
        return carry.state

    def step_size(self, carry: _Carry) -> Tensor:
        """The step sizes, (*g, 1) or (*g, C)."""
        return carry.parameters.step_size

    def _go(self, carry: _Carry, numbers: Numbers, max_steps: int) -> tuple[State, Info]:
        """A trajectory of the mean length T, by the next number of the sequence."""
        parameters, u = carry.parameters, van_der_corput(carry.count + 1)
        length = 2 * u * parameters.trajectory_length / parameters.step_size.squeeze(-1)
        limit = min(max_steps, self.settings["max_steps"])
        num_steps = length.ceil().clamp(1, limit).nan_to_num(nan=1.0).long()
        noise, uniform = numbers.momentum(), numbers.uniform()
        return step(self._evaluate, carry.state, parameters, noise, uniform, num_steps, self._integrator)

    def _adapt(self, carry: _Carry, info: Any) -> _Carry:
        """The step size after one more transition."""
        pooled = carry.parameters.step_size.shape[-1] == 1
        rate = info.acceptance_rate.mean(-1, keepdim=True) if pooled else info.acceptance_rate
        averaging = adaptation.dual_average(carry.averaging, rate, self.settings["target_accept"])
        step_size = averaging.log_step_size.exp().to(carry.state.q)
        return carry._replace(parameters=carry.parameters._replace(step_size=step_size), averaging=averaging)

    def _share(self, carry: _Carry, numbers: Numbers) -> tuple[_Carry, int]:
        """From here on the chains move at unit speed and share a step size; also the gradients spent on it."""
        state, parameters, spent = carry.state, carry.parameters, 0
        if self._schedule.together:
            parameters, spent = self._search(state, _adapted._pool(parameters, state), numbers)
        parameters = _adapted._pool(parameters, state)
        if self.settings["trajectory_length"] is None and self._schedule.windows:
            parameters = parameters._replace(trajectory_length=_FIRST * parameters.step_size.squeeze(-1))
        averaging = adaptation.start_dual_averaging(parameters.step_size)
        return carry._replace(parameters=parameters, averaging=averaging, count=0), spent

    def _end_window(self, carry: _Carry, numbers: Numbers) -> tuple[_Carry, int]:
        """A new metric, with step sizes and a T to go with it; also the gradients spent on them."""
        state, parameters, _, moments, seen, count = carry
        if self.settings["metric"] != "identity":
            parameters = parameters._replace(metric=adaptation.estimate_metric(moments, parameters.metric))
        parameters, spent = self._search(state, parameters, numbers)
        parameters = _adapted._pool(parameters, state)
        if self.settings["trajectory_length"] is None:
            length = _microcanonical_lengths.widest(moments, parameters.metric)
            parameters = parameters._replace(trajectory_length=length.to(state.q))
        averaging = adaptation.start_dual_averaging(parameters.step_size)
        return _Carry(state, parameters, averaging, self._no_moments(state.q, parameters.metric), seen, count), spent

    def _tune_length(self, carry: _Carry) -> _Carry:
        """T by what the chains remember of where they were, in transitions."""
        seen, parameters = carry.seen, carry.parameters
        if self.settings["trajectory_length"] is None and seen.filled >= _microcanonical_lengths.FEWEST:
            factor = (_MEMORY * _microcanonical_lengths.memory(seen)).clamp(_LEAST, _MOST)
            length = parameters.trajectory_length * factor.to(parameters.trajectory_length)
            parameters = parameters._replace(trajectory_length=length)
        return carry._replace(parameters=parameters, seen=seen._replace(rows=seen.rows[..., :0, :], filled=0))

    def _search(self, state: State, parameters: Parameters, numbers: Numbers) -> tuple[Parameters, int]:
        """Step sizes of the right order, one per chain, and the gradients spent on them."""
        point = Point(state.q, unit(numbers.search()).expand_as(state.q), state.log_density, state.grad)
        found, spent = find_step_size(
            self._evaluate, point, parameters.metric, parameters.step_size, _TOLERANCE, SCHEMES[self._integrator]
        )
        return parameters._replace(step_size=found), spent

    def _no_moments(self, q: Tensor, metric: Metric) -> Moments:
        return adaptation.moments_for(q, metric, whole=q.shape[-1] <= _microcanonical_lengths.MAX_DENSE)


def van_der_corput(i: int) -> float:
    """The i-th number of the van der Corput sequence in base 2 (i from 1): 1/2, 1/4, 3/4, 1/8, …"""
    value, weight = 0.0, 0.5
    while i:
        value, weight, i = value + weight * (i & 1), weight / 2, i >> 1
    return value
