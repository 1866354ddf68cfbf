"""Posteriors as models of BoTorch: what all views share, and the Gaussian one."""

from __future__ import annotations

import abc
import copy
from typing import Any, NamedTuple

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
from bayesdl.errors import NumericalError, ShapeError, fail
from bayesdl.interop._botorch_answers import GaussianAnswer, MemberAnswer
from bayesdl.interop._botorch_laws import Law, grouped, is_regression, raised, ungrouped
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
        """The marginal law of f at each point, (*t, q, m): Student-t, a mixture or bars where that is what it is."""
        x = as_trained(self._source, X)
        own = self._law.own_marginal(x) if self._num_seen() == 0 else None
        if own is not None:
            return own
        mean, covariance, surprise = self._moments(x)
        deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
        mean, deviation = (ungrouped(t, self._num_all_outputs).to(X.dtype) for t in (mean, deviation))
        return self._law.marginal(mean, deviation, surprise, self._num_seen())

    def _answer(self, x: Tensor, noise: Noise) -> GaussianAnswer:
        inner = as_trained(self._source, x)
        mean, covariance, surprise = self._moments(inner)
        scale = self._law.mean_scale(surprise, self._num_seen())
        covariance = covariance * (scale if isinstance(scale, float) else finite_scale(scale).unsqueeze(-1))
        outward = ungrouped(mean, self._num_all_outputs)
        if noise is not False:
            variance = noise if isinstance(noise, Tensor) else own_noise(self._law)
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
        n, old = seen.x.shape[-2], as_trained(self._source, seen.x)
        lead = torch.broadcast_shapes(x.shape[:-2], seen.y.shape[:-2])
        both = torch.cat([old.expand(*lead, *old.shape[-2:]), x.expand(*lead, *x.shape[-2:])], -2)
        mean, covariance = self._law.joint(both)
        first, rest = places(n, both.shape[-2], mean.shape[-1], mean.device)
        noise = conditioning_noise(self._law, seen)
        chol = factor_of(covariance[..., first, :][..., first] + torch.diag_embed(noise))
        gap = grouped(seen.y, self._law.num_groups) - mean[..., first]
        cross = covariance[..., first, :][..., rest]
        half = torch.linalg.solve_triangular(chol, cross, upper=False)
        white = torch.linalg.solve_triangular(chol, gap.unsqueeze(-1), upper=False)
        mean = mean[..., rest] + (half.mT @ white).squeeze(-1)
        left = covariance[..., rest, :][..., rest]
        return mean, raised(left - half.mT @ half, left), white.square().sum((-2, -1))

    def _num_seen(self) -> int:
        return 0 if self._seen is None else self._seen.x.shape[-2] * self._num_all_outputs // self._law.num_groups

    def _conditioned(self, new: Observations) -> GaussianModel:
        return GaussianModel(self._source, self._law, new if self._seen is None else self._seen.join(new))


def as_trained(source: Posterior, x: Tensor) -> Tensor:
    """x in the dtype in which the posterior was trained."""
    return x.to(source._data.x.dtype)


def own_noise(law: Law) -> Tensor:
    """`law.noise_variance`, or an UnsupportedError that says why there is none."""
    noise = law.noise_variance
    if noise is None:
        raise UnsupportedError(
            "SurrogateModel.posterior: a classification has no Gaussian noise, its outputs are logits; ask for "
            "observation_noise=False"
        )
    return noise


def conditioning_noise(law: Law, seen: Observations, num_groups: int | None = None) -> Tensor:
    """Variance of each value's noise at scale 1, (..., g, p')."""
    groups = law.num_groups if num_groups is None else num_groups
    own = own_noise(law)
    if seen.noise is None:
        return grouped(own.expand(*own.shape[:-2], *seen.y.shape[-2:]), groups)
    scale = law.mean_scale(None, 0)
    given = grouped(seen.noise, groups)
    given = given if isinstance(scale, float) else given / scale
    usual = grouped(own.expand(*own.shape[:-2], *seen.y.shape[-2:]), groups)
    return torch.where(given.isnan(), usual, given)


def finite_scale(scale: Tensor) -> Tensor:
    """`scale`, or a NumericalError where it is infinite."""
    if not bool(torch.isfinite(scale).all()):
        wanted = "the Gaussian view needs a finite variance."
        got = "a scale mixture with two degrees of freedom or fewer"
        fail(NumericalError, "to_botorch", wanted, got=got, fix="view='samples', a lighter-tailed prior, or more data")
    return scale


def factor_of(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor, with the jitter that it needs, or a NumericalError where none suffices."""
    factor, _, failed = ops.cholesky(covariance)
    if bool(failed.any()):
        wanted = "the covariance of what is conditioned on must be positive definite."
        fail(NumericalError, "condition_on_observations", wanted, got="one that is not", fix="pass a larger noise")
    return factor


def places(n: int, total: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
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
