r"""Microcanonical dynamics: a particle of unit speed that is steered, not accelerated, by the gradient.

In coordinates x = L^{-1} q whitened by a metric M^{-1} = L L', a unit velocity u and the force g = L' grad log density,

    q' = L u,    u' = (I - u u') g / (D - 1),

leaves density(q) times the uniform law of u on the sphere invariant. The velocity alone can be solved exactly: over a
time t at a fixed force, with e = g / |g| and s = t |g| / (D - 1),

    u <- (u + e (sinh s + (e.u)(cosh s - 1))) / (cosh s + (e.u) sinh s),

and this shrinks the volume of the sphere by (cosh s + (e.u) sinh s)^{D-1}, the change of the kinetic energy being its
logarithm. An integrator alternates such kicks with drifts of q; its energy error, the sum of the kinetic changes plus
the change of -log density, vanishes for the exact flow, and exp(-error) is the Metropolis ratio. Everything here is
batched over chains and groups, and needs two coordinates at least.

References: Robnik, De Luca, Silverstein & Seljak (2022), arXiv 2212.08549; Robnik & Seljak (2023), arXiv 2303.18221;
the volume is derived in Robnik, Cohn-Gordon & Seljak (2025), arXiv 2503.01707. Minimal norm: McLachlan (1995).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail
from bayesdl.samplers._gradients import repeated
from bayesdl.samplers._repeated import pick
from bayesdl.samplers.adaptation import pool_step_sizes
from bayesdl.samplers.base import ValueAndGrad
from bayesdl.samplers.hamiltonian import MAX_ENERGY_ERROR, Metric


class Scheme(NamedTuple):
    """A symmetric splitting: kick[0], drift[0], kick[1], drift[1], ..., kick[-1], in fractions of the step."""

    kicks: tuple[float, ...]
    drifts: tuple[float, ...]

    @property
    def num_gradients(self) -> int:
        """Gradients a step; the last kick of a step shares its gradient with the first of the next."""
        return len(self.drifts)


_MINIMAL = 0.1931833275037836  # the root of the cubic that makes the leading error of the splitting smallest
SCHEMES = {
    "minimal-norm": Scheme((_MINIMAL, 1 - 2 * _MINIMAL, _MINIMAL), (0.5, 0.5)),
    "leapfrog": Scheme((0.5, 0.5), (1.0,)),
}


class Point(NamedTuple):
    """Positions (*g, C, D), whitened unit velocities (*g, C, D), log density (*g, C) and its gradient (*g, C, D)."""

    q: Tensor
    velocity: Tensor
    log_density: Tensor
    grad: Tensor


def check_dimension(where: str, initial: Tensor) -> None:
    """Refuse a single coordinate: a unit velocity on the line has nowhere to turn."""
    if isinstance(initial, Tensor) and initial.ndim and initial.shape[-1] == 1:
        fail(
            ShapeError,
            where,
            "a microcanonical sampler needs two coordinates at least, for its velocity can only turn.",
            got=f"initial of shape {tuple(initial.shape)}",
            fix="samplers.nuts or samplers.hmc for one coordinate, or add an independent standard normal one",
        )


def unit(direction: Tensor) -> Tensor:
    """The direction scaled to length 1; a zero vector stays zero, so that no NaN arises."""
    return direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp(min=1e-30)


def refresh(velocity: Tensor, noise: Tensor, step_size: Tensor, length: Tensor) -> Tensor:
    """Forget part of the direction: unit(u + nu z) with nu^2 = (exp(2 eps / L) - 1) / D.

    Args:
        velocity: Unit velocities u, (*g, C, D).
        noise: Standard normal numbers z that broadcast to (*g, C, D).
        step_size: eps, (*g, 1) or (*g, C).
        length: L, the distance over which a direction is forgotten, (*g, 1) or (*g, C); infinity keeps it for good.
    """
    # beyond 350 lengths a step the old direction is gone in any case, and the exponential would overflow
    scale = (torch.expm1((2 * step_size / length).clamp(max=700.0)) / velocity.shape[-1]).sqrt()
    return unit(velocity + scale.unsqueeze(-1) * noise)


def kick(velocity: Tensor, grad: Tensor, time: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Turn unit velocities (*g, C, D) for a `time` (*g, 1) or (*g, C) by the force of `grad`.

    Returns:
        The velocities, and the change of the kinetic energy (*g, C) in float64.

    With z = exp(-s) and c = e.u the formulas above read without overflow: (1 + c) + (1 - c) z^2 is 2 z (cosh s + c sinh
    s). The velocity is scaled to unit length at once, which divides by that and keeps rounding from adding up.
    """
    velocity, logarithm = _turn(velocity, metric.whiten(grad), time.unsqueeze(-1))
    return velocity, (velocity.shape[-1] - 1) * (logarithm.squeeze(-1) - math.log(2))


def _turn(velocity: Tensor, force: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """`kick` for a time (*g, C, 1), with log(2 (cosh s + c sinh s)), (*g, C, 1), instead of the kinetic change."""
    strength = torch.linalg.vector_norm(force, dim=-1, keepdim=True, dtype=torch.float64).clamp(min=1e-300)
    along = ((force * velocity).sum(-1, keepdim=True, dtype=torch.float64) / strength).clamp(-1.0, 1.0)
    s = strength * (time / (velocity.shape[-1] - 1))
    z = torch.exp(-s)
    lost = 1 - z
    below = torch.addcmul(1 + along, 1 - along, z * z).clamp(min=1e-300)
    share = torch.addcmul(1 + z, along, lost) * lost / strength
    turned = torch.addcmul((2 * z).to(velocity) * velocity, share.to(velocity), force)
    return unit(turned), below.log() + s


def integrate(
    evaluate: ValueAndGrad, point: Point, step_size: Tensor, metric: Metric, num_steps: int, scheme: Scheme
) -> tuple[Point, Tensor]:
    """`num_steps` steps of the scheme, neighbouring kicks merged (they share a force, so their times add).

    To go back, integrate from the end with the velocity reversed.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        point: Where the chains are.
        step_size: (*g, 1) for a step that the chains share, (*g, C) for one each; 0 stands still.
        metric: Whitens the positions.
        num_steps: At least 1, the same for all chains.
        scheme: One of `SCHEMES`.

    Returns:
        The end, and the change of the kinetic energy on the way, (*g, C) in float64.

    Cost: num_steps * scheme.num_gradients gradients and O(C D) for each besides, O(C D^2) with a dense metric.
    """
    q, velocity, log_density, grad = point
    first, *kicks = scheme.kicks
    full = step_size.unsqueeze(-1)
    velocity, logarithm = _turn(velocity, metric.whiten(grad), first * full)
    parts = tuple((drift * full, part * full) for drift, part in zip(scheme.drifts, kicks, strict=True))
    constants = (parts, (kicks[-1] + first) * full, metric)
    *end, logarithm = repeated(evaluate, _stages, (q, velocity, log_density, grad, logarithm), constants, num_steps)
    turns = 1 + num_steps * len(parts)
    kinetic = (q.shape[-1] - 1) * (logarithm.squeeze(-1) - turns * math.log(2))
    return Point(*end), kinetic


def _stages(
    evaluate: ValueAndGrad, carry: tuple[Tensor, ...], constants: Any, last: bool | Tensor
) -> tuple[Tensor, ...]:
    """One step: drifts and kicks in turn; but for the last step, the last kick is merged with the first of the next."""
    q, velocity, log_density, grad, logarithm = carry
    parts, merged, metric = constants
    for i, (drift, part) in enumerate(parts):
        q = torch.addcmul(q, drift, rate(velocity, metric))
        log_density, grad = evaluate(q)
        time = part if i < len(parts) - 1 else pick(last, part, merged)
        velocity, change = _turn(velocity, metric.whiten(grad), time)
        logarithm = logarithm + change
    return q, velocity, log_density, grad, logarithm


def rate(velocity: Tensor, metric: Metric) -> Tensor:
    """L u, the rate of change of the positions, (*g, C, D), for whitened velocities u."""
    if metric.kind == "diagonal":
        return velocity * metric.root.unsqueeze(-2)
    if metric.dense:
        return (metric.root @ velocity.mT).mT  # a graph with a loop takes no view of what stays the same in it
    return metric.velocity(metric.momentum(velocity))  # L L' L^{-T} u


def energy_error(start: Tensor, end: Tensor, kinetic: Tensor) -> Tensor:
    """The energy error (*g, C) in float64 from the log densities at both ends and the kinetic change.

    -inf for a chain whose log density is not finite where it stands, which may take any way out, and inf for one that
    would leave finite values.
    """
    error = kinetic - (end.double() - start.double())
    error = torch.where(start.isfinite(), error, -torch.inf)
    return torch.where(end.isfinite() & ~error.isnan(), error, torch.inf)


def find_step_size(
    evaluate: ValueAndGrad, point: Point, metric: Metric, step_size: Tensor, tolerance: float, scheme: Scheme
) -> tuple[Tensor, int]:
    """Step sizes of the right order (*g, C): each doubles or halves until the error of one step crosses `tolerance`.

    The search starts from `step_size`, (*g, C) or (*g, 1). A chain whose log density is not finite yet takes the
    geometric mean of the others.

    Returns:
        The step sizes and the number of gradients spent (per chain). At most 50 factors of two.
    """
    counts = active = growing = point.log_density.isfinite()
    step_size = step_size.expand_as(point.log_density)
    spent = 0
    for trial in range(51):
        end, kinetic = integrate(evaluate, point, step_size, metric, 1, scheme)
        spent += scheme.num_gradients
        small = energy_error(point.log_density, end.log_density, kinetic).abs() < tolerance
        growing = small if trial == 0 else growing
        active = active & (small == growing)
        if not bool(active.any()):
            break
        step_size = torch.where(active, torch.where(growing, step_size * 2, step_size / 2), step_size)
    return torch.where(counts, step_size, pool_step_sizes(step_size, counts)), spent


def diverges(error: Tensor) -> Tensor:
    """Whether an energy error (*g, C) makes a step unusable: not finite, or larger than 1000 either way."""
    return (error > MAX_ENERGY_ERROR) | ((error < -MAX_ENERGY_ERROR) & error.isfinite())
