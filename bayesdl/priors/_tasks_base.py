r"""What priors over tasks share: the batch that they return, the law of its inputs, and their checks.

A task is a whole data set. A prior over tasks draws the cause of a data set, its inputs, then its targets:

    t ~ p(t),    x_i ~ p(x),    y_i ~ p(y | x_i, t),        i = 1 .. n
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, ShapeError, fail

InputLaw = Callable[[int, int, int, torch.Generator], Tensor]
Inputs = str | InputLaw

HALF_WIDTH = math.sqrt(3.0)  # a uniform column on [-sqrt 3, sqrt 3] has mean 0 and variance 1
LAWS = ("uniform", "normal", "clustered", "mixed", "unit")
_MOST_CLUSTERS = 5


class Tasks(NamedTuple):
    """A batch of data sets.

    Attributes:
        x: (batch, n, d) inputs, float32.
        y: (batch, n) targets as observed: float32, or class labels as int64.
        noiseless: (batch, n) the function values behind y, or y itself where the prior knows of none.
        latents: What caused each task, by name: hyper-parameters and other choices, each (batch, ...). NaN where a task
            has no such cause, -1 where it is a whole number.
    """

    x: Tensor
    y: Tensor
    noiseless: Tensor
    latents: dict[str, Tensor]


class TaskPrior(Protocol):
    """Anything that can draw data sets: what a prior-data fitted network is trained on.

    A prior that knows more may also have `conditional(latents, x, y, xs, num_noiseless) -> (mean, variance,
    noise_variance)`, the normal law of f at further inputs given the latents and some points of the same task, as
    `FixedGP` has; networks are then trained with less noise by `Schedule(targets="expected")`.
    """

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` data sets of n points with d input columns, on the device of the generator."""


def check_sizes(where: str, batch: int, n: int, d: int, generator: torch.Generator) -> None:
    """Raise SettingError unless batch, n and d are integers of at least 1 and the generator is one."""
    for name, value in (("batch", batch), ("n", n), ("d", d)):
        _checks.at_least(f"{where}.sample", name, value, 1, integer=True)
    if not isinstance(generator, torch.Generator):
        wanted = "generator must be a torch.Generator, on the device where the tasks are wanted."
        fix = "torch.Generator().manual_seed(0)"
        fail(SettingError, f"{where}.sample", wanted, got=_checks.describe(generator), fix=fix)


def check_inputs(where: str, inputs: object) -> None:
    """Raise SettingError unless `inputs` is the name of a law or can be called."""
    if not callable(inputs):
        _checks.choice(where, "inputs", inputs, LAWS)


def draw_inputs(where: str, inputs: Inputs, batch: int, n: int, d: int, generator: torch.Generator) -> Tensor:
    r"""Inputs x (batch n d) of independent tasks, float32 on the device of the generator.

        "uniform"    U[-sqrt 3, sqrt 3]: mean 0 and variance 1
        "normal"     N(0, 1)
        "clustered"  c + s z: 1 to 5 centres a task, s^2 the share of the spread inside a cluster, s ~ U(.05, .5);
                     mean 0 and variance 1 over tasks
        "mixed"      one of the three for each task, equally likely
        "unit"       U[0, 1]

    Or a function (batch, n, d, generator) -> x of the user's.

    Raises:
        ShapeError: A function returned something of another shape.

    Cost: O(batch n d).
    """
    device = generator.device
    shape = (batch, n, d)
    if callable(inputs):
        x = torch.as_tensor(inputs(batch, n, d, generator), dtype=torch.float32, device=device)
        if x.shape != shape:
            wanted = f"inputs must return x of shape {shape}."
            fail(ShapeError, where, wanted, got=str(tuple(x.shape)), fix="return (batch, n, d)")
        return x
    if inputs == "unit":
        return torch.rand(shape, generator=generator, device=device)
    if inputs == "uniform":
        return (2.0 * torch.rand(shape, generator=generator, device=device) - 1.0) * HALF_WIDTH
    if inputs == "normal":
        return torch.randn(shape, generator=generator, device=device)
    if inputs == "clustered":
        return _clustered(batch, n, d, generator)
    law = torch.randint(3, (batch, 1, 1), generator=generator, device=device)
    parts = [draw_inputs(where, name, batch, n, d, generator) for name in ("uniform", "normal", "clustered")]
    return torch.where(law == 0, parts[0], torch.where(law == 1, parts[1], parts[2]))


def _clustered(batch: int, n: int, d: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    centres = torch.randn(batch, _MOST_CLUSTERS, d, generator=generator, device=device)
    count = torch.randint(1, _MOST_CLUSTERS + 1, (batch, 1), generator=generator, device=device)
    which = (torch.rand(batch, n, generator=generator, device=device) * count).long().clamp_max(_MOST_CLUSTERS - 1)
    inside = 0.05 + 0.45 * torch.rand(batch, 1, 1, generator=generator, device=device)
    centre = centres.gather(1, which.unsqueeze(-1).expand(batch, n, d))
    spread = torch.randn(batch, n, d, generator=generator, device=device)
    return (1.0 - inside.square()).sqrt() * centre + inside * spread


def box_width(inputs: Inputs) -> float:
    """How wide the box [0, 1] becomes in the units of x: 1 for "unit", else 2 sqrt 3."""
    return 1.0 if inputs == "unit" else 2.0 * HALF_WIDTH


def per_task(draw: Tensor, missing: Tensor) -> Tensor:
    """`draw` (batch) with axes appended until it broadcasts against `missing` (batch, ...)."""
    return draw.reshape(draw.shape + (1,) * (missing.ndim - draw.ndim))


def merge_latents(parts: Sequence[tuple[Tensor, dict[str, Tensor]]], batch: int) -> dict[str, Tensor]:
    """Latents of groups of tasks laid into one batch: `parts` holds the rows of each group and its latents.

    A name that means tensors of different shapes in different groups is prefixed by the number of the group.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for _, latents in parts:
        for name, value in latents.items():
            shapes.setdefault(name, set()).add((*value.shape[1:], value.is_floating_point()))
    merged: dict[str, Tensor] = {}
    for i, (rows, latents) in enumerate(parts):
        for name, value in latents.items():
            full = name if len(shapes[name]) == 1 else f"{i}.{name}"
            if full not in merged:
                blank = math.nan if value.is_floating_point() else -1
                kind = value.dtype if value.is_floating_point() else torch.int64
                merged[full] = torch.full((batch, *value.shape[1:]), blank, dtype=kind, device=value.device)
            merged[full][rows] = value.to(merged[full].dtype)
    return merged
