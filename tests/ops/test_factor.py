"""Cholesky with jitter: only where needed, recorded, differentiable, and never an exception for bad numbers."""

from __future__ import annotations

import pytest
import torch

from bayesdl import ops
from bayesdl.errors import ShapeError


def _spd(*batch: int, n: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    root = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return root @ root.mT + 0.5 * torch.eye(n, dtype=dtype)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_positive_definite_matrices_get_no_jitter(batch):
    a = _spd(*batch)
    result = ops.cholesky(a)
    torch.testing.assert_close(result.factor @ result.factor.mT, a, rtol=1e-12, atol=1e-12)
    assert result.jitter.shape == result.failed.shape == batch
    assert not result.failed.any()
    assert torch.equal(result.jitter, torch.zeros(batch, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "first"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_only_the_singular_element_gets_jitter(dtype, first):
    """A matrix of rank 1 with a slightly negative eigenvalue needs jitter relative to its own mean diagonal."""
    a = _spd(3, dtype=dtype)
    v = torch.arange(1.0, 6.0, dtype=dtype)
    a[1] = torch.outer(v, v)
    a[1] -= 30 * first * a[1].diagonal().mean() * torch.eye(5, dtype=dtype)
    result = ops.cholesky(a)
    assert not result.failed.any()
    assert torch.equal(result.factor[0], torch.linalg.cholesky(a[0]))
    assert torch.equal(result.factor[2], torch.linalg.cholesky(a[2]))
    assert result.jitter[0] == result.jitter[2] == 0
    ratio = float(result.jitter[1] / a[1].diagonal().mean())
    assert ratio == pytest.approx(100 * first, rel=1e-4)
    expected = a[1] + result.jitter[1] * torch.eye(5, dtype=dtype)
    torch.testing.assert_close(result.factor[1] @ result.factor[1].mT, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hopeless_elements_are_marked_and_the_others_kept(bad):
    a = _spd(4)
    a[0, 3, 1] = a[0, 1, 3] = bad
    a[2] = -torch.eye(5, dtype=torch.float64)
    result = ops.cholesky(a)
    assert result.failed.tolist() == [True, False, True, False]
    assert result.jitter.isnan().tolist() == [True, False, True, False]
    assert result.factor[[0, 2]].isnan().all()
    assert torch.equal(result.factor[1], torch.linalg.cholesky(a[1]))


def test_fewer_tries_give_up_sooner():
    a = torch.diag(torch.tensor([1.0, 1.0, -1e-7], dtype=torch.float64))
    assert ops.cholesky(a, max_tries=2).failed
    assert not ops.cholesky(a).failed
    assert 1e-7 < float(ops.cholesky(a).jitter) < 1e-6


def test_the_factor_is_differentiable_with_and_without_jitter():
    """Jitter counts as a constant: the gradient is that of the factor of a + jitter I."""
    root = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: ops.cholesky(r @ r.mT + torch.eye(3)).factor, root)
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    a = torch.stack([torch.outer(v, v) - 1e-9 * torch.eye(3), _spd(n=3)]).requires_grad_()
    result = ops.cholesky(a)
    assert result.jitter[0] > 0
    (grad,) = torch.autograd.grad(result.factor.square().sum(), a)
    b = (a.detach() + result.jitter[:, None, None] * torch.eye(3)).requires_grad_()
    (expected,) = torch.autograd.grad(torch.linalg.cholesky(b).square().sum(), b)
    torch.testing.assert_close(grad, expected)


def test_other_shapes_are_refused():
    with pytest.raises(ShapeError, match="n, n"):
        ops.cholesky(torch.zeros(3, 2))


def test_gradients_pass_a_matrix_that_needed_jitter():
    """Two equal rows: the first factorisation fails, and its backward must not reach the gradient, not even times 0."""
    a = _spd(3)
    a[1] = torch.eye(5, dtype=torch.float64)
    a[1, :3, :3] = torch.tensor([[2.0, 0.6, 0.6], [0.6, 1.5, 1.5], [0.6, 1.5, 1.5]], dtype=torch.float64)
    a.requires_grad_()
    result = ops.cholesky(a)
    assert float(result.jitter[1]) > 0
    # the diagonal of L L' is that of A, whatever the jitter: its gradient is the identity
    total = (result.factor @ result.factor.mT).diagonal(dim1=-2, dim2=-1).sum()
    (slope,) = torch.autograd.grad(total, a)
    eye = torch.eye(5, dtype=torch.float64).expand(3, 5, 5)
    torch.testing.assert_close(slope, eye, rtol=1e-4, atol=1e-4)
