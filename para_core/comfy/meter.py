"""What a sampling run measures of itself: one entry for every noise level it visited."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ..cache.rule import Record
from ..stopwatch import Exchanged, Stopwatch

TIMED = 2
"""Visits without a hit, after the first and with known kernels, in which messages are timed on CUDA, where that takes two events each."""


@dataclass
class Visit:
    """One or several calls of the model that are computed together.

    ``messages``: laps of the exchange, None where it was not timed. ``whole``: False where a CUDA graph ran, or was captured,
    so that Python saw only part of what was sent.
    """

    sigma: torch.Tensor | None
    forwards: int
    records: list[Record]
    messages: tuple[int, int] | None = None
    sent: int = 0
    whole: bool = True


class Meter:
    """Times of one run. Nothing in it waits for the device before ``steps`` or ``exchange`` is read."""

    def __init__(self, device: torch.device):
        self.visits: list[Visit] = []
        self.exchanged = Exchanged(device)
        self._forwards = Stopwatch(device)
        self.opening: dict[str, float] = {}
        """Seconds that the other ranks took before the first step, by what for."""
        self.unsettled = False
        """Whether the next forward is the first with its attention kernels: messages then wait until the other ranks have loaded them."""
        self._cpu = device.type != "cuda"
        self._timed = 0
        self._started: float | None = None
        self._stopped: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time since the first forward began, or until ``stop``."""
        if self._started is None:
            return 0.0
        return (self._stopped or time.perf_counter()) - self._started

    def stop(self) -> None:
        """The result is there."""
        self._stopped = time.perf_counter()

    @contextmanager
    def open(self, what: str) -> Iterator[None]:
        """Around a part of ``opening``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.opening[what] = round(self.opening.get(what, 0.0) + time.perf_counter() - began, 2)

    @contextmanager
    def visit(self, sigma: torch.Tensor | None, forwards: int, records: list[Record]) -> Iterator[Visit]:
        """Around model calls that are computed together. ``records`` grows while they run."""
        if self._started is None:
            self._started = time.perf_counter()
        visit, known = Visit(sigma, forwards, []), len(records)
        exchanged = self.exchanged
        exchanged.timing = self._cpu or bool(self.visits) and not self.unsettled and self._timed < TIMED
        self.unsettled = False
        messages, sent = len(exchanged.watch), exchanged.bytes
        with self._forwards.lap():
            yield visit
        visit.records = records[known:]
        visit.sent = exchanged.bytes - sent
        if exchanged.timing:
            visit.messages = (messages, len(exchanged.watch))
            self._timed += not any(record.hit for record in visit.records)
        self.visits.append(visit)

    def steps(self) -> list[dict[str, Any]]:
        """Per noise level, in order: its seconds, forwards, the largest of what the cache judged by (None: nothing), and hits.

        Calls that follow each other at one level (conditions, or the second evaluation of a sampler like heun) are one entry.
        """
        sigmas = [0.0 if visit.sigma is None else float(visit.sigma.flatten()[0]) for visit in self.visits]
        entries = zip(sigmas, self._forwards.seconds(), self.visits, strict=True)
        found = []
        for sigma, group in groupby(entries, key=lambda entry: entry[0]):
            visits = list(group)
            records = [record for _, _, visit in visits for record in visit.records]
            changes = [change for record in records for change in record.changes if change is not None]
            found.append(
                {
                    "sigma": sigma,
                    "seconds": round(sum(seconds for _, seconds, _ in visits), 6),
                    "forwards": sum(visit.forwards for _, _, visit in visits),
                    "change": max(changes, default=None),
                    "decisions": len(records),
                    "hits": sum(record.hit for record in records),
                }
            )
        return found

    def exchange(self) -> dict[str, Any]:
        """What this rank sent a forward, in bytes, and the share of its forwards' time that exchanging took (None: unknown)."""
        whole = [(index, visit) for index, visit in enumerate(self.visits) if visit.whole]
        timed = [(index, *visit.messages) for index, visit in whole if visit.messages is not None]
        spent = math.fsum(second for _, start, stop in timed for second in self.exchanged.watch.seconds(start, stop))
        total = math.fsum(second for index, _, _ in timed for second in self._forwards.seconds(index, index + 1))
        return {
            "bytes": round(sum(visit.sent for _, visit in whole) / max(1, sum(visit.forwards for _, visit in whole))),
            "share": round(spent / total, 4) if total else None,
            "seconds": round(spent, 6),
            "of_seconds": round(total, 6),
        }
