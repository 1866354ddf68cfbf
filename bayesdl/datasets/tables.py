"""A table from a CSV file, strictly: whatever cannot be used is named by its column, its data row and its line."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch

from bayesdl.datasets.base import Loaded
from bayesdl.errors import DataError, fail

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "#n/a", "-", "."}
_WHERE = "read_csv"


class _Table(NamedTuple):
    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]  # the line of the file on which each data row starts


def read_csv(
    path: str | os.PathLike[str], target: str, task: Literal["regression", "classification"] = "regression"
) -> Loaded:
    """Read a CSV file with a header line: one column is the target, all others are numeric inputs.

    The separator may be a comma, semicolon or tab. A column of integers is a regression target unless `task` says
    "classification"; classes may be text and are numbered in sorted order (numbers by value).

    Raises:
        DataError: The file is absent, empty or has fewer than two data rows; a column name is missing, duplicated or
            empty; a row is too long or too short; a cell is missing, infinite or text (column and row are named); the
            target is constant.
    """
    table = _read(Path(path))
    columns = _columns(table, target)
    y_text = [row[table.header.index(target)].strip() for row in table.rows]
    names = [name for name in table.header if name != target]
    x = torch.tensor([[_number(table, i, j) for j in columns] for i in range(len(table.rows))], dtype=torch.float64)
    if task == "regression":
        y = torch.tensor([_number(table, i, table.header.index(target)) for i in range(len(y_text))]).double()
        _reject_constant(table, target, len(set(y.tolist())))
        return Loaded(table.path.stem, x, y, "regression", tuple(names), target)
    for i, cell in enumerate(y_text):
        if cell.lower() in _MISSING:
            _reject_cell(table, i, table.header.index(target), "is missing", "drop the row")
    classes = sorted(set(y_text), key=_class_order)
    _reject_constant(table, target, len(classes))
    number = {name: i for i, name in enumerate(classes)}
    y = torch.tensor([number[cell] for cell in y_text])
    kind: Literal["binary", "multiclass"] = "binary" if len(classes) == 2 else "multiclass"
    return Loaded(table.path.stem, x, y, kind, tuple(names), target, class_names=tuple(classes))


def _read(path: Path) -> _Table:
    if not path.is_file():
        _reject(f"{path} must be a file.", got="a folder" if path.is_dir() else "no such file", fix="check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        _reject(f"{path} must be text in UTF-8.", got=f"byte {error.start} is not", fix="save it as CSV in UTF-8")
    first = text.lstrip("\r\n").partition("\n")[0]
    separator = max(",;\t", key=first.count) if first else ","
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator)
    rows, lines, start = [], [], 1
    for row in reader:
        if any(cell.strip() for cell in row):
            rows.append(row)
            lines.append(start)
        start = reader.line_num + 1
    if not rows:
        _reject(f"{path} must hold a header and data.", got="an empty file", fix="check that it was written")
    header, rows, lines = [cell.strip() for cell in rows[0]], rows[1:], lines[1:]
    if len(rows) < 2:
        got = f"{len(rows)} data row(s) below the header"
        _reject(f"{path} must hold at least two data rows, to fit and to test.", got=got, fix="bring more rows")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            _reject(
                f"{path}: every row must have {len(header)} cells, one a column of the header.",
                got=f"{len(row)} cells in data row {i + 1} (line {lines[i]})",
                fix="quote cells that contain the separator",
            )
    return _Table(path, header, rows, lines)


def _columns(table: _Table, target: str) -> list[int]:
    """Indices of the input columns, after the header has been checked."""
    header = table.header
    if "" in header:
        place = header.index("") + 1
        _reject(f"{table.path}: every column must have a name.", got=f"column {place} has none", fix="name or drop it")
    for name in header:
        if header.count(name) > 1:
            places = ", ".join(str(i + 1) for i, other in enumerate(header) if other == name)
            _reject(f"{table.path}: column names must differ.", got=f"{name!r} in columns {places}", fix="rename one")
    if target not in header:
        _reject(f"{table.path} must have the target column {target!r}.", got=_listed(header), fix="name one of these")
    if len(header) < 2:
        _reject(f"{table.path} must have input columns.", got=f"the target {target!r} alone", fix="add at least one")
    return [j for j, name in enumerate(header) if name != target]


def _number(table: _Table, i: int, j: int) -> float:
    cell = table.rows[i][j].strip()
    if cell.lower() in _MISSING:
        _reject_cell(table, i, j, "is missing", "fill the cell, or drop the row or the column")
    try:
        value = float(cell.replace("_", "x"))  # float() would read 1_000; a table means something else
    except ValueError:
        text = sum(not _is_number(row[j]) for row in table.rows)
        share = f"is text ({cell!r}; {text} of {len(table.rows)} cells of this column are)"
        _reject_cell(table, i, j, share, "encode it as numbers, drop it, or use task='classification' for text classes")
    if not math.isfinite(value):
        _reject_cell(table, i, j, f"is {cell}", "replace the infinite value or drop the row")
    return value


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.strip().lower() in _MISSING
    return True


def _class_order(name: str) -> tuple[bool, float, str]:
    return (False, float(name), name) if _is_number(name) else (True, 0.0, name)


def _reject_cell(table: _Table, i: int, j: int, what: str, fix: str) -> NoReturn:
    place = f"column {table.header[j]!r}, data row {i + 1} (line {table.lines[i]})"
    _reject(f"{table.path}: cells must be finite numbers.", got=f"{place} {what}", fix=fix)


def _reject_constant(table: _Table, target: str, num_values: int) -> None:
    if num_values < 2:
        got = f"column {target!r} holds one value in all {len(table.rows)} rows"
        _reject(
            f"{table.path}: the target must vary, else there is nothing to predict.", got=got, fix="check the column"
        )


def _reject(wanted: str, got: str, fix: str) -> NoReturn:
    fail(DataError, _WHERE, wanted, got=got, fix=fix)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"columns {shown}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
