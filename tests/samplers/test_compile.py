"""torch.compile: one graph for any number of chains, the numbers of the eager code, and another way where it fails."""

from __future__ import annotations

import math
import shutil
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import bayesdl as bdl
from bayesdl.errors import ShapeError
from bayesdl.samplers import _microcanonical, chees, hamiltonian, nuts, sghmc
from bayesdl.samplers._gradients import ValueAndGradient
from bayesdl.samplers.base import value_and_grad

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def schools(q):
    """Eight schools, not centred: mu, log tau and eight standardised effects."""
    mu, log_tau, z = q[..., 0], q[..., 1], q[..., 2:]
    tau = log_tau.exp()
    residual = (EFFECTS - mu.unsqueeze(-1) - tau.unsqueeze(-1) * z) / ERRORS
    prior = -0.5 * (mu / 5) ** 2 + log_tau - (tau / 5).square().log1p() - 0.5 * z.square().sum(-1)
    return prior - 0.5 * residual.square().sum(-1)


def graphs():
    return counters["stats"].get("unique_graphs", 0)


def agree(compiled, eager, q, *rest):
    for found, wanted in zip(compiled(q, *rest), eager(q, *rest), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_one_graph_serves_any_number_of_chains_and_blocks():
    """64 chains, what NUTS leaves of them, a single one, and blocks of which the last is shorter."""
    eager, compiled = value_and_grad(schools), value_and_grad(schools, compile=True)
    before, q = graphs(), numbers(64, 10)
    agree(compiled, eager, q)
    blocks = ValueAndGradient(schools, chain_batch=5)
    blocks._whole = compiled._whole
    for num in (63, 17, 2, 1, 11):
        agree(compiled, eager, q[:num])
        agree(blocks, eager, q[:num])
    assert graphs() - before == 1
    assert float((compiled(q)[0] - eager(q)[0]).abs().max()) < 1e-12 * float(eager(q)[0].abs().max())
    start, settings = 0.3 * numbers(6, 10), {"num_warmup": 0, "num_draws": 5, "step_size": 0.3, "max_depth": 4}
    run = nuts.run(schools, start, compile=True, chain_batch=4, **settings)
    torch.testing.assert_close(run.draws, nuts.run(schools, start, **settings).draws, rtol=1e-7, atol=1e-7)


def metrics():
    spread = 0.5 + numbers(10, seed=3).square()
    basis, _ = torch.linalg.qr(numbers(10, 2, seed=4))
    dense = numbers(10, 10, seed=5)
    return {
        "diagonal": hamiltonian.diagonal_metric(spread),
        "dense": hamiltonian.dense_metric(dense @ dense.mT / 10 + torch.eye(10, dtype=torch.float64)),
        "low-rank": hamiltonian.low_rank_metric(spread, basis, torch.tensor([4.0, 0.2], dtype=torch.float64)),
    }


@pytest.mark.parametrize(
    "kind", ["diagonal", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dense", "low-rank"))]
)
def test_a_trajectory_is_one_graph_whatever_its_length(kind):
    """Positions, momenta, values and gradients of the loop inside the graph are those of the loop in Python."""
    metric, q, p = metrics()[kind], 0.3 * numbers(6, 10), numbers(6, 10, seed=1)
    eager, compiled = value_and_grad(schools), value_and_grad(schools, compile=True)
    grad, size = eager(q)[1], torch.linspace(0.05, 0.1, 6, dtype=torch.float64)
    before = graphs()
    for num_steps in (5, 2, 9):
        found = hamiltonian.leapfrog(compiled, q, p, grad, size, metric, num_steps)
        for got, wanted in zip(found, hamiltonian.leapfrog(eager, q, p, grad, size, metric, num_steps), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert graphs() - before == 1
    assert not compiled._loops._failed


@pytest.mark.parametrize("scheme", ["minimal-norm", pytest.param("leapfrog", marks=pytest.mark.slow)])
def test_microcanonical_paths_are_one_graph_too(scheme):
    q, eager, compiled = 0.3 * numbers(6, 10), value_and_grad(schools), value_and_grad(schools, compile=True)
    point = _microcanonical.Point(q, _microcanonical.unit(numbers(6, 10, seed=1)), *eager(q))
    size = torch.tensor([0.2], dtype=torch.float64)
    for num_steps in (4, 7):
        rest = (point, size, metrics()["dense"], num_steps, _microcanonical.SCHEMES[scheme])
        found, kinetic = _microcanonical.integrate(compiled, *rest)
        wanted, change = _microcanonical.integrate(eager, *rest)
        for got, right in zip((*found, kinetic), (*wanted, change), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    assert not compiled._loops._failed


def test_a_network_s_trajectories_are_one_graph():
    """Its own gradient writes in place; a graph has the ordinary operations, and the same numbers."""
    space = bdl.BNN(hidden=(7,)).weight_space(2, 1)
    density = space.bind(numbers(9, 2, seed=2), numbers(9, 1, seed=3))
    eager, compiled = value_and_grad(density), value_and_grad(density, compile=True)
    q = 0.5 * numbers(4, space.dim)
    agree(compiled, eager, q)
    rest = (q, numbers(4, space.dim, seed=1), eager(q)[1], torch.tensor([0.02], dtype=torch.float64))
    metric = hamiltonian.diagonal_metric(torch.ones(space.dim, dtype=torch.float64))
    found = hamiltonian.leapfrog(compiled, *rest, metric, 6)
    for got, wanted in zip(found, hamiltonian.leapfrog(eager, *rest, metric, 6), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert compiled._loops._graphs
    assert not compiled._loops._failed


def test_what_cannot_be_looped_over_is_walked_step_by_step(monkeypatch):
    """One warning, the numbers of the eager code, and no second try."""
    monkeypatch.setattr("bayesdl.samplers._repeated._graph", lambda evaluate, step: 1 / 0)
    q, p, eager = 0.3 * numbers(4, 10), numbers(4, 10, seed=1), value_and_grad(schools)
    compiled = value_and_grad(schools, compile=True)
    compiled._whole = eager
    rest = (eager(q)[1], torch.tensor([0.1], dtype=torch.float64), metrics()["diagonal"], 3)
    with pytest.warns(UserWarning, match="step by step"):
        found = hamiltonian.leapfrog(compiled, q, p, *rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = hamiltonian.leapfrog(compiled, q, p, *rest)
    for got, second, wanted in zip(found, again, hamiltonian.leapfrog(eager, q, p, *rest), strict=True):
        assert torch.equal(got, wanted)
        assert torch.equal(second, wanted)


@pytest.mark.slow
def test_what_was_compiled_serves_the_next_run_as_well():
    class Kept:
        def __init__(self):
            self.value_and_grad = value_and_grad(schools, compile=True)

        def __call__(self, q):
            return schools(q)

    density, start = Kept(), 0.3 * numbers(16, 10)
    settings = {"num_warmup": 0, "num_draws": 5, "step_size": 0.3, "trajectory_length": 2.0}
    first = chees.run(density, start, **settings).draws
    before = graphs()
    torch.testing.assert_close(chees.run(density, start, **settings).draws, first, rtol=0, atol=0)
    assert graphs() == before
    torch.testing.assert_close(first, chees.run(schools, start, **settings).draws, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("checks", [True, False])
def test_argument_checks_of_distributions_are_off_in_graphs_and_nowhere_else(checks):
    """torch.compile switches them off for the whole process when first used, and tracing with them on fails."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(checks)
    try:
        compiled = value_and_grad(lambda q: torch.distributions.Normal(q.exp(), 2.0).log_prob(q).sum(-1), compile=True)
        for num in (4, 1, 6):  # the second and the third call may trace again
            q = numbers(num, 3)
            value, grad = compiled(q)
            torch.testing.assert_close(value, -((q - q.exp()) ** 2 / 8 + math.log(2 * math.sqrt(2 * math.pi))).sum(-1))
            torch.testing.assert_close(grad, -(q - q.exp()) * (1 - q.exp()) / 4)
            assert torch.distributions.Distribution._validate_args is checks
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


@pytest.mark.slow
def test_gradients_that_are_not_finite_become_zero_in_graphs_too():
    def log_density(q):
        return torch.where(q > 0, q.log(), -torch.inf).sum(-1) - q.sum(-1)

    compiled = value_and_grad(log_density, compile=True)
    q = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [0.5, 0.0]], dtype=torch.float64)
    value, grad = compiled(q)
    assert value.isfinite().tolist() == [True, False, False]
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[0], torch.tensor([0.0, -0.5]).double())


class _Square(torch.autograd.Function):
    """-q'q / 2 by a function that torch.func cannot differentiate."""

    @staticmethod
    def forward(ctx, q):
        ctx.save_for_backward(q)
        return -0.5 * q.square().sum(-1)

    @staticmethod
    def backward(ctx, slope):
        return -slope.unsqueeze(-1) * ctx.saved_tensors[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about what torch.compile does to the function
def test_what_no_graph_can_differentiate_goes_another_way():
    compiled = value_and_grad(lambda q: _Square.apply(q) - q.sum(-1), compile=True)
    for num in (7, 3, 1):
        agree(compiled, value_and_grad(lambda q: -0.5 * q.square().sum(-1) - q.sum(-1)), numbers(num, 3))


@pytest.mark.slow
def test_minibatches_go_through_one_graph():
    y = numbers(40)

    def log_density(q, rows):
        part = y if rows is None else y[rows]
        return 40 / part.shape[-1] * -0.5 * (part.unsqueeze(-2) - q.unsqueeze(-1)).square().sum(-1).mean(-1)

    settings = {"num_data": 40, "batch_size": 8, "step_size": 0.01, "num_warmup": 10, "num_draws": 10}
    compiled = sghmc.run(log_density, numbers(5, 2), compile=True, **settings)
    eager = sghmc.run(log_density, numbers(5, 2), **settings)
    torch.testing.assert_close(compiled.draws, eager.draws, rtol=1e-9, atol=1e-9)


def test_a_log_density_may_bring_its_own_gradient():
    """It is used as it is, its entries that are not finite apart; the function itself is then asked for values only."""

    class Own:
        def __call__(self, q):
            return -0.5 * q.square().sum(-1)

        def value_and_grad(self, q):
            return self(q), torch.where(q > 3, torch.nan, -2 * q)  # a wrong one, so that it can be told apart

    value, grad = value_and_grad(Own())(torch.tensor([[1.0, 4.0]]))
    assert (float(value), grad.tolist()) == (-8.5, [[-2.0, 0.0]])


def test_gradients_are_there_under_no_grad_and_errors_come_through():
    with torch.no_grad():
        agree(value_and_grad(schools, chain_batch=2), value_and_grad(schools), numbers(3, 10))

    def refuses(q):
        raise ShapeError("no")

    with pytest.raises(ShapeError):
        value_and_grad(refuses, compile=True)(numbers(2, 2))
