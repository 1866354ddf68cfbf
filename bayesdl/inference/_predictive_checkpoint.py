"""Rollouts on disk: the points drawn so far and what the watch has seen, so that a killed run goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesdl.inference._predictive_drift import Watch
from bayesdl.samplers._checkpoint import Checkpoint


class Kept:
    """The folder of one run of predictive resampling.

    Args:
        path: The folder.
        settings: What makes the run what it is, as JSON.
        watch: Gets back what it had noted.
        device: Of the rollouts.

    Attributes:
        drawn: y (L, *b, t, k) of an earlier call; None for nothing.

    Raises:
        StorageError, SettingError: See `samplers._checkpoint.Checkpoint`.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], watch: Watch, device: torch.device
    ) -> None:
        self._watch, self._began = watch, time.monotonic()
        self._folder = Checkpoint("Martingale.fit", path, settings, watch.start)
        saved = self._folder.load(device)
        self.drawn: Tensor | None = None
        self._seconds = 0.0 if saved is None else saved.seconds
        self._over = saved is not None and saved.finished
        if saved is not None and saved.parts:
            self.drawn = torch.cat([part["y"] for part in saved.parts]).movedim(0, -2)
            watch.recall(saved.tree)

    def keep(self, parts: list[Tensor], *, finished: bool = False) -> None:
        """Write the y (L, *b, r, k) of all blocks so far, where it is time to."""
        if self._over or not (finished or self._folder.due()):
            return
        steps = torch.cat(parts, -2).movedim(-2, 0)  # (t, L, *b, k)
        seconds = self._seconds + time.monotonic() - self._began
        self._folder.save(
            self._watch.noted, len(steps), lambda a, b: {"y": steps[a:b].contiguous()}, finished=finished,
            seconds=seconds,
        )  # fmt: skip
