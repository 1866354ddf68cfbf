"""What a loaded data set is, and how it is split."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, fail

Task = Literal["regression", "binary", "multiclass"]
TASKS: tuple[Task, ...] = ("regression", "binary", "multiclass")


class Loaded(NamedTuple):
    """A data set in memory, in the user's units.

    Attributes:
        name: What it was loaded as.
        x: Inputs, shape (n, d), float64.
        y: Targets, shape (n,): float64 for regression, class numbers 0..K-1 (int64) otherwise.
        task: "regression", "binary" or "multiclass".
        feature_names: One name a column of x.
        target_name: Name of the target.
        splits: Published train-test splits, shape (num_splits, n), True for test points; None where there are none.
        class_names: Names of the classes in the order of their numbers; empty for regression.
    """

    name: str
    x: Tensor
    y: Tensor
    task: Task
    feature_names: tuple[str, ...]
    target_name: str
    splits: Tensor | None = None
    class_names: tuple[str, ...] = ()


def splits(
    n: int, num_splits: int = 1, test_fraction: float = 0.2, seed: int = 0, labels: Tensor | None = None
) -> Tensor:
    """Train-test splits, shape (num_splits, n), True for test points.

    One split is a holdout of `test_fraction`; several are shuffled K-fold cross-validation, in which every point is
    a test point exactly once. With `labels` the classes keep their shares in every part, as far as whole points allow.

    Args:
        n: Number of points, at least 2 and at least `num_splits`.
        num_splits: 1 for a holdout, K for K folds.
        test_fraction: Share of test points of a holdout; unused for K > 1.
        seed: Seed of the shuffle.
        labels: Class numbers, shape (n,).
    """
    _checks.at_least("splits", "num_splits", num_splits, 1, integer=True)
    if n < max(2, num_splits):
        wanted = f"{max(2, num_splits)} points are needed for {num_splits} split(s)."
        fail(SettingError, "splits", wanted, got=f"{n} points", fix="ask for fewer splits or bring more data")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x5B117]))
    order = rng.permutation(n)
    if labels is not None:
        order = order[np.argsort(labels.numpy()[order], kind="stable")]
    if num_splits == 1:
        _checks.inside("splits", "test_fraction", test_fraction, 0.0, 1.0)
        # Test points are spread evenly along the order, so that every class gives its share.
        ends = np.floor(np.arange(n + 1) * test_fraction + 0.5)
        fold = (np.diff(ends) == 0).astype(int)
        if fold.all() or not fold.any():
            fold[0], fold[1:] = 0, 1
        test = np.zeros((1, n), bool)
        test[0, order] = fold == 0
    else:
        fold = np.empty(n, int)
        fold[order] = np.arange(n) % num_splits
        test = fold == np.arange(num_splits)[:, None]
    return torch.from_numpy(test)
