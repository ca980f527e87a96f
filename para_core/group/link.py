"""How fast the ranks of a communicator talk: measured by exchanging, once for each communicator."""

from __future__ import annotations

import time

import torch

from ..sequence.mesh import Comm, Link

LARGE = 16 << 20  # bytes that each rank sends to each other one: what an attention call of a large picture sends
ROUNDS = 4


def measure(comm: Comm, device: torch.device) -> Link:
    """The link between the ranks of ``comm``, as seen from this one. Every rank must call it; the first round warms up."""
    return Link(latency=_seconds(comm, device, 1), rate=LARGE * (comm.size - 1) / _seconds(comm, device, LARGE))


def _seconds(comm: Comm, device: torch.device, size: int) -> float:
    """Least seconds of an all-to-all of ``size`` bytes to each rank."""
    sizes = [size] * comm.size
    sent, received = (torch.zeros(size * comm.size, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        started = time.perf_counter()
        comm.all_to_all(received, sent, sizes, sizes)
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
