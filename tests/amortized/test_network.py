"""The network: split, cached and dense attention agree; order does not matter; no data is a context too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bayesdl.amortized import Architecture, Network
from bayesdl.errors import SettingError, ShapeError


def shaken(architecture: Architecture, *, seed: int = 3) -> Network:
    """A float64 network in which no weight is zero, so that no part can hide."""
    network = Network(architecture, seed=seed).double()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=source, dtype=torch.float64)
    return network.requires_grad_(False)


def toy(b: int = 2, n: int = 7, s: int = 5, d: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return draw(b, n, d), draw(b, n), draw(b, s, d)


def normalised(layer: torch.nn.LayerNorm, h: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return layer.weight * centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() + layer.bias


def gelu(h: Tensor) -> Tensor:
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def linear(layer: torch.nn.Linear, h: Tensor) -> Tensor:
    out = h @ layer.weight.T
    return out if layer.bias is None else out + layer.bias


def dense(
    net: Network, x: Tensor, y: Tensor, xs: Tensor, conditions: Tensor | None = None, num_appended: int = 0,
    noiseless: bool = False,
) -> Tensor:  # fmt: skip
    """All tokens in one sequence, a mask over all pairs, attention written out: the textbook form, slow and plain."""
    a, (b, n, d), s = net.architecture, x.shape, xs.shape[1]

    def place(z: Tensor) -> Tensor:
        padded = torch.cat([z, z.new_zeros(*z.shape[:-1], a.max_inputs - d)], -1) * (a.max_inputs / d) ** 0.5
        return linear(net.read_x[2], gelu(linear(net.read_x[0], padded)))

    read_y = net.read_y.weight[y] if a.head == "classes" else linear(net.read_y, y[..., None])
    mark = x.new_zeros(n, a.width)
    mark[n - num_appended :] = net.appended + (net.noiseless if noiseless else 0)
    first, asked = net.first[d - 1].expand(b, 1, -1), place(xs)
    if conditions is not None:
        told = conditions.clone()
        told[:, 0] = 0
        first = first + linear(net.read_conditions, told)[:, None]
        asked = asked + linear(net.read_conditions, conditions)[:, None]
    h = torch.cat([first, place(x) + read_y + mark, asked], 1)
    kept, total = 1 + n - num_appended, 1 + n + s
    allowed = torch.zeros(total, total, dtype=torch.bool)
    allowed[:, :kept] = True
    for i in range(kept, 1 + n):
        allowed[i, kept : i + 1] = True
    allowed[1 + n :, kept : 1 + n] = True
    for block in net.blocks:
        parts = linear(block.qkv, normalised(block.norm_read, h)).reshape(b, total, 3, a.num_heads, -1)
        scores = torch.einsum("bihw,bjhw->bhij", parts[:, :, 0], parts[:, :, 1]) / (a.width // a.num_heads) ** 0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        h = h + linear(block.out, torch.einsum("bhij,bjhw->bihw", weights, parts[:, :, 2]).reshape(b, total, -1))
        h = h + linear(block.down, gelu(linear(block.up, normalised(block.norm_think, h))))
    return linear(net.head[2], gelu(linear(net.head[0], normalised(net.norm, h[:, 1 + n :]))))


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize(("head", "outputs"), [("bars", 11), ("mixture", 3), ("classes", 4)])
def test_split_and_cached_attention_agree_with_a_dense_mask(head: str, outputs: int, n: int) -> None:
    net = shaken(Architecture(3, head, outputs, width=12, num_layers=3, num_heads=2, hidden=10, num_conditions=2))
    x, y, xs = toy(n=n)
    y = y.abs().mul(2).long().clamp(max=outputs - 1) if head == "classes" else y
    conditions = torch.tensor([[1.0, 0.3], [0.0, -2.0]], dtype=torch.float64)
    wanted = dense(net, x, y, xs, conditions)
    assert wanted.shape == (2, 5, net.architecture.num_raw)
    torch.testing.assert_close(net(x, y, xs, conditions), wanted, rtol=1e-9, atol=1e-9)
    cache = net.encode(x, y, conditions)
    assert cache.num_points == n
    one_by_one = torch.cat([net.query(cache, xs[:, i : i + 1], conditions) for i in range(5)], 1)
    torch.testing.assert_close(one_by_one, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noiseless", [False, True])
@pytest.mark.parametrize("num_appended", [1, 3, 7])
def test_appended_points_see_what_came_before_them(num_appended: int, noiseless: bool) -> None:
    """Together, one at a time, and by a dense causal mask; what was read before them stays as it was."""
    net = shaken(Architecture(2, "mixture", 2, width=8, num_layers=3, num_heads=2, hidden=9))
    x, y, xs = toy()
    wanted = dense(net, x, y, xs, num_appended=num_appended, noiseless=noiseless)
    together = net(x, y, xs, num_appended=num_appended, noiseless=noiseless)
    torch.testing.assert_close(together, wanted, rtol=1e-9, atol=1e-9)
    kept = 7 - num_appended
    start = cache = net.encode(x[:, :kept], y[:, :kept])
    for i in range(kept, 7):
        cache = net.append(cache, x[:, i : i + 1], y[:, i : i + 1], noiseless=noiseless)
    assert cache.num_points == 7
    torch.testing.assert_close(net.query(cache, xs), wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(cache.keys[-1][:, :, : 1 + kept], start.keys[-1])
    other = dense(net, x, y, xs, num_appended=num_appended, noiseless=not noiseless)
    assert float((other - wanted).abs().max()) > 1e-3


def test_the_order_of_the_context_does_not_matter() -> None:
    """To 1e-5 in float32, at the size of the networks that ship."""
    net = Network(Architecture(5, "mixture", 8, width=128, num_layers=4, num_heads=4, hidden=256), seed=1)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=source)
        x, y, xs = (z.float() for z in toy(b=1, n=100, s=50, d=5))
        order = torch.randperm(100, generator=source)
        there, back = net(x, y, xs), net(x[:, order], y[:, order], xs)
    assert float((there - back).abs().max()) < 1e-5
    assert float((there[:, 0] - there[:, 1]).abs().max()) > 1e-2


def test_queries_do_not_see_each_other_and_data_sets_neither() -> None:
    net = shaken(Architecture(2, "mixture", 2, width=8, num_layers=2, num_heads=2, hidden=9))
    x, y, xs = toy()
    all_at_once = net(x, y, xs)
    torch.testing.assert_close(all_at_once[:, 2:3], net(x, y, xs[:, 2:3]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(all_at_once[1:], net(x[1:], y[1:], xs[1:]), rtol=1e-10, atol=1e-10)


def test_the_first_condition_concerns_queries_only() -> None:
    net = shaken(Architecture(2, "mixture", 2, width=8, num_layers=2, num_heads=2, hidden=9, num_conditions=2))
    x, y, xs = toy()
    plain, first, second = torch.eye(3, dtype=torch.float64)[:, 1:].unsqueeze(1).expand(3, 2, 2)
    assert torch.equal(net.encode(x, y, first).keys[1], net.encode(x, y).keys[1])
    assert not torch.allclose(net.encode(x, y, second).keys[1], net.encode(x, y).keys[1])
    cache = net.encode(x, y)
    assert torch.equal(net.query(cache, xs, plain), net.query(cache, xs))
    assert not torch.allclose(net.query(cache, xs, first), net.query(cache, xs))


def test_gradients_in_x_are_those_of_finite_differences() -> None:
    net = shaken(Architecture(2, "bars", 4, width=8, num_layers=2, num_heads=2, hidden=9))
    x, y, xs = toy(b=1, n=3, s=2)
    cache = net.encode(x, y)
    assert torch.autograd.gradcheck(lambda z: net.query(cache, z), xs.requires_grad_())


def test_fresh_networks_know_nothing_and_follow_their_seed() -> None:
    x, y, xs = (z.float() for z in toy())
    bars = Network(Architecture(2, "bars", 6, width=8, num_heads=2, hidden=8), seed=4)
    assert torch.equal(bars(x, y, xs), torch.zeros(2, 5, 6))
    again = Network(Architecture(2, "bars", 6, width=8, num_heads=2, hidden=8), seed=4)
    other = Network(Architecture(2, "bars", 6, width=8, num_heads=2, hidden=8), seed=5)
    assert torch.equal(bars.first, again.first)
    assert not torch.equal(bars.first, other.first)
    assert all(bool(weight.isfinite().all()) for weight in bars.parameters())


def test_inputs_of_another_dtype_are_converted() -> None:
    net = Network(Architecture(2, "mixture", 2, width=8, num_heads=2, hidden=8)).requires_grad_(False)
    x, y, xs = toy()
    assert net(x, y, xs).dtype == torch.float32
    assert torch.equal(net(x, y, xs), net(x.float(), y.float(), xs.float()))


@pytest.mark.parametrize(
    "call",
    [
        lambda net, x, y, xs: net.encode(x[0], y),
        lambda net, x, y, xs: net.encode(x, y[:, :-1]),
        lambda net, x, y, xs: net.encode(torch.cat([x, x], -1), y),
        lambda net, x, y, xs: net.append(net.encode(x, y), x, y[0]),
        lambda net, x, y, xs: net.query(net.encode(x, y), xs[0]),
        lambda net, x, y, xs: net.query(net.encode(x, y), torch.cat([xs, xs], -1)),
    ],
)
def test_wrong_shapes_are_refused(call) -> None:
    net = Network(Architecture(3, "mixture", 2, width=8, num_heads=2, hidden=8)).double()
    with pytest.raises(ShapeError, match=r"Network\.(encode|append|query): x must have shape"):
        call(net, *toy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "quantiles"}, "head must be one of"),
        ({"width": 10, "num_heads": 4}, "num_heads must divide width"),
        ({"max_inputs": 0}, "max_inputs must be"),
        ({"outputs": 1}, "outputs must be"),
        ({"num_layers": 2.0}, "num_layers must be"),
        ({"num_conditions": -1}, "num_conditions must be"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Architecture(**{"max_inputs": 2, "head": "bars", "outputs": 10, **changes})
