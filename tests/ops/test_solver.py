"""The stochastic evidence and its gradient against dense algebra, at parameters far from the defaults."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bayesdl import kernels as k
from bayesdl.errors import SettingError, ShapeError
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops import LinearSystem, SolverConfig, linear_system
from bayesdl.ops.solver import GradientEstimate, evidence_gradient, log_evidence, memory_needed
from bayesdl.posterior._pathwise import prior_draws

KERNEL = k.Scale(k.Matern(nu=1.5, lengthscale=(0.9, 2.1)), outputscale=1.7)
NOISE = torch.tensor(0.07, dtype=torch.float64)
CONFIG = SolverConfig(rank=15, num_probes=12, training_tolerance=1e-9)


def problem(n: int = 70) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    y = x[:, 0].sin() + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)
    return x, y, {p.name: p.initial_tensor(x) for p in KERNEL.parameters(2)}


def system(config: SolverConfig = CONFIG) -> tuple[LinearSystem, torch.Tensor]:
    x, y, params = problem()
    return linear_system(tiles_of(KERNEL, params), x, NOISE, config), y


@pytest.mark.parametrize("estimator", ["signs", "pathwise"])
def test_the_gradient_is_unbiased(estimator):
    """The mean of 30 estimates against autograd through Cholesky, at five of its standard errors.

    t with 29 degrees of freedom, five components: about 1e-4 false alarms; the seed is fixed.
    """
    x, y, params = problem()
    leaves = {name: v.clone().requires_grad_() for name, v in params.items()} | {
        "noise": NOISE.clone().requires_grad_()
    }
    a = KERNEL(x, None, leaves) + leaves["noise"] * torch.eye(70, dtype=torch.float64)
    judge = torch.distributions.MultivariateNormal(torch.zeros(70, dtype=torch.float64), a).log_prob(y)
    exact = dict(zip(leaves, torch.autograd.grad(judge, list(leaves.values())), strict=True))
    solver, _ = system()
    g, found = torch.Generator().manual_seed(1), []
    for _ in range(30):
        draws = prior_draws(KERNEL, params, NOISE, x, 12, g)[1] if estimator == "pathwise" else None
        estimate = evidence_gradient(solver, y, CONFIG, g, draws=draws)
        found.append({**estimate.params, "noise": estimate.noise_variance})
    for name, gradient in exact.items():
        values = torch.stack([f[name] for f in found])
        assert bool(((values.mean(0) - gradient).abs() <= 5 * values.std(0) / math.sqrt(30)).all()), name
        assert float(values.std(0).min()) > 0
    mean_gradient = torch.cholesky_solve(y.unsqueeze(-1), torch.linalg.cholesky(a.detach()))
    torch.testing.assert_close(estimate.solution[:, :1], mean_gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num", [3, 40])
def test_the_pathwise_trace_is_the_quadratic_form_of_the_solved_draws(num):
    """1/2 alpha' dA alpha - 1/2 mean_c u_c' dA u_c with a dense inverse and derivatives by autograd."""
    x, y, params = problem()
    z = torch.randn(70, num, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    leaves = {name: v.clone().requires_grad_() for name, v in params.items()}
    k = KERNEL(x, None, leaves)
    inverse = torch.linalg.inv(k.detach() + NOISE * torch.eye(70, dtype=torch.float64))
    alpha, u = inverse @ y, inverse @ z
    weights = 0.5 * (torch.outer(alpha, alpha) - u @ u.mT / num)
    want = dict(zip(leaves, torch.autograd.grad((weights * k).sum(), list(leaves.values())), strict=True))
    solver, _ = system(replace(CONFIG, mixed_precision=False))
    found = evidence_gradient(solver, y, CONFIG, draws=z)
    for name, gradient in want.items():
        torch.testing.assert_close(found.params[name], gradient, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.noise_variance, weights.trace(), rtol=1e-6, atol=1e-6)


def test_draws_by_the_same_random_numbers_keep_the_solves_of_nearby_hyperparameters_useful():
    x, y, params = problem()
    config = replace(CONFIG, rank=5, training_tolerance=1e-2)

    def found(params: dict[str, torch.Tensor], seed: int, start: torch.Tensor | None = None) -> GradientEstimate:
        solver = linear_system(tiles_of(KERNEL, params), x, NOISE, config)
        draws = prior_draws(KERNEL, params, NOISE, x, 12, torch.Generator().manual_seed(seed))[1]
        return evidence_gradient(solver, y, config, start=start, draws=draws)

    near = {name: 1.02 * v for name, v in params.items()}
    start = found(params, 1).solution
    steps = [found(near, 1, s).solved.iterations.double().mean() for s in (None, start, start.flip(1))]
    cold, warm, other = (float(s) for s in steps)
    assert warm < 0.7 * cold
    assert warm < 0.7 * other  # the solves of other draws are no such start


def test_the_estimator_needs_probes_that_fit():
    solver, y = system()
    with pytest.raises(SettingError, match="either a generator"):
        evidence_gradient(solver, y, CONFIG)
    with pytest.raises(ShapeError, match=r"draws must have shape \(70, t\)"):
        evidence_gradient(solver, y, CONFIG, draws=torch.zeros(69, 2, dtype=torch.float64))


def test_a_start_from_the_last_solution_needs_no_further_steps():
    solver, y = system()
    first = evidence_gradient(solver, y, CONFIG, torch.Generator().manual_seed(1))
    second = evidence_gradient(solver, y, CONFIG, torch.Generator().manual_seed(1), start=first.solution)
    assert int(first.solved.iterations.max()) > 0
    assert int(second.solved.iterations.max()) == 0
    torch.testing.assert_close(second.noise_variance, first.noise_variance, rtol=1e-9, atol=0)


def test_the_evidence_of_a_loose_solve_errs_by_second_order():
    solver, y = system(replace(CONFIG, rank=70, mixed_precision=False))
    x, _, params = problem()
    a = KERNEL(x, None, params) + NOISE * torch.eye(70, dtype=torch.float64)
    judge = float(torch.distributions.MultivariateNormal(torch.zeros(70, dtype=torch.float64), a).log_prob(y))
    exact = solver.solve(y.unsqueeze(-1), 1e-12)
    rough = 1e-3 * torch.randn(70, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    off = exact.solution + rough
    loose = exact._replace(solution=off, remainder=y.unsqueeze(-1) - solver.operator(off))
    for solved, tolerance in ((exact, 1e-8), (loose, 1e-3)):
        found = log_evidence(solver, y, solved, CONFIG, torch.Generator().manual_seed(3))
        assert float(found.value) == pytest.approx(judge, abs=tolerance)


def test_the_estimate_of_memory_grows_with_what_is_held():
    assert memory_needed(10**6, 2, 1, SolverConfig(rank=500)) > 8 * 10**6 * 500
    assert memory_needed(10**4, 2, 400, CONFIG) > memory_needed(10**4, 2, 1, CONFIG)
