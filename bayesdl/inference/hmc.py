r"""Hamiltonian Monte Carlo for Bayesian neural networks: the reference posterior that others are compared with.

Chains run side by side in one batch, share a step size (dual averaging) and a mass matrix (pooled over chains) that are
frozen after warm-up, and leave the exact posterior invariant. Weights of a network are not identified, so convergence
is judged on function values at training inputs.

Reference: Neal (2011), arXiv 1206.1901; Izmailov et al. (2021), arXiv 2104.14421.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bayesdl._random import Seed
from bayesdl.inference._network_chains import Longer, check_settings, sample_network
from bayesdl.models import BNN
from bayesdl.posterior import DrawsPosterior
from bayesdl.samplers import hmc
from bayesdl.samplers.base import LogDensityFn, Run


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
        check_settings(self, ("diagonal", "dense", "identity"), ("num_steps",))

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

        def run_chains(log_density: LogDensityFn, starts: Tensor, run_seed: Seed) -> Run:
            return hmc.run(
                log_density,
                starts,
                num_warmup=self.num_warmup,
                num_draws=self.num_draws,
                num_steps=self.num_steps,
                target_accept=self.target_accept,
                metric=self.metric,
                thin=self.thin,
                seed=run_seed,
                progress=self.progress,
            )

        longer = Longer(" or longer trajectories (num_steps)")
        return sample_network("HMC", self.model, x, y, self.num_chains, self.standardize, seed, run_chains, longer)
