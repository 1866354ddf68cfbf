"""The batched optimiser finds what SciPy's L-BFGS-B finds, problem by problem, whoever else is in the batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from bayesdl import ops
from bayesdl.errors import SettingError, ShapeError
from bayesdl.kernels import Matern, Scale
from bayesdl.ops.lbfgs import _Matrix, _Pairs


def _autograd(fn):
    def value_and_grad(theta, indices):
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            value = fn(theta, indices)
            (grad,) = torch.autograd.grad(value.sum(), theta)
        return value.detach(), grad

    return value_and_grad


def _rosenbrock(theta, indices):
    return (100 * (theta[:, 1:] - theta[:, :-1] ** 2) ** 2 + (1 - theta[:, :-1]) ** 2).sum(-1)


def _quadratics(num, d, seed=0):
    """Problems whose condition numbers run from 1 to 1e4, with known minima."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(num, d, d, generator=g, dtype=torch.float64))[0]
    scales = 10 ** (4 * torch.rand(num, d, generator=g, dtype=torch.float64))
    a = basis @ torch.diag_embed(scales) @ basis.mT
    minimum = torch.randn(num, d, generator=g, dtype=torch.float64)

    def fn(theta, indices):
        gap = theta - minimum[indices]
        return 0.5 * torch.einsum("pi,pij,pj->p", gap, a[indices], gap)

    return _autograd(fn), minimum


def test_quadratics_are_solved_to_their_minima():
    objective, minimum = _quadratics(6, 5)
    result = ops.minimize_lbfgs(
        objective, torch.zeros(6, 5, dtype=torch.float64), tolerance_grad=1e-9, tolerance_change=0.0, max_iterations=200
    )
    assert result.converged.all()
    torch.testing.assert_close(result.theta, minimum, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("d", "history"), [(2, 10), (5, 10), (5, 2)], ids=["2, all", "5, all", "5, the last 2"])
def test_rosenbrock_is_solved_in_about_as_many_evaluations_as_scipy(d, history):
    start = torch.tensor([-1.2, 1.0, -0.5, 0.8, 1.7], dtype=torch.float64)[:d]
    objective = _autograd(_rosenbrock)
    result = ops.minimize_lbfgs(
        objective, start[None], history=history, tolerance_grad=1e-6, tolerance_change=1e-15, max_iterations=300
    )

    def numpy_objective(theta):
        value, grad = objective(torch.from_numpy(theta)[None], torch.zeros(1, dtype=torch.long))
        return float(value), grad[0].numpy()

    options = {"gtol": 1e-6, "ftol": 1e-15, "maxiter": 300, "maxcor": history}
    theirs = minimize(numpy_objective, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    torch.testing.assert_close(result.theta[0], torch.ones(d, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert float(result.value[0]) == pytest.approx(theirs.fun, abs=1e-9)
    assert result.evaluations <= 2 * theirs.nfev


@pytest.mark.parametrize("kept", [3, None], ids=["the last 3 pairs", "all pairs"])
def test_the_inverse_hessian_is_that_of_the_textbooks_recursion(kept):
    """H = V'H V + s s' / s'y, pair by pair from the newest s'y / y'y, for problems that know 0 to 6 pairs; another
    forgets all that it knew after 2 of its 5."""
    d, counts, forgotten = 4, [0, 1, 2, 6, 5], 2
    memory = _Matrix(5, d) if kept is None else _Pairs(5, d, kept)
    rng = np.random.default_rng(3)
    pairs = [[] for _ in counts]
    for step in range(max(counts)):
        rows = np.array([i for i, count in enumerate(counts) if step < count])
        s = rng.standard_normal((rows.size, d))
        y = s * rng.uniform(0.5, 5.0, (rows.size, d)) + 0.05 * s.sum(-1, keepdims=True)
        if step == forgotten:
            memory.known[4] = 0
            pairs[4].clear()
        memory.add(rows, s, y, (s * y).sum(-1), (y * y).sum(-1))
        for row, pair in zip(rows, zip(s, y, strict=True), strict=True):
            pairs[row].append(pair)
    g = rng.standard_normal((5, d))
    got = memory.times(g, np.arange(5))
    for row, known in enumerate(pairs):
        newest = known[-1] if known else (np.ones(1), np.ones(1))
        h = np.eye(d) * (newest[0] @ newest[1]) / (newest[1] @ newest[1])
        for s, y in known[-(kept or len(known)) :] if known else ():
            v = np.eye(d) - np.outer(y, s) / (s @ y)
            h = v.T @ h @ v + np.outer(s, s) / (s @ y)
        np.testing.assert_allclose(got[row], h @ g[row], rtol=1e-9, atol=1e-9)


def test_gp_likelihoods_reach_scipys_optimum():
    """Negative log marginal likelihood of four data sets in log hyper-parameters, from the same start."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(4, 20, 2, generator=g, dtype=torch.float64)
    y = torch.sin(4 * x.sum(-1)) + 0.2 * torch.randn(4, 20, generator=g, dtype=torch.float64)
    kernel = Scale(Matern(nu=2.5))

    def objective(theta, indices):
        value = theta.exp()
        params = {"outputscale": value[:, 0], "base.lengthscale": value[:, 1:3]}
        noise = value[:, 3] + 1e-6
        result = ops.mll_and_grad(kernel.value_and_pullback, x[indices], params, y[indices], noise)
        grads = [result.params["outputscale"], *result.params["base.lengthscale"].unbind(-1), result.noise_variance]
        # A weak normal prior on the logarithms keeps every optimum inside.
        return -result.value + 0.05 * theta.square().sum(-1), -torch.stack(grads, -1) * value + 0.1 * theta

    start = torch.zeros(4, 4, dtype=torch.float64)
    ours = ops.minimize_lbfgs(objective, start, tolerance_grad=1e-5, tolerance_change=1e-13)
    assert ours.converged.all()
    for i in range(4):
        index = torch.tensor([i])

        def one(theta, index=index):
            value, grad = objective(torch.from_numpy(theta)[None], index)
            return float(value), grad[0].numpy()

        theirs = minimize(one, np.zeros(4), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-6})
        assert float(ours.value[i]) == pytest.approx(theirs.fun, abs=1e-6)
        assert ours.theta[i].numpy() == pytest.approx(theirs.x, abs=1e-3)


def test_a_problem_does_not_notice_the_others():
    """Different problems need different numbers of iterations; each ends where it ends alone."""
    objective, _ = _quadratics(5, 4, seed=3)
    start = torch.zeros(5, 4, dtype=torch.float64)
    together = ops.minimize_lbfgs(objective, start, tolerance_grad=1e-6)
    assert len(set(together.iterations.tolist())) > 1
    for i in range(5):
        alone = ops.minimize_lbfgs(
            lambda t, _, i=i: objective(t, torch.tensor([i])), start[i : i + 1], tolerance_grad=1e-6
        )
        assert alone.iterations[0] == together.iterations[i]
        torch.testing.assert_close(alone.theta[0], together.theta[i], rtol=1e-6, atol=1e-8)


def test_finished_problems_are_no_longer_evaluated():
    sizes, seen = [], []
    objective, _ = _quadratics(5, 4, seed=3)

    def counted(theta, indices):
        sizes.append(len(indices))
        assert theta.shape == (len(indices), 4)
        return objective(theta, indices)

    result = ops.minimize_lbfgs(
        counted,
        torch.zeros(5, 4, dtype=torch.float64),
        callback=lambda i, v: seen.append((i.sum().item(), v.sum().item())),
    )
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 5
    assert result.evaluations == len(sizes) == len(seen) + 1
    assert all(late[1] <= early[1] for early, late in itertools.pairwise(seen))


@pytest.mark.parametrize("wall", [math.nan, math.inf, -math.inf])
def test_steps_into_nonsense_are_taken_back(wall):
    """x - log x has its minimum at 1; beyond 3 and below 0 the objective is not a number."""

    def fn(theta, indices):
        bad = (theta > 3) | (theta <= 0)
        value = torch.where(bad, wall, theta - theta.clamp_min(1e-9).log())
        return value[:, 0], torch.where(bad, math.nan, 1 - 1 / theta.clamp_min(1e-9))

    start = torch.tensor([[0.01], [2.9], [1.0]], dtype=torch.float64)
    result = ops.minimize_lbfgs(fn, start, tolerance_grad=1e-8, tolerance_change=0.0)
    assert result.converged.all()
    assert result.iterations[2] == 0
    torch.testing.assert_close(result.theta, torch.ones(3, 1, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_start_that_is_not_finite_is_reported():
    def fn(theta, indices):
        return torch.where(indices == 1, math.nan, theta.square().sum(-1)), 2 * theta

    result = ops.minimize_lbfgs(fn, torch.ones(3, 2, dtype=torch.float64))
    assert result.converged.tolist() == [True, False, True]
    assert result.value[1].isnan()
    assert torch.equal(result.theta[1], torch.ones(2, dtype=torch.float64))


def test_the_trace_descends_and_the_budget_holds():
    start = torch.tensor([[-1.2, 1.0], [0.9, 0.9]], dtype=torch.float64)
    result = ops.minimize_lbfgs(_autograd(_rosenbrock), start, max_iterations=7)
    assert int(result.iterations.max()) == 7
    assert not result.converged[0]
    for row, steps in zip(result.trace, result.iterations, strict=True):
        values = row[: int(steps) + 1]
        assert bool((values.diff() < 0).all())
        assert row[int(steps) + 1 :].isnan().all()
        assert values[-1] in result.value


def test_empty_and_flat_problems_end_at_once():
    result = ops.minimize_lbfgs(_autograd(_rosenbrock), torch.zeros(0, 3, dtype=torch.float64))
    assert result.theta.shape == (0, 3)
    flat = ops.minimize_lbfgs(lambda t, _: (t.sum(-1) * 0, t * 0), torch.ones(2, 3, dtype=torch.float64))
    assert flat.converged.all()
    assert flat.evaluations == 1


def test_bad_calls_are_refused():
    with pytest.raises(ShapeError, match="theta0"):
        ops.minimize_lbfgs(_autograd(_rosenbrock), torch.zeros(3))
    with pytest.raises(ShapeError, match="objective"):
        ops.minimize_lbfgs(lambda t, _: (t.sum(), t), torch.zeros(2, 3))
    with pytest.raises(SettingError, match="history"):
        ops.minimize_lbfgs(_autograd(_rosenbrock), torch.zeros(2, 3), history=0)
