r"""The exact posterior of a Gaussian process on more points than a Cholesky factor could hold.

    mean(x) = m(x) + k(x, X) alpha,    var(x) = k(x, x) - k(x, X) A^{-1} k(X, x)
    A = K + s I,    alpha = A^{-1} (y - m(X))

The same formulas as `GPPosterior`, with every A^{-1} a preconditioned conjugate-gradient solve to a stated tolerance.
The quadratic form of a variance takes the solve's residual into account, k' A^{-1} k ~ w' (k + (k - A w)), whose error
is of second order and of known sign: a solve that stops early leaves the variance too large, never too small.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl._random import Seed, generator
from bayesdl.data import TrainingData, Units, training_data
from bayesdl.distributions import Normal
from bayesdl.errors import ConvergenceWarning, SettingError, ShapeError, fail
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops.products import cross_covariance, cross_product
from bayesdl.ops.solver import LinearSystem, SolverConfig, linear_system
from bayesdl.posterior._pathwise import NUM_FEATURES, evaluate, prior_draws
from bayesdl.posterior._solved import (
    MatrixFreeState,
    condition_matrix_free,
    problems_of,
    summary,
    total_evidence,
)
from bayesdl.posterior.base import Functions, Posterior
from bayesdl.posterior.closed_form import _root

_POINTS = 4096  # whose draws are squared and summed together
_EPS = torch.finfo(torch.float64).eps


@final
class MatrixFreeGPPosterior(Posterior):
    """Exact GP posterior at fixed hyper-parameters, by solves. Internally float64; one problem a data set and output.

    Cost: a mean takes O(n) for each point; variances and joint draws take a solve of one column for each point, as many
    side by side as the memory budget holds, unless the solver's `variance_samples` says otherwise; each function takes
    one solve and then O(n + num_features) for each point. Gradients in x need the covariances between x and all data
    at once, O(n s) memory.
    """

    form: ClassVar[str] = "matrix_free"
    model_kind: ClassVar[str] = "GP"

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        units: Units,
        diagnostics: Mapping[str, Any],
        log_evidence: Tensor | None = None,
        *,
        values: dict[str, Tensor],
        constant: Tensor,
        states: tuple[MatrixFreeState, ...],
        config: SolverConfig,
        seed: int,
        memory: int,
    ) -> None:
        super().__init__(model, data, units, diagnostics, log_evidence)
        self._values = values
        self._constant = constant
        self._states = states
        self._config = config
        self._seed = seed
        self._memory = memory
        # built when first asked for, always from the same pivots and the same seed
        self._systems: dict[int, LinearSystem] = {}
        self._deviations: dict[int, list[tuple[Functions, Tensor]]] = {}

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """Values by name in standardised units: "kernel.…", "noise_variance" and "mean", with shape (*b, [k,] …).

        A mean with parameters of its own has "mean.…" in place of "mean".
        """
        own = {} if any(name.startswith("mean.") for name in self._values) else {"mean": self._constant}
        values = {**self._values, **own}
        axis = len(self._data.batch_shape)
        return {name: (v if self._data.has_outputs else v.squeeze(axis)).clone() for name, v in values.items()}

    def predict(self, x: Any, *, noise: bool = True) -> Normal:
        """Normal distribution of y (or of f with noise=False) at each x; see `Posterior.predict`.

        Warns:
            ConvergenceWarning: A solve ended above `variance_tolerance`; that variance is too large.
        """
        x = self._inputs("predict", x)

        def moments(problem: int, points: Tensor) -> Tensor:
            return torch.stack(self._moments(problem, points.flatten(0, 1)), -1).unflatten(0, points.shape[:2])

        both = self._by_problem(x, moments)  # (*full, k, s, 2)
        mean, variance = both[..., 0], both[..., 1]
        if noise:
            variance = variance + self._values["noise_variance"].unsqueeze(-1)
        mean = mean.movedim(-2, -1)
        scale = self._units.outward_scale(variance.sqrt().movedim(-2, -1))
        return Normal(self._squeeze(self._units.outward(mean)), self._squeeze(scale), validate_args=False)

    def mean(self, x: Any) -> Tensor:
        """The mean of `predict(x)` alone, (..., s) or (..., s, k), without any solve. Cost: O(n) for each point."""
        x = self._inputs("mean", x)

        def means(problem: int, points: Tensor) -> Tensor:
            return self._mean(problem, points.flatten(0, 1)).unflatten(0, points.shape[:2])

        return self._squeeze(self._units.outward(self._by_problem(x, means).movedim(-2, -1)))

    def sample(self, x: Any, sample_shape: tuple[int, ...] = (), *, seed: Seed = 0) -> Tensor:
        """Exact joint draws of f; see `Posterior.sample`. Cost: one solve for each point, O(s^2) memory and O(s^3).

        Raises:
            SettingError: The joint covariance of the points does not fit the memory budget.
        """
        x = self._inputs("sample", x)
        s = x.shape[-2]
        if 8 * (3 * s * s + 2 * s * self._states[0].x.shape[0]) > self._memory:
            wanted = f"the joint covariance of the points must fit {self._memory / 2**30:.2g} GiB."
            fix = "posterior.functions(num)(x), which needs none, bdl.SparseGP, or ExactGP(memory=...)"
            fail(SettingError, "MatrixFreeGPPosterior.sample", wanted, got=f"{s} points", fix=fix)

        def joint(problem: int, points: Tensor) -> Tensor:
            pieces = [self._joint(problem, p) for p in points]
            return torch.stack([torch.cat([mean.unsqueeze(-1), root], -1) for mean, root in pieces])

        both = self._by_problem(x, joint)  # (*full, k, s, 1 + s)
        mean, root = both[..., 0], both[..., 1:]
        shape = (*sample_shape, *mean.shape, 1)
        z = torch.randn(shape, generator=generator(seed, mean.device), dtype=mean.dtype, device=mean.device)
        draws = (mean + (root @ z).squeeze(-1)).movedim(-2, -1)
        return self._squeeze(self._units.outward(draws))

    def functions(self, num: int, *, seed: Seed = 0, num_features: int = NUM_FEATURES) -> Functions:
        """Pathwise draws; see `Posterior.functions`. `num_features` random features make up each prior function."""
        g = generator(seed, self._data.x.device)
        drawn = [self._function(problem, num, num_features, g) for problem in range(len(self._states))]

        def draw(x: Any) -> Tensor:
            x = self._inputs("functions", x)

            def values(problem: int, points: Tensor) -> Tensor:
                prior, weights = drawn[problem]
                flat = points.flatten(0, 1)
                f = evaluate(prior, flat, num * num_features) + self._against(problem, flat, weights)
                f = f + self._prior_mean(problem, flat).unsqueeze(-1)
                return f.unflatten(0, points.shape[:2])

            found = self._by_problem(x, values)  # (*full, k, s, num)
            return self._squeeze(self._units.outward(found.movedim(-1, 0).movedim(-2, -1)))

        return draw

    def condition_on(self, x: Any, y: Any) -> MatrixFreeGPPosterior:
        """The exact posterior after (x, y) too, at the same hyper-parameters, by solves that start from the old ones.

        Args:
            x: More inputs (*b, q, d).
            y: Their targets, (*b, q) or (*b, q, k) as in training.

        Warns:
            ConvergenceWarning: A solve ended above the tolerance.
        """
        data = self._joined(training_data("MatrixFreeGPPosterior.condition_on", x, y))
        n = data.x.shape[-2]
        solved = []
        for problem, (inner, y) in enumerate(problems_of(data, self._units)):
            old = self._states[problem].alpha
            residual = y - self._prior_mean(problem, inner)
            solved.append(
                condition_matrix_free(
                    self._model.kernel,
                    self._kernel_values(problem),
                    self._noise(problem),
                    inner,
                    residual,
                    self._config,
                    seed=self._seed,
                    memory=self._memory,
                    start=torch.cat([old, old.new_zeros(n - old.shape[0])]),
                )
            )
        report = summary(solved, "MatrixFreeGPPosterior.condition_on")
        return MatrixFreeGPPosterior(
            self._model,
            data,
            self._units,
            {**self._diagnostics, "num_data": n, **report},
            total_evidence(solved, self._units, n),
            values=self._values,
            constant=self._constant,
            states=tuple(s.state for s in solved),
            config=self._config,
            seed=self._seed,
            memory=self._memory,
        )

    def _joined(self, new: TrainingData) -> TrainingData:
        old = self._data
        agree = new.batch_shape == old.batch_shape and new.has_outputs == old.has_outputs
        if not agree or new.x.shape[-1] != old.x.shape[-1] or new.y.shape[-1] != old.y.shape[-1]:
            got = f"x {tuple(new.x.shape)}, y {tuple(new.y.shape)}"
            wanted = f"x and y must be like the training data, {tuple(old.x.shape)} and {tuple(old.y.shape)}."
            fix = "pass the same batch axes, columns and outputs"
            fail(ShapeError, "MatrixFreeGPPosterior.condition_on", wanted, got=got, fix=fix)
        x, y = torch.cat([old.x, new.x.to(old.x)], -2), torch.cat([old.y, new.y.to(old.y)], -2)
        return TrainingData(x, y, old.has_outputs)

    def _by_problem(self, x: Tensor, answer: Any) -> Tensor:
        """`answer(problem, points (count, s, d)) -> (count, s, *event)` for every data set and output, in inner units.

        Returns (*full, k, s, *event), where *full are the batch axes that x and the data have between them.
        """
        inner = self._units.inward_x(x, torch.float64)
        batch, k = self._data.batch_shape, self._data.y.shape[-1]
        full = torch.broadcast_shapes(inner.shape[:-2], batch)
        flat = inner.expand(*full, *inner.shape[-2:]).reshape(-1, *inner.shape[-2:])
        sets = torch.arange(batch.numel(), device=x.device).reshape(batch).expand(full).reshape(-1)
        pieces, places = [], []
        for i in range(batch.numel()):
            place = (sets == i).nonzero().squeeze(-1)
            if place.numel() == 0:
                continue
            pieces.append(torch.stack([answer(i * k + output, flat[place]) for output in range(k)], 1))
            places.append(place)
        if not pieces:  # an empty batch axis: nothing was asked
            event = answer(0, flat.new_zeros(1, *flat.shape[1:])).shape[1:]
            return flat.new_zeros(*full, k, *event)
        whole = torch.cat(pieces)[torch.cat(places).argsort()]
        return whole.reshape(*full, *whole.shape[1:])

    def _moments(self, problem: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of f, both (s)."""
        mean = self._mean(problem, points)
        params = self._kernel_values(problem)
        prior = self._model.kernel.diagonal(points, params)
        if self._config.variance_samples is not None:
            return mean, torch.maximum(self._sampled_variance(problem, points), _EPS * prior.detach())
        explained = torch.cat([self._explained(problem, part) for part in points.split(self._columns())])
        return mean, torch.maximum(prior - explained, _EPS * prior.detach())  # at least what cancellation leaves

    def _mean(self, problem: int, points: Tensor) -> Tensor:
        update = self._against(problem, points, self._states[problem].alpha.unsqueeze(-1)).squeeze(-1)
        return update + self._prior_mean(problem, points)

    def _prior_mean(self, problem: int, points: Tensor) -> Tensor:
        """m at the points (s), or () where it is a constant."""
        constant = self._constant.reshape(-1)[problem]
        return self._model.mean_at(points, self._problem_values(problem), constant)

    def _sampled_variance(self, problem: int, points: Tensor) -> Tensor:
        """Mean square (s) of pathwise draws about the posterior mean, the same draws for all points."""
        if problem not in self._deviations:
            self._deviations[problem] = self._centred_draws(problem)
        drawn = self._deviations[problem]
        num = sum(weights.shape[-1] for _, weights in drawn)

        def total(part: Tensor) -> Tensor:
            squares = torch.zeros_like(part[:, 0])
            for f, w in drawn:
                values = evaluate(f, part, w.shape[-1] * NUM_FEATURES) + self._against(problem, part, w)
                squares = squares + values.square().sum(-1)
            return squares

        return torch.cat([total(part) for part in points.split(_POINTS)]) / num

    def _centred_draws(self, problem: int) -> list[tuple[Functions, Tensor]]:
        """`variance_samples` draws about the mean; a pathwise fit's own draws go first, from where its solves ended.

        Those are kept all, also where fewer are asked for.
        """
        state, wanted = self._states[problem], self._config.variance_samples
        reused = state.first.shape[-1]
        # the stream that a fit takes its draws from, so that these are the same functions
        g = torch.Generator(state.x.device).manual_seed(self._seed + 1 if reused else self._seed)
        drawn = []
        if reused:
            drawn.append(self._function(problem, reused, NUM_FEATURES, g, centred=True, start=-state.first))
        if wanted > reused:
            drawn.append(self._function(problem, wanted - reused, NUM_FEATURES, g, centred=True))
        return drawn

    def _explained(self, problem: int, points: Tensor) -> Tensor:
        """k' A^{-1} k (s), differentiable once in the points."""
        k = self._cross(problem, points)
        solved = self._solve(problem, k.detach(), self._config.variance_tolerance)
        w = solved.solution
        # d (k' A^{-1} k) = 2 w' dk, and the value in the form whose error is of second order
        value = (w * (k.detach() + solved.remainder)).sum(0)
        return value + 2.0 * ((k - k.detach()) * w).sum(0) if k.requires_grad else value

    def _joint(self, problem: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (s) and a root (s s) of the covariance of f."""
        mean = self._mean(problem, points)
        k = self._cross(problem, points)
        covariance = self._model.kernel(points, params=self._kernel_values(problem))
        for part in torch.arange(points.shape[0], device=points.device).split(self._columns()):
            solved = self._solve(problem, k[:, part].detach(), self._config.tolerance)
            step = k.mT @ solved.solution
            covariance = covariance - torch.zeros_like(covariance).index_copy(1, part, step)
        return mean, _root(0.5 * (covariance + covariance.mT))

    def _function(
        self,
        problem: int,
        num: int,
        num_features: int,
        g: torch.Generator,
        *,
        centred: bool = False,
        start: Tensor | None = None,
    ) -> tuple[Functions, Tensor]:
        """A prior function for each draw, and the weights (n num) of its exact update; `centred`: without the mean."""
        state, kernel = self._states[problem], self._model.kernel
        params, noise = self._kernel_values(problem), self._noise(problem)
        prior, z = prior_draws(kernel, params, noise, state.x, num, g, num_features=num_features)
        gap = -z if centred else state.residual.unsqueeze(-1) - z
        tolerance = self._config.variance_tolerance if centred else self._config.tolerance
        parts = gap.split(self._columns(), -1)
        starts = [None] * len(parts) if start is None else start.split(self._columns(), -1)
        pairs = zip(parts, starts, strict=True)
        weights = [self._solve(problem, part, tolerance, begin).solution for part, begin in pairs]
        return prior, torch.cat(weights, -1)

    def _against(self, problem: int, points: Tensor, weights: Tensor) -> Tensor:
        """k(points, X) @ weights (s t), differentiable in the points."""
        state, params = self._states[problem], self._kernel_values(problem)
        if points.requires_grad:
            return self._model.kernel(points, state.x, params) @ weights
        return cross_product(tiles_of(self._model.kernel, params), points, state.x, weights)

    def _cross(self, problem: int, points: Tensor) -> Tensor:
        """k(X, points) (n s)."""
        state, params = self._states[problem], self._kernel_values(problem)
        if points.requires_grad:
            return self._model.kernel(state.x, points, params)
        return cross_covariance(tiles_of(self._model.kernel, params), state.x, points)

    def _solve(self, problem: int, b: Tensor, tolerance: float, start: Tensor | None = None) -> ops.CGResult:
        with torch.no_grad():
            solved = self._system(problem).solve(b, tolerance, start)
        if not bool(solved.converged.all()):
            message = (
                f"{type(self).__name__}: {int((~solved.converged).sum())} of {b.shape[-1]} solves ended at a relative "
                f"residual of up to {float(solved.residual.max()):.1e}, above {tolerance:.1e}; raise rank or "
                "max_iterations of the SolverConfig"
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=4)
        return solved

    def _system(self, problem: int) -> LinearSystem:
        if problem not in self._systems:
            state = self._states[problem]
            tiles = tiles_of(self._model.kernel, self._kernel_values(problem))
            self._systems.clear()  # one preconditioner at a time: it is the largest thing here
            self._systems[problem] = linear_system(
                tiles, state.x, self._noise(problem), self._config, pivots=state.pivots
            )
        return self._systems[problem]

    def _columns(self) -> int:
        """How many right-hand sides go together: as many as half the memory budget holds, 1024 at most."""
        n = self._states[0].x.shape[0]
        return max(1, min(1024, self._memory // (2 * 8 * n * 12)))

    def _problem_values(self, problem: int) -> dict[str, Tensor]:
        axes = self._constant.ndim
        return {name: v.reshape(-1, *v.shape[axes:])[problem] for name, v in self._values.items()}

    def _kernel_values(self, problem: int) -> dict[str, Tensor]:
        return self._model.kernel_values(self._problem_values(problem))

    def _noise(self, problem: int) -> Tensor:
        return self._values["noise_variance"].reshape(-1)[problem]

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"value.{name}": v for name, v in self._values.items()} | {"constant": self._constant}
        for i, state in enumerate(self._states):
            tensors |= {f"{name}.{i}": getattr(state, name) for name in ("alpha", "residual", "first")}
            tensors |= {f"pivots.{i}.{name}": v for name, v in state.pivots._asdict().items()}
        settings = {name: getattr(self._config, name) for name in SolverConfig.__dataclass_fields__}
        return tensors, {"solver": settings, "solver_seed": self._seed, "solver_memory": self._memory}

    @classmethod
    def _from_parts(
        cls, shared: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]
    ) -> MatrixFreeGPPosterior:
        values = {name.removeprefix("value."): v for name, v in tensors.items() if name.startswith("value.")}
        states = []
        for i, (x, _) in enumerate(problems_of(shared["data"], shared["units"])):
            pivots = ops.Pivots(*(tensors[f"pivots.{i}.{name}"] for name in ops.Pivots._fields))
            residual, alpha, first = (tensors[f"{name}.{i}"] for name in ("residual", "alpha", "first"))
            states.append(MatrixFreeState(x, residual, alpha, pivots, first))
        return cls(
            **shared,
            values=values,
            constant=tensors["constant"],
            states=tuple(states),
            config=SolverConfig(**record["solver"]),
            seed=int(record["solver_seed"]),
            memory=int(record["solver_memory"]),
        )

    def _arviz_groups(self) -> dict[str, Any]:
        y = self._data.y if self._data.has_outputs else self._data.y.squeeze(-1)
        draws = torch.stack([self.functions(1, seed=i)(self._data.x)[0] for i in range(100)]).unsqueeze(0)
        noise = self._values["noise_variance"].sqrt() * self._units.y_scale.squeeze(-2)
        log_likelihood = torch.distributions.Normal(draws, self._squeeze(noise.unsqueeze(-2)).to(draws)).log_prob(y)
        return {"posterior": {"f": draws}, "observed_data": {"y": y}, "log_likelihood": {"y": log_likelihood}}
