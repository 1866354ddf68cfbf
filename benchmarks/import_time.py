"""How long `import bayesdl` takes next to `import torch`, each in fresh interpreters that take turns.

    python benchmarks/import_time.py [--runs 20] [--out benchmarks/results/import_time.csv]

Three statements alternate: torch alone, bayesdl alone, and bayesdl with what a first script touches (a model, a kernel
and an engine). Wall seconds of the import itself, interpreter start-up left out. The first round warms the page cache
and is not counted. The ratio is that of medians.
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


def seconds(statement: str) -> float:
    """Wall seconds that `statement` takes in a fresh interpreter, measured inside it."""
    code = f"import time\nstart = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return float(done.stdout)


def measure(runs: int) -> dict[str, list[float]]:
    """`runs` times for each statement, the statements taking turns, after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
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
    base = statistics.median(times["torch"])
    machine = {
        "python": platform.python_version(),
        "torch": subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "cpus": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        rows.append(
            {
                "import": name,
                "runs": len(values),
                "median_s": f"{median:.3f}",
                "min_s": f"{min(values):.3f}",
                "max_s": f"{max(values):.3f}",
                "ratio_torch": f"{median / base:.3f}",
                **machine,
            }
        )
        print(f"{name:16s} median {median:6.3f} s   min {min(values):6.3f} s   {median / base:5.3f} x torch")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
