r"""Slopes of functions that were drawn from a posterior.

    g_s(x) = df_s(x) / dx,        f_s the s-th function of posterior.functions(num)

All functions are differentiated at once, one pass for each column of x: by forward mode (`torch.func.jvp`), or where a
function has none by reverse mode, twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayesdl import _checks
from bayesdl.errors import SettingError, fail
from bayesdl.posterior.base import Functions


def function_gradients(functions: Functions, x: Tensor) -> Tensor:
    """Gradients in x of drawn functions: of a Gaussian process, of the members of a network posterior, of any other.

        g = function_gradients(posterior.functions(100), x)      # 100 draws of the gradient at each row of x

    Args:
        functions: What `posterior.functions(num)` returned: x -> (num, ..., s), or (num, ..., s, k). A function's value
            at a row must depend on that row alone, which holds for every posterior here.
        x: (..., s, d), in the dtype of the posterior.

    Returns:
        (num, ..., s, d), or (num, ..., s, k, d); differentiable in x, but for a PFN whose queries are tokens.

    Raises:
        DtypeError, DataError: x is no floating tensor, or not finite.
        SettingError: x requires a gradient, and the functions pass a layer norm, as those of such a PFN do.

    Cost: d evaluations with their derivatives.
    """
    x = _checks.as_tensor("function_gradients", "x", x)
    _checks.inputs("function_gradients", "x", x)
    _checks.finite("function_gradients", "x", x)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has neither a forward mode nor second derivatives
        if x.requires_grad:
            _refuse_layer_norm(functions(x))
        try:
            return torch.stack([_along(functions, x, column) for column in range(x.shape[-1])], -1)
        except (NotImplementedError, RuntimeError):  # a function of its own in the graph that has no forward mode
            return _by_reverse_mode(functions, x)


def _refuse_layer_norm(values: Tensor) -> None:
    """Torch's derivatives of the forward mode of a layer norm are wrong: they hold its statistics fixed."""
    nodes, seen = [values.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if "LayerNorm" in node.name():
            wanted = "slopes of functions that pass a layer norm, as those of a PFN, cannot be differentiated again."
            fail(SettingError, "function_gradients", wanted, got="x that requires a gradient", fix="pass x.detach()")
        seen.add(node)
        nodes.extend(parent for parent, _ in node.next_functions)


def _along(functions: Functions, x: Tensor, column: int) -> Tensor:
    """All rows moved along one column at once: each value follows its own row."""
    tangent = torch.zeros_like(x)
    tangent[..., column] = 1.0
    return torch.func.jvp(functions, (x,), (tangent,))[1]


def _by_reverse_mode(functions: Functions, x: Tensor) -> Tensor:
    """g = J' u is linear in u, and its derivative in u along each column is J, for all functions at once."""
    at = x if x.requires_grad else x.detach().requires_grad_()
    with torch.enable_grad():
        values = functions(at)
        u = torch.zeros_like(values, requires_grad=True)
        (g,) = torch.autograd.grad(values, at, u, create_graph=True)
        columns = [
            torch.autograd.grad(g[..., column].sum(), u, retain_graph=True, create_graph=x.requires_grad)[0]
            for column in range(x.shape[-1])
        ]
    return torch.stack(columns, -1)
