r"""What infinitely wide networks are computed with: the covariances of a layer's units at all pairs of inputs.

    (k(x, x), k(x, z), k(z, z)),    and t(x, z), the tangent kernel, beside them

For images there is one number a pixel, or one a pair of pixels. Where no graph is recorded, tensors are overwritten
from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.ops.dual import Dual


class Covariances(NamedTuple):
    """What is carried from layer to layer: covariances of x with itself, of z with itself, and between the two.

    For images these are per pixel: `pixels` is "same" where only pairs of the same pixel are kept, a (*b n h w) and
    cross (*b n m h w), and "pairs" where all are, a (*b n h w h w) and cross (*b n m h w h w); "none" for vectors.

    Attributes:
        by_x: k(x_i, x_i), (*b n), with pixel axes behind.
        by_z: k(z_j, z_j), (*b m), likewise.
        cross: k(x_i, z_j), (*b n m), likewise.
        tangent: The tangent kernel beside `cross`; None before the first weights, or where it is not asked for.
        own_tangent: The tangent kernel beside `by_x`.
        pixels: "none", "same" or "pairs".
        wants_tangent: Whether the tangent kernel is asked for.
        diagonal: Whether z is x, so that the diagonal of `cross` is known exactly.
        free: Whether no graph is recorded, so that tensors may be overwritten.
    """

    by_x: Tensor
    by_z: Tensor
    cross: Tensor
    tangent: Tensor | None
    own_tangent: Tensor | None
    pixels: str
    wants_tangent: bool
    diagonal: bool
    free: bool

    def through_weights(self, w: Tensor, b: Tensor | None) -> Covariances:
        """After weights and biases that are shared by all pixels."""
        w2, b2 = w.square(), None if b is None else b.square()
        each = {"none": 0, "same": 2, "pairs": 4}[self.pixels]
        by_x = _affine(self.by_x, w2, b2, 1 + each, False)
        by_z = by_x if self.by_z is self.by_x else _affine(self.by_z, w2, b2, 1 + each, False)
        cross = _affine(self.cross, w2, b2, 2 + each, self.free)
        tangent = own = None
        if self.wants_tangent:
            tangent = cross.clone() if self.tangent is None else _grown(self.tangent, w2, cross, 2 + each, self.free)
            own = by_x if self.own_tangent is None else _grown(self.own_tangent, w2, by_x, 1 + each, False)
        return self._replace(by_x=by_x, by_z=by_z, cross=cross, tangent=tangent, own_tangent=own)

    def through_activation(self, dual: Dual) -> Covariances:
        """After an activation of every unit."""
        k = self.with_exact_diagonal()
        a, b = k._facing(k.by_x, -1), k._facing(k.by_z, -2)
        cross = dual.value(a, k.cross, b) if k.free else dual(a, k.cross, b)
        tangent = own = None
        if k.tangent is not None and k.own_tangent is not None:
            slope = dual.slope(a, k.cross, b)
            tangent = slope.mul_(k.tangent) if k.free else slope * k.tangent
            own = k._own_slope(dual) * k.own_tangent
        by_x = k._own_value(dual, k.by_x)
        by_z = by_x if k.by_z is k.by_x else k._own_value(dual, k.by_z)
        return k._replace(by_x=by_x, by_z=by_z, cross=cross, tangent=tangent, own_tangent=own)

    def with_exact_diagonal(self) -> Covariances:
        """The covariances of points with themselves put in: what a dual map makes of rounding there is not noise."""
        if not self.diagonal or self.pixels == "pairs":
            return self
        cross = _set_diagonal(self.cross, self.by_x, self.pixels, self.free)
        tangent = self.tangent
        if tangent is not None and self.own_tangent is not None:
            tangent = _set_diagonal(tangent, self.own_tangent, self.pixels, self.free)
        return self._replace(cross=cross, tangent=tangent)

    def mapped(self, own: Callable[[Tensor], Tensor], pixels: str | None = None) -> Covariances:
        """After a linear map of pixel axes, the same for all members."""
        by_x = own(self.by_x)
        return self._replace(
            by_x=by_x,
            by_z=by_x if self.by_z is self.by_x else own(self.by_z),
            cross=own(self.cross),
            tangent=None if self.tangent is None else own(self.tangent),
            own_tangent=None if self.own_tangent is None else own(self.own_tangent),
            pixels=self.pixels if pixels is None else pixels,
        )

    def copied(self) -> Covariances:
        """With tensors that may be overwritten without changing these."""
        if not self.free:
            return self
        tangent = None if self.tangent is None else self.tangent.clone()
        return self._replace(cross=self.cross.clone(), tangent=tangent)

    def plus(self, other: Covariances) -> Covariances:
        """The sum of two independent signals of the same inputs."""
        by_x = self.by_x + other.by_x
        tangents = [k.tangent for k in (self, other) if k.tangent is not None]
        own = [k.own_tangent for k in (self, other) if k.own_tangent is not None]
        return self._replace(
            by_x=by_x,
            by_z=by_x if self.by_z is self.by_x else self.by_z + other.by_z,
            cross=self.cross + other.cross,
            tangent=sum(tangents[1:], tangents[0]) if tangents else None,
            own_tangent=sum(own[1:], own[0]) if own else None,
        )

    def _variances(self, own: Tensor) -> Tensor:
        """Variance of each pixel, (*b n) or (*b n h w)."""
        if self.pixels != "pairs":
            return own
        return own.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)

    def _facing(self, own: Tensor, axis: int) -> Tensor:
        """Variances with axes inserted so that they broadcast against `cross`: axis -1 for x, -2 for z."""
        v = self._variances(own)
        if self.pixels == "none":
            return v.unsqueeze(axis)
        v = v.unsqueeze(axis - 2)
        if self.pixels == "same":
            return v
        return v[..., None, None] if axis == -1 else v[..., None, None, :, :]

    def _own_value(self, dual: Dual, own: Tensor) -> Tensor:
        if self.pixels != "pairs":
            return dual.diagonal(own)
        v = self._variances(own)
        return dual(v[..., None, None], own, v[..., None, None, :, :])

    def _own_slope(self, dual: Dual) -> Tensor:
        if self.pixels != "pairs":
            return dual.slope_diagonal(self.by_x)
        v = self._variances(self.by_x)
        return dual.slope(v[..., None, None], self.by_x, v[..., None, None, :, :])


def _affine(v: Tensor, w2: Tensor, b2: Tensor | None, axes: int, free: bool) -> Tensor:
    w2 = w2.reshape(w2.shape + (1,) * axes)
    b2 = None if b2 is None else b2.reshape(b2.shape + (1,) * axes)
    if free and _fits(w2, v) and (b2 is None or _fits(b2, v)):
        v = v.mul_(w2)
        return v if b2 is None else v.add_(b2)
    return v * w2 if b2 is None else v * w2 + b2


def _fits(other: Tensor, v: Tensor) -> bool:
    """Whether v may be overwritten by its combination with `other`."""
    return other.numel() == 1 or other.shape == v.shape or torch.broadcast_shapes(v.shape, other.shape) == v.shape


def _grown(tangent: Tensor, w2: Tensor, k: Tensor, axes: int, free: bool) -> Tensor:
    """w_std^2 t + k."""
    w2 = w2.reshape(w2.shape + (1,) * axes)
    if free and _fits(w2, tangent) and _fits(k, tangent):
        return tangent.mul_(w2).add_(k)
    return tangent * w2 + k


def _set_diagonal(cross: Tensor, own: Tensor, pixels: str, free: bool) -> Tensor:
    axes = (-2, -1) if pixels == "none" else (-4, -3)
    own = own if pixels == "none" else own.movedim(-3, -1)
    if free:
        cross.diagonal(dim1=axes[0], dim2=axes[1]).copy_(own)
        return cross
    return torch.diagonal_scatter(cross, own.expand(cross.diagonal(0, *axes).shape), 0, *axes)
