r"""MEADS for Bayesian neural networks and hyper-parameters of GPs: HMC with persistent momentum that tunes itself.

Every transition is one gradient. The chains are dealt into folds, each of which obeys statistics of another during
warm-up; then everything is frozen and the posterior is invariant (`samplers.meads`). There is nothing to set but how
many chains and how long. Weights of a network are not identified, so convergence is judged on function values.

Reference: Hoffman & Sountsov (2022), Tuning-free generalized Hamiltonian Monte Carlo, AISTATS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.inference._network_chains import NUM_PREDICTIVE, Longer, check_settings, sample_network
from bayesdl.models import BNN, GP
from bayesdl.posterior import DrawsPosterior, GPMixturePosterior
from bayesdl.samplers import meads


@dataclass(frozen=True)
class MEADS:
    """MEADS on the weights and the noise of a network, or on the hyper-parameters of a GP.

    Attributes:
        model: A network with its prior and its likelihood, or a GP with Gaussian noise.
        num_chains: Chains, run side by side, at least 16; they learn from one another, so 64 are better.
        num_warmup: Transitions, of one gradient each, that adapt and are dropped.
        num_draws: Draws kept from each chain.
        thin: Keep every thin-th draw. A transition goes one step, so ten or more cost little.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar with step size, acceptance and divergences.
        num_predictive: How many draws the predictive of a GP mixes, evenly spread over all; each holds a factor of n^2
            numbers.
        checkpoint: A folder to save the run to and to resume it from, None for none; see `samplers.base`.
        max_gradients: A budget of gradients for each chain, warm-up included; the run ends when it is spent.
        chain_batch: How many chains to evaluate at a time, which bounds the memory; None for all.
        compile: Whether value and gradient go through torch.compile.
        collapse: Whether the output layer of a network is integrated out of the chains in closed form, and drawn from
            its law afterwards: the same posterior, at longer steps. For a Gaussian likelihood and a `Normal` prior; the
            log density of the chains is then that of the remaining coordinates.
    """

    model: BNN | GP
    num_chains: int = 64
    num_warmup: int = 3000
    num_draws: int = 100
    thin: int = 20
    standardize: bool = True
    progress: bool = False
    num_predictive: int = NUM_PREDICTIVE
    checkpoint: str | None = None
    max_gradients: float | None = None
    chain_batch: int | None = None
    compile: bool = False
    collapse: bool = False

    def __post_init__(self) -> None:
        check_settings(self, (), ())
        _checks.at_least("MEADS", "num_chains", self.num_chains, 4 * meads.FOLDS, integer=True)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior | GPMixturePosterior:
        """Sample the posterior of the model given x (*b, n, d) and y (*b, n) or (*b, n, k).

        Data sets along *b are independent and sampled at the same time, each with parameters of its own; each gets the
        draws that it would get alone. For classification y holds labels 0, 1, ….

        Of a GP the hyper-parameters are sampled, those of every output by themselves, under their priors; the constant
        mean and any parameter of either sign without a prior are N(0, 1) in standardised units.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: The log density is not finite at any start.

        Warns:
            ConvergenceWarning: R-hat of function values above 1.05, fewer than 100 effective draws, or divergences.

        Cost: num_warmup + num_draws * thin gradients a chain, each O(n num_weights) for a network, O(n^3) for a GP.
        """
        return sample_network(self, x, y, seed, meads.run, (), Longer(" or keep fewer draws (thin)"))
