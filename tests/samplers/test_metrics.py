"""Metrics against dense algebra, at every rank; Gaussians of known covariance under each; what windows estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesdl.samplers import _low_rank, adaptation, chees, nuts
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import (
    Metric,
    dense_metric,
    diagonal_metric,
    energy,
    leapfrog,
    leapfrog_path,
    low_rank_metric,
)

DIM = 6
KINDS = ["diagonal", "dense", *(f"low-rank {r}" for r in (0, 1, 3, 6))]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric_of(kind, groups=(), dim=DIM, seed=3) -> tuple[Metric, torch.Tensor]:
    """A metric and the matrix that it stands for, by its definition."""
    scales = (0.8 * numbers(*groups, dim, seed=seed)).exp()
    if kind == "diagonal":
        return diagonal_metric(scales), torch.diag_embed(scales)
    if kind == "dense":
        root = numbers(*groups, dim, dim, seed=seed + 1)
        matrix = root @ root.mT + 0.5 * torch.eye(dim, dtype=torch.float64)
        return dense_metric(matrix), matrix
    rank = int(kind.split()[1])
    basis = torch.linalg.qr(numbers(*groups, dim, dim, seed=seed + 2))[0][..., :rank]
    stretch = (1.5 * numbers(*groups, rank, seed=seed + 4)).exp()
    s = torch.diag_embed(scales.sqrt())
    inner = torch.eye(dim, dtype=torch.float64) + basis @ torch.diag_embed(stretch - 1) @ basis.mT
    return low_rank_metric(scales, basis, stretch), s @ inner @ s


def rotated(dim, values, seed=1):
    """A Gaussian with those covariance eigenvalues in a random basis: log density, covariance."""
    basis = torch.linalg.qr(numbers(dim, dim, seed=seed))[0]
    precision = (basis / values) @ basis.T
    return (lambda q: -0.5 * ((q @ precision) * q).sum(-1)), (basis * values) @ basis.T


def whitened_spectrum(metric, covariance):
    """Eigenvalues of the covariance of L^{-1} q: all 1 for a perfect metric."""
    half = metric.whiten_positions(covariance)
    return torch.linalg.eigvalsh(metric.whiten_positions(half.mT.contiguous()))


@pytest.mark.parametrize("groups", [(), (2,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_agrees_with_the_matrix(kind, groups):
    metric, matrix = metric_of(kind, groups)
    p, x = numbers(*groups, 5, DIM, seed=7), numbers(*groups, 5, DIM, seed=8)
    mass = torch.linalg.inv(matrix)
    torch.testing.assert_close(metric.velocity(p), p @ matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(metric.kinetic_energy(p), 0.5 * ((p @ matrix) * p).sum(-1), rtol=1e-10, atol=1e-10)
    white = metric.whiten(p)
    torch.testing.assert_close(white @ white.mT, p @ matrix @ p.mT, rtol=1e-10, atol=1e-10)
    unit = metric.whiten_positions(x)
    torch.testing.assert_close(unit @ unit.mT, x @ mass @ x.mT, rtol=1e-9, atol=1e-9)
    # L' p . L^{-1} x = p . x, and momenta of unit noise z whiten to z again
    torch.testing.assert_close((white * unit).sum(-1), (p * x).sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metric.whiten(metric.momentum(p)), p, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metric.variances(), matrix.diagonal(dim1=-2, dim2=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("groups", [(), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_momenta_have_the_mass_matrix_as_covariance(kind, groups):
    """With the unit vectors as noise, P'P is exactly M; the noise broadcasts over groups."""
    metric, matrix = metric_of(kind, groups)
    unit = torch.eye(DIM, dtype=torch.float64)
    p = metric.momentum(unit).expand(*groups, DIM, DIM)
    torch.testing.assert_close(p.mT @ p @ matrix, unit.expand_as(matrix), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(dim=st.integers(1, 9), rank=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_low_rank_is_a_metric_at_any_size(dim, rank, seed):
    """whiten and whiten_positions are inverse transposes, and the velocity is the gradient of the kinetic energy."""
    metric, matrix = metric_of(f"low-rank {min(rank, dim)}", dim=dim, seed=seed)
    p = numbers(3, dim, seed=seed + 9).requires_grad_(True)
    (velocity,) = torch.autograd.grad(metric.kinetic_energy(p).sum(), p)
    torch.testing.assert_close(velocity, metric.velocity(p.detach()), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(velocity, p.detach() @ matrix, rtol=1e-7, atol=1e-9)
    unit = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(metric.whiten(unit) @ metric.whiten_positions(unit).mT, unit, rtol=0, atol=1e-8)


def test_narrow_directions_of_float32_keep_their_energy():
    """At eigenvalue 1e-6 a difference of two terms would lose half of the digits; a sum of squares loses none."""
    basis = torch.linalg.qr(numbers(40, 1, seed=1))[0].float()
    metric = low_rank_metric(torch.ones(40), basis, torch.tensor([1e-6]))
    wide = low_rank_metric(torch.ones(40).double(), basis.double(), torch.tensor([1e-6]).double())
    noise = numbers(200, 40, seed=2)
    found = metric.kinetic_energy(metric.momentum(noise.float()))
    torch.testing.assert_close(found, wide.kinetic_energy(wide.momentum(noise)), rtol=3e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_leapfrog_under_every_metric_is_that_of_the_definition(kind):
    """Half step, drift by M^{-1} p, half step, three times; back again from the flipped end to 1e-10."""
    metric, matrix = metric_of(kind)
    log_density, _ = rotated(DIM, torch.linspace(0.3, 3.0, DIM, dtype=torch.float64))
    evaluate = value_and_grad(log_density)
    start_q, start_p, eps = numbers(4, DIM, seed=6), metric.momentum(numbers(4, DIM, seed=7)), 0.13
    size = torch.tensor([eps], dtype=torch.float64)
    end_q, end_p, _, grad = leapfrog(evaluate, start_q, start_p, evaluate(start_q)[1], size, metric, 3)
    q, p = start_q, start_p
    for _ in range(3):
        p = p + eps / 2 * evaluate(q)[1]
        q = q + eps * p @ matrix
        p = p + eps / 2 * evaluate(q)[1]
    torch.testing.assert_close(end_q, q, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end_p, p, rtol=1e-10, atol=1e-10)
    path = leapfrog_path(evaluate, start_q, start_p, evaluate(start_q)[1], size, metric, 3)
    torch.testing.assert_close(path[0][-1], q, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path[1][-1], p, rtol=1e-10, atol=1e-10)
    back = leapfrog(evaluate, end_q, -end_p, grad, size, metric, 3)
    torch.testing.assert_close(back[0], start_q, rtol=0, atol=1e-10)
    energies = energy(log_density(q), p, metric) - 0.5 * ((p @ matrix) * p).sum(-1) + log_density(q)
    torch.testing.assert_close(energies, torch.zeros(4).double(), rtol=0, atol=1e-10)


def low_rank_from(q, grad, rank):
    """The low-rank metric of rows (R, D), around the identity."""
    ones = torch.ones(q.shape[-1], dtype=torch.float64)
    kept = _low_rank.keep(_low_rank.start_kept(q, rank), q, grad)
    return low_rank_metric(ones, *_low_rank.estimate(kept, ones, rank))


def test_a_standard_normal_keeps_the_identity_whatever_the_draws():
    """From 40 draws in 60 dimensions, exactly; their covariance alone claims variances up to (1 + sqrt(60/40))^2."""
    q = numbers(40, 60, seed=5)
    eye = torch.eye(60, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(q.T.cov())[-1]) > 4
    torch.testing.assert_close(low_rank_from(q + 3, -q, 8).velocity(eye), eye, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rows", "most"), [(40, 9.0), (160, 2.5), (500, 1.5)])
def test_wide_and_narrow_directions_are_found_from_few_draws(rows, most):
    """Six eigenvalues from 1e-3 to 1e3 among ones, in 60 dimensions: the condition falls from 1000 to `most`.

    (The condition number of the step: the square root of the ratio of the whitened variances.)
    """
    values = torch.ones(60, dtype=torch.float64)
    values[:6] = torch.tensor([1e3, 200.0, 40.0, 0.02, 5e-3, 1e-3])
    _, covariance = rotated(60, values)
    q = numbers(rows, 60, seed=5) @ torch.linalg.cholesky(covariance).T + 3.0
    grad = -torch.linalg.solve(covariance, (q - 3.0).T).T
    spectrum = whitened_spectrum(low_rank_from(q, grad, 8), covariance)
    assert float((spectrum[-1] / spectrum[0]).sqrt()) < most


def test_low_rank_equals_dense_where_it_has_every_direction():
    """r = D and rows enough: for a Gaussian the solution of A Cov(g) A = Cov(q) is its covariance, whatever the draws.

    The dense estimate tends to the same matrix only as the draws grow in number.
    """
    values = torch.logspace(-2, 2, 8, dtype=torch.float64)
    _, covariance = rotated(8, values, seed=2)
    q = numbers(200, 8, seed=3) @ torch.linalg.cholesky(covariance).T
    grad = -torch.linalg.solve(covariance, q.T).T
    start = low_rank_metric(torch.ones(8).double(), torch.zeros(8, 8).double(), torch.ones(8).double())
    moments = adaptation.add_to_moments(adaptation.moments_for(q, start), q, grad)
    metric = adaptation.estimate_metric(moments, start)
    found = metric.velocity(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(whitened_spectrum(metric, covariance), torch.ones(8).double(), rtol=0, atol=0.02)
    sample = adaptation.add_to_moments(adaptation.start_moments(q, dense=True), q)
    dense = adaptation.estimate_metric(sample, dense_metric(torch.eye(8, dtype=torch.float64)))
    relative = torch.linalg.solve(dense.inverse_mass, found)
    torch.testing.assert_close(torch.linalg.eigvals(relative).real, torch.ones(8).double(), rtol=0, atol=0.6)


def test_diagonal_of_positions_and_gradients_by_numpy():
    """sqrt(Var q / Var g); for a Gaussian with independent coordinates exact from three draws."""
    scale = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
    q = numbers(3, 3, seed=4) * scale
    current = diagonal_metric(torch.ones(3, dtype=torch.float64))
    moments = adaptation.add_to_moments(adaptation.moments_for(q, current), q, -q / scale**2)
    np.testing.assert_allclose(adaptation.estimate_metric(moments, current).inverse_mass, scale**2, rtol=1e-9)
    grad = numbers(3, 3, seed=5)
    moments = adaptation.add_to_moments(adaptation.moments_for(q, current), q, grad)
    wanted = np.sqrt(q.numpy().var(0) / grad.numpy().var(0))
    np.testing.assert_allclose(adaptation.estimate_metric(moments, current).inverse_mass, wanted, rtol=1e-9)


@pytest.mark.parametrize("kind", ["diagonal", "low-rank 2"])
def test_a_group_without_a_usable_estimate_keeps_its_metric(kind):
    """Positions that stand still, in one of two groups; the other group has that of a run without it."""
    q = numbers(20, 2, 3, DIM, seed=6)
    q[:, 0] = 1.0
    grad = -q * torch.linspace(0.5, 2.0, DIM, dtype=torch.float64)
    start, _ = metric_of(kind, (2,))
    moments = adaptation.moments_for(q[0], start)
    alone = Metric(*(part[1] if isinstance(part, torch.Tensor) else part for part in start))
    moments_alone = adaptation.moments_for(q[0, 1], alone)
    for t in range(20):
        moments = adaptation.add_to_moments(moments, q[t], grad[t])
        moments_alone = adaptation.add_to_moments(moments_alone, q[t, 1], grad[t, 1])
    found, wanted = (
        adaptation.estimate_metric(moments, start),
        adaptation.estimate_metric(moments_alone, alone),
    )
    p = numbers(2, 4, DIM, seed=7)
    torch.testing.assert_close(found.velocity(p)[0], start.velocity(p)[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.velocity(p)[1], wanted.velocity(p[1]), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(found.velocity(p)[1], start.velocity(p)[1])


def test_rows_kept_are_spread_over_the_window():
    """3000 transitions of 3 chains in 512 rows: every k-th transition, k a power of 2, gradients beside positions."""
    q = torch.zeros(3, 4, dtype=torch.float64)
    kept = _low_rank.start_kept(q, rank=4)
    assert kept.positions.shape[-2] == 510
    for t in range(3000):
        q[:, 0] = torch.tensor([t, t + 0.25, t + 0.5])
        kept = _low_rank.keep(kept, q, -q)
    rows = kept.positions[: kept.filled, 0]
    stride = 2 ** int(np.log2(kept.stride))
    assert kept.stride == stride
    assert rows.tolist() == [i * stride + c / 4 for i in range(len(rows) // 3) for c in range(3)]
    assert rows[-1] > 2900
    torch.testing.assert_close(kept.gradients, -kept.positions)


def test_rows_kept_of_many_chains_come_from_all_of_them():
    q = torch.arange(4096, dtype=torch.float64).unsqueeze(-1)
    kept = _low_rank.start_kept(q, rank=4)
    for _ in range(8):
        kept = _low_rank.keep(kept, q, q)
    assert kept.filled == kept.positions.shape[-2] == 512
    assert len(kept.positions.unique()) == 512
    again = _low_rank.keep(kept, q, q)  # a ninth transition is not due: every second is kept from now on
    assert again.filled == 256 + 64


def test_largest_variance_is_not_fooled_by_few_rows():
    """200 rows in 1000 dimensions: the sample covariance claims (1 + sqrt(5))^2 = 10 where all variances are 1."""
    rows = numbers(200, 1000, seed=1)
    assert float(torch.linalg.eigvalsh(rows @ rows.T / 200)[-1]) > 8
    assert float(_low_rank.largest_variance(rows)) == pytest.approx(1.0, abs=0.4)
    rows[:, 0] *= 12
    assert float(_low_rank.largest_variance(rows)) == pytest.approx(144.0, rel=0.4)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low-rank 2"])
def test_sampling_under_each_metric_gives_the_covariance(kind):
    """Means and variances of six correlated coordinates within 4.2 errors: a false alarm for 1 in 3100 seeds each."""
    log_density, covariance = rotated(DIM, torch.logspace(-1, 1, DIM, dtype=torch.float64), seed=4)
    metric, matrix = metric_of(kind)
    evaluate = value_and_grad(log_density)
    state = nuts.init(evaluate, numbers(64, DIM, seed=1) @ torch.linalg.cholesky(covariance).T)
    # a step of 1 where the leapfrog is stable up to 2
    fastest = torch.linalg.eigvals(torch.linalg.solve(covariance, matrix)).real.max().sqrt()
    parameters = nuts.Parameters((1 / fastest).expand(1), metric)
    generator = torch.Generator().manual_seed(5)
    draws = []
    for _ in range(50):
        noise = torch.randn(64, DIM, generator=generator, dtype=torch.float64)
        uniform = torch.rand(64, generator=generator, dtype=torch.float64)
        state, _ = nuts.step(evaluate, state, parameters, noise, uniform)
        draws.append(state.q)
    q = torch.stack(draws, 1).numpy()
    axes = {"chain_axis": 0, "draw_axis": 1, "method": "mean"}
    means = q.mean((0, 1)) / array_stats.mcse(q, **axes)
    variances = ((q**2).mean((0, 1)) - covariance.diagonal().numpy()) / array_stats.mcse(q**2, **axes)
    assert np.abs([means, variances]).max() < 4.2


def spiked(dim, spikes):
    """A Gaussian of unit variance but in a few random directions: log density, directions (dim, k), variances (k)."""
    variances = torch.tensor(spikes, dtype=torch.float64)
    directions = torch.linalg.qr(numbers(dim, len(spikes), seed=9))[0]
    return (
        lambda q: -0.5 * (q.square().sum(-1) + ((1 / variances - 1) * (q @ directions).square()).sum(-1)),
        directions,
        variances,
    )


def test_chees_above_500_coordinates_takes_a_low_rank_metric_and_keeps_the_floor():
    """Standard deviations 20 and 0.1 among 520 ones: with the metric a dozen steps at most, and a T of a few units.

    The variances along both directions and along ten others lie within 4.2 errors: a false alarm for 1 in 3100 seeds.
    """
    log_density, directions, variances = spiked(520, [400.0, 0.01])
    run = chees.run(log_density, 0.5 * numbers(32, 520, seed=2), num_warmup=100, num_draws=60, seed=4)
    assert run.inverse_mass.shape == (520,)
    assert 1.2 < float(run.trajectory_length) < 6
    assert float(run.stats["num_steps"].double().mean()) < 16
    along = torch.cat([run.draws @ directions, run.draws[..., :10]], -1).numpy()
    # of the coordinates: 1 + sum of u_i^2 (variance - 1)
    wanted = np.concatenate([variances, (1 + (directions[:10].square() * (variances - 1)).sum(-1))])
    error = array_stats.mcse(along**2, chain_axis=0, draw_axis=1, method="mean")
    assert np.abs(((along**2).mean((0, 1)) - wanted) / error).max() < 4.2


def test_nuts_with_a_low_rank_metric_needs_short_trees():
    """Such a target with four chains: trees of 15 steps or so, at a condition number of 200."""
    log_density, directions, variances = spiked(100, [400.0, 0.01])
    start = 0.5 * numbers(4, 100, seed=2)
    run = nuts.run(log_density, start, num_warmup=100, num_draws=40, metric="low-rank", seed=4)
    assert run.inverse_mass.shape == (100,)
    assert float(run.stats["num_steps"].double().mean()) <= 15
    along = (run.draws @ directions).var((0, 1))
    torch.testing.assert_close(along, variances, rtol=0.5, atol=0)
