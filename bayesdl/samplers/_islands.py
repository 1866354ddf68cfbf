"""Islands of particles on their way through the temperatures: what `smc` keeps of them, and one iteration.

Islands do not wait for each other: in each iteration every island makes one HMC transition at its own temperature,
after it has begun a new stage if its last one was over. So no gradient is spent on an island that stands still before
the end, and an island draws the same random numbers among others as alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bayesdl.samplers import _tempering
from bayesdl.samplers.hamiltonian import MAX_ENERGY_ERROR, Metric, dense_metric, diagonal_metric

Evaluate: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


class State(NamedTuple):
    """All that the next iteration needs, one entry an island: N particles each, leading axes *i = (*g, islands).

    Attributes:
        q: Positions, (*i, N, D).
        reference: Log density of the reference there (*i, N); `reference_grad` its gradient (*i, N, D).
        target: Log density of the target there (*i, N); `target_grad` its gradient (*i, N, D).
        start: Positions when the stage began, (*i, N, D), and `start_ratio` = target - reference there, (*i, N).
        origin: Which initial particle each descends from, (*i, N).
        temperature: (*i), from 0 to 1.
        log_evidence: The estimate so far, (*i).
        log_step_size: (*i).
        metric: Inverse mass matrices, one a fold of the particles: (*i, folds, D) or (*i, folds, D, D).
        moves: Transitions made in this stage, (*i).
        correlation: The largest correlation with the start of the stage, after the last transition, (*i).
        gradients: Evaluations spent by all particles of the island, (*i).
        ready: Islands whose stage is over, (*i).
        done: Islands that have arrived, (*i).
        acceptance_rate: Of the last transition, (*i, N), as are `diverging` and `energy`.
    """

    q: Tensor
    reference: Tensor
    reference_grad: Tensor
    target: Tensor
    target_grad: Tensor
    start: Tensor
    start_ratio: Tensor
    origin: Tensor
    temperature: Tensor
    log_evidence: Tensor
    log_step_size: Tensor
    metric: Metric
    moves: Tensor
    correlation: Tensor
    gradients: Tensor
    ready: Tensor
    done: Tensor
    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor


class Info(NamedTuple):
    """What a reader wants to know of one iteration, every tensor (*i).

    Attributes:
        began: Islands that began a stage; `temperature` is then the new one, `ess` the effective share of their
            particles under the weights, and `ancestors` how many of these have offspring (NaN for other islands).
        acceptance_rate: Mean over the particles, in the transition.
        divergences: Particles whose energy grew by more than 1000.
        num_steps: Leapfrog steps; 0 for an island that has arrived.
    """

    began: Tensor
    temperature: Tensor
    ess: Tensor
    ancestors: Tensor
    acceptance_rate: Tensor
    divergences: Tensor
    num_steps: Tensor


class Settings(NamedTuple):
    """How stages are made; see `run`."""

    ess_target: float
    target_accept: float
    max_correlation: float
    max_moves: int
    max_steps: int
    max_gradients: int | None


def init(evaluate: Evaluate, q: Tensor, dense: bool) -> State:
    """Particles q (*i, N, D) of the reference, before the first stage. Cost: one gradient a particle."""
    reference, reference_grad, target, target_grad = evaluate(q)
    num, dim = q.shape[-2:]
    island = torch.zeros(q.shape[:-2], dtype=torch.float64, device=q.device)
    variance = q.double().var(-2).to(q)
    variance = torch.where(variance > 0, variance, torch.ones_like(variance))
    variance = variance.unsqueeze(-2).expand(*variance.shape[:-1], _tempering.FOLDS, dim).contiguous()
    metric = dense_metric(torch.diag_embed(variance)) if dense else diagonal_metric(variance)
    ratio = _tempering.log_ratio(reference, target)
    return State(
        q,
        reference,
        reference_grad,
        target,
        target_grad,
        start=q,
        start_ratio=ratio,
        origin=torch.arange(num, device=q.device).expand(q.shape[:-1]).clone(),
        temperature=island,
        log_evidence=island,
        log_step_size=island - 0.25 * math.log(dim),
        metric=metric,
        moves=island.long(),
        correlation=island + 1,
        gradients=island.long() + num,
        ready=island == 0,
        done=island == 1,
        acceptance_rate=torch.zeros_like(ratio),
        diverging=torch.zeros_like(ratio, dtype=torch.bool),
        energy=torch.full_like(ratio, torch.nan),
    )


def step(
    evaluate: Evaluate, state: State, settings: Settings, noise: Tensor, uniform: Tensor, jitter: Tensor, offset: Tensor
) -> tuple[State, Info]:
    """One iteration of every island that has not arrived: a new stage where the last is over, then one HMC transition.

    Args:
        evaluate: Log densities and gradients of reference and target at q (*i, N, D).
        state: Before.
        settings: See `run`.
        noise: Standard normal numbers that broadcast to (*i, N, D), for the momenta.
        uniform: Numbers on [0, 1) that broadcast to (*i, N), for the accept decisions.
        jitter: Numbers on [0, 1) that broadcast to (*i), for the lengths of the trajectories.
        offset: Numbers on [0, 1) that broadcast to (*i), for systematic resampling.

    Cost: as many gradients a particle as the island with the longest trajectory needs.
    """
    begins = state.ready & ~state.done
    state, ess, ancestors = advance(state, settings, offset)
    state, rate, num_steps = move(evaluate, state, settings, noise, uniform, jitter)
    divergences = (state.diverging & (num_steps > 0).unsqueeze(-1)).sum(-1)
    return state, Info(begins, state.temperature, ess, ancestors, rate, divergences, num_steps)


def advance(state: State, settings: Settings, offset: Tensor) -> tuple[State, Tensor, Tensor]:
    """Begin a stage in the islands that are ready: a new temperature, weights, a metric, and resampled particles.

    Args:
        state: Before.
        settings: The effective sample size to keep, and the budget, at whose end the temperature jumps to 1.
        offset: A number on [0, 1) that broadcasts to (*i), for systematic resampling.

    Returns:
        The state; effective share of the particles, and how many of them have offspring, (*i).
    """
    begins = state.ready & ~state.done
    num = state.q.shape[-2]
    ratio = _tempering.log_ratio(state.reference, state.target)
    room = 1 - state.temperature
    step = _tempering.largest_increment(ratio, room, settings.ess_target)
    if settings.max_gradients is not None:
        step = torch.where(state.gradients + num > settings.max_gradients, room, step)
    weight = _tempering.log_weights(step, ratio)
    last = step >= room
    ancestors = _tempering.systematic(weight, offset.expand_as(room))
    identity = torch.arange(num, device=ancestors.device).expand_as(ancestors)
    ancestors = torch.where(begins.unsqueeze(-1), ancestors, identity)

    def survive(x: Tensor) -> Tensor:
        wide = ancestors.unsqueeze(-1).expand_as(x) if x.ndim > ancestors.ndim else ancestors
        return x.gather(ancestors.ndim - 1, wide)

    particles = [survive(getattr(state, name)) for name in State._fields[:5]]
    metric = _tempering.metric_of_others(particles[0], state.metric)
    wide = begins[..., None, None]
    state = state._replace(
        **dict(zip(State._fields[:5], particles, strict=True)),
        start=torch.where(wide, particles[0], state.start),
        start_ratio=torch.where(begins.unsqueeze(-1), survive(ratio), state.start_ratio),
        origin=survive(state.origin),
        temperature=torch.where(begins, torch.where(last, 1.0, state.temperature + step), state.temperature),
        log_evidence=torch.where(begins, state.log_evidence + weight.logsumexp(-1) - math.log(num), state.log_evidence),
        metric=_choose(begins, metric, state.metric),
        moves=torch.where(begins, 0, state.moves),
        correlation=torch.where(begins, 1.0, state.correlation),
        ready=state.ready & state.done,
    )
    nowhere = torch.full_like(room, torch.nan)
    ess = torch.where(begins, _tempering.effective_size(weight) / num, nowhere)
    return state, ess, torch.where(begins, _tempering.distinct(ancestors).double(), nowhere)


def move(
    evaluate: Evaluate, state: State, settings: Settings, noise: Tensor, uniform: Tensor, jitter: Tensor
) -> tuple[State, Tensor, Tensor]:
    r"""One HMC transition at each island's temperature, for the islands that have not arrived.

    The trajectory is about a quarter of the period of a Gaussian whose covariance is the inverse mass matrix,
    pi/2 (0.8 + 0.4 jitter) in time. Afterwards the step size answers to the acceptance rate, and the stage is over
    where the particles have forgotten its start (see `_tempering.largest_correlation`), where one more transition would
    change little, or where `max_moves` or the budget is reached.

    Args:
        evaluate: Log densities and gradients of reference and target.
        state: Before.
        settings: See `run`.
        noise: Standard normal numbers that broadcast to (*i, N, D), for the momenta.
        uniform: Numbers on [0, 1) that broadcast to (*i, N), for the accept decisions.
        jitter: Numbers on [0, 1) that broadcast to (*i), for the lengths.

    Returns:
        The state; mean acceptance rate and leapfrog steps, (*i).

    Cost: as many gradients as the island with the longest trajectory needs.
    """
    num, dim = state.q.shape[-2:]
    steps = _num_steps(state, settings, jitter)
    folds = _tempering.fold(state.q)
    p = state.metric.momentum(_tempering.fold(noise.expand_as(state.q))).expand_as(folds)
    before = state.metric.kinetic_energy(p).flatten(-2) - _tempered(state)
    end, p = _trajectory(evaluate, state, p, steps)
    after = state.metric.kinetic_energy(p).flatten(-2) - _tempered(end)
    error = torch.where(after.isfinite(), after - before, torch.inf)
    rate = torch.exp(-error).clamp(max=1.0)
    diverging = error > MAX_ENERGY_ERROR
    went = (steps > 0).unsqueeze(-1)
    accepted = (uniform < rate) & ~diverging & went
    kept = {
        name: torch.where(accepted.unsqueeze(-1) if getattr(end, name).ndim > accepted.ndim else accepted, new, old)
        for name, new, old in zip(State._fields[:5], end[:5], state[:5], strict=True)
    }
    moved = state._replace(**kept)
    mean_rate = rate.mean(-1)
    ratio = _tempering.log_ratio(moved.reference, moved.target)
    correlation = _tempering.largest_correlation(state.start, state.start_ratio, moved.q, ratio)
    moves = state.moves + 1
    spent = state.gradients + num * steps
    limit = settings.max_correlation + _tempering.correlation_noise(num, dim)
    stalled = (correlation > 0.98 * state.correlation) & (mean_rate > 0.5 * settings.target_accept)
    over = (correlation <= limit) | stalled | (moves >= settings.max_moves)
    if settings.max_gradients is not None:
        over |= spent + num > settings.max_gradients
    active = ~state.done
    moved = moved._replace(
        log_step_size=torch.where(
            active & (steps > 0), state.log_step_size + mean_rate - settings.target_accept, state.log_step_size
        ),
        moves=torch.where(active, moves, state.moves),
        correlation=torch.where(active, correlation, state.correlation),
        gradients=spent,
        ready=active & over,
        done=state.done | (over & (state.temperature >= 1)),
        acceptance_rate=torch.where(went, rate, state.acceptance_rate),
        diverging=torch.where(went, diverging, state.diverging),
        energy=torch.where(went, torch.where(accepted, after, before), state.energy),
    )
    return moved, mean_rate, steps


def _num_steps(state: State, settings: Settings, jitter: Tensor) -> Tensor:
    """Leapfrog steps of each island, (*i): 0 for one that has arrived or has nothing left to spend."""
    length = 0.5 * math.pi * (0.8 + 0.4 * jitter.double())
    steps = (length / state.log_step_size.exp()).ceil().clamp(1, settings.max_steps).long()
    if settings.max_gradients is not None:
        left = (settings.max_gradients - state.gradients) // state.q.shape[-2]
        steps = torch.minimum(steps, left.clamp(min=0))
    return torch.where(state.done, 0, steps)


def _trajectory(evaluate: Evaluate, state: State, p: Tensor, steps: Tensor) -> tuple[State, Tensor]:
    """Leapfrog at each island's temperature from momenta p (*i, folds, N / folds, D).

    An island whose steps are over stands still while others go on.
    """
    temperature = state.temperature.to(p)[..., None, None]
    size = state.log_step_size.exp().to(p)
    for i in range(int(steps.max())):
        step = torch.where(steps > i, size, 0.0)[..., None, None]
        half = 0.5 * step * torch.lerp(state.reference_grad, state.target_grad, temperature)
        p = p + _tempering.fold(half)
        q = state.q + step * state.metric.velocity(p).flatten(-3, -2)
        state = State(q, *evaluate(q), *state[5:])
        half = 0.5 * step * torch.lerp(state.reference_grad, state.target_grad, temperature)
        p = p + _tempering.fold(half)
    return state, p


def _tempered(state: State) -> Tensor:
    """log pi_t, (*i, N), unnormalised, in float64; not finite where the particle cannot be."""
    ratio = _tempering.log_ratio(state.reference, state.target)
    return state.reference.double() + state.temperature.unsqueeze(-1) * ratio


def _choose(mask: Tensor, new: Metric, old: Metric) -> Metric:
    """The new metric for islands (*i) in the mask."""
    wide = mask.reshape(*mask.shape, *[1] * (new.inverse_mass.ndim - mask.ndim))
    return Metric(
        torch.where(wide, new.inverse_mass, old.inverse_mass), torch.where(wide, new.root, old.root), new.dense
    )
