# %% [markdown]
# # Which surrogate should tune my model?
#
# Gradient boosting has half a dozen numbers that somebody has to choose, and judging one choice means fitting the
# model several times. Bayesian optimisation fits a surrogate to the choices judged so far and asks it where to look
# next. Any engine of bayesdl is such a surrogate, and changing it is one line.
#
# The answer: for a handful of numbers and a few dozen trials it matters little which. All three end with settings
# better than the defaults, which a few quasi-random ones are as well; the last tenths are what a search adds. What
# differs is what a proposal costs and what each believes about where nobody looked.
#
# The pictures go to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import KFold, cross_val_score

import bayesdl as bdl

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them; the conclusions stay the same, the numbers do not.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
NUM_START = 8 if QUICK else 12  # quasi-random settings, the same for all surrogates
NUM_PROPOSALS = 6 if QUICK else 16
NUM_FOLDS = 3 if QUICK else 5
MOST_TREES = 120 if QUICK else 200


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


COLOURS = ("#0072B2", "#009E73", "#D55E00")  # Okabe and Ito: told apart with any kind of colour blindness
INK, MUTED = "#222222", "#666666"


def tidy(ax: Axes, title: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=MUTED, labelsize=9.5)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)


# %% [markdown]
# ## What is tuned
# The progression of diabetes in 442 patients, ten measurements each: a data set that comes with scikit-learn. A trial
# is a cross-validation, its value the root mean square error in the units of the target. Learning rates are searched
# by their logarithm, depths are whole numbers.

# %%
x, y = load_diabetes(return_X_y=True)
folds = KFold(NUM_FOLDS, shuffle=True, random_state=0)
space = {
    "learning_rate": bdl.bo.Float(0.01, 0.5, log=True),
    "n_estimators": bdl.bo.Integer(20, MOST_TREES, log=True),
    "max_depth": range(1, 7),
    "subsample": (0.3, 1.0),
    "max_features": (0.1, 1.0),
}


def error(settings: Mapping[str, Any]) -> float:
    """Cross-validated root mean square error of gradient boosting with these settings."""
    model = GradientBoostingRegressor(random_state=0, **settings)
    return float(-cross_val_score(model, x, y, cv=folds, scoring="neg_root_mean_squared_error").mean())


default = error({})
print(f"scikit-learn's defaults: {default:.2f}")

# %% [markdown]
# ## Three surrogates, one loop
# A Gaussian process; the Gaussian process that a network of infinite width is; and that process with an unknown scale,
# a Student-t process. All start from the same quasi-random settings, which are evaluated once.

# %%
engines = {
    "GP": bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_starts=2),
    "infinite network": bdl.ExactGP(
        bdl.GP(bdl.kernels.Scale(bdl.kernels.NNGP(depth=3, activation="erf"))), num_starts=2
    ),
    "Student-t": bdl.ScaleMixture(
        bdl.GP(bdl.kernels.Scale(bdl.kernels.NNGP(depth=3, activation="erf"))), bdl.priors.InverseGamma(2.0, 1.0)
    ),
}
first = bdl.bo.Study(space, seed=1, num_startup=NUM_START)
first.optimize(error, NUM_START)
start = [(trial.params, trial.value) for trial in first.trials]

studies, seconds = {}, {}
for name, engine in engines.items():
    study = bdl.bo.Study(space, engine=engine, seed=1, num_startup=2)
    study.add([point for point, _ in start], [value for _, value in start])
    spent = 0.0
    for _ in range(NUM_PROPOSALS):
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a dozen points are few, and engines say so
            trial = study.ask()
        spent += time.process_time() - began
        study.tell(trial, error(trial.params))
    studies[name], seconds[name] = study, spent / NUM_PROPOSALS

# %% [markdown]
# ## What came out
# The best of each study, what proposals were worth on average beside the quasi-random start, and what they cost.

# %%
by_chance = np.mean([value for _, value in start])
rows = {}
for name, study in studies.items():
    proposed = [trial.value for trial in study.trials][NUM_START:]
    rows[name] = {
        "best": study.best.value, "mean of proposals": np.mean(proposed), "worst proposal": max(proposed),
        "CPU seconds a proposal": seconds[name],
    }  # fmt: skip
table = pd.DataFrame(rows).T
print(table.round(3))
print(f"mean of the quasi-random settings: {by_chance:.2f}, best of them: {min(v for _, v in start):.2f}")
best = min((study.best for study in studies.values()), key=lambda trial: trial.value)
print("best settings:", {key: round(value, 3) for key, value in best.params.items()})

# %%
figure = Figure(figsize=(9.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
trials = np.arange(1, NUM_START + NUM_PROPOSALS + 1)
for (name, study), colour in zip(studies.items(), COLOURS, strict=True):
    values = np.array([trial.value for trial in study.trials])
    left.plot(trials, np.minimum.accumulate(values), color=colour, linewidth=1.8, label=name)
    left.plot(trials[NUM_START:], values[NUM_START:], "o", color=colour, markersize=4, alpha=0.5)
left.plot(trials[:NUM_START], [value for _, value in start], "o", color=MUTED, markersize=4, alpha=0.6)
left.axhline(default, color=MUTED, linewidth=0.9, linestyle="--")
left.annotate("defaults", (trials[-1], default), ha="right", va="bottom", fontsize=9, color=MUTED)
left.set_ylim(top=default + 2.5)
tidy(left, "Error of each trial, and the best so far")
left.set_xlabel("trial", color=MUTED)
left.legend(frameon=False, fontsize=9)

# what each believes along the learning rate, everything else at the best settings
grid = np.geomspace(0.01, 0.5, 60)
unit = bdl.bo.Space.of(space).to_unit([{**best.params, "learning_rate": float(rate)} for rate in grid])
for (name, study), colour in zip(studies.items(), COLOURS, strict=True):
    belief = study.posterior().predict(unit)  # of minus the error: larger is better
    mean, sd = -belief.mean, belief.stddev
    right.plot(grid, mean, color=colour, linewidth=1.6, label=name)
    right.fill_between(grid, mean - 2 * sd, mean + 2 * sd, color=colour, alpha=0.14, linewidth=0)
right.set_xscale("log")
right.set_xlabel("learning rate", color=MUTED)
tidy(right, "What each believes along the learning rate")
show(figure, "bo_tuning")

# %% [markdown]
# ## Where it fails
# Cross-validation is a noisy judge: with other folds the order of the best few settings changes, and a search that goes
# on long enough tunes to the folds. Differences of a few tenths between the surrogates mean nothing here; the page on
# the study compares them over many problems and seeds.
#
# ## Exercises
# 1. Change `random_state` of the folds. Do the best settings stay? Does their order?
# 2. Give `engine=bdl.HMC(bdl.BNN())`. What does a proposal cost now, and is it better?
# 3. Add `"loss": ["squared_error", "huber"]` to the space. Which surrogates take a choice, and how do they see it?
# 4. Return `float("nan")` for depths above 4. What happens to the search?
#
# ## References
# - Snoek, Larochelle, Adams (2012), *Practical Bayesian Optimization of Machine Learning Algorithms*, arXiv 1206.2944.
# - Li, Rudner, Wilson (2024), *A Study of Bayesian Neural Network Surrogates for Bayesian Optimization*, arXiv
#   2305.20028.
#
# ## What this tutorial claims, checked

# %%
# Every surrogate ends with settings better than the defaults, by more than a percent.
assert (table["best"] < 0.99 * default).all()
# The Gaussian process also finds better ones than chance had found before.
assert table["best"]["GP"] < min(value for _, value in start)
