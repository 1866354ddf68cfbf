"""ExactGP without a Cholesky factor: the contract, the dense path as judge, the stated rules of choice and memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import gpytorch
import pytest
import torch

import bayesdl as bdl
from bayesdl.data import training_data
from bayesdl.errors import ConvergenceWarning, SettingError, StorageError
from bayesdl.inference import _matrix_free
from bayesdl.inference._matrix_free import choose, default_memory
from bayesdl.ops import SolverConfig
from bayesdl.posterior.matrix_free import MatrixFreeGPPosterior
from bayesdl.testing import check_engine


def toy(n: int = 300, d: int = 3, seed: int = 0, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = (2 * x[:, 0]).sin() + 0.4 * x[:, 1] + noise * torch.randn(n, generator=g, dtype=torch.float64)
    return x, y


MATERN = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5, lengthscale=(0.7, 1.8, 2.9)), outputscale=1.7))


@pytest.mark.parametrize(
    "model",
    [
        bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5))),
        bdl.GP(bdl.kernels.RBF(lengthscale=0.7) + bdl.kernels.Linear(), mean="zero"),
    ],
    ids=["matern", "rbf plus linear"],
)
def test_obeys_the_contract(model):
    check_engine(bdl.ExactGP(model, num_starts=1, solver="matrix_free"))


@pytest.mark.parametrize("rank", [0, 40, 300])
def test_mean_and_variance_are_those_of_the_dense_path_to_the_tolerance(rank):
    """At any rank: the preconditioner decides how long a solve takes, never where it ends."""
    x, y = toy()
    x_new = toy(40, seed=5)[0]
    config = SolverConfig(rank=rank, tolerance=1e-8, variance_tolerance=1e-6)
    dense = bdl.ExactGP(MATERN, optimize=False).fit(x, y)
    free = bdl.ExactGP(MATERN, optimize=False, solver=config).fit(x, y)
    ours, judge = free.predict(x_new, noise=False), dense.predict(x_new, noise=False)
    torch.testing.assert_close(ours.mean, judge.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.variance, judge.variance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(free.mean(x_new), ours.mean, rtol=1e-12, atol=1e-12)
    assert free.diagnostics["method"] == "matrix_free"
    assert free.diagnostics["preconditioner_rank"] == rank
    assert free.diagnostics["residual"] <= 1e-8
    assert free.diagnostics["solver_converged"]


def test_a_variance_from_a_loose_solve_is_too_large_and_by_second_order_only():
    x, y = toy()
    x_new = toy(40, seed=5)[0]
    judge = bdl.ExactGP(MATERN, optimize=False).fit(x, y).predict(x_new, noise=False).variance
    config = SolverConfig(rank=20, variance_tolerance=1e-2)
    loose = bdl.ExactGP(MATERN, optimize=False, solver=config).fit(x, y).predict(x_new, noise=False).variance
    assert bool((loose >= judge * (1 - 1e-9)).all())
    tight = bdl.ExactGP(MATERN, optimize=False, solver=replace(config, variance_tolerance=1e-4)).fit(x, y)
    closer = tight.predict(x_new, noise=False).variance
    # a hundred times the tolerance is ten thousand times the error, up to what one step of the solver overshoots
    assert float((loose - judge).max()) < 1e-2
    assert 0 < float((closer - judge).max()) < 1e-3 * float((loose - judge).max())


def test_evidence_is_the_dense_one_within_its_reported_error():
    """Three standard errors with 16 probes: about 1 % of seeds would fail; the seed is fixed."""
    x, y = toy(400)
    dense = bdl.ExactGP(MATERN, optimize=False).fit(x, y)
    free = bdl.ExactGP(MATERN, optimize=False, solver=SolverConfig(rank=60)).fit(x, y)
    error = 0.5 * free.diagnostics["log_det_std_error"]
    assert 0 < error < 20
    assert abs(float(free.log_evidence - dense.log_evidence)) <= 3 * error + 1e-3
    exact = bdl.ExactGP(MATERN, optimize=False, solver=SolverConfig(rank=400)).fit(x, y)
    assert float(exact.log_evidence) == pytest.approx(float(dense.log_evidence), rel=1e-8)
    without = bdl.ExactGP(MATERN, optimize=False, solver=SolverConfig(num_probes=0)).fit(x, y)
    assert without.log_evidence is None
    assert "log_det_std_error" not in without.diagnostics


@pytest.mark.parametrize("estimator", ["signs", "pathwise"])
def test_learning_on_all_points_climbs_to_where_the_dense_engine_ends(estimator):
    """From a subset of 60 to 400 points: the evidence at the end is near the dense optimum, and above that of 60."""
    x, y = toy(400)
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)))
    dense = bdl.ExactGP(model, num_starts=1).fit(x, y)

    def evidence(posterior: bdl.posterior.Posterior) -> float:
        """The exact penalised evidence at the hyper-parameters that a fit found."""
        layout = model.layout(3)
        values = {k: v for k, v in posterior.hyperparameters.items() if k != "mean"}
        inner_x = (x - x.mean(0)) / x.std(0, correction=0)
        inner_y = (y - y.mean()) / y.std(correction=0)
        k = model.kernel(inner_x, None, model.kernel_values(values))
        k = k + values["noise_variance"] * torch.eye(400, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(posterior.hyperparameters["mean"].expand(400), k)
        return float(normal.log_prob(inner_y) + layout.log_prior(values)[0])

    config = SolverConfig(rank=50, subset_size=60, num_steps=25, learning_rate=0.1, num_probes=32, estimator=estimator)
    free = bdl.ExactGP(model, num_starts=1, solver=config).fit(x, y)
    start = bdl.ExactGP(model, num_starts=1, solver=SolverConfig(rank=50, subset_size=60, num_steps=0)).fit(x, y)
    best, ours, subset = evidence(dense), evidence(free), evidence(start)
    assert subset < ours - 1
    assert best - ours < 2.5  # what 32 probes and 25 steps leave
    assert free.diagnostics["subset_size"] == 60
    assert free.diagnostics["adam_steps"] == 25
    assert free.diagnostics["estimator"] == estimator
    assert free.diagnostics["gradient_norm"][-1] < free.diagnostics["gradient_norm"][0]


def test_the_solves_of_a_pathwise_fit_are_draws_of_its_posterior(tmp_path, monkeypatch):
    """Where the last step moves nothing, the variance needs no step for the draws of the fit, only for those beyond.

    256 draws have a relative standard error of 9 %; 30 points at 4.5 of them: 2e-4 false alarms; the seed is fixed.
    """
    x, y = toy(200)
    x_new = toy(30, seed=5)[0]
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5)))
    config = SolverConfig(
        rank=10, subset_size=60, num_steps=2, learning_rate=1e-9, num_probes=200, estimator="pathwise",
        training_tolerance=1e-4, variance_tolerance=1e-3, variance_samples=256,
    )  # fmt: skip
    posterior = bdl.ExactGP(model, num_starts=1, solver=config).fit(x, y)
    steps, solve = [], MatrixFreeGPPosterior._solve

    def spy(self, *arguments):
        solved = solve(self, *arguments)
        steps.append((solved.iterations.numel(), int(solved.iterations.sum())))
        return solved

    monkeypatch.setattr(MatrixFreeGPPosterior, "_solve", spy)
    ours = posterior.predict(x_new, noise=False).variance
    assert [columns for columns, _ in steps] == [200, 56]
    assert steps[0][1] == 0
    assert steps[1][1] > 56
    alone = replace(config, variance_samples=None, variance_tolerance=1e-6)
    judge = bdl.ExactGP(model, num_starts=1, solver=alone).fit(x, y).predict(x_new, noise=False).variance
    assert bool(((ours / judge - 1).abs() <= 4.5 * math.sqrt(2 / 256)).all())
    posterior.save(tmp_path / "kept")
    again = bdl.load(tmp_path / "kept").predict(x_new, noise=False).variance
    torch.testing.assert_close(again, ours, rtol=1e-12, atol=0)


def test_a_kernel_that_draws_no_functions_is_learned_by_signs():
    x, y = toy(120)
    model = bdl.GP(gpytorch.kernels.PiecewisePolynomialKernel(q=2))
    config = SolverConfig(rank=20, subset_size=40, num_steps=3, num_probes=4, estimator="pathwise")
    asked = bdl.ExactGP(model, num_starts=1, solver=config).fit(x, y)
    signs = bdl.ExactGP(model, num_starts=1, solver=replace(config, estimator="signs")).fit(x, y)
    assert asked.diagnostics["estimator"] == "signs"
    assert asked.diagnostics["gradient_norm"] == signs.diagnostics["gradient_norm"]


def test_learning_without_probes_is_refused():
    x, y = toy(120)
    with pytest.raises(SettingError, match="num_probes must be at least 2"):
        bdl.ExactGP(MATERN, num_starts=1, solver=SolverConfig(subset_size=40, num_probes=0)).fit(x, y)


@pytest.mark.parametrize("estimator", ["signs", "pathwise"])
def test_a_search_that_was_stopped_goes_on_from_its_checkpoint(tmp_path, monkeypatch, estimator):
    x, y = toy(150)
    path = tmp_path / "search"
    config = SolverConfig(rank=20, subset_size=40, num_steps=6, num_probes=4, estimator=estimator)
    model = bdl.GP(bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5)))
    whole = bdl.ExactGP(model, num_starts=1, solver=config).fit(x, y)
    kept = replace(config, checkpoint=str(path))
    write, calls = _matrix_free._Checkpoint.write, []

    def stop_after_three(self, climb):
        write(self, climb)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_matrix_free._Checkpoint, "write", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            bdl.ExactGP(model, num_starts=1, solver=kept).fit(x, y)
    again = bdl.ExactGP(model, num_starts=1, solver=kept).fit(x, y)
    assert len(again.diagnostics["gradient_norm"]) == 6
    for name, value in whole.hyperparameters.items():
        torch.testing.assert_close(again.hyperparameters[name], value, rtol=1e-6, atol=1e-9)
    with pytest.raises(StorageError, match="of another fit"):
        bdl.ExactGP(model, num_starts=1, solver=kept).fit(x, y + 1e-3 * x[:, 0])


def test_variances_from_shared_draws_are_the_exact_ones_within_their_error():
    """512 draws have a relative standard error of 6 %; 40 points at 4.5 of them: 3e-4 false alarms; fixed seed."""
    x, y = toy(150)
    x_new = toy(40, seed=5)[0]
    config = SolverConfig(rank=30, variance_samples=512)
    posterior = bdl.ExactGP(MATERN, optimize=False, solver=config).fit(x, y)
    judge = bdl.ExactGP(MATERN, optimize=False).fit(x, y).predict(x_new, noise=False)
    ours = posterior.predict(x_new, noise=False)
    assert bool(((ours.variance / judge.variance - 1).abs() <= 4.5 * math.sqrt(2 / 512)).all())
    assert float((ours.variance / judge.variance - 1).abs().max()) > 1e-3
    torch.testing.assert_close(ours.mean, judge.mean, rtol=1e-4, atol=1e-4)
    some = posterior.predict(x_new[:7], noise=False).variance
    torch.testing.assert_close(some, ours.variance[:7], rtol=1e-9, atol=0)


def test_functions_and_joint_draws_have_the_moments_of_the_posterior():
    """600 functions at 4.5 standard errors of mean and variance, 12 points: about 2e-4 false alarms; fixed seed.

    The features of a prior function add an error of their own to its variance, O(1 / sqrt(num_features)) of the part of
    the prior that the data leave.
    """
    x, y = toy(150)
    x_new = toy(6, seed=5)[0]
    posterior = bdl.ExactGP(MATERN, optimize=False, solver=SolverConfig(rank=30)).fit(x, y)
    judge = bdl.ExactGP(MATERN, optimize=False).fit(x, y)
    draws = posterior.functions(600, seed=1, num_features=256)(x_new)
    exact = judge.predict(x_new, noise=False)
    assert bool(((draws.mean(0) - exact.mean).abs() <= 4.5 * exact.stddev / math.sqrt(600)).all())
    assert bool(((draws.var(0) / exact.variance - 1).abs() <= 4.5 * math.sqrt(2 / 600) + 0.05).all())
    joint = posterior.sample(x_new, (4000,), seed=2)
    theirs = judge.sample(x_new, (4000,), seed=3)
    # two empirical covariances of 21 entries, at five standard errors of their difference
    sd = exact.stddev
    bound = 5 * math.sqrt(2 * 2 / 4000) * torch.outer(sd, sd)
    assert bool(((torch.cov(joint.mT) - torch.cov(theirs.mT)).abs() <= bound).all())


def test_conditioning_on_more_is_fitting_all_and_starts_from_the_old_solution():
    x, y = toy(310)
    config = SolverConfig(rank=40, tolerance=1e-8, variance_tolerance=1e-6)
    engine = bdl.ExactGP(MATERN, optimize=False, standardize=False, solver=config)
    whole, part = engine.fit(x, y), engine.fit(x[:300], y[:300])
    updated = part.condition_on(x[300:], y[300:])
    x_new = toy(20, seed=5)[0]
    torch.testing.assert_close(updated.predict(x_new).mean, whole.predict(x_new).mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(updated.predict(x_new).variance, whole.predict(x_new).variance, rtol=1e-6, atol=1e-8)
    assert updated.diagnostics["iterations"] <= whole.diagnostics["iterations"]
    assert updated.diagnostics["num_data"] == 310


def test_a_solve_that_runs_out_of_steps_says_so():
    x, y = toy(noise=0.01)
    config = SolverConfig(rank=3, tolerance=1e-10, max_iterations=4, num_probes=0)
    with pytest.warns(ConvergenceWarning, match="raise max_iterations"):
        posterior = bdl.ExactGP(MATERN, optimize=False, solver=config).fit(x, y)
    assert not posterior.diagnostics["solver_converged"]
    assert posterior.diagnostics["residual"] > 1e-10
    assert posterior.diagnostics["iterations"] == 4
    with pytest.warns(ConvergenceWarning, match="solves ended at a relative residual"):
        posterior.predict(x[:3] + 0.1)


def test_the_choice_follows_the_rule():
    x, y = torch.zeros(6000, 2), torch.zeros(6000)
    small, large = training_data("test", x[:5000], y[:5000]), training_data("test", x, y)
    assert choose("auto", 2**40, small).method == "dense"
    assert choose("auto", 2**40, large).method == "matrix_free"
    assert choose("auto", 4 * 8 * 5000**2 - 1, small).method == "matrix_free"
    assert choose("dense", 2**40, large).method == "dense"
    assert choose(SolverConfig(rank=7), 2**40, small).config.rank == 7
    with pytest.raises(SettingError, match=r"matrix_free"):
        choose("dense", 2**29, large)
    with pytest.raises(SettingError, match=r"bdl\.SparseGP"):
        choose("auto", 2**20, large)
    assert 2**28 < default_memory(torch.device("cpu")) < 2**45


def test_too_many_joint_draws_are_refused_and_functions_named():
    x, y = toy(100)
    engine = bdl.ExactGP(MATERN, optimize=False, solver=SolverConfig(rank=20, num_probes=0), memory=2**21)
    posterior = engine.fit(x, y)
    with pytest.raises(SettingError, match=r"posterior\.functions"):
        posterior.sample(torch.zeros(400, 3, dtype=torch.float64))
    assert posterior.functions(2)(torch.zeros(400, 3, dtype=torch.float64)).shape == (2, 400)


def test_settings_are_checked_at_the_door():
    with pytest.raises(SettingError, match="solver must be one of"):
        bdl.ExactGP(MATERN, solver="cholesky")
    with pytest.raises(SettingError, match="memory must be an integer"):
        bdl.ExactGP(MATERN, memory=0)
    with pytest.raises(SettingError, match="tolerance must lie between"):
        SolverConfig(tolerance=2.0)
    with pytest.raises(SettingError, match="num_probes"):
        SolverConfig(num_probes=1)
    with pytest.raises(SettingError, match="estimator must be one of"):
        SolverConfig(estimator="gaussian")
    with pytest.raises(SettingError, match="rank must be an integer"):
        SolverConfig(rank=-1)


@pytest.mark.slow
def test_peak_memory_stays_within_the_estimate():
    """A process of its own, its peak resident memory before and after a fit and a prediction at 20 000 points.

    The matrix alone would take 3.2 GB.
    """
    code = """
        import resource, torch, bayesdl as bdl
        torch.set_num_threads(1)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(20_000, 2, generator=g, dtype=torch.float64)
        y = x.sum(-1).sin() + 0.1 * torch.randn(20_000, generator=g, dtype=torch.float64)
        gp = bdl.GP(bdl.kernels.RBF(lengthscale=1.0), likelihood=bdl.Gaussian(noise_variance=0.05))
        bdl.ExactGP(gp, optimize=False, solver="matrix_free").fit(x[:500], y[:500]).predict(x[:5])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        config = bdl.ops.SolverConfig(rank=100, num_probes=0)
        posterior = bdl.ExactGP(gp, optimize=False, solver=config).fit(x, y)
        posterior.predict(x[:16])
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print((after - before) * 1024, posterior.diagnostics["memory_needed"])
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, check=True
    )
    used, estimate = (float(word) for word in done.stdout.split())
    assert used <= 1.2 * estimate + 30e6  # pieces of tiles and the allocator's own slack


def test_no_warning_where_nothing_is_wrong():
    x, y = toy(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bdl.ExactGP(MATERN, optimize=False, solver="matrix_free").fit(x, y).predict(x[:5])
