"""gpytorch kernels and means as bayesdl sees them: settings apart from hyper-parameters.

A module is copied, its constraints are taken off, and it is then evaluated at constrained values that are handed in
(`torch.func.functional_call`). Gradients come from autograd. Where hyper-parameters have batch axes, the module is
called once for each of their elements, since a module of the user's own need not know about batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import gpytorch
import torch
from linear_operator import to_dense
from torch import Tensor, nn

from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.hyper import HyperPrior, Parameter
from bayesdl.interop._gpytorch_priors import prior_from_gpytorch
from bayesdl.kernels.base import (
    Functions,
    Kernel,
    Lead,
    Params,
    Pullback,
    align,
    autograd_pullback,
    draw_normal,
    draw_uniform,
    get,
)


@dataclass(frozen=True, eq=False)
class GpytorchKernel(Kernel):
    """A gpytorch kernel, evaluated by its own code.

    Its hyper-parameters keep gpytorch's names, without "raw_", and gpytorch's shapes; they move between the bounds of
    their constraints, under the priors registered for them. Parameters that do not require gradients are not learned.
    Functions can be drawn for spectral mixture, polynomial and constant kernels only.

    Attributes:
        module: The kernel; a copy is kept.
    """

    module: gpytorch.kernels.Kernel

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", _copied("GpytorchKernel", "kernel", self.module, gpytorch.kernels.Kernel))
        object.__setattr__(self, "_bare", Bare("GpytorchKernel", self.module))
        object.__setattr__(self, "_widths", set())

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """The trainable parameters of the module."""
        self._check_width(d)
        return self._bare.parameters

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """By autograd."""
        if not self._bare.parameters:
            return self(x, None, {}).detach(), lambda p: {}
        return autograd_pullback(self, x, params)

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        def evaluate(own: Params, x: Tensor, z: Tensor) -> Tensor:
            same = x is z
            value = self._bare(own, x, x, z)
            # What rounding leaves on the diagonal, a kernel with a kink there would magnify.
            return torch.diagonal_scatter(value, self._bare(own, x, x, x, diag=True), 0, -2, -1) if same else value

        return self._bare.each(evaluate, params, x, x if z is None else z)

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        return self._bare.each(lambda own, x: self._bare(own, x, x, x, diag=True), params, x)

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        draw = _FEATURES.get(type(self.module))
        if draw is None:
            raise NotImplementedError(
                f"functions cannot be drawn from the prior of gpytorch's {type(self.module).__name__}, which has no "
                "random features.\n  fix  posterior.sample(x) draws exactly at given points; kernels of "
                "bayesdl.kernels draw functions"
            )
        active = self.module.active_dims
        width = d if active is None else len(active)
        features = draw(self.module, lead, num_features, width, params, generator)
        return features if active is None else lambda x: features(x.index_select(-1, active.to(x.device)))

    def _check_width(self, d: int) -> None:
        """Ask the module for a covariance of two points with d columns; it is the only one who knows."""
        if d in self._widths:
            return
        x = torch.arange(2.0 * d, dtype=torch.float64).reshape(2, d) / (2 * d)
        name = type(self.module).__name__
        fix = "build the kernel for that many columns (ard_num_dims, active_dims, width of the first layer)"
        try:
            with torch.random.fork_rng(devices=[]):
                before = torch.get_rng_state()
                shape = self._bare(self._initial_values(x), x, x, x).shape
                drew = not torch.equal(before, torch.get_rng_state())
        except (RuntimeError, IndexError, ValueError) as error:
            fail(ShapeError, "GP", f"gpytorch's {name} must take inputs of {d} columns.", got=str(error), fix=fix)
        if shape != (2, 2):
            wanted = f"gpytorch's {name} must give one function."
            fix = "use one kernel for each output; kernels of derivatives and of several tasks have no place here"
            fail(SettingError, "GP", wanted, got=f"a covariance of shape {tuple(shape)} for two points", fix=fix)
        if drew:
            wanted = f"gpytorch's {name} must not draw random numbers when it is evaluated."
            fix = "let it draw when it is built, as RFFKernel(num_samples, num_dims) does"
            fail(SettingError, "GP", wanted, got="a change of the global random state", fix=fix)
        self._widths.add(d)

    def _initial_values(self, like: Tensor) -> Params:
        return {p.name: p.initial_tensor(like) for p in self._bare.parameters}


@dataclass(frozen=True, eq=False)
class GpytorchMean:
    """A gpytorch mean, evaluated by its own code; its hyper-parameters as those of `GpytorchKernel`.

    Attributes:
        module: The mean; a copy is kept.
    """

    module: gpytorch.means.Mean

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", _copied("GpytorchMean", "mean", self.module, gpytorch.means.Mean))
        object.__setattr__(self, "_bare", Bare("GpytorchMean", self.module))

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """The trainable parameters of the module."""
        x = torch.zeros(2, d, dtype=torch.float64)
        name = type(self.module).__name__
        try:
            shape = self(x).shape
        except (RuntimeError, IndexError, ValueError) as error:
            fix = "build the mean for that many columns"
            fail(ShapeError, "GP", f"gpytorch's {name} must take inputs of {d} columns.", got=str(error), fix=fix)
        if shape != (2,):
            wanted = f"gpytorch's {name} must give one value for each point."
            fail(SettingError, "GP", wanted, got=f"shape {tuple(shape)} for two points", fix="use a mean of one output")
        return self._bare.parameters

    def __call__(self, x: Tensor, params: Params | None = None) -> Tensor:
        """m(x), from x (*b n d) to (*b n), differentiable in x and params."""
        if params is None:
            params = {p.name: p.initial_tensor(x) for p in self._bare.parameters}
        return self._bare.each(lambda own, x: self._bare(own, x, x).expand(x.shape[:-1]), params, x)

    def pullback(self, x: Tensor, params: Params, p: Tensor) -> Params:
        """From p = dL/dm (*b n) to dL/dparams[name], by autograd."""
        if not params:
            return {}
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        with torch.enable_grad():
            value = self(x.detach(), leaves)
        if not value.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        grads = torch.autograd.grad(value, list(leaves.values()), p.expand_as(value), allow_unused=True)
        named = zip(leaves.items(), grads, strict=True)
        return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in named}


class Bare:
    """A copy of a module without its constraints, evaluated at parameters that are handed in."""

    def __init__(self, where: str, module: nn.Module) -> None:
        bare = deepcopy(module).eval()
        bare.requires_grad_(True)
        learned = {name for name, value in module.named_parameters() if value.requires_grad}
        bounds = {}
        for name, raw, constraint in list(bare.named_parameters_and_constraints()):
            bounds[name] = _take_off(where, name, raw, constraint)
        names = {id(value): name for name, value in bare.named_parameters()}
        priors: dict[str, HyperPrior] = {}
        for name, parent, prior, closure, _ in bare.named_priors():
            on = names.get(id(closure(parent)))  # without constraints, the value that a prior sees is the parameter
            if on is None or on in priors:
                wanted = "a prior must be on one parameter itself, and each parameter may have one."
                fix = "register it for a parameter by name: module.register_prior(name, prior, parameter)"
                fail(SettingError, where, wanted, got=f"{name}: {type(prior).__name__}", fix=fix)
            priors[on] = prior_from_gpytorch(prior, dict(bare.named_parameters())[on])
        self.everything = {
            _public(name): Parameter(_public(name), tuple(value.shape), _nested(value), priors.get(name), *bounds[name])
            for name, value in bare.named_parameters()
        }
        self.learned = {_public(name) for name in learned}
        self.parameters = tuple(p for name, p in self.everything.items() if name in self.learned)
        self._raw = {_public(name): f"inner.{name}" for name in learned}
        self._where, self._call = where, _Call(bare)
        self._still = {
            f"inner.{name}": value.detach()
            for name, value in itertools.chain(bare.named_parameters(), bare.named_buffers())
            if name not in learned
        }

    def __call__(self, params: Params, like: Tensor, *inputs: Tensor, diag: bool = False) -> Tensor:
        """The module at `inputs` and at parameters without batch axes, in the dtype and on the device of `like`."""
        values = {self._raw[p.name]: get(params, p.name, self._where) for p in self.parameters}
        for name, value in self._still.items():
            values[name] = value.to(like) if value.is_floating_point() else value.to(like.device)
        return torch.func.functional_call(self._call, values, inputs, {"diag": diag})

    def each(self, evaluate: Callable[..., Tensor], params: Params, *inputs: Tensor) -> Tensor:
        """`evaluate(params, *inputs)` for every batch element of the parameters.

        Axes in front of theirs, and axes of parameters that have none, are left to the module.
        """
        values = {p.name: (get(params, p.name, self._where), len(p.shape)) for p in self.parameters}
        batch = torch.broadcast_shapes(*(value.shape[: value.ndim - event] for value, event in values.values()))
        x, z = inputs[0], inputs[-1]
        if x.shape[-2] == 0 or z.shape[-2] == 0 or 0 in batch:
            shape = torch.broadcast_shapes(batch, *(v.shape[:-2] for v in inputs)) + tuple(v.shape[-2] for v in inputs)
            return x.new_zeros(shape) + sum(0.0 * value.sum() for value, _ in values.values())
        if len(batch) == 0:
            return evaluate({name: value for name, (value, _) in values.items()}, *inputs)
        lead = torch.broadcast_shapes(batch, *(v.shape[:-2] for v in inputs))
        own = lead[len(lead) - len(batch) :]
        if math.prod(batch) == 1:
            own = batch
        flat = {
            name: value.expand(*own, *value.shape[value.ndim - event :]).reshape(-1, *value.shape[value.ndim - event :])
            for name, (value, event) in values.items()
        }
        if math.prod(own) == 1:
            result = evaluate({name: value[0] for name, value in flat.items()}, *inputs)
            event = len(inputs)
            return result.expand(*lead, *result.shape[result.ndim - event :])
        shared = len({id(v) for v in inputs}) == 1
        wide = [v.expand(*lead, *v.shape[-2:]) for v in inputs]
        front = (slice(None),) * (len(lead) - len(own))
        results = []
        for i, index in enumerate(itertools.product(*(range(size) for size in own))):
            rows = [v[(*front, *index)] for v in wide]
            rows = rows[:1] * len(rows) if shared else rows
            results.append(evaluate({name: value[i] for name, value in flat.items()}, *rows))
        stacked = torch.stack(results, len(front))
        return stacked.unflatten(len(front), tuple(own))


class _Call(nn.Module):
    """What `functional_call` calls: everything lazy is evaluated before the handed-in parameters are gone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor, diag: bool = False) -> Tensor:
        with _plainly(self.inner):
            return to_dense(self.inner(*inputs, diag=True) if diag else self.inner(*inputs))


@contextmanager
def _plainly(module: nn.Module) -> Iterator[None]:
    """No lazy evaluation, no approximate decompositions, and no caches from earlier parameters."""
    caching = [part for part in module.modules() if hasattr(part, "_clear_cache")]
    for part in caching:
        part._clear_cache()
    try:
        with (
            gpytorch.settings.lazily_evaluate_kernels(False),
            gpytorch.settings.fast_computations(False, False, False),
        ):
            yield
    finally:
        for part in caching:
            part._clear_cache()


def _copied(where: str, what: str, module: Any, kind: type[nn.Module]) -> Any:
    if not isinstance(module, kind):
        wanted = f"module must be a {what} of gpytorch."
        fail(SettingError, where, wanted, got=type(module).__name__, fix=f"pass an instance of {kind.__name__}")
    batch = getattr(module, "batch_shape", torch.Size())
    if len(batch) > 0:
        wanted = f"the {what} must have no batch shape: engines give every data set and output its own parameters."
        fail(
            SettingError, where, wanted, got=f"batch_shape {tuple(batch)}", fix=f"build the {what} without batch_shape"
        )
    return deepcopy(module)


def _take_off(where: str, name: str, raw: nn.Parameter, constraint: Any) -> tuple[float, float]:
    """Put the constrained value in place of the raw one, make the constraint's transform the identity; the bounds."""
    if constraint is None:
        return -math.inf, math.inf
    with torch.no_grad():
        raw.copy_(constraint.transform(raw))
    constraint._transform = None
    bounds = []
    for end in ("lower_bound", "upper_bound"):
        bound = getattr(constraint, end, torch.tensor(math.nan))
        if not bool((bound == bound.reshape(-1)[0]).all()) or constraint.transform(raw) is not raw:
            wanted = f"the constraint on {name} must be an Interval with one bound for all elements."
            fix = "use Positive(), GreaterThan(number), LessThan(number) or Interval(number, number)"
            fail(SettingError, where, wanted, got=repr(constraint), fix=fix)
        bounds.append(float(bound.reshape(-1)[0]))
    return bounds[0], bounds[1]


def _public(name: str) -> str:
    head, _, last = name.rpartition(".")
    last = last.removeprefix("raw_")
    return f"{head}.{last}" if head else last


def _nested(value: Tensor) -> Any:
    def frozen(items: Any) -> Any:
        return tuple(frozen(item) for item in items) if isinstance(items, list) else items

    return frozen(value.detach().to(torch.float64).tolist())


def _spectral_mixture(
    module: Any, lead: Lead, num_features: int, width: int, params: Params, generator: torch.Generator
) -> Functions:
    """Frequencies of prod_k sum_q w_q exp(-2 pi^2 scale_qk^2 t_k^2) cos(2 pi mean_qk t_k), t = x - z.

    gpytorch multiplies over the columns what it has summed over the components, so that each column draws a component
    of its own, q with probability w_q / sum w, and then a frequency of either sign.
    """
    weights = params["mixture_weights"].to(generator.device)
    edges = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)[..., None, None, :]
    shape = (*lead, num_features, width)
    chosen = (draw_uniform(shape, params, generator).unsqueeze(-1) > edges).sum(-1).clamp_max(weights.shape[-1] - 1)

    def at_component(name: str) -> Tensor:
        return params[name].squeeze(-2).expand(*lead, -1, -1).gather(-2, chosen)

    sign = (draw_uniform(shape, params, generator) - 0.5).sign()
    normal = draw_normal(shape, params, generator)
    omega = 2 * math.pi * (sign * at_component("mixture_means") + normal * at_component("mixture_scales"))
    phase = 2 * math.pi * draw_uniform((*lead, 1, num_features), params, generator)
    scale = (2 * weights.sum(-1) ** width).sqrt()[..., None, None]
    return lambda x: scale * (x @ align(omega, 2, x).mT + align(phase, 2, x)).cos()


def _polynomial(
    module: Any, lead: Lead, num_features: int, width: int, params: Params, generator: torch.Generator
) -> Functions:
    """A product of `power` independent features of x . z + offset, each a random column plus a random sign."""
    factors = []
    for _ in range(round(module.power)):
        column = (draw_uniform((*lead, num_features), params, generator) * width).floor().long().clamp_max(width - 1)
        choose = nn.functional.one_hot(column, width).to(params["offset"].dtype) * math.sqrt(width)
        factors.append((choose, (draw_uniform((*lead, 1, num_features), params, generator) - 0.5).sign()))
    root = params["offset"].sqrt().unsqueeze(-1)

    def evaluate(x: Tensor) -> Tensor:
        parts = [x @ align(choose, 2, x).mT + root * align(sign, 2, x) for choose, sign in factors]
        return math.prod(parts[1:], start=parts[0])

    return evaluate


def _constant(
    module: Any, lead: Lead, num_features: int, width: int, params: Params, generator: torch.Generator
) -> Functions:
    root = params["constant"].sqrt().unsqueeze(-1)
    ones = draw_uniform((*lead, 1, num_features), params, generator).mul(0).add(1)
    return lambda x: root * align(ones, 2, x) + torch.zeros_like(x[..., :1])


_FEATURES = {
    gpytorch.kernels.SpectralMixtureKernel: _spectral_mixture,
    gpytorch.kernels.PolynomialKernel: _polynomial,
    gpytorch.kernels.ConstantKernel: _constant,
}
