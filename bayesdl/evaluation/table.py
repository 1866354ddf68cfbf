"""Results as a table: means and standard errors over splits, the best value of each column, and plain text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from bayesdl.evaluation.compare import DISTANCE
from bayesdl.evaluation.runner import Row

__all__ = ["Cell", "Table", "csv_text", "summarize", "text"]


class Cell(NamedTuple):
    """One score of one engine: mean over splits, its standard error (NaN for one split), and whether it is the best."""

    mean: float
    error: float
    is_best: bool = False


class Table(NamedTuple):
    """Engine -> column -> cell, in order; a column has one number of decimals."""

    columns: tuple[str, ...]
    cells: dict[str, dict[str, Cell]]
    decimals: dict[str, int]
    failures: dict[str, int]
    num_splits: int

    def words(self, engine: str, column: str) -> str:
        """A cell as text: "3.21 ± 0.04", "3.21", or "–" where there is no value."""
        cell = self.cells[engine].get(column)
        if cell is None or math.isnan(cell.mean):
            return "–"
        mean = _number(cell.mean, self.decimals[column])
        return mean if math.isnan(cell.error) else f"{mean} ± {_number(cell.error, self.decimals[column])}"


def summarize(rows: Sequence[Row], reference: str | None = None) -> Table:
    """Means over the splits that succeeded; best marks go to the lowest value, save where another value is wanted."""
    engines = list(dict.fromkeys(row.engine for row in rows))
    columns = tuple(dict.fromkeys(name for row in rows for name in row.scores))
    cells: dict[str, dict[str, Cell]] = {engine: {} for engine in engines}
    for engine in engines:
        for column in columns:
            values = [row.scores[column] for row in rows if row.engine == engine and column in row.scores]
            if values and not (column == DISTANCE and engine == reference):  # 0 by definition
                cells[engine][column] = Cell(*_mean_and_error(values))
    for column in columns:
        _mark_best(cells, column)
    failures = {e: sum(row.engine == e and row.status == "failed" for row in rows) for e in engines}
    decimals = {column: _decimals([c[column].mean for c in cells.values() if column in c]) for column in columns}
    return Table(columns, cells, decimals, failures, max((row.split for row in rows), default=0))


def text(table: Table, width: int = 120) -> str:
    """Aligned plain text: engines down, or across where the table would be wider than `width`; * marks the best."""
    engines = list(table.cells)
    shown = {
        (e, c): table.words(e, c) + ("*" if c in table.cells[e] and table.cells[e][c].is_best else " ")
        for e in engines
        for c in table.columns
    }
    down = [["", *(c + " " for c in table.columns)], *([e, *(shown[e, c] for c in table.columns)] for e in engines)]
    grid = _wrap_header(down)
    if max(map(len, _lines(grid))) > width:
        grid = [["", *(e + " " for e in engines)], *([c, *(shown[e, c] for e in engines)] for c in table.columns)]
    notes = ["* best value of a score"]
    if table.num_splits > 1:
        notes.append(f"mean ± standard error over {table.num_splits} splits")
    lines = [*_lines(grid), "", "; ".join(notes)]
    lines += [f"{e}: failed on {k} of {table.num_splits} split(s)" for e, k in table.failures.items() if k]
    return "\n".join(lines)


def csv_text(rows: Sequence[Row]) -> str:
    """One row an engine and split with every score at full precision; failed fits have empty scores and say why."""
    columns = tuple(dict.fromkeys(name for row in rows for name in row.scores))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["engine", "split", "status", *columns, "error"])
    for row in rows:
        values = [_full(row.scores.get(column)) for column in columns]
        status = "failed" if row.status == "failed" else "ok"
        writer.writerow([row.engine, row.split, status, *values, row.error.replace("\n", " ")])
    return out.getvalue()


def _mark_best(cells: dict[str, dict[str, Cell]], column: str) -> None:
    """Mark the best of a column: nearest to the level for coverage, highest accuracy, lowest otherwise."""

    def badness(cell: Cell) -> float:
        if column.startswith("coverage"):
            return abs(cell.mean - float(column.split()[1].rstrip("%")) / 100)
        return -cell.mean if column == "accuracy" else cell.mean

    able = {e: c[column] for e, c in cells.items() if column in c and not math.isnan(c[column].mean)}
    if len(able) > 1:
        least = min(map(badness, able.values()))
        for engine, cell in able.items():
            cells[engine][column] = cell._replace(is_best=badness(cell) <= least)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _decimals(values: list[float]) -> int:
    """Decimals that give the largest value three or four digits; -1 for the scientific form."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if largest == 0:
        return 3
    digits = 2 - math.floor(math.log10(largest))
    return -1 if digits > 6 or digits < -4 else min(max(digits, 0), 3 if largest >= 0.01 else 6)


def _number(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2e}" if decimals < 0 else f"{value:.{decimals}f}"


def _full(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(float(value))


def _wrap_header(grid: list[list[str]]) -> list[list[str]]:
    """Split two-word headers over two lines, so that columns stay narrow."""
    words = [name.strip().split(" ", 1) for name in grid[0]]
    if all(len(w) == 1 for w in words):
        return grid
    upper = [w[0] + " " if len(w) > 1 else "" for w in words]
    lower = [(w[1] if len(w) > 1 else w[0]) + " " for w in words]
    return [upper, lower, *grid[1:]]


def _lines(grid: list[list[str]]) -> list[str]:
    widths = [max(len(row[j]) for row in grid) for j in range(len(grid[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in grid
    ]
