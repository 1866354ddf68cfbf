"""What a benchmark ran on, as columns for its CSV."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

import torch

import bayesdl
from bayesdl.evaluation.report import processor


def describe() -> dict[str, str]:
    """Processor, threads, versions and date."""
    return {
        "cpu": processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bayesdl": bayesdl.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
