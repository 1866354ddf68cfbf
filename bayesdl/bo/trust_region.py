"""Trust regions: a search of many dimensions confined to a box around its best point, which grows and shrinks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bayesdl import _checks
from bayesdl.errors import SettingError, fail

__all__ = ["TrustRegion"]


@dataclass(frozen=True)
class TrustRegion:
    r"""Propose within a box around the best point so far, whose size follows success: TuRBO-1, one trial at a time.

    In coordinates that run over [0, 1] the box has sides

        L lambda_i / (prod_j lambda_j)^(1/p)

    where lambda are the lengthscales of the surrogate if it has one for each column, and equal otherwise: long where
    the function hardly changes. A success is a finished trial that betters the best of its region by a thousandth of
    the spread of the region's first values; an infeasible best is bettered by what violates less. After
    `success_tolerance` successes in a row L is doubled, up to `max_length`; after `failure_tolerance` failures in a row
    it is halved; below `min_length` the region has converged, and the search starts anew with quasi-random trials and a
    surrogate of those that follow. Choices are not confined, integers to the box and the next value on either side.

    The size is worked out from the finished trials at each proposal and kept nowhere, so that all workers have the same
    and a study that was stopped goes on with it. Failed trials count neither way.

    Attributes:
        initial_length: L of a new region.
        min_length: L below which a region has converged.
        max_length: L at most; above 1 the box is held by the bounds.
        success_tolerance: Successes in a row that double L.
        failure_tolerance: Failures in a row that halve L; None for the number of free parameters, at least 4.

    Reference: Eriksson, Pearce, Gardner, Turner, Poloczek (2019), arXiv 1910.01739, algorithm 1 and section 2, with one
    trust region, any surrogate and any acquisition in place of Thompson samples.
    """

    initial_length: float = 0.8
    min_length: float = 0.5**7
    max_length: float = 1.6
    success_tolerance: int = 3
    failure_tolerance: int | None = None

    def __post_init__(self) -> None:
        for name in ("initial_length", "min_length", "max_length"):
            _checks.inside("TrustRegion", name, getattr(self, name), 0.0, math.inf)
        if not self.min_length <= self.initial_length <= self.max_length:
            wanted = "lengths must rise from min_length over initial_length to max_length."
            got = f"{self.min_length}, {self.initial_length}, {self.max_length}"
            fail(SettingError, "TrustRegion", wanted, got=got, fix="TrustRegion()")
        _checks.at_least("TrustRegion", "success_tolerance", self.success_tolerance, 1, integer=True)
        if self.failure_tolerance is not None:
            _checks.at_least("TrustRegion", "failure_tolerance", self.failure_tolerance, 1, integer=True)
