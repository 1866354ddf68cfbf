"""A study: a search space, an engine that proposes, and a record that survives whatever happens to its workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayesdl import _checks
from bayesdl.bo.space import Space
from bayesdl.errors import DataError, SettingError, fail

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Study", "Trial"]

_DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class Trial:
    """One evaluation of the objective.

    Attributes:
        number: Its number in the study.
        params: Its parameters by name.
        x: The same point in the form that the objective receives.
        state: "running", "complete", "failed", or "waiting" for a retry.
        values: Values of the objectives in the user's signs; empty until it is complete.
        constraints: Reported constraints by name; feasible where all are at most 0.
        error: Why it failed, "" where it did not.
        seconds: Wall-clock time from ask to tell, NaN until then.
        retry_of: The number of the trial whose worker died and whose parameters this one has, or None.
    """

    number: int
    params: Mapping[str, Any]
    x: Any = field(repr=False, compare=False)
    state: str = "running"
    values: tuple[float, ...] = ()
    constraints: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    seconds: float = math.nan
    retry_of: int | None = None

    @property
    def value(self) -> float:
        """The value of the only objective; NaN until the trial is complete."""
        return self.values[0] if self.values else math.nan

    @property
    def feasible(self) -> bool:
        """Whether it is complete and every reported constraint is at most 0."""
        return self.state == "complete" and all(limit <= 0 for limit in self.constraints.values())


class Study:
    """Ask for points, evaluate them wherever you like, tell what came out.

        study = bdl.bo.Study({"x": (0.0, 1.0), "depth": range(1, 9)}, storage="sqlite:///study.db")
        trial = study.ask()
        study.tell(trial, f(**trial.params))

    The record is an Optuna storage. Every process that opens it is a worker with equal rights; what each proposes
    follows from the record and the seed alone. Trials whose worker died are handed out again.
    """

    def __init__(
        self,
        space: Any,
        *,
        engine: Any = None,
        acquisition: str | Any = "auto",
        acquisition_options: Mapping[str, Any] | None = None,
        directions: str | Sequence[str] = ("minimize",),
        constraints: Sequence[str] = (),
        reference_point: Sequence[float] | None = None,
        storage: Any = None,
        study_name: str = "study",
        seed: int = 0,
        batch_size: int = 1,
        num_startup: int | None = None,
        num_samples: int = 128,
        num_restarts: int = 4,
        num_candidates: int = 64,
        refit_every: int = 1,
        cache: str | Path | None = "auto",
        grace: float = 120.0,
        max_retries: int = 2,
    ) -> None:
        """
        Args:
            space: Anything that `Space.of` takes: a tensor (2, d) of bounds, pairs, or a dict of names to dimensions.
            engine: Any engine of bayesdl; None for an exact GP with a Matern-5/2 kernel.
            acquisition: "auto", the name of one of BoTorch's acquisitions, or a function that returns one; see
                `bayesdl.interop.optuna.BayesdlSampler`, as for `acquisition_options`, `num_startup`, `num_samples`,
                `num_restarts`, `num_candidates` and `refit_every`.
            directions: "minimize" or "maximize" for each objective.
            constraints: Names of constraints that every evaluation reports; feasible where at most 0.
            reference_point: Worst value of interest of each of several objectives; None infers it from the data.
            storage: "sqlite:///study.db", "postgresql://user@host/name", "study.journal", an Optuna storage, or None
                for memory.
            study_name: Name of the study in the storage; one that is there is gone on with.
            seed: Seed of all proposals.
            batch_size: Points that `ask_batch` hands out at once.
            cache: Folder of fitted posteriors for other workers, which may be deleted at any time; "auto" is one beside
                a storage that is a file; None for none.
            grace: Seconds without a sign of life after which a worker on another machine counts as dead.
            max_retries: How often a trial is tried again whose worker died.

        Raises:
            SettingError: A setting out of range, or a study of this name that was begun with other settings.
            StorageError: The storage cannot be opened.
        """
        from bayesdl.interop import optuna as door
        from bayesdl.interop._optuna_storage import open_storage, open_study
        from bayesdl.interop._optuna_workers import Ledger, lock_path

        _checks.at_least("Study", "batch_size", batch_size, 1, integer=True)
        _checks.at_least("Study", "max_retries", max_retries, 0, integer=True)
        _checks.inside("Study", "grace", grace, 0.0, math.inf)
        self.space = Space.of(space)
        self.directions = _directions(directions)
        self.constraints = _names(constraints)
        self.batch_size = batch_size
        kept = open_storage(storage)
        beside = lock_path(kept)
        if cache == "auto":
            cache = None if beside is None else beside.with_name(beside.name.replace("-study-lock", "-cache"))
        self._sampler = door.BayesdlSampler(
            engine, acquisition=acquisition, acquisition_options=acquisition_options, num_startup=num_startup,
            seed=seed, space=self.space.distributions(), constraints=self.constraints, reference_point=reference_point,
            num_samples=num_samples, num_restarts=num_restarts, num_candidates=num_candidates,
            refit_every=refit_every, cache=cache,
        )  # fmt: skip
        self.optuna_study = open_study(
            kept, study_name, self._sampler, self.directions, self.space.distributions(), self.constraints
        )
        self._ledger = Ledger(self.optuna_study, grace=grace, max_retries=max_retries)
        self._ids: dict[int, int] = {}

    @property
    def engine(self) -> Any:
        """The engine that proposes."""
        return self._sampler.engine

    @property
    def name(self) -> str:
        """The study's name in its storage."""
        return str(self.optuna_study.study_name)

    def ask(self) -> Trial:
        """A trial to evaluate. Trials that run, here or elsewhere, count as pending and are not proposed again.

        Raises:
            StorageError: The storage stayed away for a minute.

        Warns:
            NumericalWarning: The engine could not be fitted; the trial is a quasi-random point.
        """
        trial = self._ask(None)
        assert trial is not None
        return trial

    def ask_batch(self, num: int | None = None) -> list[Trial]:
        """`num` trials (default: `batch_size`), each proposed with those before it pending: a greedy batch."""
        return [self.ask() for _ in range(self.batch_size if num is None else num)]

    def _ask(self, limit: int | None) -> Trial | None:
        """A trial, or None where the study has `limit` first attempts already and nothing waits."""
        from bayesdl.interop._optuna_trials import suggest

        trial_id = self._ledger.claim(limit)
        if trial_id is None:
            return None
        try:
            frozen = suggest(self.optuna_study, trial_id, self.space.distributions())
        except BaseException:
            self._ledger.release(trial_id)
            raise
        trial = self._trial(frozen)
        self._ids[trial.number] = trial_id
        return trial

    def tell(
        self,
        trial: Trial | int,
        values: Any = None,
        *,
        constraints: Mapping[str, float] | None = None,
        error: str | None = None,
    ) -> Trial:
        """Record what came out of a trial.

        Args:
            trial: The trial or its number; it may have been asked for by another process.
            values: A number for each objective. NaN and infinities record a failure.
            constraints: A number for each name in the study's `constraints`; feasible where at most 0.
            error: Records a failure, with this reason.

        Returns:
            The trial as it is recorded. The same result told twice is recorded once.

        Raises:
            DataError: `values` are not numbers, or not one for each objective; `constraints` do not have the names.
            StorageError: The trial has another result already, or its worker was taken for dead and it is tried again.
        """
        number = trial.number if isinstance(trial, Trial) else trial
        trial_id = self._trial_id(number)
        if error is None:
            numbers, limits = self._check(values, constraints or {})
            bad = [v for v in (*numbers, *limits.values()) if not math.isfinite(v)]
            error = f"the objective returned {bad[0]}" if bad else None
        if error is None:
            frozen = self._ledger.finish(trial_id, numbers, limits)
        else:
            frozen = self._ledger.finish(trial_id, None, {}, error)
        return self._trial(frozen)

    def optimize(
        self, f: Callable[[Any], Any], num_trials: int, *, timeout: float | None = None, progress: bool = False
    ) -> None:
        """Ask, evaluate and tell until the study has `num_trials` trials; see `bdl.bo.minimize` for what `f` returns.

        Raises:
            DataError: None of the first trials gave a value; the message quotes the first failure.
            StorageError: The storage stayed away for a minute.
        """
        from bayesdl.bo import _loop

        _loop.run(self, f, num_trials, timeout=timeout, progress=progress)

    def release_all(self) -> None:
        """Put the trials that this process has in hand back in line, as an interruption does."""
        self._ledger.release()

    def add(self, points: Sequence[Any], values: Any, *, constraints: Sequence[Mapping[str, float]] = ()) -> None:
        """Record evaluations that were made before: points as the objective receives them, and values (n,) or (n, m).

        Raises:
            SettingError: A point outside the space.
            DataError: Values that are not one row for each point.
        """
        from bayesdl.interop._optuna_trials import add_complete

        rows = torch.as_tensor(values, dtype=torch.float64).reshape(len(points), -1).tolist()
        limits = list(constraints) or [{}] * len(points)
        params = [self.space.take_in(point) for point in points]
        checked = [self._check(row, limit) for row, limit in zip(rows, limits, strict=True)]
        distributions = self.space.distributions()
        for point, (numbers, limit) in zip(params, checked, strict=True):
            add_complete(self.optuna_study, point, distributions, numbers, limit)

    @property
    def trials(self) -> list[Trial]:
        """All trials, as the record has them now; those that were withdrawn before an evaluation are left out."""
        from bayesdl.interop._optuna_trials import recorded

        return [self._trial(frozen) for frozen in recorded(self.optuna_study)]

    @property
    def best(self) -> Trial | None:
        """The best feasible trial of a study with one objective; None while there is none.

        Raises:
            SettingError: The study has several objectives; see `pareto`.
        """
        if len(self.directions) > 1:
            fail(
                SettingError,
                "study.best",
                "several objectives have no one best.",
                got=str(self.directions),
                fix="study.pareto",
            )
        sign = 1.0 if self.directions[0] == "minimize" else -1.0
        good = [trial for trial in self.trials if trial.feasible]
        return min(good, key=lambda trial: (sign * trial.value, trial.number)) if good else None

    @property
    def pareto(self) -> list[Trial]:
        """The feasible trials than which no other is as good in all objectives and better in one."""
        good = [trial for trial in self.trials if trial.feasible]
        if not good:
            return []
        signs = torch.tensor([1.0 if d == "minimize" else -1.0 for d in self.directions], dtype=torch.float64)
        y = torch.tensor([trial.values for trial in good], dtype=torch.float64) * signs
        no_worse = (y[:, None] <= y[None]).all(-1)
        better = (y[:, None] < y[None]).any(-1)
        beaten = (no_worse & better).any(0)
        return [trial for trial, out in zip(good, beaten.tolist(), strict=True) if not out]

    @property
    def table(self) -> pandas.DataFrame:
        """One row a trial: number, state, parameters, values, constraints, seconds, error."""
        import pandas as pd

        rows = []
        for trial in self.trials:
            numbers = dict(zip(self._value_names(), trial.values or [math.nan] * len(self.directions), strict=True))
            limits = {name: trial.constraints.get(name, math.nan) for name in self.constraints}
            tail = {
                "feasible": trial.feasible,
                "seconds": trial.seconds,
                "retry_of": trial.retry_of,
                "error": trial.error,
            }
            rows.append({"number": trial.number, "state": trial.state, **trial.params, **numbers, **limits, **tail})
        return pd.DataFrame(rows)

    def posterior(self) -> Any:
        """The surrogate of all finished trials: a posterior over `space.to_unit` (categories as indicator columns).

        Its outputs are the objectives, signs turned such that larger is better, then the constraints.
        """
        from bayesdl.interop._optuna_trials import fitted

        return fitted(self.optuna_study, self._sampler, self.space.distributions())[0]

    def plot(self) -> Figure:
        """The best value so far against trials, or the Pareto front of two objectives, as a matplotlib figure."""
        from bayesdl.bo import _figures

        return _figures.overview(self)

    def report(self, path: str | Path) -> None:
        """Write one self-contained page: best value so far, surrogate, Pareto front, parallel coordinates, timing."""
        from bayesdl.bo import _report

        _report.write(Path(path), self)

    def _value_names(self) -> list[str]:
        return ["value"] if len(self.directions) == 1 else [f"value{i}" for i in range(len(self.directions))]

    def _trial_id(self, number: int) -> int:
        if number not in self._ids:
            from bayesdl.interop._optuna_trials import trial_id

            self._ids[number] = trial_id(self.optuna_study, number)
        return self._ids[number]

    def _check(self, values: Any, constraints: Mapping[str, float]) -> tuple[list[float], dict[str, float]]:
        """Values and constraints as floats, one for each objective and each name."""
        where, m = "study.tell", len(self.directions)
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu().reshape(-1).tolist()
        rows = values if isinstance(values, (tuple, list)) or hasattr(values, "__len__") else [values]
        try:
            if isinstance(values, (str, bytes)):
                raise TypeError
            numbers = [float(v) for v in rows]
        except (TypeError, ValueError):
            wanted = f"values must be {m} number{'s' if m > 1 else ''}."
            fail(DataError, where, wanted, got=repr(values)[:200], fix="return a float for each objective")
        if len(numbers) != m:
            wanted = f"there must be one value for each of {m} objective(s)."
            fix = "return as many values as the study has directions"
            fail(DataError, where, wanted, got=f"{len(numbers)} values", fix=fix)
        if set(constraints) != set(self.constraints):
            wanted = f"constraints must have the names {self.constraints}."
            fix = "report each constraint of the study, and no others"
            fail(DataError, where, wanted, got=str(sorted(constraints)), fix=fix)
        try:
            return numbers, {name: float(constraints[name]) for name in self.constraints}
        except (TypeError, ValueError):
            fail(DataError, where, "constraints must be numbers.", got=repr(constraints)[:200], fix="a float for each")

    def _trial(self, frozen: Any) -> Trial:
        from bayesdl.interop._optuna_trials import plain

        parts = plain(frozen)
        known = set(parts["params"]) >= set(self.space.names)
        return Trial(x=self.space.hand_out(parts["params"]) if known else None, **parts)


def _directions(directions: str | Sequence[str]) -> tuple[str, ...]:
    found = (directions,) if isinstance(directions, str) else tuple(directions)
    if not found or any(direction not in _DIRECTIONS for direction in found):
        wanted = 'directions must be "minimize" or "maximize" for each objective.'
        fail(SettingError, "Study", wanted, got=repr(directions), fix='directions=("minimize",)')
    return found


def _names(constraints: Sequence[str]) -> tuple[str, ...]:
    found = (constraints,) if isinstance(constraints, str) else tuple(constraints)
    if any(not isinstance(name, str) or not name for name in found) or len(set(found)) < len(found):
        wanted = "constraints must be different names."
        fix = 'constraints=("memory",), with values at most 0 where feasible'
        fail(SettingError, "Study", wanted, got=repr(constraints), fix=fix)
    return tuple(sorted(found))
