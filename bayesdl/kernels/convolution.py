r"""Layers of images for infinitely wide networks: convolution, and the two ways of making a vector of an image.

With Sigma[i, j] the covariance of pixel i of x and pixel j of z, and o running over the q x q window,

    Conv                 Sigma'[i, j] = w_std^2 / q^2 sum_o Sigma[stride i + o, stride j + o] + b_std^2
    Flatten              k = mean_i Sigma[i, i]
    GlobalAveragePool    k = mean_ij Sigma[i, j]

The same offset acts on both pixels. Outside the image the signal is 0 and the divisor stays q^2. A network that ends in
Flatten needs pairs of the same pixel only, h w numbers an entry of the kernel; one that pools needs all (h w)^2.

References: Novak et al. (2019), arXiv 1810.05148; Garriga-Alonso et al. (2019), arXiv 1808.05587.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.hyper import Parameter
from bayesdl.kernels.base import Params
from bayesdl.kernels.covariances import Covariances
from bayesdl.kernels.layers import Affine, Forward, Layer, Pen, Scales, Signal, weighted


@dataclass(frozen=True)
class Conv(Affine):
    """A convolution with zero padding of (kernel_size - 1) / 2 on every side, as `torch.nn.Conv2d` has it.

    Attributes:
        w_std: Own weight scale, or None for the one that the network shares. Weights are N(0, w_std^2 / (q^2 C)).
        b_std: Own bias scale, 0 for no bias, or None for the one that the network shares.
        kernel_size: Side q of the window, odd.
        stride: Step between windows.
    """

    kernel_size: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kernel_size", "stride"):
            _checks.at_least("Conv", name, getattr(self, name), 1, integer=True)
        if self.kernel_size % 2 == 0:
            fail(SettingError, "Conv", "kernel_size must be odd.", got=repr(self.kernel_size), fix="pass kernel_size=3")

    def follow(self, signal: Signal) -> Signal:
        """A Gaussian image of ceil(side / stride) pixels."""
        pixels = _image("Conv", signal)
        return Signal(signal.channels, tuple(-(-side // self.stride) for side in pixels), True, False)

    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """Sums over the window, then the weights."""
        window = self._same if k.pixels == "same" else self._pairs
        return k.mapped(window).through_weights(*scales.of(path, self))

    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """`width` channels."""
        (w, b), q, pad = scales.of(path, self), self.kernel_size, self.kernel_size // 2
        fan_in = signal.channels * q * q
        pen.normal(f"{path}weight", fan_in, width)
        if b is not None:
            pen.normal(f"{path}bias", 1, width)

        def forward(h: Tensor, weights: Params, num_batch: int) -> Tensor:
            h = nn.functional.pad(h, (0, 0, pad, pad, pad, pad))
            patches = h.unfold(-3, q, self.stride).unfold(-3, q, self.stride)
            *lead, s, height, wide = patches.shape[:-3]
            flat = patches.reshape(*lead, s * height * wide, fan_in)
            out = weighted(flat, weights, path, w / math.sqrt(fan_in), b, num_batch)
            return out.reshape(*out.shape[:-2], s, height, wide, width)

        return forward, self.follow(signal)._replace(channels=width)

    def _same(self, v: Tensor) -> Tensor:
        """Mean over the window for pairs of the same pixel, (..., h, w)."""
        if v.shape[:-2].numel() == 0:
            sides = (-(-side // self.stride) for side in v.shape[-2:])
            return v.new_zeros(*v.shape[:-2], *sides)
        flat = v.reshape(-1, 1, *v.shape[-2:])
        mean = nn.functional.avg_pool2d(flat, self.kernel_size, self.stride, self.kernel_size // 2)
        return mean.reshape(*v.shape[:-2], *mean.shape[-2:])

    def _pairs(self, v: Tensor) -> Tensor:
        """Mean over the window for all pairs, (..., h, w, h, w): along the rows, then along the columns."""
        pad = self.kernel_size // 2
        for first, second in ((-4, -2), (-3, -1)):
            side, out = v.shape[first], -(-v.shape[first] // self.stride)
            total = None
            for offset in range(self.kernel_size):
                # Output i reads input stride i + offset - pad, where there is one.
                low = max(0, -((offset - pad) // self.stride))
                high = min(out, (side - 1 - offset + pad) // self.stride + 1)
                at = range(low * self.stride + offset - pad, (high - 1) * self.stride + offset - pad + 1, self.stride)
                if len(at) == 0:
                    continue
                part = _strided(_strided(v, first, at), second, at)
                margin = [0] * (-2 * first)
                for axis in (first, second):
                    margin[-2 * axis - 2], margin[-2 * axis - 1] = low, out - high
                part = nn.functional.pad(part, margin)
                total = part if total is None else total + part
            v = total / self.kernel_size
        return v


def _strided(v: Tensor, axis: int, at: range) -> Tensor:
    index = [slice(None)] * v.ndim
    index[axis] = slice(at.start, at.stop, at.step)
    return v[tuple(index)]


@dataclass(frozen=True)
class _Head(Layer):
    def parameters(self, path: str) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def shared(self) -> frozenset[str]:
        """None."""
        return frozenset()


@dataclass(frozen=True)
class Flatten(_Head):
    """An image as a vector of all its pixels and channels; Dense must follow."""

    def follow(self, signal: Signal) -> Signal:
        """A vector whose units are not all alike, so that only weights can follow."""
        height, width = _image("Flatten", signal)
        return Signal(signal.channels * height * width, None, False, signal.raw)

    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """The mean over pixels."""
        return k.mapped(lambda v: v.mean((-2, -1)), "none")

    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """Pixels and channels side by side."""
        return lambda h, weights, num_batch: h.flatten(-3), self.follow(signal)


@dataclass(frozen=True)
class GlobalAveragePool(_Head):
    """The mean of every channel over the image."""

    def follow(self, signal: Signal) -> Signal:
        """A vector of channels."""
        _image("GlobalAveragePool", signal)
        return signal._replace(pixels=None)

    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """The mean over pairs of pixels."""
        return k.mapped(lambda v: v.mean((-4, -3, -2, -1)), "none")

    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """Means over pixels."""
        return lambda h, weights, num_batch: h.mean((-3, -2)), self.follow(signal)


def _image(where: str, signal: Signal) -> tuple[int, int]:
    if signal.pixels is None:
        fix = "pass image_shape=(channels, height, width) to the kernel, and pool only once"
        fail(SettingError, where, "the signal must be an image.", got="a vector", fix=fix)
    return signal.pixels
