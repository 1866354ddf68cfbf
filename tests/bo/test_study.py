"""Studies, `minimize` and the command line: what a user asks, tells, reads and is refused."""

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import bayesdl as bdl
from bayesdl import cli
from bayesdl.bo import Float, Study, Trial, minimize
from bayesdl.bo._report import bound_share
from bayesdl.errors import DataError, SettingError, StorageError
from bayesdl.interop import _optuna_acquisition  # noqa: F401 (BoTorch draws from numpy's global state on import)

ENGINE = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=2.0)), optimize=False)
QUICK = {"engine": ENGINE, "num_startup": 4}
SOBOL = {"engine": ENGINE, "num_startup": 10_000}
BOX = [(0.0, 1.0), (-1.0, 1.0)]


def bowl(x):
    return float((x[0] - 0.3) ** 2 + (x[1] + 0.2) ** 2)


def test_minimize_finds_the_bottom_of_a_bowl():
    result = minimize(bowl, BOX, num_trials=9, seed=1, **QUICK)
    assert result.best.value < 0.02
    assert result.best.value == bowl(result.best.x)
    table = result.table
    assert list(table.columns) == ["number", "state", "x0", "x1", "value", "feasible", "seconds", "retry_of", "error"]
    assert table["value"].min() == result.best.value
    again = minimize(bowl, BOX, num_trials=9, seed=1, **QUICK)
    assert again.table["x0"].tolist() == table["x0"].tolist()


def test_a_call_goes_on_with_the_study_in_the_storage(tmp_path):
    """Four and then six more are the same ten as at once; a call whose trials are there does nothing."""
    storage = f"sqlite:///{tmp_path}/study.db"
    calls = []

    def counted(x):
        calls.append(x)
        return bowl(x)

    minimize(counted, BOX, num_trials=3, storage=storage, **SOBOL)
    result = minimize(counted, BOX, num_trials=8, storage=storage, **SOBOL)
    assert len(calls) == 8
    assert minimize(counted, BOX, num_trials=8, storage=storage, **SOBOL).best == result.best
    assert len(calls) == 8
    whole = minimize(bowl, BOX, num_trials=8, **SOBOL)
    assert whole.table["x1"].tolist() == result.table["x1"].tolist()


@pytest.mark.parametrize(
    ("bounds", "kind"),
    [(BOX, np.ndarray), (torch.tensor(BOX, dtype=torch.float64).T, torch.Tensor), ({"a": (0.0, 1.0)}, dict)],
)
def test_the_objective_receives_points_in_the_form_of_the_bounds(bounds, kind):
    seen = []
    minimize(lambda x: seen.append(x) or 1.0, bounds, num_trials=2, **SOBOL)
    assert all(isinstance(x, kind) for x in seen)


def test_a_batch_has_its_members_pending():
    """Four points of one batch differ, and are proposed from the same observations."""
    study = Study(BOX, batch_size=4, **QUICK)
    study.optimize(bowl, 4)
    batch = study.ask_batch()
    points = torch.tensor(np.array([trial.x for trial in batch]))
    assert torch.pdist(points).min() > 1e-3
    assert [trial.state for trial in study.trials] == ["complete"] * 4 + ["running"] * 4


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        ("low", "values must be 1 number"),
        ((1.0, 2.0), "one value for each of 1"),
        (None, "values must be 1 number"),
        (1 / 3 + 1j, "values must be 1 number"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
    ids=repr,
)
def test_whatever_an_objective_does_is_a_recorded_failure(returned, says):
    """The third evaluation goes wrong; the study has its other trials, and the reason in its table."""
    calls = itertools.count(1)

    def objective(x):
        if next(calls) != 3:
            return bowl(x)
        if isinstance(returned, Exception):
            raise returned
        return returned

    result = minimize(objective, BOX, num_trials=5, **SOBOL)
    assert [t.state for t in result.study.trials] == ["complete", "complete", "failed", "complete", "complete"]
    assert says in result.table["error"][2]
    assert math.isnan(result.table["value"][2])


def test_an_objective_that_never_works_stops_the_study():
    calls = []

    def objective(x):
        calls.append(x)
        raise ZeroDivisionError("division by zero")

    with pytest.raises(DataError, match=r"ZeroDivisionError: division by zero at \{'x0'"):
        minimize(objective, BOX, num_trials=50, **SOBOL)
    assert len(calls) == 5


def test_constraints_are_reported_and_the_best_is_feasible():
    def objective(x):
        return float(x[0]), {"edge": 0.5 - float(x[0])}

    result = minimize(objective, BOX, num_trials=8, constraints=["edge"], **SOBOL)
    allowed = [t for t in result.study.trials if t.x[0] >= 0.5]
    assert 0 < len(allowed) < 8
    assert result.best.value == min(t.value for t in allowed)
    assert result.table["edge"].tolist() == [0.5 - t.x[0] for t in result.study.trials]


def test_constraints_that_are_not_reported_are_failures():
    study = Study(BOX, constraints=["edge"], **SOBOL)
    with pytest.raises(DataError, match="must have the names"):
        study.tell(study.ask(), 0.5)
    assert study.best is None
    with pytest.raises(DataError, match="one of the first 5 trials"):
        minimize(bowl, BOX, num_trials=8, constraints=["edge"], **SOBOL)


def test_the_pareto_front_is_that_of_its_definition():
    """Against a double loop; one objective is minimised, one maximised."""
    study = Study(BOX, directions=("minimize", "maximize"), **SOBOL)
    study.optimize(lambda x: (round(float(x[0]), 1), round(float(x[1]), 1)), 30)
    trials = study.trials

    def beats(a, b):
        (p, q), (r, s) = a.values, b.values
        return p <= r and q >= s and (p, q) != (r, s)

    expected = [t for t in trials if not any(beats(other, t) for other in trials)]
    assert [t.number for t in study.pareto] == [t.number for t in expected]
    with pytest.raises(SettingError, match="no one best"):
        _ = study.best


def test_two_objectives_are_improved_together():
    """Distance to two corners: the front is the diagonal; its hypervolume grows beyond that of the start."""

    def corners(x):
        return float(x[0] ** 2 + x[1] ** 2), float((x[0] - 1) ** 2 + (x[1] - 1) ** 2)

    result = minimize(corners, BOX, num_trials=9, directions=("minimize", "minimize"), num_startup=5, engine=ENGINE)
    late = [t for t in result.study.trials if t.number >= 5]
    off = [abs(float(t.x[0] - t.x[1])) for t in late]
    assert sorted(off)[len(off) // 2] < 0.25
    assert any(t.number >= 5 for t in result.pareto)


def test_evaluations_made_before_count():
    study = Study({"x": (0.0, 1.0), "kind": ["a", "b"]}, **QUICK)
    points = [{"x": 0.1 * i, "kind": "ab"[i % 2]} for i in range(5)]
    study.add(points, [abs(p["x"] - 0.3) for p in points])
    study.add([{"x": 0.9, "kind": "a"}], [math.nan])
    assert [t.state for t in study.trials] == ["complete"] * 5 + ["failed"]
    trial = study.ask()
    assert "bayesdl:seconds" in study.optuna_study.get_trials()[trial.number].system_attrs
    with pytest.raises(SettingError, match="must lie in"):
        study.add([{"x": 2.0, "kind": "a"}], [1.0])


def test_a_study_is_gone_on_with_only_in_its_own_terms(tmp_path):
    storage = tmp_path / "study.db"
    Study(BOX, storage=storage, constraints=("c",), **SOBOL)
    for change, says in (
        ({"space": [(0.0, 2.0), (-1.0, 1.0)]}, "another space"),
        ({"directions": ("maximize",)}, "another directions"),
        ({"constraints": ()}, "another constraints"),
    ):
        settings = {"space": BOX, "constraints": ("c",), **change}
        with pytest.raises(SettingError, match=says):
            Study(settings.pop("space"), storage=storage, **settings, **SOBOL)
    Study(BOX, storage=storage, study_name="another", **SOBOL)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"directions": "up"}, "minimize"),
        ({"directions": ()}, "minimize"),
        ({"constraints": ("a", "a")}, "different names"),
        ({"batch_size": 0}, "batch_size"),
        ({"grace": 0}, "grace"),
        ({"max_retries": -1}, "max_retries"),
        ({"storage": "study"}, "database URL"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        Study(BOX, **settings)


def test_calls_that_make_no_sense_are_refused(tmp_path):
    for settings, says in (
        ({"num_trials": 0}, "num_trials"),
        ({"workers": 0}, "workers"),
        ({"timeout": -1}, "timeout"),
        ({"workers": 2}, "storage that each can open"),
        ({"workers": 2, "storage": f"sqlite:///{tmp_path}/never.db"}, "importable"),
    ):
        with pytest.raises(SettingError, match=says):
            minimize(lambda x: 0.0, BOX, **settings, **SOBOL)
    with pytest.raises(SettingError, match="function of one point"):
        minimize(3, BOX)
    study = Study(BOX, **SOBOL)
    with pytest.raises(SettingError, match="must be one that was asked for"):
        study.tell(7, 0.5)
    with pytest.raises(SettingError, match="two finished trials"):
        study.posterior()


def test_a_storage_that_cannot_be_opened_is_reported(tmp_path):
    (tmp_path / "study.db").write_text("not a database, but text that is long enough to be read as one" * 20)
    with pytest.raises(StorageError, match=r"could not be reached|not a database"):
        Study(BOX, storage=tmp_path / "study.db", **SOBOL)


def test_the_posterior_is_of_turned_signs():
    study = Study({"x": (0.0, 2.0)}, directions="minimize", **QUICK)
    study.add([[0.0], [0.5], [1.0], [2.0]], [3.0, 2.0, 1.0, 2.0])
    mean = study.posterior().predict(study.space.to_unit([{"x": 1.0}]), noise=False).mean
    assert float(mean) == pytest.approx(-1.0, abs=0.3)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.words = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("several", [False, True])
def test_the_report_holds_everything_and_reaches_for_nothing(several, tmp_path):
    space = {"x": (0.0, 1.0), "rate": Float(1e-3, 1.0, log=True), "n": range(1, 5), "<kind>": ["a", "b"]}
    directions = ("minimize", "maximize") if several else ("minimize",)
    study = Study(space, directions=directions, constraints=("c",), study_name="<study>", **SOBOL)
    calls = itertools.count(1)

    def objective(point):
        if next(calls) == 4:
            raise ValueError("<b>wrong</b>")
        value = point["x"] + point["n"]
        return ((value, point["rate"]) if several else value), {"c": point["x"] - 0.7}

    study.optimize(objective, 8)
    study.report(tmp_path / "deep" / "index.html")
    page = _Page()
    text = (tmp_path / "deep" / "index.html").read_text(encoding="utf-8")
    page.feed(text)
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 4
    assert all(p["src"].startswith("data:image/png;base64,") and p["alt"] and int(p["width"]) > 300 for p in pictures)
    assert not any(tag in ("script", "link") and attrs.get("href") != "data:," for tag, attrs in page.tags)
    assert "<b>wrong</b>" not in text
    assert "<kind>" not in text
    assert "ValueError: <b>wrong</b>" in "".join(page.words)
    heading = "Pareto front" if several else "Best trials"
    assert heading in page.words


def test_the_share_of_proposals_on_bounds_is_counted():
    """A slope: the optimum is a corner, and proposals go there."""
    study = Study(BOX, **QUICK)
    study.optimize(lambda x: float(x[0] + x[1]), 7)
    proposed = [t for t in study.trials if t.number >= 4]
    edges = [min(abs(v - low), abs(v - high)) < 1e-6 for t in proposed for v, (low, high) in zip(t.x, BOX, strict=True)]
    assert bound_share(study, study.trials) == pytest.approx(sum(edges) / len(edges))
    assert sum(edges) / len(edges) > 0.5


PROBLEM = """
import os, time

space = {"x": (-1.0, 1.0), "n": range(1, 4)}

def objective(point):
    time.sleep(float(os.environ.get("NAP", "0")))
    return (point["x"] - 0.25) ** 2 + point["n"]
"""


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "problem.py"
    path.write_text(PROBLEM, encoding="utf-8")
    return path


def test_the_command_line_optimises_and_goes_on(problem, tmp_path, capsys):
    argv = ["optimize", str(problem), "--trials", "4", "--startup", "99", "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "4 complete" in said
    assert "best  " in said
    assert f"sqlite:///{tmp_path}/problem.db" in said
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000
    assert len((tmp_path / "out" / "trials.csv").read_text().splitlines()) == 5
    assert cli.main([*argv[:3], "6", *argv[4:]]) == 0
    assert "6 complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "argv", "says"),
    [
        (None, [], "must be a Python file"),
        ("space = {'x': (0.0, 1.0)}", [], "must define objective"),
        ("def objective(point): ...", [], "must define space"),
        ("1 / 0", [], "ZeroDivisionError"),
        ("objective = 3\nspace = {'x': (0.0, 1.0)}", [], "must be a function"),
        ("def objective(p): ...\nspace = {'x': (1.0, 0.0)}", [], "low must be below high"),
        (PROBLEM, ["--engine", "oracle"], "engines are"),
        (PROBLEM, ["--trials", "0"], "num_trials"),
        (PROBLEM, ["--storage", "nowhere"], "database URL"),
    ],
)
def test_wrong_requests_say_what_to_change_and_exit_with_2(text, argv, says, tmp_path, capsys):
    path = tmp_path / f"problem_{abs(hash((text, *argv)))}.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert cli.main(["optimize", str(path), "--quiet", *argv]) == 2
    assert says in capsys.readouterr().err


@pytest.fixture
def command(problem):
    """The command line in a process group of its own, which ends with the test."""
    started = []

    def start(*argv, nap="0.2"):
        root = str(Path(bdl.__file__).parents[1])
        environment = {**os.environ, "NAP": nap, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        words = [sys.executable, "-m", "bayesdl", "optimize", str(problem), "--startup", "99", "--quiet", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for run in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@pytest.mark.slow
def test_workers_share_the_trials_and_a_killed_one_is_replaced(command, tmp_path):
    """Two workers, of which one is killed: sixteen trials all the same, and no evaluation under way is lost."""
    run = command("--trials", "16", "--workers", "2")
    study = _wait_for_trials(tmp_path, 3)
    victims = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(victims[-1]), signal.SIGKILL)
    said, complained = run.communicate(timeout=1200)
    assert run.returncode == 0, complained
    assert "16 complete" in said
    assert sum(t.state == "complete" for t in study.trials) == 16


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_ctrl_c_stops_and_the_same_command_goes_on(command, tmp_path, num_workers):
    run = command("--trials", "8", "--workers", num_workers, nap="0.5")
    study = _wait_for_trials(tmp_path, 2)
    os.killpg(run.pid, signal.SIGINT)
    _, complained = run.communicate(timeout=1200)
    assert run.returncode == 130, complained
    assert "the same command goes on" in complained
    assert not any(t.state == "running" for t in study.trials)
    run = command("--trials", "8", "--workers", num_workers, nap="0")
    said, complained = run.communicate(timeout=1200)
    assert run.returncode == 0, complained
    assert "8 complete" in said


def _wait_for_trials(folder, count):
    space = {"x": (-1.0, 1.0), "n": range(1, 4)}
    until = time.monotonic() + 1200
    while time.monotonic() < until:
        if (folder / "problem.db").exists():
            study = Study(space, storage=folder / "problem.db", study_name="problem", cache=None, **SOBOL)
            if sum(t.state == "complete" for t in study.trials) >= count:
                return study
        time.sleep(0.3)
    pytest.fail("the workers do nothing")


def test_a_trial_is_plain():
    trial = Trial(3, {"x": 0.5}, 0.5, "complete", (1.5,), {"c": -1.0})
    assert (trial.value, trial.feasible) == (1.5, True)
    assert not Trial(3, {}, None, "complete", (1.5,), {"c": 1.0}).feasible
    assert math.isnan(Trial(0, {}, None).value)
