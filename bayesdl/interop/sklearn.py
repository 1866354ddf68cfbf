"""scikit-learn: the data sets that ship inside it, read without a network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Bunch(NamedTuple):
    """Arrays and names: x (n, d) float64, y (n,), class_names empty for regression."""

    x: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]


def sklearn_dataset(name: str) -> Bunch:
    """One of "diabetes" (raw units, not the centred ones), "breast_cancer", "digits"."""
    from sklearn import datasets

    if name == "diabetes":
        found = datasets.load_diabetes(scaled=False)
    else:
        found = {"breast_cancer": datasets.load_breast_cancer, "digits": datasets.load_digits}[name]()
    classes = tuple(str(c) for c in found["target_names"]) if "target_names" in found else ()
    return Bunch(found["data"].astype(np.float64), found["target"], tuple(map(str, found["feature_names"])), classes)
