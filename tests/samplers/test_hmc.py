"""HMC: the transition leaves the target invariant, the run adapts and then freezes, chains and groups stay apart."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats

from bayesdl.errors import DtypeError, NumericalError, SettingError, ShapeError
from bayesdl.samplers import Run, chees, hmc, mams, summarize
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import dense_metric, diagonal_metric

AXES = {"chain_axis": 0, "draw_axis": 1}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(q):
    return -0.5 * q.square().sum(-1)


def gaussian(mean, covariance):
    """The log density of N(mean, covariance), groups along the leading axes of both."""
    precision = torch.linalg.inv(covariance)

    def log_density(q):
        centred = q - mean.unsqueeze(-2)
        return -0.5 * ((centred @ precision) * centred).sum(-1)

    return log_density


def agree(draws, mean, covariance):
    """Largest |z| of the means and variances of draws (C, N, D) against the truth, by their Monte Carlo errors."""
    squares = (draws - mean) ** 2
    z = [
        (draws.mean((0, 1)) - mean) / array_stats.mcse(draws, method="mean", **AXES),
        (squares.mean((0, 1)) - np.diag(covariance)) / array_stats.mcse(squares, method="mean", **AXES),
    ]
    return np.abs(z).max()


# ---- one transition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_a_transition_leaves_exact_draws_exact(kind):
    """Start 20 000 chains at exact draws of a product of logistic laws; one coarse transition leaves the law as it is.

    The draws are independent, so Kolmogorov and Smirnov's test holds exactly; six tests of level 1e-4 give a false
    alarm for fewer than 1 in 1600 seeds. Accepting everything instead is seen at once.
    """
    u = uniforms(20_000, 3, seed=1)
    q = u.log() - (-u).log1p()
    evaluate = value_and_grad(lambda q: (-q - 2 * torch.nn.functional.softplus(-q)).sum(-1))
    if kind == "dense":
        root = torch.eye(3, dtype=torch.float64) + 0.4 * numbers(3, 3, seed=2).tril()
        metric = dense_metric(root @ root.T)
    else:
        metric = diagonal_metric(torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64))
    parameters = hmc.Parameters(torch.tensor([1.6], dtype=torch.float64), metric)
    state, noise = hmc.init(evaluate, q), numbers(20_000, 3, seed=3)
    after, info = hmc.step(evaluate, state, parameters, noise, uniforms(20_000, seed=4), 3)
    assert 0.3 < float(info.acceptance_rate.mean()) < 0.9
    assert (after.q - q).abs().mean() > 0.5
    assert all(stats.kstest(after.q[:, i].numpy(), stats.logistic.cdf).pvalue > 1e-4 for i in range(3))
    greedy, _ = hmc.step(evaluate, state, parameters, noise, torch.zeros(20_000).double(), 3)
    assert min(stats.kstest(greedy.q[:, i].numpy(), stats.logistic.cdf).pvalue for i in range(3)) < 1e-8


def test_a_transition_is_a_pure_function_and_reports_what_it_did():
    evaluate = value_and_grad(normal)
    state = hmc.init(evaluate, numbers(50, 4, seed=1))
    before = [part.clone() for part in state]
    parameters = hmc.Parameters(torch.tensor([1.5]).double(), diagonal_metric(torch.ones(4).double()))
    arguments = (evaluate, state, parameters, numbers(50, 4, seed=2), uniforms(50, seed=3), 2)
    (first, info), (second, _) = hmc.step(*arguments), hmc.step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert 0 < int(info.accepted.sum()) < 50
    assert torch.equal(first.q[~info.accepted], state.q[~info.accepted])
    assert torch.equal(info.accepted, arguments[4] < info.acceptance_rate)
    torch.testing.assert_close(first.log_density, normal(first.q))
    torch.testing.assert_close(first.grad, -first.q)
    # Mass 1: the energy at the start is known; a rejected chain keeps it, an accepted one reports that of the end.
    start = 0.5 * arguments[3].square().sum(-1) - normal(state.q)
    torch.testing.assert_close(info.energy[~info.accepted], start[~info.accepted])
    rate = torch.exp(start - info.energy).clamp(max=1)
    torch.testing.assert_close(info.acceptance_rate[info.accepted], rate[info.accepted])


def test_ends_that_are_not_finite_or_far_too_high_are_rejected_as_divergences():
    """A wall, a NaN, an infinity, and a well so steep that one step gains more than 1000."""

    def log_density(q):
        a, b = q.unbind(-1)
        value = torch.where(a > 1, -torch.inf, torch.where(a < -1, torch.nan, -0.5 * a**2))
        return torch.where(b.abs() > 1, torch.inf, value - 1e6 * (b - 0.5).square())

    evaluate = value_and_grad(log_density)
    q = torch.tensor([[0.9, 0.5], [-0.9, 0.5], [0.0, 0.5], [0.0, 0.5], [0.0, 0.5]], dtype=torch.float64)
    push = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 30.0], [0.0, 1.0], [0.1, 0.0]], dtype=torch.float64)
    parameters = hmc.Parameters(torch.tensor([0.1]).double(), diagonal_metric(torch.ones(2).double()))
    state, info = hmc.step(evaluate, hmc.init(evaluate, q), parameters, push, torch.zeros(5).double(), 1)
    assert info.diverging.tolist() == [True, True, True, True, False]
    assert torch.equal(state.q[:4], q[:4])
    assert not torch.equal(state.q[4], q[4])
    assert info.acceptance_rate[:4].tolist() == [0.0] * 4


def test_a_chain_outside_the_support_takes_the_first_way_in():
    evaluate = value_and_grad(lambda q: torch.where(q[..., 0] < 0, torch.nan, -q[..., 0]))
    state = hmc.init(evaluate, torch.tensor([[-0.5], [-0.5]], dtype=torch.float64))
    parameters = hmc.Parameters(torch.tensor([1.0]).double(), diagonal_metric(torch.ones(1).double()))
    noise = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    state, info = hmc.step(evaluate, state, parameters, noise, torch.full((2,), 0.99).double(), 1)
    assert info.accepted.tolist() == [True, False]
    assert state.q.flatten().tolist() == [1.5, -0.5]


# ---- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["diagonal", "dense", "identity"])
def test_conjugate_linear_regression(metric):
    """Mean and variance of the weights are those of the closed form, within 4.5 Monte Carlo errors.

    3 x 8 comparisons, each beyond 4.5 errors with probability 7e-6: a false alarm for 1 in 6000 seeds (1 in 500 if the
    errors are a tenth too small).
    """
    x = numbers(12, 4, seed=1) * torch.tensor([1.0, 3.0, 0.4, 2.0])
    y = x @ torch.tensor([0.5, -1.0, 2.0, 0.1]).double() + 0.7 * numbers(12, seed=2)
    covariance = torch.linalg.inv(x.T @ x / 0.49 + torch.eye(4) / 2.25)
    mean = covariance @ x.T @ y / 0.49

    def log_density(q):
        return -0.5 * (y - q @ x.T).square().sum(-1) / 0.49 - 0.5 * q.square().sum(-1) / 2.25

    run = hmc.run(
        log_density, numbers(24, 4, seed=3), num_warmup=150, num_draws=100, num_steps=12, metric=metric, seed=5
    )
    assert agree(run.draws.numpy(), mean.numpy(), covariance.numpy()) < 4.5
    assert summarize(run)["divergences"] == 0


def test_dense_metric_handles_a_rotated_ill_conditioned_gaussian():
    """Eigenvalues from 1e-4 to 1e2, rotated: the adapted metric is the covariance, and the moments are right.

    12 comparisons at 4.5 errors: a false alarm for 1 in 10 000 seeds (1 in 1000 if the errors are a tenth too small).
    """
    basis = torch.linalg.qr(numbers(6, 6, seed=1))[0]
    covariance = basis @ torch.diag(torch.logspace(-4, 2, 6, dtype=torch.float64)) @ basis.T
    mean = numbers(6, seed=2)
    start = mean + numbers(32, 6, seed=3)
    run = hmc.run(gaussian(mean, covariance), start, num_warmup=400, num_draws=80, num_steps=12, metric="dense", seed=1)
    assert agree(run.draws.numpy(), mean.numpy(), covariance.numpy()) < 4.5
    whitened = torch.linalg.solve(covariance, run.inverse_mass)
    assert torch.linalg.eigvals(whitened).real.sub(1).abs().max() < 0.3


def test_acceptance_comes_near_the_target():
    """The mean over three runs, which varies by about 0.01 from seed to seed."""
    for target in (0.7, 0.95):
        settings = {"num_warmup": 300, "num_draws": 60, "num_steps": 8, "target_accept": target}
        runs = [hmc.run(normal, numbers(16, 10), seed=seed, **settings) for seed in range(3)]
        found = np.mean([summarize(run)["acceptance_rate"] for run in runs])
        assert found == pytest.approx(target, abs=0.08)


def test_a_given_step_size_is_taken_to_its_last_digit():
    """0.1 in float64, not the float32 next to it; one number or one per group, for trajectory lengths of ChEES too."""
    settings = {"num_warmup": 0, "num_draws": 2}
    for given in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        assert hmc.run(normal, numbers(3, 2), step_size=given, num_steps=2, **settings).step_size.item() == 0.1
    given = torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert torch.equal(hmc.run(normal, numbers(2, 3, 2), step_size=given, num_steps=2, **settings).step_size, given)
    run = chees.run(normal, numbers(3, 2), step_size=0.1, trajectory_length=0.7, **settings)
    assert (run.step_size.item(), run.trajectory_length.item()) == (0.1, 0.7)
    assert mams.run(normal, numbers(3, 2), step_size=0.1, **settings).step_size.item() == 0.1


def test_chains_that_start_far_away_at_very_different_scales_all_arrive():
    """A regression's residual scale makes far starts steep: log densities from -1e2 to -1e7. None may stay behind."""
    x, noise = 100 * numbers(60, 3, seed=1), numbers(60, seed=2)
    y = x.sum(-1) + noise

    def log_density(q):
        beta, log_sigma = q[..., :3], q[..., 3]
        squares = (y - beta @ x.T).square().sum(-1)
        return -59 * log_sigma - 0.5 * squares * (-2 * log_sigma).exp() - 0.5 * (log_sigma.exp() / 10) ** 2

    start = 4 * uniforms(24, 4, seed=3) - 2
    first = log_density(start)
    assert float(first.max() - first.min()) > 1e5
    run = hmc.run(log_density, start, num_warmup=250, num_draws=50, num_steps=12, target_accept=0.9)
    means = run.draws.mean(1)
    sd = run.draws.flatten(0, 1).std(0)
    assert ((means - means.median(0).values).abs() < 3 * sd).all()
    assert summarize(run)["divergences"] <= 2


# ---- what is frozen, what is independent -----------------------------------------------------------------------------


def test_nothing_adapts_after_warmup(monkeypatch):
    seen, step = [], hmc.step

    def spy(evaluate, state, parameters, *rest):
        seen.append(parameters)
        return step(evaluate, state, parameters, *rest)

    monkeypatch.setattr(hmc, "step", spy)
    run = hmc.run(normal, numbers(3, 2), num_warmup=60, num_draws=25, num_steps=4, metric="dense")
    assert len(seen) == 85
    assert all(p is seen[60] for p in seen[60:])
    assert not torch.equal(seen[59].step_size, seen[60].step_size)
    assert torch.equal(seen[60].step_size.squeeze(-1), run.step_size)
    assert torch.equal(seen[60].metric.inverse_mass, run.inverse_mass)


def banana(q):
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.3 - 0.5 * q[..., 2] ** 2


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_chain_among_many_equals_the_chain_alone(metric):
    """With step size and metric given, the first chains of 64 are those of a run of 1 and of a run of 5."""
    inverse_mass = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    inverse_mass = torch.diag(inverse_mass) + 0.2 if metric == "dense" else inverse_mass
    start = numbers(64, 3, seed=1)
    settings = {"num_warmup": 0, "num_draws": 40, "num_steps": 6, "metric": metric, "seed": 3}
    settings |= {"step_size": 0.2, "inverse_mass": inverse_mass}
    many = hmc.run(banana, start, **settings)
    assert float(many.draws.std()) > 0.3
    for num in (1, 5):
        few = hmc.run(banana, start[:num], **settings)
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=0, atol=1e-9)
        torch.testing.assert_close(few.stats["energy"], many.stats["energy"][:num], rtol=0, atol=1e-8)


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
@pytest.mark.parametrize("groups", [(3,), (2, 2)])
def test_groups_in_one_run_equal_a_loop_over_them(metric, groups):
    """Each group adapts by itself and sees the same numbers: draws, step size and metric are those of its own run."""
    scale, start = numbers(*groups, 3, seed=1).exp(), numbers(*groups, 4, 3, seed=4)
    settings = {"num_warmup": 40, "num_draws": 15, "num_steps": 5, "metric": metric, "seed": 7, "target_accept": 0.85}
    together = hmc.run(lambda q: banana(q / scale.unsqueeze(-2)), start, **settings)
    assert together.draws.shape == (*groups, 4, 15, 3)
    assert together.step_size.shape == groups
    assert together.step_size.unique().numel() == math.prod(groups)
    for place in np.ndindex(*groups):
        own = scale[place]
        alone = hmc.run(lambda q, own=own: banana(q / own), start[place], **settings)
        # Only rounding in batched matrix products, which warm-up feeds back on itself, may tell them apart.
        torch.testing.assert_close(together.draws[place], alone.draws, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(together.step_size[place], alone.step_size, rtol=1e-8, atol=0)
        torch.testing.assert_close(together.inverse_mass[place], alone.inverse_mass, rtol=1e-7, atol=1e-9)
        for name, value in alone.stats.items():
            torch.testing.assert_close(together.stats[name][place], value, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_same_seed_same_draws_whatever_the_kind_of_seed():
    settings = {"num_warmup": 25, "num_draws": 8, "num_steps": 4}
    start = numbers(3, 2)
    first, again = hmc.run(normal, start, seed=4, **settings), hmc.run(normal, start, seed=4, **settings)
    assert torch.equal(first.draws, again.draws)
    assert not torch.equal(first.draws, hmc.run(normal, start, seed=5, **settings).draws)
    given = [torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)]
    runs = [hmc.run(normal, start, seed=g, **settings).draws for g in given]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], hmc.run(normal, start, seed=given[0], **settings).draws)


# ---- bookkeeping -----------------------------------------------------------------------------------------------------


def test_thinning_keeps_every_kth_draw_and_sums_up_the_rest():
    settings = {"num_warmup": 0, "num_steps": 7, "step_size": 1.4, "seed": 2}
    start = numbers(3, 5)
    whole = hmc.run(normal, start, num_draws=40, **settings)
    thinned = hmc.run(normal, start, num_draws=10, thin=4, **settings)
    assert torch.equal(thinned.draws, whole.draws[:, 3::4])
    blocks = {name: value.reshape(3, 10, 4) for name, value in whole.stats.items()}
    for name in ("log_density", "energy", "energy_change"):
        assert torch.equal(thinned.stats[name], blocks[name][..., -1])
    assert torch.equal(thinned.stats["num_steps"], blocks["num_steps"].sum(-1))
    torch.testing.assert_close(thinned.stats["acceptance_rate"], blocks["acceptance_rate"].mean(-1))
    assert whole.num_gradients == thinned.num_gradients


def test_trajectory_lengths_cover_their_range_and_gradients_are_counted():
    calls = []

    def counted(q):
        calls.append(q.shape)
        return normal(q)

    run = hmc.run(counted, numbers(2, 3), num_warmup=30, num_draws=80, num_steps=7, seed=1)
    lengths = run.stats["num_steps"]
    assert sorted(lengths.unique().tolist()) == [4, 5, 6, 7]
    assert torch.equal(lengths[0], lengths[1])
    # One call more than gradients: the look at the door.
    assert run.num_gradients == len(calls) - 1
    assert run.seconds > 0


def test_summary_is_plain_and_agrees_with_arviz():
    run = hmc.run(normal, numbers(4, 3), num_warmup=50, num_draws=100, num_steps=4, seed=1)
    summary = summarize(run)
    json.dumps(summary)
    np.testing.assert_allclose(summary["e_bfmi"], array_stats.bfmi(run.stats["energy"].numpy(), **AXES), rtol=1e-10)
    assert summary["divergences"] == int(run.stats["diverging"].sum())
    assert isinstance(run, Run)
    grouped = summarize(hmc.run(normal, numbers(2, 4, 3), num_warmup=5, num_draws=6, num_steps=4))
    assert np.shape(grouped["e_bfmi"]) == (2, 4)
    assert np.shape(grouped["divergences"]) == np.shape(grouped["step_size"]) == (2,)


def test_energy_is_that_of_the_draw():
    """Energy minus potential is the kinetic energy of D coordinates: positive, on average D/2 when all is accepted."""
    run = hmc.run(normal, numbers(64, 8), num_warmup=0, num_draws=50, num_steps=3, step_size=0.05)
    kinetic = run.stats["energy"] + run.stats["log_density"]
    assert (kinetic > 0).all()
    # 3200 chi-square(8)/2 variables of standard deviation 2, at 5 standard errors; few trajectories dissipate energy.
    assert float(kinetic.mean()) == pytest.approx(4.0, abs=5 * 2 / math.sqrt(3200))
    torch.testing.assert_close(run.stats["log_density"], normal(run.draws))


def test_float32_positions_keep_their_dtype_and_energies_are_float64():
    run = hmc.run(normal, numbers(4, 3).float(), num_warmup=40, num_draws=10, num_steps=4, metric="dense")
    assert run.draws.dtype == run.step_size.dtype == run.inverse_mass.dtype == torch.float32
    assert run.stats["energy"].dtype == torch.float64


def test_progress_speaks_only_when_asked(capsys):
    settings = {"num_warmup": 5, "num_draws": 5, "num_steps": 2}
    hmc.run(normal, numbers(2, 2), **settings)
    assert capsys.readouterr() == ("", "")
    hmc.run(normal, numbers(2, 2), progress=True, description="my run", **settings)
    out, err = capsys.readouterr()
    assert out == ""
    assert "my run" in err
    assert "divergences" in err


@pytest.mark.gpu
def test_runs_on_the_gpu_and_matches_the_moments():
    start = numbers(64, 5).float().cuda()
    run = hmc.run(normal, start, num_warmup=150, num_draws=100, num_steps=8)
    assert run.draws.is_cuda
    assert agree(run.draws.double().cpu().numpy(), np.zeros(5), np.eye(5)) < 4.5


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "word", "change"),
    [
        (SettingError, "num_draws", {"num_draws": 0}),
        (SettingError, "num_warmup", {"num_warmup": -1}),
        (SettingError, "num_steps", {"num_steps": 2.5}),
        (SettingError, "thin", {"thin": 0}),
        (SettingError, "target_accept", {"target_accept": 1.0}),
        (SettingError, "metric", {"metric": "full"}),
        (SettingError, "step_size", {"step_size": -0.1}),
        (ShapeError, "step_size", {"step_size": torch.ones(2)}),
        (ShapeError, "inverse_mass", {"inverse_mass": torch.ones(4)}),
        (SettingError, "inverse_mass", {"inverse_mass": torch.ones(2), "metric": "identity"}),
        (ShapeError, "initial", {"initial": torch.zeros(2)}),
        (DtypeError, "initial", {"initial": torch.zeros(2, 2, dtype=torch.int64)}),
        (NumericalError, "initial", {"initial": torch.full((2, 2), torch.nan)}),
        (ShapeError, "one per chain", {"log_density": lambda q: -q.square()}),
        (ShapeError, "one per chain", {"log_density": lambda q: -q.square().sum()}),
        (SettingError, "differentiable", {"log_density": lambda q: normal(q.detach())}),
        (NumericalError, "at all 3 initial points", {"log_density": lambda q: normal(q) * torch.nan}),
    ],
)
def test_wrong_calls_fail_at_the_door(error, word, change):
    settings = {"log_density": normal, "initial": numbers(3, 2), "num_warmup": 2, "num_draws": 2, **change}
    with pytest.raises(error, match=word) as caught:
        hmc.run(settings.pop("log_density"), settings.pop("initial"), **settings)
    assert "\n  got  " in str(caught.value)
    assert "\n  fix  " in str(caught.value)


def test_some_bad_starts_are_mended_by_warmup_and_refused_without_it():
    def half(q):
        return torch.where(q[..., 0] > 0, -q[..., 0] - 0.5 * q[..., 1] ** 2, torch.nan)

    start = torch.tensor([[0.5, 0.0], [-0.3, 0.0], [0.2, 0.3]], dtype=torch.float64)
    run = hmc.run(half, start, num_warmup=60, num_draws=20, num_steps=4, seed=1)
    assert (run.draws[..., 0] > 0).all()
    assert run.stats["log_density"].isfinite().all()
    with pytest.raises(NumericalError, match="1 of 3 chains"):
        hmc.run(half, start, num_warmup=0, num_draws=20, num_steps=4)
    with pytest.raises(NumericalError, match="in 1 of 2 groups"):
        hmc.run(half, torch.stack([start.abs() + 0.1, -start.abs() - 0.1]), num_warmup=5, num_draws=2)
