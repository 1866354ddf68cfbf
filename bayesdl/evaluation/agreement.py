r"""How far one predictive is from another at the same inputs, as when an approximation is held against long-run HMC.

Distances of whole distributions, point by point: two posteriors may agree in RMSE and still differ on what is unknown.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from bayesdl.distributions import Bernoulli, Categorical
from bayesdl.errors import ShapeError, fail
from bayesdl.evaluation.scores import class_probabilities

__all__ = ["quantile_profile", "total_variation", "wasserstein2", "wasserstein2_of_profiles"]

NUM_NODES = 64
_EDGE = 5.0


def wasserstein2(p: Distribution, q: Distribution) -> Tensor:
    r"""2-Wasserstein distance of two predictives of a scalar, pointwise (*b), in the units of y.

        W2^2 = int_0^1 (Q_p(a) - Q_q(a))^2 da

    For two Normals W2^2 = (loc_p - loc_q)^2 + (scale_p - scale_q)^2; otherwise the integral by quadrature over
    a = Phi(u), which is as good as exact where the quantile functions are smooth in u (relative error about 1e-5, from
    the tails beyond five standard deviations).

    Raises:
        ShapeError: When the batch shapes differ.

    Cost: 64 quantiles of each per point.
    """
    _same_shape("wasserstein2", p, q)
    if isinstance(p, Normal) and isinstance(q, Normal):
        return torch.hypot(p.loc - q.loc, p.scale - q.scale)
    return wasserstein2_of_profiles(quantile_profile(p), quantile_profile(q))


def quantile_profile(predictive: Distribution) -> Tensor:
    """Quantiles at the 64 nodes of the W2 quadrature, shape (64, *b): enough to compare with any other later."""
    like = torch.as_tensor(predictive.mean)
    return predictive.quantile(torch.special.ndtr(_nodes(like)))


def wasserstein2_of_profiles(p: Tensor, q: Tensor) -> Tensor:
    """W2 from two results of `quantile_profile`, pointwise (*b)."""
    nodes = _nodes(p)
    weights = torch.exp(-0.5 * nodes.square())
    weights = (weights / weights.sum()).reshape(-1, *(1,) * (p.dim() - 1))
    return (weights * (p - q).square()).sum(0).sqrt()


def total_variation(p: Distribution, q: Distribution, *, num_nodes: int = 1000) -> Tensor:
    r"""Total variation distance of two predictives, pointwise (*b), between 0 and 1.

        sum_c |p_c - q_c| / 2  of a label,        int |p(y) - q(y)| dy / 2  of a scalar with a density

    The integral is the trapezoid rule over the range that holds all but 1e-6 of each tail of either; where a density is
    much narrower than that range, raise `num_nodes`. 1 minus it is what Izmailov et al. (2021) call agreement.

    Args:
        p: A predictive of a label, or one with `log_prob` and `quantile`.
        q: Another of the same kind.
        num_nodes: Points of the integral.

    Raises:
        ShapeError: When the batch shapes differ.
        NotImplementedError: A predictive of a scalar has no density, as with `noise=False`.

    Cost: num_nodes densities of each per point.

    Reference: Izmailov, Vikram, Hoffman, Wilson (2021), arXiv 2104.14421, section 6.
    """
    _same_shape("total_variation", p, q)
    if isinstance(p, Bernoulli | Categorical):
        return 0.5 * (class_probabilities(p) - class_probabilities(q)).abs().sum(-1)
    like = torch.as_tensor(p.mean)
    tails = torch.tensor([1e-6, 1 - 1e-6], dtype=like.dtype, device=like.device)
    ends = torch.stack([p.quantile(tails), q.quantile(tails)])  # (which, tail, *b)
    lower, upper = ends[:, 0].amin(0), ends[:, 1].amax(0)
    step = (upper - lower) / (num_nodes - 1)
    total, chunk = torch.zeros_like(like), 50
    for first in range(0, num_nodes, chunk):
        place = torch.arange(first, min(first + chunk, num_nodes), dtype=like.dtype, device=like.device)
        y = lower + step * place.reshape(-1, *(1,) * like.ndim)
        total += (p.log_prob(y).exp() - q.log_prob(y).exp()).abs().sum(0)
    return (0.5 * step * total).clamp(max=1.0)


def _nodes(like: Tensor) -> Tensor:
    # The trapezoid rule on u with normal weights: for smooth integrands the error falls faster than any power of h.
    return torch.linspace(-_EDGE, _EDGE, NUM_NODES, dtype=like.dtype, device=like.device)


def _same_shape(where: str, p: Distribution, q: Distribution) -> None:
    if p.batch_shape != q.batch_shape:
        fail(
            ShapeError,
            where,
            "both predictives must have one batch shape.",
            got=f"{tuple(p.batch_shape)} and {tuple(q.batch_shape)}",
            fix="predict at the same inputs",
        )
