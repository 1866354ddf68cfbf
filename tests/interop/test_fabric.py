"""Training through Lightning Fabric: one process gives the weights of the plain loop, two give one network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bayesdl.amortized import Architecture, Pretrained, Schedule, pretrain
from bayesdl.errors import SettingError
from bayesdl.interop.fabric import FabricWorker
from tests.toy_tasks import NormalMeans

ROOT = Path(__file__).parents[2]
TINY = Architecture(2, "mixture", 2, width=8, num_layers=2, num_heads=2, hidden=8, num_conditions=1)
BRIEF = Schedule(num_steps=6, batch=3, n_max=6, num_queries=4, accumulate=2)

SCRIPT = """
import sys
from bayesdl.amortized import pretrain
from tests.interop.test_fabric import BRIEF, TINY
from tests.toy_tasks import NormalMeans

if __name__ == "__main__":
    net = pretrain(NormalMeans(), TINY, BRIEF, num_devices=2, out=sys.argv[1], progress=False)
    print("sum", float(net.network.first.double().sum()), flush=True)
"""


def test_without_lightning_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(SettingError, match=r"pip install bayesdl\[train\]"):
        pretrain(NormalMeans(), TINY, BRIEF, num_devices=2, progress=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """Both end with the same weights, which are not those of one process; slow, as each imports torch and lightning."""
    pytest.importorskip("lightning")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "two.pfn")], env=environment, capture_output=True, text=True,
        timeout=400, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    sums = [line for line in done.stdout.splitlines() if line.startswith("sum")]
    assert len(sums) == 2
    assert sums[0] == sums[1]
    two = Pretrained.load(tmp_path / "two.pfn").network.state_dict()
    one = pretrain(NormalMeans(), TINY, BRIEF, progress=False).network.state_dict()
    assert not torch.equal(two["first"], one["first"])
    torch.testing.assert_close(two["first"], one["first"], rtol=0, atol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_one_process_gives_the_weights_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    plain = pretrain(NormalMeans(), TINY, BRIEF, progress=False).network.state_dict()
    module = sys.modules["bayesdl.amortized.pretrain"]  # whose name in the room is that of its function
    monkeypatch.setattr(module, "OneDevice", lambda device, precision: FabricWorker(device, 1, precision))
    fabric = pretrain(NormalMeans(), TINY, BRIEF, progress=False).network.state_dict()
    for name in plain:
        torch.testing.assert_close(fabric[name], plain[name], rtol=1e-6, atol=1e-7)
