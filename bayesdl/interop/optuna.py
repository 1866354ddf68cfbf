"""Optuna: its studies are the record of a Bayesian optimisation, and any engine of bayesdl proposes their trials.

    optuna.create_study(sampler=BayesdlSampler(engine), storage="sqlite:///study.db")

Every worker reads the same record and computes for itself: there is no coordinator whose loss could lose anything. The
same record gives the same proposal, on whichever worker and after whatever interruption.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from bayesdl import _checks
from bayesdl.errors import NumericalError, NumericalWarning, SettingError, fail
from bayesdl.interop._optuna_cost import TIMING, KnownLogCost, LearnedLogCost, Spending, log_costs, weight
from bayesdl.interop._optuna_record import Record, read, stream
from bayesdl.interop._optuna_space import Encoding, sobol_point
from bayesdl.interop._optuna_surrogate import Surrogate, fit_together
from bayesdl.interop._optuna_trust_region import REGION, Region, box, current

__all__ = ["BayesdlSampler", "Encoding", "distribution"]

FALLBACK = "bayesdl:fallback"  # why a proposal is a quasi-random point although there were data
_FAILURES_THAT_MATTER = 0.1
_TARGET_EVERY = 4  # of the quasi-random trials, one is at the target fidelity
_MEMBERS_AT_RISK = 64


class BayesdlSampler(BaseSampler):
    """Proposes the trials of an Optuna study by the posterior of any engine.

    The first trials are points of a scrambled Sobol sequence. From then on the engine is fitted to all finished trials
    (inputs scaled to [0, 1], a column for each choice of a category; values with signs such that larger is better), and
    an acquisition function of BoTorch is maximised with the trials that run elsewhere as pending points. Failed trials
    stay out of the fit; where they exceed a tenth, a surrogate of success steers away from where they happen. Reported
    constraints (`trial.set_constraint`) are modelled as further outputs.

    Random streams are seeded by `seed` and the place of a trial in the study, never by the clock: the same record gives
    the same proposal.
    """

    def __init__(
        self,
        engine: Any = None,
        *,
        acquisition: str | Any = "auto",
        acquisition_options: Mapping[str, Any] | None = None,
        num_startup: int | None = None,
        seed: int = 0,
        space: Mapping[str, BaseDistribution] | None = None,
        constraints: Sequence[str] | None = None,
        reference_point: Sequence[float] | None = None,
        num_samples: int = 128,
        num_restarts: int = 4,
        num_candidates: int = 64,
        refit_every: int = 1,
        trust_region: Any = None,
        cost: Any = None,
        fidelities: Mapping[str, float] | None = None,
        environment: Mapping[str, Any] | None = None,
        risk: Any = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """
        Args:
            engine: Any engine of bayesdl; None for an exact GP with a Matern-5/2 kernel.
            acquisition: "auto" (qLogNEI; qLogNEHVI for 2 to 4 objectives, qLogNParEGO for more; qLogPF until something
                is feasible; for one objective under a network, the logarithm of the expected improvement of its
                marginals), the name of one of BoTorch's acquisitions ("qUCB", "qKnowledgeGradient",
                "LogExpectedImprovement", ...), or a function of (model, record) that returns one.
            acquisition_options: Keywords of a named acquisition, such as {"beta": 4.0} for "qUCB".
            num_startup: Quasi-random trials before the first fit; None for 2 p + 2 of p parameters, from 5 to 50.
            seed: Seed of the study.
            space: Search space, where it is known before the first trial; None to learn it from finished trials.
            constraints: Names of the reported constraints; None for all that trials report.
            reference_point: Worst value of interest of each of several objectives; None for one inferred from the data.
            num_samples: Base samples of Monte Carlo acquisitions.
            num_restarts: Searches of the acquisition optimiser.
            num_candidates: Points among which the starts of these searches are chosen.
            refit_every: Estimate hyper-parameters anew after this many finished trials; between, engines that can
                condition on what is new, the others fit.
            trust_region: A `bdl.bo.TrustRegion` that proposals are confined to; None for none.
            cost: A `bdl.bo.LearnedCost` or `KnownCost`: improvement is sought per cost; None for any cost alike.
            fidelities: Names of parameters that say how exact an evaluation is, and the values that count.
            environment: Names of parameters that are not ours to set in the end, and their laws; see
                `bdl.bo.Environment`.
            risk: A `bdl.bo.Risk`: what is sought over the environment; None for the mean.
            cache: Folder in which fitted posteriors are kept for other workers; may be deleted at any time.

        Raises:
            SettingError: A setting out of range, or an engine without `fit`.
        """
        where = "BayesdlSampler"
        self.engine = default_engine() if engine is None else engine
        if not callable(getattr(self.engine, "fit", None)):
            wanted = "engine must be an engine of bayesdl."
            fail(SettingError, where, wanted, got=_checks.describe(engine), fix="bdl.ExactGP(bdl.GP(kernel)), say")
        if not isinstance(acquisition, str) and not callable(acquisition):
            wanted = "acquisition must be a name or a function of (model, record)."
            fail(SettingError, where, wanted, got=repr(acquisition), fix='"auto"')
        if num_startup is not None:
            _checks.at_least(where, "num_startup", num_startup, 2, integer=True)
        counts = {"num_samples": num_samples, "num_restarts": num_restarts, "num_candidates": num_candidates}
        for name, value in {**counts, "refit_every": refit_every}.items():
            _checks.at_least(where, name, value, 1, integer=True)
        _checks.at_least(where, "seed", seed, 0, integer=True)
        self.trust_region = trust_region
        self.cost = cost
        self.fidelities, self.environment, self.risk = dict(fidelities or {}), dict(environment or {}), risk
        _check_aims(trust_region, cost, [*self.fidelities], [*self.environment])
        self.seed = int(seed)
        self.num_startup = num_startup
        self.space = None if space is None else dict(space)
        self.constraints = None if constraints is None else tuple(constraints)
        self._reference_point = None if reference_point is None else tuple(float(v) for v in reference_point)
        self._acquisition = (acquisition, dict(acquisition_options or {}), num_samples, num_restarts, num_candidates)
        self._surrogate = Surrogate(self.engine, refit_every, None if cache is None else Path(cache))
        self._cost_surrogate = self._surrogate._replace(engine=default_engine())
        self._intersections: dict[str, IntersectionSearchSpace] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The space that was given, else the parameters that all finished trials share; see Optuna."""
        if self.space is not None:
            return self.space
        known = self._intersections.setdefault(study.study_name, IntersectionSearchSpace())
        return {name: dist for name, dist in known.calculate(study).items() if not dist.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of a trial; see Optuna.

        Warns:
            NumericalWarning: The surrogate or its acquisition could not be computed; the trial is a quasi-random point.
        """
        if not search_space:
            return {}
        encoding = Encoding(search_space)
        trials = study.get_trials(deepcopy=False)
        record = read(trials, trial.number, encoding, study.directions, self.constraints, _stale(study, trials))
        enough = self._enough(encoding)
        region = self._region(study, trials, record, encoding)
        begun, known = (record.rank, record) if region is None else (region.begun, region.record)
        if region is not None:
            study._storage.set_trial_system_attr(trial._trial_id, REGION, [region.number, None])
        if not encoding.names or begun < enough or len(known.z) < 2:
            return encoding.decode(self._quasi_random(encoding, record.rank))
        try:
            z, seconds = self.propose(study, record, encoding, region, trials)
        except _numerical_errors() as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            message = f"trial {trial.number} is a quasi-random point, since the surrogate failed: {reason}"
            warnings.warn(message, NumericalWarning, stacklevel=2)
            study._storage.set_trial_system_attr(trial._trial_id, FALLBACK, reason[:500])
            return encoding.decode(self._quasi_random(encoding, record.rank))
        if region is not None:
            study._storage.set_trial_system_attr(trial._trial_id, REGION, [region.number, region.length])
        study._storage.set_trial_system_attr(trial._trial_id, TIMING, seconds)
        return encoding.decode(z)

    def propose(
        self,
        study: optuna.Study,
        record: Record,
        encoding: Encoding,
        region: Region | None = None,
        trials: Sequence[FrozenTrial] = (),
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Coordinates (p) of the next point given `record`, and what it took: CPU seconds, and both by the clock."""
        from bayesdl.interop import _optuna_acquisition as acquisitions
        from bayesdl.interop import _optuna_marginal as marginal

        seed = stream("acquisition", self.seed, record.rank)
        began, clock = time.process_time(), time.monotonic()
        known = record if region is None else region.record
        others = [(self._surrogate, _outcomes(known)), (self._cost_surrogate, self._costs(trials, known))]
        wanted = [(self._surrogate, known), *((own, data) for own, data in others if data is not None)]
        fit_together(wanted, encoding, study.study_name, self.seed)
        posterior = self.fitted(study, known, encoding)
        sought = self._goal(encoding)
        spending = self._spending(study, trials, known, encoding)
        search = acquisitions.Search(
            self._acquisition[0], self._acquisition[1], self._signed_reference(study), *self._acquisition[2:],
            sought, spending,
        )  # fmt: skip
        success = self._success(study, known, encoding)
        area = None if region is None else box(region, posterior, encoding)
        fitted = time.process_time()
        with acquisitions.seeded(seed):
            if marginal.applies(posterior, known, search.acquisition, sought):
                built: Any = marginal.build(posterior, known, encoding, search.reference_point)
                search = marginal.widened(search)
            else:
                model = _as_model(posterior, encoding, "auto" if sought is None or sought.plain else "samples")
                built = acquisitions.build(search, model, known, encoding, seed)
            built = acquisitions.surface(built, success, known, spending)
            z = acquisitions.optimise(built, search, encoding, record, seed, area)
        if len(record.pending) and bool(((record.pending - z).abs().amax(-1) < 1e-9).any()):
            z = self._quasi_random(encoding, record.rank)  # what is under way already
        done = time.process_time()
        spent = {"fit": fitted - began, "acquisition": done - fitted, "clock": time.monotonic() - clock}
        return z, {name: round(value, 6) for name, value in spent.items()}

    def surrogate(self, study: optuna.Study, record: Record, encoding: Encoding) -> Any:
        """The fitted surrogate as a BoTorch model over coordinates: objectives (larger is better), then constraints."""
        return _as_model(self.fitted(study, record, encoding), encoding, "auto")

    def fitted(self, study: optuna.Study, record: Record, encoding: Encoding) -> Any:
        """The posterior of objectives (larger is better) and constraints over the surrogate's inputs."""
        return self._surrogate.posterior(record, encoding, study.study_name, self.seed)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A uniform value of a parameter that no finished trial had yet; see Optuna."""
        encoding = Encoding({param_name: param_distribution})
        seed = stream("independent", self.seed, param_name)
        trials = study.get_trials(deepcopy=False)
        rank = read(trials, trial.number, Encoding({}), study.directions, (), frozenset()).rank
        return encoding.decode(sobol_point(encoding, rank, seed))[param_name]

    def reseed_rng(self) -> None:
        """Nothing to do: streams follow from the seed and the record."""

    def recommend(self, study: optuna.Study, encoding: Encoding, record: Record) -> tuple[dict[str, Any], float, float]:
        """Of the points that were evaluated, the one of which the surrogate thinks best: what is sought there.

        Returns:
            Parameters, with fidelities at their targets and without the environment; mean and standard deviation of
            what is sought, in the user's signs.
        """
        from bayesdl.interop._optuna_goal import GoalModel

        sought = self._goal(encoding)
        view = "auto" if sought is None or sought.plain else "samples"
        model = _as_model(self.fitted(study, record, encoding), encoding, view)
        model = model if sought is None else GoalModel(model, sought)
        with torch.no_grad():
            found = model.posterior(record.z.unsqueeze(-2))
            mean, deviation = found.mean[:, 0], found.variance[:, 0].sqrt()
        m = record.y.shape[-1]
        violation = mean[:, m:].clamp_min(0.0).sum(-1).tolist()
        best = min(range(len(violation)), key=lambda i: (violation[i], -float(mean[i, 0])))
        params = {**encoding.decode(record.z[best]), **self.fidelities}
        sign = 1.0 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else -1.0
        params = {name: value for name, value in params.items() if name not in self.environment}
        return params, sign * float(mean[best, 0]), float(deviation[best, 0])

    def _enough(self, encoding: Encoding) -> int:
        """Quasi-random trials before the first fit."""
        return self.num_startup or min(50, max(5, 2 * len(encoding.names) + 2))

    def _quasi_random(self, encoding: Encoding, rank: int) -> torch.Tensor:
        z = sobol_point(encoding, rank, stream("start", self.seed))
        if rank % _TARGET_EVERY == 0:
            for name, value in self.fidelities.items():
                if name in encoding.names:
                    z[encoding.names.index(name)] = encoding.inward(name, value)
        return z

    def _goal(self, encoding: Encoding) -> Any:
        """What is sought, None where that is what is evaluated."""
        if not self.fidelities and not self.environment:
            return None
        from bayesdl.interop._optuna_goal import goal

        return goal(self.fidelities, self.environment, self.risk, encoding, self.seed)

    def _spending(
        self, study: optuna.Study, trials: Sequence[FrozenTrial], record: Record, encoding: Encoding
    ) -> Spending | None:
        """The expected cost as a function of coordinates; None where costs do not matter or are not known yet."""
        if self.cost is None:
            return None
        share = weight(self.cost, trials, self._enough(encoding))
        if self.cost.source == "known":
            return Spending(KnownLogCost(self.cost.fixed, self.cost.rates, encoding), share)
        costs = self._costs(trials, record)
        if costs is None:
            return None
        posterior = self._cost_surrogate.posterior(costs, encoding, study.study_name, self.seed)
        return Spending(LearnedLogCost(_as_model(posterior, encoding, "gaussian")), share)

    def _costs(self, trials: Sequence[FrozenTrial], record: Record) -> Record | None:
        """The logarithms of observed costs, None where they are not learned, or too few yet."""
        if self.cost is None or self.cost.source == "known":
            return None
        seen = log_costs(self.cost, trials, record.numbers)
        known = seen[:, 0].isfinite()
        if int(known.sum()) < 2:
            return None
        return record._replace(z=record.z[known], y=seen[known], constraints=seen[known, :0])

    def _region(
        self, study: optuna.Study, trials: Sequence[FrozenTrial], record: Record, encoding: Encoding
    ) -> Region | None:
        """Where the search stands, if it has a trust region."""
        if self.trust_region is None:
            return None
        if len(study.directions) > 1:
            wanted = "a trust region is for one objective."
            fail(SettingError, "BayesdlSampler", wanted, got=f"{len(study.directions)}", fix="trust_region=None")
        return current(self.trust_region, trials, record, len(encoding.names))

    def _signed_reference(self, study: optuna.Study) -> tuple[float, ...] | None:
        point = self._reference_point
        if point is None:
            return None
        if len(point) != len(study.directions):
            wanted = f"reference_point must have {len(study.directions)} values, one for each objective."
            fail(
                SettingError, "BayesdlSampler", wanted, got=repr(point), fix="give the worst value of interest of each"
            )
        maximise = optuna.study.StudyDirection.MAXIMIZE
        return tuple(v if d == maximise else -v for v, d in zip(point, study.directions, strict=True))

    def _success(self, study: optuna.Study, record: Record, encoding: Encoding) -> Any:
        """A surrogate of -1 (failed) and 1 (succeeded), where more than a tenth of the evaluations failed."""
        both = _outcomes(record)
        if both is None:
            return None
        posterior = self._surrogate.posterior(both, encoding, study.study_name, self.seed)
        return _as_model(posterior, encoding, "gaussian")


def _outcomes(record: Record) -> Record | None:
    """What succeeded (1) and what failed (-1), None where failures are too few to matter."""
    tried = len(record.z) + len(record.failed)
    if len(record.failed) <= _FAILURES_THAT_MATTER * tried:
        return None
    outcome = torch.ones(tried, 1, dtype=torch.float64)
    outcome[len(record.z) :] = -1.0
    return record._replace(z=torch.cat([record.z, record.failed]), y=outcome, constraints=outcome[:, :0])


def _check_aims(trust_region: Any, cost: Any, fidelities: Sequence[str], environment: Sequence[str]) -> None:
    where = "BayesdlSampler"
    if trust_region is not None and not hasattr(trust_region, "failure_tolerance"):
        wanted = "trust_region must be a TrustRegion."
        fail(SettingError, where, wanted, got=repr(trust_region), fix="bdl.bo.TrustRegion()")
    if fidelities and cost is None:
        wanted = "fidelities need a cost, without which the most exact evaluation is always the best."
        fail(SettingError, where, wanted, got="cost=None", fix='cost="seconds", or bdl.bo.KnownCost(...)')
    if trust_region is not None and (fidelities or environment):
        wanted = "a trust region is for spaces without fidelities or an environment."
        fail(SettingError, where, wanted, got=str([*fidelities, *environment]), fix="trust_region=None")


def default_engine() -> Any:
    """An exact GP with a Matern-5/2 kernel of learned amplitude."""
    from bayesdl.inference.exact_gp import ExactGP
    from bayesdl.kernels import Matern, Scale
    from bayesdl.models.gp import GP

    return ExactGP(GP(Scale(Matern(nu=2.5))), num_starts=2)


def distribution(dim: Any) -> BaseDistribution:
    """The Optuna distribution of a `bdl.bo` dimension (`Float`, `Integer` or `Choice`)."""
    if hasattr(dim, "options"):
        return CategoricalDistribution(dim.options)
    if hasattr(dim, "step"):
        return IntDistribution(int(dim.low), int(dim.high), log=dim.log, step=int(dim.step))
    return FloatDistribution(float(dim.low), float(dim.high), log=dim.log)


def _as_model(posterior: Any, encoding: Encoding, view: str) -> Any:
    """The posterior as a BoTorch model over coordinates."""
    from bayesdl.interop import _optuna_acquisition as acquisitions
    from bayesdl.interop.botorch import to_botorch

    # A risk is taken of every member at every draw of the environment, so they are fewer there.
    model = to_botorch(posterior, view=view, num_samples=_MEMBERS_AT_RISK if view == "samples" else 256)
    return acquisitions.Encoded(model, encoding) if encoding.categories else model


def _stale(study: optuna.Study, trials: Sequence[FrozenTrial]) -> frozenset[int]:
    """Numbers of running trials that are known to be dead: by their process, or by Optuna's heartbeat."""
    from bayesdl.interop._optuna_workers import is_dead

    running = [t for t in trials if t.state == TrialState.RUNNING]
    dead = {t.number for t in running if is_dead(t)}
    storage = study._storage
    if running and getattr(storage, "get_heartbeat_interval", lambda: None)() is not None:
        overdue = set(storage._get_stale_trial_ids(study._study_id))
        dead |= {t.number for t in running if t._trial_id in overdue}
    return frozenset(dead)


def _numerical_errors() -> tuple[type[Exception], ...]:
    """What a surrogate on unfortunate data may raise without anything being wrong with the program."""
    from botorch.exceptions.errors import ModelFittingError, OptimizationGradientError
    from linear_operator.utils.errors import NanError, NotPSDError

    return (
        NumericalError, torch.linalg.LinAlgError, NotPSDError, NanError, ModelFittingError, OptimizationGradientError
    )  # fmt: skip
