"""Tables for classification: the laws of two levels against integrals, graphs by hand, labels by counting.

Kolmogorov-Smirnov and chi-square tests at fixed seeds give a false alarm once in 100 000; counts within five standard
errors once in two million.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl.errors import SettingError
from bayesdl.priors import _tasks_causal, _tasks_laws, _tasks_tabular, tasks
from tests.priors.task_laws import P_VALUE, assert_follows, source

NODES, WEIGHTS = np.polynomial.legendre.leggauss(80)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


def mixed_over_two_uniforms(cdf):
    """The cdf of a law of two levels: the integral of cdf(x, u, v) over the unit square, by Gauss-Legendre."""

    def total(x: np.ndarray) -> np.ndarray:
        grid = np.sort(np.append(np.quantile(x, np.linspace(0, 1, 60)), [x.min(), x.max()]))
        u, v = (part.reshape(-1, 1) for part in np.meshgrid(NODES, NODES))
        weights = np.outer(WEIGHTS, WEIGHTS).reshape(-1, 1)
        return np.interp(x, grid, (weights * cdf(grid, u, v)).sum(0))

    return total


def test_meta_gamma_is_a_gamma_of_random_shape_and_mean() -> None:
    draws = _tasks_laws.meta_gamma((2000,), 3.0, 100.0, source())
    judge = mixed_over_two_uniforms(lambda x, u, v: stats.gamma.cdf(x, 3**u, scale=100 * v / 3**u))
    assert_follows(draws, judge)


def test_meta_normal_is_a_truncated_normal_of_random_mean_and_spread() -> None:
    draws = _tasks_laws.meta_normal((2000,), 1e-2, 10.0, source())
    assert float(draws.min()) > 0

    def cdf(x, u, v):
        mean, ratio = 0.01 * 1000**u, 0.01 ** (1 - v)
        return stats.truncnorm.cdf(x, -1 / ratio, np.inf, loc=mean, scale=mean * ratio)

    assert_follows(draws, mixed_over_two_uniforms(cdf))


def test_meta_beta_is_a_beta_of_random_shapes() -> None:
    draws = _tasks_laws.meta_beta((2000,), 0.6, 0.1, 5.0, source())
    judge = mixed_over_two_uniforms(lambda x, u, v: stats.beta.cdf(x / 0.6, 0.1 + 4.9 * u, 0.1 + 4.9 * v))
    assert_follows(draws, judge)


def test_meta_choice_favours_options_at_random() -> None:
    """P(first of two) = E[1 / (1 + e^(z - 1))] over z ~ U(-3, 5), 1/2 by symmetry; of three, by quadrature."""
    generator = source()
    two = np.mean([_tasks_laws.meta_choice(2, generator) == 0 for _ in range(3000)])
    assert abs(two - 0.5) < 5 * math.sqrt(0.25 / 3000)
    a, b = (8 * part - 3 for part in np.meshgrid(NODES, NODES))
    p = (np.outer(WEIGHTS, WEIGHTS) * math.e / (math.e + np.exp(a) + np.exp(b))).sum()
    three = np.bincount([_tasks_laws.meta_choice(3, generator) for _ in range(3000)], minlength=3) / 3000
    assert abs(three[0] - p) < 5 * math.sqrt(0.25 / 3000)
    assert abs(three[1] - three[2]) < 5 * math.sqrt(0.5 / 3000)


def test_labels_are_contiguous_in_the_order_of_the_target() -> None:
    """All classes from 0 to C - 1 have a point, and each is one run of neighbours in v."""
    v = torch.randn(300, 40, generator=source(), dtype=torch.float64)
    labels, num = _tasks_tabular.classes_by_rank(v, 7, source(1))
    for row, c, values in zip(labels, num, v, strict=True):
        ordered = row[values.argsort()]
        assert set(ordered.tolist()) == set(range(int(c)))
        assert int((ordered[1:] != ordered[:-1]).sum()) == int(c) - 1


def test_class_counts_borders_and_names_are_uniform() -> None:
    v = torch.randn(6000, 9, generator=source(), dtype=torch.float64)
    labels, num = _tasks_tabular.classes_by_rank(v, 5, source(1))
    assert stats.chisquare(torch.bincount(num - 2, minlength=4)).pvalue > P_VALUE
    two = num == 2
    lowest = labels.gather(1, v.argmin(-1, keepdim=True))
    below = (labels == lowest).sum(-1)[two]
    assert stats.chisquare(torch.bincount(below - 1, minlength=8)).pvalue > P_VALUE
    for c in (2, 3, 5):
        assert stats.chisquare(torch.bincount(lowest.squeeze(-1)[num == c], minlength=c)).pvalue > P_VALUE


def test_equal_targets_are_not_told_apart_by_their_rows() -> None:
    """A constant v: the label of the first point is that of the last as often as that of the middle one."""
    labels, _ = _tasks_tabular.classes_by_rank(torch.zeros(5000, 9), 2, source())
    near, far = ((labels[:, 0] == labels[:, i]).double().mean() for i in (1, 8))
    assert abs(float(near - far)) < 5 * math.sqrt(0.5 / 5000)


def test_fewer_points_than_classes() -> None:
    for n in (1, 2, 3):
        labels, num = _tasks_tabular.classes_by_rank(torch.randn(200, n, generator=source()), 10, source())
        assert int(num.max()) == n
        assert int(labels.max()) == n - 1


def test_some_columns_of_some_tables_are_cut_into_levels() -> None:
    x = torch.randn(2000, 60, 3, generator=source(), dtype=torch.float64)
    cut_x, cut = _tasks_tabular.make_categorical(x, 0.4, source(1))
    assert abs(float(cut.double().mean()) - 0.2) < 5 * math.sqrt(0.25 / 2000)
    columns, plain = cut_x.mT, x.mT
    assert torch.equal(columns[~cut], plain[~cut])
    levels, values = columns[cut], plain[cut]
    assert bool((levels == levels.round()).all())
    assert int(levels.amin()) == 0
    ordered = levels.gather(-1, values.argsort(-1))
    steps = (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
    sizes = torch.tensor([len(row.unique()) for row in levels])
    # every level is one interval of the column; 2 levels or more were asked for, and one border may be the maximum
    assert torch.equal(steps + 1, sizes)
    rising = (ordered.diff(dim=-1) >= 0).all(-1)[sizes > 4]
    assert 0.2 < float(rising.double().mean()) < 0.4
    # the exponential law of sizes, whose median is 10 ln 2, seen through levels that no point reached
    assert 4 <= float(sizes.double().median()) <= 8


def test_rotation_and_standardisation_by_numpy() -> None:
    x = torch.randn(40, 6, 5, generator=source(), dtype=torch.float64) * 3 + 1
    turned = _tasks_tabular.rotated(x, source()).numpy()
    shifts = set()
    for before, after in zip(x.numpy(), turned, strict=True):
        (by,) = (k for k in range(5) if np.array_equal(np.roll(before, -k, axis=1), after))
        shifts.add(by)
    assert shifts == set(range(5))
    x[3, :, 2] = 7.0
    plain = _tasks_tabular.standardized(x).numpy()
    assert (plain[3, :, 2] == 0).all()
    np.testing.assert_allclose(plain[5], stats.zscore(x.numpy()[5], axis=0), rtol=1e-9)


def graph(**settings) -> _tasks_causal.Graph:
    given = {
        "layers": 3,
        "width": 20,
        "causes": 4,
        "causal": True,
        "activation": "identity",
        "effect": False,
        "clique": False,
        "ordered": False,
        "blockwise": False,
        "levels": False,
        "uneven": False,
    }
    return _tasks_causal.Graph(**{**given, **settings})


@pytest.mark.parametrize("effect", [False, True])
@pytest.mark.parametrize("clique", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_features_and_target_are_different_variables(effect, clique, ordered) -> None:
    given = graph(effect=effect, clique=clique, ordered=ordered)
    features, target = _tasks_causal._pick(given, 500, 23, 4, source())
    chosen = torch.cat([features, target.unsqueeze(-1)], -1)
    assert all(len(set(row)) == 5 for row in chosen.tolist())
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) <= 22
    assert bool((target == 22).all()) == effect
    assert bool((features.diff(dim=-1) > 0).all()) == ordered
    spread = (features.amax(-1) - features.amin(-1)).float()
    assert bool((spread <= 5).all()) == clique
    # every variable is a feature in its turn
    assert set(features.unique().tolist()) == set(range(22 if effect else 23))


def test_blocks_lie_on_the_diagonal() -> None:
    blocks = _tasks_causal._blocks(200, 12, 10, source())
    seen = set()
    for found in blocks.numpy():
        judges = {}
        for num in range(1, 5):
            judge = np.zeros((12, 10))
            for b in range(num):
                judge[b * (12 // num) : (b + 1) * (12 // num), b * (10 // num) : (b + 1) * (10 // num)] = 1
            judges[num] = judge
        (num,) = (k for k, judge in judges.items() if np.array_equal(judge, found))
        seen.add(num)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("blockwise", [False, True])
def test_missing_edges_leave_the_size_of_signals_as_it_is(blockwise) -> None:
    """E[(W h)_j^2] over j is scale^2 |h|^2, within 5 standard errors over 4000 graphs; a bias adds 1 / (3 inputs)."""
    h = torch.full((4000, 1, 20), 2.0)
    scale, dropout = torch.full((4000, 1, 1), 0.5), torch.full((4000, 1, 1), 0.4)
    out = _tasks_causal._edges(graph(blockwise=blockwise), h, scale, dropout, source())
    squares = out.double().square().mean((1, 2)).numpy()
    assert abs(squares.mean() - (0.25 * 80 + 1 / 60)) < 5 * squares.std() / math.sqrt(4000)


def test_a_network_predicts_its_last_unit_from_its_causes() -> None:
    """Linear, hardly any noise: the target is an affine function of the features."""
    x, y, latents = _tasks_causal.draw_variables(graph(causal=False), 20, 40, 3, source())
    quiet = latents["noise_scale"] < 1e-3 * latents["weight_scale"].clamp(0.1)
    for points, target in zip(x[quiet].double(), y[quiet].double(), strict=True):
        design = torch.cat([points, torch.ones(40, 1, dtype=points.dtype)], -1)
        residual = target - design @ torch.linalg.lstsq(design, target.unsqueeze(-1)).solution.squeeze(-1)
        assert float(residual.std()) < 0.2 * float(target.std()) + 1e-3


def test_causes_may_be_uneven() -> None:
    even = _tasks_causal._causes(graph(), 500, 30, 4, source())
    assert_follows(even, stats.norm())
    uneven = _tasks_causal._causes(graph(uneven=True), 500, 30, 4, source()).double()
    means = uneven.mean(1)
    assert abs(float(means.std()) - 1) < 0.15
    assert float(uneven.std(1).std()) > 0.3


def test_graphs_have_the_published_sizes() -> None:
    """Means of 2 + m, 4 + m, 2 + m with m ~ U(0, 3), U(0, 100), U(0, 7), and the least values."""
    generator = source()
    drawn = [_tasks_causal.draw_graph(3, 10_000, 10_000, generator) for _ in range(1000)]
    for name, least, most in (("layers", 2, 3), ("width", 4, 100), ("causes", 2, 7)):
        values = np.array([getattr(g, name) for g in drawn], dtype=float)
        assert values.min() >= least
        # widths below 2 d + 2 = 8 are raised to it
        slack = 0.5 if name == "width" else 0.0
        assert abs(values.mean() - least - most / 2) < 5 * values.std() / math.sqrt(1000) + slack
    assert {g.activation for g in drawn} == {"tanh", "relu", "identity"}
    for name in ("causal", "effect", "clique", "ordered", "blockwise", "levels", "uneven"):
        assert 0.4 < np.mean([getattr(g, name) for g in drawn]) < 0.6


def drawn_tables(num: int, n: int, d: int, **settings) -> list[tasks.Tasks]:
    prior = tasks.Tabular(**settings)
    generator = source(4)
    return [prior.sample(16, n, d, generator) for _ in range(num)]


def test_tables_hold_labels_and_standardised_columns() -> None:
    for drawn in drawn_tables(10, 50, 4):
        assert drawn.y.dtype == torch.int64
        assert torch.equal(drawn.y, drawn.noiseless)
        assert torch.equal(drawn.y.amax(-1) + 1, drawn.latents["num_classes"])
        assert all(len(row.unique()) == int(c) for row, c in zip(drawn.y, drawn.latents["num_classes"], strict=True))
        squares = drawn.x.square().mean(1)
        assert bool((((squares - 1).abs() < 1e-4) | (squares == 0)).all())
        assert float(drawn.x.mean(1).abs().max()) < 1e-4
        for table, cut in zip(drawn.x, drawn.latents["is_categorical"], strict=True):
            assert all(len(column.unique()) < 50 for column in table.T[cut])


def test_every_kind_of_table_occurs_in_its_share() -> None:
    """A Gaussian process with probability E[1 / (1 + e^(u - 1))], u ~ U(2, 10): 0.039; the rest in halves."""
    small = {"max_layers": 2, "max_width": 4, "architectures": 8}
    prior, generator = tasks.Tabular(**small), source()
    kinds = torch.cat([prior.sample(8, 3, 1, generator).latents["kind"] for _ in range(80)])
    share = torch.bincount(kinds, minlength=3) / 640
    gp = (math.log(1 + math.exp(-1)) - math.log(1 + math.exp(-9))) / 8
    assert abs(float(share[0]) - gp) < 5 * math.sqrt(gp / 640)
    assert abs(float(share[1] - share[2])) < 5 * math.sqrt(1 / 640)
    more = tasks.Tabular(**small, gp=(0.0, 0.0))
    kinds = torch.cat([more.sample(8, 3, 1, generator).latents["kind"] for _ in range(25)])
    assert float((kinds == 0).double().mean()) > 0.5


def test_causes_are_recorded_for_the_tables_that_have_them() -> None:
    latents = tasks.Tabular(gp=(0.0, 0.0), architectures=8).sample(16, 5, 2, source(1)).latents
    gp = latents["kind"] == 0
    assert 0 < int(gp.sum()) < 16
    assert torch.equal(latents["lengthscale"].isnan(), ~gp)
    assert torch.equal(latents["weight_scale"].isnan(), gp)
    assert torch.equal(latents["layers"] == -1, gp)
    assert set(latents["noise_variance"][gp].tolist()) <= {1e-5, 1e-4, 1e-2}


def test_tables_can_be_learned_from() -> None:
    """The nearest neighbour is of the same class clearly more often than a random point is: at 192 tables by 0.12, with
    a standard error of 0.013, though many are noise."""
    gains = []
    for drawn in drawn_tables(12, 80, 4):
        apart = torch.cdist(drawn.x, drawn.x) + 1e9 * torch.eye(80)
        near = drawn.y.gather(1, apart.argmin(-1))
        right = (near == drawn.y).double().mean(-1)
        share = torch.nn.functional.one_hot(drawn.y, 10).double().mean(1)
        gains.append(right - share.square().sum(-1))
    assert float(torch.cat(gains).mean()) > 0.07


def test_wide_and_deep_graphs_are_cut() -> None:
    drawn = [g.latents for g in drawn_tables(20, 3, 2, max_layers=2, max_width=9)]
    layers, widths = (torch.cat([latents[name] for latents in drawn]) for name in ("layers", "width"))
    assert set(layers.tolist()) <= {-1, 2}
    assert int(widths.max()) <= 9


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_classes": 1}, "max_classes must be an integer of at least 2"),
        ({"architectures": 0}, "architectures must be an integer of at least 1"),
        ({"categorical": 1.5}, "categorical must be a probability"),
        ({"max_layers": 1}, "max_layers must be an integer of at least 2"),
        ({"gp": 3.0}, "gp must be a pair"),
    ],
)
def test_a_wrong_setting_is_refused(settings, complaint) -> None:
    with pytest.raises(SettingError, match=complaint):
        tasks.Tabular(**settings)
