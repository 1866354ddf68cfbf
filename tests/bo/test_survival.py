"""Studies that lose workers, caches, clocks and databases: every trial is there once, at its own point.

Workers are forked processes that are killed by SIGKILL, so that nothing of theirs can clean up.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch

import bayesdl as bdl
from bayesdl.bo import KnownCost, Study
from bayesdl.errors import StorageError
from bayesdl.interop import _optuna_acquisition  # noqa: F401 (BoTorch draws from numpy's global state on import)
from bayesdl.interop import _optuna_surrogate as surrogates
from bayesdl.interop import _optuna_workers as workers
from bayesdl.interop._optuna_record import origin, ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ENGINE = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=0.7)), optimize=False)
SPACE = {"x": (0.0, 1.0)}
QUICK = {"engine": ENGINE, "num_startup": 4, "num_samples": 8, "num_restarts": 1, "num_candidates": 8}
SOBOL = {"engine": ENGINE, "num_startup": 10_000}  # workers that need no fit
# Looks, a tenth of a second apart, without an evaluation: not a time, which a machine with other work may need
_HANGING = 1200


def objective(point):
    return (point["x"] - 0.4) ** 2


@pytest.fixture(autouse=True)
def forgetful():
    """Posteriors that other tests left in memory are forgotten, so that those on disk count."""
    surrogates._IN_MEMORY.clear()


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def storage(request, tmp_path):
    """A storage of each kind; PostgreSQL where its programs are installed."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres").database()
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else f"{tmp_path}/study.journal"


class Postgres:
    """A PostgreSQL server of its own on loopback, which goes with the test."""

    def __init__(self, folder, programs):
        self._folder, self._programs = folder, programs
        self._names = itertools.count()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # the server refuses to run as root
        self._user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self._user:
            shutil.chown(folder, "postgres")
        self._call("initdb", "-D", folder / "data", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8")
        self.start()

    def _call(self, program, *arguments):
        command = [*self._user, self._programs[program], *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=self._folder)

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self._folder} -c fsync=off -c max_connections=60"
        self._call("pg_ctl", "-D", self._folder / "data", "-l", self._folder / "log", "-o", options, "-w", "start")

    def stop(self):
        self._call("pg_ctl", "-D", self._folder / "data", "-m", "immediate", "stop")

    def database(self):
        import psycopg

        name = f"study{next(self._names)}"
        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    pytest.importorskip("psycopg")
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/local/bin")]
    path = os.pathsep.join(map(str, folders))
    programs = {name: shutil.which(name, path=path) or shutil.which(name) for name in ("initdb", "pg_ctl")}
    if not all(programs.values()) or (os.getuid() == 0 and not shutil.which("runuser")):
        pytest.skip("PostgreSQL is not installed")
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    folder.chmod(0o755)
    try:
        server = Postgres(folder, programs)
    except (subprocess.CalledProcessError, LookupError) as error:
        pytest.skip(f"PostgreSQL does not start: {getattr(error, 'stderr', error)}")
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop()
    shutil.rmtree(folder, ignore_errors=True)


def start(work, *arguments):
    """A forked worker; torch's autograd and the fits run in it as in the parent."""

    def body():
        surrogates._IN_MEMORY.clear()
        work(*arguments)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def complete(study):
    """The finished trials by rank, each once, with nothing left running."""
    trials = study.optuna_study.get_trials(deepcopy=False)
    states = {t.state.name for t in trials}
    assert states <= {"COMPLETE", "FAIL"}, states
    rank_of = ranks(trials)
    done = sorted((rank_of[t.number], t) for t in trials if t.state.name == "COMPLETE" and t.number in rank_of)
    places = [place for place, _ in done]
    assert places == sorted(set(places)), "a trial was finished twice"
    return done


@functools.cache
def unbroken(num_trials):
    """What a study proposes that nothing happens to: the points in order."""
    surrogates._IN_MEMORY.clear()
    study = Study(SPACE, study_name="unbroken", **QUICK)
    study.optimize(objective, num_trials)
    surrogates._IN_MEMORY.clear()
    return [trial.params["x"] for trial in study.trials]


def lethal(place, marks):
    """An objective and an engine, of which one kills its own process at its n-th call, once for each mark."""

    def strike(kind, count):
        mark = marks / f"{kind}-{place[1]}"
        if place[0] == kind and count == place[1] and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    calls, fits = itertools.count(1), itertools.count(1)

    def deadly(point):
        strike("objective", next(calls))
        return objective(point)

    class Deadly:
        def fit(self, x, y, *, seed=0):
            strike("fit", next(fits))
            return ENGINE.fit(x, y, seed=seed)

    return deadly, Deadly()


def test_a_study_killed_again_and_again_proposes_what_an_unbroken_one_does(storage, tmp_path):
    """Killed in evaluations and in fits: in the end nine trials are there, each once, at the unbroken one's points."""
    expected = unbroken(9)

    def work(place):
        f, engine = lethal(place, tmp_path)
        study = Study(SPACE, storage=storage, cache=None, **{**QUICK, "engine": engine})
        study.optimize(f, 9)

    deaths = 0
    for place in (("objective", 2), ("fit", 1), ("objective", 3), ("fit", 2), ("never", 0)):
        process = start(work, place)
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths == 4
    study = Study(SPACE, storage=storage, **QUICK)
    done = complete(study)
    assert [t.params["x"] for _, t in done] == expected
    lost = [t for t in study.trials if t.state == "failed"]
    assert len(lost) == 4
    assert all(trial.error == "its worker died" for trial in lost)
    assert len({origin(t) for _, t in done}) == 9


def _work(storage, num_trials, log):
    def noted(point):
        with log.open("a") as file:
            file.write(f"{point['x']!r}\n")
        time.sleep(0.002)
        return objective(point)

    Study(SPACE, storage=storage, cache=None, grace=2.0, max_retries=100, **SOBOL).optimize(noted, num_trials)


def _massacre(storage, tmp_path, num_workers, num_trials, num_kills):
    """Workers killed at random moments and replaced; afterwards every trial is finished once, at its own point."""
    g = torch.Generator().manual_seed(1)
    Study(SPACE, storage=storage, **SOBOL)
    log = tmp_path / "log"
    running, kills = [start(_work, storage, num_trials, log) for _ in range(num_workers)], 0
    idle, size = 0, 0
    while running and idle < _HANGING:
        time.sleep(0.05 + 0.15 * float(torch.rand((), generator=g)))
        now = log.stat().st_size if log.exists() else 0
        idle, size = (0, now) if now > size else (idle + 1, size)
        running = [process for process in running if process.is_alive()]
        if running and kills < num_kills:
            victim = running.pop(int(torch.randint(len(running), (), generator=g)))
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            kills += 1
            running.append(start(_work, storage, num_trials, log))
    assert not running, "workers hang"
    start(_work, storage, num_trials, log).join()
    study = Study(SPACE, storage=storage, **SOBOL)
    done = complete(study)
    assert [place for place, _ in done] == list(range(num_trials))
    memory = Study(SPACE, **SOBOL)
    memory.optimize(objective, num_trials)
    assert [t.params["x"] for _, t in done] == [t.params["x"] for t in memory.trials]
    assert len(log.read_text().splitlines()) <= num_trials + kills  # none was evaluated twice but for a death


def test_workers_killed_at_random_moments_lose_nothing(storage, tmp_path):
    _massacre(storage, tmp_path, num_workers=3, num_trials=24, num_kills=4)


@pytest.mark.slow
def test_many_workers_killed_at_random_moments_lose_nothing(storage, tmp_path):
    _massacre(storage, tmp_path, num_workers=8, num_trials=120, num_kills=24)


def test_eight_processes_share_one_file(tmp_path):
    """Twenty-four trials on one SQLite file, all there, each evaluated once."""
    storage, log = f"sqlite:///{tmp_path}/study.db", tmp_path / "log"
    Study(SPACE, storage=storage, **SOBOL)
    processes = [start(_work, storage, 24, log) for _ in range(8)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    done = complete(Study(SPACE, storage=storage, **SOBOL))
    assert [place for place, _ in done] == list(range(24))
    assert len(log.read_text().splitlines()) == 24


def _spend(storage):
    study = Study(SPACE, storage=storage, cost=KnownCost(1.0, {"x": 2.0}, budget=20.0), **SOBOL)
    study.optimize(lambda point: time.sleep(0.02) or objective(point), 100)


def test_several_processes_share_a_budget(tmp_path):
    """What each of four has in hand when the budget goes is still finished: at most four evaluations of 3 above it."""
    storage = f"sqlite:///{tmp_path}/study.db"
    study = Study(SPACE, storage=storage, cost=KnownCost(1.0, {"x": 2.0}, budget=20.0), **SOBOL)
    processes = [start(_spend, storage) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert {t.state for t in study.trials} == {"complete"}
    assert study.spent == pytest.approx(sum(1 + 2 * t.params["x"] for t in study.trials))
    assert 20.0 <= study.spent < 20.0 + 4 * 3.0


@pytest.mark.parametrize("harm", ["garbage", "truncated", "flipped", "swapped", "a folder", "gone"])
def test_a_spoilt_cache_changes_nothing(harm, tmp_path):
    """The next proposal is that of a study without a cache, whatever lies in the folder."""
    cache = tmp_path / "cache"
    expected = unbroken(9)
    surrogates._IN_MEMORY.clear()  # what is in memory is not written again
    study = Study(SPACE, cache=cache, study_name="kept", **QUICK)
    study.optimize(objective, 6)
    study.posterior()  # that of six observations, which the next proposal needs
    kept = sorted(cache.glob("*.bdl"), key=lambda path: path.stat().st_mtime)
    assert len(kept) == 3
    newest, content = kept[-1], kept[-1].read_bytes()
    newest.unlink()
    if harm == "garbage":
        newest.write_bytes(b"not a posterior" * 100)
    elif harm == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        newest.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "swapped":
        shutil.copy(kept[0], newest)
    elif harm == "a folder":
        newest.mkdir()
    surrogates._IN_MEMORY.clear()
    caught = pytest.warns(UserWarning, match="could not be kept") if harm == "a folder" else contextlib.nullcontext()
    with caught:
        assert study.ask().params["x"] == expected[6]


def test_a_cache_is_used_and_gives_the_same(tmp_path, monkeypatch):
    """A second worker reads the posterior that the first fitted, and proposes bit for bit the same."""
    expected = unbroken(9)
    storage = f"sqlite:///{tmp_path}/study.db"
    first = Study(SPACE, storage=storage, **QUICK)
    first.optimize(objective, 5)
    first.posterior()
    surrogates._IN_MEMORY.clear()
    assert len(list((tmp_path / "study.db-cache").glob("*.bdl"))) == 2
    monkeypatch.setattr(bdl.ExactGP, "fit", lambda *args, **settings: pytest.fail("fitted again"))
    assert Study(SPACE, storage=storage, **QUICK).ask().params["x"] == expected[5]


def test_a_result_told_twice_is_recorded_once(storage):
    study = Study(SPACE, storage=storage, **SOBOL)
    trial = study.ask()
    assert study.tell(trial, 0.25) == study.tell(trial, 0.25) == Study(SPACE, storage=storage, **SOBOL).tell(0, 0.25)
    with pytest.raises(StorageError, match="a result is told once"):
        study.tell(trial, 0.5)
    with pytest.raises(StorageError, match="a result is told once"):
        study.tell(trial, error="no")
    assert [t.values for t in study.trials] == [(0.25,)]


def test_a_failure_told_twice_is_recorded_once():
    study = Study(SPACE, **SOBOL)
    trial = study.ask()
    study.tell(trial, error="no")
    assert study.tell(trial, error="no").error == "no"
    with pytest.raises(StorageError, match="a result is told once"):
        study.tell(trial, 0.5)


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_clocks_that_disagree_do_no_harm(skew, storage, monkeypatch):
    """A worker on a machine whose clock is a day off lives on as long as its counter moves, and no longer."""
    here = Study(SPACE, storage=storage, grace=0.6, **SOBOL)
    trial = here.ask()
    true_time = time.time
    monkeypatch.setattr(workers, "_machine", lambda: "another machine")
    monkeypatch.setattr(time, "time", lambda: true_time() + skew)
    there = Study(SPACE, storage=storage, grace=0.6, **SOBOL)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        there._ledger.sweep()
        time.sleep(0.05)
    assert [t.state for t in there.trials] == ["running"]
    here._ledger.close()
    until = time.monotonic() + 5.0
    while time.monotonic() < until and there.trials[0].state == "running":
        there._ledger.sweep()
        time.sleep(0.05)
    assert [t.state for t in there.trials] == ["failed", "waiting"]
    assert there.ask().params == trial.params
    with pytest.raises(StorageError, match="given up for dead"):
        here.tell(trial, 0.5)


def test_a_trial_that_keeps_killing_its_workers_has_failed_in_the_end(tmp_path):
    """Three attempts, then the point counts as a failure and the study goes on."""
    storage = f"sqlite:///{tmp_path}/study.db"

    def work():
        def deadly(point):
            if point["x"] == first:
                os.kill(os.getpid(), signal.SIGKILL)
            return objective(point)

        Study(SPACE, storage=storage, **SOBOL).optimize(deadly, 3)

    first = unbroken(9)[0]
    codes = []
    for _ in range(4):
        process = start(work)
        process.join()
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL] * 3 + [0]
    study = Study(SPACE, storage=storage, **SOBOL)
    assert [t.state for t in study.trials if t.params["x"] == first] == ["failed"] * 3
    assert [t.state for t in study.trials if t.params["x"] != first] == ["complete"] * 2


def test_an_interruption_gives_the_trial_back(tmp_path):
    """Ctrl-C in the third evaluation; the next call goes on with the same point, and nothing counts as failed."""
    storage = f"sqlite:///{tmp_path}/study.db"
    expected = unbroken(9)[:5]
    calls = itertools.count(1)

    def interrupted(point):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return objective(point)

    with pytest.raises(KeyboardInterrupt):
        Study(SPACE, storage=storage, **QUICK).optimize(interrupted, 5)
    study = Study(SPACE, storage=storage, **QUICK)
    assert [t.state for t in study.trials] == ["complete", "complete", "failed", "waiting"]
    study.optimize(objective, 5)
    assert [t.params["x"] for _, t in complete(study)] == expected


def test_a_locked_database_is_waited_for(tmp_path):
    """Another program holds the file for a second."""
    path = tmp_path / "study.db"
    study = Study(SPACE, storage=_impatient(path), **SOBOL)
    locker = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(1.0, lambda: locker.execute("ROLLBACK"))
    timer.start()
    began = time.monotonic()
    study.tell(study.ask(), 0.5)
    timer.join()
    assert time.monotonic() - began > 0.9
    assert [t.state for t in study.trials] == ["complete"]


def test_a_database_that_stays_locked_is_reported_and_the_study_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE", 0.5)
    path = tmp_path / "study.db"
    study = Study(SPACE, storage=_impatient(path), **SOBOL)
    trial = study.ask()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as locker:
        locker.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="could not be reached"):
            study.tell(trial, 0.5)
        locker.execute("ROLLBACK")
    study.tell(trial, 0.5)
    assert [t.value for t in study.trials] == [0.5]


def _impatient(path):
    engine = {"connect_args": {"timeout": 0.1}}
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=engine)


def test_a_server_that_goes_away_is_reported_and_the_study_goes_on_later(postgres, monkeypatch):
    study = Study(SPACE, storage=postgres.database(), **SOBOL)
    trial = study.ask()
    postgres.stop()
    try:
        monkeypatch.setattr(workers, "_PATIENCE", 0.5)
        with pytest.raises(StorageError, match="could not be reached"):
            study.tell(trial, 0.5)
    finally:
        postgres.start()
    monkeypatch.setattr(workers, "_PATIENCE", 20.0)
    study.tell(trial, 0.5)
    assert [t.value for t in study.trials] == [0.5]


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_full_disk_is_reported_and_the_study_goes_on_later(kind, tmp_path):
    """No file may grow any more, as on a full disk: the worker says so, and what was recorded is whole."""
    storage = f"sqlite:///{tmp_path}/study.db" if kind == "sqlite" else f"{tmp_path}/study.journal"
    Study(SPACE, storage=storage, cache=None, **SOBOL).optimize(objective, 4)
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    said = tmp_path / "said"

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        workers._PATIENCE = 0.5
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, size + 500))
        try:
            Study(SPACE, storage=storage, cache=None, **SOBOL).optimize(objective, 400)
        except StorageError as error:
            said.write_text(str(error)[:400])

    process = start(work)
    process.join(60)
    assert process.exitcode == 0
    assert "storage" in said.read_text()
    study = Study(SPACE, storage=storage, cache=None, **SOBOL)
    before = sum(t.state == "complete" for t in study.trials)
    assert before >= 4
    study.optimize(objective, before + 3)
    assert len(complete(study)) == before + 3


def test_a_torn_line_of_a_journal_is_cut_off(tmp_path):
    """A worker that died, or ran out of disk, in the middle of a line: the next one writes whole lines after it."""
    path = tmp_path / "study.journal"
    study = Study(SPACE, storage=path, cache=None, **SOBOL)
    study.tell(study.ask(), 0.25)
    whole = path.read_bytes()
    for torn in (b'{"op_code":6,"worker_id":"tor', b"x" * 10_000):
        path.write_bytes(path.read_bytes() + torn)
        later = Study(SPACE, storage=path, cache=None, **SOBOL)
        later.tell(later.ask(), 0.5)
        assert torn not in path.read_bytes()
        assert path.read_bytes().startswith(whole)
    assert [t.values for t in Study(SPACE, storage=path, **SOBOL).trials] == [(0.25,), (0.5,), (0.5,)]


def test_an_owner_is_known_by_process_and_start():
    """A process number that was given out again is not taken for its former owner."""
    me = workers.owner()
    running = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, system_attrs={workers.OWNER: me})
    assert not workers.is_dead(running)
    for change in ({"started": "1"}, {"pid": 2**22 + 1}):
        running.system_attrs = {workers.OWNER: {**me, **change}}
        assert workers.is_dead(running) or not sys.platform.startswith("linux")
    running.system_attrs = {workers.OWNER: {**me, "machine": "another", "pid": 1}}
    assert not workers.is_dead(running)
