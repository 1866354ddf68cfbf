r"""Stochastic gradient HMC for Bayesian neural networks: minibatch gradients, momentum, noise, and no accept step.

The scale-adapted form: masses follow the size of the gradients during warm-up, and are frozen for sampling. A step
costs a minibatch instead of all data. The price is bias: nothing is ever rejected, so that the draws follow the
posterior only up to terms in the step size and in the variance of the gradients. `bdl.HMC` is the reference for it.

Reference: Chen, Fox, Guestrin (2014), arXiv 1402.4102; Springenberg et al. (2016), Bayesian optimization with robust
Bayesian neural networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds
from bayesdl.inference._fitting import network_problem
from bayesdl.inference._stochastic_gradient import batch_log_density, max_drift, posterior_of
from bayesdl.models import BNN
from bayesdl.posterior import DrawsPosterior
from bayesdl.samplers import sghmc


@dataclass(frozen=True)
class SGHMC:
    """Scale-adapted stochastic gradient Hamiltonian Monte Carlo; biased, since no step is rejected.

    Attributes:
        model: The network, its prior and its likelihood.
        num_chains: Chains, run side by side, each with its own minibatches.
        num_warmup: Steps that adapt the scales and are dropped.
        num_draws: Draws kept from each chain.
        thin: Steps a draw.
        batch_size: Points a step; all of them, and no gradient noise, where there are no more.
        step_size: eps. Too large a step with noisy gradients switches the sampler's noise off, which warns.
        friction: Share of the momentum that a step loses, in (0, 1).
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar.
        checkpoint: A folder to save the run to and to resume it from, None for none; see `samplers.base`.
        max_gradients: A budget in passes over the data for each chain, warm-up included; the run ends when it is spent.
        chain_batch: How many chains to evaluate at a time, which bounds the memory; None for all.
        compile: Whether value and gradient go through torch.compile.
    """

    model: BNN
    num_chains: int = 4
    num_warmup: int = 3000
    num_draws: int = 200
    thin: int = 20
    batch_size: int = 128
    step_size: float = 0.02
    friction: float = 0.05
    standardize: bool = True
    progress: bool = False
    checkpoint: str | None = None
    max_gradients: float | None = None
    chain_batch: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_draws", "thin", "batch_size"):
            _checks.at_least("SGHMC", name, getattr(self, name), 1, integer=True)
        _checks.at_least("SGHMC", "num_warmup", self.num_warmup, 0, integer=True)
        _checks.inside("SGHMC", "step_size", self.step_size, 0.0, math.inf)
        _checks.inside("SGHMC", "friction", self.friction, 0.0, 1.0)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior:
        """Sample the posterior of the network given x (*b, n, d) and y (*b, n) or (*b, n, k), approximately.

        Data sets along *b are independent and sampled at the same time. For classification y holds labels 0, 1, ….

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: A chain is no longer finite.

        Warns:
            NumericalWarning: The noise of more than 1 % of the coordinates was switched off, or as many moves were cut.
            ConvergenceWarning: The chains disagree, or their draws are worth few independent ones.

        Cost: num_warmup + num_draws * thin gradients a chain, each O(min(n, batch_size) num_weights).
        """
        problem = network_problem("SGHMC.fit", self.model, x, y, standardize=self.standardize)
        start_seed, run_seed = child_seeds(seed, 2)
        run = sghmc.run(
            batch_log_density(problem),
            problem.starts(self.num_chains, start_seed),
            num_data=problem.x.shape[-2],
            num_warmup=self.num_warmup,
            num_draws=self.num_draws,
            step_size=self.step_size,
            friction=self.friction,
            batch_size=self.batch_size,
            max_drift=max_drift(self.friction),
            thin=self.thin,
            seed=run_seed,
            progress=self.progress,
            checkpoint=self.checkpoint,
            max_gradients=self.max_gradients,
            chain_batch=self.chain_batch,
            compile=self.compile,
        )
        return posterior_of("SGHMC", self.model, problem, run, "constant")
