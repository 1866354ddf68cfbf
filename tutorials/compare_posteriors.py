# %% [markdown]
# # Where the data stop, who still knows that it does not know?
#
# Four ways of conditioning on the same 60 points: an exact Gaussian process, a GP with the kernel of an
# infinitely wide network, a Bayesian neural network sampled by Hamiltonian Monte Carlo, and a deep ensemble of
# that same network. The data have a hole. What does each believe inside it?
#
# The answer: both GPs and HMC widen in the hole and hold the truth; the ensemble widens too little
# and misses it, though its scores among the data are close to theirs. But exactness is no insurance: HMC with
# a prior that is too stiff converges well, to a confident error.
#
# The pictures go to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them; the conclusions stay the same, the numbers do not.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
NUM_POINTS = 60
NUM_CHAINS = 8
NUM_WARMUP = 80 if QUICK else 150
NUM_DRAWS = 50 if QUICK else 100
NUM_TEST = 200 if QUICK else 500
ENSEMBLE_STEPS = 1000 if QUICK else 2000
NUM_FUNCTIONS = 200

# %% [markdown]
# ## Data
# y = sin(2x) + x/2 + noise of standard deviation 0.2, with x on [-3, 3] but never between -0.5 and 1.2. Test
# points come from the same intervals (`inside`) and from the hole (`gap`).


# %%
def noisy(x: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.randn(len(x), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return bdl.datasets.true_noisy_sine(x.squeeze(-1)) + 0.2 * noise


data = bdl.datasets.noisy_sine_with_gap(n=NUM_POINTS, noise_scale=0.2, seed=2)
grid = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64).unsqueeze(-1)
gap = torch.linspace(-0.5, 1.2, 100, dtype=torch.float64).unsqueeze(-1)
inside = bdl.datasets.noisy_sine_with_gap(n=NUM_TEST, noise_scale=0.2, seed=1)
truth_on_grid = bdl.datasets.true_noisy_sine(grid.squeeze(-1))
truth_in_gap = bdl.datasets.true_noisy_sine(gap.squeeze(-1))

# %% [markdown]
# ## Priors, before any fitting
# Engines standardise inputs and targets, so a prior lives on inputs of about [-2, 2] and on outputs of size 1.
# The truth turns four times between -3 and 3. Which of these priors ever do that?
#
# `w ~ N(0, scale^2 / fan-in)` with scale 1 is the default of a network. It is a fair default for tables with
# many columns, where functions are smooth along each; for one wiggly input it is stiff. Scale 3 is what we use
# below.

# %%
wiggly = bdl.priors.Normal(scale=3.0)
bnn = bdl.BNN(hidden=(50,), activation="tanh", prior=wiggly)
stiff_bnn = bdl.BNN(hidden=(50,), activation="tanh", prior=bdl.priors.Normal(scale=1.0))
gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5, lengthscale=0.5)))
nngp = bdl.GP(bdl.kernels.NNGP(depth=1, activation="erf", w_std=3.0, b_std=3.0))

priors = {"GP, Matérn-5/2": gp, "NNGP, erf": nngp, "network, scale 3": bnn, "network, scale 1": stiff_bnn}
standardised = ((grid - data.x.mean()) / data.x.std())[(grid.abs() <= 3).squeeze(-1)]


def turns(f: torch.Tensor) -> torch.Tensor:
    """How often each function (num, s) changes direction."""
    rising = f.diff(dim=-1) > 0
    return (rising[..., 1:] != rising[..., :-1]).sum(-1)


prior_draws = {
    name: model.sample_prior(standardised, NUM_FUNCTIONS, torch.Generator().manual_seed(2))
    for name, model in priors.items()
}
print("Share of prior functions that turn at least four times, as the truth does")
for name, f in prior_draws.items():
    print(f"  {name:<18}{(turns(f) >= 4).double().mean():6.1%}")


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


COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#D55E00")  # Okabe and Ito: told apart with any kind of colour blindness
INK, MUTED = "#222222", "#666666"


def tidy(ax: Axes, title: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=MUTED, labelsize=9.5)
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)


figure = Figure(figsize=(10, 2.9), layout="constrained")
for ax, colour, (name, f) in zip(figure.subplots(1, 4, sharey=True), COLOURS, prior_draws.items(), strict=True):
    ax.plot(standardised, f[:8].T, color=colour, linewidth=1.3, alpha=0.85)
    tidy(ax, name)
    ax.set_xlabel("x, standardised", color=MUTED)
show(figure, "prior_draws")

# %% [markdown]
# ## The same question to four engines
# One table, one loop. Another engine is another line. The GPs estimate their kernel parameters and noise from
# the data; the networks have a noise of their own to learn too.

# %%
engines = [
    ("exact GP", bdl.ExactGP(gp)),
    ("infinite-width GP", bdl.ExactGP(nngp)),
    ("network by HMC", bdl.HMC(bnn, NUM_CHAINS, NUM_WARMUP, NUM_DRAWS, num_steps=64)),
    ("deep ensemble", bdl.Ensemble(bnn, num_members=5, num_steps=ENSEMBLE_STEPS)),
]
posteriors = {}
for name, engine in engines:
    posteriors[name] = engine.fit(data.x, data.y, seed=0)
    print(f"{name:<18}{posteriors[name].diagnostics['seconds']:6.1f} s")

# %% [markdown]
# Sixty points are few. The cost of the exact GP grows with their cube; where that is too much, `SparseGP` lets a
# few inducing points stand for all of them. Here it loses next to nothing, and says so: what it maximises is a lower
# bound on the log evidence that the exact GP computes.

# %%
sparse = bdl.SparseGP(gp, num_inducing=20, num_steps=100).fit(data.x, data.y, seed=0)
exact = posteriors["exact GP"]
print(f"log evidence {exact.log_evidence:.2f}, bound with 20 inducing points {sparse.diagnostics['elbo']:.2f}")

# %% [markdown]
# A network that was trained on draws from many Gaussian processes has done the work beforehand: it reads the sixty
# points and answers. Its mean stands beside that of the exact GP.

# %%
if "gp" in bdl.amortized.shipped():
    pfn = bdl.PFN(bdl.amortized.Pretrained.load("gp")).fit(data.x, data.y, seed=0)
    apart = pfn.predict(grid).mean - exact.predict(grid).mean
    print(f"pretrained network: {1e3 * pfn.diagnostics['seconds']:.0f} ms, {apart.abs().mean():.2f} from the exact GP")

# %% [markdown]
# What none of them answers is what the mean of y would be, were all of its population seen: that is a question about
# data to come. `Martingale` lets an engine's predictions go on by themselves, and reads the answer off the completed
# data.

# %%
completed = bdl.Martingale(bdl.ExactGP(gp), num_rollouts=100, horizon=240).fit(data.x, data.y, seed=0)
least, most = completed.functional("mean").quantile([0.05, 0.95])
print(f"mean of y in the population: {least:.2f} to {most:.2f} with probability 0.9; in the sample {data.y.mean():.2f}")

# %% [markdown]
# A sampler can stop too early without any error, so ask it. R-hat compares the chains on function values
# (weights of a network are not identified): below 1.01 is good, above 1.05 warns. At the sizes here it is
# usable, not perfect.

# %%
checks = posteriors["network by HMC"].diagnostics
print(f"HMC: R-hat {checks['rhat']:.3f}, effective draws {checks['ess_bulk']:.0f}, divergences {checks['divergences']}")

# %% [markdown]
# ## What each believes
# `predict(x, noise=False)` is the belief about the function f; `predict(x)` adds the noise of an observation.


# %%
def draw_belief(ax: Axes, posterior: bdl.Posterior, colour: str) -> None:
    """Bands of f and of y, three functions from the posterior, the truth and the data."""
    f, y, at = posterior.predict(grid, noise=False), posterior.predict(grid), grid.squeeze(-1)
    ax.axvspan(-0.5, 1.2, color="#eeeeee", linewidth=0, label="no data here", zorder=0)
    ax.fill_between(at, y.quantile(0.05), y.quantile(0.95), color=colour, alpha=0.18, linewidth=0, label="90% of y")
    ax.fill_between(at, f.quantile(0.05), f.quantile(0.95), color=colour, alpha=0.38, linewidth=0, label="90% of f")
    for i, line in enumerate(posterior.functions(3, seed=3)(grid)):
        ax.plot(at, line, color=colour, linewidth=1, alpha=0.9, label="functions drawn" if i == 0 else None)
    ax.plot(at, truth_on_grid, color=INK, linewidth=1.6, linestyle=(0, (4, 2)), label="truth")
    ax.plot(data.x, data.y, "o", color=INK, markersize=2.8, label="data")


figure = Figure(figsize=(10, 6.4), layout="constrained")
axes = figure.subplots(2, 2, sharex=True, sharey=True)
for ax, colour, (name, posterior) in zip(axes.flat, COLOURS, posteriors.items(), strict=True):
    draw_belief(ax, posterior, colour)
    tidy(ax, name)
    sd = posterior.predict(gap, noise=False).stddev.mean()
    ax.set_title(f"sd of f in the gap: {sd:.2f}", loc="right", fontsize=10, color=MUTED)
    ax.set_ylim(-3.6, 3.6)
handles, labels = axes[0, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
show(figure, "comparison")

# %% [markdown]
# ## Scores
# `bdl.compare` asks every posterior for its predictive at the same points. Coverage is the share of test points
# inside the central interval, and should be what the interval claims. The distance to a reference is the mean
# 2-Wasserstein distance between predictives, in the units of y.
#
# Among the data the four are close. Held-out points like the training points cannot tell who is right in the gap.

# %%
COLUMNS = ["RMSE", "NLPD", "CRPS", "coverage 50%", "coverage 90%", "distance to reference", "seconds"]
among_data = bdl.compare(posteriors, inside.x, inside.y, reference="network by HMC")
in_gap = bdl.compare(posteriors, gap, noisy(gap, seed=4), reference="network by HMC")
print("\nTest points among the data\n", among_data[COLUMNS].round(2).to_string(), sep="")
print("\nTest points in the gap\n", in_gap[COLUMNS].round(2).to_string(), sep="")


# %% [markdown]
# Scores of y hide what is known of f, because the noise covers it. Since the truth is known here, we can ask
# directly: how wide is the belief about f, does its 90% band hold the truth, and by how many of its standard
# deviations is it off at worst?


# %%
def knowledge(posterior: bdl.Posterior) -> dict[str, float]:
    """What a posterior believes about f at the data and in the gap, held against the truth in the gap."""
    f = posterior.predict(gap, noise=False)
    holds = (f.quantile(0.05) <= truth_in_gap) & (truth_in_gap <= f.quantile(0.95))
    return {
        "sd at the data": posterior.predict(data.x, noise=False).stddev.mean().item(),
        "sd in the gap": f.stddev.mean().item(),
        "share of the gap held by 90% of f": holds.double().mean().item(),
        "worst error there, in sd": ((f.mean - truth_in_gap).abs() / f.stddev).max().item(),
    }


known = pd.DataFrame.from_dict({name: knowledge(p) for name, p in posteriors.items()}, orient="index")
print("\nBelief about f\n", known.round(2).to_string(), sep="")

# %% [markdown]
# ## Functions, not only bands
# A band says nothing about how high f rises somewhere inside the gap, because the highest point is at another
# place for every function. `functions` draws whole functions, the same ones at every x, so that any such
# question is one line.

# %%
print(f"\nThe highest value of f in the gap; the truth is {truth_in_gap.max():.2f}")
for name, posterior in posteriors.items():
    highest = posterior.functions(NUM_FUNCTIONS, seed=5)(gap).amax(-1)
    low, high = torch.quantile(highest, torch.tensor([0.05, 0.95], dtype=highest.dtype))
    print(f"  {name:<20}90% interval [{low:.2f}, {high:.2f}]")

# %% [markdown]
# ## Where it fails
# **The ensemble.** Its members agree where they were trained on the same points, and in the gap they take similar
# paths; whether these are right is luck. Stopping early on held-out points gives each a noise under which its
# intervals for y hold among the data. It says nothing about a place without data. The spread of an ensemble is a
# heuristic; to know what it is worth on a problem, compare it with a reference.
#
# **Exact inference under the wrong prior.** The same HMC with the stiff prior of scale 1. Nothing warns: the
# chains agree, no transition diverges. It explains the turns as noise, and its belief about f is narrow and
# wrong. Sampling diagnostics judge the computation, never the model. The table and the prior draws do.

# %%
stiff = bdl.HMC(stiff_bnn, NUM_CHAINS, NUM_WARMUP, NUM_DRAWS, num_steps=32).fit(data.x, data.y, seed=0)
stiff_rhat = stiff.diagnostics["rhat"]
stiff_known = knowledge(stiff)
stiff_score = bdl.compare({"stiff": stiff}, inside.x, inside.y).loc["stiff", "NLPD"]
print(f"\nHMC, prior scale 1: R-hat {stiff_rhat:.3f}, {stiff.diagnostics['divergences']} divergences")
print(f"  sd of f in the gap {stiff_known['sd in the gap']:.2f}")
print(f"  worst error there, in sd {stiff_known['worst error there, in sd']:.1f}")
print(f"  NLPD among the data {stiff_score:.2f}; with prior scale 3 {among_data.loc['network by HMC', 'NLPD']:.2f}")

figure = Figure(figsize=(10, 3.6), layout="constrained")
for ax, (name, posterior) in zip(
    figure.subplots(1, 2, sharey=True),
    {"HMC, prior scale 3": posteriors["network by HMC"], "HMC, prior scale 1": stiff}.items(),
    strict=True,
):
    draw_belief(ax, posterior, COLOURS[2])
    tidy(ax, name)
    ax.set_title(f"R-hat {posterior.diagnostics['rhat']:.3f}", loc="right", fontsize=10, color=MUTED)
show(figure, "stiff_prior")

# %% [markdown]
# **Everybody, far away.** At x = -4.5 and 4.5 the truth is where no data point hints at. The Matérn GP returns
# to its mean, the networks level off; what they believe there is their prior, not the data.

# %%
far = torch.tensor([[-4.5], [4.5]], dtype=torch.float64)
truth_far = bdl.datasets.true_noisy_sine(far.squeeze(-1))
print("\nError far outside the data, in standard deviations of f")
for name, posterior in posteriors.items():
    f = posterior.predict(far, noise=False)
    left, right = ((f.mean - truth_far) / f.stddev).tolist()
    print(f"  {name:<20}x = -4.5: {left:5.1f}    x = 4.5: {right:5.1f}")

# %% [markdown]
# ## Exercises
# 1. Change the data's seed from 2 to 0, 1 and 3. Which of the conclusions stay?
# 2. Raise `num_members` to 20. Does the ensemble's sd in the gap grow towards HMC's, or is it another quantity?
# 3. Measure where the exact GP is least sure: `posteriors["exact GP"].condition_on(x_new, y_new)` updates it
#    exactly, without fitting again. How many points close the gap?
# 4. Swap tanh for relu in `bnn`. What changes in the gap, and what far away?
# 5. Choose between the two priors without knowing the truth: compare NLPD on held-out points, as above.
#
# ## References
# - Rasmussen and Williams (2006), *Gaussian Processes for Machine Learning*, chapters 2 and 5.
# - Neal (1996), *Bayesian Learning for Neural Networks*: priors on weights as priors on functions, HMC,
#   infinite width.
# - Lee et al. (2018), *Deep Neural Networks as Gaussian Processes*, arXiv 1711.00165.
# - Lakshminarayanan, Pritzel, Blundell (2017), *Simple and Scalable Predictive Uncertainty Estimation using
#   Deep Ensembles*, arXiv 1612.01474.
# - Izmailov et al. (2021), *What Are Bayesian Neural Network Posteriors Really Like?*, arXiv 2104.14421.
#
# ## What this tutorial claims, checked

# %%
others = [name for name in posteriors if name != "deep ensemble"]
ensemble, rest = known.loc["deep ensemble"], known.loc[others]
# In the gap the ensemble claims to know f at least 1.5 times better than the others do.
assert (rest["sd in the gap"] > 1.5 * ensemble["sd in the gap"]).all()
# The others had reason to be wide: the truth is within three of their standard deviations all through the gap.
assert (rest["worst error there, in sd"] < 3).all()
assert ensemble["worst error there, in sd"] > 3
# Scores show it in the gap, and not among the data.
assert among_data["NLPD"].max() - among_data["NLPD"].min() < 0.8
assert in_gap.loc["deep ensemble", "NLPD"] > in_gap.loc[others, "NLPD"].max() + 0.8
# Exact inference under the stiff prior converged, and is confidently wrong.
assert stiff_rhat < 1.1
assert stiff_known["worst error there, in sd"] > 5
assert stiff_score > among_data.loc["network by HMC", "NLPD"] + 0.3
# The sample mean is among the means that the population may have.
assert least < data.y.mean() < most
# Twenty inducing points carry what sixty data say.
assert exact.log_evidence - 1 < sparse.diagnostics["elbo"]
