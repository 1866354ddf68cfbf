"""Amortised inference: networks that were trained on a prior over data sets, and predict after one forward pass."""

from __future__ import annotations

from bayesdl.amortized.checkpoint import Pretrained, shipped
from bayesdl.amortized.gap import ReferenceGap
from bayesdl.amortized.heads import log_score, make_borders, predictive
from bayesdl.amortized.network import Architecture, Cache, Network
from bayesdl.amortized.pretrain import pretrain
from bayesdl.amortized.schedule import Schedule

__all__ = [
    "Architecture",
    "Cache",
    "Network",
    "Pretrained",
    "ReferenceGap",
    "Schedule",
    "log_score",
    "make_borders",
    "predictive",
    "pretrain",
    "shipped",
]
