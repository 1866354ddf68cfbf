"""Tables that are filled run by run: what a CSV file holds is not computed again, and a kill loses one run at most."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

Row = dict[str, str]


def complete(out: Path, key: Callable[[Row], object], runs: Mapping[object, Callable[[], Row]]) -> None:
    """Do the runs that `out` lacks, and write it after each: `key` is that of a row of the file among `runs`."""
    rows: list[Row] = []
    if out.exists():
        with out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    there = {key(row) for row in rows}
    for name, run in runs.items():
        if name in there:
            continue
        rows.append(run())
        print(rows[-1], flush=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
