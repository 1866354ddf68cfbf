r"""The log density of a fully connected network with its gradient in closed form, in one pass.

Autograd spends more time on its forty small operations than on the arithmetic of a network this size. Here the forward
pass keeps the activations and the backward pass is written out, so that value and gradient cost three matrix products a
layer and little else. As a `torch.autograd.Function` it fits wherever a log density does; it differentiates once only.

On a CPU the work goes in tiles of chains and rows, in memory that is kept from one evaluation to the next: fresh pages
from the system would cost as much as a third of the arithmetic.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Activations of a tile, in numbers: smaller tiles lose more to the calls themselves than they gain from the cache.
_TILE = 2**20

# gradient before the activation, from the gradient after it (overwritten) and the activated value
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda grad, value: torch.ops.aten.tanh_backward.grad_input(grad, value, grad_input=grad),
    "relu": lambda grad, value: torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad),
}


def supports(activation: str) -> bool:
    """Whether the closed form covers this activation: those whose slope follows from their value."""
    return activation in _BACKWARD


def activate(h: Tensor, activation: str) -> Tensor:
    """The activation, in place of its argument.

    tanh h = 2 sigmoid(2 h) - 1, whose exponential is vectorised where torch's tanh takes several times as long: to
    rounding of 1, which is what sums of activations can tell.
    """
    return torch.relu_(h) if activation == "relu" else h.mul_(2).sigmoid_().mul_(2).sub_(1)


def slope_before(grad: Tensor, value: Tensor, activation: str) -> Tensor:
    """The gradient before the activation, in place of the gradient after it."""
    return _BACKWARD[activation](grad, value)


class Workspace(threading.local):
    """Memory for the activations of a tile, kept between evaluations; each thread has its own."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], list[Tensor]] = {}

    def take(self, shapes: list[tuple[int, ...]], like: Tensor) -> list[Tensor]:
        """Tensors of these shapes whose contents are whatever they are."""
        key = (tuple(shapes), like.dtype, like.device)
        if key not in self._held:
            if len(self._held) > 8:
                self._held.clear()
            self._held[key] = [like.new_empty(shape) for shape in shapes]
        return self._held[key]


class FusedLogDensity:
    """log density (*g, C) of q (*g, C, D); `space` is a `WeightSpace` of an MLP, x (*g, n, d), y (*g, n, k)."""

    def __init__(self, space: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        self._space, self._x, self._y, self._scale = space, x, y, scale
        self._num_weights = space.network.num_weights  # among q; what comes behind them are the likelihood's parameters
        self._workspace = Workspace()

    def __call__(self, q: Tensor) -> Tensor:
        """The value, differentiable once."""
        return _Differentiable.apply(q, self.value_and_grad)

    def traceable(self, q: Tensor) -> Tensor:
        """The value by ordinary operations, for torch.compile: writing in place is what it cannot follow."""
        return self._space.log_density(q, self._x, self._y, self._scale)

    def value_and_grad(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The value (*g, C) and its gradient (*g, C, D), without a graph."""
        space, scale, m, chains = self._space, self._scale, self._num_weights, q.shape[:-1].numel()
        widths = space.scale[:m].to(q)
        z, logs = q[..., :m], q[..., m:]
        exps = logs.exp()
        priors = space.likelihood.parameters()
        params = {p.name: p.lower + exps[..., i * space.k : (i + 1) * space.k] for i, p in enumerate(priors)}
        grad = torch.empty_like(q, memory_format=torch.contiguous_format)
        flat = {name: v.reshape(chains, space.k) for name, v in params.items()}
        data = _per_chain(self._x, q), _per_chain(self._y, q)
        fit, slopes = self._fit((z * widths).reshape(chains, m), flat, data, grad.view(chains, -1))
        of_weights = grad[..., :m]
        torch.addcmul(space.prior.slope(z), of_weights, widths, value=scale, out=of_weights)
        value = torch.add(space.prior.log_prob(z), fit.view(q.shape[:-1]), alpha=scale)
        for i, p in enumerate(priors):
            slope_of = scale * slopes[p.name].view(params[p.name].shape)
            if p.prior is not None:
                value = value + p.prior.log_prob(params[p.name]).sum(-1)
                slope_of = slope_of + p.prior.slope(params[p.name])
            at = slice(i * space.k, (i + 1) * space.k)
            grad[..., m:][..., at] = slope_of * exps[..., at] + 1
        return (value + logs.sum(-1) if priors else value), grad

    def _fit(
        self, weights: Tensor, params: dict[str, Tensor], data: tuple[Tensor, Tensor], grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log likelihood (C) of weights (C, m), and its slopes in the parameters; that in the weights goes into the
        first m columns of `grad`."""
        return _likelihood(self._space, weights, params, data, grad, self._workspace)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Value, with the gradient kept for `backward`."""
        value, grad = evaluate(q)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient."""
        (grad,) = ctx.saved_tensors
        return grad_output.unsqueeze(-1) * grad, None


def _per_chain(data: Tensor, q: Tensor) -> Tensor:
    """x or y (*g, n, d) for every chain, (C, n, d), without a copy where there is one group or one chain a group."""
    if data.ndim == 2:
        return data.expand(q.shape[:-1].numel(), *data.shape)
    return data.unsqueeze(-3).expand(*q.shape[:-1], *data.shape[-2:]).reshape(-1, *data.shape[-2:])


def _likelihood(
    space: Any,
    weights: Tensor,
    params: dict[str, Tensor],
    data: tuple[Tensor, Tensor],
    grad: Tensor,
    workspace: Workspace,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log likelihood (C) and its slopes in the parameters; the gradient in the weights goes into `grad` (C, D)."""
    (x, y), shapes = data, space.network.shapes
    chains, n, width = weights.shape[0], x.shape[-2], sum(b for _, b in shapes)
    num_rows, num_chains = tile_size(chains, n, width, x)

    def tile(some: slice, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        mine = params if some.stop - some.start == chains else {name: v[some] for name, v in params.items()}
        inputs, targets = x[some, rows], y[some, rows]
        layers, by_layer = unpack(weights[some], shapes), unpack(grad[some], shapes)
        held = workspace.take([(*inputs.shape[:2], b) for _ in range(2) for _, b in shapes], inputs)
        values = forward(layers, inputs, space.network.activation, held[: len(shapes)])
        value, slope, slope_of = space.likelihood.value_and_slope(values[-1], targets, mine)
        fresh = rows.start == 0
        backward(layers, values, slope, space.network.activation, by_layer, held[len(shapes) :], fresh=fresh)
        return value, slope_of

    if num_rows >= n and num_chains >= chains:
        return tile(slice(0, chains), slice(0, n))
    fit, slopes = weights.new_zeros(chains), {name: torch.zeros_like(v) for name, v in params.items()}
    for first in range(0, chains, num_chains):
        some = slice(first, min(first + num_chains, chains))
        for start in range(0, n, num_rows):
            value, slope_of = tile(some, slice(start, min(start + num_rows, n)))
            fit[some] += value
            for name, by in slope_of.items():
                slopes[name][some] += by
    return fit, slopes


def tile_size(chains: int, n: int, width: int, like: Tensor) -> tuple[int, int]:
    """Rows and chains that are worked on together."""
    if like.device.type != "cpu":
        return n, chains
    rows = math.ceil(n / math.ceil(n * width / _TILE))
    return rows, max(1, min(chains, _TILE // (rows * width)))


def unpack(weights: Tensor, shapes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Views: matrices (C, a, b) and biases (C, 1, b)."""
    sizes = [size for a, b in shapes for size in (a * b, b)]
    pieces = weights[:, : sum(sizes)].split(sizes, -1)
    return [
        (pieces[2 * i].view(len(weights), a, b), pieces[2 * i + 1].unsqueeze(-2)) for i, (a, b) in enumerate(shapes)
    ]


def forward(layers: list[tuple[Tensor, Tensor]], x: Tensor, activation: str, out: list[Tensor]) -> list[Tensor]:
    """The input, every hidden layer's values, and the output."""
    values = [x]
    for i, (matrix, bias) in enumerate(layers):
        h = torch.baddbmm(bias, values[-1], matrix, out=out[i])
        values.append(activate(h, activation) if i < len(layers) - 1 else h)
    return values


def backward(
    layers: list[tuple[Tensor, Tensor]],
    values: list[Tensor],
    slope: Tensor,
    activation: str,
    grads: list[tuple[Tensor, Tensor]],
    out: list[Tensor],
    *,
    fresh: bool,
) -> None:
    """Put the gradient in the weights, from the slope of the log likelihood in the outputs, into `grads`: in place of
    what they hold where `fresh`, else on top of it."""
    for i in reversed(range(len(layers))):
        matrix, bias = grads[i]
        bias.copy_(slope.sum(-2, keepdim=True)) if fresh else bias.add_(slope.sum(-2, keepdim=True))
        matrix.baddbmm_(values[i].mT, slope, beta=0.0 if fresh else 1.0)
        if i > 0:
            slope = slope_before(torch.bmm(slope, layers[i][0].mT, out=out[i - 1]), values[i], activation)
