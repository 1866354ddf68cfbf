"""Distances between predictives: closed forms, sorted draws, and the axioms of a metric."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from bayesdl import evaluation as ev
from bayesdl.distributions import Bernoulli, Categorical, Empirical, GaussianMixture, Normal
from bayesdl.errors import ShapeError
from bayesdl.evaluation.agreement import quantile_profile, wasserstein2_of_profiles


def test_wasserstein2_of_normals_has_its_closed_form():
    p, q = (
        Normal(torch.zeros(1).double(), torch.ones(1).double()),
        Normal(torch.ones(1).double(), torch.full((1,), 2.0)),
    )
    assert float(ev.wasserstein2(p, q)) == pytest.approx(2**0.5, rel=1e-12)


def test_quadrature_agrees_with_the_closed_form():
    """Mixtures of one component are Normals; what lies beyond five sd is all that is lost."""
    p = GaussianMixture(torch.tensor([[0.3], [2.0]]).double(), torch.tensor([[1.5], [0.1]]).double())
    q = GaussianMixture(torch.tensor([[0.1], [-2.0]]).double(), torch.tensor([[0.2], [4.0]]).double())
    want = torch.hypot(p.loc - q.loc, p.scale - q.scale)[:, 0]
    assert torch.allclose(ev.wasserstein2(p, q), want, rtol=2e-5)
    assert torch.allclose(ev.wasserstein2(p, Normal(q.loc[:, 0], q.scale[:, 0])), want, rtol=2e-5)


def test_wasserstein2_of_mixtures_agrees_with_sorted_draws():
    """200,000 draws of each, sorted and paired; the sampling error of the judge is below 1 %."""
    p = GaussianMixture(torch.tensor([[-1.0, 0.5]]).double(), torch.tensor([[0.5, 1.0]]).double())
    q = GaussianMixture(torch.tensor([[0.0, 3.0, 1.0]]).double(), torch.tensor([[0.9, 1.0, 0.7]]).double())
    a, b = (d.sample((200_000,), seed=i)[:, 0].sort().values for i, d in enumerate((p, q)))
    want = float((a - b).square().mean().sqrt())
    assert float(ev.wasserstein2(p, q)) == pytest.approx(want, rel=0.01)


def test_wasserstein2_is_a_metric_and_moves_with_the_units():
    g = torch.Generator().manual_seed(0)
    a, b, c = (Empirical(torch.randn(4, 50, generator=g, dtype=torch.float64) + i) for i in range(3))
    assert float(ev.wasserstein2(a, a).abs().max()) == 0
    assert torch.equal(ev.wasserstein2(a, b), ev.wasserstein2(b, a))
    assert bool((ev.wasserstein2(a, c) <= ev.wasserstein2(a, b) + ev.wasserstein2(b, c)).all())
    scaled = ev.wasserstein2(Empirical(7 * a.draws + 3), Empirical(7 * b.draws + 3))
    assert torch.allclose(scaled, 7 * ev.wasserstein2(a, b))
    assert torch.allclose(ev.wasserstein2(a, Empirical(a.draws + 2.5)), torch.full((4,), 2.5).double())
    assert torch.equal(wasserstein2_of_profiles(quantile_profile(a), quantile_profile(b)), ev.wasserstein2(a, b))


def test_total_variation_by_hand():
    p, q = Bernoulli(probs=torch.tensor([0.9, 0.5])), Bernoulli(probs=torch.tensor([0.2, 0.5]))
    assert ev.total_variation(p, q).tolist() == pytest.approx([0.7, 0.0])
    p = Categorical(probs=torch.tensor([[0.5, 0.3, 0.2]]))
    q = Categorical(probs=torch.tensor([[0.1, 0.3, 0.6]]))
    assert ev.total_variation(p, q).tolist() == pytest.approx([0.4])


def test_total_variation_of_equal_scales_has_its_closed_form():
    """Normals a distance d apart with scale s: 2 Phi(d / 2s) - 1, whatever the units."""
    for unit in (1.0, 1e4):
        p = Normal(unit * torch.tensor([0.0, 3.0, -2.0]).double(), torch.full((3,), 0.7 * unit).double())
        q = Normal(unit * torch.tensor([0.0, 2.1, 5.0]).double(), torch.full((3,), 0.7 * unit).double())
        want = 2 * torch.special.ndtr((p.loc - q.loc).abs() / (2 * 0.7 * unit)) - 1
        assert torch.allclose(ev.total_variation(p, q), want, atol=1e-5)


def test_total_variation_of_mixtures_agrees_with_a_fine_sum():
    """Against a Riemann sum of scipy's normal densities."""
    loc, scale = torch.tensor([[-3.0, 0.5, 2.0]]).double(), torch.tensor([[0.2, 1.5, 0.4]]).double()
    p, q = GaussianMixture(loc, scale), Normal(torch.tensor([0.3]).double(), torch.tensor([2.0]).double())
    y = np.linspace(-20, 20, 400_001)
    mixture = sum(norm.pdf(y, m, s) for m, s in zip(loc[0].tolist(), scale[0].tolist(), strict=True)) / 3
    want = 0.5 * np.abs(mixture - norm.pdf(y, 0.3, 2.0)).sum() * (y[1] - y[0])
    assert float(ev.total_variation(p, q)) == pytest.approx(want, abs=2e-4)
    assert float(ev.total_variation(p, q, num_nodes=8000)) == pytest.approx(want, abs=2e-6)
    assert float(ev.total_variation(p, p)) == 0


def test_different_points_are_refused():
    with pytest.raises(ShapeError, match="predict at the same inputs"):
        ev.wasserstein2(Normal(torch.zeros(3), torch.ones(3)), Normal(torch.zeros(1), torch.ones(1)))
