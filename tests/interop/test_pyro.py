"""Pyro models as log densities: Pyro's own potential, closed forms and hand-written densities are the judges."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch.distributions import constraints

import bayesdl as bdl
import bayesdl.inference.sample
from bayesdl.errors import ConvergenceWarning, SettingError
from bayesdl.interop._pyro_graph import record
from bayesdl.interop._pyro_transforms import LowerCholesky, PositiveDefinite
from bayesdl.samplers.base import value_and_grad
from tests import posteriordb

LogDensity = bdl.LogDensity
X = torch.linspace(-1.3, 1.7, 30, dtype=torch.float64).reshape(10, 3)
Y = torch.sin(3 * X.sum(-1))


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Models whose numbers carry no dtype are in float64, so that Pyro's own potential is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(before)


def reals() -> None:
    a = pyro.sample("a", dist.Normal(1.0, 2.0))
    b = pyro.sample("b", dist.StudentT(3.0, a, 0.5).expand([4]).to_event(1))
    pyro.sample("y", dist.Normal(b.sum(-1), 0.7), obs=torch.tensor(0.3))


def positives() -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.7))
    scale = pyro.sample("scale", dist.LogNormal(0.3, 0.4).expand([2]).to_event(1))
    tail = pyro.sample("tail", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(tail, rate * scale.prod(-1)), obs=torch.tensor(1.4))


def intervals() -> None:
    low = pyro.sample("low", dist.Uniform(2.0, 5.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.5))
    pyro.sample("above", dist.Pareto(1.5, 2.0))
    pyro.sample("y", dist.Normal(low * share, 0.6), obs=torch.tensor(1.4))


def simplex() -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.2, 3.0, 0.8, 2.0])))
    pyro.sample("y", dist.Multinomial(9, p), obs=torch.tensor([2.0, 4.0, 0.0, 3.0]))


def correlation_factor() -> None:
    chol = pyro.sample("chol", dist.LKJCholesky(3, 1.7))
    scale = pyro.sample("scale", dist.HalfNormal(2.0).expand([3]).to_event(1))
    factor = scale.unsqueeze(-1) * chol
    with pyro.plate("data", 10):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=X)


def correlation_matrix() -> None:
    matrix = pyro.sample("matrix", dist.LKJ(3, 2.3))
    pyro.sample("y", dist.Normal(matrix[..., 0, 1], 0.5), obs=torch.tensor(0.2))


def ordered() -> None:
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()]))
    pyro.sample("y", dist.Normal(cuts[..., 2] - cuts[..., 0], 0.5), obs=torch.tensor(2.0))


def nested_plates() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("group", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(mu, 0.6))
        with pyro.plate("inner", 4, dim=-2):
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Normal(a * b, 0.4), obs=torch.linspace(0, 1, 12).reshape(4, 3))


def two_plates() -> None:
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.5))
    with columns:
        b = pyro.sample("b", dist.Normal(0.5, 0.5))
    with rows, columns:
        pyro.sample("y", dist.Normal(a + b, 0.8), obs=torch.linspace(-1, 1, 12).reshape(3, 4))


def undeclared_batch() -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(8), 2.0))
    tau = pyro.sample("tau", dist.Exponential(0.7))
    pyro.sample("y", dist.Normal(theta, tau), obs=torch.linspace(-3, 4, 8))


def sequential_plate() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    for i in pyro.plate("items", 3):
        a = pyro.sample(f"a_{i}", dist.Normal(mu, 0.6))
        pyro.sample(f"y_{i}", dist.Normal(a, 0.4), obs=Y[i])


def factors_masks_scales() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("soft", -0.3 * (a - 2.0) ** 4)
    with pyro.poutine.scale(scale=2.5), pyro.plate("data", 10), pyro.poutine.mask(mask=X[:, 0] > 0):
        pyro.sample("y", dist.Normal(a, 0.9), obs=Y)


def horseshoe() -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(0.3))
    local = pyro.sample("local", dist.HalfCauchy(1.0).expand([3]).to_event(1))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), tau.unsqueeze(-1) * local).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.5))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal((X * beta).sum(-1), sigma), obs=Y)


def matrix_times_vector() -> None:
    """As most people write it: broadcasts over no chain axis, so that only vmap can take many chains at once."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.5).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.5))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(X @ beta, sigma), obs=Y)


def mixture() -> None:
    share = pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", 10):
        z = pyro.sample("z", dist.Categorical(share))
        chosen = torch.where(z == 0, loc[..., :1], loc[..., 1:])
        pyro.sample("y", dist.Normal(chosen, scale), obs=Y)


def hidden_markov() -> None:
    stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    state = torch.tensor(0)
    for t in pyro.markov(range(6)):
        p = torch.where(state == 0, 1 - stay, stay)
        state = pyro.sample(f"state_{t}", dist.Bernoulli(p))
        pyro.sample(f"y_{t}", dist.Normal(level * state, 0.6), obs=Y[t])


class Network(PyroModule):
    """A Bayesian network as Pyro's tutorials write it; its priors were made when distributions still checked."""

    def __init__(self) -> None:
        super().__init__()
        for name, width, out in (("first", 3, 4), ("last", 4, 1)):
            layer = PyroModule[torch.nn.Linear](width, out)
            layer.weight = PyroSample(dist.Normal(torch.zeros(out, width, dtype=torch.float64), 1.3).to_event(2))
            layer.bias = PyroSample(dist.Normal(torch.zeros(out, dtype=torch.float64), 0.7).to_event(1))
            setattr(self, name, layer)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.last(torch.tanh(self.first(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


NETWORK = Network()


def network() -> None:
    NETWORK(X, Y)


def parameters() -> None:
    """What `pyro.param` holds counts as known."""
    width = pyro.param("width", torch.tensor(1.5), constraint=constraints.positive)
    slope = pyro.param("slope", torch.linspace(0.5, 1.5, 10))
    a = pyro.sample("a", dist.Normal(0.3, width))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Normal(a * slope, 0.8), obs=Y)


def branching() -> None:
    """Python looks at a value: no two chains can go through it together."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    width = 0.5 if a > 0.3 else 1.5
    pyro.sample("y", dist.Normal(a, width), obs=torch.tensor(0.4))


BATCHED = [positives, intervals, simplex, correlation_factor, ordered, nested_plates]
BATCHED += [two_plates, undeclared_batch, sequential_plate, factors_masks_scales, horseshoe, mixture, hidden_markov]
BATCHED += [parameters]
OTHERS = {reals: "vmap", correlation_matrix: "vmap", matrix_times_vector: "vmap", network: "vmap", branching: "loop"}


def pyro_log_density(model: Callable[[], None], density: LogDensity, q: Tensor) -> Tensor:
    """What Pyro's own MCMC would use, one chain at a time; q (C, dim)."""
    depth = 2 if model in (nested_plates, two_plates) else 1
    _, potential, transforms, trace = initialize_model(model, max_plate_nesting=depth)
    names = [name for name in trace.nodes if name in transforms]
    shapes = {name: transforms[name](trace.nodes[name]["value"]).shape for name in names}
    first, pieces = 0, {}
    for name in names:
        pieces[name] = (first, first + shapes[name].numel())
        first = pieces[name][1]
    assert first == density.dim
    assert [n.partition("[")[0] for n in density.names] == [n for n in names for _ in range(shapes[n].numel())]
    rows = [{n: row[slice(*pieces[n])].reshape(shapes[n]) for n in names} for row in q]
    return torch.stack([-potential(row) for row in rows])


def gradient(f: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    q = q.clone().requires_grad_(True)
    return torch.autograd.grad(f(q).sum(), q)[0]


def points(density: LogDensity, num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, density.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.touches_global_rng  # Pyro draws its own starts
@pytest.mark.parametrize("model", [*BATCHED, *OTHERS], ids=lambda m: m.__name__)
def test_the_density_is_that_of_pyro(model: Callable[[], None]) -> None:
    """Values and gradients at 64 points, far out, for every kind of constraint and of structure.

    Once recorded, no line of the model runs again, unless its Python code looks at values.
    """
    runs = []

    def counted() -> None:
        runs.append(1)
        model()

    density = LogDensity.from_pyro(counted)
    assert density.evaluation == OTHERS.get(model, "batched")
    q = 1.5 * points(density, 64)
    wanted = pyro_log_density(model, density, q)
    torch.testing.assert_close(density(q), wanted, rtol=1e-8, atol=1e-8)
    by_pyro = gradient(lambda u: pyro_log_density(model, density, u), q[:5])
    torch.testing.assert_close(gradient(density, q)[:5], by_pyro, rtol=1e-8, atol=1e-8)
    seen = len(runs)
    value, grad = density.value_and_grad(q.reshape(2, 32, -1))
    assert (len(runs) == seen) == (model is not branching)
    torch.testing.assert_close(value.reshape(-1), wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(grad.reshape(64, -1), gradient(density, q), rtol=1e-12, atol=1e-12)


def test_all_numbers_of_chains_agree() -> None:
    """Chains that drop out leave fewer behind: each gets the same value among 1, 3, 7, 64."""
    density = LogDensity.from_pyro(nested_plates)
    q = points(density, 64)
    whole = density(q)
    for num in (1, 3, 7, 33, 64):
        torch.testing.assert_close(density(q[:num]), whole[:num], rtol=1e-13, atol=1e-13)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS = {"y": [28.0, 8, -3, 7, -1, 1, 18, 12], "sigma": [15.0, 10, 16, 11, 9, 11, 10, 18]}


def schools(dtype: torch.dtype = torch.float64) -> LogDensity:
    return LogDensity.from_pyro(eight_schools, *(torch.tensor(SCHOOLS[name], dtype=dtype) for name in SCHOOLS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eight_schools_is_the_density_written_by_hand(dtype: torch.dtype) -> None:
    """Up to a constant; in float64 also for a model in float32, whose data are exact."""
    torch.set_default_dtype(dtype)
    density, hand = schools(dtype), posteriordb.eight_schools_noncentered(SCHOOLS).log_density
    q = 2 * points(density, 40)
    other = torch.cat([q[:, 2:], q[:, :2]], -1)
    offset = density(q) - hand(other)
    assert float(offset.max() - offset.min()) < 1e-10
    grad = gradient(hand, other)
    torch.testing.assert_close(gradient(density, q), torch.cat([grad[:, 8:], grad[:, :8]], -1), rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def chains() -> bdl.inference.sample.Chains:
    """Eight schools by NUTS, 8 chains."""
    settings = {"num_chains": 8, "num_warmup": 100, "num_draws": 100, "seed": 1, "target_accept": 0.9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return bdl.sample(schools(), sampler="nuts", **settings)


def test_sampling_gives_values_by_site_in_the_models_own_space(chains: bdl.inference.sample.Chains) -> None:
    values = chains.values
    assert set(values) == {"mu", "tau", "z", "theta"}
    assert values["theta"].shape == (8, 100, 8)
    assert values["tau"].dtype == torch.float64
    theta = values["mu"][..., None] + values["tau"][..., None] * values["z"]
    torch.testing.assert_close(values["theta"], theta, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values["tau"], chains.draws[..., 1].exp(), rtol=1e-6, atol=0)
    tree = chains.to_arviz()
    assert set(tree["posterior"].data_vars) == {"mu", "tau", "z", "theta"}
    assert tree["posterior"]["theta"].shape == (8, 100, 8)
    assert {"lp", "diverging", "energy"} <= set(tree["sample_stats"].data_vars)


def test_moments_are_those_of_the_reference(chains: bdl.inference.sample.Chains, data_dir: Path) -> None:
    """Means of ten quantities within 4 Monte Carlo errors of posteriordb's draws: a false alarm for 1 in 1600 seeds."""
    reference = posteriordb.load(data_dir, "eight_schools-eight_schools_noncentered")
    columns = {"mu": chains.values["mu"], "tau": chains.values["tau"]}
    columns |= {f"theta[{i + 1}]": chains.values["theta"][..., i] for i in range(8)}
    for name, value in columns.items():
        wanted = reference.draws[..., reference.names.index(name)]
        errors = [
            array_stats.mcse(np.asarray(draws), method="mean", chain_axis=0, draw_axis=1) for draws in (value, wanted)
        ]
        assert abs(float(value.mean()) - wanted.mean()) < 4 * math.hypot(*errors)


def test_log_likelihood_and_predictive_are_those_of_the_model() -> None:
    density = schools()
    draws = points(density, 12).reshape(3, 4, -1)
    values = density.transform(draws)
    y, sigma = (torch.tensor(SCHOOLS[name]) for name in ("y", "sigma"))
    found = density.log_likelihood(draws)["y"]
    torch.testing.assert_close(found, torch.distributions.Normal(values["theta"], sigma).log_prob(y))
    torch.testing.assert_close(density.observed["y"], y)
    state = torch.get_rng_state()
    many = density.predictive(draws[:1, :1].expand(2, 1000, -1), seed=3)["y"]
    again = density.predictive(draws[:1, :1].expand(2, 1000, -1), seed=3)["y"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(many, again)
    assert not torch.equal(many, density.predictive(draws[:1, :1].expand(2, 1000, -1), seed=4)["y"])
    # 16 comparisons at 4.5 standard errors of 2000 draws: false alarms below 2e-4
    gap = (many.mean((0, 1)) - values["theta"][0, 0]).abs() / sigma * 2000**0.5
    assert float(gap.max()) < 4.5
    assert float((many.std((0, 1)) / sigma - 1).abs().max()) < 4.5 / 4000**0.5


@pytest.mark.parametrize("model", [matrix_times_vector, branching], ids=lambda m: m.__name__)
def test_named_values_and_predictive_without_an_outer_plate(model: Callable[[], None]) -> None:
    density = LogDensity.from_pyro(model)
    draws = points(density, 6).reshape(2, 3, -1)
    values, likelihood = density.transform(draws), density.log_likelihood(draws)["y"]
    if model is matrix_times_vector:
        torch.testing.assert_close(values["beta"], draws[..., :3])
        torch.testing.assert_close(values["sigma"], draws[..., 3].exp())
        loc = values["beta"] @ X.T
        torch.testing.assert_close(likelihood, dist.Normal(loc, values["sigma"][..., None]).log_prob(Y))
    shape = (2, 3) if model is branching else (2, 3, 10)
    drawn = density.predictive(draws, seed=0)["y"]
    assert drawn.shape == likelihood.shape == shape
    assert drawn.reshape(6, -1)[:, 0].unique().numel() == 6


def test_the_pointwise_likelihood_of_a_mixture_sums_over_its_labels() -> None:
    density = LogDensity.from_pyro(mixture)
    draws = points(density, 6).reshape(2, 3, -1)
    values = density.transform(draws)
    assert set(values) == {"share", "loc", "scale"}
    parts = dist.Normal(values["loc"][..., None, :], values["scale"][..., None, None]).log_prob(Y[:, None])
    wanted = (values["share"].log()[..., None, :] + parts).logsumexp(-1)
    torch.testing.assert_close(density.log_likelihood(draws)["y"], wanted)
    assert density.predictive(draws, seed=0)["y"].shape == (2, 3, 10)
    assert density.log_likelihood(draws).keys() == {"y"}
    assert LogDensity.from_pyro(hidden_markov).log_likelihood(torch.zeros(1, 2, 2)) == {}


def covariance() -> None:
    s = pyro.sample("s", dist.Wishart(torch.tensor(5.5), scale_tril=torch.eye(3) * 0.7))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), s), obs=X[:4].sum(0))


def test_a_covariance_matrix_has_the_jacobian_of_its_triangle() -> None:
    """Pyro has no bijection for it: the judge is a numerical determinant of the map, and the density by torch."""
    density = LogDensity.from_pyro(covariance)
    assert density.dim == 6
    q = 0.7 * points(density, 5)
    s = density.transform(q[None])["s"][0]
    joint = torch.distributions.Wishart(5.5, scale_tril=torch.eye(3) * 0.7).log_prob(s)
    joint = joint + torch.distributions.MultivariateNormal(torch.zeros(3), s).log_prob(X[:4].sum(0))
    rows, columns = torch.tril_indices(3, 3)
    jacobians = [torch.autograd.functional.jacobian(lambda u: PositiveDefinite()(u)[rows, columns], row) for row in q]
    volume = torch.stack([torch.linalg.slogdet(jacobian).logabsdet for jacobian in jacobians])
    torch.testing.assert_close(density(q), joint + volume)


@pytest.mark.parametrize("transform", [LowerCholesky(), PositiveDefinite()], ids=["factor", "matrix"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrix_bijections(transform: torch.distributions.Transform, n: int) -> None:
    u = torch.randn(3, n * (n + 1) // 2, generator=torch.Generator().manual_seed(n))
    value = transform(u)
    assert value.shape == transform.forward_shape(u.shape) == (3, n, n)
    assert transform.inverse_shape(value.shape) == u.shape
    assert bool(transform.codomain.check(value).all())
    torch.testing.assert_close(transform._inverse(value), u)
    rows, columns = torch.tril_indices(n, n)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[rows, columns], u[0])
    wanted = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, value)[0], wanted)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    lengthscale = pyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
    k = torch.exp(-0.5 * ((x[:, None] - x) / lengthscale[..., None, None]) ** 2)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), k), obs=y)


def test_a_chain_whose_matrix_cannot_be_factored_does_not_stop_the_others() -> None:
    density = LogDensity.from_pyro(gaussian_process, torch.linspace(0, 12, 12), torch.zeros(12))
    q = torch.tensor([[-2.0], [9.0], [-1.7], [-1.5], [8.0]])
    value, grad = density.value_and_grad(q)
    assert value.isfinite().tolist() == [True, False, True, True, False]
    assert bool((value[[1, 4]] == -torch.inf).all())
    assert bool((grad[[1, 4]] == 0).all())
    torch.testing.assert_close(value[[0, 2, 3]], density(q[[0, 2, 3]]))


def test_a_site_may_bound_another() -> None:
    """The support of the second depends on the first: density against the formula."""

    def model() -> None:
        top = pyro.sample("top", dist.Gamma(3.0, 1.0))
        pyro.sample("x", dist.Uniform(-top, top))

    density = LogDensity.from_pyro(model)
    q = points(density, 20)
    top, share = q[:, 0].exp(), q[:, 1].sigmoid()
    prior = torch.distributions.Gamma(3.0, 1.0).log_prob(top) - (2 * top).log()
    jacobian = q[:, 0] + (2 * top * share * (1 - share)).log()
    torch.testing.assert_close(density(q), prior + jacobian)
    torch.testing.assert_close(density.transform(q[None])["x"][0], top * (2 * share - 1))


def test_a_branch_is_taken_by_every_chain_for_itself() -> None:
    density = LogDensity.from_pyro(branching)
    single = [density(torch.tensor([[value]]))[0] for value in (0.29, 0.31)]
    torch.testing.assert_close(density(torch.tensor([[0.29], [0.31]])), torch.stack(single))
    wide, narrow = (torch.distributions.Normal(v, w).log_prob(torch.tensor(0.4)) for v, w in ((0.29, 1.5), (0.31, 0.5)))
    prior = torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor([0.29, 0.31]))
    torch.testing.assert_close(torch.stack(single), prior + torch.stack([wide, narrow]))


@pytest.mark.slow
def test_compiled_and_eager_agree() -> None:
    """What is recorded goes through torch.compile as it is."""
    density = schools()
    q = points(density, 16)
    value, grad = density.value_and_grad(q)
    compiled = value_and_grad(density, compile=True)
    for found, wanted in zip(compiled(q), (value, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_recording_keeps_what_is_written_in_place() -> None:
    """Constants that an operation writes over must be made anew at every call, or a call would see the last one."""

    def function(q: Tensor) -> Tensor:
        table = torch.zeros(3, 4)
        table[:, 1] += q.sum(-1)
        row = table[0]
        row.mul_(2.0)
        filled = torch.ones(3) * 1.0
        filled.add_(q[:, 0]).clamp_(min=0.5)
        return table.sum(-1) + filled + torch.full_like(q, 2.0).sum(-1) * 1.0

    q = points(LogDensity(torch.sum, 2), 3)
    graph = record(function, q)
    for shift in (0.0, 1.0, -3.0, 0.0):
        torch.testing.assert_close(graph(q + shift), function(q + shift), rtol=1e-14, atol=1e-14)


def test_building_leaves_no_trace_in_global_state() -> None:
    states = torch.get_rng_state(), torch.distributions.Distribution._validate_args
    density = LogDensity.from_pyro(horseshoe)
    density.transform(density.value_and_grad(points(density, 4))[1][None])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.distributions.Distribution._validate_args == states[1]
    assert pyro.poutine.runtime._PYRO_STACK == []


def subsampled() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample_size=4) as index:
        pyro.sample("y", dist.Normal(a, 1.0), obs=Y[index])


def counts() -> None:
    a = pyro.sample("a", dist.Gamma(1.0, 1.0))
    k = pyro.sample("k", dist.Poisson(a))
    pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(2.0))


def sphere() -> None:
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def nothing() -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(2.0))


def own_noise() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a + torch.randn(()), 1.0), obs=torch.tensor(2.0))


def changing() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if a > 1e-9:
        pyro.sample("b", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "named"),
    [(subsampled, "rows"), (counts, "'k'"), (sphere, "direction"), (nothing, "latent"), (own_noise, "same")],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_cannot_be_sampled_is_refused_by_name(model: Callable[[], None], named: str) -> None:
    with pytest.raises(SettingError, match=named) as error:
        LogDensity.from_pyro(model)
    assert "fix" in str(error.value)


def test_a_model_whose_sites_come_and_go_is_refused() -> None:
    with pytest.raises(SettingError, match="'b'"):
        LogDensity.from_pyro(changing)(torch.tensor([[0.5], [-0.5]]))
    with pytest.raises(SettingError, match="a function that calls"):
        LogDensity.from_pyro(3.0)


def test_the_plain_constructor_is_as_it_was() -> None:
    density = LogDensity(lambda q: -0.5 * q.square().sum(-1), 2, ("a", "b"))
    assert density == LogDensity(density.fn, 2, ("a", "b"))
    assert density.transform is None
    assert json.dumps(density.names) == '["a", "b"]'
