"""Refinement reaches float64 accuracy where it can, says when it cannot, and then falls back."""

from __future__ import annotations

import functools

import pytest
import torch

from bayesdl import ops
from bayesdl.errors import SettingError, ShapeError
from bayesdl.kernels import RBF


@functools.cache
def _problem(n=1000):
    """RBF of lengthscale 0.5 on n points of the unit square, a smooth target: condition numbers 600 / noise."""
    g = torch.Generator().manual_seed(3)
    x = torch.rand(n, 2, generator=g, dtype=torch.float64)
    y = torch.sin(3 * x.sum(-1, keepdim=True)) + 0.1 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    return RBF(lengthscale=0.5)(x), y


def _noisy(k, noise):
    return k + noise * torch.eye(k.shape[-1], dtype=k.dtype)


def test_at_condition_6e4_three_rounds_reach_float64():
    k, y = _problem()
    a = _noisy(k, 1e-2)
    found = ops.refined_solve(a, y, tolerance=3e-12)
    assert found.rounds <= 3
    assert not found.fell_back
    assert found.residuals[0] > 1e-6  # what float32 alone can do
    assert found.residual <= 3e-12
    assert float((a @ found.solution - y).norm() / y.norm()) == pytest.approx(float(found.residual), rel=0.5)
    torch.testing.assert_close(found.solution, torch.linalg.solve(a, y), rtol=1e-8, atol=1e-8)


def test_at_condition_6e6_it_improves_more_slowly():
    k, y = _problem()
    found = ops.refined_solve(_noisy(k, 1e-4), y, max_rounds=5, tolerance=1e-5)
    assert not found.fell_back
    assert found.residuals[-1] < 1e-2 * found.residuals[0]
    assert found.rounds >= 2


def test_at_condition_6e7_it_diverges_and_falls_back():
    """The rounds stop as soon as one does not halve the residual, and the float64 factor takes over."""
    k, y = _problem()
    a = _noisy(k, 1e-5)
    found = ops.refined_solve(a, y)
    assert found.fell_back
    assert found.rounds <= 2
    assert found.residuals[-1] > 0.5 * found.residuals[0] or found.rounds == 2
    assert found.residual < 1e-8
    torch.testing.assert_close(found.solution, torch.cholesky_solve(y, torch.linalg.cholesky(a)), rtol=1e-9, atol=1e-9)


def test_each_element_of_a_batch_goes_its_own_way():
    k, y = _problem(200)
    a = torch.stack([_noisy(k, 1e-2), _noisy(k, 1e-7), _noisy(k, 1.0)]).unsqueeze(0)
    rhs = torch.cat([y, 1e-30 * y.flip(0), torch.zeros_like(y)], -1).expand(1, 3, 200, 3).contiguous()
    found = ops.refined_solve(a, rhs)
    assert found.fell_back.tolist() == [[False, True, False]]
    assert found.solution.shape == (1, 3, 200, 3)
    assert found.residuals.shape == (found.rounds + 1, 1, 3)
    for i in (0, 2):
        torch.testing.assert_close(found.solution[0, i], torch.linalg.solve(a[0, i], rhs[0, i]), rtol=1e-7, atol=1e-45)
    assert found.solution[..., 2].eq(0).all()


def test_no_rounds_mean_float32_or_the_fallback():
    k, y = _problem(200)
    assert ops.refined_solve(_noisy(k, 1.0), y, max_rounds=0, tolerance=1e-3).rounds == 0
    assert ops.refined_solve(_noisy(k, 1.0), y, max_rounds=0).fell_back


def test_a_matrix_that_nothing_factors_comes_back_as_nan():
    a = -torch.eye(3, dtype=torch.float64)
    found = ops.refined_solve(a, torch.ones(3, 1, dtype=torch.float64))
    assert found.fell_back
    assert found.solution.isnan().all()


def test_what_does_not_fit_is_refused():
    a, rhs = torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    for bad in ((a.float(), rhs), (a, rhs.float()), (a[:2], rhs), (a, rhs[:2]), (a, rhs[:, 0])):
        with pytest.raises(ShapeError, match="refined_solve"):
            ops.refined_solve(*bad)
    for settings in ({"max_rounds": -1}, {"tolerance": 0.0}):
        with pytest.raises(SettingError, match="refined_solve"):
            ops.refined_solve(a, rhs, **settings)
