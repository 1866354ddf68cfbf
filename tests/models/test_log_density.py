"""Log densities as models: settings at the door, and a gradient that came with the value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import SettingError, ShapeError
from bayesdl.models.log_density import with_gradient
from bayesdl.samplers.base import value_and_grad

CALLS: list[int] = []


def cubes(q: Tensor) -> tuple[Tensor, Tensor]:
    """sum q^3 with its gradient, by hand."""
    CALLS.append(1)
    return q.pow(3).sum(-1), 3 * q.square()


def test_the_given_gradient_is_what_autograd_returns() -> None:
    fn = with_gradient(cubes)
    q = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(fn, q.clone().requires_grad_(True))
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    leaf = q.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad((fn(leaf) * weight).sum(), leaf)
    torch.testing.assert_close(grad, 3 * q.square() * weight[:, None])
    assert not fn(q).requires_grad


def test_samplers_and_functional_transforms_see_it_at_the_cost_of_one_call() -> None:
    density = bdl.LogDensity(with_gradient(cubes), 4, value_and_grad=cubes)
    q = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    CALLS.clear()
    value, grad = value_and_grad(density)(q)
    assert len(CALLS) == 1
    torch.testing.assert_close(value, q.pow(3).sum(-1))
    torch.testing.assert_close(grad, 3 * q.square())
    torch.testing.assert_close(torch.func.grad(lambda u: density(u).sum())(q), 3 * q.square())


def test_settings_are_checked() -> None:
    fn = with_gradient(cubes)
    for wrong in ({"fn": 3, "dim": 1}, {"fn": fn, "dim": 0}, {"fn": fn, "dim": 2, "names": ("a", "a")}):
        with pytest.raises(SettingError, match="LogDensity"):
            bdl.LogDensity(**wrong)
    with pytest.raises(ShapeError, match="positions must have shape"):
        bdl.LogDensity(fn, 3)(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="one per chain"):
        bdl.LogDensity(lambda q: q.square(), 3)(torch.zeros(2, 3))
    density = bdl.LogDensity(fn, 2, ["a", "b"])
    assert density.names == ("a", "b")
    assert density == bdl.LogDensity(fn, 2, ("a", "b"), transform=lambda draws: {})
