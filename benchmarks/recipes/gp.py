"""The shipped network `gp`: smooth functions of one to five inputs, hyper-parameters unknown.

    bayesdl pretrain --prior benchmarks/recipes/gp.py --out bayesdl/amortized/weights/gp.safetensors

It is judged on the way against the exact posterior predictive, the hyper-parameters integrated out by importance
sampling, on fresh tasks.
"""

import functools
from collections.abc import Mapping

import torch
from importance import Weighted, integrate, laws_of, matern52
from torch import Tensor
from torch.distributions import Distribution

from bayesdl.amortized import Architecture, Pretrained, ReferenceGap, Schedule
from bayesdl.hyper import LogNormal
from bayesdl.priors.tasks import HyperGP

prior = HyperGP(
    ("matern-5/2",),
    lengthscale=LogNormal(0.0, 0.7),
    outputscale=LogNormal(0.0, 0.4),
    noise_variance=LogNormal(-3.5, 1.2),
    inputs="mixed",
)
architecture = Architecture(
    max_inputs=5, head="kernel", kernel="matern-5/2", outputs=4, refinements=2, width=64, num_layers=3, hidden=128,
    num_conditions=1,
)  # fmt: skip
schedule = Schedule(
    num_steps=12_000, batch=16, n_max=100, num_queries=32, context="uniform", learning_rate=2e-3, decay="linear",
    decay_share=0.4, appended_share=0.0, targets="expected",
)  # fmt: skip
card = {"name": "gp", "licence": "Apache-2.0"}


def draws(x: Tensor, y: Tensor, xs: Tensor, seed: int = 0, num_draws: int = 200) -> Weighted:
    """Weighted draws of the hyper-parameters."""
    d = x.shape[-1]
    (kernel,) = prior.kernels_for(d)
    laws = laws_of(kernel, prior.noise_variance, d)
    return integrate(x, y, xs, laws, matern52, torch.Generator().manual_seed(seed), num_draws=num_draws)


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
