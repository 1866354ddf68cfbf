r"""Draws from a log density that has no data and no network: `bdl.sample`.

    chains = sample(lambda q: -0.5 * q.square().sum(-1), dim=3)

runs the sampler from scattered initial points and hands back draws, statistics and diagnostics.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayesdl import _checks, _doors
from bayesdl._random import Seed, Streams, child_seeds
from bayesdl.errors import ConvergenceWarning, NumericalError, SettingError, ShapeError, fail
from bayesdl.inference import _sampler_table
from bayesdl.inference._sampler_table import Common, Start
from bayesdl.models.log_density import LogDensity
from bayesdl.samplers._stuck import which_are_stuck
from bayesdl.samplers.base import LogDensityFn, Run, summarize

_MAX_DEPTH = 10
_PATHS = 16  # that Pathfinder climbs
_MAX_RHAT, _MIN_ESS, _MIN_BFMI = 1.05, 100.0, 0.3


@dataclass(frozen=True)
class Chains:
    """Draws from a log density.

    Attributes:
        draws: Unconstrained positions, (num_chains, num_draws, dim).
        values: The quantities of interest by name, each (num_chains, num_draws, *event): what `transform` made of the
            draws, else each named coordinate, else the positions under "q".
        stats: Statistics of the sampler by name, each (num_chains, num_draws); see `samplers.Run`.
        diagnostics: "rhat" (the largest over `values`), "ess_bulk" and "ess_tail" (the smallest), "divergences",
            "e_bfmi" (one per chain), "acceptance_rate", "step_size", "num_gradients" (per chain), "seconds", "engine"
            and "trace", {"log_density": chains x draws}; of all but SMC "stuck_chains", the numbers of those far below
            the others or without a move, and where groups of chains share a start "nested_rhat"; of NUTS
            "max_depth_reached" (draws whose tree was cut short), of those that have one "trajectory_length", of MCLMC
            "energy_error" (mean square per coordinate and step) and "unadjusted", of SMC "log_evidence", of a start by
            Pathfinder "pathfinder" (its khat, ELBOs and gradients, which count in "num_gradients"). "stopped_by" is
            "num_draws" or "max_gradients".
        inverse_mass: The adapted inverse mass matrix, (dim,) or (dim, dim).
        log_evidence: Log of the integral of exp(log_density), of "smc"; None for other samplers.
        density: What was drawn from.
    """

    draws: Tensor
    values: dict[str, Tensor]
    stats: dict[str, Tensor]
    diagnostics: dict[str, Any]
    inverse_mass: Tensor
    log_evidence: Tensor | None = None
    density: LogDensity | None = field(default=None, repr=False, compare=False)

    def to_arviz(self, *, seed: Seed = 0) -> Any:
        """An ArviZ DataTree: posterior (`values`), sample_stats, and what the density knows of its data.

        That is observed_data, log_likelihood and, with random numbers from `seed`, posterior_predictive.
        """
        stats = {name: value for name, value in self.stats.items() if name != "energy_change"}
        groups: dict[str, Any] = {"posterior": self.values, "sample_stats": stats}
        if self.density is not None and self.density.observed is not None:
            groups["observed_data"] = self.density.observed
            if self.density.log_likelihood is not None:
                groups["log_likelihood"] = self.density.log_likelihood(self.draws)
            if self.density.predictive is not None:
                groups["posterior_predictive"] = self.density.predictive(self.draws, seed=seed)
        return _doors.arviz_datatree(**groups)


def sample(
    log_density: LogDensityFn | LogDensity,
    dim: int | None = None,
    sampler: str | None = None,
    num_chains: int = 4,
    num_warmup: int = 1000,
    num_draws: int = 1000,
    *,
    initial: Tensor | np.ndarray | Literal["pathfinder"] | None = None,
    num_steps: int | None = None,
    max_depth: int | None = None,
    target_accept: float | None = None,
    metric: Literal["diagonal", "dense", "low-rank", "identity"] | None = None,
    thin: int = 1,
    names: tuple[str, ...] | None = None,
    transform: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    seed: Seed = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Chains:
    """Draw from an unnormalised log density on R^dim.

    Args:
        log_density: Maps positions (num_chains, dim) to values (num_chains,), differentiable by autograd; or a
            `LogDensity`, which knows its `dim`, its `names` and its `transform`.
        dim: Number of coordinates; needed unless `log_density` is a `LogDensity`.
        sampler: None for what `benchmarks/samplers.py` found best: "mams" for four chains or more in two or more
            dimensions, else "nuts" ("hmc" where `num_steps` asks for it; "nuts" where `max_depth` does). Or the name
            of a module in `samplers`: "hmc", trajectories of random length; "nuts", which end where they turn back,
            for few chains and uneven targets; "chees", one length learned for all chains, for 16 or more; "mams",
            paths of unit speed with an accept step; "mclmc", the same without, biased; "meads", one step a transition,
            for 64 chains and a large `thin`; "smc", particles carried from a Gaussian, for several modes and for the
            evidence: chains are then islands and draws their particles.
        num_chains: Chains run in one batch; many cost little more than few.
        num_warmup, num_draws: Transitions that adapt step size and metric, from all chains together; draws per chain.
        initial: Initial positions (num_chains, dim), or (dim,) for all chains; None draws each coordinate uniformly
            from (-2, 2), again where the log density is not finite (for "smc" a standard normal). "pathfinder" takes
            positions and a first metric from Gaussians that L-BFGS finds, and for "smc" the Gaussian.
        num_steps: Longest trajectory in steps, where there is one; the sampler's own default when None.
        max_depth: A trajectory of "nuts" has at most 2^max_depth points (10 when None).
        target_accept: Acceptance rate that the step size is adapted to; the sampler's own default when None.
        metric: "diagonal", "dense" (for strongly correlated coordinates), "low-rank" or "identity". None means
            "diagonal", and for "chees", "mams" and "smc" a dense one where there are positions enough to estimate it.
        thin: Keep every thin-th draw.
        names: One name per coordinate.
        transform: From draws (num_chains, num_draws, dim) to named quantities, each (num_chains, num_draws, *event);
            convergence is then judged on these, as it should be where a coordinate by itself means nothing.
        seed: Same seed, same draws.
        dtype, device, progress: Of the positions; and whether to show a bar on standard error.
        checkpoint, max_gradients, chain_batch, compile: A folder to save to and resume from (with a seed, which is not
            None), a budget of gradients per chain, how many chains to evaluate at a time, and whether by torch.compile;
            see `samplers.base`.

    Raises:
        SettingError: Unknown sampler, a setting out of range, or one that the sampler does not have.
        ShapeError: `initial`, the log density or the result of `transform` has the wrong shape.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: No finite log density found at the start.

    Warns:
        ConvergenceWarning: R-hat above 1.05 (nested R-hat, where groups of chains share a start), ESS below 100,
            E-BFMI below 0.3, divergent transitions, or more than half of the trees cut short at max_depth.
    """
    _checks.choice("sample", "sampler", sampler, (*_sampler_table.SAMPLERS, None))
    _checks.at_least("sample", "num_chains", num_chains, 1, integer=True)
    _check_resumable(checkpoint, seed)
    density = _density(log_density, dim, names, transform)
    initial_seed, run_seed = child_seeds(seed, 2)
    own = {"num_steps": num_steps, "max_depth": max_depth, "target_accept": target_accept, "metric": metric}
    sampler = sampler or _sampler_table.best(num_chains, density.dim, own)
    counts = (num_warmup, num_draws, thin, run_seed, progress, sampler.upper())
    common = Common(*counts, checkpoint, max_gradients, chain_batch, compile)
    like = torch.empty(0, dtype=dtype, device=device)
    start = _start(density, sampler, initial, num_chains, initial_seed, like, common)
    run, gradients = _run(density, sampler, start, common, own)
    return _judged(density, sampler, start, run, gradients, _MAX_DEPTH if max_depth is None else max_depth)


def _judged(density: LogDensity, sampler: str, start: Start, run: Run, gradients: int, max_depth: int) -> Chains:
    """The run with its quantities of interest and its diagnostics, and a warning where they ask for one."""
    values = _values(run.draws, density.names, density.transform)
    diagnostics = _diagnose(run, values, sampler, start.q)
    if start.approximation is not None:
        found = start.approximation
        diagnostics["num_gradients"] += gradients
        diagnostics["pathfinder"] = {"khat": found.khat, "elbo": found.elbo.tolist(), "num_gradients": gradients}
    if sampler == "nuts":
        diagnostics["max_depth_reached"] = int((run.stats["tree_depth"] >= max_depth).sum())
    _warn(diagnostics, run.draws.shape[:-1].numel())
    return Chains(run.draws, values, run.stats, diagnostics, run.inverse_mass, run.log_evidence, density)


def _start(
    density: LogDensity,
    sampler: str,
    initial: Tensor | np.ndarray | str | None,
    num_chains: int,
    seed: int,
    like: Tensor,
    common: Common,
) -> Start:
    """Where the chains start."""
    if isinstance(initial, str):
        _checks.choice("sample", "initial", initial, ("pathfinder",))
        scatter_seed, start_seed = child_seeds(seed, 2)
        found = _sampler_table.approximate(density, _scatter(density, _PATHS, scatter_seed, like), common)
        return Start(found.starts(num_chains, start_seed).to(like), found)
    if initial is not None:
        if sampler == "smc":
            wanted = 'sampler="smc" starts from a distribution, not from positions.'
            fail(SettingError, "sample", wanted, got="initial positions", fix='None, or initial="pathfinder"')
        return Start(_given_initial(initial, num_chains, density.dim, like.dtype, like.device), None)
    if sampler == "smc":
        return Start(like.new_zeros(num_chains, density.dim), None)
    return Start(_scatter(density, num_chains, seed, like), None)


def _run(density: LogDensity, sampler: str, start: Start, common: Common, own: dict[str, Any]) -> tuple[Run, int]:
    """The sampler's run, within what Pathfinder has left of the budget; and what Pathfinder took of it."""
    gradients = 0 if start.approximation is None else start.approximation.num_gradients
    if common.max_gradients is not None and gradients:
        common = common._replace(max_gradients=max(1, common.max_gradients - gradients))
    return _sampler_table.run(sampler, density, start, common, own), gradients


def _check_resumable(checkpoint: Any, seed: Seed) -> None:
    if checkpoint is not None and seed is None:
        wanted = "a run with checkpoint needs a seed, to start where it started before."
        fail(SettingError, "sample", wanted, got="seed=None", fix="pass seed=0, say")


def _density(
    log_density: LogDensityFn | LogDensity,
    dim: int | None,
    names: tuple[str, ...] | None,
    transform: Callable[[Tensor], Mapping[str, Tensor]] | None,
) -> LogDensity:
    """The density with the names and the transform that were given, if any, instead of its own."""
    if not isinstance(log_density, LogDensity):
        if dim is None:
            wanted = "dim must say how many coordinates a position has."
            fail(SettingError, "sample", wanted, got="None", fix="sample(log_density, dim=...)")
        log_density = LogDensity(log_density, dim)
    if dim not in (None, log_density.dim):
        wanted = f"dim must be {log_density.dim}, as in the LogDensity."
        fail(SettingError, "sample", wanted, got=repr(dim), fix="leave dim out")
    if transform is not None or names is not None:
        log_density = replace(log_density, names=names or log_density.names, transform=transform)
    return log_density


def _scatter(density: LogDensity, num_chains: int, seed: int, like: Tensor, tries: int = 100) -> Tensor:
    """Uniform points on (-2, 2)^dim, one per chain, drawn again for the chains whose log density is not finite."""
    streams = Streams(seed, num_chains, like.device)
    q = 4 * streams.uniform(density.dim, like=like) - 2
    for _ in range(tries):
        with torch.no_grad():
            finite = density(q).isfinite()
        if bool(finite.all()):
            break
        q = torch.where(finite.unsqueeze(-1), q, 4 * streams.uniform(density.dim, like=like) - 2)
    else:
        fail(
            NumericalError,
            "sample",
            "log_density must be finite somewhere in (-2, 2)^dim.",
            got=f"NaN or infinity at {tries} uniform points for {int((~finite).sum())} of {num_chains} chains",
            fix="pass initial= positions inside the support, or transform bounded coordinates to the whole line",
        )
    return q


def _given_initial(
    initial: Tensor | np.ndarray, num_chains: int, dim: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    start = _checks.as_tensor("sample", "initial", initial).detach().to(dtype=dtype, device=device)
    if tuple(start.shape) not in ((num_chains, dim), (dim,)):
        wanted = f"initial must have shape ({num_chains}, {dim}), or ({dim},) for all chains."
        fail(
            ShapeError, "sample", wanted, got=str(tuple(start.shape)), fix=f"num_chains={len(start)}, or another shape"
        )
    return start.expand(num_chains, dim).clone()


def _values(
    draws: Tensor, names: tuple[str, ...] | None, transform: Callable[[Tensor], Mapping[str, Tensor]] | None
) -> dict[str, Tensor]:
    if transform is None:
        return {"q": draws} if names is None else {name: draws[..., i] for i, name in enumerate(names)}
    values = dict(transform(draws))
    for name, value in values.items():
        if tuple(value.shape[:2]) != tuple(draws.shape[:2]):
            wanted = f"transform must give quantities of shape {tuple(draws.shape[:2])} + event."
            fail(
                ShapeError,
                "sample",
                wanted,
                got=f"{name} {tuple(value.shape)}",
                fix="keep the axes of chains and draws",
            )
    return values


def _diagnose(run: Run, values: dict[str, Tensor], sampler: str, initial: Tensor) -> dict[str, Any]:
    """Figures of the quantities (C, N, *event), and of the run from the positions `initial` (C, D)."""
    num_chains, num_draws = run.draws.shape[:2]
    flat = torch.cat([value.reshape(num_chains, num_draws, -1).double() for value in values.values()], -1)
    worst = _doors.arviz_convergence(flat)
    trace = {"log_density": run.stats["log_density"].tolist()}
    found = {"engine": sampler, **worst, **summarize(run), "trace": trace}
    if sampler != "smc":  # its islands have no starts, and its particles no order
        found["stuck_chains"] = which_are_stuck(run)
        nested = _doors.arviz_nested_rhat(flat, initial)
        found |= {} if nested is None else {"nested_rhat": nested}
    if run.trajectory_length is not None:
        found["trajectory_length"] = run.trajectory_length.tolist()
    if run.log_evidence is not None:
        found["log_evidence"] = run.log_evidence.tolist()
    if "energy_error" in run.stats:
        found |= {"energy_error": float(run.stats["energy_error"].mean()), "unadjusted": True}
    return found


def _warn(diagnostics: dict[str, Any], num_draws: int) -> None:
    ess = min(diagnostics["ess_bulk"], diagnostics["ess_tail"])
    bfmi = min(diagnostics["e_bfmi"])
    cut = diagnostics.get("max_depth_reached", 0)
    # R-hat asks every chain to be long, nested R-hat only those of a start together
    label, key = ("nested R-hat", "nested_rhat") if "nested_rhat" in diagnostics else ("R-hat", "rhat")
    rhat = diagnostics[key]
    doubts = [
        (rhat > _MAX_RHAT, f"{label} {rhat:.3f} above {_MAX_RHAT}: run longer"),
        (ess < _MIN_ESS, f"effective sample size {ess:.0f} below {_MIN_ESS:.0f}: draw more"),
        (bfmi < _MIN_BFMI, f"E-BFMI {bfmi:.2f} below {_MIN_BFMI}: reparametrise heavy tails and funnels"),
        (
            diagnostics["divergences"] > 0,
            f"{diagnostics['divergences']} of {num_draws} draws followed a divergence: raise target_accept, or "
            "reparametrise",
        ),
        (
            cut > 0.5 * num_draws,
            f"{cut} of {num_draws} trees were cut short at max_depth: raise it, or use a dense metric",
        ),
    ]
    told = [text for doubtful, text in doubts if doubtful]
    if told:
        warnings.warn(
            "sample: the chains are not to be trusted yet.\n  " + "\n  ".join(told), ConvergenceWarning, stacklevel=4
        )
