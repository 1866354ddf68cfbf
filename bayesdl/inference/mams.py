r"""The Metropolis-adjusted microcanonical sampler for Bayesian neural networks and hyper-parameters of GPs.

Chains move at unit speed in whitened coordinates, steered by the gradient, and an accept step makes them exact
(`samplers.mams`). They share a step size, a metric and a trajectory length that are frozen after warm-up. Weights of a
network are not identified, so convergence is judged on function values at training inputs.

Reference: Robnik, Cohn-Gordon & Seljak (2025), arXiv 2503.01707.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bayesdl._random import Seed
from bayesdl.inference._network_chains import NUM_PREDICTIVE, Longer, check_settings, sample_network
from bayesdl.models import BNN, GP
from bayesdl.posterior import DrawsPosterior, GPMixturePosterior
from bayesdl.samplers import mams


@dataclass(frozen=True)
class MAMS:
    """Full-batch MAMS on the weights and the noise of a network, or on the hyper-parameters of a GP.

    Attributes:
        model: A network with its prior and its likelihood, or a GP with Gaussian noise.
        num_chains: Chains, run side by side; the metric and the trajectory length are learned from all of them.
        num_warmup: Transitions that adapt and are dropped.
        num_draws: Draws kept from each chain.
        max_steps: Longest trajectory, in steps of two gradients.
        target_accept: Mean acceptance rate that the step size aims at.
        metric: "diagonal", "dense", "identity", or "auto": dense for at most 500 coordinates where the chains give
            enough positions to estimate it.
        thin: Keep every thin-th draw.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar with step size, acceptance and divergences.
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
    num_warmup: int = 500
    num_draws: int = 500
    max_steps: int = 1000
    target_accept: float = 0.9
    metric: Literal["auto", "diagonal", "dense", "identity"] = "auto"
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
        check_settings(self, ("auto", "diagonal", "dense", "identity"), ("max_steps",))

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior | GPMixturePosterior:
        """Sample the posterior of the model given x (*b, n, d) and y (*b, n) or (*b, n, k).

        Data sets along *b are independent and sampled at the same time, each with its own step size, metric and length;
        each gets the draws that it would get alone. For classification y holds labels 0, 1, ….

        Of a GP the hyper-parameters are sampled, those of every output by themselves, under their priors; the constant
        mean and any parameter of either sign without a prior are N(0, 1) in standardised units.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: The log density is not finite at any start.

        Warns:
            ConvergenceWarning: R-hat of function values above 1.05, fewer than 100 effective draws, or divergences.

        Cost: about 2 T / eps gradients a transition, T the learned length and eps the step, each O(n num_weights) a
        chain of a network, O(n^3) of a GP.
        """
        own, longer = ("max_steps", "target_accept", "metric"), Longer(", or use more chains (num_chains)")
        return sample_network(self, x, y, seed, mams.run, own, longer)
