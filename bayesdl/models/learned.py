"""The model behind a pretrained network: the prior over data sets that it was trained on, known by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Learned:
    """What a pretrained network believes before it has seen data. It cannot be drawn from: only its name is left.

    Attributes:
        name: Of the network.
        likelihood: What the targets are; of a regression, Gaussian() stands for any noise that the prior had.
    """

    name: str
    likelihood: Any
