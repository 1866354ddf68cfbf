r"""What gradient descent makes of infinitely wide networks whose read-out has a random variance v.

At its start such a network is f_0 | v ~ GP(0, v K), K being the NNGP kernel at v = 1. Gradient flow on the squared loss
at (X, y), run to its end, moves it along its tangent kernel T to

    f(x) = f_0(x) + T(x, X) T(X, X)^{-1} (y - f_0(X))

which fits the targets exactly, without noise, and is a law over functions through f_0 and v alone. The targets say
nothing about v here: v keeps its prior, and an inverse gamma prior IG(a, b) gives 2a degrees of freedom, not 2a + n.
None of this is the Bayesian posterior, which `bdl.ScaleMixture` gives; it describes ensembles of trained networks.

References: Lee, Xiao, Schoenholz et al. (2019), "Wide neural networks of any depth evolve as linear models", arXiv
1902.06720, equations 14-16, for a given v; Lee, Yun, Yang, Lee (2022), arXiv 2107.01408, for mixtures over v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _checks, ops
from bayesdl.data import new_inputs, training_data
from bayesdl.distributions import GaussianMixture, StudentT
from bayesdl.errors import NumericalError, SettingError, ShapeError, fail
from bayesdl.kernels import Kernel
from bayesdl.ops.quadrature import log_nodes
from bayesdl.priors.scale import InverseGamma, ScalePrior, scale_prior


def last_layer_limit(
    kernel: Kernel, x: Any, y: Any, x_new: Any, prior: Any, *, num_nodes: int = 64
) -> StudentT | GaussianMixture:
    r"""The law of wide networks of which the read-out alone was trained: f at each point of x_new.

    The tangent kernel of the read-out is K itself, so that given v

        f | v ~ N(K_*' K^{-1} y,  v (K_** - K_*' K^{-1} K_*))

    with a mean free of v. For v ~ IG(a, b) this is Student-t with 2a degrees of freedom and scale^2 b / a times the
    bracket; for another prior a mixture over `num_nodes` values of v.

    Args:
        kernel: K, an NNGP kernel at its initial hyper-parameters. Its read-out bias counts as scaled by v too.
        x: Training inputs (*b, n, d), not standardised here; float64 is advisable.
        y: Targets (*b, n).
        x_new: (..., s, d).
        prior: On v: of `bayesdl.priors`, or a log density.
        num_nodes: Values of v, where the prior is no inverse gamma.

    Raises:
        ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
        NumericalError: K(X, X) is singular, as at repeated inputs.

    Cost: O(n^3 + n^2 s) time for each batch element.
    """
    where = "last_layer_limit"
    points, targets, new, v_prior = _arguments(where, x, y, x_new, prior, num_nodes)
    state = _factor(where, kernel(points), points, targets)
    mean, variance = ops.marginal_moments(state, kernel(points, new), kernel.diagonal(new))
    if isinstance(v_prior, InverseGamma):
        dof = torch.full_like(mean, 2 * v_prior.concentration)
        return StudentT(dof, mean, (variance * (v_prior.rate / v_prior.concentration)).sqrt(), validate_args=False)
    v, weight = _nodes(v_prior, mean, num_nodes)
    scale = (variance.unsqueeze(-1) * v).sqrt()
    return GaussianMixture(mean.unsqueeze(-1), scale, weight, validate_args=False)


def all_layers_limit(
    kernel: Kernel, tangent: Kernel, x: Any, y: Any, x_new: Any, prior: Any, *, num_nodes: int = 64
) -> Distribution:
    r"""The law of wide networks of which every layer was trained: f at each point of x_new.

    Where the read-out weights are stored as they act, sigma w rather than w, their own gradients do not carry sigma,
    but all gradients that come back through them do. The tangent kernel is then

        T_v = K + v (T - K)

    with T the tangent kernel at v = 1, whose last-layer term is K. Given v, with B = T_v(x, X) T_v(X, X)^{-1},

        mean = B y,    cov = v (K_** + B K B' - B K_* - K_*' B')

    so that the mean depends on v too, and the law is a mixture of unequal means, no Student-t, whatever the prior.

    Args:
        kernel: K, as `bdl.kernels.NNGP(...)`.
        tangent: T of the same network, as `bdl.kernels.NTK(...)`.
        x: Training inputs (*b, n, d), not standardised here; float64 is advisable.
        y: Targets (*b, n).
        x_new: (..., s, d).
        prior: On v: of `bayesdl.priors`, or a log density.
        num_nodes: Values of v.

    Raises:
        ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
        NumericalError: T_v(X, X) is singular.

    Cost: O(num_nodes (n^3 + n^2 s)) time and O(num_nodes n (n + s)) memory for each batch element.
    """
    where = "all_layers_limit"
    points, targets, new, v_prior = _arguments(where, x, y, x_new, prior, num_nodes)
    v, weight = _nodes(v_prior, points, num_nodes)

    def mixed(z: Tensor | None) -> tuple[Tensor, Tensor]:
        """K and T_v between X and z, the latter with an axis for v: (*b, n, s), (*b, M, n, s)."""
        k = kernel(points, z)
        return k, k.unsqueeze(-3) + v[:, None, None] * (tangent(points, z) - k).unsqueeze(-3)

    k_xx, t_xx = mixed(None)
    k_xs, t_xs = mixed(new)
    spread = points.unsqueeze(-3).expand(*t_xx.shape[:-2], *points.shape[-2:])
    state = _factor(where, t_xx, spread, targets.unsqueeze(-2).expand(t_xx.shape[:-1]))
    b = torch.cholesky_solve(t_xs, state.chol.expand(*t_xs.shape[:-2], *state.chol.shape[-2:]))  # B', (..., M, n, s)
    mean = (t_xs.mT @ state.alpha.unsqueeze(-1)).squeeze(-1)
    quadratic = (b * (k_xx.unsqueeze(-3) @ b)).sum(-2) - 2 * (b * k_xs.unsqueeze(-3)).sum(-2)
    variance = v[:, None] * (kernel.diagonal(new).unsqueeze(-2) + quadratic)
    floor = torch.finfo(variance.dtype).eps * v[:, None] * kernel.diagonal(new).unsqueeze(-2)
    scale = torch.maximum(variance, floor).sqrt()
    return GaussianMixture(mean.movedim(-2, -1), scale.movedim(-2, -1), weight, validate_args=False)


def _arguments(
    where: str, x: Any, y: Any, x_new: Any, prior: Any, num_nodes: int
) -> tuple[Tensor, Tensor, Tensor, ScalePrior]:
    data = training_data(where, x, y)
    if data.has_outputs:
        fix = "call it once for each column"
        fail(ShapeError, where, "y must have one column, shape (*b, n).", got=_checks.describe(data.y), fix=fix)
    _checks.at_least(where, "num_nodes", num_nodes, 8, integer=True)
    v_prior = scale_prior(where, prior)
    if v_prior.parameters():
        fail(SettingError, where, "the prior on v must be fixed.", got=repr(v_prior), fix="learn=False")
    return data.x, data.y.squeeze(-1), new_inputs(where, x_new, data.x), v_prior


def _factor(where: str, k_xx: Tensor, x: Tensor, y: Tensor) -> ops.GPState:
    state = ops.condition(k_xx, x, y, torch.zeros_like(k_xx[..., 0, 0]))
    if not bool(torch.isfinite(state.alpha).all()):
        wanted = "the kernel matrix of the training inputs must be positive definite."
        fail(NumericalError, where, wanted, got="a failed factorisation", fix="drop repeated inputs, or pass float64")
    return state


def _nodes(prior: ScalePrior, like: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Values of v that stand for its prior, and their weights, both (M)."""
    centre = torch.zeros((), dtype=torch.float64, device=like.device)
    nodes = log_nodes(lambda u: prior.log_prob(u.exp()) + u, centre, num_nodes)
    return nodes.u.exp().to(like), nodes.log_weight.exp().to(like)
