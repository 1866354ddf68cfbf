"""Value and gradient of a batched log density: eager or compiled, all chains at once or in blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._compiling import ArgumentChecksOff, compiled
from bayesdl.samplers._repeated import Carry, Loops, Step, in_python

Evaluate: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


class ValueAndGradient:
    """Gives the log density (*g, C) and its gradient (*g, C, D) at q (*g, C, D); see `samplers.base.value_and_grad`.

    A log density that has one of these as its attribute `value_and_grad` keeps what was compiled from run to run.

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
        known = getattr(log_density, "value_and_grad", None)
        self._loops: Loops | None
        if isinstance(known, ValueAndGradient):
            self._whole, self._loops = known._whole, known._loops
        else:
            self._whole = _Compiled(log_density) if compile else _eager(log_density)
            self._loops = Loops(_traceable(log_density)) if compile else None

    def __call__(self, q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """`rest` goes to the log density after q; tensors in it have the chains on their first axis."""
        if self._block is None or q.shape[-2] <= self._block:
            return self._whole(q, *rest)
        parts = [self._whole(*part) for part in self._blocks(q, rest)]
        values, grads = zip(*parts, strict=True)
        return torch.cat(values, -1), torch.cat(grads, -2)

    def repeat(self, step: Step, carry: Carry, constants: Any, num_steps: int) -> Carry:
        """`num_steps` times carry <- step(self, carry, constants, last), where compiled as one graph.

        Args:
            step: A function of a module; it gets this, a tuple of tensors whose first is positions (*g, C, D), the
                constants and whether this step is the last, and returns a tuple of the same shapes and dtypes.
            carry: What goes from step to step.
            constants: Tensors, alone or in tuples.
            num_steps: At least 1.
        """
        if self._loops is not None and (self._block is None or carry[0].shape[-2] <= self._block):
            found = self._loops.run(step, carry, constants, num_steps)
            if found is not None:
                return found
        return in_python(self, step, carry, constants, num_steps)

    def log_density(self, q: Tensor, *rest: Tensor | None) -> Any:
        """The log density at q, (*g, C)."""
        if self._block is None or q.ndim < 2 or q.shape[-2] <= self._block:
            return self._value(q, *rest)
        return torch.cat([self._value(*part) for part in self._blocks(q, rest)], -1)

    def _blocks(self, q: Tensor, rest: tuple[Tensor | None, ...]) -> Iterator[tuple[Tensor | None, ...]]:
        qs = q.split(self._block or q.shape[-2], -2)
        rests = [[None] * len(qs) if x is None else x.split(self._block or len(x)) for x in rest]
        return zip(qs, *rests, strict=True)


def repeated(evaluate: Evaluate, step: Step, carry: Carry, constants: Any, num_steps: int) -> Carry:
    """`evaluate.repeat`, and for any other function that gives value and gradient the loop in Python."""
    if isinstance(evaluate, ValueAndGradient):
        return evaluate.repeat(step, carry, constants, num_steps)
    return in_python(evaluate, step, carry, constants, num_steps)


def _eager(log_density: Callable[..., Tensor]) -> Evaluate:
    known = getattr(log_density, "value_and_grad", None)
    if known is not None:
        return _given(known)

    def evaluate(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        q = q.detach().requires_grad_(True)
        with torch.enable_grad():
            value = log_density(q, *rest)
            total = value.sum()
        (grad,) = torch.autograd.grad(total, q)
        return value.detach(), _finite(grad)

    return evaluate


def _given(value_and_grad: Evaluate) -> Evaluate:
    """For a log density that brings its own gradient."""

    def evaluate(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        value, grad = value_and_grad(q.detach(), *rest)
        return value.detach(), _finite(grad.detach())

    return evaluate


class _Compiled:
    """Value and gradient through torch.compile, as one graph for any number of chains.

    Where a log density cannot be differentiated within a graph, its value alone is compiled, which gains less; where
    that fails too it is evaluated as it is, with a warning. Inside a graph torch.distributions checks no arguments, and
    outside it goes on as before.
    """

    def __init__(self, log_density: Callable[..., Tensor]) -> None:
        self._log_density = log_density
        self._run: Evaluate | None = None
        self._single = False

    def __call__(self, q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        q = q.detach().contiguous()
        if self._run is None:
            return self._first(q, rest)
        if q.shape[-2] == 1 and not self._single:
            # one chain would be a graph of its own, for sizes of one are not variable
            value, grad = self._run(_twice(q, -2), *(None if x is None else _twice(x, 0) for x in rest))
            return value[..., :1], grad[..., :1, :]
        return self._run(q, *rest)

    def _first(self, q: Tensor, rest: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        self._single = q.shape[-2] == 1
        for x, axis in ((q, q.ndim - 2), *((x, 0) for x in rest if x is not None)):
            if not self._single:
                torch._dynamo.maybe_mark_dynamic(x, axis)
        eager = _eager(self._log_density)
        for make in (_one_graph, lambda fn: _eager(torch.compile(fn))):
            try:
                self._run = _traced(make, self._log_density)
                return self._run(q, *rest)
            except Exception:
                eager(q, *rest)  # an error of the log density itself comes out here
        warnings.warn("torch.compile cannot trace this log density: it is evaluated as it is", stacklevel=2)
        self._run = eager
        return eager(q, *rest)


def _traced(make: Callable[..., Evaluate], log_density: Callable[..., Tensor]) -> Evaluate:
    """What `make` compiles, with the argument checks of torch.distributions off in its graphs and nowhere else."""
    with ArgumentChecksOff():
        run = make(log_density)

    def evaluate(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        with ArgumentChecksOff():
            return run(q, *rest)

    return evaluate


def _traceable(log_density: Callable[..., Tensor]) -> Evaluate:
    """Value and gradient by functional transformations alone, as a graph wants them.

    A log density whose own gradient writes in place, which no graph can hold, has another form of itself, `traceable`.
    """
    log_density = getattr(log_density, "traceable", log_density)
    known = getattr(log_density, "value_and_grad", None)

    def total(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        value = log_density(q, *rest)
        return value.sum(), value

    def both(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        if known is not None:
            value, grad = known(q, *rest)
        else:
            grad, value = torch.func.grad(total, has_aux=True)(q, *rest)
        return value, _finite(grad)

    return both


def _one_graph(log_density: Callable[..., Tensor]) -> Evaluate:
    graph = compiled(_traceable(log_density))

    def evaluate(q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return graph(q, *rest)

    return evaluate


def _twice(x: Tensor, axis: int) -> Tensor:
    return torch.cat([x, x], axis)


def _finite(grad: Tensor) -> Tensor:
    return grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
