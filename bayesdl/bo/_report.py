"""The report of a study: one HTML page that holds everything, pictures included, and needs no network or scripts."""

from __future__ import annotations

import base64
import datetime
import html
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from bayesdl import _storage
from bayesdl._version import __version__
from bayesdl.bo import _figures
from bayesdl.evaluation._page import STYLE
from bayesdl.evaluation.report import machine

if TYPE_CHECKING:
    from bayesdl.bo.study import Study
    from bayesdl.bo.trial import Trial

_ON_BOUNDS = 0.6  # a share of proposals on the edge of the box above which a surrogate deserves suspicion
_MOST_ROWS = 20

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<dl>
$facts
</dl>
</header>
<main>
<section>
<h2>$heading</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Trials">
$table
</div>
<p class="note">$note</p>
</section>
$failures
$pictures
</main>
<footer>Written by bayesdl $version.</footer>
</body>
</html>
"""
)


def write(path: Path, study: Study) -> None:
    """Write the page to `path`, atomically."""
    _storage.write_bytes(path, page(study).encode())


def page(study: Study) -> str:
    """The page as text."""
    trials = study.trials
    several = len(study.directions) > 1
    return _PAGE.substitute(
        title=html.escape(f"{study.name}: {_count(len(trials), 'trial')}"),
        style=STYLE,
        facts=_facts(study, trials),
        heading="Trials of the front" if several else "Best trials",
        table=_table(study, trials),
        note=html.escape(_note(study, trials)),
        failures=_failures(trials),
        pictures=_pictures(study, trials),
        version=html.escape(__version__),
    )


def _facts(study: Study, trials: list[Trial]) -> str:
    states = {state: sum(t.state == state for t in trials) for state in ("complete", "failed", "running", "waiting")}
    best = study.best if len(study.directions) == 1 and not study.space.environment else None
    facts = {
        "Best value": f"{best.value:.8g} (trial {best.number})" if best is not None else "",
        "Recommended": _recommendation(study, trials),
        "Objectives": ", ".join(study.directions),
        "Constraints": ", ".join(study.constraints),
        "Parameters": ", ".join(study.space.names[:12]) + (" …" if len(study.space.names) > 12 else ""),
        "Trials": ", ".join(f"{count} {state}" for state, count in states.items() if count),
        "Cost": f"{study.spent:.6g}" if study.cost is not None else "",
        "Engine": type(study.engine).__name__,
        "Made": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by bayesdl {__version__}",
        "Machine": machine(),
    }
    return "\n".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items() if v)


def _recommendation(study: Study, trials: list[Trial]) -> str:
    """What counts at the point of which the surrogate thinks best, where no single trial shows it."""
    aimed = study.space.fidelities or study.space.environment
    if not aimed or sum(trial.state == "complete" for trial in trials) < 2:
        return ""
    found = study.recommend()
    where = ", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
                      for name, value in found.params.items())  # fmt: skip
    return f"{found.mean:.6g} ± {found.deviation:.2g} at {where}"


def _table(study: Study, trials: list[Trial]) -> str:
    """The best trials, or the front."""
    good = [trial for trial in trials if trial.feasible]
    if len(study.directions) == 1:
        sign = 1.0 if study.directions[0] == "minimize" else -1.0
        exact = [trial for trial in good if trial.exact]
        shown = sorted(exact, key=lambda t: (sign * t.value, t.number))[:_MOST_ROWS]
    else:
        shown = sorted(study.pareto, key=lambda t: t.values)[:_MOST_ROWS]
    names = study.space.names[:12]
    head = ["trial", *study._value_names(), *study.constraints, *names]
    rows = []
    for i, trial in enumerate(shown):
        cells = [_number(v) for v in trial.values] + [_number(trial.constraints[c]) for c in study.constraints]
        mark = ' class="best"' if i == 0 and len(study.directions) == 1 else ""
        cells = [f"<td{mark}>{cells[0]}</td>"] + [f"<td>{c}</td>" for c in cells[1:]]
        cells += [f"<td>{_number(trial.params[name])}</td>" for name in names]
        rows.append(f'<tr><th scope="row">{trial.number}</th>{"".join(cells)}</tr>')
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return html.escape(str(value))


def _note(study: Study, trials: list[Trial]) -> str:
    """What a reader should know before believing the result."""
    said = []
    if not any(trial.feasible for trial in trials):
        said.append("No feasible trial yet.")
    if study.space.environment:
        said.append(f"Values are of single draws of {', '.join(study.space.environment)}, and do not compare.")
    share = bound_share(study, trials)
    if share > _ON_BOUNDS:
        said.append(
            f"{share:.0%} of the proposed coordinates lie on the bounds: the bounds may be too narrow, or the "
            "surrogate may be most uncertain at the edges whatever it sees there (as a ReLU kernel is)."
        )
    points = [tuple(trial.params.items()) for trial in trials if trial.state == "complete"]
    repeats = len(points) - len(set(map(repr, points)))
    if repeats:
        said.append(f"{_count(repeats, 'point')} evaluated more than once.")
    return " ".join(said)


def bound_share(study: Study, trials: list[Trial]) -> float:
    """The share of the coordinates of real numbers, over proposals of the surrogate, that lie on a bound.

    Fidelities and what the environment sets are left out.
    """
    from bayesdl.bo.space import Float
    from bayesdl.interop.optuna import TIMING

    frozen = {t.number: t for t in study.optuna_study.get_trials(deepcopy=False)}
    proposed = [t for t in trials if TIMING in frozen[t.number].system_attrs and t.params]
    pairs = zip(study.space.names, study.space.dimensions, strict=True)
    apart = {*study.space.fidelities, *study.space.environment}
    reals = [(name, dim) for name, dim in pairs if isinstance(dim, Float) and name not in apart]
    hits = [
        min(t.params[name] - dim.low, dim.high - t.params[name]) <= 1e-6 * (dim.high - dim.low)
        for t in proposed
        for name, dim in reals
    ]
    return sum(hits) / len(hits) if hits else 0.0


def _failures(trials: list[Trial]) -> str:
    failed = [trial for trial in trials if trial.state == "failed"]
    if not failed:
        return ""
    items = "".join(
        f"<li><b>trial {t.number}</b><pre>{html.escape(t.error)}\n{html.escape(str(dict(t.params)))}</pre></li>"
        for t in failed[:_MOST_ROWS]
    )
    rest = f"<p>and {len(failed) - _MOST_ROWS} more</p>" if len(failed) > _MOST_ROWS else ""
    return f'<section class="failures"><h2>What failed</h2><ul>{items}</ul>{rest}</section>'


def _pictures(study: Study, trials: list[Trial]) -> str:
    if not any(trial.state == "complete" for trial in trials):
        return ""
    shown = []
    if len(study.directions) == 1:
        caption = "Each dot is a trial in the order of proposal; the line is the best feasible value so far."
        shown.append(("Best value so far", _figures.progress(study), caption))
    else:
        caption = "The front holds the feasible trials that no other beats in every objective."
        shown.append(("Pareto front", _figures.pareto(study), caption))
    if sum(trial.state == "complete" for trial in trials) > 1:
        of = "" if len(study.directions) == 1 else " in value0"
        caption = (
            f"What the surrogate believes along each parameter with the others at the best trial{of} (dashed): mean "
            "and two standard deviations. Grey dots are trials; most lie elsewhere in the other parameters."
        )
        shown.append(("Surrogate through the best point", _figures.slices(study), caption))
    caption = "One line a trial; bright lines are good ones. Axes of logarithmic parameters are logarithmic."
    shown.append(("Parameters and value", _figures.parallel(study), caption))
    caption = "Time of each trial: fitting the engine and maximising the acquisition (CPU), and everything else."
    shown.append(("Time", _figures.timing(study), caption))
    return "\n".join(_figure(title, figure, caption) for title, figure, caption in shown if figure is not None)


def _figure(title: str, figure: Any, caption: str) -> str:
    picture = _figures.png(figure)
    # PNG stores width and height as two big-endian words from byte 16 on; pictures are drawn at 160 dots an inch.
    width, height = (round(int.from_bytes(picture[at : at + 4], "big") * 0.6) for at in (16, 20))
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    alt = html.escape(f"{title}: {caption}", quote=True)
    return (
        f'<section><h2>{html.escape(title)}</h2><figure><img src="{source}" alt="{alt}" width="{width}" '
        f'height="{height}"><figcaption>{html.escape(caption)}</figcaption></figure></section>'
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
