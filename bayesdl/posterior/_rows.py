"""Test inputs as rows of a batch of data sets, and answers back: for posteriors whose data sets are independent rows.

Data sets have batch axes *b, of B elements in all, and test inputs (..., s, d) axes that broadcast with them, to *L.
Axes of *L that *b lacks, E elements in all, are further questions to the same data set.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """How *L falls into B data sets of E questions each, and k outputs beside them.

    Attributes:
        lead: *L.
        order: Axes of *L, those of the data sets first.
        num_sets: B.
        num_outputs: k.
    """

    lead: torch.Size
    order: tuple[int, ...]
    num_sets: int
    num_outputs: int

    @classmethod
    def of(cls, x: Tensor, batch: torch.Size, num_outputs: int) -> Rows:
        """For inputs x (..., s, d) and data sets *b."""
        if x.ndim == 2 and not batch:
            return cls(torch.Size(), (), 1, num_outputs)
        lead = torch.broadcast_shapes(x.shape[:-2], batch)
        padded = (1,) * (len(lead) - len(batch)) + tuple(batch)
        kept = [i for i, size in enumerate(padded) if size > 1]
        order = (*kept, *(i for i in range(len(lead)) if i not in kept))
        return cls(lead, order, math.prod(batch), num_outputs)

    def apart(self, x: Tensor) -> Tensor:
        """x (..., s, d) as (B k, E s, d): every point by itself."""
        if self._plain:
            return x.unsqueeze(0)
        x = self._sets(x)
        return x.reshape(x.shape[0], -1, x.shape[-1]).repeat_interleave(self.num_outputs, 0)

    def together(self, x: Tensor) -> Tensor:
        """x (..., s, d) as (B k E, s, d): the s points of a question in one row."""
        x = self._sets(x)
        return x.repeat_interleave(self.num_outputs, 0).reshape(-1, *x.shape[-2:])

    def spread(self, context: Any) -> Any:
        """Contexts of B k rows for the B k E rows of `together`."""
        questions = math.prod(self.lead) // max(1, self.num_sets)
        return context if questions == 1 else context.each(questions)

    def marginal(self, value: Tensor) -> Tensor:
        """(B k, E s, ...) as (*L, s, k, ...)."""
        if self._plain:
            return value.transpose(0, 1)
        questions = math.prod(self.lead) // max(1, self.num_sets)
        value = value.unflatten(1, (questions, -1)).unflatten(0, (-1, self.num_outputs))  # (B, k, E, s, ...)
        return self._back(value.movedim(1, 3))

    def joint(self, value: Tensor) -> Tensor:
        """(B k E, s, ...) as (*L, s, k, ...)."""
        questions = math.prod(self.lead) // max(1, self.num_sets)
        value = value.unflatten(0, (-1, self.num_outputs, questions))
        return self._back(value.movedim(1, 3))

    @property
    def _plain(self) -> bool:
        """One data set, one question, one output: single queries are asked often, and the general way is dear."""
        return not self.lead and self.num_sets == 1 and self.num_outputs == 1

    def _sets(self, x: Tensor) -> Tensor:
        """(..., s, d) as (B, E, s, d)."""
        x = x.expand(*self.lead, *x.shape[-2:]).permute(*self.order, -2, -1)
        questions = math.prod(self.lead) // max(1, self.num_sets)
        return x.reshape(self.num_sets, questions, *x.shape[-2:])

    def _back(self, value: Tensor) -> Tensor:
        """(B, E, ...) as (*L, ...)."""
        value = value.reshape(*(self.lead[i] for i in self.order), *value.shape[2:])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return value.permute(*back, *range(len(back), value.ndim))
