"""Diagnostics in plain words: what is wrong is named, what is right is not, and the right figure is judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bayesdl as bdl
from bayesdl.evaluation import verdict
from bayesdl.interop.arviz import convergence, nested_rhat

GOOD = {"rhat": 1.004, "ess_bulk": 900.0, "ess_tail": 700.0, "e_bfmi": [0.9, 1.1], "divergences": 0}


def test_good_figures_are_trusted_and_a_foreign_mapping_is_not_judged():
    found = verdict(GOOD)
    assert found.trusted
    assert found.faults == ()
    assert found.checked == ("rhat", "ess", "e_bfmi", "divergences")
    assert str(found).startswith("Nothing speaks against")
    assert "Nothing to judge by" in str(verdict({"elbo": -3.0}))
    assert verdict({**GOOD, "divergences": [0, 0], "e_bfmi": [[0.9], [None, float("nan")]]}).trusted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rhat": 1.2}, "R-hat 1.20"),
        ({"rhat": [1.0, float("inf")]}, "R-hat inf"),
        ({"ess_tail": 31.4}, "31 effective draws"),
        ({"e_bfmi": [[0.9, 0.12], [0.8, 0.7]]}, "E-BFMI 0.12"),
        ({"divergences": torch.tensor([0, 3])}, "3 divergences"),
        ({"nested_rhat": 1.3}, "Nested R-hat 1.30"),
    ],
)
def test_each_fault_is_said_with_its_figure(change, words):
    found = verdict({**GOOD, **change})
    assert not found.trusted
    assert len(found.faults) == 1
    assert words in found.faults[0]
    assert "Do not trust" in str(found)
    assert words in str(found)


def test_what_makes_no_draw_worse_is_a_remark():
    found = verdict({**GOOD, "max_depth_reached": 7, "stopped_by": "max_gradients"})
    assert found.trusted
    assert len(found.remarks) == 2
    assert "7 trees" in str(found)
    assert verdict({**GOOD, "max_depth_reached": 0, "stopped_by": "num_draws"}).remarks == ()


def test_many_short_chains_in_good_order_are_trusted_and_those_that_remember_their_start_are_not():
    """64 x 100 draws of stationary AR(1) chains, each worth eleven: R-hat passes 1.05, and only says that."""
    rng = np.random.default_rng(4)
    ids = np.arange(64) // 8
    x = rng.normal(size=(64, 100, 10))
    for t in range(1, 100):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
    found = convergence(x)
    figures = {**GOOD, "rhat": found["rhat"].max(), "nested_rhat": nested_rhat(x, ids).max()}
    assert figures["rhat"] > 1.05
    assert verdict(figures).trusted
    alone = verdict({**figures, "nested_rhat": None})
    assert not alone.trusted
    assert "nested R-hat" in alone.faults[0]
    stuck = x + 0.8 * rng.normal(size=8)[ids][:, None, None]
    assert not verdict({**figures, "nested_rhat": nested_rhat(stuck, ids).max()}).trusted


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_it_reads_the_diagnostics_of_chains_and_of_networks():
    good = bdl.sample(lambda q: -0.5 * q.square().sum(-1), dim=2, num_chains=4, num_warmup=200, num_draws=300)
    assert verdict(good.diagnostics).trusted
    two = bdl.sample(
        lambda q: torch.logaddexp(-0.5 * (q + 20).square().sum(-1), -0.5 * (q - 20).square().sum(-1)),
        dim=1,
        num_chains=4,
        num_warmup=50,
        num_draws=50,
        initial=torch.tensor([[-20.0], [-20.0], [20.0], [20.0]], dtype=torch.float64),
    )
    assert any("R-hat" in fault for fault in verdict(two.diagnostics).faults)
    x = torch.linspace(-1, 1, 10, dtype=torch.float64).unsqueeze(-1)
    fitted = bdl.HMC(bdl.BNN((3,)), num_chains=2, num_warmup=20, num_draws=10, num_steps=4).fit(x, x[:, 0])
    assert any("effective draws" in fault for fault in verdict(fitted.diagnostics).faults)
