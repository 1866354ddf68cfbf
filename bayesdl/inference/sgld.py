r"""Stochastic gradient Langevin dynamics for Bayesian neural networks: minibatch gradients, noise, and no accept step.

By default preconditioned: every coordinate is scaled by the running size of its gradient (RMSprop), which adapts in
warm-up and is frozen for sampling, so that the drift needs no correction term. The draws are biased, by the step size
and by the variance of the gradients, since nothing is ever rejected; and without momentum they move slowly. `bdl.HMC`
is the reference for it, `bdl.SGHMC` usually the better use of the same gradients.

Reference: Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics; Li et al. (2016),
arXiv 1512.07666.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds
from bayesdl.inference._fitting import network_problem
from bayesdl.inference._stochastic_gradient import batch_log_density, max_drift, posterior_of
from bayesdl.models import BNN
from bayesdl.posterior import DrawsPosterior
from bayesdl.samplers import sgld
from bayesdl.samplers.stochastic import polynomial_schedule


@dataclass(frozen=True)
class SGLD:
    """Stochastic gradient Langevin dynamics, preconditioned or plain; biased, since no step is rejected.

    Attributes:
        model: The network, its prior and its likelihood.
        num_chains: Chains, run side by side, each with its own minibatches.
        num_warmup: Steps that adapt the preconditioner and are dropped.
        num_draws: Draws kept from each chain, evenly in the sum of the step sizes.
        thin: Steps a draw, on average where the step size decays.
        batch_size: Points a step; all of them, and no gradient noise, where there are no more.
        step_size: eps at the first step, where a gradient of typical size moves a preconditioned coordinate by eps / 2.
            None: 0.01 with a preconditioner, 0.01 / n without.
        decay: Power gamma of the schedule eps_t = step_size (1 + t / decay_offset)^-gamma; 0 for a constant step.
        decay_offset: Steps after which it has fallen by 2^-gamma.
        precondition: "rmsprop", or "none" for plain SGLD, which takes very small steps for very long.
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
    step_size: float | None = None
    decay: float = 0.0
    decay_offset: float = 1000.0
    precondition: Literal["rmsprop", "none"] = "rmsprop"
    standardize: bool = True
    progress: bool = False
    checkpoint: str | None = None
    max_gradients: float | None = None
    chain_batch: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_draws", "thin", "batch_size"):
            _checks.at_least("SGLD", name, getattr(self, name), 1, integer=True)
        _checks.at_least("SGLD", "num_warmup", self.num_warmup, 0, integer=True)
        if self.step_size is not None:
            _checks.inside("SGLD", "step_size", self.step_size, 0.0, math.inf)
        _checks.at_least("SGLD", "decay", self.decay, 0.0)
        _checks.inside("SGLD", "decay_offset", self.decay_offset, 0.0, math.inf)
        _checks.choice("SGLD", "precondition", self.precondition, ("rmsprop", "none"))

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior:
        """Sample the posterior of the network given x (*b, n, d) and y (*b, n) or (*b, n, k), approximately.

        Data sets along *b are independent and sampled at the same time. For classification y holds labels 0, 1, ….

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: A chain is no longer finite.

        Warns:
            NumericalWarning: More than 1 % of the moves were cut at one prior width.
            ConvergenceWarning: The chains disagree, or their draws are worth few independent ones.

        Cost: num_warmup + num_draws * thin gradients a chain, each O(min(n, batch_size) num_weights).
        """
        problem = network_problem("SGLD.fit", self.model, x, y, standardize=self.standardize)
        start_seed, run_seed = child_seeds(seed, 2)
        run = sgld.run(
            batch_log_density(problem),
            problem.starts(self.num_chains, start_seed),
            num_data=problem.x.shape[-2],
            num_warmup=self.num_warmup,
            num_draws=self.num_draws,
            step_size=self._schedule(problem.x.shape[-2]),
            batch_size=self.batch_size,
            precondition=self.precondition,
            parameters=sgld.Parameters(max_drift=max_drift(1.0)),
            thin=self.thin,
            seed=run_seed,
            progress=self.progress,
            checkpoint=self.checkpoint,
            max_gradients=self.max_gradients,
            chain_batch=self.chain_batch,
            compile=self.compile,
        )
        return posterior_of("SGLD", self.model, problem, run, "polynomial" if self.decay else "constant")

    def _schedule(self, n: int) -> Tensor:
        first = self.step_size
        if first is None:
            first = 0.01 if self.precondition == "rmsprop" else 0.01 / n
        total = self.num_warmup + self.num_draws * self.thin
        return polynomial_schedule(first, total, offset=self.decay_offset, power=self.decay)
