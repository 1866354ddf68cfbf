r"""What the cause of a task says about its further points: f at new inputs, given the points so far and the latents.

    f(xs) | y, theta ~ N(k_*' (K + S)^-1 y,  k_** - k_*' (K + S)^-1 k_*),    S the noise variances of y

A network that is trained on this law instead of on one draw from it sees the same objective with less noise: of all
that is random about a target, only what no context could tell is averaged out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl.kernels import Kernel
from bayesdl.priors._tasks_draws import tasks_at_a_time


class Conditional(NamedTuple):
    """The normal law of further values of f, and of the noise on top of it, all in float64.

    Attributes:
        mean: (batch, q).
        variance: (batch, q), of f.
        noise_variance: (batch).
    """

    mean: Tensor
    variance: Tensor
    noise_variance: Tensor


@torch.no_grad()
def condition(
    kernel: Kernel, latents: Mapping[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int
) -> Conditional:
    """The law of f at xs (batch q d), given y (batch n) at x (batch n d).

    Args:
        latents: The hyper-parameters of the kernel, each (batch, *shape), "noise_variance" and "jitter" (batch).
        num_noiseless: How many of the last values of y are free of noise.

    Cost: O(batch (n + q) n^2) time; memory of covariance matrices is bounded as in `draw_functions`.
    """
    n, names = x.shape[-2], [parameter.name for parameter in kernel.parameters(x.shape[-1])]
    points, jitter = torch.cat([x, xs], -2).to(torch.float64), latents["jitter"].unsqueeze(-1)
    noise = latents["noise_variance"].unsqueeze(-1).repeat(1, n)
    noise[:, n - num_noiseless :] = 0
    found = []
    for rows in tasks_at_a_time(points):
        k, _ = kernel.value_and_pullback(points[rows], {name: latents[name][rows] for name in names})
        before = k[:, n:, n:].diagonal(dim1=-2, dim2=-1) + jitter[rows]
        within, across = k[:, :n, :n], torch.cat([k[:, :n, n:], y[rows].to(k).unsqueeze(-1)], -1)
        within.diagonal(dim1=-2, dim2=-1).add_(noise[rows] + jitter[rows])
        half = torch.linalg.solve_triangular(ops.cholesky(within).factor, across, upper=False)
        explained = half[..., :-1].square().sum(-2)
        found.append(((half[..., :-1] * half[..., -1:]).sum(-2), torch.maximum(before - explained, jitter[rows])))
    means, variances = zip(*found, strict=True)
    return Conditional(torch.cat(means), torch.cat(variances), latents["noise_variance"])


def condition_several(
    kernels: Sequence[Kernel], latents: Mapping[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int
) -> Conditional:
    """`condition` where each task has one of several kernels: latents["kernel"] says which."""
    mean = torch.empty(xs.shape[:-1], dtype=torch.float64, device=x.device)
    variance = torch.empty_like(mean)
    for i, kernel in enumerate(kernels):
        rows = (latents["kernel"] == i).nonzero().squeeze(-1)
        if rows.numel() == 0:
            continue
        # a name that means different shapes for different kernels has the number of the kernel in front
        own = {name.removeprefix(f"{i}."): value[rows] for name, value in latents.items()}
        mean[rows], variance[rows], _ = condition(kernel, own, x[rows], y[rows], xs[rows], num_noiseless)
    return Conditional(mean, variance, latents["noise_variance"])
