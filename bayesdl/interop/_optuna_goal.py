r"""What a search is after where that is not what an evaluation gives: the value at a target fidelity, or on average
over an environment.

Some coordinates c of a point (x, c) are chosen for an evaluation but do not count in the end. What counts is

    G(x) = R_j f(x, c_j),

for fixed c_1 ... c_N: N = 1 for a target fidelity; for an environment N quasi-random draws from its law, and R their
mean, value at risk or conditional value at risk. A posterior of f is one of G, and an acquisition function of G says
which x to ask about. The evaluation that is made for it is weighed by how much of G it reveals,

    log a(x, c) = log improvement of G at x  +  log |corr(y(x, c), G(x))|  -  log cost(x, c).

Reference: Huang, Allen, Notz, Miller (2006), "Sequential kriging optimization using multiple-fidelity evaluations",
Structural and Multidisciplinary Optimization 32, whose augmented expected improvement this is for one target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.risk_measures import CVaR, VaR
from botorch.exceptions.errors import UnsupportedError
from botorch.models.model import Model
from botorch.posteriors import Posterior
from torch import Tensor

from bayesdl.interop._botorch_answers import GaussianPosterior
from bayesdl.interop._botorch_members import MemberPosterior
from bayesdl.interop._optuna_record import stream
from bayesdl.interop._optuna_space import Encoding

_LEAST_SHARE = 1e-12  # of the variance of G: what counts as revealing nothing
_INSIDE = 1e-12  # how far quasi-random numbers stay from 0 and 1, where some laws are infinite


class Goal(NamedTuple):
    """Which coordinates do not count, and what stands in their place.

    Attributes:
        targets: Coordinate -> value, for fidelities.
        environment: Coordinates that are drawn.
        points: The draws of the environment (N, e); (1, 0) where there is none.
        risk: "mean", "var" or "cvar".
        level: Of the risk: the share of draws that are better than the value at risk.
    """

    targets: dict[int, float]
    environment: tuple[int, ...]
    points: Tensor
    risk: str
    level: float

    @property
    def plain(self) -> bool:
        """Whether G is linear in f, so that a Gaussian f makes it Gaussian."""
        return self.risk == "mean"

    def expand(self, z: Tensor) -> Tensor:
        """The points that make up G at z (..., q, p): (..., q N, p), the N of one point beside one another."""
        num = len(self.points)
        z = z.repeat_interleave(num, -2)
        columns = list(z.unbind(-1))
        for i, value in self.targets.items():
            columns[i] = torch.full_like(columns[i], value)
        for k, i in enumerate(self.environment):
            columns[i] = self.points[:, k].to(z).repeat(z.shape[-2] // num).expand_as(columns[i])
        return torch.stack(columns, -1)

    def reduce(self, values: Tensor) -> Tensor:
        """R over the axis before the last: (..., q, N, m) -> (..., q, m); further outputs, constraints, by the mean."""
        mean = values.mean(-2)
        if self.plain:
            return mean
        measure = (VaR if self.risk == "var" else CVaR)(self.level, len(self.points))
        first = measure(values[..., 0].flatten(-2).unsqueeze(-1))
        return torch.cat([first.unsqueeze(-1), mean[..., 1:]], -1)


def goal(
    fidelities: Mapping[str, float], environment: Mapping[str, Any], risk: Any, encoding: Encoding, seed: int
) -> Goal | None:
    """The goal of a study, None where every coordinate counts.

    Args:
        fidelities: Name -> target.
        environment: Name -> law: a torch distribution, probabilities of choices, or None for a uniform one.
        risk: A `bdl.bo.Risk`, None for the mean.
        encoding: Of the space.
        seed: Of the draws of the environment.
    """
    fidelities = {name: value for name, value in fidelities.items() if name in encoding.names}
    environment = {name: law for name, law in environment.items() if name in encoding.names}
    if not fidelities and not environment:
        return None
    targets = {encoding.names.index(name): encoding.inward(name, value) for name, value in fidelities.items()}
    places = tuple(encoding.names.index(name) for name in environment)
    num = getattr(risk, "num_draws", 16) if environment else 1
    points = torch.zeros(num, len(places), dtype=torch.float64)
    if places:
        engine = torch.quasirandom.SobolEngine(len(places), scramble=True, seed=stream("environment", seed) % 2**31)
        uniform = engine.draw(num, dtype=torch.float64).clamp(_INSIDE, 1 - _INSIDE)
        columns = [encoding.drawn(name, law, uniform[:, k]) for k, (name, law) in enumerate(environment.items())]
        points = torch.stack(columns, -1)
    kind = getattr(risk, "kind", "mean") if environment else "mean"
    return Goal(targets, places, points, kind, float(getattr(risk, "level", 0.0)))


class GoalModel(Model):
    """A surrogate of f as one of G.

    Args:
        inner: The surrogate, over coordinates: Gaussian, or by members, which any risk but the mean needs.
        goal: G.

    Cost: that of `inner` at N points for one.
    """

    def __init__(self, inner: Model, goal: Goal) -> None:
        super().__init__()
        self.inner, self.goal = inner, goal

    @property
    def num_outputs(self) -> int:
        """Outputs of the surrogate."""
        return self.inner.num_outputs

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes of the surrogate."""
        return self.inner.batch_shape

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool = False,
        posterior_transform: Any = None,
    ) -> Posterior:
        """The belief about G at coordinates X (*t, q, p), of which those that do not count are ignored.

        Raises:
            UnsupportedError: Noise is asked for: G is never observed.
        """
        if observation_noise is not False:
            raise UnsupportedError("GoalModel.posterior: what is sought is not observed and has no noise")
        answer = self.inner.posterior(self.goal.expand(X), output_indices=output_indices)
        if len(self.goal.points) > 1:
            answer = self._reduced(answer)
        return answer if posterior_transform is None else posterior_transform(posterior=answer, X=X)

    def _reduced(self, answer: Posterior) -> Posterior:
        num = len(self.goal.points)
        if isinstance(answer, MemberPosterior):
            return MemberPosterior(self.goal.reduce(answer.values.unflatten(-2, (-1, num))))
        if not self.goal.plain or not isinstance(answer, GaussianPosterior):
            raise UnsupportedError(f"GoalModel.posterior: the {self.goal.risk} needs a posterior's view by samples")
        mean, covariance = answer._mean, answer._covariance  # a group's values lie output by output, then by points
        rows = covariance.unflatten(-1, (-1, num)).mean(-1)
        return GaussianPosterior(mean.unflatten(-2, (-1, num)).mean(-2), rows.unflatten(-2, (-1, num)).mean(-2))

    def subset_output(self, idcs: list[int]) -> Model:
        """The outputs `idcs` alone."""
        return GoalModel(self.inner.subset_output(idcs), self.goal)


class Informed(AcquisitionFunction):
    """log improvement of G at a point, weighed by what an evaluation there reveals of G: (*t 1 p) -> (*t).

    Args:
        improvement: Of G, logarithmic.
        model: The surrogate of f.
        goal: G.
        near: A point (1, p) or more at which the noise is asked for.
    """

    _log = True

    def __init__(self, improvement: AcquisitionFunction, model: Model, goal: Goal, near: Tensor) -> None:
        super().__init__(model)
        self._improvement, self._goal = improvement, goal
        with torch.no_grad():  # of the first output, the same everywhere
            noisy, clean = (model.posterior(near[:1], observation_noise=noise) for noise in (True, False))
            self._noise = (noisy.variance - clean.variance)[..., 0].mean().clamp_min(0.0)

    def forward(self, X: Tensor) -> Tensor:
        """(*t)."""
        both = torch.cat([X, self._goal.expand(X)], -2)
        share = revealed(self.model.posterior(both), self._goal, self._noise)
        return self._improvement(X) + 0.5 * share.clamp_min(_LEAST_SHARE).log()


def revealed(posterior: Posterior, goal: Goal, noise: Tensor) -> Tensor:
    """The share of the variance of G that y at the first point explains, corr(y, G)^2, (*t).

    Args:
        posterior: Of f at the point of evaluation and at the N points of G, (*t, 1 + N, m); the first output counts.
        goal: G.
        noise: Variance of y given f.
    """
    if isinstance(posterior, MemberPosterior):
        values = posterior.values[..., :1]
        here = values[..., 0, 0]
        there = goal.reduce(values[..., 1:, :].unsqueeze(-3))[..., 0, 0]
        here, there = here - here.mean(-1, keepdim=True), there - there.mean(-1, keepdim=True)
        cross, own, whole = ((a * b).mean(-1) for a, b in ((here, there), (here, here), (there, there)))
    else:
        q = posterior.mean.shape[-2]
        covariance = posterior._covariance[..., 0, :q, :q]
        cross, own = covariance[..., 0, 1:].mean(-1), covariance[..., 0, 0]
        whole = covariance[..., 1:, 1:].mean((-2, -1))
    tiny = torch.finfo(own.dtype).tiny
    return cross.square() / ((own + noise).clamp_min(tiny) * whole.clamp_min(tiny))
