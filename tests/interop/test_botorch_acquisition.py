"""Improvement in closed form against numerical integration, information against brute force, Thompson maxima."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement as StockLogExpectedImprovement
from botorch.acquisition.thompson_sampling import PathwiseThompsonSampling
from botorch.exceptions.errors import UnsupportedError
from botorch.optim import optimize_acqf
from scipy import integrate, stats

from bayesdl.distributions import Empirical, GaussianMixture, Normal, StudentT
from bayesdl.distributions.improvement import (
    expected_improvement,
    log_expected_improvement,
    log_probability_of_improvement,
)
from bayesdl.errors import SettingError, ShapeError
from bayesdl.interop.botorch import (
    BALD,
    ExpectedImprovement,
    LogExpectedImprovement,
    LogProbabilityOfImprovement,
    ProbabilityOfImprovement,
    thompson_maxima,
    to_botorch,
)
from bayesdl.likelihoods import Bernoulli, Categorical
from bayesdl.models import BNN
from tests.interop.test_botorch import scale_mixture
from tests.posterior.toys import draws_posterior, gp_posterior, labels, new_points, toy_data

F64 = torch.float64


def double(value):
    return torch.tensor(value, dtype=F64)


def student_t(dof, z, scale=0.7, best=2.0):
    return StudentT(double(dof), double(best + z * scale), double(scale))


@pytest.mark.parametrize("dof", [1.5, 3.0, 7.3, 60.0])
@pytest.mark.parametrize("z", [4.0, 0.3, -0.9, -1.1, -6.0, -200.0])
def test_student_t_improvement_is_the_integral(dof, z):
    """E[(Y - t)+] and P(Y > t) by SciPy's quadrature of its own density, on a scale that suits the tail."""
    d = student_t(dof, z)
    law = stats.t(dof)
    a = -z
    unit = abs(a) + math.sqrt(dof)

    def tail(power):
        # s = unit u / (1 - u) maps the half line to [0, 1); relative to the density at the threshold
        def integrand(u):
            s = unit * u / (1 - u)
            return (s**power) * math.exp(law.logpdf(a + s) - law.logpdf(a)) * unit / (1 - u) ** 2

        return integrate.quad(integrand, 0, 1, epsabs=0, epsrel=1e-9, limit=100)[0]

    rise = math.log(tail(1)) + law.logpdf(a) + math.log(0.7)
    assert float(log_expected_improvement(d, 2.0)) == pytest.approx(rise, abs=2e-8)
    assert float(log_probability_of_improvement(d, 2.0)) == pytest.approx(math.log(tail(0)) + law.logpdf(a), abs=2e-8)
    assert float(expected_improvement(d, 2.0)) == pytest.approx(math.exp(rise), rel=2e-8)


@pytest.mark.parametrize("make", [student_t, lambda dof, z: Normal(double(2 + 0.7 * z), double(0.7))])
@pytest.mark.parametrize("z", [3.0, -0.99, -1.01, -30.0, -5e3])
def test_slopes_of_the_logs_are_finite_differences(make, z):
    """In location and scale, on both sides of where the formula changes and far into the tail."""
    for function in (log_expected_improvement, log_probability_of_improvement):
        base = make(5.5, z)

        def at(loc, scale, base=base, function=function):
            kind = StudentT(base.dof, loc, scale) if isinstance(base, StudentT) else Normal(loc, scale)
            return function(kind, 2.0)

        loc, scale = base.loc.clone().requires_grad_(), base.scale.clone().requires_grad_()
        slopes = torch.autograd.grad(at(loc, scale), (loc, scale))
        for i, slope in enumerate(slopes):
            h = 1e-5 * float((loc, scale)[i].detach().abs())
            step = [double(0.0), double(0.0)]
            step[i] = double(h)
            up = at(loc.detach() + step[0], scale.detach() + step[1])
            down = at(loc.detach() - step[0], scale.detach() - step[1])
            assert float(slope) == pytest.approx(float((up - down) / (2 * h)), rel=1e-5, abs=1e-7)


def test_normal_and_mixture_improvement_agree_with_integrals_and_with_botorch():
    """Normal from z = 3 to z = -1e6 against BoTorch's own helper; a mixture as the mean of its parts; draws."""
    from botorch.acquisition.analytic import _log_ei_helper

    z = torch.tensor([3.0, 0.0, -0.99, -1.01, -5.0, -40.0, -999.0, -1001.0, -1e6], dtype=F64)
    told = log_expected_improvement(Normal(2 + 0.3 * z, double(0.3).expand(9)), 2.0)
    # the helper loses digits where its own expansion ends, near -1e3
    torch.testing.assert_close(told, _log_ei_helper(z) + math.log(0.3), rtol=1e-9, atol=1e-9)
    mixture = GaussianMixture(
        torch.tensor([0.0, 1.5, 4.0], dtype=F64), torch.tensor([0.4, 1.0, 0.2], dtype=F64), double([0.5, 0.4, 0.1])
    )
    law = [stats.norm(m, s) for m, s in zip((0.0, 1.5, 4.0), (0.4, 1.0, 0.2), strict=True)]
    rise = sum(
        w * integrate.quad(lambda y, p=p: (y - 2.2) * p.pdf(y), 2.2, np.inf)[0]
        for w, p in zip((0.5, 0.4, 0.1), law, strict=True)
    )
    assert float(expected_improvement(mixture, 2.2)) == pytest.approx(rise, rel=1e-8)
    chance = sum(w * p.sf(2.2) for w, p in zip((0.5, 0.4, 0.1), law, strict=True))
    assert float(log_probability_of_improvement(mixture, 2.2).exp()) == pytest.approx(chance, rel=1e-10)
    draws = Empirical(torch.tensor([1.0, 3.0, 2.5, -4.0], dtype=F64))
    assert float(expected_improvement(draws, 2.2)) == pytest.approx((0.8 + 0.3) / 4)
    assert float(log_probability_of_improvement(draws, 2.2)) == pytest.approx(math.log(0.5))


def test_other_distributions_join_by_a_method():
    """A class with the protocol's methods is asked itself; one without is refused by name."""

    class Bars(torch.distributions.Distribution):
        arg_constraints = {}  # noqa: RUF012 - torch's own protocol

        def log_expected_improvement(self, threshold):
            return double(-1.25) * threshold

        def cdf(self, value):
            return double(0.75)

    assert float(log_expected_improvement(Bars(), 2.0)) == -2.5
    assert float(expected_improvement(Bars(), 2.0)) == pytest.approx(math.exp(-2.5))
    assert float(log_probability_of_improvement(Bars(), 2.0)) == pytest.approx(math.log(0.25))
    with pytest.raises(SettingError, match="Laplace"):
        log_expected_improvement(torch.distributions.Laplace(0.0, 1.0), 0.0)
    with pytest.raises(SettingError, match="one degree of freedom"):
        log_expected_improvement(student_t(0.9, 0.0), 2.0)


@pytest.mark.parametrize("maximize", [True, False])
def test_improvement_acquisitions_use_the_law_that_the_posterior_has(maximize):
    """GP: BoTorch's LogEI. Student-t: SciPy's t at the parameters of `predict`."""
    x, y = toy_data(n=7)
    at, best, sign = new_points(5, 1), 50.001, 1.0 if maximize else -1.0
    gp = to_botorch(gp_posterior(x, y))
    told = LogExpectedImprovement(gp, best, maximize)(at)
    wanted = StockLogExpectedImprovement(gp, double(best), maximize=maximize)(at)
    torch.testing.assert_close(told, wanted, rtol=1e-9, atol=1e-9)
    posterior = scale_mixture(x, y)
    model, law = to_botorch(posterior), posterior.predict(at, noise=False)
    rise, chance = ExpectedImprovement(model, best, maximize)(at), ProbabilityOfImprovement(model, best, maximize)(at)
    stock = StockLogExpectedImprovement(model, double(best), maximize=maximize)(at)
    for i in range(5):
        d = stats.t(float(law.dof[i]), sign * float(law.loc[i]), float(law.scale[i]))
        wanted = integrate.quad(lambda v, d=d: d.sf(v), sign * best, np.inf, epsabs=1e-13)[0]
        assert float(rise[i]) == pytest.approx(wanted, rel=1e-6)
        assert float(chance[i]) == pytest.approx(d.sf(sign * best), rel=1e-8)
    assert float((rise.log() - stock).abs().max()) > 1e-3  # what taking it for a Gaussian would have cost
    log_chance = LogProbabilityOfImprovement(model, best, maximize)(at)
    torch.testing.assert_close(log_chance, chance.log())


def test_improvement_acquisitions_say_what_they_take():
    """Members, several outputs, several points."""
    x, y = toy_data(k=2, n=7)
    with pytest.raises(UnsupportedError, match="one output"):
        LogExpectedImprovement(to_botorch(gp_posterior(x, y)), 0.0)
    with pytest.raises(SettingError, match="qLogExpectedImprovement"):
        LogExpectedImprovement(to_botorch(draws_posterior(x, y[:, 0])), 0.0)
    model = to_botorch(gp_posterior(x, y[:, 0]))
    with pytest.raises(AssertionError, match="q=1"):
        LogExpectedImprovement(model, 0.0)(new_points(2, 2))
    with pytest.raises(SettingError, match="view='samples'"):
        BALD(model)


def test_information_is_that_of_a_mixture_of_gaussians():
    """H[y] - E H[y | s] by quadrature of the mixture's density in one dimension; two points at once by Monte Carlo.

    Tolerance 2 % of the quadrature for one point; for two, 4 sd of 200 000 plain draws beside 3 %.
    """
    x, y = toy_data(n=9)
    posterior = draws_posterior(x, y, draws=6)
    model = to_botorch(posterior)
    at = new_points(3, 1)
    told = BALD(model, num_noise=64)(at)
    answer = model.posterior(at, observation_noise=True)
    root = float(answer.noise_variance.sqrt().reshape(-1)[0])
    for i in range(3):
        f = answer.values[i, :, 0, 0].numpy()
        grid = np.linspace(f.min() - 9 * root, f.max() + 9 * root, 20_001)
        density = stats.norm.pdf(grid[:, None], f, root).mean(1)
        entropy = -integrate.simpson(density * np.log(np.maximum(density, 1e-300)), x=grid)
        wanted = entropy - stats.norm(0, root).entropy()
        assert float(told[i]) == pytest.approx(wanted, rel=0.02, abs=1e-3)
    pair = new_points(2, seed=1)
    f = model.posterior(pair).values[..., 0].numpy()  # (S, 2)
    rng = np.random.default_rng(0)
    member = rng.integers(len(f), size=50_000)
    z = rng.normal(size=(50_000, 2))
    drawn = f[member] + root * z
    others = np.exp(-0.5 * (((drawn[:, None] - f) / root) ** 2).sum(-1)).mean(1)
    ratio = -0.5 * (z**2).sum(-1) - np.log(others)
    told = float(BALD(model, num_noise=64)(pair.unsqueeze(0)))
    assert abs(told - ratio.mean()) < 4 * ratio.std() / 50_000**0.5 + 0.03 * abs(told)
    joint = float(BALD(model, num_noise=64, X_pending=pair[1:])(pair[:1].unsqueeze(0)))
    assert joint == pytest.approx(told, rel=1e-12)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(3)])
def test_information_of_a_label_is_entropy_lost(likelihood):
    """Entropy of the mean probabilities less the mean entropy, by SciPy; two points at once are refused."""
    x, y = labels(likelihood, n=12)
    posterior = draws_posterior(x, y, model=BNN((4,), likelihood=likelihood))
    at = new_points(4, 1)
    model = to_botorch(posterior)
    told = BALD(model)(at)
    logits = model.posterior(at).values[..., 0, :]  # (4, S, outputs)
    p = torch.sigmoid(logits) if isinstance(likelihood, Bernoulli) else torch.softmax(logits, -1)
    p = (torch.cat([1 - p, p], -1) if p.shape[-1] == 1 else p).numpy()
    for i in range(4):
        wanted = stats.entropy(p[i].mean(0)) - stats.entropy(p[i], axis=-1).mean()
        assert float(told[i]) == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(UnsupportedError, match="one point"):
        BALD(model)(new_points(2, 2))


def test_thompson_maxima_are_maxima_of_single_functions():
    """No point of a fine grid is higher on the same function; values are those of the function; minima likewise."""
    from bayesdl._random import child_seeds

    g = torch.Generator().manual_seed(0)
    x = torch.rand(9, 1, generator=g, dtype=F64)
    y = torch.sin(9 * x[:, 0])
    bounds = double([[0.0], [1.0]])
    grid = torch.linspace(0, 1, 2001, dtype=F64).unsqueeze(-1)
    for posterior in (gp_posterior(x, y), draws_posterior(x, y)):
        for maximize in (True, False):
            place, value = thompson_maxima(posterior, bounds, 6, maximize=maximize, num_raw=64, seed=4)
            assert place.shape == (6, 1)
            assert value.shape == (6, 1)
            functions = posterior.functions(6, seed=child_seeds(child_seeds(4, 2)[0], 1)[0])
            heights = functions(grid)
            best = heights.max(-1).values if maximize else heights.min(-1).values
            sign = 1.0 if maximize else -1.0
            assert bool((sign * (value.squeeze(-1) - best) > -1e-6).all())
            torch.testing.assert_close(functions(place).diagonal(), value.squeeze(-1))
    with pytest.raises(ShapeError, match="bounds must have shape"):
        thompson_maxima(posterior, double([0.0, 1.0]), 6)


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("view", ["samples", "gaussian"])
def test_pathwise_thompson_sampling_takes_functions_of_the_posterior(view):
    """BoTorch's acquisition of one function for each point: values of one path are one function; new at each redraw."""
    x, y = toy_data(n=9)
    posterior = gp_posterior(x, y)
    model = to_botorch(posterior, view, num_samples=16)
    acquisition = PathwiseThompsonSampling(model)
    at = new_points(5, 2)
    first = acquisition(at)
    torch.testing.assert_close(acquisition(at[:3]), first[:3])
    acquisition.redraw(2)
    assert not torch.allclose(acquisition(at), first)
    low, high = x.min(0).values, x.max(0).values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line search of scipy may end early on so small a problem
        found, _ = optimize_acqf(acquisition, torch.stack([low, high]), q=2, num_restarts=2, raw_samples=8)
    assert found.shape == (2, 2)
