r"""The eleven parametric families of learning curves, each with the law of its parameters.

Formulas and laws are those on which LC-PFN was trained (Adriaensen, Rakotoarison, Mueller, Hutter, 2023, arXiv
2310.20447), and the families those of Domhan, Springenberg, Hutter (2015), "Speeding up automatic hyperparameter
optimization of deep neural networks by extrapolation of learning curves".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Law:
    r"""The law of one parameter: theta = link(z), z uniform on (first, second) or N(first, second^2).

    Attributes:
        kind: "uniform" or "normal".
        first: Lower end, or mean, of z.
        second: Upper end, or standard deviation, of z.
        link: "identity", "exp" (so that z = ln theta) or "one minus exp" (so that z = ln(1 - theta)).
    """

    kind: str
    first: float
    second: float
    link: str = "identity"

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draws in float64 on the generator's device."""
        if self.kind == "uniform":
            u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
            z = self.first + (self.second - self.first) * u
        else:
            e = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
            z = self.first + self.second * e
        if self.link == "identity":
            return z
        return z.exp() if self.link == "exp" else 1.0 - z.exp()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of theta itself, elementwise; -inf outside of its support."""
        if self.link == "identity":
            z, jacobian = value, torch.zeros_like(value)
        else:
            z = (value if self.link == "exp" else 1.0 - value).log()
            jacobian = -z
        if self.kind == "normal":
            square = ((z - self.first) / self.second).square()
            return -0.5 * square - math.log(self.second) - 0.5 * math.log(2 * math.pi) + jacobian
        inside = (z >= self.first) & (z <= self.second)
        density = jacobian - math.log(self.second - self.first)
        return torch.where(inside, density, torch.full_like(density, -math.inf))


class Curve(NamedTuple):
    """One family of curves.

    Attributes:
        formula: (t, parameters by name) -> y, elementwise with broadcasting, differentiable.
        peaked: Law of each parameter, the one that the published network was trained on.
        uniform: Another law of each, for the three families that have one, else None.
    """

    formula: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    peaked: dict[str, Law]
    uniform: dict[str, Law] | None = None


def _uniform(low: float, high: float, link: str = "identity") -> Law:
    return Law("uniform", low, high, link)


def _normal(mean: float, sd: float, link: str = "identity") -> Law:
    return Law("normal", mean, sd, link)


def _pow3(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["c"] - p["a"] * t ** (-p["alpha"])


def _ilog2(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["c"] - p["a"] / torch.log1p(t)


def _janoschek(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["a"] - (p["a"] - p["b"]) * torch.exp(-p["k"] * t ** p["d"])


def _log_power(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["a"] * torch.sigmoid(-p["c"] * (t.log() - p["b"]))


def _weibull(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["a"] - (p["a"] - p["b"]) * torch.exp(-((p["k"] * t) ** p["d"]))


def _mmf(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["a"] - (p["a"] - p["b"]) / (1.0 + (p["k"] * t) ** p["d"])


def _vap(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return torch.exp(p["a"] + p["b"] / t + p["c"] * t.log())


def _loglog_linear(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return torch.log(p["a"] * t.log() + p["b"])


def _exp4(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["c"] - torch.exp(p["b"] - p["a"] * t ** p["alpha"])


def _pow4(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["c"] - (p["a"] * t + p["b"]) ** (-p["alpha"])


def _dr_hill(t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    return p["theta"] * torch.sigmoid(p["eta"] * (t.log() - p["kappa"].log()))


CURVES: dict[str, Curve] = {
    "pow3": Curve(
        _pow3,
        {"a": _uniform(-0.6, 0.6), "c": _uniform(0.0, 1.25), "alpha": _normal(0.0, 2.0, "exp")},
        {"a": _uniform(-1.0, 1.0), "c": _uniform(0.0, 1.0), "alpha": _uniform(0.0, 1.0)},
    ),
    "ilog2": Curve(
        _ilog2,
        {"c": _uniform(0.0, 1.0), "a": _uniform(-0.5, 0.5)},
        {"c": _uniform(0.0, 1.0), "a": _uniform(-1.0, 1.0)},
    ),
    "janoschek": Curve(
        _janoschek,
        {
            "a": _uniform(0.0, 1.0),
            "b": _uniform(0.0, 2.0),
            "k": _normal(-2.0, 1.0, "exp"),
            "d": _normal(0.0, 0.5, "exp"),
        },
        {"a": _uniform(0.0, 1.0), "b": _uniform(0.0, 2.0), "k": _uniform(0.0, 1.0), "d": _uniform(-5.0, 5.0)},
    ),
    "log_power": Curve(_log_power, {"a": _normal(0.8, 0.1), "b": _normal(1.0, 1.0), "c": _uniform(-3.0, 0.0)}),
    "weibull": Curve(
        _weibull,
        {
            "a": _uniform(0.0, 1.5),
            "b": _uniform(0.0, 1.0),
            "k": _normal(-2.0, 1.0, "exp"),
            "d": _normal(0.0, 0.5, "exp"),
        },
    ),
    "mmf": Curve(
        _mmf,
        {
            "a": _normal(0.8, 0.1),
            "b": _normal(0.2, 0.1),
            "k": _normal(0.0, 2.0, "exp"),
            "d": _normal(0.0, 1.0, "exp"),
        },
    ),
    "vap": Curve(_vap, {"a": _uniform(-2.0, 0.0), "b": _uniform(-4.0, 0.0), "c": _uniform(-8.0, 0.0, "exp")}),
    "loglog_linear": Curve(_loglog_linear, {"a": _normal(-2.0, 1.0, "exp"), "b": _uniform(0.0, 1.0, "exp")}),
    "exp4": Curve(
        _exp4,
        {
            "c": _normal(0.8, 0.1),
            "a": _normal(-2.0, 1.0, "exp"),
            "b": _normal(0.0, 0.5, "exp"),
            "alpha": _normal(0.0, 1.0, "exp"),
        },
    ),
    "pow4": Curve(
        _pow4,
        {
            "c": _uniform(-5.0, 0.0, "one minus exp"),
            "a": _normal(-3.0, 2.0, "exp"),
            "b": _uniform(0.0, 1.0, "exp"),
            "alpha": _normal(0.0, 1.0, "exp"),
        },
    ),
    "dr_hill": Curve(
        _dr_hill,
        {"theta": _normal(0.8, 0.1), "eta": _normal(1.0, 1.0, "exp"), "kappa": _normal(1.0, 2.0, "exp")},
    ),
}
