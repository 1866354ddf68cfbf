r"""Arithmetic of bars: one row of bars for each point, many values for each row. No state, all in float64.

With p_k the mass of bar k on (b_k, b_{k+1}], l_k the mass to its left and r_k that to its right, an inner bar is
uniform and the two outer bars are halves of normals that start at their inner border and point outwards. Their scale is
such that half of the mass lies within the bar,

    s = w / c,    c = Phi^{-1}(3/4),    P(Y beyond inner border + z s) = p erfc(z / sqrt 2).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.distributions.improvement import _normal_log_expected

_HALF = 0.6744897501960817  # Phi^{-1}(3/4), the median of |Z|
_ROOT_2 = math.sqrt(2.0)
_ROOT_PI = math.sqrt(math.pi)
_MEAN = math.sqrt(2 / math.pi)  # of |Z|
_SMALL = 0.1  # below this z the formula of E[(z - |Z|)+] loses digits


@dataclass(frozen=True)
class Bars:
    """Where K bars stand: borders (*r, K + 1), ascending, the first and the last giving the outer bars' medians."""

    borders: Tensor

    @functools.cached_property
    def left(self) -> Tensor:
        """Left borders (*r, K)."""
        return self.borders[..., :-1]

    @functools.cached_property
    def right(self) -> Tensor:
        """Right borders (*r, K)."""
        return self.borders[..., 1:]

    @functools.cached_property
    def width(self) -> Tensor:
        """Widths (*r, K)."""
        return self.borders.diff(dim=-1)

    @functools.cached_property
    def inner(self) -> Tensor:
        """Borders between two bars, (*r, K - 1)."""
        return self.borders[..., 1:-1].detach().contiguous()

    @functools.cached_property
    def scale(self) -> Tensor:
        """Scales of the two halves of normals, (*r, 2)."""
        return torch.stack([self.width[..., 0], self.width[..., -1]], -1) / _HALF

    @functools.cached_property
    def mean(self) -> Tensor:
        """Mean within each bar, (*r, K)."""
        low, high = self.scale.unsqueeze(-2).unbind(-1)
        ends = self.borders[..., 1:2] - _MEAN * low, self.borders[..., -2:-1] + _MEAN * high
        return self._with_ends(self.left + 0.5 * self.width, *ends)

    @functools.cached_property
    def centre(self) -> Tensor:
        """A border in the middle, (*r)."""
        return self.borders[..., self.borders.shape[-1] // 2]

    @functools.cached_property
    def away(self) -> Tensor:
        """Mean within each bar, less the centre; (*r, K)."""
        return self.mean - self.centre.unsqueeze(-1)

    @functools.cached_property
    def peak(self) -> Tensor:
        """Where the density of each bar is largest: its middle, or the inner border of an outer one; (*r, K)."""
        return self._with_ends(self.left + 0.5 * self.width, self.borders[..., 1:2], self.borders[..., -2:-1])

    @functools.cached_property
    def variance(self) -> Tensor:
        """Variance within each bar, (*r, K)."""
        low, high = (self.scale.square() * (1 - 2 / math.pi)).unsqueeze(-2).unbind(-1)
        return self._with_ends(self.width.square() / 12, low, high)

    @functools.cached_property
    def log_size(self) -> Tensor:
        """-log of the largest density within each bar, (*r, K): the log width, or log(s sqrt(pi / 2))."""
        low, high = (self.scale.log() + 0.5 * math.log(math.pi / 2)).unsqueeze(-2).unbind(-1)
        return self._with_ends(self.width.log(), low, high)

    def find(self, value: Tensor) -> Tensor:
        """The bar of each value: (R, S) for rows (R, K), any shape for one row of bars."""
        return torch.searchsorted(self.inner, value.detach().contiguous())

    def beyond(self, value: Tensor, bar: Tensor) -> Tensor:
        """z, the distance from the inner border of an outer bar in units of its scale; 0 in the inner bars."""
        last = self.left.shape[-1] - 1
        low = (self.borders[..., 1:2] - value) / self.scale[..., :1]
        high = (value - self.borders[..., -2:-1]) / self.scale[..., 1:]
        z = torch.where(bar == 0, low, torch.where(bar == last, high, torch.zeros_like(low)))
        return z.clamp_min(0.0)

    @staticmethod
    def _with_ends(middle: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat([low, middle[..., 1:-1], high], -1)


def take(values: Tensor, bar: Tensor) -> Tensor:
    """`values` (K) or (R, K) at the bars (R, S)."""
    return values[bar] if values.dim() == 1 else values.gather(-1, bar)


def before(mass: Tensor) -> Tensor:
    """Mass to the left of each bar, (R, K), rising exactly."""
    return torch.nn.functional.pad(mass.cumsum(-1)[..., :-1], (1, 0))


def cdf(bars: Bars, mass: Tensor, value: Tensor) -> Tensor:
    """P(Y <= value): rows (R, K), values (R, S)."""
    bar = bars.find(value)
    here, lower = take(mass, bar), take(before(mass), bar)
    outside = here * torch.erfc(bars.beyond(value, bar) / _ROOT_2)
    share = ((value - take(bars.left, bar)) / take(bars.width, bar)).clamp(0.0, 1.0)
    middle = lower + here * share
    return torch.where(bar == 0, outside, torch.where(bar == mass.shape[-1] - 1, 1 - outside, middle))


def quantile(bars: Bars, mass: Tensor, level: Tensor) -> Tensor:
    """The value with cdf = level, (R, S), with its exact gradients in mass and level."""
    edge = (level <= 0) | (level >= 1)
    u = torch.where(edge, torch.full_like(level, 0.5), level)
    lower = before(mass)
    bar = torch.searchsorted(lower[..., 1:].detach().contiguous(), u.detach().contiguous())
    last = mass.shape[-1] - 1
    tiny = torch.finfo(mass.dtype).tiny
    here = take(mass, bar).clamp_min(tiny)
    middle = take(bars.left, bar) + take(bars.width, bar) * ((u - take(lower, bar)) / here).clamp(0.0, 1.0)
    at_end = (bar == 0) | (bar == last)
    outside = torch.where(bar == 0, u, 1 - u) / (2 * here)
    z = torch.special.ndtri(torch.where(at_end, outside.clamp(tiny, 0.5), torch.full_like(u, 0.25)))
    low = bars.borders[..., 1:2] + bars.scale[..., :1] * z
    high = bars.borders[..., -2:-1] - bars.scale[..., 1:] * z
    value = torch.where(bar == 0, low, torch.where(bar == last, high, middle))
    return torch.where(edge, torch.where(level <= 0, -math.inf, math.inf).to(value), value)


def log_rise(bars: Bars, threshold: Tensor) -> Tensor:
    """log E[(Y - t)+ | bar], (..., K), for t (..., 1); -inf for bars below t."""
    middle = bars.left + 0.5 * bars.width
    gap = bars.right - threshold
    whole, part = threshold <= bars.left, gap > 0
    log_whole = torch.where(whole, middle - threshold, torch.ones_like(gap)).log()
    log_part = 2 * torch.where(part, gap, torch.ones_like(gap)).log() - (2 * bars.width).log()
    between = torch.where(whole, log_whole, torch.where(part, log_part, torch.full_like(gap, -math.inf)))
    low_scale, high_scale = bars.scale[..., :1], bars.scale[..., 1:]
    z = (bars.borders[..., 1:2] - threshold) / low_scale
    low = torch.where(z > 0, low_scale.log() + _log_reach(z.clamp_min(0.0)), torch.full_like(z, -math.inf))
    z = (threshold - bars.borders[..., -2:-1]) / high_scale
    above = torch.where(z <= 0, _MEAN - z, torch.ones_like(z)).log()
    high = high_scale.log() + torch.where(z <= 0, above, math.log(2.0) + _normal_log_expected(-z.clamp_min(0.0)))
    return torch.cat([low, between[..., 1:-1], high], -1)


def _log_reach(z: Tensor) -> Tensor:
    """log E[(z - |Z|)+] for z >= 0, -inf at 0."""
    positive = z > 0
    near = torch.where(positive, z.clamp_max(_SMALL), torch.full_like(z, _SMALL))
    far = z.clamp_min(_SMALL)
    square = near.square()
    # 2 phi(0) (z^2/2 - z^4/24 + z^6/240 - z^8/2688 + z^10/34560)
    series = 1 - square / 12 * (1 - square / 10 * (1 - square / 11.2 * (1 - square * (2688 / 34560))))
    small = 2 * near.log() + math.log(0.5 * _MEAN) + series.log()
    large = (far * torch.erf(far / _ROOT_2) - _MEAN * (1 - torch.exp(-0.5 * far.square()))).log()
    return torch.where(positive, torch.where(z < _SMALL, small, large), torch.full_like(z, -math.inf))


def log_above(bars: Bars, threshold: Tensor) -> Tensor:
    """log P(Y > t | bar), (..., K), for t (..., 1); -inf for bars below t."""
    gap = bars.right - threshold
    part = (gap > 0) & (threshold > bars.left)
    log_part = torch.where(part, gap / bars.width, torch.ones_like(gap)).log()
    between = torch.where(gap > 0, log_part, torch.full_like(gap, -math.inf))
    z = (bars.borders[..., 1:2] - threshold) / bars.scale[..., :1]
    inside = torch.erf(torch.where(z > 0, z, torch.ones_like(z)) / _ROOT_2).log()
    low = torch.where(z > 0, inside, torch.full_like(z, -math.inf))
    z = (threshold - bars.borders[..., -2:-1]) / bars.scale[..., 1:]
    high = torch.where(z > 0, math.log(2.0) + torch.special.log_ndtr(-z.clamp_min(0.0)), torch.zeros_like(z))
    return torch.cat([low, between[..., 1:-1], high], -1)


def crps(bars: Bars, mass: Tensor, value: Tensor) -> Tensor:
    r"""int_{-inf}^v F^2 + int_v^inf (1 - F)^2, rows (R, K), values (R, S).

    Over an inner bar F runs from l to l + p on a line, whose square integrates to w (l^2 + l p + p^2 / 3); over an
    outer bar it is p erfc, with

        int_a^inf erfc^2 = 2 exp(-a^2) erfc(a) / sqrt(pi) - a erfc(a)^2 - sqrt(2 / pi) erfc(sqrt 2 a).
    """
    bar, last = bars.find(value), mass.shape[-1] - 1
    lower = before(mass)
    upper = before(mass.flip(-1)).flip(-1)
    ends = bars.scale * _ROOT_2
    whole = bars.width * mass.square() / 3
    below = whole + bars.width * lower * (lower + mass)
    above = whole + bars.width * upper * (upper + mass)
    tail = _squared_tail(torch.zeros_like(ends))
    below = torch.cat([(mass[..., :1].square() * ends[..., :1] * tail[..., :1]), below[..., 1:]], -1)
    above = torch.cat([above[..., :-1], mass[..., -1:].square() * ends[..., 1:] * tail[..., 1:]], -1)
    others = take(before(below), bar) + take(before(above.flip(-1)).flip(-1), bar)
    p, low, high, width = (take(t, bar) for t in (mass, lower, upper, bars.width))
    t = ((value - take(bars.left, bar)) / width).clamp(0.0, 1.0)
    middle = width * t * (low * (low + p * t) + (p * t).square() / 3)
    t = 1 - t
    middle = middle + width * t * (high * (high + p * t) + (p * t).square() / 3)
    a = bars.beyond(value, bar) / _ROOT_2
    size = torch.where(bar == 0, ends[..., :1], ends[..., 1:])
    own, first = _squared_tail(a), (a * torch.erfc(a) + (1 - torch.exp(-a.square())) / _ROOT_PI)
    # between the inner border and v the other side of F counts: 1 - 2 p erfc + p^2 erfc^2
    other = a - 2 * p * first + p.square() * (_squared_tail(torch.zeros_like(a)) - own)
    outside = size * (p.square() * own + other)
    return others + torch.where((bar == 0) | (bar == last), outside, middle)


def _squared_tail(a: Tensor) -> Tensor:
    """int_a^inf erfc(x)^2 dx, a >= 0."""
    beyond = torch.erfc(a)
    flat = 2 / _ROOT_PI * torch.exp(-a.square()) * beyond - a * beyond.square()
    return flat - _MEAN * torch.erfc(_ROOT_2 * a)
