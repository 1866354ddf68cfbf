r"""Tempered sequential Monte Carlo for Bayesian neural networks: draws of the posterior and its log evidence.

Particles start as draws of the prior and travel to the posterior through p(q) p(y | q)^t, t from 0 to 1. The mean
weights on the way estimate the evidence p(y), by which models can be compared, and particles that start everywhere
find modes between which a chain would not cross. Islands are independent populations: their agreement is the check.

Reference: Del Moral, Doucet, Jasra (2006); Buchholz, Chopin, Jacob (2021), arXiv 1808.07730.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bayesdl import _checks, _doors
from bayesdl._random import Seed, generator
from bayesdl.errors import NumericalError, SettingError, fail
from bayesdl.inference._fitting import NetworkProblem, network_problem, warn_unless
from bayesdl.models import BNN, WeightSpace
from bayesdl.posterior import DrawsPosterior
from bayesdl.samplers import smc
from bayesdl.samplers.base import summarize
from bayesdl.samplers.smc import Population


@dataclass(frozen=True)
class SMC:
    """Tempered SMC on all weights and the noise of a network, with HMC moves.

    Attributes:
        model: The network, its prior and its likelihood; every learned parameter of the likelihood needs a prior.
        num_particles: Particles of an island.
        num_islands: Independent populations, run side by side; the chains of the posterior.
        ess_target: Share of the particles that each step in temperature keeps effective; more costs more stages.
        target_accept: Acceptance rate that the step sizes aim at.
        metric: "auto", "diagonal" or "dense" covariance of the particles as inverse mass.
        max_correlation: Correlation with the start of a stage below which its moves end.
        max_moves: HMC transitions of a stage at most.
        max_steps: Leapfrog steps of a transition at most.
        standardize: Fit in standardised inputs and targets; everything comes back in the user's units.
        progress: Show a bar with temperature, step size and acceptance.
        checkpoint: A folder to save the run to and to resume it from, None for none; see `samplers.base`.
        max_gradients: A budget of gradients for each island, all particles together.
        chain_batch: How many particles to evaluate at a time, which bounds the memory; None for all.
        compile: Whether value and gradient go through torch.compile.
    """

    model: BNN
    num_particles: int = 256
    num_islands: int = 4
    ess_target: float = 0.7
    target_accept: float = 0.8
    metric: Literal["auto", "diagonal", "dense"] = "auto"
    max_correlation: float = 0.2
    max_moves: int = 20
    max_steps: int = 64
    standardize: bool = True
    progress: bool = False
    checkpoint: str | None = None
    max_gradients: int | None = None
    chain_batch: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        _checks.at_least("SMC", "num_particles", self.num_particles, 16, integer=True)
        for name in ("num_islands", "max_moves", "max_steps"):
            _checks.at_least("SMC", name, getattr(self, name), 1, integer=True)
        for name in ("ess_target", "target_accept", "max_correlation"):
            _checks.inside("SMC", name, getattr(self, name), 0.0, 1.0)
        _checks.choice("SMC", "metric", self.metric, ("auto", "diagonal", "dense"))

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> DrawsPosterior:
        """Sample the posterior of the network given x (*b, n, d) and y (*b, n) or (*b, n, k), and estimate p(y).

        `log_evidence` of the posterior is log p(y | x) in the user's units, under the prior in the units in which the
        network was fitted. `diagnostics` holds its standard error and what each island found.

        Data sets along *b are independent and sampled at the same time; each gets the draws that it would get alone.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used.
            SettingError: A learned parameter of the likelihood has no prior.
            NumericalError: The log density is not finite at any draw of the prior.

        Warns:
            ConvergenceWarning: Islands disagree about function values (R-hat above 1.05) or about the log evidence
                (by more than 1), or the budget was spent long before temperature 1.

        Cost: tens to hundreds of gradients a particle, each O(n num_weights), more the more the data say.
        """
        problem = network_problem("SMC.fit", self.model, x, y, standardize=self.standardize)
        population = smc.run(
            problem.space.bind(problem.x, problem.y),
            _Prior(problem.space, problem.x.new_zeros(())),
            num_particles=self.num_particles,
            num_islands=self.num_islands,
            groups=tuple(problem.data.batch_shape),
            ess_target=self.ess_target,
            target_accept=self.target_accept,
            metric=self.metric,
            max_correlation=self.max_correlation,
            max_moves=self.max_moves,
            max_steps=self.max_steps,
            seed=seed,
            progress=self.progress,
            checkpoint=self.checkpoint,
            max_gradients=self.max_gradients,
            chain_batch=self.chain_batch,
            compile=self.compile,
        )
        diagnostics = _diagnose(problem, population)
        _warn(diagnostics, self.ess_target)
        evidence = population.log_evidence
        if problem.space.likelihood.task == "regression":
            # a density of y: standardised targets are y_scale times smaller, each
            evidence = evidence - problem.data.y.shape[-2] * problem.units.y_scale.log().sum((-2, -1)).to(evidence)
        stats = {} if problem.data.batch_shape else population.run.stats
        return DrawsPosterior(
            self.model, problem.data, problem.units, diagnostics, evidence, draws=population.run.draws, stats=stats
        )


class _Prior:
    """The prior of a network's coordinates q = (z, u) as a reference: z standardised weights, u = log(v - lower)."""

    def __init__(self, space: WeightSpace, like: Tensor) -> None:
        self._space, self._like = space, like
        for p in space.likelihood.parameters():
            if p.prior is None:
                wanted = f"{p.name} needs a prior: without one there is no evidence."
                fix = "bdl.Gaussian() has one, or pass prior=bdl.hyper.LogNormal(...)"
                fail(SettingError, "SMC.fit", wanted, got="prior=None", fix=fix)

    def sample(self, num: int, seed: int) -> Tensor:
        """Draws of weights and parameters, (num, D); those of a parameter lie above its lower bound."""
        g = generator(seed, self._like.device)
        space = self._space
        pieces = [space.prior.sample((num, space.network.num_weights), g, self._like.dtype)]
        for p in space.likelihood.parameters():
            value = p.prior.sample((num, space.k), g)
            for _ in range(1000):
                if bool((value > p.lower).all()):
                    break
                value = torch.where(value > p.lower, value, p.prior.sample((num, space.k), g))
            else:
                wanted = f"the prior of {p.name} must reach above its lower bound {p.lower:g}."
                fail(NumericalError, "SMC.fit", wanted, got=repr(p.prior), fix="lower the bound, or another prior")
            pieces.append((value - p.lower).log().to(self._like.dtype))
        return torch.cat([piece.to(self._like.device) for piece in pieces], -1)

    def log_prob(self, q: Tensor) -> Tensor:
        """Log density of q (*g, C, D), shape (*g, C)."""
        space = self._space
        m = space.network.num_weights
        total = space.prior.log_prob(q[..., :m]) + q[..., m:].sum(-1)
        for i, p in enumerate(space.likelihood.parameters()):
            value = p.lower + q[..., m + i * space.k : m + (i + 1) * space.k].exp()
            total = total + p.prior.log_prob(value).sum(-1)
        return total


def _diagnose(problem: NetworkProblem, population: Population) -> dict[str, Any]:
    run = population.run
    found = {
        "engine": "SMC",
        "num_data": problem.data.x.shape[-2],
        "num_weights": problem.space.network.num_weights,
        **_doors.arviz_convergence(problem.probe_values(run.draws)),
        **{name: value for name, value in summarize(run).items() if name != "e_bfmi"},
        "log_evidence_error": population.log_evidence_error.tolist(),
        "island_spread": population.island_log_evidence.std(-1).tolist() if run.draws.shape[-3] > 1 else None,
        "num_stages": population.temperatures.isfinite().sum(-1).tolist(),
        "num_moves": population.num_moves.nansum(-1).tolist(),
        "lowest_ess": population.ess.nan_to_num(nan=1.0).amin(-1).tolist(),
        "num_origins": population.num_origins.tolist(),
    }
    if not problem.data.batch_shape:
        # ragged: an island's temperatures end where it arrived
        found["trace"] = {"temperature": [row[row.isfinite()].tolist() for row in population.temperatures]}
    return found


def _warn(diagnostics: dict[str, Any], ess_target: float) -> None:
    rhat, spread = diagnostics["rhat"], diagnostics["island_spread"]
    more = "more particles, or a higher ess_target"
    warn_unless(
        not rhat > 1.05, "SMC.fit", f"islands disagree about function values (R-hat {rhat:.2f}, wanted < 1.05)", more
    )
    if spread is not None:
        widest = float(torch.as_tensor(spread).max())
        found = f"islands disagree about the log evidence by {widest:.1f} (wanted < 1)"
        warn_unless(widest <= 1, "SMC.fit", found, more)
    lowest = float(torch.as_tensor(diagnostics["lowest_ess"]).min())
    spent = diagnostics["stopped_by"] == "max_gradients"
    found = f"the budget was spent before temperature 1, at an effective share of {lowest:.0%} of the particles"
    warn_unless(not (spent and lowest < 0.5 * ess_target), "SMC.fit", found, "raise max_gradients, or fewer particles")
