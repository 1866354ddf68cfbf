"""Bounds on hyper-parameters, and fixed ones: the covariance stays, the search narrows."""

from __future__ import annotations

import pytest
import torch

import bayesdl as bdl
from bayesdl.errors import SettingError
from bayesdl.kernels import RBF, Bounded, Linear, Matern, RationalQuadratic, Scale
from bayesdl.testing import check_kernel

F64 = torch.float64


@pytest.mark.parametrize(
    "kernel",
    [
        Bounded(RBF(lengthscale=0.8), lower={"lengthscale": 0.1}, upper={"lengthscale": 3.0}),
        Bounded(Scale(RationalQuadratic(alpha=0.7)), lower={"base.lengthscale": 0.5}, fixed="base.alpha"),
        Scale(Bounded(Matern(nu=1.5, lengthscale=0.6), fixed=["lengthscale"])) + Linear(),
    ],
    ids=["both bounds", "one fixed", "all fixed inside a sum"],
)
def test_a_bounded_kernel_is_a_kernel(kernel):
    check_kernel(kernel)


def test_the_covariance_is_that_of_the_base():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    base = Scale(RationalQuadratic(alpha=0.7, lengthscale=(0.4, 1.9)), outputscale=2.2)
    kernel = Bounded(base, lower={"outputscale": 0.3}, fixed=("base.alpha",))
    assert [p.name for p in kernel.parameters(2)] == ["outputscale", "base.lengthscale"]
    params = {"outputscale": torch.tensor(1.1, dtype=F64), "base.lengthscale": torch.tensor([0.7, 0.2], dtype=F64)}
    wanted = base(x, None, {**params, "base.alpha": torch.tensor(0.7, dtype=F64)})
    torch.testing.assert_close(kernel(x, None, params), wanted, rtol=0, atol=0)


def test_a_fit_keeps_within_bounds_and_a_file_remembers_them(tmp_path):
    """A fast sine wants a short lengthscale; the bound stops it."""
    x = torch.linspace(0, 1, 40, dtype=F64).unsqueeze(-1)
    y = (40 * x[:, 0]).sin() + 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=F64)
    likelihood = bdl.Gaussian(noise_variance=1e-3, prior=None)
    found = {}
    for name, kernel in {
        "free": RBF(lengthscale=0.5, lengthscale_prior=None),
        "bounded": Bounded(RBF(lengthscale=0.5, lengthscale_prior=None), lower={"lengthscale": 0.4}),
        "fixed": Bounded(Scale(RBF(lengthscale=0.5)), fixed="base.lengthscale"),
    }.items():
        found[name] = bdl.ExactGP(bdl.GP(kernel, likelihood=likelihood), num_starts=1).fit(x, y)
    assert float(found["free"].hyperparameters["kernel.lengthscale"]) < 0.3
    assert float(found["bounded"].hyperparameters["kernel.lengthscale"]) >= 0.4
    assert "kernel.base.lengthscale" not in found["fixed"].hyperparameters
    found["bounded"].save(tmp_path / "a.bdl")
    loaded = bdl.load(tmp_path / "a.bdl")
    assert loaded.model == found["bounded"].model
    assert torch.equal(loaded.predict(x).mean, found["bounded"].predict(x).mean)


def test_settings_are_checked():
    with pytest.raises(SettingError, match="must name parameters of RBF"):
        Bounded(RBF(), lower={"length": 0.1}).parameters(2)
    with pytest.raises(SettingError, match="must lie strictly between"):
        Bounded(RBF(lengthscale=0.5), lower={"lengthscale": 0.5}).parameters(2)
    with pytest.raises(SettingError, match="base must be a kernel"):
        Bounded("rbf")
