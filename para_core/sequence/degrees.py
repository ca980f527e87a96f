"""How many ranks share a batch, a ring and the heads: what the user asked for, fitted to what there is."""

from __future__ import annotations

from .mesh import Degrees


def choose(
    ranks: int,
    *,
    batch: int = 0,
    ring: int = 0,
    ulysses: int = 0,
    rows: int = 1,
    heads: int = 1,
    tokens: int | None = None,
    log_sum_exp: bool = True,
) -> tuple[Degrees, str]:
    """Degrees for a forward of ``rows`` batch rows on at most ``ranks`` ranks, and a sentence ("" if nothing was changed).

    0 means choose: batch first, then Ulysses up to the number of heads, ring for the rest. Without ``log_sum_exp``
    (the local kernel cannot say its log-sum-exp) there is no ring. Given degrees that do not fit are lowered. ``tokens``:
    length of the shortest segment (None: long enough), of which every rank needs a row: stock blocks do not take none.
    """
    asked = (batch, ring, ulysses)
    notes = []
    if batch > rows:
        notes.append(f"batch degree {batch} is more than there are prompts and images in the batch ({rows})")
        batch = rows
    if ulysses > heads:
        notes.append(f"Ulysses degree {ulysses} is more than there are attention heads ({heads})")
        ulysses = heads
    if ring > 1 and not log_sum_exp:
        notes.append("the attention backend gives no log-sum-exp, which ring attention needs")
        ring = 1
    if max(batch, 1) * max(ring, 1) * max(ulysses, 1) > ranks:
        notes.append(f"{' x '.join(str(degree or 1) for degree in (batch, ring, ulysses))} ranks were asked for and there are {ranks}")
        ulysses = min(ulysses, ranks)
        batch = min(batch, max(1, ranks // max(ulysses, 1)))
        ring = min(ring, max(1, ranks // max(ulysses, 1) // max(batch, 1)))
    if tokens is not None and max(ring, 1) * max(ulysses, 1) > tokens:
        notes.append(f"ring x ulysses = {max(ring, 1)} x {max(ulysses, 1)} is more than the {tokens} tokens of the shortest segment")
        ulysses = min(ulysses, tokens)
        ring = min(ring, tokens // max(ulysses, 1))
    left = ranks // (max(batch, 1) * max(ring, 1) * max(ulysses, 1))
    if not batch:
        batch = max(divisor for divisor in range(1, left + 1) if left % divisor == 0 and divisor <= rows)
        left //= batch
    most = left if tokens is None else tokens // (max(ring, 1) * max(ulysses, 1))
    if left > most and not (ring and ulysses):
        notes.append(f"the shortest segment has only {tokens} tokens")
        left = most
    if not ulysses:
        ulysses = max(divisor for divisor in range(1, left + 1) if left % divisor == 0 and (divisor <= heads))
        if not log_sum_exp or ring:
            ulysses = min(left, heads)
        left //= ulysses
    if not ring:
        ring = left if log_sum_exp else 1
    degrees = Degrees(batch=batch, ring=ring, ulysses=ulysses)
    if notes and asked != (degrees.batch, degrees.ring, degrees.ulysses):
        why = " and ".join(notes)
        running = f"{degrees.batch} x {degrees.ring} x {degrees.ulysses}"
        return degrees, f"{why[0].upper()}{why[1:]}: running batch x ring x ulysses = {running}."
    return degrees, ""
