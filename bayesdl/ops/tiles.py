r"""Tiles of a kernel matrix: what matrix-free products evaluate, use once and throw away.

A tile is k(x_I, z_J) for a block of rows and a block of columns, small enough to stay in a core's cache. Whatever of it
depends on rows or on columns alone is prepared once (`rows`), so that a tile costs one small matrix product and a few
passes in place. Nothing here records a graph; `pullback` recomputes the tile and returns gradients in closed form.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.ops import _triton

Rows = tuple[Tensor, ...]
Grads = dict[str, Tensor]

_MATERN_SLOPE = {0.5: -0.5, 1.5: -1.5, 2.5: -5.0 / 6.0}


class Tiles(abc.ABC):
    """A covariance function at fixed hyper-parameters, without batch axes, evaluated tile by tile.

    `factor * value(...)` is the covariance: a scale that all entries share is applied to products, not to entries.
    """

    factor: float = 1.0

    @property
    def threadsafe(self) -> bool:
        """Whether several threads may evaluate tiles at once."""
        return True

    @property
    def fused(self) -> _triton.Fused | None:
        """What a GPU evaluates in one kernel with the product; None where it takes tiles, as on a CPU."""
        return None

    @abc.abstractmethod
    def rows(self, x: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """What tiles need of the rows x (n d) and the columns z (m d): tensors with n or m in front, in `dtype`."""

    @abc.abstractmethod
    def value(self, left: Rows, right: Rows, out: Tensor, spare: Tensor, *, same: bool) -> Tensor:
        """The tile (r c), in `out` or elsewhere; `spare` may be overwritten; `same` where rows and columns are one."""

    @abc.abstractmethod
    def diagonal(self, x: Tensor) -> Tensor:
        """k(x_i, x_i), shape (n), with the factor."""

    @abc.abstractmethod
    def pullback(self, left: Rows, right: Rows, p: Tensor, *, same: bool) -> Grads:
        """dL/d(hyper-parameters) from p = dL/d(covariance) (r c), which may be overwritten; factor included."""


@final
@dataclass(frozen=True)
class StationaryTiles(Tiles):
    r"""h(|x - z|^2 / lengthscale^2), by one product of augmented rows and a few passes in place.

    c |u_i - w_j|^2 = (-2 c u_i, c |u_i|^2, 1) . (w_j, 1, |w_j|^2 c)

    Attributes:
        profile: "rbf", "matern" or "rational_quadratic".
        lengthscale: (d) or ().
        nu: Smoothness, of a Matern.
        alpha: Shape (), of a rational quadratic.
        columns: Columns of the input that count, None for all.
    """

    profile: str
    lengthscale: Tensor
    nu: float = math.inf
    alpha: Tensor | None = None
    columns: tuple[int, ...] | None = None

    @property
    def fused(self) -> _triton.Fused | None:
        """RBF and Matern profiles."""
        if self.profile == "rational_quadratic":
            return None
        return _triton.Fused("rbf" if self.profile == "rbf" else f"matern {self.nu}")

    def rows(self, x: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """Augmented rows, scaled and centred in the precision of x before they are rounded to `dtype`."""
        scale = self._argument_factor()
        x = self._select(x)
        centre = x.mean(-2, keepdim=True)
        u = (x - centre) / self.lengthscale
        w = u if z is x else (self._select(z) - centre) / self.lengthscale
        left, right = [], []
        for part, into in ((u, left), (w, right)):
            norm = part.square().sum(-1, keepdim=True) * scale
            one = torch.ones_like(norm)
            into.append(torch.cat([-2.0 * scale * part, norm, one] if into is left else [part, one, norm], -1))
        return (left[0].to(dtype),), (right[0].to(dtype),)

    def value(self, left: Rows, right: Rows, out: Tensor, spare: Tensor, *, same: bool) -> Tensor:
        """The profile of a tile of distances; coincident rows are at distance 0."""
        u = self._argument(left, right, out, same)
        if self.profile == "rbf":
            return u.exp_()
        if self.profile == "rational_quadratic":
            return u.add_(1.0).log_().mul_(-float(self.alpha)).exp_()
        r = torch.sqrt(u, out=spare)
        if self.nu == 0.5:
            return r.neg_().exp_()
        poly = torch.add(r, u, alpha=1.0 / 3.0, out=u) if self.nu == 2.5 else u.copy_(r)
        decay = r.neg_().exp_()
        return torch.addcmul(decay, poly, decay, out=poly)

    def diagonal(self, x: Tensor) -> Tensor:
        """Ones."""
        return x.new_ones(x.shape[-2])

    def pullback(self, left: Rows, right: Rows, p: Tensor, *, same: bool) -> Grads:
        r"""With q = p h'(d2): dL/d(lengthscale_k) = -2 / lengthscale_k sum_ij q_ij (u_ik - w_jk)^2."""
        u = self._argument(left, right, torch.empty_like(p), same)
        grads: Grads = {}
        if self.profile == "rbf":
            q, factor = p.mul_(u.exp_()), -0.5
        elif self.profile == "rational_quadratic":
            t = u.add_(1.0)
            value = t.log().mul_(-float(self.alpha)).exp_()
            grads["alpha"] = (p * value * ((t - 1) / t - t.log())).sum()
            q, factor = p.mul_(value).div_(t), -0.5
        else:
            q, factor = p.mul_(self._matern_slope(u)), _MATERN_SLOPE[self.nu]
        d = left[0].shape[-1] - 2
        a, w = left[0][:, :d] / (-2.0 * self._argument_factor()), right[0][:, :d]
        m = q @ torch.cat([w, w.square(), torch.ones_like(w[:, :1])], -1)
        squares = (a.square() * m[:, -1:] - 2.0 * a * m[:, :d] + m[:, d:-1]).sum(0)
        if self.lengthscale.ndim == 0:
            squares = squares.sum()
        grads["lengthscale"] = squares.mul_(-2.0 * factor) / self.lengthscale
        return grads

    def _matern_slope(self, u: Tensor) -> Tensor:
        """h'(d2) of a Matern up to a constant: exp(-r) times 1 / r, 1 or 1 + r; the kink of 1 / r at 0 counts as 0."""
        r = u.sqrt()
        if self.nu == 1.5:
            return r.neg_().exp_()
        if self.nu == 2.5:
            return (r + 1.0).mul_(r.neg_().exp_())
        return torch.where(u > _tiny(u.dtype), (-r).exp_() / r, torch.zeros_like(r))

    def _argument(self, left: Rows, right: Rows, out: Tensor, same: bool) -> Tensor:
        """The multiple of d2 that the profile takes, never of the wrong sign, exact where rows coincide."""
        u = torch.mm(left[0], right[0].mT, out=out)
        # Two values at which a processor takes a slow path are kept away from: roots of an exact 0, for which the
        # smallest normal number stands, and exponentials that are no longer normal numbers.
        tiny, far = _tiny(u.dtype), 80.0 if u.dtype == torch.float32 else 690.0
        if same:
            u.diagonal().fill_(0.0 if self.profile == "rbf" else tiny)
        if self.profile == "rbf":
            return u.clamp_(-far, 0.0)
        if self.profile == "rational_quadratic":
            return u.clamp_min_(0.0)
        if self.nu == 0.5:
            # Below the rounding error of its own computation a distance counts as 0: the root would magnify it.
            rounding = 16.0 * torch.finfo(u.dtype).eps * float(left[0][:, -2].amax())
            torch.nn.functional.threshold_(u, rounding, tiny)
        return u.clamp_(tiny, far**2)

    def _argument_factor(self) -> float:
        if self.profile == "rbf":
            return -0.5
        return 2.0 * self.nu if self.profile == "matern" else 0.5 / float(self.alpha)

    def _select(self, x: Tensor) -> Tensor:
        return x if self.columns is None else x[..., list(self.columns)]


@final
@dataclass(frozen=True)
class ScaledTiles(Tiles):
    """outputscale * base; its gradients are named "outputscale" and "base.NAME"."""

    base: Tiles
    outputscale: Tensor

    @property
    def factor(self) -> float:
        """The outputscale, times the factor of the base."""
        return float(self.outputscale) * self.base.factor

    @property
    def fused(self) -> _triton.Fused | None:
        """That of the base."""
        return self.base.fused

    @property
    def threadsafe(self) -> bool:
        """As the base."""
        return self.base.threadsafe

    def rows(self, x: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """Those of the base."""
        return self.base.rows(x, z, dtype)

    def value(self, left: Rows, right: Rows, out: Tensor, spare: Tensor, *, same: bool) -> Tensor:
        """That of the base: the scale is in `factor`."""
        return self.base.value(left, right, out, spare, same=same)

    def diagonal(self, x: Tensor) -> Tensor:
        """The base's, scaled."""
        return self.outputscale * self.base.diagonal(x)

    def pullback(self, left: Rows, right: Rows, p: Tensor, *, same: bool) -> Grads:
        """d k / d(outputscale) is the base itself."""
        base = self.base.value(left, right, torch.empty_like(p), torch.empty_like(p), same=same)
        own = (p * base).sum() * self.base.factor
        inner = self.base.pullback(left, right, p, same=same)
        scaled = {f"base.{name}": grad * self.outputscale for name, grad in inner.items()}
        return {"outputscale": own.to(self.outputscale), **scaled}


@final
@dataclass(frozen=True)
class CombinedTiles(Tiles):
    """The sum or the product of several covariance functions; gradients are named "0.NAME", "1.NAME" and so on."""

    parts: tuple[Tiles, ...]
    product: bool

    @property
    def threadsafe(self) -> bool:
        """As all its parts."""
        return all(part.threadsafe for part in self.parts)

    def rows(self, x: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """Those of the parts, one after another."""
        pairs = [part.rows(x, z, dtype) for part in self.parts]
        return tuple(t for left, _ in pairs for t in left), tuple(t for _, right in pairs for t in right)

    def value(self, left: Rows, right: Rows, out: Tensor, spare: Tensor, *, same: bool) -> Tensor:
        """Part by part, into `out`."""
        values = self._values(left, right, out, spare, same)
        total = next(values)
        for value in values:
            total = total.mul_(value) if self.product else total.add_(value)
        return total

    def diagonal(self, x: Tensor) -> Tensor:
        """The parts', combined."""
        diagonals = torch.stack([part.diagonal(x) for part in self.parts])
        return diagonals.prod(0) if self.product else diagonals.sum(0)

    def pullback(self, left: Rows, right: Rows, p: Tensor, *, same: bool) -> Grads:
        """Each part alone; a factor of a product is weighted by the others."""
        values = list(self._values(left, right, None, torch.empty_like(p), same)) if self.product else []
        grads: Grads = {}
        for i, (part, a, b) in enumerate(self._split(left, right)):
            weight = p.clone()
            for j, other in enumerate(values):
                if j != i:
                    weight.mul_(other)
            grads.update({f"{i}.{name}": grad for name, grad in part.pullback(a, b, weight, same=same).items()})
        return grads

    def _values(self, left: Rows, right: Rows, out: Tensor | None, spare: Tensor, same: bool):
        for i, (part, a, b) in enumerate(self._split(left, right)):
            into = out if i == 0 and out is not None else torch.empty_like(spare)
            value = part.value(a, b, into, spare, same=same)
            # a part may have answered in the scratch that the next one will overwrite
            value = into.copy_(value) if value.data_ptr() == spare.data_ptr() else value
            yield value if part.factor == 1.0 else value.mul_(part.factor)

    def _split(self, left: Rows, right: Rows) -> list[tuple[Tiles, Rows, Rows]]:
        split, at = [], 0
        for part in self.parts:
            width = _width(part)
            split.append((part, left[at : at + width], right[at : at + width]))
            at += width
        return split


@final
@dataclass(frozen=True)
class ArcCosineTiles(Tiles):
    r"""The kernel of an infinitely wide relu network of `depth` hidden layers.

        k_0 = w_std^2 x . z / d + b_std^2,    k_l = w_std^2 sqrt(a b) / (2 pi) (sin t + (pi - t) cos t) + b_std^2

    with a and b the variances of the two sides one layer below and cos t = k_{l-1} / sqrt(a b).

    Attributes:
        depth: Hidden layers.
        evaluated: The same covariance function, whose autograd gives the gradients in "w_std" and "b_std".
        columns: Columns of the input that count, None for all.
    """

    depth: int
    evaluated: EvaluatedTiles
    columns: tuple[int, ...] | None = None

    @property
    def fused(self) -> _triton.Fused | None:
        """The whole recursion."""
        return _triton.Fused("arc-cosine", self.depth, *self._variances())

    def rows(self, x: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """(w_std x / sqrt d, b_std), its squared norm, and the inputs themselves."""
        left = self._prepare(x, dtype)
        return left, left if z is x else self._prepare(z, dtype)

    def value(self, left: Rows, right: Rows, out: Tensor, spare: Tensor, *, same: bool) -> Tensor:
        """Layer by layer, in place."""
        w2, b2 = self._variances()
        k = torch.mm(left[0], right[0].mT, out=out)
        a, b = left[1], right[1]
        for _ in range(self.depth):
            if same:
                k.diagonal().copy_(a)
            root, other = a.sqrt().unsqueeze(-1), b.sqrt()
            c = k.div_(root).div_(other).clamp_(-1.0, 1.0)
            sine = torch.mul(c, c, out=spare).neg_().add_(1.0).sqrt_()
            # (pi - t) cos t + sin t, with t = arccos c
            k = torch.acos(c).neg_().add_(math.pi).mul_(c).add_(sine).mul_(root).mul_(other * (w2 * 0.5 / math.pi))
            k.add_(b2)
            a, b = 0.5 * w2 * a + b2, 0.5 * w2 * b + b2
        if same:
            k.diagonal().copy_(a)
        return k

    def diagonal(self, x: Tensor) -> Tensor:
        """The recursion of the variances alone."""
        return self.evaluated.diagonal(x)

    def pullback(self, left: Rows, right: Rows, p: Tensor, *, same: bool) -> Grads:
        """By autograd, from the inputs."""
        return self.evaluated.pullback(left[2:], right[2:], p, same=same)

    def _prepare(self, x: Tensor, dtype: torch.dtype) -> Rows:
        w2, b2 = self._variances()
        own = x if self.columns is None else x[..., list(self.columns)]
        bias = torch.full_like(own[..., :1], math.sqrt(b2))
        rows = torch.cat([own * math.sqrt(w2 / own.shape[-1]), bias], -1)
        return rows.to(dtype), rows.square().sum(-1).to(dtype), x.to(dtype)

    def _variances(self) -> tuple[float, float]:
        params = self.evaluated.params
        return float(params["w_std"]) ** 2, float(params["b_std"]) ** 2


@final
@dataclass(frozen=True)
class EvaluatedTiles(Tiles):
    """Any covariance function, evaluated on the rows of each tile; its gradients by autograd, tile by tile.

    Attributes:
        covariance: (x (r d), z (c d), params) -> (r c), differentiable in params.
        variance: (x (r d), params) -> (r).
        params: Hyper-parameters by name.
    """

    covariance: Callable[[Tensor, Tensor, Grads], Tensor]
    variance: Callable[[Tensor, Grads], Tensor]
    params: Grads

    @property
    def threadsafe(self) -> bool:
        """A kernel of the user's own may not be; a gpytorch module that is called with other parameters is not."""
        return False

    def rows(self, x: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Rows, Rows]:
        """The inputs themselves."""
        return (x.to(dtype),), (z.to(dtype),)

    def value(self, left: Rows, right: Rows, out: Tensor, spare: Tensor, *, same: bool) -> Tensor:
        """k(x_I, z_J), with the exact variances on the diagonal where rows and columns are the same."""
        params = {name: v.detach().to(left[0].dtype) for name, v in self.params.items()}
        with torch.no_grad():
            value = self.covariance(left[0], right[0], params)
            value = value.clone() if value._base is not None or not value.is_contiguous() else value
            if same:
                value.diagonal().copy_(self.variance(left[0], params))
        return value

    def diagonal(self, x: Tensor) -> Tensor:
        """k(x_i, x_i)."""
        with torch.no_grad():
            return self.variance(x, self.params)

    def pullback(self, left: Rows, right: Rows, p: Tensor, *, same: bool) -> Grads:
        """One backward pass a tile."""
        leaves = {name: v.detach().to(p.dtype).requires_grad_() for name, v in self.params.items()}
        with torch.enable_grad():
            value = self.covariance(left[0], right[0], leaves)
            if same:
                value = torch.diagonal_scatter(value, self.variance(left[0], leaves))
        grads = torch.autograd.grad(value, list(leaves.values()), p, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }


def _tiny(dtype: torch.dtype) -> float:
    return 1e-36 if dtype == torch.float32 else 1e-300


def _width(part: Tiles) -> int:
    """How many tensors the rows of a part take."""
    if isinstance(part, ScaledTiles):
        return _width(part.base)
    if isinstance(part, ArcCosineTiles):
        return 3
    return sum(_width(p) for p in part.parts) if isinstance(part, CombinedTiles) else 1
