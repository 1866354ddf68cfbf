r"""Data in, units out: coercion of what the user passes, and standardisation, in this one file.

Inside, a model sees u = (x - x_loc) / x_scale and v = (y - y_loc) / y_scale; outside, all is in the user's units.
Locations and scales are the training data's mean and standard deviation (divisor n), computed in float64, so that
inputs at an offset of 1e6 or targets at a scale of 1e-6 lose nothing. A constant column has scale 1. A constant target
y = c has scale |c|, or 1 at c = 0, since nothing else says what size its changes might have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import DataError, ShapeError, fail


class Units(NamedTuple):
    """Locations and scales of inputs and targets, float64: x_* have shape (*b, 1, d), y_* (*b, 1, k)."""

    x_loc: Tensor
    x_scale: Tensor
    y_loc: Tensor
    y_scale: Tensor

    def inward_x(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Standardised inputs in `dtype`; the difference is taken in float64."""
        return ((x.to(torch.float64) - self.x_loc) / self.x_scale).to(dtype)

    def inward_y(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Standardised targets (*b, n, k) in `dtype`."""
        return ((y.to(torch.float64) - self.y_loc) / self.y_scale).to(dtype)

    def outward(self, v: Tensor) -> Tensor:
        """Locations (*b, s, k) in the user's units, float64."""
        return v.to(torch.float64) * self.y_scale + self.y_loc

    def outward_scale(self, scale: Tensor) -> Tensor:
        """Standard deviations (*b, s, k) in the user's units, float64."""
        return scale.to(torch.float64) * self.y_scale


class TrainingData(NamedTuple):
    """What an engine fits to, in the user's units: x (*b, n, d), y (*b, n, k), whether y came with an output axis."""

    x: Tensor
    y: Tensor
    has_outputs: bool

    @property
    def batch_shape(self) -> torch.Size:
        """Leading batch axes, shared by x and y."""
        return self.x.shape[:-2]


def training_data(where: str, x: Any, y: Any) -> TrainingData:
    """Check and coerce a training set: x (*b, n, d), y (*b, n) or (*b, n, k), from torch, numpy or pandas.

    Integers follow the floats that come with them, and arrays the torch tensors; numpy arrays of two float widths meet
    at the wider one; two torch tensors of different float widths or devices are an error. x and y are copied.

    Raises:
        ShapeError: x is not (*b, n, d), or y does not match it, or n is 0.
        DataError: a NaN or an infinity, named by its place.
        DtypeError, DeviceError: mixed dtypes or devices.
    """
    x, y = _meet(x, _checks.numbers(where, "x", x), y, _checks.numbers(where, "y", y))
    _checks.inputs(where, "x", x)
    _checks.alike(where, "y", y, "x", x)
    has_outputs = y.ndim == x.ndim
    head = x.shape[:-1]
    if (y.shape[:-1] if has_outputs else y.shape) != head or (has_outputs and y.shape[-1] == 0):
        wanted = f"y must have shape {tuple(head)}, or ({', '.join(map(str, head))}, k) for k outputs."
        got = f"x {_checks.describe(x)}, y {_checks.describe(y)}"
        fail(ShapeError, where, wanted, got=got, fix="pass one target for each row of x")
    if head.numel() == 0:
        fail(
            ShapeError,
            where,
            "at least one data point is needed.",
            got=f"x {_checks.describe(x)}",
            fix="pass n >= 1 rows",
        )
    _checks.finite(where, "x", x)
    _checks.finite(where, "y", y)
    # a copy, so that changing the caller's tensors in place does not reach a posterior
    return TrainingData(x.detach().clone(), (y if has_outputs else y.unsqueeze(-1)).detach().clone(), has_outputs)


def _meet(x_given: Any, x: Tensor, y_given: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y in one float dtype and on one device, except where both are torch tensors that disagree."""
    own = [isinstance(given, Tensor) for given in (x_given, y_given)]
    floats = [v.dtype for v in (x, y) if v.is_floating_point()]
    fixed = [v.dtype for v, tensor in zip((x, y), own, strict=True) if tensor and v.is_floating_point()]
    wider = torch.promote_types(floats[0], floats[-1]) if floats else torch.float64
    dtype = fixed[0] if fixed else wider
    devices = [v.device for v, tensor in zip((x, y), own, strict=True) if tensor]
    results = []
    for v, tensor in zip((x, y), own, strict=True):
        device = v.device if tensor or not devices else devices[0]
        results.append(v if tensor and v.is_floating_point() else v.to(dtype=dtype, device=device))
    return results[0], results[1]


def new_inputs(where: str, x: Any, like: Tensor) -> Tensor:
    """Check and coerce inputs (..., s, d) for a posterior trained on `like` (*b, n, d); gradients in x are kept.

    Arrays follow the dtype and device of `like`, integer tensors its dtype; a torch tensor of another float dtype or
    device is an error.
    """
    given, x = x, _checks.numbers(where, "x", x)
    if not isinstance(given, Tensor):
        x = x.to(dtype=like.dtype, device=like.device)
    elif not x.is_floating_point():
        x = x.to(like.dtype)
    _checks.inputs(where, "x", x, d=like.shape[-1])
    _checks.alike(where, "x", x, "the training x", like)
    batch, lead = like.shape[:-2], x.shape[:-2]
    if any(a != b and 1 not in (a, b) for a, b in zip(reversed(lead), reversed(batch), strict=False)):
        wanted = f"the batch axes of x must broadcast with {tuple(batch)}, those of the training data."
        fail(
            ShapeError,
            where,
            wanted,
            got=_checks.describe(x),
            fix="x (s, d), or one set of test points for each batch element",
        )
    _checks.finite(where, "x", x)
    return x


def class_labels(where: str, y: Tensor, num_classes: int) -> None:
    """Raise DataError unless every target is an integer in 0..num_classes-1."""
    bad = (y != y.round()) | (y < 0) | (y >= num_classes)
    if bool(bad.any()):
        place = tuple(int(i) for i in torch.nonzero(bad)[0])
        wanted = f"class labels must be integers from 0 to {num_classes - 1}."
        fix = "sklearn.preprocessing.LabelEncoder().fit_transform(y)"
        fail(DataError, where, wanted, got=f"{float(y[place])} at row {place[-2]}", fix=fix)


def units_of(data: TrainingData, *, standardize: bool, targets: bool = True, labels: tuple[int, ...] = ()) -> Units:
    """The units of a training set; `targets=False` leaves y as it is (class labels), `labels` some columns of x."""
    x, y = data.x.to(torch.float64), data.y.to(torch.float64)
    zeros, ones = torch.zeros_like, torch.ones_like
    x_loc, y_loc = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
    if not standardize:
        return Units(zeros(x_loc), ones(x_loc), zeros(y_loc), ones(y_loc))
    x_scale, x_constant = _spread(x, x_loc, data.x.dtype)
    x_scale = torch.where(x_constant, ones(x_scale), x_scale)
    if labels:
        x_loc[..., list(labels)], x_scale[..., list(labels)] = 0.0, 1.0
    if not targets:
        return Units(x_loc, x_scale, zeros(y_loc), ones(y_loc))
    y_scale, y_constant = _spread(y, y_loc, data.y.dtype)
    magnitude = torch.where(y_loc == 0, ones(y_loc), y_loc.abs())
    return Units(x_loc, x_scale, y_loc, torch.where(y_constant, magnitude, y_scale))


def _spread(value: Tensor, loc: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Standard deviation over the points, and where it is nothing but the rounding of `dtype`."""
    largest = value.abs().amax(-2, keepdim=True)
    # scaled by the largest deviation first, so that targets of 1e-200 or 1e200 neither vanish nor overflow when squared
    deviation = value - loc
    top = deviation.abs().amax(-2, keepdim=True)
    safe = torch.where(top > 0, top, torch.ones_like(top))
    spread = (deviation / safe).square().mean(-2, keepdim=True).sqrt() * safe
    return spread, top <= 4 * torch.finfo(dtype).eps * largest
