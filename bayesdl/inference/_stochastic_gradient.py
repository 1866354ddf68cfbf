"""What the stochastic-gradient engines share: a network as a log density of minibatches, and the verdict on a run."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from bayesdl import _doors
from bayesdl.errors import NumericalWarning
from bayesdl.inference._fitting import NetworkProblem, warn_unless
from bayesdl.models import BNN
from bayesdl.posterior import DrawsPosterior
from bayesdl.samplers.stochastic import BatchLogDensity, StochasticRun

_RARE = 0.01


def max_drift(friction: float) -> float:
    """The most that one gradient may change the momentum of a coordinate: it then carries it one prior width.

    Coordinates have prior width 1, and momentum of friction a travels 1 / a times as far as its first step; a is 1
    where there is none. A step that resolves the posterior stays far below; one beside a cliff, such as networks have
    where the noise is small, would throw the chain so far away that it never returns.
    """
    return friction


def batch_log_density(problem: NetworkProblem) -> BatchLogDensity:
    """The log posterior of q (*b, C, D) from all data, or estimated from a minibatch (C, n) for each chain."""
    x, y, space = problem.x, problem.y, problem.space
    whole = space.bind(x, y)

    def log_density(q: Tensor, rows: Tensor | None) -> Tensor:
        if rows is None:
            return whole(q)
        # chains that look at different points become data sets of one chain each
        part = space.bind(x[..., rows, :], y[..., rows, :], x.shape[-2] / rows.shape[-1])
        return part(q.unsqueeze(-2)).squeeze(-1)

    return log_density


def posterior_of(engine: str, model: BNN, problem: NetworkProblem, run: StochasticRun, schedule: str) -> DrawsPosterior:
    """The draws as a posterior, with diagnostics on function values and warnings where they ask for them."""
    convergence = _doors.arviz_convergence(problem.probe_values(run.draws))
    diagnostics: dict[str, Any] = {
        "engine": engine,
        "num_data": problem.data.x.shape[-2],
        "num_weights": problem.space.network.num_weights,
        **convergence,
        "step_size": {"schedule": schedule, "first": run.step_sizes[0], "last": run.step_sizes[-1]},
        "clipped_fraction": run.clipped_fraction,
        "noise_clamped_fraction": run.noise_clamped_fraction,
        "num_batches": run.num_batches,
        "num_gradients": run.num_gradients,
        "stopped_by": run.stopped_by,
        "seconds": run.seconds,
    }
    single = not problem.data.batch_shape
    if single:
        diagnostics["trace"] = {"log_density_estimate": run.trace.tolist()}
    _warn(f"{engine}.fit", diagnostics, run.draws.shape[-3] * run.draws.shape[-2])
    stats = run.stats if single else {}
    return DrawsPosterior(model, problem.data, problem.units, diagnostics, draws=run.draws, stats=stats)


def _warn(where: str, diagnostics: dict[str, Any], total: int) -> None:
    rhat, ess = diagnostics["rhat"], diagnostics["ess_bulk"]
    more = "run longer (more warm-up, a larger thin), or take bdl.HMC as a reference"
    warn_unless(not rhat > 1.1, where, f"chains disagree about function values (R-hat {rhat:.2f}, wanted < 1.1)", more)
    warn_unless(not ess < min(100, total), where, f"only {ess:.0f} effective draws of function values", more)
    for name, problem, remedy in (
        (
            "noise_clamped_fraction",
            "the noise was switched off for {:.0%} of the coordinates, because the gradients are too large for this "
            "step size; their spread is that of minibatch gradients, not of the posterior",
            "lower step_size, raise friction or raise batch_size until step_size^2 sqrt(v) < 2 friction",
        ),
        ("clipped_fraction", "{:.0%} of the moves were cut at one prior width", "lower step_size"),
    ):
        if diagnostics[name] > _RARE:
            warnings.warn(f"{where}: {problem.format(diagnostics[name])}; {remedy}", NumericalWarning, stacklevel=4)
