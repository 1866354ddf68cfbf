"""Targets on which samplers fail, or used to: log densities with known moments, and what a run made of them.

`python -m tests.hard_targets` prints the table of the documentation.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning


class Target(NamedTuple):
    """A log density on R^dim, and functions of the draws (C, N, dim) whose expectations are known.

    `moments` gives values (C, N, k), and `expected` their expectations (k).
    """

    log_density: Callable[[Tensor], Tensor]
    dim: int
    moments: Callable[[np.ndarray], np.ndarray]
    expected: np.ndarray


class Outcome(NamedTuple):
    """What became of a run: `z` is the largest distance of a known moment in Monte Carlo errors, NaN without any."""

    z: float
    divergences: int
    e_bfmi: float
    rhat: float
    ess: float
    warned: bool
    draws: np.ndarray
    diagnostics: dict[str, Any]


def funnel(dim: int = 10) -> Target:
    """Neal's funnel: v ~ N(0, 3), x_i | v ~ N(0, exp(v / 2)) for dim - 1 of them.

    Known: the mean and variance of v, and P(v < -3), the neck.
    """

    def log_density(q: Tensor) -> Tensor:
        v, x = q[..., 0], q[..., 1:]
        return -(v**2) / 18 - 0.5 * (-v).exp() * x.square().sum(-1) - 0.5 * (dim - 1) * v

    def moments(q: np.ndarray) -> np.ndarray:
        v = q[..., 0]
        return np.stack([v, v**2, v < -3.0], -1).astype(float)

    return Target(log_density, dim, moments, np.array([0.0, 9.0, 0.15865525]))


def funnel_noncentred(dim: int = 10) -> Target:
    """The same law in coordinates where it is a Gaussian: v / 3 and x_i exp(-v / 2)."""

    def moments(q: np.ndarray) -> np.ndarray:
        v = 3 * q[..., 0]
        return np.stack([v, v**2, v < -3.0], -1).astype(float)

    return Target(lambda q: -0.5 * q.square().sum(-1), dim, moments, np.array([0.0, 9.0, 0.15865525]))


def banana() -> Target:
    """x ~ N(0, 10), y | x ~ N(0.03 (x^2 - 100), 1). Known: both means, both variances, and the fourth moment of x."""

    def log_density(q: Tensor) -> Tensor:
        x, y = q.unbind(-1)
        return -0.5 * (x / 10) ** 2 - 0.5 * (y - 0.03 * (x**2 - 100)) ** 2

    def moments(q: np.ndarray) -> np.ndarray:
        x, y = q[..., 0], q[..., 1]
        return np.stack([x, y, x**2, y**2, x**4], -1)

    return Target(log_density, 2, moments, np.array([0.0, 0.0, 100.0, 1 + 2 * 9.0, 3e4]))


def rotated_gaussian(dim: int = 50, condition: float = 1e4, seed: int = 0) -> Target:
    """A Gaussian in a random basis with standard deviations from 1 to `condition`^(1/2), and a mean off the origin."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]
    scale = torch.logspace(0, 0.5 * float(np.log10(condition)), dim, dtype=torch.float64)
    mean = torch.randn(dim, generator=g, dtype=torch.float64)
    root = basis / scale  # (q - mean) @ root is standard normal

    def moments(q: np.ndarray) -> np.ndarray:
        white = (q - mean.numpy()) @ root.numpy()
        return np.concatenate([white, white**2], -1)

    expected = np.concatenate([np.zeros(dim), np.ones(dim)])
    return Target(lambda q: -0.5 * ((q - mean) @ root).square().sum(-1), dim, moments, expected)


TARGETS: dict[str, Callable[[], Target]] = {
    "funnel": funnel,
    "funnel, non-centred": funnel_noncentred,
    "banana": banana,
    "rotated Gaussian": rotated_gaussian,
}


def measure(target: Target, sampler: str, num_chains: int, num_warmup: int, num_draws: int, **settings: Any) -> Outcome:
    """Run `bdl.sample` and compare the known moments with their averages over the draws."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chains = bdl.sample(target.log_density, target.dim, sampler, num_chains, num_warmup, num_draws, **settings)
    values = target.moments(chains.draws.numpy())
    with np.errstate(invalid="ignore", divide="ignore"):
        error = array_stats.mcse(values, method="mean", chain_axis=0, draw_axis=1)
        z = np.abs(values.mean((0, 1)) - target.expected) / error
    found = chains.diagnostics
    told = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    e_bfmi = [value for value in np.atleast_1d(found.get("e_bfmi", np.nan)) if value is not None]
    return Outcome(
        float(np.nanmax(z)),
        int(found.get("divergences", 0)),
        float(np.min(e_bfmi)),
        float(found["rhat"]),
        float(min(found["ess_bulk"], found["ess_tail"])),
        told,
        chains.draws.numpy(),
        found,
    )


def main() -> None:
    """Every sampler named on the command line on every target, as a table."""
    runs: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
        "hmc": ((8, 300, 500), {}),
        "nuts": ((8, 300, 250), {"max_depth": 8}),
        "chees": ((32, 300, 150), {"num_steps": 256}),
        "mams": ((32, 300, 150), {}),
    }
    print("| target | sampler | worst z | divergences | E-BFMI | R-hat | ESS | warned | sd of v |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, make in TARGETS.items():
        for sampler in sys.argv[1:] or ("hmc", "nuts", "chees"):
            counts, settings = runs[sampler]
            found = measure(make(), sampler, *counts, seed=1, **settings)
            spread = f"{found.draws[..., 0].std():.2f}" if name == "funnel" else ""
            figures = f"{found.z:.1f} | {found.divergences} | {found.e_bfmi:.2f} | {found.rhat:.3f} | {found.ess:.0f}"
            print(f"| {name} | {sampler} | {figures} | {'yes' if found.warned else 'no'} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
