"""A kernel at given hyper-parameters as the tiles of a matrix-free product.

Stationary kernels, and what is scaled, added or multiplied of them, have fused tiles with closed-form gradients; every
other kernel is evaluated tile by tile through its own `__call__`.
"""

from __future__ import annotations

from bayesdl.kernels.algebra import Product, Scale, Sum
from bayesdl.kernels.base import Kernel, Params
from bayesdl.kernels.nngp import NNGP
from bayesdl.kernels.stationary import RBF, Matern, RationalQuadratic
from bayesdl.ops.tiles import ArcCosineTiles, CombinedTiles, EvaluatedTiles, ScaledTiles, StationaryTiles, Tiles


def tiles_of(kernel: Kernel, params: Params) -> Tiles:
    """What `ops.kernel_operator` takes, for hyper-parameters without batch axes.

    The gradients that it returns are in the kernel's own names.
    """
    if type(kernel) is RBF:
        return StationaryTiles("rbf", params["lengthscale"], columns=kernel.active_dims)
    if type(kernel) is Matern:
        return StationaryTiles("matern", params["lengthscale"], nu=kernel.nu, columns=kernel.active_dims)
    if type(kernel) is RationalQuadratic:
        lengthscale, alpha = params["lengthscale"], params["alpha"]
        return StationaryTiles("rational_quadratic", lengthscale, alpha=alpha, columns=kernel.active_dims)
    if type(kernel) is Scale:
        return ScaledTiles(tiles_of(kernel.base, _under(params, "base")), params["outputscale"])
    if type(kernel) in (Sum, Product):
        parts = tuple(tiles_of(part, _under(params, str(i))) for i, part in enumerate(kernel.kernels))
        return CombinedTiles(parts, type(kernel) is Product)
    evaluated = EvaluatedTiles(kernel, kernel.diagonal, params)
    if type(kernel) is NNGP and kernel.activation == "relu":
        return ArcCosineTiles(kernel.depth, evaluated, kernel.active_dims)
    return evaluated


def _under(params: Params, prefix: str) -> Params:
    """The hyper-parameters under `prefix.`, with the prefix taken off."""
    return {name.removeprefix(f"{prefix}."): v for name, v in params.items() if name.startswith(f"{prefix}.")}
