"""Exact GP regression: the contract, gpytorch as judge of the whole posterior, and what its optimiser finds."""

from __future__ import annotations

import math
import warnings

import gpytorch
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

import bayesdl as bdl
from bayesdl.errors import BayesdlError, ConvergenceWarning, SettingError
from bayesdl.testing import check_engine


def toy(batch: tuple[int, ...] = (), n: int = 18, d: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=g, dtype=torch.float64)
    y = (2 * x[..., 0]).sin() + 0.4 * x[..., 1] + 0.2 * torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize(
    "kernel",
    [
        bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)),
        bdl.kernels.RBF(lengthscale=0.7) + bdl.kernels.Linear(),
        bdl.kernels.NNGP(depth=2, activation="relu"),
    ],
    ids=["matern", "rbf plus linear", "nngp"],
)
def test_obeys_the_contract(kernel):
    check_engine(bdl.ExactGP(bdl.GP(kernel), num_starts=2))


def test_a_zero_mean_obeys_the_contract():
    check_engine(bdl.ExactGP(bdl.GP(bdl.kernels.RationalQuadratic(), mean="zero"), num_starts=1))


class _Gpytorch(gpytorch.models.ExactGP):
    """The same model in gpytorch, hyper-parameters set by hand."""

    def __init__(self, x, y, likelihood, batch):
        super().__init__(x, y, likelihood)
        shape = torch.Size(batch)
        self.mean_module = gpytorch.means.ZeroMean(batch_shape=shape)
        base = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=3, batch_shape=shape)
        self.covar_module = gpytorch.kernels.ScaleKernel(base, batch_shape=shape)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_posterior_evidence_and_input_gradients_agree_with_gpytorch(batch):
    x, y = toy(batch)
    x_new = toy(batch, n=6, seed=5)[0].requires_grad_(True)
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5, lengthscale=(0.4, 1.3, 2.7)), outputscale=1.7)
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=0.07, lower=0.0))
    posterior = bdl.ExactGP(model, optimize=False, standardize=False).fit(x, y)

    likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=torch.Size(batch)).double()
    peer = _Gpytorch(x, y, likelihood, batch).double()
    peer.covar_module.outputscale = torch.full(batch, 1.7, dtype=torch.float64)
    peer.covar_module.base_kernel.lengthscale = torch.tensor([0.4, 1.3, 2.7], dtype=torch.float64).expand(*batch, 1, 3)
    likelihood.noise = torch.full((*batch, 1), 0.07, dtype=torch.float64)
    with gpytorch.settings.fast_computations(False, False, False):
        peer.train()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, peer)(peer(x), y) * x.shape[-2]
        peer.eval()
        expected = peer(x_new)
        theirs = torch.stack([expected.mean, expected.variance])
        their_gradient = torch.autograd.grad(theirs.sum(), x_new, retain_graph=True)[0]
        their_covariance = expected.covariance_matrix.detach()
    predictive = posterior.predict(x_new, noise=False)
    ours = torch.stack([predictive.mean, predictive.variance])
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), x_new)[0], their_gradient, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(posterior.log_evidence, mll.detach(), rtol=1e-9, atol=1e-9)
    noisy = posterior.predict(x_new).variance
    torch.testing.assert_close(noisy, predictive.variance + 0.07, rtol=1e-12, atol=0)
    draws = posterior.sample(x_new.detach(), (4000,), seed=1)
    centred = draws - draws.mean(0)
    empirical = torch.einsum("s...i,s...j->...ij", centred, centred) / 4000
    # 36 to 216 entries at five standard errors: about 1e-4 false alarms; the seed is fixed
    sd = their_covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    bound = 5 * math.sqrt(2 / 4000) * sd.unsqueeze(-1) * sd.unsqueeze(-2)
    assert bool(((empirical - their_covariance).abs() <= bound).all())


def test_the_evidence_is_the_density_of_the_targets_in_the_users_units():
    x, y = toy(n=15)
    y = 250 + 40 * y
    posterior = bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF())), num_starts=1).fit(x, y)
    loc, scale = x.mean(0), x.std(0, correction=0)
    values = posterior.hyperparameters
    inner = (x - loc) / scale
    distances = torch.cdist(inner / values["kernel.base.lengthscale"], inner / values["kernel.base.lengthscale"])
    covariance = values["kernel.outputscale"] * torch.exp(-0.5 * distances**2) + values["noise_variance"] * torch.eye(
        15
    )
    y_scale = y.std(correction=0)
    mean = y.mean() + y_scale * values["mean"]
    judge = multivariate_normal(np.full(15, float(mean)), (y_scale**2 * covariance).numpy())
    assert float(posterior.log_evidence) == pytest.approx(judge.logpdf(y.numpy()), rel=1e-9)


def test_the_optimiser_finds_what_scipy_finds():
    """The penalised evidence at our optimum is no worse than at SciPy's, started from the same point."""
    x, y = toy(n=30)
    gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)))
    posterior = bdl.ExactGP(gp, num_starts=1, standardize=False).fit(x, y)
    layout = gp.layout(3)

    def objective(theta: np.ndarray) -> float:
        values, constant = layout.unpack(torch.tensor(theta))
        params = {name.removeprefix("kernel."): v for name, v in values.items()}
        k = gp.kernel(x, params=params) + values["noise_variance"] * torch.eye(30)
        judge = torch.distributions.MultivariateNormal(constant.expand(30), k)
        return float(-judge.log_prob(y) - layout.log_prior(values)[0])

    start = layout.initial(x).numpy()
    scipys = minimize(objective, start, method="L-BFGS-B").fun
    ours = -posterior.diagnostics["objective_by_start"][0]
    assert ours <= scipys + 1e-4 * abs(scipys)


def test_more_starts_never_end_worse():
    x, y = toy(n=20)
    gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.Periodic()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        one = bdl.ExactGP(gp, num_starts=1).fit(x, y).diagnostics["objective_by_start"]
        many = bdl.ExactGP(gp, num_starts=5).fit(x, y).diagnostics["objective_by_start"]
    assert many[0] == pytest.approx(one[0], rel=1e-4)  # the optimiser's own tolerance
    assert len(many) == 5
    assert max(many) >= one[0] - 1e-4


def test_outputs_have_hyperparameters_of_their_own():
    """A smooth and a rough target: two outputs in one fit are the two fits of one output."""
    x, y = toy(n=25)
    both = torch.stack([y, torch.randn(25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)], -1)
    engine = bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_starts=2)
    joint = engine.fit(x, both)
    alone = [engine.fit(x, both[:, i]) for i in range(2)]
    outputscale = joint.hyperparameters["kernel.outputscale"]
    assert outputscale.shape == (2,)
    assert float((outputscale[0] - outputscale[1]).abs()) > 0.05
    for i in range(2):
        torch.testing.assert_close(joint.predict(x).mean[:, i], alone[i].predict(x).mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(joint.log_evidence, alone[0].log_evidence + alone[1].log_evidence, rtol=1e-4, atol=1e-4)


def test_settings_and_models_are_checked_at_the_door():
    with pytest.raises(SettingError, match="num_starts must be an integer of at least 1"):
        bdl.ExactGP(bdl.GP(bdl.kernels.RBF()), num_starts=0)
    with pytest.raises(SettingError, match=r"bdl\.HMC"):
        bdl.ExactGP(bdl.BNN())
    with pytest.raises(SettingError, match="must have a Gaussian likelihood"):
        bdl.ExactGP(bdl.GP(bdl.kernels.RBF(), likelihood=bdl.Bernoulli()))
    with pytest.raises(SettingError, match=r"bdl\.kernels\.Matern"):
        bdl.GP("rbf")


def test_a_fit_that_stops_early_says_so():
    x, y = toy()
    with pytest.warns(ConvergenceWarning, match="had not converged"):
        bdl.ExactGP(bdl.GP(bdl.kernels.RBF()), num_starts=1, max_iterations=1).fit(x, y)


def test_duplicate_rows_without_noise_need_jitter_and_say_so():
    x, y = toy(n=6)
    model = bdl.GP(bdl.kernels.RBF(lengthscale=2.0), likelihood=bdl.Gaussian(noise_variance=1e-300, lower=0.0))
    with pytest.warns(bdl.errors.NumericalWarning, match="jitter"):
        posterior = bdl.ExactGP(model, optimize=False).fit(torch.cat([x, x]), torch.cat([y, y]))
    assert posterior.diagnostics["jitter"] > 0
    assert bool(torch.isfinite(posterior.predict(x).variance).all())


def test_errors_are_of_the_house():
    assert issubclass(bdl.errors.ShapeError, BayesdlError)
    assert issubclass(bdl.errors.ShapeError, ValueError)
