r"""Learning curves: the prior of LC-PFN, drawn a batch at a time.

    f(t) = sum_k w_k f_k(t; theta_k),    w_k ~ U(0, 1),    theta_k ~ p_k
    y_t = f(t) + sigma e_t,    ln sigma ~ N(-4, 1)

given that f ends above where it starts and lies in [0, 1] all the way. Noise may lead y outside.

Reference: Adriaensen, Rakotoarison, Mueller, Hutter (2023), "Efficient Bayesian learning curve extrapolation using
prior-data fitted networks", arXiv 2310.20447.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesdl import _checks
from bayesdl.errors import NumericalError, SettingError, fail
from bayesdl.hyper import HyperPrior, LogNormal
from bayesdl.priors._curves import CURVES, Law
from bayesdl.priors._tasks_base import Tasks, check_sizes
from bayesdl.priors._tasks_conditional import Conditional
from bayesdl.priors._tasks_draws import check_law

_SPREAD = math.sqrt(1.0 / 12.0)  # of a uniform variable on [0, 1], by which both axes are standardised
_CANDIDATES = (64, 2**14)  # at least and at most so many curves are tried at a time
_ROUNDS = 2000


@dataclass(frozen=True)
class LearningCurves:
    r"""Accuracy-like curves over epochs, or over training-set sizes.

    A task holds the first n of `horizon` points of one curve, in the order of time: the context of a query is what
    came before it. Both axes are standardised as in the reference, x = (k / (horizon + 1) - 1/2) sqrt 12 for the k-th
    point and y = (accuracy - 1/2) sqrt 12; `coordinate` and `target` do so for real curves, `accuracy` undoes it.

    Attributes:
        components: Which families are summed, of `bayesdl.priors.tasks.CURVES`.
        laws: "peaked", the law that the published network was trained on, or "uniform", which only pow3, ilog2 and
            janoschek have.
        horizon: How many points a whole curve has; the conditions hold over all of them.
        axis: "epoch": t = 1, 2, ..., horizon. "size": t = 1, ratio, ratio^2, ..., for curves over training-set sizes in
            units of the smallest one; x is then linear in log t.
        ratio: Of consecutive sizes, above 1.
        noise: Prior on sigma.
        standardize: Whether x and y are standardised; else x is t and y an accuracy.

    Latents: "weights" (batch, K), in the order of components; "noise" (batch), which is sigma in units of accuracy; and
    every parameter as "family.name" (batch).
    """

    components: tuple[str, ...] = ("pow3", "ilog2", "janoschek")
    laws: str = "peaked"
    horizon: int = 100
    axis: str = "epoch"
    ratio: float = math.sqrt(2.0)
    noise: HyperPrior = field(default_factory=lambda: LogNormal(-4.0, 1.0))
    standardize: bool = True

    def __post_init__(self) -> None:
        where = "LearningCurves"
        names = (self.components,) if isinstance(self.components, str) else tuple(self.components)
        object.__setattr__(self, "components", names)
        _checks.choice(where, "laws", self.laws, ("peaked", "uniform"))
        _checks.choice(where, "axis", self.axis, ("epoch", "size"))
        _checks.at_least(where, "horizon", self.horizon, 2, integer=True)
        _checks.inside(where, "ratio", self.ratio, 1.0, math.inf)
        check_law(where, "noise", self.noise)
        if len(names) == 0 or len(set(names)) < len(names):
            wanted = "components must name at least one family, and none twice."
            fail(SettingError, where, wanted, got=repr(names), fix="components=('pow3', 'ilog2', 'janoschek')")
        for name in names:
            _checks.choice(where, "components", name, tuple(CURVES))
        self.parameter_laws()

    def parameter_laws(self) -> dict[str, Law]:
        """The law of every parameter as "family.name", before curves out of range are thrown away."""
        laws = {}
        for name in self.components:
            own = getattr(CURVES[name], self.laws)
            if own is None:
                fix = "laws='peaked', or components among 'pow3', 'ilog2', 'janoschek'"
                fail(SettingError, "LearningCurves", f"{name} has no uniform laws.", got="laws='uniform'", fix=fix)
            laws.update({f"{name}.{parameter}": law for parameter, law in own.items()})
        return laws

    def curve(self, t: Tensor, latents: dict[str, Tensor]) -> Tensor:
        """f(t), an accuracy, at t (*b n) for latents as `sample` returns them, differentiable: (*b n)."""
        total = torch.zeros_like(t)
        for k, name in enumerate(self.components):
            own = {p: latents[f"{name}.{p}"].unsqueeze(-1) for p in getattr(CURVES[name], self.laws)}
            total = total + latents["weights"][..., k : k + 1] * CURVES[name].formula(t, own)
        return total

    def times(self, like: Tensor) -> Tensor:
        """All t (horizon), in the dtype and on the device of `like`."""
        steps = torch.arange(self.horizon, dtype=like.dtype, device=like.device)
        return steps + 1.0 if self.axis == "epoch" else torch.exp(steps * math.log(self.ratio))

    def coordinate(self, t: Tensor) -> Tensor:
        """x at t: epochs counted from 1, or sizes in units of the smallest."""
        if not self.standardize:
            return t
        place = t if self.axis == "epoch" else 1.0 + t.log() / math.log(self.ratio)
        return (place / (self.horizon + 1) - 0.5) / _SPREAD

    def target(self, accuracy: Tensor) -> Tensor:
        """y for an accuracy in [0, 1]."""
        return (accuracy - 0.5) / _SPREAD if self.standardize else accuracy

    def place(self, x: Tensor) -> Tensor:
        """t at x: the inverse of `coordinate`."""
        if not self.standardize:
            return x
        count = (_SPREAD * x + 0.5) * (self.horizon + 1)
        return count if self.axis == "epoch" else torch.exp((count - 1.0) * math.log(self.ratio))

    def accuracy(self, y: Tensor) -> Tensor:
        """The accuracy that y stands for: the inverse of `target`."""
        return 0.5 + _SPREAD * y if self.standardize else y

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> Tasks:
        """`batch` curves, d = 1. Curves out of range are replaced until none is left.

        Raises:
            SettingError: d is not 1, or n is above the horizon.
            NumericalError: The conditions are next to never met.

        Cost: O(batch K horizon / a) with a the share of curves in range, about 0.15 with the defaults.
        """
        check_sizes("LearningCurves", batch, n, d, generator)
        if d != 1 or n > self.horizon:
            wanted = f"curves have one input column and at most {self.horizon} points."
            fail(SettingError, "LearningCurves.sample", wanted, got=f"n = {n}, d = {d}", fix="d=1, or a longer horizon")
        like = torch.empty((), dtype=torch.float64, device=generator.device)
        t = self.times(like)
        latents = self._in_range(t, batch, generator)
        f = self.curve(t[:n].expand(batch, n), latents)
        sigma = self.noise.sample((batch, 1), generator)
        e = torch.randn(batch, n, generator=generator, dtype=torch.float64, device=like.device)
        x = self.coordinate(t[:n]).to(torch.float32).expand(batch, n).unsqueeze(-1).contiguous()
        y, noiseless = (self.target(v).to(torch.float32) for v in (f + sigma * e, f))
        return Tasks(x, y, noiseless, {**latents, "noise": sigma.squeeze(-1)})

    def conditional(
        self, latents: dict[str, Tensor], x: Tensor, y: Tensor, xs: Tensor, num_noiseless: int = 0
    ) -> Conditional:
        """The law of the curve at xs (batch q 1) given the latents, under which it is known: variance 0.

        Args:
            latents: Of `sample`.
            x, y, num_noiseless: The context, which tells nothing more.
            xs: (batch q 1).

        Cost: O(batch q K).
        """
        t = self.place(xs.squeeze(-1).to(latents["weights"]))
        mean = self.target(self.curve(t, latents))
        sigma = latents["noise"] / _SPREAD if self.standardize else latents["noise"]
        return Conditional(mean, torch.zeros_like(mean), sigma.square())

    def _in_range(self, t: Tensor, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Latents of `batch` curves that fulfil the conditions: many are tried at a time, those that do are kept."""
        laws = self.parameter_laws()
        kept: list[dict[str, Tensor]] = []
        found, tried = 0, 0
        for _ in range(_ROUNDS):
            # so many that the missing ones are probably among them; the share that passes is known better each time
            rate = (found + 1) / (tried + 4)
            num = min(max(int(1.3 * (batch - found) / rate), _CANDIDATES[0]), _CANDIDATES[1])
            weights = torch.rand(num, len(self.components), generator=generator, dtype=t.dtype, device=t.device)
            latents = {"weights": weights, **{name: law.sample((num,), generator) for name, law in laws.items()}}
            # the two ends tell most of those that fail
            for points in (t[:: t.numel() - 1], t):
                f = self.curve(points.expand(weights.shape[0], -1), latents)
                good = (f[:, -1] > f[:, 0]) & (f >= 0.0).all(-1) & (f <= 1.0).all(-1)
                rows = good.nonzero().squeeze(-1)
                latents = {name: value[rows] for name, value in latents.items()}
                weights = latents["weights"]
            rows = rows[: batch - found]
            kept.append({name: value[: rows.numel()] for name, value in latents.items()})
            found, tried = found + rows.numel(), tried + num
            if found == batch:
                return {name: torch.cat([part[name] for part in kept]) for name in latents}
        wanted = "some curves of these components must rise and stay in [0, 1]."
        got = f"{found} of {tried} candidates of {self.components}"
        return fail(NumericalError, "LearningCurves", wanted, got=got, fix="fewer components: their sum exceeds 1")
