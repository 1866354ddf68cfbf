r"""Stationary kernels: functions of the distance between inputs that are scaled by lengthscales.

    k(x, z) = h(d2),    d2 = sum_k (x_k - z_k)^2 / lengthscale_k^2

The closed-form gradient needs one matrix product more than the value, and never an (n, n, d) tensor: with
q = dL/d(d2) and u = x / lengthscale,

    dL/d(lengthscale_k) = -4 / lengthscale_k  sum_i u_ik ( (q 1)_i u_ik - (q u)_ik )
"""

from __future__ import annotations

import abc
import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.hyper import LogNormal, Parameter
from bayesdl.kernels.base import (
    Functions,
    Lead,
    Params,
    Pullback,
    align,
    draw_normal,
    draw_uniform,
    get,
    per_row,
    reduce_to,
)
from bayesdl.kernels.columns import OnColumns, PriorChoice, check_positive, difference_sum
from bayesdl.ops import profiles
from bayesdl.ops.distance import sqdist, sqdist_centred

_Closed = tuple[Tensor, Tensor, float, Pullback]


@dataclass(frozen=True, kw_only=True)
class _Stationary(OnColumns):
    lengthscale: float | tuple[float, ...] | None = None
    ard: bool = True
    lengthscale_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(type(self).__name__, "lengthscale", self.lengthscale, self.ard)

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`lengthscale`, per dimension unless ard=False, and what the profile adds."""
        width = self._width(d)
        # Hvarfner et al. (2024), arXiv 2402.02229: distances grow as sqrt(d), so typical lengthscales must as well.
        loc = math.sqrt(2) + 0.5 * math.log(width)
        prior = LogNormal(loc, math.sqrt(3)) if self.lengthscale_prior == "default" else self.lengthscale_prior
        # Of the size of the distances between standardised inputs; the prior's median is four times as long, and a fit
        # that starts there needs nearly twice as many evaluations.
        initial = math.sqrt(width) if self.lengthscale is None else self.lengthscale
        initial = self._per_column("lengthscale", initial, width)
        return (Parameter("lengthscale", (width,) if self.ard else (), initial, prior), *self._extra_parameters())

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        x, lengthscale = self._scaled(x, params)
        if z is not None:
            z = self._select(z) / lengthscale
        return self._profile(sqdist(x, z), params)

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        scaled, _ = self._scaled(x[..., :1, :], params)
        return x.new_ones(*scaled.shape[:-2], x.shape[-2])

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """K and the closed-form gradient of the module's docstring."""
        return self.scaled_value_and_pullback(x, self._resolved(x, params), None)

    def scaled_value_and_pullback(
        self, x: Tensor, params: Params, outputscale: Tensor | None
    ) -> tuple[Tensor, Pullback]:
        """`value_and_pullback` of outputscale * K, with a gradient in "outputscale"; its value costs no pass more.

        Args:
            x: (*b n d).
            params: Values of the hyper-parameters.
            outputscale: () or (*b), positive; in the second case the other hyper-parameters have the same batch axes.
        """
        # Entering no_grad takes as long as a small operation, and `ops.mll_and_grad` is in it already.
        with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():
            u, _ = self._scaled(x, params)
            u = torch.sub(u, u.sum(-2, keepdim=True), alpha=1.0 / max(1, u.shape[-2]))
            log_scale = None if outputscale is None else outputscale.log()
            if log_scale is not None and log_scale.ndim > 0:
                log_scale = log_scale[..., None, None]
            value, slope, factor, extra = self._value_and_slope(u, params, log_scale)
            lengthscale = params["lengthscale"].detach()

        def pullback(p: Tensor) -> Params:
            grads = extra(p)
            total = None if outputscale is None or slope is value else inner(p, value)
            differences, by_row = difference_sum(p, slope, u)
            per_column = differences.mul_(u).sum(-2)
            if outputscale is not None:
                total = by_row.sum((-2, -1)) if total is None else total
                grads["outputscale"] = reduce_to(total, outputscale.shape) / outputscale
            if not self.ard:
                per_column = per_column.sum(-1)
            grads["lengthscale"] = reduce_to(per_column.mul_(4.0 * factor).div_(lengthscale), lengthscale.shape)
            return grads

        return value, pullback

    def _scaled(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        lengthscale = per_row(get(params, "lengthscale", type(self).__name__), self.ard)
        x = self._select(x)
        if self.ard and lengthscale.shape[-1] != x.shape[-1]:
            fail(
                ShapeError,
                type(self).__name__,
                f"lengthscale must have shape (*b, {x.shape[-1]}), one for each column of x.",
                got=str(tuple(params["lengthscale"].shape)),
                fix="take shapes from kernel.parameters(d), or pass ard=False for one lengthscale",
            )
        return x / lengthscale, lengthscale

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        """sqrt(2) cos(omega . u + phase), with omega from the spectral density of the profile (Bochner)."""
        # Features come in pairs a quarter period apart: each is unbiased, and together they give k(x, x) = 1 exactly.
        half = (num_features + 1) // 2
        omega = self._frequencies((*lead, half), self._width(d), params, generator)
        phase = 2 * math.pi * draw_uniform((*lead, 1, half), params, generator)
        omega = torch.cat([omega, omega], -2)[..., :num_features, :]
        phase = torch.cat([phase, phase + math.pi / 2], -1)[..., :num_features]

        def evaluate(x: Tensor) -> Tensor:
            u, _ = self._scaled(x, params)
            return math.sqrt(2) * (u @ align(omega, 2, u).mT + align(phase, 2, u)).cos()

        return evaluate

    def _extra_parameters(self) -> tuple[Parameter, ...]:
        """Hyper-parameters of the profile besides the lengthscale: none, unless a kernel says otherwise."""
        return ()

    @abc.abstractmethod
    def _profile(self, d2: Tensor, params: Params) -> Tensor:
        """h(d2), differentiable."""

    @abc.abstractmethod
    def _value_and_slope(self, u: Tensor, params: Params, log_scale: Tensor | None) -> _Closed:
        """K, a tensor g and a number c with h'(d2) = c g, and the pullback onto the other parameters.

        With `log_scale`, () or (*b 1 1), all of them are those of exp(log_scale) K.
        """

    @abc.abstractmethod
    def _frequencies(self, shape: tuple[int, ...], width: int, params: Params, generator: torch.Generator) -> Tensor:
        """Draws from the spectral density at unit lengthscale, shape (*shape, width)."""


def inner(p: Tensor, k: Tensor) -> Tensor:
    """Sum of the elementwise product over the last two axes."""
    if p.ndim == 2 and p.shape == k.shape:
        return torch.dot(p.reshape(-1), k.reshape(-1))
    return (p * k).sum((-2, -1))


def _no_extra(p: Tensor) -> Params:
    return {}


def _square(u: Tensor, other: Tensor | None) -> Tensor:
    """An (n, n) matrix to be filled, for each batch element of u (*b n d), or of u and of `other`, () or (*b 1 1)."""
    batch = u.shape[:-2]
    if other is not None and other.shape[:-2] != batch:
        batch = torch.broadcast_shapes(batch, other.shape[:-2])
    return u.new_empty((*batch, u.shape[-2], u.shape[-2]))


@dataclass(frozen=True, kw_only=True)
class RBF(_Stationary):
    """exp(-d2 / 2): infinitely smooth functions (squared exponential, Gaussian kernel).

    Attributes:
        lengthscale: Initial value, one number or one per column; None for sqrt(d).
        ard: One lengthscale per column (True) or one for all.
        active_dims: Columns of x that the kernel looks at; None for all.
        lengthscale_prior: A prior, None for a flat one, or "default": LogNormal(sqrt 2 + log(d) / 2, sqrt 3).

    Reference of the default: Hvarfner, Hellsten, Nardi (2024), arXiv 2402.02229.
    """

    def _profile(self, d2: Tensor, params: Params) -> Tensor:
        return profiles.rbf(d2)

    def _value_and_slope(self, u: Tensor, params: Params, log_scale: Tensor | None) -> _Closed:
        # no clamp: a distance that rounding makes negative changes the value by a rounding error
        value = sqdist_centred(u, -0.5, log_scale, then=lambda block, rows: block.exp_(), clamp=False)
        return value, value, -0.5, _no_extra

    def _frequencies(self, shape: tuple[int, ...], width: int, params: Params, generator: torch.Generator) -> Tensor:
        return draw_normal((*shape, width), params, generator)


@dataclass(frozen=True)
class Matern(_Stationary):
    """Matern kernel: functions that are nu - 1/2 times differentiable.

    With r = sqrt(2 nu d2):  exp(-r),  (1 + r) exp(-r)  and  (1 + r + r^2 / 3) exp(-r)  for nu = 0.5, 1.5 and 2.5.
    The kink of nu = 0.5 at coincident points counts as slope 0.

    Attributes:
        nu: Smoothness, 0.5, 1.5 or 2.5.
        lengthscale: Initial value, one number or one per column; None for sqrt(d).
        ard: One lengthscale per column (True) or one for all.
        active_dims: Columns of x that the kernel looks at; None for all.
        lengthscale_prior: A prior, None for a flat one, or "default": LogNormal(sqrt 2 + log(d) / 2, sqrt 3).
    """

    nu: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nu not in (0.5, 1.5, 2.5):
            fail(
                SettingError,
                "Matern",
                "nu must be 0.5, 1.5 or 2.5.",
                got=repr(self.nu),
                fix="pass nu=2.5, or RBF() for the limit of large nu",
            )

    def _profile(self, d2: Tensor, params: Params) -> Tensor:
        return profiles.matern(d2, self.nu)

    def _value_and_slope(self, u: Tensor, params: Params, log_scale: Tensor | None) -> _Closed:
        slope = _square(u, log_scale)

        def then(block: Tensor, rows: slice) -> None:
            profiles.matern_inplace(block, self.nu, slope if rows.start is None else slope[rows], log_scale)

        if self.nu == 0.5:
            # Its square root magnifies rounding at coincident rows, so there the distance must be exactly 0.
            value = sqdist(u)
            then(value, slice(None))
        else:
            value = sqdist_centred(u, 2 * self.nu, then=then)
        return value, slope, profiles.matern_slope_factor(self.nu), _no_extra

    def _frequencies(self, shape: tuple[int, ...], width: int, params: Params, generator: torch.Generator) -> Tensor:
        # The spectral density is a multivariate t with 2 nu degrees of freedom: normal over sqrt(chi2 / dof).
        normal = draw_normal((*shape, width), params, generator)
        chi2 = draw_normal((*shape, round(2 * self.nu)), params, generator).square().sum(-1, keepdim=True)
        return normal / (chi2 / (2 * self.nu)).sqrt()


@dataclass(frozen=True, kw_only=True)
class RationalQuadratic(_Stationary):
    """(1 + d2 / (2 alpha))^(-alpha): a mixture of RBF kernels over many lengthscales.

    Attributes:
        alpha: Initial shape parameter, learned; large values recover the RBF.
        alpha_prior: Prior on alpha, None for a flat one; "default" is LogNormal(1, 1), whose mode is 1.
        lengthscale: Initial value, one number or one per column; None for sqrt(d).
        ard: One lengthscale per column (True) or one for all.
        active_dims: Columns of x that the kernel looks at; None for all.
        lengthscale_prior: A prior, None for a flat one, or "default": LogNormal(sqrt 2 + log(d) / 2, sqrt 3).
    """

    alpha: float = 1.0
    alpha_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("RationalQuadratic", "alpha", self.alpha, False)

    def _extra_parameters(self) -> tuple[Parameter, ...]:
        prior = LogNormal(1.0, 1.0) if self.alpha_prior == "default" else self.alpha_prior
        return (Parameter("alpha", (), self.alpha, prior),)

    def _profile(self, d2: Tensor, params: Params) -> Tensor:
        return profiles.rational_quadratic(d2, get(params, "alpha", "RationalQuadratic")[..., None, None])

    def _value_and_slope(self, u: Tensor, params: Params, log_scale: Tensor | None) -> _Closed:
        alpha = get(params, "alpha", "RationalQuadratic").detach()[..., None, None]
        t = _square(u, alpha)

        def then(block: Tensor, rows: slice) -> None:
            profiles.rational_quadratic_inplace(block, alpha, t[rows], log_scale)

        value = sqdist_centred(u.expand(*t.shape[:-2], *u.shape[-2:]), then=then)

        def alpha_gradient(p: Tensor) -> Params:
            slope = value * ((t - 1) / t - t.log())
            return {"alpha": reduce_to((p * slope).sum((-2, -1)), params["alpha"].shape)}

        return value, value / t, -0.5, alpha_gradient

    def _frequencies(self, shape: tuple[int, ...], width: int, params: Params, generator: torch.Generator) -> Tensor:
        # The mixture over precisions: gamma with shape alpha and mean 1, then normal frequencies.
        alpha = params["alpha"][..., None].expand(shape).to(generator.device)
        precision = torch._standard_gamma(alpha.contiguous(), generator=generator) / alpha
        return precision.sqrt().unsqueeze(-1) * draw_normal((*shape, width), params, generator)
