"""The checks at the door: what passes, and the words of what does not."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesdl import _checks
from bayesdl.errors import BayesdlError, DataError, DeviceError, DtypeError, SettingError, ShapeError, fail

VALUES = [[1.0, 2.0], [3.0, 4.5], [-6.0, 0.25]]


@pytest.mark.parametrize(
    "value",
    [
        VALUES,
        tuple(map(tuple, VALUES)),
        np.array(VALUES),
        np.array(VALUES, dtype=">f8"),
        np.array(VALUES, order="F"),
        np.array(VALUES)[::-1][::-1],
        np.array(VALUES[::-1])[::-1],
        pd.DataFrame(VALUES, columns=["a", "b"], index=[7, 1, 3]),
        pd.DataFrame(VALUES).astype("Float64"),
        torch.tensor(VALUES, dtype=torch.float64),
    ],
    ids=[
        "lists",
        "tuples",
        "array",
        "big endian",
        "fortran",
        "view",
        "negative strides",
        "frame",
        "nullable",
        "tensor",
    ],
)
def test_everything_that_holds_these_numbers_becomes_the_same_tensor(value):
    tensor = _checks.as_tensor("f", "x", value)
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == VALUES


@pytest.mark.parametrize("dtype", ["i1", "i4", "i8", "u1", "u2", "u4", "u8", "?"])
def test_integers_and_booleans_become_float64(dtype):
    array = np.array([0, 1, 1], dtype=dtype)
    assert _checks.as_tensor("f", "y", array).dtype == torch.float64
    assert _checks.as_tensor("f", "y", array).tolist() == [0.0, 1.0, 1.0]
    assert _checks.as_tensor("f", "y", pd.Series([0, 1, 1], dtype="Int64")).tolist() == [0.0, 1.0, 1.0]
    assert not _checks.numbers("f", "y", array).is_floating_point()


def test_float32_stays_float32_and_the_array_is_copied():
    array = np.array(VALUES, dtype=np.float32)
    tensor = _checks.as_tensor("f", "x", array)
    array[:] = 7.0
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == VALUES


def test_a_read_only_array_passes_without_a_warning():
    array = np.array(VALUES)
    array.setflags(write=False)
    assert _checks.as_tensor("f", "x", array).tolist() == VALUES


@pytest.mark.parametrize(
    ("value", "kind", "got", "fix"),
    [
        (np.array([["a", "b"]]), DtypeError, "(1, 2) <U1 array", "get_dummies"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": ["u", "v"]}), DtypeError, "(2, 2) object array", "get_dummies"),
        (np.array([1.0, None]), DtypeError, "(2,) object array", "drop or fill"),
        (np.array([1 + 2j]), DtypeError, "(1,) complex128 array", "get_dummies"),
        (np.ones(3, dtype=np.float16), DtypeError, "(3,) float16 array", "x.astype(numpy.float64)"),
        (np.ones(3, dtype=np.longdouble), DtypeError, "(3,) float128 array", "x.astype(numpy.float64)"),
        (torch.ones(3, dtype=torch.bfloat16), DtypeError, "(3,) bfloat16 cpu", "x.to(torch.float64)"),
        (torch.ones(3, dtype=torch.complex128), DtypeError, "(3,) complex128 cpu", "x.to(torch.float64)"),
        (torch.eye(2).to_sparse(), DataError, "(2, 2) float32 cpu torch.sparse_coo", "x.to_dense()"),
        ([[1.0, 2.0], [3.0]], ShapeError, "inhomogeneous", "same length"),
        (None, DtypeError, "() object array", "drop or fill"),
    ],
)
def test_what_holds_no_usable_numbers_is_refused_in_the_house_form(value, kind, got, fix):
    if got.endswith("float128 array") and np.longdouble(0).dtype.itemsize == 8:
        pytest.skip("long double is a double here")
    with pytest.raises(kind) as caught:
        _checks.as_tensor("Engine.fit", "x", value)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("Engine.fit: x must ")
    assert lines[1].startswith("  got  ")
    assert got in lines[1]
    assert lines[2].startswith("  fix  ")
    assert fix in lines[2]


def test_a_missing_cell_of_a_nullable_column_is_a_nan_with_its_place():
    tensor = _checks.as_tensor("f", "y", pd.Series([1, None, 3], dtype="Int64"))
    with pytest.raises(DataError) as caught:
        _checks.finite("f", "y", tensor)
    assert "1 of 3 entries are not; the first is nan at y[1]" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_entry_that_is_not_finite_is_named(bad):
    x = torch.ones(2, 3, 2, requires_grad=True)
    hole = torch.zeros(2, 3, 2)
    hole[1, 0, 1] = hole[1, 2, 0] = bad
    with pytest.raises(DataError) as caught:
        _checks.finite("f", "x", x + hole)
    assert f"2 of 12 entries are not; the first is {bad} at x[1, 0, 1]" in str(caught.value)
    _checks.finite("f", "x", x)


def test_two_tensors_must_agree_in_dtype_and_device():
    one = torch.ones(2, 3)
    _checks.alike("f", "y", one, "x", one + 1)
    with pytest.raises(DtypeError) as caught:
        _checks.alike("f", "y", one.double(), "x", one)
    assert "got  x (2, 3) float32 cpu, y (2, 3) float64 cpu" in str(caught.value)
    assert "fix  y.to(x.dtype)" in str(caught.value)
    with pytest.raises(DeviceError) as caught:
        _checks.alike("f", "y", one.to("meta"), "x", one)
    assert "got  x (2, 3) float32 cpu, y (2, 3) float32 meta" in str(caught.value)
    assert "fix  y.to(x.device)" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "d", "wanted"),
    [
        ((), None, "x must have shape (..., n, d)."),
        ((4,), None, "x must have shape (..., n, d)."),
        ((4,), 3, "x must have shape (..., n, 3)."),
        ((4, 0), None, "x must have at least one column."),
        ((5, 4, 2), 3, "x must have 3 columns, as in training."),
        ((4, 0), 3, "x must have 3 columns, as in training."),
    ],
)
def test_inputs_need_two_axes_and_the_right_columns(shape, d, wanted):
    with pytest.raises(ShapeError) as caught:
        _checks.inputs("f", "x", torch.ones(shape), d)
    assert str(caught.value).startswith(f"f: {wanted}\n  got  {shape} float32 cpu\n  fix  ")


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (2, 5, 3)])
def test_inputs_of_a_right_shape_pass(shape):
    _checks.inputs("f", "x", torch.ones(shape))
    _checks.inputs("f", "x", torch.ones(shape), shape[-1])


NOT_NUMBERS = [None, "1", True, math.nan, math.inf, [1]]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.999, -3])
def test_at_least_refuses(value):
    with pytest.raises(SettingError, match="size must be a finite number of at least 1"):
        _checks.at_least("f", "size", value, 1)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 2.0, 0, np.float64(3)])
def test_at_least_refuses_what_is_not_an_integer_where_one_is_asked(value):
    with pytest.raises(SettingError, match="size must be an integer of at least 1"):
        _checks.at_least("f", "size", value, 1, integer=True)


@given(st.floats(1, 1e300) | st.integers(1, 10**6))
def test_at_least_lets_every_number_from_its_bound_on_pass(value):
    _checks.at_least("f", "size", value, 1)
    _checks.at_least("f", "size", np.float64(value), 1)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, 1.0, -0.5, 2])
def test_inside_excludes_its_ends(value):
    with pytest.raises(SettingError, match=r"rate must lie between 0.0 and 1.0.*\n.*\n  fix  pass 0.5, say"):
        _checks.inside("f", "rate", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 2.0, -math.inf])
def test_inside_an_unbounded_range_suggests_a_number_that_would_pass(value):
    with pytest.raises(SettingError, match=r"must be a finite number above 2.0") as caught:
        _checks.inside("f", "dof", value, 2.0, math.inf)
    _checks.inside("f", "dof", float(str(caught.value).split("pass ")[1].split(",")[0]), 2.0, math.inf)


@pytest.mark.parametrize("value", [0.5, np.float32(0.25), 1e-300])
def test_inside_lets_numbers_between_pass(value):
    _checks.inside("f", "rate", value, 0.0, 1.0)


def test_a_choice_lists_its_options():
    _checks.choice("f", "mean", "zero", ("constant", "zero"))
    with pytest.raises(SettingError) as caught:
        _checks.choice("BNN", "mean", "Zero", ("constant", "zero"))
    assert str(caught.value) == "BNN: mean must be one of 'constant', 'zero'.\n  got  'Zero'\n  fix  pass 'constant'"


def refuse_while_handling(kind):
    try:
        raise KeyError("inner")
    except KeyError:
        fail(kind, "here", "this was wanted.", got="that", fix="so")


def test_errors_keep_their_built_in_kind_and_hide_what_led_to_them():
    for kind, built_in in ((ShapeError, ValueError), (DataError, ValueError), (DtypeError, TypeError)):
        with pytest.raises(built_in) as caught:
            refuse_while_handling(kind)
        assert isinstance(caught.value, BayesdlError)
        assert caught.value.__suppress_context__
        assert str(caught.value) == "here: this was wanted.\n  got  that\n  fix  so"
