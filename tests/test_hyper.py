"""Priors on hyper-parameters against SciPy, and the small record that carries them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl.errors import SettingError
from bayesdl.hyper import Gamma, HalfNormal, LogNormal, Parameter

PRIORS = {
    "lognormal": (LogNormal(-1.3, 0.7), stats.lognorm(s=0.7, scale=math.exp(-1.3))),
    "lognormal, wide": (LogNormal(2.0, 3.0), stats.lognorm(s=3.0, scale=math.exp(2.0))),
    "gamma": (Gamma(2.6, 3.5), stats.gamma(2.6, scale=1 / 3.5)),
    "gamma, unbounded at 0": (Gamma(0.4, 0.2), stats.gamma(0.4, scale=5.0)),
    "halfnormal": (HalfNormal(2.3), stats.halfnorm(scale=2.3)),
}


@pytest.fixture(params=PRIORS, ids=str)
def prior_and_judge(request):
    return PRIORS[request.param]


def test_log_prob_is_that_of_scipy(prior_and_judge):
    prior, judge = prior_and_judge
    value = torch.logspace(-3, 1, 40, dtype=torch.float64).reshape(8, 5)
    np.testing.assert_allclose(prior.log_prob(value), judge.logpdf(value.numpy()), rtol=1e-12, atol=1e-12)


def test_slope_is_the_derivative_of_log_prob(prior_and_judge):
    prior, _ = prior_and_judge
    value = torch.logspace(-3, 1, 40, dtype=torch.float64).requires_grad_()
    (by_autograd,) = torch.autograd.grad(prior.log_prob(value).sum(), value)
    torch.testing.assert_close(prior.slope(value.detach()), by_autograd, rtol=1e-12, atol=1e-12)


def test_typical_value_is_what_it_says(prior_and_judge):
    """Median of the log-normal and the half-normal, mean of the gamma."""
    prior, judge = prior_and_judge
    wanted = judge.mean() if isinstance(prior, Gamma) else judge.median()
    assert prior.typical == pytest.approx(wanted, rel=1e-12)


def test_draws_follow_the_prior(prior_and_judge):
    """Kolmogorov-Smirnov on 4000 draws at a fixed seed; fails one right implementation in 10 000."""
    prior, judge = prior_and_judge
    draws = prior.sample((100, 40), torch.Generator().manual_seed(1))
    assert draws.shape == (100, 40)
    assert draws.dtype == torch.float64
    assert stats.kstest(draws.flatten(), judge.cdf).pvalue > 1e-4
    again = prior.sample((100, 40), torch.Generator().manual_seed(1))
    assert torch.equal(draws, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_densities_keep_the_dtype(prior_and_judge, dtype):
    prior, _ = prior_and_judge
    value = torch.tensor([0.3, 2.0], dtype=dtype)
    assert prior.log_prob(value).dtype == dtype
    assert prior.slope(value).dtype == dtype


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (LogNormal, {"scale": 0.0}, "scale"),
        (LogNormal, {"scale": math.inf}, "scale"),
        (LogNormal, {"loc": math.nan}, "loc"),
        (LogNormal, {"loc": -math.inf}, "loc"),
        (Gamma, {"concentration": -1.0}, "concentration"),
        (Gamma, {"rate": math.nan}, "rate"),
        (HalfNormal, {"scale": -2.0}, "scale"),
    ],
)
def test_settings_that_define_no_density_are_refused(kind, settings, name):
    with pytest.raises(SettingError, match=f"{kind.__name__}: {name} must be"):
        kind(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parameter_gives_its_initial_value_in_its_shape(dtype):
    like = torch.zeros((), dtype=dtype)
    scalar = Parameter("noise", (), 0.3, None, 0.01)
    assert scalar.initial_tensor(like).shape == ()
    same = Parameter("lengthscale", (3,), 0.7).initial_tensor(like)
    assert same.tolist() == pytest.approx([0.7] * 3)
    assert same.dtype == dtype
    same[0] = 5.0  # its own memory, not one number seen three times
    assert same[1] == pytest.approx(0.7)
    each = Parameter("lengthscale", (3,), (0.1, 0.2, 0.4)).initial_tensor(like)
    assert each.tolist() == pytest.approx([0.1, 0.2, 0.4])


def test_a_prefix_changes_the_name_only():
    parameter = Parameter("scale", (2,), 0.3, HalfNormal(1.5), 1e-3)
    prefixed = parameter.prefixed("base").prefixed("0")
    assert prefixed == Parameter("0.base.scale", (2,), 0.3, HalfNormal(1.5), 1e-3)


@pytest.mark.parametrize(
    ("lower", "upper", "initial"),
    [(0.0, math.inf, 0.7), (0.3, math.inf, 0.7), (-math.inf, math.inf, -0.7), (0.2, 1.5, 0.7), (-math.inf, 2.0, -0.7)],
)
def test_a_parameter_moves_between_its_bounds(lower, upper, initial):
    p = Parameter("a", (3,), initial, None, lower, upper)
    u = torch.linspace(-3, 3, 9, dtype=torch.float64, requires_grad=True)
    value = p.constrained(u)
    assert bool(((value > lower) & (value < upper)).all())
    assert bool((value[1:] > value[:-1]).all())
    torch.testing.assert_close(p.unconstrained(value), u)
    torch.testing.assert_close(p.slope(u), torch.autograd.grad(value.sum(), u)[0])
    start = p.unconstrained(p.initial_tensor(u))
    assert p.constrained(start).tolist() == pytest.approx([initial] * 3)
    assert p.prefixed("k") == Parameter("k.a", (3,), initial, None, lower, upper)
