"""How near the network `gp` comes to the exact Bayesian answer: paired log scores on fresh tasks of its own prior.

    python benchmarks/pfn_mimicry.py reference [--scratch DIR]     # NUTS over the hyper-parameters; resumes
    python benchmarks/pfn_mimicry.py score [--network gp]          # the network on the same tasks: CSV and picture

For each context size n there are 1000 tasks, 200 of each of 1 to 5 inputs, with 5 queries each. The reference is the
Gaussian process of the prior with its hyper-parameters integrated out by NUTS (one chain a task, 100 transitions of
warm-up and 100 draws, started from the prior), all tasks of one size side by side. A reference that is not quite exact
loses a little log score and so makes the network look better by that much: `reference_loss` estimates it, as the
gap between mixtures of 50 and of all 100 draws, which halves as draws double. The gap is the mean over tasks of
(log score of the reference - log score of the network), with the 95 % interval over tasks.

Calibration is of the network alone: the share of queries below its own quantiles, over all tasks of one n.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import importlib.util
import itertools
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import describe
from safetensors.torch import load_file, save_file
from torch import Tensor

import bayesdl as bdl

RESULTS = Path(__file__).parent / "results" / "pfn_mimicry.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "pfn_mimicry.png"
SIZES = (1, 3, 5, 10, 20, 50, 100)
DIMENSIONS = (1, 2, 3, 4, 5)
TASKS, QUERIES, PIECE = 200, 5, 50
NUM_WARMUP = NUM_DRAWS = 100


def recipe(name: str) -> Any:
    """The module of a recipe: prior, architecture, schedule."""
    path = Path(__file__).parent / "recipes" / f"{name.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks(n: int, d: int, piece: int) -> tuple[Tensor, Tensor]:
    """PIECE tasks of n context points and QUERIES queries: x (PIECE, n + QUERIES, d), y, the same at every call."""
    generator = torch.Generator().manual_seed(1_000_000 + 10_000 * n + 100 * d + piece)
    found = recipe("gp").prior.sample(PIECE, n + QUERIES, d, generator)
    return found.x.double(), found.y.double()


def reference_piece(n: int, d: int, piece: int) -> dict[str, Tensor]:
    """Log scores of the exact answer (PIECE, QUERIES); in the first piece also of a mixture of half as many draws."""
    prior = recipe("gp").prior
    (kernel,) = prior.kernels_for(d)
    likelihood = bdl.Gaussian(prior=prior.noise_variance, lower=0.0)
    model = bdl.GP(kernel, mean="zero", likelihood=likelihood)
    x, y = tasks(n, d, piece)
    scores, began = {}, time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hundred draws a task are few by any convention
        for name, num in (("all", NUM_DRAWS), ("half", NUM_DRAWS // 2))[: 2 if piece == 0 else 1]:
            engine = bdl.NUTS(
                model,
                num_chains=1,
                num_warmup=NUM_WARMUP,
                num_draws=num,
                num_predictive=num,
                max_depth=5,
                standardize=False,
            )
            posterior = engine.fit(x[:, :n], y[:, :n], seed=piece)
            scores[name] = posterior.predict(x[:, n:]).log_prob(y[:, n:])
            if name == "all":
                seconds = time.process_time() - began
    return {**scores, "seconds": torch.tensor([seconds])}


def reference(scratch: Path, sizes: list[int]) -> None:
    """Compute what is missing, one file for each piece of 50 tasks."""
    scratch.mkdir(parents=True, exist_ok=True)
    for piece, n, d in itertools.product(range(TASKS // PIECE), sizes, DIMENSIONS):
        path = scratch / f"gp_n{n}_d{d}_{piece}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(reference_piece(n, d, piece), partial)
            partial.replace(path)
            print(path.name, flush=True)


def network_piece(posterior_of: Any, n: int, d: int, piece: int) -> tuple[Tensor, Tensor]:
    """Log scores of the network (PIECE, QUERIES), and its cdf at the queries' targets."""
    x, y = tasks(n, d, piece)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a normal input may lie outside the trained box
        predictive = posterior_of.fit(x[:, :n].float(), y[:, :n].float()).predict(x[:, n:].float())
    targets = y[:, n:].to(predictive.mean)
    return predictive.log_prob(targets).double(), predictive.cdf(targets).double()


def score(network: str, scratch: Path, sizes: list[int]) -> None:
    """One row for each n and one for each n and d, where the reference is there."""
    engine = bdl.PFN.from_pretrained(network, standardize=False)
    rows, levels = [], {}
    for n in sizes:
        gaps, losses, coverage, exact = {}, [], [], []
        for d in DIMENSIONS:
            parts = []
            for piece in range(TASKS // PIECE):
                path = scratch / f"gp_n{n}_d{d}_{piece}.safetensors"
                if path.exists():
                    found = load_file(path)
                    ours, level = network_piece(engine, n, d, piece)
                    parts.append((found["all"] - ours).mean(-1))
                    exact.append(-found["all"].mean(-1))
                    coverage.append(level)
                    if "half" in found:
                        losses.append((found["all"] - found["half"]).mean())
            if parts:
                gaps[d] = torch.cat(parts)
        if not gaps:
            continue
        levels[n] = torch.cat(coverage).flatten()
        loss = float(torch.stack(losses).mean()) if losses else math.nan
        for d, gap in [("all", torch.cat(list(gaps.values()))), *gaps.items()]:
            row = {"network": network, "n": n, "d": d, "tasks": len(gap), "gap": f"{gap.mean():.4f}"}
            row["half_width_95"] = f"{1.96 * gap.std() / len(gap) ** 0.5:.4f}"
            everything = d == "all"
            row["exact_nll"] = f"{torch.cat(exact).mean():.4f}" if everything else ""
            row["reference_loss"] = f"{loss:.4f}" if everything else ""
            for level in (0.05, 0.25, 0.5, 0.75, 0.95):
                row[f"below_q{100 * level:.0f}"] = f"{(levels[n] < level).double().mean():.4f}" if everything else ""
            rows.append({**row, **describe()})
            print({key: row[key] for key in list(row)[:8]}, flush=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(engine, rows, levels)


def picture(engine: Any, rows: list[dict[str, Any]], levels: dict[int, Tensor]) -> None:
    """The network and the exact GP on the same data; the gap against n; calibration of the network's quantiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    axes = figure.subplots(2, 3)
    (kernel,) = recipe("gp").prior.kernels_for(1)
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(prior=recipe("gp").prior.noise_variance, lower=0.0))
    x, y = tasks(20, 1, 0)
    grid = torch.linspace(-1.8, 1.8, 200, dtype=torch.float64).unsqueeze(-1)
    for panel, which, num in zip((axes[0, 0], axes[0, 1], axes[0, 2]), (0, 3, 7), (3, 8, 20), strict=True):
        context, targets = x[which, :num], y[which, :num]
        ours = engine.fit(context.float(), targets.float()).predict(grid.float())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact = bdl.NUTS(model, num_chains=2, num_warmup=200, num_draws=200, standardize=False)
            wanted = exact.fit(context, targets, seed=0).predict(grid)
        levels_of_band = torch.tensor([0.05, 0.95], dtype=torch.float64)
        for distribution, color, label in ((wanted, "C0", "GP, NUTS"), (ours, "C1", "network")):
            low, high = distribution.quantile(levels_of_band.to(distribution.mean))
            panel.plot(grid, distribution.mean.detach(), color=color, label=label)
            for edge in (low, high):
                panel.plot(grid, edge.detach(), color=color, lw=0.8, ls="--")
        panel.plot(context, targets, "k.", ms=7)
        panel.set_title(f"{num} points: mean and 90 % of y")
    axes[0, 0].legend(frameon=False)
    for d in ("all", *DIMENSIONS):
        mine = [row for row in rows if row["d"] == d]
        style = {"color": "k", "lw": 2} if d == "all" else {"lw": 0.9}
        axes[1, 0].plot([r["n"] for r in mine], [float(r["gap"]) for r in mine], "o-", ms=3, label=f"d = {d}", **style)
    axes[1, 0].set(xscale="log", xlabel="context points n", title="log score lost to the exact answer, nats")
    axes[1, 0].axhline(0.05, color="grey", ls=":")
    axes[1, 0].legend(frameon=False, fontsize=8)
    for n, level in levels.items():
        ordered = level.sort().values
        axes[1, 1].plot(ordered, torch.linspace(0, 1, len(ordered)) - ordered, lw=1, label=f"n = {n}")
    axes[1, 1].set(xlabel="level of the quantile", title="share of targets below it, minus the level")
    axes[1, 1].legend(frameon=False, fontsize=8)
    log = engine.network.card["log"]
    axes[1, 2].plot([entry["step"] for entry in log], [entry["loss"] for entry in log], lw=1)
    axes[1, 2].set(xlabel="training step", title="training loss, nats")
    for panel in axes.flat:
        panel.grid(alpha=0.25)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Compute the reference, or score a network against it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", "score"])
    parser.add_argument("--network", default="gp", help="a shipped name or a file")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "bayesdl_pfn_mimicry")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "reference":
        reference(args.scratch, args.sizes)
    else:
        score(args.network, args.scratch, args.sizes)


if __name__ == "__main__":
    main()
