"""Models of posteriordb, unconstrained and batched, with the reference draws to compare with.

`compare` runs a sampler on one of them and says how far its moments are from the reference.

A model is one function from its data to a `Problem`: the log density of an unconstrained position (log Jacobians
included) and the way back to the named quantities of the reference. Another posterior is one function more, listed in
`MODELS` under the name of its files in the folder `posteriordb` of BAYESDL_DATA.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from bayesdl.inference.sample import Chains, sample
from bayesdl.models.log_density import LogDensity


class Problem(NamedTuple):
    """A log density on R^dim and the map from draws (C, N, dim) to named quantities."""

    log_density: LogDensity
    transform: Callable[[Tensor], dict[str, Tensor]]


class Reference(NamedTuple):
    """Reference draws (chains, draws, parameters) in the constrained space, the parameters' names, and the data."""

    draws: np.ndarray
    names: list[str]
    data: dict[str, Any]


def load(folder: Path, name: str) -> Reference:
    """The reference draws and the data of one posterior; `folder` is the one that BAYESDL_DATA names."""
    archive = np.load(folder / "posteriordb" / f"{name}.npz")
    data = json.loads((folder / "posteriordb" / f"{name}.data.json").read_text(encoding="utf-8"))
    return Reference(archive["draws"], [str(n) for n in archive["names"]], data)


def eight_schools_noncentered(data: dict[str, Any]) -> Problem:
    """theta_j = mu + tau z_j, z_j ~ N(0, 1), mu ~ N(0, 5), tau ~ HalfCauchy(5), y_j ~ N(theta_j, sigma_j).

    Position: z, mu, log tau.
    """
    y, sigma = _tensor(data["y"]), _tensor(data["sigma"])
    num = len(y)

    def split(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q[..., :num], q[..., num], q[..., num + 1]

    def log_density(q: Tensor) -> Tensor:
        z, mu, log_tau = split(q)
        theta = mu.unsqueeze(-1) + log_tau.exp().unsqueeze(-1) * z
        prior = -0.5 * z.square().sum(-1) - 0.5 * (mu / 5).square() - torch.log1p((log_tau.exp() / 5).square())
        return prior + log_tau - 0.5 * ((y - theta) / sigma).square().sum(-1)

    def transform(q: Tensor) -> dict[str, Tensor]:
        z, mu, log_tau = split(q)
        return {"theta": mu.unsqueeze(-1) + log_tau.exp().unsqueeze(-1) * z, "mu": mu, "tau": log_tau.exp()}

    return Problem(LogDensity(log_density, num + 2), transform)


def bayesian_linear_regression(data: dict[str, Any]) -> Problem:
    """y ~ N(X beta, sigma), beta ~ N(0, 10), sigma ~ HalfN(10). Position: beta, log sigma."""
    x, y = _tensor(data["X"]), _tensor(data["y"])
    n, d = x.shape

    def log_density(q: Tensor) -> Tensor:
        beta, log_sigma = q[..., :d], q[..., d]
        squares = (y - beta @ x.T).square().sum(-1)
        prior = -0.5 * (beta / 10).square().sum(-1) - 0.5 * (log_sigma.exp() / 10).square()
        return prior + log_sigma - n * log_sigma - 0.5 * squares * (-2 * log_sigma).exp()

    return Problem(LogDensity(log_density, d + 1), lambda q: {"beta": q[..., :d], "sigma": q[..., d].exp()})


def autoregression(data: dict[str, Any]) -> Problem:
    """y_t ~ N(alpha + sum_k beta_k y_{t-k}, sigma) for t > K; alpha, beta_k ~ N(0, 10), sigma ~ HalfCauchy(2.5).

    Position: alpha, beta, log sigma.
    """
    y, order = _tensor(data["y"]), int(data["K"])
    lags = torch.stack([y[order - k - 1 : len(y) - k - 1] for k in range(order)], -1)
    x, target = torch.cat([torch.ones_like(lags[:, :1]), lags], -1), y[order:]

    def log_density(q: Tensor) -> Tensor:
        beta, log_sigma = q[..., :-1], q[..., -1]
        prior = -0.5 * (beta / 10).square().sum(-1) + _half_cauchy(log_sigma, 2.5)
        return prior + _normal_errors(target - beta @ x.T, log_sigma)

    def transform(q: Tensor) -> dict[str, Tensor]:
        return {"alpha": q[..., 0], "beta": q[..., 1:-1], "sigma": q[..., -1].exp()}

    return Problem(LogDensity(log_density, order + 2), transform)


def kid_score_interaction(data: dict[str, Any]) -> Problem:
    """kid_score ~ N(b1 + b2 mom_hs + b3 mom_iq + b4 mom_hs mom_iq, sigma), sigma ~ HalfCauchy(2.5), b flat.

    Position: R b and log sigma, with R from X = QR: mom_iq lies near 100, which makes b itself nearly collinear.
    """
    score, school, iq = (_tensor(data[name]) for name in ("kid_score", "mom_hs", "mom_iq"))
    q_factor, r_factor = torch.linalg.qr(torch.stack([torch.ones_like(iq), school, iq, school * iq], -1))
    width = len(score) ** 0.5  # coefficients of a basis whose columns have mean square 1

    def log_density(q: Tensor) -> Tensor:
        errors = score - width * q[..., :4] @ q_factor.T * score.std()
        return _half_cauchy(q[..., 4], 2.5) + _normal_errors(errors, q[..., 4])

    def transform(q: Tensor) -> dict[str, Tensor]:
        rotated = (width * score.std() * q[..., :4]).unsqueeze(-1)
        beta = torch.linalg.solve_triangular(r_factor, rotated, upper=True).squeeze(-1)
        return {"beta": beta, "sigma": q[..., 4].exp()}

    return Problem(LogDensity(log_density, 5), transform)


def gp_regression(data: dict[str, Any]) -> Problem:
    """y ~ N(0, alpha^2 exp(-|x - x'|^2 / (2 rho^2)) + sigma I), sigma on the diagonal as it is, not squared.

    rho ~ Gamma(25, rate 4), alpha ~ HalfN(2), sigma ~ HalfN(1). Position: log rho, log alpha, log sigma.
    """
    x, y = _tensor(data["x"]), _tensor(data["y"])
    squares, eye = (x.unsqueeze(-1) - x).square(), torch.eye(len(x), dtype=torch.float64)

    def log_density(q: Tensor) -> Tensor:
        log_rho, log_alpha, log_sigma = q.unbind(-1)
        rho, alpha, sigma = q.exp().unbind(-1)
        scaled = torch.exp(-0.5 * squares / rho.square()[..., None, None])
        k = alpha.square()[..., None, None] * scaled + sigma[..., None, None] * eye
        chol, failed = torch.linalg.cholesky_ex(k)
        white = torch.linalg.solve_triangular(chol, y.expand(*q.shape[:-1], -1).unsqueeze(-1), upper=False)
        fit = -0.5 * white.square().sum((-2, -1)) - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        prior = 24 * log_rho - 4 * rho - 0.5 * (alpha / 2).square() - 0.5 * sigma.square()
        return torch.where(failed == 0, fit + prior + log_rho + log_alpha + log_sigma, -torch.inf)

    return Problem(
        LogDensity(log_density, 3), lambda q: dict(zip(("rho", "alpha", "sigma"), q.exp().unbind(-1), strict=True))
    )


def gaussian_mixture(data: dict[str, Any]) -> Problem:
    """theta N(mu_1, s_1) + (1 - theta) N(mu_2, s_2), mu_1 < mu_2; mu ~ N(0, 2), s ~ HalfN(2), theta ~ Beta(5, 5).

    Position: mu_1, log(mu_2 - mu_1), log s, logit theta.
    """
    y = _tensor(data["y"])

    def split(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.stack([q[..., 0], q[..., 0] + q[..., 1].exp()], -1), q[..., 2:4], q[..., 4]

    def log_density(q: Tensor) -> Tensor:
        mu, log_s, logit = split(q)
        log_theta = torch.stack([-torch.nn.functional.softplus(-logit), -torch.nn.functional.softplus(logit)], -1)
        z = (y - mu.unsqueeze(-1)) * (-log_s).exp().unsqueeze(-1)
        parts = (log_theta - log_s).unsqueeze(-1) - 0.5 * z.square()
        prior = -0.5 * (mu / 2).square().sum(-1) - 0.5 * (log_s.exp() / 2).square().sum(-1) + 4 * log_theta.sum(-1)
        jacobian = q[..., 1] + log_s.sum(-1) + log_theta.sum(-1)
        return parts.logsumexp(-2).sum(-1) + prior + jacobian

    def transform(q: Tensor) -> dict[str, Tensor]:
        mu, log_s, logit = split(q)
        return {"mu": mu, "sigma": log_s.exp(), "theta": logit.sigmoid()}

    return Problem(LogDensity(log_density, 5), transform)


def garch(data: dict[str, Any]) -> Problem:
    """y_t ~ N(mu, s_t), s_1 = sigma1, s_t^2 = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 s_{t-1}^2; flat priors.

    alpha0 > 0, alpha1 in (0, 1), beta1 in (0, 1 - alpha1). Position: mu, log alpha0, logit alpha1 and the logit of
    beta1 / (1 - alpha1).
    """
    y, first = _tensor(data["y"]), float(data["sigma1"])
    num = len(y)

    def split(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha1 = q[..., 2].sigmoid()
        return q[..., 0], q[..., 1].exp(), alpha1, (1 - alpha1) * q[..., 3].sigmoid()

    def log_density(q: Tensor) -> Tensor:
        mu, alpha0, alpha1, beta1 = split(q)
        squares = (y - mu.unsqueeze(-1)).square()
        news = alpha0.unsqueeze(-1) + alpha1.unsqueeze(-1) * squares[..., :-1]
        variance = torch.cat([torch.full_like(news[..., :1], first**2), news], -1)
        # v_t = news_t + beta1 v_{t-1} for all t by doubling: after each round v_t holds twice as much of the past
        lag, weight = 1, beta1.unsqueeze(-1)
        while lag < num:
            shifted = torch.nn.functional.pad(variance[..., :-lag], (lag, 0))
            variance, lag, weight = variance + weight * shifted, 2 * lag, weight.square()
        softplus = torch.nn.functional.softplus
        jacobian = q[..., 1] - softplus(q[..., 2:]).sum(-1) - softplus(-q[..., 2:]).sum(-1) + (1 - alpha1).log()
        return jacobian - 0.5 * (variance.log() + squares / variance).sum(-1)

    return Problem(
        LogDensity(log_density, 4),
        lambda q: dict(zip(("mu", "alpha0", "alpha1", "beta1"), split(q), strict=True)),
    )


MODELS: dict[str, Callable[[dict[str, Any]], Problem]] = {
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "sblri-blr": bayesian_linear_regression,
    "arK-arK": autoregression,
    "kidiq-kidscore_interaction": kid_score_interaction,
    "gp_pois_regr-gp_regr": gp_regression,
    "low_dim_gauss_mix-low_dim_gauss_mix": gaussian_mixture,
    "garch-garch11": garch,
}


def stacked(values: dict[str, Tensor]) -> tuple[np.ndarray, list[str]]:
    """Named quantities as one array (C, N, parameters), with names as in posteriordb: vectors as "theta[1]", …"""
    columns, names = [], []
    for name, value in values.items():
        array = value.numpy()
        if array.ndim == 2:
            columns.append(array)
            names.append(name)
        else:
            columns += list(np.moveaxis(array, -1, 0))
            names += [f"{name}[{i + 1}]" for i in range(array.shape[-1])]
    return np.stack(columns, -1), names


SAMPLERS = ("hmc", "nuts", "chees", "mams", "smc")
_SETTINGS: dict[str, dict[str, Any]] = {
    "hmc": {"num_chains": 32, "num_warmup": 300, "num_draws": 200, "target_accept": 0.9, "num_steps": 32},
    "nuts": {"num_chains": 32, "num_warmup": 300, "num_draws": 150, "target_accept": 0.9, "max_depth": 7},
    "chees": {"num_chains": 32, "num_warmup": 300, "num_draws": 400, "target_accept": 0.9},
    "mams": {"num_chains": 32, "num_warmup": 400, "num_draws": 400},
    "smc": {"num_chains": 32, "num_draws": 500},
}
# A mixture has another mode, far below, in which one component takes all the data and the other follows its prior. Of
# 32 chains from scattered starts one or two end there and stay, which `diagnostics["stuck_chains"]` says.
_STARTS: dict[str, dict[str, Any]] = {"low_dim_gauss_mix-low_dim_gauss_mix": {"initial": "pathfinder"}}


class Comparison(NamedTuple):
    """How far the moments of a run are from the reference.

    Attributes:
        names: The parameters, twice: means, then standard deviations.
        z: Distance over Monte Carlo error, the reference's error counted too.
        relative_error: That error over the posterior's standard deviation.
        chains: The run.
    """

    names: list[str]
    z: np.ndarray
    relative_error: np.ndarray
    chains: Chains

    def row(self) -> dict[str, Any]:
        """The case as a line of a table."""
        found, worst = self.chains.diagnostics, int(np.abs(self.z).argmax())
        return {
            "holds": bool(np.abs(self.z).max() < 4),
            "largest_z": round(float(np.abs(self.z).max()), 2),
            "where": f"{'mean' if worst < len(self.z) // 2 else 'sd'} of {self.names[worst]}",
            "moments": len(self.z),
            "largest_error": round(float(self.relative_error.max()), 4),
            "rhat": round(found["rhat"], 4),
            "ess_bulk": round(found["ess_bulk"]),
            "divergences": found["divergences"],
            "num_gradients": found["num_gradients"],
            "seconds": round(found["seconds"], 1),
        }


def compare(folder: Path, name: str, sampler: str, seed: int, **settings: Any) -> Comparison:
    """Run `sampler` on the posterior `name` of the folder that BAYESDL_DATA names."""
    reference = load(folder, name)
    problem = MODELS[name](reference.data)
    chosen = {**_SETTINGS[sampler], **_STARTS.get(name, {}), **settings}
    chains = sample(problem.log_density, sampler=sampler, transform=problem.transform, seed=seed, **chosen)
    draws, names = stacked(chains.values)
    assert names == reference.names, (names, reference.names)
    # The particles of one island are copies of one another's ancestors: only islands are independent.
    ours, our_error = _island_moments(draws) if sampler == "smc" else moments(draws)
    theirs, their_error = moments(reference.draws)
    error = np.hypot(our_error, their_error)
    width = np.tile(theirs[len(names) :], 2)
    return Comparison(names * 2, (ours - theirs) / error, error / width, chains)


def moments(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means, then standard deviations, of draws (C, N, parameters), and the Monte Carlo error of each.

    Both errors come from the effective sample size of the very quantity that is averaged: that of the squared
    deviations for a standard deviation, by var(sd) = var(sd^2) / (4 sd^2). HMC draws can be better than independent
    ones for the mean and worse for the variance, so one effective sample size for both would not do.
    """
    axes = {"chain_axis": 0, "draw_axis": 1}
    mean, sd = draws.mean((0, 1)), draws.std((0, 1))
    of_mean = array_stats.mcse(draws, method="mean", **axes)
    of_sd = array_stats.mcse((draws - mean) ** 2, method="mean", **axes) / (2 * sd)
    return np.concatenate([mean, sd]), np.concatenate([of_mean, of_sd])


def _island_moments(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`moments` with the errors taken from the scatter between islands (C)."""
    mean, sd = draws.mean((0, 1)), draws.std((0, 1))
    root = len(draws) ** 0.5
    of_mean = draws.mean(1).std(0, ddof=1) / root
    of_sd = ((draws - mean) ** 2).mean(1).std(0, ddof=1) / root / (2 * sd)
    return np.concatenate([mean, sd]), np.concatenate([of_mean, of_sd])


def _half_cauchy(log_sigma: Tensor, scale: float) -> Tensor:
    """sigma ~ HalfCauchy(scale), as a density of log sigma."""
    return log_sigma - torch.log1p((log_sigma.exp() / scale).square())


def _normal_errors(errors: Tensor, log_sigma: Tensor) -> Tensor:
    """errors (..., n) ~ N(0, sigma), independent."""
    squares = errors.square().sum(-1)
    return -errors.shape[-1] * log_sigma - 0.5 * squares * (-2 * log_sigma).exp()


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
