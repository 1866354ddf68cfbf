"""The surrogate of a study: fitted to its record, kept in memory and on disk for whoever needs the same one again.

A kept posterior is a saving and nothing more. Its file is named by what it was fitted to, is written beside its place
and renamed, and is believed only if it can be read and holds exactly these data; anything else means a fit.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _records
from bayesdl.errors import BayesdlError, StorageError
from bayesdl.interop._optuna_record import Record, fingerprint, stream
from bayesdl.interop._optuna_space import Encoding

_IN_MEMORY: dict[str, tuple[Any, Any]] = {}  # key -> engine, posterior
_MOST_IN_MEMORY = 4
_LOCK = threading.Lock()


class Surrogate(NamedTuple):
    """Settings of the fits.

    Attributes:
        engine: Any engine of bayesdl.
        refit_every: Hyper-parameters are estimated anew after this many observations; between, posteriors that can are
            conditioned on what is new.
        cache: Folder of kept posteriors, None for none.
    """

    engine: Any
    refit_every: int
    cache: Path | None

    def posterior(self, record: Record, encoding: Encoding, study: str, seed: int) -> Any:
        """The posterior of objectives and constraints given the record; one output where there is one in all."""
        x = encoding.expand(record.z)
        y = torch.cat([record.y, record.constraints], -1)
        base = len(x) - len(x) % self.refit_every or len(x)
        first = self._fitted(x[:base], y[:base], study, seed)
        if base == len(x):
            return first
        try:
            return first.condition_on(x[base:], _targets(y[base:]))
        except NotImplementedError:
            return self._fitted(x, y, study, seed)

    def _fitted(self, x: Tensor, y: Tensor, study: str, seed: int) -> Any:
        """The posterior of these data: kept, or fitted with a seed that only the data and the study decide."""
        named = self._encoded_engine()
        data = fingerprint({"x": x.tolist(), "y": y.tolist()})
        settings = repr(self.engine) if named is None else named
        key = fingerprint({"study": study, "seed": seed, "engine": settings, "data": data})
        with _LOCK:
            engine, found = _IN_MEMORY.get(key, (None, None))
            if found is not None and (named is not None or engine is self.engine):
                return found
        path = None if self.cache is None or named is None else self.cache / f"{key}.bdl"
        found = None if path is None else _kept(path, x, y)
        if found is None:
            found = self.engine.fit(x, _targets(y), seed=stream("fit", seed, data))
            if path is not None:
                _keep(found, path)
        with _LOCK:
            while len(_IN_MEMORY) >= _MOST_IN_MEMORY:
                _IN_MEMORY.pop(next(iter(_IN_MEMORY)))
            _IN_MEMORY[key] = (self.engine, found)
        return found

    def _encoded_engine(self) -> str | None:
        """The engine's settings in full, None where a file could not tell them from others'."""
        try:
            text = str(_records.encode(self.engine))
        except StorageError:
            return None
        return None if "$module" in text else text


def _targets(y: Tensor) -> Tensor:
    return y[:, 0] if y.shape[-1] == 1 else y


def _kept(path: Path, x: Tensor, y: Tensor) -> Any:
    """The posterior in a file if it is of these data, else None."""
    from bayesdl._doors import load

    try:
        found = load(path)
    except (BayesdlError, OSError):
        return None
    same = torch.equal(found._data.x, x) and torch.equal(found._data.y, y)
    return found if same else None


def _keep(posterior: Any, path: Path) -> None:
    try:
        posterior.save(path)
        for old in sorted(path.parent.glob("*.bdl"), key=lambda p: p.stat().st_mtime)[:-16]:
            old.unlink(missing_ok=True)
    except (BayesdlError, OSError) as error:
        message = f"a fitted posterior could not be kept in {path.parent}: {str(error).splitlines()[0]}"
        warnings.warn(message, UserWarning, stacklevel=2)
