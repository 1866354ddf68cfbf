"""What the Hamiltonian samplers share: their random numbers, one warm-up, and the loop that keeps the draws.

A sampler gives a `Move`, which takes the chains from one state to the next under given parameters. Groups *g are
independent problems of one shape: each adapts its own step size and metric, and all see the same random numbers, so
that a run of groups equals a loop over them up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, Streams, child_seeds, generator
from bayesdl.errors import NumericalError, SettingError, ShapeError, fail
from bayesdl.samplers import adaptation
from bayesdl.samplers.adaptation import Moments
from bayesdl.samplers.base import (
    LogDensityFn,
    Run,
    ValueAndGrad,
    check_initial,
    check_log_density,
    value_and_grad,
)
from bayesdl.samplers.hamiltonian import Metric, Parameters, State, dense_metric, diagonal_metric, init
from bayesdl.samplers.progress import Progress

# What a move reports: at least acceptance_rate, diverging and energy (*g, C), num_steps, and num_gradients (a number).
# What it obeys: at least step_size and metric, as in `Parameters`.
Move: TypeAlias = Callable[[State, Any], tuple[State, Any]]


class Numbers:
    """All random numbers of a run: a stream for each chain, one for the lengths, and one per chain for the searches."""

    def __init__(self, seed: Seed, q: Tensor) -> None:
        chain_seed, length_seed, search_seed = child_seeds(seed, 3)
        self._like = q
        self._wide = torch.empty(0, dtype=torch.float64, device=q.device)
        self._chains = Streams(chain_seed, q.shape[-2], q.device)
        self._searches = Streams(search_seed, q.shape[-2], q.device)
        self._lengths = generator(length_seed)

    def momentum(self) -> Tensor:
        """Standard normal numbers (C, D)."""
        return self._chains.normal(self._like.shape[-1], like=self._like)

    def uniform(self) -> Tensor:
        """Numbers on [0, 1) in the dtype of the positions, (C)."""
        return self._chains.uniform(like=self._like)

    def wide_uniform(self) -> Tensor:
        """Numbers on [0, 1) in float64, (C)."""
        return self._chains.uniform(like=self._wide)

    def length(self, longest: int) -> int:
        """A whole number from ceil(longest / 2) to `longest`, for all chains."""
        return int(torch.randint(-(-longest // 2), longest + 1, (), generator=self._lengths))

    def search(self) -> Tensor:
        """Standard normal numbers (C, D), from a stream that transitions do not touch."""
        return self._searches.normal(self._like.shape[-1], like=self._like)


class Tuner(Protocol):
    """What a sampler adapts beyond step size and metric, once the chains share a step size."""

    def start(self, parameters: Any) -> Any:
        """The parameters with which to begin."""

    def observe(self, before: State, info: Any, parameters: Any, moments: Moments) -> Any:
        """The parameters after one more transition; `moments` are those of the window so far."""

    def restart(self, moments: Moments, parameters: Any) -> Any:
        """The parameters to go on with under a new metric, which came from `moments`."""

    def finish(self, parameters: Any) -> Any:
        """The parameters to freeze."""


class Plan(NamedTuple):
    """How a run adapts and how long it is.

    Attributes:
        num_warmup: Transitions that adapt.
        num_draws: Draws kept.
        thin: Transitions per kept draw.
        target_accept: Mean acceptance rate that the step size is adapted to.
        metric: "diagonal", "dense" or "identity".
        pool: The acceptance rate (*g, 1) of chains (*g, C) that share a step size.
        tuner: Further adaptation. With it the chains share a step size from the first window on, else after the last.
    """

    num_warmup: int
    num_draws: int
    thin: int
    target_accept: float
    metric: str
    pool: Callable[[Tensor, Tensor], Tensor] = lambda rate, diverging: rate.mean(-1, keepdim=True)
    tuner: Tuner | None = None
    full_covariance: bool = False


def run_chains(
    where: str,
    log_density: LogDensityFn,
    initial: Tensor,
    plan: Plan,
    make_move: Callable[[ValueAndGrad, Numbers], Move],
    make_parameters: Callable[[Tensor, Metric], Any] = Parameters,
    *,
    step_size: float | Tensor | None,
    inverse_mass: Tensor | None,
    seed: Seed,
    progress: bool,
    description: str,
) -> tuple[Run, Any]:
    """Adapt, then draw with everything frozen; see `hmc.run`. Returns the run and the frozen parameters."""
    began = time.perf_counter()
    _check_plan(where, plan)
    check_initial(where, initial)
    check_log_density(where, log_density, initial)
    evaluate = value_and_grad(log_density)
    state = init(evaluate, initial.detach())
    numbers = Numbers(seed, state.q)
    first = _given_step_size(where, 1.0 if step_size is None else step_size, state.q)
    parameters = make_parameters(first, _initial_metric(where, plan.metric, inverse_mass, state.q))
    move, search = make_move(evaluate, numbers), _Search(evaluate, numbers)
    if step_size is None:
        parameters = search(state, parameters)
    bar = Progress(plan.num_warmup + plan.num_draws * plan.thin, description, progress)
    try:
        state, parameters, spent = _warm_up(plan, move, search, state, parameters, bar)
        _check_alive(where, state)
        draws, stats, more = _draw(plan, move, state, parameters, bar)
    finally:
        bar.close()
    if draws.is_cuda:
        torch.cuda.synchronize(draws.device)
    seconds = time.perf_counter() - began
    num_gradients = -int(-(1 + search.spent + spent + more) // 1)
    frozen = parameters.step_size.squeeze(-1)
    return Run(draws, stats, frozen, parameters.metric.inverse_mass, num_gradients, seconds), parameters


class _Search:
    """Finds step sizes of the right order, one per chain, and counts the gradients that it spends."""

    def __init__(self, evaluate: ValueAndGrad, numbers: Numbers) -> None:
        self._evaluate, self._numbers, self.spent = evaluate, numbers, 0

    def __call__(self, state: State, parameters: Any) -> Any:
        step_size, spent = adaptation.find_step_size(
            self._evaluate, *state, parameters.metric, self._numbers.search(), parameters.step_size
        )
        self.spent += spent
        return parameters._replace(step_size=step_size)


def _warm_up(
    plan: Plan, move: Move, search: _Search, state: State, parameters: Any, bar: Progress
) -> tuple[State, Any, float]:
    """The chains after warm-up, the parameters to freeze, and the gradients spent on transitions."""
    windows = adaptation.slow_windows(plan.num_warmup)
    ends = {end for _, end in windows}
    stop = windows[-1][1] if windows else 0
    together = windows[0][0] if windows and plan.tuner is not None else stop
    dense = parameters.metric.dense or plan.full_covariance
    averaging = adaptation.start_dual_averaging(parameters.step_size)
    moments = adaptation.start_moments(state.q, dense)
    spent = 0.0
    for t in range(plan.num_warmup):
        if t == together:
            parameters = _pool(parameters, state)
            averaging = adaptation.start_dual_averaging(parameters.step_size)
            parameters = parameters if plan.tuner is None else plan.tuner.start(parameters)
        before = state
        state, info = move(state, parameters)
        spent += info.num_gradients
        bar.update(parameters.step_size, info.acceptance_rate, info.diverging, warmup=True)
        rate = plan.pool(info.acceptance_rate, info.diverging) if t >= together else info.acceptance_rate
        averaging = adaptation.dual_average(averaging, rate, plan.target_accept)
        parameters = parameters._replace(step_size=averaging.log_step_size.exp().to(state.q))
        if windows and windows[0][0] <= t < stop:
            moments = adaptation.add_to_moments(moments, state.q)
        if plan.tuner is not None and t >= together:
            parameters = plan.tuner.observe(before, info, parameters, moments)
        if t + 1 not in ends:
            continue
        if plan.metric != "identity":
            parameters = parameters._replace(metric=adaptation.estimate_metric(moments, parameters.metric))
        parameters = search(state, parameters)
        if t + 1 >= together:
            parameters = _pool(parameters, state)
        if plan.tuner is not None:
            parameters = plan.tuner.restart(moments, parameters)
        averaging = adaptation.start_dual_averaging(parameters.step_size)
        moments = adaptation.start_moments(state.q, dense)
    if plan.num_warmup:
        parameters = parameters._replace(step_size=averaging.log_average.exp().to(state.q))
        parameters = parameters if plan.tuner is None else plan.tuner.finish(parameters)
    return state, _pool(parameters, state), spent


def _pool(parameters: Any, state: State) -> Any:
    """One step size for all chains of a group."""
    if parameters.step_size.shape[-1] == 1:
        return parameters
    counts = state.log_density.isfinite()
    return parameters._replace(step_size=adaptation.pool_step_sizes(parameters.step_size, counts))


def _draw(
    plan: Plan, move: Move, state: State, parameters: Any, bar: Progress
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Draws, statistics, and the gradients spent per chain; the parameters stay as they are."""
    chains, num_draws = state.log_density.shape, plan.num_draws
    wide = {"dtype": torch.float64, "device": state.q.device}
    whole = {"dtype": torch.int64, "device": state.q.device}
    draws = state.q.new_empty(*chains, num_draws, state.q.shape[-1])
    stats = {
        "log_density": state.log_density.new_empty(*chains, num_draws),
        "energy": torch.empty(*chains, num_draws, **wide),
        "energy_change": torch.empty(*chains, num_draws, **wide),
        "acceptance_rate": torch.zeros(*chains, num_draws, **wide),
        "diverging": torch.zeros(*chains, num_draws, dtype=torch.bool, device=state.q.device),
        "num_steps": torch.zeros(*chains, num_draws, **whole),
        "step_size": parameters.step_size.unsqueeze(-1).expand(*chains, num_draws).contiguous(),
    }
    current = torch.full(chains, torch.nan, **wide)
    spent = 0.0
    for i in range(num_draws):
        for _ in range(plan.thin):
            previous = current
            state, info = move(state, parameters)
            current = info.energy
            spent += info.num_gradients
            stats["acceptance_rate"][..., i] += info.acceptance_rate / plan.thin
            stats["diverging"][..., i] |= info.diverging
            stats["num_steps"][..., i] += info.num_steps
            if hasattr(info, "tree_depth"):
                depths = stats.setdefault("tree_depth", torch.zeros(*chains, num_draws, **whole))
                depths[..., i] = torch.maximum(depths[..., i], info.tree_depth)
            bar.update(parameters.step_size, info.acceptance_rate, info.diverging, warmup=False)
        draws[..., i, :] = state.q
        stats["log_density"][..., i] = state.log_density
        stats["energy"][..., i] = current
        stats["energy_change"][..., i] = current - previous
    return draws, stats, spent


def _check_plan(where: str, plan: Plan) -> None:
    _checks.at_least(where, "num_warmup", plan.num_warmup, 0, integer=True)
    _checks.at_least(where, "num_draws", plan.num_draws, 1, integer=True)
    _checks.at_least(where, "thin", plan.thin, 1, integer=True)
    _checks.inside(where, "target_accept", plan.target_accept, 0, 1)
    _checks.choice(where, "metric", plan.metric, ("diagonal", "dense", "identity"))


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
    return dense_metric(inverse_mass) if kind == "dense" else diagonal_metric(inverse_mass)


def _given_step_size(where: str, step_size: float | Tensor, q: Tensor) -> Tensor:
    value = torch.as_tensor(step_size).detach().to(q)
    groups = tuple(q.shape[:-2])
    if value.ndim and tuple(value.shape) != groups:
        wanted = f"step_size must be a number or have shape {groups}, one per group."
        fail(ShapeError, where, wanted, got=str(tuple(value.shape)), fix="pass one number")
    if not bool(((value > 0) & value.isfinite()).all()):
        fail(SettingError, where, "step_size must be positive.", got=str(step_size), fix="None searches for one")
    return value.expand(groups).unsqueeze(-1).clone()


def _check_alive(where: str, state: State) -> None:
    dead = ~state.log_density.isfinite()
    if bool(dead.any()):
        fail(
            NumericalError,
            where,
            "every chain must have reached a finite log density when warm-up ends.",
            got=f"{int(dead.sum())} of {dead.numel()} chains at NaN or infinity",
            fix="start the chains where log_density is finite, or warm up for longer",
        )
