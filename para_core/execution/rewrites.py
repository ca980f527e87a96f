"""Rewrites of a block's graph that the compiler does not make itself: the same mathematics with less traffic of memory.

Each takes the graph as traced, where layers are still calls of ``linear`` and ``gelu``, and returns how often it applied. What
does not look exactly as expected stays as it is. Results are rounded at other places, as by compiling itself.

- ``rotate_before_joining``: where streams (text and image) are joined and then rotated, each is rotated first. With its norm
  it is then read and written once, straight to its place in memory ``(B, S, H, D)``, which attention takes as it is.
- ``activate_in_linear``: GELU (its tanh form) ends the matrix kernel before it, which cuBLASLt has ready.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule
from torch.fx import Node as AnyNode
from torch.fx.experimental.symbolic_shapes import statically_known_true

Node = Any
"""A ``torch.fx.Node``, whose arguments torch types as a union of everything."""

ROTATIONS = {
    "apply_rope": "apply_rope1",
    "apply_rope1": "apply_rope1",
    "apply_rope_split_half": "apply_rope_split_half1",
    "apply_rope_split_half1": "apply_rope_split_half1",
}
"""Operation of comfy-kitchen on one or two tensors and a table -> the one on one tensor."""
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
"""Operators of Python that write into a tensor."""


def rewrite(module: GraphModule) -> dict[str, int]:
    """Apply every rewrite to ``module`` in place. Returns how often each applied."""
    done = {each.__name__: each(module.graph) for each in (rotate_before_joining, activate_in_linear)}
    if any(done.values()):
        module.recompile()
    return done


def rotate_before_joining(graph: Graph) -> int:
    """``rotate(cat(streams), table)`` -> ``cat(rotate(stream, its rows of table), ...)``."""
    count = 0
    for node in operations(graph):
        name = rotation(node)
        if name is None or node.kwargs:
            continue
        *joined, table = node.args
        if not all(is_join_of_tokens(tokens, table) and quiet(tokens, node) for tokens in joined):
            continue
        rotate = getattr(torch.ops.comfy_kitchen, ROTATIONS[name]).default
        with graph.inserting_before(node):
            rotated = [rotated_streams(graph, rotate, tokens, table) for tokens in joined]
        for user in [node] if ROTATIONS[name] == name else list(node.users):
            user.replace_all_uses_with(rotated[user.args[1] if user is not node else 0])
            erase(graph, user)
        count += 1
    return count


def rotation(node: Node) -> str | None:
    """The name of the rotary operation that ``node`` calls, if it is one that can be taken apart."""
    if not str(node.target).startswith("comfy_kitchen."):
        return None
    name = str(node.target).split(".")[1]
    whole = ROTATIONS.get(name) == name or all(called(user, operator.getitem) for user in node.users)
    return name if name in ROTATIONS and whole else None


def is_join_of_tokens(node: Node, table: Node) -> bool:
    """Whether ``node`` joins tokens, its dim 1 or 2 of four, of which ``table`` ``(..., D / 2, 2, 2)`` has as many."""
    if not called(node, torch.cat) or value(node) is None or value(table) is None:
        return False
    dim, shape, rows = join_dim(node), value(node).shape, value(table).shape
    return len(shape) == 4 and dim in (1, 2) and len(rows) == 6 and statically_known_true(rows[dim] == shape[dim])


def rotated_streams(graph: Graph, rotate: Callable, joined: Node, table: Node) -> Node:
    dim = join_dim(joined)
    start: Node = 0
    rotated = []
    for part in joined.args[0]:
        length = graph.call_method("size", (part, dim))
        own = graph.call_function(torch.narrow, (table, dim, start, length))
        start = graph.call_function(operator.add, (start, length))
        rotated.append(graph.call_function(rotate, (part, own)))
    if dim == 1:
        return graph.call_function(torch.cat, (rotated, 1))
    rows_first = [graph.call_method("transpose", (part, 1, 2)) for part in rotated]
    return graph.call_method("transpose", (graph.call_function(torch.cat, (rows_first, 1)), 1, 2))


def activate_in_linear(graph: Graph) -> int:
    """``gelu(linear(x))`` -> one kernel."""
    count = 0
    for node in operations(graph):
        before = layer_of(node.args[0]) if is_tanh_gelu(node) else None
        if before is None or not only_use(node.args[0]) or not quiet(node.args[0], node):
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(linear_gelu(graph, *before))
        erase(graph, node)
        count += 1
    return count


def linear_gelu(graph: Graph, x: Node, weight: Node, bias: Node) -> Node:
    """GELU, tanh form, of a linear layer. x ``(..., D)``, weight ``(E, D)``, bias ``(E,)`` -> ``(..., E)``."""
    rows, transposed = graph.call_method("flatten", (x, 0, -2)), graph.call_method("t", (weight,))
    flat = graph.call_function(torch._addmm_activation, (bias, rows, transposed), {"use_gelu": True})
    return graph.call_method("reshape", (flat, *(graph.call_method("size", (x, dim)) for dim in range(value(x).ndim - 1)), -1))


def layer_of(node: Node) -> tuple[Node, Node, Node] | None:
    """x, weight and bias of the linear layer that ``node`` calls, if a matrix kernel of the library computes it."""
    found = layer(node) if called(node, F.linear) else None
    return found if found is not None and found[2] is not None and fits(*map(value, found)) else None


def layer(node: Node) -> tuple[Node, Node, Node | None]:
    """x, weight and bias of the linear layer that ``node`` calls."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return given["input"], given["weight"], given.get("bias")


def fits(*tensors: Any) -> bool:
    """Whether they are plain tensors of half precision on an NVIDIA card."""
    return (
        torch.version.hip is None
        and plain(*tensors)
        and tensors[0].dtype in (torch.bfloat16, torch.float16)
        and all(tensor.device.type == "cuda" for tensor in tensors)
    )


def plain(*tensors: Any) -> bool:
    """Whether they are tensors of one dtype without behaviour of their own: quantised ones bring kernels."""
    kinds = torch.Tensor, torch.nn.Parameter, FakeTensor
    return all(type(tensor) in kinds and tensor.dtype == tensors[0].dtype for tensor in tensors)


def is_tanh_gelu(node: Node) -> bool:
    return called(node, F.gelu) and len(node.args) == 1 and node.kwargs.get("approximate") == "tanh"


def join_dim(node: Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim % value(node).ndim


def called(node: Node, function: Callable) -> bool:
    return isinstance(node, AnyNode) and node.op == "call_function" and node.target is function


def value(node: Node) -> Any:
    """What the tracer saw there: a tensor without data. None where it does not tell."""
    return node.meta.get("example_value")


def only_use(node: Node) -> bool:
    return len(node.users) == 1


def operations(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def quiet(first: Node, last: Node) -> bool:
    """Whether nothing between the two may write into a tensor: what was computed at ``first`` may as well be at ``last``."""
    node = first.next
    while node is not last:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        schema = getattr(node.target, "_schema", None)
        if name.endswith("_") or name in IN_PLACE or node.kwargs.get("inplace") or schema is not None and schema.is_mutable:
            return False
        node = node.next
    return True


def erase(graph: Graph, node: Node) -> None:
    """Remove a node that has been replaced, and then what only it used, which has been replaced with it.

    torch's own removal of dead code would also take methods that write in place.
    """
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        if not each.users:
            erase(graph, each)
