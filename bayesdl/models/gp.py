r"""A Gaussian process prior with Gaussian noise: f ~ GP(m, k), y = f(x) + e, e ~ N(0, noise_variance)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl.errors import SettingError, fail
from bayesdl.hyper import Parameter
from bayesdl.kernels import Kernel
from bayesdl.likelihoods import Gaussian, Likelihood


@dataclass(frozen=True)
class GP:
    """A Gaussian process with a kernel, a mean and a likelihood.

    Attributes:
        kernel: Any kernel of `bayesdl.kernels`. Its amplitude is its own: `Scale(Matern())` learns one, `Matern()` has
            variance 1, which suits standardised targets.
        mean: "constant" (learned) or "zero".
        likelihood: Gaussian noise, whose variance engines learn, or a likelihood of classes.
    """

    kernel: Kernel
    mean: str = "constant"
    likelihood: Likelihood = field(default_factory=Gaussian)

    def __post_init__(self) -> None:
        _checks.choice("GP", "mean", self.mean, ("constant", "zero"))
        if not isinstance(self.kernel, Kernel):
            wanted = "kernel must be a kernel of bayesdl.kernels."
            fix = "for instance bdl.kernels.Matern(nu=2.5)"
            fail(SettingError, "GP", wanted, got=_checks.describe(self.kernel), fix=fix)
        if not hasattr(self.likelihood, "value_and_slope"):
            wanted = "likelihood must be a likelihood of bayesdl."
            fix = "bdl.Gaussian(), bdl.Bernoulli() or bdl.Categorical(num_classes)"
            fail(SettingError, "GP", wanted, got=_checks.describe(self.likelihood), fix=fix)

    def layout(self, d: int) -> Layout:
        """How the hyper-parameters for d inputs lie in one flat vector."""
        kernel = tuple(p.prefixed("kernel") for p in self.kernel.parameters(d))
        return Layout(kernel + self.likelihood.parameters(), has_mean=self.mean == "constant")

    @staticmethod
    def kernel_values(values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The kernel's share of the values that a layout unpacks, under the kernel's own names."""
        return {name.removeprefix("kernel."): v for name, v in values.items() if name.startswith("kernel.")}

    def sample_prior(self, x: Tensor, num: int, generator: torch.Generator) -> Tensor:
        """Exact joint draws of f at x (*b, s, d) with initial hyper-parameters and mean 0: (num, *b, s).

        Cost: O(s^3) time, O(s^2) memory for each batch element.
        """
        factor = ops.cholesky(self.kernel(x)).factor
        shape = (num, *x.shape[:-1], 1)
        z = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
        return (factor @ z).squeeze(-1)


@dataclass(frozen=True)
class Layout:
    r"""Hyper-parameters as a flat vector theta (..., D): u for each, value = lower + exp(u), then the constant mean.

    A prior is on the value itself, so that the optimum does not depend on this parametrisation.
    """

    parameters: tuple[Parameter, ...]
    has_mean: bool

    @property
    def dim(self) -> int:
        """Length of theta."""
        return sum(_size(p) for p in self.parameters) + self.has_mean

    def initial(self, like: Tensor) -> Tensor:
        """theta (D,) at the initial values."""
        pieces = [(p.initial_tensor(like).reshape(-1) - p.lower).log() for p in self.parameters]
        return torch.cat([*pieces, like.new_zeros(int(self.has_mean))])

    def sample(self, num: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """theta (num, D) at draws from the priors, shrunk halfway to the initial values in log scale.

        A full draw from these wide priors is often a flat or a white-noise fit, from which no optimiser returns.
        """
        start = self.initial(like)
        columns = []
        for p in self.parameters:
            if p.prior is None:
                noise = torch.randn((num, _size(p)), generator=generator, dtype=torch.float64, device=generator.device)
                columns.append(p.initial_tensor(noise).reshape(-1).log() + noise)
            else:
                columns.append(p.prior.sample((num, _size(p)), generator).clamp_min(1e-12).log())
        columns.append(torch.zeros(num, int(self.has_mean), dtype=torch.float64, device=generator.device))
        return 0.5 * (start + torch.cat(columns, -1).to(start))

    def unpack(self, theta: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values by name, each (..., *shape), and the constant mean (...), zero where there is none."""
        values, at = {}, 0
        for p in self.parameters:
            piece = p.lower + theta[..., at : at + _size(p)].exp()
            values[p.name] = piece.reshape((*theta.shape[:-1], *p.shape))
            at += _size(p)
        return values, theta[..., at] if self.has_mean else theta.new_zeros(theta.shape[:-1])

    def chain(self, theta: Tensor, grads: dict[str, Tensor], mean_grad: Tensor) -> Tensor:
        """Gradient in theta from gradients in the values and in the mean: d value / d u = exp(u)."""
        pieces = [grads[p.name].reshape(*theta.shape[:-1], _size(p)) for p in self.parameters]
        at = theta.shape[-1] - self.has_mean
        inner = torch.cat(pieces, -1) * theta[..., :at].exp()
        return torch.cat([inner, mean_grad.unsqueeze(-1)], -1) if self.has_mean else inner

    def log_prior(self, values: dict[str, Tensor]) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Sum of log prior densities (...), and their slopes by name."""
        total, slopes = 0.0, {}
        for p in self.parameters:
            value = values[p.name]
            slopes[p.name] = torch.zeros_like(value) if p.prior is None else p.prior.slope(value)
            if p.prior is not None:
                density = p.prior.log_prob(value)
                total = total + (density.sum(-1) if p.shape else density)
        return total, slopes


def _size(parameter: Parameter) -> int:
    size = 1
    for length in parameter.shape:
        size *= length
    return size
