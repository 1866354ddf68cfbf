"""Costs: what trials are said to have cost, what is expected of the next, and how proposals and budgets heed it."""

import datetime
import itertools
import math
import time

import numpy as np
import optuna
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from scipy.stats import lognorm

import bayesdl as bdl
from bayesdl.bo import Float, KnownCost, LearnedCost, Study, _workers, minimize
from bayesdl.errors import DataError, SettingError
from bayesdl.interop import _optuna_acquisition as acquisitions
from bayesdl.interop import _optuna_cost as costs
from bayesdl.interop._optuna_record import HISTORY, LOST, RETRY_OF, SURPLUS, Record
from bayesdl.interop._optuna_space import Encoding

ENGINE = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=1.0)), optimize=False)
QUICK = {"engine": ENGINE, "num_samples": 16, "num_restarts": 1, "num_candidates": 16}
SOBOL = {"engine": ENGINE, "num_startup": 10_000}
SPACE = {"x": FloatDistribution(1e-3, 10.0, log=True), "n": IntDistribution(2, 12, step=2)}


def trial(value=1.0, seconds=5.0, number=(0.5, 4), **more):
    """A finished trial that took some seconds."""
    begun = datetime.datetime(2024, 5, 1, 12, 0, 0)
    params = dict(zip(SPACE, number, strict=True))
    state = {} if value is None else {"value": value}
    made = create_trial(params=params, distributions=SPACE, **state, **more)
    made.datetime_start = begun
    if made.state.is_finished():
        made.datetime_complete = begun + datetime.timedelta(seconds=seconds)
    return made


def numbered(trials):
    """With the numbers that a study would give them."""
    for i, one in enumerate(trials):
        one.number = i
    return trials


def test_the_cost_of_a_trial_is_what_the_setting_says():
    known = KnownCost(2.0, {"x": 10.0, "n": -0.1})
    assert costs.trial_cost(known, trial()) == pytest.approx(2.0 + 5.0 - 0.4)
    assert costs.trial_cost(LearnedCost("reported"), trial(user_attrs={"cost": 3.5})) == 3.5
    for wrong in (None, "3", True, -1.0, 0.0, math.inf):
        assert math.isnan(costs.trial_cost(LearnedCost("reported"), trial(user_attrs={"cost": wrong})))
    assert costs.trial_cost(LearnedCost(), trial(system_attrs={costs.TIMING: {"clock": 1.5}})) == pytest.approx(3.5)
    assert math.isnan(costs.trial_cost(LearnedCost(), trial(seconds=0.0)))  # as of one that was added
    assert math.isnan(costs.trial_cost(known, trial(None, state=TrialState.RUNNING)))


def test_what_was_spent_leaves_out_lost_and_withdrawn_trials():
    """Costs 1, 2, 4, 8, ...: each trial leaves its own mark in the sum."""
    lost = {"state": TrialState.FAIL, "system_attrs": {LOST: True}}
    trials = numbered([
        trial(user_attrs={"cost": 1.0}),
        trial(None, user_attrs={"cost": 2.0}, **lost),
        trial(None, user_attrs={"cost": 4.0}, state=TrialState.FAIL),
        trial(None, user_attrs={"cost": 8.0}, state=TrialState.FAIL, system_attrs={SURPLUS: True}),
        trial(user_attrs={"cost": 16.0}, system_attrs={RETRY_OF: 1, HISTORY: [1]}),
        trial(),
        trial(user_attrs={"cost": 32.0}),
    ])  # fmt: skip
    assert costs.spent(LearnedCost("reported"), trials) == 1 + 4 + 16 + 32
    assert costs.spent(LearnedCost("reported"), trials, before=2) == 1 + 16  # the retry has the rank of the lost one


@pytest.mark.parametrize(("budget", "expected"), [(None, 1.0), (100.0, 0.8), (44.0, 0.0), (40.0, 0.0), (25.0, 0.0)])
def test_the_weight_of_the_cost_falls_as_the_budget_is_spent(budget, expected):
    """Three first trials of 10 each, two later ones of 7: (100 - 44) / (100 - 30) = 0.8."""
    trials = numbered([trial(user_attrs={"cost": c}) for c in (10.0, 10.0, 10.0, 7.0, 7.0)])
    assert costs.weight(LearnedCost("reported", budget), trials, 3) == pytest.approx(expected)


def test_the_expected_cost_is_that_of_a_log_normal():
    """Against scipy, from the mean and the variance of log c."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand((9, 2), generator=g, dtype=torch.float64)
    model = ENGINE.fit(z, 2.0 + 3.0 * z[:, 0] - z[:, 1]).to_botorch(view="gaussian")
    at = torch.rand((4, 1, 2), generator=g, dtype=torch.float64)
    found = costs.LearnedLogCost(model)(at).detach()
    law = model.posterior(at)
    mean, deviation = law.mean[..., 0, 0].detach().numpy(), law.variance[..., 0, 0].detach().sqrt().numpy()
    expected = np.log(lognorm.mean(s=deviation, scale=np.exp(mean)))
    assert found.shape == (4, 1)
    assert found[:, 0].numpy() == pytest.approx(expected, rel=1e-9)


def test_a_known_cost_is_that_of_the_values_behind_the_coordinates():
    """At the coordinates of x = 0.1 on its logarithmic scale and n = 8, and where it is not a value of the grid."""
    encoding = Encoding({**SPACE, "single": IntDistribution(3, 3)})
    known = costs.KnownLogCost(1.5, {"x": 20.0, "n": 0.25, "single": 2.0}, encoding)
    z = encoding.encode([{"x": 0.1, "n": 8, "single": 3}]).unsqueeze(0).requires_grad_(True)
    assert float(known(z.detach()).exp()) == pytest.approx(1.5 + 2.0 + 2.0 + 6.0, rel=1e-9)
    slope = torch.autograd.grad(known(z).exp().sum(), z)[0].flatten().tolist()
    assert slope == pytest.approx([20.0 * 0.1 * math.log(1e4), 0.25 * 10], rel=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_improvement_is_sought_per_cost(share):
    """What is climbed is log EI - alpha log c, against the acquisition alone."""
    z = torch.tensor([[0.1], [0.5], [0.8]], dtype=torch.float64)
    y = torch.tensor([[0.3], [1.0], [0.2]], dtype=torch.float64)
    told = Record(3, (0, 1, 2), z, y, y[:, :0], z[:0], z[:0])
    model = ENGINE.fit(z, y[:, 0]).to_botorch(view="gaussian")
    plain = LogExpectedImprovement(model, best_f=1.0)
    plain._log = True
    spending = costs.Spending(lambda at: 3.0 * at[..., 0], share)
    climbed = acquisitions.surface(plain, None, told, spending)
    at = torch.linspace(0.0, 1.0, 7, dtype=torch.float64).reshape(7, 1, 1)
    assert torch.allclose(climbed(at), plain(at) - share * 3.0 * at[:, 0, 0])
    assert torch.allclose(spending.model().posterior(at).mean, (share * 3.0 * at).exp())


def two_bowls(x):
    return float(min((x[0] - 0.2) ** 2, (x[0] - 0.8) ** 2 + 1e-4))


@pytest.mark.parametrize("cost", [KnownCost(1.0, {"x0": 50.0}), LearnedCost("reported")])
def test_cheap_evaluations_come_first(cost):
    """Two equally good regions, of which the right one costs five times as much: with costs, the left one is searched,
    whether they are known or learned.
    """
    price = {"cost": None}

    def objective(x):
        price["cost"] = 1.0 + 50.0 * float(x[0])
        value = two_bowls(x)
        return (value, {"cost": price["cost"]}) if cost.source == "reported" else value

    careless = minimize(two_bowls, [(0.0, 1.0)], num_trials=10, num_startup=4, engine=ENGINE)
    careful = minimize(objective, [(0.0, 1.0)], num_trials=10, num_startup=4, engine=ENGINE, cost=cost)
    spent = [sum(1 + 50 * t.x[0] for t in result.study.trials[4:]) for result in (careless, careful)]
    assert spent[1] < 0.8 * spent[0]
    assert careful.best.value < 1e-3
    assert careful.table["cost"].tolist() == pytest.approx([1 + 50 * t.x[0] for t in careful.study.trials])
    assert careful.study.spent == pytest.approx(float(careful.table["cost"].sum()))
    assert "cost" not in careless.table


def test_no_trial_begins_once_the_budget_is_spent():
    budget = 60.0
    result = minimize(
        lambda x: (two_bowls(x), {"cost": 10.0 + float(x[0])}), [(0.0, 1.0)], num_trials=100,
        cost=LearnedCost("reported", budget), **SOBOL,
    )  # fmt: skip
    spent = result.table["cost"].cumsum().tolist()
    assert spent[-1] >= budget > spent[-2]
    study = result.study
    job = _workers.Job(study.space, {}, two_bowls, 100, None)
    assert not _workers._unfinished(study, job, None)
    more = Study([(0.0, 1.0)], cost=LearnedCost("reported", 1e6), **SOBOL)
    assert _workers._unfinished(more, job, None)


def test_costs_by_the_clock_leave_the_proposal_out():
    """Trials of a tenth of a second that took longer to propose."""
    result = minimize(
        lambda x: time.sleep(0.1 + 0.2 * float(x[0] > 0.5)) or two_bowls(x),
        [(0.0, 1.0)], num_trials=6, num_startup=4, engine=ENGINE, cost="seconds",
    )  # fmt: skip
    for t in result.study.trials:
        assert t.cost >= 0.09
        proposal = result.study.optuna_study.trials[t.number].system_attrs.get(costs.TIMING, {}).get("clock", 0.0)
        assert t.cost == pytest.approx(t.seconds - proposal, abs=1e-9)


def test_a_cost_that_is_not_reported_is_a_failure_and_its_cost_is_unknown():
    calls = itertools.count(1)

    def objective(x):
        n = next(calls)
        return {2: 1.0, 3: (1.0, {}), 4: (1.0, {"cost": -1.0})}.get(n, (1.0 + n, {"cost": 2.0}))

    result = minimize(objective, [(0.0, 1.0)], num_trials=6, cost="reported", **SOBOL)
    assert result.table["state"].tolist() == ["complete", "failed", "failed", "failed", "complete", "complete"]
    assert ["reported cost" in e or "positive number" in e for e in result.table["error"]] == [0, 1, 1, 1, 0, 0]
    assert result.study.spent == 6.0


def test_costs_are_told_and_added(tmp_path):
    study = Study({"x": (0.0, 1.0)}, cost="reported", storage=tmp_path / "study.db", **SOBOL)
    first, second = study.ask_batch(2)
    assert study.tell(first, 1.0, cost=4.0).cost == 4.0
    assert study.tell(second, error="it broke", cost=2.0).cost == 2.0
    study.add([{"x": 0.5}], [2.0], costs=[8.0])
    assert Study({"x": (0.0, 1.0)}, cost="reported", storage=tmp_path / "study.db", **SOBOL).spent == 14.0
    third = study.ask()
    for wrong in (None, 0.0, math.nan, "4"):
        with pytest.raises(DataError, match="cost must be a positive number"):
            study.tell(third, 1.0, cost=wrong)
    plain = Study({"x": (0.0, 1.0)}, **SOBOL)
    with pytest.raises(DataError, match="does not ask for costs"):
        plain.tell(plain.ask(), 1.0, cost=1.0)
    assert math.isnan(plain.spent)


def test_until_two_costs_are_known_improvement_alone_counts():
    study = Study([(0.0, 1.0)], cost="reported", num_startup=3, **QUICK)
    plain = Study([(0.0, 1.0)], num_startup=3, **QUICK)
    for one in (study, plain):
        one.add([[0.1], [0.4], [0.9]], [1.0, 0.2, 0.8])
    assert study.ask().params == plain.ask().params


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cost": 3.0}, "cost must be"),
        ({"cost": "minutes"}, "cost must be"),
        ({"cost": KnownCost(0.0, {"x": 1.0})}, "positive everywhere"),
        ({"cost": KnownCost(1.0, {"z": 1.0})}, "numbers in the space"),
        ({"cost": KnownCost(1.0, {"kind": 1.0})}, "numbers in the space"),
        ({"cost": "reported", "constraints": ("cost",)}, "different names"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        Study({"x": (0.0, 1.0), "rate": Float(1e-3, 1.0, log=True), "kind": ["a", "b"]}, **settings)


def test_costs_that_make_no_sense_are_refused():
    for make, says in (
        (lambda: LearnedCost("minutes"), "source"),
        (lambda: LearnedCost(budget=0.0), "budget"),
        (lambda: KnownCost(math.nan), "fixed"),
        (lambda: KnownCost(1.0, {"x": "dear"}), "x must be a finite number"),
        (lambda: KnownCost(1.0, budget=-1.0), "budget"),
    ):
        with pytest.raises(SettingError, match=says):
            make()
    study = Study([(0.0, 1.0)], cost=KnownCost(1.0), acquisition="qUCB", num_startup=2, **QUICK)
    study.add([[0.1], [0.9]], [1.0, 2.0])
    with pytest.raises(SettingError, match="logarithmic improvement"):
        study.ask()


def test_reported_costs_in_a_program_of_optuna():
    """The user attribute "cost" of each trial; five sixths of the line are dear."""
    from bayesdl.interop.optuna import BayesdlSampler

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def run(cost):
        sampler = BayesdlSampler(ENGINE, num_startup=4, space={"x": FloatDistribution(0.0, 1.0)}, cost=cost)
        study = optuna.create_study(sampler=sampler)

        def objective(trial):
            x = trial.suggest_float("x", 0.0, 1.0)
            trial.set_user_attr("cost", 1.0 + 50.0 * x)
            return two_bowls([x])

        study.optimize(objective, n_trials=14)
        return sum(t.user_attrs["cost"] for t in study.trials[4:])

    assert run(LearnedCost("reported")) < run(None)
