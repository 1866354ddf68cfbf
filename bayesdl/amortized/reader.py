r"""A pretrained network asked by rows: R independent data sets at once, in its own units, in bounded memory.

Several readings of one data set may be averaged: a network that reads columns and labels by their position is asked
again with both permuted, and the predictive is the equal mixture of its answers,

    p(y | x, D) = (1 / P) sum_p q(pi_p(y) | rho_p(x), rho_p(D), pi_p(D)).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _random
from bayesdl.amortized.checkpoint import Pretrained, _architecture, _build
from bayesdl.amortized.heads import predictive
from bayesdl.amortized.hypotheses import Hypotheses, join
from bayesdl.amortized.network import MIXTURES, Cache
from bayesdl.distributions import BarDistribution, Categorical, GaussianMixture
from bayesdl.distributions._bars import Bars
from bayesdl.errors import SettingError, StorageError, fail

_CHUNK = 2**22  # numbers of the widest activation at once on a CPU: 32 MB in float64
_GPU_CHUNK = 2**26
_DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}


class Readings(NamedTuple):
    """P ways to read one data set: orders of its columns (P, d), and scores (P, C) whose order gives the labels."""

    columns: Tensor
    scores: Tensor

    @classmethod
    def draw(cls, num: int, d: int, num_classes: int, seed: int, device: torch.device) -> Readings:
        """The data as they are first, then random permutations."""
        g = _random.generator(seed)
        columns = [torch.arange(d)] + [torch.randperm(d, generator=g) for _ in range(num - 1)]
        scores = [torch.arange(num_classes)] + [torch.randperm(num_classes, generator=g) for _ in range(num - 1)]
        return cls(torch.stack(columns).to(device), torch.stack(scores).to(device))


class Context(NamedTuple):
    """What was read of R data sets: a cache of R P rows, and how columns and labels were read.

    Attributes:
        cache: Keys and values, or hypotheses, the P readings of a data set one after another.
        readings: Those.
        codes: (R, P, C) what each label was called, int64; None for regression.
        seen: (R, C) which labels occur; None for regression.
    """

    cache: Cache | Hypotheses
    readings: Readings
    codes: Tensor | None
    seen: Tensor | None

    @property
    def num_readings(self) -> int:
        """P."""
        return self.readings.columns.shape[0]

    @property
    def num_rows(self) -> int:
        """R."""
        return self.cache.like.shape[0] // self.num_readings

    def repeat(self, num: int) -> Context:
        """num R rows: all data sets, then all again. One row is not copied."""

        def wide(value: Tensor) -> Tensor:
            return value.unsqueeze(0).expand(num, *value.shape).reshape(num * value.shape[0], *value.shape[1:])

        return self._map(wide, self.cache.map(wide))

    def each(self, num: int) -> Context:
        """num R rows: the first data set so many times, then the second."""

        def wide(value: Tensor, group: int = 1) -> Tensor:
            return value.unflatten(0, (-1, group)).repeat_interleave(num, 0).flatten(0, 1)

        return self._map(wide, self.cache.map(lambda value: wide(value, self.num_readings)))

    def rows(self, part: slice) -> Context:
        """Some of the data sets."""
        if part == slice(0, self.num_rows):
            return self
        p = self.num_readings
        wide = slice(part.start * p, part.stop * p)
        return self._map(lambda value: value[part], self.cache.map(lambda value: value[wide]))

    def _map(self, function: Callable[[Tensor], Tensor], cache: Cache | Hypotheses) -> Context:
        codes, seen = (None if value is None else function(value) for value in (self.codes, self.seen))
        return self._replace(cache=cache, codes=codes, seen=seen)


class Reader:
    """A network, and how it is asked.

    Args:
        pretrained: The network.
        dtype: In which it computes.
        device: Where.
        conditions: The conditions beyond the noise token, which describe the prior; empty for zeros.

    With dtype bfloat16 products inside the network, and the keys and values that it keeps, are in bfloat16; its
    weights, the sums between its layers and all that is read from its answer are in float32.
    """

    def __init__(
        self, pretrained: Pretrained, dtype: torch.dtype, device: torch.device, conditions: tuple[float, ...] = ()
    ) -> None:
        self.pretrained, self.conditions = pretrained, conditions
        self._narrow = dtype == torch.bfloat16
        self.dtype = dtype = torch.float32 if self._narrow else dtype
        self.device = device
        cast = _cast(pretrained, dtype, device)
        self._network = cast.network
        self._bars = None if cast.borders is None else Bars(cast.borders.to(torch.float64))
        self._architecture = a = cast.network.architecture
        self._token = bool(self.card.get("noise_token")) and a.num_conditions > 0
        self._extra = a.num_conditions - 1 if a.num_conditions else 0

    @property
    def card(self) -> Any:
        """What the network says of itself."""
        return self.pretrained.card

    @property
    def max_inputs(self) -> int:
        """The largest number of columns."""
        return self._architecture.max_inputs

    @property
    def num_classes(self) -> int:
        """The largest number of classes; 0 for regression."""
        return self._architecture.outputs if self._architecture.head == "classes" else 0

    @property
    def knows_noise(self) -> bool:
        """Whether it can be asked for values without noise."""
        return self._token

    def readings(self, num: int, d: int, seed: int) -> Readings:
        """`num` ways to read data of d columns, the first as they are."""
        return Readings.draw(num, d, max(1, self.num_classes), seed, self.device)

    @torch.no_grad()
    def read(self, x: Tensor, y: Tensor, readings: Readings) -> Context:
        """Read x (R n d) and y (R n), of which labels are 0..C-1, in one order whatever the order of the points.

        Cost: O(R P L n (n w + w^2)) time, O(R P L n w) memory.
        """
        x, y = _in_order(x, y)
        codes, seen = self._code(y, readings) if self.num_classes else (None, None)
        parts = []
        for part in _split(x.shape[0], self._rows_at_once(x.shape[1], x.shape[1], readings.columns.shape[0])):
            inputs, targets = self._readings_of(x[part], y[part], readings, None if codes is None else codes[part])
            conditions = self._conditions(inputs.shape[0], False) if self._extra else None
            with self._products():
                parts.append(self._network.encode(inputs, targets, conditions))
        return Context(_join(parts), readings, codes, seen)

    @torch.no_grad()
    def append(self, context: Context, x: Tensor, y: Tensor, *, noiseless: bool = False) -> Context:
        """Add x (R t d) and y (R t) behind the contexts; see `Network.append`. Labels must have been seen."""
        inputs, targets = self._readings_of(x, y, context.readings, context.codes)
        with self._products():
            cache = self._network.append(context.cache, inputs, targets, noiseless=noiseless)
        return context._replace(cache=cache)

    def ask(self, context: Context, x: Tensor, *, noiseless: bool = False) -> Distribution:
        """The predictive at x (R s d), with batch shape (R, s); gradients in x.

        Cost: O(R P L s (n w + w^2)) time; a bounded part of it at once, beside the answer itself.
        """
        return self._law(self._map(context, x, noiseless, lambda parameters: parameters))

    def moments(self, context: Context, x: Tensor, *, noiseless: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation at x (R s d), each (R, s), in bounded memory."""

        def both(parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            law = self._law(parameters)
            return law.mean, law.variance.sqrt()

        mean, deviation = self._map(context, x, noiseless, both)
        return mean, deviation

    @torch.no_grad()
    def roll(self, context: Context, x: Tensor, u: Tensor, *, noiseless: bool = False) -> tuple[Context, Tensor]:
        """Draw y (R t) at x (R t d) one point after another, each seeing those before it; and what was read then.

        Args:
            u: Uniform numbers (R, t), float64, that make y.

        Cost: O(R P L t ((n + t) w + w^2)) time in 2 t calls of the network.
        """
        drawn = []
        for i in range(x.shape[1]):
            here = x[:, i : i + 1]
            law = self.ask(context, here, noiseless=noiseless)
            y = _quantile(law, u[:, i : i + 1]).to(x.dtype)
            context = self.append(context, here, y, noiseless=noiseless)
            drawn.append(y)
        return context, torch.cat(drawn, 1) if drawn else u.new_empty(u.shape)

    def hypotheses(self, context: Context) -> dict[str, Tensor] | None:
        """Hyper-parameters of the P M hypotheses of a head of kernels, (R, P M), lengthscales (R, P M, d); or None."""
        cache, p = context.cache, context.num_readings
        if not isinstance(cache, Hypotheses):
            return None
        # a lengthscale goes back to the column whose place it was read at
        back = context.readings.columns.argsort(-1)[:, None]
        lengthscale = cache.lengthscale.unflatten(0, (-1, p))
        lengthscale = lengthscale.gather(-1, back.expand(len(lengthscale), -1, lengthscale.shape[2], -1))
        found = {"lengthscale": lengthscale.flatten(1, 2)}
        others = {"outputscale": cache.outputscale, "noise_variance": cache.noise_variance}
        others["weight"] = cache.log_weight.exp() / p
        return found | {name: value.unflatten(0, (-1, p)).flatten(1, 2) for name, value in others.items()}

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON fields from which `from_parts` builds it again."""
        network = self.pretrained.network
        tensors = {f"network.{name}": weight for name, weight in network.state_dict().items()}
        if self.pretrained.borders is not None:
            tensors["network_borders"] = self.pretrained.borders
        record = {"architecture": dataclasses.asdict(network.architecture), "card": dict(self.card)}
        precision = "bfloat16" if self._narrow else str(self.dtype).removeprefix("torch.")
        return tensors, {**record, "conditions": list(self.conditions), "precision": precision}

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], record: dict[str, Any], device: torch.device) -> Reader:
        """Build it from what `parts` gave; nothing in the file is run.

        Raises:
            StorageError: The parts do not fit each other.
        """
        prefix, here = "network.", Path("the posterior")
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        network = _build(here, _architecture(here, record), weights)
        try:
            pretrained = Pretrained(network, tensors.get("network_borders"), record["card"])
        except SettingError as error:
            wanted = "the network in the file must fit its card."
            fail(StorageError, "bdl.load", wanted, got=str(error).splitlines()[0], fix="save the posterior again")
        dtype = _DTYPES.get(record["precision"], torch.float32)
        return cls(pretrained, dtype, device, tuple(record["conditions"]))

    def _code(self, y: Tensor, readings: Readings) -> tuple[Tensor, Tensor]:
        """Codes (R, P, C), a label's place among those seen in the order of the scores; and which are seen (R, C)."""
        labels = torch.arange(self.num_classes, device=y.device)
        seen = (y.unsqueeze(-1) == labels).any(-2)
        scores = readings.scores
        below = scores.unsqueeze(-2) < scores.unsqueeze(-1)  # (P, C, C'): whether C' comes before C
        return (seen[:, None, None, :] & below).sum(-1), seen

    def _readings_of(self, x: Tensor, y: Tensor, readings: Readings, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (R n d) and y (R n) as (R P n d) and (R P n)."""
        inputs = self._permuted(x, readings)
        if codes is None:
            return inputs, y.unsqueeze(1).expand(-1, readings.columns.shape[0], -1).flatten(0, 1)
        labels = y.long().unsqueeze(1).expand(-1, codes.shape[1], -1)
        return inputs, codes.gather(-1, labels).flatten(0, 1)

    @staticmethod
    def _permuted(x: Tensor, readings: Readings) -> Tensor:
        if readings.columns.shape[0] == 1:
            return x
        return x[..., readings.columns].permute(0, 2, 1, 3).flatten(0, 1)

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a call of the network: products in the narrow type, where it is wanted."""
        if self._narrow:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _conditions(self, rows: int, noiseless: bool) -> Tensor | None:
        if not self._architecture.num_conditions or not (noiseless or self.conditions):
            return None
        extra = self.conditions or (0.0,) * self._extra
        one = torch.tensor([float(noiseless), *extra], dtype=self.dtype, device=self.device)
        return one.expand(rows, -1)

    def _map(
        self, context: Context, x: Tensor, noiseless: bool, function: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """function(parameters of the predictive), block by block of rows and points."""
        p, total, known = context.num_readings, x.shape[0], context.cache.num_points
        blocks = []
        for part in _split(total, self._rows_at_once(1, known, p)):
            rows, points = context.rows(part), x[part]
            across = max(1, self._numbers() // (points.shape[0] * p * self._widest(known)))
            columns = []
            for some in points.split(across, 1) if points.shape[1] else [points]:
                inputs = self._permuted(some, context.readings)
                with self._products():
                    raw = self._network.query(rows.cache, inputs, self._conditions(inputs.shape[0], noiseless))
                raw = raw.to(self.dtype)
                columns.append(function(self._parameters(rows, raw.unflatten(0, (-1, p)))))
            blocks.append(tuple(torch.cat(c, 1) if len(c) > 1 else c[0] for c in zip(*columns, strict=True)))
        return tuple(torch.cat(b) if len(b) > 1 else b[0] for b in zip(*blocks, strict=True))

    def _parameters(self, context: Context, raw: Tensor) -> tuple[Tensor, ...]:
        """Raw outputs (R P s p) as the parameters of one law, each (R s ...), averaged over readings."""
        head, p = self._architecture.head, raw.shape[1]
        if head in MIXTURES:
            law = predictive(self._architecture, raw, None)
            parts = (law.loc, law.scale, law.weights / p)
            return tuple(t.movedim(1, -2).flatten(-2) for t in parts)
        if head == "classes":
            codes = context.codes.unsqueeze(-2).expand(*raw.shape[:-1], -1)
            raw = raw.gather(-1, codes).masked_fill(~context.seen[:, None, None], -math.inf)
        logits = torch.log_softmax(raw, -1)
        return ((logits[:, 0] if p == 1 else torch.logsumexp(logits, 1) - math.log(p)),)

    def _law(self, parameters: tuple[Tensor, ...]) -> Distribution:
        head = self._architecture.head
        if head == "bars":
            like = self._bars.borders
            return BarDistribution._of(parameters[0], self._bars, like.new_zeros(()), like.new_ones(()))
        if head in MIXTURES:
            return GaussianMixture._of(*parameters)
        return Categorical(logits=parameters[0], validate_args=False)

    def _widest(self, known: int) -> int:
        """Numbers that one token, or one query, takes up beside a context of `known` points."""
        a = self._architecture
        return max(3 * a.width, a.hidden, a.num_raw, 0 if a.kernel is None else a.outputs * known)

    def _rows_at_once(self, tokens: int, known: int, readings: int) -> int:
        return max(1, self._numbers() // (max(1, tokens) * readings * self._widest(known)))

    def _numbers(self) -> int:
        return _CHUNK if self.device.type == "cpu" else _GPU_CHUNK


def _in_order(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points by their first column, then the second, and so on; the same numbers come in whatever order they are told.

    To the network their order means nothing, but sums are rounded in it, and float32 factors of nearly singular
    matrices magnify that to a thousandth of a standard deviation.
    """
    order = y.argsort(dim=-1, stable=True)
    for column in reversed(x.unbind(-1)):
        order = order.gather(-1, column.gather(-1, order).argsort(dim=-1, stable=True))
    return x.gather(-2, order.unsqueeze(-1).expand_as(x)), y.gather(-1, order)


def _split(total: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, total)) for at in range(0, total, size))


def _join(parts: list[Cache | Hypotheses]) -> Cache | Hypotheses:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Hypotheses):
        return join(parts)
    return Cache(*(tuple(torch.cat(layer) for layer in zip(*kind, strict=True)) for kind in zip(*parts, strict=True)))


def _quantile(law: Distribution, u: Tensor) -> Tensor:
    """The quantile of each element at a level of its own."""
    if isinstance(law, BarDistribution):
        return law.icdf(u)
    if isinstance(law, Categorical):
        below = law.probs.to(u).cumsum(-1) < u.unsqueeze(-1)
        # rounding may leave the last sum below 1: then the last label that has mass
        last = (law.probs > 0).to(torch.int8).cumsum(-1).argmax(-1)
        return torch.minimum(below.sum(-1), last)
    # a mixture: one uniform number picks the component, and what it says beyond that picks the place within
    upto = law.weights.to(u).cumsum(-1)
    which = (upto < u.unsqueeze(-1)).sum(-1, keepdim=True).clamp_max(upto.shape[-1] - 1)
    weight = law.weights.to(u).gather(-1, which)
    within = ((u.unsqueeze(-1) - (upto.gather(-1, which) - weight)) / weight).clamp(2.0**-54, 1 - 2.0**-53)
    place = law.loc.gather(-1, which) + law.scale.gather(-1, which) * torch.special.ndtri(within)
    return place.squeeze(-1)


@functools.lru_cache(maxsize=8)
def _cast(pretrained: Pretrained, dtype: torch.dtype, device: torch.device) -> Pretrained:
    """The network where and how it is needed, kept for the next fit."""
    return pretrained.to(device, dtype)
