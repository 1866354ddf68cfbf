r"""Optuna's distributions as coordinates: for the acquisition optimiser, and for the surrogate.

Three views of one point. Its parameters are what the user sees. Its coordinates z, one for each parameter that is free,
are what an acquisition function is optimised over: u in [0, 1] for a number,

    u = (t(v) - t(low)) / (t(high) - t(low)),    t = log where the distribution is logarithmic,

and the index of the choice for a category. Its inputs x are what a surrogate is fitted to: u again, and one column for
each choice of a category (one column in all where there are two). A parameter with a single value has no coordinate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor

MOST_STEPS = 1000  # a grid longer than this is searched as a continuum and rounded afterwards


class Encoding:
    """The coordinates of a search space.

    Attributes:
        names: The free parameters, in the order of the coordinates.
        bounds: (2, p), the least and the largest value of each coordinate.
        grids: Coordinate -> its values, for numbers on a grid.
        categories: Coordinate -> number of choices.
        width: Columns of x.
    """

    def __init__(self, space: Mapping[str, BaseDistribution]) -> None:
        self.fixed = {name: _only_value(dist) for name, dist in space.items() if dist.single()}
        free = {name: dist for name, dist in space.items() if not dist.single()}
        self.names = tuple(free)
        self._columns = [_column(dist) for dist in free.values()]
        highs = [float(column.num_choices - 1) if column.num_choices else 1.0 for column in self._columns]
        self.bounds = torch.tensor([[0.0] * len(highs), highs], dtype=torch.float64)
        self.grids = {i: column.grid for i, column in enumerate(self._columns) if column.grid is not None}
        self.categories = {i: column.num_choices for i, column in enumerate(self._columns) if column.num_choices}
        self.width = sum(column.width for column in self._columns)

    def column(self, i: int) -> int:
        """The first column of x that coordinate i makes."""
        return sum(column.width for column in self._columns[:i])

    def inward(self, name: str, value: Any) -> float:
        """The coordinate of a free parameter at a value."""
        return self._columns[self.names.index(name)].inward(value)

    def values(self, name: str, z: Tensor) -> Tensor:
        """Values (...) of a free number at coordinates z (..., p), differentiable; between those of a grid too."""
        i = self.names.index(name)
        return self._columns[i].values(z[..., i])

    def drawn(self, name: str, law: Any, u: Tensor) -> Tensor:
        """Coordinates (n) of the quantiles u (n) of a law: a univariate torch distribution, cut off at the bounds.

        None is a uniform one on the scale of the parameter. The law of a category is the probability of each choice.
        """
        return self._columns[self.names.index(name)].drawn(law, u)

    @property
    def num_points(self) -> float:
        """How many points the space has; infinite where a coordinate is a continuum."""
        sizes = [len(c.grid) if c.grid is not None else c.num_choices or math.inf for c in self._columns]
        return math.prod(sizes)

    def encode(self, params: Sequence[Mapping[str, Any]]) -> Tensor:
        """Coordinates (n, p) of `params`, float64."""
        rows = [[c.inward(p[name]) for name, c in zip(self.names, self._columns, strict=True)] for p in params]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(params), len(self.names))

    def decode(self, z: Tensor) -> dict[str, Any]:
        """Parameters of one point z (p): clipped to the bounds, rounded to the grids, fixed ones included."""
        free = {name: c.outward(float(v)) for name, c, v in zip(self.names, self._columns, z, strict=True)}
        return {**free, **self.fixed}

    def from_unit(self, u: Tensor) -> Tensor:
        """Coordinates of uniform u (n, p) in [0, 1): every value of a grid, and every choice, has an equal share."""
        columns = [c.from_unit(u[:, i]) for i, c in enumerate(self._columns)]
        return torch.stack(columns, -1) if columns else u

    def expand(self, z: Tensor) -> Tensor:
        """Inputs x (..., width) of coordinates z (..., p); differentiable in the numbers."""
        if not self.categories:
            return z
        return torch.cat([c.expand(z[..., i : i + 1]) for i, c in enumerate(self._columns)], -1)

    def all_points(self) -> Tensor:
        """Every point of a finite space, (num_points, p)."""
        axes = [
            torch.tensor(c.grid, dtype=torch.float64)
            if c.grid is not None
            else torch.arange(c.num_choices, dtype=torch.float64)
            for c in self._columns
        ]
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))


class _Number:
    """One number: a continuum, or a grid of values v with coordinates u."""

    num_choices = 0
    width = 1

    def __init__(self, dist: FloatDistribution | IntDistribution) -> None:
        self._dist = dist
        self._low, self._high = self._warp(dist.low), self._warp(dist.high)
        values = _values(dist)
        self.grid = None if values is None else self._coordinates(values)
        self._values = values

    def _warp(self, value: float) -> float:
        return math.log(value) if self._dist.log else float(value)

    def _coordinates(self, values: Sequence[float]) -> list[float]:
        inner = [self.inward(value) for value in values[1:-1]]
        return [0.0, *inner, 1.0]  # the ends exactly: BoTorch compares them with the bounds

    def inward(self, value: float) -> float:
        """u of a value, in [0, 1]."""
        return min(1.0, max(0.0, (self._warp(value) - self._low) / (self._high - self._low)))

    def outward(self, u: float) -> float | int:
        """The value at u, on the grid where there is one."""
        if self.grid is not None:
            at = min(range(len(self.grid)), key=lambda i: abs(self.grid[i] - u))
            return self._values[at]
        if not 0.0 < u < 1.0:
            return self._dist.low if u <= 0.0 else self._dist.high  # exactly, whatever exp makes of log
        warped = self._low + u * (self._high - self._low)
        value = math.exp(warped) if self._dist.log else warped
        dist = self._dist
        step = getattr(dist, "step", None)
        if step is not None and not dist.log:
            value = dist.low + round((value - dist.low) / step) * step
        value = min(dist.high, max(dist.low, value))
        return round(value) if isinstance(dist, IntDistribution) else float(value)

    def from_unit(self, u: Tensor) -> Tensor:
        """u itself, or the coordinate of one value of the grid, each with the same probability.

        Values of a logarithmic grid have shares in proportion to their logarithmic spacing instead.
        """
        if self.grid is None:
            return u
        grid = torch.tensor(self.grid, dtype=u.dtype)
        if self._dist.log:
            return grid[(u[:, None] - grid).abs().argmin(-1)]
        return grid[(u * len(grid)).long().clamp_max(len(grid) - 1)]

    def values(self, u: Tensor) -> Tensor:
        """The values at coordinates u, as of a continuum."""
        warped = self._low + u * (self._high - self._low)
        return warped.exp() if self._dist.log else warped

    def drawn(self, law: Any, u: Tensor) -> Tensor:
        """Coordinates of quantiles of a law of values."""
        if law is None:
            return self.from_unit(u)
        low, high = float(self._dist.low), float(self._dist.high)
        below, above = mass_below(law, low, high)
        found = law.icdf(below + u * (above - below)).to(torch.float64).clamp(low, high)
        warped = found.log() if self._dist.log else found
        coordinates = (warped - self._low) / (self._high - self._low)
        if self.grid is None:
            return coordinates
        grid = torch.tensor(self.grid, dtype=u.dtype)
        return grid[(coordinates[:, None] - grid).abs().argmin(-1)]

    def expand(self, z: Tensor) -> Tensor:
        """The one column."""
        return z


class _Category:
    """One category: its index as coordinate, a column for each choice as input."""

    grid = None

    def __init__(self, dist: CategoricalDistribution) -> None:
        self._dist = dist
        self.num_choices = len(dist.choices)
        self.width = 1 if self.num_choices == 2 else self.num_choices

    def inward(self, value: Any) -> float:
        """The index of a choice."""
        return float(self._dist.to_internal_repr(value))

    def outward(self, index: float) -> Any:
        """The choice of an index."""
        return self._dist.choices[min(self.num_choices - 1, max(0, round(index)))]

    def from_unit(self, u: Tensor) -> Tensor:
        """An index, each with the same probability."""
        return (u * self.num_choices).floor().clamp_max(self.num_choices - 1)

    def values(self, u: Tensor) -> Tensor:
        """Not for categories, which have no numbers."""
        raise TypeError("a category has no numbers")

    def drawn(self, law: Any, u: Tensor) -> Tensor:
        """Indices of quantiles of the probabilities of the choices."""
        if law is None:
            return self.from_unit(u)
        shares = torch.as_tensor(law, dtype=u.dtype)
        return torch.bucketize(u, (shares / shares.sum()).cumsum(0)[:-1], right=True).to(u.dtype)

    def expand(self, z: Tensor) -> Tensor:
        """Indicator columns."""
        if self.num_choices == 2:
            return z
        return torch.nn.functional.one_hot(z[..., 0].round().long(), self.num_choices).to(z.dtype)


def mass_below(law: Any, low: float, high: float) -> tuple[float, float]:
    """P(v <= low) and P(v <= high) of a univariate torch distribution, which may lie within or beside them."""
    open_law = copy.copy(law)
    open_law._validate_args = False  # torch refuses values outside the support instead of saying 0 or 1
    ends = torch.tensor([low, high], dtype=torch.float64)
    below, above = open_law.cdf(ends).reshape(2).nan_to_num(0.0).clamp(0.0, 1.0).tolist()
    return below, above


def sobol_point(encoding: Encoding, index: int, seed: int) -> Tensor:
    """Coordinates (p) of point `index` of the scrambled Sobol sequence of `seed`; beyond 21 201 columns, uniform."""
    p = len(encoding.names)
    if p == 0:
        return torch.empty(0, dtype=torch.float64)
    if p <= torch.quasirandom.SobolEngine.MAXDIM:
        engine = torch.quasirandom.SobolEngine(p, scramble=True, seed=seed % 2**63)
        unit = engine.fast_forward(index).draw(1, dtype=torch.float64)
    else:
        g = torch.Generator().manual_seed((seed + index) % 2**63)
        unit = torch.rand((1, p), generator=g, dtype=torch.float64)
    return encoding.from_unit(unit)[0]


def _column(dist: BaseDistribution) -> _Number | _Category:
    return _Category(dist) if isinstance(dist, CategoricalDistribution) else _Number(dist)


def _values(dist: FloatDistribution | IntDistribution) -> list[Any] | None:
    """The values of a grid of at most MOST_STEPS, None for a continuum."""
    if dist.step is None:
        return None
    count = math.floor((dist.high - dist.low) / dist.step + 1e-9) + 1
    if count > MOST_STEPS:
        return None
    return [dist.low + i * dist.step for i in range(count)]


def _only_value(dist: BaseDistribution) -> Any:
    return dist.choices[0] if isinstance(dist, optuna.distributions.CategoricalDistribution) else dist.low
