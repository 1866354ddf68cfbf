"""The posterior contract. Swapping the engine changes how these answers were computed, never how they are asked for."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _records, _storage
from bayesdl._random import Seed, generator
from bayesdl.data import TrainingData, Units, new_inputs
from bayesdl.errors import StorageError, fail

Functions = Callable[[Any], Tensor]


class Posterior(abc.ABC):
    """Belief about a function after data, in the user's units. Immutable.

    Shapes: trained on x (*b, n, d) and y (*b, n) or (*b, n, k), asked at x (..., s, d) whose batch axes broadcast with
    *b; answers have shape (..., s), or (..., s, k) where y had an output axis.
    """

    form: ClassVar[str]  # how a file calls this class
    model_kind: ClassVar[str]  # name of the model class that a file of this form must hold

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None = None,
    ) -> None:
        self._model = model
        self._data = data
        self._units = units
        self._diagnostics = dict(diagnostics)
        self._log_evidence = log_evidence

    @property
    def model(self) -> Any:
        """The model that was conditioned on data."""
        return self._model

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """How the answer was computed and whether to trust it: a read-only mapping of plain values."""
        return MappingProxyType(self._diagnostics)

    @property
    def log_evidence(self) -> Tensor | None:
        """Estimate of log p(y) in the user's units, shape *b; None where the engine has none."""
        return self._log_evidence

    @abc.abstractmethod
    def predict(self, x: Any, *, noise: bool = True) -> Distribution:
        """Distribution of y at each x, or of the latent f with `noise=False`; marginal over points.

        Args:
            x: Inputs (..., s, d); torch inputs may require gradients.
            noise: Whether to include observation noise.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: x does not fit the training inputs.
        """

    @abc.abstractmethod
    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Joint draws of f at the points x: (*sample_shape, ..., s), or (*sample_shape, ..., s, k)."""

    @abc.abstractmethod
    def functions(self, num: int, *, seed: Seed = 0) -> Functions:
        """`num` functions drawn from the posterior: g(x) -> (num, ..., s), the same at every x, differentiable."""

    def condition_on(self, x: Any, y: Any) -> Posterior:
        """A new posterior that has also seen (x, y).

        Raises:
            NotImplementedError: This engine cannot update; the message names one that can.
        """
        raise NotImplementedError(
            f"{self._diagnostics.get('engine', 'this engine')} cannot be conditioned on more data, only fitted again.\n"
            "  fix  fit the engine to all data, or use bdl.ExactGP, which updates exactly"
        )

    def to_arviz(self) -> Any:
        """An ArviZ DataTree: function values and noise as draws, with observed data and pointwise log likelihoods."""
        from bayesdl import _doors

        return _doors.arviz_datatree(**self._arviz_groups())

    def to_botorch(self, view: str = "auto", *, num_samples: int = 256, seed: Seed = 0) -> Any:
        """A BoTorch `Model` of f: any acquisition function, gradients in x, t-batches.

        Args:
            view: "gaussian" for a Gaussian process, exact where the posterior is one and of the same mean and
                covariance otherwise; "samples" for joint draws, the same functions at every point; "auto" for the
                first where it has formulas and the second where the posterior is a set of draws.
            num_samples: Functions of the view by samples at most.
            seed: Of their choice.

        Raises:
            SettingError: A view that does not exist.

        See `bayesdl.interop.botorch`, also for several posteriors as one model.
        """
        from bayesdl import _doors

        return _doors.botorch_model(self, view, num_samples, seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this posterior to one file (safetensors and JSON), atomically. `bdl.load` reads it, running no code.

        Raises:
            StorageError: The model holds something that a file cannot describe, such as a prior class of your own.
        """
        tensors, extra = self._parts()
        shared = {
            "data.x": self._data.x,
            "data.y": self._data.y,
            **{f"units.{k}": v for k, v in self._units._asdict().items()},
        }
        if self._log_evidence is not None:
            shared["log_evidence"] = self._log_evidence
        record = {
            "form": self.form,
            "model": _records.encode(self._model),
            "has_outputs": self._data.has_outputs,
            "diagnostics": self._diagnostics,
            **extra,
        }
        _storage.write(path, record, {**shared, **tensors})

    @classmethod
    @abc.abstractmethod
    def _from_parts(cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]) -> Posterior:
        """Build the posterior again from `shared` constructor arguments and what `_parts` wrote."""

    @abc.abstractmethod
    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON fields beyond those that every posterior has."""

    @abc.abstractmethod
    def _arviz_groups(self) -> dict[str, Any]:
        """Groups for `to_arviz`."""

    def _inputs(self, method: str, x: Any) -> Tensor:
        return new_inputs(f"{type(self).__name__}.{method}", x, self._data.x)

    def _squeeze(self, value: Tensor) -> Tensor:
        """Drop the output axis (last) where y came without one, and return to the user's dtype."""
        value = value.to(self._data.x.dtype)
        return value if self._data.has_outputs else value.squeeze(-1)


def load_parts(
    path: str | os.PathLike[str], resolve: Callable[[str], type], module: _records.Modules
) -> tuple[Any, ...]:
    """What every saved posterior has: (form, shared constructor arguments, record, tensors)."""
    record, tensors = _storage.read(path)
    try:
        units = Units(*(tensors[f"units.{name}"] for name in Units._fields))
        data = TrainingData(tensors["data.x"], tensors["data.y"], bool(record["has_outputs"]))
        model = _records.decode(record["model"], resolve, module)
        shared = {"model": model, "data": data, "units": units, "diagnostics": record["diagnostics"]}
        shared["log_evidence"] = tensors.get("log_evidence")
        return str(record["form"]), shared, record, tensors
    except KeyError as error:
        fix = "save the posterior again"
        fail(StorageError, "bdl.load", f"{path} lacks a part.", got=f"no {error}", fix=fix)


def member_indices(num_members: int, num: int, seed: Seed) -> Tensor:
    """Indices of `num` members: distinct while there are enough, then with replacement."""
    g = generator(seed)
    if num <= num_members:
        return torch.randperm(num_members, generator=g)[:num]
    return torch.randint(num_members, (num,), generator=g)
