"""The shipped network `gp`: smooth functions of one to five inputs, hyper-parameters unknown.

    bayesdl pretrain --prior benchmarks/recipes/gp.py --out bayesdl/amortized/weights/gp.safetensors

It is judged on the way against the exact posterior predictive, by NUTS over the hyper-parameters, on fresh tasks.
"""

import functools
import warnings
from collections.abc import Mapping

from torch import Tensor
from torch.distributions import Distribution

import bayesdl as bdl
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
architecture = Architecture(max_inputs=5, head="mixture", outputs=10, width=128, num_layers=4, num_conditions=1)
schedule = Schedule(num_steps=30_000, batch=16, n_max=100, num_queries=32, decay="linear")
card = {"name": "gp", "licence": "Apache-2.0"}


def exact(x: Tensor, y: Tensor, xs: Tensor, latents: Mapping[str, Tensor]) -> Distribution:
    """The posterior predictive with the hyper-parameters integrated out."""
    (kernel,) = prior.kernels_for(x.shape[-1])
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(prior=prior.noise_variance, lower=0.0))
    engine = bdl.NUTS(model, num_chains=1, num_warmup=100, num_draws=100, max_depth=5, standardize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hundred draws of each of a hundred tasks
        return engine.fit(x.double(), y.double()).predict(xs.double())


@functools.cache
def reference() -> ReferenceGap:
    """A hundred tasks of two inputs for each of a few context sizes; a minute or two, once."""
    return ReferenceGap(prior, exact, (1, 5, 20, 60), d=2, num_tasks=100)


def evaluate(trained: Pretrained) -> dict[str, float]:
    """Gaps to the exact predictive, in nats."""
    return reference()(trained)
