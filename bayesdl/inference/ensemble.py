r"""Deep ensembles: several networks trained from different starts, their disagreement read as uncertainty.

Each member maximises the same log posterior by Adam with minibatches, from its own draw of the prior and in its own order
of the data; noise is learned by each member. The predictive is the equal mixture of the members' predictives.

Reference: Lakshminarayanan, Pritzel, Blundell (2017), arXiv 1612.01474; here with a weight prior and constant noise.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

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
        batch_size: Points a step; all of them where n is not larger.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar.
    """

    model: BNN
    num_members: int = 5
    num_steps: int = 2000
    learning_rate: float = 0.02
    batch_size: int = 128
    standardize: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("num_members", "num_steps", "batch_size"):
            _checks.at_least("Ensemble", name, getattr(self, name), 1, integer=True)
        _checks.inside("Ensemble", "learning_rate", self.learning_rate, 0.0, math.inf)

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
        q = self._starts(problem, start_seed).requires_grad_(True)
        losses = self._train(problem, q, Streams(order_seed, self.num_members, problem.x.device))
        members = q.detach().squeeze(-2).unsqueeze(-3)  # (*b, 1, members, D)
        diagnostics = {
            "engine": "Ensemble",
            "num_data": problem.data.x.shape[-2],
            "num_weights": problem.space.network.num_weights,
            "num_gradients": self.num_steps,
            "final_loss": losses[..., -1].mean().item(),
            "seconds": time.perf_counter() - began,
        }
        if not problem.data.batch_shape:
            diagnostics["trace"] = {"loss": losses.tolist()}
        return DrawsPosterior(self.model, problem.data, problem.units, diagnostics, draws=members)

    def _starts(self, problem: NetworkProblem, seed: int) -> Tensor:
        """One draw from the prior for each member, the same for every data set: (*b, members, 1, D)."""
        like = problem.x.new_zeros(())
        seeds = child_seeds(seed, self.num_members)
        rows = [problem.space.initial(1, torch.Generator(like.device).manual_seed(s), like) for s in seeds]
        starts = torch.stack(rows)
        return starts.expand(*problem.data.batch_shape, *starts.shape).clone()

    def _train(self, problem: NetworkProblem, q: Tensor, streams: Streams) -> Tensor:
        """Optimise q in place; the loss (negative log posterior per point) at about 200 steps, (*b, members, T)."""
        from tqdm import tqdm

        n = problem.x.shape[-2]
        optimizer = torch.optim.Adam([q], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        batches = _batches(problem, streams, min(self.batch_size, n))
        every, losses = max(1, self.num_steps // 200), []
        with tqdm(total=self.num_steps, desc="Ensemble", disable=not self.progress) as bar:
            for step in range(self.num_steps):
                x, y = next(batches)
                loss = -problem.space.bind(x, y, n / y.shape[-2])(q).squeeze(-1) / n
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
                schedule.step()
                if step % every == 0 or step == self.num_steps - 1:
                    losses.append(loss.detach())
                bar.update(1)
        trace = torch.stack(losses, -1)
        if not bool(torch.isfinite(trace[..., -1]).all()):
            wanted = "every member must end at a finite loss."
            fail(NumericalError, "Ensemble.fit", wanted, got=f"losses {trace[..., -1].tolist()}", fix="lower learning_rate")
        return trace


def _batches(problem: NetworkProblem, streams: Streams, size: int) -> Any:
    """Endless minibatches, each member in its own order: x (*b, members, size, d), y (*b, members, size, k)."""
    n = problem.x.shape[-2]
    if size == n:
        while True:
            yield problem.x.unsqueeze(-3), problem.y.unsqueeze(-3)
    while True:
        order = streams.permutation(n)
        for at in range(0, n - size + 1, size):
            chosen = order[:, at : at + size]
            yield problem.x[..., chosen, :], problem.y[..., chosen, :]
