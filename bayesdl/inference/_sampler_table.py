"""The samplers behind `bdl.sample`: one entry of the table each, with the settings that it has and what it calls them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl._random import child_seeds
from bayesdl.errors import SettingError, fail
from bayesdl.models.log_density import LogDensity
from bayesdl.samplers import chees, hmc, mams, mclmc, nuts, pathfinder, smc
from bayesdl.samplers._reference import GaussianReference
from bayesdl.samplers.base import Run
from bayesdl.samplers.pathfinder import Approximation

_PATHS = 16  # that Pathfinder climbs


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


def approximate(density: LogDensity, like: Tensor, common: Common, scatter: Callable[[int], Tensor]) -> Approximation:
    """Pathfinder from `_PATHS` scattered points."""
    path_seed, _ = child_seeds(common.seed, 2)
    settings = {"num_draws": 1000, "seed": path_seed, "chain_batch": common.chain_batch, "compile": common.compile}
    return pathfinder.run(density, scatter(_PATHS).to(like), **settings)


def _chains(run_chains: Callable[..., Run], *, metric_from_start: bool = True) -> Callable[..., Run]:
    """An entry's run from the `run` of a sampler of Markov chains."""

    def run_one(density: LogDensity, start: Start, common: Common, own: dict[str, Any]) -> Run:
        kind = own.get("metric", "auto")
        if start.approximation is not None and metric_from_start and kind in ("auto", "diagonal", "dense"):
            own = {**own, "inverse_mass": start.approximation.inverse_mass(dense=kind == "dense")}
            if kind == "auto":
                own["metric"] = "diagonal" if run_chains in (hmc.run, nuts.run, mclmc.run) else "auto"
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
_LENGTH = "num_steps bounds a trajectory"
SAMPLERS = {
    "hmc": Sampler(_chains(hmc.run), {"num_steps": "num_steps", **_TARGETS}, _LENGTH),
    "nuts": Sampler(_chains(nuts.run), {"max_depth": "max_depth", **_TARGETS}, "max_depth bounds a trajectory"),
    "chees": Sampler(_chains(chees.run), {"num_steps": "max_steps", **_TARGETS}, _LENGTH),
    "mams": Sampler(_chains(mams.run), {"num_steps": "max_steps", **_TARGETS}, _LENGTH),
    "mclmc": Sampler(_chains(mclmc.run), {"metric": "metric"}, "it adapts step size and length by itself"),
    "smc": Sampler(_particles, {"num_steps": "max_steps", **_TARGETS}, _LENGTH),
}
