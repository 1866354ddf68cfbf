"""Files of networks: they come back as they were, and whatever is wrong with one is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bayesdl as bdl
from bayesdl import _storage
from bayesdl.amortized import Architecture, Network, Pretrained, checkpoint, shipped
from bayesdl.errors import SettingError, StorageError
from tests.toy_tasks import tiny_card

BARS = Architecture(2, "bars", 5, width=8, num_layers=2, num_heads=2, hidden=8, num_conditions=1)
BORDERS = torch.tensor([-2.0, -1.0, -0.2, 0.3, 1.0, 2.5])


def toy(architecture: Architecture = BARS, **card: object) -> Pretrained:
    network = Network(architecture, seed=1)
    with torch.no_grad():
        network.head[2].weight.normal_(generator=torch.Generator().manual_seed(2))
    return Pretrained(network, BORDERS if architecture.head == "bars" else None, tiny_card(**card))


def parts(path: Path) -> tuple[dict, dict]:
    toy().save(path)
    record, tensors = _storage.read(path)
    return {key: record[key] for key in ("kind", "architecture", "card")}, tensors


def test_a_network_comes_back_as_it_was(tmp_path: Path) -> None:
    before = toy(prior="x", licence="Apache-2.0")
    before.save(tmp_path / "a.pfn")
    after = Pretrained.load(tmp_path / "a.pfn")
    assert after.card == before.card
    assert after.network.architecture == BARS
    assert torch.equal(after.borders, BORDERS)
    x, y, xs = torch.randn(3, 1, 4, 2, generator=torch.Generator().manual_seed(3)).unbind()
    assert torch.equal(after.network(x, y[..., 0], xs), before.network(x, y[..., 0], xs))
    assert not after.network.training
    assert not any(weight.requires_grad for weight in after.network.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["a.pfn"]


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    big = toy(Architecture(2, "mixture", 3, width=64, num_heads=2))
    big.save(tmp_path / "a.safetensors")
    big.save(tmp_path / "b.safetensors", dtype=torch.float16)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < 0.6 * sizes[0]
    ours, theirs = big.network.state_dict(), Pretrained.load(tmp_path / "b.safetensors").network.state_dict()
    for name in ours:
        assert theirs[name].dtype == torch.float32
        torch.testing.assert_close(theirs[name], ours[name], rtol=5e-4, atol=1e-6)
    beside = json.loads((tmp_path / "a.json").read_text())
    assert beside["card"] == big.card
    assert beside["architecture"]["width"] == 64


def test_moving_leaves_the_original_where_it_was() -> None:
    net = toy()
    assert net.to("cpu") is net
    double = net.to(dtype=torch.float64)
    assert double.network.first.dtype == torch.float64
    assert net.network.first.dtype == torch.float32


def test_a_truncated_or_flipped_file_is_refused(tmp_path: Path) -> None:
    toy().save(tmp_path / "a.pfn")
    whole = (tmp_path / "a.pfn").read_bytes()
    (tmp_path / "short.pfn").write_bytes(whole[:-100])
    (tmp_path / "text.pfn").write_bytes(b"import os; os.system('echo')")
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    (tmp_path / "flipped.pfn").write_bytes(bytes(flipped))
    for name in ("short", "text", "flipped"):
        with pytest.raises(StorageError, match=rf"{name}\.pfn must be a whole file"):
            Pretrained.load(tmp_path / f"{name}.pfn")


WRONG = [
    ("foreign keys", lambda r, t: t.update({"network.extra": torch.zeros(2)}), "has besides extra"),
    ("missing keys", lambda r, t: t.pop("network.norm.weight"), "lacks norm.weight"),
    ("shapes", lambda r, t: t.update({"network.appended": torch.zeros(3)}), r"appended of shape \(3,\)"),
    ("not finite", lambda r, t: t["network.first"].fill_(torch.nan), "must be finite"),
    ("other architecture", lambda r, t: r["architecture"].update(width=16), "of shape"),
    ("more layers", lambda r, t: r["architecture"].update(num_layers=3), "lacks blocks.2"),
    ("endless layers", lambda r, t: r["architecture"].update(num_layers=10**12), "layers claimed"),
    ("unknown field", lambda r, t: r["architecture"].update(depth=3), "fields missing or unknown"),
    ("absurd field", lambda r, t: r["architecture"].update(width="8"), "width must be"),
    ("no architecture", lambda r, t: r.pop("architecture"), "fields missing or unknown"),
    ("no card", lambda r, t: r.pop("card"), "has a card"),
    ("short card", lambda r, t: r["card"].pop("ranges"), "no ranges"),
    ("strange ranges", lambda r, t: r["card"].update(ranges={"n": [3, 1], "d": [1, 2], "x": [0, 1]}), "ranges must"),
    ("another task", lambda r, t: r["card"].update(task="classification"), "does regression"),
    ("strange units", lambda r, t: r["card"].update(inputs="metres"), "inputs must be one of"),
    ("no borders", lambda r, t: t.pop("borders"), "borders must be finite"),
    ("unsorted borders", lambda r, t: t["borders"][1:3].copy_(torch.tensor([0.5, 0.1])), "borders must be finite"),
    ("few borders", lambda r, t: t.update(borders=t["borders"][:-1].clone()), "borders must be finite"),
    ("noise token", lambda r, t: (r["architecture"].update(num_conditions=0), r["card"].update(noise_token=True)),
     "is a condition"),
    ("another kind", lambda r, t: r.update(kind="recipe"), "must hold a pretrained network"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path: Path, change, message: str) -> None:
    record, tensors = parts(tmp_path / "a.pfn")
    change(record, tensors)
    _storage.write(tmp_path / "b.pfn", record, tensors)
    with pytest.raises(StorageError, match=message):
        Pretrained.load(tmp_path / "b.pfn")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"check the path|did you mean"):
        Pretrained.load(tmp_path / "none.pfn")


def test_posteriors_and_networks_are_told_apart(tmp_path: Path) -> None:
    toy().save(tmp_path / "a.pfn")
    with pytest.raises(StorageError):
        bdl.load(tmp_path / "a.pfn")
    x = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    bdl.ExactGP(bdl.GP(bdl.kernels.RBF()), optimize=False).fit(x, x[:, 0], seed=0).save(tmp_path / "b.bdl")
    with pytest.raises(StorageError, match="must hold a pretrained network"):
        Pretrained.load(tmp_path / "b.bdl")


def test_parts_that_do_not_fit_are_refused_when_they_are_put_together() -> None:
    with pytest.raises(SettingError, match="only bars have borders"):
        Pretrained(Network(Architecture(1, "mixture", 2, width=8, num_heads=2, hidden=8)), BORDERS, tiny_card())
    card = tiny_card()
    card.pop("prior")
    with pytest.raises(SettingError, match="no prior"):
        Pretrained(Network(BARS), BORDERS, card)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_network_loads_and_its_card_stands_beside_it(name: str) -> None:
    found = Pretrained.load(name)
    beside = json.loads((checkpoint.WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
    assert beside["card"] == found.card
    assert found.card["name"] == name
    assert found.card["licence"]
