"""What a pretrained network was trained for, against what it is asked: units, sizes and inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdl.data import TrainingData, Units, units_of
from bayesdl.errors import DataError, OutOfRangeWarning, ShapeError, fail

_FAR = 2.0  # times the largest trained number of points: beyond it an answer is noise
_EDGE = 0.1  # of the width of the trained range of inputs, beyond which it is left
_MAY_LEAVE = 0.02  # share of the inputs of a context that may do so: standardised normal inputs have such


def units_for(data: TrainingData, card: Mapping[str, Any], *, standardize: bool) -> Units:
    """Units that the network wants: standardised, in the unit cube (the box of the data), or as they are."""
    labels = card["task"] == "classification"
    raw = units_of(data, standardize=False)
    if not standardize:
        return raw
    usual = units_of(data, standardize=True, targets=not labels)
    y = usual if card["targets"] == "standardized" else raw
    if card["inputs"] == "standardized":
        return Units(usual.x_loc, usual.x_scale, y.y_loc, y.y_scale)
    if card["inputs"] == "raw":
        return Units(raw.x_loc, raw.x_scale, y.y_loc, y.y_scale)
    x = data.x.to(torch.float64)
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    side = high - low
    # a column of one value stands in the middle of the cube
    scale = torch.where(side > 0, side, torch.ones_like(side))
    return Units(torch.where(side > 0, low, low - 0.5), scale, y.y_loc, y.y_scale)


def check_context(where: str, card: Mapping[str, Any], max_inputs: int, x: Tensor) -> dict[str, bool]:
    """Whether n, d and the inputs x (*b, n, d), in the network's units, are within the ranges of the card.

    Raises:
        ShapeError: More columns than the network has inputs.
        DataError: More than twice as many points as it was trained on.

    Warns:
        OutOfRangeWarning: One of them is not.
    """
    n, d = x.shape[-2:]
    name, ranges = card["name"], card["ranges"]
    if d > max_inputs:
        wanted = f"{name!r} takes up to {max_inputs} columns of x."
        fail(ShapeError, where, wanted, got=f"{d}", fix="choose columns, or bdl.ExactGP, or a network for more")
    if n > _FAR * max(1, ranges["n"][1]):
        wanted = f"{name!r} was trained on up to {ranges['n'][1]} points; beyond twice that its answers are noise."
        fail(DataError, where, wanted, got=f"{n} points", fix="a subset, or bdl.ExactGP, or a network for more")
    outside = _outside(x, ranges["x"])
    inside = {
        "n": ranges["n"][0] <= n <= ranges["n"][1],
        "d": ranges["d"][0] <= d <= ranges["d"][1],
        "x": outside <= _MAY_LEAVE,
    }
    if not all(inside.values()):
        problems = {
            "n": f"{n} points, trained on {ranges['n'][0]} to {ranges['n'][1]}",
            "d": f"{d} columns, trained on {ranges['d'][0]} to {ranges['d'][1]}",
            "x": f"{outside:.0%} of the inputs beyond {ranges['x']} in the network's units",
        }
        _warn(where, name, "; ".join(problems[key] for key, fine in inside.items() if not fine))
    return inside


def check_queries(where: str, card: Mapping[str, Any], x: Tensor) -> None:
    """Warn where test inputs, in the network's units, lie beyond the range of the card.

    Warns:
        OutOfRangeWarning: They do.
    """
    outside = _outside(x, card["ranges"]["x"])
    if outside > _MAY_LEAVE:
        problem = f"{outside:.0%} of the test inputs beyond {card['ranges']['x']} in the network's units"
        _warn(where, card["name"], problem)


def _outside(x: Tensor, bounds: list[float]) -> float:
    """Share of the points that leave the bounds in some column."""
    low, high = bounds
    margin = _EDGE * (high - low)
    x = x.detach()
    if x.numel() and bool(x.abs().max() <= min(high, -low) + margin):  # the usual case, in a third of the operations
        return 0.0
    left = ((x < low - margin) | (x > high + margin)).any(-1)
    return float(left.to(torch.float64).mean()) if left.numel() else 0.0


def _warn(where: str, name: str, problem: str) -> None:
    message = f"{where}: {name!r} is asked outside what it was trained on: {problem}; compare with bdl.ExactGP"
    warnings.warn(message, OutOfRangeWarning, stacklevel=4)
