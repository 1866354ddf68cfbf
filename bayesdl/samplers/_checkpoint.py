"""Runs on disk: what a sampler needs to go on after it was killed, and the draws that it has already made.

A checkpoint is a folder. `state.safetensors` holds the last complete transition, the random streams and the settings;
`draws-FIRST-END.safetensors` hold the draws. New draws go to a new file, or together with the last ones where those are
no more than they are, so that there are few files and a draw is written few times. Files are written beside their place
and renamed, the state after the draws that it speaks of: whenever a run dies, the last state and its draws are whole.

A state is a tree of named tuples, lists and dictionaries with tensors, numbers, strings and None at its leaves. Tensors
come back with the layout that they had, since sums over another layout round differently. Reading runs no code from a
file: a file names its named tuples, and names none but classes of modules that are already loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _storage
from bayesdl.errors import SettingError, StorageError, fail

SECONDS = 5.0  # between two writes, at least
_SHARE = 0.05  # of the time of a run that writing may take
_LARGEST = 2**28  # bytes of a file that is written anew with more draws; writing needs a few times its memory
_STATE = "state.safetensors"
_OWN = re.compile(r"\.?(state|draws-\d+-\d+)\.safetensors(\.[0-9a-f]+)?")
_ANEW = "delete the folder to start anew, or name another one"

# The draws and statistics from draw a to draw b, by name.
Part = Callable[[int, int], dict[str, Tensor]]


class Saved(NamedTuple):
    """What a checkpoint held: the state, the parts of the draws in order, and whether the run was over."""

    tree: Any
    parts: list[dict[str, Tensor]]
    finished: bool
    seconds: float


class Checkpoint:
    """The folder of one run.

    Args:
        where: The name in error messages.
        path: The folder; made when it is first written to.
        settings: What makes this run what it is, as JSON. A folder of a run with other settings is refused.
        log_density: Its values at the initial positions, which tell another model or other data.
        extends: Whether "num_draws", among the settings, may differ: a run is not another one for being longer.

    Raises:
        StorageError: The folder holds something else, or a file in it is damaged.
        SettingError: It holds a run with other settings, or more draws than are asked for.
    """

    def __init__(
        self,
        where: str,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        log_density: Tensor,
        *,
        extends: bool = False,
    ) -> None:
        self._where, self._path, self._extends = where, Path(path), extends
        self._settings, self._log_density = dict(settings), log_density.detach().cpu()
        self._parts: list[tuple[int, int]] = []
        self._written, self._pause = time.monotonic(), SECONDS
        _check_folder(where, self._path)

    def load(self, device: torch.device) -> Saved | None:
        """What is there, with tensors on `device` unless they were on the CPU; None for nothing."""
        if not (self._path / _STATE).is_file():
            return None
        record, tensors = self._read(_STATE)
        if not {"settings", "spec", "parts", "finished", "seconds"} <= set(record):
            got = f"{self._path / _STATE} without the entries of one"
            fail(StorageError, self._where, "checkpoint must name the folder of a run.", got=got, fix=_ANEW)
        self._check_settings(record["settings"], tensors.pop("log_density"))
        self._parts = [(first, end) for first, end in record["parts"]]
        self._check_length()
        parts = [self._read(_name(*part))[1] for part in self._parts]
        try:
            tree = unpack(record["spec"], tensors, device)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            wanted = f"{self._path} must have been written by this version of the sampler."
            fail(StorageError, self._where, wanted, got=str(error), fix=_ANEW)
        parts = [{name: x.to(device) for name, x in part.items()} for part in parts]
        return Saved(tree, parts, record["finished"], record["seconds"])

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written > self._pause

    def save(self, tree: Any, num_draws: int, part: Part, *, finished: bool, seconds: float) -> None:
        """Write the state `tree` and what is new among `num_draws` draws."""
        began = time.monotonic()
        known = self._parts[-1][1] if self._parts else 0
        if num_draws > known:
            first = known
            while self._parts and self._joins(self._parts[-1], num_draws - first):
                first, _ = self._parts.pop()
            _storage.write(self._path / _name(first, num_draws), {}, part(first, num_draws))
            self._parts.append((first, num_draws))
        spec, tensors = pack(tree)
        record = {"settings": self._settings, "spec": spec, "parts": self._parts}
        record |= {"finished": finished, "seconds": seconds}
        _storage.write(self._path / _STATE, record, {**tensors, "log_density": self._log_density})
        self._tidy()
        self._written = time.monotonic()
        self._pause = max(SECONDS, (self._written - began) / _SHARE)

    def _joins(self, part: tuple[int, int], num_new: int) -> bool:
        """Whether a part is written anew together with the draws after it: one that is short, and not large."""
        first, end = part
        return end - first <= num_new and (self._path / _name(first, end)).stat().st_size <= _LARGEST

    def _read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            return _storage.read(self._path / name)
        except StorageError as error:
            got = str(error).split("\n")[1].removeprefix("  got  ")
            wanted = f"{self._path / name} must be whole."
            fail(StorageError, self._where, wanted, got=got, fix=f"put back a copy, or {_ANEW}")

    def _check_settings(self, found: dict[str, Any], log_density: Tensor) -> None:
        free = {"num_draws"} if self._extends else set()
        known = [key for key in {**self._settings, **found} if key not in free]
        differ = [key for key in known if self._settings.get(key) != found.get(key)]
        if differ:
            theirs = ", ".join(f"{key}={found.get(key)!r}" for key in differ)
            ours = ", ".join(f"{key}={self._settings.get(key)!r}" for key in differ)
            wanted = f"checkpoint must be that of a run with the same settings; {self._path} has {theirs}."
            fail(SettingError, self._where, wanted, got=ours, fix=_ANEW)
        # Another machine may round another way; another model does not come so near.
        tolerance = 1e-3 if log_density.dtype == torch.float32 else 1e-6
        if not torch.allclose(log_density, self._log_density, rtol=tolerance, atol=tolerance, equal_nan=True):
            wanted = f"log_density must be that of the run in {self._path}."
            got = "other values at the initial positions"
            fail(SettingError, self._where, wanted, got=got, fix=f"pass the same model and data, or {_ANEW}")

    def _check_length(self) -> None:
        held = self._parts[-1][1] if self._parts else 0
        if self._extends and held > self._settings["num_draws"]:
            wanted = f"{self._path} holds {held} draws of each chain already; it can be made longer, not shorter."
            got = f"num_draws={self._settings['num_draws']}"
            fail(SettingError, self._where, wanted, got=got, fix=f"num_draws={held} or more; or {_ANEW}")

    def _tidy(self) -> None:
        """Remove what the state no longer speaks of, and what killed writes left."""
        keep = {_STATE, *(_name(*part) for part in self._parts)}
        for file in self._path.iterdir():
            if file.name not in keep and _OWN.fullmatch(file.name):
                file.unlink(missing_ok=True)


def fingerprint(value: Any) -> Any:
    """A setting as JSON: numbers and strings as they are, a tensor by the digest of its numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        content = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b""
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, Mapping):
        return {str(key): fingerprint(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [fingerprint(part) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree as JSON and the tensors that it refers to by number."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = str(len(tensors))
            # an axis along which all entries are one number in memory is written once
            base = node.detach()
            for axis, stride in enumerate(node.stride()):
                base = base.narrow(axis, 0, 1) if stride == 0 and node.shape[axis] > 1 else base
            tensors[name] = base
            device = "cpu" if node.device.type == "cpu" else "run"
            return {"tensor": name, "shape": list(node.shape), "stride": list(node.stride()), "device": device}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            kind = f"{type(node).__module__}:{type(node).__qualname__}"
            return {"kind": kind, "fields": {name: walk(getattr(node, name)) for name in node._fields}}
        if isinstance(node, (list, tuple)):
            return {type(node).__name__: [walk(part) for part in node]}
        if isinstance(node, dict):
            return {"dict": {name: walk(part) for name, part in node.items()}}
        if node is None or isinstance(node, (bool, int, float, str)):
            return {"value": node}
        raise TypeError(f"a state holds tensors, numbers, strings and None, not {type(node).__name__}")

    return walk(tree), tensors


def unpack(spec: Any, tensors: Mapping[str, Tensor], device: torch.device | str) -> Any:
    """The tree that `pack` took apart."""
    if "tensor" in spec:
        base, stride = tensors[spec["tensor"]], tuple(spec["stride"])
        place = "cpu" if spec["device"] == "cpu" else device
        laid_out = torch.empty_strided(tuple(base.shape), stride, dtype=base.dtype, device=place)
        return laid_out.copy_(base).expand(spec["shape"])
    if "kind" in spec:
        fields = {name: unpack(part, tensors, device) for name, part in spec["fields"].items()}
        return _named_tuple(spec["kind"], tuple(fields))(**fields)
    if "list" in spec:
        return [unpack(part, tensors, device) for part in spec["list"]]
    if "tuple" in spec:
        return tuple(unpack(part, tensors, device) for part in spec["tuple"])
    if "dict" in spec:
        return {name: unpack(part, tensors, device) for name, part in spec["dict"].items()}
    return spec["value"]


def _named_tuple(kind: str, fields: tuple[str, ...]) -> Any:
    module, name = kind.split(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, tuple) and getattr(found, "_fields", None) == fields):
        raise ValueError(f"a {kind} with the fields {', '.join(fields)}, which is not known here")
    return found


def _name(first: int, end: int) -> str:
    return f"draws-{first:08d}-{end:08d}.safetensors"


def _check_folder(where: str, path: Path) -> None:
    """Refuse a place that holds anything but a checkpoint."""
    if path.exists() and not path.is_dir():
        wanted = "checkpoint must name a folder of its own, or none yet."
        fail(StorageError, where, wanted, got=f"the file {path}", fix="name another path")
    strange = [file.name for file in path.iterdir() if not _OWN.fullmatch(file.name)] if path.exists() else []
    if strange:
        wanted = "checkpoint must name a folder of its own."
        fail(StorageError, where, wanted, got=f"{path} with {strange[0]!r} in it", fix="name another path")
