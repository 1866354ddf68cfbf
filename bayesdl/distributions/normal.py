"""The normal predictive."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Normal as TorchNormal

from bayesdl._random import Seed
from bayesdl.distributions._base import levels_of, like_of, normal_cdf, seeded_normal, shape_of


@final
class Normal(TorchNormal):
    r"""N(loc, scale^2), the predictive of a Gaussian process with Gaussian noise.

    Args:
        loc: Mean, shape (*b).
        scale: Standard deviation, shape (*b), above 0.
    """

    def log_prob(self, value: Any) -> Tensor:
        """Log density at `value`, shape broadcast(value, *b)."""
        return super().log_prob(like_of(value, self.loc))

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value), accurate in the lower tail."""
        return normal_cdf((like_of(value, self.loc) - self.loc) / self.scale)

    def quantile(self, q: Any) -> Tensor:
        """The value with P(Y <= value) = q; shape q.shape + (*b)."""
        levels = levels_of("Normal.quantile", q, self.loc, len(self.batch_shape))
        return self.loc + self.scale * torch.special.ndtri(levels)

    def rsample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), differentiable in loc and scale."""
        return self.loc + self.scale * seeded_normal(self._extended_shape(shape_of(sample_shape)), seed, self.loc)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of shape sample_shape + (*b), without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed)
