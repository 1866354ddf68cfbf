"""Search spaces: what a user may write, coordinates there and back, and what is refused."""

import math

import numpy as np
import optuna
import pytest
import torch

from bayesdl.bo import Choice, Float, Integer, Space
from bayesdl.errors import SettingError, ShapeError
from bayesdl.interop._optuna_space import Encoding, sobol_point

MIXED = {
    "rate": Float(1e-4, 10.0, log=True),
    "x": (-3.0, 5.0),
    "depth": range(2, 9),
    "width": Integer(8, 512, log=True),
    "even": range(0, 11, 2),
    "kind": ["relu", "tanh", "erf"],
    "bias": [True, False],
}


def test_what_a_user_writes_becomes_dimensions():
    space = Space.of(MIXED)
    assert space.form == "dict"
    assert space.dimensions == (
        Float(1e-4, 10.0, log=True),
        Float(-3.0, 5.0),
        Integer(2, 8),
        Integer(8, 512, log=True),
        Integer(0, 10, step=2),
        Choice(("relu", "tanh", "erf")),
        Choice((True, False)),
    )
    assert Space.of(space) is space
    pairs = Space.of([(0.0, 1.0), (-2, 2)])
    assert (pairs.names, pairs.form) == (("x0", "x1"), "array")
    assert Space.of(np.array([[0.0, 1.0], [-2.0, 2.0]])) == pairs
    tensor = Space.of(torch.tensor([[0.0, -2.0], [1.0, 2.0]], dtype=torch.float64))
    assert (tensor.dimensions, tensor.form) == (pairs.dimensions, "tensor")


def test_points_come_in_the_form_of_the_bounds():
    params = {"x1": 0.5, "x0": 0.25}
    array = Space.of([(0.0, 1.0), (-2.0, 2.0)]).hand_out(params)
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [0.25, 0.5]
    bounds = torch.tensor([[0.0, -2.0], [1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(Space.of(bounds).hand_out(params), torch.tensor([0.25, 0.5], dtype=torch.float64))
    named = Space.of({"x0": (0.0, 1.0), "x1": (-2.0, 2.0)})
    assert list(named.hand_out(params)) == ["x0", "x1"]
    assert named.take_in([0.25, 0.5]) == params == named.take_in(params)


def test_coordinates_are_those_of_the_formula_and_lead_back():
    """u = (t(v) - t(low)) / (t(high) - t(low)) with t the identity or log; choices by their index."""
    space = Space.of(MIXED)
    point = {"rate": 0.1, "x": 3.0, "depth": 5, "width": 64, "even": 4, "kind": "erf", "bias": False}
    z = space.to_unit([point])
    expected = [math.log(1e3) / math.log(1e5), 6 / 8, 3 / 6, math.log(8) / math.log(64), 0.4, 2.0, 1.0]
    assert z.tolist()[0] == pytest.approx(expected, rel=1e-14)
    (back,) = space.from_unit(z)
    assert back.pop("rate") == pytest.approx(0.1, rel=1e-14)
    assert back == {key: value for key, value in point.items() if key != "rate"}
    assert isinstance(back["depth"], int)
    (outside,) = space.from_unit(torch.tensor([[1.7, -0.2, 0.58, 2.0, 0.49, 5.0, 0.4]], dtype=torch.float64))
    assert outside == {"rate": 10.0, "x": -3.0, "depth": 5, "width": 512, "even": 4, "kind": "erf", "bias": True}


def test_every_value_of_a_grid_and_every_choice_has_an_equal_share():
    encoding = Encoding(Space.of({"depth": range(5), "kind": ["a", "b", "c"]}).distributions())
    u = torch.tensor([[(i + 0.5) / 30, (i + 0.5) / 30] for i in range(30)], dtype=torch.float64)
    points = [encoding.decode(z) for z in encoding.from_unit(u)]
    assert [sum(p["depth"] == v for p in points) for v in range(5)] == [6] * 5
    assert [sum(p["kind"] == v for p in points) for v in "abc"] == [10] * 3


def test_the_surrogate_sees_indicators_of_choices():
    encoding = Encoding(Space.of({"x": (0.0, 2.0), "kind": ["a", "b", "c"], "flag": [0, 1, 7]}).distributions())
    z = encoding.encode([{"x": 0.5, "kind": "b", "flag": 7}])
    assert encoding.expand(z).tolist() == [[0.25, 0, 1, 0, 0, 0, 1]]
    two = Encoding(Space.of({"x": (0.0, 2.0), "flag": Choice((False, True))}).distributions())
    assert two.expand(two.encode([{"x": 1.0, "flag": True}])).tolist() == [[0.5, 1.0]]
    assert encoding.width == 7
    assert two.width == 2


def test_a_parameter_with_one_value_has_no_coordinate():
    encoding = Encoding(Space.of({"x": (0.0, 1.0), "one": ["only"], "n": range(3, 4)}).distributions())
    assert encoding.names == ("x",)
    assert encoding.decode(torch.tensor([0.5])) == {"x": 0.5, "one": "only", "n": 3}


def test_a_finite_space_lists_its_points():
    encoding = Encoding(Space.of({"n": range(3), "kind": ["a", "b"]}).distributions())
    points = {tuple(encoding.decode(z).values()) for z in encoding.all_points()}
    assert points == {(n, k) for n in range(3) for k in "ab"}
    assert encoding.num_points == 6
    assert Encoding(Space.of([(0.0, 1.0)]).distributions()).num_points == math.inf


def test_a_long_grid_is_rounded_not_listed():
    encoding = Encoding(Space.of({"n": range(100_001)}).distributions())
    assert encoding.grids == {}
    assert encoding.decode(torch.tensor([0.123456])) == {"n": 12346}


def test_sobol_points_do_not_depend_on_what_was_drawn_before():
    encoding = Encoding({f"x{i}": optuna.distributions.FloatDistribution(0.0, 1.0) for i in range(3)})
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=5)
    together = engine.draw(8, dtype=torch.float64)
    alone = torch.stack([sobol_point(encoding, i, 5) for i in range(8)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("bounds", "kind", "says"),
    [
        ([(1.0, 0.0)], SettingError, "low must be below high"),
        ([(0.0, 0.0)], SettingError, "leave a constant out"),
        ([(0.0, math.inf)], SettingError, "high must be a finite number"),
        ([(math.nan, 1.0)], SettingError, "low must be a finite number"),
        ({"x": (0.0, 1.0, 2.0)}, SettingError, "must be a pair"),
        ({"x": [0, 1]}, SettingError, "could be a range or two choices"),
        ({"x": ["a", "a"]}, SettingError, "each option once"),
        ({"x": [object()]}, SettingError, "text, numbers, booleans or None"),
        ({}, SettingError, "at least one"),
        ({"": (0.0, 1.0)}, SettingError, "a name of its own"),
        (3.0, SettingError, "bounds must be a tensor"),
        ("sqlite:///", SettingError, "bounds must be a tensor"),
        (torch.zeros(3, 2), ShapeError, "shape (2, d)"),
        (torch.tensor([[0.0, 1.0], [1.0, 0.5]]), SettingError, "low must be below high"),
        ({"x": range(3, 1)}, SettingError, "must be a pair"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds, kind, says):
    with pytest.raises(kind, match=says.replace("(", r"\(").replace(")", r"\)")):
        Space.of(bounds)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Float(0.0, 1.0, log=True), "positive"),
        (lambda: Integer(0, 10, log=True), "positive"),
        (lambda: Integer(0, 10, step=3), "divide"),
        (lambda: Integer(1, 9, log=True, step=2), "step"),
        (lambda: Integer(1.5, 3), "integer"),
        (lambda: Float("0", 1.0), "finite number"),
        (lambda: Choice(()), "one or more"),
    ],
)
def test_dimensions_that_make_no_sense_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


def test_points_outside_the_space_are_refused():
    space = Space.of({"n": range(0, 11, 2), "kind": ["a", "b"], "x": (0.0, 1.0)})
    for wrong in ({"n": 3}, {"n": 12}, {"kind": "c"}, {"x": 1.5}, {"x": "0.5"}, {"x": math.nan}):
        with pytest.raises(SettingError, match="must lie in"):
            space.take_in({"n": 2, "kind": "a", "x": 0.5, **wrong})
    with pytest.raises(SettingError, match="must have the names"):
        space.take_in({"n": 2})
    with pytest.raises(ShapeError, match="must have 2 values"):
        Space.of([(0.0, 1.0), (0.0, 1.0)]).take_in([0.5])
