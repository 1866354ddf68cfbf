"""Fits on disk: what is reused, what is fitted again, what a failure leaves behind; and the tables made of them."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch

from bayesdl.evaluation import runner, table
from tests.fake_engines import FakeEngine

X = torch.arange(24, dtype=torch.float64).reshape(12, 2)
Y = torch.sin(X[:, 0]) + 2
TEST = torch.arange(12) % 3 == torch.arange(3)[:, None]
PROBLEM = runner.Problem("toy", X, Y, "regression", TEST, "y")


@pytest.fixture
def log(tmp_path):
    return str(tmp_path / "log")


def fits(log):
    path = Path(log)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def run(tmp_path, engines, problem=PROBLEM, **settings):
    return runner.run(problem, engines, tmp_path / "out", progress=False, **settings)


def test_every_engine_is_fitted_on_every_split_and_stored(tmp_path, log):
    rows = run(tmp_path, {"a": FakeEngine(log), "b": FakeEngine(log, width=2.0)}, seed=7, reference="a")
    assert fits(log) == [f"normal {seed} 8" for seed in (7, 7, 8, 8, 9, 9)]
    assert [(r.engine, r.split, r.status) for r in rows[:3]] == [
        ("a", 1, "fitted"),
        ("b", 1, "fitted"),
        ("a", 2, "fitted"),
    ]
    assert list(rows[0].scores) == [
        "RMSE", "NLPD", "CRPS", "coverage 50%", "coverage 90%", "coverage 95%", "PIT error", "distance to reference",
        "seconds",
    ]  # fmt: skip
    scale = float(Y[~TEST[1]].std())
    assert rows[3].scores["distance to reference"] == pytest.approx(scale, rel=1e-4)  # N(m, s) against N(m, 2 s)
    for name in ("posteriors/a-split1.bdl", "rows/b-split3.json", "rows/b-split3.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    record = json.loads((tmp_path / "out/rows/a-split1.json").read_text(encoding="utf-8"))
    assert record["diagnostics"]["rhat"] == pytest.approx(1.01)
    assert record["diagnostics"]["trace"]["log_density"][0][3] is None  # NaN is not JSON


def test_finished_fits_are_reused_with_the_same_scores(tmp_path, log):
    engines = {"a": FakeEngine(log), "b": FakeEngine(log, kind="mixture", warn_on=(1,))}
    first = run(tmp_path, engines, reference="b")
    fits(log)
    second = run(tmp_path, engines, reference="b")
    assert fits(log) == []
    for one, two in zip(first, second, strict=True):
        assert two.status == "reused"
        assert two.scores == pytest.approx(one.scores, nan_ok=True)
        assert two.warnings == one.warnings
        assert torch.equal(two.arrays["profile"], one.arrays["profile"])
    assert first[3].warnings == ["NumericalWarning: jitter had to grow to 1e-4"]
    # another reference asks for other distances, not for other fits
    third = run(tmp_path, engines, reference="a")
    assert fits(log) == []
    assert third[1].scores["distance to reference"] > 0


def test_a_change_of_data_settings_or_seed_fits_again(tmp_path, log):
    run(tmp_path, {"a": FakeEngine(log)})
    fits(log)
    assert run(tmp_path, {"a": FakeEngine(log, progress=True)})[0].status == "reused"  # a bar changes no result
    for change in (
        {"engines": {"a": FakeEngine(log, width=1.5)}},
        {"engines": {"a": FakeEngine(log)}, "seed": 1},
        {"engines": {"a": FakeEngine(log)}, "problem": PROBLEM._replace(y=Y + 1e-12)},
        {"engines": {"a": FakeEngine(log)}, "problem": PROBLEM._replace(x=X + 1)},
        {"engines": {"a": FakeEngine(log)}, "problem": PROBLEM._replace(test=TEST.roll(1, 0))},
        {"engines": {"a": FakeEngine(log)}, "fresh": True},
    ):
        assert all(row.status == "fitted" for row in run(tmp_path, **change))
        assert len(fits(log)) == 3
        run(tmp_path, {"a": FakeEngine(log)})  # back to where it was
        fits(log)


@pytest.mark.parametrize("name", ["rows/a-split1.json", "rows/a-split1.safetensors"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00\xff half", None])
def test_a_damaged_or_missing_part_is_fitted_again(tmp_path, log, name, damage):
    run(tmp_path, {"a": FakeEngine(log)})
    fits(log)
    path = tmp_path / "out" / name
    path.unlink() if damage is None else path.write_bytes(damage)
    assert [row.status for row in run(tmp_path, {"a": FakeEngine(log)})] == ["fitted", "reused", "reused"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, log):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {"a": FakeEngine(log), "b": FakeEngine(log, bias=1.0, interrupt_on=(1,))})
    assert len(fits(log)) == 4
    rows = run(tmp_path, {"a": FakeEngine(log), "b": FakeEngine(log, bias=1.0)})
    assert [row.status for row in rows] == ["reused", "fitted", "reused", "fitted", "fitted", "fitted"]


def test_an_engine_that_fails_is_told_and_the_others_go_on(tmp_path, log):
    rows = run(tmp_path, {"a": FakeEngine(log, fail_on=(1,)), "b": FakeEngine(log)}, reference="a")
    assert [row.status for row in rows] == ["fitted", "fitted", "failed", "fitted", "fitted", "fitted"]
    assert "must not be <asked> to fail" in rows[2].error
    assert math.isnan(rows[3].scores["distance to reference"])  # no reference on this split
    assert not (tmp_path / "out/rows/a-split2.json").exists()
    made = table.summarize(rows, "a")
    assert made.failures == {"a": 1, "b": 0}
    assert "a: failed on 1 of 3" in table.text(made)
    lines = list(csv.DictReader(io.StringIO(table.csv_text(rows))))
    assert [line["status"] for line in lines] == ["ok", "ok", "failed", "ok", "ok", "ok"]
    assert lines[2]["RMSE"] == ""
    assert "asked" in lines[2]["error"]
    assert float(lines[1]["CRPS"]) == rows[1].scores["CRPS"]


def test_a_crash_of_foreign_code_is_a_failure_with_its_place(tmp_path):
    rows = run(tmp_path, {"a": FakeEngine(str(tmp_path))})  # the log is a folder: an IsADirectoryError inside fit
    assert [row.status for row in rows] == ["failed"] * 3
    assert rows[0].error.startswith("IsADirectoryError")
    assert "line" in rows[0].error
    assert table.text(table.summarize(rows)).endswith("a: failed on 3 of 3 split(s)")


def test_table_means_errors_and_best_marks():
    def row(engine, split, **scores):
        return runner.Row(engine, split, "fitted", scores, {}, [], "", {})

    rows = [
        row("a", 1, **{"RMSE": 1.0, "coverage 90%": 0.99, "accuracy": 0.5, "distance to reference": 0.0}),
        row("b", 1, **{"RMSE": 4.0, "coverage 90%": 0.86, "accuracy": 0.9, "distance to reference": 0.3}),
        row("a", 2, **{"RMSE": 3.0, "coverage 90%": 0.97, "accuracy": 0.5, "distance to reference": 0.0}),
        row("b", 2, **{"RMSE": 5.0, "coverage 90%": 0.92, "accuracy": 0.7, "distance to reference": 0.5}),
    ]
    made = table.summarize(rows, reference="a")
    assert made.cells["a"]["RMSE"] == table.Cell(2.0, 1.0, True)
    assert made.cells["b"]["RMSE"] == table.Cell(4.5, 0.5, False)
    assert made.cells["b"]["coverage 90%"].is_best  # 0.89 is nearer to 0.9 than 0.98
    assert made.cells["b"]["accuracy"].is_best
    assert not made.cells["b"]["distance to reference"].is_best  # nobody to be better than
    assert made.words("a", "distance to reference") == "–"
    assert made.words("a", "RMSE") == "2.00 ± 1.00"
    wide, narrow = table.text(made, 120).splitlines(), table.text(made, 40).splitlines()
    assert [line.split()[0] for line in wide[2:4]] == ["a", "b"]
    assert narrow[0].split() == ["a", "b"]
    assert narrow[1].split() == ["RMSE", "2.00", "±", "1.00*", "4.50", "±", "0.50"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (54.321, "54.3"),
        (0.05432, "0.054"),
        (5.4321, "5.43"),
        (54321.6, "54322"),
        (0.000543, "0.000543"),
        (1.2e9, "1.20e+09"),
        (3.2e-8, "3.20e-08"),
        (0.0, "0.000"),
        (-1.2345, "-1.23"),
    ],
)
def test_numbers_get_three_digits(value, shown):
    rows = [runner.Row("a", 1, "fitted", {"NLPD": value}, {}, [], "", {})]
    assert table.summarize(rows).words("a", "NLPD") == shown
