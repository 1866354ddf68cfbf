"""Calibration measures: uniform PITs, hand-counted bins, and the band of a calibrated model."""

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl import evaluation as ev
from bayesdl.distributions import Bernoulli, Categorical, Empirical, GaussianMixture, Normal
from bayesdl.errors import DataError


def test_pit_is_the_cdf():
    pred = Normal(torch.tensor([0.0, 2.0]).double(), torch.tensor([1.0, 3.0]).double())
    assert ev.pit(pred, [0.3, -1.0]).numpy() == pytest.approx(stats.norm([0, 2], [1, 3]).cdf([0.3, -1.0]))


@pytest.mark.parametrize("kind", ["normal", "mixture", "empirical", "bernoulli", "categorical"])
def test_pit_of_a_true_model_is_uniform(kind):
    """Kolmogorov-Smirnov on 4,000 targets drawn from the predictive itself; one false alarm in 10,000 per case."""
    g, n = torch.Generator().manual_seed(7), 4000
    loc, scale = torch.randn(n, generator=g, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64) + 0.1
    pred = {
        "normal": lambda: Normal(loc, scale),
        "mixture": lambda: GaussianMixture(torch.stack([loc, loc + 3], -1), torch.stack([scale, 2 * scale], -1)),
        "empirical": lambda: Normal(loc, scale),
        "bernoulli": lambda: Bernoulli(logits=loc),
        "categorical": lambda: Categorical(logits=torch.stack([loc, scale, -loc], -1)),
    }[kind]()
    y = pred.sample((), seed=3)
    if kind == "empirical":  # nine draws and y are exchangeable
        pred = Empirical(pred.sample((9,), seed=4).movedim(0, -1))
    assert stats.kstest(ev.pit(pred, y, seed=1).numpy(), "uniform").pvalue > 1e-4


def test_pit_of_draws_counts_ranks_and_ties():
    pred = Empirical(torch.tensor([[1.0, 2.0, 2.0, 5.0]]).expand(1000, 4).double())
    values = ev.pit(pred, torch.full((1000,), 2.0), seed=2)  # between 1/5 and 4/5
    assert 0.2 <= float(values.min()) < 0.25
    assert 0.75 < float(values.max()) <= 0.8


def test_pit_calibration_error_by_hand_and_at_its_extremes():
    """Two levels (0.25, 0.75) and values 0.1, 0.2, 0.6: fractions 2/3 and 1, errors 5/12 and 1/4."""
    assert float(ev.pit_calibration_error([0.1, 0.2, 0.6], num_levels=2)) == pytest.approx((5 / 12 + 1 / 4) / 2)
    assert float(ev.pit_calibration_error(np.linspace(0, 1, 100_001))) < 1e-5
    assert float(ev.pit_calibration_error(np.ones(10))) == pytest.approx(0.5)
    with pytest.raises(DataError, match="PIT values"):
        ev.pit_calibration_error([0.2, 1.3])


@pytest.mark.parametrize(("n", "mean", "upper"), [(100, 0.0313, 0.058), (1000, 0.0101, 0.019)])
def test_band_of_a_calibrated_model_matches_independent_simulation(n, mean, upper):
    """Values simulated elsewhere to two or three digits; the closed form of the mean is an upper approximation."""
    got_mean, got_upper = ev.pit_calibration_error_band(n)
    assert got_mean == pytest.approx(mean, rel=0.04)
    assert got_upper == pytest.approx(upper, rel=0.06)
    a = (np.arange(100) + 0.5) / 100
    assert got_mean == pytest.approx(np.sqrt(2 * a * (1 - a) / (np.pi * n)).mean(), rel=0.05)


def test_band_scales_beyond_the_simulated_size():
    assert ev.pit_calibration_error_band(8000)[0] == pytest.approx(ev.pit_calibration_error_band(2000)[0] / 2)


def test_calibration_band_holds_its_coverage():
    """The band at level a contains Binomial(n, a)/n with probability at least 95% and not above 99%."""
    levels = [0.1, 0.37, 0.9]
    low, high = ev.calibration_band(60, levels)
    for a, lo, hi in zip(levels, low.tolist(), high.tolist(), strict=True):
        inside = stats.binom.cdf(round(hi * 60), 60, a) - stats.binom.cdf(round(lo * 60) - 1, 60, a)
        assert 0.95 <= inside < 0.99
    curve = ev.calibration_curve([0.1, 0.5, 0.5, 0.9], torch.tensor([0.05, 0.5, 1.0]))
    assert curve.tolist() == [0.0, 0.75, 1.0]


def test_expected_calibration_error_has_its_published_value():
    """Confidences .95 .85 .75 .65 .55, hits 1 1 0 1 0, ten bins: 0.37; as two classes and as five."""
    confidence = torch.tensor([0.95, 0.85, 0.75, 0.65, 0.55]).double()
    assert float(ev.expected_calibration_error(Bernoulli(probs=confidence), [1, 1, 0, 1, 0], 10)) == pytest.approx(0.37)
    probs = torch.cat(
        [
            ((1 - confidence) / 4)[:, None].expand(5, 2),
            confidence[:, None],
            ((1 - confidence) / 4)[:, None].expand(5, 2),
        ],
        -1,
    )
    multi = Categorical(probs=probs)
    assert float(ev.expected_calibration_error(multi, [2, 2, 0, 2, 4], 10)) == pytest.approx(0.37)


def test_constant_classifier_has_the_obvious_error():
    """|confidence - accuracy|, whatever the bins; a confidence on a bin's edge falls into one bin."""
    y = torch.tensor([1.0] * 13 + [0.0] * 7)
    for num_bins in (1, 10, 15):
        pred = Bernoulli(probs=torch.full((20,), 0.8).double())
        assert float(ev.expected_calibration_error(pred, y, num_bins)) == pytest.approx(0.8 - 13 / 20)
        curve = ev.reliability_curve(pred, y, num_bins)
        assert curve.count.sum() == 20
        assert int((curve.count > 0).sum()) == 1
        assert bool(curve.accuracy[curve.count == 0].isnan().all())
