"""Inducing-point algebra: the collapsed bound, greedy pivots, KLs and quadrature over an inverse gamma."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.linalg.lapack import dpstrf
from scipy.stats import invgamma, multivariate_normal

from bayesdl import ops


def random_sums(seed: int = 0, n: int = 30, m: int = 6, batch: tuple[int, ...] = (3,)) -> tuple:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(*batch, m, n, generator=g, dtype=torch.float64)
    r = torch.randn(*batch, n, generator=g, dtype=torch.float64)
    variance = a.square().sum(-2) + torch.rand(*batch, n, generator=g, dtype=torch.float64)
    sums = ops.InducingSums(a @ a.mT, (a @ r.unsqueeze(-1)).squeeze(-1), r.square().sum(-1), variance.sum(-1))
    return a, r, variance, sums


def test_the_collapsed_bound_is_titsias_formula_with_scipy_as_judge():
    a, r, variance, sums = random_sums()
    noise = torch.tensor([0.03, 0.7, 4.1], dtype=torch.float64)
    bound = ops.collapsed_bound(sums, noise, 30)
    for i in range(3):
        q = (a[i].mT @ a[i]).numpy()
        log_density = multivariate_normal(np.zeros(30), q + float(noise[i]) * np.eye(30)).logpdf(r[i].numpy())
        expected = log_density - float((variance[i].sum() - np.trace(q)) / (2 * noise[i]))
        assert float(bound.value[i]) == pytest.approx(expected, rel=1e-10)


def test_the_optimal_q_is_the_conjugate_posterior_of_the_whitened_values():
    a, r, _, sums = random_sums(seed=1)
    noise = torch.tensor([0.03, 0.7, 4.1], dtype=torch.float64)
    bound = ops.collapsed_bound(sums, noise, 30)
    for i in range(3):
        precision = np.eye(6) + (a[i] @ a[i].mT).numpy() / float(noise[i])
        covariance = np.linalg.inv(precision)
        np.testing.assert_allclose((bound.root[i].mT @ bound.root[i]).numpy(), covariance, rtol=1e-8, atol=1e-12)
        mean = covariance @ (a[i] @ r[i]).numpy() / float(noise[i])
        np.testing.assert_allclose(bound.mean[i].numpy(), mean, rtol=1e-8)


def test_gradients_of_the_collapsed_bound_agree_with_finite_differences():
    _, _, _, sums = random_sums(seed=2, batch=())
    noise = torch.tensor(0.37, dtype=torch.float64)
    bound = ops.collapsed_bound(sums, noise, 30)
    g = torch.Generator().manual_seed(3)
    step = torch.randn(6, 6, generator=g, dtype=torch.float64)
    step = step + step.mT
    vector = torch.randn(6, generator=g, dtype=torch.float64)
    h = 1e-5

    def change(gram=0.0, projected=0.0, square=0.0, trace=0.0, s=0.0) -> float:
        values = [
            ops.collapsed_bound(
                ops.InducingSums(
                    sums.gram + sign * h * gram,
                    sums.projected + sign * h * projected,
                    sums.square + sign * h * square,
                    sums.trace + sign * h * trace,
                ),
                noise + sign * h * s,
                30,
            ).value
            for sign in (1, -1)
        ]
        return float(values[0] - values[1]) / (2 * h)

    assert float((bound.by_gram * step).sum()) == pytest.approx(change(gram=step), rel=1e-6)
    assert float((bound.by_projected * vector).sum()) == pytest.approx(change(projected=vector), rel=1e-6)
    assert float(bound.by_noise) == pytest.approx(change(s=1.0), rel=1e-6)
    assert change(square=1.0) == pytest.approx(-0.5 / 0.37, rel=1e-6)
    assert change(trace=1.0) == pytest.approx(-0.5 / 0.37, rel=1e-6)


def test_greedy_pivots_are_those_of_lapacks_pivoted_cholesky():
    g = torch.Generator().manual_seed(4)
    root = torch.randn(2, 12, 12, generator=g, dtype=torch.float64)
    k = root @ root.mT
    everyone = torch.arange(2)
    pivots, useful = ops.greedy_pivots(lambda i: k[everyone, i], k.diagonal(dim1=-2, dim2=-1), 7)
    assert bool(useful.all())
    for i in range(2):
        _, order, _, _ = dpstrf(k[i].numpy(), lower=1)
        assert pivots[i].tolist() == (order[:7] - 1).tolist()


def test_greedy_pivots_tell_where_the_rank_ends_and_choose_no_point_twice():
    g = torch.Generator().manual_seed(5)
    root = torch.randn(10, 3, generator=g, dtype=torch.float64)
    k = (root @ root.mT).unsqueeze(0)
    pivots, useful = ops.greedy_pivots(lambda i: k[0, i], k.diagonal(dim1=-2, dim2=-1), 10)
    assert useful.sum() == 3
    assert sorted(pivots[0].tolist()) == list(range(10))


def test_the_kl_of_inverse_gammas_has_its_reference_value_and_scipy_agrees():
    a, b = torch.tensor([2.7, 0.6, 31.0], dtype=torch.float64), torch.tensor([1.9, 0.2, 12.0], dtype=torch.float64)
    kl = ops.inverse_gamma_kl(a, b, 2.0, 3.0)
    assert float(kl[0]) == pytest.approx(0.7725687543841, rel=1e-12)  # computed with 25 digits
    for i in range(3):
        q, p = invgamma(float(a[i]), scale=float(b[i])), invgamma(2.0, scale=3.0)

        def integrand(u, q=q, p=p):
            c = np.exp(u)
            return q.pdf(c) * c * (q.logpdf(c) - p.logpdf(c))

        judge = quad(integrand, -9, 30)
        assert float(kl[i]) == pytest.approx(judge[0], rel=1e-5)


@pytest.mark.parametrize("a", [0.8, 2.0, 7.5, 140.0])
def test_nodes_of_an_inverse_gamma_integrate_smooth_functions(a):
    """E[g(c)] and its gradient in (a, b), for bounded g such as a likelihood is; SciPy's quadrature as judge."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(3.1, dtype=torch.float64)

    def expectation(a: torch.Tensor, b: torch.Tensor, num: int) -> torch.Tensor:
        c, weight = ops.inverse_gamma_nodes(a, b, num)
        return (weight / (1 + c.sqrt())).sum()

    def judge(a: float, b: float) -> float:
        density = invgamma(a, scale=b)
        return quad(lambda u: density.pdf(np.exp(u)) * np.exp(u) / (1 + np.exp(u / 2)), -8, 60, limit=400)[0]

    for num in (16, 24):
        assert float(expectation(a, b, num)) == pytest.approx(judge(float(a), 3.1), rel=1e-6)
    slopes = torch.autograd.functional.jacobian(lambda a, b: expectation(a, b, 24), (a, b))
    h = 1e-4
    by_a = (judge(float(a) + h, 3.1) - judge(float(a) - h, 3.1)) / (2 * h)
    by_b = (judge(float(a), 3.1 + h) - judge(float(a), 3.1 - h)) / (2 * h)
    assert float(slopes[0]) == pytest.approx(by_a, rel=1e-3, abs=1e-7)
    assert float(slopes[1]) == pytest.approx(by_b, rel=1e-3, abs=1e-7)


def test_the_kl_of_whitened_values_is_that_of_two_normals():
    g = torch.Generator().manual_seed(6)
    mean = torch.randn(2, 4, generator=g, dtype=torch.float64)
    root = torch.randn(2, 4, 4, generator=g, dtype=torch.float64).tril()
    kl = ops.standard_normal_kl(mean, root)
    for i in range(2):
        q = torch.distributions.MultivariateNormal(mean[i], root[i].mT @ root[i])
        p = torch.distributions.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
        assert float(kl[i]) == pytest.approx(float(torch.distributions.kl_divergence(q, p)), rel=1e-10)


def test_kl_in_expectation_over_a_scale_agrees_with_draws():
    """E_c KL( N(mean, c S) || N(0, c I) ), c ~ IG(a, b): 1/c is Gamma, whose mean a / b enters."""
    g = torch.Generator().manual_seed(7)
    mean, root = torch.randn(5, generator=g, dtype=torch.float64), torch.eye(5, dtype=torch.float64) * 0.4
    scales = invgamma(3.0, scale=1.7).rvs(20_000, random_state=0)
    each = [0.5 * (float(root.square().sum()) - 10 * np.log(0.4) - 5 + float(mean.square().sum()) / c) for c in scales]
    value = float(ops.standard_normal_kl(mean, root, 3.0 / 1.7))
    assert abs(value - np.mean(each)) < 5 * np.std(each) / len(each) ** 0.5  # one false alarm in 2e6; seed fixed
