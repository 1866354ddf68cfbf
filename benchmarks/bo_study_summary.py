"""Tables and pictures of `bo_study`'s rows: ranks, regret against trials, and how good each surrogate was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bo_study_problems import PROBLEMS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

SUMMARY = Path(__file__).parent / "results" / "bo_study_summary.csv"
LABELS = {
    "gp": "GP", "nngp-erf": "NNGP, erf", "nngp-relu": "NNGP, ReLU", "student-t": "Student-t process", "hmc": "BNN, HMC",
    "sghmc": "BNN, SGHMC", "ensemble": "deep ensemble", "pfn-gp": "PFN gp", "pfn-bo": "PFN bo",
    "botorch": "BoTorch", "botorch-weak": "BoTorch, weak search", "gpsampler": "Optuna GPSampler", "tpe": "Optuna TPE",
    "ax": "Ax", "random": "random",
}  # fmt: skip
# Okabe and Ito, and greys for what is not a surrogate of bayesdl
COLOURS = {
    "gp": "#0072B2", "nngp-erf": "#009E73", "nngp-relu": "#56B4E9", "hmc": "#D55E00", "ensemble": "#CC79A7",
    "pfn-bo": "#E69F00", "pfn-gp": "#E69F00", "student-t": "#882255", "botorch": "#222222", "gpsampler": "#44AA99",
    "tpe": "#888888", "random": "#BBBBBB",
}  # fmt: skip
KINDS = {
    "as they are": ("branin", "hartmann6"), "not stationary": ("ridge", "step"),
    "ten inputs and more": ("ackley10", "embedded50", "embedded200", "polynomial100", "network20", "network200"),
    "noise": ("noisy_hartmann6", "heavy_hartmann6"),
    "several objectives": ("branin_currin", "dtlz2", "zdt1", "c2dtlz2", "sorbent"),
    "simulators": ("brusselator", "pest", "cartpole", "lander", "predators", "tuning"),
}  # fmt: skip
INK, MUTED = "#222222", "#666666"
_NUMBERS = (
    "best", "regret", "nlpd_start", "coverage_start", "error_start", "nlpd_end", "coverage_end", "error_end",
    "on_bounds", "fallbacks", "cpu_proposal", "cpu_total",
)  # fmt: skip

_SHOWN = (
    "seeds", "median_best", "mean_rank", "median_score", "median_nlpd_start", "median_coverage_start",
    "median_error_start", "median_nlpd_end", "median_coverage_end", "median_on_bounds", "median_cpu_proposal",
    "failures",
)  # fmt: skip


def summarise(rows: list[dict[str, str]], images: Path) -> None:
    """Print the tables, write `bo_study_summary.csv` beside the rows, and draw the pictures into `images`."""
    table = _table(rows)
    if table.empty:
        print("no rows yet")
        return
    table = _ranked(table)
    pieces = table.groupby(["problem", "method"], sort=False)
    found = pieces[list(_NUMBERS)].median().add_prefix("median_")
    found.insert(0, "seeds", pieces.size())
    for name, q in (("lower_quartile", 0.25), ("upper_quartile", 0.75)):
        found.insert(2, f"{name}_best", pieces["best"].quantile(q))
    found["mean_rank"] = pieces["rank"].mean()
    found["ranked_with"] = pieces["ranked_with"].median()
    found["median_score"] = pieces["score"].median()
    found["failures"] = pieces["failed"].sum()
    found.reset_index().to_csv(SUMMARY, index=False, float_format="%.5g")
    _say(table, found)
    images.mkdir(parents=True, exist_ok=True)
    for name, figure in (("ranks", _ranks(table)), ("traces", _traces(table)), ("surrogates", _surrogates(table))):
        if figure is not None:
            figure.savefig(images / f"bo_study_{name}.png", dpi=130, facecolor="white", metadata={"Software": None})
            print(f"picture: {images / f'bo_study_{name}.png'}")


def _table(rows: list[dict[str, str]]) -> pd.DataFrame:
    """Rows with numbers as numbers, a `loss` that is smaller for better, methods in a fixed order."""
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    for name in _NUMBERS:
        table[name] = pd.to_numeric(table[name], errors="coerce")
    table["seed"] = table["seed"].astype(int)
    table["failed"] = table["failure"].fillna("") != ""
    several = {name: PROBLEMS[name](0).num_objectives > 1 for name in table["problem"].unique()}
    sign = table["problem"].map(lambda name: -1.0 if several[name] else 1.0)
    table["loss"] = (sign * table["best"]).where(~table["failed"], math.inf)
    table["method"] = pd.Categorical(table["method"], list(LABELS), ordered=True)
    order = {name: place for place, name in enumerate(PROBLEMS)}
    table["place"] = table["problem"].map(order)
    return table.sort_values(["place", "method", "seed"]).astype({"method": str})


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Ranks and scores within each problem and seed; methods with half of the most seeds or fewer have no rank.

    Ranks are over the seeds that all others share, so that a study that was stopped between two methods is balanced.
    The score is 0 for random search's median loss on the problem and 1 for the best that any run reached.
    """
    parts = []
    for _, part in table.groupby("problem", sort=False):
        seeds = part.groupby("method")["seed"].agg(set)
        most = max(map(len, seeds))
        ranked = [name for name, own in seeds.items() if 2 * len(own) > most]
        shared = set.intersection(*seeds[ranked])
        inside = part["method"].isin(ranked) & part["seed"].isin(shared)
        part = part.assign(rank=math.nan, ranked_with=float(len(ranked)))
        part.loc[inside, "rank"] = part[inside].groupby("seed")["loss"].rank()
        chance = part.loc[part["method"] == "random", "loss"].median()
        floor = part["loss"].replace(math.inf, math.nan).min()
        part["score"] = (chance - part["loss"].replace(math.inf, math.nan)) / max(chance - floor, 1e-12)
        parts.append(part)
    return pd.concat(parts)


def _say(table: pd.DataFrame, found: pd.DataFrame) -> None:
    """The tables: losses, ranks, surrogates, seconds, and pairs against BoTorch's loop."""
    order = [name for name in LABELS if name in set(table["method"])]
    problems = list(dict.fromkeys(table["problem"]))
    with pd.option_context("display.width", 250, "display.max_columns", 40):
        for column in _SHOWN:
            print(f"\n{column}")
            print(found[column].unstack(0).reindex(index=order, columns=problems).round(3).to_string(na_rep=""))
        print("\nagainst BoTorch's loop: wins, ties, losses; mean difference of scores with its 95 % interval")
        print(pd.DataFrame(_pairs(table, "botorch", order)).to_string(index=False))


def markdown(rows: list[dict[str, str]], least: int) -> str:
    """Three tables for the docs, over the problems with `least` seeds or more of our GP.

    A line a problem: seeds, then for each method the median best value and in brackets the mean rank. Below it a line a
    method: the problems it was ranked on, and on those its mean place (0 first, 1 last), wins, ties and losses against
    our GP, the mean difference of scores with its 95 % interval, and the median CPU seconds of a proposal; and below
    that the mean place on each kind of problem. Methods are shown that were ranked on at least a third of the problems.
    """
    table = _ranked(_table(rows))
    seeds = table[table["method"] == "gp"].groupby("problem")["seed"].nunique()
    problems = [name for name in dict.fromkeys(table["problem"]) if seeds.get(name, 0) >= least]
    table = table[table["problem"].isin(problems)]
    table = table.assign(place=(table["rank"] - 1) / (table["ranked_with"] - 1).clip(lower=1))
    ranked = table[table["rank"].notna()]
    often = ranked.groupby("method")["problem"].nunique()
    place = ranked.groupby(["method", "problem"])["place"].mean().groupby("method").mean()
    order = [name for name in place.sort_values().index if 3 * often[name] >= len(problems)]
    pieces = ranked.groupby(["problem", "method"])
    best, rank = pieces["best"].median(), pieces["rank"].mean()

    def cell(problem: str, method: str) -> str:
        key = (problem, method)
        return f"{best[key]:.4g} ({rank[key]:.1f})" if key in best.index else ""

    lines = ["| problem | seeds | " + " | ".join(f"`{name}`" for name in order) + " |", "|---" * (len(order) + 2) + "|"]
    for name in problems:
        cells = " | ".join(cell(name, method) for method in order)
        lines.append(f"| `{name}` | {table.loc[table['problem'] == name, 'seed'].nunique()} | {cells} |")
    seconds = ranked.groupby(["method", "problem"])["cpu_proposal"].median().groupby("method").median()
    pairs = {line["method"]: line for line in _pairs(ranked, "gp", order)}
    lines += [
        "",
        "| method | problems | mean place | wins, ties, losses | difference of scores | CPU s |",
        "|---" * 6 + "|",
    ]
    for name in order:
        one = pairs.get(name)
        against = " | " if one is None else (
            f"{one['wins']}, {one['ties']}, {one['losses']} | "
            f"{one['score_gap']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})"
        )  # fmt: skip
        lines.append(f"| `{name}` | {often[name]} | {place[name]:.2f} | {against} | {seconds[name]:.3f} |")
    return "\n".join([*lines, "", *_by_kind(ranked, order)])


def _by_kind(ranked: pd.DataFrame, order: list[str]) -> list[str]:
    """Mean places on kinds of problems, in brackets on how many of them where a method was not ranked on all."""
    places = ranked.groupby(["method", "problem"])["place"].mean()
    lines = ["| method | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name in order:
        cells = []
        for names in KINDS.values():
            there = [problem for problem in names if (ranked["problem"] == problem).any()]
            own = [places[name, problem] for problem in there if (name, problem) in places.index]
            short = f" ({len(own)} of {len(there)})" if len(own) < len(there) else ""
            cells.append(f"{np.mean(own):.2f}{short}" if own else "")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _pairs(table: pd.DataFrame, peer: str, order: list[str]) -> list[dict[str, Any]]:
    """Each method against `peer` on the same problems and seeds; intervals by a paired bootstrap over those pairs."""
    wide = table.pivot_table(index=["problem", "seed"], columns="method", values="loss", aggfunc="first")
    scores = table.pivot_table(index=["problem", "seed"], columns="method", values="score", aggfunc="first")
    rng = np.random.default_rng(0)
    lines = []
    for name in order:
        if name == peer or peer not in wide:
            continue
        both = wide[[name, peer]].dropna()
        gap = (scores[name] - scores[peer]).dropna().to_numpy()
        if not len(both) or not len(gap):
            continue
        means = gap[rng.integers(0, len(gap), (2000, len(gap)))].mean(-1)
        tie = np.isclose(both[name], both[peer], rtol=1e-3, atol=1e-6)
        better = (both[name] < both[peer]) & ~tie
        low, high = np.quantile(means, [0.025, 0.975])
        lines.append({
            "method": name, "pairs": len(both), "wins": int(better.sum()), "ties": int(tie.sum()),
            "losses": int((~better & ~tie).sum()), "score_gap": round(float(gap.mean()), 3),
            "low": round(float(low), 3), "high": round(float(high), 3),
        })  # fmt: skip
    return lines


def _tidy(ax: Axes, title: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(which="both", colors=MUTED, labelsize=8)
    ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)


def _logarithmic(axis: Any, set_scale: Any) -> None:
    """A logarithmic axis with a few plain numbers."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _ranks(table: pd.DataFrame) -> Figure:
    """Mean rank of every method on every problem, as a share of the methods ranked: blue is first, red is last."""
    share = (table["rank"] - 1) / (table["ranked_with"] - 1).clip(lower=1)
    wide = table.assign(share=share).pivot_table(index="method", columns="problem", values="share", aggfunc="mean")
    wide = wide.reindex(columns=list(dict.fromkeys(table["problem"])))
    wide.insert(0, "all", wide.mean(axis=1))
    wide = wide.sort_values("all")
    figure = Figure(figsize=(1.9 + 0.78 * wide.shape[1], 1.5 + 0.33 * len(wide)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(np.ma.masked_invalid(wide.to_numpy()), cmap="RdYlBu_r", vmin=0, vmax=1, aspect="auto", alpha=0.85)
    for i, j in np.ndindex(*wide.shape):
        value = wide.iat[i, j]
        text = "" if math.isnan(value) else f"{value:.2f}"
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color=INK, fontweight="bold" if j == 0 else "normal")
    seeds = table.groupby("problem")["seed"].nunique()
    names = ["mean", *(f"{name}\n{seeds[name]} seed{'s' if seeds[name] > 1 else ''}" for name in wide.columns[1:])]
    ax.set_xticks(range(wide.shape[1]), names, fontsize=7.5, rotation=40, ha="right")
    ax.set_yticks(range(len(wide)), [LABELS[name] for name in wide.index], fontsize=8.5)
    ax.axvline(0.5, color="white", linewidth=3)
    ax.tick_params(length=0, colors=INK)
    ax.spines[:].set_visible(False)
    ax.set_title("Mean rank after the last trial: 0 first of all, 1 last", loc="left", fontsize=10, fontweight="bold")
    return figure


def _traces(table: pd.DataFrame) -> Figure:
    """Median of what was reached against trials, with quartiles, for each problem and method with enough seeds."""
    problems = list(dict.fromkeys(table["problem"]))
    columns = min(4, len(problems))
    lines = math.ceil(len(problems) / columns)
    figure = Figure(figsize=(max(6.2, 3.1 * columns), 2.5 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for ax, name in zip(panels, problems, strict=False):
        part = table[(table["problem"] == name) & ~table["failed"]]
        startup = int(float(part["startup"].iloc[0]))
        instance = PROBLEMS[name](0)
        known = instance.num_objectives == 1 and not math.isnan(instance.best)
        optimum = {int(seed): PROBLEMS[name](int(seed)).best for seed in part["seed"].unique()}
        for method, colour in COLOURS.items():
            own = part[part["method"] == method]
            if not own["rank"].notna().any():  # too few seeds to be compared
                continue
            curves = np.array([
                np.array(json.loads(trace)) - (optimum[seed] if known else 0.0)
                for trace, seed in zip(own["trace"], own["seed"], strict=True)
            ])[:, startup - 1 :]  # fmt: skip
            trials = startup + np.arange(curves.shape[1])
            low, mid, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
            (line,) = ax.plot(trials, mid, color=colour, linewidth=1.4, label=LABELS[method])
            handles.setdefault(LABELS[method], line)
            ax.fill_between(trials, low, high, color=colour, alpha=0.1, linewidth=0)
        several = instance.num_objectives > 1
        _tidy(ax, f"{name}: {'hypervolume' if several else 'regret' if known else 'best value'}")
        ax.set_xlabel("trials", fontsize=8, color=MUTED)
        if known:
            _logarithmic(ax.yaxis, ax.set_yscale)
    for ax in panels[len(problems) :]:
        ax.axis("off")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    return figure


def _surrogates(table: pd.DataFrame) -> Figure | None:
    """Of each surrogate on the first points, the same ones for all: density, coverage; and CPU time of a proposal."""
    part = table[table["nlpd_start"].notna()]
    if part.empty:
        return None
    order = [name for name in LABELS if name in set(part["method"])]
    problems = list(dict.fromkeys(part["problem"]))
    figure = Figure(figsize=(11, 1.4 + 0.36 * len(order)), layout="constrained")
    shows = (
        ("nlpd_start", "NLPD before the first proposal", 1.42, "a constant with the right mean and variance"),
        ("coverage_start", "coverage of 90 % intervals", 0.9, "nominal"),
        ("cpu_proposal", "CPU seconds of a proposal", None, ""),
    )
    marks = [{"marker": mark, "fillstyle": fill} for fill in ("full", "none") for mark in "osDv^<>PX*hpd8"]
    for ax, (column, title, line, meaning) in zip(figure.subplots(1, 3, sharey=True), shows, strict=True):
        medians = part.groupby(["method", "problem"])[column].median()
        for place, method in enumerate(order):
            for name, mark in zip(problems, marks, strict=False):
                if (method, name) in medians.index:
                    value = medians[method, name]
                    value = min(value, 4.0) if column.startswith("nlpd") else value
                    ax.plot(value, place, **mark, color=COLOURS.get(method, MUTED), markersize=5, alpha=0.75,
                            linestyle="none", label=name if place == 0 else None)  # fmt: skip
        if line is not None:
            ax.axvline(line, color="#999999", linewidth=0.8, linestyle="--", label=meaning)
        _tidy(ax, title)
        ax.set_yticks(range(len(order)), [LABELS[name] for name in order], fontsize=8.5, color=INK)
        ax.grid(axis="y", color="#EEEEEE")
        ax.set_axisbelow(True)
        if column == "cpu_proposal":
            _logarithmic(ax.xaxis, ax.set_xscale)
    first = figure.axes[0]
    first.invert_yaxis()
    first.set_xlim(right=4.15)
    found = dict(zip(*reversed(first.get_legend_handles_labels()), strict=True))
    for name, mark in zip(problems, marks, strict=False):
        found.setdefault(name, first.plot([], [], **mark, color=MUTED, markersize=5, linestyle="none")[0])
    names = [*problems, *(name for name in found if name not in problems)]
    figure.legend(
        [found[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False, fontsize=8
    )
    return figure
