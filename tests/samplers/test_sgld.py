"""SGLD: the update by hand, exact stationary laws of its recursion, and conjugate regression from minibatches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from bayesdl.samplers import sgld
from bayesdl.samplers.stochastic import batch_gradient


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(precision):
    return lambda q, rows: -0.5 * ((q @ precision) * q).sum(-1)


def moment_z(draws, covariance):
    """Largest |z| of the means and second moments of independent draws (S, D) from N(0, covariance)."""
    draws, covariance, n = np.asarray(draws), np.asarray(covariance), len(draws)
    diagonal = np.diag(covariance)
    means = draws.mean(0) / np.sqrt(diagonal / n)
    errors = np.sqrt((covariance**2 + np.outer(diagonal, diagonal)) / n)
    return max(np.abs(means).max(), (np.abs(draws.T @ draws / n - covariance) / errors).max())


def regression():
    """200 points, three weights of known noise: log density from minibatches, posterior mean and covariance."""
    x = numbers(200, 3, seed=1) * torch.tensor([1.0, 0.6, 1.5])
    y = x @ torch.tensor([0.5, -1.0, 2.0]).double() + 0.7 * numbers(200, seed=2)
    covariance = torch.linalg.inv(x.T @ x / 0.49 + torch.eye(3) / 2.25)

    def log_density(q, rows):
        part_x, part_y = (x.unsqueeze(0), y.unsqueeze(0)) if rows is None else (x[rows], y[rows])
        squares = (part_y - (part_x @ q.unsqueeze(-1)).squeeze(-1)).square()
        return -0.5 * 200 / squares.shape[-1] * squares.sum(-1) / 0.49 - 0.5 * q.square().sum(-1) / 2.25

    return log_density, covariance @ x.T @ y / 0.49, covariance


def test_updates_by_hand_arithmetic():
    """Two steps far from the defaults: the first adapts, the second is frozen, without noise, and cut at max_drift."""
    a, b = 3.0, 0.2
    gradient = batch_gradient(lambda q, rows: -0.5 * (a * q[..., 0] ** 2 + b * q[..., 1] ** 2))
    parameters = sgld.Parameters(smoothing=0.7, damping=0.4, max_drift=0.9)
    state = sgld.init(torch.tensor([[2.0, -5.0]], dtype=torch.float64))
    noise = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    state, info = sgld.step(gradient, state, parameters, None, noise, 0.6, True)
    # the only gradient seen so far: v is its square
    scale = np.array([1 / (6.0 + 0.4), 1 / (1.0 + 0.4)])
    expected = np.array([2.0, -5.0]) + 0.3 * scale * np.array([-6.0, 1.0]) + np.sqrt(0.6 * scale) * [0.3, -1.1]
    np.testing.assert_allclose(state.q[0], expected, rtol=1e-12)
    assert float(info.log_density) == pytest.approx(-0.5 * (3.0 * 4 + 0.2 * 25))
    assert float(info.clipped) == 0
    state, info = sgld.step(gradient, state, parameters, None, None, 7.0, False)
    drift = 3.5 * scale * -np.array([a, b]) * expected
    assert abs(drift[0]) > 0.9 > abs(drift[1] * 0.3)
    np.testing.assert_allclose(state.q[0], expected + np.clip(drift, -0.9, 0.9), rtol=1e-12)
    assert float(info.clipped) == np.mean(np.abs(drift) > 0.9)
    # a third gradient enters with weight 0.3 beside 0.7 * 0.3 of the first
    slope = -np.array([a, b]) * state.q[0].numpy()
    after, _ = sgld.step(gradient, state, parameters, None, None, 0.1, True)
    v = (0.7 * 0.3 * np.array([36.0, 1.0]) + 0.3 * slope**2) / (0.7 * 0.3 + 0.3)
    np.testing.assert_allclose(after.q[0], state.q[0].numpy() + 0.05 * slope / (np.sqrt(v) + 0.4), rtol=1e-12)


@pytest.mark.parametrize("step_size", [0.4, 1.5, 3.2])
def test_stationary_variance_on_a_quadratic_is_exact(step_size):
    """U = q^2 / 2: variance 1 / (1 - eps / 4), that is 1.11, 1.6 and 5, from 20 000 independent chains.

    Mean and second moment at 4.5 standard errors: six comparisons over the three cases, a false alarm for 1 in 24 000
    seeds. After 60 steps nothing is left of the start: |1 - eps / 2| <= 0.8.
    """
    gradient = batch_gradient(lambda q, rows: -0.5 * q.square().sum(-1))
    state, stream = sgld.init(torch.zeros(20_000, 1, dtype=torch.float64)), torch.Generator().manual_seed(1)
    for _ in range(60):
        noise = torch.randn(20_000, 1, generator=stream, dtype=torch.float64)
        state, _ = sgld.step(gradient, state, sgld.Parameters(), None, noise, step_size, False)
    assert moment_z(state.q, [[1 / (1 - step_size / 4)]]) < 4.5
    # wrong by a factor of two anywhere would be seen
    assert moment_z(state.q, [[1 / (1 - step_size / 8)]]) > 4.5


def test_a_preconditioned_law_solves_its_lyapunov_equation():
    """Frozen G on a correlated quadratic: q' = (1 - eps/2 G A) q + N(0, eps G), whose covariance SciPy solves for.

    Two means and three second moments at 4.5 standard errors: a false alarm for 1 in 29 000 seeds.
    """
    precision, step_size = np.array([[4.0, 1.2], [1.2, 0.9]]), 0.8
    square = np.array([9.0, 0.25])
    g = np.diag(1 / (np.sqrt(square) + 0.1))
    transition = np.eye(2) - step_size / 2 * g @ precision
    covariance = linalg.solve_discrete_lyapunov(transition, step_size * g)
    assert np.abs(covariance / np.linalg.inv(precision) - 1).max() > 0.05
    gradient, parameters = batch_gradient(quadratic(torch.tensor(precision))), sgld.Parameters(damping=0.1)
    state = sgld.State(torch.zeros(20_000, 2).double(), torch.tensor(0.5 * square).expand(20_000, 2), 0.5)
    stream = torch.Generator().manual_seed(2)
    for _ in range(80):
        noise = torch.randn(20_000, 2, generator=stream, dtype=torch.float64)
        state, _ = sgld.step(gradient, state, parameters, None, noise, step_size, False)
    assert moment_z(state.q, covariance) < 4.5


@pytest.mark.parametrize("precondition", ["none", "rmsprop"])
def test_conjugate_linear_regression_from_minibatches(precondition):
    """Means within 0.2 sd and standard deviations within 15 % of the closed form: 64 chains on batches of 50 of 200.

    The chains relax within 136 steps at most (2 / (eps lambda) of the plain form), so that they are worth some 400
    independent draws: the error of a mean is 0.05 sd, that of an sd 3.5 %, and its bias at these steps some per cent
    more. The seed is fixed; by these errors 1 in 10 000 would fail. A wrong factor of two in noise, drift or the scale
    of a batch moves an sd by 30 % or more.
    """
    log_density, mean, covariance = regression()
    sd = covariance.diagonal().sqrt()
    run = sgld.run(
        log_density,
        mean + 3 * sd * numbers(64, 3, seed=3),
        num_data=200,
        num_warmup=500,
        num_draws=100,
        thin=10,
        step_size=1e-4 if precondition == "none" else 6e-3,
        batch_size=50,
        precondition=precondition,
        seed=4,
    )
    draws = run.draws.flatten(0, 1)
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.2
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.15
