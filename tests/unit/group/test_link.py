"""The measured link between ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from unit.fake_comm import fake_meshes, on_ranks

from para_core.group import link
from para_core.group.transport import CommunicationFailed


def test_every_rank_measures_a_latency_and_a_rate(monkeypatch):
    monkeypatch.setattr(link, "LARGE", 1 << 12)
    meshes = fake_meshes(1, 3)
    comms = [mesh.sequence for mesh in meshes]
    found = on_ranks(3, lambda rank: link.measure(comms[rank], torch.device("cpu")), comms)
    assert all(0 < one.latency < 10 and 0 < one.rate and math.isfinite(one.rate) for one in found)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rate", [1e9, 1e10, 2.5e11])
def test_what_waiting_for_the_device_takes_is_no_part_of_a_message(size, rate, monkeypatch):
    """A forward waits for it once, at its end: a fast link would look several times slower, and bytes be thought to pay."""
    now = 0.0

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    def all_to_all(received, sent, received_sizes, sent_sizes) -> None:
        assert (received_sizes[0], sent_sizes[0]) == (0, 0) and sent.numel() == sum(sent_sizes) and received.numel() == sum(received_sizes)
        pass_by(max(5e-5, sum(sent_sizes) / rate))
        for rank, piece in enumerate(received.split(received_sizes)):
            piece.fill_(rank + 1)

    monkeypatch.setattr(link, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(link, "_wait", lambda _comm: pass_by(1.5e-4))
    found = link.measure(SimpleNamespace(rank=0, size=size, all_to_all=all_to_all), torch.device("cpu"))
    assert found.rate == pytest.approx(rate, rel=0.35) and 5e-5 <= found.latency < 1e-4


def test_a_link_that_changes_what_it_carries_is_found_out(monkeypatch):
    """GPUs that are said to reach each other's memory and do not: messages come as zeros."""
    monkeypatch.setattr(link, "LARGE", 1 << 12)
    comm = SimpleNamespace(rank=0, size=2, all_to_all=lambda *_: None, settle=lambda _patience: None)
    with pytest.raises(RuntimeError, match="arrive changed; NCCL_P2P_DISABLE=1"):
        link.measure(comm, torch.device("cpu"))


def test_a_link_over_which_nothing_arrives_is_given_up_soon():
    """The device never gets done: who waited for it himself would wait for ever."""

    def settle(patience: float) -> None:
        raise CommunicationFailed(f"the GPU did not finish within {patience:g} s")

    comm = SimpleNamespace(rank=0, size=2, all_to_all=lambda *_: None, settle=settle)
    with pytest.raises(CommunicationFailed, match="do not arrive .*60 s.*; NCCL_P2P_DISABLE=1"):
        link.measure(comm, torch.device("cpu"))
