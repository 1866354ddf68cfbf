"""What evaluations cost: known beforehand, or learned from those that were made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bayesdl import _checks
from bayesdl.bo.space import Choice, Space
from bayesdl.errors import SettingError, fail

__all__ = ["KnownCost", "LearnedCost"]

_SOURCES = ("seconds", "reported")


@dataclass(frozen=True)
class LearnedCost:
    r"""The cost of an evaluation is seen when it is made, and predicted by a surrogate of its own.

    The logarithm of the cost is modelled by a Gaussian process whatever the engine of the study is, and improvement is
    maximised per expected cost,

        log improvement(x) - alpha log E[c(x)],    E[c] = exp(mean + variance / 2) of log c.

    Without a budget alpha is 1. With one it falls from 1 when the quasi-random trials are done to 0 when the budget is
    spent, alpha = (budget - spent) / (budget - spent at first), so that cheap regions come first and good ones in the
    end; `minimize` begins no trial once the finished ones have cost the budget.

    Attributes:
        source: "seconds", the time of each trial by the clock, the proposal excluded; or "reported", a positive number
            that comes with the result: `study.tell(trial, value, cost=...)`, or `return value, {"cost": ...}` from an
            objective, and `trial.set_user_attr("cost", ...)` in an Optuna program.
        budget: What all trials may cost together; None for no limit.

    Reference: Snoek, Larochelle, Adams (2012), arXiv 1206.2944, section 3.2, for improvement per second; Lee, Perrone,
    Archambeau, Seeger (2020), arXiv 2003.10870, for alpha.
    """

    source: str = "seconds"
    budget: float | None = None

    def __post_init__(self) -> None:
        _checks.choice("LearnedCost", "source", self.source, _SOURCES)
        if self.budget is not None:
            _checks.inside("LearnedCost", "budget", self.budget, 0.0, math.inf)


@dataclass(frozen=True)
class KnownCost:
    """The cost of an evaluation is fixed + sum of rate times value, over some parameters: c(x) = a + sum_i b_i x_i.

    What it does to proposals, and what a budget does, is as for `LearnedCost`.

    Attributes:
        fixed: a.
        rates: b by the names of parameters, in cost per unit of each.
        budget: What all trials may cost together; None for no limit.
    """

    fixed: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    budget: float | None = None

    source = "known"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", dict(self.rates))
        for name, value in {"fixed": self.fixed, **self.rates}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                wanted = f"{name} must be a finite number."
                fail(SettingError, "KnownCost", wanted, got=repr(value), fix='KnownCost(1.0, {"epochs": 0.1})')
        if self.budget is not None:
            _checks.inside("KnownCost", "budget", self.budget, 0.0, math.inf)


Cost = LearnedCost | KnownCost


def cost_of(setting: Any, space: Space, constraints: tuple[str, ...]) -> Cost | None:
    """What a user asked for, checked against the space.

    Raises:
        SettingError: No cost, a rate of something that is no number of the space, or a cost that may fall to 0.
    """
    if setting is None:
        return None
    if isinstance(setting, str) and setting in _SOURCES:
        setting = LearnedCost(setting)
    if not isinstance(setting, (LearnedCost, KnownCost)):
        wanted = 'cost must be "seconds", "reported", a LearnedCost or a KnownCost.'
        fail(SettingError, "Study", wanted, got=repr(setting)[:200], fix='cost="seconds"')
    if setting.source == "reported" and "cost" in constraints:
        wanted = 'a constraint and the reported cost must have different names, and the latter is "cost".'
        fail(SettingError, "Study", wanted, got=str(constraints), fix='constraints=("spending",)')
    if isinstance(setting, KnownCost):
        _check_known(setting, space)
    return setting


def _check_known(setting: KnownCost, space: Space) -> None:
    dims = dict(zip(space.names, space.dimensions, strict=True))
    unknown = [name for name in setting.rates if name not in dims or isinstance(dims[name], Choice)]
    if unknown:
        wanted = "rates must be of numbers in the space."
        fail(SettingError, "Study", wanted, got=str(unknown), fix='cost="seconds", which learns it from the trials')
    least = setting.fixed + sum(min(b * dims[name].low, b * dims[name].high) for name, b in setting.rates.items())
    if least <= 0:
        wanted = "the cost must be positive everywhere in the space."
        fail(SettingError, "Study", wanted, got=f"{least} at least", fix="a positive fixed cost")
