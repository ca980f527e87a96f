"""Ulysses: before attention ranks trade rows for heads, after it heads for rows (DeepSpeed-Ulysses, arXiv 2309.14509).

Rows and heads may be uneven, and a rank may have none of either. Shapes: B batch, H heads, S rows of one rank, D head dim.
q, k and v travel in one all-to-all, as pieces in one of the forms of ``message``. What stays on the rank is copied once, to
where attention reads it. Heads may be cut in parts, whose messages travel while other parts are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from ..sequence.layout import balanced, weighted
from ..sequence.mesh import Comm
from . import packing
from .beside import Beside
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

    @cached_property
    def kv(self) -> tuple[slice, ...]:
        """The key heads of this part among those of each rank."""
        return tuple(slice(share * self.index // self.count, share * (self.index + 1) // self.count) for share in self.heads.kv)

    @cached_property
    def q(self) -> tuple[slice, ...]:
        """The query heads of this part among those of each rank."""
        group = sum(self.heads.q) // sum(self.heads.kv)
        return tuple(slice(kv.start * group, kv.stop * group) for kv in self.kv)


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
    trades: Trades,
    wire: Form | None = None,
    parts: int = 1,
    beside: Beside | None = None,
) -> torch.Tensor:
    """q ``(B, H, S, D)``, k and v ``(B, Hkv, M, D)`` of this rank's rows -> ``(B, H, S, D)``, memory ``(B, S, H, D)``.

    ``mask`` is already this rank's (see ``masks.exchanged_mask``). ``trades`` are kept for the next such call. ``wire``: q, k and v
    travel in this form. ``parts``: so many messages each way; those of one part travel while another is computed. ``beside``:
    computed while messages travel.
    """
    form = wire or (ROWS if tuple(q_rows) == tuple(kv_rows) else PARTS)
    ahead = parts > 1 or beside is not None
    batch, _, rows, dim = q.shape
    rows_of_all = tuple(q_rows), tuple(kv_rows)
    cuts = [kept(trades, form, comm.rank, batch, dim, *rows_of_all, heads, index, parts) for index in range(parts)]
    arrivals = [scatter(comm, each, q, k, v, traffic, ahead=ahead) for each in cuts]
    if beside is not None:
        beside.there()
    whole, departures = None, []
    for each, arrive in zip(cuts, arrivals, strict=True):
        q_all, k_all, v_all = arrive()
        if q_all.numel() and k_all.numel():
            own = mask[:, each.part.q[comm.rank]] if mask is not None and parts > 1 and mask.shape[1] > 1 else mask
            out = kernel.run(q_all, k_all, v_all, mask=own, scale=scale)
        else:
            out = torch.zeros_like(q_all)
        if whole is None:
            whole = q.new_empty(batch, rows, q.shape[1], dim)
        departures.append(gather(comm, each, out, whole, traffic, ahead=ahead))
    if beside is not None:
        beside.back()
    for finish in departures:
        finish()
    assert whole is not None, "there is at least one part"
    return whole.transpose(1, 2)


@dataclass(frozen=True)
class Trade:
    """Sizes and places of one part's messages on one rank: worked out once a kind of call, as launching must be quick."""

    form: Form
    rank: int
    batch: int
    dim: int
    q_rows: tuple[int, ...]
    kv_rows: tuple[int, ...]
    heads: Heads
    index: int = 0
    count: int = 1

    @cached_property
    def part(self) -> Part:
        return Part(self.heads, self.index, self.count)

    def piece(self, source: int, destination: int) -> Piece:
        heads = packing.length(self.part.q[destination]), packing.length(self.part.kv[destination])
        return Piece(self.batch, self.q_rows[source], self.kv_rows[source], *heads, self.dim)

    @cached_property
    def alike(self) -> bool:
        """Whether every rank has equally many heads, and some of them travel."""
        return len(set(self.heads.q)) == len(set(self.heads.kv)) == 1 and self.own.kv_heads > 0

    @cached_property
    def own(self) -> Piece:
        return self.piece(self.rank, self.rank)

    @cached_property
    def sent(self) -> list[int]:
        return [self.form.size(self.piece(self.rank, other)) if other != self.rank else 0 for other in range(len(self.q_rows))]

    @cached_property
    def received(self) -> list[int]:
        """The own piece has a place where what arrives is used in place."""
        others = range(len(self.q_rows))
        return [self.form.size(self.piece(other, self.rank)) if other != self.rank or self.form is ROWS else 0 for other in others]

    @cached_property
    def outward(self) -> list[tuple[int, int, Piece]]:
        """First and last + 1 of ranks that get equally much, and how much."""
        return [(first, last, self.piece(self.rank, first)) for first, last in _runs(self.part.heads.q, self.rank)]

    @cached_property
    def inward(self) -> list[tuple[int, int, Piece]]:
        """The same of ranks that send."""
        return [
            (first, last, self.piece(first, self.rank)) for first, last in _runs([*zip(self.q_rows, self.kv_rows, strict=True)], self.rank)
        ]

    @cached_property
    def back_sent(self) -> list[int]:
        return [rows * self.batch * self.own.q_heads * self.dim for rows in self.q_rows]

    @cached_property
    def back_received(self) -> list[int]:
        local, others = self.q_rows[self.rank] * self.batch * self.dim, range(len(self.q_rows))
        return [local * packing.length(self.part.q[other]) if other != self.rank else 0 for other in others]


Trades = dict[tuple, Trade]
"""Those of one exchange, by what they are made of."""


def kept(trades: Trades, *how: Any) -> Trade:
    """``Trade(*how)``, made once."""
    if how not in trades:
        trades[how] = Trade(*how)
    return trades[how]


def scatter(
    comm: Comm, trade: Trade, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, traffic: Traffic, *, ahead: bool = False
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Trade rows for heads. The result waits for all rows of this rank's heads: q ``(B, h, S_total, D)``, k, v ``(B, hkv, M_total, D)``."""
    form, rank, own, part = trade.form, trade.rank, trade.own, trade.part
    sent, received = (q.new_empty(sum(sizes), dtype=form.dtype or q.dtype) for sizes in (trade.sent, trade.received))
    if form is ROWS:
        split = (own.q_heads, own.kv_heads, own.kv_heads)
        joined = received.view(sum(trade.q_rows), trade.batch, sum(split), trade.dim)
        whole = joined.split(split, dim=2)
    else:
        whole = (q.new_empty(sum(trade.q_rows), *own.q[1:]), *q.new_empty(sum(trade.kv_rows), *own.kv[1:]).chunk(2, dim=2))
    if form is ROWS and trade.alike and packing.possible(q, k, v):
        before = sum(trade.q_rows[:rank])
        place, ranks = joined[before : before + trade.q_rows[rank]], len(trade.q_rows)
        packing.pack(q, k, v, sent, place, q_heads=part.q[rank], kv_heads=part.kv[rank], rank=rank, ranks=ranks)
    else:
        for first, last, piece in trade.outward:
            tensors = _heads_of(q, part, first, last), _heads_of(k, part, first, last, kv=True), _heads_of(v, part, first, last, kv=True)
            form.write(_block(sent, trade.sent, first, last), piece, *tensors)
        _rows_of(whole[0], trade.q_rows, rank, rank + 1).copy_(_heads_of(q, part, rank, rank + 1))
        _rows_of(whole[1], trade.kv_rows, rank, rank + 1).copy_(_heads_of(k, part, rank, rank + 1, kv=True))
        _rows_of(whole[2], trade.kv_rows, rank, rank + 1).copy_(_heads_of(v, part, rank, rank + 1, kv=True))
    wait = _send(comm, received, sent, trade.received, trade.sent, traffic, ahead=ahead)

    def arrive() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wait()
        if form is not ROWS:
            for first, last, piece in trade.inward:
                places = [
                    _rows_of(tensor, rows, first, last)
                    for tensor, rows in zip(whole, (trade.q_rows, trade.kv_rows, trade.kv_rows), strict=True)
                ]
                form.read(_block(received, trade.received, first, last), piece, *places)
        q_all, k_all, v_all = whole
        return q_all.permute(1, 2, 0, 3), k_all.permute(1, 2, 0, 3), v_all.permute(1, 2, 0, 3)

    return arrive


def gather(
    comm: Comm, trade: Trade, out: torch.Tensor, whole: torch.Tensor, traffic: Traffic, *, ahead: bool = False
) -> Callable[[], None]:
    """Trade heads for rows: ``out`` ``(B, h, S_total, D)``, and from the others this rank's rows, into ``whole`` ``(B, S, H, D)``.

    It is filled once the result has been called.
    """
    rank, part = trade.rank, trade.part
    rows_first = out.permute(2, 0, 1, 3)
    sent = rows_first.reshape(-1)
    received = sent.new_empty(sum(trade.back_received))
    wait = _send(comm, received, sent, trade.back_received, trade.back_sent, traffic, ahead=ahead)
    into = whole.transpose(1, 2)
    before = sum(trade.q_rows[:rank])
    own = out[:, :, before : before + trade.q_rows[rank]]
    packed = trade.alike and packing.possible(own, whole)
    if not packed:
        _heads_of(into, part, rank, rank + 1).copy_(_rows_of(rows_first, trade.q_rows, rank, rank + 1))

    def finish() -> None:
        wait()
        if packed:
            packing.unpack(own, received, whole, heads=part.q[rank], rank=rank)
            return
        for first, last, piece in trade.outward:
            block = _block(received, trade.back_received, first, last)
            _heads_of(into, part, first, last).copy_(block.view(last - first, *piece.q))

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
    return _nothing


def _nothing() -> None:
    pass


def _heads_of(tensor: torch.Tensor, part: Part, first: int, last: int, *, kv: bool = False) -> torch.Tensor:
    """The part's heads of ranks ``first:last``, which have equal shares, in ``(B, H, S, D)``: a view ``(n, S, B, heads, D)``."""
    shares, inner = (part.heads.kv, part.kv[first]) if kv else (part.heads.q, part.q[first])
    batch, _, rows, dim = tensor.shape
    by_batch, by_head, by_row, by_element = tensor.stride()
    return tensor.as_strided(
        (last - first, rows, batch, packing.length(inner), dim),
        (shares[first] * by_head, by_row, by_batch, by_head, by_element),
        tensor.storage_offset() + (sum(shares[:first]) + inner.start) * by_head,
    )


def _rows_of(tensor: torch.Tensor, rows: Sequence[int], first: int, last: int) -> torch.Tensor:
    """The rows of ranks ``first:last``, which have equally many, in ``(S_total, ...)``: a view ``(n, S, ...)``."""
    by_row, count = tensor.stride(0), rows[first]
    return tensor.as_strided(
        (last - first, count, *tensor.shape[1:]),
        (count * by_row, *tensor.stride()),
        tensor.storage_offset() + sum(rows[:first]) * by_row,
    )


def _block(flat: torch.Tensor, sizes: Sequence[int], first: int, last: int) -> torch.Tensor:
    """The pieces of ranks ``first:last``, which are equally large: ``(n, size)``."""
    return flat.as_strided((last - first, sizes[first]), (sizes[first], 1), sum(sizes[:first]))


def _runs(shares: Sequence[object], rank: int) -> Iterator[tuple[int, int]]:
    """Neighbouring ranks with equal shares, without ``rank``, as first and last + 1: their pieces are handled at once."""
    begin = 0
    for _, group in itertools.groupby(range(len(shares)), key=lambda other: (shares[other], (other > rank) - (other < rank))):
        members = len(list(group))
        if begin != rank:
            yield begin, begin + members
        begin += members
