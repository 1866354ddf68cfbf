# %% [markdown]
# # Which kernel when?
#
# A kernel says what functions are like before any data: how rough, how far they remember, what repeats, how they go on
# beyond the data. So draw functions from each, and look. Then let the evidence choose between kernels for three data
# sets, and see where a network of infinite width stands among them, and how wide "infinite" has to be.
#
# The answer: the kernel that says what is true of the data wins by orders of magnitude in evidence; where nothing
# special is known, a Matérn kernel is a fair default. Deep relu networks without biases forget everything but the
# direction of x, critical scales slow that down, and the error of a finite network falls as the root of its width.
#
# The pictures go to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import math
import os
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bayesdl as bdl
from bayesdl.kernels import (
    NNGP,
    NTK,
    RBF,
    Activation,
    Dense,
    InfiniteWidth,
    Kernel,
    Linear,
    Matern,
    Periodic,
    RationalQuadratic,
    Residual,
    critical,
)

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
NUM_GRID = 161 if QUICK else 321
NUM_POINTS = 40 if QUICK else 60
NUM_NETWORKS = 40 if QUICK else 100
WIDTHS = (8, 32, 128) if QUICK else (8, 16, 32, 64, 128, 256, 512)


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


COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#D55E00")  # Okabe and Ito: told apart with any kind of colour blindness
INK, MUTED = "#222222", "#666666"


def tidy(ax: Axes, title: str, note: str = "") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(colors=MUTED, labelsize=9)
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    if note:
        ax.text(0.0, -0.13, note, transform=ax.transAxes, fontsize=9.5, color=MUTED, va="top")


def draw_gallery(kernels: dict[str, tuple[Kernel, str]], x: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Four functions of each prior, the same random numbers for all; returns 200 of each."""
    rows = -(-len(kernels) // 4)
    figure = Figure(figsize=(11, 2.75 * rows), layout="constrained")
    draws = {}
    for i, (ax, (title, (kernel, note))) in enumerate(
        zip(figure.subplots(rows, 4).flat, kernels.items(), strict=False)
    ):
        draws[title] = bdl.GP(kernel).sample_prior(x, 200, torch.Generator().manual_seed(4))
        ax.plot(x, draws[title][:4].T, color=COLOURS[i % 4], linewidth=1.3, alpha=0.85)
        tidy(ax, title, note)
    for ax in figure.axes[len(kernels) :]:
        ax.set_axis_off()
    show(figure, name)
    return draws


# %% [markdown]
# ## Kernels of raw inputs
# All with variance 1 at a lengthscale of 1, on the same numbers. What differs is what they believe.

# %%
x = torch.linspace(-4, 4, NUM_GRID, dtype=torch.float64).unsqueeze(-1)
plain = {
    "RBF": (RBF(lengthscale=1.0), "infinitely smooth"),
    "Matérn-5/2": (Matern(nu=2.5, lengthscale=1.0), "two derivatives"),
    "Matérn-3/2": (Matern(nu=1.5, lengthscale=1.0), "one derivative"),
    "Matérn-1/2": (Matern(nu=0.5, lengthscale=1.0), "continuous, no derivative"),
    "RationalQuadratic": (RationalQuadratic(alpha=0.3, lengthscale=1.0), "smooth, on many scales at once"),
    "Periodic": (Periodic(period=2.0, lengthscale=1.0), "repeats for ever"),
    "Linear + RBF": (0.5 * Linear() + 0.3 * RBF(lengthscale=0.7), "sums: a trend and what it leaves"),
    "Periodic x RBF": (Periodic(period=1.5) * RBF(lengthscale=3.0), "products: a cycle that drifts"),
}
draws = draw_gallery(plain, x, "kernels_plain")

# %% [markdown]
# Roughness in numbers: the mean squared step between neighbouring points of the grid, per squared distance. It stays
# finite as the grid is refined only where functions have a derivative.


# %%
def roughness(kernel: Kernel, step: float) -> float:
    """E[(f(x + step) - f(x))^2] / step^2, from the kernel itself."""
    k = kernel(torch.tensor([[0.3], [0.3 + step]], dtype=torch.float64))
    return float(k[0, 0] + k[1, 1] - 2 * k[0, 1]) / step**2


table = pd.DataFrame(
    {
        f"step {step:g}": {title: roughness(kernel, step) for title, (kernel, _) in plain.items()}
        for step in (0.1, 0.001)
    }
)
print("\nMean squared slope between points a step apart\n", table.round(2).to_string(), sep="")

# %% [markdown]
# ## Networks of infinite width
# The prior over functions of a network, once its layers are infinitely wide. It is not stationary: functions live
# around the origin, and beyond the data they go on (relu) or level off (erf, tanh). Depth and the scales of weights and
# biases are all there is to choose. `critical` gives scales with which signals pass through any depth.

# %%
w_erf, b_erf = critical("erf")
blocks = (Residual((Activation("erf"), Dense(w_std=1.5, b_std=0.3))),) * 4
networks = {
    "NNGP, relu": (NNGP(depth=1, b_std=1.0), "goes on beyond the data"),
    "NNGP, relu, 10 layers": (NNGP(depth=10, b_std=0.3), "depth leaves two rays and a bend"),
    "NNGP, erf": (NNGP(depth=1, activation="erf", w_std=4.0, b_std=2.0), "levels off"),
    "NNGP, erf, 30 layers": (NNGP(depth=30, activation="erf", w_std=w_erf, b_std=b_erf), "critical: still alive"),
    "NNGP, step": (NNGP(depth=1, activation="step", w_std=2.0, b_std=1.0), "rough, as Matérn-1/2"),
    "NNGP, sin": (NNGP(depth=1, activation="shifted_sin", w_std=2.0), "the RBF kernel in disguise"),
    "NTK, relu": (NTK(depth=1, b_std=1.0), "functions of linearised training"),
    "Residual, erf": (InfiniteWidth((Dense(), *blocks, Dense()), w_std=2.0), "any composition of layers"),
}
network_draws = draw_gallery(networks, x, "kernels_networks")

# %% [markdown]
# How fast does depth forget? Two inputs at right angles, no biases: the correlation of their outputs. Without
# biases, w_std changes only the variance of relu networks; for erf it decides between order (everything becomes alike),
# chaos, and the critical line between them.

# %%
right_angle = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64) * math.sqrt(2)
depths = (1, 2, 4, 8, 16, 32)


def correlation(depth: int, activation: str, w_std: float, b_std: float) -> float:
    k = NNGP(depth=depth, activation=activation, w_std=w_std, b_std=b_std)(right_angle)
    return float(k[0, 1] / (k[0, 0] * k[1, 1]).sqrt())


lines = {
    "relu, critical": ("relu", math.sqrt(2), 0.0),
    "erf, ordered: w_std 1, b_std 0.5": ("erf", 1.0, 0.5),
    "erf, critical": ("erf", w_erf, b_erf),
    "erf, chaotic: w_std 3, b_std 0.1": ("erf", 3.0, 0.1),
}
forgotten = {name: [correlation(depth, *scales) for depth in depths] for name, scales in lines.items()}

# %% [markdown]
# And how wide is infinite? Random networks of finite width with the same layers, drawn by `sample_network`: the
# covariance that their hidden units give, against the kernel.

# %%
deep = NNGP(depth=2, b_std=0.3)
points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
limit = deep(points)


def distance_to_limit(width: int) -> float:
    """Root mean square error of one network's covariance, as a share of the kernel's size."""
    phi = deep._features((NUM_NETWORKS,), width, 3, deep._initial(3, points), torch.Generator().manual_seed(1))(points)
    return float(((phi @ phi.mT / width - limit).square().mean() / limit.square().mean()).sqrt())


errors = [distance_to_limit(width) for width in WIDTHS]

figure = Figure(figsize=(11, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
for colour, (name, values) in zip(COLOURS, forgotten.items(), strict=True):
    left.plot(depths, values, "o-", color=colour, label=name, markersize=4)
left.set_xscale("log", base=2)
left.set_xticks(depths, [str(depth) for depth in depths])
left.set_xlabel("hidden layers", color=MUTED)
left.set_ylabel("correlation at right angles", color=MUTED)
left.legend(frameon=False, fontsize=8.5, loc=(0.5, 0.1))
tidy(left, "Depth forgets")
right.loglog(WIDTHS, errors, "o-", color=COLOURS[0], markersize=4, label="networks, 2 hidden relu layers")
right.loglog(WIDTHS, [errors[0] * (WIDTHS[0] / w) ** 0.5 for w in WIDTHS], "--", color=MUTED, label="1 / sqrt(width)")
right.set_xlabel("units a layer", color=MUTED)
right.set_ylabel("relative error of the covariance", color=MUTED)
right.legend(frameon=False, fontsize=8.5)
tidy(right, "Width converges")
show(figure, "kernels_limits")

# %% [markdown]
# ## Let the evidence choose
# Three data sets: a cycle on a trend, a smooth hill, and a function with a kink. The log evidence log p(y), with
# hyper-parameters fitted, punishes kernels that could explain too much as well as those that explain too little.


# %%
def cycle(t: torch.Tensor) -> torch.Tensor:
    return torch.sin(2 * math.pi * t / 1.7) + 0.5 * t


def hill(t: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.exp(-0.5 * t.square())


def kink(t: torch.Tensor) -> torch.Tensor:
    return 1.5 * (t - 0.5).abs()


t = torch.linspace(-4, 4, NUM_POINTS, dtype=torch.float64)
noise = 0.15 * torch.randn(NUM_POINTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
candidates = {
    "RBF": bdl.kernels.Scale(RBF()),
    "Matérn-5/2": bdl.kernels.Scale(Matern(nu=2.5)),
    "Matérn-1/2": bdl.kernels.Scale(Matern(nu=0.5)),
    "Linear + Periodic": bdl.kernels.Scale(Linear()) + bdl.kernels.Scale(Periodic(period=0.5)),
    "NNGP, relu": NNGP(depth=1),
    "NNGP, erf": NNGP(depth=1, activation="erf"),
}
evidence = pd.DataFrame(
    {
        truth.__name__: {
            name: float(
                bdl.ExactGP(bdl.GP(kernel), num_starts=3).fit(t[:, None], truth(t) + noise, seed=0).log_evidence
            )
            for name, kernel in candidates.items()
        }
        for truth in (cycle, hill, kink)
    }
)
print("\nLog evidence; a difference of 5 is a factor of 150\n", evidence.round(1).to_string(), sep="")

# %% [markdown]
# ## Where it fails
# **Evidence compares, it does not absolve.** The best of six wrong kernels is still wrong: look at the residuals, and
# at predictions held out in blocks rather than at random.
#
# **Beyond the data a kernel is all there is.** A periodic kernel repeats for ever, a stationary one returns to the mean
# within a lengthscale, a relu network goes on along a line. None of this was learned.
#
# **Deep is not better.** At 10 layers of relu the prior has one shape left; the left panel above says why.
#
# ## Exercises
# 1. Give the deep relu network biases of 1 instead of 0.3. What do its functions look like?
# 2. Fit `cycle` with `Periodic() * RBF()`. Does the evidence prefer a cycle that drifts?
# 3. Build the two-layer network of the last panel as `InfiniteWidth((Dense(), Activation("relu"), ...))` with a
#    read-out of its own scale, and check that `kernel.parameters(3)` lists it.
# 4. What happens to the right panel with `activation="step"`? And with three more layers?
#
# ## References
# - Rasmussen and Williams (2006), *Gaussian Processes for Machine Learning*, chapters 4 and 5.
# - Duvenaud (2014), *Automatic Model Construction with Gaussian Processes*, for sums and products of kernels.
# - Lee et al. (2018), *Deep Neural Networks as Gaussian Processes*, arXiv 1711.00165.
# - Schoenholz et al. (2017), *Deep Information Propagation*, arXiv 1611.01232, for order, chaos and criticality.
# - Jacot, Gabriel, Hongler (2018), *Neural Tangent Kernel*, arXiv 1806.07572.
#
# ## What this tutorial claims, checked

# %%
# Functions without a derivative get steeper without end as the grid is refined; smooth ones do not.
growth = table["step 0.001"] / table["step 0.1"]
assert growth["Matérn-1/2"] > 50
assert growth[["RBF", "Matérn-5/2", "RationalQuadratic"]].max() < 1.2
# A periodic function repeats.
period = (NUM_GRID - 1) // 4
assert (draws["Periodic"][:, period:] - draws["Periodic"][:, :-period]).abs().max() < 1e-2
# Depth forgets, and the critical line forgets most slowly among erf networks that are not chaotic.
assert forgotten["relu, critical"] == sorted(forgotten["relu, critical"])
assert forgotten["erf, ordered: w_std 1, b_std 0.5"][-1] > 0.999
assert forgotten["erf, critical"][-1] < 0.95
# Width converges as its inverse root.
rate = math.log(errors[0] / errors[-1]) / math.log(WIDTHS[-1] / WIDTHS[0])
assert 0.35 < rate < 0.65
# The kernel that says what is true of the data wins, and by far where that is something special.
assert evidence["cycle"].idxmax() == "Linear + Periodic"
assert evidence.loc["Linear + Periodic", "cycle"] > evidence["cycle"].drop("Linear + Periodic").max() + 5
assert evidence.loc["RBF", "hill"] > evidence.loc["Matérn-1/2", "hill"] + 5
assert evidence["kink"].idxmax() == "NNGP, relu"
