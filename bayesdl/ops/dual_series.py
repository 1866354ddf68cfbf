r"""Dual maps of activations that have no closed form, as a series in Hermite polynomials.

With normalised Hermite polynomials h_n and z ~ N(0, 1), Mehler's formula turns the double integral into one sum,

    F(a, r, b) = sum_n alpha_n(a) alpha_n(b) c^n,    alpha_n(a) = E[phi(sqrt(a) z) h_n(z)],    c = r / sqrt(a b)

whose coefficients depend on one input each and come from Gauss-Hermite quadrature. `degree` terms are kept; the part of
E[phi^2] that they miss, known exactly, goes into one more even and one more odd term. So the truncated map is symmetric
and positive semi-definite, exact at c = +-1 and a = b, and elsewhere off by about that part times |c|^degree. A
tensor-product quadrature of the same degree has the same error, but is not symmetric, and evaluates phi degree^2 times
an entry where this needs one multiplication and addition a term.

Coefficients fall geometrically for a smooth activation, and only as a power of n for one with a kink.

Reference: Mehler (1866); for the use in networks, Daniely, Frostig, Singer (2016), arXiv 1602.05897.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesdl.ops.dual import Dual, _Parts

_KINKED_RATIO, _RESOLVED = 9.0, 1e-12
_MOST_NODES = 300  # beyond about 350, numpy's weights overflow


@dataclass(frozen=True)
class Series(Dual):
    """The dual map of any smooth elementwise function.

    Attributes:
        function: The activation, elementwise on tensors of any shape; differentiable by autograd.
        degree: Number of terms, at least 2. More are needed for large a, where the activation looks steep.

    Cost: O(degree) time an entry of r, and 4 degree evaluations of the function an entry of a and of b.
    """

    function: Callable[[Tensor], Tensor]
    degree: int = 32

    def value(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """The series by Horner's rule."""
        c = _correlation(a, r, b)
        left, right = (self._coefficients(v, False)[0] for v in (a, b))
        total = left[-1] * right[-1] * torch.ones_like(c)
        for n in range(len(left) - 2, -1, -1):
            total.mul_(c).addcmul_(left[n], right[n])
        return total

    def slope(self, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
        """The derivative of the series, term by term."""
        c, s = _correlation(a, r, b), _scale(a, b)
        left, right = (self._coefficients(v, False)[0] for v in (a, b))
        return _horner_slope(left, right, c) / s

    def parts(self, a: Tensor, r: Tensor, b: Tensor) -> _Parts:
        """The series with its coefficients or its powers differentiated; dc/da = -c / (2a)."""
        c, s = _correlation(a, r, b), _scale(a, b)
        tiny = torch.finfo(r.dtype).tiny
        (left, by_left), (right, by_right) = self._coefficients(a, True), self._coefficients(b, True)
        by_c = _horner_slope(left, right, c)
        shift = 0.5 * c * by_c
        by_a = _horner(by_left, right, c) - shift / a.clamp_min(tiny)
        by_b = _horner(left, by_right, c) - shift / b.clamp_min(tiny)
        return _horner(left, right, c), by_a, by_c / s, by_b

    def diagonal(self, a: Tensor) -> Tensor:
        """E[phi(sqrt(a) z)^2] by one quadrature."""
        nodes, weights, _ = _rule(self.degree, a.dtype, a.device)
        value = self.function(a.clamp_min(_floor(a)).sqrt().unsqueeze(-1) * nodes)
        return (value.square() * weights).sum(-1)

    def slope_diagonal(self, a: Tensor) -> Tensor:
        """The derivative of the series at a = r = b, so that it agrees with `slope` there."""
        left = self._coefficients(a, False)[0]
        return _horner_slope(left, left, torch.ones_like(a)) / a.clamp_min(_floor(a))

    def unresolved(self, a: Tensor) -> Tensor:
        """The share of E[phi^2] that the terms kept do not hold: a bound on the relative error of F."""
        left = self._coefficients(a, False)[0]
        return (left[-1].square() + left[-2].square()) / self.diagonal(a).clamp_min(_floor(a))

    def _coefficients(self, a: Tensor, with_slopes: bool) -> tuple[list[Tensor], list[Tensor]]:
        """alpha_n for n < degree, then the roots of what is missing in the parity of degree and of degree + 1."""
        nodes, weights, basis = _rule(self.degree, a.dtype, a.device)
        root = a.clamp_min(_floor(a)).sqrt().unsqueeze(-1)
        u = root * nodes
        value = self.function(u)
        alpha = (value * weights) @ basis
        missing = self._missing(value, value, alpha, alpha, weights)
        tails = [part.clamp_min(_floor(a)).sqrt() for part in missing]
        coefficients = [*alpha.unbind(-1), *tails]
        if not with_slopes:
            return coefficients, []
        # d phi(sqrt(a) z) / da = phi'(sqrt(a) z) z / (2 sqrt(a))
        rate = _derivative(self.function, u) * nodes / (2.0 * root)
        slopes = (rate * weights) @ basis
        growth = self._missing(value, rate, alpha, slopes, weights)
        of_tails = [
            torch.where(part > _floor(a), rise / tail, torch.zeros_like(tail))
            for part, rise, tail in zip(missing, growth, tails, strict=True)
        ]
        return coefficients, [*slopes.unbind(-1), *of_tails]

    def _missing(self, f: Tensor, g: Tensor, in_f: Tensor, in_g: Tensor, weights: Tensor) -> list[Tensor]:
        """E[f g] less what the coefficients hold of it, for the parity of degree and of degree + 1."""
        both = []
        for parity in (self.degree % 2, 1 - self.degree % 2):
            sign = 1.0 - 2.0 * parity
            # The nodes are symmetric: f(-z) is f flipped.
            part = 0.5 * ((f * g + sign * f * g.flip(-1)) * weights).sum(-1)
            both.append(part - (in_f[..., parity::2] * in_g[..., parity::2]).sum(-1))
        return both


def sharpness(function: Callable[[Tensor], Tensor]) -> float:
    """By what factor the coefficients' energy falls from degrees 32-63 to 64-127 at a = 1; infinite if none is left.

    Below 16 for a function with a kink (coefficients squared fall as n^(-5/2) or slower), far above for a smooth one.
    """
    nodes, weights, basis = _rule(128, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        value = function(nodes)
        energy = ((value * weights) @ basis).square()
    low, high, total = energy[32:64].sum(), energy[64:].sum(), (value.square() * weights).sum()
    return math.inf if float(high) <= _RESOLVED * float(total) else float(low / high)


def is_kinked(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether the function has a kink, or bends so sharply that a series of moderate degree cannot tell."""
    return not sharpness(function) >= _KINKED_RATIO


@functools.lru_cache(maxsize=32)
def _rule(degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Hermite nodes and weights for N(0, 1), and the first `degree` normalised polynomials at the nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(min(max(4 * degree, 64), _MOST_NODES))
    columns = [np.ones_like(nodes), nodes]
    for n in range(1, degree - 1):
        columns.append((nodes * columns[n] - math.sqrt(n) * columns[n - 1]) / math.sqrt(n + 1))
    arrays = nodes, weights / weights.sum(), np.stack(columns[:degree], -1)
    nodes, weights, basis = (torch.from_numpy(array).to(device, dtype) for array in arrays)
    return nodes, weights, basis


def _floor(a: Tensor) -> float:
    return torch.finfo(a.dtype).tiny ** 0.25


def _scale(a: Tensor, b: Tensor) -> Tensor:
    return a.clamp_min(_floor(a)).sqrt() * b.clamp_min(_floor(b)).sqrt()


def _correlation(a: Tensor, r: Tensor, b: Tensor) -> Tensor:
    return (r / a.clamp_min(_floor(a)).sqrt() / b.clamp_min(_floor(b)).sqrt()).clamp(-1.0, 1.0)


def _horner(left: list[Tensor], right: list[Tensor], c: Tensor) -> Tensor:
    total = left[-1] * right[-1]
    for n in range(len(left) - 2, -1, -1):
        total = torch.addcmul(left[n] * right[n], total, c)
    return total


def _horner_slope(left: list[Tensor], right: list[Tensor], c: Tensor) -> Tensor:
    total = (len(left) - 1) * left[-1] * right[-1]
    for n in range(len(left) - 2, 0, -1):
        total = torch.addcmul(n * left[n] * right[n], total, c)
    return total


def _derivative(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """phi'(u), with a graph where u has one."""
    recorded = torch.is_grad_enabled() and u.requires_grad
    with torch.enable_grad():
        at = u if recorded else u.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at, create_graph=recorded)
    return slope
