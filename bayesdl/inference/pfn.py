r"""Prior-data fitted networks: a posterior by one forward pass of a network that was trained on a prior over data sets.

    q(y | x, D) = argmin_q E_{D ~ prior} KL(p(y | x, D) || q)

The work was done before the data came. Fitting reads the data once, as the context of a transformer; every prediction
attends to what was read.

Reference: Mueller, Hollmann, Pineda Arango, Grabocka, Hutter (2022), "Transformers Can Do Bayesian Inference", arXiv
2112.10510; averaging over permutations of columns and labels as in TabPFN, arXiv 2207.01848.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from bayesdl import _checks
from bayesdl._random import Seed, root_seed
from bayesdl.amortized import Pretrained
from bayesdl.amortized.reader import Reader
from bayesdl.data import training_data
from bayesdl.errors import SettingError, fail
from bayesdl.likelihoods import Categorical, Gaussian
from bayesdl.models.learned import Learned
from bayesdl.posterior import AmortizedPosterior
from bayesdl.posterior.amortized import Settings

_PRECISIONS = ("data", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class PFN:
    """Inference by a pretrained network.

        engine = PFN.from_pretrained("gp")

    Attributes:
        network: The network, its bars and its card; `network.card` says what it was trained for.
        standardize: Bring the data into the units in which the network was trained: mean 0 and variance 1, or the unit
            cube for the box of the training inputs, as the card has it. Units that the card calls raw stay.
        num_permutations: Readings of the data that are averaged, the first as it is and the others with columns (and
            class labels) in random order, to which a network is not blind. Worth 4 to 16 for tables; costs as much.
        num_classes: Classes of a classification; None takes the largest label of the data plus one. Only classes that
            occur in the data have mass.
        update: What `condition_on` does: "exact", read all data again; or "append", read the new points behind the old
            ones, which costs O(n) for each in place of O(n^2) for all, and is what long rollouts want.
        precision: In which the network computes: "data", the dtype of x; "float32", about twice as fast where the data
            is float64, with errors of about 1e-6 of a standard deviation, with a head of kernels up to 1e-3 where there
            is next to no noise; "float64"; or "bfloat16", for many data sets or queries at once: products in bfloat16,
            and keys and values in half the memory, on a processor that has such products (AVX512-BF16, AMX, GPUs);
            others may be slower. A head of kernels computes its factors in float32 all the same. The networks that ship
            lose less than 0.002 nats a point.
        conditions: What else the network was trained to be told of the prior, for one that was.
    """

    network: Pretrained = field(repr=False)
    standardize: bool = True
    num_permutations: int = 1
    num_classes: int | None = None
    update: str = "exact"
    precision: str = "data"
    conditions: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.network, Pretrained):
            fix = "PFN.from_pretrained('gp'), or bdl.amortized.Pretrained.load(path)"
            wanted = "network must be a bdl.amortized.Pretrained."
            fail(SettingError, "PFN", wanted, got=_checks.describe(self.network), fix=fix)
        _checks.at_least("PFN", "num_permutations", self.num_permutations, 1, integer=True)
        _checks.choice("PFN", "update", self.update, ("exact", "append"))
        _checks.choice("PFN", "precision", self.precision, _PRECISIONS)
        architecture = self.network.network.architecture
        if self.num_classes is not None:
            _checks.at_least("PFN", "num_classes", self.num_classes, 2, integer=True)
            most = architecture.outputs if architecture.head == "classes" else 0
            if self.num_classes > most:
                wanted = f"the network knows up to {most} classes." if most else "the network is for regression."
                fail(SettingError, "PFN", wanted, got=f"num_classes={self.num_classes}", fix="num_classes=None")
        extra = max(0, architecture.num_conditions - 1)
        if self.conditions and len(self.conditions) != extra:
            wanted = f"the network takes {extra} conditions."
            fail(SettingError, "PFN", wanted, got=f"conditions={self.conditions}", fix="conditions=()")

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **settings: Any) -> Self:
        """The engine of a network that ships with the package, by its name, or of a file.

        Args:
            name_or_path: Such as "gp"; `bdl.amortized.shipped()` lists the names.
            settings: Attributes of the engine.

        Raises:
            SettingError: Neither a file nor a name, or a setting out of range.
            StorageError: The file is damaged or foreign. Reading it runs no code from it.
        """
        return cls(Pretrained.load(name_or_path), **settings)

    @property
    def model(self) -> Learned:
        """The prior that the network was trained on, by name, and what kind of targets it has."""
        architecture = self.network.network.architecture
        if architecture.head != "classes":
            return Learned(self.network.card["name"], Gaussian())
        return Learned(self.network.card["name"], Categorical(self.num_classes or architecture.outputs))

    def fit(self, x: Any, y: Any, *, seed: Seed = 0) -> AmortizedPosterior:
        """Read x (*b, n, d) and y (*b, n) or (*b, n, k); nothing is trained.

        Data sets along *b, and targets along k, are independent and read side by side. For classification y holds
        labels 0, 1, ....

        Args:
            seed: Of the permutations, and of a classifier's rollouts.

        Raises:
            ShapeError, DataError, DtypeError, DeviceError: The data cannot be used, have more columns than the network
                has inputs, or more than twice as many points as it was trained on.

        Warns:
            OutOfRangeWarning: Their number, columns or inputs are outside what the network was trained on.

        Cost: O(n^2 w + n w^2) time and O(n w) memory for each layer of width w, data set, output and permutation.
        """
        began = time.perf_counter()
        data = training_data("PFN.fit", x, y)
        dtype = data.x.dtype if self.precision == "data" else getattr(torch, self.precision)
        reader = Reader(self.network, dtype, data.x.device, self.conditions)
        settings = Settings(
            self.standardize, self.num_permutations, root_seed(seed) % 2**62, self.update, self.num_classes
        )
        diagnostics = {"engine": "PFN", "network": reader.card["name"]}
        if "seconds" in reader.card:
            diagnostics["training_seconds"] = reader.card["seconds"]
        posterior = AmortizedPosterior.read(self.model, data, reader, settings, diagnostics)
        return posterior.timed(time.perf_counter() - began)
