r"""The exact posterior predictive of a Gaussian process with its hyper-parameters integrated out, for many small tasks.

    p(y | x, D) = int p(y | x, D, theta) p(theta | D) dtheta,    theta: lengthscales, outputscale, noise variance

by adaptive multiple importance sampling: draws of log theta from the prior first, then from Student-t laws, each fitted
to all draws before it, and all of them weighted by the mixture of these laws. The prior is one of them, so weights are
bounded by the number of laws times the likelihood, and the mean of p(D | theta) p(theta) / (mixture) is the evidence.

Reference: Cornuet, Marin, Mira, Robert (2012), arXiv 0907.1254.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl.distributions import GaussianMixture
from bayesdl.hyper import Gamma, HyperPrior

DOF = 5.0  # of the Student-t laws: heavier tails than a posterior of log theta has
POWERS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)  # by which weights are flattened where too few draws are effective

Profile = Callable[[Tensor], Tensor]  # correlation at a distance, in lengthscales


class Weighted(NamedTuple):
    """M draws of theta for each of B tasks.

    Attributes:
        log_weight: (B, M); the sum of weights is the evidence p(D).
        loc: (B, q, M) means of the targets at the queries under each draw.
        variance: (B, q, M) their variances.
    """

    log_weight: Tensor
    loc: Tensor
    variance: Tensor

    @property
    def effective(self) -> Tensor:
        """The effective number of draws of each task, (B,)."""
        return 1 / self.log_weight.softmax(-1).square().sum(-1)

    def predictive(self) -> GaussianMixture:
        """The mixture over all draws, batch shape (B, q)."""
        weights = self.log_weight.softmax(-1).unsqueeze(-2).expand_as(self.loc)
        return GaussianMixture(self.loc, self.variance.sqrt(), weights, validate_args=False)


def matern32(r: Tensor) -> Tensor:
    """(1 + sqrt 3 r) exp(-sqrt 3 r)."""
    return (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)


def matern52(r: Tensor) -> Tensor:
    """(1 + sqrt 5 r + 5 r^2 / 3) exp(-sqrt 5 r)."""
    return (1 + math.sqrt(5) * r + 5 / 3 * r.square()) * torch.exp(-math.sqrt(5) * r)


def laws_of(kernel: Any, noise_variance: HyperPrior, d: int) -> list[HyperPrior]:
    """Priors of d lengthscales, the outputscale and the noise variance, for a scaled kernel with one of each."""
    found = {parameter.name: parameter.prior for parameter in kernel.parameters(d)}
    return [found["base.lengthscale"]] * d + [found["outputscale"], noise_variance]


def integrate(
    x: Tensor, y: Tensor, xs: Tensor, laws: list[HyperPrior], profile: Profile, generator: torch.Generator, *,
    num_laws: int = 5, num_draws: int = 200, at_once: int = 10,
) -> Weighted:  # fmt: skip
    """Draws for tasks x (B n d), y (B n) with queries xs (B q d), `num_draws` from each of `num_laws` laws.

    Cost: O(B M n^3) time for M = num_laws num_draws; memory of `at_once` tasks.
    """
    groups = zip(*(part.double().split(at_once) for part in (x, y, xs)), strict=True)
    parts = [_some(*group, laws, profile, generator, num_laws, num_draws) for group in groups]
    return Weighted(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _some(
    x: Tensor, y: Tensor, xs: Tensor, laws: list[HyperPrior], profile: Profile, generator: torch.Generator,
    num_laws: int, num_draws: int,
) -> Weighted:  # fmt: skip
    def log_prior(u: Tensor) -> Tensor:
        return sum(law.log_prob(u[..., i].exp()) + u[..., i] for i, law in enumerate(laws))

    shape = (len(x), num_draws)
    u = torch.stack([law.sample(shape, generator) for law in laws], -1).log()
    parts = _conditioned(x, y, xs, u, profile)
    log_w, fitted = parts[0] - math.log(num_draws), []
    for turn in range(1, num_laws):
        fitted.append(_fit(u, log_w))
        new = _draw(*fitted[-1], num_draws, generator)
        parts = tuple(torch.cat(pair, -1) for pair in zip(parts, _conditioned(x, y, xs, new, profile), strict=True))
        u = torch.cat([u, new], 1)
        densities = torch.stack([log_prior(u), *(_log_student(u, *law) for law in fitted)])
        mixture = densities.logsumexp(0) - math.log(turn + 1)
        log_w = log_prior(u) + parts[0] - mixture - math.log(u.shape[1])
    return Weighted(log_w, *parts[1:])


def _fit(u: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Location and Cholesky factor of a Student-t law with the mean and covariance of weighted draws."""
    d = u.shape[-1]
    flattened = torch.stack([(log_w * power).softmax(-1) for power in POWERS])
    enough = 1 / flattened.square().sum(-1) > 10 * d
    w = flattened[enough.to(torch.int8).argmax(0), torch.arange(len(u))].unsqueeze(-1)
    loc = (w * u).sum(-2, keepdim=True)
    covariance = (w * (u - loc)).mT @ (u - loc) + 1e-4 * torch.eye(d, dtype=u.dtype)
    return loc, torch.linalg.cholesky(covariance)


def _draw(loc: Tensor, chol: Tensor, num: int, generator: torch.Generator) -> Tensor:
    z = torch.randn(len(loc), num, loc.shape[-1], generator=generator, dtype=loc.dtype)
    return loc + (z @ chol.mT) / Gamma(DOF / 2, DOF / 2).sample((len(loc), num, 1), generator).sqrt()


def _log_student(u: Tensor, loc: Tensor, chol: Tensor) -> Tensor:
    d = u.shape[-1]
    square = torch.linalg.solve_triangular(chol, (u - loc).mT, upper=False).square().sum(-2)
    norm = math.lgamma((DOF + d) / 2) - math.lgamma(DOF / 2) - d / 2 * math.log(DOF * math.pi)
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    return norm - log_det - (DOF + d) / 2 * torch.log1p(square / DOF)


def _conditioned(x: Tensor, y: Tensor, xs: Tensor, u: Tensor, profile: Profile) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y | x, theta) (B, M), and mean and variance of targets at xs, (B, q, M)."""
    lengthscale, outputscale, noise = u[..., :-2].exp(), u[..., -2].exp(), u[..., -1].exp()
    points = torch.cat([x, xs], 1).unsqueeze(1) / lengthscale.unsqueeze(-2)
    n = x.shape[1]
    k = outputscale[..., None, None] * profile(torch.cdist(points[:, :, :n], points))
    # a draw of the prior may be nearly free of noise: 1e-8 of the outputscale keeps its matrix positive definite
    ridge = noise + 1e-8 * outputscale
    chol = torch.linalg.cholesky(k[..., :n] + ridge[..., None, None] * torch.eye(n, dtype=x.dtype))
    right = torch.cat([y[:, None, :, None].expand(-1, u.shape[1], -1, 1), k[..., n:]], -1)
    half = torch.linalg.solve_triangular(chol, right, upper=False)
    white, cross = half[..., :1], half[..., 1:]
    log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    evidence = -0.5 * white.square().sum((-2, -1)) - log_det - 0.5 * n * math.log(2 * math.pi)
    loc = (cross * white).sum(-2)
    variance = (outputscale + ridge).unsqueeze(-1) - cross.square().sum(-2)
    return evidence, loc.mT, variance.mT.clamp_min(1e-12)
