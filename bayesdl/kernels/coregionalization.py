r"""Several related functions as one Gaussian process, over inputs with a column that says which function is meant.

    Cov[f_t(x), f_s(z)] = B_ts k(x, z),    B = W W' + diag(v)

the intrinsic coregionalisation model: W (T, r) is what tasks share, v (T) what each has for itself. A sum of such
kernels, with base kernels of different lengthscales, is the linear model of coregionalisation.

References: Bonilla, Chai, Williams (2008), "Multi-task Gaussian process prediction"; Alvarez, Rosasco, Lawrence (2012),
arXiv 1106.6251, section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import DataError, SettingError, ShapeError, fail
from bayesdl.hyper import LogNormal, Normal, Parameter
from bayesdl.kernels.algebra import _check_parts, _part
from bayesdl.kernels.base import Functions, Kernel, Lead, Params, Pullback, align, draw_uniform, get, reduce_to
from bayesdl.kernels.columns import PriorChoice


@dataclass(frozen=True)
class Coregionalization(Kernel):
    """B[t, s] base(x, z), for inputs of which one column holds the number of the task, 0 to num_tasks - 1.

    Engines leave that column as it is when they standardise.

    Attributes:
        base: Covariance over the other columns, which it counts as if the task's were not there. B has the amplitude:
            let its variance be 1.
        num_tasks: T.
        rank: r, columns of W: how many functions the tasks share. T describes any B.
        column: Which column holds the task; negative numbers count from the end.
        factor_prior: A prior on each entry of W, None for a flat one, or "default": N(0, 1).
        variance_prior: A prior on each entry of v, None for a flat one, or "default": LogNormal(-3, 2), from a
            thousandth of the variance of standardised targets to all of it, because levels of tasks that lie far
            apart take up most of that variance.

    B starts with ones on its diagonal and correlations of 0.8.
    """

    base: Kernel
    num_tasks: int = 2
    rank: int = 1
    column: int = -1
    factor_prior: PriorChoice = "default"
    variance_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        where = "Coregionalization"
        _check_parts(where, (self.base,))
        _checks.at_least(where, "num_tasks", self.num_tasks, 1, integer=True)
        _checks.at_least(where, "rank", self.rank, 1, integer=True)
        if self.rank > self.num_tasks:
            wanted = f"rank must be at most num_tasks = {self.num_tasks}."
            fail(SettingError, where, wanted, got=f"{self.rank}", fix=f"rank={self.num_tasks} describes any B")
        if isinstance(self.column, bool) or not isinstance(self.column, int):
            fail(SettingError, where, "column must be an integer.", got=repr(self.column), fix="column=-1 for the last")

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`factor` W (T, r) and `task_variance` v (T), then those of the base for d - 1 columns."""
        self.task_column(d)
        factor_prior = Normal(0.0, 1.0) if self.factor_prior == "default" else self.factor_prior
        variance_prior = LogNormal(-3.0, 2.0) if self.variance_prior == "default" else self.variance_prior
        tasks, rank = self.num_tasks, self.rank
        # the first column is what all share; the others are small waves, so that no two move together
        rows = [
            (math.sqrt(0.8), *(0.1 * math.cos(math.pi * (t + 0.5) * j / tasks) for j in range(1, rank)))
            for t in range(tasks)
        ]
        return (
            Parameter("factor", (tasks, rank), tuple(rows), factor_prior, -math.inf),
            Parameter("task_variance", (tasks,), 0.2, variance_prior),
            *(p.prefixed("base") for p in self.base.parameters(d - 1)),
        )

    def task_column(self, d: int) -> int:
        """Which of d columns holds the task, counted from 0.

        Raises:
            ShapeError: There is no such column, or no other.
        """
        if d < 2 or not -d <= self.column < d:
            fix = "give x a column of task numbers besides its inputs, and column= its place"
            wanted = "x must have a column of task numbers and at least one other."
            fail(ShapeError, "Coregionalization", wanted, got=f"d = {d}, column = {self.column}", fix=fix)
        return self.column % d

    def task_covariance(self, params: Params) -> Tensor:
        """B = W W' + diag(v), (*b T T)."""
        factor = get(params, "factor", "Coregionalization")
        return factor @ factor.mT + torch.diag_embed(get(params, "task_variance", "Coregionalization"))

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        inputs, tasks = self._apart(x)
        there, others = (None, tasks) if z is None else self._apart(z)
        shared = tasks @ self.task_covariance(params) @ others.mT
        return shared * self.base._covariance(inputs, there, _part(params, "base"))

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        inputs, tasks = self._apart(x)
        own = self.task_covariance(params).diagonal(dim1=-2, dim2=-1)
        return (tasks @ own.unsqueeze(-1)).squeeze(-1) * self.base._variance(inputs, _part(params, "base"))

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """With E the tasks as indicators (n T) and p = dL/dK: dL/dB = E' (p * base) E, dL/dW = 2 dL/dB W."""
        params = self._resolved(x, params)
        with torch.no_grad():
            inputs, tasks = self._apart(x)
            shared = tasks @ self.task_covariance(params) @ tasks.mT
        base, pull_base = self.base.value_and_pullback(inputs, _part(params, "base"))

        def pullback(p: Tensor) -> Params:
            with torch.no_grad():
                by_b = tasks.mT @ (p * base) @ tasks
                factor, variance = params["factor"], params["task_variance"]
                grads = {
                    "factor": reduce_to(2.0 * by_b @ factor, factor.shape),
                    "task_variance": reduce_to(by_b.diagonal(dim1=-2, dim2=-1), variance.shape),
                }
                own = pull_base(reduce_to(p * shared, base.shape))
            return grads | {f"base.{name}": grad for name, grad in own.items()}

        return base * shared, pullback

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        """Those of the base, times W_t s + sqrt(v_t) s_t with random signs s (r) and s_t for each feature."""
        self.task_column(d)
        features = self.base._features(lead, num_features, d - 1, _part(params, "base"), generator)
        factor, variance = get(params, "factor", "Coregionalization"), params["task_variance"]
        shape = (*lead, self.rank + self.num_tasks, num_features)
        signs = draw_uniform(shape, params, generator).sub_(0.5).sign()
        amplitude = factor @ signs[..., : self.rank, :]
        amplitude = amplitude + variance.sqrt().unsqueeze(-1) * signs[..., self.rank :, :]  # (*lead T M)

        def evaluate(x: Tensor) -> Tensor:
            inputs, tasks = self._apart(x)
            return features(inputs) * (tasks @ align(amplitude, 2, x))

        return evaluate

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The other columns (*b n d-1), and the tasks as indicators (*b n T)."""
        column = self.task_column(x.shape[-1])
        number = x[..., column]
        tasks = (number.unsqueeze(-1) == torch.arange(self.num_tasks, device=x.device)).to(x.dtype)
        if not bool(tasks.any(-1).all()):
            strange = number[~tasks.any(-1)][0].item()
            wanted = f"column {column} of x must hold task numbers from 0 to {self.num_tasks - 1}."
            fix = "number the tasks from 0, and keep the column fixed where x is optimised"
            fail(DataError, "Coregionalization", wanted, got=f"{strange:g}", fix=fix)
        return torch.cat([x[..., :column], x[..., column + 1 :]], -1), tasks


def label_columns(kernel: Kernel, d: int) -> tuple[int, ...]:
    """Which of d columns hold labels rather than quantities, in any part of the kernel: they are not standardised."""
    if isinstance(kernel, Coregionalization):
        own = kernel.task_column(d)
        inside = (column + (column >= own) for column in label_columns(kernel.base, d - 1))
        return tuple(sorted({own, *inside}))
    parts = [getattr(kernel, "base", None), *getattr(kernel, "kernels", ())]
    found = {column for part in parts if isinstance(part, Kernel) for column in label_columns(part, d)}
    return tuple(sorted(found))
