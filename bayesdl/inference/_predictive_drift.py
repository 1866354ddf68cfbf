r"""Whether a predictive rule is a martingale: what it says at fixed probes must not drift along its own rollouts.

    E[q_t(A | x)] = q_0(A | x)  for every t, event A and input x,    q_t the predictive after t drawn points

For y the events are y <= c at three quartiles of q_0, for labels one for each class. Every probe and event is tested at
several t, and so is the mean over the probes. With D_l the departure from q_0 in rollout l,

    z = sum_l D_l / (sum_l D_l^2)^{1/2}

which is at most L^{1/2}, about N(0, 1) for a martingale, and of light tails even where few rollouts differ from the
rest. The largest |z| is held against the level that Bonferroni's inequality asks of as many tests at a total of 1 %.

A rule that is a martingale for the wrong model passes: that a predictive is coherent does not make it right. Scaling
every width of a Gaussian process by one factor, for instance, gives another coherent Gaussian process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl.distributions import Bernoulli, Categorical
from bayesdl.posterior._completed import Along, mean_of

_LEVELS = (0.25, 0.5, 0.75)
_FALSE_ALARMS = 0.01
_FEWEST = 20  # rollouts below which there is no verdict
_PROBES = 8


def probes_of(x: Tensor, plan: Tensor) -> Tensor:
    """At most 8 inputs (*b, P, d): from the observed x (*b, n, d), and from where the first rollout goes."""
    parts = []
    for rows in (x, plan[0]):
        count = min(rows.shape[-2], _PROBES // 2)
        places = torch.linspace(0, rows.shape[-2] - 1, count, device=x.device).round().long()
        parts.append(rows.index_select(-2, places))
    return torch.cat(parts, -2)


def steps_of(horizon: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... below the horizon, and the horizon."""
    steps = [m * 10**e for e in range(len(str(horizon))) for m in (1, 2, 5)]
    return (*[t for t in steps if t < horizon], horizon)


class Watch:
    """What a rule says at probes along the rollouts.

    Args:
        base: The posterior before the first step.
        probes: (*b, P, d).
        num: L.
        horizon: N.

    Attributes:
        start: Probabilities of the events before the first step.
    """

    def __init__(self, base: Any, probes: Tensor, num: int, horizon: int) -> None:
        self.probes, self._num, self._steps = probes, num, steps_of(horizon)
        start = base.predict(probes)
        self._labels = isinstance(start, (Bernoulli, Categorical))
        if self._labels:
            self.start = mean_of(start).unsqueeze(0)
        else:
            self._cuts = torch.stack([start.quantile(level) for level in _LEVELS])  # (3, *b, P[, k])
            self.start = start.cdf(self._cuts)
        self._found: dict[int, Tensor] = {}

    def look(self, t: int, rule: Any) -> None:
        """Note what the rule says after t points, where t is one of the steps or the first after it."""
        due = [step for step in self._steps if step <= t and step not in self._found]
        if due:
            self._note(t, rule.predict(self.probes.unsqueeze(0)))
            self._steps = tuple(step for step in self._steps if step > t)

    @property
    def noted(self) -> dict[str, Tensor]:
        """What was found so far, by the number of points, for a checkpoint."""
        return {str(t): departure for t, departure in self._found.items()}

    def recall(self, noted: dict[str, Tensor]) -> None:
        """Go on from what an interrupted run had found."""
        self._found = {int(t): departure for t, departure in noted.items()}
        last = max(self._found, default=0)
        self._steps = tuple(step for step in self._steps if step > last)

    def look_along(self, along: Along) -> None:
        """The same for all steps of a Gaussian process at once."""
        for t in self._steps:
            mean, deviation = along.mean[..., t - 1, :, :], along.deviation[..., t - 1, :, :]
            cuts = self._cuts if self._cuts.ndim == mean.ndim else self._cuts.unsqueeze(-1)
            z = (cuts.unsqueeze(1) - mean) / deviation
            self._found[t] = (torch.special.ndtr(z) - self.start.reshape(cuts.shape).unsqueeze(1)).detach()

    def _note(self, t: int, predictive: Distribution) -> None:
        if self._labels:
            said = mean_of(predictive).unsqueeze(0)
        else:
            shape = (len(_LEVELS), *predictive.batch_shape)
            said = predictive.cdf(self._cuts.unsqueeze(1).expand(shape))
        self._found[t] = (said - self.start.unsqueeze(1)).detach()

    def report(self) -> dict[str, Any]:
        """Steps, the largest mean departure and |z| at each, the threshold, and whether some |z| is above it."""
        probes_axis = 1 + self.probes.ndim - 1  # of (events, L, *b, P, ...)
        largest, scores, tests = [], [], 0
        for departure in self._found.values():
            each = torch.cat([departure, departure.mean(probes_axis, keepdim=True)], probes_axis).movedim(1, 0)
            each = each.flatten(1).to(torch.float64)
            norm = each.square().sum(0).sqrt()
            z = each.sum(0) / torch.where(norm > 0, norm, torch.ones_like(norm))
            largest.append(float(each.mean(0).abs().max()))
            scores.append(float(z.abs().max()))
            tests += each.shape[1]
        level = torch.tensor(1 - _FALSE_ALARMS / (2 * max(tests, 1)), dtype=torch.float64)
        threshold = float(torch.special.ndtri(level))
        return {
            "steps": list(self._found),
            "largest_mean": largest,
            "largest_z": scores,
            "threshold": threshold,
            "num_tests": tests,
            "detected": self._num >= _FEWEST and max(scores, default=0.0) > threshold,
        }
