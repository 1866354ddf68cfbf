"""Networks as pure functions of a flat weight vector: many weight vectors, many data sets, one call."""

from __future__ import annotations

import copy
import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bayesdl.errors import SettingError, ShapeError, fail
from bayesdl.priors import WeightPrior

ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "erf": torch.erf,
    "sin": torch.sin,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}


class Network(Protocol):
    """A function of weights and inputs."""

    num_weights: int

    def scales(self, prior: WeightPrior, like: Tensor) -> Tensor:
        """Prior scale of every weight, (num_weights,)."""

    def centre(self, like: Tensor) -> Tensor:
        """Prior centre of every weight, (num_weights,)."""

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """Weights (*g, C, num_weights) at x (*g, n, d) -> (*g, C, n, outputs)."""


class MLP:
    """A fully connected network with one activation, written as batched matrix products."""

    def __init__(self, d: int, hidden: tuple[int, ...], outputs: int, activation: str) -> None:
        self._widths = (d, *hidden, outputs)
        self.activation = activation
        self.shapes = list(zip(self._widths[:-1], self._widths[1:], strict=True))
        self.num_weights = sum((a + 1) * b for a, b in self.shapes)

    def scales(self, prior: WeightPrior, like: Tensor) -> Tensor:
        """Prior scale of every weight."""
        pieces = []
        for fan_in, width in self.shapes:
            pieces += [
                like.new_full((fan_in * width,), prior.scale_of(fan_in)),
                like.new_full((width,), prior.scale_of(None)),
            ]
        return torch.cat(pieces)

    def centre(self, like: Tensor) -> Tensor:
        """Zero."""
        return like.new_zeros(self.num_weights)

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """Weights (*g, C, D) at x (*g, n, d) -> (*g, C, n, outputs)."""
        return self._layer(weights, len(self.shapes) - 1, self.features(weights, x))

    def features(self, weights: Tensor, x: Tensor) -> Tensor:
        """The last hidden layer, (*g, C, n, width), or x as (*g, 1, n, d); reads no weights of the output layer."""
        h = x.unsqueeze(-3)
        for layer in range(len(self.shapes) - 1):
            h = ACTIVATIONS[self.activation](self._layer(weights, layer, h))
        return h

    def _layer(self, weights: Tensor, layer: int, h: Tensor) -> Tensor:
        fan_in, width = self.shapes[layer]
        at = sum((a + 1) * b for a, b in self.shapes[:layer])
        matrix = weights[..., at : at + fan_in * width].reshape(*weights.shape[:-1], fan_in, width)
        return h @ matrix + weights[..., at + fan_in * width : at + (fan_in + 1) * width].unsqueeze(-2)


class ModuleNetwork:
    """Any `nn.Module` through `torch.func.functional_call`; the module itself is never changed."""

    def __init__(self, module: nn.Module, d: int, outputs: int) -> None:
        self._module = copy.deepcopy(module)
        self._named = [(name, p.shape) for name, p in module.named_parameters()]
        self.num_weights = sum(shape.numel() for _, shape in self._named)
        _check_module(module)
        first = next(module.parameters())
        probe = torch.zeros(2, d, dtype=first.dtype, device=first.device)
        try:
            with torch.no_grad():
                shape = tuple(self.forward(probe.new_zeros(1, self.num_weights), probe).shape[1:])
        except RuntimeError as error:
            # vmap refuses random numbers, so that functional dropout shows itself without a draw from the global state
            if "random" in str(error):
                wanted = "module must be a fixed function of its weights and one input at a time."
                fail(
                    SettingError,
                    "BNN",
                    wanted,
                    got="random numbers in its forward pass",
                    fix="module.eval(), or no dropout",
                )
            wanted = f"module must take inputs of shape (n, {d})."
            fail(ShapeError, "BNN", wanted, got=str(error).splitlines()[0], fix=f"set the first layer to {d} features")
        if shape != (2, outputs):
            wanted = f"module must map (n, {d}) to (n, {outputs})."
            fail(
                ShapeError,
                "BNN",
                wanted,
                got=f"an output of shape {shape} for n = 2",
                fix=f"end in nn.Linear(..., {outputs})",
            )

    def scales(self, prior: WeightPrior, like: Tensor) -> Tensor:
        """Prior scale of every weight: fan-in of a matrix is the product of all axes but its first."""
        pieces = []
        for _, shape in self._named:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else None
            pieces.append(like.new_full((shape.numel(),), prior.scale_of(fan_in)))
        return torch.cat(pieces)

    def centre(self, like: Tensor) -> Tensor:
        """Zero, but one for the gains of normalisation layers (vectors named "weight")."""
        ones = [len(shape) == 1 and name.split(".")[-1] == "weight" for name, shape in self._named]
        return torch.cat(
            [like.new_full((s.numel(),), float(one)) for (_, s), one in zip(self._named, ones, strict=True)]
        )

    def forward(self, weights: Tensor, x: Tensor) -> Tensor:
        """Weights (*g, C, D) at x (*g, n, d) -> (*g, C, n, outputs), by one vmap over all of them."""
        head = torch.broadcast_shapes(weights.shape[:-1], (*x.shape[:-2], 1))
        flat = weights.expand(*head, -1).reshape(-1, weights.shape[-1])
        buffers = {name: b.to(x) if b.is_floating_point() else b for name, b in self._module.named_buffers()}

        def single(w: Tensor, points: Tensor) -> Tensor:
            return functional_call(self._module, {**self._unflatten(w), **buffers}, (points,))

        if x.ndim == 2:
            out = vmap(single, in_dims=(0, None))(flat, x)
        else:
            points = x.unsqueeze(-3).expand(*head, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
            out = vmap(single)(flat, points)
        return out.reshape(*head, *out.shape[1:])

    def _unflatten(self, w: Tensor) -> dict[str, Tensor]:
        pieces = w.split([shape.numel() for _, shape in self._named])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self._named, pieces, strict=True)}


def _check_module(module: nn.Module) -> None:
    if not any(True for _ in module.parameters()):
        fail(
            SettingError,
            "BNN",
            "module must have parameters.",
            got=repr(module)[:80],
            fix="pass a network with weights",
        )
    for name, part in module.named_modules():
        stochastic = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 and part.training
        # without running statistics it normalises over the batch in eval mode, too
        batch = isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
        if stochastic or batch:
            wanted = "module must be a fixed function of its weights and one input at a time."
            mode = "in training mode" if part.training else "without running statistics"
            fix = "module.eval(), or LayerNorm in place of BatchNorm, and no Dropout"
            fail(SettingError, "BNN", wanted, got=f"{type(part).__name__} {mode} at {name!r}", fix=fix)
