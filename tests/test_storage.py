"""Files: what was saved comes back, whatever is not whole is refused, and nothing in a file runs."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import bayesdl
from bayesdl import _doors, _records, _storage, kernels, priors
from bayesdl.errors import StorageError
from bayesdl.hyper import Gamma, HalfNormal, LogNormal
from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
from bayesdl.models import BNN, GP
from tests.posterior.toys import draws_posterior, gp_posterior, labels, new_points, toy_data

TENSORS = {
    "a": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
    "scalar": torch.tensor(-2.5),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
    "counts": torch.tensor([1, 2**40]),
}


def module():
    network = nn.Sequential(
        nn.utils.skip_init(nn.Linear, 2, 3), nn.LayerNorm(3), nn.Tanh(), nn.utils.skip_init(nn.Linear, 3, 1)
    )
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(0.3)
    return network


def every_posterior():
    """One of each form, with settings away from the defaults."""
    x, y = toy_data()
    xc, yc = labels(Categorical(3))
    kernel = 0.7 * kernels.RBF(lengthscale=0.9, ard=False) + kernels.Linear() * kernels.Matern(
        nu=0.5, active_dims=(1,), lengthscale_prior=Gamma(3.0, 2.0)
    )
    network = BNN(
        (4, np.int64(3)), "relu", priors.StudentT(1.5, bias_scale=0.6, dof=4.0), Gaussian(lower=0.01, prior=None)
    )
    return {
        "gp": gp_posterior(x, y, kernel=kernel),
        "gp, batch and outputs": gp_posterior(*toy_data((3,), 2), kernel=kernels.NNGP(depth=2)),
        "gp, float32": gp_posterior(*toy_data(dtype=torch.float32)),
        "draws": draws_posterior(x, y, model=network),
        "draws, batch and outputs": draws_posterior(
            *toy_data((3,), 2), model=BNN((3,), prior=priors.Laplace(2.0, fan_in=False))
        ),
        "labels": draws_posterior(xc, yc, model=BNN((3,), "gelu", likelihood=Categorical(3))),
        "binary": draws_posterior(*labels(Bernoulli()), model=BNN((), likelihood=Bernoulli())),
        "module": draws_posterior(x, y, model=BNN(module=module())),
    }


@pytest.mark.parametrize("name", list(every_posterior()))
def test_a_posterior_comes_back_the_same(name, tmp_path):
    posterior = every_posterior()[name]
    posterior.save(tmp_path / "deep" / "er" / "p.bdl")
    own = module() if name == "module" else None
    loaded = bayesdl.load(str(tmp_path / "deep" / "er" / "p.bdl"), module=own)
    assert type(loaded) is type(posterior)
    if own is None:
        assert loaded.model == posterior.model
    x_new = new_points(4, dtype=torch.float32 if "float32" in name else torch.float64)
    for noise in (True, False):
        one, two = posterior.predict(x_new, noise=noise), loaded.predict(x_new, noise=noise)
        assert torch.equal(one.mean, two.mean)
        assert torch.equal(one.variance, two.variance)
        assert one.mean.dtype == two.mean.dtype
    assert torch.equal(posterior.sample(x_new, (2,), seed=3), loaded.sample(x_new, (2,), seed=3))
    assert torch.equal(posterior.functions(2, seed=3)(x_new), loaded.functions(2, seed=3)(x_new))
    assert json.dumps(dict(loaded.diagnostics)) == json.dumps(dict(posterior.diagnostics))
    assert (loaded.log_evidence is None) == (posterior.log_evidence is None)
    if posterior.log_evidence is not None:
        assert torch.equal(loaded.log_evidence, posterior.log_evidence)
    assert loaded.to_arviz().equals(posterior.to_arviz())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a saved GP posterior."""
    path = tmp_path_factory.mktemp("saved") / "p.bdl"
    every_posterior()["gp"].save(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "p.bdl"


def refusal(path, **settings):
    """The message with which a file is refused, in the house form."""
    with pytest.raises(StorageError) as caught:
        bayesdl.load(path, **settings)
    where, got, fix = str(caught.value).split("\n")
    assert where.startswith("bdl.load: ")
    assert got.startswith("  got  ")
    assert fix.startswith("  fix  ")
    return str(caught.value)


@given(st.floats(0, 1))
def test_a_truncated_file_is_refused(saved, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "p.bdl"
    length = min(int(share * len(saved)), len(saved) - 1)
    path.write_bytes(saved[:length])
    assert f"p.bdl must be a whole safetensors file.\n  got  {length} bytes" in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, -1])
def test_a_file_cut_at_an_edge_is_refused(saved, path, length):
    path.write_bytes(saved[:length])
    refusal(path)


def loads_the_same_or_is_refused(path, whole):
    try:
        found = _storage.read(path)
    except StorageError:
        return True
    record, tensors = found
    return (
        record == whole[0]
        and tensors.keys() == whole[1].keys()
        and all(t.equal(whole[1][n]) for n, t in tensors.items())
    )


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_flipped_byte_is_noticed(saved, tmp_path_factory, share, flip):
    """Or changes nothing, as among the blanks that pad a header. Numbers too: a digest covers them."""
    folder = tmp_path_factory.mktemp("flip")
    (folder / "whole").write_bytes(saved)
    changed = bytearray(saved)
    changed[int(share * len(saved))] ^= flip
    (folder / "p.bdl").write_bytes(changed)
    assert loads_the_same_or_is_refused(folder / "p.bdl", _storage.read(folder / "whole"))


def test_a_flipped_byte_anywhere_in_a_small_file_is_noticed(path):
    _storage.write(path, {"form": "x"}, TENSORS)
    content, whole = path.read_bytes(), _storage.read(path)
    for i in range(len(content)):
        changed = bytearray(content)
        changed[i] ^= 1 << (i % 8)
        path.write_bytes(changed)
        assert loads_the_same_or_is_refused(path, whole), f"byte {i}: {content[i]} became {changed[i]}"


def test_a_flipped_bit_in_the_last_number_is_named_as_such(saved, path):
    path.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
    assert "p.bdl must hold what was written to it" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert f"path must name a file.\n  got  {tmp_path / 'none.bdl'}" in refusal(tmp_path / "none.bdl")
    refusal(tmp_path)


def test_foreign_files_are_refused(path):
    save_file({"weight": torch.ones(3)}, path)
    assert "must be written by posterior.save" in refusal(path)
    save_file({"weight": torch.ones(3)}, path, metadata={"format": "pt"})
    assert "metadata ['format']" in refusal(path)
    save_file({"weight": torch.ones(3)}, path, metadata={"bayesdl": "[1, 2"})
    assert "must be written by posterior.save" in refusal(path)
    save_file({"weight": torch.ones(3)}, path, metadata={"bayesdl": "[1, 2]"})
    assert "must be written by posterior.save" in refusal(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "must be a whole safetensors file" in refusal(path)
    path.write_text("x,y\n1,2\n")
    refusal(path)
    torch.save({"a": torch.ones(3)}, path)
    refusal(path)


class Bomb:
    """What would leave a mark if a file were unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def test_a_pickle_is_refused_unopened(path, tmp_path):
    mark = tmp_path / "mark"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    refusal(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # it would have


def forged(path, change):
    """A file with a right digest whose record or tensors were changed by `change(record, tensors)`."""
    record, tensors = _storage.read(path)
    change(record, tensors)
    _storage.write(path, record, tensors)


def test_a_later_format_is_refused_with_its_number(saved, path):
    path.write_bytes(saved)
    forged(path, lambda record, tensors: record.update(format=_storage._FORMAT + 1, bayesdl="9.9"))
    assert (
        f"reads formats up to {_storage._FORMAT}.\n  got  format {_storage._FORMAT + 1}, written by bayesdl 9.9"
        in refusal(path)
    )


def put(*keys, value):
    """A change of one entry of the record."""

    def change(record, tensors):
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


UNKNOWN_KINDS = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "kernels.Kernel",
    "kernels.autograd_pullback",
    "kernels._Stationary",
    "kernels.stationary.Kernel",
    "models.WeightSpace",
    "models.LogDensity",
    "models.Layout",
    "priors.WeightPrior",
    "posterior.GPPosterior",
    "likelihoods.math",
    "hyper.__class__",
    "kernels.",
    ".",
    "",
    "Matern",
    None,
    {"kind": "kernels.RBF"},
]


@pytest.mark.parametrize("kind", UNKNOWN_KINDS, ids=str)
def test_a_kind_that_is_no_setting_is_refused(saved, path, kind):
    path.write_bytes(saved)
    forged(path, put("model", "kernel", "kind", value=kind))
    assert "names settings that this version lacks" in refusal(path)


def drop(*names):
    def change(record, tensors):
        for name in names:
            record.pop(name, None)
            tensors.pop(name, None)

    return change


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (put("form", value="sparse"), "form must be one of ['amortized', 'closed_form'"),
        (put("form", value="draws"), "a DrawsPosterior has a BNN"),
        (put("model", value={"kind": "kernels.RBF"}), "a GPPosterior has a GP"),
        (put("model", value=3), "a GPPosterior has a GP"),
        (put("model", "kernel", "colour", value=1), "must have the fields of this version"),
        (put("model", "kernel", value=3), "models.GP must have the fields of this version"),
        (put("model", "mean", value="linear"), "models.GP must have the fields of this version"),
        (drop("model"), "lacks a part"),
        (drop("has_outputs"), "no 'has_outputs'"),
        (drop("diagnostics"), "no 'diagnostics'"),
        (drop("data.x"), "no 'data.x'"),
        (drop("units.y_scale"), "no 'units.y_scale'"),
        (drop("state.chol"), "no 'state.chol'"),
        (drop("constant"), "no 'constant'"),
    ],
)
def test_a_file_that_makes_no_posterior_is_refused(saved, path, change, wanted):
    path.write_bytes(saved)
    forged(path, change)
    assert wanted in refusal(path)


def test_a_posterior_without_evidence_stays_without(saved, path):
    path.write_bytes(saved)
    forged(path, drop("log_evidence"))
    assert bayesdl.load(path).log_evidence is None


def test_the_network_of_a_module_posterior_must_be_given(path):
    every_posterior()["module"].save(path)
    message = refusal(path)
    assert "own network" in message
    assert "bdl.load(path, module=network)" in message
    wider = nn.Sequential(nn.utils.skip_init(nn.Linear, 2, 4), nn.utils.skip_init(nn.Linear, 4, 1))
    assert "a network with 18" in refusal(path, module=wider)


# Writing


def test_tensors_and_record_come_back_as_they_were(path):
    record = {"number": 0.1, "nested": {"list": [1, None, True]}, "text": "ünïcode\n", "infinity": float("inf")}
    _storage.write(path, record, TENSORS)
    found, tensors = _storage.read(path)
    assert {k: found[k] for k in record} == record
    assert found["bayesdl"] == bayesdl.__version__
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_tensors_that_share_memory_or_need_gradients_are_written(path):
    base = torch.arange(4.0, requires_grad=True)
    _storage.write(path, {}, {"a": base, "b": base[1:], "c": base.expand(3, 4)})
    _, tensors = _storage.read(path)
    assert tensors["b"].tolist() == [1.0, 2.0, 3.0]
    assert tensors["c"].shape == (3, 4)


def test_any_safetensors_reader_opens_the_tensors(path):
    _storage.write(path, {}, TENSORS)
    assert torch.equal(load_file(path)["a"], TENSORS["a"])


def test_a_loaded_posterior_does_not_depend_on_its_file(saved, path):
    path.write_bytes(saved)
    posterior = bayesdl.load(path)
    before = posterior.predict(new_points(3)).mean
    with path.open("r+b") as file:
        file.write(bytes(len(saved)))
    assert torch.equal(posterior.predict(new_points(3)).mean, before)
    path.unlink()
    assert torch.equal(posterior.predict(new_points(3)).mean, before)


@pytest.mark.parametrize("fault", ["replace", "open"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(fault, path, monkeypatch):
    path.write_bytes(b"old")

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "replace", broken) if fault == "replace" else (Path, "open", broken)))
    with pytest.raises(OSError, match="No space left"):
        _storage.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch):
    path.write_bytes(b"old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _storage.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_killed_write_leaves_the_old_file(path):
    """A process that dies between writing and renaming."""
    path.write_bytes(b"old")
    script = (
        "import os, sys\nfrom bayesdl import _storage\n"
        "os.replace = lambda *names: os._exit(9)\n_storage.write_bytes(sys.argv[1], b'new')\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], check=False, cwd=Path(__file__).parents[1])
    assert run.returncode == 9
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_has_the_permissions_of_any_other_new_file(path):
    _storage.write_bytes(path, b"content")
    path.with_name("other").write_bytes(b"content")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.with_name("other").stat().st_mode)


# Records


SETTINGS = [
    GP(kernels.Matern(nu=1.5, lengthscale=(0.3, 2.0), active_dims=(0, 2)), mean="zero"),
    GP(
        0.3 * kernels.Periodic(period=1.7)
        + kernels.NNGP(depth=4, activation="erf") * kernels.RationalQuadratic(alpha=0.4)
    ),
    GP(kernels.RBF(lengthscale_prior=HalfNormal(0.4)), likelihood=Gaussian(0.3, LogNormal(-1.0, 0.5), 1e-3)),
    BNN((3, 7), "erf", priors.Laplace(0.4, bias_scale=2.0, fan_in=False), Categorical(11)),
    BNN((), "sin", priors.StudentT(dof=2.5), Bernoulli()),
    (1, ("a", None, 0.1), [True, (2.5,)]),
]


@pytest.mark.parametrize("value", SETTINGS, ids=lambda v: type(v).__name__)
def test_settings_come_back_through_json(value):
    text = json.dumps(_records.encode(value))
    assert _records.decode(json.loads(text), _doors._resolve) == value


def test_numbers_of_numpy_become_numbers():
    for value in (np.float32(0.5), np.int64(3), np.bool_(True), np.float64(0.1)):
        encoded = _records.encode(value)
        assert type(encoded) in (float, int, bool)
        assert encoded == value


@dataclass(frozen=True)
class OwnPrior:
    """A prior that no file can describe."""

    scale: float = 1.0
    typical = 1.0


def test_settings_of_the_users_own_class_are_refused_when_saved(path):
    """Rather than written as something that cannot be read again."""
    model = GP(kernels.RBF(lengthscale_prior=OwnPrior()))
    for value in (model, {"a": 1}, torch.ones(2), print, Gaussian):
        with pytest.raises(StorageError, match=r"posterior.save: a file holds settings of bayesdl's own classes"):
            _records.encode(value)
    posterior = every_posterior()["gp"]
    posterior._model = model
    path.write_bytes(b"old")
    with pytest.raises(StorageError, match="OwnPrior"):
        posterior.save(path)
    assert path.read_bytes() == b"old"
