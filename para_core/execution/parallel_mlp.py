"""Blocks whose MLP stands beside attention (arXiv 2302.05442), as FLUX's single blocks: one layer gives queries, keys, values and
the MLP's features, another takes attention and the activated features together. Both layers are taken apart, so that the MLP
is computed while attention's messages travel to other ranks and back.

On one rank this gains nothing, hence it is done only in runs of several. Rewrites: see the module ``rewrites``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch.fx import Graph
from torch.fx import Node as AnyNode

from ..attention.wire import Compiled
from .rewrites import Node, called, erase, fits, is_tanh_gelu, join_dim, layer, only_use, operations, plain, quiet, value


class Mlp:
    """The MLP of such a block, for one call: ``Beside`` of its attention.

    x ``(B, S, C)``, up ``(F, C)``, down ``(E, features)``. Activated by GELU in its tanh form; ``gated``: by SiLU of the first half of
    what the first layer gives, times the second.
    """

    def __init__(
        self,
        x: torch.Tensor,
        up: torch.Tensor,
        up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        *,
        gated: bool,
    ):
        self._x, self._up, self._up_bias, self._gated = x, up, up_bias, gated
        self._down, self._down_bias = down, down_bias
        rows = 2.0 * x.shape[0] * x.shape[1]
        self.operations = rows * up.numel(), rows * down.numel()
        self._features: torch.Tensor | None = None
        self._part: torch.Tensor | None = None

    def there(self) -> None:
        """The first layer and the activation."""
        x, up, bias = self._x, self._up, self._up_bias
        if self._gated:
            both = F.linear(x, up, bias)
            self._features = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
            (compiled_gate() if x.is_cuda else gate)(both, self._features)
        elif bias is not None and fits(x, up, bias):
            self._features = torch._addmm_activation(bias, x.flatten(0, 1), up.t(), use_gelu=True).view(*x.shape[:2], -1)
        else:
            self._features = F.gelu(F.linear(x, up, bias), approximate="tanh")

    def back(self) -> None:
        """The second layer's part of its result, bias included."""
        assert self._features is not None
        self._part, self._features = F.linear(self._features, self._down, self._down_bias), None

    def plus(self, attended: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The whole result: attention ``(B, S, A)`` by its ``columns`` ``(E, A)`` of the second layer, and ``back``'s part."""
        if self._part is None:
            if self._features is None:
                self.there()
            self.back()
        assert self._part is not None
        self._part.flatten(0, 1).addmm_(attended.flatten(0, 1), columns.t())  # the sum costs no kernel of its own
        return self._part


def gate(both: torch.Tensor, into: torch.Tensor) -> None:
    """Write SiLU of the first half of ``both`` ``(..., 2 * F)`` times the second ``into`` ``(..., F)``."""
    first, second = both.chunk(2, dim=-1)
    into.copy_(F.silu(first) * second)


@lru_cache(maxsize=1)
def compiled_gate() -> Compiled:
    """``gate`` as one kernel."""
    return Compiled(gate)


@dataclass(frozen=True)
class Block:
    """The nodes of such a block: its first layer, what that gives as it is split, the MLP's part of that, and attention."""

    first: Node
    split: Node
    features: Node
    gated: bool
    attention: Node
    attention_first: bool


def compute_mlp_beside_attention(graph: Graph) -> int:
    """``h, m = split(linear(x)); linear(cat(attention(f(h)), act(m)))`` -> ``attention_and_mlp(f(linear(x)), x)``."""
    count = 0
    for node in operations(graph):
        block = find(node)
        if block is None:
            continue
        (x, weight, bias), (_, down, down_bias) = layer(block.first), layer(node)
        for user in [user for user in block.split.users if user is not block.features]:
            with graph.inserting_before(block.split):
                own = graph.call_function(F.linear, (x, *rows(graph, weight, bias, place(block.split, user))))
            user.replace_all_uses_with(own)
            erase(graph, user)
        with graph.inserting_before(node):
            up = rows(graph, weight, bias, place(block.split, block.features))
            given = (*block.attention.args, x, *up, block.gated, down, down_bias, block.attention_first)
            node.replace_all_uses_with(graph.call_function(torch.ops.paradit.attention_and_mlp, given))
        erase(graph, node)
        count += 1
    return count


def find(node: Node) -> Block | None:
    """The block whose second layer ``node`` calls; None where anything is otherwise than expected."""
    joined = taken_by(node, F.linear)
    if not called(joined, torch.cat) or not only_use(joined) or len(joined.args) != 2 or len(joined.args[0]) != 2:
        return None
    orders = [(attended(one), activation(other), one is joined.args[0][0]) for one, other in permutations(joined.args[0])]
    attention, activated, attention_first = max(orders, key=lambda order: order[0] is not None)
    gated, features = activated or (False, None)
    split = taken_by(features, operator.getitem)
    first = taken_by(split, torch.split)
    if attention is None or not called(first, F.linear) or not only_use(first) or not quiet(first, node):
        return None
    tensors = [value(each) for each in (*layer(first), *joined.args[0], *layer(node)[1:]) if each is not None]
    last = plain(*tensors) and join_dim(joined) == 2 and is_cut(split)
    return Block(first, split, features, gated, attention, attention_first) if last else None


def attended(node: Node) -> Node:
    """The attention operation whose output ``(B, H, S, D)`` ``node`` is as ``(B, S, H * D)``, or None."""
    turned = method_of(node, "flatten", 2)
    attention = method_of(turned, "transpose", 1, 2)
    known = torch.ops.paradit.attention
    fine = attention is not None and attention.target in (known, known.default) and not attention.kwargs
    return attention if fine and all(map(only_use, (node, turned, attention))) else None


def activation(node: Node) -> tuple[bool, Node] | None:
    """Whether the activation of ``Mlp`` that ``node`` is is gated, and of what it is, if nothing else uses that."""
    if is_tanh_gelu(node):
        found: Node = (False, node.args[0])
    elif called(node, operator.mul):
        silu, gated = node.args
        gate = taken_by(silu, F.silu)
        both = taken_by(gate, operator.getitem)
        whole = method_of(both, "chunk", 2)
        fine = whole is not None and both is taken_by(gated, operator.getitem) and [gate.args[1], gated.args[1]] == [0, 1]
        found = (True, whole) if fine and all(map(only_use, (silu, gate, gated))) else None
    else:
        found = None
    return found if found is not None and only_use(node) and only_use(found[1]) else None


def is_cut(split: Node) -> bool:
    """Whether it is ``split(x, [a, b, ...], -1)``, of which parts are taken one by one."""
    sizes, dim = split.args[1] if len(split.args) > 1 else None, split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    listed = isinstance(sizes, (list, tuple)) and all(type(size) is int for size in sizes)
    taken = all(called(user, operator.getitem) and type(user.args[1]) is int for user in split.users)
    return listed and taken and dim in (-1, value(split.args[0]).ndim - 1)


def place(split: Node, item: Node) -> tuple[int, int]:
    """Where ``item`` begins in what is split, and how long it is."""
    sizes, index = split.args[1], item.args[1]
    return sum(sizes[:index]), sizes[index]


def rows(graph: Graph, weight: Node, bias: Node, span: tuple[int, int]) -> list[Node]:
    """Rows of a layer's weight, and of its bias if it has one: where they begin, and how many."""
    return [None if each is None else graph.call_function(torch.narrow, (each, 0, *span)) for each in (weight, bias)]


def taken_by(node: Node, function: Callable) -> Node:
    """What ``node`` gives ``function`` first; None where it does not call it."""
    return node.args[0] if called(node, function) and node.args else None


def method_of(node: Node, name: str, *arguments: int) -> Node:
    """Whose method of this name ``node`` calls, with these arguments; None where it does not."""
    calls = isinstance(node, AnyNode) and node.op == "call_method" and node.target == name and tuple(node.args[1:]) == arguments
    return node.args[0] if calls else None
