"""Who works on which trial, and what becomes of a trial whose worker died.

A claimed trial names its owner: machine, process, and when that process started. A worker on the same machine sees at
once whether the process still lives. Others watch a counter that the owner raises: a trial whose counter has not moved
for `grace` seconds of the watcher's own monotonic clock is dead. No two clocks are ever compared, so that clocks that
disagree, or jump, do no harm.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import DatabaseError, InternalError, OperationalError, SQLAlchemyError

from bayesdl.errors import StorageError, fail
from bayesdl.interop._optuna_record import HISTORY, LOST, RETRY_OF, SURPLUS, ranks

OWNER = "bayesdl:owner"
BEAT = "bayesdl:beat"
ERROR = "bayesdl:error"
_PATIENCE = 60.0  # seconds that a locked or absent database is waited for

Result = TypeVar("Result")


def owner(tireless: bool = False) -> dict[str, Any]:
    """This process, told apart from every other on any machine; `tireless` where it evaluates trial after trial."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "tireless": tireless}


def is_dead(trial: FrozenTrial) -> bool:
    """Whether the process that owns a trial is known to be gone: only a process of the same machine can tell."""
    named = trial.system_attrs.get(OWNER)
    if not named or named["machine"] != _machine():
        return False
    started = _started(int(named["pid"]))
    return started is None or started != named["started"]


@functools.cache
def _machine() -> str:
    """The machine, this start of it, and the space in which process numbers are unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; "" where the system does not say; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return ""
    return None if fields[0] in ("Z", "X") else fields[19]


def persist(call: Callable[[], Result], patience: float | None = None) -> Result:
    """`call()`, tried again while the storage is locked or away; every call here leaves nothing behind when it fails.

    Raises:
        StorageError: The storage stayed away for `patience` seconds (None: a minute), or its disk is full.
    """
    patience = _PATIENCE if patience is None else patience
    began, wait = time.monotonic(), 0.05
    while True:
        try:
            return call()
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            full = "disk is full" in reason or getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG)
            broken = isinstance(error, DatabaseError) and not isinstance(error, (OperationalError, InternalError))
            if full or broken or time.monotonic() - began > patience:
                what = "has no room left" if full else f"could not be reached for {patience:.0f} seconds"
                what = "cannot be used" if broken else what
                fix = "free some space" if full else "see whether the database is up and who holds its lock"
                fix += "; what was recorded is safe, and the same call goes on from it"
                fail(StorageError, "study", f"the storage {what}.", got=reason[:300], fix=fix)
            time.sleep(wait)
            wait = min(2.0, 2 * wait)


class Ledger:
    """Hands out trials of a study, each to one worker, and takes results in, each once.

    Steps that belong together run under a lock on a file beside the database where that is a file (SQLite checks and
    changes a trial's state in two steps, between which another process may come); a server has locks of its own.
    """

    def __init__(self, study: optuna.Study, *, grace: float = 120.0, max_retries: int = 2) -> None:
        self.study = study
        self._storage: BaseStorage = study._storage
        self._lock_path = lock_path(self._storage)
        self._grace = grace
        self._max_retries = max_retries
        self._seen: dict[int, tuple[Any, float]] = {}
        self._open: set[int] = set()
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None
        self._guard = threading.Lock()

    def claim(self, limit: int | None = None) -> int | None:
        """The id of a trial that is now this process's: one to be retried, one that waits, or a new one.

        Args:
            limit: Number of first attempts that the study may have; None for no limit.

        Returns:
            None where the limit is reached and nothing waits.
        """
        return persist(lambda: self._claim(limit))

    def _claim(self, limit: int | None) -> int | None:
        with self._exclusive():
            self._sweep()
            trials = self._trials()
            me = owner(tireless=limit is not None)
            for trial in trials:
                if trial.state == TrialState.WAITING and self._take(trial, trials, me):
                    return self._opened(trial._trial_id)
            if limit is not None and _first_attempts(trials) >= limit:
                return None
            template = create_trial(state=TrialState.RUNNING, system_attrs={OWNER: me})
            template.datetime_start = _now()
            trial_id = self._storage.create_new_trial(self.study._study_id, template_trial=template)
            number = self._storage.get_trial_number_from_id(trial_id)
            # on a server, several may have created one each since the count was taken: the surplus withdraws
            if limit is not None and ranks(self._trials())[number] >= limit:
                self._withdraw(trial_id)
                return None
            return self._opened(trial_id)

    def _take(self, trial: FrozenTrial, trials: list[FrozenTrial], me: dict[str, Any]) -> bool:
        """Whether the waiting trial is now ours."""
        # named before it is taken, in case we die between, and after, in case another named itself between
        self._storage.set_trial_system_attr(trial._trial_id, OWNER, me)
        if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
            return False
        self._storage.set_trial_system_attr(trial._trial_id, OWNER, me)
        first = trial.system_attrs.get(RETRY_OF)
        doubled = [t for t in trials if t.number < trial.number and t.system_attrs.get(RETRY_OF) == first]
        if first is not None and doubled:
            self._withdraw(trial._trial_id)
            return False
        return True

    def _withdraw(self, trial_id: int) -> None:
        self._storage.set_trial_system_attr(trial_id, SURPLUS, True)
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _opened(self, trial_id: int) -> int:
        with self._guard:
            self._open.add(trial_id)
            if self._beats is None and not isinstance(self._storage, optuna.storages.InMemoryStorage):
                self._beats = threading.Thread(target=self._beat, daemon=True, name="bayesdl-study")
                self._beats.start()
        return trial_id

    def finish(
        self,
        trial_id: int,
        values: list[float] | None,
        constraints: dict[str, float],
        error: str | None = None,
        cost: float | None = None,
    ) -> FrozenTrial:
        """Record the values of a trial, or that it failed (values None, with the reason), and what it cost.

        The same result told twice is taken once.

        Raises:
            StorageError: Another result is recorded already, or the trial was given up for dead meanwhile.
        """
        trial = persist(lambda: self._finish(trial_id, values, constraints, error, cost))
        with self._guard:
            self._open.discard(trial_id)
        return trial

    def _finish(
        self,
        trial_id: int,
        values: list[float] | None,
        constraints: dict[str, float],
        error: str | None,
        cost: float | None,
    ) -> FrozenTrial:
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        with self._exclusive():
            trial = self._storage.get_trial(trial_id)
            if not trial.state.is_finished():
                # on a server, another worker may give the trial up at any moment
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    for name, value in constraints.items():
                        self._storage.set_trial_system_attr(trial_id, f"constraints:{name}", value)
                    if cost is not None:
                        self._storage.set_trial_user_attr(trial_id, "cost", float(cost))
                    if error is not None:
                        self._storage.set_trial_system_attr(trial_id, ERROR, error[:500])
                    self._storage.set_trial_state_values(trial_id, state, values)
                trial = self._storage.get_trial(trial_id)
        same = trial.state == state and (trial.values or None) == values and trial.constraints == constraints
        if not same and LOST in trial.system_attrs:
            got = f"values {values} for trial {trial.number}"
            fix = "a longer grace= for objectives that keep their process from breathing; the retry goes on"
            fail(StorageError, "study.tell", "the trial was given up for dead and is tried again.", got=got, fix=fix)
        if not same:
            got = f"values {values}, constraints {constraints} for trial {trial.number}, which is {trial.state.name} "
            got += f"with {trial.values}, {trial.constraints}"
            fail(StorageError, "study.tell", "a result is told once.", got=got, fix="ask for a new trial")
        return trial

    def release(self, trial_id: int | None = None) -> None:
        """Give back one trial, or all in hand: they wait for whoever asks next, and the attempt does not count."""
        with self._guard:
            mine = sorted(self._open) if trial_id is None else [trial_id]
            self._open.difference_update(mine)
        with contextlib.suppress(optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError), self._exclusive():
            for trial_id in mine:  # what cannot be given back now is found dead when this process is gone
                self._give_up(self._storage.get_trial(trial_id), counts=False)

    def sweep(self) -> None:
        """Give up trials whose workers are dead: they wait to be retried, or have failed after too many attempts."""

        def swept() -> None:
            with self._exclusive():
                self._sweep()

        persist(swept)

    def _sweep(self) -> None:
        trials = self._trials()
        retried = {t.system_attrs[RETRY_OF] for t in trials if RETRY_OF in t.system_attrs}
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial._trial_id not in self._open and self._has_stopped(trial):
                self._give_up(trial, counts=True)
            elif trial.state == TrialState.FAIL and trial.system_attrs.get(LOST) and trial.number not in retried:
                self._retry(trial, counts=True)  # whoever gave it up died before it could be put in line again

    def _has_stopped(self, trial: FrozenTrial) -> bool:
        """Whether a running trial is dead, by its process or by a counter that stands still."""
        if is_dead(trial):
            return True
        if OWNER not in trial.system_attrs and trial.params:
            return False  # of a program of the user's own, which may have other means
        named = trial.system_attrs.get(OWNER)
        if named and named["machine"] == _machine():
            return False
        now, beat = time.monotonic(), trial.system_attrs.get(BEAT, 0)
        last, since = self._seen.get(trial._trial_id, (None, now))
        if last != beat:
            self._seen[trial._trial_id] = (beat, now)
            return False
        return now - since > self._grace

    def _give_up(self, trial: FrozenTrial, counts: bool) -> None:
        try:
            self._storage.set_trial_system_attr(trial._trial_id, LOST, True)
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # it finished, or another gave it up
        self._retry(trial, counts)

    def _retry(self, trial: FrozenTrial, counts: bool) -> None:
        """Put a lost trial in line again with the same parameters, unless that was done often enough."""
        history = list(trial.system_attrs.get(HISTORY) or [])
        lives = int(trial.system_attrs.get("bayesdl:attempts", 1))
        if counts and lives > self._max_retries:
            return
        attrs = {
            RETRY_OF: trial.number,
            HISTORY: [*history, trial.number],
            "bayesdl:attempts": lives + counts,
            "fixed_params": trial.params or trial.system_attrs.get("fixed_params", {}),
        }
        template = create_trial(state=TrialState.WAITING, system_attrs=attrs, user_attrs=trial.user_attrs)
        self._storage.create_new_trial(self.study._study_id, template_trial=template)

    def unfinished(self, limit: int) -> bool:
        """Whether trials are to be begun, to be retried, or under way in another worker, which may yet lose them.

        A trial that somebody asked for by hand is nobody's concern but theirs.
        """
        trials = persist(self._trials)
        me = owner()
        return _first_attempts(trials) < limit or any(
            t.state == TrialState.WAITING
            or (t.state == TrialState.RUNNING and _is_tireless(t.system_attrs.get(OWNER), me))
            for t in trials
        )

    def close(self) -> None:
        """Stop the counter."""
        self._stop.set()

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self.study._study_id, deepcopy=False)

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._grace / 4):
            count += 1
            with self._guard:
                mine = list(self._open)
            for trial_id in mine:
                # a missed beat is no harm; a trial that finished meanwhile needs none
                with contextlib.suppress(Exception):
                    self._storage.set_trial_system_attr(trial_id, BEAT, count)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._lock_path is None:
            with _LOCK:
                yield
            return
        with _LOCK, self._lock_path.open("a") as file, file_lock(file):
            yield


_LOCK = threading.RLock()


@contextlib.contextmanager
def file_lock(file: Any) -> Iterator[None]:
    """Hold the lock on an open file; it falls with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # a system without it: SQLite's own locks must do
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def lock_path(storage: BaseStorage) -> Path | None:
    """The file whose lock stands for a storage that is a file; None for a server or for memory."""
    inner = getattr(storage, "_backend", storage)
    engine = getattr(inner, "engine", None)
    if engine is not None:
        name = engine.url.database if engine.url.get_backend_name() == "sqlite" else None
        return (
            None if not name or name == ":memory:" else Path(name).absolute().with_name(f"{Path(name).name}-study-lock")
        )
    path = getattr(getattr(storage, "_backend", None), "_file_path", None)
    return None if path is None else Path(path).absolute().with_name(f"{Path(path).name}-study-lock")


def _is_tireless(named: dict[str, Any] | None, me: dict[str, Any]) -> bool:
    """Whether an owner is another worker that evaluates trial after trial."""
    if not named or not named.get("tireless"):
        return False
    return any(named[key] != me[key] for key in ("machine", "pid", "started"))


def _first_attempts(trials: list[FrozenTrial]) -> int:
    return len(set(ranks(trials).values()))


def _now() -> Any:
    import datetime

    return datetime.datetime.now()
