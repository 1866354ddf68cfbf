"""The worked example of CONTRIBUTING.md: its engine and its test run as printed, in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package with the example's two files in the places that the text names."""
    engine, test = re.findall(r"`((?:bayesdl|tests)/inference/\w*random_walk\.py)`", TEXT)
    shutil.copytree(ROOT / "bayesdl", tmp_path / "bayesdl", ignore=shutil.ignore_patterns("__pycache__"))
    for place, block in zip((engine, test), BLOCKS, strict=True):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(block, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def test_the_example_engine_works_as_printed(copy: Path) -> None:
    """With no file touched beyond its two, the engine is public and passes its tests; nothing needs registration."""
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=copy, env=environment, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout


def test_the_example_keeps_the_manners(copy: Path) -> None:
    files = [str(copy / "bayesdl" / "inference" / "random_walk.py"), str(copy / "tests" / "inference")]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), *files]
    run = subprocess.run(command, capture_output=True, text=True, cwd=copy, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
