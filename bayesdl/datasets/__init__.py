"""Data sets: bundled ones, the UCI benchmark, a reader for CSV files, splits, and synthetic generators."""

from bayesdl.datasets.base import TASKS, Loaded, splits
from bayesdl.datasets.bundled import BUNDLED, UCI, data_folder, load
from bayesdl.datasets.synthetic import noisy_sine_with_gap, true_noisy_sine, two_moons
from bayesdl.datasets.tables import read_csv

__all__ = [
    "BUNDLED",
    "TASKS",
    "UCI",
    "Loaded",
    "data_folder",
    "load",
    "noisy_sine_with_gap",
    "read_csv",
    "splits",
    "true_noisy_sine",
    "two_moons",
]
