# %% [markdown]
# # What is a slope worth?
#
# A simulator with an adjoint, or any model under automatic differentiation, gives its gradient with its value. A
# Gaussian process takes both, because the slope of a Gaussian function is Gaussian together with its values: Cov[f(x),
# f'(z)] is the slope of the kernel. So how many runs does the gradient save?
#
# The answer: from a dozen points in two dimensions on, their gradients take the error to a half and less. With fewer
# than it takes to see the function at all they help less. And where it fails: a slope is local. Where a function has
# fast ripples on a slow hill, the slopes are those of the ripples, and a smooth kernel that believes them is misled.
#
# The picture goes to the folder that BAYESDL_FIGURES names, by default `tutorials/figures`.

# %%
from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import bayesdl as bdl
from bayesdl.posterior import function_gradients

# %% [markdown]
# All sizes stand here. `BAYESDL_QUICK=1` shrinks them.

# %%
QUICK = os.environ.get("BAYESDL_QUICK") == "1"
SIZES = (6, 12, 18) if QUICK else (4, 6, 9, 12, 18, 27, 40)
NUM_SETS = 3 if QUICK else 8
NUM_FUNCTIONS = 30


# %% [markdown]
# The function is smooth, of two inputs; its gradient comes from autograd, as it would from an adjoint.


# %%
def hill(x: Tensor) -> Tensor:
    """Two crossing waves."""
    return torch.sin(3 * x[..., 0]) * torch.cos(2 * x[..., 1]) + 0.5 * x[..., 0]


def with_gradient(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradients at the rows of x."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    (slopes,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach(), slopes


generator = torch.Generator().manual_seed(0)
x_test = 2 * torch.rand(200, 2, generator=generator, dtype=torch.float64)
sets = [2 * torch.rand(max(SIZES), 2, generator=generator, dtype=torch.float64) for _ in range(NUM_SETS)]

# %% [markdown]
# Prior draws of the kernel have slopes, too. `function_gradients` differentiates functions that were drawn from any
# posterior, of a network as well as of a GP. A Matérn-1/2 kernel would be refused: its functions have none.

# %%
gp = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)))
engine = bdl.GradientGP(gp, num_starts=2)

# %% [markdown]
# ## The answer
#
# The same points with and without their gradients: root mean square error of the mean at 200 other points, median over
# data sets. Noise variances of values and of slopes are learned by their joint evidence.

# %%
errors: dict[str, list[float]] = {"values": [], "values and slopes": []}
with warnings.catch_warnings():
    warnings.simplefilter("ignore", bdl.errors.ConvergenceWarning)
    for n in SIZES:
        for name in errors:
            found = []
            for points in sets:
                x = points[:n]
                y, slopes = with_gradient(hill, x)
                posterior = engine.fit(x, y, slopes if name != "values" else None, seed=0)
                off = posterior.predict(x_test, noise=False).mean - hill(x_test)
                found.append(float(off.square().mean().sqrt()))
            errors[name].append(sorted(found)[len(found) // 2])
for name, values in errors.items():
    print(f"{name:18s}", "  ".join(f"n={n}: {v:.3f}" for n, v in zip(SIZES, values, strict=True)))

# %% [markdown]
# ## Slopes of what was learned
#
# `predict_gradient` gives the belief about the gradient, whether or not one was observed; draws of it come from drawn
# functions.

# %%
x = sets[0][: SIZES[1]]
y, slopes = with_gradient(hill, x)
posterior = engine.fit(x, y, slopes, seed=0)
belief = posterior.predict_gradient(x_test)
truth = with_gradient(hill, x_test)[1]
inside = float(((belief.mean - truth).abs() < 1.96 * belief.stddev).double().mean())
drawn = function_gradients(posterior.functions(NUM_FUNCTIONS, seed=1), x_test[:20])
print(f"the true slope lies in the 95 % interval at {inside:.0%} of the points; draws {tuple(drawn.shape)}")

# %% [markdown]
# ## Where it fails
#
# Ripples of a fiftieth of the height turn forty times faster than the hill. To the eye and to the values they are
# nothing; the slopes are mostly theirs. A fit that takes them in loses the hill, whatever it learns of their noise.


# %%
def rippled(x: Tensor) -> Tensor:
    """The hill with fine ripples."""
    return hill(x) + 0.02 * torch.sin(120 * x[..., 0]) + 0.02 * torch.cos(120 * x[..., 1])


x = sets[0][: SIZES[-1]]
y, slopes = with_gradient(rippled, x)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", bdl.errors.ConvergenceWarning)
    fit = engine.fit(x, y, slopes, seed=0)
misled = float((fit.predict(x_test, noise=False).mean - hill(x_test)).square().mean().sqrt())
print(f"error with the slopes of ripples: {misled:.3f}, with those of the hill: {errors['values and slopes'][-1]:.3f}")

# %%
figure = Figure(figsize=(5.2, 3.2), layout="constrained")
axes = figure.subplots()
for (name, values), marker in zip(errors.items(), "os", strict=True):
    axes.plot(SIZES, values, marker=marker, label=name)
axes.set(xscale="log", yscale="log", xlabel="points", ylabel="error of the mean")
axes.set_xticks(SIZES, [str(n) for n in SIZES])
axes.minorticks_off()
axes.legend(frameon=False)
folder = os.environ.get("BAYESDL_FIGURES") or (None if QUICK else str(Path(__file__).parent / "figures"))
if folder:
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "derivatives.png", dpi=150)

# %% [markdown]
# ## Exercises
#
# 1. Give gradients at half of the points only (NaN elsewhere). Is half the information lost?
# 2. Take `Matern(nu=1.5)`: its functions have slopes, rough ones. What are observed slopes worth now?
# 3. Drive `qLogNoisyExpectedImprovement` by `posterior.to_botorch()` on this hill, with and without gradients.
#
# References: Rasmussen, Williams (2006), section 9.4; Solak et al. (2003); Wu et al. (2017), arXiv 1703.04389.

# %%
last = [values[-1] for values in errors.values()]
assert last[1] < last[0] / 2, "slopes must at least halve the error"
assert inside > 0.8, "the belief about slopes must hold the truth"
assert misled > 2 * last[1], "slopes of ripples must mislead"
