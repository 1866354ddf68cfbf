"""Pathfinder: its Gaussians against dense arithmetic, its weights against ArviZ, targets that are Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats

from bayesdl.errors import NumericalError, SettingError, ShapeError
from bayesdl.samplers import _pareto, hmc, pathfinder, smc
from tests import posteriordb


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scattered(num, dim, seed=0):
    return 4 * torch.rand(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2


def gaussian(dim, condition, seed=1):
    """A rotated Gaussian of given condition number, and the log of its integral."""
    basis = torch.linalg.qr(numbers(dim, dim, seed=seed))[0]
    half = 0.5 * math.log10(condition)
    covariance = basis @ torch.diag(torch.logspace(-half, half, dim, dtype=torch.float64)) @ basis.T
    mean, precision = numbers(dim, seed=seed + 1), torch.linalg.inv(covariance)
    integral = 1.5 + 0.5 * float(torch.logdet(2 * math.pi * covariance))
    return lambda q: 1.5 - 0.5 * (((q - mean) @ precision) * (q - mean)).sum(-1), mean, covariance, integral


def bumpy(q):
    """Not Gaussian, with curvature that changes along a path."""
    return -(q.square() + 0.3 * q**4).sum(-1) - 0.5 * (q[..., 0] - q[..., 1] ** 2).square() + torch.sin(q).sum(-1)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_the_inverse_hessian_is_that_of_successive_bfgs_updates():
    """The factors at a point against the recursion H <- V'H V + s s'/s'y from diag(a), written out in NumPy."""
    dim, pairs = 7, 4
    s, hessian = numbers(1, pairs, dim, seed=1), numbers(dim, dim, seed=2)
    hessian = hessian @ hessian.T + torch.eye(dim)
    y = s @ hessian + 0.05 * numbers(1, pairs, dim, seed=3)
    a, q, grad = numbers(1, dim, seed=4).exp(), numbers(1, dim, seed=5), numbers(1, dim, seed=6)
    for empty in (0, 2, 4):
        part = torch.where(torch.arange(pairs).unsqueeze(-1) >= empty, 1.0, 0.0).double()
        fit = pathfinder._gaussians(q, grad, a, s * part, y * part)
        wanted = np.diag(a[0].numpy())
        for step, turn in zip(s[0, empty:].numpy(), y[0, empty:].numpy(), strict=True):
            v = np.eye(dim) - np.outer(turn, step) / (step @ turn)
            wanted = v.T @ wanted @ v + np.outer(step, step) / (step @ turn)
        np.testing.assert_allclose(fit.covariance()[0], wanted, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(fit.variance()[0], np.diag(wanted), rtol=1e-9)
        np.testing.assert_allclose(fit.mean[0], (q + grad @ torch.as_tensor(wanted))[0], rtol=1e-9)
        assert float(fit.log_determinant()) == pytest.approx(np.linalg.slogdet(wanted)[1], rel=1e-9)
        points = numbers(1, 5, dim, seed=7)
        judge = stats.multivariate_normal(fit.mean[0].numpy(), wanted, allow_singular=False).logpdf(points[0].numpy())
        np.testing.assert_allclose(fit.log_prob(points)[0], judge, rtol=1e-9)
        root = fit.draw(torch.eye(dim).double().unsqueeze(0)) - fit.mean  # rows R e_i
        np.testing.assert_allclose(root[0].T @ root[0], wanted, rtol=1e-9, atol=1e-10)


def test_the_diagonal_is_that_of_a_bfgs_update():
    """Gilbert and Lemarechal's formula against the diagonal of the inverse of a dense BFGS update of diag(a)^-1."""
    steps, turns = numbers(2, 3, 5, seed=1), numbers(2, 3, 5, seed=2)
    turns = turns + 2 * steps
    useful = (steps * turns).sum(-1) > 0
    useful[1, 1] = False
    found = pathfinder._diagonals(steps, turns, useful)
    for path in range(2):
        a = np.ones(5)
        for t in range(3):
            s, y = steps[path, t].numpy(), turns[path, t].numpy()
            if useful[path, t]:
                hessian = np.diag(1 / a)
                hessian = hessian - np.outer(hessian @ s, hessian @ s) / (s @ hessian @ s) + np.outer(y, y) / (s @ y)
                # the formula scales diag(a) so that it agrees with the newest pair before it updates it
                scale = (y @ (a * y)) / (s @ y)
                hessian = np.diag(scale / a)
                hessian = hessian - np.outer(hessian @ s, hessian @ s) / (s @ hessian @ s) + np.outer(y, y) / (s @ y)
                a = 1 / np.diag(hessian)
            np.testing.assert_allclose(found[path, t + 1], a, rtol=1e-9)


@pytest.mark.parametrize(("shape", "num"), [(0.2, 900), (0.6, 400), (1.3, 2500), (-0.3, 225)])
def test_smoothed_weights_and_their_shape_are_those_of_arviz(shape, num):
    """At numbers whose tail of 3 sqrt(S) is a whole number, which the paper rounds up and ArviZ down."""
    raw = stats.genpareto(shape).rvs(num, random_state=np.random.default_rng(5)) + 0.1
    smoothed, khat = _pareto.smooth(torch.as_tensor(np.log(raw)) - 800)
    theirs, their_khat = array_stats.psislw(-np.log(raw), r_eff=1.0)  # it takes log likelihoods to be left out
    theirs = theirs - np.log(np.exp(theirs).sum())
    assert khat == pytest.approx(float(their_khat), rel=1e-6)
    np.testing.assert_allclose(smoothed, theirs, rtol=0, atol=1e-6)


def test_weights_without_a_tail_are_not_trusted():
    log_weight = torch.full((50,), -torch.inf).double()
    log_weight[:3] = torch.tensor([0.0, -1.0, -2.0])
    smoothed, khat = _pareto.smooth(log_weight)
    assert khat == math.inf
    torch.testing.assert_close(smoothed.exp().sum(), torch.ones(()).double())
    torch.testing.assert_close(smoothed[:3], torch.log_softmax(log_weight[:3], 0))
    assert _pareto.smooth(torch.zeros(100).double())[1] == math.inf


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_spherical_gaussian_is_found_exactly():
    """N(m, 0.3^2 I) up to a factor: mean, covariance and ELBO to rounding, equal weights."""
    mean = numbers(12, seed=1)
    found = pathfinder.run(lambda q: 2.5 - 0.5 * ((q - mean) / 0.3).square().sum(-1), scattered(6, 12))
    integral = 2.5 + 12 * math.log(0.3) + 6 * math.log(2 * math.pi)
    torch.testing.assert_close(found.fit.mean, mean.expand(6, 12), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        found.fit.covariance(), (0.09 * torch.eye(12).double()).expand(6, 12, 12), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(found.elbo, torch.full((6,), integral).double(), rtol=0, atol=1e-4)
    assert found.log_evidence == pytest.approx(integral, abs=1e-4)


@pytest.mark.parametrize(("dim", "condition"), [(3, 100.0), (5, 1e4)])
def test_a_rotated_gaussian_is_found(dim, condition):
    """The best path's covariance within a factor of 2 in every direction, its mean within a tenth of its width, and
    moments of the resampled draws within five standard errors of 1000 independent ones (2 dim comparisons)."""
    log_density, mean, covariance, integral = gaussian(dim, condition)
    found = pathfinder.run(log_density, scattered(8, dim), num_draws=1000, history=10)
    best = int(found.elbo.argmax())
    ratio = torch.linalg.eigvals(torch.linalg.solve(covariance, found.fit.covariance()[best])).real
    assert 0.5 < float(ratio.min()) <= float(ratio.max()) < 2
    away = found.fit.mean[best] - mean
    assert float(away @ torch.linalg.solve(covariance, away)) < 0.01
    assert (found.elbo <= integral + 0.05).all()
    assert float(found.elbo[best]) > integral - 0.3
    assert found.log_evidence == pytest.approx(integral, abs=0.1)
    assert found.khat < 0.7
    # weights that are not equal cost some of the 1000
    error = (covariance.diagonal() / 400).sqrt()
    assert ((found.draws.mean(0) - mean).abs() < 5 * error).all()
    assert ((found.draws.var(0) / covariance.diagonal() - 1).abs() < 5 * (2 / 400) ** 0.5).all()


def test_an_ill_conditioned_gaussian_in_fifty_dimensions():
    """Condition 1e4: beyond an L-BFGS history, so the weights say no, and still the starts lie within the target."""
    log_density, mean, covariance, integral = gaussian(50, 1e4)
    found = pathfinder.run(log_density, scattered(8, 50), history=20)
    assert found.khat > 0.7
    assert (found.elbo < integral).all()
    starts = found.starts(64)
    precision = torch.linalg.inv(covariance)
    heights = (((starts - mean) @ precision) * (starts - mean)).sum(-1)
    scatter = (((scattered(64, 50) - mean) @ precision) * (scattered(64, 50) - mean)).sum(-1)
    assert float(heights.median()) < 150 < 0.2 * float(scatter.median())  # 50 for exact draws


def test_eight_schools_is_found_nearly_and_serves_hmc(data_dir):
    """Means within 0.4 widths of the reference, widths within 40 %; HMC accepts its starts and metric."""
    reference = posteriordb.load(data_dir, "eight_schools-eight_schools_noncentered")
    problem = posteriordb.eight_schools_noncentered(reference.data)
    found = pathfinder.run(problem.log_density, scattered(8, 10, seed=3), num_draws=4000)
    ours, names = posteriordb.stacked(problem.transform(found.draws[None]))
    assert names == reference.names
    width = reference.draws.std((0, 1))
    assert (np.abs(ours.mean((0, 1)) - reference.draws.mean((0, 1))) < 0.4 * width).all()
    assert (np.abs(np.log(ours.std((0, 1)) / width)) < 0.4).all()
    run = hmc.run(
        problem.log_density,
        found.starts(8),
        num_warmup=0,
        num_draws=30,
        num_steps=8,
        step_size=0.3,
        inverse_mass=found.inverse_mass(),
    )
    assert float(run.stats["acceptance_rate"].mean()) > 0.6


def test_two_modes_get_their_shares():
    """0.2 N(-6, 1) + 0.8 N(6, 0.5^2) in two dimensions, from three starts near the one and nine near the other.

    Weights by the mixture of the paths give 0.2 whatever the numbers of paths, within 5 standard errors of 2000 draws.
    """

    def log_density(q):
        left = -0.5 * (q + 6).square().sum(-1) + math.log(0.2)
        return torch.logaddexp(left, -0.5 * ((q - 6) / 0.5).square().sum(-1) + math.log(0.8) - 2 * math.log(0.5))

    initial = torch.cat([scattered(9, 2, seed=1) - 6, scattered(3, 2, seed=2) + 6])
    found = pathfinder.run(log_density, initial, num_draws=2000)
    share = float((found.draws[:, 0] < 0).double().mean())
    assert abs(share - 0.2) < 5 * (0.16 / 2000) ** 0.5
    assert float(found.weights[:9].sum()) == pytest.approx(0.2, abs=0.02)
    torch.testing.assert_close(found.mean(), torch.full((2,), 3.6).double(), rtol=0, atol=0.3)
    assert float(found.inverse_mass()[0]) == pytest.approx(0.2 * 1 + 0.8 * 0.25 + 0.16 * 144, rel=0.05)
    assert torch.allclose(found.inverse_mass(dense=True).diagonal(), found.inverse_mass())


def test_paths_that_fail_get_no_weight():
    """Two starts without a finite density, one beside a pole; the others carry on."""

    def log_density(q):
        safe = -0.5 * q.square().sum(-1)
        return torch.where(q[..., 0] > 3, torch.nan, torch.where(q[..., 0] < -3, torch.inf, safe))

    initial = scattered(6, 4)
    initial[1, 0], initial[4, 0] = 5.0, -5.0
    found = pathfinder.run(log_density, initial)
    assert found.elbo.isfinite().tolist() == [True, False, True, True, False, True]
    assert found.weights[[1, 4]].tolist() == [0, 0]
    assert found.draws.isfinite().all()
    assert found.inverse_mass(dense=True).isfinite().all()
    assert found.starts(3000).isfinite().all()
    assert found.log_evidence == pytest.approx(2 * math.log(2 * math.pi), abs=0.02)
    with pytest.raises(NumericalError, match="finite"):
        pathfinder.run(log_density, torch.full((3, 4), 5.0).double())


def test_a_path_among_many_is_the_path_alone():
    initial = scattered(7, 3, seed=4)
    many = pathfinder.run(bumpy, initial, num_draws=50, seed=3)
    for num in (1, 2):
        few = pathfinder.run(bumpy, initial[:num], num_draws=50, seed=3)
        torch.testing.assert_close(few.elbo, many.elbo[:num], rtol=0, atol=1e-8)
        torch.testing.assert_close(few.candidates, many.candidates[: 50 * num], rtol=0, atol=1e-8)
    parts = pathfinder.run(bumpy, initial, num_draws=50, seed=3, chain_batch=13)
    torch.testing.assert_close(parts.draws, many.draws, rtol=0, atol=1e-8)


def test_blocks_of_points_change_nothing(monkeypatch):
    whole = pathfinder.run(bumpy, scattered(3, 4), num_draws=40)
    monkeypatch.setattr(pathfinder, "_MEMORY", 1)
    parts = pathfinder.run(bumpy, scattered(3, 4), num_draws=40)
    assert torch.equal(whole.point, parts.point)
    torch.testing.assert_close(whole.draws, parts.draws, rtol=0, atol=1e-10)


def test_starts_are_different_while_there_are_enough():
    found = pathfinder.run(bumpy, scattered(4, 3), num_draws=30)
    starts = found.starts(100, seed=1)
    assert len(starts.unique(dim=0)) == 100
    assert not torch.equal(starts, found.starts(100, seed=2))
    assert len(found.starts(300).unique(dim=0)) == 120


def test_it_gives_smc_a_reference_and_float32_stays():
    log_density, _, _, integral = gaussian(4, 100.0)
    found = pathfinder.run(log_density, scattered(8, 4))
    population = smc.run(log_density, found.reference(), num_particles=128, num_islands=8, seed=1)
    assert float(population.log_evidence) == pytest.approx(integral, abs=0.15)
    assert population.temperatures.shape[-1] <= 4
    narrow = pathfinder.run(bumpy, scattered(3, 2).float(), num_draws=20)
    assert narrow.draws.dtype == torch.float32
    assert narrow.fit.covariance().dtype == torch.float32


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="paths, dim"):
        pathfinder.run(bumpy, numbers(2, 3, 2))
    with pytest.raises(SettingError, match="history"):
        pathfinder.run(bumpy, numbers(3, 2), history=0)
    with pytest.raises(ShapeError, match="one per chain"):
        pathfinder.run(lambda q: q.sum(), numbers(3, 2))
