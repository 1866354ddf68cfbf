r"""Tempered sequential Monte Carlo with Hamiltonian moves: draws of a target and its log evidence, across modes.

A population of particles goes from a reference p_0 that one can draw from to the target p = gamma / Z by way of

    pi_t(q) proportional to p_0(q)^(1-t) gamma(q)^t,    0 = t_0 < t_1 < ... < 1.

At each stage the temperature rises as far as the weights w = (gamma / p_0)^(t' - t) keep a given effective sample size,
systematic resampling makes weights into numbers of offspring, and HMC transitions that leave pi_t' invariant move the
offspring apart. Their metric is the covariance of the particles (of those in other folds of the population than the
one that is moved), their step size follows the acceptance rate, and there are as many as it takes for the particles to
forget where the stage began. The product of the mean weights
estimates Z / Z_0.

Islands are independent runs side by side, each with a schedule and a tuning of its own: how much they differ is the
Monte Carlo error of everything that is computed from them.

References: Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers; Zhou, Johansen, Aston (2016), arXiv
1303.3123 (adaptive temperatures); Buchholz, Chopin, Jacob (2021), arXiv 1808.07730 (HMC moves tuned by the particles).
"""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, Streams, child_seeds, root_seed
from bayesdl.errors import NumericalError, fail
from bayesdl.samplers import _tempering
from bayesdl.samplers._checkpoint import Checkpoint, fingerprint
from bayesdl.samplers._islands import Evaluate, Info, Settings, State, init, step
from bayesdl.samplers._reference import GaussianReference, Reference
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad, check_initial, check_log_density, value_and_grad

__all__ = ["GaussianReference", "Info", "Population", "Reference", "Settings", "State", "init", "run", "step"]

MAX_DENSE = 500  # coordinates up to which "auto" estimates a whole covariance


class Population(NamedTuple):
    """What a run of SMC gives; *g are groups, S stages (of the island with the most; NaN beyond the last of others).

    Attributes:
        run: The particles at temperature 1 as equally weighted draws (*g, islands, N, D): islands are its chains. Its
            statistics are those of the last transition ("num_steps" those of the whole run), `num_gradients` counts
            those of all particles of an island. `run.log_evidence` (*g) is the log of the mean over islands of Z / Z_0:
            with a normalised reference, of the integral of exp(log_density).
        log_evidence_error: Its standard error from the spread of the islands, (*g); NaN for a single island.
        island_log_evidence: (*g, islands).
        temperatures: (*g, islands, S), from the first above 0 to 1.
        ess: Effective share of the particles at each stage, (*g, islands, S).
        acceptance_rate: Mean over the transitions of each stage, (*g, islands, S).
        num_moves: Transitions of each stage, (*g, islands, S).
        num_ancestors: Particles with offspring at each stage, (*g, islands, S).
        num_origins: Initial particles from which the final ones descend, (*g, islands).
    """

    run: Run
    log_evidence_error: Tensor
    island_log_evidence: Tensor
    temperatures: Tensor
    ess: Tensor
    acceptance_rate: Tensor
    num_moves: Tensor
    num_ancestors: Tensor
    num_origins: Tensor

    @property
    def log_evidence(self) -> Tensor:
        """`run.log_evidence`."""
        assert self.run.log_evidence is not None
        return self.run.log_evidence


def run(
    log_density: LogDensityFn,
    reference: Reference,
    *,
    num_particles: int = 512,
    num_islands: int = 8,
    groups: tuple[int, ...] = (),
    ess_target: float = 0.7,
    target_accept: float = 0.8,
    metric: Literal["auto", "diagonal", "dense"] = "auto",
    max_correlation: float = 0.2,
    max_moves: int = 20,
    max_steps: int = 64,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "SMC",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: int | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Population:
    """Carry particles from `reference` to the density exp(log_density), in islands side by side.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C).
        reference: Where particles come from, such as `GaussianReference(mean, standard deviations)` or a prior. It
            should cover the target: one much wider costs a few more stages, one that misses a mode misses it for good.
        num_particles: Particles of an island; up to three more are run where that makes four equal folds.
        num_islands: Independent runs; their spread gives the standard error of the log evidence.
        groups: Leading axes *g of `log_density`, for independent problems of one shape.
        ess_target: Share of the particles that each step in temperature keeps effective, in (0, 1).
        target_accept: Acceptance rate that the step sizes are adapted to.
        metric: Inverse mass from the covariance of the particles: "diagonal", "dense", or by "auto" the latter where
            the effective particles are at least five for each coordinate, up to 500 coordinates.
        max_correlation: A stage is over when no coordinate, no squared coordinate and no log density ratio is more
            correlated than this with where it began (beyond what chance gives).
        max_moves: HMC transitions of a stage at most.
        max_steps: Leapfrog steps of a transition at most.
        seed: Every island gets a stream of its own, the same whatever the number of islands.
        progress: Show a bar on standard error.
        description: Its label.
        checkpoint: A folder in which the run saves itself, and from which it goes on after an interruption.
        max_gradients: Gradients that an island may spend, all its particles together. Where they run out, the
            temperature jumps to 1, which keeps the estimates consistent at a low effective sample size.
        chain_batch: Particles whose log density is evaluated at a time; all for None.
        compile: Send value and gradient through torch.compile.

    Raises:
        SettingError, ShapeError, DtypeError: A setting, the reference or the log density does not fit.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: In some island no particle of the reference has a finite log density.

    Cost: some tens of gradients a particle and stage, more stages where the target is far from the reference (about
    sqrt(D) log of how much narrower it is); memory for seven copies of the particles.
    """
    began = time.perf_counter()
    settings = Settings(ess_target, target_accept, max_correlation, max_moves, max_steps, max_gradients)
    _check(num_particles, num_islands, metric, settings)
    root = root_seed(seed)
    start_seed, run_seed = child_seeds(root, 2)
    whole = num_particles + -num_particles % _tempering.FOLDS
    q = torch.stack([reference.sample(whole, child) for child in child_seeds(start_seed, num_islands)])
    q = q.expand(*groups, *q.shape).contiguous()
    target = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    evaluate = _both(value_and_grad(reference.log_prob, chain_batch=chain_batch), target)
    check_initial("smc.run", q)
    at_initial = check_log_density("smc.run", target.log_density, q.flatten(-3, -2))
    file = None
    if checkpoint is not None:
        kept = {"sampler": "smc.run", "seed": None if seed is None else root, "metric": metric, **settings._asdict()}
        kept |= {"num_particles": num_particles, "num_islands": num_islands, "groups": groups, "dim": q.shape[-1]}
        file = Checkpoint("smc.run", checkpoint, fingerprint(kept), at_initial)
    saved = None if file is None else file.load(q.device)
    began -= 0.0 if saved is None else saved.seconds
    course = _first(evaluate, settings, q, metric, run_seed) if saved is None else saved.tree
    course = _travel(evaluate, settings, course, file, began, _Bar(description, q.shape[:-2].numel(), progress))
    if q.is_cuda:
        torch.cuda.synchronize(q.device)
    return _population(course, settings, num_particles, time.perf_counter() - began)


class _Course(NamedTuple):
    """A run under way: the seed of its iterations, where its islands are, and the iterations (K, *i) so far."""

    seed: int
    state: State
    trace: Info | None


def _first(evaluate: Evaluate, settings: Settings, q: Tensor, metric: str, seed: int) -> _Course:
    num, dim = q.shape[-2:]
    few = dim <= MAX_DENSE and settings.ess_target * num >= 5 * dim
    state = init(evaluate, q, metric == "dense" or (metric == "auto" and few))
    dead = ~(state.start_ratio > -torch.inf).any(-1)
    if bool(dead.any()):
        fail(
            NumericalError,
            "smc.run",
            "log_density must be finite at some particle of every island.",
            got=f"NaN or infinity at all {num} particles of {int(dead.sum())} of {dead.numel()} islands",
            fix="a reference that reaches into the support, or more particles",
        )
    return _Course(seed, state, None)


def _travel(
    evaluate: Evaluate, settings: Settings, course: _Course, file: Checkpoint | None, began: float, bar: _Bar
) -> _Course:
    """Iterate until every island has arrived; a checkpoint is written now and then, and at the end."""
    seed, state, trace = course
    news: list[Info] = []
    done = 0 if trace is None else len(trace.began)
    going = not bool(state.done.all())
    arrived = not going
    try:
        while going:
            state, info = step(evaluate, state, settings, *_numbers(seed, done + len(news), state))
            news.append(info)
            bar.update(state, info)
            going = not bool(state.done.all())
            if file is not None and (file.due() or not going):
                course = _Course(seed, state, _joined(trace, news))
                elapsed = time.perf_counter() - began
                file.save(course, 0, lambda first, end: {}, finished=not going, seconds=elapsed)
    finally:
        bar.close()
    return course if arrived else _Course(seed, state, _joined(trace, news))


def _joined(trace: Info | None, news: list[Info]) -> Info:
    """All iterations along a leading axis."""
    fresh = Info(*(torch.stack(values) for values in zip(*news, strict=True)))
    if trace is None:
        return fresh
    return Info(*(torch.cat(pair) for pair in zip(trace, fresh, strict=True)))


def _numbers(seed: int, iteration: int, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The random numbers of one iteration, a stream for each island: momenta, accept decisions, length, offset.

    They follow from seed and iteration alone, so that a run can go on from any iteration.
    """
    own = int(np.random.SeedSequence(seed, spawn_key=(iteration,)).generate_state(1, np.uint64)[0] >> 1)
    islands, num, dim = state.q.shape[-3:]
    streams = Streams(own, islands, state.q.device)
    wide = state.temperature
    pair = streams.uniform(2, like=wide)
    return streams.normal(num, dim, like=state.q), streams.uniform(num, like=wide), pair[:, 0], pair[:, 1]


def _both(reference: ValueAndGrad, target: ValueAndGrad) -> Evaluate:
    """Both log densities and their gradients at particles (*i, N, D), whose islands become chains (*g, C, D)."""

    def evaluate(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        flat, shape = q.flatten(-3, -2), q.shape[-3:-1]
        (value, grad), (other, slope) = reference(flat), target(flat)
        return (
            value.unflatten(-1, shape),
            grad.unflatten(-2, shape),
            other.unflatten(-1, shape),
            slope.unflatten(-2, shape),
        )

    return evaluate


def _population(course: _Course, settings: Settings, num_particles: int, seconds: float) -> Population:
    """The final particles, the evidence, and the iterations sorted into stages."""
    _, state, trace = course
    assert trace is not None
    moved = trace.num_steps > 0
    stage, count = trace.began.cumsum(0) - 1, trace.began.sum(0)
    places = torch.arange(int(count.max()), device=count.device).reshape(-1, *[1] * count.ndim)

    def by_stage(values: Tensor, where: Tensor) -> Tensor:
        sums = torch.zeros(len(places), *count.shape, dtype=torch.float64, device=count.device)
        sums = sums.scatter_add(0, stage, torch.where(where, values.double(), 0.0))
        return torch.where(places < count, sums, torch.nan).movedim(0, -1)

    num_moves = by_stage(moved, moved)
    evidence, islands = state.log_evidence, state.log_evidence.shape[-1]
    spread = (torch.softmax(evidence, -1) * islands).std(-1) if islands > 1 else evidence[..., 0] * torch.nan
    return Population(
        _run(state, trace, settings, num_particles, seconds),
        log_evidence_error=spread / math.sqrt(islands),
        island_log_evidence=evidence,
        temperatures=by_stage(trace.temperature, trace.began),
        ess=by_stage(trace.ess, trace.began),
        acceptance_rate=by_stage(trace.acceptance_rate, moved) / num_moves,
        num_moves=num_moves,
        num_ancestors=by_stage(trace.ancestors, trace.began),
        num_origins=_tempering.distinct(state.origin),
    )


def _run(state: State, trace: Info, settings: Settings, num_particles: int, seconds: float) -> Run:
    """The particles as draws; their statistics are those of the last transition."""
    evidence, shape = state.log_evidence, state.target.shape
    wide = {
        "num_steps": trace.num_steps.sum(0),
        "step_size": state.log_step_size.exp().to(state.q),
    }
    stats = {
        "log_density": state.target,
        "energy": state.energy,
        "energy_change": torch.full_like(state.energy, torch.nan),
        "acceptance_rate": state.acceptance_rate,
        "diverging": state.diverging,
        **{name: value.unsqueeze(-1).expand(shape) for name, value in wide.items()},
    }
    stats = {name: value[..., :num_particles].contiguous() for name, value in stats.items()}
    cut = settings.max_gradients is not None and bool((state.gradients + shape[-1] > settings.max_gradients).any())
    return Run(
        state.q[..., :num_particles, :].contiguous(),
        stats,
        state.log_step_size.mean(-1).exp().to(state.q),
        state.metric.inverse_mass.mean((-4, -3) if state.metric.dense else (-3, -2)),
        math.ceil(float(state.gradients.double().mean())),
        seconds,
        stopped_by="max_gradients" if cut else "num_draws",
        log_evidence=evidence.logsumexp(-1) - math.log(evidence.shape[-1]),
    )


def _check(num_particles: int, num_islands: int, metric: str, settings: Settings) -> None:
    where = "smc.run"
    _checks.at_least(where, "num_particles", num_particles, 16, integer=True)
    _checks.at_least(where, "num_islands", num_islands, 1, integer=True)
    _checks.choice(where, "metric", metric, ("auto", "diagonal", "dense"))
    for name in ("ess_target", "target_accept", "max_correlation"):
        _checks.inside(where, name, getattr(settings, name), 0, 1)
    for name in ("max_moves", "max_steps"):
        _checks.at_least(where, name, getattr(settings, name), 1, integer=True)
    if settings.max_gradients is not None:
        _checks.at_least(where, "max_gradients", settings.max_gradients, num_particles)


class _Bar:
    """A bar on standard error with the share of islands that have arrived and the lowest temperature."""

    def __init__(self, description: str, num_islands: int, enabled: bool) -> None:
        self._bar = None
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=num_islands, desc=description, file=sys.stderr, dynamic_ncols=True)

    def update(self, state: State, info: Info) -> None:
        """Show where the islands are."""
        if self._bar is None:
            return
        self._bar.n = int(state.done.sum())
        self._bar.set_postfix_str(
            f"temperature {float(state.temperature.min()):.2g}, step {float(state.log_step_size.mean().exp()):.2g}, "
            f"accept {float(info.acceptance_rate.mean()):.2f}, divergences {int(info.divergences.sum())}"
        )

    def close(self) -> None:
        """Leave the bar on its line."""
        if self._bar is not None:
            self._bar.close()
