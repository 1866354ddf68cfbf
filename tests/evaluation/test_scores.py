"""Scores against published closed-form values, SciPy's quadrature and their defining identities."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Distribution, constraints

from bayesdl import evaluation as ev
from bayesdl.distributions import Bernoulli, Categorical, Empirical, GaussianMixture, Normal, StudentT
from bayesdl.errors import DataError, SettingError, ShapeError


def normal(loc, scale):
    return Normal(torch.tensor([loc]).double(), torch.tensor([scale]).double())


class Judged(Distribution):
    """Any SciPy distribution as a predictive with cdf and quantile only."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, frozen):
        self.frozen = frozen
        super().__init__(torch.Size([1]), validate_args=False)

    @property
    def mean(self):
        return torch.tensor([float(self.frozen.mean())]).double()

    def cdf(self, value):
        return torch.as_tensor(self.frozen.cdf(value.numpy()))

    def quantile(self, q):
        return torch.as_tensor(self.frozen.ppf(np.asarray(q)))[..., None]


def crps_by_quadrature(cdf, y, low, high):
    left = integrate.quad(lambda v: cdf(v) ** 2, low, y, limit=400, epsabs=1e-13)[0]
    return left + integrate.quad(lambda v: (1 - cdf(v)) ** 2, y, high, limit=400, epsabs=1e-13)[0]


@pytest.mark.parametrize(
    ("loc", "scale", "y", "want"),
    [(0.0, 1.0, 0.0, 0.2336949773), (0.0, 1.0, 1.0, 0.6024413576), (1.0, 2.0, 0.0, 0.6628070625)],
)
def test_crps_of_a_normal_has_its_closed_form(loc, scale, y, want):
    assert float(ev.crps(normal(loc, scale), [y])) == pytest.approx(want, abs=5e-11)


@pytest.mark.parametrize(
    ("frozen", "want"),
    [
        (stats.t(5), 0.4345755556),
        (stats.laplace(), 0.4465853038),
        (stats.logistic(), 0.5063720978),
        (stats.norm(0.7, 1e-3), 1e-3 * 0.2336949773),
    ],
    ids=["t5", "laplace", "logistic", "narrow normal"],
)
def test_crps_of_anything_with_cdf_and_quantile(frozen, want):
    """Heavy tails cost accuracy: 1e-7 in probability is cut off on each side."""
    assert float(ev.crps(Judged(frozen), [0.7])) == pytest.approx(want, rel=2e-6)


def student(dof, loc, scale):
    return StudentT(*(torch.tensor([v], dtype=torch.float64) for v in (dof, loc, scale)))


@pytest.mark.parametrize("y", [-8.0, 0.7, 0.9, 40.0])
@pytest.mark.parametrize("dof", [0.8, 1.0 - 2e-5, 1.0, 1.0 + 4e-5, 1.7, 5.0, 98.0, 102.0, 3e6])
def test_crps_of_a_student_t_is_the_integral(dof, y):
    """SciPy's quadrature, the tails in a logarithmic variable; near dof = 1 the closed form has a removable pole."""
    loc, scale = 0.7, 0.3
    judge, z = stats.t(dof), (y - loc) / scale

    def tail(start):  # int of P(T > v)^2 above `start` > 0
        return integrate.quad(lambda s: judge.sf(np.exp(s)) ** 2 * np.exp(s), np.log(start), 80, limit=800)[0]

    def upper(start):
        near = integrate.quad(lambda v: judge.sf(v) ** 2, start, 3.0, limit=400, epsabs=1e-13)[0] if start < 3 else 0.0
        return near + tail(max(start, 3.0))

    want = scale * (upper(z) + upper(-z))
    assert float(ev.crps(student(dof, loc, scale), [y])) == pytest.approx(want, rel=1e-8)


def test_crps_of_a_student_t_has_gradients_and_is_infinite_without_enough_degrees_of_freedom():
    loc, scale = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.7, 0.3))
    dof = torch.tensor([4.2], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, s: ev.crps(StudentT(dof, m, s), [1.9]), (loc, scale))
    assert float(ev.crps(student(0.5, 0.0, 1.0), [0.3])) == float("inf")
    one = StudentT(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([2.0]))
    assert ev.crps(one, [0.3]).dtype == torch.float32


def test_crps_by_quadrature_holds_far_outside_the_predictive():
    """For y beyond all mass the score is y - mean - E|X - X'|/2."""
    assert float(ev.crps(Judged(stats.norm()), [40.0])) == pytest.approx(float(ev.crps(normal(0.0, 1.0), [40.0])))
    assert float(ev.crps(normal(0.0, 1.0), [40.0])) == pytest.approx(40.0 - 1 / np.pi**0.5, rel=1e-12)


def test_crps_of_a_mixture_has_its_closed_form():
    mixture = GaussianMixture(
        torch.tensor([[-1.0, 2.0]]).double(),
        torch.tensor([[0.5, 1.0]]).double(),
        torch.tensor([0.3, 0.7], dtype=torch.float64),
    )
    assert float(ev.crps(mixture, [0.4])) == pytest.approx(0.6403999438, abs=5e-11)


@pytest.mark.parametrize("weighted", [False, True])
def test_crps_of_many_components_agrees_with_pairs_and_quadrature(weighted, monkeypatch):
    """700 components with scales from 0.3 to 1.5: trapezoid, all pairs, and SciPy's integral of the definition."""
    g = torch.Generator().manual_seed(2)
    loc = 1.5 * torch.randn(2, 700, generator=g, dtype=torch.float64)
    scale = 0.3 + 1.2 * torch.rand(2, 700, generator=g, dtype=torch.float64)
    weights = torch.rand(2, 700, generator=g, dtype=torch.float64) if weighted else None
    mixture, y = GaussianMixture(loc, scale, weights), torch.tensor([0.3, -4.0]).double()
    calls = []
    from bayesdl.evaluation import scores

    by_pairs = scores._half_spread_by_pairs
    monkeypatch.setattr(scores, "_half_spread_by_pairs", lambda *args: calls.append(1) or by_pairs(*args))
    got = ev.crps(mixture, y, reduction="none")
    assert not calls  # the quadrature ran
    for i in range(2):
        judge = stats.norm(loc[i].numpy(), scale[i].numpy())
        share = mixture.weights[i].numpy()
        want = crps_by_quadrature(lambda v, j=judge, w=share: float((w * j.cdf(v)).sum()), float(y[i]), -25, 25)
        assert float(got[i]) == pytest.approx(want, rel=1e-9)
    first = (mixture.weights * scores._mean_abs(y[:, None] - loc, scale)).sum(-1)
    monkeypatch.setattr(scores, "_CHUNK", 3000)
    assert torch.allclose(first - by_pairs(loc, scale, mixture.weights), got, rtol=1e-10)


def test_crps_of_a_mixture_whose_scales_differ_a_million_fold():
    mixture = GaussianMixture(torch.tensor([[0.0, 0.5, 3.0]]).double(), torch.tensor([[1e-6, 1.0, 1e-3]]).double())
    want = crps_by_quadrature(lambda v: float(mixture.cdf([v])), 0.2, -12, 12)
    assert float(ev.crps(mixture, [0.2])) == pytest.approx(want, rel=1e-4)


def test_mixture_of_equal_components_scores_as_the_normal():
    one = normal(0.3, 0.7)
    for m in (1, 5, 300):
        mixture = GaussianMixture(torch.full((1, m), 0.3).double(), torch.full((1, m), 0.7).double())
        for score in (ev.crps, ev.nlpd, ev.interval_score, ev.rmse):
            assert float(score(mixture, [1.2])) == pytest.approx(float(score(one, [1.2])), rel=1e-9)


def test_crps_of_draws_is_fair():
    """{0, 1, 3} at y = 2 gives 1/3, not 2/3; and for M = 2 draws the mean over 100,000 repeats is the true CRPS."""
    assert float(ev.crps(Empirical(torch.tensor([[3.0, 0.0, 1.0]]).double()), [2.0])) == pytest.approx(1 / 3)
    assert float(ev.crps(Empirical(torch.tensor([[1.5]]).double()), [2.0])) == pytest.approx(0.5)
    draws = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = ev.crps(Empirical(draws), torch.full((100_000,), 1.0), reduction="none")
    error = float(values.std()) / 100_000**0.5
    assert float(values.mean()) == pytest.approx(0.6024413576, abs=4.5 * error)  # false alarm 7e-6


def test_crps_has_gradients():
    inputs = [torch.tensor(v).double().requires_grad_() for v in ([[-1.0, 2.0, 0.3]], [[0.5, 1.0, 0.4]])]
    y = torch.tensor([0.4]).double()
    assert torch.autograd.gradcheck(lambda a, b: ev.crps(GaussianMixture(a, b), y), inputs)


def test_interval_score_and_nlpd_have_their_textbook_values():
    z = stats.norm.ppf(0.95)
    want = 2 * z + 2 / 0.1 * (2 - z)  # about 10.39
    assert float(ev.interval_score(normal(0.0, 1.0), [2.0], level=0.9)) == pytest.approx(want, rel=1e-10)
    assert want == pytest.approx(10.39, abs=5e-3)
    below = float(ev.interval_score(normal(1.0, 3.0), [-9.0], level=0.5))
    edge = stats.norm(1, 3).ppf(0.25)
    assert below == pytest.approx(2 * (1 - edge) + 4 * (edge + 9), rel=1e-10)
    assert float(ev.nlpd(normal(1.0, 3.0), [-9.0])) == pytest.approx(-stats.norm(1, 3).logpdf(-9), rel=1e-12)


def test_rmse_and_coverage_by_counting():
    pred = Normal(torch.zeros(4).double(), torch.full((4,), 2.0).double())
    y = pd.Series([0.5, -3.0, 3.5, 30.0])
    assert float(ev.rmse(pred, y)) == pytest.approx(((0.25 + 9 + 12.25 + 900) / 4) ** 0.5)
    # half-widths in y: 50% 1.35, 90% 3.29, 95% 3.92
    assert ev.coverage(pred, y, (0.5, 0.9, 0.95)).tolist() == [0.25, 0.5, 0.75]
    mixture = GaussianMixture(torch.zeros(4, 3).double(), torch.full((4, 3), 2.0).double())
    assert ev.coverage(mixture, y.to_numpy()).tolist() == [0.25, 0.5, 0.75]
    draws = Empirical(torch.linspace(-1, 1, 101).double().expand(2, 101))
    assert ev.coverage(draws, [0.5001, -0.4999], (0.5,)).tolist() == [0.5]


def test_scores_average_over_outputs():
    """Two outputs: the score is the mean of the scores of each."""
    loc, scale = torch.linspace(-1, 2, 10).double().reshape(5, 2), torch.linspace(0.2, 3, 10).double().reshape(5, 2)
    y = loc + scale
    for score in (ev.crps, ev.nlpd, ev.interval_score):
        both = float(score(Normal(loc, scale), y))
        each = [float(score(Normal(loc[:, i], scale[:, i]), y[:, i])) for i in range(2)]
        assert both == pytest.approx(sum(each) / 2)


def test_label_scores_by_hand():
    binary = Bernoulli(probs=torch.tensor([0.9, 0.2, 0.6]).double())
    assert float(ev.accuracy(binary, [1, 0, 0])) == pytest.approx(2 / 3)
    assert float(ev.brier(binary, [1, 0, 0])) == pytest.approx(2 * (0.01 + 0.04 + 0.36) / 3)
    assert float(ev.nlpd(binary, [1, 0, 0])) == pytest.approx(-np.log([0.9, 0.8, 0.4]).mean())
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).double()
    multi = Categorical(probs=probs)
    assert ev.brier(multi, [0, 1], reduction="none").tolist() == pytest.approx([0.14, 0.86])
    assert float(ev.accuracy(multi, [0, 1])) == 0.5
    two = Categorical(probs=torch.stack([1 - binary.probs, binary.probs], -1))
    for score in (ev.accuracy, ev.brier, ev.nlpd):
        assert float(score(two, [1, 0, 0])) == pytest.approx(float(score(binary, [1, 0, 0])))


def test_wrong_targets_are_refused():
    pred = Normal(torch.zeros(3), torch.ones(3))
    with pytest.raises(ShapeError, match=r"crps: y must have the predictive's shape \(3,\)"):
        ev.crps(pred, torch.zeros(3, 1))
    with pytest.raises(DataError, match="y must be finite"):
        ev.nlpd(pred, [0.0, float("nan"), 1.0])
    with pytest.raises(DataError, match=r"labels must be the integers 0\.\.1"):
        ev.accuracy(Bernoulli(probs=torch.full((2,), 0.5)), [1, 2])
    with pytest.raises(SettingError, match="Bernoulli or Categorical"):
        ev.accuracy(pred, [0.0, 1.0, 2.0])
    with pytest.raises(SettingError, match="level must lie between"):
        ev.interval_score(pred, [0.0, 1.0, 2.0], level=1.0)
    with pytest.raises(SettingError, match="reduction"):
        ev.crps(pred, [0.0, 1.0, 2.0], reduction="sum")
