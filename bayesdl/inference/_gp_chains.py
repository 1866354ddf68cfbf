r"""Hyper-parameters of a Gaussian process by Markov chains.

The chains move in theta, the unconstrained hyper-parameters of a `Layout`, on

    log N(y | m, K_theta + s I) + log p(values) + sum_i log |d value_i / d theta_i| + log N(mean | 0, 1)

in standardised units. The prior is on the values; the Jacobian, which an optimiser leaves out, makes it a density of
theta. The constant mean, and any parameter of either sign that has no prior, is N(0, 1). Value and gradient come from
one fused evaluation (`ops.mll_and_grad`) for all chains, outputs and data sets at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayesdl._random import Seed, child_seeds
from bayesdl.data import training_data, units_of
from bayesdl.errors import SettingError, fail
from bayesdl.inference._evidence import Evidence
from bayesdl.models.gp import GP, Layout
from bayesdl.models.log_density import LogDensity, with_gradient
from bayesdl.posterior import GPMixturePosterior
from bayesdl.samplers.base import Run

_STANDARD = math.log(2 * math.pi) / 2


def sample_gp(
    where: str,
    model: GP,
    x: Any,
    y: Any,
    num_chains: int,
    standardize: bool,
    num_predictive: int,
    seed: Seed,
    run_chains: Callable[[LogDensity, Tensor, Seed], Run],
    report: Callable[[Run, Tensor], dict[str, Any]],
) -> GPMixturePosterior:
    """Fit the hyper-parameters of `model` by `run_chains(log_density, starts, seed)`; see `NUTS.fit`.

    `report` turns a run and its quantities (C, N, *) into diagnostics.
    """
    began = time.perf_counter()
    data = training_data(where, x, y)
    units = units_of(data, standardize=standardize, labels=model.label_columns(data.x.shape[-1]))
    layout = model.layout(data.x.shape[-1])
    check_priors(where, layout)
    inner_x = units.inward_x(data.x, torch.float64)
    inner_y = units.inward_y(data.y, torch.float64).movedim(-1, -2)  # (*b, k, n)
    evidence = Evidence(model, layout, inner_x.reshape(-1, *inner_x.shape[-2:]), inner_y.flatten(0, -2))
    start_seed, run_seed = child_seeds(seed, 2)
    generator = torch.Generator(inner_x.device).manual_seed(start_seed)
    starts = layout.sample(num_chains, generator, layout.initial(inner_x))
    groups = () if evidence.y.shape[0] == 1 else evidence.y.shape[:1]
    run = run_chains(hyper_log_density(evidence), starts.expand(*groups, *starts.shape), run_seed)
    diagnostics = report(run, run.draws.movedim((-3, -2), (0, 1)))
    diagnostics |= {"num_data": data.x.shape[-2], "seconds": time.perf_counter() - began}
    draws = run.draws.reshape(*inner_y.shape[:-1], *run.draws.shape[-3:])
    stats = run.stats if not groups else {}
    return GPMixturePosterior.mix(model, data, units, diagnostics, draws=draws, stats=stats, num=num_predictive)


def hyper_log_density(evidence: Evidence) -> LogDensity:
    """The log posterior of theta for all problems of `evidence`: (G, C, D) -> (G, C), or (C, D) -> (C) for one problem.

    Cost: O(n^3) time for each chain and problem, O(n^2) memory for those worked on together.
    """
    layout = evidence.layout
    volume = _Volume(layout, evidence.x)
    n = evidence.y.shape[-1]

    def value_and_grad(theta: Tensor) -> tuple[Tensor, Tensor]:
        rows = theta.reshape(-1, layout.dim)
        problems = evidence.y.shape[0]
        index = torch.arange(problems, device=theta.device).repeat_interleave(len(rows) // problems)
        value, grad = evidence(rows, index)
        more, slope = volume(rows)
        value, grad = more.sub(value, alpha=n), slope.sub(grad, alpha=n)
        return value.reshape(theta.shape[:-1]), grad.reshape(theta.shape)

    return LogDensity(with_gradient(value_and_grad), layout.dim, names_of(layout), value_and_grad=value_and_grad)


def check_priors(where: str, layout: Layout) -> None:
    """Refuse hyper-parameters with a half-infinite range and no prior: their posterior need not be a distribution."""
    for p in layout.parameters:
        if p.prior is None and (p.lower == -math.inf) != (p.upper == math.inf):
            wanted = f"hyper-parameter {p.name!r} must have a prior, for its likelihood alone cannot be sampled."
            fix = "for instance bdl.priors.LogNormal(0.0, 1.0), or a gpytorch prior on a gpytorch kernel"
            fail(SettingError, where, wanted, got="prior=None", fix=fix)


def names_of(layout: Layout) -> tuple[str, ...]:
    """A name for each coordinate of theta."""
    names = []
    for p in layout.parameters:
        names += [p.name if not p.shape else f"{p.name}[{i}]" for i in range(p.size)]
    return (*names, "mean") if layout.has_mean else tuple(names)


class _Volume:
    """Log Jacobians and the prior of what has no other: (theta (A, D)) -> value (A) and gradient (A, D)."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        kinds = []
        for p in layout.parameters:
            low, high = p.lower > -math.inf, p.upper < math.inf
            free = not low and not high
            width = math.log(p.upper - p.lower) if low and high else 0.0
            kinds += [
                (float(low and not high) - (high and not low), low and high, free and p.prior is None, width)
            ] * p.size
        kinds += [(0.0, False, True, 0.0)] * layout.has_mean
        columns = torch.tensor(kinds, dtype=like.dtype, device=like.device).unbind(-1)
        self._linear, self._both, self._normal, widths = columns
        self._constant = float(widths.sum()) - _STANDARD * float(self._normal.sum())
        self._bounded = bool(self._both.any())

    def __call__(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        value = (theta * self._linear - 0.5 * theta.square() * self._normal).sum(-1) + self._constant
        grad = self._linear - theta * self._normal
        if self._bounded:
            value = value + ((logsigmoid(theta) + logsigmoid(-theta)) * self._both).sum(-1)
            grad = grad + (1 - 2 * theta.sigmoid()) * self._both
        return value, grad
