r"""Simulation-based calibration: does a sampler draw from the posterior, on average over the prior's own data sets?

Draw theta from the prior and y from p(y | theta). Then theta is one more draw of the posterior given y, so that its
rank among L independent draws of a right sampler is uniform on 0..L, whatever the model. A sampler whose draws are too
narrow, too wide or shifted gives ranks that are not.

    def prior(generator):
        theta = torch.randn((), generator=generator, dtype=torch.float64)
        y = theta + torch.randn(5, generator=generator, dtype=torch.float64)
        return {"theta": theta}, y

    def family(y):
        def log_density(q):
            return -0.5 * (q[..., 0].square() + (y.unsqueeze(-2) - q).square().sum(-1))
        return bdl.LogDensity(log_density, dim=1, names=("theta",))

    result = bdl.testing.sbc(bdl.testing.SampledDensity(family, sampler="nuts"), prior)
    result.passed, result.table(), result.plot()
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bayesdl import _checks, _storage
from bayesdl._random import Seed, child_seeds
from bayesdl.errors import ConvergenceWarning, NumericalWarning, SettingError, ShapeError, StorageError, fail
from bayesdl.evaluation.sbc import SBCResult
from bayesdl.interop.arviz import convergence
from bayesdl.testing._sbc_problems import SampledDensity

Truth: TypeAlias = Mapping[str, Tensor]
Simulator: TypeAlias = Callable[[torch.Generator], tuple[Truth, Any]]


def sbc(
    engine: Any,
    prior: Any,
    num_replications: int = 200,
    num_draws: int = 100,
    *,
    seed: Seed = 0,
    batch_size: int | None = 20,
    level: float = 0.99,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> SBCResult:
    """Rank known truths among posterior draws, `num_replications` times: uniform ranks mean that the draws are right.

    The draws of a chain are correlated, and correlated draws give ranks that are not uniform even where the sampler is
    right. Each replication therefore keeps evenly spaced draws, twice the autocorrelation time apart: half as many as
    the smallest bulk ESS of its quantities, at most `num_draws`.

    Args:
        engine: What is tested. Anything with `fit(*data, seed=...)`, or a function of the same arguments. Its result
            gives draws: a mapping from names to (*s, C, N, *event), C chains of N draws, where *s is the axis of the
            batch; a `Chains`; or a posterior, of which `prior.quantities(posterior, *data)` makes such a mapping.
        prior: A function of a `torch.Generator` that gives one truth, a mapping from names to tensors, and the data
            simulated from it, a tensor or a tuple of tensors; or an object whose method `simulate` does that, such as
            `testing.NetworkPrior` and `testing.ProcessPrior`.
        num_replications: Truths drawn and fits made, R.
        num_draws: Draws that a truth is ranked among, at most.
        seed: Replication i sees the same truth and data whatever R.
        batch_size: Data sets fitted at once, stacked along a new first axis of the data: the engines and samplers of
            this package take such batches, and many small problems cost little more than one. None fits one data set
            at a time, without that axis (`SampledDensity` always has it). Data sets of a batch share their random
            numbers, which widens the curve of ranks by a share of about batch_size / (2 ESS): keep it small beside the
            number of effective draws.
        level: Probability of the band, for each quantity.
        checkpoint: A folder. Every batch is written there when it is done; a run that finds it again goes on behind
            the last one, also after a kill, and with a larger `num_replications`.
        progress: Show a bar on standard error.

    Returns:
        Ranks, p-values, the band and a plot. `table()` and `warnings` tell how well the chains had mixed.

    Raises:
        SettingError: A setting is out of range; draws lack a quantity of the truth; the engine standardises although
            the prior is not in standardised units.
        ShapeError: Draws of a quantity do not have the shape of the truth.
        StorageError: The folder holds another run.

    Warns:
        ConvergenceWarning: In more than 5 % of the replications the chains disagree (R-hat above 1.1), or hold fewer
            than 40 effective draws.

    Cost: R fits.

    Reference: Talts, Betancourt, Simpson, Vehtari, Gelman (2018), arXiv 1804.06788; the band is that of
    `evaluation.ecdf_band`.
    """
    _check_settings(num_replications, num_draws, batch_size, level)
    if batch_size is None and isinstance(engine, SampledDensity):
        batch_size = 1
    if hasattr(prior, "check"):
        prior.check(engine)
    ledger = _Ledger(checkpoint, engine, prior, num_draws, batch_size)
    bar = _bar(num_replications, progress)
    try:
        names, parts = _replicate(engine, prior, num_replications, num_draws, seed, batch_size, ledger, bar)
    finally:
        bar.close()
    result = SBCResult(names, *(torch.cat(column) for column in zip(*parts, strict=True)), level)
    _warn(result)
    return result


def _replicate(
    engine: Any,
    prior: Any,
    num_replications: int,
    num_draws: int,
    seed: Seed,
    batch_size: int | None,
    ledger: _Ledger,
    bar: Any,
) -> tuple[tuple[str, ...], list[_Part]]:
    """Names of the quantities, and the ranks of one batch after another."""
    simulate_root, fit_root, rank_root = child_seeds(seed, 3)
    simulate, size = getattr(prior, "simulate", prior), batch_size or 1
    seeds, rank_seeds = child_seeds(simulate_root, num_replications), child_seeds(rank_root, num_replications)
    starts = range(0, num_replications, size)
    parts: list[_Part] = []
    for start, fit_seed in zip(starts, child_seeds(fit_root, len(starts)), strict=True):
        stop = min(start + size, num_replications)
        simulated = [simulate(torch.Generator().manual_seed(s)) for s in seeds[start:stop]]
        truth = _truth([theta for theta, _ in simulated])
        part = ledger.read(start, stop, truth)
        if part is None:
            data = [d if isinstance(d, tuple) else (d,) for _, d in simulated]
            draws = _posterior_draws(engine, prior, data, fit_seed, batch_size)
            part = _rank(truth, draws, rank_seeds[start:stop], num_draws)
            ledger.write(start, stop, truth, part)
        parts.append(part)
        bar.update(stop - start)
    return _flat_names(truth), parts


class _Part(NamedTuple):
    """What is kept of some replications; see `SBCResult`."""

    ranks: Tensor
    num_ranked: Tensor
    values: Tensor
    ess: Tensor
    rhat: Tensor


def _check_settings(num_replications: int, num_draws: int, batch_size: int | None, level: float) -> None:
    _checks.at_least("sbc", "num_replications", num_replications, 2, integer=True)
    _checks.at_least("sbc", "num_draws", num_draws, 1, integer=True)
    _checks.inside("sbc", "level", level, 0.0, 1.0)
    if batch_size is not None:
        _checks.at_least("sbc", "batch_size", batch_size, 1, integer=True)


def _truth(each: list[Truth]) -> dict[str, Tensor]:
    """The truths of some replications, stacked: (R, *event) by name."""
    first = each[0]
    if not first:
        fail(SettingError, "sbc", "prior must name a quantity at least.", got="none", fix='return {"theta": theta}, y')
    return {name: torch.stack([torch.as_tensor(t[name]).detach() for t in each]) for name in first}


def _flat_names(truth: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(
        name + (f"[{', '.join(map(str, place))}]" if place else "")
        for name, value in truth.items()
        for place in np.ndindex(*value.shape[1:])
    )


def _posterior_draws(
    engine: Any, prior: Any, data: list[tuple[Tensor, ...]], seed: int, batch_size: int | None
) -> dict[str, Tensor]:
    """Draws by name, each (R, C, N, *event), of the R data sets given."""
    fit = engine.fit if hasattr(engine, "fit") else engine
    together = data[0] if batch_size is None else tuple(torch.stack(parts) for parts in zip(*data, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", NumericalWarning)
        posterior = fit(*together, seed=seed)
    if hasattr(prior, "quantities"):
        draws = prior.quantities(posterior, *together)
    else:
        draws = posterior if isinstance(posterior, Mapping) else getattr(posterior, "values", None)
    if not isinstance(draws, Mapping):
        wanted = "the engine must give draws by name, or prior.quantities(posterior, *data) make them of it."
        fail(SettingError, "sbc", wanted, got=type(posterior).__name__, fix="return a mapping from names to tensors")
    draws = {name: value.detach() for name, value in draws.items()}
    return {name: value.unsqueeze(0) for name, value in draws.items()} if batch_size is None else draws


def _rank(truth: dict[str, Tensor], draws: Mapping[str, Tensor], seeds: list[int], num_draws: int) -> _Part:
    """Rank every quantity of every replication among thinned draws."""
    columns, targets = [], []
    for name, value in truth.items():
        if name not in draws:
            wanted = f"draws of {name!r} are needed, to rank its truth among them."
            fail(SettingError, "sbc", wanted, got=f"draws of {sorted(draws)}", fix="use the same names for both")
        got, wanted_shape = tuple(draws[name].shape), (len(value), "chains", "draws", *value.shape[1:])
        if len(got) != len(wanted_shape) or got[0] != len(value) or got[3:] != tuple(value.shape[1:]):
            shape = f"({', '.join(map(str, wanted_shape))})"
            fix = "the first axis is that of the data sets; batch_size=None leaves it out"
            fail(ShapeError, "sbc", f"draws of {name!r} must have shape {shape}.", got=str(got), fix=fix)
        columns.append(draws[name].double().cpu().flatten(3) if len(got) > 3 else draws[name].double().cpu()[..., None])
        targets.append(value.double().cpu().reshape(len(value), -1))
    x, target = torch.cat(columns, -1), torch.cat(targets, -1)  # (R, C, N, Q), (R, Q)
    found = convergence(x.movedim(0, 2))
    ess, rhat = (torch.as_tensor(found[name]) for name in ("ess_bulk", "rhat"))
    rows = [_rank_one(*each, num_draws) for each in zip(target, x.flatten(1, 2), ess, seeds, strict=True)]
    ranks, num_ranked, values = (torch.stack(column) for column in zip(*rows, strict=True))
    return _Part(ranks, num_ranked, values, ess, rhat)


def _rank_one(target: Tensor, draws: Tensor, ess: Tensor, seed: int, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks (Q), the number of draws ranked, and the values (Q) of one replication: target (Q), draws (S, Q)."""
    source = torch.Generator().manual_seed(seed)
    total = len(draws)
    # a quantity that never moves has no ESS; it does not hold the others back, and its ranks will tell
    usable = ess[~ess.isnan()]
    least = float(usable.min()) if len(usable) else float(total)
    num = int(max(1, min(num_draws, least // 2, total)))
    offset = torch.rand((), generator=source, dtype=torch.float64)
    chosen = ((torch.arange(num, dtype=torch.float64) + offset) * (total / num)).long().clamp(max=total - 1)
    below = (draws[chosen] < target).sum(0)
    ties = (draws[chosen] == target).sum(0)
    noise = torch.rand(target.shape, generator=source, dtype=torch.float64)
    return below, torch.tensor(num), (below + noise * (1 + ties)) / (num + 1)


class _Ledger:
    """The folder of finished batches; without one nothing is kept."""

    def __init__(
        self, folder: str | Path | None, engine: Any, prior: Any, num_draws: int, batch_size: int | None
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        described = {"engine": _describe(engine), "prior": _describe(prior)}
        self._record = {**described, "num_draws": num_draws, "batch_size": batch_size}

    def read(self, start: int, stop: int, truth: dict[str, Tensor]) -> _Part | None:
        """The replications start..stop-1 where they are done; a file that is not whole counts as not there."""
        if self._folder is None or not self._path(start, stop).is_file():
            return None
        try:
            record, tensors = _storage.read(self._path(start, stop))
        except StorageError:
            return None
        found = {name: record.get(name) for name in self._record}
        same = {f"truth.{name}" for name in truth} | set(_Part._fields) == set(tensors)
        same = same and all(torch.equal(tensors[f"truth.{name}"], value.cpu()) for name, value in truth.items())
        if found != self._record or not same:
            differs = [name for name in self._record if found[name] != self._record[name]] or ["the seed or the prior"]
            wanted = f"{self._folder} must be empty, or hold the same run."
            fail(StorageError, "sbc", wanted, got=f"one that differs in {', '.join(differs)}", fix="name a new folder")
        return _Part(*(tensors[name] for name in _Part._fields))

    def write(self, start: int, stop: int, truth: dict[str, Tensor], part: _Part) -> None:
        """Keep the replications start..stop-1, whole or not at all."""
        if self._folder is not None:
            truths = {f"truth.{name}": value for name, value in truth.items()}
            _storage.write(self._path(start, stop), self._record, {**truths, **part._asdict()})

    def _path(self, start: int, stop: int) -> Path:
        assert self._folder is not None
        return self._folder / f"replications-{start:06d}-{stop:06d}.safetensors"


def _describe(thing: Any) -> str:
    """Class and settings, without the addresses of functions, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _bar(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="SBC", unit="fit", dynamic_ncols=True, disable=not enabled)


def _warn(result: SBCResult) -> None:
    num = result.num_replications
    apart = int((result.rhat.nan_to_num(nan=0.0).amax(1) > 1.1).sum())
    few = int((result.ess.nan_to_num(nan=0.0).amin(1) < 40).sum())
    told = [
        (apart, f"{apart} of {num} replications have chains that disagree (R-hat above 1.1): warm up and run longer"),
        (few, f"{few} of {num} replications have fewer than 40 effective draws: run longer"),
    ]
    doubts = [text for count, text in told if count > math.ceil(0.05 * num)]
    if doubts:
        text = "sbc: ranks may say more about the length of the chains than about the sampler.\n  "
        warnings.warn(text + "\n  ".join(doubts), ConvergenceWarning, stacklevel=3)
