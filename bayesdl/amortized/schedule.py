"""How a network is trained: sizes of tasks, learning rate, and what is done on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bayesdl import _checks
from bayesdl.errors import SettingError, fail


@dataclass(frozen=True)
class Schedule:
    r"""Settings of a training run.

    A step draws `batch` tasks of n context points and `num_queries` queries, with one n and one d for all of them, and
    takes one step of the optimiser on the mean of -log q(y | x, context) over the queries.

    The learning rate rises linearly over `warmup_share` of the run. Then, with decay="cosine", it falls to 0 along half
    a cosine. With decay="linear" it stays where it is, and falls linearly to 0 over the last `decay_share` of the run;
    such a run can be made longer after it is over (or cut short on the way) by the same call with another `num_steps`:
    it goes on from the moment before the fall.

    Args:
        num_steps: Steps of the optimiser.
        batch: Tasks a step, and a process where there are several.
        n_max: The largest context.
        n_min: The smallest context, 0 or more.
        num_queries: Queries of a task.
        d: Smallest and largest number of input columns; one number is drawn a step. None for that of the architecture.
        rows: None: every task has n + num_queries points. A number: every task has so many, in the order in which the
            prior gives them; the first n are the context, and queries are drawn among the others (learning curves).
        context: "log-uniform": n is drawn with probability falling as 1 / (n + 1), since predictions from few points
            are the last to become good; or "uniform".
        even_work: Draw more tasks a step where n is small, so that every step has about the same number of points (up
            to 8 times `batch`): steadier gradients at small n for the same time.
        optimizer: "adamw"; or "muon", which makes the steps of all matrices inside the blocks nearly orthogonal and
            leaves the rest to AdamW: from scratch it needs fewer steps, each of which costs a fifth more
            (`benchmarks/pfn_optimizers.py`). Its learning rate is some two to six times that of AdamW.
        learning_rate: Its peak.
        warmup_share: Share of the run over which it rises.
        decay: "cosine" or "linear".
        decay_share: Share of the run over which it falls, for "linear".
        weight_decay: Of the optimiser.
        betas: Of AdamW, and of its part beside Muon.
        clip: Largest norm of a gradient; longer ones are shortened.
        accumulate: Gradients, each of a fresh batch, averaged before a step.
        average: None, or the decay a step (0.999, say) of the moving average of weights that is returned and evaluated.
        appended_share: Share of the batches in which the last points of the context go through `Network.append`: a
            random number of them, half of the time with their values free of noise. 0 where joint draws and cheap
            updates are not needed.
        noiseless_share: Share of the tasks that ask for values without noise, by condition 0; needs num_conditions > 0.
        targets: "drawn": the loss of a query is -log q of one target. "expected": its mean over the law of the target
            given the context and the latents of its task, by eight stratified draws, for priors that know that law
            (`conditional`: Gaussian and Student-t processes, HEBO+, learning curves). The objective is the same with
            less noise in its gradient (`benchmarks/pfn_targets.py`), for one more factorisation a task.
        num_evaluations: Times that the log is written, and `evaluate` is called.

    Raises:
        SettingError: A number is out of its range.
    """

    num_steps: int = 10_000
    batch: int = 32
    n_max: int = 100
    n_min: int = 0
    num_queries: int = 50
    d: tuple[int, int] | None = None
    rows: int | None = None
    context: str = "log-uniform"
    even_work: bool = False
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    decay: str = "cosine"
    decay_share: float = 0.25
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    accumulate: int = 1
    average: float | None = None
    appended_share: float = 0.5
    noiseless_share: float = 0.5
    targets: str = "drawn"
    num_evaluations: int = 50

    def __post_init__(self) -> None:
        least = {"num_steps": 1, "batch": 1, "n_max": 1, "n_min": 0, "num_queries": 1, "accumulate": 1}
        for name, value in {**least, "num_evaluations": 1}.items():
            _checks.at_least("Schedule", name, getattr(self, name), value, integer=True)
        for name in ("learning_rate", "clip"):
            _checks.inside("Schedule", name, getattr(self, name), 0, math.inf)
        for name in ("warmup_share", "decay_share", "weight_decay", "appended_share", "noiseless_share"):
            _checks.at_least("Schedule", name, getattr(self, name), 0)
        for name in ("appended_share", "noiseless_share"):
            if getattr(self, name) > 1:
                fail(SettingError, "Schedule", f"{name} is a share.", got=repr(getattr(self, name)), fix=f"{name}=0.5")
        if self.warmup_share + (self.decay_share if self.decay == "linear" else 0) > 1:
            got = f"warmup_share={self.warmup_share}, decay_share={self.decay_share}"
            fail(SettingError, "Schedule", "shares of one run add up to at most 1.", got=got, fix="warmup_share=0.05")
        _checks.choice("Schedule", "context", self.context, ("log-uniform", "uniform"))
        _checks.choice("Schedule", "optimizer", self.optimizer, ("adamw", "muon"))
        _checks.choice("Schedule", "decay", self.decay, ("cosine", "linear"))
        _checks.choice("Schedule", "targets", self.targets, ("drawn", "expected"))
        for name, value in (("average", self.average), *(("betas", beta) for beta in self.betas)):
            if value is not None and not 0 <= value < 1:
                fail(SettingError, "Schedule", f"{name} must lie in [0, 1).", got=repr(value), fix="0.9, say")
        if self.n_min > self.n_max or (self.rows is not None and self.rows <= self.n_max):
            wanted = "n_min <= n_max < rows must hold."
            got = f"n_min={self.n_min}, n_max={self.n_max}, rows={self.rows}"
            fail(SettingError, "Schedule", wanted, got=got, fix=f"n_max={self.n_min + 1}, rows={self.n_min + 2}, say")
        if self.d is not None and not (len(self.d) == 2 and 1 <= self.d[0] <= self.d[1]):
            fail(SettingError, "Schedule", "d must be (smallest, largest).", got=repr(self.d), fix="d=(1, 5)")

    @property
    def stable_until(self) -> int:
        """The first step at which the learning rate falls, with decay="linear"."""
        return self.num_steps - math.floor(self.decay_share * self.num_steps)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., num_steps - 1."""
        warm = math.ceil(self.warmup_share * self.num_steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.decay == "cosine":
            share = (step - warm) / max(1, self.num_steps - warm)
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        left = (self.num_steps - step) / max(1, self.num_steps - self.stable_until)
        return self.learning_rate * min(1.0, left)
