r"""Cyclical stochastic gradient MCMC for Bayesian neural networks: restarts that look for other modes.

After a warm-up that adapts the scales, the step size follows cosine cycles. Each cycle first descends without noise and
with large steps, then samples with small ones, and gives a few draws. One chain so visits many modes, as an ensemble
would, and samples around each. The draws are biased: nothing is ever rejected, and how often a mode is found is not its
posterior mass.

Reference: Zhang, Li, Zhang, Chen, Wilson (2020), arXiv 1902.03932.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds
from bayesdl.inference._fitting import network_problem
from bayesdl.inference._stochastic_gradient import batch_log_density, max_drift, posterior_of
from bayesdl.models import BNN
from bayesdl.posterior import DrawsPosterior
from bayesdl.samplers import cyclical


@dataclass(frozen=True)
class CyclicalSGMCMC:
    """Stochastic gradient MCMC in cosine cycles; biased, since no step is rejected.

    Attributes:
        model: The network, its prior and its likelihood.
        num_chains: Chains, run side by side, each with its own minibatches.
        num_warmup: Steps that adapt the scales, before the first cycle.
        num_cycles: Restarts of each chain.
        cycle_length: Steps in a cycle.
        draws_per_cycle: Draws kept of each cycle.
        exploration: First share of a cycle, which moves without noise; in (0, 1).
        dynamics: "sghmc", scale-adapted and with momentum, or "sgld", preconditioned.
        step_size: Step size at the start of a cycle, in the sense of `dynamics`. None: 0.03 for "sghmc", 0.01 for
            "sgld".
        friction: Share of the momentum that a step of "sghmc" loses, in (0, 1).
        batch_size: Points a step; all of them, and no gradient noise, where there are no more.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar.
        checkpoint: A folder to save the run to and to resume it from, None for none; see `samplers.base`.
        max_gradients: A budget in passes over the data for each chain, warm-up included; the run ends when it is spent.
        chain_batch: How many chains to evaluate at a time, which bounds the memory; None for all.
        compile: Whether value and gradient go through torch.compile.
    """

    model: BNN
    num_chains: int = 4
    num_warmup: int = 2000
    num_cycles: int = 5
    cycle_length: int = 1000
    draws_per_cycle: int = 40
    exploration: float = 0.5
    dynamics: Literal["sghmc", "sgld"] = "sghmc"
    step_size: float | None = None
    friction: float = 0.05
    batch_size: int = 128
    standardize: bool = True
    progress: bool = False
    checkpoint: str | None = None
    max_gradients: float | None = None
    chain_batch: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        _checks.at_least("CyclicalSGMCMC", "num_warmup", self.num_warmup, 0, integer=True)
        for name in ("num_chains", "num_cycles", "draws_per_cycle", "batch_size"):
            _checks.at_least("CyclicalSGMCMC", name, getattr(self, name), 1, integer=True)
        _checks.at_least("CyclicalSGMCMC", "cycle_length", self.cycle_length, 2, integer=True)
        _checks.inside("CyclicalSGMCMC", "exploration", self.exploration, 0.0, 1.0)
        _checks.choice("CyclicalSGMCMC", "dynamics", self.dynamics, ("sghmc", "sgld"))
        if self.step_size is not None:
            _checks.inside("CyclicalSGMCMC", "step_size", self.step_size, 0.0, math.inf)
        _checks.inside("CyclicalSGMCMC", "friction", self.friction, 0.0, 1.0)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior:
        """Sample the posterior of the network given x (*b, n, d) and y (*b, n) or (*b, n, k), approximately.

        Data sets along *b are independent and sampled at the same time. For classification y holds labels 0, 1, ….

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: A chain is no longer finite.

        Warns:
            NumericalWarning: The noise of more than 1 % of the coordinates was switched off, or as many moves were cut.
            ConvergenceWarning: The chains disagree, or their draws are worth few independent ones.

        Cost: num_warmup + num_cycles * cycle_length gradients a chain, each O(min(n, batch_size) num_weights).
        """
        problem = network_problem("CyclicalSGMCMC.fit", self.model, x, y, standardize=self.standardize)
        start_seed, run_seed = child_seeds(seed, 2)
        run = cyclical.run(
            batch_log_density(problem),
            problem.starts(self.num_chains, start_seed),
            num_data=problem.x.shape[-2],
            num_warmup=self.num_warmup,
            num_cycles=self.num_cycles,
            cycle_length=self.cycle_length,
            draws_per_cycle=self.draws_per_cycle,
            step_size=self._step_size(),
            exploration=self.exploration,
            dynamics=self.dynamics,
            friction=self.friction,
            batch_size=self.batch_size,
            max_drift=max_drift(self.friction if self.dynamics == "sghmc" else 1.0),
            seed=run_seed,
            progress=self.progress,
            checkpoint=self.checkpoint,
            max_gradients=self.max_gradients,
            chain_batch=self.chain_batch,
            compile=self.compile,
        )
        return posterior_of("CyclicalSGMCMC", self.model, problem, run, "cosine cycles")

    def _step_size(self) -> float:
        if self.step_size is not None:
            return self.step_size
        return 0.03 if self.dynamics == "sghmc" else 0.01
