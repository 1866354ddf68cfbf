r"""Acquisition functions that BoTorch lacks, for what only these posteriors know.

Improvement in closed form under the predictive distribution that the posterior really has (Student-t, mixtures), where
BoTorch's own formulas take any posterior for a Gaussian; and BALD for members, the information that y at x gives about
which member is right, which BoTorch has for fully Bayesian GPs only.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.exceptions.errors import UnsupportedError
from botorch.utils.transforms import concatenate_pending_points, t_batch_mode_transform
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayesdl.distributions import BarDistribution, GaussianMixture, StudentT
from bayesdl.distributions.improvement import (
    expected_improvement,
    log_expected_improvement,
    log_probability_of_improvement,
)
from bayesdl.errors import SettingError, fail
from bayesdl.interop._botorch_laws import is_regression
from bayesdl.interop._botorch_member_model import MemberModel
from bayesdl.interop._botorch_models import GaussianModel

_CHUNK = 2**22  # numbers of one (S, S, noise) block: 32 MB in float64


class _Improvement(AcquisitionFunction):
    """A function of the predictive distribution of f at one point and of a threshold."""

    _log: ClassVar[bool] = False  # how BoTorch averages values over ensembles

    def __init__(self, model: GaussianModel, best_f: float | Tensor, maximize: bool = True) -> None:
        super().__init__(model)
        if not isinstance(model, GaussianModel):
            fix = "posterior.to_botorch(view='gaussian'); for members BoTorch's qLogExpectedImprovement, which smooths"
            wanted = "model must be the Gaussian view of a posterior."
            fail(SettingError, type(self).__name__, wanted, got=type(model).__name__, fix=fix)
        if model.num_outputs != 1:
            raise UnsupportedError(f"{type(self).__name__} is for one output, not {model.num_outputs}")
        self.register_buffer("best_f", torch.as_tensor(best_f, dtype=torch.float64))
        self.maximize = maximize

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """(*t) at X (*t, 1, d)."""
        predictive, best = self.model.predictive(X), self.best_f.to(X)
        if not self.maximize:
            predictive, best = _reflected(predictive), -best
        threshold = best.reshape(*best.shape, 1, 1)
        return self._value(predictive, threshold).squeeze(-1).squeeze(-1)


class LogExpectedImprovement(_Improvement):
    r"""log E[(f(x) - best_f)+], in closed form for Normal, Student-t, Gaussian mixture and bar predictives.

    A Student-t process of n points has heavier tails than the Gaussian of the same mean and variance, so that it
    explores more while n is small.

    Args:
        model: `posterior.to_botorch(view="gaussian")`, of one output.
        best_f: What is to be improved on: a number, or one for each element of the model's batch.
        maximize: False for E[(best_f - f(x))+].
    """

    _log = True

    def _value(self, predictive: torch.distributions.Distribution, threshold: Tensor) -> Tensor:
        return log_expected_improvement(predictive, threshold)


class ExpectedImprovement(_Improvement):
    """E[(f(x) - best_f)+]; see `LogExpectedImprovement`, whose gradient does not vanish far from improvement."""

    def _value(self, predictive: torch.distributions.Distribution, threshold: Tensor) -> Tensor:
        return expected_improvement(predictive, threshold)


class LogProbabilityOfImprovement(_Improvement):
    """log P(f(x) > best_f); see `LogExpectedImprovement`."""

    _log = True

    def _value(self, predictive: torch.distributions.Distribution, threshold: Tensor) -> Tensor:
        return log_probability_of_improvement(predictive, threshold)


class ProbabilityOfImprovement(_Improvement):
    """P(f(x) > best_f); see `LogProbabilityOfImprovement`."""

    def _value(self, predictive: torch.distributions.Distribution, threshold: Tensor) -> Tensor:
        return log_probability_of_improvement(predictive, threshold).exp()


class BALD(AcquisitionFunction):
    r"""Bayesian active learning by disagreement: the information that y at X carries about which member is right.

        I(y; s) = H[y] - E_s H[y | s] = E_s E_{y | s} log p(y | s) / (mean_s' p(y | s'))

    Regression takes the inner expectation over quasi-random noise, the same at every call, and any number of points
    jointly; a classification sums over its classes and takes one point. Between 0 and log S, up to the error of the
    quasi-random numbers.

    Args:
        model: `posterior.to_botorch(view="samples")`.
        num_noise: Noise vectors for each member.
        X_pending: Points whose y will be known; they count with X.

    Cost: O(S^2 num_noise q m) for each t-batch.

    Reference: Houlsby, Huszár, Ghahramani, Lengyel (2011), arXiv 1112.5745.
    """

    def __init__(self, model: MemberModel, num_noise: int = 2, X_pending: Tensor | None = None) -> None:
        super().__init__(model)
        if not isinstance(model, MemberModel):
            wanted = "model must be the view of a posterior by members."
            fail(SettingError, "BALD", wanted, got=type(model).__name__, fix="posterior.to_botorch(view='samples')")
        self.num_noise = num_noise
        self.set_X_pending(X_pending)

    @concatenate_pending_points
    @t_batch_mode_transform()
    def forward(self, X: Tensor) -> Tensor:
        """(*t) at X (*t, q, d)."""
        source = self.model.sources[0]
        if is_regression(source):
            posterior = self.model.posterior(X, observation_noise=True)
            return _gaussian_information(posterior.values, posterior.noise_variance, self.num_noise)
        if X.shape[-2] != 1:
            raise UnsupportedError("BALD of a classification is for one point at a time; use sequential=True")
        logits = self.model.posterior(X).values.squeeze(-2)  # (*t, S, outputs)
        if source.model.likelihood.task == "binary":
            logits = torch.stack([torch.zeros_like(logits), logits], -1)  # (*t, S, k, 2)
        else:
            logits = logits.unsqueeze(-2)
        log_p = torch.log_softmax(logits, -1)
        mean = torch.logsumexp(log_p, -3, keepdim=True) - math.log(log_p.shape[-3])
        return (log_p.exp() * (log_p - mean)).sum(-1).mean(-2).sum(-1)


def _gaussian_information(values: Tensor, variance: Tensor, num_noise: int) -> Tensor:
    """I(y; s) for y = f_s + noise: values (*t, S, q, m), variance broadcasting with them -> (*t)."""
    num, event = values.shape[-3], values.shape[-2:].numel()
    f = values.flatten(-2)  # (*t, S, e)
    root = variance.expand_as(values).sqrt().flatten(-2)
    uniform = SobolEngine(event, scramble=True, seed=0).draw(num * num_noise, dtype=torch.float64)
    z = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)).to(values).reshape(num, num_noise, event)
    lead, step = f.shape[:-2], max(1, _CHUNK // (num * num * num_noise * event))
    pairs = zip(f.reshape(-1, num, event).split(step), root.reshape(-1, num, event).split(step), strict=True)
    return torch.cat([_mean_log_ratio(part, width, z) for part, width in pairs]).reshape(lead)


def _mean_log_ratio(f: Tensor, root: Tensor, z: Tensor) -> Tensor:
    """Mean of log p(y | s) / mean_s' p(y | s') over y = f_s + root_s z: f and root (B, S, e), z (S, N, e) -> (B)."""
    y = f.unsqueeze(-2) + root.unsqueeze(-2) * z  # (B, S, N, e)
    gap = (y.unsqueeze(-4) - f[:, :, None, None]) / root[:, :, None, None]  # (B, S', S, N, e)
    width = root.log().sum(-1)  # (B, S)
    others = -0.5 * gap.square().sum(-1) - width[:, :, None, None]
    own = -0.5 * z.square().sum(-1) - width.unsqueeze(-1)
    return (own - torch.logsumexp(others, 1) + math.log(f.shape[1])).mean((-2, -1))


def _reflected(d: torch.distributions.Distribution) -> torch.distributions.Distribution:
    """The distribution of -Y."""
    if isinstance(d, StudentT):
        return StudentT(d.dof, -d.loc, d.scale, validate_args=False)
    if isinstance(d, BarDistribution):
        return d.reflected()
    if isinstance(d, GaussianMixture):
        return GaussianMixture._of(-d.loc, d.scale, d.weights)
    return type(d)(-d.loc, d.scale, validate_args=False)
