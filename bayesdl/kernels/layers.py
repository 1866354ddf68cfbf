r"""Layers of infinitely wide networks: what each does to covariances, and how one of finite width acts.

Weights are N(0, w_std^2 / fan-in) and biases N(0, b_std^2). With k the covariance of a layer's inputs, t the tangent
kernel up to there, and F the dual map of the activation (`bayesdl.ops.dual`),

    Dense         k' = w_std^2 k + b_std^2                t' = w_std^2 t + k'
    Activation    k' = F(k(x, x), k(x, z), k(z, z))       t' = dF/dr t
    Residual      k' = k_branch + k_shortcut              t' = t_branch + t_shortcut

The inputs have k = x . z / d and t = 0. Layers are settings only, frozen and without tensors; the scales travel as
hyper-parameters of the kernel, see `bayesdl.kernels.InfiniteWidth`.

References: Lee et al. (2018), arXiv 1711.00165; Jacot et al. (2018), arXiv 1806.07572; Novak et al. (2020), arXiv
1912.02803, whose scaling of weights this is.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.hyper import LogNormal, Parameter
from bayesdl.kernels.base import Lead, Params, get
from bayesdl.kernels.columns import check_positive
from bayesdl.kernels.covariances import Covariances

Forward = Callable[[Tensor, Params, int], Tensor]


class Signal(NamedTuple):
    """What is known of a layer's inputs before any data: their number, their image, and how they are distributed.

    Attributes:
        channels: Number of units, or of channels where the signal is an image.
        pixels: (height, width) of an image, None for a vector.
        gaussian: Whether the units are Gaussian and independent of each other in the limit, as after Dense or Conv.
        raw: Whether this is the data itself, which has no width that could grow.
    """

    channels: int
    pixels: tuple[int, int] | None = None
    gaussian: bool = False
    raw: bool = False


@dataclass(frozen=True)
class Scales:
    """The hyper-parameters as layers ask for them: their own under their path, or those that the network shares."""

    params: Params
    shared_bias: bool
    where: str

    def of(self, path: str, layer: Affine) -> tuple[Tensor, Tensor | None]:
        """w_std and b_std of a layer; None for no bias."""
        w = get(self.params, "w_std" if layer.w_std is None else f"{path}w_std", self.where)
        if layer.b_std == 0 or (layer.b_std is None and not self.shared_bias):
            return w, None
        return w, get(self.params, "b_std" if layer.b_std is None else f"{path}b_std", self.where)


class Pen:
    """Draws the weights of one finite network, and writes them down by name."""

    def __init__(self, lead: Lead, like: Tensor, generator: torch.Generator) -> None:
        self.weights: Params = {}
        self._lead, self._like, self._generator = lead, like, generator

    def normal(self, name: str, *shape: int) -> None:
        """Weights `name` from N(0, 1), of shape (*lead, *shape)."""
        like, generator = self._like, self._generator
        shape = (*self._lead, *shape)
        self.weights[name] = torch.randn(shape, dtype=like.dtype, device=generator.device, generator=generator)


class Layer(abc.ABC):
    """A piece of a network: an affine map, an activation, or a composition of those."""

    @abc.abstractmethod
    def follow(self, signal: Signal) -> Signal:
        """The signal behind this layer; raises SettingError where the layer cannot stand there."""

    @abc.abstractmethod
    def parameters(self, path: str) -> tuple[Parameter, ...]:
        """The scales that are the layer's own, named with `path` in front."""

    @abc.abstractmethod
    def shared(self) -> frozenset[str]:
        """Which of "w_std" and "b_std" the layer takes from the network."""

    @abc.abstractmethod
    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """The covariances behind this layer; those given may be overwritten where they are free."""

    @abc.abstractmethod
    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """A layer of finite width with N(0, 1) weights from `pen`, as forward(h, weights, number of batch axes).

        h is (F, *b, s, channels) or, for images, (F, *b, s, height, width, channels).
        """


@dataclass(frozen=True, kw_only=True)
class Affine(Layer):
    """What Dense and Conv share: the scales of weights and biases.

    A scale of None is the one that all such layers of a network share. A number makes it the layer's own, starting
    there; b_std=0 means no bias.
    """

    w_std: float | None = None
    b_std: float | None = None

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, "w_std", self.w_std, False)
        if self.b_std != 0:
            check_positive(type(self).__name__, "b_std", self.b_std, False)

    def parameters(self, path: str) -> tuple[Parameter, ...]:
        """Own scales, with log-normal priors around where they start."""
        own = []
        if self.w_std is not None:
            own.append(Parameter(f"{path}w_std", (), self.w_std, LogNormal(math.log(self.w_std), 0.5)))
        if self.b_std is not None and self.b_std != 0:
            own.append(Parameter(f"{path}b_std", (), self.b_std, LogNormal(math.log(self.b_std), 1.0)))
        return tuple(own)

    def shared(self) -> frozenset[str]:
        """Those that were left None."""
        return frozenset(name for name in ("w_std", "b_std") if getattr(self, name) is None)


@dataclass(frozen=True, kw_only=True)
class Dense(Affine):
    """A fully connected layer, h -> w_std W h / sqrt(fan-in) + b_std b with W and b of N(0, 1).

    Attributes:
        w_std: Own weight scale, or None for the one that the network shares.
        b_std: Own bias scale, 0 for no bias, or None for the one that the network shares.
    """

    def follow(self, signal: Signal) -> Signal:
        """A Gaussian vector."""
        if signal.pixels is not None:
            fix = "put Flatten() or GlobalAveragePool() before Dense()"
            fail(SettingError, "Dense", "the signal must be a vector.", got=f"an image {signal.pixels}", fix=fix)
        return Signal(signal.channels, None, True, False)

    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """w_std^2 k + b_std^2."""
        return k.through_weights(*scales.of(path, self))

    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """`width` units."""
        (w, b), fan_in = scales.of(path, self), signal.channels
        pen.normal(f"{path}weight", fan_in, width)
        if b is not None:
            pen.normal(f"{path}bias", 1, width)

        def forward(h: Tensor, weights: Params, num_batch: int) -> Tensor:
            return weighted(h, weights, path, w / math.sqrt(fan_in), b, num_batch)

        return forward, self.follow(signal)._replace(channels=width)


def weighted(h: Tensor, weights: Params, path: str, w: Tensor, b: Tensor | None, num_batch: int) -> Tensor:
    """w h W + b bias, for h (F, *b, s, i)."""
    out = (h @ _aligned(weights[f"{path}weight"], num_batch)) * w[..., None, None]
    return out if b is None else out + b[..., None, None] * _aligned(weights[f"{path}bias"], num_batch)


def _aligned(weight: Tensor, num_batch: int) -> Tensor:
    """Weights (F, *p, i, o) with axes after F, so that *p lines up with the batch axes of the inputs."""
    missing = max(num_batch - (weight.ndim - 3), 0)
    return weight.reshape(weight.shape[0], *([1] * missing), *weight.shape[1:])


@dataclass(frozen=True)
class Serial(Layer):
    """Layers one after the other.

    Attributes:
        layers: At least one layer; own scales of layer i are named "i.w_std" and "i.b_std".
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers("Serial", self.layers))

    def follow(self, signal: Signal) -> Signal:
        """What comes out of the last layer."""
        for layer in self.layers:
            signal = layer.follow(signal)
        return signal

    def parameters(self, path: str) -> tuple[Parameter, ...]:
        """Those of the layers, in order."""
        return tuple(p for i, layer in enumerate(self.layers) for p in layer.parameters(f"{path}{i}."))

    def shared(self) -> frozenset[str]:
        """What any layer takes from the network."""
        return frozenset().union(*(layer.shared() for layer in self.layers))

    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """Layer after layer."""
        for i, layer in enumerate(self.layers):
            k = layer.propagate(k, scales, f"{path}{i}.")
        return k

    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """Every layer of the same width."""
        forwards = []
        for i, layer in enumerate(self.layers):
            forward, signal = layer.draw(signal, width, pen, scales, f"{path}{i}.")
            forwards.append(forward)

        def run(h: Tensor, weights: Params, num_batch: int) -> Tensor:
            for forward in forwards:
                h = forward(h, weights, num_batch)
            return h

        return run, signal


@dataclass(frozen=True)
class Residual(Layer):
    """The sum of a branch and a shortcut around it.

    Attributes:
        branch: Layers of the branch, for instance (Activation("relu"), Dense()); their scales are "branch.i.w_std".
        shortcut: Layers of the shortcut, none for the identity; (Conv(1, stride=2),) where the branch has that stride.
    """

    branch: tuple[Layer, ...]
    shortcut: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "branch", check_layers("Residual", self.branch))
        if self.shortcut != () and self.shortcut != []:
            check_layers("Residual", self.shortcut)
        object.__setattr__(self, "shortcut", tuple(self.shortcut))

    @property
    def _parts(self) -> tuple[tuple[str, tuple[Layer, ...]], ...]:
        return ("branch.", self.branch), ("shortcut.", self.shortcut)

    def follow(self, signal: Signal) -> Signal:
        """Gaussian if both summands are; at most one may fail to be, or their means would correlate."""
        ends = [Serial(part).follow(signal) if part else signal for _, part in self._parts]
        where, fix = "Residual", "end the branch with Dense() or Conv()"
        if any(end.raw for end in ends):
            wanted, fix = "the data itself cannot be added to a layer of weights.", "put Dense() or Conv() first"
            fail(SettingError, where, wanted, got="a shortcut from the data", fix=fix)
        if not any(end.gaussian for end in ends):
            wanted = "the branch or the shortcut must end with weights."
            fail(SettingError, where, wanted, got="activations at both ends", fix=fix)
        if ends[0].pixels != ends[1].pixels:
            wanted, got = "branch and shortcut must end with the same image.", f"{ends[0].pixels}, {ends[1].pixels}"
            fail(SettingError, where, wanted, got=got, fix="give the shortcut a Conv(1, stride=...) of the same stride")
        if (signal.pixels is None) != (ends[0].pixels is None):
            wanted, fix = (
                "an image stays one inside a residual block.",
                "put Flatten() or GlobalAveragePool() behind it",
            )
            fail(SettingError, where, wanted, got="a pooling layer in the branch", fix=fix)
        return ends[0]._replace(gaussian=all(end.gaussian for end in ends))

    def parameters(self, path: str) -> tuple[Parameter, ...]:
        """Those of the branch, then those of the shortcut."""
        return tuple(p for name, part in self._parts if part for p in Serial(part).parameters(f"{path}{name}"))

    def shared(self) -> frozenset[str]:
        """What any layer takes from the network."""
        return frozenset().union(*(layer.shared() for layer in self.branch + self.shortcut))

    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """The sum of both."""
        # Before the clone: an activation would put the exact diagonal into the branch alone.
        k = k.with_exact_diagonal()
        branch = Serial(self.branch).propagate(k.copied(), scales, f"{path}branch.")
        if self.shortcut:
            k = Serial(self.shortcut).propagate(k, scales, f"{path}shortcut.")
        return branch.plus(k)

    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """Both, with weights of their own."""
        forwards, ends = [], []
        for name, part in self._parts:
            if part:
                forward, end = Serial(part).draw(signal, width, pen, scales, f"{path}{name}")
            else:
                forward, end = (lambda h, weights, num_batch: h), signal
            forwards.append(forward)
            ends.append(end)
        branch, shortcut = forwards
        after = ends[0]._replace(gaussian=all(end.gaussian for end in ends))
        return lambda h, weights, num_batch: branch(h, weights, num_batch) + shortcut(h, weights, num_batch), after


def check_layers(where: str, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """A tuple of layers, or SettingError."""
    if not isinstance(layers, (tuple, list)) or not layers or any(not isinstance(one, Layer) for one in layers):
        fix = 'pass e.g. (Dense(), Activation("relu"), Dense())'
        fail(SettingError, where, "layers must be a tuple of at least one layer.", got=repr(layers)[:80], fix=fix)
    return tuple(layers)
