"""Randomly pivoted Cholesky and what is made of it: dense algebra as judge, the pivots' law by simulation."""

from __future__ import annotations

import pytest
import torch

from bayesdl import kernels as k
from bayesdl.errors import SettingError
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops import KernelOperator, kernel_operator, preconditioner, random_pivots
from bayesdl.ops.preconditioner import _accept


def toy(n: int = 150, noise: float = 0.02, lengthscale: float = 0.9, seed: int = 0) -> KernelOperator:
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel = k.Scale(k.Matern(nu=1.5, lengthscale=lengthscale), outputscale=1.8)
    tiles = tiles_of(kernel, {p.name: p.initial_tensor(x) for p in kernel.parameters(2)})
    return kernel_operator(tiles, x, torch.tensor(noise, dtype=torch.float64))


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(operator: KernelOperator) -> torch.Tensor:
    return operator.kernel(torch.eye(operator.n, dtype=torch.float64))


@pytest.mark.parametrize("noise", [0.5, 1e-2, 1e-6])
@pytest.mark.parametrize("rank", [0, 7, 90])
def test_it_solves_and_has_the_determinant_of_the_matrix_that_it_stands_for(rank, noise):
    operator = toy(noise=noise)
    p = preconditioner(operator, random_pivots(operator, rank, stream()))
    assert p.rank == rank
    factor = p.basis @ p.triangle
    columns = dense(operator)[:, p.pivots.index]
    nystrom = columns @ torch.linalg.solve(columns[p.pivots.index], columns.mT) if rank else torch.zeros(150, 150)
    torch.testing.assert_close(factor @ factor.mT, nystrom.double(), rtol=0, atol=1e-8)
    matrix = nystrom + noise * torch.eye(150, dtype=torch.float64)
    v = torch.randn(150, 3, generator=stream(1), dtype=torch.float64)
    # the judge's own solve with nearly coincident columns is what limits the accuracy
    torch.testing.assert_close(matrix @ p.solve(v), v, rtol=0, atol=1e-13 / noise + 1e-9)
    assert float(p.log_det) == pytest.approx(float(torch.logdet(matrix)), rel=1e-9)


def test_at_full_rank_it_is_the_matrix_itself():
    operator = toy(n=60)
    p = preconditioner(operator, random_pivots(operator, 500, stream()))
    a = dense(operator) + 0.02 * torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(p.solve(a), torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(p.log_det) == pytest.approx(float(torch.logdet(a)), rel=1e-11)


def test_it_stops_where_the_matrix_is_explained():
    """Forty rows of which ten differ have rank ten; a constant input has rank one."""
    x = torch.randn(10, 2, generator=stream(), dtype=torch.float64).repeat(4, 1)
    kernel = k.RBF(lengthscale=0.5)
    tiles = tiles_of(kernel, {p.name: p.initial_tensor(x) for p in kernel.parameters(2)})
    for inputs, rank in ((x, 10), (torch.ones(40, 2, dtype=torch.float64), 1)):
        operator = kernel_operator(tiles, inputs, torch.tensor(1e-3, dtype=torch.float64))
        found = random_pivots(operator, 40, stream())
        assert found.index.numel() == rank
        assert int(found.blocks.sum()) == rank


def test_draws_have_its_covariance():
    """Covariances of 40 000 draws at five standard errors: 45 entries, about 3e-5 false alarms; the seed is fixed."""
    operator = toy(n=9, noise=0.3)
    p = preconditioner(operator, random_pivots(operator, 4, stream()))
    factor = p.basis @ p.triangle
    matrix = factor @ factor.mT + 0.3 * torch.eye(9, dtype=torch.float64)
    z = p.sample(40_000, stream(2))
    empirical = z @ z.mT / 40_000
    bound = 5 * ((matrix.square() + torch.outer(matrix.diagonal(), matrix.diagonal())) / 40_000).sqrt()
    assert bool(((empirical - matrix).abs() <= bound).all())


def test_the_same_pivots_give_a_nearby_preconditioner_at_nearby_hyperparameters():
    first, second = toy(lengthscale=0.9), toy(lengthscale=0.9001)
    pivots = random_pivots(first, 40, stream())
    a, b = preconditioner(first, pivots), preconditioner(second, pivots)
    assert torch.equal(a.pivots.index, b.pivots.index)
    drawn = a.sample(3, stream(5)), b.sample(3, stream(5))
    assert 0 < float((drawn[0] - drawn[1]).abs().max()) < 0.01


def test_rejection_keeps_the_law_of_the_pivots():
    """The second pivot of a block, given the first, is drawn in proportion to the diagonal that is left.

    4 000 blocks of three by three; frequencies of the three possible pairs after a first pivot, at 4.5 standard
    errors: three comparisons, about 2e-5 false alarms; the seed is fixed.
    """
    a = torch.tensor([[2.0, 1.2, 0.3], [1.2, 1.0, 0.1], [0.3, 0.1, 0.5]], dtype=torch.float64)
    left = a - torch.outer(a[:, 0], a[:, 0]) / a[0, 0]
    law = left.diagonal().clamp_min(0) / left.diagonal().sum()
    g, counts = stream(), torch.zeros(3, dtype=torch.float64)
    for _ in range(4_000):
        # proposals from the diagonal until a second pivot is taken; the first proposal is always accepted
        proposed = torch.multinomial(a.diagonal(), 12, replacement=True, generator=g)
        proposed[0] = 0
        level = torch.rand(12, generator=g, dtype=torch.float64)
        kept = _accept(a[proposed][:, proposed], level, 2)
        if kept.numel() == 2:
            counts[proposed[kept[1]]] += 1
    total = counts.sum()
    error = (law * (1 - law) / total).sqrt()
    assert counts[0] == 0
    assert bool(((counts / total - law).abs() <= 4.5 * error + 1e-12).all())


def test_a_negative_rank_is_refused():
    with pytest.raises(SettingError, match="rank must be at least 0"):
        random_pivots(toy(n=5), -1, stream())
