r"""Dual maps of activations: covariances of a layer's outputs from those of its inputs.

    F(a, r, b) = E[phi(u) phi(v)],    (u, v) ~ N(0, [[a, r], [r, b]]),    dF/dr = E[phi'(u) phi'(v)]

With s = sqrt(a b), c = r / s and t = arccos c,

    relu:  F = s (sin t + (pi - t) c) / (2 pi)              dF/dr = (pi - t) / (2 pi)
    erf:   F = (2 / pi) arcsin(2 r / sqrt((1 + 2a)(1 + 2b)))

The relu map is homogeneous of degree 1, so that dF/da = (F - r dF/dr) / (2a) = s sin t / (4 pi a): at c = +-1, where
arccos has no derivative, none of these does anything unusual.

References: Cho, Saul (2009), "Kernel methods for deep learning"; Williams (1997), "Computing with infinite networks".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def relu_dual(a: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """F of relu, differentiable; a (*b n 1), r (*b n m), b (*b 1 m)."""
    return _ReluDual.apply(a, r, b)


def erf_dual(a: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """F of erf, differentiable; a (*b n 1), r (*b n m), b (*b 1 m)."""
    return (2.0 * r * (1.0 + 2.0 * a).rsqrt() * (1.0 + 2.0 * b).rsqrt()).arcsin() * (2.0 / math.pi)


def relu_dual_slopes(a: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dF/da, dF/dr and dF/db of relu, in the shape of r; differentiable in turn, with 0 where c = +-1."""
    tiny = torch.finfo(r.dtype).tiny
    s = a.clamp_min(tiny).sqrt() * b.clamp_min(tiny).sqrt()
    c = r / s
    inside = c.abs() < 1.0
    safe = torch.where(inside, c, torch.zeros_like(c))
    t = torch.where(inside, safe.arccos(), torch.where(c > 0, 0.0, math.pi).to(c))
    height = torch.where(inside, s * (1.0 - safe.square()).sqrt(), torch.zeros_like(c)) / (4.0 * math.pi)
    return height / a.clamp_min(tiny), (math.pi - t) / (2.0 * math.pi), height / b.clamp_min(tiny)


def erf_dual_slopes(a: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dF/da, dF/dr and dF/db of erf, in the shape of r."""
    wide_a, wide_b = 1.0 + 2.0 * a, 1.0 + 2.0 * b
    slope = (4.0 / math.pi) * (wide_a * wide_b - 4.0 * r.square()).rsqrt()
    return -slope * r / wide_a, slope, -slope * r / wide_b


def _relu_value(a: Tensor, r: Tensor, b: Tensor) -> Tensor:
    tiny = torch.finfo(r.dtype).tiny
    root_a, root_b = a.clamp_min(tiny).sqrt(), b.clamp_min(tiny).sqrt()
    c = (r / root_a).div_(root_b).clamp_(-1.0, 1.0)
    # F / s = (sqrt(1 - c^2) + (pi - arccos c) c) / (2 pi), where pi - arccos c = arccos(-c).
    height = torch.addcmul(torch.ones((), dtype=r.dtype, device=r.device), c, c, value=-1.0).sqrt_()
    height.addcmul_(torch.neg(c).arccos_(), c)
    return height.mul_(root_a).mul_(root_b).mul_(1.0 / (2.0 * math.pi))


class _ReluDual(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        return _relu_value(a, r, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, r, b = ctx.saved_tensors
        by_a, by_r, by_b = relu_dual_slopes(a, r, b)
        grad = grads[0]
        return (grad * by_a).sum_to_size(a.shape), grad * by_r, (grad * by_b).sum_to_size(b.shape)
