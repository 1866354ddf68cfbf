"""The command line: `bayesdl compare` fits several engines to real data and compares them, `bayesdl optimize` runs a
study of Bayesian optimisation, `bayesdl pretrain` trains a network on a prior, `bayesdl info` looks around.

Exit codes: 0 done; 1 done, but an engine failed on some split; 2 the request cannot be carried out, with a message on
stderr that says what to change; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bayesdl import _storage, datasets
from bayesdl._version import __version__
from bayesdl.amortized import _command as _pretraining
from bayesdl.bo import _command
from bayesdl.errors import BayesdlError, SettingError, fail
from bayesdl.evaluation import suite

__all__ = ["main"]

_PACKAGES = (
    "torch", "numpy", "scipy", "gpytorch", "botorch", "pyro-ppl", "arviz-base", "arviz-stats", "scikit-learn", "pandas",
    "matplotlib", "safetensors", "optuna",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own arguments); returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return {"info": _info, "optimize": _optimize, "pretrain": _pretrain, "compare": _compare}[args.command](args)
    except BayesdlError as error:
        print(f"bayesdl: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bayesdl: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbayesdl: stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bayesdl", description="Bayesian deep learning and Gaussian processes on torch."
    )
    parser.add_argument("--version", action="version", version=f"bayesdl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="versions, device, data sets and engines")
    compare = commands.add_parser(
        "compare",
        help="fit several engines to a data set and compare their posteriors",
        description="Fit several engines to a data set, score their predictions on test points, and write a report.",
        epilog="A run that was stopped goes on where it was: finished fits are kept in the output folder and reused.",
    )
    add = compare.add_argument
    sets = ", ".join(datasets.BUNDLED)
    add("--data", required=True, metavar="NAME|FILE", help=f"{sets}, uci:NAME, or a CSV file with a header line")
    add("--target", metavar="COLUMN", help="target column of a CSV file; all other columns are inputs")
    add("--task", choices=("regression", "classification"), help="what a CSV file's target is (default: regression)")
    add("--engines", metavar="A,B,…", help=f"engines to compare, of {', '.join(suite.ENGINES)} (default: all that can)")
    add(
        "--splits",
        type=int,
        default=1,
        metavar="K",
        help="1: one fifth held out; K: K-fold cross-validation, or the "
        "first K published splits of a uci set (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the splits and of the first fit (default: %(default)s)")
    add("--reference", metavar="ENGINE", help="measure distances to this engine (default: hmc, where it takes part)")
    add("--out", type=Path, default=Path("report"), metavar="FOLDER", help="where to write (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--quick", action="store_true", help="short fits, to see that everything works; not to be believed")
    add("--fresh", action="store_true", help="fit again even what is finished")
    optimize = commands.add_parser(
        "optimize",
        help="find the minimum of an expensive function",
        description="Run a study of Bayesian optimisation on a problem in a Python file.",
        epilog=_command.EPILOG,
    )
    _command.add_arguments(optimize)
    train = commands.add_parser(
        "pretrain",
        help="train a network to predict as the posterior of a prior does",
        description="Train a prior-data fitted network on the prior that a Python file defines.",
        epilog=_pretraining.EPILOG,
    )
    _pretraining.add_arguments(train)
    return parser


def _optimize(args: argparse.Namespace) -> int:
    return _command.run(args)


def _pretrain(args: argparse.Namespace) -> int:
    _device(args.device)
    return _pretraining.run(args)


def _compare(args: argparse.Namespace) -> int:
    from bayesdl.evaluation import report, runner, table

    data = _data(args)
    names = _engine_names(args.engines, data.task)
    reference = _reference(args.reference, names)
    if args.seed < 0:
        fail(SettingError, "--seed", "the seed must be at least 0.", got=str(args.seed), fix="pass 0, say")
    engines = {name: suite.build(name, data.task, len(data.class_names), args.quick) for name in names}
    device = _device(args.device)
    problem = runner.Problem(
        data.name, data.x.to(device), data.y.to(device), data.task, _splits(args, data).to(device),
        data.target_name, data.class_names,
    )  # fmt: skip
    _claim(args.out)
    n, d = data.x.shape
    print(f"{data.name}: {n} rows, {d} inputs, target {data.target_name} ({data.task})", file=sys.stderr)
    rows = runner.run(problem, engines, args.out, seed=args.seed, reference=reference, fresh=args.fresh)
    print(table.text(table.summarize(rows, reference), shutil.get_terminal_size((120, 24)).columns))
    _storage.write_bytes(args.out / "results.csv", table.csv_text(rows).encode())
    descriptions = {name: suite.ENGINES[name].description for name in names}
    report.write(args.out / "index.html", problem, rows, descriptions, reference, args.seed)
    print(f"\nreport      {args.out / 'index.html'}\nscores      {args.out / 'results.csv'}")
    print(f"posteriors  {args.out / 'posteriors'}{'/'}")
    return 1 if any(row.status == "failed" for row in rows) else 0


def _data(args: argparse.Namespace) -> datasets.Loaded:
    """The data set that --data, --target and --task describe."""
    if args.data in datasets.BUNDLED or args.data.startswith("uci:"):
        if args.target is not None or args.task is not None:
            option = "--target" if args.target is not None else "--task"
            fail(
                SettingError, option, f"{args.data} has its own target and task.", got=option, fix=f"leave out {option}"
            )
        return datasets.load(args.data)
    path = Path(args.data)
    if not path.exists() and path.suffix == "":
        known = ", ".join([*datasets.BUNDLED, "uci:NAME"])
        wanted = f"the data set must be one of {known}, or a CSV file."
        fail(SettingError, "--data", wanted, got=repr(args.data), fix="check the spelling or the path")
    if args.target is None:
        wanted = "a CSV file needs the name of its target column."
        fail(SettingError, "--target", wanted, got="no --target", fix="--target COLUMN")
    return datasets.read_csv(path, args.target, args.task or "regression")


def _engine_names(listed: str | None, task: str) -> list[str]:
    """The engines asked for, each checked against the task; by default all that can do it."""
    if listed is None:
        return suite.engine_names(task)
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        wanted = "name at least one engine, each once."
        fail(SettingError, "--engines", wanted, got=repr(listed), fix=",".join(suite.engine_names(task)))
    return names


def _reference(asked: str | None, names: Sequence[str]) -> str | None:
    if asked is None:
        return "hmc" if "hmc" in names and len(names) > 1 else None
    if asked not in names:
        wanted = "the reference must be among the engines."
        fail(
            SettingError,
            "--reference",
            wanted,
            got=repr(asked),
            fix=f"one of {', '.join(names)}, or add it to --engines",
        )
    return asked


def _splits(args: argparse.Namespace, data: datasets.Loaded) -> torch.Tensor:
    """Published splits where there are some, else a holdout or folds."""
    if args.splits < 1:
        fail(SettingError, "--splits", "at least one split is needed.", got=str(args.splits), fix="--splits 1")
    if data.splits is None:
        labels = None if data.task == "regression" else data.y
        return datasets.splits(len(data.x), args.splits, seed=args.seed, labels=labels)
    if args.splits > len(data.splits):
        wanted = f"{data.name} has {len(data.splits)} published splits."
        fail(SettingError, "--splits", wanted, got=str(args.splits), fix=f"--splits {len(data.splits)}")
    return data.splits[: args.splits]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        got = f"{name!r}: {str(error).splitlines()[0]}"
        fail(SettingError, "--device", "the device must exist here.", got=got, fix="--device cpu")
    return device


def _claim(out: Path) -> None:
    """Make the output folder before hours of fitting, not after."""
    if out.exists() and not out.is_dir():
        fail(SettingError, "--out", "the output must be a folder.", got=f"{out} is a file", fix="name another folder")
    out.mkdir(parents=True, exist_ok=True)


def _info(args: argparse.Namespace) -> int:
    from bayesdl.evaluation.report import machine

    folder = datasets.data_folder()
    there = folder is not None and folder.is_dir()
    print(f"bayesdl     {__version__}")
    print(f"machine     {machine()}")
    print(f"system      {platform.platform()}")
    print(f"device      {'cuda: ' + torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu only'}")
    print(f"data        {', '.join(datasets.BUNDLED)} (bundled)")
    where = "BAYESDL_DATA is not set" if folder is None else str(folder) + ("" if there else " (no such folder)")
    found = [name for name in datasets.UCI if there and (folder / "uci" / f"{name}.npz").is_file()]
    print(f"            uci: {', '.join(found) or 'none'} ({where})")
    for i, (name, entry) in enumerate(suite.ENGINES.items()):
        kinds = "regression and classification" if len(entry.tasks) > 1 else entry.tasks[0]
        print(f"{'engines' if i == 0 else '':<12}{name:<10}{entry.description} ({kinds})")
    for i, name in enumerate(_PACKAGES):
        print(f"{'packages' if i == 0 else '':<12}{name:<14}{_installed(name)}")
    return 0


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
