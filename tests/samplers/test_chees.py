"""ChEES-HMC: the criterion's slope against autograd, the floor of the length, invariance, and what is frozen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats

from bayesdl.errors import SettingError, ShapeError
from bayesdl.samplers import adaptation, chees, hmc, summarize
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import dense_metric, diagonal_metric

AXES = {"chain_axis": 0, "draw_axis": 1}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banana(q):
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.3 - 0.5 * q[..., 2] ** 2


def rotated(dim, condition, seed=1):
    """A Gaussian with eigenvalues from condition^-1/2 to condition^1/2 in a random basis: log density, covariance."""
    basis = torch.linalg.qr(numbers(dim, dim, seed=seed))[0]
    values = torch.logspace(-0.5 * math.log10(condition), 0.5 * math.log10(condition), dim, dtype=torch.float64)
    precision = basis @ torch.diag(1 / values) @ basis.T
    return (lambda q: -0.5 * ((q @ precision) * q).sum(-1)), basis @ torch.diag(values) @ basis.T


def agree(draws, covariance):
    """Largest |z| of the means and variances of draws (C, N, D) of mean 0, by their Monte Carlo errors."""
    squares = draws**2
    z = [
        draws.mean((0, 1)) / array_stats.mcse(draws, method="mean", **AXES),
        (squares.mean((0, 1)) - np.diag(covariance)) / array_stats.mcse(squares, method="mean", **AXES),
    ]
    return np.abs(z).max()


def test_jitter_is_the_van_der_corput_sequence():
    assert [chees._halton(i) for i in range(1, 8)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_slope_is_the_derivative_of_the_criterion(kind):
    """Against the exact flow of a Gaussian, differentiated by autograd in log T; steps small, so all are accepted."""
    scales = torch.tensor([0.5, 2.0, 1.1], dtype=torch.float64)
    root = torch.diag(torch.tensor([0.8, 1.5, 1.2], dtype=torch.float64))
    if kind == "dense":
        root = root + 0.3 * numbers(3, 3, seed=2).tril(-1)
    inverse_mass = root @ root.T
    metric = dense_metric(inverse_mass) if kind == "dense" else diagonal_metric(inverse_mass.diagonal())
    evaluate = value_and_grad(lambda q: -0.5 * (q / scales).square().sum(-1))
    q, noise, length, jitter = numbers(7, 3, seed=3), numbers(7, 3, seed=4), 1.3, 0.625
    eps = jitter * length / 4000
    parameters = chees.Parameters(torch.tensor([eps]).double(), metric, torch.tensor(length, dtype=torch.float64))
    centre = torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64)
    _, info = chees.step(
        evaluate, hmc.init(evaluate, q), parameters, noise, torch.zeros(7).double(), jitter, max_steps=5000
    )
    assert int(info.num_steps[0]) == 4000
    found = chees._slope(q, info, parameters, centre, torch.ones(7, dtype=torch.bool))

    # The flow of q'' = -M^{-1} S^{-1} q is linear: the exponential of its generator, times the start.
    p = metric.momentum(noise)
    generator = torch.zeros(6, 6, dtype=torch.float64)
    generator[:3, 3:] = inverse_mass
    generator[3:, :3] = -torch.diag(scales**-2)
    mass = torch.linalg.inv(inverse_mass)

    def criterion(log_length):
        flow = torch.linalg.matrix_exp(generator * log_length.exp() * jitter)
        end = (torch.cat([q, p], -1) @ flow.T)[:, :3] - centre
        start = q - centre
        change = ((end @ mass) * end).sum(-1) - ((start @ mass) * start).sum(-1)
        return 0.25 * change.square().mean()

    at = torch.tensor(math.log(length), dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(criterion(at), at)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "identity"])
def test_floor_is_a_quarter_period_of_the_widest_direction(kind):
    """Against NumPy's eigenvalues of the whitened covariance."""
    q = numbers(500, 4, seed=1) @ (torch.eye(4, dtype=torch.float64) + numbers(4, 4, seed=2).tril())
    moments = adaptation.add_to_moments(adaptation.start_moments(q, dense=True), q)
    covariance = np.cov(q.numpy().T)
    inverse_mass = {
        "diagonal": np.diag([1.0, 2.0, 0.5, 3.0]),
        "dense": covariance + 0.3 * np.eye(4),
        "identity": np.eye(4),
    }[kind]
    given = torch.as_tensor(inverse_mass)
    metric = dense_metric(given) if kind == "dense" else diagonal_metric(given.diagonal())
    largest = np.linalg.eigvals(np.linalg.inv(inverse_mass) @ covariance).real.max()
    assert float(chees._quarter_period(moments, metric)) == pytest.approx(math.pi / 2 * largest**0.5, rel=1e-9)
    assert chees._quarter_period(adaptation.start_moments(q, dense=False), metric) is None


def test_harmonic_mean_leaves_out_divergences():
    rate = torch.tensor([[0.5, 0.25, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    diverging = torch.tensor([[False, False, True, False], [True, True, True, True]])
    found = chees._harmonic_mean(rate, diverging)
    torch.testing.assert_close(found, torch.tensor([[3 / 7], [0.0]], dtype=torch.float64))


def test_a_transition_leaves_exact_draws_exact():
    """20 000 exact draws of a product of logistic laws; three KS tests at 1e-4: a false alarm for 1 in 3300 seeds."""
    u = uniforms(20_000, 3, seed=1)
    q = u.log() - (-u).log1p()
    evaluate = value_and_grad(lambda q: (-q - 2 * torch.nn.functional.softplus(-q)).sum(-1))
    metric = diagonal_metric(torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64))
    parameters = chees.Parameters(torch.tensor([1.6]).double(), metric, torch.tensor(6.0).double())
    state, noise = hmc.init(evaluate, q), numbers(20_000, 3, seed=3)
    after, info = chees.step(evaluate, state, parameters, noise, uniforms(20_000, seed=4), 0.75)
    assert int(info.num_steps[0]) == math.ceil(0.75 * 6.0 / 1.6)
    assert 0.3 < float(info.acceptance_rate.mean()) < 0.9
    assert all(stats.kstest(after.q[:, i].numpy(), stats.logistic.cdf).pvalue > 1e-4 for i in range(3))
    # It is a transition of HMC with that many steps.
    same, _ = hmc.step(
        evaluate, state, hmc.Parameters(parameters.step_size, metric), noise, uniforms(20_000, seed=4), 3
    )
    assert torch.equal(after.q, same.q)


def test_rotated_ill_conditioned_gaussian_by_dense_metric():
    """d = 50, condition 1e4: moments within 4.6 Monte Carlo errors (100 comparisons: 1 in 2400 seeds), a fixed length.

    The pooled metric is the covariance, so trajectories of three steps or so suffice.
    """
    log_density, covariance = rotated(50, 1e4)
    run = chees.run(log_density, 4 * uniforms(64, 50, seed=5) - 2, num_warmup=250, num_draws=60, seed=3)
    assert run.inverse_mass.shape == (50, 50)
    assert agree(run.draws.numpy(), covariance.numpy()) < 4.6
    assert 1.4 < float(run.trajectory_length) < 3
    assert float(run.stats["num_steps"].double().mean()) < 6
    assert summarize(run)["divergences"] == 0


def test_length_of_a_diagonal_metric_reaches_the_widest_direction():
    """The same target with a diagonal metric, which cannot turn: T is long only because of the floor.

    Coordinates of a random basis have variances near their average, so the widest direction needs a quarter period of
    (pi/2) sqrt(100 / 11) or more. The criterion alone settles below half of that.
    """
    log_density, covariance = rotated(50, 1e4)
    whitened = covariance / (covariance.diagonal().sqrt()[:, None] * covariance.diagonal().sqrt())
    quarter = math.pi / 2 * float(torch.linalg.eigvalsh(whitened)[-1].sqrt())
    run = chees.run(
        log_density, 4 * uniforms(32, 50, seed=5) - 2, num_warmup=150, num_draws=5, metric="diagonal", seed=3
    )
    assert quarter > 4
    assert float(run.trajectory_length) > 0.7 * quarter


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")  # some chains stick in the neck
def test_funnel_fails_and_the_diagnostics_say_so():
    """Neal's funnel in ten dimensions: the neck is missed; divergences and E-BFMI tell."""

    def funnel(q):
        v, x = q[..., 0], q[..., 1:]
        return -(v**2) / 18 - 0.5 * (-v).exp() * x.square().sum(-1) - 4.5 * v

    run = chees.run(funnel, numbers(32, 10, seed=1), num_warmup=80, num_draws=40, max_steps=32, seed=2)
    summary = summarize(run)
    assert summary["divergences"] > 0 or min(summary["e_bfmi"]) < 0.3
    assert float(run.draws[..., 0].std()) < 2.9


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_chain_among_many_equals_the_chain_alone(metric):
    inverse_mass = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    inverse_mass = torch.diag(inverse_mass) + 0.2 if metric == "dense" else inverse_mass
    start = numbers(64, 3, seed=1)
    settings = {"num_warmup": 0, "num_draws": 40, "metric": metric, "seed": 3, "trajectory_length": 2.2}
    settings |= {"step_size": 0.2, "inverse_mass": inverse_mass}
    many = chees.run(banana, start, **settings)
    assert many.stats["num_steps"].unique().numel() > 5
    for num in (1, 5):
        few = chees.run(banana, start[:num], **settings)
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("groups", "metric"), [((3,), "diagonal"), ((2, 2), "dense")])
def test_groups_in_one_run_equal_a_loop_over_them(groups, metric):
    """Each group has its own length, and waits for the longest without moving."""
    scale, start = numbers(*groups, 3, seed=1).exp(), numbers(*groups, 8, 3, seed=4)
    settings = {"num_warmup": 30, "num_draws": 5, "metric": metric, "seed": 7, "max_steps": 12}
    together = chees.run(lambda q: banana(q / scale.unsqueeze(-2)), start, **settings)
    assert together.trajectory_length.unique().numel() == math.prod(groups)
    for place in np.ndindex(*groups):
        own = scale[place]
        alone = chees.run(lambda q, own=own: banana(q / own), start[place], **settings)
        # Warm-up feeds the rounding of batched products back on itself.
        torch.testing.assert_close(together.draws[place], alone.draws, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.trajectory_length[place], alone.trajectory_length, rtol=1e-6, atol=0)
        assert torch.equal(together.stats["num_steps"][place], alone.stats["num_steps"])


def test_nothing_adapts_after_warmup(monkeypatch):
    seen, step = [], chees.step

    def spy(evaluate, state, parameters, *rest):
        seen.append(parameters)
        return step(evaluate, state, parameters, *rest)

    monkeypatch.setattr(chees, "step", spy)
    run = chees.run(banana, numbers(16, 3), num_warmup=60, num_draws=25)
    assert all(p is seen[-1] for p in seen[-25:])
    assert not torch.equal(seen[-26].trajectory_length, seen[-25].trajectory_length)
    assert torch.equal(seen[-1].trajectory_length, run.trajectory_length)
    assert torch.equal(seen[-1].step_size.squeeze(-1), run.step_size)


def test_gradients_are_counted():
    """The mean over chains, since chains travel by trees of unequal size; the check at the door is not one of them."""
    rows = 0

    def counted(q):
        nonlocal rows
        rows += len(q)
        return banana(q)

    run = chees.run(counted, numbers(8, 3), num_warmup=40, num_draws=10)
    assert run.num_gradients == math.ceil(rows / 8 - 1)


@pytest.mark.gpu
def test_runs_on_the_gpu_and_matches_the_moments():
    """10 comparisons at 4.5 errors: a false alarm for 1 in 14 000 seeds."""
    start = numbers(64, 5).float().cuda()
    run = chees.run(lambda q: -0.5 * q.square().sum(-1), start, num_warmup=100, num_draws=80)
    assert run.draws.is_cuda
    assert agree(run.draws.double().cpu().numpy(), np.eye(5)) < 4.5


@pytest.mark.parametrize(
    ("error", "word", "change"),
    [
        (SettingError, "max_steps", {"max_steps": 0}),
        (SettingError, "metric", {"metric": "full"}),
        (SettingError, "trajectory_length", {"trajectory_length": -1.0}),
        (SettingError, "target_accept", {"target_accept": 0.0}),
        (ShapeError, "initial", {"initial": torch.zeros(2)}),
    ],
)
def test_wrong_calls_fail_at_the_door(error, word, change):
    settings = {"log_density": banana, "initial": numbers(3, 3), "num_warmup": 2, "num_draws": 2, **change}
    with pytest.raises(error, match=word) as caught:
        chees.run(settings.pop("log_density"), settings.pop("initial"), **settings)
    assert "chees.run" in str(caught.value)
