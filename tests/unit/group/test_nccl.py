"""Ending an NCCL communicator, with the library faked: who waits for whom."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from para_core.group import nccl
from para_core.group.transport import CommunicationFailed, Life


@pytest.fixture
def graphs(monkeypatch) -> threading.Event:
    """Set once no CUDA graph holds the communicator: ``ncclCommAbort`` does not return before."""
    gone = threading.Event()
    library = SimpleNamespace(ncclCommAbort=lambda _comm: gone.wait(30), ncclCommGetAsyncError=lambda _comm, _state: 0)
    monkeypatch.setattr(nccl, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    yield gone
    gone.set()


@pytest.fixture
def transport() -> nccl.Nccl:
    found = object.__new__(nccl.Nccl)
    found._comm, found._device, found._life = 1, torch.device("cuda", 0), Life()
    found._lock, found._aborted, found._ending = threading.Lock(), False, None
    return found


def test_whoever_aborts_does_not_wait_for_cuda_graphs_of_another_thread(graphs, transport):
    """The thread that listens to the workers aborts while the other one still holds captures, and must get to dropping them."""
    started = time.monotonic()
    watch = threading.Thread(target=transport.abort)
    watch.start()
    watch.join(10)
    with pytest.raises(CommunicationFailed, match="aborted"):
        transport.check()
    transport.abort()
    assert time.monotonic() - started < 5 and not watch.is_alive() and transport._ending.is_alive()
    graphs.set()
    transport.close()
    assert not transport._ending.is_alive()


def test_closing_waits_for_a_moment_only(graphs, transport, monkeypatch):
    monkeypatch.setattr(nccl, "_ENDED", 0.05)
    transport.close()
    assert transport._ending.is_alive()
