"""Posteriors made by hand, without an engine: any hyper-parameters, any draws, far from defaults and unit scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bayesdl import ops
from bayesdl.data import Units, training_data, units_of
from bayesdl.kernels import Kernel, Matern, Scale
from bayesdl.likelihoods import Gaussian
from bayesdl.models import BNN, GP
from bayesdl.posterior import DrawsPosterior, GPPosterior
from bayesdl.posterior.closed_form import evidence_in_units

X_SCALE, Y_SCALE, Y_OFFSET = np.array([300.0, 0.02]), 4e-3, 50.0


def toy_data(batch=(), k=None, n=9, seed=0, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """x (*b, n, 2) with columns of sizes 300 and 0.02, y (*b, n[, k]) around 50 with spread 0.004."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*batch, n, 2))
    columns = np.stack([np.sin(2 * x[..., 0] + j) + x[..., 1] * (j - 1) for j in range(k or 1)], -1)
    y = Y_OFFSET + Y_SCALE * (columns + 0.3 * rng.normal(size=columns.shape))
    y = y if k else y[..., 0]
    return torch.tensor(x * X_SCALE, dtype=dtype), torch.tensor(y, dtype=dtype)


def new_points(*shape: int, seed=9, dtype=torch.float64) -> torch.Tensor:
    """Test inputs (*shape, 2) on the scale of `toy_data`."""
    return torch.tensor(np.random.default_rng(seed).normal(size=(*shape, 2)) * X_SCALE, dtype=dtype)


def gp_posterior(
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    kernel: Kernel | None = None,
    units: Units | None = None,
    spread: float = 0.5,
    noise: float = 0.2,
    seed: int = 1,
) -> GPPosterior:
    """A GP posterior whose hyper-parameters differ between data sets, outputs and columns."""
    model = GP(
        kernel or Scale(Matern(nu=1.5, lengthscale=0.9), outputscale=1.7),
        likelihood=Gaussian(noise_variance=noise, lower=1e-9),
    )
    data = training_data("toy", x, y)
    units = units_of(data, standardize=True) if units is None else units
    layout = model.layout(x.shape[-1])
    g = torch.Generator().manual_seed(seed)
    heads = (*data.batch_shape, data.y.shape[-1])
    jiggle = torch.randn(*heads, layout.dim, generator=g, dtype=torch.float64)
    values, constant = layout.unpack(layout.initial(jiggle) + spread * jiggle)
    inner = units.inward_x(data.x, torch.float64).unsqueeze(-3)
    residual = units.inward_y(data.y, torch.float64).movedim(-1, -2) - constant.unsqueeze(-1)
    covariance = model.kernel(inner, params=model.kernel_values(values))
    state = ops.condition(covariance, inner, residual, values["noise_variance"])
    evidence = evidence_in_units(ops.log_marginal(state), units, data.x.shape[-2])
    diagnostics = {
        "engine": "ByHand",
        "seconds": 0.25,
        "num_data": data.x.shape[-2],
        "trace": {"mll": [[1.0, float("nan")]]},
    }
    return GPPosterior(model, data, units, diagnostics, evidence, values=values, constant=constant, state=state)


def draws_posterior(
    x: torch.Tensor, y: torch.Tensor, *, model: BNN | None = None, chains: int = 2, draws: int = 5, seed: int = 2
) -> DrawsPosterior:
    """Random networks as if they were posterior draws."""
    model = BNN(hidden=(4,), activation="tanh") if model is None else model
    data = training_data("toy", x, y)
    units = units_of(data, standardize=True, targets=model.likelihood.task == "regression")
    dim = model.weight_space(x.shape[-1], data.y.shape[-1]).dim
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(*data.batch_shape, chains, draws, dim, generator=g, dtype=data.x.dtype)
    stats: dict[str, Any] = {
        "log_density": torch.randn(chains, draws, generator=g, dtype=torch.float64),
        "diverging": torch.rand(chains, draws, generator=g) > 0.7,
        "num_steps": torch.randint(20, (chains, draws), generator=g),
    }
    diagnostics = {"engine": "ByHand", "seconds": 0.25, "num_data": data.x.shape[-2], "divergences": [1, 0]}
    return DrawsPosterior(model, data, units, diagnostics, draws=q, stats={} if data.batch_shape else stats)


def labels(likelihood, batch=(), n=9, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (*b, n, 2) and class labels (*b, n) of the likelihood's task."""
    x, _ = toy_data(batch, n=n, seed=seed)
    g = torch.Generator().manual_seed(seed)
    return x, torch.randint(getattr(likelihood, "num_classes", 2), (*batch, n), generator=g).double()
