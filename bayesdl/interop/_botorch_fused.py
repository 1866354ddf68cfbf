"""Several posteriors as one model: objectives and constraints that were fitted apart."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models.model import Model, ModelList
from botorch.sampling.base import MCSampler
from botorch.sampling.list_sampler import ListSampler
from torch import Tensor

from bayesdl.errors import ShapeError, fail
from bayesdl.interop._botorch_answers import GaussianAnswer, MemberAnswer
from bayesdl.interop._botorch_models import Noise, Observations, SurrogateModel
from bayesdl.posterior import Posterior


class FusedModel(SurrogateModel, ModelList):
    """Independent posteriors as one model of all their outputs; for members, member s of each makes up member s.

    A `ModelList` to BoTorch, so that outputs may be observed apart (`evaluation_mask`), but with one joint posterior.

    Args:
        models: All Gaussian or all by members, trained on inputs of the same number of columns.
    """

    def __init__(self, *models: SurrogateModel) -> None:
        ModelList.__init__(self, *models)
        ways = {model.conditioning for model in models}
        self.conditioning = next(way for way in ("none", "kalman", "exact") if way in ways)

    @property
    def sources(self) -> tuple[Posterior, ...]:
        """The posteriors."""
        return tuple(source for model in self.models for source in model.sources)

    @property
    def batch_shape(self) -> torch.Size:
        """That of all models together."""
        return torch.broadcast_shapes(*(model.batch_shape for model in self.models))

    @property
    def _observed(self) -> Observations | None:
        parts = [model._observed for model in self.models]
        if any(part is None for part in parts) or len({part.x.shape[-2] for part in parts}) > 1:
            return None if all(part is None for part in parts) else next(part for part in parts if part is not None)
        lead = torch.broadcast_shapes(*(part.y.shape[:-2] for part in parts))
        y = torch.cat([part.y.expand(*lead, *part.y.shape[-2:]) for part in parts], -1)
        return Observations(parts[0].x, y, None)

    @property
    def _num_all_outputs(self) -> int:
        return sum(model.num_outputs for model in self.models)

    def transform_inputs(self, X: Tensor, input_transform: Any = None) -> Tensor:
        """The transform of this model, not one for each output."""
        return Model.transform_inputs(self, X, input_transform)

    def fantasize(
        self,
        X: Tensor,
        sampler: MCSampler,
        observation_noise: Tensor | None = None,
        evaluation_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SurrogateModel:
        """As `SurrogateModel.fantasize`, and with a sampler and a choice of points for each output.

        Args:
            X: (*t, n, d).
            sampler: One for all outputs, or a `ListSampler` of one for each.
            observation_noise: Variance; None for the model's own.
            evaluation_mask: (n, m): which outputs are imagined where. Needs a `ListSampler`.
            kwargs: None is used.

        Raises:
            ShapeError: The mask parts the outputs of one posterior, or has another shape.
        """
        if not isinstance(sampler, ListSampler):
            return super().fantasize(X, sampler, observation_noise, **kwargs)
        shape = (X.shape[-2], self.num_outputs)
        mask = torch.ones(shape, dtype=torch.bool, device=X.device) if evaluation_mask is None else evaluation_mask
        parts, at = [], 0
        for model, noise in zip(self.models, self._share(observation_noise), strict=True):
            end = at + model.num_outputs
            chosen = mask[:, at]
            if mask.shape != shape or not bool((mask[:, at:end] == chosen.unsqueeze(-1)).all()):
                wanted = f"evaluation_mask must be {shape} with the same points for all outputs of one posterior."
                fail(ShapeError, "fantasize", wanted, got=str(tuple(mask.shape)), fix="fit such outputs apart")
            noise = noise if noise is None or noise.shape[-2] == 1 else noise[..., chosen, :]
            parts.append(model.fantasize(X[..., chosen, :], sampler.samplers[at], noise))
            at = end
        return FusedModel(*parts)

    def _answer(self, x: Tensor, noise: Noise) -> GaussianAnswer | MemberAnswer:
        first, *others = (model._answer(x, part) for model, part in zip(self.models, self._share(noise), strict=True))
        return first.join(others)

    def _conditioned(self, new: Observations) -> FusedModel:
        parts = zip(self.models, self._share(new.y), self._share(new.noise), strict=True)
        return FusedModel(*(model._conditioned(Observations(new.x, y, noise)) for model, y, noise in parts))

    def _share(self, value: Any) -> list[Any]:
        """Each model's own outputs of a tensor (..., m), or the value itself."""
        if not isinstance(value, Tensor) or value.shape[-1] == 1:
            return [value] * len(self.models)
        return list(value.split([model.num_outputs for model in self.models], -1))
