"""One call from a function to its minimum: a study, run to its end by one process or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesdl import _checks
from bayesdl.bo import _workers
from bayesdl.bo.cost import Cost
from bayesdl.bo.space import Risk, Space
from bayesdl.bo.study import Study
from bayesdl.bo.trial import Recommendation, Trial
from bayesdl.bo.trust_region import TrustRegion
from bayesdl.errors import SettingError, fail

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Result", "minimize"]


@dataclass(frozen=True)
class Result:
    """What a study found.

    Attributes:
        study: The study, which can be asked for more.
    """

    study: Study

    @property
    def best(self) -> Trial | None:
        """The best feasible trial: `.x`, `.params`, `.value`; None while there is none. See `Study.best`."""
        return self.study.best

    def recommend(self) -> Recommendation:
        """The evaluated point of which the surrogate thinks best; see `Study.recommend`."""
        return self.study.recommend()

    @property
    def pareto(self) -> list[Trial]:
        """The feasible trials that none beats in all objectives; see `Study.pareto`."""
        return self.study.pareto

    @property
    def table(self) -> pandas.DataFrame:
        """One row a trial; see `Study.table`."""
        return self.study.table

    def plot(self) -> Figure:
        """Best value so far, or the Pareto front, as a matplotlib figure; see `Study.plot`."""
        return self.study.plot()

    def report(self, path: str | Path) -> None:
        """Write a self-contained page; see `Study.report`."""
        self.study.report(path)


def minimize(
    f: Callable[[Any], Any],
    bounds: Any,
    *,
    engine: Any = None,
    num_trials: int = 50,
    batch_size: int = 1,
    workers: int = 1,
    acquisition: str | Any = "auto",
    directions: str | Sequence[str] = ("minimize",),
    constraints: Sequence[str] = (),
    storage: Any = None,
    study_name: str = "study",
    seed: int = 0,
    num_startup: int | None = None,
    refit_every: int = 1,
    trust_region: TrustRegion | bool = False,
    cost: Cost | str | None = None,
    risk: Risk | str = "mean",
    timeout: float | None = None,
    progress: bool = False,
) -> Result:
    """Minimise `f` over a box, or over any mixture of numbers, integers and choices, in few evaluations.

    `f` receives one point: a tensor (d,) where `bounds` is a tensor, a numpy array where it is a list of pairs, a dict
    where it has names or choices. It returns a number; a number for each of several `directions`; with `constraints`, a
    pair of that and a dict of the constraints' values, feasible where at most 0. An exception, NaN or an infinity is
    recorded as a failed trial, and the study goes on.

    A call that was interrupted, by Ctrl-C or by a power cut, goes on from where it was if made again with the same
    storage. `num_trials` counts all trials of the study, not those of this call; a trial whose worker died is tried
    again without counting twice.

    Args:
        f: The objective.
        bounds: A tensor (2, d) of lower and upper bounds, a list of pairs, or a dict of names to dimensions; see
            `Space.of`.
        engine: Any engine of bayesdl; None for an exact GP with a Matern-5/2 kernel.
        num_trials: Evaluations in all.
        batch_size: Points proposed together.
        workers: Processes that evaluate side by side; above 1, `f` must be importable from a module and `storage` must
            be a URL or a path. More machines join by the same call with the same storage.
        acquisition, directions, constraints, storage, study_name, seed, num_startup, refit_every, trust_region,
            cost, risk: See `Study`, which has further settings: `Study(...).optimize(f, num_trials)` is this function
            with one worker.
        timeout: Seconds after which no new trial begins.
        progress: Show a bar with the best value.

    Raises:
        SettingError: Bounds that are reversed or infinite, or a setting out of range.
        DataError: None of the first trials gave a value; the message quotes the first failure.
        StorageError: The storage stayed away for a minute.
    """
    _checks.at_least("minimize", "num_trials", num_trials, 1, integer=True)
    _checks.at_least("minimize", "workers", workers, 1, integer=True)
    if timeout is not None:
        _checks.at_least("minimize", "timeout", timeout, 0)
    if not callable(f):
        wanted = "f must be a function of one point."
        fail(SettingError, "minimize", wanted, got=_checks.describe(f), fix="minimize(lambda x: (x**2).sum(), bounds)")
    settings = {
        "engine": engine, "acquisition": acquisition, "directions": directions, "constraints": constraints,
        "storage": storage, "study_name": study_name, "seed": seed, "batch_size": batch_size,
        "num_startup": num_startup, "refit_every": refit_every, "trust_region": trust_region,
        "cost": cost, "risk": risk,
    }  # fmt: skip
    study = Study(Space.of(bounds), **settings)
    if workers == 1:
        study.optimize(f, num_trials, timeout=timeout, progress=progress)
    else:
        job = _workers.Job(study.space, settings, f, num_trials, timeout)
        _workers.run(study, job, workers, progress=progress)
    return Result(study)
