"""The README's promises: its code runs as printed, and the two commands that it shows exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
TARGETS = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_there_is_an_example() -> None:
    assert BLOCKS, "README.md has no ```python block"


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_the_example_runs_as_printed(index: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    run = subprocess.run(
        [sys.executable, "-c", BLOCKS[index]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_commands_stand_there(command: str) -> None:
    assert re.search(rf"^{command}\b", README, flags=re.MULTILINE), f"README.md does not show `{command}` on a line"


def test_every_make_command_shown_exists() -> None:
    shown = set(
        re.findall(r"\bmake ([a-z][a-z-]*)", " ".join(re.findall(r"`make [^`]*`|^make .*$", README, re.MULTILINE)))
    )
    assert shown <= set(TARGETS)


def test_every_local_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README) + re.findall(r'src="([^"]+)"', README)
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (ROOT / link).exists()] == []
