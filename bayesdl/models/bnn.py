r"""A Bayesian neural network: a prior over weights, hence over functions, and a likelihood.

In the coordinates q in which engines work, weights are w = centre + scale z with z ~ prior (unit width), and each
learned likelihood parameter is v = lower + exp(u). The log density of q = (z, u) is

    log p(z) + sum [log p(v) + u] + log p(y | f_w(x), v),

where u is the log Jacobian of v in u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models import _fused
from bayesdl.models._collapsed import CollapsedSpace
from bayesdl.models._networks import ACTIVATIONS, MLP, ModuleNetwork, Network
from bayesdl.priors import Normal, WeightPrior


@dataclass(frozen=True)
class BNN:
    """A neural network with a prior on its weights.

    Attributes:
        hidden: Widths of the hidden layers of a fully connected network; () is (generalised) linear regression.
        activation: "tanh", "relu", "erf", "sin", "silu" or "gelu".
        prior: Prior on the weights, for standardised inputs and targets where the engine standardises.
        likelihood: `Gaussian()` with learned noise, `Bernoulli()` or `Categorical(num_classes)`.
        module: Any `nn.Module` that maps (n, d) to (n, outputs), in place of hidden and activation. Only its structure
            is used, through `torch.func.functional_call`; it is not changed.
    """

    hidden: tuple[int, ...] = (50,)
    activation: str = "tanh"
    prior: WeightPrior = field(default_factory=Normal)
    likelihood: Gaussian | Bernoulli | Categorical = field(default_factory=Gaussian)
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        _checks.choice("BNN", "activation", self.activation, tuple(ACTIVATIONS))
        if not isinstance(self.hidden, (tuple, list)):
            fail(
                SettingError,
                "BNN",
                "hidden must be a tuple of widths.",
                got=repr(self.hidden),
                fix=f"hidden=({self.hidden},)",
            )
        for width in self.hidden:
            _checks.at_least("BNN", "hidden", width, 1, integer=True)
        object.__setattr__(self, "hidden", tuple(int(width) for width in self.hidden))
        for name, kind in (("prior", WeightPrior), ("likelihood", (Gaussian, Bernoulli, Categorical))):
            if not isinstance(getattr(self, name), kind):
                fix = "prior=bdl.priors.Normal()" if name == "prior" else "likelihood=bdl.Gaussian()"
                fail(SettingError, "BNN", f"{name} is of the wrong kind.", got=repr(getattr(self, name)), fix=fix)

    def weight_space(self, d: int, k: int) -> WeightSpace:
        """The coordinates in which this network with d inputs and k target columns is sampled or optimised."""
        outputs = self.likelihood.num_outputs(k)
        if self.module is None:
            network: Network = MLP(d, self.hidden, outputs, self.activation)
        else:
            network = ModuleNetwork(self.module, d, outputs)
        double = torch.zeros((), dtype=torch.float64)
        scale, centre = network.scales(self.prior, double), network.centre(double)
        return WeightSpace(self.prior, self.likelihood, network, k, scale, centre)

    def sample_prior(self, x: Tensor, num: int, generator: torch.Generator) -> Tensor:
        """Draws of f at x (*b, s, d) from the prior, one network a draw: (num, *b, s), or (num, *b, s, outputs)."""
        space = self.weight_space(x.shape[-1], 1)
        f = space.forward(space.initial(num, generator, x), x).movedim(-3, 0)
        return f.squeeze(-1) if f.shape[-1] == 1 else f


def collapsible(model: BNN) -> str | None:
    """Why the output layer of a network cannot be integrated out in closed form, in words; None where it can."""
    if not isinstance(model.likelihood, Gaussian):
        return f"its likelihood is {type(model.likelihood).__name__}, not Gaussian"
    if type(model.prior) is not Normal:
        return f"its prior is {type(model.prior).__name__}, not Normal"
    return "it is a module of your own, whose output layer is not known" if model.module is not None else None


@dataclass(frozen=True)
class WeightSpace:
    """The flat coordinates q (..., D) of a network's weights and its likelihood's parameters."""

    prior: WeightPrior
    likelihood: Gaussian | Bernoulli | Categorical
    network: Network
    k: int
    scale: Tensor
    centre: Tensor

    @property
    def dim(self) -> int:
        """D: weights, then likelihood parameters."""
        return self.network.num_weights + self.k * len(self.likelihood.parameters())

    def split(self, q: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Weights (..., num_weights), likelihood parameters by name (..., k), and their logs u (..., k * count)."""
        m = self.network.num_weights
        logs = q[..., m:]
        return torch.addcmul(self.centre.to(q), self.scale.to(q), q[..., :m]), self.positive(logs), logs

    def positive(self, logs: Tensor) -> dict[str, Tensor]:
        """Likelihood parameters by name (..., k) from their logs (..., k * count)."""
        return {
            p.name: p.lower + logs[..., i * self.k : (i + 1) * self.k].exp()
            for i, p in enumerate(self.likelihood.parameters())
        }

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """f at x: q (*g, C, D), x (*g, n, d) -> (*g, C, n, outputs)."""
        return self.network.forward(self.split(q)[0], x)

    def log_density(self, q: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Unnormalised log posterior: q (*g, C, D), x (*g, n, d), y (*g, n, k) -> (*g, C). Cost O(C n num_weights).

        `scale` multiplies the log likelihood: n / batch size makes a minibatch an unbiased estimate.
        """
        weights, params, logs = self.split(q)
        log_likelihood = self.likelihood.log_prob(self.network.forward(weights, x), y.unsqueeze(-3), params)
        return self.log_prior(q[..., : self.network.num_weights], params, logs) + scale * log_likelihood

    def bind(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
        """`log_density` at fixed data, for samplers and optimisers: fused where possible, then once differentiable."""
        if isinstance(self.network, MLP) and _fused.supports(self.network.activation):
            return _fused.FusedLogDensity(self, x, y, scale)
        return lambda q: self.log_density(q, x, y, scale)

    def collapse(self, x: Tensor, y: Tensor) -> CollapsedSpace:
        """The coordinates that are left where the output layer is integrated out, for a network that
        `collapsible` has nothing against."""
        return CollapsedSpace(self, x, y)

    def log_prior(self, z: Tensor, params: dict[str, Tensor], logs: Tensor) -> Tensor:
        """Log prior of standardised weights z (..., *), all or some, and of the likelihood's parameters: (...)."""
        total = self.prior.log_prob(z) + logs.sum(-1)
        for p in self.likelihood.parameters():
            if p.prior is not None:
                total = total + p.prior.log_prob(params[p.name]).sum(-1)
        return total

    def initial(self, num: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """Draws from the weight prior, with likelihood parameters at their initial values: (num, D)."""
        z = self.prior.sample((num, self.network.num_weights), generator, like.dtype).to(like.device)
        pieces = [z]
        for p in self.likelihood.parameters():
            pieces.append((p.initial_tensor(like) - p.lower).log().expand(num, self.k))
        return torch.cat(pieces, -1)
