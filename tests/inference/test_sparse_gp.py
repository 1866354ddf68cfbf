"""Sparse GPs: the bound against dense formulas, exact GPs and gpytorch; q(u) against exact posteriors; the contract."""

from __future__ import annotations

import math
import warnings

import gpytorch
import pytest
import torch

import bayesdl as bdl
from bayesdl import ops
from bayesdl.errors import ConvergenceWarning, SettingError, ShapeError
from bayesdl.inference import _bounds, _expectations
from bayesdl.inference._bounds import Collapsed, InducingProblem, Variational, evaluate, natural_step, read_point
from bayesdl.testing import check_engine

KERNEL = bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5, lengthscale=(0.6, 1.3)), outputscale=1.7)


def toy(n: int = 40, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, 2, generator=g, dtype=torch.float64)
    f = (2 * x[..., 0]).sin() + 0.4 * x[..., 1]
    return x, f + 0.2 * torch.randn(*batch, n, generator=g, dtype=torch.float64)


def problem_of(model: bdl.GP, x: torch.Tensor, y: torch.Tensor) -> InducingProblem:
    """One problem, or one for each data set of a batch axis; y (n) or (sets, n)."""
    sets = x if x.ndim == 3 else x.unsqueeze(0)
    return InducingProblem(model, model.layout(2), sets, y.reshape(len(sets), -1), model.likelihood.num_outputs(1))


def vector_of(problem: InducingProblem, m: int, seed: int = 1) -> torch.Tensor:
    """Hyper-parameters near the initial values and inducing points off the data, other ones for each problem."""
    g = torch.Generator().manual_seed(seed)
    num = len(problem.y)
    theta = problem.layout.initial(problem.x) + 0.3 * torch.randn(
        num, problem.layout.dim, generator=g, dtype=torch.float64
    )
    return torch.cat([theta, torch.randn(num, 2 * m, generator=g, dtype=torch.float64)], -1)


@pytest.mark.parametrize(
    "settings",
    [{"num_steps": 5}, {"batch_size": 10, "num_steps": 8}],
    ids=["collapsed", "minibatches"],
)
def test_regression_obeys_the_contract(settings):
    check_engine(bdl.SparseGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_inducing=8, **settings))


@pytest.mark.parametrize("likelihood", [bdl.Bernoulli(), bdl.Categorical(3)], ids=["two classes", "three classes"])
def test_classification_obeys_the_contract(likelihood):
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF()), likelihood=likelihood)
    check_engine(bdl.SparseGP(model, num_inducing=8, num_steps=8, batch_size=16))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_with_an_inducing_point_at_every_input_it_is_the_exact_gp(batch):
    """At the same hyper-parameters: the bound is the evidence, and predictions agree to 1e-6."""
    x, y = toy(25, batch=batch)
    model = bdl.GP(KERNEL, likelihood=bdl.Gaussian(noise_variance=0.3))
    exact = bdl.ExactGP(model, optimize=False).fit(x, y)
    sparse = bdl.SparseGP(model, num_inducing=99, optimize=False, move_inducing=False).fit(x, y)
    assert sparse.diagnostics["num_inducing"] == 25
    torch.testing.assert_close(torch.tensor(sparse.diagnostics["elbo"]).double(), exact.log_evidence, rtol=1e-6, atol=0)
    x_new = toy(9, seed=5)[0]
    for noise in (True, False):
        ours, theirs = sparse.predict(x_new, noise=noise), exact.predict(x_new, noise=noise)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.stddev, theirs.stddev, rtol=1e-6, atol=1e-6)


@pytest.mark.touches_global_rng  # gpytorch draws the initial weights of a linear mean
def test_a_kernel_and_a_mean_of_gpytorch_are_fitted_as_any_other():
    """At the initial values with an inducing point at every input: the exact GP. Then the bound rises as they learn."""
    x, y = toy(25)
    y = y + 3 * x[:, 1]
    kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RQKernel(ard_num_dims=2))
    mean = gpytorch.means.LinearMean(2)
    mean.weights.data.fill_(0.3)
    model = bdl.GP(kernel, mean=mean)
    exact = bdl.ExactGP(model, num_starts=1, optimize=False).fit(x, y)
    fixed = bdl.SparseGP(model, num_inducing=25, optimize=False, move_inducing=False).fit(x, y)
    assert fixed.diagnostics["elbo"] == pytest.approx(float(exact.log_evidence), rel=1e-6)
    torch.testing.assert_close(fixed.predict(x).mean, exact.predict(x).mean, rtol=1e-5, atol=1e-5)
    fitted = bdl.SparseGP(model, num_inducing=25, move_inducing=False).fit(x, y)
    assert fitted.diagnostics["elbo"] > fixed.diagnostics["elbo"] + 5


def dense_bound(problem: InducingProblem, vector: torch.Tensor) -> torch.Tensor:
    """log N(y | m, Q + s I) - tr(K - Q) / (2 s) for each problem, from whole matrices."""
    totals = []
    for i, row in enumerate(vector):
        layout, x, y = problem.layout, problem.x[i], problem.y[i]
        values, constant = layout.unpack(row[: layout.dim])
        params = problem.model.kernel_values(values)
        z = row[layout.dim :].reshape(-1, 2)
        k_mm, k_mn = problem.model.kernel(z, params=params), problem.model.kernel(z, x, params)
        k_mm = k_mm + 1e-8 * k_mm.diagonal().mean() * torch.eye(len(z))
        q = k_mn.mT @ torch.linalg.solve(k_mm, k_mn)
        s = values["noise_variance"]
        density = torch.distributions.MultivariateNormal(constant.expand(len(y)), q + s * torch.eye(len(y)))
        left = problem.model.kernel.diagonal(x, params).sum() - q.diagonal().sum()
        totals.append(density.log_prob(y) - left / (2 * s) + layout.log_prior(values)[0])
    return torch.stack(totals)


@pytest.mark.parametrize("mean", ["constant", "zero"])
def test_the_collapsed_bound_and_its_gradient_agree_with_a_dense_formula(mean, monkeypatch):
    """Two data sets at other hyper-parameters each, in tiles of 16 rows; autograd through whole matrices as judge."""
    x, y = toy(40, batch=(2,))
    model = bdl.GP(KERNEL, mean=mean, likelihood=bdl.Gaussian(noise_variance=0.4))
    problem = problem_of(model, x, y)
    vector = vector_of(problem, 7).requires_grad_()
    expected = dense_bound(problem, vector)
    gradient = torch.autograd.grad(expected.sum(), vector)[0]
    monkeypatch.setattr(_bounds, "_TILE", 1)
    value, slope = Collapsed(problem, torch.ones_like(vector[0]))(vector.detach(), torch.arange(2))
    torch.testing.assert_close(-40 * value, expected.detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(-40 * slope, gradient, rtol=1e-5, atol=1e-6)


def test_the_bound_never_exceeds_the_evidence_and_rises_with_more_points():
    """Nested greedy choices at fixed hyper-parameters: 3, 8, 20 and 60 inducing points for 60 data."""
    x, y = toy(60)
    model = bdl.GP(KERNEL, likelihood=bdl.Gaussian(noise_variance=0.05))
    evidence = float(bdl.ExactGP(model, optimize=False).fit(x, y).log_evidence)
    bounds = [
        bdl.SparseGP(model, num_inducing=m, optimize=False, move_inducing=False).fit(x, y).diagnostics["elbo"]
        for m in (3, 8, 20, 60)
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] < evidence - 10
    assert bounds[-1] <= evidence + 1e-8
    assert bounds[-1] == pytest.approx(evidence, rel=1e-6)


class _Sgpr(gpytorch.models.ExactGP):
    """Titsias' model in gpytorch."""

    def __init__(self, x, y, z, likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        base = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))
        self.covar_module = gpytorch.kernels.InducingPointKernel(base, z, likelihood)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


class _Svgp(gpytorch.models.ApproximateGP):
    """Whitened variational model in gpytorch."""

    def __init__(self, z):
        variational = gpytorch.variational.CholeskyVariationalDistribution(len(z))
        strategy = gpytorch.variational.VariationalStrategy(self, z, variational, learn_inducing_locations=False)
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _rbf_point(likelihood, x, y, m=9):
    kernel = bdl.kernels.Scale(bdl.kernels.RBF(lengthscale=(0.6, 1.3)), outputscale=1.7)
    model = bdl.GP(kernel, mean="zero", likelihood=likelihood)
    problem = problem_of(model, x, y)
    z = toy(m, seed=11)[0]
    vector = torch.cat([problem.layout.initial(x), z.reshape(-1)]).unsqueeze(0)
    return problem, vector, z


def _set_kernel(module) -> None:
    module.outputscale = 1.7
    module.base_kernel.lengthscale = torch.tensor([0.6, 1.3])


def test_the_collapsed_bound_agrees_with_gpytorchs_sgpr():
    x, y = toy(40)
    problem, vector, z = _rbf_point(bdl.Gaussian(noise_variance=0.09, prior=None), x, y)
    log_prior = float(read_point(problem, vector).log_prior.detach())
    value, _ = Collapsed(problem, torch.ones_like(vector[0]))(vector, torch.arange(1))
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.09
    peer = _Sgpr(x, y, z.clone(), likelihood).double()
    _set_kernel(peer.covar_module.base_kernel)
    with gpytorch.settings.fast_computations(False, False, False), gpytorch.settings.cholesky_jitter(double_value=1e-8):
        peer.train()
        theirs = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, peer)(peer(x), y).detach() * 40
    assert -40 * float(value) - log_prior == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("task", ["regression", "binary"])
def test_the_variational_bound_agrees_with_gpytorchs_svgp(task):
    """The same q(v), far from the prior; gpytorch's quadrature for Bernoulli uses a probit, so its logistic twin."""
    x, y = toy(40)
    y = y if task == "regression" else (y > 0).double()
    likelihood = bdl.Gaussian(noise_variance=0.09, prior=None) if task == "regression" else bdl.Bernoulli()
    problem, vector, z = _rbf_point(likelihood, x, y)
    g = torch.Generator().manual_seed(2)
    mean = torch.randn(9, generator=g, dtype=torch.float64)
    lower = (0.3 * torch.randn(9, 9, generator=g, dtype=torch.float64)).tril() + torch.eye(9)
    precision = torch.linalg.inv(lower @ lower.mT)
    root = torch.linalg.inv(torch.linalg.cholesky(precision))
    q = Variational(mean[None, None], precision[None, None], root[None, None])
    point = read_point(problem, vector)
    ones = torch.ones(1, 1, dtype=torch.float64)
    expected = (
        _expectations.gaussian(torch.tensor([0.09]).double())
        if task == "regression"
        else _expectations.bernoulli(_expectations.Scales(ones, ones))
    )
    found = evaluate(problem, point, q, expected, None, slopes=False)
    ours = float(found.expected - ops.standard_normal_kl(q.mean, q.root).sum())

    peer = _Svgp(z.clone()).double()
    _set_kernel(peer.covar_module)
    peer.variational_strategy.variational_params_initialized.fill_(1)
    peer.variational_strategy._variational_distribution.variational_mean.data = mean
    peer.variational_strategy._variational_distribution.chol_variational_covar.data = lower
    if task == "regression":
        judge = gpytorch.likelihoods.GaussianLikelihood().double()
        judge.noise = 0.09
    else:
        judge = _Logistic()
    peer.train()
    with (
        gpytorch.settings.variational_cholesky_jitter(double_value=1e-8),
        gpytorch.settings.cholesky_jitter(double_value=1e-8),
        gpytorch.settings.num_gauss_hermite_locs(40),
    ):
        mll = gpytorch.mlls.VariationalELBO(judge, peer, num_data=40)
        theirs = float(mll(peer(x), y).detach()) * 40
    assert ours == pytest.approx(theirs, rel=1e-5)


class _Logistic(gpytorch.likelihoods.likelihood._OneDimensionalLikelihood):
    """p(y = 1 | f) = sigmoid(f), which gpytorch integrates numerically."""

    def forward(self, function_samples):
        return torch.distributions.Bernoulli(logits=function_samples)


def test_one_full_natural_step_reaches_the_collapsed_optimum():
    """For Gaussian noise, a step of rate 1 from anywhere: the bound of that q(v) is the collapsed one."""
    x, y = toy(40)
    problem = problem_of(bdl.GP(KERNEL, likelihood=bdl.Gaussian(noise_variance=0.4)), x, y)
    vector = vector_of(problem, 7)
    point = read_point(problem, vector)
    expected = _expectations.gaussian(point.values["noise_variance"].detach())
    q = Variational.prior(vector, 1, 1, 7)
    for rate in (0.3, 1.0):
        q = natural_step(q, evaluate(problem, point, q, expected, None, slopes=True), rate, torch.ones(1).double())
    found = evaluate(problem, point, q, expected, None, slopes=False)
    reached = found.expected - ops.standard_normal_kl(q.mean, q.root)
    value, _ = Collapsed(problem, torch.ones_like(vector[0]))(vector, torch.arange(1))
    assert float(reached) + float(point.log_prior.detach()) == pytest.approx(-40 * float(value), rel=1e-9)


@pytest.mark.parametrize("likelihood", [bdl.Gaussian(noise_variance=0.4), bdl.Bernoulli()], ids=["normal", "binary"])
def test_minibatch_gradients_are_unbiased(likelihood):
    """The mean over the four disjoint batches of an epoch is the gradient from all rows, in everything."""
    x, y = toy(40)
    y = (y > 0).double() if isinstance(likelihood, bdl.Bernoulli) else y
    problem = problem_of(bdl.GP(KERNEL, likelihood=likelihood), x, y)
    point = read_point(problem, vector_of(problem, 6))
    q = Variational.prior(x, 1, 1, 6)
    q = q._replace(mean=q.mean + 0.7)
    ones = torch.ones(1, 1, dtype=torch.float64)
    expected = (
        _expectations.bernoulli(_expectations.Scales(ones, ones))
        if isinstance(likelihood, bdl.Bernoulli)
        else _expectations.gaussian(point.values["noise_variance"].detach())
    )
    whole = evaluate(problem, point, q, expected, None, slopes=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    parts = [evaluate(problem, point, q, expected, rows, slopes=True) for rows in order.split(10)]
    for name in ("expected", "by_mean", "curvature"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        torch.testing.assert_close(mean, getattr(whole, name), rtol=1e-9, atol=1e-10)
    for i, leaf in enumerate(whole.by_leaves):
        mean = torch.stack([part.by_leaves[i] for part in parts]).mean(0)
        torch.testing.assert_close(mean, leaf, rtol=1e-9, atol=1e-9)


def test_gradients_of_the_variational_bound_agree_with_finite_differences():
    """d E_q log p / d(hyper-parameters, inducing points), Bernoulli, with q(v) fixed; central differences as judge."""
    x, y = toy(30)
    problem = problem_of(bdl.GP(KERNEL, likelihood=bdl.Bernoulli()), x, (y > 0).double())
    vector = vector_of(problem, 4)
    q = Variational.prior(x, 1, 1, 4)
    q = q._replace(mean=q.mean + torch.tensor([0.5, -1.2, 2.0, 0.1]).double(), root=0.6 * q.root)
    ones = torch.ones(1, 1, dtype=torch.float64)
    expected = _expectations.bernoulli(_expectations.Scales(ones, ones))

    def objective(vector: torch.Tensor) -> float:
        point = read_point(problem, vector)
        return float(evaluate(problem, point, q, expected, None, slopes=False).expected + point.log_prior.detach())

    point = read_point(problem, vector)
    found = evaluate(problem, point, q, expected, None, slopes=True)
    gradient = _bounds.pull_back(point, found.by_leaves)[0]
    for i in range(vector.shape[-1]):
        step = torch.zeros_like(vector)
        step[0, i] = 1e-5
        numeric = (objective(vector + step) - objective(vector - step)) / 2e-5
        assert float(gradient[i]) == pytest.approx(numeric, rel=1e-4, abs=1e-5)


def test_optimising_moves_the_inducing_points_and_raises_the_bound():
    x, y = toy(60)
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF()))
    fixed = bdl.SparseGP(model, num_inducing=6, move_inducing=False).fit(x, y)
    moved = bdl.SparseGP(model, num_inducing=6).fit(x, y)
    rows = fixed.inducing_points
    assert bool((torch.cdist(rows, x).amin(-1) < 1e-9).all())
    assert float(torch.cdist(moved.inducing_points, x).amin(-1).max()) > 0.01
    assert moved.diagnostics["elbo"] > fixed.diagnostics["elbo"] + 0.1


def test_minibatches_come_near_the_collapsed_bound():
    x, y = toy(120)
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF()))
    collapsed = bdl.SparseGP(model, num_inducing=10).fit(x, y)
    stochastic = bdl.SparseGP(model, num_inducing=10, batch_size=40, num_steps=200, learning_rate=0.03).fit(x, y)
    assert collapsed.diagnostics["elbo"] - 3 < stochastic.diagnostics["elbo"] <= collapsed.diagnostics["elbo"] + 0.5
    x_new = toy(50, seed=3)[0]
    torch.testing.assert_close(stochastic.predict(x_new).mean, collapsed.predict(x_new).mean, rtol=0, atol=0.1)


def test_no_matrix_of_a_fit_grows_with_the_number_of_data(monkeypatch):
    """No covariance matrix of a fit of 4000 points has more entries than a tile may have."""
    sizes = []
    inner = bdl.kernels.RBF._covariance

    def watched(self, x, z, params):
        value = inner(self, x, z, params)
        sizes.append(value.numel())
        return value

    monkeypatch.setattr(bdl.kernels.RBF, "_covariance", watched)
    monkeypatch.setattr(_bounds, "_TILE", 6000)
    x, y = toy(4000)
    model = bdl.GP(bdl.kernels.RBF(lengthscale=0.7))
    with pytest.warns(ConvergenceWarning):
        bdl.SparseGP(model, num_inducing=20, optimize=False, num_steps=2).fit(x, y)
    assert max(sizes) <= 6000


def test_outputs_have_hyperparameters_and_inducing_points_of_their_own():
    x, y = toy(30)
    both = torch.stack([y, (5 * x[:, 1]).cos()], -1)
    engine = bdl.SparseGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF())), num_inducing=10, move_inducing=False)
    joint = engine.fit(x, both)
    assert joint.inducing_points.shape == (2, 10, 2)
    lengthscale = joint.hyperparameters["kernel.base.lengthscale"]
    assert float((lengthscale[0] - lengthscale[1]).abs().max()) > 0.05
    alone = engine.fit(x, y)
    torch.testing.assert_close(joint.predict(x).mean[:, 0], alone.predict(x).mean, rtol=1e-3, atol=1e-3)


def test_a_fit_that_stops_early_says_so():
    x, y = toy(60)
    with pytest.warns(ConvergenceWarning, match="had not converged"):
        bdl.SparseGP(bdl.GP(bdl.kernels.RBF()), num_inducing=5, num_steps=1).fit(x, y)
    model = bdl.GP(bdl.kernels.RBF(), likelihood=bdl.Bernoulli())
    with pytest.warns(ConvergenceWarning, match="still rose"):
        bdl.SparseGP(model, num_inducing=5, num_steps=80, learning_rate=0.01).fit(x, (y > 0).double())


def test_a_posterior_that_learned_nothing_says_so():
    """White noise in many dimensions: the noise takes everything and q(u) is the prior."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 3, generator=g).double(), torch.randn(80, generator=g).double()
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF(), outputscale=1e-9), mean="zero")
    with pytest.warns(ConvergenceWarning, match="stayed at the prior"):
        bdl.SparseGP(model, num_inducing=5, optimize=False).fit(x, y)


def test_settings_models_and_labels_are_checked_at_the_door():
    model = bdl.GP(bdl.kernels.RBF())
    for name in ("num_inducing", "num_steps", "num_samples", "batch_size"):
        with pytest.raises(SettingError, match=f"{name} must be an integer of at least 1"):
            bdl.SparseGP(model, **{name: 0})
    with pytest.raises(SettingError, match="natural_learning_rate must lie between"):
        bdl.SparseGP(model, natural_learning_rate=1.5)
    with pytest.raises(SettingError, match="learning_rate must be a finite number above"):
        bdl.SparseGP(model, learning_rate=0.0)
    with pytest.raises(SettingError, match=r"bdl\.HMC"):
        bdl.SparseGP(bdl.BNN())
    x = toy(10)[0]
    with pytest.raises(ShapeError, match="one target column"):
        bdl.SparseGP(bdl.GP(bdl.kernels.RBF(), likelihood=bdl.Categorical(3))).fit(x, torch.zeros(10, 2).double())


def test_the_bound_of_classes_falls_short_of_the_evidence_by_little():
    """Three points, two classes: the evidence by 60^3 Gauss-Hermite nodes; the bound is below, by less than 0.05."""
    x = torch.tensor([[-0.7, 0.2], [0.1, -0.4], [1.1, 0.8]], dtype=torch.float64)
    y = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    model = bdl.GP(KERNEL, mean="zero", likelihood=bdl.Bernoulli())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        engine = bdl.SparseGP(
            model, optimize=False, move_inducing=False, standardize=False, natural_learning_rate=0.5, num_steps=60
        )
        posterior = engine.fit(x, y)
    evidence, mean, success = _by_quadrature(KERNEL(x), y)
    assert evidence - 0.05 < posterior.diagnostics["elbo"] <= evidence + 1e-6
    latent = posterior.predict(x, noise=False)
    # the error of a Gaussian q, a few hundredths here; posterior standard deviations are near 1
    torch.testing.assert_close(latent.mean, mean, rtol=0, atol=0.06)
    torch.testing.assert_close(posterior.predict(x).probs, success, rtol=0, atol=0.01)


def _by_quadrature(k: torch.Tensor, y: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """log p(y), E[f | y] and E[sigmoid(f) | y] for three points, by a product rule in whitened coordinates."""
    node, weight = ops.gauss_hermite(60, k)
    grid = torch.cartesian_prod(node, node, node)
    mass = torch.cartesian_prod(weight, weight, weight).prod(-1)
    f = grid @ torch.linalg.cholesky(k).mT
    likelihood = torch.sigmoid((2 * y - 1) * f).prod(-1)
    evidence = (mass * likelihood).sum()
    posterior = (mass * likelihood / evidence).unsqueeze(-1)
    return math.log(float(evidence)), (posterior * f).sum(0), (posterior * torch.sigmoid(f)).sum(0)
