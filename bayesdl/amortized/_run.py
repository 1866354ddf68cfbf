"""What of a training run outlives it: weights, the optimiser's moments, the average, the log; on disk and back.

A folder holds `state.safetensors`, the last one, and with a linear decay `before_decay.safetensors`, from which a run
can be made longer. Files are written beside their place and renamed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesdl import _storage
from bayesdl.amortized._optimizer import optimizer_of
from bayesdl.amortized.network import Network
from bayesdl.amortized.schedule import Schedule
from bayesdl.errors import SettingError, StorageError, fail

_KIND = "training run"
_STATE, _BEFORE = "state.safetensors", "before_decay.safetensors"
_ANEW = "delete the folder to start anew, or name another one"
_FREE = ("num_steps", "num_evaluations")  # what may change between two calls


@dataclass
class Run:
    """A run as it stands after `step` steps."""

    network: Network
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    losses: float = 0.0  # sum since the last line of the log
    counted: int = 0
    skipped: int = 0

    def weights(self) -> dict[str, Tensor]:
        """The weights to be judged and returned: their average where there is one."""
        return self.network.state_dict() if self.average is None else self.average


def new(network: Network, schedule: Schedule) -> Run:
    """A run of no steps."""
    optimizer = optimizer_of(network, schedule)
    average = None
    if schedule.average is not None:
        average = {name: weight.clone() for name, weight in network.state_dict().items()}
    return Run(network, optimizer, average)


def settings_of(schedule: Schedule, **others: Any) -> dict[str, Any]:
    """What makes this run what it is, as JSON."""
    fields = dataclasses.asdict(schedule)
    for name, only in (("targets", "drawn"), ("optimizer", "adamw")):  # runs from before there was a choice say nothing
        if fields[name] == only:
            del fields[name]
    return {key: list(v) if isinstance(v, tuple) else v for key, v in {**fields, **others}.items() if key not in _FREE}


def save(folder: Path, run: Run, schedule: Schedule, settings: dict[str, Any], *, before_decay: bool = False) -> None:
    """Write the run to its folder."""
    tensors = {f"network.{name}": weight for name, weight in run.network.state_dict().items()}
    for name, parameter in run.network.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"average.{name}": weight for name, weight in (run.average or {}).items()}
    record = {
        "kind": _KIND, "settings": settings, "num_steps": schedule.num_steps, "step": run.step, "log": run.log,
        "seconds": run.seconds, "losses": run.losses, "counted": run.counted, "skipped": run.skipped,
    }  # fmt: skip
    _storage.write(folder / (_BEFORE if before_decay else _STATE), record, tensors)


def resume(folder: Path, run: Run, schedule: Schedule, settings: dict[str, Any]) -> None:
    """Bring `run`, new as yet, to where the folder's stands; as it is where there is none.

    Raises:
        StorageError: A file is damaged or not of a run.
        SettingError: The folder is that of a run with other settings, or of one too far into its decay to be changed.
    """
    if folder.exists() and not folder.is_dir():
        wanted = "checkpoint must name a folder, or none yet."
        fail(StorageError, "pretrain", wanted, got=f"the file {folder}", fix="name another path")
    last = 0
    for name in (_STATE, _BEFORE):
        if not (folder / name).is_file():
            continue
        record, tensors = _read(folder / name)
        _check_settings(folder, settings, record["settings"])
        if last == 0:
            last = record["step"]
        if _same_so_far(schedule, record):
            _fill(folder / name, run, record, tensors)
            return
    if last:
        got = f"num_steps={schedule.num_steps}; step {last} of the run is behind the fall of its learning rate"
        if schedule.decay == "cosine":
            got = f"num_steps={schedule.num_steps}, and a cosine that was laid out for another number"
        wanted = f"the run in {folder} cannot change its length."
        fail(SettingError, "pretrain", wanted, got=got, fix=f'decay="linear" from the start; {_ANEW}')


def _same_so_far(schedule: Schedule, record: dict[str, Any]) -> bool:
    """Whether the learning rates up to the recorded step are those of `schedule` too."""
    step, theirs = record["step"], dataclasses.replace(schedule, num_steps=record["num_steps"])
    if theirs.num_steps == schedule.num_steps:
        return True
    return schedule.decay == "linear" and step <= min(schedule.stable_until, theirs.stable_until)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        record, tensors = _storage.read(path)
    except StorageError as error:
        got = str(error).split("\n")[1].removeprefix("  got  ")
        fail(StorageError, "pretrain", f"{path} must be whole.", got=got, fix=f"put back a copy, or {_ANEW}")
    if record.get("kind") != _KIND:
        fail(StorageError, "pretrain", f"{path} must be of a training run.", got="another kind of file", fix=_ANEW)
    return record, tensors


def _check_settings(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if differ:
        wanted = f"the run in {folder} has {', '.join(f'{key}={theirs.get(key)!r}' for key in differ)[:300]}."
        got = ", ".join(f"{key}={ours.get(key)!r}" for key in differ)[:300]
        fail(SettingError, "pretrain", wanted, got=got, fix=f"the same settings; or {_ANEW}")


@torch.no_grad()
def _fill(path: Path, run: Run, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    try:
        for name, weight in run.network.state_dict().items():
            weight.copy_(tensors[f"network.{name}"])
        for name in run.average or {}:
            run.average[name].copy_(tensors[f"average.{name}"])
        for name, parameter in run.network.named_parameters():
            found = {key.split(".")[1]: t for key, t in tensors.items() if key.startswith("optimizer.")
                     and key.split(".", 2)[2] == name}  # fmt: skip
            if found:
                run.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in found.items()}
        run.step, run.seconds, run.log = record["step"], record["seconds"], record["log"]
        run.losses, run.counted, run.skipped = record["losses"], record["counted"], record["skipped"]
    except (KeyError, RuntimeError) as error:
        wanted = f"{path} must be of this version."
        fail(StorageError, "pretrain", wanted, got=str(error).splitlines()[0], fix=_ANEW)
