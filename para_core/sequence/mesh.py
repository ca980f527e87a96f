"""The ranks that share one forward, and the few collectives that sharding needs.

``Comm`` is a protocol so that the sequence and attention rooms know nothing of processes: ``para_core.group`` provides
one over gloo or NCCL, the tests one over threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch


class Comm(Protocol):
    """Collectives over one set of ranks. Tensors are contiguous and on the communicator's device.

    Calls block on the CPU and are ordered on the current stream on CUDA, those that are started ahead when they are waited
    for. Every rank makes the same calls in the same order. A failed peer raises ``RuntimeError``.
    """

    rank: int
    size: int

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]) -> None:
        """Send ``sent_sizes[r]`` elements of the flat ``sent`` to each rank r; fill the flat ``received`` in rank order.

        This rank's own piece is copied like the others', unless one of its two sizes is 0: then it is left alone, so that what
        stays here need not pass through the buffers.
        """

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> Callable[[], None]:
        """Begin ``all_to_all`` beside what is computed next; the returned call waits for it. Both tensors are its own until then."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum ``tensor`` over the ranks, in place."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Overwrite ``tensor`` with rank ``root``'s."""

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for what was enqueued, for a peer that hangs not longer than patience lasts: before numbers are read from a device.

        timeout_s: patience with the device; None: the communicator's own.
        """

    def shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Callable[[], None]:
        """Start sending ``sent`` to rank ``to`` and receiving ``received`` from ``source``; the returned call waits for both.

        Empty tensors are not sent (both ends know the sizes).
        """


@dataclass(frozen=True)
class Degrees:
    """How ranks share a forward: ``batch * ring * ulysses`` ranks, Ulysses neighbours next to each other."""

    batch: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        return self.batch * self.sequence


def replica_speeds(speeds: Sequence[float] | None, degrees: Degrees, replica: int) -> tuple[float, ...] | None:
    """Of every rank's ``speeds`` (None: alike) those of a replica of ``degrees``, for its ``Mesh``; None where these are alike."""
    first = replica * degrees.sequence
    own = tuple(speeds[first : first + degrees.sequence]) if speeds else ()
    return own if len(set(own)) > 1 else None


@dataclass(frozen=True)
class Link:
    """Between ranks: seconds that a collective takes whatever its size, and bytes a second that each rank sends."""

    latency: float
    rate: float


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the ranks that share its sequence.

    Rank r of ``sequence`` is rank ``r % ulysses.size`` of its ``ulysses`` group and rank ``r // ulysses.size`` of its
    ``ring`` group. ``speeds``: of every rank of ``sequence``, in any unit, for shares in proportion; None: even shares.
    """

    sequence: Comm
    ulysses: Comm
    ring: Comm
    speeds: tuple[float, ...] | None = None

    @cached_property
    def head_speeds(self) -> tuple[float, ...] | None:
        """Speed of each rank of a Ulysses group, for shares of heads: the same in all groups, which a ring joins head by head."""
        size = self.ulysses.size
        return None if self.speeds is None else tuple(sum(self.speeds[rank::size]) for rank in range(size))
