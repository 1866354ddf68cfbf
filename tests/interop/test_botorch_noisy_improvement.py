"""The faster qLogNEI has the values and the gradients of BoTorch's own, whatever the posterior."""

import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement, qLogNoisyExpectedImprovement
from botorch.acquisition.objective import GenericMCObjective
from botorch.sampling.get_sampler import get_sampler

import bayesdl as bdl
from bayesdl.interop._botorch_noisy_improvement import CachedLogNoisyExpectedImprovement, accelerate
from bayesdl.interop.botorch import to_botorch

# BoTorch prunes the observed points by draws from the global state
pytestmark = pytest.mark.touches_global_rng

MATERN = bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5, lengthscale=0.8), outputscale=1.7)
NOISY = bdl.Gaussian(noise_variance=0.05)
ENGINES = {
    "GP": bdl.ExactGP(bdl.GP(MATERN, likelihood=NOISY), optimize=False),
    "NNGP": bdl.ExactGP(bdl.GP(bdl.kernels.NNGP(depth=2, activation="erf"), likelihood=NOISY), optimize=False),
    "Student-t": bdl.ScaleMixture(bdl.GP(MATERN, likelihood=NOISY), num_starts=1),
    "Burr XII": bdl.ScaleMixture(bdl.GP(MATERN, likelihood=NOISY), bdl.priors.BurrXII(), num_starts=1),
    "members": bdl.Ensemble(bdl.BNN(hidden=(8,)), num_members=7, num_steps=30),
}


def data(n=12, d=2):
    g = torch.Generator().manual_seed(4)
    x = torch.rand(n, d, generator=g, dtype=torch.float64)
    return x, 40 + 7 * (5 * x[:, 0]).sin() * x[:, 1] + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)


def plain(model, x, **settings):
    """BoTorch's own, with draws that the models share."""
    sampler = get_sampler(model.posterior(x[:1]), torch.Size((32,)), seed=5)
    return qLogNoisyExpectedImprovement(model, x, sampler=sampler, cache_root=False, **settings)


def value_and_slope(acquisition, points):
    points = points.clone().requires_grad_(True)
    value = acquisition(points)
    return value.detach(), torch.autograd.grad(value.sum(), points)[0]


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_it_is_the_same_function(name, pending):
    """Values and gradients at points near and far, of whichever side of the joint factorisation they come from."""
    x, y = data()
    model = to_botorch(ENGINES[name].fit(x, y, seed=1))
    own = plain(model, x, prune_baseline=True, X_pending=x[:2] + 0.07 if pending else None)
    fast = accelerate(own)
    assert isinstance(fast, CachedLogNoisyExpectedImprovement)
    points = 1.4 * torch.rand(5, 1, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.2
    expected, got = value_and_slope(own, points), value_and_slope(fast, points)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-7)


def test_it_is_finite_at_an_observed_point_of_noise_free_data():
    """There, where the joint covariance is singular: value and gradient are numbers."""
    x, y = data()
    gp = bdl.GP(MATERN, likelihood=bdl.Gaussian(noise_variance=1e-8, lower=0.0))
    fast = accelerate(plain(to_botorch(bdl.ExactGP(gp, optimize=False).fit(x, y)), x))
    value, slope = value_and_slope(fast, x[:3].unsqueeze(-2))
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(slope).all())


def test_an_objective_is_kept():
    """Of what is minimised, whose draws are turned round."""
    x, y = data()
    model = to_botorch(ENGINES["GP"].fit(x, y))
    own = plain(model, x, objective=GenericMCObjective(lambda samples, X=None: -0.3 * samples[..., 0]))
    points = x[:4].unsqueeze(-2) + 0.11
    torch.testing.assert_close(accelerate(own)(points), own(points), rtol=1e-7, atol=1e-7)


def test_what_has_no_faster_form_is_left_alone():
    """Another acquisition, two outputs, and a model that was conditioned."""
    x, y = data()
    posterior = ENGINES["GP"].fit(x, y)
    model = to_botorch(posterior)
    other = qLogExpectedImprovement(model, best_f=45.0)
    seen = plain(model.condition_on_observations(x[:1] + 0.2, y[:1, None]), x)
    both = to_botorch(ENGINES["GP"].fit(x, torch.stack([y, -y], -1)))
    two = plain(both, x, objective=GenericMCObjective(lambda samples, X=None: samples.sum(-1)))
    for own in (other, seen, two):
        assert accelerate(own) is own
