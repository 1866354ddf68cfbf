r"""The posterior of a network's hidden layers and noise, its output layer integrated out in closed form.

Given everything else, the output layer of a network with a Gaussian likelihood and a normal prior is a Bayesian linear
regression on the values H (n, p - 1) of the last hidden layer. With Psi = [H, 1] S, S the prior scales of one output's
p weights, and noise variance v_k of target column k, its standardised weights b_k have

    b_k | y ~ N(m_k, M_k^{-1}),    M_k = I + Psi' Psi / v_k,    m_k = M_k^{-1} Psi' y_k / v_k,
    log p(y) = -1/2 sum_k [ n log 2 pi v_k + log|M_k| + |y_k - Psi m_k|^2 / v_k + m_k' m_k ].

A chain on what remains leaves the same posterior invariant once b is drawn from its law. It takes longer steps: the
directions in which the likelihood is narrowest, those that shift the whole function, are mostly gone. p x p matrices
are summed, factored and solved in float64, whatever the dtype of the rest.

Reference: Liu (1994), "The collapsed Gibbs sampler in Bayesian computations with applications to a gene regulation
problem", JASA 89, for the principle; Bishop (2006), "Pattern recognition and machine learning", section 3.5, for the
regression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesdl._random import Seed, Streams
from bayesdl.models import _fused

_CHUNK = 2**24  # values of a layer that are computed at once where draws are completed


class Regression(NamedTuple):
    """The law of standardised output weights: mean (..., k, p), and the Cholesky factor of M (..., k, p, p).

    Where M has none, for it is not finite, `failed` (...) is true, and the mean and the factor are those of the prior.
    """

    mean: Tensor
    factor: Tensor
    failed: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """A draw (..., k, p) made of standard normal `noise` of that shape."""
        e = noise.to(self.factor).unsqueeze(-1)
        return self.mean + torch.linalg.solve_triangular(self.factor.mT, e, upper=True).squeeze(-1)

    def complexity(self) -> Tensor:
        """sum_k log|M_k| + m_k' m_k, (...); infinite where it failed."""
        parts = 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.mean.square().sum(-1)
        return parts.sum(-1).masked_fill(self.failed, torch.inf)


def regress(gram: Tensor, moment: Tensor, variance: Tensor) -> Regression:
    """From Psi' Psi (..., p, p), Psi' y (..., p, k) and noise variances (..., k), all float64, in O(k p^3)."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    precision = eye + gram.unsqueeze(-3) / variance[..., None, None]
    factor, info = torch.linalg.cholesky_ex(precision)
    failed = (info > 0).any(-1)
    factor = torch.where(failed[..., None, None, None], eye, factor)
    target = (moment / variance.unsqueeze(-2)).mT.masked_fill(failed[..., None, None], 0.0)
    return Regression(torch.cholesky_solve(target.unsqueeze(-1), factor).squeeze(-1), factor, failed)


class CollapsedSpace:
    """The coordinates q that are left of a `WeightSpace`: hidden layers' weights, then logs of noise variances.

    Attributes:
        num_weights: How many weights are left.
        widths: Prior scales of one output's p weights, float64.
    """

    def __init__(self, space: Any, x: Tensor, y: Tensor) -> None:
        self.space, self.x, self.y = space, x, y
        fan_in, outputs = space.network.shapes[-1]
        self.num_weights = space.network.num_weights - (fan_in + 1) * outputs
        self.widths = space.scale[self.num_weights :].view(fan_in + 1, outputs)[:, 0].to(x.device)

    def reduce(self, q: Tensor) -> Tensor:
        """Of all coordinates (..., D) those that are left."""
        return torch.cat([q[..., : self.num_weights], q[..., self.space.network.num_weights :]], -1)

    def bind(self) -> Callable[[Tensor], Tensor]:
        """`log_density` for samplers and optimisers: fused where possible, then once differentiable.

        Cost: that of the whole network's, O(n p^2) more for each chain, and O(k p^3) for its regression. Where the
        activations of one chain are too many to be kept, hidden layers are computed twice.
        """
        network = self.space.network
        if _fused.supports(network.activation) and len(network.shapes) > 1:
            return _FusedCollapsed(self)
        return self.log_density

    def log_density(self, q: Tensor) -> Tensor:
        """Unnormalised log posterior of q (*g, C, dim), by ordinary operations: (*g, C)."""
        m, space, y = self.num_weights, self.space, self.y.unsqueeze(-3)
        params = space.positive(q[..., m:])
        features = space.network.features(q[..., :m] * space.scale[:m].to(q), self.x)
        law = self.law(*moments(features, y), params["noise_variance"])
        weight, bias = self.layer(law.mean.to(q))
        fit = space.likelihood.log_prob(features @ weight + bias, y, params)
        return space.log_prior(q[..., :m], params, q[..., m:]) + fit - 0.5 * law.complexity().to(q)

    def law(self, gram: Tensor, moment: Tensor, variance: Tensor) -> Regression:
        """Of the output layer, from sums over [H, 1] that `moments` gives and noise variances (..., k)."""
        return regress(self.widths[:, None] * gram * self.widths, self.widths[:, None] * moment, variance.to(gram))

    def layer(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix (..., p - 1, k) and bias (..., 1, k) from standardised weights (..., k, p)."""
        scaled = (standardised * self.widths.to(standardised)).mT
        return scaled[..., :-1, :], scaled[..., -1:, :]

    def complete(self, q: Tensor, seed: Seed) -> Tensor:
        """Draws (*b, C, N, dim) with output layers drawn from their law: (*b, C, N, D).

        Chain i sees numbers of a stream of its own, the first N of them whatever the number of draws. Cost: a forward
        pass over all data and O(n p^2) for each draw.
        """
        m, (fan_in, outputs) = self.num_weights, self.space.network.shapes[-1]
        streams = Streams(seed, q.shape[-3], q.device)
        noise = torch.stack([streams.normal(outputs, fan_in + 1, like=q) for _ in range(q.shape[-2])], 1)
        widest = max(b for _, b in self.space.network.shapes)
        step = max(1, _CHUNK // (self.x.shape[:-1].numel() * widest * q.shape[-3]))
        drawn = []
        for some, e in zip(q.split(step, -2), noise.split(step, 1), strict=True):
            flat = some.flatten(-3, -2)
            features = self.space.network.features(flat[..., :m] * self.space.scale[:m].to(q), self.x)
            variance = self.space.positive(flat[..., m:])["noise_variance"]
            law = self.law(*moments(features, self.y.unsqueeze(-3)), variance)
            weights = law.draw(e.flatten(0, 1)).mT.flatten(-2).to(q)
            drawn.append(torch.cat([flat[..., :m], weights, flat[..., m:]], -1).unflatten(-2, some.shape[-3:-1]))
        return torch.cat(drawn, -2)


def moments(features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[H, 1]'[H, 1] (..., p, p) and [H, 1]'y (..., p, k) in float64, from H (..., n, p - 1) and y (..., n, k)."""
    n, sums = features.shape[-2], features.sum(-2, keepdim=True).double()
    inner = (features.mT @ features).double()
    count = sums.new_full((*sums.shape[:-1], 1), float(n))
    gram = torch.cat([torch.cat([inner, sums.mT], -1), torch.cat([sums, count], -1)], -2)
    cross = (features.mT @ y).double()
    total = y.sum(-2, keepdim=True).double().expand(*cross.shape[:-2], 1, -1)
    return gram, torch.cat([cross, total], -2)


class _FusedCollapsed(_fused.FusedLogDensity):
    """`CollapsedSpace.log_density` and its gradient in closed form, in tiles of chains.

    With R = y - Psi m and C_k = M_k^{-1}, the gradient in Psi is sum_k (r_k m_k' - Psi C_k) / v_k, for m_k is where the
    quadratic form is least; that in v_k is (p - tr C_k - n + |r_k|^2 / v_k) / (2 v_k).
    """

    def __init__(self, collapsed: CollapsedSpace) -> None:
        super().__init__(collapsed.space, collapsed.x, collapsed.y)
        self._num_weights = collapsed.num_weights
        self._collapsed = collapsed

    def traceable(self, q: Tensor) -> Tensor:
        """The value by ordinary operations."""
        return self._collapsed.log_density(q)

    def _fit(
        self, weights: Tensor, params: dict[str, Tensor], data: tuple[Tensor, Tensor], grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (x, y), chains = data, len(weights)
        width = sum(b for _, b in self._space.network.shapes)
        num_rows, num_chains = _fused.tile_size(chains, x.shape[-2], width, x)
        fit, slope_of = weights.new_empty(chains), torch.empty_like(params["noise_variance"])
        for first in range(0, chains, num_chains):
            some = slice(first, min(first + num_chains, chains))
            variance = params["noise_variance"][some]
            fit[some], slope_of[some] = self._tile(weights[some], variance, x[some], y[some], grad[some], num_rows)
        return fit, {"noise_variance": slope_of}

    def _tile(
        self, weights: Tensor, variance: Tensor, x: Tensor, y: Tensor, grad: Tensor, num_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Value (c) and slope in the noise variances (c, k) of some chains, by `num_rows` rows at a time."""
        network, n = self._space.network, x.shape[-2]
        shapes, kept = network.shapes[:-1], num_rows >= n
        layers, by_layer = _fused.unpack(weights, shapes), _fused.unpack(grad, shapes)

        def tiles() -> Iterator[tuple[list[Tensor], list[Tensor], Tensor, bool]]:
            for start in range(0, n, num_rows):
                rows = slice(start, min(start + num_rows, n))
                inputs = x[:, rows]
                held = self._workspace.take([(*inputs.shape[:2], b) for _ in range(2) for _, b in shapes], inputs)
                values = _fused.forward(layers, inputs, network.activation, held[: len(shapes)])
                _fused.activate(values[-1], network.activation)
                yield values, held[len(shapes) :], y[:, rows], start == 0

        seen = list(tiles()) if kept else tiles()
        gram, moment = (sum(parts) for parts in zip(*(moments(v[-1], t) for v, _, t, _ in seen), strict=True))
        law = self._collapsed.law(gram, moment, variance)
        covariance = torch.cholesky_inverse(law.factor)
        weight, bias = self._collapsed.layer(law.mean.to(x))
        widths = self._collapsed.widths
        inner = (widths[:, None] * (covariance / variance.to(gram)[..., None, None]).sum(-3) * widths).to(x)
        squares = torch.zeros_like(variance)
        for values, memory, targets, fresh in seen if kept else tiles():
            residual = targets - torch.baddbmm(bias, values[-1], weight)
            squares += residual.square().sum(-2)
            slope = torch.baddbmm(inner[:, -1:, :-1], values[-1], inner[:, :-1, :-1], beta=-1, alpha=-1, out=memory[-1])
            slope.baddbmm_(residual / variance.unsqueeze(-2), weight.mT)
            _fused.slope_before(slope, values[-1], network.activation)
            _fused.backward(layers, values, slope, network.activation, by_layer, memory, fresh=fresh)
        ratio = squares / variance
        value = -0.5 * (ratio + n * (2 * torch.pi * variance).log()).sum(-1) - 0.5 * law.complexity().to(x)
        spread = (covariance.diagonal(dim1=-2, dim2=-1).sum(-1)).to(x)
        return value, 0.5 * (gram.shape[-1] - spread - n + ratio) / variance
