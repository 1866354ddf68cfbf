"""What Gaussian-process priors over tasks are made of: draws of hyper-parameters, of functions, of noise; checks.

Function values are drawn exactly, by a Cholesky factor in float64. A relative 1e-9 of the mean prior variance is added
to the diagonal from the start, since smooth kernels would else nearly all be factorised twice; what the factorisation
adds beyond that is rare, and both are returned as the jitter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bayesdl import _checks, ops
from bayesdl.errors import NumericalError, SettingError, fail
from bayesdl.hyper import Gamma, HalfNormal, HyperPrior, LogNormal, Parameter
from bayesdl.kernels import RBF, Kernel, Linear, Matern, Periodic
from bayesdl.priors._tasks_base import HALF_WIDTH, Tasks, merge_latents, per_task

FAMILIES = ("rbf", "matern-1/2", "matern-3/2", "matern-5/2", "periodic", "linear")

_JITTER = 1e-9
_SMALLEST = 1e-8  # of a positive hyper-parameter: an inverse lengthscale must have a finite square
_MATRIX_BYTES = {"cpu": 2**26}  # of one batch of covariance matrices; a GPU wants larger ones
_MATRIX_BYTES_GPU = 2**30


def draw_functions(
    kernel: Kernel, params: dict[str, Tensor], x: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Exact draws f (batch n) in float64 at x (batch n d), one a task, and the jitter (batch) that was added.

    Args:
        params: Hyper-parameters of the kernel, each (batch, *shape).

    Covariance matrices are formed for as many tasks at a time as a fixed amount of memory holds; the draws do not
    depend on how many those are.
    """
    batch, n, _ = x.shape
    z = torch.randn(batch, n, 1, generator=generator, dtype=torch.float64, device=generator.device)
    f, jitter = torch.empty_like(z[..., 0]), z.new_empty(batch)
    points = x.to(torch.float64)
    with torch.no_grad():
        for rows in tasks_at_a_time(points):
            k, _ = kernel.value_and_pullback(points[rows], {name: value[rows] for name, value in params.items()})
            diagonal = k.diagonal(dim1=-2, dim2=-1)
            added = _JITTER * diagonal.mean(-1)
            diagonal += added.unsqueeze(-1)
            result = ops.cholesky(k)
            f[rows] = (result.factor @ z[rows]).squeeze(-1)
            jitter[rows] = added + result.jitter
    if not bool(f.isfinite().all()):
        wanted = "the covariance of every task must be positive definite."
        got = f"{int((~f.isfinite()).any(-1).sum())} of {batch} that no jitter up to 1e-5 makes so"
        fail(
            NumericalError, "priors.tasks", wanted, got=got, fix="a positive definite kernel, or narrower hyper-priors"
        )
    return f, jitter


def tasks_at_a_time(points: Tensor) -> Iterator[slice]:
    """Slices of the batch of points (batch n d) whose covariance matrices fit into a fixed amount of memory."""
    batch, n, _ = points.shape
    size = max(1, _MATRIX_BYTES.get(points.device.type, _MATRIX_BYTES_GPU) // (8 * n * n))
    return (slice(start, start + size) for start in range(0, batch, size))


def draw_from_several(
    kernels: Sequence[Kernel],
    weights: Sequence[float] | None,
    x: Tensor,
    generator: torch.Generator,
    at_typical_norm: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """f (batch n) in float64 at x, each task with a kernel of its own and hyper-parameters from that kernel's priors.

    Returns:
        f, and the latents: "kernel", "jitter" and the hyper-parameters.
    """
    batch, _, d = x.shape
    which = choose(weights, len(kernels), batch, generator)
    f = torch.empty(x.shape[:-1], dtype=torch.float64, device=x.device)
    parts = []
    for i, kernel in enumerate(kernels):
        rows = (which == i).nonzero().squeeze(-1) if len(kernels) > 1 else torch.arange(batch, device=x.device)
        if rows.numel() == 0:
            continue
        params = draw_parameters(kernel.parameters(d), rows.numel(), generator)
        if at_typical_norm:
            ones = torch.ones(rows.numel(), 1, d, dtype=torch.float64, device=x.device)
            raw = kernel.diagonal(ones, {**params, "outputscale": torch.ones_like(params["outputscale"])})
            params["outputscale"] = params["outputscale"] / raw.squeeze(-1)
        f[rows], jitter = draw_functions(kernel, params, x[rows], generator)
        parts.append((rows, {**params, "jitter": jitter}))
    return f, {"kernel": which, **merge_latents(parts, batch)}


def choose(weights: Sequence[float] | None, num: int, batch: int, generator: torch.Generator) -> Tensor:
    """Which of `num` things each of `batch` tasks takes, int64 (batch)."""
    p = torch.tensor(weights or (1.0,) * num, dtype=torch.float64, device=generator.device)
    return torch.multinomial(p, batch, replacement=True, generator=generator)


def draw_parameters(parameters: Sequence[Parameter], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Values (batch, *shape) in float64 from the priors; a parameter without a prior keeps its initial value."""
    like = torch.empty((), dtype=torch.float64, device=generator.device)
    values = {}
    for p in parameters:
        if p.prior is None:
            values[p.name] = p.initial_tensor(like).expand(batch, *p.shape)
        else:
            values[p.name] = p.prior.sample((batch, *p.shape), generator).clamp(
                _SMALLEST if p.lower == 0 else p.lower, p.upper
            )
    return values


def draw_noise(law: HyperPrior | float, batch: int, generator: torch.Generator) -> Tensor:
    """Noise variances (batch) in float64."""
    if isinstance(law, (int, float)):
        return torch.full((batch,), float(law), dtype=torch.float64, device=generator.device)
    return law.sample((batch,), generator)


def observed(
    x: Tensor, f: Tensor, noise_variance: Tensor, latents: dict[str, Tensor], generator: torch.Generator
) -> Tasks:
    """Function values (batch n) with noise on them, all rounded to float32 in the end."""
    e = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
    y = f + per_task(noise_variance.sqrt(), f) * e
    return Tasks(x, y.to(torch.float32), f.to(torch.float32), {**latents, "noise_variance": noise_variance})


def stretched(where: str, law: HyperPrior, factor: float) -> HyperPrior:
    """The law of factor * theta, for theta ~ law."""
    if isinstance(law, LogNormal):
        return replace(law, loc=law.loc + math.log(factor))
    if isinstance(law, Gamma):
        return replace(law, rate=law.rate / factor)
    if isinstance(law, HalfNormal):
        return replace(law, scale=law.scale * factor)
    wanted = "a prior that is to be stretched must be LogNormal, Gamma or HalfNormal."
    fix = "by_dimension=False, with a prior in the units of x"
    return fail(SettingError, where, wanted, got=_checks.describe(law), fix=fix)


def check_kernel(where: str, kernel: object) -> None:
    """Raise SettingError unless `kernel` is one of this package."""
    if not isinstance(kernel, Kernel):
        wanted = "kernel must be a kernel of bayesdl.kernels."
        fail(SettingError, where, wanted, got=_checks.describe(kernel), fix="bdl.kernels.RBF(lengthscale=0.6), say")


def check_law(where: str, name: str, law: object) -> None:
    """Raise SettingError unless `law` is a prior on a positive number that can be drawn from."""
    if isinstance(law, type) or not callable(getattr(law, "sample", None)):
        wanted = f"{name} must be a prior that can be drawn from."
        fail(SettingError, where, wanted, got=_checks.describe(law), fix=f"{name}=bdl.priors.LogNormal(0.0, 0.5)")


def check_noise(where: str, law: object) -> None:
    """Raise SettingError unless `law` is a noise variance of at least 0 or a prior on one."""
    if isinstance(law, (int, float)):
        _checks.at_least(where, "noise_variance", law, 0.0)
    else:
        check_law(where, "noise_variance", law)


def check_weights(where: str, weights: tuple[float, ...] | None, num: int, of: str) -> None:
    """Raise SettingError unless there are `num` weights, none negative and not all 0, and `num` is above 0."""
    good = weights is None or (len(weights) == num and all(w >= 0 for w in weights) and sum(weights) > 0)
    if num == 0 or not good:
        wanted = f"weights must hold one number of at least 0 for each of {num} {of}." if num else f"{of} is empty."
        fail(SettingError, where, wanted, got=repr(weights), fix=f"weights=None for equal ones, at least one of {of}")


def family(name: str, d: int, lengthscale: HyperPrior, ard: bool) -> Kernel:
    """The kernel of one of `FAMILIES` for d columns, of variance 1, with its priors; `lengthscale` is for distances."""
    if name == "linear":
        # at inputs of typical norm, |x|^2 = d, its variance is 1
        return Linear(variance=1.0 / d, variance_prior=None)
    if name == "periodic":
        # two to ten periods within the box; the lengthscale here is a pure number, not a distance
        period = LogNormal(math.log(2.0 * HALF_WIDTH / 3.0), 0.5)
        return Periodic(ard=ard, period_prior=period, lengthscale_prior=LogNormal(math.log(d), 0.5))
    if name == "rbf":
        return RBF(ard=ard, lengthscale_prior=lengthscale)
    nu = {"matern-1/2": 0.5, "matern-3/2": 1.5, "matern-5/2": 2.5}[name]
    return Matern(nu=nu, ard=ard, lengthscale_prior=lengthscale)
