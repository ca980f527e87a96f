"""What a sidecar process does before it serves."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from para_core import sidecar
from para_core.group import channel, launch


def cards(monkeypatch, *names: str | None) -> None:
    """The GPUs that this process sees; None: torch does not know their names for all."""
    known = [SimpleNamespace() if name is None else SimpleNamespace(uuid=name) for name in names]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(known))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known[index])


@pytest.mark.parametrize(
    ("names", "card", "found"),
    [
        (("first", "second"), "second", "cuda:1"),
        (("second", "first"), "second", "cuda:0"),  # ordered anew
        (("second",), "second", "cuda:0"),  # the first one hidden
        (("first",), "second", None),
        ((), "", None),
        ((None, None), "", "cuda:1"),
        (("first", "other"), "second", "cuda:1"),  # a name that means nothing here
        (("same", "same"), "same", "cuda:1"),
    ],
    ids=str,
)
def test_a_card_is_found_though_the_environment_has_changed_since_comfyui_started(names, card, found, monkeypatch):
    """Another pack may have set CUDA_VISIBLE_DEVICES when it was imported: too late for ComfyUI, in time for its workers."""
    cards(monkeypatch, *names)
    if found is None:
        with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES was changed after ComfyUI had started"):
            sidecar.own_card(torch.device("cuda:1"), card)
    else:
        assert sidecar.own_card(torch.device("cuda:1"), card) == found


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
    cards(monkeypatch, "first", "second")
    hello = {"device": device, "card": "second", "rank": 1, "size": 2, "root": str(tmp_path), "flags": {}}
    monkeypatch.setattr(channel, "answer", lambda _path: SimpleNamespace(hear=lambda: ("hello", hello)))
    monkeypatch.setattr(launch, "parent_of", lambda _path: 1)
    monkeypatch.setattr(launch, "watch_parent", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda given: events.append(str(given)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    sidecar.main(str(tmp_path / "worker.sock"))
    assert events == ["adopt", *chosen, "serve"]
