"""The measured link between ranks."""

from __future__ import annotations

import math

import torch
from unit.fake_comm import fake_meshes, on_ranks

from para_core.group import link


def test_every_rank_measures_a_latency_and_a_rate(monkeypatch):
    monkeypatch.setattr(link, "LARGE", 1 << 12)
    meshes = fake_meshes(1, 3)
    comms = [mesh.sequence for mesh in meshes]
    found = on_ranks(3, lambda rank: link.measure(comms[rank], torch.device("cpu")), comms)
    assert all(0 < one.latency < 10 and 0 < one.rate and math.isfinite(one.rate) for one in found)
