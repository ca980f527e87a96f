"""Bytes that one attention call sends, counted on ranks that are threads, against the published formula."""

from __future__ import annotations

import torch
from unit.fake_comm import fake_meshes, on_ranks

from para_core.attention.choice import Chooser, ChosenKernel
from para_core.attention.exchange import Exchange, attend
from para_core.attention.traffic import Traffic
from para_core.sequence.layout import Joint, balanced

ROWS, HEADS, DIM = 1152, 24, 16


def sent(ulysses: int, ring: int) -> int:
    """Bytes that rank 0 sends for one float32 call on ``ulysses * ring`` ranks."""
    ranks = ulysses * ring
    rows = balanced(ROWS, ranks)

    meshes = fake_meshes(ring, ulysses)

    def run(rank: int) -> int:
        mesh = meshes[rank]
        joint = Joint((rows,))
        exchange = Exchange(mesh, joint, joint, ChosenKernel(Chooser("exact")))
        shape = (1, HEADS, rows[mesh.sequence.rank], DIM)
        attend(exchange, *(torch.randn(shape) for _ in range(3)))
        return exchange.traffic.bytes

    return on_ranks(ranks, run)[0]


def measure() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for ulysses, ring in ((2, 1), (1, 2), (4, 1), (1, 4), (2, 2)):
        formula = Traffic.expected(ROWS, HEADS * DIM, 4, ulysses=ulysses, ring=ring)
        rows.append({"measure": f"bytes sent, ulysses {ulysses} x ring {ring}", "bytes": sent(ulysses, ring), "formula": round(formula)})
    return rows
