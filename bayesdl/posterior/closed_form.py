r"""The posterior of a Gaussian process with Gaussian noise, in closed form.

    mean(x) = m(x) + k(x, X) (K + s I)^{-1} (y - m(X)),   cov(x, x') = k(x, x') - k(x, X) (K + s I)^{-1} k(X, x')

Functions are drawn pathwise (Wilson et al. 2020, arXiv 2002.09309): a prior function plus an exact update,
f(x) + k(x, X) (K + s I)^{-1} (y - f(X) - e), so that one draw is a function of x with the same values wherever it is
asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl._random import Seed, generator
from bayesdl.data import TrainingData, Units, training_data
from bayesdl.distributions import Normal
from bayesdl.errors import ShapeError, fail
from bayesdl.posterior.base import Functions, Posterior


@final
class GPPosterior(Posterior):
    """Exact GP posterior at fixed hyper-parameters. Internally float64, with an axis for outputs: (*b, k, n).

    Cost: predicting s points takes O(n^2 s) time and O(n s) memory for each batch element and output; joint draws add
    O(s^3); each function costs O(n^2) once and O((n + num_features) d) for each point.
    """

    form: ClassVar[str] = "closed_form"
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
    ) -> None:
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._values = values
        self._constant = constant
        self._state = state

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """Values by name in standardised units: "kernel.…", "noise_variance" and "mean", with shape (*b, [k,] …).

        A mean with parameters of its own has "mean.…" in place of "mean".
        """
        own = {} if any(name.startswith("mean.") for name in self._values) else {"mean": self._constant}
        values = {**self._values, **own}
        axis = len(self._data.batch_shape)
        return {name: (v if self._data.has_outputs else v.squeeze(axis)).clone() for name, v in values.items()}

    def predict(self, x: Any, *, noise: bool = True) -> Normal:
        """Normal distribution of y (or of f with noise=False) at each x; see `Posterior.predict`."""
        x = self._inputs("predict", x)
        head, d = x.shape[:-1], x.shape[-1]
        if not self._data.batch_shape:
            x = x.reshape(-1, d)  # one data set: all points share its factor
        k_xs, inner = self._cross(x)
        prior_variance = self._model.kernel.diagonal(inner, self._kernel_values())
        mean, variance = ops.marginal_moments(self._state, k_xs, prior_variance)
        variance = variance.clamp_min(torch.finfo(variance.dtype).eps * prior_variance)  # what cancellation leaves
        if noise:
            variance = variance + self._values["noise_variance"].unsqueeze(-1)
        mean, scale = self._outward(mean + self._prior_mean(inner), variance.sqrt())
        shape = (*head, mean.shape[-1]) if not self._data.batch_shape else mean.shape
        return Normal(self._squeeze(mean.reshape(shape)), self._squeeze(scale.reshape(shape)), validate_args=False)

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Exact joint draws of f; see `Posterior.sample`. Cost: O(n^2 s + s^3)."""
        x = self._inputs("sample", x)
        k_xs, inner = self._cross(x)
        k_ss = self._model.kernel(inner, params=self._kernel_values())
        mean, covariance = ops.joint_moments(self._state, k_xs, k_ss)
        factor = _root(covariance)
        shape = (*sample_shape, *mean.shape, 1)
        z = torch.randn(shape, generator=generator(seed, mean.device), dtype=mean.dtype, device=mean.device)
        draws = (mean + (factor @ z).squeeze(-1) + self._prior_mean(inner)).movedim(-2, -1)
        return self._squeeze(self._units.outward(draws))

    def functions(self, num: int, *, seed: Seed = 0, num_features: int = 1024) -> Functions:
        """Pathwise draws; see `Posterior.functions`. `num_features` random features make up each prior function."""
        g = generator(seed, self._data.x.device)
        prior = self._model.kernel.sample_functions(self._data.x.shape[-1], num, num_features, self._kernel_values(), g)
        state = self._state
        noise = torch.randn(
            (num, *state.residual.shape), generator=g, dtype=state.residual.dtype, device=state.residual.device
        )
        noise = noise * self._values["noise_variance"].sqrt().unsqueeze(-1)
        gap = state.residual - prior(state.x) - noise
        weights = torch.cholesky_solve(gap.unsqueeze(-1), state.chol)

        def draw(x: Any) -> Tensor:
            k_xs, inner = self._cross(self._inputs("functions", x))
            update = k_xs.transpose(-2, -1) @ weights.reshape(
                num, *[1] * (k_xs.ndim - state.chol.ndim), *weights.shape[1:]
            )
            values = prior(inner) + update.squeeze(-1) + self._prior_mean(inner)
            return self._squeeze(self._units.outward(values.movedim(-2, -1)))

        return draw

    def condition_on(self, x: Any, y: Any) -> GPPosterior:
        """The exact posterior after (x, y) too, at the same hyper-parameters, by appending to the Cholesky factor.

        Args:
            x: More inputs (*b, q, d).
            y: Their targets, (*b, q) or (*b, q, k) as in training.

        Cost: O(n^2 q) in place of O((n + q)^3).
        """
        new = training_data("GPPosterior.condition_on", x, y)
        old = self._data
        agree = (
            new.batch_shape == old.batch_shape
            and new.x.shape[-1] == old.x.shape[-1]
            and new.y.shape[-1] == old.y.shape[-1]
        )
        if not agree or new.has_outputs != old.has_outputs:
            got = f"x {tuple(new.x.shape)}, y {tuple(new.y.shape)}"
            wanted = f"x and y must be like the training data, {tuple(old.x.shape)} and {tuple(old.y.shape)}."
            fail(
                ShapeError,
                "GPPosterior.condition_on",
                wanted,
                got=got,
                fix="pass the same batch axes, columns and outputs",
            )
        new = TrainingData(new.x.to(old.x), new.y.to(old.y), old.has_outputs)
        k_xn, inner = self._cross(new.x)
        k_nn = self._model.kernel(inner, params=self._kernel_values())
        residual = self._units.inward_y(new.y, torch.float64).movedim(-1, -2) - self._prior_mean(inner)
        state = ops.append(self._state, k_xn, k_nn, inner, residual)
        data = TrainingData(torch.cat([old.x, new.x], -2), torch.cat([old.y, new.y], -2), old.has_outputs)
        diagnostics = {**self._diagnostics, "num_data": data.x.shape[-2], "jitter": float(state.jitter.max())}
        evidence = evidence_in_units(ops.log_marginal(state), self._units, data.x.shape[-2])
        return GPPosterior(
            self._model,
            data,
            self._units,
            diagnostics,
            evidence,
            values=self._values,
            constant=self._constant,
            state=state,
        )

    def _kernel_values(self) -> dict[str, Tensor]:
        return self._model.kernel_values(self._values)

    def _prior_mean(self, inner: Tensor) -> Tensor:
        """m(x) (..., k, s) at x in the model's units (..., 1, s, d), or (..., k, 1) where it is a constant."""
        return self._model.mean_at(inner, self._values, self._constant)

    def _cross(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k(X, x) of shape (..., k, n, s), and x in the model's units with an axis for outputs, (..., 1, s, d)."""
        inner = self._units.inward_x(x, torch.float64).unsqueeze(-3)
        return self._model.kernel(self._state.x, inner, params=self._kernel_values()), inner

    def _outward(self, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return self._units.outward(mean.movedim(-2, -1)), self._units.outward_scale(scale.movedim(-2, -1))

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        values = {f"value.{name}": v for name, v in self._values.items()}
        state = {f"state.{name}": v for name, v in self._state._asdict().items()}
        return {**values, **state, "constant": self._constant}, {}

    @classmethod
    def _from_parts(cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]) -> GPPosterior:
        values = {name.removeprefix("value."): v for name, v in tensors.items() if name.startswith("value.")}
        state = ops.GPState.from_tensors(tensors, "state.")
        return cls(**shared, values=values, constant=tensors["constant"], state=state)

    def _arviz_groups(self) -> dict[str, Any]:
        draws = self.sample(self._data.x, (1, 1000), seed=0)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        noise = self._values["noise_variance"].sqrt() * self._units.y_scale.squeeze(-2)
        log_likelihood = torch.distributions.Normal(draws, self._squeeze(noise.unsqueeze(-2)).to(draws)).log_prob(y)
        return {"posterior": {"f": draws}, "observed_data": {"y": y}, "log_likelihood": {"y": log_likelihood}}


def _root(covariance: Tensor) -> Tensor:
    """R (*b, s, s) with R R' = covariance, by Cholesky, or by eigenvalues where rounding has left some below zero.

    Far below the prior variance, as at the inputs of nearly noise-free data, rounding outweighs what jitter in
    proportion to the covariance itself can mend.
    """
    factor, _, failed = ops.cholesky(covariance)
    if not bool(failed.any()):
        return factor
    s = covariance.shape[-1]
    lost = failed.reshape(-1).nonzero().squeeze(-1)
    values, vectors = torch.linalg.eigh(covariance.reshape(-1, s, s)[lost])
    floor = torch.finfo(values.dtype).eps * values[..., -1:].clamp_min(0.0)
    roots = vectors * torch.maximum(values, floor).sqrt().unsqueeze(-2)
    return factor.reshape(-1, s, s).index_copy(0, lost, roots).reshape(covariance.shape)


def evidence_in_units(log_marginal: Tensor, units: Units, n: int) -> Tensor:
    """log p(y) in the user's units from that of standardised targets, (*b, k) -> (*b).

    Each point has the Jacobian 1 / y_scale.
    """
    return (log_marginal - n * units.y_scale.squeeze(-2).log()).sum(-1)
