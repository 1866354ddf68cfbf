"""A log density as a model: any differentiable function of an unconstrained position, with no data and no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayesdl.errors import SettingError, ShapeError, fail


@dataclass(frozen=True)
class LogDensity:
    """An unnormalised log density on R^dim, evaluated for many chains at once.

        LogDensity(lambda q: -0.5 * q.square().sum(-1), dim=3)

    Attributes:
        fn: Maps positions (*g, C, dim) to values (*g, C), differentiable by autograd. A chain's value depends on its
            own position only. `torch.func.vmap(f)` makes one from a function of a single position, at the price of
            some dispatch per call.
        dim: Number of coordinates, at least 1.
        names: One name per coordinate, or None.
        transform: From draws (C, N, dim) to the quantities of interest by name, each (C, N, *event); None where the
            coordinates are these.
        log_likelihood: From draws (C, N, dim) to the log density of each observation by the name of the data, each
            (C, N, *data); None where there is none.
        predictive: From draws (C, N, dim) and `seed=` to one data set for each draw, by name, each (C, N, *data).
        observed: The data by name.
        value_and_grad: From positions (*g, C, dim) to values (*g, C) and gradients (*g, C, dim), where there is a
            faster way than autograd through `fn`.
        evaluation: How `fn` takes many chains at once: "batched", "vmap", or one after another in a "loop".

    Raises:
        SettingError: `dim` is not a whole number above 0, `fn` cannot be called, or the names are not `dim` different
            ones.
    """

    fn: Callable[[Tensor], Tensor]
    dim: int
    names: tuple[str, ...] | None = None
    transform: Callable[[Tensor], Mapping[str, Tensor]] | None = field(default=None, compare=False)
    log_likelihood: Callable[[Tensor], Mapping[str, Tensor]] | None = field(default=None, compare=False)
    predictive: Callable[..., Mapping[str, Tensor]] | None = field(default=None, compare=False)
    observed: Mapping[str, Tensor] | None = field(default=None, compare=False)
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]] | None = field(default=None, compare=False)
    evaluation: str = field(default="batched", compare=False)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            wanted = "fn must be a function from positions (chains, dim) to values (chains,)."
            fail(SettingError, "LogDensity", wanted, got=repr(self.fn), fix="pass a function")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            wanted = "dim must be a whole number of at least 1."
            fail(SettingError, "LogDensity", wanted, got=repr(self.dim), fix="pass the number of coordinates")
        if self.names is None:
            return
        names = tuple(self.names)
        if len(names) != self.dim or len(set(names)) != self.dim or not all(isinstance(name, str) for name in names):
            wanted = f"names must be {self.dim} different strings, one per coordinate."
            fail(SettingError, "LogDensity", wanted, got=repr(self.names), fix="names=None, or one name per coordinate")
        object.__setattr__(self, "names", names)

    @classmethod
    def from_pyro(cls, model: Callable[..., Any], *args: Any, **kwargs: Any) -> LogDensity:
        r"""The posterior of a Pyro model, as its author wrote it, given the data in its arguments.

            density = LogDensity.from_pyro(model, x, y)
            chains = sample(density, sampler="nuts")        # chains.values: the latent sites by name

        Continuous sites are sampled as unconstrained numbers u, with value = T(u) for the bijection T of their support
        (which may depend on other sites) and log |dT / du| in the density. Discrete sites are summed out. `transform`
        gives latent and deterministic values in the model's own space, `log_likelihood` and `predictive` serve ArviZ.

        Many chains go through the model at once: in an outer plate to the left of all its axes where the model
        broadcasts, else under torch.func.vmap, else one after another; `evaluation` says which. What many chains give
        is compared with what single chains give, so that a model that mixes up its axes is found out. For each number
        of chains the model is recorded once with its gradient as plain tensor operations; a model whose Python code
        depends on values is run anew each time. In float64 positions the arithmetic is float64.

        Args:
            model: A function with `pyro.sample` statements: plates, masks, scales, `pyro.factor`, `pyro.deterministic`
                and the effect handlers of `pyro.poutine` are as in Pyro. It must have the same sites at every run.
            args: The model's arguments; `kwargs` likewise.

        Raises:
            SettingError: The model has no continuous latent site, a discrete site with infinitely many values, a site
                whose support has no bijection, a plate that subsamples, or random numbers outside of sites.

        Cost: a few runs of the model. A gradient of C chains costs the model's arithmetic for C chains and some
        microseconds for each tensor operation.

        Reference: Bingham et al. (2019), Pyro: deep universal probabilistic programming, JMLR 20(28).
        """
        from bayesdl import _doors

        return _doors.log_density_from_pyro(model, args, kwargs)

    def __call__(self, q: Tensor) -> Tensor:
        """The log density at positions (*g, C, dim), shape (*g, C). Raises ShapeError for any other shape."""
        if q.ndim < 1 or q.shape[-1] != self.dim:
            wanted = f"positions must have shape (*groups, chains, {self.dim})."
            fail(
                ShapeError, "LogDensity", wanted, got=str(tuple(q.shape)), fix=f"the last axis holds {self.dim} numbers"
            )
        value = self.fn(q)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape != tuple(q.shape[:-1]):
            fail(
                ShapeError,
                "LogDensity",
                f"fn must map positions {tuple(q.shape)} to values {tuple(q.shape[:-1])}, one per chain.",
                got=f"shape {shape}" if shape is not None else type(value).__name__,
                fix="sum over the last axis only; torch.func.vmap(fn) turns a single-chain function into a batched one",
            )
        return value


def with_gradient(value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """A function (*g, C, D) -> (*g, C) whose backward pass uses the gradient (*g, C, D) that came with the value.

    For a log density whose gradient is at hand in closed form. Differentiable once.
    """

    def fn(q: Tensor) -> Tensor:
        return _WithGradient.apply(q, value_and_grad)[0]

    return fn


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return value_and_grad(q.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * grad, None
