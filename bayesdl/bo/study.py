"""A study: a search space, an engine that proposes, and a record that survives whatever happens to its workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bayesdl import _checks
from bayesdl.bo.cost import Cost, cost_of
from bayesdl.bo.space import Risk, Space
from bayesdl.bo.trial import Recommendation, Trial
from bayesdl.bo.trust_region import TrustRegion
from bayesdl.errors import DataError, SettingError, fail

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Study"]

_DIRECTIONS = ("minimize", "maximize")


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
        trust_region: TrustRegion | bool = False,
        cost: Cost | str | None = None,
        risk: Risk | str = "mean",
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
            trust_region: Confine proposals to a box around the best point, for some twenty dimensions and more: True,
                or a `TrustRegion` with other settings than its defaults. For one objective.
            cost: What evaluations cost, so that improvement is sought per cost: "seconds" (the time they took),
                "reported" (told with each result), a `LearnedCost` with a budget, or a `KnownCost`. Needed where the
                space has a `Fidelity`.
            risk: What is sought over the `Environment` dimensions of the space: "mean", "var", "cvar", or a `Risk`.
            cache: Folder of fitted posteriors for other workers, which may be deleted at any time; "auto" is one beside
                a storage that is a file; None for none.
            grace: Seconds without a sign of life after which a worker on another machine counts as dead.
            max_retries: How often a trial is tried again whose worker died.

        Raises:
            SettingError: A setting out of range, or a study of this name that was begun with other settings.
            StorageError: It cannot be opened.
        """
        from bayesdl.interop import optuna as door
        from bayesdl.interop._optuna_storage import open_storage, open_study
        from bayesdl.interop._optuna_workers import Ledger, lock_path

        _check_counts(batch_size, max_retries, grace)
        self.space = Space.of(space)
        self.directions, self.constraints = _directions(directions), _names(constraints)
        self.batch_size = batch_size
        self.cost = cost_of(cost, self.space, self.constraints)
        region = _trust_region(trust_region, self.directions)
        risk = _risk(risk, self.space, self.directions)
        kept = open_storage(storage)
        cache = _beside(lock_path(kept)) if cache == "auto" else cache
        self._sampler = door.BayesdlSampler(
            engine, acquisition=acquisition, acquisition_options=acquisition_options, num_startup=num_startup,
            seed=seed, space=self.space.distributions(), constraints=self.constraints, reference_point=reference_point,
            num_samples=num_samples, num_restarts=num_restarts, num_candidates=num_candidates,
            refit_every=refit_every, trust_region=region, cost=self.cost, fidelities=self.space.fidelities,
            environment=self.space.environment, risk=risk, cache=cache,
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
        cost: float | None = None,
        error: str | None = None,
    ) -> Trial:
        """Record what came out of a trial.

        Args:
            trial: The trial or its number; it may have been asked for by another process.
            values: A number for each objective. NaN and infinities record a failure.
            constraints: A number for each name in the study's `constraints`; feasible where at most 0.
            cost: What it cost, positive; in a study with reported costs, where a failure may go without.
            error: Records a failure, with this reason.

        Returns:
            The trial as it is recorded. The same result told twice is recorded once.

        Raises:
            DataError: `values` are not numbers, or not one for each objective; `constraints` do not have the names; a
                cost is missing, or not asked for.
            StorageError: The trial has another result already, or its worker was taken for dead and it is tried again.
        """
        number = trial.number if isinstance(trial, Trial) else trial
        trial_id = self._trial_id(number)
        self._check_cost(cost, needed=error is None)
        if error is None:
            numbers, limits = self._check(values, constraints or {})
            bad = [v for v in (*numbers, *limits.values()) if not math.isfinite(v)]
            error = f"the objective returned {bad[0]}" if bad else None
        if error is None:
            frozen = self._ledger.finish(trial_id, numbers, limits, cost=cost)
        else:
            frozen = self._ledger.finish(trial_id, None, {}, error, cost=cost)
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

    def add(
        self,
        points: Sequence[Any],
        values: Any,
        *,
        constraints: Sequence[Mapping[str, float]] = (),
        costs: Sequence[float] = (),
    ) -> None:
        """Record evaluations that were made before: points as the objective receives them, and values (n,) or (n, m).

        They count in full with a budget, where their costs are given or follow from the points.

        Raises:
            SettingError: A point outside the space.
            DataError: Values that are not one row for each point.
        """
        from bayesdl.interop._optuna_trials import add_complete

        rows = torch.as_tensor(values, dtype=torch.float64).reshape(len(points), -1).tolist()
        limits = list(constraints) or [{}] * len(points)
        params = [self.space.take_in(point) for point in points]
        checked = [self._check(row, limit) for row, limit in zip(rows, limits, strict=True)]
        for cost in costs:
            self._check_cost(cost, needed=False)
        known = list(costs) or [None] * len(points)
        distributions = self.space.distributions()
        for point, (numbers, limit), cost in zip(params, checked, known, strict=True):
            add_complete(self.optuna_study, point, distributions, numbers, limit, cost)

    @property
    def trials(self) -> list[Trial]:
        """All trials, as the record has them now; those that were withdrawn before an evaluation are left out."""
        from bayesdl.interop._optuna_trials import recorded

        return [self._trial(frozen) for frozen in recorded(self.optuna_study)]

    @property
    def best(self) -> Trial | None:
        """The best feasible trial of a study with one objective, at the target fidelity; None while there is none.

        Raises:
            SettingError: The study has several objectives (see `pareto`), or an environment (see `recommend`).
        """
        if len(self.directions) > 1:
            fail(
                SettingError,
                "study.best",
                "several objectives have no one best.",
                got=str(self.directions),
                fix="study.pareto",
            )
        if self.space.environment:
            wanted = "no one trial shows what counts over an environment."
            got = f"environment {', '.join(self.space.environment)}"
            fail(SettingError, "study.best", wanted, got=got, fix="study.recommend()")
        sign = 1.0 if self.directions[0] == "minimize" else -1.0
        good = [trial for trial in self.trials if trial.feasible and trial.exact]
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
            tail = {"feasible": trial.feasible, "seconds": trial.seconds}
            tail |= {} if self.cost is None else {"cost": trial.cost}
            tail |= {"retry_of": trial.retry_of, "error": trial.error}
            rows.append({"number": trial.number, "state": trial.state, **trial.params, **numbers, **limits, **tail})
        return pd.DataFrame(rows)

    def posterior(self) -> Any:
        """The surrogate of all finished trials: a posterior over `space.to_unit` (categories as indicator columns).

        Its outputs are the objectives, signs turned such that larger is better, then the constraints.
        """
        from bayesdl.interop._optuna_trials import fitted

        return fitted(self.optuna_study, self._sampler, self.space.distributions())[0]

    def recommend(self) -> Recommendation:
        """The evaluated point of which the surrogate thinks best, where luck of noise counts for nothing.

        With fidelities, what is compared is the value at their targets; with an environment the mean, or the risk, over
        it; with constraints, points count whose constraints have a posterior mean of at most 0, or else violate least.

        Raises:
            SettingError: The study has several objectives, or fewer than two finished trials.
        """
        from bayesdl.interop._optuna_trials import recommended

        if len(self.directions) > 1:
            wanted = "several objectives have no one best."
            fail(SettingError, "study.recommend", wanted, got=str(self.directions), fix="study.pareto")
        return Recommendation(*recommended(self.optuna_study, self._sampler, self.space.distributions()))

    @property
    def spent(self) -> float:
        """What the finished trials have cost together; NaN in a study that heeds no costs."""
        from bayesdl.interop._optuna_trials import spending

        return math.nan if self.cost is None else spending(self.optuna_study, self.cost)

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

    def _check_cost(self, cost: float | None, needed: bool) -> None:
        reported = self.cost is not None and self.cost.source == "reported"
        if cost is None and not (needed and reported):
            return
        number = isinstance(cost, (int, float)) and not isinstance(cost, bool) and math.isfinite(cost) and cost > 0
        if not reported or not number:
            wanted = "cost must be a positive number." if reported else "this study does not ask for costs."
            fix = "tell(trial, value, cost=seconds)" if reported else 'Study(..., cost="reported")'
            fail(DataError, "study.tell", wanted, got=repr(cost)[:200], fix=fix)

    def _exhausted(self) -> bool:
        """Whether the finished trials have cost the budget."""
        budget = None if self.cost is None else self.cost.budget
        return budget is not None and self.spent >= budget

    def _trial(self, frozen: Any) -> Trial:
        from bayesdl.interop._optuna_trials import cost, plain

        parts = plain(frozen)
        params = parts["params"]
        known = set(params) >= set(self.space.names)
        exact = all(params.get(name) == target for name, target in self.space.fidelities.items())
        spent = math.nan if self.cost is None else cost(frozen, self.cost)
        return Trial(x=self.space.hand_out(params) if known else None, cost=spent, exact=exact, **parts)


def _check_counts(batch_size: int, max_retries: int, grace: float) -> None:
    _checks.at_least("Study", "batch_size", batch_size, 1, integer=True)
    _checks.at_least("Study", "max_retries", max_retries, 0, integer=True)
    _checks.inside("Study", "grace", grace, 0.0, math.inf)


def _beside(lock: Path | None) -> Path | None:
    """The folder of fitted posteriors beside a storage that is a file."""
    return None if lock is None else lock.with_name(lock.name.replace("-study-lock", "-cache"))


def _directions(directions: str | Sequence[str]) -> tuple[str, ...]:
    found = (directions,) if isinstance(directions, str) else tuple(directions)
    if not found or any(direction not in _DIRECTIONS for direction in found):
        wanted = 'directions must be "minimize" or "maximize" for each objective.'
        fail(SettingError, "Study", wanted, got=repr(directions), fix='directions=("minimize",)')
    return found


def _risk(risk: Any, space: Space, directions: Sequence[str]) -> Risk:
    risk = Risk(risk) if isinstance(risk, str) else risk
    if not isinstance(risk, Risk):
        fail(SettingError, "Study", 'risk must be "mean", "var", "cvar" or a Risk.', got=repr(risk), fix='"mean"')
    if (space.fidelities or space.environment) and len(directions) > 1:
        wanted = "fidelities and environments are for one objective."
        fail(SettingError, "Study", wanted, got=str(tuple(directions)), fix="a space without them, or one objective")
    return risk


def _trust_region(setting: TrustRegion | bool, directions: Sequence[str]) -> TrustRegion | None:
    if not isinstance(setting, (TrustRegion, bool)):
        wanted = "trust_region must be True, False or a TrustRegion."
        fail(SettingError, "Study", wanted, got=repr(setting), fix="trust_region=True")
    if setting is not False and len(directions) > 1:
        wanted = "a trust region is for one objective."
        fail(SettingError, "Study", wanted, got=str(tuple(directions)), fix="trust_region=False")
    return TrustRegion() if setting is True else setting or None


def _names(constraints: Sequence[str]) -> tuple[str, ...]:
    found = (constraints,) if isinstance(constraints, str) else tuple(constraints)
    if any(not isinstance(name, str) or not name for name in found) or len(set(found)) < len(found):
        wanted = "constraints must be different names."
        fix = 'constraints=("memory",), with values at most 0 where feasible'
        fail(SettingError, "Study", wanted, got=repr(constraints), fix=fix)
    return tuple(sorted(found))
