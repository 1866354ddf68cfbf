"""Every acquisition class of BoTorch and ours, how each is built, and what to ask of it on a small problem.

The inputs are the unit square, whose second column doubles as a fidelity; two outputs are objectives, or an objective
and a constraint. Classes that BoTorch's registry of input constructors knows are built through that.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from botorch import acquisition as acq
from botorch.acquisition import analytic, bayesian_active_learning, fixed_feature, multi_objective, penalized
from botorch.acquisition.active_learning import PairwiseMCPosteriorVariance
from botorch.acquisition.analytic import LogNoisyExpectedImprovement, qAnalyticProbabilityOfImprovement
from botorch.acquisition.factory import get_acquisition_function
from botorch.acquisition.input_constructors import get_acqf_input_constructor
from botorch.acquisition.joint_entropy_search import qJointEntropySearch
from botorch.acquisition.knowledge_gradient import qKnowledgeGradient, qMultiFidelityKnowledgeGradient
from botorch.acquisition.logei import qLogProbabilityOfFeasibility
from botorch.acquisition.max_value_entropy_search import (
    qLowerBoundMaxValueEntropy,
    qMaxValueEntropy,
    qMultiFidelityLowerBoundMaxValueEntropy,
    qMultiFidelityMaxValueEntropy,
)
from botorch.acquisition.multi_objective.hypervolume_knowledge_gradient import (
    qHypervolumeKnowledgeGradient,
    qMultiFidelityHypervolumeKnowledgeGradient,
)
from botorch.acquisition.multi_objective.joint_entropy_search import qLowerBoundMultiObjectiveJointEntropySearch
from botorch.acquisition.multi_objective.max_value_entropy_search import qLowerBoundMultiObjectiveMaxValueEntropySearch
from botorch.acquisition.multi_objective.multi_fidelity import MOMF
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.multi_objective.parego import qLogNParEGO
from botorch.acquisition.multi_objective.predictive_entropy_search import qMultiObjectivePredictiveEntropySearch
from botorch.acquisition.multi_step_lookahead import qMultiStepLookahead
from botorch.acquisition.multioutput_acquisition import MultiOutputPosteriorMean
from botorch.acquisition.objective import (
    GenericMCObjective,
    IdentityMCObjective,
    LinearMCObjective,
    ScalarizedPosteriorTransform,
)
from botorch.acquisition.predictive_entropy_search import qPredictiveEntropySearch
from botorch.acquisition.preference import (
    AnalyticExpectedUtilityOfBestOption,
    PairwiseBayesianActiveLearningByDisagreement,
    qExpectedUtilityOfBestOption,
)
from botorch.acquisition.prior_guided import PriorGuidedAcquisitionFunction
from botorch.acquisition.proximal import ProximalAcquisitionFunction
from botorch.acquisition.risk_measures import CVaR
from botorch.acquisition.thompson_sampling import PathwiseThompsonSampling
from botorch.models.cost import AffineFidelityCostModel
from botorch.models.model import Model
from botorch.models.transforms.input import InputPerturbation
from botorch.optim import optimize_acqf
from botorch.utils.datasets import SupervisedDataset
from botorch.utils.multi_objective.box_decompositions import NondominatedPartitioning
from botorch.utils.multi_objective.box_decompositions.dominated import DominatedPartitioning
from torch import Tensor

import bayesdl as bdl
from bayesdl.interop import botorch as ours
from bayesdl.ops import SolverConfig

F64 = torch.float64
BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=F64)
SAMPLES = torch.Size([32])


@dataclass(frozen=True)
class Problem:
    """A fitted posterior's model, its data, and pending points."""

    model: Model
    x: Tensor
    y: Tensor

    @property
    def data(self) -> SupervisedDataset:
        """The data in the form of BoTorch's input constructors."""
        names = [f"y{i}" for i in range(self.y.shape[-1])]
        return SupervisedDataset(self.x, self.y, feature_names=["a", "b"], outcome_names=names)

    @property
    def best(self) -> Tensor:
        """The best value of the first output."""
        return self.y[:, 0].max()

    @property
    def front(self) -> Tensor:
        """A front of two points above the data, (1, 2, 2)."""
        top, low = self.y.max(0).values, self.y.mean(0)
        return torch.stack([torch.stack([top[0], low[1]]), torch.stack([low[0], top[1]])]).unsqueeze(0)


@dataclass(frozen=True)
class Case:
    """One acquisition class: how to build it, of how many outputs, for how many points at once.

    Attributes:
        build: From a `Problem`.
        outputs: Of the model.
        q: Points of each t-batch that are asked for.
        augmented: Points that a one-shot optimisation appends.
        columns: Of the inputs that it takes.
        shape: Of the value of one t-batch.
    """

    build: Callable[[Problem], Any]
    outputs: int = 1
    q: int = 1
    augmented: int = 0
    columns: int = 2
    shape: tuple[int, ...] = ()


def registered(kind: type, **settings: Any) -> Callable[[Problem], Any]:
    """Built by BoTorch's own input constructor of the class."""

    def build(p: Problem) -> Any:
        given = {"training_data": p.data, "bounds": [(0.0, 1.0), (0.0, 1.0)], **settings}
        given = {
            name: value(p) if callable(value) and name in _FROM_PROBLEM else value for name, value in given.items()
        }
        return kind(**get_acqf_input_constructor(kind)(model=p.model, **given))

    return build


_FROM_PROBLEM = {"objective_thresholds", "best_f", "ref_point"}


def from_factory(name: str, **settings: Any) -> Callable[[Problem], Any]:
    """Built by `get_acquisition_function`."""

    def build(p: Problem) -> Any:
        several = {"ref_point": p.y.min(0).values, "Y": p.y} if p.y.shape[-1] > 1 and "HVI" in name else {}
        objective = IdentityMCMultiOutputObjective() if several else settings.get("objective", IdentityMCObjective())
        rest = {k: v for k, v in settings.items() if k != "objective"}
        return get_acquisition_function(
            name, p.model, objective, p.x, mc_samples=SAMPLES.numel(), seed=0, **several, **rest
        )

    return build


def _thresholds(p: Problem) -> Tensor:
    return p.y.min(0).values


def _feasible(samples: Tensor) -> Tensor:
    """The second output is to be at most its typical value."""
    return samples[..., 1] - 0.5


def _candidates(p: Problem) -> Tensor:
    return torch.rand(20, 2, generator=torch.Generator().manual_seed(1), dtype=F64)


def _hypercells(p: Problem) -> Tensor:
    """Boxes below the front, (1, 2, boxes, 2), as multi-objective entropy searches take them."""
    low = p.y.min(0).values - 10.0
    return DominatedPartitioning(ref_point=low, Y=p.front[0]).hypercell_bounds.unsqueeze(0)


def _perturbed(p: Problem) -> Any:
    """Expected worst third over three shifts of each point: a risk measure over a random environment."""
    shifts = torch.tensor([[0.0, -0.1], [0.0, 0.0], [0.0, 0.1]], dtype=F64)
    p.model.input_transform = InputPerturbation(shifts).eval()
    try:
        return _WithTransform(p.model, acq.qSimpleRegret(p.model, sampler=_sampler(p), objective=CVaR(0.7, n_w=3)))
    except Exception:
        del p.model.input_transform
        raise


class _WithTransform:
    """An acquisition whose model has an input transform while it is used."""

    def __init__(self, model: Model, acquisition: Any) -> None:
        self.model, self.acquisition, self.transform = model, acquisition, model.input_transform
        del model.input_transform

    def __call__(self, x: Tensor) -> Tensor:
        self.model.input_transform = self.transform
        try:
            return self.acquisition(x)
        finally:
            del self.model.input_transform


def _sampler(p: Problem) -> Any:
    from botorch.sampling.get_sampler import get_sampler

    return get_sampler(p.model.posterior(p.x[:1]), SAMPLES, seed=0)


def _project(x: Tensor) -> Tensor:
    """To the highest fidelity."""
    return torch.cat([x[..., :1], torch.ones_like(x[..., 1:])], -1)


def _utility() -> Any:
    return acq.cost_aware.InverseCostWeightedUtility(AffineFidelityCostModel({1: 1.0}, fixed_cost=0.5))


def _first() -> Any:
    return LinearMCObjective(torch.tensor([1.0, 0.0], dtype=F64))


def _scaled() -> Any:
    return ScalarizedPosteriorTransform(torch.tensor([0.3, 0.7], dtype=F64))


CASES: dict[str, Case] = {
    # one output, from the registry
    "PosteriorMean": Case(registered(analytic.PosteriorMean)),
    "ExpectedImprovement": Case(registered(analytic.ExpectedImprovement)),
    "LogExpectedImprovement": Case(registered(analytic.LogExpectedImprovement)),
    "ProbabilityOfImprovement": Case(registered(analytic.ProbabilityOfImprovement)),
    "LogProbabilityOfImprovement": Case(registered(analytic.LogProbabilityOfImprovement)),
    "UpperConfidenceBound": Case(registered(analytic.UpperConfidenceBound)),
    "NoisyExpectedImprovement": Case(registered(analytic.NoisyExpectedImprovement)),
    "LogNoisyExpectedImprovement": Case(registered(LogNoisyExpectedImprovement)),
    "ScalarizedPosteriorMean": Case(
        lambda p: analytic.ScalarizedPosteriorMean(p.model, torch.tensor([0.3, 0.7], dtype=F64)), q=2
    ),
    "PosteriorStandardDeviation": Case(lambda p: analytic.PosteriorStandardDeviation(p.model)),
    "qAnalyticProbabilityOfImprovement": Case(lambda p: qAnalyticProbabilityOfImprovement(p.model, p.best), q=2),
    "qMaxValueEntropy": Case(registered(qMaxValueEntropy, candidate_size=20)),
    "qMaxValueEntropy, pending": Case(lambda p: qMaxValueEntropy(p.model, _candidates(p), 4, X_pending=p.x[:1] * 0.5)),
    "qLowerBoundMaxValueEntropy": Case(lambda p: qLowerBoundMaxValueEntropy(p.model, _candidates(p))),
    "qLowerBoundMaxValueEntropy, pending": Case(
        lambda p: qLowerBoundMaxValueEntropy(p.model, _candidates(p), X_pending=p.x[:1] * 0.5)
    ),
    "qJointEntropySearch": Case(registered(qJointEntropySearch, num_optima=3), q=2),
    "qJointEntropySearch, noisy": Case(registered(qJointEntropySearch, num_optima=3, condition_noiseless=False), q=2),
    "qPredictiveEntropySearch": Case(lambda p: qPredictiveEntropySearch(p.model, p.x[:3])),
    "qMultiFidelityMaxValueEntropy": Case(
        registered(qMultiFidelityMaxValueEntropy, target_fidelities={1: 1.0}, num_fantasies=2, candidate_size=20)
    ),
    "qMultiFidelityLowerBoundMaxValueEntropy": Case(
        lambda p: qMultiFidelityLowerBoundMaxValueEntropy(
            p.model, _candidates(p), cost_aware_utility=_utility(), project=_project
        )
    ),
    "qKnowledgeGradient": Case(registered(qKnowledgeGradient, num_fantasies=4), q=2, augmented=4),
    "qKnowledgeGradient, by samples": Case(
        lambda p: qKnowledgeGradient(p.model, 4, objective=GenericMCObjective(lambda y, X=None: y[..., 0] ** 3)),
        augmented=4,
    ),
    "qMultiFidelityKnowledgeGradient": Case(
        lambda p: qMultiFidelityKnowledgeGradient(p.model, 4, cost_aware_utility=_utility(), current_value=p.best),
        augmented=4,
    ),
    "qMultiStepLookahead": Case(
        lambda p: qMultiStepLookahead(p.model, [1, 1], num_fantasies=[2, 2]), augmented=2 * 1 + 4 * 1
    ),
    "qNegIntegratedPosteriorVariance": Case(registered(acq.qNegIntegratedPosteriorVariance, num_mc_points=8), q=2),
    "PairwiseMCPosteriorVariance": Case(
        lambda p: PairwiseMCPosteriorVariance(p.model, objective=IdentityMCObjective(), sampler=_sampler(p)), q=2
    ),
    "qBayesianActiveLearningByDisagreement": Case(
        registered(bayesian_active_learning.qBayesianActiveLearningByDisagreement)
    ),
    "PathwiseThompsonSampling": Case(lambda p: PathwiseThompsonSampling(p.model), q=2),
    "AnalyticExpectedUtilityOfBestOption": Case(lambda p: AnalyticExpectedUtilityOfBestOption(p.model), q=2),
    "qExpectedUtilityOfBestOption": Case(lambda p: qExpectedUtilityOfBestOption(p.model, sampler=_sampler(p)), q=2),
    "PairwiseBayesianActiveLearningByDisagreement": Case(
        lambda p: PairwiseBayesianActiveLearningByDisagreement(p.model, num_samples=32), q=2
    ),
    # one output, from the factory
    "qExpectedImprovement": Case(from_factory("qEI"), q=2),
    "qLogExpectedImprovement": Case(from_factory("qLogEI"), q=2),
    "qLogExpectedImprovement, pending": Case(from_factory("qLogEI", X_pending=torch.full((1, 2), 0.4, dtype=F64)), q=2),
    "qProbabilityOfImprovement": Case(from_factory("qPI"), q=2),
    "qNoisyExpectedImprovement": Case(from_factory("qNEI"), q=2),
    "qLogNoisyExpectedImprovement": Case(from_factory("qLogNEI"), q=2),
    "qLogNoisyExpectedImprovement, pending": Case(
        from_factory("qLogNEI", X_pending=torch.full((1, 2), 0.4, dtype=F64)), q=2
    ),
    "qSimpleRegret": Case(from_factory("qSR"), q=2),
    "qUpperConfidenceBound": Case(from_factory("qUCB", beta=0.3), q=2),
    "qLowerConfidenceBound": Case(lambda p: acq.qLowerConfidenceBound(p.model, 0.3, sampler=_sampler(p)), q=2),
    "qPosteriorStandardDeviation": Case(
        lambda p: acq.monte_carlo.qPosteriorStandardDeviation(p.model, sampler=_sampler(p)), q=2
    ),
    "CVaR over a random environment": Case(_perturbed, q=2),
    "expectation over a random environment": Case(lambda p: _environment(p), q=1),
    # wrappers
    "FixedFeatureAcquisitionFunction": Case(
        lambda p: fixed_feature.FixedFeatureAcquisitionFunction(from_factory("qLogEI")(p), 2, [1], [0.5]),
        q=2,
        columns=1,
    ),
    "PenalizedAcquisitionFunction": Case(
        lambda p: penalized.PenalizedAcquisitionFunction(
            analytic.LogExpectedImprovement(p.model, p.best), penalized.L2Penalty(p.x[0]), 0.1
        )
    ),
    "PriorGuidedAcquisitionFunction": Case(
        lambda p: PriorGuidedAcquisitionFunction(from_factory("qEI")(p), _Bump()), q=2
    ),
    "ProximalAcquisitionFunction": Case(
        lambda p: ProximalAcquisitionFunction(analytic.ExpectedImprovement(p.model, p.best), torch.ones(2, dtype=F64))
    ),
    # constraints on a second output
    "LogConstrainedExpectedImprovement": Case(
        registered(
            analytic.LogConstrainedExpectedImprovement,
            objective_index=0,
            constraints_tuple=(torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([[0.5]], dtype=F64)),
            best_f=lambda p: p.best,
        ),
        outputs=2,
    ),
    "ConstrainedExpectedImprovement": Case(
        lambda p: analytic.ConstrainedExpectedImprovement(p.model, p.best, 0, {1: (None, 0.5)}), outputs=2
    ),
    "LogProbabilityOfFeasibility": Case(
        registered(
            analytic.LogProbabilityOfFeasibility,
            constraints_tuple=(torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([[0.5]], dtype=F64)),
        ),
        outputs=2,
    ),
    "qLogProbabilityOfFeasibility": Case(
        lambda p: qLogProbabilityOfFeasibility(p.model, [_feasible], sampler=_sampler(p)), outputs=2, q=2
    ),
    "qLogExpectedImprovement, constrained": Case(
        from_factory(
            "qLogEI", objective=LinearMCObjective(torch.tensor([1.0, 0.0], dtype=F64)), constraints=[_feasible]
        ),
        outputs=2,
        q=2,
    ),
    "qLogNoisyExpectedImprovement, constrained": Case(
        from_factory("qLogNEI", objective=_first(), constraints=[_feasible]),
        outputs=2,
        q=2,
    ),
    # several objectives
    "LogExpectedImprovement, scalarised": Case(
        lambda p: analytic.LogExpectedImprovement(p.model, p.best, posterior_transform=_scaled()), outputs=2
    ),
    "ExpectedHypervolumeImprovement": Case(
        registered(multi_objective.ExpectedHypervolumeImprovement, objective_thresholds=_thresholds), outputs=2
    ),
    "qExpectedHypervolumeImprovement": Case(from_factory("qEHVI"), outputs=2, q=2),
    "qLogExpectedHypervolumeImprovement": Case(from_factory("qLogEHVI"), outputs=2, q=2),
    "qNoisyExpectedHypervolumeImprovement": Case(from_factory("qNEHVI"), outputs=2, q=2),
    "qLogNoisyExpectedHypervolumeImprovement": Case(from_factory("qLogNEHVI"), outputs=2, q=2),
    "qLogNParEGO": Case(lambda p: _parego(p), outputs=2, q=2),
    "qHypervolumeKnowledgeGradient": Case(
        lambda p: qHypervolumeKnowledgeGradient(p.model, _thresholds(p), num_fantasies=2, num_pareto=2),
        outputs=2,
        augmented=4,
    ),
    "qMultiFidelityHypervolumeKnowledgeGradient": Case(
        lambda p: qMultiFidelityHypervolumeKnowledgeGradient(
            p.model,
            _thresholds(p),
            {1: 1.0},
            num_fantasies=2,
            num_pareto=2,
            cost_aware_utility=_utility(),
            current_value=torch.zeros((), dtype=F64),
        ),
        outputs=2,
        augmented=4,
    ),
    "qLowerBoundMultiObjectiveJointEntropySearch": Case(
        lambda p: qLowerBoundMultiObjectiveJointEntropySearch(p.model, p.x[:2].unsqueeze(0), p.front, _hypercells(p)),
        outputs=2,
        q=2,
    ),
    "qLowerBoundMultiObjectiveMaxValueEntropySearch": Case(
        lambda p: qLowerBoundMultiObjectiveMaxValueEntropySearch(p.model, _hypercells(p)), outputs=2, q=2
    ),
    "qMultiObjectivePredictiveEntropySearch": Case(
        lambda p: qMultiObjectivePredictiveEntropySearch(p.model, p.x[:2].unsqueeze(0)), outputs=2
    ),
    "MOMF": Case(
        lambda p: MOMF(
            p.model,
            _thresholds(p),
            NondominatedPartitioning(ref_point=_thresholds(p), Y=p.y),
            sampler=_sampler(p),
            cost_call=lambda x: 0.5 + x[..., 1:].sum(-2).unsqueeze(-1),
        ),
        outputs=2,
        q=2,
    ),
    "MultiOutputPosteriorMean": Case(lambda p: MultiOutputPosteriorMean(p.model), outputs=2, shape=(2,)),
    # ours
    "ours: LogExpectedImprovement": Case(lambda p: ours.LogExpectedImprovement(p.model, p.best)),
    "ours: ExpectedImprovement": Case(lambda p: ours.ExpectedImprovement(p.model, p.best)),
    "ours: LogProbabilityOfImprovement": Case(lambda p: ours.LogProbabilityOfImprovement(p.model, p.best)),
    "ours: ProbabilityOfImprovement": Case(lambda p: ours.ProbabilityOfImprovement(p.model, p.best)),
    "ours: BALD": Case(lambda p: ours.BALD(p.model), q=2),
}


class _Bump(torch.nn.Module):
    """A belief about where the optimum lies."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., q) from (..., q, d)."""
        return torch.exp(-(x - 0.5).square().sum(-1))


def _environment(p: Problem) -> Any:
    """Expected improvement of the mean over three shifts of the second column."""
    shifts = torch.tensor([[0.0, -0.1], [0.0, 0.0], [0.0, 0.1]], dtype=F64)
    p.model.input_transform = InputPerturbation(shifts).eval()
    try:
        return _WithTransform(
            p.model,
            acq.qLogExpectedImprovement(
                p.model,
                p.best,
                sampler=_sampler(p),
                objective=GenericMCObjective(lambda y, X=None: y.unflatten(-2, (-1, 3)).mean(-2).squeeze(-1)),
            ),
        )
    except Exception:
        del p.model.input_transform
        raise


def _parego(p: Problem) -> Any:
    weights = torch.tensor([0.4, 0.6], dtype=F64)
    return qLogNParEGO(p.model, p.x, scalarization_weights=weights, sampler=_sampler(p), prune_baseline=False)


# What cannot be, and why: a pattern for the acquisition, a view or kind ("" for any), a pattern for the error.
NEEDS_GAUSSIAN = r"view='gaussian'"
REFUSALS: list[tuple[str, str, str, str]] = [
    (r"^(Log)?NoisyExpectedImprovement$", "", r"SingleTaskGP", "refits a SingleTaskGP of known noise to each fantasy"),
    (r"^qBayesianActiveLearningByDisagreement$", "", r"[Ff]ully [Bb]ayesian|SaasFully", "ours: BALD, on members"),
    (r"HypervolumeKnowledgeGradient$", "whole", r"ModelList", "takes lists of models: fuse posteriors of one output"),
    (r"^AnalyticExpectedUtility", "", r"datapoints", "takes a PairwiseGP"),
    (r"^ours: BALD$", "gaussian", r"view='samples'", "needs members"),
    (
        r"^(qAnalyticProbability|q(MultiObjective)?Predictive|PairwiseBayesian|ours: .*Improvement|qMaxValueEntropy|"
        r"qLowerBoundMaxValueEntropy, pending|qJointEntropy|qMultiFidelity(LowerBound)?MaxValue|"
        r"qLowerBoundMultiObjective)",
        "samples",
        NEEDS_GAUSSIAN,
        "a formula for Gaussians",
    ),
]


# Slopes that are not those of the value, with BoTorch's own SingleTaskGP too, and why.
INEXACT_SLOPES = {
    "qPredictiveEntropySearch": "expectation propagation is not differentiated",
    "qMultiObjectivePredictiveEntropySearch": "expectation propagation is not differentiated",
    "PairwiseBayesianActiveLearningByDisagreement": "draws anew at each call",
}


# Where a draw has no feasible baseline point, BoTorch takes for it a value that it estimates at random at each call.
RANDOM_WHERE_INFEASIBLE = {
    "qLogNoisyExpectedImprovement, constrained": "draws of no feasible point are valued at random",
}


# Slopes of BoTorch's own that are not numbers at some points, with SingleTaskGP too.
UNSTEADY = ("qAnalyticProbabilityOfImprovement", "qMultiObjectivePredictiveEntropySearch")


def refusal(name: str, view: str) -> tuple[str, str] | None:
    """The error that `name` on this view is known to raise, as a pattern, and the reason; None where it works."""
    for pattern, only, error, reason in REFUSALS:
        if re.search(pattern, name) and (only in view or (only == "whole" and "fused" not in view)):
            return error, reason
    return None


def data(outputs: int, n: int = 8) -> tuple[Tensor, Tensor]:
    """x (n, 2) in the unit square; y (n, outputs) with noise, the first largest inside, the second falling."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, generator=g, dtype=F64)
    noise = 0.05 * torch.randn(n, 2, generator=g, dtype=F64)
    first = torch.sin(3.0 * x[:, 0]) * torch.cos(2.0 * x[:, 1] - 0.7)
    second = 1.0 - x[:, 0] + 0.5 * x[:, 1].square()
    return x, (torch.stack([first, second], -1) + noise)[:, :outputs]


def engines(quick: bool) -> dict[str, Any]:
    """An engine for every form of posterior, with settings small enough for a test."""
    kernels, bnn = bdl.kernels, bdl.BNN(hidden=(8,), activation="tanh")
    matern = bdl.GP(kernels.Scale(kernels.Matern(nu=2.5)))
    small = {"num_starts": 1}
    chains = {"num_chains": 2, "num_warmup": 60, "num_draws": 30}
    table = {
        "ExactGP Matern": bdl.ExactGP(matern, **small),
        "ScaleMixture": bdl.ScaleMixture(matern, **small),
        "HMC": bdl.HMC(bnn, num_steps=8, **chains),
    }
    if quick:
        return table
    solver = SolverConfig(tolerance=1e-10, variance_tolerance=1e-10)
    return table | {
        "ExactGP RBF": bdl.ExactGP(bdl.GP(kernels.Scale(kernels.RBF())), **small),
        "NNGP": bdl.ExactGP(bdl.GP(kernels.NNGP(depth=3, activation="erf")), **small),
        "ScaleMixture, noise outside": bdl.ScaleMixture(matern, noise="fixed", num_nodes=16, **small),
        "SparseGP": bdl.SparseGP(matern, num_inducing=6),
        "matrix-free ExactGP": bdl.ExactGP(matern, solver=solver, **small),
        "NUTS": bdl.NUTS(bnn, max_depth=5, **chains),
        "SGHMC": bdl.SGHMC(bnn, num_chains=2, num_warmup=200, num_draws=30, thin=5),
        "Ensemble": bdl.Ensemble(bnn, num_members=20, num_steps=200),
        "PFN": bdl.PFN.from_pretrained("gp"),
    }


@dataclass(frozen=True)
class Outcome:
    """What came of one acquisition on one model.

    Attributes:
        status: "ok", "refused", or what is wrong.
        detail: The reason of a refusal, or figures.
        gradient_error: Between autograd and finite differences, relative to the size of the slope.
    """

    status: str
    detail: str = ""
    gradient_error: float = float("nan")


def try_out(name: str, problem: Problem, view: str, *, optimize: bool = True) -> Outcome:
    """Build, evaluate at three t-batches, compare a slope with finite differences, and take a step of optimisation."""
    case, known = CASES[name], refusal(name, view)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch speaks of float32, of legacy classes, of line searches that end early
        try:
            acquisition = case.build(problem)
            g = torch.Generator().manual_seed(7)
            x = torch.rand(3, case.q + case.augmented, case.columns, generator=g, dtype=F64)
            value = acquisition(x)
        except Exception as error:
            if known is not None and re.search(known[0], str(error)):
                return Outcome("refused", known[1])
            return Outcome("failed", f"{type(error).__name__}: {error}"[:300])
        if known is not None:
            return Outcome("unexpected", f"should be refused: {known[1]}")
        if value.shape != (3, *case.shape) or not bool(value.isfinite().all()):
            return Outcome("wrong", f"values {tuple(value.shape)} {value.tolist()}"[:300])
        random = name in RANDOM_WHERE_INFEASIBLE and not torch.equal(acquisition(x), acquisition(x))
        gap = float("nan") if random or name in INEXACT_SLOPES else slope_gap(acquisition, x, g)
        if gap > 5e-3:
            return Outcome("gradient", f"off by {gap:.1e}", gap)
        if optimize and name not in UNSTEADY and not isinstance(acquisition, _WithTransform) and not case.shape:
            try:
                point, height = one_step(acquisition, case)
            except Exception as error:
                return Outcome("optimize", f"{type(error).__name__}: {error}"[:300], gap)
            if point.shape[-1] != case.columns or not bool(height.isfinite().all()):
                return Outcome("optimize", f"{tuple(point.shape)}, {height.tolist()}", gap)
    return Outcome("ok", RANDOM_WHERE_INFEASIBLE[name] if random else "", gap)


def slope_gap(acquisition: Any, x: Tensor, g: torch.Generator) -> float:
    """Slope along one direction by autograd less that by central differences, over their size; the best of three steps.

    Acquisitions of members have kinks, where a difference across one says nothing: a smaller step decides.
    """
    direction = torch.randn(x.shape, generator=g, dtype=F64)
    point = x.clone().requires_grad_()
    value = acquisition(point)
    if not value.requires_grad:
        return float("inf")
    (slope,) = torch.autograd.grad(value.sum(), point)
    told = float((slope * direction).sum())
    gaps = []
    for h in (1e-4, 1e-5, 1e-6):
        with torch.no_grad():
            rise = float((acquisition(x + h * direction) - acquisition(x - h * direction)).sum()) / (2 * h)
        typical = float(slope.norm() * direction.norm()) / slope.numel() ** 0.5
        size = max(abs(rise), abs(told), typical, 1e-3 * float(value.detach().abs().sum()), 1e-6)
        gaps.append(abs(rise - told) / size)
    return min(gaps)


def one_step(acquisition: Any, case: Case) -> tuple[Tensor, Tensor]:
    """`optimize_acqf` with one restart and one iteration."""
    settings: dict[str, Any] = {"options": {"maxiter": 1, "batch_limit": 4}}
    if case.augmented:  # starts of our own: BoTorch's heuristics would optimise the inner problem first
        g = torch.Generator().manual_seed(3)
        q = case.q + case.augmented
        settings["batch_initial_conditions"] = torch.rand(1, q, 2, generator=g, dtype=F64)
        settings["return_full_tree"] = True
    return optimize_acqf(acquisition, BOUNDS[:, : case.columns], q=case.q, num_restarts=1, raw_samples=4, **settings)


def posterior_models(kind: str, x: Tensor, y: Tensor, *, num_samples: int = 32) -> dict[str, Model]:
    """Both views of the posterior of one of the `engines`."""
    posterior = engines(False)[kind].fit(x, y, seed=0)
    return {view: posterior.to_botorch(view, num_samples=num_samples) for view in ("gaussian", "samples")}
