"""MEADS for networks and GPs: the contract, and conjugate regression as judge."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning, SettingError
from bayesdl.hyper import LogNormal
from bayesdl.testing import check_engine


@pytest.mark.parametrize(
    "model", [bdl.BNN(hidden=(6,)), bdl.BNN(hidden=(4,), likelihood=bdl.Bernoulli())], ids=["regression", "binary"]
)
def test_obeys_the_contract(model):
    check_engine(bdl.MEADS(model, num_chains=16, num_warmup=16, num_draws=3, thin=2))


def test_conjugate_linear_regression():
    """A network without hidden layers and with known noise: Gaussian weights in closed form.

    Means and variances of 3 weights within 4.5 Monte Carlo errors, taken from 64 independent chains: a false alarm for
    1 in 6000 seeds.
    """
    rng = np.random.default_rng(10)
    x = rng.normal(size=(25, 2))
    y = x @ [0.8, -1.7] + 0.5 + 0.6 * rng.normal(size=25)
    known = bdl.Gaussian(noise_variance=0.36, prior=LogNormal(math.log(0.36), 1e-3), lower=0.0)
    model = bdl.BNN(hidden=(), prior=bdl.priors.Normal(scale=1.4, bias_scale=0.7), likelihood=known)
    posterior = bdl.MEADS(model, num_warmup=300, num_draws=40, thin=8, standardize=False).fit(x, y, seed=1)
    design = np.column_stack([x, np.ones(25)])
    scales = np.array([1.4 / 2**0.5, 1.4 / 2**0.5, 0.7])
    covariance = np.linalg.inv(design.T @ design / 0.36 + np.diag(scales**-2.0))
    mean = covariance @ design.T @ y / 0.36
    weights = posterior.draws[..., :3].numpy() * scales
    for values, wanted in ((weights, mean), ((weights - mean) ** 2, np.diag(covariance))):
        each = values.mean(1)
        assert (np.abs(each.mean(0) - wanted) < 4.5 * each.std(0, ddof=1) / 8).all()
    assert posterior.diagnostics["rhat"] < 1.05
    assert posterior.diagnostics["num_gradients"] == 1 + 300 + 320


def test_hyper_parameters_of_a_gp():
    x = torch.linspace(-2, 2, 20, dtype=torch.float64).unsqueeze(-1)
    y = torch.sin(2 * x[:, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        engine = bdl.MEADS(bdl.GP(bdl.kernels.RBF()), num_chains=16, num_warmup=60, num_draws=10, thin=5)
        posterior = engine.fit(x, y)
    assert float((posterior.predict(x).mean - y).abs().max()) < 0.3


def test_settings_are_checked_at_the_door():
    with pytest.raises(SettingError, match="num_chains"):
        bdl.MEADS(bdl.BNN(), num_chains=8)
    with pytest.raises(SettingError, match="thin"):
        bdl.MEADS(bdl.BNN(), thin=0)
