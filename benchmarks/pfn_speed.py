"""The network `gp` beside fits of Gaussian processes: CPU seconds for many data sets, in one run on one thread.

- `datasets`: 1000 data sets of 50 points and 3 inputs, mean and variance at 100 places each, by the network (reading
  the context and predicting; with products in float32, and in bfloat16), by `ExactGP` with all data sets in one batch,
  by BoTorch's `SingleTaskGP` fitted and asked one after another, and by NUTS over the hyper-parameters, ours in batches
  and Pyro's one after another (100 transitions of warm-up and 100 draws, one chain, predictions mixed over 50 draws).
  BoTorch and our NUTS take the first 200 of the data sets, Pyro 3, and their times are scaled up: the column
  `measured` says so.
- `query`: one query of a network that has read 100 points, and 1000 queries.
- `dense`: a forward pass of 100 points and 1000 queries by a transformer whose queries are tokens (four layers of width
  128; time does not depend on its weights), and the same in one sequence under a dense mask.

The mean negative log density of held-out targets stands beside the times, in nats.

    python benchmarks/pfn_speed.py --out benchmarks/results/pfn_speed.csv
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from pfn_mimicry import recipe
from pfn_optimizers import TRANSFORMER
from torch import Tensor
from torch.distributions import MixtureSameFamily, Normal
from torch.nn import functional

import bayesdl as bdl
from bayesdl.amortized import Network

NUM_DATASETS, NUM_POINTS, NUM_QUERIES, NUM_COLUMNS = 1000, 50, 100, 3
NUM_WARMUP, NUM_DRAWS, NUM_MIXED = 100, 100, 50
Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, y, queries, their targets -> log densities


def by_network(engine: Any) -> Score:
    """Read every context in one batch, predict in one batch."""

    def run(x: Tensor, y: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
        predictive = engine.fit(x.float(), y.float()).predict(queries.float())
        _ = predictive.mean, predictive.variance
        return predictive.log_prob(targets.float())

    return run


def by_exact_gp(model: Any) -> Score:
    """Our own maximum a posteriori fits, all in one batch."""

    def run(x: Tensor, y: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
        return bdl.ExactGP(model, num_starts=1).fit(x, y).predict(queries).log_prob(targets)

    return run


def by_nuts(model: Any) -> Score:
    """Our NUTS over the hyper-parameters, all in one batch."""

    def run(x: Tensor, y: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
        lengths = {"num_warmup": NUM_WARMUP, "num_draws": NUM_DRAWS, "num_predictive": NUM_MIXED}
        posterior = bdl.NUTS(model, num_chains=1, standardize=False, **lengths).fit(x, y)
        return posterior.predict(queries).log_prob(targets)

    return run


def by_botorch(x: Tensor, y: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
    """One SingleTaskGP after another, as its users fit them."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    found = []
    for one in range(len(x)):
        model = SingleTaskGP(x[one], y[one].unsqueeze(-1))
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        with torch.no_grad():
            answer = model.posterior(queries[one], observation_noise=True)
            law = Normal(answer.mean.squeeze(-1), answer.variance.squeeze(-1).sqrt())
        found.append(law.log_prob(targets[one]))
    return torch.stack(found)


def by_pyro(x: Tensor, y: Tensor, queries: Tensor, targets: Tensor) -> Tensor:
    """Pyro's NUTS on the same model, written as a Pyro user would: Cholesky inside the model, autograd through it."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import MCMC, NUTS

    prior = recipe("gp").prior
    stretch = NUM_COLUMNS**0.5

    def kernel(a: Tensor, b: Tensor, lengthscale: Tensor, outputscale: Tensor) -> Tensor:
        square = (((a.unsqueeze(-2) - b.unsqueeze(-3)) / lengthscale) ** 2).sum(-1)
        r = (5 * square + 1e-20).sqrt()
        return outputscale * (1 + r + r**2 / 3) * (-r).exp()

    found = []
    for one in range(len(x)):

        def model(inputs: Tensor = x[one], observed: Tensor = y[one]) -> None:
            law = prior.lengthscale
            scaled = dist.LogNormal(law.loc + torch.tensor(stretch).log().item(), law.scale)
            lengthscale = pyro.sample("lengthscale", scaled.expand([NUM_COLUMNS]).to_event(1))
            outputscale = pyro.sample("outputscale", dist.LogNormal(prior.outputscale.loc, prior.outputscale.scale))
            noise = pyro.sample("noise", dist.LogNormal(prior.noise_variance.loc, prior.noise_variance.scale))
            k = kernel(inputs, inputs, lengthscale, outputscale) + noise * torch.eye(len(inputs), dtype=inputs.dtype)
            factor = torch.linalg.cholesky(k)
            pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(observed), scale_tril=factor), obs=observed)

        pyro.set_rng_seed(0)
        chain = MCMC(NUTS(model), NUM_DRAWS, NUM_WARMUP, disable_progbar=True)
        chain.run()
        draws = chain.get_samples()
        which = torch.linspace(0, NUM_DRAWS - 1, NUM_MIXED).long()
        lengthscale = draws["lengthscale"][which].double().unsqueeze(-2).unsqueeze(-2)
        outputscale = draws["outputscale"][which].double().reshape(-1, 1, 1)
        noise = draws["noise"][which].double().reshape(-1, 1, 1)
        k = kernel(x[one], x[one], lengthscale, outputscale) + noise * torch.eye(NUM_POINTS, dtype=torch.float64)
        cross = kernel(x[one], queries[one], lengthscale, outputscale)
        factor = torch.linalg.cholesky(k)
        inner = torch.linalg.solve_triangular(factor, cross, upper=False)
        weights = torch.linalg.solve_triangular(factor, y[one].reshape(1, -1, 1).expand(len(k), -1, 1), upper=False)
        mean = (inner * weights).sum(-2)
        variance = outputscale.squeeze(-1) + noise.squeeze(-1) - inner.square().sum(-2)
        parts = Normal(mean.T, variance.T.sqrt())
        mixed = torch.distributions.Categorical(logits=torch.zeros(NUM_QUERIES, NUM_MIXED, dtype=torch.float64))
        found.append(MixtureSameFamily(mixed, parts).log_prob(targets[one]))
    return torch.stack(found)


def dataset_rows(engine: Any) -> list[dict[str, Any]]:
    """The thousand data sets by every method."""
    generator = torch.Generator().manual_seed(7)
    drawn = recipe("gp").prior.sample(NUM_DATASETS, NUM_POINTS + NUM_QUERIES, NUM_COLUMNS, generator)
    x, y = drawn.x.double(), drawn.y.double()
    prior = recipe("gp").prior
    (kernel,) = prior.kernels_for(NUM_COLUMNS)
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(prior=prior.noise_variance, lower=0.0))
    sides: list[tuple[str, int, Score]] = [
        ("network", NUM_DATASETS, by_network(engine)),
        ("network, bfloat16", NUM_DATASETS, by_network(dataclasses.replace(engine, precision="bfloat16"))),
        ("exact gp", NUM_DATASETS, by_exact_gp(model)),
        ("botorch", 200, by_botorch),
        ("nuts", 200, by_nuts(model)),
        ("pyro nuts", 3, by_pyro),
    ]
    rows: list[dict[str, Any]] = []
    networks = torch.zeros(0)
    for name, num, score in sides:
        parts = (x[:num, :NUM_POINTS], y[:num, :NUM_POINTS], x[:num, NUM_POINTS:], y[:num, NUM_POINTS:])
        score(*(part[:2] for part in parts))  # what a first call loads
        seconds = []
        for _ in range(3 if name.startswith("network") else 1):
            began = time.process_time()
            scores = score(*parts)
            seconds.append(time.process_time() - began)
        if name == "network":
            networks = scores.double()
        total = min(seconds) * NUM_DATASETS / num
        row = {"what": "datasets", "case": name, "measured": num, "seconds_of_1000": total}
        row["times_the_network"] = total / rows[0]["seconds_of_1000"] if rows else 1.0
        row["nll"] = f"{-scores.double().mean():.4f}"
        row["network_nll_on_the_same"] = f"{-networks[:num].mean():.4f}"
        rows.append(row)
        print(row, flush=True)
    return rows


def network_rows(engine: Any) -> list[dict[str, Any]]:
    """A cached query, and split attention against a dense mask."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, NUM_COLUMNS, generator=g), torch.randn(100, generator=g)
    queries = torch.randn(1000, NUM_COLUMNS, generator=g)
    posterior = engine.fit(x, y)
    rows = []
    for num in (1, 1000):
        seconds = best(lambda num=num: posterior.predict(queries[:num]))
        rows.append({"what": "query", "case": f"{num} of a context of 100, cached", "ms": 1e3 * seconds})
    network = Network(TRANSFORMER)
    for weight in network.parameters():  # a fresh network says the same everywhere, and would hide a difference
        weight.data.add_(0.02 * torch.randn(weight.shape, generator=g))
    args = (x.unsqueeze(0), y.unsqueeze(0), queries.unsqueeze(0))
    with torch.inference_mode():
        split, dense = network(*args), dense_forward(network, *args)
        difference = float((split - dense).abs().max())
        times = {"split": best(lambda: network(*args)), "dense": best(lambda: dense_forward(network, *args))}
    for name, seconds in times.items():
        row = {"what": "dense", "case": f"100 + 1000, {name}", "ms": 1e3 * seconds}
        rows.append({**row, "ratio": times["dense"] / seconds, "difference": f"{difference:.1e}"})
    return rows


def dense_forward(network: Any, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """One sequence of context and queries under a mask by which only the context is seen."""
    first = network.first[x.shape[-1] - 1].expand(len(x), 1, -1)
    state = torch.cat([first, network._tokens(x, y), network._place(queries)], -2)
    seen = torch.zeros(state.shape[-2], state.shape[-2], dtype=torch.bool)
    seen[:, : x.shape[-2] + 1] = True
    for block in network.blocks:
        query, key, value = block.project(state)
        state = block.update(state, functional.scaled_dot_product_attention(query, key, value, attn_mask=seen))
    return network.head(network.norm(state[:, x.shape[-2] + 1 :]))


def best(call: Callable[[], Any], turns: int = 30) -> float:
    """The fewest CPU seconds of a call."""
    call()
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=["datasets", "network"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    engine = bdl.PFN.from_pretrained("gp", standardize=False)
    rows = [] if args.only == "datasets" else network_rows(engine)
    for row in rows:
        print(row, flush=True)
    rows += [] if args.only == "network" else dataset_rows(engine)
    if args.out:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*columns, *describe()])
            writer.writeheader()
            for row in rows:
                shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                writer.writerow({**shown, **describe()})


if __name__ == "__main__":
    main()
