r"""Pathfinder: Gaussian approximations found on the way to a mode, for starts, metrics and quick looks.

L-BFGS climbs a log density from several starts at once. Its steps s and changes y of the gradient give, at every point
of a path, an estimate of the inverse Hessian as a diagonal plus a matrix of low rank,

    H = diag(a) + B C B',   B = [diag(a) Y, S],
    C = [[0, -E^-1], [-E^-T, E^-T (D + Y' diag(a) Y) E^-1]],

E the upper triangle and D the diagonal of S'Y, and so a Gaussian N(q + H grad, H). Of each path the one with the
largest evidence lower bound (ELBO) is kept: usually not at the mode, but where the mass is. Draws of all paths are then
weighted by p / (the mixture of the paths' Gaussians), with Pareto-smoothed weights.

References: Zhang, Carpenter, Gelman, Vehtari (2022), arXiv 2108.03782; Gilbert & Lemarechal (1989), equation 4.9, for
the diagonal; Owen & Zhou (2000), Safe and effective importance sampling, for the weights by the mixture.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, Streams, child_seeds, generator
from bayesdl.errors import NumericalError, ShapeError, fail
from bayesdl.ops.lbfgs import minimize_lbfgs
from bayesdl.samplers import _pareto
from bayesdl.samplers._reference import GaussianReference
from bayesdl.samplers.base import LogDensityFn, ValueAndGrad, check_initial, check_log_density, value_and_grad

__all__ = ["Approximation", "Fit", "run"]

_MEMORY = 2**23  # numbers in the largest tensor of a block of points on the paths


class Fit(NamedTuple):
    r"""Gaussians N(mean, R R'), R = diag(sqrt a) (I + Q (L - I) Q'), along any leading axes *p.

    Attributes:
        mean: (*p, D).
        diagonal: a, (*p, D).
        basis: Q with orthonormal columns, (*p, D, r), r at most twice the history.
        root: L, lower triangular, (*p, r, r); NaN where the estimate is not positive definite.
    """

    mean: Tensor
    diagonal: Tensor
    basis: Tensor
    root: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """mean + R u for standard normal numbers u (*p, K, D)."""
        inner = noise @ self.basis
        low_rank = (inner @ self.root.mT - inner) @ self.basis.mT
        return self.mean.unsqueeze(-2) + self.diagonal.sqrt().unsqueeze(-2) * (noise + low_rank)

    def log_prob(self, q: Tensor) -> Tensor:
        """Log density at q (*p, K, D), shape (*p, K)."""
        white = (q - self.mean.unsqueeze(-2)) / self.diagonal.sqrt().unsqueeze(-2)
        inner = white @ self.basis
        solved = torch.linalg.solve_triangular(self.root, inner.mT, upper=False).mT
        squares = white.square().sum(-1) - inner.square().sum(-1) + solved.square().sum(-1)
        return -0.5 * (squares + self.log_determinant().unsqueeze(-1) + q.shape[-1] * math.log(2 * math.pi))

    def log_determinant(self) -> Tensor:
        """Of the covariance, (*p)."""
        return self.diagonal.log().sum(-1) + 2 * self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def variance(self) -> Tensor:
        """Diagonal of the covariance, (*p, D)."""
        extra = self.root @ self.root.mT - torch.eye(self.root.shape[-1]).to(self.root)
        return self.diagonal * (1 + ((self.basis @ extra) * self.basis).sum(-1))

    def covariance(self) -> Tensor:
        """(*p, D, D)."""
        extra = self.root @ self.root.mT - torch.eye(self.root.shape[-1]).to(self.root)
        scale = self.diagonal.sqrt()
        inner = self.basis @ extra @ self.basis.mT + torch.eye(scale.shape[-1]).to(scale)
        return scale.unsqueeze(-1) * inner * scale.unsqueeze(-2)


class Approximation(NamedTuple):
    """What Pathfinder gives; P paths, S = P * num_draws candidates.

    Attributes:
        draws: Importance-resampled draws, (num_draws, D), repeats among them.
        candidates: Draws of the paths' Gaussians before resampling, (S, D).
        log_weights: Their smoothed log weights, normalised, (S); -inf for those of failed paths.
        khat: Shape of the tail of the weights: above 0.7 the approximation is no substitute for a sampler, though it
            may still serve for starts.
        log_evidence: Estimate of the log integral of exp(log_density), from the unsmoothed weights.
        elbo: ELBO of each path's Gaussian by its candidates, (P), the Gaussian cut to where the density is finite; -inf
            for a failed path.
        fit: The Gaussian of each path; leading axis P.
        weights: Share of each path in the importance weights, (P).
        point: Which point of its path each Gaussian belongs to, (P), of `num_points` (P), the start counted.
        num_gradients: Gradient evaluations per path (of the longest).
        num_evaluations: Evaluations of the log density alone, per path.
        seconds: Wall-clock time.
    """

    draws: Tensor
    candidates: Tensor
    log_weights: Tensor
    khat: float
    log_evidence: float
    elbo: Tensor
    fit: Fit
    weights: Tensor
    point: Tensor
    num_points: Tensor
    num_gradients: int
    num_evaluations: int
    seconds: float

    def starts(self, num_chains: int, seed: Seed = 0) -> Tensor:
        """Different candidates for chains to start from, (num_chains, D), drawn by weight without replacement.

        Where there are fewer candidates than chains, all of them once, and further ones again.
        """
        g = generator(seed, self.candidates.device)
        rows: list[Tensor] = []
        usable = int((self.log_weights > -torch.inf).sum())
        while sum(len(part) for part in rows) < num_chains:
            noise = torch.rand(len(self.log_weights), generator=g, dtype=torch.float64, device=self.candidates.device)
            keys = self.log_weights - noise.clamp(min=1e-300).log().neg().log()  # the largest with Gumbel noise added
            rows.append(keys.topk(min(usable, num_chains)).indices)
        return self.candidates[torch.cat(rows)[:num_chains]]

    def mean(self) -> Tensor:
        """Of the mixture of the paths' Gaussians by their weights, (D)."""
        return (self.weights.to(self.fit.mean).unsqueeze(-1) * self._safe(self.fit.mean)).sum(0)

    def inverse_mass(self, *, dense: bool = False) -> Tensor:
        """Covariance of the mixture: its diagonal (D), or the whole of it (D, D)."""
        weights = self.weights.to(self.fit.mean)
        between = self._safe(self.fit.mean) - self.mean()
        if dense:
            inside = self._safe(self.fit.covariance())
            return (weights[:, None, None] * inside).sum(0) + (weights.unsqueeze(-1) * between).T @ between
        return (weights.unsqueeze(-1) * (self._safe(self.fit.variance()) + between.square())).sum(0)

    def reference(self, widen: float = 1.5) -> GaussianReference:
        """A Gaussian of this mean and covariance, its standard deviations times `widen`, for `smc.run`."""
        covariance = self.inverse_mass(dense=True)
        return GaussianReference(self.mean(), widen * torch.linalg.cholesky(covariance))

    def _safe(self, x: Tensor) -> Tensor:
        """x (P, ...) with zeros for paths without weight, whose numbers may not be finite."""
        return torch.where(self.weights.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, 0.0)


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_draws: int = 1000,
    num_elbo_draws: int = 25,
    history: int = 10,
    max_iterations: int = 200,
    seed: Seed = 0,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Approximation:
    """Approximate the density exp(log_density) by Gaussians along L-BFGS paths, one from each row of `initial`.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (C, D) to (C).
        initial: Starts of the paths (P, D), scattered; they set dtype and device. Ten or so are good.
        num_draws: Draws to return, and candidates drawn from each path.
        num_elbo_draws: Draws that estimate the ELBO of each point; the same normal numbers along a path.
        history: Steps that make an inverse Hessian.
        max_iterations: Steps of a path at most.
        seed: Every path gets a stream of its own.
        chain_batch: Positions whose log density is evaluated at a time; all for None.
        compile: Send value and gradient through torch.compile.

    A path that starts where the log density is not finite, or nowhere has a finite ELBO, fails: it gets no weight.

    Raises:
        ShapeError, DtypeError: `initial` is no floating (P, D), or `log_density` gives no value per position.
        SettingError: A setting is out of range, or the log density carries no gradient.
        NumericalError: All paths failed.

    Cost: one gradient for each of the points that L-BFGS tries, `num_elbo_draws` densities and
    O(history D (history + num_elbo_draws)) for each point that it keeps, and P * num_draws densities.

    Reference: Zhang, Carpenter, Gelman, Vehtari (2022), arXiv 2108.03782, algorithms 1 to 4.
    """
    began = time.perf_counter()
    for name, value in (("num_draws", num_draws), ("num_elbo_draws", num_elbo_draws), ("history", history)):
        _checks.at_least("pathfinder.run", name, value, 1, integer=True)
    _checks.at_least("pathfinder.run", "max_iterations", max_iterations, 1, integer=True)
    check_initial("pathfinder.run", initial)
    if initial.ndim != 2:
        wanted = "initial must have shape (paths, dim)."
        fail(ShapeError, "pathfinder.run", wanted, got=str(tuple(initial.shape)), fix="a loop over groups")
    q = initial.detach()
    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    check_log_density("pathfinder.run", evaluate.log_density, q)
    elbo_seed, draw_seed, pick_seed = child_seeds(seed, 3)
    path = _climb(evaluate, q, history, max_iterations)
    noise = Streams(elbo_seed, len(q), q.device).normal(num_elbo_draws, q.shape[-1], like=q)

    def density(x: Tensor) -> Tensor:
        with torch.no_grad():
            value = evaluate.log_density(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1]).double()
        return torch.where(value.isfinite(), value, -torch.inf)

    best, point = _best_points(density, path, noise, history)
    candidates = best.draw(Streams(draw_seed, len(q), q.device).normal(num_draws, q.shape[-1], like=q))
    log_p = density(candidates)
    elbo = torch.where(path.alive, _elbo(log_p, best.log_prob(candidates).double()), -torch.inf)
    log_weight, num_usable = _mixture_weights(best, candidates, log_p, path.alive)
    flat = candidates.reshape(-1, q.shape[-1])
    smoothed, khat = _pareto.smooth(log_weight.flatten())
    picks = torch.multinomial(smoothed.exp(), num_draws, replacement=True, generator=generator(pick_seed, q.device))
    return Approximation(
        draws=flat[picks],
        candidates=flat,
        log_weights=smoothed,
        khat=khat,
        log_evidence=float(log_weight.flatten().logsumexp(0) - math.log(num_usable * num_draws)),
        elbo=elbo,
        fit=best,
        weights=smoothed.exp().reshape(log_weight.shape).sum(-1),
        point=point,
        num_points=path.length + 1,
        num_gradients=path.num_gradients,
        num_evaluations=int(path.length.max() + 1) * num_elbo_draws + num_draws,
        seconds=time.perf_counter() - began,
    )


class _Path(NamedTuple):
    """Points q (P, T, D) of the paths with gradients of the log density, T the longest; `length` (P) steps each."""

    q: Tensor
    grad: Tensor
    length: Tensor
    alive: Tensor
    num_gradients: int


def _climb(evaluate: ValueAndGrad, initial: Tensor, history: int, max_iterations: int) -> _Path:
    """L-BFGS on -log density from every start; all points that it accepted."""
    paths, dim = initial.shape
    q, grad = (initial.new_zeros(paths, max_iterations + 1, dim) for _ in range(2))
    last_q, last_grad = initial.clone(), torch.zeros_like(initial)
    known = torch.zeros(paths, dtype=torch.int64, device=initial.device)
    started: list[Tensor] = []

    def objective(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value, slope = evaluate(theta)
        last_q[rows], last_grad[rows] = theta, slope
        if not started:
            started.append(value.isfinite())
            q[:, 0], grad[:, 0] = theta, slope
        return -value, -slope

    def keep(iterations: Tensor, values: Tensor) -> None:
        # a step was accepted where the count went up, and then the point tried last is the new one
        rows = (iterations > known).nonzero()[:, 0]
        q[rows, iterations[rows]], grad[rows, iterations[rows]] = last_q[rows], last_grad[rows]
        known.copy_(iterations)

    found = minimize_lbfgs(
        objective,
        initial,
        max_iterations=max_iterations,
        history=history,
        tolerance_grad=1e-8,
        tolerance_change=1e-13,
        callback=keep,
    )
    longest = int(known.max()) + 1
    return _Path(q[:, :longest], grad[:, :longest], known, started[0], found.evaluations)


def _best_points(density: LogDensityFn, path: _Path, noise: Tensor, history: int) -> tuple[Fit, Tensor]:
    """Of each path the Gaussian with the largest ELBO, and the number of its point."""
    paths, points, dim = path.q.shape
    steps = path.q[:, 1:] - path.q[:, :-1]
    turns = path.grad[:, :-1] - path.grad[:, 1:]
    curvature, length = (steps * turns).sum(-1), turns.square().sum(-1)
    exists = torch.arange(1, points, device=path.q.device) <= path.length.unsqueeze(-1)
    useful = exists & (curvature > 1e-12 * length) & curvature.isfinite() & length.isfinite()
    diagonal = _diagonals(steps, turns, useful)
    rank = torch.cat([torch.zeros_like(path.length).unsqueeze(-1), useful.cumsum(-1)], -1)
    best_elbo = torch.full((paths,), -torch.inf, dtype=torch.float64, device=path.q.device)
    best, best_point = None, torch.zeros_like(path.length)
    block = max(1, _MEMORY // (paths * dim * max(2 * history, noise.shape[-2])))
    for first in range(0, points, block):
        at = torch.arange(first, min(first + block, points), device=path.q.device)
        s, y = (_recent(x, rank, at, history) for x in (steps, turns))
        fit = _gaussians(path.q[:, at], path.grad[:, at], diagonal[:, at], s, y)
        x = fit.draw(noise.unsqueeze(1))
        elbo = _elbo(density(x), fit.log_prob(x).double())
        elbo = torch.where(at <= path.length.unsqueeze(-1), elbo, -torch.inf)
        top, place = elbo.max(-1)
        chosen = Fit(*(part[torch.arange(paths, device=place.device), place] for part in fit))
        better = top > best_elbo
        best = chosen if best is None else Fit(*(_where(better, a, b) for a, b in zip(chosen, best, strict=True)))
        best_elbo, best_point = torch.where(better, top, best_elbo), torch.where(better, at[place], best_point)
    assert best is not None
    return best, best_point


def _elbo(log_p: Tensor, log_q: Tensor) -> Tensor:
    """ELBO from draws (*p, K) of q; where p has no density at some of them, that of q cut to the rest, (*p)."""
    inside = log_p > -torch.inf
    count = inside.sum(-1)
    total = torch.where(inside, log_p - log_q, 0.0).sum(-1)
    return (total / count + (count / inside.shape[-1]).log()).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _diagonals(steps: Tensor, turns: Tensor, useful: Tensor) -> Tensor:
    r"""The diagonal a (P, T, D) at every point: the diagonal of a BFGS update of diag(a), step after step.

    1/a' = (y'Ay / y's) / a + y^2 / y's - (y'Ay / (y's s'A^-1 s)) (s / a)^2, elementwise, A = diag(a); a starts at 1.
    """
    a = torch.ones_like(steps[:, 0]) if steps.shape[1] else steps.new_ones(steps.shape[0], steps.shape[2])
    found = [a]
    for t in range(steps.shape[1]):
        s, y = steps[:, t], turns[:, t]
        yay, ys, sas = (y * a * y).sum(-1, True), (y * s).sum(-1, True), (s * s / a).sum(-1, True)
        inverse = yay / (ys * a) + y * y / ys - yay / (ys * sas) * (s / a).square()
        fine = (useful[:, t].unsqueeze(-1) & inverse.isfinite() & (inverse > 0)).all(-1, keepdim=True)
        a = torch.where(fine, 1 / inverse, a)
        found.append(a)
    return torch.stack(found, 1)


def _recent(x: Tensor, rank: Tensor, at: Tensor, history: int) -> Tensor:
    """The last useful rows of x (P, T - 1, D) before each of the points `at`, oldest first: (P, points, history, D).

    `rank` (P, T) counts the useful ones before a point; slots without one hold zeros.
    """
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], len(at), history, x.shape[2])
    wanted = rank[:, at].unsqueeze(-1) - history + torch.arange(1, history + 1, device=x.device)
    rows = torch.searchsorted(rank[:, 1:].contiguous(), wanted.flatten(1).clamp(min=1)).clamp(max=x.shape[1] - 1)
    picked = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[2])).reshape(*wanted.shape, x.shape[2])
    return torch.where((wanted > 0).unsqueeze(-1), picked, 0.0)


def _gaussians(q: Tensor, grad: Tensor, a: Tensor, s: Tensor, y: Tensor) -> Fit:
    """The Gaussians at points q (*p, D) from their diagonals a (*p, D) and pairs s, y (*p, history, D)."""
    history = s.shape[-2]
    products = s @ y.mT
    curvature = products.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(history).to(q)
    # an empty slot has zeros, and a one on the diagonal of E keeps that invertible
    upper = products.triu() + torch.diag_embed((curvature == 0).to(q))
    inverse = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    ay = a.unsqueeze(-2) * y
    corner = inverse.mT @ (torch.diag_embed(curvature) + ay @ y.mT) @ inverse
    middle = torch.cat(
        [torch.cat([torch.zeros_like(eye).expand_as(inverse), -inverse], -1), torch.cat([-inverse.mT, corner], -1)], -2
    )
    columns = torch.cat([ay, s], -2)
    moved = a * grad + ((grad.unsqueeze(-2) @ columns.mT) @ middle @ columns).squeeze(-2)
    basis, triangle = torch.linalg.qr((columns / a.sqrt().unsqueeze(-2)).mT.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    inner = triangle @ middle @ triangle.mT + torch.eye(basis.shape[-1]).to(q)
    root, info = torch.linalg.cholesky_ex(0.5 * (inner + inner.mT).nan_to_num(nan=-1.0))
    root = torch.where((info == 0)[..., None, None], root, torch.nan)
    return Fit(q + moved, a, basis, root)


def _mixture_weights(fit: Fit, candidates: Tensor, log_p: Tensor, alive: Tensor) -> tuple[Tensor, int]:
    """log p - log of the equal mixture of the usable paths' Gaussians, at every candidate (P, K), and their number.

    A path is unusable, and its candidates have weight 0, where it never started, where all of its candidates lie
    outside the support, or where its Gaussian is none.
    """
    usable = alive & (log_p > -torch.inf).any(-1) & fit.root.isfinite().all(-1).all(-1)
    rows = usable.nonzero()[:, 0].tolist()
    if not rows:
        fail(
            NumericalError,
            "pathfinder.run",
            "one path at least must find a Gaussian on which log_density is finite.",
            got=f"{len(usable)} paths that failed",
            fix="other initial positions, or look for overflow",
        )
    flat = candidates.reshape(-1, candidates.shape[-1])
    log_q = torch.stack([Fit(*(part[row] for part in fit)).log_prob(flat).double() for row in rows])
    weight = log_p - (log_q.logsumexp(0) - math.log(len(rows))).reshape(log_p.shape)
    return torch.where(usable.unsqueeze(-1) & weight.isfinite(), weight, -torch.inf), len(rows)
