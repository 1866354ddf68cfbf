r"""A Gaussian process whose hyper-parameters are not fixed: draws of them, each with an exact posterior of its own.

    p(f | y) = sum_s w_s p(f | y, theta_s),    theta_s ~ p(theta | y),    w_s = 1 / S

With more data (x', y') the draws stay and their weights follow by importance sampling, w_s ~ w_s p(y' | y, theta_s),
which is exact as S grows; the effective number of draws, 1 / sum_s w_s^2, says when to fit again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl._random import Seed, child_seeds, generator
from bayesdl.data import TrainingData, Units, training_data
from bayesdl.distributions import GaussianMixture
from bayesdl.errors import ConvergenceWarning, NumericalError, NumericalWarning, ShapeError, fail
from bayesdl.posterior.base import Functions, Posterior
from bayesdl.posterior.closed_form import _root

_CHUNK = 2**27  # bytes of cross-covariances, or of covariances of the test points, worked on at once
_FEW = 0.1  # the share of effective draws below which conditioning asks for a new fit


@final
class GPMixturePosterior(Posterior):
    """A mixture over S draws of the hyper-parameters. Internally float64, with axes (*b, k, S, …).

    Every output has draws of its own, which are independent between outputs.

    Cost: O(S n^3) time once and O(S n^2) memory; predicting s points takes O(S n^2 s) time, a bounded number of draws
    at a time; joint draws add O(S s^3); each function costs O(n^2) once and O((n + num_features) d) for each point.
    """

    form: ClassVar[str] = "gp_mixture"
    model_kind: ClassVar[str] = "GP"

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None = None,
        *,
        draws: Tensor,
        stats: dict[str, Tensor],
        theta: Tensor,
        log_weight: Tensor,
        state: ops.GPState,
    ) -> None:
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._draws, self._stats, self._theta, self._log_weight = draws, stats, theta, log_weight
        self._layout = model.layout(data.x.shape[-1])
        self._values, self._constant = self._layout.unpack(theta)
        self._state = state

    @classmethod
    def mix(
        cls,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        *,
        draws: Tensor,
        stats: dict[str, Tensor],
        num: int,
    ) -> GPMixturePosterior:
        """Condition on the data at up to `num` draws, evenly spread over draws (*b, k, C, N, D) of theta."""
        flat = draws.flatten(-3, -2)
        total = flat.shape[-2]
        places = torch.linspace(0, total - 1, min(num, total), dtype=torch.float64, device=flat.device).round().long()
        theta = flat.index_select(-2, places)
        state = _condition(model, data, units, theta)
        log_weight = theta.new_full(theta.shape[:-1], -math.log(theta.shape[-2]))
        diagnostics = {**diagnostics, "num_predictive": theta.shape[-2], "jitter": float(state.jitter.max())}
        return cls(
            model, data, units, diagnostics, draws=draws, stats=stats, theta=theta, log_weight=log_weight, state=state
        )

    @property
    def draws(self) -> Tensor:
        """All draws of the unconstrained hyper-parameters theta, in standardised units, (*b, [k,] chains, draws, D)."""
        return (self._draws if self._data.has_outputs else self._draws.squeeze(-4)).clone()

    @property
    def weights(self) -> Tensor:
        """Weights of the draws that predictions mix, (*b, [k,] S)."""
        weights = self._log_weight.exp()
        return weights if self._data.has_outputs else weights.squeeze(-2)

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """All draws by name, each (chains, draws, *b, [k,] …), in the user's units where a unit is known.

        "noise_variance", "mean" and every outputscale are in units of y, a lengthscale for each column in those of its
        column; all others are as the kernel sees them, in standardised units. A name is the shortest that says which.
        """
        return self._named(self._draws)

    def predict(self, x: Any, *, noise: bool = True) -> GaussianMixture:
        """Gaussian mixture of y (or of f with noise=False) at each x; see `Posterior.predict`."""
        x = self._inputs("predict", x)
        head, d = x.shape[:-1], x.shape[-1]
        if not self._data.batch_shape:
            x = x.reshape(-1, d)  # one data set: all points share its factors
        inner = self._inner(x)
        parts = [self._moments(part, inner, noise) for part in self._parts_of_draws(inner.shape[-2])]
        loc, scale = (torch.cat(values, -2).movedim(-1, -3) for values in zip(*parts, strict=True))  # (..., s, k, S)
        units = self._units
        loc = loc * units.y_scale.unsqueeze(-1) + units.y_loc.unsqueeze(-1)
        scale, weight = scale * units.y_scale.unsqueeze(-1), self._log_weight.exp().unsqueeze(-3).expand_as(loc)
        loc, scale, weight = (t.to(self._data.x.dtype) for t in (loc, scale, weight))
        if not self._data.batch_shape:
            loc, scale, weight = (t.reshape(*head, *t.shape[-2:]) for t in (loc, scale, weight))
        if not self._data.has_outputs:
            loc, scale, weight = loc.squeeze(-2), scale.squeeze(-2), weight.squeeze(-2)
        return GaussianMixture(loc, scale, weight, validate_args=False)

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Joint draws of f, each at one draw of the hyper-parameters; see `Posterior.sample`."""
        first, second = child_seeds(seed, 2)
        inner = self._inner(self._inputs("sample", x))
        num, device = torch.Size(sample_shape).numel(), inner.device
        chosen = self._choose(num, first)
        k, s = self._theta.shape[-3], inner.shape[-2]
        lead = torch.broadcast_shapes(inner.shape[:-4], self._theta.shape[:-3])
        z = torch.randn(num, *lead, k, s, generator=generator(second, device), dtype=torch.float64, device=device)
        paths = torch.zeros_like(z)
        chosen = chosen.reshape(num, *[1] * (len(lead) + 2 - chosen.ndim), *chosen.shape[1:]).expand(num, *lead, k)
        for part in self._parts_of_draws(s):
            mean, root = self._joint(part, inner)
            for place, draw in enumerate(range(part.start, part.stop)):
                rows = (chosen == draw).flatten(1).any(1).nonzero().squeeze(-1)
                if len(rows):
                    path = mean[..., place, :] + (root[..., place, :, :] @ z[rows].unsqueeze(-1)).squeeze(-1)
                    mine = (chosen[rows] == draw).unsqueeze(-1)
                    paths = paths.index_copy(0, rows, torch.where(mine, path, paths[rows]))
        values = self._squeeze(self._units.outward(paths.movedim(-2, -1)))
        return values.reshape(*sample_shape, *values.shape[1:])

    def functions(self, num: int, *, seed: Seed = 0, num_features: int = 1024) -> Functions:
        """Pathwise draws, each at one draw of the hyper-parameters; see `Posterior.functions`.

        `num_features` random features make up each prior function. Memory: num n^2 numbers while they are drawn.
        """
        first, second = child_seeds(seed, 2)
        device, state = self._data.x.device, self._state
        g = generator(second, device)
        chosen = self._choose(num, first)  # (num, *b, k)
        values, constant = self._layout.unpack(_at(self._theta, chosen))
        kernel_values = self._model.kernel_values(values)
        prior = self._model.kernel.sample_functions(self._data.x.shape[-1], 1, num_features, kernel_values, g)
        noise = torch.randn(*chosen.shape, state.x.shape[-2], generator=g, dtype=torch.float64, device=device)
        data_x = state.x.squeeze(-3)  # (*b, 1, n, d)
        gap = _at(state.residual, chosen) - prior(data_x)[0] - noise * values["noise_variance"].sqrt().unsqueeze(-1)
        weights = torch.cholesky_solve(gap.unsqueeze(-1), _at(state.chol, chosen))  # (num, *b, k, n, 1)

        def draw(x: Any) -> Tensor:
            inner = self._units.inward_x(self._inputs("functions", x), torch.float64)
            own = len(self._data.batch_shape)
            extra, s = inner.shape[: inner.ndim - 2 - own], inner.shape[-2]
            # further batch axes become points, since the parameters have an axis of functions where those would be
            points = inner.flatten(0, len(extra) - 1) if extra else inner.unsqueeze(0)
            points = points.movedim(0, -3).flatten(-3, -2).unsqueeze(-3)  # (*b, 1, e s, d)
            k_xs = self._model.kernel(data_x, points, params=kernel_values)
            mean = self._model.mean_at(points, values, constant)
            found = prior(points)[0] + (k_xs.mT @ weights).squeeze(-1) + mean
            found = found.unflatten(-1, (-1, s)).movedim(-2, 1)  # (num, e, *b, k, s)
            found = found.reshape(num, *extra, *found.shape[2:])
            return self._squeeze(self._units.outward(found.movedim(-2, -1)))

        return draw

    def condition_on(self, x: Any, y: Any) -> GPMixturePosterior:
        """The posterior after (x, y) too: every draw conditioned exactly, and weighted by p(y | training data, theta).

        Args:
            x: More inputs (*b, q, d).
            y: Their targets, (*b, q) or (*b, q, k) as in training.

        Warns:
            ConvergenceWarning: Fewer than a tenth of the draws count still (`diagnostics["weight_ess"]`): fit again.

        Cost: O(S n^2 q).
        """
        new = _matching("GPMixturePosterior.condition_on", training_data("condition_on", x, y), self._data)
        old, state = self._data, self._state
        inner = self._inner(new.x)
        k_xn, k_nn = self._kernel(slice(None), state.x, inner), self._kernel(slice(None), inner)
        residual = self._residual(new, inner)
        after = ops.append(state, k_xn, k_nn, inner, residual)
        gain = ops.log_marginal(after) - ops.log_marginal(state)
        log_weight = (self._log_weight + gain).log_softmax(-1)
        ess = 1 / log_weight.exp().square().sum(-1)
        total = log_weight.shape[-1]
        if float(ess.min()) < _FEW * total:
            message = (
                f"condition_on: {float(ess.min()):.1f} of {total} draws of the hyper-parameters carry the weight; "
                "fit again to all data, or raise num_predictive"
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        data = TrainingData(torch.cat([old.x, new.x], -2), torch.cat([old.y, new.y], -2), old.has_outputs)
        diagnostics = {
            **self._diagnostics,
            "num_data": data.x.shape[-2],
            "jitter": float(after.jitter.max()),
            "weight_ess": ess.tolist() if ess.numel() > 1 else float(ess),
        }
        return GPMixturePosterior(
            self._model,
            data,
            self._units,
            diagnostics,
            draws=self._draws,
            stats=self._stats,
            theta=self._theta,
            log_weight=log_weight,
            state=after,
        )

    def _inner(self, x: Tensor) -> Tensor:
        """x in the model's units with axes for outputs and draws, (..., 1, 1, s, d)."""
        return self._units.inward_x(x, torch.float64).unsqueeze(-3).unsqueeze(-3)

    def _parts_of_draws(self, s: int) -> list[slice]:
        """Which draws to work on at once for s test points."""
        total, heads = self._theta.shape[-2], self._theta.shape[:-2].numel()
        each = 8 * heads * max(1, s) * (self._state.x.shape[-2] + s)
        step = max(1, _CHUNK // each)
        return [slice(start, min(start + step, total)) for start in range(0, total, step)]

    def _values_of(self, part: slice) -> tuple[dict[str, Tensor], Tensor]:
        axis = self._theta.ndim - 2
        index = (slice(None),) * axis + (part,)
        return {name: value[index] for name, value in self._values.items()}, self._constant[index]

    def _state_of(self, part: slice) -> ops.GPState:
        state, index = self._state, (slice(None),) * (self._theta.ndim - 2) + (part,)
        return ops.GPState(state.x, *(value[index] for value in state[1:]))

    def _kernel(self, part: slice, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self._model.kernel(x, z, self._model.kernel_values(self._values_of(part)[0]))

    def _moments(self, part: slice, inner: Tensor, noise: bool) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (..., k, S', s) at inner (..., 1, 1, s, d), in the model's units."""
        values, constant = self._values_of(part)
        state, kernel_values = self._state_of(part), self._model.kernel_values(values)
        k_xs = self._model.kernel(state.x, inner, params=kernel_values)
        prior_variance = self._model.kernel.diagonal(inner, kernel_values)
        mean, variance = ops.marginal_moments(state, k_xs, prior_variance)
        variance = variance.clamp_min(torch.finfo(variance.dtype).eps * prior_variance)  # what cancellation leaves
        if noise:
            variance = variance + values["noise_variance"].unsqueeze(-1)
        return mean + self._model.mean_at(inner, values, constant), variance.sqrt()

    def _joint(self, part: slice, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., k, S', s) and a root of the covariance (..., k, S', s, s) of f."""
        values, constant = self._values_of(part)
        state = self._state_of(part)
        k_xs, k_ss = self._kernel(part, state.x, inner), self._kernel(part, inner)
        mean, covariance = ops.joint_moments(state, k_xs, k_ss)
        return mean + self._model.mean_at(inner, values, constant), _root(covariance)

    def _choose(self, num: int, seed: int) -> Tensor:
        """Draws for `num` paths, (num, *b, k): systematic resampling, in random order.

        Each draw comes up as often as its weight says, up to one; with equal weights none twice while there are enough.
        """
        lead, g = self._log_weight.shape[:-1], generator(seed)
        cumulative = self._log_weight.exp().cumsum(-1).reshape(-1, self._log_weight.shape[-1]).cpu()
        columns = []
        for row in cumulative:
            offset = torch.rand((), generator=g, dtype=row.dtype)
            levels = (torch.arange(num, dtype=row.dtype) + offset) / max(1, num)
            found = torch.searchsorted(row / row[-1], levels).clamp_max(len(row) - 1)
            columns.append(found[torch.randperm(num, generator=g)])
        return torch.stack(columns, -1).reshape(num, *lead).to(self._theta.device)

    def _residual(self, data: TrainingData, inner: Tensor) -> Tensor:
        return _residual(self._model, data, self._units, inner, self._values, self._constant)

    def _named(self, draws: Tensor) -> dict[str, Tensor]:
        """Values by short name (C, N, *b, [k,] …) of draws (*b, k, C, N, D)."""
        values, constant = self._layout.unpack(draws)
        if self._layout.has_mean:
            values = {**values, "mean": constant}
        short = _short_names(list(values))
        d, shapes = self._data.x.shape[-1], {p.name: p.shape for p in self._layout.parameters}
        per_draw = self._units.y_scale.squeeze(-2)[..., None, None]  # (*b, k, 1, 1)
        axis, found = draws.ndim - 4, {}
        for name, value in values.items():
            last = name.rpartition(".")[-1]
            if name == "mean":
                value = value * per_draw + self._units.y_loc.squeeze(-2)[..., None, None]
            elif last in ("noise_variance", "outputscale"):
                value = value * per_draw.square()
            elif last == "lengthscale" and shapes[name] == (d,) and _on_all_columns(self._model.kernel):
                value = value * self._units.x_scale.squeeze(-2)[..., None, None, None, :]
            value = value if self._data.has_outputs else value.squeeze(axis)
            first = axis + self._data.has_outputs
            found[short[name]] = value.movedim((first, first + 1), (0, 1))
        return found

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        stats = {f"stats.{name}": value for name, value in self._stats.items()}
        return {"draws": self._draws, "theta": self._theta, "log_weight": self._log_weight, **stats}, {}

    @classmethod
    def _from_parts(
        cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]
    ) -> GPMixturePosterior:
        # the factors, S n^2 numbers, are computed again from what is in the file
        state = _condition(shared["model"], shared["data"], shared["units"], tensors["theta"])
        stats = {name.removeprefix("stats."): v for name, v in tensors.items() if name.startswith("stats.")}
        own = {name: tensors[name] for name in ("draws", "theta", "log_weight")}
        return cls(**shared, **own, stats=stats, state=state)

    def _arviz_groups(self) -> dict[str, Any]:
        """At all draws, or at draws resampled by their weights after conditioning on more data."""
        conditioned = "weight_ess" in self._diagnostics
        draws = self._draws
        if conditioned:
            draws = _at(self._theta, self._choose(1000, 0)).movedim(0, -2).unsqueeze(-3)
        f, noise = self._latent_draws(draws)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        log_likelihood = torch.distributions.Normal(f, noise).log_prob(y)
        groups = {
            "posterior": {**self._named(draws), "f": f},
            "observed_data": {"y": y},
            "log_likelihood": {"y": log_likelihood},
        }
        if self._stats and not conditioned:
            groups["sample_stats"] = self._stats
        return groups

    def _latent_draws(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """f at the training inputs and the scale of the noise at each of draws (*b, k, C, N, D): (C, N, *b, n[, k])."""
        chains, num = draws.shape[-3:-1]
        g = torch.Generator(draws.device).manual_seed(0)
        n, parts = self._data.x.shape[-2], []
        for theta in draws.flatten(-3, -2).split(max(1, _CHUNK // (8 * n * n * draws.shape[:-3].numel())), -2):
            values, constant = self._layout.unpack(theta)
            state = _condition(self._model, self._data, self._units, theta)
            noise = values["noise_variance"].unsqueeze(-1)
            # K - K A^{-1} K = s I - s^2 A^{-1} and m + K alpha = y - s alpha, for A = K + s I
            inverse = torch.cholesky_inverse(state.chol)
            root = _root(torch.diag_embed(noise.expand(state.residual.shape)) - noise.unsqueeze(-1).square() * inverse)
            z = torch.randn(state.residual.shape, generator=g, dtype=torch.float64, device=draws.device)
            mean = state.residual + self._model.mean_at(state.x, values, constant) - noise * state.alpha
            f = mean + (root @ z.unsqueeze(-1)).squeeze(-1)
            parts.append(torch.stack([f, noise.sqrt().expand(f.shape)]))
        both = torch.cat(parts, -2).movedim((-2, -1, -3), (1, -2, -1))  # (2, S, *b, n, k)
        f, scale = both
        values = self._squeeze(self._units.outward(f)), self._squeeze(self._units.outward_scale(scale))
        return tuple(value.unflatten(0, (chains, num)) for value in values)


def _condition(model: Any, data: TrainingData, units: Units, theta: Tensor) -> ops.GPState:
    """The factors at theta (*b, k, S, D)."""
    layout = model.layout(data.x.shape[-1])
    values, constant = layout.unpack(theta)
    inner = units.inward_x(data.x, torch.float64).unsqueeze(-3).unsqueeze(-3)
    k_xx = model.kernel(inner, params=model.kernel_values(values))
    residual = _residual(model, data, units, inner, values, constant)
    state = ops.condition(k_xx, inner, residual, values["noise_variance"])
    if not bool(torch.isfinite(state.alpha).all()):
        wanted = "the kernel matrix must be positive definite at every draw of the hyper-parameters."
        fix = "raise Gaussian(lower=...), the least noise variance"
        fail(NumericalError, "GPMixturePosterior", wanted, got="a failed factorisation", fix=fix)
    if float(state.jitter.max()) > 0:
        message = f"GPMixturePosterior: a kernel matrix needed jitter {float(state.jitter.max()):.1e} to factorise"
        warnings.warn(message, NumericalWarning, stacklevel=4)
    return state


def _residual(
    model: Any, data: TrainingData, units: Units, inner: Tensor, values: dict[str, Tensor], constant: Tensor
) -> Tensor:
    """Targets minus the prior mean at each draw, (*b, k, S, n)."""
    y = units.inward_y(data.y, torch.float64).movedim(-1, -2).unsqueeze(-2)
    return y - model.mean_at(inner, values, constant)


def _at(value: Tensor, chosen: Tensor) -> Tensor:
    """`value` (*b, k, S, *e) at the draws chosen (num, *b, k): (num, *b, k, *e)."""
    heads, num = chosen.ndim - 1, chosen.shape[0]
    flat = value.flatten(0, heads - 1)  # (B, S, *e)
    rows = torch.arange(flat.shape[0], device=value.device)
    return flat[rows, chosen.reshape(num, -1)].reshape(*chosen.shape, *value.shape[heads + 1 :])


def _matching(where: str, new: TrainingData, old: TrainingData) -> TrainingData:
    """More data, in the dtype of the old, if of the same batch axes, columns and outputs."""
    agree = new.batch_shape == old.batch_shape and new.has_outputs == old.has_outputs
    if not agree or new.x.shape[-1] != old.x.shape[-1] or new.y.shape[-1] != old.y.shape[-1]:
        got = f"x {tuple(new.x.shape)}, y {tuple(new.y.shape)}"
        wanted = f"x and y must be like the training data, {tuple(old.x.shape)} and {tuple(old.y.shape)}."
        fail(ShapeError, where, wanted, got=got, fix="pass the same batch axes, columns and outputs")
    return TrainingData(new.x.to(old.x), new.y.to(old.y), old.has_outputs)


def _short_names(names: list[str]) -> dict[str, str]:
    """The last part of each name where no other ends in it, else the name without "kernel."."""
    last = [name.rpartition(".")[-1] for name in names]
    return {n: e if last.count(e) == 1 else n.removeprefix("kernel.") for n, e in zip(names, last, strict=True)}


def _on_all_columns(kernel: Any) -> bool:
    """Whether no part of a kernel looks at some of the columns only."""
    fields = vars(kernel).values() if hasattr(kernel, "__dict__") else ()
    parts = [part for value in fields for part in (value if isinstance(value, tuple) else (value,))]
    nested = [part for part in parts if hasattr(part, "value_and_pullback")]
    return getattr(kernel, "active_dims", None) is None and all(_on_all_columns(part) for part in nested)
