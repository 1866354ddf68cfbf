"""What the stochastic-gradient samplers share: schedules, minibatches, per-chain streams, and the door."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayesdl.errors import DtypeError, NumericalError, SettingError, ShapeError
from bayesdl.samplers import cyclical, sghmc, sgld
from bayesdl.samplers.stochastic import Minibatches, batch_gradient, cosine_cycles, kept_steps, polynomial_schedule

CPU = torch.device("cpu")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_of(y):
    """log N(q | 0, 1) + sum_i log N(y_i | q, 1) from minibatches; its gradient is -q + sum (y_i - q)."""

    def log_density(q, rows):
        part = y if rows is None else y[rows]
        likelihood = -0.5 * (part.unsqueeze(-2) - q.unsqueeze(-1)).square().sum(-1).mean(-1)
        return len(y) / part.shape[-1] * likelihood - 0.5 * q.square().mean(-1)

    return log_density


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_polynomial_schedule_is_that_of_the_paper():
    """a (b + t)^-gamma with a = eps_0 b^gamma."""
    ours = polynomial_schedule(0.3, 6, offset=7.0, power=0.55)
    theirs = [0.3 * 7.0**0.55 * (7.0 + t) ** -0.55 for t in range(6)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert set(polynomial_schedule(0.3, 4, offset=7.0, power=0.0).tolist()) == {0.3}


def test_cosine_cycles_by_the_formula_of_the_paper():
    """K = 11 steps in M = 3 cycles: L = ceil(11 / 3) = 4, and the last cycle is cut short."""
    ours = cosine_cycles(0.8, 11, 3)
    theirs = [0.4 * (math.cos(math.pi * ((k - 1) % 4) / 4) + 1) for k in range(1, 12)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    np.testing.assert_allclose(ours[:4], [0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5)], rtol=1e-12)


def test_draws_are_kept_evenly_in_algorithmic_time():
    assert kept_steps([0.1] * 6, 3) == [0, 1, 0, 1, 0, 1]
    assert kept_steps([0.1] * 7, 7) == [1] * 7
    # elapsed 4, 6, 7, 8 with marks at 2, 4, 6, 8: a long first step counts twice
    assert kept_steps([4.0, 2.0, 1.0, 1.0], 4) == [2, 1, 0, 1]
    decaying = polynomial_schedule(1.0, 5000, offset=50.0, power=0.7)
    counts = torch.tensor(kept_steps(decaying.tolist(), 400), dtype=torch.float64)
    assert int(counts.sum()) == 400
    # what a weighted mean with the step sizes as weights would be, here of the step number
    place = torch.arange(5000, dtype=torch.float64)
    weighted = float((decaying * place).sum() / decaying.sum())
    assert float((counts * place).sum() / 400) == pytest.approx(weighted, rel=0.01)


# ---- minibatches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8, 13])
def test_an_epoch_is_a_partition_of_the_data_in_batches_of_nearly_one_size(size):
    batches = Minibatches(3, 2, 13, size, CPU)
    if size == 13:
        assert batches.next() is None
        return
    count = math.ceil(13 / size)
    epochs = [[batches.next() for _ in range(count)] for _ in range(2)]
    for epoch in epochs:
        assert max(b.shape[1] for b in epoch) <= size
        assert max(b.shape[1] for b in epoch) - min(b.shape[1] for b in epoch) <= 1
        for chain in range(2):
            assert sorted(torch.cat([b[chain] for b in epoch]).tolist()) == list(range(13))
    orders = [torch.cat([b[chain] for b in epoch]).tolist() for epoch in epochs for chain in range(2)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_gradients_of_an_epoch_add_up_to_the_full_gradient():
    """Each on the scale of all data and weighted by its share n / N: exact for any sizes, hence unbiased."""
    y, q = 3 * numbers(13), numbers(2, 1, seed=1)
    gradient = batch_gradient(mean_of(y))
    full_value, full = gradient(q, None)
    torch.testing.assert_close(full, -q + (y.sum() - 13 * q))
    batches = Minibatches(0, 2, 13, 5, CPU)
    parts = [batches.next() for _ in range(3)]
    values, slopes = zip(*(gradient(q, rows) for rows in parts), strict=True)
    shares = [rows.shape[1] / 13 for rows in parts]
    torch.testing.assert_close(sum(w * s for w, s in zip(shares, slopes, strict=True)), full)
    torch.testing.assert_close(sum(w * v for w, v in zip(shares, values, strict=True)), full_value)
    assert max(float((s - full).abs().max()) for s in slopes) > 1


# ---- streams, groups, bookkeeping ------------------------------------------------------------------------------------


def run_of(kind, log_density, start, **change):
    """A short run of one of the samplers on thirteen points."""
    settings = {"num_data": 13, "batch_size": 4, "step_size": 0.02, "seed": 5}
    if kind.startswith("cyclical"):
        settings |= {
            "num_warmup": 5,
            "num_cycles": 2,
            "cycle_length": 20,
            "draws_per_cycle": 5,
            "dynamics": kind.split()[1],
        }
    else:
        settings |= {"num_warmup": 15, "num_draws": 10, "thin": 3}
    runs = {"sgld": sgld.run, "sghmc": sghmc.run}
    return runs.get(kind, cyclical.run)(log_density, start, **(settings | change))


KINDS = ["sgld", "sghmc", "cyclical sgld", "cyclical sghmc"]


@pytest.mark.parametrize("kind", KINDS)
def test_chain_among_many_equals_the_chain_alone(kind):
    y, start = 3 * numbers(13), numbers(9, 4, seed=1)
    many = run_of(kind, mean_of(y), start)
    assert float(many.draws.std()) > 0.02
    for num in (1, 4):
        few = run_of(kind, mean_of(y), start[:num])
        torch.testing.assert_close(few.draws, many.draws[:num], rtol=1e-9, atol=1e-12)
        for name, value in few.stats.items():
            torch.testing.assert_close(value, many.stats[name][:num], rtol=1e-9, atol=1e-12)
    assert torch.equal(many.draws, run_of(kind, mean_of(y), start).draws)
    assert not torch.equal(many.draws, run_of(kind, mean_of(y), start, seed=6).draws)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_in_one_run_equal_a_loop_over_them(kind):
    y, start, scale = 3 * numbers(13), numbers(2, 3, 5, 4, seed=1), numbers(2, 3, seed=2).exp()
    together = run_of(kind, lambda q, rows: scale.unsqueeze(-1) * mean_of(y)(q, rows), start)
    assert together.draws.shape == (2, 3, 5, 10, 4)
    for place in np.ndindex(2, 3):
        own = scale[place]
        alone = run_of(kind, lambda q, rows, own=own: own * mean_of(y)(q, rows), start[place])
        torch.testing.assert_close(together.draws[place], alone.draws, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_counted_in_batches_and_in_passes_over_the_data(kind):
    seen = []

    def counted(q, rows):
        seen.append(13 if rows is None else rows.shape[-1])
        return mean_of(3 * numbers(13))(q, rows)

    run = run_of(kind, counted, numbers(2, 3))
    # one call more than gradients: the look at the door
    assert run.num_batches == len(seen) - 1 == len(run.step_sizes)
    assert run.num_gradients == pytest.approx(sum(seen[1:]) / 13)
    assert run.draws.shape == (2, 10, 3)
    assert run.stats["log_density_estimate"].shape == (2, 10)
    assert run.trace.shape[0] == 2
    assert run.seconds > 0


@pytest.mark.parametrize("kind", ["sgld", "sghmc"])
def test_scales_are_frozen_after_warmup(kind, monkeypatch):
    module = {"sgld": sgld, "sghmc": sghmc}[kind]
    seen, step = [], module.step
    monkeypatch.setattr(module, "step", lambda *arguments: seen.append(arguments) or step(*arguments))
    run_of(kind, mean_of(3 * numbers(13)), numbers(2, 3))
    squares = [arguments[1].square for arguments in seen]
    assert len(seen) == 45
    assert all(torch.equal(square, squares[15]) for square in squares[15:])
    assert len({float(square.sum()) for square in squares[:16]}) == 16


def test_a_schedule_gives_every_step_its_size():
    schedule = polynomial_schedule(0.05, 45, offset=3.0, power=0.6)
    run = run_of("sgld", mean_of(numbers(13)), numbers(2, 3), step_size=schedule)
    assert run.step_sizes == schedule.tolist()
    kept = [size for size, n in zip(run.step_sizes[15:], kept_steps(run.step_sizes[15:], 10), strict=True) if n]
    assert set(run.stats["step_size"][0].tolist()) == set(kept)


def test_float32_positions_keep_their_dtype():
    for kind in KINDS:
        run = run_of(kind, mean_of(numbers(13).float()), numbers(2, 3).float())
        assert run.draws.dtype == run.trace.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_the_gpu(kind):
    run = run_of(kind, mean_of(3 * numbers(13).cuda()), numbers(2, 3).cuda())
    assert run.draws.is_cuda
    assert run.draws.isfinite().all()


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_that_leaves_the_finite_numbers_is_an_error(kind):
    with pytest.raises(NumericalError, match="lower step_size"):
        run_of(kind, lambda q, rows: torch.where(q.abs() < 4, -q, torch.nan).sum(-1), numbers(2, 3), step_size=2.0)


@pytest.mark.parametrize(
    ("kind", "error", "word", "change"),
    [
        ("sgld", SettingError, "num_draws", {"num_draws": 0}),
        ("sgld", SettingError, "batch_size", {"batch_size": 0}),
        ("sgld", SettingError, "num_data", {"num_data": 0}),
        ("sgld", SettingError, "precondition", {"precondition": "adam"}),
        ("sgld", SettingError, "step sizes", {"step_size": -1.0}),
        ("sgld", ShapeError, "schedule", {"step_size": torch.ones(7)}),
        ("sgld", SettingError, "smoothing", {"parameters": sgld.Parameters(smoothing=1.0)}),
        ("sghmc", SettingError, "friction", {"friction": 1.0}),
        ("sghmc", SettingError, "max_drift", {"max_drift": 0.0}),
        ("sghmc", SettingError, "thin", {"thin": 0}),
        ("cyclical sgld", SettingError, "exploration", {"exploration": 1.0}),
        ("cyclical sgld", SettingError, "cycle_length", {"cycle_length": 1}),
        ("cyclical sgld", SettingError, "step_size", {"step_size": 0.0}),
        ("cyclical sgld", SettingError, "dynamics", {"dynamics": "hmc"}),
        ("sghmc", ShapeError, "initial", {"initial": torch.zeros(2)}),
        ("sghmc", DtypeError, "initial", {"initial": torch.zeros(2, 2, dtype=torch.int64)}),
        ("sghmc", ShapeError, "one per chain", {"log_density": lambda q, rows: q.square()}),
    ],
)
def test_wrong_calls_fail_at_the_door(kind, error, word, change):
    change = dict(change)
    log_density, start = change.pop("log_density", mean_of(numbers(13))), change.pop("initial", numbers(2, 3))
    with pytest.raises(error, match=word) as caught:
        run_of(kind, log_density, start, **change)
    assert "\n  got  " in str(caught.value)
    assert "\n  fix  " in str(caught.value)
