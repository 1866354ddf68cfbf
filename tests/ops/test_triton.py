"""The Triton kernel in Triton's interpreter, in a process of its own: the dense matrix as judge."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from bayesdl import kernels as k
from bayesdl.kernels.tiles import tiles_of
from bayesdl.ops import kernel_operator

CODE = """
    import json, torch
    from bayesdl import kernels as k
    from bayesdl.kernels.tiles import tiles_of
    from bayesdl.ops import _triton, kernel_operator

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(70, 3, generator=g, dtype=torch.float64)
    x[67] = x[3]
    v = torch.randn(70, 19, generator=g, dtype=torch.float64)
    kernels = {
        "rbf": k.RBF(lengthscale=0.8),
        "matern 1/2": k.Matern(nu=0.5, lengthscale=0.7),
        "matern 3/2": k.Matern(nu=1.5, lengthscale=(0.7, 0.3, 2.0)),
        "scaled matern 5/2": k.Scale(k.Matern(nu=2.5, lengthscale=0.7), outputscale=1.7),
        "nngp": k.NNGP(depth=2, b_std=0.7),
        "nngp, one layer": k.NNGP(depth=1, w_std=1.1, b_std=0.2, active_dims=(0, 2)),
    }
    found = {}
    for name, kernel in kernels.items():
        params = {p.name: p.initial_tensor(x) for p in kernel.parameters(3)}
        operator = kernel_operator(tiles_of(kernel, params), x, torch.tensor(0.0), dtype=torch.float32)
        product, dense = operator.kernel(v), kernel(x, None, params) @ v
        error = float((product - dense).abs().max() / dense.abs().max())
        found[name] = [_triton.usable(operator.left[0]), str(product.dtype), error]
    print(json.dumps(found))
"""


def test_products_are_those_of_the_dense_matrix():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton runs this test in its interpreter")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE)], capture_output=True, text=True, env=environment, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for name, (usable, dtype, error) in found.items():
        assert usable, name
        assert dtype == "torch.float64", name
        # Matern 1/2 magnifies the float32 rounding of the two rows that coincide: its root is about 1e-3
        assert error <= (2e-3 if name == "matern 1/2" else 5e-6), name


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [k.RBF(lengthscale=0.8), k.Matern(nu=2.5), k.NNGP(depth=2)])
def test_a_gpu_gives_what_a_cpu_gives(kernel):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(700, 3, generator=g, dtype=torch.float64)
    v = torch.randn(700, 5, generator=g, dtype=torch.float64)
    products = []
    for device in ("cpu", "cuda"):
        inputs = x.to(device)
        params = {p.name: p.initial_tensor(inputs) for p in kernel.parameters(3)}
        noise = torch.tensor(0.1, dtype=torch.float64, device=device)
        for dtype in (torch.float64, torch.float32):
            operator = kernel_operator(tiles_of(kernel, params), inputs, noise, dtype=dtype)
            products.append(operator(v.to(device)).cpu())
    for other in products[1:]:
        torch.testing.assert_close(other, products[0], rtol=1e-4, atol=1e-4)


def test_without_a_gpu_tiles_are_used():
    from bayesdl.ops import _triton

    assert not _triton.usable(torch.zeros(3, 4, dtype=torch.float64))
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert not _triton.usable(torch.zeros(3, 4))
