r"""The shipped network `bo`: objectives of Bayesian optimisation in one to eight dimensions, by the HEBO+ prior.

    bayesdl pretrain --prior benchmarks/recipes/bo.py --out bayesdl/amortized/weights/bo.safetensors

It is judged on the way against the exact posterior predictive, with hyper-parameters and ignored columns integrated
out:

    p(y | x, D) = sum_S p(S | D) p(y | x, D, S),    p(S | D) ~ p(S) p(D | S),    S the set of columns that matter

The sum is over all sets; for each, `importance` gives the evidence and draws of the hyper-parameters.
"""

import functools
import itertools
import math
from collections.abc import Mapping

import torch
from importance import Weighted, integrate, laws_of, matern32
from torch import Tensor
from torch.distributions import Distribution

from bayesdl.amortized import Architecture, Pretrained, ReferenceGap, Schedule
from bayesdl.priors.tasks import HEBOPlus

prior = HEBOPlus(inputs="mixed", by_dimension=True)
architecture = Architecture(
    max_inputs=8, head="kernel", kernel="matern-3/2", outputs=6, refinements=2, width=64, num_layers=3, hidden=128,
    num_conditions=1,
)  # fmt: skip
schedule = Schedule(
    num_steps=16_000, batch=16, n_max=100, num_queries=32, context="uniform", learning_rate=2e-3, decay="linear",
    decay_share=0.4, appended_share=0.0, targets="expected",
)  # fmt: skip
card = {"name": "bo", "licence": "Apache-2.0"}


def sets_that_matter(d: int) -> dict[tuple[int, ...], float]:
    """p(S): each column is ignored with probability `unused`, and where all would be, one at random stays."""
    q = prior.unused
    found = {}
    for k in range(1, d + 1):
        for columns in itertools.combinations(range(d), k):
            found[columns] = (1 - q) ** k * q ** (d - k) + (q**d / d if k == 1 else 0.0)
    return found


def draws(x: Tensor, y: Tensor, xs: Tensor, seed: int = 0, num_draws: int = 200) -> Weighted:
    """Weighted draws of the hyper-parameters for all sets of columns together."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for columns, probability in sets_that_matter(x.shape[-1]).items():
        laws = laws_of(prior.kernel_for(len(columns)), prior.noise_variance, len(columns))
        found = integrate(x[..., columns], y, xs[..., columns], laws, matern32, generator, num_draws=num_draws)
        parts.append(found._replace(log_weight=found.log_weight + math.log(probability)))
    return Weighted(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))


def exact(x: Tensor, y: Tensor, xs: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
    """The posterior predictive."""
    return draws(x, y, xs).predictive()


@functools.cache
def reference() -> ReferenceGap:
    """A hundred tasks of two inputs for each of a few context sizes; half a minute, once."""
    return ReferenceGap(prior, exact, (1, 5, 20, 60), d=2, num_tasks=100)


def evaluate(trained: Pretrained) -> dict[str, float]:
    """Gaps to the exact predictive, in nats."""
    return reference()(trained)
