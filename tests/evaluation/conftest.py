"""Reports made from engines that fit nothing, for the tests that read them and the one that looks at them."""

from __future__ import annotations

import pytest
import torch

from bayesdl.evaluation import report, runner
from tests.fake_engines import FakeEngine


@pytest.fixture(scope="module")
def make_report(tmp_path_factory):
    """Writes a report for a task and returns its path; splits, engines and names are settable."""

    def make(task="regression", engines=("calm", "wild"), name="toy <&> set", num_splits=2, fail=()):
        folder = tmp_path_factory.mktemp("report")
        n = 60
        x = torch.linspace(-1, 1, 2 * n, dtype=torch.float64).reshape(n, 2)
        y = torch.sin(9 * x[:, 0]) if task == "regression" else torch.arange(n) % (2 if task == "binary" else 3)
        test = torch.arange(n) % 3 == torch.arange(num_splits)[:, None]
        classes = () if task == "regression" else ("red", "green", "blue")[: 2 if task == "binary" else 3]
        problem = runner.Problem(name, x, y, task, test, "y > 0", classes)
        kind = "mixture" if task == "regression" else task
        made = {
            engine: FakeEngine(
                str(folder / "log"), kind, width=1.0 + i, bias=0.1 * i, warn_on=(1,) if i == 0 else (),
                fail_on=tuple(range(9)) if engine in fail else (),
            )
            for i, engine in enumerate(engines)
        }  # fmt: skip
        rows = runner.run(problem, made, folder, progress=False, reference=engines[0])
        report.write(folder / "index.html", problem, rows, {e: f"engine {e}" for e in engines}, engines[0], seed=0)
        return folder / "index.html"

    return make
