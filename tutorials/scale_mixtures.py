# %% [markdown]
# # When does a scale mixture beat a Gaussian process?
#
# A Gaussian process with a known kernel decides before it sees a single target how wide its intervals are; targets
# move its mean only. A scale mixture puts a prior on v, a factor of the whole covariance. Targets larger than expected
# then widen every interval, smaller ones narrow it.
#
# The answer: with few targets, when nobody knows how large the function is. A GP that guesses the amplitude, or fits
# it to a handful of points, is overconfident; the mixture says how little those points tell. With fifty targets, the
# amplitude is known and the three agree. And one wild target is no case for it: it is not the function's scale that is
# strange then, but that target.
#
# The pictures go to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.errors import ConvergenceWarning
from bayesdl.evaluation import coverage, nlpd

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them; the conclusions stay the same, the numbers do not.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
NUM_TASKS = 100 if QUICK else 300
SIZES = (4, 8, 16, 32, 64)
NUM_TEST = 30
NOISE = 0.02  # variance of the noise, as a share of the function's
LENGTHSCALE = 0.6

# %% [markdown]
# ## Data: many small tasks
# Think of one sensor in many buildings, or one assay on many compounds: the kind of function is known, how large it is
# differs from case to case. Each task draws v from an inverse gamma distribution, then a smooth function of variance v,
# then noise.

# %%
kernel = bdl.kernels.Matern(nu=2.5, lengthscale=LENGTHSCALE)
prior = bdl.priors.InverseGamma(1.5, 1.5)


def draw_tasks(n: int, seed: int) -> tuple[torch.Tensor, ...]:
    """x and y of n training and NUM_TEST test points for every task, and v: (tasks, points, 1), (tasks, points)."""
    g = torch.Generator().manual_seed(seed)
    total = n + NUM_TEST
    v = prior.sample((NUM_TASKS,), g)
    x = 4 * torch.rand(NUM_TASKS, total, 1, generator=g, dtype=torch.float64) - 2
    root = bdl.ops.cholesky(kernel(x)).factor
    z = torch.randn(2, NUM_TASKS, total, 1, generator=g, dtype=torch.float64)
    y = v.sqrt()[:, None] * (root @ z[0] + math.sqrt(NOISE) * z[1]).squeeze(-1)
    return x[:, :n], y[:, :n], x[:, n:], y[:, n:], v


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


COLOURS = ("#D55E00", "#CC79A7", "#0072B2", "#009E73")  # Okabe and Ito: told apart with any kind of colour blindness
INK, MUTED = "#222222", "#666666"


def tidy(ax: Axes, title: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=MUTED, labelsize=9.5)
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)


# %% [markdown]
# ## Priors, before any fitting
# Thirty functions from each. Those of the GP are all of one size. Of the Student-t process, the mixture with the
# inverse gamma prior, many are like them and a few much larger: each function has one v, everywhere.

# %%
grid = torch.linspace(-2, 2, 161, dtype=torch.float64).unsqueeze(-1)
gp = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=NOISE))
gaussian = gp.sample_prior(grid, 30, torch.Generator().manual_seed(0))
sizes = prior.sample((30, 1), torch.Generator().manual_seed(3)).sqrt()

figure = Figure(figsize=(10, 3.1), layout="constrained")
panels = {"GP": (gaussian, COLOURS[0]), "Student-t process": (sizes * gaussian, COLOURS[2])}
for ax, (name, (f, colour)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
    ax.plot(grid.squeeze(-1), f.T, color=colour, linewidth=1.1, alpha=0.7)
    tidy(ax, name)
    ax.set_ylim(-6.5, 6.5)
show(figure, "scale_mixture_priors")

# %% [markdown]
# ## Four answers
# The kernel's shape is known to all. The first GP takes v = 1, its typical value. The second estimates amplitude and
# noise of each task by maximum likelihood, under the library's default priors. The mixtures integrate over v: the
# Student-t process in closed form, the Burr XII mixture, whose prior is not the true one, by quadrature. With
# `noise="scaled"`, their default, v multiplies the noise as well, as it does in these data.
#
# Tasks are batch axes, so each line fits all of them at once.

# %%
amplitude_free = bdl.GP(
    bdl.kernels.Scale(
        bdl.kernels.Matern(
            nu=2.5,
            lengthscale=LENGTHSCALE,
            lengthscale_prior=bdl.priors.LogNormal(math.log(LENGTHSCALE), 0.01),  # as good as known
        )
    ),
    mean="zero",
    likelihood=bdl.Gaussian(noise_variance=NOISE),
)
known = {"optimize": False, "standardize": False}
engines = [
    ("GP, v = 1", bdl.ExactGP(gp, **known)),
    ("GP, v estimated", bdl.ExactGP(amplitude_free, num_starts=1, standardize=False)),
    ("Student-t process", bdl.ScaleMixture(gp, prior, **known)),
    ("Burr XII mixture", bdl.ScaleMixture(gp, bdl.priors.BurrXII(1.0, 1.5), **known)),
]

# %% [markdown]
# ## Scores
# NLPD in nats a test point, and the share of test points inside 90% intervals, over all tasks.

# %%
rows = []
for n in SIZES:
    x, y, x_test, y_test, _ = draw_tasks(n, seed=n)
    for name, engine in engines:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # four targets have flat likelihoods
            posterior = engine.fit(x, y, seed=0)
        predictive = posterior.predict(x_test)
        rows.append(
            {
                "targets": n,
                "engine": name,
                "NLPD": float(nlpd(predictive, y_test)),
                "coverage 90%": float(coverage(predictive, y_test, (0.9,))[0]),
                "seconds": posterior.diagnostics["seconds"],
            }
        )
table = pd.DataFrame(rows).pivot(index="targets", columns="engine")
names = [name for name, _ in engines]
for score in ("NLPD", "coverage 90%", "seconds"):
    print(f"\n{score}\n{table[score][names].round(3).to_string()}")

# %% [markdown]
# The GP with v = 1 never recovers: more targets teach it the function, not that its intervals have the wrong width.
# Its coverage is an average over tasks that it finds too easy and tasks that it finds too hard. Estimating v works with
# many targets, and fails with few: one best v stands for all that eight targets leave possible.
#
# ## The picture
# Eight targets of one task in which v is large.

# %%
x, y, _, _, v = draw_tasks(8, seed=8)
task = int((v - 4).abs().argmin())
figure = Figure(figsize=(10, 6.2), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
for ax, colour, (name, engine) in zip(top.subplots(1, 3, sharey=True), COLOURS, engines[:3], strict=False):
    belief = engine.fit(x[task], y[task], seed=0).predict(grid)
    at = grid.squeeze(-1)
    for q, alpha in ((0.005, 0.18), (0.05, 0.32)):
        label = f"{round(100 * (1 - 2 * q))}% of y"
        ax.fill_between(at, belief.quantile(q), belief.quantile(1 - q), color=colour, alpha=alpha, lw=0, label=label)
    ax.plot(at, belief.quantile(0.5), color=colour, linewidth=1.6)
    ax.plot(x[task], y[task], "o", color=INK, markersize=4)
    ax.legend(frameon=False, fontsize=9, loc="lower left")
    tidy(ax, name)
left, right = bottom.subplots(1, 2)
for colour, name in zip(COLOURS, names, strict=True):
    # a narrow line on top: the two mixtures lie on each other
    width = 1.4 if name == names[-1] else 2.6
    left.plot(
        table.index, table["NLPD"][name] - table["NLPD"][names[2]], "o-", color=colour, lw=width, ms=4, label=name
    )
    right.plot(table.index, table["coverage 90%"][name], "o-", color=colour, lw=width, ms=4, label=name)
right.axhline(0.9, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
left.set_yscale("symlog", linthresh=0.1)
left.set_yticks([0, 0.1, 1], ["0", "0.1", "1"])
for ax, title in ((left, "NLPD above the Student-t process"), (right, "Coverage of 90% intervals")):
    ax.set_xscale("log", base=2)
    ax.set_xticks(SIZES, SIZES)
    ax.set_xlabel("targets", color=MUTED)
    tidy(ax, title)
bottom.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
show(figure, "scale_mixture")

# %% [markdown]
# ## What the data say of v
# `scale_mean` is E[v | y], `sample_scale` draws from p(v | y). Its spread shrinks as sqrt(2 / n), whatever the prior;
# from then on the mixture is a GP with the right amplitude.

# %%
student = engines[2][1]
print("\ntargets   sd of v over its mean, average over tasks")
for n in SIZES:
    x, y, _, _, v = draw_tasks(n, seed=n)
    draws = student.fit(x, y).sample_scale((2000,), seed=1)
    print(f"{n:7d}   {float((draws.std(0) / draws.mean(0)).mean()):.2f}   (sqrt(2 / n) = {math.sqrt(2 / n):.2f})")

# %% [markdown]
# ## Where it fails
# **One wild target.** In each task of 16 targets, one is off by ten times the noise. A Student-t *process* is not
# regression with Student-t *noise*: all targets share one v, so a single bad one cannot be told from a large function.
# The mean is that of the GP, dragged along all the same, and every interval widens, also far from the culprit.

# %%
x, y, x_test, y_test, v = draw_tasks(16, seed=16)
spoiled = y.clone()
spoiled[:, 0] += 10 * (NOISE * v).sqrt()
exact = bdl.ExactGP(gp, **known)
failing = {}
for label, targets in (("clean", y), ("one wild target", spoiled)):
    mixture, plain = student.fit(x, targets), exact.fit(x, targets)
    error = (mixture.predict(x_test).mean - plain.predict(x_test).mean).abs().max()
    predictive = mixture.predict(x_test)
    failing[label] = {
        "NLPD": float(nlpd(predictive, y_test)),
        "coverage 90%": float(coverage(predictive, y_test, (0.9,))[0]),
        "E[v | y] / v": float((mixture.scale_mean / v).median()),
        "mean minus the GP's": float(error),
    }
print("\nStudent-t process, 16 targets\n", pd.DataFrame(failing).T.round(3).to_string(), sep="")

# %% [markdown]
# **Enough data.** On tables of a few hundred rows whose kernel amplitude is learned, v is known, and mixture and GP are
# nearly one model, on clean and on corrupted inputs; `benchmarks/scale_mixture.py` measures how nearly.
#
# **A learned shape.** `InverseGamma(2.0, 2.0, learn=True)` estimates the shape of the prior with everything else. One
# data set holds a single draw of v, and of all priors the evidence prefers a point at the best v: the shape is then
# what its own prior says, a little nearer to the GP. Learn it from many tasks, or choose it.
#
# ## Exercises
# 1. Give the Student-t process a prior that is far off, `InverseGamma(20.0, 20.0)`. From how many targets on does that
#    not matter?
# 2. Set `noise="fixed"` in the mixtures. Which of the curves move, and where?
# 3. Replace the kernel by `bdl.kernels.NNGP(depth=3)`: the limit of wide networks whose read-out weights share a random
#    variance.
# 4. Pass your own density, `scale_prior=lambda v: -v - 1 / v`. What can such a posterior not do?
# 5. With `likelihood=bdl.Categorical(3)` the same engine classifies. What does v do to class probabilities?
#
# ## References
# - Lee, Yun, Yang, Lee (2022), *Scale Mixtures of Neural Network Gaussian Processes*, arXiv 2107.01408.
# - Shah, Wilson, Ghahramani (2014), *Student-t Processes as Alternatives to Gaussian Processes*, arXiv 1402.4306.
# - Tracey, Wolpert (2018), *Upgrading from Gaussian Processes to Student's-T Processes*, arXiv 1801.06147.
#
# ## What this tutorial claims, checked

# %%
scores, covered = table["NLPD"], table["coverage 90%"]
few, many = SIZES[1], SIZES[-1]
# With eight targets the mixture is better than both GPs by a fifth of a nat and more, and honest about its intervals.
assert (scores.loc[few, names[:2]] > scores.loc[few, names[2]] + 0.2).all()
assert abs(covered.loc[few, names[2]] - 0.9) < 0.03 < 0.9 - covered.loc[few, names[1]]
# With 64 an estimated amplitude is as good.
assert abs(scores.loc[many, names[1]] - scores.loc[many, names[2]]) < 0.05
# A wild target widens the intervals of the rest, and does not spare the mean.
assert failing["one wild target"]["E[v | y] / v"] > 1.5 * failing["clean"]["E[v | y] / v"]
assert failing["one wild target"]["mean minus the GP's"] < 1e-9
