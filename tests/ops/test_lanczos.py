"""The stochastic log-determinant against Cholesky, within the error that it reports itself."""

from __future__ import annotations

import pytest
import torch

from bayesdl import kernels as k
from bayesdl.errors import SettingError
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops import KernelOperator, kernel_operator, lanczos_log_det, pcg, preconditioner, random_pivots


def toy(n: int, noise: float = 0.02, d: int = 3) -> KernelOperator:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = k.Scale(k.Matern(nu=2.5, lengthscale=1.1), outputscale=1.8)
    tiles = tiles_of(kernel, {p.name: p.initial_tensor(x) for p in kernel.parameters(d)})
    return kernel_operator(tiles, x, torch.tensor(noise, dtype=torch.float64))


def exact(operator: KernelOperator) -> torch.Tensor:
    eye = torch.eye(operator.n, dtype=torch.float64)
    return operator(eye)


def test_solve_and_log_determinant_at_two_thousand_points():
    """Cholesky as judge: residual within the tolerance, log-determinant within three reported standard errors.

    With eight probes the error over its estimate is about t with seven degrees of freedom, beyond 3 in 2 % of seeds;
    the seed is fixed.
    """
    operator = toy(2000)
    a = exact(operator)
    g = torch.Generator().manual_seed(3)
    p = preconditioner(operator, random_pivots(operator, 200, g))
    b = torch.randn(2000, 2, generator=g, dtype=torch.float64)
    solved = pcg(operator, b, precondition=p.solve, tolerance=1e-6, coarse=operator.to(torch.float32))
    assert bool(solved.converged.all())
    assert float(((b - a @ solved.solution).norm(dim=0) / b.norm(dim=0)).max()) <= 1e-6
    found = lanczos_log_det(operator, p, p.sample(8, g))
    judge = 2 * torch.linalg.cholesky(a).diagonal().log().sum()
    assert 0 < float(found.std_error) < 0.01 * abs(float(judge))
    assert abs(float(found.value - judge)) <= 3 * float(found.std_error)
    assert found.steps <= 50


@pytest.mark.parametrize("rank", [0, 20, 45])
def test_the_estimate_is_unbiased_and_its_error_honest(rank):
    """The mean of 400 probes at four standard errors: about 1e-4 false alarms; the seed is fixed."""
    operator = toy(60)
    g = torch.Generator().manual_seed(1)
    p = preconditioner(operator, random_pivots(operator, rank, g))
    found = lanczos_log_det(operator, p, p.sample(400, g), tolerance=1e-8)
    judge = float(torch.logdet(exact(operator)))
    assert abs(float(found.value) - judge) <= 4 * float(found.std_error) + 1e-6
    assert float(found.std_error) > 0


def test_a_better_preconditioner_leaves_less_to_estimate():
    operator = toy(150)
    errors = []
    for rank in (0, 50, 120):
        g = torch.Generator().manual_seed(2)
        p = preconditioner(operator, random_pivots(operator, rank, g))
        errors.append(float(lanczos_log_det(operator, p, p.sample(32, g)).std_error))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


def test_an_exact_preconditioner_leaves_nothing():
    operator = toy(50)
    g = torch.Generator().manual_seed(0)
    p = preconditioner(operator, random_pivots(operator, 50, g))
    found = lanczos_log_det(operator, p, p.sample(4, g))
    assert float(found.value) == pytest.approx(float(torch.logdet(exact(operator))), rel=1e-9)
    assert float(found.std_error) < 1e-6


def test_probes_in_groups_are_probes_at_once():
    operator = toy(120)
    g = torch.Generator().manual_seed(4)
    p = preconditioner(operator, random_pivots(operator, 10, g))
    probes = p.sample(6, g)
    whole = lanczos_log_det(operator, p, probes, max_steps=15, tolerance=0.0)
    parts = lanczos_log_det(operator, p, probes, max_steps=15, tolerance=0.0, memory=2 * 2 * 120 * 15 * 8)
    torch.testing.assert_close(whole.value, parts.value, rtol=1e-10, atol=0)
    torch.testing.assert_close(whole.std_error, parts.std_error, rtol=1e-8, atol=0)


def test_one_probe_has_no_error_and_is_refused():
    operator = toy(20)
    p = preconditioner(operator, random_pivots(operator, 2, torch.Generator().manual_seed(0)))
    with pytest.raises(SettingError, match="two probes"):
        lanczos_log_det(operator, p, p.sample(1, torch.Generator().manual_seed(0)))
