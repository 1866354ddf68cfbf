"""bdl.sample: draws from a log density, from its door to its diagnostics."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from bayesdl.errors import ConvergenceWarning, NumericalError, SettingError, ShapeError
from bayesdl.inference.sample import sample
from bayesdl.interop.arviz import nested_rhat
from bayesdl.models.log_density import LogDensity

QUICK = {"num_warmup": 60, "num_draws": 100, "num_steps": 6}


def normal(q):
    return -0.5 * q.square().sum(-1)


def test_correlated_gaussian():
    """Means and covariances within 4.5 Monte Carlo errors.

    9 comparisons: a false alarm for 1 in 16 000 seeds (1 in 1300 if the errors are a tenth too small).
    """
    root = torch.tensor([[2.0, 0, 0], [1.8, 0.2, 0], [-3.0, 0.5, 5.0]], dtype=torch.float64)
    mean = torch.tensor([3.0, -1.0, 10.0], dtype=torch.float64)

    def log_density(q):
        return normal(torch.linalg.solve_triangular(root.T, q - mean, upper=True, left=False))

    chains = sample(log_density, 3, num_chains=24, num_warmup=200, num_draws=120, num_steps=12, metric="dense", seed=1)
    x = chains.draws.numpy() - mean.numpy()
    assert x.shape == (24, 120, 3)
    rows, columns = np.tril_indices(3)
    found = np.concatenate([x, x[..., rows] * x[..., columns]], -1)
    wanted = np.concatenate([np.zeros(3), (root @ root.T).numpy()[rows, columns]])
    error = array_stats.mcse(found, method="mean", chain_axis=0, draw_axis=1)
    assert (np.abs(found.mean((0, 1)) - wanted) / error).max() < 4.5
    assert chains.diagnostics["rhat"] < 1.05
    assert chains.inverse_mass.shape == (3, 3)


def test_diagnostics_are_plain_and_complete():
    chains = sample(normal, dim=2, seed=3, **QUICK)
    found = chains.diagnostics
    json.dumps(found)
    assert found["engine"] == "mams"
    assert {"rhat", "ess_bulk", "ess_tail", "divergences", "step_size", "acceptance_rate", "seconds"} <= set(found)
    assert len(found["e_bfmi"]) == 4
    assert found["stuck_chains"] == []
    assert found["num_gradients"] > chains.stats["num_steps"][0].sum()
    assert np.shape(found["trace"]["log_density"]) == (4, 100)
    rhat = array_stats.rhat(chains.draws.numpy(), chain_axis=0, draw_axis=1)
    assert found["rhat"] == pytest.approx(rhat.max())
    torch.testing.assert_close(chains.stats["log_density"], normal(chains.draws))


@pytest.mark.parametrize(
    ("dim", "settings", "chosen"),
    [
        (2, {"num_chains": 3}, "nuts"),
        (2, {"num_chains": 4}, "mams"),
        (1, {"num_chains": 16}, "nuts"),
        (2, {"num_chains": 16, "max_depth": 4}, "nuts"),
        (2, {"num_chains": 16, "metric": "low-rank"}, "nuts"),
        (2, {"num_chains": 2, "num_steps": 8}, "hmc"),
        (2, {"num_chains": 16, "num_steps": 8}, "mams"),
    ],
)
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_who_names_no_sampler_gets_one_that_suits(dim, settings, chosen):
    found = sample(normal, dim, num_warmup=20, num_draws=10, **settings).diagnostics
    assert found["engine"] == chosen


def tilted(q):
    """N(3, root root'), normalised but for a factor 7."""
    root = torch.tensor([[2.0, 0], [1.5, 0.6]], dtype=torch.float64)
    white = torch.linalg.solve_triangular(root, (q - 3).mT, upper=False).mT
    return normal(white) - root.diagonal().log().sum() - math.log(2 * math.pi) + math.log(7.0)


@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees", "mams", "mclmc", "meads", "smc"])
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_every_sampler_draws_from_the_target_and_says_what_it_did(sampler):
    """Means and variances of a correlated pair within 4.5 Monte Carlo errors: a false alarm for 1 in 12 000 seeds.

    The particles of an island are not a chain: the error is that of the means of the islands, 15 degrees of freedom.
    """
    num_draws = 1000 if sampler == "smc" else 60  # few particles are biased
    thin = 10 if sampler == "meads" else 1
    chains = sample(tilted, 2, sampler, num_chains=16, num_warmup=100, num_draws=num_draws, thin=thin, seed=1)
    x = chains.draws.numpy() - 3
    found = np.concatenate([x, x**2], -1)
    if sampler == "smc":
        error = found.mean(1).std(0, ddof=1) / 4
    else:
        error = array_stats.mcse(found, method="mean", chain_axis=0, draw_axis=1)
    assert (np.abs(found.mean((0, 1)) - [0, 0, 4, 2.61]) / error).max() < 4.5
    json.dumps(chains.diagnostics)
    assert chains.diagnostics["engine"] == sampler
    assert chains.diagnostics["stopped_by"] == "num_draws"
    assert ("trajectory_length" in chains.diagnostics) == (sampler in ("chees", "mams", "mclmc"))
    assert ("max_depth_reached" in chains.diagnostics) == (sampler == "nuts")
    assert ("unadjusted" in chains.diagnostics) == (sampler == "mclmc")
    assert ("tree_depth" in chains.to_arviz().sample_stats) == (sampler == "nuts")
    assert chains.inverse_mass.ndim == (2 if sampler in ("chees", "mams", "smc") else 1)
    if sampler == "smc":
        assert chains.log_evidence == chains.diagnostics["log_evidence"] == pytest.approx(math.log(7), abs=0.3)
    else:
        assert chains.log_evidence is None


@pytest.mark.parametrize("sampler", ["hmc", "nuts", "chees", "mams", "smc"])
@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_pathfinder_gives_a_start_and_a_metric_and_its_gradients_count(sampler):
    """The target is a Gaussian that Pathfinder finds exactly: without warm-up the metric is its covariance."""
    settings = {"num_chains": 6, "num_warmup": 0, "num_draws": 80, "initial": "pathfinder", "seed": 2}
    chains = sample(tilted, 2, sampler, **settings)
    found = chains.diagnostics["pathfinder"]
    assert 0 < found["num_gradients"] < chains.diagnostics["num_gradients"]
    assert len(found["elbo"]) == 16
    covariance = torch.tensor([[4.0, 3.0], [3.0, 2.61]], dtype=torch.float64)
    if sampler != "smc":
        wanted = covariance if sampler in ("chees", "mams") else covariance.diagonal()
        torch.testing.assert_close(chains.inverse_mass, wanted, rtol=0.05, atol=0)
    else:
        assert float(chains.log_evidence) == pytest.approx(math.log(7), abs=0.2)
    again = sample(tilted, 2, sampler, **settings)
    assert torch.equal(again.draws, chains.draws)
    json.dumps(chains.diagnostics)


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_checkpoint_budget_and_blocks_reach_the_sampler(tmp_path):
    settings = {"num_chains": 5, "num_warmup": 20, "num_draws": 30, "seed": 4}
    widest, calls = [], []

    def counted(q):
        widest.append(q.shape[-2])
        calls.append(1)
        return tilted(q)

    whole = sample(tilted, 2, "chees", **settings)
    run = sample(counted, 2, "chees", checkpoint=tmp_path / "run", chain_batch=2, **settings)
    assert max(widest[1:]) == 2  # the first look, without gradients, is at all
    torch.testing.assert_close(run.draws, whole.draws, rtol=1e-6, atol=1e-6)
    num = len(calls)
    again = sample(counted, 2, "chees", checkpoint=tmp_path / "run", chain_batch=2, **settings)
    assert len(calls) == num + 4
    assert torch.equal(again.draws, run.draws)
    cut = sample(tilted, 2, "chees", max_gradients=whole.diagnostics["num_gradients"] - 20, **settings)
    assert cut.diagnostics["stopped_by"] == "max_gradients"
    assert torch.equal(cut.draws, whole.draws[:, : cut.draws.shape[1]])


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_a_density_brings_its_own_quantities_and_its_data():
    y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def predictive(draws, seed):
        g = torch.Generator().manual_seed(seed)
        return {"y": draws[..., :1] + torch.randn(*draws.shape[:2], 3, generator=g, dtype=torch.float64)}

    density = LogDensity(
        lambda q: -0.5 * (y - q[..., :1]).square().sum(-1) + normal(q),
        2,
        transform=lambda draws: {"mean": draws[..., 0], "twice": 2 * draws},
        log_likelihood=lambda draws: {"y": -0.5 * (y - draws[..., :1]).square()},
        predictive=predictive,
        observed={"y": y},
    )
    chains = sample(density, **QUICK)
    assert set(chains.values) == {"mean", "twice"}
    tree = chains.to_arviz(seed=3)
    assert tree.posterior["twice"].shape == (4, 100, 2)
    np.testing.assert_array_equal(tree.observed_data["y"], y)
    assert tree.log_likelihood["y"].shape == tree.posterior_predictive["y"].shape == (4, 100, 3)
    own = sample(density, transform=lambda draws: {"other": draws[..., 1]}, **QUICK)
    assert set(own.values) == {"other"}
    assert set(sample(density, names=("a", "b"), **QUICK).values) == {"a", "b"}


def test_trees_cut_short_are_told():
    with pytest.warns(ConvergenceWarning, match="cut short at max_depth"):
        chains = sample(normal, 3, "nuts", num_warmup=30, num_draws=20, max_depth=1)
    assert chains.diagnostics["max_depth_reached"] > 40


def test_same_seed_same_draws():
    first = sample(normal, dim=2, seed=3, **QUICK).draws
    assert torch.equal(first, sample(normal, dim=2, seed=3, **QUICK).draws)
    assert not torch.equal(first, sample(normal, dim=2, seed=4, **QUICK).draws)


def test_names_and_transform_give_the_quantities_of_interest():
    named = sample(LogDensity(normal, 2, ("a", "b")), **QUICK)
    assert torch.equal(named.values["b"], named.draws[..., 1])
    assert set(named.to_arviz().posterior.data_vars) == {"a", "b"}
    assert set(sample(normal, dim=2, **QUICK).values) == {"q"}
    moved = sample(normal, dim=2, transform=lambda q: {"scale": q[..., 0].exp(), "both": 2 * q}, **QUICK)
    tree = moved.to_arviz()
    assert tree.posterior["scale"].shape == (4, 100)
    np.testing.assert_array_equal(tree.posterior["both"].values, 2 * moved.draws.numpy())
    assert {"lp", "energy", "diverging", "n_steps", "step_size", "acceptance_rate"} == set(tree.sample_stats.data_vars)


def test_convergence_is_judged_on_the_quantities_of_interest():
    """Two modes that no chain crosses: the position has not converged, its square has."""

    def two_modes(q):
        return -2 * (q.square().sum(-1) - 4) ** 2

    start = torch.tensor([[2.0], [-2.0], [2.0], [-2.0]])
    settings = {"initial": start, "num_warmup": 100, "num_draws": 100, "num_steps": 6, "seed": 1}
    with pytest.warns(ConvergenceWarning, match=r"R-hat .* above 1\.05"):
        apart = sample(two_modes, dim=1, **settings)
    assert apart.diagnostics["rhat"] > 1.5
    together = sample(two_modes, dim=1, transform=lambda q: {"square": q[..., 0] ** 2}, **settings)
    assert together.diagnostics["rhat"] < 1.05
    # the four chains have two starts
    judge = float(nested_rhat(apart.draws[..., 0].numpy(), [0, 1, 0, 1]))
    assert judge > 1.5
    assert apart.diagnostics["nested_rhat"] == pytest.approx(judge)
    assert together.diagnostics["nested_rhat"] < 1.05
    assert "nested_rhat" not in sample(normal, dim=2, seed=3, **QUICK).diagnostics


def test_many_short_chains_are_judged_by_nested_rhat():
    """Chains of 12 draws in perfect order: R-hat asks for longer ones and is not heard, since starts are shared."""
    start = 2 * torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).repeat_interleave(16, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        chains = sample(normal, 2, num_chains=128, initial=start, num_warmup=60, num_draws=12, num_steps=3, seed=1)
    assert chains.diagnostics["nested_rhat"] < 1.05 < chains.diagnostics["rhat"]
    assert "R-hat" not in "".join(str(w.message) for w in told)


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
@pytest.mark.parametrize("sampler", ["hmc", "chees", "mams"])
def test_a_stuck_chain_is_named(sampler):
    """Two wells, of which the second lies 500 lower and is never left."""

    def wells(q):
        x = q[..., 0]
        return torch.where(x < 20, -0.5 * x.square(), -500 - 0.5 * (x - 60).square()) - 0.5 * q[..., 1].square()

    start = torch.zeros(4, 2, dtype=torch.float64)
    start[2, 0] = 60.0
    settings = {"initial": start + 0.1 * torch.arange(8.0).reshape(4, 2), "num_warmup": 60, "num_draws": 40}
    found = sample(wells, 2, sampler, num_chains=4, seed=1, **settings).diagnostics
    assert found["stuck_chains"] == [2]
    json.dumps(found)


def test_divergences_and_few_effective_draws_are_told():
    def funnel(q):
        v, x = q[..., 0], q[..., 1:]
        return -(v**2) / 18 - 0.5 * (-v).exp() * x.square().sum(-1) - 4.5 * v

    with pytest.warns(ConvergenceWarning, match="reparametrise"):
        chains = sample(funnel, 10, "hmc", num_warmup=60, num_draws=60, num_steps=8, seed=2)
    assert chains.diagnostics["divergences"] == int(chains.stats["diverging"].sum())


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_default_start_is_scattered_and_drawn_again_outside_the_support():
    """A log density that is NaN on three quarters of the square still starts every chain."""
    starts = []

    def corner(q):
        starts.append(q.detach().clone())
        return torch.where((q > 0).all(-1), q.log().sum(-1) - q.sum(-1), torch.nan)

    chains = sample(corner, dim=2, num_chains=16, **QUICK)
    first = starts[0]
    assert first.shape == (16, 2)
    assert (first.abs() < 2).all()
    assert (first < 0).any()
    assert (chains.draws > 0).all()


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_initial_positions_are_used_as_given():
    seen = []

    def spy(q):
        seen.append(q.detach().clone())
        return normal(q)

    start = np.array([[1.0, 2.0], [3.0, 4.0]])
    sample(spy, dim=2, num_chains=2, initial=start, **QUICK)
    np.testing.assert_array_equal(seen[0].numpy(), start)
    seen.clear()
    sample(spy, dim=2, num_chains=3, initial=start[0], **QUICK)
    np.testing.assert_array_equal(seen[0].numpy(), np.tile(start[0], (3, 1)))


@pytest.mark.filterwarnings("ignore::bayesdl.errors.ConvergenceWarning")
def test_dtype_and_one_chain():
    chains = sample(normal, dim=2, num_chains=1, dtype=torch.float32, num_warmup=5, num_draws=3, num_steps=2)
    assert chains.draws.dtype == torch.float32
    assert chains.draws.shape == (1, 3, 2)
    assert np.isnan(chains.diagnostics["rhat"])


@pytest.mark.parametrize(
    ("error", "word", "change"),
    [
        (SettingError, "sampler must be one of 'hmc'", {"sampler": "gibbs"}),
        (SettingError, "has no num_steps", {"max_depth": 5}),
        (SettingError, "has no num_steps", {"sampler": "nuts"}),
        (SettingError, "chees.run: metric", {"sampler": "chees", "metric": "full"}),
        (SettingError, "smc.run: metric", {"sampler": "smc", "metric": "low-rank"}),
        (SettingError, "has no num_steps", {"sampler": "mclmc"}),
        (SettingError, "has no target_accept", {"sampler": "mclmc", "num_steps": None, "target_accept": 0.9}),
        (SettingError, "from a distribution", {"sampler": "smc", "initial": np.zeros((4, 2))}),
        (SettingError, "initial must be one of 'pathfinder'", {"initial": "prior"}),
        (SettingError, "needs a seed", {"checkpoint": "run", "seed": None}),
        (SettingError, "max_gradients", {"max_gradients": -1}),
        (SettingError, "chain_batch", {"chain_batch": 0}),
        (SettingError, "dim", {"dim": None}),
        (SettingError, "dim", {"dim": 0}),
        (SettingError, "dim must be 3", {"log_density": LogDensity(normal, 3)}),
        (SettingError, "num_chains", {"num_chains": 0}),
        (SettingError, "names", {"names": ("a",)}),
        (SettingError, "names", {"names": ("a", "a")}),
        (SettingError, "fn must be a function", {"log_density": 3.0}),
        (ShapeError, "one per chain", {"log_density": lambda q: q.sum()}),
        (ShapeError, "initial", {"initial": np.zeros((3, 2))}),
        (ShapeError, "transform", {"transform": lambda q: {"a": q.mean(1)}}),
        (NumericalError, "finite somewhere", {"log_density": lambda q: normal(q) * torch.nan}),
    ],
)
def test_wrong_calls_fail_at_the_door(error, word, change):
    settings = {"log_density": normal, "dim": 2, **QUICK, **change}
    with pytest.raises(error, match=word) as caught:
        sample(settings.pop("log_density"), **settings)
    assert "\n  got  " in str(caught.value)
    assert "\n  fix  " in str(caught.value)


def test_log_density_refuses_positions_of_another_width():
    density = LogDensity(normal, 3)
    assert density(torch.zeros(5, 2, 3)).shape == (5, 2)
    with pytest.raises(ShapeError, match="3\\)"):
        density(torch.zeros(5, 2))
