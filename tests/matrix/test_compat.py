"""The comparison of ComfyUI trees: nothing differs on the one that the plans were written for, and what differs is seen."""

from __future__ import annotations

import copy
import json

import pytest

from .compat import REFERENCE
from .facts import differences, facts, words

pytestmark = pytest.mark.usefixtures("comfy")


def test_reference_is_what_the_plans_meet_today() -> None:
    import comfyui_version

    reference = json.loads(REFERENCE.read_text())
    if comfyui_version.__version__ != reference["ComfyUI"]:
        pytest.skip(f"the reference is of ComfyUI {reference['ComfyUI']}; `make compat` compares")
    assert differences(reference["facts"], facts()) == [], "python tests/matrix/compat.py --record writes it anew"


def test_what_differs_is_named() -> None:
    before = json.loads(REFERENCE.read_text())["facts"]
    now = copy.deepcopy(before)
    name = "ldm.wan.model.WanModel"
    (title,) = [what for what in now[name] if what.startswith("blocks: ") and what.endswith("forward()")]
    now[name][title] = now[name][title].replace("freqs", "rope") + ", more"
    now["ldm.flux.model.Flux"]["double_blocks"] = "missing"
    del now["ldm.cogvideo.model.CogVideoXTransformer3DModel"]
    rows = differences(before, now)
    assert ("ldm.flux.model.Flux", "double_blocks", "not there", "missing") in rows
    (changed,) = [row for row in rows if row[0] == name]
    assert words(*changed[2:]) == "new: rope, more; gone: freqs"
    assert any(row[0].endswith("CogVideoXTransformer3DModel") and row[3] == "not there" for row in rows)
