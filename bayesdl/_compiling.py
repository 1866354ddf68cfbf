"""What torch.compile does to everybody else in the process, undone.

Its first use switches the argument checks of torch.distributions off for good, since a graph cannot branch on values.
Only what it compiles needs that. And it keeps graphs with the code of a function, at most eight, so that functions made
by the same line share them: every call tries the graphs of all of them first, and the ninth is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any

import torch
from torch.distributions import Distribution


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a whole Python function into graphs of its own; it raises where there is no single graph."""
    code = function.__code__.replace()
    parts = (function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(FunctionType(code, *parts), fullgraph=True)


class ArgumentChecksOff:
    """Within it torch.distributions checks no arguments by default; afterwards it does what it did before.

    To be entered where torch.compile is called and where what it made is called, which may trace again.
    """

    def __enter__(self) -> None:
        self._before = Distribution._validate_args
        Distribution.set_default_validate_args(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Distribution.set_default_validate_args(self._before)
