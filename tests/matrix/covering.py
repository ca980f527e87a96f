"""Runs that cover every allowed pair of values of any two axes: a greedy covering array (as AETG, IEEE TSE 23(7), 1997)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Value = tuple[str, str]
"""An axis, and one of its values."""
Excluded = Callable[[Value, Value], str]
"""Why two values of different axes cannot meet, "" if they can; the order of the two does not matter."""


def pairs(axes: Mapping[str, Sequence[str]], excluded: Excluded) -> dict[Value, dict[Value, str]]:
    """For each value all values of other axes that it can meet, or why it cannot."""
    values = [(axis, value) for axis, held in axes.items() for value in held]
    found: dict[Value, dict[Value, str]] = {value: {} for value in values}
    for one, other in itertools.combinations(values, 2):
        if one[0] != other[0]:
            found[one][other] = found[other][one] = excluded(one, other)
    return found


def covering(axes: Mapping[str, Sequence[str]], excluded: Excluded, seed: int = 0, tries: int = 4) -> list[dict[str, str]]:
    """Runs (axis -> value), the same for the same seed, in the order of the first axis.

    Values of the first axis may exclude others, and the first value of every other axis meets them all, so that a run can
    always be completed.
    """
    rng = random.Random(seed)
    table = pairs(axes, excluded)
    missing = {value: {other for other, reason in others.items() if not reason} for value, others in table.items()}
    runs = []
    while begin := max(missing, key=lambda value: len(missing[value])):
        if not missing[begin]:
            break
        best: dict[str, str] = {}
        most = 0
        for _ in range(tries):
            run = _run(axes, table, missing, begin, rng)
            new = sum(other in missing[one] for one, other in itertools.combinations(run.items(), 2))
            if new > most:
                best, most = run, new
        for one, other in itertools.permutations(best.items(), 2):
            missing[one].discard(other)
        runs.append({axis: best[axis] for axis in axes})
    first = next(iter(axes))
    return sorted(runs, key=lambda run: axes[first].index(run[first]))


def _run(axes, table, missing, begin: Value, rng: random.Random) -> dict[str, str]:
    """One run with ``begin`` and a value that it still has to meet; the rest is chosen for most new pairs."""
    run = dict([begin, rng.choice(sorted(missing[begin]))])
    rest = [axis for axis in axes if axis not in run]
    rng.shuffle(rest)
    for axis in sorted(rest, key=next(iter(axes)).__ne__):
        able = [value for value in axes[axis] if not any(table[axis, value][held] for held in run.items())]
        scores = {value: sum(held in missing[axis, value] for held in run.items()) for value in able}
        top = max(scores.values())
        run[axis] = rng.choice([value for value, score in scores.items() if score == top])
    return run
