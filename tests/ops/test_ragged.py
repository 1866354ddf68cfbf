"""Padding changes nothing: problems of different sizes in one batch equal each problem alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesdl import ops
from bayesdl.errors import ShapeError
from bayesdl.kernels import NNGP, RBF, Linear, Matern, Scale

KERNELS = {
    "matern": Scale(Matern(nu=2.5)),
    "rough": Matern(nu=0.5),
    "sum": 0.6 * RBF() + Linear(),
    "nngp": NNGP(depth=2),
}


def _ragged(kernel, lengths, n=9, d=2, padding=math.nan, seed=0):
    """Problems whose padding holds `padding`: NaN spreads to whatever reads it."""
    g = torch.Generator().manual_seed(seed)
    batch = lengths.shape
    x = 5.0 + torch.randn(*batch, n, d, generator=g, dtype=torch.float64)
    y = torch.randn(*batch, n, generator=g, dtype=torch.float64)
    beyond = torch.arange(n) >= lengths[..., None]
    params = {
        p.name: p.initial_tensor(x) * (0.5 * torch.randn((*batch, *p.shape), generator=g, dtype=torch.float64)).exp()
        for p in kernel.parameters(d)
    }
    noise = 0.02 + torch.rand(batch, generator=g, dtype=torch.float64)
    return x.masked_fill(beyond[..., None], padding), params, y.masked_fill(beyond, padding), noise


def _single(params, i):
    return {name: value[i] for name, value in params.items()}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tile", [1, 2, 100])
def test_value_and_gradients_are_those_without_padding(name, tile):
    """Relative to the largest entry, 1e-12; one, some and all rows real, padding NaN."""
    kernel = KERNELS[name]
    lengths = torch.tensor([[9, 1], [4, 7]])
    x, params, y, noise = _ragged(kernel, lengths)
    result = ops.mll_and_grad(
        kernel.value_and_pullback, x, params, y, noise, lengths=lengths, tile_bytes=tile * 9 * 9 * 8
    )
    for i in np.ndindex(2, 2):
        m = int(lengths[i])
        alone = ops.mll_and_grad(kernel.value_and_pullback, x[i][:m], _single(params, i), y[i][:m], noise[i])
        torch.testing.assert_close(result.value[i], alone.value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.quadratic[i], alone.quadratic, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.noise_variance[i], alone.noise_variance, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.residual[i][:m], alone.residual, rtol=1e-12, atol=1e-12)
        assert result.residual[i][m:].eq(0).all()
        scale = max(1.0, *(float(grad.abs().max()) for grad in alone.params.values()))
        for key, grad in alone.params.items():
            torch.testing.assert_close(result.params[key][i], grad, rtol=0, atol=2e-12 * scale)


def test_one_ragged_problem_without_batch_and_shared_inputs():
    kernel = KERNELS["matern"]
    x, params, y, noise = _ragged(kernel, torch.tensor(5))
    result = ops.mll_and_grad(kernel.value_and_pullback, x, params, y, noise, lengths=torch.tensor(5))
    alone = ops.mll_and_grad(kernel.value_and_pullback, x[:5], params, y[:5], noise)
    torch.testing.assert_close(result.value, alone.value, rtol=1e-12, atol=1e-12)
    # The same rows for all, of which each problem has seen the first few.
    lengths = torch.tensor([3, 5])
    several = {name: value.expand(2, *value.shape) for name, value in params.items()}
    result = ops.mll_and_grad(kernel.value_and_pullback, x, several, y.expand(2, -1), noise.expand(2), lengths=lengths)
    torch.testing.assert_close(result.value[1], alone.value, rtol=1e-12, atol=1e-12)


def test_an_energy_sees_the_quadratic_form_without_padding():
    kernel, lengths = KERNELS["matern"], torch.tensor([3, 8])
    x, params, y, noise = _ragged(kernel, lengths)

    def energy(q, index):
        return -(2.0 + 0.5 * lengths[index]) * (1.5 + q / 2).log(), -(2.0 + 0.5 * lengths[index]) / (3.0 + q)

    result = ops.mll_and_grad(kernel.value_and_pullback, x, params, y, noise, lengths=lengths, energy=energy)
    for i, m in enumerate((3, 8)):
        alone = ops.mll_and_grad(
            kernel.value_and_pullback, x[i, :m], _single(params, i), y[i, :m], noise[i],
            energy=lambda q, _, i=i: energy(q, torch.tensor(i)),
        )  # fmt: skip
        torch.testing.assert_close(result.value[i], alone.value, rtol=1e-12, atol=1e-12)
        for key, grad in alone.params.items():
            torch.testing.assert_close(result.params[key][i], grad, rtol=1e-11, atol=1e-12)


def test_posterior_moments_are_those_without_padding():
    """Here the kernel is the caller's business, so the padding of x holds numbers; that of y is NaN."""
    kernel, lengths = KERNELS["matern"], torch.tensor([9, 2, 6])
    x, params, y, noise = _ragged(kernel, lengths, padding=0.0)
    y = y.masked_fill(torch.arange(9) >= lengths[:, None], math.nan)
    xs = 5.0 + torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)
    k_xs, k_ss = kernel(x, xs, params), kernel(xs, None, params)
    state = ops.condition(kernel(x, None, params), x, y, noise, lengths=lengths)
    mean, covariance = ops.joint_moments(state, k_xs, k_ss, lengths=lengths)
    marginal = ops.marginal_moments(state, k_xs, k_ss.diagonal(dim1=-2, dim2=-1), lengths=lengths)
    held_out, evidence = ops.leave_one_out(state), ops.log_marginal(state, lengths=lengths)
    for i, m in enumerate(lengths.tolist()):
        own = _single(params, i)
        alone = ops.condition(kernel(x[i, :m], None, own), x[i, :m], y[i, :m], noise[i])
        wanted = ops.joint_moments(alone, kernel(x[i, :m], xs, own), kernel(xs, None, own))
        torch.testing.assert_close(mean[i], wanted[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(covariance[i], wanted[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(marginal[0][i], wanted[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(marginal[1][i], wanted[1].diagonal(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(evidence[i], ops.log_marginal(alone), rtol=1e-12, atol=1e-12)
        for ours, theirs, empty in zip(held_out, ops.leave_one_out(alone), (0.0, 1.0), strict=True):
            torch.testing.assert_close(ours[i, :m], theirs, rtol=1e-12, atol=1e-12)
            assert ours[i, m:].eq(empty).all()


@pytest.mark.parametrize("bad", [torch.tensor([0, 3]), torch.tensor([3, 10]), torch.tensor([3]), torch.ones(2)])
def test_lengths_that_do_not_fit_are_refused(bad):
    kernel = KERNELS["matern"]
    x, params, y, noise = _ragged(kernel, torch.tensor([9, 9]))
    with pytest.raises(ShapeError, match="lengths"):
        ops.mll_and_grad(kernel.value_and_pullback, x, params, y, noise, lengths=bad)
    with pytest.raises(ShapeError, match="lengths"):
        ops.condition(kernel(x, None, params), x, y, noise, lengths=bad)
