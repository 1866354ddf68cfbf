"""gpytorch both ways, with gpytorch itself as judge: its kernels and means in our models, ours in its and BoTorch's."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import bayesdl as bdl
from bayesdl.errors import DataError, SettingError, ShapeError, StorageError
from bayesdl.inference._evidence import Evidence
from bayesdl.testing import check_engine, check_kernel

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import gpytorch
    from gpytorch.constraints import GreaterThan, Interval, LessThan
    from gpytorch.priors import GammaPrior, HalfCauchyPrior, LogNormalPrior, MultivariateNormalPrior, NormalPrior

    from bayesdl.interop import gpytorch as both

F64 = torch.float64
kernels = gpytorch.kernels


def toy(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def linear(d: int, weight: float = 1.0) -> gpytorch.means.Mean:
    """gpytorch draws initial weights from the global random state, which is put back."""
    with torch.random.fork_rng():
        mean = gpytorch.means.LinearMean(d).double()
    mean.weights.data, mean.bias.data = weight * toy(d, 1, seed=4), weight * toy(1, seed=5)
    return mean


class Deep(kernels.Kernel):
    """A kernel of one's own: an RBF on features of a network, with a parameter of any sign besides."""

    def __init__(self, d: int = 3):
        super().__init__()
        with torch.random.fork_rng():
            self.features = nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, 2))
        for i, p in enumerate(self.features.parameters()):
            p.data = 0.6 * toy(*p.shape, seed=i)
        self.base = kernels.RBFKernel(ard_num_dims=2)
        self.register_parameter("tilt", nn.Parameter(torch.tensor(-0.3)))

    def forward(self, x1, x2, diag=False, **params):
        k = self.base(self.features(x1), self.features(x2), diag=diag)
        t1, t2 = x1[..., 0] * self.tilt, x2[..., 0] * self.tilt
        return k + t1 * t2 if diag else k.to_dense() + t1.unsqueeze(-1) * t2.unsqueeze(-2)


def spectral(d: int = 3) -> kernels.Kernel:
    kernel = kernels.SpectralMixtureKernel(num_mixtures=2, ard_num_dims=d).double()
    kernel.mixture_weights = torch.tensor([0.4, 0.7], dtype=F64)
    kernel.mixture_means = 0.05 + 0.2 * toy(2, 1, d).abs()
    kernel.mixture_scales = 0.05 + 0.1 * toy(2, 1, d, seed=1).abs()
    return kernel


def scaled_matern() -> kernels.Kernel:
    base = kernels.MaternKernel(
        nu=1.5, ard_num_dims=3, lengthscale_prior=GammaPrior(3.0, 2.0), lengthscale_constraint=GreaterThan(0.025)
    )
    kernel = kernels.ScaleKernel(base, outputscale_prior=LogNormalPrior(0.3, 0.8)).double()
    kernel.outputscale, kernel.base_kernel.lengthscale = 1.7, torch.tensor([[0.4, 1.3, 2.7]], dtype=F64)
    return kernel


def sum_of_columns() -> kernels.Kernel:
    first = kernels.ScaleKernel(kernels.RBFKernel(active_dims=(2, 0)))
    return (first + kernels.LinearKernel(active_dims=(1,)) * kernels.PeriodicKernel(active_dims=(0,))).double()


def smooth_step() -> kernels.Kernel:
    return (kernels.RQKernel(ard_num_dims=3) * kernels.RBFKernel()).double()


NATIVE = {"scaled matern": scaled_matern, "sum over columns": sum_of_columns, "product": smooth_step}
OWN_CODE = {
    "spectral mixture": spectral,
    "polynomial": lambda: kernels.PolynomialKernel(power=2, offset_constraint=Interval(0.1, 4.0)).double(),
    "constant times rbf": lambda: (kernels.ConstantKernel() * kernels.RBFKernel(ard_num_dims=3)).double(),
}
WITHOUT_FUNCTIONS = {
    "deep": lambda: Deep().double(),
    "scaled deep": lambda: kernels.ScaleKernel(Deep()).double(),
    "piecewise": lambda: kernels.PiecewisePolynomialKernel(q=2, ard_num_dims=3).double(),
    "bounded above": lambda: kernels.ScaleKernel(
        kernels.CosineKernel(active_dims=(1,)), outputscale_constraint=LessThan(3.0)
    ).double(),
}
ALL = NATIVE | OWN_CODE | WITHOUT_FUNCTIONS


def has_own_code(kernel: bdl.kernels.Kernel) -> bool:
    return bdl.GP(kernel).module is not None


@pytest.mark.parametrize("name", [*NATIVE, *OWN_CODE])
def test_a_kernel_taken_in_is_a_kernel(name):
    kernel = both.from_gpytorch(ALL[name]())
    assert has_own_code(kernel) == (name in OWN_CODE)
    check_kernel(kernel)


@pytest.mark.parametrize("name", WITHOUT_FUNCTIONS)
def test_without_random_features_all_holds_but_functions(name):
    """check_kernel asks for functions last."""
    with pytest.raises(NotImplementedError, match=r"functions cannot be drawn[\s\S]*posterior\.sample"):
        check_kernel(both.from_gpytorch(ALL[name]()))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_covariances_are_gpytorchs(name, native):
    theirs = ALL[name]()
    ours = both.from_gpytorch(theirs, native=native)
    x, z = toy(2, 5, 3), toy(4, 3, seed=2)
    with torch.no_grad():
        wanted = theirs(x, z.expand(2, 4, 3)).to_dense()
        torch.testing.assert_close(ours(x, z), wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.diagonal(x), theirs(x, diag=True), rtol=1e-12, atol=1e-14)


class Peer(gpytorch.models.ExactGP):
    """The judge: gpytorch's own exact GP."""

    def __init__(self, x, y, likelihood, mean, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = mean, kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def linear_mean() -> gpytorch.means.Mean:
    mean = linear(3)
    mean.register_prior("weights_prior", NormalPrior(0.2, 0.7), "weights")
    return mean


def constant_mean() -> gpytorch.means.Mean:
    mean = gpytorch.means.ConstantMean(constant_prior=NormalPrior(0.2, 0.7), constant_constraint=Interval(-2.0, 3.0))
    mean.double().constant = 0.6
    return mean


MEANS = {"linear": linear_mean, "bounded constant": constant_mean, "zero": lambda: gpytorch.means.ZeroMean()}


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", ["scaled matern", "sum over columns", "spectral mixture", "deep"])
def test_evidence_gradient_and_posterior_are_gpytorchs(name, mean):
    """Log posterior of the hyper-parameters and its gradient in every raw parameter; prediction at those values."""
    x, y, x_new = toy(12, 3), toy(12, seed=1), toy(5, 3, seed=2)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor([0.07], dtype=F64)
    peer = Peer(x, y, likelihood, MEANS[mean](), ALL[name]())
    gp = bdl.GP(
        both.from_gpytorch(peer.covar_module, native=False),
        mean=peer.mean_module,
        likelihood=bdl.Gaussian(noise_variance=0.07, prior=None, lower=0.0),
    )
    with gpytorch.settings.fast_computations(False, False, False):
        wanted = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, peer)(peer(x), y)
        wanted.backward()
        peer.eval()
        expected = peer(x_new)
    layout = gp.layout(3)
    theta = layout.initial(x).unsqueeze(0)
    value, gradient = Evidence(gp, layout, x.unsqueeze(0), y.unsqueeze(0))(theta, torch.tensor([0]))
    torch.testing.assert_close(-value[0], wanted.detach(), rtol=1e-9, atol=1e-9)
    sizes = [p.size for p in layout.parameters]
    pieces, slopes = {}, {}
    for p, u, by_u in zip(layout.parameters, theta[0].split(sizes), gradient[0].split(sizes), strict=True):
        pieces[p.name], slopes[p.name] = by_u, p.slope(u)
    for prefix, module in (("kernel", peer.covar_module), ("mean", peer.mean_module)):
        for raw_name, raw, constraint in module.named_parameters_and_constraints():
            head, _, last = raw_name.rpartition(".")
            our_name = ".".join(part for part in (prefix, head, last.removeprefix("raw_")) if part)
            leaf = raw.detach().requires_grad_()
            by_raw = torch.ones_like(raw)
            if constraint is not None:
                by_raw = torch.autograd.grad(constraint.transform(leaf).sum(), leaf)[0]
            per_value = (raw.grad / by_raw).reshape(-1)
            torch.testing.assert_close(-pieces[our_name], per_value * slopes[our_name], rtol=1e-7, atol=1e-9)
    posterior = bdl.ExactGP(gp, optimize=False, standardize=False).fit(x, y)
    latent = posterior.predict(x_new, noise=False)
    torch.testing.assert_close(latent.mean, expected.mean.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(latent.variance, expected.variance.detach(), rtol=1e-8, atol=1e-9)
    taken = bdl.GP(peer.covar_module, mean=peer.mean_module, likelihood=gp.likelihood)
    native = bdl.ExactGP(taken, optimize=False, standardize=False).fit(x, y)
    torch.testing.assert_close(native.predict(x_new).mean, posterior.predict(x_new).mean, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(native.log_evidence, posterior.log_evidence, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [pytest.param("native", marks=pytest.mark.slow), "spectral mixture", "linear mean"])
def test_obeys_the_contract(name):
    if name == "native":
        model = bdl.GP(kernels.ScaleKernel(kernels.RQKernel()).double())
    elif name == "spectral mixture":
        model = bdl.GP(spectral(2))
    else:
        model = bdl.GP(bdl.kernels.Matern(nu=2.5), mean=linear(2))
    check_engine(bdl.ExactGP(model, num_starts=1, max_iterations=10))


def test_a_fit_learns_and_leaves_the_module_alone():
    x = toy(40, 3)
    y = (2 * x[:, 0]).sin() + 0.7 * x[:, 1] + 0.05 * toy(40, seed=9)
    kernel, mean = kernels.ScaleKernel(Deep()).double(), linear(3, weight=0.0)
    kernel.base_kernel.features[0].bias.requires_grad_(False)
    before = copy.deepcopy(kernel.state_dict()), copy.deepcopy(mean.state_dict())
    model = bdl.GP(kernel, mean=mean)
    start = bdl.ExactGP(model, optimize=False).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bdl.errors.ConvergenceWarning)
        fitted = bdl.ExactGP(model, num_starts=2, max_iterations=40).fit(x, y)
    assert float(fitted.log_evidence) > float(start.log_evidence) + 10
    values = fitted.hyperparameters
    assert values["mean.weights"].shape == (3, 1)
    assert "mean" not in values
    assert "kernel.base.features.2.weight" in values
    assert "kernel.base.features.0.bias" not in values  # it does not require gradients
    for module, state in zip((kernel, mean), before, strict=True):
        assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    draws = fitted.sample(x[:3], (5,), seed=1)
    assert draws.shape == (5, 3)
    updated = fitted.condition_on(toy(2, 3, seed=3), toy(2, seed=4))
    assert bool(torch.isfinite(updated.predict(x).mean).all())


def test_a_linear_mean_carries_predictions_beyond_the_data():
    """Far away the kernel is silent, and the line y = 3 - 2 x is what is left, in the user's units."""
    x = torch.linspace(0, 1, 30, dtype=F64).unsqueeze(-1)
    y = 3 - 2 * x[:, 0] + 0.01 * toy(30)
    mean = linear(1, weight=0.0)
    kernel = bdl.kernels.Scale(bdl.kernels.RBF(lengthscale_prior=None, lengthscale=0.5))
    posterior = bdl.ExactGP(bdl.GP(kernel, mean=mean), num_starts=1).fit(x, y)
    far = torch.tensor([[40.0]], dtype=F64)
    assert float(posterior.predict(far).mean) == pytest.approx(3 - 80, rel=0.05)


def test_files_hold_numbers_and_the_reader_hands_in_the_modules(tmp_path):
    x, y = toy(15, 2), toy(15, seed=1)
    mean = linear(2)
    model = bdl.GP(bdl.kernels.Scale(both.from_gpytorch(spectral(2))), mean=mean)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bdl.errors.ConvergenceWarning)
        posterior = bdl.ExactGP(model, num_starts=1, max_iterations=30).fit(x, y)
    posterior.save(tmp_path / "a.bdl")
    with pytest.raises(StorageError, match=r"module=network"):
        bdl.load(tmp_path / "a.bdl")
    with pytest.raises(StorageError, match="must be a kernel of gpytorch"):
        bdl.load(tmp_path / "a.bdl", module=mean)
    fresh = linear(2, weight=3.0), kernels.SpectralMixtureKernel(num_mixtures=2, ard_num_dims=2).double()
    loaded = bdl.load(tmp_path / "a.bdl", module=fresh)
    assert torch.equal(loaded.predict(x).mean, posterior.predict(x).mean)
    assert torch.equal(loaded.predict(x).variance, posterior.predict(x).variance)
    native = bdl.ExactGP(bdl.GP(scaled_matern()), optimize=False).fit(toy(8, 3), toy(8))
    native.save(tmp_path / "b.bdl")
    assert torch.equal(bdl.load(tmp_path / "b.bdl").predict(toy(4, 3)).mean, native.predict(toy(4, 3)).mean)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: kernels.RBFKernel(batch_shape=torch.Size([2])), SettingError, "no batch shape"),
        (lambda: kernels.RBFKernelGrad(), SettingError, "one function"),
        (lambda: kernels.RFFKernel(num_samples=5), SettingError, "must not draw random numbers"),
        (lambda: kernels.SpectralMixtureKernel(num_mixtures=2, ard_num_dims=2), ShapeError, "inputs of 3 columns"),
    ],
)
def test_what_cannot_be_taken_in_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        bdl.GP(build()).layout(3)


def test_botorchs_default_kernel_is_native_with_its_bound_and_prior():
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior

    kernel = get_covar_module_with_dim_scaled_prior(ard_num_dims=3)
    ours = bdl.GP(kernel).kernel
    assert isinstance(ours, bdl.kernels.Bounded)
    (p,), (default,) = ours.parameters(3), bdl.kernels.RBF().parameters(3)
    assert p.lower == pytest.approx(0.025)
    assert (p.prior.loc, p.prior.scale) == pytest.approx((default.prior.loc, default.prior.scale))
    x, y = toy(15, 3), toy(15, seed=1)
    fitted = bdl.ExactGP(bdl.GP(kernel), num_starts=1).fit(x, y)
    plain = bdl.ExactGP(bdl.GP(bdl.kernels.RBF(lengthscale=p.initial)), num_starts=1).fit(x, y)
    torch.testing.assert_close(fitted.log_evidence, plain.log_evidence, rtol=1e-3, atol=1e-3)


def test_what_caches_is_asked_afresh():
    """An inducing-point kernel remembers its matrices in eval mode; other hyper-parameters must give others."""
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    points = toy(4, 2, seed=3)
    theirs = kernels.InducingPointKernel(kernels.RBFKernel().double(), points, likelihood)
    ours = both.from_gpytorch(theirs)
    x, like = toy(6, 2), toy(1)
    values = {p.name: p.initial_tensor(like) for p in ours.parameters(2)}
    for lengthscale in (0.4, 1.9):
        (name,) = [name for name in values if name.endswith("lengthscale")]
        values[name] = torch.full_like(values[name], lengthscale)
        k_xz = torch.exp(-0.5 * torch.cdist(x, points).square() / lengthscale**2)
        k_zz = torch.exp(-0.5 * torch.cdist(points, points).square() / lengthscale**2)
        wanted = k_xz @ torch.linalg.solve(k_zz, k_xz.mT)
        off = ~torch.eye(6, dtype=torch.bool)  # gpytorch corrects the diagonal
        torch.testing.assert_close(ours(x, None, values)[off], wanted[off], rtol=1e-5, atol=1e-5)


def test_priors_on_functions_of_parameters_are_refused():
    kernel = kernels.RBFKernel()
    kernel.register_prior("rate_prior", GammaPrior(2.0, 1.0), lambda m: 1 / m.lengthscale, lambda m, v: None)
    with pytest.raises(SettingError, match="prior must be on one parameter itself"):
        bdl.GP(kernel)
    kernel = kernels.RBFKernel(ard_num_dims=2, lengthscale_constraint=GreaterThan(torch.tensor([0.1, 0.2])))
    with pytest.raises(SettingError, match="one bound for all elements"):
        bdl.GP(kernel)


@pytest.mark.parametrize(
    "prior",
    [
        GammaPrior(2.5, 1.5),
        LogNormalPrior(0.4, 0.8),
        HalfCauchyPrior(0.7),
        NormalPrior(torch.tensor([0.5, 1.0, 2.0]), 0.7),
        MultivariateNormalPrior(torch.tensor([0.5, 1.0, 2.0]), torch.eye(3) + 0.5),
    ],
    ids=lambda p: type(p).__name__,
)
def test_priors_keep_their_density_both_ways(prior):
    """Summed over the elements, as it enters the evidence; one with a joint density as well."""
    kernel = kernels.RBFKernel(ard_num_dims=3, lengthscale_prior=prior).double()
    (p,) = both.from_gpytorch(kernel).parameters(3)
    value = (0.3 + toy(2, *p.shape).abs()).requires_grad_()
    ours = p.prior.log_prob(value)
    assert ours.shape == value.shape
    wanted = copy.deepcopy(prior).double().log_prob(value).double()  # gpytorch computes some in float32
    torch.testing.assert_close(ours.sum(), wanted.sum(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.prior.slope(value), torch.autograd.grad(wanted.sum(), value)[0], rtol=1e-6, atol=1e-6)
    draws = p.prior.sample((400, 3), torch.Generator().manual_seed(0))
    assert draws.shape == (400, 3)
    assert draws.dtype == F64
    assert torch.equal(draws, p.prior.sample((400, 3), torch.Generator().manual_seed(0)))
    again = both.from_gpytorch(kernel).to_gpytorch(3).double()
    penalty = sum(prior.log_prob(closure(m)).sum() for _, m, prior, closure, _ in again.named_priors())
    at_initial = copy.deepcopy(prior).double().log_prob(kernel.lengthscale).sum()
    torch.testing.assert_close(penalty.double(), at_initial.double(), rtol=1e-6, atol=1e-6)


# The other way: our kernels in gpytorch's and BoTorch's models.

OURS = {
    "rbf": bdl.kernels.RBF(),
    "matern": bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)),
    "rational quadratic": bdl.kernels.RationalQuadratic(ard=False),
    "periodic plus linear": bdl.kernels.Periodic(period=3.0) + bdl.kernels.Linear(ard=True),
    "product": bdl.kernels.Matern(nu=0.5, active_dims=(0,)) * bdl.kernels.RBF(active_dims=(1,)),
    "nngp": bdl.kernels.Scale(bdl.kernels.NNGP(depth=2)),
    "bounded": bdl.kernels.Bounded(bdl.kernels.RBF(), lower={"lengthscale": 0.1}, upper={"lengthscale": 30.0}),
    "of any sign": both.from_gpytorch(Deep(2).double()),
}


@pytest.mark.parametrize("name", OURS)
def test_a_gpytorch_model_with_our_kernel_is_our_model(name):
    """Evidence with priors, its gradient by finite differences of ours, and predictions."""
    ours = OURS[name]
    x, y, x_new = toy(14, 2), toy(14, seed=1), toy(5, 2, seed=2)
    module = ours.to_gpytorch(2).double()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor([0.07], dtype=F64)
    peer = Peer(x, y, likelihood, gpytorch.means.ZeroMean(), module)
    values = {p.name: p.constrained(p.unconstrained(p.initial_tensor(x)) + 0.3) for p in ours.parameters(2)}
    module.set_values(values)
    gp = bdl.GP(ours, mean="zero", likelihood=bdl.Gaussian(noise_variance=0.07, prior=None, lower=0.0))
    layout = gp.layout(2)
    with gpytorch.settings.fast_computations(False, False, False):
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, peer)(peer(x), y)
        mll.backward()
        peer.eval()
        expected = peer(x_new)
    u = torch.cat([p.unconstrained(values[p.name]).reshape(-1) for p in ours.parameters(2)])
    theta = torch.cat([u, layout.initial(x)[-1:]]).unsqueeze(0)
    value, gradient = Evidence(gp, layout, x.unsqueeze(0), y.unsqueeze(0))(theta, torch.tensor([0]))
    torch.testing.assert_close(-value[0], mll.detach(), rtol=1e-6, atol=1e-6)  # their priors keep float32 settings
    raw = torch.cat([getattr(module, f"raw_{p.name.replace('.', '_')}").grad.reshape(-1) for p in ours.parameters(2)])
    same = all(p.is_log or p.lower == -torch.inf for p in ours.parameters(2))  # then raw is u
    assert same == (name != "bounded")
    if same:
        torch.testing.assert_close(raw, -gradient[0, :-1], rtol=1e-6, atol=1e-6)
    k_xx = ours(x, None, values) + 0.07 * torch.eye(14, dtype=F64)
    k_xs = ours(x, x_new, values)
    solved = torch.linalg.solve(k_xx, torch.cat([y.unsqueeze(-1), k_xs], -1))
    torch.testing.assert_close(expected.mean.detach(), k_xs.mT @ solved[:, 0], rtol=1e-8, atol=1e-8)
    wanted = ours(x_new, None, values) - k_xs.mT @ solved[:, 1:]
    torch.testing.assert_close(expected.covariance_matrix.detach(), wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("name", OURS)
def test_botorch_fits_our_kernel_and_optimises_acquisition_over_it(name):
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf

    torch.manual_seed(0)
    x = torch.rand(16, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    y = (6 * x[:, :1]).sin() + x[:, 1:].square() + 0.05 * toy(16, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SingleTaskGP(x, y, covar_module=OURS[name].to_gpytorch(2), outcome_transform=None)
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        model.train()
        before = float(mll(model(x), y.squeeze(-1)))
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 40}}, max_attempts=1)
        model.train()
        after = float(mll(model(x), y.squeeze(-1)))
        model.eval()
        assert after > before + 0.01
        bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=F64)
        best, value = optimize_acqf(LogExpectedImprovement(model, best_f=y.max()), bounds, 1, 2, 16)
    assert bool(((best >= 0) & (best <= 1)).all())
    assert bool(torch.isfinite(value))
    point = best.clone().requires_grad_()
    gradient = torch.autograd.grad(model.posterior(point.unsqueeze(0)).mean.sum(), point)[0]
    step = 1e-5 * torch.eye(2, dtype=F64)
    with torch.no_grad():
        up, down = (model.posterior((best + s * step).unsqueeze(-2)).mean.squeeze() for s in (1, -1))
    torch.testing.assert_close(gradient.squeeze(0), (up - down) / 2e-5, rtol=1e-4, atol=1e-6)


def test_our_fit_set_into_a_botorch_model_predicts_the_same():
    """Several outputs: one module with a batch shape holds what our fit learned for each."""
    from botorch.models import SingleTaskGP

    x = torch.rand(20, 2, generator=torch.Generator().manual_seed(3), dtype=F64)
    y = torch.stack([(6 * x[:, 0]).sin(), 2 * x[:, 1] - x[:, 0].square()], -1) + 0.05 * toy(20, 2)
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5)) + bdl.kernels.Linear(active_dims=(1,))
    posterior = bdl.ExactGP(bdl.GP(kernel), standardize=False, num_starts=1).fit(x, y)
    values = posterior.hyperparameters
    module = kernel.to_gpytorch(2, batch_shape=(2,))
    model = SingleTaskGP(x, y, covar_module=module, outcome_transform=None)
    module.set_values(bdl.GP.kernel_values(values))
    model.mean_module.constant = values["mean"]
    model.likelihood.noise_covar.register_constraint("raw_noise", GreaterThan(1e-8))
    model.likelihood.noise = values["noise_variance"].unsqueeze(-1)
    x_new = torch.rand(7, 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    theirs, ours = model.eval().posterior(x_new), posterior.predict(x_new, noise=False)
    torch.testing.assert_close(theirs.mean, ours.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs.variance, ours.variance, rtol=1e-5, atol=1e-7)


def test_the_module_does_what_gpytorch_asks_of_kernels():
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))
    module = kernel.to_gpytorch(2, batch_shape=(3,), active_dims=(2, 0)).double()
    assert module.batch_shape == (3,)
    module.set_values({"outputscale": torch.tensor([0.5, 1.0, 2.0])})
    x, z = toy(5, 3), toy(4, 3, seed=1)
    wanted = kernel(x[:, [2, 0]], z[:, [2, 0]], module.values)
    torch.testing.assert_close(module(x, z).to_dense(), wanted)
    whole = kernel.to_gpytorch(3, batch_shape=(3,)).double()
    torch.testing.assert_close(whole[1](x, z).to_dense(), whole(x, z).to_dense()[1])
    columns = x[:, [2, 0]]
    diagonal = kernel(columns, columns.flip(0), module.values).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(module(x, x.flip(0), diag=True), diagonal)
    scaled = gpytorch.kernels.ScaleKernel(kernel.to_gpytorch(3)).double() + gpytorch.kernels.LinearKernel().double()
    assert scaled(x).to_dense().shape == (5, 5)
    again = pickle.loads(pickle.dumps(module))
    torch.testing.assert_close(again(x, z).to_dense(), wanted)
    assert whole.expand_batch(2, 3)(x).to_dense().shape == (2, 3, 5, 5)
    assert kernel.to_gpytorch(3)(x.float()).to_dense().dtype == torch.get_default_dtype()
    with pytest.raises(ShapeError, match="must have 2 columns"):
        kernel.to_gpytorch(2).double()(x).to_dense()
    with pytest.raises(SettingError, match="active_dims must name 2 columns"):
        kernel.to_gpytorch(2, active_dims=(1,))
    with pytest.raises(SettingError, match="d must be an integer"):
        kernel.to_gpytorch(0)


def test_a_kernel_of_one_column_serves_gpytorchs_grids():
    """GridKernel asks for every column at once (last_dim_is_batch) and works with Kronecker and Toeplitz operators."""
    module = bdl.kernels.RBF(lengthscale=0.6).to_gpytorch(1).double()
    grid = [torch.linspace(0, 1, 6, dtype=F64), torch.linspace(0, 2, 5, dtype=F64)]
    points = gpytorch.utils.grid.create_data_from_grid(grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        structured = gpytorch.kernels.GridKernel(module, grid=grid)(points).to_dense()
    wanted = torch.exp(-0.5 * torch.cdist(points, points).square() / 0.36)
    torch.testing.assert_close(structured, wanted, rtol=1e-6, atol=1e-6)


def test_kronecker_solves_and_log_determinants_are_those_of_the_dense_matrix():
    parts = [bdl.kernels.Matern(nu=2.5, lengthscale=0.4), bdl.kernels.RBF(lengthscale=0.7), bdl.kernels.NNGP(depth=1)]
    grids = [torch.linspace(0, 1, 5, dtype=F64), toy(4), toy(3, 2, seed=1)]
    params = [{"lengthscale": torch.tensor([0.3], dtype=F64)}, None, None]
    operator = both.kronecker(parts, grids, params)
    noisy = operator.add_diagonal(torch.tensor(0.3, dtype=F64))
    index = torch.cartesian_prod(torch.arange(5), torch.arange(4), torch.arange(3))
    dense = torch.ones(60, 60, dtype=F64)
    for i, (kernel, grid, values) in enumerate(zip(parts, grids, params, strict=True)):
        points = (grid.unsqueeze(-1) if grid.ndim == 1 else grid)[index[:, i]]
        dense = dense * kernel(points, points.clone(), values)
    torch.testing.assert_close(operator.to_dense(), dense, rtol=1e-7, atol=1e-7)
    dense = dense + 0.3 * torch.eye(60, dtype=F64)
    rhs = toy(60, 2)
    quad, log_det = noisy.inv_quad_logdet(rhs, logdet=True)
    torch.testing.assert_close(noisy.solve(rhs), torch.linalg.solve(dense, rhs), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(log_det, torch.logdet(dense), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(quad, (rhs * torch.linalg.solve(dense, rhs)).sum(), rtol=1e-6, atol=1e-6)


def test_toeplitz_is_the_dense_matrix_on_a_regular_line():
    grid = 300 + 0.1 * torch.arange(40, dtype=F64)
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5), outputscale=1.7) + bdl.kernels.Periodic(period=0.7)
    params = {p.name: p.initial_tensor(grid) * 0.6 for p in kernel.parameters(1)}
    operator = both.toeplitz(kernel, grid, params)
    dense = kernel(grid.unsqueeze(-1), None, params)
    torch.testing.assert_close(operator.to_dense(), dense, rtol=1e-8, atol=1e-8)
    v = toy(40, 3)
    torch.testing.assert_close(operator @ v, dense @ v, rtol=1e-8, atol=1e-8)
    noisy, wanted = operator.add_diagonal(torch.tensor(0.3, dtype=F64)), dense + 0.3 * torch.eye(40, dtype=F64)
    torch.testing.assert_close(noisy.solve(v), torch.linalg.solve(wanted, v), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noisy.logdet(), torch.logdet(wanted), rtol=1e-6, atol=1e-6)
    with pytest.raises(SettingError, match="stationary"):
        both.toeplitz(bdl.kernels.Linear(), grid)
    with pytest.raises(DataError, match="evenly spaced"):
        both.toeplitz(kernel, grid.square())
    with pytest.raises(ShapeError, match="line"):
        both.toeplitz(kernel, toy(5, 2))
    with pytest.raises(ShapeError, match="pairs"):
        both.kronecker([kernel], [grid, grid])
    lazy = both.as_linear_operator(kernel, grid.unsqueeze(-1), params)
    torch.testing.assert_close(lazy.to_dense(), dense)


@pytest.mark.touches_global_rng
def test_the_page_in_the_docs_runs():
    """Block after block, in one namespace; gpytorch draws initial weights from the global random state."""
    page = (Path(__file__).parents[2] / "docs" / "gpytorch.md").read_text(encoding="utf-8")
    space: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(block, space)
    posterior = space["posterior"]
    assert float((posterior.predict(space["x"]).mean - space["y"]).abs().mean()) < 0.05
