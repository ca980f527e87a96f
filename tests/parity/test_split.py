"""What a split reads off a call, and off the machine."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from families.tiny import flux

from para_core.comfy.meter import Meter
from para_core.execution import gain
from para_core.execution.ways import Machine
from para_core.plans.flux import PLAN
from para_core.sequence.mesh import Link

pytestmark = pytest.mark.usefixtures("comfy")


def test_a_call_without_text_is_as_short_as_its_image() -> None:
    from para_core.comfy.split import shortest

    model, _ = flux.flux()
    given: dict[str, torch.Tensor] = {}
    call = SimpleNamespace(latents=[torch.zeros(1, 16, 8, 12)], arguments=given)
    assert shortest(PLAN, model, call) == 4 * 6  # type: ignore[arg-type]
    given["context"] = torch.zeros(1, 5, 8)
    assert shortest(PLAN, model, call) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(("compiled", "rate"), [(object(), 3.0), (None, math.inf)], ids=["compiled", "as they are"])
def test_matrices_are_measured_where_blocks_are_compiled(compiled: object, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from para_core.comfy.split import Split

    monkeypatch.setattr(gain, "memory_rate", lambda device: 2.0)
    monkeypatch.setattr(gain, "matrix_rate", lambda device, dtype: 3.0)
    patcher = SimpleNamespace(load_device=torch.device("cuda"), model=SimpleNamespace(get_dtype_inference=lambda: torch.bfloat16))
    session = SimpleNamespace(patcher=patcher, foreign="", runner=SimpleNamespace(compiled=compiled))
    split = SimpleNamespace(session=session, plan=PLAN, group=SimpleNamespace(link=lambda: Link(1e-5, 1e9)))
    assert Split._machine(split) == Machine(Link(1e-5, 1e9), 2.0, rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "asked"), [(True, ["form", "link", "load", "begin"]), (False, ["form", "load", "begin"])], ids=["cards", "CPU"]
)
def test_weights_are_sent_only_over_a_link_that_carries(own: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing else asks for its speed: blocks that are not cut, or attention that another node computes on rank 0."""
    from para_core.comfy import sidecars, split

    calls: list[str] = []
    monkeypatch.setattr(split, "processors_of_their_own", lambda _device: own)
    monkeypatch.setattr(split.comfy.sampler_helpers, "estimate_memory", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(sidecars, "load", lambda *_: calls.append("load"))
    monkeypatch.setattr(sidecars, "model_id", lambda _patcher: 1)
    runner = SimpleNamespace(override=SimpleNamespace(ways=SimpleNamespace()), cache=None, compiled=None)
    session = SimpleNamespace(
        patcher=SimpleNamespace(load_device=torch.device("cpu")), parallel=None, runner=runner, meter=Meter(torch.device("cpu")),
        attention=None, chooser=None, foreign="another node's",
    )  # fmt: skip
    group = SimpleNamespace(
        form=lambda *_: calls.append("form"), link=lambda: calls.append("link"), measure=lambda _exchanged: None,
        begin=lambda **_run: calls.append("begin"),
    )  # fmt: skip
    found = object.__new__(split.Split)
    found.session, found.plan, found.group, found.devices = session, PLAN, group, ["cuda:1"]  # type: ignore[assignment]
    found._share_model((None, (1, 4, 8, 8), {}))
    assert calls == asked and found.active
