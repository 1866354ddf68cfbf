"""Conjugate gradients: a dense solve as judge, each column on its own, nothing unconverged in silence."""

from __future__ import annotations

import pytest
import torch

from bayesdl import kernels as k
from bayesdl.errors import ShapeError
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops import kernel_operator, pcg, preconditioner, random_pivots


def matrix(*batch: int, n: int = 40, condition: float = 1e4, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(*batch, n, n, generator=g, dtype=torch.float64))
    return (q * torch.logspace(0, torch.tensor(condition).log10(), n, dtype=torch.float64)) @ q.mT


def columns(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_solutions_are_those_of_a_dense_solve(batch):
    a, b = matrix(*batch), columns(*batch, 40, 3)
    found = pcg(lambda v: a @ v, b, tolerance=1e-11)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.solution, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.remainder, b - a @ found.solution, rtol=0, atol=1e-12)
    reported = (b - a @ found.solution).norm(dim=-2) / b.norm(dim=-2)
    assert bool((found.residual <= 1e-11).all())
    torch.testing.assert_close(found.residual, reported, rtol=0.5, atol=1e-14)


def test_every_column_stops_on_its_own_and_leaves_the_products():
    """An eigenvector needs one step, a sum of three needs three, zero needs none."""
    a = matrix(n=60, condition=300)
    vectors = torch.linalg.eigh(a).eigenvectors
    b = torch.stack([vectors[:, 5], vectors[:, [0, 20, 50]].sum(-1), torch.zeros(60).double(), columns(60)], -1)
    widths = []

    def product(v: torch.Tensor) -> torch.Tensor:
        widths.append(v.shape[-1])
        return a @ v

    found = pcg(product, b, tolerance=1e-9)
    assert found.iterations[:3].tolist() == [1, 3, 0]
    assert int(found.iterations[3]) > 15
    assert widths[0] == 3
    assert widths[1:4] == [2, 2, 1]
    assert bool((found.solution[:, 2] == 0).all())
    assert float(found.residual[2]) == 0
    assert len(widths) == found.products


def test_an_unconverged_column_is_marked_and_its_true_residual_reported():
    a, b = matrix(condition=1e8), columns(40, 2)
    found = pcg(lambda v: a @ v, b, tolerance=1e-10, max_iterations=5)
    assert not bool(found.converged.any())
    assert found.iterations.tolist() == [5, 5]
    true = (b - a @ found.solution).norm(dim=0) / b.norm(dim=0)
    torch.testing.assert_close(found.residual, true, rtol=1e-6, atol=0)
    assert bool((true > 1e-10).all())


def test_an_indefinite_matrix_ends_in_a_report_and_not_in_nan():
    a = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    found = pcg(lambda v: a @ v, torch.tensor([[0.1], [1.0], [0.1]], dtype=torch.float64), tolerance=1e-8)
    assert not bool(found.converged.any())
    assert bool(torch.isfinite(found.solution).all())


def test_a_start_near_the_solution_saves_steps():
    a, b = matrix(), columns(40, 2)
    exact = torch.linalg.solve(a, b)
    cold = pcg(lambda v: a @ v, b, tolerance=1e-8)
    warm = pcg(lambda v: a @ v, b, tolerance=1e-8, start=exact * (1 + 1e-7))
    done = pcg(lambda v: a @ v, b, tolerance=1e-8, start=exact)
    assert int(warm.iterations.max()) < 0.7 * int(cold.iterations.max())
    assert done.iterations.tolist() == [0, 0]
    assert done.products == 1


def test_products_in_float32_are_refined_to_a_true_float64_residual():
    a, b = matrix(condition=1e4), columns(40, 3)
    a32 = a.float()
    coarse = pcg(lambda v: a @ v, b, tolerance=1e-12, coarse=lambda v: (a32 @ v.float()).double())
    alone = pcg(lambda v: (a32 @ v.float()).double(), b, tolerance=1e-12)
    true = (b - a @ alone.solution).norm(dim=0) / b.norm(dim=0)
    assert bool(coarse.converged.all())
    assert float(((b - a @ coarse.solution).norm(dim=0) / b.norm(dim=0)).max()) <= 1e-12
    assert float(true.min()) > 1e-9  # what float32 alone can do


def test_a_coarse_product_that_gains_nothing_gives_way_to_the_exact_one():
    a, b = matrix(condition=100), columns(40, 2)
    found = pcg(lambda v: a @ v, b, tolerance=1e-10, coarse=lambda v: 50 * v)
    assert bool(found.converged.all())


def test_a_preconditioner_saves_steps_and_at_full_rank_leaves_one():
    x = columns(200, 3, seed=2)
    kernel = k.Scale(k.RBF(lengthscale=0.8), outputscale=2.5)
    tiles = tiles_of(kernel, {p.name: p.initial_tensor(x) for p in kernel.parameters(3)})
    operator = kernel_operator(tiles, x, torch.tensor(1e-3, dtype=torch.float64))
    b = columns(200, 2)
    plain = int(pcg(operator, b, tolerance=1e-8).iterations.max())
    steps = []
    for rank in (30, 100, 200):
        p = preconditioner(operator, random_pivots(operator, rank, torch.Generator().manual_seed(0)))
        steps.append(int(pcg(operator, b, tolerance=1e-8, precondition=p.solve).iterations.max()))
    assert plain > steps[0] > steps[1] > steps[2]
    assert steps[2] == 1


def test_wrong_shapes_are_refused():
    with pytest.raises(ShapeError, match="b and start"):
        pcg(lambda v: v, columns(5))
    with pytest.raises(ShapeError, match="b and start"):
        pcg(lambda v: v, columns(5, 2), start=columns(5, 1))
