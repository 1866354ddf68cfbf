r"""Pyro: a model as its author wrote it, as a log density on unconstrained positions.

    log_density(q) = log p(latent values, data) + sum over sites of log |d value / d q|

Continuous sites come from unconstrained numbers by the bijection of their support, discrete ones are summed out by
Pyro's own enumeration. Many chains go through the model at once. Run once for a shape of the positions, the model is
recorded with its gradient as plain tensor operations, which leaves out the handlers and distributions that take most of
the time of a gradient in Pyro.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesdl._random import Seed, root_seed
from bayesdl.errors import SettingError, fail
from bayesdl.interop._pyro_graph import record
from bayesdl.interop._pyro_program import WHERE, CannotBatch, Program, own_randomness, unchecked
from bayesdl.models.log_density import LogDensity, with_gradient

_MANNERS = ("batched", "vmap", "loop")
_ROWS = 1024  # positions that go through a model at once where draws are turned to values
_MAX_RECORDED = 12


def from_pyro(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogDensity:
    """`LogDensity.from_pyro`: see there."""
    if not callable(model):
        wanted = "model must be a Pyro model: a function that calls pyro.sample."
        fail(SettingError, WHERE, wanted, got=repr(model), fix="LogDensity.from_pyro(model, *its_arguments)")
    program = Program(model, args, kwargs)
    runner = _Runner(program)
    return LogDensity(
        with_gradient(runner.value_and_grad),
        program.dim,
        _coordinate_names(program),
        transform=runner.transform,
        log_likelihood=runner.log_likelihood if program.observed else None,
        predictive=runner.predictive if program.observed else None,
        observed=dict(program.observed) or None,
        value_and_grad=runner.value_and_grad,
        evaluation=runner.manner,
    )


class _Runner:
    """A program and the fastest manner in which it runs on many positions at once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._recorded: dict[tuple[Any, ...], Callable[[Tensor], tuple[Tensor, Tensor]]] = {}
        self.manner = "loop"
        device = next(iter(program.sites.values())).device
        generator = torch.Generator().manual_seed(0)
        self._check_repeatable(torch.zeros((1, program.dim), dtype=torch.float64, device=device))
        # two sizes, so that a batch axis that meets an axis of the data cannot look right by its size
        for manner in _MANNERS[:2]:
            sizes = [
                torch.randn((size, program.dim), generator=generator, dtype=torch.float64).to(device) for size in (3, 2)
            ]
            if all(self._agrees(manner, q) for q in sizes):
                self.manner = manner
                break

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (*g, C, dim) to values (*g, C) and gradients (*g, C, dim); -inf where a factorisation failed."""
        rows = q.detach().reshape(-1, q.shape[-1])
        value, grad = self._guarded(rows)
        return value.reshape(q.shape[:-1]), grad.reshape(q.shape)

    def transform(self, draws: Tensor) -> dict[str, Tensor]:
        """Draws (C, N, dim) to latent and deterministic values by name, each (C, N, *shape)."""
        return self._over(draws, lambda run: run.values())

    def log_likelihood(self, draws: Tensor) -> dict[str, Tensor]:
        """Draws (C, N, dim) to log densities of each observation by the name of its site, each (C, N, *batch)."""
        return self._over(draws, lambda run: run.log_likelihood())

    def predictive(self, draws: Tensor, seed: Seed = 0) -> dict[str, Tensor]:
        """One data set drawn at each of the draws (C, N, dim): the observed sites by name, each (C, N, *shape)."""
        # vmap refuses the in-place random numbers that distributions draw
        manner = "batched" if self.manner == "batched" else "loop"
        with own_randomness(root_seed(seed) % 2**63):
            how = {"observe": False, "enumerate_": False}
            return self._over(draws, lambda run: run.observations(), how, manner)

    def _over(
        self,
        draws: Tensor,
        read: Callable[[Any], dict[str, Tensor]],
        how: dict[str, bool] | None = None,
        manner: str | None = None,
    ) -> dict[str, Tensor]:
        parts = [self._apply(manner or self.manner, q, read, how) for q in draws.detach().flatten(0, -2).split(_ROWS)]
        joined = {name: torch.cat([part[name].detach() for part in parts]) for name in parts[0]}
        return {name: _wide(value, draws).unflatten(0, draws.shape[:-1]) for name, value in joined.items()}

    def _apply(self, manner: str, rows: Tensor, read: Callable[[Any], Any], how: dict[str, bool] | None = None) -> Any:
        """`read` of a run at rows (B, dim), with B in front of all it gives."""
        with unchecked():
            return self._apply_unchecked(manner, rows, read, how or {})

    def _apply_unchecked(self, manner: str, rows: Tensor, read: Callable[[Any], Any], how: dict[str, bool]) -> Any:
        def single(q: Tensor) -> Any:
            return read(self._program.run(q, chains=False, **how))

        if manner == "batched" and len(rows) > 1:
            return read(self._program.run(rows, chains=True, **how))
        if manner == "vmap":
            return torch.func.vmap(single)(rows)
        found = [single(row) for row in rows]
        if isinstance(found[0], Tensor):
            return torch.stack(found)
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def _plain(self, manner: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient through the handlers."""
        q = rows.detach().requires_grad_(True)
        with torch.enable_grad():
            value = self._apply(manner, q, lambda run: run.log_density()).to(q.dtype)
            (grad,) = torch.autograd.grad(value.sum(), q)
        return value.detach(), grad

    def _guarded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A chain whose matrix cannot be factored must not stop the others: it is found by halving."""
        try:
            return self._fast(rows)
        except torch.linalg.LinAlgError:
            if len(rows) == 1:
                return rows.new_full((1,), -torch.inf), torch.zeros_like(rows)
            halves = [self._guarded(half) for half in rows.split(-(-len(rows) // 2))]
            return torch.cat([value for value, _ in halves]), torch.cat([grad for _, grad in halves])

    def _fast(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.manner == "loop":
            return self._plain("loop", rows)
        num, kind = len(rows), (rows.dtype, rows.device)
        sizes = [size for size, *other in self._recorded if tuple(other) == kind]
        # chains that stop are taken out one after another: a few sizes serve all, with idle rows beside the real ones
        fitting = [size for size in sizes if num <= size <= 4 * num]
        size = num if num in sizes or not sizes or num > max(sizes) else min(fitting, default=_power_of_two(num))
        if size > num:
            rows = torch.cat([rows, rows[:1].expand(size - num, -1)])
        if (size, *kind) not in self._recorded:
            self._record(rows)
        value, grad = self._recorded[size, *kind](rows)
        return value[:num], grad[:num]

    def _record(self, rows: Tensor) -> None:
        if len(self._recorded) >= _MAX_RECORDED:
            self._recorded.pop(next(iter(self._recorded)))

        def plain(q: Tensor) -> tuple[Tensor, Tensor]:
            return self._plain(self.manner, q)

        run: Callable[[Tensor], tuple[Tensor, Tensor]] = plain
        try:
            graph = record(plain, rows)
            if _same(graph(rows), plain(rows)):
                run = graph
        except torch.linalg.LinAlgError:
            raise
        except Exception:
            pass
        self._recorded[len(rows), rows.dtype, rows.device] = run

    def _agrees(self, manner: str, rows: Tensor) -> bool:
        """Whether a manner gives what one position at a time gives: values, gradients, named values."""
        try:
            with torch.random.fork_rng():
                same = _same(self._plain(manner, rows), self._plain("loop", rows))
                values = [self._apply(m, rows, lambda run: run.values()) for m in (manner, "loop")]
        except (CannotBatch, torch.linalg.LinAlgError):
            return False
        except SettingError:
            raise
        except Exception:
            return False
        return same and all(_near(values[0][name], values[1][name]) for name in values[1])

    def _check_repeatable(self, rows: Tensor) -> None:
        with torch.random.fork_rng():
            first, second = self._plain("loop", rows), self._plain("loop", rows)
        if not torch.equal(first[0].nan_to_num(), second[0].nan_to_num()):
            wanted = "the log density must be the same at every evaluation."
            fix = "draw random numbers by pyro.sample, not by torch"
            fail(SettingError, WHERE, wanted, got=f"{float(first[0])}, then {float(second[0])}", fix=fix)


def _wide(value: Tensor, draws: Tensor) -> Tensor:
    """Real numbers in the dtype of the draws; whole numbers as they are."""
    return value.to(draws.dtype) if value.is_floating_point() else value


def _power_of_two(num: int) -> int:
    return 1 << (num - 1).bit_length()


def _same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return all(_near(a, b) for a, b in zip(found, wanted, strict=True))


def _near(found: Tensor, wanted: Tensor) -> bool:
    """Equal to rounding in float32: a model that mixes up its chains is further off."""
    if found.shape != wanted.shape:
        return False
    finite = wanted.isfinite()
    scale = 1.0 + float(wanted[finite].abs().max()) if bool(finite.any()) else 1.0
    close = torch.isclose(found, wanted, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
    return bool((close | (~finite & ~found.isfinite())).all())


def _coordinate_names(program: Program) -> tuple[str, ...]:
    """A name for each number of a position: that of its site, with the place in its unconstrained numbers."""
    names = []
    for name, site in program.sites.items():
        places = torch.cartesian_prod(*(torch.arange(size) for size in site.inner)) if site.inner else None
        if places is None:
            names.append(name)
        else:
            names += [f"{name}[{','.join(map(str, place))}]" for place in places.reshape(site.size, -1).tolist()]
    return tuple(names)
