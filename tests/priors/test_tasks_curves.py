"""Learning curves as tasks: formulas by SciPy, laws by SciPy, and the conditions by a plain rejection loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl import priors
from bayesdl.errors import NumericalError, SettingError
from bayesdl.priors import _tasks_curves, tasks
from tests.priors.task_laws import P_VALUE, assert_follows, source

T = np.array([1.0, 2.0, 7.0, 40.0, 100.0])

# Formulas a second time, where possible through distribution functions of SciPy, at parameters far from typical ones.
FORMULAS = {
    "pow3": ({"a": 0.37, "c": 0.91, "alpha": 0.23}, lambda a, c, alpha: c - a / T**alpha),
    "ilog2": ({"c": 0.83, "a": -0.41}, lambda c, a: c - a / np.log(1 + T)),
    "janoschek": (
        {"a": 0.87, "b": 0.13, "k": 0.031, "d": 1.7},
        lambda a, b, k, d: b + (a - b) * stats.weibull_min.cdf(T, d, scale=k ** (-1 / d)),
    ),
    "log_power": (
        {"a": 0.77, "b": 1.9, "c": -1.3},
        lambda a, b, c: a * stats.fisk.cdf(T, -c, scale=math.exp(b)),
    ),
    "weibull": (
        {"a": 1.1, "b": 0.3, "k": 0.07, "d": 0.6},
        lambda a, b, k, d: b + (a - b) * stats.weibull_min.cdf(T, d, scale=1 / k),
    ),
    "mmf": (
        {"a": 0.9, "b": 0.25, "k": 0.13, "d": 1.4},
        lambda a, b, k, d: b + (a - b) * stats.fisk.cdf(T, d, scale=1 / k),
    ),
    "vap": ({"a": -0.7, "b": -2.2, "c": 0.11}, lambda a, b, c: math.exp(a) * np.exp(b / T) * T**c),
    "loglog_linear": ({"a": 0.21, "b": 1.4}, lambda a, b: np.log(b + a * np.log(T))),
    "exp4": (
        {"c": 0.88, "a": 0.4, "b": 0.3, "alpha": 0.45},
        lambda c, a, b, alpha: c - math.exp(b) * stats.weibull_min.sf(T, alpha, scale=a ** (-1 / alpha)),
    ),
    "pow4": (
        {"c": 0.93, "a": 0.6, "b": 1.3, "alpha": 0.7},
        lambda c, a, b, alpha: c - (1.3 / (a * T + b)) ** alpha * 1.3**-alpha,
    ),
    "dr_hill": (
        {"theta": 0.81, "eta": 0.9, "kappa": 6.5},
        lambda theta, eta, kappa: theta * stats.fisk.cdf(T, eta, scale=kappa),
    ),
}

U, N, LN = lambda a, b: stats.uniform(a, b - a), stats.norm, lambda m, s: stats.lognorm(s, scale=math.exp(m))
LU = lambda a, b: stats.loguniform(math.exp(a), math.exp(b))  # noqa: E731
PEAKED = {
    "pow3": {"a": U(-0.6, 0.6), "c": U(0, 1.25), "alpha": LN(0, 2)},
    "ilog2": {"c": U(0, 1), "a": U(-0.5, 0.5)},
    "janoschek": {"a": U(0, 1), "b": U(0, 2), "k": LN(-2, 1), "d": LN(0, 0.5)},
    "log_power": {"a": N(0.8, 0.1), "b": N(1, 1), "c": U(-3, 0)},
    "weibull": {"a": U(0, 1.5), "b": U(0, 1), "k": LN(-2, 1), "d": LN(0, 0.5)},
    "mmf": {"a": N(0.8, 0.1), "b": N(0.2, 0.1), "k": LN(0, 2), "d": LN(0, 1)},
    "vap": {"a": U(-2, 0), "b": U(-4, 0), "c": LU(-8, 0)},
    "loglog_linear": {"a": LN(-2, 1), "b": LU(0, 1)},
    "exp4": {"c": N(0.8, 0.1), "a": LN(-2, 1), "b": LN(0, 0.5), "alpha": LN(0, 1)},
    "pow4": {"1 - c": LU(-5, 0), "a": LN(-3, 2), "b": LU(0, 1), "alpha": LN(0, 1)},
    "dr_hill": {"theta": N(0.8, 0.1), "eta": LN(1, 1), "kappa": LN(1, 2)},
}
UNIFORM = {
    "pow3": {"a": U(-1, 1), "c": U(0, 1), "alpha": U(0, 1)},
    "ilog2": {"c": U(0, 1), "a": U(-1, 1)},
    "janoschek": {"a": U(0, 1), "b": U(0, 2), "k": U(0, 1), "d": U(-5, 5)},
}


def test_all_eleven_families_are_there() -> None:
    assert set(tasks.CURVES) == set(FORMULAS) == set(PEAKED)
    assert {name for name, curve in tasks.CURVES.items() if curve.uniform is not None} == set(UNIFORM)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_family_has_its_formula(name) -> None:
    parameters, judge = FORMULAS[name]
    values = {p: torch.tensor(v, dtype=torch.float64) for p, v in parameters.items()}
    found = tasks.CURVES[name].formula(torch.tensor(T), values)
    np.testing.assert_allclose(found.numpy(), judge(**parameters), rtol=1e-12)


@pytest.mark.parametrize(("laws", "judges"), [("peaked", PEAKED), ("uniform", UNIFORM)])
def test_parameters_have_their_published_laws(laws, judges) -> None:
    """Draws against SciPy, and the density of the parameter itself, at 500 draws each."""
    for name, own in judges.items():
        found = getattr(tasks.CURVES[name], laws)
        assert {p.removeprefix("1 - ") for p in own} == set(found)
        for p, judge in own.items():
            flipped = p.startswith("1 - ")
            law = found[p.removeprefix("1 - ")]
            draws = law.sample((500,), source(len(name)))
            plain = 1 - draws if flipped else draws
            assert_follows(plain, judge)
            np.testing.assert_allclose(law.log_prob(draws), judge.logpdf(plain), rtol=1e-9, atol=1e-9)


def test_a_density_is_zero_outside_of_its_support() -> None:
    law = tasks.CURVES["pow3"].peaked["c"]
    assert law.log_prob(torch.tensor([-0.1, 1.26])).tolist() == [-math.inf, -math.inf]


def plain_rejection(num: int, components: tuple[str, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Curves over t = 1..100 in range, and their weights, the slow way."""
    t, curves, weights = np.arange(1.0, 101.0), [], []
    formulas = {
        "pow3": lambda p: p["c"] - p["a"] * t ** -p["alpha"],
        "ilog2": lambda p: p["c"] - p["a"] / np.log(t + 1),
        "janoschek": lambda p: p["a"] - (p["a"] - p["b"]) * np.exp(-p["k"] * t ** p["d"]),
    }
    while len(curves) < num:
        w = rng.uniform(size=len(components))
        f = np.zeros(100)
        for weight, name in zip(w, components, strict=True):
            f += weight * formulas[name]({p: law.rvs(random_state=rng) for p, law in PEAKED[name].items()})
        if f[-1] > f[0] and f.min() >= 0 and f.max() <= 1:
            curves.append(f)
            weights.append(w)
    return np.array(curves), np.array(weights)


def test_curves_in_range_are_those_of_a_plain_rejection_loop() -> None:
    """Two-sample Kolmogorov-Smirnov on values, rises and weights: one false alarm in 10 000."""
    components = ("ilog2", "pow3", "janoschek")
    judge, weights = plain_rejection(250, components, np.random.default_rng(0))
    prior = tasks.LearningCurves(components)
    drawn = prior.sample(4000, 100, 1, source())
    f = prior.accuracy(drawn.noiseless.double()).numpy()
    for k in range(3):
        assert stats.ks_2samp(drawn.latents["weights"][:, k], weights[:, k]).pvalue > P_VALUE
    for view in (lambda v: v[:, 0], lambda v: v[:, -1], lambda v: v[:, -1] - v[:, 9], lambda v: v.max(-1) - v.min(-1)):
        assert stats.ks_2samp(view(f), view(judge)).pvalue > P_VALUE


@pytest.mark.parametrize("components", [("pow3", "ilog2", "janoschek"), *((name,) for name in FORMULAS)], ids=str)
def test_curves_rise_and_stay_in_range(components) -> None:
    prior = tasks.LearningCurves(components, horizon=30)
    drawn = prior.sample(40, 30, 1, source())
    f = prior.accuracy(drawn.noiseless.double())
    assert bool((f[:, -1] > f[:, 0]).all())
    assert float(f.min()) > -1e-6
    assert float(f.max()) < 1 + 1e-6


def test_the_sum_of_all_families_can_be_drawn() -> None:
    prior = tasks.LearningCurves(tuple(FORMULAS), standardize=False)
    f = prior.sample(4, 100, 1, source()).noiseless
    assert bool(((f >= 0) & (f <= 1)).all())
    assert bool((f[:, -1] > f[:, 0]).all())


def test_latents_give_the_curve_and_the_noise_back() -> None:
    prior = tasks.LearningCurves(standardize=False)
    drawn = prior.sample(300, 100, 1, source(1))
    t = torch.arange(1.0, 101.0, dtype=torch.float64)
    f = prior.curve(t.expand(300, 100), drawn.latents)
    torch.testing.assert_close(f.float(), drawn.noiseless)
    assert_follows((drawn.y.double() - f) / drawn.latents["noise"].unsqueeze(-1), stats.norm())
    assert_follows(drawn.latents["noise"], stats.lognorm(1.0, scale=math.exp(-4)))
    assert drawn.x[5, :, 0].tolist() == t.tolist()


def test_axes_are_standardised_as_in_the_reference() -> None:
    prior = tasks.LearningCurves(horizon=50)
    drawn = prior.sample(3, 20, 1, source())
    k = np.arange(1, 21)
    np.testing.assert_allclose(drawn.x[1, :, 0], (k / 51 - 0.5) * math.sqrt(12), rtol=1e-5)
    np.testing.assert_allclose(prior.coordinate(torch.tensor(k * 1.0)), drawn.x[0, :, 0], rtol=1e-5)
    accuracy = torch.tensor([0.0, 0.31, 1.0])
    np.testing.assert_allclose(prior.target(accuracy), (accuracy - 0.5) * math.sqrt(12), rtol=1e-6)
    torch.testing.assert_close(prior.accuracy(prior.target(accuracy)), accuracy)


def test_a_short_task_is_the_start_of_a_whole_curve() -> None:
    """Conditions hold over the horizon: with the same numbers, 7 points are the first 7 of 60."""
    prior = tasks.LearningCurves(horizon=60, noise=priors.LogNormal(-30.0, 0.1))
    whole, start = prior.sample(5, 60, 1, source()), prior.sample(5, 7, 1, source())
    torch.testing.assert_close(whole.noiseless[:, :7], start.noiseless)


def test_sizes_grow_by_a_ratio_and_their_axis_is_logarithmic() -> None:
    prior = tasks.LearningCurves(horizon=9, axis="size", ratio=3.0)
    drawn = prior.sample(4, 9, 1, source())
    t = torch.tensor([3.0**k for k in range(9)], dtype=torch.float64)
    np.testing.assert_allclose(prior.times(t), t, rtol=1e-12)
    np.testing.assert_allclose(np.diff(drawn.x[0, :, 0]), math.sqrt(12) / 10, rtol=1e-5)
    np.testing.assert_allclose(prior.coordinate(t), drawn.x[2, :, 0], rtol=1e-5)
    f = prior.curve(t.expand(4, 9), drawn.latents)
    torch.testing.assert_close(prior.target(f).float(), drawn.noiseless)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"components": ("pow5",)}, "components must be one of"),
        ({"components": ()}, "at least one family"),
        ({"components": ("pow3", "pow3")}, "none twice"),
        ({"components": ("weibull",), "laws": "uniform"}, "weibull has no uniform laws"),
        ({"laws": "flat"}, "laws must be one of"),
        ({"axis": "log"}, "axis must be one of"),
        ({"horizon": 1}, "horizon must be an integer of at least 2"),
        ({"ratio": 1.0}, "ratio must be a finite number above 1"),
        ({"noise": 0.1}, "noise must be a prior"),
    ],
)
def test_a_wrong_setting_is_refused(settings, complaint) -> None:
    with pytest.raises(SettingError, match=complaint):
        tasks.LearningCurves(**settings)


@pytest.mark.parametrize(("n", "d"), [(101, 1), (5, 2)])
def test_points_beyond_the_horizon_and_further_columns_are_refused(n, d) -> None:
    with pytest.raises(SettingError, match="one input column and at most 100 points"):
        tasks.LearningCurves().sample(3, n, d, source())


def test_conditions_that_are_never_met_are_reported(monkeypatch) -> None:
    monkeypatch.setattr(_tasks_curves, "_ROUNDS", 1)
    with pytest.raises(NumericalError, match="must rise and stay in"):
        tasks.LearningCurves(tuple(FORMULAS)).sample(500, 10, 1, source())
