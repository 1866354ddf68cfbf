"""Every sampler against every reference of posteriordb: means and standard deviations, in Monte Carlo errors.

Seven posteriors, three seeds. A row is a case: the largest distance of a mean or standard deviation from the reference
draws in units of its Monte Carlo error (that of the reference counted), the largest such error in units of the
posterior's own width, R-hat, effective sample size, divergences, gradients per chain and seconds. A case holds where
the first is below 4; it says something where the second is small.

    BAYESDL_DATA=... PYTHONPATH=. python benchmarks/posteriordb.py [--samplers nuts smc] [--names garch-garch11]

The models and the settings are those of the tests (`tests/posteriordb.py`). One row is written as soon as it is known,
and rows that are there are not computed again.
"""

# ruff: noqa: E402  (thread counts must be in the environment before torch loads its BLAS)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import csv
import sys
import warnings
from pathlib import Path

import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import posteriordb

RESULTS = Path(__file__).parent / "results" / "posteriordb.csv"
SEEDS = (11, 12, 13)


def read() -> list[dict[str, str]]:
    """The rows so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Compute what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", default=list(posteriordb.SAMPLERS), choices=posteriordb.SAMPLERS)
    parser.add_argument("--names", nargs="+", default=list(posteriordb.MODELS), choices=list(posteriordb.MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(os.environ["BAYESDL_DATA"])
    done = {(row["sampler"], row["posterior"], row["seed"]) for row in read()}
    for name in args.names:
        for sampler in args.samplers:
            for seed in args.seeds:
                if (sampler, name, str(seed)) in done:
                    continue
                row = {"posterior": name, "sampler": sampler, "seed": seed}
                row |= posteriordb.compare(folder, name, sampler, seed).row() | describe()
                print(row, flush=True)
                with RESULTS.open("a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(row))
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()
