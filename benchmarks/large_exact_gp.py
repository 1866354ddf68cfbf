"""Exact GP regression beyond the reach of Cholesky: `protein` with all its points, and a cost curve up to 1e6.

    BAYESDL_DATA=... python benchmarks/large_exact_gp.py protein [--engines matrix_free sparse] [--train 41157]
    python benchmarks/large_exact_gp.py curve [--sizes 1000 3162 10000 31623 100000 316228 1000000]
    python benchmarks/large_exact_gp.py picture

`protein` (45 730 points, 9 features; first of the published splits, 90 % for training) learns the hyper-parameters of a
Matern 3/2 and scores the test part in the original units, beside `SparseGP` with 1000 inducing points. The noise
variance is kept above 5 % of the variance of y in both, which bounds the condition of the kernel matrix: a random
subset would take less, since rows that nearly repeat are rare in it. Variances of
the matrix-free posterior come from 128 shared pathwise draws (relative standard error of a variance 12 %, which moves
the NLPD by less than 0.004 on average); the means are exact to the solver's tolerance.

`curve` measures time and peak memory of conditioning on n synthetic points at fixed hyper-parameters, by one
matrix-free solve to a true float64 residual of 1e-4, and of the posterior mean at 1000 points; up to 1e5 points also
the variance at 16. Inputs are uniform on a square, and the kernel is an RBF of lengthscale 1 standard deviation of
them, so that a preconditioner of fewer than 200 columns is exact up to rounding and one product with the whole matrix
confirms the solution: this is the cost of products, not of a hard problem.

Every row is a process of its own, whose peak resident memory it reports, and rows that are in the CSV are not computed
again. A protein fit writes a checkpoint at every step and a killed run goes on from it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import describe, peak_memory

import bayesdl as bdl
from bayesdl.evaluation.compare import evaluate
from bayesdl.ops import SolverConfig

RESULTS = Path(__file__).parent / "results"
PROTEIN = RESULTS / "large_exact_gp_protein.csv"
CURVE = RESULTS / "large_exact_gp_curve.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "large_exact_gp.png"
SIZES = (1000, 3162, 10_000, 31_623, 100_000, 316_228, 1_000_000)
WITH_VARIANCE_UP_TO = 100_000


def protein_row(engine: str, num_train: int | None, device: str, scratch: Path) -> dict[str, Any]:
    """Fit one engine to the training part and score the test part, in the units of the data."""
    data = bdl.datasets.load("uci:protein")
    train, test = (~data.splits[0]).nonzero().squeeze(-1), data.splits[0].nonzero().squeeze(-1)
    if num_train is not None:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:num_train]]
    x, y, x_test = data.x[train].to(device), data.y[train].to(device), data.x[test].to(device)
    name = scratch / f"protein_{engine}_{len(train)}_{torch.device(device).type}"
    fitted = name.with_suffix(".bdl")
    began, resumed = time.perf_counter(), fitted.exists() or name.with_suffix(".search").exists()
    if fitted.exists():
        posterior = bdl.load(fitted)
    else:
        posterior = _engine(engine, str(name.with_suffix(".search"))).fit(x, y, seed=0)
        posterior.save(fitted)
    fit_seconds = posterior.diagnostics["seconds"]
    began = time.perf_counter()
    predictive = posterior.predict(x_test.to(posterior._data.x.device))
    predict_seconds = time.perf_counter() - began
    cpu = type(predictive)(predictive.mean.cpu(), predictive.stddev.cpu(), validate_args=False)
    scores = evaluate(cpu, data.y[test], with_profile=False).scores
    kept = (
        "method",
        "iterations",
        "residual",
        "log_det_std_error",
        "preconditioner_rank",
        "adam_steps",
        "memory_needed",
    )
    figures = {key: posterior.diagnostics.get(key, "") for key in kept}
    evidence = posterior.log_evidence if posterior.log_evidence is not None else posterior.diagnostics.get("elbo", "")
    return {
        "engine": engine,
        "n_train": len(train),
        "n_test": len(test),
        **{key: f"{value:.6g}" for key, value in scores.items()},
        "log_evidence": f"{float(evidence):.7g}" if evidence != "" else "",
        "fit_seconds": f"{fit_seconds:.4g}",
        "predict_seconds": f"{predict_seconds:.4g}",
        "resumed": resumed,
        **figures,
        "noise_variance": f"{float(posterior.hyperparameters['noise_variance']):.4g}",
    }


def _engine(name: str, checkpoint: str) -> Any:
    likelihood = bdl.Gaussian(noise_variance=0.2, lower=0.05)
    gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5)), likelihood=likelihood)
    if name == "sparse":
        return bdl.SparseGP(gp, num_inducing=1000, num_steps=100)
    config = SolverConfig(
        rank=1000,
        tolerance=1e-3,
        variance_tolerance=3e-2,
        variance_samples=128,
        training_tolerance=0.1,
        subset_size=3000,
        num_steps=4,
        num_probes=8,
        lanczos_steps=30,
        learning_rate=0.1,
        checkpoint=checkpoint,
    )
    return bdl.ExactGP(gp, num_starts=1, solver=config)


def curve_row(n: int, device: str) -> dict[str, Any]:
    """Condition on n points and predict: seconds of each part."""
    g = torch.Generator().manual_seed(0)
    x = 2 * 3**0.5 * (torch.rand(n + 1000, 2, generator=g, dtype=torch.float64) - 0.5)
    f = (2 * x[:, 0]).sin() * x[:, 1].cos()
    y = (f + 0.1 * torch.randn(n + 1000, generator=g, dtype=torch.float64)).to(device)
    x = x.to(device)
    likelihood = bdl.Gaussian(noise_variance=0.02)
    gp = bdl.GP(bdl.kernels.RBF(lengthscale=1.0), likelihood=likelihood)
    config = SolverConfig(rank=200, tolerance=1e-4, variance_tolerance=1e-2, num_probes=0)
    engine = bdl.ExactGP(gp, optimize=False, solver=config)
    engine.fit(x[:500], y[:500]).predict(x[:8])  # whatever a first call loads
    began = time.perf_counter()
    posterior = engine.fit(x[:n], y[:n])
    fit_seconds, began = time.perf_counter() - began, time.perf_counter()
    mean = posterior.mean(x[n:])
    mean_seconds = time.perf_counter() - began
    error = float((mean.cpu() - f[n:]).square().mean().sqrt())
    row = {
        "n": n,
        "fit_seconds": f"{fit_seconds:.4g}",
        "mean_seconds": f"{mean_seconds:.4g}",
        "variance_seconds": "",
        "iterations": posterior.diagnostics["iterations"],
        "residual": f"{posterior.diagnostics['residual']:.2g}",
        "preconditioner_rank": posterior.diagnostics["preconditioner_rank"],
        "rmse_of_f": f"{error:.3g}",
        "memory_estimate_mb": round(posterior.diagnostics["memory_needed"] / 1e6),
    }
    if n <= WITH_VARIANCE_UP_TO:
        began = time.perf_counter()
        posterior.predict(x[n : n + 16])
        row["variance_seconds"] = f"{time.perf_counter() - began:.4g}"
    return row


def run_row(arguments: list[str], threads: int) -> dict[str, Any]:
    """One row in a process of its own, with that process's peak memory and the machine."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "row", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, none where there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def picture() -> None:
    """Time and peak memory against n, both on logarithmic axes, with lines of slope 1 and 2."""
    from matplotlib.figure import Figure

    rows = read(CURVE)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = sorted((r for r in rows if r["device"] == device), key=lambda r: int(r["n"]))
        n = [int(r["n"]) for r in mine]
        seconds = [float(r["fit_seconds"]) + float(r["mean_seconds"]) for r in mine]
        left.loglog(n, seconds, "o-", label=device)
        right.loglog(n, [float(r["peak_memory_mb"]) for r in mine], "o-", label=device)
        if device == rows[0]["device"]:
            left.loglog(n, [seconds[-1] * (m / n[-1]) ** 2 for m in n], ":", color="grey", label="n²")
            right.loglog(n, [8e-6 * m * m for m in n], ":", color="grey", label="the matrix itself")
    left.set(xlabel="points", ylabel="seconds", title="condition, and mean at 1000 points")
    right.set(xlabel="points", ylabel="MB", title="peak memory of the process", ylim=(100, 1e5))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    """Compute what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["protein", "curve", "picture", "row"])
    parser.add_argument("row", nargs="*", help="for row: protein ENGINE or curve N")
    parser.add_argument("--engines", nargs="+", default=["matrix_free", "sparse"], choices=["matrix_free", "sparse"])
    parser.add_argument(
        "--train", type=int, default=None, help="a random part of the training set; all of it if left out"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "bayesdl_large_exact_gp")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"{args.threads} CPU threads"
    common = ["--device", args.device, "--scratch", str(args.scratch), "--threads", str(args.threads)]
    if args.what == "row":
        args.scratch.mkdir(parents=True, exist_ok=True)
        warnings.simplefilter("default")
        kind, which = args.row
        if kind == "protein":
            row = protein_row(which, args.train, args.device, args.scratch)
        else:
            row = curve_row(int(which), args.device)
        row["peak_memory_mb"] = round(peak_memory() * 1.048576)
        if args.device != "cpu":
            row["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
        print(json.dumps({**row, "device": name, **describe()}))
    elif args.what == "protein":
        for engine in args.engines:
            size = str(args.train or 41_157)
            if not any((r["engine"], r["n_train"], r["device"]) == (engine, size, name) for r in read(PROTEIN)):
                part = ["--train", str(args.train)] if args.train else []
                append(PROTEIN, run_row(["protein", engine, *part, *common], args.threads))
    elif args.what == "curve":
        for n in args.sizes:
            if not any((r["n"], r["device"]) == (str(n), name) for r in read(CURVE)):
                append(CURVE, run_row(["curve", str(n), *common], args.threads))
        picture()
    else:
        picture()


if __name__ == "__main__":
    main()
