"""The table of scores, from posteriors that fit nothing."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from bayesdl import evaluation as ev
from bayesdl.errors import DataError, SettingError, ShapeError
from bayesdl.evaluation.compare import compare
from tests.fake_engines import FakePosterior

X = torch.zeros(30, 2)
Y = torch.linspace(-3, 5, 30, dtype=torch.float64)


def posterior(kind="normal", width=1.0, bias=0.0, y=Y, seconds=1.5):
    return FakePosterior(y, kind, width, bias, {"seconds": seconds} if seconds else {})


def test_table_holds_the_scores_in_the_order_given():
    kinds = {"wide": posterior(width=3.0), "mixed": posterior("mixture"), "good": posterior()}
    table = compare(kinds, X, Y, reference="good")
    assert list(table.index) == ["wide", "mixed", "good"]
    assert list(table.columns) == [
        "RMSE", "NLPD", "CRPS", "coverage 50%", "coverage 90%", "coverage 95%", "PIT error", "distance to reference",
        "seconds",
    ]  # fmt: skip
    for name, made in kinds.items():
        pred = made.predict(X)
        assert table.loc[name, "RMSE"] == pytest.approx(float(ev.rmse(pred, Y)))
        assert table.loc[name, "NLPD"] == pytest.approx(float(ev.nlpd(pred, Y)))
        assert table.loc[name, "CRPS"] == pytest.approx(float(ev.crps(pred, Y)))
        assert table.loc[name, "coverage 90%"] == pytest.approx(float(ev.coverage(pred, Y)[1]))
        assert table.loc[name, "PIT error"] == pytest.approx(float(ev.pit_calibration_error(ev.pit(pred, Y))))
        want = float(ev.wasserstein2(pred, kinds["good"].predict(X)).mean())
        assert table.loc[name, "distance to reference"] == pytest.approx(want, rel=1e-4, abs=1e-12)
        assert table.loc[name, "seconds"] == 1.5


@pytest.mark.parametrize("convert", [np.asarray, pd.Series, torch.Tensor.float, list])
def test_targets_come_in_any_form(convert):
    want = compare({"a": posterior()}, X, Y)
    pd.testing.assert_frame_equal(compare({"a": posterior()}, X, convert(Y)), want, rtol=1e-6)
    assert "distance to reference" not in want.columns


def test_several_outputs_average():
    y = torch.stack([Y, 10 * Y], -1)
    both = compare({"a": posterior(y=y), "b": posterior(y=y, bias=1.0)}, X, y, reference="a")
    each = [compare({"a": posterior(y=y[:, i])}, X, y[:, i]) for i in range(2)]
    assert both.loc["a", "CRPS"] == pytest.approx(sum(t.loc["a", "CRPS"] for t in each) / 2)
    assert both.loc["b", "distance to reference"] == pytest.approx(1.0)


def test_draws_have_no_density_and_unknown_times_are_nan():
    table = compare({"draws": posterior("draws", seconds=None)}, X, Y)
    assert math.isnan(table.loc["draws", "NLPD"])
    assert math.isnan(table.loc["draws", "seconds"])
    assert 0 < table.loc["draws", "CRPS"] < 5


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_labels_get_the_scores_of_labels(kind):
    y = torch.arange(30) % (2 if kind == "binary" else 3)
    made = {"a": posterior(kind, y=y), "b": posterior(kind, y=y[:7], bias=0.1, width=9.0)}
    table = compare(made, X, y, reference="a")
    assert list(table.columns) == ["accuracy", "NLL", "Brier", "ECE", "distance to reference", "seconds"]
    p, q = (m.predict(X) for m in made.values())
    assert table.loc["b", "NLL"] == pytest.approx(float(ev.nlpd(q, y)))
    assert table.loc["b", "Brier"] == pytest.approx(float(ev.brier(q, y)))
    assert table.loc["b", "distance to reference"] == pytest.approx(float(ev.total_variation(p, q).mean()))
    assert table.loc["a", "distance to reference"] == 0


def test_wrong_requests_are_refused():
    with pytest.raises(SettingError, match="must not be empty"):
        compare({}, X, Y)
    with pytest.raises(SettingError, match=r"reference must name one(.|\n)*'hmc'(.|\n)*'gp'"):
        compare({"gp": posterior()}, X, Y, reference="hmc")
    with pytest.raises(ShapeError, match="y must have the predictive's shape"):
        compare({"gp": posterior()}, X, Y[:-1])
    with pytest.raises(DataError, match="one kind of target"):
        compare({"a": posterior(), "b": posterior("binary", y=(Y > 0))}, X, (Y > 0).double())
