"""Engines that fit nothing, for tests of what happens around a fit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from bayesdl.distributions import Bernoulli, Categorical, Empirical, GaussianMixture, Normal
from bayesdl.errors import NumericalError, NumericalWarning


class FakePosterior:
    """N(mean of y + bias, (width sd of y)^2) everywhere, in the form that `kind` names; or constant class shares."""

    def __init__(self, y, kind, width, bias, diagnostics):
        self.y, self.kind, self.width, self.bias, self.diagnostics = y, kind, width, bias, diagnostics

    def predict(self, x, *, noise=True):
        shape = (*x.shape[:-1], *self.y.shape[1:])
        if self.kind == "binary":
            return Bernoulli(probs=(self.y.double().mean() + self.bias).clamp(0.01, 0.99).expand(shape))
        if self.kind == "multiclass":
            counts = torch.bincount(self.y.long(), minlength=3).double() + self.width
            return Categorical(probs=(counts / counts.sum()).expand(*shape, 3))
        loc = (self.y.double().mean(0) + self.bias).expand(shape)
        scale = (self.width * self.y.double().std(0)).expand(shape)
        if self.kind == "mixture":
            return GaussianMixture(torch.stack([loc - 0.1, loc + 0.1], -1), torch.stack([scale, scale], -1))
        if self.kind == "draws":
            return Empirical(Normal(loc, scale).sample((50,), seed=0).movedim(0, -1))
        return Normal(loc, scale)

    def save(self, path):
        Path(path).write_text("a posterior", encoding="utf-8")


@dataclass(frozen=True)
class FakeEngine:
    """Counts its fits in the file `log`; fails or warns for the seeds it is told."""

    log: str
    kind: str = "normal"
    width: float = 1.0
    bias: float = 0.0
    fail_on: tuple[int, ...] = ()
    warn_on: tuple[int, ...] = ()
    interrupt_on: tuple[int, ...] = ()
    progress: bool = False

    def fit(self, x, y, *, seed=0):
        with Path(self.log).open("a", encoding="utf-8") as file:
            file.write(f"{self.kind} {seed} {len(x)}\n")
        if seed in self.interrupt_on:
            raise KeyboardInterrupt
        if seed in self.fail_on:
            raise NumericalError("FakeEngine.fit: it must not be <asked> to fail.\n  got  the seed\n  fix  another")
        if seed in self.warn_on:
            warnings.warn("jitter had to grow to 1e-4", NumericalWarning, stacklevel=2)
        diagnostics = {
            "engine": "FakeEngine",
            "seconds": 1.5,
            "num_data": len(x),
            "rhat": torch.tensor(1.01),
            "ess_bulk": [812.0, 90.0],
            "divergences": [0, 3],
            "converged": True,
            "trace": {"log_density": [[-5.0, -2.0, -1.0, float("nan"), -1.1]] * 2},
        }
        return FakePosterior(y, self.kind, self.width, self.bias, diagnostics)
