"""The few doors through which a lower room reaches a higher one, when called.

Imports of this package point downward. Where a method of a lower room is an exit to a higher one (a posterior to ArviZ,
a file back to a posterior), it goes through a function here, which imports what it needs inside.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from bayesdl.posterior import Posterior

_ROOMS_WITH_RECORDS = ("hyper", "kernels", "likelihoods", "models", "priors")
_MODELS = ("BNN", "GP", "Learned", "TaskMean")  # of the models, those that a file may name
_FOREIGN = ("GpytorchKernel", "GpytorchMean")  # wrappers around modules that the reader of a file hands in


def load(path: str | os.PathLike[str], *, module: nn.Module | tuple[nn.Module, ...] | None = None) -> Posterior:
    """Read a posterior that `posterior.save` wrote. Reading runs no code from the file.

    Args:
        path: The file.
        module: The network, for a posterior of `bdl.BNN(module=...)`, or the kernel or mean of gpytorch, for one of a
            `bdl.GP` that has such (`model.module` says which; two as a tuple): a file holds their numbers, not their
            code.

    Raises:
        StorageError: The file is missing, truncated, corrupt, foreign, or of a later format.
    """
    from bayesdl import models, posterior
    from bayesdl.errors import StorageError, fail
    from bayesdl.posterior.base import load_parts

    form, shared, record, tensors = load_parts(path, _resolve, module)
    forms = {kind.form: kind for kind in vars(posterior).values() if hasattr(kind, "form")}
    if form not in forms:
        fail(StorageError, "bdl.load", f"form must be one of {sorted(forms)}.", got=form, fix="upgrade bayesdl")
    kind = forms[form]
    if not isinstance(shared["model"], getattr(models, kind.model_kind, object)):  # a posterior of any model
        got = repr(shared["model"])[:200]
        wanted = f"a {kind.__name__} has a {kind.model_kind}."
        fail(StorageError, "bdl.load", wanted, got=got, fix="save the posterior again")
    try:
        return kind._from_parts(shared, record, tensors)
    except KeyError as error:
        fail(StorageError, "bdl.load", f"{path} lacks a part.", got=f"no {error}", fix="save the posterior again")


def _resolve(kind: str) -> type:
    """The dataclass that "room.Class" names, among the public settings of this package and nothing else."""
    import dataclasses
    import importlib
    import inspect

    from bayesdl.errors import StorageError, fail

    room, _, name = kind.partition(".")
    public = room in _ROOMS_WITH_RECORDS and not name.startswith("_") and (room != "models" or name in _MODELS)
    if room == "interop" and name in _FOREIGN:
        room, public = "interop.gpytorch", True
    found: Any = getattr(importlib.import_module(f"bayesdl.{room}"), name, None) if public else None
    if not isinstance(found, type) or not dataclasses.is_dataclass(found) or inspect.isabstract(found):
        wanted = "the file names settings that this version lacks."
        fail(StorageError, "bdl.load", wanted, got=repr(kind), fix="upgrade bayesdl")
    return found


def arviz_datatree(**groups: Any) -> Any:
    """`interop.arviz.to_datatree`: posterior, sample_stats, observed_data and log_likelihood as a DataTree."""
    from bayesdl.interop.arviz import to_datatree

    return to_datatree(**groups)


def arviz_convergence(draws: Any) -> dict[str, float]:
    """`interop.arviz.worst_convergence`: the worst R-hat, bulk and tail ESS over draws (C, N, *event)."""
    from bayesdl.interop.arviz import worst_convergence

    return worst_convergence(draws)


def arviz_nested_rhat(draws: Any, initial: Any) -> float | None:
    """`interop.arviz.worst_nested_rhat` over draws (C, N, *event) of chains that began at `initial` (C, D)."""
    from bayesdl.interop.arviz import worst_nested_rhat

    return worst_nested_rhat(draws, initial)


def log_density_from_pyro(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`interop.pyro.from_pyro`: the posterior of a Pyro model with these arguments as a `LogDensity`."""
    from bayesdl.interop.pyro import from_pyro

    return from_pyro(model, args, kwargs)


def botorch_model(posterior: Posterior, view: str, num_samples: int, seed: Any) -> Any:
    """`interop.botorch.to_botorch`: a posterior as a BoTorch model."""
    from bayesdl.interop.botorch import to_botorch

    return to_botorch(posterior, view, num_samples=num_samples, seed=seed)


def sklearn_dataset(name: str) -> Any:
    """`interop.sklearn.sklearn_dataset`: a data set that ships with scikit-learn, as arrays and names."""
    from bayesdl.interop.sklearn import sklearn_dataset as read

    return read(name)


def kernel_from_gpytorch(kernel: Any) -> Any:
    """`interop.gpytorch.from_gpytorch` for a gpytorch kernel; anything else as it is."""
    from bayesdl.interop import gpytorch as door

    return door.from_gpytorch(kernel) if door.is_kernel(kernel) else kernel


def mean_from_gpytorch(mean: Any) -> Any:
    """`interop.gpytorch.mean_from_gpytorch` for a gpytorch mean; anything else as it is."""
    from bayesdl.interop import gpytorch as door

    return door.mean_from_gpytorch(mean) if door.is_mean(mean) else mean


def kernel_to_gpytorch(kernel: Any, d: int, batch_shape: tuple[int, ...], active_dims: tuple[int, ...] | None) -> Any:
    """`interop.gpytorch.to_gpytorch`: a kernel as a gpytorch module with trainable hyper-parameters."""
    from bayesdl.interop.gpytorch import to_gpytorch

    return to_gpytorch(kernel, d, batch_shape=batch_shape, active_dims=active_dims)


def fabric_worker(device: Any, num_devices: int, precision: str) -> Any:
    """`interop.fabric.FabricWorker`: one of several processes that train a network together."""
    from bayesdl.interop.fabric import FabricWorker

    return FabricWorker(device, num_devices, precision)


def amortized_reader(tensors: Any, record: Any, device: Any) -> Any:
    """`amortized.reader.Reader.from_parts`: the network of a saved posterior."""
    from bayesdl.amortized.reader import Reader

    return Reader.from_parts(tensors, record, device)
