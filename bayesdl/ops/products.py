r"""Products with a kernel matrix that is never formed: tile by tile, in memory that does not grow with n^2.

    A V,   A = k(x, x) + noise_variance I        and        sum_c d/dtheta ( u_c' k(x, x) v_c )

A symmetric product evaluates only the tiles on and above the diagonal and uses each twice. Sums over tiles are kept in
float64 also where the tiles are float32.

References: Wang et al. (2019), "Exact Gaussian processes on a million data points", arXiv 1903.08114.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayesdl.errors import ShapeError, fail
from bayesdl.ops import _triton
from bayesdl.ops.tiles import Grads, Rows, Tiles
from bayesdl.ops.workers import in_parallel, num_workers

# Two or three arrays of a tile are in work at once and should share a core's second-level cache; where there are many
# columns the products outweigh the evaluation of the kernel, and like larger tiles.
_CPU_TILE_BYTES = 2**19
_WIDE_TILE_BYTES = 2**21
_WIDE = 33
_GPU_TILE_BYTES = 2**28
_FLUSH = 16  # float32 results of so many tiles are summed up before they go to a float64 sum


@final
@dataclass(frozen=True)
class KernelOperator:
    """k(x, x) + noise_variance I as a linear map, prepared once for many products.

    Attributes:
        tiles: The covariance function.
        x: (n d) inputs.
        noise_variance: () what the diagonal has besides.
        left, right: What tiles need of rows and columns.
        tile_bytes: Size of a tile, None for what suits the device and the number of columns.
    """

    tiles: Tiles
    x: Tensor
    noise_variance: Tensor
    left: Rows
    right: Rows
    tile_bytes: int | None = None

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.x.shape[-2]

    def __call__(self, v: Tensor) -> Tensor:
        """A V for v (n t), in float64 whatever the precision of the tiles.

        Cost: n^2 / 2 kernel evaluations and 2 n^2 t operations; O(n t) memory besides one tile.
        """
        return self.kernel(v).add_(v.to(torch.float64) * self.noise_variance)

    def kernel(self, v: Tensor) -> Tensor:
        """k(x, x) V without the noise."""
        _check_columns("ops.KernelOperator", self.n, v)
        fused = self.tiles.fused
        if fused is not None and _triton.usable(self.left[0]):
            product = _triton.product(fused, self.left, self.right, v.to(torch.float32), same=True)
            return product.mul_(self.tiles.factor)
        vt = v.to(self.left[0].dtype).mT.contiguous()  # (t, n): narrow products are fastest with columns lying as rows
        rows, columns = self._tile_shape(v.shape[-1])
        strips = range(0, self.n, rows)
        workers = self._workers(len(strips))
        # neighbouring strips are of nearly the same length, so that taking turns gives everyone the same share
        parts = in_parallel(lambda worker: self._strips(vt, strips[worker::workers], rows, columns), workers)
        out = parts[0]
        for part in parts[1:]:
            out += part
        return out.mul_(self.tiles.factor).mT

    def _strips(self, vt: Tensor, strips: range, rows: int, columns: int) -> Tensor:
        """What the tiles of some rows, on the diagonal and to its right, add to the product (t, n), in float64."""
        out = torch.zeros(vt.shape, dtype=torch.float64, device=vt.device)
        # what the tiles of the current rows add to those rows, and to all later ones
        own, later = vt.new_zeros(vt.shape[0], rows), torch.zeros_like(vt)
        scratch = torch.empty(2, rows * max(rows, columns), dtype=vt.dtype, device=vt.device)
        for i, start in enumerate(strips):
            stop = min(start + rows, self.n)
            mine = own[:, : stop - start]
            for j, (begin, end) in enumerate(_to_the_right(start, stop, self.n, columns)):
                tile = self._tile(start, stop, begin, end, scratch)
                mine.addmm_(vt[:, begin:end], tile.mT)
                if begin != start:
                    later[:, begin:end].addmm_(vt[:, start:stop], tile)
                if j % _FLUSH == _FLUSH - 1:
                    out[:, start:stop] += mine
                    mine.zero_()
            out[:, start:stop] += mine
            mine.zero_()
            if i % _FLUSH == _FLUSH - 1:
                out += later
                later.zero_()
        return out.add_(later)

    def gradient(self, u: Tensor, v: Tensor) -> Grads:
        """d/dtheta of sum_c u_c' k(x, x) v_c for u and v (n t), by recomputing every tile.

        Cost: about two products; O(n (d + t)) memory.
        """
        _check_columns("ops.KernelOperator.gradient", self.n, u)
        dtype = self.left[0].dtype
        u, v = u.to(dtype), v.to(dtype)
        rows, columns = self._tile_shape(v.shape[-1])
        strips = range(0, self.n, rows)
        workers = self._workers(len(strips))
        parts = in_parallel(lambda worker: self._gradient(u, v, strips[worker::workers], rows, columns), workers)
        return {name: sum(part[name] for part in parts[1:] if name in part) + grad for name, grad in parts[0].items()}

    def _gradient(self, u: Tensor, v: Tensor, strips: range, rows: int, columns: int) -> Grads:
        total: Grads = {}
        for start in strips:
            stop = min(start + rows, self.n)
            for begin, end in _to_the_right(start, stop, self.n, columns):
                p = u[start:stop] @ v[begin:end].mT
                if begin != start:
                    p.addmm_(v[start:stop], u[begin:end].mT)  # the mirrored tile has the same covariances
                left, right = _cut(self.left, start, stop), _cut(self.right, begin, end)
                for name, grad in self.tiles.pullback(left, right, p, same=begin == start).items():
                    total[name] = total[name] + grad.to(torch.float64) if name in total else grad.to(torch.float64)
        return total

    def columns(self, index: Tensor) -> Tensor:
        """k(x, x[index]) (n s), without the noise."""
        return cross_covariance(self.tiles, self.x, self.x[index], tile_bytes=self.tile_bytes)

    def covariance(self, rows: Tensor, columns: Tensor) -> Tensor:
        """k(x[rows], x[columns]), without the noise."""
        return cross_covariance(self.tiles, self.x[rows], self.x[columns])

    def diagonal(self) -> Tensor:
        """k(x_i, x_i), without the noise."""
        return self.tiles.diagonal(self.x)

    def to(self, dtype: torch.dtype) -> KernelOperator:
        """The same map with tiles of another precision."""
        left, right = self.tiles.rows(self.x, self.x, dtype)
        return KernelOperator(self.tiles, self.x, self.noise_variance, left, right, self.tile_bytes)

    def _tile(self, start: int, stop: int, begin: int, end: int, scratch: Tensor) -> Tensor:
        shape = (stop - start, end - begin)
        size = shape[0] * shape[1]
        out, spare = scratch[0, :size].view(shape), scratch[1, :size].view(shape)
        left, right = _cut(self.left, start, stop), _cut(self.right, begin, end)
        return self.tiles.value(left, right, out, spare, same=begin == start)

    def _workers(self, strips: int) -> int:
        return num_workers(self.x.device, strips) if self.tiles.threadsafe else 1

    def _tile_shape(self, t: int) -> tuple[int, int]:
        return tile_shape(self.n, self.left[0].dtype, self.x.device, self.tile_bytes, t)


def kernel_operator(
    tiles: Tiles,
    x: Tensor,
    noise_variance: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    tile_bytes: int | None = None,
) -> KernelOperator:
    """k(x, x) + noise_variance I as a `KernelOperator`.

    Args:
        tiles: The covariance function at its hyper-parameters.
        x: (n d), float64.
        noise_variance: ().
        dtype: Precision of the tiles.
        tile_bytes: Size of one tile, None for what suits the device. Results depend on it by rounding only.

    Raises:
        ShapeError: x has batch axes.
    """
    if x.ndim != 2:
        wanted = "x must have shape (n, d): one problem at a time."
        fail(ShapeError, "ops.kernel_operator", wanted, got=str(tuple(x.shape)), fix="loop over the batch axes")
    left, right = tiles.rows(x, x, dtype)
    return KernelOperator(tiles, x, noise_variance, left, right, tile_bytes)


def cross_covariance(tiles: Tiles, x: Tensor, z: Tensor, *, tile_bytes: int | None = None) -> Tensor:
    """k(x, z) (n m), formed whole in float64 without a graph, through cache-sized tiles.

    Cost: n m kernel evaluations, n m numbers of memory.
    """
    out = x.new_empty(x.shape[-2], z.shape[-2])
    left, right = tiles.rows(x, z, x.dtype)
    rows, columns = tile_shape(max(out.shape), x.dtype, x.device, tile_bytes)
    strips = range(0, out.shape[0], rows)
    workers = num_workers(x.device, len(strips)) if tiles.threadsafe else 1

    def fill(worker: int) -> None:
        spare = x.new_empty(2, rows * columns)
        for start in strips[worker::workers]:
            for begin in range(0, out.shape[1], columns):
                a, b = _cut(left, start, start + rows), _cut(right, begin, begin + columns)
                shape = (a[0].shape[0], b[0].shape[0])
                one, two = (s[: shape[0] * shape[1]].view(shape) for s in spare)
                out[start : start + rows, begin : begin + columns] = tiles.value(a, b, one, two, same=False)

    in_parallel(fill, workers)
    return out.mul_(tiles.factor)


def cross_product(tiles: Tiles, x: Tensor, z: Tensor, v: Tensor, *, tile_bytes: int | None = None) -> Tensor:
    """k(x, z) V for v (m t), in float64, never holding more than one tile of k.

    Raises:
        ShapeError: v has other rows than z.

    Cost: n m kernel evaluations and 2 n m t operations; O((n + m) t) memory.
    """
    _check_columns("ops.cross_product", z.shape[-2], v)
    left, right = tiles.rows(x, z, x.dtype)
    rows, columns = tile_shape(max(x.shape[-2], z.shape[-2]), x.dtype, x.device, tile_bytes)
    out = v.new_zeros(v.shape[-1], x.shape[-2])
    vt = v.mT.contiguous()
    strips = range(0, x.shape[-2], rows)
    workers = num_workers(x.device, len(strips)) if tiles.threadsafe else 1

    def fill(worker: int) -> None:
        spare = x.new_empty(2, rows * columns)
        for start in strips[worker::workers]:
            a = _cut(left, start, start + rows)
            for begin in range(0, z.shape[-2], columns):
                b = _cut(right, begin, begin + columns)
                shape = (a[0].shape[0], b[0].shape[0])
                one, two = (s[: shape[0] * shape[1]].view(shape) for s in spare)
                tile = tiles.value(a, b, one, two, same=False)
                out[:, start : start + rows] += vt[:, begin : begin + columns] @ tile.mT

    in_parallel(fill, workers)
    return out.mul_(tiles.factor).mT


def tile_shape(
    n: int, dtype: torch.dtype, device: torch.device, tile_bytes: int | None = None, t: int = 1
) -> tuple[int, int]:
    """Rows and columns of a tile that t columns are multiplied with: wider than high, and in a core's cache."""
    wide = t >= _WIDE
    if tile_bytes is None:
        on_cpu = _WIDE_TILE_BYTES if wide else _CPU_TILE_BYTES
        tile_bytes = _GPU_TILE_BYTES if device.type == "cuda" else on_cpu
    entries = max(64, tile_bytes // dtype.itemsize)
    aspect = 2 if wide else 4
    rows = max(5, int((entries / aspect) ** 0.5))
    return max(1, min(rows, n)), max(1, min(aspect * rows, n))


def _to_the_right(start: int, stop: int, n: int, columns: int) -> list[tuple[int, int]]:
    """The columns of the tiles of rows start..stop: the square on the diagonal, then what lies to its right."""
    return [(start, stop), *((begin, min(begin + columns, n)) for begin in range(stop, n, columns))]


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    return tuple(part[start:stop] for part in rows)


def _check_columns(where: str, n: int, v: Tensor) -> None:
    if v.ndim != 2 or v.shape[0] != n:
        wanted = f"v must have shape ({n}, t)."
        fail(ShapeError, where, wanted, got=str(tuple(v.shape)), fix="pass one column a vector; v[:, None] for one")
