"""Checks at the door: what comes in is a finite tensor of the right shape, dtype and device, or an error says so."""

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
    """A float32 or float64 tensor, as by `numbers`; integers become float64."""
    tensor = numbers(where, name, value)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def numbers(where: str, name: str, value: Any) -> Tensor:
    """A tensor from a tensor, a numpy array, a pandas frame or series, or nested lists; integers stay integers.

    Arrays are copied, so that later changes to the caller's data cannot reach a posterior; tensors are not. Missing
    cells of pandas become NaN.

    Raises:
        DtypeError: Text, objects, complex numbers, or floats of another width than 32 and 64 bits.
        ShapeError: Nested lists of unequal lengths.
        DataError: A sparse tensor.
    """
    if isinstance(value, Tensor):
        tensor = value
        if tensor.layout != torch.strided:
            fail(
                DataError,
                where,
                f"{name} must be dense.",
                got=f"{describe(value)} {value.layout}",
                fix=f"{name}.to_dense()",
            )
    else:
        array = _as_array(where, name, value)
        if array.dtype.kind not in "fiub":
            got = f"{array.shape} {array.dtype} array"
            fix = "encode text columns as numbers (pandas.get_dummies) and drop or fill missing cells"
            fail(DtypeError, where, f"{name} must hold numbers.", got=got, fix=fix)
        if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
            got = f"{array.shape} {array.dtype} array"
            fail(DtypeError, where, f"{name} must be float32 or float64.", got=got, fix=f"{name}.astype(numpy.float64)")
        # own memory, in native byte order, with positive strides: torch refuses anything else
        tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))
    if tensor.dtype not in _FLOATS and (tensor.is_floating_point() or tensor.is_complex()):
        fail(
            DtypeError,
            where,
            f"{name} must be float32 or float64.",
            got=describe(tensor),
            fix=f"{name}.to(torch.float64)",
        )
    return tensor


def _as_array(where: str, name: str, value: Any) -> np.ndarray:
    if not hasattr(value, "to_numpy"):
        try:
            return np.asarray(value)
        except ValueError as error:
            wanted = f"{name} must be rectangular."
            fail(ShapeError, where, wanted, got=str(error), fix=f"give every row of {name} the same length")
    array = value.to_numpy()
    kinds = {getattr(dtype, "kind", "O") for dtype in np.atleast_1d(np.asarray(value.dtypes, dtype=object))}
    if array.dtype.kind == "O" and kinds <= set("fiub"):
        return value.to_numpy(dtype=np.float64, na_value=np.nan)  # pandas' nullable numbers
    return array


def finite(where: str, name: str, value: Tensor) -> None:
    """Raise DataError where `value` holds a NaN or an infinity, naming the first place."""
    value = value.detach()
    fine = torch.isfinite(value)
    if not bool(fine.all()):
        bad = ~fine
        place = tuple(int(i) for i in torch.nonzero(bad)[0])
        first = f"{float(value[place])} at {name}{list(place)}"
        got = f"{int(bad.sum())} of {value.numel()} entries are not; the first is {first}"
        fix = f"drop or impute those rows, for instance with torch.isfinite({name})"
        fail(DataError, where, f"{name} must be finite.", got=got, fix=fix)


def alike(where: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise DtypeError or DeviceError unless `value` has the dtype and the device of `other`."""
    got = f"{other_name} {describe(other)}, {name} {describe(value)}"
    if value.dtype != other.dtype:
        fail(
            DtypeError,
            where,
            f"{name} must have the dtype of {other_name}.",
            got=got,
            fix=f"{name}.to({other_name}.dtype)",
        )
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
        fail(
            ShapeError, where, f"{name} must have {columns}.", got=describe(x), fix="pass the features used in training"
        )


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
        fail(
            SettingError,
            where,
            f"{name} must be {noun} of at least {least}.",
            got=repr(value),
            fix=f"pass {least} or more",
        )


def inside(where: str, name: str, value: Any, low: float, high: float) -> None:
    """Raise SettingError unless low < value < high; `high` may be infinite."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not low < value < high:
        bounded = np.isfinite(high)
        wanted = (
            f"{name} must lie between {low} and {high}." if bounded else f"{name} must be a finite number above {low}."
        )
        example = (low + high) / 2 if bounded else low + 1
        fail(SettingError, where, wanted, got=repr(value), fix=f"pass {example}, say")
