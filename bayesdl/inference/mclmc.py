r"""Microcanonical Langevin Monte Carlo for Bayesian neural networks and hyper-parameters of GPs: fast, slightly biased.

Chains move at unit speed in whitened coordinates, steered by the gradient and never corrected (`samplers.mclmc`). The
draws are the posterior up to a bias that does not go away with longer runs; it falls with the energy error per step,
which is tuned, and reported. `MAMS` follows the same dynamics without the bias.

References: Robnik, De Luca, Silverstein & Seljak (2022), arXiv 2212.08549; Robnik & Seljak (2023), arXiv 2303.18221.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.inference._fitting import warn_unless
from bayesdl.inference._network_chains import NUM_PREDICTIVE, Longer, check_settings, sample_network
from bayesdl.models import BNN, GP
from bayesdl.posterior import DrawsPosterior, GPMixturePosterior
from bayesdl.samplers import mclmc
from bayesdl.samplers.base import Run

_TOO_FAR = 3.0  # times the desired energy error


@dataclass(frozen=True)
class MCLMC:
    """Full-batch MCLMC on the weights and the noise of a network, or on the hyper-parameters of a GP. Biased.

    Attributes:
        model: A network with its prior and its likelihood, or a GP with Gaussian noise.
        num_chains: Chains, run side by side; the metric is learned from all of them.
        num_warmup: Steps that adapt and are dropped.
        num_draws: Draws kept from each chain.
        desired_energy_error: The squared energy error of a step, per coordinate, that the step size is adapted to; the
            bias falls with its cube root.
        metric: "diagonal", "dense" (for at most a few hundred coordinates) or "identity".
        thin: Keep every thin-th draw; a step is much shorter than a trajectory of HMC.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar with step size and divergences.
        num_predictive: How many draws the predictive of a GP mixes, evenly spread over all; each holds a factor of n^2
            numbers.
        checkpoint: A folder in which the run saves itself, and from which it goes on after an interruption.
        max_gradients: Gradients per chain after which the run ends, with the draws that it has.
        chain_batch: Chains whose log density is evaluated at a time, which bounds the memory; all for None.
        compile: Send value and gradient through torch.compile.
        collapse: Whether the output layer of a network is integrated out of the chains in closed form, and drawn from
            its law afterwards: the same posterior, at longer steps. For a Gaussian likelihood and a `Normal` prior; the
            log density of the chains is then that of the remaining coordinates.
    """

    model: BNN | GP
    num_chains: int = 16
    num_warmup: int = 2000
    num_draws: int = 500
    desired_energy_error: float = 5e-4
    metric: Literal["diagonal", "dense", "identity"] = "diagonal"
    thin: int = 10
    standardize: bool = True
    progress: bool = False
    num_predictive: int = NUM_PREDICTIVE
    checkpoint: str | None = None
    max_gradients: float | None = None
    chain_batch: int | None = None
    compile: bool = False
    collapse: bool = False

    def __post_init__(self) -> None:
        check_settings(self, ("diagonal", "dense", "identity"), ())
        _checks.inside("MCLMC", "desired_energy_error", self.desired_energy_error, 0, math.inf)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior | GPMixturePosterior:
        """Sample the posterior of the model, nearly, given x (*b, n, d) and y (*b, n) or (*b, n, k).

        Data sets along *b are independent and sampled at the same time, each with its own step size, metric and length;
        each gets the draws that it would get alone. For classification y holds labels 0, 1, ….

        `diagnostics` has "unadjusted", True, and "energy_error", the mean squared energy error of a step per
        coordinate; R-hat and effective sample sizes say nothing of the bias.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: The log density is not finite at any start.

        Warns:
            ConvergenceWarning: R-hat of function values above 1.05, fewer than 100 effective draws, divergences, or an
                energy error more than three times as large as desired.

        Cost: two gradients a step, each O(n num_weights) a chain of a network, O(n^3) of a GP.
        """
        runs = []

        def run_once(*where: Any, **settings: Any) -> Run:
            runs.append(mclmc.run(*where, **settings))
            return runs[-1]

        own, longer = ("desired_energy_error", "metric"), Longer(", or thin more (thin)")
        posterior = sample_network(self, x, y, seed, run_once, own, longer)
        self._report(posterior, runs[0])
        return posterior

    def _report(self, posterior: DrawsPosterior | GPMixturePosterior, run: Run) -> None:
        """Say in the diagnostics that the draws are biased, and warn where they are more so than was asked for."""
        error = run.stats["energy_error"].mean((-2, -1))
        # the posterior is new: nobody has seen these yet
        posterior._diagnostics.pop("e_bfmi", None)
        posterior._diagnostics.update(unadjusted=True, energy_error=error.tolist())
        worst = float(torch.nan_to_num(error, nan=torch.inf).max())
        found = (
            f"the energy error per step is {worst:.1e}, wanted {self.desired_energy_error:.1e}, so the bias is larger"
        )
        remedy = "warm up for longer (num_warmup), ask for less, or use bdl.MAMS, which has no bias"
        warn_unless(worst <= _TOO_FAR * self.desired_energy_error, "MCLMC.fit", found, remedy)
