"""What a benchmark ran on, as columns for its CSV."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

import bayesdl


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def describe() -> dict[str, str]:
    """Processor, threads, versions and date."""
    return {
        "cpu": cpu_model(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bayesdl": bayesdl.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
