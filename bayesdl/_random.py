"""Random streams: every public `seed` becomes an explicit generator here; the global state is neither read nor written.

A seed is an int, a `torch.Generator`, or None for fresh entropy from the operating system. A generator is advanced by
its use, as one would expect; an int gives the same stream every time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail

Seed = int | torch.Generator | None


def root_seed(seed: Seed) -> int:
    """One integer that stands for `seed`: itself, the next draw of a generator, or fresh entropy for None.

    Raises:
        SettingError: The seed is none of these, or an int that is negative or needs more than 64 bits.
    """
    if isinstance(seed, torch.Generator):
        return int(torch.randint(0, 2**62, (), generator=seed, device=seed.device, dtype=torch.int64))
    if seed is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> 1)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        wanted = "seed must be an int from 0 to 2**64 - 1, a torch.Generator or None."
        fail(SettingError, "seed", wanted, got=repr(seed), fix="pass 0, say")
    return int(seed)


def child_seeds(seed: Seed, num: int) -> list[int]:
    """`num` independent integer seeds; the first k of them do not depend on `num`."""
    children = np.random.SeedSequence(root_seed(seed)).spawn(num)
    return [int(child.generate_state(1, np.uint64)[0] >> 1) for child in children]


def generator(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`: the caller's own where it lies there already, else a fresh one seeded from `seed`."""
    device = torch.device(device)
    if isinstance(seed, torch.Generator) and seed.device.type == device.type:
        return seed
    return torch.Generator(device).manual_seed(root_seed(seed))


class Streams:
    """Independent normal and uniform numbers for each of `num` chains or members.

    Chain i draws from a stream of its own, so that it sees the same numbers whether it runs alone or among sixty-four.
    """

    def __init__(self, seed: Seed, num: int, device: torch.device | str = "cpu") -> None:
        self._generators = [generator(child, device) for child in child_seeds(seed, num)]

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """Standard normal numbers of shape (num, *shape), in the dtype and on the device of `like`."""
        rows = [torch.randn(shape, generator=g, dtype=like.dtype, device=like.device) for g in self._generators]
        return torch.stack(rows)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Uniform numbers on [0, 1) of shape (num, *shape), in the dtype and on the device of `like`."""
        rows = [torch.rand(shape, generator=g, dtype=like.dtype, device=like.device) for g in self._generators]
        return torch.stack(rows)

    def state(self) -> Tensor:
        """Where the streams stand, (num, bytes)."""
        return torch.stack([g.get_state() for g in self._generators])

    def load(self, state: Tensor) -> None:
        """Go on from where `state` stood."""
        for g, own in zip(self._generators, state.cpu(), strict=True):
            g.set_state(own.clone())  # torch crashes on a part of a larger tensor

    def permutation(self, n: int) -> Tensor:
        """A random order of 0..n-1 for each stream, shape (num, n)."""
        return torch.stack([torch.randperm(n, generator=g, device=g.device) for g in self._generators])
