"""Scale-adapted SGHMC: the update by hand, the exact law of its recursion, and the noise that goes out in silence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from bayesdl.samplers import sghmc
from bayesdl.samplers.stochastic import batch_gradient
from tests.samplers.test_sgld import moment_z, numbers, quadratic, regression


def test_updates_by_hand_arithmetic():
    """Three adapting steps and a frozen one with scalars, far from the defaults, one coordinate with its noise off."""
    eps, friction, rates = 0.37, 0.23, np.array([2.0, 40.0])
    gradient = batch_gradient(lambda q, rows: -0.5 * (torch.tensor(rates) * q.square()).sum(-1))
    parameters = sghmc.Parameters(friction=friction, gradient_noise=True)
    state = sghmc.init(torch.tensor([[1.5, -2.0]], dtype=torch.float64))
    q, m, tau, mean, v = np.array([1.5, -2.0]), np.zeros(2), np.ones(2), np.ones(2), np.ones(2)
    for t in range(4):
        adapt = t < 3
        noise = numbers(1, 2, seed=t)
        state, info = sghmc.step(gradient, state, parameters, None, noise, eps, adapt)
        g = rates * q
        if adapt:
            tau = tau - tau * mean**2 / v + 1
            mean = mean + (g - mean) / (tau + 1)
            v = v + (g**2 - v) / (tau + 1)
        variance = 2 * eps**2 * friction / np.sqrt(v) - eps**4
        m = m - eps**2 / np.sqrt(v) * g - friction * m + np.sqrt(np.maximum(variance, 0)) * noise[0].numpy()
        q = q + m
        np.testing.assert_allclose(state.q[0], q, rtol=1e-11)
        np.testing.assert_allclose(state.momentum[0], m, rtol=1e-11)
        np.testing.assert_allclose(state.square[0], v, rtol=1e-11)
        assert float(info.noise_clamped) == np.mean(variance <= 0) == np.mean(np.sqrt(v) >= 2 * friction / eps**2)
    assert 0 < float(info.noise_clamped) < 1
    exact = parameters._replace(gradient_noise=False)
    _, info = sghmc.step(gradient, state, exact, None, numbers(1, 2), eps, False)
    assert float(info.noise_clamped) == 0


def test_a_cut_drift_is_reported():
    gradient = batch_gradient(quadratic(torch.eye(2).double()))
    parameters = sghmc.Parameters(friction=0.5, max_drift=0.01)
    start = sghmc.init(torch.tensor([[30.0, 0.001]], dtype=torch.float64))
    state, info = sghmc.step(gradient, start, parameters, None, None, 0.3, False)
    np.testing.assert_allclose(state.momentum, [[-0.01, -0.09 * 0.001]])
    assert float(info.clipped) == 0.5


@pytest.mark.parametrize(("eps", "friction", "noisy"), [(0.7, 0.3, False), (0.7, 0.3, True), (0.25, 0.06, False)])
def test_the_stationary_law_solves_its_lyapunov_equation(eps, friction, noisy):
    """On a correlated quadratic with frozen scales (q, m) is a linear Gaussian recursion; SciPy solves for its law.

    With exact gradients, whose noise is subtracted in vain for `noisy`. Four means and ten second moments of 20 000
    independent chains at 5 standard errors: a false alarm for 1 in 40 000 seeds over the three cases.
    """
    precision, square = np.array([[2.0, 0.5], [0.5, 0.8]]), np.array([0.2, 0.05])
    h = np.diag(eps**2 / np.sqrt(square))
    noise = 2 * friction * h - (eps**4 * np.eye(2) if noisy else 0)
    momentum = np.hstack([-h @ precision, (1 - friction) * np.eye(2)])
    transition = np.vstack([np.hstack([np.eye(2), np.zeros((2, 2))]) + momentum, momentum])
    num_steps = int(np.log(1e-4) / np.log(np.abs(np.linalg.eigvals(transition)).max()))
    assert 10 < num_steps < 300
    covariance = linalg.solve_discrete_lyapunov(transition, np.block([[noise, noise], [noise, noise]]))
    # far from the target, so that a law that is merely near it would be seen
    assert np.abs(covariance[:2, :2] / np.linalg.inv(precision) - 1).max() > 0.03
    gradient = batch_gradient(quadratic(torch.tensor(precision)))
    parameters = sghmc.Parameters(friction, gradient_noise=noisy)
    state = sghmc.init(torch.zeros(20_000, 2).double())._replace(square=torch.tensor(square).expand(20_000, 2))
    stream = torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        normal = torch.randn(20_000, 2, generator=stream, dtype=torch.float64)
        state, _ = sghmc.step(gradient, state, parameters, None, normal, eps, False)
    assert moment_z(torch.cat([state.q, state.momentum], -1), covariance) < 5


def test_conjugate_linear_regression_from_minibatches():
    """Means within 0.2 sd and standard deviations within 15 % of the closed form; see the same test of SGLD."""
    log_density, mean, covariance = regression()
    sd = covariance.diagonal().sqrt()
    run = sghmc.run(
        log_density,
        mean + 3 * sd * numbers(64, 3, seed=3),
        num_data=200,
        num_warmup=400,
        num_draws=100,
        thin=6,
        step_size=0.02,
        friction=0.1,
        batch_size=50,
        seed=4,
    )
    draws = run.draws.flatten(0, 1)
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.2
    assert float((draws.std(0) / sd - 1).abs().max()) < 0.15
    assert run.noise_clamped_fraction == 0


def test_large_gradients_switch_the_noise_off_and_the_run_says_so():
    """step_size = friction = 0.01: the noise is gone where sqrt(v) > 200, as it is with a residual scale of 0.01."""
    x, y = numbers(200, 2, seed=1), 0.01 * numbers(200, seed=2)

    def log_density(q, rows, scale):
        part_x, part_y = (x.unsqueeze(0), y.unsqueeze(0)) if rows is None else (x[rows], y[rows])
        squares = (part_y - (part_x @ q.unsqueeze(-1)).squeeze(-1)).square() / scale**2
        return -0.5 * 200 / squares.shape[-1] * squares.sum(-1)

    settings = {"num_data": 200, "num_warmup": 100, "num_draws": 20, "step_size": 0.01, "friction": 0.01}
    loud = sghmc.run(lambda q, rows: log_density(q, rows, 0.01), numbers(4, 2), batch_size=20, **settings)
    assert loud.noise_clamped_fraction == 1
    calm = sghmc.run(lambda q, rows: log_density(q, rows, 3.0), numbers(4, 2), batch_size=20, **settings)
    assert calm.noise_clamped_fraction == 0
    whole = sghmc.run(lambda q, rows: log_density(q, rows, 0.01), numbers(4, 2), batch_size=None, **settings)
    assert whole.noise_clamped_fraction == 0
