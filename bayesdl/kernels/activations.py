"""Activations of networks: by name where the dual map has a closed form, by a Hermite series where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.hyper import Parameter
from bayesdl.kernels.covariances import Covariances
from bayesdl.kernels.layers import Forward, Layer, Pen, Scales, Signal
from bayesdl.ops.dual import Dual, Erf, Exponential, Gelu, Rectifier, Step
from bayesdl.ops.dual_series import Series, is_kinked

_CLOSED: dict[str, tuple[Callable[[Tensor], Tensor], Dual]] = {
    "relu": (torch.relu, Rectifier()),
    "abs": (torch.abs, Rectifier(-1.0, 1.0)),
    "identity": (lambda x: x, Rectifier(1.0, 1.0)),
    "step": (lambda x: (x > 0).to(x.dtype), Step()),
    "erf": (torch.erf, Erf()),
    "probit": (torch.special.ndtr, Erf(0.5, 0.5, math.sqrt(2))),
    "gelu": (nn.functional.gelu, Gelu()),
    "sin": (torch.sin, Exponential(0.5, -0.5, -1.0)),
    "cos": (torch.cos, Exponential(0.5, 0.5, -1.0)),
    "shifted_sin": (lambda x: math.sqrt(2) * torch.sin(x + math.pi / 4), Exponential(1.0, 0.0, -1.0)),
    "exp": (torch.exp, Exponential(1.0, 0.0, 1.0)),
}
_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "mish": nn.functional.mish,
}
NAMES = (*_CLOSED, "leaky_relu", *_SMOOTH)


@dataclass(frozen=True)
class Activation(Layer):
    """An elementwise nonlinearity.

    Attributes:
        function: A name, or any smooth function of a tensor. Names with a closed form: "relu", "leaky_relu", "abs",
            "identity", "step", "erf", "probit" (the normal distribution function), "gelu" (the exact one), "sin",
            "cos", "shifted_sin" (sqrt 2 sin(x + pi / 4)) and "exp". "tanh", "sigmoid", "silu", "softplus", "mish", and
            functions of your own go by a Hermite series. Functions with a kink are refused: a series converges
            too slowly for them. A kernel with a function of your own cannot be saved.
        negative_slope: Slope of "leaky_relu" below 0.
        degree: Number of terms of the series. The error is below the share of the variance that the terms miss: 2e-7
            for tanh of standard normal inputs, more where the weights are large.
    """

    function: str | Callable[[Tensor], Tensor] = "relu"
    negative_slope: float = 0.01
    degree: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.negative_slope, bool) or not math.isfinite(self.negative_slope):
            wanted, fix = "negative_slope must be a finite number.", "pass 0.01, say"
            fail(SettingError, "Activation", wanted, got=repr(self.negative_slope), fix=fix)
        _checks.at_least("Activation", "degree", self.degree, 4, integer=True)
        if isinstance(self.function, str):
            _checks.choice("Activation", "activation", self.function, NAMES)
        else:
            _check_function(self.function)
        if self.degree > 128:
            fail(SettingError, "Activation", "degree must be at most 128.", got=repr(self.degree), fix="pass 64")

    @property
    def dual(self) -> Dual:
        """Its dual map."""
        if self.function == "leaky_relu":
            return Rectifier(self.negative_slope, 1.0)
        if isinstance(self.function, str) and self.function in _CLOSED:
            return _CLOSED[self.function][1]
        return Series(self.value, self.degree)

    def value(self, h: Tensor) -> Tensor:
        """phi(h), elementwise."""
        if self.function == "leaky_relu":
            return nn.functional.leaky_relu(h, self.negative_slope)
        if isinstance(self.function, str):
            return (_CLOSED[self.function][0] if self.function in _CLOSED else _SMOOTH[self.function])(h)
        return self.function(h)

    def follow(self, signal: Signal) -> Signal:
        """No longer Gaussian."""
        if not signal.gaussian:
            fix = "put Dense() or Conv() before each Activation"
            got = "the data itself" if signal.raw else "a signal that is not Gaussian"
            fail(SettingError, "Activation", "an activation acts on a layer of weights.", got=got, fix=fix)
        return signal._replace(gaussian=False)

    def parameters(self, path: str) -> tuple[Parameter, ...]:
        """None."""
        return ()

    def shared(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def propagate(self, k: Covariances, scales: Scales, path: str) -> Covariances:
        """F(k), and the tangent kernel times dF/dr."""
        return k.through_activation(self.dual)

    def draw(self, signal: Signal, width: int, pen: Pen, scales: Scales, path: str) -> tuple[Forward, Signal]:
        """The function itself."""
        return lambda h, weights, num_batch: self.value(h), self.follow(signal)


def _check_function(function: Callable[[Tensor], Tensor]) -> None:
    names = ", ".join(repr(name) for name in NAMES)
    if not callable(function) or isinstance(function, nn.Module):
        wanted = "activation must be a name or a function of a tensor."
        fail(SettingError, "Activation", wanted, got=repr(function)[:80], fix=f"pass one of {names}, or torch.tanh")
    probe = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    try:
        value = function(probe)
        fits = isinstance(value, Tensor) and value.shape == probe.shape and bool(value.isfinite().all())
    except Exception as error:
        fits, value = False, error
    if not fits:
        wanted = "activation must map a float64 tensor to one of the same shape, with finite values."
        fail(SettingError, "Activation", wanted, got=str(value)[:80], fix=f"pass one of {names}, or torch.tanh")
    if is_kinked(function):
        wanted = "activation has a kink, or bends too sharply for a series of Hermite polynomials."
        got = getattr(function, "__name__", repr(function))[:80]
        fix = "pass a name with a closed form ('relu', 'leaky_relu', 'abs', 'step'), or a smoother function"
        fail(SettingError, "Activation", wanted, got=got, fix=fix)
