"""A problem in a file: `objective` and `space`, and whatever else a study may be told, as names at its top level.

space = {"x": (-5.0, 10.0), "y": (0.0, 15.0)}

def objective(point):
    return (point["x"] - 1.0) ** 2 + point["y"]
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bayesdl.bo.space import Space
from bayesdl.errors import SettingError, fail

_OPTIONAL = ("engine", "acquisition", "directions", "constraints", "trust_region", "cost", "risk")


@dataclass(frozen=True)
class Problem:
    """What a file defines.

    Attributes:
        objective: The function, which other processes find again by its file.
        space: The search space.
        settings: Those of engine, acquisition, directions, constraints, trust_region, cost and risk that the file has.
    """

    objective: Callable[[Any], Any]
    space: Space
    settings: dict[str, Any]


class FileFunction:
    """A function of a file, loaded where it is first called: what is sent to another process is its place."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._function: Callable[[Any], Any] | None = None

    def __call__(self, point: Any) -> Any:
        if self._function is None:
            self._function = getattr(load(self._path), self._name)
        return self._function(point)

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_name": self._name, "_function": None}


def read(path: Path) -> Problem:
    """The problem that a file defines.

    Raises:
        SettingError: No such file, one that does not load, or one that lacks `objective` or `space`.
    """
    path = path.absolute()
    if not path.is_file():
        fail(SettingError, "optimize", "the problem must be a Python file.", got=str(path), fix="check the path")
    try:
        module = load(path)
    except Exception as error:  # the file is the user's: whatever it raises is told as its fault
        got = f"{type(error).__name__}: {error}"
        fail(
            SettingError, "optimize", f"{path.name} must load.", got=got, fix=f"python {path.name} shows where it stops"
        )
    for name in ("objective", "space"):
        if not hasattr(module, name):
            wanted = f"{path.name} must define {name}."
            public = ", ".join(key for key in vars(module) if not key.startswith("_"))
            fix = 'space = {"x": (0.0, 1.0)} and def objective(point): ...'
            fail(SettingError, "optimize", wanted, got=public[:200] or "nothing", fix=fix)
    if not callable(module.objective):
        got = repr(module.objective)[:200]
        fail(SettingError, "optimize", "objective must be a function.", got=got, fix="def objective(point): ...")
    settings = {name: getattr(module, name) for name in _OPTIONAL if hasattr(module, name)}
    return Problem(FileFunction(path, "objective"), Space.of(module.space), settings)


def load(path: Path) -> ModuleType:
    """The file as a module, run once in each process; files beside it can be imported by it."""
    name = f"bayesdl_problem_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
