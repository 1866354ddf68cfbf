"""The report: one HTML page that holds everything, pictures included, and needs neither network nor scripts."""

from __future__ import annotations

import base64
import datetime
import html
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bayesdl import _storage
from bayesdl._version import __version__
from bayesdl.evaluation import figures
from bayesdl.evaluation._page import HOW_TO_READ, STYLE, TEMPLATE
from bayesdl.evaluation.calibration import pit_calibration_error_band
from bayesdl.evaluation.runner import Problem, Row
from bayesdl.evaluation.table import Table, summarize

__all__ = ["machine", "page", "write"]

# What the diagnostics table shows, where an engine has it: key, name, and how to print it.
_DIAGNOSTICS = (
    ("rhat", "R-hat", "{:.3f}"),
    ("ess_bulk", "ESS bulk", "{:.0f}"),
    ("ess_tail", "ESS tail", "{:.0f}"),
    ("divergences", "divergences", "{:.0f}"),
    ("acceptance_rate", "acceptance", "{:.2f}"),
    ("step_size", "step size", "{:.3g}"),
    ("jitter", "jitter", "{:.1e}"),
    ("converged", "converged", "{}"),
    ("num_gradients", "gradients", "{:.0f}"),
)


def write(
    path: Path, problem: Problem, rows: Sequence[Row], descriptions: Mapping[str, str], reference: str | None, seed: int
) -> None:
    """Write the page to `path`, atomically.

    Args:
        path: Where to; folders are made.
        problem: The data set and its splits.
        rows: What `runner.run` returned.
        descriptions: Engine -> one line of what it is.
        reference: The engine that distances are measured to, or None.
        seed: Seed of the first split.
    """
    _storage.write_bytes(path, page(problem, rows, descriptions, reference, seed).encode())


def page(
    problem: Problem, rows: Sequence[Row], descriptions: Mapping[str, str], reference: str | None, seed: int
) -> str:
    """The page as text; see `write`."""
    table = summarize(rows, reference)
    good = [row for row in rows if row.status != "failed"]
    palette = figures.colours(list(table.cells))
    parts = {
        "style": STYLE,
        "title": f"{html.escape(problem.name)}: {len(table.cells)} posteriors compared",
        "facts": _facts(problem, seed),
        "table": _table(table, reference, palette),
        "note": _note(problem, good, reference),
        "failures": _failures(rows),
        "pictures": _pictures(problem, good, palette) if good else "",
        "diagnostics": _diagnostics(good, descriptions, palette),
        "how": HOW_TO_READ["regression" if problem.task == "regression" else "classification"],
        "version": html.escape(__version__),
    }
    return TEMPLATE.substitute(parts)


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> str:
    """Processor, threads, torch and Python, in one line."""
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads != 1 else ''}"
    return f"{processor()}, {cores}{device}; torch {torch.__version__}, Python {platform.python_version()}"


def _facts(problem: Problem, seed: int) -> str:
    n, d = problem.x.shape
    tests = sorted({int(test.sum()) for test in problem.test})
    size = f"{tests[0]}" if len(tests) == 1 else f"{tests[0]} to {tests[-1]}"
    target = problem.target_name
    if problem.task != "regression":
        target += f", {len(problem.class_names)} classes"
    facts = {
        "Data": f"{problem.name}: {n} rows, {d} inputs",
        "Target": target,
        "Splits": f"{len(problem.test)}, {size} test points" + (" each" if len(problem.test) > 1 else ""),
        "Seed": str(seed),
        "Made": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by bayesdl {__version__}",
        "Machine": machine(),
    }
    return "\n".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())


def _table(table: Table, reference: str | None, palette: Mapping[str, str]) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    body = []
    for engine, cells in table.cells.items():
        name = f'<i style="background:{palette[engine]}"></i>{html.escape(engine)}'
        if engine == reference:
            name += " <small>reference</small>"
        if table.failures[engine]:
            name += f' <small class="bad">failed on {table.failures[engine]} of {table.num_splits}</small>'
        row = []
        for column in table.columns:
            best = column in cells and cells[column].is_best
            words = table.words(engine, column)
            row.append(
                f'<td class="best">{words}<span class="unseen"> (best)</span></td>' if best else f"<td>{words}</td>"
            )
        body.append(f'<tr><th scope="row">{name}</th>{"".join(row)}</tr>')
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _note(problem: Problem, good: Sequence[Row], reference: str | None) -> str:
    notes = ["The best value of each column is marked."]
    if len(problem.test) > 1:
        notes.append(
            f"Means over {len(problem.test)} splits ± standard error; splits share training data, "
            "so the errors are a guide and not a test."
        )
    if problem.task == "regression" and good:
        n = min(row.arrays["y"].numel() for row in good)
        mean, upper = pit_calibration_error_band(n)
        notes.append(
            f"A perfectly calibrated model shows a PIT error of about {mean:.3f} on {n} test points, "
            f"and up to {upper:.3f} in 95 of 100 cases: smaller differences mean nothing."
        )
    if reference is not None and good:
        kind = (
            f"Wasserstein-2, in units of {problem.target_name}" if problem.task == "regression" else "total variation"
        )
        notes.append(f"Distances are to {reference} ({kind}, averaged over test points).")
    return html.escape(" ".join(notes))


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.status == "failed"]
    if not failed:
        return ""
    items = "".join(
        f"<li><b>{html.escape(row.engine)}</b>, split {row.split}<pre>{html.escape(row.error)}</pre></li>"
        for row in failed
    )
    return f'<section class="failures"><h2>What failed</h2><ul>{items}</ul></section>'


def _pictures(problem: Problem, good: Sequence[Row], palette: Mapping[str, str]) -> str:
    engines = list(dict.fromkeys(row.engine for row in good))
    first = {name: next(row for row in good if row.engine == name) for name in engines}
    names = ", ".join(engines)
    if problem.task == "regression":
        every = {name: [row.arrays["pit"].flatten() for row in good if row.engine == name] for name in engines}
        pits = {name: torch.cat(values) for name, values in every.items()}
        shown = [
            _figure(
                "Predictive intervals",
                figures.intervals(first, palette, problem.target_name),
                f"Predictions of {names} for test points, with 50% and 90% intervals",
                "Each panel shows the test points of the first split in the order of that engine's prediction.",
            ),
            _figure(
                "Calibration",
                figures.calibration(pits, palette),
                f"Calibration curves of {names} with the 95% band of a calibrated model",
                "A curve on the diagonal keeps its word; inside the grey band chance alone explains the difference.",
            ),
            _figure(
                "PIT histograms",
                figures.pit_histograms(pits, palette),
                f"Histograms of PIT values of {names} with the 95% band of a calibrated model",
                "Flat is calibrated; a U means intervals too narrow, a hump too wide, a slope a biased prediction.",
            ),
        ]
    else:
        shown = [
            _figure(
                "Reliability",
                figures.reliability({e: [row for row in good if row.engine == e] for e in engines}, palette),
                f"Accuracy against confidence of {names}, and histograms of confidence",
                "Points on the diagonal: of the predictions made with 80% confidence, 80% are right. Bars below: how "
                "often each confidence occurs. Error bars are 95% intervals of the accuracy in a bin.",
            )
        ]
    traced = figures.convergence(first, palette)
    if traced is not None:
        alt = f"What {names} traced while fitting the first split, one line a chain, member or start"
        caption = (
            "One line a chain, member or start. Chains should look like one level, grassy band that all share; losses "
            "and likelihoods should have flattened. The first tenth may leave the picture."
        )
        shown.append(_figure("Convergence", traced, alt, caption))
    return "\n".join(shown)


def _figure(title: str, png: bytes, alt: str, caption: str) -> str:
    # PNG stores width and height as two big-endian words from byte 16 on; pictures are drawn at 160 dots an inch.
    width, height = (round(int.from_bytes(png[at : at + 4], "big") * 0.6) for at in (16, 20))
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return (
        f"<section><h2>{html.escape(title)}</h2><figure>"
        f'<img src="{source}" alt="{html.escape(alt, quote=True)}" width="{width}" height="{height}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure></section>"
    )


def _diagnostics(good: Sequence[Row], descriptions: Mapping[str, str], palette: Mapping[str, str]) -> str:
    first = {row.engine: row for row in reversed(good)}
    shown = [item for item in _DIAGNOSTICS if any(row.diagnostics.get(item[0]) is not None for row in first.values())]
    engines = list(dict.fromkeys(row.engine for row in good))
    head = "".join(f'<th scope="col">{name}</th>' for _, name, _ in shown)
    body = "".join(
        f'<tr><th scope="row"><i style="background:{palette[name]}"></i>{html.escape(name)}</th>'
        + "".join(f"<td>{_worst(good, name, key, form)}</td>" for key, _, form in shown)
        + "</tr>"
        for name in engines
    )
    told = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(descriptions.get(name, ''))}</li>" for name in engines
    )
    return f'<ul class="engines">{told}</ul>' + _scroll(head, body) + _warnings(good)


def _scroll(head: str, body: str) -> str:
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Diagnostics">{table}</div>'


def _worst(good: Sequence[Row], engine: str, key: str, form: str) -> str:
    """The value of a diagnostic; over several splits the worst, largest or smallest as the key demands."""
    values = [_flat(row.diagnostics.get(key)) for row in good if row.engine == engine]
    numbers = [v for value in values for v in value]
    if not numbers:
        return "–"
    if all(isinstance(v, bool) for v in numbers):
        return "yes" if all(numbers) else "no"
    worst = min if key in ("ess_bulk", "ess_tail", "acceptance_rate", "step_size") else max
    return form.format(worst(numbers)) if worst(numbers) != 0 else "0"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [v for item in value for v in _flat(item)]
    return [value] if isinstance(value, (bool, int, float)) else []


def _warnings(good: Sequence[Row]) -> str:
    said: dict[tuple[str, str], list[int]] = {}
    for row in good:
        for text in row.warnings:
            said.setdefault((row.engine, text), []).append(row.split)
    if not said:
        return '<p class="note">No engine warned of anything.</p>'
    items = "".join(
        f"<li><b>{html.escape(engine)}</b>, split {', '.join(map(str, where))}: {html.escape(text)}</li>"
        for (engine, text), where in said.items()
    )
    return f'<ul class="warnings">{items}</ul>'
