"""The Triton kernels of ``packing``. Offsets are 64-bit: q, k and v of a long video have more than 2^31 bytes."""

from __future__ import annotations

import triton
import triton.language as tl


# a number of 1 would become a constant in only one branch
@triton.jit(do_not_specialize=["q_share", "q_start", "q_count", "kv_share", "kv_start", "kv_count"])
def pack(
    q, k, v, sent, own,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    rows, batch, q_share, q_start, q_count, kv_share, kv_start, kv_count, rank, ranks,
    D: tl.constexpr, DIMS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token of one batch row, of q, k or v: of every rank's ``share`` of heads, ``count`` from ``start`` on to the rank's piece."""
    row = tl.program_id(0).to(tl.int64)
    which, place = tl.program_id(1) // batch, (tl.program_id(1) % batch).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, DIMS)
    share, start, count = kv_share, kv_start, kv_count
    first = q_count
    if which == 0:
        share, start, count = q_share, q_start, q_count
        first = 0
        source = q + place * q_batch + row * q_row
        by_head = q_head
    elif which == 1:
        source = k + place * k_batch + row * k_row
        by_head = k_head
    else:
        first = q_count + kv_count
        source = v + place * v_batch + row * v_row
        by_head = v_head
    there = (head[:, None] < count * ranks) & (dim[None, :] < D)
    owner = head // count
    local = head - owner * count
    among = (owner * share + start + local).to(tl.int64)
    values = tl.load(source + among[:, None] * by_head + dim[None, :], mask=there)
    width = q_count + 2 * kv_count
    inside = ((row * batch + place) * width + first + local) * D
    piece = (owner - (owner > rank).to(tl.int32)).to(tl.int64) * rows * batch * width * D
    mine = (owner == rank)[:, None]
    tl.store(own + inside[:, None] + dim[None, :], values, mask=there & mine)
    tl.store(sent + (piece + inside)[:, None] + dim[None, :], values, mask=there & (mine == 0))


@triton.jit
def unpack(
    own, received, whole, own_batch, own_head, own_row, rows, batch, share, start, count, rank, ranks,
    D: tl.constexpr, DIMS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token of one batch row: from the piece of each rank the ``count`` heads that lie from ``start`` on in its ``share``."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, DIMS)
    there = (head[:, None] < count * ranks) & (dim[None, :] < D)
    owner = head // count
    local = (head - owner * count).to(tl.int64)
    mine = (owner == rank)[:, None]
    piece = (owner - (owner > rank).to(tl.int32)).to(tl.int64) * rows * batch * count * D
    inside = ((row * batch + place) * count + local) * D
    kept = tl.load(own + (place * own_batch + row * own_row + local * own_head)[:, None] + dim[None, :], mask=there & mine, other=0)
    came = tl.load(received + (piece + inside)[:, None] + dim[None, :], mask=there & (mine == 0), other=0)
    into = whole + ((place * rows + row) * share * ranks + owner * share + start + local)[:, None] * D + dim[None, :]
    tl.store(into, tl.where(mine, kept, came), mask=there)
