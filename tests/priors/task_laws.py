"""What the tests of priors over tasks share: whitening by covariances that are written out by hand, and thresholds."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats

P_VALUE = 1e-5  # below it a Kolmogorov-Smirnov test speaks against the code: one false alarm in 100 000


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_follows(values, judge) -> None:
    """Kolmogorov-Smirnov against a SciPy law or a cdf, with one false alarm in 100 000."""
    values = np.asarray(values, dtype=np.float64).ravel()
    assert stats.kstest(values, getattr(judge, "cdf", judge)).pvalue > P_VALUE


def whitened(values: torch.Tensor, covariances: np.ndarray) -> np.ndarray:
    """L^{-1} y for each task: independent standard normal numbers if the covariances are right."""
    lower = np.linalg.cholesky(covariances)
    return np.linalg.solve(lower, values.double().numpy()[..., None])[..., 0]


def distances(x: np.ndarray, lengthscale: np.ndarray) -> np.ndarray:
    """Scaled distances r (batch n n) by differences, not by a product."""
    u = x / np.expand_dims(lengthscale, -2)
    return np.sqrt(((u[..., :, None, :] - u[..., None, :, :]) ** 2).sum(-1))


def rbf(r: np.ndarray) -> np.ndarray:
    return np.exp(-(r**2) / 2)


def matern(r: np.ndarray, nu: float) -> np.ndarray:
    """By the Bessel function, for any nu."""
    from scipy.special import gamma, kv

    a = np.sqrt(2 * nu) * np.maximum(r, 1e-12)
    return np.where(r < 1e-9, 1.0, 2 ** (1 - nu) / gamma(nu) * a**nu * kv(nu, a))


def arc_cosine(k: np.ndarray) -> np.ndarray:
    """E[relu(u) relu(v)] for centred normal (u, v) of covariance k: Cho and Saul (2009)."""
    sd = np.sqrt(np.einsum("...ii->...i", k))
    outer = sd[..., :, None] * sd[..., None, :]
    cosine = np.clip(k / outer, -1, 1)
    angle = np.arccos(cosine)
    return outer * (np.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)


def arc_sine(k: np.ndarray) -> np.ndarray:
    """E[erf(u) erf(v)] for centred normal (u, v) of covariance k: Williams (1997)."""
    a = 1 + 2 * np.einsum("...ii->...i", k)
    return 2 / math.pi * np.arcsin(np.clip(2 * k / np.sqrt(a[..., :, None] * a[..., None, :]), -1, 1))
