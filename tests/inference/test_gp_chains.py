"""Fully Bayesian GPs: quadrature, scipy's densities and exact GPs at fixed hyper-parameters are the judges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from scipy import stats
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, SettingError
from bayesdl.hyper import Gamma, HalfNormal, LogNormal, Parameter
from bayesdl.inference._evidence import Evidence
from bayesdl.inference._gp_chains import _Volume, hyper_log_density, names_of
from bayesdl.models.gp import Layout
from bayesdl.posterior import GPMixturePosterior
from bayesdl.testing import check_engine

KERNEL = bdl.kernels.RBF(ard=False, lengthscale_prior=LogNormal(0.2, 0.8))
NOISE = bdl.Gaussian(prior=LogNormal(-1.5, 0.9), lower=0.01)
TWO = bdl.GP(KERNEL, mean="zero", likelihood=NOISE)  # two hyper-parameters: lengthscale and noise variance


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The runs here are as short as they can be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def data(n: int = 14, d: int = 1, seed: int = 3) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = np.sin(2 * x[:, 0]) + 0.4 * x.sum(1) + 0.5 * rng.normal(size=n)
    return torch.tensor(x), torch.tensor(y)


def small(engine: type = bdl.NUTS, model: bdl.GP = TWO, **settings: object) -> object:
    extra = {"max_depth": 3} if engine is bdl.NUTS else {"num_steps": 5} if engine is bdl.HMC else {"max_steps": 10}
    return engine(model, **{"num_chains": 3, "num_warmup": 25, "num_draws": 15, **extra, **settings})


@pytest.mark.parametrize(
    ("engine", "model"),
    [
        (bdl.NUTS, bdl.GP(bdl.kernels.Matern(nu=2.5))),
        pytest.param(bdl.HMC, TWO, marks=pytest.mark.slow),
        pytest.param(bdl.ChEES, bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF())), marks=pytest.mark.slow),
    ],
    ids=["NUTS", "HMC", "ChEES"],
)
def test_obeys_the_contract(engine: type, model: bdl.GP) -> None:
    fast = {"num_chains": 2, "num_warmup": 8, "num_draws": 6, "num_predictive": 7}
    fast |= {"max_depth": 2} if engine is bdl.NUTS else {"num_steps": 3} if engine is bdl.HMC else {"max_steps": 3}
    check_engine(engine(model, **fast))


@dataclass(frozen=True)
class InverseSquareHalfCauchy:
    """1 / lengthscale^2 ~ HalfCauchy(scale): most inputs switched off, as in SAAS; a prior of a user's own."""

    scale: float = 0.1

    def log_prob(self, value: Tensor) -> Tensor:
        rho = value**-2
        return math.log(2 / math.pi / self.scale) - torch.log1p((rho / self.scale) ** 2) + math.log(2) - 3 * value.log()

    def slope(self, value: Tensor) -> Tensor:
        ratio = value**-4 / self.scale**2
        return (4 * ratio / (1 + ratio) - 3) / value

    @property
    def typical(self) -> float:
        return self.scale**-0.5

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        return (self.scale * torch.tan(0.5 * math.pi * u)).clamp_min(1e-12) ** -0.5


MODELS = {
    "log-normal": bdl.GP(
        bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5), outputscale_prior=LogNormal(0.3, 0.5)), likelihood=NOISE
    ),
    "other priors": bdl.GP(
        bdl.kernels.Scale(bdl.kernels.RBF(lengthscale_prior=Gamma(2.0, 1.3)), outputscale_prior=HalfNormal(1.7)),
        likelihood=NOISE,
    ),
    "sparse inputs": bdl.GP(bdl.kernels.RBF(lengthscale_prior=InverseSquareHalfCauchy(0.2)), likelihood=NOISE),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_density_of_theta_has_likelihood_prior_and_jacobian(name: str) -> None:
    """scipy's normal density, each prior's density in the value, and autograd's Jacobian of the map from theta."""
    model, (x, y) = MODELS[name], data(9, 2)
    layout = model.layout(2)
    density = hyper_log_density(Evidence(model, layout, x[None], y[None]))
    generator = torch.Generator().manual_seed(1)
    theta = layout.initial(x) + 0.8 * torch.randn(6, layout.dim, generator=generator, dtype=torch.float64)
    for row, found in zip(theta, density(theta), strict=True):
        values, constant = layout.unpack(row)
        k = model.kernel(x, params=model.kernel_values(values)) + values["noise_variance"] * torch.eye(
            9, dtype=torch.float64
        )
        wanted = stats.multivariate_normal(np.full(9, float(constant)), k.numpy()).logpdf(y.numpy())
        wanted += stats.norm.logpdf(float(constant))
        for p in layout.parameters:
            wanted += float(p.prior.log_prob(values[p.name]).sum())
            start = sum(q.size for q in layout.parameters[: layout.parameters.index(p)])
            u = row[start : start + p.size]
            wanted += float(torch.linalg.slogdet(torch.autograd.functional.jacobian(p.constrained, u)).logabsdet)
        assert float(found) == pytest.approx(wanted, rel=1e-10)
    assert torch.autograd.gradcheck(density, theta[:2].clone().requires_grad_(True), atol=1e-6)
    assert density.names == names_of(layout)
    assert len(density.names) == layout.dim


def test_log_jacobians_of_every_kind_of_range() -> None:
    """Bounded on neither, either and both sides, against autograd through the map from theta."""
    kinds = [
        Parameter("a", (2,), 1.0, LogNormal(), 0.3),
        Parameter("b", (), 0.0, None, -math.inf),
        Parameter("c", (3,), 0.5, None, -1.0, 2.5),
        Parameter("d", (), -1.0, LogNormal(), -math.inf, 0.7),
    ]
    layout = Layout(tuple(kinds), has_mean=True)
    theta = torch.randn(4, layout.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, grad = _Volume(layout, theta)(theta)
    for row, found in zip(theta, value, strict=True):
        wanted, start = stats.norm.logpdf(float(row[-1])) + stats.norm.logpdf(float(row[2])), 0
        for p in kinds:
            jacobian = torch.autograd.functional.jacobian(p.constrained, row[start : start + p.size])
            wanted, start = wanted + float(torch.linalg.slogdet(jacobian).logabsdet), start + p.size
        assert float(found) == pytest.approx(wanted, rel=1e-12)
    leaf = theta.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda t: _Volume(layout, t)(t)[0], (leaf,))
    (by_autograd,) = torch.autograd.grad(_Volume(layout, leaf)(leaf)[0].sum(), leaf)
    torch.testing.assert_close(grad, by_autograd)


def quadrature(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of (log lengthscale, log(noise - lower)) on a grid, straight from the formulas."""
    a, b = np.meshgrid(np.linspace(-4.5, 4.5, 121), np.linspace(-9.0, 3.0, 121), indexing="ij")
    lengthscale, noise = np.exp(a), NOISE.lower + np.exp(b)
    squares = ((x.numpy()[:, None] - x.numpy()) ** 2).sum(-1)
    k = np.exp(-0.5 * squares / lengthscale[..., None, None] ** 2) + noise[..., None, None] * np.eye(len(y))
    chol = np.linalg.cholesky(k)
    white = np.linalg.solve(chol, np.broadcast_to(y.numpy()[:, None], (*a.shape, len(y), 1)))[..., 0]
    log = -0.5 * (white**2).sum(-1) - np.log(np.diagonal(chol, axis1=-2, axis2=-1)).sum(-1)
    log += stats.lognorm.logpdf(lengthscale, 0.8, scale=np.exp(0.2)) + a
    log += stats.lognorm.logpdf(noise, 0.9, scale=np.exp(-1.5)) + b
    w = np.exp(log - log.max())
    w /= w.sum()
    means = np.array([(w * a).sum(), (w * b).sum()])
    spreads = np.sqrt([(w * (a - means[0]) ** 2).sum(), (w * (b - means[1]) ** 2).sum()])
    return torch.tensor(means), torch.tensor(spreads)


@pytest.mark.parametrize(
    "engine", [bdl.NUTS, *(pytest.param(engine, marks=pytest.mark.slow) for engine in (bdl.HMC, bdl.ChEES))]
)
def test_hyperparameters_against_quadrature(engine: type) -> None:
    """Mean and second moment of two hyper-parameters within 4 Monte Carlo errors: 12 comparisons, 1 seed in 1300."""
    x, y = data()
    settings = {"num_chains": 16, "num_warmup": 120, "num_draws": 60, "standardize": False}
    settings |= {"max_depth": 6} if engine is bdl.NUTS else {"num_steps": 12} if engine is bdl.HMC else {}
    posterior = engine(TWO, **settings).fit(x, y, seed=4)
    mean, spread = quadrature(x, y)
    draws = posterior.draws
    assert draws.shape == (16, 60, 2)
    scaled = ((draws - mean) / spread).numpy()
    found = np.concatenate([scaled, scaled**2 - 1], -1)
    error = array_stats.mcse(found, method="mean", chain_axis=0, draw_axis=1)
    assert (np.abs(found.mean((0, 1))) / error).max() < 4
    assert error[:2].max() < 0.1  # fewer than 100 effective draws would leave more
    named = posterior.hyperparameters
    torch.testing.assert_close(named["lengthscale"], draws[..., 0].exp())
    torch.testing.assert_close(named["noise_variance"], NOISE.lower + draws[..., 1].exp())


def in_pyro(x: Tensor, y: Tensor) -> None:
    """The model `without_bound` below as one would write it in Pyro."""
    lengthscale = pyro.sample("lengthscale", dist.LogNormal(0.2, 0.8))
    noise = pyro.sample("noise", dist.LogNormal(-1.5, 0.9))
    k = torch.exp(-0.5 * ((x - x.mT) / lengthscale[..., None, None]) ** 2) + noise[..., None, None] * torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)), k), obs=y)


def without_bound(x: Tensor, y: Tensor) -> bdl.LogDensity:
    model = bdl.GP(KERNEL, mean="zero", likelihood=bdl.Gaussian(prior=LogNormal(-1.5, 0.9), lower=0.0))
    return hyper_log_density(Evidence(model, model.layout(1), x[None], y[None]))


def test_a_pyro_model_of_the_same_gp_has_the_same_density() -> None:
    """Pyro, in float32 constants, at 20 points; the offset of the constants is nothing."""
    x, y = data()
    own, other = without_bound(x, y), bdl.LogDensity.from_pyro(in_pyro, x, y)
    q = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(own(q), other(q), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own.value_and_grad(q)[1], other.value_and_grad(q)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.touches_global_rng  # Pyro's sampler has no generator of its own
def test_hyperparameters_against_pyros_sampler() -> None:
    """Two means and spreads within 4 Monte Carlo errors of both runs: a false alarm for 1 in 4000 seeds."""
    x, y = data()
    density = without_bound(x, y)
    pyro.set_rng_seed(1)
    kernel = pyro.infer.NUTS(potential_fn=lambda z: -density(z["q"][None])[0])
    chain = pyro.infer.MCMC(kernel, 500, 150, {"q": torch.zeros(2, dtype=torch.float64)}, disable_progbar=True)
    chain.run()
    theirs = chain.get_samples(group_by_chain=True)["q"].numpy()
    own = bdl.sample(density, sampler="nuts", num_chains=8, num_warmup=150, num_draws=150, seed=3).draws.numpy()
    centre = theirs.mean((0, 1))
    for transform in (lambda q: q, lambda q: (q - centre) ** 2):
        found, wanted = transform(own), transform(theirs)
        errors = [array_stats.mcse(q, method="mean", chain_axis=0, draw_axis=1) for q in (found, wanted)]
        assert (np.abs(found.mean((0, 1)) - wanted.mean((0, 1))) < 4 * np.hypot(*errors)).all()


def fixed(lengthscale: float, noise: float) -> bdl.ExactGP:
    """An exact GP at given hyper-parameters."""
    likelihood = bdl.Gaussian(noise_variance=noise, prior=None, lower=0.0)
    model = bdl.GP(bdl.kernels.RBF(ard=False, lengthscale=lengthscale), mean="zero", likelihood=likelihood)
    return bdl.ExactGP(model, optimize=False, standardize=False)


def members(posterior: GPMixturePosterior, x: Tensor, y: Tensor) -> list[object]:
    """Exact posteriors at the draws that a posterior's predictions mix, by way of another class."""
    theta = posterior._theta[0]
    return [fixed(float(row[0].exp()), NOISE.lower + float(row[1].exp())).fit(x, y) for row in theta]


def test_the_predictive_is_the_average_of_exact_ones() -> None:
    x, y = data()
    posterior = small(standardize=False, num_predictive=9).fit(x, y)
    xs = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    exact = members(posterior, x, y)
    assert len(exact) == 9
    for noise in (True, False):
        each = [one.predict(xs, noise=noise) for one in exact]
        found = posterior.predict(xs, noise=noise)
        mean = torch.stack([p.mean for p in each])
        torch.testing.assert_close(found.mean, mean.mean(0))
        variance = torch.stack([p.variance for p in each]).mean(0) + mean.var(0, correction=0)
        torch.testing.assert_close(found.variance, variance)
        at = torch.tensor(0.3, dtype=torch.float64)
        density = torch.stack([p.log_prob(at) for p in each]).logsumexp(0) - math.log(9)
        torch.testing.assert_close(found.log_prob(at), density)


def test_paths_have_the_joint_law_of_the_mixture() -> None:
    """Second moments of joint draws at three points against the mixture of exact covariances.

    9 comparisons each for sample and functions at 5 standard errors of 3000 draws: false alarms below 1e-4; random
    features add an error of the size of a standard error, for which the second has 6.
    """
    x, y = data()
    posterior = small(standardize=False, num_predictive=6).fit(x, y)
    xs = torch.tensor([[-0.4], [0.6], [2.5]], dtype=torch.float64)
    exact = members(posterior, x, y)
    second = []
    for one in exact:
        k_xs, inner = one._cross(xs)
        mean, covariance = bdl.ops.joint_moments(one._state, k_xs, one.model.kernel(inner, params=one._kernel_values()))
        second.append((covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2))[0])
    wanted = torch.stack(second).mean(0)
    for draws, limit in (
        (posterior.sample(xs, (30, 100), seed=2).flatten(0, 1), 5),
        (posterior.functions(3000)(xs), 6),
    ):
        products = draws.unsqueeze(-1) * draws.unsqueeze(-2)
        error = products.std(0) / 3000**0.5
        assert float(((products.mean(0) - wanted).abs() / error).max()) < limit


def test_conditioning_weights_every_draw_by_what_it_predicted() -> None:
    x, y = data(18)
    posterior = small(standardize=False, num_predictive=8).fit(x[:14], y[:14])
    more = posterior.condition_on(x[14:], y[14:])
    exact = members(posterior, x[:14], y[:14])
    log_weight = []
    for one in exact:
        k_xs, inner = one._cross(x[14:])
        mean, covariance = bdl.ops.joint_moments(one._state, k_xs, one.model.kernel(inner, params=one._kernel_values()))
        covariance = covariance[0] + one._values["noise_variance"] * torch.eye(4, dtype=torch.float64)
        log_weight.append(stats.multivariate_normal(mean[0].numpy(), covariance.numpy()).logpdf(y[14:].numpy()))
    weight = torch.tensor(np.array(log_weight)).softmax(0)
    torch.testing.assert_close(more.weights, weight)
    assert more.diagnostics["weight_ess"] == pytest.approx(float(1 / weight.square().sum()))
    xs = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    means = torch.stack([one.condition_on(x[14:], y[14:]).predict(xs).mean for one in exact])
    torch.testing.assert_close(more.predict(xs).mean, weight @ means)
    torch.testing.assert_close(posterior.weights, torch.full((8,), 1 / 8, dtype=torch.float64))
    # the draw that each path takes follows the weights: 5 standard errors of 4000 draws at each of 8 draws
    shares = torch.bincount(more._choose(4000, 0).flatten(), minlength=8) / 4000
    assert float((shares - weight).abs().max()) <= 1 / 4000 + 1e-9
    assert more.functions(5, seed=1)(xs).shape == (5, 5)
    tree = more.to_arviz()
    assert tree["posterior"]["lengthscale"].shape == (1, 1000)


def test_a_surprise_that_leaves_few_draws_is_told() -> None:
    x, y = data(18)
    posterior = small(num_chains=4, num_draws=60, num_predictive=200, num_warmup=60).fit(x[:6], y[:6])
    with pytest.warns(ConvergenceWarning, match="fit again"):
        posterior.condition_on(x, 30 * torch.sign(torch.sin(40 * x[:, 0])))


def test_several_data_sets_and_outputs() -> None:
    """Each data set and each output has draws of its own, as if fitted alone; answers have the promised shapes."""
    x = torch.stack([data(10, 2, seed)[0] for seed in (1, 2, 3)])
    y = torch.stack([torch.stack([data(10, 2, seed)[1], -3 * data(10, 2, seed)[1] + 7], -1) for seed in (1, 2, 3)])
    engine = small(model=bdl.GP(bdl.kernels.Matern(nu=2.5)), num_predictive=5, num_warmup=10, num_draws=5)
    posterior = engine.fit(x, y, seed=0)
    assert posterior.draws.shape == (3, 2, 3, 5, 4)
    assert posterior.hyperparameters["lengthscale"].shape == (3, 5, 3, 2, 2)
    xs = data(4, 2, 9)[0]
    predictive = posterior.predict(xs)
    assert predictive.batch_shape == (3, 4, 2)
    assert posterior.sample(xs, (6,)).shape == (6, 3, 4, 2)
    assert posterior.functions(6)(xs.expand(5, 1, 4, 2)).shape == (6, 5, 3, 4, 2)
    functions = posterior.functions(6, seed=3)
    torch.testing.assert_close(functions(xs.expand(5, 1, 4, 2))[:, 2], functions(xs), rtol=1e-9, atol=1e-9)
    alone = engine.fit(x[1], y[1, :, 0], seed=0)
    torch.testing.assert_close(alone.draws, posterior.draws[1, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.predict(xs).mean, predictive.mean[1, :, 0], rtol=1e-6, atol=1e-6)
    more = posterior.condition_on(x[:, :2] + 0.1, y[:, :2])
    assert more.weights.shape == (3, 2, 5)
    assert more.predict(xs).batch_shape == (3, 4, 2)


def test_named_hyperparameters_are_in_the_users_units() -> None:
    """Data in other units: the same draws inside, and outside each quantity in its own unit."""
    x, y = data(12, 2)
    scale = torch.tensor([10.0, 0.2], dtype=torch.float64)
    engine = small(model=bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF())), num_draws=5)
    plain, scaled = engine.fit(x, y).hyperparameters, engine.fit(5 + scale * x, 40 * y - 3).hyperparameters
    assert set(plain) == {"outputscale", "lengthscale", "noise_variance", "mean"}
    torch.testing.assert_close(scaled["lengthscale"], plain["lengthscale"] * scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled["outputscale"], plain["outputscale"] * 1600, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled["noise_variance"], plain["noise_variance"] * 1600, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled["mean"], plain["mean"] * 40 - 3, rtol=1e-5, atol=1e-5)


def test_gradients_in_batches_of_points() -> None:
    """What Bayesian optimisation asks for: x (b, q, d) that requires gradients, predictive, paths and functions."""
    posterior = small(model=bdl.GP(bdl.kernels.Matern(nu=2.5)), num_predictive=4).fit(*data(10, 2))
    x = data(12, 2, 8)[0].reshape(4, 3, 2).requires_grad_(True)
    for call in (lambda x: posterior.predict(x).mean, lambda x: posterior.functions(5)(x)[2]):
        value = call(x)
        assert value.shape == (4, 3)
        (grad,) = torch.autograd.grad(value.sum(), x)
        step = 1e-6 * torch.ones_like(x)
        slope = (call((x + step).detach()) - call((x - step).detach())).sum() / 2e-6
        assert float(grad.sum()) == pytest.approx(float(slope), rel=1e-5)
    paths = posterior.sample(x, (7,))
    assert paths.shape == (7, 4, 3)
    (grad,) = torch.autograd.grad(paths.sum(), x)
    assert bool(grad.isfinite().all())


def test_arviz_reads_hyperparameters_and_pointwise_likelihoods() -> None:
    x, y = data()
    posterior = small(standardize=False).fit(x, y)
    tree = posterior.to_arviz()
    assert tree["posterior"]["noise_variance"].shape == (3, 15)
    assert tree["log_likelihood"]["y"].shape == tree["posterior"]["f"].shape == (3, 15, 14)
    assert {"lp", "diverging", "energy", "tree_depth"} <= set(tree["sample_stats"].data_vars)


def test_latent_draws_follow_the_posterior_at_their_hyperparameters() -> None:
    """f at the training inputs, 4000 times at one theta: mean and covariance of the exact GP within 5 errors."""
    x, y = data(6)
    posterior = small(standardize=False).fit(x, y)
    theta = posterior._draws[:, :1, :1]
    f, noise = posterior._latent_draws(theta.expand(1, 4, 1000, 2))
    exact = fixed(float(theta[0, 0, 0, 0].exp()), NOISE.lower + float(theta[0, 0, 0, 1].exp())).fit(x, y)
    latent = exact.predict(x, noise=False)
    f = f.flatten(0, 1)
    assert float(((f.mean(0) - latent.mean).abs() / (f.std(0) / 4000**0.5)).max()) < 5
    assert float((f.var(0) / latent.variance - 1).abs().max()) < 5 * (2 / 4000) ** 0.5
    assert float(noise[0, 0, 0]) == pytest.approx((NOISE.lower + float(theta[0, 0, 0, 1].exp())) ** 0.5)


def test_save_and_load_after_conditioning(tmp_path: object) -> None:
    x, y = data(16)
    posterior = small(num_predictive=5).fit(x[:12], y[:12]).condition_on(x[12:], y[12:])
    posterior.save(tmp_path / "gp.bdl")
    loaded = bdl.load(tmp_path / "gp.bdl")
    torch.testing.assert_close(loaded.predict(x).mean, posterior.predict(x).mean, rtol=1e-10, atol=1e-10)
    assert torch.equal(loaded.draws, posterior.draws)
    assert torch.equal(loaded.weights, posterior.weights)


def test_a_run_resumes_and_keeps_its_budget(tmp_path: object) -> None:
    x, y = data()
    whole = small().fit(x, y)
    kept = small(checkpoint=str(tmp_path / "run")).fit(x, y)
    again = small(checkpoint=str(tmp_path / "run")).fit(x, y)
    assert torch.equal(whole.draws, kept.draws)
    assert torch.equal(whole.draws, again.draws)
    few = small(num_draws=2000, max_gradients=400).fit(x, y)
    assert few.draws.shape[1] < 2000
    assert few.diagnostics["num_gradients"] <= 410
    blocks = small(chain_batch=2).fit(x, y)
    torch.testing.assert_close(blocks.draws, whole.draws, rtol=1e-6, atol=1e-6)


def test_settings_are_refused_at_the_door() -> None:
    x, y = data()
    flat = bdl.GP(bdl.kernels.RBF(lengthscale_prior=None))
    with pytest.raises(SettingError, match="lengthscale"):
        small(model=flat).fit(x, y)
    with pytest.raises(SettingError, match="Gaussian likelihood"):
        bdl.NUTS(bdl.GP(KERNEL, likelihood=bdl.Bernoulli()))
    with pytest.raises(SettingError, match="num_predictive"):
        bdl.NUTS(TWO, num_predictive=0)
    with pytest.raises(SettingError, match="model must be a"):
        bdl.HMC(KERNEL)
