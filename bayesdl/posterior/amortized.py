r"""The posterior of a prior-data fitted network: the data as context, and one forward pass for every question.

    predict(x) = q(y | x, D)                                      a marginal at each x
    sample:  f_1 ~ q(f | x_1, D), f_2 ~ q(f | x_2, D, f_1), ...   a joint draw, point after point

A network gives marginals. Joint draws come from it one point at a time, each value going back into the context as one
that is free of noise; the context itself is read once, and each draw visits the points in a random order of its own.

Reference: Mueller, Hollmann, Pineda Arango, Grabocka, Hutter (2022), arXiv 2112.10510.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _doors
from bayesdl._random import Seed, child_seeds, generator
from bayesdl.data import TrainingData, Units, class_labels, training_data
from bayesdl.distributions import BarDistribution, Categorical, Empirical, GaussianMixture
from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.posterior._learned_functions import anchors_of, residual_of
from bayesdl.posterior._learned_range import check_context, check_queries, units_for
from bayesdl.posterior._rows import Rows
from bayesdl.posterior.base import Functions, Posterior, member_indices

_JOINT = 64  # points that a joint draw visits one after another; more are drawn through anchors
_ROLLOUTS = 64  # ways to go on that stand for a classifier's belief about its logits
_KEPT = 2**26  # numbers of keys and values that draws hold at once


class Reader(Protocol):
    """A network that reads rows of data sets; `bayesdl.amortized.reader.Reader` is one."""

    card: Any
    num_classes: int
    knows_noise: bool
    dtype: torch.dtype


class Settings(NamedTuple):
    """How a network is used.

    Attributes:
        standardize: Whether the units of the data are taken out, where the network wants that.
        num_permutations: Readings of the data that are averaged.
        seed: Of the permutations, and of a classifier's rollouts.
        update: "exact", new data is read together with the old; or "append", behind it.
        num_classes: C of a classification; None for the largest label plus one.
    """

    standardize: bool
    num_permutations: int
    seed: int
    update: str
    num_classes: int | None


@final
class AmortizedPosterior(Posterior):
    """What a pretrained network predicts, given the data as its context.

    Whether it is the posterior of anything depends on the data being like draws from the prior that the network was
    trained on; `diagnostics["inside_range"]` says whether sizes and inputs are within what it has seen.

    Cost: predicting s points takes O(s (n w + w^2)) time for width w, a bounded part of it at once; a joint draw of s
    points takes 2 s calls of the network, in which all draws take part.
    """

    form: ClassVar[str] = "amortized"
    model_kind: ClassVar[str] = "Learned"

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None = None,
        *,
        reader: Any,
        settings: Settings,
        context: Any,
        num_read: int,
    ) -> None:
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._reader, self._settings, self._context, self._num_read = reader, settings, context, num_read

    @classmethod
    def read(
        cls, model: Any, data: TrainingData, reader: Any, settings: Settings, diagnostics: Mapping[str, Any]
    ) -> AmortizedPosterior:
        """Read the data.

        Raises:
            ShapeError, DataError: The data are far outside what the network was trained on.
        """
        if reader.num_classes:
            model = _with_classes(model, data, settings.num_classes, reader.num_classes)
        units = units_for(data, reader.card, standardize=settings.standardize)
        n, d = data.x.shape[-2:]
        inside = check_context("PFN.fit", reader.card, reader.max_inputs, units.inward_x(data.x, torch.float64))
        context = _read(data, units, reader, settings, n)
        diagnostics = {**diagnostics, "num_data": n, "num_inputs": d, "inside_range": inside}
        return cls(model, data, units, diagnostics, reader=reader, settings=settings, context=context, num_read=n)

    @property
    def max_points(self) -> int:
        """The largest number of points that the network was trained to read."""
        return int(self._reader.card["ranges"]["n"][1])

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """What a network with a head of kernels holds possible: M hypotheses, in the user's units.

        "lengthscale" (*b, [k,] M, d) for each column in its unit, "outputscale" and "noise_variance" (*b, [k,] M) in
        squared units of y, and their "weight" (*b, [k,] M), which adds up to 1.

        Raises:
            SettingError: The network has a head of another kind, which thinks of no hyper-parameters.
        """
        found = self._reader.hypotheses(self._context)
        if found is None:
            got, fix = f"{self._model.name!r}, whose head is of another kind", 'PFN.from_pretrained("gp")'
            fail(SettingError, "hyperparameters", "the network must have a head of kernels.", got=got, fix=fix)
        data, units = self._data, self._units
        shape = (*data.batch_shape, data.y.shape[-1])
        value = {name: part.to(torch.float64).reshape(*shape, *part.shape[1:]) for name, part in found.items()}
        value["lengthscale"] = value["lengthscale"] * units.x_scale.unsqueeze(-2)
        for name in ("outputscale", "noise_variance"):
            value[name] = value[name] * units.y_scale.mT.square()
        outputs = len(shape) - 1
        return {name: (v if data.has_outputs else v.squeeze(outputs)).to(data.x.dtype) for name, v in value.items()}

    def predict(self, x: Any, *, noise: bool = True) -> Distribution:
        """Bars or a mixture of Gaussians for y (for f with noise=False), or class probabilities.

        With noise=False a classifier gives draws of log probabilities, an `Empirical` distribution: see `functions`.

        Raises:
            SettingError: noise=False, of a network that was trained on noisy values only.

        Warns:
            NumericalWarning: x lies outside the range in which the network was trained.
        """
        x = self._inputs("predict", x)
        if self._classifies:
            if not noise:
                members = self._evaluate(self._rollouts, _ROLLOUTS, x)
                return Empirical(members.movedim(0, -1))
            rows = Rows.of(x, self._data.batch_shape, 1)
            law = self._reader.ask(self._context, self._inward(x, rows))
            logits = rows.marginal(law.logits).squeeze(-2)[..., : self._num_classes]
            return Categorical(logits=logits.to(self._data.x.dtype), validate_args=False)
        return self._regression(x, noise=noise, outputs=self._data.has_outputs)

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Joint draws of f, each through the points in a random order of its own; see `Posterior.sample`.

        More than 64 points are drawn as `functions` are. A classifier's draws are members, as `functions` has them.

        Raises:
            SettingError: The network was trained on noisy values only.
        """
        x = self._inputs("sample", x)
        num, s = torch.Size(sample_shape).numel(), x.shape[-2]
        if self._classifies or s > _JOINT:
            values = self.functions(num, seed=seed)(x)
            return values.reshape(*sample_shape, *values.shape[1:])
        self._needs_noiseless("sample")
        rows = Rows.of(x, self._data.batch_shape, self._data.y.shape[-1])
        inner = rows.together(self._inward_x(x))  # (R, s, d)
        g = generator(seed, inner.device)
        shape = (num, inner.shape[0], s)
        order = torch.rand(shape, generator=g, dtype=torch.float64, device=inner.device).argsort(-1)
        u = torch.rand(shape, generator=g, dtype=torch.float64, device=inner.device).clamp_min(2.0**-54)
        step, drawn = self._draws_at_once(inner.shape[0], s), []
        context = rows.spread(self._context)
        for at in range(0, num, step):
            some, level = order[at : at + step], u[at : at + step]
            visited = inner.expand(len(some), *inner.shape).gather(
                -2, some[..., None].expand(*some.shape, inner.shape[-1])
            )
            _, y = self._reader.roll(
                context.repeat(len(some)), visited.flatten(0, 1), level.flatten(0, 1), noiseless=True
            )
            drawn.append(y.unflatten(0, some.shape[:2]).gather(-1, some.argsort(-1)))
        values = torch.cat(drawn) if drawn else inner.new_empty(shape)
        values = self._squeeze(self._units_outward(rows.joint(values.movedim(0, -1)).movedim(-1, 0)))
        return values.reshape(*sample_shape, *values.shape[1:])

    def functions(self, num: int, *, seed: Seed = 0, num_anchors: int = 32) -> Functions:
        r"""`num` functions: values at anchors are drawn jointly, and between them

            g(x) = m(x) + s(x) z(x),    z a smooth random function of unit variance,

        with m and s the network's mean and standard deviation of f given data and anchors. So g(x) has the mean and the
        variance of a draw at x that comes after the anchors, and one draw is one function, differentiable in x. What is
        not the network's is how far two points between the same anchors go together: that is z's, whose lengthscale is
        the distance between anchors. Half of the anchors are data inputs (no more than there are) and the others fill
        the space, differently for each function.

        Of a classifier: log class probabilities, after labels were drawn at the anchors and appended. They differ as
        far as those labels could still change the network's mind; `bdl.Martingale` goes on for longer. There are 64
        such ways to go on, the same ones whenever they are asked for.

        Cost: 2 num_anchors calls of the network, then one for each evaluation; memory O(num n w).
        """
        if self._classifies:
            chosen = member_indices(_ROLLOUTS, num, seed).to(self._data.x.device)

            def labels(x: Any) -> Tensor:
                return self._evaluate(self._rollouts, _ROLLOUTS, self._inputs("functions", x)).index_select(0, chosen)

            return labels
        self._needs_noiseless("functions")
        if num == 0:
            return lambda x: self._evaluate(None, 0, self._inputs("functions", x))
        anchor_seed, residual_seed = child_seeds(seed, 2)
        context, spacing = self._after_anchors(num, num_anchors, anchor_seed, noiseless=True)
        like, d = context.cache.like, self._data.x.shape[-1]
        residual = residual_of(num, self._context.num_rows, d, spacing, residual_seed, like)

        def draw(x: Any) -> Tensor:
            return self._evaluate(context, num, self._inputs("functions", x), residual)

        return draw

    def condition_on(self, x: Any, y: Any) -> AmortizedPosterior:
        """The posterior after (x, y) too.

        With update="exact", what fitting to all data gives: everything is read again, in the units of all data. With
        update="append", the new points are read behind the old ones, which costs O(n) for each and keeps the units.

        Args:
            x: More inputs (*b, q, d).
            y: Their targets, (*b, q) or (*b, q, k) as in training.
        """
        new = self._more("AmortizedPosterior.condition_on", x, y)
        old = self._data
        data = TrainingData(torch.cat([old.x, new.x], -2), torch.cat([old.y, new.y], -2), old.has_outputs)
        keys = ("num_data", "num_inputs", "inside_range")
        diagnostics = {name: value for name, value in self._diagnostics.items() if name not in keys}
        if self._settings.update == "exact" or not self._may_append(new):
            return self.read(self._model, data, self._reader, self._settings, diagnostics)
        inner = self._units.inward_x(data.x, torch.float64)
        inside = check_context("PFN.condition_on", self._reader.card, self._reader.max_inputs, inner)
        rows = Rows.of(new.x, old.batch_shape, old.y.shape[-1])
        inputs = self._inward(new.x, rows)
        targets = self._units.inward_y(new.y, self._reader.dtype).movedim(-1, -2).reshape(-1, new.y.shape[-2])
        context = self._reader.append(self._context, inputs, targets)
        diagnostics |= {"num_data": data.x.shape[-2], "num_inputs": data.x.shape[-1], "inside_range": inside}
        return self._with(data, self._units, diagnostics, context)

    def copies(self, num: int) -> AmortizedPosterior:
        """The posterior of data (num, *b, n, d): the same `num` times, each of which may then see data of its own."""

        def wide(value: Tensor) -> Tensor:
            return value.expand(num, *value.shape)

        data = TrainingData(wide(self._data.x), wide(self._data.y), self._data.has_outputs)
        return self._with(data, Units(*map(wide, self._units)), self._diagnostics, self._context.repeat(num))

    def timed(self, seconds: float) -> AmortizedPosterior:
        """The same, with `seconds` in its diagnostics."""
        return self._with(self._data, self._units, {**self._diagnostics, "seconds": seconds}, self._context)

    def _with(
        self, data: TrainingData, units: Units, diagnostics: Mapping[str, Any], context: Any
    ) -> AmortizedPosterior:
        return AmortizedPosterior(
            self._model,
            data,
            units,
            diagnostics,
            reader=self._reader,
            settings=self._settings,
            context=context,
            num_read=self._num_read,
        )

    @property
    def _classifies(self) -> bool:
        return self._reader.num_classes > 0

    @property
    def _num_classes(self) -> int:
        return self._model.likelihood.num_classes

    def _needs_noiseless(self, what: str) -> None:
        if not self._reader.knows_noise:
            wanted = f"{what} needs a network that knows the function apart from its noise."
            got = f"{self._model.name!r}, trained on noisy values only"
            fix = "predict(x) for y; pretrain with num_conditions=1 for f"
            fail(SettingError, "AmortizedPosterior", wanted, got=got, fix=fix)

    def _more(self, where: str, x: Any, y: Any) -> TrainingData:
        new, old = training_data(where, x, y), self._data
        agree = new.batch_shape == old.batch_shape and new.has_outputs == old.has_outputs
        if not agree or new.x.shape[-1] != old.x.shape[-1] or new.y.shape[-1] != old.y.shape[-1]:
            got = f"x {tuple(new.x.shape)}, y {tuple(new.y.shape)}"
            wanted = f"x and y must be like the training data, {tuple(old.x.shape)} and {tuple(old.y.shape)}."
            fail(ShapeError, where, wanted, got=got, fix="pass the same batch axes, columns and outputs")
        return TrainingData(new.x.to(old.x), new.y.to(old.y), old.has_outputs)

    def _may_append(self, new: TrainingData) -> bool:
        """Labels that were not seen before change what all others are called."""
        if not self._classifies:
            return True
        seen = self._context.seen.reshape(*self._data.batch_shape, 1, -1)
        known = seen.expand(*new.y.shape[:-1], -1).gather(-1, new.y.long().clamp(0, self._reader.num_classes - 1))
        return bool(known.all())

    def _inward_x(self, x: Tensor) -> Tensor:
        inner = self._units.inward_x(x, torch.float64)
        check_queries(f"{type(self).__name__}", self._reader.card, inner)
        return inner.to(self._reader.dtype)

    def _inward(self, x: Tensor, rows: Rows) -> Tensor:
        """x as the network has it, (B k, E s, d)."""
        return rows.apart(self._inward_x(x))

    def _units_outward(self, value: Tensor) -> Tensor:
        return value if self._classifies else self._units.outward(value)

    def _regression(self, x: Tensor, *, noise: bool, outputs: bool) -> Distribution:
        """The predictive over (*L, s, k), or over (*L, s) without `outputs`, in the user's units and dtype."""
        if not noise:
            self._needs_noiseless("predict(noise=False)")
        dtype, rows = self._data.x.dtype, Rows.of(x, self._data.batch_shape, self._data.y.shape[-1])
        law = self._reader.ask(self._context, self._inward(x, rows), noiseless=not noise)

        def shaped(value: Tensor) -> Tensor:
            value = rows.marginal(value)
            return value if outputs else value.squeeze(-2)

        loc, scale = (t if outputs else t.squeeze(-1) for t in (self._units.y_loc, self._units.y_scale))
        if isinstance(law, BarDistribution):
            shared = BarDistribution._of(shaped(law.logits).to(dtype), law._bars, law._loc, law._scale)
            return shared.affine(loc, scale)
        loc, scale = loc.unsqueeze(-1), scale.unsqueeze(-1)
        centre, spread = shaped(law.loc).to(torch.float64) * scale + loc, shaped(law.scale).to(torch.float64) * scale
        return GaussianMixture._of(centre.to(dtype), spread.to(dtype), shaped(law.weights).to(dtype))

    def _evaluate(self, context: Any, num: int, x: Tensor, residual: Any = None) -> Tensor:
        """Functions with contexts of num R rows at x: (num, *L, s[, k]), or log probabilities (num, *L, s, C)."""
        rows = Rows.of(x, self._data.batch_shape, self._data.y.shape[-1])
        inner = self._inward(x, rows)  # (R, E s, d)
        wide = inner.expand(num, *inner.shape)
        if num == 0:
            return self._squeeze(rows.marginal(inner.new_empty(*inner.shape[:2], 0)).movedim(-1, 0))
        if residual is None:
            log_p = self._reader.ask(context, wide.flatten(0, 1)).logits[..., : self._num_classes]
            log_p = log_p.clamp_min(math.log(torch.finfo(log_p.dtype).tiny))
            log_p = log_p.unflatten(0, (num, -1)).movedim(0, -1)
            return rows.marginal(log_p).squeeze(-3).movedim(-1, 0).to(self._data.x.dtype)
        mean, deviation = self._reader.moments(context, wide.flatten(0, 1), noiseless=True)
        values = (mean + deviation * residual(wide).flatten(0, 1)).unflatten(0, (num, -1))
        values = rows.marginal(values.movedim(0, -1)).movedim(-1, 0)
        return self._squeeze(self._units_outward(values))

    def _after_anchors(self, num: int, num_anchors: int, seed: int, *, noiseless: bool) -> tuple[Any, Tensor]:
        """Contexts of num R rows that have drawn values at anchors, and the distance between anchors."""
        order_seed, level_seed = child_seeds(seed, 2)
        inner = self._units.inward_x(self._data.x, torch.float64)
        anchors, spacing = anchors_of(inner, self._reader.card["ranges"]["x"], num, num_anchors, order_seed)
        k = self._data.y.shape[-1]
        anchors = anchors.unsqueeze(-3).expand(*anchors.shape[:-2], k, *anchors.shape[-2:])  # (num, *b, k, a, d)
        anchors = anchors.reshape(num * self._context.num_rows, *anchors.shape[-2:]).to(self._reader.dtype)
        g = generator(level_seed, inner.device)
        u = torch.rand(anchors.shape[:-1], generator=g, dtype=torch.float64, device=inner.device).clamp_min(2.0**-54)
        return self._reader.roll(self._context.repeat(num), anchors, u, noiseless=noiseless)[0], spacing

    @functools.cached_property
    def _rollouts(self) -> Any:
        """A classifier's ways to go on."""
        return self._after_anchors(_ROLLOUTS, 32, self._settings.seed, noiseless=False)[0]

    def _draws_at_once(self, rows: int, s: int) -> int:
        kept = self._context.cache.numbers_after(s)
        return max(1, _KEPT // (rows * self._context.num_readings * kept))

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, record = self._reader.parts()
        return tensors, {**record, "settings": self._settings._asdict(), "num_read": self._num_read}

    @classmethod
    def _from_parts(
        cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]
    ) -> AmortizedPosterior:
        reader = _doors.amortized_reader(tensors, record, shared["data"].x.device)
        settings, num_read = Settings(**record["settings"]), int(record["num_read"])
        context = _read(shared["data"], shared["units"], reader, settings, num_read)
        return cls(**shared, reader=reader, settings=settings, context=context, num_read=num_read)

    def _arviz_groups(self) -> dict[str, Any]:
        f = self.functions(200, seed=0)(self._data.x).unsqueeze(0)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        again = self.predict(self._data.x).sample((200,), seed=0)
        groups = {"posterior": {"f": f}, "observed_data": {"y": y}, "constant_data": {"x": self._data.x}}
        return groups | {"posterior_predictive": {"y": again.unsqueeze(0)}}


def _with_classes(model: Any, data: TrainingData, num_classes: int | None, most: int) -> Any:
    """The model with its number of classes, once the labels are known to be labels."""
    if data.y.shape[-1] != 1:
        got = f"y with {data.y.shape[-1]} columns"
        fail(ShapeError, "PFN.fit", "a classification takes one target column.", got=got, fix="one label a row")
    class_labels("PFN.fit", data.y, num_classes or most)
    found = num_classes or max(2, int(data.y.max()) + 1)
    return dataclasses.replace(model, likelihood=dataclasses.replace(model.likelihood, num_classes=found))


def _read(data: TrainingData, units: Units, reader: Any, settings: Settings, num_read: int) -> Any:
    """The data as a context of B k rows: the first `num_read` points read together, the others behind them."""
    k, (n, d) = data.y.shape[-1], data.x.shape[-2:]
    x = units.inward_x(data.x, reader.dtype).unsqueeze(-3).expand(*data.batch_shape, k, n, d).reshape(-1, n, d)
    y = units.inward_y(data.y, reader.dtype).movedim(-1, -2).reshape(-1, n)
    readings = reader.readings(settings.num_permutations, d, settings.seed)
    context = reader.read(x[:, :num_read], y[:, :num_read], readings)
    return reader.append(context, x[:, num_read:], y[:, num_read:]) if num_read < n else context
