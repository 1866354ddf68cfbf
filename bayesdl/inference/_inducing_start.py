"""Where a fit through inducing points begins: hyper-parameters and inducing points.

A dense fit on a few rows is a good start only where m inducing points can carry as much detail as it found. Where they
cannot, its short lengthscales and small noise leave most of the variance unexplained, and the bound there is far below
that of a smooth function under much noise. So several starts are judged by the bound itself.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bayesdl import ops
from bayesdl._random import generator
from bayesdl.inference._bounds import Collapsed, InducingProblem, inducing_sums, read_point
from bayesdl.inference._evidence import Evidence, Search, maximise_evidence

_SUBSET = 500  # rows of the dense fit
_CANDIDATES = 10_000  # rows among which inducing points are chosen, and by which starts are judged
_WARM_ROWS, _WARM_STEPS = 2000, 20
_NOISES = 12  # noise variances tried for each start, halving from the variance of the targets


def starting_vector(problem: InducingProblem, num_inducing: int, input_seed: int) -> Tensor:
    """theta and z, (P, layout.dim + m d), from the initial hyper-parameters."""
    theta = problem.layout.initial(problem.x).expand(problem.y.shape[0], -1)
    return _with_inputs(problem, theta, num_inducing, input_seed)


def best_starting_vector(problem: InducingProblem, num_inducing: int, value_seed: int, input_seed: int) -> Tensor:
    """theta and z, (P, layout.dim + m d), where the collapsed bound is highest among a few starts.

    They are the optimum of a dense GP on at most 500 rows, the initial values, and the point halfway, each at the noise
    variance that suits it best. The bound is that of at most 10 000 rows.

    Cost: two dense fits of 500 points, and six times the sums of the bound, O(n m^2).
    """
    initial = problem.layout.initial(problem.x).expand(problem.y.shape[0], -1)
    dense = _dense_optimum(problem, value_seed)
    rows = random_rows(problem.num_data, _CANDIDATES, value_seed, problem.x)
    judged = problem._replace(x=problem.x[:, rows], y=problem.y[:, rows])
    found = [
        _with_best_noise(judged, _with_inputs(problem, theta, num_inducing, input_seed))
        for theta in (dense, 0.5 * (dense + initial), initial)
    ]
    best = torch.stack([value for _, value in found]).nan_to_num(nan=-torch.inf).argmax(0)
    return torch.stack([vector for vector, _ in found])[best, torch.arange(len(best), device=best.device)]


def warm_start(problem: InducingProblem, vector: Tensor, free: Tensor, num_steps: int, seed: int) -> Tensor:
    """A few L-BFGS steps of the collapsed bound on a random subset, before minibatches of all data take over.

    Small steps of Adam take long to make up for a noise variance that is wrong by a factor of a hundred.
    """
    num_inducing = (vector.shape[-1] - problem.layout.dim) // problem.x.shape[-1]
    rows = random_rows(problem.num_data, max(_WARM_ROWS, 5 * num_inducing), seed, problem.x)
    subset = problem._replace(x=problem.x[:, rows], y=problem.y[:, rows])
    return ops.minimize_lbfgs(Collapsed(subset, free), vector, max_iterations=min(_WARM_STEPS, num_steps)).theta


def random_rows(n: int, num: int, seed: int, like: Tensor) -> Tensor:
    """At most `num` of n rows in random order, the same for every data set."""
    return torch.randperm(n, generator=generator(seed))[:num].to(like.device)


def _dense_optimum(problem: InducingProblem, seed: int) -> Tensor:
    rows = random_rows(problem.num_data, _SUBSET, seed, problem.x)
    subset = Evidence(problem.model, problem.layout, problem.x[:, rows], problem.y[:, rows])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how the start was found is no news to a reader
        return maximise_evidence(subset, Search("SparseGP", 2, 50, False), seed)[0]


def _with_inputs(problem: InducingProblem, theta: Tensor, num: int, seed: int) -> Tensor:
    return torch.cat([theta, _starting_inputs(problem, theta, num, seed).flatten(-2)], -1)


def _with_best_noise(problem: InducingProblem, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The vector at its own noise variance or the best of a grid, and the bound plus log prior (P) there."""
    everyone = torch.arange(problem.y.shape[0], device=vector.device)
    at = [p.name for p in problem.layout.parameters].index("noise_variance")
    place, noise = sum(p.size for p in problem.layout.parameters[:at]), problem.layout.parameters[at]
    with torch.no_grad():
        sums = inducing_sums(problem, read_point(problem, vector), everyone)
        halves = 0.5 ** torch.arange(_NOISES, dtype=vector.dtype, device=vector.device).unsqueeze(-1)
        grid = noise.unconstrained((problem.y.var(-1, correction=0) * halves).clamp_min(1.01 * noise.lower))
        own = vector[:, place].unsqueeze(0)
        tried = vector.repeat(len(grid) + 1, 1, 1)
        # constant targets have no variance, and the logarithm of it no use
        tried[..., place] = torch.cat([own, torch.where(grid.isfinite(), grid, own)])
        values, _ = problem.layout.unpack(tried[..., : problem.layout.dim])
        bound = ops.collapsed_bound(sums, values["noise_variance"], problem.num_data).value
        score = (bound + problem.layout.log_prior(values)[0]).nan_to_num(nan=-torch.inf)
    best = score.argmax(0)
    return tried[best, everyone], score[best, everyone]


def _starting_inputs(problem: InducingProblem, theta: Tensor, num: int, seed: int) -> Tensor:
    """z (P m d): rows of x, greedily where the prior variance given those before is largest, at random past that."""
    num = min(num, problem.num_data)
    rows = random_rows(problem.num_data, max(_CANDIDATES, 2 * num), seed, problem.x)
    everyone = torch.arange(theta.shape[0], device=theta.device)
    x = problem.inputs(everyone, rows)
    values, _ = problem.layout.unpack(theta)
    kernel, params = problem.model.kernel, problem.model.kernel_values(values)

    def column(index: Tensor) -> Tensor:
        return kernel(x, x[everyone, index].unsqueeze(-2), params).squeeze(-1)

    pivots, useful = ops.greedy_pivots(column, kernel.diagonal(x, params).expand(x.shape[:-1]), num)
    # past the numerical rank all points are alike; `rows` are in random order, so their first ones are random
    rank = useful.sum(-1, keepdim=True)
    place = torch.arange(num, device=x.device)
    chosen = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device).scatter_(-1, pivots, useful)
    others = chosen.to(torch.int8).argsort(dim=-1, stable=True)
    filled = torch.where(place < rank, pivots, others.gather(-1, (place - rank).clamp_min(0)))
    return x.gather(-2, filled.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
