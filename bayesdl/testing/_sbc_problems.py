"""What simulation-based calibration is run on: families of log densities, priors of networks, of Gaussian processes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, Streams, child_seeds
from bayesdl.errors import SettingError, fail
from bayesdl.hyper import Parameter
from bayesdl.models import BNN, GP, WeightSpace
from bayesdl.models.log_density import LogDensity
from bayesdl.posterior import DrawsPosterior

_SAMPLERS = ("nuts", "hmc", "chees", "mams")


@dataclass(frozen=True)
class SampledDensity:
    """Draws from a family of log densities, one for each data set, all sets at once.

    Attributes:
        family: From data to a `LogDensity`. Every tensor of the data has a leading axis of data sets, and the density
            maps positions (sets, C, dim) to values (sets, C). Draws are named by its `transform`, else by its names.
        sampler: "nuts", "hmc", "chees" or "mams".
        num_chains: Chains of each data set, which start uniformly in (-2, 2)^dim.
        num_warmup: Transitions that adapt.
        num_draws: Draws kept per chain.
        transform: From draws (sets, C, N, dim) and the data to quantities by name, each (sets, C, N, *event); None
            takes the transform of the density.
        settings: Further settings of the sampler's `run`, such as {"num_steps": 16}.
    """

    family: Callable[..., LogDensity]
    sampler: str = "nuts"
    num_chains: int = 4
    num_warmup: int = 300
    num_draws: int = 300
    transform: Callable[..., Mapping[str, Tensor]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _checks.choice("SampledDensity", "sampler", self.sampler, _SAMPLERS)
        _checks.at_least("SampledDensity", "num_chains", self.num_chains, 1, integer=True)

    def fit(self, *data: Tensor, seed: Seed = 0) -> dict[str, Tensor]:
        """Draws by name, each (sets, C, N, *event), for data with a leading axis of sets."""
        density = self.family(*data)
        start_seed, run_seed = child_seeds(seed, 2)
        num_sets, like = len(data[0]), torch.empty(0, dtype=torch.float64, device=data[0].device)
        streams = Streams(start_seed, num_sets * self.num_chains, like.device)
        start = 4 * streams.uniform(density.dim, like=like).unflatten(0, (num_sets, self.num_chains)) - 2
        module = importlib.import_module(f"bayesdl.samplers.{self.sampler}")
        counts = {"num_warmup": self.num_warmup, "num_draws": self.num_draws}
        draws = module.run(density, start, **counts, seed=run_seed, **self.settings).draws
        if self.transform is not None:
            return dict(self.transform(draws, *data))
        own = getattr(density, "transform", None)
        if own is not None:
            named = own(draws.flatten(0, 1))
            return {name: value.unflatten(0, (num_sets, self.num_chains)) for name, value in named.items()}
        if density.names is None:
            return {"q": draws}
        return {name: draws[..., i] for i, name in enumerate(density.names)}


@dataclass(frozen=True)
class NetworkPrior:
    """Networks drawn from the prior of a `BNN`, and data simulated from them: a `prior` for `testing.sbc`.

    The quantities ranked are "f", the function at the probes; "noise_variance", where it is learned; and
    "log_likelihood", log p(y | f, noise), which unlike the others also finds draws that ignore the data.

    Attributes:
        model: The network. The engine that is tested must have `standardize=False`, since the prior would otherwise be
            one for other units.
        x: Training inputs (n, d) of every data set.
        probes: Inputs (s, d) at which functions are compared.
        names: Which of the quantities to rank. Posteriors that are not draws of networks give "f" only.
    """

    model: BNN
    x: Tensor
    probes: Tensor
    names: tuple[str, ...] = ("f", "noise_variance", "log_likelihood")

    def check(self, engine: Any) -> None:
        """Refuse an engine that standardises."""
        _check_units("NetworkPrior", engine)

    def simulate(self, generator: torch.Generator) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """A network and a data set (x, y) of it."""
        space = self._space()
        q = space.prior.sample((1, space.network.num_weights), generator, self.x.dtype)
        for parameter in space.likelihood.parameters():
            value = _draw("NetworkPrior", parameter, generator)
            q = torch.cat([q, parameter.unconstrained(value).to(q).reshape(1, 1)], -1)
        f = space.forward(q, self.x)[0]
        y = _replicate(space, f, space.split(q)[1], generator)
        return self._quantities(space, q, y, lambda value: value[0]), (self.x, y)

    def quantities(self, posterior: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The same quantities of posterior draws, each (*s, C, N, *event)."""
        if isinstance(posterior, DrawsPosterior):
            q = posterior.draws
            counts = tuple(q.shape[-3:-1])
            return self._quantities(self._space(), q.flatten(-3, -2), y, lambda v: v.unflatten(y.ndim - 1, counts))
        f = posterior.sample(self.probes, (1000,), seed=0)
        return {"f": f.movedim(0, -2).unsqueeze(-3)}

    def _quantities(
        self, space: WeightSpace, q: Tensor, y: Tensor, shaped: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """From q (*s, S, D) and y (*s, n)."""
        params = space.split(q)[1]
        f = space.forward(q, self.x)
        log_likelihood = space.likelihood.log_prob(f, y.unsqueeze(-1).unsqueeze(-3), params)
        found = {"f": space.forward(q, self.probes), "log_likelihood": log_likelihood, **params}
        found["f"] = found["f"].squeeze(-1) if found["f"].shape[-1] == 1 else found["f"]
        if "noise_variance" in found:
            found["noise_variance"] = found["noise_variance"].squeeze(-1)
        return {name: shaped(found[name]) for name in self.names if name in found}

    def _space(self) -> WeightSpace:
        return self.model.weight_space(self.x.shape[-1], 1)


@dataclass(frozen=True)
class ProcessPrior:
    """Hyper-parameters drawn from the priors of a `GP`, and data simulated under them: a `prior` for `testing.sbc`.

    The quantities ranked are the hyper-parameters, by their names in `GP.layout`, the mean, which is N(0, 1) where it
    is a learned constant, and "log_likelihood", log p(y | hyper-parameters).

    Attributes:
        model: The Gaussian process, with Gaussian noise and a prior on every hyper-parameter. The engine that is
            tested must have `standardize=False`.
        x: Inputs (n, d) of every data set, float64.
    """

    model: GP
    x: Tensor

    def check(self, engine: Any) -> None:
        """Refuse an engine that standardises."""
        _check_units("ProcessPrior", engine)

    def simulate(self, generator: torch.Generator) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Hyper-parameters and a data set (x, y) under them. Cost: O(n^3)."""
        layout = self.model.layout(self.x.shape[-1])
        pieces = [p.unconstrained(_draw("ProcessPrior", p, generator)).reshape(-1) for p in layout.parameters]
        pieces.append(torch.randn(int(layout.has_mean), generator=generator, dtype=torch.float64))
        theta = torch.cat(pieces).unsqueeze(0)
        mean, factor = self._law(theta)
        z = torch.randn(len(self.x), 1, generator=generator, dtype=torch.float64)
        y = mean[0] + (factor[0] @ z).squeeze(-1)
        return {name: value[0] for name, value in self._quantities(theta, y).items()}, (self.x, y)

    def quantities(self, posterior: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The same quantities of posterior draws, each (*s, C, N, *event). Cost: O(n^3) a draw."""
        theta = posterior.draws
        counts = tuple(theta.shape[-3:-1])
        found = self._quantities(theta.flatten(-3, -2), y.unsqueeze(-2))
        return {name: value.unflatten(y.ndim - 1, counts) for name, value in found.items()}

    def _quantities(self, theta: Tensor, y: Tensor) -> dict[str, Tensor]:
        """From theta (*s, S, D) and y, which broadcasts to (*s, S, n)."""
        layout = self.model.layout(self.x.shape[-1])
        values, constant = layout.unpack(theta)
        mean, factor = self._law(theta)
        white = torch.linalg.solve_triangular(factor, (y - mean).unsqueeze(-1), upper=False).squeeze(-1)
        found = {p.name: values[p.name].squeeze(-1) if p.shape == (1,) else values[p.name] for p in layout.parameters}
        if layout.has_mean:
            found["mean"] = constant
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return found | {"log_likelihood": -0.5 * white.square().sum(-1) - log_det}

    def _law(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, which broadcasts to (*s, S, n), and Cholesky factor (*s, S, n, n) of y."""
        values, constant = self.model.layout(self.x.shape[-1]).unpack(theta)
        k = self.model.kernel(self.x, params=self.model.kernel_values(values))
        noise = values["noise_variance"][..., None, None] * torch.eye(len(self.x), dtype=k.dtype, device=k.device)
        return self.model.mean_at(self.x, values, constant), torch.linalg.cholesky(k + noise)


def _check_units(where: str, engine: Any) -> None:
    if getattr(engine, "standardize", False):
        wanted = f"{type(engine).__name__} must not standardise: the prior would be one for other units."
        fail(SettingError, where, wanted, got="standardize=True", fix="standardize=False")


def _draw(where: str, parameter: Parameter, generator: torch.Generator) -> Tensor:
    """A value of a hyper-parameter from its prior, within its bounds."""
    if parameter.prior is None:
        fix = f"give {parameter.name} a prior"
        fail(SettingError, where, f"{parameter.name} must have a prior to be drawn from.", got="prior=None", fix=fix)
    while True:
        value = parameter.prior.sample(parameter.shape, generator)
        if bool(((value > parameter.lower) & (value < parameter.upper)).all()):
            return value


def _replicate(space: WeightSpace, f: Tensor, params: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """y (n) given f (n, outputs)."""
    task = space.likelihood.task
    if task == "regression":
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype)
        return (f + params["noise_variance"].sqrt() * noise).squeeze(-1)
    p = torch.sigmoid(f) if task == "binary" else torch.softmax(f, -1)
    if task == "binary":
        return torch.bernoulli(p, generator=generator).squeeze(-1)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1).to(f.dtype)
