"""The CSV reader: what it reads, and how it names what it cannot."""

import pytest
import torch

from bayesdl import datasets
from bayesdl.errors import DataError

GOOD = "age,price,size\n1,10.5,3\n2,-11e1,4\n30,12,5\n"


def write(tmp_path, text, name="houses.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def test_reads_numbers_and_takes_the_target_out(tmp_path):
    data = datasets.read_csv(write(tmp_path, GOOD), "price")
    assert data.x.tolist() == [[1, 3], [2, 4], [30, 5]]
    assert data.y.tolist() == [10.5, -110, 12]
    assert (data.name, data.task, data.feature_names, data.target_name) == (
        "houses",
        "regression",
        ("age", "size"),
        "price",
    )


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\n\n").replace("age", '" age "'),
        GOOD.rstrip("\n"),
    ],
    ids=["semicolon", "tab", "byte order mark", "windows", "blank lines and quotes", "no last newline"],
)
def test_reads_every_common_spelling(tmp_path, text):
    got, want = (datasets.read_csv(write(tmp_path, t), "price") for t in (text, GOOD))
    assert torch.equal(got.x, want.x)
    assert got.feature_names == want.feature_names


def test_integer_targets_are_regression_unless_told(tmp_path):
    path = write(tmp_path, "x,y\n1,10\n2,9\n3,10\n4,2\n")
    assert datasets.read_csv(path, "y").task == "regression"
    data = datasets.read_csv(path, "y", task="classification")
    assert (data.task, data.class_names, data.y.tolist()) == ("multiclass", ("2", "9", "10"), [2, 1, 2, 0])


def test_text_classes_are_numbered_in_order(tmp_path):
    data = datasets.read_csv(write(tmp_path, "x,y\n1,spam\n2,ham\n3,spam\n"), "y", task="classification")
    assert (data.task, data.class_names, data.y.tolist()) == ("binary", ("ham", "spam"), [1, 0, 1])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("2,-11e1,4", "2,,4"), r"column 'price', data row 2 \(line 3\) is missing"),
        (GOOD.replace("30,", "NA,"), r"column 'age', data row 3 \(line 4\) is missing"),
        (GOOD.replace("\n2,", "\n\n\nnan,"), r"column 'age', data row 2 \(line 5\) is missing"),
        ('a,"note\non, two lines",price\n1,2,3\n1,x,4\n', r"data row 2 \(line 4\) is text \('x'; 1 of 2 cells"),
        (GOOD.replace("2,-11e1", "two,-11e1"), r"column 'age', data row 2 \(line 3\) is text \('two'; 1 of 3 cells"),
        (GOOD.replace("12", "inf"), r"column 'price', data row 3 \(line 4\) is inf"),
        (GOOD.replace("12", "1_2"), r"column 'price', data row 3 \(line 4\) is text"),
        (GOOD.replace("price", "cost"), r"must have the target column 'price'(.|\n)*columns age, cost, size"),
        (GOOD.replace("size", "age"), r"column names must differ(.|\n)*'age' in columns 1, 3"),
        (GOOD.replace("size", ""), r"every column must have a name(.|\n)*column 3 has none"),
        ("age,price\n1,2\n", r"at least two data rows(.|\n)*1 data row"),
        ("age,price\n", r"at least two data rows(.|\n)*0 data row"),
        ("", r"an empty file"),
        ("\n\n", r"an empty file"),
        (GOOD.replace("2,-11e1,4", "2,-11e1"), r"2 cells in data row 2 \(line 3\)"),
        (GOOD.replace("2,-11e1,4", "2,-11e1,4,"), r"4 cells in data row 2 \(line 3\)"),
        ("price\n1\n2\n", r"must have input columns"),
        ("x,price\n1,5\n2,5.0\n", r"the target must vary(.|\n)*'price' holds one value in all 2 rows"),
    ],
)
def test_unusable_files_name_the_column_and_row(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=says) as caught:
        datasets.read_csv(path, "price")
    assert str(caught.value).startswith("read_csv: ")
    assert "\n  fix  " in str(caught.value)


def test_unusable_classes_and_files(tmp_path):
    with pytest.raises(DataError, match=r"column 'y', data row 2 \(line 3\) is missing"):
        datasets.read_csv(write(tmp_path, "x,y\n1,spam\n2,?\n3,ham\n"), "y", task="classification")
    with pytest.raises(DataError, match="the target must vary"):
        datasets.read_csv(write(tmp_path, "x,y\n1,spam\n2,spam\n"), "y", task="classification")
    with pytest.raises(DataError, match="no such file"):
        datasets.read_csv(tmp_path / "absent.csv", "y")
    with pytest.raises(DataError, match="a folder"):
        datasets.read_csv(tmp_path, "y")
    with pytest.raises(DataError, match="UTF-8"):
        datasets.read_csv(write(tmp_path, "größe,y\n1,2\n2,3\n", encoding="latin-1"), "y")
