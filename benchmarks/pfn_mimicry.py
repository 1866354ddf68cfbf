"""How near a network comes to the exact Bayesian answer: paired log scores on fresh tasks of its own prior.

    python benchmarks/pfn_mimicry.py reference [--network gp] [--scratch DIR]     # the exact answer; resumes
    python benchmarks/pfn_mimicry.py score [--network gp] [--scratch DIR]         # the network on the same tasks

For each context size n there are 1000 tasks with 5 queries each: of `gp`, 200 of each of 1 to 5 inputs; of `bo`, 500 of
each of 1 and 2. The reference is the Gaussian process of the prior with its hyper-parameters (and, for `bo`, the set of
columns that matter) integrated out by importance sampling, `recipes/importance.py`; `effective` are the median and
the smallest of its effective draws. It is not quite exact: what half as many draws lose against all of them, in the
first tasks of each kind, is `reference_loss`. The gap is the mean over tasks of (log score of the reference - log score
of the network), with the 95 % interval over tasks.

With --card the gaps for all tasks go into the card of the shipped network, too.

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
import sys
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
from bayesdl.amortized import Pretrained
from bayesdl.amortized.checkpoint import WEIGHTS

RESULTS = Path(__file__).parent / "results" / "pfn_mimicry.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "pfn_mimicry.png"
SIZES = {"gp": (1, 3, 5, 10, 20, 50, 100), "bo": (1, 3, 5, 10, 20, 40, 60)}
DIMENSIONS = {"gp": (1, 2, 3, 4, 5), "bo": (1, 2)}
TASKS, QUERIES, PIECE = 1000, 5, 50


def recipe(name: str) -> Any:
    """The module of a recipe: prior, architecture, schedule."""
    path = Path(__file__).parent / "recipes" / f"{name.replace('-', '_')}.py"
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks(network: str, n: int, d: int, piece: int) -> tuple[Tensor, Tensor]:
    """PIECE tasks of n context points and QUERIES queries: x (PIECE, n + QUERIES, d), y, the same at every call."""
    generator = torch.Generator().manual_seed(1_000_000 + 10_000 * n + 100 * d + piece)
    found = recipe(network).prior.sample(PIECE, n + QUERIES, d, generator)
    return found.x.double(), found.y.double()


def pieces(network: str) -> range:
    """Pieces of the tasks of one size and number of inputs."""
    return range(TASKS // PIECE // len(DIMENSIONS[network]))


def file_of(scratch: Path, network: str, n: int, d: int, piece: int) -> Path:
    """Where the reference of one piece is kept."""
    return scratch / f"exact_{network}_n{n}_d{d}_{piece}.safetensors"


def reference_piece(network: str, n: int, d: int, piece: int) -> dict[str, Tensor]:
    """Log scores of the exact answer (PIECE, QUERIES); in the first piece also of half as many draws."""
    x, y = tasks(network, n, d, piece)
    found, began = {}, time.process_time()
    for name, num in (("all", 200), ("half", 100))[: 2 if piece == 0 else 1]:
        draws = recipe(network).draws(x[:, :n], y[:, :n], x[:, n:], seed=piece, num_draws=num)
        found[name] = draws.predictive().log_prob(y[:, n:])
        if name == "all":
            found["effective"] = draws.effective
            found["seconds"] = torch.tensor([time.process_time() - began])
    return found


def reference(network: str, scratch: Path, sizes: list[int]) -> None:
    """Compute what is missing, one file for each piece of 50 tasks."""
    scratch.mkdir(parents=True, exist_ok=True)
    for piece, n, d in itertools.product(pieces(network), sizes, DIMENSIONS[network]):
        path = file_of(scratch, network, n, d, piece)
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(reference_piece(network, n, d, piece), partial)
            partial.replace(path)
            print(path.name, flush=True)


def network_piece(engine: Any, network: str, n: int, d: int, piece: int) -> tuple[Tensor, Tensor]:
    """Log scores of the network (PIECE, QUERIES), and its cdf at the queries' targets."""
    x, y = tasks(network, n, d, piece)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a normal input may lie outside the trained box
        predictive = engine.fit(x[:, :n].float(), y[:, :n].float()).predict(x[:, n:].float())
    targets = y[:, n:].to(predictive.mean)
    return predictive.log_prob(targets).double(), predictive.cdf(targets).double()


def score(network: str, file: str, scratch: Path, sizes: list[int], *, card: bool) -> None:
    """One row for each n and one for each n and d, where the reference is there."""
    engine = bdl.PFN.from_pretrained(file, standardize=False)
    rows, levels = [], {}
    for n in sizes:
        found = {d: _paired(engine, network, scratch, n, d) for d in DIMENSIONS[network]}
        found = {d: parts for d, parts in found.items() if parts["gap"].numel()}
        if not found:
            continue
        whole = {key: torch.cat([parts[key] for parts in found.values()]) for key in next(iter(found.values()))}
        levels[n] = whole["level"].flatten()
        for d, parts in [("all", whole), *found.items()]:
            gap = parts["gap"]
            row = {"network": network, "n": n, "d": d, "tasks": len(gap), "gap": f"{gap.mean():.4f}"}
            row["half_width_95"] = f"{1.96 * gap.std() / len(gap) ** 0.5:.4f}"
            row |= {"exact_nll": f"{parts['nll'].mean():.4f}", "reference_loss": f"{parts['loss'].mean():.4f}"}
            row |= {"effective": f"{parts['effective'].median():.0f}", "least": f"{parts['effective'].min():.0f}"}
            for level in (0.05, 0.25, 0.5, 0.75, 0.95):
                row[f"below_q{100 * level:.0f}"] = f"{(parts['level'] < level).double().mean():.4f}"
            rows.append({**row, "reference_seconds": f"{parts['seconds'].sum():.1f}", **describe()})
            print({key: row[key] for key in list(row)[:10]}, flush=True)
    if card:
        into_card(engine.network, [row for row in rows if row["d"] == "all"])
    others = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as kept:
            others = [row for row in csv.DictReader(kept) if row["network"] != network]
    with RESULTS.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(sorted(rows + others, key=lambda row: row["network"] != "gp"))
    if network == "gp":
        picture(engine, rows, levels)


def into_card(network: Pretrained, rows: list[dict[str, Any]], to: str = "the_exact_predictive") -> None:
    """Write the gaps into the card of the shipped network."""
    numbers = {key: [float(row[key]) for row in rows] for key in ("n", "tasks", "gap", "half_width_95")}
    told, name = {f"gap_to_{to}": numbers}, network.card["name"]
    Pretrained(network.network, network.borders, {**network.card, **told}).save(WEIGHTS / f"{name}.safetensors")


def _paired(engine: Any, network: str, scratch: Path, n: int, d: int) -> dict[str, Tensor]:
    """Everything of one size and number of inputs, over the pieces whose reference is there."""
    empty = torch.empty(0, dtype=torch.float64)
    found = {name: [empty] for name in ("gap", "nll", "loss", "effective", "seconds")}
    found["level"] = [empty.reshape(0, QUERIES)]
    for piece in pieces(network):
        path = file_of(scratch, network, n, d, piece)
        if path.exists():
            exact = load_file(path)
            ours, level = network_piece(engine, network, n, d, piece)
            found["gap"].append((exact["all"] - ours).mean(-1))
            found["nll"].append(-exact["all"].mean(-1))
            found["level"].append(level)
            found["effective"].append(exact["effective"])
            found["seconds"].append(exact["seconds"].double())
            if "half" in exact:
                found["loss"].append((exact["all"] - exact["half"]).mean(-1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def picture(engine: Any, rows: list[dict[str, Any]], levels: dict[int, Tensor]) -> None:
    """The network and the exact GP on the same data; the gap against n; calibration of the network's quantiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    axes = figure.subplots(2, 3)
    x, y = tasks("gp", 20, 1, 0)
    grid = torch.linspace(-1.8, 1.8, 200, dtype=torch.float64).unsqueeze(-1)
    for panel, which, num in zip(axes[0], (0, 3, 7), (3, 8, 20), strict=True):
        context, targets = x[which, :num], y[which, :num]
        ours = engine.fit(context.float(), targets.float()).predict(grid.float())
        exact = recipe("gp").draws(context[None], targets[None], grid[None], num_draws=400).predictive()
        for law, color, label in ((exact, "C0", "Gaussian process, exact"), (ours, "C1", "network")):
            low, high = law.quantile(0.05).reshape(-1), law.quantile(0.95).reshape(-1)
            panel.plot(grid, law.mean.reshape(-1), color=color, label=label)
            panel.plot(grid, torch.stack([low, high], -1), color=color, lw=0.8, ls="--")
        panel.plot(context, targets, "k.", ms=7)
        panel.set_title(f"{num} points: mean and 90 % of y")
    axes[0, 2].legend(frameon=False, loc="lower left")
    for d in ("all", *DIMENSIONS["gp"]):
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
    axes[1, 1].set_ylim(bottom=1.6 * axes[1, 1].get_ylim()[0])  # room for the legend
    axes[1, 1].legend(frameon=False, fontsize=8, ncols=4, loc="lower center")
    log = engine.network.card["log"]
    for n in (5, 20, 60):
        axes[1, 2].plot([e["step"] for e in log], [e[f"gap_{n}"] for e in log], lw=1, label=f"n = {n}")
    axes[1, 2].set(xlabel="training step", title="the same while training, 100 tasks of d = 2")
    axes[1, 2].legend(frameon=False, fontsize=8)
    for panel in axes.flat:
        panel.grid(alpha=0.25)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Compute the reference, or score a network against it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", "score"])
    parser.add_argument("--network", choices=list(SIZES), default="gp", help="the prior, and the shipped network")
    parser.add_argument("--file", help="another network of the same prior")
    parser.add_argument("--card", action="store_true", help="write the gaps into the shipped network's card")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "bayesdl_pfn_mimicry")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = args.sizes or list(SIZES[args.network])
    if args.what == "reference":
        reference(args.network, args.scratch, sizes)
    else:
        score(args.network, args.file or args.network, args.scratch, sizes, card=args.card)


if __name__ == "__main__":
    main()
