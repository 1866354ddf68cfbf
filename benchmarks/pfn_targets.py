"""How much of a training gradient's noise `Schedule(targets="expected")` removes, at the weights of `gp` as it ships.

The gradient of one step is random through its tasks and through the targets of their queries. `drawn` and `expected`
are its variances over the same 48 batches of 16 tasks, summed over all weights, with one target a query and with its
law given context and latents. CPU milliseconds of a step's loss and gradient stand beside them, the draws of the tasks
included.

    python benchmarks/pfn_targets.py
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from machine import describe
from torch import Tensor

from bayesdl.amortized import Network, Pretrained, Schedule, _batches
from bayesdl.amortized.checkpoint import WEIGHTS
from bayesdl.amortized.heads import loss

sys.path.insert(0, str(Path(__file__).parent / "recipes"))
import gp

RESULTS = Path(__file__).parent / "results" / "pfn_targets.csv"
SIZES, BATCHES = (1, 5, 20, 50, 100), 48


def gradient(network: Network, schedule: Schedule, step: int) -> Tensor:
    """Of the loss of one batch, all weights in a row."""
    batch = _batches.draw(gp.prior, gp.architecture, schedule, 0, step, 0, 0, torch.device("cpu"))
    raw = network(batch.x, batch.y, batch.xs, batch.conditions)
    lost = loss(gp.architecture, raw, None, batch.targets)
    parts = torch.autograd.grad(lost, list(network.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def main() -> None:
    """A row for each context size."""
    torch.set_num_threads(1)
    network = Pretrained.load(WEIGHTS / "gp.safetensors").network
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    rows = []
    for n in SIZES:
        row = {"n": n}
        for targets in ("drawn", "expected"):
            schedule = replace(gp.schedule, targets=targets, n_min=n, n_max=n, appended_share=0.0)
            began = time.process_time()
            found = torch.stack([gradient(network, schedule, step) for step in range(BATCHES)])
            row[f"{targets}_ms"] = round(1e3 * (time.process_time() - began) / BATCHES, 1)
            row[targets] = round(float(found.var(0).sum()), 4)
        row["share_left"] = round(row["expected"] / row["drawn"], 3)
        rows.append({**row, **describe()})
        print(row, flush=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
