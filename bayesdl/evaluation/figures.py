"""Pictures of a comparison, as PNG bytes. Drawn on figures of their own: matplotlib's global state is not touched."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesdl.distributions import Categorical
from bayesdl.evaluation.calibration import (
    calibration_band,
    calibration_curve,
    reliability_curve,
)
from bayesdl.evaluation.runner import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["calibration", "colours", "convergence", "intervals", "pit_histograms", "reliability"]

# Okabe and Ito's colours, told apart by readers with any of the common kinds of colour blindness.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
_DASHES = ("-", "--", "-.", ":")
_INK, _MUTED = "#222222", "#6b6b6b"
_MOST_POINTS = 120


def colours(engines: Sequence[str]) -> dict[str, str]:
    """One colour an engine, the same in every picture."""
    return {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(engines)}


def intervals(rows: Mapping[str, Row], palette: Mapping[str, str], target_name: str) -> bytes:
    """One panel an engine: test points in the order of its prediction, with central 50% and 90% intervals."""
    figure, axes = _panels(len(rows), width=4.6, height=3.1)
    top = max(float(torch.max(r.arrays["y"].max(), r.arrays["quantiles"][-1].max())) for r in rows.values())
    low = min(float(torch.min(r.arrays["y"].min(), r.arrays["quantiles"][0].min())) for r in rows.values())
    for ax, (name, row) in zip(axes, rows.items(), strict=True):
        mean, y, quantiles = row.arrays["mean"].flatten(), row.arrays["y"].flatten(), row.arrays["quantiles"].flatten(1)
        order = mean.argsort()
        if len(order) > _MOST_POINTS:
            order = order[torch.linspace(0, len(order) - 1, _MOST_POINTS).round().long()]
        colour, at = palette[name], np.arange(len(order))
        q = quantiles[:, order].numpy()
        ax.fill_between(at, q[0], q[4], color=colour, alpha=0.18, linewidth=0, label="90% interval")
        ax.fill_between(at, q[1], q[3], color=colour, alpha=0.40, linewidth=0, label="50% interval")
        ax.plot(at, mean[order], color=colour, linewidth=1.4, label="mean")
        inside = ((y >= quantiles[0]) & (y <= quantiles[4]))[order].numpy()
        seen = y[order].numpy()
        ax.plot(at[inside], seen[inside], "o", color=_INK, markersize=2.6, alpha=0.75, label="test point")
        ax.plot(at[~inside], seen[~inside], "x", color=_INK, markersize=4.5, label="outside 90%")
        ax.set_title(name, color=_INK, fontsize=11, loc="left", fontweight="bold")
        ax.set_ylim(low - 0.03 * (top - low), top + 0.03 * (top - low))
        ax.set_xlabel("test points, by prediction")
    _label_left(axes, target_name)
    _legend_below(figure, axes[0])
    return _png(figure)


def calibration(pits: Mapping[str, Tensor], palette: Mapping[str, str]) -> bytes:
    """Observed against stated probability, all engines, with the band in which a calibrated model stays."""
    figure, (ax,) = _panels(1, width=5.6, height=4.9)
    levels = np.linspace(0.005, 0.995, 199)
    n = min(len(values) for values in pits.values())
    low, high = calibration_band(n, levels)
    ax.fill_between(levels, low, high, color="#bbbbbb", alpha=0.5, linewidth=0, label=f"calibrated, 95%, n = {n}")
    ax.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8)
    for i, (name, values) in enumerate(pits.items()):
        observed = calibration_curve(values, torch.as_tensor(levels))
        dashes = _DASHES[i % len(_DASHES)]
        ax.plot(levels, observed, dashes, color=palette[name], linewidth=1.8, label=name)
    ax.set_xlabel("stated probability that y lies below")
    ax.set_ylabel("how often it did")
    ax.set_aspect("equal")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    return _png(figure)


def pit_histograms(pits: Mapping[str, Tensor], palette: Mapping[str, str]) -> bytes:
    """One panel an engine: the density of PIT values with the band of a calibrated model."""
    from scipy.stats import binom

    figure, axes = _panels(len(pits), width=2.6, height=2.3)
    for ax, (name, values) in zip(axes, pits.items(), strict=True):
        n = len(values)
        bins = int(min(20, max(5, n // 10)))
        counts, edges = np.histogram(values.numpy(), bins=bins, range=(0, 1))
        low, high = (binom.ppf(q, n, 1 / bins) * bins / n for q in (0.025, 0.975))
        ax.axhspan(low, high, color="#bbbbbb", alpha=0.45, linewidth=0)
        ax.axhline(1, color=_MUTED, linewidth=0.8)
        ax.bar(
            edges[:-1],
            counts * bins / n,
            width=1 / bins,
            align="edge",
            color=palette[name],
            alpha=0.8,
            edgecolor="white",
            linewidth=0.6,
        )
        ax.set_title(name, color=_INK, fontsize=11, loc="left", fontweight="bold")
        ax.set_xlim(0, 1)
        ax.set_xlabel("PIT value F(y)")
    _label_left(axes, "density")
    return _png(figure)


def reliability(rows: Mapping[str, Sequence[Row]], palette: Mapping[str, str], num_bins: int = 10) -> bytes:
    """One column an engine: accuracy against confidence above, the histogram of confidence below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * len(rows), 4.6), layout="constrained")
    grid = figure.subplots(2, len(rows), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [2.4, 1]})
    edges = np.linspace(0, 1, num_bins + 1)
    for j, (name, found) in enumerate(rows.items()):
        upper, lower, colour = grid[0, j], grid[1, j], palette[name]
        probs = torch.cat([row.arrays["profile"].flatten(0, -2) for row in found])
        y = torch.cat([row.arrays["y"].flatten() for row in found])
        curve = reliability_curve(Categorical(probs=probs, validate_args=False), y, num_bins)
        confidence, hits, count = (part.numpy() for part in curve)
        full = count > 0
        error = 1.96 * np.sqrt(hits[full] * (1 - hits[full]) / count[full])
        upper.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8)
        upper.errorbar(
            confidence[full],
            hits[full],
            yerr=error,
            fmt="o-",
            color=colour,
            markersize=4.5,
            linewidth=1.4,
            capsize=2,
        )
        upper.set_title(name, color=_INK, fontsize=11, loc="left", fontweight="bold")
        lower.bar(
            edges[:-1],
            count / count.sum(),
            width=1 / num_bins,
            align="edge",
            color=colour,
            alpha=0.8,
            edgecolor="white",
            linewidth=0.6,
        )
        lower.set_xlabel("confidence in the top class")
        upper.set_ylim(0, 1.02)
        lower.set_xlim(float(np.floor(10 / probs.shape[-1]) / 10), 1)
        for ax in (upper, lower):
            _style(ax)
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("share")
    return _png(figure)


def convergence(rows: Mapping[str, Row], palette: Mapping[str, str]) -> bytes | None:
    """One panel an engine and traced quantity, one line a chain, member or start; None where nothing was traced."""
    traces = [
        (name, quantity, _as_lines(lines))
        for name, row in rows.items()
        for quantity, lines in (row.diagnostics.get("trace") or {}).items()
        if any(len(line) > 1 for line in _as_lines(lines))
    ]
    if not traces:
        return None
    figure, axes = _panels(len(traces), width=4.6, height=2.7)
    for ax, (name, quantity, lines) in zip(axes, traces, strict=True):
        for line, shade in zip(lines, _shades(palette[name], len(lines)), strict=True):
            ax.plot(np.linspace(0, 100, len(line)), line, color=shade, alpha=0.8, linewidth=0.8)
        ax.set_title(f"{name}: {quantity.replace('_', ' ')}", color=_INK, fontsize=11, loc="left", fontweight="bold")
        ax.set_xlabel("% of the run")
        _zoom(ax, lines)
    return _png(figure)


def _as_lines(lines: Any) -> list[list[float]]:
    """One list of numbers, or a list of such lists, as the latter; None (a value that was not finite) becomes NaN."""
    nested = lines if lines and isinstance(lines[0], (list, tuple)) else [lines]
    return [[math.nan if v is None else float(v) for v in line] for line in nested]


def _shades(colour: str, num: int) -> list[tuple[float, ...]]:
    """`num` shades of a colour, from darker to lighter."""
    from matplotlib.colors import to_rgb

    base, shares = np.asarray(to_rgb(colour)), np.linspace(-0.45, 0.45, num) if num > 1 else [0.0]
    return [tuple(base * (1 + s) if s < 0 else base + (1 - base) * s) for s in shares]


def _zoom(ax: Axes, lines: list[list[float]]) -> None:
    """Leave a wild beginning out of sight: limits from the later nine tenths, plus some air."""
    late = np.concatenate([np.asarray(line[len(line) // 10 :], float) for line in lines])
    late = late[np.isfinite(late)]
    if late.size:
        low, high = float(late.min()), float(late.max())
        air = 0.08 * (high - low) or 1.0
        ax.set_ylim(low - air, high + air)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    rows = math.ceil(count / max(1, int(10.5 // width)))
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [ax for line in figure.subplots(rows, columns, squeeze=False) for ax in line]
    for ax in axes[count:]:
        ax.set_axis_off()
    for ax in axes[:count]:
        _style(ax)
    return figure, axes[:count]


def _label_left(axes: Sequence[Axes], text: str) -> None:
    for ax in axes:
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(text)


def _style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=_MUTED, labelsize=9)
    ax.xaxis.label.set(color=_MUTED, fontsize=9.5)
    ax.yaxis.label.set(color=_MUTED, fontsize=9.5)
    ax.grid(True, color="#e8e8e8", linewidth=0.7)
    ax.set_axisbelow(True)


def _legend_below(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
