"""Attention over ranks equals attention on one, for every mode, layout, head count and mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.fake_comm import fake_comms, fake_meshes, on_ranks
from unit.shared_attention import D, ExactKernel, assert_same, cases, ranks_of, recorded, reference, rows_of, shared, tensors

from para_core.attention.call import Call, StockKernel
from para_core.attention.exchange import Exchange, attend, attend_call
from para_core.attention.kernel import NeedsLse
from para_core.attention.traffic import Traffic
from para_core.sequence.layout import Joint, balanced


@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from([None, None, 0.7]))
def test_ranks_that_share_rows_compute_what_one_rank_computes(case, scale):
    ring, ulysses, q_joint, kv_joint, *rest = case
    q, k, v = tensors(q_joint, kv_joint, *rest)
    assert_same(shared(fake_meshes(ring, ulysses), q_joint, kv_joint, q, k, v, scale=scale), reference(q, k, v, scale=scale))


@settings(max_examples=250, deadline=None)
@given(cases(), st.sampled_from([2, 3, 4]), st.sampled_from(["bool", "additive", "-inf"]), st.tuples(*[st.booleans()] * 3))
def test_whole_masks_of_every_form_are_honoured(case, ndim, kind, broadcast):
    ring, ulysses, q_joint, kv_joint, heads, kv_heads, batch, seed = case
    q, k, v = tensors(q_joint, kv_joint, heads, kv_heads, batch, seed)
    one_batch, one_head, one_row = broadcast
    sizes = (1 if one_batch else batch, 1 if one_head else heads, 1 if one_row else q_joint.total, kv_joint.total)
    mask = torch.randn({2: sizes[2:], 3: (sizes[0], *sizes[2:]), 4: sizes}[ndim])
    if kind == "bool":
        mask = mask > 0
    elif kind == "-inf":
        mask = mask.masked_fill(mask > 0.3, float("-inf"))
    assert_same(shared(fake_meshes(ring, ulysses), q_joint, kv_joint, q, k, v, mask), reference(q, k, v, mask))


@settings(max_examples=80, deadline=None)
@given(ranks_of, st.integers(0, 2**16), st.sampled_from(["rows", "columns", "columns of one row"]), st.booleans(), st.booleans())
def test_masks_cut_to_the_ranks_own_rows_or_columns_are_honoured(degrees, seed, cut, as_bool, same):
    ring, ulysses = degrees
    ranks = ring * ulysses
    q_joint = Joint((balanced(2 * ranks + 1, ranks), balanced(7, ranks)))
    kv_joint = q_joint if same else Joint((balanced(3 * ranks - 1, ranks),))
    q, k, v = tensors(q_joint, kv_joint, 4, 4, 2, seed)
    mask = torch.randn(2, 4, q_joint.total, kv_joint.total)
    mask = mask[:, :, :1] if cut == "columns of one row" else mask
    mask = mask > 0 if as_bool else mask

    def local_mask(rank):
        return mask[:, :, rows_of(q_joint, rank)] if cut == "rows" else mask[..., rows_of(kv_joint, rank)]

    assert_same(shared(fake_meshes(ring, ulysses), q_joint, kv_joint, q, k, v, local_mask=local_mask), reference(q, k, v, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("degrees", [(1, 3), (3, 1), (2, 2)])
def test_half_precision_is_as_close_to_exact_as_on_one_rank(degrees, dtype):
    ranks = degrees[0] * degrees[1]
    joint = Joint((balanced(7, ranks), balanced(50, ranks)))
    q, k, v = (t.to(dtype) for t in tensors(joint, joint, 5, 5, 2, 0))
    out, expected = shared(fake_meshes(*degrees), joint, joint, q, k, v).double(), reference(q, k, v)
    alone = F.scaled_dot_product_attention(q, k, v).double()
    assert (out - expected).norm() <= 2 * (alone - expected).norm()


@pytest.mark.parametrize("degrees", [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (4, 1), (2, 2), (2, 3), (3, 2)])
def test_bytes_sent_follow_the_formula_for_even_shards(degrees):
    ring, ulysses = degrees
    ranks, batch, heads, rows = ring * ulysses, 2, 12, 24
    joint = Joint((balanced(rows, ranks),))
    traffic = [Traffic() for _ in range(ranks)]
    shared(fake_meshes(ring, ulysses), joint, joint, *tensors(joint, joint, heads, heads, batch, 0), traffic=traffic)
    for counted in traffic:
        assert counted.bytes == pytest.approx(Traffic.expected(batch * rows, heads * D, 4, ulysses=ulysses, ring=ring))
        assert counted.mask_bytes == 0


def test_ulysses_sends_one_message_there_and_one_back_and_computes_on_what_arrived():
    joint = Joint((balanced(11, 3),))
    events, seen = recorded(1, 3, joint, joint)
    assert events == [["all_to_all", "compute", "all_to_all"]] * 3
    ((q, k, v),) = seen[0]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr(), "copied after arrival"


def test_ulysses_sends_one_message_where_query_and_key_lengths_differ():
    events, _ = recorded(1, 3, Joint((balanced(11, 3),)), Joint((balanced(7, 3),)))
    assert events == [["all_to_all", "compute", "all_to_all"]] * 3


def test_a_ring_sends_k_and_v_as_one_message_while_it_computes():
    joint = Joint((balanced(11, 3),))
    events, _ = recorded(3, 1, joint, joint)
    assert events == [["send 0", "compute", "receive 0", "send 1", "compute", "receive 1", "compute"]] * 3


def test_unified_attention_rings_between_two_all_to_alls():
    joint = Joint((balanced(11, 4),))
    events, _ = recorded(2, 2, joint, joint)
    assert events == [["all_to_all", "send 0", "compute", "receive 0", "compute", "all_to_all"]] * 4


def test_one_rank_hands_the_very_tensors_to_the_kernel():
    joint = Joint(((5,),))
    q, k, v = tensors(joint, joint, 3, 3, 2, 0)
    mask, kernel = torch.randn(5, 5), ExactKernel()
    exchange = Exchange(fake_meshes(1, 1)[0], joint, joint, kernel)
    out = attend(exchange, q, k, v, mask, 0.3)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3))
    assert all(a is b for a, b in zip(kernel.seen[0], (q, k, v), strict=True)) and exchange.traffic.bytes == 0


def test_an_override_call_is_answered_in_its_callers_shape():
    joint = Joint((balanced(5, 2),))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3 * D) for _ in range(3))

    def func(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **_):
        assert skip_reshape and skip_output_reshape and heads == q.shape[1]
        return F.scaled_dot_product_attention(q, k, v)

    meshes = fake_meshes(1, 2)

    def work(rank):
        rows = rows_of(joint, rank)
        call = Call.parse(func, (q[:, rows], k[:, rows], v[:, rows]), {"heads": 3})
        return attend_call(Exchange(meshes[rank], joint, joint), call, StockKernel(call))

    whole = reference(*(t.unflatten(2, (3, D)).transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    assert_same(torch.cat(on_ranks(2, work), 1), whole)


def test_a_call_that_stays_here_reaches_the_stock_function_untouched():
    q = torch.randn(1, 5, 3 * D)
    kwargs = {"heads": 3, "_inside_attn_wrapper": True}
    call = Call.parse(lambda *args, **given: (args, given), (q, q, q), kwargs)
    exchange = Exchange(fake_meshes(1, 1)[0], Joint(((5,),)), Joint(((5,),)))
    for answer in (attend_call(None, call, StockKernel(call)), attend_call(exchange, call, StockKernel(call))):
        assert answer == ((q, q, q), kwargs)
    out = attend_call(None, call, ExactKernel())
    assert out.shape == q.shape


@pytest.mark.parametrize("degrees", [(2, 1), (2, 2)])
def test_a_ring_with_a_kernel_without_log_sum_exp_raises_needs_lse_before_anything_is_sent(degrees):
    joint = Joint((balanced(8, degrees[0] * degrees[1]),))
    exchange = Exchange(fake_meshes(*degrees)[0], joint, joint, ExactKernel(has_lse=False))
    q = torch.randn(1, 2, joint.rows[0], D)
    with pytest.raises(NeedsLse):
        attend(exchange, q, q, q)


def bad_calls():
    q = torch.randn(1, 4, 3, D)
    yield "rows", (q[:, :, :2], q, q), "3 query and 3 key rows, got 2 and 3"
    yield "dtype", (q, q.double(), q), "one dtype"
    yield "head dims", (q, q, q[..., :4]), "do not fit"
    yield "batch", (q, q.repeat(2, 1, 1, 1), q.repeat(2, 1, 1, 1)), "do not fit"
    yield "head groups", (q, q[:, :3], q[:, :3]), "do not fit"
    yield "mask rows", (q, q, q, torch.zeros(4, 6)), "4 query rows"
    yield "mask columns", (q, q, q, torch.zeros(6, 5)), "5 key columns"
    yield "mask dims", (q, q, q, torch.zeros(6)), "2 to 4 dimensions"


@pytest.mark.parametrize(("args", "message"), [pytest.param(a, m, id=name) for name, a, m in bad_calls()])
def test_calls_that_do_not_fit_the_layout_are_refused_before_anything_is_sent(args, message):
    joint = Joint(((3, 3),))
    exchange = Exchange(fake_meshes(1, 2)[0], joint, joint, ExactKernel())
    with pytest.raises(ValueError, match=message):
        attend(exchange, *args)


def test_a_local_mask_that_other_ranks_could_not_recognise_is_refused():
    joint = Joint(((4, 0),))
    exchange = Exchange(fake_meshes(1, 2)[1], joint, joint, ExactKernel())
    q = torch.randn(1, 2, 0, D)
    with pytest.raises(ValueError, match="0 key columns"):
        attend(exchange, q, q, q, torch.zeros(4, 0))


def test_a_mask_cut_to_own_rows_and_own_columns_is_refused_as_the_rest_of_it_is_nowhere():
    joint = Joint(((4, 3),))
    exchange = Exchange(fake_meshes(1, 2)[0], joint, joint, ExactKernel())
    q = torch.randn(1, 2, 4, D)
    with pytest.raises(ValueError, match="4 key columns"):
        attend(exchange, q, q, q, torch.zeros(4, 4))


def test_an_exchange_without_a_kernel_says_so():
    joint = Joint(((3,),))
    with pytest.raises(ValueError, match="kernel"):
        attend(Exchange(fake_meshes(1, 1)[0], joint, joint), *[torch.randn(1, 1, 3, D)] * 3)


def test_a_rank_that_leaves_does_not_hang_the_others():
    joint = Joint((balanced(6, 2),))
    meshes = fake_meshes(1, 2)

    def work(rank):
        if rank:
            raise OSError("gone")
        return attend(Exchange(meshes[0], joint, joint, ExactKernel()), *[torch.randn(1, 2, 3, D)] * 3)

    with pytest.raises(OSError, match="gone"):
        on_ranks(2, work, [meshes[0].ulysses])


def test_the_fake_communicators_agree_with_their_protocol():
    """The tests above stand on these."""
    comms = fake_comms(3)

    def work(rank):
        comm, x = comms[rank], torch.full((2,), float(rank))
        comm.all_reduce(x)
        y = torch.full((2,), float(rank))
        comm.broadcast(y, 2)
        z = torch.empty(2)
        comm.shift(torch.full((2,), float(rank)), (rank + 1) % 3, z, (rank - 1) % 3)()
        sizes = [0, 1, 2]
        received = torch.empty(3 * rank)
        comm.all_to_all(received, torch.full((3,), float(rank)), [rank] * 3, sizes)
        return x.tolist(), y.tolist(), z.tolist(), received.tolist()

    results = on_ranks(3, work, comms)
    for rank, (x, y, z, received) in enumerate(results):
        assert x == [3.0, 3.0] and y == [2.0, 2.0] and z == [float((rank - 1) % 3)] * 2
        assert received == [float(source) for source in range(3) for _ in range(rank)]
