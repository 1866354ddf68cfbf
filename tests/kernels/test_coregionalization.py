"""Several tasks as one Gaussian process: the kernel's own rules, gpytorch and BoTorch as judges, and what it is for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import gpytorch
import pytest
import torch
from botorch.acquisition import qLogNoisyExpectedImprovement
from botorch.models import MultiTaskGP
from botorch.optim import optimize_acqf

import bayesdl as bdl
from bayesdl.errors import DataError, SettingError, ShapeError
from bayesdl.hyper import Normal
from bayesdl.kernels.coregionalization import label_columns
from bayesdl.kernels.derivatives import derivatives
from bayesdl.testing import check_kernel

F64 = torch.float64
K = bdl.kernels


@dataclass(frozen=True)
class _BySign(K.Kernel):
    """A kernel of tasks on inputs of real numbers only: the task is the sign of its column, for `check_kernel`."""

    inside: K.Coregionalization

    def _numbered(self, x):
        column = self.inside.task_column(x.shape[-1])
        tasks = (x[..., column : column + 1] > 0).to(x.dtype) + 0 * x[..., column : column + 1]
        return torch.cat([x[..., :column], tasks, x[..., column + 1 :]], -1)

    def parameters(self, d):
        return self.inside.parameters(d)

    def value_and_pullback(self, x, params=None):
        return self.inside.value_and_pullback(self._numbered(x), params)

    def _covariance(self, x, z, params):
        return self.inside._covariance(self._numbered(x), None if z is None else self._numbered(z), params)

    def _variance(self, x, params):
        return self.inside._variance(self._numbered(x), params)

    def _features(self, lead, num_features, d, params, generator):
        features = self.inside._features(lead, num_features, d, params, generator)
        return lambda x: features(self._numbered(x))


@pytest.mark.parametrize("column", [-1, 0, 1])
@pytest.mark.parametrize("base", [K.Matern(nu=2.5), K.Scale(K.RBF(ard=False))], ids=["Matern", "scaled RBF"])
def test_the_kernel_obeys_what_kernels_obey(base, column):
    check_kernel(_BySign(K.Coregionalization(base, num_tasks=2, rank=2, column=column)))


def tasks_of(n: int, num_tasks: int, seed: int, d: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """x (n, d + 1) with the task last, and y: the same wave, shifted and scaled for each task."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, generator=g, dtype=F64)
    t = torch.randint(num_tasks, (n,), generator=g).to(F64)
    y = (1 + 0.5 * t) * torch.sin(5 * x.sum(-1)) + 0.3 * t + 0.02 * torch.randn(n, generator=g, dtype=F64)
    return torch.cat([x, t.unsqueeze(-1)], -1), y


FACTOR = torch.tensor([[0.9, 0.2], [0.7, -0.4], [-0.3, 0.8]], dtype=F64)
VARIANCE = torch.tensor([0.15, 0.4, 0.7], dtype=F64)


@pytest.mark.touches_global_rng  # gpytorch draws initial factors from it
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_covariances_are_those_of_gpytorch(batch):
    """A product of its IndexKernel and of its kernel of the other columns."""
    x, _ = tasks_of(9, 3, 0)
    z, _ = tasks_of(7, 3, 1)
    ours = K.Coregionalization(K.RBF(), num_tasks=3, rank=2)
    params = {"factor": FACTOR, "task_variance": VARIANCE, "base.lengthscale": torch.tensor([0.3, 0.8], dtype=F64)}
    index = gpytorch.kernels.IndexKernel(num_tasks=3, rank=2).double()
    index.covar_factor.data, index.var = FACTOR.clone(), VARIANCE
    rbf = gpytorch.kernels.RBFKernel(ard_num_dims=2).double()
    rbf.lengthscale = params["base.lengthscale"]
    shared = index.covar_matrix.to_dense()[x[:, 2].long()][:, z[:, 2].long()]
    expected = (rbf(x[:, :2], z[:, :2]).to_dense() * shared).detach()
    wide = {name: value.expand(*batch, *value.shape) for name, value in params.items()}
    assert torch.allclose(ours(x, z, wide), expected.expand(*batch, 9, 7), rtol=1e-10)


@pytest.mark.touches_global_rng  # gpytorch draws initial factors from it
def test_posterior_and_evidence_are_those_of_botorch_with_the_same_hyperparameters():
    x, y = tasks_of(14, 3, 2)
    new = tasks_of(6, 3, 3)[0]
    kernel = K.Coregionalization(K.Matern(nu=2.5), num_tasks=3, rank=2)
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=0.07, lower=0.0))
    posterior = bdl.ExactGP(model, optimize=False, standardize=False).fit(x, y)
    params = posterior.hyperparameters

    covar = gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the inputs are not scaled
        peer = MultiTaskGP(
            x, y.unsqueeze(-1), task_feature=2, rank=2, covar_module=covar, mean_module=gpytorch.means.ZeroMean(),
            likelihood=gpytorch.likelihoods.GaussianLikelihood().double(), outcome_transform=None,
        )  # fmt: skip
    peer.likelihood.noise = 0.07
    covar.lengthscale = params["kernel.base.lengthscale"]
    index = gpytorch.kernels.IndexKernel(num_tasks=3, rank=2, active_dims=[2]).double()
    index.covar_factor.data, index.var = params["kernel.factor"].clone(), params["kernel.task_variance"]
    peer.covar_module = covar * index  # in place of one whose factor cannot be negative
    peer.eval()
    with gpytorch.settings.fast_computations(False, False, False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = peer.posterior(new)
        law = gpytorch.distributions.MultivariateNormal(torch.zeros(14, dtype=F64), peer.covar_module(x))
        evidence = float(peer.likelihood(law).log_prob(y).detach())
    ours = posterior.predict(new, noise=False)
    assert torch.allclose(ours.mean, told.mean.squeeze(-1), rtol=1e-7)
    assert torch.allclose(ours.variance, told.variance.squeeze(-1), rtol=1e-6)
    assert float(posterior.log_evidence) == pytest.approx(evidence, rel=1e-8)


def test_engines_leave_the_column_of_tasks_as_it_is():
    """Task numbers reach the kernel as they came, with offset and scale of the other columns gone."""
    x, y = tasks_of(30, 3, 4)
    x[:, 0] = 1000 + 50 * x[:, 0]
    gp = bdl.GP(K.Coregionalization(K.Matern(nu=2.5), num_tasks=3), mean=bdl.models.TaskMean(3))
    engines = [
        bdl.ExactGP(gp, num_starts=1),
        bdl.ExactGP(gp, num_starts=1, solver="matrix_free"),
        bdl.ScaleMixture(gp, num_starts=1),
        bdl.SparseGP(gp, num_inducing=20, num_steps=30),
        bdl.NUTS(gp, num_chains=2, num_warmup=20, num_draws=10),
    ]
    for engine in engines:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so short a fit has not converged
            posterior = engine.fit(x, y, seed=0)
        units = posterior._units
        assert float(units.x_loc[..., 2]) == 0.0
        assert float(units.x_scale[..., 2]) == 1.0
        assert float(units.x_loc[..., 0]) > 900
        error = (posterior.predict(x).mean - y).abs().mean()
        assert float(error) < 0.5 * float((y - y.mean()).abs().mean()), type(engine).__name__
        f = posterior.functions(3, seed=0)(x)
        assert f.shape == (3, 30)
        assert bool(f.isfinite().all())


def test_other_tasks_tell_of_one_that_has_few_points(tmp_path):
    """Four points of the target and thirty of a relative: a third of the error that four points alone leave."""
    g = torch.Generator().manual_seed(5)
    x = torch.rand(34, 1, generator=g, dtype=F64)
    t = torch.tensor([1.0] * 4 + [0.0] * 30, dtype=F64)
    wave = torch.sin(9 * x[:, 0])
    y = torch.where(t == 1, 2.0 * wave + 3.0, wave) + 0.01 * torch.randn(34, generator=g, dtype=F64)
    new = torch.linspace(0.05, 0.95, 40, dtype=F64).unsqueeze(-1)
    truth = 2.0 * torch.sin(9 * new[:, 0]) + 3.0
    gp = bdl.GP(K.Coregionalization(K.RBF(), num_tasks=2, rank=1), mean=bdl.models.TaskMean(2))
    posterior = bdl.ExactGP(gp).fit(torch.cat([x, t.unsqueeze(-1)], -1), y, seed=0)
    asked = torch.cat([new, torch.ones_like(new)], -1)
    together = (posterior.predict(asked).mean - truth).square().mean().sqrt()
    alone = bdl.ExactGP(bdl.GP(K.RBF())).fit(x[:4], y[:4], seed=0)
    apart = (alone.predict(new).mean - truth).square().mean().sqrt()
    assert float(together) < float(apart) / 3
    posterior.save(tmp_path / "tasks.bdl")
    loaded = bdl.load(tmp_path / "tasks.bdl")
    assert torch.equal(loaded.predict(asked).mean, posterior.predict(asked).mean)


@pytest.mark.touches_global_rng  # BoTorch draws restarts and Sobol scrambles from it
def test_a_step_on_the_target_goes_where_another_task_has_its_optimum():
    """The target was seen on the left only; its relative says that the best lies on the right, at 0.8."""
    g = torch.Generator().manual_seed(6)
    x = torch.cat([0.4 * torch.rand(3, 1, generator=g, dtype=F64), torch.rand(25, 1, generator=g, dtype=F64)])
    t = torch.tensor([1.0] * 3 + [0.0] * 25, dtype=F64)
    height = torch.exp(-((x[:, 0] - 0.8) ** 2) / 0.02) + 0.3 * torch.sin(6 * x[:, 0])
    y = torch.where(t == 1, 5 + 3 * height, height)
    gp = bdl.GP(K.Coregionalization(K.Matern(nu=2.5), num_tasks=2), mean=bdl.models.TaskMean(2))
    posterior = bdl.ExactGP(gp).fit(torch.cat([x, t.unsqueeze(-1)], -1), y, seed=0)
    model = posterior.to_botorch()
    assert model.conditioning == "exact"
    seen = torch.cat([x[:3], torch.ones(3, 1, dtype=F64)], -1)
    acquisition = qLogNoisyExpectedImprovement(model, X_baseline=seen, prune_baseline=False)
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=F64)
    point, _ = optimize_acqf(acquisition, bounds, 1, 4, 32, fixed_features={1: 1.0}, options={"seed": 0})
    assert abs(float(point[0, 0]) - 0.8) < 0.1
    alone = bdl.ExactGP(bdl.GP(K.Matern(nu=2.5))).fit(x[:3], y[:3], seed=0).to_botorch()
    acquisition = qLogNoisyExpectedImprovement(alone, X_baseline=x[:3], prune_baseline=False)
    lonely, _ = optimize_acqf(acquisition, bounds[:, :1], 1, 4, 32, options={"seed": 0})
    assert abs(float(lonely[0, 0]) - 0.8) > 0.1


def test_label_columns_are_found_in_any_part():
    tasks = K.Coregionalization(K.RBF(), num_tasks=2, column=1)
    assert label_columns(tasks, 3) == (1,)
    assert label_columns(K.Scale(tasks) + K.RBF(), 3) == (1,)
    assert label_columns(K.Coregionalization(K.Coregionalization(K.RBF(), column=0), column=-1), 4) == (0, 3)
    assert label_columns(K.Coregionalization(K.Coregionalization(K.RBF(), column=0), column=0), 4) == (0, 1)
    assert label_columns(K.RBF() * K.Linear(), 3) == ()


def test_slopes_of_several_tasks_are_those_of_finite_differences():
    """In the other columns; in that of the tasks there are none."""
    x, _ = tasks_of(5, 3, 8)
    z, _ = tasks_of(4, 3, 9)
    kernel = K.Coregionalization(K.RBF(), num_tasks=3, rank=2)
    params = {"factor": FACTOR, "task_variance": VARIANCE, "base.lengthscale": torch.tensor([0.3, 0.8], dtype=F64)}
    told, h = derivatives(kernel, x, z, params), 1e-5
    for j in range(2):
        e = h * torch.eye(3, dtype=F64)[j]
        slope = (kernel(x, z + e, params) - kernel(x, z - e, params)) / (2 * h)
        assert torch.allclose(told.by_z[..., j], slope, atol=1e-8)
        bent = derivatives(kernel, x + e, z, params).by_z - derivatives(kernel, x - e, z, params).by_z
        assert torch.allclose(told.by_both[..., j, :], bent / (2 * h), atol=1e-7)
    for part in (told.by_x[..., 2], told.by_z[..., 2], told.by_both[..., 2, :], told.by_both[..., 2]):
        assert not bool(part.any())


def test_wrong_input_is_refused():
    kernel = K.Coregionalization(K.RBF(), num_tasks=2)
    x = torch.rand(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    with pytest.raises(DataError, match="task numbers from 0 to 1"):
        kernel(x)
    with pytest.raises(DataError, match="got  2"):
        kernel(torch.cat([x[:, :1], torch.full((4, 1), 2.0, dtype=F64)], -1))
    with pytest.raises(ShapeError, match="at least one other"):
        kernel.parameters(1)
    with pytest.raises(ShapeError):
        K.Coregionalization(K.RBF(), column=3).parameters(3)
    for wrong in ({"num_tasks": 0}, {"rank": 3}, {"column": 0.5}, {"base": "RBF"}):
        with pytest.raises(SettingError):
            K.Coregionalization(**{"base": K.RBF(), **wrong})
    with pytest.raises(SettingError):
        bdl.models.TaskMean(0)


def test_the_normal_prior_is_that_of_torch():
    prior, at = Normal(0.7, 2.3), torch.tensor([-1.2, 0.4, 5.0], dtype=F64)
    judge = torch.distributions.Normal(0.7, 2.3)
    assert torch.allclose(prior.log_prob(at), judge.log_prob(at).to(F64), rtol=1e-6)
    leaf = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(prior.log_prob(leaf).sum(), leaf)
    assert torch.allclose(prior.slope(at), slope, rtol=1e-12)
    draws = prior.sample((4000,), torch.Generator().manual_seed(0))
    assert abs(float(draws.mean()) - prior.typical) < 5 * 2.3 / 4000**0.5
    with pytest.raises(SettingError):
        Normal(0.0, -1.0)
