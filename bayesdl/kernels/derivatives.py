r"""Covariances of a function's values and slopes, from a kernel.

    Cov[f(x), f(z)]            = k(x, z)
    Cov[df(x)/dx_i, f(z)]      = dk/dx_i
    Cov[df(x)/dx_i, df(z)/dz_j] = d^2 k / dx_i dz_j

exist where the last one is finite at x = z: f is then differentiable in mean square. Stationary, periodic and linear
kernels have closed forms; scaled kernels, sums and products follow from their parts; every other kernel is
differentiated by autograd, pair by pair.

References: Rasmussen, Williams (2006), section 9.4; Solak, Murray-Smith, Leithead, Leith, Rasmussen (2003),
"Derivative observations in Gaussian process models of dynamic systems".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.kernels.algebra import Product, Scale, Sum, _part
from bayesdl.kernels.base import Kernel, Params, get, per_row
from bayesdl.kernels.bounded import Bounded
from bayesdl.kernels.coregionalization import Coregionalization, label_columns
from bayesdl.kernels.linear import Linear
from bayesdl.kernels.periodic import Periodic
from bayesdl.kernels.stationary import RBF, Matern, RationalQuadratic, _Stationary
from bayesdl.ops import profiles

_STEPS = (1e-3, 1e-4, 1e-5)  # of the differences that autograd is compared with, in the units of the inputs
_CLOSE = 0.05


class Derivatives(NamedTuple):
    """A kernel and its derivatives between the rows of x (*b n d) and those of z (*b m d).

    Attributes:
        value: k, (*b n m).
        by_x: dk/dx_i, (*b n m d).
        by_z: dk/dz_j, (*b n m d).
        by_both: d^2 k / dx_i dz_j, (*b n m d d), i before j; None where it was not asked for.
    """

    value: Tensor
    by_x: Tensor
    by_z: Tensor
    by_both: Tensor | None


def derivatives(
    kernel: Kernel, x: Tensor, z: Tensor | None = None, params: Params | None = None, *, second: bool = True
) -> Derivatives:
    """Covariances of values and slopes at the rows of x with those at the rows of z.

    Args:
        kernel: Any kernel whose functions have slopes.
        x: (*b n d).
        z: (*b m d), or None for z = x.
        params: Values of the hyper-parameters, or None for the initial ones; their batch axes broadcast.
        second: Whether to compute `by_both`.

    Returns:
        All of them differentiable in x, z and params.

    Raises:
        ShapeError, DtypeError, DeviceError: x, z and the kernel's own dimensions do not fit together.
        SettingError: The functions of the kernel, or of a part of it, have no slopes (Matern 1/2).

    Kernels without a closed form here are differentiated as they are: `check_differentiable` tells whether that gives
    covariances.

    Cost: O(n m d^2) time and memory; by autograd, d + 1 times the kernel at n m single pairs.
    """
    kernel._check(x, z)
    z = x if z is None else z
    return _derive(kernel, x, z, kernel._resolved(x, params), second)


def check_differentiable(kernel: Kernel, x: Tensor, params: Params | None = None) -> None:
    """Raise SettingError unless the kernel's functions have slopes whose variances come out right at a few rows of x.

    The variance of a slope along a direction v is compared with the difference quotient

        Var[(f(x + h v) - f(x - h v)) / (2 h)],

    which grows without bounds as h falls where the functions have kinks.

    Args:
        kernel: The kernel.
        x: (n d).
        params: As for `derivatives`.
    """
    x = x.detach()[:3]
    told = derivatives(kernel, x, x, params).by_both
    own = told.diagonal(dim1=-4, dim2=-3)  # (*b d d n)
    d = x.shape[-1]
    labels = label_columns(kernel, d)
    v = x.new_tensor([0.0 if j in labels else 1.0 + 0.5 * math.sin(3.0 * j + 1.0) for j in range(d)])
    told = torch.einsum("...ijn,i,j->...n", own, v, v)
    best = torch.full_like(told, torch.inf)
    for h in _STEPS:
        after, before = x + h * v, x - h * v
        between = [kernel(a, b, params).diagonal(dim1=-2, dim2=-1) for a, b in ((after, before), (before, after))]
        rise = kernel.diagonal(after, params) + kernel.diagonal(before, params) - between[0] - between[1]
        rise = rise / (4 * h * h)
        best = torch.minimum(best, (rise - told).abs() / torch.maximum(rise.abs(), told.abs()).clamp_min(1e-6))
    if not bool((best < _CLOSE).all()):  # NaN as well
        _refuse(kernel, f"{_named(kernel)}, whose slopes have no finite variance, or none that autograd finds")


class Observed(NamedTuple):
    """What is seen of a function at the rows of x: its values, slopes, or some of both.

    Attributes:
        x: (*b n d).
        places: (N), which of the n (1 + d) quantities are seen, in which order: i (1 + d) is f at row i, and
            i (1 + d) + 1 + j its slope in column j there.
    """

    x: Tensor
    places: Tensor

    @classmethod
    def of(cls, x: Tensor, slopes: Tensor) -> Observed:
        """All values, then the slopes where `slopes` (n d) is true, row by row."""
        n, d = slopes.shape
        each = torch.arange(n * (1 + d), device=x.device).reshape(n, 1 + d)
        return cls(x, torch.cat([each[:, 0], each[:, 1:][slopes]]))

    @property
    def is_value(self) -> Tensor:
        """(N) bool, which of the quantities are values."""
        return self.places % (1 + self.x.shape[-1]) == 0

    def pick(self, quantities: Tensor) -> Tensor:
        """What is seen (*c N) of all values and slopes (*c n 1+d)."""
        return quantities.flatten(-2).index_select(-1, self.places)

    def covariance(self, kernel: Kernel, params: Params, other: Observed | None = None) -> Tensor:
        """Of what is seen here with itself, (*b N N), or with what is seen there, (*b N M); differentiable.

        Cost: O(n m (1 + d)^2) time and memory.
        """
        if other is None and self._values_only:
            return kernel(self.x, None, params).index_select(-2, self._rows).index_select(-1, self._rows)
        there = self if other is None else other
        if self._values_only and there._values_only:
            whole = kernel(self.x, there.x, params)
            return whole.index_select(-2, self._rows).index_select(-1, there._rows)
        parts = derivatives(kernel, self.x, there.x, params)
        upper = torch.cat([parts.value.unsqueeze(-1), parts.by_z], -1).unsqueeze(-2)
        lower = torch.cat([parts.by_x.unsqueeze(-1), parts.by_both], -1)
        blocks = torch.cat([upper, lower], -2).transpose(-3, -2)  # (*b n 1+d m 1+d)
        whole = blocks.flatten(-4, -3).flatten(-2)
        return whole.index_select(-2, self.places).index_select(-1, there.places)

    def with_values(self, kernel: Kernel, z: Tensor, params: Params) -> Tensor:
        """Covariances with f at the rows of z (*b m d): (*b N m)."""
        if self._values_only:
            return kernel(self.x, z, params).index_select(-2, self._rows)
        parts = derivatives(kernel, self.x, z, params, second=False)
        both = torch.cat([parts.value.unsqueeze(-2), parts.by_x.transpose(-2, -1)], -2)  # (*b n 1+d m)
        return both.flatten(-3, -2).index_select(-2, self.places)

    def with_slopes(self, kernel: Kernel, z: Tensor, params: Params) -> Tensor:
        """Covariances with all slopes of f at the rows of z (*b m d): (*b N m d)."""
        parts = derivatives(kernel, self.x, z, params)
        both = torch.cat([parts.by_z.unsqueeze(-3), parts.by_both.transpose(-3, -2)], -3)  # (*b n 1+d m d)
        return both.flatten(-4, -3).index_select(-3, self.places)

    @property
    def _rows(self) -> Tensor:
        return self.places // (1 + self.x.shape[-1])

    @property
    def _values_only(self) -> bool:
        return bool(self.is_value.all())


def _refuse(kernel: Kernel, got: str) -> NoReturn:
    wanted = "derivative observations need a kernel whose functions have slopes."
    fix = "bdl.kernels.RBF(), Matern(nu=2.5), RationalQuadratic(), or an NNGP with a smooth activation"
    fail(SettingError, type(kernel).__name__, wanted, got=got, fix=fix)


def _named(kernel: Kernel) -> str:
    text = repr(kernel)
    return text if len(text) <= 120 else f"{text[:117]}..."


@functools.singledispatch
def _derive(kernel: Kernel, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    """By autograd, with every pair of rows as a problem of its own."""
    n, m, d = x.shape[-2], z.shape[-2], x.shape[-1]
    lead = torch.broadcast_shapes(x.shape[:-2], z.shape[:-2], kernel._batch(d, params) if params else ())
    events = {p.name: len(p.shape) for p in kernel.parameters(d)}
    # an axis for the pairs behind the batch axes of each hyper-parameter
    own = {name: v.unsqueeze(v.ndim - events[name]) if v.ndim > events[name] else v for name, v in params.items()}
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, z, *params.values()))
    with torch.enable_grad():
        left = x.unsqueeze(-2).expand(*lead, n, m, d).reshape(*lead, n * m, 1, d)
        right = z.unsqueeze(-3).expand(*lead, n, m, d).reshape(*lead, n * m, 1, d)
        left, right = (t if recorded and t.requires_grad else t.detach().requires_grad_() for t in (left, right))
        value, both = kernel._covariance(left, right, own), None
        try:
            by_x, by_z = _gradient(value, (left, right))
            if second:
                both = torch.stack([_gradient(by_z[..., j], (left,))[0] for j in range(d)], -1)
        except (NotImplementedError, RuntimeError) as error:  # a kernel of others that can be differentiated once
            _refuse(kernel, f"{_named(kernel)}: {error}")
    shape = (*lead, n, m)
    parts = (value.reshape(shape), by_x.reshape(*shape, d), by_z.reshape(*shape, d))
    both = None if both is None else both.reshape(*shape, d, d)
    if not recorded:
        parts, both = tuple(t.detach() for t in parts), None if both is None else both.detach()
    return Derivatives(*parts, both)


def _gradient(value: Tensor, at: Sequence[Tensor]) -> list[Tensor]:
    """Of the sum, with a graph; 0 where it does not depend."""
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in at]
    found = torch.autograd.grad(value.sum(), at, create_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True)]


@_derive.register
def _(kernel: _Stationary, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    u, lengthscale = kernel._scaled(x, params)
    v = kernel._select(z) / lengthscale
    rate = lengthscale.reciprocal()
    rate = rate.unsqueeze(-3) if rate.ndim > 1 else rate
    gap = u.unsqueeze(-2) - v.unsqueeze(-3)  # exactly 0 where rows coincide
    value, first, bend = _profile(kernel, gap.square().sum(-1), params, second)
    slope = gap * rate
    by_x = 2.0 * first.unsqueeze(-1) * slope
    both = None
    if bend is not None:
        own = torch.diag_embed((rate * rate).expand(*rate.shape[:-1], u.shape[-1]))
        outer = slope.unsqueeze(-1) * slope.unsqueeze(-2)
        both = -4.0 * bend[..., None, None] * outer - 2.0 * first[..., None, None] * own
    return _on_all_columns(Derivatives(value, by_x, -by_x, both), kernel.active_dims, x.shape[-1])


def _profile(kernel: Kernel, d2: Tensor, params: Params, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """h(d2), h'(d2) and h''(d2); what is infinite at 0 meets a factor d2 there, and is returned as 0."""
    if type(kernel) is RBF:
        value = profiles.rbf(d2)
        return value, -0.5 * value, 0.25 * value
    if type(kernel) is RationalQuadratic:
        alpha = get(params, "alpha", "RationalQuadratic")[..., None, None]
        value, t = profiles.rational_quadratic(d2, alpha), 1.0 + 0.5 * d2 / alpha
        return value, -0.5 * value / t, 0.25 * (1.0 + 1.0 / alpha) * value / t.square()
    if type(kernel) is not Matern or kernel.nu == 0.5:
        _refuse(kernel, _named(kernel))
    # the profiles of one smoothness are the slopes of the next, at r = sqrt(2 nu d2)
    value = profiles.matern(d2, kernel.nu)
    if kernel.nu == 2.5:
        bend = 25.0 / 12.0 * profiles.matern(5.0 * d2, 0.5) if second else None
        return value, -5.0 / 6.0 * profiles.matern(5.0 / 3.0 * d2, 1.5), bend
    decay = profiles.matern(3.0 * d2, 0.5)
    if not second:
        return value, -1.5 * decay, None
    away = d2 > 0
    r = torch.where(away, 3.0 * d2, torch.ones_like(d2)).sqrt()
    return value, -1.5 * decay, torch.where(away, 2.25 * decay / r, torch.zeros_like(d2))


@_derive.register
def _(kernel: Periodic, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    period, lengthscale = (per_row(get(params, name, "Periodic"), kernel.ard) for name in ("period", "lengthscale"))
    period, lengthscale = (t.unsqueeze(-3) if t.ndim > 1 else t for t in (period, lengthscale))
    rate = 2 * math.pi / period
    angle = rate * (kernel._select(x).unsqueeze(-2) - kernel._select(z).unsqueeze(-3))
    value = ((angle.cos() - 1.0) / lengthscale).sum(-1).exp()
    slope = rate * angle.sin() / lengthscale  # of the exponent, in z
    by_z = value.unsqueeze(-1) * slope
    both = None
    if second:
        own = torch.diag_embed(rate.square() * angle.cos() / lengthscale)
        both = value[..., None, None] * (own - slope.unsqueeze(-1) * slope.unsqueeze(-2))
    return _on_all_columns(Derivatives(value, -by_z, by_z, both), kernel.active_dims, x.shape[-1])


@_derive.register
def _(kernel: Linear, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    variance = kernel._row_variance(params)
    value = kernel._covariance(x, z, params)
    x_own, z_own = kernel._select(x), kernel._select(z)
    shape = (*value.shape, x_own.shape[-1])
    by_x = (z_own * variance).unsqueeze(-3).expand(shape)
    by_z = (x_own * variance).unsqueeze(-2).expand(shape)
    both = None
    if second:
        each = variance.unsqueeze(-3) if variance.ndim > 1 else variance
        both = torch.diag_embed(each.expand(shape))
    return _on_all_columns(Derivatives(value, by_x, by_z, both), kernel.active_dims, x.shape[-1])


@_derive.register
def _(kernel: Scale, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    return _times(_derive(kernel.base, x, z, _part(params, "base"), second), get(params, "outputscale", "Scale"))


@_derive.register
def _(kernel: Bounded, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    return _derive(kernel.base, x, z, kernel._whole(x.shape[-1], params, x), second)


@_derive.register
def _(kernel: Coregionalization, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    inputs, tasks = kernel._apart(x)
    there, others = kernel._apart(z)
    part = _derive(kernel.base, inputs, there, _part(params, "base"), second)
    shared = tasks @ kernel.task_covariance(params) @ others.mT
    wide = shared.unsqueeze(-1)
    both = None if part.by_both is None else part.by_both * wide.unsqueeze(-1)
    own = kernel.task_column(x.shape[-1])
    columns = [column for column in range(x.shape[-1]) if column != own]
    scaled = Derivatives(part.value * shared, part.by_x * wide, part.by_z * wide, both)
    return _on_all_columns(scaled, columns, x.shape[-1])


@_derive.register
def _(kernel: Sum, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    parts = [_derive(part, x, z, _part(params, str(i)), second) for i, part in enumerate(kernel.kernels)]
    return functools.reduce(_plus, parts)


@_derive.register
def _(kernel: Product, x: Tensor, z: Tensor, params: Params, second: bool) -> Derivatives:
    parts = [_derive(part, x, z, _part(params, str(i)), second) for i, part in enumerate(kernel.kernels)]
    return functools.reduce(_by_parts, parts)


def _times(a: Derivatives, scale: Tensor) -> Derivatives:
    """`scale` (*b) times all of a."""
    two, three = scale[..., None, None], scale[..., None, None, None]
    both = None if a.by_both is None else three.unsqueeze(-1) * a.by_both
    return Derivatives(two * a.value, three * a.by_x, three * a.by_z, both)


def _plus(a: Derivatives, b: Derivatives) -> Derivatives:
    both = None if a.by_both is None or b.by_both is None else a.by_both + b.by_both
    return Derivatives(a.value + b.value, a.by_x + b.by_x, a.by_z + b.by_z, both)


def _by_parts(a: Derivatives, b: Derivatives) -> Derivatives:
    """The product rule."""
    wide_a, wide_b = a.value.unsqueeze(-1), b.value.unsqueeze(-1)
    by_x, by_z = a.by_x * wide_b + wide_a * b.by_x, a.by_z * wide_b + wide_a * b.by_z
    both = None
    if a.by_both is not None and b.by_both is not None:
        crossed = a.by_x.unsqueeze(-1) * b.by_z.unsqueeze(-2) + b.by_x.unsqueeze(-1) * a.by_z.unsqueeze(-2)
        both = a.by_both * wide_b.unsqueeze(-1) + wide_a.unsqueeze(-1) * b.by_both + crossed
    return Derivatives(a.value * b.value, by_x, by_z, both)


def _on_all_columns(part: Derivatives, columns: Sequence[int] | None, d: int) -> Derivatives:
    """Derivatives in some columns as those in all d, 0 in the others."""
    if columns is None:
        return part
    places = torch.tensor(columns, device=part.value.device)

    def spread(value: Tensor, axis: int) -> Tensor:
        shape = list(value.shape)
        shape[axis] = d
        return value.new_zeros(shape).index_add(axis, places, value)

    both = None if part.by_both is None else spread(spread(part.by_both, -1), -2)
    return Derivatives(part.value, spread(part.by_x, -1), spread(part.by_z, -1), both)
