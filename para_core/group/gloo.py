"""Collectives between CPU tensors, over torch's gloo group on the loopback interface.

Found by trying (torch 2.13): ``abort`` and ``shutdown`` of a gloo group do nothing; dropping it closes its connections
unless a failed collective's traceback still holds them; a peer that is killed in the middle of a large message is not
noticed before the timeout.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .transport import LOOK, Life, failures, interruptible

if TYPE_CHECKING:
    from torch.distributed import Store


def _loopback_device() -> Any:
    """One listener and its thread, for any number of groups."""
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

    Gloo's own cannot: a wait that times out closes all connections (which ``Gloo.abort`` makes use of).
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


class Gloo:
    """A ``Transport`` of one group. All its members make it at the same time."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float, life: Life, deadline: float):
        _sweep()
        life.gloo_device = life.gloo_device or _loopback_device()
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
        self._group = interruptible(lambda: gloo(store, rank, size, options), life.check, deadline)

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int], *, ahead: bool = False
    ) -> Any:
        if received_sizes[self._rank] != sent_sizes[self._rank]:  # gloo copies the own piece, which shall stay as it is
            pieces = list(sent.split(sent_sizes))
            pieces[self._rank] = received.split(received_sizes)[self._rank]
            sent, sent_sizes = torch.cat(pieces), [piece.numel() for piece in pieces]
        return self._started(lambda: self._group.alltoall_base(received, sent, received_sizes, sent_sizes, dist.AllToAllOptions()))

    def start_all_reduce(self, tensor: torch.Tensor) -> Any:
        return self._started(lambda: self._group.allreduce([tensor], dist.AllreduceOptions()))

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._started(lambda: self._group.broadcast([tensor], options))

    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any:
        def start() -> _Transfer:
            works = []
            if sent.numel():
                works.append(self._group.send([sent], to, next(self._sent[to])))
            if received.numel():
                works.append(self._group.recv([received], source, next(self._received[source])))
            return _Transfer(works)

        return self._started(start)

    def _started(self, start: Callable[[], Any]) -> Any:
        with failures():
            work = start()
        self._pending.append(work)
        return work

    def finish(self, work: Any) -> None:
        while not self._ended(work):
            self._life.check()

    def _ended(self, work: Any) -> bool:
        """Wait for a moment. Raises what the collective failed with."""
        with failures():
            try:
                work.wait(timedelta(seconds=LOOK))
            except RuntimeError:
                if not work.is_completed():
                    return False
                self._pending.remove(work)
                work.wait()  # what was caught may have been the moment's end
                return True
        self._pending.remove(work)
        return True

    def check(self) -> None:
        """Nothing is noticed outside ``finish``."""

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
