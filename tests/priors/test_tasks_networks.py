"""Random networks, models of the project and mixtures as priors over tasks.

Second moments are held to five standard errors (one false alarm in two million each), laws to one in 100 000.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import bayesdl as bdl
from bayesdl import kernels, priors
from bayesdl.errors import SettingError
from bayesdl.priors import _tasks_network, tasks
from tests.priors.task_laws import P_VALUE, assert_follows, distances, rbf, source, whitened


def assert_mean(values, target: float) -> None:
    """The mean of independent values within five of its standard errors of `target`."""
    values = np.asarray(values, dtype=np.float64)
    assert abs(values.mean() - target) < 5 * values.std() / math.sqrt(values.size)


def linear_network(**settings) -> tasks.NeuralNetwork:
    """One hidden layer of 9 linear units, weights of scale 0.4, no warp: all variances are known."""
    given = {"inner_noise_scale": (0.0, 0.0), "noise_scale": (0.0, 0.0), "sparsity": 0.0, **settings}
    return tasks.NeuralNetwork((1, 1), (9, 9), (0.4, 0.4), activation="identity", warp=None, **given)


def at(rows: list) -> object:
    return lambda batch, n, d, generator: (
        torch.tensor(rows).expand(batch, n, d) if n == len(rows) else torch.rand(batch, n, d, generator=generator)
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_a_linear_network_has_the_variance_of_its_weights(sparsity) -> None:
    """Var f = s^2 (9 s^2 (|x|^2 + 1) + 1), whatever share of the weights is missing."""
    x = [[0.3, -1.2], [2.0, 0.5]]
    drawn = linear_network(sparsity=sparsity, inputs=at(x)).sample(8000, 2, 2, source())
    f = drawn.noiseless * drawn.latents["scale"].unsqueeze(-1) + drawn.latents["shift"].unsqueeze(-1)
    for column, row in zip(f.T.double(), x, strict=True):
        norm = sum(v * v for v in row)
        assert_mean(column.square(), 0.16 * (9 * 0.16 * (norm + 1) + 1))
        assert_mean(column, 0.0)


def test_noise_enters_where_it_should() -> None:
    """Inside: 9 s^2 times its variance reaches the output. Outside: as it is, in the units of f."""
    drawn = linear_network(inner_noise_scale=(0.3, 0.3)).sample(4000, 2, 1, source())
    difference = (drawn.y - drawn.noiseless) * drawn.latents["scale"].unsqueeze(-1)
    assert_mean(difference[:, 0].double().square(), 9 * 0.16 * 0.09)
    drawn = linear_network(noise_scale=(0.2, 0.5)).sample(4000, 2, 1, source())
    difference = (drawn.y - drawn.noiseless) * drawn.latents["scale"].unsqueeze(-1)
    assert_follows(difference / drawn.latents["noise_scale"].unsqueeze(-1), stats.norm())
    assert_follows(drawn.latents["noise_scale"], stats.uniform(0.2, 0.3))


def test_missing_weights_are_missing_and_the_others_larger() -> None:
    eye = torch.eye(60).expand(20, 60, 60)
    out = _tasks_network.dense(eye, 50, torch.full((20,), 0.3), 0.25, source())
    # rows of the identity give W + b; differences of rows that are both missing are 0
    difference = out[:, 0] - out[:, 1]
    assert abs(float((difference == 0).double().mean()) - 0.25**2) < 5 * math.sqrt(0.0625 / 1000)
    assert_mean(difference.double().square(), 2 * 0.09)


def test_depth_width_and_scales_have_their_published_ranges() -> None:
    """Depth and width once a group, uniform: chi-square and Kolmogorov-Smirnov over 200 calls."""
    prior = tasks.NeuralNetwork()
    drawn = [prior.sample(1, 1, 1, source(seed)).latents for seed in range(200)]
    depth, width = (torch.cat([latents[name] for latents in drawn]) for name in ("depth", "width"))
    counts = torch.bincount(depth - 8, minlength=8)
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > P_VALUE
    assert_follows((width.double() + torch.rand(200, generator=source()) - 36) / 115, stats.uniform())
    for name, low, high in (
        ("weight_scale", 0.0890, 0.1929),
        ("noise_scale", 3.6e-4, 1.34e-3),
        ("inner_noise_scale", 3.1e-4, 1.38e-3),
    ):
        assert_follows(torch.cat([latents[name] for latents in drawn]), stats.uniform(low, high - low))
    warp = torch.cat([latents["warp"] for latents in drawn])
    assert_follows(warp[:, 0], stats.lognorm(0.976))
    assert_follows(warp[:, 1], stats.lognorm(0.8))


def test_architectures_are_shared_by_groups() -> None:
    latents = tasks.NeuralNetwork((1, 3), (2, 30), architectures=4).sample(10, 2, 1, source()).latents
    pairs = list(zip(latents["depth"].tolist(), latents["width"].tolist(), strict=True))
    assert 1 < len(set(pairs)) <= 4
    assert pairs == sorted(pairs, key=pairs.index)


def test_targets_of_networks_are_of_unit_size() -> None:
    y = tasks.NeuralNetwork((3, 5), (20, 40), architectures=4).sample(200, 80, 2, source()).y
    assert 0.7 < float(y.var(-1).median()) < 1.3
    assert abs(float(y.mean())) < 0.1


def test_tanh_networks_saturate_and_linear_ones_do_not() -> None:
    settings = {"depth": (1, 1), "width": (50, 50), "weight_scale": (3.0, 3.0), "warp": None}
    for activation, bounded in (("tanh", True), ("identity", False), ("relu", False)):
        prior = tasks.NeuralNetwork(**settings, activation=activation, inputs=at([[1e3], [-1e3], [1e6], [-1e6]]))
        y = prior.sample(30, 4, 1, source()).noiseless
        ratio = (y[:, 2] - y[:, 3]).abs() / (y[:, 0] - y[:, 1]).abs()
        assert (float(ratio.median()) < 1.1) == bounded


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"depth": 3}, "depth must be a pair"),
        ({"depth": (5, 3)}, "depth must be"),
        ({"width": (0, 3)}, "width must be an integer of at least 1"),
        ({"sparsity": 1.0}, "sparsity must be below 1"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"architectures": 0}, "architectures must be an integer of at least 1"),
        ({"warp": 0.3}, "warp must be None or"),
    ],
)
def test_a_wrong_setting_is_refused(settings, complaint) -> None:
    with pytest.raises(SettingError, match=complaint):
        tasks.NeuralNetwork(**settings)


def gp_model(**settings) -> bdl.GP:
    lengthscale = priors.LogNormal(-0.5, 0.4)
    kernel = kernels.Scale(kernels.RBF(lengthscale_prior=lengthscale), outputscale_prior=priors.Gamma(3.0, 1.5))
    return bdl.GP(kernel, **settings)


def test_a_gaussian_process_model_is_a_prior_over_tasks() -> None:
    likelihood = bdl.Gaussian(prior=priors.LogNormal(-2.0, 0.3))
    drawn = tasks.ModelTasks(gp_model(likelihood=likelihood)).sample(500, 5, 2, source())
    latents = drawn.latents
    assert_follows(latents["kernel.base.lengthscale"], stats.lognorm(0.4, scale=math.exp(-0.5)))
    assert_follows(latents["kernel.outputscale"], stats.gamma(3, scale=1 / 1.5))
    assert_follows(latents["noise_variance"], stats.lognorm(0.3, scale=math.exp(-2)))
    r = distances(drawn.x.double().numpy(), latents["kernel.base.lengthscale"].numpy())
    k = latents["kernel.outputscale"].numpy()[:, None, None] * rbf(r)
    noise = latents["noise_variance"].numpy()[:, None, None] * np.eye(5)
    assert_follows(whitened(drawn.y, k + noise), stats.norm())
    assert_follows((drawn.y - drawn.noiseless) / latents["noise_variance"].sqrt().unsqueeze(-1), stats.norm())


def test_a_network_model_is_a_prior_over_tasks() -> None:
    """Values at two points against the model's own prior draws, in two-sample tests."""
    model = bdl.BNN(hidden=(6,), prior=priors.Laplace(scale=1.5), likelihood=bdl.Gaussian(prior=priors.Gamma(4.0, 9.0)))
    x = [[0.4, -1.0], [1.5, 0.2]]
    drawn = tasks.ModelTasks(model, inputs=at(x)).sample(3000, 2, 2, source())
    own = model.sample_prior(torch.tensor(x), 3000, source(1))
    for view in (lambda f: f[:, 0], lambda f: f[:, 1], lambda f: f[:, 0] - f[:, 1]):
        assert stats.ks_2samp(view(drawn.noiseless), view(own)).pvalue > P_VALUE
    assert_follows(drawn.latents["noise_variance"], stats.gamma(4, scale=1 / 9))
    noise = (drawn.y - drawn.noiseless) / drawn.latents["noise_variance"].sqrt().unsqueeze(-1)
    assert_follows(noise, stats.norm())


@pytest.mark.parametrize("kind", ["gp", "bnn"])
def test_labels_are_drawn_from_the_likelihood_of_the_model(kind) -> None:
    """The sum of 1{y = c} - p_c over all points, within five standard errors."""
    likelihoods = bdl.Bernoulli(), bdl.Categorical(4)
    for likelihood in likelihoods:
        model = gp_model(likelihood=likelihood) if kind == "gp" else bdl.BNN(hidden=(5,), likelihood=likelihood)
        drawn = tasks.ModelTasks(model).sample(1500, 3, 2, source())
        f = drawn.latents["f"].double()
        p = f.softmax(-1) if f.ndim == 3 else torch.stack([(-f).sigmoid(), f.sigmoid()], -1)
        assert drawn.y.dtype == torch.int64
        assert torch.equal(drawn.noiseless, p.argmax(-1))
        for c in range(p.shape[-1]):
            excess = ((drawn.y == c).double() - p[..., c]).flatten()
            assert abs(float(excess.sum())) < 5 * float((p[..., c] * (1 - p[..., c])).sum().sqrt())
        # and in the direction of f, not only on average
        assert float(p.gather(-1, drawn.y.unsqueeze(-1)).mean()) > float(p.square().sum(-1).mean()) - 0.03


def test_the_classes_of_a_gaussian_process_are_independent_functions() -> None:
    f = tasks.ModelTasks(gp_model(likelihood=bdl.Categorical(3))).sample(2000, 2, 1, source()).latents["f"]
    scale = torch.corrcoef(f[:, 0].T)
    assert float((scale - torch.eye(3)).abs().max()) < 5 / math.sqrt(2000) * 1.5


def test_a_model_that_takes_one_x_shares_it_among_the_tasks() -> None:
    class Lines:
        """f(x) = a x with a ~ N(0, 4)."""

        def sample_prior(self, x, num, generator):
            a = 2 * torch.randn(num, 1, generator=generator, dtype=x.dtype)
            return a * x[:, 0]

    drawn = tasks.ModelTasks(Lines()).sample(2000, 6, 1, source())
    assert bool((drawn.x == drawn.x[:1]).all())
    assert torch.equal(drawn.y, drawn.noiseless)
    assert_follows(drawn.y[:, 2] / drawn.x[0, 2, 0], stats.norm(scale=2))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(SettingError, match="model must be a prior over functions"):
        tasks.ModelTasks(kernels.RBF())


def test_a_mixture_takes_each_task_from_one_part() -> None:
    """Shares within five standard errors; every task has the noise of its part, and the causes of no other."""
    parts = (
        tasks.HyperGP(noise_variance=0.01),
        tasks.FixedGP(kernels.RBF(), noise_variance=0.25, inputs="unit"),
        tasks.NeuralNetwork((1, 1), (5, 5)),
    )
    drawn = tasks.Mixture(parts, weights=(2.0, 1.0, 1.0)).sample(2000, 3, 2, source())
    part = drawn.latents["part"]
    share = torch.bincount(part, minlength=3) / 2000
    assert float((share - torch.tensor([0.5, 0.25, 0.25])).abs().max()) < 5 * math.sqrt(0.25 / 2000)
    noise = (drawn.y - drawn.noiseless).double()
    assert_follows(noise[part == 0], stats.norm(scale=0.1))
    assert_follows(noise[part == 1], stats.norm(scale=0.5))
    assert float(drawn.x[part == 1].min()) >= 0
    assert float(drawn.x[part == 0].min()) < -1.5
    assert bool((drawn.latents["depth"] == torch.where(part == 2, 1, -1)).all())
    assert bool((drawn.latents["weight_scale"].isnan() == (part != 2)).all())
    # in no order that a split of the batch could feel
    assert 0.3 < float((part[:1000] == 0).double().mean()) < 0.7


def test_a_mixture_of_one_is_that_prior() -> None:
    drawn = tasks.Mixture((tasks.Tabular(),)).sample(5, 9, 2, source())
    assert drawn.y.dtype == torch.int64


def test_regression_and_classes_do_not_mix() -> None:
    with pytest.raises(SettingError, match="targets of one kind"):
        tasks.Mixture((tasks.Tabular(), tasks.HyperGP())).sample(50, 5, 2, source())


@pytest.mark.parametrize(
    ("given", "complaint"),
    [(((),), "priors is empty"), (((kernels.RBF(),),), "priors must hold"), (((tasks.HyperGP(),), (1, 2)), "weights")],
)
def test_a_wrong_mixture_is_refused(given, complaint) -> None:
    with pytest.raises(SettingError, match=complaint):
        tasks.Mixture(*given)
