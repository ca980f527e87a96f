"""Attention as one opaque operation for compiled code."""

from __future__ import annotations

import gc
import importlib

import pytest
import torch
import torch.nn.functional as F

from para_core.execution import operation

D = 8


class Attend:
    """Attention of a run without ranks."""

    def compute(self, q, k, v, mask, scale, *, place, low_precision, beside=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def test_the_operation_declares_what_it_returns():
    attend, q = Attend(), torch.randn(2, 3, 5, D)
    run = operation.number(attend)
    torch.library.opcheck(torch.ops.paradit.attention.default, (q, q, q, torch.zeros(5, 5), 0.5, run, 0, True))
    torch.library.opcheck(torch.ops.paradit.attention.default, (q, q, q, None, None, run, None, False))
    assert torch.ops.paradit.attention(q, q, q, None, None, run, 0, True).transpose(1, 2).is_contiguous()


def test_compiled_code_holds_the_operation_and_no_graph_break():
    attend, graphs = Attend(), []
    run = operation.number(attend)

    def keep(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def block(x):
        q = (2 * x).unflatten(-1, (3, D)).transpose(1, 2)
        return torch.ops.paradit.attention(q, q, q, None, None, run, 0, True).transpose(1, 2).flatten(2) + 1

    x = torch.randn(2, 5, 3 * D)
    q = (2 * x).unflatten(-1, (3, D)).transpose(1, 2)
    torch.testing.assert_close(block(x), F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2) + 1)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1 and targets.count("paradit.attention") == 1 and not any("scaled_dot" in target for target in targets)


def test_numbers_are_freed_with_their_run_and_used_again():
    gc.collect()
    first, second = Attend(), Attend()
    low, high = operation.number(first), operation.number(second)
    assert low < high
    del first
    gc.collect()
    third = Attend()
    assert operation.number(third) == low


def test_an_operation_on_a_finished_run_says_so():
    attend, q = Attend(), torch.randn(1, 1, 5, D)
    run = operation.number(attend)
    del attend
    gc.collect()
    with pytest.raises(RuntimeError, match="has ended"):
        torch.ops.paradit.attention(q, q, q, None, None, run, 0, True)


def test_the_module_can_be_loaded_again():
    """ComfyUI loads packs under names of its own; a second load registers the operation again."""
    torch._dynamo.reset()  # compiled code may hold what the first load has registered
    again = importlib.reload(operation)
    attend, q = Attend(), torch.randn(1, 1, 5, D)
    run = again.number(attend)
    for _ in range(2):
        out = torch.ops.paradit.attention(q, q, q, None, None, run, 0, True)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))
        gc.collect()  # takes along what the first load has registered, and not in the middle of a later test
