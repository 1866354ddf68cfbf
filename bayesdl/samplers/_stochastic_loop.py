"""The loop around the stochastic-gradient samplers: steps by a plan, draws, budget, progress and checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds, root_seed
from bayesdl.errors import NumericalError, SettingError, fail
from bayesdl.samplers._checkpoint import Checkpoint, Saved, fingerprint
from bayesdl.samplers._gradients import ValueAndGradient
from bayesdl.samplers._record import Record
from bayesdl.samplers.stochastic import Info, Minibatches, Noise, Plan, StochasticRun

_TRACE = 200  # values of the log density kept over a run
_LOOKS = 50  # times a run looks whether its chains are still finite

# gradient, state, parameters, rows, noise (None for none), step size, whether to adapt; a state has positions q
Step: TypeAlias = Callable[[ValueAndGradient, Any, Any, Tensor | None, Tensor | None, float, bool], tuple[Any, Info]]


class _Place(NamedTuple):
    """How far a run has come: steps, points looked at by a chain, and sums over the sampling steps with noise."""

    state: Any
    num_steps: int
    points: int
    sampling: int
    clipped: Tensor
    clamped: Tensor
    trace: list[Tensor]


def drive(
    where: str,
    gradient: ValueAndGradient,
    step: Step,
    parameters: Any,
    state: Any,
    plan: Plan,
    *,
    num_data: int,
    batch_size: int | None,
    seed: Seed,
    progress: bool,
    name: str,
    checkpoint: str | os.PathLike[str] | None,
    max_gradients: float | None,
    settings: Mapping[str, Any] | None = None,
) -> StochasticRun:
    """Take the steps of `plan` from `state`.

    Args:
        where: The name in error messages.
        gradient: What `step` goes by.
        step: One step of all chains.
        parameters: Its settings, a named tuple.
        num_data: N.
        batch_size: Points a chain looks at in a step; all for None.
        name: The sampler, for the progress bar.
        settings: What makes this run what it is, besides all this.

    Raises:
        SettingError: The budget ends before the first draw.
        NumericalError: A chain is no longer finite.
    """
    began = time.perf_counter()
    num_steps = _affordable(where, plan, num_data, batch_size, max_gradients)
    root = None if seed is None else root_seed(seed)

    def move(state: Any, rows: Tensor | None, noise: Tensor | None, size: float, adapt: bool) -> tuple[Any, Info]:
        return step(gradient, state, parameters, rows, noise, size, adapt)

    course = _Course(where, move, state, plan, num_steps, num_data, batch_size, root, began)
    saved = None
    if checkpoint is not None:
        known = {"sampler": where, "seed": root, "num_data": num_data, "batch_size": batch_size, "initial": state.q}
        steps = {field: torch.tensor(part, dtype=torch.float64) for field, part in plan._asdict().items()}
        known |= {"device": state.q.device.type, "num_steps": num_steps, "plan": steps}
        known |= {**parameters._asdict(), **(settings or {})}
        with torch.no_grad():
            at_initial = gradient.log_density(state.q, None)
        course.file = Checkpoint(where, checkpoint, fingerprint(known), at_initial)
        saved = course.file.load(state.q.device)
    if saved is not None:
        course.resume(saved)
    if saved is None or not saved.finished:
        course.go(name, progress)
    return course.result()


class _Course:
    """A run under way."""

    def __init__(
        self,
        where: str,
        move: Callable[[Any, Tensor | None, Tensor | None, float, bool], tuple[Any, Info]],
        state: Any,
        plan: Plan,
        num_steps: int,
        num_data: int,
        batch_size: int | None,
        root: int | None,
        began: float,
    ) -> None:
        q = state.q
        noise_seed, order_seed = child_seeds(root, 2)
        self._where, self._move, self._plan = where, move, plan
        self._num_steps, self._num_data, self._began = num_steps, num_data, began
        self._noise = Noise(noise_seed, q)
        size = min(batch_size or num_data, num_data)
        self._batches = Minibatches(order_seed, q.shape[-2], num_data, size, q.device)
        self._record = Record(q, sum(plan.keep[:num_steps]))
        self._at = _Place(state, 0, 0, 0, q.new_zeros(()), q.new_zeros(()), [])
        self.file: Checkpoint | None = None

    def resume(self, saved: Saved) -> None:
        """Take up what a checkpoint held."""
        self._at = saved.tree["place"]
        self._noise.load(saved.tree["noise"])
        self._batches.load(saved.tree["batches"])
        for part in saved.parts:
            self._record.extend(part)
        self._began -= saved.seconds

    def go(self, name: str, progress: bool) -> None:
        """From wherever the run is to its end."""
        from tqdm import tqdm

        first, total = self._at.num_steps, self._num_steps
        with tqdm(total=total, initial=first, desc=name, disable=not progress) as bar:
            for t in range(first, total):
                self._at = self._advance(t, self._at)
                bar.update(1)
                if self.file is not None and self.file.due():
                    self._save(finished=False)
        self._save(finished=True)

    def result(self) -> StochasticRun:
        """The run so far."""
        at, plan = self._at, self._plan
        columns = self._record.columns()
        estimates = columns["log_density_estimate"]
        done = plan.step_sizes[: at.num_steps]
        sizes = [size for size, times in zip(done, plan.keep[: at.num_steps], strict=True) for _ in range(times)]
        step_size = torch.tensor(sizes, dtype=torch.float64).to(estimates).expand_as(estimates).clone()
        passes = at.points / self._num_data
        fractions = float(at.clipped) / max(1, at.sampling), float(at.clamped) / max(1, at.sampling)
        seconds = time.perf_counter() - self._began
        stopped_by = "num_draws" if at.num_steps == len(plan.step_sizes) else "max_gradients"
        return StochasticRun(
            columns["draws"],
            {"log_density_estimate": estimates, "step_size": step_size},
            torch.stack(at.trace, -1),
            done,
            at.num_steps,
            passes,
            *fractions,
            seconds,
            stopped_by,
        )

    def _advance(self, t: int, at: _Place) -> _Place:
        """Step t of the plan."""
        plan = self._plan
        total = len(plan.step_sizes)
        rows = self._batches.next()
        noise = self._noise.next() if plan.noisy[t] else None
        state, info = self._move(at.state, rows, noise, plan.step_sizes[t], plan.adapt[t])
        points = at.points + (self._num_data if rows is None else rows.shape[-1])
        sampling, clipped, clamped = at.sampling, at.clipped, at.clamped
        if noise is not None and t >= plan.num_warmup:
            sampling += 1
            clipped, clamped = clipped + info.clipped.mean(), clamped + info.noise_clamped.mean()
        for _ in range(plan.keep[t]):
            self._record.add({"draws": state.q, "log_density_estimate": info.log_density})
        if t % max(1, total // _TRACE) == 0:
            at.trace.append(info.log_density)
        if (t + 1) % max(1, total // _LOOKS) == 0 or t == self._num_steps - 1:
            _check_finite(self._where, state.q, info.log_density, t + 1)
        return _Place(state, t + 1, points, sampling, clipped, clamped, at.trace)

    def _save(self, *, finished: bool) -> None:
        if self.file is None:
            return
        tree = {"place": self._at, "noise": self._noise.state(), "batches": self._batches.state()}
        seconds = time.perf_counter() - self._began
        self.file.save(tree, len(self._record), self._record.part, finished=finished, seconds=seconds)


def _affordable(where: str, plan: Plan, num_data: int, batch_size: int | None, max_gradients: float | None) -> int:
    """Steps of the plan that are begun before `max_gradients` passes over the data are spent."""
    total = len(plan.step_sizes)
    if max_gradients is None:
        return total
    _checks.inside(where, "max_gradients", max_gradients, 0.0, float("inf"))
    num_parts = -(-num_data // min(batch_size or num_data, num_data))
    points, num_steps = 0, 0
    while num_steps < total and points < max_gradients * num_data:
        points += num_data // num_parts + (num_steps % num_parts < num_data % num_parts)
        num_steps += 1
    if sum(plan.keep[:num_steps]) == 0:
        first = next(t for t, times in enumerate(plan.keep) if times)
        needed = (first + 1) / num_parts
        got = f"{max_gradients} passes over the data, {num_steps} steps"
        wanted = f"max_gradients must reach the first draw, after {first + 1} steps."
        fail(SettingError, where, wanted, got=got, fix=f"pass {needed:.4g} or more, or lower num_warmup")
    return num_steps


def _check_finite(where: str, q: Tensor, log_density: Tensor, t: int) -> None:
    dead = ~(q.isfinite().all(-1) & log_density.isfinite())
    if bool(dead.any()):
        fail(
            NumericalError,
            where,
            "positions and log densities must stay finite.",
            got=f"{int(dead.sum())} of {dead.numel()} chains at NaN or infinity after {t} steps",
            fix="lower step_size",
        )
