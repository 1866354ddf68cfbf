"""Slopes of drawn functions of every form of posterior, against finite differences."""

from __future__ import annotations

import warnings

import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import DataError, SettingError
from bayesdl.posterior import function_gradients
from bayesdl.posterior.function_gradients import _by_reverse_mode

F64 = torch.float64
BNN = bdl.BNN(hidden=(6,), activation="tanh")
GP = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)))
ENGINES = {
    "ExactGP": bdl.ExactGP(GP, num_starts=1),
    "NNGP": bdl.ExactGP(bdl.GP(bdl.kernels.NNGP(activation="erf")), num_starts=1),
    "ScaleMixture": bdl.ScaleMixture(GP, num_starts=1),
    "SparseGP": bdl.SparseGP(GP, num_inducing=6),
    "HMC": bdl.HMC(BNN, num_chains=2, num_warmup=30, num_draws=10, num_steps=4),
    "Ensemble": bdl.Ensemble(BNN, num_members=4, num_steps=50),
    "PFN": bdl.PFN.from_pretrained("gp"),
}


def data(outputs: int = 0):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(10, 2, generator=g, dtype=F64)
    y = torch.sin(4 * x[:, 0]) + x[:, 1]
    return x, torch.stack([y] * outputs, -1) if outputs else y


@pytest.mark.parametrize("name", ENGINES)
def test_slopes_are_those_of_finite_differences(name):
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so short a run has not converged
        functions = ENGINES[name].fit(x, y, seed=0).functions(4, seed=1)
    new = x[:3] + 0.037
    told, h = function_gradients(functions, new), 1e-5
    assert told.shape == (4, 3, 2)
    for j in range(2):
        e = h * torch.eye(2, dtype=F64)[j]
        rise = (functions(new + e) - functions(new - e)) / (2 * h)
        assert torch.allclose(told[..., j], rise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [0, 2])
def test_both_modes_agree_also_for_batches_and_outputs(outputs):
    x, y = data(outputs)
    functions = ENGINES["Ensemble"].fit(x, y, seed=0).functions(3, seed=1)
    new = torch.stack([x[:3], x[3:6]]) + 0.01
    forward = function_gradients(functions, new)
    assert forward.shape == ((3, 2, 3, 2, 2) if outputs else (3, 2, 3, 2))
    assert torch.allclose(forward, _by_reverse_mode(functions, new), rtol=1e-9, atol=1e-11)


def test_slopes_are_differentiable():
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so short a run has not converged
        functions = ENGINES["HMC"].fit(x, y, seed=0).functions(3, seed=1)
    new = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda at: function_gradients(functions, at), (new,), eps=1e-6, atol=1e-6)


def test_slopes_of_a_pfn_are_not_differentiated_again_where_queries_are_tokens():
    """Those of a head of kernels, whose queries pass no layer norm, are."""
    x, y = data()
    plain = bdl.PFN.from_pretrained("learning-curve").fit(x[:, :1], y, seed=0).functions(2, seed=1)
    with pytest.raises(SettingError, match="layer norm"):
        function_gradients(plain, x[:2, :1].clone().requires_grad_())
    assert not function_gradients(plain, x[:2, :1]).requires_grad
    functions = ENGINES["PFN"].fit(x, y, seed=0).functions(2, seed=1)
    new = x[:2].clone().requires_grad_()  # points of the data, where distances vanish
    assert torch.autograd.gradcheck(lambda at: function_gradients(functions, at), (new,), eps=1e-6, atol=1e-5)


def test_wrong_input_is_refused():
    functions = ENGINES["Ensemble"].fit(*data(), seed=0).functions(2)
    with pytest.raises(DataError):
        function_gradients(functions, torch.full((3, 2), torch.nan, dtype=F64))
