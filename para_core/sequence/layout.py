"""Who holds which tokens: uneven shards of segments, and the order tokens have after an exchange.

A *segment* is a run of tokens of one kind (text, image, ...). Every segment is cut on its own, so a rank holds
``[its text rows, its image rows]``. After an all-to-all (or once round a ring) keys arrive rank by rank, each rank's
segments in joint order: the *rank-major* order, a permutation of the natural order. Attention without a causal mask
does not care, masks do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


def balanced(length: int, ranks: int) -> tuple[int, ...]:
    """Cut ``length`` rows into ``ranks`` shards that differ by at most one row, longer ones first."""
    base, rest = divmod(length, ranks)
    return tuple(base + (rank < rest) for rank in range(ranks))


def weighted(length: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Cut ``length`` rows in proportion to positive ``weights``, each share within one row of it (largest remainders).

    Where there are as many rows as ranks nobody gets none, whatever its weight: stock blocks do not take empty shards.
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights must be positive, got {list(weights)}")
    exact = [length * weight / sum(weights) for weight in weights]
    rows = [int(share) for share in exact]

    def excess(rank: int) -> float:
        return rows[rank] - exact[rank]

    for rank in sorted(range(len(rows)), key=excess)[: length - sum(rows)]:
        rows[rank] += 1
    while length >= len(rows) and 0 in rows:
        rows[max((rank for rank, count in enumerate(rows) if count > 1), key=excess)] -= 1
        rows[rows.index(0)] = 1
    return tuple(rows)


@dataclass(frozen=True)
class Joint:
    """The joint sequence one attention call works on.

    ``segments``: for each segment in joint order, its rows on each rank of the sequence group.
    """

    segments: tuple[tuple[int, ...], ...]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Joint rows on each rank."""
        return tuple(map(sum, zip(*self.segments, strict=True)))

    @cached_property
    def total(self) -> int:
        return sum(self.rows)

    @cached_property
    def rank_major(self) -> torch.Tensor:
        """Natural positions in rank-major order: int64 ``(total,)`` on the CPU."""
        ranks = len(self.segments[0])
        pieces: list[list[int]] = [[] for _ in range(ranks)]
        start = 0
        for rows in self.segments:
            for rank, count in enumerate(rows):
                pieces[rank] += range(start, start + count)
                start += count
        return torch.tensor([position for piece in pieces for position in piece], dtype=torch.int64)

    @cached_property
    def natural(self) -> bool:
        """True where the rank-major order is the natural order (a single segment, or a single rank)."""
        return len(self.segments) == 1 or len(self.segments[0]) == 1
