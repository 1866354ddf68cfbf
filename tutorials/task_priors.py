# %% [markdown]
# # Which data sets does a prior believe in?
#
# A prior-data fitted network never sees a likelihood. It sees data sets drawn from a prior over data sets, and answers
# every question as if yours were one more of them. So before one is trained, or trusted, look at what it was shown, and
# ask whether your data could have come from there.
#
# The answer: draw, and look; then compare a number of your data with the same number of a few hundred draws. A jump
# lies outside of what smooth Gaussian processes ever do, and ten lines of a prior of your own bring it inside.
#
# The pictures go to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayesdl import GP, priors
from bayesdl.kernels import RBF, Periodic
from bayesdl.priors import tasks

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
NUM_POINTS = 60 if QUICK else 120
NUM_TASKS = 200 if QUICK else 500
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#D55E00")  # Okabe and Ito: told apart with any kind of colour blindness
INK, MUTED = "#222222", "#666666"


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
    figure.savefig(path, dpi=90, facecolor="white", metadata={"Software": None})
    print(f"picture: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


def tidy(ax: Axes, title: str, note: str) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=MUTED, labelsize=9)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.text(0.0, -0.13, note, transform=ax.transAxes, fontsize=9.5, color=MUTED, va="top").set_in_layout(False)


# %% [markdown]
# ## Draws
# One protocol: `sample(batch, n, d, generator)`. It returns inputs, targets as observed, the function values behind
# them, and what caused each data set. Points are y, lines the noiseless values.

# %%
CYCLES = Periodic(period_prior=priors.LogNormal(0.2, 0.3)) * RBF(lengthscale_prior=priors.LogNormal(0.5, 0.3))
regression = {
    "HyperGP": (tasks.HyperGP(), "four kernels"),
    "HEBOPlus": (tasks.HEBOPlus(), "objectives to be optimised"),
    "NetworkGP": (tasks.NetworkGP(), "networks of infinite width"),
    "StudentTProcess": (tasks.StudentTProcess(scale_prior=priors.InverseGamma(1.0, 0.5)), "scales far apart"),
    "NeuralNetwork": (tasks.NeuralNetwork(architectures=4), "deep and narrow, tanh"),
    "LearningCurves": (tasks.LearningCurves(horizon=NUM_POINTS), "accuracy over epochs"),
    "ModelTasks": (tasks.ModelTasks(GP(CYCLES)), "any model: cycles that drift"),
}

figure = Figure(figsize=(11, 5.6), layout="constrained")
figure.get_layout_engine().set(hspace=0.12, rect=(0, 0.04, 1, 0.96))
axes = figure.subplots(2, 4).flat
for seed, (ax, (title, (prior, note))) in enumerate(zip(axes, regression.items(), strict=False)):
    drawn = prior.sample(4, NUM_POINTS, 1, torch.Generator().manual_seed(seed))
    for i in range(4):
        order = drawn.x[i, :, 0].argsort()
        x = drawn.x[i, order, 0]
        ax.plot(x, drawn.noiseless[i, order], color=COLOURS[i], linewidth=1.3, alpha=0.85)
        ax.plot(x, drawn.y[i, order], ".", color=COLOURS[i], markersize=2.5, alpha=0.5)
    tidy(ax, title, note)
table = tasks.Tabular(max_classes=4, architectures=1).sample(1, 300, 2, torch.Generator().manual_seed(4))
for label in range(4):
    points = table.x[0][table.y[0] == label]
    figure.axes[7].plot(*points.T, ".", color=COLOURS[label], markersize=4)
tidy(figure.axes[7], "Tabular", "two columns, four classes")
show(figure, "task_priors")

# %% [markdown]
# ## A prior of your own
# Anything with that one method is a prior over tasks. Here: levels with a few jumps between them. Everything is drawn
# for the whole batch at once, on the device of the generator.


# %%
@dataclass(frozen=True)
class Jumps:
    """Piecewise constant functions on [-sqrt 3, sqrt 3], with `num` jumps of random place and size."""

    num: int = 3
    noise: float = 0.1

    def sample(self, batch: int, n: int, d: int, generator: torch.Generator) -> tasks.Tasks:
        """`batch` data sets; only the first column matters."""
        device = generator.device
        x = 3.46 * torch.rand(batch, n, d, generator=generator, device=device) - 1.73
        places = 3.46 * torch.rand(batch, 1, self.num, generator=generator, device=device) - 1.73
        sizes = torch.randn(batch, self.num, 1, generator=generator, device=device)
        f = ((x[..., :1] > places).float() @ sizes).squeeze(-1)
        y = f + self.noise * torch.randn(batch, n, generator=generator, device=device)
        return tasks.Tasks(x, y, f, {"places": places.squeeze(1), "sizes": sizes.squeeze(-1)})


# %% [markdown]
# ## Could your data have come from there?
# Take data with one jump, and a number that shows it: the largest step between neighbours in x, in units of the spread
# of y. Then the same number for many data sets of each prior. A share near 0 or 1 says that data like yours hardly
# occur, and that a network trained on this prior has never been told what to do with them.


# %%
def largest_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """max |y_(i+1) - y_i| / sd(y) with points in the order of x: (batch, n, 1), (batch, n) -> (batch)."""
    ordered = y.gather(-1, x[..., 0].argsort(-1))
    return ordered.diff(dim=-1).abs().amax(-1) / y.std(-1)


generator = torch.Generator().manual_seed(1)
x = 3.46 * torch.rand(1, NUM_POINTS, 1, generator=generator) - 1.73
y = (x[..., 0] > 0.4).float() + 0.03 * torch.randn(1, NUM_POINTS, generator=generator)
mine = float(largest_step(x, y))

candidates = {
    "smooth GPs, little noise": tasks.HyperGP("rbf", noise_variance=0.001),
    "HyperGP, the default": tasks.HyperGP(),
    "jumps": Jumps(),
    "half and half": tasks.Mixture((tasks.HyperGP(), Jumps())),
}
shares = {}
figure = Figure(figsize=(11, 2.9), layout="constrained")
figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
for i, (ax, (title, prior)) in enumerate(zip(figure.subplots(1, 4, sharex=True), candidates.items(), strict=True)):
    drawn = prior.sample(NUM_TASKS, NUM_POINTS, 1, torch.Generator().manual_seed(2))
    steps = largest_step(drawn.x, drawn.y)
    shares[title] = float((steps >= mine).double().mean())
    ax.hist(steps, bins=40, range=(0, 5), color=COLOURS[i], alpha=0.85)
    ax.axvline(mine, color=INK, linewidth=1.5)
    ax.set_yticks([])
    tidy(ax, title, f"{shares[title]:.1%} of the data sets jump as far")
show(figure, "task_priors_check")
print({title: f"{share:.3f}" for title, share in shares.items()})

# %% [markdown]
# ## Where it fails
# The default prior passes this check for wrong reasons: with much noise, or a rough kernel, neighbours are far apart as
# well. One number never shows all of a mismatch. Check several, and those that the use depends on: the spread of y, its
# roughness, its tails, how far it goes beyond the data.
#
# ## Exercises
# 1. Find a number that tells a jump from noise, and repeat the check for the default prior.
# 2. Write a prior whose noise grows with x. Return the noiseless values as well: a network can learn both.
# 3. Train a small network on `Mixture((HyperGP(), Jumps()))` with `bayesdl pretrain`, and ask both about your data.
#
# References: Mueller et al. (2022), arXiv 2112.10510; Gelman et al. (2020), "Bayesian workflow", arXiv 2011.01808.

# %%
assert shares["smooth GPs, little noise"] < 0.1
assert 0.05 < shares["jumps"] < 0.95
assert 0.05 < shares["half and half"] < 0.95
