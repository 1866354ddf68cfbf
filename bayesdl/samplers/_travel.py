"""How microcanonical chains come from where they were started: by short trajectories of HMC, each with its own step.

A particle of unit speed does not gain momentum on its way down, so that from a steep place it takes many small steps;
one of HMC falls. A chain that is where the density is loses little by it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bayesdl.samplers import adaptation, hmc
from bayesdl.samplers._chains import Numbers
from bayesdl.samplers.base import ValueAndGrad
from bayesdl.samplers.hamiltonian import Metric, Parameters, State

_STEPS = 10  # of the longest trajectory


def travel_step_size(
    evaluate: ValueAndGrad, state: State, metric: Metric, numbers: Numbers, step_size: Tensor
) -> tuple[Tensor, int]:
    """Leapfrog steps of the right order (*g, C), found from `step_size` (*g, 1), and the gradients spent on them."""
    return adaptation.find_step_size(evaluate, *state, metric, numbers.search(), step_size)


def travel(evaluate: ValueAndGrad, state: State, parameters: Any, numbers: Numbers) -> tuple[State, hmc.Info]:
    """One transition of HMC with 5 to 10 leapfrog steps of each chain's size."""
    own = Parameters(parameters.step_size, parameters.metric)
    noise, uniform = numbers.momentum(), numbers.uniform()
    return hmc.step(evaluate, state, own, noise, uniform, numbers.length(_STEPS))
