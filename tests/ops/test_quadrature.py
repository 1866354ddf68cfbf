"""Nodes in the logarithm of a positive variable, against SciPy's adaptive integration and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate
from scipy.special import gammaln

from bayesdl.errors import NumericalError
from bayesdl.ops.quadrature import log_nodes


def gamma_integrand(shape: torch.Tensor, rate: torch.Tensor):
    """u -> shape u - rate e^u, whose integral is Gamma(shape) / rate^shape."""
    return lambda u: shape.unsqueeze(-1) * u - rate.unsqueeze(-1) * u.exp()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_gamma_integral(batch):
    """Shapes from 0.3, with a long tail to the left, to 4000, with a peak of width 0.016 far from the centre."""
    size = math.prod(batch)
    shape = torch.logspace(math.log10(0.3), math.log10(4000), size, dtype=torch.float64).reshape(batch)
    rate = torch.full_like(shape, 7.0)
    nodes = log_nodes(gamma_integrand(shape, rate), torch.zeros_like(shape), 1024)
    wanted = gammaln(shape.numpy()) - shape.numpy() * math.log(7)
    assert nodes.log_total.numpy() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert nodes.log_weight.exp().sum(-1).numpy() == pytest.approx(1.0, rel=1e-12)
    # the mean of e^u under the weights is shape / rate
    assert (nodes.log_weight + nodes.u).exp().sum(-1).numpy() == pytest.approx(shape.numpy() / 7, rel=1e-8)


def test_slow_tails_and_kinks_against_scipy():
    """exp(-|u| / 3) on the right and a sharp edge on the left; a kink costs digits, not the answer."""

    def g(u: torch.Tensor) -> torch.Tensor:
        return -torch.where(u > 0.4, (u - 0.4) / 3, (0.4 - u) * 40)

    nodes = log_nodes(g, torch.zeros((), dtype=torch.float64), 4000)
    wanted = integrate.quad(lambda u: math.exp(float(g(torch.tensor(u)))), -5, 130, points=[0.4], limit=200)[0]
    assert float(nodes.log_total) == pytest.approx(math.log(wanted), abs=2e-3)


def test_gradients_are_those_of_the_integral():
    """d log int / d shape = digamma(shape) - log rate, though the nodes are constants; twice differentiable too."""
    shape = torch.tensor([0.8, 30.0], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([2.0, 0.3], dtype=torch.float64, requires_grad=True)
    total = log_nodes(gamma_integrand(shape, rate), torch.zeros(2, dtype=torch.float64), 512).log_total
    by_shape, by_rate = torch.autograd.grad(total.sum(), [shape, rate], create_graph=True)
    torch.testing.assert_close(by_shape, torch.digamma(shape) - rate.log(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(by_rate, -shape / rate, rtol=1e-8, atol=1e-8)
    (curvature,) = torch.autograd.grad(by_shape.sum(), shape)
    torch.testing.assert_close(curvature, torch.polygamma(1, shape), rtol=1e-6, atol=1e-8)


def test_what_has_no_integral_is_refused():
    centre = torch.zeros((), dtype=torch.float64)
    with pytest.raises(NumericalError, match="proper distribution"):
        log_nodes(torch.zeros_like, centre, 64)
    with pytest.raises(NumericalError, match="finite and above 0"):
        log_nodes(lambda u: u * math.nan, centre, 64)
