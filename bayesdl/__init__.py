"""bayesdl: Bayesian deep learning and Gaussian processes on torch.

Say what you believe about functions (a model), choose how to condition on data (an engine), and get the same posterior
object whichever way you chose.

Public names are imported when first touched: `import bayesdl` by itself loads nothing heavier than torch and numpy.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesdl._version import __version__

if TYPE_CHECKING:
    from bayesdl import (
        amortized,
        bo,
        datasets,
        distributions,
        errors,
        evaluation,
        kernels,
        likelihoods,
        ops,
        priors,
        samplers,
        testing,
    )
    from bayesdl._doors import load
    from bayesdl.evaluation.compare import compare
    from bayesdl.inference.ensemble import Ensemble
    from bayesdl.inference.exact_gp import ExactGP
    from bayesdl.inference.hmc import HMC
    from bayesdl.inference.sample import sample
    from bayesdl.inference.sparse_gp import SparseGP
    from bayesdl.likelihoods import Bernoulli, Categorical, Gaussian
    from bayesdl.models.bnn import BNN
    from bayesdl.models.gp import GP
    from bayesdl.models.log_density import LogDensity
    from bayesdl.posterior import Posterior

__all__ = [
    "BNN",
    "GP",
    "HMC",
    "Bernoulli",
    "Categorical",
    "Ensemble",
    "ExactGP",
    "Gaussian",
    "LogDensity",
    "Posterior",
    "SparseGP",
    "__version__",
    "amortized",
    "bo",
    "compare",
    "datasets",
    "distributions",
    "errors",
    "evaluation",
    "kernels",
    "likelihoods",
    "load",
    "ops",
    "priors",
    "sample",
    "samplers",
    "testing",
]

# Where the public names live that are neither rooms nor engines.
_HOME = {
    "BNN": "bayesdl.models.bnn",
    "Bernoulli": "bayesdl.likelihoods",
    "Categorical": "bayesdl.likelihoods",
    "GP": "bayesdl.models.gp",
    "Gaussian": "bayesdl.likelihoods",
    "LogDensity": "bayesdl.models.log_density",
    "Posterior": "bayesdl.posterior",
    "compare": "bayesdl.evaluation.compare",
    "load": "bayesdl._doors",
    "sample": "bayesdl.inference.sample",
}
_ROOMS = frozenset(name for name in __all__ if name.islower() and name not in _HOME and name != "__version__")
_ENGINES = Path(__file__).parent / "inference"


def __getattr__(name: str) -> Any:
    """Import the public name `name` on first use and keep it."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"bayesdl.{name}")
    elif name in (engines := _engine_homes()):
        value = getattr(importlib.import_module(engines[name]), name)
    else:
        public = sorted({*__all__, *engines})
        close = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
        # An engine in the wrong case, such as Hmc, is further away by letters than it is to a reader.
        close = [known for known in public if known.lower() == name.lower()] or close
        hint = f"; did you mean {' or '.join(close)}?" if close and not name.startswith("_") else ""
        raise AttributeError(f"module 'bayesdl' has no attribute {name!r}{hint}", name=name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*__all__, *_engine_homes()})


def _engine_homes() -> dict[str, str]:
    """Engine -> module, read from the folder: class SparseGP stands in inference/sparse_gp.py. Nothing is imported."""
    homes = {}
    for found in pkgutil.iter_modules([str(_ENGINES)]):
        if not found.name.startswith("_"):
            text = (_ENGINES / f"{found.name}.py").read_text(encoding="utf-8")
            for name in re.findall(r"^class (\w+)", text, flags=re.MULTILINE):
                if name.lower() == found.name.replace("_", ""):
                    homes[name] = f"bayesdl.inference.{found.name}"
    return homes
