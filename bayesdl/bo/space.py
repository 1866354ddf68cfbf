"""Search spaces: numbers on a linear or logarithmic scale, integers, and choices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, ShapeError, fail

__all__ = ["Choice", "Environment", "Fidelity", "Float", "Integer", "Risk", "Space"]


@dataclass(frozen=True)
class Float:
    """A real number from `low` to `high`.

    Attributes:
        low: Least value.
        high: Largest value.
        log: Whether it is searched by its logarithm, for scales such as learning rates; `low` must be positive.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range("Float", self.low, self.high, self.log)


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`, both included.

    Attributes:
        low: Least value.
        high: Largest value.
        log: Whether it is searched by its logarithm; `low` must be positive.
        step: Distance between values; `high - low` must be a multiple of it. Only 1 with `log`.
    """

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                wanted = f"{name} must be an integer."
                fail(SettingError, "Integer", wanted, got=repr(value), fix="bdl.bo.Float for a real number")
        _check_range("Integer", self.low, self.high, self.log)
        if self.step < 1 or (self.high - self.low) % self.step or (self.log and self.step != 1):
            wanted = "step must be positive, divide high - low, and be 1 with log=True."
            got = f"low {self.low}, high {self.high}, step {self.step}, log {self.log}"
            fail(SettingError, "Integer", wanted, got=got, fix="step=1, or another high")


@dataclass(frozen=True)
class Choice:
    """One of several values without an order.

    Attributes:
        options: The values: text, numbers, booleans or None, each once.
    """

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        plain = all(o is None or isinstance(o, (str, bool, int, float)) for o in self.options)
        if not self.options or not plain or len(set(map(repr, self.options))) < len(self.options):
            wanted = "options must be one or more different values: text, numbers, booleans or None."
            fix = "give each option once; for other objects, their names"
            fail(SettingError, "Choice", wanted, got=repr(self.options)[:200], fix=fix)


Dimension = Float | Integer | Choice


@dataclass(frozen=True)
class Fidelity:
    """A number that says how exact an evaluation is: cheap ones inform about `target`, the only value that counts.

    Attributes:
        dimension: A pair (low, high), a `range`, a `Float` or an `Integer`.
        target: The value that counts; None for the largest.
    """

    dimension: Any
    target: float | None = None

    def __post_init__(self) -> None:
        dim = _dimension("Fidelity", self.dimension)
        if isinstance(dim, Choice):
            wanted = "a fidelity must be a number."
            fail(SettingError, "Fidelity", wanted, got=repr(dim), fix="number the choices: range(1, 4)")
        if dim.low == dim.high:
            wanted = "a fidelity must have several values."
            fail(SettingError, "Fidelity", wanted, got=repr(dim), fix="leave a constant out of the space")
        object.__setattr__(self, "dimension", dim)
        object.__setattr__(self, "target", _inside("target", dim, dim.high if self.target is None else self.target))


@dataclass(frozen=True)
class Environment:
    """A parameter that evaluations choose but that is not ours to set in the end: only its law is known.

    Attributes:
        dimension: Any dimension; bounds cut the law off.
        law: Of the values: a `torch.distributions` law of one number with `cdf` and `icdf`; for choices, the
            probability of each; None for a uniform law on the scale of the dimension.
    """

    dimension: Any
    law: Any = None

    def __post_init__(self) -> None:
        dim = _dimension("Environment", self.dimension)
        object.__setattr__(self, "dimension", dim)
        if self.law is None:
            return
        if isinstance(dim, Choice):
            shares = _checks.numbers("Environment", "law", self.law).to(torch.float64).reshape(-1)
            if len(shares) != len(dim.options) or not bool((shares >= 0).all()) or not float(shares.sum()) > 0:
                wanted = "law must have a probability for each choice."
                fail(SettingError, "Environment", wanted, got=repr(self.law), fix=f"{len(dim.options)} numbers")
            object.__setattr__(self, "law", tuple((shares / shares.sum()).tolist()))
            return
        if not isinstance(self.law, torch.distributions.Distribution) or self.law.batch_shape.numel() != 1:
            wanted = "law must be a torch distribution of one number."
            fix = "torch.distributions.Normal(0.5, 0.1)"
            fail(SettingError, "Environment", wanted, got=repr(self.law), fix=fix)
        from bayesdl.interop._optuna_space import mass_below

        try:
            below, above = mass_below(self.law, float(dim.low), float(dim.high))
            self.law.icdf(torch.tensor([0.5], dtype=torch.float64))
        except (NotImplementedError, ValueError) as error:
            got = f"{type(self.law).__name__}: {error}"
            fail(SettingError, "Environment", "law must have cdf and icdf.", got=got, fix="Normal, Uniform, Laplace")
        if not above > below:
            wanted = "the law must have some mass within the bounds."
            fail(SettingError, "Environment", wanted, got=f"{self.law} on {dim}", fix="other bounds")


@dataclass(frozen=True)
class Risk:
    r"""What is sought over the environment: the mean of the values, or how bad the bad ones are.

    Attributes:
        kind: "mean"; "var", the value at risk: the best v that a share `level` of the draws reaches; or "cvar", the
            conditional value at risk: the mean of the draws that are no better than v.
        level: Between 0 and 1.
        num_draws: Quasi-random values of the environment over which it is taken, the same throughout a study.

    Reference: Cakmak, Astudillo, Frazier, Zhou (2020), arXiv 2007.05554.
    """

    kind: str = "mean"
    level: float = 0.8
    num_draws: int = 16

    def __post_init__(self) -> None:
        _checks.choice("Risk", "kind", self.kind, ("mean", "var", "cvar"))
        _checks.inside("Risk", "level", self.level, 0.0, 1.0)
        _checks.at_least("Risk", "num_draws", self.num_draws, 2, integer=True)


@dataclass(frozen=True)
class Space:
    """Named dimensions, and the form in which an objective receives a point.

    Attributes:
        names: One name for each dimension.
        dimensions: `Float`, `Integer` or `Choice`, in the same order.
        form: What an objective receives: "dict" of names to values, "array" (numpy, float64) or "tensor".
        fidelities: Names of fidelities, and the values that count.
        environment: Names of what is not ours to set, and their laws.
    """

    names: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    form: str = "dict"
    fidelities: Mapping[str, float] = field(default_factory=dict, hash=False)
    environment: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _checks.choice("Space", "form", self.form, ("dict", "array", "tensor"))
        named = all(isinstance(name, str) and name for name in self.names)
        if not self.names or not named or len(set(self.names)) < len(self.names):
            wanted = "every dimension needs a name of its own, and there must be at least one."
            fail(SettingError, "Space", wanted, got=repr(self.names), fix='{"x": (0.0, 1.0)}')
        if len(self.names) != len(self.dimensions):
            got = f"{len(self.names)} names, {len(self.dimensions)} dimensions"
            fail(SettingError, "Space", "names and dimensions must pair up.", got=got, fix="give one name for each")
        if self.form != "dict" and any(isinstance(dim, Choice) for dim in self.dimensions):
            wanted = "a space with choices hands points out as dicts."
            fail(SettingError, "Space", wanted, got=f"form {self.form!r}", fix='form="dict"')

    @staticmethod
    def of(bounds: Any) -> Space:
        """A space from what a user writes.

        Args:
            bounds: A `Space`; a tensor (2, d) of lower and upper bounds; a sequence of dimensions; or a dict of names
                to dimensions. A dimension is a pair (low, high) of a real number, a `range` of integers, a list of
                choices, a `Float`, `Integer` or `Choice`, or one of these in a `Fidelity` or an `Environment`.

        Raises:
            ShapeError: A tensor of another shape.
            SettingError: A dimension that is none of these; bounds that are reversed, equal, infinite or NaN.
        """
        if isinstance(bounds, Space):
            return bounds
        if isinstance(bounds, Mapping):
            return _of_parts(tuple(bounds), [(f"bounds[{name!r}]", dim) for name, dim in bounds.items()], "dict")
        if isinstance(bounds, Tensor):
            return _of_tensor(bounds)
        if isinstance(bounds, (str, bytes)) or not isinstance(bounds, (Sequence, np.ndarray)):
            wanted = "bounds must be a tensor (2, d), a list of pairs, a dict of names, or a Space."
            fail(SettingError, "Space.of", wanted, got=_checks.describe(bounds), fix="[(0.0, 1.0), (-5.0, 5.0)]")
        parts = [(f"bounds[{i}]", dim) for i, dim in enumerate(bounds)]
        return _of_parts(tuple(f"x{i}" for i in range(len(parts))), parts)

    def distributions(self) -> dict[str, Any]:
        """Name -> Optuna distribution, as the study's record holds them."""
        from bayesdl.interop import optuna as door

        return {name: door.distribution(dim) for name, dim in zip(self.names, self.dimensions, strict=True)}

    def to_unit(self, points: Sequence[Mapping[str, Any]]) -> Tensor:
        """Coordinates (n, p) of points given as dicts: numbers in [0, 1], choices as their index.

        A dimension with a single value has no coordinate.
        """
        return self._encoding().encode(points)

    def from_unit(self, z: Tensor) -> list[dict[str, Any]]:
        """The points of coordinates z (n, p), clipped to the bounds and rounded to integers: undoes `to_unit`."""
        encoding = self._encoding()
        return [self._ordered(encoding.decode(row)) for row in z]

    def hand_out(self, params: Mapping[str, Any]) -> Any:
        """A point in the form that an objective receives."""
        if self.form == "dict":
            return self._ordered(params)
        values = np.array([params[name] for name in self.names], dtype=np.float64)
        return torch.from_numpy(values) if self.form == "tensor" else values

    def take_in(self, point: Any) -> dict[str, Any]:
        """A point in the form that an objective receives, as a dict; values outside their dimension are refused."""
        if not isinstance(point, Mapping):
            values = _checks.numbers("Space", "point", point).reshape(-1).tolist()
            if len(values) != len(self.names):
                wanted = f"a point must have {len(self.names)} values."
                fail(ShapeError, "Space", wanted, got=repr(point)[:200], fix=f"give {', '.join(self.names)}")
            point = dict(zip(self.names, values, strict=True))
        if set(point) != set(self.names):
            wanted = f"a point must have the names {', '.join(self.names)}."
            fail(SettingError, "Space", wanted, got=", ".join(map(str, point)), fix="name each dimension once")
        return {name: _inside(name, dim, point[name]) for name, dim in zip(self.names, self.dimensions, strict=True)}

    def _ordered(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: params[name] for name in self.names}

    def _encoding(self) -> Any:
        from bayesdl.interop import optuna as door

        return door.Encoding(self.distributions())


def _of_parts(names: tuple[str, ...], parts: list[tuple[str, Any]], form: str = "") -> Space:
    """A space of dimensions, some of them in a `Fidelity` or an `Environment`; by itself an array without choices."""
    bare = [dim.dimension if isinstance(dim, (Fidelity, Environment)) else dim for _, dim in parts]
    dims = tuple(_dimension(where, dim) for (where, _), dim in zip(parts, bare, strict=True))
    form = form or ("dict" if any(isinstance(dim, Choice) for dim in dims) else "array")
    marked = dict(zip(names, (dim for _, dim in parts), strict=True))
    fidelities = {name: dim.target for name, dim in marked.items() if isinstance(dim, Fidelity)}
    environment = {name: dim.law for name, dim in marked.items() if isinstance(dim, Environment)}
    return Space(names, dims, form, fidelities, environment)


def _of_tensor(bounds: Tensor) -> Space:
    if bounds.ndim != 2 or bounds.shape[0] != 2 or bounds.shape[1] == 0:
        fix = "torch.stack([low, high]); a list of pairs is the transpose"
        fail(ShapeError, "Space.of", "a tensor of bounds has shape (2, d).", got=_checks.describe(bounds), fix=fix)
    low, high = bounds.detach().to(torch.float64).tolist()
    dims = tuple(_dimension(f"bounds[:, {i}]", pair) for i, pair in enumerate(zip(low, high, strict=True)))
    return Space(tuple(f"x{i}" for i in range(len(dims))), dims, "tensor")


def _dimension(where: str, dim: Any) -> Dimension:
    """The dimension that a user wrote in short."""
    if isinstance(dim, (Float, Integer, Choice)):
        return dim
    if isinstance(dim, range) and len(dim) > 0 and dim.step > 0:
        return Integer(dim[0], dim[-1], step=dim.step if len(dim) > 1 else 1)
    is_pair = isinstance(dim, (tuple, np.ndarray)) and len(dim) == 2
    if is_pair and all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in dim):
        return Float(float(dim[0]), float(dim[1]))
    pair_of_numbers = isinstance(dim, list) and len(dim) == 2 and all(type(v) in (int, float) for v in dim)
    if isinstance(dim, list) and not pair_of_numbers:
        return Choice(tuple(dim))
    if pair_of_numbers:
        wanted = f"{where} could be a range or two choices."
        fix = f"({dim[0]}, {dim[1]}) for a range, bdl.bo.Choice(({dim[0]}, {dim[1]})) for choices"
        fail(SettingError, "Space.of", wanted, got=repr(dim), fix=fix)
    wanted = f"{where} must be a pair (low, high), a range of integers, a list of choices, or a dimension."
    fix = '(0.0, 1.0), range(1, 11), ["relu", "tanh"], or bdl.bo.Float(1e-4, 1.0, log=True)'
    return fail(SettingError, "Space.of", wanted, got=repr(dim)[:200], fix=fix)


def _check_range(where: str, low: float, high: float, log: bool) -> None:
    for name, value in (("low", low), ("high", high)):
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            wanted = f"{name} must be a finite number."
            fail(SettingError, where, wanted, got=repr(value), fix="give bounds that the best value surely lies within")
    if low > high or (low == high and where == "Float"):
        fix = f"{where}({high!r}, {low!r})" if low > high else "leave a constant out of the space"
        fail(SettingError, where, "low must be below high.", got=f"low {low!r}, high {high!r}", fix=fix)
    if log and low <= 0:
        fix = "a positive low, or log=False"
        fail(SettingError, where, "low must be positive with log=True.", got=repr(low), fix=fix)


def _inside(name: str, dim: Dimension, value: Any) -> Any:
    """`value` in the type of its dimension, refused where it lies outside."""
    if isinstance(dim, Choice):
        good = any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in dim.options)
    else:
        good = isinstance(value, (int, float, np.number)) and dim.low <= value <= dim.high
        if good and isinstance(dim, Integer):
            good = float(value).is_integer() and (int(value) - dim.low) % dim.step == 0
    if not good:
        wanted = f"{name} must lie in {dim}."
        fail(SettingError, "Space", wanted, got=repr(value), fix="a value within the space")
    if isinstance(dim, Choice):
        return value
    return int(value) if isinstance(dim, Integer) else float(value)
