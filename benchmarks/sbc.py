"""Simulation-based calibration of the samplers: ranks of known truths on three models, with 99 % ECDF bands.

(i) `hierarchical`: eight groups, non-centred, with data simulated from the prior (11 quantities).
(ii) `gp`: hyper-parameters and constant mean of a Gaussian process with 12 points.
(iii) `bnn`: a network of eight tanh units with unknown noise, on 10 points; `bnn-collapsed`: the same, its output layer
integrated out of the chains.

    python benchmarks/sbc.py [--models hierarchical gp bnn] [--samplers hmc nuts chees] [--replications 200]

Ranks are kept in a folder as they come, so that a killed run goes on where it was. Writes results/sbc.csv, one row a
quantity, and docs/images/sbc.png.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from machine import describe
from torch import Tensor

import bayesdl as bdl
from bayesdl.evaluation import SBCResult
from bayesdl.hyper import LogNormal
from bayesdl.testing import NetworkPrior, ProcessPrior, SampledDensity, sbc

HERE = pathlib.Path(__file__).parent
RESULTS, FIGURE = HERE / "results" / "sbc.csv", HERE.parent / "docs" / "images" / "sbc.png"
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
MU_SCALE, TAU_SCALE = 5.0, 10.0  # tau ~ HalfNormal(10): large enough for the eight groups to tell


def hierarchical_prior(generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """mu ~ N(0, 5), tau ~ HalfN(10), theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j)."""
    z = torch.randn(10, generator=generator, dtype=torch.float64)
    q = torch.cat([MU_SCALE * z[:1], (TAU_SCALE * z[1:2].abs()).log(), z[2:]])
    theta = q[0] + q[1].exp() * q[2:]
    y = theta + SIGMA * torch.randn(8, generator=generator, dtype=torch.float64)
    named = hierarchical_quantities(q[None, None, None], y[None])
    return {name: value[0, 0, 0] for name, value in named.items()}, y


def hierarchical_quantities(q: Tensor, y: Tensor) -> dict[str, Tensor]:
    """From positions (sets, C, N, 10) and data (sets, 8); tau by its log, and the log likelihood."""
    mu, log_tau, z = q[..., 0], q[..., 1], q[..., 2:]
    theta = mu.unsqueeze(-1) + log_tau.exp().unsqueeze(-1) * z
    fit = -0.5 * ((y[:, None, None] - theta) / SIGMA).square().sum(-1)
    return {"mu": mu, "log tau": log_tau, "theta": theta, "log likelihood": fit}


def hierarchical(y: Tensor) -> bdl.LogDensity:
    """The posterior of (mu, log tau, z) given y (sets, 8)."""

    def log_density(q: Tensor) -> Tensor:
        mu, log_tau, z = q[..., 0], q[..., 1], q[..., 2:]
        theta = mu.unsqueeze(-1) + log_tau.exp().unsqueeze(-1) * z
        prior = -0.5 * (mu / MU_SCALE) ** 2 - 0.5 * (log_tau.exp() / TAU_SCALE) ** 2 + log_tau
        errors = (y.unsqueeze(-2) - theta) / SIGMA
        return prior - 0.5 * (z.square() + errors.square()).sum(-1)

    return bdl.LogDensity(log_density, 10)


# Chains, warm-up and draws of each sampler: few long chains, or many short ones.
LENGTHS = {"hmc": (4, 150, 200), "nuts": (4, 150, 150), "chees": (16, 150, 50)}
NETWORK_LENGTHS = {"hmc": (4, 250, 400), "nuts": (4, 150, 120), "chees": (16, 120, 40)}
STEPS: dict[str, dict[str, Any]] = {"hmc": {"num_steps": 12}, "nuts": {"max_depth": 6}, "chees": {}}


def hierarchical_problem(sampler: str) -> tuple[Any, Any]:
    """A family of log densities, and its prior."""
    settings = STEPS[sampler]
    engine = SampledDensity(hierarchical, sampler, *LENGTHS[sampler], hierarchical_quantities, settings)
    return engine, hierarchical_prior


def gp_problem(sampler: str) -> tuple[Any, Any]:
    """`NUTS(gp)` and its like."""
    matern = bdl.kernels.Matern(nu=2.5, lengthscale_prior=LogNormal(-0.5, 0.7))
    kernel = bdl.kernels.Scale(matern, outputscale_prior=LogNormal(0.0, 0.7))
    model = bdl.GP(kernel, likelihood=bdl.Gaussian(prior=LogNormal(-3.0, 1.0)))
    x = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).unsqueeze(-1)
    return engine(sampler, model, LENGTHS[sampler]), ProcessPrior(model, x)


def bnn_problem(sampler: str, *, collapse: bool = False) -> tuple[Any, Any]:
    """`NUTS(bnn)` and its like, ranked by function values, noise and log likelihood."""
    model = bdl.BNN((8,), "tanh", likelihood=bdl.Gaussian(prior=LogNormal(-2.5, 0.8)))
    x = torch.linspace(-1.5, 1.5, 10, dtype=torch.float64).unsqueeze(-1)
    probes = torch.tensor([[-2.5], [-0.7], [0.1], [1.2], [2.5]], dtype=torch.float64)
    return engine(sampler, model, NETWORK_LENGTHS[sampler], collapse=collapse), NetworkPrior(model, x, probes)


def collapsed_problem(sampler: str) -> tuple[Any, Any]:
    """`NUTS(bnn, collapse=True)` and its like."""
    return bnn_problem(sampler, collapse=True)


def engine(sampler: str, model: Any, lengths: tuple[int, int, int], *, collapse: bool = False) -> Any:
    """An engine of the package with these numbers of chains, warm-up and draws."""
    num_chains, num_warmup, num_draws = lengths
    counts = {"num_chains": num_chains, "num_warmup": num_warmup, "num_draws": num_draws}
    kinds = {"hmc": bdl.HMC, "nuts": bdl.NUTS, "chees": bdl.ChEES}
    return kinds[sampler](model, standardize=False, collapse=collapse, **counts, **STEPS[sampler])


PROBLEMS: dict[str, Callable[[str], tuple[Any, Any]]] = {
    "hierarchical": hierarchical_problem,
    "gp": gp_problem,
    "bnn": bnn_problem,
    "bnn-collapsed": collapsed_problem,
}


def draw(results: dict[tuple[str, str], SBCResult]) -> None:
    """One panel for each model and sampler, every quantity a line."""
    from matplotlib.figure import Figure

    models = [m for m in PROBLEMS if any(m == found for found, _ in results)]
    samplers = [s for s in LENGTHS if any(s == found for _, found in results)]
    figure = Figure(figsize=(3.4 * len(samplers), 2.5 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(samplers), squeeze=False, sharex=True, sharey=True)
    for row, model in zip(grid, models, strict=True):
        for axes, sampler in zip(row, samplers, strict=True):
            result = results.get((model, sampler))
            if result is None:
                axes.set_axis_off()
                continue
            for name in result.names:
                result.draw(axes, name)
            for line in axes.lines:
                line.set_linewidth(0.8)
            for band in axes.collections[1:]:
                band.remove()
            outside = sum(not inside for inside in result.inside.values())
            axes.set_title(f"{model}, {sampler}: {outside} of {len(result.names)} outside", fontsize=9, loc="left")
    figure.supxlabel("rank of the truth, scaled to (0, 1)", fontsize=9.5)
    figure.supylabel("ECDF minus uniform, 99 % band", fontsize=9.5)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    """Run what is asked for, and write the table and the picture of all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--samplers", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--replications", type=int, default=200)
    parser.add_argument("--batch", type=int, default=40, help="data sets fitted at once")
    parser.add_argument(
        "--ranks", type=pathlib.Path, default=HERE / "results" / "sbc-ranks", help="folder of the ranks"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results, tables = {}, []
    for model in arguments.models:
        for sampler in arguments.samplers:
            found = sbc(
                *PROBLEMS[model](sampler),
                arguments.replications,
                num_draws=100,
                seed=2026,
                batch_size=arguments.batch,
                checkpoint=arguments.ranks / f"{model}-{sampler}",
                progress=True,
            )
            results[model, sampler] = found
            table = found.table().reset_index()
            table.insert(0, "model", model)
            table.insert(1, "sampler", sampler)
            table["replications"] = found.num_replications
            table["ranked_draws_median"] = int(found.num_ranked.median())
            tables.append(table)
            print(table.drop(columns=["model", "sampler"]).round(4).to_string(index=False), flush=True)
            everything = pd.concat(tables).assign(**describe())
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            everything.round(5).to_csv(arguments.out, index=False)
    if arguments.out == RESULTS:
        draw(results)


if __name__ == "__main__":
    main()
