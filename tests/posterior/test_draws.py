"""Draws of networks as a posterior, against the mixture written out in NumPy and SciPy in the user's units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from bayesdl.distributions import Bernoulli as BernoulliPredictive
from bayesdl.distributions import Categorical as CategoricalPredictive
from bayesdl.distributions import Empirical
from bayesdl.errors import ShapeError
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models import BNN
from bayesdl.posterior import draws as draws_module
from bayesdl.posterior.base import member_indices
from bayesdl.priors import StudentT
from tests.posterior.toys import Y_SCALE, draws_posterior, labels, new_points, toy_data

MODEL = BNN((4,), "tanh", StudentT(1.5, bias_scale=0.6), Gaussian(lower=0.03))
SHAPES = [((), None), ((), 1), ((), 2), ((3,), None), ((3,), 2), ((2, 3), None)]


def written_out(posterior, x, y, place, x_new, outputs):
    """f (S, s, outputs) and noise deviations (S, outputs) of every draw in the user's units, by NumPy."""
    prior, regression = posterior.model.prior, posterior.model.likelihood.task == "regression"
    x, x_new = x[place].numpy(), x_new.numpy()
    y = y[place].numpy().reshape(len(x), -1)
    u = (x_new - x.mean(0)) / x.std(0)
    q = posterior.draws[place].flatten(0, 1).numpy()
    f, noise = [], []
    for row in q:
        h, at = u, 0
        for a, b in ((2, 4), (4, outputs)):
            matrix = row[at : at + a * b].reshape(a, b) * prior.scale / a**0.5
            bias = row[at + a * b : at + (a + 1) * b] * prior.scale_of(None)
            h, at = h @ matrix + bias, at + (a + 1) * b
            h = np.tanh(h) if b == 4 else h
        f.append(h * y.std(0) + y.mean(0) if regression else h)
        noise.append(
            np.sqrt(posterior.model.likelihood.lower + np.exp(row[at:])) * y.std(0) if regression else row[at:]
        )
    return np.stack(f), np.stack(noise)


@pytest.mark.parametrize(("batch", "k"), SHAPES)
def test_the_predictive_is_the_mixture_of_the_draws(batch, k):
    x, y = toy_data(batch, k)
    posterior = draws_posterior(x, y, model=MODEL)
    x_new, values = new_points(*batch, 5), toy_data(batch, k, n=5, seed=3)[1]
    predictive = posterior.predict(x_new)
    assert predictive.batch_shape == (*batch, 5, *([k] if k else []))
    for place in np.ndindex(*batch):
        f, noise = written_out(posterior, x, y, place, x_new[place], k or 1)
        mean, variance = f.mean(0), f.var(0) + np.square(noise).mean(0)
        at = values[place].numpy().reshape(5, -1)
        log_prob = special.logsumexp(stats.norm(f, noise[:, None]).logpdf(at), 0) - np.log(len(f))
        cdf = stats.norm(f, noise[:, None]).cdf(at).mean(0)
        for got, wanted in (
            (predictive.mean, mean),
            (predictive.variance, variance),
            (predictive.log_prob(values), log_prob),
            (predictive.cdf(values), cdf),
        ):
            np.testing.assert_allclose(got[place].reshape(5, -1), wanted, rtol=1e-9)


@pytest.mark.parametrize(("batch", "k"), SHAPES)
def test_latent_functions_are_the_members(batch, k):
    x, y = toy_data(batch, k)
    posterior = draws_posterior(x, y, model=MODEL)
    x_new = new_points(*batch, 5)
    latent = posterior.predict(x_new, noise=False)
    assert isinstance(latent, Empirical)
    for place in np.ndindex(*batch):
        f, _ = written_out(posterior, x, y, place, x_new[place], k or 1)
        np.testing.assert_allclose(latent.draws[place].movedim(-1, 0).reshape(f.shape), f, rtol=1e-10)
    everyone = posterior.functions(10, seed=0)(x_new)
    assert everyone.shape == (10, *batch, 5, *([k] if k else []))
    torch.testing.assert_close(everyone.sort(0).values, latent.draws.movedim(-1, 0).sort(0).values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(3)])
def test_class_probabilities_are_averages_of_probabilities(likelihood, batch):
    """Not the probabilities of an averaged logit, which are more confident."""
    x, y = labels(likelihood, batch)
    posterior = draws_posterior(x, y, model=BNN((4,), "tanh", StudentT(6.0), likelihood))
    x_new = new_points(*batch, 5)
    predictive = posterior.predict(x_new)
    outputs = likelihood.num_outputs(1)
    assert predictive.batch_shape == (*batch, 5)
    for place in np.ndindex(*batch):
        f, _ = written_out(posterior, x, y, place, x_new[place], outputs)
        if outputs == 1:
            assert isinstance(predictive, BernoulliPredictive)
            wanted, confident = special.expit(f).mean(0)[:, 0], special.expit(f.mean(0))[:, 0]
        else:
            assert isinstance(predictive, CategoricalPredictive)
            wanted, confident = special.softmax(f, -1).mean(0), special.softmax(f.mean(0), -1)
        np.testing.assert_allclose(predictive.probs[place], wanted, rtol=1e-10)
        assert np.abs(wanted - confident).max() > 0.01
        logits = posterior.predict(x_new, noise=False).draws[place].movedim(-1, 0).reshape(f.shape)
        np.testing.assert_allclose(logits, f, rtol=1e-10)


@pytest.mark.parametrize(("batch", "lead"), [((3,), ()), ((3,), (2, 3)), ((), (2, 3)), ((2, 3), (3,))])
def test_batch_axes_of_test_inputs_broadcast_with_those_of_the_data(batch, lead):
    x, y = toy_data(batch, 2)
    posterior = draws_posterior(x, y, model=MODEL)
    x_new = new_points(*lead, 4)
    whole = np.broadcast_shapes(batch, lead)
    predictive = posterior.predict(x_new)
    assert predictive.batch_shape == (*whole, 4, 2)
    assert posterior.sample(x_new, (2, 1)).shape == (2, 1, *whole, 4, 2)
    wide = x_new.expand(*whole, 4, 2)
    for place in np.ndindex(*whole):
        own = place[len(whole) - len(batch) :]
        f, noise = written_out(posterior, x, y, own, wide[place], 2)
        np.testing.assert_allclose(predictive.mean[place], f.mean(0), rtol=1e-9)
        np.testing.assert_allclose(predictive.variance[place], f.var(0) + np.square(noise).mean(0), rtol=1e-9)


def test_members_are_distinct_while_there_are_enough():
    posterior, x_new = draws_posterior(*toy_data(), model=MODEL), new_points(3)
    for seed in range(5):
        chosen = posterior.sample(x_new, (2, 4), seed=seed)
        assert len(chosen.reshape(8, 3).unique(dim=0)) == 8
    many = posterior.sample(x_new, (200,))
    assert len(many.unique(dim=0)) == 10
    assert torch.equal(posterior.sample(x_new, (4,), seed=2), posterior.functions(4, seed=2)(x_new))


def test_members_are_chosen_evenly():
    """Chi-squared over 10 members at a fixed seed; fails one right implementation in 10 000."""
    few = torch.cat([member_indices(10, 3, seed) for seed in range(400)])
    many = member_indices(10, 4000, 1)
    assert stats.chisquare(few.bincount(minlength=10)).pvalue > 1e-4
    assert stats.chisquare(many.bincount(minlength=10)).pvalue > 1e-4
    assert member_indices(10, 10, 0).sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("chunk", [1, 60, 10**9])
def test_the_size_of_chunks_does_not_change_a_prediction(chunk, monkeypatch):
    x, y = toy_data((2,))
    posterior = draws_posterior(x, y, model=MODEL)
    wanted = posterior.predict(new_points(7)).mean
    monkeypatch.setattr(draws_module, "_CHUNK", chunk)
    torch.testing.assert_close(posterior.predict(new_points(7)).mean, wanted, rtol=1e-14, atol=0)


def test_float32_draws_answer_in_float32():
    x, y = toy_data(dtype=torch.float32)
    posterior = draws_posterior(x, y, model=MODEL)
    x_new = new_points(4, dtype=torch.float32)
    predictive = posterior.predict(x_new)
    for value in (predictive.mean, predictive.variance, predictive.quantile(0.3), posterior.sample(x_new, (2,))):
        assert value.dtype == torch.float32
    f, noise = written_out(posterior, x.double(), y.double(), (), x_new.double(), 1)
    np.testing.assert_allclose(predictive.mean, f.mean(0)[:, 0], rtol=1e-6)
    # deviations of 0.004 around 50 carry half the digits of a float32
    np.testing.assert_allclose(predictive.variance, (f.var(0) + np.square(noise).mean(0))[:, 0], rtol=5e-3)


def test_predictions_are_differentiable_in_x():
    x, y = toy_data()
    posterior = draws_posterior(x, y, model=MODEL)
    point = new_points(2)
    unit = torch.tensor([300.0, 0.02], dtype=torch.float64)

    def answers(u):
        predictive = posterior.predict(u * unit)
        return torch.stack([predictive.mean, predictive.stddev, posterior.functions(1, seed=3)(u * unit)[0]]) / Y_SCALE

    assert torch.autograd.gradcheck(answers, (point / unit).requires_grad_(), atol=1e-4)


def test_the_draws_are_a_copy():
    x, y = toy_data()
    posterior = draws_posterior(x, y, model=MODEL)
    before = posterior.predict(new_points(3)).mean
    posterior.draws.zero_()
    assert posterior.draws.shape == (2, 5, 18)
    assert torch.equal(posterior.predict(new_points(3)).mean, before)


def test_draws_cannot_be_updated_and_say_what_can():
    posterior = draws_posterior(*toy_data(), model=MODEL)
    with pytest.raises(NotImplementedError, match=r"ByHand cannot be conditioned.*\n.*bdl.ExactGP"):
        posterior.condition_on(*toy_data(n=2))


def test_diagnostics_cannot_be_changed():
    posterior = draws_posterior(*toy_data(), model=MODEL)
    with pytest.raises(TypeError):
        posterior.diagnostics["seconds"] = 0
    assert posterior.log_evidence is None


def test_inputs_of_other_columns_are_refused():
    posterior = draws_posterior(*toy_data(), model=MODEL)
    for call in (posterior.predict, posterior.sample, posterior.functions(2)):
        with pytest.raises(ShapeError, match=r"DrawsPosterior\.\w+: x must have 2 columns"):
            call(torch.ones(4, 3).double())
