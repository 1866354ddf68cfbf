"""Simulation-based calibration: a right sampler passes, wrong ones are found, and a killed run goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, SettingError, ShapeError, StorageError
from bayesdl.testing import NetworkPrior, ProcessPrior, SampledDensity, sbc

ROOT = Path(__file__).parents[1]
SPREAD, NOISE, N = 1.3, 0.7, 5


def prior(generator):
    """theta ~ N(0, 1.3), y_i ~ N(theta, 0.7), five of them; and log p(y | theta), which depends on the data."""
    theta = SPREAD * torch.randn((), generator=generator, dtype=torch.float64)
    y = theta + NOISE * torch.randn(N, generator=generator, dtype=torch.float64)
    return {"theta": theta, "fit": -((y - theta) ** 2).sum()}, y


def exact(width=1.0, shift=0.0, coefficient=0.0, num_draws=250, calls=None):
    """Exact draws of the posterior, or draws that are too wide, shifted, or correlated; one data set or many."""

    def fit(y, *, seed):
        if calls is not None:
            calls.append(tuple(y.shape))
        precision = 1 / SPREAD**2 + N / NOISE**2
        mean = (y.sum(-1) / NOISE**2 / precision)[..., None, None]
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(*y.shape[:-1], 2, num_draws, generator=g, dtype=torch.float64)
        for t in range(1, num_draws if coefficient else 0):
            z[..., t] = coefficient * z[..., t - 1] + (1 - coefficient**2) ** 0.5 * z[..., t]
        theta = mean + precision**-0.5 * (width * z + shift)
        return {"theta": theta, "fit": -((y[..., None, None, :] - theta.unsqueeze(-1)) ** 2).sum(-1)}

    return fit


def family(y):
    """The same model as a log density, with its own names."""

    def log_density(q):
        return -0.5 * (q[..., 0] / SPREAD) ** 2 - 0.5 * ((y.unsqueeze(-2) - q) / NOISE).square().sum(-1)

    return bdl.LogDensity(log_density, dim=1, names=("theta",))


def test_exact_draws_pass_and_ranks_are_what_they_say():
    """Two quantities at 99 %: a false alarm for 1 in 50 seeds. Every rank is counted again by hand for one of them."""
    result = sbc(exact(), prior, 200, 50, seed=1)
    assert result.passed
    assert all(result.inside.values())
    assert result.names == ("theta", "fit")
    assert result.ranks.shape == result.values.shape == (200, 2)
    assert (result.num_ranked == 50).all()
    assert ((result.ranks >= 0) & (result.ranks <= 50)).all()
    scaled = result.values * 51
    assert ((scaled >= result.ranks) & (scaled <= result.ranks + 1)).all()
    table = result.table()
    assert list(table.index) == ["theta", "fit"]
    assert (table["ess_min"] > 250).all()
    assert (table["p_value"] == list(result.p_values.values())).all()


@pytest.mark.parametrize(
    ("engine", "name", "num"),
    [
        (exact(width=1.2), "theta", 1000),
        (exact(width=0.8), "theta", 1000),
        (exact(shift=0.25), "theta", 400),
        (exact(width=3.0), "fit", 100),
    ],
)
def test_wrong_draws_are_found(engine, name, num):
    """Too wide or too narrow by a fifth, or off by a quarter of a standard deviation."""

    def one(generator):
        truth, y = prior(generator)
        return {name: truth[name]}, y

    result = sbc(engine, one, num, 100, seed=2, batch_size=100)
    assert not result.passed
    assert not result.inside[name]
    assert result.p_values[name] < 1e-3


def test_draws_that_ignore_the_data_are_found_by_a_quantity_of_the_data():
    """Draws of the prior give uniform ranks of theta (a false alarm for 1 in 100 seeds): only the fit betrays them."""

    def blind(y, *, seed):
        g = torch.Generator().manual_seed(seed)
        theta = SPREAD * torch.randn(len(y), 1, 300, generator=g, dtype=torch.float64)
        return {"theta": theta, "fit": -((y[:, None, None] - theta.unsqueeze(-1)) ** 2).sum(-1)}

    result = sbc(blind, prior, 200, 50, seed=3)
    assert result.inside["theta"]
    assert not result.inside["fit"]


def test_correlated_draws_are_thinned_until_their_ranks_are_uniform():
    """AR(1) of coefficient 0.9: 19 draws are worth one. All draws would fail; the thinned ones pass, being few."""
    result = sbc(exact(coefficient=0.9, num_draws=1000), prior, 200, 100, seed=4, batch_size=50)
    assert result.passed
    assert 20 < float(result.num_ranked.double().median()) < 75
    x = np.random.default_rng(0).normal(size=(200, 1))
    chains = np.empty((200, 100))
    chains[:, 0] = np.random.default_rng(1).normal(size=200)
    for t in range(1, 100):
        chains[:, t] = 0.9 * chains[:, t - 1] + 0.19**0.5 * np.random.default_rng(1 + t).normal(size=200)
    raw = ((chains < x).sum(1) + 0.5) / 101
    assert bdl.evaluation.uniformity(raw).p_value < 1e-3


@pytest.mark.parametrize("sampler", ["nuts", "hmc"])
def test_samplers_are_calibrated_on_a_conjugate_family(sampler):
    """One quantity at 99 %, 100 replications: a false alarm for 1 in 100 seeds."""
    engine = SampledDensity(family, sampler, num_chains=2, num_warmup=60, num_draws=150)
    result = sbc(engine, theta_only, 100, 30, seed=5, batch_size=100)
    assert result.passed
    assert float(result.rhat.max()) < 1.1


def theta_only(generator):
    truth, y = prior(generator)
    return {"theta": truth["theta"]}, y


def test_replications_do_not_depend_on_their_number_or_the_size_of_batches():
    """The same truths and data: what exact draws make of them differs by the draws only."""
    shapes = []
    few = sbc(exact(calls=shapes), prior, 6, 40, seed=6, batch_size=3)
    many = sbc(exact(calls=shapes), prior, 9, 40, seed=6, batch_size=3)
    assert shapes == [(3, N)] * 5
    for a, b in zip((few.ranks, few.values, few.ess), (many.ranks, many.values, many.ess), strict=True):
        assert torch.equal(a, b[:6])
    sbc(exact(calls=shapes), prior, 2, 40, seed=6, batch_size=None)
    assert shapes[5:] == [(N,)] * 2


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")  # few draws
def test_quantities_with_axes_are_taken_apart():
    def vectors(generator):
        theta = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        return {"a": theta, "b": theta[0, 0]}, (theta.new_zeros(1), theta.new_zeros(2))

    def fit(one, two, *, seed):
        assert one.shape == (5, 1)
        assert two.shape == (5, 2)
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(5, 3, 40, 2, 2, generator=g, dtype=torch.float64)
        return {"b": z[..., 0, 0], "a": z, "more": z}

    result = sbc(fit, vectors, 10, 20, batch_size=5)
    assert result.names == ("a[0, 0]", "a[0, 1]", "a[1, 0]", "a[1, 1]", "b")
    assert torch.equal(result.ranks[:, 0], result.ranks[:, 4])


def test_chains_and_wrong_draws_are_told_apart():
    def one(y, *, seed):
        return bdl.sample(family(y), num_chains=2, num_warmup=40, num_draws=60, seed=seed)

    assert sbc(one, theta_only, 2, 10, batch_size=None).ranks.shape == (2, 1)
    cases = [
        (lambda y, *, seed: 3.0, SettingError, "by name"),
        (lambda y, *, seed: {"eta": y}, SettingError, "'theta'"),
        (lambda y, *, seed: {"theta": y}, ShapeError, "chains, draws"),
    ]
    for engine, error, word in cases:
        with pytest.raises(error, match=word):
            sbc(engine, theta_only, 4, 10, batch_size=2)
    for change in ({"num_replications": 1}, {"num_draws": 0}, {"batch_size": 0}, {"level": 1.0}):
        with pytest.raises(SettingError):
            sbc(exact(), prior, **{"num_replications": 4, **change})


def test_chains_that_have_not_mixed_are_told():
    def stuck(y, *, seed):
        return {"theta": exact(coefficient=0.99, num_draws=60)(y, seed=seed)["theta"]}

    with pytest.warns(ConvergenceWarning, match="effective draws"):
        sbc(stuck, theta_only, 20, 30)


# ---- networks --------------------------------------------------------------------------------------------------------

X = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64).unsqueeze(-1)


def linear():
    """Bayesian linear regression with unknown noise, as a network without hidden layers."""
    return bdl.BNN((), prior=bdl.priors.Normal(1.5), likelihood=bdl.Gaussian(prior=bdl.hyper.LogNormal(-1.5, 0.6)))


def test_truths_of_a_network_prior_have_the_moments_of_the_model():
    """1200 networks: variance of f at the probes, median of the noise, and y about f; all at 4.5 errors."""
    model = linear()
    truths = NetworkPrior(model, X, X[:2])
    source = torch.Generator().manual_seed(1)
    drawn = [truths.simulate(source) for _ in range(1200)]
    f = torch.stack([t["f"] for t, _ in drawn])
    noise = torch.stack([t["noise_variance"] for t, _ in drawn])
    other = model.sample_prior(X[:2], 20_000, torch.Generator().manual_seed(2))
    assert f.shape == (1200, 2)
    assert ((f.var(0) / other.var(0) - 1).abs() < 4.5 * (2 / 1200) ** 0.5 * 1.2).all()
    assert stats.kstest(noise.log().numpy(), stats.norm(-1.5, 0.6).cdf).pvalue > 1e-4
    z = torch.stack([(d[1][:2] - t["f"]) / t["noise_variance"].sqrt() for t, d in drawn])
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-4
    source = torch.Generator().manual_seed(9)
    truth, (_, y) = NetworkPrior(model, X[:2], X[:2]).simulate(source)
    wanted = torch.distributions.Normal(truth["f"], truth["noise_variance"].sqrt()).log_prob(y).sum()
    assert float(truth["log_likelihood"]) == pytest.approx(float(wanted), rel=1e-9)


def test_hmc_on_a_network_is_calibrated_in_batches():
    """Four quantities, 40 replications, the smallest p-value above 0.01 / 4: a false alarm for 1 in 100 seeds."""
    engine = bdl.HMC(linear(), num_chains=2, num_warmup=80, num_draws=150, num_steps=12, standardize=False)
    result = sbc(engine, NetworkPrior(linear(), X, X[[0, 3]]), 40, 30, seed=2, batch_size=40)
    assert result.names == ("f[0]", "f[1]", "noise_variance", "log_likelihood")
    assert result.passed


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")  # few draws
@pytest.mark.parametrize("likelihood", [bdl.Bernoulli(), bdl.Categorical(3)])
def test_classification_has_truths_and_draws_of_one_shape(likelihood):
    model = bdl.BNN((3,), likelihood=likelihood)
    engine = bdl.HMC(model, num_chains=2, num_warmup=20, num_draws=30, num_steps=4, standardize=False)
    result = sbc(engine, NetworkPrior(model, X, X[:2]), 4, 10, batch_size=2)
    axes = 6 if likelihood.task == "multiclass" else 2
    assert len(result.names) == axes + 1


def test_an_engine_that_standardises_is_refused():
    with pytest.raises(SettingError, match="standardise"):
        sbc(bdl.HMC(linear()), NetworkPrior(linear(), X, X), 4)
    flat = bdl.BNN((), likelihood=bdl.Gaussian(prior=None))
    with pytest.raises(SettingError, match="prior"):
        NetworkPrior(flat, X, X).simulate(torch.Generator())


def test_a_posterior_that_is_no_set_of_networks_is_ranked_by_its_functions():
    class Other:
        def sample(self, x, shape, *, seed):
            assert torch.equal(x, X[:3])
            return torch.arange(2.0).unsqueeze(-1) + torch.zeros(*shape, 2, 3)  # two data sets

    found = NetworkPrior(linear(), X, X[:3]).quantities(Other(), X, X[:, 0])
    assert {name: tuple(value.shape) for name, value in found.items()} == {"f": (2, 1, 1000, 3)}
    assert (found["f"][1] == 1).all()


# ---- Gaussian processes ----------------------------------------------------------------------------------------------


def process(ard=False, mean="constant"):
    prior = bdl.hyper.LogNormal(-0.5, 0.5)
    matern = bdl.kernels.Matern(nu=1.5, ard=ard, lengthscale_prior=prior)
    kernel = bdl.kernels.Scale(matern, outputscale_prior=bdl.hyper.LogNormal(0.3, 0.4))
    return bdl.GP(kernel, mean, likelihood=bdl.Gaussian(prior=bdl.hyper.LogNormal(-2.0, 0.5)))


def test_truths_of_a_process_prior_are_draws_of_their_priors_and_their_likelihood_is_scipys():
    """600 draws: Kolmogorov and Smirnov at 1e-4 on three log-normal laws and the mean; log N(y) up to its constant."""
    x = torch.cat([X, X.square()], -1)
    truths = ProcessPrior(process(ard=True), x)
    source = torch.Generator().manual_seed(3)
    drawn = [truths.simulate(source) for _ in range(600)]
    laws = {"kernel.outputscale": (0.3, 0.4), "kernel.base.lengthscale": (-0.5, 0.5), "noise_variance": (-2.0, 0.5)}
    for name, (loc, scale) in laws.items():
        values = torch.stack([t[name] for t, _ in drawn])
        assert values.shape == ((600, 2) if "lengthscale" in name else (600,))
        assert stats.kstest(values.log().flatten().numpy(), stats.norm(loc, scale).cdf).pvalue > 1e-4
    assert stats.kstest(torch.stack([t["mean"] for t, _ in drawn]).numpy(), "norm").pvalue > 1e-4
    squares = []
    for truth, (inputs, y) in drawn[:100]:
        scaled = (inputs.unsqueeze(1) - inputs) / truth["kernel.base.lengthscale"]
        r = 3**0.5 * scaled.square().sum(-1).sqrt()
        k = truth["kernel.outputscale"] * (1 + r) * torch.exp(-r) + truth["noise_variance"] * torch.eye(len(y))
        wanted = stats.multivariate_normal(torch.full((6,), float(truth["mean"])).numpy(), k.numpy()).logpdf(y.numpy())
        assert float(truth["log_likelihood"]) - 3 * np.log(2 * np.pi) == pytest.approx(wanted, rel=1e-6)
        squares.append(float((y - truth["mean"]) @ torch.linalg.solve(k, y - truth["mean"])))
    assert stats.kstest(squares, stats.chi2(6).cdf).pvalue > 1e-4


def test_hmc_on_a_process_is_calibrated_in_batches():
    """Five quantities, 24 replications, the smallest p-value above 0.01 / 5: a false alarm for 1 in 100 seeds."""
    engine = bdl.HMC(process(), num_chains=4, num_warmup=100, num_draws=120, num_steps=8, standardize=False)
    result = sbc(engine, ProcessPrior(process(), X), 24, 30, seed=3, batch_size=24)
    names = ("kernel.outputscale", "kernel.base.lengthscale", "noise_variance", "mean", "log_likelihood")
    assert set(result.names) == set(names)
    assert result.passed
    with pytest.raises(SettingError, match="standardise"):
        sbc(bdl.NUTS(process()), ProcessPrior(process(), X), 4)


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_and_a_longer_one_goes_on(tmp_path):
    calls = []
    first = sbc(exact(), prior, 20, 40, seed=6, batch_size=5, checkpoint=tmp_path)
    again = sbc(exact(calls=calls), prior, 20, 40, seed=6, batch_size=5, checkpoint=tmp_path)
    assert calls == []
    assert torch.equal(first.values, again.values)
    longer = sbc(exact(calls=calls), prior, 30, 40, seed=6, batch_size=5, checkpoint=tmp_path)
    assert len(calls) == 2
    assert torch.equal(longer.values[:20], first.values)
    assert torch.equal(longer.values, sbc(exact(), prior, 30, 40, seed=6, batch_size=5).values)


def test_the_folder_of_another_run_is_refused_and_half_a_file_is_not_read(tmp_path):
    sbc(exact(), prior, 10, 40, seed=6, batch_size=5, checkpoint=tmp_path)
    for change in ({"seed": 7}, {"num_draws": 30}):
        settings = {"num_replications": 10, "num_draws": 40, "seed": 6, "batch_size": 5, **change}
        with pytest.raises(StorageError, match="same run"):
            sbc(exact(), prior, checkpoint=tmp_path, **settings)
    whole = sorted(tmp_path.glob("*.safetensors"))[1]
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    calls = []
    sbc(exact(calls=calls), prior, 10, 40, seed=6, batch_size=5, checkpoint=tmp_path)
    assert len(calls) == 1
    assert torch.equal(read_values(tmp_path), sbc(exact(), prior, 10, 40, seed=6, batch_size=5).values)


SCRIPT = """
import sys
from pathlib import Path
from tests.test_sbc import exact, prior, sbc
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
inner = exact()
def slow(y, *, seed):
    import time
    with log.open("a") as file:
        file.write(f"{seed}\\n")
    time.sleep(0.15)
    return inner(y, seed=seed)
sbc(slow, prior, 20, 40, seed=6, batch_size=2, checkpoint=folder)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL after the third batch, then to the end: equal ranks, and no more than one batch fitted twice."""
    log, folder = tmp_path / "log", tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, str(folder), str(log)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment())
    while len(list(folder.glob("replications*"))) < 3:
        assert process.poll() is None
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = log.read_text().split()
    assert 3 <= len(begun) <= 6
    done = len(list(folder.glob("replications*")))
    calls = []

    def count(y, *, seed):
        calls.append(seed)
        return exact()(y, seed=seed)

    result = sbc(count, prior, 20, 40, seed=6, batch_size=2)
    calls.clear()
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    assert len(log.read_text().split()) == len(begun) + 10 - done
    resumed = read_values(folder)
    assert torch.equal(result.values, resumed)


def environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def read_values(folder):
    from bayesdl import _storage

    return torch.cat([_storage.read(path)[1]["values"] for path in sorted(folder.glob("replications*"))])


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_the_plot_shows_every_quantity_and_marks_those_outside(tmp_path):
    result = sbc(exact(shift=0.6), prior, 100, 50, seed=1)
    figure = result.plot()
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert [title.split()[0] for title in titles] == ["theta", "fit"]
    colours = {axes.lines[1].get_color() for axes in figure.axes[:1]}
    assert colours == {"#D55E00"}
    figure.savefig(tmp_path / "sbc.png")
    assert (tmp_path / "sbc.png").stat().st_size > 5000
    assert len(result.plot(("fit",)).axes) == 1
    with pytest.raises(SettingError, match="'eta'"):
        result.plot(("eta",))
