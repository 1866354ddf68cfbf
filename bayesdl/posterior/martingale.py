r"""Martingale posteriors: the uncertainty about a quantity is what the unseen part of the population would tell of it.

    theta_l = theta(F_l),    F_l = the observed points and N more, drawn one after another from the predictive rule

Rollout l of L is one way in which the data might go on. Where the rule is a Bayesian predictive, theta_l are draws from
the posterior of theta as N grows; where it is a network, this is the posterior that the network implies.

References: Fong, Holmes, Walker (2023), "Martingale posterior distributions"; Doob (1949).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl._random import Seed, generator
from bayesdl.data import TrainingData, Units
from bayesdl.distributions import Empirical
from bayesdl.errors import ConvergenceWarning, SettingError, StorageError, fail
from bayesdl.posterior._average import average
from bayesdl.posterior._completed import KINDS, Completed, mean_of, pack, part, prefixed, unpack
from bayesdl.posterior._functionals import Functional, Loss, minimiser, named
from bayesdl.posterior.base import Functions, Posterior, member_indices

_ENOUGH = 0.8  # share of the variance of f that rollouts should recover where somebody asks for f


@final
class MartingalePosterior(Posterior):
    """L equally weighted completions of the data, and the predictive rule at the end of each.

    The function of a rollout is x -> E[y | x, its completed data]: for labels, class probabilities. Its law over
    rollouts is `predict(noise=False)`, `sample` and `functions`; `quantile_at` is that of a quantile of y at x;
    `functional` and `minimise` are those of summaries of the population that the completed data stand for.

    After N steps from n points a rollout has resolved var_n(x) - var_{n+N}(x) of the rule's variance of f(x), and no
    more. Where it went nowhere near x that is nothing, and the law of f(x) is far too narrow: `horizon_coverage` says
    by how much, and the questions about f warn below 80 %.

    Cost: that of predicting with L posteriors of n + N points; less for Gaussian processes, whose rollouts share the
    factor of the data.
    """

    form: ClassVar[str] = "martingale"
    model_kind: ClassVar[str] = "object"

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None = None,
        *,
        rule: Posterior,
        completed: Completed,
        drawn_x: Tensor,
        drawn_y: Tensor,
    ) -> None:
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._rule = rule
        self._completed = completed
        self._drawn_x, self._drawn_y = drawn_x, drawn_y  # (R, *b, N, d), (L, *b, N, k)

    @property
    def rule(self) -> Posterior:
        """The engine's own posterior given the observed data: where every rollout starts."""
        return self._rule

    @property
    def num_rollouts(self) -> int:
        """L."""
        return self._drawn_y.shape[0]

    def completed_data(self) -> tuple[Tensor, Tensor]:
        """All rollouts' data, observed points first: x (L, *b, n + N, d) and y (L, *b, n + N) or (L, *b, n + N, k)."""
        num, old = self.num_rollouts, self._data
        x = self._drawn_x.expand(num, *self._drawn_x.shape[1:])
        x = torch.cat([old.x.expand(num, *old.x.shape), x], -2)
        y = torch.cat([old.y.expand(num, *old.y.shape), self._drawn_y], -2)
        return x, y if old.has_outputs else y.squeeze(-1)

    def predict(self, x: Any, *, noise: bool = True) -> Distribution:
        """Distribution of y at each x, averaged over the rollouts; see `Posterior.predict`.

        It agrees with the rule's own predictive at the start, up to Monte Carlo error, as far as the rule is a
        martingale. With noise=False the rollouts' means at x (class probabilities, for labels), as an `Empirical`
        distribution.

        Warns:
            ConvergenceWarning: noise=False where the rollouts recover less than 80 % of the variance of f.
        """
        x = self._beside(self._inputs("predict", x))
        if noise:
            members = self._completed.predict(x, noise=True)
            return average(members, self._axis(x, members.batch_shape))
        self._warn_if_short("predict", x)
        return Empirical(self._means(x))

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Functions of rollouts chosen with replacement, at the points x together; see `Posterior.sample`."""
        x = self._beside(self._inputs("sample", x))
        self._warn_if_short("sample", x)
        num = torch.Size(sample_shape).numel()
        chosen = torch.randint(self.num_rollouts, (num,), generator=generator(seed, x.device), device=x.device)
        values = self._means(x).index_select(-1, chosen).movedim(-1, 0)
        return values.reshape(*sample_shape, *values.shape[1:])

    def functions(self, num: int, *, seed: Seed = 0) -> Functions:
        """The functions of `num` rollouts, distinct while there are enough; see `Posterior.functions`."""
        chosen = member_indices(self.num_rollouts, num, seed)
        if self._diagnostics.get("covariates") == "urn":
            self._warn_if_short("functions", self._beside(self._data.x))
            message = "the rollouts revisit observed inputs only, so functions vary too little away from them"
            warnings.warn(f"Martingale: {message}; {_REMEDY}", ConvergenceWarning, stacklevel=2)

        def draw(x: Any) -> Tensor:
            values = self._means(self._beside(self._inputs("functions", x)))
            return values.index_select(-1, chosen.to(values.device)).movedim(-1, 0)

        return draw

    def quantile_at(self, x: Any, level: float) -> Empirical:
        """Law of the `level`-quantile of y at each x, over rollouts; what one predictive cannot say.

        Raises:
            SettingError: `level` is not in [0, 1].

        Warns:
            ConvergenceWarning: The rollouts recover less than 80 % of the variance of f at x.
        """
        x = self._beside(self._inputs("quantile_at", x))
        self._warn_if_short("quantile_at", x)
        members = self._completed.predict(x, noise=True)
        values = members.quantile(level)
        return Empirical(values.movedim(self._axis(x, values.shape), -1).to(self._data.x.dtype))

    def functional(self, what: str | Functional, *, level: float | None = None) -> Empirical:
        """Law of a functional of the population, over rollouts, computed on each one's completed data.

        Args:
            what: "mean", "median" or "quantile" of y; "linear" (least squares) or "logistic" (labels 0 and 1), whose
                values are the intercept and the slopes; or a callable (x (L, *b, n + N, d), y (L, *b, n + N)) ->
                (L, *b, ...).
            level: Of "quantile".

        Returns:
            An `Empirical` of batch (*b, ...), (*b, k, ...) for k outputs; its `draws` (..., L) are joint: rollout l
            is the same everywhere.

        Raises:
            SettingError: An unknown name, or a level that is missing or misplaced.
            ShapeError: The callable returns something else.
        """
        function = named("functional", what, level)
        x, y = self.completed_data()
        values = function(x, y)
        if not isinstance(values, Tensor) or values.shape[: x.ndim - 2] != x.shape[:-2]:
            wanted = f"a functional must return {tuple(x.shape[:-2])} values or more, one set a rollout."
            got = str(tuple(values.shape)) if isinstance(values, Tensor) else type(values).__name__
            fail(SettingError, "functional", wanted, got=got, fix="work along the axis of points: y.mean(-1)")
        return Empirical(values.movedim(0, -1))

    def minimise(self, loss: Loss, start: Any, *, max_iterations: int = 200) -> Empirical:
        """Law of argmin_theta of the mean loss over the population: a parametric fit without a parametric likelihood.

        Args:
            loss: From theta (c, p), x (c, m, d) and y (c, m) or (c, m, k), all float64, to losses (c, m),
                differentiable in theta.
            start: Where every search starts, (p,).
            max_iterations: L-BFGS steps at most.

        Returns:
            An `Empirical` of batch (*b, p), with joint draws as for `functional`.

        Warns:
            ConvergenceWarning: A search had not converged.
        """
        return self.functional(minimiser(loss, torch.as_tensor(start), max_iterations=max_iterations))

    def horizon_coverage(self, x: Any) -> Tensor:
        """1 - E[var_{n+N}(x)] / var_n(x) for f under the rule, (..., s) or (..., s, k): the share of its variance that
        the rollouts recover. NaN for labels, and where the rule's variance of f is 0."""
        return self._coverage(self._beside(self._inputs("horizon_coverage", x)))

    def _coverage(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            before = self._rule.predict(x.squeeze(self._rollout_axis(x)), noise=False)
            members = self._completed.predict(x, noise=False)
            if self._task != "regression":
                return torch.full_like(mean_of(before), torch.nan)
            after = members.variance.mean(self._axis(x, members.batch_shape))
            share = 1 - after / before.variance
            return torch.where(before.variance > 0, share, torch.nan)

    @property
    def _task(self) -> str:
        return getattr(getattr(self._model, "likelihood", None), "task", "regression")

    def _warn_if_short(self, method: str, x: Tensor) -> None:
        """Say at how many points the horizon or the covariates leave the law of f too narrow."""
        if self._task != "regression":
            return
        share = self._coverage(x.detach())
        short = share < _ENOUGH
        if not bool(short.any()):
            return
        worst = float(share[share.isfinite()].min())
        message = (
            f"Martingale.{method}: at {int(short.sum())} of {short.numel()} places the rollouts recover less than "
            f"{_ENOUGH:.0%} of the variance of f, at the worst {max(worst, 0.0):.0%}, so that its law is too narrow"
        )
        warnings.warn(f"{message}; {_REMEDY}", ConvergenceWarning, stacklevel=3)

    def _beside(self, x: Tensor) -> Tensor:
        """x (..., *b, s, d) with all axes of the data and one for the rollouts, (..., 1, *b, s, d)."""
        batch = self._data.batch_shape
        if x.ndim - 2 < len(batch):
            x = x.expand(*batch, *x.shape[-2:])
        return x.unsqueeze(-3 - len(batch))

    def _rollout_axis(self, x: Tensor) -> int:
        return x.ndim - 3 - len(self._data.batch_shape)

    def _axis(self, x: Tensor, shape: torch.Size) -> int:
        """Where the rollouts stand in `shape`, that of answers at x (..., 1, *b, s, d), from the right."""
        return self._rollout_axis(x) - len(shape)

    def _means(self, x: Tensor) -> Tensor:
        """(..., *b, s[, k], L)."""
        values = self._completed.mean(x)
        return values.movedim(self._rollout_axis(x), -1).to(self._data.x.dtype)

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not isinstance(self._rule, Posterior):
            wanted = "the rule must be a posterior of bayesdl."
            fail(StorageError, "posterior.save", wanted, got=type(self._rule).__name__, fix="keep its code, fit again")
        rule, rule_record = pack(self._rule)
        completed, record = self._completed.parts()
        own = {"drawn_x": self._drawn_x, "drawn_y": self._drawn_y}
        tensors = {**own, **prefixed("rule", rule), **prefixed("completed", completed)}
        return tensors, {"rule": rule_record, "completed": {"kind": self._completed.kind, **record}}

    @classmethod
    def _from_parts(
        cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]
    ) -> MartingalePosterior:
        rule = unpack(shared["model"], record["rule"], part("rule", tensors))
        kind = KINDS[record["completed"]["kind"]]
        completed = kind.from_parts(rule, record["completed"], part("completed", tensors))
        drawn = {name: tensors[name] for name in ("drawn_x", "drawn_y")}
        return cls(**shared, rule=rule, completed=completed, **drawn)

    def _arviz_groups(self) -> dict[str, Any]:
        x = self._beside(self._data.x)
        f = self._means(x).movedim(-1, 0).unsqueeze(0)
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        members = self._completed.predict(x, noise=True)
        return {
            "posterior": {"f": f},
            "observed_data": {"y": y},
            "log_likelihood": {"y": members.log_prob(y.expand(members.batch_shape)).unsqueeze(0)},
        }


_REMEDY = "give covariates=... that reach the points you ask about, or raise horizon"
