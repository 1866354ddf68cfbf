"""What the engines share that sample by Markov chains, all weights of a network or the hyper-parameters of a GP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks, _doors
from bayesdl._random import Seed, child_seeds
from bayesdl.errors import SettingError, fail
from bayesdl.inference._evidence import gaussian_only
from bayesdl.inference._fitting import NetworkProblem, network_problem, warn_unless
from bayesdl.inference._gp_chains import sample_gp
from bayesdl.models import BNN, GP
from bayesdl.models.bnn import collapsible
from bayesdl.posterior import DrawsPosterior, GPMixturePosterior
from bayesdl.samplers._stuck import which_are_stuck
from bayesdl.samplers.base import LogDensityFn, Run, summarize

NUM_PREDICTIVE = 64


class Longer(NamedTuple):
    """What to advise where chains have not converged, or a tree was cut short."""

    settings: str
    max_depth: int | None = None


def check_settings(engine: Any, metrics: tuple[str, ...], counts: tuple[str, ...]) -> None:
    """Refuse settings out of range: `counts` and those that all these engines have."""
    where = type(engine).__name__
    if not isinstance(engine.model, (BNN, GP)):
        wanted = "model must be a bdl.BNN or a bdl.GP."
        fix = "bdl.BNN(hidden=(50,)) or bdl.GP(bdl.kernels.Matern()); a log density goes to bdl.sample"
        fail(SettingError, where, wanted, got=_checks.describe(engine.model), fix=fix)
    if isinstance(engine.model, GP):
        gaussian_only(where, engine.model)
    if engine.collapse:
        why = "it is a GP, which has none" if isinstance(engine.model, GP) else collapsible(engine.model)
        if why is not None:
            wanted = (
                "collapse=True integrates out the output layer of a network in closed form, and of this model cannot."
            )
            fail(SettingError, where, wanted, got=why, fix="collapse=False")
        if engine.compile:
            wanted = "collapse=True factors matrices, which no compiled loop can hold."
            fail(SettingError, where, wanted, got="compile=True", fix="compile=False: its gradient has a closed form")
    for name in ("num_chains", "num_draws", "thin", "num_predictive", *counts):
        _checks.at_least(where, name, getattr(engine, name), 1, integer=True)
    _checks.at_least(where, "num_warmup", engine.num_warmup, 0, integer=True)
    if hasattr(engine, "target_accept"):
        _checks.inside(where, "target_accept", engine.target_accept, 0.0, 1.0)
    if metrics:
        _checks.choice(where, "metric", engine.metric, metrics)


_RUN = ("num_warmup", "num_draws", "thin", "progress", "checkpoint", "max_gradients", "chain_batch", "compile")


def sample_network(
    engine: Any, x: Any, y: Any, seed: Seed, run_sampler: Callable[..., Run], own: tuple[str, ...], longer: Longer
) -> DrawsPosterior | GPMixturePosterior:
    """Fit the model of `engine`, a network or a GP, to data; see `HMC.fit`.

    `run_sampler` is the `run` of its sampler, which takes those settings that all of them have, and its `own`, by the
    names that they have in the engine.
    """
    name, model = type(engine).__name__, engine.model
    where = f"{name}.fit"
    settings = {setting: getattr(engine, setting) for setting in (*_RUN, *own)}

    def run_chains(log_density: LogDensityFn, starts: Tensor, run_seed: Seed) -> Run:
        return run_sampler(log_density, starts, seed=run_seed, **settings)

    if isinstance(model, GP):

        def report(run: Run, quantities: Tensor) -> dict[str, Any]:
            found = {"engine": name, **_convergence(run, quantities, longer)}
            _warn(where, found, run, longer, "hyper-parameters")
            return found

        how = (engine.num_chains, engine.standardize, engine.num_predictive)
        return sample_gp(where, model, x, y, *how, seed, run_chains, report)
    problem = network_problem(where, model, x, y, standardize=engine.standardize)
    start_seed, run_seed, output_seed = child_seeds(seed, 3)
    starts = problem.starts(engine.num_chains, start_seed)
    if engine.collapse:
        rest = problem.space.collapse(problem.x, problem.y)
        run = run_chains(rest.bind(), rest.reduce(starts), run_seed)
        run = run._replace(draws=rest.complete(run.draws, output_seed))
    else:
        run = run_chains(problem.space.bind(problem.x, problem.y), starts, run_seed)
    diagnostics = _diagnose(name, problem, run, longer, collapsed=engine.collapse)
    _warn(where, diagnostics, run, longer)
    stats = {} if problem.data.batch_shape else run.stats
    return DrawsPosterior(model, problem.data, problem.units, diagnostics, draws=run.draws, stats=stats)


def _diagnose(name: str, problem: NetworkProblem, run: Run, longer: Longer, *, collapsed: bool) -> dict[str, Any]:
    return {
        "engine": name,
        "num_data": problem.data.x.shape[-2],
        "num_weights": problem.space.network.num_weights,
        "collapsed": collapsed,
        **_convergence(run, problem.probe_values(run.draws), longer),
    }


def _convergence(run: Run, quantities: Tensor, longer: Longer) -> dict[str, Any]:
    """The worst R-hat and ESS over quantities (C, N, *), and the health of the run."""
    worst = _doors.arviz_convergence(quantities)
    diagnostics = {**{figure: worst[figure] for figure in ("rhat", "ess_bulk", "ess_tail")}, **summarize(run)}
    diagnostics["stuck_chains"] = which_are_stuck(run)
    if run.trajectory_length is not None:
        diagnostics["trajectory_length"] = run.trajectory_length.tolist()
    if longer.max_depth is not None:
        diagnostics["max_depth_reached"] = int((run.stats["tree_depth"] >= longer.max_depth).sum())
    if run.draws.ndim == 3:
        diagnostics["trace"] = {"log_density": run.stats["log_density"].tolist()}
    return diagnostics


def _warn(
    where: str, diagnostics: dict[str, Any], run: Run, longer: Longer, quantities: str = "function values"
) -> None:
    total = run.draws.shape[-3] * run.draws.shape[-2]
    rhat, ess = diagnostics["rhat"], diagnostics["ess_bulk"]
    divergences = int(torch.as_tensor(diagnostics["divergences"]).max())
    more = f"run longer (num_warmup, num_draws){longer.settings}"
    warn_unless(not rhat > 1.05, where, f"chains disagree about {quantities} (R-hat {rhat:.2f}, wanted < 1.05)", more)
    warn_unless(not ess < min(100, total), where, f"only {ess:.0f} effective draws of {quantities}", more)
    smaller = "raise target_accept towards 0.95"
    warn_unless(divergences <= 0.01 * total, where, f"{divergences} divergent transitions", smaller)
    if longer.max_depth is not None:
        cut, draws = diagnostics["max_depth_reached"], run.stats["tree_depth"].numel()
        found = f"{cut} of {draws} trees were cut short at max_depth={longer.max_depth}"
        warn_unless(cut <= 0.5 * draws, where, found, "a longer warm-up may find a better metric, or raise max_depth")
