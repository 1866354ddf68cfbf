"""Every tutorial runs to its end, the closing assertion included, at the sizes that BAYESDL_QUICK=1 shrinks to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


def test_there_is_a_tutorial() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "BAYESDL_QUICK": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_guards_its_claim(path: Path) -> None:
    """Prose and code age together: a tutorial ends with an assertion on the number that it teaches."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("assert ") for line in lines[len(lines) // 2 :])
