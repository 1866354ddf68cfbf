"""Bayesian neural networks: forward passes against torch.nn, the fused log density against autograd."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import distributions, nn

from bayesdl.errors import SettingError, ShapeError
from bayesdl.hyper import Gamma
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models import BNN, GP, _fused
from bayesdl.models._networks import ACTIVATIONS, MLP, ModuleNetwork
from bayesdl.priors import Laplace, Normal, StudentT

F64 = torch.float64
LIKELIHOODS = {
    "gaussian": Gaussian(prior=Gamma(1.7, 2.5), lower=0.02),
    "gaussian, flat prior": Gaussian(prior=None, lower=0.0),
    "bernoulli": Bernoulli(),
    "categorical": Categorical(3),
}
MODULES = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def toy(likelihood, batch=(), k=2, n=7, d=3, dtype=F64, seed=0):
    """x (*b, n, d) and y (*b, n, k) of the likelihood's task."""
    g = generator(seed)
    k = 1 if likelihood.task == "multiclass" else k
    x = torch.randn(*batch, n, d, generator=g, dtype=dtype)
    y = torch.randn(*batch, n, k, generator=g, dtype=dtype)
    if likelihood.task == "binary":
        y = (y > 0).to(dtype)
    if likelihood.task == "multiclass":
        y = torch.randint(likelihood.num_classes, y.shape, generator=g).to(dtype)
    return x, y


def sequential(hidden, activation, d, outputs, dtype=F64):
    """A torch network with weights from a generator of its own."""
    widths, layers = (d, *hidden, outputs), []
    for a, b in pairwise(widths):
        layers += [nn.utils.skip_init(nn.Linear, a, b, dtype=dtype), MODULES[activation]()]
    network = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(p.numel()), dtype=dtype))
    return network


def flat_weights(network):
    """The weights of a Sequential in the order of MLP: each matrix (in, out), then its bias."""
    linear = [m for m in network if isinstance(m, nn.Linear)]
    return torch.cat([t.detach().reshape(-1) for m in linear for t in (m.weight.T, m.bias)])


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("hidden", [(), (4,), (5, 2), (3, 4, 2)])
def test_an_mlp_is_the_sequential_network_of_the_same_weights(hidden, activation):
    network = sequential(hidden, activation, 3, 2)
    x = torch.randn(6, 3, generator=generator(), dtype=F64)
    mlp = MLP(3, hidden, 2, activation)
    weights = flat_weights(network)
    assert mlp.num_weights == len(weights)
    torch.testing.assert_close(mlp.forward(weights[None], x)[0], network(x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "function"), [("sin", np.sin), ("erf", np.vectorize(math.erf))])
def test_activations_that_torch_has_no_module_for(name, function):
    x = torch.linspace(-3, 3, 9, dtype=F64)
    np.testing.assert_allclose(ACTIVATIONS[name](x), function(x.numpy()), rtol=1e-14)


@pytest.mark.parametrize("module", [False, True])
def test_batch_axes_of_weights_and_inputs_broadcast(module):
    """Each chain and each data set gives what it gives alone, with shared inputs or inputs of its own."""
    network = ModuleNetwork(sequential((4,), "tanh", 3, 2), 3, 2) if module else MLP(3, (4,), 2, "tanh")
    w = torch.randn(2, 5, network.num_weights, generator=generator(1), dtype=F64)
    shared, own = (torch.randn(*b, 6, 3, generator=generator(2), dtype=F64) for b in ((), (2,)))
    for x in (shared, own):
        f = network.forward(w, x)
        assert f.shape == (2, 5, 6, 2)
        for i in range(2):
            for c in range(5):
                alone = network.forward(w[i, c][None], x if x.ndim == 2 else x[i])[0]
                torch.testing.assert_close(f[i, c], alone, rtol=1e-12, atol=1e-12)
    wide = network.forward(w, torch.stack([own, own + 1, own - 1]))
    assert wide.shape == (3, 2, 5, 6, 2)
    torch.testing.assert_close(wide[1], network.forward(w, own + 1), rtol=1e-12, atol=1e-12)


# The log density


def by_hand(space, hidden, activation, q, x, y, scale):
    """log p(z) + sum [log p(v) + u] + scale log p(y | f), by torch.nn and torch.distributions, for one q (D,)."""
    outputs = space.likelihood.num_outputs(y.shape[-1])
    m = sum((a + 1) * b for a, b in zip((x.shape[-1], *hidden), (*hidden, outputs), strict=True))
    z, u = q[:m], q[m:]
    widths, h, at = (x.shape[-1], *hidden, outputs), x, 0
    for i, (a, b) in enumerate(pairwise(widths)):
        weight = z[at : at + a * b].reshape(a, b) * space.prior.scale / math.sqrt(a)
        bias = z[at + a * b : at + a * b + b] * space.prior.bias_scale
        h, at = h @ weight + bias, at + (a + 1) * b
        h = getattr(torch, activation)(h) if i < len(widths) - 2 else h
    total = distributions.StudentT(torch.tensor(space.prior.dof, dtype=F64)).log_prob(z).sum()
    if space.likelihood.task == "regression":
        v = space.likelihood.lower + u.exp()
        fit = distributions.Normal(h, v.sqrt()).log_prob(y).sum()
        total = total + u.sum()
        if space.likelihood.prior is not None:
            total = total + distributions.Gamma(*torch.tensor([1.7, 2.5], dtype=F64)).log_prob(v).sum()
    elif space.likelihood.task == "binary":
        fit = distributions.Bernoulli(logits=h).log_prob(y).sum()
    else:
        fit = distributions.Categorical(logits=h).log_prob(y.squeeze(-1)).sum()
    return total + scale * fit


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("hidden", [(), (4,), (3, 2)])
def test_the_log_density_is_prior_jacobian_and_likelihood(name, hidden):
    """And its gradient, both ways, against autograd through torch.nn arithmetic and torch.distributions."""
    model = BNN(hidden, "tanh", StudentT(1.6, bias_scale=0.7, dof=4.0), LIKELIHOODS[name])
    x, y = toy(model.likelihood)
    space = model.weight_space(3, y.shape[-1])
    q = 0.8 * torch.randn(5, space.dim, generator=generator(4), dtype=F64)
    q.requires_grad_()
    wanted = torch.stack([by_hand(space, hidden, "tanh", row, x, y, 2.5) for row in q])
    (slope,) = torch.autograd.grad(wanted.sum(), q)
    for got in (space.log_density(q, x, y, 2.5), space.bind(x, y, 2.5)(q)):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), q)[0], slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prior", [Normal(0.8), Laplace(1.3, fan_in=False), StudentT(2.0, bias_scale=0.4, dof=2.5)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("hidden", [(), (5,), (4, 3), (3, 4, 2)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_fused_log_density_is_the_plain_one(name, activation, hidden, batch, prior):
    model = BNN(hidden, activation, prior, LIKELIHOODS[name])
    x, y = toy(model.likelihood, batch)
    space = model.weight_space(3, y.shape[-1])
    q = torch.randn(*batch, 4, space.dim, generator=generator(7), dtype=F64).requires_grad_()
    weight = torch.rand(*batch, 4, generator=generator(8), dtype=F64)
    plain = space.log_density(q, x, y, 3.7)
    fused = _fused.FusedLogDensity(space, x, y, 3.7)(q)
    assert fused.shape == (*batch, 4)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    slopes = [torch.autograd.grad((weight * value).sum(), q)[0] for value in (fused, plain)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_fused_log_density_in_float32_and_with_shared_inputs(name, activation):
    """Against float64 of the same numbers; x and y without batch axes serve every group of chains."""
    model = BNN((6, 5), activation, Normal(), LIKELIHOODS[name])
    x, y = toy(model.likelihood, n=20, dtype=torch.float32)
    space = model.weight_space(3, y.shape[-1])
    q = torch.randn(2, 3, space.dim, generator=generator(1), dtype=torch.float32).requires_grad_()
    value = space.bind(x, y)(q)
    (slope,) = torch.autograd.grad(value.sum(), q)
    assert value.dtype == slope.dtype == torch.float32
    exact_q = q.detach().double().requires_grad_()
    exact = space.log_density(exact_q, x.double(), y.double())
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_q)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tile", [1, 60, 200])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_tiles_of_chains_and_rows_change_nothing(monkeypatch, name, tile):
    """From one row and one chain at a time to several of each, with a last tile that is smaller."""
    model = BNN((4, 3), "tanh", likelihood=LIKELIHOODS[name])
    x, y = toy(model.likelihood, n=17)
    space = model.weight_space(3, y.shape[-1])
    q = torch.randn(5, space.dim, generator=generator(3), dtype=F64).requires_grad_()
    log_density = space.bind(x, y, 1.7)
    value = log_density(q)
    monkeypatch.setattr(_fused, "_TILE", tile)
    for _ in range(2):  # the second evaluation finds memory that holds what the first left there
        tiled = log_density(q)
        torch.testing.assert_close(tiled, value, rtol=1e-12, atol=1e-12)
        slopes = [torch.autograd.grad(v.sum(), q, retain_graph=True)[0] for v in (tiled, value)]
        torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)


def test_each_member_may_have_a_minibatch_of_its_own():
    """x (members, size, d) with q (members, 1, D): what an ensemble asks for."""
    model = BNN((4,), "relu", likelihood=LIKELIHOODS["gaussian"])
    x, y = toy(model.likelihood, (5,))
    space = model.weight_space(3, 2)
    q = torch.randn(5, 1, space.dim, generator=generator(2), dtype=F64)
    together = space.bind(x, y, 2.0)(q)
    for i in range(5):
        torch.testing.assert_close(together[i], space.log_density(q[i], x[i], y[i], 2.0), rtol=1e-11, atol=1e-11)


def test_the_fused_log_density_leaves_its_arguments_alone_and_differentiates_once():
    model = BNN((4,), "relu")
    x, y = toy(model.likelihood)
    space = model.weight_space(3, 2)
    q = torch.randn(2, space.dim, generator=generator(), dtype=F64)
    before = [t.clone() for t in (q, x, y, space.scale)]
    q.requires_grad_()
    value = space.bind(x, y)(q)
    (slope,) = torch.autograd.grad(value.square().sum(), q, create_graph=True)
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, (q, x, y, space.scale), strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_networks_without_a_closed_form_use_autograd():
    model = BNN((4,), "silu")
    x, y = toy(model.likelihood)
    space = model.weight_space(3, 2)
    q = torch.randn(2, space.dim, generator=generator(), dtype=F64).requires_grad_()
    value = space.bind(x, y, 0.4)(q)
    torch.testing.assert_close(value, space.log_density(q, x, y, 0.4))
    assert bool(torch.isfinite(torch.autograd.grad(value.sum(), q)[0]).all())


# Coordinates


def test_a_start_draws_weights_and_places_the_noise_at_its_initial_value():
    model = BNN((4,), prior=StudentT(dof=5.0), likelihood=Gaussian(noise_variance=0.37, lower=0.1))
    space = model.weight_space(3, 2)
    q = space.initial(6, generator(3), torch.zeros((), dtype=F64))
    assert q.shape == (6, space.dim) == (6, (3 + 1) * 4 + (4 + 1) * 2 + 2)
    weights, params, logs = space.split(q)
    torch.testing.assert_close(params["noise_variance"], torch.full((6, 2), 0.37, dtype=F64))
    torch.testing.assert_close(logs, torch.full((6, 2), math.log(0.27), dtype=F64))
    z = StudentT(dof=5.0).sample((6, space.network.num_weights), generator(3), F64)
    assert torch.equal(q[:, : space.network.num_weights], z)
    torch.testing.assert_close(weights, z * space.scale)


def test_prior_functions_of_a_linear_network_have_the_covariance_of_its_prior():
    """f = w'x + b with w ~ N(0, s^2 / d) and b ~ N(0, t^2): cov = s^2 x'z / d + t^2. 5 standard errors on 10 entries of
    fixed-seed draws: fails one right implementation in 100 000."""
    model = BNN((), prior=Normal(1.7, bias_scale=0.6))
    x = torch.randn(4, 3, generator=generator(1), dtype=F64)
    f = model.sample_prior(x, 5000, generator(2))
    assert f.shape == (5000, 4)
    k = 1.7**2 * x @ x.T / 3 + 0.36
    error = ((k.diag()[:, None] * k.diag() + k.square()) / 5000).sqrt()
    assert float(((f.T @ f / 5000 - k) / error).abs().max()) < 5
    assert BNN((5,), likelihood=Categorical(3)).sample_prior(x[None].float(), 2, generator()).shape == (2, 1, 4, 3)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"activation": "swish"}, "activation must be one of 'tanh', 'relu'"),
        ({"hidden": 50}, r"hidden must be a tuple of widths.*\n.*\n  fix  hidden=\(50,\)"),
        ({"hidden": (50, 0)}, "hidden must be an integer of at least 1"),
        ({"hidden": (5.0,)}, "hidden must be an integer"),
        ({"prior": 1.0}, "prior is of the wrong kind"),
        ({"prior": Normal}, "prior is of the wrong kind"),
        ({"likelihood": "gaussian"}, "likelihood is of the wrong kind"),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(settings, wanted):
    with pytest.raises(SettingError, match=wanted):
        BNN(**settings)


def test_hidden_widths_become_a_tuple():
    assert BNN([4, 3]).hidden == (4, 3)
    assert hash(BNN([4, 3])) == hash(BNN((4, 3)))


# Networks of the user's own


class Convolution(nn.Module):
    """A network on 3 x 4 images, with a skip connection and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 2)
        self.register_buffer("shift", torch.tensor(0.3))

    def forward(self, x):
        h = torch.tanh(self.conv(x.reshape(-1, 1, 3, 4)))
        return self.head(self.norm(h.flatten(1))) + self.shift * x[:, :2]


def fill(module, seed=0):
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(seed + i), dtype=p.dtype))
    return module


@pytest.fixture
def quiet_init(monkeypatch):
    """Modules initialise their weights from the global generator; here nobody needs those numbers."""
    for name in ("kaiming_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor.data.zero_())


def own_networks():
    return {
        "layer norm": (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)), 3),
        "convolution": (Convolution(), 12),
        "batch norm, eval": (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval(), 3),
        "dropout, eval": (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).eval(), 3),
        "dropout of nothing": (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 2)), 3),
    }


@pytest.mark.parametrize(
    "name", ["layer norm", "convolution", "batch norm, eval", "dropout, eval", "dropout of nothing"]
)
def test_a_module_network_is_the_module_itself(name, quiet_init):
    """For its own weights, and for those of a second copy, side by side; in float64 whatever the module's dtype."""
    module, d = own_networks()[name]
    modules = [fill(module), fill(copy.deepcopy(module), 50)]
    network = ModuleNetwork(module, d, 2)
    w = torch.stack([torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in modules]).double()
    x = torch.randn(6, d, generator=generator(3), dtype=F64)
    with torch.no_grad():
        wanted = torch.stack([copy.deepcopy(m).double()(x) for m in modules])
    got = network.forward(w, x)
    assert got.dtype == F64
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_the_log_density_of_a_module_is_that_of_the_same_mlp(quiet_init):
    """torch stores matrices transposed, so that the weights are the same numbers in another order."""
    module = sequential((4,), "tanh", 3, 2)
    x, y = toy(Gaussian(), (2,))
    prior = StudentT(1.4, bias_scale=0.6, dof=4.0)
    own = BNN(prior=prior, module=module).weight_space(3, 2)
    plain = BNN((4,), "tanh", prior).weight_space(3, 2)
    assert own.dim == plain.dim
    q = torch.randn(2, 5, own.dim, generator=generator(3), dtype=F64)
    pieces = q.split([12, 4, 8, 2, 2], -1)
    first, second = pieces[0].unflatten(-1, (3, 4)).mT.flatten(-2), pieces[2].unflatten(-1, (4, 2)).mT.flatten(-2)
    theirs = torch.cat([first, pieces[1], second, *pieces[3:]], -1)
    got, wanted = own.bind(x, y, 1.5)(theirs), plain.bind(x, y, 1.5)(q)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_gains_of_normalisation_layers_are_centred_at_one(quiet_init):
    module, d = own_networks()["layer norm"]
    space = BNN(module=module, prior=Normal(2.0, bias_scale=0.5)).weight_space(d, 2)
    named = dict(module.named_parameters())
    centre = space.centre.split([p.numel() for p in named.values()])
    scale = space.scale.split([p.numel() for p in named.values()])
    assert [float(c[0]) for c in centre] == [0, 0, 1, 0, 0, 0]
    assert [float(s[0]) for s in scale] == pytest.approx([2 / 3**0.5, 0.5, 0.5, 0.5, 2 / 5**0.5, 0.5])
    conv = BNN(module=Convolution(), prior=Normal(2.0)).weight_space(12, 2)
    assert float(conv.scale[0]) == pytest.approx(2 / 9**0.5)


def test_the_module_is_neither_changed_nor_listened_to(quiet_init):
    module, d = own_networks()["layer norm"]
    fill(module)
    before = copy.deepcopy(module.state_dict())
    model = BNN(module=module)
    x, y = toy(Gaussian(), d=d)
    space = model.weight_space(d, 2)
    q = torch.randn(3, space.dim, generator=generator(), dtype=F64).requires_grad_()
    value = space.bind(x, y)(q)
    value.sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in module.parameters())
    assert module.training
    fill(module, 99)
    module[1].eps = 10.0
    assert torch.equal(space.bind(x, y)(q), value)


class Noisy(nn.Module):
    """Functional dropout, which no look at the submodules shows."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return nn.functional.dropout(self.head(x), 0.5, self.training)


def batch_norm_without_statistics():
    """It normalises over the batch in eval mode, too."""
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()


@pytest.mark.parametrize(
    ("build", "kind", "wanted"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), SettingError, "BatchNorm1d in training mode at"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), SettingError, "Dropout in training mode at '1'"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.AlphaDropout(0.1)), SettingError, "AlphaDropout in training mode"),
        (batch_norm_without_statistics, SettingError, "BatchNorm1d without running statistics at '1'"),
        (Noisy, SettingError, "random numbers in its forward pass"),
        (nn.Tanh, SettingError, "module must have parameters"),
        (lambda: nn.Linear(4, 2), ShapeError, r"inputs of shape \(n, 3\)(.|\n)*first layer to 3"),
        (lambda: nn.Linear(3, 1), ShapeError, r"map \(n, 3\) to \(n, 2\)(.|\n)*shape \(2, 1\)"),
    ],
)  # fmt: skip
def test_a_module_that_is_no_fixed_function_of_one_input_is_refused(build, kind, wanted, quiet_init):
    with pytest.raises(kind, match=wanted) as caught:
        BNN(module=build()).weight_space(3, 2)
    assert "\n  fix  " in str(caught.value)


def test_noise_that_is_switched_off_passes(quiet_init):
    BNN(module=Noisy().eval()).weight_space(3, 2)


def test_a_gp_is_no_network():
    assert not hasattr(GP, "weight_space")
