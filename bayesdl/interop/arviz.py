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
    posterior_predictive: Variables | None = None,
    constant_data: Variables | None = None,
    prior: Variables | None = None,
    prior_predictive: Variables | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> DataTree:
    """An ArviZ DataTree with one group for each argument that is given.

    Args:
        posterior: Draws by name, each (C, N, *event): C chains of N draws.
        sample_stats: Statistics by name, each (C, N). "log_density" and "num_steps" become ArviZ's "lp" and "n_steps".
        observed_data: Data by name, any shape.
        log_likelihood: Pointwise log likelihoods by the name of the data, each (C, N, *data).
        posterior_predictive: Replicated data by the name of the data, each (C, N, *data).
        constant_data: What was conditioned on without a model of it, such as inputs; any shape.
        prior: Draws from the prior by name, each (C', N', *event).
        prior_predictive: Data replicated from the prior, each (C', N', *data).
        coords: Index values by dimension, such as {"feature": ["age", "bmi"]}.
        dims: Names of the event dimensions by variable, such as {"weights": ["feature"]}.

    Raises:
        ShapeError: Two arrays disagree about the numbers of chains and draws, or lack these axes.
    """
    import arviz_base

    after: dict[str, Variables | None] = {"posterior": posterior, "sample_stats": sample_stats}
    after |= {"posterior_predictive": posterior_predictive, "log_likelihood": log_likelihood}
    before = {"prior": prior, "prior_predictive": prior_predictive}
    fixed = {"observed_data": observed_data, "constant_data": constant_data}
    groups = {}
    for samples, named in ((True, after), (True, before), (False, fixed)):
        found = {
            group: {_ARVIZ_NAMES.get(k, k) if group == "sample_stats" else k: _array(v) for k, v in variables.items()}
            for group, variables in named.items()
            if variables is not None
        }
        if samples and found:
            _check_samples(found)
        groups.update(found)
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


def nested_rhat(draws: ArrayLike, superchains: ArrayLike) -> np.ndarray:
    r"""Nested R-hat of every component: the figure for many short chains, some of which share a start.

    A superchain is a set of chains that began at one point. With B the variance of the K superchain means, and W the
    mean over superchains of (the variance of their chain means + the mean variance within their chains),

        nested R-hat = sqrt(1 + B / W).

    The start is the only thing that chains of a superchain have in common, so that B says how far it is forgotten,
    whatever the length of the chains; W grows with the number of chains rather than their length. For chains that have
    forgotten it, the value is about 1 + 1 / (2 E), E the effective draws of a superchain: 1.01 asks for fifty. Chains
    are halved, and draws rank-normalised, as in `convergence`; the worse of bulk and folded draws counts.

    Args:
        draws: (C, N, *event): C chains of N draws, N at least 4.
        superchains: (C): the superchain of each chain, as an integer; the same number of chains in each, two
            superchains at least. `shared_starts` finds them.

    Returns:
        Shape (*event). Infinity for a component with a draw that is not finite, NaN for one that never changes.

    Raises:
        ShapeError: `draws` lacks its axes, or the superchains are fewer than two, unequal in size, or not C numbers.

    Cost: some milliseconds a component for 100 000 draws.

    Reference: Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman (2024), arXiv 2110.13017, equations 4 to 8.
    """
    from arviz_stats.base import array_stats

    x, ids = _array(draws).astype(np.float64, copy=False), _array(superchains)
    if x.ndim < 2 or ids.shape != x.shape[:1]:
        got = f"draws {x.shape}, superchains {ids.shape}"
        wanted = "draws must have shape (chains, draws, *event), and superchains (chains,)."
        fail(ShapeError, "nested_rhat", wanted, got=got, fix="give every chain the number of its superchain")
    _, ids, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    if len(sizes) < 2 or len(set(sizes.tolist())) > 1:
        wanted = "there must be two superchains at least, with equally many chains."
        fail(ShapeError, "nested_rhat", wanted, got=f"sizes {sizes.tolist()}", fix="start as many chains at each point")
    event = x.shape[2:]
    x = x.reshape(*x.shape[:2], -1)
    usable = np.isfinite(x).all((0, 1))
    result = np.full(x.shape[-1], np.nan)
    if usable.any() and x.shape[1] >= 4:
        with np.errstate(invalid="ignore", divide="ignore"):
            result[usable] = array_stats.rhat_nested(x[..., usable], ids, chain_axis=0, draw_axis=1)
    result[~usable] = np.inf
    return result.reshape(event)


def shared_starts(initial: ArrayLike) -> np.ndarray | None:
    """The superchain of each chain, (C), from initial positions (C, D): chains that start at one point share a number.

    None where nested R-hat has no use for them: all starts differ, or all are one, or the groups are unequal in size.
    """
    _, ids, sizes = np.unique(_array(initial), axis=0, return_inverse=True, return_counts=True)
    fit = 1 < len(sizes) < len(ids) and len(set(sizes.tolist())) == 1
    return ids.reshape(-1) if fit else None


def worst_nested_rhat(draws: ArrayLike, initial: ArrayLike) -> float | None:
    """The largest nested R-hat over the components of draws (C, N, *event), for chains that began at `initial` (C, D).

    None where the starts make no superchains (see `shared_starts`); NaN where no component has a figure.
    """
    superchains = shared_starts(initial)
    if superchains is None:
        return None
    return float(np.fmax.reduce(nested_rhat(draws, superchains), axis=None, initial=np.nan))


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
