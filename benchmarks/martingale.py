"""Martingale posteriors: coverage of their 90 % intervals, and how much of a variance rollouts recover.

    python benchmarks/martingale.py [--rule gp pfn] [--replications 500]     results/martingale.csv
    python benchmarks/martingale.py --table                                  results/martingale_horizon.csv
    python benchmarks/martingale.py --picture                                docs/images/martingale_covariates.png

Coverage is of known truths. (i) `function`: f from a Gaussian process on [0, 1] (RBF, lengthscale 0.2, variance 1,
noise variance 0.01), 20 uniform inputs; the mean of f over [0, 1] and the 0.9-quantile of y at x = 0.5, with rollouts
through uniform inputs and through the urn. (ii) `population`: y ~ N(theta, 1), theta ~ N(0, 1), 20 values; the mean and
the 0.9-quantile of the population, by functionals of the completed data and by the predictive at its end. Beside the
martingale stands the exact posterior. The rule is the exact model ("gp") or the network that ships as "gp" ("pfn", on
`function` only).

Replications are kept in a folder as they come: a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from machine import describe
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning

HERE = pathlib.Path(__file__).parent
RESULTS, HORIZON = HERE / "results" / "martingale.csv", HERE / "results" / "martingale_horizon.csv"
FIGURE = HERE.parent / "docs" / "images" / "martingale_covariates.png"
LENGTHSCALE, NOISE, N = 0.2, 0.01, 20
LEVEL, QUANTILE = 0.9, 0.9
Z90 = float(torch.special.ndtri(torch.tensor(QUANTILE, dtype=torch.float64)))
GRID = torch.linspace(0, 1, 101, dtype=torch.float64).unsqueeze(-1)
Interval = tuple[float, float]


def exact_gp() -> bdl.ExactGP:
    """The process that the truths come from, hyper-parameters known."""
    kernel = bdl.kernels.RBF(lengthscale=LENGTHSCALE)
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=NOISE))
    return bdl.ExactGP(model, optimize=False, standardize=False)


def normal_rule() -> bdl.ExactGP:
    """y ~ N(theta, 1), theta ~ N(0, 1): a linear kernel at x = 1."""
    model = bdl.GP(bdl.kernels.Linear(variance=1.0), mean="zero", likelihood=bdl.Gaussian(noise_variance=1.0))
    return bdl.ExactGP(model, optimize=False, standardize=False)


def central(draws: Tensor) -> Interval:
    """The middle 90 % of draws."""
    low, high = draws.quantile(torch.tensor([0.5 - LEVEL / 2, 0.5 + LEVEL / 2], dtype=draws.dtype))
    return float(low), float(high)


def normal_interval(mean: float, sd: float) -> Interval:
    """The middle 90 % of a normal distribution."""
    z = float(torch.special.ndtri(torch.tensor(0.5 + LEVEL / 2, dtype=torch.float64)))
    return mean - z * sd, mean + z * sd


def function_problem(rule: str, covariates: str, horizon: int, rollouts: int, seed: int) -> Iterator[dict[str, Any]]:
    """One replication of (i): a truth and intervals for each quantity."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(N, 1, generator=g, dtype=torch.float64)
    points = torch.cat([x, GRID])
    f = exact_gp().model.sample_prior(points, 1, g)[0]
    y = f[:N] + NOISE**0.5 * torch.randn(N, generator=g, dtype=torch.float64)
    law = torch.rand(horizon, 1, generator=g, dtype=torch.float64) if covariates == "law" else "urn"
    inner = exact_gp() if rule == "gp" else bdl.PFN.from_pretrained("gp", update="append", precision="float32")
    posterior = bdl.Martingale(inner, rollouts, horizon, covariates=law).fit(x, y, seed=seed)
    exact = exact_gp().fit(x, y)
    many = exact.sample(GRID, (4000,), seed=seed).mean(-1)
    at = exact.predict(GRID[50:51], noise=False)
    shift = Z90 * NOISE**0.5
    yield {
        "quantity": "mean of f",
        "truth": float(f[N:].mean()),
        "interval": central(posterior.functions(rollouts)(GRID).mean(-1)),
        "exact": central(many),
    }
    low, high = normal_interval(float(at.mean), float(at.stddev))
    yield {
        "quantity": "0.9-quantile of y at 0.5",
        "truth": float(f[N + 50]) + shift,
        "interval": central(posterior.quantile_at(GRID[50:51], QUANTILE).draws[0]),
        "exact": (low + shift, high + shift),
    }


def population_problem(rule: str, covariates: str, horizon: int, rollouts: int, seed: int) -> Iterator[dict[str, Any]]:
    """One replication of (ii)."""
    g = torch.Generator().manual_seed(seed)
    theta = float(torch.randn((), generator=g, dtype=torch.float64))
    y = theta + torch.randn(N, generator=g, dtype=torch.float64)
    x = torch.ones(N, 1, dtype=torch.float64)
    posterior = bdl.Martingale(normal_rule(), rollouts, horizon, covariates=x[:1]).fit(x, y, seed=seed)
    exact = normal_interval(float(y.sum()) / (N + 1), math.sqrt(1 / (N + 1)))
    shifted = (exact[0] + Z90, exact[1] + Z90)
    found = {
        "mean, of completed data": (theta, posterior.functional("mean").draws, exact),
        "0.9-quantile, of completed data": (theta + Z90, _quantile(posterior), shifted),
        "mean, of the predictive": (theta, posterior.predict(x[:1], noise=False).draws[0], exact),
        "0.9-quantile, of the predictive": (theta + Z90, posterior.quantile_at(x[:1], QUANTILE).draws[0], shifted),
    }
    for quantity, (truth, draws, reference) in found.items():
        yield {"quantity": quantity, "truth": truth, "interval": central(draws), "exact": reference}


def _quantile(posterior: Any) -> Tensor:
    return posterior.functional("quantile", level=QUANTILE).draws


Problem = Callable[[str, str, int, int, int], Iterator[dict[str, Any]]]
# truth, rule, where the rollouts go, horizon
CASES: tuple[tuple[str, str, str, int], ...] = (
    ("function", "gp", "law", 200),
    ("function", "gp", "urn", 200),
    ("function", "pfn", "law", 80),
    ("function", "pfn", "urn", 80),
    ("population", "gp", "any", 200),
    ("population", "gp", "any", 1000),
)
PROBLEMS: dict[str, Problem] = {"function": function_problem, "population": population_problem}


def replicate(case: tuple[str, str, str, int], replications: int, rollouts: int, folder: pathlib.Path) -> pd.DataFrame:
    """All replications of a case, those that are on disk included."""
    name, rule, covariates, horizon = case
    path = folder / f"{name}-{rule}-{covariates}-{horizon}-{rollouts}.csv"
    done = pd.read_csv(path) if path.exists() else pd.DataFrame()
    rows = done.to_dict("records")
    for seed in range(int(done["seed"].max()) + 1 if len(done) else 0, replications):
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # short rollouts are the subject
            found = list(PROBLEMS[name](rule, covariates, horizon, rollouts, seed))
        for one in found:
            (low, high), (below, above) = one["interval"], one["exact"]
            hits = {"hit": low <= one["truth"] <= high, "width": high - low}
            hits |= {"exact_hit": below <= one["truth"] <= above, "exact_width": above - below}
            rows.append({"seed": seed, "quantity": one["quantity"], **hits, "seconds": time.process_time() - began})
        if seed % 25 == 24 or seed == replications - 1:
            folder.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(path.with_suffix(".part"), index=False)
            path.with_suffix(".part").replace(path)
    table = pd.DataFrame(rows)
    return table[table["seed"] < replications]


def coverage(rules: list[str], replications: int, rollouts: int, folder: pathlib.Path, out: pathlib.Path) -> None:
    """Write the table of coverages, after each case."""
    tables = []
    for case in CASES:
        if case[1] not in rules:
            continue
        raw = replicate(case, replications, rollouts, folder)
        grouped = raw.groupby("quantity", sort=False)
        table = grouped[["hit", "exact_hit", "width", "exact_width", "seconds"]].mean().reset_index()
        table["width_ratio"] = table["width"] / table["exact_width"]
        count = grouped.size().to_numpy()
        table["std_error"] = (table["hit"] * (1 - table["hit"]) / count) ** 0.5
        for i, (column, value) in enumerate(zip(("truth", "rule", "covariates", "horizon"), case, strict=True)):
            table.insert(i, column, value)
        table = table.rename(columns={"hit": "coverage", "exact_hit": "exact_coverage", "seconds": "cpu_seconds"})
        tables.append(table.assign(num_data=N, num_rollouts=rollouts, replications=count))
        print(tables[-1].round(4).to_string(index=False), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).assign(**describe()).round(5).to_csv(out, index=False)


def horizon_table(designs: int, out: pathlib.Path) -> None:
    """The share of the variance of f that rollouts recover, over 40 inputs and `designs` random designs."""
    x_new = torch.linspace(0, 1, 40, dtype=torch.float64).unsqueeze(-1)
    rows = []
    for n in (5, 20):
        for covariates in ("urn", "law"):
            for horizon in (10, 50, 200, 500):
                shares = []
                for seed in range(designs):
                    g = torch.Generator().manual_seed(1000 * n + seed)
                    x = torch.rand(n, 1, generator=g, dtype=torch.float64)
                    law = "urn" if covariates == "urn" else uniform
                    martingale = bdl.Martingale(exact_gp(), 10, horizon, covariates=law)
                    posterior = martingale.fit(x, torch.zeros(n, dtype=torch.float64), seed=seed)
                    share = posterior.horizon_coverage(x_new)
                    weight = posterior.rule.predict(x_new, noise=False).variance
                    shares.append([float((share * weight).sum() / weight.sum()), float(share.mean())])
                both = torch.tensor(shares, dtype=torch.float64)
                row = {"num_data": n, "covariates": covariates, "horizon": horizon, "designs": designs}
                for name, share in zip(("share_of_mean_variance", "mean_share"), both.T, strict=True):
                    row |= {name: float(share.mean()), f"{name}_std_error": float(share.std() / designs**0.5)}
                rows.append(row)
                print(rows[-1], flush=True)
    pd.DataFrame(rows).assign(**describe()).round(4).to_csv(out, index=False)


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """The law of inputs: uniform on [0, 1]."""
    return torch.rand(count, 1, generator=generator, dtype=torch.float64)


def picture(path: pathlib.Path) -> None:
    """The same data under the urn and under the law of inputs, beside the exact posterior."""
    from matplotlib.figure import Figure

    g = torch.Generator().manual_seed(8)
    x = torch.cat([0.08 + 0.3 * uniform(6, g), torch.tensor([[0.82]], dtype=torch.float64)])
    f = exact_gp().model.sample_prior(torch.cat([x, GRID]), 1, g)[0]
    y = f[: len(x)] + NOISE**0.5 * torch.randn(len(x), generator=g, dtype=torch.float64)
    exact, at = exact_gp().fit(x, y).predict(GRID, noise=False), GRID[:, 0]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    titles = {"urn": "rollouts revisit the observed inputs", "law": "rollouts draw new inputs from the law of x"}
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        martingale = bdl.Martingale(exact_gp(), 200, 200, covariates="urn" if name == "urn" else uniform)
        posterior = martingale.fit(x, y, seed=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            law, lines = posterior.predict(GRID, noise=False), posterior.functions(12, seed=2)(GRID)
        edges = exact.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
        axes.fill_between(at, *law.quantile([0.05, 0.95]), color="#4477aa", alpha=0.3, linewidth=0)
        axes.plot(at, lines.T, color="#4477aa", linewidth=0.6, alpha=0.8)
        axes.plot(at, edges.T, color="#222222", linestyle="--", linewidth=1.1)
        axes.plot(at, f[len(x) :], color="#cc6677", linewidth=1.6)
        axes.plot(x[:, 0], y, "o", color="#222222", markersize=4.5)
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set_xlabel("x")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("f(x)")
    first = figure.axes[0]
    first.text(0.6, 1.72, "exact posterior, 90 %", fontsize=9, color="#222222")
    line = {"arrowstyle": "-", "color": "#cc6677", "linewidth": 0.7}
    first.annotate("truth", (0.62, float(f[len(x) + 62])), (0.78, 0.8), fontsize=9, color="#cc6677", arrowprops=line)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rule", nargs="+", default=["gp"], choices=["gp", "pfn"])
    parser.add_argument("--replications", type=int, default=500)
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--table", action="store_true", help="the share of the variance by horizon")
    parser.add_argument("--designs", type=int, default=10)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--runs", type=pathlib.Path, default=HERE / "results" / "martingale-runs")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.picture:
        picture(arguments.out or FIGURE)
    elif arguments.table:
        horizon_table(arguments.designs, arguments.out or HORIZON)
    else:
        coverage(arguments.rule, arguments.replications, arguments.rollouts, arguments.runs, arguments.out or RESULTS)


if __name__ == "__main__":
    main()
