"""Trust regions: how large they are after which trials, where their boxes lie, and what they do for a search."""

import math

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

import bayesdl as bdl
from bayesdl.bo import Study, TrustRegion, minimize
from bayesdl.errors import SettingError
from bayesdl.interop import _optuna_acquisition  # noqa: F401 (BoTorch draws from numpy's global state on import)
from bayesdl.interop import _optuna_trust_region as regions
from bayesdl.interop._optuna_record import HISTORY, LOST, RETRY_OF, Record, read
from bayesdl.interop._optuna_space import Encoding
from bayesdl.interop.optuna import BayesdlSampler

ENGINE = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=2.0)), optimize=False)
CHEAP = {"engine": ENGINE, "acquisition": "LogExpectedImprovement", "num_restarts": 1, "num_candidates": 16}
LINE = {"x": FloatDistribution(0.0, 1.0)}


def record(values, constraints=None, p=1):
    """Observed values, larger is better, at points of no importance."""
    y = torch.tensor(values, dtype=torch.float64).reshape(-1, 1)
    n = len(y)
    limits = torch.zeros(n, 0) if constraints is None else torch.tensor(constraints).reshape(n, -1)
    z = torch.linspace(0.1, 0.9, n, dtype=torch.float64).unsqueeze(-1).expand(n, p)
    return Record(n, tuple(range(n)), z, y, limits.double(), z[:0], z[:0])


def length(values, num_first, settings=None, constraints=None, num_free=1):
    told = record(values, constraints)
    settings = TrustRegion(success_tolerance=2, failure_tolerance=3) if settings is None else settings
    return regions.replay(settings, told, range(num_first), range(num_first, len(values)), num_free)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0], 0.8),
        ([0.0, 1.0, 2.0], 0.8),
        ([0.0, 1.0, 2.0, 3.0], 1.6),  # two successes in a row
        ([0.0, 1.0, 2.0, 2.0, 3.0], 0.8),  # interrupted
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 1.6),  # not beyond max_length
        ([0.0, 1.0, 0.0, 0.5, 0.9], 0.4),  # three failures
        ([0.0, 1.0, 0.0, 0.5, 1.0002, 1.0004], 0.4),  # better, but by less than a thousandth of the spread 0.5 each
        ([0.0, 1.0, 0.0, 0.5, 1.01, 0.0, 0.0], 0.8),
        ([0.0, 1.0] + [0.0] * 6, 0.2),
        ([0.0, 1.0] + [0.0] * 9 + [2.0, 3.0, 4.0, 5.0], 0.4),  # halved three times, doubled twice
    ],
)
def test_the_length_follows_successes_and_failures(values, expected):
    """Worked out by hand; adding to and multiplying the values changes nothing."""
    assert length(values, 2) == pytest.approx(expected, rel=1e-12)
    assert length([7.0 + 300.0 * v for v in values], 2) == pytest.approx(expected, rel=1e-12)


def test_a_region_converges_below_the_least_length():
    settings = TrustRegion(failure_tolerance=1, min_length=0.15)
    assert length([1.0, 0.0, 0.0], 1, settings) == pytest.approx(0.2)
    assert length([1.0, 0.0, 0.0, 0.0], 1, settings) < settings.min_length
    # what still came in of a region that had converged does not bring it back
    assert length([1.0, 0.0, 0.0, 0.0, 2.0, 3.0, 4.0], 1, settings) < settings.min_length


def test_by_itself_as_many_failures_as_parameters_halve_the_length():
    settings = TrustRegion()
    assert length([1.0] + [0.0] * 19, 1, settings, num_free=20) == 0.8
    assert length([1.0] + [0.0] * 20, 1, settings, num_free=20) == 0.4
    assert length([1.0] + [0.0] * 4, 1, settings, num_free=2) == 0.4


def test_an_infeasible_best_is_bettered_by_what_violates_less():
    """Violations 3, 2, 1: two successes although values fall; then feasible, and then values count."""
    falling, limits = [5.0, 4.0, 3.0], [3.0, 2.0, 1.0]
    assert length(falling, 1, constraints=limits) == 1.6
    assert length(falling, 1) == 0.8
    assert length([5.0, 4.0, 3.0, 4.0, 5.0], 1, constraints=[3.0, 2.0, -1.0, -1.0, -5.0]) == 1.6
    told = record([5.0, 4.0, 3.0, 4.0], [[3.0, -1.0], [2.0, 0.5], [-1.0, -1.0], [-1.0, 0.0]])
    spread = told.constraints.std(0, correction=0).tolist()
    assert regions.violations(told).tolist() == pytest.approx([3 / spread[0], 2 / spread[0] + 0.5 / spread[1], 0, 0])


def noted(value, note, number=None, **more):
    attrs = {regions.REGION: note} if note is not None else {}
    params = {} if number is None else {"x": number}
    state = {} if value is None else {"value": value}
    distributions = {} if number is None else LINE
    attrs |= more.pop("system_attrs", {})
    return create_trial(params=params, distributions=distributions, system_attrs=attrs, **state, **more)


def gathered(trials):
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        study.add_trial(trial)
    return study.trials, read(study.trials, -1, Encoding(LINE), study.directions, None)


def test_trials_belong_to_the_region_that_they_were_proposed_for():
    """Region 0 converges; a straggler of it comes in late; added trials count with region 0; pending ones are kept."""
    settings = TrustRegion(failure_tolerance=1, min_length=0.5)
    before = [noted(1.0, None, 0.5), noted(0.5, [0, None], 0.2), noted(0.4, [0, 0.8], 0.3)]
    trials, told = gathered(before)
    found = regions.current(settings, trials, told, 1)
    assert (found.number, found.length, found.begun, len(found.record.z)) == (1, 0.8, 0, 0)
    after = [
        noted(9.0, [0, 0.8], 0.35),
        noted(0.1, [1, None], 0.9),
        noted(None, [1, None], 0.8, state=TrialState.RUNNING),
        noted(None, [0, 0.8], 0.7, state=TrialState.RUNNING),
        noted(None, [1, None], 0.6, state=TrialState.FAIL),
    ]
    trials, told = gathered(before + after)
    found = regions.current(settings, trials, told, 1)
    assert (found.number, found.length, found.begun) == (1, 0.8, 3)
    parts = (found.record.z, found.record.pending, found.record.failed)
    assert [part.flatten().tolist() for part in parts] == [[0.9], [0.8], [0.6]]
    assert (found.record.y.tolist(), found.record.rank) == ([[0.1]], 8)


def test_a_retry_belongs_where_its_parameters_come_from():
    """The first attempt died with its parameters, so that its region counts; another died before it had any."""
    died = {"state": TrialState.FAIL}
    again = {RETRY_OF: 0, HISTORY: [0]}
    with_point = [
        noted(None, [0, 0.8], 0.3, system_attrs={LOST: True}, **died),
        noted(2.0, [1, None], 0.3, system_attrs=again),
    ]
    without = [noted(None, [0, 0.8], system_attrs={LOST: True}, **died), noted(2.0, [1, None], 0.4, system_attrs=again)]
    assert regions.notes(gathered(with_point)[0]) == {0: (0, 0.8)}
    assert regions.notes(gathered(without)[0]) == {0: (1, None)}


def fitted(told, lengthscale, width):
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5, lengthscale=lengthscale))
    g = torch.Generator().manual_seed(0)
    x = torch.rand((12, width), generator=g, dtype=torch.float64) * torch.linspace(0.2, 1.0, width)
    return bdl.ExactGP(bdl.GP(kernel), optimize=False).fit(x, x.sum(-1) if told == 1 else x[:, :2])


@pytest.mark.parametrize("outputs", [1, 2])
def test_lengthscales_are_in_the_units_of_the_inputs(outputs):
    """The standardised lengthscales that the engine was given, times the spread of each column."""
    posterior = fitted(outputs, (0.3, 1.0, 5.0), 3)
    expected = torch.tensor([0.3, 1.0, 5.0]) * posterior._data.x.std(0, correction=0)
    assert torch.allclose(regions.lengthscales(posterior), expected.double(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_draws_of_lengthscales_are_averaged():
    """NUTS over hyper-parameters gives them in the units of the inputs; an ensemble has none."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand((8, 2), generator=g, dtype=torch.float64) * torch.tensor([1.0, 10.0])
    gp = bdl.GP(bdl.kernels.RBF())
    posterior = bdl.NUTS(gp, num_chains=1, num_warmup=10, num_draws=6).fit(x, x[:, 0].sin(), seed=0)
    draws = posterior.hyperparameters["lengthscale"]
    assert torch.allclose(regions.lengthscales(posterior), draws.log().mean((0, 1)).exp(), rtol=1e-6)
    network = bdl.Ensemble(bdl.BNN(hidden=(4,)), num_members=2, num_steps=2).fit(x, x[:, 0], seed=0)
    assert regions.lengthscales(network) is None


def test_the_box_lies_around_the_best_point_with_the_volume_of_its_length():
    """Sides in proportion to the lengthscales, their geometric mean the length, cut off at the bounds."""
    encoding = Encoding({name: FloatDistribution(-3.0, 5.0) for name in "abc"})
    posterior = fitted(1, (0.5, 1.0, 1.5), 3)
    told = record([0.0, 3.0, 1.0], p=3)
    told = told._replace(z=torch.tensor([[0.1] * 3, [0.4, 0.5, 0.9], [0.7] * 3], dtype=torch.float64))
    found = regions.box(regions.Region(0, 0.2, 9, told), posterior, encoding)
    low, high = found.bounds
    scales = regions.lengthscales(posterior)
    side = 2 * (told.z[1] - low)
    assert torch.allclose(side / scales, (side / scales)[0].expand(3), rtol=1e-9)
    assert float(side.log().mean().exp()) == pytest.approx(0.2, rel=1e-9)
    assert torch.allclose(high, (told.z[1] + side / 2).clamp(max=1.0))
    assert high[2] == 1.0
    infeasible = told._replace(constraints=torch.tensor([[-1.0], [2.0], [0.0]], dtype=torch.float64))
    moved = regions.box(regions.Region(0, 0.2, 9, infeasible), posterior, encoding)
    assert ((moved.bounds[0] < 0.7) & (moved.bounds[1] > 0.7)).all()


def test_grids_keep_the_next_value_on_either_side_and_choices_stay_whole():
    space = {
        "n": IntDistribution(0, 10),
        "kind": CategoricalDistribution(["a", "b", "c"]),
        "x": FloatDistribution(0.0, 1.0),
    }
    encoding = Encoding(space)
    assert [encoding.column(i) for i in range(3)] == [0, 1, 4]
    told = record([0.0, 1.0], p=3)
    told = told._replace(z=torch.tensor([[0.0, 0.0, 0.5], [0.3, 2.0, 0.5]], dtype=torch.float64))
    posterior = fitted(1, (1.0, 1.0, 1.0, 1.0, 1.0), encoding.width)
    sides = {"small": 0.01, "large": 1.5}
    at = {name: regions.Region(0, side, 9, told) for name, side in sides.items()}
    boxes = {name: regions.box(region, posterior, encoding) for name, region in at.items()}
    assert boxes["small"].grids[0] == pytest.approx([0.2, 0.3, 0.4])
    assert len(boxes["large"].grids[0]) > 3
    assert boxes["small"].bounds[:, 1].tolist() == [0.0, 2.0]
    assert boxes["small"].bounds[:, 0].tolist() == pytest.approx([0.2, 0.4])
    edge = told._replace(y=-told.y)
    assert regions.box(regions.Region(0, 0.01, 9, edge), posterior, encoding).grids[0] == pytest.approx([0.0, 0.1])
    inside = boxes["small"].holds(torch.tensor([[0.3, 1.0, 0.5], [0.5, 1.0, 0.5]], dtype=torch.float64))
    assert inside.tolist() == [True, False]


@pytest.mark.parametrize(
    "space",
    [
        {"x": (0.0, 1.0), "n": range(31), "kind": ["a", "b"]},
        {"n": range(31), "kind": ["a", "b", "c"]},
        {"x": (0.0, 1.0), "kind": ["a", "b"]},
    ],
    ids=["alternating", "listed", "slices"],
)
def test_proposals_lie_within_the_box_in_every_kind_of_space(space):
    """With a box that cannot grow, integers move by few steps from the best at a time."""
    region = TrustRegion(initial_length=0.05, max_length=0.05, min_length=0.001)
    study = Study(space, trust_region=region, num_startup=4, **{**CHEAP, "num_candidates": 8})
    seen = []

    def objective(point):
        value = abs(point.get("x", 0.0) - 0.9) + abs(point.get("n", 0) - 28) / 30 + (point["kind"] != "b")
        if len(seen) >= 4:
            best = min(seen, key=lambda pair: pair[1])[0]
            assert abs(best.get("x", 0.0) - point.get("x", 0.0)) < 0.3
            assert abs(best.get("n", 0) - point.get("n", 0)) < 9
        seen.append((point, value))
        return value

    study.optimize(objective, 9)
    assert [t.error for t in study.trials] == [""] * 9


def shifted(x):
    """A bowl in 24 dimensions whose bottom lies off the middle, with ripples."""
    x = torch.as_tensor(x)
    gap = x - torch.linspace(0.25, 0.7, len(x), dtype=torch.float64)
    return float((gap.square() + 0.02 * (1 - torch.cos(9 * math.pi * gap))).sum())


def test_the_same_trials_whoever_proposes_them(tmp_path):
    """One process in one go; a fresh study for each trial from the file; two studies that take turns. Regions restart
    on the way: five trials without success end each.
    """
    region = TrustRegion(initial_length=0.4, min_length=0.15, failure_tolerance=2)
    settings = {**CHEAP, "num_startup": 4, "trust_region": region, "seed": 3}
    box = [(0.0, 1.0)] * 3
    whole = Study(box, **settings)
    whole.optimize(shifted, 26)
    for i in range(26):
        if i % 3 == 0:
            study = Study(box, storage=tmp_path / "a.db", cache=None, **settings)
        study.optimize(shifted, i + 1)
    turns = [Study(box, storage=tmp_path / "b.db", **settings) for _ in range(2)]
    for i in range(26):
        turns[i % 2].optimize(shifted, i + 1)
    expected = [t.params for t in whole.trials]
    assert [t.params for t in study.trials] == expected
    assert [t.params for t in turns[0].trials] == expected
    numbers = [t.system_attrs[regions.REGION][0] for t in whole.optuna_study.trials]
    assert numbers == sorted(numbers)
    assert numbers[-1] >= 1
    first = [t for t in whole.optuna_study.trials if t.system_attrs[regions.REGION] == [1, None]]
    assert len(first) == 4  # a new region begins with its own quasi-random trials
    assert len({tuple(t.params.values()) for t in whole.optuna_study.trials}) == 26


def ackley(x):
    """Ackley's function of 24 inputs with its optimum off the centre: 0 there, some 20 far away, waves everywhere."""
    z = 10 * (torch.as_tensor(x) - torch.linspace(0.25, 0.7, 24, dtype=torch.float64))
    waves = math.e - torch.cos(2 * math.pi * z).mean().exp()
    return float(20 * (1 - (-0.2 * z.square().mean().sqrt()).exp()) + waves)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_box_helps_in_many_dimensions(seed):
    """24 dimensions, 10 + 35 trials, the same start and the same surrogate: better with than without."""
    engine = bdl.ExactGP(bdl.GP(bdl.kernels.Matern(nu=2.5, lengthscale=4.0)), optimize=False)
    search = {"num_restarts": 1, "num_candidates": 16, "acquisition": "LogExpectedImprovement"}
    values = {}
    for region in (False, True):
        study = Study([(0.0, 1.0)] * 24, engine=engine, num_startup=10, seed=seed, trust_region=region, **search)
        study.optimize(ackley, 45)
        values[region] = [t.value for t in study.trials]
    assert values[True][:10] == values[False][:10]
    assert min(values[True]) < min(values[False])


def test_minimize_takes_it_and_settings_that_make_no_sense_are_refused():
    result = minimize(shifted, [(0.0, 1.0)] * 2, engine=ENGINE, num_trials=7, num_startup=5, trust_region=True)
    assert result.study.optuna_study.trials[-1].system_attrs[regions.REGION][0] == 0
    for settings, says in (
        ({"initial_length": 0.0}, "initial_length"),
        ({"min_length": 0.9}, "must rise"),
        ({"max_length": 0.5}, "must rise"),
        ({"success_tolerance": 0}, "success_tolerance"),
        ({"failure_tolerance": 0}, "failure_tolerance"),
    ):
        with pytest.raises(SettingError, match=says):
            TrustRegion(**settings)
    with pytest.raises(SettingError, match="True, False or a TrustRegion"):
        Study([(0.0, 1.0)], trust_region="big")
    with pytest.raises(SettingError, match="one objective"):
        Study([(0.0, 1.0)], trust_region=True, directions=("minimize", "minimize"))
    with pytest.raises(SettingError, match="must be a TrustRegion"):
        BayesdlSampler(ENGINE, trust_region=True)
