r"""A transformer that reads a data set and predicts at new inputs: the network of prior-data fitted networks.

Every context point (x_i, y_i) is one token, and so is every query x. Context tokens attend to the context; a query
attends to the context and to nothing else, with the same weights:

    context   h <- h + Att(h, h),        h <- h + FF(h)
    query     g <- g + Att(g, h),        g <- g + FF(g)

There are no positions, so the order of the context does not matter, and no dense mask: reading n points and predicting
at s costs O(n^2 + n s), and what is read once (keys and values of each layer) serves every later query.

Reference: Mueller, Hollmann, Pineda Arango, Grabocka, Hutter (2022), "Transformers Can Do Bayesian Inference", arXiv
2112.10510. Different from it: layers normalise before (not after) they attend, queries do not attend to themselves, and
a learned first token stands in every context, so that there is something to attend to when there are no data.

With head="kernel" queries are not tokens: a fixed number of learned probes attend to the context in their place, and
become hypotheses about a Gaussian process (`bayesdl.amortized.hypotheses`), which answers for all x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayesdl import _checks
from bayesdl._random import Seed, generator
from bayesdl.amortized import hypotheses
from bayesdl.amortized._blocks import Block, Labels, Linear
from bayesdl.amortized.hypotheses import Hypotheses
from bayesdl.errors import SettingError, ShapeError, fail

MIXTURES = ("mixture", "kernel")  # heads whose answer is a mixture of Gaussians
_SIZES = ("max_inputs", "outputs", "width", "num_layers", "num_heads", "hidden")
HEADS = ("bars", "mixture", "kernel", "classes")


@dataclass(frozen=True)
class Architecture:
    """The shape of a network, all that is needed to build it before its weights are filled in.

    Args:
        max_inputs: The largest number of input columns d.
        head: What the network predicts: "bars" (a histogram with half-normal tails), "mixture" (of Gaussians), "kernel"
            (a mixture of Gaussian processes) or "classes" (labels).
        outputs: Number of bars, of Gaussians, of Gaussian processes, or of classes.
        width: Length of a token.
        num_layers: Number of blocks of attention and feed-forward layer.
        num_heads: Heads of attention; divides `width`.
        hidden: Width of the feed-forward layers, and of the layer in front of the head.
        kernel: Of the Gaussian processes: "matern-1/2", "matern-3/2", "matern-5/2" or "rbf"; None for other heads.
        refinements: How often their hyper-parameters take a learned step along the slope of their evidence.
        num_conditions: Numbers that a query may carry beside x. The first one, where there is any, asks for the value
            without noise (1) or with it (0, and where no conditions are given). Further ones describe the prior and are
            told to `Network.encode` too.

    Raises:
        SettingError: A size is not a positive integer, or `num_heads` does not divide `width`.
    """

    max_inputs: int
    head: str
    outputs: int
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    hidden: int = 256
    num_conditions: int = 0
    kernel: str | None = None
    refinements: int = 0

    def __post_init__(self) -> None:
        _checks.choice("Architecture", "head", self.head, HEADS)
        if self.head == "kernel":
            _checks.choice("Architecture", "kernel", self.kernel, tuple(hypotheses.KERNELS))
        elif self.kernel is not None:
            got = f"head={self.head!r}, kernel={self.kernel!r}"
            fail(SettingError, "Architecture", "only a head of kernels has one.", got=got, fix="kernel=None")
        if self.refinements and self.head != "kernel":
            got = f"head={self.head!r}, refinements={self.refinements}"
            fail(SettingError, "Architecture", "only a head of kernels is refined.", got=got, fix="refinements=0")
        least = {"outputs": 1 if self.head in MIXTURES else 2, "num_conditions": 0, "refinements": 0}
        for name in (*_SIZES, "num_conditions", "refinements"):
            _checks.at_least("Architecture", name, getattr(self, name), least.get(name, 1), integer=True)
        if self.width % self.num_heads:
            got = f"width {self.width}, num_heads {self.num_heads}"
            fix = f"width={self.num_heads * (self.width // self.num_heads + 1)}"
            fail(SettingError, "Architecture", "num_heads must divide width.", got=got, fix=fix)

    @property
    def num_raw(self) -> int:
        """Numbers that the network returns for one query: weight, location and scale of each Gaussian, else logits."""
        return 3 * self.outputs if self.head in MIXTURES else self.outputs


class Cache(NamedTuple):
    """What the network knows of its context.

    Attributes:
        keys: For each layer, (B, heads, 1 + n, width / heads): the first token and the n points read so far.
        values: The same shapes.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_points(self) -> int:
        """Points read or appended so far."""
        return self.keys[0].shape[-2] - 1

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device in which it is kept, with the rows as first axis."""
        return self.keys[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Cache:
        """The same with every tensor changed, all of which have the rows as first axis."""
        return Cache(tuple(map(function, self.keys)), tuple(map(function, self.values)))

    def numbers_after(self, num: int) -> int:
        """Numbers kept for each row once there are `num` points more."""
        _, heads, known, width = self.keys[0].shape
        return 2 * len(self.keys) * heads * (known + num) * width


@final
class Network(nn.Module):
    """The transformer. Freshly made it predicts the same everywhere: bars and classes uniform, a mixture about N(0, 1).
    With a head of kernels it predicts as Gaussian processes of about unit variance and lengthscales sqrt(d) do.

    Args:
        architecture: Its shape.
        seed: Of the initial weights.

    Everything takes one leading batch axis B of data sets. Inputs of fewer than `max_inputs` columns are filled up with
    zeros, and rescaled by sqrt(max_inputs / d), so that the length of x does not depend on d. Inputs of another dtype
    than the weights are converted to theirs.
    """

    def __init__(self, architecture: Architecture, *, seed: Seed = 0) -> None:
        super().__init__()
        self.architecture = a = architecture
        self.read_x = nn.Sequential(Linear(a.max_inputs, a.hidden), nn.GELU(), Linear(a.hidden, a.width))
        if a.head == "classes":
            self.read_y: nn.Module = Labels(a.outputs, a.width)
        else:
            self.read_y = Linear(1, a.width)
        self.first = nn.Parameter(torch.empty(a.max_inputs, a.width))  # one for each number of columns
        self.appended = nn.Parameter(torch.empty(a.width))
        self.noiseless = nn.Parameter(torch.empty(a.width))
        self.read_conditions = Linear(a.num_conditions, a.width, bias=False) if a.num_conditions else None
        self.blocks = nn.ModuleList(Block(a.width, a.num_heads, a.hidden) for _ in range(a.num_layers))
        self.norm = nn.LayerNorm(a.width)
        answers = a.num_raw
        if a.kernel is not None:
            self.probes = nn.Parameter(torch.empty(a.outputs, a.width))
            answers = a.max_inputs + 3  # lengthscales, outputscale, noise variance and volume of one hypothesis
            told = a.width + 2 * answers + 1
            self.refine = nn.ModuleList(
                nn.Sequential(Linear(told, a.hidden), nn.GELU(), Linear(a.hidden, 2 * answers - 1))
                for _ in range(a.refinements)
            )
        self.head = nn.Sequential(Linear(a.width, a.hidden), nn.GELU(), Linear(a.hidden, answers))
        if not self.first.is_meta:
            self._initialise(generator(seed))

    def encode(self, x: Tensor, y: Tensor, conditions: Tensor | None = None) -> Cache | Hypotheses:
        """Read the context x (B n d), y (B n); n may be 0.

        Args:
            conditions: (B, num_conditions); the first one concerns queries only and changes nothing here.

        Raises:
            ShapeError: Shapes do not fit each other, or there are more columns than `max_inputs`.

        Cost: O(B L (n^2 w + n w^2)) time and O(B L n w) memory, for L layers of width w; M kernels add O(B M n^3) time
        and O(B M n^2) memory.
        """
        _check_points("Network.encode", x, y, self.architecture.max_inputs)
        first = self.first[x.shape[-1] - 1].expand(len(x), 1, -1)
        if conditions is not None and self.read_conditions is not None:
            weight = self.read_conditions.weight[:, 1:]
            first = first + functional.linear(conditions[:, None, 1:].to(weight), weight)
        state = torch.cat([first, self._tokens(x, y)], -2)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            query, key, value = block.project(state)
            keys.append(key)
            values.append(value)
            if i < len(self.blocks) - 1:  # nobody reads the context's last state
                state = block.update(state, functional.scaled_dot_product_attention(query, key, value))
        cache = Cache(tuple(keys), tuple(values))
        if self.architecture.kernel is None:
            return cache
        probes = self._read(self.probes + first, cache)
        with torch.autocast(x.device.type, enabled=False):  # factors want all digits
            return self._hypothesise(
                self.architecture.kernel, probes.to(self.first), x.to(self.first), y.to(self.first)
            )

    def append(self, cache: Cache | Hypotheses, x: Tensor, y: Tensor, *, noiseless: bool = False) -> Cache | Hypotheses:
        """Add points x (B t d), y (B t) behind the context, in this order.

        A new point sees the context and the points appended before it; what was read already does not change. So one
        more point costs O(n), not O(n^2); the price is that appended points are understood a little less well than
        encoded ones, and that their order matters a little. To a head of kernels it does not: see `hypotheses`.

        Args:
            noiseless: Whether y holds values of the function itself, free of noise.

        Cost: O(B L t ((n + t) w + w^2)) time.
        """
        _check_points("Network.append", x, y, self.architecture.max_inputs)
        if isinstance(cache, Hypotheses):
            with torch.autocast(x.device.type, enabled=False):
                points = (part.to(self.first) for part in (x, y))
                return hypotheses.append(self.architecture.kernel, cache, *points, noiseless=noiseless)
        state = self._tokens(x, y) + self.appended
        if noiseless:
            state = state + self.noiseless
        known, new = cache.keys[0].shape[-2], x.shape[-2]
        seen = None if new == 1 else torch.ones(new, known + new, dtype=torch.bool, device=x.device).tril(known)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            query, key, value = block.project(state)
            keys.append(torch.cat([cache.keys[i], key], -2))
            values.append(torch.cat([cache.values[i], value], -2))
            if i < len(self.blocks) - 1:
                read = functional.scaled_dot_product_attention(query, keys[i], values[i], attn_mask=seen)
                state = block.update(state, read)
        return Cache(tuple(keys), tuple(values))

    def query(self, cache: Cache | Hypotheses, x: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Raw outputs at x (B s d): (B s p), to be read by `bayesdl.amortized.heads`.

        Args:
            conditions: (B, num_conditions), or None for zeros.

        Cost: O(B L s (n w + w^2)) time; O(B M s n^2) for M kernels.
        """
        if x.ndim != 3 or not 1 <= x.shape[-1] <= self.architecture.max_inputs:
            _reject_points("Network.query", x, None, self.architecture.max_inputs)
        if isinstance(cache, Hypotheses):
            noisy = None if conditions is None else 1 - conditions[:, 0].to(self.first)
            with torch.autocast(x.device.type, enabled=False):
                return hypotheses.query(self.architecture.kernel, cache, x.to(self.first), noisy)
        state = self._place(x)
        if conditions is not None and self.read_conditions is not None:
            state = state + self.read_conditions(conditions[:, None].to(self.first))
        return self.head(self._read(state, cache))

    def forward(
        self, x: Tensor, y: Tensor, xs: Tensor, conditions: Tensor | None = None, *, num_appended: int = 0,
        noiseless: bool = False,
    ) -> Tensor:  # fmt: skip
        """Read a context and predict at xs in one call: the last `num_appended` points go through `append`."""
        kept = x.shape[-2] - num_appended
        cache = self.encode(x[:, :kept], y[:, :kept], conditions)
        if num_appended:
            cache = self.append(cache, x[:, kept:], y[:, kept:], noiseless=noiseless)
        return self.query(cache, xs, conditions)

    def _read(self, state: Tensor, cache: Cache) -> Tensor:
        """What tokens (B s width) learn from the context: as many, before the head."""
        for block, key, value in zip(self.blocks, cache.keys, cache.values, strict=True):
            read = functional.scaled_dot_product_attention(block.project_query(state), key, value)
            state = block.update(state, read)
        return self.norm(state)

    def _hypothesise(self, kernel: str, probes: Tensor, x: Tensor, y: Tensor) -> Hypotheses:
        raw = self.head(probes)
        for refine in self.refine:
            told = hypotheses.slopes(kernel, raw, x, y)
            raw = raw + hypotheses.step(told, refine(torch.cat([probes, raw, told], -1)))
        return hypotheses.read(kernel, raw, x, y)

    def _place(self, x: Tensor) -> Tensor:
        """Where a point lies: (B n d) -> (B n width)."""
        missing = self.architecture.max_inputs - x.shape[-1]
        scale = math.sqrt(self.architecture.max_inputs / x.shape[-1])
        # in the residual stream's dtype, also where products are taken in a narrower one
        return self.read_x(functional.pad(x.to(self.first) * scale, (0, missing))).to(self.first.dtype)

    def _tokens(self, x: Tensor, y: Tensor) -> Tensor:
        if self.architecture.head == "classes":
            return self._place(x) + self.read_y(y)
        return self._place(x) + self.read_y(y.to(self.first).unsqueeze(-1))

    @torch.no_grad()
    def _initialise(self, source: torch.Generator) -> None:
        """Normal weights of variance 1 / fan-in; blocks start as the identity, the head as a constant."""
        for parameter in (self.first, *(m.weight for m in self.modules() if isinstance(m, Labels))):
            parameter.normal_(generator=source)
        for parameter in (self.appended, self.noiseless):
            parameter.zero_()
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.normal_(std=1 / math.sqrt(module.in_features), generator=source)
                if module.bias is not None:
                    module.bias.zero_()
        steps = [part[-1] for part in self.refine] if self.architecture.kernel is not None else []
        for last in (*(linear for b in self.blocks for linear in (b.out, b.down)), self.head[-1], *steps):
            last.weight.zero_()
        if self.architecture.head == "mixture":
            self.head[-1].bias.copy_(_spread(self.architecture.outputs))
        if self.architecture.kernel is not None:  # probes that all said the same would learn the same
            self.probes.normal_(generator=source)
            last = self.head[-1]
            last.weight.normal_(std=0.3 / math.sqrt(last.in_features), generator=source)


def _spread(num: int) -> Tensor:
    """Raw outputs of `num` Gaussians of equal weight that together are about N(0, 1)."""
    level = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    loc = torch.special.ndtri(level)
    scale = math.sqrt(max(1 - float(loc.square().mean()), 1 / num**2))
    raw_scale = math.log(math.expm1(scale))  # softplus of it is the scale
    return torch.cat([torch.zeros(num), loc.float(), torch.full((num,), raw_scale)])


def _check_points(where: str, x: Tensor, y: Tensor, max_inputs: int) -> None:
    if x.ndim != 3 or y.shape != x.shape[:-1] or not 1 <= x.shape[-1] <= max_inputs:
        _reject_points(where, x, y, max_inputs)


def _reject_points(where: str, x: Tensor, y: Any, max_inputs: int) -> None:
    wanted = f"x must have shape (B, n, d) with d from 1 to {max_inputs}" + ("" if y is None else ", y (B, n)") + "."
    got = f"x {tuple(x.shape)}" + ("" if y is None else f", y {tuple(y.shape)}")
    fail(ShapeError, where, wanted, got=got, fix="x[None], y[None] for one data set; fewer columns of x")
