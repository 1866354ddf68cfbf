"""Where a study is kept: in memory, in SQLite, on a PostgreSQL or MySQL server, or in a journal file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock, get_lock_file

from bayesdl.errors import SettingError, StorageError, fail
from bayesdl.interop._optuna_workers import file_lock, persist

_SETTINGS = "bayesdl:study"


def open_storage(storage: Any) -> BaseStorage:
    """The storage that a URL, a path or an Optuna storage names.

    "sqlite:///study.db" (or a path that ends in .db, .sqlite or .sqlite3), "postgresql://user@host/name",
    "journal:///path" (or a path that ends in .log or .journal), None for memory.

    Raises:
        SettingError: None of these.
        StorageError: It cannot be opened.
    """
    if storage is None:
        return InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return optuna.storages.get_storage(storage)
    text = str(storage)
    if text.startswith("journal://") or text.endswith((".log", ".journal")):
        path = Path(text.removeprefix("journal://"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return persist(lambda: JournalStorage(_WholeLines(str(path), journal_lock(path))), patience=10)
    if "://" not in text and text.endswith((".db", ".sqlite", ".sqlite3")):
        text = f"sqlite:///{text}"
    if "://" not in text:
        wanted = "storage must be a database URL, a journal file, or None for memory."
        fail(SettingError, "storage", wanted, got=repr(storage), fix='"sqlite:///study.db" or "study.journal"')
    return _database(text)


def _database(url: str) -> BaseStorage:
    engine: dict[str, Any] = {"pool_pre_ping": True}
    lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if url.startswith("sqlite"):
        engine = {"connect_args": {"timeout": 60}}
        path = Path(url.partition(":///")[2])
        if path.name:
            path.parent.mkdir(parents=True, exist_ok=True)
            # the tables are made in several steps, between which another new worker may come
            lock = _locked(path.with_name(f"{path.name}-study-lock"))
    if url.startswith(("postgresql://", "postgres://")):
        url = "postgresql+psycopg://" + url.partition("://")[2]
    try:
        with lock:
            database = persist(lambda: RDBStorage(url, engine_kwargs=engine), patience=10)
    except (ImportError, ModuleNotFoundError) as error:
        fix = 'pip install "psycopg[binary]" for PostgreSQL'
        fail(StorageError, "storage", "the database needs its driver.", got=str(error).splitlines()[0], fix=fix)
    weakref.finalize(database, database.engine.dispose)  # closes what connections are left when nobody needs them
    return optuna.storages.get_storage(database)


class _WholeLines(JournalFileBackend):
    """A journal without torn lines: what a full disk or a kill left of one is cut off before the next is written.

    Optuna's own would append to the torn line, and could not read the file from then on. What is cut off was never
    acknowledged to whoever wrote it.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append one line for each of `logs`, or none of them; see Optuna."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with get_lock_file(self._lock):
            end = _cut_torn_line(self._file_path)
            try:
                with open(self._file_path, "ab") as file:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self._file_path, end)
                raise


def _cut_torn_line(path: str) -> int:
    """Cut a file off behind its last line end; its length then."""
    with open(path, "r+b") as file:
        end = whole = file.seek(0, os.SEEK_END)
        while whole:
            begin = max(0, whole - 4096)
            file.seek(begin)
            found = file.read(whole - begin).rfind(b"\n")
            if found >= 0:
                whole = begin + found + 1
                break
            whole = begin
        if whole < end:
            file.truncate(whole)
    return whole


class _JournalLock(BaseJournalFileLock):
    """A lock that falls with the process that holds it, where Optuna's own outlives it by half a minute."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        import fcntl

        file = self._path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock back: closing the file does."""
        file, self._file = self._file, None
        file.close()


def journal_lock(path: Path) -> BaseJournalFileLock:
    """The lock of a journal file: the system's where there is one, else Optuna's."""
    try:
        import fcntl  # noqa: F401 (whether it is there)
    except ImportError:
        return JournalFileSymlinkLock(str(path))
    return _JournalLock(path.with_name(f"{path.name}-journal-lock"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file, file_lock(file):
        yield


def open_study(
    storage: BaseStorage,
    name: str,
    sampler: optuna.samplers.BaseSampler,
    directions: Sequence[str],
    space: Mapping[str, BaseDistribution],
    constraints: Sequence[str],
) -> optuna.Study:
    """The study of this name, made or gone on with.

    Raises:
        SettingError: A study of this name has another space, other directions or other constraints.
    """
    wanted = {
        "space": {key: distribution_to_json(dist) for key, dist in space.items()},
        "directions": list(directions),
        "constraints": list(constraints),
    }
    with _quietly():
        study = persist(
            lambda: optuna.create_study(
                study_name=name, storage=storage, sampler=sampler, directions=list(directions), load_if_exists=True
            )
        )
    found = persist(lambda: storage.get_study_system_attrs(study._study_id))
    kept = found.get(_SETTINGS)
    if kept is None:
        persist(lambda: storage.set_study_system_attr(study._study_id, _SETTINGS, wanted))
        kept = wanted
    stored = [d.name.lower() for d in study.directions]
    for part, value in wanted.items():
        other = stored if part == "directions" else kept[part]
        if other != value:
            fix = "another study_name, or the settings that the study was begun with"
            fail(SettingError, "study", f"the study {name!r} was begun with another {part}.", got=str(value), fix=fix)
    return study


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Optuna's line on standard error about a study that it made."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
