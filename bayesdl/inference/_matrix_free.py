r"""Exact GP regression without a Cholesky factor: hyper-parameters from stochastic gradients, then solves.

    theta_0 = argmax of the evidence of a random subset,    theta <- theta + Adam(d/dtheta log p(y | theta) p(theta))

The subset is fitted by the dense engine; a few Adam steps on all points follow. Each is one conjugate-gradient solve
that starts from the solution of the step before. A line search would need the objective itself, which here carries the
error of a stochastic log-determinant; Adam needs its gradient only.

References: Wang et al. (2019), arXiv 1903.08114; Lin et al. (2024), arXiv 2405.18457, for the warm starts.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl import _storage
from bayesdl._random import Seed, child_seeds
from bayesdl.data import TrainingData, Units
from bayesdl.errors import SettingError, StorageError, fail
from bayesdl.inference._evidence import Evidence, Search, maximise_evidence
from bayesdl.kernels.tiles import tiles_of
from bayesdl.models import GP, Layout
from bayesdl.ops import Pivots
from bayesdl.ops.solver import SolverConfig, evidence_gradient, linear_system, memory_needed
from bayesdl.posterior._pathwise import prior_draws
from bayesdl.posterior._solved import condition_matrix_free, problems_of, summary, total_evidence
from bayesdl.posterior.matrix_free import MatrixFreeGPPosterior

DENSE_UP_TO = 5000  # points; above it a Cholesky factor takes longer than the solves that replace it
_DENSE_MATRICES = 4  # n x n matrices that the dense path holds at once: covariance, factor, inverse, gradient


class Choice(NamedTuple):
    """Which path a fit takes, and why.

    Attributes:
        method: "dense" or "matrix_free".
        memory: The budget in bytes.
        needed: What the chosen path is expected to take, in bytes.
        config: Settings of the matrix-free path.
    """

    method: str
    memory: int
    needed: int
    config: SolverConfig


def choose(solver: str | SolverConfig, memory: int | None, data: TrainingData) -> Choice:
    """Dense up to 5 000 points where the kernel matrices fit the memory budget, matrix-free above.

    Raises:
        SettingError: The path that is asked for, or every path, would need more than the budget.
    """
    n, d = data.x.shape[-2:]
    problems = data.batch_shape.numel() * data.y.shape[-1]
    budget = default_memory(data.x.device) if memory is None else memory
    config = solver if isinstance(solver, SolverConfig) else SolverConfig()
    dense = dense_bytes(data)
    free = memory_needed(n, d, 16, config) + 8 * n * (d + 2) * problems
    method = solver if solver in ("dense", "matrix_free") else "matrix_free"
    if solver == "auto":
        method = "dense" if n <= DENSE_UP_TO and dense <= budget else "matrix_free"
    needed = dense if method == "dense" else free
    if needed > budget:
        wanted = f"{n} points must fit the memory budget of {budget / 2**30:.3g} GiB."
        got = f"about {needed / 2**30:.3g} GiB for the {method.replace('_', '-')} path"
        other = "solver='matrix_free'" if free <= budget else "a SolverConfig of smaller rank, or bdl.SparseGP"
        fail(SettingError, "ExactGP.fit", wanted, got=got, fix=f"{other}, or memory=... in bytes")
    return Choice(method, budget, needed, config)


def dense_bytes(data: TrainingData) -> int:
    """Bytes of the kernel matrices that a dense fit holds at once.

    The search works through large problems one by one; the states of all of them are kept.
    """
    n, problems = data.x.shape[-2], data.batch_shape.numel() * data.y.shape[-1]
    return 8 * n * n * max(_DENSE_MATRICES, 3 * problems)


def check_dense(where: str, data: TrainingData) -> None:
    """Refuse data whose kernel matrices would not fit, for an engine that has no other way."""
    needed, budget = dense_bytes(data), default_memory(data.x.device)
    if needed > budget:
        wanted = f"{data.x.shape[-2]} points must fit the memory budget of {budget / 2**30:.3g} GiB."
        fix = "fit fewer rows, or use bdl.SparseGP or bdl.ExactGP, which need no whole matrix"
        fail(SettingError, where, wanted, got=f"about {needed / 2**30:.3g} GiB of kernel matrices", fix=fix)


def default_memory(device: torch.device) -> int:
    """Half of the memory that the device has in all: what is free at the moment would not give the same answer twice.

    On a CPU the limit of a container counts where it is the smaller one.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 2
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        total = 16 * 2**30  # systems that do not say
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            total = min(total, int(file.read()))
    except (OSError, ValueError):
        pass  # no container, or one without a limit
    return total // 2


def fit_matrix_free(
    model: GP, data: TrainingData, units: Units, choice: Choice, search: Search, seed: Seed
) -> MatrixFreeGPPosterior:
    """Learn (unless search.num_starts is 0) and condition, one data set and output after another."""
    began = time.perf_counter()
    layout, config = model.layout(data.x.shape[-1]), choice.config
    root = child_seeds(seed, 1)[0]
    k, n = data.y.shape[-1], data.x.shape[-2]
    raw = problems_of(data, units)
    if config.estimator == "pathwise" and not _draws_functions(model, layout, raw[0][0]):
        config = replace(config, estimator="signs")
    climbs = search.num_starts > 0 and n > config.subset_size and config.num_steps > 0
    if climbs and config.num_probes == 0:
        wanted = "num_probes must be at least 2 where hyper-parameters are learned on all points."
        fail(SettingError, "ExactGP.fit", wanted, got="0", fix="num_probes=16, num_steps=0 or optimize=False")
    found: list[_Climb] = []
    logs = [_Checkpoint.at(config, i, (repr(model), repr(search), root, x, y)) for i, (x, y) in enumerate(raw)]
    if climbs and all(log.found for log in logs):
        theta, report = torch.stack([log.climb.theta for log in logs]), {"subset_size": config.subset_size}
    else:
        theta, report = _start(model, layout, raw, config, search, seed)
    if climbs:
        found = [
            _climb(model, layout, x, y, log.climb if log.found else _Climb.start(theta[i]), config, root, search, log)
            for i, ((x, y), log) in enumerate(zip(raw, logs, strict=True))
        ]
        theta = torch.stack([climb.theta for climb in found])
        norms = [climb.norms.tolist() for climb in found]
        report |= {
            "estimator": config.estimator,
            "adam_steps": config.num_steps,
            "gradient_norm": norms[0] if len(norms) == 1 else norms,
        }
    values, constant = layout.unpack(theta.reshape(*data.batch_shape, k, layout.dim))
    reuses = config.estimator == "pathwise" and config.variance_samples is not None
    solved = []
    for i, (x, y) in enumerate(raw):
        own, own_constant = layout.unpack(theta[i])
        solved.append(
            condition_matrix_free(
                model.kernel,
                model.kernel_values(own),
                own["noise_variance"],
                x,
                y - model.mean_at(x, own, own_constant),
                config,
                seed=root,
                memory=choice.memory,
                start=found[i].solution[:, 0] if found else None,
                first=found[i].solution[:, 1:] if found and reuses else None,
            )
        )
    report |= summary(solved, "ExactGP.fit")
    report |= {"memory_needed": choice.needed, "memory_budget": choice.memory, "tolerance": config.tolerance}
    return MatrixFreeGPPosterior(
        model,
        data,
        units,
        {"engine": "ExactGP", "num_data": n, **report, "seconds": time.perf_counter() - began},
        total_evidence(solved, units, n),
        values=values,
        constant=constant,
        states=tuple(s.state for s in solved),
        config=config,
        seed=root,
        memory=choice.memory,
    )


def _start(
    model: GP, layout: Layout, raw: list[tuple[Tensor, Tensor]], config: SolverConfig, search: Search, seed: Seed
) -> tuple[Tensor, dict[str, Any]]:
    """theta (problems, D) that maximises the evidence of a random subset of each problem, by the dense engine."""
    n, device = raw[0][0].shape[0], raw[0][0].device
    size = min(config.subset_size, n)
    if search.num_starts == 0:
        return layout.initial(raw[0][0]).expand(len(raw), -1), {"num_evaluations": 0}
    g = torch.Generator(device).manual_seed(child_seeds(seed, 2)[1])
    rows = torch.randperm(n, generator=g, device=device)[:size] if size < n else torch.arange(n, device=device)
    x, y = torch.stack([x[rows] for x, _ in raw]), torch.stack([y[rows] for _, y in raw])
    theta, report = maximise_evidence(Evidence(model, layout, x, y), search, seed)
    return theta, {**report, "subset_size": size}


def _draws_functions(model: GP, layout: Layout, x: Tensor) -> bool:
    """Whether functions can be drawn from the prior of the model's kernel."""
    values, _ = layout.unpack(layout.initial(x))
    g = torch.Generator(x.device).manual_seed(0)
    try:
        model.kernel.sample_functions(x.shape[-1], 1, 2, model.kernel_values(values), g)
    except NotImplementedError:
        return False
    return True


class _Climb(NamedTuple):
    """Where Adam is: theta (D), its two moments, the gradient norms so far, and what the next solve starts from.

    The pivots and solves (n, 1 + t) are empty before the first step.
    """

    theta: Tensor
    first: Tensor
    second: Tensor
    norms: Tensor
    solution: Tensor
    pivots: Tensor
    blocks: Tensor

    @classmethod
    def start(cls, theta: Tensor) -> _Climb:
        zeros = torch.zeros_like(theta)
        none = torch.zeros(0, dtype=torch.int64, device=theta.device)
        return cls(theta, zeros, zeros, theta.new_zeros(0), theta.new_zeros(0, 0), none, none.cpu())


def _climb(
    model: GP,
    layout: Layout,
    x: Tensor,
    y: Tensor,
    climb: _Climb,
    config: SolverConfig,
    seed: int,
    search: Search,
    log: _Checkpoint,
) -> _Climb:
    """Adam on the log posterior of the hyper-parameters per point."""
    from tqdm import tqdm

    done = climb.norms.numel()
    bar = tqdm(total=config.num_steps, initial=done, desc=f"{search.engine}, all points", disable=not search.progress)
    with bar:
        for step in range(done, config.num_steps):
            values, constant = layout.unpack(climb.theta)
            # the same streams at every step: the objective of all steps has the same probes
            g = torch.Generator(x.device).manual_seed(seed)
            params, noise, draws = model.kernel_values(values), values["noise_variance"], None
            tiles = tiles_of(model.kernel, params)
            pivots = Pivots(climb.pivots, climb.blocks) if step > 0 else None
            system = linear_system(tiles, x, noise, config, pivots=pivots, generator=g)
            g.manual_seed(seed + 1)  # the posterior draws its functions from the same seed
            if config.estimator == "pathwise":
                _, draws = prior_draws(model.kernel, params, noise, x, config.num_probes, g)
            residual = y - model.mean_at(x, values, constant)
            start = climb.solution if climb.solution.numel() else None
            found = evidence_gradient(system, residual, config, g, start=start, draws=draws)
            by_mean, by_constant = model.mean_pullback(x, values, found.solution[:, 0])
            grads = {f"kernel.{name}": grad for name, grad in found.params.items()}
            grads |= {"noise_variance": found.noise_variance} | by_mean
            _, slopes = layout.log_prior(values)
            gradient = layout.chain(climb.theta, {n: g + slopes[n] for n, g in grads.items()}, by_constant)
            climb = _adam(climb, gradient / x.shape[0], _rate(config, step))
            index, blocks = system.preconditioner.pivots
            climb = climb._replace(solution=found.solution, pivots=index, blocks=blocks)
            log.write(climb)
            bar.update(1)
    return climb


def _adam(climb: _Climb, gradient: Tensor, rate: float) -> _Climb:
    """One step uphill, with moments that remember ten and twenty steps, as there are few."""
    steps = climb.norms.numel() + 1
    first = climb.first.lerp(gradient, 0.1)
    second = climb.second.lerp(gradient.square(), 0.05)
    step = (first / (1 - 0.9**steps)) / ((second / (1 - 0.95**steps)).sqrt() + 1e-10)
    norms = torch.cat([climb.norms, gradient.norm().reshape(1)])
    return climb._replace(theta=climb.theta + rate * step, first=first, second=second, norms=norms)


def _rate(config: SolverConfig, step: int) -> float:
    """From the learning rate down to a tenth of it, along a cosine."""
    share = 0.5 * (1.0 + math.cos(math.pi * step / config.num_steps))
    return config.learning_rate * (0.1 + 0.9 * share)


class _Checkpoint:
    """A file that holds where the search of one problem is; without a path, nothing."""

    def __init__(self, path: str | None, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint
        self.climb: _Climb | None = None

    @classmethod
    def at(cls, config: SolverConfig, problem: int, identity: tuple[Any, ...]) -> _Checkpoint:
        """The file of one problem, read if it is there.

        Raises:
            StorageError: It belongs to other data or other settings.
        """
        if config.checkpoint is None:
            return cls(None, "")
        path = config.checkpoint if problem == 0 else f"{config.checkpoint}.{problem}"
        *settings, x, y = identity
        # sums over the rows, in an order that matters: other data, or the same in another order, differ in them
        order = torch.arange(1, x.shape[0] + 1, dtype=torch.float64, device=x.device)
        sums = [float((x.sum(-1) * order).sum()), float((y * order).sum())]
        log = cls(path, repr([*settings, repr(config), list(x.shape), sums]))
        if os.path.exists(path):
            record, tensors = _storage.read(path)
            if record.get("search") != log._fingerprint:
                wanted = "the checkpoint must be of the same data, model and settings."
                fix = "delete the file, or name another"
                fail(StorageError, "ExactGP.fit", wanted, got=f"{path} of another fit", fix=fix)
            held = {name: tensors[name].to(x.device) for name in _Climb._fields}
            log.climb = _Climb(**{**held, "blocks": tensors["blocks"]})
        return log

    @property
    def found(self) -> bool:
        """Whether there is something to go on from."""
        return self.climb is not None

    def write(self, climb: _Climb) -> None:
        """Keep `climb`, atomically."""
        if self._path is not None:
            _storage.write(self._path, {"search": self._fingerprint}, climb._asdict())
