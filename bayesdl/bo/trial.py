"""What a study holds and says: its trials, and the point that it recommends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Recommendation", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One evaluation of the objective.

    Attributes:
        number: Its number in the study.
        params: Its parameters by name.
        x: The same point in the form that the objective receives.
        state: "running", "complete", "failed", or "waiting" for a retry.
        values: Values of the objectives in the user's signs; empty until it is complete.
        constraints: Reported constraints by name; feasible where all are at most 0.
        error: Why it failed, "" where it did not.
        seconds: Wall-clock time from ask to tell, NaN until then.
        retry_of: The number of the trial whose worker died and whose parameters this one has, or None.
        cost: What it cost, in a study that heeds costs and once it is finished; NaN where that is not known.
        exact: Whether all fidelities of its space have their targets.
    """

    number: int
    params: Mapping[str, Any]
    x: Any = field(repr=False, compare=False)
    state: str = "running"
    values: tuple[float, ...] = ()
    constraints: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    seconds: float = math.nan
    retry_of: int | None = None
    cost: float = math.nan
    exact: bool = True

    @property
    def value(self) -> float:
        """The value of the only objective; NaN until the trial is complete."""
        return self.values[0] if self.values else math.nan

    @property
    def feasible(self) -> bool:
        """Whether it is complete and every reported constraint is at most 0."""
        return self.state == "complete" and all(limit <= 0 for limit in self.constraints.values())


class Recommendation(NamedTuple):
    """What a study would use now; see `Study.recommend`.

    Attributes:
        params: Parameters by name: fidelities at their targets, without what the environment sets.
        mean: The posterior mean of what is sought, in the user's signs.
        deviation: Its posterior standard deviation.
    """

    params: dict[str, Any]
    mean: float
    deviation: float
