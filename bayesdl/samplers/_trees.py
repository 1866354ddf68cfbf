"""Decisions about the trees of NUTS: when a trajectory turns back, and the random numbers behind every choice.

All decisions of one transition follow from one uniform number of the chain by a counter-based generator, SplitMix64, so
that they depend neither on the other chains nor on the order in which trees are computed.

References: Betancourt (2017), arXiv 1701.02434, appendix A.4; Steele, Lea, Flood (2014), Fast splittable pseudorandom
number generators, OOPSLA, figure 16.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

# The momenta of a subtree in whitened coordinates: those of its first and last point, and their sum, each (*g, C, D).
Span: TypeAlias = tuple[Tensor, Tensor, Tensor]

EARLY = 4

_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def turns_back(left: Span, right: Span, *, single: bool) -> Tensor:
    """Whether the trajectory that two adjacent subtrees make has turned back on itself, (*g, C).

    It has where the momentum at either end points against the sum rho of all, or where one half does so together with
    the point of the other half that is next to it. Both hold at once for halves of a `single` point. "Left" may be the
    later half as well: reversing time changes nothing.
    """
    first, last = left[0], right[1]
    rho = left[2] + right[2]
    if single:
        return ~(torch.minimum((first * rho).sum(-1), (last * rho).sum(-1)) > 0)
    with_right, with_left = left[2] + right[0], left[1] + right[2]
    ends = torch.stack([first, last, first, right[0], left[1], last])
    sums = torch.stack([rho, rho, with_right, with_right, with_left, with_left])
    return ~((ends * sums).sum(-1).amin(0) > 0)


def decisions(uniform: Tensor, depth: int) -> Tensor:
    """Uniform numbers on [0, 1) for the doubling of number `depth`, (*g, C, count(depth))."""
    return _numbers(uniform, sum(count(d) for d in range(depth)), count(depth))


def early_decisions(uniform: Tensor) -> Tensor:
    """The `decisions` of the first doublings, side by side: computed together, since most trees need no more."""
    return _numbers(uniform, 0, sum(count(depth) for depth in range(EARLY)))


def count(depth: int) -> int:
    """Numbers that a doubling needs: its direction, its choice, and two for each block of leaves."""
    return 2 + 2 * (2**depth // block_size(depth))


def block_size(depth: int) -> int:
    """Leaves that are computed and judged at a time: many save operations, few save gradients after a failure."""
    return min(2**depth, 4 if depth < 5 else 8)


def _numbers(uniform: Tensor, start: int, num: int) -> Tensor:
    """The numbers `start`, ..., `start + num - 1` of the sequence that each uniform number (*g, C) seeds."""
    key = _mix((uniform.double() * 2.0**53).long())
    counters = torch.arange(start, start + num, dtype=torch.int64, device=uniform.device)
    bits = _mix(key.unsqueeze(-1) + counters * _INCREMENT)
    return _shift(bits, 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    for places, factor in _FACTORS:
        z = (z ^ _shift(z, places)) * factor
    return z ^ _shift(z, 31)


def _shift(z: Tensor, places: int) -> Tensor:
    """z >> places with zeros shifted in; torch shifts in the sign."""
    return (z >> places) & (2 ** (64 - places) - 1)
