"""Data sets by name, splits, and synthetic generators."""

import numpy as np
import pytest
import torch

from bayesdl import datasets
from bayesdl.errors import DataError, SettingError


@pytest.mark.parametrize(
    ("name", "shape", "task", "classes"),
    [
        ("diabetes", (442, 10), "regression", 0),
        ("breast_cancer", (569, 30), "binary", 2),
        ("digits", (1797, 64), "multiclass", 10),
    ],
)
def test_bundled_sets_load_as_documented(name, shape, task, classes):
    data = datasets.load(name)
    assert tuple(data.x.shape) == shape
    assert data.y.shape == shape[:1]
    assert (data.task, len(data.feature_names), len(data.class_names)) == (task, shape[1], classes)
    assert data.x.dtype == torch.float64
    assert data.y.dtype == (torch.float64 if task == "regression" else torch.int64)
    if classes:
        assert sorted(set(data.y.tolist())) == list(range(classes))


def test_diabetes_comes_in_raw_units():
    data = datasets.load("diabetes")
    age = data.x[:, data.feature_names.index("age")]
    assert 18 < float(age.min()) < float(age.max()) < 100


def test_uci_sets_load_with_their_published_splits(data_dir):
    for name, shape, num_splits in (("yacht", (308, 6), 20), ("boston", (506, 13), 20)):
        data = datasets.load(f"uci:{name}")
        assert tuple(data.x.shape) == shape
        assert data.splits.shape == (num_splits, shape[0])
        assert data.splits.dtype == torch.bool
        assert set(data.splits.sum(1).tolist()) == {round(shape[0] * 0.1)}  # a tenth is held out


def test_unknown_and_absent_sets_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="diabetes, breast_cancer, digits or uci:NAME"):
        datasets.load("iris")
    with pytest.raises(DataError, match="boston, concrete"):
        datasets.load("uci:bostom")
    monkeypatch.delenv("BAYESDL_DATA", raising=False)
    with pytest.raises(DataError, match="BAYESDL_DATA is not set"):
        datasets.load("uci:yacht")
    monkeypatch.setenv("BAYESDL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"no file {tmp_path}"):
        datasets.load("uci:yacht")
    (tmp_path / "uci").mkdir()
    np.savez(tmp_path / "uci" / "yacht.npz", X=np.zeros((3, 2)))
    with pytest.raises(DataError, match="must hold X, y, n and test_mask"):
        datasets.load("uci:yacht")
    (tmp_path / "uci" / "yacht.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match="must hold X, y, n and test_mask"):
        datasets.load("uci:yacht")


@pytest.mark.parametrize(("n", "num_splits"), [(10, 2), (103, 5), (7, 7), (442, 10)])
def test_folds_test_every_point_exactly_once(n, num_splits):
    test = datasets.splits(n, num_splits, seed=3)
    assert test.shape == (num_splits, n)
    assert bool((test.sum(0) == 1).all())
    sizes = test.sum(1)
    assert int(sizes.max() - sizes.min()) <= 1


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.37, 0.9])
@pytest.mark.parametrize("n", [2, 11, 442])
def test_holdout_has_the_asked_size_and_leaves_something_to_fit(n, fraction):
    test = datasets.splits(n, 1, fraction, seed=3)[0]
    assert 1 <= int(test.sum()) <= n - 1
    if n > 2:
        assert abs(int(test.sum()) - n * fraction) <= 1


def test_splits_depend_on_the_seed_only():
    assert torch.equal(datasets.splits(50, 5, seed=1), datasets.splits(50, 5, seed=1))
    assert not torch.equal(datasets.splits(50, 5, seed=1), datasets.splits(50, 5, seed=2))
    assert not torch.equal(datasets.splits(50, 1, seed=1), datasets.splits(50, 1, seed=2))


def test_splits_with_labels_keep_the_shares_of_classes():
    labels = torch.tensor([0] * 90 + [1] * 10)
    for test in datasets.splits(100, 5, seed=0, labels=labels):
        assert int(labels[test].sum()) == 2
    assert int(labels[datasets.splits(100, 1, 0.2, seed=0, labels=labels)[0]].sum()) == 2


def test_impossible_splits_are_refused():
    with pytest.raises(SettingError, match="5 points are needed"):
        datasets.splits(4, 5)
    with pytest.raises(SettingError, match="2 points are needed"):
        datasets.splits(1, 1)
    with pytest.raises(SettingError, match="test_fraction"):
        datasets.splits(10, 1, 1.0)
    with pytest.raises(SettingError, match="num_splits"):
        datasets.splits(10, 0)


def test_noisy_sine_has_its_gap_and_its_noise():
    data = datasets.noisy_sine_with_gap(2000, noise_scale=0.3, seed=5)
    x = data.x[:, 0]
    assert not bool(((x > -0.5) & (x < 1.2)).any())
    assert float(x.min()) < -2.95
    assert float(x.max()) > 2.95
    noise = data.y - datasets.true_noisy_sine(x)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.08)  # five standard errors
    assert torch.equal(data.y, datasets.noisy_sine_with_gap(2000, noise_scale=0.3, seed=5).y)


def test_two_moons_are_half_circles():
    """Without noise every point lies on the unit circle around its moon's centre, on the right side of it."""
    data = datasets.two_moons(100, noise_scale=0.0, seed=1)
    y = data.y.double()
    offset = data.x - torch.stack([y, 0.5 * y], -1)
    assert torch.allclose(offset.norm(dim=-1), torch.ones(100).double())
    assert bool((offset[:, 1] * (1 - 2 * y) >= 0).all())
    assert data.y.sum() == 50
