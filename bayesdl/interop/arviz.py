"""ArviZ: draws as a DataTree, and convergence diagnostics of arrays.

Works with arviz-base and arviz-stats 0.8 (Python 3.11) and 1.x. The diagnostics come from the array functions of
arviz-stats, which need NumPy and SciPy only: its xarray functions are an optional extra whose absence goes unreported
when the package is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from bayesdl.errors import ShapeError, fail

if TYPE_CHECKING:
    from xarray import DataTree

ArrayLike: TypeAlias = Tensor | np.ndarray
Variables: TypeAlias = Mapping[str, ArrayLike]

# What ArviZ calls the statistics that samplers record.
_ARVIZ_NAMES = {"log_density": "lp", "num_steps": "n_steps"}


def to_datatree(
    posterior: Variables,
    sample_stats: Variables | None = None,
    observed_data: Variables | None = None,
    log_likelihood: Variables | None = None,
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> DataTree:
    """An ArviZ DataTree with one group for each argument that is given.

    Args:
        posterior: Draws by name, each (C, N, *event): C chains of N draws.
        sample_stats: Statistics by name, each (C, N). "log_density" and "num_steps" become ArviZ's "lp" and "n_steps".
        observed_data: Data by name, any shape.
        log_likelihood: Pointwise log likelihoods by the name of the data, each (C, N, *data).
        coords: Index values by dimension, such as {"feature": ["age", "bmi"]}.
        dims: Names of the event dimensions by variable, such as {"weights": ["feature"]}.

    Raises:
        ShapeError: Two arrays disagree about the numbers of chains and draws, or lack these axes.
    """
    import arviz_base

    groups: dict[str, dict[str, np.ndarray]] = {"posterior": {k: _array(v) for k, v in posterior.items()}}
    if sample_stats is not None:
        groups["sample_stats"] = {_ARVIZ_NAMES.get(k, k): _array(v) for k, v in sample_stats.items()}
    if log_likelihood is not None:
        groups["log_likelihood"] = {k: _array(v) for k, v in log_likelihood.items()}
    _check_samples(groups)
    if observed_data is not None:
        groups["observed_data"] = {k: _array(v) for k, v in observed_data.items()}
    return arviz_base.from_dict(groups, coords=coords, dims=dims)


def convergence(draws: ArrayLike) -> dict[str, np.ndarray]:
    r"""Rank-normalised split R-hat, bulk ESS and tail ESS of every component.

    R-hat is the larger of the split R-hat of the rank-normalised draws and that of their distance from the median;
    bulk ESS that of the rank-normalised draws; tail ESS the smaller of those of the 5 % and the 95 % quantile. A single
    chain is cut in two halves for R-hat.

    Args:
        draws: (C, N, *event): C chains of N draws.

    Returns:
        "rhat", "ess_bulk" and "ess_tail", each of shape (*event). A component with a draw that is not finite has R-hat
        infinity and ESS 0. All are NaN below 4 draws a chain (for one chain, 8 draws for R-hat), and R-hat is NaN for a
        component that never changes.

    Raises:
        ShapeError: `draws` lacks the axes of chains and draws.

    Cost: some milliseconds a component for 100 000 draws.

    Reference: Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), arXiv 1903.08008.
    """
    from arviz_stats.base import array_stats

    x = _array(draws).astype(np.float64, copy=False)
    if x.ndim < 2:
        fail(
            ShapeError,
            "convergence",
            "draws must have shape (chains, draws, *event).",
            got=str(x.shape),
            fix="draws[None]",
        )
    event, num_draws = x.shape[2:], x.shape[1]
    x = x.reshape(*x.shape[:2], -1)
    usable = np.isfinite(x).all((0, 1))
    axes = {"chain_axis": 0, "draw_axis": 1}
    halves = x[0, : num_draws // 2 * 2].reshape(2, num_draws // 2, -1) if len(x) == 1 else x
    result = {name: np.full(x.shape[-1], np.nan) for name in ("rhat", "ess_bulk", "ess_tail")}
    # A component that never moves has variance 0 within chains, which divides 0 by 0.
    with np.errstate(invalid="ignore", divide="ignore"):
        if usable.any() and halves.shape[1] >= 4:
            result["rhat"][usable] = array_stats.rhat(halves[..., usable], **axes)
        if usable.any() and num_draws >= 4:
            result["ess_bulk"][usable] = array_stats.ess(x[..., usable], method="bulk", **axes)
            result["ess_tail"][usable] = array_stats.ess(x[..., usable], method="tail", prob=(0.05, 0.95), **axes)
    result["rhat"][~usable] = np.inf
    result["ess_bulk"][~usable] = result["ess_tail"][~usable] = 0.0
    return {name: value.reshape(event) for name, value in result.items()}


def worst_convergence(draws: ArrayLike) -> dict[str, float]:
    """The largest R-hat and the smallest bulk and tail ESS over the components of draws (C, N, *event).

    Components without a figure are passed over; NaN means that none has one.
    """
    found = convergence(draws)
    return {
        name: float(extreme.reduce(found[name], axis=None, initial=np.nan))
        for name, extreme in (("rhat", np.fmax), ("ess_bulk", np.fmin), ("ess_tail", np.fmin))
    }


def _array(value: ArrayLike) -> np.ndarray:
    """A contiguous array on the CPU."""
    return np.asarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value, order="C")


def _check_samples(groups: dict[str, dict[str, np.ndarray]]) -> None:
    shapes = {f"{group}[{name!r}]": value.shape for group, parts in groups.items() for name, value in parts.items()}
    leading = {shape[:2] for shape in shapes.values()}
    if len(leading) > 1 or any(len(shape) < 2 for shape in leading):
        fail(
            ShapeError,
            "to_datatree",
            "draws, statistics and log likelihoods must have shape (chains, draws, *event), with the same two first.",
            got=", ".join(f"{name} {shape}" for name, shape in shapes.items()),
            fix="value[None] adds a chain axis",
        )
