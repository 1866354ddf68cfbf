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
from typing import Any

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl._random import Seed
from bayesdl.data import training_data, units_of
from bayesdl.errors import NumericalError, NumericalWarning, SettingError, fail
from bayesdl.inference._evidence import Evidence, Search, gaussian_only, maximise_evidence
from bayesdl.inference._matrix_free import choose, fit_matrix_free
from bayesdl.models import GP
from bayesdl.ops import SolverConfig
from bayesdl.posterior import GPPosterior, MatrixFreeGPPosterior
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
        solver: "dense" (Cholesky), "matrix_free" (conjugate gradients), or "auto": dense up to 5 000 points where the
            kernel matrices fit `memory`, matrix-free above. A `bdl.ops.SolverConfig` stands for "matrix_free" with
            settings of its own.
        memory: Bytes that a fit may take, None for half of what the device has in all.
    """

    model: GP
    num_starts: int = 4
    max_iterations: int = 100
    optimize: bool = True
    standardize: bool = True
    progress: bool = False
    solver: str | SolverConfig = "auto"
    memory: int | None = None

    def __post_init__(self) -> None:
        _checks.at_least("ExactGP", "num_starts", self.num_starts, 1, integer=True)
        _checks.at_least("ExactGP", "max_iterations", self.max_iterations, 1, integer=True)
        if not isinstance(self.model, GP):
            wanted = "model must be a bdl.GP."
            fix = "bdl.GP(bdl.kernels.Matern(nu=2.5)); a bdl.BNN goes to bdl.HMC or bdl.Ensemble"
            fail(SettingError, "ExactGP", wanted, got=_checks.describe(self.model), fix=fix)
        gaussian_only("ExactGP", self.model)
        if not isinstance(self.solver, SolverConfig):
            _checks.choice("ExactGP", "solver", self.solver, ("auto", "dense", "matrix_free"))
        if self.memory is not None:
            _checks.at_least("ExactGP", "memory", self.memory, 1, integer=True)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> GPPosterior | MatrixFreeGPPosterior:
        """Condition on x (*b, n, d) and y (*b, n) or (*b, n, k); each data set and output has its own hyper-parameters.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: No jitter makes the kernel matrix positive definite.
            SettingError: The fit would take more than `memory`; the message says what would not.

        Warns:
            NumericalWarning: The kernel matrix needed jitter.
            ConvergenceWarning: The optimiser, or a solve, stopped at max_iterations.

        Cost: dense, O(n^3) time for each evaluation of each start, output and data set, and O(n^2) memory; matrix-free,
        n^2 / 2 kernel evaluations for each step of a solve, and O(n rank) memory. `diagnostics["method"]` says which.
        """
        began = time.perf_counter()
        data = training_data("ExactGP.fit", x, y)
        labels = self.model.label_columns(data.x.shape[-1])
        units = units_of(data, standardize=self.standardize, labels=labels)
        search = Search("ExactGP", self.num_starts if self.optimize else 0, self.max_iterations, self.progress)
        choice = choose(self.solver, self.memory, data)
        if choice.method == "matrix_free":
            return fit_matrix_free(self.model, data, units, choice, search, seed)
        inner_x = units.inward_x(data.x, torch.float64)
        inner_y = units.inward_y(data.y, torch.float64).movedim(-1, -2)  # (*b, k, n)
        layout = self.model.layout(data.x.shape[-1])
        heads = inner_y.shape[:-1]
        evidence = Evidence(
            self.model, layout, inner_x.reshape(-1, *inner_x.shape[-2:]), inner_y.reshape(-1, inner_y.shape[-1])
        )
        theta, report = maximise_evidence(evidence, search, seed)
        theta = theta.reshape(*heads, layout.dim)
        values, constant = layout.unpack(theta)
        by_output = inner_x.unsqueeze(-3)
        residual = inner_y - self.model.mean_at(by_output, values, constant)
        state = self._condition(by_output, residual, values)
        diagnostics = {
            "engine": "ExactGP",
            "num_data": data.x.shape[-2],
            "method": "dense",
            "memory_needed": choice.needed,
            "jitter": float(state.jitter.max()),
            **report,
            "seconds": time.perf_counter() - began,
        }
        total = evidence_in_units(ops.log_marginal(state), units, data.x.shape[-2])
        return GPPosterior(self.model, data, units, diagnostics, total, values=values, constant=constant, state=state)

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
