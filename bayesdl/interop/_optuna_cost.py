"""What the trials of a study cost, and what the next one may be expected to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from bayesdl.interop._optuna_record import LOST, SURPLUS, ranks
from bayesdl.interop._optuna_space import Encoding

TIMING = "bayesdl:seconds"  # of a proposal: what the fit and the acquisition took
COST = "cost"  # the user attribute of a reported cost
_LEAST = 1e-6  # seconds


class Spending(NamedTuple):
    """The logarithm of the expected cost as a function of coordinates, and how much it weighs.

    Attributes:
        log_cost: Coordinates (*t, q, p) -> (*t, q); differentiable.
        weight: alpha, from 0 to 1.
    """

    log_cost: Any
    weight: float

    def model(self) -> Any:
        """The weighted expected cost c^alpha, as a model that BoTorch's utilities take."""
        from botorch.models.deterministic import GenericDeterministicModel

        return GenericDeterministicModel(lambda X: (self.weight * self.log_cost(X)).exp().unsqueeze(-1))


def trial_cost(setting: Any, trial: FrozenTrial) -> float:
    """What a finished trial cost; NaN where it is not known.

    Args:
        setting: A `bdl.bo.LearnedCost` or `KnownCost`.
        trial: The trial.
    """
    if not trial.state.is_finished():
        return math.nan
    if setting.source == "reported":
        value = trial.user_attrs.get(COST, math.nan)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if number and math.isfinite(value) and value > 0 else math.nan
    if setting.source == "seconds":
        begun, done = trial.datetime_start, trial.datetime_complete
        if begun is None or done is None or begun == done:  # as of a trial that was added
            return math.nan
        proposal = trial.system_attrs.get(TIMING, {}).get("clock", 0.0)
        return max(_LEAST, (done - begun).total_seconds() - proposal)
    if any(name not in trial.params for name in setting.rates):
        return math.nan
    return float(setting.fixed + sum(rate * trial.params[name] for name, rate in setting.rates.items()))


def spent(setting: Any, trials: Sequence[FrozenTrial], before: int | None = None) -> float:
    """What finished trials have cost together; with `before`, those of lower rank. A lost trial counts as nothing."""
    rank_of = ranks(trials)
    total = 0.0
    for trial in trials:
        counts = trial.state in (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)
        if not counts or LOST in trial.system_attrs or SURPLUS in trial.system_attrs:
            continue
        cost = trial_cost(setting, trial)
        if math.isfinite(cost) and (before is None or rank_of[trial.number] < before):
            total += cost
    return total


def weight(setting: Any, trials: Sequence[FrozenTrial], num_startup: int) -> float:
    """alpha: 1 without a budget, else the share that is left of it after the first trials."""
    if setting.budget is None:
        return 1.0
    left = setting.budget - spent(setting, trials)
    at_first = setting.budget - spent(setting, trials, num_startup)
    return min(1.0, max(0.0, left / at_first)) if at_first > 0 else 0.0


class KnownLogCost:
    """log (a + sum_i b_i x_i) at coordinates."""

    def __init__(self, fixed: float, rates: Mapping[str, float], encoding: Encoding) -> None:
        self._encoding = encoding
        self._rates = {name: rate for name, rate in rates.items() if name in encoding.names}
        self._fixed = fixed + sum(rate * encoding.fixed[name] for name, rate in rates.items() if name in encoding.fixed)

    def __call__(self, z: Tensor) -> Tensor:
        """(*t, q, p) -> (*t, q)."""
        total = z.new_full(z.shape[:-1], self._fixed)
        for name, rate in self._rates.items():
            total = total + rate * self._encoding.values(name, z)
        return total.log()


class LearnedLogCost:
    """log E[c] = mean + variance / 2 of a surrogate of log c."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, z: Tensor) -> Tensor:
        """(*t, q, p) -> (*t, q)."""
        posterior = self._model.posterior(z.unsqueeze(-2))
        return (posterior.mean + 0.5 * posterior.variance)[..., 0, 0]


def log_costs(setting: Any, trials: Sequence[FrozenTrial], numbers: Sequence[int]) -> Tensor:
    """log cost of the trials of these numbers, NaN where it is not known, (n, 1)."""
    by_number = {trial.number: trial for trial in trials}
    costs = [trial_cost(setting, by_number[number]) for number in numbers]
    return torch.tensor(costs, dtype=torch.float64).log().unsqueeze(-1)
