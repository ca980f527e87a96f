"""Rewrites of a block's graph that the compiler does not make itself: the same mathematics with less traffic of memory.

Each takes the graph as traced, where layers are still calls of ``linear`` and ``gelu``, and returns how often it applied. What
does not look exactly as expected stays as it is. Results are rounded at other places, as by compiling itself.

- ``rotate_before_joining``: where streams (text and image) are joined and then rotated, each is rotated first. With its norm
  it is then read and written once, straight to its place in memory ``(B, S, H, D)``, which attention takes as it is.
- ``add_instead_of_joining``: a linear layer over [attention, GELU of the same layer that gave q, k and v], as FLUX's single
  blocks have it, is the sum of two, so that GELU can end a matrix kernel and nothing is put side by side.
- ``activate_in_linear``: GELU (its tanh form) ends the matrix kernel before it, which cuBLASLt has ready.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
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
    done = {each.__name__: each(module.graph) for each in (rotate_before_joining, add_instead_of_joining, activate_in_linear)}
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
    if not called(node, torch.cat):
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


def add_instead_of_joining(graph: Graph) -> int:
    """``h, m = split(linear(x)); linear(cat(f(h), gelu(m)))`` -> ``linear(f(linear(x))) + gelu(linear(x)) @ weight``."""
    count = 0
    for node in operations(graph):
        found = parallel_mlp(node)
        if found is None:
            continue
        gelu, other, (x, *weights), sizes = found
        item, (joined, weight, bias) = gelu.args[0], layer(node)
        split = item.args[0]
        with graph.inserting_before(split):
            parts = list(zip(*(slices(graph, each, 0, sizes) for each in weights), strict=True))
            mlp = linear_gelu(graph, x, *parts[item.args[1]])
        for user in [user for user in split.users if user is not item]:
            with graph.inserting_before(user):
                user.replace_all_uses_with(graph.call_function(F.linear, (x, *parts[user.args[1]])))
            erase(graph, user)
        with graph.inserting_before(node):
            columns = dict(zip(joined.args[0], slices(graph, weight, 1, [value(part).shape[-1] for part in joined.args[0]]), strict=True))
            part = graph.call_function(F.linear, (other, columns[other], bias))
            total = graph.call_function(torch.addmm, (rows(graph, part), rows(graph, mlp), graph.call_method("t", (columns[gelu],))))
            node.replace_all_uses_with(graph.call_method("view_as", (total, part)))
        erase(graph, node)
        count += 1
    return count


def parallel_mlp(node: Node) -> tuple[Node, Node, tuple[Node, Node, Node], list[int]] | None:
    """Where ``node`` is a linear layer over a GELU and something else: both, the layer before them, and its sizes."""
    after = layer_of(node)
    joined: Node = after and after[0]
    if not called(joined, torch.cat) or not only_use(joined) or not quiet(joined, node) or join_dim(joined) != value(joined).ndim - 1:
        return None
    activated = list(filter(is_tanh_gelu, joined.args[0]))
    others = [part for part in joined.args[0] if part not in activated]
    if len(activated) != 1 or len(others) != 1:
        return None
    item = activated[0].args[0]
    split: Node = item.args[0] if called(item, operator.getitem) else None
    sizes = split_sizes(split)
    before = layer_of(split.args[0]) if sizes is not None else None
    if sizes is None or before is None or not quiet(split.args[0], split):
        return None
    return (activated[0], others[0], before, sizes) if all(map(only_use, (activated[0], item, split.args[0]))) else None


def slices(graph: Graph, tensor: Node, dim: int, sizes: Sequence[int]) -> list[Node]:
    """``tensor`` cut along ``dim``."""
    starts = accumulate(sizes, initial=0)
    return [graph.call_function(torch.narrow, (tensor, dim, start, size)) for start, size in zip(starts, sizes, strict=False)]


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
    transposed = graph.call_method("t", (weight,))
    flat = graph.call_function(torch._addmm_activation, (bias, rows(graph, x), transposed), {"use_gelu": True})
    return graph.call_method("reshape", (flat, *(graph.call_method("size", (x, dim)) for dim in range(value(x).ndim - 1)), -1))


def rows(graph: Graph, x: Node) -> Node:
    """``(..., D)`` -> ``(rows, D)``."""
    return graph.call_method("flatten", (x, 0, -2))


def layer_of(node: Node) -> tuple[Node, Node, Node] | None:
    """x, weight and bias of the linear layer that ``node`` calls, if a matrix kernel of the library computes it."""
    found = layer(node) if called(node, F.linear) else None
    return found if found is not None and found[2] is not None and fits(*map(value, found)) else None


def layer(node: Node) -> tuple[Node, Node, Node]:
    """x, weight and bias (None where there is none) of the linear layer that ``node`` calls."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return given["input"], given["weight"], given.get("bias")


def fits(*tensors: Any) -> bool:
    """Whether they are plain tensors of half precision on an NVIDIA card: quantised ones bring kernels of their own."""
    return torch.version.hip is None and all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor)
        and tensor.device.type == "cuda"
        and tensor.dtype == tensors[0].dtype
        and tensor.dtype in (torch.bfloat16, torch.float16)
        for tensor in tensors
    )


def is_tanh_gelu(node: Node) -> bool:
    return called(node, F.gelu) and len(node.args) == 1 and node.kwargs.get("approximate") == "tanh"


def split_sizes(node: Node) -> list[int] | None:
    """The sizes of ``split(x, [a, b, ...], -1)`` whose parts are taken one by one."""
    if not called(node, torch.split) or not all(called(user, operator.getitem) for user in node.users):
        return None
    given = dict(zip(("tensor", "split_size_or_sections", "dim"), node.args, strict=False)) | node.kwargs
    sizes, dim = given["split_size_or_sections"], given.get("dim", 0)
    listed = isinstance(sizes, (list, tuple)) and all(type(size) is int for size in sizes)
    return list(sizes) if listed and dim in (-1, value(given["tensor"]).ndim - 1) else None


def join_dim(node: Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim % value(node).ndim


def called(node: Node, function: Callable) -> bool:
    return isinstance(node, AnyNode) and node.op == "call_function" and node.target is function


def value(node: Node) -> Any:
    """What the tracer saw there: a tensor without data."""
    return node.meta["example_value"]


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
    """Remove ``node`` if nothing uses it, and then likewise what only it used. Nothing else: methods may write in place."""
    replaced = (F.linear, F.gelu, torch.cat, torch.split, operator.getitem)
    if node.users or node.op != "call_function" or node.target not in replaced and rotation(node) is None:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        erase(graph, each)
