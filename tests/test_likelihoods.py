"""Likelihoods against torch.distributions; closed-form slopes against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

from bayesdl.errors import SettingError
from bayesdl.hyper import Gamma
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian

CASES = {"gaussian": Gaussian(), "bernoulli": Bernoulli(), "categorical": Categorical(4)}


def problem(likelihood, batch=(), n=6, k=2, draws=3, dtype=torch.float64):
    """f (*b, draws, n, outputs), y (*b, 1, n, k) and parameters (*b, draws, k)."""
    g = torch.Generator().manual_seed(3)
    k = 1 if likelihood.task == "multiclass" else k
    f = 3 * torch.randn(*batch, draws, n, likelihood.num_outputs(k), generator=g, dtype=dtype)
    y = torch.randn(*batch, 1, n, k, generator=g, dtype=dtype)
    if likelihood.task == "binary":
        y = (y > 0).to(dtype)
    if likelihood.task == "multiclass":
        y = torch.randint(likelihood.num_classes, y.shape, generator=g).to(dtype)
    params = {p.name: 0.05 + torch.rand(*batch, draws, k, generator=g, dtype=dtype) for p in likelihood.parameters()}
    return f, y, params


def judged(likelihood, f, y, params):
    """The sum over points and outputs, by torch.distributions."""
    if likelihood.task == "regression":
        scale = params["noise_variance"].sqrt().unsqueeze(-2)
        return distributions.Normal(f, scale).log_prob(y).sum((-2, -1))
    if likelihood.task == "binary":
        return distributions.Bernoulli(logits=f).log_prob(y.expand_as(f)).sum((-2, -1))
    return distributions.Categorical(logits=f).log_prob(y.squeeze(-1)).sum(-1)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_that_of_torch_distributions(name, batch):
    f, y, params = problem(CASES[name], batch)
    value = CASES[name].log_prob(f, y, params)
    assert value.shape == (*batch, 3)
    torch.testing.assert_close(value, judged(CASES[name], f, y, params), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("name", CASES)
def test_value_and_slope_are_those_of_autograd(name, batch, dtype):
    likelihood = CASES[name]
    f, y, params = problem(likelihood, batch, dtype=dtype)
    value, slope, slopes = likelihood.value_and_slope(f, y, params)
    f.requires_grad_()
    for p in params.values():
        p.requires_grad_()
    plain = judged(likelihood, f, y, params)
    gradients = torch.autograd.grad(plain.sum(), [f, *params.values()])
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(value, plain.detach(), **tolerance)
    torch.testing.assert_close(slope, gradients[0], **tolerance)
    assert slopes.keys() == params.keys()
    for name_of, gradient in zip(params, gradients[1:], strict=True):
        torch.testing.assert_close(slopes[name_of], gradient, **tolerance)


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_extreme_logits_give_finite_values_and_slopes(name):
    likelihood = CASES[name]
    f, y, params = problem(likelihood)
    for scale in (1e4, 1e300):
        value, slope, _ = likelihood.value_and_slope(scale * f, y, params)
        assert bool(torch.isfinite(value).all())
        assert bool(torch.isfinite(slope).all())
        assert bool((slope.abs() <= 1).all())


def test_the_closed_form_does_not_touch_its_arguments():
    for likelihood in CASES.values():
        f, y, params = problem(likelihood)
        before = [t.clone() for t in (f, y, *params.values())]
        likelihood.value_and_slope(f, y, params)
        assert all(torch.equal(a, b) for a, b in zip(before, (f, y, *params.values()), strict=True))


def test_gaussian_noise_starts_where_it_is_told():
    def start(**settings):
        (parameter,) = Gaussian(**settings).parameters()
        assert parameter.name == "noise_variance"
        assert parameter.shape == ()
        return parameter.initial

    assert start() == pytest.approx(math.exp(-4))
    assert start(prior=Gamma(2.0, 8.0)) == 0.25
    assert start(prior=None) > 0
    assert start(noise_variance=0.7) == 0.7
    assert start(prior=Gamma(2.0, 8.0), lower=0.5) > 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"lower": -1.0},
        {"lower": math.nan},
        {"noise_variance": 0.0},
        {"noise_variance": 1e-3, "lower": 1e-3},
        {"noise_variance": 1e-3, "lower": 1e-2},
        {"noise_variance": math.inf},
    ],
)
def test_a_noise_variance_at_or_below_its_bound_is_refused(settings):
    """At the bound itself log(noise_variance - lower), in which fits move, is minus infinity."""
    with pytest.raises(SettingError, match="Gaussian: "):
        Gaussian(**settings)


@pytest.mark.parametrize("num_classes", [1, 2.0, True, None])
def test_a_categorical_needs_two_classes(num_classes):
    with pytest.raises(SettingError, match="num_classes must be an integer of at least 2"):
        Categorical(num_classes)


def test_outputs_follow_targets_except_for_classes():
    assert Gaussian().num_outputs(3) == 3
    assert Bernoulli().num_outputs(2) == 2
    assert Categorical(7).num_outputs(1) == 7
