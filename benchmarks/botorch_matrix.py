"""Every posterior under every acquisition class of BoTorch, and ours: what works, what is refused and why, how long.

A row is a posterior, a view and an acquisition: the outcome (values at three t-batches finite, a slope compared with
finite differences, one step of `optimize_acqf`), the reason of a refusal, the error of the slope relative to its size,
and CPU milliseconds for a value and its gradient. The cases are those of the tests (`tests/acquisitions.py`).

    PYTHONPATH=. python benchmarks/botorch_matrix.py [--kinds HMC NNGP] [--summary]

Rows of kinds that are in the table are not computed again.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1]))
from bayesdl.interop.botorch import fuse
from tests import acquisitions

RESULTS = Path(__file__).parent / "results" / "botorch_matrix.csv"
FUSED = "ExactGP + Ensemble, fused"


def read() -> list[dict[str, str]]:
    """The rows so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def models_of(kind: str, outputs: int, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    """Views by name."""
    if kind != FUSED:
        return acquisitions.posterior_models(kind, x, y)
    engines = acquisitions.engines(False)
    parts = [engines[name].fit(x, y[:, i], seed=0) for i, name in enumerate(("ExactGP Matern", "Ensemble")[:outputs])]
    return {f"{view} fused": fuse(parts, view, num_samples=32) for view in ("gaussian", "samples")}


def milliseconds(name: str, problem: acquisitions.Problem) -> float:
    """CPU time of a value and its gradient at three t-batches, the least of three."""
    case = acquisitions.CASES[name]
    acquisition, best = case.build(problem), float("inf")
    for _ in range(3):
        x = torch.full((3, case.q + case.augmented, case.columns), 0.3, dtype=torch.float64)
        x = (x + 0.1 * torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) / x.numel()).requires_grad_()
        began = time.process_time()
        value = acquisition(x)
        if value.requires_grad:
            torch.autograd.grad(value.sum(), x)
        best = min(best, time.process_time() - began)
    return 1e3 * best


def rows_of(kind: str) -> list[dict[str, Any]]:
    """All acquisitions on all views of one posterior."""
    rows = []
    for outputs in (1, 2):
        if kind == FUSED and outputs == 1:
            continue
        x, y = acquisitions.data(outputs)
        for view, model in models_of(kind, outputs, x, y).items():
            problem = acquisitions.Problem(model, x, y)
            for name, case in acquisitions.CASES.items():
                if case.outputs != outputs:
                    continue
                outcome = acquisitions.try_out(name, problem, view)
                told = outcome.detail or acquisitions.INEXACT_SLOPES.get(name, "")
                rows.append(
                    {
                        "posterior": kind,
                        "view": view.split()[0],
                        "acquisition": name,
                        "outcome": outcome.status,
                        "conditioning": model.conditioning,
                        "detail": " ".join(told.split()),
                        "slope_error": f"{outcome.gradient_error:.1e}",
                        "milliseconds": f"{milliseconds(name, problem):.2f}" if outcome.status == "ok" else "",
                    }
                )
    return rows


def main() -> None:
    """Compute what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [*acquisitions.engines(False), FUSED]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    machine = describe()
    for kind in [] if arguments.summary else arguments.kinds:
        if any(row["posterior"] == kind for row in read()):
            continue
        rows = [row | machine for row in rows_of(kind)]
        fresh = not RESULTS.exists()
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
        print(kind, dict(Counter(row["outcome"] for row in rows)), flush=True)
    total = Counter((row["posterior"], row["view"], row["outcome"]) for row in read())
    for (kind, view, outcome), count in sorted(total.items()):
        print(f"{kind:32s} {view:10s} {outcome:12s} {count}")


if __name__ == "__main__":
    main()
