"""Errors and warnings: each says where, what was wanted, what came, and how to mend it.

    ShapeError: ExactGP.fit: y must have shape (50,).
      got  (50, 2)
      fix  pass one target column, or y.T for a batch of outputs

All derive from `BayesdlError` and from the built-in class that a caller would expect (`ValueError`, `TypeError`,
`RuntimeError`), so code that knows nothing of this package still catches them.
"""

from __future__ import annotations

from typing import NoReturn


class BayesdlError(Exception):
    """Any error that this package raises on purpose."""


class ShapeError(BayesdlError, ValueError):
    """A tensor has the wrong number of axes or the wrong size along one."""


class DataError(BayesdlError, ValueError):
    """Values cannot be used: NaN, infinities, missing cells, labels out of range, an unknown data set."""


class DtypeError(BayesdlError, TypeError):
    """A tensor is of the wrong dtype, or two that belong together differ."""


class DeviceError(BayesdlError, ValueError):
    """Two tensors that belong together lie on different devices."""


class SettingError(BayesdlError, ValueError):
    """A setting of a model or engine is out of range or contradicts another."""


class StorageError(BayesdlError, ValueError):
    """A file is corrupt, truncated, foreign, or written by a version that this one cannot read."""


class NumericalError(BayesdlError, RuntimeError):
    """A result would be unusable: a matrix that no jitter makes positive definite, a sampler that never moved."""


class NumericalWarning(UserWarning):
    """A result is usable but something grew or was repaired on the way; `diagnostics` holds the figures."""


class OutOfRangeWarning(NumericalWarning):
    """A pretrained network is asked outside the sizes or inputs that it was trained on; `diagnostics` says which."""


class ConvergenceWarning(UserWarning):
    """An optimiser or sampler stopped short of what its diagnostics ask for; `diagnostics` holds the figures."""


def fail(kind: type[BayesdlError], where: str, wanted: str, *, got: str, fix: str) -> NoReturn:
    """Raise `kind` in the house form: where and what was wanted, then what came, then how to mend it."""
    raise kind(f"{where}: {wanted}\n  got  {got}\n  fix  {fix}") from None
