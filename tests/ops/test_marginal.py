"""The fused marginal likelihood: value by SciPy, gradients by autograd, tiles that change nothing, losses contained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from bayesdl import ops
from bayesdl.errors import ShapeError
from bayesdl.kernels import NNGP, RBF, Linear, Matern, Periodic, Scale

KERNELS = {
    "matern": Scale(Matern(nu=2.5)),
    "rough": Matern(nu=0.5),
    "sum": 0.6 * RBF() + Linear(),
    "product": Matern(nu=1.5) * Periodic(period=1.5),
    "nngp": NNGP(depth=2),
}


def _problem(kernel, batch=(), n=6, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=g, dtype=torch.float64)
    if n > 2:
        x[..., 2, :] = x[..., 0, :]
    params = {
        p.name: p.initial_tensor(x) * (0.5 * torch.randn((*batch, *p.shape), generator=g, dtype=torch.float64)).exp()
        for p in kernel.parameters(d)
    }
    residual = torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return x, params, residual, 0.02 + torch.rand(batch, generator=g, dtype=torch.float64)


def _reference(kernel, x, params, residual, noise):
    """Value and gradients by plain autograd through the kernel and a Cholesky factor."""
    params = {name: value.clone().requires_grad_() for name, value in params.items()}
    residual, noise = residual.clone().requires_grad_(), noise.clone().requires_grad_()
    a = kernel(x, None, params) + noise[..., None, None] * torch.eye(x.shape[-2], dtype=x.dtype)
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(residual), a, validate_args=False)
    value = normal.log_prob(residual)
    grads = torch.autograd.grad(value.sum(), [noise, residual, *params.values()])
    return value.detach(), grads[0], grads[1], dict(zip(params, grads[2:], strict=True))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("batch", "n"), [((), 6), ((3,), 6), ((2, 3), 5), ((), 1), ((4,), 2)])
def test_value_and_gradients_agree_with_autograd(name, batch, n):
    """Duplicate rows included; relative to the largest gradient of each kind, 1e-10."""
    kernel = KERNELS[name]
    problem = _problem(kernel, batch, n)
    result = ops.mll_and_grad(kernel.value_and_pullback, *problem)
    value, by_noise, by_residual, by_params = _reference(kernel, *problem)
    torch.testing.assert_close(result.value, value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result.noise_variance, by_noise, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.residual, by_residual, rtol=1e-10, atol=1e-10)
    assert result.params.keys() == by_params.keys()
    for key, grad in result.params.items():
        torch.testing.assert_close(grad, by_params[key], rtol=1e-10, atol=1e-10)
    assert result.failed.shape == result.jitter.shape == batch
    assert not result.failed.any()


def test_value_is_that_of_scipy():
    kernel = KERNELS["matern"]
    x, params, residual, noise = _problem(kernel, (2,), n=7)
    value = ops.mll_and_grad(kernel.value_and_pullback, x, params, residual, noise).value
    k = kernel(x, None, params) + noise[:, None, None] * torch.eye(7)
    for i in range(2):
        assert float(value[i]) == pytest.approx(multivariate_normal(cov=k[i].numpy()).logpdf(residual[i]), rel=1e-11)


@pytest.mark.parametrize("n", [6, 90])
def test_tiles_change_nothing(n):
    """Tiles of one, of two and of all seven problems, on both sides of the size at which the inverse changes method."""
    kernel = KERNELS["matern"]
    problem = _problem(kernel, (7,), n=n)
    whole = ops.mll_and_grad(kernel.value_and_pullback, *problem, tile_bytes=2**40)
    for count in (1, 2, 3):
        tiled = ops.mll_and_grad(kernel.value_and_pullback, *problem, tile_bytes=count * n * n * 8)
        for left, right in zip(_flat(whole), _flat(tiled), strict=True):
            torch.testing.assert_close(left.double(), right.double(), rtol=1e-11, atol=1e-11)


def _flat(result):
    return [result.value, result.noise_variance, result.residual, result.jitter, result.failed, *result.params.values()]


def test_batches_equal_loops_with_shared_and_own_inputs():
    kernel = KERNELS["matern"]
    x, params, residual, noise = _problem(kernel, (2, 3), n=5)
    for inputs in (x, x[0, 0]):
        result = ops.mll_and_grad(kernel.value_and_pullback, inputs, params, residual, noise)
        for i in np.ndindex(2, 3):
            own = {name: value[i] for name, value in params.items()}
            alone = ops.mll_and_grad(
                kernel.value_and_pullback, x[i] if inputs is x else inputs, own, residual[i], noise[i]
            )
            torch.testing.assert_close(result.value[i], alone.value, rtol=1e-12, atol=1e-12)
            for name, grad in alone.params.items():
                torch.testing.assert_close(result.params[name][i], grad, rtol=1e-11, atol=1e-11)


def test_an_empty_batch_gives_empty_results():
    kernel = KERNELS["matern"]
    result = ops.mll_and_grad(kernel.value_and_pullback, *_problem(kernel, (0,), n=4))
    assert result.value.shape == result.noise_variance.shape == (0,)
    assert result.residual.shape == (0, 4)
    assert result.params["base.lengthscale"].shape == (0, 2)


def test_one_lost_problem_does_not_touch_the_others():
    kernel = KERNELS["matern"]
    x, params, residual, noise = _problem(kernel, (3,), n=5)
    good = ops.mll_and_grad(kernel.value_and_pullback, x, params, residual, noise)
    params["base.lengthscale"][1, 0] = math.nan
    result = ops.mll_and_grad(kernel.value_and_pullback, x, params, residual, noise)
    assert result.failed.tolist() == [False, True, False]
    assert result.value[1] == -math.inf
    for grad in (result.noise_variance, result.residual, *result.params.values()):
        assert grad[1].eq(0).all()
    for left, right in zip(_flat(result), _flat(good), strict=True):
        torch.testing.assert_close(left[[0, 2]].double(), right[[0, 2]].double(), rtol=1e-12, atol=1e-12)


def test_jitter_is_recorded_and_used():
    """Twelve copies of one point without noise: the value is that of the matrix with the jitter that is reported."""
    kernel = RBF(lengthscale=1.0)
    x = torch.zeros(12, 1, dtype=torch.float64)
    residual, noise = torch.ones(12, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    params = {"lengthscale": torch.ones(1, dtype=torch.float64)}
    result = ops.mll_and_grad(kernel.value_and_pullback, x, params, residual, noise - 1e-9)
    assert 1e-9 < float(result.jitter) < 1e-7
    extra = result.jitter - 1e-9
    # One eigenvalue 12 + extra along the residual, eleven of size extra.
    expected = -0.5 * (12 / (12 + extra) + math.log(12 + extra) + 11 * math.log(extra) + 12 * math.log(2 * math.pi))
    assert float(result.value) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_autograd_form_differentiates_in_everything_but_x(batch):
    kernel = KERNELS["sum"]
    x, params, residual, noise = _problem(kernel, batch, n=4)
    names = list(params)
    leaves = [value.requires_grad_() for value in (residual, noise, *params.values())]

    def call(residual, noise, *values):
        named = dict(zip(names, values, strict=True))
        return ops.marginal_log_likelihood(kernel.value_and_pullback, x, named, residual, noise)

    assert torch.autograd.gradcheck(call, leaves, atol=1e-6)


def test_float32_stays_float32():
    kernel = KERNELS["matern"]
    x, params, residual, noise = _problem(kernel, (2,), n=5)
    params32 = {name: value.float() for name, value in params.items()}
    result = ops.mll_and_grad(kernel.value_and_pullback, x.float(), params32, residual.float(), noise.float())
    double = ops.mll_and_grad(kernel.value_and_pullback, x, params, residual, noise)
    assert result.value.dtype == result.params["outputscale"].dtype == torch.float32
    torch.testing.assert_close(result.value.double(), double.value, rtol=1e-3, atol=1e-3)


def _student_t(a, b, n):
    """h and h' of a Gaussian whose variance has an InverseGamma(a, b) scale; a, b of the whole flattened batch."""

    def energy(q, index):
        shape, rate = a.reshape(-1)[index], b.reshape(-1)[index]
        h = torch.lgamma(shape + n / 2) - torch.lgamma(shape) + shape * rate.log()
        return h - (shape + n / 2) * (rate + q / 2).log(), -(shape + n / 2) / (2 * rate + q)

    return energy


@pytest.mark.parametrize("name", ["matern", "nngp"])
@pytest.mark.parametrize(("batch", "tile"), [((), None), ((2, 3), None), ((2, 3), 2), ((2, 3), 1)])
def test_an_energy_makes_it_a_student_t_process(name, batch, tile):
    """Value and every gradient against autograd through a multivariate t, with a scale prior for each problem."""
    kernel, n = KERNELS[name], 6
    x, params, residual, noise = _problem(kernel, batch, n)
    g = torch.Generator().manual_seed(5)
    a, b = (0.7 + 3 * torch.rand(batch, generator=g, dtype=torch.float64) for _ in range(2))
    tile_bytes = None if tile is None else tile * n * n * 8
    energy = _student_t(a, b, n)
    result = ops.mll_and_grad(
        kernel.value_and_pullback, x, params, residual, noise, energy=energy, tile_bytes=tile_bytes
    )
    leaves = [value.clone().requires_grad_() for value in (noise, residual, *params.values())]
    k = kernel(x, None, dict(zip(params, leaves[2:], strict=True)))
    k = k + leaves[0][..., None, None] * torch.eye(n, dtype=x.dtype)
    # The marginal of r ~ N(0, s A), s ~ InverseGamma(a, b): with 2a degrees of freedom and scale matrix (b / a) A.
    root = torch.linalg.cholesky((b / a)[..., None, None] * k)
    z = torch.linalg.solve_triangular(root, leaves[1].unsqueeze(-1), upper=False).squeeze(-1)
    log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    nu = 2 * a
    value = torch.lgamma((nu + n) / 2) - torch.lgamma(nu / 2) - n / 2 * (nu * math.pi).log() - log_root
    value = value - (nu + n) / 2 * torch.log1p(z.square().sum(-1) / nu)
    grads = torch.autograd.grad(value.sum(), leaves)
    torch.testing.assert_close(result.value, value.detach(), rtol=1e-11, atol=1e-11)
    for ours, theirs in zip((result.noise_variance, result.residual, *result.params.values()), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    quadratic = (residual * torch.linalg.solve(k.detach(), residual.unsqueeze(-1)).squeeze(-1)).sum(-1)
    torch.testing.assert_close(result.quadratic, quadratic, rtol=1e-11, atol=1e-11)


def test_shapes_that_do_not_fit_are_refused():
    kernel = KERNELS["matern"]
    x, params, residual, noise = _problem(kernel, (3,), n=5)
    for bad in (
        (x, params, residual[:2], noise),
        (x[:, :4], params, residual, noise),
        (x, params, residual, noise[:2]),
        (x, {name: value[0] for name, value in params.items()}, residual, noise),
    ):
        with pytest.raises(ShapeError, match="mll_and_grad"):
            ops.mll_and_grad(kernel.value_and_pullback, *bad)
