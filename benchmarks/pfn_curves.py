"""The network `learning-curve` against NUTS on its own prior, and against simple rules on real curves.

    python benchmarks/pfn_curves.py reference [--scratch DIR]     # NUTS, curve after curve; resumes
    python benchmarks/pfn_curves.py score [--lcdb DIR] [--card]   # everything else: CSV and picture
    python benchmarks/pfn_curves.py picture                       # only the picture, from the CSV

Of 100 fresh curves of the prior the first 10, 20 or 40 of 100 epochs are known, or for `learning-curve-size` the first
5, 8 or 12 of 36 sizes; the score is the mean log likelihood of each later one, in units of accuracy. NUTS (4 chains,
500 transitions of warm-up and 1000 draws) starts from the most likely of 5000 curves of the prior. "known curve" is the
density of the curve that the data came from: nobody can know as much. Seconds are of the process, for all later points
of one curve; a network's are told for curves asked one by one and for 100 at once. With --card the gaps to NUTS go into
the cards of the shipped networks, too.

Real curves are those of the learning-curve database, in the PyPI package lcdb (its CSV files, 0.5 GB unpacked, are
read; the package is not imported): see `real_curves.py`.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import itertools
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import curve_posterior
import real_curves
import torch
from machine import describe
from pfn_mimicry import into_card
from safetensors.torch import load_file, save_file
from torch import Tensor

import bayesdl as bdl
from bayesdl.priors.tasks import LearningCurves, Tasks

RESULTS = Path(__file__).parent / "results" / "pfn_curves.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "pfn_curves.png"
CURVES, PIECE = 100, 50
SLOPE = math.sqrt(12.0)  # of the network's y in accuracy


class Axis(NamedTuple):
    """A prior over curves, its name in the table and in scratch files, and how many points are known."""

    name: str
    files: str
    prior: LearningCurves
    cuts: tuple[int, ...]


EPOCHS = Axis("prior", "n", LearningCurves(), (20, 10, 40))
SIZES = Axis("prior, sizes", "size_n", real_curves.SIZES, (5, 8, 12))


def fresh(prior: LearningCurves) -> tuple[Tasks, Tensor]:
    """The curves, and their accuracies (CURVES, horizon)."""
    tasks = prior.sample(CURVES, prior.horizon, 1, torch.Generator().manual_seed(2_000_003))
    return tasks, prior.accuracy(tasks.y.double())


def reference(scratch: Path) -> None:
    """Compute what is missing, one file for each cut-off and piece of the curves."""
    scratch.mkdir(parents=True, exist_ok=True)
    for axis, piece in itertools.product((EPOCHS, SIZES), range(CURVES // PIECE)):
        _, y = fresh(axis.prior)
        for n in axis.cuts:
            path = scratch / f"{axis.files}{n}_{piece}.safetensors"
            if not path.exists():
                found = curve_posterior.answer(axis.prior, y[piece * PIECE : (piece + 1) * PIECE], n, seed=piece)
                save_file(found._asdict(), path.with_suffix(".partial"))
                path.with_suffix(".partial").replace(path)
                told = f"{found.score.mean():.3f} a point, {found.seconds[0]:.1f} s a curve"
                print(f"{path.name}: {told}, R-hat {found.rhat.median():.3f}", flush=True)


def network_scores(engine: bdl.PFN, tasks: Tasks, n: int) -> Tensor:
    """Mean log likelihood of the rest of each curve, in units of accuracy."""
    predictive = engine.fit(tasks.x[:, :n], tasks.y[:, :n]).predict(tasks.x[:, n:])
    return predictive.log_prob(tasks.y[:, n:].to(predictive.mean)).double().mean(-1) + math.log(SLOPE)


def network_seconds(engine: bdl.PFN, tasks: Tasks, n: int, repeats: int = 5) -> tuple[float, float]:
    """Process seconds a curve, one by one and all at once: the smallest of some repetitions."""
    alone, together = [], []
    for i in range(repeats):
        began = time.process_time()
        network_scores(engine, Tasks(tasks.x[i : i + 1], tasks.y[i : i + 1], tasks.noiseless, {}), n)
        alone.append(time.process_time() - began)
        began = time.process_time()
        network_scores(engine, tasks, n)
        together.append((time.process_time() - began) / len(tasks.y))
    return min(alone), min(together)


def last_value_scores(prior: LearningCurves, tasks: Tasks, n: int) -> Tensor:
    """The last value, with the spread that the differences have in other curves of the prior."""
    pool = prior.sample(5000, prior.horizon, 1, torch.Generator().manual_seed(3_000_003))
    others = prior.accuracy(pool.y.double())
    spread = (others[:, n:] - others[:, n - 1 : n]).square().mean(0).sqrt()
    y = prior.accuracy(tasks.y.double())
    return torch.distributions.Normal(y[:, n - 1 : n], spread).log_prob(y[:, n:]).mean(-1)


def prior_rows(engine: bdl.PFN, axis: Axis, scratch: Path) -> list[dict[str, Any]]:
    """One row for each cut-off and method; every method is scored on the curves that NUTS has done."""
    tasks, y = fresh(axis.prior)
    t = axis.prior.times(y)
    rows = []
    for n in sorted(axis.cuts):
        paths = {i: scratch / f"{axis.files}{n}_{i}.safetensors" for i in range(CURVES // PIECE)}
        done = {i: path for i, path in paths.items() if path.exists()}
        which = torch.arange(CURVES).reshape(-1, PIECE)[list(done or paths)].flatten()
        known = curve_posterior.log_scores(axis.prior, tasks.latents, t[n:], y[:, n:]).mean(-1)
        ours = network_scores(engine, tasks, n)
        alone, together = network_seconds(engine, tasks, n)
        scores = {"network": ours, "last value": last_value_scores(axis.prior, tasks, n), "known curve": known}
        scores = {name: score[which] for name, score in scores.items()}
        rhat = seconds = None
        if done:
            found = [load_file(path) for path in done.values()]
            scores["NUTS"] = torch.cat([each["score"] for each in found])
            rhat, seconds = (torch.cat([each[name] for each in found]) for name in ("rhat", "seconds"))
        for name, score in scores.items():
            gap = scores["network"] - score
            row = {"curves": axis.name, "known": n, "method": name, "num_curves": len(score), **summary(score, gap)}
            if name == "network":
                row |= {"seconds": f"{alone:.3g}", "seconds_of_100_at_once": f"{together:.3g}"}
            if name == "NUTS":
                row["seconds"] = f"{seconds.mean():.3g}"
                row["slower_than_network"] = f"{seconds.mean() / alone:.0f}"
                row["slower_than_100_at_once"] = f"{seconds.mean() / together:.0f}"
                row["median_rhat"] = f"{rhat.median():.3f}"
                row["share_rhat_above_1.05"] = f"{(rhat > 1.05).double().mean():.2f}"
                settled = rhat <= 1.05
                if settled.sum() > 1:
                    row["network_gain_where_settled"] = f"{gap[settled].mean():.3f}"
            rows.append(row)
    return rows


def summary(score: Tensor, gap: Tensor) -> dict[str, str]:
    """Mean log score a point, and how much better the network is, with 95 % intervals over curves."""

    def half(values: Tensor) -> str:
        return f"{1.96 * float(values.std()) / math.sqrt(len(values)):.3f}"

    return {
        "log_score": f"{score.mean():.3f}", "half_width_95": half(score), "network_gain": f"{gap.mean():.3f}",
        "gain_half_width_95": half(gap), "median_network_gain": f"{gap.median():.3f}",
    }  # fmt: skip


def main() -> None:
    """Compute the reference, score everything, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", "score", "picture"])
    parser.add_argument("--network", default="learning-curve", help="a shipped name or a file")
    parser.add_argument("--size-network", default="learning-curve-size", help="a shipped name or a file")
    parser.add_argument("--lcdb", type=Path, help="folder of database-accuracy.csv; by default the installed package's")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "bayesdl_pfn_curves")
    parser.add_argument("--card", action="store_true", help="write the gaps to NUTS into the shipped network's card")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the ranges of the cards, and chains that have not met
    if args.what == "reference":
        reference(args.scratch)
        return
    engine = bdl.PFN.from_pretrained(args.network)
    if args.what == "picture":
        with RESULTS.open(newline="", encoding="utf-8") as file:
            picture(engine, list(csv.DictReader(file)))
        return
    networks = {"network": (engine, EPOCHS), "size network": (bdl.PFN.from_pretrained(args.size_network), SIZES)}
    rows = []
    for each, axis in networks.values():
        found = prior_rows(each, axis, args.scratch)
        rows += found
        if args.card:
            into_card(each.network, gaps(found), "nuts")
    table = real_curves.load(args.lcdb)
    if table is not None:
        engines = {name: (each, axis.prior) for name, (each, axis) in networks.items()}
        rows += real_curves.rows(engines, table)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *describe()], restval="")
        writer.writeheader()
        writer.writerows({**row, **describe()} for row in rows)
    for row in rows:
        print({name: value for name, value in row.items() if value != ""}, flush=True)
    picture(engine, rows)


def gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the network loses to NUTS, in the words of a card."""
    words = {"n": "known", "tasks": "num_curves", "half_width_95": "gain_half_width_95"}
    by_nuts = [row for row in rows if row["method"] == "NUTS"]
    return [{**{k: row[v] for k, v in words.items()}, "gap": -float(row["network_gain"])} for row in by_nuts]


def picture(engine: bdl.PFN, rows: list[dict[str, Any]]) -> None:
    """Curves of the prior and what the network says of them; log scores; what early stopping saves and loses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_curves(engine, axes[0])
    for panel, kind, title in ((axes[1, 0], "prior", "curves of the prior"), (axes[1, 1], "real", "real curves")):
        mine = [row for row in rows if row["curves"] == kind and float(row["log_score"]) > -3]
        cuts = sorted({int(row["known"]) for row in mine})
        for name in dict.fromkeys(row["method"] for row in mine):
            scores = {int(row["known"]): float(row["log_score"]) for row in mine if row["method"] == name}
            style = {"lw": 2.5} if "network" in name else {"lw": 1.2, "ls": "--"}
            panel.plot([cuts.index(n) for n in scores], list(scores.values()), "o-", ms=4, label=name, **style)
        panel.set(xticks=range(len(cuts)), xticklabels=cuts, xlabel="known points", title=f"log score, {title}")
        panel.legend(frameon=False, fontsize=8)
    stopped = [row for row in rows if row["curves"] == "early stopping"]
    for name in dict.fromkeys(row["method"] for row in stopped):
        mine = [row for row in stopped if row["method"] == name]
        saved, lost = ([100 * float(row[key]) for row in mine] for key in ("share_saved", "accuracy_lost"))
        axes[1, 2].plot(saved, lost, "o-", ms=5, lw=1, label=name)
    axes[1, 2].set(xlabel="training time saved, %", ylabel="accuracy lost, points", title="early stopping, real curves")
    axes[1, 2].legend(frameon=False, fontsize=8)
    for panel in axes.flat:
        panel.grid(alpha=0.25)
    figure.savefig(PICTURE, dpi=110)


def _draw_curves(engine: bdl.PFN, panels: Any) -> None:
    prior = EPOCHS.prior
    tasks, y = fresh(prior)
    t = prior.times(y)
    for panel, which, n in zip(panels, (1, 4, 8), (10, 20, 40), strict=True):
        law = engine.fit(tasks.x[which, :n], tasks.y[which, :n]).predict(tasks.x[which, n:])
        band = [prior.accuracy(law.quantile(level)) for level in (0.05, 0.25, 0.75, 0.95)]
        panel.fill_between(t[n:], band[0], band[3], color="C0", alpha=0.2, lw=0, label="90 % and 50 %")
        panel.fill_between(t[n:], band[1], band[2], color="C0", alpha=0.3, lw=0)
        panel.plot(t[n:], prior.accuracy(law.mean), color="C0", label="mean")
        panel.plot(t[:n], y[which, :n], "k.", ms=4, label="known")
        panel.plot(t[n:], y[which, n:], ".", color="C3", ms=2, label="what follows")
        panel.set(title=f"{n} epochs known", xlabel="epoch")
    panels[0].set_ylabel("accuracy")
    panels[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
