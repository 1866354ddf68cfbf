"""Markov chain Monte Carlo on a log density: pure `init` and `step`, batched over chains, and a `run`."""

from __future__ import annotations

from bayesdl.samplers import chees, hmc, nuts
from bayesdl.samplers.base import LogDensityFn, Run, summarize

__all__ = ["LogDensityFn", "Run", "chees", "hmc", "nuts", "summarize"]
