r"""Scale mixtures of Gaussian processes: a GP with a prior on the variance of the whole function.

    v ~ p(v),   f | v ~ GP(m, v k),   y | f, v ~ N(f, v s)  (noise="scaled")  or  N(f, s)  (noise="fixed")

A GP of fixed kernel knows beforehand how wide its intervals are; the targets move its mean only. Here they move the
width too: targets that surprise the kernel widen every interval. With an inverse gamma prior and scaled noise f is a
Student-t process, in closed form; every other prior costs a one-dimensional integral after one factorisation.

Infinitely wide Bayesian networks whose read-out weights share a random variance are such mixtures of NNGPs.

References: Lee, Yun, Yang, Lee (2022), "Scale mixtures of neural network Gaussian processes", arXiv 2107.01408; Shah,
Wilson, Ghahramani (2014), "Student-t processes as alternatives to Gaussian processes", arXiv 1402.4306.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds
from bayesdl.data import training_data, units_of
from bayesdl.errors import SettingError, fail
from bayesdl.inference._evidence import Evidence, Search, maximise_evidence
from bayesdl.inference._inducing import InducingSettings, InverseGammaParams, check_settings, fit_inducing
from bayesdl.inference._matrix_free import check_dense
from bayesdl.inference._scale_evidence import FixedNoiseEvidence, dense_state, scaled_energy, with_shapes
from bayesdl.models import GP
from bayesdl.posterior import FixedNoiseMixturePosterior, GPPosterior, InducingPosterior, ScaleMixturePosterior
from bayesdl.posterior._scale import Mixing
from bayesdl.posterior.scale_mixture import MixturePosterior
from bayesdl.priors.scale import InverseGamma, ScalePrior, UserScale, scale_prior


@dataclass(frozen=True)
class ScaleMixture:
    r"""A GP whose covariance has one unknown factor v = sigma^2, for regression and classification.

    Each output column, and each data set of a batch, has a v of its own.

    Attributes:
        model: The Gaussian process, with any kernel. With a Bernoulli or Categorical likelihood the fit is variational
            with inducing points, one v being shared by all classes.
        scale_prior: The prior on v, the variance scale (not on sigma): one of `bayesdl.priors` or any log density
            v -> log p(v) in torch. Its learned shapes, if it has any, are estimated with the hyper-parameters;
            `bayesdl.priors.scale` says why the rest of it is left to the kernel's amplitude.
        noise: "scaled": v multiplies signal and noise alike, and `noise_variance` is relative to v; the mean is that of
            the GP. "fixed": v multiplies the signal only; the mean depends on v too.
        method: "closed_form" (inverse gamma prior and scaled noise only), "quadrature", "importance" (draws from the
            prior, weighted; their number fades as n^(-1/2), and the diagnostics say how many count), or "auto": closed
            form where there is one, else quadrature. Hyper-parameters are found by quadrature under "importance" too.
        num_nodes: Nodes of the quadrature in log v. 64 leave errors below 1e-6, and 1e-12 from ten targets on.
        num_samples: Draws of importance sampling.
        num_starts: Starts of the optimiser: the initial values, then points between them and draws from the priors.
        max_iterations: L-BFGS iterations of each start.
        num_inducing: Classification: inducing points.
        batch_size: Classification: rows of a step; None for all.
        num_steps: Classification: steps of the stochastic optimiser.
        learning_rate: Classification: of Adam, for hyper-parameters and inducing points.
        optimize: Whether to estimate hyper-parameters; False conditions at their initial values.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar that counts optimiser iterations.
    """

    model: GP
    scale_prior: Any = field(default_factory=lambda: InverseGamma(2.0, 2.0))
    noise: str = "scaled"
    method: str = "auto"
    num_nodes: int = 64
    num_samples: int = 1000
    num_starts: int = 4
    max_iterations: int = 100
    num_inducing: int = 200
    batch_size: int | None = None
    num_steps: int = 500
    learning_rate: float = 0.01
    optimize: bool = True
    standardize: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        _checks.choice("ScaleMixture", "noise", self.noise, ("scaled", "fixed"))
        _checks.choice("ScaleMixture", "method", self.method, ("auto", "closed_form", "quadrature", "importance"))
        _checks.at_least("ScaleMixture", "num_nodes", self.num_nodes, 8, integer=True)
        _checks.at_least("ScaleMixture", "num_samples", self.num_samples, 2, integer=True)
        _checks.at_least("ScaleMixture", "num_starts", self.num_starts, 1, integer=True)
        _checks.at_least("ScaleMixture", "max_iterations", self.max_iterations, 1, integer=True)
        check_settings("ScaleMixture", self.model, self._inducing())
        prior = self._prior()
        if self._is_classifier():
            self._check_classifier(prior)
            return
        closed = isinstance(prior, InverseGamma) and self.noise == "scaled"
        if self.method == "closed_form" and not closed:
            wanted = "the closed form is that of an InverseGamma prior with noise='scaled'."
            got = f"{prior!r}, noise={self.noise!r}"
            fail(SettingError, "ScaleMixture", wanted, got=got, fix="method='auto', which integrates numerically here")
        if self.method == "importance" and isinstance(prior, UserScale):
            wanted = "importance sampling needs a prior that can be drawn from."
            fail(SettingError, "ScaleMixture", wanted, got=repr(prior), fix="method='quadrature'")

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> MixturePosterior | InducingPosterior:
        """Condition on x (*b, n, d) and y (*b, n) or (*b, n, k); each data set and output has its own hyper-parameters.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            NumericalError: No jitter makes the kernel matrix positive definite, or p(v | y) is not proper.
            SettingError: The kernel matrices would take more than half of the device's memory.

        Warns:
            NumericalWarning: The kernel matrix needed jitter, or few draws of importance sampling count.
            ConvergenceWarning: The optimiser stopped at its last iteration.

        Cost: that of `ExactGP` with scaled noise; with fixed noise each evaluation takes eigenvectors, ten to twenty
        times a Cholesky factor. Classification costs what `SparseGP` does.
        """
        began = time.perf_counter()
        data = training_data("ScaleMixture.fit", x, y)
        if self._is_classifier():
            prior = InverseGammaParams(self._prior().concentration, self._prior().rate)
            return fit_inducing("ScaleMixture.fit", self.model, data, self._inducing(), scale_prior=prior, seed=seed)
        check_dense("ScaleMixture.fit", data)
        labels = self.model.label_columns(data.x.shape[-1])
        units = units_of(data, standardize=self.standardize, labels=labels)
        inner_x = units.inward_x(data.x, torch.float64)
        inner_y = units.inward_y(data.y, torch.float64).movedim(-1, -2)  # (*b, k, n)
        search_seed, draw_seed = child_seeds(seed, 2)
        mixing = self._mixing(draw_seed)
        layout = with_shapes(self.model.layout(data.x.shape[-1]), mixing)
        problem = (self.model, layout, inner_x.reshape(-1, *inner_x.shape[-2:]), inner_y.reshape(-1, inner_y.shape[-1]))
        fixed = self.noise == "fixed"
        evidence: Any = FixedNoiseEvidence(*problem, self._quadrature(mixing)) if fixed else None
        if evidence is None:
            evidence = Evidence(*problem, scaled_energy(self._quadrature(mixing), inner_y.shape[-1]))
        search = Search("ScaleMixture", self.num_starts if self.optimize else 0, self.max_iterations, self.progress)
        theta, report = maximise_evidence(evidence, search, search_seed)
        values, constant = layout.unpack(theta.reshape(*inner_y.shape[:-1], layout.dim))
        by_output = inner_x.unsqueeze(-3)
        residual = inner_y - self.model.mean_at(by_output, values, constant)
        state = dense_state("ScaleMixture.fit", self.model, by_output, residual, values)
        diagnostics = {
            "engine": "ScaleMixture",
            "num_data": data.x.shape[-2],
            "noise": self.noise,
            "jitter": float(state.jitter.max()),
            **report,
        }
        gp = GPPosterior(self.model, data, units, diagnostics, values=values, constant=constant, state=state)
        posterior = (FixedNoiseMixturePosterior if fixed else ScaleMixturePosterior).mix(gp, mixing)
        posterior._diagnostics["seconds"] = gp._diagnostics["seconds"] = time.perf_counter() - began
        return posterior

    def _prior(self) -> ScalePrior:
        return scale_prior("ScaleMixture", self.scale_prior)

    def _is_classifier(self) -> bool:
        return self.model.likelihood.task != "regression"

    def _mixing(self, seed: int) -> Mixing:
        prior, method = self._prior(), self.method
        if method == "auto":
            closed = isinstance(prior, InverseGamma) and self.noise == "scaled"
            method = "closed_form" if closed else "quadrature"
        return Mixing(prior, method, self.num_nodes, self.num_samples, seed)

    @staticmethod
    def _quadrature(mixing: Mixing) -> Mixing:
        """How the evidence is integrated while hyper-parameters are sought."""
        return mixing._replace(method="quadrature") if mixing.method == "importance" else mixing

    def _inducing(self) -> InducingSettings:
        return InducingSettings(
            num_inducing=self.num_inducing,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            optimize=self.optimize,
            standardize=self.standardize,
            progress=self.progress,
        )

    def _check_classifier(self, prior: ScalePrior) -> None:
        if not isinstance(prior, InverseGamma) or prior.learn:
            wanted = "classification takes an InverseGamma prior of fixed shape."
            fix = "scale_prior=bdl.priors.InverseGamma(2.0, 2.0)"
            fail(SettingError, "ScaleMixture", wanted, got=repr(prior), fix=fix)
        if self.noise != "scaled" or self.method not in ("auto", "closed_form"):
            wanted = "with a likelihood of classes there is no noise to scale, and the method is variational."
            got = f"noise={self.noise!r}, method={self.method!r}"
            fail(SettingError, "ScaleMixture", wanted, got=got, fix="leave noise and method as they are")
