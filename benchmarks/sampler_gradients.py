"""What one value and gradient costs on the targets of `samplers.py`: torch, torch compiled, and JAX.

Samplers spend their time there or in their own bookkeeping; this tells which. CPU microseconds a chain on one thread,
the least of five repetitions of some tens of milliseconds, without compilation. JAX runs its gradients within one
compiled loop, as its samplers do; torch is called once for each, as ours do. Peers and sides as in `samplers.py`.

    pip install -e .[bench]
    python benchmarks/sampler_gradients.py [--targets a b c d] [--chains 1 4 64]
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch and XLA start their threads)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import argparse
import csv
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe
from sampler_peers import starts
from sampler_targets import TARGETS, Target

from bayesdl.samplers.base import value_and_grad

RESULTS = pathlib.Path(__file__).parent / "results" / "sampler_gradients.csv"
REPETITIONS, SECONDS, LOOP = 5, 0.05, 50


def in_torch(target: Target, num_chains: int, *, compile: bool) -> Callable[[], Any]:
    """One evaluation."""
    evaluate, q = value_and_grad(target.log_density, compile=compile), starts(target, num_chains, 1)
    return lambda: evaluate(q)


def in_jax(target: Target, num_chains: int) -> Callable[[], Any]:
    """`LOOP` evaluations, each where the last one's gradient leads, so that none can be left out."""
    import jax

    jax.config.update("jax_enable_x64", True)
    both = jax.vmap(jax.value_and_grad(target.jax_log_density()))

    def step(q: Any, _: None) -> tuple[Any, Any]:
        value, grad = both(q)
        return q + 1e-9 * grad, value

    loop = jax.jit(lambda q: jax.lax.scan(step, q, None, length=LOOP))
    q = jax.numpy.asarray(starts(target, num_chains, 1).numpy())
    return lambda: jax.block_until_ready(loop(q))


def microseconds(call: Callable[[], Any], evaluations: int, num_chains: int) -> float:
    """CPU time of one chain's value and gradient."""
    call()  # compiles
    call()
    began = time.process_time()
    call()
    repeat = max(1, int(SECONDS / max(time.process_time() - began, 1e-6)))
    least = float("inf")
    for _ in range(REPETITIONS):
        began = time.process_time()
        for _ in range(repeat):
            call()
        least = min(least, (time.process_time() - began) / repeat)
    return 1e6 * least / evaluations / num_chains


def main() -> None:
    """All cells, a row for each target and number of chains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--chains", nargs="+", type=int, default=[1, 4, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in args.targets:
        target = TARGETS[name]()
        for num in args.chains:
            row = {"target": name, "chains": num}
            row["torch_us"] = round(microseconds(in_torch(target, num, compile=False), 1, num), 2)
            row["torch_compiled_us"] = round(microseconds(in_torch(target, num, compile=True), 1, num), 2)
            row["jax_us"] = round(microseconds(in_jax(target, num), LOOP, num), 2)
            rows.append({**row, **describe()})
            print(row, flush=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
