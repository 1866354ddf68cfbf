r"""Distributions of bars: a histogram with normal tails, what a network trained on a prior over data sets predicts.

    p(y) = p_k / w_k                            on an inner bar k of mass p_k and width w_k
    p(y) = p_k 2 phi((y - b) / s) / s           on an outer bar that begins at b, s = w_k / Phi^{-1}(3/4)

so that half of an outer bar's mass lies within the bar and half beyond. The support is the whole line, and density,
distribution function, quantiles, draws and expected improvement all follow these two lines exactly, tails included.

Reference: Müller, Hollmann, Pineda Arango, Grabocka, Hutter (2022), arXiv 2112.10510 (the "Riemann distribution").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesdl._random import Seed, generator
from bayesdl.distributions import _bars
from bayesdl.distributions._bars import Bars
from bayesdl.distributions._base import levels_of, like_of, shape_of
from bayesdl.errors import DataError, SettingError, ShapeError, fail

_LEAST = 2.0**-54  # below any uniform number that is not 0


@final
class BarDistribution(Distribution):
    r"""A distribution of K bars per point, the two outer ones with halves of a normal as tails.

    Args:
        logits: Shape (*b, K); p = softmax(logits). -inf is a bar without mass.
        borders: b_0 < ... < b_K, shape (K + 1,) for all points or what broadcasts to (*b, K + 1). Kept in float64, so
            that narrow bars stay apart at a large offset; answers come in the dtype of `logits`.

    Raises:
        ShapeError: Fewer than two bars, or as many borders as bars.
        DataError: Borders that are not finite or do not rise, logits that are NaN or leave no bar any mass.

    Cost: O(b K) time and memory for every member; a value or a level more costs O(log K) in `log_prob`, `cdf`,
    `quantile` and `sample`.
    """

    arg_constraints = {"logits": constraints.real_vector, "borders": constraints.real_vector}  # noqa: RUF012 - torch's
    support = constraints.real
    has_rsample = True

    def __init__(self, logits: Tensor, borders: Tensor, validate_args: bool | None = None) -> None:
        logits, borders = torch.as_tensor(logits), torch.as_tensor(borders)
        _check_shapes(logits, borders)
        borders = borders.to(dtype=torch.float64, device=logits.device)
        if validate_args is not False:
            _check_values(logits, borders)
        batch = torch.broadcast_shapes(logits.shape[:-1], borders.shape[:-1])
        bars = Bars(borders.reshape(-1) if borders.numel() == borders.shape[-1] else borders)
        logits = torch.log_softmax(logits, -1).expand(*batch, logits.shape[-1])
        self._set(logits, bars, borders.new_zeros(()), borders.new_ones(()))

    def _set(self, logits: Tensor, bars: Bars, loc: Tensor, scale: Tensor) -> None:
        """Y = loc + scale U, where U has these bars: so that units may differ between points that share their bars."""
        self.logits = logits
        self._bars, self._loc, self._scale = bars, loc, scale
        super().__init__(logits.shape[:-1], validate_args=False)  # checked already, and more strictly

    @classmethod
    def _of(cls, logits: Tensor, bars: Bars, loc: Tensor, scale: Tensor) -> BarDistribution:
        """Of logits that are normalised, without checks."""
        new = cls.__new__(cls)
        new._set(logits, bars, loc, scale)
        return new

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> BarDistribution:
        """The same bars with batch axes broadcast to `batch_shape`."""
        logits = self.logits.expand(*shape_of(batch_shape), self.num_bars)
        return self._of(logits, self._bars, self._loc, self._scale)

    @property
    def borders(self) -> Tensor:
        """Borders in the units of Y, (K + 1,) or what broadcasts to (*b, K + 1)."""
        return self._loc.unsqueeze(-1) + self._scale.unsqueeze(-1) * self._bars.borders

    @property
    def num_bars(self) -> int:
        """K."""
        return self.logits.shape[-1]

    @property
    def probs(self) -> Tensor:
        """Masses of the bars, (*b, K)."""
        return self.logits.exp()

    @property
    def mean(self) -> Tensor:
        """Mean, shape (*b)."""
        return (self._loc + self._scale * (self._bars.centre + self._offset)).to(self.logits)

    @property
    def variance(self) -> Tensor:
        """Variance within bars plus variance of their means, shape (*b)."""
        bars = self._bars
        apart = bars.away.to(self.logits) - self._offset.to(self.logits).unsqueeze(-1)
        variance = (self.probs * (bars.variance.to(self.logits) + apart.square())).sum(-1)
        return (self._scale.square() * variance).to(self.logits)

    @property
    def _offset(self) -> Tensor:
        """Mean of U less the middle border, which sums in float32 are taken relative to; float64."""
        away = self._bars.away.to(self.logits)
        return (self.probs @ away if away.dim() == 1 else (self.probs * away).sum(-1)).to(torch.float64)

    @property
    def mode(self) -> Tensor:
        """Where the density is largest: the middle of the highest bar, or the inner border of an outer one."""
        bars = self._bars
        highest = (self.logits - bars.log_size.to(self.logits)).argmax(-1, keepdim=True)
        peak = bars.peak.expand(*self.batch_shape, -1).gather(-1, highest).squeeze(-1)
        return (self._loc + self._scale * peak).to(self.logits)

    def entropy(self) -> Tensor:
        """-E[log p(Y)], shape (*b)."""
        # E[z^2 / 2] over half a normal, 0 in an inner bar
        outside = torch.nn.functional.pad(self._scale.new_zeros(self.num_bars - 2), (1, 1), value=0.5)
        size, p = self._bars.log_size + outside, self.probs
        return ((torch.special.entr(p) + p * size.to(p)).sum(-1) + self._scale.log()).to(self.logits)

    def log_prob(self, value: Any) -> Tensor:
        """Log density at `value`; on a border, that of the bar to its left."""

        def density(bars: Bars, logits: Tensor, u: Tensor) -> Tensor:
            bar = bars.find(u)
            log_p = logits.gather(-1, bar).to(torch.float64)
            return log_p - _bars.take(bars.log_size, bar) - 0.5 * bars.beyond(u, bar).square()

        return (self._by_row(self._inward(value), density) - self._scale.log()).to(self.logits)

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value), with full relative accuracy in the lower tail."""
        return self._by_row(self._inward(value), lambda bars, logits, u: _bars.cdf(bars, _mass(logits), u)).to(
            self.logits
        )

    def quantile(self, q: Any) -> Tensor:
        """The value with cdf(value) = q; shape q.shape + (*b). Gradients in the logits and in q are exact."""
        levels = levels_of("BarDistribution.quantile", q, self._loc, len(self.batch_shape))
        return self.icdf(levels.expand(levels.shape[: levels.dim() - len(self.batch_shape)] + self.batch_shape))

    def icdf(self, value: Any) -> Tensor:
        """The inverse of `cdf`, elementwise: levels of any shape that broadcasts with (*b)."""
        u = self._by_row(self._wide(value), lambda bars, logits, v: _bars.quantile(bars, _mass(logits), v))
        return (self._loc + self._scale * u).to(self.logits)

    def crps(self, value: Any) -> Tensor:
        """E|Y - value| - E|Y - Y'| / 2, the continuous ranked probability score, in closed form."""
        score = self._by_row(self._inward(value), lambda bars, logits, u: _bars.crps(bars, _mass(logits), u))
        return (self._scale * score).to(self.logits)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed)

    def rsample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b) through the inverse of `cdf`, differentiable in the logits."""
        shape, source = self._extended_shape(shape_of(sample_shape)), generator(seed, self.logits.device)
        # in float64 whatever the logits are: 2^24 levels would show in the tails
        u = torch.rand(shape, generator=source, dtype=torch.float64, device=self.logits.device)
        return self.icdf(u.clamp_min(_LEAST))

    def log_expected_improvement(self, threshold: Any) -> Tensor:
        """log E[(Y - t)+], finite and with gradients however far t lies in a tail; t broadcasts with (*b)."""
        rise = _bars.log_rise(self._bars, self._inward(threshold).unsqueeze(-1))
        return (torch.logsumexp(self.logits + rise, -1) + self._scale.log()).to(self.logits)

    def expected_improvement(self, threshold: Any) -> Tensor:
        """E[(Y - t)+]; see `log_expected_improvement`."""
        return self.log_expected_improvement(threshold).exp()

    def log_probability_of_improvement(self, threshold: Any) -> Tensor:
        """log P(Y > t), finite however far t lies in a tail; t broadcasts with (*b)."""
        above = _bars.log_above(self._bars, self._inward(threshold).unsqueeze(-1))
        return torch.logsumexp(self.logits + above, -1).to(self.logits)

    def probability_of_improvement(self, threshold: Any) -> Tensor:
        """P(Y > t); see `log_probability_of_improvement`."""
        return self.log_probability_of_improvement(threshold).exp()

    def affine(self, loc: Any, scale: Any) -> BarDistribution:
        """The distribution of loc + scale Y; both broadcast with (*b), scale above 0.

        Raises:
            SettingError: A scale that is not above 0.
        """
        loc, scale = self._wide(loc), self._wide(scale)
        if not bool((scale > 0).all()):
            fail(SettingError, "BarDistribution.affine", "scale must be above 0.", got=f"{scale}", fix="reflected()")
        if loc.numel() == 1 and scale.numel() == 1 and max(loc.dim(), scale.dim()) <= len(self.batch_shape):
            loc, scale = loc.reshape(()), scale.reshape(())
            return self._of(self.logits, self._bars, loc + scale * self._loc, scale * self._scale)
        batch = torch.broadcast_shapes(loc.shape, scale.shape, self.batch_shape)
        return self._of(self.logits.expand(*batch, -1), self._bars, loc + scale * self._loc, scale * self._scale)

    def reflected(self) -> BarDistribution:
        """The distribution of -Y."""
        return self._of(self.logits.flip(-1), Bars(-self._bars.borders.flip(-1)), -self._loc, self._scale)

    def _wide(self, value: Any) -> Tensor:
        """A number or an array as a float64 tensor on this device."""
        return like_of(value, self._loc)

    def _inward(self, value: Any) -> Tensor:
        """Values of U for values of Y, float64."""
        return (self._wide(value) - self._loc) / self._scale

    def _by_row(self, value: Tensor, function: Callable[[Bars, Tensor, Tensor], Tensor]) -> Tensor:
        """function(bars, logits (R, K), values (R, S)) -> (R, S), for values that broadcast with (*b); float64."""
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        batch = shape[len(shape) - len(self.batch_shape) :]
        rows = math.prod(batch)
        if math.prod(shape) == 0:
            return value.new_empty(shape)
        logits = self.logits.expand(*batch, -1).reshape(rows, -1)
        bars = self._bars
        if bars.borders.dim() > 1:
            bars = Bars(bars.borders.expand(*batch, -1).reshape(rows, -1))
        columns = value.expand(shape).reshape(-1, rows).T
        return function(bars, logits, columns).T.reshape(shape)


def pool(members: Sequence[BarDistribution], borders: Tensor | None = None) -> BarDistribution:
    """The equal mixture of several bar distributions, brought onto common bars.

    Exact where all members have the same borders. Otherwise each member's mass moves onto the common bars by
    differences of its distribution function, exact at every common inner border and spread evenly in between.

    Args:
        members: Distributions with the same batch shape.
        borders: The common borders; None takes every so-manieth of all members' borders, as many as the mean member.

    Raises:
        SettingError: No members.
    """
    if not members:
        fail(SettingError, "pool", "at least one member is needed.", got="an empty list", fix="pass distributions")
    first = members[0]
    if borders is None and all(_same_bars(m, first) for m in members):
        stacked = torch.stack([m.logits for m in members])
        logits = torch.logsumexp(stacked, 0) - math.log(len(members))
        return BarDistribution._of(logits, first._bars, first._loc, first._scale)
    if borders is None:
        lead = torch.broadcast_shapes(*(m.borders.shape[:-1] for m in members))
        every = torch.cat([m.borders.expand(*lead, -1) for m in members], -1).sort(-1).values
        # as far apart in this order as there are members, no two can be equal
        count = (every.shape[-1] - 1) // len(members)
        places = torch.linspace(0, every.shape[-1] - 1, count + 1, dtype=torch.float64, device=every.device)
        borders = every[..., places.floor().long()]
    borders = like_of(borders, first._loc)
    inner = borders[..., 1:-1].movedim(-1, 0)
    inner = inner.reshape(-1, *(1,) * (len(first.batch_shape) + 1 - inner.dim()), *inner.shape[1:])
    reached = torch.stack([m.cdf(inner).to(torch.float64) for m in members]).mean(0).movedim(0, -1)
    ends = torch.zeros_like(reached[..., :1])
    mass = torch.cat([ends, reached, ends + 1], -1).diff(dim=-1).clamp_min(0.0)
    return BarDistribution(mass.log().to(first.logits), borders, False)


def _same_bars(a: BarDistribution, b: BarDistribution) -> bool:
    """Whether two distributions have the same bars in the same units."""
    pairs = ((a._bars.borders, b._bars.borders), (a._loc, b._loc), (a._scale, b._scale))
    return all(x is y or (x.shape == y.shape and torch.equal(x, y)) for x, y in pairs)


def _mass(logits: Tensor) -> Tensor:
    """Masses that sum to 1 in float64, whatever the logits came in."""
    return torch.softmax(logits.to(torch.float64), -1)


def _check_shapes(logits: Tensor, borders: Tensor) -> None:
    fits = logits.dim() >= 1 and borders.dim() >= 1 and logits.shape[-1] >= 2
    fits = fits and logits.is_floating_point() and borders.shape[-1] == logits.shape[-1] + 1
    if not fits:
        got = f"logits {tuple(logits.shape)}, borders {tuple(borders.shape)}"
        wanted = "logits (*b, K) and borders (K + 1,) are needed, with K at least 2."
        fail(ShapeError, "BarDistribution", wanted, got=got, fix="one border more than bars, on the last axis")


def _check_values(logits: Tensor, borders: Tensor) -> None:
    if not bool(torch.isfinite(borders).all()) or not bool((borders.diff(dim=-1) > 0).all()):
        smallest = float(borders.diff(dim=-1).min())
        got = f"{int((~torch.isfinite(borders)).sum())} that are not finite, the smallest step {smallest:.3g}"
        wanted = "borders must be finite and rise."
        fail(DataError, "BarDistribution", wanted, got=got, fix="torch.unique(borders), and drop infinities")
    if bool(logits.isnan().any()) or bool((logits.amax(-1) == -math.inf).any()) or bool((logits == math.inf).any()):
        got = f"{int(logits.isnan().sum())} that are NaN, or +inf, or a row of -inf"
        wanted = "logits must be numbers, and some bar must have mass."
        fail(DataError, "BarDistribution", wanted, got=got, fix="look for what made them so")
