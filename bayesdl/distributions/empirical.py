"""The distribution of equally weighted draws."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesdl._random import Seed, generator
from bayesdl.distributions._base import levels_of, like_of, shape_of
from bayesdl.errors import ShapeError, fail


@final
class Empirical(Distribution):
    r"""The distribution of M equally weighted draws per point.

    `cdf` is the step function (1/M) #{draws <= value}; `quantile` interpolates linearly between order statistics, as
    `numpy.quantile` does; `variance` divides by M.

    Args:
        draws: Shape (*b, M), finite.
    """

    arg_constraints = {"draws": constraints.real_vector}  # noqa: RUF012 - torch's own protocol
    support = constraints.real

    def __init__(self, draws: Tensor, validate_args: bool | None = None) -> None:
        self.draws = torch.as_tensor(draws)
        if self.draws.dim() < 1 or self.draws.shape[-1] == 0:
            fail(
                ShapeError,
                "Empirical",
                "draws must have shape (*b, M) with M at least 1.",
                got=f"{tuple(self.draws.shape)}",
                fix="put the draws on the last axis",
            )
        super().__init__(self.draws.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Distribution | None = None) -> Empirical:
        """The same draws with batch axes broadcast to `batch_shape`."""
        return Empirical(self.draws.expand(*shape_of(batch_shape), self.draws.shape[-1]), False)

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, shape (*b)."""
        return self.draws.mean(-1)

    @property
    def variance(self) -> Tensor:
        """Variance of the draws (divided by M), shape (*b)."""
        return self.draws.var(-1, correction=0)

    def log_prob(self, value: Any) -> Tensor:
        """Not defined: a set of draws has no density."""
        raise NotImplementedError(
            "Empirical.log_prob: a finite set of draws has no density; score it by CRPS, or predict with an engine "
            "whose predictive is a GaussianMixture"
        )

    def cdf(self, value: Any) -> Tensor:
        """The fraction of draws at or below `value`."""
        value = like_of(value, self.draws)
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        points, m = math.prod(self.batch_shape), self.draws.shape[-1]
        ordered = self.draws.detach().sort(-1).values.reshape(points, m)
        columns = value.detach().reshape(-1, points).T.contiguous()
        rank = torch.searchsorted(ordered, columns, right=True)
        return rank.T.reshape(value.shape).to(self.draws) / m

    def quantile(self, q: Any) -> Tensor:
        """Order statistics, interpolated linearly between 0 (smallest draw) and 1 (largest); shape q.shape + (*b)."""
        levels = levels_of("Empirical.quantile", q, self.draws, 0)
        ordered, last = self.draws.sort(-1).values, self.draws.shape[-1] - 1
        position = levels.reshape(-1) * last
        below = position.floor().clamp(0, max(last - 1, 0)).long()
        above = (below + 1).clamp(max=last)
        fraction = position - below
        value = ordered[..., below] * (1 - fraction) + ordered[..., above] * fraction
        return value.movedim(-1, 0).reshape(levels.shape + self.batch_shape)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Draws with replacement, shape sample_shape + (*b)."""
        shape, source = shape_of(sample_shape), generator(seed, self.draws.device)
        full = self._extended_shape(shape)
        index = torch.randint(self.draws.shape[-1], full, generator=source, device=self.draws.device)
        with torch.no_grad():
            flat = self.draws.reshape(-1, self.draws.shape[-1])
            columns = index.reshape(math.prod(shape), flat.shape[0]).T
            return flat.gather(-1, columns).T.reshape(full)
