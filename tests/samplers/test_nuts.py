"""NUTS: its trees are those of the recursive definition, transitions keep the target, chains stay apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats

from bayesdl.errors import NumericalError, SettingError, ShapeError
from bayesdl.samplers import _trees, nuts, summarize
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import dense_metric, diagonal_metric

AXES = {"chain_axis": 0, "draw_axis": 1}


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(q):
    return -0.5 * q.square().sum(-1)


def banana(q):
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.3 - 0.5 * q[..., 2] ** 2


def steep(q):
    """A banana with a wall in it: some trajectories diverge."""
    return banana(q) - 1e6 * (q[..., 2] - 1.5).clamp(min=0) ** 2


# ---- the tree, by its recursive definition ---------------------------------------------------------------------------


class Recursive:
    """One transition of one chain as Hoffman & Gelman and Stan write it: recursive, a leaf at a time."""

    def __init__(self, log_density, inverse_mass, step_size, q, p, uniform, max_depth):
        self.evaluate, self.inverse_mass, self.step_size = value_and_grad(log_density), inverse_mass, step_size
        self.uniform, self.max_depth = uniform, max_depth
        lp, grad = self.evaluate(q[None])
        self.start = (q, p, grad[0], float(lp))
        self.h0 = self.energy(self.start)
        self.accept, self.visited, self.diverging = 0.0, 0, False

    def energy(self, point):
        _, p, _, lp = point
        return 0.5 * float(p @ self.inverse_mass @ p) - lp

    def leap(self, point, sign):
        q, p, grad, _ = point
        eps = sign * self.step_size
        half = p + 0.5 * eps * grad
        q = q + eps * self.inverse_mass @ half
        lp, grad = self.evaluate(q[None])
        point = (q, half + 0.5 * eps * grad[0], grad[0], float(lp))
        error = self.energy(point) - self.h0
        self.visited += 1
        self.accept += math.exp(-max(error, 0.0)) if math.isfinite(error) else 0.0
        self.diverging |= not error <= 1000
        return point, error <= 1000

    def against(self, p, rho):
        return float(p @ self.inverse_mass @ rho) <= 0

    def turned(self, left, right):
        """The criterion for all, and across the joint; momenta summed afresh."""
        pl, pr = [z[1] for z in left], [z[1] for z in right]
        rho_l, rho_r = sum(pl), sum(pr)
        pairs = [(pl[0], rho_l + rho_r), (pr[-1], rho_l + rho_r)]
        pairs += [(pl[0], rho_l + pr[0]), (pr[0], rho_l + pr[0])]
        pairs += [(pl[-1], rho_r + pl[-1]), (pr[-1], rho_r + pl[-1])]
        return any(self.against(p, rho) for p, rho in pairs)

    def build(self, point, sign, depth):
        if depth == 0:
            point, fine = self.leap(point, sign)
            return [point], fine
        left, fine = self.build(point, sign, depth - 1)
        if not fine:
            return left, False
        right, fine = self.build(left[-1], sign, depth - 1)
        return left + right, fine and not self.turned(left, right)

    def draw(self, leaves, numbers, depth):
        """Blocks compete in their order; within a block by inversion of the distribution function."""
        size, weight, chosen = _trees.block_size(depth), -math.inf, None
        for j in range(len(leaves) // size):
            block = leaves[j * size : (j + 1) * size]
            w = np.array([self.h0 - self.energy(z) for z in block])
            total = np.logaddexp.reduce(w)
            place = min(int((np.exp(w - total).cumsum() < numbers[2 + 2 * j]).sum()), size - 1)
            weight = np.logaddexp(weight, total)
            if j == 0 or numbers[3 + 2 * j] < math.exp(total - weight):
                chosen = block[place]
        return chosen, weight

    def transition(self):
        tree, chosen, weight, depth = [self.start], self.start, 0.0, 0
        while depth < self.max_depth:
            u = _trees.decisions(self.uniform[None], depth)[0].numpy()
            sign = 1 if u[0] < 0.5 else -1
            new, fine = self.build(tree[-1] if sign > 0 else tree[0], sign, depth)
            if not fine:
                break
            candidate, new_weight = self.draw(new, u, depth)
            if u[1] < math.exp(min(new_weight - weight, 0.0)):
                chosen = candidate
            turned = self.turned(tree, new) if sign > 0 else self.turned(new[::-1], tree)
            tree = tree + new if sign > 0 else new[::-1] + tree
            weight = np.logaddexp(weight, new_weight)
            depth += 1
            if turned:
                break
        return chosen, depth


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.parametrize(
    ("target", "step_size", "max_depth"), [(banana, 0.09, 10), (steep, 0.11, 10), (banana, 0.05, 3)]
)
def test_trees_are_those_of_the_recursive_definition(kind, target, step_size, max_depth):
    """Same random numbers: draw, depth, steps, acceptance, divergence and energy of 25 chains agree one by one."""
    inverse_mass = torch.diag(torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64))
    if kind == "dense":
        root = torch.eye(3, dtype=torch.float64) + 0.4 * numbers(3, 3, seed=9).tril()
        inverse_mass = root @ root.T
    metric = dense_metric(inverse_mass) if kind == "dense" else diagonal_metric(inverse_mass.diagonal())
    num = 25
    q = 0.5 * numbers(num, 3, seed=1)
    noise, uniform = numbers(num, 3, seed=2), uniforms(num, seed=3)
    evaluate = value_and_grad(target)
    eps = torch.tensor([step_size], dtype=torch.float64)
    state, info = nuts.step(evaluate, nuts.init(evaluate, q), nuts.Parameters(eps, metric), noise, uniform, max_depth)
    p = metric.momentum(noise)
    depths = []
    for i in range(num):
        reference = Recursive(target, inverse_mass, step_size, q[i], p[i], uniform[i], max_depth)
        chosen, depth = reference.transition()
        torch.testing.assert_close(state.q[i], chosen[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(state.grad[i], chosen[2], rtol=1e-8, atol=1e-8)
        assert float(state.log_density[i]) == pytest.approx(chosen[3], abs=1e-8)
        assert float(info.energy[i]) == pytest.approx(reference.energy(chosen), abs=1e-8)
        assert int(info.num_steps[i]) == reference.visited
        assert int(info.tree_depth[i]) == depth
        assert float(info.acceptance_rate[i]) == pytest.approx(reference.accept / reference.visited, abs=1e-9)
        assert bool(info.diverging[i]) == reference.diverging
        depths.append(depth)
    assert info.diverging.any() == (target is steep)
    assert len(set(depths)) > 2 or max_depth == 3
    assert max(depths) > 4 or max_depth == 3
    assert info.num_gradients >= float(info.num_steps.double().mean())
    # Lock step with the chains that have finished would cost the longest tree for each.
    assert info.num_gradients < 0.8 * int(info.num_steps.max()) or max_depth == 3


def test_decisions_are_uniform_and_independent():
    """40 000 numbers of neighbouring keys and counters: Kolmogorov-Smirnov at 1e-4, correlations at 4.5 errors."""
    u = torch.cat([_trees.decisions(uniforms(800, seed=5), depth) for depth in (3, 7)], -1)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4
    c = torch.corrcoef(u.T[:20]).fill_diagonal_(0)
    assert float(c.abs().max()) * math.sqrt(800) < 4.5
    early = _trees.early_decisions(uniforms(5, seed=5)).split([_trees.count(d) for d in range(_trees.EARLY)], -1)
    for depth, part in enumerate(early):
        assert torch.equal(part, _trees.decisions(uniforms(5, seed=5), depth))


# ---- one transition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_a_transition_leaves_exact_draws_exact(kind):
    """Start 12 000 chains at exact draws of a product of logistic laws; one coarse transition leaves the law as it is.

    The draws are independent, so Kolmogorov and Smirnov's test holds exactly; six tests of level 1e-4 give a false
    alarm for fewer than 1 in 1600 seeds. A wrong metric in the turning criterion alone would keep the law; weights
    without the kinetic energy would not.
    """
    u = uniforms(12_000, 3, seed=1)
    q = u.log() - (-u).log1p()
    evaluate = value_and_grad(lambda q: (-q - 2 * torch.nn.functional.softplus(-q)).sum(-1))
    if kind == "dense":
        root = torch.eye(3, dtype=torch.float64) + 0.4 * numbers(3, 3, seed=2).tril()
        metric = dense_metric(root @ root.T)
    else:
        metric = diagonal_metric(torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64))
    parameters = nuts.Parameters(torch.tensor([0.9], dtype=torch.float64), metric)
    state = nuts.init(evaluate, q)
    after, info = nuts.step(evaluate, state, parameters, numbers(12_000, 3, seed=3), uniforms(12_000, seed=4))
    assert 0.3 < float(info.acceptance_rate.mean()) < 0.95
    assert (after.q - q).abs().mean() > 0.5
    assert all(stats.kstest(after.q[:, i].numpy(), stats.logistic.cdf).pvalue > 1e-4 for i in range(3))
    torch.testing.assert_close(after.log_density, evaluate(after.q)[0])
    torch.testing.assert_close(after.grad, evaluate(after.q)[1])


def test_a_transition_is_a_pure_function():
    evaluate = value_and_grad(banana)
    state = nuts.init(evaluate, numbers(20, 3, seed=1))
    before = [part.clone() for part in state]
    parameters = nuts.Parameters(torch.tensor([0.2]).double(), diagonal_metric(torch.ones(3).double()))
    arguments = (evaluate, state, parameters, numbers(20, 3, seed=2), uniforms(20, seed=3))
    (first, _), (second, _) = nuts.step(*arguments), nuts.step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_a_chain_outside_the_support_takes_the_way_in():
    evaluate = value_and_grad(lambda q: torch.where(q[..., 0] < 0, torch.nan, -q[..., 0]))
    state = nuts.init(evaluate, torch.full((30, 1), -0.5, dtype=torch.float64))
    parameters = nuts.Parameters(torch.tensor([0.7]).double(), diagonal_metric(torch.ones(1).double()))
    state, _ = nuts.step(evaluate, state, parameters, numbers(30, 1, seed=2), uniforms(30, seed=1), 4)
    arrived = state.log_density.isfinite()
    assert arrived.sum() > 20
    assert (state.q[arrived] >= 0).all()
    assert (state.q[~arrived] == -0.5).all()


# ---- runs ------------------------------------------------------------------------------------------------------------


def agree(draws, mean, covariance):
    """Largest |z| of the means and variances of draws (C, N, D) against the truth, by their Monte Carlo errors."""
    squares = (draws - mean) ** 2
    z = [
        (draws.mean((0, 1)) - mean) / array_stats.mcse(draws, method="mean", **AXES),
        (squares.mean((0, 1)) - np.diag(covariance)) / array_stats.mcse(squares, method="mean", **AXES),
    ]
    return np.abs(z).max()


def test_dense_metric_handles_a_rotated_ill_conditioned_gaussian():
    """Eigenvalues from 1e-4 to 1e2, rotated. 12 comparisons at 4.5 errors: a false alarm for 1 in 10 000 seeds."""
    basis = torch.linalg.qr(numbers(6, 6, seed=1))[0]
    values = torch.logspace(-4, 2, 6, dtype=torch.float64)
    covariance, precision = basis @ torch.diag(values) @ basis.T, basis @ torch.diag(1 / values) @ basis.T
    mean = numbers(6, seed=2)

    def log_density(q):
        return -0.5 * (((q - mean) @ precision) * (q - mean)).sum(-1)

    start = mean + numbers(24, 6, seed=3)
    run = nuts.run(log_density, start, num_warmup=150, num_draws=50, max_depth=7, metric="dense", seed=1)
    assert agree(run.draws.numpy(), mean.numpy(), covariance.numpy()) < 4.5
    assert float(run.stats["tree_depth"].double().mean()) < 3.5
    assert summarize(run)["divergences"] == 0


def test_acceptance_comes_near_the_target():
    for target in (0.7, 0.95):
        run = nuts.run(normal, numbers(12, 10), num_warmup=200, num_draws=40, target_accept=target)
        assert summarize(run)["acceptance_rate"] == pytest.approx(target, abs=0.08)


def test_nothing_adapts_after_warmup(monkeypatch):
    seen, step = [], nuts.step

    def spy(evaluate, state, parameters, *rest):
        seen.append(parameters)
        return step(evaluate, state, parameters, *rest)

    monkeypatch.setattr(nuts, "step", spy)
    run = nuts.run(normal, numbers(3, 2), num_warmup=60, num_draws=25, metric="dense")
    assert len(seen) == 85
    assert all(p is seen[60] for p in seen[60:])
    assert torch.equal(seen[60].step_size.squeeze(-1), run.step_size)
    assert torch.equal(seen[60].metric.inverse_mass, run.inverse_mass)


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_chain_among_many_equals_the_chain_alone(metric):
    """With step size and metric given, the first chains of 64 are those of a run of 1 and of a run of 5."""
    inverse_mass = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    inverse_mass = torch.diag(inverse_mass) + 0.2 if metric == "dense" else inverse_mass
    start = numbers(64, 3, seed=1)
    settings = {"num_warmup": 0, "num_draws": 25, "metric": metric, "seed": 3}
    settings |= {"step_size": 0.2, "inverse_mass": inverse_mass}
    many = nuts.run(banana, start, **settings)
    assert float(many.draws.std()) > 0.3
    assert many.stats["num_steps"].unique().numel() > 3
    for num in (1, 5):
        few = nuts.run(banana, start[:num], **settings)
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=0, atol=1e-8)
        assert torch.equal(few.stats["num_steps"], many.stats["num_steps"][:num])


@pytest.mark.parametrize(("groups", "metric"), [((3,), "diagonal"), ((2, 2), "dense")])
def test_groups_in_one_run_equal_a_loop_over_them(metric, groups):
    scale, start = numbers(*groups, 3, seed=1).exp(), numbers(*groups, 4, 3, seed=4)
    settings = {"num_warmup": 20, "num_draws": 5, "max_depth": 5, "metric": metric, "seed": 7}
    together = nuts.run(lambda q: banana(q / scale.unsqueeze(-2)), start, **settings)
    assert together.draws.shape == (*groups, 4, 5, 3)
    for place in np.ndindex(*groups):
        own = scale[place]
        alone = nuts.run(lambda q, own=own: banana(q / own), start[place], **settings)
        torch.testing.assert_close(together.draws[place], alone.draws, rtol=1e-5, atol=1e-6)
        for name, value in alone.stats.items():
            torch.testing.assert_close(together.stats[name][place], value, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_statistics_say_what_happened():
    calls = []

    def counted(q):
        calls.append(q[..., 0].numel())
        return banana(q)

    run = nuts.run(counted, numbers(6, 3), num_warmup=30, num_draws=20, max_depth=5, seed=1)
    assert set(run.stats) == {
        "log_density",
        "energy",
        "energy_change",
        "acceptance_rate",
        "diverging",
        "num_steps",
        "step_size",
        "tree_depth",
    }
    # Every evaluation counts, also in vain; one call is the look at the door.
    assert run.num_gradients == math.ceil((sum(calls) - calls[0]) / 6)
    depth, steps = run.stats["tree_depth"], run.stats["num_steps"]
    assert (steps >= 2**depth - 1).all()
    assert (steps <= 2**5 - 1).all()
    assert int(depth.max()) <= 5
    torch.testing.assert_close(run.stats["log_density"], banana(run.draws))
    assert (run.stats["energy"] + run.stats["log_density"] > 0).all()
    thinned = nuts.run(banana, numbers(2, 3), num_warmup=0, num_draws=5, thin=4, step_size=0.3, seed=2)
    whole = nuts.run(banana, numbers(2, 3), num_warmup=0, num_draws=20, step_size=0.3, seed=2)
    assert torch.equal(thinned.draws, whole.draws[:, 3::4])
    assert torch.equal(thinned.stats["tree_depth"], whole.stats["tree_depth"].unflatten(1, (5, 4)).amax(-1))
    assert torch.equal(thinned.stats["num_steps"], whole.stats["num_steps"].unflatten(1, (5, 4)).sum(-1))


def test_float32_positions_keep_their_dtype_and_energies_are_float64():
    run = nuts.run(normal, numbers(4, 3).float(), num_warmup=30, num_draws=10, metric="dense")
    assert run.draws.dtype == run.step_size.dtype == run.inverse_mass.dtype == torch.float32
    assert run.stats["energy"].dtype == torch.float64


@pytest.mark.gpu
def test_runs_on_the_gpu_and_matches_the_moments():
    """10 comparisons at 4.5 errors: a false alarm for 1 in 14 000 seeds."""
    run = nuts.run(normal, numbers(64, 5).float().cuda(), num_warmup=100, num_draws=60)
    assert run.draws.is_cuda
    assert agree(run.draws.double().cpu().numpy(), np.zeros(5), np.eye(5)) < 4.5


@pytest.mark.parametrize(
    ("error", "word", "change"),
    [
        (SettingError, "max_depth", {"max_depth": 0}),
        (SettingError, "max_depth", {"max_depth": 40}),
        (SettingError, "num_draws", {"num_draws": 0}),
        (SettingError, "metric", {"metric": "full"}),
        (ShapeError, "initial", {"initial": torch.zeros(2)}),
        (NumericalError, "at all 3 initial points", {"log_density": lambda q: normal(q) * torch.nan}),
    ],
)
def test_wrong_calls_fail_at_the_door(error, word, change):
    settings = {"log_density": normal, "initial": numbers(3, 2), "num_warmup": 2, "num_draws": 2, **change}
    with pytest.raises(error, match=word) as caught:
        nuts.run(settings.pop("log_density"), settings.pop("initial"), **settings)
    assert "nuts.run" in str(caught.value)
