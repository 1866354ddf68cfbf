r"""BoTorch's qLogNEI with the draws at the observed points made once: the same values, several times sooner.

What qLogNEI compares is f(x) with the best of f at the observed points X_b, draw by draw. For a Gaussian process

    f(X_b) = m(X_b) + L z_b,    f(x) = m(x) + l(x)' z_b + s(x) z,
    l(x) = L^{-1} C(X_b, x),    s(x)^2 = C(x, x) - l(x)' l(x),    L L' = C(X_b, X_b),

with z_b and z the same at every x: nothing of the first depends on x. Members of a posterior have their values at X_b
once and for all.

Reference: Ament, Daulton, Eriksson, Balandat, Bakshy (2023), arXiv 2310.20708; the factorisation as in Daulton,
Balandat, Bakshy (2021), arXiv 2105.08195, section 5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.sampling.base import MCSampler
from torch import Tensor

from bayesdl import ops
from bayesdl.interop._botorch_answers import GaussianPosterior
from bayesdl.interop._botorch_laws import _FLOOR, _GP, _ScaleMixture
from bayesdl.interop._botorch_member_model import MemberModel
from bayesdl.interop._botorch_models import GaussianModel, as_trained, factor_of, finite_scale
from bayesdl.posterior import GPPosterior

Draws = Callable[[Tensor], Tensor]  # X (*t, 1, d) -> f (S, *t, 1, m)


class CachedLogNoisyExpectedImprovement(qLogNoisyExpectedImprovement):
    """qLogNEI at single points, with everything computed beforehand that does not depend on them.

    Args:
        plain: BoTorch's own, with its pruned and its pending points.
        baseline: Draws of f at `plain.X_baseline`, (S, b, m).
        draws: Draws of f at other points, each the same function as in `baseline`.
    """

    def __init__(self, plain: qLogNoisyExpectedImprovement, baseline: Tensor, draws: Draws) -> None:
        super().__init__(
            model=plain.model, X_baseline=plain.X_baseline, sampler=plain.sampler, objective=plain.objective,
            constraints=plain._constraints, eta=plain._eta, fat=plain._fat, tau_max=plain.tau_max,
            tau_relu=plain.tau_relu, prune_baseline=False, cache_root=False, marginalize_dim=plain.marginalize_dim,
        )  # fmt: skip
        best = self._compute_best_feasible_objective(baseline, self.objective(baseline, X=self.X_baseline))
        self.register_buffer("_baseline_best_f", best)
        self._cache_root = True  # `compute_best_f` then takes the buffer
        self._draws = draws

    def _get_samples_and_objectives(self, X: Tensor) -> tuple[Tensor, Tensor]:
        samples = self._draws(X)
        return samples, self.objective(samples, X=X)


def accelerate(acquisition: AcquisitionFunction) -> AcquisitionFunction:
    """The same acquisition function, in its faster form where it has one: qLogNEI of one data set's posterior.

    It is then for single points (*t, 1, d). A Gaussian process, or a scale mixture of one, must have one output that
    was not conditioned on anything; members may have any number.
    """
    if type(acquisition) is not qLogNoisyExpectedImprovement or not acquisition.incremental:
        return acquisition
    model = acquisition.model
    with torch.no_grad():
        members = getattr(model, "inner", model)  # what an average over an environment is taken of
        if isinstance(members, MemberModel) and not model.batch_shape:
            draws: Draws = lambda X: acquisition.get_posterior_samples(model.posterior(X))  # noqa: E731
            return CachedLogNoisyExpectedImprovement(acquisition, draws(acquisition.X_baseline), draws)
        if isinstance(model, GaussianModel) and (process := _process(model)) is not None:
            fixed = _GaussianDraws(*process, acquisition.X_baseline, acquisition.sampler)
            return CachedLogNoisyExpectedImprovement(acquisition, fixed.baseline, fixed)
    return acquisition


def _process(model: GaussianModel) -> tuple[GPPosterior, Tensor | float] | None:
    """The Gaussian process behind a model and the factor of its covariance; None where there is no single one."""
    law = model._law
    if model._seen is not None or model._outputs is not None or model.batch_shape or law.num_outputs != 1:
        return None
    if isinstance(law, _GP):
        return law.posterior, 1.0
    if isinstance(law, _ScaleMixture):
        scale = law.mean_scale(None, 0)
        return law.posterior._gp, scale if isinstance(scale, float) else finite_scale(scale).reshape(())
    return None


class _GaussianDraws:
    """Draws of a Gaussian process at single points, each beside the same values at points that stay.

    Args:
        posterior: Of one data set and one output.
        scale: What its covariance is multiplied by.
        fixed: The points that stay, (b, d) in the user's units.
        sampler: Its base samples for b + 1 points are z_b and z.

    Cost: building, O(n^2 b + b^3); a call with t points, O(n^2 t + (n + S) b t).
    """

    def __init__(self, posterior: GPPosterior, scale: Tensor | float, fixed: Tensor, sampler: MCSampler) -> None:
        self._posterior, self._scale = posterior, scale
        state, self._num_fixed = posterior._state, len(fixed)
        k_xb, inner = posterior._cross(as_trained_gp(posterior, fixed))
        # A factor read from a file lies row by row, a fresh one column by column, and they solve with other roundings.
        self._root = state.chol.contiguous()
        self._half = ops.gaussian.solve_lower(self._root, k_xb)  # (1, n, b)
        self._rows = torch.cat([state.x, inner], -2)
        k_bb = posterior._model.kernel(inner, params=posterior._kernel_values())
        covariance = self._scale * (k_bb - self._half.mT @ self._half)
        floor = _FLOOR * k_bb.diagonal(dim1=-2, dim2=-1) - covariance.diagonal(dim1=-2, dim2=-1)
        self._chol = factor_of(covariance + torch.diag_embed(floor.clamp_min(0.0)))
        self._z = self._base_samples(sampler)
        mean = (k_xb.mT @ state.alpha.unsqueeze(-1)).squeeze(-1) + posterior._prior_mean(inner)
        values = mean + self._z[:, :-1] @ self._chol[0].mT
        self.baseline = self._outward(values).unsqueeze(-1)

    def _base_samples(self, sampler: MCSampler) -> Tensor:
        """(S, b + 1): what the sampler gives for so many points of one output."""
        num = self._num_fixed + 1
        own = copy.deepcopy(sampler)
        zero, one = self._half.new_zeros(num, 1), torch.eye(num, dtype=self._half.dtype).unsqueeze(0)
        own._construct_base_samples(GaussianPosterior(zero, one))
        return own.base_samples.reshape(-1, num)

    def _outward(self, values: Tensor) -> Tensor:
        units = self._posterior._units
        return units.y_loc.reshape(()) + units.y_scale.reshape(()) * values

    def __call__(self, X: Tensor) -> Tensor:
        """f at X (*t, 1, d), (S, *t, 1, 1)."""
        p, state = self._posterior, self._posterior._state
        points = as_trained_gp(p, X.reshape(-1, X.shape[-1]))
        inner = p._units.inward_x(points, torch.float64).unsqueeze(-3)  # (1, t, d): all t-batches in one matrix
        kernel, values = p._model.kernel, p._kernel_values()
        k_xs, k_bs = kernel(self._rows, inner, params=values).split([state.x.shape[-2], self._num_fixed], -2)
        half = ops.gaussian.solve_lower(self._root, k_xs)
        k_ss = kernel.diagonal(inner, params=values)
        mean = (k_xs.mT @ state.alpha.unsqueeze(-1)).squeeze(-1) + p._prior_mean(inner)
        cross = self._scale * (k_bs - self._half.mT @ half)
        along = ops.gaussian.solve_lower(self._chol, cross)  # (1, b, t)
        left = self._scale * (k_ss - half.square().sum(-2)) - along.square().sum(-2)
        deviation = torch.maximum(left, _FLOOR * k_ss.detach()).sqrt()
        draws = mean + self._z[:, :-1] @ along[0] + self._z[:, -1:] * deviation
        return self._outward(draws).reshape(-1, *X.shape[:-1], 1).to(X.dtype)


def as_trained_gp(posterior: GPPosterior, x: Tensor) -> Tensor:
    """x in the dtype and the columns in which the posterior was trained."""
    return posterior._inputs("to_botorch", as_trained(posterior, x))
