"""The optimisers of a training run, each one `torch.optim.Optimizer` whose state lies by parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

from bayesdl.amortized.schedule import Schedule


def optimizer_of(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """The optimiser that `schedule` names, for all weights of `network`."""
    parameters = dict(network.named_parameters())
    if schedule.optimizer == "adamw":
        return _adamw(list(parameters.values()), schedule)
    inside = {name for name, p in parameters.items() if name.startswith("blocks.") and p.ndim == 2}
    matrices = [p for name, p in parameters.items() if name in inside]
    others = [p for name, p in parameters.items() if name not in inside]
    return MuonAndAdamW(matrices, others, schedule)


def _adamw(parameters: list[nn.Parameter], schedule: Schedule) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, betas=schedule.betas, weight_decay=schedule.weight_decay,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )  # fmt: skip


class MuonAndAdamW(torch.optim.Optimizer):
    r"""Muon for the matrices inside a network, AdamW for its embeddings, head, norms and biases.

    Muon replaces the averaged gradient of a matrix by a nearly orthogonal one, U V^T of its singular value
    decomposition, by five Newton-Schulz steps, so that all directions of it learn at the same speed; scaled to the size
    of a step of AdamW, with whose learning rate it then shares an order of magnitude.

    Cost: about 30 products of a matrix with itself a step, about a fifth of a step of a small network, and one
    moment in place of AdamW's two.

    Reference: Jordan and others (2024), "Muon: an optimizer for hidden layers in neural networks"; the scale is that of
    Liu and others (2025), "Muon is scalable for LLM training", arXiv 2502.16982, section 2.2.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], schedule: Schedule) -> None:
        muon = torch.optim.Muon(
            matrices, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._parts = (muon, _adamw(others, schedule))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        # the same groups and the same state, so that a new learning rate and a checkpoint reach both
        at = 0
        for part in self._parts:
            part.param_groups = self.param_groups[at : at + len(part.param_groups)]
            part.state = self.state
            at += len(part.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each; `closure` is evaluated once, before both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
