r"""Tables for classification: the bag of structural causal models, networks and Gaussian processes of TabPFN.

    kind ~ {GP, network, causal model},    (x, v) ~ kind,    label_i = how many random ranks v_i exceeds, then renamed

Every level draws the law of the next one, so that data sets differ in kind, not only in their numbers.

Reference: Hollmann, Mueller, Eggensperger, Hutter (2023), "TabPFN: A transformer that solves small tabular
classification problems in a second", arXiv 2207.01848, and its published settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesdl import _checks, _random
from bayesdl.errors import SettingError, fail
from bayesdl.kernels import RBF, Scale
from bayesdl.priors._tasks_base import Tasks, check_sizes, draw_inputs, merge_latents
from bayesdl.priors._tasks_causal import Graph, draw_graph, draw_variables
from bayesdl.priors._tasks_draws import draw_functions
from bayesdl.priors._tasks_laws import meta_normal
from bayesdl.priors._tasks_network import check_range, groups

_GP, _NETWORK, _CAUSAL = 0, 1, 2
_SHORTEST = 1e-3  # lengthscale: below it all inputs are strangers to each other anyway
_TIE = 1e-6


@dataclass(frozen=True)
class Tabular:
    r"""Small classification tables of every kind.

    A call splits its tasks into `architectures` groups. Each group draws its kind, and with it depth, width, number of
    causes, activation and what is a feature; every task draws weights, noise, sparsity, features, target, classes and
    categorical columns for itself. The laws are those of `_tasks_laws`:

        layers 2 + meta_gamma(2, 3), width 4 + meta_gamma(3, 100), causes 2 + meta_gamma(3, 7)
        weight_scale meta_normal(.01, 10), noise_scale meta_normal(1e-4, .3), dropout .6 meta_beta(.1, 5)
        GP: outputscale and lengthscale meta_normal(1e-5, 10), noise variance one of 1e-5, 1e-4, 1e-2
        kind: a GP with probability softmax(1, u)_1, u ~ U(2, 10), else a network or causal model by meta_choice
        classes: C ~ U{2 .. max_classes}, borders between C groups of neighbouring ranks uniform, names at random
        a table has categorical columns with probability `categorical`; then each column is one with probability
        p ~ U(0, 1), cut at max(1, G - 1) random values, G ~ Gamma(1, mean 10), its levels renamed with probability .7

    Columns are rotated by a random number of places, and standardised over the points of the task.

    Attributes:
        max_classes: Most classes of a table, at least 2; a table of n points has n at most.
        architectures: How many groups a call draws.
        categorical: Probability that a table has categorical columns.
        max_layers: Deeper networks are cut to it.
        max_width: Wider ones are cut to it, but to no fewer units than 2 d + 2.
        gp: Range of u; smaller numbers, more Gaussian processes.

    Latents: "num_classes", "kind" (batch): 0 a GP, 1 a network, 2 a causal model; "layers", "width", "causes" (batch);
    "weight_scale", "noise_scale", "dropout" (batch); "outputscale", "lengthscale", "noise_variance" (batch) of GPs;
    "is_categorical" (batch, d). There is no noiseless label: `noiseless` is y.
    """

    max_classes: int = 10
    architectures: int = 4
    categorical: float = 0.2
    max_layers: int = 8
    max_width: int = 256
    gp: tuple[float, float] = (2.0, 10.0)

    def __post_init__(self) -> None:
        _checks.at_least("Tabular", "max_classes", self.max_classes, 2, integer=True)
        _checks.at_least("Tabular", "architectures", self.architectures, 1, integer=True)
        _checks.at_least("Tabular", "categorical", self.categorical, 0.0)
        if self.categorical > 1:
            wanted = "categorical must be a probability."
            fail(SettingError, "Tabular", wanted, got=repr(self.categorical), fix="categorical=0.2")
        _checks.at_least("Tabular", "max_layers", self.max_layers, 2, integer=True)
        _checks.at_least("Tabular", "max_width", self.max_width, 4, integer=True)
        check_range("Tabular", "gp", self.gp, 0.0, integer=False)

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` tables. Cost: O(batch layers width (width + n)); O(batch n layers width) memory. GPs: O(n^3) each."""
        check_sizes("Tabular", batch, n, d, generator)
        device = generator.device
        host = _random.generator(_random.root_seed(generator))
        x = torch.empty(batch, n, d, dtype=torch.float64, device=device)
        v, parts = torch.empty_like(x[..., 0]), []
        for rows in groups(batch, self.architectures, device):
            num = rows.numel()
            low, high = self.gp
            u = low + (high - low) * float(torch.rand((), generator=host))
            if float(torch.rand((), generator=host)) < 1.0 / (1.0 + math.exp(u - 1.0)):
                features, target, latents = _process(num, n, d, generator)
                counts = {"kind": _GP}
            else:
                graph = draw_graph(d, self.max_layers, self.max_width, host)
                features, target, latents = draw_variables(graph, num, n, d, generator)
                counts = _counts(graph)
            x[rows], v[rows] = features.to(x.dtype), target.to(v.dtype)
            latents.update({name: torch.full((num,), value, device=device) for name, value in counts.items()})
            parts.append((rows, latents))
        x, is_categorical = make_categorical(rotated(x, generator), self.categorical, generator)
        y, num_classes = classes_by_rank(v, self.max_classes, generator)
        latents = {"num_classes": num_classes, "is_categorical": is_categorical, **merge_latents(parts, batch)}
        return Tasks(standardized(x).to(torch.float32), y, y.clone(), latents)


def classes_by_rank(v: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels int64 (batch n) from a continuous v (batch n), and the number of classes (batch), all of them inhabited.

    The points in the order of v are cut at random places into C ~ U{2 .. most} classes, which get random names. Equal
    values are put into random order, not into the order of rows.
    """
    batch, n = v.shape
    device = v.device
    num = torch.randint(2, most + 1, (batch, 1), generator=generator, device=device).clamp_max(n)
    noise = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=device)
    spread = (v - v.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True)
    rank = (v + _TIE * torch.where(spread > 0, spread, torch.ones_like(spread)) * noise).argsort(-1).argsort(-1)
    gaps = torch.rand(batch, n - 1, generator=generator, device=device)
    border = gaps.argsort(-1).argsort(-1) < num - 1
    by_rank = torch.cat([torch.zeros_like(num), border.cumsum(-1)], -1)
    names = _renaming(num, most, generator)
    return names.gather(-1, by_rank.gather(-1, rank)), num.squeeze(-1)


def make_categorical(x: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (batch n d) with some columns cut into few levels, and which they are, bool (batch d)."""
    batch, n, d = x.shape
    device = x.device
    table = torch.rand(batch, 1, generator=generator, device=device) < probability
    share = torch.rand(batch, 1, generator=generator, device=device)
    cut = table & (torch.rand(batch, d, generator=generator, device=device) < share)
    size = 10.0 * torch._standard_gamma(torch.ones(batch, d, device=device), generator=generator)
    most = 50
    num = size.round().clamp(2, most).long()
    rows = torch.randint(0, n, (batch, d, most - 1), generator=generator, device=device)
    columns = x.mT.contiguous()
    borders = columns.gather(-1, rows)
    beyond = torch.arange(most - 1, device=device) >= (num - 1).unsqueeze(-1)
    borders = borders.masked_fill(beyond, math.inf).sort(-1).values
    levels = torch.searchsorted(borders, columns)
    shuffled = _renaming(num.unsqueeze(-1), most, generator).gather(-1, levels)
    shuffle = torch.rand(batch, d, 1, generator=generator, device=device) < 0.7
    levels = torch.where(shuffle, shuffled, levels).to(x.dtype)
    return torch.where(cut.unsqueeze(-1), levels, columns).mT, cut


def rotated(x: Tensor, generator: torch.Generator) -> Tensor:
    """x (batch n d) with the columns of each task moved round by a random number of places."""
    batch, n, d = x.shape
    by = torch.randint(0, d, (batch, 1), generator=generator, device=x.device)
    place = (torch.arange(d, device=x.device) + by) % d
    return x.gather(-1, place.unsqueeze(1).expand(batch, n, d))


def standardized(x: Tensor) -> Tensor:
    """Every column of every task with mean 0 and variance 1 over its points; constant ones 0."""
    x = x - x.mean(-2, keepdim=True)
    scale = x.square().mean(-2, keepdim=True).sqrt()
    return torch.where(scale > 0, x / scale.clamp_min(1e-300), torch.zeros_like(x))


def _renaming(num: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """A random permutation of 0 .. num - 1 in the first places: num (*b 1) -> (*b most)."""
    keys = torch.rand((*num.shape[:-1], most), generator=generator, device=num.device)
    keys = keys + (torch.arange(most, device=num.device) >= num)
    return keys.argsort(-1).argsort(-1)


def _process(batch: int, n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A group of Gaussian processes over normal inputs."""
    x = draw_inputs("Tabular", "normal", batch, n, d, generator)
    outputscale = meta_normal((batch,), 1e-5, 10.0, generator)
    lengthscale = meta_normal((batch,), 1e-5, 10.0, generator).clamp_min(_SHORTEST)
    levels = torch.tensor([1e-5, 1e-4, 1e-2], dtype=torch.float64, device=x.device)
    noise = levels[torch.randint(0, 3, (batch,), generator=generator, device=x.device)]
    kernel = Scale(RBF(ard=False))
    f, _ = draw_functions(kernel, {"outputscale": outputscale, "base.lengthscale": lengthscale}, x, generator)
    e = torch.randn(batch, n, generator=generator, dtype=torch.float64, device=x.device)
    latents = {"outputscale": outputscale, "lengthscale": lengthscale, "noise_variance": noise}
    return x, f + noise.sqrt().unsqueeze(-1) * e, latents


def _counts(graph: Graph) -> dict[str, int]:
    kind = _CAUSAL if graph.causal else _NETWORK
    return {"kind": kind, "layers": graph.layers, "width": graph.width, "causes": graph.causes}
