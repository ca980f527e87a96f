"""Forwards that rank 0 has launched, and whose end nobody has waited for yet."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

AHEAD = 1
"""Forwards under way when the next one is launched, at most: that is enough for the device to always have something to do."""


@dataclass(frozen=True)
class Flight:
    """``reached``: the end of the forward on the device; None on the CPU, where it has ended. ``patience``: seconds that it may take."""

    reached: torch.cuda.Event | None
    patience: float
    begun: float

    def overdue(self) -> bool:
        return time.monotonic() > self.begun + self.patience and self.reached is not None and not self.reached.query()


class Flights:
    """In the order of their launch. ``overdue`` is for any thread, the rest for the one that launches."""

    def __init__(self) -> None:
        self._held: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._held)

    def begin(self, reached: torch.cuda.Event | None, patience: float) -> None:
        self._held.append(Flight(reached, patience, time.monotonic()))

    @property
    def first(self) -> torch.cuda.Event | None:
        """The end of the earliest one."""
        return self._held[0].reached

    def landed(self) -> None:
        """The earliest one has ended."""
        self._held.popleft()

    def clear(self) -> None:
        self._held.clear()

    def overdue(self) -> float | None:
        """The patience of one that has lasted longer."""
        return next((flight.patience for flight in self._held.copy() if flight.overdue()), None)
