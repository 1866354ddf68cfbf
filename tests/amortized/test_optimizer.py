"""Muon beside AdamW: what a step does, and that a run with it stops and goes on like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bayesdl.amortized import Architecture, Pretrained, Schedule, _run, pretrain
from bayesdl.amortized.network import Network
from bayesdl.errors import SettingError
from tests.toy_tasks import NormalMeans

SHAPE = Architecture(2, "mixture", 2, width=16, num_layers=2, num_heads=2, hidden=32, num_conditions=1)
MUON = Schedule(num_steps=12, batch=3, n_max=6, num_queries=4, optimizer="muon", learning_rate=3e-3, num_evaluations=4)


def stepped(schedule: Schedule, steps: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after steps on fixed normal gradients."""
    network, g = Network(SHAPE, seed=0), torch.Generator().manual_seed(3)
    run = _run.new(network, schedule)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(steps):
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=g) * torch.logspace(-1, 0, p.shape[-1])
        run.optimizer.step()
    return before, {name: p.detach() for name, p in network.named_parameters()}


def test_a_step_turns_matrices_evenly_and_leaves_the_rest_to_adamw() -> None:
    """Singular values of a step lie together, though those of its gradient are more than ten times apart; its root mean
    square is a fifth of the learning rate. Everything else goes where AdamW alone takes it."""
    (before, muon), (_, adamw) = stepped(MUON), stepped(replace(MUON, optimizer="adamw"))
    inside = {name for name, p in before.items() if name.startswith("blocks.") and p.ndim == 2}
    assert {name.split(".", 2)[2] for name in inside} == {"qkv.weight", "out.weight", "up.weight", "down.weight"}
    for name in before:
        if name not in inside:
            assert torch.equal(muon[name], adamw[name])
            continue
        change = (muon[name] - before[name]).double()
        values = torch.linalg.svdvals(change)
        assert float(values.max() / values.min()) < 4.0
        assert float(values.mean()) == pytest.approx(0.2 * MUON.learning_rate * max(change.shape) ** 0.5, rel=0.25)
        assert not torch.equal(muon[name], adamw[name])


def test_the_learning_rate_reaches_both_parts() -> None:
    small, large = (stepped(replace(MUON, learning_rate=rate)) for rate in (1e-4, 1e-3))
    for name in small[0]:
        ratio = (large[1][name] - large[0][name]).norm() / (small[1][name] - small[0][name]).norm()
        assert float(ratio) == pytest.approx(10.0, rel=0.02)
    network = Network(SHAPE, seed=0)
    optimizer = _run.new(network, MUON).optimizer
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in network.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """And the folder of a run by another optimiser is refused."""

    def train(schedule: Schedule = MUON, **settings: object) -> Pretrained:
        return pretrain(NormalMeans(), SHAPE, schedule, progress=False, **settings)

    unbroken = train()
    assert train(checkpoint=tmp_path / "run", max_seconds=0.0).card["steps"] == 1
    resumed = train(checkpoint=tmp_path / "run")
    assert resumed.card["schedule"]["optimizer"] == "muon"
    ours, theirs = unbroken.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(SettingError, match="optimizer='muon'"):
        train(replace(MUON, optimizer="adamw"), checkpoint=tmp_path / "run")


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(SettingError, match="optimizer must be one of"):
        Schedule(optimizer="sgd")
