"""Conditioning: the chain rule of probability, dense formulas, appended factors, and samples that share one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from bayesdl import ops
from bayesdl.errors import ShapeError
from bayesdl.kernels import RBF, Matern, Scale

KERNEL = Scale(Matern(nu=1.5, lengthscale=0.9), outputscale=1.7)


def _data(*batch: int, n: int = 6, s: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, 2, generator=g, dtype=torch.float64)
    xs = torch.randn(*batch, s, 2, generator=g, dtype=torch.float64)
    residual = torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return x, xs, residual, 0.05 + 0.3 * torch.rand(batch, generator=g, dtype=torch.float64)


def _state(x, residual, noise):
    return ops.condition(KERNEL(x), x, residual, noise)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_conditionals_obey_the_chain_rule(batch):
    """log p(y1, y2) = log p(y1) + log p(y2 | y1), with SciPy as judge of the three densities."""
    x, _, y, noise = _data(*batch, n=7)
    state = _state(x[..., :4, :], y[..., :4], noise)
    head, tail = x[..., :4, :], x[..., 4:, :]
    mean, cov = ops.joint_moments(state, KERNEL(head, tail), KERNEL(tail))
    evidence = ops.log_marginal(state)
    for i in np.ndindex(*batch):
        joint = KERNEL(x[i]) + noise[i] * torch.eye(7, dtype=torch.float64)
        both = multivariate_normal(cov=joint.numpy()).logpdf(y[i])
        assert float(evidence[i]) == pytest.approx(multivariate_normal(cov=joint[:4, :4].numpy()).logpdf(y[i][:4]))
        second = multivariate_normal(mean[i], cov[i] + noise[i] * torch.eye(3, dtype=torch.float64)).logpdf(y[i][4:])
        assert both == pytest.approx(float(evidence[i]) + second, rel=1e-9)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_marginal_moments_are_the_diagonal_of_the_joint(batch):
    x, xs, y, noise = _data(*batch)
    state = _state(x, y, noise)
    mean, cov = ops.joint_moments(state, KERNEL(x, xs), KERNEL(xs))
    marginal_mean, variance = ops.marginal_moments(state, KERNEL(x, xs), KERNEL.diagonal(xs))
    torch.testing.assert_close(marginal_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, cov.diagonal(dim1=-2, dim2=-1), rtol=1e-10, atol=1e-12)


def test_variance_at_the_data_is_clamped_at_zero():
    """Forty points on one spot and hardly any noise: rounding would go below 0."""
    x = torch.linspace(0, 0.02, 40, dtype=torch.float64)[:, None]
    kernel = RBF(lengthscale=3.0)
    state = ops.condition(kernel(x), x, torch.zeros(40).double(), torch.tensor(1e-12, dtype=torch.float64))
    _, variance = ops.marginal_moments(state, kernel(x, x), kernel.diagonal(x))
    assert bool((variance >= 0).all())


@pytest.mark.parametrize("batch", [(), (2,)])
def test_leave_one_out_is_refitting_without_each_point(batch):
    x, _, y, noise = _data(*batch, n=5)
    mean, variance = ops.leave_one_out(_state(x, y, noise))
    for i in range(5):
        keep = [j for j in range(5) if j != i]
        rest = _state(x[..., keep, :], y[..., keep], noise)
        k_xs = KERNEL(x[..., keep, :], x[..., [i], :])
        m, v = ops.marginal_moments(rest, k_xs, KERNEL.diagonal(x[..., [i], :]))
        torch.testing.assert_close(mean[..., i], m[..., 0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(variance[..., i], v[..., 0] + noise, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_fifty_appends_equal_one_factorisation(batch):
    x, _, y, noise = _data(*batch, n=56)
    state = _state(x[..., :4, :], y[..., :4], noise)
    start = 4
    for step in range(50):
        q = 1 + (step % 25 == 0)
        new = x[..., start : start + q, :]
        state = ops.append(state, KERNEL(state.x, new), KERNEL(new), new, y[..., start : start + q])
        start += q
    whole = _state(x, y, noise)
    assert start == 56
    for left, right in zip(state, whole, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_appends_broadcast_over_candidates_and_samples():
    """Five candidates, each with three sampled targets, on one state: equal to fifteen separate appends."""
    x, _, y, noise = _data(n=6)
    g = torch.Generator().manual_seed(9)
    new = torch.randn(5, 1, 2, generator=g, dtype=torch.float64)
    targets = torch.randn(3, 5, 1, generator=g, dtype=torch.float64)
    state = _state(x, y, noise)
    k_xn = KERNEL(x, new)
    assert k_xn.shape == (5, 6, 1)
    fantasy = ops.append(state, k_xn, KERNEL(new), new, targets)
    assert fantasy.chol.shape == (5, 7, 7)
    assert fantasy.alpha.shape == (3, 5, 7)
    for i, j in np.ndindex(3, 5):
        both = _state(torch.cat([x, new[j]]), torch.cat([y, targets[i, j]]), noise)
        torch.testing.assert_close(fantasy.alpha[i, j], both.alpha, rtol=1e-9, atol=1e-9)
    xs = torch.randn(4, 2, generator=g, dtype=torch.float64)
    mean, variance = ops.marginal_moments(fantasy, KERNEL(fantasy.x, xs), KERNEL.diagonal(xs))
    assert mean.shape == (3, 5, 4)
    assert variance.shape == (5, 4)


def test_leading_axes_of_test_points_need_no_copies_of_the_factor():
    """Batches of test points in front of the state's own batch: equal to a loop."""
    x, _, y, noise = _data(2, n=5)
    xs = torch.randn(4, 3, 2, 6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = _state(x, y, noise)
    mean, variance = ops.marginal_moments(state, KERNEL(x, xs), KERNEL.diagonal(xs))
    assert mean.shape == variance.shape == (4, 3, 2, 6)
    for i in np.ndindex(4, 3):
        own = ops.marginal_moments(state, KERNEL(x, xs[i]), KERNEL.diagonal(xs[i]))
        torch.testing.assert_close(mean[i], own[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance[i], own[1], rtol=1e-10, atol=1e-12)


def test_moments_are_differentiable_in_the_test_points():
    x, xs, y, noise = _data(n=5, s=2)
    state = _state(x, y, noise)

    def moments(points):
        return ops.marginal_moments(state, KERNEL(x, points), KERNEL.diagonal(points))

    assert torch.autograd.gradcheck(moments, xs.requires_grad_(), atol=1e-6)


def test_jitter_of_the_old_block_is_carried_into_the_new_one():
    """Two equal points without noise need jitter; a third equal point then gets the same, so that nothing fails."""
    x = torch.zeros(3, 1, dtype=torch.float64)
    kernel = RBF(lengthscale=1.0)
    zero, y = torch.zeros((), dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    state = ops.condition(kernel(x[:2]), x[:2], y[:2], zero)
    assert float(state.jitter) == pytest.approx(1e-10)
    more = ops.append(state, kernel(x[:2], x[2:]), kernel(x[2:]), x[2:], y[2:])
    torch.testing.assert_close(more.chol, ops.condition(kernel(x), x, y, zero).chol, rtol=1e-4, atol=1e-9)


def test_lost_elements_carry_nan_and_no_data_is_the_prior():
    x, xs, y, noise = _data(2, n=4)
    k = KERNEL(x)
    k[0] = -k[0]
    state = ops.condition(k, x, y, noise)
    assert state.jitter.isnan().tolist() == [True, False]
    assert state.alpha.isnan().all(-1).tolist() == [True, False]
    empty = ops.condition(KERNEL(x[1, :0]), x[1, :0], y[1, :0], noise[1])
    mean, variance = ops.marginal_moments(empty, KERNEL(x[1, :0], xs[1]), KERNEL.diagonal(xs[1]))
    assert torch.equal(mean, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(variance, KERNEL.diagonal(xs[1]))


def test_sizes_that_differ_are_refused():
    x, _, y, noise = _data(n=5)
    with pytest.raises(ShapeError, match="agree in n"):
        ops.condition(KERNEL(x), x[:4], y, noise)
    with pytest.raises(ShapeError, match="agree in n"):
        ops.condition(KERNEL(x), x, y[:4], noise)
