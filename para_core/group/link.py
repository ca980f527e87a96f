"""How fast the ranks of a communicator talk, and whether they do: measured by exchanging, once for each communicator.

Some machines say that their GPUs reach each other's memory when they do not (an IOMMU between them, a virtual machine, a driver).
NCCL believes it; then messages never arrive, or not as they were sent.
"""

from __future__ import annotations

import time

import torch

from ..sequence.mesh import Comm, Link
from .transport import REMEDY, CommunicationFailed

LARGE = 32 << 20  # bytes that each rank sends in all: so many that a fast link is busier than who launches
IN_A_ROW = 4  # exchanges between two looks at the clock: who waits for the device adds his own time only once
ROUNDS = 4
PATIENCE = 60.0  # seconds until the device must be done with a row; the first also connects the ranks


def measure(comm: Comm, device: torch.device) -> Link:
    """The link between the ranks of ``comm``, as seen from this one. Every rank must call it; the first round warms up.

    Raises CommunicationFailed where messages do not arrive within ``PATIENCE``, RuntimeError where they arrive changed.
    """
    return Link(latency=_seconds(comm, device, 1), rate=_each(comm, LARGE) * (comm.size - 1) / _seconds(comm, device, LARGE))


def _seconds(comm: Comm, device: torch.device, size: int) -> float:
    """Least seconds of an all-to-all in which each rank sends ``size`` bytes, in a row of such, as in a forward."""
    sizes = [_each(comm, size) if rank != comm.rank else 0 for rank in range(comm.size)]
    sent = torch.full((sum(sizes),), comm.rank + 1, dtype=torch.uint8, device=device)
    received = torch.zeros_like(sent)
    times = []
    for _ in range(ROUNDS + 1):
        _wait(comm)
        started = time.perf_counter()
        for _ in range(IN_A_ROW):
            comm.all_to_all(received, sent, sizes, sizes)
        _wait(comm)
        times.append((time.perf_counter() - started) / IN_A_ROW)
    arrived = [piece.aminmax() for piece in received.split(sizes) if piece.numel()]  # takes no memory beside the model's
    others = [rank + 1 for rank in range(comm.size) if rank != comm.rank]
    if [(int(low), int(high)) for low, high in arrived] != [(other, other) for other in others]:
        raise RuntimeError(f"messages between the GPUs arrive changed; {REMEDY}")
    return min(times[1:])


def _each(comm: Comm, size: int) -> int:
    """Bytes for each of the others."""
    return -(-size // (comm.size - 1))


def _wait(comm: Comm) -> None:
    try:
        comm.settle(PATIENCE)
    except CommunicationFailed as error:
        raise CommunicationFailed(f"messages between the GPUs do not arrive ({error}); {REMEDY}") from error
