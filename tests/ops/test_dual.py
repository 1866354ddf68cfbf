"""Dual maps against 25-digit values, against quadrature of the expectation that they stand for, and their slopes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesdl.kernels import Activation
from bayesdl.ops import Dual, Series
from bayesdl.ops.dual_series import is_kinked

CLOSED = ("relu", "abs", "identity", "step", "erf", "probit", "gelu", "sin", "cos", "shifted_sin", "exp", "leaky_relu")
SERIES = ("tanh", "sigmoid", "silu", "softplus", "mish")
SMOOTH = tuple(name for name in CLOSED if name != "step") + SERIES
# F and dF/dr at (a, r, b) = (1.3, 0.4, 0.7).
VALUES = {
    "relu": (0.26537809151894, 0.31886466915874),
    "leaky_relu": (0.25495625413034, 0.35828038201858),
    "erf": (0.17547965609182, 0.45015815807855),
    "gelu": (0.188060676735, 0.32481722180432),
    "sin": (0.15110733607621, 0.39770430001782),
    "cos": (0.39770430001782, 0.15110733607621),
}
# By tensor-product Gauss-Hermite quadrature with 200 nodes, good to about 1e-15 for these two.
QUADRATURE = {"tanh": 0.150919764109142, "silu": 0.149036773823558}


def _activation(name: str) -> Activation:
    return Activation(name, negative_slope=0.1)


def _point(a: float, r: float, b: float) -> list[torch.Tensor]:
    return [torch.tensor([[v]], dtype=torch.float64, requires_grad=True) for v in (a, r, b)]


def _slopes(dual: Dual, a: float, r: float, b: float) -> list[float]:
    point = _point(a, r, b)
    return [float(g) for g in torch.autograd.grad(dual(*point).sum(), point)]


def _expectation(f, a: float, r: float, b: float, g=None) -> float:
    """E[f(u) g(v)] in polar coordinates of the plane of (u, v), in panels that end where u or v changes sign."""
    g = f if g is None else g
    low = r / math.sqrt(a), math.sqrt(b - r * r / a)
    kinks = [math.pi / 2, 3 * math.pi / 2]
    turn = math.atan2(-low[0], low[1])
    kinks += [turn % (2 * math.pi), (turn + math.pi) % (2 * math.pi)]
    edges = np.sort([0.0, *kinks, 2 * math.pi])
    nodes, weights = np.polynomial.legendre.leggauss(80)
    total = 0.0
    radii, mass = 14.0 * (nodes + 1) / 2, 14.0 * weights / 2
    mass = mass * radii * np.exp(-0.5 * radii**2) / (2 * math.pi)
    for left, right in itertools.pairwise(edges):
        angles = left + (right - left) * (nodes + 1) / 2
        e, h = np.outer(radii, np.cos(angles)), np.outer(radii, np.sin(angles))
        u, v = (torch.from_numpy(w) for w in (math.sqrt(a) * e, low[0] * e + low[1] * h))
        total += (right - left) / 2 * float(mass @ (f(u) * g(v)).numpy() @ weights)
    return total


@pytest.mark.parametrize("name", VALUES)
def test_dual_maps_agree_with_high_precision_values(name):
    dual = _activation(name).dual
    value, slope = VALUES[name]
    point = _point(1.3, 0.4, 0.7)
    assert float(dual(*point).detach()) == pytest.approx(value, rel=1e-10)
    assert _slopes(dual, 1.3, 0.4, 0.7)[1] == pytest.approx(slope, rel=1e-10)
    assert float(dual.slope(*point).detach()) == pytest.approx(slope, rel=1e-10)


@pytest.mark.parametrize("name", QUADRATURE)
def test_series_agree_with_quadrature_of_degree_200(name):
    """At |c| = 0.42 the 33rd power of c has made the missing terms vanish, so that all digits agree."""
    point = _point(1.3, 0.4, 0.7)
    assert float(_activation(name).dual(*point).detach()) == pytest.approx(QUADRATURE[name], rel=1e-11)


@pytest.mark.parametrize("name", CLOSED + SERIES)
@pytest.mark.parametrize(("a", "c", "b"), [(1.3, 0.42, 0.7), (0.2, -0.9, 2.5), (3.0, 0.97, 1.1)])
def test_dual_maps_are_expectations(name, a, c, b):
    """Every F against quadrature in the plane, split at the kinks; series to what degree 32 holds."""
    activation = _activation(name)
    r = c * math.sqrt(a * b)
    value = float(activation.dual(*_point(a, r, b)).detach())
    tolerance = 5e-5 if name in SERIES else 1e-11
    assert value == pytest.approx(_expectation(activation.value, a, r, b), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "erf", "gelu", "silu", "probit"])
def test_slopes_are_dual_maps_of_the_derivative(name):
    """dF/dr = E[phi'(u) phi'(v)], the derivative by autograd through the activation, the expectation by quadrature."""
    activation = _activation(name)

    def derivative(u: torch.Tensor) -> torch.Tensor:
        u = u.clone().requires_grad_()
        return torch.autograd.grad(activation.value(u).sum(), u)[0]

    expected = _expectation(derivative, 1.7, -0.6, 0.9)
    got = activation.dual.slope(*_point(1.7, -0.6, 0.9)).detach()
    assert float(got) == pytest.approx(expected, rel=1e-9 if name != "silu" else 1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.floats(0.05, 8.0), st.floats(0.05, 8.0), st.floats(-0.99, 0.99), st.sampled_from(CLOSED + SERIES))
def test_slopes_are_derivatives(a, b, c, name):
    """Closed slopes against autograd through F's own formula, and against central differences of F."""
    dual = _activation(name).dual
    point = _point(a, c * math.sqrt(a * b), b)
    closed = torch.autograd.grad(dual(*point).sum(), point)
    recorded = torch.autograd.grad(dual.parts(*point)[0].sum(), point, allow_unused=True)
    scale = 1.0 + max(abs(float(g)) for g in closed)
    for i, (own, other) in enumerate(zip(closed, recorded, strict=True)):
        other = torch.zeros_like(own) if other is None else other
        assert float((own - other).abs()) <= 1e-8 * scale
        h = 1e-5 * (1 - abs(c)) * float(point[i].detach().abs()) + 1e-8
        up, down = ([p.detach().clone() for p in point] for _ in range(2))
        up[i] += h
        down[i] -= h
        difference = float(dual(*up) - dual(*down)) / (2 * h)
        assert abs(float(own) - difference) <= 2e-5 * scale
    with torch.no_grad():
        assert float(dual.slope(*point)) == pytest.approx(float(closed[1]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", CLOSED + SERIES)
def test_diagonals_are_limits_of_the_map(name):
    """F(a, a, a) and its slope from the scalar forms; at c = +-1 every slope is finite, also at a = 0."""
    dual = _activation(name).dual
    a = torch.tensor([0.0, 1e-6, 0.3, 1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(dual.diagonal(a)[1:], dual.value(a, a, a)[1:], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dual.diagonal(a[1:]), dual(a[1:], a[1:], a[1:]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dual.slope_diagonal(a[1:]), dual.slope(a[1:], a[1:], a[1:]), rtol=1e-9, atol=1e-12)
    for r in (a, -a):
        leaves = [v.clone().requires_grad_() for v in (a, r, a)]
        grads = torch.autograd.grad(dual(*leaves).sum(), leaves, create_graph=True)
        assert all(bool(g.isfinite().all()) for g in grads)
        slope = dual.slope(*leaves)
        if slope.requires_grad:
            second = torch.autograd.grad(slope.sum(), leaves, allow_unused=True)
            assert all(g is None or bool(g.isfinite().all()) for g in second)


@pytest.mark.parametrize("name", [name for name in SMOOTH if name != "identity"])
def test_maps_are_differentiable_twice(name):
    point = _point(1.4, 0.5, 0.6)
    along = torch.full((1, 1), -1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(_activation(name).dual, point, along, atol=1e-6)


@pytest.mark.parametrize("name", CLOSED + SERIES)
def test_maps_keep_float32(name):
    point = [v.detach() for v in _point(1.3, 0.4, 0.7)]
    dual = _activation(name).dual
    single = dual(*(v.float() for v in point))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), dual(*point), rtol=1e-5, atol=1e-5)


def test_a_series_is_a_covariance_that_is_exact_at_equal_inputs():
    """Truncated at degree 12 for a steep function: symmetric, positive semi-definite, exact where c = +-1."""
    steep = Series(lambda x: torch.tanh(1.5 * x) + 0.3 * torch.cos(x), 12)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 2, generator=g, dtype=torch.float64)
    r, a = x @ x.mT, x.square().sum(-1)
    k = steep(a[:, None], r, a[None, :])
    torch.testing.assert_close(k, k.mT, rtol=0, atol=1e-14)
    torch.testing.assert_close(k.diagonal(), steep.diagonal(a), rtol=1e-12, atol=0)
    assert float(torch.linalg.eigvalsh(k)[0]) > -1e-12
    opposite = steep(a, -a, a)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    u = a.sqrt()[:, None] * torch.from_numpy(nodes)
    expected = (steep.function(u) * steep.function(-u)) @ torch.from_numpy(weights / weights.sum())
    torch.testing.assert_close(opposite, expected, rtol=1e-10, atol=1e-12)


def test_the_missing_variance_bounds_the_error():
    """|F_32 - F_128| <= unresolved share times E[phi^2], which falls with the degree."""
    a = torch.tensor([2.0], dtype=torch.float64)
    shares = [float(Series(torch.tanh, degree).unresolved(a)) for degree in (8, 16, 32, 64)]
    assert shares == sorted(shares, reverse=True)
    assert shares[2] == pytest.approx(1.6e-5, rel=0.5)
    r = 0.995 * a
    error = float((Series(torch.tanh, 32)(a, r, a) - Series(torch.tanh, 120)(a, r, a)).abs())
    assert 0 < error <= shares[2] * float(Series(torch.tanh, 32).diagonal(a))


KINKED = {
    "relu": torch.relu,
    "leaky": lambda x: torch.nn.functional.leaky_relu(x, 0.9),
    "hardtanh": torch.nn.functional.hardtanh,
    "elu": torch.nn.functional.elu,
    "selu": torch.nn.functional.selu,
    "hardswish": torch.nn.functional.hardswish,
    "softsign": torch.nn.functional.softsign,
    "kink away from 0": lambda x: torch.relu(x - 2.0),
    "jump": lambda x: (x > 0.3).double(),
    "far too steep": lambda x: torch.tanh(8.0 * x),
}
FINE = {
    "tanh": torch.tanh,
    "tanh, twice as steep": lambda x: torch.tanh(2 * x),
    "silu": torch.nn.functional.silu,
    "gelu, tanh form": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "cubic": lambda x: x**3 - x,
    "constant": torch.ones_like,
    "wave": lambda x: torch.sin(3 * x),
    "bump": lambda x: torch.exp(-x * x),
    "arctan": torch.atan,
}


@pytest.mark.parametrize("name", KINKED)
def test_kinks_are_noticed(name):
    assert is_kinked(KINKED[name])


@pytest.mark.parametrize("name", FINE)
def test_smooth_functions_pass(name):
    assert not is_kinked(FINE[name])
