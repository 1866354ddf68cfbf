"""Settings as plain JSON and back: frozen dataclasses by the name of their room and class, and nothing else.

`encode` writes {"kind": "kernels.RBF", "lengthscale": 0.7, ...}. `decode` builds the object again from classes that
`resolve` hands out; it can name no other code, so that reading a file cannot run any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from torch import nn

from bayesdl.errors import SettingError, ShapeError, StorageError, fail


def encode(value: Any) -> Any:
    """A JSON value for `value`: primitives as they are, tuples marked, dataclasses of this package with their kind.

    Raises:
        StorageError: `value` has no form that can be read again without running code.
    """
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, nn.Module):
        return {"$module": repr(value)}
    package, _, rest = type(value).__module__.partition(".")
    if package != "bayesdl" or not dataclasses.is_dataclass(value) or isinstance(value, type):
        _refuse(value)
    fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return {"kind": f"{rest.partition('.')[0]}.{type(value).__name__}", **fields}


def _refuse(value: Any) -> NoReturn:
    wanted = "a file holds settings of bayesdl's own classes, numbers and text only."
    got = f"{type(value).__module__}.{type(value).__qualname__}: {value!r}"[:200]
    fail(StorageError, "posterior.save", wanted, got=got, fix="keep the code beside the data, and fit again from there")


Modules = nn.Module | tuple[nn.Module, ...] | None


def decode(value: Any, resolve: Callable[[str], type], module: Modules = None) -> Any:
    """The object that `encode` wrote; `resolve` maps "room.Class" to a dataclass, `module` fills in an own network.

    Of several modules the one is taken that reads like the one in the file.

    Raises StorageError for an unknown kind, unknown fields, or a network that was not given.
    """
    if isinstance(value, list):
        return [decode(item, resolve, module) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decode(item, resolve, module) for item in value["$tuple"])
    if "$module" in value:
        if isinstance(module, tuple):
            module = next((one for one in module if repr(one) == value["$module"]), None)
        if module is None:
            wanted = "this posterior is of your own network, whose code is not in the file."
            fail(
                StorageError,
                "bdl.load",
                wanted,
                got=" ".join(str(value["$module"]).split())[:200],
                fix="bdl.load(path, module=network), with the module that the model had",
            )
        return module
    kind = resolve(str(value.get("kind")))
    fields = {name: decode(item, resolve, module) for name, item in value.items() if name != "kind"}
    try:
        return kind(**fields)
    except (TypeError, SettingError, ShapeError) as error:
        got = str(error).splitlines()[0]
        fail(StorageError, "bdl.load", f"{value['kind']} must have the fields of this version.", got=got, fix=_UPGRADE)


_UPGRADE = "load it with the version of bayesdl that wrote it"
