r"""Priors over tasks from what is there already: any model of the project, and mixtures of priors.

theta ~ p(theta),    f ~ model(theta),    y_i ~ p(y | f(x_i), theta)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.priors._tasks_base import Inputs, TaskPrior, Tasks, check_inputs, check_sizes, draw_inputs, merge_latents
from bayesdl.priors._tasks_draws import check_weights, choose, draw_functions, draw_parameters

Values = dict[str, Tensor]


@dataclass(frozen=True)
class ModelTasks:
    """Data sets that a model of the project would generate, hyper-parameters drawn from their priors.

    Attributes:
        model: A `GP`: every task draws kernel, mean and likelihood parameters from their priors (those without one
            keep their initial values; a learned constant mean is 0), then f. A `BNN`: every task draws weights and
            likelihood parameters, then f. Anything else with `sample_prior(x, num, generator)` (num, n): then all tasks
            of a call share their inputs, since one x is all that it promises to take.
        inputs: As for `FixedGP`.

    With a likelihood of classes y is int64, and `noiseless` the most probable class. Without any likelihood, y is f.

    Latents: the drawn parameters under the names that the model gives them, "jitter" (batch) for a GP, and "f" (batch,
    n) or (batch, n, classes) where there are classes.
    """

    model: Any
    inputs: Inputs = "uniform"

    def __post_init__(self) -> None:
        if isinstance(self.model, type) or not callable(getattr(self.model, "sample_prior", None)):
            wanted = "model must be a prior over functions, with sample_prior(x, num, generator)."
            fix = "bdl.GP(bdl.kernels.RBF()) or bdl.BNN(hidden=(50,)), say"
            fail(SettingError, "ModelTasks", wanted, got=_checks.describe(self.model), fix=fix)
        check_inputs("ModelTasks", self.inputs)

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: O(batch n^3) for a GP, O(batch n) passes through one network for a BNN."""
        check_sizes("ModelTasks", batch, n, d, generator)
        likelihood = getattr(self.model, "likelihood", None)
        if hasattr(self.model, "layout") and hasattr(self.model, "kernel"):
            x = draw_inputs("ModelTasks", self.inputs, batch, n, d, generator)
            f, values = self._process(x, generator)
        elif hasattr(self.model, "weight_space"):
            x = draw_inputs("ModelTasks", self.inputs, batch, n, d, generator)
            space = self.model.weight_space(d, 1)
            with torch.no_grad():
                f = space.forward(space.initial(batch, generator, x).unsqueeze(1), x).squeeze(1)
            values = draw_parameters(likelihood.parameters(), batch, generator)
        else:
            x = draw_inputs("ModelTasks", self.inputs, 1, n, d, generator)
            with torch.no_grad():
                f = self.model.sample_prior(x[0].to(torch.float64), batch, generator).reshape(batch, n, -1)
            x = x.repeat(batch, 1, 1)
            values = {} if likelihood is None else draw_parameters(likelihood.parameters(), batch, generator)
        return _through(likelihood, x, f, values, generator)

    def _process(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Values]:
        """f (batch n k) of a Gaussian process, one function for each output that the likelihood asks for."""
        batch, n, d = x.shape
        values = draw_parameters(self.model.layout(d).parameters, batch, generator)
        num = self.model.likelihood.num_outputs(1)
        own = {
            name: value.repeat_interleave(num, 0) if num > 1 else value
            for name, value in self.model.kernel_values(values).items()
        }
        f, jitter = draw_functions(self.model.kernel, own, x.repeat_interleave(num, 0) if num > 1 else x, generator)
        f = f.reshape(batch, num, n).mT
        with torch.no_grad():
            mean = self.model.mean_at(x.to(torch.float64), values, f.new_zeros(batch))
        return f + mean.unsqueeze(-1), {**values, "jitter": jitter.reshape(batch, num).amax(-1)}


@dataclass(frozen=True)
class Mixture:
    """Tasks from several priors, each task from one of them.

    Attributes:
        priors: Priors over tasks, all over regression or all over classes.
        weights: How probable each is; None for equally.

    Latents: "part" (batch), the place of a task's prior in `priors`, and those of all priors, NaN or -1 in tasks of
    others. Names that differ in shape between priors are prefixed by the number of the prior.
    """

    priors: tuple[TaskPrior, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "priors", tuple(self.priors) if isinstance(self.priors, Sequence) else (self.priors,))
        for prior in self.priors:
            if isinstance(prior, type) or not callable(getattr(prior, "sample", None)):
                wanted = "priors must hold priors over tasks, with sample(batch, n, d, generator)."
                fix = "Mixture((HyperGP(), HEBOPlus()))"
                fail(SettingError, "Mixture", wanted, got=_checks.describe(prior), fix=fix)
        check_weights("Mixture", self.weights, len(self.priors), "priors")

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: that of its parts."""
        check_sizes("Mixture", batch, n, d, generator)
        which = choose(self.weights, len(self.priors), batch, generator)
        parts, drawn = [], []
        for i, prior in enumerate(self.priors):
            rows = (which == i).nonzero().squeeze(-1)
            if rows.numel() > 0:
                drawn.append(prior.sample(rows.numel(), n, d, generator))
                parts.append((i, rows))
        kinds = {tasks.y.dtype for tasks in drawn}
        if len(kinds) > 1:
            got = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            fix = "mix regression with regression, classes with classes"
            fail(SettingError, "Mixture.sample", "all priors must have targets of one kind.", got=got, fix=fix)
        order = torch.cat([rows for _, rows in parts]).argsort()
        x, y, noiseless = (torch.cat([getattr(t, name) for t in drawn])[order] for name in ("x", "y", "noiseless"))
        latents = merge_latents([(rows, t.latents) for (_, rows), t in zip(parts, drawn, strict=True)], batch)
        return Tasks(x, y, noiseless, {**latents, "part": which})


def _through(likelihood: Any, x: Tensor, f: Tensor, values: Values, generator: torch.Generator) -> Tasks:
    """What is observed of function values f (batch n k): noise on them, or classes."""
    task = "none" if likelihood is None else likelihood.task
    if task in ("none", "regression"):
        f = f.squeeze(-1)
        y = f
        if task == "regression":
            noise = values["noise_variance"].to(f.dtype).sqrt().unsqueeze(-1)
            y = f + noise * torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return Tasks(x, y.to(torch.float32), f.to(torch.float32), values)
    if task == "binary":
        f = f.squeeze(-1)
        u = torch.rand(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return Tasks(x, (u < f.sigmoid()).long(), (f > 0).long(), {**values, "f": f})
    u = torch.rand(f.shape, generator=generator, dtype=f.dtype, device=f.device)
    gumbel = -(-u.clamp_min(torch.finfo(f.dtype).tiny).log()).log()
    return Tasks(x, (f + gumbel).argmax(-1), f.argmax(-1), {**values, "f": f})
