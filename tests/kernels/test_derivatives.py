"""Derivatives of kernels: against finite differences, gpytorch and each other; refusal where there are none."""

from __future__ import annotations

import gpytorch
import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import SettingError, ShapeError
from bayesdl.interop.gpytorch import from_gpytorch
from bayesdl.kernels.derivatives import Observed, check_differentiable, derivatives

F64 = torch.float64
K = bdl.kernels


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def params_of(kernel, batch=(), seed=5):
    """Away from the defaults, for three columns."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for p in kernel.parameters(3):
        start = p.unconstrained(p.initial_tensor(torch.empty(0, dtype=F64)))
        values[p.name] = p.constrained(start + 0.4 * torch.randn((*batch, *p.shape), generator=g, dtype=F64))
    return values


def differences(kernel, x, z, params, h):
    """All of `Derivatives` by central differences of the kernel itself."""
    d = x.shape[-1]
    e = h * torch.eye(d, dtype=F64)

    def k(a, b):
        return kernel(a, b, params)

    by_x = torch.stack([(k(x + e[i], z) - k(x - e[i], z)) / (2 * h) for i in range(d)], -1)
    by_z = torch.stack([(k(x, z + e[i]) - k(x, z - e[i])) / (2 * h) for i in range(d)], -1)
    rows = []
    for i in range(d):
        corners = [
            k(x + e[i], z + e[j]) - k(x + e[i], z - e[j]) - k(x - e[i], z + e[j]) + k(x - e[i], z - e[j])
            for j in range(d)
        ]
        rows.append(torch.stack(corners, -1) / (4 * h * h))
    return k(x, z), by_x, by_z, torch.stack(rows, -2)


KERNELS = {
    "RBF": (K.RBF(lengthscale=(0.4, 1.3, 2.7)), 1e-6),
    "RBF, shared lengthscale": (K.RBF(ard=False, lengthscale=0.7), 1e-6),
    "Matern 5/2": (K.Matern(nu=2.5, lengthscale=(0.4, 1.3, 2.7)), 1e-6),
    # the third derivative of Matern 3/2 jumps at coincident rows, where differences are off by O(h)
    "Matern 3/2": (K.Matern(nu=1.5, lengthscale=(0.4, 1.3, 2.7)), 2e-3),
    "rational quadratic": (K.RationalQuadratic(alpha=0.6, lengthscale=0.8), 1e-6),
    "periodic": (K.Periodic(period=(1.7, 2.4, 3.1), lengthscale=0.9), 1e-6),
    "periodic, shared": (K.Periodic(period=1.7, ard=False), 1e-6),
    "linear": (K.Linear(ard=True, variance=(0.3, 1.4, 2.0)), 1e-6),
    "scaled, some columns": (K.Scale(K.RBF(active_dims=(2, 0), lengthscale=(0.5, 2.0)), 2.3), 1e-6),
    "sum of products": (K.RBF() + K.Linear() * K.Matern(nu=2.5, active_dims=(1,)) * K.Periodic(), 1e-6),
    "bounded": (K.Bounded(K.Scale(K.RBF(lengthscale=0.6)), fixed="base.lengthscale"), 1e-6),
    "NNGP, erf": (K.NNGP(depth=2, activation="erf"), 1e-6),
    "NNGP, tanh": (K.NNGP(depth=1, activation="tanh"), 1e-5),
    "NNGP, relu": (K.NNGP(depth=2, activation="relu"), 1e-3),
    "NTK, erf": (K.NTK(depth=1, activation="erf"), 1e-6),
}


@pytest.mark.parametrize("name", KERNELS)
def test_derivatives_are_those_of_finite_differences(name):
    """At rows that coincide too, where a slope's variance stands."""
    kernel, tolerance = KERNELS[name]
    x, z, params = points(0, 4, 3), points(1, 4, 3), params_of(kernel)
    x[3], z[2] = x[1], x[0]
    told = derivatives(kernel, x, z, params)
    for ours, theirs in zip(told, differences(kernel, x, z, params, 1e-4), strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())
    check_differentiable(kernel, x, params)


@pytest.mark.parametrize("name", KERNELS)
def test_batches_of_parameters_are_loops_and_gradients_are_finite(name):
    kernel, _ = KERNELS[name]
    x, params = points(0, 2, 3, 3, 3), params_of(kernel, (2, 3))
    x[..., 2, :] = x[..., 0, :]
    whole = derivatives(kernel, x, x, params)
    own = derivatives(kernel, x[1, 2], x[1, 2], {name: value[1, 2] for name, value in params.items()})
    shared = derivatives(kernel, x[1, 2], x[1, 2], params)
    for part, single, spread in zip(whole, own, shared, strict=True):
        assert torch.allclose(part[1, 2], single, rtol=1e-10, atol=1e-12)
        assert torch.allclose(spread.expand(2, 3, *single.shape)[1, 2], single, rtol=1e-10, atol=1e-12)
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    x.requires_grad_()
    total = sum(part.square().sum() for part in derivatives(kernel, x, x.detach(), leaves))
    for grad in torch.autograd.grad(total, [x, *leaves.values()], allow_unused=True):
        assert grad is None or bool(grad.isfinite().all())


@pytest.mark.parametrize("name", ["RBF", "Matern 5/2", "periodic", "sum of products", "NNGP, erf"])
def test_gradients_in_inputs_and_parameters_are_right(name):
    kernel, _ = KERNELS[name]
    x, z, params = points(2, 2, 3), points(3, 2, 3), params_of(kernel)
    names = list(params)

    def parts(x, z, *values):
        return tuple(derivatives(kernel, x, z, dict(zip(names, values, strict=True))))

    leaves = [t.clone().requires_grad_() for t in (x, z, *params.values())]
    assert torch.autograd.gradcheck(parts, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_the_joint_covariance_of_values_and_slopes_is_a_covariance(name):
    kernel, _ = KERNELS[name]
    x, params = points(4, 4, 3), params_of(kernel)
    k = Observed.of(x, torch.ones(4, 3, dtype=torch.bool)).covariance(kernel, params)
    assert torch.allclose(k, k.mT, rtol=1e-9, atol=1e-11)
    assert float(torch.linalg.eigvalsh(k)[0]) >= -1e-8 * float(k.diagonal().max())


@pytest.mark.parametrize(("ours", "theirs"), [("RBF", "RBFKernelGrad"), ("Matern 5/2", "Matern52KernelGrad")])
def test_the_joint_covariance_is_that_of_gpytorch(ours, theirs):
    """Theirs goes row by row: value, then slopes."""
    kernel = KERNELS[ours][0]
    x, z = points(6, 5, 3), points(7, 4, 3)
    params = {"lengthscale": torch.tensor([0.4, 1.3, 2.7], dtype=F64)}
    peer = getattr(gpytorch.kernels, theirs)(ard_num_dims=3).double()
    peer.lengthscale = params["lengthscale"]
    expected = peer(x, z).to_dense()
    seen, there = (Observed(t, torch.arange(4 * len(t))) for t in (x, z))
    assert torch.allclose(seen.covariance(kernel, params, there), expected, rtol=1e-8, atol=1e-10)
    values = seen.with_values(kernel, z, params)
    assert torch.allclose(values, expected[:, 0::4], rtol=1e-8, atol=1e-10)
    slopes = seen.with_slopes(kernel, z, params)
    assert torch.allclose(slopes, expected.unflatten(-1, (4, 4))[..., 1:], rtol=1e-8, atol=1e-10)


def test_what_is_seen_is_picked_from_the_whole():
    x, kernel = points(8, 5, 2), K.RBF(lengthscale=0.7)
    slopes = torch.zeros(5, 2, dtype=torch.bool)
    slopes[1, 0] = slopes[3, 1] = slopes[3, 0] = True
    seen, whole = Observed.of(x, slopes), Observed(x, torch.arange(15))
    assert seen.places.tolist() == [0, 3, 6, 9, 12, 4, 10, 11]
    assert seen.is_value.tolist() == [True] * 5 + [False] * 3
    params = kernel._initial(2, x)
    k = whole.covariance(kernel, params)[seen.places][:, seen.places]
    assert torch.allclose(seen.covariance(kernel, params), k, rtol=1e-12)
    quantities = points(9, 2, 5, 3)
    assert torch.equal(seen.pick(quantities), quantities.flatten(-2)[:, seen.places])


REFUSED = {
    "Matern 1/2": K.Matern(nu=0.5),
    "a part of a sum": K.RBF() + K.Scale(K.Matern(nu=0.5)),
    "NTK of a kinked network": K.NTK(depth=2, activation="relu"),
    "NNGP of steps": K.NNGP(depth=1, activation="step"),
    "gpytorch's Matern, whose autograd stops at coincident rows": from_gpytorch(
        gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=3).double(), native=False
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_functions_without_slopes_are_refused(name):
    with pytest.raises(SettingError, match="whose functions have slopes") as caught:
        check_differentiable(REFUSED[name], points(0, 4, 3))
    assert "fix" in str(caught.value)


def test_a_smooth_kernel_of_gpytorch_is_differentiated_by_autograd():
    kernel = from_gpytorch(gpytorch.kernels.PolynomialKernel(power=2, offset=1.0).double(), native=False)
    x, z = points(0, 3, 3), points(1, 3, 3)
    check_differentiable(kernel, x)
    expected = differences(kernel, x, z, None, 1e-4)
    for ours, theirs in zip(derivatives(kernel, x, z), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_shapes_are_checked_at_the_door():
    with pytest.raises(ShapeError):
        derivatives(K.RBF(), points(0, 4, 3), points(0, 4, 2))
