"""The layers of the network: linear maps, embeddings of labels, and blocks of attention and feed-forward layer."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional


@final
class Linear(nn.Linear):
    """A linear layer whose weights the network fills in, from its own generator."""

    def reset_parameters(self) -> None:
        """Nothing: torch would draw from the global random state."""


@final
class Labels(nn.Module):
    """One learned vector for each class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width))

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (B n) -> (B n width)."""
        return functional.embedding(labels.long(), self.weight)


@final
class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm and added to what came in."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_read = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.norm_think = nn.LayerNorm(width)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def project(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens (B n width), each (B heads n width/heads)."""
        rows, num, width = state.shape
        each = self.qkv(self.norm_read(state)).view(rows, num, 3, self.num_heads, width // self.num_heads)
        parts = each.permute(2, 0, 3, 1, 4)
        return parts[0], parts[1], parts[2]

    def project_query(self, state: Tensor) -> Tensor:
        """The first of the three, by the same weights."""
        rows, num, width = state.shape
        parts = functional.linear(self.norm_read(state), self.qkv.weight[:width], self.qkv.bias[:width])
        return parts.view(rows, num, self.num_heads, width // self.num_heads).transpose(1, 2)

    def update(self, state: Tensor, read: Tensor) -> Tensor:
        """The tokens after attention read (B heads n width/heads), and after the feed-forward layer."""
        state = state + self.out(read.transpose(1, 2).flatten(-2))
        return state + self.down(functional.gelu(self.up(self.norm_think(state))))
