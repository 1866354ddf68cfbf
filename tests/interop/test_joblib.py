"""Jobs by joblib's backends: the proposals of a study are those of one process, wherever they were computed."""

from __future__ import annotations

import os
import warnings

import joblib
import pytest
import torch

import bayesdl as bdl
from bayesdl.interop import _joblib
from bayesdl.interop._joblib import num_workers, restarts, run_jobs

SPACE = {"a": (0.0, 1.0), "b": (-1.0, 1.0)}
MIXED = {"a": (0.0, 1.0), "c": ["left", "right"]}


class _Job:
    """Says in which process it ran, and warns where asked."""

    def __init__(self, value: int, warn: bool = False) -> None:
        self.value, self.warn = value, warn

    def __call__(self) -> tuple[int, int]:
        if self.warn:
            warnings.warn("so it is", RuntimeWarning, stacklevel=2)
        return self.value**2, os.getpid()


@pytest.fixture(autouse=True)
def _nothing_kept():
    """No fit of one test is found by the next."""
    from bayesdl.interop import _optuna_surrogate

    _optuna_surrogate._IN_MEMORY.clear()
    yield
    _optuna_surrogate._IN_MEMORY.clear()


def objective(point: dict) -> float:
    if point["a"] > 0.75:
        raise ValueError("failed")  # more than a tenth fail: a second surrogate
    where = point.get("b", 0.3 if point.get("c") == "left" else -0.2)
    return (point["a"] - 0.3) ** 2 + (where + 0.2) ** 2


def proposal(space: dict) -> dict:
    """The first point that a model proposes, after seven that it does not."""
    engine = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5)), num_starts=1)
    study = bdl.bo.Study(space, engine=engine, num_startup=7, num_samples=32, num_restarts=4, num_candidates=32, seed=3)
    for _ in range(7):
        trial = study.ask()
        try:
            study.tell(trial, objective(trial.params))
        except ValueError:
            study.tell(trial, float("nan"))
    return study.ask().params


def test_without_a_backend_everything_stays_here():
    assert num_workers() == 1
    assert restarts() == {}
    assert run_jobs([_Job(2), _Job(3)]) == [(4, os.getpid()), (9, os.getpid())]


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_results_come_in_order_with_what_they_warned_of(backend):
    with joblib.parallel_config(backend, n_jobs=2):
        assert num_workers() == 2
        with pytest.warns(RuntimeWarning, match="so it is"):
            results = run_jobs([_Job(2), _Job(3, warn=True), _Job(5)])
    assert [value for value, _ in results] == [4, 9, 25]
    assert (os.getpid() in {process for _, process in results}) == (backend == "threading")


@pytest.mark.touches_global_rng  # as every proposal: seeded for the while, and put back
@pytest.mark.parametrize("space", [SPACE, MIXED], ids=["numbers", "mixed"])
@pytest.mark.parametrize("backend", ["threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_proposals_are_those_of_one_process(backend, space, monkeypatch):
    """To 1e-5, since a search of its own and a search in a batch differ in rounding."""
    serial = proposal(space)
    from bayesdl.interop import _optuna_surrogate

    _optuna_surrogate._IN_MEMORY.clear()
    sent = []

    def counted(jobs):
        sent.append(len(jobs))
        return run_jobs(jobs)

    monkeypatch.setattr(_joblib, "run_jobs", counted)
    monkeypatch.setattr(_optuna_surrogate, "run_jobs", counted)
    with joblib.parallel_config(backend, n_jobs=2):
        spread = proposal(space)
    assert 2 in sent, "nothing was spread"
    assert spread.keys() == serial.keys()
    for name, value in serial.items():
        same = value == spread[name] if isinstance(value, str) else abs(value - spread[name]) < 1e-5
        assert same, f"{name}: {value} and {spread[name]}"


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("space", [SPACE, MIXED], ids=["numbers", "mixed"])
def test_jobs_survive_the_way_to_another_process(space, monkeypatch):
    """Fits and searches as cloudpickle sends them, run here: what "loky", "dask" and "ray" do, in one process."""
    cloudpickle = pytest.importorskip("cloudpickle")
    from bayesdl.interop import _optuna_surrogate

    serial, sizes = proposal(space), []
    _optuna_surrogate._IN_MEMORY.clear()

    def sent(jobs):
        files = [cloudpickle.dumps(job) for job in jobs]
        sizes.extend(map(len, files))
        return [cloudpickle.loads(cloudpickle.dumps(cloudpickle.loads(file)())) for file in files]

    for module in (_joblib, _optuna_surrogate):
        monkeypatch.setattr(module, "num_workers", lambda: 2)
        monkeypatch.setattr(module, "run_jobs", sent)
    spread = proposal(space)
    assert len(sizes) >= 4
    for name, value in serial.items():
        assert value == spread[name] if isinstance(value, str) else abs(value - spread[name]) < 1e-5


def test_two_surrogates_are_fitted_side_by_side(monkeypatch):
    """Values and failures; what was fitted elsewhere is what is found here."""
    from bayesdl.interop import _optuna_surrogate

    shares = []
    monkeypatch.setattr(_optuna_surrogate, "run_jobs", lambda jobs: shares.append(len(jobs)) or run_jobs(jobs))
    with joblib.parallel_config("threading", n_jobs=2):
        proposal(SPACE)
    assert shares == [2]
    assert len(_optuna_surrogate._IN_MEMORY) == 2


def test_more_workers_than_starting_points_are_no_harm():
    """One search a job, fixed columns with them; the best is the same."""
    from botorch.acquisition import LogExpectedImprovement
    from botorch.optim import optimize_acqf

    g = torch.Generator().manual_seed(0)
    x = torch.rand(8, 2, generator=g, dtype=torch.float64)
    model = bdl.ExactGP(bdl.GP(bdl.kernels.RBF()), num_starts=1).fit(x, torch.sin(5 * x.sum(-1))).to_botorch()
    acquisition = LogExpectedImprovement(model, 0.9)
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    starts = torch.rand(3, 1, 2, generator=g, dtype=torch.float64)
    settings = {"batch_initial_conditions": starts, "fixed_features": {1: 0.4}}
    alone, _ = optimize_acqf(acquisition, bounds, 1, 3, **settings)
    with joblib.parallel_config("threading", n_jobs=8):
        spread, _ = optimize_acqf(acquisition, bounds, 1, 3, **settings, **restarts())
    assert torch.allclose(alone, spread, atol=1e-5)
    assert float(spread[0, 1]) == 0.4
