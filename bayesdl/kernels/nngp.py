r"""Networks of infinite width as kernels: the short ways for fully connected ones, and any composition of layers.

    k_0(x, z) = w_std^2 x . z / d + b_std^2
    k_l(x, z) = w_std^2 F(k_{l-1}(x, x), k_{l-1}(x, z), k_{l-1}(z, z)) + b_std^2,        l = 1 .. depth
    t_0 = k_0,    t_l = k_l + w_std^2 dF/dr(k_{l-1}) t_{l-1}

with F the dual map of the activation (`bayesdl.ops.dual`), k the covariance of random networks and t their tangent
kernel. Weights are N(0, w_std^2 / fan-in) and biases N(0, b_std^2), the same in every layer, read-out included.

References: Lee et al. (2018), arXiv 1711.00165; Matthews et al. (2018), arXiv 1804.11271; Jacot et al. (2018), arXiv
1806.07572; Schoenholz et al. (2017), arXiv 1611.01232, for critical scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.kernels.activations import Activation
from bayesdl.kernels.algebra import inner
from bayesdl.kernels.base import Params, Pullback, get, reduce_to
from bayesdl.kernels.infinite_width import Infinite
from bayesdl.kernels.layers import Dense, Layer, Residual, Serial, Signal, check_layers
from bayesdl.ops.dual import Dual, Rectifier

_TYPICAL = {"relu": math.sqrt(2), "erf": 1.5}


@dataclass(frozen=True, kw_only=True)
class _FullyConnected(Infinite):
    depth: int = 3
    activation: str | Callable[[Tensor], Tensor] | Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            fail(
                SettingError,
                where,
                "depth must be an integer of at least 1.",
                got=repr(self.depth),
                fix="pass depth=3, or use Linear() for no hidden layer",
            )
        if not isinstance(self.activation, (str, Activation)):
            object.__setattr__(self, "activation", Activation(self.activation))
        if self._wants_tangent:
            check_trainable(where, (self._act,))
        self._act  # noqa: B018 - refuses an unknown name here and now

    @property
    def _act(self) -> Activation:
        return self.activation if isinstance(self.activation, Activation) else Activation(self.activation)

    @property
    def _layers(self) -> tuple[Layer, ...]:
        return (Dense(), *(self._act, Dense()) * self.depth)

    @property
    def _image(self) -> None:
        return None

    @property
    def _memory(self) -> int:
        return 2**28

    def _typical_w_std(self) -> float:
        if self.activation in _TYPICAL:
            return _TYPICAL[self.activation]
        try:
            return critical(self._act)[0]
        except SettingError:
            return 1.0


@dataclass(frozen=True, kw_only=True)
class NNGP(_FullyConnected):
    """Kernel of an infinitely wide, fully connected network with `depth` hidden layers.

    Attributes:
        depth: Number of hidden layers, at least 1.
        activation: A name such as "relu" (the arc-cosine kernel), "erf", "gelu" or "tanh", a smooth function, or an
            `Activation` with its options.
        w_std: Initial weight scale, None for sqrt 2 with relu, which keeps the variance constant through the layers,
            1.5 with erf, and the critical one otherwise.
        b_std: Initial bias scale, or 0 for no biases: then a relu network is homogeneous, k(c x, z) = c k(x, z).
        w_std_prior: A prior, None for a flat one, or "default": LogNormal(log of the default w_std, 0.5).
        b_std_prior: A prior, None for a flat one, or "default": LogNormal(log 0.3, 1).
        active_dims: Columns of x that the kernel looks at; None for all.

    Inputs should be standardised. A relu network with w_std far above sqrt 2 has variances that grow by w_std^2 / 2 a
    layer.
    """

    @property
    def _wants_tangent(self) -> bool:
        return False

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """K, and the gradient in closed form, tile by tile, from the slopes of the dual map.

        Cost: O(depth n^2) time after the first product; beyond K and p only the memory of one tile.
        """
        params = self._resolved(x, params)
        with torch.no_grad():
            fixed = {name: value.detach() for name, value in params.items()}
            points = self._select(x.detach())
            value = self._in_tiles(points, points, fixed, True)

        def pullback(p: Tensor) -> Params:
            with torch.no_grad():
                return _PullBack(points, fixed, self._act.dual, self.depth, self._scales(fixed).shared_bias).run(
                    p, self._tiles(points, points, fixed, True)
                )

        return value, pullback


class _PullBack:
    """dL/d(w_std, b_std) of the NNGP from dL/dK.

    Going back through a layer needs the slopes of its dual map. What reaches the variances a_l of single points is
    collected over all tiles, and then goes back through the scalar recursion of the diagonal.
    """

    def __init__(self, x: Tensor, params: Params, dual: Dual, depth: int, has_bias: bool) -> None:
        self.x, self.params, self.dual, self.depth, self.has_bias = x, params, dual, depth, has_bias
        w2 = get(params, "w_std", "NNGP").square()
        b2 = get(params, "b_std", "NNGP").square() if has_bias else torch.zeros_like(w2)
        self.w2, self.b2 = w2, b2
        self.variances = [w2[..., None] * x.square().mean(-1) + b2[..., None]]
        for _ in range(depth):
            self.variances.append(w2[..., None] * dual.diagonal(self.variances[-1]) + b2[..., None])
        self.by_variance = [torch.zeros_like(a) for a in self.variances]
        self.by_w = torch.zeros_like(self.variances[0][..., :1].sum(-1))
        self.by_b = torch.zeros_like(self.by_w)

    def run(self, p: Tensor, tiles: list[tuple[slice, slice]]) -> Params:
        """The gradient, by name."""
        for rows, columns in tiles:
            self._tile(p[..., rows, columns], rows, columns)
        for level in range(self.depth, -1, -1):
            grad, a = self.by_variance[level], self.variances[level]
            self._collect((grad * a).sum(-1), grad.sum(-1))
            if level > 0:
                below = self.variances[level - 1]
                slope = sum(self.dual.parts(below, below, below)[1:])
                self.by_variance[level - 1] += self.w2[..., None] * slope * grad
        w_std = self.params["w_std"]
        grads = {"w_std": reduce_to(2.0 * self.by_w / w_std, w_std.shape)}
        if self.has_bias:
            b_std = self.params["b_std"]
            grads["b_std"] = reduce_to(2.0 * self.by_b * b_std, b_std.shape)
        return grads

    def _collect(self, by_value: Tensor, total: Tensor) -> None:
        # dk/d(w_std^2) = (k - b_std^2) / w_std^2; the division waits until the end.
        self.by_w += by_value - self.b2 * total
        self.by_b += total

    def _tile(self, p: Tensor, rows: slice, columns: slice) -> None:
        w2, b2, x = self.w2[..., None, None], self.b2[..., None, None], self.x
        exact = rows == columns
        p = p if exact else 2.0 * p
        k = (x[..., rows, :] @ (x[..., columns, :] / x.shape[-1]).mT) * w2 + b2
        levels, slopes = [k], []
        for a in self.variances[:-1]:
            if exact:
                k.diagonal(dim1=-2, dim2=-1).copy_(a[..., rows])
            f, *slope = self.dual.parts(a[..., rows, None], k, a[..., None, columns])
            k = f.mul_(w2).add_(b2)
            levels.append(k)
            slopes.append(slope)
        if exact:
            k.diagonal(dim1=-2, dim2=-1).copy_(self.variances[-1][..., rows])
        for level in range(self.depth, -1, -1):
            self._collect(inner(p, levels[level]), p.sum((-2, -1)))
            if level > 0:
                by_a, by_r, by_b = slopes[level - 1]
                p = p * w2
                self.by_variance[level - 1][..., rows] += (by_a * p).sum(-1)
                self.by_variance[level - 1][..., columns] += (by_b * p).sum(-2)
                p = p * by_r


@dataclass(frozen=True, kw_only=True)
class NTK(_FullyConnected):
    """Tangent kernel of an infinitely wide, fully connected network of which all layers are trained.

    Attributes: as those of `NNGP`. The tangent kernel of a network with a kink is not smooth at x = z.

    Its functions are not draws of networks but of their linearisation: random directions of the weights.
    """

    @property
    def _wants_tangent(self) -> bool:
        return True


@dataclass(frozen=True)
class InfiniteWidth(Infinite):
    """Kernel of an infinitely wide network with any layers.

    Attributes:
        layers: Its layers, for instance (Dense(), Activation("erf"), Residual((Dense(), Activation("erf"), Dense()))).
        get: "nngp" for the covariance of random networks, "ntk" for the tangent kernel.
        image_shape: (channels, height, width) where the rows of x are flattened images, for networks that begin with
            Conv; None for vectors.
        memory: Bytes that working on one tile may take. Networks that end in GlobalAveragePool carry (height width)^2
            numbers an entry of the kernel.
        w_std: Initial weight scale of the layers that have none of their own; None for sqrt 2.
        b_std: Initial bias scale of the layers that have none of their own; 0 for no biases there.
        w_std_prior: A prior, None for a flat one, or "default": LogNormal(log sqrt 2, 0.5).
        b_std_prior: A prior, None for a flat one, or "default": LogNormal(log 0.3, 1).
        active_dims: Columns of x that the kernel looks at; None for all.

    Inputs should be standardised. Scales that keep variances through many layers: `bayesdl.kernels.critical`.
    """

    layers: tuple[Layer, ...]
    get: str = "nngp"
    image_shape: tuple[int, int, int] | None = None
    memory: int = 2**28

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "InfiniteWidth"
        given = self.layers.layers if isinstance(self.layers, Serial) else self.layers
        object.__setattr__(self, "layers", check_layers(where, given))
        _checks.choice(where, "get", self.get, ("nngp", "ntk"))
        _checks.at_least(where, "memory", self.memory, 2**16, integer=True)
        image = self.image_shape
        if image is not None:
            if (
                not isinstance(image, (tuple, list))
                or len(image) != 3
                or any(type(k) is not int or k < 1 for k in image)
            ):
                wanted = "image_shape must be (channels, height, width)."
                fail(SettingError, where, wanted, got=repr(image), fix="pass (1, 8, 8), say")
            object.__setattr__(self, "image_shape", tuple(image))
        start = Signal(1, None, False, True) if image is None else Signal(image[0], (image[1], image[2]), False, True)
        end = Serial(self.layers).follow(start)
        if end.raw or end.pixels is not None:
            fix = "end with Dense(), behind Flatten() or GlobalAveragePool() where the inputs are images"
            fail(SettingError, where, "a network ends with a vector of units.", got=f"{end}", fix=fix)
        if self.get == "ntk":
            check_trainable(where, self.layers)

    @property
    def _layers(self) -> tuple[Layer, ...]:
        return self.layers

    @property
    def _wants_tangent(self) -> bool:
        return self.get == "ntk"

    @property
    def _image(self) -> tuple[int, int, int] | None:
        return self.image_shape

    @property
    def _memory(self) -> int:
        return self.memory

    def _typical_w_std(self) -> float:
        return math.sqrt(2)


def check_trainable(where: str, layers: tuple[Layer, ...]) -> None:
    """Refuse a tangent kernel of layers that pass no derivative."""
    for layer in layers:
        if isinstance(layer, Residual):
            check_trainable(where, layer.branch + layer.shortcut)
        elif isinstance(layer, Serial):
            check_trainable(where, layer.layers)
        elif isinstance(layer, Activation) and layer.function == "step":
            fix = "take the NNGP kernel, or another activation"
            fail(SettingError, where, "activation must have a derivative for a tangent kernel.", got="'step'", fix=fix)


def critical(activation: str | Callable[[Tensor], Tensor] | Activation, variance: float = 1.0) -> tuple[float, float]:
    r"""Scales (w_std, b_std) with which signals and gradients pass through any depth unchanged, to first order.

    The variance of units stays at q = `variance`, and a small difference between two inputs neither grows nor dies:

        w_std^2 E[phi(u)^2] + b_std^2 = q,    w_std^2 E[phi'(u)^2] = 1,    u ~ N(0, q)

    A piecewise linear activation is critical at every variance, without biases: w_std^2 = 2 for relu.

    Raises:
        SettingError: No bias is small enough at this variance; the message names a variance that works, if any does.

    Reference: Schoenholz et al. (2017), "Deep information propagation", arXiv 1611.01232.
    """
    act = activation if isinstance(activation, Activation) else Activation(activation)
    check_trainable("critical", (act,))
    _checks.inside("critical", "variance", variance, 0.0, math.inf)
    dual = act.dual
    if isinstance(dual, Rectifier):
        return math.sqrt(2.0 / (dual.negative**2 + dual.positive**2)), 0.0
    w2, b2 = _critical_squares(dual, torch.tensor([variance], dtype=torch.float64))
    if not float(b2) >= 0:
        grid = torch.logspace(-4, 4, 801, dtype=torch.float64)
        possible = grid[_critical_squares(dual, grid)[1] >= 0]
        near = possible[(possible.log() - math.log(variance)).abs().argmin()] if len(possible) else None
        fix = "choose w_std and b_std by hand" if near is None else f"pass variance={float(near):.3g}"
        wanted = f"{act.function!r} cannot be critical at variance {variance}."
        fail(SettingError, "critical", wanted, got=f"b_std^2 would be {float(b2):.3g}", fix=fix)
    return math.sqrt(float(w2)), math.sqrt(float(b2))


def _critical_squares(dual: Dual, q: Tensor) -> tuple[Tensor, Tensor]:
    w2 = 1.0 / dual.slope_diagonal(q)
    return w2, q - w2 * dual.diagonal(q)
