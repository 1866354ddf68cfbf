"""Scale mixtures: the contract, reference values to twelve digits, SciPy as judge of Student-t and mixtures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from scipy.optimize import minimize

import bayesdl as bdl
from bayesdl.errors import NumericalWarning, SettingError
from bayesdl.inference._evidence import Evidence
from bayesdl.inference._scale_evidence import FixedNoiseEvidence, scaled_energy, with_shapes
from bayesdl.testing import check_engine

BurrXII, InverseGamma = bdl.priors.BurrXII, bdl.priors.InverseGamma


def toy(batch: tuple[int, ...] = (), n: int = 14, d: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=g, dtype=torch.float64)
    y = (2 * x[..., 0]).sin() + 0.4 * x[..., 1] + 0.2 * torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return x, y


def toy_gp(noise_variance: float = 0.07) -> bdl.GP:
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5, lengthscale=(0.6, 1.3)), outputscale=1.7)
    return bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=noise_variance, lower=0.0))


def plain(gp: bdl.GP, prior, **settings) -> bdl.ScaleMixture:
    """Conditioning only: nothing optimised, nothing standardised."""
    return bdl.ScaleMixture(gp, prior, optimize=False, standardize=False, **settings)


def gram(gp: bdl.GP, x: torch.Tensor, z: torch.Tensor | None = None) -> np.ndarray:
    return gp.kernel(x, z).numpy()


MATERN = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)))


@pytest.mark.parametrize(
    "engine",
    [
        bdl.ScaleMixture(MATERN, InverseGamma(2.0, 3.0), num_starts=2, max_iterations=15),
        bdl.ScaleMixture(
            bdl.GP(bdl.kernels.NNGP(depth=2)), BurrXII(2.0, 3.0, learn=True), num_starts=1, max_iterations=8
        ),
        bdl.ScaleMixture(MATERN, InverseGamma(3.0, 2.0), noise="fixed", num_starts=1, max_iterations=10),
        pytest.param(
            bdl.ScaleMixture(
                MATERN, InverseGamma(4.0, 4.0, learn=True), method="importance", num_starts=1, max_iterations=8
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["student-t", "burr", "fixed noise", "importance"],
)
def test_obeys_the_contract(engine):
    check_engine(engine)


def test_classification_obeys_the_contract():
    """Two classes by stochastic variational inference with one shared scale."""
    gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.RBF()), likelihood=bdl.Bernoulli())
    check_engine(bdl.ScaleMixture(gp, InverseGamma(2.0, 2.0), num_inducing=6, num_steps=15))


# Reference values computed once with 25 digits from the closed forms, the Burr rows by quadrature.
X = torch.tensor([(0.5, -1.0), (1.5, 0.25), (-0.75, 0.8), (0.1, 1.2)], dtype=torch.float64)
Y = torch.tensor([0.7, -0.4, 1.1, 0.2], dtype=torch.float64)
X_NEW = torch.tensor([(0.3, 0.3), (3.0, -2.0)], dtype=torch.float64)
Y_NEW = torch.tensor([0.5, -2.0], dtype=torch.float64)


def reference_gp() -> bdl.GP:
    kernel = bdl.kernels.NNGP(depth=2, activation="relu", w_std=math.sqrt(2), b_std=0.1)
    return bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=0.05, lower=0.0))


def test_reference_values_of_the_gaussian_process():
    gp = reference_gp()
    k = gp.kernel(X)
    rows = [1.28, 1.0404639045743, 0.41421285434743, 0.463142477231, 2.3425, 0.63429416216523, 1.0841164808385]
    rows += [1.2325, 1.0477183151004, 1.48]
    assert k[*torch.triu_indices(4, 4)].tolist() == pytest.approx(rows, rel=1e-12)
    k_xs = gp.kernel(X, X_NEW)
    first = [0.22481288550093, 0.58765824539865, 0.26515888335016, 0.4545989344713]
    assert k_xs[:, 0].tolist() == pytest.approx(first, rel=1e-12)
    assert k_xs[:, 1].tolist() == pytest.approx([3.6402695871618, 4.4473218565057, 1.28854835997, 1.669769279495])
    posterior = bdl.ExactGP(gp, optimize=False, standardize=False).fit(X, Y)
    assert float(posterior.log_evidence) == pytest.approx(-4.8670434968479, rel=1e-12)
    predictive = posterior.predict(X_NEW)
    assert predictive.mean.tolist() == pytest.approx([-0.093029417571773, 0.95222959574163], rel=1e-11)
    assert predictive.log_prob(Y_NEW).tolist() == pytest.approx([-1.8648927575479, -4.2403431778231], rel=1e-12)
    latent = posterior.predict(X_NEW, noise=False).variance
    assert latent.tolist() == pytest.approx([0.0294951246123, 1.3286954059003], rel=1e-11)


@pytest.mark.parametrize("method", ["closed_form", "quadrature"])
def test_reference_values_of_the_student_t_process(method):
    """The quadrature of the same integral gives the closed form to ten digits."""
    posterior = plain(reference_gp(), InverseGamma(2.0, 3.0), method=method).fit(X, Y)
    predictive, latent = posterior.predict(X_NEW), posterior.predict(X_NEW, noise=False)
    assert float(posterior.log_evidence) == pytest.approx(-5.4216120791515, rel=1e-12)
    assert predictive.log_prob(Y_NEW).tolist() == pytest.approx([-1.6340575319995, -3.6894548180532], rel=1e-12)
    assert latent.variance.tolist() == pytest.approx([0.040458431432089, 1.8225700918493], rel=1e-11)
    # (2 * 3 + q) / (2 * 2 + 4 - 2), the mean of the inverse gamma posterior
    assert float(posterior.scale_mean) == pytest.approx((6 + 2.2301936941572) / 6, rel=1e-12)
    if method == "closed_form":
        assert predictive.dof.tolist() == [8.0, 8.0]
        assert latent.scale.square().tolist() == pytest.approx([0.030343823574067, 1.366927568887], rel=1e-11)


@pytest.mark.parametrize(
    ("prior", "values"),
    [
        (BurrXII(2.0, 3.0), (-4.9207587094176, 0.62540084368581, -2.7977348061891, -5.2967776744275)),
        (BurrXII(1.0, 1.0), (-5.509077809397, 0.98952504623674, -2.1430637401649, -4.2521125327516)),
        (BurrXII(3.0, 2.0), (-4.8085481658855, 0.75818343024936, -2.4049975538589, -4.8303913893364)),
    ],
    ids=str,
)
def test_reference_values_of_burr_mixtures(prior, values):
    posterior = plain(reference_gp(), prior, num_nodes=128).fit(X, Y)
    got = [posterior.log_evidence, posterior.scale_mean, *posterior.predict(X_NEW).log_prob(Y_NEW)]
    assert [float(v) for v in got] == pytest.approx(values, rel=1e-11)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("a", [0.8, 3.5])
def test_student_t_conditionals_obey_the_chain_rule(batch, a):
    """log p(y1, y2) = log p(y1) + log p(y2 | y1), with SciPy's joint density as judge, at dof 1.6 and 7."""
    gp, b = toy_gp(), 2.3
    x, y = toy(batch, n=7)
    engine = plain(gp, InverseGamma(a, b))
    head = engine.fit(x[..., :5, :], y[..., :5])
    middle = head.condition_on(x[..., 5:6, :], y[..., 5:6])
    last = middle.condition_on(x[..., 6:, :], y[..., 6:])
    whole = engine.fit(x, y)
    tail = head.predict(x[..., 5:6, :]).log_prob(y[..., 5:6]) + middle.predict(x[..., 6:, :]).log_prob(y[..., 6:])
    for i in np.ndindex(*batch):
        shape = b / a * (gram(gp, x[i]) + 0.07 * np.eye(7))
        judge = stats.multivariate_t(shape=shape, df=2 * a)
        first = stats.multivariate_t(shape=shape[:5, :5], df=2 * a)
        assert float(head.log_evidence[i]) == pytest.approx(first.logpdf(y[i][:5].numpy()), rel=1e-9)
        assert float(whole.log_evidence[i]) == pytest.approx(judge.logpdf(y[i].numpy()), rel=1e-9)
        assert float(tail[i]) == pytest.approx(
            judge.logpdf(y[i].numpy()) - first.logpdf(y[i][:5].numpy()), rel=1e-8, abs=1e-10
        )
        assert float(last.log_evidence[i]) == pytest.approx(float(whole.log_evidence[i]), rel=1e-9)
    assert last.diagnostics["num_data"] == 7


MIXTURES = [
    (BurrXII(1.4, 2.2), lambda v: stats.burr12(1.4, 2.2).pdf(v)),
    (bdl.priors.LogNormal(0.4, 0.8), lambda v: stats.lognorm(0.8, scale=math.exp(0.4)).pdf(v)),
    (bdl.priors.HalfCauchy(1.7), lambda v: stats.halfcauchy(scale=1.7).pdf(v)),
    (bdl.priors.Exponential(0.6), lambda v: stats.expon(scale=1 / 0.6).pdf(v)),
    (InverseGamma(1.5, 2.5), lambda v: stats.invgamma(1.5, scale=2.5).pdf(v)),
    (lambda v: -0.3 * v - v.log().square(), lambda v: np.exp(-0.3 * v - np.log(v) ** 2)),
]
MIXTURE_IDS = ["burr", "log-normal", "half-cauchy", "exponential", "inverse gamma", "own density"]


@pytest.mark.parametrize("noise", ["scaled", "fixed"])
@pytest.mark.parametrize(("prior", "density"), MIXTURES, ids=MIXTURE_IDS)
def test_mixtures_agree_with_integration_by_scipy(prior, density, noise):
    """Evidence, density and mean of the predictive, against Simpson's rule over log v with plain Gaussian formulas."""
    gp = toy_gp(0.15)
    x, y = toy(n=6)
    x_new, y_new = toy(n=2, seed=4)
    posterior = plain(gp, prior, noise=noise, method="quadrature", num_nodes=128).fit(x, y)
    k, k_xs, k_ss = gram(gp, x), gram(gp, x, x_new), gram(gp, x_new)

    u = np.linspace(-14, 14, 4001)
    v = np.exp(u)[:, None, None]
    s = 0.15 * (v if noise == "scaled" else np.ones_like(v))
    a = v * k + s * np.eye(6)
    solved = np.linalg.solve(a, np.concatenate([np.broadcast_to(y.numpy()[:, None], (4001, 6, 1)), v * k_xs], -1))
    log_likelihood = -0.5 * (y.numpy() @ solved[:, :, 0].T + np.linalg.slogdet(2 * np.pi * a)[1])
    mean = np.einsum("uis,ui->us", v * k_xs, solved[:, :, 0])
    variance = (v * k_ss).diagonal(axis1=1, axis2=2) - np.einsum("uis,uis->us", v * k_xs, solved[:, :, 1:]) + s[..., 0]
    joint = density(v[:, 0, 0]) * v[:, 0, 0] * np.exp(log_likelihood)  # p(v) p(y | v) dv / du

    total = integrate.simpson(joint, x=u)
    assert float(posterior.log_evidence) == pytest.approx(math.log(total), rel=1e-9)
    predictive = posterior.predict(x_new)
    for i in range(2):
        wanted = integrate.simpson(joint * stats.norm(mean[:, i], variance[:, i] ** 0.5).pdf(float(y_new[i])), x=u)
        assert float(predictive.log_prob(y_new)[i]) == pytest.approx(math.log(wanted / total), rel=1e-7)
        assert float(predictive.mean[i]) == pytest.approx(integrate.simpson(joint * mean[:, i], x=u) / total, rel=1e-7)


def test_fixed_noise_posterior_is_updated_exactly():
    x, y = toy(n=12)
    engine = plain(toy_gp(), BurrXII(2.0, 1.5), noise="fixed")
    whole, updated = engine.fit(x, y), engine.fit(x[:9], y[:9]).condition_on(x[9:], y[9:])
    for name in ("mean", "variance"):
        torch.testing.assert_close(
            getattr(updated.predict(x), name), getattr(whole.predict(x), name), rtol=1e-7, atol=1e-9
        )
    assert float(updated.log_evidence) == pytest.approx(float(whole.log_evidence), rel=1e-9)


@pytest.mark.parametrize("noise", ["scaled", "fixed"])
def test_a_certain_scale_is_the_gaussian_process(noise):
    """alpha = beta -> infinity: the evidence differs from the GP's by O(1 / alpha)."""
    x, y = toy()
    reference = bdl.ExactGP(toy_gp(), optimize=False, standardize=False).fit(x, y)
    x_new = toy(n=4, seed=3)[0]
    errors = []
    for a in (1e3, 1e6):
        posterior = plain(toy_gp(), InverseGamma(a, a), noise=noise).fit(x, y)
        errors.append(abs(float(posterior.log_evidence - reference.log_evidence)))
        variance = posterior.predict(x_new).variance
        torch.testing.assert_close(variance, reference.predict(x_new).variance, rtol=30 / a, atol=0)
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 300


def test_many_targets_make_the_scale_their_own():
    """(2 beta + q) / (2 alpha + n) -> q / n: the prior is forgotten."""
    x, y = toy(n=400)
    gp = toy_gp()
    posterior = plain(gp, InverseGamma(2.0, 30.0)).fit(x, y)
    a = gram(gp, x) + 0.07 * np.eye(400)
    ratio = y.numpy() @ np.linalg.solve(a, y.numpy()) / 400
    latent = posterior.predict(x[:3], noise=False)
    gps = bdl.ExactGP(gp, optimize=False, standardize=False).fit(x, y).predict(x[:3], noise=False)
    share = latent.scale.square() / gps.variance
    assert share.tolist() == pytest.approx([(60 + 400 * ratio) / 404] * 3, rel=1e-9)
    # the prior says 15, its harmonic mean; 400 targets have left under a tenth of the way to it
    assert abs(float(share[0]) - ratio) < 0.1 * abs(15 - ratio)


def test_surprising_targets_widen_every_interval():
    """What a GP of fixed kernel cannot do: targets three times as large, intervals about three times as wide."""
    x, y = toy(n=40)
    x_new = toy(n=5, seed=2)[0]
    engine = plain(toy_gp(), InverseGamma(2.0, 2.0))
    width = [engine.fit(x, factor * y).predict(x_new).stddev for factor in (1.0, 3.0)]
    assert bool((width[1] > 2.5 * width[0]).all())


@pytest.mark.parametrize("noise", ["scaled", "fixed"])
@pytest.mark.parametrize("prior", [InverseGamma(2.5, 1.5, learn=True), BurrXII(1.7, 2.4, learn=True)], ids=str)
def test_the_evidence_has_the_gradient_of_finite_differences(prior, noise):
    """All hyper-parameters, learned shapes of the prior and the constant mean, at an arbitrary point."""
    x, y = toy((2,), n=9)
    gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)), likelihood=bdl.Gaussian(lower=1e-3))
    engine = bdl.ScaleMixture(gp, prior, noise=noise)
    mixing = engine._mixing(0)
    layout = with_shapes(gp.layout(2), mixing)
    if noise == "fixed":
        evidence = FixedNoiseEvidence(gp, layout, x, y, mixing)
    else:
        evidence = Evidence(gp, layout, x, y, scaled_energy(mixing, 9))
    offsets = torch.linspace(-0.4, 0.5, layout.dim, dtype=torch.float64)
    theta = layout.initial(x) + torch.stack([offsets, offsets.flip(0)])
    indices = torch.arange(2)
    _, gradient = evidence(theta, indices)
    for j in range(layout.dim):
        step = torch.zeros_like(theta)
        step[:, j] = 1e-5
        numeric = (evidence(theta + step, indices)[0] - evidence(theta - step, indices)[0]) / 2e-5
        torch.testing.assert_close(gradient[:, j], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("noise", ["scaled", "fixed"])
def test_the_optimiser_finds_what_scipy_finds(noise):
    """SciPy minimises the same posterior of hyper-parameters, written out from posterior.log_evidence."""
    x, y = toy(n=20)
    kernel = bdl.kernels.Matern(nu=2.5)
    gp = bdl.GP(kernel, mean="zero")
    prior = InverseGamma(2.0, 1.0)
    posterior = bdl.ScaleMixture(gp, prior, noise=noise, num_starts=1, standardize=False).fit(x, y)
    layout = gp.layout(2)

    def objective(theta: np.ndarray) -> float:
        values, _ = layout.unpack(torch.tensor(theta))
        start = bdl.GP(
            bdl.kernels.Matern(nu=2.5, lengthscale=tuple(values["kernel.lengthscale"].tolist())),
            mean="zero",
            likelihood=bdl.Gaussian(noise_variance=float(values["noise_variance"])),
        )
        evidence = plain(start, prior, noise=noise).fit(x, y).log_evidence
        return -float(evidence + layout.log_prior(values)[0])

    found = minimize(objective, layout.initial(x).numpy(), method="L-BFGS-B", options={"maxiter": 60}).fun
    assert -posterior.diagnostics["objective_by_start"][0] <= found + 1e-4 * abs(found)


def test_outputs_and_data_sets_have_scales_of_their_own():
    """Two columns of unequal surprise: each keeps the predictive that it has alone."""
    x, y = toy(n=25)
    both = torch.stack([y, 5 * y.flip(0)], -1)
    for prior in (InverseGamma(2.0, 2.0), BurrXII(2.0, 1.0)):
        for noise in ("scaled", "fixed"):
            joint = plain(toy_gp(), prior, noise=noise).fit(x, both)
            assert joint.scale_mean.shape == (2,)
            assert float(joint.scale_mean[1]) > 4 * float(joint.scale_mean[0])
            for i in range(2):
                alone = plain(toy_gp(), prior, noise=noise).fit(x, both[:, i]).predict(x)
                torch.testing.assert_close(joint.predict(x).variance[:, i], alone.variance, rtol=1e-9, atol=0)
                torch.testing.assert_close(joint.predict(x).mean[:, i], alone.mean, rtol=1e-9, atol=1e-12)


def test_importance_sampling_reports_its_effective_sample_size():
    """Close to the quadrature where many draws count; a warning where few do, as with 2,000 targets."""
    posterior = plain(reference_gp(), BurrXII(2.0, 3.0), method="importance", num_samples=20_000).fit(X, Y)
    assert posterior.diagnostics["effective_sample_size"] > 10_000
    # sd of the estimate: relative spread of the weights over sqrt(draws), below 0.005
    assert float(posterior.log_evidence) == pytest.approx(-4.9207587094176, abs=0.025)
    assert float(posterior.scale_mean) == pytest.approx(0.62540084368581, rel=0.04)
    x, y = toy(n=600)
    with pytest.warns(NumericalWarning, match="use method='quadrature'"):
        few = plain(toy_gp(), BurrXII(2.0, 3.0), method="importance", num_samples=500).fit(x, y)
    assert few.diagnostics["effective_sample_size"] < 100


def test_settings_are_checked_at_the_door():
    gp = bdl.GP(bdl.kernels.RBF())
    with pytest.raises(SettingError, match="InverseGamma prior with noise='scaled'"):
        bdl.ScaleMixture(gp, BurrXII(), method="closed_form")
    with pytest.raises(SettingError, match="InverseGamma prior with noise='scaled'"):
        bdl.ScaleMixture(gp, noise="fixed", method="closed_form")
    with pytest.raises(SettingError, match="prior on the variance scale"):
        bdl.ScaleMixture(gp, 2.0)
    with pytest.raises(SettingError, match="can be drawn from"):
        bdl.ScaleMixture(gp, lambda v: -v, method="importance")
    with pytest.raises(SettingError, match="noise must be one of"):
        bdl.ScaleMixture(gp, noise="inside")
    with pytest.raises(SettingError, match=r"bdl\.HMC"):
        bdl.ScaleMixture(bdl.BNN())
    classes = bdl.GP(bdl.kernels.RBF(), likelihood=bdl.Categorical(3))
    with pytest.raises(SettingError, match="classification takes an InverseGamma"):
        bdl.ScaleMixture(classes, BurrXII())
    with pytest.raises(SettingError, match="no noise to scale"):
        bdl.ScaleMixture(classes, noise="fixed")


def test_an_own_density_that_is_no_density_is_refused():
    x, y = toy(n=2)
    with pytest.raises(bdl.errors.NumericalError, match="proper distribution"):
        plain(toy_gp(), lambda v: 3.0 * v.log()).fit(x, y)
    with pytest.raises(bdl.errors.NumericalError, match="finite and above 0"):
        plain(toy_gp(), lambda v: v * math.nan).fit(x, y)


def test_more_points_than_memory_holds_are_refused_at_the_door():
    """Half a million rows would need eight terabytes; nothing of it is allocated before the error."""
    x = torch.zeros(500_000, 1, dtype=torch.float64)
    with pytest.raises(SettingError, match=r"memory budget.*\n.*\n.*bdl\.SparseGP"):
        bdl.ScaleMixture(bdl.GP(bdl.kernels.RBF())).fit(x, x.squeeze(-1) + torch.arange(500_000))
