"""Priors on hyper-parameters, from gpytorch's to ours and back."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gpytorch
import torch
from torch import Tensor

from bayesdl.hyper import Gamma, HalfNormal, HyperPrior, LogNormal


def prior_from_gpytorch(prior: gpytorch.priors.Prior, value: Tensor) -> HyperPrior:
    """Our prior of the same density, for a parameter that starts at `value`: a native one where there is one."""
    kind = type(prior)
    if getattr(prior, "_transform", None) is None:
        if kind is gpytorch.priors.LogNormalPrior and prior.loc.numel() == 1 and prior.scale.numel() == 1:
            return LogNormal(float(prior.loc), float(prior.scale))
        if kind is gpytorch.priors.GammaPrior and prior.concentration.numel() == 1 and prior.rate.numel() == 1:
            return Gamma(float(prior.concentration), float(prior.rate))
        if kind is gpytorch.priors.HalfNormalPrior and prior.scale.numel() == 1:
            return HalfNormal(float(prior.scale))
    return ModulePrior(prior, tuple(value.shape), float(value.detach().mean()))


@dataclass(frozen=True, eq=False)
class ModulePrior:
    """A gpytorch prior on one parameter, by its own code.

    Attributes:
        module: The prior; a copy is kept.
        shape: Shape of the parameter.
        typical: Where optimisation starts.
    """

    module: gpytorch.priors.Prior
    shape: tuple[int, ...]
    typical: float
    _on: dict[torch.device, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", deepcopy(self.module).double())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `value` (*b, *shape); a joint density is spread evenly over the elements."""
        density = self._at(value.device).log_prob(value)
        missing = value.ndim - density.ndim
        if missing:
            share = value.shape[density.ndim :].numel()
            density = (density / share).reshape(*density.shape, *[1] * missing)
        return density.expand(value.shape).to(value.dtype)

    def slope(self, value: Tensor) -> Tensor:
        """Derivative of the log density at `value`, by autograd."""
        leaf = value.detach().requires_grad_()
        with torch.enable_grad():
            total = self.log_prob(leaf).sum()
        if not total.requires_grad:
            return torch.zeros_like(value)
        return torch.autograd.grad(total, leaf)[0]

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws in float64 by the inverse distribution function; around `typical`, within a factor, where it has none.

        gpytorch's own draws come from the global random state, which is not touched here.
        """
        device = generator.device
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device).clamp(1e-6, 1 - 1e-6)
        try:
            draws = self._at(device).icdf(uniform.reshape(-1, *self.shape))
            return draws.expand(-1, *self.shape).reshape(shape)
        except (NotImplementedError, AttributeError):
            return self.typical * torch.special.ndtri(uniform).exp()

    def _at(self, device: torch.device) -> Any:
        if device not in self._on:
            self._on[device] = deepcopy(self.module).to(device)
        return self._on[device]


def prior_to_gpytorch(prior: HyperPrior) -> gpytorch.priors.Prior:
    """The gpytorch prior of the same density: one of its own where there is one."""
    if isinstance(prior, ModulePrior):
        return deepcopy(prior.module)
    if isinstance(prior, LogNormal):
        return gpytorch.priors.LogNormalPrior(_number(prior.loc), _number(prior.scale))
    if isinstance(prior, Gamma):
        return gpytorch.priors.GammaPrior(_number(prior.concentration), _number(prior.rate))
    if isinstance(prior, HalfNormal):
        return gpytorch.priors.HalfNormalPrior(_number(prior.scale))
    return _OurPrior(prior)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class _OurPrior(gpytorch.priors.Prior, torch.distributions.Distribution):
    """A `HyperPrior` of any class under gpytorch's name for it."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch reads it from the class)
    support = torch.distributions.constraints.real

    def __init__(self, prior: HyperPrior) -> None:
        torch.nn.Module.__init__(self)
        torch.distributions.Distribution.__init__(self, validate_args=False)
        self._prior = prior
        self._transform = None

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, elementwise."""
        return self._prior.log_prob(x)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (torch's own signature)
        """Draws that follow torch's global random state, as those of gpytorch's priors do."""
        seed = int(torch.distributions.Uniform(_number(0.0), _number(2.0**53)).sample())
        return self._prior.sample(tuple(sample_shape), torch.Generator().manual_seed(seed))
