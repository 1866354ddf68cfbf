r"""Random networks as priors over tasks: the deep and narrow ones on which PFNs4BO trained its second network.

    h_0 = warp(x),   h_{l+1} = act(W_l h_l + b_l + inner noise),   f = W_L h_L + b_L,   y = (f + e - m) / s

Reference: Mueller, Feurer, Hollmann, Hutter (2023), "PFNs4BO: In-context learning for Bayesian optimization", arXiv
2305.17535, whose published constants are the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl import _checks, _random
from bayesdl.errors import SettingError, fail
from bayesdl.priors._tasks_base import Inputs, Tasks, box_width, check_inputs, check_sizes, draw_inputs, merge_latents
from bayesdl.priors._tasks_bo import check_warp, draw_warp, kumaraswamy

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda h: h,
}

_PROBES = 64


@dataclass(frozen=True)
class NeuralNetwork:
    r"""A fully connected network with normal weights, some of them missing, and noise inside.

    Every task has weights, noise levels and a warp of its own; depth and width are shared by the tasks of a group, of
    which a call draws `architectures`. Weights of all layers but the first are absent with probability `sparsity`, and
    those that remain larger by 1 / sqrt(1 - sparsity); biases have the scale of the weights.

    A deep network of small weights is nearly constant. So the target is shifted and scaled: by mean and standard
    deviation of f, noise included in the latter, at 64 further inputs. These are no points of the task, which therefore
    has the same law whether a few points are drawn or many.

    Attributes:
        depth: Least and largest number of hidden layers.
        width: Least and largest number of units in each.
        weight_scale: Range of the standard deviation of weights, uniform.
        sparsity: Probability that a weight is absent.
        noise_scale: Range of the standard deviation of e, uniform, in units of f.
        inner_noise_scale: Range of that of the noise on every pre-activation, uniform.
        activation: "tanh", "relu" or "identity".
        warp: Standard deviations of ln a and ln b of a Kumaraswamy warp of each column, or None for no warp.
        architectures: How many pairs of depth and width a call draws.
        inputs: As for `FixedGP`.

    Latents: "depth", "width" (batch) int64; "weight_scale", "noise_scale", "inner_noise_scale" in units of f, "shift"
    and "scale", which are m and s (batch); "warp" (batch, 2, d) where there is one.
    """

    depth: tuple[int, int] = (8, 15)
    width: tuple[int, int] = (36, 150)
    weight_scale: tuple[float, float] = (0.0890, 0.1929)
    sparsity: float = 0.145
    noise_scale: tuple[float, float] = (3.6e-4, 1.34e-3)
    inner_noise_scale: tuple[float, float] = (3.1e-4, 1.38e-3)
    activation: str = "tanh"
    warp: tuple[float, float] | None = (0.976, 0.800)
    architectures: int = 1
    inputs: Inputs = "uniform"

    def __post_init__(self) -> None:
        where = "NeuralNetwork"
        for name, integer, least in (
            ("depth", True, 1),
            ("width", True, 1),
            ("weight_scale", False, 0.0),
            ("noise_scale", False, 0.0),
            ("inner_noise_scale", False, 0.0),
        ):
            check_range(where, name, getattr(self, name), least, integer=integer)
        _checks.at_least(where, "sparsity", self.sparsity, 0.0)
        if self.sparsity >= 1:
            fail(SettingError, where, "sparsity must be below 1.", got=repr(self.sparsity), fix="sparsity=0.145")
        _checks.choice(where, "activation", self.activation, tuple(ACTIVATIONS))
        check_warp(where, self.warp)
        _checks.at_least(where, "architectures", self.architectures, 1, integer=True)
        check_inputs(where, self.inputs)

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tasks. Cost: O(batch depth width (width + n)) time, O(batch width (width + n)) memory."""
        check_sizes("NeuralNetwork", batch, n, d, generator)
        x = draw_inputs("NeuralNetwork", self.inputs, batch, n, d, generator)
        probes = draw_inputs("NeuralNetwork", self.inputs, batch, _PROBES, d, generator)
        host = _random.generator(_random.root_seed(generator))
        y, noiseless, parts = torch.empty_like(x[..., 0]), torch.empty_like(x[..., 0]), []
        for rows in groups(batch, self.architectures, x.device):
            depth = int(torch.randint(self.depth[0], self.depth[1] + 1, (), generator=host))
            width = int(torch.randint(self.width[0], self.width[1] + 1, (), generator=host))
            drawn = self._group(x[rows], probes[rows], depth, width, generator)
            y[rows], noiseless[rows] = drawn.y, drawn.noiseless
            parts.append((rows, drawn.latents))
        return Tasks(x, y, noiseless, merge_latents(parts, batch))

    def _group(self, x: Tensor, probes: Tensor, depth: int, width: int, generator: torch.Generator) -> _Group:
        """Tasks that share their depth and width."""
        batch, n, d = x.shape
        latents = {name: torch.full((batch,), v, device=x.device) for name, v in (("depth", depth), ("width", width))}
        for name in ("weight_scale", "noise_scale", "inner_noise_scale"):
            low, high = getattr(self, name)
            latents[name] = low + (high - low) * torch.rand(batch, generator=generator, device=x.device)
        # with noise inside, without, and the probes, through the same weights
        h = torch.cat([x, x, probes], 1)
        if self.warp is not None:
            latents["warp"] = draw_warp(self.warp, batch, d, generator).to(torch.float32)
            wide = box_width(self.inputs)
            low = 0.0 if self.inputs == "unit" else -0.5 * wide
            h = low + wide * kumaraswamy(((h - low) / wide).clamp(0.0, 1.0), latents["warp"])
        inner = latents["inner_noise_scale"][:, None, None]
        for layer in range(depth + 1):
            outputs = width if layer < depth else 1
            sparsity = self.sparsity if layer else 0.0
            h = dense(h, outputs, latents["weight_scale"], sparsity, generator)
            if layer < depth:
                h[:, :n] += inner * torch.randn(batch, n, outputs, generator=generator, device=x.device)
                h = ACTIVATIONS[self.activation](h)
        noisy, clean, at_probes = h.squeeze(-1).split((n, n, _PROBES), 1)
        noise = latents["noise_scale"].unsqueeze(-1)
        noisy = noisy + noise * torch.randn(batch, n, generator=generator, device=x.device)
        latents["shift"] = at_probes.mean(-1)
        latents["scale"] = (at_probes.var(-1) + latents["noise_scale"].square()).sqrt().clamp_min(1e-12)
        shift, scale = latents["shift"].unsqueeze(-1), latents["scale"].unsqueeze(-1)
        return _Group((noisy - shift) / scale, (clean - shift) / scale, latents)


class _Group(NamedTuple):
    y: Tensor
    noiseless: Tensor
    latents: dict[str, Tensor]


def dense(h: Tensor, outputs: int, scale: Tensor, sparsity: float, generator: torch.Generator) -> Tensor:
    """h W + b with N(0, scale^2) weights and biases of each task's own: (batch n i) -> (batch n outputs)."""
    batch, _, inputs = h.shape
    w = torch.randn(batch, inputs + 1, outputs, generator=generator, device=h.device) * scale[:, None, None]
    matrix, bias = w[:, :-1], w[:, -1:]
    if sparsity > 0:
        kept = torch.rand(matrix.shape, generator=generator, device=h.device) >= sparsity
        matrix = matrix * kept / math.sqrt(1.0 - sparsity)
    return torch.baddbmm(bias, h, matrix)


def groups(batch: int, num: int, device: torch.device) -> list[Tensor]:
    """The rows of a batch in `num` nearly equal parts, fewer where the batch is smaller."""
    return list(torch.arange(batch, device=device).tensor_split(min(num, batch)))


def check_range(where: str, name: str, value: object, least: float, *, integer: bool) -> None:
    """Raise SettingError unless `value` is a pair (low, high) with least <= low <= high."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        wanted = f"{name} must be a pair (low, high)."
        fail(SettingError, where, wanted, got=repr(value), fix=f"{name}=(8, 15)" if integer else f"{name}=(0.1, 0.2)")
    for end in value:
        _checks.at_least(where, name, end, least, integer=integer)
    if value[0] > value[1]:
        fail(SettingError, where, f"{name} must be (low, high).", got=repr(value), fix=f"{name}={value[1], value[0]}")
