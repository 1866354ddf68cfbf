r"""Likelihoods p(y | f): what a model adds to a function to explain the data.

Each knows its learned parameters, its log density summed over data points, and how draws of f become a predictive
distribution of y. Function values have shape (..., n, outputs), targets (..., n, k).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax

from bayesdl import _checks
from bayesdl.hyper import HyperPrior, LogNormal, Parameter


class Likelihood(Protocol):
    """What a network model needs of a likelihood."""

    task: str

    def parameters(self) -> tuple[Parameter, ...]:
        """Learned positive parameters, one value of each for each target column."""

    def num_outputs(self, k: int) -> int:
        """How many function outputs explain k target columns."""

    def log_prob(self, f: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        """log p(y | f) summed over points and target columns: (..., n, outputs), (..., n, k) -> (...)."""

    def value_and_slope(
        self, f: Tensor, y: Tensor, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`log_prob`, its gradient in f, and in each parameter, in closed form."""


@dataclass(frozen=True)
class Gaussian:
    r"""y = f + e, e ~ N(0, noise_variance), with a learned variance.

    Engines standardise y by default, and then `noise_variance` is a share of the variance of y.

    Attributes:
        noise_variance: Where its estimate starts, or its value where nothing is optimised; above `lower`. None: the
            typical value of the prior.
        prior: Prior on the variance. The default, log-normal with log-median -4 and log-sd 1, is that of BoTorch's
            single-task model; it says "mostly signal" and gives way to a few dozen points that say otherwise.
        lower: Smallest variance that a fit may reach; it keeps kernel matrices invertible.
    """

    noise_variance: float | None = None
    prior: HyperPrior | None = field(default_factory=lambda: LogNormal(-4.0, 1.0))
    lower: float = 1e-6
    task = "regression"

    def __post_init__(self) -> None:
        _checks.at_least("Gaussian", "lower", self.lower, 0.0)
        if self.noise_variance is not None:
            # estimates move in log(noise_variance - lower), which must exist where they start
            _checks.inside("Gaussian", "noise_variance", self.noise_variance, self.lower, math.inf)

    def parameters(self) -> tuple[Parameter, ...]:
        """The noise variance."""
        typical = math.exp(-4.0) if self.prior is None else self.prior.typical
        initial = max(typical, 2 * self.lower) if self.noise_variance is None else self.noise_variance
        return (Parameter("noise_variance", (), initial, self.prior, self.lower),)

    def num_outputs(self, k: int) -> int:
        """One function for each target column."""
        return k

    def log_prob(self, f: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Sum of log N(y | f, noise_variance); params["noise_variance"] has shape (..., k)."""
        variance = params["noise_variance"]
        squares = (y - f).square().sum(-2)
        return -0.5 * (squares / variance + y.shape[-2] * (2 * math.pi * variance).log()).sum(-1)

    def value_and_slope(
        self, f: Tensor, y: Tensor, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Value; (y - f) / v; (sum (y - f)^2 / v - n) / (2 v)."""
        variance = params["noise_variance"]
        n = y.shape[-2]
        residual = y - f
        ratio = residual.square().sum(-2) / variance
        value = -0.5 * (ratio + n * (2 * math.pi * variance).log()).sum(-1)
        return value, residual / variance.unsqueeze(-2), {"noise_variance": 0.5 * (ratio - n) / variance}


@dataclass(frozen=True)
class Bernoulli:
    r"""Two classes 0 and 1: p(y = 1 | f) = 1 / (1 + exp(-f))."""

    task = "binary"

    def parameters(self) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def num_outputs(self, k: int) -> int:
        """One logit for each target column."""
        return k

    def log_prob(self, f: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Sum of log p(y | f)."""
        return -binary_cross_entropy_with_logits(f, y.expand_as(f), reduction="none").sum((-2, -1))

    def value_and_slope(
        self, f: Tensor, y: Tensor, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Value; y - sigmoid(f)."""
        return self.log_prob(f, y, params), y - torch.sigmoid(f), {}


@dataclass(frozen=True)
class Categorical:
    r"""Classes 0..C-1: p(y = c | f) = exp(f_c) / sum_j exp(f_j)."""

    num_classes: int = 2
    task = "multiclass"

    def __post_init__(self) -> None:
        _checks.at_least("Categorical", "num_classes", self.num_classes, 2, integer=True)

    def parameters(self) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def num_outputs(self, k: int) -> int:
        """One logit for each class; several target columns are not supported."""
        return self.num_classes

    def log_prob(self, f: Tensor, y: Tensor, params: dict[str, Tensor]) -> Tensor:
        """Sum of log p(y | f)."""
        labels = y.squeeze(-1).to(torch.long).expand(f.shape[:-1])
        losses = cross_entropy(f.reshape(-1, self.num_classes), labels.reshape(-1), reduction="none")
        return -losses.reshape(f.shape[:-1]).sum(-1)

    def value_and_slope(
        self, f: Tensor, y: Tensor, params: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Value; 1{y = c} - softmax(f)_c."""
        log_p = log_softmax(f, -1)
        labels = y.to(torch.long).expand(*f.shape[:-1], 1)
        slope = -log_p.exp()
        slope.scatter_add_(-1, labels, torch.ones_like(slope[..., :1]))
        return log_p.gather(-1, labels).sum((-2, -1)), slope, {}
