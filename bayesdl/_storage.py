"""Files on disk: tensors as safetensors with one JSON record in the header. Reading never runs code from the file.

A file is written beside its target and renamed, so that a killed write leaves the old file or none, never half of one.
A digest of record and tensors is checked on reading, since safetensors itself notices no flipped bit among the numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl._version import __version__
from bayesdl.errors import StorageError, fail

_FORMAT = 1


def write(path: str | os.PathLike[str], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` and the JSON `record` to `path`, atomically. Tensors go to the CPU, shapes and dtypes kept."""
    from safetensors.torch import save

    header = {"format": _FORMAT, "bayesdl": __version__, **record}
    # safetensors refuses shared memory, and an axis of length one may keep an odd stride: a fresh copy of each
    arrays = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in tensors.items()
    }
    text = json.dumps(header)
    write_bytes(path, save(arrays, metadata={"bayesdl": text, "sha256": _digest(text, arrays)}))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` by way of a temporary file in the same folder and a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON record and the tensors of a file that `write` made.

    Raises StorageError for a file that is missing, truncated, corrupt, foreign or of a later format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        fail(
            StorageError,
            "bdl.load",
            "path must name a file.",
            got=str(path),
            fix="check the path; posterior.save(path) writes one",
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # cloned: what safetensors hands out may be a window on the file, which somebody may overwrite
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        wanted = f"{path.name} must be a whole safetensors file."
        fail(
            StorageError,
            "bdl.load",
            wanted,
            got=f"{path.stat().st_size} bytes: {error}",
            fix="save the posterior again",
        )
    try:
        record = json.loads(metadata["bayesdl"])
        version = int(record["format"])
    except (KeyError, TypeError, ValueError):
        got = f"a safetensors file with metadata {sorted(metadata)}"
        fail(
            StorageError, "bdl.load", f"{path.name} must be written by posterior.save.", got=got, fix="pass such a file"
        )
    if version > _FORMAT:
        got = f"format {version}, written by bayesdl {record.get('bayesdl')}"
        fail(StorageError, "bdl.load", f"this version reads formats up to {_FORMAT}.", got=got, fix="upgrade bayesdl")
    if metadata.get("sha256") != _digest(metadata["bayesdl"], tensors):
        wanted = f"{path.name} must hold what was written to it."
        fail(
            StorageError,
            "bdl.load",
            wanted,
            got="contents that differ from their digest",
            fix="save the posterior again",
        )
    return record, tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the record and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
