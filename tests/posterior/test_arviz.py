"""Posteriors as ArviZ trees: shapes, units, and leave-one-out scores that agree with the closed form."""

from __future__ import annotations

import arviz_stats
import numpy as np
import pytest
import torch
from scipy import special, stats

import bayesdl
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


def test_replicated_targets_scatter_about_the_draws_with_their_noise():
    """Two data sets, 3 chains of 400 draws: each replicate is f of its own draw plus that draw's noise.

    42 means and variances of standard normal numbers at 4.5 errors: a false alarm for 1 in 3500 seeds.
    """
    x, y = toy_data((2,), n=7)
    tree = draws_posterior(x, y, chains=3, draws=400).to_arviz()
    replicates, f = tree.posterior_predictive["y"], tree.posterior["f"]
    assert replicates.dims == f.dims == ("chain", "draw", "data_set_0", "point")
    posterior = draws_posterior(x, y, chains=3, draws=400)
    deviation = (1e-6 + posterior.draws[..., -1].exp()).sqrt().movedim(0, -1)  # (3, 400, 2), standardised
    deviation = deviation * y.std(-1, correction=0)
    z = (replicates.values - f.values) / deviation.unsqueeze(-1).numpy()
    assert np.abs(z.mean((0, 1))).max() * 1200**0.5 < 4.5
    assert np.abs((z**2).mean((0, 1)) - 1).max() * 600**0.5 < 4.5
    np.testing.assert_array_equal(tree.constant_data["x"].values, x)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(3)])
def test_replicated_labels_have_the_probabilities_of_their_draw(likelihood):
    """1500 draws: 27 class frequencies at most at 4.5 errors, a false alarm for 1 in 5000 seeds."""
    x, y = labels(likelihood)
    posterior = draws_posterior(x, y, model=BNN((4,), "tanh", Normal(3.0), likelihood), chains=3, draws=500)
    tree = posterior.to_arviz()
    f, label = tree.posterior["f"].values, tree.posterior_predictive["y"].values
    p = (
        special.softmax(f, -1)
        if likelihood.task == "multiclass"
        else np.stack([special.expit(-f), special.expit(f)], -1)
    )
    hits = label[..., None] == np.arange(p.shape[-1])
    error = np.sqrt((p * (1 - p)).sum((0, 1)))
    assert (np.abs((hits - p).sum((0, 1))) < 4.5 * error).all()
    assert label.shape == (3, 500, 9)


def test_the_prior_group_is_the_prior_in_the_users_units():
    """A linear network: f has prior mean 0 (in units: the mean of y) and the variance of its weights' scales."""
    x, y = toy_data(n=6)
    model = BNN((), prior=Normal(2.0))
    prior = draws_posterior(x, y, model=model).to_arviz().prior["f"].values
    assert prior.shape == (1, 200, 6)
    spread = float(y.std(correction=0))
    z = (prior[0] - float(y.mean())) / spread
    source = torch.Generator().manual_seed(1)
    inner = (x - x.mean(0)) / x.std(0, correction=0)
    other = model.sample_prior(inner, 20_000, source).numpy()
    # 12 comparisons at 4.5 errors
    assert np.abs(z.mean(0) / other.std(0)).max() * 200**0.5 < 4.5
    assert np.abs(z.var(0) / other.var(0) - 1).max() * 100**0.5 < 4.5


@pytest.mark.filterwarnings("ignore")  # a short run, and PSIS on it
def test_every_function_of_arviz_works_on_a_sampled_network():
    x, y = toy_data(n=12)
    posterior = bayesdl.HMC(BNN((3,)), num_chains=2, num_warmup=60, num_draws=80, num_steps=8).fit(x, y, seed=0)
    tree = posterior.to_arviz()
    assert set(tree.children) == {
        *("posterior", "sample_stats", "posterior_predictive", "log_likelihood"),
        *("prior", "observed_data", "constant_data"),
    }
    assert {"energy", "diverging", "step_size", "n_steps", "acceptance_rate", "lp"} <= set(tree.sample_stats.data_vars)
    np.testing.assert_allclose(arviz_stats.bfmi(tree)["energy"].values, posterior.diagnostics["e_bfmi"], rtol=0.05)
    assert len(arviz_stats.summary(tree)) == 13
    assert len(arviz_stats.summary(tree, var_names=["noise_variance"])) == 1
    assert arviz_stats.ess(tree)["f"].shape == arviz_stats.rhat(tree)["f"].shape == (12,)
    assert arviz_stats.mcse(tree)["f"].shape == (12,)
    assert arviz_stats.loo(tree).n_data_points == 12
    values = arviz_stats.loo_pit(tree)["y"].values
    assert values.shape == (12,)
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.filterwarnings("ignore")
def test_every_function_of_arviz_works_on_chains():
    """Eight chains of a Gaussian, two starting at each of four points."""
    start = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    chains = bayesdl.sample(
        lambda q: -0.5 * q.square().sum(-1),
        dim=2,
        sampler="nuts",
        num_chains=8,
        num_warmup=60,
        num_draws=80,
        names=("a", "b"),
        initial=start.repeat_interleave(2, 0),
    )
    tree = chains.to_arviz()
    assert {"posterior", "sample_stats"} <= set(tree.children)
    wanted = {"energy", "diverging", "step_size", "n_steps", "acceptance_rate", "lp", "tree_depth"}
    assert wanted <= set(tree.sample_stats.data_vars)
    np.testing.assert_allclose(arviz_stats.bfmi(tree)["energy"].values, chains.diagnostics["e_bfmi"], rtol=0.05)
    assert set(arviz_stats.summary(tree).index) == {"a", "b"}
    assert float(arviz_stats.rhat(tree)["a"]) < 1.1
    assert float(arviz_stats.ess(tree)["b"]) > 50
    nested = arviz_stats.rhat_nested(tree, superchain_ids=np.repeat(np.arange(4), 2))
    assert float(nested["a"]) < 1.1


@pytest.mark.filterwarnings("ignore")
def test_leave_one_out_works_on_chains_of_a_density_that_knows_its_data():
    """y_i ~ N(theta, 1), theta ~ N(0, 2): elpd by leave-one-out against the closed form."""
    y = torch.tensor([0.3, -1.1, 0.8, 2.0, 0.1, -0.4], dtype=torch.float64)

    def log_likelihood(q):
        return {"y": torch.distributions.Normal(q, 1.0).log_prob(y)}

    def predictive(q, *, seed):
        g = torch.Generator().manual_seed(seed)
        return {"y": q + torch.randn(*q.shape[:-1], 6, generator=g, dtype=torch.float64)}

    density = bayesdl.LogDensity(
        lambda q: -0.125 * q[..., 0] ** 2 - 0.5 * (y - q).square().sum(-1),
        1,
        ("theta",),
        log_likelihood=log_likelihood,
        predictive=predictive,
        observed={"y": y},
    )
    tree = bayesdl.sample(density, num_chains=4, num_warmup=100, num_draws=300, num_steps=4, seed=1).to_arviz()
    exact = 0.0
    for i in range(6):
        rest = y[torch.arange(6) != i]
        variance = 1 / (0.25 + 5)
        exact += stats.norm(float(rest.sum()) * variance, (1 + variance) ** 0.5).logpdf(float(y[i]))
    assert float(arviz_stats.loo(tree).elpd) == pytest.approx(exact, abs=0.15)
    assert arviz_stats.loo_pit(tree)["y"].shape == (6,)
    np.testing.assert_array_equal(tree.observed_data["y"].values, y)
