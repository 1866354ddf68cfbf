"""A posterior as a BoTorch model of members: functions drawn from it, and how observations move them."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import Tensor

from bayesdl._random import child_seeds
from bayesdl.errors import NumericalWarning, SettingError, fail
from bayesdl.interop._botorch_answers import MemberAnswer
from bayesdl.interop._botorch_laws import Law, Members, grouped, is_regression, ungrouped
from bayesdl.interop._botorch_models import (
    Noise,
    Observations,
    SurrogateModel,
    as_trained,
    conditioning_noise,
    factor_of,
    finite_scale,
    own_noise,
    places,
)
from bayesdl.posterior import Posterior


class MemberModel(SurrogateModel):
    r"""A posterior as S functions drawn from it, the same S whenever and wherever they are asked.

    Conditioning moves every member f_s by Matheron's rule,

        f_s(x) + C(x, X') (C(X', X') + R)^{-1} (Y' + e_s - f_s(X')),    e_s ~ N(0, R),

    with the exact covariance C where the posterior is a Gaussian process, and else with that of the members, where the
    rank of C is at most S - 1: keep the number of values well below S.

    Args:
        source: The posterior.
        law: With C.
        members: With the functions.
        seed: Of e_s.
    """

    _WELL_BELOW: ClassVar[float] = 0.5

    def __init__(
        self, source: Posterior, law: Law, members: Members, seed: int, observed: Observations | None = None
    ) -> None:
        super().__init__()
        self._source, self._law, self._members, self._seed, self._seen = source, law, members, seed, observed
        exact = law.exact and isinstance(law.mean_scale(None, 0), float)
        self.conditioning = ("exact" if exact else "kalman") if is_regression(source) else "none"
        self._update = None if observed is None or observed.x.shape[-2] == 0 else self._weights()

    @property
    def sources(self) -> tuple[Posterior, ...]:
        """The posterior."""
        return (self._source,)

    @property
    def num_members(self) -> int:
        """S."""
        return self._members.num_members

    @property
    def _observed(self) -> Observations | None:
        return self._seen

    @property
    def _num_all_outputs(self) -> int:
        return self._members.num_outputs

    def _answer(self, x: Tensor, noise: Noise) -> MemberAnswer:
        values = self._values(as_trained(self._source, x))
        if noise is False:
            return MemberAnswer(values, None)
        variance = noise.to(values) if isinstance(noise, Tensor) else own_noise(self._members)
        return MemberAnswer(values, variance.unsqueeze(-3))

    def _values(self, x: Tensor) -> Tensor:
        """(..., S, q, m)."""
        if self._seen is None:
            return self._members.values(x)
        lead = torch.broadcast_shapes(x.shape[:-2], self._seen.y.shape[:-2])
        values = self._members.values(x)
        if self._update is None:
            return values.expand(*lead, *values.shape[-3:])
        cross = self._cross(x, values)  # (..., g, p', p)
        moved = self._update[0].movedim(-2, -3) @ cross  # (..., g, S, p)
        return values + ungrouped(moved.movedim(-3, -2), self._num_all_outputs)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """(C + R)^{-1} (Y' + e_s - f_s(X')), (*e, S, g, p'), and the members' deviations (*c, S, g, p')."""
        seen, groups, num = self._seen, self._law.num_groups, self.num_members
        if not self._law.closed_form:
            self._check_rank(seen.x.shape[-2] * self._num_all_outputs)
        old = as_trained(self._source, seen.x)
        values = grouped(self._members.values(old), groups)
        deviation = values - values.mean(-3, keepdim=True)
        if self._law.closed_form:
            covariance = self._law.joint(old)[1] * self._typical_scale()
        else:
            spread = deviation.movedim(-3, -2)
            covariance = spread.mT @ spread / num
        noise = conditioning_noise(self._members, seen, groups)  # (..., g, p')
        chol = factor_of(covariance + torch.diag_embed(noise))
        errors = grouped(self._errors(seen), groups) * noise.sqrt().unsqueeze(-3)
        gap = grouped(seen.y, groups).unsqueeze(-3) + errors - values  # (*e, S, g, p')
        solved = torch.cholesky_solve(gap.movedim(-3, -1), chol)  # (*e, g, p', S)
        return solved.movedim(-1, -3), deviation

    def _cross(self, x: Tensor, values: Tensor) -> Tensor:
        """C(X', x), (..., g, p', p)."""
        groups, seen = self._law.num_groups, self._seen
        if not self._law.closed_form:
            there = grouped(values, groups)
            there = (there - there.mean(-3, keepdim=True)).movedim(-3, -2)
            here = self._update[1].movedim(-3, -2)
            return here.mT @ there / self.num_members
        n, old = seen.x.shape[-2], as_trained(self._source, seen.x)
        lead = torch.broadcast_shapes(x.shape[:-2], old.shape[:-2])
        both = torch.cat([old.expand(*lead, *old.shape[-2:]), x.expand(*lead, *x.shape[-2:])], -2)
        covariance = self._law.joint(both)[1] * self._typical_scale()
        first, rest = places(n, both.shape[-2], covariance.shape[-1], x.device)
        return covariance[..., first, :][..., rest]

    def _typical_scale(self) -> Tensor | float:
        scale = self._law.mean_scale(None, 0)
        return scale if isinstance(scale, float) else finite_scale(scale).unsqueeze(-1)

    def _errors(self, seen: Observations) -> Tensor:
        """Standard normal numbers (S, n, m) of mean 0 over members; those of a point do not depend on later points."""
        n, m = seen.y.shape[-2:]
        columns = []
        for seed in child_seeds(self._seed, n):
            g = torch.Generator(seen.y.device).manual_seed(seed)
            shape = (self.num_members, m)
            columns.append(torch.randn(shape, generator=g, dtype=torch.float64, device=seen.y.device))
        e = torch.stack(columns, -2)
        return e - e.mean(0)

    def _check_rank(self, num_values: int) -> None:
        if self.num_members == 1:
            fix = "an ensemble of several members, or a sampler"
            wanted = "one member has no spread that observations could act on."
            fail(SettingError, "condition_on_observations", wanted, got="num_members=1", fix=fix)
        if num_values > self._WELL_BELOW * self.num_members:
            message = (
                f"condition_on_observations: {num_values} values for {self.num_members} members, whose covariance has "
                f"rank {self.num_members - 1} at most; the update is unreliable: use more members "
                "(num_samples=...), or fit again"
            )
            warnings.warn(message, NumericalWarning, stacklevel=5)

    def _conditioned(self, new: Observations) -> MemberModel:
        seen = new if self._seen is None else self._seen.join(new)
        return MemberModel(self._source, self._law, self._members, self._seed, seen)
