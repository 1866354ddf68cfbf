"""From a posterior to the next point: BoTorch's acquisition functions, built by name, and BoTorch's optimisers.

BoTorch draws base samples and starting points from torch's global random state: that is seeded for the while, under a
lock, and put back.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import botorch.acquisition.multi_objective.logei as hypervolume
import torch
from botorch.acquisition import AcquisitionFunction, OneShotAcquisitionFunction
from botorch.acquisition.cost_aware import InverseCostWeightedUtility
from botorch.acquisition.factory import get_acquisition_function
from botorch.acquisition.input_constructors import ACQF_INPUT_CONSTRUCTOR_REGISTRY
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective, IdentityMCObjective
from botorch.exceptions.errors import UnsupportedError
from botorch.exceptions.warnings import BadInitialCandidatesWarning
from botorch.models.model import Model
from botorch.optim import optimize_acqf, optimize_acqf_discrete, optimize_acqf_mixed, optimize_acqf_mixed_alternating
from botorch.posteriors import Posterior
from botorch.utils.datasets import SupervisedDataset
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from botorch.utils.multi_objective.pareto import is_non_dominated
from botorch.utils.sampling import manual_seed
from torch import Tensor
from torch.distributions import Distribution

from bayesdl.errors import SettingError, fail
from bayesdl.interop._botorch_noisy_improvement import accelerate
from bayesdl.interop._joblib import restarts
from bayesdl.interop._optuna_cost import Spending
from bayesdl.interop._optuna_goal import Goal, GoalModel, Informed
from bayesdl.interop._optuna_record import Record
from bayesdl.interop._optuna_space import Encoding
from bayesdl.interop._optuna_trust_region import Box

_RANDOM = threading.RLock()
_FACTORY = (
    "qEI", "qLogEI", "qPI", "qLogPF", "qNEI", "qLogNEI", "qSR", "qUCB", "qEHVI", "qLogEHVI", "qNEHVI", "qLogNEHVI",
)  # fmt: skip
_SEVERAL = {"qEI": "qEHVI", "qLogEI": "qLogEHVI", "qNEI": "qNEHVI", "qLogNEI": "qLogNEHVI"}
_LOGARITHMIC = ("qLogNEI", "qLogEI", "qLogPF")
_IMPROVEMENTS = frozenset((*_SEVERAL, *_SEVERAL.values()))
MOST_HYPERVOLUME = 4  # objectives; above, the partitioning grows out of hand and random scalarisations take over
_MOST_LISTED = 2048  # points of a finite space that are scored one by one
_MOST_SLICES = 12  # combinations of discrete values that get a continuous search each
_POINTS_AT_ONCE = 512  # scored together as starting points, each of which stands for every draw of an environment

Builder = Callable[[Model, Record], AcquisitionFunction]


class Search(NamedTuple):
    """Settings of the acquisition.

    Attributes:
        acquisition: A name, or a function of the surrogate and the record that returns an acquisition function.
        options: Keywords for a named acquisition, such as beta for "qUCB".
        reference_point: Worst values of interest of several objectives, in the user's signs turned to maximisation.
        num_samples: Base samples of Monte Carlo acquisitions.
        num_restarts: Searches of the optimiser.
        num_candidates: Points among which the starts of the searches are chosen.
        goal: What is sought, where that is not the value of an evaluation.
        spending: The expected cost, where improvement is sought per cost.
        max_steps: Steps of each search at most.
    """

    acquisition: str | Builder
    options: Mapping[str, Any]
    reference_point: tuple[float, ...] | None
    num_samples: int
    num_restarts: int
    num_candidates: int
    goal: Goal | None = None
    spending: Spending | None = None
    max_steps: int = 200


class Encoded(Model):
    """A surrogate of inputs x, asked at coordinates z; for spaces with categories."""

    def __init__(self, inner: Model, encoding: Encoding) -> None:
        super().__init__()
        self.inner = inner
        self._encoding = encoding

    @property
    def num_outputs(self) -> int:
        """Outputs of the surrogate."""
        return self.inner.num_outputs

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes of the surrogate."""
        return self.inner.batch_shape

    def posterior(self, X: Tensor, *args: Any, **settings: Any) -> Posterior:
        """The surrogate's posterior at coordinates X (*t q p)."""
        return self.inner.posterior(self._encoding.expand(X), *args, **settings)

    def predictive(self, X: Tensor) -> Distribution:
        """The surrogate's marginal law of f at coordinates X (*t q p), where it has one."""
        return self.inner.predictive(self._encoding.expand(X))

    def subset_output(self, idcs: list[int]) -> Model:
        """The outputs `idcs` alone."""
        return Encoded(self.inner.subset_output(idcs), self._encoding)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **settings: Any) -> Model:
        """The surrogate after more observations."""
        return Encoded(self.inner.condition_on_observations(self._encoding.expand(X), Y, **settings), self._encoding)

    def fantasize(self, X: Tensor, *args: Any, **settings: Any) -> Model:
        """The surrogate after imagined observations."""
        return Encoded(self.inner.fantasize(self._encoding.expand(X), *args, **settings), self._encoding)


class Feasibility(torch.nn.Module):
    """log P(success) at coordinates z (*t q p), from a surrogate of indicators -1 (failed) and 1 (succeeded)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

    def forward(self, z: Tensor) -> Tensor:
        """(*t q)."""
        law = self._model.predictive(z.unsqueeze(-2))
        scale = law.variance.clamp_min(1e-8).sqrt()
        return torch.special.log_ndtr(law.mean / scale).squeeze(-1).squeeze(-1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global state for a while, one thread at a time, and put it back.

    BoTorch's complaint that one of several searches stopped short is left out: the best of them is what counts.
    """
    with _RANDOM, manual_seed(seed % 2**63), warnings.catch_warnings(), _without_compiler():
        warnings.filterwarnings("ignore", message="Optimization failed", category=RuntimeWarning)
        warnings.filterwarnings("ignore", category=BadInitialCandidatesWarning)
        yield


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep BoTorch from compiling a kernel for logarithmic hypervolume improvement when one is first built.

    A worker that is killed while it compiles leaves a lock behind on which every later one waits for ever; and machines
    with a compiler would propose other points, in the last digits, than those without.
    """
    attempted = getattr(hypervolume, "_load_attempted", True)
    hypervolume._load_attempted = True
    try:
        yield
    finally:
        hypervolume._load_attempted = attempted


def build(search: Search, model: Model, record: Record, encoding: Encoding, seed: int) -> AcquisitionFunction:
    """The acquisition function of `search` over coordinates.

    Raises:
        SettingError: An unknown name, or one that cannot do several objectives or constraints.
    """
    if search.goal is not None:
        return _for_goal(search, search.goal, model, record, encoding, seed)
    if callable(search.acquisition):
        return search.acquisition(model, record)
    name = acquisition_name(search.acquisition, record)
    goals = _Goals(record, search)
    pending = record.pending if len(record.pending) else None
    if name in _FACTORY:
        settings = {"prune_baseline": True, "cache_root": False, **search.options}
        if name == "qUCB":
            settings.setdefault("beta", 4.0)
        built = get_acquisition_function(
            name, model, goals.objective, record.z, X_pending=pending, constraints=goals.constraints,
            mc_samples=search.num_samples, seed=seed % 2**31, ref_point=goals.reference_point,
            Y=torch.cat([record.y, record.constraints], -1), **settings,
        )  # fmt: skip
        return accelerate(built)
    acquisition = _from_registry(name, search, model, record, encoding, goals)
    if pending is not None:
        try:
            acquisition.set_X_pending(pending)
        except UnsupportedError:
            # an analytic acquisition knows no pending points: believe the surrogate's mean there instead
            believed = model.condition_on_observations(pending, model.posterior(pending).mean)
            return build(search, believed, record._replace(pending=record.pending[:0]), encoding, seed)
    return acquisition


def _for_goal(
    search: Search, goal: Goal, model: Model, record: Record, encoding: Encoding, seed: int
) -> AcquisitionFunction:
    """One of BoTorch's multi-fidelity acquisitions, or an improvement of what is sought weighed by what is learned."""
    name = search.acquisition if callable(search.acquisition) else acquisition_name(search.acquisition, record)
    if record.y.shape[-1] > 1:
        wanted = "fidelities and environments are for one objective."
        got = f"{record.y.shape[-1]} objectives"
        fail(SettingError, "acquisition", wanted, got=got, fix="a study without them, or one objective")
    if isinstance(name, str) and name.startswith("qMultiFidelity") and not goal.environment:
        goals = _Goals(record, search)
        acquisition = _from_registry(name, search, model, record, encoding, goals, goal.targets)
        if len(record.pending):
            acquisition.set_X_pending(record.pending)
        return acquisition
    if isinstance(name, str) and name not in _LOGARITHMIC:
        wanted = "with a fidelity or an environment, the acquisition must be a logarithmic improvement."
        others = "" if goal.environment else ", or qMultiFidelityKnowledgeGradient or qMultiFidelityMaxValueEntropy"
        fail(SettingError, "acquisition", wanted, got=repr(name), fix=f"one of {', '.join(_LOGARITHMIC)}{others}")
    improvement = build(search._replace(goal=None), GoalModel(model, goal), record, encoding, seed)
    if not getattr(improvement, "_log", False):
        got = type(improvement).__name__
        fail(SettingError, "acquisition", "an improvement must be a logarithmic one.", got=got, fix='"auto"')
    return Informed(improvement, model, goal, record.z)


def acquisition_name(asked: str, record: Record) -> str:
    """What "auto" stands for, and what an improvement means with several objectives or before anything is feasible."""
    m = record.y.shape[-1]
    name = "qLogNEI" if asked == "auto" else asked
    if m > 1 and name in _SEVERAL:
        name = _SEVERAL[name] if m <= MOST_HYPERVOLUME else "qLogNParEGO"
    nothing_feasible = record.constraints.shape[-1] > 0 and not bool((record.constraints <= 0).all(-1).any())
    return "qLogPF" if nothing_feasible and name in _IMPROVEMENTS else name


class _Goals:
    """Objective, constraints and reference point in BoTorch's terms: outputs are objectives, then constraints."""

    def __init__(self, record: Record, search: Search) -> None:
        m, k = record.y.shape[-1], record.constraints.shape[-1]
        self.constraints = [lambda samples, i=i: samples[..., i] for i in range(m, m + k)] or None
        self.reference_point = None
        if m > 1:
            self.objective: Any = IdentityMCMultiOutputObjective(outcomes=list(range(m)), num_outcomes=m + k)
            chosen = search.reference_point
            self.reference_point = reference_point(record) if chosen is None else torch.tensor(chosen).to(record.y)
        elif k:
            self.objective = GenericMCObjective(lambda samples, X=None: samples[..., 0])
        else:
            self.objective = IdentityMCObjective()


def reference_point(record: Record) -> Tensor:
    """A point a little worse than the feasible Pareto front (m), by BoTorch's rule."""
    good = (record.constraints <= 0).all(-1)
    values = record.y[good] if bool(good.any()) else record.y
    return infer_reference_point(pareto_Y=values[is_non_dominated(values)])


def _from_registry(
    name: str,
    search: Search,
    model: Model,
    record: Record,
    encoding: Encoding,
    goals: _Goals,
    targets: Mapping[int, float] | None = None,
) -> AcquisitionFunction:
    """Any acquisition class for which BoTorch has an input constructor, by the name of the class."""
    kinds = {kind.__name__: kind for kind in ACQF_INPUT_CONSTRUCTOR_REGISTRY}
    if name not in kinds:
        wanted = "acquisition must be a name that BoTorch knows, or a function of (model, record)."
        fix = f"one of {', '.join(_FACTORY)}, or a class such as qKnowledgeGradient"
        fail(SettingError, "acquisition", wanted, got=repr(name), fix=fix)
    construct = ACQF_INPUT_CONSTRUCTOR_REGISTRY[kinds[name]]
    # BoTorch wraps its constructors in a function that drops what they do not take; the closure has what they take
    taken = inspect.signature(inspect.getclosurevars(construct).nonlocals.get("f", construct)).parameters
    m, k = record.y.shape[-1], record.constraints.shape[-1]
    try:
        if k and not {"constraints", "constraints_tuple"} & set(taken):
            raise UnsupportedError(f"{name} knows no constraints")
        known = {**_inputs(record, encoding, goals), "target_fidelities": targets}
        chosen = {key: value for key, value in known.items() if key in taken and value is not None}
        built = construct(model=model, **{**chosen, **search.options})
        if "cost_aware_utility" in built and search.spending is not None:
            built["cost_aware_utility"] = InverseCostWeightedUtility(search.spending.model())
        return kinds[name](**built)
    except (TypeError, ValueError, NotImplementedError, UnsupportedError) as error:
        wanted = f"{name} must suit {m} objective(s) and {k} constraint(s)."
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(SettingError, "acquisition", wanted, got=got, fix='acquisition="auto", or acquisition_options for it')


def _inputs(record: Record, encoding: Encoding, goals: _Goals) -> dict[str, Any]:
    """What input constructors may ask for, under BoTorch's names."""
    outputs = torch.cat([record.y, record.constraints], -1)
    m, k = record.y.shape[-1], record.constraints.shape[-1]
    names = [f"y{i}" for i in range(m + k)]
    limits = torch.eye(m + k, dtype=torch.float64)[m:]
    plain = m == 1 and k == 0
    good = (record.constraints <= 0).all(-1)
    return {
        "training_data": SupervisedDataset(
            record.z, outputs, feature_names=list(encoding.names), outcome_names=names, validate_init=False
        ),
        "objective": None if plain else goals.objective,
        "constraints": goals.constraints,
        "constraints_tuple": (limits, torch.zeros(k, 1, dtype=torch.float64)) if k else None,
        "objective_thresholds": goals.reference_point,
        "X_baseline": record.z,
        "bounds": [(float(low), float(high)) for low, high in encoding.bounds.T],
        "objective_index": 0,
        "best_f": float(record.y[good].max() if bool(good.any()) else record.y.min()) if k and m == 1 else None,
        "candidate_set": _candidates(encoding),
        "prune_baseline": True,
        "cache_root": False,
    }


def _candidates(encoding: Encoding) -> Tensor:
    """A fixed set of coordinates for acquisitions that want one, (256, p)."""
    engine = torch.quasirandom.SobolEngine(len(encoding.names), scramble=True, seed=0)
    return encoding.from_unit(engine.draw(256, dtype=torch.float64))


class Surface(AcquisitionFunction):
    """What the optimiser climbs: an acquisition function, lowered where evaluations are likely to fail (*t 1 p).

    By log P(success) a logarithmic improvement becomes that of an improvement times the probability; anything else is
    lowered by it in units of the spread of what was observed. Improvement per cost is the logarithmic improvement less
    that of the expected cost. Where the gradient is not a number, as it is at a point
    that was observed without noise, whose covariance with itself is singular, it is taken for 0.
    """

    def __init__(
        self,
        inner: AcquisitionFunction,
        feasibility: Feasibility | None,
        weight: float,
        observed: Tensor,
        spending: Spending | None = None,
    ) -> None:
        super().__init__(inner.model)
        self.X_baseline = observed  # what BoTorch scatters starting points around
        self._inner = inner
        self._feasibility = feasibility
        self._weight = weight
        self._spending = spending

    def forward(self, X: Tensor) -> Tensor:
        """(*t)."""
        X = _FiniteGradient.apply(X)
        value = self._inner(X)
        if self._spending is not None:
            value = value - self._spending.weight * self._spending.log_cost(X).logsumexp(-1)
        return value if self._feasibility is None else value + self._weight * self._feasibility(X).sum(-1)


class _FiniteGradient(torch.autograd.Function):
    """The identity, with entries of the gradient that are not finite set to 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


def surface(
    acquisition: AcquisitionFunction, feasibility: Model | None, record: Record, spending: Spending | None = None
) -> AcquisitionFunction:
    """What is climbed for `acquisition`; one-shot acquisitions, whose points include imagined ones, as they are.

    Raises:
        SettingError: A cost is to be heeded by an acquisition that is no logarithm and knows no costs itself.
    """
    log = bool(getattr(acquisition, "_log", False))
    if getattr(acquisition, "cost_aware_utility", None) is not None:
        spending = None  # it has that in it
    elif spending is not None and not log:
        wanted = "with a cost, the acquisition must be a logarithmic improvement."
        got = type(acquisition).__name__
        fail(SettingError, "acquisition", wanted, got=got, fix='acquisition="auto", or another qLog...')
    if isinstance(acquisition, OneShotAcquisitionFunction):
        return acquisition
    spread = float(record.y.std(0).mean()) if len(record.y) > 1 else 1.0
    prior = None if feasibility is None else Feasibility(feasibility)
    return Surface(acquisition, prior, 1.0 if log else spread, record.z, spending)


def optimise(
    acquisition: AcquisitionFunction,
    search: Search,
    encoding: Encoding,
    record: Record,
    seed: int,
    box: Box | None = None,
) -> Tensor:
    """Coordinates (p) of a maximum of `acquisition`, within `box` if there is one.

    Points of a finite space come once while others are left; once a box has no other, they come from outside it.
    """
    bounds, grids = (encoding.bounds, encoding.grids) if box is None else box
    settings = {"num_restarts": search.num_restarts, "raw_samples": search.num_candidates}
    at_once = max(8, _POINTS_AT_ONCE // (1 if search.goal is None else len(search.goal.points)))
    spread = restarts()  # over the workers of joblib, if the user has set any
    discrete = {**grids, **{i: [float(c) for c in range(n)] for i, n in encoding.categories.items()}}
    if not discrete:
        options = {"seed": seed % 2**31, "maxiter": search.max_steps, "init_batch_limit": at_once}
        # a search that was cut short at so many steps is no reason to begin again
        once = {"retry_on_optimization_warning": search.max_steps >= 200}
        return optimize_acqf(acquisition, bounds, q=1, options=options, **settings, **once, **spread)[0][-1]
    if encoding.num_points <= _MOST_LISTED:
        points = _unseen(encoding.all_points(), torch.cat([record.z, record.pending]))
        if box is not None and bool(box.holds(points).any()):
            points = points[box.holds(points)]
        return optimize_acqf_discrete(acquisition, 1, points, max_batch_size=64)[0][-1]
    combinations = 1
    for values in discrete.values():
        combinations *= len(values)
    if combinations <= _MOST_SLICES:
        axes = torch.cartesian_prod(*(torch.tensor(values, dtype=torch.float64) for values in discrete.values()))
        slices = [dict(zip(discrete, row.tolist(), strict=True)) for row in axes.reshape(combinations, -1)]
        options = {"seed": seed % 2**31, "maxiter": search.max_steps, "init_batch_limit": at_once}
        settings |= {"fixed_features_list": slices, "options": options}
        return optimize_acqf_mixed(acquisition, bounds, q=1, **settings, **spread)[0][-1]
    grids = {i: values for i, values in grids.items() if len(values) > 1}
    categories = {i: discrete[i] for i in encoding.categories}
    options = {"maxiter_init": 50, "maxiter_alternating": 32}
    return optimize_acqf_mixed_alternating(acquisition, bounds, grids, categories, options, **settings)[0][-1]


def _unseen(points: Tensor, seen: Tensor) -> Tensor:
    """Those of `points` that are not among `seen`, or all where none is left."""
    if not len(seen):
        return points
    fresh = torch.cdist(points, seen, compute_mode="donot_use_mm_for_euclid_dist").amin(-1) > 1e-9
    return points[fresh] if bool(fresh.any()) else points
