"""gpytorch both ways: its kernels and means in our models, our kernels in its models, and structured operators.

`bdl.GP(kernel)` takes a gpytorch kernel as it is, and `kernel.to_gpytorch(d)` gives one; the functions here are what
they call, and more.
"""

from __future__ import annotations

from typing import Any

import gpytorch
import torch

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.interop._gpytorch_grids import as_linear_operator, kronecker, toeplitz
from bayesdl.interop._gpytorch_module import BayesdlKernel
from bayesdl.interop._gpytorch_native import convert
from bayesdl.interop._gpytorch_wrapped import GpytorchKernel, GpytorchMean
from bayesdl.kernels.base import Kernel

__all__ = [
    "BayesdlKernel",
    "GpytorchKernel",
    "GpytorchMean",
    "as_linear_operator",
    "from_gpytorch",
    "is_kernel",
    "is_mean",
    "kronecker",
    "mean_from_gpytorch",
    "to_gpytorch",
    "toeplitz",
]


def from_gpytorch(kernel: gpytorch.kernels.Kernel, *, native: bool = True) -> Kernel:
    """A gpytorch kernel as a kernel of ours, with its present values as initial ones.

    Values, constraints (Positive, GreaterThan, LessThan, Interval), registered priors and `requires_grad` carry over.
    RBF, Matern, rational quadratic, periodic and linear kernels and scaled, summed or multiplied ones become native
    kernels where every setting maps: closed-form gradients, random functions, files. Every other kernel, be it of a
    class of your own or on top of a network, is evaluated by its own code and differentiated by autograd, once for each
    set of hyper-parameters; it is asked in eval mode. Such a kernel draws functions only where it is spectral mixture,
    polynomial or constant, and a file that holds it is read with `bdl.load(path, module=kernel)`.

    Args:
        kernel: The kernel, without batch shape. It is copied and never changed.
        native: False evaluates every kernel by its own code.

    Raises:
        SettingError: A batch shape, several outputs, a prior on a function of parameters, a constraint with different
            bounds for the elements of one parameter.
    """
    if not is_kernel(kernel):
        wanted = "kernel must be a kernel of gpytorch."
        fail(SettingError, "from_gpytorch", wanted, got=_checks.describe(kernel), fix="gpytorch.kernels.RBFKernel()")
    return convert(kernel) if native else GpytorchKernel(kernel)


def mean_from_gpytorch(mean: gpytorch.means.Mean) -> Any:
    """A gpytorch mean as `bdl.GP` takes it: "zero" and "constant" where it is no more than that, else `GpytorchMean`.

    It acts on inputs and gives targets as engines see them: standardised, unless standardize=False.
    """
    if type(mean) is gpytorch.means.ZeroMean:
        return "zero"
    if type(mean) is gpytorch.means.ConstantMean and len(mean.batch_shape) == 0:
        plain = not mean._priors and not hasattr(mean, "raw_constant_constraint") and mean.raw_constant.requires_grad
        if plain and float(mean.raw_constant.detach()) == 0:
            return "constant"
    return GpytorchMean(mean)


def to_gpytorch(
    kernel: Kernel,
    d: int,
    *,
    batch_shape: torch.Size | tuple[int, ...] = (),
    active_dims: tuple[int, ...] | None = None,
) -> BayesdlKernel:
    """A kernel of ours as a gpytorch kernel, with trainable hyper-parameters, their bounds and their priors.

    Args:
        kernel: Any kernel.
        d: Number of input columns that it sees.
        batch_shape: As for any gpytorch kernel: independent hyper-parameters for each element, for instance (m,) in a
            BoTorch `SingleTaskGP` of m outputs.
        active_dims: The d columns that it sees; None for all.

    The amplitude is the kernel's own: use `Scale(...)` or gpytorch's ScaleKernel, not both.
    """
    if not isinstance(kernel, Kernel):
        wanted = "kernel must be a kernel of bayesdl."
        fail(SettingError, "to_gpytorch", wanted, got=_checks.describe(kernel), fix="bdl.kernels.Matern(nu=2.5)")
    _checks.at_least("to_gpytorch", "d", d, 1, integer=True)
    return BayesdlKernel(kernel, d, batch_shape, active_dims)


def is_kernel(value: Any) -> bool:
    """Whether `value` is a gpytorch kernel."""
    return isinstance(value, gpytorch.kernels.Kernel)


def is_mean(value: Any) -> bool:
    """Whether `value` is a gpytorch mean."""
    return isinstance(value, gpytorch.means.Mean)
