"""`bayesdl optimize`: a problem in a file, a storage, any number of workers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bayesdl.bo import _problem
from bayesdl.bo.minimize import Result, minimize
from bayesdl.errors import SettingError, fail

EPILOG = """The file defines `space`, a dict of names to (low, high), range(...), [choices] or bdl.bo.Float(low, high,
log=True), and `objective(point)`, which returns the value; it may define engine, acquisition, directions,
constraints, trust_region, cost and risk. A run that was stopped, or whose workers died, goes on where it was with the
same storage; more workers join it, from other machines too, by the same command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("problem", type=Path, metavar="problem.py", help="a Python file with `objective` and `space`")
    add("--trials", type=int, default=50, metavar="N", help="evaluations of the study in all (default: %(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes side by side (default: %(default)s)")
    add("--storage", metavar="URL", help="sqlite:///study.db, postgresql://user@host/name, or a journal file ending in "
        ".journal (default: sqlite, beside the problem)")  # fmt: skip
    add("--study", metavar="NAME", help="name of the study in the storage (default: the name of the file)")
    add("--engine", metavar="NAME", help="gp, nngp, hmc, … as in `bayesdl info` (default: the file's engine, else gp)")
    add("--acquisition", metavar="NAME", help="one of BoTorch's acquisitions (default: auto)")
    add("--batch-size", type=int, default=1, metavar="Q", help="points proposed together (default: %(default)s)")
    add("--startup", type=int, metavar="N", help="quasi-random trials before the first fit (default: 2 p + 2)")
    add("--seed", type=int, default=0, help="seed of all proposals (default: %(default)s)")
    add("--timeout", type=float, metavar="SECONDS", help="begin no trial after this time")
    add("--out", type=Path, metavar="FOLDER", help="write a report and a table of all trials into this folder")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Carry the command out; returns the exit code: 0, or 1 where no trial gave a feasible value."""
    problem = _problem.read(args.problem)
    settings: dict[str, Any] = dict(problem.settings)
    if args.engine is not None:
        settings["engine"] = _engine(args.engine)
    if args.acquisition is not None:
        settings["acquisition"] = args.acquisition
    storage = args.storage or f"sqlite:///{args.problem.absolute().with_suffix('.db')}"
    result = minimize(
        problem.objective, problem.space, num_trials=args.trials, workers=args.workers, storage=storage,
        study_name=args.study or args.problem.stem, seed=args.seed, batch_size=args.batch_size,
        num_startup=args.startup, timeout=args.timeout, progress=not args.quiet, **settings,
    )  # fmt: skip
    found = _say(result)
    print(f"\nstudy       {result.study.name} in {storage}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        result.report(args.out / "index.html")
        result.table.to_csv(args.out / "trials.csv", index=False)
        print(f"report      {args.out / 'index.html'}\ntrials      {args.out / 'trials.csv'}")
    return 0 if found else 1


def _engine(name: str) -> Any:
    from bayesdl.evaluation import suite

    if name not in suite.ENGINES or "regression" not in suite.ENGINES[name].tasks:
        known = ", ".join(suite.engine_names("regression"))
        fail(SettingError, "--engine", f"engines are {known}.", got=repr(name), fix="check the spelling")
    return suite.build(name, "regression", 0)


def _say(result: Result) -> bool:
    """Print the best trial, or the front; whether there is one."""
    study = result.study
    trials = study.trials
    counts = {state: sum(t.state == state for t in trials) for state in ("complete", "failed")}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "complete"))
    several = len(study.directions) > 1
    if study.space.environment:
        return _say_recommendation(result, counts["complete"])
    best = result.pareto if several else [result.best] if result.best is not None else []
    if not best:
        print("no feasible trial", file=sys.stderr)
    for trial in best:
        values = ", ".join(f"{value:.8g}" for value in trial.values)
        print(f"{'front' if several else 'best':<12}{values}  (trial {trial.number})")
        limits = {**trial.params, **trial.constraints}
        for name, value in limits.items() if not several else ():
            print(f"  {name:<10}{value:.8g}" if isinstance(value, float) else f"  {name:<10}{value}")
    return bool(best)


def _say_recommendation(result: Result, num_complete: int) -> bool:
    """Print the point that is best over an environment; whether there is one."""
    if num_complete < 2:
        print("no recommendation from fewer than two trials", file=sys.stderr)
        return False
    found = result.recommend()
    print(f"{'recommended':<12}{found.mean:.8g} ± {found.deviation:.2g}")
    for name, value in found.params.items():
        print(f"  {name:<10}{value:.8g}" if isinstance(value, float) else f"  {name:<10}{value}")
    return True
