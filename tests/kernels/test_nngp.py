"""NNGP and NTK against values computed in 25-digit arithmetic, and against what is true of any such network."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bayesdl.kernels.infinite_width as infinite_width
from bayesdl import ops
from bayesdl.errors import NumericalWarning, SettingError
from bayesdl.kernels import NNGP, NTK, Activation, critical
from bayesdl.kernels.base import autograd_pullback

# K(x, z), K(x, x), K(z, z), NTK(x, z), NTK(x, x) at x = (1, .5, -.3), z = (-.2, .8, .4), with w_std = 1.5 and
# b_std = 0.3 in every layer, read-out included; leaky relu has slope 0.1 below 0.
NETWORKS = {
    ("relu", 1): (0.496885560602249, 1.321875, 0.9, 0.590378559403883, 2.55375),
    ("relu", 2): (0.801364720845233, 1.577109375, 1.1025, 1.23345020408231, 4.450078125),
    ("relu", 3): (1.10320657873427, 1.864248046875, 1.3303125, 2.08553773624381, 6.8705859375),
    ("relu", 5): (1.76097022820341, 2.55068893432617, 1.8749267578125, 4.5297632396193, 13.7069631958008),
    ("leaky_relu", 1): (0.453327304087822, 1.33419375, 0.9081, 0.562806633117145, 2.5783875),
    ("leaky_relu", 3): (1.04833060163825, 1.91479210303711, 1.36467777515625, 2.06798845148752, 7.06844764652344),
    ("erf", 1): (0.244324242416748, 1.17388234336405, 0.994216058689469, 0.39924838251208, 2.5263149038907),
    ("erf", 3): (0.359730574319985, 1.21366456938487, 1.18823970636177, 0.952720946585019, 6.24670681841522),
    ("erf", 5): (0.423542530175777, 1.21851650041393, 1.21544384573938, 1.46878070477185, 11.4037759374039),
    ("gelu", 1): (0.328068605251865, 1.15109524390621, 0.744548616505507, 0.422389466904234, 2.28755117734924),
    ("gelu", 3): (0.558917209814795, 1.28157986810539, 0.798419349767122, 1.12765097892775, 5.06655670378994),
    ("gelu", 5): (0.730276336322963, 1.44261449223786, 0.860130478903666, 1.9952512140233, 8.58844806572172),
    ("sin", 1): (0.226703275110651, 1.08909365780551, 0.948456271482613, 0.364430290160914, 2.45883610250848),
    ("sin", 3): (0.306182470729322, 1.08721575943378, 1.07618968879292, 0.771906735890755, 6.30763022088637),
    ("cos", 1): (1.00818010033509, 1.34090634219449, 1.48154372851739, 1.02868559160168, 2.43491389749152),
    ("cos", 3): (1.01186850321333, 1.29990649584035, 1.30317338590766, 2.10597547462122, 5.2978164304707),
}
ALL = ("relu", "abs", "step", "erf", "probit", "gelu", "sin", "cos", "shifted_sin", "leaky_relu", "tanh", "silu")


def _f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _inputs(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIR = torch.stack([_f64(1.0, 0.5, -0.3), _f64(-0.2, 0.8, 0.4)])


@pytest.mark.parametrize(("name", "depth"), NETWORKS)
def test_kernels_agree_with_high_precision_values(name, depth):
    activation = Activation("leaky_relu", negative_slope=0.1) if name == "leaky_relu" else name
    cross, own, other, tangent, own_tangent = NETWORKS[name, depth]
    kernel = NNGP(depth=depth, activation=activation, w_std=1.5, b_std=0.3)
    expected = _f64(own, cross, cross, other).reshape(2, 2)
    torch.testing.assert_close(kernel(PAIR), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel(PAIR[:1], PAIR[1:]), expected[:1, 1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel.value_and_pullback(PAIR)[0], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(kernel.diagonal(PAIR), expected.diagonal(), rtol=1e-10, atol=0)
    ntk = NTK(depth=depth, activation=activation, w_std=1.5, b_std=0.3)
    torch.testing.assert_close(ntk(PAIR)[0], _f64(own_tangent, tangent), rtol=1e-10, atol=0)
    torch.testing.assert_close(ntk(PAIR[:1], PAIR), _f64(own_tangent, tangent)[None], rtol=1e-10, atol=0)
    torch.testing.assert_close(ntk.diagonal(PAIR)[0], _f64(own_tangent)[0], rtol=1e-10, atol=0)


def test_critical_relu_networks_agree_with_high_precision_values():
    """No bias at all, w_std = sqrt 2; a read-out of unit scale halves both kernels."""
    values = {"k": (0.893333333333333, 0.438922286716606), "t": (3.57333333333333, 0.801448874347321)}
    for kernel, which in ((NNGP, "k"), (NTK, "t")):
        got = kernel(depth=3, w_std=math.sqrt(2), b_std=0)(PAIR)[0]
        torch.testing.assert_close(got, _f64(*values[which]), rtol=1e-10, atol=0)
        assert [p.name for p in kernel(b_std=0).parameters(3)] == ["w_std"]


def test_covariances_agree_with_the_scale_mixture_fixture():
    """A second set of numbers: two layers, w_std = sqrt 2, b_std = 0.1, and the Gaussian conditional that follows."""
    x = _f64(0.5, -1, 1.5, 0.25, -0.75, 0.8, 0.1, 1.2).reshape(4, 2)
    xs, y = _f64(0.3, 0.3, 3, -2).reshape(2, 2), _f64(0.7, -0.4, 1.1, 0.2)
    kernel = NNGP(depth=2, w_std=math.sqrt(2), b_std=0.1)
    k = kernel(x)
    upper = _f64(
        1.28, 1.0404639045743, 0.41421285434743, 0.463142477231,
        2.3425, 0.63429416216523, 1.0841164808385, 1.2325, 1.0477183151004, 1.48,
    )  # fmt: skip
    torch.testing.assert_close(k[torch.triu_indices(4, 4).unbind()], upper, rtol=1e-10, atol=0)
    state = ops.condition(k, x, y, _f64(0.05)[0])
    mean, covariance = ops.joint_moments(state, kernel(x, xs), kernel(xs))
    torch.testing.assert_close(mean, _f64(-0.093029417571773, 0.95222959574163), rtol=1e-10, atol=0)
    expected = _f64(0.0294951246123, -0.062430798172198, -0.062430798172198, 1.3286954059003).reshape(2, 2)
    torch.testing.assert_close(covariance, expected, rtol=1e-10, atol=0)
    assert float(ops.log_marginal(state)) == pytest.approx(-4.8670434968479, rel=1e-10)


def test_one_hidden_layer_of_shifted_sines_is_an_rbf_kernel():
    """phi = sqrt 2 sin(x + pi / 4): k = w^2 exp(-w^2 |x - z|^2 / (2 d)) + b^2, whatever the first bias."""
    x, z = _inputs(4, 3), _inputs(5, 3, seed=1)
    kernel = NNGP(depth=1, activation="shifted_sin", w_std=1.3, b_std=0.4)
    expected = 1.3**2 * (-0.5 * 1.3**2 / 3 * torch.cdist(x, z).square()).exp() + 0.16
    torch.testing.assert_close(kernel(x, z), expected, rtol=1e-12, atol=0)


def test_identity_networks_are_linear():
    """Depth 2: k = w^6 x.z / d + b^2 (1 + w^2 + w^4), and the tangent kernel adds one such term a layer."""
    x, w, b = _inputs(3, 4), 1.2, 0.5
    r = x @ x.mT / 4
    levels = [w**2 * r + b**2]
    for _ in range(2):
        levels.append(w**2 * levels[-1] + b**2)
    settings_ = {"depth": 2, "activation": "identity", "w_std": w, "b_std": b}
    torch.testing.assert_close(NNGP(**settings_)(x), levels[2], rtol=1e-12, atol=0)
    tangent = levels[2] + w**2 * (levels[1] + w**2 * levels[0])
    torch.testing.assert_close(NTK(**settings_)(x), tangent, rtol=1e-12, atol=0)


def test_critical_relu_network_without_bias_keeps_variances():
    """w_std^2 = 2 and vanishing b_std: K(x, x) is 2 |x|^2 / d whatever the depth."""
    x = _inputs(5, 3)
    for b_std in (0.0, 1e-9):
        diagonal = NNGP(depth=4, b_std=b_std).diagonal(x)
        torch.testing.assert_close(diagonal, 2 * x.square().sum(-1) / 3, rtol=1e-12, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.05, 20.0), st.integers(1, 4), st.sampled_from(["relu", "abs"]))
def test_kernels_of_rectifiers_without_bias_are_homogeneous(seed, factor, depth, activation):
    """k(c x, z) = c k(x, z), and the tangent kernel likewise: each layer is homogeneous of degree 1."""
    x, z = _inputs(3, 2, seed), _inputs(3, 2, seed + 1)
    for kind in (NNGP, NTK):
        kernel = kind(depth=depth, activation=activation, w_std=1.2, b_std=0)
        torch.testing.assert_close(kernel(factor * x, z), factor * kernel(x, z), rtol=1e-9, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from(ALL), st.booleans())
def test_kernels_are_invariant_and_positive(seed, depth, activation, tangent):
    """Rotations of the inputs change nothing, permuted points permute K, and no eigenvalue is negative."""
    if tangent and activation == "step":
        return
    x = _inputs(7, 3, seed)
    x[5], x[6] = x[2], -x[1]
    kernel = (NTK if tangent else NNGP)(depth=depth, activation=activation, b_std=0.2)
    k = kernel(x)
    rotation = torch.linalg.qr(_inputs(3, 3, seed + 1))[0]
    # Through a kink, K of equal rows depends on the square root of a rounding.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if activation == "step" else {"rtol": 1e-9, "atol": 1e-9}
    tolerance = {"rtol": 1e-7, "atol": 1e-7} if tangent else tolerance
    torch.testing.assert_close(kernel(x @ rotation), k, **tolerance)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    torch.testing.assert_close(kernel(x[order]), k[order][:, order], **tolerance)
    torch.testing.assert_close(k, k.mT, rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(k)[0]) >= -1e-6 * float(k.diagonal().max())


@pytest.mark.parametrize("activation", ALL)
def test_gradients_at_parallel_rows_are_finite_and_symmetric(activation):
    """Rows that are equal, opposite, zero and parallel, where arccos has no derivative."""
    x = _f64(1.0, 2.0, 1.0, 2.0, -1.0, -2.0, 0.0, 0.0, 2.0, 4.0).reshape(5, 2).requires_grad_()
    for kind in (NNGP,) if activation == "step" else (NNGP, NTK):
        for b_std in (0.2, 0.0):
            kernel = kind(depth=2, activation=activation, b_std=b_std)
            for z in (None, x.detach()):
                (grad,) = torch.autograd.grad(kernel(x, z).sum(), x)
                assert bool(grad.isfinite().all())
                torch.testing.assert_close(grad[0], grad[1], rtol=1e-6, atol=1e-6)


def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5 x 5: ragged for the sizes below, with a graph and without."""
    monkeypatch.setattr(
        infinite_width.Infinite,
        "_tiles",
        lambda self, x, z, params, same: list(infinite_width._pairs_of(x.shape[-2], z.shape[-2], 5, same)),
    )


@pytest.mark.parametrize(("kind", "activation"), [(NNGP, "relu"), (NNGP, "tanh"), (NTK, "gelu")])
def test_tiles_change_nothing(kind, activation, monkeypatch):
    """Values, gradients in x and in the scales, and pullbacks, for 13 x 13 and 13 x 7 in tiles of 5."""
    kernel = kind(depth=2, activation=activation, active_dims=(0, 2), b_std=0.4)
    x, z = _inputs(13, 3), _inputs(7, 3, seed=1)
    x[11] = x[1]
    p = _inputs(13, 13, seed=2)
    p = p + p.mT

    def everything() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        params = {"w_std": _f64(1.1).requires_grad_(), "b_std": _f64(0.6, 0.3).requires_grad_()}
        k, k_z = kernel(leaf, None, params), kernel(leaf, z, params)
        grads = torch.autograd.grad((k * p).sum() + k_z.square().sum(), [leaf, *params.values()])
        value, pullback = kernel.value_and_pullback(x, params)
        reference = autograd_pullback(kernel, x, params)[1]((p / 3).expand(2, 13, 13).clone())
        back = pullback((p / 3).expand(2, 13, 13).clone())
        for name, grad in back.items():
            torch.testing.assert_close(grad, reference[name], rtol=1e-9, atol=1e-9)
        return [k.detach(), k_z.detach(), kernel(x), kernel(x, z), *grads, value, *back.values()]

    whole = everything()
    _small_tiles(monkeypatch)
    for got, expected in zip(everything(), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_large_matrices_go_in_tiles_by_themselves():
    """600 points are more than one cached tile; the pullback of such a matrix against autograd through all of it."""
    kernel, x = NNGP(depth=2, b_std=0.2), _inputs(600, 4)
    assert len(kernel._tiles(x, x, kernel._initial(4, x), True)) == 3
    value, pullback = kernel.value_and_pullback(x)
    torch.testing.assert_close(value, torch.cat([kernel(x[:70], x), kernel(x[70:], x)]), rtol=1e-12, atol=1e-12)
    p = _inputs(600, 600, seed=1) / 600
    p = p + p.mT
    reference = autograd_pullback(kernel, x)[1](p.clone())
    for name, grad in pullback(p).items():
        torch.testing.assert_close(grad, reference[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("activation", ["erf", "gelu", "tanh", "sin", "silu"])
@pytest.mark.parametrize("variance", [0.5, 1.0])
def test_critical_scales_keep_variance_and_distance(activation, variance):
    """By simulation of the recursion: after 20 layers the variance is still q, and 1 - c has hardly moved."""
    w_std, b_std = critical(activation, variance)
    dual = Activation(activation).dual
    a = _f64(variance)
    r = a * (1 - 1e-6)
    for _ in range(20):
        r, a = w_std**2 * dual(a, r, a) + b_std**2, w_std**2 * dual.diagonal(a) + b_std**2
    assert float(a) == pytest.approx(variance, rel=1e-6)
    assert float(1 - r / a) == pytest.approx(1e-6, rel=1e-3)


def test_critical_scales_of_known_activations():
    """Closed forms: relu; leaky relu; erf, where E[phi'^2] = (4 / pi) / sqrt(1 + 4 q)."""
    assert critical("relu") == (pytest.approx(math.sqrt(2)), 0.0)
    leaky = Activation("leaky_relu", negative_slope=0.5)
    assert critical(leaky) == (pytest.approx(math.sqrt(1.6)), 0.0)
    w2 = math.sqrt(1 + 4 * 0.7) * math.pi / 4
    b2 = 0.7 - w2 * 2 / math.pi * math.asin(1.4 / 2.4)
    assert critical("erf", 0.7) == (pytest.approx(math.sqrt(w2)), pytest.approx(math.sqrt(b2)))
    with pytest.raises(SettingError, match=r"pass variance=|by hand"):
        critical("cos", 0.5)
    with pytest.raises(SettingError, match="by hand"):
        critical("softplus")
    with pytest.raises(SettingError, match="derivative"):
        critical("step")
    with pytest.raises(SettingError, match="variance"):
        critical("erf", 0.0)


def test_exploding_and_vanishing_variances_are_told():
    x = _inputs(4, 3)
    with pytest.warns(NumericalWarning, match="largest prior variance"):
        NNGP(depth=30, w_std=3.0)(x)
    with pytest.warns(NumericalWarning, match="critical"):
        NNGP(depth=30, w_std=0.5, b_std=1e-9)(x)


def test_float32_agrees_with_float64():
    x = _inputs(6, 3)
    for kind in (NNGP, NTK):
        kernel = kind(depth=3)
        single = kernel(x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), kernel(x), rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_kernels_go_through_vmap_and_jacobians():
    """torch.func over hyper-parameters and inputs, against loops and reverse-mode gradients."""
    kernel, x = NNGP(depth=2), _inputs(4, 2)
    scales = _f64(0.8, 1.3, 1.9)

    def at(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return kernel(x, None, {"w_std": w, "b_std": _f64(0.3)[0]})

    mapped = torch.func.vmap(at, in_dims=(0, None))(scales, x)
    torch.testing.assert_close(mapped, torch.stack([at(w, x) for w in scales]))
    jacobian = torch.func.jacrev(at, argnums=1)(scales[0], x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(at(scales[0], leaf)[0, 2], leaf)
    torch.testing.assert_close(jacobian[0, 2], grad)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: NNGP(depth=0), "depth"),
        (lambda: NTK(depth=True), "depth"),
        (lambda: NNGP(activation="softmax"), "activation"),
        (lambda: NNGP(activation=torch.relu), "kink"),
        (lambda: NNGP(activation=torch.nn.Tanh()), "function of a tensor"),
        (lambda: NNGP(activation=lambda x: x.sum()), "same shape"),
        (lambda: NNGP(activation=3.0), "activation"),
        (lambda: NTK(activation="step"), "derivative"),
        (lambda: NNGP(b_std=-0.1), "b_std"),
        (lambda: NNGP(w_std=0), "w_std"),
        (lambda: Activation("leaky_relu", negative_slope=math.nan), "negative_slope"),
        (lambda: Activation("tanh", degree=2), "degree"),
        (lambda: Activation("tanh", degree=500), "degree"),
    ],
)
def test_bad_settings_are_refused_at_construction(make, word):
    with pytest.raises(SettingError, match=word):
        make()
