"""Pyro's, NumPyro's and BlackJAX's NUTS on the targets of `samplers.py`, with their own defaults: diagonal metric.

What JAX compiles is timed apart: everything runs once for nothing, and again with another key.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from sampler_targets import Target
from torch import Tensor


class Result(NamedTuple):
    """Draws (C, N, dim) with CPU seconds and gradients per chain, of the whole and of warm-up alone.

    Attributes:
        draws: (C, N, dim).
        seconds: Warm-up and sampling; no compilation.
        warmup_seconds: Warm-up alone.
        gradients: Per chain, the mean over chains.
        warmup_gradients: Of warm-up alone; NaN where the library does not tell.
        compile_seconds: What the first run took longer than the second.
    """

    draws: Tensor
    seconds: float
    warmup_seconds: float
    gradients: float
    warmup_gradients: float
    compile_seconds: float = 0.0


def starts(target: Target, num_chains: int, seed: int) -> Tensor:
    """Points scattered on (-2, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(num_chains, target.dim, generator=generator, dtype=torch.float64) - 2


def pyro(target: Target, num_chains: int, num_warmup: int, num_draws: int, seed: int) -> Result:
    """One chain of Pyro's NUTS on the same potential."""
    from pyro import set_rng_seed
    from pyro.infer import MCMC, NUTS

    if num_chains != 1:
        raise ValueError("Pyro runs several chains in several processes; this benchmark has one thread.")
    calls, at_draw = 0, []

    def potential(params: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return -target.log_density(params["q"].unsqueeze(0)).squeeze(0)

    def hook(kernel: object, samples: object, stage: str, i: int) -> None:
        at_draw.append((stage.lower(), time.process_time(), calls))

    set_rng_seed(seed)
    initial = {"q": starts(target, 1, seed)[0]}
    mcmc = MCMC(
        NUTS(potential_fn=potential), num_draws, num_warmup, initial_params=initial, disable_progbar=True, hook_fn=hook
    )
    began = time.process_time()
    mcmc.run()
    seconds = time.process_time() - began
    warm = [entry for entry in at_draw if entry[0].startswith("warm")][-1]
    return Result(mcmc.get_samples()["q"].unsqueeze(0), seconds, warm[1] - began, calls, warm[2])


def numpyro(target: Target, num_chains: int, num_warmup: int, num_draws: int, seed: int) -> Result:
    """NumPyro's NUTS, its chains vectorised."""
    import jax
    from numpyro.infer import MCMC, NUTS

    jax.config.update("jax_enable_x64", True)
    density = target.jax_log_density()
    initial = starts(target, num_chains, seed).numpy()
    params = jax.numpy.asarray(initial[0] if num_chains == 1 else initial)

    def timed(num_samples: int) -> tuple[float, float, Any]:
        """CPU seconds of a first and of a second run, and the second."""
        mcmc = MCMC(
            NUTS(potential_fn=lambda q: -density(q)),
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=False,
        )
        spent = []
        for key in (seed, seed + 1000):
            began = time.process_time()
            mcmc.run(jax.random.PRNGKey(key), init_params=params, extra_fields=("num_steps",))
            jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
            spent.append(time.process_time() - began)
        return spent[0], spent[1], mcmc

    _, warm, _ = timed(1)
    first, seconds, mcmc = timed(num_draws)
    draws = torch.from_numpy(np.array(mcmc.get_samples(group_by_chain=True)))
    steps = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["num_steps"])
    return Result(draws, seconds, warm, float(steps.sum(-1).mean()), float("nan"), first - seconds)


def blackjax(target: Target, num_chains: int, num_warmup: int, num_draws: int, seed: int) -> Result:
    """BlackJAX's window adaptation and NUTS, mapped over chains."""
    import blackjax as bj
    import jax

    jax.config.update("jax_enable_x64", True)
    density = target.jax_log_density()
    initial = jax.numpy.asarray(starts(target, num_chains, seed).numpy())
    adaptation = bj.window_adaptation(bj.nuts, density)

    def warm_one(key: Any, q: Any) -> tuple[Any, Any]:
        found, _ = adaptation.run(key, q, num_steps=num_warmup)
        return found.state, found.parameters

    def draw_one(key: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
        kernel = bj.nuts(density, **parameters)

        def step(state: Any, key: Any) -> tuple[Any, Any]:
            state, info = kernel.step(key, state)
            return state, (state.position, info.num_integration_steps)

        return jax.lax.scan(step, state, jax.random.split(key, num_draws))[1]

    warm_all, draw_all = jax.jit(jax.vmap(warm_one)), jax.jit(jax.vmap(draw_one))

    def once(key: int) -> tuple[float, float, Any]:
        began = time.process_time()
        warm_key, draw_key = jax.random.split(jax.random.PRNGKey(key))
        found = jax.block_until_ready(warm_all(jax.random.split(warm_key, num_chains), initial))
        warm = time.process_time() - began
        kept = jax.block_until_ready(draw_all(jax.random.split(draw_key, num_chains), *found))
        return time.process_time() - began, warm, kept

    first, _, _ = once(seed)
    seconds, warm, (positions, steps) = once(seed + 1000)
    gradients = float(np.asarray(steps).sum(-1).mean())
    return Result(torch.from_numpy(np.array(positions)), seconds, warm, gradients, float("nan"), first - seconds)


PEERS = {"pyro": pyro, "numpyro": numpyro, "blackjax": blackjax}
