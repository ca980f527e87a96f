"""Unified attention: Ulysses inside a group of neighbours, a ring across the groups (USP, arXiv 2405.07719)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..sequence.mesh import Mesh
from . import ring, ulysses
from .beside import Beside
from .kernel import Kernel
from .message import PARTS, ROWS, Form
from .traffic import Traffic


def attend(
    mesh: Mesh,
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_rows: Sequence[int],
    kv_rows: Sequence[int],
    heads: ulysses.Heads,
    mask: torch.Tensor | None,
    scale: float | None,
    traffic: Traffic,
    trades: ulysses.Trades,
    wire: Form | None = None,
    beside: Beside | None = None,
) -> torch.Tensor:
    """q ``(B, H, S, D)``, k and v ``(B, Hkv, M, D)`` of this rank's rows -> ``(B, H, S, D)``, memory ``(B, S, H, D)``.

    ``q_rows``, ``kv_rows``: rows on each rank of ``mesh.sequence``. ``mask``: ``(B|1, own heads|1, group rows|1, M_total)``.
    ``wire``: the form of what travels; k and v are written twice, in the group and for the ring. ``beside``: computed while
    messages of Ulysses travel.
    """
    size = mesh.ulysses.size
    group = slice(mesh.ring.rank * size, (mesh.ring.rank + 1) * size)
    form = wire or (ROWS if q_rows[group] == kv_rows[group] else PARTS)
    rows_of_all = tuple(q_rows[group]), tuple(kv_rows[group])
    trade = ulysses.kept(trades, form, mesh.ulysses.rank, q.shape[0], q.shape[3], *rows_of_all, heads)
    ahead = beside is not None
    arrive = ulysses.scatter(mesh.ulysses, trade, q, k, v, traffic, ahead=ahead)
    if beside is not None:
        beside.there()
    tensors = arrive()
    blocks = [sum(kv_rows[start : start + size]) for start in range(0, len(kv_rows), size)]
    out = ring.attend(mesh.ring, kernel, *tensors, kv_rows=blocks, mask=mask, scale=scale, traffic=traffic, wire=wire)
    whole = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    finish = ulysses.gather(mesh.ulysses, trade, out, whole, traffic, ahead=ahead)
    if beside is not None:
        beside.back()
    finish()
    return whole.transpose(1, 2)
