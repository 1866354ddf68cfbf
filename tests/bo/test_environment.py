"""Environments: which draws stand for a law, what is believed of the mean and the risk over them, and what is found."""

import math

import numpy as np
import pytest
import torch
from botorch.exceptions.errors import UnsupportedError
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats

import bayesdl as bdl
from bayesdl.bo import Environment, Float, Risk, Space, Study, minimize
from bayesdl.errors import SettingError
from bayesdl.interop import _optuna_acquisition  # noqa: F401 (BoTorch draws from numpy's global state on import)
from bayesdl.interop import _optuna_goal as goals
from bayesdl.interop._optuna_space import Encoding

ENGINE = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=1.0)), optimize=False)
PLANE = Encoding({"x": FloatDistribution(0.0, 1.0), "w": FloatDistribution(-1.0, 3.0)})
NORMAL = torch.distributions.Normal(0.5, 0.7)


def fitted(outputs=1):
    g = torch.Generator().manual_seed(3)
    z = torch.rand((9, 2), generator=g, dtype=torch.float64)
    y = torch.stack([torch.sin(5 * z[:, 0]) * z[:, 1], z[:, 1] - z[:, 0]], -1)[:, :outputs]
    return z, ENGINE.fit(z, y if outputs > 1 else y[:, 0])


def test_draws_are_quantiles_of_the_law_within_the_bounds():
    """Against scipy's truncated normal, on a linear and on a logarithmic scale, and on a grid."""
    u = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    low, high = (-1.0 - 0.5) / 0.7, (3.0 - 0.5) / 0.7
    expected = stats.truncnorm(low, high, loc=0.5, scale=0.7).ppf(u.numpy())
    assert PLANE.drawn("w", NORMAL, u).numpy() == pytest.approx((expected + 1) / 4, abs=1e-6)
    assert torch.equal(PLANE.drawn("w", None, u), u)
    others = Encoding({
        "rate": FloatDistribution(0.1, 10.0, log=True),
        "n": IntDistribution(0, 4),
        "kind": CategoricalDistribution(["a", "b", "c"]),
    })  # fmt: skip
    rates = stats.uniform(1.0, 4.0).ppf(u.numpy())
    found = others.drawn("rate", torch.distributions.Uniform(1.0, 5.0), u)
    assert found.numpy() == pytest.approx((np.log(rates) - np.log(0.1)) / np.log(100), abs=1e-6)
    near = (others.drawn("n", torch.distributions.Normal(2.2, 0.01), u) * 4).tolist()
    assert near == [2.0] * 23
    counts = others.drawn("kind", (0.5, 0.0, 0.5), torch.linspace(0.001, 0.999, 100, dtype=torch.float64))
    assert (counts == 0).sum() == 50
    assert (counts == 2).sum() == 50
    assert set(others.drawn("kind", None, u).tolist()) == {0.0, 1.0, 2.0}


def test_the_draws_of_an_environment_follow_its_law():
    """64 quasi-random ones: mean and spread of the truncated normal, to a few hundredths; the same each time."""
    goal = goals.goal({}, {"w": NORMAL}, Risk(num_draws=64), PLANE, 5)
    law = stats.truncnorm((-1.0 - 0.5) / 0.7, (3.0 - 0.5) / 0.7, loc=0.5, scale=0.7)
    values = goal.points[:, 0] * 4 - 1
    assert float(values.mean()) == pytest.approx(law.mean(), abs=0.03)
    assert float(values.std()) == pytest.approx(law.std(), abs=0.05)
    assert torch.equal(goal.points, goals.goal({}, {"w": NORMAL}, Risk(num_draws=64), PLANE, 5).points)
    assert not torch.equal(goal.points, goals.goal({}, {"w": NORMAL}, Risk(num_draws=64), PLANE, 6).points)


def test_every_draw_stands_in_the_place_of_the_environment():
    goal = goals.Goal({}, (1,), torch.tensor([[0.1], [0.2], [0.3]]).double(), "mean", 0.0)
    z = torch.tensor([[[0.7, 0.9], [0.8, 0.9]]], dtype=torch.float64)
    expected = [[0.7, 0.1], [0.7, 0.2], [0.7, 0.3], [0.8, 0.1], [0.8, 0.2], [0.8, 0.3]]
    assert torch.allclose(goal.expand(z), torch.tensor([expected], dtype=torch.float64))
    both = goals.goal({"x": 0.25}, {"w": None}, Risk(num_draws=2), PLANE, 0)
    assert torch.equal(both.expand(z)[0, :, 0], torch.full((4,), 0.25).double())
    assert torch.equal(both.expand(z)[0, :, 1], both.points[:, 0].repeat(2))


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_mean_over_the_environment_is_a_gaussian(outputs):
    """Against the surrogate's joint covariance of all points between two matrices of averages; two t-batches."""
    z, posterior = fitted(outputs)
    goal = goals.goal({}, {"w": NORMAL}, Risk(num_draws=3), PLANE, 0)
    model = posterior.to_botorch(view="gaussian")
    at = torch.stack([z[:2], z[3:5]])
    found = goals.GoalModel(model, goal).posterior(at)
    averages = np.kron(np.eye(2), np.full((1, 3), 1 / 3))
    for b in range(2):
        for k in range(outputs):
            one = model.subset_output([k]).posterior(goal.expand(at[b]))
            mean, covariance = one.mean[:, 0].detach().numpy(), one._covariance[0].detach().numpy()
            assert found.mean[b, :, k].detach().numpy() == pytest.approx(averages @ mean, rel=1e-9)
            own = goals.GoalModel(model, goal).subset_output([k]).posterior(at)._covariance[b, 0].detach().numpy()
            assert own == pytest.approx(averages @ covariance @ averages.T, rel=1e-7, abs=1e-12)
            assert found.variance[b, :, k].detach().numpy() == pytest.approx(own.diagonal(), rel=1e-9)


@pytest.mark.parametrize("kind", ["mean", "var", "cvar"])
def test_the_risk_of_every_member_is_that_of_its_definition(kind):
    """Of ten draws at level 0.7: the fourth worst, which seven reach, and the mean of the four worst. Others: mean."""
    z, posterior = fitted(2)
    goal = goals.goal({}, {"w": NORMAL}, Risk(kind, 0.7, 10), PLANE, 0)
    model = posterior.to_botorch(view="samples", num_samples=16)
    found = goals.GoalModel(model, goal).posterior(z[:4]).values.detach()
    values = model.posterior(goal.expand(z[:4])).values.detach().numpy().reshape(16, 4, 10, 2)
    worst = np.sort(values[..., 0], -1)
    expected = {"mean": worst.mean(-1), "var": worst[..., 3], "cvar": worst[..., :4].mean(-1)}[kind]
    assert found[..., 0].numpy() == pytest.approx(expected, rel=1e-6)
    assert found[..., 1].numpy() == pytest.approx(values[..., 1].mean(-1), rel=1e-6)
    if kind != "mean":
        with pytest.raises(UnsupportedError, match="view by samples"):
            goals.GoalModel(posterior.to_botorch(view="gaussian"), goal).posterior(z[:4])


def test_what_is_sought_has_no_noise():
    _, posterior = fitted()
    goal = goals.goal({}, {"w": None}, None, PLANE, 0)
    with pytest.raises(UnsupportedError, match="not observed"):
        goals.GoalModel(posterior.to_botorch(), goal).posterior(torch.zeros(1, 2).double(), observation_noise=True)


@pytest.mark.parametrize("view", ["gaussian", "samples"])
def test_what_an_evaluation_reveals_of_the_mean(view):
    """The squared correlation of f(x, w) with the average over the draws; against numpy on the joint covariance."""
    _, posterior = fitted()
    goal = goals.goal({}, {"w": NORMAL}, Risk(num_draws=4), PLANE, 0)
    model = posterior.to_botorch(view=view)
    at = torch.tensor([[[0.35, 0.2]]], dtype=torch.float64)
    answer = model.posterior(torch.cat([at, goal.expand(at)], -2))
    share = goals.revealed(answer, goal, torch.zeros(()))
    if view == "gaussian":
        covariance = answer._covariance[0, 0].detach().numpy()
    else:
        covariance = np.cov(answer.values[0, ..., 0].detach().numpy(), rowvar=False)
    pick, mean = np.eye(5)[0], np.array([0.0, 0.25, 0.25, 0.25, 0.25])
    cross = pick @ covariance @ mean
    expected = cross**2 / (pick @ covariance @ pick * (mean @ covariance @ mean))
    assert float(share) == pytest.approx(expected, rel=1e-6)


def uneven(point):
    """Gains x (w - 0.3): large x gains in the mean over w in [0, 1], and loses where w is small."""
    return point["x"] * (point["w"] - 0.3) - 0.1 * (point["x"] - 0.5) ** 2


@pytest.mark.parametrize(
    ("risk", "best"),
    [
        ("mean", 1.0),
        # every member at every draw of the environment, in every step of the search
        pytest.param(Risk("cvar", 0.8, 8), 0.0, marks=pytest.mark.slow),
        pytest.param(Risk("var", 0.8, 8), 0.0, marks=pytest.mark.slow),
    ],
    ids=["mean", "cvar", "var"],
)
def test_the_best_for_the_mean_and_for_the_worst_differ(risk, best):
    """For the mean x = 1; where w is small, x = 0. What is recommended is one of 13 points over [0, 1], not far off."""
    space = {"x": (0.0, 1.0), "w": Environment((0.0, 1.0))}
    search = {"num_samples": 32, "num_restarts": 1, "num_candidates": 16, "num_startup": 8, "seed": 1}
    # the worst differ by hundredths: the noise has to be found out to be small
    engine = bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_starts=1)
    study = Study(space, directions="maximize", engine=engine, risk=risk, **search)
    study.optimize(uneven, 13)
    assert [t.error for t in study.trials] == [""] * 13
    found = study.recommend()
    assert set(found.params) == {"x"}
    assert found.params["x"] == pytest.approx(best, abs=0.3)
    if risk == "mean":
        x = found.params["x"]
        assert found.mean == pytest.approx(x * 0.2 - 0.1 * (x - 0.5) ** 2, abs=0.05)
    with pytest.raises(SettingError, match=r"study.recommend\(\)"):
        _ = study.best


def test_the_same_study_twice_and_its_report(tmp_path):
    space = {"x": (0.0, 1.0), "w": Environment((0.0, 1.0), torch.distributions.Normal(0.4, 0.1)), "k": ["a", "b"]}
    settings = {"num_trials": 8, "num_startup": 6, "engine": ENGINE}
    first, second = (minimize(lambda p: (p["x"] - p["w"]) ** 2, space, **settings) for _ in range(2))
    assert [t.params for t in first.study.trials] == [t.params for t in second.study.trials]
    first.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Recommended" in text
    assert "single draws of w" in text
    assert first.plot() is not None


def test_settings_that_make_no_sense_are_refused():
    assert Space.of({"x": Environment((0.0, 1.0))}).dimensions == (Float(0.0, 1.0),)
    shares = Environment(["a", "b"], (1.0, 3.0))
    assert shares.law == pytest.approx((0.25, 0.75))
    for make, says in (
        (lambda: Environment((0.0, 1.0), "normal"), "torch distribution"),
        (lambda: Environment((0.0, 1.0), torch.distributions.Gamma(2.0, 1.0)), "cdf and icdf"),
        (lambda: Environment((0.0, 1.0), torch.distributions.Uniform(2.0, 3.0)), "mass within"),
        (lambda: Environment((0.0, 1.0), torch.distributions.Normal(torch.zeros(2), 1.0)), "of one number"),
        (lambda: Environment(["a", "b"], (1.0,)), "probability for each"),
        (lambda: Environment(["a", "b"], (0.0, 0.0)), "probability for each"),
        (lambda: Risk("worst"), "kind"),
        (lambda: Risk("cvar", 1.0), "level"),
        (lambda: Risk(num_draws=1), "num_draws"),
    ):
        with pytest.raises(SettingError, match=says):
            make()
    space = {"x": (0.0, 1.0), "w": Environment((0.0, 1.0))}
    with pytest.raises(SettingError, match="risk must be"):
        Study(space, risk=0.5)
    with pytest.raises(SettingError, match="without fidelities or an environment"):
        Study(space, trust_region=True)
    with pytest.raises(SettingError, match="one objective"):
        Study(space, directions=("minimize", "minimize"))
    study = Study(space, acquisition="qUCB", num_startup=2, engine=ENGINE)
    study.add([{"x": 0.1, "w": 0.1}, {"x": 0.5, "w": 0.9}], [1.0, 2.0])
    with pytest.raises(SettingError, match="logarithmic improvement"):
        study.ask()
    assert math.isnan(study.spent)
