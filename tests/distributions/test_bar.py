"""The bar distribution against numerical integration of its density, everywhere, tails included."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from bayesdl import evaluation
from bayesdl.distributions import BarDistribution, pool
from bayesdl.distributions.improvement import expected_improvement, log_expected_improvement
from bayesdl.errors import DataError, SettingError, ShapeError

BORDERS = torch.tensor([-2.3, -1.1, -0.9, 0.4, 2.0, 2.1, 3.7], dtype=torch.float64)
LOGITS = torch.tensor(
    [[0.3, -1.2, 0.9, 1.7, 0.1, -0.6], [2.5, 0.0, -3.0, 0.5, -1.0, 1.5], [-4.0, 1.0, 1.0, -2.0, 3.0, -6.0]],
    dtype=torch.float64,
)


def toy(dtype=torch.float64) -> BarDistribution:
    return BarDistribution(LOGITS.to(dtype), BORDERS)


def judge(logits, borders):
    """The density from its definition, by SciPy's half-normal and NumPy."""
    p = np.exp(logits - np.logaddexp.reduce(logits))
    widths, last = np.diff(borders), len(p) - 1
    low, high = (stats.halfnorm(scale=widths[k] / stats.norm.ppf(0.75)) for k in (0, last))

    def density(y):
        y = np.asarray(y, dtype=float)
        k = np.clip(np.searchsorted(borders, y) - 1, 0, last)
        left, right = p[0] * low.pdf(borders[1] - y), p[last] * high.pdf(y - borders[last])
        return np.where(k == 0, left, np.where(k == last, right, p[k] / widths[k]))

    return density


NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)


def integral(function, borders, low=-np.inf, high=np.inf) -> float:
    """Gauss-Legendre quadrature of a vectorised function between the places where the density jumps."""
    reach = np.linspace(0, 20, 21)
    first, last = borders[1] - borders[0], borders[-1] - borders[-2]
    edges = np.concatenate([borders[1] - first * reach[::-1], borders[1:-1], borders[-2] + last * reach, [low, high]])
    edges = np.unique(np.clip(edges, max(low, -1e9), min(high, 1e9)))
    half, middle = 0.5 * np.diff(edges), 0.5 * (edges[1:] + edges[:-1])
    return float((half[:, None] * WEIGHTS * function(middle[:, None] + half[:, None] * NODES)).sum())


CASES = [(LOGITS[i].numpy(), BORDERS.numpy()) for i in range(3)]
CASES.append((np.array([0.4, -0.7]), np.array([-1.0, 0.5, 3.5])))  # two tails and nothing else
GRID = np.array([-9.0, -4.0, -2.3, -1.5, -1.1, -1.0, 0.0, 0.4, 1.9, 2.05, 2.1, 2.7, 3.7, 5.0, 14.0])


@pytest.mark.parametrize(("logits", "borders"), CASES)
def test_density_and_distribution_function(logits, borders):
    """Of a point in every bar, on borders and far outside."""
    bars, density = BarDistribution(torch.tensor(logits), torch.tensor(borders)), judge(logits, borders)
    inside = GRID[~np.isin(GRID, borders)]
    want = np.log(density(inside))
    assert bars.log_prob(inside).numpy() == pytest.approx(want, rel=1e-11)
    assert integral(density, borders) == pytest.approx(1.0, rel=1e-10)
    below = [integral(density, borders, high=y) for y in GRID]
    assert bars.cdf(GRID).numpy() == pytest.approx(below, rel=1e-8)


@pytest.mark.parametrize(("logits", "borders"), CASES)
def test_moments_mode_and_entropy(logits, borders):
    bars, density = BarDistribution(torch.tensor(logits), torch.tensor(borders)), judge(logits, borders)
    mean = integral(lambda y: y * density(y), borders)
    assert float(bars.mean) == pytest.approx(mean, rel=1e-9)
    assert float(bars.variance) == pytest.approx(integral(lambda y: (y - mean) ** 2 * density(y), borders), rel=1e-9)
    highest = density(np.linspace(-6, 6, 24_001)).max()
    assert max(density(bars.mode.numpy() + np.array([-1e-9, 1e-9]))) == pytest.approx(highest, rel=1e-3)
    entropy = integral(lambda y: -density(y) * np.log(np.maximum(density(y), 1e-300)), borders)
    assert float(bars.entropy()) == pytest.approx(entropy, rel=1e-9)


def test_the_mode_is_the_highest_density_and_not_the_largest_mass():
    """A narrow bar of little mass may stand higher than a wide one of much."""
    bars = BarDistribution(torch.tensor([0.1, 0.5, 0.3, 0.1]).log(), torch.tensor([-1.0, 0.0, 5.0, 5.1, 6.0]))
    assert float(bars.mode) == pytest.approx(5.05)


@pytest.mark.parametrize(("logits", "borders"), CASES)
def test_improvement(logits, borders):
    """E(Y - t)+ and P(Y > t) by quadrature, for t in every bar and in both tails."""
    bars, density = BarDistribution(torch.tensor(logits), torch.tensor(borders)), judge(logits, borders)
    for t in GRID:
        want = integral(lambda y, t=t: (y - t) * density(y), borders, low=t)
        if want > 1e-9:
            assert float(bars.expected_improvement(t)) == pytest.approx(want, rel=1e-7)
            assert float(expected_improvement(bars, t)) == float(bars.expected_improvement(t))
            above = integral(density, borders, low=t)
            assert float(bars.probability_of_improvement(t)) == pytest.approx(above, rel=1e-8)


def test_improvement_far_in_the_tails():
    """At 30 scales beyond the last border, where the expectation itself underflows, against asymptotics by mpmath-free
    quadrature of exp(log density - log density at t); far below, the mean less t."""
    bars = toy()
    p, scale = bars.probs[:, -1].numpy(), 1.6 / stats.norm.ppf(0.75)
    for z in (5.0, 12.0, 30.0, 400.0):
        t = 2.1 + z * scale
        inner = integrate.quad(lambda u, z=z: u * math.exp(-z * u - 0.5 * u * u), 0, 60 / z, epsrel=1e-12)[0]
        want = np.log(2 * p * scale * inner) + stats.norm.logpdf(z)
        assert log_expected_improvement(bars, t).numpy() == pytest.approx(want, rel=1e-9)
        want = np.log(2 * p) + stats.norm.logsf(z)
        assert bars.log_probability_of_improvement(t).numpy() == pytest.approx(want, rel=1e-9)
    far = torch.tensor(-1e6, dtype=torch.float64)
    assert bars.expected_improvement(far).numpy() == pytest.approx((bars.mean - far).numpy(), rel=1e-12)
    assert bool((bars.probability_of_improvement(far) == 1).all())
    single = toy(torch.float32)
    assert bool(torch.isfinite(single.log_expected_improvement(900.0)).all())


def test_improvement_just_inside_the_left_tail_keeps_its_digits():
    """Of half a normal alone, E(z - |Z|)+ falls as z^2 phi(0): no cancellation down to z = 1e-7."""
    bars = BarDistribution(torch.tensor([0.0, -math.inf], dtype=torch.float64), torch.tensor([-1.0, 0.0, 1.0]))
    scale = 1 / stats.norm.ppf(0.75)
    for z in (1e-7, 1e-3, 0.05, 0.0999, 0.1001, 0.7):
        want = integrate.quad(lambda x, z=z: (z - x) * 2 * stats.norm.pdf(x), 0, z, epsabs=0, epsrel=1e-12)[0]
        assert float(bars.expected_improvement(-z * scale)) == pytest.approx(scale * want, rel=1e-10)


@pytest.mark.parametrize(("logits", "borders"), CASES)
def test_crps(logits, borders):
    """The closed form against quadrature of (F - 1)^2, and `evaluation.crps` with it."""
    bars = BarDistribution(torch.tensor(logits), torch.tensor(borders))
    for y in GRID:

        def square(v, y=y):
            return (bars.cdf(v).numpy() - (v >= y)) ** 2

        want = integral(square, borders, low=min(-30.0, y), high=y) + integral(
            square, borders, low=y, high=max(30.0, y)
        )
        assert float(bars.crps(y)) == pytest.approx(want, rel=1e-7)
        assert float(evaluation.crps(bars, torch.tensor(y))) == pytest.approx(want, rel=1e-7)


def test_bars_of_a_normal_score_like_the_normal():
    """4000 bars of equal mass under N(1, 2^2) have its quantiles, log density and CRPS."""
    normal = stats.norm(1.0, 2.0)
    levels = np.linspace(0, 1, 4001)
    borders = normal.ppf(np.clip(levels, 5e-5, 1 - 5e-5))
    mass = np.diff(normal.cdf(np.concatenate([[-np.inf], borders[1:-1], [np.inf]])))
    bars = BarDistribution(torch.tensor(np.log(mass)), torch.tensor(borders))
    y = np.array([-5.0, -1.0, 0.9, 4.0, 7.0])
    assert bars.log_prob(y).numpy() == pytest.approx(normal.logpdf(y), abs=0.02)
    assert bars.quantile([0.01, 0.3, 0.98]).numpy() == pytest.approx(normal.ppf([0.01, 0.3, 0.98]), abs=2e-3)
    z = (y - 1) / 2
    want = 2 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert bars.crps(y).numpy() == pytest.approx(want, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    widths=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=9),
    start=st.floats(-1e3, 1e3),
    data=st.data(),
)
def test_quantiles_invert_the_distribution_function(widths, start, data):
    """cdf(quantile(u)) = u and quantiles rise, for any bars, to what rounding of the value itself leaves."""
    logits = data.draw(st.lists(st.floats(-12, 12), min_size=len(widths), max_size=len(widths)))
    borders = start + np.concatenate([[0.0], np.cumsum(widths)])
    bars = BarDistribution(torch.tensor(logits, dtype=torch.float64), torch.tensor(borders))
    u = np.unique(np.concatenate([[1e-14, 1e-6, 1 - 1e-6], np.linspace(0.001, 0.999, 211)]))
    values = bars.quantile(u)
    assert bool((values.diff() >= 0).all())
    assert bool(torch.isfinite(values).all())
    steepest = float((bars.probs / torch.tensor(widths, dtype=torch.float64)).max())
    rounding = np.finfo(float).eps * float(values.abs().max()) * steepest
    assert bars.cdf(values).numpy() == pytest.approx(u, abs=1e-12 + 4 * rounding)
    assert bars.quantile([0.0, 1.0]).tolist() == [-math.inf, math.inf]


def test_quantiles_in_the_tails_are_those_of_half_normals():
    bars = toy()
    p = bars.probs.numpy()
    u = 1e-10
    low = -1.1 + 1.2 / stats.norm.ppf(0.75) * stats.norm.ppf(u / (2 * p[:, 0]))
    high = 2.1 - 1.6 / stats.norm.ppf(0.75) * stats.norm.ppf(u / (2 * p[:, -1]))
    assert bars.quantile(u).numpy() == pytest.approx(low, rel=1e-9)
    assert bars.quantile(1 - u).numpy() == pytest.approx(high, rel=1e-7)  # 1 - u has lost digits


def test_draws_follow_the_distribution_function():
    """Kolmogorov-Smirnov at 20,000 draws for each of three rows; a false alarm has probability below 3e-4 in all."""
    bars = toy()
    draws = bars.sample((20_000,), seed=4)
    for i in range(3):
        one = BarDistribution(LOGITS[i], BORDERS)
        assert stats.kstest(draws[:, i].numpy(), lambda v, one=one: one.cdf(v).numpy()).pvalue > 1e-4
    assert float(draws[:, 1].min()) < -2.3  # beyond the outermost border
    single = toy(torch.float32).sample((20_000,), seed=4)
    assert single.dtype == torch.float32
    assert single.double().numpy() == pytest.approx(draws.numpy(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda d: d.mean,
        lambda d: d.variance,
        lambda d: d.entropy(),
        lambda d: d.log_prob(GRID[:, None]),
        lambda d: d.cdf(GRID[:, None]),
        lambda d: d.crps(GRID[:, None]),
        lambda d: d.quantile(np.array([1e-4, 0.02, 0.3, 0.77, 0.999])),
        lambda d: d.rsample((5,), seed=3),
        lambda d: d.log_expected_improvement(GRID[:, None]),
        lambda d: d.log_probability_of_improvement(GRID[:, None]),
    ],
)
def test_gradients_in_the_logits(function):
    """Against finite differences."""
    assert torch.autograd.gradcheck(
        lambda z: function(BarDistribution(z, BORDERS)), LOGITS.clone().requires_grad_(True)
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda v: toy().log_prob(v),
        lambda v: toy().cdf(v),
        lambda v: toy().crps(v),
        lambda v: toy().log_expected_improvement(v),
        lambda v: toy().log_probability_of_improvement(v),
        lambda v: toy().icdf(torch.sigmoid(v)),
    ],
)
def test_gradients_in_the_value(function):
    """Against finite differences, in tails and between borders."""
    value = torch.tensor([-7.1, -2.31, -1.77, -1.0, 0.5, 2.05, 3.3, 9.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(function, value.unsqueeze(-1).requires_grad_(True))


def test_borders_of_each_point():
    """Rows with borders of their own answer as they do alone; shared leading axes broadcast."""
    borders = BORDERS + torch.tensor([[0.0], [10.0], [-3.0]], dtype=torch.float64)
    borders = borders * torch.tensor([[1.0], [0.2], [7.0]], dtype=torch.float64)
    together = BarDistribution(LOGITS, borders)
    value = torch.linspace(-30, 30, 41, dtype=torch.float64)
    for i in range(3):
        alone = BarDistribution(LOGITS[i], borders[i])
        for name in ("mean", "variance", "mode"):
            assert float(getattr(together, name)[i]) == pytest.approx(float(getattr(alone, name)), rel=1e-12)
        for name in ("log_prob", "cdf", "crps", "log_expected_improvement", "log_probability_of_improvement"):
            got, want = getattr(together, name)(value[:, None])[:, i], getattr(alone, name)(value)
            assert got.numpy() == pytest.approx(want.numpy(), rel=1e-10), name
        assert together.quantile(0.83)[i] == pytest.approx(float(alone.quantile(0.83)), rel=1e-12)
    grown = BarDistribution(LOGITS, BORDERS).expand((4, 3))
    assert grown.log_prob(torch.zeros(4, 3)).shape == (4, 3)
    assert grown.log_prob(torch.zeros(5, 1, 1)).shape == (5, 4, 3)
    assert BarDistribution(LOGITS[:, None], BORDERS).log_prob(torch.zeros(3, 7)).shape == (3, 7)


def test_affine_changes_units_and_reflection_changes_sign():
    bars, y = toy(), 0.013 + torch.linspace(-6, 6, 13, dtype=torch.float64)[:, None]
    moved = bars.affine(torch.tensor([100.0, -3.0, 0.5]), 0.02)
    loc = torch.tensor([100.0, -3.0, 0.5], dtype=torch.float64)
    assert moved.log_prob(loc + 0.02 * y).numpy() == pytest.approx((bars.log_prob(y) - math.log(0.02)).numpy())
    assert moved.mean.numpy() == pytest.approx((loc + 0.02 * bars.mean).numpy())
    assert moved.variance.numpy() == pytest.approx((4e-4 * bars.variance).numpy())
    mirror = bars.reflected()
    assert mirror.log_prob(-y).numpy() == pytest.approx(bars.log_prob(y).numpy())
    assert mirror.mean.numpy() == pytest.approx(-bars.mean.numpy())
    with pytest.raises(SettingError, match="scale"):
        bars.affine(0.0, -1.0)


def test_narrow_bars_at_a_large_offset_stay_apart_in_float32():
    """1e7 + 1e-3 y: float32 has steps of 1 there, the borders are kept in float64."""
    bars = toy(torch.float32).affine(1e7, 1e-3)
    want = torch.tensor(1e7 + 1e-3 * 1.3, dtype=torch.float64)
    assert bars.log_prob(want).numpy() == pytest.approx((toy().log_prob(1.3) - math.log(1e-3)).numpy(), rel=1e-3)
    assert bars.variance.numpy() == pytest.approx((1e-6 * toy().variance).numpy(), rel=1e-4)
    assert bars.mean.dtype == bars.log_prob(want).dtype == torch.float32


def test_masked_bars_have_no_mass():
    """Logits of -inf: nothing is drawn there, and everything else stays finite."""
    logits = LOGITS.clone()
    logits[:, 2:4] = -math.inf
    bars = BarDistribution(logits, BORDERS)
    draws = bars.sample((4000,), seed=1)
    assert not bool(((draws > -0.9) & (draws < 2.0)).any())
    assert bool(torch.isfinite(torch.stack([bars.mean, bars.variance, bars.mode, bars.entropy()])).all())
    assert bool((bars.log_prob(1.0) == -math.inf).all())


def test_pool_averages_over_members():
    """On the same borders exactly; on others, exactly at the common borders, and close to the average in between."""
    a, b = BarDistribution(LOGITS[:2], BORDERS), BarDistribution(LOGITS[1:], BORDERS)
    y = torch.linspace(-5, 5, 31, dtype=torch.float64)[:, None]
    want = (0.5 * (a.log_prob(y).exp() + b.log_prob(y).exp())).log()
    assert pool([a, b]).log_prob(y).numpy() == pytest.approx(want.numpy(), rel=1e-12)
    shifted = BarDistribution(LOGITS[1:], 0.3 + 1.2 * BORDERS)
    mixed = pool([a, shifted])
    at = mixed.borders[1:-1, None]
    average = 0.5 * (a.cdf(at) + shifted.cdf(at))
    assert mixed.cdf(at).numpy() == pytest.approx(average.numpy(), abs=1e-12)
    fine = pool([a, shifted], torch.linspace(-14, 16, 30_001, dtype=torch.float64))
    assert fine.cdf(y).numpy() == pytest.approx((0.5 * (a.cdf(y) + shifted.cdf(y))).numpy(), abs=1e-4)
    assert fine.mean.numpy() == pytest.approx((0.5 * (a.mean + shifted.mean)).numpy(), abs=1e-6)
    with pytest.raises(SettingError, match="member"):
        pool([])


def test_pool_of_members_with_borders_of_each_point():
    a = BarDistribution(LOGITS, BORDERS + torch.tensor([[0.0], [10.0], [-3.0]], dtype=torch.float64))
    b = BarDistribution(LOGITS.flip(0), BORDERS + torch.tensor([[0.1], [10.5], [-3.0]], dtype=torch.float64))
    mixed = pool([a, b])
    at = mixed.borders[:, 3]
    assert mixed.cdf(at).numpy() == pytest.approx((0.5 * (a.cdf(at) + b.cdf(at))).numpy(), abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "borders", "kind"),
    [
        (torch.zeros(1), torch.tensor([0.0, 1.0]), ShapeError),
        (torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), ShapeError),
        (torch.zeros(3, dtype=torch.long), torch.arange(4.0), ShapeError),
        (torch.zeros(2), torch.tensor([0.0, 1.0, 1.0]), DataError),
        (torch.zeros(2), torch.tensor([0.0, 2.0, 1.0]), DataError),
        (torch.zeros(2), torch.tensor([-math.inf, 0.0, 1.0]), DataError),
        (torch.zeros(2), torch.tensor([0.0, math.nan, 1.0]), DataError),
        (torch.tensor([0.0, math.nan]), torch.tensor([0.0, 1.0, 2.0]), DataError),
        (torch.full((2,), -math.inf), torch.tensor([0.0, 1.0, 2.0]), DataError),
    ],
)
def test_degenerate_bars_are_refused(logits, borders, kind):
    with pytest.raises(kind, match="BarDistribution"):
        BarDistribution(logits, borders)


def test_borders_beside_the_contract_of_all_predictives():
    """Shapes for scalar and tensor levels, empty draws, and empty batches."""
    bars = toy(torch.float32)
    assert bars.quantile([[0.1, 0.5, 0.9]]).shape == (1, 3, 3)
    assert bars.sample((0,), seed=1).shape == (0, 3)
    assert bars.stddev.shape == bars.mode.shape == (3,)
    empty = BarDistribution(torch.zeros(0, 4), torch.arange(5.0))
    assert empty.mean.shape == empty.log_prob(torch.zeros(0)).shape == (0,)
    assert evaluation.interval_score(bars, torch.zeros(3)).dtype == torch.float32
