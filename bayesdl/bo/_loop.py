"""Ask, evaluate, tell, until the study has its trials. Any number of processes may run this on one storage."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from bayesdl.bo.study import Study
from bayesdl.bo.trial import Trial
from bayesdl.errors import BayesdlError, DataError, StorageError, fail

_HOPELESS = 5  # failures without a single value
_POLL = 0.5  # seconds between looks at what other workers do


def run(
    study: Study,
    f: Callable[[Any], Any],
    num_trials: int,
    *,
    timeout: float | None = None,
    progress: bool = False,
) -> None:
    """Evaluate until the study has `num_trials` first attempts and none is left that a dead worker dropped.

    Raises:
        DataError: Nothing but failures among the first trials.
        KeyboardInterrupt: Ctrl-C, after the trials in hand were put back in line.
    """
    until = None if timeout is None else time.monotonic() + timeout
    bar = Bar(study, num_trials, progress)
    try:
        while until is None or time.monotonic() < until:
            limit = 0 if study._exhausted() else num_trials  # with the budget spent, only what was begun is finished
            batch = _claimed(study, limit)
            if batch:
                _evaluate(study, f, batch, bar)
            elif not study._ledger.unfinished(limit):
                break
            else:
                time.sleep(_POLL)
                bar.refresh()
    finally:
        bar.close()


def _claimed(study: Study, num_trials: int) -> list[Trial]:
    """The next batch; shorter, or empty, where the study has its trials."""
    batch: list[Trial] = []
    try:
        while len(batch) < study.batch_size and (trial := study._ask(num_trials)) is not None:
            batch.append(trial)
    except BaseException:
        study.release_all()
        raise
    return batch


def _evaluate(study: Study, f: Callable[[Any], Any], batch: list[Trial], bar: Bar) -> None:
    try:
        for trial in batch:
            bar.update(evaluate(study, f, trial))
            _give_up_if_hopeless(study)
    except BaseException:
        study.release_all()  # interrupted: whoever comes next evaluates the same points
        raise


def evaluate(study: Study, f: Callable[[Any], Any], trial: Trial) -> Trial:
    """Evaluate one trial and record what came out, be it a failure."""
    try:
        values, reported = _split(study, f(trial.x))
        cost = reported.pop("cost", None) if study.cost is not None and study.cost.source == "reported" else None
        checked = study._check(values, reported)
        study._check_cost(cost, needed=True)
    except Exception as error:  # the objective is the user's: whatever it raises is a failed trial
        reason = str(error).replace("\n", " ")
        return study.tell(trial, error=f"{type(error).__name__}: {reason}")
    try:
        return study.tell(trial, checked[0], constraints=checked[1], cost=cost)
    except StorageError as error:
        if "given up for dead" not in str(error):
            raise
        print(f"bayesdl: {error}", file=sys.stderr)
        return trial


def _split(study: Study, returned: Any) -> tuple[Any, dict[str, float]]:
    """What an objective returned, as values and a dict of constraints and the cost."""
    reported = study.cost is not None and study.cost.source == "reported"
    if not study.constraints and not reported:
        return returned, {}
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], dict):
        what = "a reported cost" if reported else "constraints"
        fix = 'return value, {"cost": seconds}' if reported else 'return value, {"memory": used - allowed}'
        wanted = f"an objective with {what} returns (values, {{name: value}})."
        fail(DataError, "objective", wanted, got=repr(returned)[:200], fix=fix)
    return returned[0], dict(returned[1])


def _give_up_if_hopeless(study: Study) -> None:
    """Stop a study whose objective never worked, before it burns the whole budget."""
    trials = study.trials
    failed = [trial for trial in trials if trial.state == "failed"]
    if len(failed) >= _HOPELESS and not any(trial.state == "complete" for trial in trials):
        wanted = f"one of the first {len(failed)} trials must give a value."
        fix = "call the objective by hand at this point; the failures are in study.table"
        fail(DataError, "minimize", wanted, got=f"{failed[0].error} at {dict(failed[0].params)}", fix=fix)


class Bar:
    """A bar of finished trials with the best value; silent unless asked for."""

    def __init__(self, study: Study, total: int, enabled: bool) -> None:
        self._study = study
        self._bar: Any = None
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=study.name, file=sys.stderr, dynamic_ncols=True)
            self.refresh()

    def update(self, trial: Trial) -> None:
        """Count a trial that has just finished."""
        if self._bar is not None:
            self.refresh(trial)

    def refresh(self, last: Trial | None = None) -> None:
        """Read the record again: other workers finish trials too."""
        if self._bar is None:
            return
        with contextlib.suppress(BayesdlError):
            trials = self._study.trials
            retried = {trial.retry_of for trial in trials}
            done = [t for t in trials if t.state in ("complete", "failed") and t.number not in retried]
            failed = sum(t.state == "failed" for t in done)
            words = [self._standing(trials)]
            words += [f"last {last.value:.5g}"] if last is not None and last.state == "complete" else []
            words += [f"failed {failed}"] if failed else []
            self._bar.set_postfix_str(", ".join(word for word in words if word), refresh=False)
            self._bar.n = min(len(done), self._bar.total)
            self._bar.refresh()

    def _standing(self, trials: list[Trial]) -> str:
        if len(self._study.directions) > 1:
            return f"Pareto front {len(self._study.pareto)}"
        best = None if self._study.space.environment else self._study.best
        return "" if best is None else f"best {best.value:.6g}"

    def close(self) -> None:
        """Leave the bar on its line."""
        if self._bar is not None:
            self._bar.close()
