"""The GP posterior against a dense closed form in NumPy and SciPy, written in the user's units throughout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.spatial.distance import cdist

import bayesdl
from bayesdl.data import training_data, units_of
from bayesdl.errors import DtypeError, ShapeError
from bayesdl.kernels import RBF
from bayesdl.posterior.closed_form import _root
from tests.posterior.toys import Y_OFFSET, Y_SCALE, gp_posterior, new_points, toy_data

SHAPES = [((), None), ((), 1), ((), 2), ((3,), None), ((3,), 2), ((2, 3), None)]


class Dense:
    """One data set and one output: everything from NumPy, and standardisation written into the hyper-parameters."""

    def __init__(self, posterior, x, y, place, output, units_from=None):
        has_outputs = y.ndim == x.ndim
        hyper = posterior.hyperparameters
        values = {name: v[place][output] if has_outputs else v[place] for name, v in hyper.items()}
        base_x, base_y = (x, y) if units_from is None else units_from
        base_x, base_y = base_x[place].numpy(), base_y[place].numpy()
        base_y = base_y[:, output] if has_outputs else base_y
        size = base_y.std()
        self.lengthscale = values["kernel.base.lengthscale"].numpy() * base_x.std(0)
        self.variance = float(values["kernel.outputscale"]) * size**2
        self.noise = float(values["noise_variance"]) * size**2
        self.mean = base_y.mean() + size * float(values["mean"])
        self.x, self.y = x[place].numpy(), y[place].numpy()
        self.y = self.y[:, output] if has_outputs else self.y
        self.factor = linalg.cho_factor(self.k(self.x, self.x) + self.noise * np.eye(len(self.y)))

    def k(self, a, b):
        r = np.sqrt(3) * cdist(a / self.lengthscale, b / self.lengthscale)
        return self.variance * (1 + r) * np.exp(-r)

    def moments(self, x):
        k_xs = self.k(self.x, x)
        mean = self.mean + k_xs.T @ linalg.cho_solve(self.factor, self.y - self.mean)
        return mean, self.k(x, x) - k_xs.T @ linalg.cho_solve(self.factor, k_xs)

    def log_evidence(self):
        covariance = self.k(self.x, self.x) + self.noise * np.eye(len(self.y))
        return stats.multivariate_normal(np.full(len(self.y), self.mean), covariance, allow_singular=False).logpdf(
            self.y
        )


def every(batch, k):
    """Places of data sets and outputs."""
    return [(place, output) for place in np.ndindex(*batch) for output in range(k or 1)]


def pick(value, lead, place, output, k):
    """One data set and output of an answer with `lead` sample axes: (*lead, s)."""
    value = value[(*[slice(None)] * lead, *place)]
    return value[..., output] if k else value


@pytest.mark.parametrize(("batch", "k"), SHAPES)
def test_predictions_are_the_closed_form_in_the_users_units(batch, k):
    x, y = toy_data(batch, k)
    posterior = gp_posterior(x, y)
    x_new = new_points(*batch, 5)
    latent, predictive = posterior.predict(x_new, noise=False), posterior.predict(x_new)
    assert predictive.batch_shape == (*batch, 5, *([k] if k else []))
    for place, output in every(batch, k):
        dense = Dense(posterior, x, y, place, output)
        mean, covariance = dense.moments(x_new[place].numpy())
        tolerance = {"rtol": 1e-9, "atol": 1e-9 * Y_SCALE}
        np.testing.assert_allclose(pick(latent.mean, 0, place, output, k), mean, **tolerance)
        np.testing.assert_allclose(pick(predictive.mean, 0, place, output, k), mean, **tolerance)
        np.testing.assert_allclose(pick(latent.variance, 0, place, output, k), covariance.diagonal(), rtol=1e-8)
        noisy = covariance.diagonal() + dense.noise
        np.testing.assert_allclose(pick(predictive.variance, 0, place, output, k), noisy, rtol=1e-8)


@pytest.mark.parametrize(("batch", "k"), SHAPES)
def test_log_evidence_is_the_density_of_the_targets_as_given(batch, k):
    x, y = toy_data(batch, k)
    posterior = gp_posterior(x, y)
    assert posterior.log_evidence.shape == batch
    for place in np.ndindex(*batch):
        wanted = sum(Dense(posterior, x, y, place, output).log_evidence() for output in range(k or 1))
        assert float(posterior.log_evidence[place]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("batch", "lead"), [((3,), ()), ((3,), (2, 3)), ((), (4,)), ((), (2, 3)), ((2, 3), (3,))])
def test_batch_axes_of_test_inputs_broadcast_with_those_of_the_data(batch, lead):
    x, y = toy_data(batch)
    posterior = gp_posterior(x, y)
    x_new = new_points(*lead, 4)
    whole = np.broadcast_shapes(batch, lead)
    predictive = posterior.predict(x_new)
    draws, functions = posterior.sample(x_new, (2,)), posterior.functions(3)(x_new)
    assert predictive.batch_shape == (*whole, 4)
    assert draws.shape == (2, *whole, 4)
    assert functions.shape == (3, *whole, 4)
    wide = x_new.expand(*whole, 4, 2)
    for place in np.ndindex(*whole):
        own = place[len(whole) - len(batch) :]
        mean, covariance = Dense(posterior, x, y, own, 0).moments(wide[place].numpy())
        np.testing.assert_allclose(predictive.mean[place], mean, rtol=1e-9)
        spread = np.sqrt(covariance.diagonal())
        # six standard deviations: a mix-up of data sets shows, chance does not (below 1e-7 over all these values)
        assert (np.abs(draws[:, *place].numpy() - mean) < 6 * spread).all()
        assert (np.abs(functions[:, *place].numpy() - mean) < 6 * spread).all()


def moment_errors(values, mean, covariance):
    """Draws (N, s) against moments, in standard errors that are taken from the draws."""
    n, centred = len(values), values - mean
    products = centred[:, :, None] * centred[:, None, :]
    of_mean = centred.mean(0) / (values.std(0) / n**0.5)
    of_covariance = (products.mean(0) - covariance) / (products.std(0) / n**0.5)
    return max(np.abs(of_mean).max(), np.abs(of_covariance).max())


@pytest.mark.parametrize(("batch", "k"), [((), None), ((2,), 2)])
@pytest.mark.parametrize("kind", ["sample", "functions"])
def test_draws_have_the_mean_and_covariance_of_the_closed_form(kind, batch, k):
    """3000 draws at 4 points, two of them near each other: 14 figures each within 5 standard errors, at a fixed seed;
    a right implementation fails with probability 1e-5 a data set and output."""
    x, y = toy_data(batch, k)
    posterior = gp_posterior(x, y)
    x_new = new_points(*batch, 4)
    x_new[..., 1, :] = 0.9 * x_new[..., 0, :] + 0.1 * x_new[..., 1, :]
    draws = (
        posterior.sample(x_new, (3000,), seed=4)
        if kind == "sample"
        else posterior.functions(3000, seed=4, num_features=64)(x_new)
    )
    for place, output in every(batch, k):
        mean, covariance = Dense(posterior, x, y, place, output).moments(x_new[place].numpy())
        assert moment_errors(pick(draws, 1, place, output, k).numpy(), mean, covariance) < 5


def test_drawn_functions_pass_near_the_data_as_the_noise_shrinks():
    x, y = toy_data()
    posterior = gp_posterior(x, y, noise=2e-6, spread=0.0)
    misses = posterior.functions(50, seed=1)(x) - y
    assert float(misses.abs().max()) < 6 * Y_SCALE * 2e-6**0.5 * 2


@pytest.mark.parametrize(("lengthscale", "noise"), [(0.3, 1e-6), (1.0, 2e-6), (3.0, 2e-8)])
def test_draws_at_nearly_noise_free_data_are_finite_and_as_wide_as_predicted(lengthscale, noise):
    """Posterior variances lie twelve orders below the prior's: rounding makes the covariance indefinite. Spreads of
    2000 draws have standard error 1.6 %; 10 % allows for the rounding."""
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    posterior = gp_posterior(x, torch.sin(3 * x[:, 0]), kernel=RBF(lengthscale=lengthscale), noise=noise, spread=0.0)
    draws = posterior.sample(x, (2000,), seed=3)
    latent = posterior.predict(x, noise=False)
    assert bool(torch.isfinite(draws).all())
    ratio = draws.std(0) / latent.stddev
    assert 0.9 < float(ratio.min()) < float(ratio.max()) < 1.1
    repeated = posterior.sample(x[:1].expand(30, 1), (5,))
    assert bool(torch.isfinite(repeated).all())


def test_draws_survive_a_covariance_that_no_jitter_mends():
    """The fallback has the nearest covariance, and other elements of a batch keep their Cholesky factor."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    covariance = a @ a.mT
    broken = covariance.clone()
    values, vectors = torch.linalg.eigh(covariance[1])
    values[:3] = torch.tensor([-1e-3, -1e-5, 0.0])
    broken[1] = (vectors * values) @ vectors.T
    root = _root(broken)
    torch.testing.assert_close(root[0], torch.linalg.cholesky(covariance[0]))
    nearest = (vectors * values.clamp_min(0)) @ vectors.T
    torch.testing.assert_close(root[1] @ root[1].mT, nearest, rtol=0, atol=1e-12)


# Conditioning


@pytest.mark.parametrize(("batch", "k"), [((), None), ((), 2), ((3,), None), ((3,), 2)])
@pytest.mark.parametrize("steps", [[4], [3, 5, 1], [1] * 20])
def test_conditioning_on_more_data_is_a_refit_at_the_same_hyperparameters(batch, k, steps):
    """Units too stay those of the first data, however different the later targets are."""
    total = 6 + sum(steps)
    x, y = toy_data(batch, k, n=total)
    axis = len(batch)
    y.narrow(axis, 6, total - 6).add_(10 * Y_SCALE)
    first = x.narrow(axis, 0, 6), y.narrow(axis, 0, 6)
    posterior = gp_posterior(*first)
    updated, at = posterior, 6
    for q in steps:
        updated = updated.condition_on(x.narrow(axis, at, q), y.narrow(axis, at, q))
        at += q
    refit = gp_posterior(x, y, units=units_of(training_data("toy", *first), standardize=True))
    x_new = new_points(*batch, 5)
    for noise in (False, True):
        got, wanted = updated.predict(x_new, noise=noise), refit.predict(x_new, noise=noise)
        torch.testing.assert_close(got.mean, wanted.mean, rtol=1e-9, atol=1e-9 * Y_SCALE)
        torch.testing.assert_close(got.stddev, wanted.stddev, rtol=1e-9, atol=1e-9 * Y_SCALE)
    torch.testing.assert_close(updated.log_evidence, refit.log_evidence, rtol=1e-9, atol=0)
    assert updated.diagnostics["num_data"] == total
    for place, output in every(batch, k):
        dense = Dense(updated, x, y, place, output, units_from=first)
        mean, covariance = dense.moments(x_new[place].numpy())
        latent = updated.predict(x_new, noise=False)
        np.testing.assert_allclose(pick(latent.mean, 0, place, output, k), mean, rtol=1e-9)
        np.testing.assert_allclose(pick(latent.variance, 0, place, output, k), covariance.diagonal(), rtol=1e-7)


def test_an_updated_posterior_is_whole_and_the_old_one_is_as_it_was(tmp_path):
    x, y = toy_data(n=8)
    posterior = gp_posterior(x[:6], y[:6])
    x_new = new_points(4)
    before = posterior.predict(x_new).mean
    updated = posterior.condition_on(x[6:].numpy(), y[6:].numpy())
    assert torch.equal(posterior.predict(x_new).mean, before)
    assert posterior.diagnostics["num_data"] == 6
    draws = updated.functions(2000, seed=3, num_features=64)(x_new).numpy()
    latent = updated.predict(x_new, noise=False)
    # 5 standard errors of 4 means: fails one right implementation in 400 000
    assert np.abs((draws.mean(0) - latent.mean.numpy()) / (draws.std(0) / 2000**0.5)).max() < 5
    updated.save(tmp_path / "updated.bdl")
    loaded = bayesdl.load(tmp_path / "updated.bdl")
    assert torch.equal(loaded.predict(x_new).mean, updated.predict(x_new).mean)
    again = loaded.condition_on(x[:2], y[:2] + Y_SCALE)
    assert again.diagnostics["num_data"] == 10
    assert updated.to_arviz().observed_data["y"].shape == (8,)


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [((2, 3), (2,)), ((2, 2), (2, 1)), ((3, 2, 2), (3, 2)), ((2, 2), (2, 2))],
    ids=["columns", "output axis", "batch axes", "outputs"],
)
def test_data_unlike_the_training_data_is_refused(x_shape, y_shape):
    posterior = gp_posterior(*toy_data())
    with pytest.raises(ShapeError, match=r"GPPosterior.condition_on: x and y must be like the training data"):
        posterior.condition_on(torch.ones(x_shape).double(), torch.ones(y_shape).double())


# The user's side


def test_float32_data_is_computed_in_float64_and_answered_in_float32():
    x, y = toy_data(dtype=torch.float32)
    exact = gp_posterior(x.double(), y.double())
    posterior = gp_posterior(x, y)
    x_new = new_points(4, dtype=torch.float32)
    predictive = posterior.predict(x_new)
    answers = [predictive.mean, predictive.variance, posterior.sample(x_new, (2,)), posterior.functions(2)(x_new)]
    assert all(a.dtype == torch.float32 for a in answers)
    wanted = exact.predict(x_new.double())
    torch.testing.assert_close(predictive.mean, wanted.mean.float(), rtol=0, atol=8e-6)  # two ulps at 50
    torch.testing.assert_close(predictive.stddev, wanted.stddev.float(), rtol=1e-5, atol=0)
    with pytest.raises(DtypeError, match=r"GPPosterior.predict: x must have the dtype of the training x"):
        posterior.predict(x_new.double())


def test_hyperparameters_have_the_shape_of_the_problem_and_are_copies():
    for (batch, k), lead in zip([((), None), ((), 2), ((3,), None), ((3,), 2)], [(), (2,), (3,), (3, 2)], strict=True):
        posterior = gp_posterior(*toy_data(batch, k))
        values = posterior.hyperparameters
        assert values["kernel.base.lengthscale"].shape == (*lead, 2)
        assert values["noise_variance"].shape == values["mean"].shape == lead
        before = posterior.predict(new_points(3)).mean
        for v in values.values():
            v.zero_()
        assert torch.equal(posterior.predict(new_points(3)).mean, before)


def test_far_from_the_data_the_posterior_is_the_prior():
    posterior = gp_posterior(*toy_data())
    values = posterior.hyperparameters
    far = posterior.predict(torch.full((1, 2), 1e9, dtype=torch.float64), noise=False)
    _, y = toy_data()
    spread = y.std(correction=0)
    assert float(far.mean) == pytest.approx(float(y.mean() + spread * values["mean"]), rel=1e-12)
    assert float(far.variance) == pytest.approx(float(spread**2 * values["kernel.outputscale"]), rel=1e-9)
    assert abs(float(far.mean) - Y_OFFSET) < 1


def test_nothing_is_asked_and_nothing_answered():
    posterior = gp_posterior(*toy_data())
    empty = new_points(0)
    assert posterior.predict(empty).mean.shape == (0,)
    assert posterior.functions(3)(empty).shape == (3, 0)
    assert posterior.sample(empty, (3,)).shape == (3, 0)


def test_answers_are_the_same_for_the_same_seed_only():
    posterior, x_new = gp_posterior(*toy_data()), new_points(3)
    for draw in (
        lambda seed: posterior.sample(x_new, (2,), seed=seed),
        lambda seed: posterior.functions(2, seed=seed)(x_new),
    ):
        assert torch.equal(draw(3), draw(3))
        assert not torch.equal(draw(3), draw(4))
        g = torch.Generator().manual_seed(3)
        assert not torch.equal(draw(g), draw(g))
