"""What the predictive distributions share: values and levels as tensors, seeded standard draws, the normal cdf."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdl._random import Seed, generator
from bayesdl.errors import SettingError, fail


def like_of(value: Any, like: Tensor) -> Tensor:
    """`value` as a tensor in the dtype and on the device of `like`."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(np.asarray(value))
    return value.to(dtype=like.dtype, device=like.device)


def levels_of(where: str, q: Any, like: Tensor, batch_dims: int) -> Tensor:
    """Probability levels checked to lie in [0, 1], with `batch_dims` axes of size 1 appended."""
    levels = like_of(q, like)
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        fail(SettingError, where, "q must lie in [0, 1].", got=f"{q!r}", fix="pass a probability, such as 0.95")
    return levels.reshape(levels.shape + (1,) * batch_dims)


def shape_of(sample_shape: Any) -> torch.Size:
    """A sample shape given as an int, a tuple or a `torch.Size`."""
    return torch.Size((sample_shape,) if isinstance(sample_shape, int) else sample_shape)


def seeded_normal(shape: torch.Size, seed: Seed, like: Tensor) -> Tensor:
    """Standard normal numbers in the dtype and on the device of `like`; None draws fresh entropy."""
    return torch.randn(shape, generator=generator(seed, like.device), dtype=like.dtype, device=like.device)


def seeded_uniform(shape: torch.Size, seed: Seed, like: Tensor) -> Tensor:
    """Uniform numbers on [0, 1) in the dtype and on the device of `like`; None draws fresh entropy."""
    return torch.rand(shape, generator=generator(seed, like.device), dtype=like.dtype, device=like.device)


def normal_cdf(z: Tensor) -> Tensor:
    """P(Z <= z), accurate far into the lower tail."""
    # erfc of the negative keeps full relative accuracy far in the lower tail, where 0.5 (1 + erf) is only 0.
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))
