r"""The no-U-turn sampler for Bayesian neural networks: trajectories as long as they are worth.

Each chain doubles its trajectory until it turns back, so that no length has to be chosen; a network's posterior, in
which scales differ from place to place, is where that pays. Chains run side by side, those whose trajectory is complete
waiting at no cost in gradients. Weights of a network are not identified, so convergence is judged on function values.

Reference: Hoffman & Gelman (2014), arXiv 1111.4246; Betancourt (2017), arXiv 1701.02434.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bayesdl._random import Seed
from bayesdl.inference._network_chains import NUM_PREDICTIVE, Longer, check_settings, sample_network
from bayesdl.models import BNN, GP
from bayesdl.posterior import DrawsPosterior, GPMixturePosterior
from bayesdl.samplers import nuts


@dataclass(frozen=True)
class NUTS:
    """Full-batch NUTS on the weights and the noise of a network, or on the hyper-parameters of a GP.

    Attributes:
        model: A network with its prior and its likelihood, or a GP with Gaussian noise.
        num_chains: Chains, run side by side.
        num_warmup: Transitions that adapt and are dropped.
        num_draws: Draws kept from each chain.
        max_depth: A trajectory has at most 2^max_depth points; 1 to 20.
        target_accept: Mean acceptance rate over a trajectory that the step size aims at.
        metric: "diagonal", "dense" (for at most a few hundred weights), "low-rank" (for more) or "identity".
        thin: Keep every thin-th draw.
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
    num_chains: int = 4
    num_warmup: int = 500
    num_draws: int = 500
    max_depth: int = 10
    target_accept: float = 0.8
    metric: Literal["diagonal", "dense", "low-rank", "identity"] = "diagonal"
    thin: int = 1
    standardize: bool = True
    progress: bool = False
    num_predictive: int = NUM_PREDICTIVE
    checkpoint: str | None = None
    max_gradients: float | None = None
    chain_batch: int | None = None
    compile: bool = False
    collapse: bool = False

    def __post_init__(self) -> None:
        check_settings(self, ("diagonal", "dense", "low-rank", "identity"), ("max_depth",))

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior | GPMixturePosterior:
        """Sample the posterior of the model given x (*b, n, d) and y (*b, n) or (*b, n, k).

        Data sets along *b are independent and sampled at the same time, each with its own step size and metric; each
        gets the draws that it would get alone. For classification y holds labels 0, 1, ….

        Of a GP the hyper-parameters are sampled, those of every output by themselves, under their priors; the constant
        mean and any parameter of either sign without a prior are N(0, 1) in standardised units.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: The log density is not finite at any start.

        Warns:
            ConvergenceWarning: R-hat of function values above 1.05, fewer than 100 effective draws, divergences, or
                more than half of the trees cut short at `max_depth`.

        Cost: at most 2^max_depth gradients a transition, each O(n num_weights) a chain for a network, O(n^3)
        for a GP.
        """
        own, longer = ("max_depth", "target_accept", "metric"), Longer("", self.max_depth)
        return sample_network(self, x, y, seed, nuts.run, own, longer)
