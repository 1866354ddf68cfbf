"""MAMS: exactness of the transition, moments, what warm-up adapts and freezes, independence of chains and groups."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats

from bayesdl.errors import ConvergenceWarning, SettingError, ShapeError
from bayesdl.samplers import mams, summarize
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import dense_metric, diagonal_metric, init
from tests import posteriordb

AXES = {"chain_axis": 0, "draw_axis": 1}
INTEGRATORS = pytest.mark.parametrize("integrator", ["minimal-norm", "leapfrog"])


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banana(q):
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.3 - 0.5 * (q[..., 2:] ** 2).sum(-1)


def logistic(q):
    return (-q - 2 * torch.nn.functional.softplus(-q)).sum(-1)


def parameters_of(step_size, metric, length=1.0):
    return mams.Parameters(torch.tensor([step_size]).double(), metric, torch.tensor(length).double())


def agree(draws, mean, covariance):
    """Largest |z| of the means and variances of draws (C, N, D) against the truth, by their Monte Carlo errors."""
    squares = (draws - mean) ** 2
    z = [
        (draws.mean((0, 1)) - mean) / array_stats.mcse(draws, method="mean", **AXES),
        (squares.mean((0, 1)) - np.diag(covariance)) / array_stats.mcse(squares, method="mean", **AXES),
    ]
    return np.abs(z).max()


# ---- one transition --------------------------------------------------------------------------------------------------


def independent_parts(q, name):
    """Coordinates with known laws, independent of each other under the target: uniform numbers."""
    if name == "banana":
        q = torch.stack([q[:, 0], (q[:, 1] - q[:, 0] ** 2) / 0.3**0.5], -1)
        return stats.norm.cdf(q.numpy())
    return stats.logistic.cdf(q.numpy())


@INTEGRATORS
@pytest.mark.parametrize("name", ["banana", "logistic"])
def test_a_transition_leaves_exact_draws_exact(integrator, name):
    """20 000 exact draws of a banana in 2 and of logistic laws in 20 coordinates; one coarse transition under a metric.

    Kolmogorov and Smirnov's test of every coordinate, and z-scores of all means, second moments and correlations: 318
    comparisons of level 1e-5, so a false alarm for 1 in 300 sets of seeds. Accepting every end instead is seen at once,
    and so is an accept step that forgets the kinetic energy.
    """
    if name == "banana":
        noise = numbers(20_000, 2, seed=1)
        q = torch.stack([noise[:, 0], noise[:, 0] ** 2 + 0.3**0.5 * noise[:, 1]], -1)
        log_density, size, num_steps = banana, 0.7, 4
    else:
        u = uniforms(20_000, 20, seed=1)
        q, log_density, size, num_steps = u.log() - (-u).log1p(), logistic, 12.0, 2
    size, num_steps = (size, num_steps) if integrator == "minimal-norm" else (size / 2, 2 * num_steps)
    dim = q.shape[-1]
    root = torch.diag(torch.linspace(0.8, 1.6, dim).double()) + 0.3 / dim * numbers(dim, dim, seed=2).tril()
    parameters, evaluate = parameters_of(size, dense_metric(root @ root.T)), value_and_grad(log_density)
    state, noise, uniform = init(evaluate, q), numbers(20_000, dim, seed=3), uniforms(20_000, seed=4)

    def worst(after):
        """The smallest p-value of them all."""
        u = independent_parts(after, name)
        found = [stats.kstest(u[:, i], "uniform").pvalue for i in range(dim)]
        normal = math.sqrt(12) * (u - 0.5)
        products = np.einsum("ni,nj->nij", normal, normal)[:, *np.triu_indices(dim)]
        for x, mean in ((normal, 0.0), (products, np.eye(dim)[np.triu_indices(dim)])):
            z = (x.mean(0) - mean) / (x.std(0) / len(x) ** 0.5)
            found += list(2 * stats.norm.sf(np.abs(z)))
        return min(found)

    after, info = mams.step(evaluate, state, parameters, noise, uniform, num_steps, integrator)
    assert 0.3 < float(info.acceptance_rate.mean()) < 0.93
    assert float((after.q - q).abs().mean()) > 0.4
    assert worst(after.q) > 1e-5
    everything, _ = mams.step(evaluate, state, parameters, noise, 0 * uniform, num_steps, integrator)
    assert worst(everything.q) < 1e-7
    potential = torch.exp(everything.log_density - state.log_density)
    forgetful = torch.where((uniform < potential).unsqueeze(-1), everything.q, q)
    assert worst(forgetful) < 1e-7


def test_a_transition_is_a_pure_function_and_reports_what_it_did():
    evaluate = value_and_grad(logistic)
    state = init(evaluate, 2 * numbers(50, 4, seed=1))
    before = [part.clone() for part in state]
    parameters = parameters_of(5.0, diagonal_metric(torch.ones(4).double()))
    arguments = (evaluate, state, parameters, numbers(50, 4, seed=2), uniforms(50, seed=3), 2)
    (first, info), (second, _) = mams.step(*arguments), mams.step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert 0 < int(info.accepted.sum()) < 50
    assert torch.equal(first.q[~info.accepted], state.q[~info.accepted])
    assert torch.equal(info.accepted, arguments[4] < info.acceptance_rate)
    torch.testing.assert_close(first.log_density, logistic(first.q))
    torch.testing.assert_close(first.grad, -torch.tanh(first.q / 2))
    assert torch.equal(info.energy, -first.log_density)
    assert info.num_steps.tolist() == [2] * 50
    assert info.num_gradients == 4


def test_groups_may_take_different_numbers_of_steps():
    evaluate = value_and_grad(logistic)
    state, noise, uniform = init(evaluate, numbers(3, 8, 4, seed=1)), numbers(8, 4, seed=2), uniforms(8, seed=3)
    metric = diagonal_metric(torch.ones(3, 4).double())
    parameters = mams.Parameters(torch.tensor([[0.6], [0.9], [1.3]]).double(), metric, torch.ones(3).double())
    after, info = mams.step(evaluate, state, parameters, noise, uniform, torch.tensor([4, 1, 2]))
    assert info.num_gradients == 8
    assert info.num_steps[:, 0].tolist() == [4, 1, 2]
    for i, num in enumerate((4, 1, 2)):
        alone = mams.Parameters(parameters.step_size[i], diagonal_metric(torch.ones(4).double()), torch.ones(()))
        own, _ = mams.step(evaluate, type(state)(*(part[i] for part in state)), alone, noise, uniform, num)
        torch.testing.assert_close(after.q[i], own.q, rtol=1e-12, atol=1e-12)


def test_ends_that_are_not_finite_or_far_too_high_are_rejected_as_divergences():
    """A wall, a NaN, an infinity, and a well so steep that one step gains more than 1000."""

    def log_density(q):
        a, b = q.unbind(-1)
        value = torch.where(a > 1, -torch.inf, torch.where(a < -1, torch.nan, -0.5 * a**2))
        return torch.where(b.abs() > 1, torch.inf, value - 1e6 * (b - 0.5).square())

    evaluate = value_and_grad(log_density)
    q = torch.tensor([[0.9, 0.5], [-0.9, 0.5], [0.0, 0.5], [0.0, 0.5], [0.0, 0.5]], dtype=torch.float64)
    push = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    size = torch.tensor([0.3, 0.3, 2.0, 0.1, 0.1], dtype=torch.float64)
    parameters = mams.Parameters(size, diagonal_metric(torch.ones(2).double()), torch.ones(()).double())
    state, info = mams.step(evaluate, init(evaluate, q), parameters, push, torch.zeros(5).double(), 1, "leapfrog")
    assert info.diverging.tolist() == [True, True, True, True, False]
    assert torch.equal(state.q[:4], q[:4])
    assert not torch.equal(state.q[4], q[4])
    assert info.acceptance_rate[:4].tolist() == [0.0] * 4


def test_a_chain_outside_the_support_takes_the_first_way_in():
    evaluate = value_and_grad(lambda q: torch.where(q[..., 0] < 0, torch.nan, -q.sum(-1)))
    state = init(evaluate, torch.tensor([[-0.5, 1.0], [-0.5, 1.0]], dtype=torch.float64))
    parameters = parameters_of(1.0, diagonal_metric(torch.ones(2).double()))
    push = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    state, info = mams.step(evaluate, state, parameters, push, torch.full((2,), 0.99).double(), 1, "leapfrog")
    assert info.accepted.tolist() == [True, False]
    assert state.q[:, 0].tolist() == [0.5, -0.5]


def test_lengths_follow_the_van_der_corput_sequence():
    assert [mams.van_der_corput(i) for i in range(1, 8)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]
    settings = {"num_warmup": 0, "num_draws": 7, "step_size": 0.25, "trajectory_length": 2.0}
    run = mams.run(logistic, numbers(3, 2), **settings)
    # ceil(2 u T / eps) with 2 T / eps = 16
    assert run.stats["num_steps"][0].tolist() == [8, 4, 12, 2, 10, 6, 14]
    assert mams.run(logistic, numbers(3, 2), max_steps=5, **settings).stats["num_steps"].max() == 5


# ---- moments ---------------------------------------------------------------------------------------------------------


def test_rotated_ill_conditioned_gaussian():
    """d = 20, condition 1e4, from afar: moments within 4.5 Monte Carlo errors (40 comparisons: 1 in 3600 seeds)."""
    basis = torch.linalg.qr(numbers(20, 20, seed=1))[0]
    covariance = basis @ torch.diag(torch.logspace(-2, 2, 20, dtype=torch.float64)) @ basis.T
    precision, mean = torch.linalg.inv(covariance), 3 * numbers(20, seed=2)

    def log_density(q):
        return -0.5 * (((q - mean) @ precision) * (q - mean)).sum(-1)

    run = mams.run(log_density, 4 * uniforms(32, 20, seed=3) - 2, num_warmup=250, num_draws=80, seed=4)
    assert run.inverse_mass.shape == (20, 20)
    assert agree(run.draws.numpy(), mean.numpy(), covariance.numpy()) < 4.5
    assert summarize(run)["divergences"] == 0
    assert summarize(run)["acceptance_rate"] == pytest.approx(0.9, abs=0.06)
    # whitened, the target is nearly round: a trajectory is a step or two
    assert float(run.stats["num_steps"].double().mean()) < 4


def test_length_of_a_poor_metric_reaches_the_widest_direction():
    """A narrow target in one direction of 20 only: an identity metric needs trajectories across the wide ones."""
    scales = torch.cat([torch.full((1,), 0.1), torch.full((19,), 3.0)]).double()
    start = scales * numbers(16, 20, seed=1)
    run = mams.run(
        lambda q: -0.5 * (q / scales).square().sum(-1), start, num_warmup=120, num_draws=60, metric="identity"
    )
    assert float(run.trajectory_length) > 0.25 * 3 * 20**0.5
    assert float(run.stats["num_steps"].double().mean()) > 5
    assert agree(run.draws.numpy(), np.zeros(20), np.diag(scales.numpy() ** 2)) < 4.5


def test_eight_schools(data_dir):
    """Means and standard deviations of the reference draws, 20 comparisons at 4 errors: 1 in 800 seeds."""
    name = "eight_schools-eight_schools_noncentered"
    reference = posteriordb.load(data_dir, name)
    problem = posteriordb.MODELS[name](reference.data)
    run = mams.run(
        problem.log_density, 4 * uniforms(32, 10, seed=1) - 2, num_warmup=200, num_draws=150, seed=2, target_accept=0.95
    )
    ours, names = posteriordb.stacked(problem.transform(run.draws))
    assert names == reference.names
    for power in (1, 2):
        centre = 0 if power == 1 else reference.draws.mean((0, 1))
        found, wanted = (ours - centre) ** power, (reference.draws - centre) ** power
        error = np.hypot(*(array_stats.mcse(x, method="mean", **AXES) for x in (found, wanted)))
        assert (np.abs(found.mean((0, 1)) - wanted.mean((0, 1))) / error).max() < 4


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_chain_among_many_equals_the_chain_alone(metric):
    inverse_mass = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    inverse_mass = torch.diag(inverse_mass) + 0.2 if metric == "dense" else inverse_mass
    start = numbers(16, 3, seed=1)
    settings = {"num_warmup": 0, "num_draws": 40, "metric": metric, "seed": 3, "trajectory_length": 2.2}
    settings |= {"step_size": 0.3, "inverse_mass": inverse_mass}
    many = mams.run(banana, start, **settings)
    assert many.stats["num_steps"].unique().numel() > 5
    for num in (1, 5):
        few = mams.run(banana, start[:num], **settings)
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=0, atol=1e-8)


@pytest.mark.parametrize(("groups", "metric"), [((3,), "diagonal"), ((2, 2), "dense")])
def test_groups_in_one_run_equal_a_loop_over_them(groups, metric):
    scale, start = (0.5 * numbers(*groups, 3, seed=1)).exp(), numbers(*groups, 8, 3, seed=4)
    settings = {"num_warmup": 24, "num_draws": 4, "metric": metric, "seed": 7, "max_steps": 4}
    together = mams.run(lambda q: -0.5 * (q / scale.unsqueeze(-2)).square().sum(-1), start, **settings)
    assert together.step_size.unique().numel() == math.prod(groups)
    for place in np.ndindex(*groups):
        own = scale[place]
        alone = mams.run(lambda q, own=own: -0.5 * (q / own).square().sum(-1), start[place], **settings)
        # Warm-up feeds the rounding of batched products back on itself, and long trajectories would amplify it.
        torch.testing.assert_close(together.draws[place], alone.draws, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.trajectory_length[place], alone.trajectory_length, rtol=1e-6, atol=0)


def test_nothing_adapts_after_warmup(monkeypatch):
    seen, step = [], mams.step

    def spy(evaluate, state, parameters, *rest):
        seen.append(parameters)
        return step(evaluate, state, parameters, *rest)

    monkeypatch.setattr(mams, "step", spy)
    run = mams.run(logistic, numbers(8, 3), num_warmup=60, num_draws=20)
    assert all(p is seen[-1] for p in seen[-20:])
    assert not torch.equal(seen[-21].step_size, seen[-20].step_size)
    assert torch.equal(seen[-1].step_size.squeeze(-1), run.step_size)
    assert torch.equal(seen[-1].trajectory_length, run.trajectory_length)


def test_a_given_length_is_kept():
    run = mams.run(logistic, numbers(8, 3), num_warmup=60, num_draws=3, trajectory_length=1.7)
    assert float(run.trajectory_length) == 1.7


def test_gradients_are_counted():
    calls = itertools.count()

    def counted(q):
        next(calls)
        return logistic(q)

    run = mams.run(counted, numbers(8, 3), num_warmup=40, num_draws=10)
    assert run.num_gradients == next(calls) - 1


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize("budget", [60, 500])
def test_a_run_cut_short_and_resumed_gives_the_same_draws(tmp_path, budget, monkeypatch):
    """A run that fails in warm-up or in sampling leaves a checkpoint, from which another goes on to the same draws."""
    settings = {"num_warmup": 60, "num_draws": 25, "seed": 5, "thin": 2}
    whole = mams.run(banana, numbers(6, 3, seed=1), **settings)
    monkeypatch.setattr("bayesdl.samplers._checkpoint.SECONDS", 0.0)
    calls = itertools.count()

    def dies(q):
        if next(calls) > budget:
            raise KeyboardInterrupt
        return banana(q)

    with pytest.raises(KeyboardInterrupt):
        mams.run(dies, numbers(6, 3, seed=1), checkpoint=tmp_path / "run", **settings)
    again = mams.run(banana, numbers(6, 3, seed=1), checkpoint=tmp_path / "run", **settings)
    assert torch.equal(again.draws, whole.draws)
    assert all(torch.equal(again.stats[name].nan_to_num(), whole.stats[name].nan_to_num()) for name in whole.stats)
    assert torch.equal(again.trajectory_length, whole.trajectory_length)
    with pytest.raises(SettingError, match="target_accept"):
        mams.run(banana, numbers(6, 3, seed=1), checkpoint=tmp_path / "run", target_accept=0.8, **settings)


def test_a_budget_ends_the_run():
    run = mams.run(logistic, numbers(4, 3), num_warmup=40, num_draws=10_000, max_gradients=2000)
    assert run.stopped_by == "max_gradients"
    assert 2000 <= run.num_gradients < 2100
    with pytest.warns(ConvergenceWarning, match="max_gradients ended warm-up"):
        short = mams.run(logistic, numbers(4, 3), num_warmup=400, num_draws=10, max_gradients=50)
    assert short.draws.shape[-2] == 1


def test_single_precision_and_few_transitions():
    run = mams.run(logistic, numbers(4, 3).float(), num_warmup=8, num_draws=3)
    assert run.draws.dtype == torch.float32
    assert run.draws.isfinite().all()
    plain = mams.run(logistic, numbers(4, 3), num_warmup=0, num_draws=3)
    assert float(plain.trajectory_length) == pytest.approx(3**0.5)


@pytest.mark.gpu
def test_runs_on_the_gpu_and_matches_the_moments():
    """10 comparisons at 4.5 errors: a false alarm for 1 in 14 000 seeds."""
    run = mams.run(lambda q: -0.5 * q.square().sum(-1), numbers(64, 5).float().cuda(), num_warmup=100, num_draws=80)
    assert run.draws.is_cuda
    assert agree(run.draws.double().cpu().numpy(), np.zeros(5), np.eye(5)) < 4.5


@pytest.mark.parametrize(
    ("error", "word", "change"),
    [
        (SettingError, "max_steps", {"max_steps": 0}),
        (SettingError, "metric", {"metric": "full"}),
        (SettingError, "integrator", {"integrator": "euler"}),
        (SettingError, "trajectory_length", {"trajectory_length": -1.0}),
        (SettingError, "target_accept", {"target_accept": 1.0}),
        (ShapeError, "initial", {"initial": torch.zeros(2)}),
        (ShapeError, "two coordinates", {"initial": torch.zeros(3, 1)}),
    ],
)
def test_wrong_calls_fail_at_the_door(error, word, change):
    settings = {"log_density": logistic, "initial": numbers(3, 3), "num_warmup": 2, "num_draws": 2, **change}
    with pytest.raises(error, match=word) as caught:
        mams.run(settings.pop("log_density"), settings.pop("initial"), **settings)
    assert "mams.run" in str(caught.value)
