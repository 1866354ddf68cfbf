"""The command line: what it prints, what it leaves on disk, and how it refuses."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bayesdl
from bayesdl import cli, datasets
from bayesdl.evaluation import suite
from bayesdl.evaluation.compare import evaluate
from tests.fake_engines import FakeEngine

HOUSES = "size,rooms,price\n" + "".join(f"{i},{i % 4},{(i * 37) % 19}\n" for i in range(40))
KINDS = "size,rooms,kind\n" + "".join(f"{i},{(i * 37) % 19},{'ab'[i % 2]}\n" for i in range(40))


@pytest.fixture
def houses(tmp_path):
    path = tmp_path / "houses.csv"
    path.write_text(HOUSES, encoding="utf-8")
    return path


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Three engines that fit nothing: gp (regression only), hmc, and one whose fits with seed 1 fail."""
    log = str(tmp_path / "log")

    def builder(**settings):
        def build(task, num_classes, quick):
            kind = "normal" if task == "regression" else task
            return FakeEngine(log, kind, **{"width": 0.5 if quick else 1.0, **settings})

        return build

    every = ("regression", "binary", "multiclass")
    engines = {
        "gp": suite.Entry("a fake GP", ("regression",), builder()),
        "hmc": suite.Entry("a fake sampler", every, builder(bias=0.1)),
        "sick": suite.Entry("fails at times", every, builder(fail_on=(1,))),
    }
    monkeypatch.setattr(suite, "ENGINES", engines)
    return Path(log)


def test_compare_prints_the_table_and_writes_everything(fakes, houses, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "deep" / "report"
    argv = ["compare", "--data", str(houses), "--target", "price", "--engines", "gp,hmc", "--splits", "4"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "RMSE" in said.out
    assert "distance" in said.out  # hmc is the reference where it takes part
    assert any(line.startswith("gp ") for line in lines)
    assert "mean ± standard error over 4 splits" in said.out
    assert str(out / "index.html") in said.out
    assert "houses: 40 rows, 2 inputs, target price (regression)" in said.err
    assert "hmc, split 4 of 4: fitted" in said.err
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["engine"], row["split"]) for row in rows] == [(e, str(i)) for i in range(1, 5) for e in ("gp", "hmc")]
    assert float(rows[1]["distance to reference"]) == 0
    assert float(rows[0]["distance to reference"]) == pytest.approx(0.1, rel=1e-3)
    assert len(list((out / "posteriors").iterdir())) == 8
    assert "<title>houses: 2 posteriors compared</title>" in (out / "index.html").read_text(encoding="utf-8")
    assert len(fakes.read_text(encoding="utf-8").splitlines()) == 8


def test_a_second_run_reuses_and_fresh_fits_again(fakes, houses, tmp_path, capsys):
    argv = ["compare", "--data", str(houses), "--target", "price", "--engines", "hmc", "--out", str(tmp_path / "r")]
    tables = []
    for extra, fits, word in (
        ([], 1, "fitted"),
        ([], 1, "reused"),
        (["--fresh"], 2, "fitted"),
        (["--quick"], 3, "fitted"),
    ):
        assert cli.main([*argv, *extra]) == 0
        said = capsys.readouterr()
        assert word in said.err
        assert len(fakes.read_text(encoding="utf-8").splitlines()) == fits
        tables.append(said.out)
    assert tables[0] == tables[1] == tables[2]
    assert tables[3] != tables[2]


def test_a_failing_engine_gives_exit_code_1_and_the_others_their_scores(fakes, houses, tmp_path, capsys):
    argv = ["compare", "--data", str(houses), "--target", "price", "--splits", "3", "--out", str(tmp_path / "r")]
    assert cli.main([*argv, "--engines", "gp,sick"]) == 1
    said = capsys.readouterr()
    assert "sick: failed on 1 of 3 split(s)" in said.out
    assert "sick, split 2 of 3: failed" in said.err
    assert "it must not be <asked> to fail" in said.err
    assert "Traceback" not in said.err


def test_classification_takes_the_engines_that_can(fakes, tmp_path, capsys):
    path = tmp_path / "kinds.csv"
    path.write_text(KINDS, encoding="utf-8")
    argv = ["compare", "--data", str(path), "--target", "kind", "--task", "classification"]
    argv += ["--out", str(tmp_path / "r")]
    assert cli.main([*argv, "--engines", "hmc"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main([*argv, "--engines", "gp,hmc"]) == 2
    assert "gp cannot do classification" in capsys.readouterr().err


def test_uci_runs_its_published_splits(fakes, data_dir, tmp_path, capsys):
    argv = ["compare", "--data", "uci:yacht", "--engines", "hmc", "--out", str(tmp_path / "r")]
    assert cli.main([*argv, "--splits", "3"]) == 0
    assert fakes.read_text(encoding="utf-8").split() == [
        "normal",
        "0",
        "277",
        "normal",
        "1",
        "277",
        "normal",
        "2",
        "277",
    ]
    assert cli.main([*argv, "--splits", "21"]) == 2
    assert "uci:yacht has 20 published splits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data", "houses.csv"], "a CSV file needs the name of its target column"),
        (["--data", "houses.csv", "--target", "cost"], "must have the target column 'cost'"),
        (["--data", "absent.csv", "--target", "price"], "no such file"),
        (["--data", "iris"], "must be one of diabetes, breast_cancer, digits, uci:NAME, or a CSV file"),
        (["--data", "uci:yachts"], "uci sets are boston"),
        (["--data", "diabetes", "--target", "age"], "diabetes has its own target"),
        (["--data", "diabetes", "--task", "regression"], "diabetes has its own target and task"),
        (["--data", "diabetes", "--engines", "gp,vi"], "engines are gp, hmc, sick"),
        (["--data", "diabetes", "--engines", ","], "name at least one engine"),
        (["--data", "diabetes", "--engines", "gp,gp"], "name at least one engine, each once"),
        (["--data", "diabetes", "--engines", "gp", "--reference", "hmc"], "the reference must be among the engines"),
        (["--data", "diabetes", "--splits", "0"], "at least one split"),
        (["--data", "diabetes", "--splits", "443"], "443 points are needed"),
        (["--data", "diabetes", "--seed", "-1"], "at least 0"),
        (["--data", "diabetes", "--device", "abacus"], "the device must exist here"),
        (["--data", "diabetes", "--out", "houses.csv"], "the output must be a folder"),
        (["--data", "breast_cancer", "--engines", "gp"], "use hmc, sick"),
    ],
)
def test_wrong_requests_say_what_to_change_and_exit_with_2(fakes, houses, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(houses.parent)
    assert cli.main(["compare", *argv]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "\n  fix  " in said.err
    assert said.out == ""
    assert not fakes.exists()  # refused before anything was fitted


def test_argparse_refusals_exit_with_2(capsys):
    for argv in (["compare"], ["frobnicate"], ["compare", "--data", "diabetes", "--splits", "two"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
    assert "usage: bayesdl" in capsys.readouterr().err


def test_interruption_is_told_in_one_line(fakes, houses, monkeypatch, tmp_path, capsys):
    entry = suite.ENGINES["hmc"]._replace(builder=lambda *_: FakeEngine(str(fakes), interrupt_on=(0,)))
    monkeypatch.setitem(suite.ENGINES, "hmc", entry)
    argv = ["compare", "--data", str(houses), "--target", "price", "--engines", "gp,hmc", "--out", str(tmp_path / "r")]
    assert cli.main(argv) == 130
    assert "goes on from what is finished" in capsys.readouterr().err
    assert json.loads((tmp_path / "r/rows/gp-split1.json").read_text(encoding="utf-8"))["data"] == "houses"


def test_info_tells_versions_data_and_engines(capsys, monkeypatch):
    monkeypatch.delenv("BAYESDL_DATA", raising=False)
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    for word in (bayesdl.__version__, torch.__version__, "diabetes", "BAYESDL_DATA is not set", "ensemble", "pandas"):
        assert word in said


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    assert "compare" in capsys.readouterr().out


def test_module_runs_as_a_program_and_knows_its_version(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(bayesdl.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "bayesdl", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout.strip() == f"bayesdl {bayesdl.__version__}"


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_real_engines_run_end_to_end(tmp_path, capsys, task):
    """The suite's own engines on forty rows, quick; the saved posterior predicts again what was scored."""
    path = tmp_path / "toy.csv"
    path.write_text(HOUSES if task == "regression" else KINDS, encoding="utf-8")
    target, engines = ("price", "gp,nngp,ensemble") if task == "regression" else ("kind", "ensemble")
    argv = ["compare", "--data", str(path), "--target", target, "--task", task, "--engines", engines, "--quick"]
    assert cli.main([*argv, "--out", str(tmp_path / "r")]) == 0
    printed = capsys.readouterr().out
    posterior = bayesdl.load(tmp_path / "r/posteriors/ensemble-split1.bdl")
    data = datasets.read_csv(path, target, task)
    test = datasets.splits(40, 1, seed=0, labels=data.y if task == "classification" else None)[0]
    again = evaluate(posterior.predict(data.x[test]), data.y[test]).scores
    record = json.loads((tmp_path / "r/rows/ensemble-split1.json").read_text(encoding="utf-8"))
    for name, value in again.items():
        assert record["scores"][name] == pytest.approx(value, rel=1e-9)
        assert name.split()[0] in printed
