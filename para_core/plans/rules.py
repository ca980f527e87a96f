"""Rules several families share, for block arguments that a row cut does not describe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .plan import PlanError, Rule, Segments, Unit

if TYPE_CHECKING:
    from ..sequence.cut import Cut

LARGEST_MASK = 4 << 30  # bytes


def ranges(segments: Segments, *, shifted_by_local: str | None = None) -> Rule:
    """Modulation ranges ``[(start, end, index), ...]`` over a block's sequence, from whole to local coordinates.

    An index that is a tensor holds one for each row of its range, and is cut with it.
    shifted_by_local: the leading segment whose length *between blocks* stock code has already added to every start but 0
    (the single blocks of FLUX); where that was the local length, the rule restores the whole one first.
    """

    def rule(cut: Cut, value):
        total = sum(cut.lengths[name] for name in segments)
        shift = 0
        if shifted_by_local and shifted_by_local not in cut.regathered:
            shift = cut.lengths[shifted_by_local] - cut.rows[shifted_by_local][cut.rank]
        local = []
        for start, end, index in value:
            start, end = start + shift if start else 0, total if end is None else end + shift
            whole = here = 0
            for name in segments:
                first, rows = cut.start(name), cut.rows[name][cut.rank]
                low, high = max(start - whole, first), min(end - whole, first + rows)
                if high > low:
                    each = getattr(index, "ndim", 0)
                    own = index[low + whole - start : high + whole - start] if each else index
                    local.append((here + low - first, here + high - first, own))
                whole, here = whole + cut.lengths[name], here + rows
        return local

    return rule


def frames(segment: str) -> Rule:
    """Per-frame modulation ``(B, frames, parts, C)`` that a block repeats over the tokens of each frame.

    Shards need not end at frame borders: then the rows of the frames that are here are repeated by the rule, and cut.
    """

    def rule(cut: Cut, value):
        if value.ndim < 4 or value.shape[1] == 1:
            return value

        def expand():
            per_frame = -(-cut.lengths[segment] // value.shape[1])
            start, rows = cut.start(segment), cut.rows[segment][cut.rank]
            first, last = start // per_frame, -(-(start + rows) // per_frame)
            here = value[:, first:last]
            if start == first * per_frame and rows == (last - first) * per_frame:
                return here
            return here.repeat_interleave(per_frame, dim=1).narrow(1, start - first * per_frame, rows)

        return cut.remember((id(value), segment), value, expand)

    return rule


def index(segment: str) -> Rule:
    """A position in ``segment`` at which something changes: the number of this rank's rows before it."""

    def rule(cut: Cut, value):
        return max(0, min(value - cut.start(segment), cut.rows[segment][cut.rank]))

    return rule


def image_slice(segment: str) -> Rule:
    """``img_slice`` of the transformer options, where text and image are one ``segment``: which of this rank's rows are image.

    Patches that are given whole tokens find the whole one in the cut.
    """
    local = index(segment)

    def rule(cut: Cut, value):
        if "img_slice" not in value:
            return value
        cut.image_slice = value["img_slice"]
        return {**value, "img_slice": [local(cut, row) for row in cut.image_slice]}

    return rule


def crop(segment: str) -> Rule:
    """The number of rows of ``segment`` that take part in attention, the first ones: how many of this rank's do."""

    def rule(cut: Cut, value):
        local, start = [], 0
        for rows in cut.rows[segment]:
            local.append(max(0, min(value - start, rows)))
            start += rows
        cut.attend(segment, tuple(local))
        return local[cut.rank]

    return rule


def spans(segment: str) -> Rule:
    """Ranges ``[(start, end), ...]`` of rows of ``segment``, in local coordinates; those without rows here are left out."""

    def rule(cut: Cut, value):
        start, rows = cut.start(segment), cut.rows[segment][cut.rank]
        local = [(max(low - start, 0), min(high - start, rows)) for low, high in value]
        return [(low, high) for low, high in local if high > low]

    return rule


def whole_frames(argument: str, rows: int) -> Unit:
    """Shards of whole frames: the tokens of a frame, of which ``argument`` holds ``rows`` rows each in dim 1."""

    def unit(get, length: int) -> int:
        value = get(argument)
        return 1 if value is None else length // (value.shape[1] // rows)

    return unit


def per_frame(segment: str, rows: int) -> Rule:
    """What holds ``rows`` rows a frame (dim 1), for the frames whose tokens are here; None where there are none."""

    def rule(cut: Cut, value):
        tokens = cut.lengths[segment] // (value.shape[1] // rows)
        first, count = cut.start(segment) // tokens, cut.rows[segment][cut.rank] // tokens
        return value[:, first * rows : (first + count) * rows] if count else None

    return rule


def compressed(segment: str) -> Rule:
    """Modulation with one row a token, one for all, or LTX-2's object with one a frame; that stays one a frame where it can."""

    def rule(cut: Cut, value):
        if not hasattr(value, "patches_per_frame"):
            return cut.table(value, (segment,), 1)
        tokens, rows = value.patches_per_frame, cut.rows[segment]
        if value.num_frames * tokens == 1:
            return value

        def make():
            if all(count % tokens == 0 for count in rows):
                first, count = cut.start(segment) // tokens, rows[cut.rank] // tokens
                return type(value)(value.data[:, first : first + count], tokens, per_frame=True)
            return type(value)(cut.local(value.expand(), (segment,), 1), None)

        return cut.remember((id(value), segment), value, make)

    return rule


def guide_mask(cut: Cut, value):
    """LTX's guide mask, kept in two parts that go with two calls on ranges of queries, as one mask (1, 1, S, S) over all tokens.

    Stock forbids kernels that quantise in those calls. Raises PlanError where that would be huge.
    """

    def dense():
        total = value.noisy_mask.shape[-1]
        if total * total * value.noisy_mask.element_size() > LARGEST_MASK:
            raise PlanError(f"a mask of guide strengths over {total} tokens would be too large on every GPU")
        start, stop = value.guide_start, value.guide_start + value.tracked_count
        mask = value.noisy_mask.new_zeros(1, 1, total, total)
        mask[:, :, :start] = value.noisy_mask
        mask[:, :, start:stop] = value.tracked_mask
        return mask

    cut.exact = True
    return cut.remember((id(value), "guide"), value, dense)
