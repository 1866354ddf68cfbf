r"""Expected log likelihoods under a Gaussian (or scale-mixed Gaussian) f, with the slopes that variational fits need.

    E(mean, v) = sum_i E[ log p(y_i | f_i) ],    f_i ~ N(mean_i, c v_i),    c a random scale or 1

For Gaussian f the slopes are expectations themselves (Bonnet, Price): dE/dmean = E[(log p)'] and
dE/dv = E[c (log p)''] / 2. Both are unbiased where the expectation is by draws, and the second is never positive for a
log-concave likelihood, so that a natural-gradient step with it keeps q a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayesdl.ops.inducing import gauss_hermite

_QUADRATURE_DEGREE = 24


class Scales(NamedTuple):
    """A discrete distribution of the random scale c of each problem: values and weights, (P K) each."""

    value: Tensor
    weight: Tensor


class Expectation(NamedTuple):
    """E summed over points and latent functions, with slopes.

    Attributes:
        value: (P).
        by_mean: (P L B).
        by_variance: (P L B), at most 0.
        by_noise: (P) slope in the noise variance; 0 where there is none.
        by_node: (P K) the expectation given each value of the scale: the slope in its weight.
    """

    value: Tensor
    by_mean: Tensor
    by_variance: Tensor
    by_noise: Tensor
    by_node: Tensor


Expected = Callable[[Tensor, Tensor, Tensor], Expectation]


def gaussian(noise_variance: Tensor) -> Expected:
    """y_i ~ N(f_i, s), in closed form; one latent function and no random scale. s: (P)."""

    def expected(mean: Tensor, variance: Tensor, y: Tensor) -> Expectation:
        s = noise_variance.unsqueeze(-1)
        gap = y - mean.squeeze(-2)
        squares = gap.square() + variance.squeeze(-2)
        value = -0.5 * ((2 * math.pi * s).log() + squares / s).sum(-1)
        by_noise = 0.5 * (squares / s - 1).sum(-1) / noise_variance
        by_mean = (gap / s).unsqueeze(-2)
        by_variance = (-0.5 / s).unsqueeze(-2).expand_as(by_mean)
        return Expectation(value, by_mean, by_variance, by_noise, value.unsqueeze(-1))

    return expected


def bernoulli(scales: Scales) -> Expected:
    """P(y_i = 1) = sigmoid(f_i), by Gauss-Hermite quadrature of degree 24 for each value of the scale."""

    def expected(mean: Tensor, variance: Tensor, y: Tensor) -> Expectation:
        node, weight = gauss_hermite(_QUADRATURE_DEGREE, mean)
        mean, variance = mean.squeeze(-2), variance.squeeze(-2)
        c = scales.value[..., None]
        spread = (c * variance.unsqueeze(-2)).sqrt()  # (P K B)
        f = mean[:, None, :, None] + spread.unsqueeze(-1) * node
        p = torch.sigmoid(f)
        sign = 2 * y - 1
        by_node = (logsigmoid(sign[:, None, :, None] * f) @ weight).sum(-1)
        slope = y.unsqueeze(-2) - p @ weight
        bend = -0.5 * c * ((p * (1 - p)) @ weight)
        by_mean, by_variance = _average(slope, scales), _average(bend, scales)
        value = (scales.weight * by_node).sum(-1)
        return Expectation(value, by_mean.unsqueeze(-2), by_variance.unsqueeze(-2), torch.zeros_like(value), by_node)

    return expected


def categorical(scales: Scales, noise: Tensor) -> Expected:
    """p(y_i = c) = softmax(f_i)_c, by draws; `noise` (S L B) is standard normal and serves every value of the scale.

    For one value of the scale, a draw of the scale is shared by all points and classes, as the model has it.
    """

    def expected(mean: Tensor, variance: Tensor, y: Tensor) -> Expectation:
        c = scales.value[:, :, None, None]  # (P K 1 1)
        spread = (c * variance.unsqueeze(-3)).sqrt()  # (P K L B)
        f = mean[:, None, None] + spread.unsqueeze(2) * noise[..., : mean.shape[-1]]  # (P K S L B)
        log_p = torch.log_softmax(f, -2)
        label = y.long()
        chosen = label[:, None, None, None, :].expand(*log_p.shape[:-2], 1, -1)
        by_node = log_p.gather(-2, chosen).squeeze(-2).mean(2).sum(-1)
        p = log_p.exp_()
        here = torch.zeros_like(mean).scatter_(-2, label.unsqueeze(-2), 1.0)
        slope = here.unsqueeze(1) - p.mean(2)
        bend = -0.5 * c * (p - p.square()).mean(2)
        value = (scales.weight * by_node).sum(-1)
        by_mean, by_variance = _average(slope, scales), _average(bend, scales)
        return Expectation(value, by_mean, by_variance, torch.zeros_like(value), by_node)

    return expected


def _average(value: Tensor, scales: Scales) -> Tensor:
    """Mean over the values of the scale, axis 1 of (P K ...)."""
    weight = scales.weight.reshape(*scales.weight.shape, *[1] * (value.ndim - 2))
    return (weight * value).sum(1)
