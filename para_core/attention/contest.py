"""Timing calls against each other: in rounds in which each has its turn, after rounds that do not count.

A card that nothing has loaded yet runs at a higher clock than in sampling, where power limits it. Of kernels that are timed one
after the other, the first looks fast for that reason alone; kernels that take turns on a warm card see the same clock.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Laps = Callable[[Sequence[Callable[[], object]]], list[float]]
"""Runs calls one after the other -> milliseconds of each."""

WARM = 150.0
"""Milliseconds of rounds that do not count: for power to limit the card's clock."""
SPENT = 250.0
"""Milliseconds of rounds that count."""
FEWEST, MOST = 3, 1000
"""Rounds that count, whatever they take."""
SHORT = 1.0
"""Milliseconds under which a call may wait for the processor that launches it."""


def contest(calls: Mapping[str, Callable[[], object]], laps: Laps, *, spent: float = SPENT, fewest: int = FEWEST) -> dict[str, list[float]]:
    """Milliseconds of each of ``calls`` in every round that counts. Raises what a call raises.

    spent: milliseconds of those rounds in all, but there are at least ``fewest``.
    """
    names = list(calls)
    for name in names:  # libraries initialise, and kernels are compiled; alone, so that one that fails does so here
        laps([calls[name]])
    round_trip = max(math.fsum(laps([calls[name] for name in names])), 1e-3)
    warm = min(MOST, math.ceil(WARM / round_trip) - 1)
    counted = max(fewest, min(MOST, int(spent / round_trip)))
    # in another order every round: what runs after a kernel that needs much power sees a lower clock
    turns = [name for number in range(warm + counted) for name in random.Random(number).sample(names, len(names))]
    times = laps([calls[name] for name in turns])
    found: dict[str, list[float]] = {name: [] for name in names}
    for name, time in itertools.islice(zip(turns, times, strict=True), warm * len(names), None):
        found[name].append(time)
    return found


def figures(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """One number for each: the median, and where calls are short what nine tenths of them exceed.

    A busy processor that launches late makes a short kernel look slow, never fast; but a few fast calls are not what it takes.
    """
    short = min((statistics.median(some) for some in times.values()), default=0.0) < SHORT
    return {name: sorted(some)[len(some) // 10] if short else statistics.median(some) for name, some in times.items()}


def cuda_laps(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """``Laps`` by the clock of a CUDA device, which works without a break: it is waited for at the end."""
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize(device)
    return [one.elapsed_time(other) for one, other in itertools.pairwise(marks)]
