"""A trained network as one object and one file: weights, borders of its bars, and a card that says what it was trained
for. Files are safetensors with JSON in the header; reading one runs no code from it.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bayesdl import _storage
from bayesdl.amortized.network import Architecture, Network
from bayesdl.errors import SettingError, StorageError, fail

WEIGHTS = Path(__file__).parent / "weights"
_KIND = "pretrained network"
_TASKS = {"bars": "regression", "mixture": "regression", "kernel": "regression", "classes": "classification"}
_LATER = {"kernel", "refinements"}  # fields of an architecture that older files do not have
_CARD = ("name", "task", "prior", "ranges", "inputs", "targets")
_UNITS = {"inputs": ("standardized", "unit", "raw"), "targets": ("standardized", "raw")}
_AGAIN = "save the network again, or fetch the file again"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A trained network, ready to predict.

    Args:
        network: In evaluation mode and without gradients in its weights; gradients in x flow.
        borders: Borders of the bars in the network's units, (outputs + 1,), for a head of bars; else None.
        card: What a user must know of it, JSON throughout: `name`; `task` ("regression" or "classification"); `prior`;
            `ranges`, of "n", "d" and "x", each [low, high], in which it was trained; the units of `inputs`
            ("standardized", "unit" cube or "raw") and of `targets` ("standardized" or "raw"); `noise_token`, whether
            condition 0 asks for values without noise; and, from `pretrain`, `schedule`, `steps`, `seconds` and `log`.

    Raises:
        SettingError: The parts do not fit each other, or the card lacks an entry.
    """

    network: Network
    borders: Tensor | None
    card: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_card("Pretrained", SettingError, self.network.architecture, self.borders, self.card)
        self.network.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write network, borders and card to `path`; beside a .safetensors file the card stands in a .json file too.

        Args:
            dtype: Of the weights in the file. torch.float16 halves it at a relative error of 5e-4 a weight.
        """
        record = {"kind": _KIND, "architecture": dataclasses.asdict(self.network.architecture), "card": dict(self.card)}
        tensors = {f"network.{name}": weight.to(dtype) for name, weight in self.network.state_dict().items()}
        if self.borders is not None:
            tensors["borders"] = self.borders
        _storage.write(path, record, tensors)
        if Path(path).suffix == ".safetensors":
            _storage.write_bytes(Path(path).with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path_or_name: str | os.PathLike[str]) -> Self:
        """Read a file that `save` or `pretrain` wrote, or a network that ships with the package, by its name.

        Raises:
            SettingError: Neither a file nor the name of a shipped network.
            StorageError: The file is damaged, foreign, lacks its card, or its weights are not those of the
                architecture that it names.
        """
        path = _find(path_or_name)
        record, tensors = _read(path)
        architecture = _architecture(path, record)
        borders = tensors.pop("borders", None)
        _check_card(f"{path.name}", StorageError, architecture, borders, record.get("card"))
        weights = {name.removeprefix("network."): tensor.float() for name, tensor in tensors.items()}
        network = _build(path, architecture, weights)
        return cls(network, borders, record["card"])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same with its weights on `device` and in `dtype`; itself where they are so already."""
        now = self.network.first
        device, dtype = torch.device(device or now.device), dtype or now.dtype
        if now.dtype == dtype and now.device == device:
            return self
        borders = None if self.borders is None else self.borders.to(device)
        return dataclasses.replace(self, network=copy.deepcopy(self.network).to(device, dtype), borders=borders)


def shipped() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    path, known = Path(path_or_name), shipped()
    if not path.is_file() and str(path_or_name) not in known:
        _reject_name(os.fspath(path_or_name), known)
    return path if path.is_file() else WEIGHTS / f"{path_or_name}.safetensors"


def _reject_name(name: str, known: list[str]) -> None:
    close = difflib.get_close_matches(name, known, n=1)
    wanted = f"a network is a file, or one of {', '.join(known)}." if known else "a network is a file that exists."
    fix = f"did you mean {close[0]!r}?" if close else "check the path; `bayesdl pretrain` writes such a file"
    fail(SettingError, "Pretrained.load", wanted, got=repr(name), fix=fix)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        record, tensors = _storage.read(path)
    except StorageError as error:
        got = str(error).split("\n")[1].removeprefix("  got  ")
        fail(StorageError, "Pretrained.load", f"{path.name} must be a whole file of a network.", got=got, fix=_AGAIN)
    if record.get("kind") != _KIND:
        got = f"a file of a {record.get('form') or record.get('kind') or 'foreign'} kind"
        fix = "bdl.load(path) reads posteriors"
        fail(StorageError, "Pretrained.load", f"{path.name} must hold a pretrained network.", got=got, fix=fix)
    return record, tensors


def _architecture(path: Path, record: Mapping[str, Any]) -> Architecture:
    fields = record.get("architecture")
    known = {field.name for field in dataclasses.fields(Architecture)}
    if not isinstance(fields, dict) or set(fields) | _LATER != known:
        got = sorted((set(fields) | _LATER) ^ known) if isinstance(fields, dict) else fields
        wanted = f"{path.name} must name an architecture of this version."
        fix = "load it with the version of bayesdl that wrote it"
        fail(StorageError, "Pretrained.load", wanted, got=f"fields missing or unknown: {got}", fix=fix)
    try:
        return Architecture(**fields)
    except SettingError as error:
        got = str(error).splitlines()[1].removeprefix("  got  ")
        fail(StorageError, "Pretrained.load", str(error).splitlines()[0], got=got, fix=_AGAIN)


def _build(path: Path, architecture: Architecture, weights: dict[str, Tensor]) -> Network:
    """The network with these weights, each of which must be there, fit and be finite."""
    wanted = f"the weights in {path.name} must be those of its architecture."
    if architecture.num_layers > len(weights):  # before anything is built: the file may claim a billion layers
        got = f"{architecture.num_layers} layers claimed, {len(weights)} tensors"
        fail(StorageError, "Pretrained.load", wanted, got=got, fix=_AGAIN)
    with torch.device("meta"):
        network = Network(architecture)
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    strange, missing = sorted(set(weights) - set(shapes)), sorted(set(shapes) - set(weights))
    if strange or missing:
        got = "; ".join(
            f"{word} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for word, names in (("lacks", missing), ("has besides", strange))
            if names
        )
        fail(StorageError, "Pretrained.load", wanted, got=got, fix=_AGAIN)
    for name, weight in weights.items():
        if tuple(weight.shape) != shapes[name]:
            got = f"{name} of shape {tuple(weight.shape)}, not {shapes[name]}"
            fail(StorageError, "Pretrained.load", wanted, got=got, fix=_AGAIN)
        if not bool(weight.isfinite().all()):
            got = f"{name} with {int((~weight.isfinite()).sum())} entries that are not finite"
            fail(StorageError, "Pretrained.load", f"the weights in {path.name} must be finite.", got=got, fix=_AGAIN)
    network.load_state_dict(weights, assign=True)
    return network


def _check_card(
    where: str, kind: type[SettingError] | type[StorageError], architecture: Architecture, borders: Any, card: Any
) -> None:
    """The card says what it must, and fits head and borders."""
    if not isinstance(card, Mapping):
        fail(kind, where, "a network has a card.", got=repr(card)[:100], fix=f"a dict of {', '.join(_CARD)}")
    missing = [name for name in _CARD if name not in card]
    if missing:
        fix = f"a dict of {', '.join(_CARD)}"
        fail(kind, where, "the card must be complete.", got=f"no {', '.join(missing)}", fix=fix)
    task = _TASKS[architecture.head]
    if card["task"] != task:
        wanted = f"a head of {architecture.head} does {task}."
        fail(kind, where, wanted, got=f"task {card['task']!r}", fix=f"task={task!r}")
    for name, options in _UNITS.items():
        if card[name] not in options:
            wanted = f"{name} must be one of {', '.join(map(repr, options))}."
            fail(kind, where, wanted, got=repr(card[name]), fix=f"{name}={options[0]!r}")
    _check_ranges(where, kind, card["ranges"])
    if card.get("noise_token") and not architecture.num_conditions:
        fail(kind, where, "a noise token is a condition.", got="num_conditions=0", fix="num_conditions=1")
    _check_borders(where, kind, architecture, borders)


def _check_ranges(where: str, kind: type[SettingError] | type[StorageError], ranges: Any) -> None:
    for name in ("n", "d", "x"):
        pair = ranges.get(name) if isinstance(ranges, Mapping) else None
        numbers = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(v, (int, float)) for v in pair)
        if not numbers or not pair[0] <= pair[1]:
            wanted = 'ranges must name "n", "d" and "x", each with [low, high].'
            fix = '{"n": [0, 100], "d": [1, 5], "x": [-1.8, 1.8]}'
            fail(kind, where, wanted, got=repr(ranges)[:200], fix=fix)


def _check_borders(
    where: str, kind: type[SettingError] | type[StorageError], architecture: Architecture, borders: Any
) -> None:
    if architecture.head != "bars":
        if borders is not None:
            fail(kind, where, "only bars have borders.", got=f"a head of {architecture.head}", fix="borders=None")
        return
    shape = (architecture.outputs + 1,)
    fits = isinstance(borders, Tensor) and tuple(borders.shape) == shape and borders.is_floating_point()
    if not fits or not bool(borders.isfinite().all()) or not bool((borders.diff() > 0).all()):
        got = f"{tuple(borders.shape)} {borders.dtype}" if isinstance(borders, Tensor) else repr(borders)
        fix = "make_borders(values, num_bars)"
        fail(kind, where, f"borders must be finite, ascending, of shape {shape}.", got=got, fix=fix)
