"""ArviZ: the tree holds what was given, the diagnostics are those of Vehtari et al. (2021)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from bayesdl.errors import ShapeError
from bayesdl.interop.arviz import (
    convergence,
    nested_rhat,
    shared_starts,
    to_datatree,
    worst_convergence,
    worst_nested_rhat,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def split_rhat(x):
    """Classic R-hat of the half chains of x (C, N)."""
    half = x.shape[1] // 2
    chains = np.concatenate([x[:, :half], x[:, -half:]])
    within = chains.var(1, ddof=1).mean()
    between = half * chains.mean(1).var(ddof=1)
    return np.sqrt(((half - 1) / half * within + between / half) / within)


def rank_normalised(x):
    ranks = stats.rankdata(x).reshape(x.shape)
    return stats.norm.ppf((ranks - 0.375) / (x.size + 0.25))


def test_rhat_is_the_worse_of_the_rank_normalised_and_the_folded_one():
    """By the definition, for chains that differ in place (component 0), in spread (1), in nothing (2)."""
    x = draws(4, 50, 3)
    x[0, :, 0] += 1.5
    x[0, :, 1] *= 4.0
    found = convergence(x)
    for i in range(3):
        folded = np.abs(x[..., i] - np.median(x[..., i]))
        wanted = max(split_rhat(rank_normalised(x[..., i])), split_rhat(rank_normalised(folded)))
        assert found["rhat"][i] == pytest.approx(wanted, rel=1e-9)
    assert found["rhat"][0] > 1.1
    assert found["rhat"][1] > 1.1
    assert found["rhat"][2] < 1.1


def test_effective_sample_size_of_an_autoregression_is_the_known_one():
    """An AR(1) chain with coefficient 0.6 is worth (1 - 0.6) / (1 + 0.6) = 1/4 of its length for the mean."""
    noise = draws(8, 4000, 1, seed=1)
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0]
    for t in range(1, 4000):
        x[:, t] = 0.6 * x[:, t - 1] + 0.8 * noise[:, t]
    found = convergence(x)
    assert found["ess_bulk"][0] == pytest.approx(8000, rel=0.1)
    assert 8000 < found["ess_tail"][0] < 32000


@pytest.mark.parametrize("event", [(), (3,), (2, 2), (0,)])
def test_figures_have_the_shape_of_the_event_and_take_tensors(event):
    x = draws(4, 40, *event)
    from_array, from_tensor = convergence(x), convergence(torch.as_tensor(x).requires_grad_())
    for name in ("rhat", "ess_bulk", "ess_tail"):
        assert from_array[name].shape == event
        np.testing.assert_array_equal(from_array[name], from_tensor[name])


def test_a_single_chain_is_halved_and_too_few_draws_give_nan():
    drift = np.linspace(0, 3, 200)[None, :, None] + draws(1, 200, 1)
    assert convergence(drift)["rhat"][0] > 1.2
    assert convergence(draws(1, 200, 1))["rhat"][0] < 1.1
    few = convergence(draws(4, 3, 2))
    assert all(np.isnan(value).all() for value in few.values())


def test_draws_that_are_not_finite_or_never_move():
    """The first have not converged and count for nothing; the second have no R-hat."""
    x = draws(4, 100, 3)
    x[2, 7, 0], x[..., 1] = np.nan, 5.0
    found = convergence(x)
    assert found["rhat"][0] == np.inf
    assert found["ess_bulk"][0] == found["ess_tail"][0] == 0
    assert np.isnan(found["rhat"][1])
    assert worst_convergence(x)["rhat"] == np.inf
    assert worst_convergence(x)["ess_tail"] == 0
    worst, usual = worst_convergence(x[..., 1:]), convergence(x[..., 2])
    assert worst["rhat"] == usual["rhat"]
    assert np.isnan(worst_convergence(x[..., 1:2])["rhat"])
    assert all(isinstance(value, float) for value in worst.values())


def test_tree_holds_every_group_under_arviz_names():
    tree = to_datatree(
        {"w": torch.as_tensor(draws(4, 10, 3)), "noise": draws(4, 10)},
        sample_stats={
            "log_density": torch.zeros(4, 10),
            "num_steps": torch.ones(4, 10),
            "diverging": torch.zeros(4, 10, dtype=torch.bool),
        },
        observed_data={"y": torch.arange(5.0)},
        log_likelihood={"y": draws(4, 10, 5)},
        coords={"feature": ["a", "b", "c"]},
        dims={"w": ["feature"]},
    )
    assert set(tree.children) == {"posterior", "sample_stats", "observed_data", "log_likelihood"}
    assert tree.posterior["w"].dims == ("chain", "draw", "feature")
    assert list(tree.posterior["feature"].values) == ["a", "b", "c"]
    assert set(tree.sample_stats.data_vars) == {"lp", "n_steps", "diverging"}
    assert tree.log_likelihood["y"].shape == (4, 10, 5)
    np.testing.assert_array_equal(tree.observed_data["y"].values, np.arange(5.0))
    np.testing.assert_array_equal(tree.posterior["w"].values, draws(4, 10, 3))


def test_arrays_that_disagree_about_chains_and_draws_are_refused():
    with pytest.raises(ShapeError, match="same two first") as caught:
        to_datatree({"w": draws(4, 10)}, sample_stats={"lp": draws(4, 9)})
    assert "sample_stats['lp'] (4, 9)" in str(caught.value)
    with pytest.raises(ShapeError):
        to_datatree({"w": draws(4)})
    with pytest.raises(ShapeError, match="chains, draws"):
        convergence(draws(4))


# ---- nested R-hat ----------------------------------------------------------------------------------------------------


def nested_by_definition(x, superchains):
    """Equations 4 to 8 of Margossian et al. (2024), loops and all: x (C, N), superchains a list of lists of chains."""
    means, within = [], []
    for members in superchains:
        chain_means = [x[c].mean() for c in members]
        means.append(np.mean(chain_means))
        within.append(np.var(chain_means, ddof=1) + np.mean([x[c].var(ddof=1) for c in members]))
    return np.sqrt(1 + np.var(means, ddof=1) / np.mean(within))


def halves(x):
    return np.concatenate([x[:, : x.shape[1] // 2], x[:, -(x.shape[1] // 2) :]])


def test_nested_rhat_is_that_of_the_paper_on_halved_rank_normalised_draws():
    """Superchains of different centre (component 0) and spread (1), numbered out of order."""
    ids = np.array([7, 3, 7, 5, 3, 5, 7, 3, 5])
    x = draws(9, 30, 3, seed=3)
    x[ids == 3, :, 0] += 0.8
    x[ids == 5, :, 1] *= 3.0
    found = nested_rhat(torch.as_tensor(x), ids)
    groups = [[c for c in range(18) if ids[c % 9] == k] for k in (3, 5, 7)]
    for i in range(3):
        half = halves(x[..., i])
        folded = np.abs(half - np.median(half))
        wanted = max(nested_by_definition(rank_normalised(z), groups) for z in (half, folded))
        assert found[i] == pytest.approx(wanted, rel=1e-9)
    assert found[0] > 1.05
    assert found[1] > 1.05


def test_nested_rhat_of_converged_short_chains_is_near_one_where_plain_rhat_is_not():
    """64 chains of 100 draws, each chain worth eleven (AR(1), 0.8), in 8 superchains, ten components.

    R-hat is about 1 + 1 / (2 * 11); nested R-hat, of superchains worth 89 draws, about 1 + 1 / (2 * 89), a little more
    for being the worse of two.
    """
    x = draws(64, 100, 10, seed=4)
    for t in range(1, 100):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * x[:, t]
    nested = nested_rhat(x, np.arange(64) // 8)
    assert nested.max() < 1.02
    assert nested.mean() == pytest.approx(1 + 1 / 178, abs=4e-3)
    assert convergence(x)["rhat"].mean() > 1.025


def test_nested_rhat_sees_a_start_that_is_not_forgotten():
    """AR(1) chains of coefficient 0.98 from starts with twice the stationary spread: 20 draws are too few."""
    rng = np.random.default_rng(5)
    ids = np.arange(64) // 8
    x = np.empty((64, 400, 1))
    x[:, 0, 0] = 2 * rng.normal(size=8)[ids]
    for t in range(1, 400):
        x[:, t, 0] = 0.98 * x[:, t - 1, 0] + np.sqrt(1 - 0.98**2) * rng.normal(size=64)
    assert nested_rhat(x[:, :20], ids)[0] > 1.5
    assert nested_rhat(x[:, -200:], ids)[0] < 1.05


def test_nested_rhat_of_draws_that_never_move_or_are_not_finite():
    x = draws(4, 20, 3)
    x[..., 0], x[1, 2, 1] = 3.0, np.inf
    found = nested_rhat(x, [0, 0, 1, 1])
    assert np.isnan(found[0])
    assert found[1] == np.inf
    assert np.isfinite(found[2])
    assert nested_rhat(draws(4, 20), [0, 0, 1, 1]).shape == ()


@pytest.mark.parametrize("ids", [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1]])
def test_superchains_must_be_two_and_of_one_size(ids):
    with pytest.raises(ShapeError, match="superchains"):
        nested_rhat(draws(4, 20), ids)


def test_shared_starts_are_found_where_they_are_of_use():
    starts, x = draws(3, 2), draws(4, 20, 3, seed=2)
    found = shared_starts(torch.as_tensor(starts[[0, 1, 0, 1]]))
    assert found[0] == found[2] != found[1] == found[3]
    assert worst_nested_rhat(x, starts[[0, 1, 0, 1]]) == nested_rhat(x, found).max()
    for pattern in ([0, 1, 2], [0, 0], [0, 0, 1]):
        assert shared_starts(starts[pattern]) is None
        assert worst_nested_rhat(x[: len(pattern)], starts[pattern]) is None
    x[:] = 1.0
    assert np.isnan(worst_nested_rhat(x, starts[[0, 1, 0, 1]]))
