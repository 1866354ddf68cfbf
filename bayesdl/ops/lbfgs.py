r"""L-BFGS for a batch of independent problems: every step is one fused evaluation of all problems that still run.

    theta <- theta + t p,    p = -H g,    H from the last `history` pairs (s, y) in the compact form

    H = gamma I + [S, gamma Y] [[R^-T (D + gamma Y'Y) R^-1, -R^-T], [-R^-1, 0]] [S, gamma Y]'

with R the upper triangle of S'Y and D its diagonal. Where the pairs would take as much memory as H itself,
D <= 2 history, no pair is forgotten and the recursion that defines H runs on the two matrices in H = M + gamma N:

    M <- V'M V + s s' / s'y,    N <- V'N V,    V = I - y s' / s'y

so that gamma = s'y / y'y is still that of the newest pair: a first scale that stays, as in plain BFGS, costs half as
many evaluations again on marginal likelihoods.

Each problem has its own step length, found by bracketing the weak Wolfe conditions

    f(theta + t p) <= f + 1e-4 t g.p,        p . g(theta + t p) >= 0.9 g.p

so that one problem may be in its third trial step while another is converged. Converged problems are no longer passed
to the objective. Everything is deterministic. The optimiser's own numbers are few and lie on the host in float64,
whatever the objective's device: each evaluation costs one transfer each way, and no other step touches the device.

References: Byrd, Nocedal, Schnabel (1994), theorem 2.2, for the compact form; Nocedal, Wright (2006), equations 7.16
to 7.20, for the recursion; Lewis, Overton (2013), "Nonsmooth optimization via quasi-Newton methods", for the
bracketing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError, fail

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Callback = Callable[[Tensor, Tensor], None]
Array = np.ndarray[Any, np.dtype[Any]]

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
        history: How many pairs of steps and gradient changes approximate the curvature; all of them where that takes
            no more memory, D <= 2 history.
        tolerance_grad: A problem has converged where its largest absolute gradient entry is at most this.
        tolerance_change: A problem has converged where a step changed its value by at most this, relative to the
            larger of its magnitude and 1.
        callback: Called after every evaluation with (iterations (P), best values (P)).

    Raises:
        ShapeError: `theta0` is not (P D), or the objective returns other shapes.
        SettingError: `max_iterations` or `history` is below 1.

    Cost: O(history (history + D) P) beside each evaluation, or O(D^2 P) where D <= 2 history.
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
    with torch.no_grad(), np.errstate(all="ignore"):
        run = _Run(value_and_grad, theta0.detach(), history, tolerance_grad, tolerance_change, max_iterations)
        while run.active.size > 0:
            run.step()
            if callback is not None:
                callback(run.back(run.iterations), run.back(run.value))
        return run.result()


@dataclass
class _Run:
    """All of the optimiser's state, one row a problem; `step` advances every active row by one evaluation."""

    value_and_grad: Objective
    start: Tensor
    history: int
    tolerance_grad: float
    tolerance_change: float
    max_iterations: int

    def __post_init__(self) -> None:
        self.theta = self.start.to("cpu", torch.float64).numpy().copy()
        self.eps = torch.finfo(self.start.dtype).eps
        p, d = self.theta.shape
        self.evaluations = 0
        self.iterations = np.zeros(p, dtype=np.int64)
        self.converged = np.zeros(p, dtype=bool)
        self.curvature = _Matrix(p, d) if d <= 2 * self.history else _Pairs(p, d, self.history)
        self.active = np.arange(p)
        self.value, self.grad = np.full(p, np.inf), np.zeros((p, d))
        self.trace = np.full((p, self.max_iterations + 1), np.nan)
        self.direction, self.slope = np.zeros((p, d)), np.zeros(p)
        self.t, self.low, self.high = np.zeros(p), np.zeros(p), np.zeros(p)
        self.low_value, self.low_slope = np.zeros(p), np.zeros(p)
        self.trials = np.zeros(p, dtype=np.int64)
        if p == 0:
            return
        self.value, self.grad = self._evaluate(self.theta, self.active)
        finite = np.isfinite(self.value) & np.isfinite(self.grad).all(-1)
        self.trace[:, 0] = self.value
        self.converged = finite & (np.abs(self.grad).max(-1, initial=0.0) <= self.tolerance_grad)
        self.active = (finite & ~self.converged).nonzero()[0]
        self._new_search(self.active)

    def back(self, numbers: Array) -> Tensor:
        """A copy as a tensor on the device of the problems, floats in their dtype."""
        tensor = torch.from_numpy(numbers.copy())
        return tensor.to(self.start) if tensor.is_floating_point() else tensor.to(self.start.device)

    def _evaluate(self, theta: Array, indices: Array) -> tuple[Array, Array]:
        value, grad = self.value_and_grad(self.back(theta), self.back(indices))
        self.evaluations += 1
        if value.shape != indices.shape or grad.shape != theta.shape:
            fail(
                ShapeError,
                "ops.minimize_lbfgs",
                f"the objective must return values {indices.shape} and gradients {theta.shape}.",
                got=f"{tuple(value.shape)} and {tuple(grad.shape)}",
                fix="return one value and one gradient row for each row of theta",
            )
        both = torch.cat([value.detach().unsqueeze(-1), grad.detach()], -1).to("cpu", torch.float64).numpy()
        return both[:, 0], both[:, 1:]

    def _new_search(self, rows: Array) -> None:
        """Direction, slope and an open bracket for `rows`."""
        g = self.grad[rows]
        direction = -self.curvature.times(g, rows)
        slope = (direction * g).sum(-1)
        # A direction that rounding has turned uphill is replaced by steepest descent.
        bad = ~(slope < 0)  # so is one that is not finite
        if bad.any():
            direction[bad], slope[bad] = -g[bad], -(g[bad] * g[bad]).sum(-1)
            self.curvature.known[rows[bad]] = 0
        unscaled = self.curvature.known[rows] == 0
        self.direction[rows], self.slope[rows] = direction, slope
        self.t[rows] = np.where(unscaled, np.minimum(1.0 / np.abs(g).sum(-1), 1.0), 1.0)
        self.low[rows], self.high[rows] = 0.0, np.inf
        self.low_value[rows], self.low_slope[rows] = self.value[rows], slope
        self.trials[rows] = 0

    def step(self) -> None:
        """Try the current step length of every active problem, then accept it, shorten it or lengthen it."""
        rows = self.active
        t, direction = self.t[rows], self.direction[rows]
        theta = self.theta[rows] + t[:, None] * direction
        value, grad = self._evaluate(theta, rows)
        finite = np.isfinite(value) & np.isfinite(grad).all(-1)
        slope = (grad * direction).sum(-1)
        too_long = ~finite | (value > self.value[rows] + _ARMIJO * t * self.slope[rows])
        too_short = ~too_long & (slope < _WOLFE * self.slope[rows])
        self.trials[rows] += 1
        spent = self.trials[rows] >= _MAX_TRIALS
        accept = ~too_long & (~too_short | spent)
        if not accept.all():
            self._narrow(rows, t, value, slope, too_long & ~spent, too_short & ~spent, finite)
        # Out of trials without any decrease: the numbers allow no further progress along this line. Where a full step
        # promised next to none, that is what converging looks like.
        stuck = too_long & spent
        promised = -self.slope[rows] <= self.tolerance_change * np.maximum(np.abs(self.value[rows]), 1.0)
        self.converged[rows[stuck & promised]] = True
        kept = rows[accept]
        if kept.size > 0:
            self._accept(kept, theta[accept], value[accept], grad[accept])
        stop = self.converged | (self.iterations >= self.max_iterations)
        stop[rows[stuck]] = True
        self.active = rows[~stop[rows]]
        going = kept[~stop[kept]]
        if going.size > 0:
            self._new_search(going)

    def _narrow(
        self, rows: Array, t: Array, value: Array, slope: Array, too_long: Array, too_short: Array, finite: Array
    ) -> None:
        low, high = self.low[rows], self.high[rows]
        low_value, low_slope = self.low_value[rows], self.low_slope[rows]
        # Minimum of the parabola through the lower end (value and slope) and this point, kept inside the bracket.
        width = t - low
        bend = value - low_value - low_slope * width
        guess = low - 0.5 * low_slope * width**2 / bend
        inside = finite & (bend > 0) & np.isfinite(guess)
        shorter = np.clip(np.where(inside, guess, low + 0.5 * width), low + 0.1 * width, low + 0.6 * width)
        shorter = np.where(finite, shorter, low + 0.1 * width)
        longer = np.where(np.isfinite(high), 0.5 * (t + high), 2.0 * t)
        self.high[rows] = np.where(too_long, t, high)
        self.low[rows] = np.where(too_short, t, low)
        self.low_value[rows] = np.where(too_short, value, low_value)
        self.low_slope[rows] = np.where(too_short, slope, low_slope)
        self.t[rows] = np.where(too_long, shorter, np.where(too_short, longer, t))

    def _accept(self, rows: Array, theta: Array, value: Array, grad: Array) -> None:
        s, y = theta - self.theta[rows], grad - self.grad[rows]
        before = self.value[rows]
        scale = np.maximum(np.maximum(np.abs(before), np.abs(value)), 1.0)
        small = np.abs(before - value) <= self.tolerance_change * scale
        self.theta[rows], self.value[rows], self.grad[rows] = theta, value, grad
        self.iterations[rows] += 1
        self.trace[rows, self.iterations[rows]] = value
        self.converged[rows] = small | (np.abs(grad).max(-1, initial=0.0) <= self.tolerance_grad)
        curvature, length = (s * y).sum(-1), (y * y).sum(-1)
        useful = curvature > self.eps * length
        kept = rows[useful]
        if kept.size > 0:
            self.curvature.add(kept, s[useful], y[useful], curvature[useful], length[useful])

    def result(self) -> LBFGSResult:
        """The final state, with the trace cut to the longest run."""
        longest = int(self.iterations.max(initial=0)) + 1
        theta, value, grad, iterations = (self.back(v) for v in (self.theta, self.value, self.grad, self.iterations))
        trace = self.back(self.trace[:, :longest])
        return LBFGSResult(theta, value, grad, iterations, self.evaluations, self.back(self.converged), trace)


class _Matrix:
    """The inverse Hessian H of each problem, whole, and how many pairs went into it."""

    def __init__(self, p: int, d: int) -> None:
        self.parts = np.zeros((p, 2, d, d))  # M and N
        self.h = np.zeros((p, d, d))
        self.eye = np.eye(d)
        self.known = np.zeros(p, dtype=np.int64)

    def times(self, g: Array, rows: Array) -> Array:
        """H g for the problems `rows`."""
        product = (self.h[rows] @ g[:, :, None])[:, :, 0]
        new = self.known[rows] == 0
        if new.any():
            product[new] = g[new]
        return product

    def add(self, rows: Array, s: Array, y: Array, curvature: Array, length: Array) -> None:
        """One pair more for each of `rows`, with s'y and y'y."""
        new = rows[self.known[rows] == 0]
        if new.size > 0:
            self.parts[new, 0], self.parts[new, 1] = 0.0, self.eye
        parts, rho = self.parts[rows], (1.0 / curvature)[:, None, None]
        xy = (parts @ y[:, None, :, None])[:, :, :, 0]
        bend = xy @ y[:, :, None] * rho
        bend[:, 0] += 1.0
        # V'X V = X + s w' + w s'; the same for both matrices, but that M gains s s' / s'y
        w = (0.5 * bend * s[:, None, :] - xy) * rho
        change = s[:, None, :, None] * w[:, :, None, :]
        parts += change
        parts += change.transpose(0, 1, 3, 2)
        self.parts[rows] = parts
        self.h[rows] = parts[:, 0] + (curvature / length)[:, None, None] * parts[:, 1]
        self.known[rows] += 1


class _Pairs:
    """The last pairs (s, y) of each problem, the newest first, and how many there are."""

    def __init__(self, p: int, d: int, history: int) -> None:
        self.s, self.y = np.zeros((p, history, d)), np.zeros((p, history, d))
        self.gamma = np.ones(p)
        self.known = np.zeros(p, dtype=np.int64)

    def times(self, g: Array, rows: Array) -> Array:
        """H g for the problems `rows`."""
        most = int(self.known[rows].max(initial=0))
        if most == 0:
            return g.copy()
        s, y = self.s[rows, :most], self.y[rows, :most]
        old = np.arange(most) >= self.known[rows][:, None]
        if old.any():
            s[old], y[old] = 0.0, 0.0
        gamma, g = np.where(self.known[rows] == 0, 1.0, self.gamma[rows])[:, None, None], g[:, :, None]
        # With the newest pair first, R is the lower triangle of S'Y; empty slots get 1 on its diagonal.
        r = (s @ y.transpose(0, 2, 1)) * np.tri(most)
        curvature = r.diagonal(0, 1, 2)[:, :, None].copy()
        if int(self.known[rows].min()) < most:
            r += np.eye(most) * (curvature == 0)
        inverse = np.linalg.inv(r)
        a = inverse @ (s @ g)
        y_a = y.transpose(0, 2, 1) @ a
        b = inverse.transpose(0, 2, 1) @ (curvature * a + gamma * (y @ (y_a - g)))
        return (gamma * (g - y_a) + s.transpose(0, 2, 1) @ b)[:, :, 0]

    def add(self, rows: Array, s: Array, y: Array, curvature: Array, length: Array) -> None:
        """One pair more for each of `rows`, with s'y and y'y, in place of the oldest."""
        for pairs, newest in ((self.s, s), (self.y, y)):
            pairs[rows, 1:] = pairs[rows, :-1]
            pairs[rows, 0] = newest
        self.known[rows] = np.minimum(self.known[rows] + 1, self.s.shape[1])
        self.gamma[rows] = curvature / length
