"""Compositions of layers: the contract, convolutional fixtures, residual blocks, finite networks on their way up."""

from __future__ import annotations

import math

import pytest
import torch

import bayesdl.kernels.infinite_width as infinite_width
from bayesdl._doors import _resolve
from bayesdl._records import decode, encode
from bayesdl.errors import SettingError, ShapeError, StorageError
from bayesdl.kernels import (
    NNGP,
    NTK,
    Activation,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    InfiniteWidth,
    Residual,
    Serial,
)
from bayesdl.kernels.layers import Signal
from bayesdl.testing._kernel import check_kernel

RELU = Activation("relu")
IMAGE = Signal(1, (4, 4), False, True)
RESIDUAL = (Dense(), Residual((RELU, Dense(w_std=0.8, b_std=0.3))), Activation("erf"), Dense(w_std=1.2, b_std=0))
FLAT = (Conv(3), RELU, Conv(3, stride=2, w_std=1.1, b_std=0.2), Activation("erf"), Flatten(), Dense())
POOLED = (
    Conv(3),
    Residual((RELU, Conv(3, stride=2, b_std=0)), (Conv(1, stride=2),)),
    RELU,
    GlobalAveragePool(),
    Dense(b_std=0.2),
    Activation("gelu"),
    Dense(),
)
FAST = {
    "nngp, tanh": (NNGP(depth=2, activation="tanh"), 3),
    "nngp, step": (NNGP(depth=2, activation="step"), 2),
    "nngp, no bias": (NNGP(depth=2, b_std=0), 3),
    "residual": (InfiniteWidth(RESIDUAL), 3),
    "images": (InfiniteWidth((Conv(3), RELU, Flatten(), Dense()), image_shape=(1, 1, 2)), 2),
}
SLOW = {
    "images, flattened": (InfiniteWidth(FLAT, image_shape=(1, 2, 2)), 4),
    "ntk": (NTK(depth=1, b_std=0.4, active_dims=(0, 2)), 3),
    "ntk, deep": (NTK(depth=3, activation="gelu"), 3),
    "ntk, tanh": (NTK(depth=1, activation="tanh"), 3),
    "residual ntk": (InfiniteWidth(RESIDUAL, get="ntk"), 3),
    "images, pooled": (InfiniteWidth(POOLED, image_shape=(2, 2, 2)), 8),
    "images, pooled ntk": (
        InfiniteWidth((Conv(3), Activation("gelu"), GlobalAveragePool(), Dense()), image_shape=(1, 2, 2), get="ntk"),
        4,
    ),
    **{
        f"nngp, {name}": (NNGP(depth=2, activation=name), 3)
        for name in ("leaky_relu", "abs", "probit", "gelu", "sin", "cos", "shifted_sin", "identity", "silu")
    },
    "nngp, exp": (NNGP(depth=1, activation="exp", w_std=0.6), 3),
}


def _f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _inputs(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", FAST)
def test_kernels_obey_the_contract(name):
    kernel, d = FAST[name]
    check_kernel(kernel, d=d, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_kernels_obey_the_contract(name):
    kernel, d = SLOW[name]
    check_kernel(kernel, d=d, seed=3)


IMAGES = torch.stack(
    [_f64(0.1, 0.5, -0.3, 0.7, -0.2, 0.4, 0, 0.9, -0.6), _f64(-0.4, 0.2, 0.8, 0.3, 0.6, -0.1, 0.5, -0.7, 0.1)]
)
# K(A, B) and K(A, A) of [Conv3x3, relu] x L and a head, w_std = 1.5, b_std = 0.3 everywhere.
CONVOLUTIONAL = {
    ("flatten", 1): (0.222037469960430, 0.580625),
    ("flatten", 2): (0.341507585546596, 0.5465234375),
    ("pool", 1): (0.315646778918718, 0.337370481914708),
    ("pool", 2): (0.350400874275783, 0.366722114974376),
}


@pytest.mark.parametrize(("head", "depth"), CONVOLUTIONAL)
def test_convolutional_kernels_agree_with_high_precision_values(head, depth):
    pool = Flatten() if head == "flatten" else GlobalAveragePool()
    layers = (*(Conv(3), RELU) * depth, pool, Dense())
    kernel = InfiniteWidth(layers, image_shape=(1, 3, 3), w_std=1.5, b_std=0.3)
    cross, own = CONVOLUTIONAL[head, depth]
    torch.testing.assert_close(kernel(IMAGES)[0], _f64(own, cross), rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel(IMAGES[:1], IMAGES)[0], _f64(own, cross), rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel.diagonal(IMAGES)[0], _f64(own)[0], rtol=1e-10, atol=0)


def test_a_composition_of_dense_layers_is_the_short_way():
    x, z = _inputs(5, 3), _inputs(4, 3, seed=1)
    layers = (Dense(), RELU, Dense(), RELU, Dense())
    for get, kind in (("nngp", NNGP), ("ntk", NTK)):
        long, short = InfiniteWidth(Serial(layers), get=get, w_std=1.3), kind(depth=2, w_std=1.3)
        torch.testing.assert_close(long(x), short(x), rtol=1e-13, atol=0)
        torch.testing.assert_close(long(x, z), short(x, z), rtol=1e-13, atol=0)
        assert [p.name for p in long.parameters(3)] == [p.name for p in short.parameters(3)]


def test_residual_blocks_add_covariances():
    """A linear branch by hand: k = k0 + w1^2 k0 + b1^2, and every weight adds its tangent."""
    x = _inputs(4, 3)
    layers = (Dense(), Residual((Dense(w_std=0.7, b_std=0.4),)))
    k0 = 1.2**2 * x @ x.mT / 3 + 0.3**2
    branch = 0.7**2 * k0 + 0.4**2
    kernel = InfiniteWidth(layers, w_std=1.2)
    torch.testing.assert_close(kernel(x), k0 + branch, rtol=1e-12, atol=0)
    tangent = k0 + branch + 0.7**2 * k0
    torch.testing.assert_close(InfiniteWidth(layers, get="ntk", w_std=1.2)(x), tangent, rtol=1e-12, atol=0)
    names = [p.name for p in kernel.parameters(3)]
    assert names == ["w_std", "b_std", "1.branch.0.w_std", "1.branch.0.b_std"]
    assert kernel.parameters(3)[2].prior.typical == pytest.approx(0.7)


def test_one_pixel_images_are_vectors():
    """Conv(1) on images of one pixel is Dense, with either head; a window of 3 divides by 9 of which 1 is inside."""
    x = _inputs(4, 3)
    dense = NNGP(depth=1, w_std=1.3, b_std=0.2)(x)
    for pool in (Flatten(), GlobalAveragePool()):
        one = InfiniteWidth((Conv(1), RELU, pool, Dense()), image_shape=(3, 1, 1), w_std=1.3, b_std=0.2)
        torch.testing.assert_close(one(x), dense, rtol=1e-12, atol=0)
        padded = InfiniteWidth((Conv(3, w_std=3.9), RELU, pool, Dense()), image_shape=(3, 1, 1), w_std=1.3, b_std=0.2)
        torch.testing.assert_close(padded(x), dense, rtol=1e-12, atol=0)


LIMITS = {
    "dense": (InfiniteWidth((Dense(), RELU, Dense(), Activation("tanh"), Dense(w_std=1.1, b_std=0.5))), 3),
    "residual": (InfiniteWidth(RESIDUAL), 3),
    "images, flattened": (InfiniteWidth(FLAT, image_shape=(2, 3, 3)), 18),
    "images, pooled": (InfiniteWidth(POOLED, image_shape=(2, 3, 2)), 12),
}


@pytest.mark.parametrize("name", LIMITS)
def test_random_networks_have_the_covariance_of_the_kernel(name):
    """800 networks of width 40: ten covariances within 5 standard errors, and 5 % for the finite width.

    False alarms: below one seed in 100 000, as by the normal distribution beyond 5 standard errors.
    """
    kernel, d = LIMITS[name]
    x = _inputs(4, d, seed=5)
    network = kernel.sample_network(d, 40, torch.Generator().manual_seed(1), num=800)
    f = network(x)
    assert f.shape == (800, 4)
    assert torch.equal(f, network(x))
    products = f.unsqueeze(-1) * f.unsqueeze(-2)
    k = kernel(x)
    error = products.std(0) / 800**0.5
    assert bool(((products.mean(0) - k).abs() <= 5.0 * error + 0.05 * k.diagonal().max()).all())


def _agree(grams: torch.Tensor, k: torch.Tensor) -> None:
    """The mean of independent Gram matrices is k within 5 standard errors, which are small, and 2 % of its scale."""
    error = grams.std(0) / len(grams) ** 0.5
    assert float(error.max()) < 0.05 * float(k.max())
    assert bool(((grams.mean(0) - k).abs() <= 5.0 * error + 0.02 * k.max()).all())


@pytest.mark.parametrize("name", LIMITS)
def test_units_of_wide_networks_approach_the_kernel(name):
    """The units of one network average each other: Gram matrices of 20 networks of width 200.

    False alarms: by Student's t with 19 degrees of freedom, below one seed in 10 000.
    """
    kernel, d = LIMITS[name]
    x = _inputs(4, d, seed=5)
    generator = torch.Generator().manual_seed(2)
    phi = kernel._features((20,), 200, d, kernel._initial(d, x), generator)(x)
    _agree(phi @ phi.mT / 200, kernel(x))


@pytest.mark.parametrize("name", LIMITS)
def test_wide_networks_have_the_tangent_kernel(name):
    """Gram matrices of the Jacobian in all weights, of 40 networks of width 100.

    False alarms: by Student's t with 39 degrees of freedom, below one seed in 10 000.
    """
    kernel, d = LIMITS[name]
    kernel = InfiniteWidth(kernel.layers, get="ntk", image_shape=kernel.image_shape)
    x = _inputs(3, d, seed=6)
    network = kernel.sample_network(d, 100, torch.Generator().manual_seed(0), num=40)
    weights = {name: w.requires_grad_() for name, w in network.weights.items()}
    f = network.apply(weights, x)
    rows = [torch.autograd.grad(f[:, i].sum(), list(weights.values()), retain_graph=True) for i in range(3)]
    jacobian = torch.stack([torch.cat([g.reshape(40, -1) for g in row], -1) for row in rows], -2)
    _agree(jacobian @ jacobian.mT, kernel(x))


def test_networks_follow_batches_of_scales():
    kernel = NNGP(depth=1)
    params = {"w_std": _f64(0.5, 1.5), "b_std": _f64(0.3)[0]}
    network = kernel.sample_network(3, 8, torch.Generator().manual_seed(0), num=4, params=params)
    assert network(_inputs(5, 3)).shape == (4, 2, 5)
    assert network(_inputs(5, 3).expand(6, 1, 5, 3)).shape == (4, 6, 2, 5)
    with pytest.raises(SettingError, match="width"):
        kernel.sample_network(3, 0, torch.Generator())


def test_memory_bounds_the_tiles_of_images(monkeypatch):
    """With a small budget images are worked through a few at a time, without any change of values and gradients."""
    x = _inputs(7, 9)
    x[6] = x[2]
    small = InfiniteWidth((Conv(3), RELU, GlobalAveragePool(), Dense()), image_shape=(1, 3, 3), memory=2**16)
    large = InfiniteWidth(small.layers, image_shape=(1, 3, 3))
    params = small._initial(9, x)
    tiles = small._tiles(x, x, params, True)
    assert len(tiles) > 3
    assert all((r.stop - r.start) * (c.stop - c.start) * 81 * 8 * 8 <= 2**16 for r, c in tiles)
    assert len(large._tiles(x, x, params, True)) == 1
    torch.testing.assert_close(small(x), large(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.diagonal(x), large.diagonal(x), rtol=1e-12, atol=1e-12)
    grads = []
    p = _inputs(7, 7, seed=1)
    p = p + p.mT
    for kernel in (small, large):
        leaf = x.clone().requires_grad_()
        grads.append(
            (torch.autograd.grad((kernel(leaf) * p).sum(), leaf)[0], kernel.value_and_pullback(x)[1](p.clone()))
        )
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-9, atol=1e-9)
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grad, grads[1][1][name], rtol=1e-9, atol=1e-9)
    assert infinite_width.CACHED_ENTRIES > 0


SAVED = {
    "nngp": NNGP(activation=Activation("leaky_relu", negative_slope=0.2), b_std=0),
    "ntk": NTK(depth=2, activation="tanh", active_dims=(1,)),
    "pooled": InfiniteWidth(POOLED, image_shape=(2, 2, 2), get="ntk"),
    "serial": InfiniteWidth((Serial((Dense(), RELU)), Dense())),
}


@pytest.mark.parametrize("name", SAVED)
def test_kernels_survive_a_file(name):
    assert decode(encode(SAVED[name]), _resolve) == SAVED[name]


def test_a_function_of_ones_own_cannot_be_saved():
    kernel = NNGP(activation=lambda x: torch.tanh(x) + 0.1 * x)
    assert bool(kernel(_inputs(3, 2)).isfinite().all())
    with pytest.raises(StorageError, match="keep the code"):
        encode(kernel)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: InfiniteWidth(()), "at least one layer"),
        (lambda: InfiniteWidth(("relu",)), "at least one layer"),
        (lambda: InfiniteWidth((RELU, Dense())), "layer of weights"),
        (lambda: InfiniteWidth((Dense(), RELU, RELU)), "layer of weights"),
        (lambda: InfiniteWidth((Conv(3), RELU, Flatten(), Dense())), "image_shape"),
        (lambda: InfiniteWidth((Conv(3), RELU, Dense()), image_shape=(1, 2, 2)), "vector"),
        (lambda: InfiniteWidth((Conv(3), RELU), image_shape=(1, 2, 2)), "vector of units"),
        (lambda: InfiniteWidth((Conv(3), Flatten(), RELU), image_shape=(1, 2, 2)), "layer of weights"),
        (lambda: InfiniteWidth((Conv(3), Flatten(), Flatten(), Dense()), image_shape=(1, 2, 2)), "image"),
        (lambda: InfiniteWidth((Residual((Dense(),)), Dense())), "data itself"),
        (lambda: InfiniteWidth((Dense(), RELU, Residual((Dense(), RELU)), Dense())), "end with weights"),
        (lambda: Serial((Conv(3), Residual((Conv(3, stride=2),)), Flatten())).follow(IMAGE), "same image"),
        (lambda: Serial((Conv(3), Residual((Flatten(), Dense()), (Flatten(), Dense())))).follow(IMAGE), "stays one"),
        (lambda: InfiniteWidth((Dense(),), image_shape=(4, 4)), "image_shape"),
        (lambda: InfiniteWidth((Dense(), RELU, Dense()), get="both"), "get"),
        (lambda: InfiniteWidth((Dense(), Residual((Activation("step"), Dense()))), get="ntk"), "derivative"),
        (lambda: InfiniteWidth((Dense(),), memory=10), "memory"),
        (lambda: Conv(2), "odd"),
        (lambda: Conv(3, stride=0), "stride"),
        (lambda: Dense(w_std=-1.0), "w_std"),
        (lambda: Residual(()), "at least one layer"),
    ],
)  # fmt: skip
def test_bad_networks_are_refused_at_construction(make, word):
    with pytest.raises(SettingError, match=word):
        make()


def test_images_of_another_size_are_refused():
    kernel = InfiniteWidth((Conv(3), RELU, Flatten(), Dense()), image_shape=(1, 2, 2))
    with pytest.raises(ShapeError, match="4 columns"):
        kernel.parameters(5)
    with pytest.raises(ShapeError, match="4 columns"):
        kernel(_inputs(3, 5), None, {"w_std": _f64(1.0)[0], "b_std": _f64(1.0)[0]})
    assert math.isfinite(float(kernel(_inputs(3, 4)).sum()))
