r"""The loop around every sampler: warm-up, draws, statistics, budget, progress and checkpoints.

A sampler is a `Program`: transitions between carries. A carry is a named tuple of tensors, numbers and None, nested as
one likes, and holds everything that the next transition reads besides the random numbers, so that a run can be written
to a file between any two transitions and go on from there with the same draws, bit for bit. Ten lines make one:

    class Walk(NamedTuple):
        state: State                                    # q, log_density, grad
        scale: Tensor                                   # (1,)

    class RandomWalk:
        def __init__(self, evaluate, num_warmup): ...   # keep both, and settings = {}
        def start(self, q, numbers): return Walk(init(self.evaluate, q), q.new_ones(1)), 1
        def warm(self, t, carry, numbers): return self.move(carry, numbers)     # and adapt the scale
        def freeze(self, carry, numbers): return carry
        def move(self, carry, numbers): return carry._replace(state=...), Info(...)
        def state(self, carry): return carry.state
        def step_size(self, carry): return carry.scale

    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    run, carry = drive("walk.run", RandomWalk(evaluate, num_warmup), evaluate, initial, num_draws=num_draws, ...)
    return run._replace(inverse_mass=...)

All random numbers come from `numbers`, whose streams are saved with the carry; a program keeps no state of its own
between calls and does not read the clock. The frozen parameters stay in the carry as they are.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, root_seed
from bayesdl.errors import ConvergenceWarning, NumericalError, fail
from bayesdl.samplers._checkpoint import Checkpoint, Saved, fingerprint
from bayesdl.samplers._gradients import ValueAndGradient
from bayesdl.samplers._numbers import Numbers
from bayesdl.samplers._record import Record
from bayesdl.samplers.base import Run, check_initial, check_log_density
from bayesdl.samplers.hamiltonian import State
from bayesdl.samplers.progress import Progress

__all__ = ["Numbers", "Program", "drive"]


class Program(Protocol):
    """One sampler as the loop sees it, for positions q (*g, C, D).

    An info says what happened in a transition: acceptance_rate, diverging and energy, tensors (*g, C); num_steps, a
    tensor or a number; num_gradients, a number per chain, with those that adaptation spent. Where it has `stats`, a
    mapping of names to tensors (*g, C), they become statistics of the draws too.

    Attributes:
        num_warmup: Transitions that adapt.
        settings: What makes this run what it is, besides what the loop knows: numbers, strings, tensors, None.
    """

    num_warmup: int
    settings: Mapping[str, Any]

    def start(self, q: Tensor, numbers: Numbers) -> tuple[Any, float]:
        """The first carry, and the gradients spent on it per chain."""

    def warm(self, t: int, carry: Any, numbers: Numbers) -> tuple[Any, Any]:
        """Transition t of warm-up with its adaptation: carry and info."""

    def freeze(self, carry: Any, numbers: Numbers) -> Any:
        """The carry with which to sample; called once, after warm-up or what the budget left of it."""

    def move(self, carry: Any, numbers: Numbers) -> tuple[Any, Any]:
        """One transition with everything frozen: carry and info."""

    def state(self, carry: Any) -> State:
        """Where the chains are."""

    def step_size(self, carry: Any) -> Tensor:
        """The step sizes, (*g, 1) or (*g, C)."""


class _Place(NamedTuple):
    """How far a run has come."""

    carry: Any
    num_warm: int
    frozen: bool
    num_moves: int
    spent: float
    since: Any
    warm_spent: float
    warm_seconds: float


class _Since(NamedTuple):
    """What happened since the last kept draw, and the energy (*g, C) after the last transition."""

    acceptance_rate: Any
    diverging: Any
    num_steps: Any
    stats: dict[str, Tensor]
    energy: Any


def drive(
    where: str,
    program: Program,
    evaluate: ValueAndGradient,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
) -> tuple[Run, Any]:
    """Adapt, then draw with everything frozen; see `hmc.run` for the settings.

    Returns:
        The run, with an inverse mass of ones for the caller to replace, and the last carry.
    """
    began = time.perf_counter()
    _checks.at_least(where, "num_warmup", num_warmup, 0, integer=True)
    _checks.at_least(where, "num_draws", num_draws, 1, integer=True)
    _checks.at_least(where, "thin", thin, 1, integer=True)
    if max_gradients is not None:
        _checks.at_least(where, "max_gradients", max_gradients, 1)
    check_initial(where, initial)
    q = initial.detach()
    at_initial = check_log_density(where, evaluate.log_density, q)
    root = None if seed is None else root_seed(seed)
    record = Record(q, num_draws, certain=max_gradients is None)
    course = _Course(where, program, Numbers(root, q), record, num_draws, thin, max_gradients, began)
    if checkpoint is not None:
        settings = {"sampler": where, "num_warmup": num_warmup, "num_draws": num_draws, "thin": thin, "seed": root}
        settings |= {"max_gradients": max_gradients, "initial": q, "device": q.device.type, **program.settings}
        course.file = Checkpoint(where, checkpoint, fingerprint(settings), at_initial, extends=True)
    saved = None if course.file is None else course.file.load(q.device)
    if saved is not None:
        course.resume(saved)
    if saved is None or not saved.finished or len(record) < num_draws:
        course.go(q, Progress(num_warmup + num_draws * thin, description, progress))
    return course.result(), course.carry


class _Course:
    """A run under way."""

    def __init__(
        self,
        where: str,
        program: Program,
        numbers: Numbers,
        record: Record,
        num_draws: int,
        thin: int,
        max_gradients: float | None,
        began: float,
    ) -> None:
        self._where, self._program, self._numbers, self._record = where, program, numbers, record
        self._num_draws, self._thin = num_draws, thin
        self._budget = math.inf if max_gradients is None else max_gradients
        self._began = began
        self.file: Checkpoint | None = None
        self.carry: Any = None
        self._num_warm, self._frozen, self._num_moves, self._spent = 0, False, 0, 0.0
        self._since = _Since(0.0, False, 0, {}, None)
        self._warm_spent, self._warm_seconds = 0.0, 0.0

    def resume(self, saved: Saved) -> None:
        """Take up what a checkpoint held."""
        place, streams = saved.tree["place"], saved.tree["numbers"]
        self.carry, self._num_warm, self._frozen, self._num_moves, self._spent, self._since = place[:6]
        self._warm_spent, self._warm_seconds = place[6:]
        self._numbers.load(streams)
        for part in saved.parts:
            self._record.extend(part)
        self._began -= saved.seconds

    def go(self, q: Tensor, bar: Progress) -> None:
        """From wherever the run is to its end."""
        try:
            if self.carry is None:
                self.carry, self._spent = self._program.start(q, self._numbers)
            bar.skip(self._num_warm + self._num_moves)
            if not self._frozen:
                self._warm_up(bar)
            self._draw(bar)
        finally:
            bar.close()
        if q.is_cuda:
            torch.cuda.synchronize(q.device)
        self._save(finished=True)

    def result(self) -> Run:
        """The run so far."""
        stats = {name: column.contiguous() for name, column in self._record.columns().items()}
        draws, step_size = stats.pop("draws"), self._program.step_size(self.carry)
        frozen = step_size.squeeze(-1) if step_size.shape[-1] == 1 else step_size
        spent = math.ceil(self._spent - 1e-6)  # a mean over chains, summed up with rounding
        seconds = time.perf_counter() - self._began
        stopped_by = "num_draws" if len(self._record) == self._num_draws else "max_gradients"
        return Run(
            *(draws, stats, frozen, torch.ones_like(draws[..., 0, 0, :]), spent, seconds, None, stopped_by),
            warmup_gradients=math.ceil(self._warm_spent - 1e-6),
            warmup_seconds=self._warm_seconds,
        )

    def _warm_up(self, bar: Progress) -> None:
        program = self._program
        while self._num_warm < program.num_warmup and self._spent < self._budget:
            self.carry, info = program.warm(self._num_warm, self.carry, self._numbers)
            self._num_warm += 1
            self._spent += info.num_gradients
            bar.update(program.step_size(self.carry), info.acceptance_rate, info.diverging, warmup=True)
            if self.file is not None and self.file.due():
                self._save(finished=False)
        if self._num_warm < program.num_warmup:
            warnings.warn(
                f"{self._where}: max_gradients ended warm-up after {self._num_warm} of {program.num_warmup} "
                "transitions: raise it, or lower num_warmup",
                ConvergenceWarning,
                stacklevel=5,
            )
        self.carry = program.freeze(self.carry, self._numbers)
        self._frozen = True
        self._warm_spent, self._warm_seconds = self._spent, time.perf_counter() - self._began
        state = program.state(self.carry)
        _check_alive(self._where, state)
        unknown = torch.full(state.log_density.shape, torch.nan, dtype=torch.float64, device=state.q.device)
        self._since = self._since._replace(energy=unknown)

    def _draw(self, bar: Progress) -> None:
        program, numbers, record, thin = self._program, self._numbers, self._record, self._thin
        while len(record) < self._num_draws and (self._spent < self._budget or len(record) == 0):
            before = self._since
            self.carry, info = program.move(self.carry, numbers)
            self._num_moves += 1
            self._spent += info.num_gradients
            self._since = _add(before, info, thin)
            step_size = program.step_size(self.carry)
            if self._num_moves % thin == 0 or (self._spent >= self._budget and len(record) == 0):
                state, since = program.state(self.carry), self._since
                row = {"draws": state.q, "log_density": state.log_density, "energy": since.energy}
                row |= {"energy_change": since.energy - before.energy, "acceptance_rate": since.acceptance_rate}
                row |= {"diverging": since.diverging, "num_steps": since.num_steps, "step_size": step_size}
                record.add({**row, **since.stats})
                self._since = _Since(0.0, False, 0, {}, since.energy)
            bar.update(step_size, info.acceptance_rate, info.diverging, warmup=False)
            if self.file is not None and self.file.due():
                self._save(finished=False)

    def _save(self, *, finished: bool) -> None:
        if self.file is None:
            return
        place = _Place(
            *(self.carry, self._num_warm, self._frozen, self._num_moves, self._spent, self._since),
            *(self._warm_spent, self._warm_seconds),
        )
        tree = {"place": place, "numbers": self._numbers.state()}
        seconds = time.perf_counter() - self._began
        self.file.save(tree, len(self._record), self._record.part, finished=finished, seconds=seconds)


def _add(since: _Since, info: Any, thin: int) -> _Since:
    """One more transition since the last kept draw: mean acceptance, any divergence, all steps.

    Of further statistics: whether any was true, the greatest whole number, the mean of other numbers.
    """
    stats = dict(getattr(info, "stats", None) or {})
    if thin == 1:
        return _Since(info.acceptance_rate.double(), info.diverging, info.num_steps, stats, info.energy)
    for name, value in stats.items():
        if value.is_floating_point():
            stats[name] = since.stats.get(name, 0.0) + value / thin
        elif name in since.stats:
            stats[name] = torch.maximum(since.stats[name], value)
    rate = since.acceptance_rate + info.acceptance_rate.double() / thin
    return _Since(rate, since.diverging | info.diverging, since.num_steps + info.num_steps, stats, info.energy)


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
