"""The inducing-point posterior: dense formulas, brute-force averages, a scale shared by all points and classes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import invgamma

import bayesdl as bdl
from bayesdl import ops
from bayesdl.data import training_data
from bayesdl.errors import ConvergenceWarning, SettingError, ShapeError
from bayesdl.inference import _bounds, _expectations, _natural_gradients
from bayesdl.inference._bounds import InducingProblem, Variational, evaluate, read_point
from bayesdl.inference._expectations import Scales
from bayesdl.inference._inducing import InducingSettings, InverseGammaParams, fit_inducing
from bayesdl.posterior import inducing
from bayesdl.testing import check_engine

KERNEL = bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5, lengthscale=(0.8, 1.4)), outputscale=2.3)


@dataclass(frozen=True)
class Mixture:
    """Classification with a random scale, as an engine of its own."""

    model: Any
    settings: InducingSettings
    prior: InverseGammaParams

    def fit(self, x: Any, y: Any, *, seed: Any = 0) -> Any:
        data = training_data("Mixture.fit", x, y)
        return fit_inducing("Mixture.fit", self.model, data, self.settings, scale_prior=self.prior, seed=seed)


def toy(n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    return x, (2 * x[:, 0]).sin() + 0.4 * x[:, 1] + 0.2 * torch.randn(n, generator=g, dtype=torch.float64)


def quietly(engine: Any, x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return engine.fit(x, y, seed=seed)


def sparse(likelihood: Any, m: int = 12, **settings: Any) -> bdl.SparseGP:
    """An engine that keeps hyper-parameters and inducing points where they start."""
    model = bdl.GP(KERNEL, mean="zero", likelihood=likelihood)
    return bdl.SparseGP(model, num_inducing=m, optimize=False, move_inducing=False, standardize=False, **settings)


@pytest.mark.parametrize("likelihood", [bdl.Bernoulli(), bdl.Categorical(3)], ids=["two classes", "three classes"])
def test_a_scale_mixture_obeys_the_contract(likelihood):
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF()), likelihood=likelihood)
    settings = InducingSettings(num_inducing=6, num_steps=6, batch_size=16, num_samples=4)
    check_engine(Mixture(model, settings, InverseGammaParams(2.5, 3.0)))


def test_update_by_more_data_is_the_dense_formula_for_all_data():
    """q(u) after both halves: Titsias' optimal q from whole matrices, and the predictive that it implies."""
    x, y = toy(50)
    posterior = sparse(bdl.Gaussian(noise_variance=0.15)).fit(x[:30], y[:30])
    updated = posterior.condition_on(x[30:45], y[30:45]).condition_on(x[45:], y[45:])
    z, x_new = posterior.inducing_points, toy(7, seed=3)[0]
    k_mm = KERNEL(z) + 1e-8 * 2.3 * torch.eye(12)
    k_mn, k_ms = KERNEL(z, x), KERNEL(z, x_new)
    sigma = torch.linalg.inv(k_mm + k_mn @ k_mn.mT / 0.15)
    mean = k_ms.mT @ sigma @ k_mn @ y / 0.15
    covariance = KERNEL(x_new) - k_ms.mT @ (torch.linalg.inv(k_mm) - sigma) @ k_ms
    latent = updated.predict(x_new, noise=False)
    torch.testing.assert_close(latent.mean, mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(latent.variance, covariance.diagonal(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(updated.predict(x_new).variance, latent.variance + 0.15, rtol=1e-9, atol=0)
    assert updated.diagnostics["num_data"] == 50
    assert "elbo" not in updated.diagnostics
    draws = updated.sample(x_new, (6000,), seed=1)
    centred = draws - draws.mean(0)
    sd = covariance.diagonal().sqrt()
    # 28 entries at five standard errors: about 2e-5 false alarms; the seed is fixed
    bound = 5 * math.sqrt(2 / 6000) * sd.unsqueeze(-1) * sd
    assert bool(((centred.mT @ centred / 6000 - covariance).abs() <= bound).all())


def test_functions_have_the_mean_and_covariance_of_the_posterior():
    """4000 pathwise draws against joint moments of `sample`'s own formula, near data and far from them."""
    x, y = toy(40)
    posterior = sparse(bdl.Gaussian(noise_variance=0.15)).fit(x, y)
    x_new = torch.cat([x[:3], x[:1] + 4.0])
    latent = posterior.predict(x_new, noise=False)
    values = posterior.functions(4000, seed=2, num_features=64)(x_new)
    # five standard errors for 4 means and variances: 5e-6 false alarms; features add variance of their own far out
    assert bool(((values.mean(0) - latent.mean).abs() <= 5 * latent.stddev / 4000**0.5).all())
    assert bool(((values.var(0) / latent.variance - 1).abs() <= 5 * (2 / 4000) ** 0.5 + 0.02).all())


def test_only_gaussian_noise_and_matching_data_can_update():
    x, y = toy(20)
    posterior = sparse(bdl.Gaussian(noise_variance=0.15)).fit(x, y)
    with pytest.raises(ShapeError, match="like the training data"):
        posterior.condition_on(x[:, :1], y)
    classes = quietly(sparse(bdl.Bernoulli(), num_steps=3), x, (y > 0).double())
    with pytest.raises(NotImplementedError, match=r"bdl\.ExactGP"):
        classes.condition_on(x, (y > 0).double())


def test_class_probabilities_are_averages_of_the_softmax():
    """2e5 joint draws as judge: four standard errors and the stated error of the quasi-random average."""
    x, y = toy(40)
    labels = (y > 0.3).double() + (y > -0.5).double()
    posterior = quietly(sparse(bdl.Categorical(3), num_steps=40, natural_learning_rate=0.4), x, labels)
    x_new = toy(3, seed=9)[0]
    p = posterior.predict(x_new).probs
    draws = torch.softmax(posterior.sample(x_new, (200_000,), seed=4), -1)
    assert bool(((p - draws.mean(0)).abs() <= 4 * draws.std(0) / 200_000**0.5 + 1e-3).all())
    torch.testing.assert_close(p.sum(-1), torch.ones(3).double())


@pytest.mark.parametrize("likelihood", [bdl.Bernoulli(), bdl.Categorical(3)], ids=["two classes", "three classes"])
def test_one_scale_serves_all_points_and_classes_of_a_draw(likelihood):
    """Far from the data f is Student-t: independent normals at far points would have uncorrelated squares.

    The ranks of |f| then correlate, by about 0.1 for IG(3, 2); without a common scale by 0.016 at most, four standard
    errors of 4000 draws.
    """
    x, y = toy(30)
    y = (y > 0).double() if isinstance(likelihood, bdl.Bernoulli) else (y > 0.3).double() + (y > -0.5).double()
    model = bdl.GP(KERNEL, mean="zero", likelihood=likelihood)
    # a step of next to nothing: q(c) stays IG(3, 2)
    settings = InducingSettings(8, num_steps=1, natural_learning_rate=1e-9, optimize=False, standardize=False)
    posterior = quietly(Mixture(model, settings, InverseGammaParams(3.0, 2.0)), x, y)
    far = torch.tensor([[60.0, 0.0], [-60.0, 30.0]], dtype=torch.float64)
    draws = posterior.sample(far, (20_000,), seed=0).reshape(20_000, -1)
    paths = posterior.functions(4000, seed=0, num_features=128)(far).reshape(4000, -1)
    for values in (draws, paths):
        ranks = values.abs().argsort(0).argsort(0).double()
        correlation = torch.corrcoef(ranks.mT)
        assert float(correlation.min()) > 0.06
        assert float((correlation - torch.eye(len(correlation))).max()) < 0.2
    latent = posterior.predict(far, noise=False)
    assert isinstance(latent, bdl.distributions.StudentT)
    a, b = (float(posterior.hyperparameters[f"scale.{name}"]) for name in ("concentration", "rate"))
    assert float(latent.dof.reshape(-1)[0]) == pytest.approx(2 * a)
    assert float(latent.variance.reshape(-1)[0]) == pytest.approx(2.3 * b / (a - 1), rel=1e-6)


def test_probabilities_of_two_classes_average_over_the_scale():
    x, y = toy(30)
    model = bdl.GP(KERNEL, mean="zero", likelihood=bdl.Bernoulli())
    settings = InducingSettings(8, num_steps=10, natural_learning_rate=0.4, optimize=False, standardize=False)
    posterior = quietly(Mixture(model, settings, InverseGammaParams(1.5, 4.0)), x, (y > 0).double())
    x_new = toy(4, seed=9)[0]
    draws = torch.sigmoid(posterior.sample(x_new, (200_000,), seed=4))
    error = (posterior.predict(x_new).probs - draws.mean(0)).abs()
    assert bool((error <= 4 * draws.std(0) / 200_000**0.5).all())  # 3e-4 false alarms; the seed is fixed


def test_a_scale_that_is_known_gives_the_plain_gp():
    """IG(1e6, 1e6) is a point at 1: bound, probabilities and latent moments are those of SparseGP."""
    x, y = toy(30)
    y = (y > 0).double()
    engine = sparse(bdl.Bernoulli(), 8, num_steps=40, natural_learning_rate=0.5)
    plain = quietly(engine, x, y)
    mixed = quietly(Mixture(engine.model, engine._settings(), InverseGammaParams(1e6, 1e6)), x, y)
    assert mixed.diagnostics["elbo"] == pytest.approx(plain.diagnostics["elbo"], abs=1e-4)
    torch.testing.assert_close(mixed.predict(x).probs, plain.predict(x).probs, rtol=0, atol=1e-5)


def test_the_bound_with_a_scale_agrees_with_draws_from_q():
    """E_q[log p(y | f)] - KL for three classes at a q far from the prior, by 60 000 draws of c and f from q itself."""
    x, _ = toy(6)
    y = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    model = bdl.GP(KERNEL, mean="zero", likelihood=bdl.Categorical(3))
    problem = InducingProblem(model, model.layout(2), x.unsqueeze(0), y.unsqueeze(0), 3)
    z = toy(4, seed=2)[0]
    point = read_point(problem, torch.cat([problem.layout.initial(x), z.reshape(-1)]).unsqueeze(0))
    g = torch.Generator().manual_seed(0)
    root = 0.5 * torch.randn(3, 4, 4, generator=g, dtype=torch.float64).tril() + 0.7 * torch.eye(4)
    mean = torch.randn(3, 4, generator=g, dtype=torch.float64)
    precision = torch.linalg.inv(root.mT @ root)
    q = Variational(mean[None], precision[None], root[None])
    a, b = torch.tensor([2.7]).double(), torch.tensor([1.9]).double()
    scales = Scales(*ops.inverse_gamma_nodes(a, b, 16))
    noise = torch.randn(4000, 3, 6, generator=g, dtype=torch.float64)
    found = evaluate(problem, point, q, _expectations.categorical(scales, noise), None, slopes=False)
    ours = float(found.expected)

    c = torch.tensor(invgamma(2.7, scale=1.9).rvs(60_000, random_state=1)).reshape(-1, 1, 1)
    cross = KERNEL(z, x)
    k_mm = KERNEL(z) + 1e-8 * 2.3 * torch.eye(4)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(k_mm), cross, upper=False)
    centre = mean @ whitened
    variance = 2.3 - whitened.square().sum(0) + (root @ whitened).square().sum(-2)
    f = centre + (c * variance).sqrt() * torch.randn(60_000, 3, 6, generator=g, dtype=torch.float64)
    draws = torch.log_softmax(f, -2).gather(-2, y.long().expand(60_000, 1, -1)).squeeze(-2).sum(-1)
    # five standard errors of the judge and, for ours, of 4000 draws: 1e-6 false alarms; seeds are fixed
    assert abs(ours - float(draws.mean())) < 5 * float(draws.std()) * (60_000**-0.5 + 4000**-0.5)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_slopes_of_expected_log_likelihoods_agree_with_differences_of_their_values(task):
    """By quadrature for two classes; for three by 20 000 draws in common, whose Price slopes have their own error."""
    g = torch.Generator().manual_seed(1)
    latents = 1 if task == "binary" else 3
    num = 20_000
    mean = torch.randn(1, latents, 2, generator=g, dtype=torch.float64)
    variance = torch.rand(1, latents, 2, generator=g, dtype=torch.float64) + 0.3
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    scales = Scales(*ops.inverse_gamma_nodes(torch.tensor([2.2]).double(), torch.tensor([1.4]).double(), 4))
    noise = torch.randn(num, latents, 2, generator=g, dtype=torch.float64)
    make = _expectations.bernoulli(scales) if task == "binary" else _expectations.categorical(scales, noise)
    found = make(mean, variance, y)
    for tensor, slope, rtol in ((mean, found.by_mean, 1e-4), (variance, found.by_variance, 1e-2)):
        for index in np.ndindex(*tensor.shape):
            values = []
            for sign in (1, -1):
                tensor[index] += sign * 1e-4
                values.append(float(make(mean, variance, y).value))
                tensor[index] -= sign * 1e-4
            numeric = (values[0] - values[1]) / 2e-4
            assert float(slope[index]) == pytest.approx(numeric, rel=rtol if task == "binary" else 0.05, abs=2e-3)
    assert float((scales.weight * found.by_node).sum()) == pytest.approx(float(found.value), rel=1e-12)


def test_the_scale_learns_what_brute_force_says():
    """Two points, two classes, c ~ IG(3, 2): the bound is below the evidence by less than 0.1, and p(y = 1) agrees.

    The judge is a product rule: 48 nodes of c and 40 x 40 Gauss-Hermite nodes of f. Under q the mean of f does not
    depend on c, as it does under the posterior; that costs about 0.02 of probability here.
    """
    x = torch.tensor([[-0.7, 0.2], [0.4, -0.4]], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0], dtype=torch.float64)
    model = bdl.GP(KERNEL, mean="zero", likelihood=bdl.Bernoulli())
    settings = InducingSettings(2, None, 40, 0.05, 0.4, optimize=False, move_inducing=False, standardize=False)
    posterior = quietly(Mixture(model, settings, InverseGammaParams(3.0, 2.0)), x, y)
    node, weight = ops.gauss_hermite(40, x)
    grid, mass = torch.cartesian_prod(node, node), torch.cartesian_prod(weight, weight).prod(-1)
    c, share = ops.inverse_gamma_nodes(torch.tensor(3.0).double(), torch.tensor(2.0).double(), 48)
    f = c.sqrt()[:, None, None] * (grid @ torch.linalg.cholesky(KERNEL(x)).mT)
    joint = share.unsqueeze(-1) * mass * torch.sigmoid((2 * y - 1) * f).prod(-1)
    evidence = float(joint.sum())
    success = (joint.unsqueeze(-1) * torch.sigmoid(f)).sum((0, 1)) / evidence
    assert math.log(evidence) - 0.1 < posterior.diagnostics["elbo"] <= math.log(evidence) + 1e-6
    torch.testing.assert_close(posterior.predict(x).probs, success, rtol=0, atol=0.03)


def test_the_scale_stops_where_the_bound_is_flat():
    """Natural steps at a fixed q(v) end at a maximum of the bound over (a, b), by SciPy's own search, from afar."""
    x, y = toy(12)
    model = bdl.GP(KERNEL, mean="zero", likelihood=bdl.Bernoulli())
    problem = InducingProblem(model, model.layout(2), x.unsqueeze(0), (y > 0).double().unsqueeze(0), 1)
    vector = torch.cat([problem.layout.initial(x), toy(3, seed=2)[0].reshape(-1)]).unsqueeze(0)
    point = read_point(problem, vector)
    q = Variational.prior(vector, 1, 1, 3)
    q = q._replace(mean=q.mean + torch.tensor([0.9, -1.1, 0.4]).double())
    prior = InverseGammaParams(2.0, 3.0)

    def visit(scale: Any) -> Any:
        expected = _natural_gradients._expected(problem, point, scale, 1, torch.Generator())
        return evaluate(problem, point, q, expected, None, slopes=True)

    def negative_bound(log_ab: np.ndarray) -> float:
        scale = _natural_gradients._scale(torch.tensor(np.exp(log_ab)).unsqueeze(0), prior, vector)
        return -float(visit(scale).expected - _natural_gradients._kl(q, scale))

    scale = _natural_gradients._scale(torch.tensor([[9.0, 0.7]], dtype=torch.float64), prior, vector)
    for _ in range(40):
        scale = _natural_gradients._scale_step(scale, prior, q, visit(scale), 0.5)
    found = minimize(negative_bound, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-10})
    np.testing.assert_allclose(scale.a_and_b.detach()[0].numpy(), np.exp(found.x), rtol=2e-3)


def test_predictions_in_chunks_are_the_same(monkeypatch):
    x, y = toy(30)
    posterior = sparse(bdl.Gaussian(noise_variance=0.15)).fit(x, y)
    points = toy(12, seed=3)[0].reshape(3, 4, 2)
    whole = posterior.predict(points)
    monkeypatch.setattr(inducing, "_CHUNK", 1)
    parts = posterior.predict(points)
    assert parts.mean.shape == (3, 4)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.stddev, whole.stddev, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "likelihood", [bdl.Gaussian(noise_variance=0.15), bdl.Bernoulli(), bdl.Categorical(3)], ids=lambda v: v.task
)
def test_arviz_gets_draws_and_pointwise_likelihoods(likelihood, monkeypatch):
    x, y = toy(20)
    if likelihood.task != "regression":
        y = (y > 0).double()
    posterior = quietly(sparse(likelihood, num_steps=3), x, y)
    for limit in (1000, 5):  # joint draws, then functions
        monkeypatch.setattr(inducing, "_EXACT_DRAWS", limit)
        tree = posterior.to_arviz()
        classes = (3,) if likelihood.task == "multiclass" else ()
        assert tree["posterior"]["f"].shape == (1, 1000, 20, *classes)
        assert tree["log_likelihood"]["y"].shape == (1, 1000, 20)


def test_a_scale_prior_on_regression_is_refused():
    x, y = toy(10)
    engine = Mixture(bdl.GP(KERNEL), InducingSettings(5), InverseGammaParams(2.5, 3.0))
    with pytest.raises(SettingError, match=r"bdl\.ScaleMixture"):
        engine.fit(x, y)


def test_the_jitter_of_duplicate_inducing_points_is_harmless():
    """Two inducing points on one place: the factor exists, and the bound is that of one fewer."""
    x, y = toy(20)
    model = bdl.GP(KERNEL, likelihood=bdl.Gaussian(noise_variance=0.15))
    problem = InducingProblem(model, model.layout(2), x.unsqueeze(0), y.unsqueeze(0), 1)
    z = x[:5]
    values = []
    for points in (z, torch.cat([z, z[:1]])):
        vector = torch.cat([problem.layout.initial(x), points.reshape(-1)]).unsqueeze(0)
        values.append(float(_bounds.Collapsed(problem, torch.ones_like(vector[0]))(vector, torch.arange(1))[0]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
