"""The problems of `bo_study`: functions with moved optima, ridges and steps, mixed spaces, fronts, small simulators.

All are minimised and need nothing from outside. `problem(seed)` is an instance: where the optimum lies, which inputs
matter and which way they point change with the seed, so that no method is rewarded for liking centres or corners; the
anchors (`branin`, `hartmann6`) and the simulators are as they are. Instances evaluate many points at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bo_study_simulators as simulators
import torch
from botorch.test_functions import Ackley, Branin, Hartmann
from botorch.test_functions.multi_objective import C2DTLZ2, DTLZ2, ZDT1, BraninCurrin
from torch import Tensor

from bayesdl.bo import Choice, Float, Integer, Space

Values = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Instance:
    """One problem to minimise.

    Attributes:
        space: Named dimensions.
        objective: From points (n, p) in the space's own units (choices by index) to values (n,) or (n, m).
        startup: Quasi-random points that every method is given.
        proposals: Points that a method may then ask for.
        best: The least value, where it is known.
        constraint: From points to values (n,), feasible where at most 0.
        reference_point: Of the hypervolume, for several objectives.
        most: The largest hypervolume, where it is known.
        noise: From values (n, 1) and a generator to what a method is told; None for the values themselves.
        held_out: How many points the surrogate is judged at.
    """

    space: Space
    objective: Values
    startup: int
    proposals: int
    best: float = math.nan
    constraint: Values | None = None
    reference_point: tuple[float, ...] = ()
    most: float = math.nan
    noise: Callable[[Tensor, torch.Generator], Tensor] | None = None
    held_out: int = 256

    @property
    def num_objectives(self) -> int:
        """m."""
        return max(1, len(self.reference_point))

    @property
    def continuous(self) -> bool:
        """Whether every dimension is a real number."""
        return all(isinstance(dim, Float) for dim in self.space.dimensions)

    def rows(self, points: Sequence[Mapping[str, Any]]) -> Tensor:
        """Points as (n, p), choices by index."""
        dims = dict(zip(self.space.names, self.space.dimensions, strict=True))
        values = [[_number(dim, point[name]) for name, dim in dims.items()] for point in points]
        return torch.tensor(values, dtype=torch.float64)

    def evaluate(self, points: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Values (n, m) and constraints (n, k), without noise."""
        x = self.rows(points)
        y = self.objective(x).reshape(len(points), self.num_objectives)
        limits = y.new_empty(len(points), 0) if self.constraint is None else self.constraint(x).reshape(-1, 1)
        return y, limits


def _number(dim: Any, value: Any) -> float:
    return float(dim.options.index(value)) if isinstance(dim, Choice) else float(value)


def _cube(d: int) -> Space:
    return Space.of({f"x{i}": (0.0, 1.0) for i in range(d)})


def _stream(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**40 + seed)


def _on_cube(function: Any) -> Values:
    """A test function of BoTorch over the unit cube."""
    low, high = function.bounds.to(torch.float64)
    return lambda x: function(low + (high - low) * x)


def branin(seed: int) -> Instance:
    """Branin, as it is."""
    return Instance(_cube(2), _on_cube(Branin()), 6, 20, best=0.39788735772973816)


def hartmann6(seed: int) -> Instance:
    """Hartmann's function of 6 inputs, as it is."""
    return Instance(_cube(6), _on_cube(Hartmann(dim=6)), 10, 20, best=-3.322368011391339)


def ackley10(seed: int) -> Instance:
    """Ackley's function of 10 inputs on a box of side 30 whose optimum lies anywhere but near the edge."""
    at = 0.2 + 0.6 * torch.rand(10, generator=_stream("ackley", seed), dtype=torch.float64)
    function = Ackley(dim=10)
    return Instance(_cube(10), lambda x: function(30 * (x - at)), 20, 30, best=0.0)


def _ridge(u: Tensor) -> Tensor:
    """Waves that quicken towards one edge, and a narrow valley across them."""
    x, z = u.unbind(-1)
    waves = 0.5 * (1 / (0.12 * math.pi * x + 0.1)).sin()
    return waves - (-(((z - 0.25 - 0.4 * x) / 0.08) ** 2)).exp()


def _step(u: Tensor) -> Tensor:
    """A cliff at x = 0.55, behind it a bowl; before it gentle waves."""
    x, z = u.unbind(-1)
    return torch.where(x > 0.55, (x - 0.7) ** 2 + (z - 0.35) ** 2 - 1.5, 0.4 * (7 * x).sin() * (5 * z).cos())


def _flat(name: str, function: Values, seed: int) -> Instance:
    """A function of two inputs with its axes exchanged or reversed by the seed."""
    g = _stream(name, seed)
    order = torch.randperm(2, generator=g)
    reverse = torch.rand(2, generator=g, dtype=torch.float64) < 0.5

    def objective(x: Tensor) -> Tensor:
        return function(torch.where(reverse, 1 - x, x)[..., order])

    return Instance(_cube(2), objective, 10, 20, best=_grid_minimum(function))


@functools.cache
def _grid_minimum(function: Values) -> float:
    """The least value on a grid of 2000 by 2000 points."""
    axis = torch.linspace(0, 1, 2000, dtype=torch.float64)
    return float(function(torch.cartesian_prod(axis, axis)).min())


def ridge(seed: int) -> Instance:
    """Non-stationary: waves that quicken, and a narrow valley."""
    return _flat("ridge", _ridge, seed)


def step(seed: int) -> Instance:
    """Non-stationary: a cliff."""
    return _flat("step", _step, seed)


def _embedded(d: int, seed: int) -> Instance:
    """Hartmann's function of six of d inputs, some of them reversed."""
    g = _stream("embedded", seed)
    chosen = torch.randperm(d, generator=g)[:6]
    reverse = torch.rand(6, generator=g, dtype=torch.float64) < 0.5
    function = Hartmann(dim=6)

    def objective(x: Tensor) -> Tensor:
        inner = x[..., chosen]
        return function(torch.where(reverse, 1 - inner, inner))

    return Instance(_cube(d), objective, 30, 30, best=-3.322368011391339)


def polynomial100(seed: int) -> Instance:
    """The mean over 25 groups of the product of four inputs, each about a centre of its own; least at a corner."""
    g = _stream("polynomial", seed)
    centre = 0.3 + 0.4 * torch.rand(25, 4, generator=g, dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)

    def groups(x: Tensor) -> Tensor:
        return (2 * (x - centre)).prod(-1)

    best = groups(corners.unsqueeze(1)).amin(0).mean()  # linear in every input, so least at corners of each group
    return Instance(_cube(100), lambda x: groups(x.unflatten(-1, (25, 4))).mean(-1), 50, 30, best=float(best))


def _network(d: int, seed: int) -> Instance:
    """A draw of the prior of a tanh network of two hidden layers of 64 units; the optimum is not known."""
    g = _stream("network", seed)
    shapes = ((d, 64), (64, 64), (64, 1))
    weights = [2.5 * torch.randn(a, b, generator=g, dtype=torch.float64) / a**0.5 for a, b in shapes]
    biases = [torch.randn(b, generator=g, dtype=torch.float64) for _, b in shapes]

    def objective(x: Tensor) -> Tensor:
        h = (x - 0.5) * 12**0.5
        for w, b in zip(weights[:-1], biases[:-1], strict=True):
            h = (h @ w + b).tanh()
        return (h @ weights[-1]).squeeze(-1)

    return Instance(_cube(d), objective, 30, 30, best=_descended(objective, d, g))


def _descended(objective: Values, d: int, g: torch.Generator) -> float:
    """The least value of 64 descents by Adam within the unit cube: a bound that no method here comes near."""
    x = torch.rand(64, d, generator=g, dtype=torch.float64).requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        objective(x).sum().backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0.0, 1.0)
    return float(objective(x.detach()).min())


def noisy_hartmann6(seed: int) -> Instance:
    """Hartmann's function of 6 inputs with normal noise of standard deviation 0.1."""
    return Instance(
        _cube(6), _on_cube(Hartmann(dim=6)), 20, 30, best=-3.322368011391339,
        noise=lambda y, g: y + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype),
    )  # fmt: skip


def heavy_hartmann6(seed: int) -> Instance:
    """Hartmann's function of 6 inputs with noise of Student's law of 3 degrees of freedom, scale 0.1."""

    def noise(y: Tensor, g: torch.Generator) -> Tensor:
        z = torch.randn((4, *y.shape), generator=g, dtype=y.dtype)
        return y + 0.1 * z[0] / z[1:].square().mean(0).sqrt()

    return Instance(_cube(6), _on_cube(Hartmann(dim=6)), 20, 30, best=-3.322368011391339, noise=noise)


def _several(function: Any, startup: int, most: float) -> Instance:
    """A test problem of BoTorch with several objectives, each minimised."""
    constraint = None
    if getattr(function, "num_constraints", 0):
        low, high = function.bounds.to(torch.float64)
        constraint = lambda x: -function.evaluate_slack(low + (high - low) * x).amin(-1)  # noqa: E731
    reference = tuple(function.ref_point.tolist())
    space, values = _cube(function.dim), _on_cube(function)
    return Instance(space, values, startup, 20, constraint=constraint, reference_point=reference, most=most)


def branin_currin(seed: int) -> Instance:
    """Branin and Currin: two objectives of two inputs."""
    function = BraninCurrin()
    return _several(function, 6, function.max_hv)


def dtlz2(seed: int) -> Instance:
    """DTLZ2: two objectives of six inputs."""
    function = DTLZ2(dim=6, num_objectives=2)
    return _several(function, 14, function.max_hv)


def zdt1(seed: int) -> Instance:
    """ZDT1: two objectives of ten inputs."""
    function = ZDT1(dim=10)
    return _several(function, 22, function.max_hv)


def c2dtlz2(seed: int) -> Instance:
    """C2-DTLZ2: DTLZ2 with a constraint."""
    function = C2DTLZ2(dim=6, num_objectives=2)
    return _several(function, 14, function.max_hv)


def sorbent(seed: int) -> Instance:
    """Three quadratic responses to two real and five ordered inputs, as in designed experiments."""
    g = _stream("sorbent", seed)
    low = torch.tensor([0.0, 0.0, *[0.0] * 5], dtype=torch.float64)
    high = torch.tensor([1.0, 1.0, *[4.0] * 5], dtype=torch.float64)
    centre = torch.rand(3, 7, generator=g, dtype=torch.float64)
    root = torch.randn(3, 7, 7, generator=g, dtype=torch.float64) / 7**0.5

    def objective(x: Tensor) -> Tensor:
        u = ((x - low) / (high - low)).unsqueeze(-2) - centre  # (n, 3, 7)
        return torch.einsum("nmi,mij->nmj", u, root).square().sum(-1)

    names = {**{f"x{i}": Float(0.0, 1.0) for i in range(2)}, **{f"k{i}": Integer(0, 4) for i in range(5)}}
    return Instance(Space.of(names), objective, 16, 20, reference_point=(2.0, 2.0, 2.0))


def brusselator(seed: int) -> Instance:
    """Unevenness of a reaction on a grid of 32 by 32 cells: four rates."""
    dims = {"a": (0.1, 5.0), "b": (0.1, 5.0), "d0": (0.01, 5.0), "d1": (0.01, 5.0)}
    return Instance(Space.of(dims), simulators.brusselator, 5, 20, held_out=48)


def pest(seed: int) -> Instance:
    """25 stations, at each one of four pesticides or none."""
    dims = {f"s{i}": Choice(("none", "a", "b", "c", "d")) for i in range(25)}
    return Instance(Space.of(dims), functools.partial(simulators.pest, seed=seed), 20, 30)


def cartpole(seed: int) -> Instance:
    """A linear controller of a cart with a pole: four gains."""
    dims = {"x": (-2.0, 4.0), "v": (-2.0, 6.0), "angle": (-10.0, 60.0), "spin": (-5.0, 20.0)}
    return Instance(Space.of(dims), functools.partial(simulators.cartpole, seed=seed), 10, 20)


def lander(seed: int) -> Instance:
    """A craft that has to land softly in wind: eight parameters of its controller."""
    dims = {f"w{i}": (0.0, 1.0) for i in range(8)}
    return Instance(Space.of(dims), functools.partial(simulators.lander, seed=seed), 18, 30)


def predators(seed: int) -> Instance:
    """The four rates of a Lotka-Volterra system from noisy counts: log of the mean square error."""
    dims = {name: Float(low, high, log=True) for name, low, high in simulators.RATES}
    return Instance(Space.of(dims), functools.partial(simulators.predators, seed=seed), 10, 20)


def tuning(seed: int) -> Instance:
    """Kernel ridge regression: kernel, lengthscale, ridge, degree, and whether inputs are scaled."""
    dims = {
        "kernel": Choice(("rbf", "laplacian", "polynomial")), "lengthscale": Float(0.05, 50.0, log=True),
        "ridge": Float(1e-6, 10.0, log=True), "degree": Integer(1, 5), "scaled": Choice(("yes", "no")),
    }  # fmt: skip
    return Instance(Space.of(dims), functools.partial(simulators.tuning, seed=seed), 10, 20, held_out=128)


PROBLEMS: dict[str, Callable[[int], Instance]] = {
    "branin": branin, "hartmann6": hartmann6, "ackley10": ackley10, "ridge": ridge, "step": step,
    "embedded50": functools.partial(_embedded, 50), "embedded200": functools.partial(_embedded, 200),
    "polynomial100": polynomial100, "network20": functools.partial(_network, 20),
    "network200": functools.partial(_network, 200), "noisy_hartmann6": noisy_hartmann6,
    "heavy_hartmann6": heavy_hartmann6, "branin_currin": branin_currin, "dtlz2": dtlz2, "zdt1": zdt1,
    "c2dtlz2": c2dtlz2, "sorbent": sorbent, "brusselator": brusselator, "pest": pest, "cartpole": cartpole,
    "lander": lander, "predators": predators, "tuning": tuning,
}  # fmt: skip
