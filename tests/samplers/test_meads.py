"""MEADS: the transition leaves the target invariant, folds tune one another, and everything is frozen after warm-up."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats

from bayesdl.errors import SettingError
from bayesdl.samplers import meads, summarize
from bayesdl.samplers.base import value_and_grad
from tests import posteriordb

AXES = {"chain_axis": 0, "draw_axis": 1}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(value):
    return torch.tensor([value], dtype=torch.float64)


def logistic(q):
    return (-q - 2 * torch.nn.functional.softplus(-q)).sum(-1)


# ---- one transition --------------------------------------------------------------------------------------------------


def test_transitions_leave_exact_draws_exact():
    """20 000 exact draws of logistic laws, with exact momenta and slices; five coarse transitions change no law.

    Draws are independent, so Kolmogorov and Smirnov's test holds exactly: positions, momenta, slices and the energy,
    eight tests of level 1e-4, a false alarm for 1 in 1250 seeds. Momenta that are not turned around after a refusal,
    and slices that are not divided by the ratio, are seen at once.
    """
    u = uniforms(20_000, 3, seed=1)
    evaluate = value_and_grad(logistic)
    walk = meads.init(evaluate, u.log() - (-u).log1p(), numbers(20_000, 3, seed=2), uniforms(20_000, seed=3))
    scales = torch.tensor([2.0, 4.0, 1.0]).double()
    parameters = meads.Parameters(column(0.9), scales, column(0.3))

    def pvalues(transition):
        now = walk
        for k in range(5):
            now, info = transition(now, numbers(20_000, 3, seed=10 + k))
            assert 0.5 < float(info.acceptance_rate.mean()) < 0.95
        tests = [stats.kstest(now.state.q[:, i].numpy(), stats.logistic.cdf).pvalue for i in range(3)]
        tests += [stats.kstest(now.momentum[:, i].numpy(), stats.norm.cdf).pvalue for i in range(3)]
        tests.append(stats.kstest(now.slice.numpy(), stats.uniform(-1, 2).cdf).pvalue)
        squares = now.momentum.square().sum(-1).numpy()
        return [*tests, stats.kstest(squares, stats.chi2(3).cdf).pvalue]

    def right(now, noise):
        return meads.step(evaluate, now, parameters, noise)

    def unslit(now, noise):
        after, info = meads.step(evaluate, now, parameters, noise)
        slices = torch.remainder(now.slice + 1 + 0.15, 2) - 1
        return after._replace(slice=slices), info

    assert min(pvalues(right)) > 1e-4
    assert min(pvalues(unslit)) < 1e-6


def test_a_transition_is_that_of_hand_arithmetic():
    """One chain at values far from the defaults: damping, drift, leapfrog in scaled coordinates, refusal."""
    evaluate = value_and_grad(lambda q: -2 * q.square().sum(-1))
    q, p, z = (torch.tensor([v]).double() for v in ([0.3, -0.2], [0.5, 1.0], [-0.4, 0.8]))
    scale, eps, alpha = torch.tensor([0.5, 2.0]).double(), 0.2, 0.36
    parameters = meads.Parameters(column(eps), scale.square(), column(alpha))
    for start in (0.95, -0.3):
        walk = meads.Walk(meads.init(evaluate, q, p, torch.zeros(1)).state, p, column(start))
        after, info = meads.step(evaluate, walk, parameters, z)
        kicked = 0.8 * p + 0.6 * z
        half = kicked + 0.5 * eps * scale * (-4 * q)
        end = q + eps * scale * half
        last = half + 0.5 * eps * scale * (-4 * end)
        ratio = float(
            (
                0.5 * kicked.square().sum() + 2 * q.square().sum() - 0.5 * last.square().sum() - 2 * end.square().sum()
            ).exp()
        )
        drifted = (start + 0.18 + 1) % 2 - 1
        assert float(info.acceptance_rate) == pytest.approx(min(1, ratio))
        if abs(drifted) < ratio:
            torch.testing.assert_close((after.state.q, after.momentum), (end, last))
            assert float(after.slice) == pytest.approx(drifted / ratio)
        else:
            torch.testing.assert_close((after.state.q, after.momentum), (q, -kicked))
            assert float(after.slice) == pytest.approx(drifted)


def test_the_eigenvalue_is_that_of_the_formula():
    """sum lambda^2 / sum lambda of a known covariance, from 4000 rows; and without bias in the squares for few."""
    eigenvalues = torch.tensor([9.0, 4.0, 1.0, 0.25]).double()
    basis = torch.linalg.qr(numbers(4, 4, seed=1))[0]
    x = numbers(4000, 4, seed=2) * eigenvalues.sqrt() @ basis.T
    wanted = float(eigenvalues.square().sum() / eigenvalues.sum())
    assert float(meads.largest_eigenvalue(x)) == pytest.approx(wanted, rel=0.05)
    few = numbers(3000, 5, 4, seed=3) * eigenvalues.sqrt()
    products = few @ few.mT
    pairs = (products.square().sum((-2, -1)) - products.diagonal(dim1=-2, dim2=-1).square().sum(-1)) / 20
    assert float(pairs.mean()) == pytest.approx(float(eigenvalues.square().sum()), rel=0.1)
    firsts = products.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(meads.largest_eigenvalue(few), pairs / firsts)


def test_parameters_are_those_of_the_paper():
    """Step size, damping and variances from the ensemble, written out in NumPy."""
    q = numbers(30, 3, seed=4) * torch.tensor([1.0, 5.0, 0.2]).double() + 3
    grad = numbers(30, 3, seed=5) * torch.tensor([2.0, 0.1, 6.0]).double()
    found = meads.tune(meads.State(q, q[:, 0], grad), 7)

    def eigenvalue(x):
        inner = (x @ x.T) ** 2
        off = (inner.sum() - np.trace(inner)) / (len(x) * (len(x) - 1))
        return off / ((x**2).sum() / len(x))

    sd = q.numpy().std(0, ddof=1)
    eps = min(1, 0.5 / eigenvalue(grad.numpy() * sd) ** 0.5)
    gamma = max(eigenvalue((q.numpy() - q.numpy().mean(0)) / sd) ** -0.5, 1 / (8 * eps))
    assert float(found.step_size) == pytest.approx(eps)
    assert float(found.damping) == pytest.approx(1 - math.exp(-2 * eps * gamma))
    np.testing.assert_allclose(found.inverse_mass, sd**2)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def agree(draws, mean, variance):
    """Largest |z| of means and variances of draws (C, N, D) by their Monte Carlo errors."""
    squares = (draws - mean) ** 2
    z = [
        (draws.mean((0, 1)) - mean) / array_stats.mcse(draws, method="mean", **AXES),
        (squares.mean((0, 1)) - variance) / array_stats.mcse(squares, method="mean", **AXES),
    ]
    return np.abs(z).max()


def test_a_gaussian_of_many_scales():
    """Standard deviations from 0.03 to 30 in 12 dimensions: 24 moments within 4.5 errors, 1 in 6000 seeds."""
    sd = torch.logspace(-1.5, 1.5, 12, dtype=torch.float64)
    mean = 3 * numbers(12, seed=1)
    start = mean + sd * numbers(64, 12, seed=2)
    run = meads.run(
        lambda q: -0.5 * ((q - mean) / sd).square().sum(-1), start, num_warmup=300, num_draws=80, thin=8, seed=3
    )
    assert agree(run.draws.numpy(), mean.numpy(), sd.square().numpy()) < 4.5
    assert float(array_stats.ess(run.draws.numpy(), method="bulk", **AXES).min()) > 500
    torch.testing.assert_close(run.inverse_mass, sd.square(), rtol=0.8, atol=0)
    assert run.num_gradients == 1 + 300 + 640
    assert summarize(run)["acceptance_rate"] > 0.8


def test_far_starts_arrive():
    """From 20 standard deviations away, at very different heights."""
    sd = torch.tensor([0.1, 1.0, 10.0]).double()
    start = sd * (20 * uniforms(64, 3, seed=1) - 10)
    run = meads.run(lambda q: -0.5 * (q / sd).square().sum(-1), start, num_warmup=400, num_draws=60, thin=5, seed=1)
    assert agree(run.draws.numpy(), np.zeros(3), sd.square().numpy()) < 4.5


def test_eight_schools_agrees_with_the_reference_draws(data_dir):
    """20 moments within 4 errors, which come from ArviZ: a false alarm for 1 in 800 seeds."""
    reference = posteriordb.load(data_dir, "eight_schools-eight_schools_noncentered")
    problem = posteriordb.eight_schools_noncentered(reference.data)
    start = 4 * uniforms(64, 10, seed=4) - 2
    run = meads.run(problem.log_density, start, num_warmup=500, num_draws=100, thin=10, seed=5)
    ours, names = posteriordb.stacked(problem.transform(run.draws))
    assert names == reference.names
    (ours, our_error), (theirs, their_error) = posteriordb.moments(ours), posteriordb.moments(reference.draws)
    error = np.hypot(our_error, their_error)
    assert np.abs((ours - theirs) / error).max() < 4
    assert (error < 0.1 * np.tile(theirs[len(names) :], 2)).all()
    # momenta that keep their energy for many transitions lower E-BFMI without harm
    assert summarize(run)["divergences"] < 20


def test_nothing_adapts_after_warmup(monkeypatch):
    seen, step = [], meads.step

    def spy(evaluate, walk, parameters, noise):
        seen.append(parameters)
        return step(evaluate, walk, parameters, noise)

    monkeypatch.setattr(meads, "step", spy)
    run = meads.run(logistic, numbers(16, 3), num_warmup=30, num_draws=10, thin=2)
    assert len(seen) == 50
    assert all(p is seen[30] for p in seen[30:])
    assert seen[29].step_size.shape == (16,)
    assert torch.equal(seen[30].step_size.squeeze(-1), run.step_size)


def test_a_fold_obeys_another_and_one_rests(monkeypatch):
    """Within a transition a fold's parameters come from the fold before it, never from its own chains."""
    seen, step = [], meads.step

    def spy(evaluate, walk, parameters, noise):
        seen.append((walk, parameters))
        return step(evaluate, walk, parameters, noise)

    monkeypatch.setattr(meads, "step", spy)
    meads.run(logistic, numbers(20, 3, seed=1), num_warmup=9, num_draws=1)
    for (before, parameters), (after, _) in itertools.pairwise(seen[:9]):
        moved = (before.momentum != after.momentum).any(-1)
        assert int((~moved).sum()) == 5
        first = parameters.inverse_mass[:, 0]
        assert len(first.unique()) == 4
        for value in first.unique():
            own = first == value
            assert int(own.sum()) == 5
            assert not torch.allclose(parameters.inverse_mass[own][0], before.state.q[own].var(0))


def test_chain_among_many_equals_the_chain_alone():
    """With parameters given, the first chains of 64 are those of a run of 1 and of a run of 5."""
    start = numbers(64, 3, seed=1)
    parameters = meads.Parameters(column(0.3), torch.tensor([1.0, 3.0, 2.0]).double(), column(0.2))
    settings = {"num_warmup": 0, "num_draws": 40, "parameters": parameters, "seed": 3}
    many = meads.run(logistic, start, **settings)
    assert float(many.draws.std()) > 0.5
    for num in (1, 5):
        few = meads.run(logistic, start[:num], **settings)
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=0, atol=1e-9)


def test_groups_in_one_run_equal_a_loop_over_them():
    scale, start = numbers(3, 2, seed=1).exp(), numbers(3, 16, 2, seed=2)
    settings = {"num_warmup": 40, "num_draws": 10, "thin": 2, "seed": 7}
    together = meads.run(lambda q: -0.5 * (q / scale.unsqueeze(-2)).square().sum(-1), start, **settings)
    assert together.step_size.shape == (3,)
    for i, own in enumerate(scale):
        alone = meads.run(lambda q, own=own: -0.5 * (q / own).square().sum(-1), start[i], **settings)
        torch.testing.assert_close(alone.draws, together.draws[i], rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(alone.inverse_mass, together.inverse_mass[i])


def test_an_interrupted_run_goes_on_with_the_same_draws(tmp_path, monkeypatch):
    monkeypatch.setattr("bayesdl.samplers._checkpoint.Checkpoint.due", lambda self: True)
    count = []

    def log_density(q):
        count.append(1)
        if len(count) == 35:
            raise KeyboardInterrupt
        return logistic(q)

    settings = {"num_warmup": 20, "num_draws": 10, "thin": 3, "seed": 4}
    with pytest.raises(KeyboardInterrupt):
        meads.run(log_density, numbers(16, 2), checkpoint=tmp_path / "run", **settings)
    resumed = meads.run(log_density, numbers(16, 2), checkpoint=tmp_path / "run", **settings)
    assert torch.equal(resumed.draws, meads.run(logistic, numbers(16, 2), **settings).draws)


def test_a_budget_and_blocks():
    settings = {"num_warmup": 20, "num_draws": 30, "seed": 4}
    whole = meads.run(logistic, numbers(16, 2), **settings)
    blocks = meads.run(logistic, numbers(16, 2), chain_batch=5, **settings)
    torch.testing.assert_close(blocks.draws, whole.draws, rtol=0, atol=1e-9)
    short = meads.run(logistic, numbers(16, 2), max_gradients=31, **settings)
    assert torch.equal(short.draws, whole.draws[:, :10])
    assert short.stopped_by == "max_gradients"


def test_float32_and_too_few_chains():
    run = meads.run(logistic, numbers(16, 2).float(), num_warmup=30, num_draws=5)
    assert run.draws.dtype == torch.float32
    with pytest.raises(SettingError, match="16 chains"):
        meads.run(logistic, numbers(8, 2), num_warmup=10, num_draws=5)
