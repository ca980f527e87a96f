"""Ulysses: before attention ranks trade rows for heads, after it heads for rows (DeepSpeed-Ulysses, arXiv 2309.14509).

Rows and heads may be uneven, and a rank may have none of either. Shapes: B batch, H heads, S rows of one rank, D head dim.
q, k and v travel in one all-to-all, as pieces in one of the forms of ``message``. What stays on the rank is copied once, to
where attention reads it. Heads may be cut in parts, whose messages travel while other parts are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..sequence.layout import balanced, weighted
from ..sequence.mesh import Comm
from .kernel import Kernel
from .message import PARTS, ROWS, Form, Piece
from .traffic import Traffic


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads that each rank of a Ulysses group works on."""

    q: tuple[int, ...]
    kv: tuple[int, ...]

    def own(self, rank: int) -> slice:
        """The query heads of ``rank``."""
        start = sum(self.q[:rank])
        return slice(start, start + self.q[rank])


@dataclass(frozen=True)
class Part:
    """A part of every rank's heads, number ``index`` of ``count``; whole groups of query heads stay together."""

    heads: Heads
    index: int = 0
    count: int = 1

    def kv(self, rank: int) -> slice:
        """The key heads of this part among those of ``rank``."""
        share = self.heads.kv[rank]
        return slice(share * self.index // self.count, share * (self.index + 1) // self.count)

    def q(self, rank: int) -> slice:
        """The query heads of this part among those of ``rank``."""
        kv, group = self.kv(rank), sum(self.heads.q) // sum(self.heads.kv)
        return slice(kv.start * group, kv.stop * group)


@lru_cache(maxsize=256)
def split_heads(heads: int, kv_heads: int, ranks: int, speeds: tuple[float, ...] | None = None) -> Heads:
    """Cut heads as evenly as possible, or in proportion to the ranks' ``speeds``.

    ``kv_heads < heads`` (grouped queries) must divide by ``ranks``, and are cut evenly.
    """
    if kv_heads == heads:
        shares = weighted(heads, speeds) if speeds else balanced(heads, ranks)
        return Heads(shares, shares)
    if heads % kv_heads or kv_heads % ranks:
        raise ValueError(f"{heads} query heads in groups over {kv_heads} key heads cannot be cut for {ranks} ranks")
    return Heads((heads // ranks,) * ranks, (kv_heads // ranks,) * ranks)


def attend(
    comm: Comm,
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_rows: Sequence[int],
    kv_rows: Sequence[int],
    heads: Heads,
    mask: torch.Tensor | None,
    scale: float | None,
    traffic: Traffic,
    wire: Form | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """q ``(B, H, S, D)``, k and v ``(B, Hkv, M, D)`` of this rank's rows -> ``(B, H, S, D)``, memory ``(B, S, H, D)``.

    ``mask`` is already this rank's (see ``masks.exchanged_mask``). ``wire``: q, k and v travel in this form. ``parts``: so many
    messages each way; those of one part travel while another is computed.
    """
    cuts = [Part(heads, index, parts) for index in range(parts)]
    arrivals = [
        scatter(comm, q, k, v, q_rows=q_rows, kv_rows=kv_rows, part=part, traffic=traffic, wire=wire, ahead=parts > 1) for part in cuts
    ]
    whole, departures = None, []
    for part, arrive in zip(cuts, arrivals, strict=True):
        q_all, k_all, v_all = arrive()
        if q_all.numel() and k_all.numel():
            own = mask[:, part.q(comm.rank)] if mask is not None and parts > 1 and mask.shape[1] > 1 else mask
            out = kernel.run(q_all, k_all, v_all, mask=own, scale=scale)
        else:
            out = torch.zeros_like(q_all)
        if whole is None:
            whole = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        departures.append(gather(comm, out, whole, rows=q_rows, part=part, traffic=traffic, ahead=parts > 1))
    for finish in departures:
        finish()
    assert whole is not None, "there is at least one part"
    return whole.transpose(1, 2)


def scatter(
    comm: Comm,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_rows: Sequence[int],
    kv_rows: Sequence[int],
    part: Part,
    traffic: Traffic,
    wire: Form | None = None,
    ahead: bool = False,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Trade rows for heads. The result waits for all rows of this rank's heads: q ``(B, h, S_total, D)``, k, v ``(B, hkv, M_total, D)``."""
    batch, _, _, dim = q.shape
    rank, ranks = comm.rank, range(comm.size)
    form = wire or (ROWS if tuple(q_rows) == tuple(kv_rows) else PARTS)

    def piece(source: int, destination: int) -> Piece:
        return Piece(batch, q_rows[source], kv_rows[source], _length(part.q(destination)), _length(part.kv(destination)), dim)

    own = piece(rank, rank)
    sent_sizes = [form.size(piece(rank, other)) if other != rank else 0 for other in ranks]
    received_sizes = [form.size(piece(other, rank)) if other != rank or form is ROWS else 0 for other in ranks]
    sent, received = (q.new_empty(sum(sizes), dtype=form.dtype or q.dtype) for sizes in (sent_sizes, received_sizes))
    for first, last in _runs(part.heads.q, rank):
        block = _block(sent, sent_sizes, first, last)
        form.write(block, piece(rank, first), *(_heads_of(tensor, part, first, last, kv=kv) for tensor, kv in ((q, 0), (k, 1), (v, 1))))
    mine = [_heads_of(tensor, part, rank, rank + 1, kv=kv) for tensor, kv in ((q, 0), (k, 1), (v, 1))]
    if form is ROWS:
        split = (own.q_heads, own.kv_heads, own.kv_heads)
        whole = received.view(sum(q_rows), batch, sum(split), dim).split(split, dim=2)
    else:
        whole = (q.new_empty(sum(q_rows), *own.q[1:]), *q.new_empty(sum(kv_rows), *own.kv[1:]).chunk(2, dim=2))
    places = list(zip(whole, (q_rows, kv_rows, kv_rows), strict=True))
    for (tensor, rows), tokens in zip(places, mine, strict=True):
        _rows_of(tensor, rows, rank, rank + 1).copy_(tokens)
    wait = _send(comm, received, sent, received_sizes, sent_sizes, traffic, ahead=ahead)

    def arrive() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wait()
        if form is not ROWS:
            for first, last in _runs([*zip(q_rows, kv_rows, strict=True)], rank):
                block = _block(received, received_sizes, first, last)
                form.read(block, piece(first, rank), *(_rows_of(tensor, rows, first, last) for tensor, rows in places))
        q_all, k_all, v_all = (tensor.permute(1, 2, 0, 3) for tensor in whole)
        return q_all, k_all, v_all

    return arrive


def gather(
    comm: Comm, out: torch.Tensor, whole: torch.Tensor, *, rows: Sequence[int], part: Part, traffic: Traffic, ahead: bool = False
) -> Callable[[], None]:
    """Trade heads for rows: ``out`` ``(B, h, S_total, D)``, and from the others this rank's rows, into ``whole`` ``(B, S, H, D)``.

    It is filled once the result has been called.
    """
    batch, own, _, dim = out.shape
    rank, local = comm.rank, rows[comm.rank]
    sent = out.permute(2, 0, 1, 3).reshape(-1)
    sent_sizes = [count * batch * own * dim for count in rows]
    received_sizes = [local * batch * _length(part.q(other)) * dim if other != rank else 0 for other in range(comm.size)]
    received = sent.new_empty(sum(received_sizes))
    wait = _send(comm, received, sent, received_sizes, sent_sizes, traffic, ahead=ahead)
    into = whole.transpose(1, 2)
    start = sum(rows[:rank])
    _heads_of(into, part, rank, rank + 1).copy_(out[:, :, start : start + local].permute(2, 0, 1, 3))

    def finish() -> None:
        wait()
        for first, last in _runs(part.heads.q, rank):
            block = _block(received, received_sizes, first, last)
            _heads_of(into, part, first, last).copy_(block.unflatten(1, (local, batch, _length(part.q(first)), dim)))

    return finish


def _send(
    comm: Comm,
    received: torch.Tensor,
    sent: torch.Tensor,
    received_sizes: list[int],
    sent_sizes: list[int],
    traffic: Traffic,
    *,
    ahead: bool,
) -> Callable[[], None]:
    traffic.bytes += (sum(sent_sizes) - sent_sizes[comm.rank]) * sent.element_size()
    if ahead:
        return comm.start_all_to_all(received, sent, received_sizes, sent_sizes)
    comm.all_to_all(received, sent, received_sizes, sent_sizes)
    return lambda: None


def _heads_of(tensor: torch.Tensor, part: Part, first: int, last: int, *, kv: int = 0) -> torch.Tensor:
    """The part's heads of ranks ``first:last``, which have equal shares, in ``(B, H, S, D)``: a view ``(n, S, B, heads, D)``."""
    shares, inner = (part.heads.kv, part.kv(first)) if kv else (part.heads.q, part.q(first))
    begin, share = sum(shares[:first]), shares[first]
    block = tensor[:, begin : begin + (last - first) * share].unflatten(1, (last - first, share))
    return block[:, :, inner].permute(1, 3, 0, 2, 4)


def _rows_of(tensor: torch.Tensor, rows: Sequence[int], first: int, last: int) -> torch.Tensor:
    """The rows of ranks ``first:last``, which have equally many, in ``(S_total, ...)``: a view ``(n, S, ...)``."""
    begin, count = sum(rows[:first]), rows[first]
    return tensor[begin : begin + (last - first) * count].unflatten(0, (last - first, count))


def _block(flat: torch.Tensor, sizes: Sequence[int], first: int, last: int) -> torch.Tensor:
    """The pieces of ranks ``first:last``, which are equally large: ``(n, size)``."""
    begin = sum(sizes[:first])
    return flat[begin : begin + (last - first) * sizes[first]].view(last - first, sizes[first])


def _runs(shares: Sequence[object], rank: int) -> Iterator[tuple[int, int]]:
    """Neighbouring ranks with equal shares, without ``rank``, as first and last + 1: their pieces are handled at once."""
    begin = 0
    for (_, _), group in itertools.groupby(range(len(shares)), key=lambda other: (shares[other], (other > rank) - (other < rank))):
        members = len(list(group))
        if begin != rank:
            yield begin, begin + members
        begin += members


def _length(heads: slice) -> int:
    return heads.stop - heads.start
