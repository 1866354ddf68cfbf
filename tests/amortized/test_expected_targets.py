"""Training on the law of a target in place of one draw: the same objective, less noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bayesdl.amortized import Architecture, Network, Schedule, _batches, pretrain
from bayesdl.amortized.heads import log_score, loss
from bayesdl.errors import SettingError
from bayesdl.hyper import LogNormal
from bayesdl.priors.tasks import HyperGP
from tests.toy_tasks import Blobs, NormalMeans

PRIOR = HyperGP("rbf", noise_variance=LogNormal(-2.0, 0.5))
SHAPE = Architecture(2, "mixture", 3, width=16, num_layers=2, num_heads=2, hidden=16, num_conditions=1)
SCHEDULE = Schedule(num_steps=9, batch=8, n_max=12, num_queries=6, num_evaluations=1)
EXPECTED = replace(SCHEDULE, targets="expected")


def loss_and_gradient(network: Network, schedule: Schedule, step: int) -> tuple[float, torch.Tensor]:
    """Of one batch."""
    batch = _batches.draw(PRIOR, SHAPE, schedule, 3, step, 0, 0, torch.device("cpu"))
    raw = network(
        batch.x, batch.y, batch.xs, batch.conditions, num_appended=batch.num_appended, noiseless=batch.noiseless
    )
    lost = loss(SHAPE, raw, None, batch.targets)
    parts = torch.autograd.grad(lost, list(network.parameters()), allow_unused=True)
    return float(lost.detach()), torch.cat([part.flatten() for part in parts if part is not None and part.numel()])


def test_it_is_the_same_objective_with_less_noise() -> None:
    """The losses of 150 batches differ by no more than 4.5 standard errors of their mean difference (false alarms
    below 1e-5), appended and noiseless points among them; about one and the same gradient, the last layer's vary less.

    Batches of one step hold the same tasks under both, so the difference is the noise of the targets alone.
    """
    network = pretrain(PRIOR, SHAPE, replace(EXPECTED, num_steps=60, learning_rate=3e-3), progress=False).network
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    differences, drawn, expected = [], [], []
    for step in range(150):
        one, gradient = loss_and_gradient(network, SCHEDULE, step)
        other, smoother = loss_and_gradient(network, EXPECTED, step)
        differences.append(one - other)
        drawn.append(gradient[-SHAPE.num_raw :])  # of the last bias, which every batch has
        expected.append(smoother[-SHAPE.num_raw :])
    mean = torch.tensor(differences).double()
    assert abs(float(mean.mean())) < 4.5 * float(mean.std()) / len(mean) ** 0.5
    noisy, smooth = torch.stack(drawn), torch.stack(expected)
    assert float(smooth.var(0).sum()) < 0.6 * float(noisy.var(0).sum())
    error = (noisy - smooth).mean(0) / ((noisy - smooth).std(0) / 150**0.5)
    assert float(error.abs().max()) < 5


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The streams of a step do not depend on what came before it."""
    pretrain(PRIOR, SHAPE, EXPECTED, checkpoint=tmp_path / "run", max_seconds=0.0, progress=False)
    resumed = pretrain(PRIOR, SHAPE, EXPECTED, checkpoint=tmp_path / "run", progress=False)
    unbroken = pretrain(PRIOR, SHAPE, EXPECTED, progress=False)
    ours, theirs = resumed.network.state_dict(), unbroken.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(SettingError, match="targets='expected'"):
        pretrain(PRIOR, SHAPE, SCHEDULE, checkpoint=tmp_path / "run", progress=False)


def test_the_rest_of_a_batch_stays_as_it_is() -> None:
    """Context, queries and sizes do not depend on what the targets are."""
    for step in range(20):
        one, other = (
            _batches.draw(PRIOR, SHAPE, schedule, 0, step, 0, 0, torch.device("cpu"))
            for schedule in (SCHEDULE, EXPECTED)
        )
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)
        assert torch.equal(one.xs, other.xs)
        assert other.targets.shape == (*one.targets.shape, 8)
        assert other.targets.dtype == torch.float32


@pytest.mark.parametrize("head", ["mixture", "bars"])
def test_several_targets_of_a_query_count_alike(head: str) -> None:
    """Their log scores are those of each alone."""
    architecture = Architecture(1, head, 5)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(4, 3, architecture.num_raw, generator=generator)
    y = 2 * torch.randn(4, 3, 6, generator=generator)
    borders = torch.linspace(-2, 2, 6) if head == "bars" else None
    together = log_score(architecture, raw.unsqueeze(-2), borders, y)
    each = torch.stack([log_score(architecture, raw, borders, y[..., i]) for i in range(6)], -1)
    torch.testing.assert_close(together, each)
    torch.testing.assert_close(loss(architecture, raw, borders, y), -each.mean())
    torch.testing.assert_close(loss(architecture, raw, borders, y[..., 0]), -each[..., 0].mean())


def test_priors_that_do_not_know_the_law_are_refused() -> None:
    """At the door, with what to do."""
    with pytest.raises(SettingError, match=r"conditional(.|\n)*NormalMeans(.|\n)*drawn"):
        pretrain(NormalMeans(), SHAPE, EXPECTED, progress=False)
    with pytest.raises(SettingError, match="classes"):
        pretrain(Blobs(), Architecture(2, "classes", 3), EXPECTED, progress=False)
    with pytest.raises(SettingError, match="targets"):
        replace(SCHEDULE, targets="mean")
