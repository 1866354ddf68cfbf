r"""Posteriors of scale mixtures of Gaussian processes: a GP whose whole covariance has one unknown factor v = sigma^2.

With the noise inside the scale, f | v, y ~ GP(mean, v C) with the mean and covariance C of the plain GP, so that one
factorisation serves every v and the mixture differs from the GP in its width only:

    f(x) | y  ~  int N(mean(x), v C(x)) p(v | y) dv

which for v ~ IG(a, b) is Student-t with 2a + n degrees of freedom and scale^2 = (2b + q) / (2a + n) C(x), where
q = r' (K + s I)^{-1} r measures how surprising the targets were.

References: Shah, Wilson, Ghahramani (2014), arXiv 1402.4306; Lee, Yun, Yang, Lee (2022), arXiv 2107.01408.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _records, ops
from bayesdl._random import Seed, child_seeds, generator
from bayesdl.posterior._scale import Belief, InverseGammaBelief, Mixing, NodeBelief, believe_scaled
from bayesdl.posterior.base import Functions, Posterior
from bayesdl.posterior.closed_form import GPPosterior, evidence_in_units


class MixturePosterior(Posterior, abc.ABC):
    """What mixtures over v share: a GP posterior at v = 1, and what is believed of v for each data set and output."""

    model_kind: ClassVar[str] = "GP"

    def __init__(
        self,
        gp: GPPosterior,
        mixing: Mixing,
        belief: Belief,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None,
    ) -> None:
        super().__init__(gp.model, gp._data, gp._units, diagnostics, log_evidence)
        self._gp = gp
        self._mixing = mixing
        self._belief = belief

    @classmethod
    @abc.abstractmethod
    def mix(cls, gp: GPPosterior, mixing: Mixing) -> Self:
        """The mixture over v whose GP at v = 1 is `gp`."""

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """As for a GP, in standardised units at v = 1, with learned shapes of the prior on v as "scale.…"."""
        return self._gp.hyperparameters

    @property
    def scale_prior(self) -> Any:
        """The prior on v."""
        return self._mixing.prior

    @property
    def scale_mean(self) -> Tensor:
        """E[v | y] relative to the kernel, shape *b or (*b, k); infinite where an inverse gamma has no mean."""
        mean = self._belief.mean
        return mean if self._data.has_outputs else mean.squeeze(-1)

    def sample_scale(self, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Draws of v given the data, (*sample_shape, *b) or (*sample_shape, *b, k)."""
        source = generator(seed, self._data.x.device)
        draws = self._belief.draw(tuple(sample_shape), tuple(self._data.batch_shape), source)
        return draws if self._data.has_outputs else draws.squeeze(-1)

    def condition_on(self, x: Any, y: Any) -> Self:
        """The exact posterior after (x, y) too, v included, at the same hyper-parameters; see `GPPosterior`."""
        return self.mix(self._gp.condition_on(x, y), self._mixing)

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Joint draws of f, each path with one v for all its points; see `Posterior.sample`."""
        return self._draw_paths(x, tuple(sample_shape), seed)[0]

    @abc.abstractmethod
    def _draw_paths(self, x: Any, sample_shape: tuple[int, ...], seed: Seed) -> tuple[Tensor, Tensor]:
        """Joint draws of f, and the v of each, (*sample_shape, ..., k)."""

    @abc.abstractmethod
    def _noise_share(self, v: Tensor) -> Tensor:
        """What the noise variance at v = 1 is multiplied by."""

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, record = self._gp._parts()
        belief = {f"belief.{name}": value for name, value in self._belief._asdict().items()}
        mixing = {name: value for name, value in self._mixing._asdict().items() if name != "prior"}
        return {**tensors, **belief}, {**record, "mixing": mixing, "prior": _records.encode(self._mixing.prior)}

    @classmethod
    def _from_parts(cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        from bayesdl import _doors

        gp = GPPosterior._from_parts(shared, record, tensors)
        mixing = Mixing(prior=_records.decode(record["prior"], _doors._resolve), **record["mixing"])
        kind = InverseGammaBelief if "belief.rate" in tensors else NodeBelief
        belief = kind(*(tensors[f"belief.{name}"] for name in kind._fields))
        return cls(gp, mixing, belief, shared["diagnostics"], shared["log_evidence"])

    def _arviz_groups(self) -> dict[str, Any]:
        f, v = self._draw_paths(self._data.x, (1, 1000), 0)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        variance = self._noise_share(v) * self._gp._values["noise_variance"]
        noise = variance.sqrt().unsqueeze(-2) * self._units.y_scale
        log_likelihood = torch.distributions.Normal(f, self._squeeze(noise).to(f)).log_prob(y)
        scale = v if self._data.has_outputs else v.squeeze(-1)
        return {
            "posterior": {"f": f, "sigma_squared": scale},
            "observed_data": {"y": y},
            "log_likelihood": {"y": log_likelihood},
        }


@final
class ScaleMixturePosterior(MixturePosterior):
    """A mixture whose noise is inside the scale: a Student-t process, or a mixture over nodes in v.

    Cost: that of `GPPosterior`; a mixture over M nodes adds O(M s) at s points.
    """

    form: ClassVar[str] = "scale_mixture"

    @classmethod
    def mix(cls, gp: GPPosterior, mixing: Mixing) -> ScaleMixturePosterior:
        """The mixture over v whose GP at v = 1 is `gp`: closed form, quadrature or importance sampling, as asked."""
        state = gp._state
        n = state.residual.shape[-1]
        quadratic = (state.residual * state.alpha).sum(-1).clamp_min(0.0)
        belief, log_integral, report = believe_scaled(mixing, quadratic, n, gp._values)
        total = evidence_in_units(ops.log_marginal(state) + 0.5 * quadratic + log_integral, gp._units, n)
        diagnostics = {**gp.diagnostics, "method": mixing.method, **report, "scale_mean": belief.mean.tolist()}
        return cls(gp, mixing, belief, diagnostics, total)

    def predict(self, x: Any, *, noise: bool = True) -> Distribution:
        """Student-t or Gaussian mixture of y (or of f with noise=False) at each x; see `Posterior.predict`.

        The variance of a Student-t exceeds scale^2 by (2a + n) / (2a + n - 2). A mixture over nodes has a finite
        variance even where that of the true mixture is infinite, which takes a heavy-tailed prior and n below 3.
        """
        normal = self._gp.predict(x, noise=noise)
        return self._belief.mix(normal.loc, normal.scale, self._data.has_outputs)

    def functions(self, num: int, *, seed: Seed = 0, num_features: int = 1024) -> Functions:
        """Pathwise draws, each with one v everywhere; see `Posterior.functions` and `GPPosterior.functions`."""
        first, second = child_seeds(seed, 2)
        paths = self._gp.functions(num, seed=first, num_features=num_features)
        source = generator(second, self._data.x.device)
        root = self._belief.draw((num,), tuple(self._data.batch_shape), source).sqrt().unsqueeze(-2)

        def draw(x: Any) -> Tensor:
            mean = self._gp.predict(x, noise=False).loc
            values = paths(x)
            lead = (num, *[1] * (values.ndim - 1 - self._data.has_outputs - root.ndim + 2), *root.shape[1:])
            return mean + self._squeeze(root.reshape(lead)) * (values - mean)

        return draw

    def _draw_paths(self, x: Any, sample_shape: tuple[int, ...], seed: Seed) -> tuple[Tensor, Tensor]:
        first, second = child_seeds(seed, 2)
        mean = self._gp.predict(x, noise=False).loc
        paths = self._gp.sample(x, sample_shape, seed=first)
        lead = mean.shape[: mean.ndim - 1 - self._data.has_outputs]
        v = self._belief.draw(sample_shape, tuple(lead), generator(second, mean.device))
        return mean + self._squeeze(v.sqrt().unsqueeze(-2)) * (paths - mean), v

    def _noise_share(self, v: Tensor) -> Tensor:
        return v
