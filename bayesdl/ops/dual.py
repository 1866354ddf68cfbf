r"""Dual maps of activations: covariances of a layer's outputs from those of its inputs.

    F(a, r, b) = E[phi(u) phi(v)],    (u, v) ~ N(0, [[a, r], [r, b]]),    dF/dr = E[phi'(u) phi'(v)]

Each activation is a `Dual`: calling it gives F, differentiable to any order, and its other methods give the pieces that
networks of infinite width are made of. With s = sqrt(a b), c = r / s and tau = arccos(-c),

    relu     F = s (sqrt(1 - c^2) + tau c) / (2 pi)             dF/dr = tau / (2 pi)
    step     F = tau / (2 pi)
    erf      F = (2 / pi) arcsin(2 r / sqrt((1 + 2a)(1 + 2b)))
    exp      F = exp((a + b) / 2 + r);    sin, cos and their like are sums of such terms
    gelu     F = r (1 / 4 + arcsin(q) / (2 pi)) + (a b + r^2 (1 - a b) / p) / (2 pi sqrt(p - r^2)),
             p = (1 + a)(1 + b), q = r / sqrt(p)

A piecewise linear activation, n min(x, 0) + p max(x, 0), has F = (p - n)^2 F_relu + n p r. The relu map is homogeneous
of degree 1, so that dF/da = (F - r dF/dr) / (2a) = s sqrt(1 - c^2) / (4 pi a): at c = +-1, where arccos has no
derivative, none of these does anything unusual. Other smooth activations: `bayesdl.ops.dual_series`.

References: Cho, Saul (2009), "Kernel methods for deep learning"; Williams (1997), "Computing with infinite networks";
Tsuchida et al. (2020), arXiv 2002.08517, for gelu.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class Dual(abc.ABC):
    """The dual map of one activation. Throughout, a, r and b broadcast: a (*b n 1), r (*b n m), b (*b 1 m), say.

    `__call__` and `parts` agree up to rounding; the first keeps only its inputs for the way back, and its derivatives
    are those of `parts`, which have no singularity at parallel inputs.
    """

    def __call__(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """F(a, r, b), differentiable."""
        return _Map.apply(a, r, b, self)

    @abc.abstractmethod
    def value(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """F(a, r, b) in memory of its own, made for speed: call it without a graph."""

    @abc.abstractmethod
    def slope(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """dF/dr = E[phi'(u) phi'(v)], differentiable, with finite derivatives everywhere."""

    @abc.abstractmethod
    def parts(self, a: Tensor, r: Tensor, b: Tensor) -> _Parts:
        """F, dF/da, dF/dr and dF/db, each of a shape that broadcasts with r; differentiable, finite everywhere."""

    @abc.abstractmethod
    def diagonal(self, a: Tensor) -> Tensor:
        """F(a, a, a) = E[phi(u)^2], differentiable."""

    @abc.abstractmethod
    def slope_diagonal(self, a: Tensor) -> Tensor:
        """E[phi'(u)^2], differentiable."""


class _Map(torch.autograd.Function):
    """F with the closed slopes as its derivative: three tensors are kept, and no step of the formula is recorded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, r: Tensor, b: Tensor, dual: Dual) -> Tensor:
        return dual.value(a, r, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Dual], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.dual = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, r, b = ctx.saved_tensors
        _, by_a, by_r, by_b = ctx.dual.parts(a, r, b)
        grad = grads[0]
        return _onto(grad * by_a, a), _onto(grad * by_r, r), _onto(grad * by_b, b), None


def _onto(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape)


def _roots(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(a.dtype).tiny
    return a.clamp_min(tiny).sqrt(), b.clamp_min(tiny).sqrt()


def _stretched(root: Tensor) -> Tensor:
    """1 / root, enlarged by a few roundings, so that a correlation that rounding took off +-1 is clamped onto it.

    An angle is the square root of what a correlation lacks from 1: one rounding would already give 1e-8.
    """
    return (1.0 + 4.0 * torch.finfo(root.dtype).eps) / root


def _angle(a: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, sqrt(1 - c^2) and tau, differentiable; at c = +-1 their derivatives in c are set to 0."""
    root_a, root_b = _roots(a, b)
    c = r * _stretched(root_a) / root_b
    inside = c.abs() < 1.0
    safe = torch.where(inside, c, torch.zeros_like(c))
    height = torch.where(inside, (1.0 - safe.square()).sqrt(), torch.zeros_like(c))
    tau = torch.where(inside, (-safe).arccos(), c.new_full((), math.pi) * (c > 0))
    return root_a * root_b, height, tau


def _turn(a: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """tau = arccos(-c) without a graph."""
    root_a, root_b = _roots(a, b)
    return (r * _stretched(root_a).neg_()).div_(root_b).clamp_(-1.0, 1.0).arccos_()


@dataclass(frozen=True)
class Rectifier(Dual):
    """n min(x, 0) + p max(x, 0): relu (0, 1), leaky relu (0.01, 1), the absolute value (-1, 1), the identity (1, 1).

    Attributes:
        negative: Slope n below 0.
        positive: Slope p above 0.
    """

    negative: float = 0.0
    positive: float = 1.0

    @property
    def _bend(self) -> float:
        return (self.positive - self.negative) ** 2

    @property
    def _line(self) -> float:
        return self.positive * self.negative

    def value(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """F = (p - n)^2 F_relu + n p r."""
        if self._bend == 0:
            return r * self._line
        root_a, root_b = _roots(a, b)
        c = (r / root_a).div_(root_b).clamp_(-1.0, 1.0)
        f = torch.addcmul(torch.ones((), dtype=c.dtype, device=c.device), c, c, value=-1.0).sqrt_()
        f.addcmul_(torch.neg(c).arccos_(), c)
        f.mul_(root_a * (self._bend / (2.0 * math.pi))).mul_(root_b)
        return f.add_(r, alpha=self._line) if self._line else f

    def slope(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """(p - n)^2 tau / (2 pi) + n p."""
        if self._bend == 0:
            return torch.full_like(r, self._line)
        if _recorded(a, r, b):
            tau = _angle(a, r, b)[2]
            return tau * (self._bend / (2.0 * math.pi)) + self._line
        return _turn(a, r, b).mul_(self._bend / (2.0 * math.pi)).add_(self._line)

    def parts(self, a: Tensor, r: Tensor, b: Tensor) -> _Parts:
        """F and its slopes from one angle; dF/da = s sqrt(1 - c^2) (p - n)^2 / (4 pi a)."""
        tiny, scale = torch.finfo(r.dtype).tiny, self._bend / (2.0 * math.pi)
        if not _recorded(a, r, b):
            root_a, root_b = _roots(a, b)
            c = (r * _stretched(root_a)).div_(root_b).clamp_(-1.0, 1.0)
            lifted = torch.addcmul(torch.ones((), dtype=c.dtype, device=c.device), c, c, value=-1.0).sqrt_()
            lifted.mul_(root_a * scale).mul_(root_b)
            by_r = c.neg_().arccos_().mul_(scale).add_(self._line)
            half = 0.5 * lifted
            return lifted.addcmul_(r, by_r), half / a.clamp_min(tiny), by_r, half / b.clamp_min(tiny)
        s, height, tau = _angle(a, r, b)
        lifted, by_r = s * height * scale, tau * scale + self._line
        half = 0.5 * lifted
        return lifted + r * by_r, half / a.clamp_min(tiny), by_r, half / b.clamp_min(tiny)

    def diagonal(self, a: Tensor) -> Tensor:
        """a (n^2 + p^2) / 2."""
        return a * (0.5 * (self.negative**2 + self.positive**2))

    def slope_diagonal(self, a: Tensor) -> Tensor:
        """(n^2 + p^2) / 2."""
        return torch.full_like(a, 0.5 * (self.negative**2 + self.positive**2))


@dataclass(frozen=True)
class Step(Dual):
    """1 where x > 0, else 0. Its derivative is a point mass: there is no tangent kernel, and `slope` is that of F."""

    def value(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """tau / (2 pi)."""
        return _turn(a, r, b).mul_(1.0 / (2.0 * math.pi))

    def slope(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """1 / (2 pi sqrt(a b - r^2)), and 0 where that is infinite."""
        return self.parts(a, r, b)[2]

    def parts(self, a: Tensor, r: Tensor, b: Tensor) -> _Parts:
        """The slopes at parallel inputs, infinite in truth, are 0 here."""
        s, height, tau = _angle(a, r, b)
        inside = (height > 0) & (s > torch.finfo(r.dtype).tiny ** 0.25)
        by_r = torch.where(inside, 0.5 / math.pi / torch.where(inside, s * height, torch.ones_like(height)), 0.0)
        tiny = torch.finfo(r.dtype).tiny
        half = -0.5 * r * by_r
        return tau / (2.0 * math.pi), half / a.clamp_min(tiny), by_r, half / b.clamp_min(tiny)

    def diagonal(self, a: Tensor) -> Tensor:
        """1 / 2."""
        return torch.full_like(a, 0.5)

    def slope_diagonal(self, a: Tensor) -> Tensor:
        """0 in place of the infinite value, as for `slope`."""
        return torch.zeros_like(a)


@dataclass(frozen=True)
class Erf(Dual):
    """offset + height erf(x / width): erf itself (0, 1, 1), or the probit Phi(x) = (1 + erf(x / sqrt 2)) / 2.

    Attributes:
        offset: Value at 0.
        height: Half the distance between the limits.
        width: Scale of the input.
    """

    offset: float = 0.0
    height: float = 1.0
    width: float = 1.0

    def value(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """offset^2 + height^2 (2 / pi) arcsin(2 r / sqrt((1 + 2a)(1 + 2b))), with a, r, b over width^2."""
        k = 2.0 / self.width**2
        angle = (r * ((1.0 + k * a).rsqrt() * k)).mul_((1.0 + k * b).rsqrt()).arcsin_()
        angle.mul_(self.height**2 * 2.0 / math.pi)
        return angle.add_(self.offset**2) if self.offset else angle

    def slope(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """height^2 (4 / pi) / (width^2 sqrt((1 + 2a)(1 + 2b) - 4 r^2))."""
        k = 2.0 / self.width**2
        return ((1.0 + k * a) * (1.0 + k * b) - (k * r).square()).rsqrt() * (self.height**2 * 2.0 * k / math.pi)

    def parts(self, a: Tensor, r: Tensor, b: Tensor) -> _Parts:
        """dF/da = -k r dF/dr / (2 (1 + k a)), k = 2 / width^2: nothing is singular."""
        k = 2.0 / self.width**2
        wide_a, wide_b = 1.0 + k * a, 1.0 + k * b
        value = (k * r * wide_a.rsqrt() * wide_b.rsqrt()).arcsin() * (self.height**2 * 2.0 / math.pi)
        by_r = self.slope(a, r, b)
        half = (-0.5 * k) * r * by_r
        return value + self.offset**2, half / wide_a, by_r, half / wide_b

    def diagonal(self, a: Tensor) -> Tensor:
        """F(a, a, a)."""
        k = 2.0 / self.width**2
        return self.offset**2 + self.height**2 * (2.0 / math.pi) * (k * a / (1.0 + k * a)).arcsin()

    def slope_diagonal(self, a: Tensor) -> Tensor:
        """dF/dr at a = r = b."""
        k = 2.0 / self.width**2
        return (1.0 + 2.0 * k * a).rsqrt() * (self.height**2 * 2.0 * k / math.pi)


@dataclass(frozen=True)
class Exponential(Dual):
    """F = (rising e^r + falling e^-r) e^(sign (a + b) / 2): exp, sin, cos and the shifted sine.

    Attributes:
        rising: Weight of e^r.
        falling: Weight of e^-r.
        sign: +1 for exp, -1 for the waves.
    """

    rising: float
    falling: float
    sign: float

    def _sum(self, a: Tensor, r: Tensor, b: Tensor, falling: float) -> Tensor:
        middle = (0.5 * self.sign) * a + (0.5 * self.sign) * b
        value = (middle + r).exp() * self.rising
        return value + (middle - r).exp() * falling if falling else value

    def value(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """The exponents are added before exp: for the waves they are never positive."""
        at_a, at_b = (0.5 * self.sign) * a, (0.5 * self.sign) * b
        value = (r + at_a).add_(at_b).exp_().mul_(self.rising)
        return value.add_((at_a - r).add_(at_b).exp_(), alpha=self.falling) if self.falling else value

    def slope(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """The same with the falling part negated."""
        return self._sum(a, r, b, -self.falling)

    def parts(self, a: Tensor, r: Tensor, b: Tensor) -> _Parts:
        """dF/da = dF/db = sign F / 2."""
        value = self._sum(a, r, b, self.falling)
        by_own = (0.5 * self.sign) * value
        return value, by_own, self.slope(a, r, b), by_own

    def diagonal(self, a: Tensor) -> Tensor:
        """F(a, a, a)."""
        return self._sum(a, a, a, self.falling)

    def slope_diagonal(self, a: Tensor) -> Tensor:
        """dF/dr at a = r = b."""
        return self._sum(a, a, a, -self.falling)


@dataclass(frozen=True)
class Gelu(Dual):
    """x Phi(x), the exact form and not the one with tanh."""

    def value(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """F as in the module's docstring."""
        wide_a, wide_b = 1.0 + a, 1.0 + b
        p = wide_a * wide_b
        square = r.square()
        root = (p - square).rsqrt_()
        f = (r * wide_a.rsqrt()).mul_(wide_b.rsqrt()).arcsin_().mul_(1.0 / (2.0 * math.pi)).add_(0.25).mul_(r)
        return f.addcmul_(square.mul_((1.0 - a * b).div_(p)).add_(a * b), root, value=1.0 / (2.0 * math.pi))

    def slope(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """dF/dr."""
        return self.parts(a, r, b)[2]

    def parts(self, a: Tensor, r: Tensor, b: Tensor) -> _Parts:
        """With g = a b + r^2 (1 - a b) / p and D = p - r^2, derivatives by the product rule; D >= 1 + a + b."""
        wide_a, wide_b = 1.0 + a, 1.0 + b
        p, half_turn = wide_a * wide_b, 1.0 / (2.0 * math.pi)
        bend, square = (1.0 - a * b) / p, r.square()
        g, below = a * b + square * bend, p - square
        root = below.rsqrt()
        turn = 0.25 + (r * wide_a.rsqrt() * wide_b.rsqrt()).arcsin() * half_turn
        ratio = g / below
        by_r = turn + half_turn * root * r * (1.0 + 2.0 * bend + ratio)

        def by(wide: Tensor, other: Tensor) -> Tensor:
            rest = other - square / wide.square() - 0.5 * ratio * (1.0 + other) - 0.5 * square / wide
            return half_turn * root * rest

        return r * turn + half_turn * g * root, by(wide_a, b), by_r, by(wide_b, a)

    def diagonal(self, a: Tensor) -> Tensor:
        """F(a, a, a), where D = 1 + 2a."""
        return self.parts(a, a, a)[0]

    def slope_diagonal(self, a: Tensor) -> Tensor:
        """dF/dr at a = r = b."""
        return self.parts(a, a, a)[2]


def _recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
