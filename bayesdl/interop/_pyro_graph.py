"""Recording: a function of one tensor as the plain sequence of tensor operations that it carries out.

A Pyro model spends most of its time in Python: handlers, distributions, checks. Recorded once for a shape of the
positions, together with its backward pass, only the arithmetic remains. Whatever depends on the positions through
Python rather than through tensors cannot be recorded and raises.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# What hands its first argument on as it is.
_SAME = {aten.detach.default, aten.alias.default}
# What has the same value wherever its argument has the same shape.
_FILLED = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
_FILLED |= {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
# What does nothing where the result is of the shape and dtype of the first argument.
_SHAPING = {aten.expand.default, aten.view.default, aten._to_copy.default, aten._unsafe_view.default}
_SHAPING |= {aten.reshape.default, aten.slice.Tensor}
# What does nothing with this second argument.
_NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
_NEUTRAL |= {aten.pow.Tensor_Scalar: 1, aten.mul.Scalar: 1, aten.add.Scalar: 0}


def record(function: Callable[[Tensor], Any], example: Tensor) -> fx.GraphModule:
    """`function` as a graph that computes the same at other values of the shape, dtype and device of `example`.

    Arithmetic in float32 is lifted to the dtype of `example` where that is wider, constants as they are rounded.

    Raises:
        Exception: Whatever the recording of a function that branches on values raises.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(example)
    drawn = [
        node for node in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    if drawn:
        raise RuntimeError(f"{drawn[0]} draws random numbers")
    if example.dtype == torch.float64:
        _widen(graph)
    _Kinds(graph).run(example)
    _simplify(graph)
    graph.recompile()
    return graph


class _Kind(NamedTuple):
    """What is known of a value without looking at its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Kinds(fx.Interpreter):
    """Notes the kind of every value of a graph, by running it once."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta = {"kind": _Kind(result.shape, result.dtype, result.device)} if isinstance(result, Tensor) else {}
        return result


def _widen(module: fx.GraphModule) -> None:
    """float64 for float32, in constants and where an operation names its dtype."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(module)
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                delattr(module, node.target)
                module.register_buffer(node.target, value.detach().double())
        elif node.op == "call_function":
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _wide)
    module.recompile()


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def _simplify(module: fx.GraphModule) -> None:
    """Drop what does nothing, compute once what does not depend on the input, and what is computed twice."""
    graph = module.graph
    _out_of_place(graph)
    _skip(graph)
    _fold(module)
    _share(graph)
    _skip(graph)
    graph.eliminate_dead_code()


def _out_of_place(graph: fx.Graph) -> None:
    """Operations that write over a fresh value which nobody else reads, as operations that make a new one."""
    for node in graph.nodes:
        schema = _schema(node) if node.op == "call_function" else None
        if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        first, name = node.args[0], schema.name.removeprefix("aten::")
        source = _schema(first) if first.op == "call_function" else None
        fresh = source is not None and not source.is_mutable and all(r.alias_info is None for r in source.returns)
        packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
        if fresh and list(first.users) == [node] and packet is not None:
            plain = getattr(packet, node.target._overloadname, None)
            node.target = node.target if plain is None else plain


def _skip(graph: fx.Graph) -> None:
    written = _written(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in written:
            continue
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if first is None or first in written:
            continue
        neutral = node.target in _NEUTRAL and len(node.args) == 2 and not node.kwargs
        idle = (neutral and _is_number(node.args[1], _NEUTRAL[node.target])) or node.target in _SHAPING
        if node.target in _SAME or (idle and _alike(node, first)):
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_number(argument: Any, value: int) -> bool:
    return isinstance(argument, (int, float)) and argument == value


def _alike(node: fx.Node, other: fx.Node) -> bool:
    return node.meta.get("kind") is not None and node.meta.get("kind") == other.meta.get("kind")


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values some operation changes in place, and all that these come from: they are left as they are."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and _schema(node) is not None and _schema(node).is_mutable:
            todo = [node]
            while todo:
                current = todo.pop()
                if current not in found:
                    found.add(current)
                    todo += current.all_input_nodes
    return found


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _fold(module: fx.GraphModule) -> None:
    """Replace what does not depend on the input by its value."""
    graph, written = module.graph, _written(module.graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function" and node not in written:
            if node.target in _FILLED and (made := _filled(node)) is not None:
                values[node] = made
            elif all(source in values for source in node.all_input_nodes) and _is_pure(node):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    for number, (node, value) in enumerate(list(values.items())):
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(user in values for user in node.users):
            continue
        name = f"_folded_{number}"
        module.register_buffer(name, value.detach())
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    graph.eliminate_dead_code()


def _filled(node: fx.Node) -> Tensor | None:
    like = node.meta.get("kind")
    if like is None:
        return None
    if node.target in (aten.full_like.default, aten.new_full.default):
        fill = node.args[-1]
        if not isinstance(fill, (int, float)):
            return None
    else:
        fill = 0 if node.target in (aten.zeros_like.default, aten.new_zeros.default) else 1
    return torch.full(like.shape, fill, dtype=like.dtype, device=like.device)


def _is_pure(node: fx.Node) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and (_schema(node) is not None or node.target is operator.getitem)


def _share(graph: fx.Graph) -> None:
    """Compute the same once."""
    written, seen = _written(graph), {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node in written or not _is_pure(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
