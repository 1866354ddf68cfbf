# %% [markdown]
# # How would you know that a sampler has not arrived?
#
# Six samplers on one density that everybody finds hard, Neal's funnel, and the diagnostics that give it away. Then the
# same samplers where they are at home: a Pyro model as its author wrote it, the hyper-parameters of a Gaussian process,
# and the weights of a network.
#
# The answer: the draws look fine, and the trace looks fine. What tells is the energy: chains that cannot enter the
# neck of the funnel diverge there, move through energies too slowly (E-BFMI), and disagree about its width (R-hat).
# The cure is another parametrisation, not more draws.
#
# The pictures go to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them; the conclusions stay the same, the numbers do not.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
NUM_CHAINS = 16
NUM_WARMUP = 100 if QUICK else 300
NUM_DRAWS = 100 if QUICK else 300
STEPS = 100 if QUICK else 1000
DEPTH, LONGEST = (4, 12) if QUICK else (6, 32)
L = 10 if QUICK else 80

# %% [markdown]
# ## A density that is hard
# Neal's funnel: v ~ N(0, 3), and nine coordinates x_i ~ N(0, exp(v / 2)). The truth about v is known: a normal of
# standard deviation 3. Where v is small the x_i live in a neck a thousand times narrower than the mouth, and no step
# size suits both.


# %%
def funnel(q: torch.Tensor) -> torch.Tensor:
    """(chains, 10) -> (chains,); the first coordinate is v."""
    v, x = q[..., 0], q[..., 1:]
    return -0.5 * (v / 3).square() - 0.5 * x.square().sum(-1) * (-v).exp() - 0.5 * x.shape[-1] * v


def straight(q: torch.Tensor) -> torch.Tensor:
    """The same belief in coordinates that do not depend on each other: x_i = exp(v / 2) z_i."""
    return -0.5 * (q[..., 0] / 3).square() - 0.5 * q[..., 1:].square().sum(-1)


def quietly(*args, **settings) -> bdl.inference.sample.Chains:
    """`bdl.sample` without its warning, which the table below spells out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bdl.errors.ConvergenceWarning)
        return bdl.sample(*args, num_chains=NUM_CHAINS, num_warmup=NUM_WARMUP, num_draws=NUM_DRAWS, seed=1, **settings)


runs = {
    "HMC": quietly(funnel, 10, "hmc"),
    "NUTS": quietly(funnel, 10, "nuts", max_depth=DEPTH),
    "ChEES": quietly(funnel, 10, "chees", num_steps=LONGEST),
    "NUTS, straightened": quietly(straight, 10, "nuts"),
}


# %%
def row(chains: bdl.inference.sample.Chains) -> dict[str, float]:
    """The width of v, whose truth is 3, and what the diagnostics say."""
    told = chains.diagnostics
    return {
        "sd of v": chains.draws[..., 0].std().item(),
        "lowest v": chains.draws[..., 0].min().item(),
        "R-hat": told["rhat"],
        "ESS": told["ess_bulk"],
        "E-BFMI": min(told["e_bfmi"]),
        "divergences": told["divergences"],
        "gradients": told["num_gradients"],
    }


table = pd.DataFrame.from_dict({name: row(chains) for name, chains in runs.items()}, orient="index")
print(table.round(2).to_string())

# %% [markdown]
# One picture: where the draws are. The line is where 99 % of the truth lies. Below, the marginal of v.


# %%
def show(figure: Figure, name: str) -> None:
    """Save a figure, and show it in place in a notebook. pyplot and its global state stay out of it."""
    folder = os.environ.get("BAYESDL_FIGURES")
    if folder is None and not QUICK:
        folder = str(Path(__file__).parent / "figures") if "__file__" in globals() else "figures"
    if folder is None:
        figure.draw_without_rendering()
        return
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    print(f"picture: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


COLOURS = ("#0072B2", "#009E73", "#CC79A7")  # Okabe and Ito: told apart with any kind of colour blindness
INK, MUTED = "#222222", "#666666"


def tidy(ax: Axes, title: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=MUTED, labelsize=9.5)
    ax.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)


def cloud(ax: Axes, chains: bdl.inference.sample.Chains, colour: str) -> None:
    """Draws of (x_1, v) in the funnel's own coordinates, those after a divergence marked."""
    v, x = chains.draws[..., 0], chains.draws[..., 1]
    diverging = chains.stats["diverging"]
    ax.plot(x[~diverging], v[~diverging], ".", color=colour, markersize=1.5, alpha=0.5)
    ax.plot(x[diverging], v[diverging], "x", color=INK, markersize=5, label="after a divergence")
    height = np.linspace(-10, 10, 200)
    for sign in (-1, 1):
        ax.plot(sign * 2.58 * np.exp(height / 2), height, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    ax.set_xlim(-40, 40)
    ax.set_ylim(-10, 10)
    ax.set_xlabel("$x_1$", color=MUTED)


figure = Figure(figsize=(10, 6.2), layout="constrained")
axes = figure.subplots(2, 3, sharex="row", height_ratios=(2, 1))
back = runs["NUTS, straightened"]
scaled = torch.cat([back.draws[..., :1], back.draws[..., 1:] * (back.draws[..., :1] / 2).exp()], -1)
shown = {
    "HMC": runs["HMC"],
    "NUTS": runs["NUTS"],
    "NUTS, straightened": dataclasses.replace(back, draws=scaled),
}
grid = np.linspace(-10, 10, 200)
for (upper, lower), colour, (name, chains) in zip(axes.T, COLOURS, shown.items(), strict=True):
    cloud(upper, chains, colour)
    tidy(upper, name)
    lower.hist(chains.draws[..., 0].flatten(), 50, (-10, 10), density=True, color=colour, alpha=0.6)
    lower.plot(grid, np.exp(-0.5 * (grid / 3) ** 2) / (3 * np.sqrt(2 * np.pi)), color=INK, linewidth=1.3, label="truth")
    tidy(lower, f"lowest v {chains.draws[..., 0].min():.1f}, R-hat {chains.diagnostics['rhat']:.2f}")
    lower.set_xlabel("v", color=MUTED)
axes[0, 0].set_ylabel("v", color=MUTED)
axes[0, 0].legend(frameon=False, fontsize=9, loc="lower right")
axes[1, 0].legend(frameon=False, fontsize=9)
show(figure, "funnel")

# %% [markdown]
# ## Which sampler?
# Where a density is well behaved all of them agree, and the question is what a good draw costs. `hmc` needs a length,
# `nuts` finds one for each trajectory, `chees` learns one for all chains, `mams` moves at constant speed and corrects
# with an accept step; `mclmc` leaves that step out and is biased, which it reports; `smc` comes from the prior through
# a ladder of temperatures and brings the log evidence.

# %%
covariance = 0.9 * torch.ones(8, 8, dtype=torch.float64) + 0.1 * torch.eye(8, dtype=torch.float64)
precision = torch.linalg.inv(covariance)


def correlated(q: torch.Tensor) -> torch.Tensor:
    """A normal with correlations of 0.9 and variances of 1."""
    return -0.5 * ((q @ precision) * q).sum(-1)


print(f"{'':<8}{'sd (1)':>8}{'ESS':>8}{'gradients per chain':>22}")
agree = {}
for name in ("hmc", "nuts", "chees", "mams", "mclmc", "smc"):
    chains = quietly(correlated, 8, name)
    agree[name] = chains.draws.std((0, 1)).mean().item()
    told = chains.diagnostics
    print(f"{name:<8}{agree[name]:8.2f}{told['ess_bulk']:8.0f}{told['num_gradients']:22.0f}")
log_evidence = float(chains.log_evidence)  # of the last one, smc
truth = 4 * np.log(2 * np.pi) + 0.5 * torch.logdet(covariance).item()
print(f"log evidence by SMC {log_evidence:.2f}, the truth {truth:.2f}")

# %% [markdown]
# ## A Pyro model as it stands
# Constraints, plates and names are the model's own; the draws come back in its space. The eight schools: how much does
# coaching raise a test score, when every school has its own effect and the schools have something in common?

# %%
effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def schools(y: torch.Tensor, sigma: torch.Tensor) -> None:
    """Non-centred, by Pyro's own reparametrisation of z."""
    zero = torch.zeros((), dtype=y.dtype)
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("school", len(y)):
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


density = bdl.LogDensity.from_pyro(schools, effects, errors)
chains = bdl.sample(density, sampler="nuts", num_chains=NUM_CHAINS, num_warmup=NUM_WARMUP, num_draws=NUM_DRAWS, seed=2)
for name in ("mu", "tau"):
    print(f"{name:<4} mean {chains.values[name].mean():.2f}, sd {chains.values[name].std():.2f}")
print(f"R-hat {chains.diagnostics['rhat']:.3f}, {chains.diagnostics['divergences']} divergences")
tree = chains.to_arviz()
print("groups for ArviZ:", ", ".join(tree.children))

# %% [markdown]
# ## Hyper-parameters of a GP
# `ExactGP` takes the best lengthscale and noise as if they were known. `NUTS` on the same model takes all of them, each
# for what it is worth. With eight points the two differ, and the second is wider where it should be.

# %%
few = bdl.datasets.noisy_sine_with_gap(n=8, noise_scale=0.2, seed=5)
at = torch.linspace(-4, 4, 81, dtype=torch.float64).unsqueeze(-1)
gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)))
best = bdl.ExactGP(gp).fit(few.x, few.y, seed=0)
everything = bdl.NUTS(gp, num_chains=4, num_warmup=NUM_WARMUP // 2, num_draws=NUM_DRAWS // 2).fit(few.x, few.y, seed=0)
widths = {
    name: (p.predict(at).quantile(0.95) - p.predict(at).quantile(0.05)).mean().item()
    for name, p in {"best hyper-parameters": best, "all of them": everything}.items()
}
for name, width in widths.items():
    print(f"mean width of the 90 % interval, {name:<22}{width:.2f}")

# %% [markdown]
# ## Weights of a network
# The same names are engines for networks. Chains are judged on function values, since weights are not identified.
# `collapse=True` integrates the output layer out of the chains and draws it from its exact law afterwards: the same
# posterior, longer steps.
# Where all of the data in every step is too much, three samplers go by minibatches. They never reject a step, so what
# they give is biased, and a short run like this one is also not mixed: the last column says how wide their belief about
# f is at the data, against HMC's.

# %%
data = bdl.datasets.noisy_sine_with_gap(n=60, noise_scale=0.2, seed=2)
bnn = bdl.BNN(hidden=(6,), activation="tanh", prior=bdl.priors.Normal(scale=3.0))
engines = [
    ("HMC", bdl.HMC(bnn, num_chains=8, num_warmup=3 * L, num_draws=3 * L, num_steps=LONGEST)),
    ("HMC, collapsed", bdl.HMC(bnn, 8, num_warmup=3 * L, num_draws=3 * L, num_steps=LONGEST, collapse=True)),
    ("NUTS", bdl.NUTS(bnn, num_chains=8, num_warmup=L, num_draws=L, max_depth=DEPTH)),
    ("ChEES", bdl.ChEES(bnn, num_chains=16, num_warmup=L, num_draws=L, max_steps=LONGEST)),
    ("MAMS", bdl.MAMS(bnn, num_chains=16, num_warmup=L, num_draws=L, max_steps=LONGEST)),
    ("MEADS", bdl.MEADS(bnn, num_chains=32, num_warmup=10 * L, num_draws=L, thin=10)),
    ("MCLMC", bdl.MCLMC(bnn, num_chains=16, num_warmup=10 * L, num_draws=L, thin=10)),
    ("SMC", bdl.SMC(bnn, num_particles=max(L, 16), num_islands=4)),
    ("SGHMC", bdl.SGHMC(bnn, num_warmup=STEPS, num_draws=50, thin=STEPS // 50, batch_size=30)),
    ("SGLD", bdl.SGLD(bnn, num_warmup=STEPS, num_draws=50, thin=STEPS // 50, batch_size=30)),
    ("CyclicalSGMCMC", bdl.CyclicalSGMCMC(bnn, 4, STEPS, 4, STEPS // 4, 12, batch_size=30)),
]
print(f"{'':<16}{'R-hat':>7}{'ESS':>6}{'gradients':>11}{'width':>7}")
found: dict[str, float] = {}
for name, engine in engines:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bdl.errors.ConvergenceWarning)
        fitted = engine.fit(data.x, data.y, seed=0)
    width, told = fitted.predict(data.x, noise=False).stddev.mean().item(), fitted.diagnostics
    found[name] = width
    print(
        f"{name:<16}{told['rhat']:7.2f}{told['ess_bulk']:6.0f}{told['num_gradients']:11.0f}{width / found['HMC']:7.2f}"
    )

# %% [markdown]
# ## A run that was killed
# With `checkpoint` a run writes where it stands every few seconds. Started again it goes on from there, and its draws
# are those of a run that nobody disturbed, bit for bit. A run that is found finished is read, not run.

# %%
with tempfile.TemporaryDirectory() as folder:
    first, second = (quietly(correlated, 8, "nuts", checkpoint=str(Path(folder) / "run")) for _ in range(2))
print(f"the same draws: {torch.equal(first.draws, second.draws)}")

# %% [markdown]
# ## Where it fails
# Everything above that converged did so because its density has one mode that chains reach from everywhere. Two modes
# far apart are never crossed by any of these but `smc`, and R-hat sees it only if chains start in both.


# %%
def two_modes(q: torch.Tensor) -> torch.Tensor:
    """Normals of width 1 at -10 and 10, with weights 0.3 and 0.7."""
    weights = torch.tensor([0.3, 0.7], dtype=q.dtype).log()
    return torch.logsumexp(weights - 0.5 * (q - torch.tensor([-10.0, 10.0], dtype=q.dtype)).square(), -1)


one_side = quietly(two_modes, 1, "nuts", initial=torch.full((NUM_CHAINS, 1), 9.0, dtype=torch.float64))
print(f"NUTS from one side: mean {one_side.draws.mean():.2f}, R-hat {one_side.diagnostics['rhat']:.3f}; the truth is 4")

# %% [markdown]
# ## Exercises
# 1. Give the funnel's NUTS ten times as many draws, then `target_accept=0.98`. Which columns of the table change?
# 2. Write the eight schools centred (`theta ~ Normal(mu, tau)`) and look for the funnel in it.
# 3. `az.loo(tree)` of arviz-stats judges the schools' model. Which school is hardest to predict?
# 4. Run `hmc` on the correlated normal with `metric="dense"`. Where do the gradients go?
#
# ## References
# - Neal (2003), *Slice sampling*: the funnel. Neal (2011), arXiv 1206.1901: Hamiltonian dynamics.
# - Hoffman and Gelman (2014), arXiv 1111.4246; Betancourt (2017), arXiv 1701.02434: NUTS, divergences, E-BFMI.
# - Hoffman, Radul, Sountsov (2021), *An adaptive MCMC scheme for setting trajectory lengths*: ChEES.
# - Robnik et al. (2023), arXiv 2212.08549, and (2025), arXiv 2503.01707: microcanonical samplers.
# - Vehtari et al. (2021), arXiv 1903.08008: rank-normalised R-hat and effective sample sizes.
#
# ## What this tutorial claims, checked

# %%
hard = table.drop(index="NUTS, straightened")
# Nobody reaches the truth in the funnel's own coordinates, and something always tells.
assert ((hard["R-hat"] > 1.05) | (hard["divergences"] > 0) | (hard["E-BFMI"] < 0.3) | (hard["ESS"] < 100)).all()
assert abs(table.loc["NUTS, straightened", "sd of v"] - 3) < 0.3
assert table.loc["NUTS, straightened", "divergences"] == 0
# On a density without trouble all agree.
assert all(abs(sd - 1) < 0.15 for sd in agree.values())
assert abs(log_evidence - truth) < 0.3
# The eight schools, as everybody finds them.
assert abs(chains.values["mu"].mean() - 4.4) < 0.7
assert torch.equal(first.draws, second.draws)
# Hyper-parameters that are not known make intervals wider.
assert widths["all of them"] > widths["best hyper-parameters"]
