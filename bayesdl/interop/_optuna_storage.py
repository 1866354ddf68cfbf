"""Where a study is kept: in memory, in SQLite, on a PostgreSQL or MySQL server, or in a journal file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

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
        return persist(lambda: JournalStorage(JournalFileBackend(str(path))), patience=10)
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
            return optuna.storages.get_storage(persist(lambda: RDBStorage(url, engine_kwargs=engine), patience=10))
    except (ImportError, ModuleNotFoundError) as error:
        fix = 'pip install "psycopg[binary]" for PostgreSQL'
        fail(StorageError, "storage", "the database needs its driver.", got=str(error).splitlines()[0], fix=fix)


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
