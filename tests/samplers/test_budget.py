"""Budgets in gradients, blocks of chains, and torch.compile: the same draws by other means, or the first of them."""

from __future__ import annotations

import pytest
import torch

from bayesdl.errors import ConvergenceWarning, SettingError
from bayesdl.samplers import chees, cyclical, hmc, nuts, sghmc, sgld, summarize
from bayesdl.samplers.stochastic import batch_gradient


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banana(q):
    return -0.5 * q[..., 0] ** 2 - 0.5 * (q[..., 1] - q[..., 0] ** 2) ** 2 / 0.3 - 0.5 * q[..., 2] ** 2


class Counted:
    """A log density that counts its calls and remembers the most chains that it saw."""

    def __init__(self, fn=banana):
        self.fn, self.calls, self.widest = fn, 0, 0

    def __call__(self, q, *rest):
        self.calls, self.widest = self.calls + 1, max(self.widest, q.shape[-2])
        return self.fn(q, *rest)


RUNS = {"hmc": (hmc, {"num_steps": 6}), "nuts": (nuts, {"max_depth": 5}), "chees": (chees, {"max_steps": 30})}


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thin", [1, 3])
@pytest.mark.parametrize("name", RUNS)
def test_a_budget_ends_a_run_after_the_transition_that_spends_it(name, thin):
    """The draws are the first of the run without a budget; what is spent exceeds it by less than one transition."""
    module, settings = RUNS[name]
    settings = {"num_warmup": 12, "num_draws": 9, "thin": thin, "seed": 3, **settings}
    start = numbers(4, 3, seed=1)
    whole = module.run(banana, start, **settings)
    assert whole.stopped_by == "num_draws"
    longest = int(whole.stats["num_steps"].max())
    for budget in ((whole.warmup_gradients + whole.num_gradients) // 2, whole.num_gradients - 1):
        counted = Counted()
        run = module.run(counted, start, max_gradients=budget, **settings)
        num = run.draws.shape[-2]
        assert torch.equal(run.draws, whole.draws[:, :num])
        assert all(torch.equal(v.nan_to_num(), whole.stats[k][:, :num].nan_to_num()) for k, v in run.stats.items())
        assert budget <= run.num_gradients < budget + longest + 1
        assert num < 9 or run.stopped_by == "num_draws"
        assert run.stopped_by == summarize(run)["stopped_by"]
        if name != "nuts":  # whose trees that are complete wait beside longer ones without a call
            assert counted.calls == run.num_gradients + 1
    plenty = module.run(banana, start, max_gradients=whole.num_gradients + 1, **settings)
    assert torch.equal(plenty.draws, whole.draws)
    assert plenty.stopped_by == "num_draws"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("budget", [1, 40])
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")  # chains that have not moved yet look stuck
def test_a_budget_that_ends_in_warmup_gives_one_draw_and_a_warning(name, budget):
    module, settings = RUNS[name]
    with pytest.warns(ConvergenceWarning, match="ended warm-up after"):
        run = module.run(banana, numbers(4, 3), num_warmup=200, num_draws=30, thin=5, max_gradients=budget, **settings)
    assert run.draws.shape == (4, 1, 3)
    assert run.stopped_by == "max_gradients"
    assert run.draws.isfinite().all()
    assert run.num_gradients <= budget + 60


def test_memory_for_draws_grows_with_those_that_are_made():
    run = hmc.run(banana, numbers(2, 3), num_warmup=5, num_draws=10**9, num_steps=2, max_gradients=1500)
    assert run.stopped_by == "max_gradients"
    assert 700 < run.draws.shape[1] < 1500
    assert run.stats["energy"].shape == run.draws.shape[:2]


def test_a_stochastic_budget_counts_passes_over_the_data():
    """40 points in batches of 8: five steps a pass. 60 steps of warm-up, then a draw every fourth step."""
    y = numbers(40)

    def log_density(q, rows):
        part = y if rows is None else y[rows]
        return 40 / part.shape[-1] * -0.5 * (part.unsqueeze(-2) - q.unsqueeze(-1)).square().sum(-1).mean(-1)

    settings = {"num_data": 40, "batch_size": 8, "step_size": 0.01, "num_warmup": 60, "num_draws": 25, "thin": 4}
    for module in (sgld, sghmc):
        whole = module.run(log_density, numbers(3, 2), **settings)
        run = module.run(log_density, numbers(3, 2), max_gradients=20.3, **settings)
        assert (run.num_batches, run.num_gradients, run.stopped_by) == (102, 20.4, "max_gradients")
        assert run.draws.shape == (3, 10, 2)
        assert torch.equal(run.draws, whole.draws[:, :10])
        assert len(run.step_sizes) == 102
        assert (whole.stopped_by, whole.num_gradients) == ("num_draws", 32.0)
        with pytest.raises(SettingError, match="first draw, after 64 steps"):
            module.run(log_density, numbers(3, 2), max_gradients=12.5, **settings)
        assert module.run(log_density, numbers(3, 2), max_gradients=12.8, **settings).draws.shape == (3, 1, 2)
    settings = {"num_data": 40, "batch_size": 8, "step_size": 0.01, "num_warmup": 20, "num_cycles": 3}
    run = cyclical.run(log_density, numbers(3, 2), cycle_length=20, draws_per_cycle=5, max_gradients=9.0, **settings)
    assert (run.num_batches, run.draws.shape[1]) == (45, 5)


# ---- blocks of chains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("groups", [(), (2,)])
def test_blocks_of_chains_give_the_same_draws(name, groups):
    module, settings = RUNS[name]
    settings = {"num_warmup": 0, "num_draws": 12, "step_size": 0.3, "seed": 3, **settings}
    start = numbers(*groups, 7, 3, seed=1)
    whole, counted = module.run(banana, start, **settings), Counted()
    run = module.run(counted, start, chain_batch=3, **settings)
    assert counted.widest == 3
    torch.testing.assert_close(run.draws, whole.draws, rtol=0, atol=1e-9)
    assert run.num_gradients == whole.num_gradients


def test_blocks_of_chains_take_their_rows_along():
    y = numbers(40)

    def log_density(q, rows):
        part = y if rows is None else y[rows]
        return 40 / part.shape[-1] * -0.5 * (part.unsqueeze(-2) - q.unsqueeze(-1)).square().sum(-1).mean(-1)

    settings = {"num_data": 40, "step_size": 0.01, "num_warmup": 10, "num_draws": 10}
    for batch_size in (8, None):
        counted = Counted(log_density)
        run = sghmc.run(counted, numbers(5, 2), batch_size=batch_size, chain_batch=2, **settings)
        whole = sghmc.run(log_density, numbers(5, 2), batch_size=batch_size, **settings)
        assert counted.widest == 2
        torch.testing.assert_close(run.draws, whole.draws, rtol=0, atol=1e-9)
    q, rows = numbers(5, 2), torch.arange(15).reshape(5, 3)
    for found, wanted in zip(
        batch_gradient(log_density, chain_batch=2)(q, rows), batch_gradient(log_density)(q, rows), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_a_wrong_number_of_chains_is_refused(wrong):
    with pytest.raises(SettingError, match="chain_batch"):
        hmc.run(banana, numbers(3, 3), num_warmup=0, num_draws=2, chain_batch=wrong)
    with pytest.raises(SettingError, match="max_gradients"):
        hmc.run(banana, numbers(3, 3), num_warmup=0, num_draws=2, max_gradients=-1.0)
