r"""Martingale posteriors: draws of what a predictive rule would come to believe, were it to see the rest of the data.

    x_{t+1} ~ a law of inputs,    y_{t+1} ~ p(y | x_{t+1}, D_t),    t = n, ..., n + N - 1,    theta_l = theta(D_{n+N})

The rule is any engine: one that has no posterior over means or quantiles, as a prior-data fitted network, gets one by
this; one that has is reproduced. Rollouts run as one batch. An exact Gaussian process draws a whole rollout at once,
engines that update take in one point at a time (a network appends it behind its context, which it reads once and in the
units of the observed data), and all others are fitted again to every rollout.

References: Fong, Holmes, Walker (2023), "Martingale posterior distributions"; TabMGP, arXiv 2510.25154, which takes a
prior-data fitted network as the rule and an urn for the inputs.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds
from bayesdl.data import TrainingData, training_data, units_of
from bayesdl.errors import ConvergenceWarning, NumericalError, SettingError, fail
from bayesdl.inference._matrix_free import default_memory
from bayesdl.inference._predictive_checkpoint import Kept
from bayesdl.inference._predictive_drift import Watch, probes_of
from bayesdl.inference._predictive_resampling import Refitted, Rule, Updated, can_update, covariate_plan, resample
from bayesdl.posterior import GPPosterior, MartingalePosterior
from bayesdl.posterior._completed import Completed, CompletedGP
from bayesdl.samplers._checkpoint import fingerprint

Law = Callable[[int, torch.Generator], Tensor]

_HORIZON = 200


@dataclass(frozen=True)
class Martingale:
    """Predictive resampling with the predictive rule of another engine.

    Which law of inputs is right depends on what is asked. For a population of which the observed inputs are a sample,
    "urn": its mean, a quantile, the coefficients of a regression. For function values f(x), inputs that cover the x
    that will be asked about: rollouts learn nothing of a function where they never go, and under the urn the law of
    f away from the data is far too narrow. The posterior warns when that is asked.

    Attributes:
        engine: The rule: any engine, or an object with `fit(x, y, *, seed)` whose result has `predict(x)` and may have
            `condition_on(x, y)`.
        num_rollouts: L, how many draws the posterior has.
        horizon: N, how many points each rollout draws; None for 200, or as many as a network's trained range leaves
            beside the data where that is fewer. A mean over n observed points has about N / (n + N) of its
            variance in the limit; f(x) has `posterior.horizon_coverage(x)`.
        covariates: Where the rollouts go: "urn" (Polya's urn over the observed inputs: the Bayesian bootstrap of x);
            "box" (space-filling points of the box around them); a law, callable as law(count, generator) -> (count, d);
            or a table of inputs (m, d), visited in random order, and again once all were. Rollouts share the path
            through a box or a table, which makes them cheaper, and each has a path of its own under an urn or a law.
        refit_every: Points between two fits, for an engine that cannot update. 1 draws each point from the predictive;
            more draw the points of a block together, f jointly from `posterior.sample` and then y given f.
        progress: Show a bar that counts steps.
        checkpoint: A folder in which a long run keeps what it has drawn, to go on from there with the same draws when
            it was killed; None for none. The engine's own fit to the data comes first each time (it may have a
            checkpoint itself). An exact GP draws everything in one step and writes nothing.
    """

    engine: Any
    num_rollouts: int = 100
    horizon: int | None = None
    covariates: str | Law | Any = "urn"
    refit_every: int = 10
    progress: bool = False
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_rollouts", "horizon", "refit_every"):
            if getattr(self, name) is not None:
                _checks.at_least("Martingale", name, getattr(self, name), 1, integer=True)
        if not callable(getattr(self.engine, "fit", None)):
            wanted = "engine must be an engine: something with fit(x, y, *, seed)."
            fix = "bdl.Martingale(bdl.ExactGP(model))"
            fail(SettingError, "Martingale", wanted, got=_checks.describe(self.engine), fix=fix)
        if isinstance(self.covariates, str):
            _checks.choice("Martingale", "covariates", self.covariates, ("urn", "box"))
        elif self.covariates is None:
            wanted = "covariates must say where the rollouts go."
            fail(SettingError, "Martingale", wanted, got="None", fix="'urn', 'box', a law, or a table of inputs")

    @property
    def model(self) -> Any:
        """The engine's model."""
        return getattr(self.engine, "model", None)

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> MartingalePosterior:
        """Fit the engine to x (*b, n, d) and y (*b, n) or (*b, n, k), and draw `num_rollouts` ways to go on.

        Data sets along *b are independent; their rollouts use the same random numbers.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data or the covariates cannot be used.
            SettingError: A network has not been trained on as many points as data and horizon; the engine can neither
                be updated nor fitted to a batch of data sets, or the rollouts take
                more memory than there is.
            NumericalError: A Gaussian process could not be extended along a rollout.
            StorageError: `checkpoint` is damaged, or something else; SettingError where it is of another run.

        Warns:
            ConvergenceWarning: The rule is no martingale: what it says at fixed inputs drifts along the rollouts
                (`diagnostics["drift"]`; about 1 % of coherent rules are blamed).

        Cost: for an exact GP, O(n^2 N + n N^2 + N^3) time and O(n N + N^2) memory for each different path, output and
        data set, and O(N^2) time a rollout; for an engine that updates, N batched updates of L data sets; for others,
        1 + N / refit_every fits of L data sets.
        """
        began = time.perf_counter()
        data = training_data("Martingale.fit", x, y)
        fit_seed, law_seed, draw_seed, refit_seed = child_seeds(seed, 4)
        base = self.engine.fit(x, y, seed=fit_seed)
        horizon = self._horizon(base, data.x.shape[-2])
        device = data.x.device
        source = torch.Generator(device).manual_seed(law_seed)
        plan = covariate_plan(self.covariates, data, self.num_rollouts, horizon, source)
        source = torch.Generator(device).manual_seed(draw_seed)
        shape = (self.num_rollouts, horizon, data.y.shape[-1])
        u = torch.rand(shape, generator=source, dtype=torch.float64, device=device).clamp_min(2.0**-54)
        watch = Watch(base, probes_of(data.x, plan), self.num_rollouts, horizon)
        with torch.no_grad():
            if isinstance(base, GPPosterior):
                method, completed, drawn = "joint", *self._joint(base, plan, u, watch)
            else:
                method, completed, drawn = self._stepwise(base, data, plan, u, watch, refit_seed)
        diagnostics = {
            "engine": "Martingale",
            "rule": type(self.engine).__name__,
            "num_data": data.x.shape[-2],
            "num_rollouts": self.num_rollouts,
            "horizon": horizon,
            "covariates": _name(self.covariates),
            "method": method,
            "drift": watch.report(),
            "rule_diagnostics": dict(getattr(base, "diagnostics", {})),
        }
        units = getattr(base, "_units", None) or units_of(data, standardize=False)
        evidence = getattr(base, "log_evidence", None)

        def made() -> MartingalePosterior:
            parts = {"rule": base, "completed": completed, "drawn_x": plan, "drawn_y": drawn}
            return MartingalePosterior(self.model, data, units, diagnostics, evidence, **parts)

        diagnostics["horizon_coverage"] = _coverage(made(), watch.probes)
        diagnostics["seconds"] = time.perf_counter() - began
        self._verdict(diagnostics)
        return made()

    def _horizon(self, base: Any, n: int) -> int:
        """N, within what a network can read."""
        most = getattr(base, "max_points", None)
        if most is None:
            return _HORIZON if self.horizon is None else self.horizon
        found = min(_HORIZON, most - n) if self.horizon is None else self.horizon
        if not 1 <= found <= most - n:
            wanted = f"data and horizon together must not exceed the {most} points that the network was trained on."
            got = f"{n} points" + ("" if self.horizon is None else f", horizon={self.horizon}")
            fix = f"horizon={most - n}" if n < most else "a subset of the data, or bdl.Martingale(bdl.ExactGP(model))"
            fail(SettingError, "Martingale.fit", wanted, got=got, fix=fix)
        return found

    def _joint(self, gp: GPPosterior, plan: Tensor, u: Tensor, watch: Watch) -> tuple[Completed, Tensor]:
        """All steps of a Gaussian process at once, as they would come one after another."""
        n, (horizon, k) = gp._data.x.shape[-2], u.shape[-2:]
        needed = 8 * plan.shape[:-2].numel() * k * (n * horizon + 4 * horizon**2)
        budget = default_memory(plan.device)
        if needed > budget:
            wanted = f"the rollouts must fit a memory of {budget / 2**30:.3g} GiB."
            got = f"about {needed / 2**30:.3g} GiB of factors"
            fix = "covariates='box' or a table, through which all rollouts share one factor; or a shorter horizon"
            fail(SettingError, "Martingale.fit", wanted, got=got, fix=fix)
        z = torch.special.ndtri(u).mT  # (L, k, N)
        completed = CompletedGP(gp, plan, z.reshape(len(z), *(1,) * len(gp._data.batch_shape), *z.shape[1:]))
        if not completed.finite:
            wanted = "the covariance of the rollouts must be positive definite."
            fix = "raise Gaussian(noise_variance=...) or its lower bound"
            fail(NumericalError, "Martingale.fit", wanted, got="a failed factorisation", fix=fix)
        watch.look_along(completed.along(watch.probes))
        return completed, completed.targets()

    def _stepwise(
        self, base: Any, data: TrainingData, plan: Tensor, u: Tensor, watch: Watch, seed: int
    ) -> tuple[str, Completed, Tensor]:
        """One block of points after another, by whatever the engine offers."""
        from tqdm import tqdm

        num = self.num_rollouts
        rule: Rule
        if can_update(base, data):
            method, rule = "update", Updated.start(self.engine, base, data, num, seed)
        else:
            method, rule = "refit", Refitted(self.engine, base, data, None, num, self.refit_every, seed)
        kept = None if self.checkpoint is None else self._kept(data, watch, plan, u, seed)
        before = None if kept is None else kept.drawn
        with tqdm(total=u.shape[-2], desc="Martingale", disable=not self.progress) as bar:
            bar.update(0 if before is None else before.shape[-2])

            def keep(parts: list[Tensor]) -> None:
                bar.update(parts[-1].shape[-2])
                if kept is not None:
                    kept.keep(parts)

            rule, drawn = resample(rule, plan, u, drawn=before, after=watch.look, keep=keep)
        if kept is not None:
            kept.keep([drawn], finished=True)
        return method, rule.completed(), drawn

    def _kept(self, data: TrainingData, watch: Watch, plan: Tensor, u: Tensor, seed: int) -> Kept:
        """The run's folder, and what an earlier call has drawn."""
        settings = {
            "engine": fingerprint(self.engine), "refit_every": self.refit_every, "refit_seed": seed,
            "data": fingerprint((data.x, data.y)), "inputs": fingerprint(plan), "numbers": fingerprint(u),
        }  # fmt: skip
        return Kept(self.checkpoint or "", settings, watch, plan.device)

    def _verdict(self, diagnostics: dict[str, Any]) -> None:
        drift = diagnostics["drift"]
        if drift["detected"]:
            worst = max(drift["largest_z"])
            message = (
                f"Martingale.fit: the rule is no martingale: along its rollouts what it says at fixed inputs drifts by "
                f"{worst:.1f} standard errors, where {drift['threshold']:.1f} would be chance; its draws are not those "
                "of a posterior. Compare with bdl.ExactGP, or shorten the horizon"
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=3)


def _name(covariates: Any) -> str:
    """What the diagnostics call a law."""
    if isinstance(covariates, str):
        return covariates
    return "law" if callable(covariates) else "table"


def _coverage(posterior: MartingalePosterior, probes: Tensor) -> dict[str, float | None]:
    """Mean and least share of the variance of f that the rollouts recover; None where the rule has none."""
    try:
        share = posterior.horizon_coverage(probes)
    except (NotImplementedError, SettingError, TypeError):
        share = probes.new_full((1,), math.nan)
    share = share[share.isfinite()]
    return {"mean": float(share.mean()), "least": float(share.min())} if len(share) else {"mean": None, "least": None}
