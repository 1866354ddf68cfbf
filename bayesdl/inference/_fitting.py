"""What the network engines share: data into a weight space, and the verdict on a run."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import child_seeds
from bayesdl.data import TrainingData, Units, class_labels, training_data, units_of
from bayesdl.errors import ConvergenceWarning, SettingError, ShapeError, fail
from bayesdl.models import BNN, WeightSpace

_PROBES = 32


class NetworkProblem(NamedTuple):
    """A network and a data set, ready to be sampled or optimised: standardised x (*b, n, d) and y (*b, n, k)."""

    data: TrainingData
    units: Units
    space: WeightSpace
    x: Tensor
    y: Tensor

    def starts(self, num: int, seed: int) -> Tensor:
        """`num` draws from the prior, the same for every data set, that claim to explain nothing yet: (*b, num, D).

        A noise variance starts at the variance of the targets. From a smaller one an optimiser or a sampler would first
        bend the network to every target, and learn only then that they are noisy.
        """
        like = self.x.new_zeros(())
        rows = [
            self.space.initial(1, torch.Generator(like.device).manual_seed(child), like)
            for child in child_seeds(seed, num)
        ]
        q = torch.cat(rows).expand(*self.data.batch_shape, num, -1).clone()
        if getattr(self.space.likelihood, "noise_variance", 0.0) is None:
            m = self.space.network.num_weights
            variance = self.y.var(-2, correction=0).unsqueeze(-2)
            q[..., m:] = torch.maximum(q[..., m:], variance.log())
        return q

    def probe_values(self, draws: Tensor) -> Tensor:
        """f at up to 32 training inputs for every draw (*b, C, N, D): (C, N, *b, probes, outputs)."""
        n = self.x.shape[-2]
        places = torch.linspace(0, n - 1, min(n, _PROBES), device=self.x.device).round().long()
        f = self.space.forward(draws.flatten(-3, -2), self.x.index_select(-2, places))
        return f.unflatten(-3, draws.shape[-3:-1]).movedim((-4, -3), (0, 1))


def network_problem(where: str, model: Any, x: Any, y: Any, *, standardize: bool) -> NetworkProblem:
    """Check and standardise a data set for a BNN; class labels stay as they are."""
    if not isinstance(model, BNN):
        wanted = "model must be a bdl.BNN."
        fail(
            SettingError,
            where,
            wanted,
            got=_checks.describe(model),
            fix="bdl.BNN(hidden=(50,)); a bdl.GP goes to bdl.ExactGP",
        )
    data = training_data(where, x, y)
    regression = model.likelihood.task == "regression"
    if not regression:
        if model.likelihood.task == "multiclass" and data.y.shape[-1] != 1:
            got = f"y with {data.y.shape[-1]} columns"
            fail(ShapeError, where, "a Categorical likelihood takes one target column.", got=got, fix="one label a row")
        class_labels(where, data.y, getattr(model.likelihood, "num_classes", 2))
    units = units_of(data, standardize=standardize, targets=regression)
    dtype = data.x.dtype
    space = model.weight_space(data.x.shape[-1], data.y.shape[-1])
    return NetworkProblem(data, units, space, units.inward_x(data.x, dtype), units.inward_y(data.y, dtype))


def warn_unless(converged: bool, where: str, problem: str, remedy: str) -> None:
    """A ConvergenceWarning in plain words."""
    if not converged:
        warnings.warn(f"{where}: {problem}; {remedy}", ConvergenceWarning, stacklevel=3)
