"""Deep ensembles: the contract, one member as a MAP fit, minibatches as unbiased estimates, and classification."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import NumericalError, SettingError
from bayesdl.testing import check_engine


def small(model: bdl.BNN, **settings: int) -> bdl.Ensemble:
    return bdl.Ensemble(model, **{"num_members": 2, "num_steps": 80, **settings})


@pytest.mark.parametrize(
    "model",
    [
        bdl.BNN(hidden=(8,)),
        bdl.BNN(hidden=(6, 4), activation="silu", prior=bdl.priors.StudentT(dof=4.0)),
        bdl.BNN(hidden=(8,), likelihood=bdl.Bernoulli()),
        bdl.BNN(hidden=(8,), likelihood=bdl.Categorical(3)),
        bdl.BNN(module=torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.SiLU(), torch.nn.Linear(6, 1))),
    ],
    ids=["tanh", "silu, heavy tails", "binary", "classes", "own module"],
)
def test_obeys_the_contract(model):
    check_engine(small(model))


def test_minibatches_obey_the_contract():
    check_engine(small(bdl.BNN(hidden=(8,)), batch_size=7))


def test_a_linear_member_is_the_ridge_solution():
    """With no hidden layer the MAP weights are ridge regression at the learned noise: normal equations as judge."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(60, 3)))
    y = x @ torch.tensor([1.5, -2.0, 0.3], dtype=torch.float64) + 0.7 + torch.tensor(0.3 * rng.normal(size=60))
    prior = bdl.priors.Normal(scale=0.8, bias_scale=1.3)
    engine = bdl.Ensemble(
        bdl.BNN(hidden=(), prior=prior), num_members=2, num_steps=3000, validation_fraction=0.0, standardize=False
    )
    posterior = engine.fit(x, y)
    q = posterior.draws[0]
    variance = 1e-6 + q[:, -1].exp()
    design = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], -1)
    scales = torch.tensor([0.8 / 3**0.5] * 3 + [1.3], dtype=torch.float64)
    for member in range(2):
        precision = design.T @ design / variance[member] + torch.diag(scales**-2)
        weights = torch.linalg.solve(precision, design.T @ y / variance[member])
        torch.testing.assert_close(q[member, :4] * scales, weights, rtol=1e-3, atol=1e-4)


def test_a_batch_estimates_the_full_log_density_without_bias():
    """Averaged over all batches of a partition, the scaled minibatch log density is the full one."""
    rng = np.random.default_rng(1)
    x, y = torch.tensor(rng.normal(size=(30, 2))), torch.tensor(rng.normal(size=(30, 1)))
    space = bdl.BNN(hidden=(5,)).weight_space(2, 1)
    q = space.initial(4, torch.Generator().manual_seed(0), x)
    full = space.bind(x, y)(q)
    parts = torch.stack([space.bind(x[i : i + 6], y[i : i + 6], 5.0)(q) for i in range(0, 30, 6)])
    torch.testing.assert_close(parts.mean(0), full, rtol=1e-12, atol=0)


def test_one_member_is_its_own_predictive():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(20, 2)), 1e3 + 50 * rng.normal(size=20)
    posterior = bdl.Ensemble(bdl.BNN(hidden=(6,)), num_members=1, num_steps=100).fit(x, y)
    predictive = posterior.predict(x)
    f = posterior.functions(1)(x)[0]
    torch.testing.assert_close(predictive.mean, f)
    variance = (1e-6 + posterior.draws[0, 0, -1].exp()) * np.var(y)
    torch.testing.assert_close(predictive.variance, variance.expand(20))


def test_classification_of_breast_cancer_and_digits():
    """Held-out accuracy at the level that any sound classifier reaches on these sets."""
    for name, likelihood, wanted in (("breast_cancer", bdl.Bernoulli(), 0.95), ("digits", bdl.Categorical(10), 0.94)):
        data = bdl.datasets.load(name)
        test = bdl.datasets.splits(len(data.y), 1, 0.25, seed=3)[0]
        x = data.x.float()
        engine = bdl.Ensemble(
            bdl.BNN(hidden=(32,), activation="relu", likelihood=likelihood), num_members=3, num_steps=400
        )
        posterior = engine.fit(x[~test], data.y[~test])
        table = bdl.compare({name: posterior}, x[test], data.y[test])
        assert table.loc[name, "accuracy"] >= wanted, table
        assert table.loc[name, "NLL"] < 0.35


def test_members_stop_before_they_believe_their_training_targets():
    """Pure noise, many inputs, few points: the last step claims hardly any noise, the held-out tenth does not."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(80, 20)), rng.normal(size=80)
    x_new, y_new = rng.normal(size=(200, 20)), rng.normal(size=200)
    stopped = bdl.Ensemble(bdl.BNN(hidden=(50,)), num_steps=800).fit(x, y)
    to_the_end = bdl.Ensemble(bdl.BNN(hidden=(50,)), num_steps=800, validation_fraction=0.0).fit(x, y)
    table = bdl.compare({"stopped": stopped, "to the end": to_the_end}, x_new, y_new)
    assert sorted(stopped.diagnostics["best_step"])[2] < 600
    assert set(to_the_end.diagnostics["best_step"]) == {800}
    assert table.loc["stopped", "NLPD"] < table.loc["to the end", "NLPD"]
    assert table.loc["stopped", "coverage 90%"] > 0.75


def test_bad_settings_and_diverging_members_are_refused():
    with pytest.raises(SettingError, match="num_members"):
        bdl.Ensemble(bdl.BNN(), num_members=0)
    with pytest.raises(SettingError, match=r"bdl\.ExactGP"):
        bdl.Ensemble(bdl.GP(bdl.kernels.RBF())).fit(np.ones((3, 1)), np.ones(3))
    rng = np.random.default_rng(3)
    with pytest.raises(NumericalError, match="finite loss"):
        small(bdl.BNN(hidden=(4,)), learning_rate=1e200).fit(rng.normal(size=(10, 1)), rng.normal(size=10))
