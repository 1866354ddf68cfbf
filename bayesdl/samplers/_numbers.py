"""The random numbers of a run: a stream for each chain, one that all share, and one per chain for searches.

Chain i sees the same numbers whether it runs alone or among sixty-four. Numbers of a chain are drawn many transitions
at a time, since a call to the generator of each of many chains costs more than the numbers; how many depends on the
number of coordinates alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesdl._random import Seed, Streams, child_seeds, generator

_BLOCK, _WIDEST = 64, 4096  # transitions drawn for at a time, and numbers of a chain drawn at a time, at most


class Numbers:
    """All random numbers of a run on positions q (*g, C, D); groups see the same ones."""

    def __init__(self, seed: Seed, q: Tensor) -> None:
        chain_seed, shared_seed, search_seed = child_seeds(seed, 3)
        num_chains, self._dim = q.shape[-2:]
        self._like = torch.empty(0, dtype=q.dtype, device=q.device)
        self._wide = torch.empty(0, dtype=torch.float64, device=q.device)
        self._chains = Streams(chain_seed, num_chains, q.device)
        self._searches = Streams(search_seed, num_chains, q.device)
        self._shared = generator(shared_seed)
        self._block = max(1, min(_BLOCK, _WIDEST // self._dim))
        self._left: dict[str, list[Tensor]] = {"momentum": [], "uniform": [], "wide_uniform": []}

    @property
    def shared(self) -> torch.Generator:
        """A generator on the CPU for what all chains have in common: lengths, permutations, resampling."""
        return self._shared

    def momentum(self) -> Tensor:
        """Standard normal numbers (C, D), new ones at every call."""
        left = self._left["momentum"]
        if not left:
            left += _rows(self._chains.normal(self._block, self._dim, like=self._like))
        return left.pop()

    def uniform(self) -> Tensor:
        """Numbers on [0, 1) in the dtype of the positions, (C)."""
        left = self._left["uniform"]
        if not left:
            left += _rows(self._chains.uniform(self._block, like=self._like))
        return left.pop()

    def wide_uniform(self) -> Tensor:
        """Numbers on [0, 1) in float64, (C)."""
        left = self._left["wide_uniform"]
        if not left:
            left += _rows(self._chains.uniform(self._block, like=self._wide))
        return left.pop()

    def length(self, longest: int) -> int:
        """A whole number from ceil(longest / 2) to `longest`, for all chains."""
        return int(torch.randint(-(-longest // 2), longest + 1, (), generator=self._shared))

    def search(self) -> Tensor:
        """Standard normal numbers (C, D), from a stream that transitions do not touch."""
        return self._searches.normal(self._dim, like=self._like)

    def state(self) -> dict[str, Any]:
        """Where every stream stands: tensors, to be written to a file."""
        left = {name: torch.stack(rows) if rows else None for name, rows in self._left.items()}
        streams = {"chains": self._chains.state(), "searches": self._searches.state()}
        return {**streams, "shared": self._shared.get_state(), "left": left}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where `state` stood."""
        self._chains.load(state["chains"])
        self._searches.load(state["searches"])
        self._shared.set_state(state["shared"].clone())
        self._left = {name: [] if rows is None else list(rows.unbind(0)) for name, rows in state["left"].items()}


def _rows(block: Tensor) -> list[Tensor]:
    """The numbers (C, K, …) of K transitions, each in its own memory order, the first one last."""
    return list(block.movedim(1, 0).contiguous().unbind(0))[::-1]
