"""Squared distances: right at any offset, exactly 0 where rows coincide, differentiable everywhere."""

from __future__ import annotations

import pytest
import torch

from bayesdl import ops
from bayesdl.errors import ShapeError
from bayesdl.kernels import RBF, Matern


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_float32_distances_survive_an_offset(offset):
    """Inputs on a grid that float32 represents exactly at the offset: the distances must be those without it."""
    x = torch.arange(8, dtype=torch.float32).reshape(4, 2) / 4
    expected = torch.cdist(x.double(), x.double()).square()
    torch.testing.assert_close(ops.sqdist(x + offset).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.sqdist(x + offset, x[:2] + offset).double(), expected[:, :2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_distances_are_sums_of_squares(batch):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(*batch, 5, 3, generator=g, dtype=torch.float64)
    z = torch.randn(4, 3, generator=g, dtype=torch.float64)
    expected = (x.unsqueeze(-2) - z).square().sum(-1)
    torch.testing.assert_close(ops.sqdist(x, z), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.sqdist(z, x), expected.mT, rtol=1e-12, atol=1e-12)
    own = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
    torch.testing.assert_close(ops.sqdist(x), own, rtol=1e-12, atol=1e-12)
    assert torch.equal(ops.sqdist(x).diagonal(dim1=-2, dim2=-1), torch.zeros(*batch, 5, dtype=torch.float64))


def test_coincident_rows_are_at_distance_zero_wherever_they_stand():
    """On the diagonal, off it, and in a copy; rows a millionth apart are told apart."""
    x = torch.tensor([[0.1, 0.7], [0.3, 0.2], [0.1, 0.7], [0.1, 0.7 + 1e-6]], dtype=torch.float64)
    d2 = ops.sqdist(x)
    assert d2[0, 2] == d2[2, 0] == 0
    assert float(d2[0, 3]) == pytest.approx(1e-12, rel=1e-3)
    assert ops.sqdist(x, x.clone()).diagonal().eq(0).all()


def test_distances_are_differentiable_at_coincident_rows():
    """The sum of all distances has the gradient 4 sum_j (x_i - x_j)."""
    x = torch.tensor([[0.1, 0.7], [0.3, 0.2], [0.1, 0.7]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.sqdist(x).sum(), x)
    torch.testing.assert_close(grad, 4 * (3 * x - x.sum(0)).detach(), rtol=1e-12, atol=1e-12)


def test_second_derivatives_do_not_vanish_where_rows_coincide():
    """d2 |x - z|^2 / dx dx' = 2 I and d2 / dx dz' = -2 I at any x, also at x = z; by forward mode over reverse too."""
    z = torch.tensor([[0.1, 0.7], [0.3, 0.2]], dtype=torch.float64)

    def total(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return ops.sqdist(x, z)[0, 0]

    eye = torch.eye(2, dtype=torch.float64)
    (xx, xz), _ = torch.autograd.functional.hessian(total, (z[:1].clone(), z))
    torch.testing.assert_close(xx[0, :, 0], 2 * eye)
    torch.testing.assert_close(xz[0, :, 0], -2 * eye)
    torch.testing.assert_close(torch.func.hessian(total)(z[:1].clone(), z)[0, :, 0], 2 * eye)
    own = torch.autograd.functional.hessian(lambda x: ops.sqdist(x)[0, 1], torch.cat([z[:1], z[:1]]))
    torch.testing.assert_close(own[0, :, 1], -2 * eye)


@pytest.mark.parametrize(
    "kernel", [RBF(lengthscale=0.4), Matern(nu=2.5, lengthscale=0.4), Matern(nu=1.5, lengthscale=0.4)]
)
def test_kernels_bend_at_the_data(kernel):
    """The Hessian of k(x, z) at x = z: -c / lengthscale^2 I, with c = 1, 5/3 and 3."""
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    found = torch.autograd.functional.hessian(lambda at: kernel(at, x).sum(), x.clone())
    curvature = {"RBF": 1.0, 2.5: 5 / 3, 1.5: 3.0}[getattr(kernel, "nu", "RBF")]
    want = -curvature / 0.4**2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found[0, :, 0], want, rtol=1e-9, atol=1e-9)


def test_different_numbers_of_columns_are_refused():
    with pytest.raises(ShapeError, match="agree in d"):
        ops.sqdist(torch.zeros(3, 2), torch.zeros(3, 1))
