"""Collectives between CUDA tensors, over NCCL's C interface.

Torch's ``ProcessGroupNCCL`` is not used because of how it treats a lost peer (tried on torch 2.11): its watchdog keeps the
group's locks for a minute, so that ``abort`` hangs, and then ends the process, which here is ComfyUI. NCCL itself needs a
dozen functions, unchanged since 2.18.

A communicator that does not block can be aborted while it still connects, but starts a thread for every collective, of which a
block has two. So one is made that does not block, and split into another that does, with which it shares resources: aborting the
first ends what the second is in, on the processor and on the GPU (NCCL user guide, "Fault tolerance" and ``splitShare``). Ranks
connect when they first do something together: that is waited for in a thread that can be left.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .transport import REMEDY, CommunicationFailed, Life, interruptible

if TYPE_CHECKING:
    from torch.distributed import Store

_SUCCESS, _SYSTEM, _INTERNAL, _IN_PROGRESS = 0, 2, 3, 7
_SUM = 0
_UINT8 = 1
_DTYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}

_POLL = 0.0002  # seconds between looks at what connects
_ENDED = 2.0  # seconds that ``close`` waits for an aborted communicator to be gone
SHARED = "/dev/shm"  # where GPUs that do not reach each other's memory exchange messages
ROOM = 2**30  # bytes of it that NCCL's user guide advises; Docker gives 64 MB unless it is told otherwise


Messages = Sequence[tuple[int, int, int]]
"""Peers, and the address and number of bytes of what is sent to them or comes from them."""


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


class _Config(ctypes.Structure):
    """ncclConfig_t of NCCL 2.18; later versions only append fields, and are told by ``size`` that those are missing."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    ]


def _config(*, blocking: bool) -> _Config:
    undefined = -(2**31)
    return _Config(ctypes.sizeof(_Config), 0xCAFEBEEF, 21800, blocking, undefined, undefined, undefined, None, True)


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded. Raises ``CommunicationFailed`` where this torch comes without."""
    try:
        library = ctypes.CDLL("librccl.so.1" if torch.version.hip else "libnccl.so.2")
    except OSError as error:
        raise CommunicationFailed("this torch comes without NCCL, which several GPUs need") from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures: dict[str, list[Any]] = {
        "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
        "ncclCommInitRankConfig": [ctypes.POINTER(pointer), number, _UniqueId, number, ctypes.POINTER(_Config)],
        "ncclCommSplit": [pointer, number, number, ctypes.POINTER(pointer), ctypes.POINTER(_Config)],
        "ncclCommGetAsyncError": [pointer, ctypes.POINTER(number)],
        "ncclCommAbort": [pointer],
        "ncclAllReduce": [pointer, pointer, size, number, number, pointer, pointer],
        "ncclBroadcast": [pointer, pointer, size, number, number, pointer, pointer],
        "ncclSend": [pointer, size, number, number, pointer, pointer],
        "ncclRecv": [pointer, size, number, number, pointer, pointer],
        "ncclGroupStart": [],
        "ncclGroupEnd": [],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, number
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [number], ctypes.c_char_p
    library.ncclGetLastError.argtypes, library.ncclGetLastError.restype = [pointer], ctypes.c_char_p
    return library


def _check(code: int) -> None:
    if code not in (_SUCCESS, _IN_PROGRESS):
        library = _library()
        texts = [library.ncclGetErrorString(code), library.ncclGetLastError(None)]
        said = ": ".join(["NCCL", *(text.decode(errors="replace").strip() for text in texts if text)])
        raise CommunicationFailed("; ".join(filter(None, (said, _remedy(code, said)))))


def _remedy(code: int, said: str) -> str:
    """What helps, as far as an error tells. What was said last may be of a connection that broke because shared memory had run out."""
    unreached = "peer access" in said
    if "shared memory" in said or (not roomy() and (unreached or code in (_SYSTEM, _INTERNAL))):
        return "in a container: docker run --shm-size=1g"
    return REMEDY if unreached else ""


def _messages(flat: torch.Tensor, sizes: Sequence[int], peers: Sequence[int]) -> Messages:
    """The pieces of a flat uint8 tensor, which lie in the order of ranks: quickly, two messages a block are made of such."""
    places = [flat.data_ptr(), *sizes]
    return [(peer, sum(places[: peer + 1]), sizes[peer]) for peer in peers]


def _state(comm: ctypes.c_void_p) -> int:
    """Success, or in progress. Raises ``CommunicationFailed`` if the communicator has failed."""
    state = ctypes.c_int()
    _check(_library().ncclCommGetAsyncError(comm, ctypes.byref(state)))
    _check(state.value)
    return state.value


def apart() -> bool:
    """Whether some GPUs do not reach each other's memory: alike for all ranks, which see the same GPUs."""
    there = range(torch.cuda.device_count())
    return any(not torch.cuda.can_device_access_peer(one, other) for one in there for other in there if one != other)


def roomy() -> bool:
    """Whether there is shared memory for the messages of such GPUs: alike for all ranks of a machine."""
    try:
        return shutil.disk_usage(SHARED).total >= ROOM
    except OSError:
        return False


def publish_id(store: Store, rank: int) -> None:
    """Rank 0's share in making a group: what the others need to find it. For before they meet in the store."""
    if rank == 0:
        unique = _UniqueId()
        _check(_library().ncclGetUniqueId(ctypes.byref(unique)))
        store.set("id", bytes(unique).hex())


class _Comms:
    """A group's two communicators, and the end of both: for a thread that does not keep the ``Nccl`` they belong to alive.

    making: held while ``first`` is called, which is short. calls: held while ``used`` is, which may hang until ``first`` is aborted.
    Once they are unwanted no call begins.
    """

    def __init__(self, device: torch.device):
        self.first, self.used = ctypes.c_void_p(), ctypes.c_void_p()
        self.making, self.calls, self.unwanted = threading.Lock(), threading.Lock(), threading.Event()
        self._device = device

    def end(self) -> None:
        """Abort both once they are ``unwanted``.

        Whoever drops the CUDA graphs that an abort waits for may want the locks: they are not held meanwhile. A call that nothing
        ends keeps its communicator: it would go on in memory that has been given back.
        """
        self.unwanted.wait()
        with torch.cuda.device(self._device):
            for comm, lock in ((self.first, self.making), (self.used, self.calls)):
                with lock:
                    pass
                if comm:
                    _library().ncclCommAbort(comm)


class Nccl:
    """A ``Transport`` of one group. All its members make it at the same time, after ``publish_id``.

    Collectives are enqueued on the current stream; shifts and what is started ahead on a stream of their own, to overlap with
    computing.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, life: Life, deadline: float):
        self._rank, self._size, self._device, self._life = rank, size, device, life
        self._aborted = False
        self._connected: set[tuple[Any, ...]] = set()
        # of high priority: else a message waits until the attention that it shall travel beside leaves a multiprocessor free
        self._aside = torch.cuda.Stream(device, priority=-1)
        self._comms = _Comms(device)
        # started now, because an interpreter on its way out starts no more threads; it does not keep this object alive
        self._end = threading.Thread(target=self._comms.end, name="paradit-abort", daemon=True)
        self._end.start()
        try:
            with torch.cuda.device(device):
                self._connect(_UniqueId.from_buffer_copy(bytes.fromhex(store.get("id").decode())), deadline)
        except BaseException:
            self.abort()
            raise

    def _connect(self, unique: _UniqueId, deadline: float) -> None:
        comms, library = self._comms, _library()
        first, used, plain, child = map(ctypes.byref, (comms.first, comms.used, _config(blocking=False), _config(blocking=True)))
        self._make(lambda: library.ncclCommInitRankConfig(first, self._size, unique, self._rank, plain), deadline)
        self._make(lambda: library.ncclCommSplit(comms.first, 0, self._rank, used, child), deadline)

    def _make(self, begin: Callable[[], int], deadline: float) -> None:
        """Wait for what ``begin`` has the first communicator do."""
        self._asked(lambda: _check(begin()))
        while self._asked(lambda: _state(self._comms.first)) == _IN_PROGRESS:
            self._life.check()
            if time.monotonic() > deadline:
                raise CommunicationFailed(f"the ranks met, but did not connect in time; {REMEDY}")
            time.sleep(_POLL)

    def _asked(self, act: Callable[[], Any]) -> Any:
        with self._comms.making:
            self._open()
            return act()

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int], *, ahead: bool = False
    ) -> Any:
        if received_sizes[self._rank] and sent_sizes[self._rank]:
            received.split(received_sizes)[self._rank].copy_(sent.split(sent_sizes)[self._rank])
        peers = [(self._rank + step) % self._size for step in range(1, self._size)]
        sends, receives = _messages(sent, sent_sizes, peers), _messages(received, received_sizes, peers)
        if ahead:
            return self._beside(sends, receives, sent, received)
        self._exchange(sends, receives, self._stream())
        return None

    def start_all_reduce(self, tensor: torch.Tensor) -> None:
        kind = _DTYPES.get(tensor.dtype)
        if kind is None:
            raise TypeError(f"NCCL does not sum {tensor.dtype}")
        data, stream = tensor.data_ptr(), self._stream()
        count = tensor.numel()  # by which NCCL chooses an algorithm, each with connections of its own
        self._call(lambda library, comm: library.ncclAllReduce(data, data, count, kind, _SUM, comm, stream), "sum", count.bit_length())

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> None:
        data, stream = tensor.data_ptr(), self._stream()
        self._call(lambda library, comm: library.ncclBroadcast(data, data, tensor.numel(), _UINT8, root, comm, stream), "broadcast", root)

    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any:
        sends, receives = [(to, sent.data_ptr(), sent.numel())], [(source, received.data_ptr(), received.numel())]
        return self._beside(sends, receives, sent, received)

    def finish(self, work: Any) -> None:
        if work is not None:
            torch.cuda.current_stream(self._device).wait_event(work[0])

    def check(self) -> None:
        """Raises ``CommunicationFailed`` if NCCL has noticed a lost peer."""
        with self._comms.calls:
            self._open()
            _state(self._comms.used)

    def abort(self) -> None:
        """Free the GPU from pending collectives, and close. For any thread; does not wait.

        ``ncclCommAbort`` ends what is on the GPU at once, but returns only when no CUDA graph holds a collective of this
        communicator any more. Those graphs are another thread's to drop, which must not wait for this one meanwhile.
        """
        self._aborted = True
        self._comms.unwanted.set()

    def close(self) -> None:
        """Waits a moment until the communicator is gone: a process that ends before may crash on its way out."""
        self.abort()
        self._end.join(_ENDED)

    def __del__(self) -> None:
        if hasattr(self, "_comms"):
            self._comms.unwanted.set()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def _beside(self, sends: Messages, receives: Messages, *kept: torch.Tensor) -> Any:
        """``_exchange`` on the stream beside the current one, after what the latter has been given so far."""
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._aside.wait_event(ready)
        self._exchange(sends, receives, self._aside.cuda_stream)
        done.record(self._aside)
        return done, *kept  # the tensors' memory stays theirs until the current stream waits

    def _exchange(self, sends: Messages, receives: Messages, stream: int) -> None:
        """To and from peers, as one operation; what is empty is left out."""
        sends, receives = ([message for message in messages if message[2]] for messages in (sends, receives))

        def exchange(library: ctypes.CDLL, comm: ctypes.c_void_p) -> int:
            codes = [library.ncclGroupStart()]
            for act, messages in ((library.ncclSend, sends), (library.ncclRecv, receives)):
                codes += [act(address, size, _UINT8, peer, comm, stream) for peer, address, size in messages]
            codes.append(library.ncclGroupEnd())
            return next((code for code in codes if code != _SUCCESS), _SUCCESS)

        self._call(exchange, *(message[0] for message in sends), None, *(message[0] for message in receives))

    def _call(self, act: Callable[[ctypes.CDLL, ctypes.c_void_p], int], *kind: Any) -> None:
        """``act``, the first one of its ``kind`` in a thread: it may wait for other ranks."""

        def call() -> None:
            with self._comms.calls:
                self._open()
                code = act(_library(), self._comms.used)
                self._open()  # else what an abort has ended would be told as a failure of its own
                _check(code)
                while code == _IN_PROGRESS:  # NCCL_COMM_BLOCKING=0 overrides what communicators are told
                    self._open()
                    time.sleep(_POLL)
                    code = _state(self._comms.used)

        def connect() -> None:
            with torch.cuda.device(self._device):  # a new thread's would be another, which would take memory there
                call()

        if kind in self._connected:
            call()
        else:
            interruptible(connect, self._life.check)
            self._connected.add(kind)

    def _open(self) -> None:
        if self._aborted:
            raise CommunicationFailed("the communicator was aborted")
