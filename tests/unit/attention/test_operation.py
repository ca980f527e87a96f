"""The exchange as one opaque operation for compiled code."""

from __future__ import annotations

import gc
import importlib

import pytest
import torch
import torch.nn.functional as F
from unit.fake_comm import fake_meshes, on_ranks

from para_core.attention import exchange as module
from para_core.attention.choice import Chooser
from para_core.attention.exchange import Exchange, attend
from para_core.sequence.layout import Joint, balanced

D = 8
KERNEL = Chooser("pytorch").shared_kernel()


def alone(rows: int = 5) -> Exchange:
    joint = Joint(((rows,),))
    return Exchange(fake_meshes(1, 1)[0], joint, joint, KERNEL)


def test_the_operation_declares_what_it_returns():
    exchange = alone()
    q = torch.randn(2, 3, 5, D)
    torch.library.opcheck(torch.ops.paradit.attention.default, (q, q, q, torch.zeros(5, 5), 0.5, exchange.handle))
    torch.library.opcheck(torch.ops.paradit.attention.default, (q, q, q, None, None, exchange.handle))


@pytest.mark.parametrize("degrees", [(1, 2), (2, 1), (2, 2)])
def test_the_operation_exchanges_as_the_eager_function_does(degrees):
    ranks = degrees[0] * degrees[1]
    joint = Joint((balanced(4 * ranks + 1, ranks),))
    meshes = fake_meshes(*degrees)
    q = torch.randn(2, 3, joint.total, D)
    starts = [sum(joint.rows[:rank]) for rank in range(ranks)]

    def work(rank):
        exchange = Exchange(meshes[rank], joint, joint, KERNEL)
        local = q[:, :, starts[rank] : starts[rank] + joint.rows[rank]]
        eager = attend(exchange, local, local, local)
        out = torch.ops.paradit.attention(local, local, local, None, None, exchange.handle)
        assert torch.equal(out, eager) and out.transpose(1, 2).is_contiguous()
        return out

    torch.testing.assert_close(torch.cat(on_ranks(ranks, work), 2), F.scaled_dot_product_attention(q, q, q))


def test_compiled_code_holds_the_operation_and_no_graph_break():
    exchange = alone()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def block(x):
        q = (2 * x).unflatten(-1, (3, D)).transpose(1, 2)
        return attend(exchange, q, q, q).transpose(1, 2).flatten(2) + 1

    x = torch.randn(2, 5, 3 * D)
    q = (2 * x).unflatten(-1, (3, D)).transpose(1, 2)
    torch.testing.assert_close(block(x), F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2) + 1)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1 and targets.count("paradit.attention") == 1 and not any("scaled_dot" in target for target in targets)


def test_compiled_code_refuses_a_kernel_of_its_own():
    exchange, other = alone(), Chooser("pytorch").shared_kernel()

    @torch.compile(backend="eager", fullgraph=True)
    def block(q):
        return attend(exchange, q, q, q, kernel=other)

    with pytest.raises(Exception, match="exchange's own kernel"):
        block(torch.randn(1, 1, 5, D))


def test_handles_are_freed_with_their_exchange_and_used_again():
    gc.collect()
    first, second = alone(), alone()
    low, high = first.handle, second.handle
    assert low == first.handle and low < high
    del first
    gc.collect()
    third = alone()
    assert third.handle == low


def test_an_operation_on_a_finished_run_says_so():
    exchange = alone()
    handle = exchange.handle
    del exchange
    gc.collect()
    q = torch.randn(1, 1, 5, D)
    with pytest.raises(RuntimeError, match="has ended"):
        torch.ops.paradit.attention(q, q, q, None, None, handle)


def test_the_module_can_be_loaded_again():
    """ComfyUI loads packs under names of its own; a second load registers the operation again."""
    again = importlib.reload(module)
    q = torch.randn(1, 1, 5, D)
    joint = Joint(((5,),))
    exchange = again.Exchange(fake_meshes(1, 1)[0], joint, joint, KERNEL)
    out = torch.ops.paradit.attention(q, q, q, None, None, exchange.handle)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q))
