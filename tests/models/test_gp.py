"""The Gaussian process model: its prior over functions, and hyper-parameters as a flat vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayesdl.errors import SettingError
from bayesdl.hyper import Gamma, HalfNormal, LogNormal, Parameter
from bayesdl.kernels import RBF, Linear, Matern, RationalQuadratic, Scale
from bayesdl.likelihoods import Gaussian
from bayesdl.models import GP, Layout

F64 = torch.float64
LAYOUT = Layout(
    (
        Parameter("a", (), 0.7, Gamma(2.5, 1.5), 0.05),
        Parameter("b", (3,), (0.2, 1.0, 4.0), LogNormal(0.4, 0.8)),
        Parameter("c", (), 1.9, None, 0.3),
        Parameter("d", (2,), 0.9, HalfNormal(1.7), 0.01),
    ),
    has_mean=True,
)


def toy_theta(*batch, layout=LAYOUT, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, layout.dim, generator=g, dtype=F64)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_unpack_places_each_value_above_its_bound(batch):
    theta = toy_theta(*batch)
    values, mean = LAYOUT.unpack(theta)
    t = theta.numpy()
    assert LAYOUT.dim == 8
    np.testing.assert_allclose(values["a"], 0.05 + np.exp(t[..., 0]))
    np.testing.assert_allclose(values["b"], np.exp(t[..., 1:4]))
    np.testing.assert_allclose(values["c"], 0.3 + np.exp(t[..., 4]))
    np.testing.assert_allclose(values["d"], 0.01 + np.exp(t[..., 5:7]))
    np.testing.assert_array_equal(mean, t[..., 7])
    assert [v.shape for v in values.values()] == [batch, (*batch, 3), batch, (*batch, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_initial_unpacks_to_the_initial_values(dtype):
    values, mean = LAYOUT.unpack(LAYOUT.initial(torch.zeros((), dtype=dtype)))
    assert values["a"].dtype == dtype
    assert float(values["a"]) == pytest.approx(0.7, rel=1e-6)
    assert values["b"].tolist() == pytest.approx([0.2, 1.0, 4.0], rel=1e-6)
    assert values["d"].tolist() == pytest.approx([0.9, 0.9], rel=1e-6)
    assert float(mean) == 0


@pytest.mark.parametrize("has_mean", [True, False])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_chain_is_the_gradient_through_unpack(batch, has_mean):
    layout = Layout(LAYOUT.parameters, has_mean)
    theta = toy_theta(*batch, layout=layout).requires_grad_()
    values, mean = layout.unpack(theta)

    def objective(values, mean):
        terms = [(v.sin() * (i + 1)).reshape(*batch, -1).sum(-1) for i, v in enumerate(values.values())]
        return sum(terms) + mean.square()

    (wanted,) = torch.autograd.grad(objective(values, mean).sum(), theta)
    leaves = {name: v.detach().requires_grad_() for name, v in values.items()}
    mean = mean.detach().requires_grad_()
    *grads, mean_grad = torch.autograd.grad(objective(leaves, mean).sum(), [*leaves.values(), mean])
    got = layout.chain(theta.detach(), dict(zip(leaves, grads, strict=True)), mean_grad)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_log_prior_sums_densities_of_the_values_themselves(batch):
    values, _ = LAYOUT.unpack(toy_theta(*batch))
    leaves = {name: v.requires_grad_() for name, v in values.items()}
    total, slopes = LAYOUT.log_prior(leaves)
    wanted = Gamma(2.5, 1.5).log_prob(leaves["a"]) + LogNormal(0.4, 0.8).log_prob(leaves["b"]).sum(-1)
    wanted = wanted + HalfNormal(1.7).log_prob(leaves["d"]).sum(-1)
    torch.testing.assert_close(total, wanted)
    assert total.shape == batch
    gradients = torch.autograd.grad(wanted.sum(), list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        torch.testing.assert_close(slopes[name], torch.zeros_like(leaf) if gradient is None else gradient)


WIDE = Layout(
    (
        Parameter("a", (), 0.7, Gamma(2.5, 1.5), 0.05),
        Parameter("b", (2, 3), 0.4, None, -np.inf),
        Parameter("c", (3,), 0.9, LogNormal(0.4, 0.8), 0.2, 2.5),
        Parameter("d", (), -1.5, None, -np.inf, 1.0),
    ),
    has_mean=True,
)
PLAIN = Layout(
    (
        Parameter("a", (), 0.7, LogNormal(-0.3, 1.7), 0.05),
        Parameter("b", (3,), (0.2, 1.0, 4.0), LogNormal(0.4, 0.8)),
        Parameter("c", (2, 2), 1.9),
    ),
    has_mean=True,
)


@pytest.mark.parametrize("layout", [LAYOUT, WIDE, PLAIN], ids=["positive", "of any sign and bounded", "log-normal"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_one_pass_gives_the_values_the_log_prior_and_the_gradient_of_both(layout, batch):
    theta = (0.7 * toy_theta(*batch, layout=layout)).requires_grad_()
    values, constant = layout.unpack(theta)
    total, _ = layout.log_prior(values)
    g = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(v.shape, generator=g, dtype=F64) for name, v in values.items()}
    likelihood = sum((weights[name] * v).sum() for name, v in values.items()) + 2 * constant.sum()
    (wanted,) = torch.autograd.grad(total.sum() + likelihood, theta)
    point = layout.at(theta.detach())
    for name, value in values.items():
        torch.testing.assert_close(point.values[name], value.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(point.constant, constant.detach(), rtol=0, atol=0)
    assert point.log_prior.shape == batch
    torch.testing.assert_close(point.log_prior, total.detach(), rtol=1e-12, atol=1e-12)
    gradient = point.gradient(weights, torch.full(batch, 2.0, dtype=F64))
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_values_stay_between_their_bounds_and_starts_too():
    theta = toy_theta(6, layout=WIDE)
    values, _ = WIDE.unpack(theta)
    u = theta.numpy()
    assert values["b"].shape == (6, 2, 3)
    np.testing.assert_array_equal(values["b"].reshape(6, 6), u[:, 1:7])
    np.testing.assert_allclose(values["c"], 0.2 + 2.3 / (1 + np.exp(-u[:, 7:10])))
    np.testing.assert_allclose(values["d"], 1 - np.exp(-u[:, 10]))
    back = torch.cat([p.unconstrained(values[p.name]).reshape(6, -1) for p in WIDE.parameters], -1)
    torch.testing.assert_close(back, theta[:, :-1], rtol=1e-9, atol=1e-9)
    initial, _ = WIDE.unpack(WIDE.initial(theta))
    assert initial["c"].tolist() == pytest.approx([0.9] * 3)
    assert float(initial["d"]) == pytest.approx(-1.5)
    starts, _ = WIDE.unpack(WIDE.sample(300, torch.Generator().manual_seed(0), theta))
    assert bool(((starts["c"] > 0.2) & (starts["c"] < 2.5)).all())
    assert bool((starts["d"] < 1.0).all())
    assert 0.05 < float((starts["b"] - 0.4).abs().mean()) < 1.0


@pytest.mark.parametrize("layout", [WIDE, PLAIN], ids=["of any sign and bounded", "log-normal"])
def test_chain_is_the_gradient_of_every_kind_of_parameter(layout):
    theta = toy_theta(5, layout=layout).requires_grad_()
    values, mean = layout.unpack(theta)
    weights = {
        name: torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=F64) for name, v in values.items()
    }
    (wanted,) = torch.autograd.grad(sum((weights[k] * v).sum() for k, v in values.items()) + 2 * mean.sum(), theta)
    got = layout.chain(theta.detach(), weights, torch.full((5,), 2.0, dtype=F64))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_sampled_starts_lie_halfway_between_the_initial_values_and_draws():
    """In log scale, by the prior's own draws from the same generator."""
    prior = LogNormal(0.4, 0.8)
    layout = Layout((Parameter("b", (3,), (0.2, 1.0, 4.0), prior),), has_mean=True)
    like = torch.zeros((), dtype=F64)
    theta = layout.sample(5, torch.Generator().manual_seed(2), like)
    draws = prior.sample((5, 3), torch.Generator().manual_seed(2))
    wanted = (torch.tensor([0.2, 1.0, 4.0], dtype=F64) * draws).sqrt()
    torch.testing.assert_close(layout.unpack(theta)[0]["b"], wanted)
    assert torch.equal(theta[:, -1], torch.zeros(5, dtype=F64))
    many = LAYOUT.sample(200, torch.Generator().manual_seed(0), like)
    assert many.shape == (200, 8)
    assert bool(torch.isfinite(many).all())


def test_the_layout_of_a_model_names_kernel_then_noise():
    model = GP(Scale(Matern(nu=1.5)) + Linear(), mean="zero", likelihood=Gaussian(noise_variance=0.3))
    layout = model.layout(2)
    names = [p.name for p in layout.parameters]
    assert names[-1] == "noise_variance"
    assert all(name.startswith("kernel.") for name in names[:-1])
    assert not layout.has_mean
    assert GP(RBF()).layout(2).has_mean
    values, mean = layout.unpack(layout.initial(torch.zeros((), dtype=F64)))
    assert float(mean) == 0
    assert float(values["noise_variance"]) == pytest.approx(0.3)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(model.kernel(x, params=model.kernel_values(values)), model.kernel(x))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_prior_draws_have_the_covariance_of_the_kernel(batch):
    """4000 draws; a standard error of k_ij is sqrt((k_ii k_jj + k_ij^2) / N), and |z| < 5 on at most 30 entries of
    fixed-seed draws fails one right implementation in 50 000."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(*batch, 5, 2, generator=g, dtype=F64)
    model = GP(Scale(RationalQuadratic(alpha=0.6, lengthscale=0.8), outputscale=2.3))
    f = model.sample_prior(x, 4000, torch.Generator().manual_seed(6))
    assert f.shape == (4000, *batch, 5)
    k = model.kernel(x)
    products = torch.einsum("n...i,n...j->...ij", f, f) / 4000
    variance = k.diagonal(dim1=-2, dim2=-1)
    error = ((variance.unsqueeze(-1) * variance.unsqueeze(-2) + k.square()) / 4000).sqrt()
    assert float(((products - k) / error).abs().max()) < 5
    assert float((f.mean(0) / (variance / 4000).sqrt()).abs().max()) < 5


def test_prior_draws_at_repeated_points_agree():
    x = torch.zeros(6, 1, dtype=F64)
    f = GP(RBF(lengthscale=1.0)).sample_prior(x, 3, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(f).all())
    assert float((f - f[:, :1]).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"mean": "linear"}, "mean must be one of 'constant', 'zero'"),
        ({"kernel": "rbf"}, "kernel must be a kernel of bayesdl.kernels"),
        ({"likelihood": 0.1}, "likelihood must be a likelihood of bayesdl"),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(settings, wanted):
    with pytest.raises(SettingError, match=wanted):
        GP(**{"kernel": RBF(), **settings})
