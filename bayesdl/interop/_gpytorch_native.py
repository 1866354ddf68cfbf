"""gpytorch kernels whose mathematics we have ourselves: the same covariance, with closed-form gradients and functions.

A conversion is exact or does not take place: values, bounds, priors and what is learned all carry over, or the kernel
is evaluated by its own code. Composites convert part by part.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import gpytorch
import torch

from bayesdl.hyper import Parameter
from bayesdl.interop._gpytorch_wrapped import Bare, GpytorchKernel
from bayesdl.kernels import RBF, Bounded, Kernel, Linear, Matern, Periodic, Product, RationalQuadratic, Scale, Sum

_Columns = tuple[int, ...] | None

# Their class, ours, and which of their parameters is which of ours.
_NATIVE: dict[type, tuple[type[Kernel], dict[str, str]]] = {
    gpytorch.kernels.RBFKernel: (RBF, {"lengthscale": "lengthscale"}),
    gpytorch.kernels.MaternKernel: (Matern, {"lengthscale": "lengthscale"}),
    gpytorch.kernels.RQKernel: (RationalQuadratic, {"lengthscale": "lengthscale", "alpha": "alpha"}),
    gpytorch.kernels.PeriodicKernel: (Periodic, {"period_length": "period", "lengthscale": "lengthscale"}),
    gpytorch.kernels.LinearKernel: (Linear, {"variance": "variance"}),
}


def convert(kernel: gpytorch.kernels.Kernel) -> Kernel:
    """A native kernel where every setting of `kernel` maps, composites part by part; else a `GpytorchKernel`."""
    columns = None if kernel.active_dims is None else tuple(kernel.active_dims.tolist())
    return _convert(kernel, columns) or GpytorchKernel(kernel)


def _convert(kernel: Any, columns: _Columns) -> Kernel | None:
    """The native kernel for `kernel` on these columns, which take the place of its own active_dims."""
    kind = type(kernel)
    if len(kernel.batch_shape) > 0:
        return None
    if kind is gpytorch.kernels.ScaleKernel:
        # gpytorch's ScaleKernel selects the columns itself and passes over its base's active_dims
        base = _convert(kernel.base_kernel, columns)
        if base is None and columns is None:
            base = GpytorchKernel(kernel.base_kernel)
        found = None if base is None else _found(kernel, {"outputscale": "outputscale"})
        return None if found is None else _bounded(Scale(base, **_settings(found.specs, False)), found)
    if kind in (gpytorch.kernels.AdditiveKernel, gpytorch.kernels.ProductKernel) and columns is None:
        parts = tuple(convert(part) for part in kernel.kernels)
        return Sum(parts) if kind is gpytorch.kernels.AdditiveKernel else Product(parts)
    if kind not in _NATIVE:
        return None
    make, names = _NATIVE[kind]
    found = _found(kernel, names)
    if found is None:
        return None
    ard = kernel.ard_num_dims is not None
    settings = {**_settings(found.specs, ard), "ard": ard, "active_dims": columns}
    if make is Matern:
        settings["nu"] = kernel.nu
    return _bounded(make(**settings), found)


class _Found(NamedTuple):
    """The kernel's own parameters by our names, and which of them are not learned."""

    specs: dict[str, Parameter]
    fixed: list[str]


def _found(kernel: Any, names: dict[str, str]) -> _Found | None:
    """What the kernel has; None where our kernels have no such bound or prior."""
    bare = Bare("from_gpytorch", kernel)
    specs = {ours: bare.everything[theirs] for theirs, ours in names.items()}
    for p in specs.values():
        plain = p.prior is None or type(p.prior).__module__ == "bayesdl.hyper"
        value = p.initial_tensor(torch.empty(0, dtype=torch.float64))
        # L-BFGS of other libraries may leave a parameter on its bound, from where ours could not start
        inside = bool(((value > p.lower) & (value < p.upper)).all())
        if not plain or not inside or p.lower < 0:
            return None
    return _Found(specs, [ours for theirs, ours in names.items() if theirs not in bare.learned])


def _settings(specs: dict[str, Parameter], ard: bool) -> dict[str, Any]:
    """Initial values and priors in the words of our kernels."""
    settings: dict[str, Any] = {}
    for name, p in specs.items():
        value = p.initial_tensor(torch.empty(0, dtype=torch.float64)).reshape(-1).tolist()
        settings[name] = tuple(value) if ard and name != "alpha" else value[0]
        settings[f"{name}_prior"] = p.prior
    return settings


def _bounded(native: Kernel, found: _Found) -> Kernel:
    """`native` with the bounds of the constraints, and with what does not require gradients fixed."""
    lower = {name: p.lower for name, p in found.specs.items() if p.lower > 0}
    upper = {name: p.upper for name, p in found.specs.items() if p.upper < math.inf}
    return Bounded(native, lower, upper, found.fixed) if lower or upper or found.fixed else native
