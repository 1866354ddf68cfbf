r"""Random structural causal models, a group of them at a time, and random networks as their special case.

    h_0 = causes,    h_{l+1} = W_l act(h_l) + b_l + noise,    l = 0 .. layers - 1

All units of the hidden layers are variables of a causal graph whose missing edges are missing weights. Features and
target are some of those variables, so a feature may be a cause of the target, an effect of it, or share a cause with
it. The special case: features are the causes, and the target is the output of the network.

Reference: Hollmann, Mueller, Eggensperger, Hutter (2023), "TabPFN", arXiv 2207.01848, and its published settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl.priors._tasks_laws import meta_beta, meta_choice, meta_gamma, meta_normal
from bayesdl.priors._tasks_network import ACTIVATIONS

_LARGEST = 1e15  # of a variable: its square has a finite sum in float32


@dataclass(frozen=True)
class Graph:
    """What the tasks of a group share.

    Attributes:
        layers: Number of hidden layers, at least 2.
        width: Units in each.
        causes: How many causes there are, where they are not the features.
        causal: Whether features are variables of the graph rather than its causes.
        activation: "tanh", "identity" or "relu".
        effect: Whether the target is the last variable, rather than any one.
        clique: Whether features and target stand next to each other in the order of variables.
        ordered: Whether features keep that order.
        blockwise: Whether weights are missing in blocks, rather than one by one.
        levels: Whether every variable has a noise level of its own.
        uneven: Whether every cause has a mean and a spread of its own.
    """

    layers: int
    width: int
    causes: int
    causal: bool
    activation: str
    effect: bool
    clique: bool
    ordered: bool
    blockwise: bool
    levels: bool
    uneven: bool


def draw_graph(d: int, most_layers: int, most_width: int, generator: torch.Generator) -> Graph:
    """Draw what a group shares, with a generator of the CPU: counts by `meta_gamma`, all else by `meta_choice`."""
    layers = 2 + round(float(meta_gamma((), 2.0, 3.0, generator)))
    width = 4 + round(float(meta_gamma((), 3.0, 100.0, generator)))
    causes = 2 + round(float(meta_gamma((), 3.0, 7.0, generator)))
    names = tuple(ACTIVATIONS)
    activation = names[meta_choice(len(names), generator)]
    flags = [bool(meta_choice(2, generator)) for _ in range(7)]
    # as many variables as d features and a target need
    width = max(min(width, most_width), 2 * d + 2)
    return Graph(min(layers, most_layers), width, causes, flags[0], activation, *flags[1:])


def draw_variables(
    graph: Graph, batch: int, n: int, d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features (batch n d), a continuous target (batch n), both float32, and what each task drew for itself."""
    device = generator.device
    latents = {
        "weight_scale": meta_normal((batch,), 1e-2, 10.0, generator),
        "noise_scale": meta_normal((batch,), 1e-4, 0.3, generator),
        "dropout": meta_beta((batch,), 0.6, 0.1, 5.0, generator),
    }
    scale, noise, dropout = (value.to(torch.float32)[:, None, None] for value in latents.values())
    h = _causes(graph, batch, n, graph.causes if graph.causal else d, generator)
    causes, variables = h, []
    for layer in range(graph.layers):
        if layer > 0:
            h = ACTIVATIONS[graph.activation](h)
        h = _edges(graph, h, scale, dropout if layer > 0 else None, generator)
        level = noise
        if graph.levels:
            level = noise * torch.randn(batch, 1, graph.width, generator=generator, device=device).abs()
        h = h + level * torch.randn(h.shape, generator=generator, device=device)
        # linear and rectified networks of many layers and large weights exceed all bounds
        h = h.clamp(-_LARGEST, _LARGEST)
        if layer > 0:
            variables.append(h)
    if not graph.causal:
        return causes, h[..., -1], latents
    nodes = torch.cat(variables, -1)
    features, target = _pick(graph, batch, nodes.shape[-1], d, generator)
    x = nodes.gather(-1, features.unsqueeze(1).expand(batch, n, d))
    y = nodes.gather(-1, target[:, None, None].expand(batch, n, 1)).squeeze(-1)
    return x, y, latents


def _causes(graph: Graph, batch: int, n: int, num: int, generator: torch.Generator) -> Tensor:
    z = torch.randn(batch, n, num, generator=generator, device=generator.device)
    if not graph.uneven:
        return z
    mean, spread = torch.randn(2, batch, 1, num, generator=generator, device=generator.device)
    return mean + (spread * mean).abs() * z


def _edges(graph: Graph, h: Tensor, scale: Tensor, dropout: Tensor | None, generator: torch.Generator) -> Tensor:
    """W h + b: N(0, scale^2) weights, some missing and the others larger for it, and biases of one fan-in's size."""
    batch, _, inputs = h.shape
    device = h.device
    w = torch.randn(batch, inputs, graph.width, generator=generator, device=device) * scale
    if dropout is not None and graph.blockwise:
        kept = _blocks(batch, inputs, graph.width, generator)
        w = w * kept / kept.mean((-2, -1), keepdim=True).sqrt()
    elif dropout is not None:
        kept = torch.rand(w.shape, generator=generator, device=device) >= dropout
        w = w * kept / (1.0 - dropout).sqrt()
    u = torch.rand(batch, 1, graph.width, generator=generator, device=device)
    return torch.baddbmm((2.0 * u - 1.0) / math.sqrt(inputs), h, w)


def _blocks(batch: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """1 on the blocks of a block-diagonal (rows, columns) matrix, 0 elsewhere; 1 to sqrt(size) blocks a task."""
    device = generator.device
    most = math.ceil(math.sqrt(min(rows, columns)))
    num = torch.randint(1, most + 1, (batch, 1, 1), generator=generator, device=device)
    high, wide = rows // num, columns // num
    i = torch.arange(rows, device=device)[None, :, None] // high
    j = torch.arange(columns, device=device)[None, None, :] // wide
    return ((i == j) & (i < num)).to(torch.float32)


def _pick(graph: Graph, batch: int, num: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of `num` variables are the features (batch d) and the target (batch), all different."""
    device = generator.device
    keys = torch.rand(batch, num, generator=generator, device=device)
    places = torch.arange(num, device=device)
    if graph.clique:
        start = torch.randint(0, num - d - 1, (batch, 1), generator=generator, device=device)
        keys = keys + ((places < start) | (places >= start + d + 2))
    if graph.effect:
        keys[:, -1] = 3.0
    order = keys.argsort(-1)[:, : d + 1]
    features = order[:, 1:].sort(-1).values if graph.ordered else order[:, 1:]
    target = torch.full((batch,), num - 1, device=device) if graph.effect else order[:, 0]
    return features, target
