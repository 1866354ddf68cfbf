"""Samplers beside those of other libraries: smallest effective sample size per CPU second, CPU time per gradient.

Targets (a) to (d) are those of `sampler_targets.py`. Sides are written "sampler-chains": ours (nuts, chees, mams, hmc,
meads, and with "+compile" those with value and gradient through torch.compile), "pyro-1", and NUTS of NumPyro and
BlackJAX with one chain and with as many as ours. Everything runs on one core with one thread, in CPU time of this
process; warm-up is apart, and so is compilation: what the first of two runs took longer than the second.

    pip install -e .[bench]
    python benchmarks/samplers.py [--targets a b c d] [--sides chees-64 nuts-64 pyro-1 numpyro-64] [--seeds 1 2]

For (d) the effective sample size is that of the function at 20 places, for the others that of every coordinate. Rows
that are in the table are not measured again; `--summary` prints the ratios to Pyro, NumPyro and BlackJAX.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch and XLA start their threads)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import argparse
import csv
import importlib
import importlib.util
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from machine import describe
from sampler_peers import PEERS, Result, starts
from sampler_targets import TARGETS, Target
from torch import Tensor

from bayesdl.interop.arviz import convergence
from bayesdl.samplers.base import value_and_grad

RESULTS = pathlib.Path(__file__).parent / "results" / "samplers.csv"
SIDES = ("chees-64", "nuts-64", "mams-64", "hmc-64", "chees+compile-64", "mams+compile-64", "hmc+compile-64", "nuts-1")
SIDES += ("pyro-1", "numpyro-1", "numpyro-64", "blackjax-1", "blackjax-64")
# Transitions of warm-up and draws per chain: few for many chains, as one would run them.
LENGTHS = {"1": (300, 500), "64": (200, 100)}
PYRO_LENGTHS = {"a": (150, 100), "b": (300, 300), "c": (300, 200), "d": (12, 6)}


class Compiled:
    """A log density that keeps its compiled graphs from run to run."""

    def __init__(self, log_density: Callable[[Tensor], Tensor]) -> None:
        self._density = log_density
        self.value_and_grad = value_and_grad(log_density, compile=True)

    def __call__(self, q: Tensor) -> Tensor:
        return self._density(q)


def ours(target: Target, sampler: str, num_chains: int, num_warmup: int, num_draws: int, seed: int) -> Result:
    """A sampler of this package with its own defaults; a compiled one twice, since the first run compiles."""
    name, _, compiled = sampler.partition("+")
    module = importlib.import_module(f"bayesdl.samplers.{name}")
    start = starts(target, num_chains, seed)
    density = Compiled(target.log_density) if compiled else target.log_density
    spent = []
    for _ in range(2 if compiled else 1):
        began, cpu_began = time.perf_counter(), time.process_time()
        run = module.run(density, start, num_warmup=num_warmup, num_draws=num_draws, seed=seed)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        spent.append(cpu)
    # The run knows its wall-clock times; on one thread the share of warm-up is that in CPU time.
    warm = cpu * run.warmup_seconds / wall
    return Result(run.draws, cpu, warm, run.num_gradients, run.warmup_gradients, spent[0] - cpu if compiled else 0.0)


def row(target: Target, side: str, result: Result, seed: int) -> dict[str, Any]:
    """One line of the table."""
    found = convergence(target.judged(result.draws))
    sampling = max(result.seconds - result.warmup_seconds, 1e-9)
    warm = 0.0 if np.isnan(result.warmup_gradients) else result.warmup_gradients
    gradients = (result.gradients - warm) * result.draws.shape[0]
    ess = float(np.min(found["ess_bulk"]))
    return {
        "target": target.name,
        "side": side,
        "seed": seed,
        "chains": result.draws.shape[0],
        "draws_per_chain": result.draws.shape[1],
        "min_ess": round(ess, 1),
        "max_rhat": round(float(np.max(found["rhat"])), 4),
        "min_ess_per_cpu_s": round(ess / sampling, 2),
        "min_ess_per_cpu_s_with_warmup": round(ess / result.seconds, 2),
        "min_ess_per_cpu_s_with_compilation": round(ess / (result.seconds + result.compile_seconds), 2),
        "cpu_ms_per_1000_gradients": round(1e6 * sampling / max(gradients, 1), 2),
        "cpu_s": round(result.seconds, 2),
        "warmup_cpu_s": round(result.warmup_seconds, 2),
        "compile_cpu_s": round(result.compile_seconds, 2),
        "gradients_per_chain": int(result.gradients),
        **describe(),
        "peer": version(side.split("-")[0] + ("-ppl" if side.startswith("pyro") else "")) if is_peer(side) else "",
    }


def is_peer(side: str) -> bool:
    """Whether a side is another library's."""
    return side.split("-")[0] in PEERS


def measure(target: Target, side: str, seed: int) -> Result:
    """Run one side on one target."""
    sampler, num_chains = side.split("-")
    num_warmup, num_draws = LENGTHS["1" if int(num_chains) < 16 else "64"]
    if sampler == "pyro":
        num_warmup, num_draws = PYRO_LENGTHS[target.name]
    if sampler in PEERS:
        return PEERS[sampler](target, int(num_chains), num_warmup, num_draws, seed)
    return ours(target, sampler, int(num_chains), num_warmup, num_draws, seed)


def read() -> list[dict[str, str]]:
    """The rows so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary() -> None:
    """Medians over seeds, with the ratio of ours to each peer."""
    rows = read()
    for name in TARGETS:
        mine = [r for r in rows if r["target"] == name]
        sides = dict.fromkeys(r["side"] for r in mine)
        print(f"({name})  min-ESS per CPU second: sampling | with warm-up | with compilation | ms per 1000 gradients")
        for side in sides:
            columns = ("min_ess_per_cpu_s", "min_ess_per_cpu_s_with_warmup", "min_ess_per_cpu_s_with_compilation")
            these = [r for r in mine if r["side"] == side]
            values = [statistics.median(float(r[c]) for r in these) for c in (*columns, "cpu_ms_per_1000_gradients")]
            worst = max(float(r["max_rhat"]) for r in these)
            print(f"  {side:<12}" + " | ".join(f"{v:10.2f}" for v in values) + f"   R-hat {worst:.3f}")


def main() -> None:
    """Run what is missing of the chosen targets and sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["a", "b", "c"], choices=sorted(TARGETS))
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        summary()
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    done = {(r["target"], r["side"], r["seed"]) for r in read()}
    for name in args.targets:
        target = TARGETS[name]()
        for side in args.sides:
            if is_peer(side) and importlib.util.find_spec(side.split("-")[0]) is None:
                print(f"{side}: not installed, left out")
                continue
            for seed in args.seeds:
                if (name, side, str(seed)) in done:
                    continue
                line = row(target, side, measure(target, side, seed), seed)
                print({key: line[key] for key in list(line)[:15]}, flush=True)
                with RESULTS.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(line))
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(line)


if __name__ == "__main__":
    main()
