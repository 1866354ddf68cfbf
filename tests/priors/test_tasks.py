"""Priors over tasks: the contract that all of them keep, the laws of inputs, and Gaussian processes.

A Kolmogorov-Smirnov or whitening test at a fixed seed gives a false alarm once in 100 000 right implementations.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import bayesdl as bdl
from bayesdl import kernels, priors
from bayesdl.errors import NumericalError, SettingError, ShapeError
from bayesdl.priors import _tasks_base, _tasks_draws, tasks
from tests.priors.task_laws import arc_cosine, arc_sine, assert_follows, distances, matern, rbf, source, whitened

PRIORS = {
    "fixed": tasks.FixedGP(kernels.RBF(lengthscale=0.6), 0.3),
    "hyper": tasks.HyperGP(),
    "all families": tasks.HyperGP(_tasks_draws.FAMILIES, inputs="mixed"),
    "pgp-mix": tasks.HyperGP.pgp_mix(),
    "network gp": tasks.NetworkGP(),
    "student-t": tasks.StudentTProcess(),
    "hebo": tasks.HEBOPlus(linear=True, warp=(0.5, 0.5)),
    "network": tasks.NeuralNetwork(depth=(1, 3), width=(5, 20), architectures=3),
    "curves": tasks.LearningCurves(),
    "tabular": tasks.Tabular(),
    "gp model": tasks.ModelTasks(bdl.GP(kernels.Matern(nu=1.5))),
    "bnn model": tasks.ModelTasks(bdl.BNN(hidden=(7,), likelihood=bdl.Categorical(3))),
    "mixture": tasks.Mixture((tasks.HyperGP(), tasks.HEBOPlus()), (0.3, 0.7)),
}


@pytest.fixture(params=PRIORS, ids=str)
def prior(request):
    return PRIORS[request.param]


def width(prior) -> int:
    return 1 if isinstance(prior, tasks.LearningCurves) else 3


def spread_inputs(rows: list) -> object:
    """An input law that gives every task the same rows."""
    return lambda batch, n, d, generator: torch.tensor(rows, device=generator.device).expand(batch, n, d)


def test_a_batch_has_the_promised_shapes(prior) -> None:
    for batch, n in ((5, 11), (1, 1), (2, 3)):
        drawn = prior.sample(batch, n, width(prior), source())
        assert isinstance(drawn, tasks.Tasks)
        assert drawn.x.shape == (batch, n, width(prior))
        assert drawn.y.shape == drawn.noiseless.shape == (batch, n)
        assert drawn.x.dtype == torch.float32
        assert drawn.y.dtype == drawn.noiseless.dtype
        assert drawn.y.dtype in (torch.float32, torch.int64)
        assert all(value.shape[0] == batch for value in drawn.latents.values())
        for value in (drawn.x, drawn.y, drawn.noiseless):
            assert bool(torch.isfinite(value).all())


def test_the_same_generator_gives_the_same_tasks(prior) -> None:
    d = width(prior)
    before = torch.get_rng_state()
    generator = source(3)
    first, again, second = (
        prior.sample(6, 9, d, generator),
        prior.sample(6, 9, d, source(3)),
        prior.sample(6, 9, d, generator),
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first.y, second.y)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_tasks_of_a_batch_are_alike(prior) -> None:
    y = prior.sample(12, 40, width(prior), source(5)).y
    assert torch.unique(y, dim=0).shape[0] == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tasks_come_out_on_the_device_of_the_generator(prior) -> None:
    drawn = prior.sample(5, 11, width(prior), torch.Generator("cuda").manual_seed(0))
    assert {value.device.type for value in (*drawn[:3], *drawn.latents.values())} == {"cuda"}
    assert bool(torch.isfinite(drawn.y).all())


@pytest.mark.parametrize("sizes", [(0, 5, 2), (3, 0, 2), (3, 5, 0), (3.0, 5, 2), (True, 5, 2)])
def test_sizes_are_checked_at_the_door(prior, sizes) -> None:
    with pytest.raises(SettingError, match="must be an integer of at least 1"):
        prior.sample(*sizes, source())


def test_a_seed_is_no_generator(prior) -> None:
    with pytest.raises(SettingError, match="must be a torch"):
        prior.sample(3, 5, 1, 0)


@pytest.mark.parametrize(
    ("law", "judge"),
    [("uniform", stats.uniform(-math.sqrt(3), 2 * math.sqrt(3))), ("normal", stats.norm()), ("unit", stats.uniform())],
)
def test_inputs_follow_their_law(law, judge) -> None:
    assert_follows(_tasks_base.draw_inputs("", law, 50, 40, 2, source()), judge)


def test_clustered_inputs_are_standardised_over_tasks_and_clustered_within() -> None:
    """Mean and variance within five standard errors over 4000 tasks (3e-6 of false alarms); within a task the nearest
    neighbour is nearer than among as many normal points."""
    x = _tasks_base.draw_inputs("", "clustered", 4000, 12, 2, source()).double()
    means, squares = x.mean((1, 2)), x.square().mean((1, 2))
    assert abs(float(means.mean())) < 5 * float(means.std()) / math.sqrt(4000)
    assert abs(float(squares.mean()) - 1) < 5 * float(squares.std()) / math.sqrt(4000)
    plain = torch.randn(x.shape, generator=source(1), dtype=x.dtype)
    apart = torch.eye(12, dtype=x.dtype) * 1e9
    nearest, usual = ((torch.cdist(v, v) + apart).amin(-1).median() for v in (x, plain))
    assert float(nearest) < 0.6 * float(usual)


def test_mixed_inputs_hold_all_three_laws() -> None:
    """A third of the tasks lies within the box to the last of 200 points (normal: never), within 5 sigma of 1/3."""
    x = _tasks_base.draw_inputs("", "mixed", 3000, 200, 1, source())
    boxed = (x.abs() <= math.sqrt(3)).all(-1).all(-1) & (x.abs().amax((1, 2)) > 1.6)
    assert abs(float(boxed.double().mean()) - 1 / 3) < 0.08
    assert float(x.abs().amax()) > 3


def test_a_function_may_draw_the_inputs() -> None:
    prior = tasks.FixedGP(kernels.RBF(), inputs=spread_inputs([[0.1, 0.2], [0.3, 0.4]]))
    assert prior.sample(3, 2, 2, source()).x[2].tolist() == pytest.approx(np.array([[0.1, 0.2], [0.3, 0.4]]))
    wrong = tasks.FixedGP(kernels.RBF(), inputs=lambda batch, n, d, generator: torch.zeros(n, d))
    with pytest.raises(ShapeError, match="must return x of shape"):
        wrong.sample(3, 2, 2, source())


def test_draws_of_a_fixed_process_have_its_covariance() -> None:
    """Second moments of 20 000 whitened draws, 21 numbers within 5 standard errors: one false alarm in 80 000."""
    x = np.array([[0.0, 0.1], [0.4, -0.3], [1.0, 0.7], [0.5, 0.5], [-0.6, 0.2], [0.1, 0.15]])
    prior = tasks.FixedGP(kernels.RBF(lengthscale=0.6), noise_variance=0.3, inputs=spread_inputs(x.tolist()))
    drawn = prior.sample(20_000, 6, 2, source())
    k = rbf(distances(x.astype(np.float32).astype(np.float64), np.array([0.6, 0.6])))
    for values, covariance in ((drawn.y, k + 0.3 * np.eye(6)), (drawn.y - drawn.noiseless, 0.3 * np.eye(6))):
        z = whitened(values, covariance)
        error = (z.T @ z / len(z) - np.eye(6)) / np.sqrt((1 + np.eye(6)) / len(z))
        assert np.abs(error).max() < 5


def test_what_the_factorisation_added_is_recorded() -> None:
    drawn = tasks.FixedGP(kernels.Scale(kernels.RBF(lengthscale=2.0), 5.0)).sample(3, 50, 1, source())
    assert drawn.latents["jitter"].tolist() == pytest.approx([5e-9] * 3, rel=1e-6)


def family_covariance(name: str, x: np.ndarray, outputscale: np.ndarray, latents: dict) -> np.ndarray:
    x = x.astype(np.float64)
    if name == "linear":
        return outputscale[:, None, None] * np.einsum("bnd,bmd->bnm", x, x) / x.shape[-1]
    lengthscale = latents["base.lengthscale"].numpy()
    if name == "periodic":
        phase = math.pi * (x[:, :, None] - x[:, None]) / latents["base.period"].numpy()[:, None, None]
        k = np.exp(-2 * (np.sin(phase) ** 2 / lengthscale[:, None, None]).sum(-1))
    elif name == "rbf":
        k = rbf(distances(x, lengthscale))
    else:
        k = matern(distances(x, lengthscale), {"1": 0.5, "3": 1.5, "5": 2.5}[name[7]])
    return outputscale[:, None, None] * k


@pytest.mark.parametrize("name", _tasks_draws.FAMILIES)
def test_every_family_has_the_covariance_that_its_latents_say(name) -> None:
    prior = tasks.HyperGP(name, noise_variance=priors.LogNormal(math.log(0.2), 0.5), inputs="mixed")
    drawn = prior.sample(400, 7, 3, source())
    noise = drawn.latents["noise_variance"].numpy()[:, None, None] * np.eye(7)
    k = family_covariance(name, drawn.x.numpy(), drawn.latents["outputscale"].numpy(), drawn.latents)
    assert_follows(whitened(drawn.y, k + noise), stats.norm())
    # the squares of the whitened values of a task: a wrong scale in some tasks cannot hide behind the others
    assert_follows((whitened(drawn.y, k + noise) ** 2).sum(-1), stats.chi2(7))


def test_hyper_parameters_follow_their_priors() -> None:
    drawn = tasks.HyperGP(
        "rbf", lengthscale=priors.LogNormal(0.4, 0.7), outputscale=priors.Gamma(3.0, 2.0), noise_variance=0.04
    ).sample(1500, 2, 4, source())
    assert_follows(drawn.latents["base.lengthscale"], stats.lognorm(0.7, scale=2 * math.exp(0.4)))
    assert_follows(drawn.latents["outputscale"], stats.gamma(3, scale=1 / 2))
    assert set(drawn.latents["noise_variance"].tolist()) == {0.04}
    shared = tasks.HyperGP("rbf", by_dimension=False, ard=False).sample(1500, 2, 4, source())
    assert shared.latents["base.lengthscale"].shape == (1500,)
    assert_follows(shared.latents["base.lengthscale"], stats.lognorm(0.9))


def test_kernels_are_mixed_by_their_weights() -> None:
    """Shares of 4000 tasks within 5 standard errors: one false alarm in 800 000."""
    prior = tasks.HyperGP(weights=(0.1, 0.2, 0.3, 0.4))
    share = torch.bincount(prior.sample(4000, 1, 1, source()).latents["kernel"], minlength=4) / 4000
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert float(((share - p).abs() / (p * (1 - p) / 4000).sqrt()).max()) < 5


def test_targets_of_the_default_prior_are_of_unit_size() -> None:
    for d in (1, 5):
        y = tasks.HyperGP().sample(800, 60, d, source(1)).y
        assert 0.7 < float(y.square().mean(-1).median()) < 1.3


def test_kernels_bring_priors_of_their_own() -> None:
    """A parameter without a prior keeps its value; a name of two shapes is told apart by a number; blanks are NaN."""
    own = (
        kernels.RBF(lengthscale=(0.3, 0.7), lengthscale_prior=None),
        kernels.Matern(nu=0.5, ard=False, lengthscale_prior=priors.Gamma(4.0, 2.0)),
    )
    drawn = tasks.HyperGP(own, noise_variance=0.1).sample(600, 5, 2, source())
    which = drawn.latents["kernel"]
    fixed, free = drawn.latents["0.lengthscale"], drawn.latents["1.lengthscale"]
    assert torch.unique(fixed[which == 0], dim=0).tolist() == [pytest.approx([0.3, 0.7])]
    assert bool(fixed[which == 1].isnan().all())
    assert bool(free[which == 0].isnan().all())
    assert_follows(free[which == 1], stats.gamma(4, scale=1 / 2))
    x = drawn.x.double().numpy()
    k = np.where(
        which.numpy()[:, None, None] == 0,
        rbf(distances(x, np.array([0.3, 0.7]))),
        np.exp(-distances(x, np.nan_to_num(free.numpy()[:, None], nan=1.0))),
    )
    assert_follows(whitened(drawn.y, k + 0.1 * np.eye(5)), stats.norm())


def test_the_kernels_of_a_prior_carry_its_laws() -> None:
    """What a GP would be given to compute the exact posterior."""
    (kernel,) = tasks.HyperGP("matern-3/2", lengthscale=priors.LogNormal(0.2, 0.5)).kernels_for(4)
    parameters = {p.name: p for p in kernel.parameters(4)}
    assert parameters["base.lengthscale"].prior == priors.LogNormal(0.2 + math.log(2), 0.5)
    assert parameters["outputscale"].prior == priors.LogNormal(-0.1, 0.4)
    assert kernel.base.nu == 1.5


def test_pgp_mix_has_its_published_constants() -> None:
    drawn = tasks.HyperGP.pgp_mix().sample(1500, 2, 3, source())
    assert float(drawn.x.min()) >= 0
    assert_follows(drawn.latents["base.lengthscale"], stats.gamma(3, scale=1 / 6))
    assert_follows(drawn.latents["outputscale"], stats.gamma(0.5, scale=1 / 0.15))
    assert_follows(drawn.latents["noise_variance"], stats.gamma(1.1, scale=1 / 0.05))
    wide = tasks.HyperGP.pgp_mix(inputs="uniform").sample(1500, 2, 3, source())
    assert_follows(wide.latents["base.lengthscale"], stats.gamma(3, scale=2 * math.sqrt(3) / 6))


@pytest.mark.parametrize(("activation", "dual"), [("relu", arc_cosine), ("erf", arc_sine)])
@pytest.mark.parametrize("depth", [1, 3])
def test_networks_of_infinite_width_have_their_covariance(activation, dual, depth) -> None:
    prior = tasks.NetworkGP(depth, activation, noise_variance=0.15, inputs="normal")
    drawn = prior.sample(300, 6, 4, source())
    x, latents = drawn.x.double().numpy(), {name: v.numpy() for name, v in drawn.latents.items()}
    w2, b2 = (latents[f"base.{name}_std"][:, None, None] ** 2 for name in "wb")
    one = np.ones((300, 1, 4))
    stacked = np.concatenate([x, one], 1)
    k = w2 * stacked @ np.swapaxes(stacked, -1, -2) / 4 + b2
    for _ in range(depth):
        k = w2 * dual(k) + b2
    k = latents["outputscale"][:, None, None] * k
    assert_follows(whitened(drawn.y, k[:, :6, :6] + 0.15 * np.eye(6)), stats.norm())
    # the last point has |x|^2 = d
    assert_follows(k[:, 6, 6], stats.lognorm(0.4, scale=math.exp(-0.1)))


def test_a_scale_mixture_is_a_student_t_process() -> None:
    """y'K^{-1}y / n, times a / b, has an F distribution with n and 2a degrees of freedom."""
    x = [[0.0], [0.3], [0.9]]
    base = tasks.FixedGP(kernels.RBF(lengthscale=0.5), 0.2, inputs=spread_inputs(x))
    drawn = tasks.StudentTProcess(base, priors.InverseGamma(1.7, 0.6)).sample(4000, 3, 1, source())
    k = rbf(distances(np.array(x), np.array([0.5]))) + 0.2 * np.eye(3)
    z = whitened(drawn.y, k)
    assert_follows((z**2).mean(-1) * 1.7 / 0.6, stats.f(3, 3.4))
    assert_follows(drawn.latents["scale"], stats.invgamma(1.7, scale=0.6))
    noise = (drawn.y - drawn.noiseless).double() / drawn.latents["scale"].unsqueeze(-1).sqrt()
    assert_follows(noise, stats.norm(scale=math.sqrt(0.2)))


def hebo_covariance(drawn, d: int) -> np.ndarray:
    u = (drawn.x.double().numpy() / math.sqrt(3) + 1) / 2
    if "warp" in drawn.latents:
        a, b = np.moveaxis(drawn.latents["warp"].numpy(), 1, 0)[:, :, None]
        u = 1 - (1 - u**a) ** b
    u = u * drawn.latents["relevant"].numpy()[:, None]
    lengthscale = drawn.latents["lengthscale"].numpy() / (2 * math.sqrt(3))
    k = drawn.latents["outputscale"].numpy()[:, None, None] * matern(distances(u, lengthscale), 1.5)
    if "linear_variance" in drawn.latents:
        k = k + drawn.latents["linear_variance"].numpy()[:, None, None] * u @ np.swapaxes(u, -1, -2)
    return k + drawn.latents["noise_variance"].numpy()[:, None, None] * np.eye(u.shape[1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"linear": True}, {"warp": (0.9, 0.7)}, {"linear": True, "warp": (0.5, 1.1)}, {"by_dimension": True}],
)
def test_hebo_tasks_have_the_covariance_that_their_latents_say(settings) -> None:
    drawn = tasks.HEBOPlus(**settings, noise_variance=priors.LogNormal(-2.0, 0.5)).sample(400, 6, 4, source(2))
    assert_follows(whitened(drawn.y, hebo_covariance(drawn, 4)), stats.norm())
    assert_follows((whitened(drawn.y, hebo_covariance(drawn, 4)) ** 2).sum(-1), stats.chi2(6))


def test_hebo_has_its_published_constants() -> None:
    """Ignored columns: each of 12 000 within 5 standard errors; with two, never both, hence 0.3 - 0.09 / 2."""
    drawn = tasks.HEBOPlus(inputs="unit", linear=True, warp=(0.976, 0.8)).sample(1500, 2, 8, source())
    assert_follows(drawn.latents["lengthscale"], stats.gamma(1.2107, scale=1 / 1.5212))
    assert_follows(drawn.latents["outputscale"], stats.gamma(0.8453, scale=1 / 0.3994))
    assert_follows(drawn.latents["noise_variance"], stats.lognorm(0.5, scale=math.exp(-4.63)))
    assert_follows(drawn.latents["warp"][:, 0], stats.lognorm(0.976))
    assert_follows(drawn.latents["warp"][:, 1], stats.lognorm(0.8))
    # the product of two uniform variables
    assert_follows(drawn.latents["linear_variance"], lambda v: v * (1 - np.log(v)))
    unused = 1 - drawn.latents["relevant"].double().mean()
    assert abs(float(unused) - 0.3) < 5 * math.sqrt(0.21 / 12_000)
    assert bool(tasks.HEBOPlus().sample(500, 1, 1, source()).latents["relevant"].all())
    pairs = tasks.HEBOPlus().sample(6000, 1, 2, source()).latents["relevant"]
    assert bool(pairs.any(-1).all())
    assert abs(1 - float(pairs.double().mean()) - 0.255) < 5 * math.sqrt(0.19 / 12_000)


def test_hebo_lengthscales_can_grow_with_the_columns_that_matter() -> None:
    drawn = tasks.HEBOPlus(inputs="unit", by_dimension=True, unused=0.6).sample(1500, 2, 8, source(1))
    used = drawn.latents["relevant"].double().sum(-1, keepdim=True)
    assert_follows(drawn.latents["lengthscale"] / used.sqrt(), stats.gamma(1.2107, scale=1 / 1.5212))
    kernel = tasks.HEBOPlus(inputs="unit", by_dimension=True).kernel_for(4)
    assert kernel.base.lengthscale_prior == priors.Gamma(1.2107, 1.5212 / 2)


def test_the_draws_do_not_depend_on_how_many_matrices_fit_into_memory(monkeypatch) -> None:
    for name in ("hyper", "network gp", "gp model"):
        whole = PRIORS[name].sample(9, 20, 2, source())
        monkeypatch.setattr(_tasks_draws, "_MATRIX_BYTES", {"cpu": 2 * 8 * 20 * 20})
        torch.testing.assert_close(PRIORS[name].sample(9, 20, 2, source()).y, whole.y, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()


def test_a_covariance_that_is_none_is_refused() -> None:
    class Negative(kernels.RBF):
        def value_and_pullback(self, x, params=None):
            value, pullback = super().value_and_pullback(x, params)
            return value - 2, pullback

    with pytest.raises(NumericalError, match="positive definite"):
        tasks.FixedGP(Negative()).sample(3, 5, 1, source())


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: tasks.FixedGP("rbf"), "kernel must be a kernel"),
        (lambda: tasks.FixedGP(kernels.RBF(), -0.1), "noise_variance must be a finite number of at least 0"),
        (lambda: tasks.FixedGP(kernels.RBF(), inputs="gaussian"), "inputs must be one of"),
        (lambda: tasks.HyperGP("cubic"), "kernels must be one of"),
        (lambda: tasks.HyperGP(()), "kernels is empty"),
        (lambda: tasks.HyperGP(weights=(1.0,)), "weights must hold one number"),
        (lambda: tasks.HyperGP("rbf", weights=(-1.0,)), "weights must hold one number"),
        (lambda: tasks.HyperGP(lengthscale=0.5), "lengthscale must be a prior"),
        (lambda: tasks.HyperGP(outputscale=priors.LogNormal), "outputscale must be a prior"),
        (lambda: tasks.HyperGP(noise_variance=-1.0), "noise_variance must be a finite number of at least 0"),
        (lambda: tasks.NetworkGP(depths=(0,)), "depth must be an integer of at least 1"),
        (lambda: tasks.StudentTProcess(scale_prior=3.0), "scale_prior must be a prior"),
        (lambda: tasks.StudentTProcess(base=kernels.RBF()), "base must be a prior"),
        (lambda: tasks.HEBOPlus(unused=1.0), "unused must be below 1"),
        (lambda: tasks.HEBOPlus(warp=(1.0,)), "warp must be None or"),
    ],
)
def test_a_wrong_setting_is_refused(make, complaint) -> None:
    with pytest.raises(SettingError, match=complaint):
        make()


def test_what_cannot_be_done_is_said_when_sampling() -> None:
    with pytest.raises(SettingError, match="base must be a prior over regression"):
        tasks.StudentTProcess(tasks.Tabular()).sample(3, 5, 2, source())
    odd = tasks.HyperGP("rbf", lengthscale=priors.Exponential(1.0))
    with pytest.raises(SettingError, match="that is to be stretched must be"):
        odd.sample(3, 5, 2, source())
    assert odd.sample(3, 5, 1, source()).y.shape == (3, 5)
