r"""Hamiltonian Monte Carlo with fixed-length trajectories, vectorised over chains and over groups of chains.

A transition draws p ~ N(0, M), follows H = -log density(q) + p' M^{-1} p / 2 by L leapfrog steps, and accepts the end
with probability min(1, exp(H_start - H_end)). All chains move in lock step: L is drawn anew for every transition,
uniformly from ceil(num_steps / 2) .. num_steps, so that no trajectory length is stuck on a period of the target. An
end whose energy is not finite, or has grown by more than 1000, is rejected and counts as a divergence.

References: Neal (2011), arXiv 1206.1901; Hoffman & Gelman (2014), arXiv 1111.4246 (dual averaging).
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, Streams, child_seeds, generator
from bayesdl.errors import NumericalError, SettingError, ShapeError, fail
from bayesdl.samplers import adaptation
from bayesdl.samplers.base import (
    LogDensityFn,
    Run,
    ValueAndGrad,
    check_initial,
    check_log_density,
    value_and_grad,
)
from bayesdl.samplers.hamiltonian import Metric, dense_metric, diagonal_metric, energy, leapfrog
from bayesdl.samplers.progress import Progress

_MAX_ENERGY_ERROR = 1000.0


class State(NamedTuple):
    """What the next transition needs: positions (*g, C, D), their log density (*g, C) and gradient (*g, C, D)."""

    q: Tensor
    log_density: Tensor
    grad: Tensor


class Info(NamedTuple):
    """What a reader wants to know of a transition; tensors (*g, C)."""

    acceptance_rate: Tensor
    accepted: Tensor
    diverging: Tensor
    energy: Tensor
    num_steps: int


class Parameters(NamedTuple):
    """What warm-up adapts: the step size, (*g, 1) or one per chain (*g, C), and the metric."""

    step_size: Tensor
    metric: Metric


def init(evaluate: ValueAndGrad, q: Tensor) -> State:
    """The state at q (*g, C, D). Cost: one gradient."""
    return State(q, *evaluate(q))


def step(
    evaluate: ValueAndGrad, state: State, parameters: Parameters, noise: Tensor, uniform: Tensor, num_steps: int
) -> tuple[State, Info]:
    """One transition of every chain: a pure function of its arguments.

    Args:
        evaluate: Gives the log density (*g, C) and its gradient (*g, C, D).
        state: Where the chains are.
        parameters: Step size and metric.
        noise: Standard normal numbers that broadcast to (*g, C, D), for the momenta.
        uniform: Numbers on [0, 1) that broadcast to (*g, C), for the accept decision.
        num_steps: Leapfrog steps.

    A chain whose log density is not finite where it stands accepts any end where it is.

    Cost: num_steps gradients.
    """
    step_size, metric = parameters
    p = metric.momentum(noise).expand_as(state.q)
    q, p_end, log_density, grad = leapfrog(evaluate, state.q, p, state.grad, step_size, metric, num_steps)
    start, end = energy(state.log_density, p, metric), energy(log_density, p_end, metric)
    error = torch.where(start.isfinite(), end - start, -torch.inf)
    error = torch.where(end.isfinite(), error, torch.inf)
    acceptance_rate = torch.exp(-error).clamp(max=1.0)
    diverging = error > _MAX_ENERGY_ERROR
    accepted = (uniform < acceptance_rate) & ~diverging
    mask = accepted.unsqueeze(-1)
    state = State(
        torch.where(mask, q, state.q),
        torch.where(accepted, log_density, state.log_density),
        torch.where(mask, grad, state.grad),
    )
    current = torch.where(accepted, end, start)
    return state, Info(acceptance_rate, accepted, diverging, current, num_steps)


def run(
    log_density: LogDensityFn,
    initial: Tensor,
    *,
    num_warmup: int,
    num_draws: int,
    num_steps: int = 32,
    target_accept: float = 0.8,
    metric: Literal["diagonal", "dense", "identity"] = "diagonal",
    step_size: float | Tensor | None = None,
    inverse_mass: Tensor | None = None,
    thin: int = 1,
    seed: Seed = 0,
    progress: bool = False,
    description: str = "HMC",
) -> Run:
    """Adapt, then draw: `num_warmup` transitions, then `num_draws * thin` with everything frozen.

    Groups are independent problems of one shape, such as the same network on several data sets: each adapts its own
    step size and metric, and all see the same random numbers, so that a run of groups equals a loop over them up to
    rounding. Chains of a group share the metric, and from the last part of warm-up on the step size; before, each
    chain has its own, so that those started in steep places arrive as well. With `num_warmup=0` and a given step size
    a chain does not depend on the others.

    Args:
        log_density: Unnormalised, unconstrained, differentiable and batched: (*g, C, D) to (*g, C).
        initial: Initial positions (*g, C, D); they set dtype and device.
        num_warmup: Transitions that adapt the step size (dual averaging) and the metric (windows); not kept.
        num_draws: Draws kept per chain.
        num_steps: Longest trajectory in leapfrog steps; lengths are uniform on ceil(num_steps / 2) .. num_steps.
        target_accept: Mean acceptance rate that the step size is adapted to, in (0, 1).
        metric: "diagonal" or "dense", estimated from all chains; "identity" for none.
        step_size: Where the step size starts, a number or (*g); searched for when None.
        inverse_mass: Where the inverse mass matrix starts, (*g, D), or (*g, D, D) for a dense metric; the identity
            when None.
        thin: Keep every thin-th draw.
        seed: Every chain gets a stream of its own, the same whatever the number of chains.
        progress: Show a bar on standard error.
        description: Its label.

    Raises:
        ShapeError: `initial` is not (*g, C, D), or `log_density` does not give one value per chain.
        DtypeError: `initial` is not floating.
        SettingError: A setting is out of range, or `log_density` carries no gradient.
        NumericalError: `log_density` is nowhere finite at the initial points of a group, or some chain has still found
            no finite value when warm-up ends.

    Cost: about 3/4 num_steps gradients a transition; memory for the draws, C * num_draws * D numbers a group.

    Reference: Neal (2011), arXiv 1206.1901; Hoffman & Gelman (2014), arXiv 1111.4246.
    """
    began = time.perf_counter()
    _check_run(log_density, initial, num_warmup, num_draws, num_steps, thin, target_accept)
    evaluate = value_and_grad(log_density)
    state = init(evaluate, initial.detach())
    numbers = _Numbers(seed, state.q, num_steps)
    first = 1.0 if step_size is None else step_size
    parameters = Parameters(_given_step_size(first, state.q), _initial_metric(metric, inverse_mass, state.q))
    num_gradients = 1
    if step_size is None:
        parameters, spent = _search(evaluate, state, parameters, numbers)
        num_gradients += spent
    bar = Progress(num_warmup + num_draws * thin, description, progress)
    try:
        state, parameters, spent = _warm_up(
            evaluate, state, parameters, numbers, num_warmup, target_accept, metric != "identity", bar
        )
        num_gradients += spent
        _check_alive(state)
        draws, stats, spent = _draw(evaluate, state, parameters, numbers, num_draws, thin, bar)
    finally:
        bar.close()
    if draws.is_cuda:
        torch.cuda.synchronize(draws.device)
    seconds = time.perf_counter() - began
    frozen = parameters.step_size.squeeze(-1)
    return Run(draws, stats, frozen, parameters.metric.inverse_mass, num_gradients + spent, seconds)


def _check_run(
    log_density: LogDensityFn,
    initial: Tensor,
    num_warmup: int,
    num_draws: int,
    num_steps: int,
    thin: int,
    target_accept: float,
) -> None:
    _checks.at_least("hmc.run", "num_warmup", num_warmup, 0, integer=True)
    _checks.at_least("hmc.run", "num_draws", num_draws, 1, integer=True)
    _checks.at_least("hmc.run", "num_steps", num_steps, 1, integer=True)
    _checks.at_least("hmc.run", "thin", thin, 1, integer=True)
    _checks.inside("hmc.run", "target_accept", target_accept, 0, 1)
    check_initial("hmc.run", initial)
    check_log_density("hmc.run", log_density, initial)


class _Numbers:
    """All random numbers of a run: a stream for each chain, one for the lengths, and one per chain for the searches."""

    def __init__(self, seed: Seed, q: Tensor, num_steps: int) -> None:
        chain_seed, length_seed, search_seed = child_seeds(seed, 3)
        self._like = q
        self._chains = Streams(chain_seed, q.shape[-2], q.device)
        self._searches = Streams(search_seed, q.shape[-2], q.device)
        self._lengths = generator(length_seed)
        self._shortest, self._longest = -(-num_steps // 2), num_steps

    def transition(self) -> tuple[Tensor, Tensor, int]:
        """Normal numbers (C, D), uniform ones (C), and a number of leapfrog steps; the same for every group."""
        noise = self._chains.normal(self._like.shape[-1], like=self._like)
        uniform = self._chains.uniform(like=self._like)
        num_steps = int(torch.randint(self._shortest, self._longest + 1, (), generator=self._lengths))
        return noise, uniform, num_steps

    def search(self) -> Tensor:
        """Normal numbers (C, D)."""
        return self._searches.normal(self._like.shape[-1], like=self._like)


def _initial_metric(kind: str, inverse_mass: Tensor | None, q: Tensor) -> Metric:
    _checks.choice("hmc.run", "metric", kind, ("diagonal", "dense", "identity"))
    if kind == "identity" and inverse_mass is not None:
        fail(
            SettingError,
            "hmc.run",
            'metric="identity" takes no inverse_mass.',
            got=f"inverse_mass of shape {tuple(inverse_mass.shape)}",
            fix='metric="diagonal", num_warmup=0 keeps a given inverse mass as it is',
        )
    dim = q.shape[-1]
    groups = tuple(q.shape[:-2])
    shape = (*groups, dim, dim) if kind == "dense" else (*groups, dim)
    if inverse_mass is None:
        inverse_mass = torch.eye(dim).to(q) if kind == "dense" else q.new_ones(dim)
    try:
        inverse_mass = inverse_mass.detach().to(q).expand(shape).contiguous()
    except RuntimeError:
        got = str(tuple(inverse_mass.shape))
        fail(
            ShapeError, "hmc.run", f"inverse_mass must have shape {shape}.", got=got, fix="one per group and coordinate"
        )
    return dense_metric(inverse_mass) if kind == "dense" else diagonal_metric(inverse_mass)


def _given_step_size(step_size: float | Tensor, q: Tensor) -> Tensor:
    value = torch.as_tensor(step_size).detach().to(q)
    groups = tuple(q.shape[:-2])
    if value.ndim and tuple(value.shape) != groups:
        wanted = f"step_size must be a number or have shape {groups}, one per group."
        fail(ShapeError, "hmc.run", wanted, got=str(tuple(value.shape)), fix="pass one number")
    if not bool(((value > 0) & value.isfinite()).all()):
        fail(SettingError, "hmc.run", "step_size must be positive.", got=str(step_size), fix="None searches for one")
    return value.expand(groups).unsqueeze(-1).clone()


def _search(evaluate: ValueAndGrad, state: State, parameters: Parameters, numbers: _Numbers) -> tuple[Parameters, int]:
    step_size, spent = adaptation.find_step_size(
        evaluate, state.q, state.log_density, state.grad, parameters.metric, numbers.search(), parameters.step_size
    )
    return parameters._replace(step_size=step_size), spent


def _warm_up(
    evaluate: ValueAndGrad,
    state: State,
    parameters: Parameters,
    numbers: _Numbers,
    num_warmup: int,
    target_accept: float,
    adapt_metric: bool,
    bar: Progress,
) -> tuple[State, Parameters, int]:
    """The chains after warm-up, the parameters to freeze, and the gradients spent."""
    windows = adaptation.slow_windows(num_warmup)
    together = windows[-1][1] if windows else 0
    ends = {end for _, end in windows}
    num_gradients = 0
    averaging = adaptation.start_dual_averaging(parameters.step_size)
    moments = adaptation.start_moments(state.q, parameters.metric.dense)
    for t in range(num_warmup):
        if t == together:
            parameters = _pool(parameters, state)
            averaging = adaptation.start_dual_averaging(parameters.step_size)
        state, info = step(evaluate, state, parameters, *numbers.transition())
        num_gradients += info.num_steps
        bar.update(parameters.step_size, info.acceptance_rate, info.diverging, warmup=True)
        rate = info.acceptance_rate.mean(-1, keepdim=True) if t >= together else info.acceptance_rate
        averaging = adaptation.dual_average(averaging, rate, target_accept)
        parameters = parameters._replace(step_size=averaging.log_step_size.exp().to(state.q))
        if windows and windows[0][0] <= t < together:
            moments = adaptation.add_to_moments(moments, state.q)
        if t + 1 in ends and adapt_metric:
            parameters = parameters._replace(metric=adaptation.estimate_metric(moments, parameters.metric))
        if t + 1 in ends:
            parameters, spent = _search(evaluate, state, parameters, numbers)
            num_gradients += spent
            averaging = adaptation.start_dual_averaging(parameters.step_size)
            moments = adaptation.start_moments(state.q, parameters.metric.dense)
    if num_warmup:
        parameters = parameters._replace(step_size=averaging.log_average.exp().to(state.q))
    return state, _pool(parameters, state), num_gradients


def _pool(parameters: Parameters, state: State) -> Parameters:
    """One step size for all chains of a group."""
    if parameters.step_size.shape[-1] == 1:
        return parameters
    counts = state.log_density.isfinite()
    return parameters._replace(step_size=adaptation.pool_step_sizes(parameters.step_size, counts))


def _check_alive(state: State) -> None:
    dead = ~state.log_density.isfinite()
    if bool(dead.any()):
        fail(
            NumericalError,
            "hmc.run",
            "every chain must have reached a finite log density when warm-up ends.",
            got=f"{int(dead.sum())} of {dead.numel()} chains at NaN or infinity",
            fix="start the chains where log_density is finite, or warm up for longer",
        )


def _draw(
    evaluate: ValueAndGrad,
    state: State,
    parameters: Parameters,
    numbers: _Numbers,
    num_draws: int,
    thin: int,
    bar: Progress,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Draws, statistics, and the gradients spent per chain; the parameters stay as they are."""
    chains = state.log_density.shape
    wide = {"dtype": torch.float64, "device": state.q.device}
    draws = state.q.new_empty(*chains, num_draws, state.q.shape[-1])
    stats = {
        "log_density": state.log_density.new_empty(*chains, num_draws),
        "energy": torch.empty(*chains, num_draws, **wide),
        "energy_change": torch.empty(*chains, num_draws, **wide),
        "acceptance_rate": torch.zeros(*chains, num_draws, **wide),
        "diverging": torch.zeros(*chains, num_draws, dtype=torch.bool, device=state.q.device),
        "num_steps": torch.zeros(*chains, num_draws, dtype=torch.int64, device=state.q.device),
    }
    current = torch.full(chains, torch.nan, **wide)
    for i in range(num_draws):
        for _ in range(thin):
            previous = current
            state, info = step(evaluate, state, parameters, *numbers.transition())
            current = info.energy
            stats["acceptance_rate"][..., i] += info.acceptance_rate / thin
            stats["diverging"][..., i] |= info.diverging
            stats["num_steps"][..., i] += info.num_steps
            bar.update(parameters.step_size, info.acceptance_rate, info.diverging, warmup=False)
        draws[..., i, :] = state.q
        stats["log_density"][..., i] = state.log_density
        stats["energy"][..., i] = current
        stats["energy_change"][..., i] = current - previous
    num_gradients = int(stats["num_steps"].flatten(0, -2)[0].sum())
    return draws, stats, num_gradients
