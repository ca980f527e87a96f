"""How fast the ranks of a communicator talk: measured by exchanging, once for each communicator."""

from __future__ import annotations

import time

import torch

from ..sequence.mesh import Comm, Link

LARGE = 32 << 20  # bytes that each rank sends in all: so many that a fast link is busier than who launches
IN_A_ROW = 4  # exchanges between two looks at the clock: who waits for the device adds his own time only once
ROUNDS = 4


def measure(comm: Comm, device: torch.device) -> Link:
    """The link between the ranks of ``comm``, as seen from this one. Every rank must call it; the first round warms up."""
    return Link(latency=_seconds(comm, device, 1), rate=_each(comm, LARGE) * (comm.size - 1) / _seconds(comm, device, LARGE))


def _seconds(comm: Comm, device: torch.device, size: int) -> float:
    """Least seconds of an all-to-all in which each rank sends ``size`` bytes, in a row of such, as in a forward."""
    sizes = [_each(comm, size) if rank != comm.rank else 0 for rank in range(comm.size)]
    sent, received = (torch.zeros(sum(sizes), dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        started = time.perf_counter()
        for _ in range(IN_A_ROW):
            comm.all_to_all(received, sent, sizes, sizes)
        _wait(device)
        times.append((time.perf_counter() - started) / IN_A_ROW)
    return min(times[1:])


def _each(comm: Comm, size: int) -> int:
    """Bytes for each of the others."""
    return -(-size // (comm.size - 1))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
