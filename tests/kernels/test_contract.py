"""Every kernel obeys `check_kernel`, and `check_kernel` notices one that does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError
from bayesdl.hyper import Gamma, LogNormal, Parameter
from bayesdl.kernels import NNGP, RBF, Linear, Matern, Periodic, Product, RationalQuadratic, Scale, Sum
from bayesdl.kernels.base import Kernel, autograd_pullback
from bayesdl.testing._kernel import check_kernel

KERNELS = {
    "rbf": RBF(),
    "rbf, one lengthscale": RBF(ard=False, lengthscale=0.7),
    "rbf, two columns": RBF(active_dims=(2, 0), lengthscale=(0.5, 1.5)),
    "matern12": Matern(nu=0.5),
    "matern32": Matern(nu=1.5, lengthscale=0.8),
    "matern52": Matern(nu=2.5, ard=False),
    "rational quadratic": RationalQuadratic(alpha=0.6, lengthscale=1.3),
    "periodic": Periodic(period=2.5),
    "periodic, shared": Periodic(period=1.7, lengthscale=0.9, ard=False),
    "linear": Linear(variance=0.4),
    "linear, ard": Linear(variance=(0.3, 2.0), ard=True, active_dims=(0, 1)),
    "nngp relu": NNGP(depth=3, b_std=0.4),
    "nngp relu, shallow": NNGP(depth=1, w_std=1.1, active_dims=(1, 2)),
    "nngp erf": NNGP(depth=2, activation="erf"),
    "scale": Scale(RBF(lengthscale=1.1), outputscale=2.3),
    "sum": 0.7 * RBF(lengthscale=0.9) + Linear() + 1.3 * Matern(nu=1.5),
    "product": Matern(nu=1.5, active_dims=(0,)) * Periodic(active_dims=(1,)) * Linear(active_dims=(2,)),
    "nested": 0.5 * ((RBF(lengthscale=1.5) + Linear(variance=0.3)) * Matern(nu=2.5)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_obeys_the_contract(name):
    check_kernel(KERNELS[name], d=3, seed=3)


def test_a_kernel_of_one_column_obeys_the_contract():
    check_kernel(Scale(Matern(nu=2.5, lengthscale=0.6)), d=1, seed=1)


@dataclass(frozen=True)
class _Broken(Kernel):
    """An RBF kernel with one fault at a time."""

    fault: str

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        return RBF().parameters(d)

    def _covariance(self, x: Tensor, z: Tensor | None, params: dict[str, Tensor]) -> Tensor:
        k = RBF()._covariance(x, z, params)
        if self.fault == "indefinite":
            return 0.5 * (3.0 * k - 1.0)
        return k * (1.0 + x.sum(-1, keepdim=True)) if self.fault == "asymmetric" else k

    def _variance(self, x: Tensor, params: dict[str, Tensor]) -> Tensor:
        return RBF()._variance(x, params) * (1.001 if self.fault == "diagonal" else 1.0)

    def value_and_pullback(self, x, params=None):
        value, pullback = RBF().value_and_pullback(x, params)
        factor = 1.0 + 1e-6 * (self.fault == "pullback")
        return value, lambda p: {name: factor * grad for name, grad in pullback(p).items()}

    def _features(self, lead, num_features, d, params, generator):
        features = RBF()._features(lead, num_features, d, params, generator)
        return lambda x: features(x) * (1.2 if self.fault == "features" else 1.0)


@pytest.mark.parametrize("fault", ["indefinite", "asymmetric", "diagonal", "pullback", "features"])
def test_check_kernel_notices_a_fault(fault):
    with pytest.raises(AssertionError):
        check_kernel(_Broken(fault), seed=3)


def test_check_kernel_passes_without_a_fault():
    check_kernel(_Broken("none"), seed=3)


def test_names_of_composite_parameters_say_where_they_belong():
    kernel = 2.0 * RBF() + Linear() * Periodic(ard=False)
    names = [p.name for p in kernel.parameters(2)]
    assert names == ["0.outputscale", "0.base.lengthscale", "1.0.variance", "1.1.period", "1.1.lengthscale"]
    assert kernel.parameters(2)[0].initial == 2.0


def test_sums_and_products_lie_flat():
    a, b, c = RBF(), Linear(), Matern(nu=0.5)
    assert (a + b) + c == a + (b + c) == Sum((a, b, c))
    assert (a * b) * c == a * (b * c) == Product((a, b, c))
    assert a * 3 == 3 * a == Scale(a, outputscale=3.0)


@pytest.mark.parametrize("d", [1, 4, 25])
def test_default_lengthscales_grow_with_the_root_of_the_dimension(d):
    """Start sqrt(d), median exp(sqrt 2) sqrt(d); what counts are the columns that are looked at, not all columns."""
    (parameter,) = RBF().parameters(d)
    assert parameter.initial == pytest.approx(math.sqrt(d))
    assert parameter.prior == LogNormal(math.sqrt(2) + math.log(d) / 2, math.sqrt(3))
    assert parameter.prior.typical == pytest.approx(math.exp(math.sqrt(2)) * math.sqrt(d))
    assert RBF(active_dims=tuple(range(d))).parameters(d + 3) == (parameter,)


def test_an_explicit_lengthscale_moves_the_start_and_keeps_the_prior():
    (parameter,) = Matern(lengthscale=(0.2, 0.4)).parameters(2)
    assert parameter.initial == (0.2, 0.4)
    assert parameter.prior == RBF().parameters(2)[0].prior
    assert RBF(lengthscale_prior=None).parameters(2)[0].prior is None
    assert RBF(lengthscale_prior=Gamma(3.0, 6.0)).parameters(2)[0].prior == Gamma(3.0, 6.0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Matern(nu=2.0), "nu"),
        (lambda: RBF(lengthscale=-1.0), "lengthscale"),
        (lambda: RBF(lengthscale=(1.0, math.inf)), "lengthscale"),
        (lambda: RBF(lengthscale=(1.0, 2.0), ard=False), "ard=False"),
        (lambda: RBF(active_dims=(0, 0)), "active_dims"),
        (lambda: RBF(active_dims=()), "active_dims"),
        (lambda: RationalQuadratic(alpha=0.0), "alpha"),
        (lambda: Periodic(period=math.nan), "period"),
        (lambda: Linear(variance="big"), "variance"),
        (lambda: NNGP(depth=0), "depth"),
        (lambda: NNGP(activation="swish2"), "activation"),
        (lambda: NNGP(w_std=0.0), "w_std"),
        (lambda: Scale(RBF(), outputscale=0.0), "outputscale"),
        (lambda: Scale("rbf"), "kernel"),
        (lambda: Sum(()), "kernel"),
    ],
)
def test_bad_settings_are_refused_at_construction(make, word):
    with pytest.raises(SettingError, match=word):
        make()


def test_columns_that_do_not_fit_are_refused():
    x = torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises(ShapeError, match="active_dims"):
        RBF(active_dims=(2,))(x)
    with pytest.raises(ShapeError, match="one value for each of the 2 columns"):
        RBF(lengthscale=(1.0, 2.0, 3.0)).parameters(2)
    with pytest.raises(ShapeError, match="lengthscale must have shape"):
        RBF()(x, None, {"lengthscale": torch.ones(3, dtype=torch.float64)})


def test_second_derivatives_in_x_are_right():
    """The slopes are differentiable again: Matern-5/2 and RBF against finite differences of the gradient."""
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for kernel in (RBF(lengthscale=0.8), Matern(nu=2.5, lengthscale=0.7), NNGP(depth=2), Periodic(period=2.0)):
        weights = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x, k=kernel: k(x, z), x, weights, atol=1e-5)


def test_far_offsets_do_not_cost_digits():
    """At offset 1e6 the kernel of float64 inputs is that of the differences, to the rounding of the inputs."""
    x = torch.rand(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Offsets that are sums of powers of two and inputs on a grid: the shift itself is exact.
    x = (x * 2**20).round() / 2**20
    for kernel in (RBF(lengthscale=0.5), Matern(nu=0.5), Matern(nu=2.5), RationalQuadratic(), Periodic()):
        shifted = kernel(x + 2.0**20, x[:3] + 2.0**20)
        assert torch.allclose(shifted, kernel(x, x[:3]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rbf", "matern12", "matern32", "matern52", "rational quadratic", "periodic", "scale"])
def test_a_large_matrix_worked_on_in_blocks_of_rows_is_the_same(name, monkeypatch):
    """Blocks of 7 rows of 40, the last one shorter, against the whole at once; n = 40 is below the usual block."""
    from bayesdl.ops import distance

    kernel, g = KERNELS[name], torch.Generator().manual_seed(4)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    x[30] = x[2]
    p = torch.randn(40, 40, generator=g, dtype=torch.float64)
    p = p + p.mT
    whole, pull_whole = kernel.value_and_pullback(x)
    grads = pull_whole(p.clone())
    monkeypatch.setattr(distance, "_BLOCK_BYTES", 7 * 40 * 8)
    assert len(distance.row_blocks(x, 40, 40)) == 6
    value, pullback = kernel.value_and_pullback(x)
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-12)
    for key, grad in pullback(p.clone()).items():
        torch.testing.assert_close(grad, grads[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base", [RBF(), Matern(nu=0.5), Matern(nu=1.5), Matern(nu=2.5), RationalQuadratic(alpha=0.7)])
@pytest.mark.parametrize("shared", [False, True])
def test_an_outputscale_is_the_same_inside_the_kernels_pass_and_outside(base, shared):
    """Every stationary kernel takes its outputscale into its own pass; autograd through the product is the judge.

    Scales of 1e-3 and 40 for problems with lengthscales of their own, and for problems that share one lengthscale.
    """
    kernel, g = Scale(base), torch.Generator().manual_seed(8)
    x = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    params = {"outputscale": torch.tensor([1e-3, 40.0], dtype=torch.float64)}
    for parameter in base.parameters(3):
        lead = () if shared else (2,)
        noise = torch.randn((*lead, *parameter.shape), generator=g, dtype=torch.float64)
        params[f"base.{parameter.name}"] = (0.3 * noise).exp()
    p = torch.randn(2, 5, 5, generator=g, dtype=torch.float64)
    p = p + p.mT
    value, pullback = kernel.value_and_pullback(x, params)
    expected, reference = autograd_pullback(kernel, x, params)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-16)
    wanted = reference(p.clone())
    for key, grad in pullback(p.clone()).items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-10, atol=1e-12)
