r"""Gaussian process regression on values and slopes: hyper-parameters by the joint evidence, then closed form.

    (y, dy/dx) ~ N((m, 0), [[k, dk/dz], [dk/dx, d^2k/dxdz]] + noise),    theta* = argmax p(y, dy/dx | theta) p(theta)

A gradient at a point tells as much as d values around it, so that a simulator with an adjoint, or a model with
automatic differentiation, is learned from a fraction of the runs.

References: Rasmussen, Williams (2006), section 9.4; Solak, Murray-Smith, Leithead, Leith, Rasmussen (2003),
"Derivative observations in Gaussian process models of dynamic systems"; in Bayesian optimisation, Wu, Poloczek, Wilson,
Frazier (2017), arXiv 1703.04389.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl._random import Seed
from bayesdl.data import training_data, units_of
from bayesdl.errors import DataError, NumericalError, NumericalWarning, SettingError, fail
from bayesdl.inference._evidence import Search, gaussian_only, maximise_evidence
from bayesdl.kernels.derivatives import Observed, check_differentiable
from bayesdl.likelihoods import Gaussian
from bayesdl.models import GP, Layout
from bayesdl.posterior import GradientGPPosterior
from bayesdl.posterior.gradient_gp import gradient_evidence_in_units, inner_quantities, noise_of

Values = dict[str, Tensor]


@dataclass(frozen=True)
class GradientGP:
    """Exact GP regression on values and slopes; without slopes, what `ExactGP` does.

        posterior = GradientGP(model).fit(x, y, gradients, seed=0)
        posterior.predict(x_new)
        posterior.predict_gradient(x_new)

    Attributes:
        model: The Gaussian process. Its kernel's functions need slopes: not Matern 1/2. Its mean is constant or zero.
        gradient_likelihood: Noise of observed slopes, in standardised units, one learned variance for all of them.
        num_starts: Starts of the optimiser: the initial values, then points between them and draws from the priors.
        max_iterations: L-BFGS iterations of each start.
        optimize: Whether to estimate hyper-parameters; False conditions at their initial values.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar that counts optimiser iterations.
    """

    model: GP
    gradient_likelihood: Gaussian = field(default_factory=Gaussian)
    num_starts: int = 4
    max_iterations: int = 100
    optimize: bool = True
    standardize: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        _checks.at_least("GradientGP", "num_starts", self.num_starts, 1, integer=True)
        _checks.at_least("GradientGP", "max_iterations", self.max_iterations, 1, integer=True)
        if not isinstance(self.model, GP):
            wanted = "model must be a bdl.GP."
            fix = "bdl.GP(bdl.kernels.Matern(nu=2.5)); slopes of a bdl.BNN's members: posterior.function_gradients"
            fail(SettingError, "GradientGP", wanted, got=_checks.describe(self.model), fix=fix)
        gaussian_only("GradientGP", self.model)
        if not isinstance(self.model.mean, str):
            wanted = "the mean must be constant or zero, so that its slopes are known."
            fail(SettingError, "GradientGP", wanted, got=repr(self.model.mean)[:100], fix='mean="constant"')
        if not isinstance(self.gradient_likelihood, Gaussian):
            wanted = "gradient_likelihood must be a bdl.Gaussian."
            fail(SettingError, "GradientGP", wanted, got=repr(self.gradient_likelihood), fix="bdl.Gaussian()")

    def fit(self, x: Any, y: Any, gradients: Any = None, *, seed: Seed = 0) -> GradientGPPosterior:
        """Condition on x (*b, n, d), y (*b, n) or (*b, n, k), and slopes.

        Args:
            x: Inputs.
            y: Values at all of them.
            gradients: dy/dx, (*b, n, d), or (*b, n, k, d) for k outputs, NaN where not observed: whole points, or
                single columns. The same are to be observed in every data set and output. None for none.
            seed: Of the optimiser's starts.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            SettingError: The functions of the model's kernel have no slopes.
            NumericalError: No jitter makes the covariance positive definite.

        Warns:
            NumericalWarning: The covariance needed jitter.
            ConvergenceWarning: The optimiser stopped at max_iterations.

        Cost: with N values and slopes, at most n (1 + d), O(N^3) time and O(N^2) memory for each evaluation of each
        start, output and data set, and four to eight times the memory of the covariance for its gradient.
        """
        began = time.perf_counter()
        data = training_data("GradientGP.fit", x, y)
        labels = self.model.label_columns(data.x.shape[-1])
        units = units_of(data, standardize=self.standardize, labels=labels)
        inner_x, quantities, slopes = inner_quantities("GradientGP.fit", data, gradients, units)
        if bool(slopes.any()):
            _refuse_labels(slopes, labels)
            check_differentiable(self.model.kernel, inner_x.reshape(-1, *inner_x.shape[-2:])[0])
        seen = Observed.of(inner_x, slopes)
        targets = seen.pick(quantities)  # (*b, k, N)
        layout = self._layout(data.x.shape[-1], bool(slopes.any()))
        evidence = _JointEvidence(
            self.model, layout, inner_x.reshape(-1, *inner_x.shape[-2:]), targets.flatten(0, -2), seen.places
        )
        search = Search("GradientGP", self.num_starts if self.optimize else 0, self.max_iterations, self.progress)
        theta, report = maximise_evidence(evidence, search, seed)
        values, constant = layout.unpack(theta.reshape(*targets.shape[:-1], layout.dim))
        state = self._condition(seen, targets, values, constant)
        diagnostics = {
            "engine": "GradientGP",
            "num_data": data.x.shape[-2],
            "num_slopes": int(slopes.sum()),
            "jitter": float(state.jitter.max()),
            **report,
            "seconds": time.perf_counter() - began,
        }
        total = gradient_evidence_in_units(ops.log_marginal(state), units, seen)
        own = {"values": values, "constant": constant, "state": state, "places": seen.places}
        return GradientGPPosterior(self.model, data, units, diagnostics, total, **own)

    def _layout(self, d: int, with_slopes: bool) -> Layout:
        """The model's hyper-parameters, and the noise of slopes where there are any."""
        own = self.model.layout(d)
        if not with_slopes:
            return own
        noise = tuple(replace(p, name=f"gradient_{p.name}") for p in self.gradient_likelihood.parameters())
        return Layout(own.parameters + noise, own.has_mean)

    def _condition(self, seen: Observed, targets: Tensor, values: Values, constant: Tensor) -> ops.GPState:
        residual = targets - constant.unsqueeze(-1) * seen.is_value
        covariance = seen.covariance(self.model.kernel, self.model.kernel_values(values))
        chol, jitter, failed = ops.cholesky(covariance + torch.diag_embed(noise_of(seen, values)))
        if bool(failed.any()):
            wanted = "the covariance of values and slopes must be positive definite."
            fix = "raise Gaussian(noise_variance=...) or its lower bound, also in gradient_likelihood"
            fail(NumericalError, "GradientGP.fit", wanted, got="a failed factorisation", fix=fix)
        if float(jitter.max()) > 0:
            message = f"GradientGP.fit: the covariance needed jitter {float(jitter.max()):.1e} to factorise"
            warnings.warn(message, NumericalWarning, stacklevel=3)
        alpha = torch.cholesky_solve(residual.unsqueeze(-1), chol).squeeze(-1)
        # each quantity's own noise stands in the factor; there is no common one
        return ops.GPState(seen.x, residual, torch.zeros_like(jitter), chol, alpha, jitter)


def _refuse_labels(slopes: Tensor, labels: tuple[int, ...]) -> None:
    if bool(slopes[:, list(labels)].any()):
        wanted = f"columns {labels} hold labels, in which nothing has a slope."
        fix = "set gradients to NaN in these columns"
        fail(DataError, "GradientGP.fit", wanted, got="an observed slope", fix=fix)


class _JointEvidence(NamedTuple):
    """Negative log posterior of the hyper-parameters per value and slope, and its gradient: see `Evidence`."""

    model: GP
    layout: Layout
    x: Tensor
    y: Tensor
    places: Tensor

    def __call__(self, theta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(theta (A, D), which problems (A)) -> (values (A), gradients (A, D))."""
        point = self.layout.at(theta)
        problem = indices % self.y.shape[0]
        x = self.x[0] if self.x.shape[0] == 1 else self.x[problem // (self.y.shape[0] // self.x.shape[0])]
        # one row for each quantity, as `mll_and_grad` wants it
        by_place = x.index_select(-2, self.places // (1 + x.shape[-1]))
        is_value = Observed(x, self.places).is_value
        marginal = ops.mll_and_grad(
            self._value_and_pullback,
            by_place,
            point.values,
            self.y[problem] - point.constant.unsqueeze(-1) * is_value,
            torch.zeros_like(point.constant),
        )
        by_constant = -(marginal.residual * is_value).sum(-1)
        scale = -1.0 / self.y.shape[-1]
        return (marginal.value + point.log_prior) * scale, point.gradient(marginal.params, by_constant) * scale

    def _value_and_pullback(self, by_place: Tensor, values: Values) -> tuple[Tensor, Callable[[Tensor], Values]]:
        """The covariance of all quantities, noise included, and its gradient by autograd."""
        n = self.x.shape[-2]  # values come first, one for each row
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with torch.enable_grad():
            seen = Observed(by_place[..., :n, :], self.places)
            covariance = seen.covariance(self.model.kernel, self.model.kernel_values(leaves))
            covariance = covariance + torch.diag_embed(noise_of(seen, leaves))

        def pullback(p: Tensor) -> Values:
            found = torch.autograd.grad(covariance, list(leaves.values()), p, allow_unused=True)
            return {
                name: torch.zeros_like(leaf) if grad is None else grad
                for (name, leaf), grad in zip(leaves.items(), found, strict=True)
            }

        return covariance.detach(), pullback
