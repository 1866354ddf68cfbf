r"""Fitting a GP through inducing points: what `SparseGP` and the classification branch of `ScaleMixture` share.

    log p(y) >= sum_i E_q[ log p(y_i | f_i) ] - KL( q(u) || p(u) )

Gaussian likelihood, all rows at a time: the collapsed bound of Titsias by L-BFGS. Otherwise stochastic variational
inference: natural-gradient steps on q, Adam on hyper-parameters and inducing points, over minibatches.

With a scale prior, f = c^{1/2} g with g a GP and one c ~ IG(alpha, beta) for all points and classes, and
q(u, c) = IG(c; a, b) prod_k N(u_k; m_k, c S_k) (Lee et al. 2022, arXiv 2107.01408). The Gaussian case is c = 1.
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl._random import Seed, child_seeds
from bayesdl.data import TrainingData, Units, class_labels, units_of
from bayesdl.errors import NumericalError, NumericalWarning, SettingError, ShapeError, fail
from bayesdl.inference._bounds import JITTER, Collapsed, InducingProblem, Point, Variational, inducing_sums, read_point
from bayesdl.inference._fitting import warn_unless
from bayesdl.inference._inducing_start import best_starting_vector, starting_vector, warm_start
from bayesdl.inference._natural_gradients import InverseGammaParams, Stochastic, optimise
from bayesdl.models import GP
from bayesdl.posterior.closed_form import evidence_in_units
from bayesdl.posterior.inducing import InducingPosterior

__all__ = ["InducingSettings", "InverseGammaParams", "check_settings", "fit_inducing"]


class InducingSettings(NamedTuple):
    """How an inducing-point posterior is fitted.

    Attributes:
        num_inducing: Inducing points of each data set and output, m; at most n are used.
        batch_size: Rows of a step; None for all rows, which for a Gaussian likelihood means the collapsed bound.
        num_steps: Steps of L-BFGS for the collapsed bound, or of the stochastic optimiser.
        learning_rate: Of Adam, for hyper-parameters (in log scale) and inducing points (in standardised inputs).
        natural_learning_rate: Of the natural gradient, in (0, 1].
        num_samples: Draws of f for each point and step with a Categorical likelihood.
        optimize: Whether to estimate hyper-parameters.
        move_inducing: Whether to optimise the locations of inducing points.
        standardize: Fit in standardised inputs (and targets, for regression).
        progress: Show a bar that counts steps.
    """

    num_inducing: int = 200
    batch_size: int | None = None
    num_steps: int = 500
    learning_rate: float = 0.02
    natural_learning_rate: float = 0.1
    num_samples: int = 16
    optimize: bool = True
    move_inducing: bool = True
    standardize: bool = True
    progress: bool = False


def check_settings(where: str, model: Any, settings: InducingSettings) -> None:
    """Refuse, at the door of the engine `where`, settings or a model that cannot be fitted."""
    for name in ("num_inducing", "num_steps", "num_samples"):
        _checks.at_least(where, name, getattr(settings, name), 1, integer=True)
    if settings.batch_size is not None:
        _checks.at_least(where, "batch_size", settings.batch_size, 1, integer=True)
    _checks.inside(where, "learning_rate", settings.learning_rate, 0.0, math.inf)
    _checks.inside(where, "natural_learning_rate", settings.natural_learning_rate, 0.0, 1.0 + 1e-12)
    if not isinstance(model, GP):
        wanted = "model must be a bdl.GP."
        fix = "bdl.GP(bdl.kernels.Matern(nu=2.5)); a bdl.BNN goes to bdl.HMC or bdl.Ensemble"
        fail(SettingError, where, wanted, got=_checks.describe(model), fix=fix)


def fit_inducing(
    where: str,
    model: GP,
    data: TrainingData,
    settings: InducingSettings,
    *,
    scale_prior: InverseGammaParams | None = None,
    seed: Seed = 0,
) -> InducingPosterior:
    """Fit q(u), hyper-parameters and inducing points; every data set and target column is a problem of its own.

    Args:
        where: Name of the caller, such as "SparseGP.fit", for messages; its first part is `diagnostics["engine"]`.
        model: The Gaussian process; its likelihood decides the method.
        data: What `bayesdl.data.training_data(where, x, y)` returned, in the user's units.
        settings: How to fit; `check_settings` has seen them.
        scale_prior: InverseGammaParams(alpha, beta), the prior of a random scale c of the latent functions, whose
            posterior IG(a, b) is then fitted too, and kept; None for a plain GP. With a Bernoulli or a Categorical
            likelihood only.
        seed: Of the starting points, the minibatches and the draws.

    Raises:
        DataError: Labels that are not integers in range.
        ShapeError: A Categorical likelihood with more than one target column.
        SettingError: A scale prior with a Gaussian likelihood, which has a closed form.
        NumericalError: The bound is not finite where it starts.

    Warns:
        ConvergenceWarning: The bound still rose when the steps were over, or q(u) stayed at the prior.
        NumericalWarning: The covariance of the inducing points needed more jitter than 1e-8 of the prior variance.

    Cost: O(n m^2) for each step over all rows, O(B m^2 + m^3) for each step over B of them, times the number of
    classes for a Categorical likelihood; O(m^2 + m B) memory.
    """
    began = time.perf_counter()
    regression = model.likelihood.task == "regression"
    _check_data(where, model, data, scale_prior)
    labels = model.label_columns(data.x.shape[-1])
    units = units_of(data, standardize=settings.standardize, targets=regression, labels=labels)
    problem = _problem(model, data, units)
    engine = where.partition(".")[0]
    value_seed, input_seed, run_seed = child_seeds(seed, 3)
    if regression and settings.optimize:
        vector = best_starting_vector(problem, settings.num_inducing, value_seed, input_seed)
    else:
        vector = starting_vector(problem, settings.num_inducing, input_seed)
    a_and_b = None
    if regression and settings.batch_size is None:
        vector, report = _maximise_collapsed(engine, problem, vector, settings)
    else:
        if regression and settings.optimize:
            vector = warm_start(problem, vector, _free(problem, vector, settings), settings.num_steps, input_seed)
        plan = Stochastic(engine, *settings[1:6], settings.progress, scale_prior)
        vector, q, a_and_b, report = optimise(problem, plan, vector, _free(problem, vector, settings), run_seed)
    point = read_point(problem, vector)
    if regression:
        q, bound = _collapsed_optimum(problem, point)
        report |= {"elbo": bound, "kl": ops.standard_normal_kl(q.mean, q.root).sum(-1)}
    _warn(where, point, report.pop("kl"), problem.num_data)
    # a Jacobian of 1 / y_scale for each point, which is 1 for classes
    elbo = evidence_in_units(report.pop("elbo").reshape(*data.batch_shape, -1), units, problem.num_data)
    diagnostics = {
        "engine": engine,
        "num_data": problem.num_data,
        "num_inducing": point.z.shape[-2],
        "elbo": elbo.tolist(),
        "jitter": float(point.jitter.max()),
        **report,
        "seconds": time.perf_counter() - began,
    }
    return _posterior(model, data, units, diagnostics, point, q, a_and_b)


def _problem(model: GP, data: TrainingData, units: Units) -> InducingProblem:
    """Standardised data sets in one row; each target column becomes a problem."""
    x, y = units.inward_x(data.x, torch.float64), units.inward_y(data.y, torch.float64).movedim(-1, -2)
    layout, latents = model.layout(data.x.shape[-1]), model.likelihood.num_outputs(1)
    return InducingProblem(model, layout, x.reshape(-1, *x.shape[-2:]), y.reshape(-1, y.shape[-1]), latents)


def _check_data(where: str, model: GP, data: TrainingData, scale_prior: InverseGammaParams | None) -> None:
    task = model.likelihood.task
    if task == "regression":
        if scale_prior is not None:
            wanted = "a scale prior with inducing points needs a likelihood of classes."
            fix = "bdl.ScaleMixture with a Gaussian likelihood has a closed form"
            fail(SettingError, where, wanted, got=repr(model.likelihood), fix=fix)
        return
    if task == "multiclass" and data.y.shape[-1] != 1:
        got = f"y with {data.y.shape[-1]} columns"
        fail(ShapeError, where, "a Categorical likelihood takes one target column.", got=got, fix="one label a row")
    class_labels(where, data.y, getattr(model.likelihood, "num_classes", 2))


def _free(problem: InducingProblem, vector: Tensor, settings: InducingSettings) -> Tensor:
    """(D) 1 for the parts of the vector that the settings let move."""
    free = torch.full_like(vector[0], float(settings.move_inducing))
    free[: problem.layout.dim] = float(settings.optimize)
    return free


def _maximise_collapsed(
    engine: str, problem: InducingProblem, vector: Tensor, settings: InducingSettings
) -> tuple[Tensor, dict[str, Any]]:
    from tqdm import tqdm

    if not (settings.optimize or settings.move_inducing):
        return vector, {"num_evaluations": 0}
    objective = Collapsed(problem, _free(problem, vector, settings))
    with tqdm(total=settings.num_steps, desc=engine, disable=not settings.progress) as bar:
        found = ops.minimize_lbfgs(
            objective, vector, max_iterations=settings.num_steps, callback=lambda *_: bar.update(1)
        )
    if not bool(torch.isfinite(found.value).all()):
        wanted = "the bound must be finite where it starts."
        fix = "check the data for extreme values, or raise Gaussian(lower=...)"
        fail(NumericalError, f"{engine}.fit", wanted, got=f"{found.value.tolist()}", fix=fix)
    missed = int((~found.converged).sum())
    remedy = "raise num_steps; the fit is usable but not at its optimum"
    warn_unless(missed == 0, f"{engine}.fit", f"{missed} of {len(vector)} fits had not converged", remedy)
    report = {"num_evaluations": int(found.evaluations), "converged": missed == 0}
    if len(vector) == 1:
        report["trace"] = {"log_posterior_bound": (-problem.num_data * found.trace).tolist()}
    return found.theta, report


def _collapsed_optimum(problem: InducingProblem, point: Point) -> tuple[Variational, Tensor]:
    """The optimal Gaussian q(v) given everything else, from one pass over all data, and the bound (P) there."""
    everyone = torch.arange(problem.y.shape[0], device=point.z.device)
    sums = inducing_sums(problem, point, everyone)
    with torch.no_grad():
        bound = ops.collapsed_bound(sums, point.values["noise_variance"], problem.num_data)
    mean, root = bound.mean.unsqueeze(-2), bound.root.unsqueeze(-3)
    return Variational(mean, torch.empty(0), root), bound.value


def _warn(where: str, point: Point, kl: Tensor, n: int) -> None:
    extra = point.jitter - JITTER * point.factor.detach().square().sum((-2, -1)) / point.z.shape[-2]
    if bool((extra > 1e-3 * point.jitter).any()):
        message = f"{where}: the inducing points' covariance needed jitter {float(point.jitter.max()):.1e} to factorise"
        warnings.warn(message, NumericalWarning, stacklevel=3)
    asleep = int((kl < 1e-3).sum())
    problem = f"q(u) stayed at the prior in {asleep} of {kl.numel()} fits, which explain the data by noise alone"
    remedy = "check the data, or start from another lengthscale or noise variance" if n > 1 else "pass more data"
    warn_unless(asleep == 0, where, problem, remedy)


def _posterior(
    model: GP,
    data: TrainingData,
    units: Units,
    diagnostics: dict[str, Any],
    point: Point,
    q: Variational,
    a_and_b: tuple[Tensor, Tensor] | None,
) -> InducingPosterior:
    """The flat axis of problems becomes (*b, k), or (*b, 1) for classes."""
    heads = (*data.batch_shape, data.y.shape[-1])

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(*heads, *tensor.shape[1:]).clone()

    return InducingPosterior(
        model,
        data,
        units,
        diagnostics,
        values={name: shaped(value) for name, value in point.values.items()},
        constant=shaped(point.constant),
        z=shaped(point.z),
        factor=shaped(point.factor),
        jitter=shaped(point.jitter),
        mean=shaped(q.mean),
        root=shaped(q.root),
        scale=None if a_and_b is None else (shaped(a_and_b[0]), shaped(a_and_b[1])),
    )
