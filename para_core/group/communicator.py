"""Collectives over gloo (CPU) or NCCL (CUDA), in groups of their own that can be aborted and made again.

The default process group is never touched: other packs may own it. Ranks meet in a file, so nothing listens for newcomers;
what gloo and NCCL listen on is bound to the loopback interface.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..sequence.mesh import Degrees, Mesh, replica_speeds
from ..stopwatch import Exchanged
from .codec import as_bytes
from .gloo import Gloo
from .nccl import Nccl, apart, publish_id, roomy
from .transport import LOOK, CommunicationFailed, Life, Transport

__all__ = ["CommunicationFailed", "Communicator", "Meshes"]


_SPIN = 0.005  # seconds for which ``settle`` looks without pause: short waits stay as short as the device's own


class Communicator:
    """``para_core.sequence.mesh.Comm`` between processes. Made by ``join`` and ``split``.

    rank, size: within this communicator. ranks: its members' ranks in the joined one. device: where its tensors live.

    Collectives are for one thread at a time; ``abort`` is for any. Failures raise ``CommunicationFailed`` (a RuntimeError).
    On CUDA collectives only enqueue on the current stream: a failed peer shows as a stream that does not finish, which
    ``settle`` turns into the error.
    """

    def __init__(self, rank: int, ranks: Sequence[int], device: torch.device, store: dist.Store | None, timeout_s: float, life: Life):
        self.rank = rank
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.device = device
        self._store = store
        self._timeout_s = timeout_s
        self._life = life
        self._subgroups: dict[tuple[int, ...], Communicator] = {self.ranks: self}
        self._transport: Transport | None = None

    @classmethod
    def join(
        cls,
        store: str | Path | dist.Store,
        name: str,
        rank: int,
        size: int,
        device: torch.device | str,
        timeout_s: float,
        join_timeout_s: float = 60.0,
        on_wait: Callable[[], None] | None = None,
    ) -> Communicator:
        """Meet the other ranks under ``name``, which is never used twice, in a store or the file at that path.

        timeout_s: longest a collective may take. on_wait: called every 100 ms while this rank waits for others, here and in
        collectives; what it raises ends the wait. Raises ``CommunicationFailed`` if not all come within ``join_timeout_s``.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        life = Life()
        life.on_wait = on_wait
        if size == 1:
            return cls(0, (0,), device, None, timeout_s, life)
        if not isinstance(store, dist.Store):
            store = dist.FileStore(str(store))
        store = dist.PrefixStore(name, store)
        store.set_timeout(timedelta(seconds=join_timeout_s))
        communicator = cls(rank, range(size), device, store, timeout_s, life)
        communicator._open("world", join_timeout_s)
        return communicator

    @property
    def aborted(self) -> bool:
        return self._life.aborted

    @property
    def progress(self) -> tuple[int, bool]:
        """How many collectives this rank has finished (on CUDA: enqueued), and whether it is in one. For any thread."""
        return self._life.done, self._life.waiting

    def measure(self, exchanged: Exchanged | None) -> None:
        """Count and time there what this rank sends from now on, in subgroups too."""
        self._life.exchanged = exchanged

    def split(self, ranks: Sequence[int]) -> Communicator:
        """The communicator of these ``ranks`` of this one, in that order; this rank must be one of them.

        Collective over ``ranks`` the first time, at once afterwards.
        """
        key = tuple(ranks)
        known = self._subgroups.get(key)
        if known is None:
            known = Communicator(key.index(self.rank), key, self.device, self._store, self._timeout_s, self._life)
            known._open("-".join(map(str, key)), self._timeout_s)
            self._subgroups[key] = known
        return known

    def _open(self, name: str, timeout_s: float) -> None:
        self._life.check()
        if self.size == 1:
            return
        assert self._store is not None
        store = dist.PrefixStore(f"{name}/", self._store)
        if self.device.type == "cuda":
            _tell_nccl()
            publish_id(store, self.rank)
        self._meet(store, timeout_s)
        deadline = time.monotonic() + timeout_s  # from here on it is the connection's time
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # NCCL takes its buffers beside torch's allocator, which may keep all memory that is free
            self._transport = Nccl(store, self.rank, self.size, self.device, self._life, deadline)
        else:
            self._transport = Gloo(store, self.rank, self.size, self._timeout_s, self._life, deadline)
        self._life.transports.append(self._transport)
        if self._life.aborted:  # by another thread, which did not see the new transport
            self._transport.abort()

    def _meet(self, store: dist.Store, timeout_s: float) -> None:
        """Wait for all members. The backends then connect within milliseconds; a wait of their own could not be ended."""
        store.set(f"here{self.rank}", "1")
        deadline = time.monotonic() + timeout_s
        pause = 0.001
        while not store.check([f"here{rank}" for rank in range(self.size)]):
            self._life.check()
            if time.monotonic() > deadline:
                absent = [self.ranks[rank] for rank in range(self.size) if not store.check([f"here{rank}"])]
                raise CommunicationFailed(f"rank {', '.join(map(str, absent))} did not join within {timeout_s:g} s", absent)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    # Every dtype travels as bytes: gloo knows few of them.

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]) -> None:
        self._all_to_all(received, sent, received_sizes, sent_sizes, ahead=False)()

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int]
    ) -> Callable[[], None]:
        return self._all_to_all(received, sent, received_sizes, sent_sizes, ahead=True)

    def _all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: Sequence[int], sent_sizes: Sequence[int], *, ahead: bool
    ) -> Callable[[], None]:
        transport = self._transport
        if transport is None:
            if received_sizes[0] and sent_sizes[0]:
                received.copy_(sent)
            return lambda: None
        width = sent.element_size()
        inward, outward = [size * width for size in received_sizes], [size * width for size in sent_sizes]
        leaving = sum(outward) - outward[self.rank]

        def start() -> Any:
            return transport.start_all_to_all(self._bytes(received), self._bytes(sent), inward, outward, ahead=ahead)

        if ahead:
            work = self._exchange(start, leaving)
            return lambda: self._exchange(lambda: transport.finish(work))
        self._exchange(lambda: transport.finish(start()), leaving)
        return lambda: None

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._run(lambda transport: transport.start_all_reduce(self._usable(tensor)))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        if tensor.numel():
            leaving = tensor.numel() * tensor.element_size() * (self.size - 1) if self.rank == root else 0
            self._run(lambda transport: transport.start_broadcast(self._bytes(tensor), root), leaving)

    def shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Callable[[], None]:
        if self._transport is None:
            received.copy_(sent)
            return lambda: None
        transport = self._transport
        leaving = sent.numel() * sent.element_size()
        work = self._exchange(lambda: transport.start_shift(self._bytes(sent), to, self._bytes(received), source), leaving)
        return lambda: self._exchange(lambda: transport.finish(work))

    def _usable(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_contiguous() or tensor.device != self.device:
            raise ValueError(f"collectives need contiguous tensors on {self.device}")
        return tensor

    def _bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        return as_bytes(self._usable(tensor))

    def _run(self, start: Callable[[Transport], Any], leaving: int = 0) -> None:
        transport = self._transport
        if transport is None:
            self._life.check()
        else:
            self._exchange(lambda: transport.finish(start(transport)), leaving)

    def _exchange(self, act: Callable[[], Any], leaving: int = 0) -> Any:
        """``act``, which sends ``leaving`` bytes or waits for other ranks, measured where someone wants to know."""
        exchanged = self._life.exchanged
        if exchanged is None:
            return self._guard(act)
        with exchanged.message(leaving):
            return self._guard(act)

    def _guard(self, act: Callable[[], Any]) -> Any:
        self._life.check()
        self._life.waiting = True
        try:
            return act()
        except BaseException:
            # A peer may be waiting for this rank, not for the one that failed: pass it on.
            self.abort()
            raise
        finally:
            self._life.waiting = False
            self._life.done += 1

    def mark(self) -> torch.cuda.Event | None:
        """What was enqueued on the current CUDA stream so far, for ``settle``; None on the CPU, where nothing is."""
        if self.device.type != "cuda":
            return None
        reached = torch.cuda.Event()
        reached.record(torch.cuda.current_stream(self.device))
        return reached

    def settle(self, timeout_s: float | None = None, reached: torch.cuda.Event | None = None) -> None:
        """Block until what was enqueued on the current CUDA stream is done, or only that up to ``reached``; at once on the CPU.

        Raises ``CommunicationFailed`` once aborted or after ``timeout_s`` (default: the communicator's).
        """
        reached = reached or self.mark()
        if reached is not None:
            end = reached
            self._guard(lambda: self._await(end, self._timeout_s if timeout_s is None else timeout_s))

    def _await(self, reached: torch.cuda.Event, timeout_s: float) -> None:
        begin = look = time.monotonic()
        while not reached.query():
            now = time.monotonic()
            if now > begin + timeout_s:
                raise CommunicationFailed(f"the GPU did not finish within {timeout_s:g} s")
            if now > look + LOOK:
                look = now
                self._life.check()
                for transport in self._life.transports:
                    transport.check()
            if now > begin + _SPIN:
                time.sleep(0.0001)
        self._life.check()  # what an abort has ended has not been done

    def abort(self) -> None:
        """Make pending and later collectives of this communicator and all its subgroups fail, here and at the peers.

        For any thread; may be called again. A peer that hears of it only through its sockets may, in the middle of a large
        gloo message, wait for its timeout: tell it to abort too.
        """
        self._life.aborted = True
        for transport in list(self._life.transports):
            transport.abort()

    def close(self) -> None:
        """Let go of connections, of all subgroups too. Nothing may be pending anywhere unless it was aborted."""
        self._life.aborted = True
        while self._life.transports:
            self._life.transports.pop().close()
        self._life.gloo_device = None


class Meshes:
    """Meshes over the first ranks of ``world``, made at first use and kept.

    World rank w sits in batch part ``w // degrees.sequence``; within it ``Mesh`` says where.
    """

    def __init__(self, world: Communicator):
        self.world = world
        self._meshes: dict[tuple[Degrees, tuple[float, ...]], Mesh | None] = {}

    def mesh(self, degrees: Degrees, speeds: Sequence[float] = ()) -> Mesh | None:
        """This rank's mesh, or None if the degrees need fewer ranks. Every rank asks for the same meshes in the same order.

        speeds: of all ranks of ``world``, where they are unequal. Raises ``ValueError`` if they need more ranks than there are.
        """
        if degrees.world > self.world.size:
            raise ValueError(f"{degrees} need {degrees.world} ranks, there are {self.world.size}")
        key = degrees, tuple(speeds)
        if key not in self._meshes:
            self._meshes[key] = self._make(*key) if self.world.rank < degrees.world else None
        return self._meshes[key]

    def _make(self, degrees: Degrees, speeds: tuple[float, ...]) -> Mesh:
        part, place = divmod(self.world.rank, degrees.sequence)
        first = part * degrees.sequence
        row, column = divmod(place, degrees.ulysses)
        return Mesh(
            sequence=self.world.split(range(first, first + degrees.sequence)),
            ulysses=self.world.split(range(first + row * degrees.ulysses, first + (row + 1) * degrees.ulysses)),
            ring=self.world.split(range(first + column, first + degrees.sequence, degrees.ulysses)),
            speeds=replica_speeds(speeds, degrees, part),
        )


def _tell_nccl() -> None:
    """Before a process's first communicator: what NCCL can be told in no other way. The user's own choice stays, on every rank.

    Its bootstrap would listen on an interface of its choice. And it would send straight from captured buffers where it can, which
    hangs with torch's expandable segments (pytorch issue 158029), and does not fit a rank whose own capture has failed. GPUs
    that do not reach each other's memory share the host's, by default in a new way that fails there with many drivers ("peer access
    is not supported", nccl issue 1838): the old way needs nothing but room. Elsewhere the new one ends sooner after an abort.
    """
    wanted = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_GRAPH_REGISTER": "0"}
    told = os.environ.get("NCCL_P2P_DISABLE", "0") != "0"  # by the user, as we advise where P2P does not work
    if roomy() and (told or apart()):
        wanted["NCCL_CUMEM_HOST_ENABLE"] = "0"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
