"""One step of an integrator many times over: a loop in Python, or one graph of torch.compile for any number of steps.

A compiled gradient costs some hundred microseconds for being called, which is more than the arithmetic of a small
density. With the loop inside the graph that is paid once for a trajectory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bayesdl._compiling import ArgumentChecksOff, compiled

Evaluate: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
Carry: TypeAlias = tuple[Tensor, ...]
# (evaluate, carry, constants, last) -> carry: a function of a module, in whose carry no shape and no dtype changes.
Step: TypeAlias = Callable[[Evaluate, Carry, Any, "bool | Tensor"], Carry]


def pick(last: bool | Tensor, then: Tensor, otherwise: Tensor) -> Tensor:
    """`then` in the last step and `otherwise` in those before."""
    return torch.where(last, then, otherwise) if isinstance(last, Tensor) else (then if last else otherwise)


def in_python(evaluate: Evaluate, step: Step, carry: Carry, constants: Any, num_steps: int) -> Carry:
    """`num_steps` steps."""
    for i in range(num_steps):
        carry = step(evaluate, carry, constants, i == num_steps - 1)
    return carry


class Loops:
    """The same as `in_python` by graphs, one for each kind of step and of constants, each compiled when first used.

    Where torch cannot put a loop into a graph it says so once in a warning, and `run` gives None from then on.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        """`evaluate` gives value and gradient and can be traced."""
        self._evaluate = evaluate
        self._graphs: dict[tuple[Any, ...], Callable[..., Carry]] = {}
        self._failed = False

    def run(self, step: Step, carry: Carry, constants: Any, num_steps: int) -> Carry | None:
        """`num_steps` steps, or None where they must be made one by one.

        A graph for a single step does not pay for its compilation, and off the CPU nothing of this has been tried.
        """
        if self._failed or carry[0].device.type != "cpu":
            return None
        # An expanded tensor would be another graph than a full one.
        carry, constants = _contiguous(tuple(part.detach() for part in carry)), _contiguous(constants)
        key = step, _kind(carry), _kind(constants)
        if num_steps < 2 and key not in self._graphs:
            return None
        try:
            if key not in self._graphs:
                self._graphs[key] = _graph(self._evaluate, step)
            with ArgumentChecksOff(), torch.no_grad():
                return self._graphs[key](carry, constants, torch.tensor(num_steps))
        except Exception as error:
            self._failed = True
            kind = type(error).__name__
            warnings.warn(f"torch.compile cannot loop over this log density ({kind}): step by step", stacklevel=2)
            return None


def _contiguous(parts: Any) -> Any:
    if isinstance(parts, tuple):
        each = [_contiguous(part) for part in parts]
        return type(parts)(*each) if hasattr(parts, "_fields") else tuple(each)
    return parts.contiguous() if isinstance(parts, Tensor) else parts


def _kind(parts: Any) -> Any:
    """What a graph is made for: the shapes of tensors, and whatever else there is among them."""
    if isinstance(parts, tuple):
        return tuple(_kind(part) for part in parts)
    return tuple(parts.shape) if isinstance(parts, Tensor) else parts


def _graph(evaluate: Evaluate, step: Step) -> Callable[..., Carry]:
    # Without it a compiled loop can still be had step by step, so older and newer torch may lack it.
    from torch._higher_order_ops.while_loop import while_loop

    def run(carry: Carry, constants: Any, num_steps: Tensor) -> Carry:
        def more(i: Tensor, *carry: Tensor) -> Tensor:
            return i < num_steps

        def body(i: Tensor, *carry: Tensor) -> tuple[Tensor, ...]:
            return i + 1, *step(evaluate, carry, constants, i == num_steps - 1)

        return while_loop(more, body, (torch.zeros((), dtype=torch.int64), *carry))[1:]

    return compiled(run)
