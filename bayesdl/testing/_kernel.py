"""What every kernel must obey, as one call for whoever writes one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bayesdl.errors import BayesdlError, DtypeError, SettingError, ShapeError
from bayesdl.kernels.base import Kernel, Params, autograd_pullback

_BATCHES = ((), (3,), (2, 3))


def check_kernel(kernel: Kernel, *, d: int = 3, seed: int = 0) -> None:
    """Assert that the parts of a kernel agree with each other and with what a kernel is.

    Symmetry and positive semi-definiteness, an exact diagonal, batches equal to loops, the closed-form pullback equal
    to autograd, gradients equal to finite differences and finite at duplicate rows, float32 in and out, shapes refused
    at the door, the global random state left alone, and prior functions whose covariance is the kernel.

    Args:
        kernel: The kernel to check.
        d: Number of input columns to check it with.
        seed: Seed of the inputs and hyper-parameters.

    Raises:
        AssertionError: With a sentence that says what does not hold.

    The last check is statistical: five standard errors for each of ten covariances, so that a right kernel fails at
    fewer than one seed in 100 000.
    """
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        case = _Case(kernel, d, seed, torch.device(device))
        for check in _CHECKS:
            check(case)
    assert torch.equal(before[0], torch.get_rng_state()), "the kernel drew from torch's global random state"
    assert np.array_equal(before[1], np.random.get_state()[1]), "the kernel drew from numpy's global random state"


class _Case:
    """The kernel with a stream of inputs and hyper-parameters away from the defaults."""

    def __init__(self, kernel: Kernel, d: int, seed: int, device: torch.device) -> None:
        self.kernel, self.d, self.device = kernel, d, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device=self.device)

    def params(self, batch: tuple[int, ...] = ()) -> Params:
        like = self.normal(1)
        return {
            p.name: p.constrained(p.unconstrained(p.initial_tensor(like)) + 0.4 * self.normal(*batch, *p.shape) - 0.3)
            for p in self.kernel.parameters(self.d)
        }


def _close(left: Tensor, right: Tensor, relative: float, what: str) -> None:
    assert left.shape == right.shape, f"{what}: shapes {tuple(left.shape)} and {tuple(right.shape)} differ"
    scale = max(float(right.abs().max()) if right.numel() else 0.0, 1e-300)
    worst = float((left - right).abs().max()) / scale if left.numel() else 0.0
    assert worst <= relative, f"{what}: they differ by {worst:.1e} of the largest entry, allowed is {relative:.0e}"


def _is_a_covariance(case: _Case) -> None:
    x, params = case.normal(8, case.d), case.params()
    x[5] = x[2]
    k = case.kernel(x, None, params)
    _close(k, k.mT, 1e-13, "k(x, x) and its transpose")
    lowest = float(torch.linalg.eigvalsh(k)[0])
    assert lowest >= -1e-10 * float(k.diagonal().max()), f"k(x, x) has the eigenvalue {lowest:.1e}"
    _close(k.diagonal(), case.kernel.diagonal(x, params), 1e-14, "the diagonal of k(x, x) and diagonal(x)")
    _close(case.kernel(x, None, None), case.kernel(x, None, _initial(case, x)), 1e-15, "params=None and initial values")
    empty = case.kernel(x[:0], x, params)
    assert empty.shape == (0, 8), f"k of no rows with 8 rows has shape {tuple(empty.shape)}"


def _blocks_agree(case: _Case) -> None:
    x, z, params = case.normal(5, case.d), case.normal(4, case.d), case.params()
    whole = case.kernel(torch.cat([x, z]), None, params)
    _close(case.kernel(x, z, params), whole[:5, 5:], 1e-9, "k(x, z) and the block of k([x z], [x z])")
    _close(case.kernel(x, x.clone(), params), whole[:5, :5], 1e-7, "k(x, copy of x) and k(x, x)")


def _batches_equal_loops(case: _Case) -> None:
    for batch in _BATCHES:
        x, z, params = case.normal(*batch, 4, case.d), case.normal(*batch, 3, case.d), case.params(batch)
        shared = case.normal(4, case.d)
        k, k_xz, k_shared = case.kernel(x, None, params), case.kernel(x, z, params), case.kernel(shared, None, params)
        plain = case.params()
        k_plain, diagonal = case.kernel(x, None, plain), case.kernel.diagonal(x, params)
        for i in np.ndindex(*batch):
            own = {name: value[i] for name, value in params.items()}
            _close(k[i], case.kernel(x[i], None, own), 1e-12, f"batch {batch} of k(x, x) and a loop")
            _close(k_xz[i], case.kernel(x[i], z[i], own), 1e-12, f"batch {batch} of k(x, z) and a loop")
            _close(k_shared[i], case.kernel(shared, None, own), 1e-12, f"shared x with params {batch} and a loop")
            _close(k_plain[i], case.kernel(x[i], None, plain), 1e-12, f"x {batch} with shared params and a loop")
            _close(diagonal[i], case.kernel.diagonal(x[i], own), 1e-12, f"batch {batch} of diagonal(x) and a loop")


def _pullback_is_the_gradient(case: _Case) -> None:
    for batch, n in (((), 6), ((3,), 4), ((2, 3), 4), ((), 1), ((), 2), ((0,), 3)):
        x = case.normal(*batch, n, case.d)
        if n > 3:
            x[..., 3, :] = x[..., 1, :]
        for own in {batch, ()}:
            params = {name: value.requires_grad_() for name, value in case.params(own).items()}
            value, pullback = case.kernel.value_and_pullback(x, params)
            assert not value.requires_grad, "value_and_pullback must not record a graph"
            expected, reference = autograd_pullback(case.kernel, x, params)
            _close(value, expected, 1e-12, "the value of value_and_pullback and k(x, x)")
            p = case.normal(*batch, n, n)
            p = p + p.mT
            grads, wanted = pullback(p.clone()), reference(p.clone())
            assert grads.keys() == params.keys(), f"the pullback returned {sorted(grads)}, not {sorted(params)}"
            scale = max((float(g.abs().max()) for g in wanted.values() if g.numel()), default=1.0)
            for name, grad in grads.items():
                assert grad.shape == params[name].shape, f"gradient of {name} has shape {tuple(grad.shape)}"
                assert not grad.requires_grad, "the pullback must not record a graph"
                error = float((grad - wanted[name]).abs().max()) if grad.numel() else 0.0
                assert error <= 1e-10 * max(scale, 1e-300), (
                    f"the pullback onto {name} differs from autograd by {error:.1e}"
                )


def _gradients_are_right(case: _Case) -> None:
    params = case.params()
    names = list(params)

    def call(x: Tensor, z: Tensor | None, *values: Tensor) -> Tensor:
        return case.kernel(x, z, dict(zip(names, values, strict=True)))

    leaves = [case.normal(3, case.d), case.normal(2, case.d), *params.values()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-6), "gradients of k(x, z)"
    alone = [leaves[0], None, *leaves[2:]]
    assert torch.autograd.gradcheck(call, alone, eps=1e-6, atol=1e-6), "gradients of k(x, x)"
    x = case.normal(5, case.d)
    x[3], x[4] = x[1], 0.0
    x.requires_grad_()
    for z in (None, x.detach().clone()):
        value = case.kernel(x, z, params)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert bool(grad.isfinite().all()), "the gradient in x is not finite at duplicate rows or at the origin"


def _initial(case: _Case, like: Tensor) -> Params:
    return {p.name: p.initial_tensor(like) for p in case.kernel.parameters(case.d)}


def _dtype_and_device_follow(case: _Case) -> None:
    x, params = case.normal(5, case.d), case.params()
    k = case.kernel(x, None, params)
    assert k.device == x.device, f"x on {x.device} gave k on {k.device}"
    single = case.kernel(x.float(), None, {name: value.float() for name, value in params.items()})
    assert single.dtype == torch.float32, f"float32 inputs gave {single.dtype}"
    assert case.kernel(x.float()).dtype == torch.float32, "float32 inputs with params=None gave another dtype"
    _close(single.double(), k, 1e-4, "float32 and float64")


def _refused(error: type[BayesdlError], what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"{what} must raise {error.__name__}")


def _bad_input_is_refused(case: _Case) -> None:
    x, kernel = case.normal(4, case.d), case.kernel
    _refused(ShapeError, "x without a column axis", lambda: kernel(x[:, 0]))
    _refused(ShapeError, "z with another number of columns", lambda: kernel(x, case.normal(4, case.d + 1)))
    _refused(ShapeError, "x without columns", lambda: kernel(x[:, :0]))
    _refused(DtypeError, "integer x", lambda: kernel(x.long()))
    _refused(DtypeError, "x and z of different dtypes", lambda: kernel(x, x.float()))
    _refused(SettingError, "params without any name", lambda: kernel(x, None, {}))


def _functions_have_the_covariance(case: _Case) -> None:
    num, batch = 2000, (2,)
    x, params = case.normal(4, case.d), case.params(batch)
    functions = case.kernel.sample_functions(case.d, num, 64, params, case.generator)
    f = functions(x)
    assert f.shape == (num, *batch, 4), f"functions(x) has shape {tuple(f.shape)}, wanted {(num, *batch, 4)}"
    assert torch.equal(f, functions(x)), "a second call gave other functions"
    assert torch.allclose(f[..., 1:3], functions(x[1:3]), rtol=1e-9, atol=1e-9), "functions differ when x is cut"
    assert functions(x.expand(3, 1, 4, case.d)).shape == (num, 3, *batch, 4), "functions must follow the batch of x"
    products = f.unsqueeze(-1) * f.unsqueeze(-2)
    # Finite networks have covariances that are off by about depth / width: half a standard error is left for that.
    error = products.std(0) / num**0.5
    worst = float(((products.mean(0) - case.kernel(x, None, params)).abs() / (5.5 * error)).max())
    assert worst <= 1.0, f"the functions' covariance is {5.5 * worst:.1f} standard errors from the kernel"
    between = (f[:, 0] * f[:, 1]).mean(0).abs() / ((f[:, 0] * f[:, 1]).std(0) / num**0.5)
    assert float(between.max()) <= 5.0, "functions of different batch elements are correlated"


_CHECKS = (
    _is_a_covariance,
    _blocks_agree,
    _batches_equal_loops,
    _pullback_is_the_gradient,
    _gradients_are_right,
    _dtype_and_device_follow,
    _bad_input_is_refused,
    _functions_have_the_covariance,
)
