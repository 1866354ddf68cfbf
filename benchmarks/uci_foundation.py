"""The UCI regression benchmark (Hernández-Lobato & Adams 2015; splits of Gal & Ghahramani 2016) for the first engines.

Standardised by the training part, scored in the original units of y. One row an engine and split goes to
`results/uci_foundation.csv` as soon as it is known, and rows that are there are not computed again, so that a killed
run goes on where it stopped. `results/uci_foundation_summary.csv` holds mean and standard error over the splits beside
the published test log-likelihoods of MC dropout (Gal & Ghahramani 2016) and deep ensembles (Lakshminarayanan et al.
2017), both for one hidden layer of 50 relu units.

    BAYESDL_DATA=... python benchmarks/uci_foundation.py [--datasets boston yacht] [--engines gp hmc] [--splits 20]

Networks of five splits are fitted side by side in one batch, in float32; Gaussian processes one split at a time, in
float64. `cpu_seconds` is process time of one thread, shared evenly within a batch.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import describe
from tqdm import tqdm

import bayesdl as bdl
from bayesdl.distributions import GaussianMixture, Normal
from bayesdl.evaluation.compare import evaluate

RESULTS = Path(__file__).parent / "results" / "uci_foundation.csv"
SUMMARY = RESULTS.with_name("uci_foundation_summary.csv")
PUBLISHED = {  # test log-likelihood: MC dropout, deep ensembles
    "boston": (-2.46, -2.41),
    "concrete": (-3.04, -3.06),
    "energy": (-1.99, -1.38),
    "yacht": (-1.55, -1.18),
    "wine": (-0.93, -0.94),
}
NETWORK = bdl.BNN(hidden=(50,), activation="relu")
GROUP = 5


def engine(name: str, n: int) -> Any:
    """The engines of this benchmark, with settings that depend on the number of training points only.

    Large sets get one start of the GP optimiser instead of two, and the small one longer trajectories: its noise is so
    low that short ones barely move.
    """
    starts = 2 if n < 1200 else 1
    if name == "gp":
        return bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_starts=starts)
    if name == "nngp":
        return bdl.ExactGP(bdl.GP(bdl.kernels.NNGP(depth=3, activation="relu")), num_starts=starts)
    if name == "hmc":
        return bdl.HMC(NETWORK, num_chains=4, num_warmup=300, num_draws=200, num_steps=48 if n >= 400 else 192)
    return bdl.Ensemble(NETWORK, num_members=5, num_steps=4000)


def jobs(engine_name: str, num_splits: int) -> list[list[int]]:
    """Splits that are fitted together."""
    size = GROUP if engine_name in ("hmc", "ensemble") else 1
    return [list(range(i, min(i + size, num_splits))) for i in range(0, num_splits, size)]


def run_job(dataset: str, engine_name: str, group: list[int]) -> Iterator[dict[str, Any]]:
    """Fit one engine to a group of splits of one data set; one row a split."""
    data = bdl.datasets.load(f"uci:{dataset}")
    dtype = torch.float32 if engine_name in ("hmc", "ensemble") else torch.float64
    train = torch.stack([(~data.splits[i]).nonzero().squeeze(-1) for i in group])
    test = torch.stack([data.splits[i].nonzero().squeeze(-1) for i in group])
    x, y = data.x.to(dtype), data.y.to(dtype)
    began = time.process_time()
    if len(group) == 1:
        train, test = train[0], test[0]
    fitted = engine(engine_name, train.shape[-1]).fit(x[train], y[train], seed=group[0])
    seconds = (time.process_time() - began) / len(group)
    predictive = fitted.predict(x[test])
    for place, split in enumerate(group):
        part = predictive if len(group) == 1 else _part(predictive, place)
        y_test = data.y[test] if len(group) == 1 else data.y[test[place]]
        scores = evaluate(part, y_test, with_profile=False).scores
        yield {
            "dataset": dataset,
            "engine": engine_name,
            "split": split,
            "n_train": train.shape[-1],
            "d": data.x.shape[-1],
            **{name: f"{value:.6g}" for name, value in scores.items()},
            "cpu_seconds": f"{seconds:.3g}",
            "rhat": f"{fitted.diagnostics['rhat']:.4g}" if "rhat" in fitted.diagnostics else "",
            "ess_bulk": f"{fitted.diagnostics['ess_bulk']:.4g}" if "ess_bulk" in fitted.diagnostics else "",
            "engine_settings": repr(engine(engine_name, train.shape[-1])),
            **describe(),
        }


def _part(predictive: GaussianMixture | Normal, place: int) -> GaussianMixture | Normal:
    """The predictive of one split of a batch, in float64 for scoring."""
    if isinstance(predictive, GaussianMixture):
        return GaussianMixture(predictive.loc[place].double(), predictive.scale[place].double())
    return Normal(predictive.loc[place].double(), predictive.scale[place].double())


def append(rows: list[dict[str, Any]]) -> None:
    """Add rows to the results under a lock, so that two processes may share the work."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def finished() -> set[tuple[str, str, int]]:
    """What the results hold already."""
    if not RESULTS.exists():
        return set()
    with RESULTS.open(newline="") as file:
        return {(row["dataset"], row["engine"], int(row["split"])) for row in csv.DictReader(file)}


def summarise() -> None:
    """Write mean and standard error over splits beside the published points, and print the log-likelihoods."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: (list(PUBLISHED).index(row["dataset"]), row["engine"], int(row["split"])))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = []
    for dataset, (dropout, ensembles) in PUBLISHED.items():
        for name in ("gp", "nngp", "hmc", "ensemble"):
            mine = [row for row in rows if (row["dataset"], row["engine"]) == (dataset, name)]
            if mine:
                summary.append(
                    {
                        "dataset": dataset,
                        "engine": name,
                        "splits": len(mine),
                        **_mean_and_error("log_likelihood", [-float(row["NLPD"]) for row in mine]),
                        **_mean_and_error("RMSE", [float(row["RMSE"]) for row in mine]),
                        **_mean_and_error("CRPS", [float(row["CRPS"]) for row in mine]),
                        **_mean_and_error("coverage_90", [float(row["coverage 90%"]) for row in mine]),
                        **_mean_and_error("cpu_seconds", [float(row["cpu_seconds"]) for row in mine]),
                        "test_rows_seen_in_training": round(seen_in_training(dataset), 4),
                        "published_mc_dropout": dropout,
                        "published_deep_ensembles": ensembles,
                    }
                )
    with SUMMARY.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(summary[0]))
        writer.writeheader()
        writer.writerows(summary)
    for row in summary:
        print(
            f"{row['dataset']:9s} {row['engine']:9s} {row['splits']:3d} splits  "
            f"log-likelihood {row['log_likelihood']:7.3f} ± {row['log_likelihood_se']:.3f}  RMSE {row['RMSE']:.3f}  "
            f"(published: dropout {row['published_mc_dropout']}, ensembles {row['published_deep_ensembles']})"
        )


def seen_in_training(dataset: str) -> float:
    """Share of test points, over all splits, that stand in the training part too, inputs and target alike.

    A model that finds its training targets noise-free scores such points at almost unlimited density.
    """
    data = bdl.datasets.load(f"uci:{dataset}")
    rows = torch.cat([data.x, data.y.unsqueeze(-1)], -1).unique(dim=0, return_inverse=True)[1]
    shares = [float(torch.isin(rows[test], rows[~test]).double().mean()) for test in data.splits]
    return sum(shares) / len(shares)


def _mean_and_error(name: str, values: list[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    error = float(tensor.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {name: round(float(tensor.mean()), 4), f"{name}_se": round(error, 4)}


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--engines", nargs="+", default=["gp", "nngp", "hmc", "ensemble"])
    parser.add_argument("--splits", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # R-hat stands in the rows
    todo = [(d, e, g) for d in args.datasets for e in args.engines for g in jobs(e, args.splits)]
    for dataset, name, group in tqdm(todo):
        have = finished()
        if not all((dataset, name, i) in have for i in group):
            append(list(run_job(dataset, name, group)))
    summarise()


if __name__ == "__main__":
    main()
