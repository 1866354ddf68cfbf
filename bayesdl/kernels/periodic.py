r"""The periodic kernel, as an RBF on circles.

    k(x, z) = exp(-2 sum_k sin^2(pi (x_k - z_k) / period_k) / lengthscale_k)
            = exp(-|u(x) - u(z)|^2 / 2),    u_k(x) = (cos, sin)(2 pi x_k / period_k) / sqrt(lengthscale_k)

because 2 sin^2(t / 2) = 1 - cos t. The lengthscale enters as in GPyTorch, without a square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True, kw_only=True)
class Periodic(OnColumns):
    """exp(-2 sum_k sin^2(pi (x_k - z_k) / period_k) / lengthscale_k).

    Attributes:
        period: Initial value, one number or one per column.
        lengthscale: Initial value, one number or one per column; None for d, which keeps correlations at a generic
            distance the same in every dimension. The values are pure numbers, not distances.
        ard: One period and one lengthscale per column (True), or one of each for all.
        active_dims: Columns of x that the kernel looks at; None for all.
        period_prior: A prior, None for a flat one, or "default": LogNormal(1, 1), whose mode is 1.
        lengthscale_prior: A prior, None for a flat one, or "default": LogNormal(log(d) + 1, 1), whose mode is d.
    """

    period: float | tuple[float, ...] = 1.0
    lengthscale: float | tuple[float, ...] | None = None
    ard: bool = True
    period_prior: PriorChoice = "default"
    lengthscale_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("Periodic", "period", self.period, self.ard)
        check_positive("Periodic", "lengthscale", self.lengthscale, self.ard)

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`period` and `lengthscale`, per dimension unless ard=False."""
        width = self._width(d)
        shape = (width,) if self.ard else ()
        period_prior = LogNormal(1.0, 1.0) if self.period_prior == "default" else self.period_prior
        prior = LogNormal(math.log(width) + 1.0, 1.0) if self.lengthscale_prior == "default" else self.lengthscale_prior
        lengthscale = float(width) if self.lengthscale is None else self.lengthscale
        return (
            Parameter("period", shape, self._per_column("period", self.period, width), period_prior),
            Parameter("lengthscale", shape, self._per_column("lengthscale", lengthscale, width), prior),
        )

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        x = self._select(x)
        centre = x.detach().mean(-2, keepdim=True)
        u = self._circles(x - centre, params)
        v = None if z is None else self._circles(self._select(z) - centre, params)
        return profiles.rbf(sqdist(u, v))

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        return x.new_ones(self._circles(self._select(x), params).shape[:-1])

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """The RBF's gradient on the circles, then the chain rule through the angle and the radius."""
        params = self._resolved(x, params)
        with torch.no_grad():
            x = self._select(x)
            x = x - x.mean(-2, keepdim=True)
            period, lengthscale = params["period"].detach(), params["lengthscale"].detach()
            u = self._circles(x, params)
            centre = u.mean(-2, keepdim=True)
            value = sqdist_centred(u - centre, -0.5, then=lambda block, rows: block.exp_())

        def pullback(p: Tensor) -> Params:
            # dL/du = 4 sum_j q_ij (u_i - u_j) with q = -p k / 2; differences do not see the centre.
            by_u = difference_sum(p, value, u - centre)[0].mul_(2.0)
            width = x.shape[-1]
            turn = u[..., width:] * by_u[..., :width] - u[..., :width] * by_u[..., width:]
            angle = 2 * math.pi * x / per_row(period, self.ard)
            by_period = (turn * angle).sum(-2)
            by_lengthscale = (u * by_u).sum(-2).unflatten(-1, (2, width)).sum(-2).mul_(-0.5)
            if not self.ard:
                by_period, by_lengthscale = by_period.sum(-1), by_lengthscale.sum(-1)
            return {
                "period": reduce_to(by_period / period, period.shape),
                "lengthscale": reduce_to(by_lengthscale / lengthscale, lengthscale.shape),
            }

        return value, pullback

    def _circles(self, x: Tensor, params: Params) -> Tensor:
        """(*b n 2w): all cosines, then all sines."""
        angle = 2 * math.pi * x / per_row(get(params, "period", "Periodic"), self.ard)
        radius = per_row(get(params, "lengthscale", "Periodic"), self.ard).rsqrt()
        return torch.cat([angle.cos() * radius, angle.sin() * radius], -1)

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        """Random Fourier features of the RBF on the circles: exactly periodic, without Bessel series."""
        half = (num_features + 1) // 2
        omega = draw_normal((*lead, half, 2 * self._width(d)), params, generator)
        phase = 2 * math.pi * draw_uniform((*lead, 1, half), params, generator)
        omega = torch.cat([omega, omega], -2)[..., :num_features, :]
        phase = torch.cat([phase, phase + math.pi / 2], -1)[..., :num_features]

        def evaluate(x: Tensor) -> Tensor:
            u = self._circles(self._select(x), params)
            return math.sqrt(2) * (u @ align(omega, 2, u).mT + align(phase, 2, u)).cos()

        return evaluate
