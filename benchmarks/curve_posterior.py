"""The posterior of a learning curve under the prior of `LearningCurves` itself, by NUTS: what the network imitates.

A curve is K weights, the noise and the parameters of K families. In the coordinates z that the chains move in, every
one of them is N(0, 1) before any data: a uniform variable is its range times Phi(z), a normal one mean + sd z, and the
links of the laws follow. The condition of the prior, that the curve rises and stays in [0, 1], is a hard wall.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl import _doors
from bayesdl.models.log_density import LogDensity
from bayesdl.priors.tasks import LearningCurves
from bayesdl.samplers import nuts

CHAINS, WARMUP, DRAWS, DEPTH = 4, 500, 1000, 6
_POOL = 5000  # prior curves among which each posterior looks for its starts
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class Answer(NamedTuple):
    """What NUTS finds for G curves: mean log score of the rest, worst R-hat and ESS of what is predicted, and so on."""

    score: Tensor
    rhat: Tensor
    ess: Tensor
    divergences: Tensor
    gradients: Tensor
    seconds: Tensor


def latents_of(prior: LearningCurves, z: Tensor) -> dict[str, Tensor]:
    """Weights, noise and parameters at whitened z (*b, D)."""
    count = len(prior.components)
    weights, noise, rest = z[..., :count], z[..., count], z[..., count + 1 :]
    found = {"weights": torch.special.ndtr(weights), "noise": (prior.noise.loc + prior.noise.scale * noise).exp()}
    for i, (name, law) in enumerate(prior.parameter_laws().items()):
        level = torch.special.ndtr(rest[..., i]) if law.kind == "uniform" else rest[..., i]
        width = law.second - law.first if law.kind == "uniform" else law.second
        value = law.first + width * level
        found[name] = value if law.link == "identity" else value.exp() if law.link == "exp" else 1 - value.exp()
    return found


def whitened(prior: LearningCurves, latents: dict[str, Tensor]) -> Tensor:
    """The inverse of `latents_of`: z (*b, D)."""
    noise = (latents["noise"].log() - prior.noise.loc) / prior.noise.scale
    parts = [*torch.special.ndtri(latents["weights"]).unbind(-1), noise]
    for name, law in prior.parameter_laws().items():
        value = latents[name]
        if law.link != "identity":
            value = (value if law.link == "exp" else 1 - value).log()
        if law.kind == "uniform":
            parts.append(torch.special.ndtri((value - law.first) / (law.second - law.first)))
        else:
            parts.append((value - law.first) / law.second)
    return torch.stack(parts, -1)


def log_scores(prior: LearningCurves, latents: dict[str, Tensor], t: Tensor, y: Tensor) -> Tensor:
    """log N(y | f(t), sigma^2) of accuracies y (*b, n) at t (n), under latents (*b)."""
    sigma = latents["noise"].unsqueeze(-1)
    shape = torch.broadcast_shapes(y.shape, (*latents["noise"].shape, t.shape[-1]))
    return -0.5 * ((y - prior.curve(t.expand(shape), latents)) / sigma).square() - sigma.log() - _LOG_ROOT_2PI


def log_posterior(prior: LearningCurves, y: Tensor) -> LogDensity:
    """Unnormalised log density of z (G, C, D) given the first n accuracies y (G, n) of each of G curves."""
    t = prior.times(y)

    def density(z: Tensor) -> Tensor:
        latents = latents_of(prior, z)
        fit = log_scores(prior, latents, t[: y.shape[-1]], y.unsqueeze(-2)).sum(-1)
        with torch.no_grad():
            f = prior.curve(t.expand(*z.shape[:-1], -1), latents)
            inside = (f[..., -1] > f[..., 0]) & (f >= 0.0).all(-1) & (f <= 1.0).all(-1)
        # a wall, not a slope: the gradient stays that of the inside
        return fit - 0.5 * z.square().sum(-1) + torch.where(inside, 0.0, -math.inf)

    return LogDensity(density, len(prior.components) + 1 + len(prior.parameter_laws()))


def starts(prior: LearningCurves, y: Tensor, seed: int) -> Tensor:
    """For each curve the CHAINS most likely of many prior curves, (G, CHAINS, D): in several modes where there are."""
    generator = torch.Generator().manual_seed(seed)
    pool = prior.sample(_POOL, prior.horizon, 1, generator).latents
    t = prior.times(y)[: y.shape[-1]]
    fit = torch.stack([log_scores(prior, pool, t, each).sum(-1) for each in y])
    return whitened(prior, pool)[fit.topk(CHAINS, -1).indices]


def answer(prior: LearningCurves, y: Tensor, n: int, seed: int) -> Answer:
    """NUTS given the first n of each curve y (G, horizon), in accuracies; scored on the others."""
    began = time.process_time()
    run = nuts.run(
        log_posterior(prior, y[:, :n]), starts(prior, y[:, :n], seed), num_warmup=WARMUP, num_draws=DRAWS,
        max_depth=DEPTH, target_accept=0.9, seed=seed,
    )  # fmt: skip
    t = prior.times(y)
    latents = latents_of(prior, run.draws.flatten(1, 2))  # (G, C N)
    logs = log_scores(prior, latents, t[n:], y[:, None, n:])
    score = (logs.logsumexp(1) - math.log(logs.shape[1])).mean(-1)
    seconds = time.process_time() - began
    ends = t[[n, (n + len(t)) // 2, -1]]
    told = latents_of(prior, run.draws)
    f = prior.curve(ends.expand(*told["noise"].shape, -1), told)
    judged = torch.cat([f, told["noise"].log().unsqueeze(-1)], -1)
    worst = [_doors.arviz_convergence(each) for each in judged]
    return Answer(
        score,
        torch.tensor([each["rhat"] for each in worst], dtype=y.dtype),
        torch.tensor([each["ess_bulk"] for each in worst], dtype=y.dtype),
        run.stats["diverging"].double().mean((-1, -2)),
        torch.full((len(y),), float(run.num_gradients), dtype=y.dtype),
        torch.full((len(y),), seconds / len(y), dtype=y.dtype),
    )
