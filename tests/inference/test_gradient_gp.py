"""Values and slopes together: the engine's contract, SciPy and gpytorch as judges, and what slopes are worth."""

from __future__ import annotations

import math
import warnings

import gpytorch
import numpy as np
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qKnowledgeGradient, qLogNoisyExpectedImprovement
from botorch.optim import optimize_acqf
from scipy.stats import multivariate_normal

import bayesdl as bdl
from bayesdl.errors import DataError, SettingError, ShapeError
from bayesdl.inference.gradient_gp import GradientGP, _JointEvidence
from bayesdl.kernels.derivatives import Observed
from bayesdl.posterior import function_gradients
from bayesdl.testing import check_engine

F64 = torch.float64
K = bdl.kernels


def wave(x: torch.Tensor) -> torch.Tensor:
    return 5 + 7 * torch.sin(2 * x[..., 0]) * torch.cos(x[..., 1] / 10)


def problem(n: int, seed: int = 0, batch: tuple[int, ...] = ()):
    """x (*batch, n, 2) in units far apart, y and its slopes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand((*batch, n, 2), generator=g, dtype=F64) * torch.tensor([3.0, 40.0]) + torch.tensor([1.0, 100.0])
    leaf = x.clone().requires_grad_()
    y = wave(leaf)
    (slopes,) = torch.autograd.grad(y.sum(), leaf)
    return x, y.detach(), slopes


def test_the_engine_obeys_the_contract():
    check_engine(bdl.GradientGP(bdl.GP(K.Matern(nu=2.5)), num_starts=1))


def test_without_slopes_it_is_the_exact_gp():
    x, y, _ = problem(12)
    model = bdl.GP(K.Scale(K.Matern(nu=2.5)))
    ours, theirs = bdl.GradientGP(model).fit(x, y), bdl.ExactGP(model).fit(x, y)
    new = problem(7, 1)[0]
    assert torch.allclose(ours.predict(new).mean, theirs.predict(new).mean, rtol=1e-4)
    assert torch.allclose(ours.predict(new).stddev, theirs.predict(new).stddev, rtol=1e-3)
    assert float(ours.log_evidence) == pytest.approx(float(theirs.log_evidence), abs=1e-3)


@pytest.mark.parametrize("name", ["RBFKernelGrad", "Matern52KernelGrad"])
def test_the_posterior_is_that_of_gpytorch_with_the_same_hyperparameters(name):
    """Values, slopes and their covariances; different noise for values and slopes."""
    x, y, slopes = (t * s for t, s in zip(problem(6), (0.1, 0.2, 2.0), strict=True))
    new = 0.1 * problem(4, 1)[0]
    base = K.RBF(lengthscale=(0.15, 1.3)) if name.startswith("RBF") else K.Matern(nu=2.5, lengthscale=(0.15, 1.3))
    model = bdl.GP(K.Scale(base, 1.7), mean="zero", likelihood=bdl.Gaussian(noise_variance=0.07, lower=0.0))
    engine = GradientGP(model, bdl.Gaussian(noise_variance=0.4, lower=0.0), optimize=False, standardize=False)
    posterior = engine.fit(x, y, slopes)
    peer = gpytorch.kernels.ScaleKernel(getattr(gpytorch.kernels, name)(ard_num_dims=2)).double()
    peer.outputscale = torch.tensor(1.7, dtype=F64)
    peer.base_kernel.lengthscale = torch.tensor([0.15, 1.3], dtype=F64)
    both = torch.cat([y.unsqueeze(-1), slopes], -1).flatten()
    noise = torch.tensor([0.07, 0.4, 0.4], dtype=F64).repeat(6)
    a = peer(x).to_dense() + torch.diag(noise)
    cross, own = peer(x, new).to_dense(), peer(new).to_dense()
    mean = (cross.T @ torch.linalg.solve(a, both)).unflatten(0, (4, 3))
    covariance = own - cross.T @ torch.linalg.solve(a, cross)
    variance = covariance.diagonal().unflatten(0, (4, 3))
    told, told_slopes = posterior.predict(new, noise=False), posterior.predict_gradient(new)
    assert torch.allclose(told.mean, mean[:, 0], rtol=1e-7)
    assert torch.allclose(told.variance, variance[:, 0], rtol=1e-6, atol=1e-10)
    assert torch.allclose(told_slopes.mean, mean[:, 1:], rtol=1e-7)
    assert torch.allclose(told_slopes.variance, variance[:, 1:], rtol=1e-6, atol=1e-10)
    noisy = posterior.predict_gradient(new, noise=True).variance
    assert torch.allclose(noisy - told_slopes.variance, torch.full((4, 2), 0.4, dtype=F64), rtol=1e-9)
    judge = multivariate_normal(np.zeros(18), a.detach().numpy()).logpdf(both.numpy())
    assert float(posterior.log_evidence) == pytest.approx(judge, rel=1e-9)
    joint = posterior.to_botorch("gaussian").posterior(new).distribution.covariance_matrix
    assert torch.allclose(joint, covariance[::3, ::3], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kernel", [K.Matern(nu=1.5), K.Periodic() + K.Linear(), K.NNGP(depth=1, activation="erf")])
def test_the_slope_of_the_joint_evidence_is_that_of_finite_differences(kernel):
    """In every hyper-parameter and the mean, for two data sets of two outputs, with some slopes missing."""
    engine = GradientGP(bdl.GP(kernel))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 2, generator=g, dtype=F64)
    seen = torch.ones(5, 2, dtype=torch.bool)
    seen[2, 1] = seen[4, 0] = False
    places = Observed.of(x, seen).places
    y = torch.randn(4, len(places), generator=g, dtype=F64)
    layout = engine._layout(2, True)
    evidence = _JointEvidence(engine.model, layout, x, y, places)
    theta = layout.initial(x) + 0.3 * torch.randn(4, layout.dim, generator=g, dtype=F64)
    index = torch.arange(4)
    _, grad = evidence(theta, index)
    h = 1e-5
    for i in range(layout.dim):
        e = h * torch.eye(layout.dim, dtype=F64)[i]
        rise = (evidence(theta + e, index)[0] - evidence(theta - e, index)[0]) / (2 * h)
        assert torch.allclose(grad[:, i], rise, rtol=1e-5, atol=1e-7)


def test_evidence_and_predictions_are_in_the_users_units():
    """Powers of two change nothing but the units: each value has the Jacobian 1/b, each slope a/b."""
    x, y, slopes = problem(8)
    slopes[1, 0] = torch.nan
    engine = GradientGP(bdl.GP(K.Matern(nu=2.5)), num_starts=1)
    first = engine.fit(x, y, slopes)
    a, b = 2.0**5, 2.0**-7
    second = engine.fit(a * x, b * y, slopes * b / a)
    new = problem(5, 1)[0]
    assert torch.allclose(second.predict(a * new).mean, b * first.predict(new).mean, rtol=1e-9)
    told, scaled = first.predict_gradient(new), second.predict_gradient(a * new)
    assert torch.allclose(scaled.mean, told.mean * b / a, rtol=1e-7, atol=1e-12)
    assert torch.allclose(scaled.stddev, told.stddev * b / a, rtol=1e-7)
    jacobian = -8 * math.log(b) - 15 * math.log(b / a)
    assert float(second.log_evidence - first.log_evidence) == pytest.approx(jacobian, abs=1e-6)


def test_the_gradient_of_the_mean_is_the_mean_of_the_gradient():
    x, y, slopes = problem(9)
    posterior = GradientGP(bdl.GP(K.Scale(K.RBF())), num_starts=1).fit(x, y, slopes)
    new = problem(5, 1)[0].requires_grad_()
    (grad,) = torch.autograd.grad(posterior.predict(new).mean.sum(), new)
    assert torch.allclose(grad, posterior.predict_gradient(new).mean, rtol=1e-6, atol=1e-9)


def test_functions_have_the_values_and_slopes_that_are_predicted():
    """Means within five standard errors for 24 numbers, spreads within six of theirs: one failure in 30 000 seeds."""
    x, y, slopes = problem(9)
    posterior = GradientGP(bdl.GP(K.Scale(K.Matern(nu=2.5))), num_starts=1).fit(x, y, slopes)
    new, num = problem(4, 1)[0], 1500
    functions = posterior.functions(num, seed=1)
    values, gradients = functions(new), function_gradients(functions, new)
    assert gradients.shape == (num, 4, 2)
    for drawn, told in ((values, posterior.predict(new, noise=False)), (gradients, posterior.predict_gradient(new))):
        assert bool(((drawn.mean(0) - told.mean).abs() < 5 * told.stddev / num**0.5).all())
        assert bool(((drawn.std(0) / told.stddev - 1).abs() < 6 / (2 * num) ** 0.5).all())


def test_conditioning_is_what_a_fit_to_all_gives():
    x, y, slopes = problem(10)
    slopes[3, 1] = slopes[8] = torch.nan
    engine = GradientGP(bdl.GP(K.Matern(nu=2.5), mean="zero"), optimize=False, standardize=False)
    whole = engine.fit(x, y, slopes)
    parts = engine.fit(x[:6], y[:6], slopes[:6]).condition_on(x[6:9], y[6:9], slopes[6:9])
    parts = parts.condition_on(x[9:], y[9:], slopes[9:])
    new = problem(5, 1)[0]
    assert torch.allclose(parts.predict(new).mean, whole.predict(new).mean, rtol=1e-8)
    assert torch.allclose(parts.predict_gradient(new).stddev, whole.predict_gradient(new).stddev, rtol=1e-7)
    assert float(parts.log_evidence) == pytest.approx(float(whole.log_evidence), rel=1e-9)
    assert parts.diagnostics["num_slopes"] == whole.diagnostics["num_slopes"] == 17
    without = whole.condition_on(new, wave(new))
    assert without.diagnostics["num_data"] == 15


def test_data_sets_and_outputs_are_fitted_side_by_side(tmp_path):
    x, y, slopes = problem(7, 3, (2,))
    y2, slopes2 = torch.stack([y, 100 - 3 * y], -1), torch.stack([slopes, -3 * slopes], -2)
    engine = GradientGP(bdl.GP(K.RBF()), num_starts=2)
    posterior = engine.fit(x, y2, slopes2)
    new = problem(4, 1)[0]
    told = posterior.predict_gradient(new)
    assert told.mean.shape == (2, 4, 2, 2)
    for i in range(2):
        alone = engine.fit(x[i], y[i], slopes[i])
        assert torch.allclose(told.mean[i, :, 0], alone.predict_gradient(new).mean, rtol=1e-3, atol=1e-3)
    assert torch.allclose(told.mean[:, :, 1], -3 * told.mean[:, :, 0], rtol=1e-3, atol=1e-3)
    functions = posterior.functions(3, seed=0)
    assert function_gradients(functions, new).shape == (3, 2, 4, 2, 2)
    posterior.save(tmp_path / "slopes.bdl")
    assert torch.equal(bdl.load(tmp_path / "slopes.bdl").predict_gradient(new).mean, told.mean)


def test_slopes_are_worth_many_values():
    """Thirty points with their two slopes each: half the error of the same points without, or less."""
    x, y, slopes = problem(30, 4)
    new = problem(100, 5)[0]
    engine = GradientGP(bdl.GP(K.Scale(K.Matern(nu=2.5))), num_starts=2)
    errors = []
    for given in (None, slopes):
        told = engine.fit(x, y, given).predict(new, noise=False)
        errors.append(float((told.mean - wave(new)).square().mean().sqrt()))
    assert errors[1] < errors[0] / 2


@pytest.mark.touches_global_rng  # BoTorch draws restarts and Sobol scrambles from it
@pytest.mark.parametrize("view", ["gaussian", "samples"])
def test_it_drives_a_step_of_bayesian_optimisation(view):
    """Members and Gaussian; fantasies condition on values, exactly; slopes in x are those of finite differences."""
    x, y, slopes = problem(8, 6)
    posterior = GradientGP(bdl.GP(K.Scale(K.RBF())), num_starts=1).fit(x, y, slopes)
    model = posterior.to_botorch(view, num_samples=64)
    assert model.conditioning == "exact"
    bounds = torch.tensor([[1.0, 100.0], [4.0, 140.0]], dtype=F64)
    acquisition = qLogNoisyExpectedImprovement(model, X_baseline=x, prune_baseline=False)
    point, value = optimize_acqf(acquisition, bounds, 2, 2, 8, options={"maxiter": 5, "seed": 0})
    assert point.shape == (2, 2)
    assert bool(value.isfinite())
    fantasised = qKnowledgeGradient(model, num_fantasies=4)(torch.rand(3, 5, 2, generator=_g(), dtype=F64) + 1)
    assert bool(fantasised.isfinite().all())
    more = model.condition_on_observations(point, wave(point).unsqueeze(-1))
    if view == "gaussian":
        exact = posterior.condition_on(point, wave(point))
        new = problem(4, 1)[0]
        assert torch.allclose(more.posterior(new).mean.squeeze(-1), exact.predict(new).mean, rtol=1e-5)
        single = LogExpectedImprovement(model, y.max())
        leaf = new.unsqueeze(-2).requires_grad_()
        (grad,) = torch.autograd.grad(single(leaf).sum(), leaf)
        e = torch.tensor([1e-5, 0.0], dtype=F64)
        rise = (single(leaf.detach() + e) - single(leaf.detach() - e)) / 2e-5
        assert torch.allclose(grad[:, 0, 0], rise, rtol=1e-4, atol=1e-6)


def _g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_slopes_of_one_task_reach_another():
    """Gradients with NaN in the column of tasks; without NaN there, a refusal."""
    x, y, slopes = problem(10, 7)
    tasks = torch.tensor([0.0, 1.0], dtype=F64).repeat(5).unsqueeze(-1)
    x = torch.cat([x, tasks], -1)
    engine = GradientGP(bdl.GP(K.Coregionalization(K.RBF(), num_tasks=2)), num_starts=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = engine.fit(x, y, torch.cat([slopes, torch.full((10, 1), torch.nan, dtype=F64)], -1))
    assert posterior.diagnostics["num_slopes"] == 20
    assert not bool(posterior.predict_gradient(x).mean[:, 2].any())
    with pytest.raises(DataError, match="hold labels"):
        engine.fit(x, y, torch.cat([slopes, torch.zeros(10, 1, dtype=F64)], -1))


def test_wrong_input_is_refused():
    x, y, slopes = problem(6)
    engine = GradientGP(bdl.GP(K.RBF()), num_starts=1)
    with pytest.raises(ShapeError, match="gradients must have shape"):
        engine.fit(x, y, slopes[:, :1])
    with pytest.raises(DataError, match="finite or NaN"):
        engine.fit(x, y, slopes * torch.inf)
    with pytest.raises(SettingError, match="whose functions have slopes"):
        GradientGP(bdl.GP(K.Matern(nu=0.5))).fit(x, y, slopes)
    uneven = slopes.expand(2, 6, 2).clone()
    uneven[0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="the same slopes"):
        engine.fit(x.expand(2, 6, 2), y.expand(2, 6), uneven)
    plain = engine.fit(x, y)
    with pytest.raises(DataError, match="noise of slopes"):
        plain.condition_on(x, y, slopes)
    with pytest.raises(DataError, match="learned from slopes"):
        plain.predict_gradient(x, noise=True)
    with pytest.raises(SettingError):
        GradientGP(bdl.GP(K.RBF(), mean=bdl.models.TaskMean(2)))
    with pytest.raises(SettingError):
        GradientGP(bdl.BNN(hidden=(5,)))
    with pytest.raises(SettingError):
        GradientGP(bdl.GP(K.RBF()), gradient_likelihood=0.1)
