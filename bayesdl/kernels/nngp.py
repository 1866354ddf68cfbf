r"""The NNGP: the Gaussian process that a fully connected network becomes as its layers widen.

    k_0(x, z) = w_std^2 x . z / d + b_std^2
    k_l(x, z) = w_std^2 F(k_{l-1}(x, x), k_{l-1}(x, z), k_{l-1}(z, z)) + b_std^2,        l = 1 .. depth

with F the dual map of the activation (`bayesdl.ops.dual`). Weights are N(0, w_std^2 / fan-in) and biases N(0, b_std^2),
the same in every layer, read-out included.

References: Lee et al. (2018), arXiv 1711.00165; Matthews et al. (2018), arXiv 1804.11271.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bayesdl.errors import SettingError, fail
from bayesdl.hyper import LogNormal, Parameter
from bayesdl.kernels.algebra import inner
from bayesdl.kernels.base import Functions, Lead, Params, Pullback, align, draw_normal, draw_uniform, get, reduce_to
from bayesdl.kernels.columns import OnColumns, PriorChoice, check_positive
from bayesdl.ops import dual


class _Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor, Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    diagonal: Callable[[Tensor], Tensor]
    w_std: float


_ACTIVATIONS = {
    "relu": _Activation(torch.relu, dual.relu_dual, dual.relu_dual_slopes, lambda a: 0.5 * a, math.sqrt(2)),
    "erf": _Activation(
        torch.erf,
        dual.erf_dual,
        dual.erf_dual_slopes,
        lambda a: (2.0 / math.pi) * (2.0 * a / (1.0 + 2.0 * a)).arcsin(),
        1.5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class NNGP(OnColumns):
    """Kernel of an infinitely wide network with `depth` hidden layers.

    Attributes:
        depth: Number of hidden layers, at least 1.
        activation: "relu" (the arc-cosine kernel) or "erf".
        w_std: Initial weight scale, None for sqrt 2 with relu, which keeps the variance constant through the layers,
            and 1.5 with erf.
        b_std: Initial bias scale. As it goes to 0, a relu network becomes homogeneous: k(c x, z) = c k(x, z).
        w_std_prior: A prior, None for a flat one, or "default": LogNormal(log of the default w_std, 0.5).
        b_std_prior: A prior, None for a flat one, or "default": LogNormal(log 0.3, 1).
        active_dims: Columns of x that the kernel looks at; None for all.

    Inputs should be standardised. A relu network with w_std far above sqrt 2 has variances that grow by w_std^2 / 2 a
    layer.
    """

    depth: int = 3
    activation: str = "relu"
    w_std: float | None = None
    b_std: float = 0.3
    w_std_prior: PriorChoice = "default"
    b_std_prior: PriorChoice = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            fail(
                SettingError,
                "NNGP",
                "depth must be an integer of at least 1.",
                got=repr(self.depth),
                fix="pass depth=3, or use Linear() for no hidden layer",
            )
        if self.activation not in _ACTIVATIONS:
            names = " or ".join(repr(name) for name in _ACTIVATIONS)
            fail(
                SettingError,
                "NNGP",
                f"activation must be {names}.",
                got=repr(self.activation),
                fix="pass one of those; other activations have no closed form here",
            )
        check_positive("NNGP", "w_std", self.w_std, False)
        check_positive("NNGP", "b_std", self.b_std, False)

    def parameters(self, d: int) -> tuple[Parameter, ...]:
        """`w_std` and `b_std`, both scalars and both standard deviations."""
        self._width(d)
        typical = self._act.w_std
        w_prior = LogNormal(math.log(typical), 0.5) if self.w_std_prior == "default" else self.w_std_prior
        b_prior = LogNormal(math.log(0.3), 1.0) if self.b_std_prior == "default" else self.b_std_prior
        w_std = typical if self.w_std is None else self.w_std
        return Parameter("w_std", (), w_std, w_prior), Parameter("b_std", (), self.b_std, b_prior)

    def _covariance(self, x: Tensor, z: Tensor | None, params: Params) -> Tensor:
        x = self._select(x)
        same = z is None
        z = x if same else self._select(z)
        w2, b2 = self._variances(params)
        k = w2[..., None, None] * (x @ z.mT) / x.shape[-1] + b2[..., None, None]
        by_x = self._first_diagonal(x, w2, b2)
        by_z = by_x if same else self._first_diagonal(z, w2, b2)
        for _ in range(self.depth):
            # The exact diagonal at every layer: what the dual map makes of rounding there is not symmetric noise.
            k = torch.diagonal_scatter(k, by_x, 0, -2, -1) if same else k
            k = w2[..., None, None] * self._act.dual(by_x.unsqueeze(-1), k, by_z.unsqueeze(-2)) + b2[..., None, None]
            by_x = self._next_diagonal(by_x, w2, b2)
            by_z = by_x if same else self._next_diagonal(by_z, w2, b2)
        return torch.diagonal_scatter(k, by_x, 0, -2, -1) if same else k

    def _variance(self, x: Tensor, params: Params) -> Tensor:
        w2, b2 = self._variances(params)
        diagonal = self._first_diagonal(self._select(x), w2, b2)
        for _ in range(self.depth):
            diagonal = self._next_diagonal(diagonal, w2, b2)
        return diagonal

    def value_and_pullback(self, x: Tensor, params: Params | None = None) -> tuple[Tensor, Pullback]:
        """One matrix a layer is kept; going back, each layer needs the two slopes of its dual map.

        Cost: O(depth n^2) time after the first product, (depth + 1) n^2 memory.
        """
        params = self._resolved(x, params)
        with torch.no_grad():
            w2, b2 = self._variances(params)
            layers = self._layers(self._select(x), w2, b2)

        def pullback(p: Tensor) -> Params:
            with torch.no_grad():
                by_w, by_b = torch.zeros_like(layers[0][..., 0, 0]), torch.zeros_like(layers[0][..., 0, 0])
                for level in range(self.depth, -1, -1):
                    total = p.sum((-2, -1))
                    by_w += inner(p, layers[level]) - b2 * total
                    by_b += total
                    if level > 0:
                        p = self._pull_layer(p, layers[level - 1], w2)
                w_std, b_std = params["w_std"], params["b_std"]
                return {
                    "w_std": reduce_to(2.0 * by_w / w_std, w_std.shape),
                    "b_std": reduce_to(2.0 * by_b * b_std, b_std.shape),
                }

        return layers[-1], pullback

    @property
    def _act(self) -> _Activation:
        return _ACTIVATIONS[self.activation]

    def _variances(self, params: Params) -> tuple[Tensor, Tensor]:
        return get(params, "w_std", "NNGP").square(), get(params, "b_std", "NNGP").square()

    def _layers(self, x: Tensor, w2: Tensor, b2: Tensor) -> list[Tensor]:
        """The covariance at every layer, without a graph."""
        diagonal = self._first_diagonal(x, w2, b2)
        k = w2[..., None, None] * (x @ x.mT) / x.shape[-1] + b2[..., None, None]
        k.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        layers = [k]
        for _ in range(self.depth):
            k = self._act.dual(diagonal.unsqueeze(-1), k, diagonal.unsqueeze(-2))
            k = k.mul_(w2[..., None, None]).add_(b2[..., None, None])
            diagonal = self._next_diagonal(diagonal, w2, b2)
            k.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
            layers.append(k)
        return layers

    def _pull_layer(self, p: Tensor, k: Tensor, w2: Tensor) -> Tensor:
        """dL/dk of one layer below, from p = dL/dk of the layer above; both symmetric, diagonals included."""
        diagonal = k.diagonal(dim1=-2, dim2=-1)
        by_a, by_r, _ = self._act.slopes(diagonal.unsqueeze(-1), k, diagonal.unsqueeze(-2))
        by_diagonal = by_a.mul_(p).sum(-1).mul_(2.0)
        p = by_r.mul_(p)
        p.diagonal(dim1=-2, dim2=-1).add_(by_diagonal)
        return p.mul_(w2[..., None, None])

    def _first_diagonal(self, x: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return w2[..., None] * x.square().sum(-1) / x.shape[-1] + b2[..., None]

    def _next_diagonal(self, a: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return w2[..., None] * self._act.diagonal(a) + b2[..., None]

    def _features(self, lead: Lead, num_features: int, d: int, params: Params, generator: torch.Generator) -> Functions:
        """The last hidden layer of a network of width M for each function; unbiased up to O(depth / M)."""
        fan_in, layers = self._width(d), []
        for _ in range(self.depth):
            weight = draw_normal((*lead, fan_in, num_features), params, generator) / math.sqrt(fan_in)
            layers.append((weight, draw_normal((*lead, 1, num_features), params, generator)))
            fan_in = num_features
        sign = draw_uniform((*lead, 1, num_features), params, generator).sub_(0.5).sign()
        w, b = params["w_std"][..., None, None], params["b_std"][..., None, None]

        def evaluate(x: Tensor) -> Tensor:
            h = self._select(x)
            like = (h + w + b)[..., :1, :]  # carries the batch axes that x and the parameters have between them
            for weight, bias in layers:
                h = self._act.value(w * (h @ align(weight, 2, like)) + b * align(bias, 2, like))
            return w * h + b * align(sign, 2, like)

        return evaluate
