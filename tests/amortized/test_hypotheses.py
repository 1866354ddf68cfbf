"""The head of kernels: against scikit-learn's Gaussian process, and against itself when data come in parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from torch import Tensor

from bayesdl.amortized import Architecture, Network, Pretrained, Schedule, hypotheses, predictive, pretrain
from bayesdl.errors import SettingError
from bayesdl.hyper import LogNormal
from bayesdl.priors.tasks import HyperGP

SKLEARN = {
    "matern-1/2": lambda scale: kernels.Matern(scale, nu=0.5),
    "matern-3/2": lambda scale: kernels.Matern(scale, nu=1.5),
    "matern-5/2": lambda scale: kernels.Matern(scale, nu=2.5),
    "rbf": kernels.RBF,
}


def toy(n: int = 9, d: int = 3, num: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw outputs of `num` hypotheses for two data sets, x, y and queries, all float64."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return 0.7 * draw(2, num, d + 4), draw(2, n, d), draw(2, n), draw(2, 5, d)


@pytest.mark.parametrize("name", SKLEARN)
def test_each_hypothesis_is_an_exact_gaussian_process(name: str) -> None:
    """Mean, variance and evidence are scikit-learn's; the weights are Bayes' rule with the volumes as prior."""
    raw, x, y, xs = toy()
    known = hypotheses.read(name, raw, x, y)
    weight, mean, variance = hypotheses.query(name, known, xs, None).chunk(3, -1)
    evidence = torch.empty(2, 2, dtype=torch.float64)
    for b in range(2):
        for m in range(2):
            h = raw[b, m]
            scale, noise = float(h[-3].exp()), math.exp(-3 + float(h[-2])) + 1e-5 * float(h[-3].exp())
            kernel = kernels.ConstantKernel(scale) * SKLEARN[name]((math.sqrt(3) * h[:3].exp()).numpy())
            process = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(x[b], y[b])
            wanted, deviation = process.predict(xs[b], return_std=True)
            np.testing.assert_allclose(mean[b, :, m], wanted, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(variance[b, :, m] - noise, deviation**2, rtol=1e-6, atol=1e-9)
            evidence[b, m] = process.log_marginal_likelihood_value_
    wanted = (raw[..., -1] + evidence).log_softmax(-1).unsqueeze(1).expand(-1, 5, -1)
    torch.testing.assert_close(weight, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kept", [0, 1, 6])
def test_points_in_parts_are_points_at_once(kept: int) -> None:
    """Appending is exact conditioning: the weights too, since evidence is a product of predictions."""
    raw, x, y, xs = toy()
    whole = hypotheses.query("matern-5/2", hypotheses.read("matern-5/2", raw, x, y), xs, None)
    known = hypotheses.read("matern-5/2", raw, x[:, :kept], y[:, :kept])
    for i in range(kept, 9, 2):
        known = hypotheses.append("matern-5/2", known, x[:, i : i + 2], y[:, i : i + 2], noiseless=False)
    assert known.num_points == 9
    torch.testing.assert_close(hypotheses.query("matern-5/2", known, xs, None), whole, rtol=1e-8, atol=1e-8)


def test_values_without_noise_pin_the_function() -> None:
    """And leave the noise of what is asked, and of the points before, as they were."""
    raw, x, y, xs = toy()
    before = hypotheses.read("matern-5/2", raw, x, y)
    after = hypotheses.append("matern-5/2", before, xs, torch.zeros(2, 5, dtype=xs.dtype), noiseless=True)
    pure = hypotheses.query("matern-5/2", after, xs, xs.new_zeros(2))
    _, mean, variance = pure.chunk(3, -1)
    assert float(mean.abs().max()) < 1e-3
    assert float(variance.max()) < 3e-5 * float(before.outputscale.max())
    noisy = hypotheses.query("matern-5/2", after, xs, None).chunk(3, -1)[2]
    torch.testing.assert_close(noisy - variance, before.noise_variance.unsqueeze(1).expand(-1, 5, -1))
    assert torch.equal(after.noise_variance, before.noise_variance)


def test_a_chain_of_predictions_is_a_joint_draw() -> None:
    """Second moments of 4000 chains through three points against the mixture's own; 5 standard errors, so one false
    alarm in 200 000 for nine moments."""
    raw, x, y, xs = toy(num=3)
    known = hypotheses.read("rbf", raw[:1], x[:1], y[:1])
    num, points = 4000, xs[:1, :3]
    state = known.state
    k = [hypotheses.KERNELS["rbf"](a.unsqueeze(1), b.unsqueeze(1), known.params)
         for a, b in ((x[:1], points), (points, points))]  # fmt: skip
    half = torch.linalg.solve_triangular(state.chol, k[0], upper=False)
    mean = (k[0].mT @ state.alpha.unsqueeze(-1)).squeeze(-1)
    second = (
        known.log_weight.exp()[..., None, None] * (k[1] - half.mT @ half + mean[..., None] * mean[..., None, :])
    ).sum(1)
    architecture = Architecture(3, "kernel", 3, kernel="rbf", num_conditions=1)
    g = torch.Generator().manual_seed(3)
    chain = known.map(lambda value: value.expand(num, *value.shape[1:]))
    drawn = []
    for i in range(3):
        here = points[:, i : i + 1].expand(num, -1, -1)
        law = predictive(architecture, hypotheses.query("rbf", chain, here, xs.new_zeros(num)), None)
        drawn.append(law.sample(seed=int(torch.randint(2**31, (), generator=g))))
        chain = hypotheses.append("rbf", chain, here, drawn[-1], noiseless=True)
    f = torch.cat(drawn, -1)
    products = f.unsqueeze(-1) * f.unsqueeze(-2)
    error = (products.mean(0) - second[0]) / (products.std(0) / math.sqrt(num))
    assert float(error.abs().max()) < 5


def test_it_learns_hyper_parameters_from_one_gradient_per_task() -> None:
    """A few steps bring noise and lengthscale from where they start to where the prior has them."""
    prior = HyperGP(("rbf",), lengthscale=LogNormal(-1.0, 0.05), outputscale=LogNormal(1.0, 0.05),
                    noise_variance=LogNormal(-5.0, 0.05))  # fmt: skip
    architecture = Architecture(1, "kernel", 2, width=16, num_layers=1, num_heads=2, hidden=16, kernel="rbf")
    schedule = Schedule(num_steps=150, batch=8, n_max=20, num_queries=16, learning_rate=0.02, appended_share=0.0,
                        noiseless_share=0.0, targets="expected")  # fmt: skip
    trained = pretrain(prior, architecture, schedule, progress=False)
    tasks = prior.sample(50, 20, 1, torch.Generator().manual_seed(1))
    known = trained.network.encode(tasks.x, tasks.y)
    best = known.log_weight.argmax(-1, keepdim=True)
    for value, wanted in ((known.lengthscale[..., 0], -1.0), (known.outputscale, 1.0), (known.noise_variance, -5.0)):
        assert abs(float(value.gather(-1, best).log().median()) - wanted) < 0.5


def test_a_run_may_begin_with_the_trunk_of_another_head() -> None:
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "hidden": 16, "num_conditions": 1}
    card = {"name": "other", "task": "regression", "prior": "?", "ranges": {"n": [0, 9], "d": [1, 1], "x": [-2, 2]}}
    start = Pretrained(Network(Architecture(1, "mixture", 3, **sizes), seed=8), None,
                       {**card, "inputs": "standardized", "targets": "standardized"})  # fmt: skip
    schedule = Schedule(num_steps=1, batch=2, n_max=5, num_queries=4, learning_rate=1e-9)
    mine = Architecture(1, "kernel", 2, kernel="rbf", **sizes)
    trained = pretrain(HyperGP(), mine, schedule, start=start, progress=False)
    torch.testing.assert_close(trained.network.blocks[1].qkv.weight, start.network.blocks[1].qkv.weight)
    assert trained.card["started_from"]["name"] == "other"
    other = Architecture(1, "kernel", 2, kernel="rbf", **{**sizes, "width": 8})
    with pytest.raises(SettingError, match="architecture"):
        pretrain(HyperGP(), other, schedule, start=start, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "kernel"}, "kernel must be one of"),
        ({"head": "kernel", "kernel": "cubic"}, "kernel must be one of"),
        ({"head": "mixture", "kernel": "rbf"}, "only a head of kernels"),
    ],
)
def test_impossible_heads_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Architecture(2, outputs=3, **settings)
