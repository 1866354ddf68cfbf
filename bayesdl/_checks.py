"""Checks at the door: what comes in is a finite tensor of the right shape, dtype and device, or an error that says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import DataError, DeviceError, DtypeError, SettingError, ShapeError, fail

_FLOATS = (torch.float32, torch.float64)


def describe(value: Any) -> str:
    """A value in the words of an error message: shape, dtype and device of an array, else its repr."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device}"
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype} array"
    return repr(value)


def as_tensor(where: str, name: str, value: Any) -> Tensor:
    """A tensor from a tensor, a numpy array, a pandas frame or series, or nested lists; integers become float64.

    Arrays are copied, so that later changes to the caller's data cannot reach a posterior. Raises DtypeError for text,
    objects, complex and half precision.
    """
    if isinstance(value, Tensor):
        tensor = value
    else:
        array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
        if array.dtype.kind not in "fiub":
            fail(
                DtypeError,
                where,
                f"{name} must hold numbers.",
                got=f"{array.shape} {array.dtype} array",
                fix="encode text columns as numbers (pandas.get_dummies) and drop or fill missing cells",
            )
        tensor = torch.tensor(array)
    if not tensor.is_floating_point() and not tensor.is_complex():
        tensor = tensor.to(torch.float64)
    if tensor.dtype not in _FLOATS:
        fail(DtypeError, where, f"{name} must be float32 or float64.", got=describe(tensor), fix=f"{name}.to(torch.float64)")
    return tensor


def finite(where: str, name: str, value: Tensor) -> None:
    """Raise DataError where `value` holds a NaN or an infinity, naming the first place."""
    bad = ~torch.isfinite(value.detach())
    if bool(bad.any()):
        place = tuple(int(i) for i in torch.nonzero(bad)[0])
        fail(
            DataError,
            where,
            f"{name} must be finite.",
            got=f"{int(bad.sum())} of {value.numel()} entries are not; the first is {float(value[place])} at {name}{list(place)}",
            fix=f"drop or impute those rows, for instance with torch.isfinite({name})",
        )


def alike(where: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise DtypeError or DeviceError unless `value` has the dtype and the device of `other`."""
    got = f"{other_name} {describe(other)}, {name} {describe(value)}"
    if value.dtype != other.dtype:
        fail(DtypeError, where, f"{name} must have the dtype of {other_name}.", got=got, fix=f"{name}.to({other_name}.dtype)")
    if value.device != other.device:
        wanted = f"{name} must lie on the device of {other_name}."
        fail(DeviceError, where, wanted, got=got, fix=f"{name}.to({other_name}.device)")


def inputs(where: str, name: str, x: Tensor, d: int | None = None) -> None:
    """Raise ShapeError unless x has shape (..., n, d) with d >= 1, or the `d` that is asked for."""
    if x.ndim < 2:
        wanted = f"{name} must have shape (..., n, {'d' if d is None else d})."
        fix = f"{name}[:, None] for n points of one feature, {name}[None, :] for one point"
        fail(ShapeError, where, wanted, got=describe(x), fix=fix)
    if x.shape[-1] == 0 or (d is not None and x.shape[-1] != d):
        columns = "at least one column" if d is None else f"{d} columns, as in training"
        fail(ShapeError, where, f"{name} must have {columns}.", got=describe(x), fix="pass the features used in training")


def choice(where: str, name: str, value: Any, options: tuple[Any, ...]) -> None:
    """Raise SettingError unless `value` is one of `options`."""
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        fail(SettingError, where, f"{name} must be one of {listed}.", got=repr(value), fix=f"pass {options[0]!r}")


def at_least(where: str, name: str, value: Any, least: float, *, integer: bool = False) -> None:
    """Raise SettingError unless `value` is a finite number (an int where asked) of at least `least`."""
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not np.isfinite(value) or value < least:
        noun = "an integer" if integer else "a finite number"
        fail(SettingError, where, f"{name} must be {noun} of at least {least}.", got=repr(value), fix=f"pass {least} or more")


def inside(where: str, name: str, value: Any, low: float, high: float) -> None:
    """Raise SettingError unless low < value < high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        middle = (low + high) / 2
        fail(SettingError, where, f"{name} must lie between {low} and {high}.", got=repr(value), fix=f"pass {middle}, say")
