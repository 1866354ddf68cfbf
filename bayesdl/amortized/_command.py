"""`bayesdl pretrain`: a prior in a file, a network in another."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from bayesdl.amortized._worker import PRECISIONS
from bayesdl.amortized.checkpoint import Pretrained
from bayesdl.amortized.network import HEADS, Architecture
from bayesdl.amortized.pretrain import pretrain
from bayesdl.amortized.schedule import Schedule
from bayesdl.errors import SettingError, fail

EPILOG = """The file defines `prior`, an object with sample(batch, n, d, generator): prior = bdl.priors.HyperGP(), say.
It may define `architecture`, `schedule`, `card` (a dict) and `evaluate` too, which the options then override. A run
that was stopped goes on where it was with the same command; its state stands in OUT.run. With several devices the
command runs once on each."""

# option -> (class, field, type, help); absent options leave the file's choice, or the default, as it is
_OPTIONS = (
    ("--steps", "schedule", "num_steps", int, "steps of the optimiser"),
    ("--batch", "schedule", "batch", int, "tasks a step"),
    ("--n-max", "schedule", "n_max", int, "the largest context"),
    ("--queries", "schedule", "num_queries", int, "queries a task"),
    ("--targets", "schedule", "targets", str, "drawn, or expected where the prior knows their law (default: drawn)"),
    ("--optimizer", "schedule", "optimizer", str, "adamw or muon (default: adamw)"),
    ("--learning-rate", "schedule", "learning_rate", float, "its peak"),
    ("--accumulate", "schedule", "accumulate", int, "batches whose gradients are averaged before a step"),
    ("--max-inputs", "architecture", "max_inputs", int, "the largest number of input columns (default: 1)"),
    ("--head", "architecture", "head", str, f"{', '.join(HEADS)} (default: mixture)"),
    ("--outputs", "architecture", "outputs", int, "Gaussians, processes, bars or classes (default: 8)"),
    ("--kernel", "architecture", "kernel", str, "of the processes, for --head kernel: matern-5/2, say"),
    ("--refinements", "architecture", "refinements", int, "steps of the processes along their evidence (default: 0)"),
    ("--width", "architecture", "width", int, "length of a token"),
    ("--layers", "architecture", "num_layers", int, "blocks of attention"),
    ("--hidden", "architecture", "hidden", int, "width of the feed-forward layers"),
)
_PARTS = ("architecture", "schedule", "card", "evaluate")
_ARCHITECTURE = {"max_inputs": 1, "head": "mixture", "outputs": 8, "num_conditions": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--prior", type=Path, required=True, metavar="prior.py", help="a Python file that defines `prior`")
    add("--out", type=Path, required=True, metavar="FILE", help="where to write the network, my.pfn say")
    for option, _, name, kind, text in _OPTIONS:
        add(option, dest=name, type=kind, metavar=name.upper(), help=text)
    add("--checkpoint", type=Path, metavar="FOLDER", help="state of the run (default: OUT.run)")
    add("--start", type=Path, metavar="FILE", help="a trained network of the same shape to begin with")
    add("--seed", type=int, default=0, help="seed of weights and tasks (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--num-devices", type=int, default=1, metavar="N", help="processes side by side, by Lightning Fabric")
    add("--precision", choices=PRECISIONS, default="float32", help="of the products (default: %(default)s)")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--max-seconds", type=float, metavar="SECONDS", help="stop with a checkpoint after this time")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Carry the command out; returns the exit code: 0, or 1 where the run is not over yet."""
    found = _read(args.prior)
    chosen: dict[str, Any] = {}
    for part, kind, first in (("architecture", Architecture, _ARCHITECTURE), ("schedule", Schedule, {})):
        given = found.get(part)
        fields = dict(vars(given)) if given is not None else dict(first)
        asked = {name: getattr(args, name) for _, where, name, _, _ in _OPTIONS if where == part}
        chosen[part] = kind(**{**fields, **{name: value for name, value in asked.items() if value is not None}})
    start = None if args.start is None else Pretrained.load(args.start)
    trained = pretrain(
        found["prior"], chosen["architecture"], chosen["schedule"], out=args.out, checkpoint=args.checkpoint,
        card=found.get("card"), start=start, seed=args.seed, device=torch.device(args.device),
        num_devices=args.num_devices, precision=args.precision, compile=args.compile, progress=not args.quiet,
        evaluate=found.get("evaluate"), max_seconds=args.max_seconds,
    )  # fmt: skip
    card = trained.card
    last = card["log"][-1] if card["log"] else {}
    told = ", ".join(f"{key} {value:.4g}" for key, value in last.items() if key.startswith(("loss", "gap")))
    print(f"steps       {card['steps']} of {chosen['schedule'].num_steps} in {card['seconds']:.0f} s")
    print(f"last        {told}\nnetwork     {args.out}")
    return 0 if card["finished"] else 1


def _read(path: Path) -> dict[str, Any]:
    """What of interest the file defines."""
    path = path.absolute()
    if not path.is_file():
        fail(SettingError, "pretrain", "the prior must be a Python file.", got=str(path), fix="check the path")
    name = f"bayesdl_prior_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        fail(SettingError, "pretrain", "the prior must be a Python file.", got=path.name, fix="a name ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's: whatever it raises is told as its fault
        sys.modules.pop(name, None)
        got = f"{type(error).__name__}: {error}"
        fix = f"python {path.name} shows where it stops"
        fail(SettingError, "pretrain", f"{path.name} must load.", got=got, fix=fix)
    if not hasattr(getattr(module, "prior", None), "sample"):
        wanted = f"{path.name} must define prior, an object with sample(batch, n, d, generator)."
        fail(SettingError, "pretrain", wanted, got=repr(getattr(module, "prior", "nothing"))[:200],
             fix="prior = bdl.priors.HyperGP()")  # fmt: skip
    return {"prior": module.prior, **{part: getattr(module, part) for part in _PARTS if hasattr(module, part)}}
