"""Lightning Fabric: the same training loop on several devices at once. Fabric starts the processes, averages gradients
over them and takes care of where tensors lie; everything else stays ours.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from bayesdl.errors import SettingError, fail

_PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed"}


class FabricWorker:
    """One of `num_devices` processes, each with one device of the kind of `device`.

    Making it starts the others: they run the same script from its beginning, and meet here.

    Raises:
        SettingError: Lightning is not installed, or there are fewer devices.
    """

    def __init__(self, device: torch.device, num_devices: int, precision: str) -> None:
        try:
            from lightning.fabric import Fabric
            from lightning.fabric.strategies import DDPStrategy
        except ImportError:
            wanted = "training on several devices needs Lightning Fabric."
            fix = "pip install bayesdl[train], or num_devices=1"
            fail(SettingError, "pretrain", wanted, got="no package lightning", fix=fix)
        there = torch.cuda.device_count() if device.type == "cuda" else num_devices
        if there < num_devices:
            got = f"num_devices={num_devices}, {there} found"
            fail(SettingError, "pretrain", "there must be so many devices.", got=got, fix=f"num_devices={there}")
        self._fabric: Any = Fabric(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=num_devices,
            # a batch may leave weights without a gradient: those that mark appended points, where there are none
            strategy=DDPStrategy(find_unused_parameters=True),
            precision=_PRECISION[precision],
        )
        self._fabric.launch()
        self.device: torch.device = self._fabric.device
        self.rank: int = self._fabric.global_rank
        self.num_ranks: int = self._fabric.world_size

    def setup(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Module and optimiser wrapped by Fabric; the weights themselves stay where they are."""
        module, optimizer = self._fabric.setup(module, optimizer, move_to_device=False)
        return module, optimizer

    def narrow(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing: the wrapped module takes its products in the narrower type by itself."""
        return contextlib.nullcontext()

    def apart(self, module: Any, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """The context in which gradients are not averaged over processes."""
        return self._fabric.no_backward_sync(module, enabled=wanted)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, averaged over processes."""
        self._fabric.backward(loss)

    def mean(self, value: Tensor) -> Tensor:
        """The average of `value` over processes."""
        return self._fabric.all_reduce(value, reduce_op="mean")
