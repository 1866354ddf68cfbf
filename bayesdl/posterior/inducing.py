r"""The posterior of a Gaussian process through inducing points, for regression and classification.

With K_mm = L L', A = L^{-1} k(z, x) and q(v | c) = N(mean, c S) for the whitened values v,

    f(x) | c ~ N(m(x) + A' mean, c (k(x, x) - A' A + A' S A))

c is 1 for a plain GP, and has the posterior IG(a, b) for a scale mixture: one c for all points and classes, so that f
is multivariate Student-t with 2a degrees of freedom. Functions are drawn pathwise (Wilson et al. 2020, arXiv
2002.09309): a prior function plus an update at the inducing points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import ops
from bayesdl._random import Seed, child_seeds, generator
from bayesdl.data import TrainingData, Units, training_data
from bayesdl.distributions import Bernoulli, Categorical, Normal, StudentT
from bayesdl.errors import ShapeError, fail
from bayesdl.posterior.base import Functions, Posterior
from bayesdl.posterior.closed_form import _root

_CHUNK = 2**22  # numbers of one (m, points) block: 32 MB in float64
_DEGREE = 32  # of Gauss-Hermite quadrature over f
_DRAWS = 512  # of f for a softmax, quasi-random
_SCALE_NODES = 24
_EXACT_DRAWS = 1000  # points up to which `to_arviz` draws jointly; beyond, it draws functions
_PREDICTIVE_SEED = 0


@final
class InducingPosterior(Posterior):
    """GP posterior through m inducing points. Internally float64: (*b, K, L, m) for K target columns, L latents each.

    Regression and two classes have L = 1; C classes have K = 1 and L = C.

    Cost: predicting s points takes O(L m^2 s) time and O(m s) memory for each batch element and column; joint draws add
    O(L s^3); each function costs O(L m^2) once and O(L (m + num_features) d) for each point.
    """

    form: ClassVar[str] = "inducing"
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
        z: Tensor,
        factor: Tensor,
        jitter: Tensor,
        mean: Tensor,
        root: Tensor,
        scale: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Keep the fit: z (*b K m d), factor L (*b K m m) with its jitter (*b K), mean (*b K L m), root R with R'R = S,
        scale (a, b), (*b K) each."""
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._values, self._constant = values, constant
        self._z, self._factor, self._jitter = z, factor, jitter
        self._mean, self._spread_root = mean, root
        self._scale = scale

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """Values by name in standardised units: "kernel.…", "noise_variance" and "mean", with shape (*b, [k,] …).

        A scale mixture adds "scale.concentration" and "scale.rate", the a and b of q(c) = IG(a, b).
        """
        own = {} if any(name.startswith("mean.") for name in self._values) else {"mean": self._constant}
        if self._scale is not None:
            own |= {"scale.concentration": self._scale[0], "scale.rate": self._scale[1]}
        axis = len(self._data.batch_shape)
        values = {**self._values, **own}
        return {name: (v if self._data.has_outputs else v.squeeze(axis)).clone() for name, v in values.items()}

    @property
    def inducing_points(self) -> Tensor:
        """Locations of the inducing points in the user's units, (*b, m, d), or (*b, k, m, d) for k target columns."""
        z = self._z * self._units.x_scale.unsqueeze(-3) + self._units.x_loc.unsqueeze(-3)
        z = z.to(self._data.x.dtype)
        return z if self._data.has_outputs else z.squeeze(-3)

    def predict(self, x: Any, *, noise: bool = True) -> Distribution:
        """Normal for regression, class probabilities averaged over f for classification; see `Posterior.predict`.

        With noise=False the latent f: Normal, or Student-t for a scale mixture. Probabilities of two classes come from
        quadrature. Those of more classes are averages over 512 quasi-random draws of f (for a scale mixture 128 for
        each of 24 values of c), the same at every x, whose error is about 1e-3.
        """
        x = self._inputs("predict", x)
        head = x.shape[:-1]
        if not self._data.batch_shape:
            x = x.reshape(-1, x.shape[-1])
        parts = [self._predictive(part, noise) for part in x.split(self._points_at_once(), -2)]
        # points lie on the last axis, or before that of outputs or classes
        axis = -2 if self._data.has_outputs or self._model.likelihood.task == "multiclass" else -1
        whole = [torch.cat(pieces, axis) for pieces in zip(*parts, strict=True)]
        if not self._data.batch_shape:
            whole = [piece.unflatten(axis, head) for piece in whole]
        return self._distribution(whole, noise)

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Exact joint draws of f under q; see `Posterior.sample`. Cost: O(L (m^2 s + s^3)). One c for each draw."""
        x = self._inputs("sample", x)
        a, inner = self._whitened(x)
        own = self._spread_root @ a.unsqueeze(-3)
        k_ss = self._model.kernel(inner, params=self._kernel_values())
        covariance = (k_ss - a.mT @ a).unsqueeze(-3) + own.mT @ own
        mean = self._mean @ a + self._prior_mean(inner)
        first, second = child_seeds(seed, 2)
        z = _normal((*sample_shape, *mean.shape, 1), first, mean)
        deviation = (_root(covariance) @ z).squeeze(-1) * self._scale_roots(sample_shape, mean.shape[:-2], second)
        return self._outward(mean + deviation)

    def functions(self, num: int, *, seed: Seed = 0, num_features: int = 1024) -> Functions:
        """Pathwise draws; see `Posterior.functions`. `num_features` random features make up each prior function."""
        seeds = child_seeds(seed, 4)
        latents, d = self._mean.shape[-2], self._data.x.shape[-1]
        prior = self._model.kernel.sample_functions(
            d, num * latents, num_features, self._kernel_values(), generator(seeds[0], self._z.device)
        )
        like = self._mean
        at_z = prior(self._z).unflatten(0, (num, latents)).movedim(1, -2)  # (num, *b, K, L, m)
        at_z = at_z + self._jitter.sqrt()[..., None, None] * _normal(at_z.shape, seeds[1], like)
        before = torch.linalg.solve_triangular(self._factor.unsqueeze(-3), at_z.unsqueeze(-1), upper=False)
        after = self._spread_root.mT @ _normal((num, *like.shape, 1), seeds[2], like)
        c = self._scale_roots((num,), like.shape[:-2], seeds[3])
        weights = c.unsqueeze(-1) * (after - before) + like.unsqueeze(-1)
        weights = torch.linalg.solve_triangular(self._factor.mT.unsqueeze(-3), weights, upper=True).squeeze(-1)

        def draw(x: Any) -> Tensor:
            inner = self._inner(self._inputs("functions", x))
            k_zs = self._model.kernel(self._z, inner, self._kernel_values()).unsqueeze(-3)  # (..., K, 1, m, s)
            own = prior(inner).unflatten(0, (num, latents)).movedim(1, -2)  # (num, ..., K, L, s)
            missing = [1] * (own.ndim - weights.ndim)
            w, scale = (t.reshape(num, *missing, *t.shape[1:]) for t in (weights, c))
            update = (w.unsqueeze(-2) @ k_zs).squeeze(-2)
            return self._outward(scale * own + update + self._prior_mean(inner))

        return draw

    def condition_on(self, x: Any, y: Any) -> InducingPosterior:
        """For a Gaussian likelihood: the exact update of q(u) by (x, y), at the same hyper-parameters and locations.

        It is what fitting q(u) to all data at once would give; the bound of the old data is dropped from diagnostics.

        Args:
            x: More inputs (*b, q, d).
            y: Their targets, (*b, q) or (*b, q, k) as in training.

        Raises:
            NotImplementedError: The likelihood is not Gaussian.

        Cost: O(m^2 q + q^3) for each batch element and output.
        """
        if self._model.likelihood.task != "regression":
            return super().condition_on(x, y)  # type: ignore[return-value]
        old = self._data
        new = _alike(training_data("InducingPosterior.condition_on", x, y), old)
        a, inner = self._whitened(new.x)
        residual = self._units.inward_y(new.y, torch.float64).movedim(-1, -2).unsqueeze(-2)
        residual = (residual - self._prior_mean(inner) - self._mean @ a).mT  # (*b, K, q, 1)
        half = self._spread_root.squeeze(-3) @ a  # S = R' R <- R' (I + R A A' R' / s)^{-1} R
        s = self._values["noise_variance"][..., None, None]
        eye = torch.eye(half.shape[-2], dtype=half.dtype, device=half.device)
        factor = torch.linalg.cholesky(eye + half @ half.mT / s)
        root = torch.linalg.solve_triangular(factor, self._spread_root.squeeze(-3), upper=False)
        mean = self._mean + (root.mT @ (root @ (a @ residual / s))).mT
        data = TrainingData(torch.cat([old.x, new.x], -2), torch.cat([old.y, new.y], -2), old.has_outputs)
        diagnostics = {k: v for k, v in self._diagnostics.items() if k != "elbo"} | {"num_data": data.x.shape[-2]}
        state = self._state() | {"mean": mean, "root": root.unsqueeze(-3)}
        return InducingPosterior(self._model, data, self._units, diagnostics, **state)

    def _kernel_values(self) -> dict[str, Tensor]:
        return self._model.kernel_values(self._values)

    def _inner(self, x: Tensor) -> Tensor:
        """x in the model's units with an axis for target columns, (..., 1, s, d)."""
        return self._units.inward_x(x, torch.float64).unsqueeze(-3)

    def _prior_mean(self, inner: Tensor) -> Tensor:
        """m(x), (..., K, 1, s or 1)."""
        return self._model.mean_at(inner, self._values, self._constant).unsqueeze(-2)

    def _whitened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (..., K, m, s), and x in the model's units (..., 1, s, d)."""
        inner = self._inner(x)
        k_zs = self._model.kernel(self._z, inner, self._kernel_values())
        return torch.linalg.solve_triangular(self._factor, k_zs, upper=False), inner

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of f at c = 1, (..., s, O) with O = K L, in the model's units."""
        a, inner = self._whitened(x)
        prior = self._model.kernel.diagonal(inner, self._kernel_values())
        prior = prior.expand(*a.shape[:-2], a.shape[-1])
        mean, variance = ops.whitened_moments(a, prior, self._mean, self._spread_root)
        return _outputs_last(mean + self._prior_mean(inner)), _outputs_last(variance)

    def _predictive(self, x: Tensor, noise: bool) -> list[Tensor]:
        """Parameters of the predictive distribution at one chunk of points, in the user's units."""
        mean, variance = self._moments(x)
        task = self._model.likelihood.task
        if noise and task == "binary":
            return [self._squeeze(self._success(mean, variance))]
        if noise and task == "multiclass":
            return [self._class_probabilities(mean, variance).to(self._data.x.dtype)]
        if noise and task == "regression":
            variance = variance + self._values["noise_variance"].unsqueeze(-2)
        if self._scale is not None:
            a, b = (t.unsqueeze(-2) for t in self._scale)
            variance = variance * b / a
        loc, scale = self._units.outward(mean) if task == "regression" else mean, variance.sqrt()
        scale = self._units.outward_scale(scale) if task == "regression" else scale
        return [self._narrow(loc), self._narrow(scale)]

    def _distribution(self, whole: list[Tensor], noise: bool) -> Distribution:
        task = self._model.likelihood.task
        if noise and task == "binary":
            return Bernoulli(probs=whole[0], validate_args=False)
        if noise and task == "multiclass":
            return Categorical(probs=whole[0], validate_args=False)
        if self._scale is None:
            return Normal(*whole, validate_args=False)
        dof = self._narrow(2 * self._scale[0].unsqueeze(-2)).expand_as(whole[0])
        return StudentT(dof, *whole, validate_args=False)

    def _points_at_once(self) -> int:
        draws = 1 if self._scale is None else _SCALE_NODES
        width = max(self._z.shape[-2], _DRAWS * draws // 2) * self._mean.shape[:-1].numel()
        return max(1, _CHUNK // width)

    def _success(self, mean: Tensor, variance: Tensor) -> Tensor:
        """E[sigmoid(f)] by Gauss-Hermite quadrature, for each of the values of c."""
        node, weight = ops.gauss_hermite(_DEGREE, mean)
        if self._scale is None:
            return torch.sigmoid(mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * node) @ weight
        c, share = (t.unsqueeze(-3) for t in ops.inverse_gamma_nodes(*self._scale, _SCALE_NODES))  # (*b, 1, K, nodes)
        spread = (variance.unsqueeze(-1) * c).sqrt()
        return ((torch.sigmoid(mean[..., None, None] + spread.unsqueeze(-1) * node) @ weight) * share).sum(-1)

    def _class_probabilities(self, mean: Tensor, variance: Tensor) -> Tensor:
        """E[softmax(f)] over quasi-random draws, (..., s, C); one c for all classes of a draw."""
        num = _DRAWS if self._scale is None else _DRAWS // 4
        noise = _quasi_normal(num, mean.shape[-1], mean)  # (S, C)
        spread = variance.sqrt().unsqueeze(-2)
        if self._scale is None:
            return torch.softmax(mean.unsqueeze(-2) + spread * noise, -1).mean(-2)
        c, share = (t.squeeze(-2) for t in ops.inverse_gamma_nodes(*self._scale, _SCALE_NODES))  # (*b, nodes)
        c, share = c[..., None, :, None, None], share[..., None, :, None]
        p = torch.softmax(mean[..., None, None, :] + c.sqrt() * (spread.unsqueeze(-3) * noise), -1).mean(-2)
        return (p * share).sum(-2)

    def _scale_roots(self, sample_shape: tuple[int, ...], heads: tuple[int, ...], seed: int) -> Tensor:
        """Draws of c^{1/2}, (*sample_shape, *heads, 1, 1) for heads (..., K): one for all points and classes."""
        shape = (*sample_shape, *heads)
        if self._scale is None:
            return self._mean.new_ones((*shape, 1, 1))
        a, b = self._scale
        gamma = torch._standard_gamma(a.expand(shape).contiguous(), generator=generator(seed, a.device))
        return (b / gamma).sqrt()[..., None, None]

    def _outward(self, f: Tensor) -> Tensor:
        """(..., K, L, s) in the user's units, (..., s) or (..., s, O)."""
        f = _outputs_last(f)
        return self._narrow(self._units.outward(f) if self._model.likelihood.task == "regression" else f)

    def _narrow(self, f: Tensor) -> Tensor:
        """Drop the output axis (last) where y came without one and there is one function; in the user's dtype."""
        f = f.to(self._data.x.dtype)
        return f.squeeze(-1) if not self._data.has_outputs and f.shape[-1] == 1 else f

    def _state(self) -> dict[str, Any]:
        return {
            "values": self._values,
            "constant": self._constant,
            "z": self._z,
            "factor": self._factor,
            "jitter": self._jitter,
            "mean": self._mean,
            "root": self._spread_root,
            "scale": self._scale,
        }

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._state()
        tensors = {f"value.{name}": v for name, v in state.pop("values").items()}
        scale = state.pop("scale")
        if scale is not None:
            tensors |= {"scale.concentration": scale[0], "scale.rate": scale[1]}
        return tensors | state, {}

    @classmethod
    def _from_parts(
        cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]
    ) -> InducingPosterior:
        values = {name.removeprefix("value."): v for name, v in tensors.items() if name.startswith("value.")}
        names = ("constant", "z", "factor", "jitter", "mean", "root")
        scale = None
        if "scale.rate" in tensors:
            scale = (tensors["scale.concentration"], tensors["scale.rate"])
        return cls(**shared, values=values, scale=scale, **{name: tensors[name] for name in names})

    def _arviz_groups(self) -> dict[str, Any]:
        x = self._data.x
        draws = self.sample(x, (1000,), seed=0) if x.shape[-2] <= _EXACT_DRAWS else self.functions(1000, seed=0)(x)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        task = self._model.likelihood.task
        if task == "regression":
            noise = self._values["noise_variance"].sqrt() * self._units.y_scale.squeeze(-2)
            likelihood: Distribution = torch.distributions.Normal(draws, self._squeeze(noise.unsqueeze(-2)).to(draws))
        elif task == "binary":
            likelihood = torch.distributions.Bernoulli(logits=draws)
        else:
            likelihood = torch.distributions.Categorical(logits=draws)
            y = self._data.y.squeeze(-1)
        pointwise = likelihood.log_prob(y).unsqueeze(0)
        return {"posterior": {"f": draws.unsqueeze(0)}, "observed_data": {"y": y}, "log_likelihood": {"y": pointwise}}


def _outputs_last(f: Tensor) -> Tensor:
    """(..., K, L, s) -> (..., s, K L)."""
    return f.flatten(-3, -2).movedim(-2, -1)


def _normal(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator(seed, like.device), dtype=like.dtype, device=like.device)


def _quasi_normal(num: int, width: int, like: Tensor) -> Tensor:
    """`num` points of a scrambled Sobol sequence as standard normal numbers, (num, width); always the same ones."""
    engine = torch.quasirandom.SobolEngine(width, scramble=True, seed=_PREDICTIVE_SEED)
    uniform = engine.draw(num, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)).to(like)


def _alike(new: TrainingData, old: TrainingData) -> TrainingData:
    """`new` in the dtype and on the device of `old`, or a ShapeError where it does not go with it."""
    agree = (
        new.batch_shape == old.batch_shape and new.x.shape[-1] == old.x.shape[-1] and new.y.shape[-1] == old.y.shape[-1]
    )
    if not agree or new.has_outputs != old.has_outputs:
        wanted = f"x and y must be like the training data, {tuple(old.x.shape)} and {tuple(old.y.shape)}."
        got = f"x {tuple(new.x.shape)}, y {tuple(new.y.shape)}"
        fix = "pass the same batch axes, columns and outputs"
        fail(ShapeError, "InducingPosterior.condition_on", wanted, got=got, fix=fix)
    return TrainingData(new.x.to(old.x), new.y.to(old.y), old.has_outputs)
