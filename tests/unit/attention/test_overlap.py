"""What is computed while messages travel: parts of the heads, and what stands beside attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.fake_comm import fake_meshes
from unit.shared_attention import joints, recorded, shared, tensors

from para_core.attention.exchange import Way
from para_core.attention.traffic import Traffic
from para_core.sequence.layout import Joint, balanced


@st.composite
def calls(draw):
    ranks = draw(st.integers(2, 4))
    kv_heads = draw(st.integers(1, 9))
    return ranks, draw(joints(ranks)), kv_heads * draw(st.sampled_from([1, 1, 2])), kv_heads, draw(st.integers(0, 2**16))


@settings(max_examples=80, deadline=None)
@given(calls(), st.integers(2, 4), st.booleans(), st.sampled_from(["none", "one for all heads", "one a head"]))
def test_parts_change_no_bit(case, parts, wire, masked):
    ranks, (q_joint, kv_joint), heads, kv_heads, seed = case
    q, k, v = tensors(q_joint, kv_joint, heads, kv_heads, 2, seed)
    mask = None if masked == "none" else torch.randn(2, heads if "a head" in masked else 1, q_joint.total, kv_joint.total)
    traffic = [[Traffic() for _ in range(ranks)] for _ in range(2)]
    once, cut = (
        shared(fake_meshes(1, ranks), q_joint, kv_joint, q, k, v, mask, way=Way(wire, count), traffic=counted)
        for count, counted in zip((1, parts), traffic, strict=True)
    )
    if wire:  # a mean of keys may differ in its last bit, and an element of them then by a step
        assert (once - cut).norm() <= 1e-2 * once.norm()
    else:
        assert torch.equal(once, cut)
    padding = 32 * parts * ranks if wire else 0  # messages of bytes are multiples of 16
    assert all(abs(one.bytes - other.bytes) <= padding for one, other in zip(*traffic, strict=True))


class Noting:
    """``Beside`` that only says when it is launched."""

    operations = (0.0, 0.0)

    def __init__(self, events: list[str]):
        self.there, self.back = lambda: events.append("there"), lambda: events.append("back")


@pytest.mark.parametrize("heads", [8, 7, 2])
def test_a_part_is_computed_while_the_next_travels_and_all_ranks_send_in_one_order(heads):
    joint = Joint((balanced(11, 3),))
    events, _ = recorded(1, 3, joint, joint, heads, way=Way(parts=2))
    if heads > 3:
        assert events[0] == ["start 0", "start 1", "wait 0", "compute", "start 2", "wait 1", "compute", "start 3", "wait 2", "wait 3"]
    collectives = [[event for event in noted if event != "compute"] for noted in events]
    assert collectives[0] == collectives[1] == collectives[2]


IN_PARTS = "start 0, start 1, there, wait 0, compute, start 2, wait 1, compute, start 3, back, wait 2, wait 3"
ORDERS = {
    (1, 2, Way()): "start 0, there, wait 0, compute, start 1, back, wait 1",
    (1, 3, Way()): "start 0, there, wait 0, compute, start 1, back, wait 1",
    (1, 2, Way(parts=2)): IN_PARTS,
    (2, 2, Way()): "start 0, there, wait 0, send 0, compute, receive 0, compute, start 1, back, wait 1",
    (2, 1, Way()): "send 0, compute, receive 0, compute",
}


@pytest.mark.parametrize("degrees", ORDERS, ids=str)
def test_what_stands_beside_a_call_is_launched_while_its_messages_travel(degrees):
    """In a ring nothing of Ulysses travels: it is the caller's to compute."""
    ring, ulysses, way = degrees
    joint = Joint((balanced(11, ring * ulysses),))
    events, _ = recorded(ring, ulysses, joint, joint, way=way, beside=lambda _, events: Noting(events))
    assert events == [ORDERS[degrees].split(", ")] * ring * ulysses


@pytest.mark.parametrize("without", range(3))
def test_a_rank_with_nothing_beside_fits_the_others(without):
    """Blocks could not be compiled there."""
    joint = Joint((balanced(11, 3),))
    events, _ = recorded(1, 3, joint, joint, beside=lambda rank, events: None if rank == without else Noting(events))
    assert ["there" in noted for noted in events] == [rank != without for rank in range(3)]
