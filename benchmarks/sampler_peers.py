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
    """NumPyro's NUTS kernel mapped over chains: warm-up and draws are a compiled function each.

    Not its `MCMC`, which builds and compiles its functions anew in every run.
    """
    import jax
    from numpyro.infer.hmc import hmc

    jax.config.update("jax_enable_x64", True)
    density = target.jax_log_density()
    initial = jax.numpy.asarray(starts(target, num_chains, seed).numpy())
    start, move = hmc(potential_fn=lambda q: -density(q), algo="NUTS")

    def warm_one(key: Any, q: Any) -> Any:
        state = start(q, num_warmup, rng_key=key)
        return jax.lax.fori_loop(0, num_warmup, lambda i, state: move(state), state)

    def draw_one(state: Any) -> tuple[Any, Any]:
        def step(state: Any, _: None) -> tuple[Any, Any]:
            state = move(state)
            return state, (state.z, state.num_steps)

        return jax.lax.scan(step, state, None, length=num_draws)[1]

    return _compiled_twice(jax.vmap(warm_one), jax.vmap(draw_one), initial, seed)


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

    def draw_all(keys: Any, found: Any) -> tuple[Any, Any]:
        return jax.vmap(draw_one)(keys, *found)

    def warm_and_split(keys: Any, q: Any) -> Any:
        both = jax.vmap(jax.random.split)(keys)
        return both[:, 0], jax.vmap(warm_one)(both[:, 1], q)

    return _compiled_twice(warm_and_split, lambda found: draw_all(*found), initial, seed)


def _compiled_twice(warm: Any, draw: Any, initial: Any, seed: int) -> Result:
    """The second of two runs of `draw(warm(keys, initial))`, each compiled once; the first tells what that took."""
    import jax

    warm, draw = jax.jit(warm), jax.jit(draw)

    def once(key: int) -> tuple[float, float, Any]:
        began = time.process_time()
        found = jax.block_until_ready(warm(jax.random.split(jax.random.PRNGKey(key), len(initial)), initial))
        middle = time.process_time()
        kept = jax.block_until_ready(draw(found))
        return time.process_time() - began, middle - began, kept

    first, _, _ = once(seed)
    seconds, warm_seconds, (positions, steps) = once(seed + 1000)
    gradients = float(np.asarray(steps).sum(-1).mean())
    draws = torch.from_numpy(np.array(positions))
    return Result(draws, seconds, warm_seconds, gradients, float("nan"), max(first - seconds, 0.0))


PEERS = {"pyro": pyro, "numpyro": numpyro, "blackjax": blackjax}
