"""How far a network is from the posterior that it imitates: the paired gap of log scores on the same fresh tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _random
from bayesdl.amortized.checkpoint import Pretrained
from bayesdl.amortized.heads import log_score

# Context x (B n d), y (B n), queries xs (B q d) and the tasks' latents -> the reference's predictive of y, (B q).
Reference = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Distribution]


class ReferenceGap:
    r"""Mean of log p(y | x, D) - log q(y | x, D) over tasks of the prior, for each size of the context.

    p is the reference, q the network. In expectation over tasks of the prior, the gap to the exact posterior predictive
    is a Kullback-Leibler divergence: never negative, and 0 only for a perfect network. Both see the same tasks, so the
    gap is known far better than either score. The tasks and the reference's scores are drawn and computed once.

    Args:
        prior: What the network is trained on.
        reference: The exact predictive, or one that knows the latents.
        sizes: Sizes n of the context.
        d: Number of input columns.
        num_tasks: Tasks for each size.
        num_queries: Queries for each task.
        seed: Of the tasks; another one than that of training.
    """

    def __init__(
        self, prior: Any, reference: Reference, sizes: Sequence[int] = (1, 3, 5, 10, 20, 50, 100), *, d: int = 1,
        num_tasks: int = 200, num_queries: int = 5, seed: int = 1_000_003, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.sizes = tuple(sizes)
        self._parts = []
        for n, child in zip(self.sizes, _random.child_seeds(seed, len(self.sizes)), strict=True):
            tasks = prior.sample(num_tasks, n + num_queries, d, _random.generator(child, device))
            xs, ys = tasks.x[:, n:], tasks.y[:, n:]
            exact = reference(tasks.x[:, :n], tasks.y[:, :n], xs, tasks.latents).log_prob(ys).double()
            self._parts.append((tasks.x[:, :n], tasks.y[:, :n], xs, ys, exact))

    def __call__(self, pretrained: Pretrained) -> dict[str, float]:
        """The gaps in nats: `gap`, their mean over sizes, and `gap_1`, `gap_3`, …"""
        gaps = {n: gap for n, (gap, _) in self.table(pretrained).items()}
        return {"gap": sum(gaps.values()) / len(gaps), **{f"gap_{n}": gap for n, gap in gaps.items()}}

    @torch.no_grad()
    def table(self, pretrained: Pretrained) -> dict[int, tuple[float, float]]:
        """For each n the gap and its standard error, over tasks."""
        network, found = pretrained.network, {}
        for n, (x, y, xs, ys, exact) in zip(self.sizes, self._parts, strict=True):
            raw = network(x, y, xs)
            score = log_score(network.architecture, raw, pretrained.borders, ys).double()
            gaps = (exact - score).mean(-1)
            found[n] = (float(gaps.mean()), float(gaps.std()) / math.sqrt(len(gaps)))
        return found
