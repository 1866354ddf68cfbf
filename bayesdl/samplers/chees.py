r"""ChEES-HMC: trajectory lengths learned from many chains in lock step.

A transition is one of HMC with L = ceil(u T / eps) leapfrog steps, u from a Halton sequence, the same for all chains.
Warm-up raises the change in the estimator of the expected square, at the end q' of the trajectory,

    ChEES(T) = 1/4 E (|q' - E q'|^2 - |q - E q|^2)^2,

by Adam on log T. In coordinates whitened by the metric, |x|^2 = x' M x, its slope is

    d ChEES / d log T = u T E (|q' - E q'|^2 - |q - E q|^2) (q' - E q')' M v',    v' = M^{-1} p',

each chain weighted by its acceptance probability. With a diagonal metric the criterion settles on the length that suits
the many well-scaled directions, so T never falls below (pi/2) sqrt(lambda_max) of the covariance of the whitened
positions, the quarter period of the widest one. Above 500 coordinates that is measured in the direction in which half
of the positions vary most, by the other half, and the metric is a low-rank one.

References: Hoffman, Radul, Sountsov (2021), An adaptive-MCMC scheme for setting trajectory lengths in HMC, AISTATS;
the floor is that of BlackJAX.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers import adaptation, hamiltonian, nuts
from bayesdl.samplers._adapted import Adapted, Move, Plan
from bayesdl.samplers._chains import Numbers, drive
from bayesdl.samplers._low_rank import largest_variance
from bayesdl.samplers._stuck import warn_of_stuck_chains
from bayesdl.samplers.adaptation import Moments
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad, value_and_grad
from bayesdl.samplers.hamiltonian import Metric, State, init, leapfrog, metropolis

__all__ = ["MAX_DENSE", "Info", "Parameters", "State", "init", "run", "step"]

MAX_DENSE = 500  # coordinates up to which covariances are kept whole
_LEARNING_RATE, _DECAY, _MAX_CHANGE = 0.025, 0.95, 0.35
_TRAVEL = 10  # steps of the first trajectories, where no window has given a floor
_TRAVEL_DEPTH = 8  # of the trees by which chains travel at first


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
    metric: Literal["auto", "diagonal", "dense", "low-rank", "identity"] = "auto",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    trajectory_length: float | Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "ChEES-HMC",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Run:
    r"""Adapt, then draw: `num_warmup` transitions, then `num_draws * thin` with everything frozen.

    Made for 16 chains or more: T and a dense metric are learned from them. In warm-up the chains first travel, each
    with a step size of its own; then they share one, adapted to the harmonic mean of their acceptance rates, and T and
    the metric follow in windows. Groups are independent, and so are chains in the end, as in `hmc.run`.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C).
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_warmup: Transitions that adapt; not kept.
        num_draws: Draws kept per chain.
        max_steps: Longest trajectory in leapfrog steps.
        target_accept: Harmonic mean of the acceptance rates that the step size is adapted to, in (0, 1).
        metric: "diagonal", "dense", "low-rank" or "identity"; "auto" takes "dense" for at most 500 coordinates, where
            the longest window holds at least five positions for each, and else "low-rank".
        step_size, inverse_mass: Where they start; see `hmc.run`.
        trajectory_length: T where it starts, in units of whitened time, a number or (*g); None starts from a few steps
            in warm-up and is pi/2 without one.
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

    Cost: about T / (2 eps) gradients a transition; in warm-up O(C D^2) besides, O(D^3) a window, for D <= 500.
    """
    _checks.at_least("chees.run", "max_steps", max_steps, 1, integer=True)
    _checks.choice("chees.run", "metric", metric, ("auto", "diagonal", "dense", "low-rank", "identity"))
    _check_length(trajectory_length)
    kind = _metric_for(initial, num_warmup, inverse_mass) if metric == "auto" else metric
    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    tuner = _TrajectoryTuner(fixed_start=trajectory_length is not None)
    plan = Plan(num_warmup, target_accept, kind, step_size, inverse_mass, _harmonic_mean, tuner, *_extent(initial))
    settings = {"max_steps": max_steps, "trajectory_length": trajectory_length}
    move, make = _moves(evaluate, max_steps), _parameters_from(trajectory_length)
    program = Adapted("chees.run", evaluate, move, plan, settings, make)
    result, carry = drive(
        "chees.run",
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
    warn_of_stuck_chains("chees.run", result, num_warmup)
    _, found, length = carry.parameters
    return result._replace(inverse_mass=found.reported(), trajectory_length=length)


def _parameters_from(trajectory_length: float | Tensor | None) -> Callable[[Tensor, Metric], Parameters]:
    def make(step_size: Tensor, metric: Metric) -> Parameters:
        start = math.pi / 2 if trajectory_length is None else trajectory_length
        length = torch.as_tensor(start, dtype=step_size.dtype, device=step_size.device)
        length = length.expand(step_size.shape[:-1]).clone()
        return Parameters(step_size, metric, length)

    return make


def _moves(evaluate: ValueAndGrad, max_steps: int) -> Move:
    """Transitions of NUTS until the chains share a step size, then those of `step` with the jitter of the sequence.

    A chain that is far from where it belongs, or beside a saddle, gets there by a long way downhill, of a length that
    nobody knows yet. The trees of this travel keep to `max_steps` as well.
    """
    depth = max(1, min(_TRAVEL_DEPTH, max_steps.bit_length()))

    def move(state: State, parameters: Parameters, numbers: Numbers, count: int) -> tuple[State, Info | nuts.Info]:
        noise = numbers.momentum()
        if count < 0:
            shared = hamiltonian.Parameters(parameters.step_size, parameters.metric)
            return nuts.step(evaluate, state, shared, noise, numbers.wide_uniform(), depth)
        uniform = numbers.uniform()
        return step(evaluate, state, parameters, noise, uniform, _halton(count + 1), max_steps)

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


class _Tuning(NamedTuple):
    """Log T, the average of its path and the running square of its slopes, (*g) in float64; T never falls below `floor`
    (*g), and `centre` (*g, D) is the mean of the positions, where either is known."""

    log_length: Tensor
    average: Tensor
    square: Tensor
    count: int
    floor: Tensor | None
    centre: Tensor | None


class _TrajectoryTuner:
    """Adam on log T, restarted under every new metric from the floor; an average of the path is what is frozen."""

    def __init__(self, *, fixed_start: bool) -> None:
        self._fixed_start = fixed_start

    def start(self, tuning: _Tuning | None, parameters: Parameters) -> tuple[Parameters, _Tuning]:
        """From the floor where a window has given one, else from a few steps."""
        if tuning is not None:
            return parameters, tuning
        if not self._fixed_start:
            length = _TRAVEL * parameters.step_size.squeeze(-1)
            parameters = parameters._replace(trajectory_length=length)
        return parameters, _begin(parameters, None, None)

    def observe(
        self, tuning: _Tuning, before: State, info: Info, parameters: Parameters, moments: Moments, arrived: Tensor
    ) -> tuple[Parameters, _Tuning]:
        """One step along the slope of the criterion; its centre is the mean of all positions of the window."""
        log_length, average, square, count, floor, known = tuning
        known = moments.mean if moments.count else known
        centre = before.q.mean(-2) if known is None else known.to(before.q)
        slope = _slope(before.q, info, parameters, centre.unsqueeze(-2), arrived)
        count += 1
        square = _DECAY * square + (1 - _DECAY) * slope.square()
        scale = (square / (1 - _DECAY**count)).sqrt()
        change = torch.where(scale > 0, _LEARNING_RATE * slope / scale, 0.0)
        log_length = log_length + change.clamp(-_MAX_CHANGE, _MAX_CHANGE)
        if floor is not None:
            log_length = torch.maximum(log_length, floor.log())
        weight = count**-0.5
        average = weight * log_length + (1 - weight) * average
        parameters = parameters._replace(trajectory_length=log_length.exp().to(parameters.trajectory_length))
        return parameters, _Tuning(log_length, average, square, count, floor, known)

    def restart(self, tuning: _Tuning, moments: Moments, parameters: Parameters) -> tuple[Parameters, _Tuning]:
        """The unit of time has changed with the metric: begin again at the floor, where there is one."""
        floor = _quarter_period(moments, parameters.metric)
        known = None if tuning is None else tuning.centre
        if tuning is None and self._fixed_start:
            return parameters, _begin(parameters, None, known)
        start = parameters.trajectory_length.new_tensor(math.pi / 2) if floor is None else floor
        start = start.to(parameters.trajectory_length).expand_as(parameters.trajectory_length)
        parameters = parameters._replace(trajectory_length=start)
        return parameters, _begin(parameters, floor, known)

    def finish(self, tuning: _Tuning, parameters: Parameters) -> Parameters:
        """The average, in which the jitter of the slopes has died away."""
        if not tuning.count:
            return parameters
        return parameters._replace(trajectory_length=tuning.average.exp().to(parameters.trajectory_length))


def _begin(parameters: Parameters, floor: Tensor | None, centre: Tensor | None) -> _Tuning:
    start = parameters.trajectory_length.double().log()
    return _Tuning(start, start, torch.zeros_like(start), 0, floor, centre)


def _slope(q: Tensor, info: Info, parameters: Parameters, centre: Tensor, counts: Tensor) -> Tensor:
    """d ChEES / d log T of a group, (*g): the mean over chains that count, weighted by their acceptance."""
    start = _whitened_square(q - centre, parameters.metric)
    end = _whitened_square(info.proposal - centre, parameters.metric)
    along = ((info.proposal - centre) * info.momentum).sum(-1, dtype=torch.float64)
    weight = info.acceptance_rate * counts
    slopes = torch.where(weight > 0, (end - start) * along, 0.0)
    total = (weight * slopes).sum(-1) / weight.sum(-1).clamp(min=1e-300)
    length = info.jitter * parameters.trajectory_length.double()
    return (length * total).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _whitened_square(x: Tensor, metric: Metric) -> Tensor:
    """x' M x, (*g, C): the squared norm of L^{-1} x with M^{-1} = L L'."""
    return metric.whiten_positions(x).square().sum(-1, dtype=torch.float64)


def _quarter_period(moments: Moments, metric: Metric) -> Tensor | None:
    """(pi/2) sqrt(lambda_max) of the whitened covariance of a window, (*g); None where only its diagonal was kept."""
    wide = Metric(*(part.double() if isinstance(part, Tensor) else part for part in metric))
    if moments.scatter.ndim > moments.mean.ndim:
        half = wide.whiten_positions(moments.scatter / max(moments.count - 1, 1))
        whitened = wide.whiten_positions(half.mT)
        whitened = 0.5 * (whitened + whitened.mT).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        largest = torch.linalg.eigvalsh(whitened)[..., -1]
    elif moments.kept is not None and moments.kept.filled >= 4:
        largest = largest_variance(
            wide.whiten_positions(moments.kept.positions[..., : moments.kept.filled, :].double())
        )
    else:
        return None
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


def _extent(initial: Any) -> tuple[bool, int]:
    """Whether covariances are kept whole, and the number of chains."""
    return _whole(initial), adaptation.count_chains(initial)


def _whole(initial: Any) -> bool:
    return isinstance(initial, Tensor) and initial.ndim > 0 and initial.shape[-1] <= MAX_DENSE


def _metric_for(initial: Any, num_warmup: int, inverse_mass: Tensor | None) -> str:
    """What "auto" means for these chains."""
    if inverse_mass is not None and isinstance(initial, Tensor):
        return "dense" if inverse_mass.ndim >= 2 and inverse_mass.shape[-2] == initial.shape[-1] else "diagonal"
    if not isinstance(initial, Tensor) or initial.ndim < 2 or isinstance(num_warmup, bool):
        return "diagonal"
    windows = adaptation.windows(num_warmup, initial.shape[-2]) if isinstance(num_warmup, int) else ()
    longest = max((end - start for start, end in windows), default=0)
    if not longest:
        return "diagonal"
    return "dense" if _whole(initial) and longest * initial.shape[-2] >= 5 * initial.shape[-1] else "low-rank"
