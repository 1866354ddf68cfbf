"""The sampler in Optuna's own programs: what it fits, what it proposes, and that the same record proposes the same."""

import math
import warnings

import optuna
import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    qKnowledgeGradient,
    qLogNoisyExpectedImprovement,
)
from botorch.acquisition.analytic import LogConstrainedExpectedImprovement
from botorch.acquisition.logei import qLogProbabilityOfFeasibility
from botorch.acquisition.max_value_entropy_search import qMaxValueEntropy
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.parego import qLogNParEGO
from botorch.utils.multi_objective.box_decompositions import DominatedPartitioning
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

import bayesdl as bdl
from bayesdl.errors import NumericalError, NumericalWarning, SettingError
from bayesdl.interop import _optuna_acquisition as acquisitions
from bayesdl.interop import _optuna_marginal as marginal
from bayesdl.interop._optuna_record import HISTORY, LOST, RETRY_OF, SURPLUS, Record, ranks, read
from bayesdl.interop._optuna_space import Encoding
from bayesdl.interop.optuna import BayesdlSampler

ENGINE = bdl.ExactGP(bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))), num_starts=1, max_iterations=30)
QUICK = {"num_startup": 4, "num_samples": 16, "num_restarts": 2, "num_candidates": 16}
LINE = {"x": FloatDistribution(-1.0, 3.0)}
SQUARE = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def record(y, *, constraints=None, p=1, pending=0, failed=0, rank=None):
    """A record of evenly spread points with objectives y (n, m)."""
    y = torch.as_tensor(y, dtype=torch.float64)
    n = len(y)
    z = torch.stack([(torch.arange(n, dtype=torch.float64) * (0.37 + 0.2 * j) + 0.1) % 1 for j in range(p)], -1)
    limits = torch.zeros(n, 0, dtype=torch.float64) if constraints is None else torch.as_tensor(constraints).double()
    extra = torch.full((pending, p), 0.45, dtype=torch.float64)
    lost = torch.full((failed, p), 0.9, dtype=torch.float64)
    return Record(n if rank is None else rank, tuple(range(n)), z, y, limits, lost, extra)


def gathered(study, **sampler):
    sampler = BayesdlSampler(ENGINE, **{**QUICK, **sampler})
    study.sampler = sampler
    return sampler


def test_it_finds_a_minimum_in_a_program_of_optuna():
    study = optuna.create_study(sampler=BayesdlSampler(ENGINE, **QUICK))
    study.optimize(lambda trial: (trial.suggest_float("x", -1.0, 3.0) - 0.7) ** 2, n_trials=10)
    assert study.best_value < 1e-2
    timed = [t.system_attrs.get("bayesdl:seconds") for t in study.trials]
    assert [t is not None for t in timed] == [False] * 4 + [True] * 6


def test_maximising_is_minimising_the_negative():
    """Exactly: signs are turned before anything is fitted."""
    down = optuna.create_study(sampler=BayesdlSampler(ENGINE, space=LINE, **QUICK))
    up = optuna.create_study(sampler=BayesdlSampler(ENGINE, space=LINE, **QUICK), direction="maximize")
    down.optimize(lambda trial: math.cos(3 * trial.suggest_float("x", -1.0, 3.0)), n_trials=6)
    up.optimize(lambda trial: -math.cos(3 * trial.suggest_float("x", -1.0, 3.0)), n_trials=6)
    assert [t.params for t in down.trials] == [t.params for t in up.trials]


def test_the_same_record_gives_the_same_proposal_on_every_worker():
    """Fresh samplers, one each trial, propose what one sampler does; another seed proposes otherwise."""

    def run(fresh, seed):
        study = optuna.create_study(sampler=BayesdlSampler(ENGINE, space=LINE, seed=seed, **QUICK))
        for _ in range(6):
            if fresh:
                study.sampler = BayesdlSampler(ENGINE, space=LINE, seed=seed, **QUICK)
            study.optimize(lambda trial: math.sin(4 * trial.suggest_float("x", -1.0, 3.0)), n_trials=1)
        return [t.params["x"] for t in study.trials]

    assert run(True, 3) == run(False, 3)
    assert run(False, 3)[4:] != run(False, 4)[4:]


def test_a_space_that_grows_is_learned_from_finished_trials():
    """Parameters that no finished trial had are uniform; conditional ones never enter the surrogate."""

    def objective(trial):
        x = trial.suggest_float("x", 0.0, 1.0)
        kind = trial.suggest_categorical("kind", ["line", "square"])
        extra = trial.suggest_int("power", 1, 3) if kind == "square" else 1
        return (x - 0.4) ** 2 + 0.1 * extra

    study = optuna.create_study(sampler=BayesdlSampler(ENGINE, **QUICK))
    study.optimize(objective, n_trials=8)
    assert study.best_params["kind"] == "line" or study.best_params["power"] == 1
    assert len({t.params["x"] for t in study.trials}) == 8


def test_failed_and_pruned_trials_stay_out_of_the_value_model():
    space = {"x": FloatDistribution(0.0, 1.0)}

    def make(x, **more):
        return create_trial(params={"x": x}, distributions=space, **more)

    study = optuna.create_study()
    study.add_trial(make(0.1, value=1.0))
    study.add_trial(make(0.2, state=TrialState.FAIL))
    study.add_trial(make(0.3, state=TrialState.PRUNED))
    study.add_trial(make(0.4, value=math.inf))
    study.add_trial(make(0.5, state=TrialState.RUNNING))
    study.add_trial(make(0.6, value=-2.0))
    study.add_trial(create_trial(params={"z": 0.5}, distributions={"z": space["x"]}, value=9.0))
    found = read(study.trials, 99, Encoding(space), study.directions, None)
    assert found.z.flatten().tolist() == [0.1, 0.6]
    assert found.y.flatten().tolist() == [-1.0, 2.0]
    assert found.failed.flatten().tolist() == [0.2, 0.4]
    assert found.pending.flatten().tolist() == [0.5]
    assert read(study.trials, 4, Encoding(space), study.directions, None, frozenset()).pending.numel() == 0
    assert read(study.trials, 99, Encoding(space), study.directions, None, frozenset({4})).pending.numel() == 0


def test_a_retry_has_the_rank_of_the_first_attempt():
    """Numbers 0..6: 1 died and is retried as 3, which died and is retried as 5; 4 was withdrawn."""
    trials = [
        create_trial(value=0.0),
        create_trial(state=TrialState.FAIL, system_attrs={LOST: True}),
        create_trial(value=2.0),
        create_trial(state=TrialState.FAIL, system_attrs={LOST: True, RETRY_OF: 1, HISTORY: [1]}),
        create_trial(state=TrialState.FAIL, system_attrs={SURPLUS: True}),
        create_trial(value=1.0, system_attrs={RETRY_OF: 3, HISTORY: [1, 3]}),
        create_trial(value=3.0),
    ]
    study = optuna.create_study()
    for trial in trials:
        study.add_trial(trial)
    assert ranks(study.trials) == {0: 0, 1: 1, 2: 2, 3: 1, 5: 1, 6: 3}
    found = read(study.trials, 6, Encoding({}), study.directions, None)
    assert (found.rank, found.ranks, found.y.flatten().tolist()) == (3, (0, 1, 2), [0.0, -1.0, -2.0])


def test_running_trials_are_pending_and_not_proposed_again():
    """Ten asked for at once are ten different points, away from one another once the surrogate proposes."""
    study = optuna.create_study(sampler=BayesdlSampler(ENGINE, space=SQUARE, **QUICK))
    study.optimize(lambda t: (t.suggest_float("x", 0, 1) - 0.3) ** 2 + t.suggest_float("y", 0, 1), n_trials=6)
    asked = [study.ask(fixed_distributions=SQUARE) for _ in range(4)]
    points = torch.tensor([[t.params["x"], t.params["y"]] for t in asked], dtype=torch.float64)
    assert torch.pdist(points).min() > 1e-3


def test_constraints_are_modelled_as_outputs():
    """Minimise x where only x >= 0.6 is allowed: proposals come to the edge from the right side."""
    study = optuna.create_study(sampler=BayesdlSampler(ENGINE, space={"x": FloatDistribution(0.0, 1.0)}, **QUICK))

    def objective(trial):
        x = trial.suggest_float("x", 0.0, 1.0)
        trial.set_constraint("edge", 0.6 - x)
        return x

    study.optimize(objective, n_trials=10)
    feasible = [t.value for t in study.trials if t.params["x"] >= 0.6]
    assert 0.6 <= min(feasible) < 0.62


@pytest.mark.parametrize(
    ("asked", "y", "constraints", "kind"),
    [
        ("auto", [[1.0], [0.5], [2.0]], None, qLogNoisyExpectedImprovement),
        ("auto", [[1.0], [0.5], [2.0]], [[-1.0], [1.0], [1.0]], qLogNoisyExpectedImprovement),
        ("auto", [[1.0], [0.5], [2.0]], [[2.0], [1.0], [1.0]], qLogProbabilityOfFeasibility),
        ("qLogNEI", [[1.0, 0.0], [0.5, 2.0], [0.0, 3.0]], None, qLogNoisyExpectedHypervolumeImprovement),
        ("auto", [[1.0, 0.0, 1, 2, 3], [0.5, 2.0, 3, 2, 1], [0, 3, 1, 1, 1]], None, qLogNParEGO),
        ("LogExpectedImprovement", [[1.0], [0.5], [2.0]], None, LogExpectedImprovement),
        ("qKnowledgeGradient", [[1.0], [0.5], [2.0]], None, qKnowledgeGradient),
        ("qMaxValueEntropy", [[1.0], [0.5], [2.0]], None, qMaxValueEntropy),
        ("LogConstrainedExpectedImprovement", [[1.0], [2.0]], [[-1.0], [1.0]], LogConstrainedExpectedImprovement),
    ],
)
def test_names_become_boTorchs_acquisitions(asked, y, constraints, kind):
    told = record(y, constraints=constraints)
    encoding = Encoding({"x": FloatDistribution(0.0, 1.0)})
    options = {"num_fantasies": 2} if asked == "qKnowledgeGradient" else {}
    search = acquisitions.Search(asked, options, None, 16, 2, 16)
    outputs = torch.cat([told.y, told.constraints], -1)
    model = ENGINE.fit(told.z, outputs if outputs.shape[-1] > 1 else outputs[:, 0]).to_botorch()
    points = torch.rand(3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with acquisitions.seeded(0):
        built = acquisitions.build(search, model, told, encoding, 0)
        assert isinstance(built, kind)
        if asked != "qKnowledgeGradient":
            assert torch.isfinite(built(points)).all()


def test_an_acquisition_of_ones_own_and_an_unknown_name():
    told = record([[1.0], [0.5], [2.0]])
    encoding = Encoding({"x": FloatDistribution(0.0, 1.0)})
    model = ENGINE.fit(told.z, told.y[:, 0]).to_botorch()
    own = acquisitions.Search(lambda m, r: LogExpectedImprovement(m, best_f=r.y.max()), {}, None, 16, 2, 16)
    assert isinstance(acquisitions.build(own, model, told, encoding, 0), LogExpectedImprovement)
    with pytest.raises(SettingError, match="name that BoTorch knows"):
        acquisitions.build(own._replace(acquisition="qLogEIE"), model, told, encoding, 0)
    bounded = told._replace(constraints=-torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(SettingError, match="knows no constraints"):
        acquisitions.build(own._replace(acquisition="LogExpectedImprovement"), model, bounded, encoding, 0)
    with pytest.raises(SettingError, match="must suit 1 objective"):
        acquisitions.build(own._replace(acquisition="qHypervolumeKnowledgeGradient"), model, told, encoding, 0)


def test_the_gradient_is_finite_where_the_point_was_observed():
    """There the joint covariance is singular, and the gradient of its factor is not a number."""
    told = record([[1.0], [0.5], [2.0], [1.5]])
    encoding = Encoding({"x": FloatDistribution(0.0, 1.0)})
    model = ENGINE.fit(told.z, told.y[:, 0]).to_botorch()
    with acquisitions.seeded(0):
        built = acquisitions.build(acquisitions.Search("auto", {}, None, 16, 2, 16), model, told, encoding, 0)
    for z in (told.z[2], told.z[2] + 1e-9, told.z[2] + 1e-3):
        at = z.reshape(1, 1, 1).clone().requires_grad_(True)
        acquisitions.surface(built, None, told)(at).sum().backward()
        assert torch.isfinite(at.grad).all()


def test_an_analytic_acquisition_believes_the_mean_at_pending_points():
    """The improvement at a pending point falls to a tenth at most."""
    told = record([[1.0], [0.5], [2.0], [1.5]])
    encoding = Encoding({"x": FloatDistribution(0.0, 1.0)})
    model = ENGINE.fit(told.z, told.y[:, 0]).to_botorch()
    search = acquisitions.Search("LogExpectedImprovement", {}, None, 16, 2, 16)
    at = torch.tensor([[[0.45]]], dtype=torch.float64)
    before = acquisitions.build(search, model, told, encoding, 0)(at)
    after = acquisitions.build(search, model, told._replace(pending=at[0]), encoding, 0)(at)
    assert float(after) < float(before) - 2.3


@pytest.mark.parametrize("pending", [0, 2])
def test_failures_steer_proposals_away_once_they_are_many(pending):
    """Half of the line fails: there the acquisition is lower than without, elsewhere hardly changed."""
    told = record([[0.1], [0.2], [0.3]], pending=pending)
    told = told._replace(
        z=torch.tensor([[0.05], [0.15], [0.3]], dtype=torch.float64),
        failed=torch.tensor([[0.7], [0.8], [0.9], [1.0]], dtype=torch.float64),
    )
    study = optuna.create_study(study_name="failures", direction="maximize")
    sampler = BayesdlSampler(ENGINE, **QUICK)
    encoding = Encoding({"x": FloatDistribution(0.0, 1.0)})
    success = sampler._success(study, told, encoding)
    search = acquisitions.Search("auto", {}, None, 64, 2, 16)
    with acquisitions.seeded(0):
        plain = acquisitions.build(search, sampler.surrogate(study, told, encoding), told, encoding, 0)
    lowered = acquisitions.surface(plain, success, told)
    at = torch.tensor([[[0.1]], [[0.85]]], dtype=torch.float64)
    change = (lowered(at) - plain(at)).detach()
    assert change[0] > -0.2
    assert change[1] < -2.0
    assert sampler._success(study, told._replace(failed=told.failed[:0]), encoding) is None


def test_success_is_the_normal_probability_of_a_positive_indicator():
    """Against scipy, from the surrogate's own mean and variance."""
    from scipy.stats import norm

    told = record([[1.0], [1.0], [-1.0], [-1.0]])
    model = ENGINE.fit(told.z, told.y[:, 0]).to_botorch(view="gaussian")
    at = torch.tensor([[[0.2]], [[0.7]]], dtype=torch.float64)
    law = model.posterior(at)
    expected = norm.logsf(0.0, law.mean.detach().numpy(), law.variance.detach().sqrt().numpy())
    assert acquisitions.Feasibility(model)(at).detach().numpy() == pytest.approx(expected[..., 0], rel=1e-9)


MIXED = {
    "x": FloatDistribution(0.0, 1.0),
    "n": IntDistribution(0, 30),
    "kind": CategoricalDistribution(["a", "b", "c"]),
    "rate": FloatDistribution(1e-3, 1.0, log=True),
}


@pytest.mark.parametrize(
    "space",
    [
        {k: MIXED[k] for k in ("x", "kind")},  # few combinations: a continuous search for each
        {k: MIXED[k] for k in ("n", "kind")},  # finite: every point is scored
        {k: MIXED[k] for k in ("x", "n", "kind")},  # many combinations: alternating search
    ],
    ids=["slices", "listed", "alternating"],
)
def test_spaces_of_numbers_integers_and_choices_are_searched(space):
    """Sixteen trials find the right choice and come close in the rest."""
    study = optuna.create_study(sampler=BayesdlSampler(ENGINE, space=space, **QUICK))

    def objective(trial):
        value = 0.0 if trial.suggest_categorical("kind", ["a", "b", "c"]) == "b" else 1.0
        if "x" in space:
            value += (trial.suggest_float("x", 0.0, 1.0) - 0.3) ** 2
        if "n" in space:
            value += abs(trial.suggest_int("n", 0, 30) - 17) / 10
        return value

    study.optimize(objective, n_trials=16)
    assert study.best_params["kind"] == "b"
    assert study.best_value < 0.5
    if space.keys() == {"n", "kind"}:
        assert len({tuple(t.params.items()) for t in study.trials}) == 16  # a finite space: no point twice


def test_a_surrogate_that_fails_leaves_a_quasi_random_point():
    class Broken:
        def fit(self, x, y, *, seed=0):
            raise NumericalError("no jitter makes it positive definite")

    study = optuna.create_study(sampler=BayesdlSampler(Broken(), space=LINE, **QUICK))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        study.optimize(lambda trial: trial.suggest_float("x", -1.0, 3.0) ** 2, n_trials=6)
    assert sum(issubclass(w.category, NumericalWarning) for w in said) == 2
    assert [("bayesdl:fallback" in t.system_attrs) for t in study.trials] == [False] * 4 + [True] * 2
    assert len({t.params["x"] for t in study.trials}) == 6


def test_a_bug_in_an_engine_is_not_hidden():
    class Wrong:
        def fit(self, x, y, *, seed=0):
            raise KeyError("a bug")

    study = optuna.create_study(sampler=BayesdlSampler(Wrong(), space=LINE, **QUICK))
    with pytest.raises(KeyError, match="a bug"):
        study.optimize(lambda trial: trial.suggest_float("x", -1.0, 3.0) ** 2, n_trials=6)


def test_refits_every_so_often_and_conditions_between():
    """With refit_every=3 and 4 to 9 observations, the engine is fitted to 3 and 6 (and 9); the rest is conditioning."""
    sizes = []

    class Counting:
        def fit(self, x, y, *, seed=0):
            sizes.append(len(x))
            return ENGINE.fit(x, y, seed=seed)

    sampler = BayesdlSampler(Counting(), space=LINE, refit_every=3, **QUICK)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: trial.suggest_float("x", -1.0, 3.0) ** 2, n_trials=10)
    assert sizes == [3, 6, 9]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "gp"}, "engine must be an engine"),
        ({"acquisition": 3}, "acquisition must be a name"),
        ({"num_startup": 1}, "num_startup"),
        ({"num_samples": 0}, "num_samples"),
        ({"refit_every": 0}, "refit_every"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        BayesdlSampler(**{"engine": ENGINE, **settings})


def test_a_network_proposes_by_its_marginals():
    """Close to a quadrature of the improvement, draws no function, and is believed about pending points and limits."""
    engine = bdl.PFN.from_pretrained("bo")
    encoding = Encoding(SQUARE)
    told = record(torch.tensor([[0.3], [1.1], [-0.4], [0.9], [0.2]]), p=2)
    posterior = engine.fit(encoding.expand(told.z), told.y[:, 0])
    assert marginal.applies(posterior, told, "auto", None)
    assert not marginal.applies(posterior, told, "qLogNEI", None)
    assert not marginal.applies(posterior, record(torch.ones(5, 5), p=2), "auto", None)
    built = marginal.build(posterior, told, encoding)
    z = torch.rand(6, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law = posterior.predict(z.squeeze(-2), noise=False)
    best = float(posterior.predict(told.z, noise=False).mean.max())
    grid = best + torch.linspace(0.0, 12.0, 24001, dtype=torch.float64)
    above = 1 - law.cdf(grid.unsqueeze(-1).expand(-1, 6))  # E[(f - best)+] is the integral of P(f > t) above best
    torch.testing.assert_close(built(z), torch.trapezoid(above, grid, dim=0).log(), rtol=1e-4, atol=1e-4)
    assert "_drawn" not in vars(built.model._law)
    waiting = marginal.build(posterior, told._replace(pending=z[0]), encoding)
    believed = posterior.condition_on(z[0], posterior.predict(z[0], noise=False).mean)
    again = marginal.build(believed, told, encoding)
    torch.testing.assert_close(waiting(z), again(z))


def test_a_network_heeds_constraints():
    """log P(c <= 0) is added; where nothing is feasible it is all that counts."""
    encoding = Encoding(SQUARE)
    y, limits = torch.tensor([[0.3], [1.1], [-0.4], [0.9], [0.2]]), torch.tensor([[-1.0], [0.5], [-0.2], [0.1], [0.3]])
    told = record(y, constraints=limits, p=2)
    posterior = bdl.PFN.from_pretrained("bo").fit(told.z, torch.cat([told.y, told.constraints], -1))
    z = torch.rand(6, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    allowed = posterior.predict(z.squeeze(-2), noise=False).cdf(torch.zeros(6, 2, dtype=torch.float64))[:, 1].log()
    alone = marginal.build(posterior, told._replace(constraints=limits.abs().double()), encoding)
    torch.testing.assert_close(alone(z), allowed)
    both = marginal.build(posterior, told, encoding)
    free = marginal.MarginalImprovement(both.model.subset_output([0]), encoding, both._boxes, 1)
    torch.testing.assert_close(both(z), free(z) + allowed)


def test_a_network_weighs_two_objectives_by_the_hypervolume():
    """E[improvement] is the integral of P(f_1 > p_1) P(f_2 > p_2) over what is not dominated, here on a grid; a
    constraint adds its log probability; the gradient is that of finite differences."""
    encoding = Encoding(SQUARE)
    y = torch.tensor([[0.3, 1.0], [1.1, -0.2], [-0.4, 0.1], [0.9, 0.4], [0.2, 0.2]])
    told, worst = record(y, p=2), (-0.5, -0.7)
    posterior = bdl.PFN.from_pretrained("bo").fit(encoding.expand(told.z), told.y)
    assert marginal.applies(posterior, told, "auto", None)
    built = marginal.build(posterior, told, encoding, worst)
    z = torch.rand(5, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law = posterior.predict(z.squeeze(-2), noise=False)
    front = posterior.predict(told.z, noise=False).mean
    axes = [low + (torch.arange(1600, dtype=torch.float64) + 0.5) * 0.005 for low in worst]
    wide = torch.stack([axis.unsqueeze(-1).expand(-1, 5) for axis in axes], -1)  # (1600, 5, 2)
    above = 1 - law.cdf(wide)
    dominated = ((front[:, 0] >= axes[0][:, None])[:, None] & (front[:, 1] >= axes[1][:, None])[None]).any(-1)
    want = torch.einsum("ik,jk,ij->k", above[..., 0], above[..., 1], (~dominated).double()) * 0.005**2
    torch.testing.assert_close(built(z).exp(), want, rtol=0.01, atol=1e-6)  # borders lie between points of the grid
    at = z[:2].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(built, (at,), eps=1e-6, rtol=1e-4, atol=1e-6)
    limits = torch.tensor([[-1.0], [0.5], [-0.2], [-0.1], [0.3]])
    both = bdl.PFN.from_pretrained("bo").fit(told.z, torch.cat([told.y, limits.double()], -1))
    held = marginal.build(both, told._replace(constraints=limits.double()), encoding, worst)
    allowed = both.predict(z.squeeze(-2), noise=False).cdf(torch.zeros(5, 3, dtype=torch.float64))[:, 2].log()
    free = marginal.MarginalImprovement(held.model.subset_output([0, 1]), encoding, held._boxes, 2)
    torch.testing.assert_close(held(z), free(z) + allowed)


def test_a_network_weighs_three_objectives_too():
    """Against a thousand independent draws of the marginals, to four standard errors."""
    encoding, g = Encoding(SQUARE), torch.Generator().manual_seed(1)
    told = record(torch.randn(9, 3, generator=g), p=2)
    posterior = bdl.PFN.from_pretrained("bo").fit(encoding.expand(told.z), told.y)
    built = marginal.build(posterior, told, encoding, (-1.0, -1.0, -1.0))
    z = torch.rand(2, 1, 2, dtype=torch.float64, generator=g)
    law = posterior.predict(z.squeeze(-2), noise=False)
    u = torch.rand(1000, 2, 3, dtype=torch.float64, generator=g)
    which = (law.weights.cumsum(-1) < u.unsqueeze(-1)).sum(-1, keepdim=True).clamp_max(law.weights.shape[-1] - 1)
    loc, scale = (part.expand(1000, -1, -1, -1).gather(-1, which).squeeze(-1) for part in (law.loc, law.scale))
    draws = loc + scale * torch.randn(loc.shape, dtype=torch.float64, generator=g)
    front = posterior.predict(told.z, noise=False).mean
    worst = torch.full((3,), -1.0, dtype=torch.float64)
    before = DominatedPartitioning(worst, front).compute_hypervolume()
    both = torch.cat([front.expand(1000, 2, -1, -1), draws.unsqueeze(-2)], -2)
    volumes = [DominatedPartitioning(worst, points).compute_hypervolume() for points in both.flatten(0, 1)]
    gained = (torch.stack(volumes).reshape(1000, 2) - before).clamp_min(0.0)
    error = gained.std(0) / 1000**0.5
    assert bool(((built(z).exp() - gained.mean(0)).abs() < 4 * error).all())


def test_a_network_minimises_through_a_study():
    study = optuna.create_study(sampler=BayesdlSampler(bdl.PFN.from_pretrained("bo"), **QUICK))
    study.optimize(lambda trial: (trial.suggest_float("x", -1.0, 3.0) - 0.7) ** 2, n_trials=10)
    assert study.best_value < 2e-2


def test_a_network_finds_a_front_through_a_study():
    """(x - 0.2)^2 and (x - 0.8)^2, to be seen from (1, 1): every x between is on the front, of volume 0.978; the four
    points of the start reach 0.83, and fourteen points spread evenly over the line 0.94."""
    worst = (1.0, 1.0)
    sampler = BayesdlSampler(bdl.PFN.from_pretrained("bo"), reference_point=worst, **QUICK)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)

    def both(trial: optuna.Trial) -> tuple[float, float]:
        x = trial.suggest_float("x", -1.0, 3.0)
        return (x - 0.2) ** 2, (x - 0.8) ** 2

    study.optimize(both, n_trials=14)
    values = -torch.tensor([trial.values for trial in study.trials], dtype=torch.float64)
    volume = [float(DominatedPartitioning(-torch.ones(2), values[:n]).compute_hypervolume()) for n in (4, 14)]
    assert volume[0] < 0.9 < 0.95 < volume[1] < 0.979
