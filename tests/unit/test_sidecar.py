"""What a sidecar process does before it serves."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from para_core import sidecar
from para_core.group import channel, launch


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_its_card_is_the_current_one_before_comfyui_is_imported(device, chosen, monkeypatch, tmp_path):
    """ComfyUI asks the current device for its memory at import: on rank 0's card every sidecar would leave a CUDA context."""
    events: list[str] = []

    def module(name: str, function: str) -> ModuleType:
        made = ModuleType(name)
        setattr(made, function, lambda *_: events.append(function))
        return made

    for name, function in (("flags", "adopt"), ("worker", "serve")):
        monkeypatch.setitem(sys.modules, f"para_core.comfy.{name}", module(f"para_core.comfy.{name}", function))
    hello = {"device": device, "rank": 1, "size": 2, "root": str(tmp_path), "flags": {}}
    monkeypatch.setattr(channel, "answer", lambda _path: SimpleNamespace(hear=lambda: ("hello", hello)))
    monkeypatch.setattr(launch, "parent_of", lambda _path: 1)
    monkeypatch.setattr(launch, "watch_parent", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda given: events.append(str(given)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    sidecar.main(str(tmp_path / "worker.sock"))
    assert events == ["adopt", *chosen, "serve"]
