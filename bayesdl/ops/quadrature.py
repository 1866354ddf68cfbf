r"""Integrals over the logarithm of a positive variable, for a batch of one-dimensional problems at once.

    int_0^inf p(v) dv = int exp(g(u)) du,    g(u) = log p(e^u) + u  ~  h sum_k exp(g(u_k))

For integrands that are analytic near the real line and die away on both sides, equal steps (the trapezoid rule)
converge faster than any power of h. What takes care is where to put them: around the mode, as far out as the integrand
matters, and farther on the side where it dies away slowly.

Reference: Trefethen, Weideman (2014), "The exponentially convergent trapezoidal rule", SIAM Review 56.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import NumericalError, fail

_REACH = 32.0  # the mode is sought this far from the centre, in log v
_COARSE, _FINE, _ZOOMS = 129, 17, 4
_DROP = 37.0  # nats below the mode at which the integrand is let go: exp(-37) = 1e-16
_DISTANCES = 64


class LogNodes(NamedTuple):
    """Nodes and weights for one integral per batch element.

    Attributes:
        u: (*b M) nodes in the logarithm, constants of any graph.
        log_weight: (*b M) log of each node's share h exp(g(u)) of the integral, normalised to sum to 1.
        log_total: (*b) log of the integral.
    """

    u: Tensor
    log_weight: Tensor
    log_total: Tensor


def log_nodes(log_integrand: Callable[[Tensor], Tensor], centre: Tensor, num_nodes: int) -> LogNodes:
    """Place nodes for int exp(g(u)) du and evaluate it; differentiable in what g depends on.

    Args:
        log_integrand: g, from u (*b J) to (*b J), elementwise in its last axis; with one mode within 32 of `centre`.
        centre: (*b) a guess of the mode.
        num_nodes: M. A step as wide as the standard deviation of a Gaussian integrand leaves an error of 5e-9, half of
            it 1e-16 or so.

    Raises:
        NumericalError: g is nowhere finite, or the integral does not converge.

    Cost: about 330 + M evaluations of g for each batch element.

    The nodes follow the parameters of g only through their values, not through the graph: the sum does not depend on
    where the nodes lie beyond its own error, so gradients taken at fixed nodes are as exact as the sum.
    """
    with torch.no_grad():
        mode, top, width = _mode(log_integrand, centre)
        low, high = (_edge(log_integrand, mode, top, width, side) for side in (-1.0, 1.0))
        steps = torch.linspace(0.0, 1.0, num_nodes, dtype=centre.dtype, device=centre.device)
        u = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
        log_step = ((high - low) / max(num_nodes - 1, 1)).log()
    value = log_integrand(u) + log_step.unsqueeze(-1)
    log_total = torch.logsumexp(value, -1)
    return LogNodes(u, value - log_total.unsqueeze(-1), log_total)


def _mode(g: Callable[[Tensor], Tensor], centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u, g(u), how finely u is known) at the largest value, by a coarse grid and ever finer ones around its best."""
    mode, half = centre, torch.full_like(centre, _REACH)
    for level in range(_ZOOMS + 1):
        offsets = torch.linspace(-1.0, 1.0, _COARSE if level == 0 else _FINE, dtype=centre.dtype, device=centre.device)
        u = mode.unsqueeze(-1) + half.unsqueeze(-1) * offsets
        value = g(u).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        top, place = value.max(-1)
        mode = u.gather(-1, place.unsqueeze(-1)).squeeze(-1)
        half = half * (2.0 / (len(offsets) - 1))
    if not bool(torch.isfinite(top).all()):
        wanted = "the density of the scale must be finite and above 0 somewhere near the data's own scale."
        fix = "check the log density, or scale the kernel so that sigma^2 is of the order of 1"
        fail(NumericalError, "ops.log_nodes", wanted, got=f"log density {float(top.min())!r} at its largest", fix=fix)
    return mode, top, half


def _edge(g: Callable[[Tensor], Tensor], mode: Tensor, top: Tensor, width: Tensor, side: float) -> Tensor:
    """How far the integrand matters on one side: the first of a geometric row of distances beyond all that do."""
    exponents = torch.linspace(-14.0, 8.0, _DISTANCES, dtype=mode.dtype, device=mode.device)
    distances = torch.exp2(exponents)
    value = g(mode.unsqueeze(-1) + side * distances).nan_to_num(nan=-torch.inf)
    matters = value > (top - _DROP).unsqueeze(-1)
    count = _DISTANCES - matters.flip(-1).int().argmax(-1)  # one past the last that matters
    count = torch.where(matters.any(-1), count, torch.zeros_like(count))
    if bool((count >= _DISTANCES).any()):
        wanted = "the scale given the data must have a proper distribution."
        got = "a density that does not die away in log sigma^2"
        fail(NumericalError, "ops.log_nodes", wanted, got=got, fix="use a prior with an integrable density")
    return mode + side * distances[count]
