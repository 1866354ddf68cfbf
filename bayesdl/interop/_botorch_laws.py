r"""What each form of posterior says of f at several points together: its mean, its covariance, and how both change
when more values are seen.

    mean'(x) = mean(x) + C(x, X') (C(X', X') + R)^{-1} (Y' - mean(X'))
    C'(x, x) = C(x, x) - C(x, X') (C(X', X') + R)^{-1} C(X', x)

is exact for every posterior that is a Gaussian process, whatever fitted it. Where the scale of the process is unknown,
C is that at scale 1 and the scale has a distribution of its own, which Y' changes too.

Outputs lie in groups that are independent of one another: each alone, or all in one. A group of c outputs at q points
is one vector of c q values, output by output.
"""

from __future__ import annotations

import abc
import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import ops
from bayesdl.distributions import Normal, StudentT
from bayesdl.posterior import (
    AmortizedPosterior,
    DrawsPosterior,
    FixedNoiseMixturePosterior,
    GPPosterior,
    GradientGPPosterior,
    InducingPosterior,
    MatrixFreeGPPosterior,
    Posterior,
    ScaleMixturePosterior,
)
from bayesdl.posterior._scale import InverseGammaBelief, NodeBelief

_FLOOR = 16 * torch.finfo(torch.float64).eps  # of the prior variance: what cancellation leaves of a posterior one


class Law(abc.ABC):
    """The joint law of f under a posterior, float64 and in the user's units, differentiable in x.

    Attributes:
        posterior: Whose law it is.
        exact: Whether it is the posterior's own law; otherwise a Gaussian of the same mean and covariance.
        num_outputs: m.
        num_groups: g, a divisor of m.
        closed_form: Whether mean and covariance come from formulas, rather than from a set of members.
    """

    exact = True
    closed_form = True

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior
        self.num_outputs = posterior._data.y.shape[-1]
        self.num_groups = self.num_outputs

    @abc.abstractmethod
    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., g, p) and covariance (..., g, p, p) at x (..., q, d) for p = q m / g; at scale 1 for mixtures."""

    @property
    def noise_variance(self) -> Tensor | None:
        """Variance of the noise of each output, (*b, 1, m), at scale 1 for mixtures; None for classification."""
        if not is_regression(self.posterior):
            return None
        return self._inner_noise().unsqueeze(-2) * self.posterior._units.y_scale.square()

    def _inner_noise(self) -> Tensor:
        return self.posterior._values["noise_variance"]

    def mean_scale(self, surprise: Tensor | None, num: int) -> Tensor | float:
        """E[v | everything], what the covariance at scale 1 is multiplied by, (..., g, 1).

        Args:
            surprise: (Y' - mean)' (C + R)^{-1} (Y' - mean) of what was conditioned on, (..., g); None for nothing.
            num: How many values of each group that was.
        """
        return 1.0

    def marginal(self, mean: Tensor, deviation: Tensor, surprise: Tensor | None, num: int) -> Distribution:
        """Law of f at each point alone, from its mean and its standard deviation at scale 1, both (..., q, m)."""
        return Normal(mean, deviation, validate_args=False)

    def own_marginal(self, x: Tensor) -> Distribution | None:
        """The posterior's own law of f at each of x (..., q, d), as (..., q, m), where it differs from `marginal`'s."""
        return None


class _GP(Law):
    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.posterior
        k_xs, inner = p._cross(p._inputs("to_botorch", x))
        k_ss = p._model.kernel(inner, params=p._kernel_values())
        mean, covariance = ops.joint_moments(p._state, k_xs, k_ss)
        return _outward(p, mean + p._prior_mean(inner), raised(covariance, k_ss))


class _GradientGP(Law):
    """Of the values of f: slopes were conditioned on in the fit, and what a model is conditioned on later is values."""

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.posterior
        mean, covariance, k_ss = p._joint(p._inputs("to_botorch", x))
        return _outward(p, mean, raised(covariance, k_ss))


class _MatrixFree(Law):
    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.posterior

        def moments(problem: int, points: Tensor) -> Tensor:
            parts = [torch.cat([m.unsqueeze(-1), c], -1) for m, c in (self._at(problem, one) for one in points)]
            return torch.stack(parts)

        both = p._by_problem(p._inputs("to_botorch", x), moments)  # (..., k, q, 1 + q)
        return _outward(p, both[..., 0], both[..., 1:])

    def _at(self, problem: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (q) and covariance (q q); with w = A^{-1} k solved for once, errors and gradients are of second order.

        k' A^{-1} k = w' k + k' w - w' A w + O(error of w squared), and A w is k less the remainder of the solve.
        """
        p = self.posterior
        mean = p._mean(problem, points)
        k = p._cross(problem, points)
        k_ss = p._model.kernel(points, params=p._kernel_values(problem))
        solved = [p._solve(problem, part.detach(), p._config.tolerance) for part in k.split(p._columns(), -1)]
        w = torch.cat([s.solution for s in solved], -1)
        known = w.mT @ (k.detach() - torch.cat([s.remainder for s in solved], -1))
        half = w.mT @ k
        covariance = k_ss - half - half.mT + 0.5 * (known + known.mT)
        return mean, raised(covariance, k_ss)


class _Inducing(Law):
    """Latent functions of a posterior through inducing points; with a scale mixture, all in one group share c."""

    def __init__(self, posterior: InducingPosterior) -> None:
        super().__init__(posterior)
        self.num_outputs = posterior._mean.shape[-3] * posterior._mean.shape[-2]
        self.num_groups = self.num_outputs

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.posterior
        a, inner = p._whitened(p._inputs("to_botorch", x))
        k_ss = p._model.kernel(inner, params=p._kernel_values())
        own = p._spread_root @ a.unsqueeze(-3)  # (..., K, L, m, q)
        covariance = raised((k_ss - a.mT @ a).unsqueeze(-3) + own.mT @ own, k_ss.unsqueeze(-3))
        mean = p._mean @ a + p._prior_mean(inner)
        return _outward(p, mean.flatten(-3, -2), covariance.flatten(-4, -3))

    def mean_scale(self, surprise: Tensor | None, num: int) -> Tensor | float:
        if self.posterior._scale is None:
            return 1.0
        a, b = self.posterior._scale
        return (b / (a - 1).clamp_min(1e-300)).repeat_interleave(self.posterior._mean.shape[-2], -1).unsqueeze(-1)

    def marginal(self, mean: Tensor, deviation: Tensor, surprise: Tensor | None, num: int) -> Distribution:
        if self.posterior._scale is None:
            return super().marginal(mean, deviation, surprise, num)
        a, b = (t.repeat_interleave(self.posterior._mean.shape[-2], -1).unsqueeze(-2) for t in self.posterior._scale)
        return StudentT((2 * a).expand_as(mean), mean, deviation * (b / a).sqrt(), validate_args=False)


class _ScaleMixture(Law):
    """f | v is the Gaussian process at scale v, the noise included; seeing n more values changes p(v) by

    IG(a, b) -> IG(a + n/2, b + surprise/2),    or on nodes  w_j -> w_j v_j^{-n/2} exp(-surprise / (2 v_j)).
    """

    def __init__(self, posterior: ScaleMixturePosterior) -> None:
        super().__init__(posterior)
        self._gp = _GP(posterior._gp)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._gp.joint(x)

    @property
    def noise_variance(self) -> Tensor | None:
        return self._gp.noise_variance

    def mean_scale(self, surprise: Tensor | None, num: int) -> Tensor | float:
        return self._belief(surprise, num).mean.unsqueeze(-1)

    def marginal(self, mean: Tensor, deviation: Tensor, surprise: Tensor | None, num: int) -> Distribution:
        return self._belief(surprise, num).mix(mean, deviation, True)

    def _belief(self, surprise: Tensor | None, num: int) -> InverseGammaBelief | NodeBelief:
        belief = self.posterior._belief
        if surprise is None:
            return belief
        if isinstance(belief, InverseGammaBelief):
            rate = belief.rate + 0.5 * surprise
            return InverseGammaBelief((belief.concentration + 0.5 * num).expand_as(rate), rate)
        log_likelihood = -0.5 * (num * belief.variance.log() + surprise.unsqueeze(-1) / belief.variance)
        return NodeBelief(belief.variance, torch.log_softmax(belief.log_weight + log_likelihood, -1))


class _Matched(Law):
    """A Gaussian of the same mean and covariance as a posterior that is not Gaussian."""

    exact = False


class _FixedNoiseMixture(_Matched):
    """Over the nodes j, sum w_j C_j plus the spread of the means m_j."""

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.posterior
        k_xs, inner = p._gp._cross(p._inputs("to_botorch", x))
        k_ss = p.model.kernel(inner, params=p._gp._kernel_values())
        along, share = p._vectors.mT @ k_xs, p._share()  # (..., k, n, q), (*b, k, M, n)
        v, weight = p._belief.variance, p._belief.log_weight.exp()
        means = (share * p._along.unsqueeze(-2)) @ along
        mean = (weight.unsqueeze(-1) * means).sum(-2)
        spread = (weight.sqrt().unsqueeze(-1) * (means - mean.unsqueeze(-2))).mT  # (..., k, q, M)
        gain = ((weight * v).unsqueeze(-1) * share).sum(-2).unsqueeze(-1)
        prior = (weight * v).sum(-1)[..., None, None] * k_ss
        covariance = prior - along.mT @ (gain * along) + spread @ spread.mT
        return _outward(p, mean + p._gp._prior_mean(inner), raised(covariance, prior))

    def _inner_noise(self) -> Tensor:
        return self.posterior._noise


class Members(_Matched):
    """Mean and covariance (divisor S) of S functions of a posterior, all outputs together."""

    closed_form = False

    def __init__(self, posterior: Posterior, num: int, seed: int) -> None:
        super().__init__(posterior)
        self._settings = num, seed
        if not is_regression(posterior):  # there the functions say how many of them one label takes
            with torch.no_grad():
                self.num_outputs = self.values(posterior._data.x[..., :1, :]).shape[-1]
        self.num_groups = 1

    @functools.cached_property
    def _drawn(self) -> tuple[Any, int]:
        return member_functions(self.posterior, *self._settings)

    @property
    def functions(self) -> Any:
        """The functions, drawn when first asked for."""
        return self._drawn[0]

    @property
    def num_members(self) -> int:
        """S."""
        return self._drawn[1]

    def values(self, x: Tensor) -> Tensor:
        """(..., S, q, m) at x (..., q, d), float64."""
        return member_values(self.posterior, self.functions, x)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = grouped(self.values(x), 1)
        mean = values.mean(-3)
        deviation = (values - mean.unsqueeze(-3)).movedim(-3, -2)  # (..., g, S, p)
        return mean, deviation.mT @ deviation / self.num_members

    @functools.cached_property
    def noise_variance(self) -> Tensor | None:  # the mean over members, where each has its own
        if not is_regression(self.posterior):
            return None
        p, x = self.posterior, self.posterior._data.x[..., :1, :]
        with torch.no_grad():
            noise = p.predict(x).variance - p.predict(x, noise=False).variance
        return noise.to(torch.float64) if p._data.has_outputs else noise.to(torch.float64).unsqueeze(-1)


class _Amortized(Members):
    """A network's marginals are its own; the covariance between points is that of functions made of them."""

    def own_marginal(self, x: Tensor) -> Distribution | None:
        if not is_regression(self.posterior):
            return None
        return self.posterior._regression(self.posterior._inputs("to_botorch", x), noise=False, outputs=True)

    @functools.cached_property
    def noise_variance(self) -> Tensor | None:
        noise = super().noise_variance
        if noise is None:
            return None
        # y and f are two answers of the network, of which the second may come out the wider
        with torch.no_grad():
            least = _FLOOR * self.posterior._units.y_scale.square()
        return torch.maximum(noise, least)


@functools.singledispatch
def law_of(posterior: Posterior, num_members: int, seed: int) -> Law:
    """The law of f under `posterior`: in closed form where its class has one, else from `num_members` functions."""
    return Members(posterior, num_members, seed)


@law_of.register
def _(posterior: GPPosterior, num_members: int, seed: int) -> Law:
    return _GP(posterior)


@law_of.register
def _(posterior: GradientGPPosterior, num_members: int, seed: int) -> Law:
    return _GradientGP(posterior)


@law_of.register
def _(posterior: MatrixFreeGPPosterior, num_members: int, seed: int) -> Law:
    return _MatrixFree(posterior)


@law_of.register
def _(posterior: InducingPosterior, num_members: int, seed: int) -> Law:
    return _Inducing(posterior)


@law_of.register
def _(posterior: ScaleMixturePosterior, num_members: int, seed: int) -> Law:
    return _ScaleMixture(posterior)


@law_of.register
def _(posterior: FixedNoiseMixturePosterior, num_members: int, seed: int) -> Law:
    return _FixedNoiseMixture(posterior)


@law_of.register
def _(posterior: AmortizedPosterior, num_members: int, seed: int) -> Law:
    return _Amortized(posterior, num_members, seed)


def member_functions(posterior: Posterior, num: int, seed: int) -> tuple[Any, int]:
    """At most `num` functions drawn from the posterior, all there are where it holds fewer, and how many."""
    if isinstance(posterior, DrawsPosterior):
        num = min(num, posterior._draws.shape[-3:-1].numel())
    return posterior.functions(num, seed=seed), num


def member_values(posterior: Posterior, functions: Any, x: Tensor) -> Tensor:
    """The functions at x (..., q, d) as (..., S, q, m), float64."""
    values = functions(x).to(torch.float64)
    lead = len(torch.broadcast_shapes(x.shape[:-2], posterior._data.batch_shape))
    values = values if values.ndim == lead + 3 else values.unsqueeze(-1)
    return values.movedim(0, -3)


def is_regression(posterior: Posterior) -> bool:
    """Whether y is f plus Gaussian noise."""
    return getattr(getattr(posterior.model, "likelihood", None), "task", "regression") == "regression"


def grouped(value: Tensor, num_groups: int) -> Tensor:
    """(..., q, m) as (..., g, p): the m / g outputs of a group one after another, p = q m / g."""
    outputs = value.mT
    return outputs.reshape(*outputs.shape[:-2], num_groups, -1)


def ungrouped(value: Tensor, num_outputs: int) -> Tensor:
    """(..., g, p) as (..., q, m)."""
    return value.reshape(*value.shape[:-2], num_outputs, -1).mT


def raised(covariance: Tensor, prior: Tensor) -> Tensor:
    """With a diagonal of at least what rounding leaves of the prior variance."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    floor = _FLOOR * prior.detach().diagonal(dim1=-2, dim2=-1)
    return covariance + torch.diag_embed((floor - diagonal.detach()).clamp_min(0.0))


def _outward(posterior: Posterior, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(..., k, q) and (..., k, q, q) in the user's units."""
    if not is_regression(posterior):
        return mean, covariance
    units = posterior._units
    scale = units.y_scale.mT  # (*b, k, 1)
    return mean * scale + units.y_loc.mT, covariance * scale.square().unsqueeze(-1)
