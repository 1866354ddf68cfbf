r"""The posterior of a Gaussian process that was seen through values and slopes, in closed form.

    o = (f(X), df(X)/dx_j, ...) + e,    A = Cov[o],    alpha = A^{-1} (o - m)
    mean(x) = m(x) + Cov[f(x), o] alpha,        cov(x, x') = k(x, x') - Cov[f(x), o] A^{-1} Cov[o, f(x')]

and the same for the slopes of f, with Cov[df(x)/dx_j, o] in place of Cov[f(x), o]. Functions are drawn pathwise
(Wilson et al. 2020, arXiv 2002.09309), their slopes at the data by `torch.func.jvp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl._random import Seed, generator
from bayesdl.data import TrainingData, Units, training_data
from bayesdl.distributions import Normal
from bayesdl.errors import DataError, ShapeError, fail
from bayesdl.kernels.derivatives import Observed, derivatives
from bayesdl.posterior.base import Functions, Posterior
from bayesdl.posterior.closed_form import _root, evidence_in_units
from bayesdl.posterior.function_gradients import function_gradients

_CHUNK = 512  # inputs times columns of which the slopes' prior covariances are formed at once


@final
class GradientGPPosterior(Posterior):
    """Exact GP posterior from values and slopes, at fixed hyper-parameters; float64 inside, an axis for outputs.

    Cost: with N values and slopes, predicting s points takes O(N^2 s) time and O(N s) memory for each batch element and
    output, predicting their slopes d times that; joint draws add O(s^3).
    """

    form: ClassVar[str] = "gradient_gp"
    model_kind: ClassVar[str] = "GP"

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None = None,
        *,
        values: dict[str, Tensor],
        constant: Tensor,
        state: ops.GPState,
        places: Tensor,
    ) -> None:
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._values = values
        self._constant = constant
        self._state = state
        self._places = places

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """Values by name in standardised units, as `GPPosterior` has them; "gradient_noise_variance" where slopes were
        seen."""
        values = {**self._values, "mean": self._constant}
        axis = len(self._data.batch_shape)
        return {name: (v if self._data.has_outputs else v.squeeze(axis)).clone() for name, v in values.items()}

    def predict(self, x: Any, *, noise: bool = True) -> Normal:
        """Normal distribution of y (or of f with noise=False) at each x; see `Posterior.predict`."""
        x = self._inputs("predict", x)
        inner = self._inner(x)
        k_xs = self._seen.with_values(self._model.kernel, inner, self._kernel_values())
        prior = self._model.kernel.diagonal(inner, self._kernel_values())
        mean, variance = ops.marginal_moments(self._state, k_xs, prior)
        variance = variance.clamp_min(torch.finfo(variance.dtype).eps * prior)  # what cancellation leaves
        if noise:
            variance = variance + self._values["noise_variance"].unsqueeze(-1)
        mean = self._units.outward((mean + self._constant.unsqueeze(-1)).movedim(-2, -1))
        scale = self._units.outward_scale(variance.sqrt().movedim(-2, -1))
        return Normal(self._squeeze(mean), self._squeeze(scale), validate_args=False)

    def predict_gradient(self, x: Any, *, noise: bool = False) -> Normal:
        """Normal distribution of each slope df(x)/dx_j, (..., s, d), or (..., s, k, d) for k outputs; marginal.

        Args:
            x: Inputs (..., s, d).
            noise: Whether to add the noise of observed slopes; only where slopes were observed.

        Raises:
            DataError: noise=True, and no slope was observed.
        """
        x = self._inputs("predict_gradient", x)
        inner = self._inner(x)
        parts = [self._slopes(part) for part in inner.split(max(1, _CHUNK // x.shape[-1]), -2)]
        mean, variance = (torch.cat(side, -2) for side in zip(*parts, strict=True))  # (..., k, s, d)
        if noise:
            if "gradient_noise_variance" not in self._values:
                wanted, fix = "noise of slopes is learned from slopes.", "noise=False, or fit with gradients=..."
                fail(DataError, "GradientGPPosterior.predict_gradient", wanted, got="no observed slope", fix=fix)
            variance = variance + self._values["gradient_noise_variance"][..., None, None]
        scale = self._units.y_scale.mT.unsqueeze(-1) / self._units.x_scale.unsqueeze(-3)  # (*b, k, 1, d)
        mean, deviation = mean * scale, variance.sqrt() * scale
        shaped = [t.movedim(-3, -2).to(self._data.x.dtype) for t in (mean, deviation)]
        if not self._data.has_outputs:
            shaped = [t.squeeze(-2) for t in shaped]
        return Normal(*shaped, validate_args=False)

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Exact joint draws of f; see `Posterior.sample`. Cost: O(N^2 s + s^3)."""
        mean, covariance, _ = self._joint(self._inputs("sample", x))
        factor = _root(covariance)
        shape = (*sample_shape, *mean.shape, 1)
        z = torch.randn(shape, generator=generator(seed, mean.device), dtype=mean.dtype, device=mean.device)
        draws = (mean + (factor @ z).squeeze(-1)).movedim(-2, -1)
        return self._squeeze(self._units.outward(draws))

    def functions(self, num: int, *, seed: Seed = 0, num_features: int = 1024) -> Functions:
        """Pathwise draws; see `Posterior.functions`. `num_features` random features make up each prior function."""
        g = generator(seed, self._data.x.device)
        params = self._kernel_values()
        prior = self._model.kernel.sample_functions(self._data.x.shape[-1], num, num_features, params, g)
        state, seen = self._state, self._seen
        like = state.residual
        noise = torch.randn((num, *like.shape), generator=g, dtype=like.dtype, device=like.device)
        noise = noise * self._noise(seen).sqrt()
        with torch.no_grad():
            own = prior(state.x).unsqueeze(-1)
            slopes = torch.zeros_like(own) if bool(seen.is_value.all()) else function_gradients(prior, state.x)
            width = 1 + state.x.shape[-1]
            both = torch.cat([own, slopes.expand(*own.shape[:-1], width - 1)], -1)
        weights = torch.cholesky_solve((like - seen.pick(both) - noise).unsqueeze(-1), state.chol)

        def draw(x: Any) -> Tensor:
            inner = self._inner(self._inputs("functions", x))
            k_xs = seen.with_values(self._model.kernel, inner, params)
            extra = k_xs.ndim - state.chol.ndim
            update = k_xs.mT @ weights.reshape(num, *[1] * extra, *weights.shape[1:])
            values = prior(inner) + update.squeeze(-1) + self._constant.unsqueeze(-1)
            return self._squeeze(self._units.outward(values.movedim(-2, -1)))

        return draw

    def condition_on(self, x: Any, y: Any, gradients: Any = None) -> GradientGPPosterior:
        """The exact posterior after (x, y) and slopes too, at the same hyper-parameters.

        Args:
            x: More inputs (*b, q, d).
            y: Their targets, (*b, q) or (*b, q, k) as in training.
            gradients: Their slopes as for `GradientGP.fit`, or None for none.

        Raises:
            ShapeError: x, y and gradients are not like the training data.
            DataError: Slopes come to a posterior that was fitted without any, so that their noise is not known.

        Cost: O(N^2 q d) in place of O((N + q d)^3).
        """
        where, old = "GradientGPPosterior.condition_on", self._data
        new = training_data(where, x, y)
        agree = (new.batch_shape, new.x.shape[-1], new.y.shape[-1], new.has_outputs)
        if agree != (old.batch_shape, old.x.shape[-1], old.y.shape[-1], old.has_outputs):
            got = f"x {tuple(new.x.shape)}, y {tuple(new.y.shape)}"
            wanted = f"x and y must be like the training data, {tuple(old.x.shape)} and {tuple(old.y.shape)}."
            fail(ShapeError, where, wanted, got=got, fix="pass the same batch axes, columns and outputs")
        new = TrainingData(new.x.to(old.x), new.y.to(old.y), old.has_outputs)
        inner, quantities, slopes = inner_quantities(where, new, gradients, self._units)
        if bool(slopes.any()) and "gradient_noise_variance" not in self._values:
            fix = "fit bdl.GradientGP with gradients=... first"
            fail(DataError, where, "the noise of slopes must be known.", got="a fit without slopes", fix=fix)
        extra = Observed.of(inner, slopes)
        residual = extra.pick(quantities) - self._constant.unsqueeze(-1) * extra.is_value
        params = self._kernel_values()
        k_xn = self._seen.covariance(self._model.kernel, params, extra)
        k_nn = extra.covariance(self._model.kernel, params) + torch.diag_embed(self._noise(extra))
        state = ops.append(self._state, k_xn, k_nn, inner, residual)
        places = torch.cat([self._places, extra.places + old.x.shape[-2] * (1 + old.x.shape[-1])])
        data = TrainingData(torch.cat([old.x, new.x], -2), torch.cat([old.y, new.y], -2), old.has_outputs)
        total = gradient_evidence_in_units(ops.log_marginal(state), self._units, Observed(state.x, places))
        diagnostics = {**self._diagnostics, "num_data": data.x.shape[-2], "jitter": float(state.jitter.max())}
        diagnostics["num_slopes"] = len(places) - data.x.shape[-2]
        own = {"values": self._values, "constant": self._constant}
        return GradientGPPosterior(
            self._model, data, self._units, diagnostics, total, **own, state=state, places=places
        )

    @property
    def _seen(self) -> Observed:
        return Observed(self._state.x, self._places)

    def _kernel_values(self) -> dict[str, Tensor]:
        return self._model.kernel_values(self._values)

    def _noise(self, seen: Observed) -> Tensor:
        return noise_of(seen, self._values)

    def _inner(self, x: Tensor) -> Tensor:
        """x in the model's units with an axis for outputs, (..., 1, s, d)."""
        return self._units.inward_x(x, torch.float64).unsqueeze(-3)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (..., k, s), covariance and prior covariance (..., k, s, s) of f at x, in the model's units."""
        inner = self._inner(x)
        k_xs = self._seen.with_values(self._model.kernel, inner, self._kernel_values())
        k_ss = self._model.kernel(inner, params=self._kernel_values())
        mean, covariance = ops.joint_moments(self._state, k_xs, k_ss)
        return mean + self._constant.unsqueeze(-1), covariance, k_ss

    def _slopes(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each slope at inner (..., 1, s, d): (..., k, s, d) in the model's units."""
        params = self._kernel_values()
        cross = self._seen.with_slopes(self._model.kernel, inner, params)
        own = derivatives(self._model.kernel, inner, inner, params).by_both
        prior = own.diagonal(dim1=-4, dim2=-3).diagonal(dim1=-3, dim2=-2)  # (..., k, s, d)
        mean, variance = ops.marginal_moments(self._state, cross.flatten(-2), prior.flatten(-2))
        mean, variance = (t.unflatten(-1, cross.shape[-2:]) for t in (mean, variance))
        return mean, variance.clamp_min(torch.finfo(variance.dtype).eps * prior)

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values = {f"value.{name}": v for name, v in self._values.items()}
        state = {f"state.{name}": v for name, v in self._state._asdict().items()}
        return {**values, **state, "constant": self._constant, "places": self._places}, {}

    @classmethod
    def _from_parts(
        cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]
    ) -> GradientGPPosterior:
        values = {name.removeprefix("value."): v for name, v in tensors.items() if name.startswith("value.")}
        state = ops.GPState.from_tensors(tensors, "state.")
        return cls(**shared, values=values, constant=tensors["constant"], state=state, places=tensors["places"])

    def _arviz_groups(self) -> dict[str, Any]:
        draws = self.sample(self._data.x, (1, 1000), seed=0)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        noise = self._values["noise_variance"].sqrt() * self._units.y_scale.squeeze(-2)
        log_likelihood = torch.distributions.Normal(draws, self._squeeze(noise.unsqueeze(-2)).to(draws)).log_prob(y)
        return {"posterior": {"f": draws}, "observed_data": {"y": y}, "log_likelihood": {"y": log_likelihood}}


def inner_quantities(where: str, data: TrainingData, gradients: Any, units: Units) -> tuple[Tensor, Tensor, Tensor]:
    """Data in the model's units: inputs (*b, 1, n, d), values and slopes (*b, k, n, 1+d), and which slopes are seen.

    Args:
        where: The caller, for messages.
        data: x and y.
        gradients: (*b, n, d), or (*b, n, k, d) where y has an axis for outputs; NaN where not observed; None for none.
        units: dv/du = dy/dx x_scale / y_scale.

    Raises:
        ShapeError: `gradients` has another shape.
        DataError: An infinity, or slopes that are seen in one data set or output and missing in another.
    """
    inner_x = units.inward_x(data.x, torch.float64).unsqueeze(-3)
    values = units.inward_y(data.y, torch.float64).mT.unsqueeze(-1)  # (*b, k, n, 1)
    n, d = data.x.shape[-2:]
    if gradients is None:
        empty = values.new_zeros(()).expand(*values.shape[:-1], d)
        return inner_x, torch.cat([values, empty], -1), torch.zeros(n, d, dtype=torch.bool, device=values.device)
    slopes = _checks.as_tensor(where, "gradients", gradients).detach().to(data.x)
    shape = (*data.x.shape[:-1], data.y.shape[-1], d) if data.has_outputs else tuple(data.x.shape)
    if tuple(slopes.shape) != shape:
        fix = "one slope for each value of y and column of x; NaN where it was not observed"
        fail(ShapeError, where, f"gradients must have shape {shape}.", got=_checks.describe(slopes), fix=fix)
    if bool(slopes.isinf().any()):
        fix = "NaN marks what was not observed"
        fail(DataError, where, "gradients must be finite or NaN.", got="an infinity", fix=fix)
    slopes = slopes if data.has_outputs else slopes.unsqueeze(-2)
    slopes = slopes.to(torch.float64) * units.x_scale.unsqueeze(-2) / units.y_scale.unsqueeze(-1)
    slopes = slopes.movedim(-2, -3)  # (*b, k, n, d)
    seen = ~slopes.isnan()
    first = seen.reshape(-1, n, d)[0]
    if not bool((seen == first).all()):
        wanted = "the same slopes must be seen in every data set and output."
        fix = "fit data sets and outputs of different patterns one at a time"
        fail(DataError, where, wanted, got="NaN at different places", fix=fix)
    return inner_x, torch.cat([values, slopes.nan_to_num(nan=0.0)], -1), first


def noise_of(seen: Observed, values: Mapping[str, Tensor]) -> Tensor:
    """Variance of the noise of each quantity, (*b N)."""
    own = values["noise_variance"].unsqueeze(-1)
    if "gradient_noise_variance" not in values:
        return own.expand(*own.shape[:-1], len(seen.places))
    return torch.where(seen.is_value, own, values["gradient_noise_variance"].unsqueeze(-1))


def gradient_evidence_in_units(log_marginal: Tensor, units: Units, seen: Observed) -> Tensor:
    """log p(values and slopes) in the user's units, (*b, k) -> (*b): a slope has the Jacobian x_scale / y_scale."""
    d = units.x_scale.shape[-1]
    column = seen.places % (1 + d)
    counts = torch.stack([(column == j + 1).sum() for j in range(d)]).to(torch.float64)
    total = evidence_in_units(log_marginal, units, len(seen.places))
    per_output = (units.x_scale.squeeze(-2).log() * counts).sum(-1)
    return total + units.y_scale.shape[-1] * per_output
