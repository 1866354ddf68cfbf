r"""Deep ensembles: several networks trained from different starts, their disagreement read as uncertainty.

Each member maximises the same log posterior by Adam with minibatches, from its own draw of the prior and in its own
order of the data, and stops where its predictive density on a tenth of the data, its own random tenth, was highest.
That matters for the noise: a network that has fitted its training targets believes in a noise that no new point obeys.
The predictive is the equal mixture of the members' predictives.

Reference: Lakshminarayanan, Pritzel, Blundell (2017), arXiv 1612.01474; here with a weight prior, constant noise and
early stopping.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, Streams, child_seeds
from bayesdl.errors import NumericalError, fail
from bayesdl.inference._fitting import NetworkProblem, network_problem
from bayesdl.models import BNN
from bayesdl.posterior import DrawsPosterior


@dataclass(frozen=True)
class Ensemble:
    """Maximum a posteriori networks from several starts, trained side by side in one batch.

    Attributes:
        model: The network, its prior and its likelihood.
        num_members: Networks. One is a plain MAP fit.
        num_steps: Adam steps, over which the learning rate falls to zero along a cosine.
        learning_rate: Initial learning rate, in the coordinates in which every weight has prior width 1.
        batch_size: Points a step; all of them where there are no more.
        validation_fraction: Share of the data that each member holds out to choose when to stop; 0 trains on everything
            to the last step. Below 20 points nothing is held out.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar.
    """

    model: BNN
    num_members: int = 5
    num_steps: int = 2000
    learning_rate: float = 0.02
    batch_size: int = 128
    validation_fraction: float = 0.1
    standardize: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("num_members", "num_steps", "batch_size"):
            _checks.at_least("Ensemble", name, getattr(self, name), 1, integer=True)
        _checks.inside("Ensemble", "learning_rate", self.learning_rate, 0.0, math.inf)
        if self.validation_fraction != 0:
            _checks.inside("Ensemble", "validation_fraction", self.validation_fraction, 0.0, 0.5)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior:
        """Train the members on x (*b, n, d) and y (*b, n) or (*b, n, k).

        Data sets along *b are independent and trained at the same time. For classification y holds labels 0, 1, ….

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: A member's loss is no longer finite.

        Cost: num_steps gradients a member, each O(min(n, batch_size) num_weights).
        """
        began = time.perf_counter()
        problem = network_problem("Ensemble.fit", self.model, x, y, standardize=self.standardize)
        start_seed, order_seed = child_seeds(seed, 2)
        streams = Streams(order_seed, self.num_members, problem.x.device)
        training = self._train(problem, problem.starts(self.num_members, start_seed).unsqueeze(-2), streams)
        diagnostics = {
            "engine": "Ensemble",
            "num_data": problem.data.x.shape[-2],
            "num_weights": problem.space.network.num_weights,
            "num_gradients": self.num_steps,
            "final_loss": training.losses[..., -1].mean().item(),
            "best_step": training.best_step.tolist(),
            "seconds": time.perf_counter() - began,
        }
        if not problem.data.batch_shape:
            diagnostics["trace"] = {"loss": training.losses.tolist()}
        members = training.q.squeeze(-2).unsqueeze(-3)  # (*b, 1, members, D)
        return DrawsPosterior(self.model, problem.data, problem.units, diagnostics, draws=members)

    def _train(self, problem: NetworkProblem, starts: Tensor, streams: Streams) -> _Training:
        """Run Adam on all members at once; every hundredth part of the way, keep those that validate better."""
        from tqdm import tqdm

        train, held_out = self._partition(problem, streams)
        n = train.x.shape[-2]
        q = starts.requires_grad_(True)
        optimizer = torch.optim.Adam([q], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        batches = train.batches(streams, min(self.batch_size, n))
        every, losses, best = max(1, self.num_steps // 100), [], _Best(starts)
        with tqdm(total=self.num_steps, desc="Ensemble", disable=not self.progress) as bar:
            for step in range(1, self.num_steps + 1):
                x, y = next(batches)
                loss = -problem.space.bind(x, y, n / y.shape[-2])(q).squeeze(-1) / n
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
                schedule.step()
                if step % every == 0 or step == self.num_steps:
                    losses.append(loss.detach())
                    best.offer(
                        q.detach(), step, None if held_out is None else held_out.log_likelihood(problem, q.detach())
                    )
                bar.update(1)
        trace = torch.stack(losses, -1)
        if not bool(torch.isfinite(trace[..., -1]).all()):
            wanted = "every member must end at a finite loss."
            fail(
                NumericalError,
                "Ensemble.fit",
                wanted,
                got=f"losses {trace[..., -1].tolist()}",
                fix="lower learning_rate",
            )
        return _Training(best.q, trace, best.step)

    def _partition(self, problem: NetworkProblem, streams: Streams) -> tuple[_Part, _Part | None]:
        """What each member trains on and, where anything is held out, what it validates on."""
        n = problem.x.shape[-2]
        num_held_out = round(self.validation_fraction * n) if n >= 20 else 0
        if num_held_out == 0:
            return _Part(problem.x.unsqueeze(-3), problem.y.unsqueeze(-3)), None
        order = streams.permutation(n)
        parts = order[:, num_held_out:], order[:, :num_held_out]
        train, held_out = (_Part(problem.x[..., part, :], problem.y[..., part, :]) for part in parts)
        return train, held_out


class _Training(NamedTuple):
    """Members (*b, members, 1, D), losses per point (*b, members, T), and the step at which each member stopped."""

    q: Tensor
    losses: Tensor
    best_step: Tensor


class _Part(NamedTuple):
    """Some of the data for each member: x (*b, members or 1, n, d), y (*b, members or 1, n, k)."""

    x: Tensor
    y: Tensor

    def batches(self, streams: Streams, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless minibatches, each member in an order of its own; everything where `size` is all there is."""
        n = self.x.shape[-2]
        while size == n:
            yield self.x, self.y
        while True:
            order = streams.permutation(n)
            for at in range(0, n - size + 1, size):
                chosen = order[:, at : at + size, None]
                yield self._take(self.x, chosen), self._take(self.y, chosen)

    @staticmethod
    def _take(values: Tensor, chosen: Tensor) -> Tensor:
        head = torch.broadcast_shapes(values.shape[:-2], chosen.shape[:-2])
        index = chosen.expand(*head, chosen.shape[-2], values.shape[-1])
        return values.expand(*head, *values.shape[-2:]).gather(-2, index)

    def log_likelihood(self, problem: NetworkProblem, q: Tensor) -> Tensor:
        """log p(y | member) of this part, (*b, members)."""
        weights, params, _ = problem.space.split(q)
        f = problem.space.network.forward(weights, self.x)
        return problem.space.likelihood.log_prob(f, self.y.unsqueeze(-3), params).squeeze(-1)


class _Best:
    """The best members seen so far, by held-out log likelihood; the latest where nothing is held out."""

    def __init__(self, q: Tensor) -> None:
        self.q = q.detach().clone()
        self.step = torch.zeros(q.shape[:-2], dtype=torch.long, device=q.device)
        self._score = torch.full(q.shape[:-2], -torch.inf, dtype=q.dtype, device=q.device)

    def offer(self, q: Tensor, step: int, score: Tensor | None) -> None:
        """Keep the members of `q` that score higher than before."""
        better = torch.ones_like(self._score, dtype=torch.bool) if score is None else score > self._score
        self.q = torch.where(better[..., None, None], q, self.q)
        self.step = torch.where(better, step, self.step)
        if score is not None:
            self._score = torch.where(better, score, self._score)
