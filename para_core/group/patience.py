"""How long rank 0 waits for workers, and in a step for those that beat but do not get on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .member import Member

_COMPUTED = 1.0  # seconds without a look, after which rank 0 has not been waiting but computing, or was stopped itself


@dataclass
class Timeouts:
    """Seconds. ``heartbeat``: silence in a run after which a worker counts as hung. ``idle``: without a run, then they leave.

    ``stuck``: that a step waits for a worker that beats but does not get on; at least ``slowest`` times the longest step so far.
    """

    start: float = 180.0
    join: float = 60.0
    load: float = 1800.0
    heartbeat: float = 20.0
    collective: float = 1800.0
    idle: float = 900.0
    stuck: float = 60.0
    slowest: float = 20.0


class Patience:
    """``limit``: seconds that the running step may wait, None: as long as it likes. Between steps nothing is expected."""

    def __init__(self) -> None:
        self.limit: float | None = None
        self._least = self._times = 0.0
        self._longest: float | None = None  # step of this run so far
        self._looked = self._waiting = 0.0

    def begin(self, least: float, times: float) -> None:
        """A run begins: steps wait ``least`` seconds, or ``times`` the longest one so far."""
        self._least, self._times, self._longest = least, times, None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step. The first one of a run, in which kernels are compiled and tried, waits as long as it likes."""
        began = time.monotonic()
        with self.within(self.of_a_step()):
            yield
        self._longest = max(self._longest or 0.0, time.monotonic() - began)

    def of_a_step(self) -> float | None:
        """Seconds; None in the first one of a run."""
        return None if self._longest is None else max(self._least, self._times * self._longest)

    @contextmanager
    def within(self, limit: float | None) -> Iterator[None]:
        """Around what waits ``limit`` seconds at a time."""
        self.limit = limit
        self._looked = self._waiting = time.monotonic()
        try:
            yield
        finally:
            self.limit = None

    def tried(self, members: Sequence[Member]) -> list[Member]:
        """For a rank that waits, every now and then: the members whose fault it is that nothing has happened for too long.

        They beat, but their main threads hang, while others wait for them. Where all wait, or a GPU hangs behind threads that have
        nothing more to do, nobody can tell whose fault it is: then it is all members.
        """
        limit, now = self.limit, time.monotonic()
        if now - self._looked > _COMPUTED:
            self._waiting = now
        self._looked = now
        if limit is None:
            return []
        still = [member for member in members if now - max(member.moved, self._waiting) > limit]
        if len(still) < len(members):
            return []
        return [member for member in still if not member.waits] or still
