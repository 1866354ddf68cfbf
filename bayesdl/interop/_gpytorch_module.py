"""bayesdl kernels as gpytorch sees them: a module with raw parameters, constraints and priors."""

from __future__ import annotations

import math
from typing import Any

import gpytorch
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from torch import Tensor

from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.hyper import Parameter
from bayesdl.interop._gpytorch_priors import prior_to_gpytorch
from bayesdl.kernels import RBF, Bounded, Matern, Periodic, Product, RationalQuadratic, Scale, Sum
from bayesdl.kernels.base import Kernel, Params


class BayesdlKernel(gpytorch.kernels.Kernel):
    """A kernel of bayesdl as a gpytorch kernel, for any gpytorch or BoTorch model.

    Each hyper-parameter NAME of `kernel.parameters(d)` is a raw parameter raw_NAME (dots become underscores) of shape
    (*batch_shape, *shape), under a constraint with its bounds and with its prior. Positive ones are exponentials of the
    raw ones, as in bayesdl's own fits, which usually takes an optimiser fewer steps than gpytorch's softplus.

    Attributes:
        kernel: The covariance function.
        d: Number of columns that it sees, after `active_dims`.
    """

    has_lengthscale = False

    def __init__(
        self,
        kernel: Kernel,
        d: int,
        batch_shape: torch.Size | tuple[int, ...] = (),
        active_dims: tuple[int, ...] | None = None,
    ) -> None:
        if active_dims is not None and len(active_dims) != d:
            wanted = f"active_dims must name {d} columns."
            fail(SettingError, "to_gpytorch", wanted, got=f"{tuple(active_dims)}", fix=f"pass d={len(active_dims)}")
        super().__init__(batch_shape=torch.Size(batch_shape), active_dims=active_dims)
        self.kernel, self.d = kernel, d
        self._specs = kernel.parameters(d)
        for p in self._specs:
            self._register(p)

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> Tensor:
        """k(x1, x2) (*b, n, m), or its diagonal (*b, n)."""
        values = self.values
        if last_dim_is_batch:
            if self.d != 1:
                wanted = "last_dim_is_batch needs a kernel of one column."
                fix = "kernel.to_gpytorch(1), which then serves every column"
                fail(SettingError, "BayesdlKernel", wanted, got=f"a kernel of {self.d} columns", fix=fix)
            x1, x2 = (x.transpose(-1, -2).unsqueeze(-1) for x in (x1, x2))
            values = self._with_axis(values)
        if x1.shape[-1] != self.d:
            fix = f"kernel.to_gpytorch({x1.shape[-1]}), or active_dims"
            wanted = f"inputs must have {self.d} columns, for which this module was built."
            fail(ShapeError, "BayesdlKernel", wanted, got=f"{tuple(x1.shape)}", fix=fix)
        same = x1 is x2 or (not (x1.requires_grad or x2.requires_grad) and torch.equal(x1, x2))
        if diag:
            if same:
                return self.kernel.diagonal(x1, values)
            return self.kernel(x1.unsqueeze(-2), x2.unsqueeze(-2), self._with_axis(values))[..., 0, 0]
        return self.kernel(x1, None if same else x2, values)

    @property
    def is_stationary(self) -> bool:
        """Whether the covariance depends on differences of inputs alone, as far as the kernel's class tells."""
        return _is_stationary(self.kernel)

    @property
    def values(self) -> Params:
        """The hyper-parameters by the kernel's own names, each (*batch_shape, *shape)."""
        return {p.name: self._value(p) for p in self._specs}

    def set_values(self, values: Params) -> None:
        """Set hyper-parameters by the kernel's own names, for instance those of a fitted posterior."""
        for p in self._specs:
            if p.name in values:
                raw = _raw_name(p)
                value = torch.as_tensor(values[p.name]).to(getattr(self, raw))
                value = value.expand(getattr(self, raw).shape)
                self.initialize(**{raw: self._constraint(p).inverse_transform(value)})

    def _register(self, p: Parameter) -> None:
        raw, constraint = _raw_name(p), _constraint(p)
        like = torch.empty(0, dtype=torch.get_default_dtype())  # as gpytorch's own kernels; `.to(x)` changes it
        initial = p.initial_tensor(like).expand(self._batch_shape + p.shape)
        self.register_parameter(raw, torch.nn.Parameter(constraint.inverse_transform(initial).clone()))
        self.register_constraint(raw, constraint)
        if p.prior is not None:
            prior = prior_to_gpytorch(p.prior)
            self.register_prior(f"{raw.removeprefix('raw_')}_prior", prior, _Get(p), _Set(p))

    def _constraint(self, p: Parameter) -> Any:
        return getattr(self, f"{_raw_name(p)}_constraint")

    def _value(self, p: Parameter) -> Tensor:
        return self._constraint(p).transform(getattr(self, _raw_name(p)))

    def _with_axis(self, values: Params) -> Params:
        """Values with one more batch axis, behind those they have."""
        shapes = {p.name: len(p.shape) for p in self._specs}
        return {name: value.unsqueeze(value.ndim - shapes[name]) for name, value in values.items()}


class _Get:
    """The value that a prior is on; a class of its own, so that the module can be copied and pickled."""

    def __init__(self, p: Parameter) -> None:
        self._p = p

    def __call__(self, module: BayesdlKernel) -> Tensor:
        return module._value(self._p)


class _Set:
    """How a draw from a prior becomes the value."""

    def __init__(self, p: Parameter) -> None:
        self._p = p

    def __call__(self, module: BayesdlKernel, value: Tensor) -> None:
        module.set_values({self._p.name: value})


class _Free(Interval):
    """No bounds, and no transform."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.register_buffer("lower_bound", torch.tensor(-math.inf))
        self.register_buffer("upper_bound", torch.tensor(math.inf))
        self._transform = self._inv_transform = self._initial_value = None


def _is_stationary(kernel: Kernel) -> bool:
    if isinstance(kernel, (Scale, Bounded)):
        return _is_stationary(kernel.base)
    if isinstance(kernel, (Sum, Product)):
        return all(_is_stationary(part) for part in kernel.kernels)
    return isinstance(kernel, (RBF, Matern, RationalQuadratic, Periodic))


def _constraint(p: Parameter) -> Interval:
    if p.is_log:
        kind = Positive if p.lower == 0 else GreaterThan
        bound = {} if p.lower == 0 else {"lower_bound": p.lower}
        return kind(**bound, transform=torch.exp, inv_transform=torch.log)
    if p.lower == -math.inf and p.upper == math.inf:
        return _Free()
    if p.lower == -math.inf:
        return LessThan(p.upper)
    return Interval(p.lower, p.upper)


def _raw_name(p: Parameter) -> str:
    return f"raw_{p.name.replace('.', '_')}"
