"""What torch.compile does to everybody else in the process, undone.

Its first use switches the argument checks of torch.distributions off for good, since a graph cannot branch on values.
Only what it compiles needs that.
"""

from __future__ import annotations

from types import TracebackType

from torch.distributions import Distribution


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
