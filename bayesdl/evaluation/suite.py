"""The engines that the command line knows by name, with settings for tables of hundreds to thousands of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bayesdl.errors import SettingError, fail

__all__ = ["ENGINES", "Entry", "build", "engine_names"]


class Entry(NamedTuple):
    """One engine by name.

    Attributes:
        description: What it is, in one line.
        tasks: What it can be fitted to.
        builder: (task, num_classes, quick) -> engine.
    """

    description: str
    tasks: tuple[str, ...]
    builder: Callable[[str, int, bool], Any]


def build(name: str, task: str, num_classes: int, quick: bool = False) -> Any:
    """The engine called `name` for a task ("regression", "binary", "multiclass").

    Raises:
        SettingError: An unknown name, or an engine that cannot do the task.
    """
    if name not in ENGINES:
        fail(SettingError, "engines", f"engines are {', '.join(ENGINES)}.", got=repr(name), fix="check the spelling")
    if task not in ENGINES[name].tasks:
        able = ", ".join(engine_names(task))
        wanted = f"{name} cannot do {'classification' if task != 'regression' else task}."
        fail(SettingError, "engines", wanted, got=f"a {task} problem", fix=f"use {able}")
    return ENGINES[name].builder(task, num_classes, quick)


def engine_names(task: str) -> list[str]:
    """Names of the engines that can do `task`."""
    return [name for name, entry in ENGINES.items() if task in entry.tasks]


def _gp(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.kernels import Matern, Scale

    return _exact_gp(Scale(Matern(nu=2.5)), quick)


def _nngp(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.kernels import NNGP

    return _exact_gp(NNGP(depth=3, activation="relu"), quick)


def _student_t(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.inference.scale_mixture import ScaleMixture
    from bayesdl.kernels import Matern, Scale
    from bayesdl.models.gp import GP

    model = GP(Scale(Matern(nu=2.5)), likelihood=_likelihood(task, num_classes))
    return ScaleMixture(model, num_starts=1 if quick else 4, batch_size=_BATCH, num_steps=200 if quick else 1000)


def _sparse(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.inference.sparse_gp import SparseGP
    from bayesdl.kernels import Matern, Scale
    from bayesdl.models.gp import GP

    model = GP(Scale(Matern(nu=2.5)), likelihood=_likelihood(task, num_classes))
    if task == "regression":
        return SparseGP(model, num_inducing=200, num_steps=50 if quick else 200)
    return SparseGP(model, num_inducing=200, batch_size=_BATCH, num_steps=200 if quick else 1000)


def _exact_gp(kernel: Any, quick: bool) -> Any:
    from bayesdl.inference.exact_gp import ExactGP
    from bayesdl.likelihoods import Gaussian
    from bayesdl.models.gp import GP

    return ExactGP(GP(kernel, mean="constant", likelihood=Gaussian()), num_starts=1 if quick else 4)


def _hmc(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.inference.hmc import HMC

    length, num_steps = (100, 16) if quick else (500, 32)
    network = _network(task, num_classes)
    return HMC(network, num_chains=4, num_warmup=length, num_draws=length, num_steps=num_steps)


def _ensemble(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.inference.ensemble import Ensemble

    return Ensemble(_network(task, num_classes), num_members=5, num_steps=1000 if quick else 2000)


def _sghmc(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.inference.sghmc import SGHMC

    return SGHMC(_network(task, num_classes), num_warmup=1000 if quick else 3000, num_draws=100 if quick else 200)


def _nuts(task: str, num_classes: int, quick: bool) -> Any:
    from bayesdl.inference.nuts import NUTS

    length, max_depth = (30, 5) if quick else (200, 7)
    network = _network(task, num_classes)
    return NUTS(network, num_chains=4, num_warmup=length, num_draws=length, max_depth=max_depth)


def _likelihood(task: str, num_classes: int) -> Any:
    from bayesdl import likelihoods

    makers = {
        "regression": likelihoods.Gaussian,
        "binary": likelihoods.Bernoulli,
        "multiclass": lambda: likelihoods.Categorical(num_classes),
    }
    return makers[task]()


def _network(task: str, num_classes: int) -> Any:
    from bayesdl import priors
    from bayesdl.models.bnn import BNN

    likelihood = _likelihood(task, num_classes)
    # Standardised targets ask for functions of size one; classes that can be told apart ask for logits well beyond it.
    prior = priors.Normal(scale=1.0 if task == "regression" else 4.0)
    return BNN(hidden=(50,), activation="tanh", prior=prior, likelihood=likelihood)


_BATCH = 256
_EVERY = ("regression", "binary", "multiclass")
ENGINES: dict[str, Entry] = {
    "gp": Entry("exact Gaussian process, Matern-5/2 kernel, one lengthscale an input", ("regression",), _gp),
    "nngp": Entry("exact Gaussian process, kernel of an infinitely wide relu network", ("regression",), _nngp),
    "student-t": Entry("Student-t process: that GP with an unknown scale of its covariance", _EVERY, _student_t),
    "sparse": Entry("that GP through 200 inducing points", _EVERY, _sparse),
    "hmc": Entry("Bayesian neural network of 50 tanh units, Hamiltonian Monte Carlo", _EVERY, _hmc),
    "nuts": Entry("such a network by the No-U-Turn sampler", _EVERY, _nuts),
    "sghmc": Entry("such a network by stochastic-gradient HMC", _EVERY, _sghmc),
    "ensemble": Entry("five such networks trained from different starts", _EVERY, _ensemble),
}
