"""The leapfrog integrator and the metric: reversible, volume preserving, second order, exact in its momenta."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import Metric, dense_metric, diagonal_metric, energy, leapfrog


def rough(q):
    """A log density of three coordinates that is neither Gaussian nor separable."""
    a, b, c = q.unbind(-1)
    return -0.25 * a**4 - 0.7 * (b - a**2) ** 2 - torch.cosh(0.8 * c + 0.3 * a)


def field(q):
    """`rough` and its gradient by hand, differentiable in q."""
    a, b, c = q.unbind(-1)
    u, s = b - a**2, torch.sinh(0.8 * c + 0.3 * a)
    return rough(q), torch.stack([-(a**3) + 2.8 * a * u - 0.3 * s, -1.4 * u, -0.8 * s], -1)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(kind, groups=()) -> Metric:
    if kind == "diagonal":
        return diagonal_metric(torch.tensor([0.4, 1.7, 3.0], dtype=torch.float64).expand(*groups, 3))
    root = numbers(*groups, 3, 3, seed=3)
    return dense_metric(root @ root.mT + 0.5 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.parametrize("groups", [(), (2,), (2, 3)])
@pytest.mark.parametrize("per_chain", [False, True])
def test_leapfrog_runs_backwards_to_where_it_started(kind, groups, per_chain):
    """Flip the momentum at the end, integrate again: the start comes back, to rounding."""
    metric, evaluate = metric_of(kind, groups), value_and_grad(rough)
    q, p = 0.8 * numbers(*groups, 5, 3, seed=1), numbers(*groups, 5, 3, seed=2)
    step_size = 0.03 + 0.05 * numbers(*groups, 5 if per_chain else 1, seed=4).sigmoid()
    q1, p1, _, grad1 = leapfrog(evaluate, q, p, evaluate(q)[1], step_size, metric, 13)
    assert (q1 - q).abs().max() > 0.1
    q2, p2, _, _ = leapfrog(evaluate, q1, -p1, grad1, step_size, metric, 13)
    torch.testing.assert_close(q2, q, rtol=0, atol=1e-10)
    torch.testing.assert_close(-p2, p, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_energy_error_falls_with_the_square_of_the_step(kind):
    """At fixed integration time the slope of log |dH| in log eps is 2, to 0.05."""
    metric, evaluate = metric_of(kind), value_and_grad(rough)
    q, p = 0.8 * numbers(20, 3, seed=1), metric_of(kind).momentum(numbers(20, 3, seed=2))
    lp, grad = evaluate(q)
    steps = 2.0 ** -torch.arange(6, 10, dtype=torch.float64)
    errors = []
    for eps in steps:
        _, p1, lp1, _ = leapfrog(evaluate, q, p, grad, eps.expand(1), metric, int(1 / eps))
        errors.append(float((energy(lp1, p1, metric) - energy(lp, p, metric)).abs().mean()))
    slope = np.polyfit(np.log(steps.numpy()), np.log(errors), 1)[0]
    assert slope == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_leapfrog_preserves_volume(kind):
    """The Jacobian of (q, p) -> (q', p') by autograd has determinant 1; here q has three coordinates."""
    metric = metric_of(kind)
    eps = torch.tensor([0.11], dtype=torch.float64)

    def flow(z):
        q, p = z[None, :3], z[None, 3:]
        q, p, _, _ = leapfrog(field, q, p, field(q)[1], eps, metric, 4)
        return torch.cat([q, p], -1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, numbers(6, seed=5))
    assert (jacobian - torch.eye(6)).abs().max() > 0.1
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_merged_half_steps_equal_the_definition(kind):
    metric, eps = metric_of(kind), 0.07
    inverse_mass = metric.inverse_mass if metric.dense else torch.diag(metric.inverse_mass)
    q, p = numbers(4, 3, seed=6), numbers(4, 3, seed=7)
    merged = leapfrog(field, q, p, field(q)[1], torch.tensor([eps], dtype=torch.float64), metric, 3)
    for _ in range(3):
        p = p + eps / 2 * field(q)[1]
        q = q + eps * p @ inverse_mass.T
        p = p + eps / 2 * field(q)[1]
    for found, wanted in zip(merged, (q, p, *field(q)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [(), (2, 3)])
def test_momenta_have_the_mass_matrix_as_covariance(groups):
    """With the unit vectors as noise, P'P is exactly M, the inverse of the inverse mass."""
    unit = torch.eye(3, dtype=torch.float64)
    for kind in ("diagonal", "dense"):
        metric = metric_of(kind, groups)
        p = metric.momentum(unit).expand(*groups, 3, 3)
        inverse_mass = metric.inverse_mass if metric.dense else torch.diag_embed(metric.inverse_mass)
        torch.testing.assert_close(p.mT @ p @ inverse_mass, unit.expand(*groups, 3, 3), rtol=0, atol=1e-10)


def test_kinetic_energy_of_float32_momenta_is_summed_in_float64():
    """A million equal terms: the sum is exact but for the rounding of the terms themselves."""
    p = torch.full((1, 1_000_000), 0.1)
    found = diagonal_metric(torch.ones(1_000_000)).kinetic_energy(p)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(0.5 * 1e6 * float((p[0, 0] * p[0, 0]).double()), rel=1e-12)


def test_gradient_that_is_not_finite_counts_as_zero():
    def root(q):
        return -q.sqrt().sum(-1)

    value, grad = value_and_grad(root)(torch.tensor([[4.0, 0.0], [-1.0, 1.0]]))
    assert value[1].isnan()
    torch.testing.assert_close(grad, torch.tensor([[-0.25, 0.0], [0.0, -0.5]]))
