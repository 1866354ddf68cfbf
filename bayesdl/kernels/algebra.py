"""Kernels made of kernels: scaled, summed, multiplied. Their gradients are composed from those of their parts."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.hyper import LogNormal, Parameter
from bayesdl.kernels.base import Functions, Kernel, Lead, Params, Pullback, draw_uniform, get, reduce_to
from bayesdl.kernels.columns import PriorChoice, check_positive
from bayesdl.kernels.stationary import _Stationary, inner


def _part(params: Params, prefix: str) -> Params:
    """The hyper-parameters under `prefix.`, with the prefix taken off."""
    start = len(prefix) + 1
    return {name[start:]: value for name, value in params.items() if name.startswith(f"{prefix}.")}


@dataclass(frozen=True)
class Scale(Kernel):
    """outputscale * base(x, z); the outputscale is a variance.

    Attributes:
        base: The kernel that is scaled; its parameters appear as "base.NAME".
        outputscale: Initial value.
        outputscale_prior: A prior, None for a flat one, or "default": LogNormal(1, 1), whose mode is the variance 1 of
            standardised targets, with 95 % of its mass between 0.4 and 19.
    """

    base: Kernel
    outputscale: float = 1.0
    outputscale_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        _check_parts("Scale", (self.base,))
        check_positive("Scale", "outputscale", self.outputscale, False)

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`outputscale`, then those of the base."""
        prior = LogNormal(1.0, 1.0) if self.outputscale_prior == "default" else self.outputscale_prior
        own = Parameter("outputscale", (), self.outputscale, prior)
        return (own, *(parameter.prefixed("base") for parameter in self.base.parameters(d)))

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        return get(params, "outputscale", "Scale")[..., None, None] * self.base._covariance(x, z, _part(params, "base"))

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        return get(params, "outputscale", "Scale")[..., None] * self.base._variance(x, _part(params, "base"))

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """The base's, multiplied by the outputscale: d k / d(outputscale) is the base itself."""
        params = self._resolved(x, params)
        scale = get(params, "outputscale", "Scale").detach()
        base_params = _part(params, "base")
        after = scale.ndim == 0 or self._has_own_parameters(base_params, scale.shape, x.shape[-1])
        if after and isinstance(self.base, _Stationary):
            return self._absorbed(self.base, x, base_params, scale)
        base, pull_base = self.base.value_and_pullback(x, base_params)
        value = base * scale[..., None, None]

        def pullback(p: Tensor) -> Params:
            grads = {"outputscale": reduce_to(inner(p, base), scale.shape)}
            if after:
                for name, grad in pull_base(p).items():
                    grads[f"base.{name}"] = grad * scale.reshape(scale.shape + (1,) * (grad.ndim - scale.ndim))
            else:
                for name, grad in pull_base(reduce_to(p * scale[..., None, None], base.shape)).items():
                    grads[f"base.{name}"] = grad
            return grads

        return value, pullback

    def _absorbed(self, base: _Stationary, x: Tensor, params: Params, scale: Tensor) -> tuple[Tensor, Pullback]:
        """A stationary kernel takes the outputscale into its own pass."""
        value, pull = base.scaled_value_and_pullback(x, params, scale)

        def pullback(p: Tensor) -> Params:
            return {name if name == "outputscale" else f"base.{name}": grad for name, grad in pull(p).items()}

        return value, pullback

    def _has_own_parameters(self, base_params: Params, batch: torch.Size, d: int) -> bool:
        """Whether every scale meets base parameters of its own.

        Then it may multiply the results of the base's pullback, which is linear, instead of the larger p; where
        problems of different scales share a parameter, it may not.
        """
        shapes = {p.name: len(p.shape) for p in self.base.parameters(d)}
        return all(value.shape[: value.ndim - shapes[name]] == batch for name, value in base_params.items())

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        features = self.base._features(lead, num_features, d, _part(params, "base"), generator)
        root = params["outputscale"].sqrt()[..., None, None]
        return lambda x: root * features(x)

    def _draw_functions(
        self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator
    ) -> Functions:
        functions = self.base._draw_functions(lead, num_features, d, _part(params, "base"), generator)
        root = params["outputscale"].sqrt()[..., None]
        return lambda x: root * functions(x)


@dataclass(frozen=True)
class Sum(Kernel):
    """k_0 + k_1 + ...: the covariance of a sum of independent functions.

    Attributes:
        kernels: The parts; their parameters appear as "0.NAME", "1.NAME" and so on.
    """

    kernels: tuple[Kernel, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", _check_parts("Sum", self.kernels))

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """Those of the parts, in order."""
        return _numbered(self.kernels, d)

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        parts = [kernel._covariance(x, z, _part(params, str(i))) for i, kernel in enumerate(self.kernels)]
        return functools.reduce(operator.add, parts)

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        parts = [kernel._variance(x, _part(params, str(i))) for i, kernel in enumerate(self.kernels)]
        return functools.reduce(operator.add, parts)

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """Each part is pulled back through alone."""
        values, pullbacks = _parts(self.kernels, x, self._resolved(x, params))
        value = functools.reduce(operator.add, values)

        def pullback(p: Tensor) -> Params:
            grads: Params = {}
            last = len(pullbacks) - 1
            for i, pull in enumerate(pullbacks):
                own = p.clone() if i < last else p
                own = reduce_to(own, values[i].shape)
                grads.update({f"{i}.{name}": grad for name, grad in pull(own).items()})
            return grads

        return value, pullback

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        # Independent random signs make the cross terms vanish on average, so each feature stays unbiased.
        parts = []
        for i, kernel in enumerate(self.kernels):
            part = _part(params, str(i))
            features = kernel._features(lead, num_features, d, part, generator)
            parts.append((features, draw_uniform((*lead, 1, num_features), part, generator).sub_(0.5).sign()))

        def evaluate(x: Tensor) -> Tensor:
            values = []
            for features, sign in parts:
                phi = features(x)
                missing = phi.ndim - sign.ndim
                values.append(phi * sign.reshape(lead[0], *([1] * missing), *sign.shape[1:]))
            return functools.reduce(operator.add, values)

        return evaluate

    def _draw_functions(
        self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator
    ) -> Functions:
        parts = [
            kernel._draw_functions(lead, num_features, d, _part(params, str(i)), generator)
            for i, kernel in enumerate(self.kernels)
        ]
        return lambda x: functools.reduce(operator.add, [part(x) for part in parts])


@dataclass(frozen=True)
class Product(Kernel):
    """k_0 * k_1 * ...: the covariance of a product of independent functions.

    Attributes:
        kernels: The factors; their parameters appear as "0.NAME", "1.NAME" and so on.
    """

    kernels: tuple[Kernel, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", _check_parts("Product", self.kernels))

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """Those of the factors, in order."""
        return _numbered(self.kernels, d)

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        parts = [kernel._covariance(x, z, _part(params, str(i))) for i, kernel in enumerate(self.kernels)]
        return functools.reduce(operator.mul, parts)

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        parts = [kernel._variance(x, _part(params, str(i))) for i, kernel in enumerate(self.kernels)]
        return functools.reduce(operator.mul, parts)

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """Each factor is pulled back through with the product of the others as weight; no kernel is formed again."""
        values, pullbacks = _parts(self.kernels, x, self._resolved(x, params))
        value = functools.reduce(operator.mul, values)

        def pullback(p: Tensor) -> Params:
            grads: Params = {}
            for i, pull in enumerate(pullbacks):
                others = functools.reduce(operator.mul, values[:i] + values[i + 1 :], p)
                others = p.clone() if others is p else others
                grads.update({f"{i}.{name}": grad for name, grad in pull(reduce_to(others, values[i].shape)).items()})
            return grads

        return value, pullback

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        parts = [
            kernel._features(lead, num_features, d, _part(params, str(i)), generator)
            for i, kernel in enumerate(self.kernels)
        ]
        return lambda x: functools.reduce(operator.mul, [part(x) for part in parts])


def add(left: Kernel, right: Kernel) -> Sum:
    """`left + right`, with nested sums laid flat."""
    first = left.kernels if isinstance(left, Sum) else (left,)
    second = right.kernels if isinstance(right, Sum) else (right,)
    return Sum((*first, *second))


def multiply(left: Kernel, right: Kernel | float) -> Kernel:
    """`left * right`: a product with nested products laid flat, or a scaled kernel where `right` is a number."""
    if not isinstance(right, Kernel):
        return Scale(left, outputscale=float(right))
    first = left.kernels if isinstance(left, Product) else (left,)
    second = right.kernels if isinstance(right, Product) else (right,)
    return Product((*first, *second))


def _numbered(kernels: tuple[Kernel, ...], d: int) -> tuple[Parameter, ...]:
    return tuple(p.prefixed(str(i)) for i, kernel in enumerate(kernels) for p in kernel.parameters(d))


def _parts(kernels: tuple[Kernel, ...], x: Tensor, params: Params) -> tuple[list[Tensor], list[Pullback]]:
    pairs = [kernel.value_and_pullback(x, _part(params, str(i))) for i, kernel in enumerate(kernels)]
    return [value for value, _ in pairs], [pull for _, pull in pairs]


def _check_parts(where: str, kernels: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    if not isinstance(kernels, (tuple, list)) or len(kernels) == 0 or any(not isinstance(k, Kernel) for k in kernels):
        fail(
            SettingError,
            where,
            "every part must be a kernel of this package.",
            got=repr(kernels),
            fix="pass e.g. Sum((RBF(), Linear())), or wrap a kernel of another library first",
        )
    return tuple(kernels)
