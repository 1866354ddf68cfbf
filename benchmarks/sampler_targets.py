"""The targets of `samplers.py`, each written twice: for torch, batched over chains, and for JAX, one chain.

(a) a Gaussian of 50 dimensions in a random basis, covariance eigenvalues from 1e-2 to 1e2; (b) eight schools,
non-centred, 10 dimensions; (c) a logistic regression, n = 1000, 25 coefficients; (d) a network 1-50-1 with tanh,
n = 100, noise 0.1, 151 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """A log density and the quantities on which convergence is judged.

    Attributes:
        name: Its letter.
        dim: Coordinates.
        log_density: (C, dim) -> (C,), torch.
        jax_log_density: Returns a function (dim,) -> () in JAX; called only where JAX is there.
        judged: (..., dim) -> (..., num).
    """

    name: str
    dim: int
    log_density: Callable[[Tensor], Tensor]
    jax_log_density: Callable[[], Callable[[Any], Any]]
    judged: Callable[[Tensor], Tensor]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian() -> Target:
    """(a) Rotated, condition 1e4."""
    basis = torch.linalg.qr(_normal(50, 50, seed=0))[0]
    precision = basis @ torch.diag(torch.logspace(2, -2, 50, dtype=torch.float64)) @ basis.T

    def in_jax() -> Callable[[Any], Any]:
        import jax.numpy as jnp

        p = jnp.asarray(precision.numpy())
        return lambda q: -0.5 * q @ p @ q

    return Target("a", 50, lambda q: -0.5 * ((q @ precision) * q).sum(-1), in_jax, lambda q: q)


def eight_schools() -> Target:
    """(b) mu ~ N(0, 5), tau ~ HalfCauchy(5), theta = mu + tau z."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)

    def log_density(q: Tensor) -> Tensor:
        z, mu, log_tau = q[..., :8], q[..., 8], q[..., 9]
        tau = log_tau.exp()
        error = (y - mu.unsqueeze(-1) - tau.unsqueeze(-1) * z) / sigma
        prior = -0.5 * (mu / 5).square() - torch.log1p((tau / 5).square()) + log_tau
        return prior - 0.5 * (z.square().sum(-1) + error.square().sum(-1))

    def in_jax() -> Callable[[Any], Any]:
        import jax.numpy as jnp

        at, scale = jnp.asarray(y.numpy()), jnp.asarray(sigma.numpy())

        def density(q: Any) -> Any:
            z, mu, log_tau = q[:8], q[8], q[9]
            tau = jnp.exp(log_tau)
            error = (at - mu - tau * z) / scale
            prior = -0.5 * (mu / 5) ** 2 - jnp.log1p((tau / 5) ** 2) + log_tau
            return prior - 0.5 * (jnp.sum(z**2) + jnp.sum(error**2))

        return density

    return Target("b", 10, log_density, in_jax, lambda q: q)


def logistic() -> Target:
    """(c) Standard normal covariates and prior."""
    x, beta = _normal(1000, 25, seed=1), _normal(25, seed=2)
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    signed = x * (2.0 * (uniform < torch.sigmoid(x @ beta)) - 1).unsqueeze(-1)

    def log_density(q: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(q @ signed.T).sum(-1) - 0.5 * q.square().sum(-1)

    def in_jax() -> Callable[[Any], Any]:
        import jax
        import jax.numpy as jnp

        rows = jnp.asarray(signed.numpy())
        return lambda q: jnp.sum(jax.nn.log_sigmoid(rows @ q)) - 0.5 * jnp.sum(q**2)

    return Target("c", 25, log_density, in_jax, lambda q: q)


def network() -> Target:
    """(d) Weights ~ N(0, 1), the read-out divided by sqrt(50)."""
    x = torch.linspace(-2, 2, 100, dtype=torch.float64)
    y = torch.sin(2 * x) + 0.1 * _normal(100, seed=4)

    def forward(q: Tensor, at: Tensor) -> Tensor:
        hidden = torch.tanh(at.unsqueeze(-1) * q[..., None, :50] + q[..., None, 50:100])
        return (hidden @ q[..., 100:150].unsqueeze(-1)).squeeze(-1) / math.sqrt(50) + q[..., 150:]

    def log_density(q: Tensor) -> Tensor:
        return -0.5 * ((y - forward(q, x)) / 0.1).square().sum(-1) - 0.5 * q.square().sum(-1)

    def in_jax() -> Callable[[Any], Any]:
        import jax.numpy as jnp

        inputs, targets = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

        def density(q: Any) -> Any:
            hidden = jnp.tanh(inputs[:, None] * q[:50] + q[50:100])
            f = hidden @ q[100:150] / math.sqrt(50) + q[150]
            return -0.5 * jnp.sum(((targets - f) / 0.1) ** 2) - 0.5 * jnp.sum(q**2)

        return density

    at = torch.linspace(-2.5, 2.5, 20, dtype=torch.float64)
    return Target("d", 151, log_density, in_jax, lambda q: forward(q, at))


TARGETS = {"a": gaussian, "b": eight_schools, "c": logistic, "d": network}
