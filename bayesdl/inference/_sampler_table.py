"""The samplers behind `bdl.sample`, one entry of a table each: the settings that it has, and what it calls them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.models.log_density import LogDensity
from bayesdl.samplers import chees, hmc, mams, mclmc, meads, nuts, pathfinder, smc
from bayesdl.samplers._reference import GaussianReference
from bayesdl.samplers.base import Run
from bayesdl.samplers.chees import MAX_DENSE
from bayesdl.samplers.pathfinder import Approximation

_SEVERAL = 4  # chains


class Common(NamedTuple):
    """The settings that every sampler has."""

    num_warmup: int
    num_draws: int
    thin: int
    seed: int
    progress: bool
    description: str
    checkpoint: str | os.PathLike[str] | None
    max_gradients: float | None
    chain_batch: int | None
    compile: bool


class Start(NamedTuple):
    """Where chains start: positions (C, D), and what Pathfinder found where it was asked for them."""

    q: Tensor
    approximation: Approximation | None


class Sampler(NamedTuple):
    """An entry.

    Attributes:
        run: Draws from a log density from a start, given the common settings and its own.
        settings: Of the optional settings of `bdl.sample`, those that it has, by its own names for them.
        instead: What to say of the others.
    """

    run: Callable[[LogDensity, Start, Common, dict[str, Any]], Run]
    settings: dict[str, str]
    instead: str


def run(sampler: str, density: LogDensity, start: Start, common: Common, given: dict[str, Any]) -> Run:
    """The run of a sampler, with its own defaults for what is None in `given`."""
    entry = SAMPLERS[sampler]
    own = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in entry.settings:
            wanted = f'sampler="{sampler}" has no {name}.'
            fix = f"leave {name} out; {entry.instead}"
            fail(SettingError, "sample", wanted, got=f"{name}={value!r}", fix=fix)
        own[entry.settings[name]] = value
    return entry.run(density, start, common, own)


def best(num_chains: int, dim: int, given: dict[str, Any]) -> str:
    """The sampler for who names none, that has the settings given: what the benchmark of the samplers found best.

    That is MAMS. Its lengths and metric are learned from all chains, so it wants several, and in one dimension it has
    nowhere to turn.
    """
    if given["max_depth"] is not None:
        return "nuts"
    if num_chains >= _SEVERAL and dim >= 2 and given["metric"] != "low-rank":
        return "mams"
    return "nuts" if given["num_steps"] is None else "hmc"


def approximate(density: LogDensity, starts: Tensor, common: Common) -> Approximation:
    """Pathfinder from scattered points (P, D)."""
    settings = {"num_draws": 1000, "seed": common.seed, "chain_batch": common.chain_batch, "compile": common.compile}
    return pathfinder.run(density, starts, **settings)


def _chains(run_chains: Callable[..., Run], usual: str | None) -> Callable[..., Run]:
    """An entry's run from the `run` of a sampler of Markov chains; `usual` is the metric that it best starts with."""

    def run_one(density: LogDensity, start: Start, common: Common, own: dict[str, Any]) -> Run:
        kind = own.get("metric", usual)
        if start.approximation is not None and kind in ("diagonal", "dense", "low-rank"):
            dense = kind == "dense" and (density.dim <= MAX_DENSE or "metric" in own)
            own = {**own, "inverse_mass": start.approximation.inverse_mass(dense=dense)}
        return run_chains(density, start.q, **common._asdict(), **own)

    return run_one


def _particles(density: LogDensity, start: Start, common: Common, own: dict[str, Any]) -> Run:
    """SMC: the chains are islands, and the draws of a chain the particles of one."""
    islands, dim = start.q.shape
    if start.approximation is None:
        reference = GaussianReference(start.q.new_zeros(dim), start.q.new_ones(dim))
    else:
        reference = start.approximation.reference()
    settings = common._asdict()
    for name in ("num_warmup", "thin"):  # it has neither
        del settings[name]
    num_particles = settings.pop("num_draws")
    return smc.run(density, reference, num_particles=num_particles, num_islands=islands, **settings, **own).run


_TARGETS = {"target_accept": "target_accept", "metric": "metric"}
_LENGTH, _DEPTH = "num_steps bounds a trajectory", "max_depth bounds a trajectory"
SAMPLERS = {
    "hmc": Sampler(_chains(hmc.run, "diagonal"), {"num_steps": "num_steps", **_TARGETS}, _LENGTH),
    "nuts": Sampler(_chains(nuts.run, "diagonal"), {"max_depth": "max_depth", **_TARGETS}, _DEPTH),
    "chees": Sampler(_chains(chees.run, "dense"), {"num_steps": "max_steps", **_TARGETS}, _LENGTH),
    "mams": Sampler(_chains(mams.run, "dense"), {"num_steps": "max_steps", **_TARGETS}, _LENGTH),
    "mclmc": Sampler(_chains(mclmc.run, "diagonal"), {"metric": "metric"}, "it adapts step size and length by itself"),
    "meads": Sampler(_chains(meads.run, None), {}, "it has nothing to set"),
    "smc": Sampler(_particles, {"num_steps": "max_steps", **_TARGETS}, _LENGTH),
}
