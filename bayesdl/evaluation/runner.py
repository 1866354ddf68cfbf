"""Fit engines on train-test splits, score them, and keep every finished fit on disk, so that a killed run resumes.

Of each job (one engine on one split) three files remain under the output folder: `posteriors/NAME-splitI.bdl`,
`rows/NAME-splitI.safetensors` (what the pictures need) and, written last, `rows/NAME-splitI.json` (scores, diagnostics
and a fingerprint). A job is finished when the JSON is there and its fingerprint (data, split, engine, seed, version)
still matches; it is then read, not fitted again. All files are replaced atomically.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _storage
from bayesdl._version import __version__
from bayesdl.errors import BayesdlError
from bayesdl.evaluation import calibration
from bayesdl.evaluation.compare import DISTANCE, SECONDS, Evaluation, distance, evaluate

__all__ = ["QUANTILES", "Problem", "Row", "run"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_TRACE_POINTS = 500


class Problem(NamedTuple):
    """A data set with its splits: x (n, d), y (n,), test (num_splits, n) True for test points."""

    name: str
    x: Tensor
    y: Tensor
    task: str
    test: Tensor
    target_name: str
    class_names: tuple[str, ...] = ()


class Row(NamedTuple):
    """One engine on one split.

    Attributes:
        engine: Name of the engine.
        split: Number of the split, from 1.
        status: "fitted", "reused" or "failed".
        scores: Column -> value; empty for a failed fit.
        diagnostics: The posterior's diagnostics as plain JSON values.
        warnings: What was warned of during the fit.
        error: What went wrong, empty otherwise.
        arrays: y, and for regression pit, mean, quantiles (5, s), profile; for labels probs (s, K).
    """

    engine: str
    split: int
    status: str
    scores: dict[str, float]
    diagnostics: dict[str, Any]
    warnings: list[str]
    error: str
    arrays: dict[str, Tensor]


def run(
    problem: Problem,
    engines: Mapping[str, Any],
    out: Path,
    *,
    seed: int = 0,
    reference: str | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> list[Row]:
    """Fit and score every engine on every split; rows in the order split by split.

    Split i is fitted with seed + i - 1. An engine that raises is reported in its row and the others go on.

    Args:
        problem: Data and splits.
        engines: Name -> engine; names become file names.
        out: Output folder.
        seed: Seed of the first split.
        reference: The engine that the others are measured against.
        fresh: Fit again what is there already.
        progress: Tell on stderr what is going on: bars on a terminal, lines elsewhere.
    """
    from tqdm import tqdm

    rows, num_splits = [], len(problem.test)
    show = progress and sys.stderr.isatty()  # a bar in a log file is noise; there, a line before and after each fit
    with tqdm(total=num_splits * len(engines), file=sys.stderr, disable=not show, unit="fit", leave=False) as bar:
        for split in range(1, num_splits + 1):
            for name, engine in engines.items():
                bar.set_description(f"{name}, split {split} of {num_splits}")
                job = _Job(problem, name, engine, split, seed + split - 1, out)
                row = None if fresh else job.load()
                if row is None:
                    if progress and not show:
                        print(f"{_title(name, split, num_splits)}: fitting", file=sys.stderr, flush=True)
                    row = job.fit(show)
                rows.append(row)
                if progress:
                    tqdm.write(_line(row, num_splits), file=sys.stderr)
                bar.update(1)
    return [_with_distance(row, rows, reference, problem.task) for row in rows]


class _Job(NamedTuple):
    problem: Problem
    name: str
    engine: Any
    split: int
    seed: int
    out: Path

    @property
    def stem(self) -> str:
        return f"{self.name}-split{self.split}"

    @property
    def fingerprint(self) -> str:
        """A digest of everything that determines the result."""
        problem, digest = self.problem, hashlib.sha256()
        for tensor in (problem.x, problem.y, problem.test[self.split - 1]):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        told = (problem.task, problem.class_names, repr(_silent(self.engine)), self.seed, __version__)
        digest.update(repr((*told, str(problem.x.device))).encode())
        return digest.hexdigest()

    def load(self) -> Row | None:
        """The finished job, or None where there is none of this fingerprint."""
        try:
            record = json.loads((self.out / "rows" / f"{self.stem}.json").read_text(encoding="utf-8"))
            if (
                record["fingerprint"] != self.fingerprint
                or not (self.out / "posteriors" / f"{self.stem}.bdl").is_file()
            ):
                return None
            _, arrays = _storage.read(self.out / "rows" / f"{self.stem}.safetensors")
            scores = {name: math.nan if value is None else value for name, value in record["scores"].items()}
            return Row(self.name, self.split, "reused", scores, record["diagnostics"], record["warnings"], "", arrays)
        except (OSError, ValueError, KeyError, BayesdlError):
            return None  # absent, cut short or foreign: fit again

    def fit(self, show: bool) -> Row:
        """Fit, score and store; whatever the engine raises becomes a failed row."""
        test = self.problem.test[self.split - 1]
        x, y = self.problem.x, self.problem.y
        engine = dataclasses.replace(self.engine, progress=True) if show and _can_show(self.engine) else self.engine
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                posterior = engine.fit(x[~test], y[~test], seed=self.seed)
                seconds = time.perf_counter() - began
                predictive = posterior.predict(x[test])
                found = evaluate(predictive, y[test])
                arrays = _arrays(predictive, y[test], found)
            except Exception as error:
                return self._failed(error, [])
        diagnostics = _plain(dict(posterior.diagnostics))
        scores = {**found.scores, SECONDS: float(diagnostics.get("seconds") or seconds)}
        said = sorted({f"{type(w.message).__name__}: {w.message}" for w in caught if _concerns_user(w)})
        row = Row(self.name, self.split, "fitted", scores, diagnostics, said, "", arrays)
        return self._stored(row, posterior)

    def _stored(self, row: Row, posterior: Any) -> Row:
        """Write the three files, the JSON last."""
        (self.out / "posteriors").mkdir(parents=True, exist_ok=True)
        record = {
            "fingerprint": self.fingerprint,
            "version": __version__,
            "data": self.problem.name,
            "seed": self.seed,
            "engine": repr(_silent(self.engine)),
            **{key: _plain(getattr(row, key)) for key in ("scores", "diagnostics", "warnings")},
        }
        posterior.save(self.out / "posteriors" / f"{self.stem}.bdl")
        _storage.write(self.out / "rows" / f"{self.stem}.safetensors", {"kind": "row"}, row.arrays)
        text = json.dumps(record, indent=1, allow_nan=False)
        _storage.write_bytes(self.out / "rows" / f"{self.stem}.json", text.encode())
        return row

    def _failed(self, error: Exception, said: list[str]) -> Row:
        if isinstance(error, BayesdlError):
            text = str(error)
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        with contextlib.suppress(OSError):
            (self.out / "rows" / f"{self.stem}.json").unlink(missing_ok=True)
        return Row(self.name, self.split, "failed", {}, {}, said, text, {})


def _arrays(predictive: Distribution, y: Tensor, found: Evaluation) -> dict[str, Tensor]:
    """What the pictures and the distance need, on the CPU."""
    with torch.no_grad():
        arrays = {"y": y, "profile": found.profile}
        if not found.is_classification:
            arrays["pit"] = calibration.pit(predictive, y)
            arrays["mean"] = predictive.mean
            arrays["quantiles"] = predictive.quantile(torch.tensor(QUANTILES))
    return {name: value.detach().cpu().contiguous() for name, value in arrays.items()}


def _with_distance(row: Row, rows: list[Row], reference: str | None, task: str) -> Row:
    if reference is None or row.status == "failed":
        return row
    value = math.nan
    for other in rows:
        if other.engine == reference and other.split == row.split and other.status != "failed":
            pair = (Evaluation({}, r.arrays["profile"], task != "regression") for r in (row, other))
            value = distance(*pair)
    scores = {name: v for name, v in row.scores.items() if name != SECONDS}
    return row._replace(scores={**scores, DISTANCE: value, SECONDS: row.scores[SECONDS]})


def _line(row: Row, num_splits: int) -> str:
    title = _title(row.engine, row.split, num_splits)
    if row.status == "failed":
        return f"{title}: failed\n  " + row.error.replace("\n", "\n  ")
    seconds = f"{row.scores[SECONDS]:.1f} s"
    done = f"reused (fitted before in {seconds})" if row.status == "reused" else f"fitted in {seconds}"
    return "\n".join([f"{title}: {done}", *(f"  {text}" for text in row.warnings)])


def _title(engine: str, split: int, num_splits: int) -> str:
    return f"{engine}, split {split} of {num_splits}" if num_splits > 1 else engine


def _can_show(engine: Any) -> bool:
    return dataclasses.is_dataclass(engine) and any(f.name == "progress" for f in dataclasses.fields(engine))


def _silent(engine: Any) -> Any:
    """The engine without its progress bar, which has no part in the result."""
    return dataclasses.replace(engine, progress=False) if _can_show(engine) else engine


def _concerns_user(warning: warnings.WarningMessage) -> bool:
    return not issubclass(warning.category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))


def _plain(value: Any) -> Any:
    """Plain JSON: tensors and arrays as lists, NaN and infinities as None, long traces thinned."""
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = list(value)
        if len(items) > _TRACE_POINTS:
            items = [items[round(i * (len(items) - 1) / (_TRACE_POINTS - 1))] for i in range(_TRACE_POINTS)]
        return [_plain(item) for item in items]
    return str(value)
