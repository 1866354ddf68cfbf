"""A kernel whose hyper-parameters keep within bounds, or keep their initial values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.hyper import Parameter
from bayesdl.kernels.base import Functions, Kernel, Lead, Params, Pullback

Bounds = Mapping[str, float] | Iterable[tuple[str, float]]


@dataclass(frozen=True)
class Bounded(Kernel):
    """The covariance of `base`; what a fit may do to its hyper-parameters is narrower.

    Attributes:
        base: Any kernel.
        lower: Smallest values, by names as in `base.parameters(d)`, for instance {"lengthscale": 0.025}. A bound of a
            parameter with one value per column holds for each.
        upper: Largest values.
        fixed: Names of parameters that are not learned; they keep their initial values and leave `parameters`.

    Initial values must lie strictly between the bounds.
    """

    base: Kernel
    lower: Bounds = ()
    upper: Bounds = ()
    fixed: Iterable[str] = ()

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            given = getattr(self, name)
            pairs = given.items() if isinstance(given, Mapping) else given
            object.__setattr__(self, name, tuple((str(key), float(value)) for key, value in pairs))
        object.__setattr__(self, "fixed", (self.fixed,) if isinstance(self.fixed, str) else tuple(self.fixed))
        if not isinstance(self.base, Kernel):
            fix = "pass a kernel of bayesdl.kernels, or take one in with bayesdl.interop.gpytorch.from_gpytorch"
            fail(SettingError, "Bounded", "base must be a kernel of this package.", got=repr(self.base), fix=fix)

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """Those of the base that are not fixed, with these bounds."""
        found = self.base.parameters(d)
        names = [p.name for p in found]
        lower, upper = dict(self.lower), dict(self.upper)
        unknown = [name for name in (*lower, *upper, *self.fixed) if name not in names]
        if unknown:
            wanted = f"bounds and fixed must name parameters of {type(self.base).__name__}."
            fail(SettingError, "Bounded", wanted, got=f"{unknown}", fix=f"take names from {names}")
        free = (p for p in found if p.name not in self.fixed)
        return tuple(_narrowed(p, lower.get(p.name, -math.inf), upper.get(p.name, math.inf)) for p in free)

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """The base's, without the gradients of what is fixed."""
        params = self._resolved(x, params)
        value, pullback = self.base.value_and_pullback(x, self._whole(x.shape[-1], params, x))

        def free(p: Tensor) -> Params:
            return {name: grad for name, grad in pullback(p).items() if name in params}

        return value, free

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        return self.base._covariance(x, z, self._whole(x.shape[-1], params, x))

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        return self.base._variance(x, self._whole(x.shape[-1], params, x))

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        return self.base._features(lead, num_features, d, self._whole(d, params, _like(params, generator)), generator)

    def _draw_functions(
        self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator
    ) -> Functions:
        whole = self._whole(d, params, _like(params, generator))
        return self.base._draw_functions(lead, num_features, d, whole, generator)

    def _whole(self, d: int, params: Params, like: Tensor) -> Params:
        """The base's parameters: those that came, and the fixed ones at their initial values."""
        if not self.fixed:
            return params
        still = {p.name: p.initial_tensor(like) for p in self.base.parameters(d) if p.name in self.fixed}
        return {**params, **still}


def _like(params: Params, generator: torch.Generator) -> Tensor:
    for value in params.values():
        return value
    return torch.empty(0, dtype=torch.float64, device=generator.device)


def _narrowed(p: Parameter, lower: float, upper: float) -> Parameter:
    narrowed = replace(p, lower=max(p.lower, lower), upper=min(p.upper, upper))
    initial = p.initial_tensor(torch.empty(0, dtype=torch.float64))
    if not bool(((initial > narrowed.lower) & (initial < narrowed.upper)).all()):
        wanted = f"the initial {p.name} must lie strictly between {narrowed.lower} and {narrowed.upper}."
        fail(SettingError, "Bounded", wanted, got=str(initial.tolist()), fix=f"pass another initial {p.name}")
    return narrowed
