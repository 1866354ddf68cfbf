"""Improvement under the marginal predictive of a network, in closed form.

A network's joint draws take a call of it for every point that they visit, and Monte Carlo acquisitions ask for a joint
law at every step of their optimiser. For one objective and one point at a time the marginal says all that is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor

from bayesdl.distributions.improvement import log_expected_improvement, log_probability_of_improvement
from bayesdl.interop._botorch_acquisition import _reflected
from bayesdl.interop._botorch_laws import is_regression
from bayesdl.interop._botorch_models import GaussianModel
from bayesdl.interop._optuna_acquisition import Search
from bayesdl.interop._optuna_record import Record
from bayesdl.interop._optuna_space import Encoding
from bayesdl.interop.botorch import to_botorch
from bayesdl.posterior import AmortizedPosterior, Posterior


def applies(posterior: Posterior, record: Record, acquisition: Any, sought: Any) -> bool:
    """Whether "auto" means this: a network's regression, one objective, and its values are what is sought."""
    network = isinstance(posterior, AmortizedPosterior) and is_regression(posterior)
    return network and acquisition == "auto" and sought is None and record.y.shape[-1] == 1


def widened(search: Search) -> Search:
    """Many points at once cost a network little more than one, a step of a search costs it the same again."""
    return search._replace(num_candidates=8 * search.num_candidates, max_steps=6)


class MarginalImprovement(AcquisitionFunction):
    r"""log E[(f(x) - best)+] + sum_i log P(c_i(x) <= 0) at coordinates z (*t, 1, p).

    Args:
        model: The Gaussian view of the posterior of the objective and the constraints, in this order.
        encoding: From coordinates to the inputs of the model.
        best: What is to be improved on; None where nothing is feasible yet, and feasibility is sought alone.

    Reference: Gardner et al. (2014), "Bayesian Optimization with Inequality Constraints".
    """

    _log = True

    def __init__(self, model: GaussianModel, encoding: Encoding, best: float | None) -> None:
        super().__init__(model)
        self._encoding, self._best = encoding, best

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """(*t)."""
        law = self.model.predictive(self._encoding.expand(X))
        value = X.new_zeros(X.shape[:-2])
        if self._best is not None:
            value = value + log_expected_improvement(law, self._best)[..., 0, 0]
        if self.model.num_outputs == 1:
            return value
        return value + log_probability_of_improvement(_reflected(law), 0.0)[..., 0, 1:].sum(-1)


def build(posterior: Posterior, record: Record, encoding: Encoding) -> MarginalImprovement:
    """For the best mean of f where something feasible was evaluated; pending points are believed to come out as it."""
    with torch.no_grad():
        if len(record.pending):
            x = encoding.expand(record.pending)
            posterior = posterior.condition_on(x, posterior.predict(x, noise=False).mean)
        model = to_botorch(posterior, view="gaussian")
        feasible = (record.constraints <= 0).all(-1)
        best = None
        if bool(feasible.any()):
            means = model.predictive(encoding.expand(record.z[feasible]).unsqueeze(-2)).mean
            best = float(means[:, 0, 0].max())
    return MarginalImprovement(model, encoding, best)
