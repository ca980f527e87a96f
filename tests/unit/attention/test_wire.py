"""Tensors that travel as bytes arrive within half a step, and the exchange adds nothing to that."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.fake_comm import fake_meshes
from unit.shared_attention import D, assert_same, cases, rows_of, shared, tensors
from unit.shared_attention import reference as reference_attention

from para_core.attention import wire
from para_core.attention.exchange import Way
from para_core.attention.kernel import expand_kv
from para_core.attention.message import BYTES, PARTS, Bytes, Piece
from para_core.attention.traffic import Traffic
from para_core.attention.ulysses import split_heads
from para_core.sequence.layout import Joint, balanced

WIRE = Way(wire=True)


def round_trip(x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    codes, peaks = torch.empty_like(x, dtype=torch.uint8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    wire.quantise(x, codes, peaks, mean)
    result = torch.empty_like(x)
    wire.dequantise(codes, peaks, result, mean)
    return result


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(*[st.integers(1, 5)] * 3, st.integers(1, 130)),
    st.sampled_from([0.0, 1e-38, 1e-6, 1.0, 300.0]),
    st.sampled_from(["nothing", "outlier", "zeros", "nan", "inf", "mean"]),
    st.integers(0, 2**16),
)
def test_every_element_arrives_within_half_a_step_and_what_is_not_finite_stays_so(dtype, shape, size, special, seed):
    torch.manual_seed(seed)
    x = (torch.randn(shape) * size).to(dtype)
    row, broken = x[0, 0, 0], None
    if special == "outlier":
        row[-1] = 6e4
    elif special == "zeros":
        x[:, 0] = 0
    elif special in ("nan", "inf"):
        row[0] = float(special)
        broken = torch.zeros(shape[:-1], dtype=torch.bool)
        broken[0, 0, 0] = True
    mean = x[:1, :1] + 100 if special == "mean" else None
    result = round_trip(x, mean)
    if broken is not None:
        assert result[broken].isnan().any() and torch.isfinite(result[~broken]).all()
        x, result = x[~broken], result[~broken]
    exact = x.double() if mean is None else x.double() - mean.double()
    peak = exact.abs().amax(-1, keepdim=True)
    step = peak / wire.LEVELS * 0.5
    # the difference to the mean, and the result, are rounded to the dtype
    rounding = torch.finfo(dtype).eps * (x.double().abs() + 2 * peak + (0 if mean is None else mean.double().abs()))
    assert ((result.double() - x.double()).abs() <= step + rounding + 1e-30 + torch.finfo(dtype).tiny).all()
    assert (result[(exact == 0).all(-1)] == x[(exact == 0).all(-1)]).all(), "zeros stay zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [False, True])
def test_errors_are_no_larger_on_one_side_and_average_out(dtype, keys):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4096, 64).to(dtype)
    error = wire.round_trip(x, keys=keys).double() - x.double()
    assert error.mean().abs() < 0.01 * error.std()
    assert error.std() < 0.008


@settings(max_examples=60, deadline=None)
@given(st.builds(Piece, *[st.integers(1, 3)] * 3, st.integers(0, 3), st.integers(0, 3), st.integers(1, 9)), st.integers(1, 3))
def test_a_message_gives_back_what_was_written_into_it(piece, count):
    torch.manual_seed(0)
    q, k, v = (torch.randn(count, rows, piece.batch, heads, piece.dim) for rows, heads in sides(piece))
    for form, expected in ((PARTS, (q, k, v)), (BYTES, (round_trip(q), round_trip(k, mean_of(k)), round_trip(v)))):
        block = torch.full((count, form.size(piece)), 77, dtype=form.dtype or q.dtype)
        form.write(block, piece, q, k, v)
        results = [torch.empty_like(tensor) for tensor in (q, k, v)]
        form.read(block, piece, *results)
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert BYTES.size(piece) % 16 == 0


def sides(piece):
    return (piece.q_rows, piece.q_heads), (piece.kv_rows, piece.kv_heads), (piece.kv_rows, piece.kv_heads)


def mean_of(k):
    return wire.rough_mean(k) if k.numel() else None


def arrived(joint, own, tensor, *, keys=False):
    """A tensor ``(B, H, S, D)`` as rank ``own`` gets it: rows of the others have travelled."""
    result = tensor.clone()
    for rank in range(len(joint.rows)):
        rows = rows_of(joint, rank)
        if rank != own and len(rows):
            piece = tensor[:, :, rows]
            mean = wire.rough_mean(piece.permute(2, 0, 1, 3)[None])[0].permute(1, 2, 0, 3) if keys else None
            result[:, :, rows] = round_trip(piece, mean)
    return result


def on_the_edge(joint, tensor, *, keys=False):
    """Whether an element lies so near to the middle of two codes that another order of the same sums may choose the other one."""
    for rank in range(len(joint.rows)):
        piece = tensor[:, :, rows_of(joint, rank)]
        if keys and piece.numel():
            piece = piece - wire.rough_mean(piece.permute(2, 0, 1, 3)[None])[0].permute(1, 2, 0, 3)
        code = piece.double() / piece.double().abs().amax(-1, keepdim=True).clamp_min(1e-30) * wire.LEVELS + 0.5
        if ((code - code.round()).abs() < 5e-5).any():
            return True
    return False


def expected(ring, ulysses, q_joint, kv_joint, q, k, v, mask):
    """Attention in float64 on what each rank gets: Ulysses or ring alone."""
    whole = torch.empty_like(q, dtype=torch.float64)
    heads = split_heads(q.shape[1], q.shape[1], ulysses)
    for rank in range(ring * ulysses):
        q_there = arrived(q_joint, rank, q) if ulysses > 1 else q
        result = reference_attention(q_there, arrived(kv_joint, rank, k, keys=True), arrived(kv_joint, rank, v), mask)
        if ulysses > 1:
            whole[:, heads.own(rank)] = result[:, heads.own(rank)]
        else:
            whole[:, :, rows_of(q_joint, rank)] = result[:, :, rows_of(q_joint, rank)]
    return whole


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(["none", "none", "bool", "additive"]))
def test_attention_is_that_of_the_tensors_that_arrive(case, masked):
    ring, ulysses, q_joint, kv_joint, heads, kv_heads, batch, seed = case
    q, k, v = tensors(q_joint, kv_joint, heads, kv_heads, batch, seed)
    k = k + 5 * torch.randn(1, kv_heads, 1, D)
    mask = torch.randn(batch, heads, q_joint.total, kv_joint.total)
    mask = {"none": None, "bool": mask > -1, "additive": mask}[masked]
    out = shared(fake_meshes(ring, ulysses), q_joint, kv_joint, q, k, v, mask, way=WIRE)
    k, v = expand_kv(q, k, v)
    edge = on_the_edge(q_joint, q) or on_the_edge(kv_joint, k, keys=True) or on_the_edge(kv_joint, v)
    if (ring == 1 or ulysses == 1) and not edge:
        assert_same(out, expected(ring, ulysses, q_joint, kv_joint, q, k, v, mask))
    exact = reference_attention(q, k, v, mask)
    assert ((out.double() - exact).abs() <= bound(q, k, v, trips=1 if ring == 1 or ulysses == 1 else 2)).all()


def bound(q, k, v, trips):
    """The most that attention can differ where every element of q, k and v is off by at most ``trips`` half steps."""
    spread = k - k.mean(2, keepdim=True)  # a rough mean is no better than twice that
    off = [trips * size * (0.5 / wire.LEVELS + 1e-6) for size in (q.abs().max(), 2 * 2 * spread.abs().max(), v.abs().max())]
    logits = D**-0.5 * (q.abs().sum(-1).max() * off[1] + off[0] * k.abs().sum(-1).max() + D * off[0] * off[1])
    return (math.exp(2 * logits) - 1) * v.abs().max() + off[2] + 1e-5


@pytest.mark.parametrize("degrees", [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_sent_follow_the_formula(degrees, dtype):
    ring, ulysses = degrees
    ranks, heads, rows = ring * ulysses, 12, 96
    joint = Joint((balanced(rows, ranks),))
    traffic = [Traffic() for _ in range(ranks)]
    q, k, v = (tensor.to(dtype) for tensor in tensors(joint, joint, heads, heads, 2, 0))
    shared(fake_meshes(ring, ulysses), joint, joint, q, k, v, traffic=traffic, way=WIRE)
    formula = Traffic.expected(2 * rows, heads * D, dtype.itemsize, ulysses=ulysses, ring=ring, wire=1 + 4 / D)
    means = 4 * 2 * heads * D * (ulysses * ring)  # each rank's mean of k, to each other rank, and padding
    for counted in traffic:
        assert formula <= counted.bytes <= formula + means


def test_keys_with_a_large_common_part_keep_their_precision():
    torch.manual_seed(0)
    joint = Joint((balanced(200, 2),))
    q, k, v = tensors(joint, joint, 2, 2, 1, 0)
    biased = k + 50 * torch.randn(1, 2, 1, D)  # the same attention: softmax does not see what all keys share
    exact = reference_attention(q, k, v)
    for keys in (k, biased):
        out = shared(fake_meshes(1, 2), joint, joint, q, keys, v, way=WIRE)
        assert (out.double() - exact).norm() < 0.015 * exact.norm()


@pytest.mark.parametrize("degrees", [(1, 2), (2, 1), (2, 2)])
def test_a_nan_on_one_rank_is_seen_on_all(degrees):
    ranks = degrees[0] * degrees[1]
    joint = Joint((balanced(4 * ranks, ranks),))
    q, k, v = tensors(joint, joint, 4, 4, 1, 0)
    v[..., 0, 0] = float("nan")
    out = shared(fake_meshes(*degrees), joint, joint, q, k, v, way=WIRE)
    assert out.isnan().any(-1).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_it_is_the_same_also_inside_an_operation_of_compiled_code(dtype):
    """Messages of compiled and of plain ranks are alike, so that each rank compiles or not by itself."""
    piece = Piece(1, 9, 9, 2, 2, 16)
    torch.manual_seed(0)
    tensors = [torch.randn(2, 9, 1, 2, 16).to(dtype) for _ in range(3)]
    form = Bytes(*wire.compiled())

    @torch.library.custom_op("paradit_test::travel", mutates_args=())
    def travel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        block = torch.zeros(2, form.size(piece), dtype=torch.uint8)
        form.write(block, piece, q, k, v)
        return block

    travel.register_fake(lambda q, k, v: q.new_empty(2, form.size(piece), dtype=torch.uint8))
    with torch.inference_mode():
        block = torch.compile(lambda *given: travel(*given), fullgraph=True, backend="eager")(*tensors)
        plain = torch.zeros_like(block)
        BYTES.write(plain, piece, *tensors)
        results = [[torch.empty_like(tensor) for tensor in tensors] for _ in range(2)]
        form.read(block, piece, *results[0])
        BYTES.read(plain, piece, *results[1])
    assert (block != plain).float().mean() < 0.01
    for one, other, tensor in zip(*results, tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=float(tensor.abs().max()) / 120)
    assert all(function._compiled is not None for function in wire.compiled()), "it has been compiled"
