"""Posteriors as BoTorch models: the same moments as `predict`, the same numbers as BoTorch's own GP, exact updates."""

from __future__ import annotations

import math

import gpytorch
import numpy as np
import pytest
import torch
from botorch.acquisition import qExpectedImprovement, qLogNoisyExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.exceptions.errors import UnsupportedError
from botorch.models import SingleTaskGP
from botorch.models.transforms.input import InputPerturbation
from botorch.sampling import IIDNormalSampler, SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler
from gpytorch.constraints import Positive

from bayesdl.distributions import StudentT
from bayesdl.errors import NumericalError, NumericalWarning, SettingError, ShapeError
from bayesdl.interop.botorch import FusedModel, GaussianModel, MemberModel, MemberPosterior, fuse, to_botorch
from bayesdl.kernels import NNGP, RBF, Matern, Scale
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models import BNN, GP
from bayesdl.ops.solver import SolverConfig
from bayesdl.priors import InverseGamma
from tests.posterior.toys import draws_posterior, gp_posterior, labels, new_points, toy_data

F64 = torch.float64


def scale_mixture(x, y, *, concentration=1.3, rate=2.1, fixed_noise=False):
    """A scale mixture around the toy GP: IG(1.3, 2.1) on the scale, n small, so that its tails are heavy."""
    from bayesdl.posterior import FixedNoiseMixturePosterior, ScaleMixturePosterior
    from bayesdl.posterior._scale import Mixing

    method = "quadrature" if fixed_noise else "closed_form"
    mixing = Mixing(InverseGamma(concentration, rate), method, 40, 0, 0)
    kind = FixedNoiseMixturePosterior if fixed_noise else ScaleMixturePosterior
    return kind.mix(gp_posterior(x, y), mixing)


def sparse_posterior(x, y, *, likelihood=None):
    """A sparse posterior from its engine, at hyper-parameters away from the defaults."""
    from bayesdl.inference.sparse_gp import SparseGP

    regression = likelihood is None
    noise = Gaussian(noise_variance=0.2, lower=1e-9) if regression else likelihood
    model = GP(Scale(Matern(nu=1.5, lengthscale=0.9), outputscale=1.7), likelihood=noise)
    engine = SparseGP(model, num_inducing=6, num_steps=20, optimize=not regression, move_inducing=not regression)
    return engine.fit(x, y, seed=0)


def matrix_free_posterior(x, y):
    """Solves to 1e-12, so that what is compared is the formulas."""
    from bayesdl.inference.exact_gp import ExactGP

    config = SolverConfig(tolerance=1e-12, variance_tolerance=1e-12, rank=5)
    kernel = Scale(Matern(nu=1.5, lengthscale=0.9), outputscale=1.7)
    model = GP(kernel, likelihood=Gaussian(noise_variance=0.2, lower=1e-9))
    return ExactGP(model, solver=config, optimize=False).fit(x, y, seed=0)


CLOSED = {
    "gp": gp_posterior,
    "nngp": lambda x, y: gp_posterior(x, y, kernel=NNGP(depth=2, activation="erf")),
    "student_t": scale_mixture,
    "fixed_noise_mixture": lambda x, y: scale_mixture(x, y, fixed_noise=True),
    "sparse": sparse_posterior,
    "matrix_free": matrix_free_posterior,
}


def relative(a, b):
    return float(((a - b) / b).abs().max())


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("k", [None, 2])
def test_gaussian_view_has_the_moments_that_predict_has(kind, k):
    """Mean and variance of f and of y at t-batches of points, in the user's units, for one output and for two."""
    x, y = toy_data(k=k, n=9)
    posterior = CLOSED[kind](x, y)
    model = to_botorch(posterior)
    at = new_points(3, 2, 4)
    assert isinstance(model, GaussianModel)
    assert model.num_outputs == (k or 1)
    assert model.batch_shape == ()
    for noise in (False, True):
        told, wanted = model.posterior(at, observation_noise=noise), posterior.predict(at, noise=noise)
        mean, variance = (t if k else t.unsqueeze(-1) for t in (wanted.mean, wanted.variance))
        assert told.mean.shape == (3, 2, 4, k or 1)
        torch.testing.assert_close(told.mean, mean, rtol=1e-10, atol=1e-10)
        assert relative(told.variance, variance) < 1e-7


@pytest.mark.parametrize("kind", CLOSED)
def test_gaussian_view_has_the_covariance_of_joint_draws(kind):
    """Covariance of two outputs at three points against 40 000 joint draws; false alarms below 1e-6 at 6 sd."""
    x, y = toy_data(k=2, n=9)
    posterior = CLOSED[kind](x, y)
    at = new_points(3)
    law = to_botorch(posterior).posterior(at).distribution
    draws = posterior.sample(at, (20_000,), seed=3)
    flat = draws.mT.reshape(20_000, 6)  # output by output, as the law lays them out
    covariance = law.covariance_matrix
    spread = flat.std(0)
    gap = (torch.cov(flat.T) - covariance) / (spread[:, None] * spread)
    kurtosis = float(((flat - flat.mean(0)) / spread).pow(4).mean())
    assert float(gap.abs().max()) < 6 * (kurtosis / 20_000) ** 0.5
    assert float(covariance[:3, 3:].abs().max()) == 0.0


def test_members_view_has_the_moments_that_predict_has():
    """All members with equal weights: the mean and variance of `predict(noise=False)`, those of y with noise."""
    x, y = toy_data(k=2, n=9)
    posterior = draws_posterior(x, y, draws=7)
    model = to_botorch(posterior)
    at = new_points(3, 2, 4)
    assert isinstance(model, MemberModel)
    assert model.num_members == 14
    for noise in (False, True):
        told, wanted = model.posterior(at, observation_noise=noise), posterior.predict(at, noise=noise)
        torch.testing.assert_close(told.mean, wanted.mean)
        assert relative(told.variance, wanted.variance) < 1e-10
    matched = to_botorch(posterior, "gaussian").posterior(at)
    torch.testing.assert_close(matched.mean, told.mean)
    assert relative(matched.variance, model.posterior(at).variance) < 1e-8


@pytest.mark.parametrize("view", ["samples", "gaussian"])
def test_batches_of_data_sets_and_t_batches_broadcast(view):
    """Two data sets, test points with and without a batch of their own: each answers for itself."""
    x, y = toy_data((2,), n=9)
    posterior = gp_posterior(x, y)
    model = to_botorch(posterior, view, num_samples=16)
    assert model.batch_shape == (2,)
    shared, own = new_points(4), new_points(5, 2, 4)
    assert model.posterior(shared).mean.shape == (2, 4, 1)
    assert model.posterior(own).mean.shape == (5, 2, 4, 1)
    both = model.posterior(shared.expand(2, 4, 2)).mean
    torch.testing.assert_close(model.posterior(shared).mean, both)


# -- BoTorch's own GP as the judge --------------------------------------------------------------------------------


def single_task_gp(posterior):
    """BoTorch's SingleTaskGP with gpytorch's kernel, at the hyper-parameters of `posterior`, in the user's units."""
    units, values, data = posterior._units, posterior._values, posterior._data
    y_scale, x_scale = float(units.y_scale), units.x_scale.squeeze(0)
    covariance = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=2))
    noise = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=Positive())
    mean = gpytorch.means.ConstantMean()
    model = SingleTaskGP(
        data.x, data.y, likelihood=noise, covar_module=covariance, mean_module=mean, outcome_transform=None
    ).to(F64)
    kernel = {name.split(".")[-1]: v.reshape(-1) for name, v in values.items() if name.startswith("kernel.")}
    covariance.outputscale = kernel["outputscale"].squeeze() * y_scale**2
    covariance.base_kernel.lengthscale = kernel["lengthscale"] * x_scale
    noise.noise = values["noise_variance"].reshape(1) * y_scale**2
    mean.initialize(constant=posterior._constant.reshape(()) * y_scale + units.y_loc.reshape(()))
    return model.eval()


@pytest.fixture(scope="module")
def pair():
    """Our view and BoTorch's model of one posterior, x of unequal sizes, y of order one around 3."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(14, 2, generator=g, dtype=F64) * torch.tensor([4.0, 0.5], dtype=F64)
    y = 3.0 + torch.sin(2 * x[:, 0]) - x[:, 1] + 0.1 * torch.randn(14, generator=g, dtype=F64)
    posterior = gp_posterior(x, y, noise=0.1)
    return to_botorch(posterior), single_task_gp(posterior)


def box(*shape, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 2, generator=g, dtype=F64) * torch.tensor([4.0, 0.5], dtype=F64)


@pytest.mark.filterwarnings("ignore:qExpectedImprovement has known numerical issues")
def test_exact_gp_agrees_with_single_task_gp(pair):
    """Mean, joint covariance, noise, q-EI with the same base samples, noisy EI, their gradients: to 1e-8."""
    ours, theirs = pair
    at = box(3, 4)
    for noise in (False, True):
        a, b = ours.posterior(at, observation_noise=noise), theirs.posterior(at, observation_noise=noise)
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            a.distribution.covariance_matrix, b.distribution.covariance_matrix, rtol=1e-8, atol=1e-9
        )
    for kind, settings in ((qExpectedImprovement, {"best_f": 3.4}), (qLogNoisyExpectedImprovement, None)):
        values, slopes = [], []
        for model in (ours, theirs):
            extra = settings or {"X_baseline": box(6, seed=1), "prune_baseline": False, "cache_root": False}
            point = at.clone().requires_grad_()
            value = kind(model, sampler=SobolQMCNormalSampler(torch.Size([64]), seed=2), **extra)(point)
            slopes.append(torch.autograd.grad(value.sum(), point)[0])
            values.append(value.detach())
        torch.testing.assert_close(*values, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


def test_fantasies_agree_with_those_of_single_task_gp(pair):
    """Imagined observations at q = 2 points for each of three t-batches, four samples: mean and covariance."""
    ours, theirs = pair
    at, test = box(3, 2), box(4, 3, 5, seed=7)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=11)
    told = ours.fantasize(at, sampler)
    wanted = theirs.fantasize(at, SobolQMCNormalSampler(torch.Size([4]), seed=11))
    assert told.batch_shape == wanted.batch_shape == (4, 3)
    a, b = told.posterior(test), wanted.posterior(test)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(a.distribution.covariance_matrix, b.distribution.covariance_matrix, rtol=1e-7, atol=1e-9)


# -- conditioning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gp", "student_t", "matrix_free"])
@pytest.mark.parametrize("k", [None, 2])
def test_conditioning_is_the_posterior_of_all_data(kind, k):
    """In two steps, the second with samples of y, against `condition_on` of the posterior: means and variances."""
    x, y = toy_data(k=k, n=9)
    posterior = CLOSED[kind](x, y)
    more_x, more_y = toy_data(k=k, n=5, seed=3)
    more = more_y if k else more_y.unsqueeze(-1)
    model = to_botorch(posterior)
    assert model.conditioning == "exact"
    model = model.condition_on_observations(more_x[:2], more[:2])
    second = torch.stack([more[2:], more[2:] + 2e-3])
    model = model.condition_on_observations(more_x[2:], second)
    assert model.batch_shape == (2,)
    at = new_points(4)
    for i in range(2):
        more_y = torch.cat([more[:2], second[i]])
        wanted = posterior.condition_on(more_x, more_y if k else more_y.squeeze(-1)).predict(at, noise=False)
        mean, variance = (t if k else t.unsqueeze(-1) for t in (wanted.mean, wanted.variance))
        told = model.posterior(at)
        torch.testing.assert_close(told.mean[i], mean, rtol=1e-8, atol=1e-8)
        assert relative(told.variance[i], variance) < 1e-6


def test_conditioned_student_t_keeps_its_own_law():
    """`predictive` of the conditioned model is the Student-t of all data: degrees of freedom, location and scale."""
    x, y = toy_data(n=6)
    more_x, more_y = toy_data(n=3, seed=3)
    posterior = scale_mixture(x, y)
    at = new_points(1)
    told = to_botorch(posterior).condition_on_observations(more_x, more_y.unsqueeze(-1)).predictive(at)
    wanted = posterior.condition_on(more_x, more_y).predict(at, noise=False)
    assert isinstance(told, StudentT)
    for name in ("dof", "loc", "scale"):
        assert relative(getattr(told, name).squeeze(-1), getattr(wanted, name)) < 1e-8


def test_given_noise_is_used_for_each_value():
    """One value without doubt and one of no worth: f passes through the first, and the second changes nothing."""
    x, y = toy_data(n=9)
    model, at = to_botorch(gp_posterior(x, y)), new_points(2)
    told = model.condition_on_observations(
        at, torch.tensor([[50.02], [0.0]], dtype=F64), torch.tensor([[1e-12], [1e6]])
    )
    assert float(told.posterior(at[:1]).mean) == pytest.approx(50.02, abs=1e-6)
    alone = model.condition_on_observations(at[:1], torch.tensor([[50.02]], dtype=F64), torch.tensor([[1e-12]]))
    assert relative(told.posterior(new_points(5, seed=1)).mean, alone.posterior(new_points(5, seed=1)).mean) < 1e-6


def linear_members(num, *, num_features=20, seed=0):
    """S functions w' phi(x) with w ~ N(0, I / 20), as a posterior of nothing but its members."""
    g = torch.Generator().manual_seed(seed)
    frequency = torch.randn(1, num_features, generator=g, dtype=F64)
    phase = 6.0 * torch.rand(num_features, generator=g, dtype=F64)
    weights = torch.randn(num, num_features, generator=torch.Generator().manual_seed(seed + 100), dtype=F64)

    def features(x):
        return torch.cos(2.0 * x @ frequency + phase) * (2.0 / num_features) ** 0.5

    return features, weights


def test_the_first_points_are_drawn_alike_whatever_comes_after():
    """Of a Gaussian view whose outputs are correlated: what acquisitions need that compare new points with old ones."""
    x = torch.rand(6, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    y = torch.stack([x[:, 0] - x[:, 1], x.sum(-1)], -1)
    model = draws_posterior(x, y).to_botorch("gaussian")
    z = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    first, second = (model.posterior(torch.cat([x[:4], at])) for at in (x[4:5], x[5:]))
    assert first._covariance.shape[-3:] == (1, 10, 10)
    draws, others = (p.rsample_from_base_samples(torch.Size((4,)), z).detach() for p in (first, second))
    torch.testing.assert_close(draws[:, :4], others[:, :4])
    assert not torch.allclose(draws[:, 4:], others[:, 4:])
    many = torch.randn(20000, 5, 2, generator=torch.Generator().manual_seed(5), dtype=F64)
    drawn = first.rsample_from_base_samples(torch.Size((20000,)), many).detach()
    found = torch.cov(drawn.mT.flatten(-2).mT)  # output by output, as the covariance is; within 5 standard errors
    want = first._covariance[0].detach()
    scale = want.diagonal().sqrt()
    assert float(((found - want) / torch.outer(scale, scale)).abs().max()) < 5 * math.sqrt(2 / 20000)


@pytest.mark.parametrize(("num", "error", "spread"), [(64, 0.19, 0.05), (256, 0.08, 0.03), (1024, 0.04, 0.02)])
def test_kalman_conditioning_reaches_the_exact_posterior_where_reweighting_collapses(num, error, spread):
    """Twenty features, five observations of variance 0.01: error of the mean over the prior sd, and ratio of sds.

    Averages over ten draws of members, at 200 points: 0.09, 0.04 and 0.02 of the prior sd, and ratios of 0.99.
    """
    from bayesdl.interop._botorch_laws import Members
    from bayesdl.posterior import DrawsPosterior

    errors, ratios, sizes = [], [], []
    x = torch.linspace(-2.0, 2.0, 200, dtype=F64).unsqueeze(-1)
    seen = torch.tensor([[-1.6], [-0.7], [0.1], [0.9], [1.5]], dtype=F64)
    toy = draws_posterior(*(t[..., :1] if t.ndim == 2 else t for t in toy_data(n=9)))
    assert isinstance(toy, DrawsPosterior)
    for seed in range(10):
        features, weights = linear_members(num, seed=seed)
        truth = torch.randn(20, generator=torch.Generator().manual_seed(seed + 500), dtype=F64)
        y = features(seen) @ truth + 0.1 * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=F64)
        law = Members(toy, 1, 0)
        law._drawn = (lambda at, f=features, w=weights: w @ f(at).mT), num
        model = MemberModel(toy, law, law, seed)
        told = model.condition_on_observations(seen, y.unsqueeze(-1), torch.full((5, 1), 0.01)).posterior(x)
        a, b = features(seen), features(x)
        gain = b @ a.T @ torch.linalg.inv(a @ a.T + 0.01 * torch.eye(5, dtype=F64))
        mean, variance = gain @ y, (b * b).sum(-1) - (gain * (b @ a.T)).sum(-1)
        prior = float((b * b).sum(-1).mean().sqrt())
        errors.append(float((told.mean.squeeze(-1) - mean).square().mean().sqrt()) / prior)
        ratios.append(float(told.variance.squeeze(-1).sqrt().mean() / variance.sqrt().mean()))
        share = torch.softmax(-((y - weights @ a.T) ** 2).sum(-1) / 0.02, -1)
        sizes.append(float(1 / share.square().sum()))
    assert np.mean(errors) < error
    assert abs(np.mean(ratios) - 1) < spread
    assert np.median(sizes) < 2  # effective members that importance weights would leave, of all that there are


def test_members_of_a_gp_are_conditioned_exactly():
    """Matheron's rule with the exact covariance: 1000 members against the exact posterior; 5 sd, alarms below 1e-4."""
    x, y = toy_data(n=9)
    posterior = gp_posterior(x, y, noise=0.3)
    more_x, more_y = toy_data(n=3, seed=3)
    model = to_botorch(posterior, "samples", num_samples=1000)
    assert model.conditioning == "exact"
    at = new_points(4)
    told = model.condition_on_observations(more_x, more_y.unsqueeze(-1)).posterior(at)
    wanted = posterior.condition_on(more_x, more_y).predict(at, noise=False)
    # random features stand for the prior, which costs variance of its own besides that of 1000 draws
    standard_error = wanted.stddev / 1000**0.5
    assert float(((told.mean.squeeze(-1) - wanted.mean) / standard_error).abs().max()) < 5
    assert relative(told.variance.squeeze(-1), wanted.variance) < 0.25


def test_one_step_and_two_steps_of_kalman_agree_on_the_exact_covariance():
    """The errors that members are given belong to the points: conditioning in steps is conditioning at once."""
    x, y = toy_data(n=9)
    more_x, more_y = toy_data(n=4, seed=3)
    for model in (to_botorch(gp_posterior(x, y), "samples", num_samples=8), to_botorch(draws_posterior(x, y))):
        once = model.condition_on_observations(more_x, more_y.unsqueeze(-1))
        twice = model.condition_on_observations(more_x[:1], more_y[:1, None])
        twice = twice.condition_on_observations(more_x[1:], more_y[1:, None])
        at = new_points(3)
        torch.testing.assert_close(once.posterior(at).values, twice.posterior(at).values, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_conditioned_says_so():
    """Classification, parts of a model, a single member, wrong shapes; too many values warn."""
    x, y = toy_data(n=9)
    model = to_botorch(draws_posterior(x, y, draws=5))
    with pytest.warns(NumericalWarning, match="rank 9 at most"):
        model.condition_on_observations(new_points(6), torch.zeros(6, 1, dtype=F64))
    single = to_botorch(draws_posterior(x, y, chains=1, draws=1))
    with pytest.raises(SettingError, match="no spread"):
        single.condition_on_observations(new_points(1), torch.zeros(1, 1, dtype=F64))
    with pytest.raises(ShapeError, match="Y and noise must have shape"):
        model.condition_on_observations(new_points(2), torch.zeros(2, dtype=F64))
    two = to_botorch(gp_posterior(*toy_data(k=2, n=9)))
    with pytest.raises(NotImplementedError, match="condition that one"):
        two.subset_output([1]).condition_on_observations(new_points(1), torch.zeros(1, 1, dtype=F64))
    likelihood = Bernoulli()
    classes = to_botorch(draws_posterior(*labels(likelihood), model=BNN((4,), likelihood=likelihood)))
    assert classes.conditioning == "none"
    with pytest.raises(NotImplementedError, match="classifies"):
        classes.condition_on_observations(new_points(1), torch.zeros(1, 1, dtype=F64))


# -- what BoTorch asks of a model ---------------------------------------------------------------------------------


def test_outputs_can_be_selected_scalarised_and_noised():
    """output_indices, subset_output and a weighted sum of outputs agree between the two views of one ensemble."""
    x, y = toy_data(k=3, n=9)
    posterior = draws_posterior(x, y)
    at, weights = new_points(2, 4), torch.tensor([0.3, -1.0, 2.0], dtype=F64)
    for noise in (False, True):
        answers = []
        for view in ("samples", "gaussian"):
            model = to_botorch(posterior, view)
            whole = model.posterior(at, observation_noise=noise)
            some = model.posterior(at, output_indices=[2, 0], observation_noise=noise)
            part = model.subset_output([2, 0])
            assert part.num_outputs == 2
            for found in (some, part.posterior(at, observation_noise=noise)):
                torch.testing.assert_close(found.mean, whole.mean[..., [2, 0]])
                torch.testing.assert_close(found.variance, whole.variance[..., [2, 0]], rtol=1e-6, atol=0.0)
            total = model.posterior(
                at, observation_noise=noise, posterior_transform=ScalarizedPosteriorTransform(weights, offset=0.5)
            )
            answers.append((total.mean, total.variance))
        torch.testing.assert_close(answers[0][0], answers[1][0])
        torch.testing.assert_close(answers[0][1], answers[1][1], rtol=1e-6, atol=0.0)


def test_given_observation_noise_is_added():
    """A tensor of variances, for each point and output, in both views."""
    x, y = toy_data(k=2, n=9)
    at, noise = new_points(2, 3), torch.tensor([[0.5, 1.0], [2.0, 0.1], [0.0, 3.0]], dtype=F64)
    for posterior in (gp_posterior(x, y), draws_posterior(x, y)):
        model = to_botorch(posterior)
        told = model.posterior(at, observation_noise=noise).variance - model.posterior(at).variance
        torch.testing.assert_close(told, noise.expand(2, 3, 2), rtol=1e-6, atol=1e-9)


def test_one_sample_is_one_member_at_every_point():
    """Any sampler of BoTorch picks members, the same for all t-batches and however often it is asked."""
    x, y = toy_data(n=9)
    model = to_botorch(draws_posterior(x, y))
    at = new_points(6)
    values = model.posterior(at).values  # (10, 6, 1)
    for sampler in (SobolQMCNormalSampler, IIDNormalSampler):
        draw = sampler(torch.Size([32]), seed=3)
        joint = draw(model.posterior(at))
        member = (joint.unsqueeze(1) == values).all(-1).all(-1)
        assert bool((member.sum(1) == 1).all())  # each sample is one of the members, at all points
        alone = draw(model.posterior(at.unsqueeze(-2)))  # six t-batches of one point
        torch.testing.assert_close(alone.squeeze(-2), joint)
    own = get_sampler(model.posterior(at), torch.Size([64]))
    assert own.sample_shape == (10,)
    torch.testing.assert_close(own(model.posterior(at)), values)  # all of them, once
    few = get_sampler(model.posterior(at), torch.Size([4]))
    assert few(model.posterior(at)).shape == (4, 6, 1)


def test_noisy_samples_have_the_noise_that_is_asked_for():
    """Variance of 4096 noisy samples against the formula; and without a shared index, every element its own member."""
    x, y = toy_data(k=2, n=9)
    posterior = to_botorch(draws_posterior(x, y)).posterior(new_points(3), observation_noise=True)
    draws = SobolQMCNormalSampler(torch.Size([4096]), seed=0)(posterior)
    assert relative(draws.var(0), posterior.variance) < 0.1
    assert relative(draws.mean(0), posterior.mean) < 1e-4
    values = torch.arange(12.0, dtype=F64).reshape(2, 3, 2, 1)
    base = torch.special.ndtri(torch.tensor([[0.1, 0.9], [0.5, 0.5]], dtype=F64)).unsqueeze(-1)
    picked = MemberPosterior(values).rsample_from_base_samples(torch.Size([2]), base)
    wanted = torch.stack([torch.stack([values[0, 0], values[1, 2]]), torch.stack([values[0, 1], values[1, 1]])])
    torch.testing.assert_close(picked, wanted)


@pytest.mark.parametrize("view", ["samples", "gaussian"])
def test_float32_posteriors_answer_float64_questions(view):
    """The posterior works in its own dtype, the acquisition in that of X."""
    x, y = toy_data(n=9, dtype=torch.float32)
    model = to_botorch(draws_posterior(x, y), view)
    at = new_points(2, 3).requires_grad_()
    answer = model.posterior(at)
    assert answer.mean.dtype == F64
    (slope,) = torch.autograd.grad(answer.mean.sum() + answer.variance.sum(), at)
    assert slope.dtype == F64
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("view", ["samples", "gaussian"])
def test_posteriors_fuse_on_one_member_index(view):
    """A GP and an ensemble of two outputs as one model of three: each answers as alone, and is conditioned alone."""
    x, y = toy_data(n=9)
    two = toy_data(k=2, n=9, seed=4)[1]
    parts = [gp_posterior(x, y), draws_posterior(x, two, draws=20)]
    model = fuse(parts, view, num_samples=64)
    assert isinstance(model, FusedModel)
    assert model.num_outputs == 3
    at = new_points(2, 4)
    alone = [to_botorch(part, view, num_samples=64) for part in parts]
    wanted = alone[1].posterior(at)
    told = model.posterior(at, output_indices=[1, 2])
    torch.testing.assert_close(told.mean, wanted.mean)
    torch.testing.assert_close(told.variance, wanted.variance, rtol=1e-6, atol=0.0)
    if view == "samples":
        assert model.posterior(at).num_members == 40
    else:
        covariance = model.posterior(at).distribution.covariance_matrix
        assert float(covariance[..., :4, 4:].abs().max()) == 0.0
    more = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * 4e-3 + 50.0
    conditioned = model.condition_on_observations(new_points(2, 3, seed=2), more)
    assert conditioned.conditioning == "kalman"
    assert conditioned.batch_shape == (5, 2)
    assert conditioned.posterior(at).mean.shape == (5, 2, 4, 3)
    with pytest.raises(ShapeError, match="share their inputs"):
        fuse([parts[0], draws_posterior(x[:, :1], y)])


def test_classifications_answer_with_logits():
    """Members and sparse GPs of two and three classes: one output for each logit, and no noise."""
    for likelihood, outputs in ((Bernoulli(), 1), (Categorical(3), 3)):
        x, y = labels(likelihood, n=12)
        for posterior in (
            draws_posterior(x, y, model=BNN((4,), likelihood=likelihood)),
            sparse_posterior(x, y, likelihood=likelihood),
        ):
            model = to_botorch(posterior)
            answer = model.posterior(new_points(5, 2))
            wanted = posterior.predict(new_points(5, 2), noise=False)
            mean = wanted.mean if outputs > 1 else wanted.mean.unsqueeze(-1)
            assert model.num_outputs == outputs
            torch.testing.assert_close(answer.mean, mean)
            with pytest.raises(UnsupportedError, match="logits"):
                model.posterior(new_points(5, 2), observation_noise=True)


def test_perturbed_inputs_and_empty_batches_pass():
    """An input transform makes three points of each; no points at all give no values."""
    x, y = toy_data(n=9)
    for posterior in (gp_posterior(x, y), draws_posterior(x, y)):
        model = to_botorch(posterior)
        assert model.posterior(new_points(0)).mean.shape == (0, 1)
        model.input_transform = InputPerturbation(torch.zeros(3, 2, dtype=F64)).eval()
        model.eval()
        assert model.posterior(new_points(2, 4)).mean.shape == (2, 12, 1)


def test_views_and_their_limits_are_named():
    """A view that does not exist; a Gaussian of infinite variance; a multivariate normal of members."""
    x, y = toy_data(n=9)
    with pytest.raises(SettingError, match="view must be one of"):
        gp_posterior(x, y).to_botorch("exact")
    heavy = scale_mixture(x[:1], y[:1], concentration=0.1)
    with pytest.raises(NumericalError, match="finite variance"):
        heavy.to_botorch().posterior(new_points(2))
    with pytest.raises(AttributeError, match="view='gaussian'"):
        _ = draws_posterior(x, y).to_botorch().posterior(new_points(2)).distribution
    assert isinstance(gp_posterior(x, y).to_botorch("samples", num_samples=3, seed=4), MemberModel)


def test_seeds_give_the_same_members_again():
    """The same seed, the same functions; another seed, others."""
    x, y = toy_data(n=9)
    posterior, at = gp_posterior(x, y, kernel=Scale(RBF())), new_points(3)
    first, again, other = (to_botorch(posterior, "samples", num_samples=4, seed=s).posterior(at) for s in (1, 1, 2))
    assert torch.equal(first.values, again.values)
    assert not torch.allclose(first.values, other.values)
