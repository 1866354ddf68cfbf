"""Improvement under the marginal predictive of a network, in closed form.

A network's joint draws take a call of it for every point that they visit, and Monte Carlo acquisitions ask for a joint
law at every step of their optimiser. For one point at a time the marginals say all that is needed: of one objective,
and of several whose laws are independent of each other, which a network's are.
"""

from __future__ import annotations

from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.utils.multi_objective.box_decompositions import FastNondominatedPartitioning
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional

from bayesdl.distributions.improvement import log_expected_improvement, log_probability_of_improvement
from bayesdl.interop._botorch_acquisition import _reflected
from bayesdl.interop._botorch_laws import is_regression
from bayesdl.interop._botorch_models import GaussianModel
from bayesdl.interop._optuna_acquisition import MOST_HYPERVOLUME, Search, reference_point
from bayesdl.interop._optuna_record import Record
from bayesdl.interop._optuna_space import Encoding
from bayesdl.interop.botorch import to_botorch
from bayesdl.posterior import AmortizedPosterior, Posterior


def applies(posterior: Posterior, record: Record, acquisition: Any, sought: Any) -> bool:
    """Whether "auto" means this: a network's regression, few objectives, and their values are what is sought."""
    network = isinstance(posterior, AmortizedPosterior) and is_regression(posterior)
    return network and acquisition == "auto" and sought is None and record.y.shape[-1] <= MOST_HYPERVOLUME


def widened(search: Search) -> Search:
    """Many points at once cost a network little more than one, a step of a search costs it the same again."""
    return search._replace(num_candidates=8 * search.num_candidates, max_steps=6)


class MarginalImprovement(AcquisitionFunction):
    r"""Log expected gain of dominated hypervolume plus sum_i log P(c_i(x) <= 0), at coordinates z (*t, 1, p).

    What is not dominated yet is cut into boxes (l, u) of which each objective may fill a part on its own, so that

        E[gain] = sum over boxes of prod_j (E[(f_j(x) - l_j)+] - E[(f_j(x) - u_j)+])

    for independent objectives f_j of any law. One objective has one box, from the best value upwards, and its gain is
    E[(f(x) - best)+].

    Args:
        model: The Gaussian view of the posterior of the objectives and the constraints, in this order.
        encoding: From coordinates to the inputs of the model.
        boxes: l and u, each (C, m); None where nothing is feasible yet, and feasibility is sought alone.
        num_objectives: m.

    Reference: Gardner et al. (2014), "Bayesian Optimization with Inequality Constraints"; for boxes and normal laws
    Yang, Emmerich, Deutz, Baeck (2019), "Efficient computation of expected hypervolume improvement using box
    decomposition algorithms".
    """

    _log = True

    def __init__(
        self, model: GaussianModel, encoding: Encoding, boxes: tuple[Tensor, Tensor] | None, num_objectives: int
    ) -> None:
        super().__init__(model)
        self._encoding, self._boxes, self._num_objectives = encoding, boxes, num_objectives

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """(*t)."""
        law, m = self.model.predictive(self._encoding.expand(X)), self._num_objectives
        value = X.new_zeros(X.shape[:-2])
        if self._boxes is not None:
            value = value + _log_gain(law, *self._boxes)
        if self.model.num_outputs == m:
            return value
        return value + log_probability_of_improvement(_reflected(law), 0.0)[..., 0, m:].sum(-1)


def _log_gain(law: Distribution, lower: Tensor, upper: Tensor) -> Tensor:
    """Log of the sum over boxes (C, m) for a law of batch shape (*t, 1, m + k), whose first m outputs count: (*t)."""
    m, others = lower.shape[-1], law.batch_shape[-1] - lower.shape[-1]

    def log_rise(threshold: Tensor) -> Tensor:
        return log_expected_improvement(law, functional.pad(threshold, (0, others)))[..., :m]

    log_part = log_rise(lower)
    bounded = upper.isfinite()
    if bool(bounded.any()):
        beyond = (log_rise(torch.where(bounded, upper, lower + 1.0)) - log_part).exp()
        log_part = log_part + torch.log1p(-torch.where(bounded, beyond, 0.0).clamp(0.0, 1 - 1e-12))
    return torch.logsumexp(log_part.sum(-1), -1)


def build(
    posterior: Posterior, record: Record, encoding: Encoding, worst: tuple[float, ...] | None = None
) -> MarginalImprovement:
    """Beyond the best of the means of f where it was feasible; pending points are believed to come out as theirs.

    Args:
        worst: The reference point of several objectives; None for one a little worse than the observed front.
    """
    m = record.y.shape[-1]
    with torch.no_grad():
        if len(record.pending):
            x = encoding.expand(record.pending)
            posterior = posterior.condition_on(x, posterior.predict(x, noise=False).mean)
        model = to_botorch(posterior, view="gaussian")
        feasible = (record.constraints <= 0).all(-1)
        boxes = None
        if bool(feasible.any()):
            means = model.predictive(encoding.expand(record.z[feasible]).unsqueeze(-2)).mean[:, 0, :m]
            point = torch.tensor(worst) if worst is not None else reference_point(record) if m > 1 else means[0]
            boxes = _undominated(means, point)
    return MarginalImprovement(model, encoding, boxes, m)


def _undominated(means: Tensor, worst: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes, each (C, m), of what is better than the reference point and not dominated by the means (n, m)."""
    if means.shape[-1] == 1:
        best = means.max().reshape(1, 1)
        return best, torch.full_like(best, torch.inf)
    lower, upper = FastNondominatedPartitioning(worst.to(means), means).get_hypercell_bounds()
    return lower, upper
