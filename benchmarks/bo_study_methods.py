"""The methods of `bo_study`: engines of bayesdl in `bdl.bo.Study`, BoTorch's own loop, Optuna's samplers, Ax, chance.

Every method is given the same first points. Those of bayesdl and BoTorch's loop then spend the same effort on their
acquisition: 128 base samples, 64 raw candidates, 4 searches of at most 200 steps. A method of the kind `*-weak` has the
effort of arXiv 2305.20028 in their place: qEI without logarithm, 16 raw candidates, 2 searches of at most 10 steps.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
import torch
from bo_study_problems import Instance
from optuna.trial import TrialState, create_trial
from torch import Tensor
from torch.distributions import Normal

import bayesdl as bdl
from bayesdl.bo import Integer
from bayesdl.interop.optuna import Encoding

Point = Mapping[str, Any]


class Method(abc.ABC):
    """One run of one method: it is told the first points, then asked for more."""

    def __init__(self, problem: Instance, seed: int) -> None:
        self.problem = problem
        self.seed = seed

    @abc.abstractmethod
    def ask(self) -> Point:
        """The next point."""

    @abc.abstractmethod
    def tell(self, point: Point, values: Sequence[float], limits: Sequence[float]) -> None:
        """What came out at `point`, the last one asked for or one of the first ones."""

    def predict(self, points: Sequence[Point]) -> list[Any]:
        """The surrogate's predictive distribution of each objective at `points`; nothing where there is none."""
        return []

    def fallbacks(self) -> int:
        """Proposals that the surrogate could not be computed for."""
        return 0


class Ours(Method):
    """`bdl.bo.Study` with an engine."""

    def __init__(self, problem: Instance, seed: int, engine: Any) -> None:
        super().__init__(problem, seed)
        several = len(problem.reference_point) > 1
        self._study = bdl.bo.Study(
            problem.space, engine=engine, seed=seed, num_startup=2, cache=None,
            directions=("minimize",) * problem.num_objectives,
            constraints=() if problem.constraint is None else ("limit",),
            reference_point=problem.reference_point if several else None,
        )  # fmt: skip
        self._trial: Any = None

    def ask(self) -> Point:
        self._trial = self._study.ask()
        return self._trial.params

    def tell(self, point: Point, values: Sequence[float], limits: Sequence[float]) -> None:
        named = {"limit": limits[0]} if limits else {}
        if self._trial is None:
            self._study.add([point], [list(values)], constraints=[named] if named else [])
        else:
            self._study.tell(self._trial, list(values), constraints=named)

    def predict(self, points: Sequence[Point]) -> list[Any]:
        encoding = Encoding(self.problem.space.distributions())
        found = self._study.posterior().predict(encoding.expand(encoding.encode(points)))
        m = self.problem.num_objectives
        if m == 1 and self.problem.constraint is None:
            return [_Negated(found)]
        return [_Negated(found, i) for i in range(m)]

    def fallbacks(self) -> int:
        from bayesdl.interop.optuna import FALLBACK

        return sum(FALLBACK in t.system_attrs for t in self._study.optuna_study.get_trials(deepcopy=False))


class _Negated:
    """Minus what a study's surrogate models, in one of its columns: values that are minimised."""

    def __init__(self, law: Any, column: int | None = None) -> None:
        self._law, self._column = law, column

    def _pick(self, values: Tensor) -> Tensor:
        return values if self._column is None else values[..., self._column]

    @property
    def mean(self) -> Tensor:
        return -self._pick(self._law.mean)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of y (s), of the one column where there are several."""
        if self._column is None:
            return self._law.log_prob(-y)
        wide = self._law.mean.clone()
        wide[..., self._column] = -y
        return self._law.log_prob(wide)[..., self._column]

    def quantile(self, q: float) -> Tensor:
        return -self._pick(self._law.quantile(1 - q))


class Optunas(Method):
    """One of Optuna's samplers."""

    def __init__(self, problem: Instance, seed: int, make: Callable[..., Any]) -> None:
        super().__init__(problem, seed)
        self._study = optuna.create_study(directions=["minimize"] * problem.num_objectives, sampler=make(problem, seed))
        self._space = problem.space.distributions()
        self._trial: Any = None

    def ask(self) -> Point:
        self._trial = self._study.ask(self._space)
        return self._trial.params

    def tell(self, point: Point, values: Sequence[float], limits: Sequence[float]) -> None:
        if self._trial is None:
            trial = create_trial(
                state=TrialState.COMPLETE, params=dict(point), distributions=self._space, values=list(values),
                constraints={"limit": limits[0]} if limits else {},
            )  # fmt: skip
            self._study.add_trial(trial)
            return
        if limits:
            self._trial.set_constraint("limit", limits[0])
        self._study.tell(self._trial, list(values))


class BoTorchs(Method):
    """SingleTaskGP with qLogNEI or qLogNEHVI, by BoTorch's own parts, for spaces of real numbers."""

    def __init__(self, problem: Instance, seed: int, weak: bool = False) -> None:
        super().__init__(problem, seed)
        self._weak = weak
        self._encoding = Encoding(problem.space.distributions())
        self._x: list[Tensor] = []
        self._y: list[Tensor] = []
        self._model: Any = None

    def tell(self, point: Point, values: Sequence[float], limits: Sequence[float]) -> None:
        self._x.append(self._encoding.encode([point])[0])
        self._y.append(-torch.tensor([*values, *limits], dtype=torch.float64))
        self._model = None

    def _fitted(self) -> Any:
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        if self._model is None:
            x, y = torch.stack(self._x), torch.stack(self._y)
            parts = [SingleTaskGP(x, y[:, i : i + 1]) for i in range(y.shape[-1])]
            for part in parts:
                fit_gpytorch_mll(ExactMarginalLogLikelihood(part.likelihood, part))
            self._model = parts[0] if len(parts) == 1 else ModelListGP(*parts)
        return self._model

    def ask(self) -> Point:
        from botorch.optim import optimize_acqf
        from botorch.utils.sampling import manual_seed

        with manual_seed(self.seed * 1000 + len(self._x)):
            model = self._fitted()
            raw, searches, steps = (16, 2, 10) if self._weak else (64, 4, 200)
            settings = {"num_restarts": searches, "raw_samples": raw, "options": {"maxiter": steps}}
            z = optimize_acqf(self._acquisition(model), self._encoding.bounds, q=1, **settings)[0][0]
        return self._encoding.decode(z)

    def _acquisition(self, model: Any) -> Any:
        from botorch.acquisition import qExpectedImprovement, qLogNoisyExpectedImprovement
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
        from botorch.sampling import SobolQMCNormalSampler

        sampler = SobolQMCNormalSampler(torch.Size([128]))
        x, y, m = torch.stack(self._x), torch.stack(self._y), self.problem.num_objectives
        if m == 1 and self._weak:
            return qExpectedImprovement(model, best_f=y[:, 0].max(), sampler=sampler)
        if m == 1:
            return qLogNoisyExpectedImprovement(model, X_baseline=x, prune_baseline=True, sampler=sampler)
        limits = [lambda samples: -samples[..., m]] if y.shape[-1] > m else None
        return qLogNoisyExpectedHypervolumeImprovement(
            model, [-value for value in self.problem.reference_point], x, sampler=sampler, prune_baseline=True,
            objective=IdentityMCMultiOutputObjective(outcomes=list(range(m)), num_outcomes=y.shape[-1]),
            constraints=limits,
        )  # fmt: skip

    def predict(self, points: Sequence[Point]) -> list[Any]:
        model = self._fitted()
        with torch.no_grad():
            found = model.posterior(self._encoding.encode(points), observation_noise=True)
        laws = [Normal(-found.mean[:, i], found.variance[:, i].sqrt()) for i in range(self.problem.num_objectives)]
        return [_Quantiles(law) for law in laws]


class _Quantiles:
    """A normal law with quantiles by level."""

    def __init__(self, law: Normal) -> None:
        self.mean, self.log_prob, self._law = law.mean, law.log_prob, law

    def quantile(self, q: float) -> Tensor:
        return self._law.icdf(torch.tensor(q, dtype=torch.float64))


class Axs(Method):
    """Ax with its default strategy, the first points attached; needs `pip install ax-platform`."""

    def __init__(self, problem: Instance, seed: int) -> None:
        super().__init__(problem, seed)
        from ax.api.client import Client
        from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

        parts = []
        for name, dim in zip(problem.space.names, problem.space.dimensions, strict=True):
            if hasattr(dim, "options"):
                parts.append(ChoiceParameterConfig(name=name, values=list(dim.options), parameter_type="str"))
                continue
            kind = "int" if isinstance(dim, Integer) else "float"
            scaling = "log" if dim.log else "linear"
            parts.append(
                RangeParameterConfig(name=name, bounds=(dim.low, dim.high), parameter_type=kind, scaling=scaling)
            )
        names = [f"y{i}" for i in range(problem.num_objectives)]
        self._client, self._names, self._index = Client(random_seed=seed), names, None
        self._client.configure_experiment(parameters=parts)
        limits = [] if problem.constraint is None else ["limit <= 0"]
        self._client.configure_optimization(", ".join(f"-{name}" for name in names), outcome_constraints=limits)
        self._client.configure_generation_strategy(
            method="fast", initialization_budget=problem.startup, use_existing_trials_for_initialization=True
        )

    def ask(self) -> Point:
        ((self._index, point),) = self._client.get_next_trials(1).items()
        return point

    def tell(self, point: Point, values: Sequence[float], limits: Sequence[float]) -> None:
        index = self._client.attach_trial(dict(point)) if self._index is None else self._index
        data = dict(zip(self._names, values, strict=True)) | ({"limit": limits[0]} if limits else {})
        self._client.complete_trial(index, data)


def _gp() -> Any:
    from bayesdl.interop.optuna import default_engine

    return default_engine()


def _nngp(activation: str) -> Any:
    kernel = bdl.kernels.Scale(bdl.kernels.NNGP(depth=3, activation=activation))
    return bdl.ExactGP(bdl.GP(kernel), num_starts=2)


def _student_t() -> Any:
    return bdl.ScaleMixture(bdl.GP(bdl.kernels.Matern(nu=2.5)), num_starts=2)


def _bnn() -> Any:
    return bdl.BNN(hidden=(50, 50), activation="tanh", prior=bdl.priors.Normal(scale=2.0))


def _hmc() -> Any:
    return bdl.HMC(_bnn(), num_chains=8, num_warmup=50, num_draws=16, num_steps=10)


def _sghmc() -> Any:
    return bdl.SGHMC(_bnn(), num_chains=16, num_warmup=200, num_draws=4)


def _ensemble() -> Any:
    return bdl.Ensemble(_bnn(), num_members=10, num_steps=300)


def _pfn(name: str) -> Any:
    return bdl.PFN.from_pretrained(name, precision="float32")


ENGINES: dict[str, Callable[[], Any]] = {
    "gp": _gp, "nngp-erf": lambda: _nngp("erf"), "nngp-relu": lambda: _nngp("relu"), "student-t": _student_t,
    "hmc": _hmc, "sghmc": _sghmc, "ensemble": _ensemble, "pfn-gp": lambda: _pfn("gp"), "pfn-bo": lambda: _pfn("bo"),
}  # fmt: skip
SAMPLERS: dict[str, Callable[[Instance, int], Any]] = {
    "tpe": lambda problem, seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=problem.startup),
    "gpsampler": lambda problem, seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=problem.startup),
    "random": lambda problem, seed: optuna.samplers.RandomSampler(seed=seed),
}
METHODS = (*ENGINES, "botorch", "botorch-weak", *SAMPLERS, "ax")


def make(name: str, problem: Instance, seed: int) -> Method | None:
    """One run of a method; None where it cannot do the problem.

    BoTorch's loop takes real numbers only, and its weak form one objective; networks take what they were trained for.
    """
    if name in ENGINES:
        engine = ENGINES[name]()
        if name.startswith("pfn"):
            most = engine.network.network.architecture.max_inputs
            if Encoding(problem.space.distributions()).width > most:
                return None
        return Ours(problem, seed, engine)
    if name in SAMPLERS:
        return Optunas(problem, seed, SAMPLERS[name])
    if name == "ax":
        return Axs(problem, seed)
    weak = name == "botorch-weak"
    if not problem.continuous or (weak and (problem.num_objectives > 1 or problem.constraint is not None)):
        return None
    return BoTorchs(problem, seed, weak)
