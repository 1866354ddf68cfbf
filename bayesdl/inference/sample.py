r"""Draws from a log density that has no data and no network: `bdl.sample`.

    chains = sample(lambda q: -0.5 * q.square().sum(-1), dim=3)

runs the sampler from scattered initial points and hands back draws, statistics and diagnostics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from bayesdl import _checks, _doors
from bayesdl._random import Seed, Streams, child_seeds
from bayesdl.errors import ConvergenceWarning, NumericalError, SettingError, ShapeError, fail
from bayesdl.models.log_density import LogDensity
from bayesdl.samplers import chees, hmc, nuts
from bayesdl.samplers.base import LogDensityFn, Run, summarize

_SAMPLERS = ("hmc", "nuts", "chees")
_MAX_DEPTH = 10
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
            and "trace", {"log_density": chains x draws}; of NUTS also "max_depth_reached" (draws whose tree was cut
            short), of ChEES-HMC "trajectory_length".
        inverse_mass: The adapted inverse mass matrix, (dim,) or (dim, dim).
    """

    draws: Tensor
    values: dict[str, Tensor]
    stats: dict[str, Tensor]
    diagnostics: dict[str, Any]
    inverse_mass: Tensor

    def to_arviz(self) -> Any:
        """An ArviZ DataTree with the groups posterior (`values`) and sample_stats."""
        stats = {name: value for name, value in self.stats.items() if name != "energy_change"}
        return _doors.arviz_datatree(posterior=self.values, sample_stats=stats)


def sample(
    log_density: LogDensityFn | LogDensity,
    dim: int | None = None,
    sampler: str = "hmc",
    num_chains: int = 4,
    num_warmup: int = 1000,
    num_draws: int = 1000,
    *,
    initial: Tensor | np.ndarray | None = None,
    num_steps: int | None = None,
    max_depth: int | None = None,
    target_accept: float | None = None,
    metric: Literal["diagonal", "dense", "identity"] | None = None,
    thin: int = 1,
    names: tuple[str, ...] | None = None,
    transform: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    seed: Seed = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Chains:
    """Draw from an unnormalised log density on R^dim.

    Args:
        log_density: Maps positions (num_chains, dim) to values (num_chains,), differentiable by autograd; or a
            `LogDensity`, which knows its `dim` and `names`.
        dim: Number of coordinates; needed unless `log_density` is a `LogDensity`.
        sampler: "hmc", Hamiltonian Monte Carlo with trajectories of random length (`samplers.hmc`); "nuts", whose
            trajectories end where they turn back (`samplers.nuts`), for few chains and uneven targets; "chees", whose
            chains learn one length for all (`samplers.chees`), for 16 chains or more.
        num_chains: Chains run in one batch; many cost little more than few.
        num_warmup: Transitions that adapt the step size and the metric, from all chains together.
        num_draws: Draws kept per chain.
        initial: Initial positions (num_chains, dim), or (dim,) for all chains; None draws each coordinate uniformly
            from (-2, 2), again where the log density is not finite.
        num_steps: Longest trajectory in leapfrog steps, of "hmc" (32 when None) and "chees" (1000).
        max_depth: A trajectory of "nuts" has at most 2^max_depth points (10 when None).
        target_accept: Acceptance rate that the step size is adapted to: None means 0.8 for the mean, and for "chees"
            0.651 for the harmonic mean.
        metric: "diagonal", "dense" (for strongly correlated coordinates) or "identity". None means "diagonal", and for
            "chees" a dense metric where the chains give enough positions to estimate it, up to 500 coordinates.
        thin: Keep every thin-th draw.
        names: One name per coordinate.
        transform: From draws (num_chains, num_draws, dim) to named quantities, each (num_chains, num_draws, *event);
            convergence is then judged on these, as it should be where a coordinate by itself means nothing.
        seed: Same seed, same draws.
        dtype: Of the positions.
        device: Where to run.
        progress: Show a bar on standard error.

    Raises:
        SettingError: Unknown sampler, a setting out of range, or one that the sampler does not have.
        ShapeError: `initial`, the log density or the result of `transform` has the wrong shape.
        NumericalError: No finite log density found at the start.

    Warns:
        ConvergenceWarning: R-hat above 1.05, ESS below 100, E-BFMI below 0.3, divergent transitions, or
            more than half of the trees cut short at max_depth.
    """
    _checks.choice("sample", "sampler", sampler, _SAMPLERS)
    _checks.at_least("sample", "num_chains", num_chains, 1, integer=True)
    density = _density(log_density, dim, names)
    initial_seed, run_seed = child_seeds(seed, 2)
    if initial is None:
        like = torch.empty(0, dtype=dtype, device=device)
        start = _scatter(density, num_chains, initial_seed, like)
    else:
        start = _given_initial(initial, num_chains, density.dim, dtype, device)
    common = _Common(num_warmup, num_draws, thin, run_seed, progress, sampler.upper())
    run = _run(sampler, density, start, common, num_steps, max_depth, target_accept, metric)
    values = _values(run.draws, density.names, transform)
    diagnostics = _diagnose(run, values, sampler)
    if sampler == "nuts":
        cut = run.stats["tree_depth"] >= (_MAX_DEPTH if max_depth is None else max_depth)
        diagnostics["max_depth_reached"] = int(cut.sum())
    _warn(diagnostics, num_chains * num_draws)
    return Chains(run.draws, values, run.stats, diagnostics, run.inverse_mass)


class _Common(NamedTuple):
    """The settings that every sampler has."""

    num_warmup: int
    num_draws: int
    thin: int
    seed: int
    progress: bool
    description: str


def _run(
    sampler: str,
    density: LogDensity,
    start: Tensor,
    common: _Common,
    num_steps: int | None,
    max_depth: int | None,
    target_accept: float | None,
    metric: str | None,
) -> Run:
    """The sampler's own run, with its own defaults where None was given."""
    shared: dict[str, Any] = common._asdict()
    if sampler != "nuts" and max_depth is not None:
        _foreign("max_depth", max_depth, sampler, "num_steps")
    if sampler == "nuts" and num_steps is not None:
        _foreign("num_steps", num_steps, sampler, "max_depth")
    if target_accept is not None:
        shared["target_accept"] = target_accept
    if metric is not None:
        shared["metric"] = metric
    if sampler == "nuts":
        return nuts.run(density, start, max_depth=_MAX_DEPTH if max_depth is None else max_depth, **shared)
    if sampler == "chees":
        return chees.run(density, start, max_steps=1000 if num_steps is None else num_steps, **shared)
    return hmc.run(density, start, num_steps=32 if num_steps is None else num_steps, **shared)


def _foreign(name: str, value: Any, sampler: str, own: str) -> NoReturn:
    wanted = f'sampler="{sampler}" has no {name}.'
    fail(SettingError, "sample", wanted, got=f"{name}={value!r}", fix=f"leave {name} out; {own} bounds a trajectory")


def _density(log_density: LogDensityFn | LogDensity, dim: int | None, names: tuple[str, ...] | None) -> LogDensity:
    if not isinstance(log_density, LogDensity):
        if dim is None:
            wanted = "dim must say how many coordinates a position has."
            fail(SettingError, "sample", wanted, got="None", fix="sample(log_density, dim=...)")
        return LogDensity(log_density, dim, names)
    if dim not in (None, log_density.dim):
        wanted = f"dim must be {log_density.dim}, as in the LogDensity."
        fail(SettingError, "sample", wanted, got=repr(dim), fix="leave dim out")
    return log_density if names is None else LogDensity(log_density.fn, log_density.dim, names)


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


def _diagnose(run: Run, values: dict[str, Tensor], sampler: str) -> dict[str, Any]:
    num_chains, num_draws = run.draws.shape[:2]
    flat = torch.cat([value.reshape(num_chains, num_draws, -1).double() for value in values.values()], -1)
    worst = _doors.arviz_convergence(flat)
    trace = {"log_density": run.stats["log_density"].tolist()}
    found = {"engine": sampler, **worst, **summarize(run), "trace": trace}
    if run.trajectory_length is not None:
        found["trajectory_length"] = run.trajectory_length.tolist()
    return found


def _warn(diagnostics: dict[str, Any], num_draws: int) -> None:
    ess = min(diagnostics["ess_bulk"], diagnostics["ess_tail"])
    bfmi = min(diagnostics["e_bfmi"])
    cut = diagnostics.get("max_depth_reached", 0)
    doubts = [
        (diagnostics["rhat"] > _MAX_RHAT, f"R-hat {diagnostics['rhat']:.3f} above {_MAX_RHAT}: run longer"),
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
            "sample: the chains are not to be trusted yet.\n  " + "\n  ".join(told), ConvergenceWarning, stacklevel=3
        )
