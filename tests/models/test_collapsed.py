"""Networks whose output layer is integrated out: against the marginal likelihood written out, the law of the output
layer, and chains on all weights."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.distributions import MultivariateNormal

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, SettingError
from bayesdl.hyper import Gamma
from bayesdl.likelihoods import Gaussian
from bayesdl.models import BNN, _fused
from bayesdl.priors import Normal

F64 = torch.float64
PRIOR = Normal(scale=1.7, bias_scale=0.6)
NOISE = Gaussian(prior=Gamma(1.7, 2.5), lower=0.02)


def problem(hidden=(4, 3), activation="tanh", k=2, batch=(), n=9, dtype=F64):
    """A space, x (*b, n, 3), y (*b, n, k), what is left of the space, and four positions in it."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(*batch, n, 3, generator=g, dtype=dtype)
    y = torch.randn(*batch, n, k, generator=g, dtype=dtype)
    space = BNN(hidden, activation, PRIOR, NOISE).weight_space(3, k)
    rest = space.collapse(x, y)
    return space, x, y, rest, rest.reduce(torch.randn(*batch, 4, space.dim, generator=g, dtype=dtype))


def full(space, rest, q, output):
    """All coordinates from those that are left (..., dim) and standardised output weights (..., k, p)."""
    m = rest.num_weights
    return torch.cat([q[..., :m], output.mT.flatten(-2).to(q), q[..., m:]], -1)


def written_out(space, rest, q, x, y):
    """One data set, one position: log N(y | 0, v I + Psi Psi') and the priors, with torch.distributions."""
    m = rest.num_weights
    variance = space.positive(q[m:])["noise_variance"]
    features = space.network.features((q[:m] * space.scale[:m]).unsqueeze(0), x)[0]
    psi = torch.cat([features, torch.ones(len(x), 1, dtype=F64)], -1) * rest.widths
    eye = torch.eye(len(x), dtype=F64)
    fit = sum(
        MultivariateNormal(torch.zeros_like(y[:, j]), v * eye + psi @ psi.T).log_prob(y[:, j])
        for j, v in enumerate(variance)
    )
    prior = -0.5 * (q[:m].square() + math.log(2 * math.pi)).sum() + q[m:].sum()
    return fit + prior + NOISE.prior.log_prob(variance).sum()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("hidden", [(), (5,), (4, 3), (3, 4, 2)])
@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
def test_the_value_is_the_marginal_likelihood_and_the_slope_its_derivative(activation, hidden, k):
    space, x, y, rest, q = problem(hidden, activation, k)
    q.requires_grad_()
    value = rest.bind()(q)
    wanted = torch.stack([written_out(space, rest, one, x, y) for one in q])
    torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)
    slopes = [torch.autograd.grad(v.sum(), q, retain_graph=True)[0] for v in (value, wanted, rest.log_density(q))]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(slopes[2], slopes[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_data_sets_side_by_side_are_data_sets_alone(batch):
    space, x, y, rest, q = problem(batch=batch)
    value = rest.bind()(q)
    assert value.shape == (*batch, 4)
    torch.testing.assert_close(value, rest.log_density(q), rtol=1e-11, atol=1e-11)
    last = tuple(b - 1 for b in batch)
    torch.testing.assert_close(value[last], space.collapse(x[last], y[last]).bind()(q[last]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tile", [1, 40, 150])
def test_tiles_of_chains_and_rows_change_nothing(monkeypatch, tile):
    _, _, _, rest, q = problem(n=17)
    bound = rest.bind()
    value, slope = bound.value_and_grad(q)
    monkeypatch.setattr(_fused, "_TILE", tile)
    for _ in range(2):  # the second evaluation finds memory that holds what the first left there
        tiled, its_slope = bound.value_and_grad(q)
        torch.testing.assert_close(tiled, value, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(its_slope, slope, rtol=1e-9, atol=1e-9)


def test_float32_is_float64_to_rounding():
    """With a noise of a hundredth of the targets' variance, so that p x p matrices are badly conditioned."""
    _, _, _, rest, q = problem((20, 20), k=1, n=500, dtype=torch.float32)
    value, slope = rest.bind().value_and_grad(q)
    assert value.dtype == slope.dtype == torch.float32
    exact = BNN((20, 20), "tanh", PRIOR, NOISE).weight_space(3, 1).collapse(rest.x.double(), rest.y.double())
    wanted, wanted_slope = exact.bind().value_and_grad(q.double())
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(slope.double(), wanted_slope, rtol=1e-3, atol=1e-3 * float(wanted_slope.abs().max()))


def test_bayes_rule_holds_for_the_output_layer():
    """log p(b, rest) - log p(b | rest) is the same for every b, and is what the collapsed log density says."""
    space, x, y, rest, q = problem()
    m = rest.num_weights
    law = rest.law(*_sums(rest, q), space.positive(q[:, m:])["noise_variance"])
    precision = law.factor @ law.factor.mT
    wanted = rest.log_density(q)
    for seed in range(3):
        b = 3 * torch.randn(law.mean.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        joint = space.log_density(full(space, rest, q, b), x, y)
        of_output = MultivariateNormal(law.mean, precision_matrix=precision).log_prob(b).sum(-1)
        torch.testing.assert_close(joint - of_output, wanted, rtol=1e-9, atol=1e-9)


def _sums(rest, q):
    from bayesdl.models._collapsed import moments

    m = rest.num_weights
    return moments(rest.space.network.features(q[..., :m] * rest.space.scale[:m], rest.x), rest.y.unsqueeze(-3))


def test_completed_draws_have_the_moments_of_the_output_layer(monkeypatch):
    """20000 draws of 8 means and 8 standard deviations at 4.5 Monte Carlo errors: one in ten thousand false alarms."""
    space, _, _, rest, q = problem(batch=(2,))
    m, num = rest.num_weights, 20_000
    monkeypatch.setattr("bayesdl.models._collapsed._CHUNK", 2**17)
    draws = rest.complete(q.unsqueeze(-2).expand(2, 4, num, -1), seed=5)
    assert draws.shape == (2, 4, num, space.dim)
    assert torch.equal(rest.reduce(draws), q.unsqueeze(-2).expand(2, 4, num, -1))
    b = draws[1, 2, :, m : space.network.num_weights].unflatten(-1, (4, 2)).mT  # (num, k, p)
    law = rest.law(*_sums(rest, q), space.positive(q[..., m:])["noise_variance"])
    sd = torch.cholesky_inverse(law.factor[1, 2]).diagonal(dim1=-2, dim2=-1).sqrt()
    assert float(((b.mean(0) - law.mean[1, 2]) / sd).abs().max()) < 4.5 / num**0.5
    assert float((b.std(0) / sd - 1).abs().max()) < 4.5 / (2 * num) ** 0.5


def test_a_chain_draws_its_output_layers_whatever_the_others():
    _, _, _, rest, q = problem()
    draws = q.unsqueeze(-2).expand(4, 7, -1)
    whole = rest.complete(draws, seed=2)
    torch.testing.assert_close(rest.complete(draws[:2, :5], seed=2), whole[:2, :5], rtol=1e-10, atol=1e-10)
    assert float((whole[0, 0] - whole[0, 1]).abs().max()) > 1e-3


@pytest.mark.parametrize("log_noise", [-200.0, 1e4])
def test_a_position_from_which_nothing_can_be_computed_has_density_zero_or_a_finite_one(log_noise):
    _, _, _, rest, q = problem()
    q[1, rest.num_weights :] = log_noise
    q[2, 0] = torch.inf
    value, _ = rest.bind().value_and_grad(q)
    assert bool(value[[0, 3]].isfinite().all())
    assert not bool((value[1:3] == torch.inf).any())
    again = rest.bind().value_and_grad(q[[0, 3]])[0]
    torch.testing.assert_close(again, value[[0, 3]], rtol=1e-11, atol=1e-11)


# Engines

ENGINES = {
    "HMC": lambda model, **s: bdl.HMC(model, num_chains=8, num_warmup=200, num_draws=250, num_steps=24, **s),
    "NUTS": lambda model, **s: bdl.NUTS(model, num_chains=4, num_warmup=100, num_draws=120, **s),
    "ChEES": lambda model, **s: bdl.ChEES(model, num_chains=16, num_warmup=200, num_draws=100, **s),
    "MAMS": lambda model, **s: bdl.MAMS(model, num_chains=16, num_warmup=200, num_draws=100, **s),
}


def data(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(n, 1, generator=g, dtype=F64) - 2
    return x, torch.sin(2 * x[:, 0]) + 0.2 * torch.randn(n, generator=g, dtype=F64)


@pytest.fixture(scope="module")
def all_weights():
    """Function values at five inputs, (chains, draws, 5), by long chains on all weights."""
    x, y = data()
    engine = bdl.HMC(BNN((6,)), num_chains=16, num_warmup=400, num_draws=1200, num_steps=48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _functions(engine.fit(x, y, seed=9))


def _functions(posterior):
    """f at five inputs and the logarithm of the noise, chain by chain."""
    at = torch.linspace(-2.5, 2.5, 5, dtype=F64).unsqueeze(-1)
    draws = posterior.draws
    f = posterior.predict(at, noise=False).draws.unflatten(-1, draws.shape[-3:-1]).movedim(0, -1)
    return torch.cat([f, draws[..., -1:]], -1)


@pytest.mark.parametrize("name", ENGINES)
def test_chains_with_and_without_the_output_layer_agree(name, all_weights):
    """Mean and mean square of five function values and of the log noise at 4.5 combined Monte Carlo errors.

    48 comparisons, below one in a thousand false alarms; the seeds are fixed.
    """
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        posterior = ENGINES[name](BNN((6,)), collapse=True).fit(x, y, seed=1)
    assert posterior.diagnostics["collapsed"]
    found = _functions(posterior)
    for power in (1, 2):
        (mean, error), (other, its) = (_mean_and_error(f**power) for f in (found, all_weights))
        assert float(((mean - other) / (error.square() + its.square()).sqrt()).abs().max()) < 4.5


def _mean_and_error(f):
    """Mean over chains and draws, and its error from the spread of chains' means and their effective draws."""
    from arviz_stats.base import array_stats

    ess = torch.tensor(
        [
            float(array_stats.ess(f[..., i].numpy(), chain_axis=0, draw_axis=1, method="mean"))
            for i in range(f.shape[-1])
        ]
    )
    return f.mean((0, 1)), f.flatten(0, 1).std(0) / ess.sqrt()


def test_draws_resume_where_a_run_stopped(tmp_path):
    x, y = data()
    settings = {"num_chains": 2, "num_warmup": 20, "num_steps": 8, "collapse": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = bdl.HMC(BNN((6,)), num_draws=30, **settings).fit(x, y, seed=1)
        folder = str(tmp_path / "run")
        bdl.HMC(BNN((6,)), num_draws=10, checkpoint=folder, **settings).fit(x, y, seed=1)
        longer = bdl.HMC(BNN((6,)), num_draws=30, checkpoint=folder, **settings).fit(x, y, seed=1)
    assert torch.equal(whole.draws, longer.draws)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (BNN((4,), likelihood=bdl.Bernoulli()), "Bernoulli"),
        (BNN((4,), prior=bdl.priors.Laplace()), "Laplace"),
        (BNN(module=torch.nn.Linear(3, 1)), "module"),
        (bdl.GP(bdl.kernels.RBF()), "GP"),
    ],
)
@pytest.mark.parametrize("engine", [bdl.HMC, bdl.NUTS, bdl.ChEES, bdl.MAMS, bdl.MCLMC, bdl.MEADS])
def test_a_model_whose_output_layer_has_no_closed_form_is_refused(engine, model, why):
    with pytest.raises(SettingError, match=f"collapse=True(.|\n)*{why}"):
        engine(model, collapse=True)


def test_compilation_is_refused_at_the_door():
    with pytest.raises(SettingError, match="compile=True"):
        bdl.HMC(BNN((4,)), collapse=True, compile=True)
