"""Geweke's joint distribution test: a sampler of q given y, alternated with simulation of y given q, keeps the prior.

The model: mu ~ N(0, 1), log s ~ N(-0.3, 0.5), y_i ~ N(mu, s) for four i. Each of many independent chains has data of
its own, which are drawn anew after every transition; all start at exact draws of (q, y), and with step size and metric
fixed they stay such draws for ever. Reference: Geweke (2004), Getting it right, JASA 99.
"""

from __future__ import annotations

import pytest
import torch

from bayesdl.samplers import chees, hmc, nuts
from bayesdl.samplers.base import value_and_grad
from bayesdl.samplers.hamiltonian import diagonal_metric

CHAINS, STEPS, N = 2000, 100, 4
LOC, SCALE = -0.3, 0.5
METRIC = torch.tensor([0.5, 0.15], dtype=torch.float64)


def log_density(q, y, tempered=1.0):
    """log p(q) + log p(y | q) for groups of one chain: q (C, 1, 2) and y (C, 4) -> (C, 1)."""
    mu, log_s = q.unbind(-1)
    likelihood = -0.5 * ((y - mu) * (-log_s).exp()).square().sum(-1, keepdim=True) - N * log_s
    return -0.5 * mu**2 - 0.5 * ((log_s - LOC) / SCALE) ** 2 + tempered * likelihood


def normal(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


def transition(sampler, evaluate, q, g, i):
    """From q (C, 2): every chain is a group of its own, since its data are."""
    noise, uniform = normal(g, CHAINS, 1, 2), torch.rand(CHAINS, 1, generator=g, dtype=torch.float64)
    eps = torch.full((CHAINS, 1), 0.7, dtype=torch.float64)
    state, metric = hmc.init(evaluate, q.unsqueeze(1)), diagonal_metric(METRIC.expand(CHAINS, 2))
    if sampler == "nuts":
        return nuts.step(evaluate, state, nuts.Parameters(eps, metric), noise, uniform, 4)
    if sampler == "hmc":
        return hmc.step(evaluate, state, hmc.Parameters(eps, metric), noise, uniform, 1 + i % 3)
    parameters = chees.Parameters(eps, metric, torch.full((CHAINS,), 2.1, dtype=torch.float64))
    return chees.step(evaluate, state, parameters, noise, uniform, (1 + i % 4) / 4)


def joint_z_scores(sampler, *, tempered=1.0, stale=False, seed=0):
    """How far the averages of eleven functions of (q, y) lie from their values under the joint law, in errors.

    The chains are independent, so that the spread of their averages gives the error, autocorrelation included.
    """
    g = torch.Generator().manual_seed(seed)
    mu, log_s = normal(g, CHAINS), LOC + SCALE * normal(g, CHAINS)
    y = mu[:, None] + log_s.exp()[:, None] * normal(g, CHAINS, N)
    q, total, accepted = torch.stack([mu, log_s], -1), 0.0, 0.0
    for i in range(STEPS):
        evaluate = value_and_grad(lambda q, y=y: log_density(q, y, tempered))
        state, info = transition(sampler, evaluate, q, g, i)
        refused = stale & (info.acceptance_rate < 0.5)
        q = torch.where(refused, q, state.q.squeeze(1))
        accepted += float(info.acceptance_rate.mean()) / STEPS
        y = q[:, :1] + q[:, 1:].exp() * normal(g, CHAINS, N)
        total = total + features(q, y) / STEPS
    z = (total.mean(0) - EXPECTED) / (total.std(0) / CHAINS**0.5)
    return z, accepted


def features(q, y):
    mu, u = q[:, 0], (q[:, 1] - LOC) / SCALE
    mean, spread = y.mean(-1), ((y - q[:, :1]) * (-q[:, 1:]).exp()).square().mean(-1)
    parts = [mu, mu**2, u, u**2, mu * u, mu**2 * u, mean, mean * mu, mean.tanh() * u, spread, spread * u]
    return torch.stack(parts, -1)


EXPECTED = torch.tensor([0.0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0], dtype=torch.float64)


@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees"])
def test_the_joint_law_is_kept(sampler):
    """33 z-scores at 4.2 errors: a false alarm for 1 in 1100 seeds."""
    z, accepted = joint_z_scores(sampler, seed=1)
    assert 0.4 < accepted < 0.97
    assert float(z.abs().max()) < 4.2


@pytest.mark.parametrize(
    ("sampler", "change"),
    [
        ("hmc", {"tempered": 0.85}),
        ("nuts", {"tempered": 0.85}),
        ("chees", {"tempered": 0.85}),
        ("hmc", {"stale": True}),
    ],
)
def test_a_wrong_likelihood_and_a_wrong_decision_are_found(sampler, change):
    """A likelihood too flat by 15 %, and ends refused that should have had a chance."""
    z, _ = joint_z_scores(sampler, seed=1, **change)
    assert float(z.abs().max()) > 6
