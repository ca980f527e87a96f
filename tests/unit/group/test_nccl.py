"""Ending an NCCL communicator, with the library faked: who waits for whom."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from para_core.group import communicator, nccl
from para_core.group.transport import CommunicationFailed, Life

FIRST, USED = 1, 2  # the group's communicators


def library(monkeypatch) -> threading.Event:
    gone = threading.Event()
    library = SimpleNamespace(
        ncclCommAbort=lambda comm: gone.wait(30) if comm.value == USED else None,
        ncclCommGetAsyncError=lambda _comm, _state: 0,
        ncclGetErrorString=lambda _code: b"",
        ncclGetLastError=lambda _comm: b"",
    )
    monkeypatch.setattr(nccl, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    return gone


@pytest.fixture
def graphs(monkeypatch) -> Iterator[threading.Event]:
    """Set once no CUDA graph holds the communicator: ``ncclCommAbort`` does not return before."""
    gone = library(monkeypatch)
    yield gone
    gone.set()


@pytest.fixture
def transport(graphs) -> Iterator[nccl.Nccl]:
    made = make()
    yield made
    graphs.set()
    made.close()


def make() -> nccl.Nccl:
    """Made as ``__init__`` does it, without a store and other ranks."""
    found, device = object.__new__(nccl.Nccl), torch.device("cuda", 0)
    found._rank, found._size, found._device, found._life = 0, 2, device, Life()
    found._aborted, found._connected, found._comms = False, set(), nccl._Comms(device)
    found._comms.first, found._comms.used = ctypes.c_void_p(FIRST), ctypes.c_void_p(USED)
    found._end = threading.Thread(target=found._comms.end, daemon=True)
    found._end.start()
    return found


def test_whoever_aborts_does_not_wait_for_cuda_graphs_of_another_thread(graphs, transport):
    """The thread that listens to the workers aborts while the other one still holds captures, and must get to dropping them."""
    started, waits = time.monotonic(), threading.Event()
    wait = nccl._library().ncclCommAbort
    nccl._library().ncclCommAbort = lambda comm: (waits.set() if comm.value == USED else None, wait(comm))
    watch = threading.Thread(target=transport.abort)
    watch.start()
    watch.join(10)
    assert waits.wait(10)
    for act in (transport.check, lambda: transport._call(lambda _library, _comm: 0, "sum")):
        with pytest.raises(CommunicationFailed, match="aborted"):
            act()
    transport.abort()
    assert time.monotonic() - started < 5 and not watch.is_alive() and transport._end.is_alive()
    graphs.set()
    transport.close()
    assert not transport._end.is_alive()


def test_closing_waits_for_a_moment_only(graphs, transport, monkeypatch):
    monkeypatch.setattr(nccl, "_ENDED", 0.05)
    transport.close()
    assert transport._end.is_alive()


def test_one_that_is_forgotten_ends_too(graphs):
    graphs.set()
    transport = make()
    end = transport._end
    del transport
    gc.collect()
    end.join(10)
    assert not end.is_alive()


def test_it_can_be_ended_while_the_interpreter_exits():
    """Then no new thread can be started, which Python 3.12 refuses."""
    script = """
import atexit, sys
sys.path[:0] = [{root!r}, {tests!r}]
from unit.group import test_nccl as here
import pytest
patch = pytest.MonkeyPatch()
gone = here.library(patch)
gone.set()
transport = here.make()
def close():
    transport.close()
    print("gone" if not transport._end.is_alive() else "stuck", flush=True)
atexit.register(close)
"""
    root = Path(__file__).resolve().parents[3]
    call = [sys.executable, "-c", script.format(root=str(root), tests=str(root / "tests"))]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "gone", done.stderr


def test_the_communicator_that_is_used_is_a_child_of_one_that_can_be_left(graphs, monkeypatch):
    """Both come to be while the first is polled; NCCL writes the second's address only then."""
    looks = iter([7, 7, 0, 7, 7, 0])
    configs: list[tuple[int, int]] = []
    later: list = []

    def init(comm, _size, _unique, _rank, config) -> int:
        configs.append((config._obj.blocking, config._obj.split_share))
        comm._obj.value = FIRST
        return 7

    def split(parent, color: int, key: int, comm, config) -> int:
        assert (parent.value, color, key) == (FIRST, 0, 1)
        configs.append((config._obj.blocking, config._obj.split_share))
        later.append(comm)
        return 0

    def state(comm, found) -> int:
        assert comm.value == FIRST
        found._obj.value = next(looks)
        if found._obj.value == 0 and later:
            later.pop()._obj.value = USED
        return 0

    fake = nccl._library()
    fake.ncclCommInitRankConfig, fake.ncclCommSplit, fake.ncclCommGetAsyncError = init, split, state
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_args, **_kwargs: None)
    store = SimpleNamespace(get=lambda _name: bytes(128).hex().encode())
    made = nccl.Nccl(store, 1, 2, torch.device("cuda", 1), Life(), time.monotonic() + 30)
    assert configs == [(0, 1), (1, 1)] and made._comms.used.value == USED and next(looks, None) is None
    graphs.set()
    made.close()


def test_connecting_can_be_left(graphs, monkeypatch):
    """Nothing is asked of a communicator that is being aborted: its memory may be gone."""
    aborted = threading.Event()

    def init(comm, *_) -> int:
        comm._obj.value = FIRST
        return 7

    def state(_comm, found) -> int:
        assert not aborted.is_set()
        time.sleep(0.05)
        assert not aborted.is_set()
        found._obj.value = 7
        return 0

    fake = nccl._library()
    fake.ncclCommInitRankConfig, fake.ncclCommGetAsyncError, fake.ncclCommAbort = init, state, lambda _comm: aborted.set()
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_args, **_kwargs: None)
    store = SimpleNamespace(get=lambda _name: bytes(128).hex().encode())
    with pytest.raises(CommunicationFailed, match="did not connect in time"):
        nccl.Nccl(store, 1, 2, torch.device("cuda", 1), Life(), time.monotonic() + 0.1)
    assert aborted.wait(10)
    aborted.clear()
    made, life = object.__new__(nccl.Nccl), Life()

    def abort() -> None:  # as another thread does with all transports of a communicator
        life.aborted = True
        made.abort()

    threading.Timer(0.1, abort).start()
    with pytest.raises(CommunicationFailed, match="aborted"):
        made.__init__(store, 1, 2, torch.device("cuda", 1), life, time.monotonic() + 30)
    assert aborted.wait(10)


def test_what_others_are_waited_for_in_can_be_left_and_what_comes_later_takes_no_thread(transport):
    """Ranks connect in the first call of a kind: two a block follow in every step."""
    callers: list[str] = []
    stuck = threading.Event()

    def act(_library, comm) -> int:
        callers.append(threading.current_thread().name)
        assert comm.value == USED
        return 0

    for kind in ((1, None, 1), (1, None, 1), ("sum",), (1, None, 1)):
        transport._call(act, *kind)
    here = threading.current_thread().name
    assert [name == here for name in callers] == [False, True, False, True]

    def wait(_library, _comm) -> int:
        stuck.wait(30)
        return 3

    threading.Timer(0.2, setattr, (transport._life, "aborted", True)).start()
    with pytest.raises(CommunicationFailed, match="aborted"):
        transport._call(wait, 2, None, 2)
    stuck.set()


def test_a_call_that_hangs_is_ended_by_the_communicator_that_is_not_in_use(graphs, transport):
    """Its own must not be aborted while a thread is in it."""
    aborted: list[int] = []
    ended = threading.Event()

    def abort(comm) -> None:
        aborted.append(comm.value)
        ended.set()

    def hang(_library, _comm) -> int:
        assert ended.wait(30)
        time.sleep(0.2)
        aborted.append(0)  # left the call
        return 3

    nccl._library().ncclCommAbort = abort
    nccl._library().ncclGetLastError = lambda _comm: b"socket closed"
    transport._connected.add((1, None, 1))
    threading.Timer(0.1, transport.abort).start()
    with pytest.raises(CommunicationFailed, match="aborted"):
        transport._call(hang, 1, None, 1)
    transport.close()
    assert aborted == [FIRST, 0, USED]


def test_a_call_that_nothing_ends_keeps_its_communicator(graphs, transport, monkeypatch):
    """Closing waits for a moment only, and what the call works in is not taken from it."""
    monkeypatch.setattr(nccl, "_ENDED", 0.2)
    aborted: list[int] = []
    nccl._library().ncclCommAbort = lambda comm: aborted.append(comm.value)
    with transport._comms.calls:
        transport.close()
        assert aborted == [FIRST]
    transport._end.join(10)
    assert aborted == [FIRST, USED]


def test_what_nccl_has_only_begun_is_waited_for(transport):
    """NCCL_COMM_BLOCKING=0 in the environment: messages launched later would not be where they belong among kernels."""
    states = iter([7, 7, 0])

    def state(comm, found) -> int:
        assert comm.value == USED
        found._obj.value = next(states)
        return 0

    nccl._library().ncclCommGetAsyncError = state
    transport._connected.add(("sum",))
    transport._call(lambda _library, _comm: 7, "sum")
    assert next(states, None) is None


def test_a_failure_other_than_nccls_ends_the_wait_too(transport):
    def act(_library, _comm) -> int:
        raise ctypes.ArgumentError("wrong type")

    with pytest.raises(ctypes.ArgumentError):
        transport._call(act, "sum")


def test_pieces_are_sent_from_where_they_lie_and_empty_ones_not_at_all(transport, monkeypatch):
    done: list[tuple] = []
    fake = nccl._library()
    fake.ncclGroupStart = fake.ncclGroupEnd = lambda: 0

    def noted(way: str):
        def act(address: int, size: int, kind: int, peer: int, comm, stream: int) -> int:
            assert (kind, comm.value, stream) == (1, USED, 7)
            done.append((way, peer, address - places[way], size))
            return 0

        return act

    fake.ncclSend, fake.ncclRecv = noted("to"), noted("from")
    received, sent = torch.zeros(9, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)
    places = {"to": sent.data_ptr(), "from": received.data_ptr()}
    transport._size = 3
    monkeypatch.setattr(transport, "_stream", lambda: 7)
    transport.start_all_to_all(received, sent, [0, 0, 9], [2, 3, 4])
    assert done == [("to", 1, 2, 3), ("to", 2, 5, 4), ("from", 2, 0, 9)] and transport._connected == {(1, 2, None, 2)}


SHORT, UNREACHED = "docker run --shm-size=1g", "NCCL_P2P_DISABLE=1"


@pytest.mark.parametrize(
    ("code", "text", "size", "remedy"),
    [
        (2, "Error while creating shared memory segment /dev/shm/nccl", 2**40, SHORT),
        (3, "Socket recv failed while polling for opId", 64 * 2**20, SHORT),  # what the first rank says when another's has run out
        (3, "Socket recv failed while polling for opId", 2**30, None),
        (2, "Socket recv failed while polling for opId", None, SHORT),  # no such folder
        (1, "Cuda failure 217 'peer access is not supported'", 64 * 2**20, SHORT),  # with room it goes another way
        (1, "failed to open CUDA IPC handle: 217 peer access is not supported", 2**30, UNREACHED),
        (1, "Cuda failure 2 'out of memory'", 64 * 2**20, None),
        (5, "Duplicate GPU", 64 * 2**20, None),
    ],
)
def test_an_error_of_the_library_names_what_it_met_and_what_helps(code, text, size, remedy, monkeypatch):
    library = SimpleNamespace(ncclGetErrorString=lambda _code: b"unhandled error", ncclGetLastError=lambda _comm: text.encode())
    monkeypatch.setattr(nccl, "_library", lambda: library)
    shared_memory(monkeypatch, size)
    with pytest.raises(CommunicationFailed, match=re.escape(text)) as raised:
        nccl._check(code)
    assert [said in str(raised.value) for said in (SHORT, UNREACHED)] == [said == remedy for said in (SHORT, UNREACHED)]


def shared_memory(monkeypatch, size: int | None) -> None:
    """From now on the machine has ``size`` bytes of it; None: nowhere."""

    def usage(path: str) -> SimpleNamespace:
        if path != "/dev/shm" or size is None:
            raise FileNotFoundError(path)
        return SimpleNamespace(total=size)

    monkeypatch.setattr(nccl.shutil, "disk_usage", usage)


NVLINK, BRIDGES = {(0, 1), (0, 2), (1, 2)}, {(0, 1)}  # who reaches whom, of three


@pytest.mark.parametrize(
    ("size", "cards", "reach", "users", "found"),
    [
        (2**30, 2, set(), {}, "0"),
        (2**30, 3, BRIDGES, {}, "0"),
        (2**30, 3, NVLINK, {}, None),
        (2**30, 1, set(), {}, None),
        (64 * 2**20, 2, set(), {}, None),
        (None, 2, set(), {}, None),
        (2**30, 2, set(), {"NCCL_CUMEM_HOST_ENABLE": "1"}, "1"),
        (2**30, 3, NVLINK, {"NCCL_P2P_DISABLE": "1"}, "0"),
        (2**30, 3, NVLINK, {"NCCL_P2P_DISABLE": "0"}, None),
        (64 * 2**20, 3, NVLINK, {"NCCL_P2P_DISABLE": "1"}, None),
    ],
)
def test_gpus_that_do_not_reach_each_other_share_host_memory_in_the_way_that_every_driver_knows(
    size, cards, reach, users, found, monkeypatch
):
    """Where there is room: the other way takes none of it."""
    for name in ("NCCL_SOCKET_IFNAME", "NCCL_GRAPH_REGISTER", "NCCL_CUMEM_HOST_ENABLE", "NCCL_P2P_DISABLE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    shared_memory(monkeypatch, size)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: tuple(sorted((one, other))) in reach)
    communicator._tell_nccl()
    assert os.environ.get("NCCL_CUMEM_HOST_ENABLE") == found and os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_connecting_has_its_own_time_and_the_memory_that_torch_keeps(tmp_path, monkeypatch):
    """Buffers between two cards are hundreds of megabytes beside torch's allocator. A rank may have waited long for the others."""
    events: list[str] = []
    now = 1000.0

    def meet(*_args) -> None:
        nonlocal now
        now += 50.0
        events.append("met")

    def connect(_store, _rank, _size, _device, _life, deadline: float) -> SimpleNamespace:
        events.append(f"connect until {deadline:g}")
        return SimpleNamespace(abort=lambda: None, close=lambda: None)

    monkeypatch.setattr(communicator, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(communicator, "_tell_nccl", lambda: None)
    monkeypatch.setattr(communicator, "publish_id", lambda _store, _rank: None)
    monkeypatch.setattr(communicator.Communicator, "_meet", meet)
    monkeypatch.setattr(communicator, "Nccl", connect)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("empty"))
    comm = communicator.Communicator.join(tmp_path / "store", "one", 0, 2, "cuda:0", 1.0, 60.0)
    comm.split([0])
    assert events == ["met", "empty", "connect until 1110"]
