"""Measuring without making the device wait: how long parts of a run took, and what was sent to other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


class Stopwatch:
    """Laps of work on ``device``: wall time on the CPU, elsewhere the time between two CUDA events on the current stream.

    Taking a lap never waits for the device; ``seconds`` waits for the laps that it is asked for.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._laps: list[tuple[Any, Any]] = []

    def __len__(self) -> int:
        return len(self._laps)

    @contextmanager
    def lap(self) -> Iterator[None]:
        """What runs inside is a lap, unless it raises."""
        begin = self._mark()
        yield
        self._laps.append((begin, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: int = 0, stop: int | None = None) -> list[float]:
        """The laps ``start:stop`` in seconds."""
        laps = self._laps[start:stop]
        if self.device.type != "cuda":
            return [end - begin for begin, end in laps]
        for _, end in laps:
            end.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in laps]


class Exchanged:
    """What this rank has sent to others, and how long it was sending, receiving and waiting for them.

    ``bytes``: without reductions, which are a few numbers. ``timing``: whether messages are laps of ``watch``.
    """

    def __init__(self, device: torch.device):
        self.watch = Stopwatch(device)
        self.bytes = 0
        self.timing = False

    @contextmanager
    def message(self, sent: int) -> Iterator[None]:
        """Around what sends ``sent`` bytes, or waits for others."""
        self.bytes += sent
        timed = self.timing and not (self.watch.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        with self.watch.lap() if timed else nullcontext():
            yield
