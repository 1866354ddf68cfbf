r"""A Gaussian process on many points, by solves instead of factorisations.

    alpha = A^{-1} r,    log N(r | 0, A) = -1/2 r' alpha - 1/2 log|A| - n/2 log 2 pi,    A = k(x, x) + s I

`LinearSystem` ties the pieces together: products with A in tiles, a preconditioner from a few of its columns, conjugate
gradients with float32 products corrected by true float64 residuals, and probes for what only traces can tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.ops.cg import CGResult, pcg
from bayesdl.ops.lanczos import lanczos_log_det
from bayesdl.ops.preconditioner import Pivots, Preconditioner, preconditioner, random_pivots
from bayesdl.ops.products import KernelOperator, kernel_operator
from bayesdl.ops.tiles import Grads, Tiles


@final
@dataclass(frozen=True)
class SolverConfig:
    """How a matrix-free Gaussian process is solved and learned.

    Attributes:
        rank: Columns of the preconditioner at most: more make every solve shorter, and take n * rank numbers.
        tolerance: Relative residual of the solve that gives the mean, and of functions.
        variance_tolerance: Relative residual of the solves that give variances, whose error is of its square. Stopping
            early never makes a variance too small.
        variance_samples: None for a variance from a solve of its own for every point. A number for a variance from so
            many pathwise draws, whose solves all points share: relative standard error sqrt(2 / variance_samples), for
            test sets so large that a solve for each point would take longer than the fit.
        max_iterations: Steps of conjugate gradients at most.
        mixed_precision: Whether steps use float32 products; residuals are float64 in any case.
        num_probes: Probes of the log-determinant and of its gradient, the same at every step of a fit: with 16 the
            optimum that they give lies a few nats below the true one, whatever n. 0 for no log evidence, and no steps
            on all points.
        estimator: Probes of the gradient: "signs" (Hutchinson), or "pathwise", draws from the prior of the data, whose
            solves are shorter and serve as the first of the `variance_samples` as well; its gradient has a larger error
            (see `evidence_gradient`), and for network kernels a bias of O(depth / 1024). A kernel that cannot draw
            functions falls back to signs; `diagnostics["estimator"]` names what was used.
        lanczos_steps: Steps of the quadrature for the log-determinant at most.
        subset_size: A random subset of this size is fitted first, by Cholesky, and gives the starting point.
        num_steps: Adam steps on all points, after that; 0 keeps the hyper-parameters of the subset.
        learning_rate: Of Adam, in log hyper-parameters; it falls to a tenth along a cosine.
        training_tolerance: Relative residual of the solves that give gradients.
        checkpoint: Path of a file to which the search writes where it is after every step, and from which it goes on if
            it was stopped; None for none. A batch of problems writes one each, with the problem's number appended.
    """

    rank: int = 500
    tolerance: float = 1e-5
    variance_tolerance: float = 1e-3
    variance_samples: int | None = None
    max_iterations: int = 1000
    mixed_precision: bool = True
    num_probes: int = 16
    estimator: str = "signs"
    lanczos_steps: int = 50
    subset_size: int = 2000
    num_steps: int = 15
    learning_rate: float = 0.05
    training_tolerance: float = 1e-2
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("rank", 0), ("max_iterations", 1), ("num_probes", 0), ("lanczos_steps", 1)):
            _checks.at_least("SolverConfig", name, getattr(self, name), least, integer=True)
        for name, least in (("subset_size", 1), ("num_steps", 0)):
            _checks.at_least("SolverConfig", name, getattr(self, name), least, integer=True)
        for name in ("tolerance", "variance_tolerance", "training_tolerance", "learning_rate"):
            _checks.inside("SolverConfig", name, getattr(self, name), 0.0, 1.0)
        _checks.choice("SolverConfig", "estimator", self.estimator, ("signs", "pathwise"))
        if self.variance_samples is not None:
            _checks.at_least("SolverConfig", "variance_samples", self.variance_samples, 2, integer=True)
        if self.num_probes == 1:
            _checks.at_least("SolverConfig", "num_probes (unless 0)", self.num_probes, 2, integer=True)


@final
@dataclass(frozen=True)
class LinearSystem:
    """A x = b for A = k(x, x) + s I, ready to be solved.

    Attributes:
        operator: A, with float64 tiles.
        coarse: A with float32 tiles, or None.
        preconditioner: P close to A.
        max_iterations: Steps of a solve at most.
        explained: Whether the preconditioner has all columns that it needs, so that P is A up to rounding.
    """

    operator: KernelOperator
    coarse: KernelOperator | None
    preconditioner: Preconditioner
    max_iterations: int
    explained: bool = False

    def solve(self, b: Tensor, tolerance: float, start: Tensor | None = None) -> CGResult:
        """A^{-1} B for B (n t); see `pcg`.

        Where P explains A, P^{-1} B is the start in any case, and one product usually confirms it.
        """
        if self.explained:
            start = self.preconditioner.solve(b)
        return pcg(
            self.operator,
            b,
            precondition=self.preconditioner.solve,
            tolerance=tolerance,
            max_iterations=self.max_iterations,
            start=start,
            coarse=self.coarse,
        )


class Evidence(NamedTuple):
    """Log marginal likelihood by a solve and a stochastic log-determinant.

    Attributes:
        value: ().
        std_error: () of the log-determinant's half.
        steps: Lanczos steps.
    """

    value: Tensor
    std_error: Tensor
    steps: int


class GradientEstimate(NamedTuple):
    """Gradient of the log marginal likelihood, and the solves that it came from.

    Attributes:
        params: By name of the hyper-parameter, float64.
        noise_variance: ().
        solution: (n 1 + t) A^{-1} of the residual and of the probes: the start of the next solve. Its first column is
            the gradient with respect to the prior mean at x.
        solved: What the solver says of it.
    """

    params: Grads
    noise_variance: Tensor
    solution: Tensor
    solved: CGResult


def linear_system(
    tiles: Tiles,
    x: Tensor,
    noise_variance: Tensor,
    config: SolverConfig,
    *,
    pivots: Pivots | None = None,
    generator: torch.Generator | None = None,
) -> LinearSystem:
    """Products, preconditioner and solver for one problem.

    Args:
        tiles: The covariance function.
        x: (n d) float64.
        noise_variance: ().
        config: Rank, precision and steps.
        pivots: Columns of the preconditioner, None to choose them with `generator`.
        generator: Source of randomness for the choice, on the device of x.

    Cost: n r kernel evaluations and 7 n r^2 operations; n r numbers of memory.
    """
    operator = kernel_operator(tiles, x, noise_variance)
    if pivots is None:
        generator = torch.Generator(x.device).manual_seed(0) if generator is None else generator
        pivots = random_pivots(operator, config.rank, generator)
    coarse = operator.to(torch.float32) if config.mixed_precision else None
    n, count = x.shape[-2], pivots.index.numel()
    explained = count == n or count < min(config.rank, n)
    return LinearSystem(operator, coarse, preconditioner(operator, pivots), config.max_iterations, explained)


def log_evidence(
    system: LinearSystem,
    residual: Tensor,
    solved: CGResult,
    config: SolverConfig,
    generator: torch.Generator,
    *,
    memory: int | None = None,
) -> Evidence:
    """log N(residual | 0, A) for a residual (n), from the solve for A^{-1} residual.

    The quadratic form takes what the solve left into account, so that its error is of second order.

    Cost: `lanczos_steps` products at most.
    """
    probes = system.preconditioner.sample(config.num_probes, generator)
    # in float64: float32 tiles would move every eigenvalue by 1e-7 of the largest, and with it the log of the smallest
    log_det = lanczos_log_det(
        system.operator, system.preconditioner, probes, max_steps=config.lanczos_steps, memory=memory
    )
    n = residual.shape[-1]
    quadratic = (solved.solution.squeeze(-1) * (residual + solved.remainder.squeeze(-1))).sum()
    value = -0.5 * (quadratic + log_det.value + n * math.log(2 * math.pi))
    return Evidence(value, 0.5 * log_det.std_error, log_det.steps)


def evidence_gradient(
    system: LinearSystem,
    residual: Tensor,
    config: SolverConfig,
    generator: torch.Generator | None = None,
    *,
    start: Tensor | None = None,
    draws: Tensor | None = None,
) -> GradientEstimate:
    r"""Gradient of log N(residual | 0, A), with probes for the trace.

        1/2 alpha' dA alpha - 1/2 tr(A^{-1} dA)

    with one of two estimators of the trace,

        signs       E[ (A^{-1} z)' dA z ],          z of independent signs
        pathwise    E[ (A^{-1} z)' dA (A^{-1} z) ],  z from N(0, A)

    Signs do not change with the hyper-parameters, and draws by the same random numbers change little, so that the last
    solves are good starts for the next. With exact draws the pathwise estimate has the variance tr((A^{-1} dA)^2) / 2t,
    at 1000 points and a noise of 1 % to 10 % a third to 0.95 of the standard error of signs in the lengthscales, but
    1.4 to 4 times as much in noise and outputscale, where signs see a near-diagonal matrix without error. Draws of 1024
    random features had 0.5 to 3 and 2 to 15 times the error of signs. Their solves took up to 15 % fewer steps. Hence
    signs are the default. Probes from N(0, P) had up to twice the error of signs in the lengthscales.

    Args:
        system: The problem.
        residual: (n) targets minus the prior mean.
        config: Number of probes (of signs) and tolerance.
        generator: Source of the signs; the same state gives the same signs. Not used with `draws`.
        start: The `solution` of a nearby problem.
        draws: (n t) columns z with E[z z'] = A for the pathwise estimator; None for signs.

    Raises:
        ShapeError: `draws` has other rows than the residual.
        SettingError: Neither `generator` nor `draws` is given.

    Cost: one solve of 1 + t columns, and two products.

    Reference: Lin et al. (2024), arXiv 2405.18457, for the pathwise estimator.
    """
    probes = _signs(residual, config.num_probes, generator) if draws is None else draws
    if probes.ndim != 2 or probes.shape[0] != residual.shape[0]:
        wanted = f"draws must have shape ({residual.shape[0]}, t)."
        fail(ShapeError, "ops.evidence_gradient", wanted, got=str(tuple(probes.shape)), fix="pass one draw a column")
    solved = system.solve(torch.cat([residual.unsqueeze(-1), probes], -1), config.training_tolerance, start)
    alpha, inverse = solved.solution[:, :1], solved.solution[:, 1:]
    u = torch.cat([alpha, -inverse / probes.shape[-1]], -1)
    v = 0.5 * torch.cat([alpha, probes if draws is None else inverse], -1)
    # float32 tiles will do for a sum whose sampling error is far above their rounding
    params = (system.coarse or system.operator).gradient(u, v)
    return GradientEstimate(params, (u * v).sum(), solved.solution, solved)


def _signs(like: Tensor, num: int, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        wanted = "either a generator (for signs) or draws must be given."
        fail(SettingError, "ops.evidence_gradient", wanted, got="neither", fix="pass generator=torch.Generator()")
    shape = (like.shape[0], num)
    return torch.randint(0, 2, shape, generator=generator, device=like.device).to(like).mul_(2.0).sub_(1.0)


def memory_needed(n: int, d: int, columns: int, config: SolverConfig) -> int:
    """Bytes that a matrix-free solve of `columns` right-hand sides takes, to first order.

    The preconditioner with what its construction needs, prepared rows in two precisions, the vectors of the solver, and
    the four matrices of the subset that gives the start.
    """
    rank, subset = min(config.rank, n), min(config.subset_size, n)
    vectors = max(columns, 1 + config.num_probes)
    return 8 * n * (rank + 3 * min(rank, 64) + 3 * (d + 2) + 11 * vectors) + 32 * subset * subset
