r"""The log density of a fully connected network with its gradient in closed form, in one pass.

Autograd spends more time on its forty small operations than on the arithmetic of a network this size. Here the forward
pass keeps the activations and the backward pass is written out, so that value and gradient cost three matrix products a
layer and little else. As a `torch.autograd.Function` it fits wherever a log density does; it differentiates once only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# gradient before the activation, from the gradient after it (overwritten) and the activated value
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda grad, value: torch.ops.aten.tanh_backward.grad_input(grad, value, grad_input=grad),
    "relu": lambda grad, value: torch.ops.aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad),
}


def supports(activation: str) -> bool:
    """Whether the closed form covers this activation: those whose slope follows from their value."""
    return activation in _BACKWARD


class FusedLogDensity(torch.autograd.Function):
    """log density (*g, C) of q (*g, C, D); `space` is a `WeightSpace` of an MLP, x (*g, n, d), y (*g, n, k)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, space: Any, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Value, with the gradient kept for `backward`."""
        value, grad = _value_and_grad(q, space, x, y, scale)
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient."""
        (grad,) = ctx.saved_tensors
        return grad_output.unsqueeze(-1) * grad, None, None, None, None


def _value_and_grad(q: Tensor, space: Any, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    m = space.network.num_weights
    z, logs = q[..., :m], q[..., m:]
    weights = z * space.scale.to(q)
    exps = logs.exp()
    priors = space.likelihood.parameters()
    params = {p.name: p.lower + exps[..., i * space.k : (i + 1) * space.k] for i, p in enumerate(priors)}
    layers = _unpack(weights, space.network.shapes)
    values = _forward(layers, x.unsqueeze(-3), space.network.activation)
    fit, slope, param_slopes = space.likelihood.value_and_slope(values[-1], y.unsqueeze(-3), params)
    grad = torch.empty_like(q)
    _backward(layers, values, slope, space.network.activation, grad)
    grad[..., :m] *= space.scale.to(q) * scale
    grad[..., :m] += space.prior.slope(z)
    value = scale * fit + space.prior.log_prob(z)
    for i, p in enumerate(priors):
        at = slice(i * space.k, (i + 1) * space.k)
        slope_of = scale * param_slopes[p.name]
        if p.prior is not None:
            value = value + p.prior.log_prob(params[p.name]).sum(-1)
            slope_of = slope_of + p.prior.slope(params[p.name])
        grad[..., m:][..., at] = slope_of * exps[..., at] + 1
    return (value + logs.sum(-1) if priors else value), grad


def _unpack(weights: Tensor, shapes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """Matrices (*g, C, a, b) and biases (*g, C, 1, b)."""
    layers, at, head = [], 0, weights.shape[:-1]
    for a, b in shapes:
        matrix = weights[..., at : at + a * b].reshape(*head, a, b)
        layers.append((matrix, weights[..., at + a * b : at + (a + 1) * b].unsqueeze(-2)))
        at += (a + 1) * b
    return layers


def _forward(layers: list[tuple[Tensor, Tensor]], x: Tensor, activation: str) -> list[Tensor]:
    """The input, every hidden layer's values, and the output."""
    apply = torch.tanh_ if activation == "tanh" else torch.relu_
    values = [x]
    for i, (matrix, bias) in enumerate(layers):
        h = torch.matmul(values[-1], matrix).add_(bias)
        values.append(apply(h) if i < len(layers) - 1 else h)
    return values


def _backward(
    layers: list[tuple[Tensor, Tensor]], values: list[Tensor], slope: Tensor, activation: str, grad: Tensor
) -> None:
    """Write the gradient in the weights, from the slope of the log likelihood in the outputs, into `grad`."""
    at = sum((m.shape[-2] + 1) * m.shape[-1] for m, _ in layers)
    for i in reversed(range(len(layers))):
        matrix, _ = layers[i]
        a, b = matrix.shape[-2:]
        at -= (a + 1) * b
        grad[..., at + a * b : at + (a + 1) * b] = slope.sum(-2)
        grad[..., at : at + a * b] = torch.matmul(values[i].transpose(-2, -1), slope).flatten(-2)
        if i > 0:
            slope = _BACKWARD[activation](torch.matmul(slope, matrix.transpose(-2, -1)), values[i])
