"""A posterior held as a finite set of networks: draws of a sampler, or the members of an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl._random import Seed, generator
from bayesdl.data import TrainingData, Units
from bayesdl.distributions import Bernoulli, Categorical, Empirical, GaussianMixture
from bayesdl.errors import StorageError, fail
from bayesdl.posterior.base import Functions, Posterior, member_indices

_CHUNK = 2**24  # function values evaluated at once: 128 MB in float64 for each layer
_PRIOR_DRAWS = 200


@final
class DrawsPosterior(Posterior):
    """Equally weighted draws q (*b, chains, draws, D) of a network's coordinates.

    The predictive of y is the average over draws of p(y | f): a Gaussian mixture, or averaged class probabilities.
    Cost: O(S s num_weights) time for S draws at s points; chunks of draws bound the memory.
    """

    form: ClassVar[str] = "draws"
    model_kind: ClassVar[str] = "BNN"

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None = None,
        *,
        draws: Tensor,
        stats: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._draws = draws
        self._stats = dict(stats or {})
        self._space = model.weight_space(data.x.shape[-1], data.y.shape[-1])

    @property
    def draws(self) -> Tensor:
        """Coordinates of every network (*b, chains, draws, D): standardised weights, logs of positive parameters."""
        return self._draws.clone()

    def predict(self, x: Any, *, noise: bool = True) -> Distribution:
        """Mixture over the draws; see `Posterior.predict`. With noise=False the draws of f themselves (of logits, for
        classification), as an `Empirical` distribution, which has no density."""
        x = self._inputs("predict", x)
        members = self._members()
        f = self._latent(members, x).movedim(-3, -1)  # (..., s, outputs, S)
        if not noise:
            return Empirical(self._squeeze_members(self._outward(f)))
        task = self._space.likelihood.task
        if task == "binary":
            return Bernoulli(probs=self._squeeze(torch.sigmoid(f).mean(-1)), validate_args=False)
        if task == "multiclass":
            return Categorical(probs=torch.softmax(f, -2).mean(-1).to(self._data.x.dtype), validate_args=False)
        variance = self._space.split(members)[1]["noise_variance"].movedim(-2, -1).unsqueeze(-3)  # (*b, 1, k, S)
        scale = self._units.outward_scale(variance.sqrt().movedim(-1, 0)).movedim(0, -1)
        loc = self._squeeze_members(self._outward(f))
        return GaussianMixture(loc, self._squeeze_members(scale).to(loc).expand_as(loc), validate_args=False)

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Randomly chosen members at x, distinct while there are enough; see `Posterior.sample`."""
        num = torch.Size(sample_shape).numel()
        values = self.functions(num, seed=seed)(self._inputs("sample", x))
        return values.reshape(*sample_shape, *values.shape[1:])

    def functions(self, num: int, *, seed: Seed = 0) -> Functions:
        """Randomly chosen members as functions; see `Posterior.functions`."""
        members = self._members()
        chosen = members.index_select(-2, member_indices(members.shape[-2], num, seed).to(members.device))

        def draw(x: Any) -> Tensor:
            f = self._latent(chosen, self._inputs("functions", x)).movedim(-3, -1)
            return self._squeeze_members(self._outward(f)).movedim(-1, 0)

        return draw

    def _members(self) -> Tensor:
        return self._draws.flatten(-3, -2)

    def _latent(self, members: Tensor, x: Tensor) -> Tensor:
        """f in the model's units, (..., S, s, outputs)."""
        inner = self._units.inward_x(x, members.dtype)
        step = max(1, _CHUNK // max(1, inner.shape[:-1].numel() * self._widest()))
        return torch.cat([self._space.forward(part, inner) for part in members.split(step, -2)], -3)

    def _widest(self) -> int:
        return max(1, self._space.network.num_weights // max(1, self._data.x.shape[-1]))

    def _outward(self, f: Tensor) -> Tensor:
        """(..., s, outputs, S) in the user's units; logits stay as they are."""
        if self._space.likelihood.task != "regression":
            return f
        return self._units.outward(f.movedim(-1, 0)).movedim(0, -1)

    def _squeeze_members(self, f: Tensor) -> Tensor:
        """Drop the output axis of (..., s, outputs, S) where y came without one and there is one function."""
        f = f.to(self._data.x.dtype)
        return f.squeeze(-2) if not self._data.has_outputs and f.shape[-2] == 1 else f

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"draws": self._draws, **{f"stats.{name}": v for name, v in self._stats.items()}}, {}

    @classmethod
    def _from_parts(cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]) -> DrawsPosterior:
        stats = {name.removeprefix("stats."): v for name, v in tensors.items() if name.startswith("stats.")}
        posterior = cls(**shared, draws=tensors["draws"], stats=stats)
        expected, found = posterior._space.dim, posterior._draws.shape[-1]
        if found != expected:
            wanted = f"the network must have the weights of the one that was fitted, {found} coordinates in all."
            fix = "build the network as it was when the posterior was saved"
            fail(StorageError, "bdl.load", wanted, got=f"a network with {expected}", fix=fix)
        return posterior

    def _arviz_groups(self) -> dict[str, Any]:
        chains, draws = self._draws.shape[-3:-1]
        members, batch = self._members(), len(self._data.batch_shape)
        f = self._latent(members, self._data.x)
        _, params, _ = self._space.split(members)

        def by_chain(values: Tensor) -> Tensor:
            """(*b, S, ...) as (chains, draws, *b, ...)."""
            return values.movedim(batch, 0).unflatten(0, (chains, draws))

        latent = self._squeeze_members(self._outward(f.movedim(-3, -1))).movedim(-1, 0)
        posterior = {"f": latent.unflatten(0, (chains, draws))}
        if "noise_variance" in params and not batch:
            variance = self._squeeze(params["noise_variance"] * self._units.y_scale.squeeze(-2).square())
            posterior["noise_variance"] = by_chain(variance)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        source = generator(0, f.device)
        before = self._space.initial(_PRIOR_DRAWS, source, self._units.inward_x(self._data.x, f.dtype))
        before = self._squeeze_members(self._outward(self._latent(before, self._data.x).movedim(-3, -1)))
        groups = {
            "posterior": posterior,
            "posterior_predictive": {"y": by_chain(self._squeeze(self._replicate(f, params, source)))},
            "log_likelihood": {"y": by_chain(self._squeeze(self._pointwise(f, params)))},
            "prior": {"f": before.movedim(-1, 0).unsqueeze(0)},
            "observed_data": {"y": y},
            "constant_data": {"x": self._data.x},
            "dims": self._arviz_dims(latent.ndim - 1 - batch, y.ndim - batch),
        }
        if self._stats and not batch:
            groups["sample_stats"] = {name: value for name, value in self._stats.items() if name != "energy_change"}
        return groups

    def _arviz_dims(self, axes_of_f: int, axes_of_y: int) -> dict[str, list[str]]:
        """What ArviZ calls the axes: data sets, then points, then outputs, classes or features."""
        sets = [f"data_set_{i}" for i in range(len(self._data.batch_shape))]
        last = "class" if self._space.likelihood.task == "multiclass" else "output"
        dims = {"f": [*sets, "point", last][: len(sets) + axes_of_f], "x": [*sets, "point", "feature"]}
        dims["y"] = [*sets, "point", "output"][: len(sets) + axes_of_y]
        return dims | {"noise_variance": ["output"][: axes_of_y - 1]}

    def _replicate(self, f: Tensor, params: dict[str, Tensor], source: torch.Generator) -> Tensor:
        """One new data set from every draw, in the user's units: (*b, S, n, k), from f (*b, S, n, outputs)."""
        task = self._space.likelihood.task
        if task == "regression":
            noise = torch.randn(f.shape, generator=source, dtype=f.dtype, device=f.device)
            v = f + params["noise_variance"].sqrt().unsqueeze(-2) * noise
            return self._outward(v.movedim(-3, -1)).movedim(-1, -3)
        shape = f.shape if task == "binary" else (*f.shape[:-1], 1)
        uniform = torch.rand(shape, generator=source, dtype=f.dtype, device=f.device)
        if task == "binary":
            return (uniform < torch.sigmoid(f)).to(f.dtype)
        below = torch.softmax(f, -1).cumsum(-1)[..., :-1] <= uniform
        return below.sum(-1, keepdim=True).to(f.dtype)

    def _pointwise(self, f: Tensor, params: dict[str, Tensor]) -> Tensor:
        """log p(y_ij | f) in the user's units for every draw, (*b, S, n, k), from f (*b, S, n, outputs)."""
        likelihood, y = self._space.likelihood, self._data.y
        if likelihood.task == "multiclass":
            return likelihood.log_prob(f.unsqueeze(-2), y.unsqueeze(-2).unsqueeze(-4), {}).unsqueeze(-1)
        if likelihood.task == "regression":
            y = self._units.inward_y(y, f.dtype)
        each = {name: v.unsqueeze(-2).unsqueeze(-1) for name, v in params.items()}  # (*b, S, 1, k, 1)
        # every point and output becomes a data set of one point and one output
        value = likelihood.log_prob(f[..., None, None], y.unsqueeze(-3)[..., None, None], each)
        return value - self._units.y_scale.log().unsqueeze(-3).to(value)
