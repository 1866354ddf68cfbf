r"""Evidence lower bounds with inducing points, their gradients by recomputed tiles, and the natural gradient of q.

Everything is a sum over data points, taken over tiles of rows: a tile's covariances with the inducing points are
formed, used and thrown away, so that no (m, n) matrix and no graph through one ever exists. Gradients go back through
the tile to the hyper-parameters and the inducing points, and through the Cholesky factor of K_mm once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl.inference._expectations import Expected
from bayesdl.models import GP, Layout

Values = dict[str, Tensor]
Rows = slice | Tensor

JITTER = 1e-8  # relative to the mean prior variance at the inducing points
_TILE = 2**19  # numbers in one tile: 4 MB in float64, which a core's cache can hold


class InducingProblem(NamedTuple):
    """P independent problems: data sets times target columns, each with its own hyper-parameters and inducing points.

    Attributes:
        model: The Gaussian process.
        layout: How its hyper-parameters lie in a vector.
        x: (sets n d), standardised.
        y: (P n), P = sets * columns.
        latents: Latent functions of each problem, L: one, or one for each class.
    """

    model: GP
    layout: Layout
    x: Tensor
    y: Tensor
    latents: int

    @property
    def num_data(self) -> int:
        """Points in each data set, n."""
        return self.x.shape[-2]

    def inputs(self, which: Tensor, rows: Rows) -> Tensor:
        """Inputs of the problems `which` (A), (A B d)."""
        columns = self.y.shape[0] // self.x.shape[0]
        return self.x[:, rows][which // columns]

    def tiles(self, num_problems: int, m: int, rows: Tensor | None = None) -> Iterator[Rows]:
        """All rows, or those given, in pieces whose covariances with m inducing points fit one tile."""
        step = max(16, _TILE // max(1, num_problems * m * self.latents))
        if rows is not None:
            yield from rows.split(step)
        else:
            yield from (slice(i, i + step) for i in range(0, self.num_data, step))


class Point(NamedTuple):
    """Hyper-parameters and inducing points read from a vector, cut loose from it: tiles are pulled back alone.

    Attributes:
        vector: (A D) the leaf that gradients end at: theta, then z.
        attached: What was computed from it: factor, z, constant and the values in order.
        factor: L with L L' = K_mm + jitter, (A m m).
        jitter: (A) what L holds on the diagonal.
        z: (A m d).
        constant: (A).
        values: Hyper-parameters by name.
        log_prior: (A) log prior density of the hyper-parameters, attached.
    """

    vector: Tensor
    attached: list[Tensor]
    factor: Tensor
    jitter: Tensor
    z: Tensor
    constant: Tensor
    values: Values
    log_prior: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What tiles are differentiated in, in the order of `attached`."""
        return [self.factor, self.z, self.constant, *self.values.values()]


def read_point(problem: InducingProblem, vector: Tensor) -> Point:
    """The point at `vector` (A, D), with D = layout.dim + m d."""
    layout, d = problem.layout, problem.x.shape[-1]
    with torch.enable_grad():
        vector = vector.detach().requires_grad_()
        values, constant = layout.unpack(vector[:, : layout.dim])
        z = vector[:, layout.dim :].reshape(vector.shape[0], -1, d)
        k_mm = problem.model.kernel(z, params=problem.model.kernel_values(values))
        result = ops.inducing_factor(k_mm, JITTER)
        prior = layout.log_prior(values)[0] + torch.zeros_like(vector[:, 0])
    attached = [result.factor, z, constant, *values.values()]
    leaves = [tensor.detach().requires_grad_() for tensor in attached]
    named = dict(zip(values, leaves[3:], strict=True))
    return Point(vector, attached, leaves[0], result.jitter.detach(), leaves[1], leaves[2], named, prior)


def pull_back(point: Point, grads: list[Tensor]) -> Tensor:
    """The gradient in the vector, log prior included, from gradients in the leaves."""
    pairs = [(a, g) for a, g in zip(point.attached, grads, strict=True) if a.requires_grad]
    outputs, weights = [a for a, _ in pairs], [g for _, g in pairs]
    if point.log_prior.requires_grad:
        outputs, weights = [*outputs, point.log_prior], [*weights, torch.ones_like(point.log_prior)]
    return torch.autograd.grad(outputs, point.vector, weights)[0]


def accumulate(totals: list[Tensor], leaves: list[Tensor], outputs: list[Tensor], weights: list[Tensor]) -> None:
    """Add to `totals` the gradients of the weighted outputs in the leaves."""
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)
    for total, grad in zip(totals, found, strict=True):
        if grad is not None:
            total += grad


def inducing_sums(problem: InducingProblem, point: Point, which: Tensor) -> ops.InducingSums:
    """The sums over all data that the collapsed bound needs. Cost: O(n m^2) time, one tile of memory."""
    kernel, params = problem.model.kernel, problem.model.kernel_values(point.values)
    m = point.z.shape[-2]
    with torch.no_grad():
        like = point.factor
        gram, projected = torch.zeros_like(like), like.new_zeros(like.shape[:-1])
        square, trace = like.new_zeros(like.shape[0]), like.new_zeros(like.shape[0])
        for rows in problem.tiles(which.numel(), m):
            x = problem.inputs(which, rows)
            a = torch.linalg.solve_triangular(like, kernel(point.z, x, params), upper=False)
            residual = problem.y[:, rows][which] - problem.model.mean_at(x, point.values, point.constant)
            torch.baddbmm(gram, a, a.mT, out=gram)
            projected += (a @ residual.unsqueeze(-1)).squeeze(-1)
            square += residual.square().sum(-1)
            trace += kernel.diagonal(x, params).sum(-1)
        return ops.InducingSums(gram, projected, square, trace)


class Collapsed(NamedTuple):
    """Negative collapsed bound, minus the log prior of the hyper-parameters, per data point; an objective for L-BFGS.

    Attributes:
        problem: The problems.
        free: (D) 1 where the vector may move, 0 where it stays.
    """

    problem: InducingProblem
    free: Tensor

    def __call__(self, vector: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(vector (A, D), which problems (A)) -> (values (A), gradients (A, D)).

        Cost: 5 n m^2 multiplications and two evaluations of the covariances with the inducing points.
        """
        problem, n = self.problem, self.problem.num_data
        point = read_point(problem, vector)
        sums = inducing_sums(problem, point, indices)
        with torch.no_grad():
            noise = point.values["noise_variance"]
            bound = ops.collapsed_bound(sums, noise, n)
            value = bound.value + point.log_prior
        gradient = pull_back(point, self._gradients(point, sums, bound, indices))
        return -value / n, -gradient * self.free / n

    def _gradients(
        self, point: Point, sums: ops.InducingSums, bound: ops.CollapsedBound, which: Tensor
    ) -> list[Tensor]:
        """In the leaves. For a tile K of k(z, x): dF/dK = M K + g r', with M = 2 L^{-T} (dF/dAA') L^{-1}."""
        with torch.no_grad():
            totals = [torch.zeros_like(leaf) for leaf in point.leaves]
            noise = list(point.values).index("noise_variance") + 3
            totals[noise] += bound.by_noise
            by_k, by_y = self._tile_weights(point, bound)
            inward = 2 * bound.by_gram @ sums.gram + bound.by_projected.unsqueeze(-1) * sums.projected.unsqueeze(-2)
            totals[0] -= torch.linalg.solve_triangular(point.factor.mT, inward, upper=True).tril()
            half = -0.5 / point.values["noise_variance"]
        problem = self.problem
        kernel, params = problem.model.kernel, problem.model.kernel_values(point.values)
        for rows in problem.tiles(which.numel(), point.z.shape[-2]):
            x = problem.inputs(which, rows)
            with torch.enable_grad():
                k = kernel(point.z, x, params)
                variance = kernel.diagonal(x, params)
                residual = problem.y[:, rows][which] - problem.model.mean_at(x, point.values, point.constant)
            with torch.no_grad():
                weight = torch.baddbmm(by_y.unsqueeze(-1) * residual.unsqueeze(-2), by_k, k)
                slope = (by_y.unsqueeze(-2) @ k).squeeze(-2) + 2 * half.unsqueeze(-1) * residual
                flat = half.unsqueeze(-1).expand_as(variance)
            accumulate(totals, point.leaves, [k, variance, residual], [weight, flat, slope])
        return totals

    @staticmethod
    def _tile_weights(point: Point, bound: ops.CollapsedBound) -> tuple[Tensor, Tensor]:
        """M (A m m) and g = L^{-T} dF/d(A r) (A m)."""
        back = torch.linalg.solve_triangular(point.factor.mT, 2 * bound.by_gram, upper=True)
        by_k = torch.linalg.solve_triangular(point.factor.mT, back.mT, upper=True)
        g = torch.linalg.solve_triangular(point.factor.mT, bound.by_projected.unsqueeze(-1), upper=True)
        return by_k, g.squeeze(-1)


class Variational(NamedTuple):
    """q(v | c) = N(mean, c S) for each problem and latent function, with S = R' R, R the inverse factor of precision.

    Attributes:
        mean: (P L m).
        precision: S^{-1}, (P L m m).
        root: R = (lower Cholesky factor of the precision)^{-1}, (P L m m).
    """

    mean: Tensor
    precision: Tensor
    root: Tensor

    @classmethod
    def prior(cls, like: Tensor, num_problems: int, latents: int, m: int) -> Variational:
        """q = p: mean 0, S = I."""
        eye = torch.eye(m, dtype=like.dtype, device=like.device).expand(num_problems, latents, m, m)
        return cls(like.new_zeros(num_problems, latents, m), eye.clone(), eye.clone())


class Evaluation(NamedTuple):
    """An estimate of the expected log likelihood of all data, with what a step needs.

    Attributes:
        expected: (P).
        by_node: (P K) its slopes in the weights of the values of the scale.
        by_leaves: Gradients in the leaves of the point; empty where they were not asked for.
        by_mean: (P L m) gradient in the mean of q.
        curvature: (P L m m) minus twice the gradient in S: positive semi-definite.
    """

    expected: Tensor
    by_node: Tensor
    by_leaves: list[Tensor]
    by_mean: Tensor
    curvature: Tensor


def evaluate(
    problem: InducingProblem, point: Point, q: Variational, expected: Expected, rows: Tensor | None, *, slopes: bool
) -> Evaluation:
    """Expected log likelihood from the given rows, scaled up to all n, and where `slopes` its gradients.

    Cost: O(B m^2) time for B rows and each latent function.
    """
    num, _, m = q.mean.shape
    which = torch.arange(num, device=q.mean.device)
    factor = problem.num_data / (problem.num_data if rows is None else rows.numel())
    kernel, params = problem.model.kernel, problem.model.kernel_values(point.values)
    totals = [torch.zeros_like(leaf) for leaf in point.leaves] if slopes else []
    by_mean, curvature = torch.zeros_like(q.mean), torch.zeros_like(q.precision)
    value, by_node = q.mean.new_zeros(num), None
    for part in problem.tiles(num, m, rows):
        x, y = problem.inputs(which, part), problem.y[:, part]
        with torch.enable_grad() if slopes else torch.no_grad():
            k = kernel(point.z, x, params)
            a = torch.linalg.solve_triangular(point.factor, k, upper=False)
            mean, variance = ops.whitened_moments(a, kernel.diagonal(x, params), q.mean, q.root)
            mean = mean + problem.model.mean_at(x, point.values, point.constant).unsqueeze(-2)
        with torch.no_grad():
            found = expected(mean.detach(), variance.detach(), y)
            value += factor * found.value
            by_node = factor * found.by_node + (0 if by_node is None else by_node)
            if not slopes:
                continue
            a = a.detach()
            by_mean += factor * (a.unsqueeze(-3) @ found.by_mean.unsqueeze(-1)).squeeze(-1)
            curvature += (-2 * factor * a.unsqueeze(-3) * found.by_variance.unsqueeze(-2)) @ a.unsqueeze(-3).mT
            if "noise_variance" in point.values:
                totals[list(point.values).index("noise_variance") + 3] += factor * found.by_noise
        weights = [factor * found.by_mean, factor * found.by_variance]
        accumulate(totals, point.leaves, [mean, variance], weights)
    return Evaluation(value, by_node, totals, by_mean, curvature)


def natural_step(q: Variational, found: Evaluation, rate: float, precision: Tensor) -> Variational:
    r"""One step of natural-gradient ascent on the ELBO, q in natural parameters moving by `rate`.

        S^{-1} <- (1 - rate) S^{-1} + rate (I + curvature)
        mean   <- mean + rate / E[1/c] S (dE/dmean - E[1/c] mean)

    For a Gaussian likelihood and rate 1 this is the exact optimum in one step. For c = 1 it is the rule of Khan and
    Lin (2017), arXiv 1703.04265, and Salimbeni et al. (2018), arXiv 1803.09151; E[1/c] enters through the Fisher
    information of the mean, which is E[1/c] S^{-1}.

    Args:
        precision: E[1/c], (P).
    """
    eye = torch.eye(q.mean.shape[-1], dtype=q.mean.dtype, device=q.mean.device)
    sharp = (1 - rate) * q.precision + rate * (eye + found.curvature)
    factor = torch.linalg.cholesky_ex(sharp)[0]
    root = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    e = precision[:, None, None]
    ascent = (found.by_mean / e - q.mean).unsqueeze(-1)
    mean = q.mean + rate * (root.mT @ (root @ ascent)).squeeze(-1)
    return Variational(mean, sharp, root)
