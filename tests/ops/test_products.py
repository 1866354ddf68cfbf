"""Products in tiles: the dense matrix as judge of values and gradients, for every kind of tile."""

from __future__ import annotations

import pytest
import torch

from bayesdl import kernels as k
from bayesdl.errors import ShapeError
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops import EvaluatedTiles, cross_covariance, cross_product, kernel_operator
from bayesdl.ops.products import tile_shape

# parameters far from the defaults, so that a wrong factor shows
KERNELS = {
    "rbf": k.RBF(lengthscale=(0.7, 1.9, 0.4, 3.1)),
    "rbf, one lengthscale": k.RBF(lengthscale=1.3, ard=False),
    "matern 1/2": k.Matern(nu=0.5, lengthscale=(0.3, 0.5, 2.0, 1.0)),
    "matern 3/2": k.Matern(nu=1.5, lengthscale=0.8, ard=False),
    "matern 5/2, some columns": k.Matern(nu=2.5, lengthscale=(1.3, 0.2), active_dims=(0, 3)),
    "rational quadratic": k.RationalQuadratic(alpha=2.3, lengthscale=0.9),
    "scaled": k.Scale(k.Matern(nu=2.5, lengthscale=1.3), outputscale=1.7),
    "scaled sum": k.Scale(k.RBF(lengthscale=0.6) + k.Scale(k.Matern(nu=1.5), outputscale=0.4), outputscale=3.0),
    "product": k.Scale(k.RBF(lengthscale=1.1), outputscale=0.7) * k.RationalQuadratic(alpha=0.6, active_dims=(0, 2)),
    "nngp": k.NNGP(depth=2, b_std=0.7),
    "nngp in a sum": k.Scale(k.NNGP(depth=1, w_std=1.2, active_dims=(1, 3)), outputscale=0.3) + k.Matern(nu=1.5),
    "nngp of another activation": k.NNGP(depth=1, activation="erf"),
    "sum with linear": k.RBF(lengthscale=0.8) + k.Linear(),
}
NOISE = torch.tensor(0.03, dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def setting(name: str) -> tuple[k.Kernel, dict[str, torch.Tensor]]:
    kernel = KERNELS[name]
    return kernel, {p.name: p.initial_tensor(torch.zeros((), dtype=torch.float64)) for p in kernel.parameters(4)}


@pytest.mark.parametrize("name", list(KERNELS))
def test_products_are_those_of_the_dense_matrix(name):
    """Ragged tiles, inputs at an offset, and both halves of the matrix from the tiles of one."""
    kernel, params = setting(name)
    offset = 0.0 if "nngp" in name or "linear" in name else 1e3  # those two are not stationary
    x, z, v = normal(83, 4) + offset, normal(31, 4, seed=1) + offset, normal(83, 3, seed=2)
    dense = kernel(x, None, params)
    operator = kernel_operator(tiles_of(kernel, params), x, NOISE, tile_bytes=8 * 9 * 36)
    scale = float((dense @ v).abs().max())
    tolerance = 1e-12 if offset == 0 else 1e-9  # rounding of the inputs themselves, at 1e3, is 1e-13
    assert float((operator.kernel(v) - dense @ v).abs().max()) <= tolerance * scale
    assert float((operator(v) - dense @ v - 0.03 * v).abs().max()) <= tolerance * scale
    torch.testing.assert_close(operator.diagonal(), dense.diagonal(), rtol=1e-12, atol=0)
    tiles = operator.tiles
    cross = kernel(z, x, params)
    torch.testing.assert_close(cross_covariance(tiles, z, x, tile_bytes=8 * 5 * 20), cross, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(cross_product(tiles, z, x, v, tile_bytes=8 * 5 * 20), cross @ v, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", list(KERNELS))
def test_the_symmetric_product_is_the_plain_one_and_does_not_depend_on_the_tiles(name):
    kernel, params = setting(name)
    x, v = normal(101, 4), normal(101, 2, seed=3)
    tiles = tiles_of(kernel, params)
    plain = cross_product(tiles, x, x, v)
    for tile_bytes in (8 * 8 * 8, 8 * 30 * 30, None):
        product = kernel_operator(tiles, x, NOISE, tile_bytes=tile_bytes).kernel(v)
        assert float((product - plain).abs().max()) <= 1e-7 * float(plain.abs().max())  # Matern 1/2 on the diagonal
        dense = kernel(x, None, params) @ v
        assert float((product - dense).abs().max()) <= 1e-12 * float(dense.abs().max())


@pytest.mark.parametrize("name", list(KERNELS))
def test_gradients_of_bilinear_forms_are_those_of_autograd(name):
    kernel, params = setting(name)
    x, u, v = normal(57, 4), normal(57, 3, seed=4), normal(57, 3, seed=5)
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    form = (u * (kernel(x, None, leaves) @ v)).sum()
    judge = dict(zip(leaves, torch.autograd.grad(form, list(leaves.values())), strict=True))
    operator = kernel_operator(tiles_of(kernel, params), x, NOISE, tile_bytes=8 * 7 * 28)
    ours = operator.gradient(u, v)
    assert set(ours) == set(judge)
    for key, grad in judge.items():
        assert float((ours[key] - grad).abs().max()) <= 1e-10 * float(grad.abs().max()), key
        coarse = operator.to(torch.float32).gradient(u, v)[key]
        # u and v have random signs, so that the terms cancel and their float32 rounding does not
        assert float((coarse - grad).abs().max()) <= 1e-3 * float(grad.abs().max()), key


@pytest.mark.parametrize("name", ["rbf", "matern 1/2", "scaled sum", "nngp"])
def test_float32_tiles_give_float64_sums_of_float32_accuracy(name):
    kernel, params = setting(name)
    x, v = normal(400, 4) + (0.0 if name == "nngp" else 1e3), normal(400, 2, seed=6)
    operator = kernel_operator(tiles_of(kernel, params), x, NOISE, dtype=torch.float32)
    product, dense = operator.kernel(v), kernel(x, None, params) @ v
    assert product.dtype == torch.float64
    assert 0 < float((product - dense).abs().max()) <= 2e-5 * float(dense.abs().max())


def test_coincident_rows_are_at_distance_zero():
    """The root in Matern 1/2 magnifies rounding: duplicates off the diagonal must have covariance 1 all the same."""
    x = normal(20, 4).repeat(2, 1)
    tiles = tiles_of(k.Matern(nu=0.5, lengthscale=0.3), {"lengthscale": torch.full((4,), 0.3, dtype=torch.float64)})
    found = cross_covariance(tiles, x, x)
    torch.testing.assert_close(found[:20, 20:].diagonal(), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-12)
    operator = kernel_operator(tiles, x, NOISE)
    grads = operator.gradient(normal(40, 1, seed=1), normal(40, 1, seed=2))
    assert bool(torch.isfinite(grads["lengthscale"]).all())


def test_any_covariance_function_goes():
    """A function of one's own: exp(-scale |x - z|_1), gradient included."""

    def covariance(x, z, params):
        return (-params["scale"] * (x.unsqueeze(-2) - z.unsqueeze(-3)).abs().sum(-1)).exp()

    params = {"scale": torch.tensor(0.7, dtype=torch.float64)}
    tiles = EvaluatedTiles(covariance, lambda x, params: x.new_ones(x.shape[0]), params)
    x, v = normal(41, 2), normal(41, 2, seed=1)
    operator = kernel_operator(tiles, x, NOISE, tile_bytes=512)
    torch.testing.assert_close(operator.kernel(v), covariance(x, x, params) @ v, rtol=1e-12, atol=1e-12)
    leaf = {"scale": params["scale"].clone().requires_grad_()}
    (judge,) = torch.autograd.grad((v * (covariance(x, x, leaf) @ v)).sum(), leaf["scale"])
    assert float(operator.gradient(v, v)["scale"]) == pytest.approx(float(judge), rel=1e-10)


def test_empty_and_single_problems():
    tiles = tiles_of(*setting("scaled"))
    assert kernel_operator(tiles, normal(0, 4), NOISE)(normal(0, 2)).shape == (0, 2)
    one = kernel_operator(tiles, normal(1, 4), NOISE)(torch.ones(1, 1, dtype=torch.float64))
    assert float(one) == pytest.approx(1.73)
    assert cross_product(tiles, normal(3, 4), normal(0, 4), normal(0, 2)).abs().max() == 0


def test_wrong_shapes_are_refused():
    tiles = tiles_of(*setting("rbf"))
    operator = kernel_operator(tiles, normal(5, 4), NOISE)
    with pytest.raises(ShapeError, match=r"v must have shape \(5, t\)"):
        operator(normal(5))
    with pytest.raises(ShapeError, match=r"v must have shape \(5, t\)"):
        operator.gradient(normal(6, 1), normal(6, 1))
    with pytest.raises(ShapeError, match="one problem at a time"):
        kernel_operator(tiles, normal(2, 5, 4), NOISE)


def test_tiles_keep_to_their_size():
    for n in (1, 30, 10**6):
        rows, columns = tile_shape(n, torch.float32, torch.device("cpu"), 2**19)
        assert rows * columns * 4 <= 2**19
        assert 1 <= rows <= n
        assert 1 <= columns <= n


@pytest.mark.parametrize("name", ["scaled sum", "nngp", "sum with linear"])
def test_threads_share_the_work_and_change_nothing_but_rounding(name):
    """Sums in another order, and the number of threads that torch uses is afterwards what it was."""
    kernel, params = setting(name)
    x, v = normal(700, 4), normal(700, 3, seed=1)
    tiles = tiles_of(kernel, params)
    operator = kernel_operator(tiles, x, NOISE, tile_bytes=2**14)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cross = cross_product(tiles, x[:50], x, v)
            gradients = torch.cat([grad.reshape(-1) for grad in operator.gradient(v, v).values()])
            results.append((operator(v), gradients, cross))
            assert torch.get_num_threads() == threads
            assert torch.equal(operator(v), results[-1][0])  # and the same from call to call
    finally:
        torch.set_num_threads(before)
    for alone, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-12, atol=1e-12)
