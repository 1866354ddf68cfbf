"""Can these draws be trusted? Diagnostics of Markov chains turned into plain words and a remedy for each fault."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["Verdict", "verdict"]

_MAX_RHAT, _MIN_ESS, _MIN_BFMI = 1.05, 100.0, 0.3
_MANY = 400.0  # effective draws with which chains that disagree may be no more than short


class Verdict(NamedTuple):
    """What the diagnostics of a run say.

    Attributes:
        trusted: Whether nothing speaks against the draws.
        faults: One sentence for each thing that does, with what to do about it.
        remarks: What makes draws no worse and is worth knowing.
        checked: Names of the diagnostics that were there to be judged.
    """

    trusted: bool
    faults: tuple[str, ...]
    remarks: tuple[str, ...]
    checked: tuple[str, ...]

    def __str__(self) -> str:
        if not self.checked:
            return "Nothing to judge by: these diagnostics are not those of Markov chains."
        good = f"Nothing speaks against these draws ({', '.join(self.checked)})."
        head = good if self.trusted else "Do not trust these draws yet:"
        return "\n".join([head, *(f"  - {text}" for text in self.faults + self.remarks)])


def verdict(diagnostics: Mapping[str, Any]) -> Verdict:
    """Judge the `diagnostics` of a posterior or of chains.

    Chains that disagree: "nested_rhat" where it is there, since then many short chains share starts, and R-hat by
    itself is the wrong question: it is about 1 + 1 / (2 E) for chains in perfect order that are worth E draws each, so
    that it asks every chain to be long. Otherwise "rhat". The limit is 1.05 for both; 1.01, which is often named, is
    for four long chains.

    Few effective draws: the smaller of "ess_bulk" and "ess_tail" below 100. A tail that the momenta do not reach:
    "e_bfmi" of some chain below 0.3. A region that the integrator cannot follow: "divergences" above 0. Trees cut short
    ("max_depth_reached") and a budget that was spent ("stopped_by") are remarked upon.

    Args:
        diagnostics: `posterior.diagnostics` or `chains.diagnostics`; what is missing is not judged. Figures of several
            data sets, in nested lists, count by their worst.

    Reference: Vehtari et al. (2021), arXiv 1903.08008; Margossian et al. (2024), arXiv 2110.13017; Betancourt (2016),
    arXiv 1604.00695.
    """
    figures = {name: _numbers(diagnostics.get(name)) for name in _FIGURES}
    checked, faults = [], []
    nested, ess = figures["nested_rhat"], figures["ess_bulk"] + figures["ess_tail"]
    name = "nested_rhat" if nested else "rhat"
    if figures[name]:
        checked.append(name)
        worst = max(figures[name])
        if worst > _MAX_RHAT:
            label = "Nested R-hat" if nested else "R-hat"
            told = f"The chains disagree ({label} {worst:.2f}, wanted below {_MAX_RHAT})"
            # many effective draws in all, few in each chain: nothing but a longer run or shared starts can tell
            short = not nested and min(ess, default=0.0) >= _MANY
            hint = ", or start several chains at each point and look at nested R-hat" if short else ""
            faults.append(f"{told}: warm up and run longer{hint}.")
    if ess:
        checked.append("ess")
        if min(ess) < _MIN_ESS:
            faults.append(f"Only {min(ess):.0f} effective draws, of {_MIN_ESS:.0f} wanted: draw more.")
    if figures["e_bfmi"]:
        checked.append("e_bfmi")
        if min(figures["e_bfmi"]) < _MIN_BFMI:
            told = f"The tails are explored too slowly (E-BFMI {min(figures['e_bfmi']):.2f}, wanted above {_MIN_BFMI})"
            faults.append(f"{told}: reparametrise what makes a funnel or a heavy tail.")
    if figures["divergences"]:
        checked.append("divergences")
        if max(figures["divergences"]) > 0:
            number = int(max(figures["divergences"]))
            faults.append(f"{number} divergences: some region is missed; raise target_accept, or reparametrise.")
    return Verdict(not faults, tuple(faults), _remarks(diagnostics, figures), tuple(checked))


_FIGURES = ("nested_rhat", "rhat", "ess_bulk", "ess_tail", "e_bfmi", "divergences", "max_depth_reached")


def _remarks(diagnostics: Mapping[str, Any], figures: dict[str, list[float]]) -> tuple[str, ...]:
    told = []
    if figures["max_depth_reached"] and max(figures["max_depth_reached"]) > 0:
        number = int(max(figures["max_depth_reached"]))
        told.append(f"{number} trees were cut short: a dense metric or a larger max_depth would save draws.")
    if diagnostics.get("stopped_by") == "max_gradients":
        told.append("The run ended early: its budget of gradients was spent.")
    return tuple(told)


def _numbers(value: Any) -> list[float]:
    """All numbers in a nested list, but those that are NaN or None."""
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in _numbers(part)]
    return [] if math.isnan(value) else [float(value)]
