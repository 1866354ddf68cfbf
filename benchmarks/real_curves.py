"""Real learning curves: validation accuracy of scikit-learn classifiers over the size of the training set.

From the learning-curve database (Mohr, Viering, Loog, van Rijn, 2022), the PyPI package lcdb: 20 learners on 246 data
sets of OpenML at sizes 16, 23, 32, 45, 64, ..., each sqrt 2 times the one before. A curve here is one run (that of the
first seeds), with at least 12 sizes. To the network `learning-curve`, which knows epochs, the k-th size is the k-th
epoch; the network of `recipes/learning_curve_size.py` was trained on such sizes.

Rules without a network:

    last value         N(y_n, s^2) with s^2 the mean square of y_j - y_n over curves of other data sets, for each n, j
    power law          c - a t^-alpha by least squares, 0 <= c <= 1, with the spread of its residuals
    calibrated power law   the same curve, with the spread of its errors in curves of other data sets, for each n, j

Early stopping: learners come one after another, in random order, to find the one with the best final accuracy. Each
trains on growing sizes, and is given up after the fourth or a later one where P(final > best final so far) is below
0.05 (or 0.01, or 0.2). Costs are the recorded seconds of training at all sizes that were run. "last value alone" gives
up where y_n is below the best.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bayesdl as bdl
from bayesdl.priors.tasks import LearningCurves

SIZES = LearningCurves(axis="size", horizon=36)
RATIO = SIZES.ratio
CUTS = (5, 8, 12)
SAMPLED, LEAST, FIRST = 500, 12, 4
ORDERS, GIVE_UP = 3, (0.01, 0.05, 0.2)
_FLOOR = 0.005  # of the spread of residuals of a power law: few points may fit by chance
_SLOPE = math.sqrt(12.0)
_EXPONENTS = np.geomspace(0.02, 5.0, 60)


@dataclass(frozen=True)
class Table:
    """N curves; `score` and `seconds` are (N, 36), NaN behind the `length` of each."""

    score: np.ndarray
    seconds: np.ndarray
    length: np.ndarray
    dataset: np.ndarray
    learner: np.ndarray


@dataclass(frozen=True)
class Law:
    """Mixtures of Gaussians for accuracies: weights, loc and scale, each (..., M)."""

    weights: np.ndarray
    loc: np.ndarray
    scale: np.ndarray

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        """Log density."""
        from scipy.special import logsumexp

        square = ((y[..., None] - self.loc) / self.scale) ** 2
        return logsumexp(-0.5 * square - np.log(self.scale) - 0.5 * math.log(2 * math.pi), axis=-1, b=self.weights)

    def above(self, y: np.ndarray | float) -> np.ndarray:
        """P(value > y)."""
        from scipy.special import ndtr

        return (self.weights * ndtr((self.loc - np.asarray(y)[..., None]) / self.scale)).sum(-1)

    @property
    def mean(self) -> np.ndarray:
        """Means."""
        return (self.weights * self.loc).sum(-1)


def load(folder: Path | None) -> Table | None:
    """The curves from `folder` or from the installed package, or None where there is neither."""
    import pandas as pd

    if folder is None:
        spec = importlib.util.find_spec("lcdb")
        if spec is None or not spec.submodule_search_locations:
            print("no lcdb: pip install --no-deps lcdb, or --lcdb FOLDER; real curves are left out")
            return None
        folder = Path(next(iter(spec.submodule_search_locations)))
    columns = ["openmlid", "learner", "size_train", "outer_seed", "inner_seed", "traintime", "score_valid"]
    frame = pd.read_csv(folder / "database-accuracy.csv", usecols=columns)
    frame = frame[(frame.outer_seed == 0) & (frame.inner_seed == 0)]
    place = np.rint(2 * np.log2(frame.size_train / 16)).astype(int)
    frame = frame.assign(place=place)[frame.size_train == np.rint(16 * RATIO**place).astype(int)]
    score, seconds, names = [], [], []
    for name, curve in frame.groupby(["openmlid", "learner"]):
        curve = curve.sort_values("place")
        if len(curve) >= LEAST and (curve.place.to_numpy() == np.arange(len(curve))).all():
            score.append(np.pad(curve.score_valid.to_numpy(), (0, 36 - len(curve)), constant_values=np.nan))
            seconds.append(np.pad(curve.traintime.to_numpy(), (0, 36 - len(curve)), constant_values=np.nan))
            names.append(name)
    dataset, learner = (np.array(column) for column in zip(*names, strict=True))
    score = np.stack(score)
    return Table(score, np.stack(seconds), (~np.isnan(score)).sum(-1), dataset, learner)


def network_law(engine: bdl.PFN, prior: LearningCurves, score: np.ndarray, places: np.ndarray) -> Law:
    """What a network says at places (N, s) after the first scores (N, n)."""
    n = score.shape[1]

    def coordinate(place: Tensor) -> Tensor:
        t = place + 1.0 if prior.axis == "epoch" else RATIO**place
        return prior.coordinate(t).float().unsqueeze(-1)

    y = prior.target(torch.from_numpy(score)).float()
    x = coordinate(torch.arange(n, dtype=torch.float64)).expand(len(score), n, 1)
    law = engine.fit(x, y).predict(coordinate(torch.from_numpy(places).double()))
    weights, loc, scale = (part.double().numpy() for part in (law.weights, law.loc, law.scale))
    return Law(weights, 0.5 + loc / _SLOPE, scale / _SLOPE)


def power_law(score: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of c - a t^-alpha for rows of scores (N, n): values at places (N, s), spread of residuals (N)."""
    n = score.shape[1]
    best = np.full(len(score), np.inf)
    fitted = np.empty(places.shape)
    for alpha in _EXPONENTS:
        b = RATIO ** (-alpha * np.arange(n))
        centred = b - b.mean()
        for clip in (False, True):  # where c would leave [0, 1], the best a for c at the end of it
            a = -(score @ centred) / (centred @ centred)
            c = score.mean(-1) + a * b.mean()
            if clip:
                c = c.clip(0.0, 1.0)
                a = ((c[:, None] - score) @ b) / (b @ b)
            error = np.square(score - c[:, None] + a[:, None] * b).sum(-1)
            better = (error < best) & (c >= 0.0) & (c <= 1.0)
            best = np.where(better, error, best)
            values = c[:, None] - a[:, None] * RATIO ** (-alpha * places)
            fitted = np.where(better[:, None], values, fitted)
    return fitted, np.maximum(np.sqrt(best / max(1, n - 3)), _FLOOR)


def spread_elsewhere(errors: np.ndarray, dataset: np.ndarray) -> np.ndarray:
    """Root mean square of errors (N, s), NaN where there is none, over the rows of other data sets: (N, s)."""
    _, group = np.unique(dataset, return_inverse=True)
    square, count = np.nan_to_num(errors**2), (~np.isnan(errors)).astype(float)
    own = [np.zeros((group.max() + 1, errors.shape[1])) for _ in range(2)]
    for total, part in zip(own, (square, count), strict=True):
        np.add.at(total, group, part)
    others = [part.sum(0) - total[group] for total, part in zip(own, (square, count), strict=True)]
    return np.sqrt(others[0] / np.maximum(others[1], 1.0)).clip(1e-3)


def normal(loc: np.ndarray, scale: np.ndarray) -> Law:
    """One Gaussian each."""
    return Law(np.ones((*loc.shape, 1)), loc[..., None], np.broadcast_to(scale, loc.shape)[..., None])


def laws(engines: dict[str, Any], table: Table, rows: np.ndarray, n: int, places: np.ndarray) -> dict[str, Law]:
    """What each rule says at places (rows, s), all n or above, after the first n scores of those rows."""
    fit, spread = power_law(table.score[:, :n], np.tile(np.arange(n, 36), (len(table.score), 1)))
    gone = table.length <= n
    last = np.where(gone[:, None], np.nan, table.score[:, n:] - table.score[:, n - 1 : n])
    missed = np.where(gone[:, None], np.nan, table.score[:, n:] - fit)
    found = {
        name: network_law(engine, prior, table.score[rows, :n], places) for name, (engine, prior) in engines.items()
    }
    at = (rows[:, None], places - n)
    found["last value"] = normal(
        np.broadcast_to(table.score[rows, n - 1 : n], places.shape), spread_elsewhere(last, table.dataset)[at]
    )
    found["power law"] = normal(fit[at], spread[rows, None])
    found["calibrated power law"] = normal(fit[at], spread_elsewhere(missed, table.dataset)[at])
    return found


def forecasts(engines: dict[str, Any], table: Table) -> list[dict[str, Any]]:
    """Log scores of what follows, error and coverage of the final value, for some hundred curves."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(table.length))[:SAMPLED])
    told = []
    for n in CUTS:
        rows = chosen[table.length[chosen] >= n + 4]
        y, final = table.score[rows, n:], table.length[rows] - 1 - n
        at = np.arange(len(rows))
        scores = {}
        places = np.tile(np.arange(n, 36), (len(rows), 1))
        for name, law in laws(engines, table, rows, n, places).items():
            scores[name] = np.nanmean(law.log_prob(y), -1)
            end = Law(law.weights[at, final], law.loc[at, final], law.scale[at, final])
            level = 1.0 - end.above(y[at, final])
            row = {"curves": "real", "known": n, "method": name, "num_curves": len(rows)}
            row |= {"log_score": f"{scores[name].mean():.3f}", "median_log_score": f"{np.median(scores[name]):.3f}"}
            gain = scores["network"] - scores[name]
            row["network_gain"] = f"{gain.mean():.3f}"
            row["gain_half_width_95"] = f"{_half_width(gain, table.dataset[rows]):.3f}"
            row |= {"final_error": f"{np.abs(end.mean - y[at, final]).mean():.4f}"}
            told.append({**row, "final_in_90": f"{((level > 0.05) & (level < 0.95)).mean():.3f}"})
    return told


def _half_width(values: np.ndarray, dataset: np.ndarray) -> float:
    """Of the 95 % interval of the mean, curves of one data set being alike."""
    centred = values - values.mean()
    totals = [centred[dataset == name].sum() for name in np.unique(dataset)]
    return 1.96 * float(np.sqrt(np.square(totals).sum())) / len(values)


def finals(engines: dict[str, Any], table: Table) -> dict[str, Law]:
    """What each rule says of the final value after n = 0 .. 35 scores: laws (N, 36), NaN where it says nothing."""
    parts: dict[str, Law] = {}
    for n in range(FIRST, int(table.length.max())):
        rows = np.flatnonzero(table.length > n)
        for name, law in laws(engines, table, rows, n, table.length[rows, None] - 1).items():
            if name not in parts:
                blank = np.full((*table.score.shape, law.loc.shape[-1]), np.nan)
                parts[name] = Law(blank.copy(), blank.copy(), blank.copy())
            for field in ("weights", "loc", "scale"):
                getattr(parts[name], field)[rows, n] = getattr(law, field)[:, 0]
    return parts


def stopping(engines: dict[str, Any], table: Table) -> list[dict[str, Any]]:
    """Costs saved and accuracy lost by each rule, mean over data sets and orders of their learners."""
    beliefs = finals(engines, table)
    groups = []
    for name in np.unique(table.dataset):
        rows = np.flatnonzero(table.dataset == name)
        rows = rows[table.length[rows] == table.length[rows].max()]
        if len(rows) >= 10:
            groups.append(rows)
    told = []
    rules = [(name, level) for name in beliefs for level in GIVE_UP]
    for name, level in [*rules, ("last value alone", None)]:
        saved, lost, kept = [], [], []
        for i, rows in enumerate(groups):
            source = np.random.default_rng(i)
            runs = [_search(table, beliefs.get(name), source.permutation(rows), level) for _ in range(ORDERS)]
            saved.append(np.mean([run[0] for run in runs]))
            lost.append(np.mean([run[1] for run in runs]))
            kept.append(np.mean([run[1] <= 0 for run in runs]))
        row = {"curves": "early stopping", "method": name, "num_curves": sum(map(len, groups))}
        row["given_up_below"] = "" if level is None else level
        row |= {"datasets": len(groups), "share_saved": f"{np.mean(saved):.3f}"}
        row["saved_half_width_95"] = f"{1.96 * np.std(saved, ddof=1) / math.sqrt(len(groups)):.3f}"
        row |= {"accuracy_lost": f"{np.mean(lost):.4f}", "worst_accuracy_lost": f"{np.max(lost):.4f}"}
        told.append({**row, "best_found": f"{np.mean(kept):.3f}"})
    return told


def _search(table: Table, belief: Law | None, order: np.ndarray, level: float | None) -> tuple[float, float]:
    """Share of the seconds saved, and accuracy lost, where learners come in this order."""
    length = int(table.length[order[0]])
    final, seconds = table.score[order, length - 1], np.cumsum(table.seconds[order, :length], -1)
    best, spent = -math.inf, 0.0
    for i, row in enumerate(order):
        if best == -math.inf:
            hopeless = np.zeros(length - FIRST, dtype=bool)
        elif belief is None:
            hopeless = table.score[row, FIRST - 1 : length - 1] < best
        else:
            part = slice(FIRST, length)
            law = Law(belief.weights[row, part], belief.loc[row, part], belief.scale[row, part])
            hopeless = law.above(best) < level
        if hopeless.any():
            spent += seconds[i, FIRST - 1 + int(hopeless.argmax())]
        else:
            spent, best = spent + seconds[i, -1], max(best, final[i])
    return 1.0 - spent / seconds[:, -1].sum(), final.max() - best


def rows(engines: dict[str, Any], table: Table) -> list[dict[str, Any]]:
    """Everything of real curves, for the CSV."""
    return forecasts(engines, table) + stopping(engines, table)
