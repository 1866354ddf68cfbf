"""NNGP kernels against values computed in 25-digit arithmetic, and against what is true of any such network."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesdl import ops
from bayesdl.kernels import NNGP

# K(x, z), K(x, x), K(z, z) at x = (1, .5, -.3), z = (-.2, .8, .4) with w_std = 1.5 and b_std = 0.3 in every layer.
NETWORKS = {
    ("relu", 1): (0.496885560602249, 1.321875, 0.9),
    ("relu", 2): (0.801364720845233, 1.577109375, 1.1025),
    ("relu", 3): (1.10320657873427, 1.864248046875, 1.3303125),
    ("relu", 5): (1.76097022820341, 2.55068893432617, 1.8749267578125),
    ("erf", 1): (0.244324242416748, 1.17388234336405, 0.994216058689469),
    ("erf", 3): (0.359730574319985, 1.21366456938487, 1.18823970636177),
    ("erf", 5): (0.423542530175777, 1.21851650041393, 1.21544384573938),
}
DUALS = {
    "relu": (ops.relu_dual, ops.relu_dual_slopes, 0.26537809151894, 0.31886466915874),
    "erf": (ops.erf_dual, ops.erf_dual_slopes, 0.17547965609182, 0.45015815807855),
}


def _f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("activation", "depth"), NETWORKS)
def test_kernels_agree_with_high_precision_values(activation, depth):
    x = torch.stack([_f64(1.0, 0.5, -0.3), _f64(-0.2, 0.8, 0.4)])
    kernel = NNGP(depth=depth, activation=activation, w_std=1.5, b_std=0.3)
    cross, own, other = NETWORKS[activation, depth]
    expected = _f64(own, cross, cross, other).reshape(2, 2)
    torch.testing.assert_close(kernel(x), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel(x[:1], x[1:]), expected[:1, 1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel.value_and_pullback(x)[0], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel.diagonal(x), expected.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", DUALS)
def test_dual_maps_agree_with_high_precision_values(activation):
    dual, slopes, value, slope = DUALS[activation]
    a, r, b = (_f64(v).reshape(1, 1) for v in (1.3, 0.4, 0.7))
    assert float(dual(a, r, b)) == pytest.approx(value, rel=1e-10)
    assert float(slopes(a, r, b)[1]) == pytest.approx(slope, rel=1e-10)


def test_covariances_agree_with_the_scale_mixture_fixture():
    """A second set of numbers: two layers, w_std = sqrt 2, b_std = 0.1, and the Gaussian conditional that follows."""
    x = _f64(0.5, -1, 1.5, 0.25, -0.75, 0.8, 0.1, 1.2).reshape(4, 2)
    xs, y = _f64(0.3, 0.3, 3, -2).reshape(2, 2), _f64(0.7, -0.4, 1.1, 0.2)
    kernel = NNGP(depth=2, w_std=math.sqrt(2), b_std=0.1)
    k = kernel(x)
    upper = _f64(
        1.28, 1.0404639045743, 0.41421285434743, 0.463142477231,
        2.3425, 0.63429416216523, 1.0841164808385, 1.2325, 1.0477183151004, 1.48,
    )  # fmt: skip
    torch.testing.assert_close(k[torch.triu_indices(4, 4).unbind()], upper, rtol=1e-10, atol=0)
    state = ops.condition(k, x, y, _f64(0.05)[0])
    mean, covariance = ops.joint_moments(state, kernel(x, xs), kernel(xs))
    torch.testing.assert_close(mean, _f64(-0.093029417571773, 0.95222959574163), rtol=1e-10, atol=0)
    expected = _f64(0.0294951246123, -0.062430798172198, -0.062430798172198, 1.3286954059003).reshape(2, 2)
    torch.testing.assert_close(covariance, expected, rtol=1e-10, atol=0)
    assert float(ops.log_marginal(state)) == pytest.approx(-4.8670434968479, rel=1e-10)


def test_critical_relu_network_without_bias_keeps_variances():
    """w_std^2 = 2 and vanishing b_std: K(x, x) is 2 |x|^2 / d whatever the depth."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diagonal = NNGP(depth=4, b_std=1e-9).diagonal(x)
    torch.testing.assert_close(diagonal, 2 * x.square().sum(-1) / 3, rtol=1e-12, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.05, 20.0), st.integers(1, 4))
def test_relu_kernel_without_bias_is_homogeneous(seed, factor, depth):
    """k(c x, z) = c k(x, z) as b_std goes to 0: each layer is homogeneous of degree 1."""
    g = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    kernel = NNGP(depth=depth, w_std=1.2, b_std=1e-12)
    torch.testing.assert_close(kernel(factor * x, z), factor * kernel(x, z), rtol=1e-9, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(0.01, 30.0), st.floats(0.01, 30.0), st.floats(-0.999, 0.999), st.sampled_from(sorted(DUALS)))
def test_slopes_of_dual_maps_are_derivatives(a, b, c, activation):
    """dF/da, dF/dr and dF/db against central differences; dF/dr is the dual map of the derivative."""
    dual, slopes, _, _ = DUALS[activation]
    point = [_f64(v).reshape(1, 1) for v in (a, c * math.sqrt(a * b), b)]
    step = 1e-6
    for i, slope in enumerate(slopes(*point)):
        # Steps shrink towards the edge of the domain |r| < sqrt(a b), beyond which F is clipped.
        h = step * (1 - abs(c)) * float(point[i].abs()) + 1e-9
        up, down = [p.clone() for p in point], [p.clone() for p in point]
        up[i] += h
        down[i] -= h
        difference = float(dual(*up) - dual(*down)) / (2 * h)
        assert float(slope) == pytest.approx(difference, rel=1e-4, abs=1e-5)


def test_dual_maps_are_expectations():
    """F against Gauss-Hermite quadrature of E[phi(u) phi(v)] for erf, where the quadrature converges."""
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    a, r, b = 0.9, -0.35, 1.6
    c = r / math.sqrt(a * b)
    u = math.sqrt(a) * nodes[:, None]
    v = math.sqrt(b) * (c * nodes[:, None] + math.sqrt(1 - c * c) * nodes[None, :])
    expected = float((weights[:, None] * weights[None, :] * torch.erf(u) * torch.erf(v)).sum())
    got = ops.erf_dual(*(_f64(value).reshape(1, 1) for value in (a, r, b)))
    assert float(got) == pytest.approx(expected, abs=1e-9)


def test_gradients_at_parallel_rows_are_finite_and_symmetric():
    """Rows that are equal, opposite and zero, where arccos has no derivative."""
    x = _f64(1.0, 2.0, 1.0, 2.0, -1.0, -2.0, 0.0, 0.0, 2.0, 4.0).reshape(5, 2).requires_grad_()
    for activation in DUALS:
        kernel = NNGP(depth=2, activation=activation, b_std=0.2)
        for z in (None, x.detach()):
            (grad,) = torch.autograd.grad(kernel(x, z).sum(), x)
            assert bool(grad.isfinite().all())
            torch.testing.assert_close(grad[0], grad[1])
