"""Collectives between CUDA tensors, over NCCL's C interface.

Torch's ``ProcessGroupNCCL`` is not used because of how it treats a lost peer (tried on torch 2.11): its watchdog keeps the
group's locks for a minute, so that ``abort`` hangs, and then ends the process, which here is ComfyUI. NCCL itself needs a
dozen functions, unchanged since 2.14. Communicators are non-blocking: a call that has to wait for peers returns at once and
is polled, so that every wait can be ended, and ``ncclCommAbort`` frees the GPU from what never finishes (NCCL user guide,
"Fault tolerance").
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from .transport import REMEDY, CommunicationFailed, Life

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

_SPIN = 0.001  # seconds for which a call in progress is looked at without a pause: NCCL's thread should have launched long before
_POLL = 0.0002  # seconds between later looks
_ENDED = 2.0  # seconds that ``close`` waits for an aborted communicator to be gone
SHARED = "/dev/shm"  # where GPUs that do not reach each other's memory exchange messages
ROOM = 2**30  # bytes of it that NCCL's user guide advises; Docker gives 64 MB unless it is told otherwise


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


def _non_blocking() -> _Config:
    undefined = -(2**31)
    return _Config(ctypes.sizeof(_Config), 0xCAFEBEEF, 21800, 0, undefined, undefined, undefined, None, undefined)


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


def _end(comm: ctypes.c_void_p, device: torch.device, unwanted: threading.Event) -> None:
    """Abort ``comm`` once it is ``unwanted``: a thread's."""
    unwanted.wait()
    if comm:
        with torch.cuda.device(device):
            _library().ncclCommAbort(comm)


class Nccl:
    """A ``Transport`` of one group. All its members make it at the same time, after ``publish_id``.

    Collectives are enqueued on the current stream; shifts and what is started ahead on a stream of their own, to overlap with
    computing.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, life: Life, deadline: float):
        self._rank, self._size, self._device, self._life = rank, size, device, life
        self._lock = threading.Lock()  # held during calls, which are short; not while polling
        self._aborted = False
        # of high priority: else a message waits until the attention that it shall travel beside leaves a multiprocessor free
        self._aside = torch.cuda.Stream(device, priority=-1)
        self._comm = ctypes.c_void_p()
        self._unwanted = threading.Event()
        # started now, because an interpreter on its way out starts no more threads; it does not keep this object alive
        self._end = threading.Thread(target=_end, args=(self._comm, device, self._unwanted), name="paradit-abort", daemon=True)
        self._end.start()
        unique, config = _UniqueId.from_buffer_copy(bytes.fromhex(store.get("id").decode())), _non_blocking()
        try:
            with torch.cuda.device(device):
                code = _library().ncclCommInitRankConfig(ctypes.byref(self._comm), size, unique, rank, ctypes.byref(config))
            _check(code)
            self._poll(deadline)
        except BaseException:
            self.abort()
            raise

    def start_all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int], *, ahead: bool = False
    ) -> Any:
        pieces_in, pieces_out = received.split(received_sizes), sent.split(sent_sizes)
        if received_sizes[self._rank] and sent_sizes[self._rank]:
            pieces_in[self._rank].copy_(pieces_out[self._rank])
        peers = [(self._rank + step) % self._size for step in range(1, self._size)]
        sends, receives = [(peer, pieces_out[peer]) for peer in peers], [(peer, pieces_in[peer]) for peer in peers]
        if ahead:
            return self._beside(sends, receives, sent, received)
        self._exchange(sends, receives, self._stream())
        return None

    def start_all_reduce(self, tensor: torch.Tensor) -> None:
        kind = _DTYPES.get(tensor.dtype)
        if kind is None:
            raise TypeError(f"NCCL does not sum {tensor.dtype}")
        data = tensor.data_ptr()
        self._call(lambda library: library.ncclAllReduce(data, data, tensor.numel(), kind, _SUM, self._comm, self._stream()))

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> None:
        data = tensor.data_ptr()
        self._call(lambda library: library.ncclBroadcast(data, data, tensor.numel(), _UINT8, root, self._comm, self._stream()))

    def start_shift(self, sent: torch.Tensor, to: int, received: torch.Tensor, source: int) -> Any:
        return self._beside([(to, sent)], [(source, received)], sent, received)

    def finish(self, work: Any) -> None:
        if work is not None:
            torch.cuda.current_stream(self._device).wait_event(work[0])

    def check(self) -> None:
        """Raises ``CommunicationFailed`` if NCCL has noticed a lost peer."""
        self._state()

    def abort(self) -> None:
        """Free the GPU from pending collectives, and close. For any thread; does not wait.

        ``ncclCommAbort`` ends what is on the GPU at once, but returns only when no CUDA graph holds a collective of this
        communicator any more. Those graphs are another thread's to drop, which must not wait for this one meanwhile.
        """
        with self._lock:
            self._aborted = True
        self._unwanted.set()

    def close(self) -> None:
        """Waits a moment until the communicator is gone: a process that ends before may crash on its way out."""
        self.abort()
        self._end.join(_ENDED)

    def __del__(self) -> None:
        if hasattr(self, "_unwanted"):
            self._unwanted.set()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def _beside(self, sends: Iterable[tuple[int, torch.Tensor]], receives: Iterable[tuple[int, torch.Tensor]], *kept: torch.Tensor) -> Any:
        """``_exchange`` on the stream beside the current one, after what the latter has been given so far."""
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._aside.wait_event(ready)
        self._exchange(sends, receives, self._aside.cuda_stream)
        done.record(self._aside)
        return done, *kept  # the tensors' memory stays theirs until the current stream waits

    def _exchange(self, sends: Iterable[tuple[int, torch.Tensor]], receives: Iterable[tuple[int, torch.Tensor]], stream: int) -> None:
        """Flat uint8 tensors to and from peers, as one operation; empty ones are left out."""

        def exchange(library: ctypes.CDLL) -> int:
            codes = [library.ncclGroupStart()]
            for peer, data in sends:
                if data.numel():
                    codes.append(library.ncclSend(data.data_ptr(), data.numel(), _UINT8, peer, self._comm, stream))
            for peer, data in receives:
                if data.numel():
                    codes.append(library.ncclRecv(data.data_ptr(), data.numel(), _UINT8, peer, self._comm, stream))
            codes.append(library.ncclGroupEnd())
            return next((code for code in codes if code not in (_SUCCESS, _IN_PROGRESS)), codes[-1])

        self._call(exchange)

    def _call(self, act: Callable[[ctypes.CDLL], int]) -> None:
        with self._lock:
            self._open()
            code = act(_library())
        _check(code)
        if code == _IN_PROGRESS:
            self._poll(None)

    def _poll(self, deadline: float | None) -> None:
        """Wait until NCCL has done what the last call began on this side: connecting to peers, or only launching.

        A communicator that does not block launches every collective in a thread of its own, and each of a forward's would be
        late by what a pause takes.
        """
        began = time.monotonic()
        while self._state() == _IN_PROGRESS:
            now = time.monotonic()
            if now < began + _SPIN:
                continue
            self._life.check()
            if deadline is not None and now > deadline:
                raise CommunicationFailed(f"the ranks met, but did not connect in time; {REMEDY}")
            time.sleep(_POLL)

    def _state(self) -> int:
        state = ctypes.c_int()
        with self._lock:
            self._open()
            _check(_library().ncclCommGetAsyncError(self._comm, ctypes.byref(state)))
        _check(state.value)
        return state.value

    def _open(self) -> None:
        if self._aborted:
            raise CommunicationFailed("the communicator was aborted")
