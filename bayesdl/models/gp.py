r"""A Gaussian process prior with Gaussian noise: f ~ GP(m, k), y = f(x) + e, e ~ N(0, noise_variance)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl.errors import SettingError, fail
from bayesdl.hyper import LogNormal, Parameter
from bayesdl.kernels import Kernel
from bayesdl.kernels.coregionalization import label_columns
from bayesdl.likelihoods import Gaussian, Likelihood

if TYPE_CHECKING:
    import gpytorch

Values = dict[str, Tensor]


class Mean(Protocol):
    """What a prior mean function with parameters of its own does; `interop.gpytorch` makes one of a gpytorch mean."""

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """The hyper-parameters for inputs of `d` columns."""

    def __call__(self, x: Tensor, params: Values | None = None) -> Tensor:
        """m(x), from x (*b n d) to (*b n), differentiable in x and params."""

    def pullback(self, x: Tensor, params: Values, p: Tensor) -> Values:
        """From p = dL/dm (*b n) to dL/dparams[name] in the shape of params[name]."""


@dataclass(frozen=True)
class GP:
    """A Gaussian process with a kernel, a mean and a likelihood.

    Engines standardise x and y by default, and kernel and mean act on what they standardise: a lengthscale of 1 is one
    standard deviation of that input, a linear mean is linear in standardised units.

    Attributes:
        kernel: Any kernel of `bayesdl.kernels`, or of gpytorch (`bayesdl.interop.gpytorch.from_gpytorch` says how it is
            taken in; the module itself is never changed). Its amplitude is its own: `Scale(Matern())` learns one,
            `Matern()` has variance 1, which suits standardised targets.
        mean: "constant" (learned), "zero", or a gpytorch mean, whose parameters are learned with the kernel's.
        likelihood: Gaussian noise, whose variance engines learn, or a likelihood of classes.
    """

    kernel: Kernel | gpytorch.kernels.Kernel
    mean: str | Mean | gpytorch.means.Mean = "constant"
    likelihood: Likelihood = field(default_factory=Gaussian)

    def __post_init__(self) -> None:
        if _of_gpytorch(self.kernel) or _of_gpytorch(self.mean):
            from bayesdl import _doors

            object.__setattr__(self, "kernel", _doors.kernel_from_gpytorch(self.kernel))
            object.__setattr__(self, "mean", _doors.mean_from_gpytorch(self.mean))
        if not hasattr(self.mean, "pullback"):
            _checks.choice("GP", "mean", self.mean, ("constant", "zero"))
        if not isinstance(self.kernel, Kernel):
            wanted = "kernel must be a kernel of bayesdl.kernels or of gpytorch."
            fix = "for instance bdl.kernels.Matern(nu=2.5)"
            fail(SettingError, "GP", wanted, got=_checks.describe(self.kernel), fix=fix)
        if not hasattr(self.likelihood, "value_and_slope"):
            wanted = "likelihood must be a likelihood of bayesdl."
            fix = "bdl.Gaussian(), bdl.Bernoulli() or bdl.Categorical(num_classes)"
            fail(SettingError, "GP", wanted, got=_checks.describe(self.likelihood), fix=fix)

    @property
    def module(self) -> Any:
        """What a file of a posterior cannot hold and `bdl.load(path, module=...)` asks for: gpytorch modules, or None.

        One module, or a tuple of the kernel's and the mean's.
        """
        modules = [module for part in (self.kernel, self.mean) for module in _modules(part)]
        return None if not modules else modules[0] if len(modules) == 1 else tuple(modules)

    def layout(self, d: int) -> Layout:
        """How the hyper-parameters for d inputs lie in one flat vector: the kernel's, the mean's, the likelihood's."""
        kernel = tuple(p.prefixed("kernel") for p in self.kernel.parameters(d))
        mean = () if isinstance(self.mean, str) else tuple(p.prefixed("mean") for p in self.mean.parameters(d))
        return Layout(kernel + mean + self.likelihood.parameters(), has_mean=self.mean == "constant")

    def label_columns(self, d: int) -> tuple[int, ...]:
        """Which of d input columns hold labels, such as numbers of tasks: engines do not standardise them."""
        return label_columns(self.kernel, d)

    @staticmethod
    def kernel_values(values: Values) -> Values:
        """The kernel's share of the values that a layout unpacks, under the kernel's own names."""
        return _part(values, "kernel.")

    def mean_at(self, x: Tensor, values: Values, constant: Tensor) -> Tensor:
        """m(x) for x (*b n d), at the values and the constant (*b) that a layout unpacks.

        Returns:
            (*b n), or (*b 1) where the mean is a constant, which broadcasts against it.
        """
        if isinstance(self.mean, str):
            return constant.unsqueeze(-1)
        return self.mean(x, _part(values, "mean."))

    def mean_pullback(self, x: Tensor, values: Values, p: Tensor) -> tuple[Values, Tensor]:
        """From p = dL/dm(x) (*b n) to the gradients in the mean's own values, by their names in a layout, and in the
        constant (*b)."""
        if isinstance(self.mean, str):
            return {}, p.sum(-1)
        grads = self.mean.pullback(x, _part(values, "mean."), p)
        return {f"mean.{name}": grad for name, grad in grads.items()}, p.new_zeros(p.shape[:-1])

    def sample_prior(self, x: Tensor, num: int, generator: torch.Generator) -> Tensor:
        """Exact joint draws of f at x (*b, s, d) with initial hyper-parameters: (num, *b, s).

        A learned constant mean starts at 0. Cost: O(s^3) time, O(s^2) memory for each batch element.
        """
        factor = ops.cholesky(self.kernel(x)).factor
        shape = (num, *x.shape[:-1], 1)
        z = torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
        draws = (factor @ z).squeeze(-1)
        return draws if isinstance(self.mean, str) else draws + self.mean(x)


@dataclass(frozen=True)
class Layout:
    r"""Hyper-parameters as a flat vector theta (..., D): u for each (see `hyper.Parameter`), then the constant mean.

    A prior is on the value itself, so that the optimum does not depend on this parametrisation.
    """

    parameters: tuple[Parameter, ...]
    has_mean: bool

    @property
    def dim(self) -> int:
        """Length of theta."""
        return sum(p.size for p in self.parameters) + self.has_mean

    def initial(self, like: Tensor) -> Tensor:
        """theta (D,) at the initial values."""
        pieces = [p.unconstrained(p.initial_tensor(like)).reshape(-1) for p in self.parameters]
        return torch.cat([*pieces, like.new_zeros(int(self.has_mean))])

    def sample(self, num: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """theta (num, D) at draws from the priors, shrunk halfway to the initial values in log scale.

        A full draw from these wide priors is often a flat or a white-noise fit, from which no optimiser returns. A
        parameter of any sign without a prior starts around its initial value, within a tenth and half of its size.
        """
        start = self.initial(like)
        columns = [_draw(p, num, generator) for p in self.parameters]
        columns.append(torch.zeros(num, int(self.has_mean), dtype=torch.float64, device=generator.device))
        return 0.5 * (start + torch.cat(columns, -1).to(start))

    def unpack(self, theta: Tensor) -> tuple[Values, Tensor]:
        """Values by name, each (..., *shape), and the constant mean (...), zero where there is none."""
        lead, at = theta.shape[:-1], theta.shape[-1] - self.has_mean
        pieces = theta[..., :at].split(self._sizes, -1)
        if self._all_log:
            lower = self._table(theta).lower[: self.dim - self.has_mean]
            pieces = (theta[..., :at].exp() + lower).split(self._sizes, -1)
        else:
            pieces = [p.constrained(u) for p, u in zip(self.parameters, pieces, strict=True)]
        values = {p.name: v.reshape(lead + p.shape) for p, v in zip(self.parameters, pieces, strict=True)}
        return values, theta[..., at] if self.has_mean else theta.new_zeros(lead)

    def chain(self, theta: Tensor, grads: Values, mean_grad: Tensor) -> Tensor:
        """Gradient in theta from gradients in the values and in the mean, by d value / d u."""
        lead, at = theta.shape[:-1], theta.shape[-1] - self.has_mean
        inner = torch.cat([grads[p.name].reshape((*lead, p.size)) for p in self.parameters], -1)
        if self._all_log:
            inner = inner * theta[..., :at].exp()
        else:
            pieces = theta[..., :at].split(self._sizes, -1)
            inner = inner * torch.cat([p.slope(u) for p, u in zip(self.parameters, pieces, strict=True)], -1)
        return torch.cat([inner, mean_grad.unsqueeze(-1)], -1) if self.has_mean else inner

    def at(self, theta: Tensor) -> Point:
        """What `unpack`, `log_prior` and `chain` give at theta (..., D), for the common priors all in one go."""
        if not self._all_log or any(type(p.prior) not in (LogNormal, type(None)) for p in self.parameters):
            return self._at_any(theta)
        table, lead = self._table(theta), theta.shape[:-1]
        exp = theta.exp()
        if self.has_mean:
            # the constant mean passes as a value that is 1 and has no prior
            exp[..., -1:].fill_(1.0)
        value = exp + table.lower
        # log-normal in the value: a square in its log once the square is completed; 0 where there is no prior
        z = torch.addcmul(table.shift, value.log(), table.precision)
        log_prior = torch.linalg.vecdot(z, z).mul_(-0.5).add_(table.constant)
        pieces = value.split_with_sizes(self._sizes_and_mean, -1)
        values = {
            p.name: v if len(p.shape) == 1 else v.reshape(lead + p.shape)
            for p, v in zip(self.parameters, pieces, strict=False)
        }

        def gradient(grads: Values, by_constant: Tensor) -> Tensor:
            inner = [
                grads[p.name] if len(p.shape) == 1 else grads[p.name].reshape((*lead, p.size)) for p in self.parameters
            ]
            if self.has_mean:
                inner.append(by_constant.unsqueeze(-1))
            return torch.cat(inner, -1).addcdiv_(z.mul_(table.precision), value, value=-1.0).mul_(exp)

        return Point(values, theta[..., -1] if self.has_mean else theta.new_zeros(lead), log_prior, gradient)

    def _at_any(self, theta: Tensor) -> Point:
        values, constant = self.unpack(theta)
        total, slopes = self.log_prior(values)

        def gradient(grads: Values, by_constant: Tensor) -> Tensor:
            return self.chain(theta, {name: grad + slopes[name] for name, grad in grads.items()}, by_constant)

        return Point(values, constant, total + theta.new_zeros(theta.shape[:-1]), gradient)

    def log_prior(self, values: Values) -> tuple[Tensor | float, Values]:
        """Sum of log prior densities (...), and their slopes by name."""
        total, slopes = 0.0, {}
        for p in self.parameters:
            value = values[p.name]
            slopes[p.name] = torch.zeros_like(value) if p.prior is None else p.prior.slope(value)
            if p.prior is not None:
                density = p.prior.log_prob(value)
                total = total + (density.sum(tuple(range(-len(p.shape), 0))) if p.shape else density)
        return total, slopes

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [p.size for p in self.parameters]

    @functools.cached_property
    def _sizes_and_mean(self) -> list[int]:
        return [*self._sizes, 1] if self.has_mean else self._sizes

    @functools.cached_property
    def _all_log(self) -> bool:
        return all(p.is_log for p in self.parameters)

    @functools.cached_property
    def _tables(self) -> dict[tuple[torch.dtype, torch.device], _Table]:
        return {}

    def _table(self, like: Tensor) -> _Table:
        key = like.dtype, like.device
        if key not in self._tables:
            self._tables[key] = _table_of(self.parameters, self.has_mean, like)
        return self._tables[key]


class Point(NamedTuple):
    """The hyper-parameters at one theta (..., D).

    Attributes:
        values: By name, each (..., *shape).
        constant: The constant mean (...), zero where there is none.
        log_prior: (...).
        gradient: From the gradients of a log likelihood in the values and in the constant mean to that of log
            likelihood plus log prior in theta (..., D); to be called once.
    """

    values: Values
    constant: Tensor
    log_prior: Tensor
    gradient: Callable[[Values, Tensor], Tensor]


class _Table(NamedTuple):
    """Bounds and log-normal priors of all elements of theta side by side, each (D).

    With z = shift + precision * log(value), the log density of an element is -z^2 / 2 plus a share of `constant`.
    """

    lower: Tensor
    shift: Tensor
    precision: Tensor
    constant: float


def _table_of(parameters: tuple[Parameter, ...], has_mean: bool, like: Tensor) -> _Table:
    rows, constant = [], 0.0
    for p in parameters:
        if type(p.prior) is LogNormal:
            loc, scale = p.prior.loc, p.prior.scale
            rows += [(p.lower, scale - loc / scale, 1 / scale)] * p.size
            constant += p.size * (0.5 * scale**2 - loc - math.log(scale) - 0.5 * math.log(2 * math.pi))
        else:
            rows += [(p.lower, 0.0, 0.0)] * p.size
    rows += [(0.0, 0.0, 0.0)] * has_mean
    columns = torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(-1, 3).unbind(-1)
    return _Table(*(column.contiguous() for column in columns), constant)


def _draw(p: Parameter, num: int, generator: torch.Generator) -> Tensor:
    """u (num, size) at draws from the prior, float64, on the generator's device."""
    bounded = p.lower > -torch.inf or p.upper < torch.inf
    if p.prior is None:
        noise = torch.randn((num, p.size), generator=generator, dtype=torch.float64, device=generator.device)
        initial = p.initial_tensor(noise).reshape(-1)
        return p.unconstrained(initial) + noise if bounded else initial + noise * (0.2 + initial.abs())
    draws = p.prior.sample((num, p.size), generator)
    if not bounded:
        return draws
    # A draw beyond a bound counts as one beside it, but not so near that its gradient vanishes.
    middle = p.unconstrained(p.initial_tensor(draws).reshape(-1))
    beyond = torch.where(draws > p.lower, middle + _FAR, middle - _FAR)
    u = p.unconstrained(draws)
    return torch.where(u.isfinite(), u, beyond).clamp(middle - _FAR, middle + _FAR)


_FAR = 10.0


def _part(values: Values, prefix: str) -> Values:
    return {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}


def _of_gpytorch(value: Any) -> bool:
    """Whether `value` is of gpytorch or derived from it, found without importing that."""
    return any(kind.__module__.partition(".")[0] == "gpytorch" for kind in type(value).__mro__)


def _modules(part: Any) -> list[torch.nn.Module]:
    """The foreign modules inside a kernel or a mean, in the order in which a file names them."""
    own = getattr(part, "module", None)
    if isinstance(own, torch.nn.Module):
        return [own]
    inside = [getattr(part, "base", None), *getattr(part, "kernels", ())]
    return [module for one in inside if one is not None for module in _modules(one)]
