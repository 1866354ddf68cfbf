"""The warm-up that the Hamiltonian samplers share: step size, metric, and what a sampler adapts besides.

A sampler gives a `Move`, which takes the chains from one state to the next under given parameters; `Adapted` makes a
program of it. Groups *g are independent problems of one shape: each adapts its own step size and metric, and all see
the same random numbers, so that a run of groups equals a loop over them up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.samplers import adaptation
from bayesdl.samplers._numbers import Numbers
from bayesdl.samplers.adaptation import DualAveraging, Moments
from bayesdl.samplers.base import ValueAndGrad
from bayesdl.samplers.hamiltonian import (
    Metric,
    Parameters,
    State,
    dense_metric,
    diagonal_metric,
    init,
    low_rank_metric,
)

# One transition: state, parameters, random numbers, and how many came before since the chains share a step size
# (negative until they do) to state and info. Parameters have at least step_size and metric, as in `Parameters`.
Move: TypeAlias = Callable[[State, Any, Numbers, int], tuple[State, Any]]


class Tuner(Protocol):
    """What a sampler adapts beyond step size and metric, once the chains share a step size.

    Its state, `tuning`, is a named tuple of tensors, numbers and None.
    """

    def start(self, tuning: Any, parameters: Any) -> tuple[Any, Any]:
        """Parameters and tuning with which to begin; `tuning` is what `restart` has made of windows before, or None."""

    def observe(
        self, tuning: Any, before: State, info: Any, parameters: Any, moments: Moments, arrived: Tensor
    ) -> tuple[Any, Any]:
        """Parameters and tuning after one more transition.

        `moments` are those of the window so far; chains that have not `arrived` (*g, C) say nothing of the target.
        """

    def restart(self, tuning: Any, moments: Moments, parameters: Any) -> tuple[Any, Any]:
        """Parameters and tuning to go on with under a new metric, which came from `moments`."""

    def finish(self, tuning: Any, parameters: Any) -> Any:
        """The parameters to freeze."""


class Plan(NamedTuple):
    """How a run adapts.

    Attributes:
        num_warmup: Transitions that adapt.
        target_accept: Mean acceptance rate that the step size is adapted to.
        metric: "diagonal", "dense", "low-rank" or "identity".
        pool: The acceptance rate (*g, 1) of chains (*g, C) that share a step size.
        tuner: Further adaptation. With it the chains share a step size once they have arrived, at the end of the second
            window or up to half of warm-up later, else after the last window.
        full_covariance: Whether windows keep the whole covariance, whatever the metric.
        num_chains: Chains of a group, with many of which a first metric can be had sooner.
    """

    num_warmup: int
    target_accept: float
    metric: str
    step_size: float | Tensor | None = None
    inverse_mass: Tensor | None = None
    pool: Callable[[Tensor, Tensor], Tensor] = lambda rate, diverging: rate.mean(-1, keepdim=True)
    tuner: Tuner | None = None
    full_covariance: bool = False
    num_chains: int = 1


class Carry(NamedTuple):
    """Between two transitions.

    Attributes:
        state: Where the chains are.
        parameters: Step size, metric and whatever else the sampler has.
        averaging: The search for the step size.
        moments: Positions of the window so far.
        tuning: The state of the tuner; None before it starts.
        count: Transitions since the chains share a step size; negative before.
    """

    state: State
    parameters: Any
    averaging: DualAveraging
    moments: Moments
    tuning: Any
    count: int


class Adapted:
    """A program of moves whose step size and metric warm-up adapts; see `_chains.Program`."""

    def __init__(
        self,
        where: str,
        evaluate: ValueAndGrad,
        move: Move,
        plan: Plan,
        settings: Mapping[str, Any],
        make_parameters: Callable[[Tensor, Metric], Any] = Parameters,
    ) -> None:
        _checks.at_least(where, "num_warmup", plan.num_warmup, 0, integer=True)
        _checks.inside(where, "target_accept", plan.target_accept, 0, 1)
        _checks.choice(where, "metric", plan.metric, ("diagonal", "dense", "low-rank", "identity"))
        self._where, self._evaluate, self._move, self._plan = where, evaluate, move, plan
        self._make_parameters = make_parameters
        self.num_warmup = plan.num_warmup
        own = {name: getattr(plan, name) for name in ("target_accept", "metric", "step_size", "inverse_mass")}
        self.settings = {**own, **settings}
        self._windows = adaptation.windows(plan.num_warmup, plan.num_chains)
        self._stop = self._windows[-1][1] if self._windows else 0
        early = self._windows[: adaptation.EARLY_WINDOWS]
        self._together = early[-1][1] if early and plan.tuner is not None else self._stop

    def start(self, q: Tensor, numbers: Numbers) -> tuple[Carry, float]:
        """The chains at q (*g, C, D), with step sizes of the right order."""
        state = init(self._evaluate, q)
        step_size = 1.0 if self._plan.step_size is None else self._plan.step_size
        first = _given_step_size(self._where, step_size, state.q)
        metric = _initial_metric(self._where, self._plan.metric, self._plan.inverse_mass, state.q)
        parameters = self._make_parameters(first, metric)
        spent = 1
        if self._plan.step_size is None:
            parameters, more = self._search(state, parameters, numbers)
            spent += more
        averaging = adaptation.start_dual_averaging(parameters.step_size)
        return Carry(state, parameters, averaging, self._no_moments(state, metric), None, -self._together), spent

    def warm(self, t: int, carry: Carry, numbers: Numbers) -> tuple[Carry, Any]:
        """Transition t, then what it says about step size, metric and the rest."""
        plan, tuner = self._plan, self._plan.tuner
        before, parameters, averaging, moments, tuning, count = carry
        if count == 0:
            parameters = _pool(parameters, before)
            averaging = adaptation.start_dual_averaging(parameters.step_size)
            if tuner is not None:
                parameters, tuning = tuner.start(tuning, parameters)
        state, info = self._move(before, parameters, numbers, count)
        rate = plan.pool(info.acceptance_rate, info.diverging) if count >= 0 else info.acceptance_rate
        averaging = adaptation.dual_average(averaging, rate, plan.target_accept)
        parameters = parameters._replace(step_size=averaging.log_step_size.exp().to(state.q))
        arrived = adaptation.arrived(before.log_density, state)
        if self._windows and self._windows[0][0] <= t < self._stop:
            moments = adaptation.add_to_moments(moments, *adaptation.stand_ins(state, arrived))
        if tuner is not None and count >= 0:
            parameters, tuning = tuner.observe(tuning, before, info, parameters, moments, arrived)
        # Chains that are still on their way would be left behind by a step size that suits the others.
        waiting = count == -1 and tuner is not None and 2 * t < self.num_warmup and not bool(arrived.all())
        carry = Carry(state, parameters, averaging, moments, tuning, count if waiting else count + 1)
        ends = any(t + 1 == end for _, end in self._windows)
        # What was seen while chains were on their way must not weigh in the metrics to come.
        if ends or (count == -1 and not waiting and self._together < t + 1 < self._stop):
            carry, more = self._end_window(carry, numbers)
            info = info._replace(num_gradients=info.num_gradients + more)
        return carry, info

    def freeze(self, carry: Carry, numbers: Numbers) -> Carry:
        """One step size for all, the average over its search; and what the tuner has found."""
        parameters = carry.parameters
        if self.num_warmup:
            parameters = parameters._replace(step_size=carry.averaging.log_average.exp().to(carry.state.q))
        if self._plan.tuner is not None and carry.tuning is not None:
            parameters = self._plan.tuner.finish(carry.tuning, parameters)
        return carry._replace(parameters=_pool(parameters, carry.state), count=max(carry.count, 0))

    def move(self, carry: Carry, numbers: Numbers) -> tuple[Carry, Any]:
        """One transition under the frozen parameters."""
        state, info = self._move(carry.state, carry.parameters, numbers, carry.count)
        return Carry(state, *carry[1:5], carry.count + 1), info

    def state(self, carry: Carry) -> State:
        """Where the chains are."""
        return carry.state

    def step_size(self, carry: Carry) -> Tensor:
        """The step sizes, (*g, 1) or (*g, C)."""
        return carry.parameters.step_size

    def _end_window(self, carry: Carry, numbers: Numbers) -> tuple[Carry, int]:
        """A new metric, and step sizes to go with it; also the gradients spent on them."""
        state, parameters, _, moments, tuning, count = carry
        if self._plan.metric != "identity":
            parameters = parameters._replace(metric=adaptation.estimate_metric(moments, parameters.metric))
        parameters, spent = self._search(state, parameters, numbers)
        if count >= 0:
            parameters = _pool(parameters, state)
        if self._plan.tuner is not None:
            parameters, tuning = self._plan.tuner.restart(tuning, moments, parameters)
        averaging = adaptation.start_dual_averaging(parameters.step_size)
        return Carry(state, parameters, averaging, self._no_moments(state, parameters.metric), tuning, count), spent

    def _search(self, state: State, parameters: Any, numbers: Numbers) -> tuple[Any, int]:
        """Step sizes of the right order, one per chain, and the gradients spent on them."""
        step_size, spent = adaptation.find_step_size(
            self._evaluate, *state, parameters.metric, numbers.search(), parameters.step_size
        )
        return parameters._replace(step_size=step_size), spent

    def _no_moments(self, state: State, metric: Metric) -> Moments:
        return adaptation.moments_for(state.q, metric, whole=self._plan.full_covariance)


def _pool(parameters: Any, state: State) -> Any:
    """One step size for all chains of a group."""
    if parameters.step_size.shape[-1] == 1:
        return parameters
    counts = state.log_density.isfinite()
    return parameters._replace(step_size=adaptation.pool_step_sizes(parameters.step_size, counts))


def _initial_metric(where: str, kind: str, inverse_mass: Tensor | None, q: Tensor) -> Metric:
    if kind == "identity" and inverse_mass is not None:
        fail(
            SettingError,
            where,
            'metric="identity" takes no inverse_mass.',
            got=f"inverse_mass of shape {tuple(inverse_mass.shape)}",
            fix='metric="diagonal", num_warmup=0 keeps a given inverse mass as it is',
        )
    dim = q.shape[-1]
    groups = tuple(q.shape[:-2])
    shape = (*groups, dim, dim) if kind == "dense" else (*groups, dim)
    if inverse_mass is None:
        inverse_mass = torch.eye(dim).to(q) if kind == "dense" else q.new_ones(dim)
    try:
        inverse_mass = inverse_mass.detach().to(q).expand(shape).contiguous()
    except RuntimeError:
        got = str(tuple(inverse_mass.shape))
        fail(ShapeError, where, f"inverse_mass must have shape {shape}.", got=got, fix="one per group and coordinate")
    if kind == "low-rank":
        rank = min(adaptation.RANK, dim)
        return low_rank_metric(inverse_mass, inverse_mass.new_zeros(*shape, rank), inverse_mass.new_ones(*groups, rank))
    return dense_metric(inverse_mass) if kind == "dense" else diagonal_metric(inverse_mass)


def _given_step_size(where: str, step_size: float | Tensor, q: Tensor) -> Tensor:
    value = torch.as_tensor(step_size, dtype=q.dtype, device=q.device).detach()
    groups = tuple(q.shape[:-2])
    if value.ndim and tuple(value.shape) != groups:
        wanted = f"step_size must be a number or have shape {groups}, one per group."
        fail(ShapeError, where, wanted, got=str(tuple(value.shape)), fix="pass one number")
    if not bool(((value > 0) & value.isfinite()).all()):
        fail(SettingError, where, "step_size must be positive.", got=str(step_size), fix="None searches for one")
    return value.expand(groups).unsqueeze(-1).clone()
