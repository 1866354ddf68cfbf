"""Priors on the variance scale against SciPy: density, draws, what is learned, storage."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import bayesdl as bdl
from bayesdl import _records
from bayesdl._doors import _resolve
from bayesdl.errors import SettingError, StorageError
from bayesdl.priors import BurrXII, Exponential, HalfCauchy, HyperScale, InverseGamma, UserScale
from bayesdl.priors.scale import scale_prior

CASES = [
    (InverseGamma(1.3, 2.7), stats.invgamma(1.3, scale=2.7)),
    (BurrXII(0.7, 2.4), stats.burr12(0.7, 2.4)),
    (BurrXII(3.0, 1.5), stats.burr12(3.0, 1.5)),
    (HalfCauchy(0.4), stats.halfcauchy(scale=0.4)),
    (Exponential(2.5), stats.expon(scale=0.4)),
    (HyperScale(bdl.priors.LogNormal(0.3, 0.6)), stats.lognorm(0.6, scale=math.exp(0.3))),
    (HyperScale(bdl.priors.Gamma(2.5, 0.7)), stats.gamma(2.5, scale=1 / 0.7)),
]


@pytest.mark.parametrize(("prior", "judge"), CASES, ids=lambda c: str(c)[:30])
def test_density_and_draws_agree_with_scipy(prior, judge):
    """Density from 1e-6 to 1e6; 20,000 draws by Kolmogorov-Smirnov, p above 1e-4 (false alarms 7e-4 over all cases)."""
    v = np.logspace(-6, 6, 25)
    assert prior.log_prob(torch.tensor(v)).numpy() == pytest.approx(judge.logpdf(v), rel=1e-9, abs=1e-9)
    draws = prior.sample((20_000,), torch.Generator().manual_seed(3))
    assert draws.dtype == torch.float64
    assert stats.kstest(draws.numpy(), judge.cdf).pvalue > 1e-4


def test_learned_shapes_move_the_density_and_leave_its_stretch_alone():
    """The inverse gamma keeps beta / alpha; values are passed in by batch, and fixed priors learn nothing."""
    prior = InverseGamma(2.0, 3.0, learn=True)
    assert [p.name for p in prior.parameters()] == ["concentration"]
    a = torch.tensor([0.7, 5.0], dtype=torch.float64)
    v = torch.tensor([[0.2, 1.0, 7.0]], dtype=torch.float64)
    got = prior.log_prob(v, {"concentration": a[:, None]})
    for i, value in enumerate(a.tolist()):
        assert got[i].numpy() == pytest.approx(stats.invgamma(value, scale=1.5 * value).logpdf(v[0].numpy()), rel=1e-10)
    assert [p.name for p in BurrXII(learn=True).parameters()] == ["c", "d"]
    burr = BurrXII(learn=True).log_prob(v[0], {"c": torch.tensor(1.2).double(), "d": torch.tensor(0.9).double()})
    assert burr.numpy() == pytest.approx(stats.burr12(1.2, 0.9).logpdf(v[0].numpy()), rel=1e-6)
    shape = BurrXII(1.7, learn=True).parameters()[0]
    assert shape.initial == 1.7
    assert shape.prior.typical == pytest.approx(1.7)
    for fixed in (InverseGamma(), BurrXII(), HalfCauchy(), Exponential(), UserScale(lambda v: -v)):
        assert fixed.parameters() == ()


def test_draws_follow_learned_shapes():
    g = torch.Generator().manual_seed(1)
    shapes = {"concentration": torch.tensor([[3.0], [30.0]], dtype=torch.float64)}
    draws = InverseGamma(2.0, 3.0, learn=True).sample((2, 20_000), g, shapes)
    for row, a in zip(draws.numpy(), (3.0, 30.0), strict=True):
        assert stats.kstest(row, stats.invgamma(a, scale=1.5 * a).cdf).pvalue > 1e-4


@pytest.mark.parametrize("prior", [case[0] for case in CASES], ids=str)
def test_the_density_is_differentiable_twice(prior):
    v = torch.tensor([0.03, 0.9, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prior.log_prob, [v])
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(prior.log_prob, [v], [direction])


def test_what_a_user_passes_becomes_a_prior_on_v():
    assert scale_prior("E", HalfCauchy(2.0)) == HalfCauchy(2.0)
    assert scale_prior("E", bdl.priors.LogNormal(0.1, 0.2)) == HyperScale(bdl.priors.LogNormal(0.1, 0.2))
    own = scale_prior("E", lambda v: -2 * v)
    assert own.log_prob(torch.tensor([1.5])).tolist() == [-3.0]
    with pytest.raises(SettingError, match="no draws"):
        own.sample((3,), torch.Generator())
    for wrong in (3.0, "inverse gamma", InverseGamma):
        with pytest.raises(SettingError, match="log density"):
            scale_prior("E", wrong)
    with pytest.raises(SettingError, match="concentration must be"):
        InverseGamma(0.0, 1.0)
    with pytest.raises(SettingError, match="d must be"):
        BurrXII(1.0, math.inf)
    with pytest.raises(SettingError, match="log_density must be callable"):
        UserScale(1.0)


@pytest.mark.parametrize("prior", [case[0] for case in CASES], ids=str)
def test_priors_survive_a_file(prior):
    assert _records.decode(_records.encode(prior), _resolve) == prior


def test_a_density_of_ones_own_cannot_be_saved():
    with pytest.raises(StorageError, match="settings of bayesdl's own classes"):
        _records.encode(UserScale(lambda v: -v))
