"""What it is worth to integrate a network's output layer out of the chains: HMC and MAMS with it and without.

Eight chains in float32 with equal warm-up and draws, and for HMC equal numbers of gradients; `collapse=True` is all
that differs. Effective draws are the least over function values at 32 training inputs, as the engines report them, so
that chains which disagree count for few. Seconds are of the whole fit, on one thread, warm-up and the draws of output
layers included.

    BAYESDL_DATA=... python benchmarks/collapsed_networks.py [--problems sine concrete kin8nm:1000] [--seeds 0 1]
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from bnn_posteriors import split_of
from machine import describe
from torch import Tensor

import bayesdl as bdl
from bayesdl.evaluation import rmse

RESULTS = Path(__file__).parent / "results" / "collapsed_networks.csv"
CHAINS = 8
# hidden widths, longest HMC trajectory, transitions of warm-up, draws
PROBLEMS: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "sine": ((50,), 32, 300, 300),
    "concrete": ((50, 50), 100, 150, 250),
    "kin8nm:1000": ((50, 50), 100, 150, 250),
}


def data(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inputs and targets to fit, and to test."""
    if name != "sine":
        return split_of(name)
    g = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(240, 1, generator=g) - 2
    y = torch.sin(3 * x[:, 0]) + 0.2 * torch.randn(240, generator=g)
    return (x[:40], y[:40]), (x[40:], y[40:])


def engine(method: str, name: str, *, collapse: bool) -> Any:
    """HMC or MAMS of the problem's length."""
    hidden, num_steps, num_warmup, num_draws = PROBLEMS[name]
    common = {"num_chains": CHAINS, "num_warmup": num_warmup, "num_draws": num_draws, "collapse": collapse}
    model = bdl.BNN(hidden, "tanh")
    if method == "HMC":
        return bdl.HMC(model, num_steps=num_steps, target_accept=0.7, **common)
    return bdl.MAMS(model, max_steps=num_steps // 2, **common)  # a step of MAMS is two gradients


def row(name: str, method: str, seed: int, *, collapse: bool) -> dict[str, Any]:
    """One fit."""
    train, (x, y) = data(name)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = engine(method, name, collapse=collapse).fit(*train, seed=seed)
    seconds = time.process_time() - began
    found, predictive = posterior.diagnostics, posterior.predict(x)
    return {
        "problem": name,
        "n_train": len(train[1]),
        "method": method,
        "collapse": collapse,
        "seed": seed,
        "step_size": f"{found['step_size']:.4f}",
        "num_gradients": found["num_gradients"],
        "seconds": f"{seconds:.1f}",
        "rhat": f"{found['rhat']:.4f}",
        "ess_bulk": f"{found['ess_bulk']:.1f}",
        "ess_per_second": f"{found['ess_bulk'] / seconds:.3f}",
        "divergences": found["divergences"],
        "rmse": f"{float(rmse(predictive, y)):.4f}",
        "nlpd": f"{-float(predictive.log_prob(y).mean()):.4f}",
        **describe(),
    }


def main() -> None:
    """All cells that are asked for, into one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=["HMC", "MAMS"], choices=["HMC", "MAMS"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.problems:
        for method in args.methods:
            for seed in args.seeds:
                for collapse in (False, True):
                    rows.append(row(name, method, seed, collapse=collapse))
                    print({key: rows[-1][key] for key in list(rows[-1])[:14]}, flush=True)
                    with args.out.open("w", newline="", encoding="utf-8") as file:
                        writer = csv.DictWriter(file, list(rows[0]))
                        writer.writeheader()
                        writer.writerows(rows)


if __name__ == "__main__":
    main()
