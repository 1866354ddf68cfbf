"""Anchor of the numerical core: one log marginal likelihood with all its gradients, against GPyTorch and LAPACK.

Three sides, alternating within one run, on one thread, measured in CPU time of this process:

- `bayesdl`: `ops.mll_and_grad` with Scale(RBF) or Scale(Matern-5/2);
- `gpytorch`: `ExactMarginalLogLikelihood` of the same model with its Cholesky path forced, value and backward;
- `floor`: LAPACK's `dpotrf` and `dpotri` (through SciPy) on every covariance of the batch, kernel not counted.

Six ARD lengthscales, outputscale, noise and constant mean, float64, independent hyper-parameters for each of B problems
of N points. Values and gradients of the first two sides are compared in the same run, before anything is timed.

    python benchmarks/core_anchor.py --out benchmarks/results/core_anchor.csv
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch and SciPy load their BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from machine import describe
from torch import Tensor

from bayesdl import ops
from bayesdl.kernels import RBF, Kernel, Matern, Scale

warnings.filterwarnings("ignore", category=DeprecationWarning)

SIZES = ((1, 50), (32, 50), (1, 200), (32, 200), (1, 2000))
NUM_COLUMNS = 6
SIDES = ("bayesdl", "gpytorch", "floor")


class Problem(NamedTuple):
    """B regression problems of N points, each with hyper-parameters of its own."""

    x: Tensor
    y: Tensor
    lengthscale: Tensor
    outputscale: Tensor
    noise: Tensor
    mean: Tensor


def make_problem(batch: int, n: int, seed: int = 0) -> Problem:
    """Inputs uniform on the cube, targets a noisy wave, hyper-parameters spread around sensible values."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, n, NUM_COLUMNS, generator=g, dtype=torch.float64)
    y = torch.sin(3 * x.sum(-1)) + 0.1 * torch.randn(batch, n, generator=g, dtype=torch.float64)
    spread = torch.rand(batch, NUM_COLUMNS + 3, generator=g, dtype=torch.float64)
    return Problem(x, y, 0.5 + spread[:, :6], 0.5 + spread[:, 6], 0.02 + 0.1 * spread[:, 7], 0.2 * spread[:, 8] - 0.1)


def bayesdl_side(problem: Problem, kernel: Kernel) -> Callable[[], dict[str, Tensor]]:
    """Value and gradients in one call; the mean's gradient is that of the residual, negated and summed."""
    params = {"outputscale": problem.outputscale, "base.lengthscale": problem.lengthscale}

    def run() -> dict[str, Tensor]:
        result = ops.mll_and_grad(
            kernel.value_and_pullback, problem.x, params, problem.y - problem.mean[:, None], problem.noise
        )
        return {
            "value": result.value,
            "lengthscale": result.params["base.lengthscale"],
            "outputscale": result.params["outputscale"],
            "noise": result.noise_variance,
            "mean": -result.residual.sum(-1),
        }

    return run


def gpytorch_side(problem: Problem, kernel: str) -> tuple[Callable[[], dict[str, Tensor]], Callable[[], dict]]:
    """The timed call (value and backward onto the raw parameters), and the same with gradients in natural units."""
    import gpytorch

    batch = torch.Size([problem.x.shape[0]])
    noise_floor = gpytorch.constraints.GreaterThan(1e-8)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=batch, noise_constraint=noise_floor)

    class Model(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(problem.x, problem.y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean(batch_shape=batch)
            settings = {"ard_num_dims": NUM_COLUMNS, "batch_shape": batch}
            base = gpytorch.kernels.RBFKernel(**settings)
            if kernel == "matern52":
                base = gpytorch.kernels.MaternKernel(nu=2.5, **settings)
            self.covar_module = gpytorch.kernels.ScaleKernel(base, batch_shape=batch)

        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    model = Model().double()
    model.train()
    model.covar_module.base_kernel.lengthscale = problem.lengthscale[:, None, :]
    model.covar_module.outputscale = problem.outputscale
    likelihood.noise = problem.noise[:, None]
    model.mean_module.constant.data.copy_(problem.mean)
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    n = problem.x.shape[-2]

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with gpytorch.settings.fast_computations(False, False, False):
            value = mll(model(problem.x), problem.y)
            value.sum().backward()
        return {"value": value.detach() * n}

    def natural() -> dict[str, Tensor]:
        out = run()
        # The slope of the constraint's softplus takes gradients from raw to natural units.
        raw = {
            "lengthscale": model.covar_module.base_kernel.raw_lengthscale,
            "outputscale": model.covar_module.raw_outputscale,
            "noise": likelihood.noise_covar.raw_noise,
        }
        for name, parameter in raw.items():
            grad = parameter.grad / torch.sigmoid(parameter.detach()) * n
            out[name] = grad.reshape(getattr(problem, name).shape)
        out["mean"] = model.mean_module.constant.grad * n
        return out

    return run, natural


def floor_side(problem: Problem, kernel: Kernel) -> Callable[[], None]:
    """Factor and inverse of every covariance, by LAPACK alone."""
    from scipy.linalg import lapack

    params = {"outputscale": problem.outputscale, "base.lengthscale": problem.lengthscale}
    eye = torch.eye(problem.x.shape[-2], dtype=torch.float64)
    k = kernel(problem.x, None, params) + problem.noise[:, None, None] * eye
    matrices = [matrix.numpy().copy(order="F") for matrix in k]

    def run() -> None:
        for matrix in matrices:
            factor, _ = lapack.dpotrf(matrix, lower=1, clean=0)
            lapack.dpotri(factor, lower=1, overwrite_c=1)

    return run


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference relative to the largest entry of each quantity; raises where it exceeds 1e-6."""
    worst = 0.0
    for name, value in theirs.items():
        worst = max(worst, float((ours[name] - value).abs().max() / value.abs().max()))
    if not worst <= 1e-6:
        raise AssertionError(f"the sides disagree by {worst:.1e}; timings would mean nothing")
    return worst


def measure(sides: dict[str, Callable[[], object]], seconds: float, repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds a call of each side, in turns, until each has had `repeats` turns or all have had `seconds`.

    A turn is one call, or as many as take about 20 ms, as in the loop of an optimiser; the first call of a turn, which
    finds the caches full of another side's data, is not counted where there are several.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    calls: dict[str, int] = {}
    for name, run in sides.items():
        run()
        start = time.process_time()
        run()
        calls[name] = max(1, min(50, round(0.02 / max(time.process_time() - start, 1e-6))))
    spent = 0.0
    while spent < seconds and min(len(t) for t in times.values()) < repeats:
        for name, run in sides.items():
            if calls[name] > 1:
                run()
            start = time.process_time()
            for _ in range(calls[name]):
                run()
            elapsed = time.process_time() - start
            times[name].append(1e3 * elapsed / calls[name])
            spent += elapsed
    return times


def main() -> None:
    """Run every size and kernel, print the table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=None, help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds for each size and kernel")
    parser.add_argument("--repeats", type=int, default=100, help="turns of each side at most")
    parser.add_argument("--max-n", type=int, default=2000, help="leave out larger problems")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe() | {
        "gpytorch": __import__("gpytorch").__version__,
        "scipy": __import__("scipy").__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("CPU milliseconds, minimum [median]; ratios are of minima\n")
    print(f"{'B':>3} {'N':>5} {'kernel':>9}" + "".join(f"{side:>21}" for side in SIDES) + "  gpytorch/us  us/floor")
    rows = []
    for batch, n in SIZES:
        for name, base in (("rbf", RBF()), ("matern52", Matern(nu=2.5))):
            if n <= args.max_n:
                rows.append(run_cell(batch, n, name, Scale(base), args.seconds, args.repeats) | machine)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def run_cell(batch: int, n: int, name: str, kernel: Kernel, seconds: float, repeats: int) -> dict[str, object]:
    """One line of the table."""
    problem = make_problem(batch, n)
    ours = bayesdl_side(problem, kernel)
    theirs, natural = gpytorch_side(problem, name)
    difference = compare(ours(), natural())
    times = measure({"bayesdl": ours, "gpytorch": theirs, "floor": floor_side(problem, kernel)}, seconds, repeats)
    low = {side: min(times[side]) for side in SIDES}
    middle = {side: statistics.median(times[side]) for side in SIDES}
    cells = "".join(f"{low[side]:>10.3f} [{middle[side]:>8.3f}]" for side in SIDES)
    ratio_gpytorch, ratio_floor = low["gpytorch"] / low["bayesdl"], low["bayesdl"] / low["floor"]
    print(f"{batch:>3} {n:>5} {name:>9}{cells} {ratio_gpytorch:>12.2f} {ratio_floor:>9.2f}", flush=True)
    row: dict[str, object] = {"batch": batch, "n": n, "kernel": name, "turns": len(times["bayesdl"])}
    row |= {f"{side}_min_ms": round(low[side], 4) for side in SIDES}
    row |= {f"{side}_median_ms": round(middle[side], 4) for side in SIDES}
    row |= {"ratio_gpytorch": round(ratio_gpytorch, 3), "ratio_floor": round(ratio_floor, 3)}
    return row | {"largest_relative_difference": f"{difference:.1e}"}


if __name__ == "__main__":
    main()
