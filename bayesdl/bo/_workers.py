"""Several processes on one study. They know nothing of each other: the storage is all that they share."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bayesdl.bo import _loop
from bayesdl.bo.space import Space
from bayesdl.bo.study import Study
from bayesdl.errors import BayesdlError, SettingError, StorageError, fail

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ENOUGH = 3  # deaths for each worker, without a finished trial between them, after which a study is given up
_STOPPED = 130


class Job(NamedTuple):
    """What a worker needs: sent to it once, when it starts."""

    space: Space
    settings: dict[str, Any]
    f: Callable[[Any], Any]
    num_trials: int
    timeout: float | None


def run(study: Study, job: Job, workers: int, *, progress: bool = False) -> None:
    """Run `job` by `workers` processes and wait; those that die are replaced, and their trials handed out again.

    Raises:
        SettingError: The objective or the storage cannot be handed to another process.
        StorageError: Workers keep dying.
        KeyboardInterrupt: Ctrl-C, after the workers put back what they had in hand.
    """
    _check(job)
    began = time.monotonic()
    starts, deaths, finished, running = 0, 0, 0, []
    bar = _loop.Bar(study, job.num_trials, progress)
    try:
        while True:
            left = None if job.timeout is None else max(0.0, job.timeout - (time.monotonic() - began))
            while len(running) < workers and (starts < workers or _unfinished(study, job, left)):
                running.append(_start(job._replace(timeout=left)))
                starts += 1
            time.sleep(0.1)
            bar.refresh()
            done = [process for process in running if not process.is_alive()]
            running = [process for process in running if process.is_alive()]
            _raise_what_they_say(done)
            deaths += sum(process.exitcode != 0 for process in done)
            if done and finished < (now := sum(t.state in ("complete", "failed") for t in study.trials)):
                deaths, finished = 0, now
            if deaths > _ENOUGH * workers:
                wanted = "workers must live long enough to finish a trial."
                fix = "run with workers=1 to see why; what was recorded is safe"
                fail(StorageError, "minimize", wanted, got=f"{deaths} deaths without one", fix=fix)
            if not running and not _unfinished(study, job, left):
                return
    except BaseException:
        _stop(running)
        raise
    finally:
        bar.close()


def work(job: Job) -> None:
    """What a worker process does. Exit codes: 0 done, 3 refused with a message, 130 interrupted."""
    try:
        study = Study(job.space, **job.settings)
        _loop.run(study, job.f, job.num_trials, timeout=job.timeout)
    except KeyboardInterrupt:
        sys.exit(_STOPPED)
    except BayesdlError as error:
        print(f"bayesdl: {error}", file=sys.stderr)
        sys.exit(3)


def _check(job: Job) -> None:
    if job.settings.get("storage") is None or not isinstance(job.settings["storage"], (str, os.PathLike)):
        wanted = "several workers need a storage that each can open."
        fix = 'storage="sqlite:///study.db"'
        fail(SettingError, "minimize", wanted, got=repr(job.settings.get("storage")), fix=fix)
    name = getattr(job.f, "__qualname__", "")
    if "<" in name:
        wanted = "with several workers, f must be importable."
        fail(SettingError, "minimize", wanted, got=name, fix="define f at the top level of a module, or workers=1")


def _start(job: Job) -> Any:
    """A fresh interpreter with its share of the cores: a fork would inherit locks and database connections."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(job,), daemon=False)
    with _one_thread():
        process.start()
    return process


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that start now use one thread each, unless the user said otherwise."""
    added = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _unfinished(study: Study, job: Job, left: float | None) -> bool:
    """Whether trials are still to be begun or to be retried."""
    if left is not None and left <= 0:
        return False
    study._ledger.sweep()
    return bool(study._ledger.unfinished(0 if study._exhausted() else job.num_trials))


def _raise_what_they_say(done: list[Any]) -> None:
    """A refusal or an interruption ends the run; a sudden death does not."""
    codes = [process.exitcode for process in done]
    if 3 in codes:
        fix = "see its message above"
        fail(StorageError, "minimize", "a worker stopped with an error.", got=f"exit codes {codes}", fix=fix)
    if _STOPPED in codes:
        raise KeyboardInterrupt


def _stop(running: list[Any]) -> None:
    """Interrupt the workers, who put back what they have in hand; after ten seconds, without asking."""
    for process in running:
        with contextlib.suppress(OSError, ValueError):
            os.kill(process.pid, signal.SIGINT)
    until = time.monotonic() + 10
    for process in running:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.terminate()
            process.join()
