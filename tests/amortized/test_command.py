"""`bayesdl pretrain`: a prior in a file, a network in another, and errors that say what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from bayesdl.amortized import Pretrained
from bayesdl.cli import main

PRIOR = """
from bayesdl.amortized import Architecture
from tests.toy_tasks import NormalMeans

prior = NormalMeans(noise=0.3)
architecture = Architecture(2, "mixture", 3, width=8, num_layers=1, num_heads=2, hidden=8, num_conditions=1)
card = {"licence": "Apache-2.0"}

def evaluate(pretrained):
    return {"gap": 0.25}
"""
BRIEF = ["--steps", "4", "--batch", "2", "--n-max", "3", "--queries", "2", "--quiet"]


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    path = tmp_path / "my_prior.py"
    path.write_text(PRIOR)
    return path


def test_a_prior_in_a_file_becomes_a_network(tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The options override the file's architecture, and the same command has nothing left to do."""
    command = ["pretrain", "--prior", str(prior), "--out", str(tmp_path / "my.pfn"), "--width", "12", *BRIEF]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "steps       4 of 4" in out
    assert "gap 0.25" in out
    found = Pretrained.load(tmp_path / "my.pfn")
    assert (found.network.architecture.width, found.network.architecture.outputs) == (12, 3)
    assert (found.card["name"], found.card["licence"]) == ("my", "Apache-2.0")
    assert found.card["ranges"]["n"] == [0, 3]
    assert found.card["noise_token"] is True
    assert found.card["prior"] == "NormalMeans(spread=1.0, noise=0.3)"
    assert main(command) == 0


def test_a_run_that_is_not_over_says_so(tmp_path: Path, prior: Path) -> None:
    command = ["pretrain", "--prior", str(prior), "--out", str(tmp_path / "my.pfn"), *BRIEF]
    assert main([*command, "--max-seconds", "0"]) == 1
    assert Pretrained.load(tmp_path / "my.pfn").card["steps"] == 1
    assert main(command) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must define prior"),
        ("prior = 3", "must define prior"),
        ("1 / 0", "ZeroDivisionError"),
        (None, "must be a Python file"),
    ],
)
def test_files_without_a_prior_are_refused(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other_prior.py"
    if text is not None:
        path.write_text(text)
    assert main(["pretrain", "--prior", str(path), "--out", str(tmp_path / "my.pfn"), *BRIEF]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "my.pfn").exists()
