"""A transition that starts at exact draws ends at exact draws, for every metric; and a broken one does not.

The target bends and widens: x ~ N(0, 1.5), y | x ~ N(x^2 / 2, 0.6), z | x ~ N(0, exp(x / 6)), a banana in (x, y) whose
third coordinate is a mild funnel. It has exact draws, and a map back to three independent standard normal numbers.
"""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from bayesdl.samplers import chees, hmc, nuts
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import dense_metric, diagonal_metric, low_rank_metric

NUM = 15_000


def log_density(q):
    x, y, z = q.unbind(-1)
    return -0.5 * (x / 1.5) ** 2 - 0.5 * ((y - x**2 / 2) / 0.6) ** 2 - 0.5 * (z * torch.exp(-x / 6)) ** 2 - x / 6


def exact(num, seed):
    x, y, z = torch.randn(3, num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = 1.5 * x
    return torch.stack([x, x**2 / 2 + 0.6 * y, torch.exp(x / 6) * z], -1)


def whitened(q):
    x, y, z = q.unbind(-1)
    return torch.stack([x / 1.5, (y - x**2 / 2) / 0.6, z * torch.exp(-x / 6)], -1)


def metric(kind):
    if kind == "dense":
        return dense_metric(torch.tensor([[2.0, 0.3, 0.2], [0.3, 1.5, -0.2], [0.2, -0.2, 0.9]], dtype=torch.float64))
    diagonal = torch.tensor([2.0, 0.5, 1.2], dtype=torch.float64)
    if kind == "low-rank":
        basis = torch.tensor([[0.6], [0.8], [0.0]], dtype=torch.float64)
        return low_rank_metric(diagonal, basis, torch.tensor([2.5], dtype=torch.float64))
    return diagonal_metric(diagonal)


def transition(sampler, kind, q, seed, uniform=None, density=log_density):
    """One coarse transition of `sampler` under a metric that is not the target's covariance."""
    evaluate = value_and_grad(density)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(q.shape, generator=g, dtype=torch.float64)
    uniform = torch.rand(len(q), generator=g, dtype=torch.float64) if uniform is None else uniform
    eps = torch.tensor([0.4], dtype=torch.float64)
    state = hmc.init(evaluate, q)
    if sampler == "nuts":
        return nuts.step(evaluate, state, nuts.Parameters(eps, metric(kind)), noise, uniform, 5)
    if sampler == "hmc":
        return hmc.step(evaluate, state, hmc.Parameters(eps, metric(kind)), noise, uniform, 3)
    length = torch.tensor(1.9, dtype=torch.float64)
    return chees.step(evaluate, state, chees.Parameters(eps, metric(kind), length), noise, uniform, 0.625)


def smallest_p(before, after):
    """The smallest p-value of the tests of one law, and of those of exchangeable pairs."""
    u = whitened(after).numpy()
    found = [stats.kstest(u[:, i], "norm").pvalue for i in range(3)]
    found.append(stats.kstest((u**2).sum(-1), stats.chi2(3).cdf).pvalue)
    found.append(stats.kstest(log_density(after).numpy(), log_density(exact(NUM, 99)).numpy()).pvalue)
    # Detailed balance: start and end are an exchangeable pair, so that f(start) g(end) - g(start) f(end) has mean 0.
    a, b = whitened(before).numpy(), u
    features = [lambda v: v[:, 0], lambda v: v[:, 0] ** 2, lambda v: v[:, 1], lambda v: v[:, 1] * v[:, 2]]
    for i in range(len(features)):
        for j in range(i):
            f, g = features[i], features[j]
            difference = f(a) * g(b) - g(a) * f(b)
            z = difference.mean() / (difference.std() / len(difference) ** 0.5)
            found.append(2 * stats.norm.sf(abs(z)))
    return min(found)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low-rank"])
@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees"])
def test_a_transition_keeps_the_law_and_is_reversible(sampler, kind):
    """Eleven tests at 1e-5 for each of nine cases: a false alarm for 1 in 1000 seeds. The acceptance is far from 1."""
    q = exact(NUM, seed=1)
    after, info = transition(sampler, kind, q, seed=2)
    assert 0.25 < float(info.acceptance_rate.mean()) < 0.9
    assert float((after.q - q).abs().mean()) > 0.2
    assert smallest_p(q, after.q) > 1e-5


@pytest.mark.parametrize(
    ("sampler", "change"),
    [
        ("hmc", {"uniform": torch.zeros(NUM, dtype=torch.float64)}),
        ("hmc", {"uniform": 0.3 * torch.rand(NUM, generator=torch.Generator().manual_seed(8), dtype=torch.float64)}),
        ("hmc", {"density": lambda q: 0.8 * log_density(q)}),
        ("nuts", {"density": lambda q: 0.8 * log_density(q)}),
        ("chees", {"density": lambda q: log_density(q) + 0.3 * q[..., 0]}),
    ],
)
def test_broken_transitions_are_found(sampler, change):
    """Everything accepted; accepted three times as readily; a density too flat by a fifth; one that is tilted."""
    q = exact(NUM, seed=1)
    after, _ = transition(sampler, "diagonal", q, seed=2, **change)
    assert smallest_p(q, after.q) < 1e-5


def test_the_tests_themselves_pass_on_exact_draws():
    q, other = exact(NUM, seed=1), exact(NUM, seed=3)
    assert smallest_p(q, other) > 1e-5
