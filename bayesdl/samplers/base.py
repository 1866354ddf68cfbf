r"""What every sampler shares: the result of a run, the gradient of a log density, and the checks at the door.

A log density is any callable that maps positions q (*g, C, D) to values (*g, C): C chains of D coordinates, in *g
independent groups. It is unnormalised, unconstrained, differentiable by autograd, and natively batched, so that one
backward pass of the sum gives the gradient of every chain (a chain must not read the positions of another).

Four settings every sampler has:

- `checkpoint`, a folder. The run writes its state, its random streams and its draws there every few seconds (or less
  often, so that writing takes at most a twentieth of the time), and at its end. Called again with the same settings
  after it was killed, it goes on from there and makes the same draws, bit for bit, on the same kind of machine; once
  it is over it hands back what is there without computing a gradient. With a larger `num_draws` a run goes on behind
  its last draw, adapted as it is, and ends with the draws that one of that length would have had (the samplers of
  stochastic gradients, whose steps are laid out for a length, and SMC do not). A folder of a run with other settings is
  refused, and so is one whose log density has other values at the initial positions; `progress` may differ, and so may
  the last two settings of this list, at the price of rounding. One process at a time may use a folder.
- `max_gradients`, a budget of gradient evaluations per chain, warm-up and step-size searches included. No transition
  begins once it is spent, but for the one that gives the first draw, and `Run.stopped_by` says so. A budget that ends
  within warm-up leaves parameters that are not adapted well, and warns. The stochastic-gradient samplers count passes
  over all data.
- `chain_batch`: the log density is evaluated for at most this many chains at a time, which bounds the memory; the draws
  are the same up to rounding.
- `compile`: value and gradient go through torch.compile as one graph, for any number of chains. It pays where the log
  density consists of many small operations, costs some seconds at the first call, and changes draws by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bayesdl.errors import DtypeError, NumericalError, SettingError, ShapeError, fail
from bayesdl.samplers._gradients import ValueAndGradient

LogDensityFn: TypeAlias = Callable[[Tensor], Tensor]
ValueAndGrad: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


class Run(NamedTuple):
    """The draws of one run of a sampler and what happened on the way.

    Attributes:
        draws: Positions after warm-up, (*g, C, num_draws, D).
        stats: One value per chain and draw, each (*g, C, num_draws): "log_density" and "energy" (H = potential plus
            kinetic energy) of the draw, "energy_change" (H minus the H of the transition before, NaN for the first),
            "acceptance_rate", "diverging" (bool), "num_steps" (leapfrog steps), "step_size", and for NUTS "tree_depth"
            (doublings). A thinned run keeps the mean acceptance rate, whether any transition diverged, the sum of the
            steps and the greatest depth since the last kept draw.
        step_size: The frozen step size, (*g).
        inverse_mass: The frozen inverse mass matrix, (*g, D) for a diagonal, (*g, D, D) for a dense one,
            and of a low-rank one its diagonal.
        num_gradients: Gradient evaluations per chain: warm-up, the searches of the step size and sampling. For NUTS
            the mean over chains, rounded up, with those that a chain computes in vain beside longer trees.
        seconds: Wall-clock time of the whole run; of all its parts, where it was interrupted and resumed.
        trajectory_length: The frozen longest integration time of ChEES-HMC, (*g); None for other samplers.
        stopped_by: "num_draws", or "max_gradients" where that budget was spent first.
        log_evidence: Log normalising constant of the density, (*g), for samplers that estimate it; None for others.
        warmup_gradients: How many of `num_gradients` warm-up took.
        warmup_seconds: How many of `seconds`.
    """

    draws: Tensor
    stats: dict[str, Tensor]
    step_size: Tensor
    inverse_mass: Tensor
    num_gradients: int
    seconds: float
    trajectory_length: Tensor | None = None
    stopped_by: str = "num_draws"
    log_evidence: Tensor | None = None
    warmup_gradients: int = 0
    warmup_seconds: float = 0.0


def value_and_grad(
    log_density: LogDensityFn, *, chain_batch: int | None = None, compile: bool = False
) -> ValueAndGradient:
    """The log density and its gradient at q (*g, C, D), by one backward pass of the sum.

    Components of the gradient that are not finite become 0. An integrator driven by any fixed field stays reversible
    and volume preserving, so the accept step keeps the target exact, and no position ever turns into NaN, which the
    argument checks of torch.distributions and LAPACK would answer with an exception for all chains at once.

    Args:
        log_density: Maps positions (*g, C, D) to values (*g, C).
        chain_batch: Chains that are evaluated at a time, which bounds the memory; all for None.
        compile: Send value and gradient through torch.compile.

    Raises:
        SettingError: `chain_batch` is no whole number above 0.
    """
    return ValueAndGradient(log_density, chain_batch, compile)


def check_initial(where: str, initial: Tensor) -> None:
    """Refuse initial positions that are not a floating (*g, C, D) tensor of finite numbers."""
    if not isinstance(initial, Tensor) or initial.ndim < 2 or 0 in initial.shape:
        got = f"shape {tuple(initial.shape)}" if isinstance(initial, Tensor) else type(initial).__name__
        fail(
            ShapeError,
            where,
            "initial must be a tensor of shape (*groups, chains, dim), no axis empty.",
            got=got,
            fix="initial[None] for one chain",
        )
    if not initial.is_floating_point():
        fail(DtypeError, where, "initial must be floating.", got=str(initial.dtype), fix="initial.double()")
    if not bool(initial.isfinite().all()):
        count = int((~initial.isfinite()).sum())
        fail(
            NumericalError,
            where,
            "initial positions must be finite.",
            got=f"{count} NaN or infinite entries",
            fix="start from finite positions",
        )


def check_log_density(where: str, log_density: LogDensityFn, q: Tensor) -> Tensor:
    """Refuse a log density whose value at q (*g, C, D) is no differentiable (*g, C), or nowhere finite in a group.

    Returns:
        The value, (*g, C).
    """
    with torch.enable_grad():
        value = log_density(q.detach().requires_grad_(True))
    wanted = tuple(q.shape[:-1])
    if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fail(
            ShapeError,
            where,
            f"log_density must map positions {tuple(q.shape)} to values {wanted}, one per chain.",
            got=got,
            fix="sum over the last axis only; torch.func.vmap(f) turns a single-chain function into a batched one",
        )
    if not value.requires_grad:
        fail(
            SettingError,
            where,
            "log_density must be differentiable in the positions.",
            got="a value that carries no gradient",
            fix="compute it from the positions with torch operations, without detach() or torch.no_grad()",
        )
    dead = ~value.detach().isfinite().any(-1)
    if bool(dead.any()):
        groups = f" in {int(dead.sum())} of {dead.numel()} groups" if dead.ndim else ""
        fail(
            NumericalError,
            where,
            "log_density must be finite at one initial point at least.",
            got=f"NaN or infinity at all {wanted[-1]} initial points{groups}",
            fix="pass other initial positions, or look for overflow and for positions outside the support",
        )
    return value.detach()


def e_bfmi(run: Run) -> Tensor:
    r"""Estimated Bayesian fraction of missing information of each chain, (*g, C).

    E-BFMI = mean (E_t - E_{t-1})^2 / Var E, over successive transitions also where only every k-th draw is kept. Below
    0.3 the momentum draws change the energy too little to move through its marginal law, as in a funnel. NaN for a
    single draw and for a chain whose energy is constant.

    Reference: Betancourt (2016), arXiv 1604.00695.
    """
    energy = run.stats["energy"]
    if energy.shape[-1] < 2:
        return torch.full_like(energy[..., 0], torch.nan)
    variance = energy.var(-1)
    # The first change is left out: without warm-up nothing came before it.
    ratio = run.stats["energy_change"][..., 1:].square().mean(-1) / variance
    return torch.where(variance > 0, ratio, torch.nan)


def summarize(run: Run) -> dict[str, Any]:
    """The health of a run in plain numbers, fit for `diagnostics`: nested lists over *g where there are groups.

    Returns:
        "divergences" (draws with a divergent transition, all chains), "acceptance_rate" (mean), "e_bfmi" (a list, one
        value per chain), "step_size", "num_gradients" (per chain), "stopped_by" and "seconds".
    """
    return {
        "divergences": run.stats["diverging"].sum((-2, -1)).tolist(),
        "acceptance_rate": run.stats["acceptance_rate"].double().mean((-2, -1)).tolist(),
        "e_bfmi": e_bfmi(run).tolist(),
        "step_size": run.step_size.tolist(),
        "num_gradients": run.num_gradients,
        "stopped_by": run.stopped_by,
        "seconds": run.seconds,
    }
