"""Data in, units out: coercion, refusal, standardisation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayesdl.data import TrainingData, class_labels, new_inputs, training_data, units_of
from bayesdl.errors import DataError, DeviceError, DtypeError, ShapeError

F32, F64 = torch.float32, torch.float64


def arrays(n=6, d=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=n)


X, Y = arrays()
FLOAT32 = X.astype(np.float32), Y.astype(np.float32)
LABELS = np.array([0, 1, 1, 0, 2, 1])


@pytest.mark.parametrize(
    ("x", "y", "dtype"),
    [
        (X, Y, F64),
        (FLOAT32[0], FLOAT32[1], F32),
        (FLOAT32[0], Y, F64),
        (X, FLOAT32[1], F64),
        (FLOAT32[0], LABELS, F32),
        (FLOAT32[0], LABELS > 0, F32),
        (LABELS[:, None], FLOAT32[1], F32),
        (LABELS[:, None], LABELS, F64),
        (torch.tensor(FLOAT32[0]), torch.tensor(FLOAT32[1]), F32),
        (torch.tensor(FLOAT32[0]), Y, F32),
        (torch.tensor(X), FLOAT32[1], F64),
        (X, torch.tensor(FLOAT32[1]), F32),
        (torch.tensor(FLOAT32[0]), torch.tensor(LABELS), F32),
        (torch.tensor(LABELS)[:, None], torch.tensor(FLOAT32[1]), F32),
        (torch.tensor(LABELS)[:, None], FLOAT32[1], F32),
        (pd.DataFrame(X, columns=["a", "b"]), pd.Series(LABELS, index=range(10, 16)), F64),
        (pd.DataFrame({"a": X[:, 0].astype(np.float32), "b": LABELS}), Y, F64),
        (X.tolist(), Y.tolist(), F64),
    ],
)
def test_dtypes_meet(x, y, dtype):
    """Integers follow floats, arrays follow tensors, and two arrays meet at the wider float."""
    data = training_data("Engine.fit", x, y)
    assert data.x.dtype == data.y.dtype == dtype
    np.testing.assert_allclose(data.x, np.asarray(x, dtype=float), rtol=1e-6)
    np.testing.assert_allclose(data.y.squeeze(-1), np.asarray(y, dtype=float), rtol=1e-6)
    assert not data.has_outputs
    assert data.y.shape == (6, 1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("k", [None, 1, 2])
def test_shapes_and_the_output_axis(batch, k):
    data = training_data("f", torch.ones(*batch, 5, 2), torch.ones(*batch, 5, *([] if k is None else [k])))
    assert data.x.shape == (*batch, 5, 2)
    assert data.y.shape == (*batch, 5, k or 1)
    assert data.has_outputs == (k is not None)
    assert data.batch_shape == batch


def test_later_changes_to_the_callers_data_do_not_reach_a_training_set():
    for convert in (np.array, torch.tensor):
        x, y = convert(X), convert(Y)
        data = training_data("f", x, y)
        x[:], y[:] = 7.0, 7.0
        np.testing.assert_array_equal(data.x, X)
        np.testing.assert_array_equal(data.y.squeeze(-1), Y)


def test_a_training_set_carries_no_gradient():
    data = training_data("f", torch.tensor(X, requires_grad=True), torch.tensor(Y, requires_grad=True))
    assert not data.x.requires_grad
    assert not data.y.requires_grad


def test_read_only_and_strided_arrays_pass():
    x, y = X.copy(), Y.copy()
    x.setflags(write=False)
    y.setflags(write=False)
    np.testing.assert_array_equal(training_data("f", x, y).x, X)
    np.testing.assert_array_equal(training_data("f", x[::-1], y[::-1]).y.squeeze(-1), Y[::-1])
    np.testing.assert_array_equal(training_data("f", x[::2, ::-1], y[::2]).x, X[::2, ::-1])


def message(caught):
    """The three parts of an error in the house form."""
    where, got, fix = str(caught.value).split("\n")
    assert got.startswith("  got  ")
    assert fix.startswith("  fix  ")
    return where, got[7:], fix[7:]


XT, YT = torch.tensor(X), torch.tensor(Y)
HOLE, PEAK = X.copy(), Y.copy()
HOLE[3, 1], PEAK[4] = np.nan, np.inf
WRONG = {
    "float widths": (XT, YT.float(), DtypeError, "dtype of x", "float64 cpu, y (6,) float32 cpu", "y.to(x.dtype)"),
    "devices": (XT, YT.to("meta"), DeviceError, "device of x", "y (6,) float64 meta", "y.to(x.device)"),
    "labels elsewhere": (XT, YT.long().to("meta"), DeviceError, "device of x", "float64 meta", "y.to(x.device)"),
    "one axis": (XT[:, 0], YT, ShapeError, "(..., n, d)", "(6,) float64 cpu", "x[:, None]"),
    "no columns": (XT[:, :0], YT, ShapeError, "at least one column", "(6, 0) float64 cpu", "features"),
    "other length": (XT, YT[:4], ShapeError, "(6,), or (6, k) for k", "y (4,) float64 cpu", "one target"),
    "transposed": (XT, YT[None], ShapeError, "shape (6,)", "y (1, 6) float64 cpu", "one target"),
    "no outputs": (XT, torch.ones(6, 0).double(), ShapeError, "shape (6,)", "y (6, 0) float64 cpu", "one target"),
    "a scalar": (XT, 3.0, ShapeError, "shape (6,)", "y () float64 cpu", "one target"),
    "other batch": (torch.ones(3, 6, 2), torch.ones(2, 6), ShapeError, "(3, 6), or", "y (2, 6)", "one target"),
    "no points": (XT[:0], YT[:0], ShapeError, "at least one data point", "x (0, 2) float64 cpu", "n >= 1"),
    "an empty batch": (torch.ones(0, 6, 2), torch.ones(0, 6), ShapeError, "one data point", "x (0, 6, 2)", "n >= 1"),
    "NaN": (HOLE, Y, DataError, "x must be finite", "1 of 12 entries are not; the first is nan at x[3, 1]", "(x)"),
    "infinity": (X, PEAK, DataError, "y must be finite", "1 of 6 entries are not; the first is inf at y[4]", "(y)"),
    "text": (np.array([["1", "b"]] * 6), Y, DtypeError, "x must hold numbers", "(6, 2) <U1 array", "get_dummies"),
    "half": (XT.half(), YT, DtypeError, "float32 or float64", "(6, 2) float16 cpu", "x.to(torch.float64)"),
    "ragged": ([[1.0], [2.0, 3.0]], [1.0, 2.0], ShapeError, "rectangular", "inhomogeneous", "same length"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_fitted_is_refused_with_what_came_and_how_to_mend_it(name):
    x, y, kind, wanted, came, remedy = WRONG[name]
    with pytest.raises(kind) as caught:
        training_data("Engine.fit", x, y)
    where, got, fix = message(caught)
    assert where.startswith("Engine.fit: ")
    assert wanted in where
    assert came in got
    assert remedy in fix


def test_new_inputs_follow_the_training_inputs_and_keep_their_gradient():
    like = torch.ones(4, 2)
    for x in (
        X,
        X.astype(np.float32),
        pd.DataFrame(X),
        X.round().astype(int),
        torch.tensor(X.round()).long(),
        X.tolist(),
    ):
        given_x = new_inputs("p", x, like)
        assert given_x.dtype == F32
        np.testing.assert_allclose(given_x, np.asarray(x), rtol=1e-6)
    x = torch.ones(3, 2, requires_grad=True)
    assert new_inputs("p", x, like) is x
    assert new_inputs("p", torch.ones(0, 2), like).shape == (0, 2)


@pytest.mark.parametrize(
    ("x", "kind", "wanted"),
    [
        (torch.ones(3, 2).double(), DtypeError, "x must have the dtype of the training x"),
        (torch.ones(3, 2, device="meta"), DeviceError, "x must lie on the device of the training x"),
        (torch.ones(3, 2, device="meta").long(), DeviceError, "x must lie on the device of the training x"),
        (torch.ones(3, 1), ShapeError, "x must have 2 columns, as in training"),
        (torch.ones(2), ShapeError, "shape (..., n, 2)"),
        (torch.ones(2, 3, 2), ShapeError, "must broadcast with (3,)"),
        (torch.full((3, 2), math.nan), DataError, "x must be finite"),
        (torch.full((3, 2), math.inf, requires_grad=True), DataError, "x must be finite"),
    ],
)
def test_new_inputs_that_do_not_fit_are_refused(x, kind, wanted):
    with pytest.raises(kind) as caught:
        new_inputs("Posterior.predict", x, torch.ones(3, 4, 2))
    where, _, _ = message(caught)
    assert where.startswith("Posterior.predict: ")
    assert wanted in where


@pytest.mark.parametrize("shape", [(5, 2), (3, 5, 2), (1, 5, 2), (4, 3, 5, 2)])
def test_batch_axes_of_new_inputs_broadcast(shape):
    assert new_inputs("p", torch.ones(shape), torch.ones(3, 4, 2)).shape == shape


def test_class_labels_are_whole_numbers_below_the_number_of_classes():
    y = torch.tensor([[0.0], [2.0], [1.0]])
    class_labels("f", y, 3)
    for bad, row in ((-1.0, 0), (3.0, 1), (0.5, 2)):
        wrong = y.clone()
        wrong[row] = bad
        with pytest.raises(DataError) as caught:
            class_labels("f", wrong, 3)
        where, got, fix = message(caught)
        assert where == "f: class labels must be integers from 0 to 2."
        assert got == f"{bad} at row {row}"
        assert "LabelEncoder" in fix


# Units


def toy(batch=(), n=7, d=2, k=2, dtype=F64, seed=0, x_map=(1.0, 0.0), y_map=(1.0, 0.0)):
    rng = np.random.default_rng(seed)
    x = x_map[0] * rng.normal(size=(*batch, n, d)) + x_map[1]
    y = y_map[0] * rng.normal(size=(*batch, n, k)) + y_map[1]
    return TrainingData(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype), True)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_standardised_data_has_mean_0_and_deviation_1_in_each_data_set(batch):
    data = toy(batch, x_map=(5.0, 3.0), y_map=(0.01, -4.0))
    units = units_of(data, standardize=True)
    u, v = units.inward_x(data.x, F64), units.inward_y(data.y, F64)
    for value in (u, v):
        torch.testing.assert_close(value.mean(-2), torch.zeros(*batch, 2, dtype=F64), rtol=0, atol=1e-12)
        torch.testing.assert_close(value.var(-2, correction=0), torch.ones(*batch, 2, dtype=F64), rtol=1e-12, atol=0)
    np.testing.assert_allclose(units.y_scale, data.y.numpy().std(-2, keepdims=True), rtol=1e-12)
    torch.testing.assert_close(units.outward(v), data.y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(units.outward_scale(torch.ones_like(v)), units.y_scale.expand_as(v))


@given(st.floats(-250, 250), st.floats(-250, 250), st.integers(0, 5))
def test_units_are_equivariant_at_any_scale(x_power, y_power, seed):
    """Scaling the data scales the units, and the standardised data stays; from 1e-250 to 1e250."""
    a, b = 10.0**x_power, 10.0**y_power
    plain, scaled = toy(seed=seed, y_map=(1.0, 0.3)), toy(seed=seed, x_map=(a, 0.0), y_map=(b, 0.3 * b))
    one, two = units_of(plain, standardize=True), units_of(scaled, standardize=True)
    torch.testing.assert_close(two.x_scale / a, one.x_scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(two.y_scale / b, one.y_scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(two.y_loc / b, one.y_loc, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(two.inward_x(scaled.x, F64), one.inward_x(plain.x, F64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(two.inward_y(scaled.y, F64), one.inward_y(plain.y, F64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("offset", [1e6, -1e9])
def test_an_offset_costs_no_more_digits_than_the_data_itself_lost(offset):
    plain, moved = toy(), toy(x_map=(1.0, offset), y_map=(1.0, offset))
    one, two = units_of(plain, standardize=True), units_of(moved, standardize=True)
    lost = 4 * abs(offset) * torch.finfo(F64).eps
    torch.testing.assert_close(two.inward_x(moved.x, F64), one.inward_x(plain.x, F64), rtol=0, atol=10 * lost)
    torch.testing.assert_close(two.inward_y(moved.y, F64), one.inward_y(plain.y, F64), rtol=0, atol=10 * lost)


def test_float32_data_at_an_offset_is_standardised_in_float64():
    """The judge standardises the rounded float32 numbers exactly."""
    data = toy(dtype=F32, x_map=(10.0, 1e6))
    units = units_of(data, standardize=True)
    assert units.x_loc.dtype == F64
    x = data.x.double().numpy()
    np.testing.assert_allclose(units.inward_x(data.x, F32), (x - x.mean(0)) / x.std(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "value"), [(F32, 0.1), (F64, 0.1), (F32, 1e6 / 3), (F64, 1e-200), (F64, 0.0)])
def test_constants_have_scale_1_as_inputs_and_their_size_as_targets(dtype, value):
    """0.1 and 1e6 / 3 do not average exactly to themselves: the rounding must not be taken for a spread."""
    x = torch.full((11, 2), value, dtype=dtype)
    x[:, 1] = torch.arange(11)
    data = TrainingData(x, torch.full((11, 1), -value, dtype=dtype), False)
    units = units_of(data, standardize=True)
    assert units.x_scale[0, 0] == 1
    assert units.x_scale[0, 1] == pytest.approx(10**0.5, rel=1e-6)
    assert float(units.y_scale) == pytest.approx(value if value else 1.0, rel=1e-6)
    assert float(units.inward_y(data.y, F64).abs().max()) < 1e-6


def test_a_single_point_has_units():
    data = TrainingData(torch.tensor([[3.0, -2.0]]), torch.tensor([[5.0]]), False)
    units = units_of(data, standardize=True)
    assert units.x_scale.tolist() == [[1.0, 1.0]]
    assert units.y_scale.tolist() == [[5.0]]
    assert units.inward_x(data.x, F64).tolist() == [[0.0, 0.0]]


def test_nearly_constant_targets_keep_their_spread():
    """A spread of 1e-6 on an offset of 1e6 is 1e-12 of it: data, not rounding."""
    data = toy(y_map=(1e-6, 1e6), n=200)
    units = units_of(data, standardize=True)
    assert bool((units.y_scale < 2e-6).all())
    assert bool((units.y_scale > 5e-7).all())


def test_without_standardisation_nothing_changes():
    data = toy((2,), x_map=(3.0, 5.0), y_map=(0.1, 9.0))
    units = units_of(data, standardize=False)
    assert torch.equal(units.inward_x(data.x, F64), data.x)
    assert torch.equal(units.outward(data.y), data.y)
    labels = units_of(data, standardize=True, targets=False)
    assert torch.equal(labels.inward_y(data.y, F64), data.y)
    assert not torch.equal(labels.inward_x(data.x, F64), data.x)
