"""Ulysses: before attention ranks trade rows for heads, after it heads for rows (DeepSpeed-Ulysses, arXiv 2309.14509).

Rows and heads may be uneven, and a rank may have none of either. Shapes: B batch, H heads, S rows of one rank, D head dim.
q, k and v travel in one all-to-all. Its buffers are laid out so that what arrives is used in place, as strided views:

    sent      [destination][S_local][B][q heads | k heads | v heads of the destination][D]
    received  [source     ][S_source][B][own q heads | own k heads | own v heads][D]     = [S_total][B][...][D]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..sequence.layout import balanced, weighted
from ..sequence.mesh import Comm
from .kernel import Kernel
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
) -> torch.Tensor:
    """q ``(B, H, S, D)``, k and v ``(B, Hkv, M, D)`` of this rank's rows -> ``(B, H, S, D)``, memory ``(B, S, H, D)``.

    ``mask`` is already this rank's (see ``masks.exchanged_mask``).
    """
    q_all, kv_all = scatter(comm, q, k, v, q_rows=q_rows, kv_rows=kv_rows, heads=heads, traffic=traffic)
    if q_all.numel() and kv_all.numel():
        out = kernel.run(q_all, *unpack(kv_all), mask=mask, scale=scale)
    else:
        out = torch.zeros_like(q_all)
    return gather(comm, out, rows=q_rows, heads=heads, traffic=traffic)


def scatter(
    comm: Comm,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_rows: Sequence[int],
    kv_rows: Sequence[int],
    heads: Heads,
    traffic: Traffic,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trade rows for heads: all rows of this rank's heads, q as ``(B, h, S_total, D)``, k and v as ``(M_total, B, 2 * hkv, D)``."""
    batch, _, _, dim = q.shape
    own_q, own_kv = heads.q[comm.rank], 2 * heads.kv[comm.rank]
    fused = tuple(q_rows) == tuple(kv_rows)
    sent_sizes = [batch * dim * (q.shape[2] * hq + k.shape[2] * 2 * hkv) for hq, hkv in zip(heads.q, heads.kv, strict=True)]
    received_sizes = [batch * dim * (q_count * own_q + kv_count * own_kv) for q_count, kv_count in zip(q_rows, kv_rows, strict=True)]
    sent = _pack(q, k, v, heads, fused=fused)
    received = sent.new_empty(sum(received_sizes))
    comm.all_to_all(received, sent, received_sizes, sent_sizes)
    traffic.bytes += (len(sent) - sent_sizes[comm.rank]) * sent.element_size()
    if fused:
        both = received.view(sum(q_rows), batch, own_q + own_kv, dim)
        return both[:, :, :own_q].permute(1, 2, 0, 3), both[:, :, own_q:]
    q_parts, kv_parts = [], []
    for piece, q_count, kv_count in zip(received.split(received_sizes), q_rows, kv_rows, strict=True):
        border = q_count * batch * own_q * dim
        q_parts.append(piece[:border].view(q_count, batch, own_q, dim))
        kv_parts.append(piece[border:].view(kv_count, batch, own_kv, dim))
    return torch.cat(q_parts).permute(1, 2, 0, 3), torch.cat(kv_parts)


def gather(comm: Comm, out: torch.Tensor, *, rows: Sequence[int], heads: Heads, traffic: Traffic) -> torch.Tensor:
    """Trade heads for rows: ``(B, h, S_total, D)`` -> ``(B, H, S, D)`` of this rank's rows, memory ``(B, S, H, D)``."""
    batch, own, _, dim = out.shape
    local = rows[comm.rank]
    sent = out.permute(2, 0, 1, 3).reshape(-1)
    sent_sizes = [count * batch * own * dim for count in rows]
    received_sizes = [local * batch * count * dim for count in heads.q]
    received = sent.new_empty(sum(received_sizes))
    comm.all_to_all(received, sent, received_sizes, sent_sizes)
    traffic.bytes += (len(sent) - sent_sizes[comm.rank]) * sent.element_size()
    whole = received.new_empty(batch, local, sum(heads.q), dim)
    start = head = 0
    for ranks, count in _runs(heads.q):
        size = ranks * local * batch * count * dim
        piece = received[start : start + size].view(ranks, local, batch, count, dim)
        into = whole.narrow(2, head, ranks * count).view(batch, local, ranks, count, dim)
        into.copy_(piece.permute(2, 1, 0, 3, 4))
        start, head = start + size, head + ranks * count
    return whole.transpose(1, 2)


def unpack(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed ``(M, B, 2 * h, D)`` as k and v views ``(B, h, M, D)``."""
    k, v = kv.chunk(2, dim=2)
    return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


def _pack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads, *, fused: bool) -> torch.Tensor:
    """The flat send buffer: per destination ``[S][B][q | k | v heads][D]`` (fused), else ``[S][B][q heads][D] [M][B][k | v heads][D]``."""
    batch, _, q_count, dim = q.shape
    kv_count = k.shape[2]
    sent = q.new_empty(batch * dim * (q_count * sum(heads.q) + kv_count * 2 * sum(heads.kv)))
    start = q_head = kv_head = 0
    # Equal shares are neighbours and go in one strided copy per tensor: three launches, six where heads do not divide.
    for ranks, hq in _runs(heads.q):
        hkv = hq * sum(heads.kv) // sum(heads.q)
        border = q_count * batch * hq * dim
        size = border + kv_count * batch * 2 * hkv * dim
        chunk = sent[start : start + ranks * size].view(ranks, size)
        if fused:
            into = chunk.view(ranks, q_count, batch, hq + 2 * hkv, dim)
            into_q, into_kv = into[:, :, :, :hq], into[:, :, :, hq:]
        else:
            into_q = chunk[:, :border].unflatten(1, (q_count, batch, hq, dim))
            into_kv = chunk[:, border:].unflatten(1, (kv_count, batch, 2 * hkv, dim))
        _fill(into_q, q, q_head, ranks, hq)
        _fill(into_kv[:, :, :, :hkv], k, kv_head, ranks, hkv)
        _fill(into_kv[:, :, :, hkv:], v, kv_head, ranks, hkv)
        start, q_head, kv_head = start + ranks * size, q_head + ranks * hq, kv_head + ranks * hkv
    return sent


def _fill(into: torch.Tensor, tensor: torch.Tensor, head: int, ranks: int, count: int) -> None:
    """Copy ``ranks * count`` heads of ``(B, H, S, D)`` from ``head`` on into ``(ranks, S, B, count, D)``."""
    if into.numel():
        batch, heads, rows, dim = tensor.shape
        if ranks * count != heads:
            tensor = tensor.narrow(1, head, ranks * count)
        into.copy_(tensor.view(batch, ranks, count, rows, dim).permute(1, 3, 0, 2, 4))


def _runs(shares: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring ranks with equal shares, those without any left out: (ranks, share)."""
    begin = 0
    for rank in range(1, len(shares) + 1):
        if rank == len(shares) or shares[rank] != shares[begin]:
            if shares[begin]:
                yield rank - begin, shares[begin]
            begin = rank
