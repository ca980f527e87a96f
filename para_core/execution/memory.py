"""How much of a whole forward's memory one card needs when a sequence is split: a bound on the safe side.

What a forward holds at its peak is of three kinds. Rows of the blocks: linear layers, norms and the residual stream, of this
card's rows only. Buffers of the exchange: Ulysses (arXiv 2309.14509) holds what it sends, what it receives and the attention of
its own heads over all rows; a ring (arXiv 2310.01889) keys and values twice, and partial results in float32. And what stays
whole: embedders and refiners before the blocks, rotary tables, and on the first card the gathered rows, the last layer and
unpatchify. The first two shrink with the card's share; the third does not, and each plan says how much it is (``Plan.outside``).
"""

from __future__ import annotations

from ..sequence.layout import balanced, weighted
from ..sequence.mesh import Degrees

ULYSSES = (0.2, 1.25)
RING = (0.35, 1.45)
"""Constant and slope over a card's share of rows and heads: no less than the live tensors of any model that
tests/families/test_memory.py builds in its real size need, in bf16, on 2 to 8 cards."""


def part(degrees: Degrees, rows: int, heads: int, outside: float, speeds: tuple[float, ...] | None = None) -> float:
    """Memory of the busiest card of ``degrees``'s sequence, over that of a forward on one card; at most 1.

    rows: pieces that the sequence can be cut into. outside: what the plan says. speeds: see ``Mesh``.
    """
    if degrees.sequence == 1:
        return 1.0
    shares = weighted(rows, speeds) if speeds else balanced(rows, degrees.sequence)
    most = max(shares) / max(1, rows)
    if degrees.ulysses > 1:
        by_rank = tuple(sum(speeds[rank :: degrees.ulysses]) for rank in range(degrees.ulysses)) if speeds else None
        own = weighted(heads, by_rank) if by_rank else balanced(heads, degrees.ulysses)
        most = max(most, max(own) / heads / degrees.ring)
    constant, slope = RING if degrees.ring > 1 else ULYSSES
    return min(1.0, max(outside, constant + slope * most))
