"""Where a training step runs: one device, plainly. `bayesdl.interop.fabric` has the worker of several."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PRECISIONS = ("float32", "bfloat16")


class Worker(Protocol):
    """One process of a training run."""

    device: torch.device
    rank: int
    num_ranks: int

    def setup(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Module and optimiser as the steps use them, on this worker's device."""

    def narrow(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: products in the narrower type, where one is wanted."""

    def apart(self, module: Any, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """The context of a gradient that need not be averaged over processes yet."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""

    def mean(self, value: Tensor) -> Tensor:
        """The average of `value` over processes."""


class OneDevice:
    """The worker of a run on one device."""

    rank, num_ranks = 0, 1

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self._precision = device, precision

    def setup(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Both as they are."""
        return module, optimizer

    def narrow(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bfloat16, or nothing."""
        if self._precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def apart(self, module: Any, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Nothing: there is nobody to wait for."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """By autograd."""
        loss.backward()

    def mean(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value
