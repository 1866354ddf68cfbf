"""Samplers beside those of other libraries: smallest effective sample size per CPU second, CPU time per gradient.

Targets: (a) a Gaussian of 50 dimensions in a random basis, covariance eigenvalues from 1e-2 to 1e2; (b) eight schools,
non-centred, 10 dimensions; (c) a logistic regression, n = 1000, 25 coefficients; (d) a network 1-50-1 with tanh,
n = 100, noise 0.1, 151 weights. Sides: NUTS with one chain and with four, ChEES-HMC with 64 chains, and Pyro's NUTS
with one. One thread, CPU time of this process, warm-up apart.

    python benchmarks/samplers.py --targets a b c --out benchmarks/results/samplers.csv

For (d) the effective sample size is that of the function at 20 places, for the others that of every coordinate.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import math
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from machine import describe
from torch import Tensor

from bayesdl.interop.arviz import convergence
from bayesdl.samplers import chees, nuts

warnings.filterwarnings("ignore")


class Target(NamedTuple):
    """A batched log density (C, dim) -> (C,), and the quantities (..., num) on which convergence is judged."""

    name: str
    dim: int
    log_density: Callable[[Tensor], Tensor]
    judged: Callable[[Tensor], Tensor]


class Result(NamedTuple):
    """Draws (C, N, dim) with CPU seconds and gradients, per chain, of the whole and of warm-up alone."""

    draws: Tensor
    seconds: float
    warmup_seconds: float
    gradients: float
    warmup_gradients: float
    chains: int


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian() -> Target:
    """(a) Rotated, condition 1e4."""
    basis = torch.linalg.qr(_normal(50, 50, seed=0))[0]
    precision = basis @ torch.diag(torch.logspace(2, -2, 50, dtype=torch.float64)) @ basis.T
    return Target("a", 50, lambda q: -0.5 * ((q @ precision) * q).sum(-1), lambda q: q)


def eight_schools() -> Target:
    """(b) mu ~ N(0, 5), tau ~ HalfCauchy(5), theta = mu + tau z."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)

    def log_density(q: Tensor) -> Tensor:
        z, mu, log_tau = q[..., :8], q[..., 8], q[..., 9]
        tau = log_tau.exp()
        error = (y - mu.unsqueeze(-1) - tau.unsqueeze(-1) * z) / sigma
        prior = -0.5 * (mu / 5).square() - torch.log1p((tau / 5).square()) + log_tau
        return prior - 0.5 * (z.square().sum(-1) + error.square().sum(-1))

    return Target("b", 10, log_density, lambda q: q)


def logistic() -> Target:
    """(c) Standard normal covariates and prior."""
    x, beta = _normal(1000, 25, seed=1), _normal(25, seed=2)
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    signed = x * (2.0 * (uniform < torch.sigmoid(x @ beta)) - 1).unsqueeze(-1)

    def log_density(q: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(q @ signed.T).sum(-1) - 0.5 * q.square().sum(-1)

    return Target("c", 25, log_density, lambda q: q)


def network() -> Target:
    """(d) Weights ~ N(0, 1), the read-out divided by sqrt(50)."""
    x = torch.linspace(-2, 2, 100, dtype=torch.float64)
    y = torch.sin(2 * x) + 0.1 * _normal(100, seed=4)

    def forward(q: Tensor, at: Tensor) -> Tensor:
        hidden = torch.tanh(at.unsqueeze(-1) * q[..., None, :50] + q[..., None, 50:100])
        return (hidden @ q[..., 100:150].unsqueeze(-1)).squeeze(-1) / math.sqrt(50) + q[..., 150:]

    def log_density(q: Tensor) -> Tensor:
        return -0.5 * ((y - forward(q, x)) / 0.1).square().sum(-1) - 0.5 * q.square().sum(-1)

    return Target("d", 151, log_density, lambda q: forward(q, torch.linspace(-2.5, 2.5, 20, dtype=torch.float64)))


TARGETS = {"a": gaussian, "b": eight_schools, "c": logistic, "d": network}


def ours(target: Target, sampler: str, num_chains: int, num_warmup: int, num_draws: int, seed: int) -> Result:
    """NUTS or ChEES-HMC of this package, from points scattered on (-2, 2)."""
    module = {"nuts": nuts, "chees": chees}[sampler]
    generator = torch.Generator().manual_seed(seed)
    start = 4 * torch.rand(num_chains, target.dim, generator=generator, dtype=torch.float64) - 2

    settings: dict[str, object] = {"seed": seed}
    began = time.process_time()
    warm = module.run(target.log_density, start, num_warmup=num_warmup, num_draws=1, **settings)
    warmup_seconds = time.process_time() - began
    settings |= {"step_size": warm.step_size, "inverse_mass": warm.inverse_mass, "num_warmup": 0}
    settings["metric"] = "dense" if warm.inverse_mass.ndim == 2 else "diagonal"
    if warm.trajectory_length is not None:
        settings["trajectory_length"] = warm.trajectory_length
    began = time.process_time()
    run = module.run(target.log_density, warm.draws[:, -1], num_draws=num_draws, **settings)
    seconds = time.process_time() - began
    gradients = warm.num_gradients + run.num_gradients
    return Result(run.draws, warmup_seconds + seconds, warmup_seconds, gradients, warm.num_gradients, num_chains)


def pyro(target: Target, num_warmup: int, num_draws: int, seed: int) -> Result:
    """Pyro's NUTS with its default (diagonal) mass matrix on the same potential, one chain."""
    from pyro import set_rng_seed
    from pyro.infer import MCMC, NUTS

    calls, at_draw = 0, []

    def potential(params: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return -target.log_density(params["q"].unsqueeze(0)).squeeze(0)

    def hook(kernel: object, samples: object, stage: str, i: int) -> None:
        at_draw.append((stage.lower(), time.process_time(), calls))

    set_rng_seed(seed)
    start = 4 * torch.rand(target.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2
    kernel = NUTS(potential_fn=potential)
    mcmc = MCMC(kernel, num_draws, num_warmup, initial_params={"q": start}, disable_progbar=True, hook_fn=hook)
    began = time.process_time()
    mcmc.run()
    seconds = time.process_time() - began
    warm = [entry for entry in at_draw if entry[0].startswith("warm")][-1]
    return Result(mcmc.get_samples()["q"].unsqueeze(0), seconds, warm[1] - began, calls, warm[2], 1)


def row(target: Target, side: str, result: Result, seed: int) -> dict[str, object]:
    """One line of the table."""
    found = convergence(target.judged(result.draws))
    sampling = max(result.seconds - result.warmup_seconds, 1e-9)
    gradients = (result.gradients - result.warmup_gradients) * result.chains
    ess = float(np.min(found["ess_bulk"]))
    return {
        "target": target.name,
        "side": side,
        "seed": seed,
        "chains": result.chains,
        "draws_per_chain": result.draws.shape[1],
        "min_ess": round(ess, 1),
        "max_rhat": round(float(np.max(found["rhat"])), 4),
        "min_ess_per_cpu_s": round(ess / sampling, 2),
        "min_ess_per_cpu_s_with_warmup": round(ess / result.seconds, 2),
        "cpu_ms_per_1000_gradients": round(1e6 * sampling / max(gradients, 1), 2),
        "cpu_s": round(result.seconds, 2),
        "gradients_per_chain": int(result.gradients),
    }


def main() -> None:
    """Run the chosen targets and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["a", "b", "c"], choices=sorted(TARGETS))
    parser.add_argument("--sides", nargs="+", default=["chees-64", "nuts-1", "nuts-4", "pyro-1"])
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/samplers.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.targets:
        target = TARGETS[name]()
        for side in args.sides:
            sampler, num = side.split("-")
            if sampler == "pyro":
                result = pyro(target, args.warmup, args.draws, args.seed)
            else:
                result = ours(target, sampler, int(num), args.warmup, args.draws, args.seed)
            rows.append({**row(target, side, result, args.seed), **describe()})
            print({key: rows[-1][key] for key in list(rows[-1])[:12]}, flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
