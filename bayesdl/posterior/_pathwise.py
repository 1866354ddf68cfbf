r"""Draws from the prior of the data, as functions that can be evaluated elsewhere too.

    z = f(X) + e,    f ~ GP(0, k) by random features,    e ~ N(0, s I),    so that E[z z'] = K + s I = A

A^{-1} z is what a pathwise draw from the posterior needs, and what the pathwise estimator of the evidence's gradient
needs: `ops.evidence_gradient`. The same generator state gives the same draws, so that the two can share their solves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesdl.posterior.base import Functions

NUM_FEATURES = 1024
_CPU_FEATURE_BYTES = 2**22  # what a core's cache holds: 2.5 times as fast as 2**26
_GPU_FEATURE_BYTES = 2**28


def prior_draws(
    kernel: Any,
    params: dict[str, Tensor],
    noise_variance: Tensor,
    x: Tensor,
    num: int,
    generator: torch.Generator,
    *,
    num_features: int = NUM_FEATURES,
) -> tuple[Functions, Tensor]:
    """Functions f and z = f(x) + e.

    Random numbers do not depend on hyper-parameters: from the same state of the generator, nearby hyper-parameters give
    nearby draws.

    Args:
        kernel: A `Kernel`.
        params: Its hyper-parameters, without batch axes.
        noise_variance: ().
        x: (n d) inputs.
        num: How many.
        generator: Source of randomness, on the device of x.
        num_features: Features of each function.

    Returns:
        f with f(x (s d)) -> (num, s), differentiable; and z (n num), without a graph.

    Raises:
        NotImplementedError: The kernel has no random features.

    Cost: O(n num num_features d) time, a few MiB at a time besides z.
    """
    functions = kernel.sample_functions(x.shape[-1], num, num_features, params, generator)
    noise = torch.randn((x.shape[0], num), generator=generator, dtype=torch.float64, device=x.device)
    with torch.no_grad():
        at_data = evaluate(functions, x, num * num_features)
    return functions, at_data + noise * noise_variance.sqrt()


def evaluate(functions: Functions, points: Tensor, features: int) -> Tensor:
    """The functions at points (s d), as columns (s num): a few points at a time, as each takes `features` numbers."""
    room = _GPU_FEATURE_BYTES if points.device.type == "cuda" else _CPU_FEATURE_BYTES
    parts = points.split(max(1, room // (8 * features)))
    return torch.cat([functions(part).mT for part in parts])
