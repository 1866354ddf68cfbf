r"""Gaussian processes as priors over tasks.

theta ~ p(theta),    f ~ GP(0, k_theta),    y_i = f(x_i) + e_i,    e_i ~ N(0, noise_variance)
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
from bayesdl.kernels import NNGP, Kernel, Scale
from bayesdl.priors._tasks_base import Inputs, Tasks, box_width, check_inputs, check_sizes, draw_inputs
from bayesdl.priors._tasks_conditional import Conditional, condition, condition_several
from bayesdl.priors._tasks_draws import (
    FAMILIES,
    check_kernel,
    check_law,
    check_noise,
    check_weights,
    draw_from_several,
    draw_functions,
    draw_noise,
    family,
    observed,
    stretched,
)
from bayesdl.priors.scale import InverseGamma, ScalePrior


@dataclass(frozen=True)
class FixedGP:
    """A Gaussian process whose hyper-parameters are known: those that the kernel starts from.

    Attributes:
        kernel: Any kernel of `bayesdl.kernels`; its initial hyper-parameters are used.
        noise_variance: Of the observations, at least 0.
        inputs: "uniform", "normal", "clustered", "mixed", "unit", or a function (batch, n, d, generator) -> x.

    Latents: "noise_variance" and "jitter" (batch), and the hyper-parameters of the kernel.

    `FixedGP(RBF(lengthscale=0.6), noise_variance=1e-4, inputs="unit")` is the first prior of Mueller et al. (2022),
    arXiv 2112.10510.
    """

    kernel: Kernel
    noise_variance: float = 0.01
    inputs: Inputs = "uniform"

    def __post_init__(self) -> None:
        check_kernel("FixedGP", self.kernel)
        _checks.at_least("FixedGP", "noise_variance", self.noise_variance, 0.0)
        check_inputs("FixedGP", self.inputs)

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: O(batch n^3) time; memory of covariance matrices is bounded."""
        check_sizes("FixedGP", batch, n, d, generator)
        x = draw_inputs("FixedGP", self.inputs, batch, n, d, generator)
        like = torch.empty((), dtype=torch.float64, device=generator.device)
        params = {p.name: p.initial_tensor(like).expand(batch, *p.shape) for p in self.kernel.parameters(d)}
        f, jitter = draw_functions(self.kernel, params, x, generator)
        noise = like.new_full((batch,), self.noise_variance)
        return observed(x, f, noise, {**params, "jitter": jitter}, generator)

    def conditional(
        self, latents: Mapping[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int = 0
    ) -> Conditional:
        """The normal law of f at xs, in the tasks with these latents, given some of their points.

        Args:
            latents: As `sample` gives them.
            x, y: (batch, n, d) and (batch, n), points of the same tasks; n may be 0.
            xs: (batch, q, d).
            num_noiseless: How many of the last values of y are free of noise.

        Returns:
            mean and variance of f, both (batch, q), and noise_variance (batch), in float64.

        Cost: O(batch (n + q) n^2) time.
        """
        return condition(self.kernel, latents, x, y, xs, num_noiseless)


@dataclass(frozen=True)
class HyperGP:
    r"""A Gaussian process with a prior on its hyper-parameters, which every task draws anew, and on its kernel.

        kernel ~ Categorical(weights),   lengthscale_k ~ sqrt(d) p(lengthscale),   outputscale, noise_variance ~ ...

    The defaults are for standardised inputs and targets: prior variances around 1, lengthscales between a sixth and
    six times the spread of the inputs, noise anywhere from a thousandth of the variance to half of it.

    Attributes:
        kernels: Names among "rbf", "matern-1/2", "matern-3/2", "matern-5/2", "periodic" and "linear", to which the
            three priors below apply; or kernels, which bring priors of their own (a parameter without one keeps its
            initial value).
        weights: How probable each is; None for equally.
        lengthscale: Prior on each lengthscale, in units of sqrt(d) where `by_dimension`.
        outputscale: Prior on the variance of f.
        noise_variance: Prior on the variance of the noise, or a number.
        by_dimension: Whether lengthscales grow as sqrt(d), as distances do.
        ard: One lengthscale a column, or one for all.
        inputs: As for `FixedGP`.

    Latents: "kernel" (batch) its place in `kernels`, "outputscale" (batch), "base.lengthscale" (batch, d) and what
    other parameters the kernels have, NaN for the tasks whose kernel has no such; "noise_variance", "jitter" (batch).
    """

    kernels: tuple[str | Kernel, ...] = ("rbf", "matern-1/2", "matern-3/2", "matern-5/2")
    weights: tuple[float, ...] | None = None
    lengthscale: HyperPrior = field(default_factory=lambda: LogNormal(0.0, 0.9))
    outputscale: HyperPrior = field(default_factory=lambda: LogNormal(-0.1, 0.4))
    noise_variance: HyperPrior | float = field(default_factory=lambda: LogNormal(-3.5, 1.5))
    by_dimension: bool = True
    ard: bool = True
    inputs: Inputs = "uniform"

    def __post_init__(self) -> None:
        given = (self.kernels,) if isinstance(self.kernels, (str, Kernel)) else tuple(self.kernels)
        object.__setattr__(self, "kernels", given)
        for kernel in given:
            if not isinstance(kernel, Kernel):
                _checks.choice("HyperGP", "kernels", kernel, FAMILIES)
        check_weights("HyperGP", self.weights, len(given), "kernels")
        check_law("HyperGP", "lengthscale", self.lengthscale)
        check_law("HyperGP", "outputscale", self.outputscale)
        check_noise("HyperGP", self.noise_variance)
        check_inputs("HyperGP", self.inputs)

    @classmethod
    def pgp_mix(cls, inputs: Inputs = "unit") -> HyperGP:
        """The hyper-prior of Mueller et al. (2022): ARD Matern-5/2, lengthscale ~ Gamma(3, 6), outputscale ~ Gamma(0.5,
        0.15), noise variance ~ Gamma(1.1, 0.05), by shape and rate. Lengthscales are in units of the box.

        Its targets are far from standardised: the mean noise variance is 22, that of f 3.3. There, a tenth of a batch
        shares one draw of the hyper-parameters; here every task has its own.
        """
        lengthscale = stretched("HyperGP.pgp_mix", Gamma(3.0, 6.0), box_width(inputs))
        scales = {"outputscale": Gamma(0.5, 0.15), "noise_variance": Gamma(1.1, 0.05)}
        return cls(("matern-5/2",), lengthscale=lengthscale, **scales, by_dimension=False, inputs=inputs)

    def kernels_for(self, d: int) -> tuple[Kernel, ...]:
        """The kernels for d columns with all their priors, as a `GP` would take them to compute the exact posterior."""
        factor = math.sqrt(d) if self.by_dimension else 1.0
        lengthscale = stretched("HyperGP", self.lengthscale, factor) if factor != 1.0 else self.lengthscale
        return tuple(
            kernel
            if isinstance(kernel, Kernel)
            else Scale(family(kernel, d, lengthscale, self.ard), 1.0, self.outputscale)
            for kernel in self.kernels
        )

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: O(batch n^3) time; memory of covariance matrices is bounded."""
        check_sizes("HyperGP", batch, n, d, generator)
        x = draw_inputs("HyperGP", self.inputs, batch, n, d, generator)
        f, latents = draw_from_several(self.kernels_for(d), self.weights, x, generator)
        noise = draw_noise(self.noise_variance, batch, generator)
        return observed(x, f, noise, latents, generator)

    def conditional(
        self, latents: Mapping[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int = 0
    ) -> Conditional:
        """The law of f at xs given latents and points; see `FixedGP.conditional`."""
        return condition_several(self.kernels_for(x.shape[-1]), latents, x, y, xs, num_noiseless)


@dataclass(frozen=True)
class NetworkGP:
    r"""Networks of infinite width: a Gaussian process with the NNGP kernel, of random depth, activation and scales.

    The raw variance of such a network depends on all of those and is brought to the drawn outputscale at inputs of
    typical norm, |x|^2 = d; elsewhere it is larger or smaller as the network says.

    Attributes:
        depths: Numbers of hidden layers, equally likely.
        activations: Names that `bayesdl.kernels.NNGP` knows, equally likely.
        outputscale: Prior on the variance of f at inputs of typical norm.
        noise_variance: Prior on the variance of the noise, or a number.
        inputs: As for `FixedGP`.

    Latents: "kernel" (batch), in the order of depths within activations; "base.w_std", "base.b_std", "outputscale" (the
    factor in front of the NNGP kernel, so that `Scale(NNGP(...))` at these values is the covariance of the task),
    "noise_variance", "jitter" (batch).
    """

    depths: tuple[int, ...] = (1, 2, 4)
    activations: tuple[str, ...] = ("relu", "erf")
    outputscale: HyperPrior = field(default_factory=lambda: LogNormal(-0.1, 0.4))
    noise_variance: HyperPrior | float = field(default_factory=lambda: LogNormal(-3.5, 1.5))
    inputs: Inputs = "uniform"

    def __post_init__(self) -> None:
        for name in ("depths", "activations"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values) if isinstance(values, (tuple, list)) else (values,))
        check_law("NetworkGP", "outputscale", self.outputscale)
        check_noise("NetworkGP", self.noise_variance)
        check_inputs("NetworkGP", self.inputs)
        self.kernels_for(1)  # refuses an unknown activation or depth here and now

    def kernels_for(self, d: int) -> tuple[Kernel, ...]:
        """The kernels that are mixed, all alike in weight: their order is the number in `latents["kernel"]`."""
        return tuple(
            Scale(NNGP(depth=depth, activation=activation), 1.0, self.outputscale)
            for activation in self.activations
            for depth in self.depths
        )

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: O(batch n^3 + depth batch n^2) time; memory of covariance matrices is bounded."""
        check_sizes("NetworkGP", batch, n, d, generator)
        x = draw_inputs("NetworkGP", self.inputs, batch, n, d, generator)
        f, latents = draw_from_several(self.kernels_for(d), None, x, generator, at_typical_norm=True)
        noise = draw_noise(self.noise_variance, batch, generator)
        return observed(x, f, noise, latents, generator)

    def conditional(
        self, latents: Mapping[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int = 0
    ) -> Conditional:
        """The law of f at xs given latents and points; see `FixedGP.conditional`."""
        return condition_several(self.kernels_for(x.shape[-1]), latents, x, y, xs, num_noiseless)


@dataclass(frozen=True)
class StudentTProcess:
    r"""A scale mixture: all of a task is multiplied by one random sigma, signal and noise alike.

        v ~ p(v),    y = sqrt(v) y_base

    With v ~ InverseGamma(a, b), and a base that is a Gaussian process, y is a Student-t process with 2a degrees of
    freedom; the default, a = 2.5 and b = 1.5, has 5 of them and leaves the variance of y as it is.

    Attributes:
        base: The prior that is scaled, a `HyperGP()` by default.
        scale_prior: A prior on v that can be drawn from, of `bayesdl.priors`.

    Latents: those of the base, before the scaling, and "scale" (batch), which is v.
    """

    base: FixedGP | HyperGP | NetworkGP = field(default_factory=HyperGP)
    scale_prior: ScalePrior | HyperPrior = field(default_factory=lambda: InverseGamma(2.5, 1.5))

    def __post_init__(self) -> None:
        for name, attribute in (("base", "sample"), ("scale_prior", "sample")):
            value = getattr(self, name)
            if isinstance(value, type) or not callable(getattr(value, attribute, None)):
                fix = "base=HyperGP()" if name == "base" else "scale_prior=bdl.priors.InverseGamma(2.5, 1.5)"
                wanted = f"{name} must be a prior that can be drawn from."
                fail(SettingError, "StudentTProcess", wanted, got=_checks.describe(value), fix=fix)

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: that of the base."""
        check_sizes("StudentTProcess", batch, n, d, generator)
        tasks = self.base.sample(batch, n, d, generator)
        if not tasks.y.is_floating_point():
            fail(
                SettingError,
                "StudentTProcess",
                "base must be a prior over regression tasks.",
                got=type(self.base).__name__,
                fix="base=HyperGP()",
            )
        v = self.scale_prior.sample((batch, 1), generator).clamp(1e-12, 1e12)
        sigma = v.sqrt().to(torch.float32)
        latents = {**tasks.latents, "scale": v.squeeze(-1)}
        return Tasks(tasks.x, tasks.y * sigma, tasks.noiseless * sigma, latents)

    def conditional(
        self, latents: Mapping[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int = 0
    ) -> Conditional:
        """The law of f at xs given latents and points; see `FixedGP.conditional`."""
        if not callable(getattr(self.base, "conditional", None)):
            wanted, fix = "base must know the law of further values.", 'targets="drawn", or base=HyperGP()'
            fail(SettingError, "StudentTProcess.conditional", wanted, got=type(self.base).__name__, fix=fix)
        sigma = latents["scale"].to(torch.float64).sqrt().unsqueeze(-1)
        law = self.base.conditional(latents, x, y / sigma, xs, num_noiseless)
        square = sigma.square()
        return Conditional(law.mean * sigma, law.variance * square, law.noise_variance * square.squeeze(-1))
