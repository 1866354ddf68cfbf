"""Bayesian optimisation on Branin and Hartmann6: `bdl.bo` beside BoTorch's plain loop, Optuna's samplers and chance.

    python benchmarks/bo_synthetic.py [--seeds 10] [--problems branin hartmann6] [--methods gp botorch tpe random]

Every method has 2 p + 2 quasi-random trials and the same budget. `gp` is `bdl.bo.Study` with its defaults: an exact GP
and qLogNEI with 4 searches from 64 points. `botorch` is a loop of SingleTaskGP and qLogNEI by BoTorch's own parts with
the same first points and the same acquisition settings. `gpsampler` and `tpe` are Optuna's, with starting points of
their own. One row a problem, method and seed: the best value after each trial (both functions are minimised; minima
0.397887 and -3.32237), and CPU seconds of a proposal, by process time of one thread, without the first, which pays for
imports. Rows that are there are not computed again.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from botorch.acquisition import qLogNoisyExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.test_functions import Branin, Hartmann
from botorch.utils.sampling import manual_seed
from gpytorch.mlls import ExactMarginalLogLikelihood
from machine import describe
from torch import Tensor

import bayesdl as bdl

RESULTS = Path(__file__).parent / "results" / "bo_synthetic.csv"
COLUMNS = ("problem", "method", "seed", "best", "trace", "cpu_seconds_per_proposal", "on_bounds", *describe())
PROBLEMS = {"branin": (Branin(), 30), "hartmann6": (Hartmann(dim=6), 40)}
Trace = tuple[list[float], list[float], list[Tensor]]  # values, CPU seconds of proposals, points in the unit cube


def study(problem: Any, budget: int, seed: int) -> Trace:
    """`bdl.bo.Study`."""
    opened = bdl.bo.Study(problem.bounds.to(torch.float64), seed=seed)
    values, seconds, points = [], [], []
    for _ in range(budget):
        began = time.process_time()
        trial = opened.ask()
        seconds.append(time.process_time() - began)
        values.append(float(problem(trial.x)))
        points.append(unit(problem, trial.x))
        opened.tell(trial, values[-1])
    return values, seconds, points


def loop(problem: Any, budget: int, seed: int) -> Trace:
    """BoTorch's parts, from the first points of `study`."""
    bounds = problem.bounds.to(torch.float64)
    start = 2 * bounds.shape[1] + 2
    opened = bdl.bo.Study(bounds, seed=seed)
    x = torch.stack([unit(problem, opened.ask().x) for _ in range(start)])
    values = [float(problem(scaled(problem, point))) for point in x]
    seconds = [0.0] * start
    cube = torch.stack([torch.zeros_like(bounds[0]), torch.ones_like(bounds[0])])
    while len(values) < budget:
        began = time.process_time()
        with manual_seed(seed * 1000 + len(values)):
            model = SingleTaskGP(x, -torch.tensor(values, dtype=torch.float64).unsqueeze(-1))
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            acquisition = qLogNoisyExpectedImprovement(model, X_baseline=x, prune_baseline=True)
            settings = {"num_restarts": 4, "raw_samples": 64, "options": {"maxiter": 200}}
            point = optimize_acqf(acquisition, cube, q=1, **settings)[0][0]
        seconds.append(time.process_time() - began)
        x = torch.cat([x, point.unsqueeze(0)])
        values.append(float(problem(scaled(problem, point))))
    return values, seconds, list(x)


def optunas(make: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[[Any, int, int], Trace]:
    """A loop of one of Optuna's samplers."""

    def run(problem: Any, budget: int, seed: int) -> Trace:
        bounds = problem.bounds.T.tolist()
        opened = optuna.create_study(sampler=make(seed))
        values, seconds, points = [], [], []
        for _ in range(budget):
            began = time.process_time()
            trial = opened.ask()
            x = torch.tensor([trial.suggest_float(f"x{i}", *pair) for i, pair in enumerate(bounds)]).double()
            seconds.append(time.process_time() - began)
            values.append(float(problem(x)))
            points.append(unit(problem, x))
            opened.tell(trial, values[-1])
        return values, seconds, points

    return run


METHODS: dict[str, Callable[[Any, int, int], Trace]] = {
    "gp": study,
    "botorch": loop,
    "gpsampler": optunas(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "tpe": optunas(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "random": optunas(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
}


def unit(problem: Any, x: Tensor) -> Tensor:
    """A point as one of the unit cube."""
    low, high = problem.bounds.to(torch.float64)
    return (x - low) / (high - low)


def scaled(problem: Any, u: Tensor) -> Tensor:
    """A point of the unit cube as one of the problem."""
    low, high = problem.bounds.to(torch.float64)
    return low + u * (high - low)


def row(name: str, method: str, seed: int) -> dict[str, Any]:
    """One run."""
    problem, budget = PROBLEMS[name]
    values, seconds, points = METHODS[method](problem, budget, seed)
    best = torch.tensor(values).cummin(0).values.tolist()
    start = 2 * problem.bounds.shape[1] + 2
    proposed = torch.stack(points[start:])
    return {
        "problem": name,
        "method": method,
        "seed": seed,
        "best": f"{best[-1]:.6f}",
        "trace": json.dumps([round(value, 5) for value in best]),
        "cpu_seconds_per_proposal": f"{statistics.median(seconds[start + 1 :]):.4f}",
        "on_bounds": f"{float(((proposed < 1e-6) | (proposed > 1 - 1e-6)).double().mean()):.3f}",
        **describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    there: set[tuple[str, str, str]] = set()
    if args.out.exists():
        with args.out.open(encoding="utf-8", newline="") as file:
            there = {(r["problem"], r["method"], r["seed"]) for r in csv.DictReader(file)}
    for seed in range(args.seeds):
        for name in args.problems:
            for method in args.methods:
                if (name, method, str(seed)) in there:
                    continue
                found = row(name, method, seed)
                with args.out.open("a", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(found)
                print({key: found[key] for key in COLUMNS[:4]}, found["cpu_seconds_per_proposal"], flush=True)


if __name__ == "__main__":
    main()
