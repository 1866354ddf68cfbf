"""Functions drawn from a posterior where BoTorch draws paths: Thompson sampling, and optima for entropy searches."""

from __future__ import annotations

from typing import Any

import torch
from botorch.generation.gen import gen_candidates_scipy
from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths
from botorch.utils.sampling import draw_sobol_samples
from torch import Tensor

from bayesdl import _checks
from bayesdl._random import Seed, child_seeds
from bayesdl.errors import ShapeError, fail
from bayesdl.interop._botorch_fused import FusedModel
from bayesdl.interop._botorch_laws import member_values
from bayesdl.interop._botorch_models import SurrogateModel
from bayesdl.posterior import Posterior


class Paths:
    """Functions drawn from posteriors, in the shapes of BoTorch's sample paths.

    Args:
        sources: Independent posteriors, the outputs of each beside those of the one before.
        sample_shape: How many, as a shape.
        seed: Of the draws. Members of a finite set come back as long as it lasts, then some of them again.
    """

    def __init__(self, sources: tuple[Posterior, ...], sample_shape: torch.Size, seed: int) -> None:
        self._sample_shape = torch.Size(sample_shape)
        num, seeds = max(1, self._sample_shape.numel()), child_seeds(seed, len(sources))
        self._drawn = [(source, source.functions(num, seed=s)) for source, s in zip(sources, seeds, strict=True)]
        self._several = sum(source._data.y.shape[-1] for source in sources) > 1

    def values(self, x: Tensor) -> Tensor:
        """Every function at its own points: x (*t, N or 1, q, d) -> (*t, N, q, m) for N functions."""
        parts = []
        for source, functions in self._drawn:
            inner = x.to(source._data.x.dtype)
            if inner.shape[-3] == 1:
                parts.append(member_values(source, functions, inner.squeeze(-3)))
            else:  # all functions at all points, of which each has its own
                every = member_values(source, functions, inner)  # (*t, N, N functions, q, m)
                parts.append(every.diagonal(dim1=-4, dim2=-3).movedim(-1, -3))
        return torch.cat(parts, -1).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """(*t, *sample_shape, n), or (*t, *sample_shape, m, n) where x has an axis of 1 for outputs before n."""
        x = x.squeeze(-3) if self._several else x
        k = len(self._sample_shape)
        x = x.reshape(*[1] * (k + 2 - x.ndim), *x.shape)
        head, own = x.shape[: x.ndim - 2 - k], x.shape[x.ndim - 2 - k : -2]
        flat = x.reshape(*head, own.numel(), *x.shape[-2:])
        values = self.values(flat).reshape(*head, *self._sample_shape, x.shape[-2], -1)
        return values.mT if self._several else values.squeeze(-1)

    def set_ensemble_as_batch(self, ensemble_as_batch: bool) -> None:
        """Nothing: no axis of these paths is an ensemble's."""


class _PathList:
    """The outputs of paths one by one, as BoTorch takes those of a list of models."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._paths(x.unsqueeze(-3)).unbind(-2)

    def set_ensemble_as_batch(self, ensemble_as_batch: bool) -> None:
        """Nothing."""


@DrawMatheronPaths.register(SurrogateModel)
def _draw_paths(model: SurrogateModel, sample_shape: torch.Size, **kwargs: Any) -> Paths:
    """Functions of the posteriors behind `model`; new ones at each call."""
    if model._observed is not None:
        raise NotImplementedError(
            "draw_matheron_paths: a model conditioned by BoTorch draws no paths.\n"
            "  fix  posterior.condition_on(x, y).to_botorch(), or fit to all data"
        )
    paths = Paths(model.sources, sample_shape, model._next_seed())
    return _PathList(paths) if isinstance(model, FusedModel) else paths


def thompson_maxima(
    posterior: Posterior,
    bounds: Tensor,
    num: int = 1,
    *,
    maximize: bool = True,
    num_raw: int = 512,
    seed: Seed = 0,
) -> tuple[Tensor, Tensor]:
    """Where functions drawn from the posterior are largest, and how large: a batch of Thompson samples.

    They are also the draws of optima that max-value and joint entropy searches take (`optimal_inputs` and
    `optimal_outputs` of `qJointEntropySearch`), for posteriors that BoTorch has no paths of.

    Args:
        posterior: Of one output.
        bounds: (2, d).
        num: Functions N, each with its own maximum. Above the number of members some come twice.
        maximize: False for smallest values.
        num_raw: Points of a Sobol sequence at which every function is evaluated; its best one is where L-BFGS starts.
        seed: Of the functions and of the points.

    Returns:
        Places (N, d) and values (N, 1).

    Cost: N num_raw values, and some tens of values and gradients of all N functions at N points.
    """
    _checks.at_least("thompson_maxima", "num", num, 1, integer=True)
    x, y = posterior._data.x, posterior._data.y
    if bounds.shape != (2, x.shape[-1]) or y.shape[-1] != 1 or x.ndim > 2:
        wanted = "bounds must have shape (2, d), and the posterior one data set and one output."
        got = f"bounds {tuple(bounds.shape)}, x {tuple(x.shape)}, y {tuple(y.shape)}"
        fail(ShapeError, "thompson_maxima", wanted, got=got, fix="torch.stack([lower, upper])")
    first, second = child_seeds(seed, 2)
    paths, sign = Paths((posterior,), torch.Size((num,)), first), 1.0 if maximize else -1.0
    raw = draw_sobol_samples(bounds, n=num_raw, q=1, seed=second % 2**31).squeeze(-2)
    with torch.no_grad():
        values = sign * paths.values(raw.unsqueeze(0)).squeeze(-1)  # (N, num_raw)
    start = raw[values.argmax(-1)].unsqueeze(-2)  # (N, 1, d)

    def height(at: Tensor) -> Tensor:
        return sign * paths.values(at).reshape(num)

    found, height_found = gen_candidates_scipy(
        start, height, bounds[0], bounds[1], options={"maxiter": 200}, use_parallel_mode=False
    )
    best = values.max(-1).values
    # a line search may end below its start
    better = (height_found >= best) & height_found.isfinite()
    place = torch.where(better[:, None], found.squeeze(-2), start.squeeze(-2)).detach()
    return place, (sign * torch.where(better, height_found, best)).detach().unsqueeze(-1)
