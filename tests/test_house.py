"""How the house stands: imports point downward, heavy packages stay behind their doors, and the code keeps its manners.

Everything here parses the source; nothing is imported. The floors are drawn in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bayesdl"

# From the ground up. A room is a file or a folder directly inside the package; rooms on one floor do not import
# each other, except on the ground floor, which holds small files rather than rooms.
FLOORS = (
    ("shapes", "errors", "_checks", "_random", "hyper", "_records", "_storage", "_version", "_compiling"),
    ("ops",),
    ("data", "kernels", "likelihoods", "distributions"),
    ("priors",),
    ("models", "posterior", "samplers", "amortized"),
    ("inference",),
    ("datasets", "evaluation", "interop"),
    ("bo", "testing"),
    ("cli", "__main__"),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
TOP = len(FLOORS) - 1

# Third-party packages beyond torch and numpy, and the rooms that may import them (None: any room). Outside interop/
# even these stand inside functions, so that `import bayesdl` stays light. Whatever is not listed belongs in interop/.
GUESTS: dict[str, tuple[str, ...] | None] = {
    "scipy": None,
    "tqdm": None,
    "safetensors": ("_storage", "_records", "posterior", "amortized"),
    "pandas": ("data", "datasets", "evaluation", "bo", "cli", "testing"),
    "matplotlib": ("evaluation", "bo"),
    "jaxtyping": None,
    "lightning": ("amortized",),
    "triton": ("ops",),
}

GLOBAL_STATE = {
    "torch.manual_seed",
    "torch.seed",
    "torch.set_rng_state",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.random.manual_seed",
    "torch.random.seed",
    "torch.set_default_dtype",
    "torch.set_default_device",
    "torch.set_default_tensor_type",
    "torch.set_num_threads",
    "torch.set_grad_enabled",
    "torch.use_deterministic_algorithms",
}
# torch keeps this number for each thread: workers set that of their own, and put back what new threads would get
ALLOWED = {("ops.workers", "torch.set_num_threads")}
RANDOM_FUNCTIONS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
RANDOM_FUNCTIONS |= {"rand_like", "randn_like", "randint_like"}
RANDOM_METHODS = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
    "random_",
}
# What does not draw from, or set, numpy's global state; get_state reads it, to see that nothing else touched it.
NUMPY_RANDOM = {"SeedSequence", "default_rng", "Generator", "PCG64", "Philox", "BitGenerator", "get_state"}
CODE_RUNNERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
MAX_FILE, MAX_FUNCTION = 500, 80


@dataclass(frozen=True)
class Import:
    """One import statement: the module it stands in, what it reaches, and whether it runs when the module loads."""

    module: str
    target: str
    line: int
    in_function: bool
    for_types: bool


@dataclass(frozen=True)
class Source:
    """One parsed file of the package."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The file or folder directly inside the package; "" for the package's own __init__."""
        return self.module.split(".")[1] if "." in self.module else ""


def read_package(package: Path) -> list[Source]:
    """All python files below `package`, whose folder name is the package's name."""
    sources = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        sources.append(Source(path, module, text, ast.parse(text, filename=str(path))))
    return sources


def imports_of(source: Source, modules: set[str]) -> Iterator[Import]:
    """Every import in `source`; `from a import b` reaches a.b where that is a module, and a otherwise."""

    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source.module, alias.name, node.lineno, in_function, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(source.module, full if full in modules else base, node.lineno, in_function, for_types)
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside, types)

    yield from walk(source.tree, False, False)


def import_faults(package: Path) -> list[str]:
    """Every import in `package` that breaks the rules of the house, as `module:line: what is wrong`."""
    sources = read_package(package)
    modules = {source.module for source in sources}
    faults = []
    for source in sources:
        if source.room and source.room not in FLOOR and source.room != "_doors":
            faults.append(f"{source.module}:1: {source.room} stands on no floor; give it one in tests/test_house.py")
            continue
        for found in imports_of(source, modules):
            fault = _own_fault(source, found) if _is_own(found, package.name) else _guest_fault(source, found)
            if fault:
                faults.append(f"{found.module}:{found.line}: {fault}")
    return faults


def _is_own(found: Import, package: str) -> bool:
    return found.target.startswith(".") or found.target.split(".")[0] == package


def _own_fault(source: Source, found: Import) -> str | None:
    if found.target.startswith("."):
        return "write imports within the package in full"
    here, parts = source.room, found.target.split(".")
    if here == "":
        allowed = found.for_types or found.in_function or parts[1:] == ["_version"]
        return None if allowed else f"the package itself imports {found.target} at once; public names load when touched"
    if len(parts) == 1:
        low = FLOOR.get(here, 0) < FLOOR["testing"]
        return "import the module that holds the name, not the package" if low else None
    there = parts[1]
    if there == "_doors":
        return None
    if there not in FLOOR:
        return f"{there} stands on no floor; give it one in tests/test_house.py"
    if here == "_doors":
        upward = FLOOR[there] > 0 and not (found.in_function or found.for_types)
        return f"_doors may import {there} inside its functions only" if upward else None
    if here == there:
        return _engine_fault(source, parts) if here == "inference" else None
    if FLOOR[there] > FLOOR[here]:
        return f"{here} imports {there}, which stands on a higher floor"
    if FLOOR[there] == FLOOR[here] and FLOOR[here] not in (0, TOP):
        return f"{here} and {there} stand on one floor and do not know each other"
    return None


def _engine_fault(source: Source, parts: list[str]) -> str | None:
    """Engines share underscore files of inference/, never one another; the folder's __init__ may name them all."""
    own = source.module.split(".")
    if len(own) == 2 or (len(parts) > 2 and (parts[2].startswith("_") or parts[:3] == own[:3])):
        return None
    return f"engines do not import each other: put what {own[-1]} and {parts[-1]} share in an underscore file"


def _guest_fault(source: Source, found: Import) -> str | None:
    top = found.target.split(".")[0]
    if top in CODE_RUNNERS:
        return f"{top} runs code on loading; save tensors and JSON"
    if top == "random" and source.room != "testing":
        return "random keeps a global state; pass a torch.Generator"
    if top in sys.stdlib_module_names or top in ("torch", "numpy") or source.room == "interop" or found.for_types:
        return None
    if top not in GUESTS:
        return f"only interop imports {top}; reach it through _doors"
    rooms = GUESTS[top]
    if rooms is not None and source.room not in rooms:
        return f"{source.room} does not import {top}; {', '.join(rooms)} may"
    return None if found.in_function else f"{top} is imported on loading; move it into the function that needs it"


def dotted(node: ast.AST) -> str:
    """The dotted name of `a.b.c`, with np written out; "" for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join(["numpy" if node.id == "np" else node.id, *reversed(parts)])


def call_faults(source: Source) -> list[str]:
    """Uses of global state and of loading that can run code, as `module:line: what is wrong`."""
    faults = []
    for node in ast.walk(source.tree):
        name = dotted(node) if isinstance(node, ast.Attribute) else ""
        fault = None
        if name in GLOBAL_STATE and (source.module.removeprefix("bayesdl."), name) not in ALLOWED:
            fault = f"{name} changes the state of the whole process"
        elif name.startswith("numpy.random.") and name.split(".")[2] not in NUMPY_RANDOM:
            fault = f"{name} uses numpy's global random state"
        elif isinstance(node, ast.Call):
            fault = _random_fault(node) or _loading_fault(node)
        if fault:
            faults.append(f"{source.module}:{node.lineno}: {fault}")
    return faults


def _random_fault(node: ast.Call) -> str | None:
    name = dotted(node.func)
    attribute = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    draws = (name.startswith("torch.") and name.count(".") == 1 and attribute in RANDOM_FUNCTIONS) or (
        attribute in RANDOM_METHODS
    )
    if draws and not any(word.arg == "generator" for word in node.keywords):
        return f"{attribute} without generator= draws from the global random state"
    if name.startswith(("torch.nn.init.", "nn.init.")) and not any(word.arg == "generator" for word in node.keywords):
        return f"{name} without generator= draws from the global random state"
    return None


def _loading_fault(node: ast.Call) -> str | None:
    name = dotted(node.func)
    constants = {w.arg: w.value.value for w in node.keywords if w.arg and isinstance(w.value, ast.Constant)}
    if name == "torch.load" and constants.get("weights_only") is not True:
        return "torch.load without weights_only=True can run code from the file"
    if name == "numpy.load" and constants.get("allow_pickle") is True:
        return "numpy.load with allow_pickle=True can run code from the file"
    if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        return f"{node.func.id} runs text as code"
    return None


def size_faults(source: Source) -> list[str]:
    """Files and functions too long to read in one go."""
    faults = []
    lines = source.text.count("\n")
    if lines > MAX_FILE:
        faults.append(f"{source.module}: {lines} lines, at most {MAX_FILE}")
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno
            if length > MAX_FUNCTION:
                faults.append(f"{source.module}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    return faults


def docstring_faults(source: Source) -> list[str]:
    """Files, public classes and functions without a docstring."""
    if source.module.endswith("._version"):
        return []
    faults = [] if ast.get_docstring(source.tree) else [f"{source.module}:1: the file does not say what it is"]
    for node in source.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            faults += (
                [] if ast.get_docstring(node) else [f"{source.module}:{node.lineno}: {node.name} has no docstring"]
            )
    return faults


SOURCES = read_package(PACKAGE)
ENGINE_FILES = [s for s in SOURCES if s.room == "inference" and s.path.name[0] != "_"]


def engine_classes(source: Source) -> list[str]:
    """The public classes of an engine file that have the one verb, fit."""
    return [
        node.name
        for node in source.tree.body
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(isinstance(part, ast.FunctionDef) and part.name == "fit" for part in node.body)
    ]


def test_imports_point_downward() -> None:
    assert import_faults(PACKAGE) == []


@pytest.mark.parametrize("check", [call_faults, size_faults, docstring_faults])
def test_every_file_keeps_the_manners(check) -> None:
    assert [fault for source in SOURCES for fault in check(source)] == []


def test_every_room_is_a_package() -> None:
    """A folder without __init__.py works from a clone and is missing from the wheel."""
    folders = {source.path.parent for source in SOURCES}
    assert [folder.name for folder in folders if not (folder / "__init__.py").exists()] == []


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    odd = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
    assert [s.module for s in SOURCES if s.path.stem.strip("_") in odd] == []


@pytest.mark.parametrize("source", ENGINE_FILES, ids=lambda s: s.path.stem)
def test_every_engine_has_its_three_touches(source: Source) -> None:
    """Its file, a test that calls check_engine, and one line in a tutorial."""
    test = ROOT / "tests" / "inference" / f"test_{source.path.stem}.py"
    assert test.exists(), f"{source.module} has no {test.relative_to(ROOT)}"
    checks = test.read_text(encoding="utf-8")
    tutorials = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tutorials").glob("*.py"))
    for engine in engine_classes(source):
        stem = source.path.stem.replace("_", "")
        assert engine.lower() == stem, f"{engine} stands in {source.path.name}: bdl.{engine} would not be found there"
        assert re.search(r"\bcheck_engine\(", checks), f"{test.name} does not call check_engine"
        assert re.search(rf"\b{engine}\(", tutorials), f"no tutorial in tutorials/ shows {engine}(...)"


def test_every_public_room_has_a_page_in_the_reference() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    rooms = {s.room for s in SOURCES if s.room and not s.room.startswith("_")} - {"cli", "interop"}
    assert [room for room in sorted(rooms) if not re.search(rf"^::: bayesdl\.{room}\b", pages, re.MULTILINE)] == []


# The rules must be able to fail: one wrong line each, in a package of its own.
WRONG_IMPORTS = [
    ("ops/core.py", "from bayesdl.kernels import RBF", "higher floor"),
    ("ops/core.py", "def f():\n    from bayesdl.inference import hmc", "higher floor"),
    ("models/gp.py", "import bayesdl.posterior.base", "one floor"),
    ("kernels/rbf.py", "from bayesdl import data", "one floor"),
    ("evaluation/scores.py", "from bayesdl.interop import arviz", "one floor"),
    ("inference/hmc.py", "from bayesdl.inference.exact_gp import ExactGP", "engines do not import each other"),
    ("inference/hmc.py", "from bayesdl.inference import exact_gp", "engines do not import each other"),
    ("inference/hmc.py", "from bayesdl.inference import ExactGP", "engines do not import each other"),
    ("inference/hmc.py", "from bayesdl import ExactGP", "not the package"),
    ("models/gp.py", "from .bnn import BNN", "in full"),
    ("models/gp.py", "def f():\n    import gpytorch", "only interop imports gpytorch"),
    ("samplers/hmc.py", "from arviz_stats import ess", "only interop imports arviz_stats"),
    ("evaluation/scores.py", "from sklearn.metrics import r2_score", "only interop imports sklearn"),
    ("evaluation/figures.py", "import matplotlib.figure", "on loading"),
    ("ops/core.py", "from scipy.special import erf", "on loading"),
    ("ops/core.py", "class A:\n    import scipy", "on loading"),
    ("models/gp.py", "def f():\n    import pandas", "does not import pandas"),
    ("data.py", "import random", "global state"),
    ("posterior/base.py", "import pickle", "runs code"),
    ("_doors.py", "from bayesdl.interop import arviz", "inside its functions only"),
    ("__init__.py", "from bayesdl.models.gp import GP", "load when touched"),
    ("attic.py", "import torch", "stands on no floor"),
    ("models/gp.py", "import bayesdl.attic", "stands on no floor"),
]
RIGHT_IMPORTS = [
    ("kernels/rbf.py", "from bayesdl.ops import core\nfrom bayesdl.errors import fail"),
    ("errors.py", "from bayesdl._version import __version__"),
    ("inference/hmc.py", "from bayesdl.inference import _shared\nfrom bayesdl.inference._shared import fit"),
    ("posterior/base.py", "def f():\n    from bayesdl import _doors\n    from bayesdl._doors import load"),
    ("_doors.py", "def f():\n    from bayesdl.interop import arviz"),
    ("interop/arviz.py", "import arviz_stats"),
    ("evaluation/scores.py", "def f():\n    import matplotlib.figure, pandas, scipy"),
    ("models/gp.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from botorch.models import Model"),
    ("cli.py", "def f():\n    import bayesdl as bdl"),
    ("__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bayesdl.models.gp import GP"),
]


def toy_package(root: Path, file: str, text: str) -> Path:
    """A package with one empty file in several rooms, and `text` in `file`."""
    package = root / "bayesdl"
    rooms = ["errors", "_doors", "_version", "data", "ops/core", "kernels/rbf", "models/gp", "posterior/base"]
    rooms += ["inference/hmc", "inference/exact_gp", "inference/_shared", "interop/arviz"]
    for path in [*(package / f"{room}.py" for room in rooms), package / file]:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.touch()
    (package / file).write_text(text + "\n", encoding="utf-8")
    return package


@pytest.mark.parametrize(("file", "text", "fault"), WRONG_IMPORTS)
def test_a_wrong_import_is_caught(file: str, text: str, fault: str, tmp_path: Path) -> None:
    (found,) = import_faults(toy_package(tmp_path, file, text))
    assert fault in found


@pytest.mark.parametrize(("file", "text"), RIGHT_IMPORTS)
def test_a_right_import_passes(file: str, text: str, tmp_path: Path) -> None:
    assert import_faults(toy_package(tmp_path, file, text)) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (call_faults, "import torch\ntorch.manual_seed(0)"),
        (call_faults, "import torch\nseed = torch.cuda.manual_seed_all"),
        (call_faults, "import numpy as np\nnp.random.seed(0)"),
        (call_faults, "import numpy as np\nx = np.random.normal()"),
        (call_faults, "import torch\nx = torch.randn(3)"),
        (call_faults, "import torch\nx = torch.empty(3).normal_()"),
        (call_faults, "from torch import nn\nnn.init.xavier_normal_(w)"),
        (call_faults, "import torch\nx = torch.load('a')"),
        (call_faults, "import torch\nx = torch.load('a', weights_only=False)"),
        (call_faults, "import numpy as np\nx = np.load('a', allow_pickle=True)"),
        (call_faults, "x = eval('1')"),
        (size_faults, "x = 1\n" * (MAX_FILE + 1)),
        (size_faults, "def f():\n" + "    x = 1\n" * (MAX_FUNCTION + 1)),
        (docstring_faults, "def f(): ..."),
        (docstring_faults, '"""A file."""\nclass A: ...'),
    ],
)
def test_bad_manners_are_caught(check, text: str) -> None:
    assert check(Source(Path("a.py"), "bayesdl.a", text, ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nx = torch.randn(3, generator=g)\ny = x.normal_(generator=g)",
        "import torch\nx = torch.load('a', weights_only=True)\ng = torch.Generator().manual_seed(0)",
        "import numpy as np\nx = np.random.SeedSequence(0)\ny = np.load('a', allow_pickle=False)",
        "import torch\nx = torch.distributions.Normal(0, 1)",
    ],
)
def test_good_manners_pass(text: str) -> None:
    assert call_faults(Source(Path("a.py"), "bayesdl.a", text, ast.parse(text))) == []
