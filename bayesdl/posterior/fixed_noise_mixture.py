r"""Scale mixtures of Gaussian processes whose noise does not share the scale: y | v ~ N(m, v K + s I).

Each v has its own mean and covariance. With K = U diag(l) U', found once, all of them are at hand:

    mean(x) | v = m(x) + v k(x, X) U diag(1 / (v l + s)) U' r
    cov(x, x') | v = v k(x, x') - v^2 k(x, X) U diag(1 / (v l + s)) U' k(X, x')
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl._random import Seed, child_seeds, generator
from bayesdl.distributions import GaussianMixture
from bayesdl.posterior._scale import Mixing, NodeBelief, _beside_points, believe, fixed_noise_log_likelihood
from bayesdl.posterior.base import Functions
from bayesdl.posterior.closed_form import GPPosterior, _root, evidence_in_units
from bayesdl.posterior.scale_mixture import MixturePosterior


@final
class FixedNoiseMixturePosterior(MixturePosterior):
    """A mixture whose noise stays outside the scale, over M nodes in v.

    Cost: O(n^3) once for eigenvectors; predicting s points takes O(n^2 s + M n s) time and O((n + M) s) memory for each
    batch element and output; joint draws O(n s^2 + s^3) for each node that is drawn; each function O(n^2).
    """

    form: ClassVar[str] = "fixed_noise_mixture"

    def __init__(
        self,
        gp: GPPosterior,
        mixing: Mixing,
        belief: NodeBelief,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None,
    ) -> None:
        super().__init__(gp, mixing, belief, diagnostics, log_evidence)
        self._eigenvalues, self._vectors, self._along = _decompose(gp)
        self._noise = gp._values["noise_variance"]

    @classmethod
    def mix(cls, gp: GPPosterior, mixing: Mixing) -> FixedNoiseMixturePosterior:
        """The mixture over v whose GP at v = 1 is `gp`: quadrature or importance sampling, as asked."""
        eigenvalues, _, along = _decompose(gp)
        likelihood, centre = fixed_noise_log_likelihood(eigenvalues, along, gp._values["noise_variance"])
        belief, log_integral, report = believe(mixing, likelihood, centre, mixing.shapes(gp._values))
        n = along.shape[-1]
        total = evidence_in_units(log_integral - 0.5 * n * math.log(2 * math.pi), gp._units, n)
        diagnostics = {**gp.diagnostics, "method": mixing.method, **report, "scale_mean": belief.mean.tolist()}
        return cls(gp, mixing, belief, diagnostics, total)

    def predict(self, x: Any, *, noise: bool = True) -> GaussianMixture:
        """Gaussian mixture of y (or of f with noise=False) at each x, components of unequal mean; see `Posterior`."""
        x = self._inputs("predict", x)
        head, d = x.shape[:-1], x.shape[-1]
        if not self._data.batch_shape:
            x = x.reshape(-1, d)
        k_xs, inner = self._gp._cross(x)
        prior_variance = self.model.kernel.diagonal(inner, self._gp._kernel_values()).unsqueeze(-2)
        v, share, along = self._belief.variance, self._share(), self._vectors.mT @ k_xs
        mean = (share * self._along.unsqueeze(-2)) @ along + self._gp._prior_mean(inner).unsqueeze(-2)
        v = v.unsqueeze(-1)
        variance = v * (prior_variance - share @ along.square())  # (..., k, M, s)
        variance = variance.clamp_min(0.0) + torch.finfo(variance.dtype).eps * v * prior_variance
        if noise:
            variance = variance + self._noise[..., None, None]
        loc, scale = self._outward(mean, variance.sqrt())
        shape = head if not self._data.batch_shape else loc.shape[: loc.ndim - 1 - self._data.has_outputs]
        event = loc.shape[loc.ndim - 1 - self._data.has_outputs :]
        weight = _beside_points(self._belief.log_weight.exp(), self._data.has_outputs, 1).to(loc)
        return GaussianMixture(loc.reshape(*shape, *event), scale.reshape(*shape, *event), weight, validate_args=False)

    def functions(self, num: int, *, seed: Seed = 0, num_features: int = 1024) -> Functions:
        """Pathwise draws, each with one v everywhere; see `Posterior.functions` and `GPPosterior.functions`."""
        first, second, third = child_seeds(seed, 3)
        device, state = self._data.x.device, self._gp._state
        kernel, values = self.model.kernel, self._gp._kernel_values()
        prior = kernel.sample_functions(state.x.shape[-1], num, num_features, values, generator(first, device))
        v = self._belief.draw((num,), tuple(self._data.batch_shape), generator(second, device)).unsqueeze(-1)
        shape = (num, *state.residual.shape)
        z = torch.randn(shape, generator=generator(third, device), dtype=v.dtype, device=device)
        gap = state.residual - v.sqrt() * prior(state.x) - self._noise.sqrt().unsqueeze(-1) * z
        along = (self._vectors.mT @ gap.unsqueeze(-1)).squeeze(-1)
        along = along * v / (v * self._eigenvalues + self._noise.unsqueeze(-1))
        weights = self._vectors @ along.unsqueeze(-1)

        def draw(x: Any) -> Tensor:
            k_xs, inner = self._gp._cross(self._inputs("functions", x))
            extra = [1] * (k_xs.ndim - self._vectors.ndim)
            update = (k_xs.mT @ weights.reshape(num, *extra, *weights.shape[1:])).squeeze(-1)
            root = v.sqrt().reshape(num, *extra, *v.shape[1:])
            values = root * prior(inner) + update + self._gp._prior_mean(inner)
            return self._squeeze(self._units.outward(values.movedim(-2, -1)))

        return draw

    def _draw_paths(self, x: Any, sample_shape: tuple[int, ...], seed: Seed) -> tuple[Tensor, Tensor]:
        first, second = child_seeds(seed, 2)
        k_xs, inner = self._gp._cross(self._inputs("sample", x))
        k_ss = self.model.kernel(inner, params=self._gp._kernel_values())
        along, share = self._vectors.mT @ k_xs, self._share()
        prior_mean = self._gp._prior_mean(inner)
        lead = tuple(k_ss.shape[:-3])
        index = self._belief.pick(sample_shape, lead, generator(first, k_ss.device))
        shape = (*sample_shape, *k_ss.shape[:-1])
        z = torch.randn(shape, generator=generator(second, k_ss.device), dtype=k_ss.dtype, device=k_ss.device)
        draws = torch.zeros_like(z)
        # one factorisation for each node that is drawn somewhere, rather than one for each draw
        for node in index.unique().tolist():
            v, weight = self._belief.variance[..., node], share[..., node, :]
            mean = along.mT @ (weight * self._along).unsqueeze(-1)
            covariance = v[..., None, None] * (k_ss - along.mT @ (weight.unsqueeze(-1) * along))
            path = mean.squeeze(-1) + (_root(covariance) @ z.unsqueeze(-1)).squeeze(-1)
            draws = torch.where((index == node).unsqueeze(-1), path, draws)
        values = (draws + prior_mean).movedim(-2, -1)
        return self._squeeze(self._units.outward(values)), self._belief.at(index)

    def _noise_share(self, v: Tensor) -> Tensor:
        return torch.ones_like(v)

    def _share(self) -> Tensor:
        """v / (v l + s), (*b k M n)."""
        v = self._belief.variance.unsqueeze(-1)
        return v / (v * self._eigenvalues.unsqueeze(-2) + self._noise[..., None, None])

    def _outward(self, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(..., k, M, s) in the model's units to (..., s, k, M) in the user's, without k where y came without it."""
        units = self._units
        loc = mean.movedim(-1, -3) * units.y_scale.unsqueeze(-1) + units.y_loc.unsqueeze(-1)
        scale = scale.movedim(-1, -3) * units.y_scale.unsqueeze(-1)
        parts = [t.to(self._data.x.dtype) for t in (loc, scale)]
        return tuple(parts) if self._data.has_outputs else tuple(t.squeeze(-2) for t in parts)


def _decompose(gp: GPPosterior) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (*b k n) and vectors (*b k n n) of K, and the residual along them (*b k n)."""
    state = gp._state
    k_xx = gp.model.kernel(state.x, params=gp._kernel_values())
    values, vectors = torch.linalg.eigh(k_xx.expand(*state.chol.shape))
    return values.clamp_min(0.0), vectors, (vectors.mT @ state.residual.unsqueeze(-1)).squeeze(-1)
