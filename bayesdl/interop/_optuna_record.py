"""An Optuna study as data: what has been observed, what is under way, what failed, and in which order it all counts.

A trial that died with its worker is tried again as a new trial. Both have one rank: the place of the first in the order
of all first attempts. Data are sorted by rank and random streams are seeded by rank, never by trial number or clock, so
that a study that lost workers proposes what it would have proposed without the loss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from bayesdl.interop._optuna_space import Encoding

SURPLUS = "bayesdl:surplus"  # a trial withdrawn before it was evaluated: one too many, or a doubled retry
LOST = "bayesdl:lost"  # a trial whose worker died
RETRY_OF, HISTORY = "failed_trial", "retry_history"  # Optuna's own names, so that its tools understand retries


class Record(NamedTuple):
    """What a proposal may depend on.

    Attributes:
        rank: Of the trial that is to be proposed.
        ranks: Of the observed trials, ascending.
        z: Coordinates of the observed points (n, p).
        y: Objectives (n, m), signs such that larger is better.
        constraints: Reported constraints (n, k), feasible where at most 0.
        failed: Coordinates of points without a usable value (f, p).
        pending: Coordinates of points under way elsewhere (r, p).
        failed_ranks: Of the failed trials.
        pending_ranks: Of the trials under way.
        numbers: Of the observed trials.
    """

    rank: int
    ranks: tuple[int, ...]
    z: Tensor
    y: Tensor
    constraints: Tensor
    failed: Tensor
    pending: Tensor
    failed_ranks: tuple[int, ...] = ()
    pending_ranks: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()


def ranks(trials: Iterable[FrozenTrial]) -> dict[int, int]:
    """Trial number -> rank; withdrawn trials have none."""
    found: dict[int, int] = {}
    count = 0
    for trial in sorted(trials, key=lambda t: t.number):
        if SURPLUS in trial.system_attrs:
            continue
        first = origin(trial)
        if first == trial.number or first not in found:
            found[trial.number] = count
            count += 1
        else:
            found[trial.number] = found[first]
    return found


def origin(trial: FrozenTrial) -> int:
    """The number of the first attempt at this trial."""
    history = trial.system_attrs.get(HISTORY) or []
    return int(history[0]) if history else int(trial.system_attrs.get(RETRY_OF, trial.number))


def read(
    trials: Sequence[FrozenTrial],
    number: int,
    encoding: Encoding,
    directions: Sequence[StudyDirection],
    constraint_names: Sequence[str] | None,
    stale: frozenset[int] = frozenset(),
) -> Record:
    """The record as the trial `number` sees it.

    Args:
        trials: All trials of the study.
        number: The trial to be proposed.
        encoding: Coordinates of the search space; trials that lack a parameter of it do not count.
        directions: One for each objective.
        constraint_names: Constraints that the surrogate models; None for all that any trial reported.
        stale: Numbers of running trials whose workers are dead.
    """
    rank_of = ranks(trials)
    retried = {int(t.system_attrs[RETRY_OF]) for t in trials if RETRY_OF in t.system_attrs}
    names = constraints_of(trials) if constraint_names is None else tuple(constraint_names)
    observed: list[tuple[int, FrozenTrial]] = []
    failed: list[tuple[int, FrozenTrial]] = []
    pending: list[tuple[int, FrozenTrial]] = []
    for trial in trials:
        if trial.number not in rank_of or trial.number == number or any(n not in trial.params for n in encoding.names):
            continue
        place = (rank_of[trial.number], trial)
        if trial.state == TrialState.COMPLETE:
            (observed if _usable(trial, len(directions), names) else failed).append(place)
        elif trial.state == TrialState.FAIL and trial.number not in retried:
            failed.append(place)
        elif trial.state == TrialState.RUNNING and trial.number not in stale:
            pending.append(place)
    for group in (observed, failed, pending):
        group.sort(key=lambda place: place[0])
    signs = torch.tensor([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in directions], dtype=torch.float64)
    values = torch.tensor([t.values for _, t in observed], dtype=torch.float64).reshape(len(observed), len(directions))
    limits = [[t.constraints[name] for name in names] for _, t in observed]
    return Record(
        rank=rank_of.get(number, len(set(rank_of.values()))),
        ranks=tuple(place for place, _ in observed),
        z=encoding.encode([t.params for _, t in observed]),
        y=values * signs,
        constraints=torch.tensor(limits, dtype=torch.float64).reshape(len(observed), len(names)),
        failed=encoding.encode([t.params for _, t in failed]),
        pending=encoding.encode([t.params for _, t in pending]),
        failed_ranks=tuple(place for place, _ in failed),
        pending_ranks=tuple(place for place, _ in pending),
        numbers=tuple(trial.number for _, trial in observed),
    )


def constraints_of(trials: Iterable[FrozenTrial]) -> tuple[str, ...]:
    """Names of the constraints that finished trials reported, in alphabetical order."""
    return tuple(sorted({name for t in trials if t.state == TrialState.COMPLETE for name in t.constraints}))


def _usable(trial: FrozenTrial, num_objectives: int, names: Sequence[str]) -> bool:
    """Whether a finished trial has the finite values that a surrogate needs."""
    values = trial.values or []
    limits = trial.constraints
    numbers = [*values, *(limits[name] for name in names if name in limits)]
    complete = len(values) == num_objectives and all(name in limits for name in names)
    return complete and all(math.isfinite(value) for value in numbers)


def stream(*parts: int | str) -> int:
    """A seed below 2**63 from integers and text: the same on every machine, unrelated for different parts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short name for settings that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=repr).encode()).hexdigest()[:24]
