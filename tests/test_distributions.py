"""Predictive distributions against SciPy, numerical integration and the global random state."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from bayesdl.distributions import Bernoulli, Categorical, Empirical, GaussianMixture, Normal, StudentT
from bayesdl.errors import SettingError, ShapeError


def toy_mixture(batch=(), m=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    loc = 2.5 * torch.randn(*batch, m, generator=g, dtype=torch.float64) + 0.7
    scale = 0.2 + 1.3 * torch.rand(*batch, m, generator=g, dtype=torch.float64)
    weights = 0.1 + torch.rand(*batch, m, generator=g, dtype=torch.float64)
    return GaussianMixture(loc.to(dtype), scale.to(dtype), weights.to(dtype))


EVERY = {
    "normal": lambda: Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])),
    "student": lambda: StudentT(torch.tensor([9.0, 12.5]), torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])),
    "mixture": lambda: toy_mixture((2,), dtype=torch.float32),
    "empirical": lambda: Empirical(torch.tensor([[0.3, 1.0, -2.0], [4.0, 2.0, 2.0]])),
    "bernoulli": lambda: Bernoulli(probs=torch.tensor([0.3, 0.9])),
    "categorical": lambda: Categorical(probs=torch.tensor([[0.3, 0.6, 0.1], [0.2, 0.2, 0.6]])),
}


@pytest.fixture(params=EVERY, ids=str)
def predictive(request):
    return EVERY[request.param]()


def test_every_predictive_keeps_the_contract(predictive):
    """Shapes of every member, for scalar and tensor levels and for drawn batches."""
    assert predictive.batch_shape == (2,)
    assert predictive.event_shape == ()
    assert predictive.mean.shape == predictive.variance.shape == predictive.stddev.shape == (2,)
    assert predictive.quantile(0.3).shape == (2,)
    assert predictive.quantile([[0.1, 0.5, 0.9]]).shape == (1, 3, 2)
    assert predictive.sample((5, 4), seed=1).shape == (5, 4, 2)
    assert predictive.sample((0,), seed=1).shape == (0, 2)
    assert predictive.cdf(predictive.sample((5,), seed=1)).shape == (5, 2)
    assert predictive.expand((3, 2)).batch_shape == (3, 2)
    assert bool(predictive.support.check(predictive.sample((7,), seed=2)).all())


def test_sampling_is_seeded_and_leaves_the_global_state_alone(predictive):
    """An int seed repeats, a generator advances, None differs, and torch's global stream does not move."""
    before = torch.random.get_rng_state()
    source = torch.Generator().manual_seed(3)
    first, second = predictive.sample((50,), seed=source), predictive.sample((50,), seed=source)
    assert not torch.equal(first, second)
    assert torch.equal(predictive.sample((50,), seed=5), predictive.sample((50,), seed=5))
    assert not torch.equal(predictive.sample((200,)), predictive.sample((200,)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_have_the_stated_moments(predictive):
    """Mean and variance of 40,000 draws within 5 standard errors (false alarm below 1e-5 over all cases)."""
    num = 40_000
    draws = predictive.sample((num,), seed=11).double()
    sd = predictive.stddev.double()
    assert bool(((draws.mean(0) - predictive.mean).abs() < 5 * sd / num**0.5).all())
    fourth = ((draws - draws.mean(0)) ** 4).mean(0)
    error = ((fourth - sd**4).clamp_min(0) / num).sqrt()
    assert bool(((draws.var(0) - sd**2).abs() <= 5 * error + 1e-6 * sd**2 + 2 * sd**2 / num).all())


def test_levels_outside_zero_and_one_are_refused(predictive):
    with pytest.raises(SettingError, match="q must lie in"):
        predictive.quantile(1.2)
    with pytest.raises(SettingError, match="q must lie in"):
        predictive.quantile(float("nan"))


def test_values_may_be_numpy_and_of_another_dtype():
    pred = EVERY["normal"]()
    want = stats.norm([0.3, -1.0], [0.5, 2.0]).logpdf([0.1, 0.4])
    assert pred.log_prob(np.array([0.1, 0.4])).numpy() == pytest.approx(want, rel=1e-6)
    assert pred.log_prob(np.array([0.1, 0.4])).dtype == torch.float32


def test_normal_agrees_with_scipy_far_into_the_tail():
    loc, scale, y = np.array([1.0, -3.0]), np.array([0.2, 7.0]), np.array([-3.0, -80.0])
    pred, judge = Normal(torch.tensor(loc), torch.tensor(scale)), stats.norm(loc, scale)
    assert pred.log_prob(y).numpy() == pytest.approx(judge.logpdf(y), rel=1e-12)
    assert pred.cdf(y).numpy() == pytest.approx(judge.cdf(y), rel=1e-9, abs=0)
    assert pred.quantile(1e-9).numpy() == pytest.approx(judge.ppf(1e-9), rel=1e-10)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_mixture_agrees_with_scipy(batch):
    """Density and cdf against the weighted sums of SciPy's normal; mean and variance by integration."""
    mixture = toy_mixture(batch, m=4, seed=3)
    y = torch.linspace(-4, 5, 7, dtype=torch.float64).reshape(-1, *(1,) * len(batch))
    for i in np.ndindex(*batch):
        loc, scale, weights = (t[i].numpy() for t in (mixture.loc, mixture.scale, mixture.weights))
        judge = stats.norm(loc, scale)

        def density(v, judge=judge, weights=weights):
            return float((weights * judge.pdf(v)).sum())

        grid = y.reshape(-1).numpy()
        assert mixture.log_prob(y)[(slice(None), *i)].numpy() == pytest.approx(
            np.log([density(v) for v in grid]), rel=1e-10
        )
        assert mixture.cdf(y)[(slice(None), *i)].numpy() == pytest.approx(
            (weights * judge.cdf(grid[:, None])).sum(1), rel=1e-10
        )
        mean = integrate.quad(lambda v: v * density(v), -15, 15, limit=200)[0]
        second = integrate.quad(lambda v, m=mean: (v - m) ** 2 * density(v), -15, 15, limit=200)[0]
        assert float(mixture.mean[i]) == pytest.approx(mean, rel=1e-7)
        assert float(mixture.variance[i]) == pytest.approx(second, rel=1e-7)


def test_mixture_of_one_component_is_a_normal():
    loc, scale = torch.tensor([[1.5], [-4.0]]).double(), torch.tensor([[0.3], [2.0]]).double()
    one, normal = GaussianMixture(loc, scale), Normal(loc[:, 0], scale[:, 0])
    q = torch.tensor([0.0, 1e-8, 0.2, 0.5, 0.99, 1.0]).double()
    assert torch.allclose(one.quantile(q), normal.quantile(q), rtol=1e-12)
    assert torch.allclose(one.log_prob([0.1, 0.2]), normal.log_prob([0.1, 0.2]), rtol=1e-13)


def test_quantile_inverts_the_cdf_between_distant_narrow_and_absent_components():
    """A flat cdf between modes, a width ratio of 5000, a component of weight 0 far away."""
    mixture = GaussianMixture(
        torch.tensor([[-1e3, 0.0, 1e3, 1e9], [0.0, 1e-3, 0.5, 7.0]]).double(),
        torch.tensor([[1e-3, 1.0, 5.0, 1.0], [0.1, 1e-6, 3.0, 1.0]]).double(),
        torch.tensor([1.0, 1.0, 1.0, 0.0]).double(),
    )
    q = torch.tensor([1e-12, 0.01, 0.1, 1 / 3, 0.34, 0.5, 0.6666, 0.9, 1 - 1e-9]).double()
    x = mixture.quantile(q)
    assert bool((x.diff(dim=0) >= 0).all())
    # x near 1e3 is known to 1e-13, through a density of up to 400: 1e-9 is what float64 allows.
    assert torch.allclose(mixture.cdf(x), q[:, None].expand(9, 2), rtol=1e-9, atol=1e-9)
    assert mixture.quantile([0.0, 1.0]).tolist() == [[-np.inf] * 2, [np.inf] * 2]


def test_blocks_of_rows_equal_the_whole(monkeypatch):
    mixture, y = toy_mixture((5,), m=7), torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(4, 5)
    whole = [mixture.log_prob(y), mixture.cdf(y), mixture.quantile(y.abs() / 4)]
    monkeypatch.setattr("bayesdl.distributions.mixture._CHUNK", 20)
    for a, b in zip(whole, [mixture.log_prob(y), mixture.cdf(y), mixture.quantile(y.abs() / 4)], strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_mixture_quantile_and_draws_have_exact_gradients():
    """Implicit derivatives of the quantile against finite differences; a draw keeps its cdf as parameters move."""
    base = toy_mixture((2,), m=3, seed=5)
    q = torch.tensor([0.1, 0.55], dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (base.loc, base.scale, base.weights, q)]
    assert torch.autograd.gradcheck(lambda a, b, c, level: GaussianMixture(a, b, c).quantile(level), inputs)
    loc, scale, weights = inputs[:3]
    draw = GaussianMixture(loc, scale, weights).rsample((6,), seed=1)
    with torch.no_grad():
        level = GaussianMixture(loc, scale, weights).cdf(draw)
    got = torch.autograd.grad(draw[4, 1], [loc, scale], retain_graph=True)
    want = torch.autograd.grad(GaussianMixture(loc, scale, weights).quantile(level[4, 1])[1], [loc, scale])
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-8)


def test_wrong_mixtures_are_refused_in_the_house_form():
    with pytest.raises(ShapeError, match=r"GaussianMixture: loc, scale and weights must broadcast"):
        GaussianMixture(torch.zeros(2, 3), torch.ones(2, 4))
    with pytest.raises(ShapeError, match="M at least 1"):
        GaussianMixture(torch.zeros(2, 0), torch.ones(2, 0))
    with pytest.raises(SettingError, match="at least 0"):
        GaussianMixture(torch.zeros(2), torch.ones(2), torch.tensor([1.5, -0.5]))
    with pytest.raises(SettingError, match="not all 0"):
        GaussianMixture(torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="GreaterThan"):
        GaussianMixture(torch.zeros(2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_empirical_agrees_with_numpy(batch):
    rng = np.random.default_rng(4)
    draws, y = rng.normal(size=(*batch, 9)).round(1), rng.normal(size=(4, *batch)).round(1)
    pred = Empirical(torch.tensor(draws))
    q = [0.0, 0.13, 0.5, 0.98, 1.0]
    assert pred.quantile(q).numpy() == pytest.approx(np.quantile(draws, q, axis=-1), rel=1e-12)
    assert pred.cdf(y).numpy() == pytest.approx((draws <= y[..., None]).mean(-1), rel=1e-12)
    assert pred.variance.numpy() == pytest.approx(draws.var(-1), rel=1e-12)
    with pytest.raises(NotImplementedError, match="no density"):
        pred.log_prob(y)
    assert Empirical(torch.tensor([2.0])).quantile([0.0, 0.4, 1.0]).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ShapeError, match="M at least 1"):
        Empirical(torch.zeros(3, 0))


def test_discrete_quantile_is_the_smallest_label_that_reaches_the_level():
    probs = np.array([[0.25, 0.5, 0.0, 0.25], [0.0, 0.0, 0.125, 0.875]])
    pred = Categorical(probs=torch.tensor(probs))
    q = [0.0, 0.25, 0.26, 0.75, 0.76, 1.0]
    want = [[np.argmax(p.cumsum() >= level) for p in probs] for level in q]
    assert pred.quantile(q).tolist() == want
    assert pred.cdf([1.0, 2.5]).tolist() == [0.75, 0.125]
    assert pred.mean.tolist() == pytest.approx((probs * np.arange(4)).sum(1))
    judge = stats.bernoulli([0.3, 0.9])
    binary = Bernoulli(probs=torch.tensor([0.3, 0.9]).double())
    for level in (0.05, 0.11, 0.69, 0.71, 1.0):
        assert binary.quantile(level).numpy() == pytest.approx(judge.ppf(level))
    for value in (-0.5, 0.0, 0.5, 1.0):
        assert binary.cdf(value).numpy() == pytest.approx(judge.cdf(value))
    assert binary.log_prob([1, 0]).numpy() == pytest.approx(judge.logpmf([1, 0]))


def test_logits_and_probs_say_the_same():
    logits = torch.tensor([[0.3, -2.0, 1.0]])
    a, b = Categorical(logits=logits), Categorical(probs=logits.softmax(-1))
    assert torch.allclose(a.log_prob([2]), b.log_prob([2]))
    assert torch.equal(a.sample((20,), seed=3), b.sample((20,), seed=3))
    assert torch.allclose(Bernoulli(logits=logits).mean, Bernoulli(probs=logits.sigmoid()).mean)


@pytest.mark.parametrize("dof", [0.3, 1.0, 1.7, 2.0, 3.5, 28.0, 599.0, 601.0, 9004.0, 1e7])
def test_student_agrees_with_scipy(dof):
    """Density, cdf and quantile from the centre into the far tails, where heavy tails reach 1e30."""
    loc, scale = -1.5, 2.7
    pred = StudentT(*torch.tensor([dof, loc, scale], dtype=torch.float64))
    judge = stats.t(dof, loc, scale)
    z = np.concatenate([-np.logspace(-6, 1.5, 40), [0.0], np.logspace(-6, 3, 40)])
    y = loc + scale * z
    assert pred.log_prob(y).numpy() == pytest.approx(judge.logpdf(y), rel=1e-9)
    # SciPy itself is good to about 1e-11 deep in the tails
    assert pred.cdf(y).numpy() == pytest.approx(judge.cdf(y), rel=1e-9, abs=1e-40)
    q = np.array([1e-12, 1e-5, 0.01, 0.2, 0.499999, 0.5, 0.500001, 0.8, 0.999])
    got = ((pred.quantile(q) - loc) / scale).numpy()
    assert got == pytest.approx(stats.t(dof).ppf(q), rel=1e-8, abs=1e-15)
    assert pred.cdf(pred.quantile(q)).numpy() == pytest.approx(q, rel=1e-9)
    assert pred.quantile([0.0, 1.0]).tolist() == [-np.inf, np.inf]
    assert float(pred.entropy()) == pytest.approx(float(judge.entropy()), rel=1e-7)


def test_student_moments_exist_only_where_they_do():
    dof = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 40.0])
    pred = StudentT(dof, 3.0, 2.0)
    assert pred.mean.isnan().tolist() == [True, True, False, False, False, False]
    assert pred.variance.tolist() == pytest.approx([np.inf] * 4 + [20.0, 4 * 40 / 38])
    assert bool(torch.isfinite(pred.mode).all())
    with pytest.raises(ValueError, match="GreaterThan"):
        StudentT(torch.tensor([1.0, 0.0]), 0.0, 1.0)


def test_student_gradients_reach_value_and_parameters():
    """log_prob by gradcheck; cdf and quantile in value, loc and scale; draws in dof, loc and scale."""
    dof = torch.tensor([2.5, 31.0, 900.0], dtype=torch.float64)
    loc = torch.tensor([0.2, -1.0, 4.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.7, 2.0, 1.1], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, -4.0, 3.0], dtype=torch.float64, requires_grad=True)
    free = dof.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda d, a, b, v: StudentT(d, a, b).log_prob(v), [free, loc, scale, y])
    assert torch.autograd.gradcheck(lambda a, b, v: StudentT(dof, a, b).cdf(v), [loc, scale, y])
    assert torch.autograd.gradcheck(lambda a, b: StudentT(dof, a, b).quantile([0.1, 0.8]), [loc, scale])
    draws = StudentT(free, loc, scale).rsample((3,), seed=1)
    by_dof, by_loc = torch.autograd.grad(draws.sum(), [free, loc])
    assert by_loc.tolist() == [3.0] * 3
    assert bool((by_dof != 0).all())


def test_draws_of_a_heavy_tailed_student_follow_its_cdf():
    """Kolmogorov-Smirnov over 20,000 draws at dof 1.5, where there is no variance to compare: p above 1e-4."""
    pred = StudentT(*torch.tensor([1.5, 2.0, 0.3], dtype=torch.float64))
    draws = pred.sample((20_000,), seed=4).numpy()
    assert stats.kstest(draws, stats.t(1.5, 2.0, 0.3).cdf).pvalue > 1e-4
