"""Distances between predictives: closed forms, sorted draws, and the axioms of a metric."""

import pytest
import torch

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


def test_different_points_are_refused():
    with pytest.raises(ShapeError, match="predict at the same inputs"):
        ev.wasserstein2(Normal(torch.zeros(3), torch.ones(3)), Normal(torch.zeros(1), torch.ones(1)))
