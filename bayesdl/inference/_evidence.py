r"""Hyper-parameters by penalised type-II maximum likelihood, for every engine with a closed-form evidence.

    theta* = argmax_theta log p(y | theta) + log p(theta)

The evidence and its closed-form gradient come from one fused evaluation (`ops.mll_and_grad`), and L-BFGS runs from
several starts, for all outputs and all data sets, as one batch of independent problems.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl._random import Seed, child_seeds
from bayesdl.errors import NumericalError, SettingError, fail
from bayesdl.inference._fitting import warn_unless
from bayesdl.likelihoods import Gaussian
from bayesdl.models import GP, Layout

Values = dict[str, Tensor]

# Where a search ends, in the log posterior itself: its slope in log units of a hyper-parameter, and what a step gained.
# Under the default priors, whose curvature is at least 1/3, an optimum is then missed by less than 1e-4 in each.
_SLOPE = 5e-3
_GAIN = 5e-7


class Energy(NamedTuple):
    """What an evidence has in place of -q / 2 in a Gaussian one, q being the quadratic form r' A^{-1} r.

    Attributes:
        value: (q (t), values by name) -> (h (t), dh/dq (t), gradients in those of the values that h reads).
    """

    value: Callable[[Tensor, Values], tuple[Tensor, Tensor, Values]]


class Evidence(NamedTuple):
    """Negative log posterior of the hyper-parameters per data point and its gradient, for any subset of problems.

    There are `sets * k` problems (data sets times outputs) and any number of starts of each.

    Attributes:
        model: The Gaussian process.
        layout: How the hyper-parameters lie in a vector; it may hold more than the model's own, for `energy`.
        x: (sets, n, d).
        y: (sets * k, n).
        energy: What replaces the Gaussian quadratic term; None for the Gaussian.
    """

    model: GP
    layout: Layout
    x: Tensor
    y: Tensor
    energy: Energy | None = None

    def __call__(self, theta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(theta (A, D), which problems (A)) -> (values (A), gradients (A, D))."""
        point = self.layout.at(theta)
        values = point.values
        x, y = self._data(indices)
        energy, more = self._energy(values)
        marginal = ops.mll_and_grad(
            self.model.kernel.value_and_pullback,
            x,
            self.model.kernel_values(values),
            y - self.model.mean_at(x, values, point.constant),
            values["noise_variance"],
            **({} if energy is None else {"energy": energy}),
        )
        by_mean, by_constant = self.model.mean_pullback(x, values, -marginal.residual)
        grads = {f"kernel.{name}": g for name, g in marginal.params.items()}
        grads |= {"noise_variance": marginal.noise_variance} | by_mean | more(marginal)
        scale = -1.0 / self.y.shape[-1]
        return (marginal.value + point.log_prior).mul_(scale), point.gradient(grads, by_constant).mul_(scale)

    def _data(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of the problems; what all of them share is not copied for each."""
        if self.y.shape[0] == 1:
            return self.x[0], self.y
        problem = indices % self.y.shape[0]
        if self.x.shape[0] == 1:
            return self.x[0], self.y.index_select(0, problem)
        return self.x[problem // (self.y.shape[0] // self.x.shape[0])], self.y[problem]

    def _energy(self, values: Values) -> tuple[Any, Callable[[Any], Values]]:
        """The tile-wise form that `ops.mll_and_grad` takes, and the gradients in the energy's own parameters."""
        if self.energy is None:
            return None, lambda marginal: {}
        term = self.energy.value

        def by_tile(q: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            h, slope, _ = term(q, {name: value[index] for name, value in values.items()})
            return h, slope

        return by_tile, lambda marginal: term(marginal.quadratic, values)[2]


class Search(NamedTuple):
    """How hard to look for the optimum.

    Attributes:
        engine: Name of the engine, for messages and the bar.
        num_starts: Starts of the optimiser; 0 keeps the initial values.
        max_iterations: L-BFGS iterations of each start.
        progress: Whether to show a bar that counts iterations.
    """

    engine: str
    num_starts: int
    max_iterations: int
    progress: bool


def maximise_evidence(evidence: Evidence, search: Search, seed: Seed) -> tuple[Tensor, dict[str, Any]]:
    """The best theta of every problem (problems, D), and what the optimiser reports.

    Raises:
        NumericalError: The evidence is finite at no start of some problem.

    Warns:
        ConvergenceWarning: The best start of some problem stopped at max_iterations.
    """
    from tqdm import tqdm

    problems, layout = evidence.y.shape[0], evidence.layout
    start = layout.initial(evidence.x)
    if search.num_starts == 0:
        return start.expand(problems, -1), {"num_evaluations": 0}
    device = evidence.x.device
    generator = torch.Generator(device).manual_seed(child_seeds(seed, 1)[0])
    starts = torch.cat([start.unsqueeze(0), layout.sample(search.num_starts - 1, generator, start)])
    theta0 = starts.unsqueeze(1).expand(-1, problems, -1).reshape(-1, layout.dim)
    n = evidence.y.shape[-1]
    with tqdm(total=search.max_iterations, desc=search.engine, disable=not search.progress) as bar:
        found = ops.minimize_lbfgs(
            evidence,
            theta0,
            max_iterations=search.max_iterations,
            # the objective is per data point, and rounding forbids less of it
            tolerance_grad=max(1e-5, _SLOPE / n),
            tolerance_change=max(1e-9, _GAIN / n),
            callback=(lambda *_: bar.update(1)) if search.progress else None,
        )
    value = found.value.reshape(search.num_starts, problems)
    best = value.nan_to_num(nan=torch.inf).argmin(0)
    everyone = torch.arange(problems, device=device)
    if not bool(torch.isfinite(value[best, everyone]).all()):
        wanted = "the marginal likelihood must be finite at some start."
        fix = "check the data for extreme values, or raise Gaussian(lower=...)"
        fail(NumericalError, f"{search.engine}.fit", wanted, got=f"{value[best, everyone].tolist()}", fix=fix)
    converged = found.converged.reshape(search.num_starts, problems)[best, everyone]
    remedy = "raise max_iterations; the fit is usable but not at its optimum"
    missed = f"{int((~converged).sum())} of {problems} fits had not converged"
    warn_unless(bool(converged.all()), f"{search.engine}.fit", missed, remedy)
    theta = found.theta.reshape(search.num_starts, problems, -1)[best, everyone]
    return theta, _report(found, value, bool(converged.all()), n)


def _report(found: ops.LBFGSResult, value: Tensor, converged: bool, n: int) -> dict[str, Any]:
    single = value.shape[-1] == 1
    report = {
        "num_evaluations": int(found.evaluations),
        "converged": converged,
        "objective_by_start": (-n * value).squeeze(-1).tolist() if single else (-n * value).tolist(),
    }
    if single:
        report["trace"] = {"log_posterior": [[-n * v for v in row if v == v] for row in found.trace.tolist()]}
    return report


def gaussian_only(engine: str, model: GP) -> None:
    """Refuse a likelihood that leaves the closed form."""
    if not isinstance(model.likelihood, Gaussian):
        fail(
            SettingError,
            engine,
            "the model must have a Gaussian likelihood.",
            got=repr(model.likelihood),
            fix="use bdl.SparseGP for classification with a GP, or bdl.HMC with a bdl.BNN",
        )
