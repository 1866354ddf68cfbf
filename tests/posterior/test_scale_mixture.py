"""Posteriors of scale mixtures: one scale for a whole path, the joint law of draws, files, ArviZ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import bayesdl as bdl
from bayesdl.errors import StorageError
from bayesdl.priors import BurrXII, InverseGamma


def toy(batch: tuple[int, ...] = (), n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, 2, generator=g, dtype=torch.float64)
    y = (2 * x[..., 0]).sin() + 0.4 * x[..., 1] + 0.2 * torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return x, y


def fitted(prior=None, batch: tuple[int, ...] = (), outputs: int = 0, **settings):
    x, y = toy(batch)
    y = y if outputs == 0 else torch.stack([(i + 1) * y for i in range(outputs)], -1)
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=1.5, lengthscale=(0.6, 1.3)), outputscale=1.7)
    gp = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=0.1))
    prior = InverseGamma(1.2, 1.2) if prior is None else prior
    return bdl.ScaleMixture(gp, prior, optimize=False, standardize=False, **settings).fit(x, y)


KINDS = {
    "student-t": {},
    "quadrature": {"prior": BurrXII(1.0, 1.5)},
    "fixed noise": {"prior": InverseGamma(0.8, 0.8), "noise": "fixed"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_path_shares_one_scale(kind):
    """Far from the data all points of a path are (nearly) independent given v, yet large together.

    Squares of 20,000 standardised paths at two far points correlate as Var v : a GP has correlation 0 within 0.035
    (five standard errors), which a scale drawn for each point would show as well.
    """
    posterior = fitted(**KINDS[kind])
    far = torch.tensor([[60.0, 0.0], [-60.0, 5.0]], dtype=torch.float64)
    for paths in (
        posterior.sample(far, (20_000,), seed=1),
        # 20,000 functions of 16 features, each Gaussian given v only in the limit of many; the bound is as wide
        posterior.functions(20_000, seed=1, num_features=16)(far),
    ):
        size = paths.abs().log()
        assert float(torch.corrcoef(size.T)[0, 1]) > 0.05
        # the dependence is between sizes only
        assert abs(float(torch.corrcoef(paths.sign().T)[0, 1])) < 0.04


def test_joint_draws_have_the_law_of_a_multivariate_t():
    """The Mahalanobis distance of 20,000 paths at three points over 3 is F(3, dof): Kolmogorov-Smirnov p above 1e-4."""
    posterior = fitted()
    x_new = toy(seed=3)[0][:3]
    latent = posterior.predict(x_new, noise=False)
    dof = float(latent.dof[0])
    assert dof == pytest.approx(2 * 1.2 + 6)
    gp = posterior.model
    x, _ = toy()
    k, k_xs, k_ss = (m.numpy() for m in (gp.kernel(x), gp.kernel(x, x_new), gp.kernel(x_new)))
    covariance = k_ss - k_xs.T @ np.linalg.solve(k + 0.1 * np.eye(6), k_xs)
    scale = covariance * float(latent.scale[0]) ** 2 / covariance[0, 0]
    # loc^2: the same ratio at every point, or the law is not of one scale
    assert latent.scale.square().numpy() == pytest.approx(scale.diagonal(), rel=1e-9)
    draws = (posterior.sample(x_new, (20_000,), seed=5) - latent.loc).numpy()
    distance = np.einsum("si,si->s", draws, np.linalg.solve(scale, draws.T).T) / 3
    assert stats.kstest(distance, stats.f(3, dof).cdf).pvalue > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_shapes_of_scales_and_draws(kind, outputs, batch):
    posterior = fitted(**KINDS[kind], batch=batch, outputs=outputs)
    tail = () if outputs == 0 else (outputs,)
    assert posterior.scale_mean.shape == (*batch, *tail)
    assert posterior.sample_scale((7,), seed=1).shape == (7, *batch, *tail)
    x_new = toy(seed=4)[0]
    assert posterior.sample(x_new, (3, 2), seed=1).shape == (3, 2, *batch, 6, *tail)
    assert posterior.functions(4, seed=1)(x_new).shape == (4, *batch, 6, *tail)
    more = x_new.expand(5, *[1] * len(batch), 6, 2)
    assert posterior.sample(more, (3,), seed=1).shape == (3, 5, *(batch or ()), 6, *tail)
    assert posterior.functions(4, seed=1)(more).shape == (4, 5, *batch, 6, *tail)
    assert posterior.predict(more).batch_shape == (5, *batch, 6, *tail)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_the_scale_have_its_mean(kind):
    """E[v | y] from 50,000 draws; five standard errors taken from the draws, with a prior whose v has a variance."""
    prior = BurrXII(2.0, 3.0) if kind == "quadrature" else InverseGamma(4.0, 4.0)
    posterior = fitted(**{**KINDS[kind], "prior": prior})
    v = posterior.sample_scale((50_000,), seed=2)
    assert abs(float(v.mean() - posterior.scale_mean)) < 5 * float(v.std()) / 50_000**0.5


@pytest.mark.parametrize("method", ["quadrature", "importance"])
def test_a_learned_shape_survives_a_file_and_an_update(method, tmp_path):
    x, y = toy(n=12)
    gp = bdl.GP(bdl.kernels.Matern())
    engine = bdl.ScaleMixture(gp, BurrXII(2.0, 2.0, learn=True), method=method, num_starts=1, max_iterations=20)
    posterior = engine.fit(x, y)
    assert set(posterior.hyperparameters) >= {"scale.c", "scale.d", "noise_variance"}
    assert float(posterior.hyperparameters["scale.c"]) != 2.0
    posterior.save(tmp_path / "p.bdl")
    loaded = bdl.load(tmp_path / "p.bdl")
    assert loaded.scale_prior == posterior.scale_prior
    assert torch.equal(loaded.predict(x).log_prob(y), posterior.predict(x).log_prob(y))
    both = [p.condition_on(*toy(n=3, seed=9)).predict(x).log_prob(y) for p in (posterior, loaded)]
    assert torch.equal(*both)


def test_a_posterior_with_a_density_of_ones_own_cannot_be_saved(tmp_path):
    with pytest.raises(StorageError, match="fit again"):
        fitted(lambda v: -v).save(tmp_path / "p.bdl")


def test_a_mixture_over_nodes_is_a_distribution_with_gradients():
    """The predictive density integrates to 1, and its gradient in x is that of finite differences."""
    posterior = fitted(BurrXII(1.0, 1.5))
    x_new = toy(seed=6)[0][:1].requires_grad_()
    grid = torch.linspace(-40, 40, 8001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        assert float(posterior.predict(x_new).log_prob(grid).exp().sum() * 0.01) == pytest.approx(1.0, abs=2e-3)
    assert torch.autograd.gradcheck(lambda x: posterior.predict(x).log_prob(torch.tensor([0.3]).double()), [x_new])
    assert torch.autograd.gradcheck(lambda x: posterior.predict(x).quantile(0.9), [x_new])


@pytest.mark.parametrize("kind", KINDS)
def test_arviz_gets_the_scale_beside_the_function(kind):
    tree = fitted(**KINDS[kind]).to_arviz()
    assert tree["posterior"]["sigma_squared"].shape == (1, 1000)
    assert tree["posterior"]["f"].shape == (1, 1000, 6)
    assert bool(np.isfinite(tree["log_likelihood"]["y"].values).all())
