"""The surrogate of a study: fitted to its record, kept in memory and on disk for whoever needs the same one again.

A kept posterior is a saving and nothing more. Its file is named by what it was fitted to, is written beside its place
and renamed, and is believed only if it can be read and holds exactly these data; anything else means a fit.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _records
from bayesdl.errors import BayesdlError, StorageError
from bayesdl.interop._joblib import num_workers, run_jobs
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
        x, y, base = self._data(record, encoding)
        first = self._fitted(x[:base], y[:base], study, seed)
        if base == len(x):
            return first
        try:
            return first.condition_on(x[base:], _targets(y[base:]))
        except NotImplementedError:
            return self._fitted(x, y, study, seed)

    def _data(self, record: Record, encoding: Encoding) -> tuple[Tensor, Tensor, int]:
        """Inputs, targets, and how many of them hyper-parameters are estimated from."""
        x = encoding.expand(record.z)
        return x, torch.cat([record.y, record.constraints], -1), len(x) - len(x) % self.refit_every or len(x)

    def _fitted(self, x: Tensor, y: Tensor, study: str, seed: int) -> Any:
        """The posterior of these data: kept, or fitted with a seed that only the data and the study decide."""
        key, fit_seed = self._key(x, y, study, seed)
        found = self._found(key, x, y)
        return self._stored(key, self.engine.fit(x, _targets(y), seed=fit_seed)) if found is None else found

    def _key(self, x: Tensor, y: Tensor, study: str, seed: int) -> tuple[str, int]:
        """By what a fit of these data is known, and its seed."""
        named = self._encoded_engine()
        data = fingerprint({"x": x.tolist(), "y": y.tolist()})
        settings = repr(self.engine) if named is None else named
        key = fingerprint({"study": study, "seed": seed, "engine": settings, "data": data})
        return key, stream("fit", seed, data)

    def _found(self, key: str, x: Tensor, y: Tensor) -> Any:
        """A kept posterior of these data, or None."""
        named = self._encoded_engine()
        with _LOCK:
            engine, found = _IN_MEMORY.get(key, (None, None))
            if found is not None and (named is not None or engine is self.engine):
                return found
        found = None if self.cache is None or named is None else _kept(self.cache / f"{key}.bdl", x, y)
        if found is not None:
            self._remember(key, found)
        return found

    def _stored(self, key: str, posterior: Any) -> Any:
        """A fitted posterior, kept for others."""
        if self.cache is not None and self._encoded_engine() is not None:
            _keep(posterior, self.cache / f"{key}.bdl")
        self._remember(key, posterior)
        return posterior

    def _remember(self, key: str, posterior: Any) -> None:
        with _LOCK:
            while len(_IN_MEMORY) >= _MOST_IN_MEMORY:
                _IN_MEMORY.pop(next(iter(_IN_MEMORY)))
            _IN_MEMORY[key] = (self.engine, posterior)

    def _encoded_engine(self) -> str | None:
        """The engine's settings in full, None where a file could not tell them from others'."""
        try:
            text = str(_records.encode(self.engine))
        except StorageError:
            return None
        return None if "$module" in text else text


def fit_together(wanted: Sequence[tuple[Surrogate, Record]], encoding: Encoding, study: str, seed: int) -> None:
    """Fit the surrogates that are not kept yet side by side, where joblib has several workers: see `run_jobs`.

    Each is then found by `Surrogate.posterior`, which fits it itself otherwise.
    """
    if num_workers() == 1 or len(wanted) < 2:
        return
    lacking = []
    for surrogate, record in wanted:
        x, y, base = surrogate._data(record, encoding)
        key, fit_seed = surrogate._key(x[:base], y[:base], study, seed)
        if surrogate._found(key, x[:base], y[:base]) is None:
            fit = functools.partial(surrogate.engine.fit, x[:base], _targets(y[:base]), seed=fit_seed)
            lacking.append((surrogate, key, fit))
    for (surrogate, key, _), posterior in zip(lacking, run_jobs([fit for *_, fit in lacking]), strict=True):
        surrogate._stored(key, posterior)


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
