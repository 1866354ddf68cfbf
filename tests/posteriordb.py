"""Models of posteriordb, unconstrained and batched, with the reference draws to compare with.

A model is one function from its data to a `Problem`: the log density of an unconstrained position (log Jacobians
included) and the way back to the named quantities of the reference. Another posterior is one function more, listed in
`MODELS` under the name of its files in the folder `posteriordb` of BAYESDL_DATA.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl.models.log_density import LogDensity


class Problem(NamedTuple):
    """A log density on R^dim and the map from draws (C, N, dim) to named quantities."""

    log_density: LogDensity
    transform: Callable[[Tensor], dict[str, Tensor]]


class Reference(NamedTuple):
    """Reference draws (chains, draws, parameters) in the constrained space, the parameters' names, and the data."""

    draws: np.ndarray
    names: list[str]
    data: dict[str, Any]


def load(folder: Path, name: str) -> Reference:
    """The reference draws and the data of one posterior; `folder` is the one that BAYESDL_DATA names."""
    archive = np.load(folder / "posteriordb" / f"{name}.npz")
    data = json.loads((folder / "posteriordb" / f"{name}.data.json").read_text(encoding="utf-8"))
    return Reference(archive["draws"], [str(n) for n in archive["names"]], data)


def eight_schools_noncentered(data: dict[str, Any]) -> Problem:
    """theta_j = mu + tau z_j, z_j ~ N(0, 1), mu ~ N(0, 5), tau ~ HalfCauchy(5), y_j ~ N(theta_j, sigma_j).

    Position: z, mu, log tau.
    """
    y, sigma = _tensor(data["y"]), _tensor(data["sigma"])
    num = len(y)

    def split(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q[..., :num], q[..., num], q[..., num + 1]

    def log_density(q: Tensor) -> Tensor:
        z, mu, log_tau = split(q)
        theta = mu.unsqueeze(-1) + log_tau.exp().unsqueeze(-1) * z
        prior = -0.5 * z.square().sum(-1) - 0.5 * (mu / 5).square() - torch.log1p((log_tau.exp() / 5).square())
        return prior + log_tau - 0.5 * ((y - theta) / sigma).square().sum(-1)

    def transform(q: Tensor) -> dict[str, Tensor]:
        z, mu, log_tau = split(q)
        return {"theta": mu.unsqueeze(-1) + log_tau.exp().unsqueeze(-1) * z, "mu": mu, "tau": log_tau.exp()}

    return Problem(LogDensity(log_density, num + 2), transform)


def bayesian_linear_regression(data: dict[str, Any]) -> Problem:
    """y ~ N(X beta, sigma), beta ~ N(0, 10), sigma ~ HalfN(10). Position: beta, log sigma."""
    x, y = _tensor(data["X"]), _tensor(data["y"])
    n, d = x.shape

    def log_density(q: Tensor) -> Tensor:
        beta, log_sigma = q[..., :d], q[..., d]
        squares = (y - beta @ x.T).square().sum(-1)
        prior = -0.5 * (beta / 10).square().sum(-1) - 0.5 * (log_sigma.exp() / 10).square()
        return prior + log_sigma - n * log_sigma - 0.5 * squares * (-2 * log_sigma).exp()

    return Problem(LogDensity(log_density, d + 1), lambda q: {"beta": q[..., :d], "sigma": q[..., d].exp()})


MODELS: dict[str, Callable[[dict[str, Any]], Problem]] = {
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "sblri-blr": bayesian_linear_regression,
}


def stacked(values: dict[str, Tensor]) -> tuple[np.ndarray, list[str]]:
    """Named quantities as one array (C, N, parameters), with names as in posteriordb: vectors as "theta[1]", …"""
    columns, names = [], []
    for name, value in values.items():
        array = value.numpy()
        if array.ndim == 2:
            columns.append(array)
            names.append(name)
        else:
            columns += list(np.moveaxis(array, -1, 0))
            names += [f"{name}[{i + 1}]" for i in range(array.shape[-1])]
    return np.stack(columns, -1), names


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
