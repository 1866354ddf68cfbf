"""The draws of a run and their statistics, gathered one by one and written many at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ROWS = 64  # draws gathered before they are written to their place
_NUMBERS = 2**24  # and no more positions than hold this many numbers


class Record:
    """Up to `num_draws` draws of chains at q (*g, C, D).

    A row is a value (*g, C) by name, or what broadcasts to it, or a number; "draws" is (*g, C, D). Memory for all draws
    is taken at once unless their number is not `certain`: then for twice as many as there are, at most.
    """

    def __init__(self, q: Tensor, num_draws: int, *, certain: bool = True) -> None:
        self._shape, self._device = tuple(q.shape[:-1]), q.device
        self._num_draws, self._certain = num_draws, certain
        self._rows: list[Mapping[str, Any]] = []
        self._patience = max(1, min(_ROWS, _NUMBERS // max(1, q.numel())))
        self._columns: dict[str, Tensor] = {}
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep one more draw. Its tensors are not copied at once and must not be changed afterwards."""
        self._rows.append(row)
        if len(self._rows) >= self._patience:
            self._flush()

    def columns(self) -> dict[str, Tensor]:
        """All that was kept: "draws" (*g, C, num, D) and the statistics (*g, C, num)."""
        return self.part(0, len(self))

    def part(self, first: int, end: int) -> dict[str, Tensor]:
        """The same from draw `first` to before draw `end`."""
        self._flush()
        return {name: column.narrow(_axis(name), first, end - first) for name, column in self._columns.items()}

    def extend(self, part: Mapping[str, Tensor]) -> None:
        """Keep the draws of a `part` after those that are there."""
        self._flush()
        num = part["draws"].shape[-2]
        for name, values in part.items():
            self._column(name, values, num).copy_(values)
        self._written += num

    def _flush(self) -> None:
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], Tensor):
                stacked = torch.stack(values, _axis(name))
            else:
                stacked = torch.tensor(values, device=self._device)
            self._column(name, stacked, len(rows)).copy_(stacked)
        self._written += len(rows)

    def _column(self, name: str, like: Tensor, num: int) -> Tensor:
        """Where the next `num` values of that name go."""
        end, axis = self._written + num, _axis(name)
        column = self._columns.get(name)
        if column is None or column.shape[axis] < end:
            room = self._num_draws if self._certain else min(max(2 * self._written, 1024), self._num_draws)
            room = max(room, end)
            tail = (room, like.shape[-1]) if name == "draws" else (room,)
            wider = torch.empty(*self._shape, *tail, dtype=like.dtype, device=self._device)
            if column is not None:
                wider.narrow(axis, 0, self._written).copy_(column.narrow(axis, 0, self._written))
            self._columns[name] = column = wider
        return column.narrow(axis, self._written, num)


def _axis(name: str) -> int:
    return -2 if name == "draws" else -1
