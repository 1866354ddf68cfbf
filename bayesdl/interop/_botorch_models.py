"""Posteriors as models of BoTorch: joint draws of members, a Gaussian, or several posteriors side by side."""

from __future__ import annotations

import abc
import copy
import warnings
from typing import Any, ClassVar, NamedTuple

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.exceptions.errors import UnsupportedError
from botorch.models.model import Model
from botorch.posteriors import Posterior as BotorchPosterior
from botorch.sampling.base import MCSampler
from gpytorch.distributions import MultivariateNormal
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _checks, ops
from bayesdl._random import child_seeds
from bayesdl.errors import NumericalError, NumericalWarning, SettingError, ShapeError, fail
from bayesdl.interop._botorch_answers import GaussianAnswer, MemberAnswer
from bayesdl.interop._botorch_laws import Law, Members, _raised, grouped, is_regression, ungrouped
from bayesdl.posterior import Posterior

Noise = bool | Tensor


class Observations(NamedTuple):
    """What a model was conditioned on: x (*c, n, d), y (*e, n, m), noise variance (*e, n, m) or None for its own."""

    x: Tensor
    y: Tensor
    noise: Tensor | None

    def join(self, new: Observations) -> Observations:
        """Both, the new ones last; batch axes broadcast."""
        return Observations(_beside(self.x, new.x), _beside(self.y, new.y), _noise_beside(self, new))


class SurrogateModel(Model, abc.ABC):
    """A posterior as a BoTorch model. X has the units and columns of the training inputs, in any float dtype.

    Attributes:
        conditioning: How `condition_on_observations` and `fantasize` update: "exact", "kalman" (exact for a Gaussian
            belief, an approximation otherwise) or "none".
    """

    conditioning: str

    @property
    @abc.abstractmethod
    def sources(self) -> tuple[Posterior, ...]:
        """The posteriors behind this model, in the order of their outputs."""

    @property
    @abc.abstractmethod
    def _observed(self) -> Observations | None: ...

    @property
    @abc.abstractmethod
    def _num_all_outputs(self) -> int: ...

    @abc.abstractmethod
    def _answer(self, x: Tensor, noise: Noise) -> GaussianAnswer | MemberAnswer:
        """All outputs at x (..., q, d), in float64."""

    @abc.abstractmethod
    def _conditioned(self, new: Observations) -> SurrogateModel:
        """This model after more observations of all its outputs."""

    _outputs: tuple[int, ...] | None = None
    _paths_drawn: int = 0

    def _next_seed(self) -> int:
        """For paths: another at each call, the same sequence for every new model."""
        self._paths_drawn += 1
        return self._paths_drawn

    @property
    def num_outputs(self) -> int:
        """m."""
        return self._num_all_outputs if self._outputs is None else len(self._outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes of the training data, broadcast with those of what was conditioned on."""
        own = [source._data.batch_shape for source in self.sources]
        seen = [] if self._observed is None else [self._observed.y.shape[:-2]]
        return torch.broadcast_shapes(*own, *seen)

    @property
    def train_inputs(self) -> tuple[Tensor]:
        """What was seen and conditioned on, (*b, n, d), or (*b, m, n, d) for several outputs, as in BoTorch's own."""
        x = self.sources[0]._data.x
        seen = self._observed
        x = x if seen is None else _beside(x, seen.x.to(x))
        m = self.num_outputs
        return (x if m == 1 else x.unsqueeze(-3).expand(*x.shape[:-2], m, *x.shape[-2:]),)

    @property
    def train_targets(self) -> Tensor:
        """What was seen, (*b, n) for one output and (*b, m, n) for several, as BoTorch's own models have it."""
        y = torch.cat([source._data.y for source in self.sources], -1)
        seen = self._observed
        y = y if seen is None else _beside(y, seen.y.to(y))
        return y.squeeze(-1) if y.shape[-1] == 1 else y.mT

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: Noise = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> BotorchPosterior:
        """The joint belief about f, or about y, at q points: X (*t, q, d) -> (*t, q, m), *t broadcast with batch_shape.

        Args:
            X: Inputs; gradients flow.
            output_indices: Some of the outputs; None for all.
            observation_noise: True adds the model's noise; a tensor (..., 1 or q, m) is the variance to add.
            posterior_transform: As BoTorch defines it.

        Raises:
            UnsupportedError: Noise is asked of a classification, or is transformed other than linearly for members.
            NumericalError: No jitter makes the joint covariance positive definite.
        """
        x = self.transform_inputs(X)
        answer = self._answer(x, observation_noise)
        chosen = list(range(self.num_outputs)) if output_indices is None else output_indices
        if self._outputs is not None:
            chosen = [self._outputs[i] for i in chosen]
        if chosen != list(range(self._num_all_outputs)):
            answer = answer.select(chosen)
        return answer.to_botorch(X.dtype, posterior_transform, x)

    def subset_output(self, idcs: list[int]) -> SurrogateModel:
        """This model with some of its outputs. It cannot be conditioned: condition first."""
        chosen = list(range(self.num_outputs))
        part = copy.copy(self)
        part._outputs = tuple((self._outputs or range(self._num_all_outputs))[chosen[i]] for i in idcs)
        part.conditioning = "none"
        return part

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> SurrogateModel:
        """The model after more observations at unchanged hyper-parameters; `conditioning` says by which method.

        Args:
            X: (*c, n, d).
            Y: (*e, n, m), where *e broadcasts with *c and may have axes in front, such as one for fantasies. The new
                `batch_shape` is *e.
            noise: Variance of the noise in the units of Y, (*e, n, m); None for the model's own.
            kwargs: None is used.

        Raises:
            NotImplementedError: The likelihood is not Gaussian, or the model is a part of another's outputs.
            ShapeError: X and Y do not go together.
        """
        if self.conditioning == "none":
            whole = all(is_regression(source) for source in self.sources)
            reason = "has some of another's outputs: condition that one" if whole else "classifies: fit again"
            raise NotImplementedError(
                f"{type(self).__name__}.condition_on_observations: this model {reason}.\n"
                "  fix  posteriors of regression models, with all their outputs, can be conditioned"
            )
        d = self.sources[0]._data.x.shape[-1]
        _checks.inputs("condition_on_observations", "X", X, d=d)
        fits = Y.ndim >= 2 and Y.shape[-1] == self.num_outputs and Y.shape[-2] == X.shape[-2]
        if not fits or (noise is not None and noise.shape[-1] not in (1, self.num_outputs)):
            wanted = f"Y and noise must have shape (..., {X.shape[-2]}, {self.num_outputs})."
            got = f"Y {tuple(Y.shape)}" + ("" if noise is None else f", noise {tuple(noise.shape)}")
            fail(ShapeError, "condition_on_observations", wanted, got=got, fix="one row for each of X, one column each")
        lead = torch.broadcast_shapes(Y.shape[:-2], X.shape[:-2])
        Y = Y.to(torch.float64).expand(*lead, *Y.shape[-2:])
        noise = None if noise is None else noise.to(torch.float64).expand_as(Y)
        return self._conditioned(Observations(X, Y, noise))

    def fantasize(
        self, X: Tensor, sampler: MCSampler, observation_noise: Tensor | None = None, **kwargs: Any
    ) -> SurrogateModel:
        """The models that imagined observations at X would lead to, one for each sample.

        Args:
            X: (*t, n, d).
            sampler: Draws the observations, noise included; shape *s.
            observation_noise: Variance of that noise; None for the model's own.
            kwargs: None is used.

        Returns:
            A model with batch_shape (*s, *t). Gradients flow through X.
        """
        x = self.transform_inputs(X)
        if x.shape[-2] == 0:
            lead = torch.broadcast_shapes(x.shape[:-2], self.batch_shape)
            y = x.new_zeros(*sampler.sample_shape, *lead, 0, self.num_outputs)
            return self.condition_on_observations(x, y)
        noise: Noise = True if observation_noise is None else observation_noise
        y = sampler(self.posterior(X, observation_noise=noise))
        return self.condition_on_observations(x, y, noise=observation_noise)

    def forward(self, X: Tensor) -> MultivariateNormal:
        """The Gaussian of f at X, which some of BoTorch's entropy searches ask for."""
        return self.posterior(X).distribution

    def _set_transformed_inputs(self) -> None:
        """Nothing: training inputs are never transformed."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing."""


class GaussianModel(SurrogateModel):
    """A posterior as a Gaussian process: exact where it is one, of the same mean and covariance where it is not.

    Conditioning is exact for every Gaussian process and for Student-t processes, whose scale it updates; for others it
    is the Gaussian update.

    Cost: that of the posterior's joint law at q points, plus q^3, for each t-batch; n conditioned points count as
    points.
    """

    def __init__(self, source: Posterior, law: Law, observed: Observations | None = None) -> None:
        super().__init__()
        self._source, self._law, self._seen = source, law, observed
        self.conditioning = ("exact" if law.exact else "kalman") if is_regression(source) else "none"

    @property
    def sources(self) -> tuple[Posterior, ...]:
        """The posterior."""
        return (self._source,)

    @property
    def _observed(self) -> Observations | None:
        return self._seen

    @property
    def _num_all_outputs(self) -> int:
        return self._law.num_outputs

    def predictive(self, X: Tensor) -> Distribution:
        """The marginal law of f at each point, (*t, q, m): Student-t or a mixture where that is what it is."""
        x = _as_trained(self._source, X)
        mean, covariance, surprise = self._moments(x)
        deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        mean, deviation = (ungrouped(t, self._num_all_outputs).to(X.dtype) for t in (mean, deviation))
        return self._law.marginal(mean, deviation, surprise, self._num_seen())

    def _answer(self, x: Tensor, noise: Noise) -> GaussianAnswer:
        inner = _as_trained(self._source, x)
        mean, covariance, surprise = self._moments(inner)
        scale = self._law.mean_scale(surprise, self._num_seen())
        covariance = covariance * (scale if isinstance(scale, float) else _positive_scale(scale).unsqueeze(-1))
        outward = ungrouped(mean, self._num_all_outputs)
        if noise is not False:
            variance = noise if isinstance(noise, Tensor) else _own_noise(self._law)
            added = grouped(variance.to(outward).expand_as(outward), self._law.num_groups)
            own = 1.0 if isinstance(noise, Tensor) else scale
            covariance = covariance + torch.diag_embed(added * own)
        return GaussianAnswer(outward, covariance)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean (..., g, p), covariance (..., g, p, p) at scale 1, and the surprise (..., g) of what was seen."""
        seen = self._seen
        if seen is None or seen.x.shape[-2] == 0:
            lead = () if seen is None else seen.y.shape[:-2]
            lead = torch.broadcast_shapes(x.shape[:-2], lead)
            return *self._law.joint(x.expand(*lead, *x.shape[-2:])), None
        n, old = seen.x.shape[-2], _as_trained(self._source, seen.x)
        lead = torch.broadcast_shapes(x.shape[:-2], seen.y.shape[:-2])
        both = torch.cat([old.expand(*lead, *old.shape[-2:]), x.expand(*lead, *x.shape[-2:])], -2)
        mean, covariance = self._law.joint(both)
        first, rest = _places(n, both.shape[-2], mean.shape[-1], mean.device)
        noise = _conditioning_noise(self._law, seen)
        chol = _factor(covariance[..., first, :][..., first] + torch.diag_embed(noise))
        gap = grouped(seen.y, self._law.num_groups) - mean[..., first]
        cross = covariance[..., first, :][..., rest]
        half = torch.linalg.solve_triangular(chol, cross, upper=False)
        white = torch.linalg.solve_triangular(chol, gap.unsqueeze(-1), upper=False)
        mean = mean[..., rest] + (half.mT @ white).squeeze(-1)
        left = covariance[..., rest, :][..., rest]
        return mean, _raised(left - half.mT @ half, left), white.square().sum((-2, -1))

    def _num_seen(self) -> int:
        return 0 if self._seen is None else self._seen.x.shape[-2] * self._num_all_outputs // self._law.num_groups

    def _conditioned(self, new: Observations) -> GaussianModel:
        return GaussianModel(self._source, self._law, new if self._seen is None else self._seen.join(new))


class MemberModel(SurrogateModel):
    r"""A posterior as S functions drawn from it, the same S whenever and wherever they are asked.

    Conditioning moves every member f_s by Matheron's rule,

        f_s(x) + C(x, X') (C(X', X') + R)^{-1} (Y' + e_s - f_s(X')),    e_s ~ N(0, R),

    with the exact covariance C where the posterior is a Gaussian process, and else with that of the members, where the
    rank of C is at most S - 1: keep the number of values well below S.

    Args:
        source: The posterior.
        law: With C.
        members: With the functions.
        seed: Of e_s.
    """

    _WELL_BELOW: ClassVar[float] = 0.5

    def __init__(
        self, source: Posterior, law: Law, members: Members, seed: int, observed: Observations | None = None
    ) -> None:
        super().__init__()
        self._source, self._law, self._members, self._seed, self._seen = source, law, members, seed, observed
        exact = law.exact and isinstance(law.mean_scale(None, 0), float)
        self.conditioning = ("exact" if exact else "kalman") if is_regression(source) else "none"
        self._update = None if observed is None or observed.x.shape[-2] == 0 else self._weights()

    @property
    def sources(self) -> tuple[Posterior, ...]:
        """The posterior."""
        return (self._source,)

    @property
    def num_members(self) -> int:
        """S."""
        return self._members.num_members

    @property
    def _observed(self) -> Observations | None:
        return self._seen

    @property
    def _num_all_outputs(self) -> int:
        return self._members.num_outputs

    def _answer(self, x: Tensor, noise: Noise) -> MemberAnswer:
        values = self._values(_as_trained(self._source, x))
        if noise is False:
            return MemberAnswer(values, None)
        variance = noise.to(values) if isinstance(noise, Tensor) else _own_noise(self._members)
        return MemberAnswer(values, variance.unsqueeze(-3))

    def _values(self, x: Tensor) -> Tensor:
        """(..., S, q, m)."""
        if self._seen is None:
            return self._members.values(x)
        lead = torch.broadcast_shapes(x.shape[:-2], self._seen.y.shape[:-2])
        values = self._members.values(x)
        if self._update is None:
            return values.expand(*lead, *values.shape[-3:])
        cross = self._cross(x, values)  # (..., g, p', p)
        moved = self._update[0].movedim(-2, -3) @ cross  # (..., g, S, p)
        return values + ungrouped(moved.movedim(-3, -2), self._num_all_outputs)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """(C + R)^{-1} (Y' + e_s - f_s(X')), (*e, S, g, p'), and the members' deviations (*c, S, g, p')."""
        seen, groups, num = self._seen, self._law.num_groups, self.num_members
        if not self._law.closed_form:
            self._check_rank(seen.x.shape[-2] * self._num_all_outputs)
        old = _as_trained(self._source, seen.x)
        values = grouped(self._members.values(old), groups)
        deviation = values - values.mean(-3, keepdim=True)
        if self._law.closed_form:
            covariance = self._law.joint(old)[1] * self._typical_scale()
        else:
            spread = deviation.movedim(-3, -2)
            covariance = spread.mT @ spread / num
        noise = _conditioning_noise(self._members, seen, groups)  # (..., g, p')
        chol = _factor(covariance + torch.diag_embed(noise))
        errors = grouped(self._errors(seen), groups) * noise.sqrt().unsqueeze(-3)
        gap = grouped(seen.y, groups).unsqueeze(-3) + errors - values  # (*e, S, g, p')
        solved = torch.cholesky_solve(gap.movedim(-3, -1), chol)  # (*e, g, p', S)
        return solved.movedim(-1, -3), deviation

    def _cross(self, x: Tensor, values: Tensor) -> Tensor:
        """C(X', x), (..., g, p', p)."""
        groups, seen = self._law.num_groups, self._seen
        if not self._law.closed_form:
            there = grouped(values, groups)
            there = (there - there.mean(-3, keepdim=True)).movedim(-3, -2)
            here = self._update[1].movedim(-3, -2)
            return here.mT @ there / self.num_members
        n, old = seen.x.shape[-2], _as_trained(self._source, seen.x)
        lead = torch.broadcast_shapes(x.shape[:-2], old.shape[:-2])
        both = torch.cat([old.expand(*lead, *old.shape[-2:]), x.expand(*lead, *x.shape[-2:])], -2)
        covariance = self._law.joint(both)[1] * self._typical_scale()
        first, rest = _places(n, both.shape[-2], covariance.shape[-1], x.device)
        return covariance[..., first, :][..., rest]

    def _typical_scale(self) -> Tensor | float:
        scale = self._law.mean_scale(None, 0)
        return scale if isinstance(scale, float) else _positive_scale(scale).unsqueeze(-1)

    def _errors(self, seen: Observations) -> Tensor:
        """Standard normal numbers (S, n, m) of mean 0 over members; those of a point do not depend on later points."""
        n, m = seen.y.shape[-2:]
        columns = []
        for seed in child_seeds(self._seed, n):
            g = torch.Generator(seen.y.device).manual_seed(seed)
            shape = (self.num_members, m)
            columns.append(torch.randn(shape, generator=g, dtype=torch.float64, device=seen.y.device))
        e = torch.stack(columns, -2)
        return e - e.mean(0)

    def _check_rank(self, num_values: int) -> None:
        if self.num_members == 1:
            fix = "an ensemble of several members, or a sampler"
            wanted = "one member has no spread that observations could act on."
            fail(SettingError, "condition_on_observations", wanted, got="num_members=1", fix=fix)
        if num_values > self._WELL_BELOW * self.num_members:
            message = (
                f"condition_on_observations: {num_values} values for {self.num_members} members, whose covariance has "
                f"rank {self.num_members - 1} at most; the update is unreliable: use more members "
                "(num_samples=...), or fit again"
            )
            warnings.warn(message, NumericalWarning, stacklevel=5)

    def _conditioned(self, new: Observations) -> MemberModel:
        seen = new if self._seen is None else self._seen.join(new)
        return MemberModel(self._source, self._law, self._members, self._seed, seen)


def _as_trained(source: Posterior, x: Tensor) -> Tensor:
    """x in the dtype in which the posterior was trained."""
    return x.to(source._data.x.dtype)


def _own_noise(law: Law) -> Tensor:
    noise = law.noise_variance
    if noise is None:
        raise UnsupportedError(
            "SurrogateModel.posterior: a classification has no Gaussian noise, its outputs are logits; ask for "
            "observation_noise=False"
        )
    return noise


def _conditioning_noise(law: Law, seen: Observations, num_groups: int | None = None) -> Tensor:
    """Variance of each value's noise at scale 1, (..., g, p')."""
    groups = law.num_groups if num_groups is None else num_groups
    own = _own_noise(law)
    if seen.noise is None:
        return grouped(own.expand(*own.shape[:-2], *seen.y.shape[-2:]), groups)
    scale = law.mean_scale(None, 0)
    given = grouped(seen.noise, groups)
    given = given if isinstance(scale, float) else given / scale
    usual = grouped(own.expand(*own.shape[:-2], *seen.y.shape[-2:]), groups)
    return torch.where(given.isnan(), usual, given)


def _positive_scale(scale: Tensor) -> Tensor:
    if not bool(torch.isfinite(scale).all()):
        wanted = "the Gaussian view needs a finite variance."
        got = "a scale mixture with two degrees of freedom or fewer"
        fail(NumericalError, "to_botorch", wanted, got=got, fix="view='samples', a lighter-tailed prior, or more data")
    return scale


def _factor(covariance: Tensor) -> Tensor:
    factor, _, failed = ops.cholesky(covariance)
    if bool(failed.any()):
        wanted = "the covariance of what is conditioned on must be positive definite."
        fail(NumericalError, "condition_on_observations", wanted, got="one that is not", fix="pass a larger noise")
    return factor


def _places(n: int, total: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the first n of `total` points stand in a group of width / total outputs, and where the others do."""
    order = torch.arange(width, device=device).reshape(-1, total)
    return order[:, :n].reshape(-1), order[:, n:].reshape(-1)


def _beside(first: Tensor, second: Tensor) -> Tensor:
    """Rows (..., n, k) after one another, with batch axes broadcast."""
    lead = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return torch.cat([first.expand(*lead, *first.shape[-2:]), second.expand(*lead, *second.shape[-2:])], -2)


def _noise_beside(first: Observations, second: Observations) -> Tensor | None:
    """Noise of both, NaN where it is the model's own."""
    if first.noise is None and second.noise is None:
        return None
    parts = [part.noise if part.noise is not None else torch.full_like(part.y, torch.nan) for part in (first, second)]
    return _beside(*parts)
