"""`import bayesdl` is light, and every public name is there when touched. Each test runs a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bayesdl

ROOT = Path(bayesdl.__file__).parents[1]
HEAVY = (
    "arviz_base",
    "arviz_stats",
    "botorch",
    "gpytorch",
    "h5netcdf",
    "h5py",
    "linear_operator",
    "matplotlib",
    "pandas",
    "pyro",
    "safetensors",
    "scipy",
    "sklearn",
    "tqdm",
    "xarray",
)


def in_fresh_interpreter(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("statement", ["import bayesdl", "import bayesdl; dir(bayesdl); bayesdl.__version__"])
def test_import_loads_torch_and_numpy_at_most(statement: str) -> None:
    code = f"""
import sys
import torch
before = {{name.partition(".")[0] for name in sys.modules}}
{statement}
print(*sorted({{name.partition(".")[0] for name in sys.modules}} - before))
"""
    third_party = set(in_fresh_interpreter(code).split()) - set(sys.stdlib_module_names)
    assert third_party <= {"bayesdl", "numpy"}


def test_the_models_engines_and_kernels_load_without_heavy_packages() -> None:
    """Describing a model stays as light as the bare import: nothing heavy loads before it is used."""
    code = f"""
import sys
import torch
before = set(sys.modules)
import bayesdl
for name in ("GP", "BNN", "ExactGP", "HMC", "Ensemble", "Gaussian", "kernels", "priors", "Posterior"):
    getattr(bayesdl, name)
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({HEAVY!r})))
"""
    assert in_fresh_interpreter(code).split() == []


def test_every_listed_name_is_there() -> None:
    code = """
import bayesdl
for name in dir(bayesdl):
    value = getattr(bayesdl, name)
    assert getattr(bayesdl, name) is value, name
print(set(bayesdl.__all__) <= set(dir(bayesdl)))
"""
    assert in_fresh_interpreter(code).strip() == "True"


@pytest.mark.parametrize(
    ("name", "module"), [("compare", "bayesdl.evaluation.compare"), ("sample", "bayesdl.inference.sample")]
)
def test_a_function_named_like_its_module_stays_a_function(name: str, module: str) -> None:
    """Importing the module of the same name, before or after, must not put the module in the function's place."""
    for first, second in ((f"import {module}", f"bayesdl.{name}"), (f"bayesdl.{name}", f"import {module}")):
        code = f"import bayesdl\n{first}\n{second}\nimport types\nprint(isinstance(bayesdl.{name}, types.FunctionType))"
        assert in_fresh_interpreter(code).strip() == "True"


def test_engines_are_found_in_their_folder() -> None:
    """A new file in inference/ makes its engine public: no list has to be edited."""
    assert {"ExactGP", "HMC", "Ensemble"} <= set(dir(bayesdl))
    assert bayesdl.ExactGP.__module__ == "bayesdl.inference.exact_gp"


@pytest.mark.parametrize(
    ("wrong", "right"), [("ExactGp", "ExactGP"), ("Hmc", "HMC"), ("kernel", "kernels"), ("comparison", "compare")]
)
def test_a_misspelt_name_is_answered_with_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{wrong}'; did you mean .*{right}"):
        getattr(bayesdl, wrong)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'zzzzzz'$"):
        _ = bayesdl.zzzzzz
    assert not hasattr(bayesdl, "_zzzzzz")
