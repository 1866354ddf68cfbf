"""Surrogates in Bayesian optimisation, side by side: `bdl.bo` with every engine, BoTorch, Optuna, Ax and chance.

    python benchmarks/bo_study.py run --problems hartmann6 ridge --methods gp hmc botorch tpe random --seeds 10
    python benchmarks/bo_study.py run --jobs 16 --backend loky      # or dask, ray, threading: any joblib backend
    python benchmarks/bo_study.py summary                           # tables, and pictures into docs/images

After "A Study of Bayesian Neural Network Surrogates for Bayesian Optimization" (Li, Rudner, Wilson, arXiv 2305.20028):
`bo_study_problems.py` has the problems, `bo_study_methods.py` the methods. On one problem with one seed all methods
start from the same quasi-random points with the same (noisy) values, and then propose one point after another. One row
a problem, method and seed; rows that are there are not computed again, and a run that fails is a row that says why.

- `trace`: after each trial the true value of the best point observed (that is, chosen by what was observed, noise and
  all), or the hypervolume; `best` is its last entry, and `regret` how far that is from the optimum where it is known.
- `nlpd_*`, `coverage_*`, `error_*`: of the surrogate at quasi-random points that nobody evaluates, before the first
  proposal and after the last: mean negative log density, share inside the central 90 % intervals, and root mean square
  error, in units in which the true values there have standard deviation 1; means over objectives.
- `on_bounds`: share of proposed coordinates on the edge of the box. `fallbacks`: proposals made without the surrogate.
- `cpu_proposal`, `cpu_total`: median process time of a proposal without the first, and of all, on one thread.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bo_study_problems import PROBLEMS, Instance
from machine import describe
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "bo_study.csv"
KEY = ("problem", "method", "seed", "proposals")
SCORES = ("nlpd", "coverage", "error")
COLUMNS = (
    *KEY, "startup", "best", "regret", *(f"{score}_{when}" for when in ("start", "end") for score in SCORES),
    "on_bounds", "fallbacks", "cpu_proposal", "cpu_total", "failure", "trace", *describe(),
)  # fmt: skip
Cell = tuple[str, str, int, int]


def quasi_random(problem: Instance, num: int, seed: int) -> list[dict[str, Any]]:
    """Points of a scrambled Sobol sequence, in the space's own units."""
    from bayesdl.interop.optuna import Encoding

    encoding = Encoding(problem.space.distributions())
    engine = torch.quasirandom.SobolEngine(len(encoding.names), scramble=True, seed=seed)
    return [encoding.decode(z) for z in encoding.from_unit(engine.draw(num, dtype=torch.float64))]


def progress(problem: Instance, seen: Tensor, true: Tensor, limits: Tensor) -> list[float]:
    """What had been reached after each trial: see `trace` above."""
    feasible = (limits <= 0).all(-1)
    if problem.num_objectives > 1:
        return _hypervolumes(problem, torch.where(feasible.unsqueeze(-1), true, torch.inf))
    judged = torch.where(feasible, seen[:, 0], torch.inf)
    best = [int(judged[: i + 1].argmin()) for i in range(len(judged))]
    return [float(true[i, 0]) if bool(feasible[i]) else math.inf for i in best]


def _hypervolumes(problem: Instance, values: Tensor) -> list[float]:
    from botorch.utils.multi_objective.box_decompositions import DominatedPartitioning

    reference = -torch.tensor(problem.reference_point, dtype=torch.float64)
    found = []
    for i in range(1, len(values) + 1):
        good = -values[:i][torch.isfinite(values[:i]).all(-1)]
        good = good[(good > reference).all(-1)]
        volume = DominatedPartitioning(reference, Y=good).compute_hypervolume() if len(good) else 0.0
        found.append(float(volume))
    return found


def judged(method: Any, problem: Instance, points: Sequence[dict[str, Any]], true: Tensor, when: str) -> dict[str, str]:
    """The surrogate's scores at points that nobody evaluates; empty where there is no surrogate."""
    laws = method.predict(points)
    scores: dict[str, list[float]] = {score: [] for score in SCORES}
    for law, y in zip(laws, true.unbind(-1), strict=False):
        unit = float(y.std())
        inside = (law.quantile(0.05) <= y) & (y <= law.quantile(0.95))
        scores["nlpd"].append(-float(law.log_prob(y).mean()) - math.log(unit))
        scores["coverage"].append(float(inside.double().mean()))
        scores["error"].append(float((law.mean - y).square().mean().sqrt()) / unit)
    return {f"{score}_{when}": f"{statistics.fmean(found):.4f}" for score, found in scores.items() if found}


def run(cell: Cell) -> dict[str, Any] | None:
    """The row of one problem, method and seed; None where the method cannot do the problem."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    name, label, seed, proposals = cell
    row = {**dict(zip(KEY, cell, strict=True)), **describe()}
    try:
        found = _searched(PROBLEMS[name](seed), label, seed, proposals)
    except Exception as error:  # a method that fails is a result too
        message = str(error).splitlines()[0] if str(error) else ""
        return row | {"failure": f"{type(error).__name__}: {message}"[:200]}
    return None if found is None else row | found


def _searched(problem: Instance, label: str, seed: int, proposals: int) -> dict[str, Any] | None:
    from bo_study_methods import make

    method = make(label, problem, seed)
    if method is None:
        return None
    points = quasi_random(problem, problem.startup, seed)
    true, limits = problem.evaluate(points)
    noise = torch.Generator().manual_seed(seed)
    seen = true if problem.noise is None else problem.noise(true, noise)
    for point, values, bounds in zip(points, seen.tolist(), limits.tolist(), strict=True):
        method.tell(point, values, bounds)
    held_out = quasi_random(problem, problem.held_out, 10_000 + seed)
    unseen = problem.evaluate(held_out)[0]
    scores = judged(method, problem, held_out, unseen, "start")
    seconds = []
    for _ in range(proposals):
        began = time.process_time()
        point = method.ask()
        seconds.append(time.process_time() - began)
        value, limit = problem.evaluate([point])
        told = value if problem.noise is None else problem.noise(value, noise)
        method.tell(point, told[0].tolist(), limit[0].tolist())
        points.append(dict(point))
        true, seen, limits = torch.cat([true, value]), torch.cat([seen, told]), torch.cat([limits, limit])
    scores |= judged(method, problem, held_out, unseen, "end")
    trace = progress(problem, seen, true, limits)
    optimum = problem.most if problem.num_objectives > 1 else problem.best
    regret = abs(trace[-1] - optimum)
    return {
        **scores, "startup": problem.startup, "best": f"{trace[-1]:.6g}",
        "regret": "" if math.isnan(regret) else f"{regret:.6g}", "on_bounds": _on_bounds(problem, points),
        "fallbacks": method.fallbacks(), "cpu_proposal": f"{statistics.median(seconds[1:] or seconds):.4f}",
        "cpu_total": f"{sum(seconds):.2f}", "trace": json.dumps([float(f"{v:.6g}") for v in trace]),
    }  # fmt: skip


def _on_bounds(problem: Instance, points: Sequence[dict[str, Any]]) -> str:
    """Share of the proposed real numbers that lie on an edge of their range."""
    from bayesdl.interop.optuna import Encoding

    encoding = Encoding(problem.space.distributions())
    z = encoding.encode(points[problem.startup :])
    real = [i for i in range(z.shape[-1]) if i not in encoding.grids and i not in encoding.categories]
    if not real or not len(z):
        return ""
    return f"{float(((z[:, real] < 1e-6) | (z[:, real] > 1 - 1e-6)).double().mean()):.3f}"


def cells(args: argparse.Namespace) -> list[Cell]:
    """What is to be run, seed by seed, so that a study that is stopped early is balanced."""
    found = []
    for seed, name, label in product(range(args.first, args.first + args.seeds), args.problems, args.methods):
        proposals = args.proposals or PROBLEMS[name](seed).proposals
        found.append((name, label, seed, proposals))
    return found


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows."""
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def search(args: argparse.Namespace) -> None:
    """Run what is missing, `--jobs` cells at a time, and write each piece as it is done."""
    from joblib import Parallel, delayed, parallel_config

    if args.backend == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    there = {tuple(row[key] for key in KEY) for row in read(args.out)}
    missing = [cell for cell in cells(args) if tuple(map(str, cell)) not in there]
    print(f"{len(missing)} runs to do, {len(there)} are there", flush=True)
    piece = 1 if args.jobs == 1 else 4 * args.jobs
    until = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    for at in range(0, len(missing), piece):
        if time.monotonic() > until:
            break
        with parallel_config(backend=args.backend, n_jobs=args.jobs):
            rows = Parallel()(delayed(run)(cell) for cell in missing[at : at + piece])
        done = [row for row in rows if row is not None]
        write(args.out, done)
        for row in done:
            shown = [row.get(key, "") for key in (*KEY, "best", "regret", "on_bounds", "cpu_proposal", "failure")]
            print(*shown, flush=True)


def main() -> None:
    from bo_study_methods import METHODS
    from bo_study_summary import markdown, summarise

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    runs = verbs.add_parser("run", help="run what is missing")
    runs.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    runs.add_argument("--methods", nargs="*", default=[m for m in METHODS if m != "ax"], choices=METHODS)
    runs.add_argument("--seeds", type=int, default=10)
    runs.add_argument("--first", type=int, default=0, help="the first seed")
    runs.add_argument(
        "--proposals", type=int, help="points after the first ones, in place of each problem's own number"
    )
    runs.add_argument("--jobs", type=int, default=1)
    runs.add_argument("--backend", default="loky", help="of joblib: loky, threading, dask, ray")
    runs.add_argument("--minutes", type=float, help="begin no run after this time")
    runs.set_defaults(work=search)
    shows = verbs.add_parser("summary", help="tables and pictures")
    shows.add_argument("--images", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    shows.set_defaults(work=lambda args: summarise(read(args.out), args.images))
    tables = verbs.add_parser("table", help="problems with enough seeds, as Markdown")
    tables.add_argument("--least", type=int, default=10, help="seeds that a problem must have")
    tables.set_defaults(work=lambda args: print(markdown(read(args.out), args.least)))
    for verb in (runs, shows, tables):
        verb.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
