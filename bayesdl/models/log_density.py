"""A log density as a model: any differentiable function of an unconstrained position, with no data and no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

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

    Raises:
        SettingError: `dim` is not a whole number above 0, `fn` cannot be called, or the names are not `dim` different
            ones.
    """

    fn: Callable[[Tensor], Tensor]
    dim: int
    names: tuple[str, ...] | None = None

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
