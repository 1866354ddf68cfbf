r"""Hamiltonian Monte Carlo for Bayesian neural networks: the reference posterior that others are compared with.

Chains run side by side in one batch, share a step size (dual averaging) and a mass matrix (pooled over chains) that are
frozen after warm-up, and leave the exact posterior invariant. Weights of a network are not identified, so convergence
is judged on function values at training inputs.

Reference: Neal (2011), arXiv 1206.1901; Izmailov et al. (2021), arXiv 2104.14421.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from bayesdl import _checks, _doors
from bayesdl._random import Seed, child_seeds
from bayesdl.inference._fitting import NetworkProblem, network_problem, warn_unless
from bayesdl.models import BNN
from bayesdl.posterior import DrawsPosterior
from bayesdl.samplers import hmc
from bayesdl.samplers.base import Run, summarize


@dataclass(frozen=True)
class HMC:
    """Full-batch HMC on the weights and the noise of a network.

    Attributes:
        model: The network, its prior and its likelihood.
        num_chains: Chains, run side by side.
        num_warmup: Transitions that adapt and are dropped.
        num_draws: Draws kept from each chain.
        num_steps: Longest trajectory, in leapfrog steps; lengths are uniform on [num_steps / 2, num_steps].
        target_accept: Acceptance rate that the step size aims at.
        metric: "diagonal", "dense" (for at most a few hundred weights) or "identity".
        thin: Keep every thin-th draw.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar with step size, acceptance and divergences.
    """

    model: BNN
    num_chains: int = 4
    num_warmup: int = 500
    num_draws: int = 500
    num_steps: int = 32
    target_accept: float = 0.8
    metric: Literal["diagonal", "dense", "identity"] = "diagonal"
    thin: int = 1
    standardize: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_draws", "num_steps", "thin"):
            _checks.at_least("HMC", name, getattr(self, name), 1, integer=True)
        _checks.at_least("HMC", "num_warmup", self.num_warmup, 0, integer=True)
        _checks.inside("HMC", "target_accept", self.target_accept, 0.0, 1.0)
        _checks.choice("HMC", "metric", self.metric, ("diagonal", "dense", "identity"))

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior:
        """Sample the posterior of the network given x (*b, n, d) and y (*b, n) or (*b, n, k).

        Data sets along *b are independent and sampled at the same time, each with its own step size and metric; each
        gets the draws that it would get alone. For classification y holds labels 0, 1, ….

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: The log density is not finite at any start.

        Warns:
            ConvergenceWarning: R-hat of function values above 1.05, fewer than 100 effective draws, or divergences.

        Cost: (num_warmup + num_draws * thin) * 3/4 num_steps gradients a chain, each O(n num_weights).
        """
        problem = network_problem("HMC.fit", self.model, x, y, standardize=self.standardize)
        start_seed, run_seed = child_seeds(seed, 2)
        run = hmc.run(
            problem.space.bind(problem.x, problem.y),
            problem.starts(self.num_chains, start_seed),
            num_warmup=self.num_warmup,
            num_draws=self.num_draws,
            num_steps=self.num_steps,
            target_accept=self.target_accept,
            metric=self.metric,
            thin=self.thin,
            seed=run_seed,
            progress=self.progress,
        )
        diagnostics = self._diagnose(problem, run)
        stats = {} if problem.data.batch_shape else run.stats
        return DrawsPosterior(self.model, problem.data, problem.units, diagnostics, draws=run.draws, stats=stats)

    def _diagnose(self, problem: NetworkProblem, run: Run) -> dict[str, Any]:
        values = problem.probe_values(run.draws)
        convergence = _doors.arviz_convergence(values)
        summary = summarize(run)
        diagnostics = {
            "engine": "HMC",
            "num_data": problem.data.x.shape[-2],
            "num_weights": problem.space.network.num_weights,
            "rhat": convergence["rhat"],
            "ess_bulk": convergence["ess_bulk"],
            "ess_tail": convergence["ess_tail"],
            **summary,
            "num_gradients": run.num_gradients,
            "seconds": run.seconds,
        }
        if not problem.data.batch_shape:
            diagnostics["trace"] = {"log_density": run.stats["log_density"].tolist()}
        self._warn(diagnostics)
        return diagnostics

    def _warn(self, diagnostics: dict[str, Any]) -> None:
        total = self.num_chains * self.num_draws
        rhat, ess = diagnostics["rhat"], diagnostics["ess_bulk"]
        divergences = int(torch.as_tensor(diagnostics["divergences"]).max())
        more = "run longer (num_warmup, num_draws) or longer trajectories (num_steps)"
        warn_unless(
            not rhat > 1.05, "HMC.fit", f"chains disagree about function values (R-hat {rhat:.2f}, wanted < 1.05)", more
        )
        warn_unless(not ess < min(100, total), "HMC.fit", f"only {ess:.0f} effective draws of function values", more)
        smaller = "raise target_accept towards 0.95"
        warn_unless(divergences <= 0.01 * total, "HMC.fit", f"{divergences} divergent transitions", smaller)
