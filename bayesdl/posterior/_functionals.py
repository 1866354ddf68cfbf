r"""What can be asked of a completed data set: moments and quantiles of y, and parameters that minimise a loss.

    theta(F) = argmin_theta  E_F[loss(theta, x, y)],    F the empirical distribution of n observed and N drawn points

Every function takes x (*c, N, d) and y (*c, N) or (*c, N, k), and returns (*c, ...).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bayesdl import _checks, ops
from bayesdl.errors import ConvergenceWarning, DataError, SettingError, ShapeError, fail

Functional = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
NAMES = ("mean", "median", "quantile", "linear", "logistic")
_RIDGE = 1e-6  # so that separable classes have a finite slope


def named(where: str, what: str | Functional, level: float | None) -> Functional:
    """The functional that `what` names, or `what` itself."""
    if level is not None and what != "quantile":
        fail(SettingError, where, "level belongs to 'quantile'.", got=f"{what!r}, level={level!r}", fix="leave it out")
    if callable(what):
        return what
    _checks.choice(where, "what", what, NAMES)
    if what == "quantile":
        _checks.inside(where, "level", level, 0.0, 1.0)
        return lambda x, y: _over_points(x, y).quantile(level, -1)
    return {"mean": _mean, "median": _median, "linear": linear, "logistic": logistic}[what]


def _over_points(x: Tensor, y: Tensor) -> Tensor:
    """y with its points last: (*c, N) or (*c, k, N)."""
    return y if y.ndim == x.ndim - 1 else y.movedim(-2, -1)


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return _over_points(x, y).mean(-1)


def _median(x: Tensor, y: Tensor) -> Tensor:
    return _over_points(x, y).quantile(0.5, -1)


def linear(x: Tensor, y: Tensor) -> Tensor:
    """Intercept and slopes of least squares, (*c, 1 + d) or (*c, k, 1 + d); the shortest where they are not unique."""
    centre, spread = x.mean(-2, keepdim=True), x.std(-2, correction=0, keepdim=True)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    columns = torch.cat([torch.ones_like(x[..., :1]), (x - centre) / spread], -1)
    targets = y.unsqueeze(-1) if y.ndim == x.ndim - 1 else y
    found = (torch.linalg.pinv(columns) @ targets).mT  # (*c, k, 1 + d)
    found = _uncentred(found, centre, spread)
    return found.squeeze(-2) if y.ndim == x.ndim - 1 else found


def logistic(x: Tensor, y: Tensor) -> Tensor:
    """Intercept and slopes (*c, 1 + d) of logistic regression for labels 0 and 1, with a ridge of 1e-6 on the slopes
    of standardised columns, which keeps them finite where a plane separates the classes."""
    if y.ndim != x.ndim - 1:
        fail(ShapeError, "functional", "'logistic' takes one target column.", got=_checks.describe(y), fix="y (n,)")
    if not bool(((y == 0) | (y == 1)).all()):
        wanted = "'logistic' is for labels 0 and 1."
        fail(DataError, "functional", wanted, got=f"y from {float(y.min())} to {float(y.max())}", fix="what='linear'")
    centre, spread = x.mean(-2, keepdim=True), x.std(-2, correction=0, keepdim=True)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = theta[..., :1] + (x @ theta[..., 1:].unsqueeze(-1)).squeeze(-1)
        ridge = _RIDGE * theta[..., 1:].square().sum(-1, keepdim=True)
        return binary_cross_entropy_with_logits(logits, y, reduction="none") + ridge

    start = x.new_zeros(1 + x.shape[-1])
    found = minimiser(loss, start)((x - centre) / spread, y)
    return _uncentred(found.unsqueeze(-2), centre, spread).squeeze(-2)


def _uncentred(theta: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """From coefficients (*c, k, 1 + d) of (x - centre) / spread to those of x."""
    slopes = theta[..., 1:] / spread
    return torch.cat([theta[..., :1] - (slopes * centre).sum(-1, keepdim=True), slopes], -1)


def minimiser(loss: Loss, start: Tensor, *, max_iterations: int = 200) -> Functional:
    """The functional argmin_theta of the mean of loss(theta (*c, p), x, y) -> (*c, N), by L-BFGS from `start` (p).

    All data sets are solved as one batch, with gradients by automatic differentiation.

    Warns:
        ConvergenceWarning: Some data sets had not converged after `max_iterations`.
    """

    def functional(x: Tensor, y: Tensor) -> Tensor:
        head = x.shape[:-2]
        x, y = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[len(head) :])
        dtype = torch.float64

        def objective(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                theta = theta.detach().requires_grad_(True)
                each = loss(theta, x[rows].to(dtype), y[rows].to(dtype))
                if each.shape != (len(rows), x.shape[-2]):
                    wanted = f"loss must return {(len(rows), x.shape[-2])}, one number a data set and point."
                    fail(ShapeError, "minimise", wanted, got=str(tuple(each.shape)), fix="leave out the mean")
                value = each.mean(-1)
                (grad,) = torch.autograd.grad(value.sum(), theta)
            return value.detach(), grad

        theta = start.to(x.device, dtype).expand(x.shape[0], -1)
        result = ops.minimize_lbfgs(objective, theta, max_iterations=max_iterations)
        lost = int((~result.converged).sum())
        if lost:
            message = f"minimise: {lost} of {len(theta)} data sets had not converged after {max_iterations} iterations"
            warnings.warn(message, ConvergenceWarning, stacklevel=4)
        return result.theta.to(x.dtype).reshape(*head, -1)

    return functional
