"""Markov chain Monte Carlo on a log density: pure `init` and `step`, batched over chains, and a `run`."""

from __future__ import annotations

from bayesdl.samplers import chees, cyclical, hmc, mams, mclmc, meads, nuts, pathfinder, sghmc, sgld, smc
from bayesdl.samplers.base import LogDensityFn, Run, summarize

__all__ = [
    "LogDensityFn",
    "Run",
    "chees",
    "cyclical",
    "hmc",
    "mams",
    "mclmc",
    "meads",
    "nuts",
    "pathfinder",
    "sghmc",
    "sgld",
    "smc",
    "summarize",
]
