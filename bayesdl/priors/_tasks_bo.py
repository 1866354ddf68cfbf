r"""Functions as Bayesian optimisation meets them: the HEBO+ prior of PFNs4BO.

    f ~ GP(0, outputscale Matern-3/2(lengthscales)) on a box, some columns ignored,    y = f + e

Reference: Mueller, Feurer, Hollmann, Hutter (2023), "PFNs4BO: In-context learning for Bayesian optimization", arXiv
2305.17535; Cowen-Rivers et al. (2022), "HEBO", arXiv 2012.03826, for what it grew from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.hyper import Gamma, HyperPrior, LogNormal
from bayesdl.kernels import Kernel, Matern, Scale
from bayesdl.priors._tasks_base import Inputs, Tasks, box_width, check_inputs, check_sizes, draw_inputs, per_task
from bayesdl.priors._tasks_conditional import Conditional, condition
from bayesdl.priors._tasks_draws import (
    check_law,
    check_noise,
    draw_functions,
    draw_noise,
    draw_parameters,
    observed,
    stretched,
)


@dataclass(frozen=True)
class HEBOPlus:
    r"""The prior on which PFNs4BO was trained, and two features of its ancestor on request.

    Hyper-parameters are drawn in units of the box [0, 1]^d, and one task has one draw of them:

        lengthscale_k ~ Gamma(1.2107, 1.5212),  outputscale ~ Gamma(0.8453, 0.3994)  (shape, rate)
        noise_variance ~ LogNormal(-4.63, 0.5)
        column k is ignored with probability 0.3; where all would be, one at random stays

    With `by_dimension`, lengthscales are sqrt(m) times as long where m columns matter: distances in the box grow as
    sqrt(m), and a function of six columns with lengthscales made for one is noise to whoever sees fifty values of it.

    Inputs come in standardised units, where the box is [-sqrt 3, sqrt 3]^d; with `inputs="unit"` as they are.

    Attributes:
        unused: Probability that a column does not matter, from 0 to below 1.
        linear: Whether to add a linear function, of variance a b w'w with a, b ~ U(0, 1), as HEBO does.
        warp: Standard deviations of ln a and ln b of a Kumaraswamy warp 1 - (1 - u^a)^b of every column u, inputs
            outside of the box counting as on its side; or None for no warp.
        lengthscale: Prior on each lengthscale, in units of the box.
        outputscale: Prior on the variance of f.
        noise_variance: Prior on the variance of the noise, or a number.
        inputs: As for `FixedGP`.
        by_dimension: Whether lengthscales grow with the number of columns that matter (not in PFNs4BO).

    Latents: "lengthscale" (batch, d), in the units of x, "relevant" (batch, d), "outputscale", "noise_variance",
    "jitter" (batch), and "linear_variance" (batch), "warp" (batch, 2, d) where there are such.
    """

    unused: float = 0.3
    linear: bool = False
    warp: tuple[float, float] | None = None
    lengthscale: HyperPrior = field(default_factory=lambda: Gamma(1.2107, 1.5212))
    outputscale: HyperPrior = field(default_factory=lambda: Gamma(0.8453, 0.3994))
    noise_variance: HyperPrior | float = field(default_factory=lambda: LogNormal(-4.63, 0.5))
    inputs: Inputs = "uniform"
    by_dimension: bool = False

    def __post_init__(self) -> None:
        _checks.at_least("HEBOPlus", "unused", self.unused, 0.0)
        if self.unused >= 1:
            fail(SettingError, "HEBOPlus", "unused must be below 1.", got=repr(self.unused), fix="unused=0.3")
        check_warp("HEBOPlus", self.warp)
        check_law("HEBOPlus", "lengthscale", self.lengthscale)
        check_law("HEBOPlus", "outputscale", self.outputscale)
        check_noise("HEBOPlus", self.noise_variance)
        check_inputs("HEBOPlus", self.inputs)

    def kernel_for(self, d: int) -> Kernel:
        """The kernel for d columns that all matter, with its priors in the units of x, as a `GP` would take it."""
        return self._kernel(math.sqrt(d) if self.by_dimension else 1.0)

    def _kernel(self, factor: float) -> Kernel:
        lengthscale = stretched("HEBOPlus", self.lengthscale, factor * box_width(self.inputs))
        return Scale(Matern(nu=1.5, lengthscale_prior=lengthscale), 1.0, self.outputscale)

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: O(batch n^3) time; memory of covariance matrices is bounded."""
        check_sizes("HEBOPlus", batch, n, d, generator)
        x = draw_inputs("HEBOPlus", self.inputs, batch, n, d, generator)
        kernel = self._kernel(1.0)
        params = draw_parameters(kernel.parameters(d), batch, generator)
        relevant = _relevant(self.unused, batch, d, generator)
        if self.by_dimension:
            params["base.lengthscale"] = params["base.lengthscale"] * relevant.sum(-1, keepdim=True).sqrt()
        latents = {
            "lengthscale": params["base.lengthscale"],
            "outputscale": params["outputscale"],
            "relevant": relevant,
        }
        width, low = self._box()
        if self.warp is not None:
            latents["warp"] = draw_warp(self.warp, batch, d, generator)
        points = self._seen(x, latents)
        f, latents["jitter"] = draw_functions(kernel, params, points, generator)
        if self.linear:
            scales = torch.rand(2, batch, generator=generator, dtype=torch.float64, device=x.device)
            latents["linear_variance"] = scales.prod(0)
            slopes = torch.randn(batch, d, 1, generator=generator, dtype=torch.float64, device=x.device)
            line = ((points - low) / width * relevant.unsqueeze(1)) @ slopes
            f = f + per_task(latents["linear_variance"].sqrt(), f) * line.squeeze(-1)
        return observed(x, f, draw_noise(self.noise_variance, batch, generator), latents, generator)

    def conditional(
        self, latents: Mapping[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int = 0
    ) -> Conditional:
        """The law of f at xs given latents and points; see `FixedGP.conditional`. With a linear part: SettingError."""
        if self.linear:
            wanted = "the law of further values is known without the linear part only."
            fail(SettingError, "HEBOPlus.conditional", wanted, got="linear=True", fix='targets="drawn"')
        of_kernel = {**latents, "base.lengthscale": latents["lengthscale"]}
        seen = (self._seen(x, latents), y, self._seen(xs, latents))
        return condition(self._kernel(1.0), of_kernel, *seen, num_noiseless)

    def _box(self) -> tuple[float, float]:
        width = box_width(self.inputs)
        return width, 0.0 if self.inputs == "unit" else -0.5 * width

    def _seen(self, x: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """The points in the coordinates of the kernel: warped, ignored columns at 0."""
        points = x.to(torch.float64)
        if self.warp is not None:
            width, low = self._box()
            points = low + width * kumaraswamy(((points - low) / width).clamp(0.0, 1.0), latents["warp"])
        return points * latents["relevant"].unsqueeze(1)


def draw_warp(log_sd: tuple[float, float], batch: int, d: int, generator: torch.Generator) -> Tensor:
    """Exponents a and b of a Kumaraswamy warp, log-normal around 1: (batch, 2, d) in float64."""
    z = torch.randn(batch, 2, d, generator=generator, dtype=torch.float64, device=generator.device)
    return (z * torch.tensor(log_sd, dtype=torch.float64, device=generator.device).unsqueeze(-1)).exp()


def kumaraswamy(u: Tensor, exponents: Tensor) -> Tensor:
    """1 - (1 - u^a)^b for u (batch n d) in [0, 1], the cdf of Kumaraswamy's distribution; exponents (batch 2 d)."""
    a, b = exponents.to(u.dtype).unsqueeze(-2).unbind(1)
    return 1.0 - (1.0 - u.pow(a)).pow(b)


def check_warp(where: str, warp: object) -> None:
    """Raise SettingError unless `warp` is None or a pair of numbers of at least 0."""
    if warp is None:
        return
    if not isinstance(warp, (tuple, list)) or len(warp) != 2:
        wanted = "warp must be None or the standard deviations of ln a and ln b."
        fail(SettingError, where, wanted, got=repr(warp), fix="warp=(0.976, 0.8)")
    for value in warp:
        _checks.at_least(where, "warp", value, 0.0)


def _relevant(unused: float, batch: int, d: int, generator: torch.Generator) -> Tensor:
    """Which columns matter, bool (batch, d): each with probability 1 - unused, and at least one."""
    u = torch.rand(batch, d, generator=generator, device=generator.device)
    return (u >= unused) | (u == u.amax(-1, keepdim=True))
