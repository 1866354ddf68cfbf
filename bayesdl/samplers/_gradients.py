"""Value and gradient of a batched log density: eager or compiled, all chains at once or in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bayesdl import _checks


class ValueAndGradient:
    """Gives the log density (*g, C) and its gradient (*g, C, D) at q (*g, C, D); see `samplers.base.value_and_grad`.

    Attributes:
        log_density: The value alone, in the same blocks of chains.
    """

    def __init__(
        self, log_density: Callable[..., Tensor], chain_batch: int | None = None, compile: bool = False
    ) -> None:
        if chain_batch is not None:
            _checks.at_least("value_and_grad", "chain_batch", chain_batch, 1, integer=True)
        self._block = chain_batch
        self._value = log_density
        self._whole = _compiled(log_density) if compile else _eager(log_density)

    def __call__(self, q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """`rest` goes to the log density after q; tensors in it have the chains on their first axis."""
        if self._block is None or q.shape[-2] <= self._block:
            return self._whole(q, *rest)
        parts = [self._whole(*part) for part in self._blocks(q, rest)]
        values, grads = zip(*parts, strict=True)
        return torch.cat(values, -1), torch.cat(grads, -2)

    def log_density(self, q: Tensor, *rest: Tensor | None) -> Any:
        """The log density at q, (*g, C)."""
        if self._block is None or q.ndim < 2 or q.shape[-2] <= self._block:
            return self._value(q, *rest)
        return torch.cat([self._value(*part) for part in self._blocks(q, rest)], -1)

    def _blocks(self, q: Tensor, rest: tuple[Tensor | None, ...]) -> Iterator[tuple[Tensor | None, ...]]:
        qs = q.split(self._block or q.shape[-2], -2)
        rests = [[None] * len(qs) if x is None else x.split(self._block or len(x)) for x in rest]
        return zip(qs, *rests, strict=True)


def _eager(log_density: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def evaluate(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        q = q.detach().requires_grad_(True)
        with torch.enable_grad():
            value = log_density(q, *rest)
        (grad,) = torch.autograd.grad(value.sum(), q)
        return value.detach(), grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    return evaluate


def _compiled(log_density: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same through torch.compile, as one graph for any number of chains."""

    def total(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        value = log_density(q, *rest)
        return value.sum(), value

    def both(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        grad, value = torch.func.grad(total, has_aux=True)(q, *rest)
        return value, grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    run = torch.compile(both, dynamic=None)

    def evaluate(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        q = q.detach().contiguous()
        if q.shape[-2] > 1:
            torch._dynamo.mark_dynamic(q, q.ndim - 2)
        with torch.no_grad():
            return run(q, *rest)

    return evaluate
