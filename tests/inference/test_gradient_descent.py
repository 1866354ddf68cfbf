"""Limits of gradient descent against ensembles of wide finite networks, and against each other where they agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import bayesdl as bdl
from bayesdl.errors import NumericalError, SettingError, ShapeError
from bayesdl.inference.gradient_descent import all_layers_limit, last_layer_limit
from bayesdl.priors import BurrXII, InverseGamma, LogNormal

X = torch.tensor([[1.0, 0.2], [-0.7, 1.1], [0.3, -1.4]], dtype=torch.float64)
Y = torch.tensor([0.8, -0.5, 0.4], dtype=torch.float64)
X_NEW = torch.tensor([[0.1, 0.4], [-2.0, -2.0]], dtype=torch.float64)
W_STD, B_STD = 1.3, 0.4
NNGP = bdl.kernels.NNGP(depth=1, activation="erf", w_std=W_STD, b_std=B_STD)
NTK = bdl.kernels.NTK(depth=1, activation="erf", w_std=W_STD, b_std=B_STD)


class Ensemble:
    """Networks of one hidden layer, every raw parameter N(0, 1), the read-out's then times sigma."""

    def __init__(self, num: int, width: int, sigma: torch.Tensor, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(num, *shape, generator=g, dtype=torch.float64)

        self.width = width
        self.hidden = [normal(2, width), normal(1, width)]
        self.readout = [sigma[:, None, None] * normal(width, 1), sigma[:, None, None] * normal(1, 1)]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        w, b = self.hidden
        return torch.erf(W_STD * x @ w / math.sqrt(x.shape[-1]) + B_STD * b)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        w, b = self.readout
        return (W_STD * self.features(x) @ w / math.sqrt(self.width) + B_STD * b).squeeze(-1)


def test_a_trained_read_out_has_2a_degrees_of_freedom():
    """2,000 networks of width 2,000, their read-outs by the exact end of gradient flow from their random start.

    Kolmogorov-Smirnov of the standardised values at each point, p above 1e-3 (false alarms 2e-3; the seed is fixed).
    With the 2a + n degrees of freedom of a posterior, there would be a quarter of the values beyond 4 that there are.
    """
    a, b, num = 1.5, 2.5, 2000
    g = torch.Generator().manual_seed(0)
    v = InverseGamma(a, b).sample((num,), g)
    networks = Ensemble(num, 2000, v.sqrt(), seed=1)

    def basis(x: torch.Tensor) -> torch.Tensor:
        bias = torch.full((num, len(x), 1), B_STD, dtype=torch.float64)
        return torch.cat([W_STD * networks.features(x) / math.sqrt(2000), bias], -1)

    # gradient flow leaves the read-out at the solution nearest to its start
    at_data = basis(X)
    update = at_data.mT @ torch.linalg.solve(at_data @ at_data.mT, (Y - networks(X)).unsqueeze(-1))
    values = networks(X_NEW) + (basis(X_NEW) @ update).squeeze(-1)
    limit = last_layer_limit(NNGP, X, Y, X_NEW, InverseGamma(a, b))
    assert limit.dof.tolist() == [3.0, 3.0]
    z = (values - limit.loc) / limit.scale
    for column in z.T.numpy():
        assert stats.kstest(column, stats.t(3.0).cdf).pvalue > 1e-3
        beyond = (abs(column) > 4).mean()
        assert 0.7 < beyond / (2 * stats.t(3.0).sf(4)) < 1.3
        assert beyond > 2.5 * (2 * stats.t(3.0 + 3).sf(4))


def trained(networks: Ensemble, rate: float, num_steps: int) -> torch.Tensor:
    """f at X_NEW after plain gradient descent on all parameters."""
    leaves = [t.requires_grad_() for t in (*networks.hidden, *networks.readout)]
    for _ in range(num_steps):
        grads = torch.autograd.grad(0.5 * (networks(X) - Y).square().sum(), leaves)
        with torch.no_grad():
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf -= rate * grad
    with torch.no_grad():
        assert float((networks(X) - Y).abs().max()) < 1e-3
        return networks(X_NEW)


def response(v: float) -> torch.Tensor:
    """B of a network whose v is known: what each unit target adds to the mean, (s, n)."""
    unit = [all_layers_limit(NNGP, NTK, X, e, X_NEW, LogNormal(math.log(v), 1e-4)).mean for e in torch.eye(3).double()]
    return torch.stack(unit, -1)


@pytest.mark.parametrize("v", [0.2, 4.0])
def test_networks_trained_throughout_follow_the_tangent_kernel_at_their_scale(v):
    """Twelve networks of width 4,000, all layers by plain gradient descent: f = f_0(x) + B (y - f_0(X)), one by one.

    The gap is O(1 / sqrt(width)): below 0.1 in root mean square, and at least twice that with the B of another v or of
    the read-out alone.
    """
    networks = Ensemble(12, 4000, torch.full((12,), v, dtype=torch.float64).sqrt(), seed=2)
    start, start_new = networks(X), networks(X_NEW)
    rate = 1.0 / float(torch.linalg.eigvalsh(NNGP(X) + v * (NTK(X) - NNGP(X)))[-1])
    values = trained(networks, rate, 120)

    def gap(b: torch.Tensor) -> float:
        return float((values - start_new - (Y - start) @ b.T).square().mean().sqrt())

    readout = [last_layer_limit(NNGP, X, e, X_NEW, InverseGamma()).mean for e in torch.eye(3).double()]
    assert gap(response(v)) < 0.1
    assert gap(response(0.8 / v)) > 2 * gap(response(v))
    assert gap(torch.stack(readout, -1)) > 2 * gap(response(v))


@pytest.mark.parametrize("v", [0.2, 4.0])
def test_the_spread_of_trained_networks_is_that_of_their_starts(v):
    """Variance of f_0(x) + B (y - f_0(X)) over 200,000 Gaussian starts, within five standard errors, sqrt(2 / num)."""
    k = v * NNGP(torch.cat([X, X_NEW])).numpy()
    start = np.random.default_rng(0).multivariate_normal(np.zeros(5), k, 200_000)
    spread = (start[:, 3:] - start[:, :3] @ response(v).numpy().T).var(0)
    limit = all_layers_limit(NNGP, NTK, X, Y, X_NEW, LogNormal(math.log(v), 1e-4))
    assert (spread / limit.variance.numpy()).tolist() == pytest.approx([1.0, 1.0], abs=5 * math.sqrt(2 / 200_000))


def test_without_hidden_training_both_limits_are_one():
    """T = K: the tangent kernel of the read-out alone, whatever v; mixtures of equal means."""
    for prior in (BurrXII(2.0, 3.0), LogNormal(0.2, 0.7)):
        first = last_layer_limit(NNGP, X, Y, X_NEW, prior)
        second = all_layers_limit(NNGP, NNGP, X, Y, X_NEW, prior)
        torch.testing.assert_close(first.mean, second.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(first.variance, second.variance, rtol=1e-8, atol=1e-12)


def test_the_closed_form_is_the_mixture():
    closed = last_layer_limit(NNGP, X, Y, X_NEW, InverseGamma(3.5, 2.0))
    mixture = last_layer_limit(NNGP, X, Y, X_NEW, InverseGamma(3.5, 2.0).log_prob, num_nodes=200)
    y = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(closed.log_prob(y), mixture.log_prob(y), rtol=1e-8, atol=1e-8)


def test_targets_are_met_exactly_and_batches_are_loops():
    at_data = all_layers_limit(NNGP, NTK, X, Y, X, InverseGamma(2.0, 2.0))
    torch.testing.assert_close(at_data.mean, Y, rtol=1e-9, atol=1e-9)
    assert float(at_data.stddev.max()) < 1e-5
    x = torch.stack([X, X + 0.3])
    y = torch.stack([Y, -2 * Y])
    for limit in (
        lambda x, y: last_layer_limit(NNGP, x, y, X_NEW, BurrXII()),
        lambda x, y: all_layers_limit(NNGP, NTK, x, y, X_NEW, BurrXII()),
    ):
        joint = limit(x, y)
        for i in range(2):
            torch.testing.assert_close(joint.mean[i], limit(x[i], y[i]).mean, rtol=1e-10, atol=0)
            torch.testing.assert_close(joint.variance[i], limit(x[i], y[i]).variance, rtol=1e-9, atol=0)


def test_wrong_calls_are_refused():
    with pytest.raises(ShapeError, match="one column"):
        last_layer_limit(NNGP, X, Y[:, None], X_NEW, InverseGamma())
    with pytest.raises(SettingError, match="must be fixed"):
        last_layer_limit(NNGP, X, Y, X_NEW, InverseGamma(learn=True))
    with pytest.raises(NumericalError, match="positive definite"):
        last_layer_limit(bdl.kernels.Linear(), X * 0, Y, X_NEW, InverseGamma())
