"""The First Block Cache rule: when may the rest of a step be taken from the last computed one?

Rule of ParaAttention's First Block Cache (see README, "How it works"): R is what the first block adds to the image
tokens; a step is a hit when mean|R_prev - R| / mean|R_prev| is under the threshold, where R_prev belongs to the last
*computed* step of the same condition. A forward that carries several conditions is a hit only if all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..settings import Cache

RULES = ("classic", "forecast")  # the second one: forecast.py


@dataclass(frozen=True)
class Window:
    """The noise levels at which hits are allowed, ``end <= sigma <= start``."""

    start: float = math.inf
    end: float = 0.0

    def holds(self, sigma: float) -> bool:
        return self.end <= sigma <= self.start


@dataclass
class Condition:
    """What rank 0 remembers of one condition: the shape of its last computed forward, and of the hits since then how many
    there were and what rule ``forecast`` expects them to have done (see forecast.py)."""

    shape: Hashable
    hits: int = 0
    spent: float = 0.0


@dataclass(frozen=True)
class Record:
    """One forward for the report: noise level, what the rule judged each condition by (None: it knew too little), hit or not."""

    sigma: float
    changes: tuple[float | None, ...]
    hit: bool


@dataclass
class Decisions:
    """Rank 0's side of the rule for one sampling run: may this forward compare, may it hit, and what came of it."""

    settings: Cache
    window: Window
    conditions: dict[Hashable, Condition] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def known(self, shapes: Mapping[Hashable, Hashable]) -> bool:
        """True where every condition has a computed forward of its very shape (by key) to compare with."""
        return all(key in self.conditions and self.conditions[key].shape == shape for key, shape in shapes.items())

    def may_hit(self, keys: Iterable[Hashable]) -> bool:
        """At a noise level that ``window`` holds."""
        limit = self.settings.max_consecutive_hits
        return self.settings.threshold > 0 and all(limit < 0 or self.conditions[key].hits < limit for key in keys if key in self.conditions)

    def record(self, shapes: Mapping[Hashable, Hashable], sigma: float, changes: Sequence[float], hit: bool) -> None:
        """A forward of these conditions has run. ``changes``: one a condition, or none at all."""
        for key, shape in shapes.items():
            if hit:
                self.conditions[key].hits += 1
            else:
                self.conditions[key] = Condition(shape)
        self.records.append(Record(sigma, tuple(changes) or (None,) * len(shapes), hit))

    def forget(self) -> None:
        """Cold start: every condition is computed before it can hit again."""
        self.conditions.clear()


def change(difference: float, size: float) -> float:
    """mean|R_prev - R| / mean|R_prev| from the two sums; an R_prev of zero counts as an infinite change."""
    return difference / size if size > 0 else math.inf


def decide(changes: Sequence[float], threshold: float) -> bool:
    """A hit, if every change is strictly under the threshold (NaN never is)."""
    return all(value < threshold for value in changes)
