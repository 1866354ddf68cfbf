r"""The no-U-turn sampler, multinomial and iterative, vectorised over chains and over groups of chains.

A transition draws p ~ N(0, M) and follows H = -log density(q) + p' M^{-1} p / 2 by leapfrog steps in both directions of
time, doubling the trajectory until it turns back on itself: until, for the trajectory or for any of its binary
subtrees, with rho the sum of the momenta in it,

    p_first' M^{-1} rho <= 0   or   p_last' M^{-1} rho <= 0,

the same also for the first half with the point after it and for the second half with the point before it. The draw is
chosen among the points with probability proportional to exp(-H); a new half replaces the draw of the old one with
probability min(1, ratio of their total weights), which favours distant points. A subtree that turns, or in which the
energy grows by more than 1000 (a divergence), ends the transition and is left out.

Chains stand at the same leaf of trees that differ in direction and extent; those whose tree is complete leave the
batch, so that the longest tree costs gradients of its own chain only. Subtrees are joined two by two as their leaves
arrive, as in a binary counter: no recursion, and memory for one subtree a level.

References: Hoffman & Gelman (2014), arXiv 1111.4246; Betancourt (2017), arXiv 1701.02434, appendix A (multinomial
draws, generalised criterion); the Stan reference manual, "HMC algorithm parameters" (the checks across halves).
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed
from bayesdl.samplers import adaptation
from bayesdl.samplers._adapted import Adapted, Plan
from bayesdl.samplers._chains import Numbers, drive
from bayesdl.samplers._stuck import warn_of_stuck_chains
from bayesdl.samplers._trees import EARLY, Span, block_size, count, decisions, early_decisions, turns_back
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad, value_and_grad
from bayesdl.samplers.hamiltonian import MAX_ENERGY_ERROR, Metric, Parameters, State, energy, init, leapfrog_path

__all__ = ["Info", "Parameters", "State", "init", "run", "step"]

_EARLY_DEPTH = 6  # of trees that the first two metrics are estimated from
_EARLY_SIZES = [count(depth) for depth in range(EARLY)]
_Rows = TypeVar("_Rows", bound=tuple[Tensor, ...])


class Info(NamedTuple):
    """What a reader wants to know of a transition.

    Attributes:
        acceptance_rate: Mean of min(1, exp(H_start - H)) over the points visited, (*g, C).
        diverging: Whether the energy grew by more than 1000, (*g, C).
        energy: H of the draw, (*g, C).
        num_steps: Leapfrog steps of the tree, (*g, C).
        tree_depth: Doublings that were kept, (*g, C).
        num_gradients: Mean over chains of the gradients evaluated, those of finished chains in the batch included.
    """

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: Tensor
    tree_depth: Tensor
    num_gradients: float

    @property
    def stats(self) -> dict[str, Tensor]:
        """What is kept beside what every sampler reports."""
        return {"tree_depth": self.tree_depth}


class _Outcome(NamedTuple):
    """The draw of each tree so far, (*g, C, D) and (*g, C), and what was counted on the way."""

    q: Tensor
    grad: Tensor
    log_density: Tensor
    energy: Tensor
    acceptance: Tensor
    num_steps: Tensor
    tree_depth: Tensor
    diverging: Tensor


class _Tree(NamedTuple):
    """What growing needs. An end is (q, p, grad, whitened p) in one tensor (4, *g, C, D); `later` says whether `near`,
    the end that grew last, lies later in time than `far`. Energies count from `reference`; beyond `limit` they diverge.
    """

    near: Tensor
    far: Tensor
    later: Tensor
    rho: Tensor
    log_weight: Tensor
    reference: Tensor
    limit: Tensor
    step_size: Tensor
    uniform: Tensor
    early: Tensor


class _Subtree(NamedTuple):
    """A subtree of 2^depth leaves; `intact` where it neither turned nor diverged."""

    q: Tensor
    grad: Tensor
    log_density: Tensor
    energy: Tensor
    log_weight: Tensor
    acceptance: Tensor
    num_steps: Tensor
    diverging: Tensor
    intact: Tensor
    first: Tensor
    rho: Tensor
    end: Tensor


def step(
    evaluate: ValueAndGrad, state: State, parameters: Parameters, noise: Tensor, uniform: Tensor, max_depth: int = 10
) -> tuple[State, Info]:
    """One transition of every chain: a pure function of its arguments.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D), for any number of chains C.
        state: Where the chains are.
        parameters: Step size and metric.
        noise: Standard normal numbers that broadcast to (*g, C, D), for the momenta.
        uniform: Numbers on [0, 1) in float64 that broadcast to (*g, C). Each seeds all decisions of its chain in this
            transition: directions, draws, choices between halves.
        max_depth: A tree has at most 2^max_depth points.

    A chain whose log density is not finite where it stands moves to any point where it is.

    Cost: 2^depth - 1 gradients or fewer for each chain; memory O(max_depth) positions a chain.
    """
    outcome, tree = _plant(state, parameters, noise, uniform)
    result, index = outcome, None
    growing = torch.ones_like(tree.later)
    num_rows = 0
    for depth in range(max_depth):
        outcome, tree, growing, rows = _double(evaluate, parameters.metric, outcome, tree, growing, depth)
        num_rows += rows
        kept = _width(growing) if depth < max_depth - 1 else 0
        if kept == 0:
            break
        if kept < growing.shape[-1]:
            result = outcome if index is None else _put(result, index, outcome)
            chosen = _chosen(growing, kept)
            index = chosen if index is None else index.take_along_dim(chosen, -1)
            outcome, tree, (growing,) = _take(outcome, chosen), _take(tree, chosen), _take((growing,), chosen)
    result = outcome if index is None else _put(result, index, outcome)
    rate = result.acceptance / result.num_steps.clamp(min=1)
    info = Info(
        rate, result.diverging, result.energy, result.num_steps, result.tree_depth, num_rows / state.log_density.numel()
    )
    return State(result.q, result.log_density, result.grad), info


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    max_depth: int = 10,
    target_accept: float = 0.8,
    metric: Literal["diagonal", "dense", "low-rank", "identity"] = "diagonal",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "NUTS",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Run:
    """Adapt, then draw: `num_warmup` transitions, then `num_draws * thin` with everything frozen.

    Step size and metric adapt as in `hmc.run`. With `num_warmup=0` and a given step size a chain does not depend on the
    others: chain i of many equals the chain alone, up to rounding.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C), for any C, since
            chains whose tree is complete leave the batch.
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_warmup: Transitions that adapt the step size (dual averaging) and the metric (windows); not kept.
        num_draws: Draws kept per chain.
        max_depth: A trajectory has at most 2^max_depth points; 1 to 20.
        target_accept: Mean acceptance rate over a trajectory that the step size is adapted to, in (0, 1).
        metric: "diagonal", "dense" or "low-rank", estimated from all chains; "identity" for none.
        step_size: Where the step size starts, a number or (*g); searched for when None.
        inverse_mass: Where the inverse mass matrix starts, (*g, D), or (*g, D, D) for a dense metric; the identity
            when None.
        thin: Keep every thin-th draw.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress, description: Whether to show a bar on standard error, and its label.
        checkpoint, max_gradients, chain_batch, compile: A folder to save to and resume from, a budget of gradients per
            chain, how many chains to evaluate at a time, and whether by torch.compile; see `samplers.base`.

    Raises:
        ShapeError, DtypeError: `initial` is no floating (*g, C, D), or `log_density` gives no value per chain.
        SettingError: A setting is out of range, `log_density` carries no gradient, or `checkpoint` is another run's.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: `log_density` is nowhere finite at the start of a group, or not for all chains after warm-up.

    Cost: at most 2^max_depth gradients a transition, in the first windows of warm-up 63.

    Reference: Hoffman & Gelman (2014), arXiv 1111.4246; Betancourt (2017), arXiv 1701.02434.
    """
    _checks.at_least("nuts.run", "max_depth", max_depth, 1, integer=True)
    _checks.inside("nuts.run", "max_depth", max_depth, 0, 21)
    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    num_chains = adaptation.count_chains(initial)
    early = _early(num_warmup, num_chains)

    def move(state: State, parameters: Parameters, numbers: Numbers, count: int) -> tuple[State, Info]:
        depth = min(max_depth, _EARLY_DEPTH) if count < early else max_depth
        return step(evaluate, state, parameters, numbers.momentum(), numbers.wide_uniform(), depth)

    plan = Plan(num_warmup, target_accept, metric, step_size, inverse_mass, num_chains=num_chains)
    program = Adapted("nuts.run", evaluate, move, plan, {"max_depth": max_depth})
    result, carry = drive(
        "nuts.run",
        program,
        evaluate,
        initial,
        num_warmup=num_warmup,
        num_draws=num_draws,
        thin=thin,
        seed=seed,
        progress=progress,
        description=description,
        checkpoint=checkpoint,
        max_gradients=max_gradients,
    )
    warn_of_stuck_chains("nuts.run", result, num_warmup)
    return result._replace(inverse_mass=carry.parameters.metric.reported())


def _early(num_warmup: int, num_chains: int) -> int:
    """Transitions before the end of the early windows, counted from the end of the last."""
    windows = adaptation.windows(num_warmup, num_chains) if isinstance(num_warmup, int) else ()
    return windows[: adaptation.EARLY_WINDOWS][-1][1] - windows[-1][1] if windows else 0


def _plant(state: State, parameters: Parameters, noise: Tensor, uniform: Tensor) -> tuple[_Outcome, _Tree]:
    """Trees of one point, with weight 1 at energy `reference`."""
    step_size, metric = parameters
    p = metric.momentum(noise).expand_as(state.q)
    r = metric.whiten(p)
    start = energy(state.log_density, p, metric)
    alive = start.isfinite()
    zero = torch.zeros_like(start)
    count = torch.zeros_like(start, dtype=torch.int64)
    outcome = _Outcome(state.q, state.grad, state.log_density, start, zero, count, count, torch.zeros_like(alive))
    end = torch.stack([state.q, p, state.grad, r])
    # From a reference this high every finite energy looks alike, and the last finite point is the draw.
    reference = torch.where(alive, start, 1e300)
    limit = torch.where(alive, MAX_ENERGY_ERROR, torch.inf)
    log_weight = torch.where(alive, 0.0, -torch.inf).to(start)
    each = step_size.expand_as(state.log_density)
    early = early_decisions(uniform).expand(*start.shape, -1)
    later = torch.ones_like(alive)
    return outcome, _Tree(end, end, later, r, log_weight, reference, limit, each, uniform.expand_as(start), early)


def _double(
    evaluate: ValueAndGrad, metric: Metric, outcome: _Outcome, tree: _Tree, growing: Tensor, depth: int
) -> tuple[_Outcome, _Tree, Tensor, int]:
    """Join a subtree of 2^depth leaves to one end; returns also which trees grow on, and the gradients of the batch."""
    numbers = tree.early.split(_EARLY_SIZES, -1)[depth] if depth < EARLY else decisions(tree.uniform, depth)
    later, choice = numbers[..., 0] < 0.5, numbers[..., 1]
    near, far = tree.near, tree.far
    if depth:
        swap = (later != tree.later).unsqueeze(-1)
        near, far = torch.where(swap, far, near), torch.where(swap, near, far)
    signed = torch.where(later, tree.step_size, -tree.step_size)
    subtree, rows = _grow(evaluate, metric, near, signed, tree, growing, numbers[..., 2:], depth)
    # A chain that has no finite log density yet takes what it finds, on a trajectory that turns as well.
    chosen = (subtree.intact | tree.limit.isinf()) & (choice < torch.exp(subtree.log_weight - tree.log_weight))
    mask = chosen.unsqueeze(-1)
    outcome = _Outcome(
        torch.where(mask, subtree.q, outcome.q),
        torch.where(mask, subtree.grad, outcome.grad),
        torch.where(chosen, subtree.log_density, outcome.log_density),
        torch.where(chosen, subtree.energy, outcome.energy),
        outcome.acceptance + subtree.acceptance,
        outcome.num_steps + subtree.num_steps,
        outcome.tree_depth + subtree.intact,
        outcome.diverging | subtree.diverging,
    )
    turned = turns_back((far[3], near[3], tree.rho), (subtree.first, subtree.end[3], subtree.rho), single=depth == 0)
    tree = tree._replace(
        near=subtree.end,
        far=far,
        later=later,
        rho=tree.rho + subtree.rho,
        log_weight=torch.logaddexp(tree.log_weight, subtree.log_weight),
    )
    return outcome, tree, subtree.intact & ~turned, rows


def _grow(
    evaluate: ValueAndGrad,
    metric: Metric,
    near: Tensor,
    step_size: Tensor,
    tree: _Tree,
    growing: Tensor,
    numbers: Tensor,
    depth: int,
) -> tuple[_Subtree, int]:
    """2^depth leaves beyond `near`; chains whose subtree has failed leave the batch once they are half of it."""
    zero = torch.zeros_like(tree.log_weight)
    false = torch.zeros_like(growing)
    made = _Subtree(near[0], near[2], zero, zero, zero, zero, zero.long(), false, growing, near[3], near[3], near)
    batch = (near, step_size, tree.reference, tree.limit, numbers)
    whole, index, num_rows = made, None, 0
    waiting: list[Span] = []
    size = block_size(depth)
    num_blocks = 2**depth // size
    for j in range(num_blocks):
        near, step_size, reference, limit, numbers = batch
        path = leapfrog_path(evaluate, *near[:3].unbind(0), step_size, metric, size)
        num_rows += step_size.numel() * size
        whitened = metric.whiten(path[1])
        made, right = _add_block(made, path, whitened, reference, limit, numbers[..., 2 * j : 2 * j + 2], first=j == 0)
        # Subtrees wait as the digits of a binary counter do: block j completes as many as j has trailing ones.
        for _ in range(_trailing_ones(j)):
            left = waiting.pop()
            made = made._replace(intact=made.intact & ~turns_back(left, right, single=False))
            right = (left[0], right[1], left[2] + right[2])
        waiting.append(right)
        batch = (torch.stack([path[0][-1], path[1][-1], path[3][-1], whitened[-1]]), *batch[1:])
        kept = _width(made.intact) if j < num_blocks - 1 else 0
        if kept == 0:
            break
        if 2 * kept <= made.intact.shape[-1]:
            whole = made if index is None else _put(whole, index, made)
            chosen = _chosen(made.intact, kept)
            index = chosen if index is None else index.take_along_dim(chosen, -1)
            made, batch = _take(made, chosen), _take(batch, chosen)
            waiting = [_take(span, chosen) for span in waiting]
    made = made._replace(first=waiting[0][0], rho=waiting[0][2], end=batch[0])
    return made if index is None else _put(whole, index, made), num_rows


def _add_block(
    made: _Subtree,
    path: tuple[Tensor, Tensor, Tensor, Tensor],
    whitened: Tensor,
    reference: Tensor,
    limit: Tensor,
    numbers: Tensor,
    *,
    first: bool,
) -> tuple[_Subtree, Span]:
    """Judge leaves (size, *g, C, D) and let them compete for the draw; also their whitened momenta as one span.

    What follows a leaf that diverges or completes a subtree that turns was computed in vain and is not counted.
    """
    q, _, log_density, grad = path
    level = 0.5 * whitened.square().sum(-1, dtype=torch.float64) - log_density.double()
    error = (level - reference).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    beyond = error > limit
    weight = -error
    if len(q) == 1:
        return _one_leaf(made, (q[0], grad[0], log_density[0], level[0]), weight[0], beyond[0], whitened[0])
    failed, span = _join(whitened, beyond)
    counted = made.intact & (failed.cumsum(0) == failed)
    total = weight.logsumexp(0)
    place = ((weight - total).exp().cumsum(0) < numbers[..., 0]).sum(0, keepdim=True).clamp(max=len(q) - 1)
    wide = place.unsqueeze(-1).expand(1, *q.shape[1:])
    block = (
        q.gather(0, wide)[0],
        grad.gather(0, wide)[0],
        log_density.gather(0, place)[0],
        level.gather(0, place)[0],
    )
    if not first:
        sum_of_all = torch.logaddexp(made.log_weight, total)
        taken = numbers[..., 1] < torch.exp(total - sum_of_all)
        mask, total = taken.unsqueeze(-1), sum_of_all
        block = tuple(torch.where(mask if i < 2 else taken, new, made[i]) for i, new in enumerate(block))
    made = _Subtree(
        *block,
        total,
        made.acceptance + (weight.exp().clamp(max=1.0) * counted).sum(0),
        made.num_steps + counted.sum(0),
        made.diverging | (beyond & counted).any(0),
        made.intact & ~failed.any(0),
        *made[9:],
    )
    return made, span


def _one_leaf(
    made: _Subtree, leaf: tuple[Tensor, ...], weight: Tensor, beyond: Tensor, whitened: Tensor
) -> tuple[_Subtree, Span]:
    """The subtree of one leaf, which is its own draw."""
    q, grad, log_density, level = leaf
    counted = made.intact
    acceptance = weight.exp().clamp(max=1.0) * counted
    rest = made[9:]
    made = _Subtree(
        q, grad, log_density, level, weight, acceptance, counted.long(), beyond & counted, counted & ~beyond, *rest
    )
    return made, (whitened, whitened, whitened)


def _join(whitened: Tensor, beyond: Tensor) -> tuple[Tensor, Span]:
    """Leaves that diverge or complete a subtree that turns, (size, *g, C), and the span of all leaves."""
    failed = beyond.clone()
    spans: Span = (whitened, whitened, whitened)
    stride = 1
    while len(spans[0]) > 1:
        left: Span = tuple(part[0::2] for part in spans)
        right: Span = tuple(part[1::2] for part in spans)
        stride *= 2
        failed[stride - 1 :: stride] |= turns_back(left, right, single=stride == 2)
        spans = (left[0], right[1], left[2] + right[2])
    return failed, tuple(part[0] for part in spans)


def _trailing_ones(k: int) -> int:
    return (k ^ (k + 1)).bit_length() - 1


def _width(mask: Tensor) -> int:
    """The largest number of chains in a group for which the mask (*g, C) is true."""
    return int(mask.sum(-1).amax())


def _chosen(mask: Tensor, width: int) -> Tensor:
    """Indices (*g, width) of the chains for which the mask is true, filled up with others where a group has fewer."""
    return mask.byte().argsort(stable=True, dim=-1, descending=True)[..., :width]


def _take(rows: _Rows, index: Tensor) -> _Rows:
    """Those chains of tensors (*g, C), (*g, C, D) and (4, *g, C, D)."""
    taken = [x.take_along_dim(_along(index, x), _axis(index, x)) for x in rows]
    return type(rows)(*taken) if hasattr(rows, "_fields") else type(rows)(taken)


def _put(rows: _Rows, index: Tensor, values: _Rows) -> _Rows:
    """`rows` with those chains replaced."""
    pairs = zip(rows, values, strict=True)
    put = [x.scatter(_axis(index, x), _along(index, x).expand_as(value), value) for x, value in pairs]
    return type(rows)(*put)


def _axis(index: Tensor, x: Tensor) -> int:
    return -1 if x.ndim == index.ndim else -2


def _along(index: Tensor, x: Tensor) -> Tensor:
    """The index with the axes of x; take_along_dim broadcasts them."""
    extra = x.ndim - index.ndim
    index = index if extra == 0 else index.unsqueeze(-1)
    return index.unsqueeze(0) if extra == 2 else index
