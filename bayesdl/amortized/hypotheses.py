r"""The kernel head: hypotheses about the hyper-parameters of a Gaussian process, each conditioned in closed form.

The network reads the context and places M hypotheses theta_m = (lengthscales, outputscale, noise variance), each with a
volume v_m. What they say is weighted by Bayes' rule and mixed:

    p(y | x, D) = sum_m w_m N(y | mean_m(x), variance_m(x)),    w_m ~ v_m p(D | theta_m)

with the mean, variance and evidence of an exact Gaussian process. So the network is left with what no formula gives,
where the hyper-parameters lie and how far one hypothesis reaches, and learns it from the same loss as any other head.

What attention cannot read off a hundred points to two digits, a slope can: in each refinement every hypothesis is told
the gradient of its log evidence, and a small network turns it into a step (learned optimisation, as in Andrychowicz and
others, 2016, arXiv 1606.04474, unrolled and trained with the rest).

Points that come later (`append`) are conditioned on exactly: the hypotheses stay, and their weights follow the
likelihood. A chain of predictions is therefore a joint draw of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from bayesdl import ops
from bayesdl.kernels import RBF, Kernel, Matern, Scale
from bayesdl.ops import update

KERNELS: dict[str, Kernel] = {
    "matern-1/2": Scale(Matern(nu=0.5)),
    "matern-3/2": Scale(Matern(nu=1.5)),
    "matern-5/2": Scale(Matern(nu=2.5)),
    "rbf": Scale(RBF()),
}
_NOISE = math.exp(-3.0)  # the noise variance where a head's output is 0
_WIDEST = 8.0  # largest |log| of a hyper-parameter, in the network's units
_FLOOR = 1e-5  # of a variance, in outputscales: float32 factorises a few hundred points above it


class Hypotheses(NamedTuple):
    """M Gaussian processes that have seen the same context of n points, for each of B data sets.

    Attributes:
        state: The data and their factors, with axes (B, M), inputs and targets (B, 1).
        lengthscale: (B M d).
        outputscale: (B M).
        log_weight: (B M), normalised.
    """

    state: ops.GPState
    lengthscale: Tensor
    outputscale: Tensor
    log_weight: Tensor

    @property
    def num_points(self) -> int:
        """Points read or appended so far."""
        return self.state.x.shape[-2]

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device in which it is kept, with the rows as first axis."""
        return self.log_weight

    @property
    def params(self) -> dict[str, Tensor]:
        """Hyper-parameters as the kernel names them."""
        return {"base.lengthscale": self.lengthscale, "outputscale": self.outputscale}

    @property
    def noise_variance(self) -> Tensor:
        """(B M)."""
        return self.state.noise_variance

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed, all of which have the rows as first axis."""
        return type(self)(ops.GPState(*map(function, self.state)), *map(function, self[1:]))

    def numbers_after(self, num: int) -> int:
        """Numbers kept for each row once there are `num` points more."""
        return self.log_weight.shape[-1] * (self.num_points + num) ** 2


def join(parts: list[Hypotheses]) -> Hypotheses:
    """Rows of several, of the same number of points."""
    others = [name for name in ops.GPState._fields if name != "chol"]
    fields = {name: torch.cat([getattr(part.state, name) for part in parts]) for name in others}
    # factors are laid out by columns: joined as rows, each would be turned around twice
    chol = torch.cat([part.state.chol.mT for part in parts]).mT
    state = ops.GPState(chol=chol, **fields)
    return Hypotheses(state, *(torch.cat(each) for each in zip(*(part[1:] for part in parts), strict=True)))


def read(kernel: str, raw: Tensor, x: Tensor, y: Tensor) -> Hypotheses:
    """The hypotheses behind raw outputs (B M p), p >= d + 3, conditioned on x (B n d) and y (B n).

    Cost: O(B M n^3) time, O(B M n^2) memory.
    """
    lengthscale, outputscale, noise = _hyper_parameters(raw, x.shape[-1])
    x, y = x.unsqueeze(1), y.unsqueeze(1)
    params = {"base.lengthscale": lengthscale, "outputscale": outputscale}
    if torch.is_grad_enabled():
        covariance = KERNELS[kernel](x, None, params)
    else:  # the same numbers in fewer passes
        covariance, _ = KERNELS[kernel].value_and_pullback(x, params)
    state = ops.condition(covariance, x, y, noise)
    log_weight = raw[..., -1] + ops.log_marginal(state)
    return Hypotheses(state, lengthscale, outputscale, log_weight.log_softmax(-1))


@torch.no_grad()
def slopes(kernel: str, raw: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What a refinement is told of hypotheses, raw outputs (B M p): (B M p + 1), without a graph.

    First asinh of the slope of log p(D | theta) in each of the p - 1 logarithms (0 for columns that x lacks), which
    keeps the order of magnitude of slopes of any size; then asinh of how far log p(D | theta) is behind the best
    hypothesis, and log(1 + n).

    Cost: O(B M n^3) time, by tiles.
    """
    (b, m, p), (n, d) = raw.shape, x.shape[-2:]
    told = raw.new_zeros(b, m, p + 1)
    told[..., -1] = math.log1p(n)
    if n == 0:
        return told
    lengthscale, outputscale, noise = _hyper_parameters(raw, d)
    params = {"base.lengthscale": lengthscale, "outputscale": outputscale}
    found = ops.mll_and_grad(
        KERNELS[kernel].value_and_pullback, x.unsqueeze(1).expand(-1, m, -1, -1).contiguous(), params,
        y.unsqueeze(1).expand(-1, m, -1).contiguous(), noise,
    )  # fmt: skip
    told[..., :d] = found.params["base.lengthscale"] * lengthscale
    told[..., p - 3] = found.params["outputscale"] * outputscale
    told[..., p - 2] = found.noise_variance * noise
    told[..., p - 1] = found.value - found.value.amax(-1, keepdim=True)
    told[..., :p] = told[..., :p].nan_to_num().asinh()  # a hypothesis that cannot be factored stays where it is
    return told


def step(told: Tensor, change: Tensor) -> Tensor:
    """The change of raw outputs (B M p) that a refinement asks for, with its outputs (B M 2p - 1).

    A part of it is free, the other one a learned multiple of the slopes, 1/20 of them as it begins.
    """
    p = told.shape[-1] - 1
    along = 0.05 * change[..., p:].clamp(-_WIDEST, _WIDEST).exp() * told[..., : p - 1]
    return change[..., :p] + nn.functional.pad(along, (0, 1))


def append(kernel: str, known: Hypotheses, x: Tensor, y: Tensor, *, noiseless: bool) -> Hypotheses:
    """The hypotheses after x (B t d), y (B t) too.

    Cost: O(B M t (n + t)^2) time.
    """
    state, scale = known.state, known.outputscale
    noise = state.noise_variance
    x, y = x.unsqueeze(1), y.unsqueeze(1)
    across, within = (KERNELS[kernel](*points, known.params) for points in ((state.x, x), (x, None)))
    seen = state._replace(noise_variance=_FLOOR * scale) if noiseless else state
    after = update.append(seen, across, within, x, y)._replace(noise_variance=noise)
    gained = ops.log_marginal(after) - ops.log_marginal(state)
    return known._replace(state=after, log_weight=(known.log_weight + gained).log_softmax(-1))


def query(kernel: str, known: Hypotheses, x: Tensor, noisy: Tensor | None) -> Tensor:
    """Log weight, mean and variance under each hypothesis at x (B s d), one after another: (B s 3M).

    Args:
        noisy: (B) the share of the noise variance that counts, 1 or 0; None for 1.

    Cost: O(B M s n^2) time.
    """
    scale, noise = known.outputscale, known.noise_variance
    across = KERNELS[kernel](known.state.x, x.unsqueeze(1), known.params)
    before = scale.unsqueeze(-1).expand(*across.shape[:-2], across.shape[-1])
    mean, variance = ops.marginal_moments(known.state, across, before)
    added = noise if noisy is None else noise * noisy.unsqueeze(-1)
    variance = torch.maximum(variance, _FLOOR * before) + added.unsqueeze(-1)
    weight = known.log_weight.unsqueeze(-2).expand(-1, x.shape[-2], -1)
    return torch.cat([weight, mean.mT, variance.mT], -1)


def _hyper_parameters(raw: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lengthscales (B M d), outputscales and noise variances (B M) of raw outputs."""
    logs = raw.clamp(-_WIDEST, _WIDEST)
    outputscale = logs[..., -3].exp()
    # distances grow as sqrt(d), and so do the lengthscales at which a hypothesis starts
    return math.sqrt(d) * logs[..., :d].exp(), outputscale, _NOISE * logs[..., -2].exp() + _FLOOR * outputscale
