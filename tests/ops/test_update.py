"""Extending, shortening and bordering a factor give what forming it anew gives."""

from __future__ import annotations

import pytest
import torch

from bayesdl import ops
from bayesdl.errors import ShapeError
from bayesdl.kernels import RBF, Matern, Scale

KERNEL = Scale(Matern(nu=2.5, lengthscale=0.9), outputscale=1.7)


def _data(n, batch=(), d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=g, dtype=torch.float64)
    y = torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return x, y, 0.03 + 0.05 * torch.rand(batch, generator=g, dtype=torch.float64)


def _anew(x, y, noise, kernel=KERNEL):
    return ops.condition(kernel(x), x, y, noise)


def _same(left, right, tolerance=1e-9):
    for name in ("x", "residual", "chol", "alpha", "jitter"):
        torch.testing.assert_close(
            getattr(left, name), getattr(right, name), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("gone", [0, -1, 7, (0, 1), (3, 11, 5), tuple(range(9)), tuple(range(1, 12))])
def test_a_downdated_state_is_that_of_the_remaining_rows(batch, gone):
    """The first, the last, one between, some, most: by rank-one updates and by the product."""
    x, y, noise = _data(12, batch)
    gone_set = {gone % 12} if isinstance(gone, int) else set(gone)
    kept = [i for i in range(12) if i not in gone_set]
    _same(ops.downdate(_anew(x, y, noise), gone), _anew(x[..., kept, :], y[..., kept], noise))


def test_a_rank_one_update_keeps_its_accuracy_where_the_matrix_is_nearly_singular():
    """60 close points and noise 1e-6, so a condition number near 1e8; the error is that of the conditioning."""
    kernel = RBF(lengthscale=1.5)
    x = torch.linspace(-2, 2, 60, dtype=torch.float64)[:, None]
    y, noise = x.squeeze(-1).sin(), torch.tensor(1e-6, dtype=torch.float64)
    shorter = ops.downdate(_anew(x, y, noise, kernel), (0, 30))
    kept = [i for i in range(60) if i not in (0, 30)]
    wanted = kernel(x[kept]) + 1e-6 * torch.eye(58, dtype=torch.float64)
    assert float((shorter.chol @ shorter.chol.mT - wanted).abs().max()) < 1e-13
    assert float((wanted @ shorter.alpha - y[kept]).abs().max()) < 1e-6


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_window_that_slides_fifty_times_stays_exact(batch):
    """Fifty steps of one to three points each; against the last window formed anew, 1e-9."""
    x, y, noise = _data(140, batch)
    state, first, last = _anew(x[..., :20, :], y[..., :20], noise), 0, 20
    for step in range(50):
        q = 1 + step % 3
        new = x[..., last : last + q, :]
        k_xn, k_nn = KERNEL(x[..., first:last, :], new), KERNEL(new)
        state = ops.slide(state, k_xn, k_nn, new, y[..., last : last + q])
        first, last = first + q, last + q
    _same(state, _anew(x[..., first:last, :], y[..., first:last], noise))


def test_a_window_of_another_size():
    x, y, noise = _data(14)
    state = _anew(x[:10], y[:10], noise)
    k_xn, k_nn = KERNEL(x[:10], x[10:]), KERNEL(x[10:])
    for size, first in ((14, 0), (6, 8), (13, 1)):
        _same(ops.slide(state, k_xn, k_nn, x[10:], y[10:], size=size), _anew(x[first:], y[first:], noise))
    with pytest.raises(ShapeError, match="slide"):
        ops.slide(state, k_xn, k_nn, x[10:], y[10:], size=4)


@pytest.mark.parametrize("gone", [12, (-13,), tuple(range(12))])
def test_rows_that_are_not_there_are_refused(gone):
    with pytest.raises(ShapeError, match="downdate"):
        ops.downdate(_anew(*_data(12)), gone)


def _candidates(q, batch=()):
    """8 candidates of q points, 16 imagined targets at each, 5 test points."""
    g = torch.Generator().manual_seed(7)
    x_new = torch.randn(8, *batch, q, 2, generator=g, dtype=torch.float64)
    y_new = torch.randn(16, 8, *batch, q, generator=g, dtype=torch.float64)
    return x_new, y_new, torch.randn(*batch, 5, 2, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_fantasies_are_conditioning_on_what_was_imagined(q, batch):
    """Every one of 8 x 16 fantasies against a factor of its own; moments at shared test points, 1e-10."""
    x, y, noise = _data(10, batch)
    x_new, y_new, xs = _candidates(q, batch)
    state = _anew(x, y, noise)
    fantasy = ops.fantasize(state, KERNEL(x, x_new), KERNEL(x_new), y_new)
    mean, variance = ops.fantasy_moments(fantasy, KERNEL(x, xs), KERNEL(x_new, xs), KERNEL.diagonal(xs))
    assert mean.shape == (16, 8, *batch, 5)
    assert variance.shape == (8, *batch, 5)
    for c in range(8):
        whole = torch.cat([x, x_new[c]], -2)
        for s in (0, 15):
            alone = _anew(whole, torch.cat([y, y_new[s, c]], -1), noise)
            wanted = ops.marginal_moments(alone, KERNEL(whole, xs), KERNEL.diagonal(xs))
            torch.testing.assert_close(mean[s, c], wanted[0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(variance[c], wanted[1], rtol=1e-10, atol=1e-10)


def test_fantasies_take_test_points_of_their_own():
    x, y, noise = _data(10)
    x_new, y_new, _ = _candidates(1)
    xs = x_new + 0.3
    fantasy = ops.fantasize(_anew(x, y, noise), KERNEL(x, x_new), KERNEL(x_new), y_new)
    mean, variance = ops.fantasy_moments(fantasy, KERNEL(x, xs), KERNEL(x_new, xs), KERNEL.diagonal(xs))
    appended = ops.append(_anew(x, y, noise), KERNEL(x, x_new), KERNEL(x_new), x_new, y_new)
    wanted = ops.marginal_moments(appended, KERNEL(appended.x, xs), KERNEL.diagonal(xs))
    torch.testing.assert_close(mean, wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(variance, wanted[1], rtol=1e-10, atol=1e-10)


def test_no_factor_is_copied_for_a_sample():
    """Samples share the appended factor of their candidate, and candidates the old factor."""
    x, y, noise = _data(10)
    x_new, y_new, _ = _candidates(2)
    state = _anew(x, y, noise)
    assert ops.append(state, KERNEL(x, x_new), KERNEL(x_new), x_new, y_new).chol.shape == (8, 12, 12)
    fantasy = ops.fantasize(state, KERNEL(x, x_new), KERNEL(x_new), y_new)
    assert fantasy.state.chol is state.chol
    assert fantasy.cross.shape == (8, 10, 2)
    assert fantasy.innovation.shape == (16, 8, 2)


def test_fantasies_are_differentiable_in_the_candidate():
    x, y, noise = _data(6)
    state = _anew(x, y, noise)
    _, y_new, xs = _candidates(1)

    def call(x_new):
        fantasy = ops.fantasize(state, KERNEL(x, x_new), KERNEL(x_new), y_new[:2, 0])
        return ops.fantasy_moments(fantasy, KERNEL(x, xs), KERNEL(x_new, xs), KERNEL.diagonal(xs))

    x_new = torch.tensor([[0.3, -0.8]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x_new,))
