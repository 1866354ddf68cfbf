# %% [markdown]
# # What does a network know that has seen two hundred thousand data sets?
#
# Fitting a Gaussian process means searching for its hyper-parameters, once for every data set. A prior-data fitted
# network did that work before your data came: it was trained to predict, on data sets drawn from a prior, as the
# posterior of that prior does. Reading your data is then one forward pass.
#
# The answer: it knows its prior. For data that could have come from there it says what NUTS over the hyper-parameters
# says, dozens of times sooner. For other data it is wrong the way the prior is wrong, and does not notice: what holds
# for Gaussian processes with a bad kernel holds here.
#
# `ExactGP` finds the best hyper-parameters of all data sets in one batch in about the same time; it is a little worse,
# since it ignores that they are uncertain. A network pays where data sets come in thousands, where uncertain
# hyper-parameters matter, and where no formula exists: learning curves, tables, simulators, any prior that one can draw
# from.
#
# The pictures go to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning
from bayesdl.hyper import LogNormal

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them; the conclusions stay the same, the numbers do not.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
NUM_TASKS = 40 if QUICK else 200
NUM_POINTS, NUM_TEST = 20, 10
NUM_DRAWS = 100 if QUICK else 300


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
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
    print(f"picture: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito: told apart with any kind of colour blindness
INK, MUTED = "#222222", "#666666"


def tidy(ax: Axes, title: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=MUTED, labelsize=9.5)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


# %% [markdown]
# ## The network and its prior
# The weights ship with the package. The card says what the network was shown: Gaussian processes with a Matern 5/2
# kernel, hyper-parameters drawn anew for every data set, in standardised units. The same prior as a model, for NUTS:

# %%
engine = bdl.PFN.from_pretrained("gp")
card = engine.network.card
print("trained on", card["prior"])
print("ranges", card["ranges"])

lengthscale = LogNormal(0.0, 0.7)
kernel = bdl.kernels.Scale(
    bdl.kernels.Matern(nu=2.5, lengthscale_prior=lengthscale), outputscale_prior=LogNormal(0.0, 0.4)
)
noise = bdl.Gaussian(prior=LogNormal(-3.5, 1.2), lower=0.0)
gp = bdl.GP(kernel, mean="zero", likelihood=noise)
exact = bdl.NUTS(gp, num_chains=1, num_warmup=NUM_DRAWS, num_draws=NUM_DRAWS, standardize=False)

# %% [markdown]
# ## Data from the prior: one forward pass against NUTS
# Swapping the engine is one line, as everywhere.

# %%
tasks = bdl.priors.tasks.HyperGP(
    ("matern-5/2",), lengthscale=lengthscale, outputscale=LogNormal(0.0, 0.4), inputs="mixed",
    noise_variance=LogNormal(-3.5, 1.2),
)  # fmt: skip
drawn = tasks.sample(NUM_TASKS, NUM_POINTS + NUM_TEST, 1, torch.Generator().manual_seed(3))
x, y = drawn.x.double(), drawn.y.double()
seen, unseen = (x[:, :NUM_POINTS], y[:, :NUM_POINTS]), (x[:, NUM_POINTS:], y[:, NUM_POINTS:])
# these data are in the network's own units
raw = bdl.PFN.from_pretrained("gp", standardize=False, precision="float32")

rows = {}
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)  # short chains, on many small data sets
    for name, method in {"network": raw, "NUTS": exact, "ExactGP": bdl.ExactGP(gp, standardize=False)}.items():
        began = time.perf_counter()
        predictive = method.fit(*seen).predict(unseen[0])
        scores = -predictive.log_prob(unseen[1]).mean(-1)
        rows[name] = {"NLPD": float(scores.mean()), "seconds": time.perf_counter() - began, "scores": scores}
table = pd.DataFrame(rows).T[["NLPD", "seconds"]].astype(float)
gap = rows["network"]["scores"] - rows["NUTS"]["scores"]
print(table.round(3))
print(f"lost to exact inference: {gap.mean():.3f} +- {gap.std() / NUM_TASKS**0.5:.3f} nats a point")

# %% [markdown]
# ## What it looks like, where it is right and where it is not
# On the left a function like those of the prior. In the middle a step: no smooth function with these lengthscales, so
# network and exact GP both smooth it over, and call the rest noise. On the right the same smooth function asked far
# outside of the inputs that the network was trained on: the GP returns to its prior, and so does the network, whose
# answer is a mixture of Gaussian processes; it warns all the same.

# %%
generator = torch.Generator().manual_seed(1)
inputs = (3.2 * torch.rand(14, 1, generator=generator, dtype=torch.float64) - 1.6).sort(0).values
noise_draw = 0.1 * torch.randn(14, generator=generator, dtype=torch.float64)
cases = {
    "like the prior": (inputs, (2.5 * inputs.squeeze(-1)).sin() + noise_draw, (-1.75, 1.75)),
    "a step": (inputs, (inputs.squeeze(-1) > 0.2).double() * 2 - 1 + 0.3 * noise_draw, (-1.75, 1.75)),
    "far outside": (inputs, (2.5 * inputs.squeeze(-1)).sin() + noise_draw, (-6.0, 6.0)),
}
figure = Figure(figsize=(11, 3.3), layout="constrained")
differences = {}
for ax, (title, (points, targets, (low, high))) in zip(figure.subplots(1, 3), cases.items(), strict=True):
    grid = torch.linspace(low, high, 160, dtype=torch.float64).unsqueeze(-1)
    curves = {}
    for (name, method), colour in zip({"network": raw, "NUTS": exact}.items(), COLOURS, strict=False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            predictive = method.fit(points, targets).predict(grid)
        told = [w for w in caught if not issubclass(w.category, ConvergenceWarning)]
        mean, sd = predictive.mean, predictive.stddev
        curves[name] = mean
        ax.plot(grid, mean, color=colour, label=name)
        ax.fill_between(grid.squeeze(-1), mean - 2 * sd, mean + 2 * sd, color=colour, alpha=0.18, linewidth=0)
        if name == "network":
            print(f"{title}: {len(told)} warnings of the network" + (f", {told[0].message}" if told else ""))
    differences[title] = float((curves["network"] - curves["NUTS"]).abs().mean())
    ax.plot(points, targets, ".", color=INK, markersize=6)
    tidy(ax, title)
ax.legend(frameon=False, fontsize=9)
show(figure, "amortized")

# %% [markdown]
# ## Where it fails, and what to do
# The network is as good as its prior, and its prior was chosen by somebody else. Look at it
# (the tutorial *task_priors*), train one on yours (`bayesdl pretrain --prior my_prior.py --out my.pfn`), or use the
# network for what it is best at: priors without formulas, many small data sets, a first answer. And a network's
# uncertainty is about y: for a posterior over means or quantiles, wrap it, `bdl.Martingale(engine)`.
#
# ## Exercises
# 1. Fit `engine` (with its standardisation) to temperatures in Kelvin over days of a year. What do the units cost?
# 2. Ask for `posterior.predict(x, noise=False)`: how does the network know what is noise? `posterior.hyperparameters`
#    has the answer.
# 3. Draw joint samples at 30 points and compare their covariance with that of `ExactGP`.
# 4. Give 300 points to a network trained on 100. What does it say, and is it still better than 100 of them?
#
# ## References
# - Mueller, Hollmann, Pineda Arango, Grabocka, Hutter (2022), *Transformers Can Do Bayesian Inference*, arXiv
#   2112.10510.
#
# ## What this tutorial claims, checked

# %%
# A fifth of a nat is far more than the network loses, and far less than what the wrong prior costs.
assert float(gap.mean()) < 0.2
# All data sets take the network a small part of the time of NUTS.
assert table.loc["NUTS", "seconds"] > 5 * table.loc["network", "seconds"]
# It agrees with exact inference on data like those of its prior, inside and outside of its range.
assert differences["like the prior"] < 0.1
assert differences["far outside"] < 0.1
