r"""Pareto-smoothed importance weights and the shape k of their tail, which says whether to trust them.

The largest weights are replaced by expected order statistics of the generalised Pareto distribution that fits them. Its
shape k estimates how many moments the weights have: below 0.5 their variance is finite, up to 0.7 averages are reliable
in practice, above 1 not even the mean exists.

References: Vehtari, Simpson, Gelman, Yao, Gabry (2024), arXiv 1507.02646; Zhang & Stephens (2009), A new and efficient
estimation method for the generalized Pareto distribution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def smooth(log_weight: Tensor) -> tuple[Tensor, float]:
    """Smoothed and normalised log weights (S), and k; the order of the weights stays as it was.

    Args:
        log_weight: (S), unnormalised; -inf is a weight of 0. One at least must be above that.

    Returns:
        Log weights whose exponentials sum to 1, and k: infinity where fewer than five weights make the tail, or where
        all of the tail is one number.
    """
    log_weight = log_weight.double() - log_weight.max()
    order = log_weight.argsort()
    num = len(order)
    num_tail = math.ceil(min(0.2 * num, 3 * math.sqrt(num)))
    # below this a weight is too small for its distance from the cutoff to be resolved
    smallest = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64, device=log_weight.device).log()
    cutoff = torch.maximum(log_weight[order[num - num_tail - 1]], smallest) if num > num_tail else smallest
    tail = order[log_weight[order] > cutoff]
    if len(tail) < 5:
        return torch.log_softmax(log_weight, 0), math.inf
    excess = log_weight[tail].exp() - cutoff.exp()
    if float(excess[-1]) <= 0 or float(excess[0]) == float(excess[-1]):
        return torch.log_softmax(log_weight, 0), math.inf
    shape, scale = fit_pareto(excess)
    level = (torch.arange(len(tail), dtype=torch.float64, device=excess.device) + 0.5) / len(tail)
    if abs(shape) > 1e-12:
        quantile = scale * torch.expm1(-shape * torch.log1p(-level)) / shape
    else:
        quantile = -scale * torch.log1p(-level)
    smoothed = log_weight.clone()
    smoothed[tail] = (quantile + cutoff.exp()).log().clamp(max=0.0)
    return torch.log_softmax(smoothed, 0), shape


def fit_pareto(excess: Tensor) -> tuple[float, float]:
    r"""Shape k and scale of the generalised Pareto density (1 + k x / scale)^(-1/k - 1) / scale, from sorted x (n).

    The empirical Bayes estimate of Zhang & Stephens: with theta = -k / scale, the profile likelihood is averaged over a
    grid of theta, whose prior is itself Pareto. The shape is then drawn a little towards 0.5, by the weight of ten
    observations, which steadies it for small n.
    """
    n = len(excess)
    num = 30 + math.isqrt(n)
    index = torch.arange(1, num + 1, dtype=torch.float64, device=excess.device)
    quartile = excess[max(0, math.floor(n / 4 + 0.5) - 1)].clamp(min=torch.finfo(torch.float64).tiny)
    theta = 1 / excess[-1] + (1 - (num / (index - 0.5)).sqrt()) / (3 * quartile)
    shape = torch.log1p(-theta.unsqueeze(-1) * excess).mean(-1)
    profile = n * ((-theta / shape).log() - shape - 1)
    weight = torch.softmax(torch.where(profile.isfinite(), profile, -torch.inf), 0)
    best = (weight * torch.where(weight > 0, theta, 0.0)).sum()
    found = float(torch.log1p(-best * excess).mean())
    return (n * found + 5.0) / (n + 10), -found / float(best)
