"""Microcanonical dynamics: the turn against an ODE solver, volume, time reversal, orders of the error, and lengths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy.integrate import solve_ivp

from bayesdl.errors import SettingError, ShapeError
from bayesdl.samplers import _microcanonical_lengths as lengths
from bayesdl.samplers import adaptation
from bayesdl.samplers._microcanonical import (
    SCHEMES,
    Point,
    energy_error,
    find_step_size,
    integrate,
    kick,
    refresh,
    unit,
)
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import dense_metric, diagonal_metric, low_rank_metric

SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
KINDS = pytest.mark.parametrize("kind", ["diagonal", "dense", "low-rank"])


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value):
    return torch.tensor([value], dtype=torch.float64)


def metric_of(kind, dim):
    """A metric far from the identity, and its M^{-1} as a matrix."""
    if kind == "diagonal":
        scales = torch.linspace(0.3, 4.0, dim, dtype=torch.float64)
        return diagonal_metric(scales), torch.diag(scales)
    if kind == "dense":
        root = torch.eye(dim, dtype=torch.float64) + 0.4 * numbers(dim, dim, seed=2).tril()
        return dense_metric(root @ root.T), root @ root.T
    scales = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    basis, stretch = torch.linalg.qr(numbers(dim, 2, seed=3))[0], torch.tensor([9.0, 0.2], dtype=torch.float64)
    middle = torch.eye(dim, dtype=torch.float64) + basis @ torch.diag(stretch - 1) @ basis.T
    return low_rank_metric(scales, basis, stretch), scales.sqrt()[:, None] * middle * scales.sqrt()


def quartic(q):
    """A log density with its gradient by hand, so that autograd can pass through an integrator."""
    weights = torch.linspace(0.5, 2.0, q.shape[-1], dtype=q.dtype)
    coupled = q.roll(1, -1)
    value = -(weights * q.square()).sum(-1) / 2 - q.pow(4).sum(-1) / 10 - 0.2 * (q * coupled).sum(-1)
    return value, -weights * q - 0.4 * q.pow(3) - 0.2 * (coupled + q.roll(-1, -1))


# ---- one turn --------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("time", [0.05, 1.7, 20.0])
def test_a_turn_solves_the_equation_of_motion(kind, time):
    """u' = (I - u u') g / (D - 1) and K' = g . u in whitened coordinates, by SciPy's Runge-Kutta solver of order 8."""
    metric, _ = metric_of(kind, 4)
    velocity, grad = unit(numbers(3, 4, seed=1)), 3 * numbers(3, 4, seed=2)
    found, kinetic = kick(velocity, grad, number(time), metric)
    force = metric.whiten(grad)
    for i in range(3):
        g = force[i].numpy()

        def motion(_, y, g=g):
            u = y[:4]
            return np.append((g - u * (u @ g)) / 3, g @ u)

        start = np.append(velocity[i].numpy(), 0.0)
        end = solve_ivp(motion, (0, time), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
        np.testing.assert_allclose(found[i].numpy(), end[:4], atol=1e-8)
        assert float(kinetic[i]) == pytest.approx(end[4], rel=1e-8, abs=1e-8)


def test_a_turn_survives_any_force():
    """No force turns nothing; a force beyond all bounds leaves no NaN; going straight against it stays straight."""
    metric = diagonal_metric(torch.ones(3, dtype=torch.float64))
    velocity = unit(numbers(4, 3, seed=1))
    same, kinetic = kick(velocity, torch.zeros(4, 3, dtype=torch.float64), number(0.7), metric)
    torch.testing.assert_close(same, velocity, rtol=0, atol=1e-15)
    assert kinetic.abs().max() < 1e-15
    for size in (1e5, 1e150, 1e300):
        turned, kinetic = kick(velocity, size * numbers(4, 3, seed=2), number(0.7), metric)
        assert not turned.isnan().any()
        assert not kinetic.isnan().any()
    against, kinetic = kick(velocity, -5 * velocity, number(0.7), metric)
    torch.testing.assert_close(against, velocity, rtol=0, atol=1e-12)
    torch.testing.assert_close(kinetic, torch.full_like(kinetic, -3.5), rtol=1e-12, atol=0)


def test_single_precision_keeps_its_dtype_and_sums_energies_in_double():
    metric = diagonal_metric(torch.ones(5))
    point = Point(numbers(7, 5).float(), unit(numbers(7, 5, seed=1)).float(), *quartic(numbers(7, 5).float()))
    end, kinetic = integrate(quartic, point, torch.tensor([0.3]), metric, 4, SCHEMES["minimal-norm"])
    assert {part.dtype for part in end} == {torch.float32}
    wide = Point(point.q.double(), unit(point.velocity.double()), *quartic(point.q.double()))
    double = diagonal_metric(torch.ones(5).double())
    exact, more = integrate(quartic, wide, number(0.3), double, 4, SCHEMES["minimal-norm"])
    torch.testing.assert_close(end.q.double(), exact.q, rtol=1e-4, atol=1e-4)
    assert kinetic.dtype == torch.float64
    torch.testing.assert_close(kinetic, more, rtol=1e-4, atol=1e-4)


# ---- trajectories ----------------------------------------------------------------------------------------------------


@SCHEME
@KINDS
def test_a_trajectory_reversed_returns_to_its_start(scheme, kind):
    metric, _ = metric_of(kind, 4)
    q = numbers(2, 9, 4, seed=4)
    start = Point(q, unit(numbers(2, 9, 4, seed=5)), *quartic(q))
    step_size = torch.tensor([[0.17], [0.08]], dtype=torch.float64)
    end, kinetic = integrate(quartic, start, step_size, metric, 25, scheme)
    assert (end.q - q).abs().mean() > 0.3
    back, more = integrate(quartic, end._replace(velocity=-end.velocity), step_size, metric, 25, scheme)
    torch.testing.assert_close(back.q, q, rtol=0, atol=1e-10)
    torch.testing.assert_close(back.velocity, -start.velocity, rtol=0, atol=1e-10)
    torch.testing.assert_close(kinetic + more, torch.zeros_like(kinetic), rtol=0, atol=1e-9)


@SCHEME
def test_the_kinetic_change_is_the_volume_that_is_lost(scheme):
    """-K is the log determinant of the map of positions and directions, by autograd on tangent bases, in D = 3."""
    metric, _ = metric_of("dense", 3)
    q, u = numbers(1, 3, seed=6), unit(numbers(1, 3, seed=7))

    def flow(both):
        q, u = both[None, :3], both[None, 3:]
        end, _ = integrate(quartic, Point(q, u, *quartic(q)), number(0.4), metric, 6, scheme)
        return torch.cat([end.q[0], end.velocity[0]])

    end, kinetic = integrate(quartic, Point(q, u, *quartic(q)), number(0.4), metric, 6, scheme)
    jacobian = torch.autograd.functional.jacobian(flow, torch.cat([q[0], u[0]]))

    def tangent(direction):
        frame = torch.zeros(6, 5, dtype=torch.float64)
        frame[:3, :3] = torch.eye(3)
        frame[3:, 3:] = torch.linalg.svd(direction)[2][1:].T
        return frame

    volume = torch.linalg.det(tangent(end.velocity).T @ jacobian @ tangent(u)).abs().log()
    assert abs(float(kinetic)) > 0.5
    assert float(volume) == pytest.approx(-float(kinetic), abs=1e-9)


@KINDS
def test_a_metric_is_a_change_of_coordinates(kind):
    """The same trajectory in x = L^{-1} q, under the density of x and the identity."""
    metric, inverse_mass = metric_of(kind, 4)
    root = metric.whiten(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(root @ root.T, inverse_mass, rtol=1e-10, atol=1e-10)

    def whitened(x):
        value, grad = quartic(x @ root.T)
        return value, grad @ root

    q, u, scheme = numbers(5, 4, seed=8), unit(numbers(5, 4, seed=9)), SCHEMES["minimal-norm"]
    x = torch.linalg.solve(root, q.T).T
    end, kinetic = integrate(quartic, Point(q, u, *quartic(q)), number(0.2), metric, 7, scheme)
    plain = diagonal_metric(torch.ones(4, dtype=torch.float64))
    same, equal = integrate(whitened, Point(x, u, *whitened(x)), number(0.2), plain, 7, scheme)
    torch.testing.assert_close(end.q, same.q @ root.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(end.velocity, same.velocity, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kinetic, equal, rtol=1e-9, atol=1e-9)


def test_many_steps_in_one_go_equal_one_after_the_other():
    """Kicks between steps are merged, which must change nothing but rounding."""
    metric, _ = metric_of("diagonal", 4)
    q = numbers(6, 4, seed=10)
    for scheme in SCHEMES.values():
        point = Point(q, unit(numbers(6, 4, seed=11)), *quartic(q))
        end, kinetic = integrate(quartic, point, number(0.25), metric, 5, scheme)
        total = torch.zeros(6, dtype=torch.float64)
        for _ in range(5):
            point, change = integrate(quartic, point, number(0.25), metric, 1, scheme)
            total = total + change
        for one, other in zip([*end, kinetic], [*point, total], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_velocity_keeps_its_length_over_ten_thousand_steps():
    metric, _ = metric_of("dense", 3)
    q = numbers(4, 3, seed=12)
    point = Point(q, unit(numbers(4, 3, seed=13)), *quartic(q))
    for _ in range(100):
        point, _ = integrate(quartic, point, number(0.3), metric, 100, SCHEMES["leapfrog"])
        assert (torch.linalg.vector_norm(point.velocity, dim=-1) - 1).abs().max() < 1e-12
    # the energy does not drift: the particle is still where the density is
    assert point.q.abs().max() < 5


@SCHEME
def test_energy_errors_shrink_at_the_order_of_the_scheme(scheme):
    """E (dE)^2 from exact draws of a Gaussian falls like eps^6 for a step and like eps^4 for a fixed length.

    Slopes of a regression over a factor of four in eps, to 0.35; the minimal-norm scheme at equal eps errs less.
    """
    scales = torch.linspace(0.5, 1.5, 10, dtype=torch.float64)
    evaluate = value_and_grad(lambda q: -0.5 * (q / scales).square().sum(-1))
    metric = diagonal_metric(torch.ones(10, dtype=torch.float64))
    q = scales * numbers(4000, 10, seed=14)
    start = Point(q, unit(numbers(4000, 10, seed=15)), *evaluate(q))
    sizes = np.array([0.1, 0.2, 0.4])
    for fixed, order in ((False, 6), (True, 4)):
        errors = []
        for eps in sizes:
            end, kinetic = integrate(evaluate, start, number(eps), metric, round(2.4 / eps) if fixed else 1, scheme)
            errors.append(float(energy_error(start.log_density, end.log_density, kinetic).square().mean()))
        slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
        assert slope == pytest.approx(order, abs=0.35)


def test_the_minimal_norm_scheme_errs_less_for_its_gradients():
    """At two gradients against two leapfrog steps of half the size, its mean squared error is smaller by far."""
    evaluate = value_and_grad(lambda q: -0.5 * q.square().sum(-1))
    metric = diagonal_metric(torch.ones(10, dtype=torch.float64))
    q = numbers(4000, 10, seed=16)
    start = Point(q, unit(numbers(4000, 10, seed=17)), *evaluate(q))
    found = {}
    for name, eps, num in (("minimal-norm", 1.0, 3), ("leapfrog", 0.5, 6)):
        end, kinetic = integrate(evaluate, start, number(eps), metric, num, SCHEMES[name])
        found[name] = float(energy_error(start.log_density, end.log_density, kinetic).square().mean())
    assert found["minimal-norm"] < 0.3 * found["leapfrog"]


def test_a_refreshed_direction_is_forgotten_over_its_length():
    """E u_t . u_0 = exp(-t / L) for many coordinates; 40 refreshes of eps = 0.3, L = 8, to 0.02 (6 errors)."""
    velocity = first = unit(numbers(400, 500, seed=18))
    for i in range(40):
        velocity = refresh(velocity, numbers(400, 500, seed=100 + i), number(0.3), number(8.0))
    assert float((velocity * first).sum(-1).mean()) == pytest.approx(math.exp(-40 * 0.3 / 8), abs=0.02)
    assert (torch.linalg.vector_norm(velocity, dim=-1) - 1).abs().max() < 1e-14
    kept = refresh(first, numbers(400, 500, seed=19), number(0.3), number(math.inf))
    torch.testing.assert_close(kept, first)
    gone = refresh(first, numbers(400, 500, seed=19), number(1.0), number(1e-6))
    torch.testing.assert_close(gone, unit(numbers(400, 500, seed=19)), rtol=0, atol=1e-9)


def test_the_search_ends_where_the_error_crosses_its_tolerance():
    """Chains at scales from 1e-3 to 1e3 get steps in proportion; one outside the support takes the mean of the rest."""
    scales = torch.tensor([1e-3, 1.0, 1e3, 1.0], dtype=torch.float64)[:, None]

    def log_density(q):
        value = -0.5 * (q / scales).square().sum(-1)
        return torch.where(q[..., 0] > 1e4, torch.nan, value)

    evaluate = value_and_grad(log_density)
    q = scales * numbers(6, seed=20).expand(4, 6)
    q[3, 0] = 2e4
    point = Point(q, unit(numbers(6, seed=21)).expand(4, 6), *evaluate(q))
    metric = diagonal_metric(torch.ones(6, dtype=torch.float64))
    found, spent = find_step_size(evaluate, point, metric, number(1.0), 0.2, SCHEMES["minimal-norm"])
    assert spent % 2 == 0
    assert ((found / scales[:, 0] / found[1]).log2().abs()[:3] < 1.1).all()
    assert float(found[3]) == pytest.approx(float(found[:3].log().mean().exp()))
    sides = []
    for factor in (0.5, 1.0, 2.0):
        end, kinetic = integrate(evaluate, point, factor * found, metric, 1, SCHEMES["minimal-norm"])
        sides.append(energy_error(point.log_density, end.log_density, kinetic).abs()[:3] < 0.2)
    assert bool((sides[0] != sides[1]).logical_or(sides[1] != sides[2]).all())


# ---- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chains", [1, 6])
def test_memory_is_what_arviz_finds(num_chains):
    """Autoregressions of coefficients -0.6 to 0.95: draws per effective draw as ArviZ has it, and near the truth.

    To 10 %: ArviZ splits each chain in two.
    """
    coefficients = torch.tensor([-0.6, 0.0, 0.5, 0.9, 0.95], dtype=torch.float64)
    noise = numbers(2, num_chains, 4000, 5, seed=22)
    x = [noise[..., 0, :] / (1 - coefficients.square()).sqrt()]
    for i in range(1, 4000):
        x.append(coefficients * x[-1] + noise[..., i, :])
    draws = torch.stack(x, -2)
    found = lengths.autocorrelation_time(draws)
    for i in range(2):
        own = array_stats.ess(draws[i].numpy(), method="mean", chain_axis=0, draw_axis=1)
        np.testing.assert_allclose(found[i], num_chains * 4000 / own, rtol=0.1)
    truth = (1 + coefficients) / (1 - coefficients)
    assert ((found / truth).log().abs() < 0.5).all()


def test_memory_of_a_thinned_watch_counts_transitions():
    """An autoregression watched for 5000 transitions in 1024 rows at most, two groups, 40 coordinates of which 32."""
    q = numbers(2, 20, 40, seed=23)
    seen = lengths.start_watch(q, 5000)
    assert seen.rows.shape == (2, 20, 1000, 32)
    assert seen.stride == 5
    for t in range(5000):
        q = 0.9 * q + 0.19**0.5 * numbers(2, 20, 40, seed=24 + t)
        seen = lengths.watch(seen, q, t)
    assert seen.filled == 1000
    np.testing.assert_allclose(lengths.memory(seen), 19.0, rtol=0.05)


@KINDS
def test_the_widest_direction_is_that_of_the_whitened_covariance(kind):
    metric, inverse_mass = metric_of(kind, 4)
    q = 1.5 * numbers(4000, 4, seed=25) @ (torch.eye(4, dtype=torch.float64) + numbers(4, 4, seed=26).tril())
    moments = adaptation.add_to_moments(adaptation.start_moments(q, dense=True), q)
    wanted = np.linalg.eigvals(np.linalg.inv(inverse_mass.numpy()) @ np.cov(q.numpy().T)).real
    np.testing.assert_allclose(lengths.whitened_variances(moments, metric), np.sort(wanted), rtol=1e-9)
    assert float(lengths.widest(moments, metric)) == pytest.approx(math.sqrt(4 * wanted.max()), rel=0.01)
    assert float(lengths.average_width(moments, metric)) == pytest.approx(math.sqrt(wanted.sum()), rel=1e-9)


def test_chance_does_not_widen_the_widest_direction():
    """300 positions of 200 coordinates: sample variances of 1 reach (1 + sqrt(2/3))^2 = 3.3, and the width stays 1.

    A true variance of 9 in one direction is found to a quarter.
    """
    metric = diagonal_metric(torch.ones(200, dtype=torch.float64))
    q = numbers(300, 200, seed=27)
    moments = adaptation.add_to_moments(adaptation.start_moments(q, dense=True), q)
    assert float(lengths.whitened_variances(moments, metric)[-1]) > 2.8
    assert float(lengths.widest(moments, metric)) == pytest.approx(200**0.5, rel=0.3)
    direction = unit(numbers(200, seed=28))
    spiked = q + 2 * (q @ direction)[:, None] * direction
    moments = adaptation.add_to_moments(adaptation.start_moments(spiked, dense=True), spiked)
    assert float(lengths.widest(moments, metric)) == pytest.approx(3 * 200**0.5, rel=0.25)


@pytest.mark.parametrize("num_warmup", [0, 5, 22, 60, 150, 1000])
@pytest.mark.parametrize("settle", [True, False])
def test_a_schedule_keeps_its_parts_apart(num_warmup, settle):
    plan = lengths.schedule(num_warmup, settle=settle)
    last = plan.windows[-1][1] if plan.windows else 0
    assert 0 <= plan.together <= last <= plan.watch[0] <= plan.watch[1] <= num_warmup
    assert (plan.watch[1] > plan.watch[0]) == (num_warmup >= 40)
    if settle and num_warmup >= 40:
        assert plan.watch[1] < num_warmup


def test_lengths_are_checked():
    q = numbers(3, 4, 2)
    assert lengths.given_length("here", 2.0, q).tolist() == [2.0] * 3
    assert lengths.given_length("here", torch.tensor([1.0, 2.0, 3.0]), q).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ShapeError, match="here: trajectory_length"):
        lengths.given_length("here", torch.ones(2), q)
    with pytest.raises(SettingError, match="here: trajectory_length"):
        lengths.given_length("here", -1.0, q)
