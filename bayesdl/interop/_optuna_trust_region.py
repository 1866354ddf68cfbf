"""The trust region of a study: which trials belong to it, how large it is, and the box in which the next point lies.

Everything follows from the record. With a trial is kept for which region it was proposed, and how large that was then;
the size of the region now comes from going through its finished trials in the order of their ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from optuna.trial import FrozenTrial
from torch import Tensor

from bayesdl.interop._optuna_record import Record, ranks
from bayesdl.interop._optuna_space import Encoding
from bayesdl.posterior import GPMixturePosterior

REGION = "bayesdl:region"  # of a proposal: number of the region, its length (None for a quasi-random point)
_BETTER = 1e-3  # of the spread of a region's first values, by which a success betters the best

Note = tuple[int, float | None]


class Region(NamedTuple):
    """Where the search stands.

    Attributes:
        number: How many regions converged before.
        length: L, the geometric mean of the sides of the box in coordinates over [0, 1].
        begun: First attempts of the region that come before the trial to be proposed.
        record: The record without the trials of other regions.
    """

    number: int
    length: float
    begun: int
    record: Record


class Box(NamedTuple):
    """A part of the coordinates.

    Attributes:
        bounds: (2, p).
        grids: Coordinate -> its values within, for numbers on a grid.
    """

    bounds: Tensor
    grids: dict[int, list[float]]

    def holds(self, points: Tensor) -> Tensor:
        """Which of the points (n, p) lie within, (n)."""
        return ((points >= self.bounds[0] - 1e-12) & (points <= self.bounds[1] + 1e-12)).all(-1)


def current(settings: Any, trials: Sequence[FrozenTrial], record: Record, num_free: int) -> Region:
    """The region in which the trial of `record` is proposed.

    Args:
        settings: A `bdl.bo.TrustRegion`.
        trials: All trials of the study.
        record: What has been observed of them.
        num_free: Free parameters p.
    """
    noted = notes(trials)
    number = max((note[0] for note in noted.values()), default=0)
    rows = [i for i, rank in enumerate(record.ranks) if noted.get(rank, (0, None))[0] == number]
    first = [i for i in rows if noted.get(record.ranks[i], (0, None))[1] is None]
    later = [i for i in rows if i not in set(first)]
    length = replay(settings, record, first, later, num_free)
    if length < settings.min_length:
        number, length = number + 1, settings.initial_length
    all_ranks = set(ranks(trials).values())
    begun = sum(noted.get(rank, (0, None))[0] == number for rank in all_ranks if rank < record.rank)
    return Region(number, length, begun, _part(record, noted, number))


def notes(trials: Sequence[FrozenTrial]) -> dict[int, Note]:
    """Rank -> region and length, as noted with the attempt that got its parameters from them."""
    rank_of = ranks(trials)
    found: dict[int, Note] = {}
    settled: set[int] = set()
    for trial in sorted(trials, key=lambda t: t.number):
        rank, note = rank_of.get(trial.number), trial.system_attrs.get(REGION)
        if rank is None or note is None or rank in settled:
            continue
        found[rank] = (int(note[0]), note[1])
        if trial.params:  # a retry has the parameters of this one, wherever the search stood when it was made
            settled.add(rank)
    return found


def replay(settings: Any, record: Record, first: Sequence[int], later: Sequence[int], num_free: int) -> float:
    """L after the trials `later` (rows of the record, in their order) of a region whose quasi-random ones are `first`.

    Less than `settings.min_length` where the region has converged.
    """
    tolerance = settings.failure_tolerance or max(4, num_free)
    spread = record.y[list(first), 0].std(correction=0) if len(first) else torch.zeros(())
    margin = _BETTER * float(spread)
    violation = violations(record).tolist()
    values = record.y[:, 0].tolist()
    best = min(((violation[i], -values[i]) for i in first), default=(float("inf"), 0.0))
    length, successes, failures = settings.initial_length, 0, 0
    for i in later:
        mine = (violation[i], -values[i])
        same_side = mine[0] == best[0] == 0.0
        success = mine[1] < best[1] - margin if same_side else mine < best
        best = min(best, mine)
        successes, failures = (successes + 1, 0) if success else (0, failures + 1)
        if successes == settings.success_tolerance:
            length, successes = min(2 * length, settings.max_length), 0
        elif failures == tolerance:
            length, failures = length / 2, 0
            if length < settings.min_length:
                break
    return length


def violations(record: Record) -> Tensor:
    """By how much each observed point violates the constraints in all, each in units of its own spread; (n)."""
    limits = record.constraints
    if limits.shape[-1] == 0 or len(limits) == 0:
        return record.y.new_zeros(len(record.y))
    spread = limits.std(0, correction=0)
    return (limits.clamp_min(0.0) / torch.where(spread > 0, spread, torch.ones_like(spread))).sum(-1)


def box(region: Region, posterior: Any, encoding: Encoding) -> Box:
    """The box around the best point of the region, with sides in proportion to the lengthscales of the surrogate."""
    record = region.record
    order = list(zip(violations(record).tolist(), (-record.y[:, 0]).tolist(), strict=True))
    centre = record.z[min(range(len(order)), key=order.__getitem__)]
    numbers = [i for i in range(len(encoding.names)) if i not in encoding.categories]
    scales = lengthscales(posterior)
    half = torch.full_like(centre, 0.5 * region.length)
    if scales is not None and numbers:
        log = scales[[encoding.column(i) for i in numbers]].log()
        half[numbers] = half[numbers] * (log - log.mean()).exp()
    bounds = encoding.bounds.clone()
    for i in numbers:
        bounds[0, i] = max(0.0, float(centre[i] - half[i]))
        bounds[1, i] = min(1.0, float(centre[i] + half[i]))
    grids = {i: _near(values, float(centre[i]), bounds[:, i].tolist()) for i, values in encoding.grids.items()}
    for i, values in grids.items():
        bounds[0, i], bounds[1, i] = values[0], values[-1]
    return Box(bounds, grids)


def lengthscales(posterior: Any) -> Tensor | None:
    """A lengthscale for each input of the surrogate in the units of these, (width); None where it has none.

    Draws of hyper-parameters are averaged on the logarithmic scale; of several outputs the first counts.
    """
    found = getattr(posterior, "hyperparameters", None) or {}
    width = posterior._data.x.shape[-1]
    scales = [
        value.to(torch.float64)
        for name, value in found.items()
        if name.rpartition(".")[2] == "lengthscale" and value.ndim and value.shape[-1] == width
    ]
    if len(scales) != 1:
        return None
    scale = scales[0]
    if posterior._data.has_outputs and scale.ndim > 1:
        scale = scale.select(-2, 0)
    scale = scale.log().reshape(-1, width).mean(0).exp()
    # draws are in the units of the inputs already, point estimates in standardised ones
    return scale if isinstance(posterior, GPMixturePosterior) else scale * posterior._units.x_scale.reshape(-1)[:width]


def _near(values: list[float], centre: float, ends: list[float]) -> list[float]:
    """The values of a grid between the ends, and the next one on either side of the centre in any case."""
    at = min(range(len(values)), key=lambda i: abs(values[i] - centre))
    inside = [i for i, value in enumerate(values) if ends[0] <= value <= ends[1]]
    low, high = min([*inside, at]), max([*inside, at])
    return values[max(0, min(low, at - 1)) : max(high, at + 1) + 1]


def _part(record: Record, noted: dict[int, Note], number: int) -> Record:
    """The record of one region."""

    def kept(found: Sequence[int]) -> list[int]:
        return [i for i, rank in enumerate(found) if noted.get(rank, (0, None))[0] == number]

    rows, failed, pending = kept(record.ranks), kept(record.failed_ranks), kept(record.pending_ranks)
    return record._replace(
        ranks=tuple(record.ranks[i] for i in rows),
        z=record.z[rows],
        y=record.y[rows],
        constraints=record.constraints[rows],
        failed=record.failed[failed],
        pending=record.pending[pending],
        failed_ranks=tuple(record.failed_ranks[i] for i in failed),
        pending_ranks=tuple(record.pending_ranks[i] for i in pending),
        numbers=tuple(record.numbers[i] for i in rows if record.numbers),
    )
