r"""What a covariance function is: values, closed-form gradients, and functions drawn from the prior it defines.

    k(x, z) = Cov[f(x), f(z)],        f ~ GP(0, k)

A kernel is a frozen dataclass that holds settings only. The hyper-parameters travel apart from it, in a dict of
tensors, so that one kernel serves a single fit, a batch of fits and a set of posterior draws alike.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import DeviceError, DtypeError, SettingError, ShapeError, fail
from bayesdl.hyper import Parameter

Params = dict[str, Tensor]
Pullback = Callable[[Tensor], Params]
Functions = Callable[[Tensor], Tensor]
Lead = tuple[int, ...]


class Kernel(abc.ABC):
    """A covariance function with positive hyper-parameters.

    Throughout, `params` maps each name of `parameters(d)` to a tensor: (*b) for a scalar parameter, (*b d) for one with
    a value per dimension. The batch axes of parameters and inputs broadcast against each other. None stands for the
    initial values.

    A subclass provides `parameters`, `_covariance`, `_variance`, `value_and_pullback` and `_features`;
    `bayesdl.testing.check_kernel` tells whether they agree with each other. Where no closed form is at hand,
    `autograd_pullback` gives `value_and_pullback`.
    """

    @abc.abstractmethod
    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """The hyper-parameters for inputs of `d` columns, all positive, each with initial value and prior."""

    @abc.abstractmethod
    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """K = k(x, x), and the map from dL/dK to dL/dparams; neither carries an autograd graph.

        Args:
            x: (*b n d).
            params: Values of the hyper-parameters, or None for the initial ones.

        Returns:
            K (*b n n), and `pullback(p)`: from a symmetric p = dL/dK (*b n n), which it may overwrite, to
            dL/dparams[name] in the shape of params[name]. The pullback reads K: whoever changes K in between must
            restore it.
        """

    @abc.abstractmethod
    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        """(*b n m), differentiable; z None means z = x, with the diagonal of `_variance` exactly."""

    @abc.abstractmethod
    def _variance(self, x: Tensor, params: Params) -> Tensor:
        """k(x_i, x_i), shape (*b n), differentiable."""

    @abc.abstractmethod
    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        """Random features, drawn once, M of them for each function: phi(x (*b s d)) -> (F, *b, s, M).

        `lead` = (F, *p) holds the number of functions and the batch axes of the parameters: draw numbers for all of it.
        Every single feature must be unbiased, E[phi_m(x) phi_m(z)] = k(x, z): products of kernels multiply them.
        """

    def __call__(self, x: Tensor, z: Tensor | None = None, params: Params | None = None) -> Tensor:
        """Covariances between the rows of x and those of z, differentiable in x, z and params.

        Args:
            x: (*b n d).
            z: (*b m d), or None for z = x, where the diagonal is exact.
            params: Values of the hyper-parameters, or None for the initial ones.

        Returns:
            (*b n m), in the dtype and on the device of x.

        Raises:
            ShapeError, DtypeError, DeviceError: x, z and the kernel's own dimensions do not fit together.
            SettingError: `params` lacks a name.

        Cost: O(n m d) time, O(n m) memory.
        """
        self._check(x, z)
        return self._covariance(x, z, self._resolved(x, params))

    def diagonal(self, x: Tensor, params: Params | None = None) -> Tensor:
        """Prior variances k(x_i, x_i), shape (*b n), without forming the matrix."""
        self._check(x, None)
        return self._variance(x, self._resolved(x, params))

    def sample_functions(
        self, d: int, num_functions: int, num_features: int, params: Params | None, generator: torch.Generator
    ) -> Functions:
        r"""Draw functions from the prior GP(0, k), as sums of random features.

            f(x) = M^{-1/2} sum_m w_m phi_m(x),    w_m ~ N(0, 1)

        Every function has features of its own, so that E[f(x) f(z)] = k(x, z) holds for any number of features
        (for the NNGP up to O(depth / num_features)); a single function is Gaussian as num_features grows.

        Args:
            d: Number of input columns.
            num_functions: How many functions.
            num_features: Features of each, M.
            params: Hyper-parameters, or None for the initial ones; their batch axes become batch axes of the functions,
                which are independent along them.
            generator: Source of randomness, on the device where the functions will be evaluated.

        Returns:
            f with f(x (*b s d)) -> (num_functions, *b, s), differentiable in x; the same functions at every call.

        Raises:
            SettingError: `num_functions` or `num_features` is below 1.

        Reference: Rahimi, Recht (2007), "Random features for large-scale kernel machines".
        """
        if num_functions < 1 or num_features < 1:
            fail(
                SettingError,
                f"{type(self).__name__}.sample_functions",
                "num_functions and num_features must be at least 1.",
                got=f"num_functions {num_functions}, num_features {num_features}",
                fix="pass positive numbers",
            )
        if params is None:
            params = self._initial(d, torch.empty(0, dtype=torch.float64, device=generator.device))
        lead = (num_functions, *self._batch(d, params))
        return self._draw_functions(lead, num_features, d, params, generator)

    def to_gpytorch(self, d: int, *, batch_shape: Lead = (), active_dims: tuple[int, ...] | None = None) -> Any:
        """This kernel as a `gpytorch.kernels.Kernel` for inputs of `d` columns, with trainable hyper-parameters.

        It goes into any gpytorch or BoTorch model, for instance `SingleTaskGP(x, y, covar_module=...)`. Bounds and
        priors go with it.

        Args:
            d: Number of columns that the kernel sees.
            batch_shape: Independent hyper-parameters for each element, for instance (m,) for m outputs.
            active_dims: The d columns that it sees; None for all.
        """
        from bayesdl import _doors

        return _doors.kernel_to_gpytorch(self, d, batch_shape, active_dims)

    def __add__(self, other: Kernel) -> Kernel:
        """The covariance of the sum of two independent functions."""
        from bayesdl.kernels.algebra import add

        return add(self, other) if isinstance(other, Kernel) else NotImplemented

    def __mul__(self, other: Kernel | float) -> Kernel:
        """The covariance of the product of two independent functions; with a number, a scaled kernel."""
        from bayesdl.kernels.algebra import multiply

        return multiply(self, other) if isinstance(other, (Kernel, float, int)) else NotImplemented

    def __rmul__(self, other: float) -> Kernel:
        """`2.0 * kernel`: the kernel with an outputscale that starts at 2."""
        return self.__mul__(other)

    def _draw_functions(
        self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator
    ) -> Functions:
        """Weighted features; a kernel that is made of others may draw functions from those instead."""
        features = self._features(lead, num_features, d, params, generator)
        weights = draw_normal((*lead, num_features), params, generator) / num_features**0.5

        def evaluate(x: Tensor) -> Tensor:
            phi = features(x)
            missing = phi.ndim - 1 - weights.ndim
            w = weights.reshape(lead[0], *([1] * missing), *weights.shape[1:])
            return (phi @ w.unsqueeze(-1)).squeeze(-1)

        return evaluate

    def _check(self, x: Tensor, z: Tensor | None) -> None:
        name = type(self).__name__
        if x.ndim < 2 or x.shape[-1] == 0:
            fail(
                ShapeError,
                name,
                "x must have shape (*b, n, d) with d >= 1.",
                got=str(tuple(x.shape)),
                fix="pass x[:, None] for a single input column",
            )
        if not x.is_floating_point():
            fail(DtypeError, name, "x must be of a floating dtype.", got=str(x.dtype), fix="pass x.double()")
        if z is None:
            return
        if z.ndim < 2 or z.shape[-1] != x.shape[-1]:
            fail(
                ShapeError,
                name,
                f"z must have shape (*b, m, {x.shape[-1]}), the columns of x.",
                got=f"x {tuple(x.shape)}, z {tuple(z.shape)}",
                fix="pass inputs with the same number of columns",
            )
        if z.dtype != x.dtype:
            fail(DtypeError, name, "x and z must share a dtype.", got=f"x {x.dtype}, z {z.dtype}", fix="pass z.to(x)")
        if z.device != x.device:
            fail(
                DeviceError, name, "x and z must lie on one device.", got=f"{x.device}, {z.device}", fix="pass z.to(x)"
            )

    def _resolved(self, x: Tensor, params: Params | None) -> Params:
        return self._initial(x.shape[-1], x) if params is None else params

    def _initial(self, d: int, like: Tensor) -> Params:
        return {parameter.name: parameter.initial_tensor(like) for parameter in self.parameters(d)}

    def _batch(self, d: int, params: Params) -> torch.Size:
        """The batch axes that the hyper-parameters have between them."""
        values = [(get(params, p.name, type(self).__name__), len(p.shape)) for p in self.parameters(d)]
        return torch.broadcast_shapes(*(value.shape[: value.ndim - events] for value, events in values))


def autograd_pullback(kernel: Kernel, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
    """`value_and_pullback` of any kernel by autograd through its `__call__`: slower, and right by construction."""
    params = kernel._resolved(x, params)
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        value = kernel(x.detach(), None, leaves)

    def pullback(p: Tensor) -> Params:
        grads = torch.autograd.grad(value, list(leaves.values()), p, allow_unused=True, retain_graph=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }

    return value.detach(), pullback


def get(params: Params, name: str, where: str) -> Tensor:
    """The value of one hyper-parameter, or an error that lists what came instead."""
    try:
        return params[name]
    except KeyError:
        fail(
            SettingError,
            where,
            f"params must hold {name!r}.",
            got=f"{sorted(params)}",
            fix="take the names from kernel.parameters(d)",
        )


def per_row(value: Tensor, per_dimension: bool) -> Tensor:
    """A hyper-parameter (*b) or (*b d) with axes inserted so that it broadcasts against x (*b n d)."""
    if value.ndim == per_dimension:
        return value
    return value.unsqueeze(-2) if per_dimension else value[..., None, None]


def align(value: Tensor, num_event: int, x: Tensor) -> Tensor:
    """Random numbers (F, *p, *event) with axes inserted after F, so that *p lines up with the batch axes of x."""
    missing = (x.ndim - 2) - (value.ndim - 1 - num_event)
    return value.reshape(value.shape[0], *([1] * max(missing, 0)), *value.shape[1:])


def reduce_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient summed over the axes along which its parameter was broadcast."""
    return grad if grad.shape == shape else grad.sum_to_size(shape)


def draw_normal(shape: tuple[int, ...], params: Params, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the dtype of the hyper-parameters, on the device of the generator."""
    like = next(iter(params.values()))
    return torch.randn(shape, dtype=like.dtype, device=generator.device, generator=generator)


def draw_uniform(shape: tuple[int, ...], params: Params, generator: torch.Generator) -> Tensor:
    """Uniform numbers on [0, 1) in the dtype of the hyper-parameters, on the device of the generator."""
    like = next(iter(params.values()))
    return torch.rand(shape, dtype=like.dtype, device=generator.device, generator=generator)
