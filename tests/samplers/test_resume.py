"""Runs that are killed by SIGKILL at random moments and resumed: the same draws, and nothing computed twice.

What counts as computed twice: every transition leaves a mark in a file, in the life in which it was made. A life starts
from the checkpoint that the one before it left, so that the marks of the last life and the transitions in that
checkpoint must add up to the length of the run; a life that began earlier, or later, would give another sum.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesdl import _storage
from bayesdl.samplers import _checkpoint, chees, cyclical, hmc, mams, mclmc, meads, nuts, sghmc, sgld, smc
from bayesdl.samplers._checkpoint import unpack
from bayesdl.samplers._reference import GaussianReference

MINIBATCH: dict[str, Any] = {"num_data": 40, "batch_size": 9, "step_size": 0.02}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "hmc": (hmc, {"num_steps": 5, "metric": "dense"}),
    "nuts": (nuts, {"max_depth": 4}),
    "chees": (chees, {"max_steps": 20}),
    "mams": (mams, {"max_steps": 20}),
    "mclmc": (mclmc, {}),
    "meads": (meads, {}),
    "sghmc": (sghmc, MINIBATCH),
    "sgld": (sgld, MINIBATCH),
    "cyclical": (cyclical, {**MINIBATCH, "num_cycles": 4}),
}
# Many small stages; their number follows from the run.
SMC: dict[str, Any] = {
    "num_particles": 16,
    "num_islands": 3,
    "ess_target": 0.95,
    "max_correlation": 0.02,
    "max_steps": 8,
}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banana(q, rows=None):
    """A bent ridge; with rows, estimates of it that are unbiased."""
    y = torch.linspace(-1, 1, 40, dtype=torch.float64)
    shift = 0.0 if rows is None else (40 * y[rows].mean(-1) * q[..., 0])
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.5 - 0.5 * q[..., 2] ** 2 + 0.05 * shift


def run_of(name, length, **more):
    """A run of a few chains: `length` transitions of warm-up and as many of sampling, or all of SMC's."""
    if name == "smc":
        origin = torch.zeros(3, dtype=torch.float64)
        return smc.run(banana, GaussianReference(origin, 10.0 + origin), seed=7, **SMC, **more).run
    module, settings = RUNS[name]
    if name == "cyclical":
        draws = {"cycle_length": length // 4, "draws_per_cycle": length // 20}
    else:
        draws = {"num_draws": length // 2, "thin": 2}
    settings = {"num_warmup": length, **settings, **draws, **more}
    return module.run(banana, numbers(16 if name == "meads" else 3, 3, seed=1), seed=7, **settings)


def live(name: str, length: int, folder: str, marks: str) -> None:
    """One life of a run: it writes as often as it can, and every transition leaves one byte in `marks`."""
    torch.set_num_threads(1)
    _checkpoint.SECONDS, _checkpoint._SHARE = 0.0, 0.5
    file = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    due = _checkpoint.Checkpoint.due

    def marked(self: Any) -> bool:
        os.write(file, b".")
        return due(self)

    _checkpoint.Checkpoint.due = marked
    run_of(name, length, checkpoint=folder)


def transitions_in(folder: Path) -> int:
    """How many transitions the checkpoint in a folder holds."""
    state = folder / "state.safetensors"
    if not state.exists():
        return 0
    record, tensors = _storage.read(state)
    tree = unpack(record["spec"], tensors, "cpu")
    if not isinstance(tree, dict):
        return len(tree.trace.began)
    place = tree["place"]
    return place.num_steps if hasattr(place, "num_steps") else place.num_warm + place.num_moves


def all_transitions(name: str, length: int, tmp_path: Path) -> int:
    """How many transitions a run has that nobody kills."""
    if name == "smc":
        run_of(name, length, checkpoint=tmp_path / "unbroken")
        return transitions_in(tmp_path / "unbroken")
    return 2 * length


def kill_and_resume(name: str, length: int, kills: int, tmp_path: Path, seed: int) -> Any:
    """Kill a run so many times, at random moments after the first transition of a life; returns what came out."""
    total = all_transitions(name, length, tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bayesdl.samplers.nuts", "safetensors.torch", "tests.samplers.test_resume"])
    chance = random.Random(seed)
    folder, held, done = tmp_path / "run", 0, 0
    for life in range(kills + 1):
        marks = tmp_path / f"marks-{life}"
        process = context.Process(target=live, args=(name, length, str(folder), str(marks)))
        process.start()
        if life < kills:
            while process.is_alive() and not (marks.exists() and marks.stat().st_size):
                time.sleep(0.001)
            # so that on average the kills spread over the run
            stop = chance.uniform(0, 2 * (total - held) / (kills + 1 - life))
            while process.is_alive() and marks.stat().st_size < stop:
                time.sleep(0.0005)
            process.kill()
        process.join()
        assert process.exitcode == (-9 if life < kills else 0)
        made = marks.stat().st_size
        now = transitions_in(folder)
        assert held <= now <= held + made
        held, done = (now, done) if life < kills else (held, held + made)
    assert done == total
    return run_of(name, length, checkpoint=folder)


def check_same(found: Any, wanted: Any) -> None:
    """Every figure of two runs, bit for bit; times apart."""
    assert found._fields == wanted._fields
    for field in set(wanted._fields) - {"seconds", "warmup_seconds"}:
        a, b = getattr(found, field), getattr(wanted, field)
        if isinstance(b, dict):
            assert set(a) == set(b)
            assert all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in b)
        else:
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field


@pytest.mark.parametrize("name", ["hmc", "nuts", "chees", "sghmc"])
def test_a_run_killed_three_times_gives_the_same_draws_and_repeats_nothing(name, tmp_path):
    check_same(kill_and_resume(name, 60, 3, tmp_path, seed=1), run_of(name, 60))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RUNS, "smc"])
def test_a_run_killed_twenty_times_gives_the_same_draws_and_repeats_nothing(name, tmp_path):
    check_same(kill_and_resume(name, 200, 20, tmp_path, seed=2), run_of(name, 200))
