"""What a task's cause says about its further points, against the project's exact GP and against the draws."""

import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import SettingError
from bayesdl.priors import tasks

PRIORS = {
    "fixed": tasks.FixedGP(bdl.kernels.RBF(lengthscale=0.6), noise_variance=0.05),
    "hyper": tasks.HyperGP(),
    "periodic": tasks.HyperGP(("periodic", "linear", "matern-3/2")),
    "network": tasks.NetworkGP(),
    "student-t": tasks.StudentTProcess(tasks.HyperGP(("rbf", "matern-1/2"))),
    "hebo": tasks.HEBOPlus(warp=(0.9, 0.8), by_dimension=True),
}


@pytest.mark.parametrize("name", list(PRIORS))
@pytest.mark.parametrize("num_noiseless", [0, 4])
def test_further_values_are_what_the_law_says(name: str, num_noiseless: int) -> None:
    """Standardised errors of f, and of y, are N(0, 1).

    4000 tasks, one query each: their mean square is 1 within 4.5 standard errors, sqrt(2 / 4000) each, and so is their
    mean 0; 24 such checks are beyond with probability 2e-4 together. Without the context the variance would be off by
    far more, and a wrong noise on the noiseless points shows in the last cases.
    """
    prior, batch, n = PRIORS[name], 4000, 9
    drawn = prior.sample(batch, n + 1, 2, torch.Generator().manual_seed(7))
    y = drawn.y[:, :n].clone()
    y[:, n - num_noiseless :] = drawn.noiseless[:, n - num_noiseless : n]
    law = prior.conditional(drawn.latents, drawn.x[:, :n], y, drawn.x[:, n:], num_noiseless)
    assert law.mean.shape == law.variance.shape == (batch, 1)
    assert law.noise_variance.shape == (batch,)
    for value, variance in (
        (drawn.noiseless, law.variance),
        (drawn.y, law.variance + law.noise_variance.unsqueeze(-1)),
    ):
        scaled = (value[:, n:].double() - law.mean) / variance.sqrt()
        assert abs(float(scaled.mean())) < 4.5 / batch**0.5
        assert abs(float(scaled.square().mean()) - 1) < 4.5 * (2 / batch) ** 0.5


def test_agrees_with_the_exact_gp() -> None:
    """The posterior of a GP with the task's hyper-parameters, far from the defaults."""
    kernel = bdl.kernels.Scale(bdl.kernels.Matern(nu=2.5, lengthscale=0.4), 3.0)
    prior = tasks.FixedGP(kernel, noise_variance=0.3)
    drawn = prior.sample(3, 12, 2, torch.Generator().manual_seed(1))
    law = prior.conditional(drawn.latents, drawn.x[:, :8], drawn.y[:, :8], drawn.x[:, 8:])
    model = bdl.GP(kernel, mean="zero", likelihood=bdl.Gaussian(noise_variance=0.3))
    for i in range(3):
        engine = bdl.ExactGP(model, optimize=False, standardize=False)
        posterior = engine.fit(drawn.x[i, :8].double(), drawn.y[i, :8].double())
        exact = posterior.predict(drawn.x[i, 8:].double(), noise=False)
        torch.testing.assert_close(law.mean[i], exact.mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(law.variance[i], exact.variance, rtol=1e-5, atol=1e-7)


def test_without_a_context_it_is_the_prior() -> None:
    """n = 0: mean 0 and the variance of the kernel."""
    prior = tasks.FixedGP(bdl.kernels.Scale(bdl.kernels.RBF(), 2.5), noise_variance=0.1)
    drawn = prior.sample(5, 3, 1, torch.Generator().manual_seed(0))
    law = prior.conditional(drawn.latents, drawn.x[:, :0], drawn.y[:, :0], drawn.x)
    torch.testing.assert_close(law.mean, torch.zeros(5, 3, dtype=torch.float64))
    torch.testing.assert_close(law.variance, torch.full((5, 3), 2.5, dtype=torch.float64), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("settings", [{}, {"axis": "size", "horizon": 36}, {"standardize": False}])
def test_a_curve_is_known_from_its_latents(settings: dict[str, object]) -> None:
    """The mean is the curve itself, variance 0; what is left is the noise, in the units of y.

    Standardised errors of 300 curves at 20 places: the mean square is 1 within 4.5 standard errors.
    """
    prior = tasks.LearningCurves(**settings)
    drawn = prior.sample(300, 36, 1, torch.Generator().manual_seed(3))
    law = prior.conditional(drawn.latents, drawn.x[:, :16], drawn.y[:, :16], drawn.x[:, 16:])
    torch.testing.assert_close(law.mean.float(), drawn.noiseless[:, 16:], rtol=1e-4, atol=1e-5)
    assert bool((law.variance == 0).all())
    scaled = (drawn.y[:, 16:].double() - law.mean) / law.noise_variance.sqrt().unsqueeze(-1)
    assert abs(float(scaled.square().mean()) - 1) < 4.5 * (2 / scaled.numel()) ** 0.5


@pytest.mark.parametrize("prior", [tasks.HEBOPlus(linear=True), tasks.StudentTProcess(tasks.NeuralNetwork())])
def test_priors_without_the_law_say_so(prior: tasks.TaskPrior) -> None:
    """HEBO's slopes are not among its latents, and a network's values are not normal."""
    drawn = prior.sample(2, 4, 2, torch.Generator().manual_seed(0))
    with pytest.raises(SettingError, match=r"law of further values(.|\n)*drawn"):
        prior.conditional(drawn.latents, drawn.x[:, :3], drawn.y[:, :3], drawn.x[:, 3:])
