"""Pictures of a study, on figures of their own: matplotlib's global state is not touched."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesdl.bo.space import Choice, Float, Integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdl.bo.study import Study
    from bayesdl.bo.trial import Trial

# Okabe and Ito's colours, told apart by readers with any of the common kinds of colour blindness.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#9a9a9a"
_INK, _MUTED = "#222222", "#6b6b6b"
_MOST_SLICES, _MOST_AXES, _MOST_LINES = 9, 16, 400
_GRID = 101


def overview(study: Study) -> Figure:
    """Best value so far against trials for one objective; the Pareto front for several."""
    return progress(study) if len(study.directions) == 1 else pareto(study)


def progress(study: Study) -> Figure:
    """Every value, and the best feasible one so far."""
    figure, (ax,) = _panels(1, 7.6, 4.0)
    trials = [trial for trial in study.trials if trial.state == "complete"]
    at = {trial.number: i + 1 for i, trial in enumerate(sorted(trials, key=lambda t: t.number))}
    good, bad = [t for t in trials if t.feasible and t.exact], [t for t in trials if not t.feasible]
    cheap = [t for t in trials if t.feasible and not t.exact]
    ax.plot([at[t.number] for t in good], [t.value for t in good], "o", color=_BLUE, alpha=0.55, ms=5, label="value")
    if bad:
        ax.plot([at[t.number] for t in bad], [t.value for t in bad], "x", color=_ORANGE, ms=6, label="infeasible")
    if cheap:
        ax.plot([at[t.number] for t in cheap], [t.value for t in cheap], "o", mfc="none", color=_GREY, ms=5,
                label="lower fidelity")  # fmt: skip
    if good and not study.space.environment:
        best = np.minimum.accumulate if study.directions[0] == "minimize" else np.maximum.accumulate
        line = best(np.array([t.value for t in good]))
        steps = [at[t.number] for t in good]
        ax.step([*steps, len(trials)], [*line, line[-1]], where="post", color=_INK, lw=1.8, label="best so far")
        if min(t.value for t in good) > 0 and max(t.value for t in good) > 1e3 * min(t.value for t in good):
            ax.set_yscale("log")
    ax.set_xlabel("finished trial")
    ax.set_ylabel("value")
    _integers(ax)
    ax.legend(frameon=False, fontsize=9, loc="best")
    return figure


def pareto(study: Study) -> Figure:
    """Each pair of objectives: all values, and those of the front."""
    m = len(study.directions)
    pairs = [(i, j) for i in range(m) for j in range(i + 1, m)][:6]
    figure, axes = _panels(len(pairs), 4.6, 4.0)
    trials = [trial for trial in study.trials if trial.state == "complete"]
    front = {trial.number for trial in study.pareto}
    for ax, (i, j) in zip(axes, pairs, strict=True):
        for keep, mark, colour, label in (
            (lambda t: not t.feasible, "x", _ORANGE, "infeasible"),
            (lambda t: t.feasible and t.number not in front, "o", _GREY, "beaten"),
            (lambda t: t.number in front, "o", _BLUE, "Pareto front"),
        ):
            points = [t.values for t in trials if keep(t)]
            if points:
                ax.plot([p[i] for p in points], [p[j] for p in points], mark, color=colour, ms=5.5, label=label)
        if m == 2 and front:
            _staircase(ax, study)
        ax.set_xlabel(f"value{i} ({study.directions[i]})")
        ax.set_ylabel(f"value{j} ({study.directions[j]})")
    entries = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    # above the panels: within one, its marks would be taken for trials
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, ncols=3, loc="outside upper center")
    return figure


def _staircase(ax: Axes, study: Study) -> None:
    """The edge of what is beaten, for two objectives."""
    points = sorted(t.values for t in study.pareto)
    # beyond a point, what is beaten extends towards the worse values of the first objective
    where = "post" if study.directions[0] == "minimize" else "pre"
    ax.step([p[0] for p in points], [p[1] for p in points], where=where, color=_BLUE, lw=1.2, alpha=0.7)


def slices(study: Study) -> Figure | None:
    """The surrogate of the first objective along each parameter, through the best point; None while there is none."""
    from bayesdl.interop._optuna_trials import fitted

    centre = _centre(study)
    free = [i for i, dim in enumerate(study.space.dimensions) if not _is_single(dim)][:_MOST_SLICES]
    if centre is None or not free:
        return None
    posterior, _, encoding = fitted(study.optuna_study, study._sampler, study.space.distributions())
    trials = [trial for trial in study.trials if trial.state == "complete"]
    sign = 1.0 if study.directions[0] == "maximize" else -1.0
    figure, axes = _panels(len(free), 3.5, 2.7)
    for ax, i in zip(axes, free, strict=True):
        name, dim = study.space.names[i], study.space.dimensions[i]
        values = _along(dim)
        z = encoding.encode([{**centre.params, name: value} for value in values])
        with torch.no_grad():
            law = posterior.predict(encoding.expand(z), noise=False)
            mean, spread = law.mean, law.variance.sqrt()
        mean, spread = (v[:, 0] if v.ndim == 2 else v for v in (mean, spread))
        mean, spread = (sign * mean).numpy(), spread.numpy()
        seen = [trial.params[name] for trial in trials]
        _slice(ax, dim, values, mean, spread, seen, [trial.values[0] for trial in trials], centre.params[name])
        ax.set_xlabel(name)
    for ax in axes:
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("value" if len(study.directions) == 1 else "value0")
    return figure


def _slice(
    ax: Axes,
    dim: Any,
    values: Sequence[Any],
    mean: Any,
    spread: Any,
    seen: Sequence[Any],
    y: Sequence[float],
    best: Any,
) -> None:
    if isinstance(dim, Choice):
        at = np.arange(len(values))
        place = {repr(value): i for i, value in enumerate(values)}
        ax.errorbar(at, mean, yerr=2 * spread, fmt="s", color=_BLUE, capsize=4, ms=5)
        ax.plot([place[repr(v)] for v in seen], y, "o", color=_INK, alpha=0.25, ms=3.5)
        ax.axvline(place[repr(best)], color=_ORANGE, lw=1, ls="--")
        ax.set_xticks(at, [str(v) for v in values], rotation=30 if len(values) > 4 else 0)
    else:
        ax.fill_between(values, mean - 2 * spread, mean + 2 * spread, color=_BLUE, alpha=0.2, lw=0)
        ax.plot(values, mean, color=_BLUE, lw=1.6)
        ax.plot(seen, y, "o", color=_INK, alpha=0.25, ms=3.5)
        ax.axvline(best, color=_ORANGE, lw=1, ls="--")
        if dim.log:
            ax.set_xscale("log")


def parallel(study: Study) -> Figure | None:
    """One line a trial through all its parameters, coloured by how good it is; None while none is complete."""
    from matplotlib import colormaps

    trials = [trial for trial in study.trials if trial.state == "complete"][-_MOST_LINES:]
    shown = [i for i, dim in enumerate(study.space.dimensions) if not _is_single(dim)][:_MOST_AXES]
    if not trials or not shown:
        return None
    figure, (ax,) = _panels(1, max(6.0, 1.25 * (len(shown) + 1)), 4.0)
    sign = 1.0 if study.directions[0] == "minimize" else -1.0
    order = np.argsort(np.argsort([-sign * trial.values[0] for trial in trials]))  # the best has the largest rank
    share = order / max(1, len(trials) - 1)
    low, high = min(t.values[0] for t in trials), max(t.values[0] for t in trials)
    for j in order.argsort():
        trial = trials[j]
        heights = [_height(study.space.dimensions[i], trial.params[study.space.names[i]]) for i in shown]
        value = 0.5 if high == low else (trial.values[0] - low) / (high - low)
        colour = colormaps["viridis"](share[j])
        width = 2.2 if share[j] > 0.95 else 1.0
        ax.plot([*range(len(shown) + 1)], [*heights, value], color=colour, lw=width, alpha=0.35 + 0.6 * share[j])
    names = [study.space.names[i] for i in shown]
    ax.set_xticks(range(len(shown) + 1), [*names, "value" if len(study.directions) == 1 else "value0"])
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    for k in range(len(shown) + 1):
        ends = _ends(study.space.dimensions[shown[k]]) if k < len(shown) else (f"{low:.4g}", f"{high:.4g}")
        ax.axvline(k, color="#bbbbbb", lw=0.8, zorder=0)
        ax.text(k, -0.03, ends[0], ha="center", va="top", fontsize=8, color=_MUTED)
        ax.text(k, 1.03, ends[1], ha="center", va="bottom", fontsize=8, color=_MUTED)
    ax.tick_params(axis="x", pad=16, length=0)
    ax.set_ylim(-0.02, 1.02)
    return figure


def timing(study: Study) -> Figure:
    """What each trial took: fit and acquisition in CPU seconds, the objective and the rest by the clock."""
    from bayesdl.interop.optuna import TIMING

    figure, (ax,) = _panels(1, 7.6, 3.2)
    frozen = {t.number: t for t in study.optuna_study.get_trials(deepcopy=False)}
    trials = [t for t in study.trials if t.state in ("complete", "failed") and math.isfinite(t.seconds)]
    at = np.arange(1, len(trials) + 1)
    spent = [frozen[t.number].system_attrs.get(TIMING, {}) for t in trials]
    fit = np.array([s.get("fit", 0.0) for s in spent])
    acquisition = np.array([s.get("acquisition", 0.0) for s in spent])
    rest = np.maximum(0.0, np.array([t.seconds - s.get("clock", 0.0) for t, s in zip(trials, spent, strict=True)]))
    below = np.zeros(len(trials))
    for part, colour, label in ((fit, _BLUE, "fit"), (acquisition, _GREEN, "acquisition"), (rest, _GREY, "objective")):
        ax.bar(at, part, bottom=below, width=0.9, color=colour, label=label)
        below = below + part
    ax.set_xlabel("finished trial")
    ax.set_ylabel("seconds")
    _integers(ax)
    ax.legend(frameon=False, fontsize=9, loc="best", ncols=3)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _centre(study: Study) -> Trial | None:
    """The point that slices go through: the best, or the best of the front in the first objective."""
    if len(study.directions) == 1 and not study.space.environment and study.best is not None:
        return study.best
    complete = study.pareto or [trial for trial in study.trials if trial.state == "complete"]
    sign = 1.0 if study.directions[0] == "minimize" else -1.0
    return min(complete, key=lambda t: sign * t.values[0]) if len(complete) > 1 or study.pareto else None


def _along(dim: Float | Integer | Choice) -> list[Any]:
    if isinstance(dim, Choice):
        return list(dim.options)
    if isinstance(dim, Integer) and (dim.high - dim.low) // dim.step < _GRID:
        return list(range(dim.low, dim.high + 1, dim.step))
    grid = np.geomspace(dim.low, dim.high, _GRID) if dim.log else np.linspace(dim.low, dim.high, _GRID)
    grid = grid.clip(dim.low, dim.high)
    return sorted({int(v) for v in grid.round()}) if isinstance(dim, Integer) else grid.tolist()


def _is_single(dim: Float | Integer | Choice) -> bool:
    return len(dim.options) == 1 if isinstance(dim, Choice) else dim.low == dim.high


def _height(dim: Float | Integer | Choice, value: Any) -> float:
    """Where a value lies between the ends of its axis."""
    if isinstance(dim, Choice):
        return [repr(option) for option in dim.options].index(repr(value)) / (len(dim.options) - 1)
    warp = math.log if dim.log else float
    return (warp(value) - warp(dim.low)) / (warp(dim.high) - warp(dim.low))


def _ends(dim: Float | Integer | Choice) -> tuple[str, str]:
    if isinstance(dim, Choice):
        return str(dim.options[0]), str(dim.options[-1])
    return f"{dim.low:.4g}", f"{dim.high:.4g}"


def _integers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, max(1, int(10.6 // width)))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [ax for line in figure.subplots(rows, columns, squeeze=False) for ax in line]
    for ax in axes[count:]:
        ax.set_axis_off()
    for ax in axes[:count]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#999999")
        ax.tick_params(colors=_MUTED, labelsize=9)
        ax.xaxis.label.set(color=_MUTED, fontsize=9.5)
        ax.yaxis.label.set(color=_MUTED, fontsize=9.5)
        ax.grid(True, color="#e8e8e8", linewidth=0.7)
        ax.set_axisbelow(True)
    return figure, axes[:count]
