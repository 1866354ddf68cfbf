r"""Predictive resampling: where rollouts go, what they see there, and how a rule takes in what it has drawn.

    y_{t+1} ~ p(y | x_{t+1}, D_t),    D_{t+1} = D_t and (x_{t+1}, y_{t+1})

for L rollouts at once, as one batch of data sets. Random numbers are drawn before anything else, the same for all data
sets, so that each data set sees what it would see alone: uniforms u (L, N, k), of which y is the quantile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesdl import _checks
from bayesdl.data import TrainingData
from bayesdl.distributions import Bernoulli, Categorical, Empirical, Normal, StudentT
from bayesdl.errors import BayesdlError, SettingError, ShapeError, fail
from bayesdl.ops.student import student_quantile
from bayesdl.posterior import Posterior
from bayesdl.posterior._completed import CompletedPosterior
from bayesdl.posterior._copies import copies

Look = Callable[[int, "Rule"], None]
_WHERE = "Martingale.fit"
_DOUBLINGS, _HALVINGS = 60, 70


class Drawn(NamedTuple):
    """What the rollouts saw after the data: x (R, *b, N, d), R being L or 1, and y (L, *b, N, k)."""

    x: Tensor
    y: Tensor


class Rule(Protocol):
    """A predictive rule for L rollouts at once."""

    block: int  # how many points to draw before the rule takes them in

    def predict(self, x: Tensor) -> Distribution:
        """Of y at x (R, *b, s, d), each rollout given its own data: batch (L, *b, s[, k])."""

    def draw(self, x: Tensor, u: Tensor) -> Tensor:
        """y (L, *b, r, k) at x (R, *b, r, d), from uniforms (L, r, k)."""

    def append(self, x: Tensor, y: Tensor) -> Rule:
        """The rule that has also seen x (L, *b, r, d) and y (L, *b, r, k)."""

    def again(self, x: Tensor, y: Tensor) -> Rule:
        """The rule after x (L, *b, t, d) and y (L, *b, t, k) were drawn block by block: the same as it was then."""

    def completed(self) -> CompletedPosterior:
        """What the rule says at the end."""


def resample(
    rule: Rule, x: Tensor, u: Tensor, *, drawn: Tensor | None, after: Look, keep: Callable[[list[Tensor]], None]
) -> tuple[Rule, Tensor]:
    """Draw y at x (R, *b, N, d) and let the rule take it in, block after block; y (L, *b, N, k) and the last rule.

    Args:
        rule: Before the first step.
        x: Where the rollouts go.
        u: (L, N, k) uniforms.
        drawn: (L, *b, t, k) what an earlier, interrupted run had drawn; None for nothing.
        after: Called with t and the rule after t points.
        keep: Called with the y of all blocks so far, after each block.
    """
    horizon, parts = x.shape[-2], []
    wide = x.expand(u.shape[0], *x.shape[1:])
    if drawn is not None and drawn.shape[-2] > 0:
        parts.append(drawn)
        rule = rule.again(wide[..., : drawn.shape[-2], :], drawn)
    t = sum(part.shape[-2] for part in parts)
    while t < horizon:
        end = min(t + rule.block, horizon)
        y = rule.draw(x[..., t:end, :], u[:, t:end])
        rule = rule.append(wide[..., t:end, :], y)
        parts.append(y)
        t = end
        after(t, rule)
        keep(parts)
    return rule, torch.cat(parts, -2)


class Updated:
    """A rule whose posterior takes in data with `condition_on`."""

    block = 1

    def __init__(self, posterior: Any, data: TrainingData) -> None:
        self._posterior, self._data = posterior, data

    @classmethod
    def start(cls, engine: Any, base: Any, data: TrainingData, num: int, seed: int) -> Updated:
        """L copies of `base`; where it has no copies, a fit to L copies of the data."""
        wide = copies(base, num)
        return cls(fit_copies(engine, data, num, seed) if wide is None else wide, data)

    def predict(self, x: Tensor) -> Distribution:
        """See `Rule`."""
        return self._posterior.predict(x)

    def draw(self, x: Tensor, u: Tensor) -> Tensor:
        """See `Rule`."""
        return drawn_from(self._posterior.predict(x), u, self._data)

    def append(self, x: Tensor, y: Tensor) -> Updated:
        """See `Rule`."""
        return Updated(self._posterior.condition_on(x, y if self._data.has_outputs else y.squeeze(-1)), self._data)

    def again(self, x: Tensor, y: Tensor) -> Updated:
        """See `Rule`; point by point, since an update by many at once rounds otherwise."""
        rule = self
        for t in range(x.shape[-2]):
            rule = rule.append(x[..., t : t + 1, :], y[..., t : t + 1, :])
        return rule

    def completed(self) -> CompletedPosterior:
        """See `Rule`."""
        return CompletedPosterior(self._posterior)


class Refitted:
    """A rule whose engine is fitted again to all rollouts after every `block` points.

    One point of a block is drawn from the predictive. Several are drawn together, as the joint predictive of a model
    has it: f from `posterior.sample`, one draw for each rollout, and y given f. Noise is taken as Gaussian of the
    variance by which the predictive of y exceeds that of f.
    """

    def __init__(
        self, engine: Any, posterior: Any, data: TrainingData, seen: Drawn | None, num: int, block: int, seed: int
    ) -> None:
        self._engine, self._posterior, self._data, self._seen = engine, posterior, data, seen
        self._num, self.block, self._seed = num, block, seed

    def predict(self, x: Tensor) -> Distribution:
        """See `Rule`."""
        return self._posterior.predict(x)

    def draw(self, x: Tensor, u: Tensor) -> Tensor:
        """See `Rule`."""
        if x.shape[-2] == 1:
            return drawn_from(self._posterior.predict(x), u, self._data)
        f = self._joint(x)
        task = getattr(getattr(self._engine.model, "likelihood", None), "task", "regression")
        if task == "multiclass":
            return drawn_from(Categorical(logits=f), u, self._data)
        if task == "binary":
            return drawn_from(Bernoulli(logits=f), u, self._data)
        noisy, latent = (self._posterior.predict(x, noise=noise).variance for noise in (True, False))
        return drawn_from(Normal(f, (noisy - latent).clamp_min(torch.finfo(f.dtype).tiny).sqrt()), u, self._data)

    def append(self, x: Tensor, y: Tensor) -> Refitted:
        """See `Rule`."""
        seen = Drawn(x, y)
        if self._seen is not None:
            seen = Drawn(torch.cat([self._seen.x, x], -2), torch.cat([self._seen.y, y], -2))
        posterior = fit_copies(self._engine, self._data, self._num, self._seed, seen)
        return Refitted(self._engine, posterior, self._data, seen, self._num, self.block, self._seed + 1)

    def again(self, x: Tensor, y: Tensor) -> Refitted:
        """See `Rule`; one fit, the last one, with its seed."""
        before = -(-x.shape[-2] // self.block) - 1
        late = Refitted(
            self._engine, self._posterior, self._data, self._seen, self._num, self.block, self._seed + before
        )
        return late.append(x, y)

    def completed(self) -> CompletedPosterior:
        """See `Rule`."""
        return CompletedPosterior(self._posterior)

    def _joint(self, x: Tensor) -> Tensor:
        """f (L, *b, r[, k]): draw l at the points of rollout l."""
        if self._seen is None and x.shape[0] == 1:
            return self._posterior.sample(x.squeeze(0), (self._num,), seed=self._seed)
        x = x.expand(self._num, *x.shape[1:])
        f = self._posterior.sample(x, (self._num,), seed=self._seed)
        return f.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def fit_copies(engine: Any, data: TrainingData, num: int, seed: int, seen: Drawn | None = None) -> Any:
    """The engine on L copies of the data, each followed by what its rollout has seen.

    Raises:
        SettingError: The engine takes no data sets with batch axes; the message says what it said.
    """
    x, y = (t.expand(num, *t.shape) for t in (data.x, data.y))
    if seen is not None:
        x, y = torch.cat([x, seen.x], -2), torch.cat([y, seen.y], -2)
    try:
        with torch.enable_grad():
            return engine.fit(x, y if data.has_outputs else y.squeeze(-1), seed=seed)
    except (BayesdlError, NotImplementedError) as error:
        name = type(engine).__name__
        wanted = f"{name} can neither be updated nor fitted to {num} data sets as one batch."
        got = " ".join(str(error).splitlines())[:200]
        fix = "bdl.Martingale(bdl.ExactGP(model)), or an engine whose fit takes x (*b, n, d)"
        fail(SettingError, _WHERE, wanted, got=got, fix=fix)


def can_update(posterior: Any, data: TrainingData) -> bool:
    """Whether `condition_on` takes one more point."""
    method = getattr(type(posterior), "condition_on", None)
    if method is None or method is Posterior.condition_on:
        return False
    y = data.y[..., :1, :]
    try:
        posterior.condition_on(data.x[..., :1, :], y if data.has_outputs else y.squeeze(-1))
    except NotImplementedError:
        return False
    return True


def drawn_from(predictive: Distribution, u: Tensor, data: TrainingData) -> Tensor:
    """y (L, *b, r, k) with cdf u (L, r, k), in the dtype of the data; the same u for every data set of *b."""
    between = (1,) * len(data.batch_shape)
    u = u.reshape(u.shape[0], *between, *u.shape[1:])
    outputs = len(predictive.batch_shape) == len(between) + 3
    y = inverse_cdf(predictive, u if outputs else u.squeeze(-1)).to(data.y.dtype)
    return y if outputs else y.unsqueeze(-1)


def inverse_cdf(predictive: Distribution, u: Tensor) -> Tensor:
    """The quantile at u, one level for each element of the batch; in closed form, or by bisection on the cdf."""
    shape = torch.broadcast_shapes(predictive.batch_shape, u.shape)
    if isinstance(predictive, Bernoulli):
        return (u > 1 - predictive.probs).to(predictive.probs)
    if isinstance(predictive, Categorical):
        below = predictive.probs.cumsum(-1)[..., :-1]
        return (below <= u.unsqueeze(-1)).sum(-1).expand(shape)
    if isinstance(predictive, Empirical):
        ordered = predictive.draws.sort(-1).values
        ordered = ordered.expand(*shape, ordered.shape[-1])
        place = (u.expand(shape) * ordered.shape[-1]).long().clamp(max=ordered.shape[-1] - 1)
        return ordered.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    if isinstance(predictive, Normal):
        return predictive.loc + predictive.scale * torch.special.ndtri(u).to(predictive.loc)
    if isinstance(predictive, StudentT):
        z = student_quantile(u.expand(shape).to(predictive.loc), predictive.dof.expand(shape))
        return predictive.loc + predictive.scale * z
    try:
        return predictive.icdf(u.expand(shape).to(predictive.mean))
    except NotImplementedError:
        return _by_bisection(predictive, u.expand(shape))


def _by_bisection(predictive: Distribution, u: Tensor) -> Tensor:
    mean, width = predictive.mean, predictive.stddev
    u, width = u.to(mean), torch.where(width.isfinite() & (width > 0), width, mean.abs() + 1.0)
    low, high = mean - width, mean + width
    for _ in range(_DOUBLINGS):
        below, above = predictive.cdf(low) > u, predictive.cdf(high) < u
        if not bool((below | above).any()):
            break
        width = 2 * width
        low, high = torch.where(below, low - width, low), torch.where(above, high + width, high)
    for _ in range(_HALVINGS if mean.dtype == torch.float64 else _HALVINGS // 2):
        middle = 0.5 * (low + high)
        above = predictive.cdf(middle) >= u
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return high


def covariate_plan(law: Any, data: TrainingData, num: int, horizon: int, source: torch.Generator) -> Tensor:
    """Where the rollouts go: (L, *b, N, d), or (1, *b, N, d) where all go the same way; in the user's units.

    Args:
        law: "urn", "box", a callable (count, generator) -> (count, d), or a table of points (m, d).
        data: The observed data.
        num: L.
        horizon: N.
        source: On the device of the data.

    Raises:
        SettingError: A name that does not exist.
        ShapeError, DataError, DtypeError: What the law gave cannot be used.
    """
    x, d = data.x, data.x.shape[-1]
    batch = data.batch_shape
    if isinstance(law, str):
        return _urn(x, num, horizon, source) if law == "urn" else _box(x, horizon, source)
    between = (1,) * len(batch)
    if callable(law):
        points = _points(law(num * horizon, source), x, num * horizon)
        return points.reshape(num, *between, horizon, d).expand(num, *batch, horizon, d).to(x)
    points = _points(law, x, None)
    rounds = [torch.randperm(len(points), generator=source, device=x.device) for _ in range(-(-horizon // len(points)))]
    chosen = points[torch.cat(rounds)[:horizon]]
    return chosen.reshape(1, *between, horizon, d).expand(1, *batch, horizon, d)


def _urn(x: Tensor, num: int, horizon: int, source: torch.Generator) -> Tensor:
    """Polya's urn over the observed rows: by de Finetti, independent draws with weights from Dirichlet(1, ..., 1)."""
    n, d = x.shape[-2:]
    weights = torch.rand((num, n), generator=source, dtype=torch.float64, device=x.device).clamp_min(1e-300).log().neg()
    chosen = torch.multinomial(weights, horizon, replacement=True, generator=source)
    index = chosen.reshape(num, *(1,) * (x.ndim - 2), horizon, 1).expand(num, *x.shape[:-2], horizon, d)
    return x.expand(num, *x.shape).gather(-2, index)


def _box(x: Tensor, horizon: int, source: torch.Generator) -> Tensor:
    """Scrambled Sobol points over the smallest box around the observed rows."""
    seed = int(torch.randint(2**31, (), generator=source, device=x.device))
    unit = torch.quasirandom.SobolEngine(x.shape[-1], scramble=True, seed=seed).draw(horizon, dtype=torch.float64)
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    return (low + (high - low) * unit.to(x)).unsqueeze(0)


def _points(given: Any, x: Tensor, count: int | None) -> Tensor:
    points = _checks.as_tensor(_WHERE, "covariates", given).to(x)
    d = x.shape[-1]
    rows = "m" if count is None else str(count)
    if points.ndim != 2 or points.shape[-1] != d or len(points) == 0 or (count is not None and len(points) != count):
        fix = "pass a table of inputs, or a callable (count, generator) -> inputs"
        fail(ShapeError, _WHERE, f"covariates must be ({rows}, {d}).", got=_checks.describe(points), fix=fix)
    _checks.finite(_WHERE, "covariates", points)
    return points
