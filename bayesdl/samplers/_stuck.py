"""Chains that warm-up has not brought to where the others are, or that do not move: found from the draws alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bayesdl.errors import ConvergenceWarning
from bayesdl.samplers.adaptation import FAR
from bayesdl.samplers.base import Run

_MOVING = 0.02  # share of draws that must differ from the one before
_FEW = 10  # draws from which nothing is concluded


def stuck_chains(run: Run) -> Tensor:
    """Which chains are stuck, (*g, C).

    A chain is stuck where fewer than 2 % of at least 20 draws differ from the one before. It is also where its log
    density never reaches the least of the best chain, and its median lies below that chain's by more than eight times
    the larger of sqrt(D / 2), the standard deviation of the log density of a Gaussian, and thrice the median change
    from draw to draw. Such a chain may sit in a mode of its own; R-hat is the judge of chains that differ by less.

    Cost: O(C num_draws D).
    """
    draws, log_density = run.draws, run.stats["log_density"].double()
    num_draws, dim = draws.shape[-2:]
    still = torch.zeros(log_density.shape[:-1], dtype=torch.bool, device=draws.device)
    if num_draws >= 20:
        still = (draws.diff(dim=-2) != 0).any(-1).double().mean(-1) < _MOVING
    median = log_density.quantile(0.5, -1)
    best = median.argmax(-1, keepdim=True)
    change = log_density.diff(dim=-1).abs().quantile(0.5, -1) if num_draws > 1 else torch.zeros_like(median)
    unit = torch.clamp(3 * change.gather(-1, best), min=(dim / 2) ** 0.5)
    below = median < median.gather(-1, best) - FAR * unit
    apart = log_density.amax(-1) < log_density.amin(-1).gather(-1, best)
    return still | (below & apart)


def which_are_stuck(run: Run) -> list[Any]:
    """The numbers of the stuck chains, a list for each group; empty where there are too few draws to tell."""
    stuck = stuck_chains(run) if run.draws.shape[-2] >= _FEW else torch.zeros(run.draws.shape[:-2], dtype=torch.bool)
    return _numbers(stuck.tolist())


def _numbers(flags: list[Any]) -> list[Any]:
    if flags and isinstance(flags[0], list):
        return [_numbers(part) for part in flags]
    return [i for i, flag in enumerate(flags) if flag]


def warn_of_stuck_chains(where: str, run: Run, num_warmup: int) -> None:
    """A ConvergenceWarning that names them, where warm-up and draws were enough to tell."""
    if num_warmup == 0 or run.draws.shape[-2] < _FEW:
        return  # the chains may well be on their way
    stuck = stuck_chains(run)
    if not bool(stuck.any()):
        return
    which = stuck.nonzero().tolist()
    names = ", ".join(str(place[0] if len(place) == 1 else tuple(place)) for place in which[:10])
    more = f" and {len(which) - 10} more" if len(which) > 10 else ""
    warnings.warn(
        f"{where}: {len(which)} of {stuck.numel()} chains are stuck, far below the others in log density or without a "
        f"move (chain {names}{more}): leave them out only if they were started badly, else warm up for longer, start "
        "elsewhere or reparametrise",
        ConvergenceWarning,
        stacklevel=3,
    )
