"""Weight priors against SciPy, and their scaling by fan-in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl import priors
from bayesdl.errors import SettingError

PRIORS = {
    "normal": (priors.Normal(scale=1.7), stats.norm()),
    "laplace": (priors.Laplace(), stats.laplace(scale=1 / math.sqrt(2))),
    "student-t": (priors.StudentT(dof=4.5), stats.t(4.5)),
    "student-t, heavy": (priors.StudentT(dof=0.8), stats.t(0.8)),
}


@pytest.fixture(params=PRIORS, ids=str)
def prior_and_judge(request):
    return PRIORS[request.param]


def toy_weights(dtype=torch.float64):
    return 3 * torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_log_prob_is_the_sum_over_weights(prior_and_judge):
    prior, judge = prior_and_judge
    z = toy_weights()
    np.testing.assert_allclose(prior.log_prob(z), judge.logpdf(z.numpy()).sum(-1), rtol=1e-12)
    assert prior.log_prob(z[0, 0]).shape == ()


def test_slope_is_the_derivative_of_log_prob(prior_and_judge):
    prior, _ = prior_and_judge
    z = toy_weights().requires_grad_()
    (by_autograd,) = torch.autograd.grad(prior.log_prob(z).sum(), z)
    torch.testing.assert_close(prior.slope(z.detach()), by_autograd, rtol=1e-12, atol=0)


def test_draws_follow_the_prior(prior_and_judge):
    """Kolmogorov-Smirnov on 4000 draws at a fixed seed; fails one right implementation in 10 000."""
    prior, judge = prior_and_judge
    for dtype in (torch.float32, torch.float64):
        z = prior.sample((50, 80), torch.Generator().manual_seed(4), dtype)
        assert z.shape == (50, 80)
        assert z.dtype == dtype
        assert bool(torch.isfinite(z).all())
        assert stats.kstest(z.double().flatten(), judge.cdf).pvalue > 1e-4


def test_densities_keep_the_dtype(prior_and_judge):
    prior, _ = prior_and_judge
    z = toy_weights(torch.float32)
    assert prior.log_prob(z).dtype == torch.float32
    assert prior.slope(z).dtype == torch.float32


@pytest.mark.parametrize("kind", [priors.Normal, priors.Laplace, priors.StudentT])
def test_scale_falls_with_the_root_of_fan_in_for_matrices_only(kind):
    prior = kind(scale=1.5, bias_scale=0.3)
    assert prior.scale_of(9) == pytest.approx(0.5)
    assert prior.scale_of(None) == 0.3
    assert kind(scale=1.5, bias_scale=0.3, fan_in=False).scale_of(9) == 1.5
    assert kind(scale=1.5).scale_of(None) == 1.5


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (priors.Normal, {"scale": 0.0}),
        (priors.Laplace, {"scale": math.inf}),
        (priors.Normal, {"bias_scale": -0.1}),
        (priors.StudentT, {"dof": 0.0}),
        (priors.StudentT, {"dof": math.nan}),
        (priors.StudentT, {"scale": "1"}),
    ],
)
def test_settings_that_define_no_density_are_refused(kind, settings):
    (name,) = settings
    with pytest.raises(SettingError, match=f"{kind.__name__}: {name} must be a finite number above 0"):
        kind(**settings)
