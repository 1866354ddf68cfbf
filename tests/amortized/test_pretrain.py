"""Training: it learns what can be computed by hand, and a stopped run goes on as though it had not been stopped."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl.amortized import Architecture, Pretrained, ReferenceGap, Schedule, _batches, predictive, pretrain
from bayesdl.errors import NumericalError, SettingError, ShapeError, StorageError
from tests.toy_tasks import Blobs, NormalMeans, Steps, ToyTasks

TINY = Architecture(2, "mixture", 2, width=8, num_layers=2, num_heads=2, hidden=8, num_conditions=1)
BRIEF = Schedule(num_steps=12, batch=3, n_max=6, num_queries=4, average=0.9, accumulate=2, num_evaluations=4)


@dataclass
class Interrupted:
    """A prior that sends a signal to this process while it draws for the `at`-th time."""

    inner: Any
    at: int
    number: signal.Signals
    calls: int = 0

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> ToyTasks:
        """Tasks of the inner prior."""
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        return self.inner.sample(batch, n, d, generator)

    def __repr__(self) -> str:
        return repr(self.inner)


def same_weights(a: Pretrained, b: Pretrained) -> bool:
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def train(prior: Any, schedule: Schedule = BRIEF, architecture: Architecture = TINY, **settings: Any) -> Pretrained:
    return pretrain(prior, architecture, schedule, progress=False, **settings)


def test_a_network_learns_the_posterior_of_a_normal_mean() -> None:
    """Within 0.08 nats of Bayes' rule at every n, from 0.2 and more at the beginning; for mu itself, too.

    The network starts near N(0, 1), which is the prior predictive up to its variance of 1.25. Tasks of the test are
    fixed, so that it always gives the same numbers; the standard errors of the gaps are below 0.01, and such a run
    comes to about 0.03.
    """
    prior = NormalMeans(spread=1.0, noise=0.5)
    gap = ReferenceGap(prior, prior.reference, (0, 1, 3, 10), num_tasks=400, num_queries=4)
    schedule = Schedule(num_steps=390, batch=32, n_max=10, num_queries=8, learning_rate=4e-3, num_evaluations=3)
    shape = Architecture(1, "mixture", 2, width=32, num_layers=2, num_heads=2, hidden=32, num_conditions=1)
    untrained = train(prior, Schedule(num_steps=1, n_max=10, learning_rate=1e-9), shape)
    assert gap(untrained)["gap_10"] > 0.2
    trained = train(prior, schedule, shape, evaluate=gap)
    assert max(abs(value) for value, _ in gap.table(trained).values()) < 0.08
    log = trained.card["log"]
    assert [line["step"] for line in log] == [130, 260, 390]
    assert log[-1]["gap"] == pytest.approx(gap(trained)["gap"], abs=1e-5)
    # asked for values without noise, it gives the posterior of mu
    tasks = prior.sample(300, 5, 1, torch.Generator().manual_seed(9))
    mean, variance = prior.posterior(tasks.y)
    raw = trained.network(tasks.x, tasks.y, torch.zeros(300, 1, 1), torch.ones(300, 1))
    law = predictive(shape, raw[:, 0], None)
    assert float((law.mean - mean).square().mean().sqrt()) < 0.1
    assert float(law.variance.sqrt().mean()) == pytest.approx(math.sqrt(variance), rel=0.3)
    noisy = predictive(shape, trained.network(tasks.x, tasks.y, torch.zeros(300, 1, 1))[:, 0], None)
    assert float(noisy.variance.sqrt().mean()) == pytest.approx(math.sqrt(variance + 0.25), rel=0.15)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, number: signal.Signals) -> None:
    unbroken = train(NormalMeans())
    stopped = Interrupted(NormalMeans(), at=9, number=number)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt):
        train(stopped, out=tmp_path / "a.pfn")
    assert 2 <= stopped.calls <= 23
    assert not (tmp_path / "a.pfn").exists()
    assert (tmp_path / "a.pfn.run" / "state.safetensors").exists()
    resumed = train(NormalMeans(), out=tmp_path / "a.pfn")
    assert same_weights(unbroken, resumed)
    assert [line["loss"] for line in resumed.card["log"]] == [line["loss"] for line in unbroken.card["log"]]
    assert same_weights(Pretrained.load(tmp_path / "a.pfn"), resumed)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_can_be_stopped_by_the_clock_and_taken_up_again(tmp_path: Path) -> None:
    first = train(NormalMeans(), checkpoint=tmp_path / "run", max_seconds=0.0)
    assert (first.card["steps"], first.card["finished"]) == (1, False)
    rest = train(NormalMeans(), checkpoint=tmp_path / "run")
    assert (rest.card["steps"], rest.card["finished"]) == (12, True)
    assert same_weights(rest, train(NormalMeans()))
    assert same_weights(rest, train(NormalMeans(), checkpoint=tmp_path / "run"))  # over: nothing is left to do


def test_a_linear_decay_can_be_taken_back_for_a_longer_run(tmp_path: Path) -> None:
    """Finished at 12 steps, made 24 long: as though it had been 24 from the start. And cut short before the fall."""

    def schedule(num_steps: int) -> Schedule:
        return Schedule(num_steps=num_steps, batch=3, n_max=6, num_queries=4, decay="linear", warmup_share=0)

    train(NormalMeans(), schedule(12), checkpoint=tmp_path / "run")
    longer = train(NormalMeans(), schedule(24), checkpoint=tmp_path / "run")
    assert same_weights(longer, train(NormalMeans(), schedule(24)))
    with pytest.raises(SettingError, match="cannot change its length"):
        train(NormalMeans(), schedule(16), checkpoint=tmp_path / "run")
    train(NormalMeans(), schedule(1000), checkpoint=tmp_path / "long", max_seconds=0.0)
    shorter = train(NormalMeans(), schedule(8), checkpoint=tmp_path / "long")
    assert same_weights(shorter, train(NormalMeans(), schedule(8)))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(NormalMeans(), checkpoint=folder)
    for settings in ({"seed": 1}, {"schedule": Schedule(num_steps=12, batch=4)}):
        with pytest.raises(SettingError, match="the run in"):
            train(NormalMeans(), **{"checkpoint": folder, **settings})
    with pytest.raises(SettingError, match="NormalMeans"):
        train(NormalMeans(noise=0.6), checkpoint=folder)
    longer = replace(BRIEF, num_steps=20)
    with pytest.raises(SettingError, match="cannot change its length"):
        train(NormalMeans(), longer, checkpoint=folder)
    state = folder / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="must be whole"):
        train(NormalMeans(), checkpoint=folder)
    train(NormalMeans(), out=tmp_path / "a.pfn")
    state.write_bytes((tmp_path / "a.pfn").read_bytes())
    with pytest.raises(StorageError, match="of a training run"):
        train(NormalMeans(), checkpoint=folder)
    with pytest.raises(StorageError, match="must name a folder"):
        train(NormalMeans(), checkpoint=tmp_path / "a.pfn")


def test_a_run_can_begin_with_the_weights_of_another(tmp_path: Path) -> None:
    """After one step at a learning rate of next to nothing they are still there; the card says whose they are."""
    first = train(NormalMeans(), BRIEF, card={"name": "first"})
    still = replace(BRIEF, num_steps=1, learning_rate=1e-12)
    second = train(NormalMeans(noise=0.9), still, start=first, checkpoint=tmp_path)
    theirs = second.network.state_dict()
    for name, weight in first.network.state_dict().items():
        torch.testing.assert_close(theirs[name], weight, rtol=0.0, atol=1e-9)
    assert second.card["started_from"] == {
        "name": "first", "prior": first.card["prior"], "steps": BRIEF.num_steps
    }  # fmt: skip
    with pytest.raises(SettingError, match="started_from"):
        train(NormalMeans(noise=0.9), still, checkpoint=tmp_path)
    with pytest.raises(SettingError, match="start must have the architecture"):
        train(NormalMeans(), still, replace(TINY, width=2 * TINY.width), start=first)


@pytest.mark.parametrize("head", ["bars", "classes"])
def test_other_heads_train_too(head: str) -> None:
    """The loss of the last steps is below that of the first, which is ln 3 for classes."""
    shape = Architecture(2, head, 3 if head == "classes" else 50, width=16, num_layers=2, num_heads=2, hidden=16)
    prior = Blobs() if head == "classes" else NormalMeans()
    schedule = Schedule(num_steps=150, batch=16, n_max=20, num_queries=10, learning_rate=5e-3, num_evaluations=5)
    trained = train(prior, schedule, shape)
    losses = [line["loss"] for line in trained.card["log"]]
    assert losses[-1] < losses[0] - 0.05
    assert trained.card["task"] == ("classification" if head == "classes" else "regression")
    assert trained.card["noise_token"] is False
    if head == "bars":
        assert trained.borders.shape == (51,)


def test_the_average_of_the_weights_is_that_of_the_rule() -> None:
    """After k steps the kept share is the smaller of the decay and k / (k + 9); one step of nearly no length."""
    slow = Schedule(num_steps=1, batch=2, n_max=3, num_queries=2, average=0.5, learning_rate=0.1, warmup_share=0)
    averaged = train(NormalMeans(), slow).network.state_dict()
    moved = train(NormalMeans(), replace(slow, average=None)).network.state_dict()
    still = train(NormalMeans(), replace(slow, average=None, learning_rate=1e-30)).network.state_dict()
    for name in averaged:
        torch.testing.assert_close(averaged[name], 0.1 * still[name] + 0.9 * moved[name])


def test_gradients_that_are_not_finite_do_not_reach_the_weights() -> None:
    @dataclass
    class Bad:
        every: int
        calls: int = 0

        def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> ToyTasks:
            self.calls += 1
            tasks = NormalMeans().sample(batch, n, d, generator)
            bad = self.calls > 2 and self.calls % self.every == 0
            return tasks._replace(y=tasks.y / 0, noiseless=tasks.y / 0) if bad else tasks

        def __repr__(self) -> str:
            return "Bad()"

    schedule = Schedule(num_steps=60, batch=2, n_max=3, num_queries=2)
    trained = train(Bad(4), schedule)
    assert all(bool(weight.isfinite().all()) for weight in trained.network.state_dict().values())
    assert trained.card["steps"] == 60
    with pytest.raises(NumericalError, match="gradients must be finite"):
        train(Bad(1), schedule)


def test_sizes_follow_their_law() -> None:
    """Chi-squared at 6 000 draws: a false alarm once in 10 000 times, but the seed is fixed."""
    rng = np.random.default_rng(0)
    schedule = Schedule(n_min=1, n_max=9)
    counts = np.bincount([_batches._context_size(schedule, rng) for _ in range(6000)], minlength=10)
    n = np.arange(1, 10)
    shares = np.log((n + 2) / (n + 1))
    assert counts[0] == 0
    assert stats.chisquare(counts[1:], 6000 * shares / shares.sum()).pvalue > 1e-4


def draws(schedule: Schedule, num: int, prior: Any = None, rank: int = 0) -> list[_batches.Batch]:
    where = torch.device("cpu")
    prior = prior or NormalMeans()
    return [_batches.draw(prior, TINY, schedule, 5, step, 0, rank, where) for step in range(num)]


def test_processes_share_the_sizes_and_not_the_tasks() -> None:
    ours, theirs = draws(Schedule(n_max=8), 20), draws(Schedule(n_max=8), 20, rank=1)
    assert [b.x.shape for b in ours] == [b.x.shape for b in theirs]
    assert not any(torch.equal(a.xs, b.xs) for a, b in zip(ours, theirs, strict=True))
    assert {b.x.shape[-1] for b in ours} == {1, 2}
    assert {b.num_appended > 0 for b in ours} == {True, False}


def test_curves_keep_their_order() -> None:
    """With fixed rows the first n are the context, appended points are the last of these, queries come later."""
    schedule = Schedule(rows=12, n_max=9, num_queries=2, batch=3, d=(1, 1))
    for batch in draws(schedule, 40, Steps()):
        n = batch.x.shape[1]
        assert torch.equal(batch.x[0, :, 0], torch.arange(n, dtype=torch.float32))
        assert batch.xs.shape[1] == 2
        assert int(batch.xs.min()) >= n
        pure = batch.conditions[:, 0] == 1
        assert torch.equal(batch.targets - batch.xs[..., 0], 1000.0 * pure[:, None].expand(3, 2))
        known = torch.zeros(n)
        known[n - batch.num_appended :] = 1000.0 * batch.noiseless
        assert torch.equal(batch.y[0] - batch.x[0, :, 0], known)


def test_small_contexts_may_bring_more_tasks() -> None:
    schedule = Schedule(n_max=40, num_queries=10, batch=4, even_work=True)
    for batch in draws(schedule, 20):
        rows = batch.x.shape[1] + 10
        assert len(batch.x) == min(32, 4 * 50 // rows)


def test_a_prior_of_wrong_shapes_is_refused() -> None:
    class Wrong:
        def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> ToyTasks:
            tasks = NormalMeans().sample(batch, n, d, generator)
            return tasks._replace(noiseless=tasks.noiseless[..., None])

    with pytest.raises(ShapeError, match="x, y and noiseless must have shapes"):
        train(Wrong())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be"),
        ({"n_min": 5, "n_max": 4}, "n_min <= n_max"),
        ({"rows": 50, "n_max": 50}, "n_min <= n_max < rows"),
        ({"decay": "step"}, "decay must be one of"),
        ({"decay": "linear", "warmup_share": 0.8}, "add up to at most 1"),
        ({"average": 1.0}, "average must lie in"),
        ({"noiseless_share": 1.5}, "noiseless_share is a share"),
        ({"learning_rate": 0.0}, "learning_rate must"),
        ({"d": (3, 2)}, "d must be"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Schedule(**settings)


def test_more_columns_than_the_network_reads_are_refused() -> None:
    with pytest.raises(SettingError, match="d must not exceed max_inputs"):
        train(NormalMeans(), Schedule(d=(1, 3)))


def test_learning_rates_are_those_of_the_formulas() -> None:
    cosine = Schedule(num_steps=100, learning_rate=0.2, warmup_share=0.1)
    assert [cosine.rate(0), cosine.rate(9), cosine.rate(10)] == pytest.approx([0.02, 0.2, 0.2])
    assert cosine.rate(55) == pytest.approx(0.1)
    assert cosine.rate(99) == pytest.approx(0.1 * (1 - math.cos(math.pi / 90)))
    linear = Schedule(num_steps=100, learning_rate=0.2, warmup_share=0.1, decay="linear", decay_share=0.4)
    assert linear.stable_until == 60
    assert [linear.rate(s) for s in (59, 60, 80, 99)] == pytest.approx([0.2, 0.2, 0.1, 0.005])


@pytest.mark.slow
@pytest.mark.parametrize("appended_share", [0.0, 0.5])
def test_a_compiled_run_learns_the_same(appended_share: float) -> None:
    """Weights after twelve steps, of contexts of many sizes, within rounding of those of a run that is not compiled."""
    schedule = replace(BRIEF, appended_share=appended_share)
    plain, compiled = (train(NormalMeans(), schedule, compile=on).network.state_dict() for on in (False, True))
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)
