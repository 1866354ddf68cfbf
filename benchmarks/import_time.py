"""How long `import bayesdl` takes next to `import torch`, each in fresh interpreters that take turns.

    python benchmarks/import_time.py [--runs 20] [--out benchmarks/results/import_time.csv]

Three statements alternate: torch alone, bayesdl alone, and bayesdl with what a first script touches (models, kernels,
engines). Wall and processor seconds of the import itself, interpreter start-up left out; the first round warms the page
cache and is not counted. Ratios are those of medians; on a machine that does other work, trust the processor seconds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATEMENTS = {
    "torch": "import torch",
    "bayesdl": "import bayesdl",
    "bayesdl in use": "import bayesdl; bayesdl.GP, bayesdl.BNN, bayesdl.kernels, bayesdl.ExactGP, bayesdl.HMC",
}


def seconds(statement: str) -> tuple[float, float]:
    """Wall and processor seconds that `statement` takes in a fresh interpreter, measured inside it."""
    code = (
        "import time\nwall, cpu = time.perf_counter(), time.process_time()\n"
        f"{statement}\nprint(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def measure(runs: int) -> dict[str, list[tuple[float, float]]]:
    """`runs` times for each statement, the statements taking turns, after one uncounted round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in STATEMENTS}
    for round_number in range(runs + 1):
        for name, statement in STATEMENTS.items():
            taken = seconds(statement)
            if round_number:
                times[name].append(taken)
    return times


def main() -> None:
    """Measure, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "import_time.csv")
    options = parser.parse_args()
    times = measure(options.runs)
    base_wall, base_cpu = (statistics.median(values) for values in zip(*times["torch"], strict=True))
    machine = {
        "python": platform.python_version(),
        "torch": subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "cpus": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for name, pairs in times.items():
        wall, cpu = (statistics.median(values) for values in zip(*pairs, strict=True))
        rows.append(
            {
                "import": name,
                "runs": len(pairs),
                "wall_s": f"{wall:.3f}",
                "wall_ratio_torch": f"{wall / base_wall:.3f}",
                "cpu_s": f"{cpu:.3f}",
                "cpu_ratio_torch": f"{cpu / base_cpu:.3f}",
                **machine,
            }
        )
        ratios = wall / base_wall, cpu / base_cpu
        print(f"{name:16s} wall {wall:6.3f} s ({ratios[0]:5.3f} x torch)   cpu {cpu:6.3f} s ({ratios[1]:5.3f} x torch)")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
