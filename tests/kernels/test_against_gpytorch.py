"""Covariances, marginal likelihoods, their gradients and posteriors agree with GPyTorch's exact Cholesky path."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bayesdl import ops
from bayesdl.kernels import RBF, Kernel, Linear, Matern, Periodic, RationalQuadratic, Scale

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    gpytorch = pytest.importorskip("gpytorch")

D, N, S = 3, 9, 4
Raw = dict[str, tuple[Tensor, Tensor]]


def _stationary(make: Callable, prefix: str, params: dict[str, Tensor], raw: Raw, ard: bool = True):
    """A GPyTorch kernel with our lengthscales; notes where the raw parameter of each name lives."""
    value = params[f"{prefix}lengthscale"]
    batch = value.shape[:-1] if ard else value.shape
    kernel = make(ard_num_dims=D if ard else None, batch_shape=batch).double()
    kernel.lengthscale = value.unsqueeze(-2) if ard else value[..., None, None]
    raw[f"{prefix}lengthscale"] = (kernel.raw_lengthscale, value)
    return kernel


def _rbf(params, raw, prefix=""):
    return _stationary(gpytorch.kernels.RBFKernel, prefix, params, raw)


def _rbf_shared(params, raw, prefix=""):
    return _stationary(gpytorch.kernels.RBFKernel, prefix, params, raw, ard=False)


def _matern(nu: float):
    def build(params, raw, prefix=""):
        return _stationary(lambda **kw: gpytorch.kernels.MaternKernel(nu=nu, **kw), prefix, params, raw)

    return build


def _rq(params, raw, prefix=""):
    kernel = _stationary(gpytorch.kernels.RQKernel, prefix, params, raw)
    kernel.alpha = params[f"{prefix}alpha"].unsqueeze(-1)
    raw[f"{prefix}alpha"] = (kernel.raw_alpha, params[f"{prefix}alpha"])
    return kernel


def _periodic(params, raw, prefix=""):
    kernel = _stationary(gpytorch.kernels.PeriodicKernel, prefix, params, raw)
    kernel.period_length = params[f"{prefix}period"].unsqueeze(-2)
    raw[f"{prefix}period"] = (kernel.raw_period_length, params[f"{prefix}period"])
    return kernel


def _linear(params, raw, prefix=""):
    value = params[f"{prefix}variance"]
    kernel = gpytorch.kernels.LinearKernel(batch_shape=value.shape).double()
    kernel.variance = value[..., None, None]
    raw[f"{prefix}variance"] = (kernel.raw_variance, value)
    return kernel


def _scale(build):
    def scaled(params, raw, prefix=""):
        value = params[f"{prefix}outputscale"]
        base = build(params, raw, f"{prefix}base.")
        kernel = gpytorch.kernels.ScaleKernel(base, batch_shape=value.shape).double()
        kernel.outputscale = value
        raw[f"{prefix}outputscale"] = (kernel.raw_outputscale, value)
        return kernel

    return scaled


def _sum(params, raw, prefix=""):
    return _scale(_rbf)(params, raw, "0.") + _linear(params, raw, "1.")


def _product(params, raw, prefix=""):
    return _matern(1.5)(params, raw, "0.") * _periodic(params, raw, "1.")


CASES: dict[str, tuple[Kernel, Callable]] = {
    "rbf": (RBF(), _rbf),
    "rbf, shared": (RBF(ard=False), _rbf_shared),
    "matern12": (Matern(nu=0.5), _matern(0.5)),
    "matern32": (Matern(nu=1.5), _matern(1.5)),
    "matern52": (Matern(nu=2.5), _matern(2.5)),
    "rational quadratic": (RationalQuadratic(), _rq),
    "periodic": (Periodic(), _periodic),
    "linear": (Linear(), _linear),
    "scale": (Scale(Matern(nu=2.5)), _scale(_matern(2.5))),
    "sum": (Scale(RBF()) + Linear(), _sum),
    "product": (Matern(nu=1.5) * Periodic(), _product),
}


def _problem(kernel: Kernel, batch: tuple[int, ...]):
    """Inputs, targets and hyper-parameters far from the defaults: values between 0.3 and 1.9."""
    g = torch.Generator().manual_seed(7)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    params = {p.name: 0.3 + 1.6 * uniform(*batch, *p.shape) for p in kernel.parameters(D)}
    return (
        2 * uniform(*batch, N, D),
        4 * uniform(*batch, N) - 1,
        0.05 + 0.2 * uniform(*batch),
        params,
        2 * uniform(*batch, S, D),
    )


def _model(x: Tensor, y: Tensor, noise: Tensor, kernel):
    likelihood = gpytorch.likelihoods.GaussianLikelihood(batch_shape=noise.shape).double()
    likelihood.noise = noise.unsqueeze(-1)

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return Exact().double(), likelihood


def _close(ours: Tensor, theirs: Tensor, relative: float = 1e-8) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= relative


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_exact_inference_agrees(name, batch):
    kernel, build = CASES[name]
    # GPyTorch's distance of a row to itself is rounding instead of 0, whose root shows at 4e-8 on the diagonal of
    # Matern-1/2; the test below settles which side is right there.
    relative = 1e-6 if name == "matern12" else 1e-8
    x, y, noise, params, xs = _problem(kernel, batch)
    raw: Raw = {}
    theirs = build(params, raw)
    assert raw.keys() == params.keys()
    model, likelihood = _model(x, y, noise, theirs)
    exact = (
        gpytorch.settings.fast_computations(False, False, False),
        gpytorch.settings.fast_pred_var(False),
        gpytorch.settings.lazily_evaluate_kernels(False),
    )
    with exact[0], exact[1], exact[2]:
        with torch.no_grad():
            _close(kernel(x, None, params), theirs(x).to_dense(), relative)
            _close(kernel(x, xs, params), theirs(x, xs).to_dense(), relative)
        model.train()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model(x), y) * N
        leaves = [likelihood.noise_covar.raw_noise, *(leaf for leaf, _ in raw.values())]
        by_noise, *by_raw = torch.autograd.grad(mll.sum(), leaves)
        model.eval()
        with torch.no_grad():
            predicted = model(xs)

    result = ops.mll_and_grad(kernel.value_and_pullback, x, params, y, noise)
    _close(result.value, mll.detach(), relative)
    # d(value) / d(raw) of a softplus is the logistic function; the noise has a floor of 1e-4 under its softplus.
    for (key, (leaf, value)), grad in zip(raw.items(), by_raw, strict=True):
        _close(result.params[key], (grad / torch.sigmoid(leaf.detach())).reshape(value.shape), relative)
    slope = torch.sigmoid(likelihood.noise_covar.raw_noise.detach())
    _close(result.noise_variance, (by_noise / slope).reshape(noise.shape), relative)

    state = ops.condition(kernel(x, None, params), x, y, noise)
    mean, variance = ops.marginal_moments(state, kernel(x, xs, params), kernel.diagonal(xs, params))
    _, covariance = ops.joint_moments(state, kernel(x, xs, params), kernel(xs, None, params))
    _close(ops.log_marginal(state), mll.detach(), relative)
    _close(mean, predicted.mean, relative)
    _close(variance, predicted.variance, relative)
    _close(covariance, predicted.covariance_matrix, relative)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_matern_agrees_with_explicit_differences(nu, batch):
    """Value and gradient of the marginal likelihood, where every difference is formed alone and the diagonal is 1."""
    kernel = Matern(nu=nu)
    x, y, noise, params, _ = _problem(kernel, batch)
    lengthscale = params["lengthscale"].clone().requires_grad_()
    u = x / lengthscale.unsqueeze(-2)
    eye = torch.eye(N, dtype=torch.bool)
    d2 = (u.unsqueeze(-2) - u.unsqueeze(-3)).square().sum(-1).masked_fill(eye, 1.0)
    r = (2 * nu * d2).sqrt()
    k = (-r).exp() * {0.5: 1.0, 1.5: 1 + r, 2.5: 1 + r + r.square() / 3}[nu]
    k = k.masked_fill(eye, 1.0) + noise[..., None, None] * eye
    normal = torch.distributions.MultivariateNormal(torch.zeros(N, dtype=torch.float64), k)
    value = normal.log_prob(y)
    (grad,) = torch.autograd.grad(value.sum(), lengthscale)
    result = ops.mll_and_grad(kernel.value_and_pullback, x, params, y, noise)
    _close(result.value, value.detach(), 1e-12)
    _close(result.params["lengthscale"], grad, 1e-11)
