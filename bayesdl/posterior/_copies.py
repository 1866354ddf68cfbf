"""One posterior as many equal ones along a new axis of data sets, each of which may then see data of its own."""

from __future__ import annotations

from torch import Tensor

from bayesdl import ops
from bayesdl.data import TrainingData, Units
from bayesdl.posterior.amortized import AmortizedPosterior
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.closed_form import GPPosterior
from bayesdl.posterior.scale_mixture import MixturePosterior


def copies(posterior: Posterior, num: int) -> Posterior | None:
    """The posterior of data (num, *b, n, d), or None where this kind of posterior has no such form.

    Nothing is computed again, and tensors are views. A posterior of another kind may have a method `copies(num)`.
    """
    if isinstance(posterior, GPPosterior):
        return _gp_copies(posterior, num)
    if isinstance(posterior, MixturePosterior):
        return type(posterior).mix(_gp_copies(posterior._gp, num), posterior._mixing)
    if isinstance(posterior, AmortizedPosterior):
        wide = posterior.copies(num)
        # one point more would otherwise have all data read again, and in other units
        wide._settings = wide._settings._replace(update="append")
        return wide
    own = getattr(posterior, "copies", None)
    return None if own is None else own(num)


def _gp_copies(gp: GPPosterior, num: int) -> GPPosterior:
    def wide(value: Tensor) -> Tensor:
        return value.expand(num, *value.shape)

    data = TrainingData(wide(gp._data.x), wide(gp._data.y), gp._data.has_outputs)
    return GPPosterior(
        gp.model,
        data,
        Units(*map(wide, gp._units)),
        gp.diagnostics,
        None if gp.log_evidence is None else wide(gp.log_evidence),
        values={name: wide(value) for name, value in gp._values.items()},
        constant=wide(gp._constant),
        state=ops.GPState(*map(wide, gp._state)),
    )
