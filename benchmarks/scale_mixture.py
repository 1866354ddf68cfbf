"""When does a scale mixture of NNGPs beat the NNGP? Regression on the eight UCI sets of Lee et al. (2022), and digits.

Regression. Each split is a random 80 / 10 / 10 % into training, validation and test part. The kernel's depth and
activation are picked by NLPD on the validation part, for each model by itself; the test part is looked at once. The
predictive includes the noise, and all scores are in the original units of y. Two sizes of training set: 30 points, and
all of them. Of more than 1000 points, hyper-parameters see a random 1000 (300 while settings are compared), and of more
than 4000 the posterior sees a random 4000; `n_hyper` and `n_train` say how many it was. Test inputs are then corrupted
in standardised units: Gaussian noise, or a shift of every feature in a random direction.

Models: the NNGP as a GP, the Student-t process (inverse gamma prior (2, 2)), and a Burr XII mixture; each at c = d = 1
and at (2, 3), the validation part choosing. All three learn an amplitude of the kernel (the read-out's variance), so
the prior on the scale says how sure one is of the amplitude that was found, not how large it is.

Classification. Scikit-learn's digits without two classes, which come back as unknown ones: SparseGP and ScaleMixture
with 200 inducing points and an NNGP kernel, scored on clean, rotated, noisy and occluded images; the area under the ROC
curve says how well entropy and the largest probability tell the unknown classes from the known ones.

    BAYESDL_DATA=... python benchmarks/scale_mixture.py [--parts regression classification] [--datasets yacht boston]
                                                        [--splits 5] [--seeds 3]

One row a model, split and condition goes to `results/scale_mixture.csv` and `results/scale_mixture_digits.csv` as soon
as it is known; rows that are there are not computed again. The summaries hold means and standard errors over splits and
the differences to the GP, split by split. About 25 minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from torch import Tensor
from tqdm import tqdm

import bayesdl as bdl
from bayesdl.evaluation import accuracy, class_probabilities, coverage, expected_calibration_error, nlpd, rmse

RESULTS = Path(__file__).parent / "results"
REGRESSION, DIGITS = RESULTS / "scale_mixture.csv", RESULTS / "scale_mixture_digits.csv"
DATASETS = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "wine", "yacht")
SETTINGS = tuple((depth, activation) for depth in (1, 3) for activation in ("relu", "erf"))
SMALL = 30
NUM_HYPER, NUM_PICK, NUM_DATA = 1000, 300, 4000
MOST_SPLITS_OF_LARGE = 3
NOISE, SHIFT = (0.25, 0.5, 1.0), (0.5, 1.0)
REGRESSION_MODELS = ("gp", "student-t", "burr")


def engines(model: str, depth: int, activation: str, max_iterations: int) -> list[Any]:
    """The candidates of one model at one setting of the kernel."""
    gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.NNGP(depth=depth, activation=activation)))
    search = {"num_starts": 1, "max_iterations": max_iterations}
    if model == "gp":
        return [bdl.ExactGP(gp, **search)]
    if model == "student-t":
        return [bdl.ScaleMixture(gp, bdl.priors.InverseGamma(2.0, 2.0), **search)]
    return [bdl.ScaleMixture(gp, bdl.priors.BurrXII(*shape), **search) for shape in ((1.0, 1.0), (2.0, 3.0))]


def run_regression(dataset: str, model: str, split: int, size: str) -> Iterator[dict[str, Any]]:
    """Pick a setting, fit, and score one model on one split: a row for every condition of the test inputs."""
    data = bdl.datasets.load(f"uci:{dataset}")
    rng = np.random.default_rng([split, 20])
    order = torch.as_tensor(rng.permutation(len(data.y)))
    tenth = len(order) // 10
    test, valid, train = order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :]
    if size == "small":
        train = train[:SMALL]
    began = time.process_time()
    pick = train[:NUM_PICK]
    candidates = [engine for setting in SETTINGS for engine in engines(model, *setting, max_iterations=25)]
    scores = [validation_nlpd(engine, data, pick, valid) for engine in candidates]
    best = candidates[int(np.nanargmin(scores))]
    kernel = best.model.kernel.base
    chosen = next(
        engine
        for engine in engines(model, kernel.depth, kernel.activation, max_iterations=60)
        if getattr(engine, "scale_prior", None) == getattr(best, "scale_prior", None)
    )
    hyper, used = train[:NUM_HYPER], train[:NUM_DATA]
    posterior = chosen.fit(data.x[hyper], data.y[hyper], seed=split)
    if len(used) > len(hyper):
        rest = used[len(hyper) :]
        posterior = posterior.condition_on(data.x[rest], data.y[rest])
    seconds = time.process_time() - began
    for condition, severity, x in corrupted(data.x[test], data.x[hyper], rng):
        predictive = posterior.predict(x)
        yield {
            "dataset": dataset,
            "model": model,
            "split": split,
            "size": size,
            "condition": condition,
            "severity": severity,
            "NLPD": f"{float(nlpd(predictive, data.y[test])):.6g}",
            "RMSE": f"{float(rmse(predictive, data.y[test])):.6g}",
            "coverage 90%": f"{float(coverage(predictive, data.y[test], (0.9,))[0]):.4g}",
            "n_train": len(used),
            "n_hyper": len(hyper),
            "n_test": len(test),
            "depth": kernel.depth,
            "activation": kernel.activation,
            "scale_prior": repr(getattr(chosen, "scale_prior", "")),
            "scale_mean": f"{float(posterior.scale_mean):.4g}" if model != "gp" else "",
            "validation_NLPD": f"{min(scores):.6g}",
            "cpu_seconds": f"{seconds:.3g}",
            **describe(),
        }


def validation_nlpd(engine: Any, data: Any, train: Tensor, valid: Tensor) -> float:
    """What decides between settings; infinite where a fit fails."""
    try:
        posterior = engine.fit(data.x[train], data.y[train], seed=0)
    except bdl.errors.NumericalError:
        return math.inf
    return float(nlpd(posterior.predict(data.x[valid]), data.y[valid]))


def corrupted(x: Tensor, train: Tensor, rng: np.random.Generator) -> Iterator[tuple[str, float, Tensor]]:
    """The test inputs as they are, with noise, and shifted; severities are in standard deviations of each feature."""
    scale = train.std(0, correction=0)
    noise = torch.as_tensor(rng.normal(size=x.shape))
    sign = torch.as_tensor(rng.choice([-1.0, 1.0], size=x.shape[-1]))
    yield "clean", 0.0, x
    for severity in NOISE:
        yield "noise", severity, x + severity * scale * noise
    for severity in SHIFT:
        yield "shift", severity, x + severity * scale * sign


def run_digits(model: str, seed: int) -> Iterator[dict[str, Any]]:
    """Pick a depth, fit and score one model on one split of the digits."""
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    rng = np.random.default_rng([seed, 30])
    unknown = rng.choice(10, 2, replace=False)
    known = np.setdiff1d(np.arange(10), unknown)
    inside = rng.permutation(np.flatnonzero(np.isin(labels, known)))
    outside = np.flatnonzero(np.isin(labels, unknown))
    y = torch.as_tensor(np.searchsorted(known, labels)).double()
    sixth = len(inside) // 6
    test, valid, train = inside[: 2 * sixth], inside[2 * sixth : 3 * sixth], inside[3 * sixth :]
    # one location and scale for all pixels: each pixel by its own would blow up noise where the images never change
    loc, scale = images[train].mean(), images[train].std()

    def inward(pixels: np.ndarray) -> Tensor:
        return torch.as_tensor((pixels - loc) / scale, dtype=torch.float64)

    x = inward(images)
    began = time.process_time()
    fitted = []
    for depth in (1, 3):
        gp = bdl.GP(bdl.kernels.NNGP(depth=depth), likelihood=bdl.Categorical(len(known)))
        settings = {
            "num_inducing": 200,
            "batch_size": 256,
            "num_steps": 300,
            "learning_rate": 0.03,
            "standardize": False,
        }
        engine = bdl.SparseGP(gp, **settings) if model == "gp" else bdl.ScaleMixture(gp, **settings)
        posterior = engine.fit(x[train], y[train], seed=seed)
        fitted.append((float(nlpd(posterior.predict(x[valid]), y[valid])), depth, posterior))
    _, depth, posterior = min(fitted, key=lambda entry: entry[0])
    seconds = time.process_time() - began
    strange = class_probabilities(posterior.predict(x[outside]))
    for condition, severity, pictures in altered(images[test], rng):
        predictive = posterior.predict(inward(pictures))
        familiar = class_probabilities(predictive)
        yield {
            "model": model,
            "seed": seed,
            "condition": condition,
            "severity": severity,
            "accuracy": f"{float(accuracy(predictive, y[test])):.4g}",
            "NLL": f"{float(nlpd(predictive, y[test])):.6g}",
            "ECE": f"{float(expected_calibration_error(predictive, y[test])):.4g}",
            "AUROC_entropy": f"{auroc(entropy(familiar), entropy(strange)):.4g}",
            "AUROC_max_prob": f"{auroc(-familiar.amax(-1), -strange.amax(-1)):.4g}",
            "n_train": len(train),
            "n_test": len(test),
            "num_inducing": 200,
            "depth": depth,
            "unknown_classes": " ".join(map(str, sorted(unknown))),
            "cpu_seconds": f"{seconds:.3g}",
            **describe(),
        }


def altered(images: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, float, np.ndarray]]:
    """The 8 x 8 test images as they are, turned, with noise (in grey levels of 16), and with a square wiped out."""
    from scipy.ndimage import rotate

    square = images.reshape(-1, 8, 8)
    yield "clean", 0, images
    for angle in (15, 30, 45):
        turned = rotate(square, angle, axes=(1, 2), reshape=False, order=1)
        yield "rotated", angle, turned.reshape(len(images), 64)
    for sd in (2, 4, 8):
        yield "noise", sd, np.clip(images + sd * rng.normal(size=images.shape), 0, 16)
    for size in (3, 4):
        wiped = square.copy()
        for image, (i, j) in zip(wiped, rng.integers(0, 9 - size, (len(images), 2)), strict=True):
            image[i : i + size, j : j + size] = 0
        yield "occluded", size, wiped.reshape(len(images), 64)


def entropy(probs: Tensor) -> Tensor:
    """Of each row of class probabilities."""
    return -(probs * probs.clamp_min(1e-300).log()).sum(-1)


def auroc(familiar: Tensor, strange: Tensor) -> float:
    """P(a strange score exceeds a familiar one), ties counting half."""
    ordered = familiar.sort().values
    below = torch.searchsorted(ordered, strange) + torch.searchsorted(ordered, strange, right=True)
    return float(below.double().mean() / (2 * len(familiar)))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add the rows of one fit."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """What the results hold already."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def work_through(path: Path, keys: tuple[str, ...], jobs: list[tuple], run: Callable[..., Iterator]) -> None:
    """Run the jobs whose rows are not there yet."""
    for job in tqdm(jobs, desc=path.stem):
        have = {tuple(row[key] for key in keys) for row in read(path)}
        if tuple(map(str, job)) not in have:
            append(path, list(run(*job)))


def summarise(path: Path, by: tuple[str, ...], scores: tuple[str, ...], unit: str) -> None:
    """Means with standard errors over splits, and the paired difference of each score to the GP's."""
    groups: dict[tuple[str, ...], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in read(path):
        groups[tuple(row[key] for key in (*by, "model"))][row[unit]] = row
    summary = []
    for group, rows in sorted(groups.items()):
        gp = groups.get((*group[:-1], "gp"), {})
        line: dict[str, Any] = dict(zip((*by, "model"), group, strict=True)) | {"runs": len(rows)}
        for score in scores:
            values = np.array([float(row[score]) for row in rows.values()])
            line |= {score: round(values.mean(), 4), f"{score}_se": round(standard_error(values), 4)}
            gaps = np.array([float(row[score]) - float(gp[i][score]) for i, row in rows.items() if i in gp])
            if group[-1] != "gp" and len(gaps):
                line |= {
                    f"{score}_minus_gp": round(gaps.mean(), 4),
                    f"{score}_minus_gp_se": round(standard_error(gaps), 4),
                }
            else:
                line |= {f"{score}_minus_gp": "", f"{score}_minus_gp_se": ""}
        summary.append(line)
    if not summary:
        return
    with path.with_stem(f"{path.stem}_summary").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(summary[0]))
        writer.writeheader()
        writer.writerows(summary)
    for line in summary:
        name = "  ".join(str(line[key]).ljust(9) for key in (*by, "model"))
        shown = "  ".join(f"{score} {line[score]:8.3f} ± {line[f'{score}_se']:.3f}" for score in scores)
        print(f"{name} {line['runs']:2d}  {shown}")


def standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN of one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["regression", "classification"])
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if "regression" in args.parts:
        jobs = []
        for dataset in args.datasets:
            large = len(bdl.datasets.load(f"uci:{dataset}").y) > 2000
            splits = min(args.splits, MOST_SPLITS_OF_LARGE) if large else args.splits
            jobs += [
                (dataset, m, i, size) for size in ("small", "full") for i in range(splits) for m in REGRESSION_MODELS
            ]
        work_through(REGRESSION, ("dataset", "model", "split", "size"), jobs, run_regression)
        scores = ("NLPD", "RMSE", "coverage 90%")
        summarise(REGRESSION, ("dataset", "size", "condition", "severity"), scores, "split")
    if "classification" in args.parts:
        jobs = [(model, seed) for seed in range(args.seeds) for model in ("gp", "scale mixture")]
        work_through(DIGITS, ("model", "seed"), jobs, run_digits)
        scores = ("accuracy", "NLL", "ECE", "AUROC_entropy", "AUROC_max_prob")
        summarise(DIGITS, ("condition", "severity"), scores, "seed")


if __name__ == "__main__":
    main()
