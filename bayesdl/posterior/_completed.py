r"""Data sets that were completed L times over by drawing from a predictive rule, and what the rule says at their ends.

For a Gaussian process the rule at all N steps of a rollout is one Gaussian. With the border of the old factor,
S = L^{-1} K_xn and M M' = K_nn + s I - S' S, the values y_new = mean(x_new) + M z with z ~ N(0, I) are those that
drawing one value after another would give, since M is triangular, and the rollout's mean function is

    mean(x) + B(x)' z,    B(x) = M^{-1} (k(x_new, x) - S' L^{-1} k(X, x)),    var(x) = var_n(x) - B(x)' B(x)

M depends on where the rollout went and not on what it saw: rollouts through the same inputs share it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import ops
from bayesdl.data import TrainingData, Units
from bayesdl.distributions import Bernoulli, Categorical, Normal
from bayesdl.posterior.base import Posterior
from bayesdl.posterior.closed_form import GPPosterior

_CHUNK = 2**25  # numbers of one block of cross-covariances: 256 MB in float64


def mean_of(predictive: Distribution) -> Tensor:
    """The mean; class probabilities (..., classes), or the probability of class 1, where y is a label."""
    return predictive.probs if isinstance(predictive, (Bernoulli, Categorical)) else predictive.mean


class CompletedPosterior:
    """Any posterior whose training data have a leading axis of rollouts, (L, *b, n + N, d)."""

    kind = "posterior"

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def predict(self, x: Tensor, *, noise: bool) -> Distribution:
        """At x (..., 1, *b, s, d), the batch (..., L, *b, s[, k])."""
        return self.posterior.predict(x, noise=noise)

    def mean(self, x: Tensor) -> Tensor:
        """E[y] at x (..., 1, *b, s, d) for each rollout: (..., L, *b, s[, k]), class probabilities for labels."""
        return mean_of(self.posterior.predict(x))

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and a JSON record."""
        return pack(self.posterior)

    @classmethod
    def from_parts(cls, rule: Posterior, record: dict[str, Any], tensors: dict[str, Tensor]) -> CompletedPosterior:
        """What `parts` described; the model is that of `rule`."""
        return cls(unpack(rule.model, record, tensors))


class Along(NamedTuple):
    """A GP's predictive of y at probes (*b P d) after each of the first N steps of every rollout.

    Attributes:
        mean: (L, *b, N, P, k), in the user's units.
        deviation: (R, *b, N, P, k), noise included; R is 1 where all rollouts share their inputs.
        latent: (R, *b, N, P, k) variances of f.
    """

    mean: Tensor
    deviation: Tensor
    latent: Tensor


class CompletedGP:
    """L completions of the data of a Gaussian process at its own hyper-parameters; the old factor is not copied.

    Args:
        gp: The posterior before.
        x: (R, *b, N, d) where the rollouts go, in the user's units; R is L, or 1 where they all go the same way.
        z: (L, 1…, k, N) standard normal numbers, one for each new value; ones for *b, as data sets share them.

    Cost: O(n^2 N + n N^2 + N^3) for each of the R inputs, output and data set, and O(n N + N^2) memory; values and
    means add O(N^2) for each rollout.
    """

    kind = "gp"

    def __init__(self, gp: GPPosterior, x: Tensor, z: Tensor) -> None:
        self._gp, self._x, self._z = gp, x, z
        state = gp._state
        k_xn, self._inner = gp._cross(x)
        known = (k_xn.mT @ state.alpha.unsqueeze(-1)).squeeze(-1)
        k_nn = gp._model.kernel(self._inner, params=gp._kernel_values())
        self._border = ops.fantasize(state, k_xn, k_nn, known)
        corner = self._border.corner
        self._z = z.expand(z.shape[0], *corner.shape[1:-1])  # (L, *b, k, N)
        self._values = known + _along_rollouts(corner, self._z)
        # (K + s I)^{-1} (y - m) of the completed data, in its old and its new part
        self._new_weights = _along_rollouts(corner.mT, self._z, solve=True)
        change = _along_rollouts(self._border.cross, self._new_weights)
        change = torch.linalg.solve_triangular(state.chol.mT, change.movedim(0, -1), upper=True)
        self._old_weights = state.alpha.unsqueeze(-1) - change  # (*b, k, n, L)

    @property
    def finite(self) -> bool:
        """Whether all factors exist."""
        return bool(torch.isfinite(self._values).all() and torch.isfinite(self._new_weights).all())

    def targets(self) -> Tensor:
        """The drawn values (L, *b, N, k) in the user's units and dtype."""
        values = self._values + self._gp._prior_mean(self._inner)
        return self._gp._units.outward(values.movedim(-2, -1)).to(self._gp._data.y.dtype)

    def predict(self, x: Tensor, *, noise: bool) -> Normal:
        """At x (..., 1, *b, s, d), the batch (..., L, *b, s[, k])."""
        flat, back = self._flat(x)
        parts = [self._moments(part, noise) for part in self._split(flat)]
        mean = torch.cat([part[0] for part in parts], -2)
        scale = torch.cat([part[1] for part in parts], -2)
        return Normal(back(mean), back(scale.expand_as(mean)), validate_args=False)

    def mean(self, x: Tensor) -> Tensor:
        """E[f] at x (..., 1, *b, s, d) for each rollout, (..., L, *b, s[, k]); the variance is not computed."""
        flat, back = self._flat(x)
        return back(torch.cat([self._outward_mean(*self._gp._cross(part)) for part in self._split(flat)], -2))

    def along(self, probes: Tensor) -> Along:
        """The rule at probes (*b, P, d) after every step; O(n N P + N^2 P) for each of the R inputs."""
        gp, state = self._gp, self._gp._state
        k_xs, inner = gp._cross(probes)
        start, variance = ops.marginal_moments(state, k_xs, gp._model.kernel.diagonal(inner, gp._kernel_values()))
        border = self._border_at(k_xs, inner)  # (R, *b, k, N, P)
        prior = gp._prior_mean(inner)
        mean = (start + prior).unsqueeze(-2) + (self._z.unsqueeze(-1) * border).cumsum(-2)
        latent = (variance.unsqueeze(-2) - border.square().cumsum(-2)).clamp_min(0.0)
        deviation = (latent + gp._values["noise_variance"][..., None, None]).sqrt()
        y_loc, y_scale = (t.unsqueeze(-3) for t in (gp._units.y_loc, gp._units.y_scale))  # (*b, 1, 1, k)
        mean, deviation, latent = (t.movedim(-3, -1) for t in (mean, deviation, latent))
        return Along(mean * y_scale + y_loc, deviation * y_scale, latent * y_scale.square())

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Where the rollouts went and the numbers that they drew: the rest follows from the rule."""
        first = self._z[:, *[slice(0, 1)] * len(self._gp._data.batch_shape)]
        return {"x": self._x, "z": first}, {}

    @classmethod
    def from_parts(cls, rule: Posterior, record: dict[str, Any], tensors: dict[str, Tensor]) -> CompletedGP:
        """What `parts` described."""
        return cls(rule, tensors["x"], tensors["z"])  # type: ignore[arg-type]

    def _moments(self, x: Tensor, noise: bool) -> tuple[Tensor, Tensor]:
        """Mean (L, *b, s, k) and standard deviation (R, *b, s, k) at x (*b, s, d), in the user's units."""
        gp = self._gp
        k_xs, inner = gp._cross(x)
        prior_variance = gp._model.kernel.diagonal(inner, gp._kernel_values())
        _, variance = ops.marginal_moments(gp._state, k_xs, prior_variance)
        variance = variance - self._border_at(k_xs, inner).square().sum(-2)
        variance = torch.maximum(variance, torch.finfo(variance.dtype).eps * prior_variance)
        if noise:
            variance = variance + gp._values["noise_variance"].unsqueeze(-1)
        return self._outward_mean(k_xs, inner), gp._units.outward_scale(variance.sqrt().movedim(-2, -1))

    def _outward_mean(self, k_xs: Tensor, inner: Tensor) -> Tensor:
        """(L, *b, s, k), from k_xs (*b, k, n, s)."""
        gp = self._gp
        old = (k_xs.mT @ self._old_weights).movedim(-1, 0)
        k_ns = gp._model.kernel(self._inner, inner, params=gp._kernel_values())
        mean = old + _along_rollouts(k_ns.mT, self._new_weights) + gp._prior_mean(inner)
        return gp._units.outward(mean.movedim(-2, -1))

    def _border_at(self, k_xs: Tensor, inner: Tensor) -> Tensor:
        """B(x), (R, *b, k, N, s)."""
        gp = self._gp
        half = ops.gaussian.solve_lower(gp._state.chol, k_xs)
        k_ns = gp._model.kernel(self._inner, inner, params=gp._kernel_values())
        return torch.linalg.solve_triangular(self._border.corner, k_ns - self._border.cross.mT @ half, upper=False)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (*b, s, d) in blocks of points whose covariances with all rollouts fit a bound."""
        each = self._border.corner.shape[:-1].numel() + self._gp._state.chol.shape[:-1].numel()
        return x.split(max(1, _CHUNK // each), -2)

    def _flat(self, x: Tensor) -> tuple[Tensor, Any]:
        """x (..., 1, *b, s, d) as (*b, S, d), and the way back for values (L, *b, S, k)."""
        gp = self._gp
        batch, d = tuple(gp._data.batch_shape), x.shape[-1]
        nb, s = len(batch), x.shape[-2]
        # all axes in front of those of the data count as points: they share the factors
        lead = x.shape[: x.ndim - 3 - nb]
        x = x.squeeze(x.ndim - 3 - nb).expand(*lead, *batch, s, d)
        flat = x.reshape(math.prod(lead), *batch, s, d).movedim(0, -3).reshape(*batch, -1, d)

        def back(values: Tensor) -> Tensor:
            each = values.unflatten(1 + nb, (math.prod(lead), s)).movedim(1 + nb, 0)
            return gp._squeeze(each.unflatten(0, lead) if lead else each.squeeze(0))

        return flat, back


def _along_rollouts(matrix: Tensor, vectors: Tensor, *, solve: bool = False) -> Tensor:
    """matrix @ v, or its inverse @ v, for (R, *b, p, q) and vectors (L, *b, q), where R is L or 1.

    Where rollouts share the matrix they become columns, and it is not copied. To be solved with it must be upper
    triangular.
    """
    shared = matrix.shape[0] == 1
    columns = vectors.movedim(0, -1) if shared else vectors.unsqueeze(-1)
    left = matrix.squeeze(0) if shared else matrix
    out = torch.linalg.solve_triangular(left, columns, upper=True) if solve else left @ columns
    return out.movedim(-1, 0) if shared else out.squeeze(-1)


Completed = CompletedGP | CompletedPosterior
KINDS: dict[str, type[Completed]] = {kind.kind: kind for kind in (CompletedGP, CompletedPosterior)}


def pack(posterior: Posterior) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A posterior without its model, as tensors and a JSON record inside those of another one."""
    tensors, extra = posterior._parts()
    data, units = posterior._data, posterior._units
    shared = {"data.x": data.x, "data.y": data.y, **{f"units.{k}": v for k, v in units._asdict().items()}}
    if posterior.log_evidence is not None:
        shared["log_evidence"] = posterior.log_evidence
    plain = {"form": posterior.form, "has_outputs": data.has_outputs, "diagnostics": dict(posterior.diagnostics)}
    return {**shared, **tensors}, {**plain, **extra}


def unpack(model: Any, record: dict[str, Any], tensors: dict[str, Tensor]) -> Posterior:
    """What `pack` described."""
    units = Units(*(tensors[f"units.{name}"] for name in Units._fields))
    data = TrainingData(tensors["data.x"], tensors["data.y"], bool(record["has_outputs"]))
    shared = {"model": model, "data": data, "units": units, "diagnostics": record["diagnostics"]}
    shared["log_evidence"] = tensors.get("log_evidence")
    return _forms()[record["form"]]._from_parts(shared, record, tensors)


def _forms() -> dict[str, type[Posterior]]:
    found, todo = {}, [Posterior]
    while todo:
        for kind in todo.pop().__subclasses__():
            todo.append(kind)
            if hasattr(kind, "form"):
                found[kind.form] = kind
    return found


def prefixed(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with `name.` in front of their names."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def part(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `prefixed` named, under their own names."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
