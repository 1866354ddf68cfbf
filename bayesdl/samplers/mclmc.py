r"""Microcanonical Langevin Monte Carlo: one gradient-steered particle a chain, never corrected, so slightly biased.

Each step forgets a little of the direction u, u <- unit(u + nu z) with nu^2 = (exp(2 eps / L) - 1) / D, and then moves
at unit speed for a time eps (see `_microcanonical`). There is no accept step. What is drawn is the target up to a bias
that the energy error per step controls: warm-up finds the step size at which

    E (dE)^2 / D = desired_energy_error,    where (dE)^2 grows like eps^6,

and L from the width of the target, then as 0.4 times the distance that the chains need to forget where they were. It
begins with short trajectories of HMC, which come down from a steep place where a particle of unit speed would creep. A
step whose energy is not finite, or jumps by more than 1000, is undone with its direction reversed, and counts as a
divergence. Where the bias matters, use `samplers.mams`, which is exact.

References: Robnik, De Luca, Silverstein & Seljak (2022), arXiv 2212.08549; Robnik & Seljak (2023), arXiv 2303.18221.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers import _adapted, _microcanonical_lengths, adaptation, hamiltonian, hmc
from bayesdl.samplers._chains import Numbers, drive
from bayesdl.samplers._microcanonical import (
    SCHEMES,
    Point,
    check_dimension,
    diverges,
    energy_error,
    find_step_size,
    integrate,
    refresh,
    unit,
)
from bayesdl.samplers._microcanonical_lengths import Watch
from bayesdl.samplers._travel import travel, travel_step_size
from bayesdl.samplers.adaptation import DualAveraging, Moments
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad, value_and_grad
from bayesdl.samplers.hamiltonian import Metric

__all__ = ["Info", "Parameters", "State", "init", "run", "step"]

Integrator = Literal["minimal-norm", "leapfrog"]


class State(NamedTuple):
    """What the next step needs: positions (*g, C, D), unit velocities (*g, C, D), log density, gradient, energy.

    The energy (*g, C) in float64 is what the steps have made of -log density at the start; all its change is error.
    """

    q: Tensor
    velocity: Tensor
    log_density: Tensor
    grad: Tensor
    energy: Tensor


class Parameters(NamedTuple):
    """What warm-up adapts: the step size, (*g, 1) or one per chain (*g, C), the metric, and L of either shape."""

    step_size: Tensor
    metric: Metric
    trajectory_length: Tensor


class Info(NamedTuple):
    """What a reader wants to know of a step; tensors (*g, C). Steps are accepted unless they diverge."""

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    energy_change: Tensor
    num_steps: int
    num_gradients: float
    num_coordinates: int

    @property
    def stats(self) -> dict[str, Tensor]:
        """The squared energy error of the step per coordinate."""
        return {"energy_error": self.energy_change.square() / self.num_coordinates}


def init(evaluate: ValueAndGrad, q: Tensor, noise: Tensor) -> State:
    """Chains at q (*g, C, D) that set out in the directions of `noise`, which broadcasts to it. Cost: one gradient."""
    log_density, grad = evaluate(q)
    return State(q, unit(noise).expand_as(q), log_density, grad, -log_density.double())


def step(
    evaluate: ValueAndGrad, state: State, parameters: Parameters, noise: Tensor, integrator: Integrator = "minimal-norm"
) -> tuple[State, Info]:
    """One step of every chain: a pure function of its arguments.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        state: Where the chains are.
        parameters: Step size, metric and L.
        noise: Standard normal numbers that broadcast to (*g, C, D), for the directions.
        integrator: "minimal-norm" (two gradients, smaller errors) or "leapfrog" (one).

    A chain whose log density is not finite where it stands moves on whatever it finds.

    Cost: two gradients, or one.
    """
    step_size, metric, length = parameters
    scheme = SCHEMES[integrator]
    start = Point(state.q, refresh(state.velocity, noise, step_size, length), state.log_density, state.grad)
    end, kinetic = integrate(evaluate, start, step_size, metric, 1, scheme)
    error = energy_error(start.log_density, end.log_density, kinetic)
    inside = start.log_density.isfinite()
    failed = inside & diverges(error)
    change = torch.where(failed | ~inside, 0.0, error)
    energy = torch.where(inside, state.energy + change, -end.log_density.double())
    mask = failed.unsqueeze(-1)
    after = State(
        torch.where(mask, state.q, end.q),
        torch.where(mask, -state.velocity, end.velocity),
        torch.where(failed, state.log_density, end.log_density),
        torch.where(mask, state.grad, end.grad),
        energy,
    )
    return after, Info((~failed).double(), failed, energy, change, 1, scheme.num_gradients, state.q.shape[-1])


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    desired_energy_error: float = 5e-4,
    metric: Literal["diagonal", "dense", "identity"] = "diagonal",
    integrator: Integrator = "minimal-norm",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    trajectory_length: float | Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "MCLMC",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Run:
    r"""Adapt, then draw: `num_warmup` steps, then `num_draws * thin` with everything frozen.

    A step is some tenth of what makes a draw independent, so take many, and `thin` of 5 or 10. Groups are independent,
    as in `hmc.run`. Chains of a group share the metric and, once they have travelled by HMC from where they started,
    step size and L. With `num_warmup=0` and a given step size a chain does not depend on the others.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C), D of 2 or more.
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_warmup: Steps that adapt.
        num_draws: Draws kept per chain.
        desired_energy_error: The mean of (dE)^2 / D per step that the step size is adapted to. The bias falls with its
            cube root; for a Gaussian of 20 coordinates the default makes variances 3 % too small.
        metric: "diagonal" or "dense", estimated from all chains; "identity" for none.
        integrator: "minimal-norm", two gradients a step, or "leapfrog", one gradient and shorter steps.
        step_size: Where the step size starts, a number or (*g); searched for when None.
        inverse_mass: Where the inverse mass matrix starts, (*g, D) or dense (*g, D, D); the identity when None.
        trajectory_length: L in units of whitened length, a number or (*g), kept as it is; tuned when None.
        thin: Keep every thin-th draw.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress: Show a bar on standard error.
        description: Its label.
        checkpoint: A folder in which the run saves itself, and from which it goes on after an interruption.
        max_gradients: Gradients per chain after which the run ends, with the draws that it has.
        chain_batch: Chains whose log density is evaluated at a time; all for None.
        compile: Send value and gradient through torch.compile.

    Returns:
        The run. Its statistics have "energy_error", (dE)^2 / D averaged over the steps since the draw before;
        "energy" is NaN, for here are no levels of energy between which to move. `trajectory_length` is L.

    Raises:
        ShapeError, DtypeError: `initial` is no floating (*g, C, D) with D of 2 or more, or `log_density` gives no value
            per chain.
        SettingError: A setting is out of range, `log_density` carries no gradient, or `checkpoint` is another run's.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: `log_density` is nowhere finite at the start of a group, or not for all chains after warm-up.

    Cost: two gradients a step; memory for C * num_draws * D numbers a group.

    Reference: Robnik & Seljak (2023), arXiv 2303.18221.
    """
    where, metrics = "mclmc.run", ("diagonal", "dense", "identity")
    check_dimension(where, initial)
    _checks.choice(where, "metric", metric, metrics)
    _checks.choice(where, "integrator", integrator, tuple(SCHEMES))
    _checks.inside(where, "desired_energy_error", desired_energy_error, 0, math.inf)
    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    settings = {"desired_energy_error": desired_energy_error, "metric": metric, "integrator": integrator}
    settings |= {"step_size": step_size, "inverse_mass": inverse_mass, "trajectory_length": trajectory_length}
    length: dict[str, Any] = {"num_warmup": num_warmup, "num_draws": num_draws, "thin": thin, "seed": seed}
    length |= {"progress": progress, "description": description, "checkpoint": checkpoint}
    length |= {"max_gradients": max_gradients}
    result, carry = drive(where, _Program(evaluate, num_warmup, settings), evaluate, initial, **length)
    return result._replace(
        stats={**result.stats, "energy": torch.full_like(result.stats["energy"], torch.nan)},
        inverse_mass=carry.parameters.metric.inverse_mass,
        trajectory_length=carry.parameters.trajectory_length.squeeze(-1),
    )


_FORGET = 149 / 151  # of the energy errors: the last 150 or so count
_TRUST = 9.0  # errors that differ from the desired one by more than a factor exp(9) hardly count
_SPOILT = 64.0  # what an undone step counts as, in units of the desired error: half the step would have the desired one
_FIRST = 10  # steps over which a direction is forgotten before anything is known of the target
_TRAVEL_ACCEPT = 0.8


class _Errors(NamedTuple):
    """Weighted sums over the steps so far, (*g, 1) in float64, of 1 and of (dE)^2 / eps^6."""

    weight: Tensor
    total: Tensor


class _Carry(NamedTuple):
    """Between two steps; `seen` is what the length is tuned from."""

    state: State
    parameters: Parameters
    averaging: DualAveraging
    errors: _Errors
    moments: Moments
    seen: Watch


class _Program:
    """The steps, and what warm-up makes of them; see `_chains.Program`."""

    def __init__(self, evaluate: ValueAndGrad, num_warmup: int, settings: dict) -> None:
        self._evaluate, self.num_warmup, self.settings = evaluate, num_warmup, settings
        self._integrator = settings["integrator"]
        self._schedule = _microcanonical_lengths.schedule(num_warmup, settle=False)

    def start(self, q: Tensor, numbers: Numbers) -> tuple[_Carry, float]:
        """The chains at q (*g, C, D) in random directions, with step sizes of the right order."""
        given, length = self.settings["step_size"], self.settings["trajectory_length"]
        state = init(self._evaluate, q, numbers.momentum())
        first = _adapted._given_step_size("mclmc.run", 1.0 if given is None else given, q)
        metric = _adapted._initial_metric("mclmc.run", self.settings["metric"], self.settings["inverse_mass"], q)
        far = torch.full_like(first, q.shape[-1] ** 0.5)
        if length is not None:
            far = _microcanonical_lengths.given_length("mclmc.run", length, q).unsqueeze(-1)
        parameters, spent = Parameters(first, metric, far), 1
        averaging = adaptation.start_dual_averaging(first)
        if given is None and self._schedule.together:
            size, more = travel_step_size(self._evaluate, self.state_of(state), metric, numbers, first)
            parameters, averaging = parameters._replace(step_size=size), adaptation.start_dual_averaging(size)
            spent += more
        elif given is None:
            parameters, more = self._search(state, parameters)
            spent += more
        seen = _microcanonical_lengths.start_watch(q, self._schedule.watch[1] - self._schedule.watch[0])
        errors = _start_errors(parameters.step_size)
        return _Carry(state, parameters, averaging, errors, self._no_moments(q, metric), seen), spent

    def warm(self, t: int, carry: _Carry, numbers: Numbers) -> tuple[_Carry, Info | hmc.Info]:
        """Step t, then what it says about step size, metric and L."""
        plan, extra = self._schedule, 0
        if t < plan.together:
            return self._travel(carry, numbers)
        if t == plan.together:
            carry, extra = self._share(carry)
        before, parameters = carry.state, carry.parameters
        if self.settings["trajectory_length"] is None and plan.windows and t < plan.windows[0][1]:
            parameters = parameters._replace(trajectory_length=_FIRST * parameters.step_size)
        state, info = step(self._evaluate, before, parameters, numbers.momentum(), self._integrator)
        errors = _weigh(carry.errors, parameters.step_size, before, info, self.settings["desired_energy_error"])
        parameters = parameters._replace(step_size=_desired(errors).to(state.q))
        carry = carry._replace(state=state, parameters=parameters, errors=errors)
        if plan.windows and plan.windows[0][0] <= t < plan.windows[-1][1]:
            carry = carry._replace(moments=adaptation.add_to_moments(carry.moments, state.q, state.grad))
        if plan.watch[0] <= t < plan.watch[1]:
            carry = carry._replace(seen=_microcanonical_lengths.watch(carry.seen, state.q, t - plan.watch[0]))
        if any(t + 1 == end for _, end in plan.windows):
            carry, more = self._end_window(carry)
            extra += more
        return carry, info._replace(num_gradients=info.num_gradients + extra)

    def freeze(self, carry: _Carry, numbers: Numbers) -> _Carry:
        """One step size and one L for all."""
        parameters, seen = _adapted._pool(carry.parameters, carry.state), carry.seen
        length = parameters.trajectory_length.mean(-1, keepdim=True)
        if self.settings["trajectory_length"] is None and seen.filled >= _microcanonical_lengths.FEWEST:
            tuned = 0.4 * parameters.step_size * _microcanonical_lengths.memory(seen).unsqueeze(-1)
            length = torch.clamp(tuned.to(length), length / 4, length * 4)
        parameters = parameters._replace(trajectory_length=length)
        return carry._replace(parameters=parameters, seen=seen._replace(rows=seen.rows[..., :0, :], filled=0))

    def move(self, carry: _Carry, numbers: Numbers) -> tuple[_Carry, Info]:
        """One step under the frozen parameters."""
        state, info = step(self._evaluate, carry.state, carry.parameters, numbers.momentum(), self._integrator)
        return carry._replace(state=state), info

    def state(self, carry: _Carry) -> hamiltonian.State:
        """Where the chains are."""
        return self.state_of(carry.state)

    def step_size(self, carry: _Carry) -> Tensor:
        """The step sizes, (*g, 1) or (*g, C)."""
        return carry.parameters.step_size

    @staticmethod
    def state_of(state: State) -> hamiltonian.State:
        """The same without direction and energy."""
        return hamiltonian.State(state.q, state.log_density, state.grad)

    def _travel(self, carry: _Carry, numbers: Numbers) -> tuple[_Carry, hmc.Info]:
        """A transition of HMC, with its step sizes by dual averaging."""
        end, info = travel(self._evaluate, self.state_of(carry.state), carry.parameters, numbers)
        averaging = adaptation.dual_average(carry.averaging, info.acceptance_rate, _TRAVEL_ACCEPT)
        parameters = carry.parameters._replace(step_size=averaging.log_step_size.exp().to(end.q))
        state = State(end.q, carry.state.velocity, end.log_density, end.grad, -end.log_density.double())
        return carry._replace(state=state, parameters=parameters, averaging=averaging), info

    def _share(self, carry: _Carry) -> tuple[_Carry, int]:
        """From here on the chains move at unit speed and share a step size; also the gradients spent on it."""
        parameters, spent = carry.parameters, 0
        if self._schedule.together:
            parameters, spent = self._search(carry.state, _adapted._pool(parameters, carry.state))
        parameters = _adapted._pool(parameters, carry.state)
        return carry._replace(parameters=parameters, errors=_start_errors(parameters.step_size)), spent

    def _end_window(self, carry: _Carry) -> tuple[_Carry, int]:
        """A new metric, with step sizes and an L to go with it; also the gradients spent on them."""
        state, parameters, _, _, moments, _ = carry
        if self.settings["metric"] != "identity":
            parameters = parameters._replace(metric=adaptation.estimate_metric(moments, parameters.metric))
        parameters, spent = self._search(state, parameters)
        parameters = _adapted._pool(parameters, state)
        if self.settings["trajectory_length"] is None:
            length = _microcanonical_lengths.average_width(moments, parameters.metric).unsqueeze(-1)
            parameters = parameters._replace(trajectory_length=length.to(state.q))
        errors, moments = _start_errors(parameters.step_size), self._no_moments(state.q, parameters.metric)
        return carry._replace(parameters=parameters, errors=errors, moments=moments), spent

    def _search(self, state: State, parameters: Parameters) -> tuple[Parameters, int]:
        """Step sizes of the right order, one per chain, and the gradients spent on them."""
        tolerance = (self.settings["desired_energy_error"] * state.q.shape[-1]) ** 0.5
        point, scheme = Point(*state[:4]), SCHEMES[self._integrator]
        found, spent = find_step_size(self._evaluate, point, parameters.metric, parameters.step_size, tolerance, scheme)
        return parameters._replace(step_size=found), spent

    def _no_moments(self, q: Tensor, metric: Metric) -> Moments:
        return adaptation.moments_for(q, metric)


def _start_errors(step_size: Tensor) -> _Errors:
    """As if one step of this size had had the desired error."""
    return _Errors(torch.ones_like(step_size, dtype=torch.float64), step_size.double() ** -6)


def _weigh(errors: _Errors, step_size: Tensor, before: State, info: Info, desired: float) -> _Errors:
    """Take in the energy errors (*g, C) of one step, the mean over the chains of a group."""
    ratio = info.energy_change.square() / (desired * before.q.shape[-1]) + 1e-8
    ratio = torch.where(info.diverging, _SPOILT, ratio)
    weight = torch.exp(-0.5 * (ratio.log() / _TRUST).square()) * before.log_density.isfinite()
    total = weight * ratio * step_size.double() ** -6
    return _Errors(
        _FORGET * errors.weight + weight.mean(-1, keepdim=True), _FORGET * errors.total + total.mean(-1, keepdim=True)
    )


def _desired(errors: _Errors) -> Tensor:
    """The step size at which (dE)^2, growing like its sixth power, would be as desired on average."""
    return (errors.total / errors.weight) ** (-1 / 6)
