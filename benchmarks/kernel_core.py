"""The kernel-matrix core against GPyTorch, BoTorch, plain torch and LAPACK, side by side in one run on one thread.

- `evidence`: log marginal likelihood with all gradients, `ops.mll_and_grad` against `ExactMarginalLogLikelihood` with
  its Cholesky path forced (value and backward), and against LAPACK's `dpotrf` and `dpotri` alone, for B problems of N
  points with hyper-parameters of their own: six ARD lengthscales, outputscale, noise and constant mean, float64;
- `fit`: `ExactGP(..., num_starts=1).fit` against `fit_gpytorch_mll(SingleTaskGP)`: same data, model, priors and start;
- `fantasy`: 16 imagined values at each of 8 candidates, drawn from the posterior, and then mean and variance at 5 test
  points under each; against `fantasize` and `posterior` of a SingleTaskGP with the same hyper-parameters, caches warm;
- `nngp`: the kernel matrix of an infinitely wide relu network of depth 3 against the same formulas in plain torch;
- `memory`: what the largest of these add to the peak resident memory of a fresh process that did a small one before.

Times are CPU time of the process. The sides take turns; what they compute is compared in the same run before anything
is timed. With `--out`, rows of an earlier run that were not measured again are kept.

    python benchmarks/kernel_core.py --out benchmarks/results/kernel_core.csv
    python benchmarks/kernel_core.py --only evidence fit --max-n 200
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch and SciPy load their BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import math
import pathlib
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from machine import describe, peak_memory
from torch import Tensor

import bayesdl as bdl
from bayesdl import ops
from bayesdl.kernels import NNGP, RBF, Kernel, Matern, Scale

warnings.filterwarnings("ignore")

Run = Callable[[], Any]
# The most that the core may take relative to LAPACK alone.
FLOOR_GOALS = {
    (1, 50): (12, 12),
    (32, 50): (3.5, 3.5),
    (256, 50): (3, 3),
    (1, 200): (2.5, 3),
    (32, 200): (2.3, 2.3),
    (256, 200): (2.5, 2.5),
    (1, 2000): (1.4, 1.5),
}
NUM_COLUMNS = 6
SECTIONS = ("evidence", "fit", "fantasy", "nngp", "memory")


class Problem(NamedTuple):
    """B regression problems of N points, each with hyper-parameters of its own; one problem has no batch axis."""

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
    problem = Problem(
        x, y, 0.5 + spread[:, :6], 0.5 + spread[:, 6], 0.02 + 0.1 * spread[:, 7], 0.2 * spread[:, 8] - 0.1
    )
    return Problem(*(value.squeeze(0) for value in problem)) if batch == 1 else problem


def bayesdl_side(problem: Problem, kernel: Kernel) -> Callable[[], dict[str, Tensor]]:
    """Value and gradients in one call; the mean's gradient is that of the residual, negated and summed."""
    params = {"outputscale": problem.outputscale, "base.lengthscale": problem.lengthscale}

    def run() -> dict[str, Tensor]:
        result = ops.mll_and_grad(
            kernel.value_and_pullback, problem.x, params, problem.y - problem.mean.unsqueeze(-1), problem.noise
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

    batch = problem.x.shape[:-2]
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
    model.covar_module.base_kernel.lengthscale = problem.lengthscale.unsqueeze(-2)
    model.covar_module.outputscale = problem.outputscale
    likelihood.noise = problem.noise.unsqueeze(-1)
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
    k = kernel(problem.x, None, params) + problem.noise[..., None, None] * eye
    matrices = [matrix.numpy().copy(order="F") for matrix in k.reshape(-1, *eye.shape)]

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

    A turn is one call, or as many as take about 4 ms, as in the loop of an optimiser; the first call of a turn, which
    finds the caches full of another side's data, is not counted where there are several.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    calls: dict[str, int] = {}
    for name, run in sides.items():
        run()
        start = time.process_time()
        run()
        calls[name] = max(1, min(50, round(0.004 / max(time.process_time() - start, 1e-6))))
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


def evidence_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Marginal likelihood and gradient at every size, for RBF and Matern-5/2."""
    for (batch, n), goals in FLOOR_GOALS.items():
        for (name, base), goal in zip((("rbf", RBF()), ("matern52", Matern(nu=2.5))), goals, strict=True):
            if not args.min_n <= n <= args.max_n:
                continue
            problem = make_problem(batch, n)
            ours = bayesdl_side(problem, Scale(base))
            theirs, natural = gpytorch_side(problem, name)
            difference = compare(ours(), natural())
            sides = {"bayesdl": ours, "gpytorch": theirs, "lapack": floor_side(problem, Scale(base))}
            row = timed("evidence", batch, n, name, sides, args)
            ratio = row["bayesdl_min_ms"] / row["floor_min_ms"]
            yield row | {
                "ratio_floor": round(ratio, 3),
                "goal_floor": goal,
                "goal_other": 3,
                "gap": f"{difference:.1e}",
            }


def fit_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One GP and 32 outputs at once; `gap` is how much worse our worst objective per point is (negative: better)."""
    for n, outputs, name in ((50, 1, "rbf"), (50, 1, "matern52"), (50, 32, "rbf"), (200, 1, "rbf")):
        if n > args.max_n:
            continue
        ours, theirs = fit_sides(n, outputs, name)
        posterior, mll = ours(), theirs()
        mll.train()
        with torch.no_grad():
            wanted = mll(mll.model(*mll.model.train_inputs), mll.model.train_targets).reshape(-1)
        reached = torch.tensor(posterior.diagnostics["objective_by_start"]).reshape(-1) / n
        gap = wanted - reached
        row = timed("fit", outputs, n, name, {"bayesdl": ours, "botorch": theirs}, args)
        note = f"objective per point, mean: {float(reached.mean()):.5f}, botorch {float(wanted.mean()):.5f}"
        yield row | {"goal_other": 10 if n == 50 else "", "gap": f"{float(gap.max()):.1e}", "note": note}


def fit_sides(n: int, outputs: int, name: str) -> tuple[Run, Run]:
    """The same standardised targets, priors and starting values on both sides."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.kernels import MaternKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.priors import LogNormalPrior

    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, NUM_COLUMNS, generator=g, dtype=torch.float64)
    weights = torch.randn(NUM_COLUMNS, outputs, generator=g, dtype=torch.float64)
    y = torch.sin(3 * x @ weights) + 0.1 * torch.randn(n, outputs, generator=g, dtype=torch.float64)
    y = (y - y.mean(0)) / y.std(0)
    loc = math.sqrt(2) + 0.5 * math.log(NUM_COLUMNS)
    start = math.exp(loc - 3)  # BoTorch starts at the mode of the prior
    kernel: Kernel = RBF(lengthscale=start)
    if name == "matern52":
        kernel = Scale(Matern(nu=2.5, lengthscale=start))
    likelihood = bdl.Gaussian(noise_variance=math.exp(-5), lower=1e-4)
    engine = bdl.ExactGP(bdl.GP(kernel, likelihood=likelihood), num_starts=1, standardize=False)
    targets = y if outputs > 1 else y[:, 0]

    def covariance() -> Any:
        if name == "rbf":
            return None  # the default: RBF with one lengthscale a column and the same prior
        prior = LogNormalPrior(loc, math.sqrt(3))
        base = MaternKernel(nu=2.5, ard_num_dims=NUM_COLUMNS, lengthscale_prior=prior)
        base.lengthscale = start
        scaled = ScaleKernel(base, outputscale_prior=LogNormalPrior(1.0, 1.0))
        scaled.outputscale = 1.0
        return scaled

    def theirs() -> Any:
        model = SingleTaskGP(x, y, covar_module=covariance(), outcome_transform=None)
        return fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))

    return lambda: engine.fit(x, targets, seed=0), theirs


def fantasy_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """8 candidates, 16 fantasies of each, 5 test points; `gap` compares moments under the same imagined values."""
    for n in (50, 500):
        if n > args.max_n:
            continue
        ours, theirs, gap = fantasy_sides(n)
        row = timed("fantasy", 8 * 16, n, "rbf", {"bayesdl": ours, "botorch": theirs}, args)
        yield row | {"goal_other": 20 if n == 50 else "", "gap": f"{gap:.1e}"}


def fantasy_sides(n: int) -> tuple[Run, Run, float]:
    """Both sides, and how far their moments differ where they imagine the same."""
    from botorch.models import SingleTaskGP
    from botorch.sampling.normal import SobolQMCNormalSampler

    g = torch.Generator().manual_seed(2)
    x, x_new, xs = (torch.rand(*shape, NUM_COLUMNS, generator=g, dtype=torch.float64) for shape in ((n,), (8, 1), (5,)))
    y = torch.sin(3 * x.sum(-1)) + 0.1 * torch.randn(n, generator=g, dtype=torch.float64)
    model = SingleTaskGP(x, y[:, None], outcome_transform=None)
    model.covar_module.lengthscale, model.likelihood.noise = 0.7, 0.02
    model.mean_module.constant.data.fill_(0.1)
    model.eval()
    model.posterior(xs)
    sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    kernel, params = RBF(), {"lengthscale": torch.full((NUM_COLUMNS,), 0.7, dtype=torch.float64)}
    state = ops.condition(kernel(x, None, params), x, y - 0.1, torch.tensor(0.02, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)

    def imagined(targets: Tensor | None) -> tuple[Tensor, Tensor]:
        k_xn, k_nn = kernel(x, x_new, params), kernel(x_new, None, params)
        if targets is None:
            mean, variance = ops.marginal_moments(state, k_xn, k_nn.diagonal(dim1=-2, dim2=-1))
            z = torch.randn(16, *mean.shape, generator=generator, dtype=torch.float64)
            targets = mean + (variance + state.noise_variance).sqrt() * z
        fantasy = ops.fantasize(state, k_xn, k_nn, targets)
        at = kernel(x, xs, params), kernel(x_new, xs, params), kernel.diagonal(xs, params)
        mean, variance = ops.fantasy_moments(fantasy, *at)
        return mean + 0.1, variance

    def theirs() -> Any:
        with torch.no_grad():
            fantasies = model.fantasize(x_new, sampler)
            posterior = fantasies.posterior(xs)
            return fantasies, posterior.mean, posterior.variance

    fantasies, mean, variance = theirs()
    own_mean, own_variance = imagined(fantasies.train_targets[..., n:] - 0.1)
    pairs = ((own_mean, mean.squeeze(-1)), (own_variance, variance.squeeze(-1)))
    gap = max(float((left - right).abs().max()) for left, right in pairs)
    if not gap <= 1e-6:
        raise AssertionError(f"the moments under the same fantasies differ by {gap:.1e}")
    return lambda: imagined(None), theirs, gap


def nngp_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Depth 3, relu, 20 inputs, in both precisions."""
    n = min(2000, args.max_n)
    for dtype, goal in ((torch.float64, 0.35), (torch.float32, 0.5)):
        ours, theirs = nngp_sides(n, dtype)
        left, right = ours(), theirs()
        gap = float(((left - right).abs() / right.abs().max()).max())
        if not gap <= (1e-12 if dtype == torch.float64 else 1e-4):
            raise AssertionError(f"the kernels differ by {gap:.1e}")
        name = str(dtype).removeprefix("torch.")
        row = timed("nngp", 1, n, name, {"bayesdl": ours, "plain torch": theirs}, args)
        yield row | {"goal_other": round(1 / goal, 2), "gap": f"{gap:.1e}"}


def nngp_sides(n: int, dtype: torch.dtype) -> tuple[Run, Run]:
    """The public kernel, and its recursion out of place."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n, 20, generator=g, dtype=torch.float64).to(dtype)
    kernel = NNGP(depth=3, activation="relu", w_std=1.4, b_std=0.2)

    def plain() -> Tensor:
        k = 1.96 * (x @ x.mT) / x.shape[-1] + 0.04
        for _ in range(3):
            diagonal = k.diagonal()
            scale = (diagonal[:, None] * diagonal[None, :]).sqrt()
            c = (k / scale).clamp(-1.0, 1.0)
            angle = c.arccos()
            dual = scale * ((1 - c * c).sqrt() + (math.pi - angle) * c) / (2 * math.pi)
            k = 1.96 * dual + 0.04
        return k

    return lambda: kernel(x), plain


def memory_rows(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Each case in a process of its own; `note` says how many matrices of the problem's size the peak amounts to."""
    for case, (batch, n, size) in MEMORY_CASES.items():
        if n > args.max_n:
            continue
        row: dict[str, Any] = {"what": "memory", "batch": batch, "n": n, "case": case}
        for side in ("bayesdl", "other"):
            command = [sys.executable, __file__, "--peak-of", case, side]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            row[f"{side}_peak_mib"] = round(peak, 1)
        one = batch * n * n * size / 2**20
        ours, other = row["bayesdl_peak_mib"], row["other_peak_mib"]
        row["note"] = f"in matrices of {one:.1f} MiB: {ours / one:.1f} and {other / one:.1f}"
        print(
            f"{'memory':>8} {batch:>4} {n:>5} {case}  bayesdl {ours} MiB  other {other} MiB  {row['note']}", flush=True
        )
        yield row


MEMORY_CASES = {
    "evidence rbf": (1, 2000, 8),
    "evidence matern52": (1, 2000, 8),
    "evidence rbf batch": (256, 200, 8),
    "nngp float64": (1, 2000, 8),
    "nngp float32": (1, 2000, 4),
    "fit rbf": (1, 200, 8),
    "fantasy": (1, 500, 8),
}


def peak_of(case: str, side: str) -> None:
    """Print by how many MiB one call raises the peak resident memory, after a small call of the same kind."""

    def call(batch: int, n: int) -> Run:
        kind, _, rest = case.partition(" ")
        if kind == "evidence":
            name = rest.split()[0]
            if side == "bayesdl":
                return bayesdl_side(make_problem(batch, n), Scale(RBF() if name == "rbf" else Matern(nu=2.5)))
            return gpytorch_side(make_problem(batch, n), name)[0]
        if kind == "nngp":
            return nngp_sides(n, getattr(torch, rest))[side != "bayesdl"]
        if kind == "fit":
            return fit_sides(n, 1, rest)[side != "bayesdl"]
        return fantasy_sides(n)[side != "bayesdl"]

    call(1, 20)()
    batch, n, _ = MEMORY_CASES[case]
    run = call(batch, n)
    before = peak_memory()
    run()
    print(peak_memory() - before)


def timed(what: str, batch: int, n: int, case: str, sides: dict[str, Run], args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: ours first, then what it is compared with, then perhaps a floor."""
    times = measure(sides, args.seconds, args.repeats)
    row: dict[str, Any] = {"what": what, "batch": batch, "n": n, "case": case, "turns": len(times["bayesdl"])}
    columns = ("bayesdl", "other", "floor")
    line = f"{what:>8} {batch:>4} {n:>5} {case:>9}"
    for column, (side, values) in zip(columns, times.items(), strict=False):
        row |= {
            f"{column}_min_ms": round(min(values), 4),
            f"{column}_median_ms": round(statistics.median(values), 4),
        }
        line += f"  {side} {min(values):.3f} [{statistics.median(values):.3f}]"
    row["other"] = list(sides)[1]
    row["ratio_other"] = round(row["other_min_ms"] / row["bayesdl_min_ms"], 3)
    line += f"  other/ours {row['ratio_other']:.2f}"
    if "floor_min_ms" in row:
        line += f"  ours/floor {row['bayesdl_min_ms'] / row['floor_min_ms']:.2f}"
    print(line, flush=True)
    return row


COLUMNS = (
    *("what", "batch", "n", "case", "turns", "other", "bayesdl_min_ms", "other_min_ms", "floor_min_ms"),
    *("ratio_other", "goal_other", "ratio_floor", "goal_floor", "gap"),
    *("bayesdl_median_ms", "other_median_ms", "floor_median_ms", "bayesdl_peak_mib", "other_peak_mib", "note"),
)


def main() -> None:
    """Run the sections asked for, print the table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="which sections to run")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="CSV file to write")
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds for each row")
    parser.add_argument("--repeats", type=int, default=400, help="turns of each side at most")
    parser.add_argument("--max-n", type=int, default=2000, help="leave out larger problems")
    parser.add_argument("--min-n", type=int, default=0, help="leave out smaller problems of `evidence`")
    parser.add_argument("--peak-of", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of is not None:
        peak_of(*args.peak_of)
        return
    machine = describe() | {name: __import__(name).__version__ for name in ("gpytorch", "botorch", "scipy")}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("CPU milliseconds, minimum [median]; ratios are of minima\n")
    sections = dict(zip(SECTIONS, (evidence_rows, fit_rows, fantasy_rows, nngp_rows, memory_rows), strict=True))
    for name in SECTIONS:
        for row in sections[name](args) if name in args.only else ():
            if args.out is not None:
                write(args.out, row | machine, list(machine))


def write(path: pathlib.Path, row: dict[str, Any], machine: list[str]) -> None:
    """Add one row, in place of an earlier one of the same name."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("what", "batch", "n", "case"))

    rows = {}
    if path.exists():
        with path.open(newline="") as handle:
            rows = {key(old): old for old in csv.DictReader(handle)}
    rows[key(row)] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=[*COLUMNS, *machine], restval="")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda row: SECTIONS.index(row["what"])))


if __name__ == "__main__":
    main()
