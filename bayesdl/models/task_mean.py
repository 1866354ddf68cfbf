"""A prior mean with one constant for each of several tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import ShapeError, fail
from bayesdl.hyper import Normal, Parameter

Values = dict[str, Tensor]


@dataclass(frozen=True)
class TaskMean:
    """m(x, t) = c_t, for inputs of which one column holds the number of the task.

        k = bdl.kernels.Coregionalization(bdl.kernels.Matern(nu=2.5), num_tasks=3)
        bdl.GP(k, mean=bdl.models.TaskMean(3))

    Without it, tasks of different levels have one constant mean, and their kernel must explain the difference.

    Attributes:
        num_tasks: T.
        column: Which column of x holds the task; negative numbers count from the end.
        scale: Standard deviation of the prior N(0, scale^2) on each c_t, in standardised targets.
    """

    num_tasks: int = 2
    column: int = -1
    scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.at_least("TaskMean", "num_tasks", self.num_tasks, 1, integer=True)
        _checks.inside("TaskMean", "scale", self.scale, 0.0, math.inf)

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`constants` c (T), from 0."""
        if not -d <= self.column < d:
            wanted = f"column {self.column} needs more columns."
            fail(ShapeError, "TaskMean", wanted, got=f"d = {d}", fix="pass x with a column of task numbers")
        return (Parameter("constants", (self.num_tasks,), 0.0, Normal(0.0, self.scale), -math.inf),)

    def __call__(self, x: Tensor, params: Values | None = None) -> Tensor:
        """m(x) (*b n) at x (*b n d)."""
        constants = x.new_zeros(self.num_tasks) if params is None else params["constants"]
        return (self._tasks(x) @ constants.unsqueeze(-1)).squeeze(-1)

    def pullback(self, x: Tensor, params: Values, p: Tensor) -> Values:
        """From p = dL/dm (*b n) to dL/dc, the sum of p over each task's rows."""
        with torch.no_grad():
            total = (p.unsqueeze(-2) @ self._tasks(x)).squeeze(-2)
            constants = params["constants"]
            return {"constants": total if total.shape == constants.shape else total.sum_to_size(constants.shape)}

    def _tasks(self, x: Tensor) -> Tensor:
        """Indicators (*b n T); the kernel refuses what is no task number."""
        return (x[..., self.column].unsqueeze(-1) == torch.arange(self.num_tasks, device=x.device)).to(x.dtype)
