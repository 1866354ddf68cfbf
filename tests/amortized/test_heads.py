"""What raw outputs mean: densities against SciPy and numerical integration, borders against counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from bayesdl.amortized import Architecture, Network, heads, log_score, make_borders, predictive
from bayesdl.errors import DataError, SettingError

BORDERS = torch.tensor([-1.3, -0.4, 0.1, 0.9, 2.5], dtype=torch.float64)
RAW = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)


def architecture(head: str, outputs: int) -> Architecture:
    return Architecture(1, head, outputs, width=8, num_heads=2, hidden=8)


def by_hand(y: float) -> float:
    """The density of the bars above at y, with SciPy's half-normal beyond the inner borders."""
    mass = np.exp(RAW.numpy()) / np.exp(RAW.numpy()).sum()
    b = BORDERS.numpy()
    half = stats.halfnorm.ppf(0.5)
    if y < b[1]:
        return mass[0] * stats.halfnorm.pdf(b[1] - y, scale=(b[1] - b[0]) / half)
    if y >= b[3]:
        return mass[3] * stats.halfnorm.pdf(y - b[3], scale=(b[4] - b[3]) / half)
    k = 1 if y < b[2] else 2
    return mass[k] / (b[k + 1] - b[k])


@pytest.mark.parametrize("y", [-6.0, -1.3, -0.41, -0.39, 0.3, 0.95, 2.5, 9.0])
def test_the_score_of_bars_is_that_of_the_formula(y: float) -> None:
    score = log_score(architecture("bars", 4), RAW, BORDERS, torch.tensor(y, dtype=torch.float64))
    assert float(score.exp()) == pytest.approx(by_hand(y), rel=1e-12)


def test_the_density_of_bars_integrates_to_one() -> None:
    def density(y: float) -> float:
        return float(log_score(architecture("bars", 4), RAW, BORDERS, torch.tensor(y, dtype=torch.float64)).exp())

    pieces = [-40.0, *BORDERS.tolist(), 40.0]
    total = sum(integrate.quad(density, a, b, limit=200)[0] for a, b in itertools.pairwise(pieces))
    assert total == pytest.approx(1, abs=1e-7)


def test_the_score_of_a_mixture_is_that_of_the_formula() -> None:
    raw = torch.tensor([0.2, -1.5, -0.7, 2.0, -3.0, 0.4], dtype=torch.float64)
    weights = np.exp([0.2, -1.5]) / np.exp([0.2, -1.5]).sum()
    scales = heads.SCALE_FLOOR + np.log1p(np.exp([-3.0, 0.4]))
    for y in (-4.0, -0.7, 1.1):
        wanted = (weights * stats.norm.pdf(y, [-0.7, 2.0], scales)).sum()
        score = log_score(architecture("mixture", 2), raw, None, torch.tensor(y, dtype=torch.float64))
        assert float(score) == pytest.approx(np.log(wanted), rel=1e-10)


@pytest.mark.parametrize(("head", "outputs"), [("bars", 4), ("mixture", 3), ("classes", 5)])
def test_the_fused_score_is_the_log_probability_of_the_predictive(head: str, outputs: int) -> None:
    source = torch.Generator().manual_seed(0)
    shape = architecture(head, outputs)
    raw = 2 * torch.randn(6, 7, shape.num_raw, generator=source, dtype=torch.float64)
    y = 2 * torch.randn(6, 7, generator=source, dtype=torch.float64)
    y = torch.randint(0, outputs, (6, 7), generator=source) if head == "classes" else y
    borders = BORDERS if head == "bars" else None
    law = predictive(shape, raw, borders)
    assert law.batch_shape == (6, 7)
    torch.testing.assert_close(log_score(shape, raw, borders, y), law.log_prob(y), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("head", "outputs"), [("bars", 4), ("mixture", 3)])
def test_scores_have_the_gradients_of_finite_differences(head: str, outputs: int) -> None:
    source = torch.Generator().manual_seed(1)
    shape = architecture(head, outputs)
    raw = torch.randn(5, shape.num_raw, generator=source, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([-3.0, -0.5, 0.5, 1.0, 4.0], dtype=torch.float64)
    borders = BORDERS if head == "bars" else None
    assert torch.autograd.gradcheck(lambda r: log_score(shape, r, borders, y), raw)


@pytest.mark.parametrize("num", [1, 2, 8])
def test_a_fresh_mixture_is_about_standard_normal(num: int) -> None:
    shape = architecture("mixture", num)
    raw = Network(shape)(torch.zeros(1, 0, 1), torch.zeros(1, 0), torch.zeros(1, 1, 1)).detach()
    law = predictive(shape, raw, None)
    assert float(law.mean) == pytest.approx(0, abs=1e-5)
    assert float(law.variance) == pytest.approx(1, abs=0.3)


def test_borders_cut_the_prior_into_equal_parts() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(2)).exp()
    borders = make_borders(values, 50, equal_width=0)
    assert borders.shape == (51,)
    assert float(borders[0]) == pytest.approx(float(values.min()))
    assert float(borders[-1]) == pytest.approx(float(values.max()), rel=1e-3)
    counts = torch.histogram(values.double(), borders).hist
    assert int(counts.min()) >= 390
    assert int(counts.max()) <= 410


def test_half_of_the_borders_are_evenly_spaced() -> None:
    """So no bar between the outer quantiles is wider than that spacing."""
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(3)).double()
    borders = make_borders(values, 1000)
    low, high = np.quantile(values.numpy(), [0.001, 0.999])
    inside = borders[(borders > low) & (borders < high)]
    assert float(inside.diff().max()) <= 1.01 * (high - low) / 500
    assert float(make_borders(values, 1000, equal_width=0).diff().median()) < float(borders.diff().median())


def test_equal_values_leave_the_borders_ascending() -> None:
    values = torch.cat([torch.zeros(5_000), torch.linspace(-1, 1, 5_000)])
    borders = make_borders(values, 100)
    assert float(borders.diff().min()) > 0
    assert float(borders[0]) == -1
    with pytest.raises(DataError, match="targets must differ"):
        make_borders(torch.ones(2_000), 100)


@pytest.mark.parametrize("values", [torch.zeros(10), torch.full((2_000,), torch.nan)])
def test_borders_need_enough_finite_values(values: torch.Tensor) -> None:
    with pytest.raises(DataError, match="finite targets"):
        make_borders(values, 100)


def test_bars_need_their_borders() -> None:
    with pytest.raises(SettingError, match="needs their borders"):
        log_score(architecture("bars", 4), RAW, None, torch.zeros(()))
