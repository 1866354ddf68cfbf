r"""The equal mixture of distributions that lie along one batch axis.

    F(y) = (1/L) sum_l F_l(y)

Families that are closed under mixing come back as themselves; for all others `Average` has what a predictive needs.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl._random import Seed, generator
from bayesdl.distributions import Bernoulli, Categorical, GaussianMixture, Normal

_STEPS = 60  # halvings of a bracket: more than float64 has bits


def average(members: Distribution, axis: int) -> Distribution:
    """The mixture over `axis` of the batch; a negative number that counts batch axes from the right."""
    if isinstance(members, Categorical):
        return Categorical(probs=members.probs.mean(axis - 1), validate_args=False)
    if isinstance(members, Bernoulli):
        return Bernoulli(probs=members.probs.mean(axis), validate_args=False)
    if isinstance(members, Normal):
        return GaussianMixture(members.loc.movedim(axis, -1), members.scale.movedim(axis, -1), validate_args=False)
    if isinstance(members, GaussianMixture):
        parts = (members.loc, members.scale, members.weights)
        loc, scale, weights = (t.movedim(axis - 1, -2).flatten(-2) for t in parts)
        return GaussianMixture(loc, scale, weights / members.batch_shape[axis], validate_args=False)
    return Average(members, axis)


@final
class Average(Distribution):
    """The mixture over one batch axis of any distribution with log_prob, cdf, quantile and sample(shape, seed).

    Args:
        members: Batch (..., L, ...).
        axis: Where L stands, counted from the right.

    Cost: L times that of one member; `quantile` takes 60 evaluations of the cdf. Quantiles carry no gradient.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own protocol

    def __init__(self, members: Distribution, axis: int) -> None:
        self.members, self._axis = members, axis
        shape = list(members.batch_shape)
        self._num = shape.pop(len(shape) + axis)
        super().__init__(torch.Size(shape), validate_args=False)

    @property
    def support(self) -> Any:
        """That of the members."""
        return self.members.support

    @property
    def mean(self) -> Tensor:
        """Mean of the means."""
        return self.members.mean.mean(self._axis)

    @property
    def variance(self) -> Tensor:
        """Variance within the members plus variance of their means."""
        return self.members.variance.mean(self._axis) + self.members.mean.var(self._axis, correction=0)

    def log_prob(self, value: Any) -> Tensor:
        """Log density at `value`."""
        return torch.logsumexp(self.members.log_prob(self._beside(value)), self._axis) - math.log(self._num)

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value)."""
        return self.members.cdf(self._beside(value)).mean(self._axis)

    def quantile(self, q: Any) -> Tensor:
        """The value with P(Y <= value) = q, by bisection between the members' quantiles; shape q.shape + (*b)."""
        with torch.no_grad():
            own = self.members.quantile(q)
            low, high = own.amin(self._axis), own.amax(self._axis)
            levels = torch.as_tensor(q, dtype=low.dtype, device=low.device)
            levels = levels.reshape(levels.shape + (1,) * (low.ndim - levels.ndim))
            for _ in range(_STEPS):
                middle = 0.5 * (low + high)
                above = self.cdf(middle) >= levels
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            return high

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws of a member chosen anew for each."""
        shape = torch.Size((sample_shape,) if isinstance(sample_shape, int) else sample_shape)
        device = self.members.mean.device
        source = generator(seed, device)
        draws = self.members.sample(shape, source)
        full = self._extended_shape(shape)
        chosen = torch.randint(self._num, full, generator=source, device=device).unsqueeze(self._axis)
        return draws.gather(draws.ndim + self._axis, chosen).squeeze(self._axis)

    def _beside(self, value: Any) -> Tensor:
        """`value` with an axis for the members."""
        like = self.members.mean
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        return value.expand(torch.broadcast_shapes(value.shape, self.batch_shape)).unsqueeze(self._axis)
