r"""How far a quantity is expected to rise above a threshold t, E[(Y - t)+], and how likely, P(Y > t); and their logs.

With z = (loc - t) / scale and the standard density f and distribution function F,

    Normal       E = scale (z F(z) + f(z))
    Student-t    E = scale (z F(z) + (nu + z^2) / (nu - 1) f(z)),    nu > 1
    mixtures     the weighted mean over the components

and in all of them d E / d loc = F(z), which is P(Y > t). Both terms of E nearly cancel for z << 0, where the logs are
found from E / f(z) = int_0^inf s f(z - s) / f(z) ds instead, whose integrand is positive.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import Normal as TorchNormal

from bayesdl.distributions.empirical import Empirical
from bayesdl.distributions.mixture import GaussianMixture
from bayesdl.distributions.student import StudentT, _log_density
from bayesdl.errors import SettingError, fail
from bayesdl.ops.student import student_cdf

_TAIL = -1.0  # below this z the two terms of E lose digits to one another
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
_STEP, _LOW, _HIGH = 0.25, -36.0, 60.0  # of the trapezoid rule in log s


def log_expected_improvement(distribution: Distribution, threshold: Any) -> Tensor:
    """log E[(Y - t)+], accurate far into the tail, with gradients in the location and scale.

    Args:
        distribution: Normal, Student-t with more than one degree of freedom, `GaussianMixture`, `Empirical`, or of a
            class with a method `log_expected_improvement(threshold)`, such as a distribution of bars would have.
        threshold: t, broadcasting with the batch shape.

    Returns:
        The batch shape; -inf where no draw of an `Empirical` rises.

    Raises:
        SettingError: A class without a formula.

    Cost: elementwise; some hundreds of operations where a Student-t is far below t.
    """
    own = getattr(distribution, "log_expected_improvement", None)
    return own(threshold) if own is not None else _log_expected(distribution, threshold)


def expected_improvement(distribution: Distribution, threshold: Any) -> Tensor:
    """E[(Y - t)+]; see `log_expected_improvement`, of which it is the exponential."""
    if isinstance(distribution, Empirical):
        return (distribution.draws - _at(threshold, distribution.draws).unsqueeze(-1)).clamp_min(0.0).mean(-1)
    return log_expected_improvement(distribution, threshold).exp()


def log_probability_of_improvement(distribution: Distribution, threshold: Any) -> Tensor:
    """log P(Y > t), accurate far into the tail; as `log_expected_improvement` otherwise.

    The protocol for other classes is a method `log_probability_of_improvement(threshold)`, or else `cdf`.
    """
    own = getattr(distribution, "log_probability_of_improvement", None)
    return own(threshold) if own is not None else _log_probability(distribution, threshold)


@functools.singledispatch
def _log_expected(distribution: Distribution, threshold: Any) -> Tensor:
    wanted = "distribution must be Normal, StudentT, GaussianMixture or Empirical."
    fix = "give the class a method log_expected_improvement(threshold)"
    fail(SettingError, "log_expected_improvement", wanted, got=type(distribution).__name__, fix=fix)


@_log_expected.register
def _(distribution: TorchNormal, threshold: Any) -> Tensor:
    z = (distribution.loc - _at(threshold, distribution.loc)) / distribution.scale
    return distribution.scale.log() + _normal_log_expected(z)


@_log_expected.register
def _(distribution: StudentT, threshold: Any) -> Tensor:
    if not bool((distribution.dof > 1).all()):
        got = f"dof {float(distribution.dof.min())}"
        wanted = "the expectation exists above one degree of freedom only."
        fail(SettingError, "log_expected_improvement", wanted, got=got, fix="a lighter-tailed prior, or more data")
    z = (distribution.loc - _at(threshold, distribution.loc)) / distribution.scale
    return distribution.scale.log() + _StudentLogExpected.apply(z, distribution.dof.expand_as(z))


@_log_expected.register
def _(distribution: GaussianMixture, threshold: Any) -> Tensor:
    z = (distribution.loc - _at(threshold, distribution.loc[..., 0]).unsqueeze(-1)) / distribution.scale
    return torch.logsumexp(distribution.weights.log() + distribution.scale.log() + _normal_log_expected(z), -1)


@_log_expected.register
def _(distribution: Empirical, threshold: Any) -> Tensor:
    return expected_improvement(distribution, threshold).log()


@functools.singledispatch
def _log_probability(distribution: Distribution, threshold: Any) -> Tensor:
    return (1.0 - distribution.cdf(threshold)).log()


@_log_probability.register
def _(distribution: TorchNormal, threshold: Any) -> Tensor:
    return torch.special.log_ndtr((distribution.loc - _at(threshold, distribution.loc)) / distribution.scale)


@_log_probability.register
def _(distribution: StudentT, threshold: Any) -> Tensor:
    z = (distribution.loc - _at(threshold, distribution.loc)) / distribution.scale
    return _StudentLogCDF.apply(z, distribution.dof.expand_as(z))


@_log_probability.register
def _(distribution: GaussianMixture, threshold: Any) -> Tensor:
    z = (distribution.loc - _at(threshold, distribution.loc[..., 0]).unsqueeze(-1)) / distribution.scale
    return torch.logsumexp(distribution.weights.log() + torch.special.log_ndtr(z), -1)


@_log_probability.register
def _(distribution: Empirical, threshold: Any) -> Tensor:
    return (
        (distribution.draws > _at(threshold, distribution.draws[..., 0]).unsqueeze(-1))
        .to(distribution.draws)
        .mean(-1)
        .log()
    )


def _at(threshold: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(threshold, dtype=like.dtype, device=like.device)


def _normal_log_expected(z: Tensor) -> Tensor:
    """log(z F(z) + f(z)), with autograd's own gradients; each branch sees harmless values where it is not taken."""
    near = z.clamp_min(_TAIL)
    direct = (near * torch.special.ndtr(near) + (-0.5 * near.square() - _LOG_ROOT_2PI).exp()).log()
    middle = z.clamp(-1e3, _TAIL)
    # E / f = 1 - a F(-a) / f(a), a = -z, in which a F / f tends to 1: from its expansion beyond 1e3
    ratio = 1.0 + middle * math.sqrt(0.5 * math.pi) * torch.special.erfcx(-middle * math.sqrt(0.5))
    far = z.clamp_max(-1e3)
    inverse = far.square().reciprocal()
    series = inverse.log() + torch.log1p(-3.0 * inverse + 15.0 * inverse.square())
    tail = torch.where(z < -1e3, series, ratio.log()) - 0.5 * z.square() - _LOG_ROOT_2PI
    return torch.where(z > _TAIL, direct, tail)


class _StudentLogExpected(torch.autograd.Function):
    """log(z F(z) + (nu + z^2) / (nu - 1) f(z)), whose slope is F(z) over that argument; nu counts as a constant."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nu: Tensor) -> Tensor:
        """The value; the slope is kept."""
        log_rise, log_below = _student_logs(z.to(torch.float64), nu.to(torch.float64))
        ctx.save_for_backward((log_below - log_rise).exp().to(z))
        return log_rise.to(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Times the slope."""
        return grad * ctx.saved_tensors[0], None


class _StudentLogCDF(torch.autograd.Function):
    """log F(z), whose slope is f(z) / F(z); nu counts as a constant."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, nu: Tensor) -> Tensor:
        """The value; the slope is kept."""
        wide, nu = z.to(torch.float64), nu.to(torch.float64)
        _, log_below = _student_logs(wide, nu)
        ctx.save_for_backward((_log_density(wide, nu) - log_below).exp().to(z))
        return log_below.to(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Times the slope."""
        return grad * ctx.saved_tensors[0], None


def _student_logs(z: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """log E[(z + T)+] and log P(T <= z) for a standard Student-t T, float64, without gradients."""
    log_density = _log_density(z, nu)
    below = student_cdf(z, nu)
    rise = z * below + (nu + z.square()) / (nu - 1) * log_density.exp()
    tail = z < _TAIL
    log_rise, log_below = rise.log(), below.log()
    if bool(tail.any()):
        first, zeroth = _tail_integrals(-z[tail], nu[tail])
        log_rise[tail] = first + log_density[tail]
        log_below[tail] = zeroth + log_density[tail]
    return log_rise, log_below


def _tail_integrals(a: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    r"""log int_0^inf s^k (1 + (2 a s + s^2) / (nu + a^2))^{-(nu + 1)/2} ds for k = 1 and 0, a >= 1; any shape.

    By the trapezoid rule in log s, whose error falls exponentially with the step for this integrand. s is measured in
    the length (nu + a^2) / ((nu + 1) a) over which the density falls by a factor e at first.
    """
    w = torch.arange(_LOW, _HIGH + _STEP, _STEP, dtype=a.dtype, device=a.device)
    length = (nu + a.square()) / ((nu + 1) * a)
    log_s = length.log().unsqueeze(-1) + w
    s = log_s.exp()
    a, nu = a.unsqueeze(-1), nu.unsqueeze(-1)
    fall = -0.5 * (nu + 1) * torch.log1p((2 * a * s + s.square()) / (nu + a.square()))
    zeroth = torch.logsumexp(log_s + fall, -1) + math.log(_STEP)
    return torch.logsumexp(2 * log_s + fall, -1) + math.log(_STEP), zeroth
