r"""Exact Gaussian process regression: hyper-parameters by penalised type-II maximum likelihood, then closed form.

    theta* = argmax_theta log N(y | m, K_theta + s I) + log p(theta)

The marginal likelihood and its closed-form gradient come from one fused evaluation (`ops.mll_and_grad`), and L-BFGS
runs from several starts, for all outputs and all data sets, as one batch of independent problems.

Reference: Rasmussen & Williams (2006), chapters 2 and 5.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl._random import Seed, child_seeds
from bayesdl.data import TrainingData, training_data, units_of
from bayesdl.errors import NumericalError, NumericalWarning, SettingError, fail
from bayesdl.inference._fitting import warn_unless
from bayesdl.models import GP, Layout
from bayesdl.posterior import GPPosterior
from bayesdl.posterior.closed_form import evidence_in_units


@dataclass(frozen=True)
class ExactGP:
    """Exact GP regression.

    Attributes:
        model: The Gaussian process.
        num_starts: Starts of the optimiser: the initial values, then points between them and draws from the priors.
        max_iterations: L-BFGS iterations of each start.
        optimize: Whether to estimate hyper-parameters; False conditions at their initial values.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar that counts optimiser iterations.
    """

    model: GP
    num_starts: int = 4
    max_iterations: int = 100
    optimize: bool = True
    standardize: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        _checks.at_least("ExactGP", "num_starts", self.num_starts, 1, integer=True)
        _checks.at_least("ExactGP", "max_iterations", self.max_iterations, 1, integer=True)
        if not isinstance(self.model, GP):
            wanted = "model must be a bdl.GP."
            fix = "bdl.GP(bdl.kernels.Matern(nu=2.5)); a bdl.BNN goes to bdl.HMC or bdl.Ensemble"
            fail(SettingError, "ExactGP", wanted, got=_checks.describe(self.model), fix=fix)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> GPPosterior:
        """Condition on x (*b, n, d) and y (*b, n) or (*b, n, k); each data set and output has its own hyper-parameters.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: No jitter makes the kernel matrix positive definite.

        Warns:
            NumericalWarning: The kernel matrix needed jitter.
            ConvergenceWarning: The optimiser stopped at max_iterations.

        Cost: O(n^3) time for each evaluation of each start, output and data set; O(n^2) memory for each at once.
        """
        began = time.perf_counter()
        data = training_data("ExactGP.fit", x, y)
        units = units_of(data, standardize=self.standardize)
        inner_x = units.inward_x(data.x, torch.float64)
        inner_y = units.inward_y(data.y, torch.float64).movedim(-1, -2)  # (*b, k, n)
        layout = self.model.layout(data.x.shape[-1])
        heads = inner_y.shape[:-1]
        objective = _Objective(
            self.model, layout, inner_x.reshape(-1, *inner_x.shape[-2:]), inner_y.reshape(-1, inner_y.shape[-1])
        )
        theta, report = self._optimise(objective, layout, data, seed)
        theta = theta.reshape(*heads, layout.dim)
        values, constant = layout.unpack(theta)
        state = self._condition(inner_x.unsqueeze(-3), inner_y - constant.unsqueeze(-1), values)
        diagnostics = {
            "engine": "ExactGP",
            "num_data": data.x.shape[-2],
            "jitter": float(state.jitter.max()),
            **report,
            "seconds": time.perf_counter() - began,
        }
        evidence = evidence_in_units(ops.log_marginal(state), units, data.x.shape[-2])
        return GPPosterior(
            self.model, data, units, diagnostics, evidence, values=values, constant=constant, state=state
        )

    def _optimise(
        self, objective: _Objective, layout: Layout, data: TrainingData, seed: Seed
    ) -> tuple[Tensor, dict[str, Any]]:
        """The best theta of every problem (problems, D), and what the optimiser reports."""
        from tqdm import tqdm

        problems = objective.y.shape[0]
        start = layout.initial(objective.x)
        if not self.optimize:
            return start.expand(problems, -1), {"num_evaluations": 0}
        device = objective.x.device
        generator = torch.Generator(device).manual_seed(child_seeds(seed, 1)[0])
        starts = torch.cat([start.unsqueeze(0), layout.sample(self.num_starts - 1, generator, start)])
        theta0 = starts.unsqueeze(1).expand(-1, problems, -1).reshape(-1, layout.dim)
        with tqdm(total=self.max_iterations, desc="ExactGP", disable=not self.progress) as bar:
            found = ops.minimize_lbfgs(
                objective, theta0, max_iterations=self.max_iterations, callback=lambda *_: bar.update(1)
            )
        value = found.value.reshape(self.num_starts, problems)
        best = value.nan_to_num(nan=torch.inf).argmin(0)
        everyone = torch.arange(problems, device=device)
        if not bool(torch.isfinite(value[best, everyone]).all()):
            wanted = "the marginal likelihood must be finite at some start."
            fix = "check the data for extreme values, or raise Gaussian(lower=...)"
            fail(NumericalError, "ExactGP.fit", wanted, got=f"{value[best, everyone].tolist()}", fix=fix)
        converged = found.converged.reshape(self.num_starts, problems)[best, everyone]
        remedy = "raise max_iterations; the fit is usable but not at its optimum"
        warn_unless(
            bool(converged.all()),
            "ExactGP.fit",
            f"{int((~converged).sum())} of {problems} fits had not converged",
            remedy,
        )
        n = data.x.shape[-2]
        report = {
            "num_evaluations": int(found.evaluations),
            "converged": bool(converged.all()),
            "objective_by_start": (-n * value).squeeze(-1).tolist() if problems == 1 else (-n * value).tolist(),
        }
        if problems == 1:
            report["trace"] = {"log_posterior": [[-n * v for v in row if v == v] for row in found.trace.tolist()]}
        return found.theta.reshape(self.num_starts, problems, -1)[best, everyone], report

    def _condition(self, x: Tensor, residual: Tensor, values: dict[str, Tensor]) -> ops.GPState:
        k_xx = self.model.kernel(x, params=self.model.kernel_values(values))
        state = ops.condition(k_xx, x, residual, values["noise_variance"])
        if not bool(torch.isfinite(state.alpha).all()):
            wanted = "the kernel matrix must be positive definite."
            got = f"a failed factorisation with jitter {float(state.jitter.max()):.1e}"
            fail(
                NumericalError,
                "ExactGP.fit",
                wanted,
                got=got,
                fix="raise Gaussian(noise_variance=...) or its lower bound",
            )
        if float(state.jitter.max()) > 0:
            message = f"ExactGP.fit: the kernel matrix needed jitter {float(state.jitter.max()):.1e} to factorise"
            warnings.warn(message, NumericalWarning, stacklevel=3)
        return state


class _Objective(NamedTuple):
    """Negative log posterior per data point and its gradient, for any subset of problems times starts."""

    model: GP
    layout: Layout
    x: Tensor  # (sets, n, d)
    y: Tensor  # (sets * k, n)

    def __call__(self, theta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        problem = indices % self.y.shape[0]
        outputs = self.y.shape[0] // self.x.shape[0]
        values, constant = self.layout.unpack(theta)
        x, y = self.x[problem // outputs], self.y[problem]
        marginal = ops.mll_and_grad(
            self.model.kernel.value_and_pullback,
            x,
            self.model.kernel_values(values),
            y - constant.unsqueeze(-1),
            values["noise_variance"],
        )
        prior, slopes = self.layout.log_prior(values)
        grads = {f"kernel.{name}": g for name, g in marginal.params.items()} | {
            "noise_variance": marginal.noise_variance
        }
        grads = {name: g + slopes[name] for name, g in grads.items()}
        gradient = self.layout.chain(theta, grads, -marginal.residual.sum(-1))
        n = self.y.shape[-1]
        return -(marginal.value + prior) / n, -gradient / n
