"""Distributions of class labels."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical

from bayesdl._random import Seed, generator
from bayesdl.distributions._base import levels_of, like_of, seeded_uniform, shape_of


@final
class Bernoulli(TorchBernoulli):
    """Binary labels 0 and 1 with P(Y = 1) = probs, shape (*b); give either `probs` or `logits`."""

    def log_prob(self, value: Any) -> Tensor:
        """Log probability of the label `value`, 0 or 1."""
        return super().log_prob(like_of(value, self._param))

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value): 0 below 0, 1 - probs on [0, 1), 1 from 1 on."""
        value = like_of(value, self._param)
        return torch.where(value < 0, torch.zeros_like(self.probs), torch.where(value < 1, 1 - self.probs, 1.0))

    def quantile(self, q: Any) -> Tensor:
        """The smallest label with cdf >= q; shape q.shape + (*b)."""
        levels = levels_of("Bernoulli.quantile", q, self._param, len(self.batch_shape))
        return (levels > 1 - self.probs).to(self.probs)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Labels 0 and 1 in the dtype of the parameters, shape sample_shape + (*b)."""
        shape = self._extended_shape(shape_of(sample_shape))
        with torch.no_grad():
            return (seeded_uniform(shape, seed, self.probs) < self.probs).to(self.probs)


@final
class Categorical(TorchCategorical):
    """Labels 0..K-1 with probabilities `probs`, shape (*b, K); give either `probs` or `logits`.

    `mean`, `variance`, `cdf` and `quantile` treat the label as a number, which is meaningful for ordered classes only.
    """

    @property
    def mean(self) -> Tensor:
        """sum_k k p_k, shape (*b)."""
        return (self.probs * self._labels()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """sum_k (k - mean)^2 p_k, shape (*b)."""
        return (self.probs * (self._labels() - self.mean.unsqueeze(-1)).square()).sum(-1)

    def log_prob(self, value: Any) -> Tensor:
        """Log probability of the label `value`, 0..K-1."""
        return super().log_prob(like_of(value, self._param))

    def cdf(self, value: Any) -> Tensor:
        """P(Y <= value)."""
        value = like_of(value, self._param)
        return (self.probs * (self._labels() <= value.unsqueeze(-1))).sum(-1)

    def quantile(self, q: Any) -> Tensor:
        """The smallest label with cdf >= q; shape q.shape + (*b), dtype int64."""
        levels = levels_of("Categorical.quantile", q, self._param, len(self.batch_shape))
        below = self.probs.cumsum(-1) < levels.unsqueeze(-1)
        return below.sum(-1).clamp(max=self.probs.shape[-1] - 1)

    def sample(self, sample_shape: Any = (), seed: Seed = None) -> Tensor:
        """Labels of dtype int64, shape sample_shape + (*b)."""
        shape, source = shape_of(sample_shape), generator(seed, self.probs.device)
        with torch.no_grad():
            flat = self.probs.reshape(-1, self.probs.shape[-1])
            num = math.prod(shape)
            if num == 0 or flat.shape[0] == 0:
                return torch.empty(self._extended_shape(shape), dtype=torch.int64, device=flat.device)
            index = torch.multinomial(flat, num, replacement=True, generator=source)
            return index.T.reshape(self._extended_shape(shape))

    def _labels(self) -> Tensor:
        return torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)
