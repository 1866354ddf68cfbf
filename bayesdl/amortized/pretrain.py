r"""Training a network on a prior: minus log q(y | x, D), averaged over data sets D that the prior draws.

    E[-log q(y | x, D)] = E[KL(p(y | x, D) || q(y | x, D))] + const

so the best q is the exact posterior predictive of the prior, whatever the prior is, as long as it can be sampled.

Reference: Mueller, Hollmann, Pineda Arango, Grabocka, Hutter (2022), arXiv 2112.10510, section 3.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bayesdl import _checks, _doors, _random
from bayesdl._compiling import ArgumentChecksOff
from bayesdl._version import __version__
from bayesdl.amortized import _batches, _run
from bayesdl.amortized._worker import PRECISIONS, OneDevice, Worker
from bayesdl.amortized.checkpoint import Pretrained
from bayesdl.amortized.heads import loss, make_borders
from bayesdl.amortized.network import Architecture, Network
from bayesdl.amortized.schedule import Schedule
from bayesdl.errors import NumericalError, SettingError, fail

Evaluate = Callable[[Pretrained], Mapping[str, float]]

_PAUSE = 60.0  # seconds between two checkpoints
_VALUES_A_BAR = 500
_HEADS = ("head.", "probes", "refine.")  # weights of a network that belong to its head
_PATIENCE = 50  # steps in a row whose gradients are not finite


def pretrain(
    prior: Any,
    architecture: Architecture,
    schedule: Schedule | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    card: Mapping[str, Any] | None = None,
    start: Pretrained | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    num_devices: int = 1,
    precision: str = "float32",
    compile: bool = False,
    progress: bool = True,
    evaluate: Evaluate | None = None,
    max_seconds: float | None = None,
) -> Pretrained:
    """Train a network to predict as the posterior of `prior` does.

    The same call goes on where an earlier one was stopped (Ctrl-C, SIGTERM, the end of the machine): a checkpoint is
    written about every minute, and a run that was stopped and resumed gives the same weights, bit for bit, as one that
    was not. See `Schedule` for making a run longer than it was.

    Args:
        prior: Anything with `sample(batch, n, d, generator) -> Tasks`; see `bayesdl.priors.tasks`.
        architecture: The network's shape.
        schedule: Sizes of tasks and learning rates; `Schedule()` by default.
        out: Where the finished network is written; None for nowhere.
        checkpoint: A folder for the state of the run; by default `out` with ".run" behind it. None without `out`: the
            run cannot be resumed.
        card: Entries of the card beside those that are known here, or in their place: name, licence, inputs and targets
            ("standardized" by default), ranges.
        start: A trained network of the same architecture whose weights (and bars) are where this run begins: to make
            one for a prior that is near another's takes a fraction of the steps. Where only the head is of another
            kind, all but the head's weights. The card tells of it.
        seed: Of weights and tasks.
        device: Where to train and to sample the prior.
        num_devices: Processes with one device each, by Lightning Fabric (`pip install bayesdl[train]`), each with
            `schedule.batch` tasks a step. They are copies of the running script, so a script guards its other doings.
        precision: "float32", or "bfloat16" for the products inside the network.
        compile: Compile the forward pass with `torch.compile`; worth its minutes in a long run on a GPU.
        progress: A bar on standard error, with loss and whatever `evaluate` tells.
        evaluate: Called now and then with the network as it is; returns numbers for the log, such as the gaps of
            `ReferenceGap`.
        max_seconds: Stop after so many seconds of this call, with a checkpoint, and return the network as it is then.

    Raises:
        ShapeError: The prior's tasks are not of the shapes that were asked for.
        SettingError: A setting is out of range, `start` is of another architecture, or `checkpoint` holds a run with
            other settings.
        StorageError: A file of the checkpoint is damaged.
        NumericalError: Gradients were not finite many times in a row.
        KeyboardInterrupt: After Ctrl-C, and SystemExit after SIGTERM, when the checkpoint is written.

    Cost: A step of B tasks takes O(B L ((n + q) w^2 + (n^2 + n q) w)) time for n context points, q queries and L layers
    of width w. Memory is three times that of the weights, and the activations of one batch.
    """
    schedule = schedule or Schedule()
    _checks.choice("pretrain", "precision", precision, PRECISIONS)
    _checks.at_least("pretrain", "num_devices", num_devices, 1, integer=True)
    if schedule.targets == "expected":
        _check_expected(prior, architecture)
    where = torch.device(device)
    if num_devices > 1:
        worker: Worker = _doors.fabric_worker(where, num_devices, precision)
    else:
        worker = OneDevice(where, precision)
    out = None if out is None else Path(out)
    if checkpoint is None and out is not None:
        checkpoint = out.with_name(out.name + ".run")
    folder = None if checkpoint is None else Path(checkpoint)
    seed = _random.root_seed(seed)
    job = _Job(prior, architecture, schedule, seed, worker, folder, compile, evaluate)
    job.prepare(dict(card or {}), out, start)
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
    _train(job, deadline, progress)
    trained = job.snapshot()
    if out is not None and worker.rank == 0:
        trained.save(out)
    return trained


def _check_expected(prior: Any, architecture: Architecture) -> None:
    if architecture.head == "classes" or not callable(getattr(prior, "conditional", None)):
        wanted = 'targets="expected" needs a regression prior with conditional(latents, x, y, xs, num_noiseless).'
        got = f"head={architecture.head!r}, prior={type(prior).__name__}"
        fail(SettingError, "pretrain", wanted, got=got, fix='targets="drawn", or a Gaussian-process prior')


class _Job:
    """One run: what it trains, and how far it is."""

    def __init__(
        self, prior: Any, architecture: Architecture, schedule: Schedule, seed: int, worker: Worker,
        folder: Path | None, compiled: bool, evaluate: Evaluate | None,
    ) -> None:  # fmt: skip
        self.prior, self.architecture, self.schedule, self.seed = prior, architecture, schedule, seed
        self.worker, self.folder, self.compiled, self.evaluate = worker, folder, compiled, evaluate

    def prepare(self, card: dict[str, Any], out: Path | None, start: Pretrained | None) -> None:
        """Borders, card, network and optimiser, and what an earlier call has done already."""
        bars = self.architecture.outputs if self.architecture.head == "bars" else 0
        values, x_range = _batches.probe(
            self.prior, self.architecture, self.schedule, self.seed, max(_VALUES_A_BAR * bars, 20_000)
        )
        network, borders = Network(self.architecture, seed=self.seed), make_borders(values, bars) if bars else None
        begun: dict[str, Any] = {}
        if start is not None:
            begun = {"started_from": _begin(network, start)}
            borders = borders if start.borders is None else start.borders
        self.borders = None if borders is None else borders.float().to(self.worker.device)
        self.card = {**_first_card(self.prior, self.architecture, self.schedule, x_range, out), **begun, **card}
        # the card and the borders must fit before hours of training, not after
        Pretrained(copy.deepcopy(network), borders, {**self.card})
        network = network.to(self.worker.device)
        self.run = _run.new(network, self.schedule)
        probed = [float(v) for v in values[:4].double()]
        self.settings = _run.settings_of(
            self.schedule, architecture=dataclasses.asdict(self.architecture), seed=self.seed,
            prior=self.card["prior"], first_values=probed, **begun,
        )  # fmt: skip
        if self.folder is not None:
            _run.resume(self.folder, self.run, self.schedule, self.settings)
        module: torch.nn.Module = network
        if self.compiled:
            with ArgumentChecksOff():
                module = torch.compile(network, dynamic=True)
        self.module, self.optimizer = self.worker.setup(module, self.run.optimizer)

    def step(self) -> None:
        """One step of the optimiser."""
        run, schedule, worker = self.run, self.schedule, self.worker
        for group in run.optimizer.param_groups:
            group["lr"] = schedule.rate(run.step)
        total = torch.zeros((), device=worker.device)
        for part in range(schedule.accumulate):
            batch = _batches.draw(
                self.prior, self.architecture, schedule, self.seed, run.step, part, worker.rank, worker.device
            )
            with worker.apart(self.module, part + 1 < schedule.accumulate):
                traced = ArgumentChecksOff() if self.compiled else contextlib.nullcontext()
                with worker.narrow(), traced:
                    raw = self.module(
                        batch.x, batch.y, batch.xs, batch.conditions, num_appended=batch.num_appended,
                        noiseless=batch.noiseless,
                    )  # fmt: skip
                lost = loss(self.architecture, raw.float(), self.borders, batch.targets)
                worker.backward(lost / schedule.accumulate)
            total += lost.detach() / schedule.accumulate
        norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), schedule.clip)
        # one synchronisation a step: a gradient that is not finite must not reach the weights
        loss_now, norm_now = torch.stack([worker.mean(total), norm]).tolist()
        if math.isfinite(norm_now) and math.isfinite(loss_now):
            self.optimizer.step()
            run.losses, run.counted, run.skipped = run.losses + loss_now, run.counted + 1, 0
            self._average()
        else:
            self._skip(loss_now, norm_now)
        self.optimizer.zero_grad(set_to_none=True)
        run.step += 1

    @torch.no_grad()
    def _average(self) -> None:
        run = self.run
        if run.average is not None:
            # short at first, so that the initial weights do not linger
            kept = min(self.schedule.average or 0.0, (run.step + 1) / (run.step + 10))
            weights = run.network.state_dict()
            torch._foreach_lerp_(list(run.average.values()), [weights[name] for name in run.average], 1 - kept)

    def _skip(self, loss: float, norm: float) -> None:
        self.run.skipped += 1
        if self.run.skipped >= _PATIENCE:
            wanted = f"gradients must be finite, if not {_PATIENCE} times in a row."
            got = f"loss {loss}, norm of the gradient {norm} at step {self.run.step}"
            fix = "a smaller learning_rate, or look for infinite targets of the prior"
            fail(NumericalError, "pretrain", wanted, got=got, fix=fix)

    def snapshot(self) -> Pretrained:
        """The network as it is, with its card."""
        run = self.run
        network = copy.deepcopy(run.network)
        network.load_state_dict(run.weights())
        done = {
            "steps": run.step, "finished": run.step >= self.schedule.num_steps, "seconds": round(run.seconds, 1),
            "log": copy.deepcopy(run.log),
        }  # fmt: skip
        return Pretrained(network, self.borders, {**self.card, **done})

    def record(self) -> dict[str, float]:
        """A new line of the log."""
        run = self.run
        line = {"step": run.step, "seconds": round(run.seconds, 1), "learning_rate": self.schedule.rate(run.step - 1)}
        line["loss"] = run.losses / run.counted if run.counted else math.nan
        line = {key: value for key, value in line.items() if math.isfinite(value)}  # JSON has no NaN
        run.losses, run.counted = 0.0, 0
        if self.evaluate is not None and self.worker.rank == 0:
            line |= {key: round(float(value), 6) for key, value in self.evaluate(self.snapshot()).items()}
        run.log.append(line)
        return line

    def save(self, *, before_decay: bool = False) -> None:
        """A checkpoint, where one is wanted."""
        if self.folder is not None and self.worker.rank == 0:
            _run.save(self.folder, self.run, self.schedule, self.settings, before_decay=before_decay)


def _train(job: _Job, deadline: float, progress: bool) -> None:
    """Steps until the run is over, its time is up, or somebody stops it."""
    run, schedule = job.run, job.schedule
    every = max(1, schedule.num_steps // schedule.num_evaluations)
    saved = time.monotonic()
    with _Stop() as stop, _Bar(schedule.num_steps, run, progress and job.worker.rank == 0) as bar:
        while run.step < schedule.num_steps:
            if schedule.decay == "linear" and run.step == schedule.stable_until:
                job.save(before_decay=True)
            began = time.monotonic()
            job.step()
            run.seconds += time.monotonic() - began
            line = job.record() if run.step % every == 0 or run.step == schedule.num_steps else None
            bar.update(line)
            late = time.monotonic() >= deadline
            if stop.signal or late or time.monotonic() - saved > _PAUSE:
                job.save()
                saved = time.monotonic()
            if stop.signal:
                stop.leave()
            if late:
                break
        else:
            job.save()


class _Stop:
    """Ctrl-C and SIGTERM wait for the end of a step; a second one does not."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():  # handlers can be set there only
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.signal:
            self.leave()
        self.signal = number

    def leave(self) -> None:
        """Go as the signal asks."""
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


class _Bar:
    """A progress bar on standard error, or nothing."""

    def __init__(self, total: int, run: _run.Run, enabled: bool) -> None:
        self._bar = None
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=run.step, desc="pretrain", file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, line: dict[str, float] | None) -> None:
        """One step more, and what was found out at it."""
        if self._bar is None:
            return
        if line is not None:
            shown = {k: v for k, v in line.items() if k not in ("step", "seconds", "learning_rate")}
            self._bar.set_postfix_str(", ".join(f"{key} {value:.3f}" for key, value in list(shown.items())[:4]), False)
        self._bar.update(1)


def _begin(network: Network, start: Pretrained) -> dict[str, Any]:
    """Give `network` the weights of `start`; returns what the card says of it."""
    theirs, ours = start.network.architecture, network.architecture
    if theirs == ours:
        network.load_state_dict(start.network.state_dict())
    elif "classes" not in (ours.head, theirs.head) and ours == dataclasses.replace(
        theirs, head=ours.head, outputs=ours.outputs, kernel=ours.kernel, refinements=ours.refinements
    ):
        trunk = {name: t for name, t in start.network.state_dict().items() if not name.startswith(_HEADS)}
        network.load_state_dict({**network.state_dict(), **trunk})
    else:
        fix = "architecture=start.network.architecture, or another head on the same trunk"
        fail(SettingError, "pretrain", "start must have the architecture of this run.", got=repr(theirs), fix=fix)
    return {name: start.card.get(name) for name in ("name", "prior", "steps")}


def _first_card(
    prior: Any, architecture: Architecture, schedule: Schedule, x_range: tuple[float, float], out: Path | None
) -> dict[str, Any]:
    """What a run knows of the network that it will make."""
    low, high = schedule.d or (1, architecture.max_inputs)
    fields = dataclasses.asdict(schedule)
    return {
        "name": out.stem if out is not None else "unnamed",
        "task": "classification" if architecture.head == "classes" else "regression",
        "prior": _batches.describe(prior),
        "ranges": {"n": [schedule.n_min, schedule.n_max], "d": [low, high], "x": [round(v, 4) for v in x_range]},
        "inputs": "standardized",
        "targets": "standardized",
        "noise_token": bool(architecture.num_conditions and schedule.noiseless_share > 0),
        "schedule": {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()},
        "bayesdl": __version__,
        "torch": torch.__version__,
    }
