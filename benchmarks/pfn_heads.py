"""Heads of a network: the prior of `gp` learned from scratch with one head after another, on the same tasks.

"mixture" is a transformer alone, of four layers of width 128, whose queries are tokens; "kernel" the one that ships,
with 0, 1 and 2 refinements. One row a run: steps, weights, CPU seconds on one thread, and the gaps to the exact
predictive at its end (100 tasks of two inputs at each of four context sizes, in nats). Rows that are there are not run
again.

    python benchmarks/pfn_heads.py                # benchmarks/results/pfn_heads.csv
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
from pfn_optimizers import TRANSFORMER
from rows import Row, complete

from bayesdl.amortized import Architecture, pretrain

RESULTS = Path(__file__).parent / "results" / "pfn_heads.csv"
SIZES, STEPS = (1, 5, 20, 60), 1000


def heads() -> dict[str, tuple[Architecture, float]]:
    """Architectures by name, and the learning rate of each."""
    ours = recipe("gp").architecture
    refined = {f"kernel, {r} refinements": (dataclasses.replace(ours, refinements=r), 2e-3) for r in (0, 1, 2)}
    return {"mixture": (TRANSFORMER, 8e-4), **refined}


def trained(name: str, architecture: Architecture, rate: float) -> Row:
    """One run, and how it ended."""
    made = recipe("gp")
    made.reference()
    schedule = dataclasses.replace(made.schedule, num_steps=STEPS, learning_rate=rate, num_evaluations=5)
    began = time.process_time()
    network = pretrain(made.prior, architecture, schedule, seed=3, progress=False)
    seconds = time.process_time() - began
    gaps = made.evaluate(network)
    weights = sum(parameter.numel() for parameter in network.network.parameters())
    row = {"head": name, "learning_rate": f"{rate:g}", "steps": str(STEPS), "weights": str(weights)}
    row |= {f"gap_{n}": f"{gaps[f'gap_{n}']:.4f}" for n in SIZES}
    return {**row, "cpu_seconds": f"{seconds:.1f}", **describe()}


def main() -> None:
    """All runs that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {name: functools.partial(trained, name, *how) for name, how in heads().items()}
    complete(args.out, lambda row: row["head"], runs)


if __name__ == "__main__":
    main()
