r"""What the data say of a random scale v: a density times a likelihood in one positive variable.

    p(v | y)  ~  p(v) p(y | v)

In closed form for an inverse gamma prior and noise inside the scale, otherwise a finite set of nodes with weights:
from quadrature in log v, or from draws of the prior weighted by their likelihood.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl.distributions import GaussianMixture, StudentT
from bayesdl.errors import NumericalWarning
from bayesdl.ops.quadrature import log_nodes
from bayesdl.priors.scale import InverseGamma, ScalePrior

Values = dict[str, Tensor]
LogLikelihood = Callable[[Tensor], Tensor]

_SMALLEST = 1e-12  # of the mean squared standardised residual: exactly interpolated data would have log v = -inf
_FEW = 100.0  # effective draws below which importance weights are not to be trusted


class Mixing(NamedTuple):
    """How v is treated.

    Attributes:
        prior: On v = sigma^2.
        method: "closed_form", "quadrature" or "importance".
        num_nodes: Nodes of the quadrature.
        num_samples: Draws of importance sampling.
        seed: Of those draws.
    """

    prior: ScalePrior
    method: str
    num_nodes: int
    num_samples: int
    seed: int

    def shapes(self, values: Values) -> Values:
        """The prior's learned shapes among the hyper-parameters, under the prior's own names."""
        return {name.removeprefix("scale."): v for name, v in values.items() if name.startswith("scale.")}


class InverseGammaBelief(NamedTuple):
    """v | y ~ IG(concentration, rate), both (*b k)."""

    concentration: Tensor
    rate: Tensor

    @property
    def mean(self) -> Tensor:
        """rate / (concentration - 1), infinite where that does not exist; (*b k)."""
        a = self.concentration
        return torch.where(a > 1, self.rate / (a - 1).clamp_min(1e-300), math.inf)

    def draw(self, sample_shape: tuple[int, ...], lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent draws of v, (*sample_shape, *lead, k); the batch axes broadcast against `lead`."""
        shape = (*sample_shape, *lead, self.rate.shape[-1])
        return self.rate / torch._standard_gamma(self.concentration.expand(shape).contiguous(), generator=generator)

    def mix(self, loc: Tensor, scale: Tensor, has_outputs: bool) -> Distribution:
        """The law of N(loc, v scale^2) for loc and scale (..., s) or (..., s, k)."""
        spread = [_beside_points(t, has_outputs).to(loc) for t in (2 * self.concentration, self._typical.sqrt())]
        return StudentT(spread[0], loc, scale * spread[1], validate_args=False)

    @property
    def _typical(self) -> Tensor:
        return self.rate / self.concentration


class NodeBelief(NamedTuple):
    """v | y on nodes: variance (*b k M), log_weight (*b k M) normalised over M."""

    variance: Tensor
    log_weight: Tensor

    @property
    def mean(self) -> Tensor:
        """The weighted mean of the nodes, (*b k)."""
        return (self.variance * self.log_weight.exp()).sum(-1)

    def pick(self, sample_shape: tuple[int, ...], lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent draws of node numbers, (*sample_shape, *lead, k)."""
        weight = self.log_weight.exp()
        weight = weight.expand(*lead, *weight.shape[-2:])
        flat, num = weight.reshape(-1, weight.shape[-1]), math.prod(sample_shape)
        index = torch.multinomial(flat, max(num, 1), replacement=True, generator=generator)[:, :num]
        return index.T.reshape(*sample_shape, *weight.shape[:-1])

    def at(self, index: Tensor) -> Tensor:
        """v at drawn node numbers (*sample_shape, *lead, k)."""
        nodes = self.variance.expand(*index.shape, self.variance.shape[-1])
        return nodes.gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def draw(self, sample_shape: tuple[int, ...], lead: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent draws of v, (*sample_shape, *lead, k)."""
        return self.at(self.pick(sample_shape, lead, generator))

    def mix(self, loc: Tensor, scale: Tensor, has_outputs: bool) -> Distribution:
        """The law of N(loc, v scale^2) for loc and scale (..., s) or (..., s, k)."""
        parts = (self.variance.sqrt(), self.log_weight.exp())
        root, weight = (_beside_points(t, has_outputs, 1).to(loc) for t in parts)
        return GaussianMixture(loc.unsqueeze(-1), scale.unsqueeze(-1) * root, weight, validate_args=False)


Belief = InverseGammaBelief | NodeBelief


def _beside_points(value: Tensor, has_outputs: bool, num_event: int = 0) -> Tensor:
    """(*b k *event) with an axis for points, (*b 1 k *event), or (*b 1 *event) where y came without an output axis."""
    value = value.unsqueeze(-2 - num_event)
    return value if has_outputs else value.squeeze(-1 - num_event)


def scaled_log_likelihood(quadratic: Tensor, n: int) -> tuple[LogLikelihood, Tensor]:
    r"""log N(r | 0, v A) less what v has no part in, as a function of u = log v, and where it is largest.

    -q exp(-u) / 2 - n u / 2,    q = r' A^{-1} r,    largest at u = log(q / n)
    """
    q = quadratic.clamp_min(_SMALLEST * n)

    def value(u: Tensor) -> Tensor:
        return -0.5 * q.unsqueeze(-1) * (-u).exp() - 0.5 * n * u

    return value, (q.detach() / n).log()


def fixed_noise_log_likelihood(eigenvalues: Tensor, along: Tensor, noise: Tensor) -> tuple[LogLikelihood, Tensor]:
    r"""log N(r | 0, v K + noise I) + n/2 log(2 pi) as a function of u = log v, and a guess of where it is largest.

    Args:
        eigenvalues: (*b n) of K, at least 0.
        along: (*b n) the residual along the eigenvectors.
        noise: (*b).
    """
    squares = along.square()

    def value(u: Tensor) -> Tensor:
        spread = u.exp().unsqueeze(-1) * eigenvalues.unsqueeze(-2) + noise[..., None, None]
        return -0.5 * (spread.log() + squares.unsqueeze(-2) / spread).sum(-1)

    size = squares.mean(-1).clamp_min(_SMALLEST) / eigenvalues.mean(-1).clamp_min(1e-300)
    return value, size.detach().log().clamp(-20.0, 20.0)


def log_scale_integrand(prior: ScalePrior, likelihood: LogLikelihood, shapes: Values) -> LogLikelihood:
    """log of p(e^u) e^u p(y | e^u) as a function of u (*b J); learned shapes have the axes *b."""
    params = {name: value.unsqueeze(-1) for name, value in shapes.items()}

    def value(u: Tensor) -> Tensor:
        return prior.log_prob(u.exp(), params) + u + likelihood(u)

    return value


def log_inverse_gamma_evidence(prior: InverseGamma, quadratic: Tensor, n: int, shapes: Values) -> Tensor:
    r"""log int IG(v; a, b) v^(-n/2) exp(-q / (2v)) dv in closed form, shape of q.

    = log Gamma(a + n/2) - log Gamma(a) + a log b - (a + n/2) log(b + q/2)
    """
    a, b = prior.at(shapes, quadratic)
    more = a + 0.5 * n
    return torch.lgamma(more) - torch.lgamma(a) + a * b.log() - more * (b + 0.5 * quadratic).log()


def believe_scaled(mixing: Mixing, quadratic: Tensor, n: int, values: Values) -> tuple[Belief, Tensor, dict[str, Any]]:
    """p(v | y) with noise inside the scale, log int p(v) v^(-n/2) exp(-q/(2v)) dv (*b k), and diagnostics."""
    shapes = mixing.shapes(values)
    if mixing.method == "closed_form" and isinstance(mixing.prior, InverseGamma):
        a, b = mixing.prior.at(shapes, quadratic)
        belief = InverseGammaBelief((a + 0.5 * n).expand_as(quadratic).clone(), b + 0.5 * quadratic)
        return belief, log_inverse_gamma_evidence(mixing.prior, quadratic, n, shapes), {}
    likelihood, centre = scaled_log_likelihood(quadratic, n)
    return believe(mixing, likelihood, centre, shapes)


def believe(
    mixing: Mixing, likelihood: LogLikelihood, centre: Tensor, shapes: Values
) -> tuple[NodeBelief, Tensor, dict[str, Any]]:
    """p(v | y) on nodes, log int p(v) p(y | v) dv (*b k), and diagnostics."""
    if mixing.method == "importance":
        return _by_importance(mixing, likelihood, centre, shapes)
    nodes = log_nodes(log_scale_integrand(mixing.prior, likelihood, shapes), centre, mixing.num_nodes)
    return NodeBelief(nodes.u.exp(), nodes.log_weight), nodes.log_total, {"num_nodes": mixing.num_nodes}


def _by_importance(
    mixing: Mixing, likelihood: LogLikelihood, centre: Tensor, shapes: Values
) -> tuple[NodeBelief, Tensor, dict[str, Any]]:
    """Draws from the prior, weighted by their likelihood; every problem has the draws that it would have alone."""
    draws = torch.empty(*centre.shape, mixing.num_samples, dtype=centre.dtype, device=centre.device)
    for place in np.ndindex(*centre.shape) if shapes else [(...,)]:
        source = torch.Generator(centre.device).manual_seed(mixing.seed)
        own = {name: value[place] for name, value in shapes.items()}
        draws[place] = mixing.prior.sample((mixing.num_samples,), source, own).to(centre)
    value = likelihood(draws.log())
    log_total = torch.logsumexp(value, -1)
    log_weight = value - log_total.unsqueeze(-1)
    size = float(torch.logsumexp(2 * log_weight, -1).neg().exp().min())
    if size < _FEW:
        message = f"ScaleMixture: importance weights are worth {size:.0f} of {mixing.num_samples} draws of the scale"
        warnings.warn(f"{message}; use method='quadrature'", NumericalWarning, stacklevel=4)
    report = {"num_samples": mixing.num_samples, "effective_sample_size": size}
    return NodeBelief(draws, log_weight), log_total - math.log(mixing.num_samples), report
