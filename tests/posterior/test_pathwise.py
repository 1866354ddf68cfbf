"""Draws from the prior of the data: their covariance, and what stays the same where hyper-parameters change."""

from __future__ import annotations

import math

import gpytorch
import pytest
import torch

import bayesdl as bdl
from bayesdl.posterior import _pathwise
from bayesdl.posterior._pathwise import prior_draws

KERNEL = bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5, lengthscale=(0.4, 1.9)), outputscale=2.3)
NOISE = torch.tensor(0.3, dtype=torch.float64)
X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PARAMS = {p.name: p.initial_tensor(X) for p in KERNEL.parameters(2)}


def test_draws_have_the_covariance_of_the_data():
    """21 entries of the second moment of 4000 draws at five standard errors: about 1e-5 false alarms; fixed seed.

    With 16 features a draw is not Gaussian: the fourth moment of its function exceeds a Gaussian's by 3/16 at most.
    """
    g = torch.Generator().manual_seed(1)
    _, z = prior_draws(KERNEL, PARAMS, NOISE, X, 4000, g, num_features=16)
    a = KERNEL(X) + NOISE * torch.eye(6, dtype=torch.float64)
    bound = 5 * math.sqrt(2 * (1 + 3 / 16) / 4000) * a.diagonal().outer(a.diagonal()).sqrt()
    assert bool(((z @ z.mT / 4000 - a).abs() <= bound).all())
    assert bool((z.mean(1).abs() <= 5 * (a.diagonal() / 4000).sqrt()).all())


def test_the_functions_are_those_of_the_draws_piece_by_piece(monkeypatch):
    functions, z = prior_draws(KERNEL, PARAMS, 0 * NOISE, X, 3, torch.Generator().manual_seed(2))
    torch.testing.assert_close(functions(X).mT, z)
    monkeypatch.setattr(_pathwise, "_CPU_FEATURE_BYTES", 2 * 8 * 3 * 1024)
    torch.testing.assert_close(prior_draws(KERNEL, PARAMS, 0 * NOISE, X, 3, torch.Generator().manual_seed(2))[1], z)


def test_nearby_hyperparameters_have_nearby_draws():
    near = {name: (1 + 1e-6) * v for name, v in PARAMS.items()}
    same, other = (prior_draws(KERNEL, PARAMS, NOISE, X, 3, torch.Generator().manual_seed(s))[1] for s in (2, 3))
    moved = prior_draws(KERNEL, near, (1 + 1e-6) * NOISE, X, 3, torch.Generator().manual_seed(2))[1]
    assert 0 < float((moved - same).norm()) < 1e-4 * float(same.norm())
    assert float((other - same).norm()) > 0.1 * float(same.norm())


def test_a_kernel_without_features_says_so():
    model = bdl.GP(gpytorch.kernels.CosineKernel())
    values, _ = model.layout(2).unpack(model.layout(2).initial(X))
    with pytest.raises(NotImplementedError, match="no random features"):
        prior_draws(model.kernel, model.kernel_values(values), NOISE, X, 3, torch.Generator().manual_seed(2))
