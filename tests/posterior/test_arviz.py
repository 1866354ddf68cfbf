"""Posteriors as ArviZ trees: shapes, units, and leave-one-out scores that agree with the closed form."""

from __future__ import annotations

import arviz_stats
import numpy as np
import pytest
import torch
from scipy import special, stats

from bayesdl import ops
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models import BNN
from bayesdl.priors import Normal
from tests.posterior.toys import draws_posterior, gp_posterior, labels, toy_data

SHAPES = [((), None), ((), 1), ((), 2), ((3,), None), ((3,), 2)]


@pytest.mark.parametrize(("batch", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["gp", "draws"])
def test_groups_have_the_shape_of_the_targets_and_the_users_units(kind, batch, k):
    """The pointwise log likelihood is that of y given each draw of f, which the same tree holds."""
    x, y = toy_data(batch, k)
    posterior = gp_posterior(x, y) if kind == "gp" else draws_posterior(x, y)
    tree = posterior.to_arviz()
    chains, draws = (1, 1000) if kind == "gp" else (2, 5)
    assert tree.posterior["f"].shape == tree.log_likelihood["y"].shape == (chains, draws, *y.shape)
    assert tree.posterior["f"].dims[:2] == ("chain", "draw")
    np.testing.assert_array_equal(tree.observed_data["y"].values, y)
    f = torch.tensor(tree.posterior["f"].values)
    spread = y.std(len(batch), correction=0)  # (*b[, k])
    if kind == "gp":
        variance = (posterior.hyperparameters["noise_variance"] * spread.square()).expand(1, 1, *spread.shape)
    else:
        logs = posterior.draws[..., -(k or 1) :].movedim((-3, -2), (0, 1))
        v = 1e-6 + (logs if k else logs.squeeze(-1)).exp()
        variance = v * spread.square()
        if not batch:
            np.testing.assert_allclose(tree.posterior["noise_variance"].values, variance, rtol=1e-10)
    deviation = variance.sqrt().unsqueeze(2 + len(batch))
    wanted = stats.norm(f.numpy(), deviation.numpy()).logpdf(y.numpy())
    np.testing.assert_allclose(tree.log_likelihood["y"].values, wanted, rtol=1e-8)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(3)])
def test_log_likelihoods_of_labels(likelihood):
    x, y = labels(likelihood)
    posterior = draws_posterior(x, y, model=BNN((4,), "tanh", Normal(3.0), likelihood))
    tree = posterior.to_arviz()
    f, label = tree.posterior["f"].values, y.numpy().astype(int)
    if likelihood.task == "binary":
        assert f.shape == (2, 5, 9)
        wanted = stats.bernoulli(special.expit(f)).logpmf(label)
    else:
        assert f.shape == (2, 5, 9, 3)
        wanted = np.take_along_axis(special.log_softmax(f, -1), label[None, None, :, None], -1)[..., 0]
    np.testing.assert_allclose(tree.log_likelihood["y"].values, wanted, rtol=1e-9)
    assert tree.log_likelihood["y"].shape == (2, 5, 9)


def test_statistics_of_the_sampler_come_along_under_arviz_names():
    tree = draws_posterior(*toy_data()).to_arviz()
    assert set(tree.sample_stats.data_vars) == {"lp", "diverging", "n_steps"}
    assert tree.sample_stats["diverging"].shape == (2, 5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PSIS warns where a point is influential
def test_leave_one_out_of_a_gp_is_that_of_the_closed_form():
    """Importance sampling over 1000 draws errs by less than 0.1 a point here; a wrong unit would err by log 250."""
    x, y = toy_data(n=15)
    posterior = gp_posterior(x, y, noise=0.4, spread=0.1)
    loo = arviz_stats.loo(posterior.to_arviz())
    state, spread = posterior._state, y.std(correction=0)
    mean, variance = ops.leave_one_out(state)
    residual = state.residual
    exact = torch.distributions.Normal(mean, variance.sqrt()).log_prob(residual) - spread.log()
    assert loo.n_data_points == 15
    assert float(loo.elpd) == pytest.approx(float(exact.sum()), abs=1.5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("k", [None, 2])
def test_leave_one_out_of_draws_loads(k):
    """Draws close to each other have no influential points: then elpd is nearly the log likelihood of any of them."""
    x, y = toy_data(k=k)
    posterior = draws_posterior(x, y, model=BNN((4,), likelihood=Gaussian(prior=None)), chains=4, draws=50)
    near = posterior._draws[:1, :1] + 1e-3 * posterior._draws
    posterior = type(posterior)(posterior.model, posterior._data, posterior._units, {}, draws=near)
    tree = posterior.to_arviz()
    loo = arviz_stats.loo(tree)
    assert loo.n_data_points == y.numel()
    assert float(loo.elpd) == pytest.approx(float(tree.log_likelihood["y"].mean(("chain", "draw")).sum()), abs=0.5)
