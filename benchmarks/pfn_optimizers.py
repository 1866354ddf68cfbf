"""Optimisers of pretraining: the prior of `gp` learned from scratch by AdamW and by Muon, on the same tasks in the same
order, by a transformer with a head of ten Gaussians.

One row a run: what it lost on the tasks of its last fifth, its gaps to the exact predictive at its end (100 tasks of
two inputs at each of four context sizes, in nats), and CPU seconds on one thread. Rows that are there are not run
again.

    python benchmarks/pfn_optimizers.py                # benchmarks/results/pfn_optimizers.csv
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import torch
from machine import describe
from pfn_mimicry import recipe
from rows import Row, complete

from bayesdl.amortized import Architecture, pretrain

RESULTS = Path(__file__).parent / "results" / "pfn_optimizers.csv"
RUNS = (
    ("adamw", 8e-4, 1000), ("muon", 2e-3, 1000), ("adamw", 8e-4, 1500), ("adamw", 8e-4, 2000), ("adamw", 1.6e-3, 1000),
    ("muon", 5e-3, 1000),
)  # fmt: skip
SIZES = (1, 5, 20, 60)
TRANSFORMER = Architecture(max_inputs=5, head="mixture", outputs=10, width=128, num_layers=4, num_conditions=1)


def trained(optimizer: str, rate: float, steps: int) -> Row:
    """One run, and how it ended."""
    made = recipe("gp")
    made.reference()
    settings = {"optimizer": optimizer, "learning_rate": rate, "num_steps": steps, "num_evaluations": 5}
    schedule = dataclasses.replace(made.schedule, decay_share=0.4, appended_share=0.5, **settings)
    began = time.process_time()
    network = pretrain(made.prior, TRANSFORMER, schedule, seed=3, progress=False)
    seconds = time.process_time() - began
    gaps = made.evaluate(network)
    row = {"optimizer": optimizer, "learning_rate": f"{rate:g}", "steps": str(steps)}
    row |= {"loss": f"{network.card['log'][-1]['loss']:.4f}"}
    row |= {f"gap_{n}": f"{gaps[f'gap_{n}']:.4f}" for n in SIZES}
    return {**row, "cpu_seconds": f"{seconds:.1f}", **describe()}


def main() -> None:
    """All runs that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {run: functools.partial(trained, *run) for run in RUNS}
    complete(args.out, lambda row: (row["optimizer"], float(row["learning_rate"]), int(row["steps"])), runs)


if __name__ == "__main__":
    main()
