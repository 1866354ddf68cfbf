"""What BNN posteriors are like, at a size that runs on two cores: long HMC, and how near cheaper methods come to it.

A network of two hidden layers of 50 tanh units on the UCI sets concrete and kin8nm (the first standard split), in
float32; `kin8nm:1000` is a thousand training rows of the latter, drawn once. The reference is full-batch HMC with 8
chains, long enough for an R-hat of function values below 1.02; on all of kin8nm its output layer is integrated out of
the chains, without which 110 000 gradients a chain leave an R-hat of 1.12. Every other method gets the same, much
smaller number of passes over the data for each of its 8 chains or members, HMC itself among them. Agreement is taken
over the predictives of y at 500 test inputs: 1 - total variation, and the 2-Wasserstein distance in units of the
standard deviation of y. The row `half against half` compares the first four chains of the reference with the last four:
nothing can be nearer than that.

    BAYESDL_DATA=... python benchmarks/bnn_posteriors.py --scratch /somewhere/that/stays [--datasets concrete]

One row is written as soon as it is known, rows that are there are not computed again, every fit is kept in
`--scratch`, and the reference keeps a checkpoint there, so that a killed run goes on where it stopped. `--fit SGHMC`
fits and writes no row, for two processes to share the work. CPU time is process time of one thread.

After Izmailov, Vikram, Hoffman, Wilson (2021), What are Bayesian neural network posteriors really like?,
arXiv 2104.14421.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe
from torch import Tensor

import bayesdl as bdl
from bayesdl.distributions import GaussianMixture
from bayesdl.evaluation import rmse, total_variation, wasserstein2

RESULTS = Path(__file__).parent / "results" / "bnn_posteriors.csv"
CHAINS, BATCH = 8, 128
NETWORK = bdl.BNN(hidden=(50, 50), activation="tanh")
TEST_INPUTS, MEMBERS = 500, 800

# Longest trajectory in leapfrog steps, transitions of warm-up and draws of the reference, and the passes over the data
# that each chain of every other method gets.
SIZES = {
    "concrete": {"num_steps": 400, "num_warmup": 120, "num_draws": 250, "passes": 6000},
    "kin8nm:1000": {"num_steps": 400, "num_warmup": 150, "num_draws": 400, "passes": 6000},
    "kin8nm": {"num_steps": 128, "num_warmup": 200, "num_draws": 1950, "passes": 2000, "collapse": True},
}


def reference(name: str, scratch: Path) -> Any:
    """Long HMC."""
    size = SIZES[name]
    return bdl.HMC(
        NETWORK,
        num_chains=CHAINS,
        num_warmup=size["num_warmup"],
        num_draws=size["num_draws"],
        num_steps=size["num_steps"],
        target_accept=0.65,
        collapse=size.get("collapse", False),
        progress=True,
        checkpoint=str(scratch / f"bnn_posteriors_{name}"),
    )


def contenders(name: str, n: int) -> dict[str, Any]:
    """Engines that spend `passes` passes over n points for each chain or member, half of them on warm-up."""
    passes = SIZES[name]["passes"]
    steps = passes * n // BATCH
    thin = max(1, steps // 2 // 200)
    stochastic = {"num_chains": CHAINS, "num_warmup": steps // 2, "num_draws": 200, "thin": thin, "batch_size": BATCH}
    half = passes // 2 // 96  # transitions: a trajectory of at most 128 steps has 96 on average
    hmc = {"num_chains": CHAINS, "num_warmup": half, "num_draws": half, "num_steps": 128}
    return {
        "HMC": bdl.HMC(NETWORK, **hmc),
        "collapsed HMC": bdl.HMC(NETWORK, **hmc, collapse=True),
        "SGHMC": bdl.SGHMC(NETWORK, **stochastic),
        "SGLD": bdl.SGLD(NETWORK, **stochastic),
        "CyclicalSGMCMC": cyclical(steps),
        "Ensemble": bdl.Ensemble(NETWORK, num_members=CHAINS, num_steps=steps, batch_size=BATCH),
    }


def cyclical(steps: int) -> Any:
    """Cyclical SG-MCMC with as many steps in all."""
    return bdl.CyclicalSGMCMC(NETWORK, num_chains=CHAINS, batch_size=BATCH, **cycles(steps))


def cycles(steps: int) -> dict[str, int]:
    """Ten cycles."""
    return {"num_cycles": 10, "cycle_length": steps // 10}


def half(predictive: GaussianMixture, which: slice) -> GaussianMixture:
    """The mixture of some of the components, at most `MEMBERS` of them at even distances."""
    loc, scale = predictive.loc[..., which], predictive.scale[..., which]
    every = max(1, loc.shape[-1] // MEMBERS)
    return GaussianMixture(loc[..., ::every], scale[..., ::every], validate_args=False)


def agreement(p: GaussianMixture, q: GaussianMixture, unit: float) -> dict[str, str]:
    """Mean agreement, and mean Wasserstein distance in units of y's standard deviation."""
    p, q = half(p, slice(None)), half(q, slice(None))
    return {
        "agreement": f"{1 - float(total_variation(p, q).mean()):.4f}",
        "wasserstein2": f"{float(wasserstein2(p, q).mean()) / unit:.4f}",
    }


def scores(posterior: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Test scores, convergence and cost of one posterior."""
    predictive = posterior.predict(x)
    found = posterior.diagnostics
    return {
        "rmse": f"{float(rmse(predictive, y)):.4f}",
        "nlpd": f"{-float(predictive.log_prob(y).mean()):.4f}",
        "rhat": f"{found['rhat']:.4f}" if "rhat" in found else "",
        "ess_bulk": f"{found['ess_bulk']:.0f}" if "ess_bulk" in found else "",
        "acceptance_rate": f"{found['acceptance_rate']:.3f}" if "acceptance_rate" in found else "",
        "divergences": found.get("divergences", ""),
        "num_gradients": round(found["num_gradients"]),
    }


class Split(NamedTuple):
    """Inputs and targets."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split_of(name: str) -> Split:
    """A data set by its name in `SIZES`, in float32."""
    source, _, rows = name.partition(":")
    data = bdl.datasets.load(f"uci:{source}")
    train, test = (~data.splits[0]).nonzero().squeeze(-1), data.splits[0].nonzero().squeeze(-1)
    if rows:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: int(rows)]]
    x, y = data.x.float(), data.y.float()
    return Split((x[train], y[train]), (x[test], y[test]))


def fitted(name: str, method: str, engine: Any, data: Split, scratch: Path, seed: int) -> tuple[Any, float]:
    """The posterior of a method and its CPU seconds, from `scratch` where it was fitted before."""
    path = scratch / f"bnn_posteriors_{name}_{method}.bdl"
    clock = path.with_suffix(".seconds")
    if not path.exists():
        began = time.process_time()
        posterior = engine.fit(*data.train, seed=seed)
        clock.write_text(f"{time.process_time() - began:.0f}", encoding="utf-8")
        posterior.save(path)
    return bdl.load(path), float(clock.read_text(encoding="utf-8"))


def run(name: str, scratch: Path) -> None:
    """All rows of one data set that are not there yet."""
    data = split_of(name)
    (_, y_train), (x, y) = data
    at, unit = x[:TEST_INPUTS], float(y_train.std())
    done = {(row["dataset"], row["method"]) for row in read()}
    long_run, _ = fitted(name, "reference", reference(name, scratch), data, scratch, 0)
    wanted = long_run.predict(at)
    common = {"dataset": name, "n_train": len(y_train), "chains": CHAINS}
    if (name, "long HMC") not in done:
        write({**common, "method": "long HMC", "passes": "", **scores(long_run, x, y), **blank()})
        parts = (slice(None, wanted.loc.shape[-1] // 2), slice(wanted.loc.shape[-1] // 2, None))
        halves = agreement(*(half(wanted, part) for part in parts), unit)
        write({**common, "method": "half against half", "passes": "", **halves})
    for method, engine in contenders(name, len(y_train)).items():
        if (name, method) in done:
            continue
        posterior, seconds = fitted(name, method, engine, data, scratch, 1)
        row = {**common, "method": method, "passes": SIZES[name]["passes"], **scores(posterior, x, y)}
        write({**row, **agreement(posterior.predict(at), wanted, unit), "cpu_seconds": f"{seconds:.0f}"})


def blank() -> dict[str, str]:
    """The columns that say how near to the reference, for the reference itself."""
    return {"agreement": "", "wasserstein2": ""}


COLUMNS = [
    *("dataset", "method", "n_train", "chains", "passes", "rmse", "nlpd", "rhat", "ess_bulk", "acceptance_rate"),
    *("divergences", "num_gradients", "agreement", "wasserstein2", "cpu_seconds"),
]


def read() -> list[dict[str, str]]:
    """The rows so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(row: dict[str, Any]) -> None:
    """Add a row, and show it."""
    print(row, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *describe()], restval="")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({**row, **describe()})


def main() -> None:
    """Compute what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--fit", nargs="+", help="only fit these methods, or `reference`, and keep them in --scratch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    args.scratch.mkdir(parents=True, exist_ok=True)
    for name in args.datasets:
        if args.fit:
            data = split_of(name)
            engines = {"reference": reference(name, args.scratch), **contenders(name, len(data.train[0]))}
            for method in args.fit:
                fitted(name, method, engines[method], data, args.scratch, 0 if method == "reference" else 1)
        else:
            run(name, args.scratch)


if __name__ == "__main__":
    main()
