"""What a benchmark ran on, as columns for its CSV."""

from __future__ import annotations

import platform
import resource
from datetime import UTC, datetime
from pathlib import Path

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


def peak_memory() -> float:
    """Peak resident memory of this process in MiB.

    Linux counts it anew from the start of the program in VmHWM; `ru_maxrss` would begin at what the parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
