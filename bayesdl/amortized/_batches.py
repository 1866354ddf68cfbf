"""What one step of training sees: tasks from the prior, split into context and queries.

Every step has random streams of its own, made from the seed, the number of the step and the process. So a run that was
stopped goes on with the numbers that it would have had, and there is no state of a generator to keep.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl import _random
from bayesdl.amortized.network import Architecture
from bayesdl.amortized.schedule import Schedule
from bayesdl.errors import SettingError, ShapeError, fail

_STRATA = 8  # targets of a query, for targets="expected"


class Batch(NamedTuple):
    """One batch: context x (B n d), y (B n), the last `num_appended` of them appended; queries xs, targets (B q).

    Targets are (B q t) where each query has several, which count alike."""

    x: Tensor
    y: Tensor
    xs: Tensor
    targets: Tensor
    conditions: Tensor | None
    num_appended: int
    noiseless: bool


def draw(
    prior: Any, architecture: Architecture, schedule: Schedule, seed: int, step: int, part: int, rank: int,
    device: torch.device,
) -> Batch:  # fmt: skip
    """The batch of one step (and of its `part`, where gradients are accumulated) on one process.

    Sizes are the same on all processes, tasks are not.
    """
    sizes = np.random.default_rng(np.random.SeedSequence((seed, 0, step, part)))
    source = _random.generator(_mixed(seed, 1, step, part, rank), device)
    d = int(sizes.integers(*_dims(architecture, schedule), endpoint=True))
    n = _context_size(schedule, sizes)
    rows = schedule.rows or n + schedule.num_queries
    batch = schedule.batch
    if schedule.even_work:
        batch = min(8 * batch, batch * (schedule.n_max + schedule.num_queries) // (n + schedule.num_queries))
    tasks = prior.sample(batch, rows, d, source)
    _check_tasks(tasks, batch, rows, d)
    asked = slice(n, None)
    if schedule.rows is not None and rows - n > schedule.num_queries:
        asked = n + torch.randperm(rows - n, generator=source, device=device)[: schedule.num_queries]
    y, targets, conditions = tasks.y[:, :n], tasks.y[:, asked], None
    regression, pure = architecture.head != "classes", None
    if architecture.num_conditions:
        conditions = _conditions(architecture, tasks.latents, y)
        if regression:
            pure = torch.rand(batch, generator=source, device=device) < schedule.noiseless_share
            conditions[:, 0] = pure.to(conditions)
            targets = torch.where(pure[:, None], tasks.noiseless[:, asked], targets)
    # all of these are drawn whether they are needed or not, so that switching one on leaves the others as they are
    appended, share, noiseless = sizes.random() < schedule.appended_share, sizes.random(), sizes.random() < 0.5
    num_appended = min(n, 1 + int(share * n)) if appended else 0
    noiseless = bool(noiseless and num_appended and regression)
    if noiseless:
        y = torch.cat([y[:, : n - num_appended], tasks.noiseless[:, n - num_appended : n]], 1)
    if schedule.targets == "expected":
        told = (tasks.latents, tasks.x[:, :n], y, tasks.x[:, asked], num_appended if noiseless else 0)
        mean, variance, noise = prior.conditional(*told)
        noise = noise if pure is None else noise.masked_fill(pure, 0.0)
        variance = variance + noise.unsqueeze(-1)
        targets = _stratified(mean, variance.sqrt(), source)
    return Batch(tasks.x[:, :n], y, tasks.x[:, asked], targets, conditions, num_appended, noiseless)


def _stratified(mean: Tensor, scale: Tensor, source: torch.Generator) -> Tensor:
    """One normal draw (*b, t) from each of t slices of equal probability."""
    u = torch.rand(*mean.shape, _STRATA, generator=source, dtype=torch.float64, device=mean.device)
    level = (torch.arange(_STRATA, device=mean.device) + u) / _STRATA
    return (mean.unsqueeze(-1) + scale.unsqueeze(-1) * torch.special.ndtri(level.clamp(1e-9, 1 - 1e-9))).float()


def probe(prior: Any, architecture: Architecture, schedule: Schedule, seed: int, num_values: int) -> tuple[Any, ...]:
    """Targets (about `num_values` of them) and the range of x, from tasks of all numbers of columns, on the CPU."""
    low, high = _dims(architecture, schedule)
    dims = sorted({low, (low + high) // 2, high})
    rows = schedule.rows or 20
    values, x_low, x_high = [], math.inf, -math.inf
    each = math.ceil(num_values / (rows * len(dims)))
    for i, d in enumerate(dims):
        source = _random.generator(_mixed(seed, 2, i, 0, 0))
        for batch in [256] * (each // 256) + [each % 256]:
            if batch:
                tasks = prior.sample(batch, rows, d, source)
                _check_tasks(tasks, batch, rows, d)
                values.append(tasks.y.reshape(-1))
                x_low, x_high = min(x_low, float(tasks.x.min())), max(x_high, float(tasks.x.max()))
    return torch.cat(values), (x_low, x_high)


def describe(prior: Any) -> str:
    """A prior in words: what it prints as, without places in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(prior))


def _dims(architecture: Architecture, schedule: Schedule) -> tuple[int, int]:
    low, high = schedule.d or (1, architecture.max_inputs)
    if high > architecture.max_inputs:
        got = f"d={schedule.d}, max_inputs={architecture.max_inputs}"
        fail(SettingError, "pretrain", "d must not exceed max_inputs.", got=got, fix=f"max_inputs={high}")
    return low, high


def _context_size(schedule: Schedule, sizes: np.random.Generator) -> int:
    if schedule.context == "uniform":
        return int(sizes.integers(schedule.n_min, schedule.n_max, endpoint=True))
    # n + 1 is the floor of a log-uniform number: P(n) = log((n + 2) / (n + 1)), up to a constant
    level = sizes.uniform(math.log(schedule.n_min + 1), math.log(schedule.n_max + 2))
    return min(schedule.n_max, int(math.exp(level)) - 1)


def _conditions(architecture: Architecture, latents: Any, like: Tensor) -> Tensor:
    """Zeros for the first one; the further ones are the prior's latents of that name."""
    first = torch.zeros(len(like), 1, device=like.device)
    if architecture.num_conditions == 1:
        return first
    described = latents.get("conditions")
    shape = (len(like), architecture.num_conditions - 1)
    if described is None or tuple(described.shape) != shape:
        wanted = f'the prior must give latents["conditions"] of shape {shape}.'
        got = "none" if described is None else str(tuple(described.shape))
        fail(ShapeError, "pretrain", wanted, got=got, fix="num_conditions=1, or a prior that gives them")
    return torch.cat([first, described.to(first)], 1)


def _check_tasks(tasks: Any, batch: int, rows: int, d: int) -> None:
    shapes = [tuple(getattr(tasks, name).shape) for name in ("x", "y", "noiseless")]
    if shapes != [(batch, rows, d), (batch, rows), (batch, rows)]:
        wanted = f"the prior's x, y and noiseless must have shapes {(batch, rows, d)}, {(batch, rows)} twice."
        fix = "sample(batch, n, d, generator) returns Tasks(x, y, noiseless, latents)"
        fail(ShapeError, "pretrain", wanted, got=str(shapes), fix=fix)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
