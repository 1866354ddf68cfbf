r"""MEADS: generalised HMC with persistent momentum, tuned by many chains for one another, for many chains at once.

A transition keeps most of the momentum, and takes one leapfrog step of size eps in coordinates of unit variance:

    p <- sqrt(1 - alpha) p + sqrt(alpha) z,    u <- u + delta on the circle [-1, 1),    (q', p') = leapfrog(q, p),

accepts where |u| < exp(H - H') and then divides u by that ratio; a refused step turns p around. As u drifts slowly,
refusals come in rare bunches, so that momenta survive in between and trajectories are as long as 1 / alpha steps.

The chains of a group are dealt into 4 folds. In warm-up each fold obeys statistics of another fold:

    eps   = min(1, 1 / (2 sqrt(lambda_max of scaled gradients)))
    gamma = max(1 / sqrt(lambda_max of scaled positions), 1 / (t eps))
    alpha = 1 - exp(-2 eps gamma),   delta = alpha / 2,

with lambda_max estimated as sum lambda^2 / sum lambda from inner products between chains, so that no matrix of D by D
is formed. One fold in turn rests, and the folds are dealt anew after each round. At the end of warm-up the parameters
are computed once from all chains and frozen, from where on the target is invariant.

References: Hoffman & Sountsov (2022), Tuning-free generalized Hamiltonian Monte Carlo, AISTATS; Neal (2020), arXiv
2001.11950, for the drifting slice variable; Horowitz (1991) for persistent momentum.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl._random import Seed
from bayesdl.errors import SettingError, fail
from bayesdl.samplers._chains import Numbers, drive
from bayesdl.samplers.base import LogDensityFn, Run, ValueAndGrad, value_and_grad
from bayesdl.samplers.hamiltonian import MAX_ENERGY_ERROR, State
from bayesdl.samplers.hamiltonian import init as init_chains

__all__ = ["FOLDS", "Info", "Parameters", "State", "Walk", "init", "run", "step", "tune"]

FOLDS = 4


class Parameters(NamedTuple):
    """What warm-up adapts, for chains that share it: (*g, 1), and the inverse mass (*g, D), or one row a chain.

    Attributes:
        step_size: eps, (*g, 1) or (*g, C), in units of the standard deviations in `inverse_mass`.
        inverse_mass: Variances of the coordinates, (*g, D), or (*g, C, D) where chains differ.
        damping: alpha, (*g, 1) or (*g, C): the share of the momentum's variance that is renewed in a transition.
    """

    step_size: Tensor
    inverse_mass: Tensor
    damping: Tensor


class Walk(NamedTuple):
    """What the next transition needs: the chains, momenta in units of their scale (*g, C, D), and slices (*g, C)."""

    state: State
    momentum: Tensor
    slice: Tensor


class Info(NamedTuple):
    """What a reader wants to know of a transition; tensors (*g, C)."""

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: int = 1
    num_gradients: float = 1


def init(evaluate: ValueAndGrad, q: Tensor, noise: Tensor, uniform: Tensor) -> Walk:
    """Chains at q (*g, C, D) with momenta from standard normal `noise` and slices from `uniform` on [0, 1)."""
    state = init_chains(evaluate, q)
    return Walk(state, noise.expand_as(q).clone(), (2 * uniform.double() - 1).expand(q.shape[:-1]).clone())


def step(evaluate: ValueAndGrad, walk: Walk, parameters: Parameters, noise: Tensor) -> tuple[Walk, Info]:
    """One transition of every chain: a pure function of its arguments.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        walk: Where the chains are, which way they go, and their slices.
        parameters: Step size, scales and damping.
        noise: Standard normal numbers that broadcast to (*g, C, D).

    A chain whose log density is not finite where it stands accepts any end where it is.

    Cost: one gradient.
    """
    state, damping = walk.state, parameters.damping.unsqueeze(-1).to(noise)
    p = (1 - damping).sqrt() * walk.momentum + damping.sqrt() * noise
    drifted = torch.remainder(walk.slice + 1 + 0.5 * parameters.damping.double(), 2) - 1
    scale = parameters.inverse_mass.sqrt()
    scale = parameters.step_size.unsqueeze(-1).to(p) * (scale if scale.ndim == p.ndim else scale.unsqueeze(-2))
    halfway = torch.addcmul(p, scale, state.grad, value=0.5)
    q = torch.addcmul(state.q, scale, halfway)
    log_density, grad = evaluate(q)
    p_end = torch.addcmul(halfway, scale, grad, value=0.5)
    before, after = _energy(state.log_density, p), _energy(log_density, p_end)
    error = torch.where(before.isfinite(), after - before, -torch.inf)
    error = torch.where(after.isfinite(), error, torch.inf)
    ratio = torch.exp(-error)
    diverging = error > MAX_ENERGY_ERROR
    accepted = (drifted.abs() < ratio) & ~diverging
    mask = accepted.unsqueeze(-1)
    moved = State(
        torch.where(mask, q, state.q),
        torch.where(accepted, log_density, state.log_density),
        torch.where(mask, grad, state.grad),
    )
    slices = torch.where(accepted, drifted / ratio, drifted)
    info = Info(ratio.clamp(max=1.0), accepted, diverging, torch.where(accepted, after, before))
    return Walk(moved, torch.where(mask, p_end, -p), slices), info


def _energy(log_density: Tensor, p: Tensor) -> Tensor:
    return 0.5 * p.square().sum(-1, dtype=torch.float64) - log_density.double()


def tune(state: State, count: int) -> Parameters:
    """Parameters from the positions and gradients of chains (*g, N, D), after `count` transitions; all (*g, 1).

    Cost: O(N^2 D).
    """
    q, grad = state.q.double(), state.grad.double()
    variance = q.var(-2)
    fine = variance.isfinite() & (variance > 0)
    variance = torch.where(fine, variance, torch.ones_like(variance))
    scale = variance.sqrt().unsqueeze(-2)
    step_size = (0.5 * largest_eigenvalue(grad * scale).rsqrt()).clamp(max=1.0)
    gamma = largest_eigenvalue((q - q.mean(-2, keepdim=True)) / scale).rsqrt()
    gamma = torch.maximum(gamma, 1 / ((count + 1) * step_size))
    damping = -torch.expm1(-2 * step_size * gamma)
    return Parameters(step_size.unsqueeze(-1).to(state.q), variance.to(state.q), damping.unsqueeze(-1).to(state.q))


def largest_eigenvalue(x: Tensor) -> Tensor:
    """sum lambda^2 / sum lambda of the second moments of rows x (*g, N, D), without bias in either sum: (*g).

    Between the largest eigenvalue and D times less, and near the former where few directions dominate. Rows that are
    not finite count as zeros.
    """
    x = torch.where(x.isfinite(), x, 0.0)
    products = x @ x.mT
    own = products.diagonal(dim1=-2, dim2=-1)
    num = x.shape[-2]
    first = own.sum(-1) / num
    second = (products.square().sum((-2, -1)) - own.square().sum(-1)) / (num * (num - 1))
    return (second / first).clamp(min=1e-10, max=1e20).nan_to_num(nan=1.0)


class _Carry(NamedTuple):
    """All that a transition needs besides the random numbers; `order` deals the chains into folds."""

    walk: Walk
    parameters: Parameters
    order: Tensor


class _Program:
    """MEADS as the loop sees it."""

    def __init__(self, evaluate: ValueAndGrad, num_warmup: int, given: Parameters | None) -> None:
        self._evaluate, self.num_warmup, self._given = evaluate, num_warmup, given
        self.settings: dict[str, Any] = {} if given is None else given._asdict()

    def start(self, q: Tensor, numbers: Numbers) -> tuple[_Carry, float]:
        walk = init(self._evaluate, q, numbers.momentum(), numbers.wide_uniform())
        parameters = tune(walk.state, 0) if self._given is None else self._given
        return _Carry(walk, parameters, torch.arange(q.shape[-2], device=q.device)), 1

    def warm(self, t: int, carry: _Carry, numbers: Numbers) -> tuple[_Carry, Info]:
        order = carry.order
        if t % FOLDS == 0:
            order = torch.randperm(len(order), generator=numbers.shared).to(order.device)
        parameters = _by_neighbours(carry.walk.state, order, t)
        walk, info = step(self._evaluate, carry.walk, parameters, numbers.momentum())
        resting = torch.zeros_like(order, dtype=torch.bool)
        resting[order.tensor_split(FOLDS)[t % FOLDS]] = True
        walk = _rest(resting, carry.walk, walk)
        return _Carry(walk, parameters, order), info

    def freeze(self, carry: _Carry, numbers: Numbers) -> _Carry:
        if self.num_warmup == 0 and self._given is not None:
            return carry
        return carry._replace(parameters=tune(carry.walk.state, max(self.num_warmup, 1)))

    def move(self, carry: _Carry, numbers: Numbers) -> tuple[_Carry, Info]:
        walk, info = step(self._evaluate, carry.walk, carry.parameters, numbers.momentum())
        return carry._replace(walk=walk), info

    def state(self, carry: _Carry) -> State:
        return carry.walk.state

    def step_size(self, carry: _Carry) -> Tensor:
        return carry.parameters.step_size


def _by_neighbours(state: State, order: Tensor, count: int) -> Parameters:
    """For every chain the parameters that come from the fold before its own: (*g, C), and (*g, C, D)."""
    folds = order.tensor_split(FOLDS)
    tuned = [tune(State(state.q[..., f, :], state.log_density[..., f], state.grad[..., f, :]), count) for f in folds]
    step_size, damping = (torch.empty_like(state.log_density) for _ in range(2))
    inverse_mass = torch.empty_like(state.q)
    for k, members in enumerate(folds):
        own = tuned[k - 1]
        step_size[..., members], damping[..., members] = own.step_size, own.damping
        inverse_mass[..., members, :] = own.inverse_mass.unsqueeze(-2)
    return Parameters(step_size, inverse_mass, damping)


def _rest(resting: Tensor, before: Walk, after: Walk) -> Walk:
    """`before` for the chains (C) that rest."""
    wide = resting.unsqueeze(-1)
    state = State(
        torch.where(wide, before.state.q, after.state.q),
        torch.where(resting, before.state.log_density, after.state.log_density),
        torch.where(wide, before.state.grad, after.state.grad),
    )
    return Walk(
        state,
        torch.where(wide, before.momentum, after.momentum),
        torch.where(resting, before.slice, after.slice),
    )


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    parameters: Parameters | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "MEADS",
    checkpoint: str | os.PathLike[str] | None = None,
    max_gradients: float | None = None,
    chain_batch: int | None = None,
    compile: bool = False,
) -> Run:
    """Adapt, then draw: `num_warmup` transitions, then `num_draws * thin` with everything frozen.

    A transition is one gradient and moves a chain by one step, so that hundreds to thousands of each are usual, with
    `thin` of ten or more. Nothing needs to be set. Groups are independent problems of one shape; they see the same
    random numbers.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C).
        initial: Initial positions (*g, C, D), at least 16 chains, better 64; they set dtype and device.
        num_warmup: Transitions that adapt; one fold in four rests in each.
        num_draws: Draws kept per chain.
        parameters: Step size and damping (*g, 1) and variances (*g, D) to start from; with `num_warmup=0` they stay,
            and then any number of chains will do.
        thin: Keep every thin-th draw.
        seed: Every chain gets a stream of its own.
        progress, description: Whether to show a bar on standard error, and its label.
        checkpoint, max_gradients, chain_batch, compile: A folder to save to and resume from, a budget of gradients per
            chain, how many chains to evaluate at a time, and whether by torch.compile; see `samplers.base`.

    Raises:
        ShapeError, DtypeError: `initial` is no floating (*g, C, D), or `log_density` gives no value per chain.
        SettingError: Fewer than 16 chains to learn from, or another setting is out of range.
        StorageError: `checkpoint` is damaged or no folder of a run.
        NumericalError: `log_density` is nowhere finite at the start of a group, or not for all chains after warm-up.

    Cost: one gradient a transition, and O(C^2 D) in warm-up for the statistics of the folds.

    Reference: Hoffman & Sountsov (2022), AISTATS, algorithm 3.
    """
    fixed = parameters is not None and num_warmup == 0
    if isinstance(initial, Tensor) and initial.ndim >= 2 and initial.shape[-2] < 4 * FOLDS and not fixed:
        wanted = f"{4 * FOLDS} chains at least, which learn from one another."
        fail(SettingError, "meads.run", wanted, got=str(initial.shape[-2]), fix="more chains, or samplers.hmc for few")
    evaluate = value_and_grad(log_density, chain_batch=chain_batch, compile=compile)
    program = _Program(evaluate, num_warmup, parameters)
    result, carry = drive(
        "meads.run",
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
    return result._replace(inverse_mass=carry.parameters.inverse_mass)
