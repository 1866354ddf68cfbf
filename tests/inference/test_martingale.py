"""Martingale posteriors: the exact GP and conjugate models as judges, the urn as a Bayesian bootstrap, wrong rules."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import bayesdl as bdl
from bayesdl.data import training_data
from bayesdl.distributions import Bernoulli, Empirical, Normal
from bayesdl.errors import BayesdlError, ConvergenceWarning, SettingError, ShapeError
from bayesdl.inference import _predictive_resampling as resampling
from bayesdl.posterior._completed import CompletedGP
from bayesdl.testing import check_engine
from tests.inference.test_pfn import toy_network

OUTPUTSCALE, LENGTHSCALE, NOISE = 2.5, 0.35, 0.3


def rbf(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The kernel of `engine`, written out."""
    return OUTPUTSCALE * np.exp(-0.5 * ((x[:, None] - z[None]) ** 2).sum(-1) / LENGTHSCALE**2)


def engine(noise: float = NOISE) -> bdl.ExactGP:
    """A GP with hyper-parameters far from defaults, not learned."""
    kernel = bdl.kernels.Scale(bdl.kernels.RBF(lengthscale=LENGTHSCALE), outputscale=OUTPUTSCALE)
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=noise))
    return bdl.ExactGP(model, optimize=False, standardize=False)


def toy(n: int = 7, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(*batch, n, 1, generator=g, dtype=torch.float64)
    noise = torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return x, (5 * x[..., 0]).sin() + NOISE**0.5 * noise


def uniform_law(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, 1, generator=generator, dtype=torch.float64)


def exact_moments(x: np.ndarray, y: np.ndarray, x_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of f by plain linear algebra."""
    gram = rbf(x, x) + NOISE * np.eye(len(x))
    cross = rbf(x, x_new)
    mean = cross.T @ np.linalg.solve(gram, y)
    return mean, OUTPUTSCALE - (cross * np.linalg.solve(gram, cross)).sum(0)


@dataclass(frozen=True)
class Rule:
    """An engine made of one function of (x seen, y seen, x) -> Distribution; it updates by remembering."""

    predictive: Any

    def fit(self, x, y, *, seed=0):
        return Remembered(self.predictive, x, y)


class Remembered:
    diagnostics: dict[str, Any] = {}  # noqa: RUF012 - a rule that reports nothing
    log_evidence = None

    def __init__(self, predictive, x, y):
        self._predictive, self._x, self._y = predictive, x, y

    def predict(self, x, *, noise=True):
        return self._predictive(self._x, self._y, x)

    def condition_on(self, x, y):
        return Remembered(self._predictive, torch.cat([self._x, x], -2), torch.cat([self._y, y], -1))


def empirical(x, y, x_new):
    """Every y so far with equal probability, whatever x: an urn of y."""
    shape = torch.broadcast_shapes(x_new.shape[:-1], (*y.shape[:-1], 1))
    return Empirical(y.unsqueeze(-2).expand(*shape, y.shape[-1]))


@pytest.mark.parametrize("rule", ["joint", "urn over labels"])
def test_obeys_the_contract(rule):
    if rule == "joint":
        inner = bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_starts=1)
        check_engine(bdl.Martingale(inner, num_rollouts=12, horizon=8, covariates="box"))
    else:
        inner = bdl.Ensemble(bdl.BNN(hidden=(4,), likelihood=bdl.Categorical(3)), num_members=2, num_steps=20)
        check_engine(bdl.Martingale(inner, num_rollouts=4, horizon=3, refit_every=3), batched_fit=False)


def test_rollouts_of_a_gp_recover_the_horizon_share_of_its_posterior():
    """Mean and covariance of f over rollouts are the exact mean and cov_n - cov_{n+N}, computed here by NumPy.

    The path is shared, so that cov_{n+N} is one known matrix. 4000 rollouts: 5 standard errors at 5 points and their
    15 covariances; a false alarm in 20 000 runs.
    """
    x, y = toy()
    g = torch.Generator().manual_seed(3)
    table = torch.rand(12, 1, generator=g, dtype=torch.float64)
    x_new = torch.tensor([[-0.1], [0.1], [0.4], [0.8], [1.2]], dtype=torch.float64)
    posterior = bdl.Martingale(engine(), num_rollouts=4000, horizon=12, covariates=table).fit(x, y, seed=1)

    def covariance(seen: np.ndarray) -> np.ndarray:
        cross = rbf(seen, x_new.numpy())
        return rbf(x_new.numpy(), x_new.numpy()) - cross.T @ np.linalg.solve(
            rbf(seen, seen) + NOISE * np.eye(len(seen)), cross
        )

    before, after = covariance(x.numpy()), covariance(torch.cat([x, table]).numpy())
    mean, _ = exact_moments(x.numpy(), y.numpy(), x_new.numpy())
    with pytest.warns(ConvergenceWarning, match="recover less than 80%"):
        draws = posterior.predict(x_new, noise=False).draws.numpy()
    share = before - after
    error = 5 * np.sqrt(np.diag(share) / 4000)
    assert np.all(np.abs(draws.mean(1) - mean) < error)
    # var of a sample covariance of Gaussians
    spread = 5 * np.sqrt((share**2 + np.outer(np.diag(share), np.diag(share))) / 4000)
    assert np.all(np.abs(np.cov(draws) - share) < spread)
    expected = 1 - np.diag(after) / np.diag(before)
    np.testing.assert_allclose(posterior.horizon_coverage(x_new).numpy(), expected, rtol=1e-8)
    assert expected.min() < 0.3 < 0.6 < expected.max()  # a wrong share would show


def test_under_the_input_law_the_exact_posterior_comes_back():
    """With 200 points from the law of x, mean and variance of f are those of the exact posterior, up to chance.

    300 rollouts, each with a path of its own; 5 standard errors at 4 points, and 1 - v_{n+N} / v_n known to 2 %.
    """
    x, y = toy(n=5)
    posterior = bdl.Martingale(engine(), num_rollouts=300, horizon=200, covariates=uniform_law).fit(x, y, seed=2)
    x_new = torch.tensor([[0.05], [0.3], [0.6], [0.95]], dtype=torch.float64)
    mean, variance = exact_moments(x.numpy(), y.numpy(), x_new.numpy())
    law = posterior.predict(x_new, noise=False)
    share = posterior.horizon_coverage(x_new).numpy()
    assert np.all(share > 0.9)
    assert np.all(np.abs(law.mean.numpy() - mean) < 5 * np.sqrt(variance / 300))
    assert np.all(np.abs(law.variance.numpy() / variance - share) < 5 * math.sqrt(2 / 300))
    assert not posterior.diagnostics["drift"]["detected"]
    predictive = posterior.predict(x_new)
    np.testing.assert_allclose(predictive.mean.numpy(), mean, atol=5 * math.sqrt(variance.max() / 300))
    np.testing.assert_allclose(predictive.variance.numpy(), variance + NOISE, rtol=0.3)


def test_a_conjugate_mean_is_reproduced():
    """y_i ~ N(theta, s), theta ~ N(0, t): the rule is conjugate; the law of theta is its exact posterior.

    f is constant under a linear kernel at x = 1, so the GP is that model. With N steps, var(f) is v_n - v_{n+N} and the
    variance of the mean of all n + N values is (N^2 v_n + N s) / (n + N)^2, both with v_n = 1 / (1/t + n/s).
    4000 rollouts: 5 standard errors of mean and variance, a false alarm in 400 000 runs of the four.
    """
    n, horizon, s, t = 4, 60, 0.7, 3.0
    y = torch.tensor([1.0, 2.5, 0.3, 1.9], dtype=torch.float64)
    x = torch.ones(n, 1, dtype=torch.float64)
    model = bdl.GP(bdl.kernels.Linear(variance=t), mean="zero", likelihood=bdl.Gaussian(noise_variance=s))
    inner = bdl.ExactGP(model, optimize=False, standardize=False)
    posterior = bdl.Martingale(inner, num_rollouts=4000, horizon=horizon).fit(x, y)
    v, after = 1 / (1 / t + n / s), 1 / (1 / t + (n + horizon) / s)
    mean = v * float(y.sum()) / s
    f = posterior.predict(x[:1], noise=False)
    assert abs(float(f.mean) - mean) < 5 * math.sqrt(v / 4000)
    assert abs(float(f.variance) / (v - after) - 1) < 5 * math.sqrt(2 / 4000)
    average = posterior.functional("mean")
    total = (horizon**2 * v + horizon * s) / (n + horizon) ** 2
    assert abs(float(average.mean) - (float(y.sum()) + horizon * mean) / (n + horizon)) < 5 * math.sqrt(total / 4000)
    assert abs(float(average.variance) / total - 1) < 5 * math.sqrt(2 / 4000)
    # the shape too, not moments alone
    assert stats.kstest(f.draws[0].numpy(), stats.norm(mean, math.sqrt(v - after)).cdf).pvalue > 1e-4


def test_a_coin_of_unknown_bias_has_its_beta_posterior():
    """Laplace's rule of succession is that of a uniform prior: the share of heads is Beta(heads + 1, tails + 1).

    1000 rollouts of 400 tosses, judged by Kolmogorov and Smirnov; false alarms 1 in 10 000.
    """

    def succession(x, y, x_new):
        p = (y.sum(-1, keepdim=True) + 1) / (y.shape[-1] + 2)
        return Bernoulli(probs=p.expand(torch.broadcast_shapes(x_new.shape[:-1], (*p.shape[:-1], 1))))

    y = torch.tensor([1.0, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    x = torch.zeros(7, 1, dtype=torch.float64)
    posterior = bdl.Martingale(Rule(succession), num_rollouts=1000, horizon=400).fit(x, y, seed=3)
    shares = posterior.functional("mean").draws.numpy()
    assert stats.kstest(shares, stats.beta(3, 6).cdf).pvalue > 1e-4
    assert not posterior.diagnostics["drift"]["detected"]


def test_the_urn_with_the_empirical_rule_is_the_bayesian_bootstrap():
    """A mean has variance s^2 / (n + 1) under Dirichlet(1, ..., 1) weights, N / (n + N) of it after N draws, and its
    third moment is that of Rubin's bootstrap. 1500 rollouts, 5 standard errors."""
    y = torch.tensor([0.0, 0.3, 0.5, 2.0, 7.0], dtype=torch.float64)
    n, horizon = 5, 100
    x = torch.arange(5.0, dtype=torch.float64).unsqueeze(-1)
    posterior = bdl.Martingale(Rule(empirical), num_rollouts=1500, horizon=horizon).fit(x, y, seed=4)
    law = posterior.functional("mean")
    exact = float(y.var(correction=0)) / (n + 1) * horizon / (n + horizon)
    assert abs(float(law.mean) - float(y.mean())) < 5 * math.sqrt(exact / 1500)
    kurtosis = stats.kurtosis(law.draws.numpy(), fisher=False)
    assert abs(float(law.variance) / exact - 1) < 5 * math.sqrt((kurtosis - 1) / 1500)
    weights = np.random.default_rng(0).dirichlet(np.ones(5), 20000)
    assert stats.ks_2samp(law.draws.numpy(), weights @ y.numpy()).pvalue > 1e-4


def test_the_urn_draws_inputs_with_dirichlet_shares():
    """The share of one of n observed inputs on a long path is Beta(1, n - 1), and it differs between rollouts."""
    data = training_data("toy", torch.arange(6.0, dtype=torch.float64)[:, None], torch.zeros(6, dtype=torch.float64))
    plan = resampling.covariate_plan("urn", data, 800, 2000, torch.Generator().manual_seed(0))
    shares = (plan[..., 0] == 2).double().mean(-1).numpy()
    assert stats.kstest(shares, stats.beta(1, 5).cdf).pvalue > 1e-4


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_rollout_drawn_at_once_is_the_one_drawn_step_by_step(batch):
    """The same uniforms through `condition_on`, one point at a time, give the same values and the same predictive."""
    x, y = toy(n=6, batch=batch)
    base = engine().fit(x, y)
    data = training_data("toy", x, y)
    plan = resampling.covariate_plan(uniform_law, data, 5, 9, torch.Generator().manual_seed(1))
    u = torch.rand(5, 9, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = torch.special.ndtri(u).mT
    joint = CompletedGP(base, plan, z.reshape(5, *[1] * len(batch), 1, 9))
    rule = resampling.Updated.start(engine(), base, data, 5, 0)
    rule, drawn = resampling.resample(rule, plan, u, drawn=None, after=lambda *_: None, keep=lambda *_: None)
    torch.testing.assert_close(drawn, joint.targets(), rtol=0, atol=1e-11)
    points = torch.linspace(-0.5, 1.5, 8, dtype=torch.float64)[:, None].expand(1, *batch, 8, 1)
    for noise in (True, False):
        one, other = joint.predict(points, noise=noise), rule.completed().predict(points, noise=noise)
        torch.testing.assert_close(one.loc, other.loc, rtol=0, atol=1e-11)
        torch.testing.assert_close(one.scale, other.scale.expand_as(one.scale), rtol=1e-8, atol=1e-11)


def test_data_sets_side_by_side_are_those_alone_and_outputs_are_independent():
    x, y = toy(n=6, batch=(2, 1))
    rule = bdl.Martingale(engine(), num_rollouts=6, horizon=5, covariates=uniform_law)
    both = rule.fit(x, y, seed=5)
    points = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
    for i in range(2):
        alone = rule.fit(x[i, 0], y[i, 0], seed=5)
        torch.testing.assert_close(both.functions(6)(points)[:, i, 0], alone.functions(6)(points))
        torch.testing.assert_close(both.functional("median").draws[i, 0], alone.functional("median").draws)
    two = rule.fit(x[0, 0], torch.stack([y[0, 0], y[0, 0]], -1), seed=5)
    assert two.completed_data()[1].shape == (6, 11, 2)
    drawn = two.completed_data()[1][:, 6:]
    assert not torch.allclose(drawn[..., 0], drawn[..., 1])  # equal data, noise of their own
    assert two.functional("linear").draws.shape == (2, 2, 6)
    torch.testing.assert_close(two.completed_data()[0][:, :6], x[0, 0].expand(6, 6, 1))


def test_test_points_in_batches_are_those_alone():
    x, y = toy(batch=(3,))
    posterior = bdl.Martingale(engine(), num_rollouts=4, horizon=5, covariates="box").fit(x, y)
    points = torch.rand(5, 2, 3, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for noise in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # five steps are few
            many, one = (posterior.predict(p, noise=noise) for p in (points, points[3, 1]))
        assert many.batch_shape == (5, 2, 3, 4)
        torch.testing.assert_close(many.mean[3, 1], one.mean)
        torch.testing.assert_close(many.variance[3, 1], one.variance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        many, one = (posterior.quantile_at(p, 0.8).draws for p in (points, points[3, 1]))
        assert posterior.sample(points, (7, 2)).shape == (7, 2, 5, 2, 3, 4)
    torch.testing.assert_close(many[3, 1], one)


def _shifted(x, y, x_new):
    base = _normal(x, y, x_new)
    return Normal(base.loc + 0.15 * base.scale, base.scale)


def _noisier(x, y, x_new):
    base = _normal(x, y, x_new)
    return Normal(base.loc, (base.scale.square() + 24).sqrt())


def _surer(x, y, x_new):
    base = _normal(x, y, x_new)
    return Normal(base.loc, (base.scale.square() - 0.95).sqrt())


def _wider(x, y, x_new):
    base = _normal(x, y, x_new)
    return Normal(base.loc, 2 * base.scale)


def _normal(x, y, x_new):
    """The conjugate rule for the mean of values of variance 1 under N(0, 4)."""
    precision = 0.25 + y.shape[-1]
    shape = torch.broadcast_shapes(x_new.shape[:-1], (*y.shape[:-1], 1))
    loc = (y.sum(-1, keepdim=True) / precision).expand(shape)
    return Normal(loc, torch.full_like(loc, math.sqrt(1 + 1 / precision)))


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [(_normal, False), (_shifted, True), (_noisier, True), (_surer, True), (_wider, False), (empirical, False)],
)
def test_a_rule_that_is_no_martingale_is_caught(rule, wrong):
    """A shift, and a noise other than the update believes in, are caught; the conjugate rule, and the same with all
    widths doubled, which is the conjugate rule of another variance, are not. 1 % of coherent rules would be."""
    y = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    x = torch.zeros(3, 1, dtype=torch.float64)
    martingale = bdl.Martingale(Rule(rule), num_rollouts=1000, horizon=100)
    if wrong:
        with pytest.warns(ConvergenceWarning, match="no martingale"):
            drift = martingale.fit(x, y).diagnostics["drift"]
        assert drift["largest_z"][-1] > drift["threshold"]
        assert drift["largest_mean"][-1] > drift["largest_mean"][0]
    else:
        drift = martingale.fit(x, y).diagnostics["drift"]
    assert drift["detected"] == wrong


def test_false_alarms_of_the_drift_test_are_rare():
    """A coherent rule on 60 data sets: at most 4 alarms, where 1 % each would give 0.6; P(5 or more) is 3 in 10 000."""
    g = torch.Generator().manual_seed(0)
    alarms = 0
    for seed in range(60):
        x = torch.rand(6, 1, generator=g, dtype=torch.float64)
        y = torch.randn(6, generator=g, dtype=torch.float64)
        martingale = bdl.Martingale(engine(), num_rollouts=60, horizon=20, covariates=uniform_law)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            alarms += martingale.fit(x, y, seed=seed).diagnostics["drift"]["detected"]
    assert alarms <= 4


def test_functions_under_the_urn_come_with_a_warning_and_population_functionals_do_not():
    x, y = toy(n=5)
    x = 0.3 * x
    posterior = bdl.Martingale(engine(), num_rollouts=50, horizon=100).fit(x, y)
    far = torch.tensor([[0.9]], dtype=torch.float64)
    for ask in (
        lambda: posterior.predict(far, noise=False),
        lambda: posterior.sample(far),
        lambda: posterior.functions(2),
    ):
        with pytest.warns(ConvergenceWarning, match="covariates"):
            ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.functional("mean")
        posterior.predict(far)
    law = bdl.Martingale(engine(), num_rollouts=50, horizon=100, covariates=uniform_law).fit(x, y)
    exact = engine().fit(x, y).predict(far, noise=False).variance
    assert float(law.predict(far, noise=False).variance / exact) > 0.6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert float(posterior.predict(far, noise=False).variance / exact) < 0.3


@pytest.mark.parametrize(
    "inner",
    [
        bdl.ScaleMixture(bdl.GP(bdl.kernels.RBF(lengthscale=0.8)), num_starts=1, max_iterations=5),
        bdl.Ensemble(bdl.BNN(hidden=(4,)), num_members=2, num_steps=30),
        bdl.Ensemble(bdl.BNN(hidden=(4,), likelihood=bdl.Bernoulli()), num_members=2, num_steps=30),
        bdl.SparseGP(bdl.GP(bdl.kernels.RBF(lengthscale=0.8)), num_inducing=5),
    ],
    ids=["scale mixture", "ensemble", "binary ensemble", "sparse"],
)
def test_any_engine_is_a_rule(inner, tmp_path):
    """Updates or refits as the engine allows; saved and loaded; every question is answered."""
    x, y = toy(n=8, seed=2)
    y = (y > 0).double() if inner.model.likelihood.task == "binary" else y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = bdl.Martingale(inner, num_rollouts=5, horizon=6, refit_every=3).fit(x, y)
        points = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None]
        assert posterior.functions(3)(points).shape == (3, 4)
        assert posterior.sample(points, (2,)).shape == (2, 4)
        predictive = posterior.predict(points)
        assert bool(torch.isfinite(predictive.log_prob(y[:4])).all())
        assert bool((predictive.quantile(0.9) >= predictive.quantile(0.1)).all())
        assert predictive.sample((3,), seed=0).shape == (3, 4)
        drawn = posterior.completed_data()[1][:, 8:]
        assert len(torch.unique(drawn)) > 1
        posterior.save(tmp_path / "p.bdl")
        loaded = bdl.load(tmp_path / "p.bdl")
        assert torch.equal(loaded.predict(points).mean, predictive.mean)
        assert torch.equal(loaded.functional("mean").draws, posterior.functional("mean").draws)


def test_a_block_of_a_refitted_rule_is_drawn_jointly():
    """Under a rule that never learns, values of one block at one input share a function: their correlation is
    v / (v + s), as under the joint predictive, and not 0. 1500 rollouts, 5 standard errors."""
    v, s = 2.0, 1.0

    class Fixed:
        def predict(self, x, *, noise=True):
            shape = x.shape[:-1]
            return Normal(torch.zeros(shape, dtype=x.dtype), torch.full(shape, math.sqrt(v + s * noise), dtype=x.dtype))

        def sample(self, x, sample_shape=(), *, seed=0):
            g = torch.Generator().manual_seed(seed)
            level = torch.randn(*sample_shape, *x.shape[:-2], 1, generator=g, dtype=x.dtype)
            return (v**0.5 * level).expand(*sample_shape, *x.shape[:-1])

    class FixedEngine:
        model = None

        def fit(self, x, y, *, seed=0):
            return Fixed()

    posterior = bdl.Martingale(FixedEngine(), num_rollouts=1500, horizon=4, refit_every=2).fit(
        torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    )
    drawn = posterior.completed_data()[1][:, 3:].numpy()
    correlation = np.corrcoef(drawn.T)
    error = 5 / math.sqrt(1500)
    assert abs(correlation[0, 1] - v / (v + s)) < error
    assert abs(correlation[2, 3] - v / (v + s)) < error
    assert abs(correlation[0, 2]) < error
    assert abs(drawn.var() - (v + s)) < 5 * (v + s) * math.sqrt(2 / 1500)


def test_inverse_cdf_inverts_every_family():
    g = torch.Generator().manual_seed(0)
    loc = torch.randn(4, 3, generator=g, dtype=torch.float64)
    mixture = bdl.distributions.GaussianMixture(torch.stack([loc, loc + 6], -1), torch.full((4, 3, 2), 0.4).double())
    student = bdl.distributions.StudentT(torch.tensor(1.7).double(), loc, torch.tensor(0.3).double())
    u = torch.rand(4, 3, generator=g, dtype=torch.float64)
    u[0, 0], u[0, 1] = 1e-9, 1 - 1e-9
    for predictive in (Normal(loc, torch.tensor(2.0).double()), mixture, student):
        y = resampling.inverse_cdf(predictive, u)
        torch.testing.assert_close(predictive.cdf(y), u, rtol=1e-6, atol=1e-12)
    labels = bdl.distributions.Categorical(probs=torch.tensor([[0.2, 0.5, 0.3]]).double())
    levels = torch.tensor([[0.1], [0.25], [0.69], [0.71]]).double()
    assert resampling.inverse_cdf(labels, levels).tolist() == [[0], [1], [1], [2]]


def test_functionals_against_numpy():
    x, y = toy(n=9, batch=(2,))
    posterior = bdl.Martingale(engine(), num_rollouts=3, horizon=4, covariates="box").fit(x, y)
    all_x, all_y = posterior.completed_data()
    for i in range(2):
        for rollout in range(3):
            values = all_y[rollout, i].numpy()
            assert float(posterior.functional("mean").draws[i, rollout]) == pytest.approx(values.mean())
            ninth = posterior.functional("quantile", level=0.9).draws[i, rollout]
            assert float(ninth) == pytest.approx(np.quantile(values, 0.9))
            slope, intercept = np.polyfit(all_x[rollout, i, :, 0].numpy(), values, 1)
            np.testing.assert_allclose(posterior.functional("linear").draws[i, :, rollout], [intercept, slope])

    def absolute(theta, x, y):
        return ((y - theta[..., :1]).square() + 0.01).sqrt()

    centre = posterior.minimise(absolute, [0.0]).draws
    slope = (
        (all_y - centre[:, 0].mT.unsqueeze(-1)) / ((all_y - centre[:, 0].mT.unsqueeze(-1)) ** 2 + 0.01).sqrt()
    ).mean(-1)
    assert float(slope.abs().max()) < 1e-4


def test_logistic_functional_against_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(3, 60, 2)) * [1.0, 40.0] + [0.0, 900.0])
    y = torch.tensor((x[..., 0].numpy() + 0.02 * (x[..., 1].numpy() - 900) + rng.logistic(size=(3, 60)) > 0) * 1.0)
    from bayesdl.posterior._functionals import logistic

    found = logistic(x, y)
    for i in range(3):
        judge = LogisticRegression(C=1e8, tol=1e-10, max_iter=5000).fit((x[i] - 900 * torch.tensor([0, 1])), y[i])
        slopes = judge.coef_[0]
        np.testing.assert_allclose(found[i, 1:], slopes, rtol=1e-2)
        np.testing.assert_allclose(found[i, 0], judge.intercept_[0] - 900 * slopes[1], rtol=1e-2)


def test_bad_settings_and_rules_are_refused():
    x, y = toy()
    with pytest.raises(SettingError, match="engine"):
        bdl.Martingale(bdl.GP(bdl.kernels.RBF()))
    with pytest.raises(SettingError, match="covariates"):
        bdl.Martingale(engine(), covariates="grid")
    with pytest.raises(SettingError, match="horizon"):
        bdl.Martingale(engine(), horizon=0)
    with pytest.raises(ShapeError, match="covariates"):
        bdl.Martingale(engine(), covariates=torch.zeros(4, 3)).fit(x, y)
    with pytest.raises(ShapeError, match=r"\(1000, 1\)"):
        bdl.Martingale(engine(), num_rollouts=10, horizon=100, covariates=lambda count, g: torch.zeros(3, 1)).fit(x, y)
    posterior = bdl.Martingale(engine(), num_rollouts=3, horizon=3, covariates="box").fit(x, y)
    with pytest.raises(SettingError, match="what"):
        posterior.functional("mode")
    with pytest.raises(SettingError, match="level"):
        posterior.functional("quantile")
    with pytest.raises(SettingError, match="level"):
        posterior.functional("mean", level=0.5)
    with pytest.raises(SettingError, match="one set a rollout"):
        posterior.functional(lambda x, y: y.mean())

    class Single:
        """Takes one data set."""

        def fit(self, x, y, *, seed=0):
            if x.ndim > 2:
                raise ShapeError("Single.fit: one data set, please.\n  got  several\n  fix  a loop")
            return engine().fit(x, y).rule if x.ndim > 2 else Remembered(_normal, x, y)

    class Unable(Remembered):
        def condition_on(self, x, y):
            raise NotImplementedError("no")

    class SingleUnable(Single):
        def fit(self, x, y, *, seed=0):
            super().fit(x, y)
            return Unable(_normal, x, y)

    with pytest.raises(BayesdlError, match="neither be updated nor fitted"):
        bdl.Martingale(SingleUnable(), num_rollouts=3, horizon=3, refit_every=1).fit(x, y)


def test_too_many_paths_of_their_own_are_refused_with_a_way_out(monkeypatch):
    monkeypatch.setattr("bayesdl.inference.martingale.default_memory", lambda device: 10_000)
    with pytest.raises(SettingError, match="share one factor"):
        bdl.Martingale(engine()).fit(*toy())


@pytest.mark.parametrize("head", ["bars", "mixture", "classes"])
def test_a_network_is_a_rule_and_reads_its_context_once(head, tmp_path):
    """An untrained network: after a rollout it says what it says once the rollout was appended to its context."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(9, 2)))
    y = torch.tensor(rng.integers(0, 3, 9) if head == "classes" else rng.normal(size=9)).double()
    pfn = bdl.PFN(toy_network(head), num_classes=3 if head == "classes" else None, update="append")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained network is no martingale
        posterior = bdl.Martingale(pfn, num_rollouts=6, horizon=5).fit(x, y, seed=1)
        x_all, y_all = posterior.completed_data()
        assert y_all.shape == (6, 14)
        points = torch.tensor(rng.normal(size=(4, 2)))
        told = pfn.fit(x, y).condition_on(x_all[2, 9:], y_all[2, 9:]).predict(points)
        means = posterior.functions(6)(points)
        if head != "classes":
            found = posterior.predict(points, noise=False).draws[..., 2]
            torch.testing.assert_close(found, told.mean, rtol=1e-5, atol=1e-6)
            assert len(torch.unique(y_all[:, 9:])) == 30
        else:
            assert set(torch.unique(y_all).tolist()) <= {0.0, 1.0, 2.0}
            assert means.shape == (6, 4, 3)
        predictive = posterior.predict(points)
        assert bool(torch.isfinite(predictive.log_prob(y[:4])).all())
        assert predictive.quantile(0.5).shape == (4,)
        posterior.save(tmp_path / "p.bdl")
        torch.testing.assert_close(bdl.load(tmp_path / "p.bdl").functions(6)(points), means)


def test_rollouts_stay_within_what_a_network_was_trained_to_read():
    """By default they end there; a longer horizon, or data that leave none, is refused before anything is drawn."""
    rng = np.random.default_rng(1)
    x, y = torch.tensor(rng.normal(size=(9, 2))), torch.tensor(rng.normal(size=9))
    pfn = bdl.PFN(toy_network("mixture"))
    most = pfn.network.card["ranges"]["n"][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained network is no martingale
        posterior = bdl.Martingale(pfn, num_rollouts=3).fit(x, y)
    assert posterior.diagnostics["horizon"] == most - 9
    with pytest.raises(SettingError, match=rf"(?s)horizon={most - 8}.*fix  horizon={most - 9}"):
        bdl.Martingale(pfn, num_rollouts=3, horizon=most - 8).fit(x, y)
    many = torch.tensor(rng.normal(size=(most, 3)))
    with pytest.raises(SettingError, match="a subset of the data"):
        bdl.Martingale(pfn, num_rollouts=3).fit(many[:, :2], many[:, 2])


@dataclass(frozen=True)
class Interrupted:
    """An engine that updates, and that stops the program when it has been asked to update so often."""

    inner: Any
    after: int

    @property
    def model(self) -> Any:
        """The engine's."""
        return self.inner.model

    def fit(self, x, y, *, seed=0):
        """Refitting engines stop here, once the data have grown by `after`."""
        if x.ndim > 2 and x.shape[-2] >= self.after:
            raise KeyboardInterrupt
        return self.inner.fit(x, y, seed=seed)

    def __repr__(self) -> str:
        return repr(self.inner)


@pytest.mark.parametrize("kind", ["refit", "update"])
def test_a_run_that_was_stopped_goes_on_with_the_same_draws(kind, tmp_path, monkeypatch):
    """Also the verdict on drift; another seed, or other data, are refused; a run that is over draws nothing."""
    from bayesdl.inference import _predictive_checkpoint as keeping

    monkeypatch.setattr(keeping.Checkpoint, "due", lambda self: True)
    x, y = toy(8, seed=3)
    if kind == "refit":
        inner: Any = bdl.Ensemble(bdl.BNN(hidden=(4,)), num_members=3, num_steps=20)
    else:
        inner = bdl.PFN(toy_network("mixture"), update="append")
    settings = {"num_rollouts": 6, "horizon": 9, "refit_every": 2, "covariates": uniform_law}
    whole = bdl.Martingale(inner, **settings).fit(x, y, seed=5)
    folder = str(tmp_path / "run")
    if kind == "refit":
        with pytest.raises(KeyboardInterrupt):
            bdl.Martingale(Interrupted(inner, 8 + 5), **settings, checkpoint=folder).fit(x, y, seed=5)
    else:
        calls = []

        def draw(self, at, u, old=resampling.Updated.draw):
            calls.append(0)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return old(self, at, u)

        with monkeypatch.context() as patch:
            patch.setattr(resampling.Updated, "draw", draw)
            with pytest.raises(KeyboardInterrupt):
                bdl.Martingale(inner, **settings, checkpoint=folder).fit(x, y, seed=5)
    drawn: list[int] = []
    rule = resampling.Refitted if kind == "refit" else resampling.Updated
    before = rule.draw
    monkeypatch.setattr(rule, "draw", lambda self, at, u: drawn.append(at.shape[-2]) or before(self, at, u))
    resumed = bdl.Martingale(inner, **settings, checkpoint=folder).fit(x, y, seed=5)
    assert sum(drawn) == {"refit": 5, "update": 4}[kind]
    assert torch.equal(resumed._drawn_y, whole._drawn_y)
    assert resumed.diagnostics["drift"] == whole.diagnostics["drift"]
    at = torch.linspace(0, 1, 5, dtype=torch.float64).unsqueeze(-1)
    assert torch.equal(resumed.predict(at).mean, whole.predict(at).mean)
    again = bdl.Martingale(inner, **settings, checkpoint=folder).fit(x, y, seed=5)
    assert sum(drawn) == {"refit": 5, "update": 4}[kind]
    assert torch.equal(again._drawn_y, whole._drawn_y)
    with pytest.raises(SettingError, match="numbers"):
        bdl.Martingale(inner, **settings, checkpoint=folder).fit(x, y, seed=6)
    with pytest.raises(SettingError, match="data="):
        bdl.Martingale(inner, **settings, checkpoint=folder).fit(x, y + x[:, 0], seed=5)
