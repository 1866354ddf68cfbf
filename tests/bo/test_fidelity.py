"""Fidelities: what is believed of the target, what a cheap evaluation says about it, and which are chosen."""

import math

import numpy as np
import pytest
import torch
from botorch.acquisition.knowledge_gradient import qMultiFidelityKnowledgeGradient
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.max_value_entropy_search import qMultiFidelityMaxValueEntropy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import bayesdl as bdl
from bayesdl.bo import Choice, Fidelity, Float, Integer, KnownCost, LearnedCost, Space, Study, minimize
from bayesdl.errors import SettingError
from bayesdl.interop import _optuna_acquisition as acquisitions
from bayesdl.interop import _optuna_goal as goals
from bayesdl.interop._optuna_cost import Spending
from bayesdl.interop._optuna_record import Record
from bayesdl.interop._optuna_space import Encoding
from bayesdl.interop.optuna import BayesdlSampler

ENGINE = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=1.0)), optimize=False)
SOBOL = {"engine": ENGINE, "num_startup": 10_000}
PLANE = Encoding({"x": FloatDistribution(0.0, 1.0), "s": FloatDistribution(0.0, 2.0)})
COST = KnownCost(1.0, {"s": 9.0})


def observed(n=9, outputs=1, noise=0.0):
    """A record over the plane, and its surrogate."""
    g = torch.Generator().manual_seed(3)
    z = torch.rand((n, 2), generator=g, dtype=torch.float64)
    y = torch.stack([torch.sin(5 * z[:, 0]) + 0.4 * z[:, 1], z[:, 1] - z[:, 0]], -1)[:, :outputs]
    engine = ENGINE
    if noise:
        likelihood = bdl.Gaussian(noise)
        engine = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=1.0), likelihood=likelihood), optimize=False)
    posterior = engine.fit(z, y if outputs > 1 else y[:, 0])
    return Record(n, tuple(range(n)), z, y[:, :1], y[:, 1:], z[:0], z[:0]), posterior


def test_a_fidelity_is_a_number_with_a_target():
    space = Space.of({"x": (0.0, 1.0), "epochs": Fidelity(range(1, 101)), "kind": ["a", "b"]})
    assert space.dimensions == (Float(0.0, 1.0), Integer(1, 100), Choice(("a", "b")))
    assert space.fidelities == {"epochs": 100}
    assert Space.of([(0.0, 1.0), Fidelity((0.1, 1.0), target=0.7)]).fidelities == {"x1": 0.7}
    assert Space.of([(0.0, 1.0), Fidelity((0.1, 1.0))]).form == "array"
    assert Space.of({"x": (0.0, 1.0)}).fidelities == {}
    for wrong, says in ((["a", "b"], "must be a number"), (range(3, 4), "several values"), ("low", "must be a pair")):
        with pytest.raises(SettingError, match=says):
            Fidelity(wrong)
    with pytest.raises(SettingError, match="target must lie"):
        Fidelity((0.0, 1.0), target=1.5)


def test_the_target_stands_in_the_place_of_the_fidelity():
    goal = goals.goal({"s": 0.5}, {}, None, PLANE, 0)
    z = torch.tensor([[[0.1, 0.9], [0.2, 0.8]]], dtype=torch.float64)
    assert goal.expand(z).tolist() == [[[0.1, 0.25], [0.2, 0.25]]]
    assert goals.goal({}, {}, None, PLANE, 0) is None


@pytest.mark.parametrize("view", ["gaussian", "samples"])
def test_the_belief_about_the_target_is_the_surrogates_at_the_target(view):
    """Mean, covariance and members: at (x, 2) in place of (x, s); two outputs."""
    record, posterior = observed(outputs=2)
    model = posterior.to_botorch(view=view)
    goal = goals.goal({"s": 2.0}, {}, None, PLANE, 0)
    sought = goals.GoalModel(model, goal)
    at = record.z[:3].clone()
    at[:, 1] = 1.0
    expected, found = model.posterior(at), sought.posterior(record.z[:3])
    assert torch.allclose(found.mean, expected.mean)
    assert torch.allclose(found.variance, expected.variance)
    whole = (lambda p: p.values) if view == "samples" else (lambda p: p.distribution.covariance_matrix)
    assert torch.allclose(whole(found), whole(expected))
    assert torch.allclose(sought.subset_output([1]).posterior(at).mean, expected.mean[:, 1:])


@pytest.mark.parametrize("view", ["gaussian", "samples"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_what_an_evaluation_reveals_is_a_squared_correlation(view, noise):
    """Against numpy's on joint draws (from the surrogate's own covariance, or of its members), noise added."""
    _, posterior = observed(4, noise=noise)
    model = posterior.to_botorch(view=view)
    goal = goals.goal({"s": 2.0}, {}, None, PLANE, 0)
    at = torch.tensor([[0.35, 0.85]], dtype=torch.float64)
    both = torch.cat([at, goal.expand(at)], -2)
    variance = float((model.posterior(at, observation_noise=True).variance - model.posterior(at).variance).detach())
    assert variance > (0.05 if noise else 0.0)
    share = float(goals.revealed(model.posterior(both), goal, torch.tensor(variance, dtype=torch.float64)).detach())
    if view == "samples":
        values = model.posterior(both).values[..., 0].detach().numpy()
        covariance = np.cov(values, rowvar=False, bias=True)
    else:
        covariance = (
            posterior.to_botorch(view="gaussian").posterior(both).distribution.covariance_matrix.detach().numpy()
        )
    expected = covariance[0, 1] ** 2 / ((covariance[0, 0] + variance) * covariance[1, 1])
    assert 0.01 < expected < 0.999
    assert share == pytest.approx(expected, rel=1e-6)


def test_at_the_target_everything_is_revealed_and_less_elsewhere():
    _, posterior = observed()
    model = posterior.to_botorch()
    goal = goals.goal({"s": 2.0}, {}, None, PLANE, 0)
    z = torch.tensor([[[0.35, s]] for s in (1.0, 0.9, 0.5, 0.0)], dtype=torch.float64)
    share = goals.revealed(model.posterior(torch.cat([z, goal.expand(z)], -2)), goal, torch.zeros(()))
    assert float(share[0]) == pytest.approx(1.0, abs=1e-6)
    assert (share.diff() < 0).all()


def test_improvement_at_the_target_is_weighed_by_what_is_revealed():
    """log EI(x at the target) + log |corr|, with the pieces computed apart; the fidelity changes the second alone."""
    record, posterior = observed()
    model = posterior.to_botorch()
    goal = goals.goal({"s": 2.0}, {}, None, PLANE, 0)
    search = acquisitions.Search("auto", {}, None, 64, 1, 16, goal)
    z = torch.tensor([[[0.35, 1.0]], [[0.35, 0.4]]], dtype=torch.float64)
    with acquisitions.seeded(0):
        built = acquisitions.build(search, model, record, PLANE, 0)
        apart = acquisitions.build(
            search._replace(goal=None), model, record._replace(z=goal.expand(record.z)), PLANE, 0
        )
    assert isinstance(built._improvement, qLogNoisyExpectedImprovement)
    share = goals.revealed(model.posterior(torch.cat([z, goal.expand(z)], -2)), goal, built._noise)
    expected = apart(goal.expand(z)) + 0.5 * share.log()
    assert torch.allclose(built(z), expected, atol=1e-6)
    assert float(built(z)[1]) < float(built(z)[0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qMultiFidelityKnowledgeGradient", qMultiFidelityKnowledgeGradient),
        ("qMultiFidelityMaxValueEntropy", qMultiFidelityMaxValueEntropy),
    ],
)
def test_boTorchs_own_acquisitions_get_the_target_and_the_cost(name, kind):
    record, posterior = observed()
    goal = goals.goal({"s": 1.0}, {}, None, PLANE, 0)
    spending = Spending(lambda z: 2.0 * z[..., 1], 0.5)
    search = acquisitions.Search(name, {"num_fantasies": 2}, None, 16, 1, 8, goal, spending)
    with acquisitions.seeded(0):
        built = acquisitions.build(search, posterior.to_botorch(), record, PLANE, 0)
        climbed = acquisitions.surface(built, None, record, spending)
        z = acquisitions.optimise(climbed, search, PLANE, record, 0)
    assert type(built) is kind
    at = torch.tensor([[[0.2, 0.6]]], dtype=torch.float64)
    assert built.project(at).tolist() == [[[0.2, 0.5]]]
    gain = torch.tensor([[3.0]], dtype=torch.float64)
    assert float(built.cost_aware_utility(at, gain)) == pytest.approx(3.0 / math.exp(0.6))
    assert getattr(climbed, "_spending", None) is None  # it has the cost in it
    assert ((z >= 0) & (z <= 1)).all()


def test_acquisitions_that_cannot_do_it_say_so():
    record, posterior = observed()
    goal = goals.goal({"s": 2.0}, {}, None, PLANE, 0)
    search = acquisitions.Search("qUCB", {}, None, 16, 1, 8, goal)
    with pytest.raises(SettingError, match="qMultiFidelityKnowledgeGradient"):
        acquisitions.build(search, posterior.to_botorch(), record, PLANE, 0)
    several = record._replace(y=record.y.expand(-1, 2))
    with pytest.raises(SettingError, match="one objective"):
        acquisitions.build(search, posterior.to_botorch(), several, PLANE, 0)


def staged(point):
    """A bowl whose cheap versions lie beside it and are rippled."""
    gap = 1.0 - point["s"]
    bowl = (point["x"] - 0.6 - 0.1 * gap) ** 2 + (point["y"] - 0.3) ** 2
    return bowl + 0.05 * gap * math.sin(8 * point["x"])


def test_cheap_evaluations_find_the_optimum_of_the_dear_one():
    """With a budget of twelve evaluations at the target: closer than the search at the target alone, by way of many
    cheap ones. The best is of trials at the target only, and the same twice.
    """
    plane = {"x": (0.0, 1.0), "y": (0.0, 1.0)}
    budget = 12 * 11.0
    settings = {"engine": ENGINE, "num_trials": 40, "num_startup": 8, "seed": 2}
    dear = minimize(lambda p: staged({**p, "s": 1.0}), plane, **{**settings, "num_trials": 12, "num_startup": 6})
    space = {**plane, "s": Fidelity((0.0, 1.0))}
    result = minimize(staged, space, cost=KnownCost(1.0, {"s": 10.0}, budget), **settings)
    trials = result.study.trials
    assert [t.exact for t in trials] == [t.params["s"] == 1.0 for t in trials]
    assert [t.exact for t in trials[:8]] == [i % 4 == 0 for i in range(8)]
    assert sum(not t.exact for t in trials) > 8
    assert result.study.spent < budget + 11.0
    assert result.best.exact
    assert result.best.value == min(t.value for t in trials if t.exact)
    found = result.recommend()
    assert found.params["s"] == 1.0
    assert staged(found.params) < max(dear.best.value, 0.01)
    assert found.mean == pytest.approx(staged(found.params), abs=4 * found.deviation + 0.02)
    again = minimize(staged, space, cost=KnownCost(1.0, {"s": 10.0}, budget), **{**settings, "num_trials": 11})
    assert [t.params for t in again.study.trials] == [t.params for t in trials[:11]]


def test_fidelities_of_every_kind_with_choices_and_learned_costs():
    """Cheap ones are asked for, once it is learned that they are cheap and how much they tell."""
    engine = bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_starts=1)
    space = {"x": (0.0, 1.0), "kind": ["a", "b"], "epochs": Fidelity(range(1, 10))}

    def objective(point):
        worse = 0.0 if point["kind"] == "b" else 0.5
        return ((point["x"] - 0.4) ** 2 + worse + 0.3 / point["epochs"], {"cost": float(point["epochs"])})

    result = minimize(objective, space, engine=engine, num_trials=13, num_startup=8, cost=LearnedCost("reported"))
    assert [t.error for t in result.study.trials] == [""] * 13
    assert sum(t.params["epochs"] <= 3 for t in result.study.trials[8:]) >= 2
    assert result.recommend().params["epochs"] == 9
    assert result.recommend().params["kind"] == "b"


def test_a_recommendation_is_of_the_mean_and_heeds_constraints():
    """Noise makes one bad point look best; and the best point is not allowed."""
    noisy = bdl.ExactGP(bdl.GP(bdl.kernels.RBF(lengthscale=1.0), likelihood=bdl.Gaussian(0.3)), optimize=False)
    x = np.linspace(0.0, 1.0, 11)
    values = (x - 0.5) ** 2
    values[9] = -0.05
    study = Study({"x": (0.0, 1.0)}, engine=noisy)
    study.add([{"x": float(v)} for v in x], values)
    assert study.best.x["x"] == pytest.approx(0.9)
    assert study.recommend().params["x"] == pytest.approx(0.5, abs=0.11)
    bounded = Study({"x": (0.0, 1.0)}, engine=ENGINE, constraints=("edge",), directions="maximize")
    limits = [{"edge": float(v) - 0.35} for v in x]
    bounded.add([{"x": float(v)} for v in x], x, constraints=limits)
    found = bounded.recommend()
    assert (found.params["x"], found.mean) == (pytest.approx(0.3), pytest.approx(0.3, abs=0.02))
    several = Study({"x": (0.0, 1.0)}, engine=ENGINE, directions=("minimize", "minimize"))
    with pytest.raises(SettingError, match="no one best"):
        several.recommend()
    with pytest.raises(SettingError, match="two finished"):
        Study({"x": (0.0, 1.0)}, engine=ENGINE).recommend()


def test_settings_that_make_no_sense_are_refused():
    space = {"x": (0.0, 1.0), "s": Fidelity((0.0, 1.0))}
    with pytest.raises(SettingError, match="fidelities need a cost"):
        Study(space)
    with pytest.raises(SettingError, match="one objective"):
        Study(space, cost="seconds", directions=("minimize", "minimize"))
    with pytest.raises(SettingError, match="without fidelities"):
        Study(space, cost="seconds", trust_region=True)
    with pytest.raises(SettingError, match="fidelities need a cost"):
        BayesdlSampler(ENGINE, fidelities={"s": 1.0})


def test_the_encoding_knows_the_values_behind_its_coordinates():
    encoding = Encoding({
        "rate": FloatDistribution(1e-4, 1.0, log=True),
        "n": IntDistribution(10, 50, step=10),
        "kind": CategoricalDistribution(["a", "b", "c"]),
    })  # fmt: skip
    points = [{"rate": 0.01, "n": 30, "kind": "b"}, {"rate": 1.0, "n": 10, "kind": "c"}]
    z = encoding.encode(points)
    assert encoding.values("rate", z).tolist() == pytest.approx([0.01, 1.0])
    assert encoding.values("n", z).tolist() == pytest.approx([30.0, 10.0])
    assert encoding.inward("rate", 0.01) == pytest.approx(0.5)
    with pytest.raises(TypeError, match="no numbers"):
        encoding.values("kind", z)
