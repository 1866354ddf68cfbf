r"""Kernels of networks of infinite width: any composition of layers, its NNGP and its tangent kernel.

    nngp    k(x, z) = Cov[f(x), f(z)],  f a network with random weights
    ntk     t(x, z) = <df(x)/dweights, df(z)/dweights>,  which governs training all layers by gradient descent

Both are limits as all widths grow. The matrices are worked through in tiles: on a CPU of a size that stays in its
cache, and everywhere below a budget of memory. Of k(x, x) only one triangle is computed.

References: Lee et al. (2018), arXiv 1711.00165; Matthews et al. (2018), arXiv 1804.11271; Jacot et al. (2018), arXiv
1806.07572.
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayesdl import _checks
from bayesdl.errors import NumericalWarning, ShapeError, fail
from bayesdl.hyper import LogNormal, Parameter
from bayesdl.kernels.base import (
    Functions,
    Lead,
    Params,
    Pullback,
    draw_normal,
    draw_uniform,
    reduce_to,
)
from bayesdl.kernels.columns import OnColumns, PriorChoice, check_positive
from bayesdl.kernels.convolution import GlobalAveragePool
from bayesdl.kernels.covariances import Covariances
from bayesdl.kernels.layers import (
    Dense,
    Forward,
    Layer,
    Pen,
    Residual,
    Scales,
    Serial,
    Signal,
)

SANE = (1e-8, 1e8)
CACHED_ENTRIES = 2**18  # of one tile on a CPU: two megabytes in float64, about what stays in its second-level cache


class FiniteNetwork(NamedTuple):
    """A network of finite width with the layers of a kernel, and its weights.

    Attributes:
        weights: Each N(0, 1) and (num, *b, fan-in, width), by name; the scales w_std and b_std stand in front of them.
        apply: apply(weights, x (*b s d)) -> (num, *b, s), differentiable in both.
    """

    weights: Params
    apply: Callable[[Params, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs at x (*b s d), shape (num, *b, s)."""
        return self.apply(self.weights, x)


@dataclass(frozen=True, kw_only=True)
class Infinite(OnColumns):
    """What kernels of infinitely wide networks share; a subclass says which layers, and which of the two kernels."""

    w_std: float | None = None
    b_std: float = 0.3
    w_std_prior: PriorChoice = "default"
    b_std_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(type(self).__name__, "w_std", self.w_std, False)
        if self.b_std != 0:
            check_positive(type(self).__name__, "b_std", self.b_std, False)

    @property
    @abc.abstractmethod
    def _layers(self) -> tuple[Layer, ...]:
        """The layers."""

    @property
    @abc.abstractmethod
    def _wants_tangent(self) -> bool:
        """Whether this is the tangent kernel."""

    @property
    @abc.abstractmethod
    def _image(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of the inputs, or None for vectors."""

    @property
    @abc.abstractmethod
    def _memory(self) -> int:
        """Bytes that one tile may use."""

    @abc.abstractmethod
    def _typical_w_std(self) -> float:
        """Where a shared w_std starts, unless a setting says so."""

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`w_std` and `b_std` where layers share them, then the scales that layers have for themselves."""
        self._signal(d)
        network, typical = Serial(self._layers), self._typical_w_std()
        shared = network.shared()
        found = []
        if "w_std" in shared:
            prior = LogNormal(math.log(typical), 0.5) if self.w_std_prior == "default" else self.w_std_prior
            found.append(Parameter("w_std", (), typical if self.w_std is None else self.w_std, prior))
        if "b_std" in shared and self.b_std != 0:
            prior = LogNormal(math.log(0.3), 1.0) if self.b_std_prior == "default" else self.b_std_prior
            found.append(Parameter("b_std", (), self.b_std, prior))
        return (*found, *network.parameters(""))

    def sample_network(
        self, d: int, width: int, generator: torch.Generator, *, num: int = 1, params: Params | None = None
    ) -> FiniteNetwork:
        """Draw networks with these layers, of finite width and with one output: the NNGP is their limit.

        Args:
            d: Number of input columns.
            width: Units of every hidden layer, channels of every convolution.
            generator: Source of randomness, on the device where the networks will be evaluated.
            num: How many independent networks.
            params: Hyper-parameters, or None for the initial ones; their batch axes become batch axes of the networks.

        Raises:
            SettingError: `width` or `num` is below 1.
        """
        for name, value in (("width", width), ("num", num)):
            _checks.at_least(f"{type(self).__name__}.sample_network", name, value, 1, integer=True)
        if params is None:
            params = self._initial(d, torch.empty(0, dtype=torch.float64, device=generator.device))
        lead = (num, *self._batch(d, params))
        body, head = self._split()
        pen = Pen(lead, next(iter(params.values())), generator)
        forward, signal = self._drawn(body, d, width, params, pen, "")
        if head is not None:
            last, _ = head.draw(signal, 1, pen, self._scales(params), f"{len(body)}.")

        def apply(weights: Params, x: Tensor) -> Tensor:
            h = self._run(forward, weights, params, x)
            if head is None:
                return h[..., 0]
            return last(h, weights, self._num_batch(x, params)).squeeze(-1)

        return FiniteNetwork(pen.weights, apply)

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        self._signal(x.shape[-1])
        x = self._select(x)
        k = self._in_tiles(x, x if z is None else self._select(z), params, z is None)
        return _watched(k, z is None, type(self).__name__)

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        self._signal(x.shape[-1])
        x = self._select(x)
        n, entries = x.shape[-2], self._entries(x, params)
        # A tile without columns carries the variances of its rows alone.
        rows = max(1, self._memory // (8 * x.element_size() * max(entries, 1)))
        pieces = []
        for i in range(0, max(n, 1), rows):
            k = self._through(x[..., i : i + rows, :], x[..., :0, :], params, False)
            pieces.append(k.own_tangent if self._wants_tangent else k.by_x)
        return torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0]

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """K, and the gradient by autograd through one tile at a time, each computed again on the way back.

        Cost: three times that of the value; memory for K and for one tile with its graph.
        """
        params = self._resolved(x, params)
        points = self._select(x)
        points = points.detach()
        fixed = {name: value.detach() for name, value in params.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in fixed.items()}
        if len(self._tiles(points, points, leaves, True)) == 1:
            with torch.enable_grad():
                whole = self._block(points, points, leaves, True)

            def pull(p: Tensor) -> Params:
                grads = torch.autograd.grad(whole, list(leaves.values()), p, retain_graph=True)
                return dict(zip(leaves, grads, strict=True))

            return whole.detach(), pull
        with torch.no_grad():
            value = self._in_tiles(points, points, fixed, True)

        def pullback(p: Tensor) -> Params:
            total = {name: torch.zeros_like(value) for name, value in fixed.items()}
            with torch.enable_grad():
                tiles = self._tiles(points, points, leaves, True)
            for rows, columns in tiles:
                with torch.enable_grad():
                    part = self._block(points[..., rows, :], points[..., columns, :], leaves, rows == columns)
                weight = p[..., rows, columns] if rows == columns else 2.0 * p[..., rows, columns]
                grads = torch.autograd.grad(part, list(leaves.values()), reduce_to(weight, part.shape))
                for name, grad in zip(leaves, grads, strict=True):
                    total[name] += grad
            return total

        return value, pullback

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        """Units of a network of width M for each function, unbiased up to O(depth / M).

        For the tangent kernel, derivatives of its outputs along one random direction v of its weights:
        E[(df(x) v)(df(z) v)] = df(x) df(z)'.
        """
        pen = Pen(lead, next(iter(params.values())), generator)
        body, head = self._split()
        if self._wants_tangent:
            forward, _ = self._drawn(self._layers, d, num_features, params, pen, "")
            direction = {name: draw_normal(w.shape, params, generator) for name, w in pen.weights.items()}

            def along(x: Tensor) -> Tensor:
                return torch.func.jvp(lambda w: self._run(forward, w, params, x), (pen.weights,), (direction,))[1]

            return along
        if head is None or self._signal_of(body, d).pixels is not None or self._uneven(body):
            forward, _ = self._drawn(self._layers, d, num_features, params, pen, "")
            return lambda x: self._run(forward, pen.weights, params, x)
        # Behind hidden units h, w_std h + b_std times a random sign has the covariance of the outputs and less noise.
        forward, _ = self._drawn(body, d, num_features, params, pen, "")
        w, b = self._scales(params).of(f"{len(body)}.", head)
        sign = draw_uniform((*lead, 1, num_features), params, generator).sub_(0.5).sign()

        def evaluate(x: Tensor) -> Tensor:
            h = self._run(forward, pen.weights, params, x) * w[..., None, None]
            if b is None:
                return h
            missing = max(h.ndim - sign.ndim, 0)
            return h + b[..., None, None] * sign.reshape(lead[0], *([1] * missing), *sign.shape[1:])

        return evaluate

    def _signal(self, d: int) -> Signal:
        """The data as a signal, or an error where they are not images of the declared shape."""
        width, image = self._width(d), self._image
        if image is None:
            return Signal(width, None, False, True)
        if width != math.prod(image):
            fix = "pass images flattened to one row each, channels first"
            wanted = f"image_shape {image} needs {math.prod(image)} columns."
            fail(ShapeError, type(self).__name__, wanted, got=f"{width} columns", fix=fix)
        return Signal(image[0], (image[1], image[2]), False, True)

    def _signal_of(self, layers: tuple[Layer, ...], d: int) -> Signal:
        return Serial(layers).follow(self._signal(d))

    def _uneven(self, layers: tuple[Layer, ...]) -> bool:
        """Whether the units behind these layers are not all alike, as those of a flattened image."""
        return self._image is not None and not any(isinstance(layer, Dense) for layer in layers)

    def _split(self) -> tuple[tuple[Layer, ...], Dense | None]:
        layers = self._layers
        last = layers[-1]
        return (layers[:-1], last) if isinstance(last, Dense) and len(layers) > 1 else (layers, None)

    def _drawn(
        self, layers: tuple[Layer, ...], d: int, width: int, params: Params, pen: Pen, path: str
    ) -> tuple[Forward, Signal]:
        return Serial(layers).draw(self._signal(d), width, pen, self._scales(params), path)

    def _run(self, forward: Forward, weights: Params, params: Params, x: Tensor) -> Tensor:
        h = self._select(x)
        if self._image is not None:
            h = h.unflatten(-1, self._image).movedim(-3, -1)
        return forward(h, weights, self._num_batch(x, params))

    def _num_batch(self, x: Tensor, params: Params) -> int:
        return max(x.ndim - 2, *(value.ndim for value in params.values()))

    def _scales(self, params: Params) -> Scales:
        return Scales(params, self.b_std != 0, type(self).__name__)

    def _in_tiles(self, x: Tensor, z: Tensor, params: Params, same: bool) -> Tensor:
        tiles = self._tiles(x, z, params, same)
        if len(tiles) == 1:
            return self._block(x, z, params, same)
        if self._recorded(x, z, params):
            k = self._stitched(x, z, params, same, tiles)
        else:
            batch = torch.broadcast_shapes(x.shape[:-2], z.shape[:-2], *(v.shape for v in params.values()))
            k = x.new_empty(*batch, x.shape[-2], z.shape[-2])
            for rows, columns in tiles:
                part = self._block(x[..., rows, :], z[..., columns, :], params, same and rows == columns)
                k[..., rows, columns] = part
                if same and rows != columns:
                    k[..., columns, rows] = part.mT
        return k

    def _stitched(self, x: Tensor, z: Tensor, params: Params, same: bool, tiles: list[tuple[slice, slice]]) -> Tensor:
        """The tiles as one matrix with a graph that keeps nothing of them and computes them again on the way back."""
        parts: dict[tuple[int, int], Tensor] = {}
        for rows, columns in tiles:
            exact = same and rows == columns
            part = checkpoint(
                lambda u, v, e: self._block(u, v, params, e),
                x[..., rows, :],
                z[..., columns, :],
                exact,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            parts[rows.start, columns.start] = part
            if same and rows != columns:
                parts[columns.start, rows.start] = part.mT
        starts = sorted({i for i, _ in parts}), sorted({j for _, j in parts})
        return torch.cat([torch.cat([parts[i, j] for j in starts[1]], -1) for i in starts[0]], -2)

    def _block(self, x: Tensor, z: Tensor, params: Params, same: bool) -> Tensor:
        """One tile of the kernel, for the selected columns of x and z."""
        k = self._through(x, z, params, same)
        return k.tangent if self._wants_tangent and k.tangent is not None else k.cross

    def _through(self, x: Tensor, z: Tensor, params: Params, same: bool) -> Covariances:
        """What comes out of the last layer."""
        free = not self._recorded(x, z, params)
        start = _first(x, z, self._image, self._pooled, same, self._wants_tangent, free)
        return Serial(self._layers).propagate(start, self._scales(params), "").with_exact_diagonal()

    def _recorded(self, x: Tensor, z: Tensor, params: Params) -> bool:
        """Whether derivatives may be asked for, by autograd or by a transform of torch.func."""
        if torch._C._are_functorch_transforms_active():
            return True
        return torch.is_grad_enabled() and any(v.requires_grad for v in (x, z, *params.values()))

    @property
    def _pooled(self) -> bool:
        return any(isinstance(layer, GlobalAveragePool) for layer in self._layers)

    def _entries(self, x: Tensor, params: Params) -> int:
        """Numbers that are carried for one entry of the kernel, over all batch elements."""
        pixels = 1 if self._image is None else self._image[1] * self._image[2]
        batch = torch.broadcast_shapes(x.shape[:-2], *(value.shape for value in params.values()))
        return batch.numel() * (pixels**2 if self._pooled else pixels)

    def _tiles(self, x: Tensor, z: Tensor, params: Params, same: bool) -> list[tuple[slice, slice]]:
        """Rows and columns of each tile; for same inputs those of the lower triangle."""
        n, m, entries = x.shape[-2], z.shape[-2], max(self._entries(x, params), 1)
        # A tile has about eight temporaries of its size, and with a graph about eight a layer.
        depth = 8 * (1 + (_count(self._layers) if self._recorded(x, z, params) else 0))
        budget = self._memory // (depth * x.element_size() * entries)
        side = max(math.isqrt(budget), 1)
        if x.device.type == "cpu" and not self._recorded(x, z, params):
            side = min(side, max(math.isqrt(CACHED_ENTRIES // entries), 64 if self._image is None else 4))
        if n <= side and m <= side:
            return [(slice(0, n), slice(0, m))]
        return list(_pairs_of(n, m, side, same))


def _pairs_of(n: int, m: int, side: int, same: bool) -> Iterator[tuple[slice, slice]]:
    for i in range(0, n, side):
        for j in range(0, min(i + 1, m) if same else m, side):
            yield slice(i, min(i + side, n)), slice(j, min(j + side, m))


def _count(layers: tuple[Layer, ...]) -> int:
    inside = (layer.branch + layer.shortcut for layer in layers if isinstance(layer, Residual))
    return len(layers) + sum(_count(part) for part in inside)


def _first(
    x: Tensor,
    z: Tensor,
    image: tuple[int, int, int] | None,
    pooled: bool,
    same: bool,
    wants_tangent: bool,
    free: bool,
) -> Covariances:
    """Covariances of the data, <x, z> / d, for images per pixel and divided by the number of channels."""
    if image is None:
        by_x = x.square().mean(-1)
        by_z = by_x if same else z.square().mean(-1)
        cross = x @ (z / x.shape[-1]).mT
        return Covariances(by_x, by_z, cross, None, None, "none", wants_tangent, same, free)
    x, z = (v.unflatten(-1, image) for v in (x, z))
    if not pooled:
        by_x = x.square().mean(-3)
        by_z = by_x if same else z.square().mean(-3)
        cross = torch.einsum("...nchw,...mchw->...nmhw", x, z / image[0])
        return Covariances(by_x, by_z, cross, None, None, "same", wants_tangent, same, free)
    cross = torch.einsum("...nchw,...mcij->...nmhwij", x, z / image[0])
    by_x, by_z = (torch.einsum("...nchw,...ncij->...nhwij", v, v / image[0]) for v in (x, z))
    return Covariances(by_x, by_x if same else by_z, cross, None, None, "pairs", wants_tangent, same, free)


def _watched(k: Tensor, same: bool, where: str) -> Tensor:
    """k, after a warning where its diagonal shows that variances explode or die out with depth."""
    if not same or k.numel() == 0 or torch._C._are_functorch_transforms_active():
        return k
    largest = float(k.detach().diagonal(dim1=-2, dim2=-1).amax())
    if not SANE[0] <= largest <= SANE[1]:
        text = (
            f"{where}: the largest prior variance is {largest:.1e}, outside [{SANE[0]:.0e}, {SANE[1]:.0e}]; digits are "
            "lost. Standardise the inputs, and start from bayesdl.kernels.critical(activation)."
        )
        warnings.warn(text, NumericalWarning, stacklevel=4)
    return k
