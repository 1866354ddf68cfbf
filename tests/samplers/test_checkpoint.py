"""Trees on disk: everything comes back bit for bit and in its layout; a folder of something else is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from bayesdl.errors import SettingError, StorageError
from bayesdl.samplers import _checkpoint, chees, hmc, mams, mclmc, meads, nuts
from bayesdl.samplers._checkpoint import Checkpoint, fingerprint, pack, unpack


class Inner(NamedTuple):
    """Leaves of every kind."""

    tensor: torch.Tensor
    number: float
    nothing: Any = None


class Outer(NamedTuple):
    """A tree."""

    inner: Inner
    parts: tuple[Any, ...]
    named: dict[str, Any]


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(q):
    return -0.5 * q.square().sum(-1)


def same(a, b):
    """Whether two trees are equal in kind, value, dtype and layout."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def test_a_tree_comes_back_bit_for_bit_with_its_layout(tmp_path):
    """Fortran order, broadcast axes, empty and zero-dimensional tensors, floats that no short decimal gives."""
    square = torch.linalg.cholesky(torch.eye(3).double() + 0.1 * torch.ones(3, 3).double())
    tree = Outer(
        Inner(numbers(4, 3).mT, 0.1 + 0.2),
        (numbers(3).expand(5, 3), torch.tensor(3), [True, "word", 7, 1e-300], square, numbers(2, 1, 4).expand(2, 6, 4)),
        {"flags": torch.tensor([True, False]), "none": None, "empty": torch.empty(0, 3), "single": numbers(2).float()},
    )
    spec, tensors = pack(tree)
    _checkpoint._storage.write(tmp_path / "tree", {"spec": spec}, tensors)
    record, tensors = _checkpoint._storage.read(tmp_path / "tree")
    assert same(unpack(record["spec"], tensors, "cpu"), tree)


@pytest.mark.parametrize("kind", ["builtins:tuple", "os:system", "nowhere:Thing", f"{__name__}:Outer"])
def test_a_file_brings_no_classes_of_its_own(kind):
    spec, tensors = pack(Inner(numbers(2), 1.0))
    with pytest.raises(ValueError, match="not known"):
        unpack({**spec, "kind": kind}, tensors, "cpu")
    with pytest.raises(TypeError, match="not complex"):
        pack(Inner(numbers(2), 1j))


def column(first, end):
    steps = torch.arange(first, end)
    return {"draws": steps.double().expand(2, -1).unsqueeze(-1), "step": steps.expand(2, -1)}


def test_draws_are_written_few_times_and_into_few_files(tmp_path, monkeypatch):
    """200 writes of one draw each: a draw is written about log2(200) times, and ten files at most lie there."""
    written = []
    write = _checkpoint._storage.write

    def spy(path, record, tensors):
        written.append(tensors["draws"].shape[-2] if "draws" in tensors else 0)
        write(path, record, tensors)

    monkeypatch.setattr(_checkpoint._storage, "write", spy)
    file = Checkpoint("here", tmp_path / "run", {"a": 1}, torch.zeros(2))
    for n in range(1, 201):
        file.save({"n": n}, n, column, finished=False, seconds=0.5)
        assert len(list((tmp_path / "run").iterdir())) <= 10
    assert sum(written) <= 200 * 8
    again = Checkpoint("here", tmp_path / "run", {"a": 1}, torch.zeros(2)).load(torch.device("cpu"))
    assert again.tree == {"n": 200}
    assert torch.equal(torch.cat([part["step"] for part in again.parts], -1), column(0, 200)["step"])
    assert (again.finished, again.seconds) == (False, 0.5)


def test_a_run_killed_between_draws_and_state_goes_on_from_the_state_before(tmp_path, monkeypatch):
    """Whatever lies there beyond what the state speaks of is not read, and is removed by the next write."""
    path = tmp_path / "run"
    file = Checkpoint("here", path, {}, torch.zeros(2))
    for n in (4, 7):
        file.save({"n": n}, n, column, finished=False, seconds=0.0)
    write = _checkpoint._storage.write

    def killed(target, record, tensors):
        if target.name == "state.safetensors":
            raise KeyboardInterrupt
        write(target, record, tensors)

    monkeypatch.setattr(_checkpoint._storage, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        file.save({"n": 15}, 15, column, finished=False, seconds=0.0)
    (path / ".state.safetensors.0a1b").write_bytes(b"half of a state")
    monkeypatch.undo()
    file = Checkpoint("here", path, {}, torch.zeros(2))
    saved = file.load(torch.device("cpu"))
    assert saved.tree == {"n": 7}
    assert torch.equal(torch.cat([part["step"] for part in saved.parts], -1), column(0, 7)["step"])
    file.save({"n": 9}, 9, column, finished=True, seconds=0.0)
    names = ["draws-00000000-00000004", "draws-00000004-00000007", "draws-00000007-00000009", "state"]
    assert sorted(file.stem for file in path.iterdir()) == names


SETTINGS = {"num_warmup": 12, "num_draws": 6, "num_steps": 3, "seed": 5}


def test_a_finished_run_is_handed_back_without_a_gradient(tmp_path):
    start = numbers(3, 2)
    calls = []

    def counted(q):
        calls.append(q.requires_grad)
        return normal(q)

    first = hmc.run(counted, start, checkpoint=tmp_path / "run", **SETTINGS)
    num = len(calls)
    again = hmc.run(counted, start, checkpoint=tmp_path / "run", **SETTINGS)
    assert len(calls) == num + 1  # the look at the door
    plain = hmc.run(normal, start, **SETTINGS)
    for run in (again, plain):
        assert torch.equal(run.draws, first.draws)
        assert set(run.stats) == set(first.stats)
        assert all(torch.equal(run.stats[n].nan_to_num(), first.stats[n].nan_to_num()) for n in run.stats)
        assert torch.equal(run.step_size, first.step_size)
        assert torch.equal(run.inverse_mass, first.inverse_mass)
        assert (run.num_gradients, run.stopped_by) == (first.num_gradients, "num_draws")
    assert again.seconds >= first.seconds * 0.5


@pytest.mark.parametrize("engine", [hmc, nuts, chees, mams, mclmc, meads])
@pytest.mark.parametrize("thin", [1, 3])
def test_a_finished_run_can_be_made_longer(engine, thin, tmp_path):
    """6 draws, then 15: as though it had been 15 from the start, and nothing computed twice."""
    settings = {"num_warmup": 12, "seed": 5, "thin": thin}
    start, calls = numbers(16, 2), []

    def counted(q):
        calls.append(1)
        return normal(q)

    unbroken = engine.run(counted, start, num_draws=15, **settings)
    whole = len(calls)
    first = engine.run(counted, start, num_draws=6, checkpoint=tmp_path / "run", **settings)
    longer = engine.run(counted, start, num_draws=15, checkpoint=tmp_path / "run", **settings)
    assert len(calls) <= 2 * whole + 1  # one more look at the door
    assert torch.equal(longer.draws[:, :6], first.draws)
    assert torch.equal(longer.draws, unbroken.draws)
    assert all(torch.equal(longer.stats[n].nan_to_num(), unbroken.stats[n].nan_to_num()) for n in unbroken.stats)
    assert (longer.num_gradients, longer.stopped_by) == (unbroken.num_gradients, "num_draws")


def test_a_run_whose_budget_is_spent_does_not_become_longer(tmp_path):
    """More draws asked for, the same budget: the same draws."""
    settings = {**SETTINGS, "max_gradients": 45, "num_draws": 100, "checkpoint": tmp_path / "run"}
    first = hmc.run(normal, numbers(3, 2), **settings)
    again = hmc.run(normal, numbers(3, 2), **{**settings, "num_draws": 200})
    assert first.stopped_by == again.stopped_by == "max_gradients"
    assert torch.equal(first.draws, again.draws)
    assert first.num_gradients == again.num_gradients


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_draws": 5}, "holds 6 draws of each chain"),
        ({"num_steps": 4}, "num_steps=3"),
        ({"seed": 6}, "seed=5"),
        ({"target_accept": 0.9}, "target_accept=0.8"),
        ({"step_size": 0.1}, "step_size=None"),
        ({"max_gradients": 50}, "max_gradients=None"),
        ({"initial": numbers(3, 2, seed=9)}, "initial="),
        ({"initial": numbers(3, 2).float()}, "float64"),
        ({"log_density": lambda q: 2 * normal(q)}, "other values at the initial positions"),
    ],
)
def test_a_folder_of_another_run_is_refused(change, words, tmp_path):
    run = {"log_density": normal, "initial": numbers(3, 2), "checkpoint": tmp_path / "run", **SETTINGS}
    hmc.run(run.pop("log_density"), run.pop("initial"), **run)
    run = {"log_density": normal, "initial": numbers(3, 2), **run, **change}
    with pytest.raises(SettingError, match=r"hmc\.run") as caught:
        hmc.run(run.pop("log_density"), run.pop("initial"), **run)
    assert words in str(caught.value)
    assert "delete the folder" in str(caught.value)


@pytest.mark.parametrize("harm", ["cut", "flip", "other", "gone", "file", "strange"])
def test_a_damaged_folder_is_refused_with_advice(harm, tmp_path):
    path = tmp_path / "run"
    hmc.run(normal, numbers(3, 2), checkpoint=path, **SETTINGS)
    state = path / "state.safetensors"
    content = state.read_bytes()
    if harm == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif harm == "flip":
        state.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif harm == "other":
        _checkpoint._storage.write(state, {"model": "BNN"}, {"x": numbers(2)})
    elif harm == "gone":
        next(path.glob("draws-*")).unlink()
    elif harm == "file":
        path = state
    else:
        (path / "thesis.tex").touch()
    with pytest.raises(StorageError, match=r"hmc\.run") as caught:
        hmc.run(normal, numbers(3, 2), checkpoint=path, **SETTINGS)
    assert "fix  " in str(caught.value)


def test_settings_are_told_apart_by_the_numbers_in_their_tensors():
    x = numbers(3, 2)
    assert fingerprint({"a": x, "b": (1, None)}) == {"a": fingerprint(x.clone()), "b": [1, None]}
    assert len({fingerprint(x), fingerprint(x.mT), fingerprint(x.float()), fingerprint(x + 1e-9)}) == 4
