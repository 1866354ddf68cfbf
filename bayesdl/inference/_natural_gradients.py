r"""Stochastic variational inference with inducing points: natural gradients on q, Adam on everything else.

Minibatches and draws are the same for every problem of a batch, so that a data set is fitted as it would be alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl._random import child_seeds, generator
from bayesdl.errors import NumericalError, fail
from bayesdl.inference import _expectations
from bayesdl.inference._bounds import (
    Evaluation,
    InducingProblem,
    Point,
    Variational,
    evaluate,
    natural_step,
    pull_back,
    read_point,
)
from bayesdl.inference._expectations import Expected, Scales
from bayesdl.inference._fitting import warn_unless

_SCALE_NODES = 16
_CONSTANT_SHARE = 0.7  # of the steps, at full rates; over the rest they fall to 0
_FINAL_SAMPLES = 64


class InverseGammaParams(NamedTuple):
    """IG(alpha, beta): density beta^alpha / Gamma(alpha) c^(-alpha - 1) exp(-beta / c) of a variance c."""

    concentration: float
    rate: float


class Stochastic(NamedTuple):
    """How to optimise; see `InducingSettings`."""

    engine: str
    batch_size: int | None
    num_steps: int
    learning_rate: float
    natural_learning_rate: float
    num_samples: int
    progress: bool
    scale_prior: InverseGammaParams | None


class _Scale(NamedTuple):
    """q(c) of each problem: IG(a, b), or the point 1.

    Attributes:
        a_and_b: (P 2), the leaf of the weights; None where c is 1.
        scales: Values of c at quadrature nodes, with their weights.
        kl: KL from the prior, (P).
        precision: E[1/c] = a / b, (P).
    """

    a_and_b: Tensor | None
    scales: Scales
    kl: Tensor
    precision: Tensor


def optimise(
    problem: InducingProblem, plan: Stochastic, vector: Tensor, free: Tensor, seed: int
) -> tuple[Tensor, Variational, tuple[Tensor, Tensor] | None, dict[str, Any]]:
    """Maximise the ELBO plus the log prior of the hyper-parameters.

    Args:
        vector: (P D) theta and z where the optimiser starts.
        free: (D) 1 for the parts of it that may move.

    Returns:
        The final vector, q(v), (a, b) of the scale (P) each or None, and the report: `elbo` and `kl` (P) over all data
        at the end, and plain values for diagnostics.
    """
    from tqdm import tqdm

    row_seed, noise_seed, final_seed = child_seeds(seed, 3)
    rows, noise = _Rows(problem, plan.batch_size, row_seed), generator(noise_seed, vector.device)
    num = vector.shape[0]
    prior = plan.scale_prior
    scale = _scale(None if prior is None else vector.new_tensor(prior).expand(num, -1), prior, vector)
    m = (vector.shape[-1] - problem.layout.dim) // problem.x.shape[-1]
    q = Variational.prior(vector, num, problem.latents, m)
    adam, trace = _Adam(vector, free), []
    with tqdm(total=plan.num_steps, desc=plan.engine, disable=not plan.progress) as bar:
        for step in range(plan.num_steps):
            rate = _schedule(step, plan.num_steps)
            point = read_point(problem, adam.position)
            expected = _expected(problem, point, scale, plan.num_samples, noise)
            found = evaluate(problem, point, q, expected, rows.next(), slopes=True)
            trace.append(found.expected - _kl(q, scale))
            if bool(free.any()):
                adam.step(pull_back(point, found.by_leaves) / problem.num_data, plan.learning_rate * rate)
            scale, after = _scale_step(scale, prior, q, found, plan.natural_learning_rate * rate), scale
            q = natural_step(q, found, plan.natural_learning_rate * rate, after.precision)
            bar.update(1)
    point = read_point(problem, adam.position)
    expected = _expected(problem, point, scale, _FINAL_SAMPLES, generator(final_seed, vector.device))
    found = evaluate(problem, point, q, expected, None, slopes=False)
    kl = _kl(q, scale)
    if not bool(torch.isfinite(found.expected - kl).all()):
        wanted = "the bound must stay finite."
        fix = "lower learning_rate, or check the data for extreme values"
        fail(NumericalError, f"{plan.engine}.fit", wanted, got=f"{(found.expected - kl).tolist()}", fix=fix)
    report = _report(plan, torch.stack(trace, -1), problem.num_data)
    a_and_b = None if scale.a_and_b is None else tuple(scale.a_and_b.detach().unbind(-1))
    return adam.position, q, a_and_b, {**report, "elbo": found.expected - kl, "kl": kl}


class _Rows:
    """Minibatches without replacement, reshuffled at every pass; None for all rows."""

    def __init__(self, problem: InducingProblem, batch_size: int | None, seed: int) -> None:
        n = problem.num_data
        self._size = n if batch_size is None else min(batch_size, n)
        self._n, self._device = n, problem.x.device
        self._generator = generator(seed)
        self._left = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor | None:
        """Indices of the next rows."""
        if self._size == self._n:
            return None
        if len(self._left) < self._size:
            # what is left over is dropped: batches of one size each estimate the same sum without bias
            self._left = torch.randperm(self._n, generator=self._generator)
        rows, self._left = self._left[: self._size], self._left[self._size :]
        return rows.to(self._device)


class _Adam:
    """Adam for independent rows, ascending; Kingma and Ba (2015), arXiv 1412.6980."""

    def __init__(self, position: Tensor, free: Tensor) -> None:
        self.position, self._free = position.clone(), free
        self._first, self._second, self._count = torch.zeros_like(position), torch.zeros_like(position), 0

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Move by the learning rate; a row whose gradient is not finite stays where it is."""
        usable = gradient.isfinite().all(-1, keepdim=True)
        gradient = torch.where(usable, gradient, torch.zeros_like(gradient))
        self._count += 1
        self._first = 0.9 * self._first + 0.1 * gradient
        self._second = 0.999 * self._second + 0.001 * gradient.square()
        first, second = self._first / (1 - 0.9**self._count), self._second / (1 - 0.999**self._count)
        self.position = self.position + self._free * learning_rate * first / (second.sqrt() + 1e-8)


def _schedule(step: int, num_steps: int) -> float:
    """1, then a half cosine down to 0 over the last part of the run."""
    share = (step / num_steps - _CONSTANT_SHARE) / (1 - _CONSTANT_SHARE)
    return 1.0 if share <= 0 else 0.5 * (1 + math.cos(math.pi * share))


def _scale(a_and_b: Tensor | None, prior: InverseGammaParams | None, like: Tensor) -> _Scale:
    ones = like.new_ones(like.shape[0])
    if a_and_b is None or prior is None:
        return _Scale(None, Scales(ones.unsqueeze(-1), ones.unsqueeze(-1)), torch.zeros_like(ones), ones)
    with torch.enable_grad():
        leaf = a_and_b.detach().requires_grad_()
        a, b = leaf.unbind(-1)
        scales = Scales(*ops.inverse_gamma_nodes(a, b, _SCALE_NODES))
    with torch.no_grad():
        return _Scale(leaf, scales, ops.inverse_gamma_kl(a, b, *prior), a / b)


def _scale_step(
    scale: _Scale, prior: InverseGammaParams | None, q: Variational, found: Evaluation, rate: float
) -> _Scale:
    r"""One natural-gradient step of q(c) = IG(a, b), the natural parameters (-a - 1, -b) moving by `rate`.

        -a - 1 <- (1 - rate) (-a - 1) + rate (-alpha - 1 + g_1)
        -b     <- (1 - rate) (-b)     + rate (-beta - mean' mean / 2 + g_2)

    with g the gradient of the expected log likelihood E in the mean parameters (E[log c], E[1/c]): the solution of
    J' g = dE/d(a, b), J = d(log b - psi(a), a / b) / d(a, b). A step that would halve or double a or b stops there.
    """
    if scale.a_and_b is None or prior is None:
        return scale
    by_a, by_b = torch.autograd.grad(scale.scales.weight, scale.a_and_b, found.by_node)[0].unbind(-1)
    a, b = scale.a_and_b.detach().unbind(-1)
    trigamma = torch.polygamma(1, a)
    # J = [[-trigamma, 1 / b], [1 / b, -a / b^2]] is symmetric; its determinant is (a trigamma - 1) / b^2
    determinant = (a * trigamma - 1) / b.square()
    g_1 = (-a / b.square() * by_a - by_b / b) / determinant
    g_2 = (-by_a / b - trigamma * by_b) / determinant
    squares = q.mean.square().sum((-2, -1))
    new_a = (1 - rate) * a + rate * (prior.concentration - g_1)
    new_b = (1 - rate) * b + rate * (prior.rate + 0.5 * squares - g_2)
    new_a, new_b = (torch.clamp(new, 0.5 * old, 2 * old) for new, old in ((new_a, a), (new_b, b)))
    return _scale(torch.stack([new_a, new_b], -1), prior, a)


def _expected(
    problem: InducingProblem, point: Point, scale: _Scale, num_samples: int, noise: torch.Generator
) -> Expected:
    """The expected log likelihood of this problem's task, with fresh noise where it takes draws."""
    task = problem.model.likelihood.task
    scales = Scales(scale.scales.value.detach(), scale.scales.weight.detach())
    if task == "regression":
        return _expectations.gaussian(point.values["noise_variance"].detach())
    if task == "binary":
        return _expectations.bernoulli(scales)

    def expected(mean: Tensor, variance: Tensor, y: Tensor) -> _expectations.Expectation:
        shape = (num_samples, problem.latents, y.shape[-1])
        draws = torch.randn(shape, generator=noise, dtype=mean.dtype, device=mean.device)
        return _expectations.categorical(scales, draws)(mean, variance, y)

    return expected


def _kl(q: Variational, scale: _Scale) -> Tensor:
    """KL of q from the prior, (P)."""
    return ops.standard_normal_kl(q.mean, q.root, scale.precision.unsqueeze(-1)).sum(-1) + scale.kl


def _report(plan: Stochastic, trace: Tensor, n: int) -> dict[str, Any]:
    """Whether the bound had stopped rising before the rates fell.

    Two adjacent windows of steps tell its pace; as many steps again at that pace must add less than 0.01 nats a point,
    beside three standard errors of the noise.
    """
    end = int(_CONSTANT_SHARE * plan.num_steps)
    width = end // 5
    pace, converged = None, False
    if width > 0:
        late, before = trace[:, end - width : end] / n, trace[:, end - 2 * width : end - width] / n
        # from successive differences, which see the noise of minibatches and not the trend
        noise = 0.5 * trace[:, end - 2 * width : end].diff(dim=-1).square().mean(-1) / n**2
        error = (2 * noise / width).sqrt()
        again = plan.num_steps / width
        gain = again * (late.mean(-1) - before.mean(-1))
        pace = gain.max().item()
        converged = bool((gain <= 0.01 + 3 * again * error).all())
    problem = "the bound still rose when the learning rates began to fall"
    warn_unless(converged, f"{plan.engine}.fit", problem, "raise num_steps or learning_rate")
    report: dict[str, Any] = {"num_evaluations": plan.num_steps, "converged": converged, "rise_per_point": pace}
    if trace.shape[0] == 1:
        report["trace"] = {"elbo": trace.tolist()}
    return report
