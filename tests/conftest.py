"""What every test shares: one thread, derandomised hypothesis, the data folder, a watch over the global random seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Workers run side by side; one thread each is faster than all of them fighting for the cores.
torch.set_num_threads(1)

settings.register_profile("bayesdl", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("bayesdl")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of external data sets, named by BAYESDL_DATA; the test skips where there is none."""
    name = os.environ.get("BAYESDL_DATA")
    if not name:
        pytest.skip("BAYESDL_DATA does not name a folder of data sets")
    folder = Path(name)
    if not folder.is_dir():
        pytest.skip(f"BAYESDL_DATA names {name}, which is not a folder")
    return folder


@pytest.fixture(autouse=True)
def _skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _argument_checks_untouched() -> Iterator[None]:
    """Fail a test that leaves the argument checks of torch.distributions other than it found them.

    torch.compile and Pyro switch them for the whole process; what we do with either must not.
    """
    before = torch.distributions.Distribution._validate_args
    yield
    after = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(before)
    assert before == after, f"the argument checks of torch.distributions went from {before} to {after}"


@pytest.fixture(autouse=True)
def _global_rng_untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test during which the global random state of torch or numpy changed, whoever changed it."""
    before = _global_rng_state()
    yield
    after = _global_rng_state()
    if request.node.get_closest_marker("touches_global_rng"):
        return
    for source in before:
        assert before[source] == after[source], (
            f"the global random state of {source} changed; pass a generator or a seed, "
            "or mark the test touches_global_rng where another library draws from it"
        )


def _global_rng_state() -> dict[str, bytes]:
    name, keys, position, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr((name, position, rest)).encode() + keys.tobytes(),
    }
