"""The device's own clock, which nobody has to wait for; the processor's where there is no card."""

from __future__ import annotations

import time

import torch


def mark() -> torch.cuda.Event | float:
    """A point in the device's work, without waiting for it."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    """Seconds from one point to another; waits until both have passed."""
    if isinstance(before, float) or isinstance(after, float):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1e3
