"""Trials as plain values, and the few things that are done to one trial: propose its parameters, add it, find it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from bayesdl.errors import SettingError, fail
from bayesdl.interop._optuna_cost import COST, spent, trial_cost
from bayesdl.interop._optuna_record import RETRY_OF, SURPLUS, Record, read
from bayesdl.interop._optuna_space import Encoding
from bayesdl.interop._optuna_workers import ERROR, LOST, persist

_STATES = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "complete",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "failed",
}


def suggest(study: optuna.Study, trial_id: int, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """Give a claimed trial its parameters, by the study's sampler, and return it."""

    def parameters() -> FrozenTrial:
        trial = optuna.trial.Trial(study, trial_id)
        for name, dist in space.items():
            if isinstance(dist, CategoricalDistribution):
                trial.suggest_categorical(name, dist.choices)
            elif isinstance(dist, IntDistribution):
                trial.suggest_int(name, dist.low, dist.high, step=dist.step, log=dist.log)
            else:
                trial.suggest_float(name, dist.low, dist.high, step=dist.step, log=dist.log)
        return study._storage.get_trial(trial_id)

    return persist(parameters)


def add_complete(
    study: optuna.Study,
    params: Mapping[str, Any],
    space: Mapping[str, BaseDistribution],
    values: list[float],
    constraints: Mapping[str, float],
    cost: float | None = None,
) -> None:
    """Add a trial that was evaluated elsewhere; one without finite values as failed."""
    good = all(math.isfinite(value) for value in (*values, *constraints.values()))
    template = create_trial(
        state=TrialState.COMPLETE if good else TrialState.FAIL,
        values=values if good else None,
        params=dict(params),
        distributions=dict(space),
        user_attrs={} if cost is None else {COST: float(cost)},
        system_attrs={f"constraints:{name}": value for name, value in constraints.items()} if good else {},
    )
    persist(lambda: study.add_trial(template))


def recorded(study: optuna.Study) -> list[FrozenTrial]:
    """All trials but those that were withdrawn before an evaluation, by number."""
    trials = persist(lambda: study.get_trials(deepcopy=False))
    return [t for t in sorted(trials, key=lambda t: t.number) if SURPLUS not in t.system_attrs]


def trial_id(study: optuna.Study, number: int) -> int:
    """The id in the storage of the trial `number`."""
    try:
        return persist(lambda: study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))
    except KeyError:
        count = len(study.get_trials(deepcopy=False))
        wanted = "the trial must be one that was asked for."
        fail(SettingError, "study.tell", wanted, got=f"number {number} of {count} trials", fix="study.ask()")


def plain(trial: FrozenTrial) -> dict[str, Any]:
    """The fields of a `bdl.bo.Trial` but its point."""
    begun, done = trial.datetime_start, trial.datetime_complete
    reason = trial.system_attrs.get(ERROR, "")
    if not reason and trial.state in (TrialState.FAIL, TrialState.PRUNED):
        reason = "its worker died" if LOST in trial.system_attrs else trial.state.name.lower()
    complete = trial.state == TrialState.COMPLETE
    return {
        "number": trial.number,
        "params": dict(trial.params),
        "state": _STATES[trial.state],
        "values": tuple(trial.values) if complete else (),
        "constraints": dict(trial.constraints) if complete else {},
        "error": reason,
        "seconds": (done - begun).total_seconds() if begun and done else math.nan,
        "retry_of": trial.system_attrs.get(RETRY_OF),
    }


def fitted(study: optuna.Study, sampler: Any, space: Mapping[str, BaseDistribution]) -> tuple[Any, Record, Encoding]:
    """The sampler's posterior of all finished trials, what it was fitted to, and the coordinates."""
    encoding = Encoding(space)
    record = observed(study, sampler.constraints, encoding)
    if len(record.z) < 2:
        wanted = "a surrogate needs two finished trials."
        fail(SettingError, "study.posterior", wanted, got=f"{len(record.z)}", fix="evaluate some first")
    return sampler.fitted(study, record, encoding), record, encoding


def recommended(
    study: optuna.Study, sampler: Any, space: Mapping[str, BaseDistribution]
) -> tuple[dict[str, Any], float, float]:
    """Parameters, mean and standard deviation of the evaluated point of which the surrogate thinks best."""
    _, record, encoding = fitted(study, sampler, space)
    return sampler.recommend(study, encoding, record)


def cost(trial: FrozenTrial, setting: Any) -> float:
    """What a trial cost; NaN where that is not known."""
    return trial_cost(setting, trial)


def spending(study: optuna.Study, setting: Any) -> float:
    """What the finished trials of a study cost together."""
    return spent(setting, persist(lambda: study.get_trials(deepcopy=False)))


def observed(study: optuna.Study, constraints: Sequence[str] | None, encoding: Encoding) -> Record:
    """The record of everything that is finished."""
    return read(persist(lambda: study.get_trials(deepcopy=False)), -1, encoding, study.directions, constraints)
