"""Threads that share the tiles of one product on a CPU.

Splitting every small operation of a tile between threads makes them wait for each other thousands of times a second,
and for long where the machine has other work. Here each thread takes whole rows of tiles and works alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def num_workers(device: torch.device, jobs: int) -> int:
    """How many threads to share `jobs` pieces of work between: those that torch may use, and one on a GPU."""
    return 1 if device.type != "cpu" else max(1, min(torch.get_num_threads(), jobs))


def in_parallel(work: Callable[[int], Result], workers: int) -> list[Result]:
    """[work(0), ..., work(workers - 1)], each in a thread of its own, in which torch's operations use no others."""
    if workers == 1:
        return [work(0)]
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def alone(worker: int) -> Result:
        # Counts for this thread, and for threads that begin while it runs: so it is put back at the end.
        torch.set_num_threads(1)
        try:
            with torch.enable_grad() if grad else torch.no_grad():
                return work(worker)
        finally:
            torch.set_num_threads(threads)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(alone, range(workers)))
