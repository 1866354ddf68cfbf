"""A matrix-free Gaussian process conditioned on its data: what is solved for, and what is said of the solve."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl.data import TrainingData, Units
from bayesdl.errors import ConvergenceWarning
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops.solver import SolverConfig, linear_system, log_evidence
from bayesdl.posterior.closed_form import evidence_in_units


class MatrixFreeState(NamedTuple):
    """What the posterior of one problem needs to know of its data.

    Attributes:
        x: (n d) inputs in the model's units.
        residual: (n) targets minus the prior mean.
        alpha: (n) A^{-1} residual.
        pivots: Columns of the preconditioner.
        first: (n p) A^{-1} of the first p draws z from the prior of the data, up to the tolerance of the fit and at the
            hyper-parameters of its last step: where the solves of the variance's draws start. p is 0 where nobody asks.
    """

    x: Tensor
    residual: Tensor
    alpha: Tensor
    pivots: ops.Pivots
    first: Tensor


class Solved(NamedTuple):
    """A conditioned problem: its state, its log evidence () or None, and what the solver reports."""

    state: MatrixFreeState
    evidence: Tensor | None
    report: dict[str, float]


def condition_matrix_free(
    kernel: Any,
    params: dict[str, Tensor],
    noise_variance: Tensor,
    x: Tensor,
    residual: Tensor,
    config: SolverConfig,
    *,
    seed: int,
    memory: int,
    start: Tensor | None = None,
    first: Tensor | None = None,
) -> Solved:
    """Solve for alpha, and estimate the evidence, of one problem: x (n d), residual (n), no batch axes anywhere.

    The solve for alpha starts from `start` (n); `first` is kept for `MatrixFreeState.first`.

    Cost: n^2 / 2 kernel evaluations for each step of the solve and of the quadrature.
    """
    g = torch.Generator(x.device).manual_seed(seed)
    system = linear_system(tiles_of(kernel, params), x, noise_variance, config, generator=g)
    solved = system.solve(residual.unsqueeze(-1), config.tolerance, None if start is None else start.unsqueeze(-1))
    alpha = solved.solution.squeeze(-1)
    report = {
        "iterations": int(solved.iterations.max()),
        "residual": float(solved.residual.max()),
        "solver_converged": bool(solved.converged.all()),
        "preconditioner_rank": system.preconditioner.rank,
    }
    evidence = None
    if config.num_probes > 0:
        found = log_evidence(system, residual, solved, config, g, memory=memory // 4)
        evidence = found.value
        report["log_det_std_error"] = 2 * float(found.std_error)
        report["lanczos_steps"] = found.steps
    first = x.new_zeros(x.shape[0], 0) if first is None else first
    return Solved(MatrixFreeState(x, residual, alpha, system.preconditioner.pivots, first), evidence, report)


def problems_of(data: TrainingData, units: Units) -> list[tuple[Tensor, Tensor]]:
    """Inputs (n d) and targets (n) in the model's units, one pair a data set and output."""
    x = units.inward_x(data.x, torch.float64).reshape(-1, *data.x.shape[-2:])
    y = units.inward_y(data.y, torch.float64).movedim(-1, -2)
    k = data.y.shape[-1]
    return [(x[i // k], targets) for i, targets in enumerate(y.reshape(-1, y.shape[-1]))]


def summary(solved: list[Solved], where: str) -> dict[str, Any]:
    """The worst of every figure over the problems, with a warning where a solve did not converge."""
    report: dict[str, Any] = {"method": "matrix_free"}
    for name in solved[0].report:
        figures = [s.report[name] for s in solved]
        report[name] = min(figures) if name in ("solver_converged", "preconditioner_rank") else max(figures)
    if not report["solver_converged"]:
        message = f"{where}: a solve ended at a relative residual of {report['residual']:.1e}; raise max_iterations"
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return report


def total_evidence(solved: list[Solved], units: Units, n: int) -> Tensor | None:
    """log p(y) in the user's units, shape *b; None without probes."""
    if solved[0].evidence is None:
        return None
    each = torch.stack([s.evidence for s in solved])
    shape = units.y_scale.squeeze(-2).shape
    return evidence_in_units(each.reshape(shape), units, n)
