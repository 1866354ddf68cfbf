"""A Pyro model as a function of unconstrained positions: its sites, and runs of it at given positions.

A run takes a batch of B positions in one of three manners: in an outer plate of size B to the left of all of the
model's own batch axes ("batched"), under torch.func.vmap ("vmap"), or one at a time ("loop").
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.interop._pyro_transforms import bijection

WHERE = "LogDensity.from_pyro"
_CHAINS = "_bayesdl_chains"


class CannotBatch(Exception):
    """A model does not run with an outer plate of positions."""


class Site(NamedTuple):
    """A continuous latent site.

    Attributes:
        batch: Batch shape of its distribution, plates included.
        shape: Shape of its value, `batch` in front.
        inner: Shape of its unconstrained numbers, `batch` in front.
        dtype, device: Those of its values.
        first: Where its numbers start in a position.
    """

    batch: torch.Size
    shape: torch.Size
    inner: torch.Size
    dtype: torch.dtype
    device: torch.device
    first: int

    @property
    def size(self) -> int:
        """How many numbers of a position belong to it."""
        return self.inner.numel()


class Program:
    """A Pyro model with its arguments, run once to learn its sites.

    Attributes:
        sites: The continuous latent sites by name, in the order of the model.
        observed: The data by name of the observed site.
        shapes: The shape of every latent and every deterministic value of one position, by name.
        enumerated: Names of the discrete latent sites, which are summed out.
        sequential: Names of the plates that the model runs through one by one.
        dim: Numbers in a position.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        with _untouched_randomness():
            centre = _Centre()
            with poutine.trace() as tracer, centre:
                model(*args, **kwargs)
        trace = tracer.trace
        self.sites, self.enumerated = centre.sites, tuple(centre.enumerated)
        self.dim = sum(site.size for site in self.sites.values())
        kept = [*_deterministic(trace), *self.sites]
        self.shapes = {name: trace.nodes[name]["value"].shape for name in trace.nodes if name in kept}
        self.observed = {name: trace.nodes[name]["value"] for name in centre.observed}
        self.likelihood_shapes = {name: trace.nodes[name]["fn"].batch_shape for name in self.observed}
        frames = [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
        self.sequential = {frame.name for frame in frames if not frame.vectorized}
        self.depth = _depth(trace, plates_only=bool(self.enumerated))
        if not self.sites:
            wanted = "the model must have a continuous latent site."
            got = f"observed sites {sorted(self.observed)}, discrete sites {sorted(self.enumerated)}"
            fail(SettingError, WHERE, wanted, got=got, fix="pyro.sample without obs= makes a latent site")

    def run(self, q: Tensor, *, chains: bool, observe: bool = True, enumerate_: bool = True) -> _Run:
        """The model at one position (dim), or with `chains` at positions (B, dim) in an outer plate.

        To be called, and read, inside `unchecked`. With observe=False observed sites are drawn anew, from torch's
        global generator.
        """
        supply = _Supply(self, q, chains)
        model = self._model
        if enumerate_ and self.enumerated:
            model = config_enumerate(model, "parallel")
        with contextlib.ExitStack() as stack:
            stack.enter_context(supply)
            if not observe:
                stack.enter_context(_Unobserve())  # before latent values are handed out, which count as data then
            if self.enumerated and enumerate_:
                stack.enter_context(poutine.enum(first_available_dim=-1 - self.depth - chains))
            tracer = stack.enter_context(poutine.trace())
            if chains:
                stack.enter_context(pyro.plate(_CHAINS, q.shape[0], dim=-1 - self.depth))
            model(*self._args, **self._kwargs)
        return _Run(self, tracer.trace, supply.log_jacobian, q.shape[0] if chains else None)


class _Run:
    """One execution of a model at given positions."""

    def __init__(self, program: Program, trace: Any, log_jacobian: Tensor, num: int | None) -> None:
        self._program, self._trace, self._log_jacobian, self._num = program, trace, log_jacobian, num

    def log_density(self) -> Tensor:
        """Log joint density plus log Jacobians, (B) or ()."""
        terms = {name: self._log_prob(site) for name, site in self._trace.nodes.items() if _counts(site)}
        if self._program.enumerated:
            return self._log_jacobian + self._eliminate(terms)
        return self._log_jacobian + sum(self._per_chain(term) for term in terms.values())

    def values(self) -> dict[str, Tensor]:
        """Latent and deterministic values by name, (B, *shape) or (*shape)."""
        shapes = self._program.shapes
        return {name: self._shaped(self._trace.nodes[name]["value"], shape) for name, shape in shapes.items()}

    def observations(self) -> dict[str, Tensor]:
        """The values of the observed sites, (B, *shape) or (*shape)."""
        data = self._program.observed
        return {name: self._shaped(self._trace.nodes[name]["value"], value.shape) for name, value in data.items()}

    def log_likelihood(self) -> dict[str, Tensor]:
        """Log density of each observation, by site, (B, *batch) or (*batch).

        Discrete sites are summed out that stand in the same plates as the observation; a site that depends on others,
        such as the path of a hidden Markov model, has no pointwise log likelihood and is left out.
        """
        found = {}
        for name, shape in self._program.likelihood_shapes.items():
            if not self._program.enumerated:
                found[name] = self._shaped(self._log_prob(self._trace.nodes[name]), shape)
            elif (value := self._marginal(name, shape)) is not None:
                found[name] = value
        return found

    def _log_prob(self, site: Any) -> Tensor:
        with _unvalidated(site["fn"]):
            plain = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return scale_and_mask(plain, site["scale"], site["mask"])

    def _per_chain(self, term: Tensor) -> Tensor:
        if self._num is None:
            return term.sum()
        if term.ndim != self._program.depth + 1 or term.shape[0] != self._num:
            raise CannotBatch(f"a log density has shape {tuple(term.shape)} with {self._num} positions")
        return term.flatten(1).sum(-1) if term.ndim > 1 else term

    def _shaped(self, value: Tensor, shape: torch.Size) -> Tensor:
        if self._num is None:
            return value.reshape(shape) if value.numel() == shape.numel() else value.expand(shape)
        if value.numel() == self._num * shape.numel() and value.shape[:1] == (self._num,):
            return value.reshape(self._num, *shape)
        if value.numel() != shape.numel():
            raise CannotBatch(f"a value has shape {tuple(value.shape)} with {self._num} positions")
        return value.reshape(shape).expand(self._num, *shape)

    def _eliminate(self, terms: dict[str, Tensor]) -> Tensor:
        """Sum out the discrete sites: the log density, (B) or ()."""
        packed, enumerated = self._pack(terms)
        factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for name, term in packed.items():
            factors.setdefault(self._plates(name), []).append(term)
        if self._num is None:
            return contract_to_tensor(factors, enumerated)
        kept = frozenset({self._trace.plate_to_symbol[_CHAINS]})
        return contract_to_tensor(factors, enumerated, target_ordinal=kept).reshape(self._num)

    def _marginal(self, name: str, shape: torch.Size) -> Tensor | None:
        nodes = self._trace.nodes
        discrete = [other for other in self._program.enumerated if other in nodes]
        packed, enumerated = self._pack({other: self._log_prob(nodes[other]) for other in (*discrete, name)})
        plates, own = self._plates(name), set(packed[name]._pyro_dims) & enumerated
        parents = [other for other in discrete if set(packed[other]._pyro_dims) & own]
        used = set().union(own, *(set(packed[other]._pyro_dims) & enumerated for other in parents))
        if used != own or any(self._plates(other) != plates for other in parents):
            return None
        total = contract_to_tensor(
            OrderedDict({plates: [packed[other] for other in (*parents, name)]}), own, target_ordinal=plates
        )
        order = sorted(total._pyro_dims, key=self._trace.symbol_to_dim.__getitem__)
        total = total.permute([total._pyro_dims.index(symbol) for symbol in order])
        return self._shaped(total, shape)

    def _pack(self, terms: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """The terms with named axes, and the names of the axes over which discrete sites run."""
        nodes = self._trace.nodes
        for name, site in nodes.items():
            site.pop("packed", None)
            site.pop("log_prob", None)
            if name in terms:
                site["log_prob"] = site["unscaled_log_prob"] = terms[name]
        self._trace.pack_tensors()
        plates = set(self._trace.plate_to_symbol.values())
        return {name: nodes[name]["packed"]["log_prob"] for name in terms}, set(self._trace.symbol_to_dim) - plates

    def _plates(self, name: str) -> frozenset[str]:
        stack = self._trace.nodes[name]["cond_indep_stack"]
        return frozenset(self._trace.plate_to_symbol[frame.name] for frame in stack if frame.vectorized)


class _Supply(Messenger):
    """Hands each latent site the value at a position, and adds up the log Jacobians, (B) or ()."""

    def __init__(self, program: Program, q: Tensor, chains: bool) -> None:
        super().__init__()
        self._program, self._q, self._chains = program, q, chains
        self.log_jacobian = q.new_zeros(q.shape[:1] if chains else ())

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            # a tensor to be read number by number, which no recording can follow
            if msg["value"] is None and name in self._program.sequential:
                msg["value"] = list(range(fn.size))
            return
        if msg["is_observed"]:
            return
        site = self._program.sites.get(name)
        if site is None:
            if name not in self._program.enumerated and name not in self._program.observed:
                wanted = "the model must have the same sites at every run."
                fix = "sites that come and go with the values cannot be sampled by one chain of fixed dimension"
                fail(SettingError, WHERE, wanted, got=f"a new site {name!r}", fix=fix)
            return
        u = self._q[..., site.first : site.first + site.size].to(site.dtype)
        lead = ()
        if self._chains:
            lead = (self._q.shape[0], *[1] * (self._program.depth - len(site.batch)))
        u = u.reshape((*lead, *site.inner))
        transform = bijection(fn.support)
        msg["value"], msg["is_observed"] = transform(u), True
        log_jacobian = transform.log_abs_det_jacobian(u, msg["value"])
        log_jacobian = log_jacobian.reshape(lead[0], -1).sum(-1) if lead else log_jacobian.sum()
        self.log_jacobian = self.log_jacobian + log_jacobian


class _Centre(Messenger):
    """Hands each latent site the value at the middle of its unconstrained space, and writes down what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Site] = {}
        self.enumerated: list[str] = []
        self.observed: list[str] = []
        self._first = 0

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, _Subsample):
            indices = msg["value"]
            drawn = fn.size if indices is None else len(indices)
            if min(drawn, fn.subsample_size or drawn) < fn.size:
                wanted = f"plate {name!r} must run over all of its data."
                fix = "leave subsample_size out; bdl.SGLD and bdl.SGHMC train on minibatches"
                fail(SettingError, WHERE, wanted, got=f"{fn.subsample_size or drawn} of {fn.size}", fix=fix)
            return
        if msg["is_observed"]:
            if not _is_factor(msg) and not msg["infer"].get("_deterministic"):
                self.observed.append(name)
            return
        if getattr(fn.support, "is_discrete", False):
            msg["value"], msg["is_observed"] = self._first_of(name, fn), True
            return
        dtype, device = _kind(fn)
        try:
            transform = bijection(fn.support)
            inner = transform.inverse_shape(fn.shape())
            value = transform(torch.zeros(inner, dtype=dtype, device=device))
        except NotImplementedError:
            wanted = f"the support of site {name!r} must have a bijection from unconstrained numbers."
            fix = "build the value from sites of other supports, or register one with torch.distributions.biject_to"
            fail(SettingError, WHERE, wanted, got=f"{type(fn).__name__} on {fn.support}", fix=fix)
        site = Site(fn.batch_shape, value.shape, torch.Size(inner), dtype, device, self._first)
        self._first += site.size
        self.sites[name] = site
        msg["value"], msg["is_observed"] = value, True

    def _first_of(self, name: str, fn: Any) -> Tensor:
        if not fn.has_enumerate_support:
            wanted = f"discrete site {name!r} must have finitely many values that Pyro can enumerate."
            fix = "sum it out by hand, or replace it by a continuous approximation"
            fail(SettingError, WHERE, wanted, got=type(fn).__name__, fix=fix)
        self.enumerated.append(name)
        return fn.enumerate_support(expand=False)[0].expand(fn.shape()).clone()


class _Unobserve(Messenger):
    """Forgets the data, so that observed sites are drawn."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic") and not _is_factor(msg):
            msg["is_observed"], msg["value"] = False, None


def unchecked() -> contextlib.AbstractContextManager[None]:
    """Distributions do not check what they are given: a proposal lies in the support, and a check asks the device."""
    return pyro.validation_enabled(False)


@contextlib.contextmanager
def _unvalidated(fn: Any) -> Iterator[None]:
    """The same for distributions that were made earlier, and remember that they are to check."""
    parts, todo = [], [fn]
    while todo:
        part = todo.pop()
        parts.append((part, part.__dict__.get("_validate_args")))
        todo += [value for value in part.__dict__.values() if isinstance(value, torch.distributions.Distribution)]
    try:
        for part, _ in parts:
            part._validate_args = False
        yield
    finally:
        for part, before in parts:
            if before is None:
                part.__dict__.pop("_validate_args", None)
            else:
                part._validate_args = before


@contextlib.contextmanager
def _untouched_randomness() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in torch's global generators."""
    with torch.random.fork_rng():
        yield


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """What distributions draw inside follows from `seed`; torch's global generators are as they were afterwards.

    Distributions can draw from the global generators only.
    """
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        for generator in torch.cuda.default_generators if torch.cuda.is_initialized() else ():
            generator.manual_seed(seed)
        yield


def _kind(fn: Any) -> tuple[torch.dtype, torch.device]:
    """dtype and device of what a distribution draws."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = fn.sample()
    except NotImplementedError:  # an improper prior
        return torch.get_default_dtype(), torch.device("cpu")
    return drawn.dtype, drawn.device


def _is_factor(site: Any) -> bool:
    return isinstance(site["fn"], Unit)


def _counts(site: Any) -> bool:
    """Whether a node of a trace adds to the log density."""
    if site["type"] != "sample" or isinstance(site["fn"], _Subsample):
        return False
    return not site["infer"].get("_deterministic") and site["mask"] is not False


def _deterministic(trace: Any) -> list[str]:
    nodes = trace.nodes.items()
    return [name for name, site in nodes if site["type"] == "sample" and site["infer"].get("_deterministic")]


def _depth(trace: Any, *, plates_only: bool) -> int:
    """How many batch axes the sites have; where sites are enumerated, how many of plates."""
    sites = [site for site in trace.nodes.values() if _counts(site)]
    plates = [-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
    axes = [] if plates_only else [len(site["fn"].batch_shape) for site in sites]
    return max([0, *plates, *axes])
