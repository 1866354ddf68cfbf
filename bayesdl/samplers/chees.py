r"""ChEES-HMC: trajectory lengths learned from many chains in lock step.

A transition is one of HMC with L = ceil(u T / eps) leapfrog steps, u from a Halton sequence, the same for all chains.
Warm-up raises the change in the estimator of the expected square, at the end q' of the trajectory,

    ChEES(T) = 1/4 E (|q' - E q'|^2 - |q - E q|^2)^2,

by Adam on log T. In coordinates whitened by the metric, |x|^2 = x' M x, its slope is

    d ChEES / d log T = u T E (|q' - E q'|^2 - |q - E q|^2) (q' - E q')' M v',    v' = M^{-1} p',

each chain weighted by its acceptance probability. With a diagonal metric the criterion settles on the length that suits
the many well-scaled directions, so T never falls below (pi/2) sqrt(lambda_max) of the covariance of the whitened
positions, the quarter period of the widest one (for at most 500 coordinates; above, the criterion stands alone).

References: Hoffman, Radul, Sountsov (2021), An adaptive-MCMC scheme for setting trajectory lengths in HMC, AISTATS;
the floor is that of BlackJAX.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers import adaptation
from bayesdl.samplers._chains import Move, Numbers, Plan, run_chains
from bayesdl.samplers.adaptation import Moments
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad
from bayesdl.samplers.hamiltonian import Metric, State, init, leapfrog, metropolis

__all__ = ["MAX_DENSE", "Info", "Parameters", "State", "init", "run", "step"]

MAX_DENSE = 500  # coordinates up to which covariances are kept whole
_LEARNING_RATE, _DECAY, _MAX_CHANGE = 0.025, 0.95, 0.35
_TRAVEL = 10  # longest trajectory, in steps, before trajectory lengths adapt


class Parameters(NamedTuple):
    """What warm-up adapts: the step size, (*g, 1) or one per chain (*g, C), the metric, and T, (*g)."""

    step_size: Tensor
    metric: Metric
    trajectory_length: Tensor


class Info(NamedTuple):
    """What a reader wants to know of a transition: tensors (*g, C), and the ends of the trajectories (*g, C, D)."""

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: Tensor
    num_gradients: int
    jitter: float
    proposal: Tensor
    momentum: Tensor


def step(
    evaluate: ValueAndGrad,
    state: State,
    parameters: Parameters,
    noise: Tensor,
    uniform: Tensor,
    jitter: float,
    max_steps: int = 1000,
) -> tuple[State, Info]:
    """One transition of every chain: a pure function of its arguments.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        state: Where the chains are.
        parameters: Step size, shared by the chains of a group, metric and T.
        noise: Standard normal numbers that broadcast to (*g, C, D), for the momenta.
        uniform: Numbers on [0, 1) that broadcast to (*g, C), for the accept decision.
        jitter: u in (0, 1]: a trajectory has ceil(u T / eps) steps, at least one.
        max_steps: No more steps than this.

    Cost: L gradients; groups with shorter trajectories wait for the longest.
    """
    length = jitter * parameters.trajectory_length / parameters.step_size.squeeze(-1)
    num_steps = length.ceil().clamp(1, max_steps).nan_to_num(nan=1.0).long()
    return _follow(evaluate, state, parameters, noise, uniform, num_steps, jitter)


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    max_steps: int = 1000,
    target_accept: float = 0.651,
    metric: Literal["auto", "diagonal", "dense", "identity"] = "auto",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    trajectory_length: float | Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "ChEES-HMC",
) -> Run:
    r"""Adapt, then draw: `num_warmup` transitions, then `num_draws * thin` with everything frozen.

    Made for many chains, 16 or more: they are what the trajectory length and a dense metric are learned from. Warm-up
    first lets the chains travel, each with a step size of its own; then they share one, adapted to the harmonic mean of
    their acceptance rates, and T and the metric follow in windows. The groups of a run are independent, as in
    `hmc.run`. With `num_warmup=0` and a given step size a chain does not depend on the others.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C).
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_warmup: Transitions that adapt; not kept.
        num_draws: Draws kept per chain.
        max_steps: Longest trajectory in leapfrog steps.
        target_accept: Harmonic mean of the acceptance rates that the step size is adapted to, in (0, 1).
        metric: "diagonal", "dense" or "identity"; "auto" takes "dense" for at most 500 coordinates, where the longest
            window holds at least five positions for each.
        step_size: Where the step size starts, a number or (*g); searched for when None.
        inverse_mass: Where the inverse mass matrix starts, (*g, D), or (*g, D, D) for a dense metric; the identity
            when None.
        trajectory_length: T where it starts, in units of whitened time, a number or (*g); None starts from a few steps
            in warm-up and is pi/2 without one.
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

    Cost: about T / (2 eps) gradients a transition; in warm-up O(C D^2) a transition and O(D^3) a window besides, for
    at most 500 coordinates.

    Reference: Hoffman, Radul, Sountsov (2021), AISTATS.
    """
    _checks.at_least("chees.run", "max_steps", max_steps, 1, integer=True)
    _checks.choice("chees.run", "metric", metric, ("auto", "diagonal", "dense", "identity"))
    _check_length(trajectory_length)
    kind = _metric_for(initial, num_warmup, inverse_mass) if metric == "auto" else metric
    tuner = _TrajectoryTuner(fixed_start=trajectory_length is not None)

    def make_parameters(first: Tensor, initial_metric: Metric) -> Parameters:
        start = math.pi / 2 if trajectory_length is None else trajectory_length
        length = torch.as_tensor(start).to(first).expand(first.shape[:-1]).clone()
        return Parameters(first, initial_metric, length)

    plan = Plan(num_warmup, num_draws, thin, target_accept, kind, _harmonic_mean, tuner, _whole(initial))
    result, parameters = run_chains(
        "chees.run",
        log_density,
        initial,
        plan,
        lambda evaluate, numbers: _moves(evaluate, numbers, max_steps, tuner if num_warmup else None),
        make_parameters,
        step_size=step_size,
        inverse_mass=inverse_mass,
        seed=seed,
        progress=progress,
        description=description,
    )
    return result._replace(trajectory_length=parameters.trajectory_length)


def _moves(evaluate: ValueAndGrad, numbers: Numbers, max_steps: int, tuner: _TrajectoryTuner | None) -> Move:
    """Short trajectories until the tuner has started, then those of `step` with the jitter of the sequence."""
    count = 0

    def move(state: State, parameters: Parameters) -> tuple[State, Info]:
        nonlocal count
        noise, uniform = numbers.momentum(), numbers.uniform()
        if tuner is not None and not tuner.started:
            length = state.q.new_full(state.q.shape[:-2], numbers.length(_TRAVEL), dtype=torch.int64)
            return _follow(evaluate, state, parameters, noise, uniform, length, 1.0)
        count += 1
        return step(evaluate, state, parameters, noise, uniform, _halton(count), max_steps)

    return move


def _check_length(trajectory_length: float | Tensor | None) -> None:
    if trajectory_length is not None:
        _checks.inside("chees.run", "trajectory_length", float(torch.as_tensor(trajectory_length).min()), 0, math.inf)


def _follow(
    evaluate: ValueAndGrad,
    state: State,
    parameters: Parameters,
    noise: Tensor,
    uniform: Tensor,
    num_steps: Tensor,
    jitter: float,
) -> tuple[State, Info]:
    """A trajectory of `num_steps` (*g) steps. A group that has done its own stands still while others go on."""
    step_size, metric, _ = parameters
    p = metric.momentum(noise).expand_as(state.q)
    end, p_end = state, p
    done = 0
    for count in sorted(set(num_steps.flatten().tolist())):
        size = torch.where(num_steps.unsqueeze(-1) >= count, step_size, 0.0) if num_steps.ndim else step_size
        q, p_end, *rest = leapfrog(evaluate, end.q, p_end, end.grad, size, metric, count - done)
        end, done = State(q, *rest), count
    after, decision = metropolis(state, p, end, p_end, metric, uniform)
    each = num_steps.unsqueeze(-1).expand_as(state.log_density)
    return after, Info(*decision, each, done, jitter, end.q, p_end)


class _TrajectoryTuner:
    """Adam on log T, restarted under every new metric from the floor; an average of the path is what is frozen."""

    def __init__(self, *, fixed_start: bool) -> None:
        self.started = False
        self._fixed_start = fixed_start
        self._count = 0
        self._floor: Tensor | None = None
        self._centre: Tensor | None = None

    def start(self, parameters: Parameters) -> Parameters:
        """From as far as the chains have travelled in a transition."""
        self.started = True
        if not self._fixed_start:
            length = _TRAVEL * parameters.step_size.squeeze(-1)
            parameters = parameters._replace(trajectory_length=length)
        self._begin(parameters)
        return parameters

    def observe(self, before: State, info: Info, parameters: Parameters, moments: Moments) -> Parameters:
        """One step along the slope of the criterion; its centre is the mean of all positions of the window."""
        if moments.count:
            self._centre = moments.mean
        centre = before.q.mean(-2) if self._centre is None else self._centre.to(before.q)
        slope = _slope(before.q, info, parameters, centre.unsqueeze(-2))
        self._count += 1
        self._square = _DECAY * self._square + (1 - _DECAY) * slope.square()
        scale = (self._square / (1 - _DECAY**self._count)).sqrt()
        change = torch.where(scale > 0, _LEARNING_RATE * slope / scale, 0.0)
        self._log_length = self._log_length + change.clamp(-_MAX_CHANGE, _MAX_CHANGE)
        if self._floor is not None:
            self._log_length = torch.maximum(self._log_length, self._floor.log())
        weight = self._count**-0.5
        self._average = weight * self._log_length + (1 - weight) * self._average
        return parameters._replace(trajectory_length=self._log_length.exp().to(parameters.trajectory_length))

    def restart(self, moments: Moments, parameters: Parameters) -> Parameters:
        """The unit of time has changed with the metric: begin again at the floor, where there is one."""
        floor = _quarter_period(moments, parameters.metric)
        if floor is not None:
            self._floor = floor
            parameters = parameters._replace(trajectory_length=floor.to(parameters.trajectory_length))
        elif self._count:
            start = parameters.trajectory_length.new_tensor(math.pi / 2).expand_as(parameters.trajectory_length)
            parameters = parameters._replace(trajectory_length=start)
        self._begin(parameters)
        return parameters

    def finish(self, parameters: Parameters) -> Parameters:
        """The average, in which the jitter of the slopes has died away."""
        if not self._count:
            return parameters
        return parameters._replace(trajectory_length=self._average.exp().to(parameters.trajectory_length))

    def _begin(self, parameters: Parameters) -> None:
        self._log_length = self._average = parameters.trajectory_length.double().log()
        self._square = torch.zeros_like(self._log_length)
        self._count = 0


def _slope(q: Tensor, info: Info, parameters: Parameters, centre: Tensor) -> Tensor:
    """d ChEES / d log T of a group, (*g): the mean over chains, weighted by their acceptance probabilities."""
    start = _whitened_square(q - centre, parameters.metric)
    end = _whitened_square(info.proposal - centre, parameters.metric)
    along = ((info.proposal - centre) * info.momentum).sum(-1, dtype=torch.float64)
    weight = info.acceptance_rate
    slopes = torch.where(weight > 0, (end - start) * along, 0.0)
    total = (weight * slopes).sum(-1) / weight.sum(-1).clamp(min=1e-300)
    length = info.jitter * parameters.trajectory_length.double()
    return (length * total).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _whitened_square(x: Tensor, metric: Metric) -> Tensor:
    """x' M x, (*g, C): the squared norm of L^{-1} x with M^{-1} = L L'."""
    if metric.dense:
        whitened = torch.linalg.solve_triangular(metric.root, x.mT, upper=False).mT
        return whitened.square().sum(-1, dtype=torch.float64)
    return (x.square() / metric.inverse_mass.unsqueeze(-2)).sum(-1, dtype=torch.float64)


def _quarter_period(moments: Moments, metric: Metric) -> Tensor | None:
    """(pi/2) sqrt(lambda_max) of the whitened covariance of a window, (*g); None where only its diagonal was kept."""
    if moments.scatter.ndim == moments.mean.ndim:
        return None
    covariance = moments.scatter / max(moments.count - 1, 1)
    if metric.dense:
        root = metric.root.double()
        half = torch.linalg.solve_triangular(root, covariance, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
    else:
        root = metric.root.double()
        whitened = covariance / (root.unsqueeze(-1) * root.unsqueeze(-2))
    largest = torch.linalg.eigvalsh(0.5 * (whitened + whitened.mT).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))[..., -1]
    return math.pi / 2 * largest.clamp(min=1e-12).sqrt()


def _harmonic_mean(rate: Tensor, diverging: Tensor) -> Tensor:
    """1 / mean(1 / rate) over the chains that did not diverge, (*g, 1): one chain in trouble keeps steps small."""
    counts = (~diverging).sum(-1, keepdim=True)
    inverse = torch.where(diverging, 0.0, 1 / rate.clamp(min=1e-12)).sum(-1, keepdim=True)
    return torch.where(counts > 0, counts / inverse.clamp(min=1e-300), 0.0)


def _halton(i: int) -> float:
    """The i-th number of the van der Corput sequence in base 2 (i from 1): 1/2, 1/4, 3/4, 1/8, …"""
    value, weight = 0.0, 0.5
    while i:
        value, weight, i = value + weight * (i & 1), weight / 2, i >> 1
    return value


def _whole(initial: Any) -> bool:
    return isinstance(initial, Tensor) and initial.ndim > 0 and initial.shape[-1] <= MAX_DENSE


def _metric_for(initial: Any, num_warmup: int, inverse_mass: Tensor | None) -> str:
    """What "auto" means for these chains."""
    if inverse_mass is not None and isinstance(initial, Tensor):
        return "dense" if inverse_mass.ndim >= 2 and inverse_mass.shape[-2] == initial.shape[-1] else "diagonal"
    if not _whole(initial) or initial.ndim < 2 or isinstance(num_warmup, bool) or not isinstance(num_warmup, int):
        return "diagonal"
    longest = max((end - start for start, end in adaptation.slow_windows(num_warmup)), default=0)
    return "dense" if longest * initial.shape[-2] >= 5 * initial.shape[-1] else "diagonal"
