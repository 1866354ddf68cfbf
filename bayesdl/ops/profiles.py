r"""Stationary covariance profiles: functions of squared scaled distance d2, with their slopes dk / d(d2).

Working in d2 instead of the distance removes every 0/0 at coincident points, except for Matern-1/2, which has a kink
there and whose slope at 0 is set to 0. Two forms of each:

- `rbf`, `matern`, `rational_quadratic`: out of place, differentiable to any order;
- `*_inplace`: value and slope without a graph, which overwrite their argument, for closed-form gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rbf(d2: Tensor) -> Tensor:
    """exp(-d2 / 2)."""
    return (-0.5 * d2).exp()


def matern(d2: Tensor, nu: float) -> Tensor:
    r"""Matern profile of smoothness nu in {0.5, 1.5, 2.5}; with r = sqrt(2 nu d2),

    nu = 0.5: exp(-r);    nu = 1.5: (1 + r) exp(-r);    nu = 2.5: (1 + r + r^2 / 3) exp(-r).
    """
    return _Matern.apply(2.0 * nu * d2, round(nu - 0.5))


def rational_quadratic(d2: Tensor, alpha: Tensor) -> Tensor:
    """(1 + d2 / (2 alpha))^(-alpha); `alpha` must broadcast against `d2`."""
    return (-alpha * torch.log1p(0.5 * d2 / alpha)).exp()


class _Matern(torch.autograd.Function):
    """h_p(u) in u = r^2. The derivatives close on themselves: h_2' = -h_1 / 6, h_1' = -h_0 / 2, h_0' = -h_0 / (2 r)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, order: int) -> Tensor:
        r = u.sqrt()
        if order == 0:
            return r.neg_().exp_()
        poly = (r + 1.0) if order == 1 else torch.add(r, u, alpha=1.0 / 3.0).add_(1.0)
        return r.neg_().exp_().mul_(poly)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        u, ctx.order = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        if ctx.order == 2:
            slope = _Matern.apply(u, 1) / -6.0
        elif ctx.order == 1:
            slope = _Matern.apply(u, 0) / -2.0
        else:
            away = u > 0
            r = torch.where(away, u, torch.ones_like(u)).sqrt()
            slope = torch.where(away, -0.5 * (-r).exp() / r, torch.zeros_like(u))
        return grads[0] * slope, None


def matern_inplace(u: Tensor, nu: float, slope: Tensor, log_scale: Tensor | None = None) -> None:
    """Overwrites u = 2 nu d2 by the value, and `slope` by the slope in d2 up to `matern_slope_factor(nu)`.

    Both are multiplied by exp(log_scale), which costs nothing here.
    """
    # One more buffer than value and slope: r where the slope has no place for it, the decay where it has.
    if nu == 2.5:
        r = torch.sqrt(u, out=slope)
        decay = _decay(r, log_scale, None)
        # (1 + r) exp(-r) is the slope of nu = 2.5, and with r^2 / 3 exp(-r) more the value.
        torch.addcmul(decay, decay, r, out=slope)
        torch.addcmul(slope, u, decay, value=1.0 / 3.0, out=u)
        return
    r = u.sqrt()
    if nu == 1.5:
        decay = _decay(r, log_scale, slope)
        torch.addcmul(decay, decay, r, out=u)
        return
    decay = _decay(r, log_scale, u)
    torch.div(decay, r, out=slope)
    slope.masked_fill_(r == 0, 0.0)


def _decay(r: Tensor, log_scale: Tensor | None, out: Tensor | None) -> Tensor:
    exponent = torch.neg(r, out=out) if log_scale is None else torch.sub(log_scale, r, out=out)
    return exponent.exp_()


def matern_slope_factor(nu: float) -> float:
    """What the slope of `matern_inplace` must be multiplied by to be dk / d(d2)."""
    return {0.5: -0.5, 1.5: -1.5, 2.5: -5.0 / 6.0}[nu]


def rational_quadratic_inplace(d2: Tensor, alpha: Tensor, t: Tensor, log_scale: Tensor | None = None) -> None:
    """Overwrites d2 by the value, times exp(log_scale), and t by 1 + d2 / (2 alpha); the slope is -value / (2 t)."""
    torch.div(d2, 2.0 * alpha, out=t).add_(1.0)
    torch.log(t, out=d2).mul_(-alpha)
    if log_scale is not None:
        d2.add_(log_scale)
    d2.exp_()
