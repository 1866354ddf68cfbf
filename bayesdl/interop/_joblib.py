"""Jobs through joblib where the user has set a backend, and in this process, one after another, where not.

    with joblib.parallel_config("loky", n_jobs=4):       # "threading", or "dask" and "ray" on a cluster
        study.ask()

What a job computes does not depend on where it runs: no job draws random numbers from a global state.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from botorch.acquisition import AcquisitionFunction

Result = TypeVar("Result")


def num_workers() -> int:
    """Jobs at a time under `joblib.parallel_config`; 1 where the user has set none."""
    import joblib

    return int(joblib.effective_n_jobs(None))


def run_jobs(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of all jobs, in order, from the backend that the user has set.

    A backend of processes or machines sends each job with all that it holds, by cloudpickle, and brings back what it
    warned of; threads warn by themselves.
    """
    if len(jobs) < 2 or num_workers() == 1:
        return [job() for job in jobs]
    import joblib
    from joblib.parallel import get_active_backend

    if getattr(get_active_backend()[0], "supports_sharedmem", False):
        return list(joblib.Parallel()(joblib.delayed(job)() for job in jobs))
    results = []
    for result, warned in joblib.Parallel()(joblib.delayed(_with_warnings)(job) for job in jobs):
        for message, category in warned:
            warnings.warn(message, category, stacklevel=2)
        results.append(result)
    return results


def _with_warnings(job: Callable[[], Result]) -> tuple[Result, list[tuple[str, type[Warning]]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = job()
    return result, [(str(one.message), one.category) for one in caught]


def restarts() -> dict[str, Any]:
    """Keywords for BoTorch's `optimize_acqf`, by which the searches of an acquisition are spread over the workers.

    Starting points are drawn, and the best result is chosen, here; the searches do not know of each other. Empty where
    there is one worker.
    """
    return {"gen_candidates": _spread} if num_workers() > 1 else {}


def _spread(
    initial_conditions: Tensor,
    acquisition_function: AcquisitionFunction,
    lower_bounds: Tensor | None = None,
    upper_bounds: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    fixed_features: Mapping[int, float | Tensor] | None = None,
    timeout_sec: float | None = None,
    **constraints: Any,
) -> tuple[Tensor, Tensor]:
    """BoTorch's `gen_candidates_scipy`, a share of the starting points (b q d) to each worker."""
    from botorch.generation.gen import gen_candidates_scipy

    num, jobs = len(initial_conditions), []
    for rows in torch.arange(num).tensor_split(min(num, num_workers())):
        own = {
            column: value[rows] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == num else value
            for column, value in (fixed_features or {}).items()
        }
        search = functools.partial(gen_candidates_scipy, lower_bounds=lower_bounds, upper_bounds=upper_bounds)
        settings = {"options": dict(options or {}), "fixed_features": own, "timeout_sec": timeout_sec, **constraints}
        jobs.append(functools.partial(search, initial_conditions[rows], acquisition_function, **settings))
    points, values = zip(*run_jobs(jobs), strict=True)
    return torch.cat(points), torch.cat([value.reshape(-1) for value in values])
