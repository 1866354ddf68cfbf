r"""Hamiltonian dynamics with a Gaussian momentum: the metric, the leapfrog integrator and the accept decision.

With U(q) = -log density, p ~ N(0, M) and H = U(q) + p' M^{-1} p / 2, one leapfrog step of size eps is

    p <- p - eps/2 grad U(q);   q <- q + eps M^{-1} p;   p <- p - eps/2 grad U(q).

It is reversible, preserves volume, and its energy error is of order eps^2.

Reference: Neal (2011), MCMC using Hamiltonian dynamics, arXiv 1206.1901.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl.samplers._gradients import repeated
from bayesdl.samplers._repeated import pick
from bayesdl.samplers.base import ValueAndGrad

MAX_ENERGY_ERROR = 1000.0  # beyond it a trajectory counts as divergent


class Metric(NamedTuple):
    r"""An inverse mass matrix and its root, shared by the chains of a group.

    One of three kinds: diagonal, dense, or low-rank, which is a diagonal S^2 in whose unit U has orthonormal columns,

        M^{-1} = S (I + U (Lambda - I) U') S,    L = S (I + U (Lambda^{1/2} - I) U'),    M^{-1} = L L'.

    Directions that are wide or narrow beyond what a diagonal can express cost O(r D) a step instead of O(D^2).

    Attributes:
        inverse_mass: M^{-1}, an estimate of the covariance of the target: (*g, D) its diagonal, or (*g, D, D) dense. Of
            a low-rank metric S^2, (*g, D).
        root: Its elementwise square root, or its lower Cholesky factor.
        dense: Whether these are matrices.
        directions: S U of a low-rank metric, (*g, D, r), else None. Columns that are zero do nothing.
        stretch: The r eigenvalues in Lambda, above 0, (*g, r), else None.
    """

    inverse_mass: Tensor
    root: Tensor
    dense: bool
    directions: Tensor | None = None
    stretch: Tensor | None = None

    @property
    def kind(self) -> str:
        """Which of "diagonal", "dense" and "low-rank"."""
        if self.dense:
            return "dense"
        return "diagonal" if self.directions is None else "low-rank"

    def momentum(self, noise: Tensor) -> Tensor:
        """Momenta p ~ N(0, M), shape (*g, C, D), from standard normal noise that broadcasts to (*g, C, D)."""
        if self.dense:
            # With M^{-1} = L L', the momentum L^{-T} z has covariance (L L')^{-1} = M. As rows: p L = z'.
            noise = noise.expand(*self.root.shape[:-2], *noise.shape[-2:])
            return torch.linalg.solve_triangular(self.root, noise, upper=False, left=False)
        p = noise / self.root.unsqueeze(-2)
        if self.directions is None or self.stretch is None:
            return p
        return p + self._along(p, self.stretch.rsqrt()) / self.inverse_mass.unsqueeze(-2)

    def velocity(self, p: Tensor) -> Tensor:
        """M^{-1} p, shape (*g, C, D)."""
        if self.dense:
            return p @ self.inverse_mass
        v = p * self.inverse_mass.unsqueeze(-2)
        return v if self.stretch is None else v + self._along(p, self.stretch)

    def whiten(self, p: Tensor) -> Tensor:
        """L' p with M^{-1} = L L', shape (*g, C, D): standard normal where p ~ N(0, M), and L'a . L'b = a' M^{-1} b."""
        if self.dense:
            return p @ self.root
        r = p * self.root.unsqueeze(-2)
        if self.stretch is None:
            return r
        return r + self._along(p, self.stretch.sqrt()) / self.root.unsqueeze(-2)

    def whiten_positions(self, x: Tensor) -> Tensor:
        """L^{-1} x, shape (*g, C, D): of unit covariance where x has covariance M^{-1}, and |L^{-1} x|^2 = x' M x."""
        if self.dense:
            x = x.expand(*self.root.shape[:-2], *x.shape[-2:])
            return torch.linalg.solve_triangular(self.root, x.mT, upper=False).mT
        root = self.root.unsqueeze(-2)
        w = x / root
        return w if self.stretch is None else w + self._along(w / root, self.stretch.rsqrt()) / root

    def kinetic_energy(self, p: Tensor) -> Tensor:
        """p' M^{-1} p / 2, shape (*g, C), summed in float64."""
        if self.stretch is not None:  # a sum of squares: narrow directions do not cancel
            return 0.5 * self.whiten(p).square().sum(-1, dtype=torch.float64)
        return 0.5 * (p * self.velocity(p)).sum(-1, dtype=torch.float64)

    def variances(self) -> Tensor:
        """The diagonal of M^{-1}, (*g, D)."""
        if self.dense:
            return self.inverse_mass.diagonal(dim1=-2, dim2=-1)
        if self.directions is None or self.stretch is None:
            return self.inverse_mass
        return self.inverse_mass + (self.directions.square() * (self.stretch - 1).unsqueeze(-2)).sum(-1)

    def reported(self) -> Tensor:
        """What a run reports as its inverse mass: M^{-1}, (*g, D, D), or where that is not dense its diagonal."""
        return self.inverse_mass if self.dense else self.variances()

    def _along(self, p: Tensor, factors: Tensor) -> Tensor:
        """S U (factors - I) U' S p."""
        # A graph with a loop takes no view of what stays the same in it: the directions are not transposed.
        inside = (p @ self.directions) * (factors - 1).unsqueeze(-2)
        return (self.directions @ inside.mT).mT


class State(NamedTuple):
    """What the next transition needs: positions (*g, C, D), their log density (*g, C) and gradient (*g, C, D)."""

    q: Tensor
    log_density: Tensor
    grad: Tensor


class Parameters(NamedTuple):
    """What warm-up adapts: the step size, (*g, 1) or one per chain (*g, C), and the metric."""

    step_size: Tensor
    metric: Metric


def init(evaluate: ValueAndGrad, q: Tensor) -> State:
    """The state at q (*g, C, D). Cost: one gradient."""
    return State(q, *evaluate(q))


def diagonal_metric(inverse_mass: Tensor) -> Metric:
    """The metric of a diagonal inverse mass matrix with positive entries (*g, D)."""
    return Metric(inverse_mass, inverse_mass.sqrt(), dense=False)


def dense_metric(inverse_mass: Tensor) -> Metric:
    """The metric of a symmetric positive definite inverse mass matrix (*g, D, D). Cost: O(D^3) a group."""
    return Metric(inverse_mass, torch.linalg.cholesky(inverse_mass), dense=True)


def low_rank_metric(inverse_mass: Tensor, basis: Tensor, stretch: Tensor) -> Metric:
    """The low-rank metric of S^2 (*g, D), U (*g, D, r) with orthonormal or zero columns, and Lambda (*g, r)."""
    root = inverse_mass.sqrt()
    return Metric(inverse_mass, root, dense=False, directions=root.unsqueeze(-1) * basis, stretch=stretch)


def energy(log_density: Tensor, p: Tensor, metric: Metric) -> Tensor:
    """H = U + kinetic energy, shape (*g, C), in float64 whatever the dtype of the positions."""
    return metric.kinetic_energy(p) - log_density.double()


def leapfrog(
    evaluate: ValueAndGrad, q: Tensor, p: Tensor, grad: Tensor, step_size: Tensor, metric: Metric, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`num_steps` leapfrog steps, the half steps of the momentum between them merged: one gradient a step.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        q: Positions, (*g, C, D).
        p: Momenta, (*g, C, D).
        grad: Gradient of the log density at q, (*g, C, D).
        step_size: (*g, 1) for a step that the chains share, (*g, C) for one each.
        metric: Inverse mass matrix.
        num_steps: At least 1, the same for all chains.

    Returns:
        Positions, momenta, log density and gradient at the end.

    Cost: num_steps gradients and O(C D) a step besides, O(C D^2) with a dense and O(C D r) with a low-rank metric.
    """
    full = step_size.unsqueeze(-1)
    scaled = full * metric.inverse_mass.unsqueeze(-2) if metric.kind == "diagonal" else None
    carry = (q, torch.addcmul(p, full, grad, value=0.5), grad[..., 0], grad)
    constants = (full, 0.5 * full, scaled, metric)
    return repeated(evaluate, _leap, carry, constants, num_steps)


def _leap(evaluate: ValueAndGrad, carry: tuple[Tensor, ...], constants: Any, last: bool | Tensor) -> tuple[Tensor, ...]:
    """A drift and a kick; the last kick is half as long."""
    q, p, _, _ = carry
    full, half, scaled, metric = constants
    q = torch.addcmul(q, metric.velocity(p), full) if scaled is None else torch.addcmul(q, p, scaled)
    log_density, grad = evaluate(q)
    return q, torch.addcmul(p, pick(last, half, full), grad), log_density, grad


def leapfrog_path(
    evaluate: ValueAndGrad, q: Tensor, p: Tensor, grad: Tensor, step_size: Tensor, metric: Metric, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`leapfrog` with all the points on its way: positions, momenta, log density and gradient, each (num_steps, ...).

    A negative step size goes back in time. Arguments and cost are those of `leapfrog`.
    """
    full = step_size.unsqueeze(-1)
    apart = metric.kind == "diagonal"
    scaled = full * metric.inverse_mass.unsqueeze(-2) if apart else full
    p = torch.addcmul(p, full, grad, value=0.5)
    points = []
    for _ in range(num_steps):
        q = torch.addcmul(q, p if apart else metric.velocity(p), scaled)
        points.append((q, p, *evaluate(q)))
        p = torch.addcmul(p, full, points[-1][3])
    qs, halfway, log_densities, grads = (torch.stack(parts) for parts in zip(*points, strict=True))
    return qs, torch.addcmul(halfway, full, grads, value=0.5), log_densities, grads


class Decision(NamedTuple):
    """How the end of a trajectory was judged; tensors (*g, C)."""

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor


def metropolis(
    state: State, p: Tensor, end: State, p_end: Tensor, metric: Metric, uniform: Tensor
) -> tuple[State, Decision]:
    """Move to `end` with probability min(1, exp(H_start - H_end)), for each chain by its number `uniform` on [0, 1).

    An end whose energy is not finite, or has grown by more than 1000, is refused and counts as a divergence. A chain
    whose log density is not finite where it stands accepts any end where it is.
    """
    before, after = energy(state.log_density, p, metric), energy(end.log_density, p_end, metric)
    error = torch.where(before.isfinite(), after - before, -torch.inf)
    error = torch.where(after.isfinite(), error, torch.inf)
    acceptance_rate = torch.exp(-error).clamp(max=1.0)
    diverging = error > MAX_ENERGY_ERROR
    accepted = (uniform < acceptance_rate) & ~diverging
    mask = accepted.unsqueeze(-1)
    state = State(
        torch.where(mask, end.q, state.q),
        torch.where(accepted, end.log_density, state.log_density),
        torch.where(mask, end.grad, state.grad),
    )
    return state, Decision(acceptance_rate, accepted, diverging, torch.where(accepted, after, before))
