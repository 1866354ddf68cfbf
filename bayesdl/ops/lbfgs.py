r"""L-BFGS for a batch of independent problems: every step is one fused evaluation of all problems that still run.

    theta <- theta + t p,    p = -H g,    H from the last `history` pairs (s, y) by the two-loop recursion

Each problem has its own step length, found by bracketing the weak Wolfe conditions

    f(theta + t p) <= f + 1e-4 t g.p,        p . g(theta + t p) >= 0.9 g.p

so that one problem may be in its third trial step while another is converged. Converged problems are no longer passed
to the objective. Everything is deterministic.

References: Nocedal, Wright (2006), algorithm 7.4; Lewis, Overton (2013), "Nonsmooth optimization via quasi-Newton
methods", for the bracketing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError, fail

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Callback = Callable[[Tensor, Tensor], None]

_ARMIJO = 1e-4
_WOLFE = 0.9
_MAX_TRIALS = 25


class LBFGSResult(NamedTuple):
    """Where each problem ended.

    Attributes:
        theta: (P D) the best point of each problem.
        value: (P) the objective there, non-finite only where it was so at the start.
        grad: (P D) the gradient there.
        iterations: (P) accepted steps.
        evaluations: Number of fused evaluations.
        converged: (P) bool, whether a tolerance was met; False also where the objective was not finite at the start.
        trace: (P T) the objective at the start and after each accepted step, NaN after the last.
    """

    theta: Tensor
    value: Tensor
    grad: Tensor
    iterations: Tensor
    evaluations: int
    converged: Tensor
    trace: Tensor


def minimize_lbfgs(
    value_and_grad: Objective,
    theta0: Tensor,
    *,
    max_iterations: int = 100,
    history: int = 10,
    tolerance_grad: float = 1e-5,
    tolerance_change: float = 1e-9,
    callback: Callback | None = None,
) -> LBFGSResult:
    """Minimise P independent functions of D variables at once.

    Args:
        value_and_grad: (theta (A D), indices (A)) -> (values (A), gradients (A D)): the objective of the problems
            numbered `indices`, which are those still running. A value or gradient that is not finite makes the step
            shorter; it never ends the run.
        theta0: (P D) where each problem starts.
        max_iterations: Accepted steps at most, for each problem.
        history: How many pairs of steps and gradient changes approximate the curvature.
        tolerance_grad: A problem has converged where its largest absolute gradient entry is at most this.
        tolerance_change: A problem has converged where a step changed its value by at most this, relative to the
            larger of its magnitude and 1.
        callback: Called after every evaluation with (iterations (P), best values (P)).

    Raises:
        ShapeError: `theta0` is not (P D), or the objective returns other shapes.
        SettingError: `max_iterations` or `history` is below 1.

    Cost: O(history P D) beside each evaluation.
    """
    if theta0.ndim != 2:
        fail(
            ShapeError,
            "ops.minimize_lbfgs",
            "theta0 must have shape (P, D): one row for each problem.",
            got=str(tuple(theta0.shape)),
            fix="pass theta0[None] for a single problem",
        )
    if max_iterations < 1 or history < 1:
        fail(
            SettingError,
            "ops.minimize_lbfgs",
            "max_iterations and history must be at least 1.",
            got=f"max_iterations {max_iterations}, history {history}",
            fix="pass positive numbers",
        )
    with torch.no_grad():
        run = _Run(value_and_grad, theta0.detach().clone(), history, tolerance_grad, tolerance_change, max_iterations)
        while run.active.numel() > 0:
            run.step()
            if callback is not None:
                callback(run.iterations.clone(), run.value.clone())
        return run.result()


@dataclass
class _Run:
    """All of the optimiser's state, one row a problem; `step` advances every active row by one evaluation."""

    value_and_grad: Objective
    theta: Tensor
    history: int
    tolerance_grad: float
    tolerance_change: float
    max_iterations: int

    def __post_init__(self) -> None:
        p, d = self.theta.shape
        like = self.theta
        self.evaluations = 0
        self.iterations = torch.zeros(p, dtype=torch.long, device=like.device)
        self.converged = torch.zeros(p, dtype=torch.bool, device=like.device)
        self.s = like.new_zeros(self.history, p, d)
        self.y = like.new_zeros(self.history, p, d)
        self.rho = like.new_zeros(self.history, p)  # 0 marks an empty slot, which the recursion then skips by itself
        self.gamma = like.new_ones(p)
        self.active = torch.arange(p, device=like.device)
        self.value, self.grad = like.new_full((p,), torch.inf), torch.zeros_like(like)
        self.trace = like.new_full((p, self.max_iterations + 1), torch.nan)
        if p == 0:
            return
        self.value, self.grad = self._evaluate(self.theta, self.active)
        finite = self.value.isfinite() & self.grad.isfinite().all(-1)
        self.trace[:, 0] = self.value
        self.converged = finite & (self.grad.abs().amax(-1) <= self.tolerance_grad) if d else finite
        self.active = (finite & ~self.converged).nonzero().squeeze(-1)
        self._new_search(self.active, first=True)

    def _evaluate(self, theta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.value_and_grad(theta, indices)
        self.evaluations += 1
        if value.shape != indices.shape or grad.shape != theta.shape:
            fail(
                ShapeError,
                "ops.minimize_lbfgs",
                f"the objective must return values {tuple(indices.shape)} and gradients {tuple(theta.shape)}.",
                got=f"{tuple(value.shape)} and {tuple(grad.shape)}",
                fix="return one value and one gradient row for each row of theta",
            )
        return value.detach().to(theta), grad.detach().to(theta)

    def _new_search(self, rows: Tensor, first: bool = False) -> None:
        """Direction, slope and an open bracket for `rows`."""
        if first:
            p = self.theta.shape[0]
            self.direction, self.slope = torch.zeros_like(self.theta), self.theta.new_zeros(p)
            self.t, self.low, self.high = (self.theta.new_zeros(p) for _ in range(3))
            self.low_value, self.low_slope = self.theta.new_zeros(p), self.theta.new_zeros(p)
            self.trials = torch.zeros_like(self.iterations)
        g = self.grad[rows]
        direction = -self._inverse_hessian_times(g, rows)
        slope = (direction * g).sum(-1)
        # A direction that rounding has turned uphill is replaced by steepest descent.
        bad = ~(slope < 0) | ~direction.isfinite().all(-1)
        direction = torch.where(bad[:, None], -g, direction)
        slope = torch.where(bad, -(g * g).sum(-1), slope)
        self.direction[rows], self.slope[rows] = direction, slope
        unscaled = bad | (self.rho[:, rows] == 0).all(0)
        self.t[rows] = torch.where(unscaled, (1.0 / g.abs().sum(-1)).clamp_max(1.0), torch.ones_like(slope))
        self.low[rows], self.high[rows] = 0.0, torch.inf
        self.low_value[rows], self.low_slope[rows] = self.value[rows], slope
        self.trials[rows] = 0

    def _inverse_hessian_times(self, g: Tensor, rows: Tensor) -> Tensor:
        """The two-loop recursion; slot 0 holds the newest pair."""
        s, y, rho = self.s[:, rows], self.y[:, rows], self.rho[:, rows]
        q, alphas = g.clone(), []
        for i in range(self.history):
            alpha = rho[i] * (s[i] * q).sum(-1)
            alphas.append(alpha)
            q = q - alpha[:, None] * y[i]
        q = q * self.gamma[rows][:, None]
        for i in reversed(range(self.history)):
            beta = rho[i] * (y[i] * q).sum(-1)
            q = q + s[i] * (alphas[i] - beta)[:, None]
        return q

    def step(self) -> None:
        """Try the current step length of every active problem, then accept it, shorten it or lengthen it."""
        rows = self.active
        t = self.t[rows]
        theta = self.theta[rows] + t[:, None] * self.direction[rows]
        value, grad = self._evaluate(theta, rows)
        finite = value.isfinite() & grad.isfinite().all(-1)
        slope = (grad * self.direction[rows]).sum(-1)
        too_long = ~finite | (value > self.value[rows] + _ARMIJO * t * self.slope[rows])
        too_short = ~too_long & (slope < _WOLFE * self.slope[rows])
        self.trials[rows] += 1
        spent = self.trials[rows] >= _MAX_TRIALS
        accept = ~too_long & (~too_short | spent)
        self._narrow(rows, t, value, slope, too_long & ~spent, too_short & ~spent, finite)
        # Out of trials without any decrease: the numbers allow no further progress along this line. Where a full step
        # promised next to none, that is what converging looks like.
        stuck = too_long & spent
        promised = -self.slope[rows] <= self.tolerance_change * self.value[rows].abs().clamp_min(1.0)
        self.converged[rows[stuck & promised]] = True
        kept = rows[accept]
        self._accept(kept, theta[accept], value[accept], grad[accept])
        stop = torch.zeros_like(self.converged)
        stop[rows[stuck]] = True
        stop |= self.converged | (self.iterations >= self.max_iterations)
        self.active = rows[~stop[rows]]
        going = kept[~stop[kept]]
        if going.numel() > 0:
            self._new_search(going)

    def _narrow(
        self, rows: Tensor, t: Tensor, value: Tensor, slope: Tensor, too_long: Tensor, too_short: Tensor, finite: Tensor
    ) -> None:
        low, high = self.low[rows], self.high[rows]
        low_value, low_slope = self.low_value[rows], self.low_slope[rows]
        # Minimum of the parabola through the lower end (value and slope) and this point, kept inside the bracket.
        width = t - low
        bend = value - low_value - low_slope * width
        guess = low - 0.5 * low_slope * width.square() / bend
        inside = finite & (bend > 0) & guess.isfinite()
        shorter = torch.where(inside, guess, low + 0.5 * width).clamp(low + 0.1 * width, low + 0.6 * width)
        shorter = torch.where(finite, shorter, low + 0.1 * width)
        longer = torch.where(high.isfinite(), 0.5 * (t + high), 2.0 * t)
        self.high[rows] = torch.where(too_long, t, high)
        self.low[rows] = torch.where(too_short, t, low)
        self.low_value[rows] = torch.where(too_short, value, low_value)
        self.low_slope[rows] = torch.where(too_short, slope, low_slope)
        self.t[rows] = torch.where(too_long, shorter, torch.where(too_short, longer, t))

    def _accept(self, rows: Tensor, theta: Tensor, value: Tensor, grad: Tensor) -> None:
        s, y = theta - self.theta[rows], grad - self.grad[rows]
        change = (self.value[rows] - value).abs()
        scale = torch.maximum(self.value[rows].abs(), value.abs()).clamp_min(1.0)
        self.theta[rows], self.value[rows], self.grad[rows] = theta, value, grad
        self.iterations[rows] += 1
        self.trace[rows, self.iterations[rows]] = value
        self.converged[rows] = (grad.abs().amax(-1) <= self.tolerance_grad) | (change <= self.tolerance_change * scale)
        curvature, length = (s * y).sum(-1), (y * y).sum(-1)
        useful = curvature > torch.finfo(theta.dtype).eps * length
        kept = rows[useful]
        if kept.numel() == 0:
            return
        self.s[:, kept], self.y[:, kept] = self.s[:, kept].roll(1, 0), self.y[:, kept].roll(1, 0)
        self.rho[:, kept] = self.rho[:, kept].roll(1, 0)
        self.s[0, kept], self.y[0, kept] = s[useful], y[useful]
        self.rho[0, kept] = 1.0 / curvature[useful]
        self.gamma[kept] = curvature[useful] / length[useful]

    def result(self) -> LBFGSResult:
        """The final state, with the trace cut to the longest run."""
        longest = int(self.iterations.max()) + 1 if self.iterations.numel() else 1
        return LBFGSResult(
            self.theta,
            self.value,
            self.grad,
            self.iterations,
            self.evaluations,
            self.converged,
            self.trace[:, :longest],
        )
