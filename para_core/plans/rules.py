"""Rules several families share, for block arguments that a row cut does not describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plan import Rule, Segments

if TYPE_CHECKING:
    from ..sequence.cut import Cut


def ranges(segments: Segments, *, shifted_by_local: str | None = None) -> Rule:
    """Modulation ranges ``[(start, end, index), ...]`` over a block's sequence, from whole to local coordinates.

    shifted_by_local: the leading segment whose *local* length stock code has already added to every start but 0
    (the single blocks of FLUX); the rule restores the whole length first.
    """

    def rule(cut: Cut, value):
        total = sum(cut.lengths[name] for name in segments)
        shift = cut.lengths[shifted_by_local] - cut.rows[shifted_by_local][cut.rank] if shifted_by_local else 0
        local = []
        for start, end, index in value:
            start, end = start + shift if start else 0, total if end is None else end + shift
            whole = here = 0
            for name in segments:
                first, rows = cut.start(name), cut.rows[name][cut.rank]
                low, high = max(start - whole, first), min(end - whole, first + rows)
                if high > low:
                    local.append((here + low - first, here + high - first, index))
                whole, here = whole + cut.lengths[name], here + rows
        return local

    return rule


def frames(segment: str) -> Rule:
    """Per-frame modulation ``(B, frames, parts, C)`` that a block repeats over the tokens of each frame.

    Shards need not end at frame borders, so the rows are repeated here, over the whole length, and cut.
    """

    def rule(cut: Cut, value):
        if value.ndim < 4 or value.shape[1] == 1:
            return value

        def expand():
            per_frame = -(-cut.lengths[segment] // value.shape[1])
            whole = value.repeat_interleave(per_frame, dim=1)[:, : cut.lengths[segment]]
            return cut.local(whole, (segment,), 1)

        return cut.remember((id(value), segment), value, expand)

    return rule
