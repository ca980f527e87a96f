"""Collectives over gloo (CPU) or NCCL (CUDA), in groups of their own that can be aborted and made again.

The default process group is never touched: other packs may own it. Ranks meet in a file, so nothing listens for newcomers;
what gloo and NCCL listen on is bound to the loopback interface.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store

from ..sequence.mesh import Degrees, Mesh
from .codec import as_bytes

# Seconds between looks at ``abort`` and ``on_wait`` while a collective is pending.
_LOOK = 0.1

# NCCL's watchdog ends the whole process after this time; rank 0 has aborted long before.
_NEVER = timedelta(days=7)


class CommunicationFailed(RuntimeError):
    """A peer died, hung, or aborted, or this rank did: the communicator is of no more use.

    absent: ranks of the joined communicator that did not come to a meeting.
    """

    def __init__(self, message: str, absent: Sequence[int] = ()):
        super().__init__(message)
        self.absent = tuple(absent)


class _Transport(Protocol):
    """One process group. ``start_*`` return a work to be finished, or None if there is nothing to wait for."""

    def start_all_to_all(self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]) -> Any: ...
    def start_all_reduce(self, tensor: torch.Tensor) -> Any: ...
    def start_broadcast(self, tensor: torch.Tensor, root: int) -> Any: ...
    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any: ...
    def finish(self, work: Any) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class _Life:
    """What a communicator and its subgroups share: whether it was aborted, what to look at while waiting, gloo's listener."""

    def __init__(self) -> None:
        self.aborted = False
        self.on_wait: Callable[[], None] | None = None
        self.transports: list[_Transport] = []
        self.gloo_device: Any = None

    def check(self) -> None:
        if self.aborted:
            raise CommunicationFailed("the communicator was aborted")
        if self.on_wait is not None:
            self.on_wait()


class Communicator:
    """``para_core.sequence.mesh.Comm`` between processes. Made by ``join`` and ``split``.

    rank, size: within this communicator. ranks: its members' ranks in the joined one. device: where its tensors live.

    Collectives are for one thread at a time; ``abort`` is for any. Failures raise ``CommunicationFailed`` (a RuntimeError).
    On CUDA collectives only enqueue on the current stream: a failed peer shows as a stream that does not finish, which
    ``settle`` turns into the error.
    """

    def __init__(self, rank: int, ranks: Sequence[int], device: torch.device, store: Store | None, timeout_s: float, life: _Life):
        self.rank = rank
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.device = device
        self._store = store
        self._timeout_s = timeout_s
        self._life = life
        self._subgroups: dict[tuple[int, ...], Communicator] = {self.ranks: self}
        self._transport: _Transport | None = None

    @classmethod
    def join(
        cls,
        store: str | Path | Store,
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
        life = _Life()
        life.on_wait = on_wait
        if size == 1:
            return cls(0, (0,), device, None, timeout_s, life)
        if not isinstance(store, Store):
            store = FileStore(str(store))
        store = PrefixStore(name, store)
        store.set_timeout(timedelta(seconds=join_timeout_s))
        communicator = cls(rank, range(size), device, store, timeout_s, life)
        communicator._open("world", join_timeout_s)
        return communicator

    @property
    def aborted(self) -> bool:
        return self._life.aborted

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
        store = PrefixStore(f"{name}/", self._store)
        self._meet(store, timeout_s)
        deadline = time.monotonic() + timeout_s
        self._meet(store, timeout_s)
        self._transport = _interruptible(lambda: self._connect(store), deadline, self._life.check)
        self._life.transports.append(self._transport)
        self._life.check()  # an abort meanwhile did not see the new transport

    def _connect(self, store: Store) -> _Transport:
        if self.device.type != "cpu":
            return _Nccl(store, self.rank, self.size, self.device)
        self._life.gloo_device = self._life.gloo_device or _loopback_device()
        return _Gloo(store, self.rank, self.size, self._timeout_s, self._life)

    def _meet(self, store: Store, timeout_s: float) -> None:
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
        if self._transport is None:
            received.copy_(sent)
            return
        width = sent.element_size()
        self._run(
            lambda transport: transport.start_all_to_all(
                _flat(received), _flat(sent), [size * width for size in received_sizes], [size * width for size in sent_sizes]
            )
        )

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._run(lambda transport: transport.start_all_reduce(tensor))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        if tensor.numel():
            self._run(lambda transport: transport.start_broadcast(_flat(tensor), root))

    def shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Callable[[], None]:
        if self._transport is None:
            received.copy_(sent)
            return lambda: None
        transport = self._transport
        self._life.check()
        with _failures():
            work = transport.start_shift(_flat(sent), to, _flat(received), source)
        return lambda: self._finish(transport, work)

    def _run(self, start: Callable[[_Transport], Any]) -> None:
        self._life.check()
        if self._transport is not None:
            with _failures():
                work = start(self._transport)
            self._finish(self._transport, work)

    def _finish(self, transport: _Transport, work: Any) -> None:
        try:
            transport.finish(work)
        except BaseException:
            # A peer may be waiting for this rank, not for the one that failed: pass it on.
            self.abort()
            raise

    def settle(self, timeout_s: float | None = None) -> None:
        """Block until what was enqueued on the current CUDA stream is done; nothing to do on the CPU.

        Raises ``CommunicationFailed`` once aborted or after ``timeout_s`` (default: the communicator's).
        """
        if self.device.type != "cuda":
            return
        reached = torch.cuda.Event()
        reached.record(torch.cuda.current_stream(self.device))
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        look = time.monotonic() + _LOOK
        while not reached.query():
            now = time.monotonic()
            if now > look:
                self._life.check()
                look = now + _LOOK
            if now > deadline:
                raise CommunicationFailed("the GPU did not finish its collectives in time")
            time.sleep(0.0001)

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
        self._meshes: dict[Degrees, Mesh | None] = {}

    def mesh(self, degrees: Degrees) -> Mesh | None:
        """This rank's mesh, or None if the degrees need fewer ranks. Every rank asks for the same meshes in the same order.

        Raises ``ValueError`` if they need more ranks than there are.
        """
        if degrees.world > self.world.size:
            raise ValueError(f"{degrees} need {degrees.world} ranks, there are {self.world.size}")
        if degrees not in self._meshes:
            self._meshes[degrees] = self._make(degrees) if self.world.rank < degrees.world else None
        return self._meshes[degrees]

    def _make(self, degrees: Degrees) -> Mesh:
        part, place = divmod(self.world.rank, degrees.sequence)
        first = part * degrees.sequence
        row, column = divmod(place, degrees.ulysses)
        return Mesh(
            sequence=self.world.split(range(first, first + degrees.sequence)),
            ulysses=self.world.split(range(first + row * degrees.ulysses, first + (row + 1) * degrees.ulysses)),
            ring=self.world.split(range(first + column, first + degrees.sequence, degrees.ulysses)),
        )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise ValueError("collectives need contiguous tensors")
    return as_bytes(tensor)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Name the backends' errors as ours, without gloo's source location and advice."""
    try:
        yield
    except CommunicationFailed:
        raise
    except RuntimeError as error:
        text = str(error).strip().splitlines() or ["the collective failed"]
        raise CommunicationFailed(re.sub(r"^\[[^]]*\] ", "", text[0]).partition(". This is typically")[0]) from error


def _interruptible(make: Callable[[], _Transport], deadline: float, check: Callable[[], None]) -> _Transport:
    """``make()`` in a thread, which is left behind if ``check`` raises or the deadline passes."""
    made: Future[_Transport] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except RuntimeError as error:
            made.set_exception(error)

    threading.Thread(target=run, name="paradit-connect", daemon=True).start()
    while not wait([made], timeout=_LOOK).done:
        check()
        if time.monotonic() > deadline:
            raise CommunicationFailed("the ranks met, but did not connect in time")
    with _failures():
        return made.result()


def _loopback_device() -> Any:
    try:
        return dist.ProcessGroupGloo.create_device(interface="lo")
    except RuntimeError:  # the interface has another name, as on macOS
        return dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")


_ABORT_TAG = 2**30  # more messages than are ever sent

# A gloo group's destructor waits, holding Python's lock, until every pending collective has ended, which after a failure
# can take the group's whole timeout. Groups with such leftovers are kept here until they have none.
_leftovers: list[tuple[Any, list[Any]]] = []
_leftovers_lock = threading.Lock()


def _sweep() -> None:
    with _leftovers_lock:
        _leftovers[:] = [(group, works) for group, works in _leftovers if not all(work.is_completed() for work in works)]


class _Transfer:
    """A send and a receive as one work that can be waited for in part.

    Gloo's own cannot: a wait that times out closes all connections (which ``_Gloo.abort`` makes use of).
    """

    def __init__(self, works: list[Any]):
        self._done = threading.Event()
        self._error: RuntimeError | None = None
        if works:
            threading.Thread(target=self._wait, args=(works,), name="paradit-shift", daemon=True).start()
        else:
            self._done.set()

    def _wait(self, works: list[Any]) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._error = error
        self._done.set()

    def wait(self, timeout: timedelta | None = None) -> None:
        if not self._done.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError("still under way")
        if self._error is not None:
            raise self._error

    def is_completed(self) -> bool:
        return self._done.is_set()


class _Gloo:
    def __init__(self, store: Store, rank: int, size: int, timeout_s: float, life: _Life):
        _sweep()
        gloo: Any = dist.ProcessGroupGloo  # the stubs lack its options
        options = gloo._Options()
        options._devices = [life.gloo_device]
        options._threads = 1
        options._timeout = timedelta(seconds=timeout_s)
        self._rank, self._size, self._life = rank, size, life
        self._pending: list[Any] = []
        # Tags of point-to-point messages: both ends count, so that several can be under way.
        self._sent = [itertools.count() for _ in range(size)]
        self._received = [itertools.count() for _ in range(size)]
        self._group: Any = None
        self._group = gloo(store, rank, size, options)

    def start_all_to_all(self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]) -> Any:
        return self._started(self._group.alltoall_base(received, sent, received_sizes, sent_sizes, dist.AllToAllOptions()))

    def start_all_reduce(self, tensor: torch.Tensor) -> Any:
        return self._started(self._group.allreduce([tensor], dist.AllreduceOptions()))

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._started(self._group.broadcast([tensor], options))

    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any:
        works = []
        if sent.numel():
            works.append(self._group.send([sent], to, next(self._sent[to])))
        if received.numel():
            works.append(self._group.recv([received], source, next(self._received[source])))
        return self._started(_Transfer(works))

    def _started(self, work: Any) -> Any:
        self._pending.append(work)
        return work

    def finish(self, work: Any) -> None:
        while not self._ended(work):
            self._life.check()

    def _ended(self, work: Any) -> bool:
        """Wait for a moment. Raises what the collective failed with."""
        with _failures():
            try:
                work.wait(timedelta(seconds=_LOOK))
            except RuntimeError:
                if not work.is_completed():
                    return False
                self._pending.remove(work)
                work.wait()  # what was caught may have been the moment's end
                return True
        self._pending.remove(work)
        return True

    def abort(self) -> None:
        # Neither abort() nor shutdown() of a gloo group does anything. What closes all its connections is a receive that
        # times out; on one whose peer is gone already it fails at once and closes nothing, hence a try with each peer.
        nothing = torch.empty(1, dtype=torch.uint8)
        for peer in range(self._size):
            group = self._group
            if peer != self._rank and group is not None:
                with contextlib.suppress(RuntimeError):
                    group.recv([nothing], peer, _ABORT_TAG).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        # Not left to the destructor: a failed collective's traceback keeps the connections alive.
        self.abort()
        group, self._group = self._group, None
        if group is not None and not all(work.is_completed() for work in self._pending):
            with _leftovers_lock:
                _leftovers.append((group, list(self._pending)))
        self._pending.clear()

    def __del__(self) -> None:
        if self._group is not None:
            self.close()


class _Nccl:
    def __init__(self, store: Store, rank: int, size: int, device: torch.device):
        _bind_nccl_to_loopback()
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        self._group.eager_connect_single_device(device)

    def start_all_to_all(self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int]) -> Any:
        return self._group.alltoall_base(received, sent, received_sizes, sent_sizes, _on_current_stream(dist.AllToAllOptions()))

    def start_all_reduce(self, tensor: torch.Tensor) -> Any:
        return self._group.allreduce([tensor], _on_current_stream(dist.AllreduceOptions()))

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        options = _on_current_stream(dist.BroadcastOptions())
        options.rootRank = root
        return self._group.broadcast([tensor], options)

    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any:
        # Grouped: on their own, a send and a receive on one stream would wait for each other's peers in a circle.
        self._group._start_coalescing()
        if sent.numel():
            self._group.send([sent], to, 0)
        if received.numel():
            self._group.recv([received], source, 0)
        return self._group._end_coalescing()

    def finish(self, work: Any) -> None:
        if work is not None:
            with _failures():
                work.wait()

    def abort(self) -> None:
        if self._group is not None:
            self._group.abort()

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _on_current_stream(options: Any) -> Any:
    options.asyncOp = False
    return options


def _bind_nccl_to_loopback() -> None:
    """NCCL listens on an interface of its choice unless the environment names one; there is no other way to tell it.

    Workers are started with the variable set; this is for rank 0, ComfyUI's own process, and yields to the user's choice.
    """
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
