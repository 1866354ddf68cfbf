"""MCLMC: the step, its error and bias, what warm-up adapts and freezes, independence of chains and groups."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bayesdl.errors import NumericalError, SettingError, ShapeError
from bayesdl.samplers import mclmc, summarize
from bayesdl.samplers._microcanonical import SCHEMES, Point, energy_error, integrate, refresh, unit
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import diagonal_metric


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banana(q):
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.3 - 0.5 * (q[..., 2:] ** 2).sum(-1)


def normal(q):
    return -0.5 * q.square().sum(-1)


def parameters_of(step_size, dim, length):
    metric = diagonal_metric(torch.ones(dim).double())
    return mclmc.Parameters(torch.tensor([step_size]).double(), metric, torch.tensor([length]).double())


# ---- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["minimal-norm", "leapfrog"])
def test_a_step_is_a_refreshed_direction_and_a_step_of_the_scheme(integrator):
    evaluate = value_and_grad(banana)
    state = mclmc.init(evaluate, numbers(9, 4, seed=1), numbers(9, 4, seed=2))
    before = [part.clone() for part in state]
    noise, parameters = numbers(9, 4, seed=3), parameters_of(0.31, 4, 1.7)
    after, info = mclmc.step(evaluate, state, parameters, noise, integrator)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    velocity = refresh(state.velocity, noise, parameters.step_size, parameters.trajectory_length)
    assert not torch.allclose(velocity, state.velocity, atol=0.05)
    start = Point(state.q, velocity, state.log_density, state.grad)
    end, kinetic = integrate(evaluate, start, parameters.step_size, parameters.metric, 1, SCHEMES[integrator])
    assert torch.equal(after.q, end.q)
    assert torch.equal(after.velocity, end.velocity)
    torch.testing.assert_close(after.log_density, banana(after.q))
    change = energy_error(start.log_density, end.log_density, kinetic)
    assert torch.equal(info.energy_change, change)
    torch.testing.assert_close(after.energy - state.energy, change)
    torch.testing.assert_close(state.energy, -banana(state.q))
    torch.testing.assert_close(info.stats["energy_error"], change**2 / 4)
    assert info.num_gradients == len(SCHEMES[integrator].drifts)


def test_a_step_without_a_finite_end_is_undone_and_turned_round():
    """A wall at 1, a well of curvature 1e6, and free space; the chain at the wall comes away from it next time."""

    def log_density(q):
        return torch.where(q[..., 0] > 1, torch.nan, -0.5 * q[..., 0] ** 2 - 1e6 * q[..., 1] ** 2)

    evaluate = value_and_grad(log_density)
    q = torch.tensor([[0.95, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    push = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    parameters = parameters_of(0.1, 2, math.inf)
    state = mclmc.init(evaluate, q, push)
    after, info = mclmc.step(evaluate, state, parameters, 0 * push)
    assert info.diverging.tolist() == [True, True, False]
    assert info.acceptance_rate.tolist() == [0.0, 0.0, 1.0]
    assert torch.equal(after.q[:2], q[:2])
    assert torch.equal(after.velocity[:2], -push[:2])
    assert info.energy_change[:2].tolist() == [0.0, 0.0]
    again, info = mclmc.step(evaluate, after, parameters, 0 * push)
    assert float(again.q[0, 0]) == pytest.approx(0.85)
    assert not info.diverging[0]


def test_a_chain_outside_the_support_moves_on_until_it_is_in():
    evaluate = value_and_grad(lambda q: torch.where(q[..., 0] < 0, torch.nan, -q.sum(-1)))
    state = mclmc.init(evaluate, torch.tensor([[-0.5, 1.0]]).double(), torch.tensor([[1.0, 0.0]]).double())
    for wanted in (-0.3, -0.1, 0.1):
        state, info = mclmc.step(evaluate, state, parameters_of(0.2, 2, math.inf), torch.zeros(1, 2).double())
        assert float(state.q[0, 0]) == pytest.approx(wanted, abs=0.002)  # the last step turns a little on entering
        assert not info.diverging.any()
    assert float(state.energy) == pytest.approx(float(state.q.sum()))


# ---- error and bias --------------------------------------------------------------------------------------------------


def test_bias_falls_with_the_step_size_and_the_error_per_step_with_its_sixth_power():
    """E x^2 of a standard normal in 10 dimensions, 400 chains of 300 steps after 60, at three step sizes.

    The biases are some 40, 8 and 2 %, their Monte Carlo errors below 0.6 %: each is less than a third of the one
    before. The mean squared energy error falls as eps^6, to 15 % of the slope.
    """
    evaluate = value_and_grad(normal)
    bias, errors, sizes = [], [], [5.0, 3.0, 1.5]
    for i, eps in enumerate(sizes):
        state = mclmc.init(evaluate, numbers(400, 10, seed=1), numbers(400, 10, seed=2))
        noise = numbers(360, 400, 10, seed=3 + i)
        squares, changes = [], []
        for t in range(360):
            state, info = mclmc.step(evaluate, state, parameters_of(eps, 10, 10**0.5), noise[t])
            if t >= 60:
                squares.append(state.q.square().mean())
                changes.append(info.energy_change.square().mean() / 10)
        bias.append(abs(float(torch.stack(squares).mean()) - 1))
        errors.append(float(torch.stack(changes).mean()))
    assert bias[1] < bias[0] / 3
    assert bias[2] < bias[1] / 3 + 0.006
    assert bias[2] < 0.012
    assert np.polyfit(np.log(sizes[1:]), np.log(errors[1:]), 1)[0] == pytest.approx(6, rel=0.15)


@pytest.mark.parametrize("desired", [5e-4, 1e-2])
def test_warmup_meets_the_desired_energy_error(desired):
    """Coordinates at scales from 0.01 to 100: the metric is found, the error is as desired to a factor of 1.6.

    The variances are then wrong by a few percent, all by much the same.
    """
    scales = torch.logspace(-2, 2, 20, dtype=torch.float64)
    run = mclmc.run(
        lambda q: normal(q / scales),
        numbers(32, 20, seed=1),
        num_warmup=500,
        num_draws=120,
        thin=4,
        desired_energy_error=desired,
    )
    error = float(run.stats["energy_error"].mean())
    assert abs(math.log(error / desired)) < math.log(1.6)
    torch.testing.assert_close(run.inverse_mass, scales**2, rtol=0.2, atol=0)
    ratio = (run.draws / scales).square().mean((0, 1))
    assert float(ratio.mean()) == pytest.approx(1, abs=0.06 if desired < 1e-3 else 0.2)
    assert float(ratio.std()) < 0.08
    assert run.trajectory_length.shape == ()
    assert 0.25 * 20**0.5 <= float(run.trajectory_length) <= 4 * 20**0.5


def test_statistics_tell_the_error_and_hide_what_is_no_energy_level():
    run = mclmc.run(banana, numbers(6, 3), num_warmup=60, num_draws=20, thin=3)
    assert run.stats["energy"].isnan().all()
    assert run.stats["energy_change"][..., 1:].isfinite().all()
    assert run.stats["energy_error"].shape == (6, 20)
    assert (run.stats["num_steps"] == 3).all()
    assert all(math.isnan(value) for value in summarize(run)["e_bfmi"])
    single = mclmc.run(banana, numbers(6, 3), num_warmup=60, num_draws=20)
    # without thinning the mean over the steps is the error of the step itself
    change, error = single.stats["energy_change"][..., 1:], single.stats["energy_error"][..., 1:]
    torch.testing.assert_close(change.square() / 3, error, rtol=1e-6, atol=1e-12)


def test_moments_of_a_skewed_target_are_near_the_truth():
    """A banana in 4 dimensions at a hundredth of the usual error: E x and E y = E x^2 = 1 to 5 % (2 to 3 errors)."""
    run = mclmc.run(
        banana, numbers(64, 4, seed=2), num_warmup=600, num_draws=150, thin=8, desired_energy_error=5e-6, seed=1
    )
    assert float(run.draws[..., 0].mean()) == pytest.approx(0, abs=0.05)
    assert float(run.draws[..., 0].square().mean()) == pytest.approx(1, abs=0.06)
    assert float(run.draws[..., 1].mean()) == pytest.approx(1, abs=0.06)


def test_a_wall_makes_steps_smaller_but_does_not_stop_the_chains():
    """A normal law cut off at zero in one coordinate: steps that leave it are undone and count; the rest goes on."""
    run = mclmc.run(
        lambda q: torch.where(q[..., 0] > 0, normal(q), -torch.inf),
        numbers(16, 4, seed=3).abs(),
        num_warmup=300,
        num_draws=100,
        thin=3,
    )
    assert (run.draws[..., 0] > 0).all()
    assert int(run.stats["diverging"].sum()) > 0
    assert float(run.step_size) > 0.05
    assert float(run.draws[..., 1:].var()) == pytest.approx(1, abs=0.25)


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_chain_among_many_equals_the_chain_alone(metric):
    inverse_mass = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    inverse_mass = torch.diag(inverse_mass) + 0.2 if metric == "dense" else inverse_mass
    start = numbers(16, 3, seed=1)
    settings = {"num_warmup": 0, "num_draws": 60, "metric": metric, "seed": 3, "trajectory_length": 2.2}
    settings |= {"step_size": 0.3, "inverse_mass": inverse_mass}
    many = mclmc.run(banana, start, **settings)
    for num in (1, 5):
        few = mclmc.run(banana, start[:num], **settings)
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=0, atol=1e-8)


@pytest.mark.parametrize(("groups", "metric"), [((3,), "diagonal"), ((2, 2), "dense")])
def test_groups_in_one_run_equal_a_loop_over_them(groups, metric):
    scale, start = (0.5 * numbers(*groups, 3, seed=1)).exp(), numbers(*groups, 8, 3, seed=4)
    settings = {"num_warmup": 60, "num_draws": 5, "metric": metric, "seed": 7}
    together = mclmc.run(lambda q: normal(q / scale.unsqueeze(-2)), start, **settings)
    assert together.trajectory_length.shape == groups
    for place in np.ndindex(*groups):
        own = scale[place]
        alone = mclmc.run(lambda q, own=own: normal(q / own), start[place], **settings)
        # Warm-up feeds the rounding of batched products back on itself.
        torch.testing.assert_close(together.draws[place], alone.draws, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.trajectory_length[place], alone.trajectory_length, rtol=1e-6, atol=0)


def test_nothing_adapts_after_warmup(monkeypatch):
    seen, step = [], mclmc.step

    def spy(evaluate, state, parameters, *rest):
        seen.append(parameters)
        return step(evaluate, state, parameters, *rest)

    monkeypatch.setattr(mclmc, "step", spy)
    run = mclmc.run(banana, numbers(8, 3), num_warmup=80, num_draws=20)
    assert all(p is seen[-1] for p in seen[-20:])
    assert not torch.equal(seen[-21].trajectory_length, seen[-20].trajectory_length)
    assert torch.equal(seen[-1].step_size.squeeze(-1), run.step_size)
    assert torch.equal(seen[-1].trajectory_length.squeeze(-1), run.trajectory_length)
    assert len(seen) == 91  # the first nine transitions are those of HMC


def test_a_given_length_is_kept():
    run = mclmc.run(banana, numbers(8, 3), num_warmup=80, num_draws=3, trajectory_length=1.7)
    assert float(run.trajectory_length) == 1.7


def test_gradients_are_counted():
    calls = itertools.count()

    def counted(q):
        next(calls)
        return banana(q)

    run = mclmc.run(counted, numbers(8, 3), num_warmup=60, num_draws=10)
    assert run.num_gradients == next(calls) - 1


def test_chains_that_start_far_away_arrive():
    """From 1000 standard deviations away, in all directions and at scales from 0.01 to 10."""
    scales = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
    start = 1000 * scales * unit(numbers(8, 4, seed=1))
    run = mclmc.run(lambda q: normal(q / scales), start, num_warmup=800, num_draws=50, thin=5)
    assert ((run.draws / scales).square().mean((-2, -1)) < 3).all()


@pytest.mark.parametrize("budget", [60, 250])
def test_a_run_cut_short_and_resumed_gives_the_same_draws(tmp_path, budget, monkeypatch):
    """A run that fails in warm-up or in sampling leaves a checkpoint, from which another goes on to the same draws."""
    settings = {"num_warmup": 80, "num_draws": 30, "seed": 5, "thin": 2}
    whole = mclmc.run(banana, numbers(6, 3, seed=1), **settings)
    monkeypatch.setattr("bayesdl.samplers._checkpoint.SECONDS", 0.0)
    calls = itertools.count()

    def dies(q):
        if next(calls) > budget:
            raise KeyboardInterrupt
        return banana(q)

    with pytest.raises(KeyboardInterrupt):
        mclmc.run(dies, numbers(6, 3, seed=1), checkpoint=tmp_path / "run", **settings)
    again = mclmc.run(banana, numbers(6, 3, seed=1), checkpoint=tmp_path / "run", **settings)
    assert torch.equal(again.draws, whole.draws)
    assert torch.equal(again.stats["energy_error"], whole.stats["energy_error"])
    assert torch.equal(again.trajectory_length, whole.trajectory_length)
    with pytest.raises(SettingError, match="desired_energy_error"):
        mclmc.run(banana, numbers(6, 3, seed=1), checkpoint=tmp_path / "run", desired_energy_error=0.1, **settings)


def test_a_budget_ends_the_run():
    run = mclmc.run(banana, numbers(4, 3), num_warmup=40, num_draws=10_000, max_gradients=500)
    assert run.stopped_by == "max_gradients"
    assert 500 <= run.num_gradients < 504


def test_single_precision_and_few_steps():
    run = mclmc.run(banana, numbers(4, 3).float(), num_warmup=8, num_draws=3)
    assert run.draws.dtype == torch.float32
    assert run.draws.isfinite().all()
    plain = mclmc.run(banana, numbers(4, 3), num_warmup=0, num_draws=3)
    assert float(plain.trajectory_length) == pytest.approx(3**0.5)


@pytest.mark.gpu
def test_runs_on_the_gpu_and_matches_the_moments():
    start = numbers(64, 5).float().cuda()
    run = mclmc.run(normal, start, num_warmup=300, num_draws=100, thin=5, desired_energy_error=1e-5)
    assert run.draws.is_cuda
    assert float(run.draws.double().square().mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("error", "word", "change"),
    [
        (SettingError, "desired_energy_error", {"desired_energy_error": 0.0}),
        (SettingError, "metric", {"metric": "full"}),
        (SettingError, "integrator", {"integrator": "euler"}),
        (SettingError, "trajectory_length", {"trajectory_length": -1.0}),
        (SettingError, "step_size", {"step_size": -1.0}),
        (ShapeError, "initial", {"initial": torch.zeros(2)}),
        (ShapeError, "two coordinates", {"initial": torch.zeros(3, 1)}),
        (NumericalError, "finite", {"log_density": lambda q: q.sum(-1) * torch.nan}),
    ],
)
def test_wrong_calls_fail_at_the_door(error, word, change):
    settings = {"log_density": banana, "initial": numbers(3, 3), "num_warmup": 2, "num_draws": 2, **change}
    with pytest.raises(error, match=word) as caught:
        mclmc.run(settings.pop("log_density"), settings.pop("initial"), **settings)
    assert "mclmc.run" in str(caught.value)
